"""What backends on a network service share: its readers, and the answers that callers never see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from granite_storage.backends._resuming import ConnectionTakenError, ResumingReader
from granite_storage.backends.base import ByteRange, ObjectInfo, byte_range, check_range
from granite_storage.exceptions import BackendError, BackendUnavailableError

__all__ = [
    "Body",
    "Opened",
    "PreconditionFailedError",
    "RangeNotSatisfiableError",
    "RemoteReader",
    "Service",
    "error_at",
    "open_reader",
    "read_beginning",
]


class PreconditionFailedError(BackendError):
    """A condition of the request did not hold; nothing was changed."""


class RangeNotSatisfiableError(BackendError):
    """The range begins at the end of the object or after it."""


def error_at(location: str, error: BackendError) -> BackendError:
    """Return the same error for one of several locations."""
    one = type(error)(str(error), location=location)
    one.__cause__ = error.__cause__
    return one


class Body(Protocol):
    """The bytes of one answer; whatever it raises, it is over."""

    async def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, nothing only at the end; a cancelled read loses none.

        Raises:
            ConnectionTakenError: Another call has got the connection meanwhile.
        """
        ...

    async def aclose(self) -> None:
        """Let go of the connection."""
        ...


@dataclass(frozen=True, slots=True)
class Opened:
    """An object, or a range of one, that a service has begun to send.

    Attributes:
        info: The whole object.
        range: Which of its bytes `body` yields.
        body: Yields them.
        same: What asks for this version of it and no other, as `Service.get` takes it.
    """

    info: ObjectInfo
    range: ByteRange
    body: Body
    same: Mapping[str, Any]


class Service(Protocol):
    """What a reader asks.

    Attributes:
        attempts: How often in a row a body may be cut off without a byte, and one more.
    """

    attempts: int

    async def get(self, location: str, start: int, stop: int | None, same: Mapping[str, Any] | None = None, /) -> Opened:
        """Ask for a range, of one version only where `same` says of which.

        Raises:
            PreconditionFailedError: That version is no longer there.
            RangeNotSatisfiableError: The object has no byte at `start`.
        """
        ...

    async def head(self, location: str, /) -> ObjectInfo:
        """Ask what is known of an object."""
        ...


async def open_reader(
    service: Service, location: str, *, offset: int, length: int | None, same: Mapping[str, Any] | None = None
) -> RemoteReader:
    """Open a range of an object, by one request wherever there is a byte to read; of one version only where `same` says which."""
    check_range(offset, length)
    if length == 0:
        return await _open_empty(service, location, offset)
    try:
        opened = await service.get(location, offset, None if length is None else offset + length, same)
    except RangeNotSatisfiableError:
        return await _open_empty(service, location, offset)
    try:
        if opened.range != byte_range(offset, length, opened.info.size):
            raise BackendError(f"the service sent another range of {location!r} than was asked for", location=location)
    except BaseException:
        await opened.body.aclose()
        raise
    return RemoteReader(service, opened.info, opened.range, opened)


async def _open_empty(service: Service, location: str, offset: int) -> RemoteReader:
    info = await service.head(location)
    return RemoteReader(service, info, byte_range(offset, 0, info.size), None)


async def read_beginning(service: Service, location: str, size: int) -> bytes:
    """Return the first bytes of an object, at most so many."""

    async def open_range(offset: int, length: int | None) -> RemoteReader:
        return await open_reader(service, location, offset=offset, length=length)

    reader = await ResumingReader(open_range, length=size).start()
    try:
        return await reader.read()
    finally:
        await reader.aclose()


class RemoteReader:
    """A range of an object, as one answer of a service has it; see `SupportsReopen`.

    It holds a connection until it is read to its end or closed, or until another call needs it while this one is not being read.

    Attributes:
        info: The whole object.
        max_attempts: See `SupportsReopen.max_attempts`.
    """

    def __init__(self, service: Service, info: ObjectInfo, wanted: ByteRange, opened: Opened | None) -> None:
        self.info = info
        self.max_attempts = service.attempts
        self._service = service
        self._position = wanted.start
        self._stop = wanted.stop
        self._body = opened.body if opened else None
        self._same = opened.same if opened else None
        self._closed = False

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all that is left where negative, and nothing only at the end of the range.

        Raises:
            BackendUnavailableError: The body was cut off, or another call has got the connection.
            BackendError: The reader is closed.
        """
        if size < 0:
            return await self._read_all()
        wanted = min(size, self._stop - self._position)
        if not wanted:
            return b""
        if self._closed:
            raise BackendError(f"the reader of {self.info.location!r} is closed", location=self.info.location)
        if self._body is None:
            raise self._cut()
        try:
            chunk = await self._body.read(wanted)
        except ConnectionTakenError:
            await self._release()
            location = self.info.location
            message = f"the connection of the reader of {location!r} was given to another call at byte {self._position}"
            raise ConnectionTakenError(message, location=location) from None
        except Exception as error:  # noqa: BLE001  # whatever it is, the body is over
            await self._release()
            raise self._cut() from error.with_traceback(None)  # its frames would hold the body
        if not chunk:
            await self._release()
            raise self._cut()
        self._position += len(chunk)
        if self._position == self._stop:
            await self._release()
        return chunk

    async def reopen(self, offset: int, length: int, /) -> RemoteReader:
        """Open a range of the same version of the object; see `SupportsReopen.reopen`."""
        location = self.info.location
        try:
            return await open_reader(self._service, location, offset=offset, length=length, same=self._same)
        except PreconditionFailedError as error:
            raise BackendError(f"{location!r} was replaced while it was read", location=location) from error.__cause__

    async def aclose(self) -> None:
        """Let go of the connection; idempotent."""
        self._closed = True
        await self._release()

    async def _read_all(self) -> bytes:
        chunks = []
        while self._position < self._stop:
            chunks.append(await self.read(self._stop - self._position))
        return b"".join(chunks)

    def _cut(self) -> BackendUnavailableError:
        location = self.info.location
        return BackendUnavailableError(f"the body of {location!r} was cut off at byte {self._position}", location=location)

    async def _release(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()
