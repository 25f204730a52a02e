"""Objects in the memory of the process, for tests and demos: the promises of every backend, until the process ends."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate

from granite_storage._threads import ThreadPool
from granite_storage.backends.base import ByteRange, ObjectInfo, Place, byte_range, check_range
from granite_storage.exceptions import (
    BackendError,
    ConfigurationError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)
from granite_storage.locations import check_location, uuid7_hex

__all__ = ["MemoryStorageBackend"]

_PIECE = 1 << 20
_PAGE = 500

_threads = ThreadPool("granite-memory", 2)


class MemoryStorageBackend:
    """Stores objects in memory.

    A write is exclusive and atomic, as on every backend: nothing of it can be seen until it has ended, and nothing is kept of one
    that fails or is cancelled. Content is held as it came, never joined, so a large object stalls no event loop. One backend
    serves any number of tasks, loops and threads; it needs no closing and keeps its objects when it is closed.

    Args:
        max_total_size: The most bytes it may hold, writes in progress included; None for no limit. A write that would go over
            raises `StorageFullError`, and what it held is free again.

    Raises:
        ConfigurationError: `max_total_size` is not a number of bytes.

    Example:
        >>> import asyncio
        >>> backend = MemoryStorageBackend(max_total_size=1024)
        >>> asyncio.run(backend.put_bytes("notes/1", b"hello"))
        >>> asyncio.run(backend.stat("notes/1")).size
        5
    """

    def __init__(self, *, max_total_size: int | None = None) -> None:
        if max_total_size is not None and (type(max_total_size) is not int or max_total_size < 0):
            raise ConfigurationError(f"max_total_size must be a number of bytes or None, not {max_total_size!r}")
        self._max_total_size = max_total_size
        self._total_size = 0
        self._objects: dict[str, _Object] = {}
        # Strings compare by code point, which is the byte order of UTF-8.
        self._order: list[str] = []
        self._lock = threading.Lock()
        self._identity = uuid7_hex()

    def __repr__(self) -> str:
        return f"MemoryStorageBackend(max_total_size={self._max_total_size})"

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> None:
        """Store `content`, exclusively and atomically."""
        with self._claim(location) as claim:
            claim(len(content))
            self._publish(location, [bytes(content)], content_type)

    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        """Store what `stream` yields, exclusively and atomically."""
        chunks: list[bytes] = []
        with self._claim(location) as claim:
            async for chunk in stream:
                claim(len(chunk))
                chunks.append(chunk)
            self._publish(location, chunks, content_type)

    async def copy(self, source: str, target: str) -> None:
        """Copy bytes and content type; the two objects share nothing that can change."""
        stored = self._find(source)
        with self._claim(target) as claim:
            claim(stored.info.size)
            self._publish(target, stored.chunks, stored.info.content_type)

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> _Reader:
        """Open a range for reading; a later delete does not disturb it."""
        check_range(offset, length)
        stored = self._find(location)
        return _Reader(stored, byte_range(offset, length, stored.info.size))

    async def stat(self, location: str) -> ObjectInfo:
        """Return the properties of an object."""
        return self._find(location).info

    async def exists(self, location: str) -> bool:
        """Return whether an object is at the location."""
        check_location(location)
        return location in self._objects

    async def delete(self, location: str) -> None:
        """Remove an object; a missing object is not an error."""
        check_location(location)
        self._remove(location)

    async def delete_many(self, locations: Sequence[str]) -> Mapping[str, BackendError]:
        """Delete all of them; none can fail."""
        for location in locations:
            check_location(location)
        for location in locations:
            self._remove(location)
        return {}

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose location begins with `prefix`, in the byte order of UTF-8."""
        while page := self._page(prefix, start_after or ""):
            for info in page:
                yield info
            start_after = page[-1].location
            await asyncio.sleep(0)

    async def now(self) -> datetime:
        """Return the time by this process's clock; see `SupportsClock.now`."""
        return datetime.now(UTC)

    async def identities(self, *, create: bool = False) -> Sequence[str]:
        """Return the one that this backend has had since it was made; see `SupportsIdentity.identities`."""
        return (self._identity,)

    async def places(self) -> frozenset[Place]:
        """Return the memory of this backend, which no other one shares; see `SupportsPlaces.places`."""
        return frozenset({Place(f"memory {self._identity}")})

    async def aclose(self) -> None:
        """Do nothing: nothing is open."""

    def _find(self, location: str) -> _Object:
        check_location(location)
        try:
            return self._objects[location]
        except KeyError:
            raise ObjectNotFoundError(f"no object is at {location!r}", location=location) from None

    @contextmanager
    def _claim(self, location: str) -> Iterator[Callable[[int], None]]:
        """Reserve room for a write's bytes as they arrive, and release it if the write fails."""
        check_location(location)
        claimed = 0

        def claim(size: int) -> None:
            nonlocal claimed
            with self._lock:
                if self._max_total_size is not None and self._total_size + size > self._max_total_size:
                    raise StorageFullError(f"the store is full: it holds at most {self._max_total_size} bytes", location=location)
                self._total_size += size
            claimed += size

        try:
            self._require_free(location)
            yield claim
        except BaseException:
            with self._lock:
                self._total_size -= claimed
            raise

    def _require_free(self, location: str) -> None:
        if location in self._objects:
            raise ObjectExistsError(f"an object is already at {location!r}", location=location)

    def _publish(self, location: str, chunks: Sequence[bytes], content_type: str | None) -> None:
        starts = list(accumulate(map(len, chunks), initial=0))
        info = ObjectInfo(location, starts[-1], datetime.now(UTC), etag=uuid7_hex(), content_type=content_type)
        with self._lock:
            self._require_free(location)
            self._objects[location] = _Object(info, chunks, starts)
            self._order.insert(bisect_left(self._order, location), location)

    def _remove(self, location: str) -> None:
        with self._lock:
            stored = self._objects.pop(location, None)
            if stored is not None:
                self._total_size -= stored.info.size
                del self._order[bisect_left(self._order, location)]

    def _page(self, prefix: str, start_after: str) -> list[ObjectInfo]:
        with self._lock:
            first = max(bisect_left(self._order, prefix), bisect_right(self._order, start_after))
            page = self._order[first : first + _PAGE]
            return [self._objects[location].info for location in page if location.startswith(prefix)]


@dataclass(frozen=True, slots=True)
class _Object:
    """What is stored: the chunks as they came, and where each of them starts."""

    info: ObjectInfo
    chunks: Sequence[bytes]
    starts: Sequence[int]

    def slices(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to before `stop` in pieces so small that copying one does not stall the event loop."""
        index = bisect_right(self.starts, start) - 1
        while start < stop:
            begin, end = self.starts[index], self.starts[index + 1]
            piece_end = min(stop, end, start + _PIECE)
            yield self.chunks[index][start - begin : piece_end - begin]
            start = piece_end
            index += start == end

    def join(self, start: int, stop: int) -> bytes:
        return b"".join(self.slices(start, stop))


class _Reader:
    def __init__(self, stored: _Object, span: ByteRange) -> None:
        self.info = stored.info
        self._stored: _Object | None = stored
        self._span = span

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all remaining ones if negative."""
        if self._stored is None:
            raise ValueError("the reader is closed")
        start, stop = self._span.start, self._span.stop
        stop = stop if size < 0 else min(stop, start + size)
        join = self._stored.join
        content = join(start, stop) if stop - start <= _PIECE else await _threads.run(join, start, stop)
        self._span = replace(self._span, start=stop)
        return content

    async def aclose(self) -> None:
        """Release the content."""
        self._stored = None
