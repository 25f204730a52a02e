"""Bytes on their way out of an object store: never fewer than there are, never of two versions of an object."""

from __future__ import annotations

from granite_storage.backends._obstore_client import Answer, StoreClient, answered
from granite_storage.backends._obstore_errors import PreconditionFailedError, RangeNotSatisfiableError
from granite_storage.backends.base import ByteRange, ObjectInfo, byte_range, check_range
from granite_storage.exceptions import BackendError, BackendUnavailableError

__all__ = ["StoreReader", "open_reader"]

_LARGEST = (1 << 63) - 1
_ATTEMPTS = 5


async def open_reader(client: StoreClient, location: str, *, offset: int, length: int | None) -> StoreReader:
    """Open a range of an object, by one request wherever there is a byte to read."""
    check_range(offset, length)
    if length == 0:
        return await _open_empty(client, location, offset)
    stop = _LARGEST if length is None else min(offset + length, _LARGEST)
    options = {"range": (offset, stop)} if offset or length is not None else {}
    try:
        answer = await client.get(location, options)
    except RangeNotSatisfiableError:
        return await _open_empty(client, location, offset)
    wanted = byte_range(offset, length, answer.info.size)
    if ByteRange(*answer.range) != wanted:
        raise BackendError(f"the service sent another range of {location!r} than was asked for", location=location)
    return StoreReader(client, wanted, answer)


async def _open_empty(client: StoreClient, location: str, offset: int) -> StoreReader:
    answer = await client.get(location, {"head": True}, operation="head")
    return StoreReader(client, byte_range(offset, 0, answer.info.size), answer)


class StoreReader:
    """A range of an object; where its body is cut off, the rest is asked for again, of the same version only.

    It holds a connection until it is read to its end or closed.
    """

    def __init__(self, client: StoreClient, wanted: ByteRange, answer: Answer) -> None:
        self.info = answer.info
        self._client = client
        self._position = wanted.start
        self._stop = wanted.stop
        self._version = answer.version
        self._body = answer.body if wanted.start < wanted.stop else None
        self._rest = memoryview(b"")
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
            chunk = self._taken(size) if self._rest else await self._next(size)
            if chunk:
                return chunk
        return b""

    async def aclose(self) -> None:
        """Let go of the connection; idempotent."""
        self._closed = True
        self._let_go()

    async def _read_all(self) -> bytes:
        chunks = []
        while self._position < self._stop:
            chunks.append(await self.read(self._stop - self._position))
        return b"".join(chunks)

    async def _next(self, size: int) -> bytes:
        """Return the next bytes of the body; none where it was cut off and has been opened again."""
        if self._closed:
            raise BackendError(f"the reader of {self.info.location!r} is closed", location=self.info.location)
        body, self._body = self._body, None  # a read that is cancelled loses what it was about to get, so it begins anew
        if body is None:
            await self._reopen(None)
            return b""
        try:
            chunk = await answered(anext(body, b""))
        except Exception as error:  # noqa: BLE001  # whatever it is, the body is over
            await self._reopen(error.with_traceback(None))  # see StoreClient
            return b""
        if not chunk or self._position + len(chunk) > self._stop:
            await self._reopen(None)
            return b""
        self._body, self._cuts = body, 0
        if len(chunk) <= size:
            return self._passed(chunk if isinstance(chunk, bytes) else bytes(chunk))
        self._rest = memoryview(chunk)
        return self._taken(size)

    def _taken(self, size: int) -> bytes:
        if self._closed:
            raise BackendError(f"the reader of {self.info.location!r} is closed", location=self.info.location)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return self._passed(bytes(piece))

    def _passed(self, chunk: bytes) -> bytes:
        self._position += len(chunk)
        if self._position == self._stop:
            self._let_go()
        return chunk

    async def _reopen(self, cut: Exception | None) -> None:
        location = self.info.location
        self._cuts += 1
        if self._cuts >= _ATTEMPTS:
            message = f"the body of {location!r} was cut off {self._cuts} times at byte {self._position}"
            raise BackendUnavailableError(message, location=location) from cut
        wanted = (self._position, self._stop)
        options = {"range": wanted, **({"if_match": self._version} if self._version else {})}
        try:
            answer = await self._client.get(location, options)
        except PreconditionFailedError as error:
            raise BackendError(f"{location!r} was replaced while it was read", location=location) from error.__cause__
        if answer.range != wanted or not self._is_same(answer.info):
            raise BackendError(f"the service does not go on with {location!r} where it was cut off", location=location)
        self._body = answer.body

    def _is_same(self, info: ObjectInfo) -> bool:
        return (info.size, info.etag, info.modified) == (self.info.size, self.info.etag, self.info.modified)

    def _let_go(self) -> None:
        self._body = None
        self._rest = memoryview(b"")
