"""Bytes on their way out of a network service: never fewer than there are, never of two versions of an object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from granite_storage.backends.base import ByteRange, ObjectInfo, byte_range, check_range
from granite_storage.exceptions import BackendError, BackendUnavailableError

__all__ = [
    "Body",
    "ConnectionTakenError",
    "Opened",
    "PreconditionFailedError",
    "RangeNotSatisfiableError",
    "Service",
    "ServiceReader",
    "error_at",
    "open_reader",
]


# What backends on a network service say to themselves of its answers, before callers see an error.


class ConnectionTakenError(BackendError):
    """The connection of a reader that was not being read was given to another call; what is left may be asked for again."""


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


async def open_reader(service: Service, location: str, *, offset: int, length: int | None) -> ServiceReader:
    """Open a range of an object, by one request wherever there is a byte to read."""
    check_range(offset, length)
    if length == 0:
        return await _open_empty(service, location, offset)
    try:
        opened = await service.get(location, offset, None if length is None else offset + length)
    except RangeNotSatisfiableError:
        return await _open_empty(service, location, offset)
    if opened.range != byte_range(offset, length, opened.info.size):
        await opened.body.aclose()
        raise BackendError(f"the service sent another range of {location!r} than was asked for", location=location)
    return ServiceReader(service, opened.info, opened.range, opened)


async def _open_empty(service: Service, location: str, offset: int) -> ServiceReader:
    info = await service.head(location)
    return ServiceReader(service, info, byte_range(offset, 0, info.size), None)


class ServiceReader:
    """A range of an object; where its body is cut off, the rest is asked for again, of the same version only.

    It holds a connection until it is read to its end or closed, or until another call needs it while this one is not being read.
    """

    def __init__(self, service: Service, info: ObjectInfo, wanted: ByteRange, opened: Opened | None) -> None:
        self.info = info
        self._service = service
        self._position = wanted.start
        self._stop = wanted.stop
        self._body = opened.body if opened else None
        self._same = opened.same if opened else {}
        self._closed = False
        self._cuts = 0

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all that is left where negative, and nothing only at the end of the range.

        Raises:
            BackendUnavailableError: The body was cut off again and again.
            BackendError: The object was replaced meanwhile, or the reader is closed.
        """
        if size < 0:
            return await self._read_all()
        while self._position < self._stop and size:
            chunk = await self._read_some(min(size, self._stop - self._position))
            if chunk:
                return chunk
        return b""

    async def aclose(self) -> None:
        """Let go of the connection; idempotent."""
        self._closed = True
        await self._let_go()

    async def _read_all(self) -> bytes:
        chunks = []
        while self._position < self._stop:
            chunks.append(await self.read(self._stop - self._position))
        return b"".join(chunks)

    async def _read_some(self, size: int) -> bytes:
        """Return the next bytes of the body; none where it was cut off and has been opened again."""
        if self._closed:
            raise BackendError(f"the reader of {self.info.location!r} is closed", location=self.info.location)
        if self._body is None:  # a read was cancelled while it opened the body again
            await self._go_on()
            return b""
        try:
            chunk = await self._body.read(size)
        except ConnectionTakenError:
            await self._go_on()
            return b""
        except Exception as error:  # noqa: BLE001  # whatever it is, the body is over
            await self._reopen(error.with_traceback(None))  # its frames would hold the body
            return b""
        if not chunk:
            await self._reopen(None)
            return b""
        self._cuts = 0
        self._position += len(chunk)
        if self._position == self._stop:
            await self._let_go()
        return chunk

    async def _reopen(self, cut: Exception | None) -> None:
        location = self.info.location
        await self._let_go()
        self._cuts += 1
        if self._cuts >= self._service.attempts:
            message = f"the body of {location!r} was cut off {self._cuts} times at byte {self._position}"
            raise BackendUnavailableError(message, location=location) from cut
        await self._go_on()

    async def _go_on(self) -> None:
        """Ask for what is left, of the same version."""
        location = self.info.location
        await self._let_go()
        try:
            opened = await self._service.get(location, self._position, self._stop, self._same)
        except PreconditionFailedError as error:
            raise BackendError(f"{location!r} was replaced while it was read", location=location) from error.__cause__
        if opened.range != ByteRange(self._position, self._stop) or not self._is_same(opened.info):
            await opened.body.aclose()
            raise BackendError(f"the service does not go on with {location!r} where it was cut off", location=location)
        self._body = opened.body

    def _is_same(self, info: ObjectInfo) -> bool:
        """Tell whether it is the same version, as far as the service has said: not all of them know conditions."""
        return (info.size, info.etag) == (self.info.size, self.info.etag) and (
            info.etag is not None or info.modified == self.info.modified
        )

    async def _let_go(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()
