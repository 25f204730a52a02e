"""The memory backend beyond what the suite asks of every backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_storage.backends import memory
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ConfigurationError, ObjectExistsError, StorageFullError

MIB = 1 << 20


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


@pytest.mark.parametrize("size", [-1, True, "10", 1.5])
def test_impossible_bounds_are_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="max_total_size"):
        MemoryStorageBackend(max_total_size=size)


async def test_the_bound_is_exact() -> None:
    backend = MemoryStorageBackend(max_total_size=10)
    await backend.put_bytes("a", b"12345")
    await backend.put_stream("b", stream(b"123", b"45"))
    await backend.put_bytes("empty", b"")
    for attempt in (backend.put_bytes("c", b"1"), backend.put_stream("c", stream(b"1")), backend.copy("a", "c")):
        with pytest.raises(StorageFullError) as caught:
            await attempt
        assert caught.value.location == "c"
    await backend.delete("a")
    await backend.copy("b", "c")
    with pytest.raises(StorageFullError):
        await backend.put_bytes("d", b"1")
    assert await backend.delete_many(["b", "c"]) == {}
    await backend.put_bytes("d", b"1234567890")


async def test_failed_writes_give_their_room_back() -> None:
    backend = MemoryStorageBackend(max_total_size=10)

    async def broken() -> AsyncIterator[bytes]:
        yield b"12345678"
        raise RuntimeError("the source broke")

    for _ in range(3):
        with pytest.raises(RuntimeError):
            await backend.put_stream("a", broken())
        with pytest.raises(StorageFullError):
            await backend.put_stream("a", stream(b"12345678", b"12345678"))
    await backend.put_bytes("a", b"1234567890")
    with pytest.raises(ObjectExistsError):
        await backend.put_bytes("a", b"")


async def test_writes_in_progress_count() -> None:
    backend = MemoryStorageBackend(max_total_size=10)
    go_on = asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield b"12345678"
        await go_on.wait()

    writer = asyncio.ensure_future(backend.put_stream("a", held()))
    await asyncio.sleep(0)
    with pytest.raises(StorageFullError):
        await backend.put_bytes("b", b"123")
    go_on.set()
    await writer


async def test_large_objects_are_copied_in_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []

    async def run(function: Any, start: int, stop: int) -> bytes:
        joined.append(stop - start)
        return await asyncio.to_thread(function, start, stop)

    monkeypatch.setattr(memory._threads, "run", run)
    backend, content = MemoryStorageBackend(), bytes(16 * MIB)
    await backend.put_bytes("large", content)
    await backend.copy("large", "copy")
    assert backend._objects["copy"].chunks[0] is content
    reader = await backend.open("copy", offset=5)
    assert len(await reader.read(MIB)) == MIB
    assert joined == []
    assert len(await reader.read(-1)) == 15 * MIB - 5
    assert joined == [15 * MIB - 5]
    await reader.aclose()


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=50), max_size=8),
    offset=st.integers(0, 60),
    length=st.none() | st.integers(0, 400),
    step=st.integers(1, 70),
)
def test_any_range_of_any_chunks(chunks: list[bytes], offset: int, length: int | None, step: int) -> None:
    content = b"".join(chunks)
    offset = min(offset, len(content))

    async def run() -> bytes:
        backend = MemoryStorageBackend()
        await backend.put_stream("a", stream(*chunks))
        reader = await backend.open("a", offset=offset, length=length)
        found = []
        while chunk := await reader.read(step):
            found.append(chunk)
        return b"".join(found)

    assert asyncio.run(run()) == (content[offset:] if length is None else content[offset : offset + length])
