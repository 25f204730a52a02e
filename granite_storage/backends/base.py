"""The Protocols of backends: objects at locations, created once and never overwritten.

A backend knows no policy, no ref and no ORM. The manager has already checked the location, counted and limited the bytes and
hashed them in passing; a backend only moves them. See `docs/backends.md` for a worked example of a new one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol, runtime_checkable

from granite_storage._telemetry import redact_records
from granite_storage.exceptions import BackendError

__all__ = [
    "ByteRange",
    "ObjectHeaders",
    "ObjectInfo",
    "ObjectReader",
    "Place",
    "PresignRequest",
    "StorageBackend",
    "SupportsAbort",
    "SupportsBatchDelete",
    "SupportsBatchPresign",
    "SupportsCleanup",
    "SupportsClock",
    "SupportsCopy",
    "SupportsExtraKeys",
    "SupportsIdentity",
    "SupportsMountCheck",
    "SupportsPlaces",
    "SupportsPresign",
    "SupportsPresignedUpload",
    "SupportsReopen",
    "UploadRequest",
    "byte_range",
    "close_listing",
    "closing_listing",
    "object_headers",
    "overlap",
    "upload_begun",
]

redact_records()

upload_begun: ContextVar[Callable[[str], Awaitable[None]] | None] = ContextVar("granite_storage.upload_begun", default=None)
"""Called with the id of a multipart upload once a backend has begun it, before its first part: a journal records it."""


@dataclass(frozen=True, slots=True)
class ObjectHeaders:
    """The headers that are stored with an object for readers that bypass the application, such as a CDN.

    Attributes:
        content_type: Its Content-Type; that of a write is the same, that of a copy's source need not be.
        content_disposition: Its Content-Disposition.
        cache_control: Its Cache-Control.
        acl: The canned ACL that lets the public read it, where the policy says one.
    """

    content_type: str
    content_disposition: str
    cache_control: str
    acl: str | None = None


object_headers: ContextVar[ObjectHeaders | None] = ContextVar("granite_storage.object_headers", default=None)
"""What a write or a copy stores with its object, for a public policy: a backend that keeps headers reads it when it begins."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The properties of an object in its backend.

    Attributes:
        location: Its address inside the backend.
        size: Its size in bytes.
        modified: When it was published, with a time zone, by the backend's clock.
        etag: A token that changes when the bytes do, opaque; None where the backend has none.
        content_type: The media type it was stored with; None where the backend keeps none.
        content_encoding: The Content-Encoding it was stored with, which only other programs give it; None for none.
    """

    location: str
    size: int
    modified: datetime
    etag: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None


class ObjectReader(Protocol):
    """One range of one object, open for one read from its start to its end.

    It need not resume: where it raises `BackendUnavailableError`, `StoredObjectReader` opens what is left of the same object.
    """

    @property
    def info(self) -> ObjectInfo:
        """The whole object, even if only a range of it is read."""
        ...

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes (all remaining ones if negative), and empty bytes only at the end of the range.

        Raises:
            BackendUnavailableError: The bytes were cut off; what is left may be asked for again.
            BackendError: The bytes ended before the range did, or could not be read.
        """
        ...

    async def aclose(self) -> None:
        """Release the reader's resources; idempotent."""
        ...


@runtime_checkable
class SupportsReopen(Protocol):
    """An `ObjectReader` that can reopen the same version of its object, or fail.

    Other readers are resumed by `StorageBackend.open`, and what it gives is compared: its size, and its etag or time.
    """

    @property
    def max_attempts(self) -> int:
        """How often in a row the bytes may be cut off, without one between, before the failure is reported."""
        ...

    async def reopen(self, offset: int, length: int, /) -> ObjectReader:
        """Open a range of the object that this reader is of, which may have been closed.

        Raises:
            ObjectNotFoundError: It is no longer there.
            BackendError: Another object is there instead.
        """
        ...


@runtime_checkable
class StorageBackend(Protocol):
    """Stores bytes at locations. `granite_storage.testing.BackendConformance` tests what every backend guarantees.

    - A write is exclusive and atomic: a location has either no object or a whole one. A location that already has an object is
      refused with `ObjectExistsError` and not changed. A write that fails or is cancelled leaves nothing behind, neither an
      object nor parts of one, unless the store's answer was lost and the store cannot be asked again.
    - A missing object raises `ObjectNotFoundError`, a refused permission `AccessDeniedError`, a full store `StorageFullError`,
      an unavailable store `BackendUnavailableError`, anything else `BackendError`, with the original error as the `__cause__`.
      An unsafe location is `InvalidLocationError` before anything is touched. An error raised by the stream that is being
      stored, and a cancellation, pass through unchanged.
    - A backend serves any number of tasks, and several event loops, one after the other or in threads.
    """

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Mapping[str, Any] | None:
        """Store `content`; the result is merged into the ref's `extra`."""
        ...

    async def put_stream(
        self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None
    ) -> Mapping[str, Any] | None:
        """Store all that `stream` yields, in bounded memory; the result is merged into the ref's `extra`.

        The chunks are never empty and at most 1 MiB long. An object may be published only after the stream has ended: its
        last step is a check, and raises where the content is not what was declared.
        """
        ...

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> ObjectReader:
        """Open a range for reading: `length` bytes from `offset`, fewer at the end of the object, all the rest for None.

        Raises:
            ObjectNotFoundError: No object is at the location.
            ValueError: `offset` or `length` is negative, or `offset` is past the end of the object.
        """
        ...

    async def stat(self, location: str) -> ObjectInfo:
        """Return the properties of an object; raise `ObjectNotFoundError` if there is none."""
        ...

    async def exists(self, location: str) -> bool:
        """Return whether an object exists at the location; a refused permission raises an error."""
        ...

    async def delete(self, location: str) -> None:
        """Delete an object; a missing object is not an error."""
        ...

    def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield every object whose location begins with the string `prefix`, in the byte order of UTF-8.

        An iterator that has `aclose`, as an asynchronous generator has, is closed where it is not iterated to its end; any other
        one must hold nothing open.

        Args:
            prefix: Taken literally; `a/` never yields `ab/x`, and `a` yields both.
            start_after: Yield only what comes after this location, which need not exist.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections of this event loop; idempotent. A later call opens new ones."""
        ...


@runtime_checkable
class SupportsCopy(Protocol):
    """A backend that copies an object without moving its bytes through the program."""

    async def copy(self, source: str, target: str) -> Mapping[str, Any] | None:
        """Copy bytes and content type to `target`, exclusively and atomically like a write; the result is merged into `extra`."""
        ...


@runtime_checkable
class SupportsBatchDelete(Protocol):
    """A backend that deletes many objects in few requests."""

    async def delete_many(self, locations: Sequence[str]) -> Mapping[str, BackendError]:
        """Delete all objects; return those that could not be deleted, each with its error. A failure does not stop the others."""
        ...


@runtime_checkable
class SupportsCleanup(Protocol):
    """A backend whose interrupted writes can leave temporary files or multipart uploads."""

    async def cleanup_incomplete(self, *, older_than: timedelta) -> int:
        """Remove the remains of unfinished writes that are older than `older_than`; return how many there were."""
        ...


@runtime_checkable
class SupportsClock(Protocol):
    """A backend that can tell the time by which it dates its objects."""

    async def now(self) -> datetime:
        """Return the time, with a time zone, of the clock behind `ObjectInfo.modified`; it may lag behind, but never lead."""
        ...


@runtime_checkable
class SupportsAbort(Protocol):
    """A backend whose unfinished writes survive their process, and can be found by their location.

    Parts of a multipart upload have an id besides: the backend calls what `upload_begun` holds with it, before the first part.
    """

    async def abort_upload(self, location: str, upload_id: str | None) -> None:
        """Abort an unfinished upload until no part of it is left; a missing upload is not an error.

        Args:
            location: The address that the object would have had.
            upload_id: The upload's id; None for every unfinished upload of this location, which is of one object only.
        """
        ...


@runtime_checkable
class SupportsExtraKeys(Protocol):
    """A backend whose writes return its own keys for the ref's `extra`, such as `bucket`."""

    @property
    def extra_keys(self) -> frozenset[str]:
        """Every key that a write or a copy may return; it describes this object, so a copy elsewhere must not keep it."""
        ...


@runtime_checkable
class SupportsMountCheck(Protocol):
    """A backend whose store can be absent and look empty, such as a folder on a disk that is not mounted."""

    async def is_mounted(self) -> bool:
        """Return whether the store is present and was written to before; also False for a store that was never used."""
        ...


@runtime_checkable
class SupportsIdentity(Protocol):
    """A backend whose store has an identity: a unique text that is written into it at its first use.

    The manager keeps it in each ref as `StoredObjectRef.identity`. So a key that leads to another store than it did when a row
    was written is detected: by the first read that finds no object, by the garbage collector and by `granite-storage doctor`.
    """

    async def identities(self, *, create: bool = False) -> Sequence[str]:
        """Return every identity of the store, the one for new objects first; empty if it has none.

        A store has more than one where a person has added those of stores whose objects were moved into it.

        Args:
            create: Whether to give the store an identity where it has none. The answer may then be one from memory, so that it
                costs nothing to ask before each write; otherwise the store is asked.

        Raises:
            AccessDeniedError: The identity may not be read, or not be written.
            BackendError: The store could not be asked.
        """
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """One name of the place where a backend stores its objects.

    Attributes:
        store: What holds them, such as a bucket of a service; equal for two backends exactly where they share it.
        path: The segments below which this backend's objects are.
    """

    store: str
    path: tuple[str, ...] = ()

    def below(self, prefix: str) -> Place:
        """Return the place of a prefix of whole segments below this one."""
        return Place(self.store, (*self.path, *prefix.split("/")))

    def overlaps(self, other: Place) -> bool:
        """Return whether an object can be in both places."""
        common = min(len(self.path), len(other.path))
        return self.store == other.store and self.path[:common] == other.path[:common]


@runtime_checkable
class SupportsPlaces(Protocol):
    """A backend that names the place of its objects, so that two backends on the same store are detected."""

    async def places(self) -> frozenset[Place]:
        """Return every name of the place, such as the real path of a folder and the numbers of its device and inode.

        No request is made of a service for it, and it does not matter whether the store is in reach.
        """
        ...


@runtime_checkable
class SupportsPresign(Protocol):
    """A backend that signs URLs with which a client reads directly from it."""

    async def presign_get(
        self, location: str, *, expires_in: timedelta, content_type: str | None = None, disposition: str | None = None
    ) -> str:
        """Return a URL that serves a GET of the object until it expires.

        Args:
            location: The object's address; it is not checked that it exists.
            expires_in: How long the URL works, more than zero.
            content_type: The Content-Type that the answer shall carry.
            disposition: The Content-Disposition that the answer shall carry.
        """
        ...


@dataclass(frozen=True, slots=True)
class PresignRequest:
    """One URL to sign.

    Attributes:
        location: The object's address; it is not checked that it exists.
        expires_in: How long the URL works from `signed_at` on.
        content_type: The Content-Type that the answer shall carry.
        disposition: The Content-Disposition that the answer shall carry.
        signed_at: When the URL begins to work, which is past, in seconds since 1970; None for now. What is asked for twice with
            the same time is signed as the same URL, for as long as the credentials are the same.
    """

    location: str
    expires_in: timedelta
    content_type: str | None = None
    disposition: str | None = None
    signed_at: int | None = None


@runtime_checkable
class SupportsBatchPresign(Protocol):
    """A backend that signs many stable URLs at a time; the manager prefers it to `SupportsPresign`.

    A signer of a service in front of a backend, such as CloudFront, is a `WrappedBackend` with this method.
    """

    async def presign_many(self, requests: Sequence[PresignRequest]) -> Sequence[str]:
        """Return a URL for each request, in their order, which serves a GET of the object until it expires."""
        ...


@dataclass(frozen=True, slots=True)
class UploadRequest:
    """A signed request with which a client stores one object: do not log it.

    Attributes:
        method: `POST` for a form (multipart/form-data) of the fields with the file after them, in a field `file`; `PUT` for the
            bytes as the body.
        url: Where it goes.
        fields: The fields of the form, in their order.
        headers: The headers that it must have; a browser sets Content-Length by itself.
    """

    method: Literal["POST", "PUT"]
    url: str = field(repr=False)
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@runtime_checkable
class SupportsPresignedUpload(Protocol):
    """A backend that signs requests with which a client stores directly in it."""

    async def presign_upload(
        self, location: str, *, expires_in: timedelta, content_type: str, min_size: int, max_size: int
    ) -> UploadRequest:
        """Return a request that stores an object at exactly this location, of this type and within these sizes.

        Until it expires it may be made more than once, and then replaces what it has stored before.

        Args:
            location: The object's address, which no other upload may use.
            expires_in: How long the request works, more than zero.
            content_type: The Content-Type that it must have.
            min_size: The fewest bytes.
            max_size: The most bytes.

        Raises:
            ContentTooLargeError: No request can bring as much as `min_size`.
            ValueError: The server cannot hold a client to this, such as to a range of sizes.
        """
        ...


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range that lies inside an object: `start` to before `stop`, in bytes."""

    start: int
    stop: int


def check_range(offset: int, length: int | None) -> None:
    """Refuse a negative range before anything is opened."""
    if offset < 0:
        raise ValueError(f"offset must not be negative, but is {offset}")
    if length is not None and length < 0:
        raise ValueError(f"length must not be negative, but is {length}")


def byte_range(offset: int, length: int | None, size: int) -> ByteRange:
    """Return the part of a requested range inside an object of `size` bytes; a range that begins past the end is refused."""
    check_range(offset, length)
    if offset > size:
        raise ValueError(f"offset {offset} is past the end of an object of {size} bytes")
    return ByteRange(offset, size if length is None else min(size, offset + length))


def overlap(places: Iterable[Place], others: Iterable[Place]) -> bool:
    """Return whether two backends, each given by all names of its place, may lead to the same object."""
    theirs = list(others)
    return any(place.overlaps(other) for place in places for other in theirs)


@runtime_checkable
class _SupportsAclose(Protocol):
    async def aclose(self) -> None: ...


@asynccontextmanager
async def closing_listing(objects: AsyncIterator[ObjectInfo]) -> AsyncIterator[AsyncIterator[ObjectInfo]]:
    """Yield what `iter_objects` has returned, and close it at the end of the block."""
    try:
        yield objects
    finally:
        await close_listing(objects)


async def close_listing(objects: AsyncIterator[ObjectInfo]) -> None:
    """Close what `iter_objects` has returned, where it has `aclose`, as an asynchronous generator has."""
    if isinstance(objects, _SupportsAclose):
        await objects.aclose()
