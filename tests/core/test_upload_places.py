"""Streams that stall: which of them take a place among the uploads of a manager, and how they lose it."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiofiles
import httpx
import pytest

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, streams
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import StreamTimeoutError
from granite_storage.orm import bind_storage
from granite_storage.testing import FaultInjectingBackend
from tests.core.support import SLOT, eventually, left_below
from tests.web.receiving import FORM, App, Base, part, served

pytestmark = pytest.mark.case("RE-09")


def manager_of(backend: Any, **options: Any) -> StorageManager:
    return StorageManager(
        backends={"store": backend},
        policies={"files": StoragePolicy("files", "store")},
        **({"max_concurrent_uploads": 2} | options),
    )


class Stalling:
    """A stream that yields some chunks, and then nothing any more."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.begun = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk
        self.begun.set()
        await asyncio.Event().wait()


async def test_streams_that_yield_nothing_take_no_place() -> None:
    manager = manager_of(MemoryStorageBackend())
    stalled = [Stalling() for _ in range(20)]
    uploads = [asyncio.ensure_future(manager.put_stream(**SLOT, stream=stream)) for stream in stalled]
    await asyncio.gather(*(stream.begun.wait() for stream in stalled))
    refs = await asyncio.gather(*(manager.put_stream(**SLOT, stream=many(number)) for number in range(10)))
    assert [ref.size for ref in refs] == list(range(10))
    for upload in uploads:
        upload.cancel()
    await asyncio.wait(uploads)


async def many(number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        await asyncio.sleep(0)
        yield b"x"


async def test_a_stream_that_stalls_loses_its_place(tmp_path: Path) -> None:
    manager = manager_of(LocalStorageBackend(tmp_path, fsync=False), upload_idle_timeout=0.05)
    stalled = [asyncio.ensure_future(manager.put_stream(**SLOT, stream=Stalling(b"x"))) for _ in range(8)]
    await asyncio.sleep(0)
    ref = await manager.put_stream(**SLOT, stream=many(3))
    for error in await asyncio.gather(*stalled, return_exceptions=True):
        assert isinstance(error, StreamTimeoutError)
        assert "nothing for 0.05 s" in str(error)
    assert await manager.get(ref) == b"xxx"
    await manager.delete(ref)
    assert left_below(tmp_path) == []


async def test_streams_may_take_their_time_where_there_are_no_places() -> None:
    manager = manager_of(MemoryStorageBackend(), max_concurrent_uploads=None, upload_idle_timeout=0.01)

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(0.1)
        yield b"b"

    assert await manager.get(await manager.put_stream(**SLOT, stream=slow())) == b"ab"
    manager = manager_of(MemoryStorageBackend(), upload_idle_timeout=None)
    assert await manager.get(await manager.put_stream(**SLOT, stream=slow())) == b"ab"


class StuckFile(io.RawIOBase):
    """A file whose second read waits."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self._pieces = iter([b"x"])

    def read(self, size: int = -1, /) -> bytes:
        for piece in self._pieces:
            return piece
        self.go.wait(60)
        return b""


async def test_a_file_that_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_CANCEL_TIMEOUT", 0.05)
    manager = manager_of(MemoryStorageBackend(), max_concurrent_uploads=1, upload_idle_timeout=0.05)
    file = StuckFile()
    try:
        with pytest.raises(StreamTimeoutError):
            await manager.put_stream(**SLOT, stream=file)
        assert (await manager.put_stream(**SLOT, stream=[b"ab"])).size == 2
    finally:
        file.go.set()


async def test_a_generator_that_is_stuck_before_its_first_piece() -> None:
    manager = manager_of(MemoryStorageBackend(), max_concurrent_uploads=1)
    begun, go = threading.Event(), threading.Event()

    def generator() -> Iterator[bytes]:
        begun.set()
        go.wait(60)
        yield b"x"

    stuck = asyncio.ensure_future(manager.put_stream(**SLOT, stream=generator()))
    try:
        await eventually(begun.is_set)
        assert (await manager.put_stream(**SLOT, stream=many(2))).size == 2
    finally:
        go.set()
    assert (await stuck).size == 1


class TestRate:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "_RATE_COUNTS_FROM", 0.1)

    async def test_a_stream_that_trickles(self) -> None:
        manager = manager_of(MemoryStorageBackend(), max_concurrent_uploads=None, min_upload_rate=1_000_000)

        async def trickle() -> AsyncIterator[bytes]:
            while True:
                await asyncio.sleep(0.01)
                yield b"x"

        start = time.monotonic()
        with pytest.raises(StreamTimeoutError, match="fewer than 1000000 bytes per second"):
            await manager.put_stream(**SLOT, stream=trickle())
        assert time.monotonic() - start >= 0.1
        assert [info async for info in manager.backend("store").iter_objects()] == []

    async def test_what_came_fast_may_pause(self) -> None:
        manager = manager_of(MemoryStorageBackend(), min_upload_rate=1000)

        async def pausing() -> AsyncIterator[bytes]:
            yield bytes(1000)
            await asyncio.sleep(0.3)
            yield bytes(10)

        assert (await manager.put_stream(**SLOT, stream=pausing())).size == 1010

    async def test_the_time_of_the_storage_does_not_count(self) -> None:
        backend = FaultInjectingBackend(MemoryStorageBackend())
        backend.delay("put_stream", seconds=0.3)
        manager = manager_of(backend, min_upload_rate=1_000_000, upload_idle_timeout=0.1)
        assert (await manager.put_stream(**SLOT, stream=many(5))).size == 5


async def test_a_timeout_of_the_stream_itself_passes_unchanged() -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x"
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await manager_of(MemoryStorageBackend()).put_stream(**SLOT, stream=failing())


async def test_a_cancellation_stays_one() -> None:
    stream = Stalling(b"x")
    upload = asyncio.ensure_future(manager_of(MemoryStorageBackend()).put_stream(**SLOT, stream=stream))
    await stream.begun.wait()
    upload.cancel()
    await asyncio.wait([upload])
    assert upload.cancelled()


async def test_files_that_wait_for_a_place_are_not_read_before(tmp_path: Path) -> None:
    """They would be in memory, a MiB of each."""
    manager = manager_of(MemoryStorageBackend(), max_concurrent_uploads=1)
    (tmp_path / "x").write_bytes(b"content")
    first = Stalling(b"x")
    holding = asyncio.ensure_future(manager.put_stream(**SLOT, stream=first))
    await first.begun.wait()
    file = io.BytesIO(b"content")
    async with aiofiles.open(tmp_path / "x", "rb") as handle:
        waiting = [asyncio.ensure_future(manager.put_stream(**SLOT, stream=stream)) for stream in (file, handle)]
        await asyncio.sleep(0.05)
        assert (file.tell(), await handle.tell()) == (0, 0)
        holding.cancel()
        assert [ref.size for ref in await asyncio.gather(*waiting)] == [7, 7]


@pytest.mark.parametrize("option", ["upload_idle_timeout", "min_upload_rate"])
@pytest.mark.parametrize("wrong", [-1, True, "3"])
def test_options_that_cannot_be(option: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        StorageManager(backends={}, policies={}, **{option: wrong})


async def test_eight_clients_that_stall_after_one_byte() -> None:
    manager = manager_of(MemoryStorageBackend(), max_concurrent_uploads=8, upload_idle_timeout=0.5)
    binding = bind_storage(Base, manager)
    try:
        async with served(App(manager, None).asgi()) as port, httpx.AsyncClient(timeout=30) as client:  # type: ignore[arg-type]
            head = f"POST /form HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM['Content-Type']}\r\nContent-Length: 1000000\r\n\r\n"
            stalled = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
            for _, writer in stalled:
                writer.write(head.encode() + part("file", b"x", filename="a").removesuffix(b"\r\n") + b"y" * 100)
                await writer.drain()
            response = await client.put(f"http://127.0.0.1:{port}/body/a", content=b"abc")
            assert (response.status_code, response.json()["size"]) == (200, 3)
            for reader, writer in stalled:
                assert (await reader.readline()).startswith(b"HTTP/1.1 408")
                writer.close()
            assert len([info async for info in manager.backend("store").iter_objects()]) == 1
    finally:
        binding.unbind()
