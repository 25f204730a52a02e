"""Reading objects: what `StorageManager.open` returns."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

from granite_storage._portal import portal, run_blocking
from granite_storage._tasks import shielded_cleanup
from granite_storage._telemetry import count_read
from granite_storage.backends._resuming import ResumingReader
from granite_storage.backends.base import ObjectInfo, ObjectReader
from granite_storage.exceptions import BackendError, ConfigurationError, InvalidLocationError, SizeMismatchError
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import CHUNK_SIZE, Sha256, joined, require_checksum

__all__ = ["OpeningReader", "StoredObjectReader", "SyncObjectReader", "require_recorded_size"]

T = TypeVar("T")

_BUFFER_SIZE = 256 << 10


class StoredObjectReader:
    """An object, or a range of one, open for reading; positions count from the start of the range.

    It never ends early: if bytes are missing, it raises an error. If the backend's reader is cut off
    (`BackendUnavailableError`), it requests the rest of the same object before it raises. Reads, seeks and iteration may be
    mixed, by one task at a time. Iteration releases the backend's handle when it ends or is abandoned, so a web framework that
    iterates the reader as a response's body and never closes it leaks nothing.

    Attributes:
        ref: The ref that was opened.
        info: The properties of the whole object in the backend.
        size: The length of the range in bytes.
        closed: Whether `aclose` was called.

    Example:
        ```python
        async with manager.open(ref, offset=10) as reader:
            head = await reader.read(4)
            async for chunk in reader:
                ...
        ```
    """

    def __init__(
        self,
        ref: StoredObjectRef,
        open_range: Callable[[int, int | None], Awaitable[ObjectReader]],
        *,
        offset: int,
        length: int | None,
        verify: bool,
    ) -> None:
        if offset < 0 or (length is not None and length < 0):
            raise ValueError(f"offset and length must not be negative, but are {offset} and {length}")
        if offset > ref.size:
            raise ValueError(f"offset {offset} is past the end of an object of {ref.size} bytes")
        self.ref = ref
        self.size: int = ref.size - offset if length is None else min(length, ref.size - offset)
        if verify and self.size != ref.size:
            raise ValueError("only a whole object can be verified, not a range of it")
        self.info: ObjectInfo
        self.closed: bool = False
        self._start = offset
        self._source = ResumingReader(open_range, offset=offset, length=self.size)
        self._sha256 = Sha256() if verify else None
        self._lock = asyncio.Lock()
        self._iteration: object | None = None

    async def read(self, size: int = -1, /) -> bytes:
        """Return `size` bytes, fewer only at the end of the range; all remaining bytes if `size` is negative.

        Raises:
            BackendError: The bytes could not be read, or there are fewer than there should be.
            ChecksumMismatchError: The reader verifies, and the bytes are not those that were stored; raised in place of the
                last of them.
        """
        self._iteration = None
        async with self._lock:
            return await self._take(self._left if size < 0 else min(size, self._left), whole=True)

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Yield what is left, in chunks as they come, at most 1 MiB each."""
        iteration = self._iteration = object()
        try:
            while True:
                async with self._lock:
                    chunk = await self._take(min(CHUNK_SIZE, self._left), whole=False)
                if not chunk:
                    return
                yield chunk
        finally:
            if self._iteration is iteration:
                await self.release()

    async def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position and return it, without reading.

        Args:
            offset: Bytes, counted from `whence`.
            whence: `os.SEEK_SET`, `SEEK_CUR` or `SEEK_END`, the start, the position or the end of the range.

        Raises:
            ValueError: The position would be negative, or the reader verifies and so reads once from start to end.
        """
        self._iteration = None
        async with self._lock:
            self._require_open()
            base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
            position = base + offset
            if position < 0:
                raise ValueError(f"position {position} is before the start")
            if position != self.tell():
                if self._sha256 is not None:
                    raise ValueError("a reader that verifies cannot seek: it reads once, from start to end")
                await self._move(self._start + position)
            return position

    def tell(self) -> int:
        """Return the position."""
        return self._source.position - self._start

    async def release(self) -> None:
        """Release the backend's handle, such as a connection, and keep the position; the next read opens a new one there.

        Call it on a reader that is not read for a while. The next read returns bytes of the same object, or raises an error.
        """

        async def release() -> None:
            async with self._lock:
                await self._release()

        if self._source.is_open or self._sha256 is not None or self._lock.locked():
            await self._finish(release())

    async def aclose(self) -> None:
        """Release the backend's handle; idempotent. Reading afterwards raises `ValueError`."""
        self.closed = True
        self._iteration = None
        await self.release()

    close = aclose

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def verifies(self) -> bool:
        """Whether the bytes are verified as they are read."""
        return self._sha256 is not None

    @property
    def _left(self) -> int:
        return max(0, self.size - self.tell())

    def _require_open(self) -> None:
        if self.closed:
            raise ValueError("the reader is closed")

    async def start(self) -> Self:
        """Open the backend's handle, so that a missing or wrong object raises an error before the first byte."""
        try:
            self.info = (await self._source.start()).info
            require_recorded_size(self.ref, self.info.size)
            await self._verify()
        except BaseException as error:
            await self._finish(self._release())
            if not isinstance(error, ValueError) or isinstance(error, InvalidLocationError):
                raise
            # The range lies inside what the ref says, so the object must be smaller.
            message = f"the object at {self.ref.location!r} has fewer bytes than its ref says, {self.ref.size}"
            raise SizeMismatchError(message, expected=self.ref.size) from error
        return self

    async def _take(self, wanted: int, *, whole: bool) -> bytes:
        """Return the wanted bytes, or for not `whole` some of them; a failure or cancellation leaves the position as it was."""
        began = self._source.position
        try:
            chunks = [await self._next_chunk(wanted)]
            while whole and self._source.position < began + wanted:
                chunks.append(await self._next_chunk(began + wanted - self._source.position))
            return chunks[0] if len(chunks) == 1 else await joined(chunks)
        except BaseException as error:
            # The handle's position is in doubt; and a hash cannot go back, so a reader that verifies is at its end.
            self.closed = self.closed or self._sha256 is not None
            if isinstance(error, BackendError):
                error.backend = error.backend or self.ref.backend
            await self._move(began)
            raise

    async def _next_chunk(self, wanted: int) -> bytes:
        """Return some of the wanted bytes, at least one; nothing only where none is wanted."""
        self._require_open()
        if wanted == 0:
            return b""
        chunk = await self._source.read(wanted)
        count_read(self.ref, len(chunk))
        if self._sha256 is not None:
            await self._sha256.update(chunk)
            await self._verify()
        return chunk

    async def _verify(self) -> None:
        if self._sha256 is not None and self._left == 0:
            require_checksum(self.ref.checksum, await self._sha256.checksum())

    async def _move(self, position: int) -> None:
        self._source.position = position
        await self._finish(self._release())

    async def _release(self) -> None:
        try:
            await self._source.release()
        finally:
            if self._sha256 is not None and self.closed:
                await self._sha256.stop()

    async def _finish(self, release: Coroutine[Any, Any, None]) -> None:
        await shielded_cleanup(release, f"closing the reader of {self.ref.location!r}")


class SyncObjectReader(io.BufferedReader):
    """An object, or a range of one, open for reading as a binary file, for synchronous code; close it, or use `with`.

    `shutil.copyfileobj`, Pillow and `zipfile` take it. What a `StoredObjectReader` raises, this raises, too.

    Attributes:
        ref: The ref that was opened.
        info: The properties of the whole object in the backend.
        size: The length of the range in bytes.
    """

    def __init__(self, reader: StoredObjectReader) -> None:
        super().__init__(_RawReader(reader), _BUFFER_SIZE)
        self.ref: StoredObjectRef = reader.ref
        self.info: ObjectInfo = reader.info
        self.size: int = reader.size


class _RawReader(io.RawIOBase):
    def __init__(self, reader: StoredObjectReader) -> None:
        self._reader = reader
        self._process = os.getpid()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._reader.verifies

    def readinto(self, buffer: Any, /) -> int:
        data = self._run(self._reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._run(self._reader.read())

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._run(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return self._reader.tell()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if os.getpid() != self._process:
            work.close()
            raise ConfigurationError("the reader was opened before this process was forked: open the object again in the child")
        return run_blocking(work, "SyncObjectReader.read", "'async with storage.open(...)'")

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if portal.is_here:  # a garbage collection there has found it open
            portal.run_later(self._reader.aclose())
        else:
            portal.run(self._reader.aclose())


def require_recorded_size(ref: StoredObjectRef, size: int) -> None:
    """Raise `SizeMismatchError` unless an object has the size that its ref says."""
    if size != ref.size:
        message = f"the object at {ref.location!r} has {size} bytes, but its ref says {ref.size}"
        raise SizeMismatchError(message, expected=ref.size, actual=size)


class OpeningReader:
    """What `StorageManager.open` returns: await it for a reader to close yourself, or enter it with `async with`.

    Iterating it with `async for` opens a reader, yields its bytes in chunks and closes it. Nothing is opened before.
    """

    # Slots, so that what walks through `vars(...)` finds no private state.
    __slots__ = ("__weakref__", "_reader", "_start")

    def __init__(self, start: Callable[[], Awaitable[StoredObjectReader]]) -> None:
        self._start = start
        self._reader: StoredObjectReader | None = None

    def __await__(self) -> Generator[object, object, StoredObjectReader]:
        return self._start().__await__()

    async def start(self) -> StoredObjectReader:
        """Open it, as an `await` does."""
        return await self._start()

    async def __aenter__(self) -> StoredObjectReader:
        self._reader = await self._start()
        return self._reader

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._reader is not None:
            await self._reader.aclose()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Open it, and yield its bytes."""
        reader = await self._start()
        async with reader, aclosing(aiter(reader)) as chunks:
            async for chunk in chunks:
                yield chunk

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # what `vars` gives, to encoders
        raise TypeError(
            "the return value of open() is neither a reader nor data: await it, or enter it with 'async with', and read from "
            "the reader; to answer a request with a file, return a StoredObjectResponse"
        )

    def __dir__(self) -> list[str]:
        return dir(type(self))

    def __repr__(self) -> str:
        return "<OpeningReader: await it, or enter it with 'async with'>"
