"""Objects that a store of obstore's sends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from granite_storage._tasks import finish
from granite_storage.backends._obstore_client import PATIENCE, StoreClient
from granite_storage.backends._remote import Opened
from granite_storage.backends.base import ByteRange, ObjectInfo
from granite_storage.exceptions import BackendError

__all__ = ["StoreService"]

_LARGEST = (1 << 63) - 1
_ATTEMPTS = 5


class StoreService:
    """A store, as a reader asks it; see `Service`."""

    attempts = _ATTEMPTS

    def __init__(self, client: StoreClient) -> None:
        self._client = client

    async def get(self, location: str, start: int, stop: int | None, same: Mapping[str, Any] | None = None, /) -> Opened:
        """Ask for a range; see `Service.get`."""
        options = dict(same or {})
        if start or stop is not None:
            options["range"] = (start, _LARGEST if stop is None else min(stop, _LARGEST))
        answer = await self._client.get(location, options)
        sent = ByteRange(*answer.range)
        this = {"if_match": answer.version} if answer.version else {}
        return Opened(answer.info, sent, _StreamBody(location, answer.body, sent.stop - sent.start), this)

    async def head(self, location: str, /) -> ObjectInfo:
        """Ask what is known of an object; see `Service.head`."""
        info, _ = await self._client.head(location)
        return info


class _StreamBody:
    """The chunks of a stream of obstore's, each asked for when the one before it has been handed on, not when it is wanted.

    So obstore puts a chunk together while the one before it is used. What it was asked for is kept here until it is taken or the
    body is closed: in obstore's future it would be lost with a read that is cancelled.
    """

    def __init__(self, location: str, stream: Any, size: int) -> None:
        self._location = location
        self._stream: Any = stream
        self._left = size
        self._rest = memoryview(b"")
        self._coming: asyncio.Future[bytes] | None = None

    async def read(self, size: int, /) -> bytes:
        if not self._rest:
            chunk = await self._next_chunk()
            if len(chunk) <= size:
                self._ask_ahead()
                return bytes(chunk)  # the same object where it is bytes, as what comes over a network is
            self._rest = memoryview(chunk)
        piece, self._rest = self._rest[:size], self._rest[size:]
        if not self._rest:
            self._ask_ahead()
        return bytes(piece)

    async def aclose(self) -> None:
        """Wait for what was asked for, at most a second: one that is still to come when the program ends could abort it."""
        coming, self._coming, self._stream = self._coming, None, None
        if coming is None:
            return
        try:
            if not coming.done():
                await finish(asyncio.wait([coming], timeout=PATIENCE), f"closing a reader of {self._location!r}")
        finally:
            if not coming.cancel() and not coming.cancelled():
                coming.exception()  # nobody else will look at it

    async def _next_chunk(self) -> bytes:
        coming = self._coming or self._stream.__anext__()
        self._coming = coming
        try:
            chunk: bytes = await asyncio.shield(coming)
        except StopAsyncIteration:
            chunk = b""
        self._coming = None
        self._left -= len(chunk)
        if self._left < 0:
            raise BackendError(f"the service sent more of {self._location!r} than was asked for", location=self._location)
        return chunk

    def _ask_ahead(self) -> None:
        if self._left:
            self._coming = self._stream.__anext__()
