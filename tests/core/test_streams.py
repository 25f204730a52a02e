"""What is declared of a stream, what a policy allows, and what is counted and hashed on the way."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_storage import ChecksumMismatchError, ContentTooLargeError, SizeLimitedStream, StorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import InvalidReferenceError, SizeMismatchError
from granite_storage.streams import MeasuredStream, iter_chunks
from tests.core.support import MIB, SLOT, chunks_of, endless, gathered, left_below, local_manager, manager_on, many

EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Unread:
    """Fails the test where it is read."""

    def read(self, _: int) -> bytes:
        raise AssertionError("the stream was read")


async def listed(backend: StorageBackend) -> list[str]:
    return [info.location async for info in backend.iter_objects()]


class TestLimit:
    @pytest.mark.case("LIM-01")
    @pytest.mark.parametrize("limit", [0, 1, 10, MIB - 1, MIB, MIB + 1, 3 * MIB + 7])
    @pytest.mark.parametrize("size", [1, 1000, MIB, 5 * MIB])
    async def test_the_last_byte_decides(self, limit: int, size: int) -> None:
        await self._check_limit(MemoryStorageBackend(), limit, 1000 if limit // size > 5000 else size)

    @pytest.mark.case("LIM-01")
    async def test_the_last_byte_decides_on_every_backend(self, backend: StorageBackend) -> None:
        await self._check_limit(backend, 6 * MIB, 65536)

    async def _check_limit(self, backend: StorageBackend, limit: int, size: int) -> None:
        manager = manager_on(backend, max_size=limit)
        exact = bytes(limit)
        ref = await manager.put_stream(**SLOT, stream=[exact[start : start + size] for start in range(0, limit, size)])
        assert ref.size == limit
        over = bytes(limit + 1)
        with pytest.raises(ContentTooLargeError) as caught:
            await manager.put_stream(**SLOT, stream=[over[start : start + size] for start in range(0, limit + 1, size)])
        assert caught.value.max_size == limit
        assert await listed(backend) == [ref.location]

    @pytest.mark.case("LIM-01")
    async def test_content_in_memory(self, backend: StorageBackend) -> None:
        manager = manager_on(backend, max_size=10)
        assert (await manager.put_bytes(**SLOT, content=bytes(10))).size == 10
        for content in (bytes(11), bytearray(11), memoryview(bytes(16)).cast("Q"), memoryview(bytes(22))[::2]):
            with pytest.raises(ContentTooLargeError):
                await manager.put_bytes(**SLOT, content=content)
        assert len(await listed(backend)) == 1

    @pytest.mark.case("LIM-02", "STR-08")
    async def test_a_declared_size_opens_no_door(self) -> None:
        backend = MemoryStorageBackend()
        passed = 0

        async def lying() -> Any:
            nonlocal passed
            for _ in range(160):
                passed += 65536
                yield bytes(65536)

        with pytest.raises(SizeMismatchError):
            await manager_on(backend, max_size=20 * MIB).put_stream(**SLOT, stream=lying(), size=5)
        assert passed < 2 * MIB
        with pytest.raises(ContentTooLargeError):
            await manager_on(backend, max_size=MIB).put_stream(**SLOT, stream=[bytes(MIB + 1)], size=5)
        assert await listed(backend) == []

    @pytest.mark.case("LIM-03")
    async def test_what_is_declared_too_large_is_not_read(self) -> None:
        manager = manager_on(MemoryStorageBackend(), max_size=10)
        with pytest.raises(ContentTooLargeError) as caught:
            await manager.put_stream(**SLOT, stream=Unread(), size=11)
        assert caught.value.max_size == 10

    @pytest.mark.case("LIM-04")
    async def test_what_is_compressed_is_stored_as_it_is(self) -> None:
        bomb = gzip.compress(bytes(10 * MIB))
        manager = manager_on(MemoryStorageBackend(), max_size=len(bomb))
        ref = await manager.put_stream(**SLOT, stream=[bomb], content_type="application/gzip")
        assert await manager.get(ref) == bomb

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 300))
    def test_not_a_byte_over_the_limit_passes(self, sizes: list[int], limit: int) -> None:
        async def check() -> None:
            stream = SizeLimitedStream([bytes(size) for size in sizes], limit)
            passed = 0
            try:
                async for chunk in stream:
                    passed += len(chunk)
            except ContentTooLargeError:
                assert sum(sizes) > limit
            else:
                assert passed == sum(sizes) <= limit
            assert passed <= limit
            assert max(0, stream.bytes_read) <= sum(sizes)

        asyncio.run(check())

    async def test_a_chunk_over_the_limit_is_not_cut_to_fit(self) -> None:
        stream = SizeLimitedStream([b"ab", b"cdef"], 5)
        assert await anext(stream) == b"ab"
        with pytest.raises(ContentTooLargeError):
            await anext(stream)
        assert stream.bytes_read == 6

    async def test_it_counts_bytes_and_not_items(self) -> None:
        with pytest.raises(ContentTooLargeError):
            await gathered(SizeLimitedStream([memoryview(bytes(16)).cast("Q")], 15))

    async def test_the_callers_stream_stays_open(self) -> None:
        file = io.BytesIO(bytes(100))
        limited = SizeLimitedStream(file, 10)
        with pytest.raises(ContentTooLargeError):
            await gathered(limited)
        await limited.aclose()
        assert not file.closed


class TestDeclared:
    @pytest.mark.case("STR-08")
    @pytest.mark.parametrize("actual", [9, 20 * MIB])
    async def test_another_size_is_refused(self, backend: StorageBackend, actual: int) -> None:
        manager = manager_on(backend)
        with pytest.raises(SizeMismatchError) as caught:
            await manager.put_stream(**SLOT, stream=many(b"x" * min(actual, MIB), max(1, actual // MIB)), size=10)
        assert caught.value.expected == 10
        assert caught.value.actual == (actual if actual < 10 else None)
        assert await listed(backend) == []

    @pytest.mark.case("STR-09")
    @pytest.mark.parametrize("size", [10, 9 * MIB])
    async def test_another_checksum_is_refused(self, backend: StorageBackend, size: int) -> None:
        manager = manager_on(backend)
        with pytest.raises(ChecksumMismatchError) as caught:
            await manager.put_stream(**SLOT, stream=[bytes(size)], checksum=EMPTY)
        assert (caught.value.expected, caught.value.actual) == (EMPTY, sha256(bytes(size)))
        assert await listed(backend) == []

    @pytest.mark.case("STR-09")
    async def test_the_right_ones_are_taken_in_either_case(self) -> None:
        manager = manager_on(MemoryStorageBackend())
        ref = await manager.put_stream(**SLOT, stream=[b"abc"], size=3, checksum=sha256(b"abc").upper())
        assert ref.checksum == sha256(b"abc")

    @pytest.mark.case("STR-09")
    @pytest.mark.parametrize(
        "checksum", ["md5:900150983cd24fb0d6963f7d28e17f72", "abc", "sha256:", "sha256:zz", "", 1, b"sha256:"]
    )
    async def test_what_is_no_checksum_is_refused_unread(self, checksum: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="checksum"):
            await manager_on(MemoryStorageBackend()).put_stream(**SLOT, stream=Unread(), checksum=checksum)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    @pytest.mark.parametrize("length", [9, 2 * MIB])
    async def test_bytes_are_verified_like_a_stream(self, backend: StorageBackend, kind: Any, length: int) -> None:
        manager = manager_on(backend)
        content = bytes(length)
        for size in (length - 1, length + 1):
            with pytest.raises(SizeMismatchError) as caught:
                await manager.put_stream(**SLOT, stream=kind(content), size=size)
            assert (caught.value.expected, caught.value.actual) == (size, length)
        with pytest.raises(ChecksumMismatchError) as mismatch:
            await manager.put_stream(**SLOT, stream=kind(content), checksum=EMPTY)
        assert (mismatch.value.expected, mismatch.value.actual) == (EMPTY, sha256(content))
        with pytest.raises(InvalidReferenceError, match="checksum"):
            await manager.put_stream(**SLOT, stream=kind(content), checksum="md5:900150983cd24fb0d6963f7d28e17f72")
        with pytest.raises(ValueError, match="size must be"):
            await manager.put_stream(**SLOT, stream=kind(content), size=-1)
        assert await listed(backend) == []
        ref = await manager.put_stream(**SLOT, stream=kind(content), size=length, checksum=sha256(content).upper())
        assert (ref.size, ref.checksum) == (length, sha256(content))

    @pytest.mark.parametrize("size", [-1, "3", 3.0, True])
    async def test_what_is_no_size_is_refused_unread(self, size: Any) -> None:
        with pytest.raises(ValueError, match="size"):
            await manager_on(MemoryStorageBackend()).put_stream(**SLOT, stream=Unread(), size=size)


@pytest.mark.case("STR-10")
async def test_an_empty_body_is_an_object(backend: StorageBackend) -> None:
    manager = manager_on(backend)
    streams: list[Any] = [b"", [], [b"", b""], io.BytesIO()]
    refs = [await manager.put_stream(**SLOT, stream=stream, size=0, checksum=EMPTY) for stream in streams]
    for ref in (*refs, await manager.put_bytes(**SLOT, content=b"")):
        assert (ref.size, ref.checksum) == (0, EMPTY)
        assert await manager.get(ref) == b""
        assert (await manager.stat(ref)).size == 0
        async with manager.open(ref, verify=True) as reader:
            assert [chunk async for chunk in reader] == []


@pytest.mark.case("STR-06")
async def test_a_timeout_ends_a_stream_that_never_does(tmp_path: Path) -> None:
    manager = local_manager(tmp_path)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await manager.put_stream(**SLOT, stream=endless(b"x" * MIB, 0.01))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert left_below(tmp_path) == []


async def test_a_backend_sees_whole_pieces_and_the_checks_come_last() -> None:
    content = MeasuredStream(iter_chunks([b"a" * 100, b"b" * (2 * MIB), b"c"]), size=7)
    with pytest.raises(SizeMismatchError):
        await gathered(content)
    assert content.checksum is None
    content = MeasuredStream(iter_chunks(chunks_of(b"abc", b"", b"d")))
    assert await gathered(content) == b"abcd"
    assert (content.size, content.checksum) == (4, sha256(b"abcd"))
