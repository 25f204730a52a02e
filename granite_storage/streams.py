"""Bytes on their way in: one adapter for every kind of source, one limit, one count, one hash.

The stages of a write stand in a row, each an async iterator over the one before it:

    iter_chunks          whatever the caller streams from, as bytes-like chunks
    SizeLimitedStream    the limit, chunk by chunk, before anything is copied
    MeasuredStream       pieces of about 1 MiB, counted, hashed in a thread, checked against what was declared

A backend pulls at the end of the row, so nothing runs ahead of it by more than a few pieces.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from contextvars import copy_context
from typing import Any, Protocol, Self, TypeAlias, TypeGuard

from granite_storage._concurrency import finish
from granite_storage._threads import ThreadConsumer, ThreadPool
from granite_storage.exceptions import ChecksumMismatchError, ContentTooLargeError, SizeMismatchError
from granite_storage.refs import canonical_checksum

__all__ = [
    "CHUNK_SIZE",
    "ByteSource",
    "BytesLike",
    "MeasuredStream",
    "Sha256",
    "SizeLimitedStream",
    "fingerprint",
    "iter_chunks",
    "joined",
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

_INLINE_HASH = 8 * 1024
_HELD_LOCK = 2047
_MOST_PENDING = 8 * CHUNK_SIZE
_LARGE_ENOUGH = CHUNK_SIZE // 4
_MOST_GROUPED = 1024
_MOST_HELD = 64 * CHUNK_SIZE
_TURN_SECONDS = 0.002
_PATIENCE = 5.0

_hash_threads = ThreadPool("granite-hash", (os.cpu_count() or 1) + 2)
_source_threads = ThreadPool("granite-source", 32)


def iter_chunks(source: ByteSource) -> AsyncGenerator[BytesLike, None]:
    """Turn whatever the caller streams from into an async iterator of bytes-like chunks, some of which may be empty.

    The only place that knows what a source is. A synchronous one is read in a thread. The caller's object is never closed; an
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


class SizeLimitedStream:
    """An async iterator over a stream that raises at the first byte over a limit.

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

    def __init__(self, stream: ByteSource, max_size: int | None) -> None:
        self.max_size = max_size
        self.bytes_read: int = 0
        self._chunks = iter_chunks(stream)

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


def require_size(size: int, max_size: int | None) -> None:
    """Raise `ContentTooLargeError` where a number of bytes is over a limit."""
    if max_size is not None and size > max_size:
        raise ContentTooLargeError(f"the content is larger than {max_size} bytes", max_size=max_size)


def require_declared_size(size: object) -> None:
    """Refuse a declared size that no content can have."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"size must be a number of bytes, not {size!r}")


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
        checksum: `sha256:<hex>` of the whole, once it has ended; None before.
    """

    def __init__(self, chunks: AsyncIterator[BytesLike], *, size: int | None = None, checksum: str | None = None) -> None:
        self.size: int = 0
        self.checksum: str | None = None
        self._declared_size = size
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
        async with aclosing(_regrouped(self._chunks)) as pieces:
            async for piece in pieces:
                self.size += len(piece)
                if self._declared_size is not None and self.size > self._declared_size:
                    raise _size_mismatch(self._declared_size, None)
                await self._sha256.update(piece)
                yield piece
                del piece
        if self._declared_size is not None and self.size != self._declared_size:
            raise _size_mismatch(self._declared_size, self.size)
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
            if len(piece) <= _INLINE_HASH:
                _update_inline(self._hash, piece)
                return
            self._consumer = ThreadConsumer(_hash_threads, self._hash.update, max_pending=_MOST_PENDING)
        await self._consumer.feed(piece)

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
    if size_of(content) <= _INLINE_HASH:
        data = bytes(content)
        sha256 = hashlib.sha256()
        _update_inline(sha256, data)
        return data, f"sha256:{sha256.hexdigest()}"
    return await _hash_threads.run(_fingerprint, content)


async def joined(chunks: list[bytes]) -> bytes:
    """Return chunks as one; off the event loop where there is so much that copying it would be felt."""
    return await _hash_threads.run(b"".join, chunks) if sum(map(len, chunks)) > CHUNK_SIZE else b"".join(chunks)


def _update_inline(sha256: hashlib._Hash, data: bytes) -> None:
    """Hash a little on the event loop, in slices for which `hashlib` does not give up the interpreter's lock."""
    for start in range(0, len(data), _HELD_LOCK):
        sha256.update(data[start : start + _HELD_LOCK])


def _fingerprint(content: BytesLike) -> tuple[bytes, str]:
    data = bytes(content)
    return data, f"sha256:{hashlib.sha256(data).hexdigest()}"


def _size_mismatch(expected: int, actual: int | None) -> SizeMismatchError:
    found = "more" if actual is None else str(actual)
    return SizeMismatchError(
        f"the content was declared to have {expected} bytes, but has {found}", expected=expected, actual=actual
    )


async def _regrouped(chunks: AsyncIterator[BytesLike]) -> AsyncGenerator[bytes, None]:
    """Join small chunks and cut large ones, and let other tasks run where the source never waits.

    A thread that hashes needs the interpreter once for each piece, so few large pieces disturb the event loop less.
    """
    turn = _Turn()
    with _Group() as group:
        async for chunk in chunks:
            size = len(chunk)
            if group.must_go_before(size):
                yield group.joined()
            if size >= _LARGE_ENOUGH:
                for piece in _cut(chunk):
                    yield piece
                    del piece
                    if turn.is_over():
                        await asyncio.sleep(0)
            elif size:
                group.add(bytes(chunk))
            del chunk  # its producer may want to change the size of the buffer, or to free it
            if turn.is_over():
                await asyncio.sleep(0)
        if group.size:
            yield group.joined()


class _Turn:
    """Says when it is time to let other tasks run."""

    def __init__(self) -> None:
        self._ends = time.monotonic() + _TURN_SECONDS

    def is_over(self) -> bool:
        now = time.monotonic()
        if now < self._ends:
            return False
        self._ends = now + _TURN_SECONDS
        return True


class _Group:
    """Small chunks on their way to becoming one piece.

    All groups of the process together hold a bounded number of bytes: where thousands of uploads run, their pieces are smaller.
    """

    _all_sizes = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.size = 0
        self._chunks: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._count(-self.size)

    def add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._count(len(chunk))

    def must_go_before(self, size: int) -> bool:
        """Tell whether the group must become a piece before a chunk of this size is taken."""
        return self.size > 0 and (
            self.size + size > CHUNK_SIZE
            or size >= _LARGE_ENOUGH
            or len(self._chunks) >= _MOST_GROUPED
            or _Group._all_sizes > _MOST_HELD
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
        """Begin anew: a fork has none of the uploads of its parent."""
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


async def _only(content: BytesLike) -> AsyncGenerator[BytesLike, None]:
    yield _bytes_like(content)


async def _read_async(read: Callable[[int], Awaitable[Any]]) -> AsyncGenerator[BytesLike, None]:
    while chunk := _bytes_like(await read(CHUNK_SIZE)):
        yield chunk


async def _read_in_thread(read: Callable[[int], Any]) -> AsyncGenerator[BytesLike, None]:
    in_context: Callable[..., Any] = copy_context().run
    while True:
        chunk = await _source_threads.run(in_context, read, CHUNK_SIZE, patience=_PATIENCE)
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
    iterator = await _source_threads.run(in_context, iter, source, undo=close, patience=_PATIENCE)
    try:
        while True:
            batch: _Batch = await _source_threads.run(in_context, _take, iterator, patience=_PATIENCE)
            while batch.chunks:
                yield batch.chunks.popleft()
            if batch.error is not None:
                raise batch.error
            if batch.exhausted:
                return
    finally:
        if iterator is not source and hasattr(iterator, "close"):
            await finish(_source_threads.run(close, iterator), "closing the iterator of a stream", timeout=_PATIENCE)


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
    turn_ends = time.monotonic() + 5 * _TURN_SECONDS
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
