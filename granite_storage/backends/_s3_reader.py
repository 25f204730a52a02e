"""Bytes on their way out of S3: never fewer than there are, never of two versions of an object."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from granite_storage.backends._s3_client import Lease, S3Client, version_of
from granite_storage.backends._s3_errors import PreconditionFailedError, RangeNotSatisfiableError
from granite_storage.backends.base import ByteRange, ObjectInfo, byte_range, check_range
from granite_storage.exceptions import BackendError, BackendUnavailableError

__all__ = ["S3ObjectReader", "info_of", "open_reader"]


def info_of(location: str, answer: Mapping[str, Any], size: int) -> ObjectInfo:
    """Return what an answer of the SDK says of an object."""
    modified: datetime = answer["LastModified"]
    etag = str(answer.get("ETag") or "").strip('"') or None
    return ObjectInfo(location, size, modified.astimezone(UTC), etag, answer.get("ContentType"))


async def open_reader(client: S3Client, location: str, *, offset: int, length: int | None) -> S3ObjectReader:
    """Open a range of an object, by one request wherever there is a byte to read."""
    check_range(offset, length)
    if length == 0:
        return await _open_empty(client, location, offset)
    wanted: dict[str, str] = {}
    if offset or length is not None:
        wanted["Range"] = _range_header(offset, None if length is None else offset + length)
    try:
        answer, lease = await client.start("get_object", location=location, **wanted)
    except RangeNotSatisfiableError:
        return await _open_empty(client, location, offset)
    try:
        info = info_of(location, answer, _whole_size(answer))
        answered = _answered_range(answer, info.size)
        if answered != byte_range(offset, length, info.size):
            raise BackendError(f"the server sent another range of {location!r} than was asked for", location=location)
    except BaseException:
        lease.release()
        raise
    return S3ObjectReader(client, info, answered, answer, lease)


async def _open_empty(client: S3Client, location: str, offset: int) -> S3ObjectReader:
    head = await client.head(location)
    info = info_of(location, head, head["ContentLength"])
    return S3ObjectReader(client, info, byte_range(offset, 0, info.size), head, None)


def _range_header(start: int, stop: int | None) -> str:
    return f"bytes={start}-{'' if stop is None else stop - 1}"


def _whole_size(answer: Mapping[str, Any]) -> int:
    content_range = answer.get("ContentRange")
    return int(content_range.rpartition("/")[2]) if content_range else int(answer["ContentLength"])


def _answered_range(answer: Mapping[str, Any], size: int) -> ByteRange:
    content_range = answer.get("ContentRange")
    if not content_range:
        return ByteRange(0, size)
    start, _, last = content_range.removeprefix("bytes ").partition("/")[0].partition("-")
    return ByteRange(int(start), int(last) + 1)


class S3ObjectReader:
    """A range of an object; where its body is cut off, the rest is asked for again, of the same version only.

    It holds one of the client's connections until it is read to its end or closed.
    """

    def __init__(
        self, client: S3Client, info: ObjectInfo, wanted: ByteRange, answer: Mapping[str, Any], lease: Lease | None
    ) -> None:
        self.info = info
        self._client = client
        self._position = wanted.start
        self._stop = wanted.stop
        self._same = {**({"IfMatch": answer["ETag"]} if "ETag" in answer else {}), **version_of(answer)}
        self._lease = lease
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
            chunk = await self._read_some(min(size, self._stop - self._position))
            if chunk:
                return chunk
        return b""

    async def aclose(self) -> None:
        """Give the connection back, or close it where bytes are still to come on it; idempotent."""
        self._closed = True
        self._let_go()

    async def _read_all(self) -> bytes:
        chunks = []
        while self._position < self._stop:
            chunks.append(await self.read(self._stop - self._position))
        return b"".join(chunks)

    async def _read_some(self, size: int) -> bytes:
        """Return the next bytes of the body; none where it was cut off and has been opened again."""
        if self._closed:
            raise BackendError(f"the reader of {self.info.location!r} is closed", location=self.info.location)
        if self._lease is None:  # a read was cancelled while it opened the body again
            await self._reopen(None)
            return b""
        try:
            chunk: bytes = await self._lease.body.read(size)
        except Exception as error:  # noqa: BLE001  # whatever it is, the body is over
            await self._reopen(error)
            return b""
        if not chunk:
            await self._reopen(None)
            return b""
        self._cuts = 0
        self._position += len(chunk)
        if self._position == self._stop:
            self._let_go()
        return chunk

    async def _reopen(self, cut: Exception | None) -> None:
        location = self.info.location
        self._let_go()
        self._cuts += 1
        if self._cuts >= self._client.settings.max_attempts:
            message = f"the body of {location!r} was cut off {self._cuts} times at byte {self._position}"
            raise BackendUnavailableError(message, location=location) from cut
        wanted = _range_header(self._position, self._stop)
        try:
            answer, lease = await self._client.start("get_object", location=location, Range=wanted, **self._same)
        except PreconditionFailedError as error:
            raise BackendError(f"{location!r} was replaced while it was read", location=location) from error.__cause__
        if _answered_range(answer, _whole_size(answer)) != ByteRange(self._position, self._stop):
            lease.release()
            raise BackendError(f"the server does not go on with {location!r} where it was cut off", location=location)
        self._lease = lease

    def _let_go(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None
