"""Writing an object to a store of obstore's: all at once, and known to be there or not when the write returns.

Cancelling an await of obstore drops the request on this side only: 48 of 50 cancelled puts were stored all the same, and a
multipart upload stayed at the server. So a request is cancelled only when its answer did not come in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from granite_storage.backends._obstore_client import OWNER, StoreClient
from granite_storage.backends._remote import MAX_PARTS, Found, RemoteWriter, error_at
from granite_storage.backends.base import object_headers
from granite_storage.exceptions import BackendError, ObjectExistsError, ObjectNotFoundError

Piece: TypeAlias = bytes | memoryview
Receipt: TypeAlias = Mapping[str, Any]

_PUTS = 3
_SLIVER = 256 * 1024
_SLICE = 1 << 20


class ObjectWriter(RemoteWriter):
    """One write of one object; see `RemoteWriter`.

    Args:
        client: The store.
        location: Where the object is to be.
        content_type: Its media type.
        part_size: The size of the parts in bytes; what fits in one is one request.
        part_concurrency: The most parts in flight at a time.
    """

    def __init__(
        self, client: StoreClient, location: str, content_type: str | None, *, part_size: int, part_concurrency: int
    ) -> None:
        super().__init__(location, has_metadata=client.kind.keeps_attributes)
        self._client = client
        self._part_size = part_size
        self._part_concurrency = part_concurrency
        self._attributes: dict[str, str] | None = None
        if self._id is not None:
            # without a type some servers would guess, and serve what claims to be HTML as HTML
            self._attributes = {"Content-Type": content_type or "application/octet-stream", OWNER: self._id}
            headers = object_headers.get()
            if headers is not None:
                self._attributes |= {
                    "Cache-Control": headers.cache_control,
                    "Content-Disposition": headers.content_disposition,
                    "Content-Type": headers.content_type,
                }

    async def write(self, stream: AsyncIterator[Piece]) -> Receipt:
        """Store a stream: by one request where it fits in a part, else by a multipart upload."""
        first: list[Piece] = []
        size = 0
        async with aclosing(_gather(stream)) as pieces:
            async for piece in pieces:
                first.append(piece)
                size += len(piece)
                if size > self._part_size:
                    return await self._put_parts(first, pieces)
        return await self.put(first)

    async def put(self, pieces: Sequence[Piece]) -> Receipt:
        """Store pieces by one request, which is exclusive."""
        try:
            return await self._put(pieces, "create")
        except ObjectExistsError:
            if not self._client.kind.mistakes_parts or await self._client.exists(self._location):
                raise
        return await self._put(pieces, "overwrite")

    async def _put(self, pieces: Sequence[Piece], mode: str) -> Receipt:
        def request(store: Any) -> Awaitable[Receipt]:
            content = pieces[0] if len(pieces) == 1 else iter(pieces) if pieces else b""
            answer: Awaitable[Receipt] = store.put_async(
                self._location, content, attributes=self._attributes, mode=mode, use_multipart=False
            )
            return answer

        return await self._published("put", request, sum(map(len, pieces)), attempts=_PUTS)

    async def copy(self, source: str) -> Receipt:
        """Copy another object inside the store, on the condition that there is none yet where the store knows one."""
        client, target = self._client, self._location
        info, self._id = await client.find(source)
        self._has_own_id = False
        await self._require_absent()

        async def request(store: Any) -> Receipt:
            await store.copy_async(source, target, overwrite=not client.copies_exclusively)
            return {}

        try:
            return await self._published("copy", request, info.size)
        except ObjectNotFoundError as error:
            raise error_at(source, error) from error.__cause__

    async def _put_parts(self, first: list[Piece], rest: AsyncIterator[Piece]) -> Receipt:
        """Store by a multipart upload; obstore has no condition for it, so a HEAD before and after the parts takes its place."""
        from obstore import open_writer_async

        await self._require_absent()
        writer: Any = open_writer_async(
            await self._client.store(),
            self._location,
            attributes=self._attributes,
            buffer_size=self._part_size,
            max_concurrency=self._part_concurrency,
        )
        try:
            size = await self._send(writer, first, rest)
            await self._require_absent()
        except BaseException as error:
            await self._clean_up(_abort(writer, error))
            raise

        async def request(_: Any) -> Receipt:
            return await writer.close() or {}

        return await self._published("put", request, size)

    async def _send(self, writer: Any, first: list[Piece], rest: AsyncIterator[Piece]) -> int:
        size, part_size = 0, self._part_size
        for piece in first:
            size += await self._send_piece(writer, piece)
        first.clear()
        async for piece in rest:
            if size + len(piece) > MAX_PARTS * part_size:
                message = (
                    f"{self._location!r} would have more than {MAX_PARTS} parts of {part_size} bytes: pass a larger part_size"
                )
                raise BackendError(message, location=self._location)
            size += await self._send_piece(writer, piece)
        return size

    async def _send_piece(self, writer: Any, piece: Piece) -> int:
        return await self._answered(self._client.make("put", self._location, lambda _: writer.write(piece)))

    async def _published(
        self, operation: str, request: Callable[[Any], Awaitable[Receipt]], size: int, *, attempts: int = 1
    ) -> Receipt:
        """Make the request that creates the object; a cancelled caller learns what became of it, and undoes it.

        Args:
            operation: What it is called in messages.
            request: Makes it of a store.
            size: The size of the object, in bytes.
            attempts: How often it is made where the service is not available.
        """

        async def send() -> Receipt:
            # Each by itself: for a caller that was cancelled none is made again.
            return await self._answered(self._client.make(operation, self._location, request))

        try:
            return await self._create(send, size, attempts=attempts)
        except asyncio.CancelledError:
            await self._clean_up(self._withdraw())
            raise

    async def _find(self, *, with_checksum: bool = False) -> Found | None:
        try:
            info, write_id = await self._client.find(self._location)
        except ObjectNotFoundError:
            return None
        return Found(write_id, info.size, {})

    async def _remove(self, found: Found | None) -> None:
        await self._client.delete(self._location)


async def slices(content: bytes) -> AsyncIterator[Piece]:
    """Yield content piece by piece, without a copy."""
    view = memoryview(content)
    for start in range(0, len(view), _SLICE):
        yield view[start : start + _SLICE]


async def _gather(stream: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    """Join short chunks: to hand one to obstore costs as much as to copy a few hundred KiB."""
    slivers: list[Piece] = []
    pending = 0
    async for chunk in stream:
        if not slivers and len(chunk) >= _SLIVER:
            yield chunk
            continue
        slivers.append(chunk)
        pending += len(chunk)
        if pending >= _SLIVER:
            yield b"".join(slivers)
            slivers, pending = [], 0
    if slivers:
        yield b"".join(slivers)


async def _abort(writer: Any, error: BaseException) -> None:
    await writer.__aexit__(type(error), error, None)
