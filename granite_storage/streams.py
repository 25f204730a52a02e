"""Incoming bytes: limited, counted and hashed once.

The stages of a write, each an async iterator over the one before it:

    iter_chunks          any source, as bytes-like chunks
    SizeLimitedStream    the limit, chunk by chunk, before anything is copied
    MeasuredStream       pieces of about 1 MiB, counted, hashed in a thread, checked against what was declared

A backend iterates the last stage, so nothing runs ahead of it by more than a few pieces.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import inspect
import io
import logging
import os
import re
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, aclosing, closing, contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeGuard

from granite_storage._portal import portal
from granite_storage._tasks import shielded_cleanup
from granite_storage._threads import ThreadConsumer, ThreadPool
from granite_storage.exceptions import (
    ChecksumMismatchError,
    ConsumedSourceError,
    ContentTooLargeError,
    EmptyUploadError,
    SizeMismatchError,
    StreamTimeoutError,
)
from granite_storage.refs import canonical_checksum

__all__ = [
    "CHUNK_SIZE",
    "INLINE_HASH",
    "ByteSource",
    "BytesLike",
    "ManagedStream",
    "MeasuredStream",
    "Pace",
    "PacedStream",
    "ReadOnce",
    "Sha256",
    "SizeLimitedStream",
    "SupportsAsyncRead",
    "SupportsRead",
    "Turn",
    "WholeFile",
    "expected_size",
    "fingerprint",
    "is_file",
    "is_form_upload",
    "is_local",
    "is_seekable",
    "is_upload",
    "iter_chunks",
    "joined",
    "regroup",
    "size_mismatch",
    "upload_size",
    "whole",
]

logger: logging.Logger = logging.getLogger("granite_storage")

CHUNK_SIZE = 1 << 20
"""The size of a read from a source, and the longest piece that a backend receives, in bytes."""

INLINE_HASH = 8 * 1024
"""Up to this size content is hashed on the event loop, in bytes: a thread would take longer."""

BytesLike: TypeAlias = bytes | bytearray | memoryview


class SupportsRead(Protocol):
    """A binary file object."""

    def read(self, size: int, /) -> BytesLike:
        """Return at most `size` bytes, none at the end."""
        ...


class SupportsAsyncRead(Protocol):
    """An object with an async `read`: an aiofiles handle, a Starlette `UploadFile`, an aiohttp body."""

    def read(self, size: int, /) -> Awaitable[BytesLike]:
        """Return at most `size` bytes, none at the end."""
        ...


ByteSource: TypeAlias = SupportsRead | SupportsAsyncRead | AsyncIterable[BytesLike] | Iterable[BytesLike] | BytesLike
"""Anything that bytes can be streamed from."""

_ONLY_WRITTEN = re.compile(r"[wax][bt]?|[bt][wax]")
_MOST_WRAPPERS = 4
_FILE_TURN_SECONDS = 0.01
_MOST_KEPT = 100
_CANCEL_TIMEOUT = 5.0

_HELD_LOCK = 2047
_SHORT = 128 * 1024
_MAX_PENDING = 8 * CHUNK_SIZE
_LARGE_ENOUGH = CHUNK_SIZE // 16
_MAX_GROUPED = 1024
_MAX_BUFFERED = 64 * CHUNK_SIZE
_TURN_SECONDS = 0.002
_RATE_COUNTS_FROM = 10.0

_hash_threads = ThreadPool("granite-hash", (os.cpu_count() or 1) + 2)
_threads = ThreadPool("granite-source", 32, max_stuck=480)


# What is being read, and what was begun: a source that yields its bytes once must not be dealt out between two objects.


Claim: TypeAlias = Callable[[object], AbstractContextManager[object]]
"""Wraps the reading of a source."""


class _Readings:
    """Remembers sources by their identity: not every one has a hash, and equal ones are not the same.

    What was begun is remembered by a weak reference. A source that cannot have one is kept, for as long as anything else refers
    to it as well: another object could be at its address afterwards.
    """

    def __init__(self) -> None:
        self._current: dict[int, tuple[object, object]] = {}
        self._begun: dict[int, weakref.ref[Any]] = {}
        self._kept: dict[int, object] = {}

    @contextmanager
    def claim(self, source: object) -> Iterator[bool]:
        """Read a source; yield whether it was begun before.

        Raises:
            ConsumedSourceError: It is being read for another object.
        """
        key, mine = id(source), object()
        if self._current.setdefault(key, (mine, source))[0] is not mine:
            raise ConsumedSourceError(
                f"the stream is being read for another object, and one {type(source).__name__} cannot be read for two at a time:"
                " pass each a stream of its own, or bytes"
            )
        try:
            was_begun = self._was_begun(source)
            if not was_begun:
                self._remember(key, source)
            yield was_begun
        finally:
            self._current.pop(key, None)  # a fork has forgotten it

    def _remember(self, key: int, source: object) -> None:
        if _is_weakly_referable(source):
            self._begun[key] = weakref.ref(source, lambda _: self._begun.pop(key, None))
            return
        for kept, count in _references(self._kept).items():
            if count <= _OWN_REFERENCES:
                self._kept.pop(kept, None)
        for oldest in list(self._kept)[: max(0, len(self._kept) - _MOST_KEPT + 1)]:
            self._kept.pop(oldest, None)
        self._kept[key] = source

    def _was_begun(self, source: object) -> bool:
        reference = self._begun.get(id(source))
        return source is (self._kept.get(id(source)) if reference is None else reference())

    def forget_current(self) -> None:
        """Start over: a fork has none of the uploads of its parent."""
        self._current.clear()


def _references(sources: Mapping[int, object]) -> dict[int, int]:
    return {key: sys.getrefcount(source) for key, source in list(sources.items())}


_OWN_REFERENCES = _references({0: object()})[0]
"""What `_references` counts where nothing else refers to a source."""

_readings = _Readings()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_readings.forget_current)


def _is_weakly_referable(value: object) -> bool:
    """Return whether something can have a weak reference, as generators and files can and the iterator of a list cannot."""
    return type(value).__weakrefoffset__ != 0


def _claimed(source: object) -> AbstractContextManager[object]:
    return _readings.claim(_read_on_of(source))


def _read_on_of(source: object) -> object:
    """Return the stream inside the `SizeLimitedStream`s that pass it on, which a second limit would read on."""
    while isinstance(source, SizeLimitedStream) and source._passes_on is not None:
        source = source._passes_on
    return source


# Sources: no other module of the library looks at their types.


def iter_chunks(source: ByteSource, *, claim: Claim = nullcontext) -> AsyncGenerator[BytesLike, None]:
    """Return an async iterator of bytes-like chunks over any source of the caller; some chunks may be empty.

    A synchronous one is read in a thread. The caller's object is never closed; an iterator made here from it is, exactly once.
    An upload, which is a file object with a `filename`, is read from its beginning; any other file from its current position.

    Args:
        source: A binary file object, an object with an async `read`, an async iterable or an iterable of bytes-like chunks,
            or bytes. A chunk may be a buffer that the producer uses again once the next chunk is asked for.
        claim: Wraps the reading of a file or an iterator, from its first chunk to its end.

    Raises:
        TypeError: It is none of these, a text stream, a file that is only written, or a set or mapping, whose order says nothing;
            raised later when it yields something other than bytes.
    """
    if isinstance(source, bytes | bytearray):
        return _only(source)
    if isinstance(source, str | io.TextIOBase):
        raise TypeError(f"a stream must be binary, but {type(source).__name__} is text: open the file with mode 'rb'")
    if isinstance(source, WholeFile | ReadOnce):
        return source.chunks()
    if is_file(source):
        _require_readable(source)
        return WholeFile(source).chunks() if is_upload(source) else _read(source, claim)
    if isinstance(source, AsyncIterable):
        return _iterate_async(source, claim)
    if _is_buffer(source):
        return _only(memoryview(source))
    if isinstance(source, Set | Mapping):
        raise TypeError(f"the chunks of a stream must have an order, but those of {type(source).__name__} have none: pass a list")
    if isinstance(source, Iterable):
        return _iterate_in_thread(source, claim)
    if isinstance(source, os.PathLike):
        raise TypeError(f"{type(source).__name__} is not a stream, but only names a file: pass the file, open(path, 'rb')")
    raise TypeError(f"a stream must have read() or be an iterable of bytes, but is {type(source).__name__}")


def _require_readable(file: Any) -> None:
    """Raise `TypeError` for an object whose `read` cannot give a stream, before anything is read."""
    kind = type(file).__name__
    if _is_only_written(file):
        raise TypeError(f"a stream must be readable, but {kind} is open for writing only: open the file with mode 'rb'")
    if not _takes_size(file.read):
        raise TypeError(
            f"a stream is read in chunks, but read() of {kind} takes no size: pass what yields its bytes, such as"
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
        self.held: object = _innermost(file) if is_upload(file) else file
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
            with _readings.claim(self.held) as was_begun:
                size = await self._rewind(was_begun)
                count = 0
                async with aclosing(_read(self._readable)) as chunks:
                    async for chunk in chunks:
                        count += len(chunk)
                        if size is not None and count > size:
                            raise size_mismatch(size, None)
                        yield chunk
                        del chunk
                if size is not None and count != size:
                    raise size_mismatch(size, count)
                if not count and is_form_upload(self._file) and not self._file.filename:
                    raise EmptyUploadError("no file was chosen: the upload has neither a name nor content")

    @property
    def _readable(self) -> Any:
        return _synchronous_file(self._file) if portal.is_here else self._file

    async def _rewind(self, was_begun: bool) -> int | None:
        """Go to the beginning; return the size to check where that is impossible and it is known."""
        self.can_rewind = self.can_rewind and await _seek_start(self._readable)
        if self.can_rewind:
            return None
        if was_begun:
            raise ConsumedSourceError(f"the stream was already read, and {type(self._file).__name__} cannot seek: pass a new one")
        return _declared_size(self._file)


class ReadOnce:
    """A source other than a file, for one object: the first reader gets its content, every other one an error.

    Args:
        source: The source; never closed.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self.held: object = _read_on_of(source)
        self.is_local: bool = is_local(source)

    def __aiter__(self) -> AsyncGenerator[BytesLike, None]:
        return self.chunks()

    def chunks(self) -> AsyncGenerator[BytesLike, None]:
        """Yield the content.

        Raises:
            ConsumedSourceError: It was read already, or is being read.
        """
        return iter_chunks(self._source, claim=self._claim)

    @contextmanager
    def _claim(self, iterator: object) -> Iterator[None]:
        source = _read_on_of(iterator)
        with _readings.claim(source) as was_begun:
            if was_begun:
                raise ConsumedSourceError(
                    f"the stream was already read, and a {type(source).__name__} can be read only once: pass a new one, or bytes"
                )
            yield


def whole(source: Any) -> WholeFile | ReadOnce:
    """Return a source as one object needs it: a whole file, or a stream that can be read only once."""
    return WholeFile(source) if is_file(source) else ReadOnce(source)


def require_synchronous(source: Any) -> None:
    """Raise `TypeError` for a source that only an event loop can read, because the caller's loop, if any, waits meanwhile.

    An upload with an async `read`, such as Starlette's, is read through its `file`.

    Raises:
        TypeError: It is one.
    """
    source = _unwrapped(source)
    is_async = _is_async_file(source) if is_file(source) else isinstance(source, AsyncIterable)
    if is_async and _synchronous_file(source) is source:
        raise TypeError(
            f"{type(source).__name__} is an asynchronous stream, which belongs to an event loop: synchronous code stores bytes,"
            " a file, an iterable of bytes, or an upload that has a file of its own; read it first, or store it from async code"
        )


def _unwrapped(source: Any) -> Any:
    """Return the caller's own source, without the wrappers of this module."""
    while isinstance(source, SizeLimitedStream | WholeFile | ReadOnce):
        source = source._file if isinstance(source, WholeFile) else source._source
    return source


def _synchronous_file(file: Any) -> Any:
    """Return the file inside an upload whose own `read` is async."""
    inner = getattr(file, "file", None)
    return inner if _is_async_file(file) and is_file(inner) and not _is_async_file(inner) else file


def _is_async_file(file: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(file, "read", None))


def is_file(source: object) -> bool:
    """Return whether something has a `read` method."""
    return callable(getattr(source, "read", None))


def is_seekable(file: object) -> bool:
    """Return whether something has a `seek` method; whether that works is known when it is called."""
    return callable(getattr(file, "seek", None))


def is_upload(source: object) -> bool:
    """Return whether a source has a file name of a client; a `gzip.GzipFile` has a `filename` of this machine."""
    return is_form_upload(source) or (not isinstance(source, io.IOBase) and hasattr(source, "filename"))


def is_form_upload(source: object) -> bool:
    """Return whether a source is a web framework's upload of a form: it has a `filename` and a `content_type`."""
    return hasattr(source, "content_type") and hasattr(source, "filename")


def is_local(source: object) -> bool:
    """Return whether the first bytes of a source are here already, and not still to be sent by a client."""
    if isinstance(source, ReadOnce):
        return source.is_local
    return is_seekable(source) or isinstance(source, list | tuple | WholeFile) or _is_buffer(source)


def size_mismatch(expected: int, actual: int | None) -> SizeMismatchError:
    """Return the error for content that does not have its declared size; `actual` is None if it has more."""
    found = "more" if actual is None else str(actual)
    return SizeMismatchError(
        f"the content was declared to have {expected} bytes, but has {found}", expected=expected, actual=actual
    )


def upload_size(upload: object) -> int | None:
    """Return the size of an upload as far as it is known without reading: its `size`, or where its file ends.

    Only files that come back from their end are asked for it: one that decompresses a pipe reads all on the way, and cannot.
    """
    declared = _declared_size(upload)
    if declared is not None:
        return declared
    file: Any = _innermost(upload)
    if isinstance(file, tempfile.SpooledTemporaryFile):
        file = file._file
    try:
        if not isinstance(getattr(file, "raw", file), io.BytesIO | io.FileIO):
            return None
        position = file.tell()
        end = file.seek(0, os.SEEK_END)
        file.seek(position)
    except (OSError, ValueError):
        return None
    return int(end)


def expected_size(source: Any) -> int | None:
    """Return the size that a source declares before it is read, as uploads and bodies do; None if unknown."""
    source = _unwrapped(source)
    return size_of(source) if isinstance(source, bytes | bytearray | memoryview) else _declared_size(source)


def _declared_size(file: object) -> int | None:
    size = getattr(file, "size", None)
    return size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None


async def _seek_start(file: Any) -> bool:
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
        raise ConsumedSourceError(f"the file cannot be read from its beginning again: {error}") from error
    return True


async def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a method of a file: await it, or run it in a thread."""
    if inspect.iscoroutinefunction(function):
        return await function(*args)
    result = await _threads.run(copy_context().run, function, *args, cancel_timeout=_CANCEL_TIMEOUT)
    return await result if inspect.isawaitable(result) else result


_turns: weakref.WeakValueDictionary[tuple[int, int], asyncio.Lock] = weakref.WeakValueDictionary()


def _turn_at(file: object) -> asyncio.Lock:
    """Return the lock for reading a file on this event loop; an upload and the file inside it share one."""
    return _turns.setdefault((id(asyncio.get_running_loop()), id(_innermost(file))), asyncio.Lock())


def _innermost(file: object) -> object:
    """Return the file inside an upload or a temporary file, which has the position of both."""
    for _ in range(_MOST_WRAPPERS):
        inner = next((inner for name in ("file", "stream") if is_file(inner := getattr(file, name, None))), None)
        if inner is None:
            break
        file = inner
    return file


async def _read(file: Any, claim: Claim = nullcontext) -> AsyncGenerator[BytesLike, None]:
    """Read a file from its current position.

    Raises:
        ConsumedSourceError: It is closed, perhaps only since the last chunk.
    """
    with claim(file):
        while True:
            with _found_closed(file):
                chunk = _bytes_like(await _call(file.read, CHUNK_SIZE))
            if not chunk:
                return
            yield chunk
            del chunk


@contextmanager
def _found_closed(file: Any) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if getattr(file, "closed", False) is True:
            raise ConsumedSourceError(f"the file was closed before all of it was read: {error}") from error
        raise


async def _iterate_async(source: AsyncIterable[Any], claim: Claim) -> AsyncGenerator[BytesLike, None]:
    iterator = aiter(source)
    try:
        with claim(iterator):
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


async def _iterate_in_thread(source: Iterable[Any], claim: Claim) -> AsyncGenerator[BytesLike, None]:
    def close(iterator: Any) -> None:
        if iterator is not source and hasattr(iterator, "close"):
            iterator.close()

    in_context: Callable[..., Any] = copy_context().run
    iterator = await _threads.run(in_context, iter, source, undo=close, cancel_timeout=_CANCEL_TIMEOUT)
    try:
        with claim(iterator):
            while True:
                chunks, end = await _threads.run(in_context, _take, iterator, cancel_timeout=_CANCEL_TIMEOUT)
                while chunks:
                    yield chunks.popleft()
                if isinstance(end, StopIteration):
                    return
                if end is not None:
                    raise end
    finally:
        if iterator is not source and hasattr(iterator, "close"):
            await shielded_cleanup(_threads.run(close, iterator), "closing the iterator of a stream", timeout=_CANCEL_TIMEOUT)


def _take(iterator: Iterator[Any]) -> tuple[deque[BytesLike], Exception | None]:
    """Take chunks for a moment, and return them with what ended the iterator after them, if it has ended.

    A small chunk is copied, because the iterator may use its buffer again; a large one is not, and ends the visit instead.
    """
    chunks: deque[BytesLike] = deque()
    buffered = 0
    turn_ends = time.monotonic() + _FILE_TURN_SECONDS
    try:
        while buffered < CHUNK_SIZE and time.monotonic() < turn_ends:
            chunk = _bytes_like(next(iterator))
            buffered += len(chunk)
            chunks.append(chunk if len(chunk) >= CHUNK_SIZE else bytes(chunk))
    except Exception as error:  # noqa: BLE001  # it is raised again after the chunks that came before it
        return chunks, error
    return chunks, None


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


# The stages of a write.


class SizeLimitedStream:
    """An async iterator over a stream that raises an error at the first byte over a limit.

    Each chunk is counted before it is passed on, so no byte over the limit ever reaches a backend, and memory holds one chunk.

    Args:
        stream: Any source that `StorageManager.put_stream` takes; the caller closes it.
        max_size: The most bytes it may yield; None for no limit.

    Attributes:
        max_size: The limit, in bytes.
        bytes_read: The bytes that have passed so far.

    Raises:
        ContentTooLargeError: From iteration, in place of the chunk that goes over the limit.

    Example:
        >>> import asyncio
        >>> async def total(stream):
        ...     return sum([len(chunk) async for chunk in stream])
        >>> asyncio.run(total(SizeLimitedStream([b"ab", b"c"], max_size=3)))
        3
    """

    _is_claimed: ClassVar[bool] = False

    def __init__(self, stream: ByteSource, max_size: int | None) -> None:
        self.max_size = max_size
        self.bytes_read: int = 0
        self._source = stream
        self._chunks = iter_chunks(stream, claim=_claimed if self._is_claimed else nullcontext)
        self.is_local: bool = is_local(stream)
        self._passes_on: object = stream if _is_read_on(stream) else None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BytesLike:
        chunk = await self._chunks.__anext__()
        self.bytes_read += len(chunk)
        require_size(self.bytes_read, self.max_size)
        return chunk

    async def aclose(self) -> None:
        """End the iteration early; the caller's stream stays open."""
        await self._chunks.aclose()


class ManagedStream(SizeLimitedStream):
    """The stream that a manager stores: limited, and not stored by another call at the same time."""

    _is_claimed = True


def _is_read_on(stream: object) -> bool:
    """Return whether each reading of a stream goes on where the one before it ended."""
    return not is_upload(stream) if is_file(stream) else isinstance(stream, Iterator | AsyncIterator)


def require_size(size: int, max_size: int | None) -> None:
    """Raise `ContentTooLargeError` where a number of bytes is over a limit."""
    if max_size is not None and size > max_size:
        raise ContentTooLargeError(f"the content is larger than {max_size} bytes", max_size=max_size)


def require_declared_size(size: object) -> None:
    """Raise `ValueError` unless a declared size is a number of bytes."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"size must be a number of bytes, not {size!r}")


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a stream must be.

    Attributes:
        idle_timeout: The longest time without a chunk, in seconds; None for no limit.
        min_rate: The fewest bytes per second that it must yield, on average, of the time that is spent waiting for it; None for
            any number. It counts from the tenth second on.
    """

    idle_timeout: float | None = None
    min_rate: int | None = None


class PacedStream:
    """A stream that must keep a pace once its first chunk is there.

    Args:
        chunks: The stream; closed by `aclose`.
        pace: The pace.

    Raises:
        StreamTimeoutError: From iteration, when it is too slow.
    """

    def __init__(self, chunks: SizeLimitedStream, pace: Pace) -> None:
        self._chunks = chunks
        self._pace = pace
        self._first: BytesLike | None = None
        self._waited = 0.0
        self._size = 0

    async def begin(self) -> None:
        """Wait for the first chunk, as long as it takes, unless the stream is read from a file."""
        if not self._chunks.is_local:
            self._first = await anext(self._chunks, b"")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BytesLike:
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = await self._next()
        self._size += len(chunk)
        return chunk

    async def aclose(self) -> None:
        """End the iteration early."""
        await self._chunks.aclose()

    async def _next(self) -> BytesLike:
        begun = time.monotonic()
        timeout, message = self._timeout()
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await anext(self._chunks)
        except TimeoutError:
            if not limit.expired():
                raise
            raise StreamTimeoutError(message) from None
        finally:
            self._waited += time.monotonic() - begun

    def _timeout(self) -> tuple[float | None, str]:
        """Return how long the next chunk may take, and what is wrong when it takes longer."""
        idle, rate = self._pace.idle_timeout, self._pace.min_rate
        if rate is not None:
            left = max(0.0, max(_RATE_COUNTS_FROM, self._size / rate) - self._waited)
            if idle is None or left < idle:
                return left, f"the stream yielded fewer than {rate} bytes per second"
        return idle, f"the stream yielded nothing for {idle} s"


class MeasuredStream:
    """The content of one write: pieces of at most 1 MiB, counted and hashed in passing.

    The checks against what was declared are its last step, before it ends: a backend that publishes only what has ended never
    publishes content that is wrong.

    Args:
        chunks: The chunks; closed by `aclose`.
        size: The size that the caller declared, in bytes, or None.
        checksum: The checksum that the caller declared, or None.

    Attributes:
        size: The bytes that have passed so far.
        declared_size: The size that the caller declared, in bytes, or None.
        checksum: `sha256:<hex>` of the whole, once it has ended; None before.
    """

    def __init__(self, chunks: AsyncIterator[BytesLike], *, size: int | None = None, checksum: str | None = None) -> None:
        self.size: int = 0
        self.checksum: str | None = None
        self.declared_size = size
        self._declared_checksum = None if checksum is None else canonical_checksum(checksum)
        self._chunks = chunks
        self._sha256 = Sha256()
        self._pieces = self._measure()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self._pieces.__anext__()

    async def aclose(self) -> None:
        """Stop hashing and end the iteration, in the task that iterated; idempotent."""
        try:
            await self._pieces.aclose()
            await self._sha256.stop()
        finally:
            aclose = getattr(self._chunks, "aclose", None)
            if aclose is not None:
                await aclose()

    async def _measure(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(regroup(self._chunks)) as pieces:
            async for piece in pieces:
                self.size += len(piece)
                if self.declared_size is not None and self.size > self.declared_size:
                    raise size_mismatch(self.declared_size, None)
                await self._sha256.update(piece)
                yield piece
                del piece
        if self.declared_size is not None and self.size != self.declared_size:
            raise size_mismatch(self.declared_size, self.size)
        checksum = await self._sha256.checksum()
        require_checksum(self._declared_checksum, checksum)
        self.checksum = checksum


class Sha256:
    """A SHA-256 whose large pieces are hashed in a thread, a few pieces behind the one who feeds it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._consumer: ThreadConsumer | None = None

    async def update(self, piece: bytes) -> None:
        """Add bytes; wait while several MiB are still to be hashed."""
        if self._consumer is None:
            if len(piece) <= INLINE_HASH:
                _update_inline(self._hash, piece)
                return
            self._consumer = ThreadConsumer(
                _hash_threads, self._hash.update, max_pending=_MAX_PENDING, consume_several=self._update_several
            )
        await self._consumer.feed(piece)

    def _update_several(self, pieces: list[bytes]) -> None:
        # To wait for the interpreter between short pieces takes longer than to copy them.
        for piece in [b"".join(pieces)] if len(pieces[0]) <= _SHORT else pieces:
            self._hash.update(piece)

    async def checksum(self) -> str:
        """Return `sha256:<hex>` of all bytes added."""
        if self._consumer is not None:
            await self._consumer.drain()
        return f"sha256:{self._hash.hexdigest()}"

    async def stop(self) -> None:
        """Leave no thread at work; what was not hashed is dropped."""
        if self._consumer is not None:
            await self._consumer.stop()


def require_checksum(expected: str | None, actual: str) -> None:
    """Raise `ChecksumMismatchError` where a known checksum is not the actual one; an empty or absent one is unknown."""
    if expected and expected.lower() != actual:
        raise ChecksumMismatchError(f"the content has checksum {actual}, not {expected}", expected=expected, actual=actual)


def size_of(content: BytesLike) -> int:
    """Return how many bytes there are; the length of a memoryview counts its items, whatever their size."""
    return content.nbytes if isinstance(content, memoryview) else len(content)


async def fingerprint(content: BytesLike) -> tuple[bytes, str]:
    """Return content as bytes of its own, with its checksum; off the event loop unless it is small."""
    if size_of(content) <= INLINE_HASH:
        data = bytes(content)
        sha256 = hashlib.sha256()
        _update_inline(sha256, data)
        return data, f"sha256:{sha256.hexdigest()}"
    return await _hash_threads.run(_fingerprint, content)


async def joined(chunks: list[bytes]) -> bytes:
    """Return chunks as one; off the event loop where there is so much that copying it would be felt."""
    return await _hash_threads.run(b"".join, chunks) if sum(map(len, chunks)) > CHUNK_SIZE else b"".join(chunks)


def _update_inline(sha256: hashlib._Hash, data: bytes) -> None:
    """Hash a little on the event loop, in slices for which `hashlib` does not release the interpreter's lock."""
    for start in range(0, len(data), _HELD_LOCK):
        sha256.update(data[start : start + _HELD_LOCK])


def _fingerprint(content: BytesLike) -> tuple[bytes, str]:
    data = bytes(content)
    return data, f"sha256:{hashlib.sha256(data).hexdigest()}"


class Turn:
    """Lets other tasks run, from time to time, in work that never waits.

    Args:
        seconds: How long the work may go on before the others have their turn.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends = time.monotonic() + seconds

    @property
    def is_due(self) -> bool:
        """Whether this task has run for long enough."""
        return time.monotonic() > self._ends

    async def end(self) -> None:
        """Let other tasks run."""
        await asyncio.sleep(0)
        self._ends = time.monotonic() + self._seconds


async def regroup(chunks: AsyncIterator[BytesLike]) -> AsyncGenerator[bytes, None]:
    """Join small chunks and cut large ones, and let other tasks run where the source never waits.

    A thread that hashes or writes needs the interpreter once for each piece, so few large pieces disturb the event loop less. A
    chunk of 64 KiB or more is passed on as it is: to join such ones would cost more than that.
    """
    turn = Turn(_TURN_SECONDS)
    with closing(_Group()) as group:
        async for chunk in chunks:
            size = len(chunk)
            if group.must_go_before(size):
                yield group.joined()
            if size >= _LARGE_ENOUGH:
                for piece in _cut(chunk):
                    yield piece
                    del piece
                    if turn.is_due:
                        await turn.end()
            elif size:
                group.add(bytes(chunk))
            del chunk  # its producer may want to change the size of the buffer, or to free it
            if turn.is_due:
                await turn.end()
        if group.size:
            yield group.joined()


class _Group:
    """Small chunks that will be joined to one piece.

    All groups of the process together hold a bounded number of bytes: where thousands of uploads run, their pieces are smaller.
    """

    _all_sizes = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.size = 0
        self._chunks: list[bytes] = []

    def close(self) -> None:
        self._count(-self.size)

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._count(len(chunk))

    def must_go_before(self, size: int) -> bool:
        """Return whether the group must become a piece before a chunk of this size is taken."""
        return self.size > 0 and (
            self.size + size > CHUNK_SIZE
            or size >= _LARGE_ENOUGH
            or len(self._chunks) >= _MAX_GROUPED
            or _Group._all_sizes > _MAX_BUFFERED
        )

    def joined(self) -> bytes:
        """Return the piece, and begin another."""
        chunks, self._chunks = self._chunks, []
        self._count(-self.size)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _count(self, size: int) -> None:
        self.size += size
        with _Group._lock:
            _Group._all_sizes += size

    @classmethod
    def forget_all(cls) -> None:
        """Start over: a fork has none of the uploads of its parent."""
        cls._all_sizes, cls._lock = 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Group.forget_all)


def _cut(chunk: BytesLike) -> Iterator[bytes]:
    if isinstance(chunk, bytes) and len(chunk) <= CHUNK_SIZE:
        yield chunk
        return
    view = memoryview(chunk)
    for start in range(0, len(view), CHUNK_SIZE):
        yield bytes(view[start : start + CHUNK_SIZE])
