"""Reading back: any mixture of calls, ranges, verification, and what happens when it is cut short."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_storage import BackendUnavailableError, ChecksumMismatchError, ObjectNotFoundError, StorageManager, StoredObjectRef
from granite_storage.backends.base import ObjectReader, StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import BackendError, SizeMismatchError
from granite_storage.testing import FaultInjectingBackend
from tests.core.support import MIB, SLOT, Lag, eventually, local_manager, manager_on, open_files

CONTENT = os.urandom(2 * MIB + 12_345)


@pytest.fixture
def faults(tmp_path: Path) -> FaultInjectingBackend:
    return FaultInjectingBackend(LocalStorageBackend(tmp_path, fsync=False))


@pytest.fixture
async def manager(faults: FaultInjectingBackend) -> AsyncIterator[StorageManager]:
    async with manager_on(faults) as manager:
        yield manager


@pytest.fixture
async def ref(manager: StorageManager) -> StoredObjectRef:
    return await manager.put_bytes(**SLOT, content=CONTENT)


def path_of(tmp_path: Path, ref: StoredObjectRef) -> Path:
    return tmp_path / ref.location


STEP = st.one_of(
    st.tuples(st.just("read"), st.integers(-1, 60)),
    st.tuples(st.just("seek"), st.integers(-10, 80), st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])),
    st.tuples(st.just("iterate"), st.integers(0, 3)),
    st.tuples(st.just("tell")),
    st.tuples(st.just("cancelled read"), st.integers(1, 60), st.integers(0, 12)),
)


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 70), st.none() | st.integers(0, 70), st.lists(STEP, max_size=12))
def test_any_mixture_of_calls_is_like_a_file(content: bytes, offset: int, length: int | None, steps: list[Any]) -> None:
    """The model is `io.BytesIO` over the range; chunks of iteration are small so that there are several."""

    async def iterate(reader: Any, model: io.BytesIO, count: int) -> None:
        async for chunk in reader:
            assert chunk == model.read(len(chunk))
            assert chunk
            count -= 1
            if count < 0:
                return
        assert model.read() == b""

    async def cancelled_read(reader: Any, model: io.BytesIO, size: int, turns: int) -> None:
        task = asyncio.ensure_future(reader.read(size))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            assert await task == model.read(size)
        except asyncio.CancelledError:
            assert reader.tell() == model.tell()

    async def check(manager: StorageManager) -> None:
        ref = await manager.put_bytes(**SLOT, content=content)
        if offset > len(content):
            with pytest.raises(ValueError, match="past the end"):
                await manager.open(ref, offset=offset, length=length)
            return
        wanted = content[offset:] if length is None else content[offset : offset + length]
        model = io.BytesIO(wanted)
        async with manager.open(ref, offset=offset, length=length) as reader:
            assert reader.size == len(wanted)
            for name, *arguments in steps:
                match name:
                    case "read":
                        assert await reader.read(*arguments) == model.read(*arguments)
                    case "seek":
                        base = {os.SEEK_SET: 0, os.SEEK_CUR: model.tell(), os.SEEK_END: len(wanted)}[arguments[1]]
                        if base + arguments[0] < 0:
                            with pytest.raises(ValueError, match="before the start"):
                                await reader.seek(*arguments)
                        else:
                            assert await reader.seek(*arguments) == model.seek(*arguments)
                    case "iterate":
                        await iterate(reader, model, *arguments)
                    case "cancelled read":
                        await cancelled_read(reader, model, *arguments)
                assert reader.tell() == model.tell()
        await manager.delete(ref)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("granite_storage.readers.CHUNK_SIZE", 7)
        with tempfile.TemporaryDirectory() as folder:
            for backend in (MemoryStorageBackend(), LocalStorageBackend(folder, fsync=False)):
                asyncio.run(check(manager_on(backend)))


class TestRanges:
    @pytest.mark.parametrize(
        ("offset", "length"), [(0, None), (0, 0), (5, 10), (len(CONTENT), None), (len(CONTENT) - 1, 99), (MIB, MIB), (0, 10**12)]
    )
    async def test_exact_bytes(self, manager: StorageManager, ref: StoredObjectRef, offset: int, length: int | None) -> None:
        expected = CONTENT[offset:] if length is None else CONTENT[offset : offset + length]
        async with manager.open(ref, offset=offset, length=length) as reader:
            assert reader.size == len(expected)
            assert reader.info.size == ref.size
            assert await reader.read() == expected
            assert await reader.read() == b""
        async with manager.open(ref, offset=offset, length=length) as reader:
            assert b"".join([chunk async for chunk in reader]) == expected

    @pytest.mark.parametrize(("offset", "length"), [(-1, None), (0, -1), (len(CONTENT) + 1, None)])
    async def test_what_is_no_range(self, manager: StorageManager, ref: StoredObjectRef, offset: int, length: int | None) -> None:
        with pytest.raises(ValueError, match="offset"):
            await manager.open(ref, offset=offset, length=length)

    async def test_no_more_is_read_than_wanted(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend
    ) -> None:
        async with manager.open(ref, offset=10, length=20) as reader:
            assert await reader.read(5) == CONTENT[10:15]
            assert await reader.seek(0, os.SEEK_END) == 20
            assert await reader.read() == b""
            assert await reader.seek(-1, os.SEEK_CUR) == 19
            assert await reader.read(100) == CONTENT[29:30]
            with pytest.raises(KeyError):
                await reader.seek(0, 9)

    async def test_seeking_to_where_it_stands_opens_nothing(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend
    ) -> None:
        async with manager.open(ref) as reader:
            await reader.read(5)
            await reader.seek(5)
            await reader.read(5)
        assert faults.count("open") == 1


class TestWrongObjects:
    async def test_missing(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        await manager.delete(ref)
        for call in (lambda: manager.get(ref), lambda: manager.stat(ref)):
            with pytest.raises(ObjectNotFoundError) as caught:
                await call()
            assert (caught.value.backend, caught.value.location) == ("store", ref.location)

    @pytest.mark.parametrize("size", [0, 100, len(CONTENT) - 1, len(CONTENT) + 1])
    @pytest.mark.parametrize("offset", [0, 1000, len(CONTENT)])
    async def test_another_size_is_an_error_before_the_first_byte(
        self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path, size: int, offset: int
    ) -> None:
        os.truncate(path_of(tmp_path, ref), size)
        with pytest.raises(SizeMismatchError) as caught:
            await manager.open(ref, offset=offset)
        assert caught.value.expected == ref.size
        with pytest.raises(SizeMismatchError):
            await manager.get(ref)
        assert open_files(path_of(tmp_path, ref)) == []

    @pytest.mark.parametrize("at", [0, MIB, len(CONTENT) - 1])
    async def test_wrong_bytes_are_never_returned(
        self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path, at: int
    ) -> None:
        with path_of(tmp_path, ref).open("r+b") as file:
            file.seek(at)
            file.write(bytes([CONTENT[at] ^ 1]))
        with pytest.raises(ChecksumMismatchError) as caught:
            await manager.get(ref)
        assert caught.value.expected == ref.checksum
        received = []
        async with manager.open(ref, verify=True) as reader:
            with pytest.raises(ChecksumMismatchError):
                received.extend([chunk async for chunk in reader])
            assert 0 < reader.tell() < len(CONTENT)
        assert received == []

    @pytest.mark.parametrize("step", [1, 1000, MIB, -1])
    async def test_the_right_bytes_are_verified_in_any_steps(
        self, manager: StorageManager, ref: StoredObjectRef, step: int
    ) -> None:
        small = await manager.put_bytes(**SLOT, content=CONTENT[:3000])
        for stored in (small, ref) if step != 1 else (small,):
            async with manager.open(stored, verify=True) as reader:
                chunks = []
                while chunk := await reader.read(step):
                    chunks.append(chunk)
            assert b"".join(chunks) == CONTENT[: stored.size]

    async def test_a_reader_that_verifies_reads_once(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        with pytest.raises(ValueError, match="range"):
            await manager.open(ref, offset=1, verify=True)
        async with manager.open(ref, verify=True, length=ref.size) as reader:
            await reader.read(10)
            assert await reader.seek(10) == 10
            with pytest.raises(ValueError, match="once"):
                await reader.seek(0)
            assert len(await reader.read()) == ref.size - 10

    async def test_a_mismatch_is_not_repaired_by_reading_on(
        self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path
    ) -> None:
        path_of(tmp_path, ref).write_bytes(bytes(len(CONTENT)))
        async with manager.open(ref, verify=True) as reader:
            with pytest.raises(ChecksumMismatchError):
                await reader.read()
            with pytest.raises(ValueError, match="closed"):
                await reader.read()

    async def test_a_body_that_ends_early_raises(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend
    ) -> None:
        faults.cut("open", after=1000, silently=True, times=3)
        async with manager.open(ref) as reader:
            with pytest.raises(BackendError, match="early") as caught:
                await reader.read()
            assert (caught.value.backend, caught.value.location) == ("store", ref.location)
            assert reader.tell() == 0
        async with manager.open(ref) as reader:
            with pytest.raises(BackendError, match="early"):
                _ = [chunk async for chunk in reader]

    async def test_a_file_that_shrinks_while_it_is_read_raises(
        self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path
    ) -> None:
        async with manager.open(ref) as reader:
            await reader.read(10)
            os.truncate(path_of(tmp_path, ref), 10)
            with pytest.raises(BackendError, match="early"):
                await reader.read(10)

    async def test_an_object_that_is_replaced_while_it_is_read_raises(
        self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path
    ) -> None:
        async with manager.open(ref) as reader:
            await reader.read(10)
            path_of(tmp_path, ref).unlink()
            path_of(tmp_path, ref).write_bytes(CONTENT)
            await reader.seek(100)
            with pytest.raises(BackendError, match="changed"):
                await reader.read(10)
        assert open_files(tmp_path) == []

    async def test_a_read_that_failed_can_be_tried_again(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend
    ) -> None:
        async with manager.open(ref) as reader:
            assert await reader.read(10) == CONTENT[:10]
            faults.fail("read", times=5)
            with pytest.raises(BackendUnavailableError) as caught:
                await reader.read(10)
            assert caught.value.backend == "store"
            assert faults.pending == 0
            assert reader.tell() == 10
            assert await reader.read(10) == CONTENT[10:20]
            assert await reader.read() == CONTENT[20:]


class TestResumedBodies:
    """Where a backend's reader is cut off, the rest of the same object is asked for, on any backend."""

    @pytest.mark.parametrize("verify", [False, True])
    async def test_a_cut_body_goes_on(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend, tmp_path: Path, verify: bool
    ) -> None:
        faults.cut("open", after=300_000, times=3)
        faults.fail("read", nth=3, times=3)
        async with manager.open(ref, verify=verify) as reader:
            assert await reader.read() == CONTENT
        assert (faults.pending, faults.count("open")) == (0, 5)
        assert open_files(tmp_path) == []

    async def test_a_range_goes_on(self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend) -> None:
        faults.cut("open", after=1000, times=3)
        async with manager.open(ref, offset=10, length=5000) as reader:
            assert b"".join([chunk async for chunk in reader]) == CONTENT[10:5010]
        assert faults.count("open") == 4

    async def test_a_body_without_a_byte_is_asked_for_five_times(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend
    ) -> None:
        faults.cut("open", after=0, times=100)
        async with manager.open(ref) as reader:
            with pytest.raises(BackendUnavailableError) as caught:
                await reader.read()
        assert (caught.value.backend, caught.value.location) == ("store", ref.location)
        assert faults.count("open") == 5

    @pytest.mark.parametrize("content", [CONTENT, CONTENT[:1000]])
    async def test_another_object_is_not_joined_to_the_first(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend, tmp_path: Path, content: bytes
    ) -> None:
        faults.cut("open", after=2000)
        async with manager.open(ref) as reader:
            assert await reader.read(1500) == CONTENT[:1500]
            path_of(tmp_path, ref).unlink()
            path_of(tmp_path, ref).write_bytes(content)
            with pytest.raises(BackendError, match="changed"):
                await reader.read()
            assert reader.tell() == 1500
        assert open_files(tmp_path) == []

    @pytest.mark.parametrize(
        "wrapped", [lambda backend: backend, lambda backend: PrefixedBackend(backend, "a/b"), FaultInjectingBackend]
    )
    async def test_a_reader_that_can_say_which_object_is_meant(self, wrapped: Callable[[StorageBackend], StorageBackend]) -> None:
        """It is asked for the rest in place of its backend, as often as it says, also behind a wrapper."""
        backend = _Conditional()
        async with manager_on(wrapped(backend)) as manager:
            ref = await manager.put_bytes(**SLOT, content=CONTENT)
            async with manager.open(ref, offset=7) as reader:
                assert await reader.read() == CONTENT[7:]
                assert backend.reopened == 2
                await reader.seek(0)
                backend.cuts = 100
                with pytest.raises(BackendUnavailableError, match="cut off") as caught:
                    await reader.read(1)
                assert caught.value.location == ref.location
                assert (backend.cuts, backend.reopened) == (97, 5)


class _Conditional(MemoryStorageBackend):
    """One whose readers are cut off before their first byte, so many times, and open the same object again."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts = 2
        self.reopened = 0

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        return _Reopening(self, await super().open(location, offset=offset, length=length))


class _Reopening:
    max_attempts = 3

    def __init__(self, backend: _Conditional, inner: ObjectReader) -> None:
        self.info = inner.info
        self._backend = backend
        self._inner = inner

    async def read(self, size: int = -1, /) -> bytes:
        if self._backend.cuts:
            self._backend.cuts -= 1
            raise BackendUnavailableError("it was cut off", location=self.info.location)
        return await self._inner.read(size)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def reopen(self, offset: int, length: int, /) -> ObjectReader:
        self._backend.reopened += 1
        return await self._backend.open(self.info.location, offset=offset, length=length)


class TestHandles:
    @pytest.mark.case("STR-13")
    async def test_abandoned_iteration_lets_go(self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path) -> None:
        reader = await manager.open(ref)
        async for _ in reader:
            break
        await eventually(lambda: not open_files(path_of(tmp_path, ref)))
        assert await reader.read(3) == CONTENT[MIB : MIB + 3]
        assert open_files(path_of(tmp_path, ref))
        await reader.aclose()
        assert open_files(path_of(tmp_path, ref)) == []

    @pytest.mark.case("STR-13")
    async def test_ended_iteration_lets_go(self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path) -> None:
        reader = await manager.open(ref)
        assert b"".join([chunk async for chunk in reader]) == CONTENT
        assert open_files(path_of(tmp_path, ref)) == []
        assert not reader.closed

    async def test_the_end_of_an_old_iteration_does_not_disturb_a_new_one(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend
    ) -> None:
        async with manager.open(ref) as reader:
            first = aiter(reader)
            await anext(first)
            second = aiter(reader)
            await anext(second)
            await first.aclose()
            assert await anext(second) == CONTENT[2 * MIB :]
            await second.aclose()
        assert faults.count("open") == 1

    async def test_closing_is_idempotent_and_final(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        reader = await manager.open(ref)
        await reader.aclose()
        await reader.aclose()
        await reader.close()
        assert reader.closed
        for call in (reader.read(1), reader.read(0), reader.seek(1)):
            with pytest.raises(ValueError, match="closed"):
                await call
        with pytest.raises(ValueError, match="closed"):
            async for _ in reader:
                pass

    async def test_closing_waits_for_a_read_under_way(
        self, manager: StorageManager, ref: StoredObjectRef, faults: FaultInjectingBackend, tmp_path: Path
    ) -> None:
        reader = await manager.open(ref)
        await reader.read(1)
        await reader.seek(0)
        faults.delay("open", seconds=0.05)
        reading = asyncio.ensure_future(reader.read(5))
        await asyncio.sleep(0.01)
        await reader.aclose()
        assert reading.done()
        assert (await asyncio.gather(reading, return_exceptions=True))[0] in (CONTENT[:5],) or reading.exception()
        assert open_files(path_of(tmp_path, ref)) == []

    async def test_one_that_was_opened_and_forgotten_is_closed_with_the_manager(
        self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path
    ) -> None:
        reader = await manager.open(ref)
        assert open_files(path_of(tmp_path, ref))
        await manager.aclose()
        assert reader.closed
        assert open_files(path_of(tmp_path, ref)) == []

    async def test_what_is_neither_awaited_nor_entered_opens_nothing(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        opening = manager.open(ref)
        del opening
        gc.collect()

    async def test_entering_twice_gives_two_readers(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        opening = manager.open(ref)
        async with opening as first:
            assert await first.read(3) == CONTENT[:3]
        async with opening as second:
            assert await second.read(3) == CONTENT[:3]
        assert first.closed
        assert first is not second

    async def test_iterating_it_opens_and_closes(self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path) -> None:
        opening = manager.open(ref, offset=3)
        for _ in range(2):
            assert b"".join([chunk async for chunk in opening]) == CONTENT[3:]
            assert open_files(path_of(tmp_path, ref)) == []

    async def test_abandoning_its_iteration_closes(self, manager: StorageManager, ref: StoredObjectRef, tmp_path: Path) -> None:
        iteration = aiter(manager.open(ref))
        assert CONTENT.startswith(await anext(iteration))
        await iteration.aclose()
        assert open_files(path_of(tmp_path, ref)) == []

    async def test_iterating_it_where_the_object_is_missing(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        await manager.delete(ref)
        with pytest.raises(ObjectNotFoundError):
            await anext(aiter(manager.open(ref)))

    async def test_it_is_a_source(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        names = {"storage_key": ref.storage_key, "model_name": "copy", "entity_id": "1", "field_name": "file"}
        copied = await manager.put_stream(stream=manager.open(ref), **names)
        assert await manager.get(copied) == CONTENT

    @pytest.mark.case("RB-01")
    async def test_what_is_not_awaited_shows_nothing(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        with pytest.raises(TypeError, match="await it"):
            vars(manager.open(ref))

    async def test_debuggers_may_look_at_it(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        opening = manager.open(ref)
        assert "__await__" in dir(opening)
        assert "await it" in repr(opening)

    async def test_many_readers_of_ranges_side_by_side(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        async def read(start: int) -> bytes:
            async with manager.open(ref, offset=start, length=50_000) as reader:
                return b"".join([chunk async for chunk in reader])

        starts = range(0, ref.size, 50_000)
        assert b"".join(await asyncio.gather(*map(read, starts))) == CONTENT


async def test_a_large_object_stalls_nobody(tmp_path: Path) -> None:
    manager = local_manager(tmp_path)
    ref = await manager.put_bytes(**SLOT, content=bytes(64 * MIB))
    async with Lag() as lag:
        assert len(await manager.get(ref)) == ref.size
    assert lag.turns > 3


async def test_a_ref_of_wrong_size_names_both(tmp_path: Path) -> None:
    manager = local_manager(tmp_path)
    ref = await manager.put_bytes(**SLOT, content=b"abc")
    with pytest.raises(SizeMismatchError, match=r"3 bytes.*5"):
        await manager.get(replace(ref, size=5))
