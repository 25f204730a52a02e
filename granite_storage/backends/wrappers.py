"""Backends around a backend: each call is passed on, each ability kept, and none pretended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from granite_storage.backends.base import (
    ObjectInfo,
    ObjectReader,
    Place,
    PresignRequest,
    StorageBackend,
    SupportsAbort,
    SupportsBatchDelete,
    SupportsBatchPresign,
    SupportsCleanup,
    SupportsClock,
    SupportsCopy,
    SupportsExtraKeys,
    SupportsIdentity,
    SupportsMountCheck,
    SupportsPlaces,
    SupportsPresign,
    SupportsPresignedUpload,
    SupportsReopen,
    UploadRequest,
    closing_listing,
)
from granite_storage.exceptions import BackendError, ConfigurationError, InvalidLocationError
from granite_storage.locations import check_location, check_segment

__all__ = ["PrefixedBackend", "WrappedBackend"]

P = ParamSpec("P")
T = TypeVar("T")


class WrappedBackend:
    """Passes every call to an inner backend; a subclass may map each location to another one.

    An instance is of a subclass with the abilities of its inner backend, so that `isinstance(wrapped, SupportsCopy)` and the
    like tell the truth about it.

    Args:
        inner: The backend behind; closing the wrapper closes it.

    Attributes:
        inner: The backend behind.
    """

    def __new__(cls, inner: StorageBackend, *_: Any, **__: Any) -> Self:
        """Make an instance of the class that has the inner backend's abilities."""
        abilities = [ability for protocol, ability in _ABILITIES.items() if isinstance(inner, protocol)]
        return super().__new__(cast(type[Self], _class_with(cast(Any, cls), tuple(abilities))))

    def __init__(self, inner: StorageBackend) -> None:
        self.inner = inner

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Mapping[str, Any] | None:
        """Store `content`."""
        return await self._at("put_bytes", location, self.inner.put_bytes, content, content_type=content_type)

    async def put_stream(
        self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None
    ) -> Mapping[str, Any] | None:
        """Store what `stream` yields."""
        return await self._at("put_stream", location, self.inner.put_stream, stream, content_type=content_type)

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> ObjectReader:
        """Open a range for reading."""
        reader = await self._at("open", location, self.inner.open, offset=offset, length=length)
        return _wrap_reader(reader, location, self._call)

    async def stat(self, location: str) -> ObjectInfo:
        """Return the properties of an object."""
        return replace(await self._at("stat", location, self.inner.stat), location=location)

    async def exists(self, location: str) -> bool:
        """Return whether an object is at the location."""
        return await self._at("exists", location, self.inner.exists)

    async def delete(self, location: str) -> None:
        """Remove an object; a missing object is not an error."""
        await self._at("delete", location, self.inner.delete)

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose location begins with `prefix`, in the byte order of UTF-8."""
        after = self._listed(start_after) if start_after else None
        async with closing_listing(self.inner.iter_objects(self._listed(prefix), start_after=after)) as objects:
            async for info in objects:
                yield replace(info, location=self._outside(info.location))

    async def aclose(self) -> None:
        """Close the inner backend."""
        await self._call("aclose", [], self.inner.aclose)

    def _inside(self, location: str) -> str:
        """The inner backend's name for a location, which is checked."""
        return location

    def _listed(self, text: str) -> str:
        """The inner backend's name for the beginning of a location, which is taken literally."""
        return text

    def _outside(self, location: str) -> str:
        """Our name for a location of the inner backend."""
        return location

    def _own_identity(self, identity: str) -> str:
        """Our identity, for one of the inner backend."""
        return identity

    def _own_place(self, place: Place) -> Place:
        """Our place, for one of the inner backend."""
        return place

    async def _at(
        self, operation: str, location: str, call: Callable[Concatenate[str, P], Awaitable[T]], *args: P.args, **options: P.kwargs
    ) -> T:
        """Make a call of the inner backend about one location."""
        inside = self._inside(location)
        return await self._call(operation, [location], lambda: call(inside, *args, **options))

    async def _call(self, operation: str, locations: Iterable[str], call: Callable[[], Awaitable[T]]) -> T:
        """Make one call of the inner backend; an error about one of our locations says our name for it."""
        try:
            return await call()
        except BackendError as error:
            for location in locations:
                if error.location == self._inside(location):
                    error.location = location
            raise


class _Abilities(WrappedBackend):
    """Every optional ability; an instance is of a class with those of them that its inner backend has."""

    inner: Any

    async def copy(self, source: str, target: str) -> Mapping[str, Any] | None:
        """Copy bytes and content type."""
        inside = self._inside(source), self._inside(target)
        return await self._call("copy", [source, target], lambda: self.inner.copy(*inside))

    async def delete_many(self, locations: Sequence[str]) -> Mapping[str, BackendError]:
        """Delete all; return the ones that could not be, each with its error."""
        inside = {self._inside(location): location for location in locations}
        failures = await self._call("delete_many", locations, lambda: self.inner.delete_many(list(inside)))
        for location, error in failures.items():
            error.location = inside[location]
        return {inside[location]: error for location, error in failures.items()}

    async def cleanup_incomplete(self, *, older_than: timedelta) -> int:
        """Remove what unfinished writes left behind, in the whole inner backend."""
        return await self._call("cleanup_incomplete", [], lambda: self.inner.cleanup_incomplete(older_than=older_than))

    async def now(self) -> datetime:
        """Return the time by the inner backend's clock."""
        return await self._call("now", [], self.inner.now)

    @property
    def extra_keys(self) -> frozenset[str]:
        """The keys that the inner backend adds to a ref's `extra`."""
        keys: frozenset[str] = self.inner.extra_keys
        return keys

    async def is_mounted(self) -> bool:
        """Return whether the inner backend's store is there and was written to before."""
        return await self._call("is_mounted", [], self.inner.is_mounted)

    async def identities(self, *, create: bool = False) -> Sequence[str]:
        """Return every identity that the inner backend's store answers to, as those of the part of it that is seen here."""
        found = await self._call("identities", [], lambda: self.inner.identities(create=create))
        return tuple(map(self._own_identity, found))

    async def places(self) -> frozenset[Place]:
        """Return every name of the part of the inner backend's place that is seen here."""
        return frozenset(map(self._own_place, await self._call("places", [], self.inner.places)))

    async def abort_upload(self, location: str, upload_id: str | None) -> None:
        """Abort an unfinished upload until no part of it is left."""
        await self._at("abort_upload", location, self.inner.abort_upload, upload_id)

    async def presign_get(self, location: str, **options: Any) -> str:
        """Return a URL that serves a GET of the object until it expires."""
        return await self._at("presign_get", location, self.inner.presign_get, **options)

    async def presign_many(self, requests: Sequence[PresignRequest]) -> Sequence[str]:
        """Return a URL for each request, which serves a GET of the object until it expires."""
        inside = [replace(request, location=self._inside(request.location)) for request in requests]
        locations = [request.location for request in requests]
        return await self._call("presign_many", locations, lambda: self.inner.presign_many(inside))

    async def presign_upload(self, location: str, **options: Any) -> UploadRequest:
        """Return a request that stores an object at exactly this location."""
        return await self._at("presign_upload", location, self.inner.presign_upload, **options)


_ABILITIES: dict[type, str] = {
    SupportsCopy: "copy",
    SupportsBatchDelete: "delete_many",
    SupportsCleanup: "cleanup_incomplete",
    SupportsClock: "now",
    SupportsExtraKeys: "extra_keys",
    SupportsMountCheck: "is_mounted",
    SupportsIdentity: "identities",
    SupportsPlaces: "places",
    SupportsAbort: "abort_upload",
    SupportsPresign: "presign_get",
    SupportsBatchPresign: "presign_many",
    SupportsPresignedUpload: "presign_upload",
}


@cache
def _class_with(cls: Any, abilities: tuple[str, ...]) -> type[WrappedBackend]:
    base = type("_Abilities", (WrappedBackend,), {name: vars(_Abilities)[name] for name in abilities})
    bases = (base,) if issubclass(base, cls) else (cls, base)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _wrap_reader(inner: ObjectReader, location: str, call: Callable[..., Awaitable[Any]]) -> ObjectReader:
    wrapper = ReopeningReader if isinstance(inner, SupportsReopen) else WrappedReader
    return wrapper(inner, location, call)


class WrappedReader:
    """A reader of the inner backend, under our name for its location."""

    def __init__(self, inner: ObjectReader, location: str, call: Callable[..., Awaitable[Any]]) -> None:
        self.info: ObjectInfo = replace(inner.info, location=location)
        self._inner = inner
        self._location = location
        self._call = call

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all remaining ones if negative."""
        chunk: bytes = await self._call("read", [self._location], lambda: self._inner.read(size))
        return chunk

    async def aclose(self) -> None:
        """Release what the reader holds."""
        await self._inner.aclose()


class ReopeningReader(WrappedReader):
    """One that opens its object again."""

    @property
    def max_attempts(self) -> int:
        """What the inner reader says."""
        return cast(SupportsReopen, self._inner).max_attempts

    async def reopen(self, offset: int, length: int, /) -> ObjectReader:
        """Open a range of the object that the inner reader is of."""
        inner = cast(SupportsReopen, self._inner)
        reader = await self._call("open", [self._location], lambda: inner.reopen(offset, length))
        return _wrap_reader(reader, self._location, self._call)


class PrefixedBackend(WrappedBackend):
    """Stores everything under one prefix of another backend, and accesses nothing outside it.

    It promises what the inner backend promises, has the same abilities, and costs a string per call. Only `cleanup_incomplete`
    reaches further: it clears up after the unfinished writes of the whole inner backend. Its identity is that of the inner
    backend with the prefix, so that rows of another prefix are detected.

    Args:
        inner: The backend behind. Closing this one closes it.
        prefix: Whole segments, such as `tenants/7`: `a` never sees what is under `ab`.

    Attributes:
        inner: The backend behind.
        prefix: The prefix.

    Raises:
        ConfigurationError: The prefix is empty, or a segment of it is not safe.

    Example:
        >>> import asyncio
        >>> from granite_storage.backends.memory import MemoryStorageBackend
        >>> memory = MemoryStorageBackend()
        >>> asyncio.run(PrefixedBackend(memory, "tenants/7").put_bytes("logo.png", b"..."))
        >>> asyncio.run(memory.exists("tenants/7/logo.png"))
        True
    """

    def __init__(self, inner: StorageBackend, prefix: str) -> None:
        super().__init__(inner)
        try:
            check_location(prefix)
            for segment in prefix.split("/"):
                check_segment(segment)
        except InvalidLocationError as error:
            raise ConfigurationError(f"prefix {prefix!r} cannot be used: {error}") from error
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"PrefixedBackend({self.inner!r}, {self.prefix!r})"

    def _inside(self, location: str) -> str:
        check_location(location)
        return self._listed(location)

    def _listed(self, text: str) -> str:
        return f"{self.prefix}/{text}"

    def _outside(self, location: str) -> str:
        return location.removeprefix(f"{self.prefix}/")

    def _own_identity(self, identity: str) -> str:
        """Return an identity of the inner store with the prefix; `X//prefix` in its marker says that `X` was what is below."""
        other, is_given, below = identity.partition("//")
        if is_given and below == self.prefix:
            return other
        if is_given and below.startswith(f"{self.prefix}/"):
            return f"{other}//{below.removeprefix(f'{self.prefix}/')}"
        return f"{identity}/{self.prefix}"

    def _own_place(self, place: Place) -> Place:
        return place.below(self.prefix)
