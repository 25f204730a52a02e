"""What the backends of network services share: readers, and writes whose response was lost."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from granite_storage._tasks import run_bounded, shielded_cleanup, wait_or_cancel
from granite_storage._telemetry import fields_of
from granite_storage._words import require_timedelta
from granite_storage.backends._resuming import ConnectionTakenError, ResumingReader, read_all
from granite_storage.backends.base import ByteRange, ObjectInfo, ObjectReader, byte_range, check_range
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    InvalidLocationError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)
from granite_storage.locations import MAX_LOCATION_BYTES, check_location

logger = logging.getLogger("granite_storage")

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

ANSWER_TIMEOUT = 10.0
"""How long a cancelled caller waits for the answer to a request whose effect must be undone, in seconds."""

MAX_PARTS = 10_000
"""The most parts that S3 and Google take of an object."""

_BATCH = 1000
_MAX_EXPIRY = timedelta(days=7)
_DELETE_CONCURRENCY = 16


class PreconditionFailedError(BackendError):
    """A condition of the request did not hold; nothing was changed."""


class RangeNotSatisfiableError(BackendError):
    """The range begins at the end of the object or after it."""


def error_at(location: str, error: BackendError) -> BackendError:
    """Return the same error for one of several locations."""
    one = type(error)(str(error), location=location)
    one.__cause__ = error.__cause__
    return one


BY_STATUS: dict[int, type[BackendError]] = {
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: ObjectNotFoundError,
    408: BackendUnavailableError,
    412: PreconditionFailedError,
    416: RangeNotSatisfiableError,
    429: BackendUnavailableError,
    507: StorageFullError,
}
"""What the status of an answer means, whatever the service."""


# What is asked for.


def check_key(location: str, prefix: str) -> None:
    """Refuse a location that is not safe, or is too long with the prefix before it."""
    check_location(location, windows=False)
    if prefix and len(f"{prefix}{location}".encode()) > MAX_LOCATION_BYTES:
        message = f"location {location[:80]!r} is longer than {MAX_LOCATION_BYTES} bytes together with its prefix"
        raise InvalidLocationError(message)


def require_expiry(expires_in: timedelta) -> None:
    """Raise `ValueError` unless a signature's lifetime is from one second to seven days."""
    require_timedelta("expires_in", expires_in)
    if not timedelta(seconds=1) <= expires_in <= _MAX_EXPIRY:
        raise ValueError(f"expires_in must be from one second to seven days, not {expires_in}")


# Deletions.


async def delete_each(locations: Sequence[str], delete: Callable[[str], Awaitable[None]], kind: type[E]) -> dict[str, E]:
    """Delete objects by a request each, concurrently; return the ones that raised an error of a kind, each with it."""
    failures: dict[str, E] = {}

    async def attempt(location: str) -> None:
        try:
            await delete(location)
        except kind as error:
            failures[location] = error

    await run_bounded(locations, attempt, _DELETE_CONCURRENCY)
    return failures


# Downloads.


class Body(Protocol):
    """The body of one response; after any error nothing more can be read."""

    async def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, nothing only at the end; a cancelled read loses none.

        Raises:
            ConnectionTakenError: Another call has got the connection meanwhile.
        """
        ...

    async def aclose(self) -> None:
        """Release the connection."""
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
    """What a reader needs of a service.

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
            sent = f"bytes {opened.range.start} to {opened.range.stop}"
            message = f"the service sent another range of {location!r} than was requested from {offset}: {sent}"
            raise BackendError(message, location=location)
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

    async with aclosing(await ResumingReader(open_range, length=size).start()) as reader:
        return await reader.read()


class RemoteBackend:
    """What every backend on a service answers in the same way."""

    _service: Service

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> ObjectReader:
        """Open a range; see `StorageBackend.open`."""
        self._check(location)
        return await open_reader(self._service, location, offset=offset, length=length)

    async def stat(self, location: str) -> ObjectInfo:
        """Return the properties of an object; see `StorageBackend.stat`."""
        self._check(location)
        return await self._service.head(location)

    async def exists(self, location: str) -> bool:
        """Return whether an object is there; see `StorageBackend.exists`."""
        try:
            await self.stat(location)
        except ObjectNotFoundError:
            return False
        return True

    async def delete_many(self, locations: Sequence[str]) -> Mapping[str, BackendError]:
        """Remove objects, a thousand by one request where the service can; see `SupportsBatchDelete.delete_many`."""
        for location in locations:
            self._check(location)
        different = list(dict.fromkeys(locations))
        failures: dict[str, BackendError] = {}
        for start in range(0, len(different), _BATCH):
            failures |= await self._delete_batch(different[start : start + _BATCH])
        return failures

    @property
    def extra_keys(self) -> frozenset[str]:
        """`version_id`, and `bucket`, which only `S3StorageBackend` writes; see `SupportsExtraKeys.extra_keys`."""
        return frozenset({"bucket", "version_id"})

    def _check(self, location: str) -> None:
        raise NotImplementedError

    async def _delete_batch(self, locations: Sequence[str]) -> Mapping[str, BackendError]:
        raise NotImplementedError


class RemoteReader:
    """The body of one answer of a service; see `SupportsReopen`.

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
        """Return up to `size` bytes (all remaining ones if negative), and empty bytes only at the end of the range.

        Raises:
            BackendUnavailableError: The body was cut off, or another call has got the connection.
            BackendError: The reader is closed.
        """
        if size < 0:
            return await read_all(self.read, self._stop - self._position)
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
            message = (
                f"another call took the connection of the idle reader of {location!r}: open it again at byte {self._position}"
            )
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
            raise BackendError(
                f"the object at {location!r} was replaced while it was read", location=location
            ) from error.__cause__

    async def aclose(self) -> None:
        """Release the connection; idempotent."""
        self._closed = True
        await self._release()

    def _cut(self) -> BackendUnavailableError:
        location = self.info.location
        return BackendUnavailableError(f"the body of {location!r} was cut off at byte {self._position}", location=location)

    async def _release(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            await body.aclose()


# Writes whose outcome is in doubt.


@dataclass(frozen=True, slots=True)
class Found:
    """An object that is where a write was to create one.

    Attributes:
        write_id: The id of the write that it is of, None where it has none.
        size: Its size in bytes.
        receipt: What the write returns if the object is its own.
        checksum: What the service says of its bytes, None where it says nothing.
    """

    write_id: str | None
    size: int
    receipt: Mapping[str, Any]
    checksum: str | None = None


class RemoteWriter:
    """One write of one object, which knows at its end whether it has created the object.

    The object carries an id of the write in its metadata. So where an answer was lost, and the same request made again is refused
    because the object exists, a HEAD tells whether it is this write's own. ETags are never compared: they are an MD5 of the bytes
    only sometimes.

    Args:
        location: Where the object is to be.
        has_metadata: Whether the service keeps metadata, and so an id.
    """

    _doubts: tuple[type[BackendError], ...] = (BackendError,)
    """The errors after which the object may be there all the same."""

    def __init__(self, location: str, *, has_metadata: bool = True) -> None:
        self._location = location
        self._id = os.urandom(16).hex() if has_metadata else None
        self._has_own_id = True  # False for a copy that carries the id of its source
        self._created = False  # whether an answer that a cancelled caller did not see says that the object is there

    async def _find(self, *, with_checksum: bool = False) -> Found | None:
        """Return what is at the location, None if there is nothing; its checksum only where that is wanted."""
        raise NotImplementedError

    async def _remove(self, found: Found | None) -> None:
        """Remove the object; `found` says which one, where it was asked."""
        raise NotImplementedError

    async def _answered(self, request: Awaitable[T], *, landed: Callable[[], bool] = lambda: True) -> T:
        """Make a request, and learn what became of it, also for a caller that is cancelled.

        Args:
            request: The request.
            landed: Tells whether the service may have acted on it; before that, a cancellation need not wait.
        """
        task = asyncio.ensure_future(request)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not landed():
                task.cancel()
            if not await wait_or_cancel(task, ANSWER_TIMEOUT):
                message = "a write of %r was abandoned: no answer within %s s; the service may keep something of it"
                logger.error(message, self._location, ANSWER_TIMEOUT, extra=fields_of(location=self._location))
            self._created = not task.cancelled() and task.exception() is None and task.result() is not None
            raise
        finally:
            del task  # otherwise its error and this frame would keep each other alive

    async def _create(
        self,
        request: Callable[[], Awaitable[Mapping[str, Any]]],
        size: int,
        checksum: str | None = None,
        *,
        attempts: int = 1,
    ) -> Mapping[str, Any]:
        """Make the request that creates the object, and learn what became of it where that is in doubt.

        Args:
            request: Makes it.
            size: The size of the object in bytes.
            checksum: The checksum that the service will have of it, None where it has none.
            attempts: How often it is made where the service is not available.
        """
        while True:
            attempts -= 1
            try:
                return await request()
            except self._doubts as doubt:
                if isinstance(doubt, ObjectExistsError) and not self._has_own_id:
                    raise
                found = await self._outcome(doubt, size, checksum)
                if found is not None:
                    return found
                if not attempts or not isinstance(doubt, BackendUnavailableError):
                    raise

    async def _outcome(self, doubt: BackendError, size: int, checksum: str | None) -> Mapping[str, Any] | None:
        """Return the receipt of the object if this write has created it, None if there is no object.

        Raises:
            ObjectExistsError: Another write has.
            BackendError: The doubt itself, where the service does not tell.
        """
        if self._id is None:
            raise doubt
        try:
            found = await self._find(with_checksum=checksum is not None)
        except BackendError:
            if isinstance(doubt, ObjectExistsError | PreconditionFailedError):  # it may be this write's own all the same
                raise
            raise doubt from doubt.__cause__
        if found is None:
            return None
        same = found.size == size and (found.checksum is None or checksum is None or found.checksum == checksum)
        if same and found.write_id == self._id:
            return found.receipt
        raise self._exists() from doubt.__cause__

    async def _withdraw(self) -> None:
        """Remove the object that this write has created, and no other's; what may be either stays."""
        found: Found | None = None
        ours = self._created
        if self._has_own_id and self._id is not None:
            found = await self._find()
            ours = found is not None and found.write_id == self._id
        if ours:
            await self._remove(found)

    async def _clean_up(self, work: Awaitable[object]) -> None:
        await shielded_cleanup(work, f"the clean-up of a write of {self._location!r}")

    async def _require_absent(self) -> None:
        """Raise `ObjectExistsError` where an object is at the location."""
        if await self._find() is not None:
            raise self._exists()

    def _exists(self) -> ObjectExistsError:
        return ObjectExistsError(f"an object is already at {self._location!r}", location=self._location)
