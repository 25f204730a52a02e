"""Identifies the store of a backend: by the identities in its marker, and by the names of its place."""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from granite_storage.backends.base import Place
from granite_storage.exceptions import AccessDeniedError, ObjectExistsError, ObjectNotFoundError
from granite_storage.locations import RESERVED_PREFIX, uuid7_hex

MARKER = f"{RESERVED_PREFIX}storage"
"""The name of the marker. It tells a store that is in use from an empty one, and holds its identities."""

MARKER_SIZE = 64 * 1024
"""How much of a marker is read, in bytes."""

AMAZON_DOMAINS = (".amazonaws.com", ".amazonaws.com.cn")
"""How the names of Amazon's own servers end."""

_IDENTITY = re.compile(rb"[!-~]{8,200}")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})  # noqa: S104  # nothing is bound to it


def identities_in(marker: bytes) -> tuple[str, ...]:
    """Return the identities that a marker holds, the one for new objects first; all other lines are skipped."""
    lines = (line.strip() for line in marker.splitlines())
    return tuple(dict.fromkeys(line.decode() for line in lines if _IDENTITY.fullmatch(line)))


def new_marker() -> bytes:
    """Return what is written to a marker that holds no identity yet."""
    return f"{uuid7_hex()}\n".encode()


class IdentityObject:
    """The marker of a store on a service, where it is an object beside the others.

    It does not hold its backend: in a cycle, a backend that is dropped would not have its client closed.
    """

    def __init__(self) -> None:
        self._known: tuple[str, ...] = ()
        self._locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    async def identities(
        self, read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Awaitable[object]], *, create: bool
    ) -> Sequence[str]:
        """Return the identities; see `SupportsIdentity.identities`.

        Args:
            read: Returns the object's first `MARKER_SIZE` bytes; raises `ObjectNotFoundError` where it is not there.
            write: Creates the object; raises `ObjectExistsError` where it is there already.
            create: Whether to create the object where it is not there.
        """
        if not create:
            return await _found(read)
        if not self._known:
            async with self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
                if not self._known:
                    self._known = await _found_or_created(read, write)
        return self._known


async def _found(read: Callable[[], Awaitable[bytes]]) -> tuple[str, ...]:
    try:
        return identities_in(await read())
    except ObjectNotFoundError:
        return ()


async def _found_or_created(read: Callable[[], Awaitable[bytes]], write: Callable[[bytes], Awaitable[object]]) -> tuple[str, ...]:
    try:
        found = await _found(read)
    except AccessDeniedError:  # without s3:ListBucket, S3 denies access to missing objects too
        found = ()
    if found:
        return found
    with suppress(ObjectExistsError):  # another process was faster, or it is an object without an identity
        await write(new_marker())
    return await _found(read)


# The names of the place where a backend keeps its objects, by which two backends on one store are detected.


def folder_places(folder: Path) -> frozenset[Place]:
    """Return the names of a folder: its path without links, and the inode of it and of every folder above; blocking.

    A bind mount, another spelling on a file system that ignores case, and a link to a folder above all lead to a known inode.
    """
    real = Path(os.path.realpath(folder))
    places = {Place("disk", real.parts)}
    for above in (real, *real.parents):
        try:
            found = os.stat(above)
        except OSError:
            continue  # it is not there yet, or may not be looked at
        places.add(Place(f"inode {found.st_dev}:{found.st_ino}", real.parts[len(above.parts) :]))
    return frozenset(places)


def bucket_place(service: str, endpoint: str | None, bucket: str, prefix: str) -> Place:
    """Return the place of a prefix in a bucket.

    Args:
        service: The kind of service, such as `s3`.
        endpoint: The server's URL; None for the service's own, in which a bucket's name is unique.
        bucket: The bucket.
        prefix: What stands before each location in it.
    """
    server = "" if endpoint is None else _server(endpoint, bucket)
    return Place(f"{service} {server}/{bucket}", tuple(_segments(prefix)))


def web_place(url: str) -> Place:
    """Return the place of what is below a URL."""
    return Place(f"web {_server(url, '')}", tuple(_segments(urlsplit(url).path)))


def _server(endpoint: str, bucket: str) -> str:
    """Return a server's canonical name; empty for Amazon's servers, across which bucket names are unique."""
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    host = (parts.hostname or "").rstrip(".").lower()
    if host.endswith(AMAZON_DOMAINS):
        return ""
    host = host.removeprefix(f"{bucket.lower()}.") if bucket else host
    if host in _THIS_MACHINE:
        host = "localhost"
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    return host if port in _DEFAULT_PORTS.values() or port is None else f"{host}:{port}"


def _segments(path: str) -> Iterator[str]:
    return filter(None, path.split("/"))
