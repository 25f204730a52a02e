"""The manager: where calls go, what a receipt says, what backends get wrong, copies, and its life."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from granite_storage import (
    BackendUnavailableError,
    ChecksumMismatchError,
    ConfigurationError,
    ContentTooLargeError,
    ObjectNotFoundError,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
)
from granite_storage.backends.base import SupportsBatchDelete, SupportsCopy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import (
    BackendError,
    InvalidLocationError,
    InvalidReferenceError,
    SizeMismatchError,
    UnknownBackendError,
    UnknownPolicyError,
)
from granite_storage.testing import FaultInjectingBackend
from tests.core.support import MIB, SLOT, eventually, left_below, local_manager, manager_on

COPY = {"model_name": "copy", "entity_id": "2", "field_name": "file"}


class Early(MemoryStorageBackend):
    """Publishes before the stream has ended."""

    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        await self.put_bytes(location, await anext(stream))


class Talkative(MemoryStorageBackend):
    """Has something to say of each object."""

    details: Any = {"bucket": "b", "mine": "the backend's"}  # noqa: RUF012
    extra_keys = frozenset({"bucket"})

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Any:
        await super().put_bytes(location, content, content_type=content_type)
        return self.details

    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> Any:
        await super().put_stream(location, stream, content_type=content_type)
        return self.details

    async def copy(self, source: str, target: str) -> Any:
        await super().copy(source, target)
        return self.details


async def listed(backend: Any) -> list[str]:
    return [info.location async for info in backend.iter_objects()]


def two_backends(**policies: str) -> tuple[StorageManager, dict[str, Any]]:
    backends: dict[str, Any] = {"first": MemoryStorageBackend(), "second": MemoryStorageBackend()}
    made = {key: StoragePolicy(key, backend, key_prefix=key) for key, backend in policies.items()}
    return StorageManager(backends=backends, policies=made), backends


def reading(manager: StorageManager, ref: StoredObjectRef) -> list[Awaitable[Any]]:
    return [manager.get(ref), manager.stat(ref), manager.exists(ref), manager.delete(ref), manager.copy(ref, **COPY)]


class TestRouting:
    async def test_writes_go_by_policy_and_reads_by_ref(self) -> None:
        manager, backends = two_backends(files="first")
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        moved = StorageManager(backends=backends, policies={"files": StoragePolicy("files", "second")})
        new = await moved.put_bytes(**SLOT, content=b"def")
        assert (ref.backend, new.backend) == ("first", "second")
        assert await moved.get(ref) == b"abc"
        assert await moved.exists(ref)
        assert (await moved.stat(ref)).size == 3
        await moved.delete(ref)
        assert await listed(backends["first"]) == []
        assert await listed(backends["second"]) == [new.location]

    async def test_a_policy_that_is_gone_does_not_matter_to_reading(self) -> None:
        manager, backends = two_backends(files="first")
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        without = StorageManager(backends=backends, policies={})
        assert await without.get(ref) == b"abc"
        with pytest.raises(UnknownPolicyError, match="'files'"):
            await without.copy(ref, **COPY)

    async def test_a_backend_that_is_gone_is_named(self) -> None:
        manager, _ = two_backends(files="first")
        ref = StoredObjectRef("files", "third", "a/b", 1, "")
        for call in reading(manager, ref):
            with pytest.raises(UnknownBackendError, match="'third'"):
                await call

    @pytest.mark.parametrize("ref", [None, "a/b", {"location": "a/b"}, object()])
    async def test_only_a_ref_is_a_ref(self, ref: Any) -> None:
        manager, _ = two_backends(files="first")
        for call in reading(manager, ref):
            with pytest.raises(InvalidReferenceError, match="StoredObjectRef"):
                await call
        with pytest.raises(InvalidReferenceError, match="StoredObjectRef"):
            await manager.open(ref)

    async def test_errors_say_which_backend(self) -> None:
        for operation in ("put_bytes", "put_stream", "open", "stat", "exists", "delete"):
            faults = FaultInjectingBackend(MemoryStorageBackend())
            manager = manager_on(faults)
            ref = StoredObjectRef("files", "store", "a/b", 1, "")
            faults.fail(operation)
            calls: dict[str, Any] = {
                "put_bytes": lambda: manager.put_bytes(**SLOT, content=b""),  # noqa: B023
                "put_stream": lambda: manager.put_stream(**SLOT, stream=[]),  # noqa: B023
                "open": lambda: manager.get(ref),  # noqa: B023
            }
            with pytest.raises(BackendUnavailableError) as caught:
                await (calls[operation]() if operation in calls else getattr(manager, operation)(ref))
            assert caught.value.backend == "store"


class TestReceipts:
    async def test_it_says_what_was_stored(self) -> None:
        manager = manager_on(MemoryStorageBackend(), key_prefix="some/prefix")
        for ref in (
            await manager.put_bytes(**SLOT, content=b"abc", content_type="text/plain", original_filename="A b.TXT"),
            await manager.put_stream(**SLOT, stream=[b"a", b"bc"], content_type="text/plain", original_filename="A b.TXT"),
        ):
            assert (ref.storage_key, ref.backend, ref.size) == ("files", "store", 3)
            assert ref.checksum == f"sha256:{hashlib.sha256(b'abc').hexdigest()}"
            assert (ref.content_type, ref.original_filename, ref.extra) == ("text/plain", "A b.TXT", None)
            assert ref.location.startswith("some/prefix/doc/1/file/")
            assert ref.location.endswith("-A_b.txt")
            assert abs(datetime.fromisoformat(str(ref.created_at)) - datetime.now(UTC)) < timedelta(minutes=1)
            assert (await manager.stat(ref)).content_type == "text/plain"

    async def test_the_backends_own_keys_win(self) -> None:
        manager = manager_on(Talkative())
        for ref in (
            await manager.put_bytes(**SLOT, content=b"", extra={"mine": 1, "more": [2]}),
            await manager.put_stream(**SLOT, stream=[], extra={"mine": 1, "more": [2]}),
        ):
            assert ref.extra == {"mine": "the backend's", "more": [2], "bucket": "b"}

    @pytest.mark.parametrize("details", [{"a": object()}, {1: 2}, {"a": b"bytes"}, ["a"], 5, {"a": list(range(20_000))}])
    async def test_an_object_without_a_receipt_does_not_stay(self, details: Any) -> None:
        backend = Talkative()
        manager = manager_on(backend)
        kept = await manager.put_bytes(**SLOT, content=b"x")
        backend.details = details
        for call in (
            manager.put_bytes(**SLOT, content=b""),
            manager.put_stream(**SLOT, stream=[b"x"]),
            manager.copy(kept, **COPY),
        ):
            with pytest.raises((InvalidReferenceError, TypeError)):
                await call
        assert await listed(backend) == [kept.location]

    @pytest.mark.parametrize(
        "content_type", ["", "text/plain\r\nX: y", "text/plain\x00", "text/plän", "x" * 256, 5, b"text/plain"]
    )
    async def test_a_content_type_that_cannot_be_kept_is_refused(self, content_type: Any) -> None:
        manager = manager_on(MemoryStorageBackend())
        with pytest.raises(InvalidReferenceError, match="content_type"):
            await manager.put_bytes(**SLOT, content=b"", content_type=content_type)
        with pytest.raises(InvalidReferenceError, match="content_type"):
            await manager.put_stream(**SLOT, stream=[], content_type=content_type)
        assert await listed(manager.backend("store")) == []

    @pytest.mark.parametrize("extra", [{"a": object()}, ["a"], {1: 2}, {"a": float("nan")}])
    async def test_an_extra_that_cannot_be_kept_is_refused(self, extra: Any) -> None:
        manager = manager_on(MemoryStorageBackend())
        with pytest.raises(InvalidReferenceError, match="extra"):
            await manager.put_bytes(**SLOT, content=b"", extra=extra)
        assert await listed(manager.backend("store")) == []

    async def test_no_two_objects_share_a_location(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        refs = await asyncio.gather(*(manager.put_bytes(**SLOT, content=b"same", original_filename="same") for _ in range(200)))
        assert len({ref.location for ref in refs}) == 200

    @pytest.mark.case("POL-08")
    async def test_no_representation_tells_a_secret(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        assert repr(manager) == "<StorageManager policies=['files'] backends=['store']>"


class TestBackendsThatErr:
    @pytest.mark.parametrize("size", [1, 3 * MIB])
    async def test_one_that_returns_early_leaves_nothing(self, size: int) -> None:
        backend = Early()
        manager = manager_on(backend)
        with pytest.raises(BackendError, match="before the stream had ended") as caught:
            await manager.put_stream(**SLOT, stream=[bytes(size), b"more" * MIB])
        assert caught.value.backend == "store"
        assert await listed(backend) == []

    async def test_also_when_it_copies(self) -> None:
        early = Early()
        manager = StorageManager(
            backends={"store": MemoryStorageBackend(), "early": early},
            policies={"files": StoragePolicy("files", "store"), "others": StoragePolicy("others", "early")},
        )
        ref = await manager.put_bytes(**SLOT, content=bytes(3 * MIB))
        with pytest.raises(BackendError, match="before the stream had ended"):
            await manager.copy(ref, **COPY, storage_key="others")
        assert await listed(early) == []


class TestCopies:
    @pytest.fixture
    def backends(self) -> dict[str, Any]:
        return {"here": FaultInjectingBackend(Talkative()), "there": FaultInjectingBackend(MemoryStorageBackend())}

    @pytest.fixture
    def manager(self, backends: dict[str, Any]) -> StorageManager:
        policies = {
            "files": StoragePolicy("files", "here"),
            "others": StoragePolicy("others", "there", key_prefix="others"),
            "small": StoragePolicy("small", "there", max_size=2),
        }
        return StorageManager(backends=backends, policies=policies)

    @pytest.mark.parametrize("storage_key", [None, "others"])
    @pytest.mark.parametrize("size", [0, 3, 3 * MIB])
    async def test_it_is_an_object_of_its_own(
        self, manager: StorageManager, backends: dict[str, Any], storage_key: str | None, size: int
    ) -> None:
        content = bytes(size)
        ref = await manager.put_bytes(**SLOT, content=content, content_type="text/x", original_filename="é.txt", extra={"k": 1})
        copy = await manager.copy(ref, **COPY, storage_key=storage_key)
        assert copy.location.startswith("others/copy/2/file/" if storage_key else "copy/2/file/")
        assert copy.location != ref.location
        assert (copy.size, copy.checksum, copy.content_type, copy.original_filename) == (
            size,
            ref.checksum,
            "text/x",
            "é.txt",
        )
        assert copy.storage_key == (storage_key or "files")
        assert copy.extra is not None
        assert copy.extra["k"] == 1
        assert ("bucket" in copy.extra) is (storage_key is None)
        await manager.delete(ref)
        assert await manager.get(copy) == content

    async def test_a_backend_that_can_copies_by_itself(self, manager: StorageManager, backends: dict[str, Any]) -> None:
        assert isinstance(backends["here"], SupportsCopy)
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        await manager.copy(ref, **COPY)
        assert (backends["here"].count("copy"), backends["here"].count("open")) == (1, 0)
        await manager.copy(ref, **COPY, storage_key="others")
        assert (backends["here"].count("copy"), backends["here"].count("open")) == (1, 1)

    async def test_extra_can_be_given_anew(self, manager: StorageManager) -> None:
        ref = await manager.put_bytes(**SLOT, content=b"abc", extra={"k": 1})
        assert (await manager.copy(ref, **COPY, storage_key="others", extra={"n": 2})).extra == {"n": 2}
        assert (await manager.copy(ref, **COPY, storage_key="others", extra={})).extra is None

    @pytest.mark.parametrize("storage_key", [None, "others"])
    async def test_a_missing_source_is_not_found(self, manager: StorageManager, storage_key: str | None) -> None:
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        await manager.delete(ref)
        with pytest.raises(ObjectNotFoundError) as caught:
            await manager.copy(ref, **COPY, storage_key=storage_key)
        assert (caught.value.backend, caught.value.location) == ("here", ref.location)

    @pytest.mark.parametrize("storage_key", [None, "others"])
    @pytest.mark.parametrize("size", [2, 4])
    async def test_a_source_of_wrong_size_is_refused(
        self, manager: StorageManager, backends: dict[str, Any], storage_key: str | None, size: int
    ) -> None:
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        with pytest.raises(SizeMismatchError):
            await manager.copy(replace(ref, size=size), **COPY, storage_key=storage_key)
        assert await listed(backends["here"]) == [ref.location]
        assert await listed(backends["there"]) == []

    async def test_wrong_bytes_are_not_copied_through_the_program(
        self, manager: StorageManager, backends: dict[str, Any]
    ) -> None:
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        backends["here"].corrupt("open", at=1)
        with pytest.raises(ChecksumMismatchError):
            await manager.copy(ref, **COPY, storage_key="others")
        assert await listed(backends["there"]) == []

    async def test_the_limit_of_the_copys_policy_counts(self, manager: StorageManager, backends: dict[str, Any]) -> None:
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        with pytest.raises(ContentTooLargeError):
            await manager.copy(ref, **COPY, storage_key="small")
        assert backends["here"].count("open") == 0

    async def test_an_error_says_on_which_side_it_was(self, manager: StorageManager, backends: dict[str, Any]) -> None:
        ref = await manager.put_bytes(**SLOT, content=bytes(3 * MIB))
        backends["here"].cut("open", after=MIB, error=BackendError("broken"))
        with pytest.raises(BackendError, match="broken") as caught:
            await manager.copy(ref, **COPY, storage_key="others")
        assert caught.value.backend == "here"
        backends["there"].cut("put_stream", after=MIB)
        with pytest.raises(BackendUnavailableError) as caught:
            await manager.copy(ref, **COPY, storage_key="others")
        assert caught.value.backend == "there"
        assert await listed(backends["there"]) == []

    async def test_an_unknown_checksum_is_known_of_a_copy_through_the_program(self, manager: StorageManager) -> None:
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        assert (await manager.copy(replace(ref, checksum=""), **COPY, storage_key="others")).checksum == ref.checksum


class Batched(MemoryStorageBackend):
    """Deletes many objects in one call, but for those that it refuses."""

    def __init__(self, refused: str = "") -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.refused = refused

    async def delete_many(self, locations: Sequence[str]) -> Mapping[str, BackendError]:
        self.calls.append(list(locations))
        for location in locations:
            if location != self.refused:
                await self.delete(location)
        return {self.refused: BackendError("refused")} if self.refused in locations else {}


class TestListings:
    async def test_a_policy_lists_what_is_below_its_prefix(self) -> None:
        manager, _ = two_backends(files="first", other="first")
        stored = [await manager.put_bytes(**SLOT | {"entity_id": str(number)}, content=b"a") for number in range(3)]
        await manager.put_bytes(**SLOT | {"storage_key": "other"}, content=b"b")
        assert [info.location async for info in manager.list(storage_key="files")] == sorted(ref.location for ref in stored)
        assert [info.location async for info in manager.list(storage_key="files", prefix="doc/1/")] == [stored[1].location]
        after = [info.location async for info in manager.list(storage_key="files", start_after=stored[1].location)]
        assert after == [stored[2].location]

    async def test_a_policy_without_a_prefix_lists_its_whole_backend(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        ref = await manager.put_bytes(**SLOT, content=b"a")
        assert [info.location async for info in manager.list(storage_key="files", prefix="doc/")] == [ref.location]
        assert [info async for info in manager.list(storage_key="files", prefix="d/")] == []

    async def test_errors_name_the_backend(self) -> None:
        manager = manager_on(backend := FaultInjectingBackend(MemoryStorageBackend()))
        with pytest.raises(UnknownPolicyError, match="'nope'"):
            await anext(manager.list(storage_key="nope"))
        backend.fail("iter_objects", error=BackendUnavailableError("down"))
        with pytest.raises(BackendUnavailableError) as caught:
            await anext(manager.list(storage_key="files"))
        assert caught.value.backend == "store"

    async def test_a_closed_manager_lists_nothing(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        await manager.aclose()
        with pytest.raises(ConfigurationError, match="closed"):
            await anext(manager.list(storage_key="files"))


class TestDeletingMany:
    @pytest.mark.parametrize("in_batches", [True, False])
    async def test_all_are_gone_and_what_is_not_there_is_no_error(self, in_batches: bool, tmp_path: Path) -> None:
        manager = manager_on(backend := Batched() if in_batches else LocalStorageBackend(tmp_path, fsync=False))
        assert isinstance(backend, SupportsBatchDelete) is in_batches
        refs = [await manager.put_bytes(**SLOT, content=b"a") for _ in range(40)]
        await manager.delete(refs[0])
        assert await manager.delete_many(iter([*refs, refs[1]])) == {}
        assert await listed(backend) == []
        assert await manager.delete_many([]) == {}

    async def test_one_request_where_the_backend_can(self) -> None:
        manager = manager_on(backend := Batched())
        refs = [await manager.put_bytes(**SLOT, content=b"a") for _ in range(40)]
        await manager.delete_many(refs)
        assert [sorted(call) for call in backend.calls] == [sorted(ref.location for ref in refs)]

    async def test_one_that_is_refused_stops_no_other(self) -> None:
        manager = manager_on(backend := Batched())
        refs = [await manager.put_bytes(**SLOT, content=b"a") for _ in range(5)]
        backend.refused = refs[2].location
        failures = await manager.delete_many(refs)
        assert list(failures) == [refs[2]]
        assert isinstance(failures[refs[2]], BackendError)
        assert failures[refs[2]].backend == "store"
        assert await listed(backend) == [refs[2].location]

    async def test_without_batches_each_failure_is_told(self, tmp_path: Path) -> None:
        manager = manager_on(backend := FaultInjectingBackend(LocalStorageBackend(tmp_path, fsync=False)))
        refs = [await manager.put_bytes(**SLOT, content=b"a") for _ in range(5)]
        backend.fail("delete", error=BackendUnavailableError("down"), times=2)
        failures = await manager.delete_many(refs)
        assert len(failures) == len(await listed(backend)) == 2
        assert {type(error) for error in failures.values()} == {BackendUnavailableError}

    async def test_a_wrong_ref_deletes_nothing(self) -> None:
        manager = manager_on(backend := MemoryStorageBackend())
        ref = await manager.put_bytes(**SLOT, content=b"a")
        wrong: list[tuple[Any, type[Exception]]] = [
            (replace(ref, backend="nope"), UnknownBackendError),
            (replace(ref, location="../up"), InvalidLocationError),
            (ref.to_dict(), InvalidReferenceError),
        ]
        for other, error in wrong:
            with pytest.raises(error):
                await manager.delete_many([ref, other])
        assert await listed(backend) == [ref.location]


class Held:
    """A stream that yields once, and then waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"x" * MIB
        self.begun.set()
        await self.go.wait()
        yield b"y" * MIB


class TestLife:
    @pytest.mark.case("POL-07")
    async def test_closing_waits_for_twenty_uploads(self, tmp_path: Path) -> None:
        manager = local_manager(tmp_path)
        streams = [Held() for _ in range(20)]
        uploads = [asyncio.ensure_future(manager.put_stream(**SLOT, stream=stream)) for stream in streams]
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        closing = [asyncio.ensure_future(manager.aclose()) for _ in range(2)]
        await asyncio.sleep(0.02)
        assert not closing[0].done()
        assert not closing[1].done()
        with pytest.raises(ConfigurationError, match="closed"):
            await manager.put_bytes(**SLOT, content=b"")
        for stream in streams:
            stream.go.set()
        await asyncio.gather(*closing)
        assert all(upload.done() for upload in uploads)
        refs = [upload.result() for upload in uploads]
        async with manager:
            assert [(await manager.stat(ref)).size for ref in refs] == [2 * MIB] * 20

    @pytest.mark.case("POL-07")
    @pytest.mark.parametrize("drain_timeout", [0, 0.02])
    async def test_late_uploads_are_cancelled_and_leave_nothing(self, tmp_path: Path, drain_timeout: float) -> None:
        manager = local_manager(tmp_path, drain_timeout=drain_timeout)
        streams = [Held() for _ in range(20)]
        uploads = [asyncio.ensure_future(manager.put_stream(**SLOT, stream=stream)) for stream in streams]
        await asyncio.gather(*(stream.begun.wait() for stream in streams))
        await manager.aclose()
        assert all(upload.cancelled() for upload in uploads)
        assert left_below(tmp_path) == []

    async def test_a_cancelled_closing_cancels_the_calls_and_closes_all_the_same(self, tmp_path: Path) -> None:
        faults = FaultInjectingBackend(LocalStorageBackend(tmp_path, fsync=False))
        manager = manager_on(faults)
        stream = Held()
        upload = asyncio.ensure_future(manager.put_stream(**SLOT, stream=stream))
        await stream.begun.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await manager.aclose()
        assert upload.cancelled()
        assert faults.count("aclose") == 1
        assert left_below(tmp_path) == []

    async def test_a_call_within_a_call_may_still_be_made_while_closing(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        inner: list[StoredObjectRef] = []
        held = Held()

        async def nesting() -> AsyncIterator[bytes]:
            async for chunk in held:
                yield chunk
            inner.append(await manager.put_bytes(**SLOT, content=b"inner"))

        upload = asyncio.ensure_future(manager.put_stream(**SLOT, stream=nesting()))
        await held.begun.wait()
        closing = asyncio.ensure_future(manager.aclose())
        await asyncio.sleep(0)
        held.go.set()
        await asyncio.gather(upload, closing)
        assert len(inner) == 1

    async def test_entering_waits_for_a_closing_under_way(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        held = Held()
        upload = asyncio.ensure_future(manager.put_stream(**SLOT, stream=held))
        await held.begun.wait()
        closing = asyncio.ensure_future(manager.aclose())
        await asyncio.sleep(0)
        entering = asyncio.ensure_future(manager.__aenter__())
        await asyncio.sleep(0.01)
        assert not entering.done()
        held.go.set()
        await asyncio.gather(upload, closing, entering)
        await manager.put_bytes(**SLOT, content=b"")


class TestRoom:
    @pytest.mark.case("LIM-06")
    async def test_no_more_streams_are_read_than_allowed(self) -> None:
        manager = manager_on(MemoryStorageBackend(), max_concurrent_uploads=3)
        streams = [Held() for _ in range(10)]
        uploads = [asyncio.ensure_future(manager.put_stream(**SLOT, stream=stream)) for stream in streams]
        await eventually(lambda: all(stream.begun.is_set() for stream in streams[:3]))
        assert [stream.begun.is_set() for stream in streams] == [True] * 3 + [False] * 7
        uploads[0].cancel()
        uploads[5].cancel()
        await eventually(streams[3].begun.is_set)
        for stream in streams:
            stream.go.set()
        results = await asyncio.gather(*uploads, return_exceptions=True)
        assert sum(isinstance(result, StoredObjectRef) for result in results) == 8

    async def test_a_stream_may_store_another_one(self) -> None:
        manager = manager_on(MemoryStorageBackend(), max_concurrent_uploads=1)

        async def nesting() -> AsyncIterator[bytes]:
            yield (await manager.put_stream(**SLOT, stream=[b"inner"])).location.encode()

        assert await asyncio.wait_for(manager.put_stream(**SLOT, stream=nesting()), 60)

    @pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "3"])
    def test_a_number_is_wanted(self, wrong: Any) -> None:
        with pytest.raises(ConfigurationError, match="max_concurrent_uploads"):
            StorageManager(backends={}, policies={}, max_concurrent_uploads=wrong)
