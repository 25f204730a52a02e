"""The gate: pieces of any size, inspectors and scanners that misbehave, cancellation, and receipts that go on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from granite_storage import ConfigurationError, SizeLimitedStream, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import (
    ContentRejectedError,
    ContentTooLargeError,
    InfectedContentError,
    ScannerUnavailableError,
    SizeMismatchError,
    UnsupportedContentError,
)
from granite_storage.inspection import ImageLimits, ScanResult, UploadPreview
from granite_storage.inspection import gate as gate_module
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await
from tests.core.support import MIB, SLOT, chunks_of, eventually, left_below, local_manager, manager_on
from tests.inspection.support import INFECTED, UNAVAILABLE, File, ScriptedScanner, png

PICTURE = png(text=b"x" * 5000)
MOMENTS: list[Moment] = ["at once", "a little later", "twice"]


async def objects(manager: StorageManager) -> list[str]:
    return [info.location for backend in manager.backends.values() async for info in backend.iter_objects()]


class Counting:
    """An inspector that counts the bytes, and refuses or fails where it is told to."""

    def __init__(self, *, refuse_at: int | None = None, fails: bool = False, stops_after: int | None = None) -> None:
        self.refuse_at, self.fails, self.stops_after = refuse_at, fails, stops_after
        self.begun = 0
        self.threads: set[int] = set()

    def begin(self, upload: UploadPreview, /) -> _Counted:
        self.begun += 1
        return _Counted(self)


class _Counted:
    def __init__(self, owner: Counting) -> None:
        self.owner, self.size = owner, 0

    def feed(self, piece: bytes, /) -> bool:
        self.owner.threads.add(threading.get_ident())
        assert 0 < len(piece) <= MIB
        self.size += len(piece)
        if self.owner.fails:
            raise RuntimeError("a bug in an inspector")
        if self.owner.refuse_at is not None and self.size >= self.owner.refuse_at:
            raise ContentRejectedError("there is too much of it")
        return self.owner.stops_after is None or self.size < self.owner.stops_after

    def finish(self) -> dict[str, Any]:
        return {"counted": self.size, "type": "an inspector's word"}


@pytest.mark.parametrize("size", [1, 7, 1000, 70_000, 3 * MIB])
async def test_pieces_of_any_size(size: int) -> None:
    content = png(text=b"x" * 150_000)
    scanner, counting = ScriptedScanner(), Counting()
    manager = manager_on(
        MemoryStorageBackend(), accept=("image/png",), inspect=[ImageLimits(), counting], scanner=scanner, strip=None
    )
    if size == 1:
        content = PICTURE
    pieces = (content[start : start + size] for start in range(0, len(content), size))
    ref = await manager.put_stream(**SLOT, stream=pieces)
    assert await manager.get(ref) == content
    assert ref.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert ref.media == {"type": "image/png", "width": 3, "height": 2, "counted": len(content)}
    assert scanner.seen == [content]
    assert threading.get_ident() not in counting.threads


async def test_an_inspector_that_has_seen_enough_is_asked_no_more() -> None:
    counting = Counting(stops_after=10_000)
    manager = manager_on(MemoryStorageBackend(), inspect=[counting])
    ref = await manager.put_stream(**SLOT, stream=chunks_of(*[b"x" * 100_000] * 50))
    assert ref.media is not None
    assert ref.media["counted"] <= 3 * MIB
    assert ref.size == 5_000_000


@pytest.mark.parametrize("content", [b"x" * 300_000, [b"x" * 100_000] * 30], ids=["bytes", "stream"])
@pytest.mark.parametrize(
    ("counting", "error"), [(Counting(refuse_at=200_000), ContentRejectedError), (Counting(fails=True), RuntimeError)]
)
async def test_an_inspector_that_refuses_or_fails(
    tmp_path: Path, content: Any, counting: Counting, error: type[Exception]
) -> None:
    manager = local_manager(tmp_path, inspect=[counting])
    with pytest.raises(error):
        if isinstance(content, bytes):
            await manager.put_bytes(**SLOT, content=content)
        else:
            await manager.put_stream(**SLOT, stream=content)
    assert left_below(tmp_path) == []


@pytest.mark.parametrize("answer", ["a coroutine", None, 1])
async def test_an_inspector_that_answers_something_else(answer: object) -> None:
    class Mistaken(Counting):
        def begin(self, upload: UploadPreview, /) -> Any:
            async def feed(_: bytes) -> bool:
                return True

            counted = super().begin(upload)
            counted.feed = feed if answer == "a coroutine" else lambda _: answer  # type: ignore[method-assign, assignment]
            return counted

    manager = manager_on(MemoryStorageBackend(), inspect=[Mistaken()])
    with pytest.raises(TypeError, match=r"feed\(\)"):
        await manager.put_bytes(**SLOT, content=b"abc")
    assert await objects(manager) == []


@pytest.mark.parametrize("is_stream", [False, True])
async def test_text_that_goes_on_as_binary(*, is_stream: bool) -> None:
    manager = manager_on(MemoryStorageBackend(), accept=("text/plain", "application/x-sh"))
    content = b"a" * 70_000 + b"\x7fELF\0\0"

    async def put(content_type: str) -> StoredObjectRef:
        if is_stream:
            return await manager.put_stream(**SLOT, stream=chunks_of(content[:1000], content[1000:]), content_type=content_type)
        return await manager.put_bytes(**SLOT, content=content, content_type=content_type)

    with pytest.raises(UnsupportedContentError, match="continues with binary content"):
        await put("text/plain")
    assert await objects(manager) == []
    assert (await put("application/x-sh")).content_type == "application/x-sh"  # an installer has its archive behind it


def test_a_result_that_cannot_be() -> None:
    with pytest.raises(TypeError, match="True or False"):
        ScanResult("infected", "a scanner")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not have a signature"):
        ScanResult(True, "a scanner", "Eicar-Test")


def test_a_result_fits_into_a_row() -> None:
    result = ScanResult(False, "scan\0ner" + "x" * 1000, "Ei\0car\n" + "y" * 1000)
    assert result.by == ("scanner" + "x" * 1000)[:200]
    assert result.signature == ("Eicar" + "y" * 1000)[:200]


async def test_an_upload_over_the_limit_is_refused_as_ever() -> None:
    manager = manager_on(MemoryStorageBackend(), max_size=2 * MIB, inspect=[Counting()], scanner=ScriptedScanner())
    with pytest.raises(ContentTooLargeError):
        await manager.put_stream(**SLOT, stream=[b"x" * MIB] * 3)
    with pytest.raises(SizeMismatchError):
        await manager.put_stream(**SLOT, stream=[b"x" * MIB], size=17)
    assert await objects(manager) == []


async def test_a_source_that_fails_passes_through() -> None:
    scanner = ScriptedScanner()
    manager = manager_on(MemoryStorageBackend(), inspect=[Counting()], scanner=scanner)
    with pytest.raises(ZeroDivisionError):
        await manager.put_stream(**SLOT, stream=chunks_of(b"x" * 200_000, then=ZeroDivisionError()))
    assert await objects(manager) == []
    assert scanner.seen == []


class TestScanners:
    """A scanner that does not answer, lies or dies never lets in what it has not judged."""

    @pytest.mark.parametrize(
        "fails", [UNAVAILABLE, ConnectionResetError("gone"), RuntimeError("a bug"), asyncio.CancelledError()]
    )
    @pytest.mark.parametrize("is_stream", [False, True])
    async def test_failures(self, fails: BaseException, is_stream: bool) -> None:
        manager = manager_on(MemoryStorageBackend(), scanner=ScriptedScanner(fails=fails))
        with pytest.raises(ScannerUnavailableError):
            if is_stream:
                await manager.put_stream(**SLOT, stream=chunks_of(*[b"x" * 500_000] * 9))
            else:
                await manager.put_bytes(**SLOT, content=b"abc")
        assert await objects(manager) == []

    async def test_a_verdict_on_a_part_is_not_believed(self) -> None:
        manager = manager_on(MemoryStorageBackend(), scanner=ScriptedScanner(reads=False))
        with pytest.raises(ScannerUnavailableError, match="before it had read all of it"):
            await manager.put_bytes(**SLOT, content=b"abc")
        with pytest.raises(ScannerUnavailableError, match="before it had read all of it"):
            await manager.put_stream(**SLOT, stream=[b"x" * MIB] * 5)

    async def test_an_answer_of_another_kind_is_not_believed(self) -> None:
        class Mistaken(ScriptedScanner):
            async def scan(self, content: AsyncIterator[bytes], /) -> Any:
                await super().scan(content)
                return True

        manager = manager_on(MemoryStorageBackend(), scanner=Mistaken())
        with pytest.raises(ScannerUnavailableError, match="must return a ScanResult"):
            await manager.put_bytes(**SLOT, content=b"abc")

    async def test_one_that_hangs_is_waited_for_so_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gate_module, "_VERDICT_TIMEOUT", 0.05)
        manager = manager_on(MemoryStorageBackend(), scanner=ScriptedScanner("hold", hangs=True))
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        assert ref.scan is not None
        assert ref.scan["status"] == "pending"

    async def test_one_that_does_not_read_holds_up_a_stream_so_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gate_module, "_VERDICT_TIMEOUT", 0.05)
        manager = manager_on(MemoryStorageBackend(), scanner=ScriptedScanner(hangs=True))
        with pytest.raises(ScannerUnavailableError):
            await asyncio.wait_for(manager.put_stream(**SLOT, stream=[b"x" * MIB] * 9), 20)
        assert await objects(manager) == []

    async def test_what_is_found_early_ends_the_upload_early(self) -> None:
        class Early(ScriptedScanner):
            async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
                async for piece in content:
                    if INFECTED in piece:
                        return ScanResult(False, "early", "Eicar-Test")
                return ScanResult(True, "early")

        async def endless() -> AsyncIterator[bytes]:
            yield INFECTED
            while True:
                await asyncio.sleep(0)
                yield b"x" * MIB

        manager = manager_on(MemoryStorageBackend(), scanner=Early())
        with pytest.raises(InfectedContentError) as caught:
            await manager.put_stream(**SLOT, stream=endless())
        assert caught.value.signature == "Eicar-Test"
        assert await objects(manager) == []


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_cancel_at_every_await_leaves_nothing(tmp_path: Path, moment: Moment, is_stream: bool) -> None:
    async def refuse_nothing(_: UploadPreview) -> None:
        await asyncio.sleep(0)

    checks = {"inspect": [Counting()], "scanner": ScriptedScanner(), "validate": refuse_nothing}
    manager = local_manager(tmp_path, **checks)

    async def call(_: int) -> StoredObjectRef:
        if is_stream:
            return await manager.put_stream(**SLOT, stream=chunks_of(*[b"x" * 100_000] * 3))
        return await manager.put_bytes(**SLOT, content=b"x" * 100_000)

    others = asyncio.all_tasks()
    async for _, task, struck in cancel_at_every_await(call, moment):
        if not task.cancelled() and task.exception() is None:
            await manager.delete(task.result())
        else:
            assert struck
        await eventually(lambda: asyncio.all_tasks() <= {*others, asyncio.current_task()})
        assert left_below(tmp_path) == []
    await manager.aclose()


class TestValidators:
    """Functions of the application see what is known, and their messages reach the client."""

    async def test_what_they_see(self) -> None:
        shown: list[UploadPreview] = []

        async def validate(upload: UploadPreview) -> None:
            await asyncio.sleep(0)
            shown.append(upload)

        manager = manager_on(MemoryStorageBackend(), validate=validate)
        await manager.put_bytes(**SLOT, content=b"abc", original_filename="a.txt", content_type="text/plain")
        await manager.put_stream(**SLOT, stream=chunks_of(b"x" * 100_000, b"y"), size=100_001)
        small, large = shown
        assert small == UploadPreview("files", b"abc", "a.txt", "text/plain", "text/plain", 3)
        assert (len(large.head), large.size, large.filename) == (64 * 1024, 100_001, None)

    @pytest.mark.parametrize("error", [ValueError("no more than ten"), ContentRejectedError("no more than ten")])
    async def test_a_refusal(self, error: Exception) -> None:
        def validate(_: UploadPreview) -> None:
            time.sleep(0.01)  # it may, because it runs in a thread
            raise error

        manager = manager_on(MemoryStorageBackend(), validate=validate)
        with pytest.raises(ContentRejectedError, match="no more than ten"):
            await manager.put_bytes(**SLOT, content=b"abc")

    @pytest.mark.parametrize("error", [KeyError("a bug"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a bug")], ids=repr)
    async def test_another_error_is_the_applications_own(self, error: Exception) -> None:
        def validate(_: UploadPreview) -> None:
            raise error

        manager = manager_on(MemoryStorageBackend(), validate=validate)
        with pytest.raises(type(error)):
            await manager.put_bytes(**SLOT, content=b"abc")
        assert await objects(manager) == []

    @pytest.mark.parametrize("answer", [False, True, ContentRejectedError("not raised")], ids=repr)
    @pytest.mark.parametrize("is_async", [False, True])
    async def test_an_answer_is_a_mistake(self, answer: object, *, is_async: bool) -> None:
        async def asynchronously(_: UploadPreview) -> object:
            return answer

        manager = manager_on(MemoryStorageBackend(), validate=asynchronously if is_async else lambda _: answer)
        with pytest.raises(ConfigurationError, match="must return None"):
            await manager.put_bytes(**SLOT, content=b"abc")
        assert await objects(manager) == []

    async def test_the_size_that_an_upload_says(self) -> None:
        shown: list[int | None] = []

        def validate(upload: UploadPreview) -> None:
            shown.append(upload.size)

        manager = manager_on(MemoryStorageBackend(), validate=validate)
        content = b"x" * 100_000
        await manager.put_stream(**SLOT, stream=File(content).upload())
        await manager.put_stream(**SLOT, stream=SizeLimitedStream(File(content).upload(), None))
        await manager.put_stream(**SLOT, stream=File(content).pieces())
        assert shown == [100_000, 100_000, None]


class TestReceipts:
    """What was found goes with the object, and is no part of what a ref is compared by."""

    async def test_a_copy_under_the_same_policy_is_not_judged_again(self) -> None:
        counting, scanner = Counting(), ScriptedScanner()
        manager = manager_on(MemoryStorageBackend(), inspect=[counting], scanner=scanner)
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        copy = await manager.copy(ref, model_name="doc", entity_id="2", field_name="file")
        assert (copy.media, copy.scan) == (ref.media, ref.scan)
        assert (counting.begun, len(scanner.seen)) == (1, 1)

    async def test_a_copy_of_what_is_held_is_held(self) -> None:
        backend = MemoryStorageBackend()
        policies = {
            "files": StoragePolicy("files", "store", scanner=ScriptedScanner("hold", fails=UNAVAILABLE)),
            "plain": StoragePolicy("plain", "store"),
        }
        manager = StorageManager(backends={"store": backend}, policies=policies)
        ref = await manager.put_bytes(**SLOT, content=INFECTED)
        copy = await manager.copy(ref, **{**SLOT, "storage_key": "plain"})
        assert copy.scan == ref.scan

    def test_equality_and_json(self) -> None:
        plain = StoredObjectRef("files", "store", "x", 3, "")
        judged = replace(plain, media={"type": "image/png"}, scan={"status": "clean"})
        assert judged == plain
        assert hash(judged) == hash(plain)
        assert plain.to_dict().keys().isdisjoint({"media", "scan"})
        unpickled = pickle.loads(pickle.dumps(judged))  # noqa: S301  # it is our own
        for copy in (StoredObjectRef.from_dict(json.loads(json.dumps(judged.to_dict()))), unpickled):
            assert (copy.media, copy.scan) == ({"type": "image/png"}, {"status": "clean"})
        with pytest.raises(TypeError):
            judged.media["type"] = "text/html"  # type: ignore[index]

    def test_parts_of_another_shape_are_kept(self) -> None:
        data = {**StoredObjectRef("files", "store", "x", 3, "").to_dict(), "media": "odd", "digests": {"a": {}}, "scan": None}
        ref = StoredObjectRef.from_dict(data)
        assert (ref.media, ref.scan) == (None, None)
        assert ref.to_dict() == data


def yields(_: UploadPreview) -> Iterator[None]:
    yield


async def yields_asynchronously(_: UploadPreview) -> AsyncIterator[None]:
    yield


class AsynchronousInspector:
    async def begin(self, upload: UploadPreview, /) -> None:
        pass


@pytest.mark.parametrize(
    "checks",
    [
        {"accept": "image/*"},
        {"accept": ()},
        {"accept": (".png",)},
        {"on_mismatch": "ignore"},
        {"inspect": ImageLimits},
        {"inspect": [ImageLimits]},
        {"inspect": ImageLimits()},
        {"scanner": "127.0.0.1:3310"},
        {"scanner": ScriptedScanner("wait")},  # type: ignore[arg-type]
        {"strip": "gps"},
        {"on_unstrippable": "drop"},
        {"validate": "a string"},
        {"validate": lambda: None},
        {"validate": lambda one, two: None},
        {"validate": ScriptedScanner},
        {"validate": yields},
        {"validate": yields_asynchronously},
        {"inspect": [AsynchronousInspector()]},
        {"on_mismatch": "correct"},
    ],
)
def test_checks_that_cannot_work(checks: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        StoragePolicy("files", "store", **checks)
