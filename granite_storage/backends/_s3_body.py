"""Bytes on their way to S3: cut into parts without being joined, hashed off the loop."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn, Protocol

__all__ = ["Body", "BytesSource", "PartSource", "StreamSource", "base64_text"]

Piece = bytes | memoryview

SMALL = 256 * 1024
"""Up to this size a body is sent as plain `bytes`, and larger ones in slices of it."""

UNRESERVED = 1024 * 1024
"""What a stream may hold in memory without a reservation, in bytes: small objects never wait for large ones."""

_SLIVER = 64 * 1024


class Body:
    """The bytes of one request: any number of pieces, which are never joined, and can be sent again.

    The SDK takes it for a file of known length; the HTTP client under it iterates it.

    Attributes:
        pieces: The bytes.
        sent: Whether all of them may have reached the server, in this attempt or an earlier one; before, it can have stored
            nothing.
    """

    def __init__(self, pieces: Sequence[Piece], room: asyncio.Semaphore | None = None) -> None:
        self.pieces = pieces
        self.sent = False
        self._room = room
        self._size = sum(map(len, pieces))
        self._deadline: asyncio.Timeout | None = None
        self._patience = 0.0

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1, /) -> NoReturn:
        """Exist, so that the SDK takes this for a file; it is never called."""
        raise TypeError("the body is iterated, not read")

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Do nothing: every iteration begins at the start."""
        return 0

    def drop(self, _: object = None) -> None:
        """Let go of the bytes, and of the room in memory that was reserved for them; idempotent, and fit for a callback."""
        self.pieces = ()
        room, self._room = self._room, None
        if room is not None:
            room.release()

    def payload(self) -> Any:
        """Return what to give to the SDK: the bytes themselves where they are few, which is faster."""
        if len(self) > SMALL:
            return self
        self.sent = True
        return b"".join(self.pieces)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        left = len(self)
        for piece in self.pieces:
            view = memoryview(piece)
            for start in range(0, len(view), SMALL):
                part = view[start : start + SMALL]
                left -= len(part)
                self.sent = self.sent or not left
                self._postpone()
                yield part
                await asyncio.sleep(0)  # a fast server would otherwise keep the loop to itself

    @asynccontextmanager
    async def watched(self, patience: float) -> AsyncIterator[None]:
        """Raise `TimeoutError` where neither the body nor the answer has moved for so many seconds."""
        self._patience = patience
        try:
            async with asyncio.timeout(patience) as self._deadline:
                yield
        finally:
            self._deadline = None

    def _postpone(self) -> None:
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._patience)

    def digest(self, algorithm: str) -> bytes:
        """Return the hash of the bytes; slow where they are many."""
        digest = hashlib.new(algorithm, usedforsecurity=False)
        for piece in self.pieces:
            digest.update(piece)
        return digest.digest()


def base64_text(digest: bytes) -> str:
    """Return a digest as S3's headers have it."""
    return base64.b64encode(digest).decode()


class PartSource(Protocol):
    """Where the parts of an object come from, in order.

    Attributes:
        size: How many bytes there will be, None where that is not known.
    """

    size: int | None

    async def take(self, size: int) -> Body:
        """Return the next `size` bytes, fewer only where they end; who takes them drops them."""
        ...

    async def ended(self) -> bool:
        """Tell whether nothing is left."""
        ...

    def give_back(self, body: Body) -> None:
        """Have what was taken last taken again."""
        ...

    def close(self) -> None:
        """Drop what was given back; idempotent."""
        ...


class BytesSource:
    """Parts of bytes in memory, none of which is copied."""

    def __init__(self, content: bytes) -> None:
        self.size: int | None = len(content)
        self._content = content
        self._position = 0

    async def take(self, size: int) -> Body:
        """Return the next bytes; see `PartSource`."""
        start = self._position
        self._position = min(start + size, len(self._content))
        return Body([memoryview(self._content)[start : self._position]])

    async def ended(self) -> bool:
        """Tell whether nothing is left."""
        return self._position == len(self._content)

    def give_back(self, body: Body) -> None:
        """Have the last bytes taken again; see `PartSource`."""
        self._position -= len(body)

    def close(self) -> None:
        """Do nothing: the bytes are the caller's."""


class StreamSource:
    """Parts of a stream; all have the size that is asked for, to the byte, since some servers want them equal.

    Args:
        stream: The stream.
        room: How many parts of all streams may be in memory; one that is larger than `UNRESERVED` waits for its place.
        size: How many bytes the stream will yield, None where that is not known.
    """

    def __init__(self, stream: AsyncIterator[bytes], room: asyncio.Semaphore, size: int | None = None) -> None:
        self.size = size
        self._stream = stream
        self._room = room
        self._rest: Piece = b""
        self._over = False
        self._returned: Body | None = None

    async def take(self, size: int) -> Body:
        """Return the next bytes; see `PartSource`."""
        if self._returned is not None:
            body, self._returned = self._returned, None
            return body
        pieces = _Pieces()
        room: asyncio.Semaphore | None = None
        try:
            while len(pieces) < size and not await self.ended():
                if room is None and len(pieces) >= UNRESERVED:
                    await self._room.acquire()
                    room = self._room
                pieces.add(self._cut(size - len(pieces)))
        except BaseException:
            if room is not None:
                room.release()
            raise
        return Body(pieces.finish(), room)

    async def ended(self) -> bool:
        """Tell whether nothing is left, which the stream itself must have said."""
        while not (self._rest or self._over or self._returned):
            try:
                self._rest = await anext(self._stream)
            except StopAsyncIteration:
                self._over = True
        return not self._rest and self._returned is None

    def give_back(self, body: Body) -> None:
        """Have a whole part taken again; see `PartSource`."""
        if len(body):
            self._returned = body

    def close(self) -> None:
        """Drop what was given back; see `PartSource`."""
        if self._returned is not None:
            self._returned.drop()
            self._returned = None

    def _cut(self, size: int) -> Piece:
        piece, rest = self._rest, self._rest[:0]
        if len(piece) > size:
            piece, rest = memoryview(piece)[:size], memoryview(piece)[size:]
        self._rest = rest
        return piece


class _Pieces:
    """Collects pieces, and joins those that are so small that a list of them would be larger than they are."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._slivers: list[Piece] = []
        self._pending = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, piece: Piece) -> None:
        self._size += len(piece)
        if len(piece) >= _SLIVER and not self._slivers:
            self._pieces.append(piece)
            return
        self._slivers.append(piece)
        self._pending += len(piece)
        if self._pending >= SMALL:
            self._join()

    def finish(self) -> list[Piece]:
        self._join()
        return self._pieces

    def _join(self) -> None:
        if self._slivers:
            self._pieces.append(self._slivers[0] if len(self._slivers) == 1 else b"".join(self._slivers))
            self._slivers = []
            self._pending = 0
