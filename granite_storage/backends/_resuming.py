"""Resuming downloads: the one place that does so, for every backend.

A backend's reader is one answer of its store. Where that breaks off, or its connection went to another call, the rest is asked
for again: of the same object, or not at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Self

from granite_storage.backends.base import ObjectInfo, ObjectReader, StorageBackend, SupportsReopen, byte_range
from granite_storage.exceptions import BackendError, BackendUnavailableError

_MAX_ATTEMPTS = 5
"""How often in a row a body may be cut off without a byte, where its backend says nothing of it."""


class ConnectionTakenError(BackendUnavailableError):
    """The connection of a reader that was not being read was given to another call; what is left may be asked for again."""


class ResumingReader:
    """A range of an object on any backend, resumed where the backend's reader raises `BackendUnavailableError`.

    It holds what the backend's reader holds, until it is closed or released. After a read that raised or was cancelled the
    position of that reader is in doubt: `release` it, and the next read opens another one at `position`.

    Args:
        open_range: Opens a range of the object, given by its offset and length.
        offset: Where the range begins, in bytes.
        length: How long it is, cut at the end of the object; None for all that is left.

    Attributes:
        info: The whole object.
        position: Where the next read begins, counted from the start of the object; set it only after `release`.
    """

    def __init__(
        self, open_range: Callable[[int, int | None], Awaitable[ObjectReader]], *, offset: int = 0, length: int | None = None
    ) -> None:
        self.info: ObjectInfo
        self.position = offset
        self._open_range = open_range
        self._length = length
        self._stop = offset
        self._first: ObjectReader
        self._reader: ObjectReader | None = None
        self._cuts = 0

    @property
    def is_open(self) -> bool:
        """Whether it holds a reader of the backend."""
        return self._reader is not None

    async def start(self) -> Self:
        """Open the range; see `StorageBackend.open`."""
        self._reader = self._first = await self._open_range(self.position, self._length)
        self.info = self._reader.info
        self._stop = byte_range(self.position, self._length, self.info.size).stop
        return self

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes (all remaining ones if negative), and empty bytes only at the end of the range.

        Raises:
            BackendUnavailableError: The body was cut off `max_attempts` times in a row.
            BackendError: The object was replaced meanwhile, or its bytes ended early.
        """
        if size < 0:
            return await read_all(self.read, self._stop - self.position)
        wanted = min(size, self._stop - self.position)
        if wanted <= 0:
            return b""
        chunk: bytes | None = None
        while chunk is None:
            reader = self._reader or await self._reopen()
            try:
                chunk = await reader.read(wanted)
            except BackendUnavailableError as cut:
                await self.release()
                if not self._may_go_on(cut):
                    raise
        if not chunk:
            location, left = self.info.location, self._stop - self.position
            raise BackendError(f"the object at {location!r} ended {left} bytes early", location=location)
        self._cuts = 0
        self.position += len(chunk)
        return chunk

    async def release(self) -> None:
        """Close the backend's reader, and keep the position; the next read opens another one there."""
        reader, self._reader = self._reader, None
        if reader is not None:
            await reader.aclose()

    aclose = release

    def _may_go_on(self, cut: BackendUnavailableError) -> bool:
        if isinstance(cut, ConnectionTakenError):
            return True
        self._cuts += 1
        most = self._first.max_attempts if isinstance(self._first, SupportsReopen) else _MAX_ATTEMPTS
        if self._cuts < most:
            return True
        self._cuts = 0
        return False

    async def _reopen(self) -> ObjectReader:
        """Open what is left of the same object; by a condition where the backend knows one, compared in any case."""
        reopen = self._first.reopen if isinstance(self._first, SupportsReopen) else self._open_range
        try:
            self._reader = reader = await reopen(self.position, self._stop - self.position)
        except ValueError as error:
            # The range lies inside the object that was opened, so this one is smaller.
            raise self._changed() from error
        if not self._is_same(reader.info):
            raise self._changed()
        return reader

    def _is_same(self, info: ObjectInfo) -> bool:
        """Return whether it is the same object, as far as the store says: some of them know no etag."""
        return (info.size, info.etag) == (self.info.size, self.info.etag) and (
            info.etag is not None or info.modified == self.info.modified
        )

    def _changed(self) -> BackendError:
        location = self.info.location
        return BackendError(f"the object at {location!r} changed while it was read", location=location)


async def read_all(read: Callable[[int], Awaitable[bytes]], left: int) -> bytes:
    """Return as many bytes, of reads each of which may return fewer than it is asked for."""
    chunks = []
    while left > 0:
        chunks.append(await read(left))
        left -= len(chunks[-1])
    return b"".join(chunks)


async def open_resuming(backend: StorageBackend, location: str, *, offset: int = 0, length: int | None = None) -> ResumingReader:
    """Open a range of a backend's object, as `StorageBackend.open` does, for a reader that resumes."""

    async def open_range(start: int, count: int | None) -> ObjectReader:
        return await backend.open(location, offset=start, length=count)

    return await ResumingReader(open_range, offset=offset, length=length).start()
