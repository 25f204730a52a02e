"""Serving signed and public URLs."""

from __future__ import annotations

import logging
import time
import unicodedata
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from granite_storage._documentation import Page
from granite_storage._engine import places_of
from granite_storage._headers import INLINE_TYPES, require_inline_types, url_path
from granite_storage._problems import RETRY_AFTER
from granite_storage.backends.base import Place
from granite_storage.exceptions import (
    BackendUnavailableError,
    ConfigurationError,
    InvalidLocationError,
    ObjectNotFoundError,
    UnknownBackendError,
)
from granite_storage.inspection._media_names import extension, types_by_extension
from granite_storage.locations import GENERATED_ID_LENGTH, STAGED_NAME, check_location, generated_id, matches_generated_name
from granite_storage.manager import StorageManager
from granite_storage.policies import StoragePolicy
from granite_storage.refs import StoredObjectRef
from granite_storage.web._upload_tokens import path_below, token_of
from granite_storage.web.responses import StoredObjectResponse, is_request, send_status

logger: logging.Logger = logging.getLogger("granite_storage")


class SignedFiles:
    """An ASGI application that serves the URLs that `StorageManager.url` signs; mount it at the signer's base URL.

    An invalid URL is answered with 403 before any storage is touched, whether it is expired, changed, cut, written otherwise,
    has a query, or was signed with a key that is gone. A valid one is answered as by `StoredObjectResponse`.

    Args:
        manager: The manager; it must have a `url_signer`.
        inline_types: The media types that may be shown inline where a URL allows it.
        caching: How an answer may be kept: `revalidate` by a browser that asks each time whether it changed, `private` by a
            browser, and `shared` by caches in front of the application as well, in both cases no longer than the URL works.
            Caches answer by the URL alone, which stays the same with `stable_for`.

    Raises:
        ConfigurationError: The manager has no signer, `inline_types` has one that must not be shown, or `caching` is not known.

    Example:
        ```python
        app.mount("/files", SignedFiles(manager))
        ```
    """

    def __init__(
        self,
        manager: StorageManager,
        *,
        inline_types: Collection[str] = INLINE_TYPES,
        caching: Literal["revalidate", "private", "shared"] = "revalidate",
    ) -> None:
        if caching not in ("revalidate", "private", "shared"):
            raise ConfigurationError(f"caching must be 'revalidate', 'private' or 'shared', not {caching!r}")
        if manager.url_signer is None:
            raise ConfigurationError("the manager cannot sign URLs: pass url_signer= to StorageManager", see=Page.SIGNED_URLS)
        self._manager = manager
        self._signer = manager.url_signer
        self._inline_types = require_inline_types(inline_types)
        self._scope = {"private": "private", "shared": "public"}.get(caching)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if not await is_request(scope, send, ("GET", "HEAD"), "SignedFiles"):
            return
        token = token_of(scope)
        signed = None if token is None else self._signer.verify(token)
        if signed is None:
            await send_status(send, 403)
            return
        response = StoredObjectResponse(
            signed.ref,
            Request(scope),
            manager=self._manager,
            disposition=signed.disposition,
            filename=signed.filename,
            inline_types=self._inline_types,
            cache_control=self._scope and f"{self._scope}, max-age={max(0, int(signed.expires - time.time()))}",
        )
        async with _answering_errors(send) as send:
            await response(scope, receive, send)


@asynccontextmanager
async def _answering_errors(send: Send) -> AsyncIterator[Send]:
    """Answer an error of the storage in the block, where nothing has been sent yet by what is yielded."""
    begun = False

    async def noting(message: Message) -> None:
        nonlocal begun
        begun = True
        await send(message)

    try:
        yield noting
    except (BackendUnavailableError, InvalidLocationError, UnknownBackendError) as error:
        if begun:
            raise
        logger.error("the object of a URL could not be served", exc_info=error)
        match error:
            case BackendUnavailableError():
                await send_status(send, 503, [("retry-after", str(RETRY_AFTER))])
            case UnknownBackendError():
                await send_status(send, 404)
            case _:
                await send_status(send, 403)


class PublicFiles:
    """An ASGI application that serves the objects of public policies at their locations; mount it at their base URL.

    It answers GET and HEAD as `StoredObjectResponse` does, with the Cache-Control of the policy and an ETag made of the location,
    which never gets another object. A URL that is written otherwise than `public_url` writes it, or has a query, is answered with
    404, because a cache would keep it by itself, and no purge would find it there.

    The location alone decides what is served, so a public policy must not share its locations with another policy; a
    configuration in which it would is refused. Direct uploads that are not finished are not served, nor are objects whose names
    the library has not generated.

    The media type is that which the backend keeps, and on a local disk that of the extension. It is sent as a download of type
    `application/octet-stream` where a browser might run it.

    Args:
        manager: The manager.
        inline_types: The media types that may be shown inline, where the policy allows it.

    Raises:
        ConfigurationError: No policy is public; or another policy may have objects where those of a public one are: it has the
            same or an overlapping `key_prefix`, or one of the two has none, and they share a backend. If two backends lead to
            the same place, each request raises it.

    Example:
        ```python
        app.mount("/media", PublicFiles(manager))
        ```
    """

    def __init__(self, manager: StorageManager, *, inline_types: Collection[str] = INLINE_TYPES) -> None:
        self._manager = manager
        self._inline_types = require_inline_types(inline_types)
        self._public = [policy for policy in manager.policies.values() if policy.public is not None]
        if not self._public:
            raise ConfigurationError(
                "no policy is public: pass public=PublicURL('https://...') to one of them", see=Page.PUBLIC_FILES
            )
        self._foreign = list(self._pairs())
        for policy, other in self._foreign:
            shares = manager.backend(policy.backend_key) is manager.backend(other.backend_key)
            if (shares or other.public is not None) and _may_meet(_segments(policy), _segments(other)):
                raise _indistinct(policy, other)
        self._has_places_apart = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if not await is_request(scope, send, ("GET", "HEAD"), "PublicFiles"):
            return
        if not self._has_places_apart:
            await self._require_places_apart()
        location = path_below(scope)
        policy = self._policy_at(location) if _is_canonical(scope, location) else None
        async with _answering_errors(send) as send:
            found = None if policy is None else await self._find(policy, location)
            if policy is None or policy.public is None or found is None:
                await send_status(send, 404)
                return
            ref, etag = found
            response = StoredObjectResponse(
                ref,
                Request(scope),
                manager=self._manager,
                disposition=policy.public.disposition,
                inline_types=self._inline_types,
                cache_control=policy.public.cache_control,
                headers={"ETag": etag},
            )
            await response(scope, receive, send)

    def _policy_at(self, location: str) -> StoragePolicy | None:
        """Return the public policy whose objects are at a location; None where it is none of the library's making."""
        try:
            check_location(location)
        except InvalidLocationError:
            return None
        if not matches_generated_name(location) or _name_in(location) == STAGED_NAME:
            return None
        return next((policy for policy in self._public if location.startswith(_beginning(policy))), None)

    async def _find(self, policy: StoragePolicy, location: str) -> tuple[StoredObjectRef, str] | None:
        """Return a ref to what is at a location, and its entity tag; None where nothing is."""
        place = StoredObjectRef(
            storage_key=policy.storage_key, backend=policy.backend_key, location=location, size=0, checksum=""
        )
        try:
            info = await self._manager.stat(place)
        except ObjectNotFoundError:
            return None
        name = _name_in(location)
        ref = replace(
            place,
            size=info.size,
            content_type=info.content_type or types_by_extension().get(extension(name)),
            original_filename=name,
            created_at=info.modified.isoformat(),
        )
        return ref, f'"{generated_id(location)}"'

    def _pairs(self) -> Iterator[tuple[StoragePolicy, StoragePolicy]]:
        """Yield each public policy with each other one that is not public at the same place in the same way."""
        for policy in self._public:
            for other in self._manager.policies.values():
                if (other.public, other.backend_key) != (policy.public, policy.backend_key):
                    yield policy, other

    async def _require_places_apart(self) -> None:
        """Refuse two backends that lead to the same objects, one of a public policy and one of another one."""
        for policy, other in self._foreign:
            places, others = await self._places(policy), await self._places(other)
            if any(place.store == that.store and _may_meet(place.path, that.path) for place in places for that in others):
                raise _indistinct(policy, other)
        self._has_places_apart = True

    async def _places(self, policy: StoragePolicy) -> list[Place]:
        places = await places_of(self._manager.backend(policy.backend_key)) or ()
        return [Place(place.store, (*map(_folded, place.path), *_segments(policy))) for place in places]


def _name_in(location: str) -> str:
    """Return what stands after the id in the last segment of a location."""
    return location.rpartition("/")[2][GENERATED_ID_LENGTH + 1 :]


def _is_canonical(scope: Scope, location: str) -> bool:
    """Return whether a URL is as `public_url` writes it: caches store every other spelling separately, and no purge finds it."""
    raw: bytes | None = scope.get("raw_path")
    return not scope.get("query_string") and (raw is None or raw.endswith(f"/{url_path(location)}".encode()))


def _beginning(policy: StoragePolicy) -> str:
    return f"{policy.key_prefix}/" if policy.key_prefix else ""


def _segments(policy: StoragePolicy) -> tuple[str, ...]:
    """Return the segments of a policy's prefix, as a disk that ignores case and the form of accents tells them apart."""
    return tuple(map(_folded, policy.key_prefix.split("/"))) if policy.key_prefix else ()


def _folded(segment: str) -> str:
    return unicodedata.normalize("NFKC", segment.casefold())


def _may_meet(segments: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether an object can be below both."""
    common = min(len(segments), len(others))
    return segments[:common] == others[:common]


def _indistinct(policy: StoragePolicy, other: StoragePolicy) -> ConfigurationError:
    return ConfigurationError(
        f"PublicFiles cannot tell the objects of the public policy {policy.storage_key!r} from those of {other.storage_key!r}: "
        f"their locations begin with {_beginning(policy)!r} and {_beginning(other)!r} in one store; give each its own "
        "key_prefix, or the public policy its own backend",
        see=Page.PUBLIC_FILES,
    )
