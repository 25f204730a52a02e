"""Objects that S3 sends."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from granite_storage.backends._remote import Opened
from granite_storage.backends._s3_client import S3Client, version_of
from granite_storage.backends._s3_pool import Lease
from granite_storage.backends._service_errors import ConnectionTakenError
from granite_storage.backends.base import ByteRange, ObjectInfo

__all__ = ["S3Service", "info_of"]


def info_of(location: str, answer: Mapping[str, Any], size: int) -> ObjectInfo:
    """Return what an answer of the SDK says of an object."""
    modified: datetime = answer["LastModified"]
    etag = str(answer.get("ETag") or "").strip('"') or None
    content_type, encoding = answer.get("ContentType"), answer.get("ContentEncoding") or None
    return ObjectInfo(location, size, modified.astimezone(UTC), etag, content_type, encoding)


class S3Service:
    """A bucket, as a reader asks it; see `Service`."""

    def __init__(self, client: S3Client) -> None:
        self.attempts = client.settings.max_attempts
        self._client = client

    async def get(self, location: str, start: int, stop: int | None, same: Mapping[str, Any] | None = None, /) -> Opened:
        """Ask for a range; see `Service.get`."""
        wanted = dict(same or {})
        if start or stop is not None:
            wanted["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        answer, lease = await self._client.start("get_object", location=location, **wanted)
        try:
            size, sent = _size_and_range(answer)
            this = {**({"IfMatch": answer["ETag"]} if "ETag" in answer else {}), **version_of(answer)}
            return Opened(info_of(location, answer, size), sent, _LeasedBody(lease), this)
        except BaseException:
            lease.release()
            raise

    async def head(self, location: str, /) -> ObjectInfo:
        """Ask what is known of an object; see `Service.head`."""
        head = await self._client.head(location)
        return info_of(location, head, head["ContentLength"])


class _LeasedBody:
    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        lease.lend()

    async def read(self, size: int, /) -> bytes:
        if self._lease.is_released:
            raise ConnectionTakenError
        with self._lease.reading() as body:
            chunk: bytes = await body.read(size)
        return chunk

    async def aclose(self) -> None:
        self._lease.release()


def _size_and_range(answer: Mapping[str, Any]) -> tuple[int, ByteRange]:
    """Return the size of the whole object, and which of its bytes the answer has."""
    content_range: str | None = answer.get("ContentRange")
    if not content_range:
        size = int(answer["ContentLength"])
        return size, ByteRange(0, size)
    sent, _, size_text = content_range.removeprefix("bytes ").partition("/")
    start, _, last = sent.partition("-")
    return int(size_text), ByteRange(int(start), int(last) + 1)
