"""The marker of a store: a file or an object that holds the store's identities, one on each line."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from granite_storage.exceptions import AccessDeniedError, ObjectExistsError, ObjectNotFoundError
from granite_storage.locations import RESERVED_PREFIX, uuid7_hex

__all__ = ["MARKER", "MARKER_SIZE", "IdentityObject", "identities_in", "new_marker"]

MARKER = f"{RESERVED_PREFIX}storage"
"""The name of the marker. It tells a store that is in use from an empty one, and holds its identities."""

MARKER_SIZE = 64 * 1024
"""How much of a marker is read, in bytes."""

_IDENTITY = re.compile(rb"[!-~]{8,200}")


def identities_in(marker: bytes) -> tuple[str, ...]:
    """Return the identities that a marker holds, the one for new objects first; what is no identity is passed over."""
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
    except AccessDeniedError:  # S3 says so of what is not there, to those who may not list
        found = ()
    if found:
        return found
    with suppress(ObjectExistsError):  # another process was faster, or it is an object without an identity
        await write(new_marker())
    return await _found(read)
