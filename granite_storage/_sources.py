"""What a program streams from: one adapter for every kind of source, and nothing else in the library asks what one is."""

from __future__ import annotations

import inspect
import io
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator
from contextvars import copy_context
from typing import Any, Protocol, TypeAlias, TypeGuard

from granite_storage._concurrency import finish
from granite_storage._threads import ThreadPool

__all__ = ["CHUNK_SIZE", "ByteSource", "BytesLike", "iter_chunks"]

logger: logging.Logger = logging.getLogger("granite_storage")

CHUNK_SIZE = 1 << 20
"""What is asked of a source at a time, and the longest piece that a backend is handed, in bytes."""

BytesLike: TypeAlias = bytes | bytearray | memoryview


class SupportsRead(Protocol):
    """A binary file object."""

    def read(self, size: int, /) -> BytesLike: ...


class SupportsAsyncRead(Protocol):
    """An object with an async `read`: an aiofiles handle, a Starlette `UploadFile`, an aiohttp body."""

    def read(self, size: int, /) -> Awaitable[BytesLike]: ...


ByteSource: TypeAlias = SupportsRead | SupportsAsyncRead | AsyncIterable[BytesLike] | Iterable[BytesLike] | BytesLike
"""Anything that bytes can be streamed from."""

_TURN_SECONDS = 0.01
_PATIENCE = 5.0

_threads = ThreadPool("granite-source", 32)


def iter_chunks(source: ByteSource) -> AsyncGenerator[BytesLike, None]:
    """Turn whatever the caller streams from into an async iterator of bytes-like chunks, some of which may be empty.

    A synchronous one is read in a thread. The caller's object is never closed; an
    iterator made here from it is, exactly once.

    Args:
        source: A binary file object, an object with an async `read`, an async iterable or an iterable of bytes-like chunks,
            or bytes. A chunk may be a buffer that the producer uses again once the next chunk is asked for.

    Raises:
        TypeError: It is none of these, or a text stream; raised later when it yields something other than bytes.
    """
    if isinstance(source, bytes | bytearray):
        return _only(source)
    if isinstance(source, str | io.TextIOBase):
        raise TypeError(f"a stream must be binary, but {type(source).__name__} is text; open the file with mode 'rb'")
    read = getattr(source, "read", None)
    if callable(read):
        return _read_async(read) if inspect.iscoroutinefunction(read) else _read_in_thread(read)
    if isinstance(source, AsyncIterable):
        return _iterate_async(source)
    if _is_buffer(source):
        return _only(memoryview(source))
    if isinstance(source, Iterable):
        return _iterate_in_thread(source)
    raise TypeError(f"a stream must have read() or be an iterable of bytes, but is {type(source).__name__}")


async def _only(content: BytesLike) -> AsyncGenerator[BytesLike, None]:
    yield _bytes_like(content)


async def _read_async(read: Callable[[int], Awaitable[Any]]) -> AsyncGenerator[BytesLike, None]:
    while chunk := _bytes_like(await read(CHUNK_SIZE)):
        yield chunk


async def _read_in_thread(read: Callable[[int], Any]) -> AsyncGenerator[BytesLike, None]:
    in_context: Callable[..., Any] = copy_context().run
    while True:
        chunk = await _threads.run(in_context, read, CHUNK_SIZE, patience=_PATIENCE)
        if inspect.isawaitable(chunk):
            chunk = await chunk
        chunk = _bytes_like(chunk)
        if not chunk:
            return
        yield chunk
        del chunk


async def _iterate_async(source: AsyncIterable[Any]) -> AsyncGenerator[BytesLike, None]:
    iterator = aiter(source)
    try:
        async for chunk in iterator:
            yield _bytes_like(chunk)
            del chunk
    finally:
        aclose = getattr(iterator, "aclose", None)
        if aclose is not None and iterator is not source:
            await _close(aclose())


async def _close(closing: Awaitable[object]) -> None:
    """Close an iterator in the task that iterated it; a failure does not hide the error that ended the iteration."""
    try:
        await closing
    except Exception:
        logger.exception("closing the iterator of a stream failed")


async def _iterate_in_thread(source: Iterable[Any]) -> AsyncGenerator[BytesLike, None]:
    def close(iterator: Any) -> None:
        if iterator is not source and hasattr(iterator, "close"):
            iterator.close()

    in_context: Callable[..., Any] = copy_context().run
    iterator = await _threads.run(in_context, iter, source, undo=close, patience=_PATIENCE)
    try:
        while True:
            batch: _Batch = await _threads.run(in_context, _take, iterator, patience=_PATIENCE)
            while batch.chunks:
                yield batch.chunks.popleft()
            if batch.error is not None:
                raise batch.error
            if batch.exhausted:
                return
    finally:
        if iterator is not source and hasattr(iterator, "close"):
            await finish(_threads.run(close, iterator), "closing the iterator of a stream", timeout=_PATIENCE)


class _Batch:
    """What one visit to a thread took from an iterator: the chunks first, then the error that ended it."""

    def __init__(self) -> None:
        self.chunks: deque[BytesLike] = deque()
        self.exhausted = False
        self.error: BaseException | None = None


def _take(iterator: Iterator[Any]) -> _Batch:
    """Take chunks for a moment; one in a buffer that may be used again is copied, or ends the batch where it is large."""
    batch = _Batch()
    held = 0
    turn_ends = time.monotonic() + _TURN_SECONDS
    try:
        while held < CHUNK_SIZE and time.monotonic() < turn_ends:
            chunk = _bytes_like(next(iterator))
            held += len(chunk)
            batch.chunks.append(chunk if len(chunk) >= CHUNK_SIZE else bytes(chunk))
    except StopIteration:
        batch.exhausted = True
    except Exception as error:  # noqa: BLE001  # it is raised again after the chunks that came before it
        batch.error = error
    return batch


def _bytes_like(chunk: Any) -> BytesLike:
    """Return a chunk whose length counts bytes, or say what it is instead."""
    if isinstance(chunk, bytes | bytearray):
        return chunk
    try:
        view = memoryview(chunk)
    except TypeError:
        raise TypeError(f"a stream must yield bytes, but yielded {type(chunk).__name__}") from None
    if view.nbytes == 0:
        return b""
    if view.format == "B" and view.ndim == 1 and view.contiguous:
        return view
    return view.cast("B") if view.c_contiguous else view.tobytes()


def _is_buffer(source: Any) -> TypeGuard[memoryview]:
    try:
        memoryview(source)
    except TypeError:
        return False
    return True
