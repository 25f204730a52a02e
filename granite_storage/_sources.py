"""What a program streams from: one adapter for every kind of source, and nothing else in the library asks what one is."""

from __future__ import annotations

import asyncio
import errno
import inspect
import io
import logging
import os
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator, Mapping, Set
from contextlib import aclosing, asynccontextmanager
from contextvars import copy_context
from typing import Any, Protocol, TypeAlias, TypeGuard

from granite_storage._tasks import finish
from granite_storage._threads import ThreadPool
from granite_storage.exceptions import ConsumedSourceError, EmptyUploadError, SizeMismatchError

__all__ = [
    "CHUNK_SIZE",
    "ByteSource",
    "BytesLike",
    "SupportsAsyncRead",
    "SupportsRead",
    "WholeFile",
    "is_file",
    "is_local",
    "is_seekable",
    "iter_chunks",
    "size_mismatch",
    "upload_size",
]

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

_ONLY_WRITTEN = re.compile(r"[wax][bt]?|[bt][wax]")
_FILE_TURN_SECONDS = 0.01
_PATIENCE = 5.0

_threads = ThreadPool("granite-source", 32, max_stuck=480)


def iter_chunks(source: ByteSource) -> AsyncGenerator[BytesLike, None]:
    """Turn whatever the caller streams from into an async iterator of bytes-like chunks, some of which may be empty.

    A synchronous one is read in a thread. The caller's object is never closed; an iterator made here from it is, exactly once.
    An upload, which is a file object with a `filename`, is read from its beginning; any other file from its current position.

    Args:
        source: A binary file object, an object with an async `read`, an async iterable or an iterable of bytes-like chunks,
            or bytes. A chunk may be a buffer that the producer uses again once the next chunk is asked for.

    Raises:
        TypeError: It is none of these, a text stream, a file that is only written, or a set or mapping, whose order says nothing;
            raised later when it yields something other than bytes.
    """
    if isinstance(source, bytes | bytearray):
        return _only(source)
    if isinstance(source, str | io.TextIOBase):
        raise TypeError(f"a stream must be binary, but {type(source).__name__} is text; open the file with mode 'rb'")
    if is_file(source):
        _require_readable(source)
        return WholeFile(source).chunks() if hasattr(source, "filename") else _read(source)
    if isinstance(source, AsyncIterable):
        return _iterate_async(source)
    if _is_buffer(source):
        return _only(memoryview(source))
    if isinstance(source, Set | Mapping):
        raise TypeError(f"a stream has an order, but {type(source).__name__} has none: give a list of its chunks")
    if isinstance(source, Iterable):
        return _iterate_in_thread(source)
    raise TypeError(f"a stream must have read() or be an iterable of bytes, but is {type(source).__name__}")


def _require_readable(file: Any) -> None:
    """Refuse what has a `read` that cannot give a stream, before anything is read."""
    kind = type(file).__name__
    if _is_only_written(file):
        raise TypeError(f"a stream is read, but {kind} is open for writing and cannot be read: open the file with mode 'rb'")
    if not _takes_size(file.read):
        raise TypeError(
            f"a stream is read in pieces, but read() of {kind} takes no size: give what yields its bytes, such as"
            " response.aiter_bytes() of httpx or response.content of aiohttp"
        )


def _is_only_written(file: Any) -> bool:
    if isinstance(file, io.IOBase) and not file.closed:
        # One that says nothing of itself is neither readable nor writable.
        return file.writable() and not file.readable()
    mode = getattr(file, "mode", None)
    return isinstance(mode, str) and _ONLY_WRITTEN.fullmatch(mode) is not None


def _takes_size(read: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(read)
    except (TypeError, ValueError):  # not everything that is written in C has one
        return True
    try:
        signature.bind(CHUNK_SIZE)
    except TypeError:
        return False
    return True


async def _only(content: BytesLike) -> AsyncGenerator[BytesLike, None]:
    yield _bytes_like(content)


class WholeFile:
    """All of a file object, from its beginning, however much of it was read before.

    A file that cannot seek is read once, from its current position; where it has a `size`, it must yield that many bytes.
    Several iterations over one file take turns, so that none moves the position of another.

    Args:
        file: The file object; never closed.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._begun = False
        self.can_rewind: bool = is_seekable(file)

    def __aiter__(self) -> AsyncGenerator[BytesLike, None]:
        return self.chunks()

    async def chunks(self) -> AsyncGenerator[BytesLike, None]:
        """Yield the content.

        Raises:
            ConsumedSourceError: The file was closed, or it was read before and cannot seek.
            EmptyUploadError: It is a file input that was left empty: an upload with neither a name nor a byte.
            SizeMismatchError: It cannot seek, and does not yield as many bytes as its `size` says.
        """
        async with _turn_at(self._file):
            size = await self._rewind()
            count = 0
            async with aclosing(_read(self._file)) as chunks:
                async for chunk in chunks:
                    count += len(chunk)
                    if size is not None and count > size:
                        raise size_mismatch(size, None)
                    yield chunk
                    del chunk
            if size is not None and count != size:
                raise size_mismatch(size, count)
            if not count and not getattr(self._file, "filename", True):
                raise EmptyUploadError("no file was chosen: the upload has neither a name nor content")

    async def _rewind(self) -> int | None:
        """Go to the beginning; return the size to check where that is impossible and it is known."""
        self.can_rewind = self.can_rewind and await _sought(self._file)
        if self.can_rewind:
            return None
        if self._begun:
            raise ConsumedSourceError(f"the stream was read already, and {type(self._file).__name__} cannot seek")
        self._begun = True
        return _declared_size(self._file)


def is_file(source: object) -> bool:
    """Tell whether something has a `read` method."""
    return callable(getattr(source, "read", None))


def is_seekable(file: object) -> bool:
    """Tell whether something has a `seek` method; whether that works is known when it is called."""
    return callable(getattr(file, "seek", None))


def is_local(source: object) -> bool:
    """Tell whether a source has its first bytes at hand: nobody far away sends them."""
    return is_seekable(source) or isinstance(source, list | tuple | WholeFile) or _is_buffer(source)


def size_mismatch(expected: int, actual: int | None) -> SizeMismatchError:
    """Return the error of content that has not its declared size; `actual` is None where it has more."""
    found = "more" if actual is None else str(actual)
    return SizeMismatchError(
        f"the content was declared to have {expected} bytes, but has {found}", expected=expected, actual=actual
    )


def upload_size(upload: object) -> int | None:
    """Return the size of an upload as far as it is known without reading: its `size`, or where its file ends."""
    declared = _declared_size(upload)
    if declared is not None:
        return declared
    file: Any = getattr(upload, "file", upload)
    seek, tell = getattr(file, "seek", None), getattr(file, "tell", None)
    if not callable(seek) or not callable(tell) or inspect.iscoroutinefunction(seek) or inspect.iscoroutinefunction(tell):
        return None
    try:
        position = tell()
        end: Any = seek(0, os.SEEK_END) or tell()
        seek(position)
    except (OSError, ValueError):
        return None
    return int(end)


def _declared_size(file: object) -> int | None:
    size = getattr(file, "size", None)
    return size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None


async def _sought(file: Any) -> bool:
    """Move a file to its beginning; return whether it can seek.

    Raises:
        ConsumedSourceError: It could, but was closed.
    """
    try:
        await _call(file.seek, 0)
    except (io.UnsupportedOperation, NotImplementedError):
        return False
    except OSError as error:
        if error.errno == errno.ESPIPE:
            return False
        raise
    except ValueError as error:
        raise ConsumedSourceError(f"the file cannot be read from its beginning any more: {error}") from error
    return True


async def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a method of a file: await it, or run it in a thread."""
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    result = await _threads.run(copy_context().run, function, *args, patience=_PATIENCE)
    return await result if inspect.isawaitable(result) else result


_turns: dict[tuple[int, int], _Turns] = {}


class _Turns:
    """Those who read one file on one event loop."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.count = 0


@asynccontextmanager
async def _turn_at(file: object) -> AsyncGenerator[None, None]:
    """Wait until no other iteration reads a file; an upload and the file inside it are the same."""
    innermost = file
    for name in ("file", "stream"):
        innermost = getattr(innermost, name, innermost)
    key = id(asyncio.get_running_loop()), id(innermost)
    turns = _turns.setdefault(key, _Turns())
    turns.count += 1
    try:
        async with turns.lock:
            yield
    finally:
        turns.count -= 1
        if not turns.count:
            _turns.pop(key, None)


def _read(file: Any) -> AsyncGenerator[BytesLike, None]:
    """Read a file from its current position."""
    return _read_async(file.read) if inspect.iscoroutinefunction(file.read) else _read_in_thread(file.read)


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
    turn_ends = time.monotonic() + _FILE_TURN_SECONDS
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
