"""The fault-injecting backend: what it was told, the n-th time, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.base import (
    StorageBackend,
    SupportsBatchDelete,
    SupportsCleanup,
    SupportsCopy,
    SupportsPresign,
    SupportsPresignedUpload,
    UploadRequest,
)
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import BackendError, BackendUnavailableError, ChecksumMismatchError, ObjectNotFoundError
from granite_storage.testing import FaultInjectingBackend, RecordedCall

PROTOCOLS = (SupportsCopy, SupportsBatchDelete, SupportsCleanup, SupportsPresign, SupportsPresignedUpload)


class Presigning(MemoryStorageBackend):
    extra_keys = frozenset({"bucket"})

    async def presign_get(
        self, location: str, *, expires_in: timedelta, content_type: str | None = None, disposition: str | None = None
    ) -> str:
        return f"https://example.org/{location}"

    async def presign_upload(self, location: str, **_: Any) -> UploadRequest:
        return UploadRequest("PUT", f"https://example.org/{location}")


@pytest.fixture
def faults() -> Any:
    return FaultInjectingBackend(MemoryStorageBackend())


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(backend: StorageBackend, location: str, size: int = -1, **span: Any) -> list[bytes]:
    reader = await backend.open(location, **span)
    try:
        return [chunk async for chunk in _chunks(reader, size)]
    finally:
        await reader.aclose()


async def _chunks(reader: Any, size: int) -> AsyncIterator[bytes]:
    while chunk := await reader.read(size):
        yield chunk


def test_has_the_abilities_of_its_inner_backend(tmp_path: Any) -> None:
    for inner in (MemoryStorageBackend(), LocalStorageBackend(tmp_path), Presigning()):
        wrapped = FaultInjectingBackend(FaultInjectingBackend(inner))
        assert isinstance(wrapped, FaultInjectingBackend | StorageBackend)
        assert [isinstance(wrapped, protocol) for protocol in PROTOCOLS] == [
            isinstance(inner, protocol) for protocol in PROTOCOLS
        ]
    assert FaultInjectingBackend(Presigning()).extra_keys == {"bucket"}


async def test_abilities_are_passed_on() -> None:
    faults: Any = FaultInjectingBackend(Presigning())
    await faults.put_bytes("a", b"a")
    await faults.copy("a", "b")
    assert await faults.presign_get("b", expires_in=timedelta(1)) == "https://example.org/b"
    options: dict[str, Any] = {"expires_in": timedelta(1), "content_type": "a/b", "min_size": 1, "max_size": 2}
    assert (await faults.presign_upload("c", **options)).url == "https://example.org/c"
    assert await faults.delete_many(["a", "b"]) == {}
    assert faults.calls == [
        RecordedCall("put_bytes", ("a",)),
        RecordedCall("copy", ("a", "b")),
        RecordedCall("presign_get", ("b",)),
        RecordedCall("presign_upload", ("c",)),
        RecordedCall("delete_many", ("a", "b")),
    ]


async def test_nth_call_fails_and_only_it(faults: Any) -> None:
    faults.fail("put_bytes", nth=2, times=2)
    outcomes = await asyncio.gather(*(faults.put_bytes(str(n), b"") for n in range(5)), return_exceptions=True)
    assert [isinstance(outcome, BackendUnavailableError) for outcome in outcomes] == [False, True, True, False, False]
    assert outcomes[1].location == "1"
    assert faults.pending == 0
    assert faults.count("put_bytes") == 5
    assert [info.location async for info in faults.iter_objects()] == ["0", "3", "4"]


async def test_counting_starts_where_the_fault_is_declared(faults: Any) -> None:
    await faults.put_bytes("a", b"")
    error = OSError("on purpose")
    faults.fail("exists", error=error)
    assert faults.pending == 1
    with pytest.raises(OSError, match="on purpose") as caught:
        await faults.exists("a")
    assert caught.value is error
    assert await faults.exists("a")


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("stat", ("there",)),
        ("delete", ("there",)),
        ("open", ("there",)),
        ("put_bytes", ("new", b"")),
        ("copy", ("there", "new")),
        ("delete_many", (["there"],)),
        ("aclose", ()),
    ],
)
@pytest.mark.parametrize("lost_answer", [False, True])
async def test_every_operation_fails(faults: Any, operation: Any, arguments: Any, lost_answer: bool) -> None:
    await faults.put_bytes("there", b"...")
    faults.fail(operation, lost_answer=lost_answer)
    with pytest.raises(BackendUnavailableError, match=operation):
        await getattr(faults, operation)(*arguments)
    assert await faults.exists("new") is (lost_answer and operation in {"put_bytes", "copy"})
    assert await faults.exists("there") is not (lost_answer and operation.startswith("delete"))


async def test_lost_answer_of_a_stream(faults: Any) -> None:
    faults.fail("put_stream", lost_answer=True)
    with pytest.raises(BackendUnavailableError):
        await faults.put_stream("a", stream(b"whole"))
    assert await read(faults, "a") == [b"whole"]


async def test_reads_fail(faults: Any) -> None:
    await faults.put_bytes("a", b"0123456789")
    faults.fail("read", nth=3)
    reader = await faults.open("a")
    assert [await reader.read(2), await reader.read(2)] == [b"01", b"23"]
    with pytest.raises(BackendUnavailableError):
        await reader.read(2)
    await reader.aclose()


async def test_listings_fail_and_break_off(faults: Any) -> None:
    for name in "abc":
        await faults.put_bytes(name, b"")
    faults.fail("iter_objects")
    with pytest.raises(BackendUnavailableError):
        [info async for info in faults.iter_objects()]
    faults.cut("iter_objects", after=2)
    listing = faults.iter_objects()
    assert [(await anext(listing)).location for _ in range(2)] == ["a", "b"]
    with pytest.raises(BackendUnavailableError):
        await anext(listing)
    faults.cut("iter_objects", after=1, silently=True)
    assert [info.location async for info in faults.iter_objects()] == ["a"]
    faults.fail("iter_objects", lost_answer=True)
    listing = faults.iter_objects()
    assert [(await anext(listing)).location for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(BackendUnavailableError):
        await anext(listing)


async def test_delay(faults: Any) -> None:
    await faults.put_bytes("a", b"")
    faults.delay("stat", seconds=10)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await faults.stat("a")
    assert (await faults.stat("a")).size == 0


async def test_cut_body(faults: Any) -> None:
    await faults.put_bytes("a", b"0123456789")
    faults.cut("open", after=4)
    reader = await faults.open("a")
    assert await reader.read(6) == b"0123"
    for _ in range(2):
        with pytest.raises(BackendUnavailableError):
            await reader.read(6)
    await reader.aclose()
    faults.cut("open", after=4)
    with pytest.raises(BackendUnavailableError):
        await read(faults, "a")
    faults.cut("open", after=4, silently=True)
    assert await read(faults, "a", 3, offset=2) == [b"234", b"5"]
    faults.cut("open", after=10)
    assert await read(faults, "a", 6) == [b"012345", b"6789"]


async def test_cut_stream(faults: Any) -> None:
    faults.cut("put_stream", after=4, error=ConnectionResetError("gone"))
    with pytest.raises(ConnectionResetError):
        await faults.put_stream("a", stream(b"012", b"345", b"678"))
    assert not await faults.exists("a")
    faults.cut("put_stream", after=4, silently=True)
    await faults.put_stream("a", stream(b"012", b"345", b"678"))
    assert await read(faults, "a") == [b"0123"]


async def test_corrupt(faults: Any) -> None:
    faults.corrupt("put_bytes", at=1)
    await faults.put_bytes("a", b"\x00\x00\x00")
    assert await read(faults, "a") == [b"\x00\xff\x00"]
    faults.corrupt("open", at=2)
    assert await read(faults, "a", 2) == [b"\x00\xff", b"\xff"]
    faults.corrupt("put_stream", at=3)
    await faults.put_stream("b", stream(b"\x00\x00", b"\x00\x00"))
    assert await read(faults, "b") == [b"\x00\x00\x00\xff"]


async def test_faults_at_one_call_add_up(faults: Any) -> None:
    faults.delay("put_bytes", seconds=0.01)
    faults.corrupt("put_bytes", at=0)
    faults.fail("put_bytes", lost_answer=True)
    with pytest.raises(BackendUnavailableError):
        await faults.put_bytes("a", b"\x00")
    assert await read(faults, "a") == [b"\xff"]
    assert faults.pending == 0


@pytest.mark.parametrize(
    "declare",
    [
        lambda faults: faults.fail("presign_get"),
        lambda faults: faults.fail("nothing"),
        lambda faults: faults.cut("stat", after=1),
        lambda faults: faults.corrupt("copy", at=1),
        lambda faults: faults.fail("stat", nth=0),
        lambda faults: faults.fail("stat", times=0),
    ],
)
def test_impossible_faults_are_refused(faults: Any, declare: Any) -> None:
    with pytest.raises(ValueError, match=r"operation|applies to|count from 1"):
        declare(faults)
    assert faults.pending == 0


async def test_manager_notices(faults: Any) -> None:
    policies = {"files": StoragePolicy("files", "main")}
    where: Any = {"storage_key": "files", "model_name": "m", "entity_id": "1", "field_name": "f"}
    async with StorageManager(backends={"main": faults}, policies=policies) as manager:
        faults.corrupt("put_bytes", at=0)
        ref = await manager.put_bytes(**where, content=b"content")
        with pytest.raises(ChecksumMismatchError):
            await manager.get(ref)
        faults.cut("open", after=3, silently=True)
        with pytest.raises(BackendError, match="early"):
            await manager.get(ref)
        faults.fail("put_stream", error=ObjectNotFoundError("odd", location="x"))
        with pytest.raises(ObjectNotFoundError) as caught:
            await manager.put_stream(**where, stream=[b"..."])
        assert caught.value.backend == "main"
