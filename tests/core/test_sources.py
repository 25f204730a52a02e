"""Everything that a Python program streams from, and what is no stream of bytes."""

from __future__ import annotations

import array
import asyncio
import contextvars
import gzip
import hashlib
import io
import itertools
import mmap
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiofiles
import aiohttp
import httpx
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import UploadFile

from granite_storage import SizeLimitedStream, StorageManager, streams
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ConsumedSourceError, InvalidReferenceError
from granite_storage.orm import Attachment
from granite_storage.streams import CHUNK_SIZE, MeasuredStream, iter_chunks
from granite_storage.testing import FaultInjectingBackend
from tests.core.support import MIB, SLOT, Lag, chunks_of, eventually, gathered, in_new_process, manager_on, many
from tests.tiers import repetitions

CONTENT = bytes(range(256)) * 4096 * 3 + b"the end"


@pytest.fixture
async def manager() -> AsyncIterator[StorageManager]:
    async with manager_on(MemoryStorageBackend()) as manager:
        yield manager


async def listed(manager: StorageManager) -> list[str]:
    return [info.location async for info in manager.backend("store").iter_objects()]


def cut(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


def with_reused_buffer(content: bytes, size: int) -> Iterator[memoryview]:
    buffer = bytearray(size)
    for piece in cut(content, size):
        buffer[: len(piece)] = piece
        yield memoryview(buffer)[: len(piece)]


def with_resized_buffer(content: bytes, size: int) -> Iterator[bytearray]:
    buffer = bytearray()
    for piece in cut(content, size):
        buffer.clear()
        buffer += piece
        yield buffer


async def made_async(chunks: Iterator[Any]) -> AsyncIterator[Any]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk


class AwaitableRead:
    """Its `read` is no coroutine function, but returns something to await."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, size: int) -> Awaitable[bytes]:
        async def read() -> bytes:
            return self._file.read(size)

        return read()


class Source:
    """Opens a source of every kind, and closes it after the test."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.path = folder / "source"
        self.path.write_bytes(CONTENT)
        self.stack = stack

    async def binary_file(self) -> Any:
        return self.stack.enter_context(self.path.open("rb"))

    async def unbuffered_file(self) -> Any:
        return self.stack.enter_context(self.path.open("rb", buffering=0))

    async def bytes_io(self) -> Any:
        return io.BytesIO(CONTENT)

    async def spooled_file(self) -> Any:
        file = self.stack.enter_context(tempfile.SpooledTemporaryFile(max_size=100))  # noqa: SIM115  # the stack closes it
        file.write(CONTENT)
        file.seek(0)
        return file

    async def memory_map(self) -> Any:
        file = self.stack.enter_context(self.path.open("rb"))
        return self.stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    async def aiofiles_handle(self) -> Any:
        return await self.stack.enter_async_context(aiofiles.open(self.path, "rb"))

    async def upload_file(self) -> Any:
        return UploadFile(self.stack.enter_context(self.path.open("rb")))

    async def awaitable_read(self) -> Any:
        return AwaitableRead(CONTENT)

    async def asyncio_stream_reader(self) -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(CONTENT)
        reader.feed_eof()
        return reader

    async def aiohttp_body(self) -> Any:
        async def serve(_: web.Request) -> web.Response:
            return web.Response(body=CONTENT)

        app = web.Application()
        app.router.add_get("/", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        self.stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        session = await self.stack.enter_async_context(aiohttp.ClientSession())
        return (await self.stack.enter_async_context(session.get(f"http://127.0.0.1:{runner.addresses[0][1]}/"))).content

    async def httpx_body(self) -> Any:
        async def serve(_: httpx.Request) -> httpx.Response:
            return httpx.Response(200, content=CONTENT)

        client = await self.stack.enter_async_context(httpx.AsyncClient(transport=httpx.MockTransport(serve)))
        response = await self.stack.enter_async_context(client.stream("GET", "http://test/"))
        return response.aiter_bytes()

    async def async_generator(self) -> Any:
        return made_async(iter(cut(CONTENT, 5000)))

    async def generator(self) -> Any:
        return (piece for piece in cut(CONTENT, 5000))

    async def a_list(self) -> Any:
        return cut(CONTENT, 100_000)

    async def one_large_chunk(self) -> Any:
        return [CONTENT]

    async def some_bytes(self) -> Any:
        return CONTENT

    async def a_bytearray(self) -> Any:
        return bytearray(CONTENT)

    async def a_memoryview(self) -> Any:
        return memoryview(CONTENT)

    async def an_array(self) -> Any:
        return array.array("B", CONTENT)

    async def reused_buffer(self) -> Any:
        return with_reused_buffer(CONTENT, 7000)

    async def reused_large_buffer(self) -> Any:
        return with_reused_buffer(CONTENT, 2 * MIB)

    async def reused_buffer_async(self) -> Any:
        return made_async(with_reused_buffer(CONTENT, 7000))

    async def reused_large_buffer_async(self) -> Any:
        return made_async(with_reused_buffer(CONTENT, 2 * MIB))

    async def resized_buffer(self) -> Any:
        return with_resized_buffer(CONTENT, 7000)

    async def resized_large_buffer_async(self) -> Any:
        return made_async(with_resized_buffer(CONTENT, 2 * MIB))

    async def views_that_are_not_contiguous(self) -> Any:
        doubled = [bytes(byte for byte in piece for _ in range(2)) for piece in cut(CONTENT, 500_000)]
        return [memoryview(piece)[::2] for piece in doubled]

    async def views_of_wider_items(self) -> Any:
        whole = len(CONTENT) // 8 * 8
        return [memoryview(CONTENT[:whole]).cast("Q"), array.array("I"), memoryview(b"").cast("H"), CONTENT[whole:]]

    async def a_limited_stream(self) -> Any:
        return SizeLimitedStream(io.BytesIO(CONTENT), None)


KINDS = [name for name in vars(Source) if not name.startswith("_")]


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_source(manager: StorageManager, tmp_path: Path, kind: str) -> None:
    async with AsyncExitStack() as stack:
        source = await getattr(Source(tmp_path, stack), kind)()
        ref = await manager.put_stream(**SLOT, stream=source)
        assert not getattr(source, "closed", False)
    assert (ref.size, ref.checksum) == (len(CONTENT), f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    assert await manager.get(ref) == CONTENT


async def test_a_reader_is_a_source(manager: StorageManager) -> None:
    ref = await manager.put_bytes(**SLOT, content=CONTENT)
    async with manager.open(ref, offset=10) as reader:
        again = await manager.put_stream(**SLOT, stream=reader)
    assert await manager.get(again) == CONTENT[10:]


async def test_a_file_is_read_from_where_it_stands(manager: StorageManager) -> None:
    file = io.BytesIO(b"0123456789")
    file.seek(4)
    ref = await manager.put_stream(**SLOT, stream=file)
    assert await manager.get(ref) == b"456789"
    assert file.tell() == 10


async def test_put_bytes_takes_every_buffer_of_bytes(manager: StorageManager) -> None:
    wide = memoryview(CONTENT[: 8 * 100_000]).cast("Q")
    grid = memoryview(bytes(range(200)) * 100).cast("B", (100, 200))
    for content in (CONTENT, bytearray(CONTENT), memoryview(CONTENT), wide, grid, memoryview(CONTENT)[::3], b""):
        ref = await manager.put_bytes(**SLOT, content=content)
        assert await manager.get(ref) == bytes(content)
        assert ref.size == len(bytes(content))


class TestNoStreamOfBytes:
    @pytest.mark.parametrize("source", ["text", io.StringIO("text"), None, 5, object(), Path("x"), 1.5])
    async def test_is_refused_at_once(self, manager: StorageManager, source: Any) -> None:
        with pytest.raises(TypeError, match="stream"):
            await manager.put_stream(**SLOT, stream=source)
        assert await listed(manager) == []

    async def test_a_path_says_how_it_is_opened(self, manager: StorageManager) -> None:
        with pytest.raises(TypeError, match=r"only names a file: pass the file, open\(path, 'rb'\)"):
            await manager.put_stream(**SLOT, stream=Path("x"))  # type: ignore[arg-type]

    async def test_closed_while_it_is_read(self, manager: StorageManager) -> None:
        class Closing(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell():
                    self.close()
                return super().read(size)

        with pytest.raises(ConsumedSourceError, match="closed before all of it was read"):
            await manager.put_stream(**SLOT, stream=Closing(bytes(3 * CHUNK_SIZE)))
        assert await listed(manager) == []

    @pytest.mark.parametrize("source", [{b"a"}, frozenset({b"a"}), set(), {b"a": 1}, {b"a": 1}.keys()], ids=repr)
    async def test_chunks_without_an_order_are_refused(self, manager: StorageManager, source: Any) -> None:
        with pytest.raises(TypeError, match=rf"must have an order, but those of {type(source).__name__} have none.*list"):
            await manager.put_stream(**SLOT, stream=source)
        with pytest.raises(TypeError):
            Attachment(source)
        assert await listed(manager) == []

    async def test_the_values_of_a_mapping_are_taken(self, manager: StorageManager) -> None:
        assert (await manager.put_stream(**SLOT, stream={1: b"a", 2: b"b"}.values())).size == 2

    @pytest.mark.parametrize("mode", ["wb", "ab", "xb"])
    @pytest.mark.parametrize("buffering", [-1, 0])
    async def test_files_that_are_only_written_are_refused(
        self, manager: StorageManager, tmp_path: Path, mode: str, buffering: int
    ) -> None:
        file: Any
        with (tmp_path / "x").open(mode, buffering=buffering) as file:
            with pytest.raises(TypeError, match=r"must be readable.*'rb'"):
                await manager.put_stream(**SLOT, stream=file)
            with pytest.raises(TypeError, match=r"must be readable.*'rb'"):
                Attachment(file)
        with gzip.open(tmp_path / "z", "wb") as file, pytest.raises(TypeError, match=r"must be readable.*'rb'"):
            Attachment(file)
        with tempfile.NamedTemporaryFile("wb") as temporary, pytest.raises(TypeError, match=r"must be readable.*'rb'"):
            Attachment(temporary)
        async with aiofiles.open(tmp_path / "y", "wb") as handle:
            with pytest.raises(TypeError, match=r"must be readable.*'rb'"):
                await manager.put_stream(**SLOT, stream=handle)
        assert await listed(manager) == []

    @pytest.mark.parametrize("mode", ["rb", "r+b", "w+b"])
    @pytest.mark.parametrize("buffering", [-1, 0])
    async def test_files_that_are_read_and_written_are_taken(
        self, manager: StorageManager, tmp_path: Path, mode: str, buffering: int
    ) -> None:
        (tmp_path / "x").write_bytes(b"x")
        file: Any
        with (tmp_path / "x").open(mode, buffering=buffering) as file:
            assert (await manager.put_stream(**SLOT, stream=file)).size == ("w" not in mode)

    async def test_a_file_that_says_nothing_of_itself_is_taken(self, manager: StorageManager) -> None:
        class Silent(io.IOBase):
            content = b"a"

            def read(self, size: int = -1) -> bytes:
                content, self.content = self.content, b""
                return content

        assert (await manager.put_stream(**SLOT, stream=Silent())).size == 1

    async def test_answers_of_http_clients_are_refused(self, manager: StorageManager) -> None:
        class Response:
            async def read(self) -> bytes:
                return b"a"

        for source in (httpx.Response(200, content=b"a"), Response()):
            wrong: Any = source
            with pytest.raises(TypeError, match=r"read\(\) of Response takes no size.*aiter_bytes\(\)"):
                await manager.put_stream(**SLOT, stream=wrong)
            with pytest.raises(TypeError, match=r"read\(\) of Response takes no size"):
                Attachment(wrong)
        assert await listed(manager) == []
        ref = await manager.put_stream(**SLOT, stream=httpx.Response(200, content=b"a").aiter_bytes())
        assert ref.size == 1

    async def test_text_files_are_refused(self, manager: StorageManager, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("text")
        with (tmp_path / "x").open() as file, pytest.raises(TypeError, match="'rb'"):
            await manager.put_stream(**SLOT, stream=file)  # type: ignore[arg-type]
        async with aiofiles.open(tmp_path / "x") as handle:
            with pytest.raises(TypeError, match="yielded str"):
                await manager.put_stream(**SLOT, stream=handle)  # type: ignore[arg-type]
        with tempfile.NamedTemporaryFile("w+") as temporary, pytest.raises(TypeError, match="yielded str"):
            await manager.put_stream(**SLOT, stream=temporary)  # type: ignore[arg-type]
        assert await listed(manager) == []

    @pytest.mark.case("STR-01")
    @pytest.mark.parametrize("wrong", ["text", 5, None, 1.5, [b"a"], {}])
    @pytest.mark.parametrize("kind", ["async", "sync"])
    @pytest.mark.parametrize("before", [0, 1, 5])
    async def test_what_it_yields_is_named(self, manager: StorageManager, wrong: Any, kind: str, before: int) -> None:
        chunks = [b"x" * MIB] * before + [wrong]
        with pytest.raises(TypeError, match=f"yielded {type(wrong).__name__}"):
            await manager.put_stream(**SLOT, stream=chunks if kind == "sync" else chunks_of(*chunks))
        assert await listed(manager) == []

    async def test_a_read_that_would_block_is_no_end(self, manager: StorageManager) -> None:
        class NotReady(io.RawIOBase):
            def read(self, size: int = -1) -> None:
                return None

        with pytest.raises(TypeError, match="NoneType"):
            await manager.put_stream(**SLOT, stream=NotReady())  # type: ignore[arg-type]

    @pytest.mark.parametrize("content", ["text", None, 5, [b"a"], io.BytesIO(b"a")])
    async def test_put_bytes_takes_no_stream(self, manager: StorageManager, content: Any) -> None:
        with pytest.raises(TypeError, match="put_stream"):
            await manager.put_bytes(**SLOT, content=content)


class Tracked:
    """An iterable that hands out iterators of its own, and counts how often each is closed."""

    def __init__(self, *chunks: Any, then: BaseException | None = None, closing: BaseException | None = None) -> None:
        self.chunks, self.then, self.closing = chunks, then, closing
        self.made: list[TrackedIterator] = []


class TrackedIterator:
    def __init__(self, source: Tracked) -> None:
        self.closed = 0
        self._source = source
        self._chunks = iter(source.chunks)

    def _next(self, end: type[Exception]) -> Any:
        for chunk in self._chunks:
            return chunk
        raise self._source.then or end

    def _close(self) -> None:
        self.closed += 1
        if self._source.closing is not None:
            raise self._source.closing


class TrackedAsyncIterator(TrackedIterator):
    def __aiter__(self) -> TrackedAsyncIterator:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        return self._next(StopAsyncIteration)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self._close()


class TrackedSyncIterator(TrackedIterator):
    def __iter__(self) -> TrackedSyncIterator:
        return self

    def __next__(self) -> Any:
        return self._next(StopIteration)

    def close(self) -> None:
        self._close()


class AsyncTracked(Tracked):
    def __aiter__(self) -> Any:
        self.made.append(TrackedAsyncIterator(self))
        return self.made[-1]


class SyncTracked(Tracked):
    def __iter__(self) -> Any:
        self.made.append(TrackedSyncIterator(self))
        return self.made[-1]


BOTH = pytest.mark.parametrize("kind", [AsyncTracked, SyncTracked])
FOUR = [b"x" * MIB] * 4


@BOTH
class TestWhoCloses:
    async def test_an_iterator_made_here_is_closed_once(self, manager: StorageManager, kind: Any) -> None:
        source = kind(*FOUR)
        await manager.put_stream(**SLOT, stream=source)
        assert [iterator.closed for iterator in source.made] == [1]

    @pytest.mark.case("STR-03")
    async def test_also_when_it_raises(self, manager: StorageManager, kind: Any) -> None:
        error = RuntimeError("of the source")
        source = kind(*FOUR[:3], then=error)
        with pytest.raises(RuntimeError) as caught:
            await manager.put_stream(**SLOT, stream=source)
        assert caught.value is error
        assert [iterator.closed for iterator in source.made] == [1]
        assert await listed(manager) == []

    async def test_also_when_there_is_too_much(self, kind: Any) -> None:
        manager = manager_on(MemoryStorageBackend(), max_size=2 * MIB)
        source = kind(*FOUR)
        with pytest.raises(Exception, match="larger than"):
            await manager.put_stream(**SLOT, stream=source)
        assert [iterator.closed for iterator in source.made] == [1]

    async def test_also_when_the_backend_fails(self, kind: Any) -> None:
        faults = FaultInjectingBackend(MemoryStorageBackend())
        faults.cut("put_stream", after=MIB)
        source = kind(*FOUR)
        with pytest.raises(Exception, match="injected"):
            await manager_on(faults).put_stream(**SLOT, stream=source)
        assert [iterator.closed for iterator in source.made] == [1]

    async def test_also_when_it_is_cancelled(self, tmp_path: Path, kind: Any) -> None:
        source = kind(*FOUR, *[b"y" * MIB] * 100)
        task = asyncio.ensure_future(manager_on(LocalStorageBackend(tmp_path, fsync=False)).put_stream(**SLOT, stream=source))
        await eventually(lambda: source.made)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [iterator.closed for iterator in source.made] == [1]

    async def test_also_when_it_is_cancelled_while_the_iterator_is_made(self, tmp_path: Path, kind: Any) -> None:
        entered, go = threading.Event(), threading.Event()

        class Slow(kind):  # type: ignore[misc]
            def __iter__(self) -> Any:
                entered.set()
                assert go.wait(60)
                return super().__iter__()

        source = Slow(*FOUR, *[b"y" * MIB] * 100)
        task = asyncio.ensure_future(manager_on(LocalStorageBackend(tmp_path, fsync=False)).put_stream(**SLOT, stream=source))
        await eventually(lambda: entered.is_set() or source.made)
        task.cancel()
        go.set()
        await asyncio.wait([task])
        assert task.cancelled()
        assert [iterator.closed for iterator in source.made] == [1]

    async def test_an_error_of_closing_hides_nothing(
        self, manager: StorageManager, kind: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        error = RuntimeError("of the source")
        with pytest.raises(RuntimeError) as caught:
            await manager.put_stream(**SLOT, stream=kind(b"x", then=error, closing=ValueError("of closing")))
        assert caught.value is error
        assert await manager.put_stream(**SLOT, stream=kind(b"x", closing=ValueError("of closing")))
        assert caplog.text.count("closing the iterator of a stream failed") == 2

    async def test_the_callers_own_iterator_stays_open(self, manager: StorageManager, kind: Any) -> None:
        source = kind(*FOUR)
        own = aiter(source) if kind is AsyncTracked else iter(source)
        await manager.put_stream(**SLOT, stream=own)
        assert own.closed == 0

    async def test_what_is_refused_up_front_is_not_even_begun(self, kind: Any) -> None:
        source = kind(*FOUR)
        with pytest.raises(Exception, match="larger than"):
            await manager_on(MemoryStorageBackend(), max_size=1).put_stream(**SLOT, stream=source, size=2)
        assert source.made == []


class TestErrorsOfASource:
    @pytest.mark.case("STR-03")
    @pytest.mark.parametrize(
        "error", [RuntimeError("x"), OSError(28, "no space"), KeyError("x"), asyncio.CancelledError("mine"), EOFError()]
    )
    @pytest.mark.parametrize("kind", ["async", "sync", "file"])
    @pytest.mark.parametrize("before", [0, 1, 3])
    async def test_they_come_out_as_they_are(self, manager: StorageManager, error: BaseException, kind: str, before: int) -> None:
        def sync() -> Iterator[bytes]:
            yield from FOUR[:before]
            raise error

        class File:
            def __init__(self) -> None:
                self.chunks = sync()

            def read(self, _: int) -> bytes:
                return next(self.chunks)

        sources: dict[str, Callable[[], Any]] = {
            "async": lambda: chunks_of(*FOUR[:before], then=error),
            "sync": sync,
            "file": File,
        }
        with pytest.raises(type(error)) as caught:
            await manager.put_stream(**SLOT, stream=sources[kind]())
        assert caught.value is error
        assert await listed(manager) == []

    async def test_a_stray_stop_iteration_neither_ends_the_stream_nor_hangs(self, manager: StorageManager) -> None:
        class File:
            def read(self, _: int) -> bytes:
                raise StopIteration

        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(manager.put_stream(**SLOT, stream=File()), 60)
        assert await listed(manager) == []

    async def test_what_came_before_the_error_is_counted_first(self) -> None:
        def source() -> Iterator[bytes]:
            yield b"x" * 11
            raise RuntimeError

        with pytest.raises(Exception, match="larger than 10 bytes"):
            await manager_on(MemoryStorageBackend(), max_size=10).put_stream(**SLOT, stream=source())


class TestFairness:
    @pytest.mark.case("STR-02")
    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_very_many_empty_chunks_starve_nobody(self, manager: StorageManager, kind: str) -> None:
        count = repetitions("GRANITE_EMPTY_CHUNKS", default=300_000, exhaustive=1_000_000)
        async with Lag() as lag:
            ref = await manager.put_stream(**SLOT, stream=itertools.repeat(b"", count) if kind == "sync" else many(b"", count))
        assert ref.size == 0
        assert lag.turns > 3

    async def test_a_source_that_blocks_blocks_only_its_own_upload(self, manager: StorageManager) -> None:
        released = threading.Event()

        class Blocking:
            def read(self, _: int) -> bytes:
                assert released.wait(60), "what would have released it was kept from running"
                return b""

        upload = asyncio.ensure_future(manager.put_stream(**SLOT, stream=Blocking()))
        assert await manager.put_stream(**SLOT, stream=io.BytesIO(CONTENT))
        assert not upload.done()
        released.set()
        assert (await upload).size == 0

    async def test_a_source_in_a_thread_sees_the_callers_context(self, manager: StorageManager) -> None:
        who = contextvars.ContextVar("who", default=b"nobody")

        def source() -> Iterator[bytes]:
            yield who.get()

        who.set(b"me")
        assert await manager.get(await manager.put_stream(**SLOT, stream=source())) == b"me"

    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_a_large_chunk_starves_nobody(self, manager: StorageManager, kind: str) -> None:
        chunk = bytes(64 * MIB)
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        task = asyncio.ensure_future(others())
        ref = await manager.put_stream(**SLOT, stream=[chunk] if kind == "sync" else chunks_of(chunk))
        task.cancel()
        assert ref.size == len(chunk)
        assert turns > 10


class TestRegrouping:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 200), st.sampled_from(["bytes", "bytearray", "view"])), max_size=60),
        st.integers(0, 300),
    )
    def test_pieces_are_the_same_bytes_none_empty_none_too_long(self, chunks: list[tuple[int, str]], max_buffered: int) -> None:
        kinds: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "bytearray": bytearray, "view": memoryview}
        content = [kinds[kind](bytes([number % 256]) * size) for number, (size, kind) in enumerate(chunks)]

        async def regroup() -> list[bytes]:
            return [piece async for piece in streams.regroup(iter_chunks(content))]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "CHUNK_SIZE", 64)
            patch.setattr(streams, "_LARGE_ENOUGH", 16)
            patch.setattr(streams, "_MAX_GROUPED", 8)
            patch.setattr(streams, "_MAX_BUFFERED", max_buffered)
            pieces = asyncio.run(regroup())
        assert b"".join(pieces) == b"".join(bytes(chunk) for chunk in content)
        assert all(type(piece) is bytes and 0 < len(piece) <= 64 for piece in pieces)
        assert streams._Group._all_sizes == 0

    async def test_all_groups_together_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "_MAX_BUFFERED", 2000)
        most = 0

        async def regroup() -> bytes:
            nonlocal most
            content = b""
            async for piece in streams.regroup(chunks_of(*[b"x" * 100] * 40)):
                content += piece
                most = max(most, streams._Group._all_sizes)
            return content

        assert await asyncio.gather(*(regroup() for _ in range(50))) == [b"x" * 4000] * 50
        assert most <= 2000 + 50 * 100
        assert streams._Group._all_sizes == 0

    async def test_small_chunks_become_few_pieces(self) -> None:
        pieces = [len(piece) async for piece in MeasuredStream(iter_chunks([b"x" * 4096] * 1024))]
        assert pieces == [CHUNK_SIZE] * 4

    async def test_an_abandoned_stream_holds_nothing(self) -> None:
        content = MeasuredStream(iter_chunks(many(b"x" * 1000, 10_000)))
        await anext(content)
        await content.aclose()
        await content.aclose()
        assert streams._Group._all_sizes == 0


MEMORY = """
import asyncio, os, sys
from granite_storage import ContentTooLargeError, StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

async def main():
    manager = StorageManager(
        backends={"store": LocalStorageBackend(sys.argv[1], fsync=False)},
        policies={"small": StoragePolicy("small", "store", max_size=1 << 20), "any": StoragePolicy("any", "store")},
    )
    async def put(storage_key, stream):
        ref = await manager.put_stream(storage_key=storage_key, model_name="m", entity_id="1", field_name="f", stream=stream)
        await manager.delete(ref)
    async def source(size, chunk):
        for _ in range(size // chunk):
            await asyncio.sleep(0)
            yield b"x" * chunk
    await put("any", source(4 << 20, 1 << 16))
    %s

asyncio.run(main())
"""


class TestMemory:
    @pytest.mark.case("STR-05")
    def test_one_enormous_chunk(self, tmp_path: Path) -> None:
        program = """
    chunk = memoryview(bytes(192 << 20))
    before = peak()
    for kind in ([chunk],):
        try:
            await put("small", kind)
        except ContentTooLargeError as error:
            assert error.max_size == 1 << 20
        else:
            raise AssertionError("it was taken")
    refused = peak() - before
    await put("any", [chunk])
    print(refused >> 20, peak() - before >> 20)
"""
        refused, taken = map(int, in_new_process(MEMORY % program, tmp_path).split())
        assert refused < 8
        assert taken < 48

    @pytest.mark.case("LIM-06")
    def test_hundreds_of_uploads_at_a_time(self, tmp_path: Path) -> None:
        """Each holds half of its bytes at most, beside what the threads take."""
        count = repetitions("GRANITE_UPLOADS", default=300, exhaustive=1000)
        program = f"""
    before = peak()
    await asyncio.gather(*(put("any", source(1 << 18, 1 << 14)) for _ in range({count})))
    print(peak() - before >> 20)
"""
        assert int(in_new_process(MEMORY % program, tmp_path)) < 64 + 0.286 * count


async def test_a_wrong_checksum_declaration_is_refused_before_a_byte_is_read(manager: StorageManager) -> None:
    source = io.BytesIO(b"x")
    with pytest.raises(InvalidReferenceError, match="checksum"):
        await manager.put_stream(**SLOT, stream=source, checksum="md5:0cc175b9c0f1b6a831c399e269772661")
    assert source.tell() == 0


async def test_a_limited_stream_is_a_stream() -> None:
    assert await gathered(SizeLimitedStream(chunks_of(b"ab", memoryview(b"cd")), 4)) == b"abcd"
