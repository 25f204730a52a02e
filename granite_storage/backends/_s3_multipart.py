"""A multipart upload: parts in flight side by side in bounded memory, and nothing left of it when it is aborted."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from granite_storage._tasks import settle
from granite_storage.backends._s3_body import Body, PartSource, base64_text
from granite_storage.backends._s3_client import S3Client, backoff, threads
from granite_storage.backends._s3_errors import MissingUploadError
from granite_storage.backends.base import upload_begun
from granite_storage.exceptions import BackendError, BackendUnavailableError

__all__ = [
    "ANSWER_TIMEOUT",
    "MAX_PARTS",
    "MultipartUpload",
    "abort_upload",
    "abort_uploads",
    "checksum_header",
    "date_of",
    "part_size_of",
]

ANSWER_TIMEOUT = 10.0
"""How long a cancelled caller waits for the answer to a request whose effect must be known to be undone, in seconds."""

MAX_PARTS = 10_000
"""The most parts of an object that S3 takes."""

_LARGEST_PART = 5 * 1024**3
_EQUAL_PARTS = 4_500
_PARTS_UNTIL_DOUBLED = 500
_INLINE_HASH = 8 * 1024
_ABORTS = 8

T = TypeVar("T")


def part_size_of(number: int, part_size: int, size: int | None = None) -> int:
    """Return how large a part is to be, in bytes: all are equal where the size of the whole is known, as R2 wants them.

    Where it is not, the first 4,500 are equal, then the size doubles every 500. So a stream of unknown length can have 5 TiB,
    which is more than S3 takes of an object, in 10,000 parts.

    Args:
        number: The part's number, from 1.
        part_size: The size of the first one, at the least.
        size: The size of the whole, None where it is not known.
    """
    if size is not None:
        return max(part_size, -(-size // MAX_PARTS))
    doublings = max(0, (number - 1 - _EQUAL_PARTS) // _PARTS_UNTIL_DOUBLED + 1)
    return min(part_size << doublings, _LARGEST_PART)


async def checksum_header(body: Body, *, sha256: bool) -> tuple[dict[str, str], bytes]:
    """Return the parameter with which the server verifies the bytes, and their hash; a thread computes it."""
    algorithm, parameter = ("sha256", "ChecksumSHA256") if sha256 else ("md5", "ContentMD5")
    digest = await _unhurried(len(body), body.digest, algorithm)
    return {parameter: base64_text(digest)}, digest


async def _unhurried(size: int, digest: Callable[[T], bytes], argument: T) -> bytes:
    """Hash so many bytes, in a thread where they are many."""
    return digest(argument) if size <= _INLINE_HASH else await threads.run(digest, argument)


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@asynccontextmanager
async def _side_by_side() -> AsyncIterator[asyncio.TaskGroup]:
    """Give a task group that raises the first failure itself, not a group of them."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # or it would hold this frame, and the frame it


class MultipartUpload:
    """An upload in parts, from its creation to the moment before it is completed.

    Args:
        client: The event loop's client.
        location: The object's location.
        parameters: What else the creation is told, such as the content type.
    """

    def __init__(self, client: S3Client, location: str, parameters: Mapping[str, Any]) -> None:
        self._client = client
        self._location = location
        self._parameters = parameters
        self._creating: asyncio.Task[dict[str, Any]] | None = None
        self._id: str | None = None
        self._parts: dict[int, dict[str, Any]] = {}
        self._digests: dict[int, bytes] = {}
        self.size = 0

    async def create(self) -> None:
        """Create the upload at the server."""
        self._creating = asyncio.ensure_future(
            self._client.call("create_multipart_upload", location=self._location, **self._parameters)
        )
        answer = await asyncio.shield(self._creating)
        self._id = answer["UploadId"]
        if answer["ResponseMetadata"]["RetryAttempts"]:
            await self._abort_strays()
        if (tell := upload_begun.get()) is not None:
            await tell(answer["UploadId"])

    async def send(self, source: PartSource) -> None:
        """Send all that a source has.

        At most `part_concurrency` parts are in memory, the one that is being filled included.

        Raises:
            BackendError: A part could not be sent.
            Exception: What the source raised, unchanged.
        """
        settings = self._client.settings
        room = asyncio.Semaphore(settings.part_concurrency)
        async with _side_by_side() as group:
            number = 1
            while not await source.ended():
                await room.acquire()
                body = await source.take(part_size_of(number, settings.part_size, source.size))
                self.size += len(body)
                task = group.create_task(self._send_part(number, body, room))
                task.add_done_callback(body.drop)  # of one that is cancelled before it has begun, too
                del body, task  # or the memory would be held while the next part is filled
                number += 1

    async def _send_part(self, number: int, body: Body, room: asyncio.Semaphore) -> None:
        try:
            checksums = self._client.settings.checksums
            header, digest = await checksum_header(body, sha256=checksums)
            answer = await self._client.call(
                "upload_part", location=self._location, UploadId=self._id, PartNumber=number, Body=body, **header
            )
            self._parts[number] = {"PartNumber": number, "ETag": answer["ETag"], **(header if checksums else {})}
            self._digests[number] = digest
            if checksums:
                self._client.traits.note_checksum(answer)
        finally:
            body.drop()  # first, or the next part would be filled while this one is still in memory
            room.release()

    async def copy(self, copy_source: Mapping[str, Any], size: int, part_size: int) -> None:
        """Have the server copy another object's bytes into the parts.

        Args:
            copy_source: The parameters that name the object.
            size: Its size in bytes.
            part_size: The size of the parts.
        """
        room = asyncio.Semaphore(self._client.settings.part_concurrency)
        self.size = size
        async with _side_by_side() as group:
            for number, start in enumerate(range(0, size, part_size), 1):
                part = {"CopySourceRange": f"bytes={start}-{min(start + part_size, size) - 1}"} if size > part_size else {}
                group.create_task(self._copy_part(number, {**copy_source, **part}, room))

    async def _copy_part(self, number: int, copy_source: Mapping[str, Any], room: asyncio.Semaphore) -> None:
        async with room:
            answer = await self._client.call(
                "upload_part_copy", location=self._location, UploadId=self._id, PartNumber=number, **copy_source
            )
        self._parts[number] = {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

    def completion(self) -> dict[str, Any]:
        """Return the parameters of the request that turns the parts into an object."""
        return {"UploadId": self._id, "MultipartUpload": {"Parts": [self._parts[number] for number in sorted(self._parts)]}}

    async def checksum(self) -> str | None:
        """Return S3's checksum of the whole, the hash of the parts' hashes; None where the parts were not hashed here."""
        if not self._digests:
            return None
        joined = b"".join(self._digests[number] for number in sorted(self._digests))
        return base64_text(await _unhurried(len(joined), _sha256, joined))

    async def abort(self) -> None:
        """Leave nothing of the upload behind, also where its creation was cut off before its answer came."""
        if self._creating is None:
            return
        if not await settle(self._creating, ANSWER_TIMEOUT):
            self._creating.cancel()
            await settle(self._creating)
        if self._creating.cancelled():
            await self._abort_strays()
        elif self._creating.exception() is None:
            await self._abort(self._creating.result()["UploadId"])
        elif isinstance(self._creating.exception(), BackendUnavailableError):
            await self._abort_strays()

    async def _abort(self, upload_id: str) -> None:
        key = self._client.settings.key(self._location)
        await _abort(self._client, key, upload_id)

    async def _abort_strays(self) -> None:
        """Abort the uploads of our key whose creation the server may have made without our hearing of it."""
        await _abort_all(self._client, self._client.settings.key(self._location), but=self._id)


async def abort_uploads(client: S3Client, *, older_than: timedelta) -> int:
    """Abort the uploads under the prefix of which nothing has arrived since, by the server's clock; return how many."""
    position: dict[str, str] = {}
    count = 0
    while True:
        page = await client.call("list_multipart_uploads", Prefix=client.settings.prefix, **position)
        oldest = _now(page) - older_than
        for upload in page.get("Uploads", ()):
            key, upload_id = upload["Key"], upload["UploadId"]
            if upload["Initiated"] < oldest and await _last_arrival(client, key, upload_id, upload["Initiated"]) < oldest:
                await _abort(client, key, upload_id)
                count += 1
        if not page.get("IsTruncated"):
            return count
        position = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def date_of(answer: Mapping[str, Any]) -> datetime:
    """Return the time of an answer by the server's clock, in whole seconds; by this machine's where the server does not say."""
    date = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)


async def abort_upload(client: S3Client, location: str, upload_id: str | None) -> None:
    """Abort one upload of a location, or all of them."""
    key = client.settings.key(location)
    if upload_id is None:
        await _abort_all(client, key)
    else:
        await _abort(client, key, upload_id)


async def _abort_all(client: S3Client, key: str, *, but: str | None = None) -> None:
    answer = await client.call("list_multipart_uploads", Prefix=key)
    for upload in answer.get("Uploads", ()):
        if upload["Key"] == key and upload["UploadId"] != but:
            await _abort(client, key, upload["UploadId"])


def _now(answer: Mapping[str, Any]) -> datetime:
    """Return the time by the server's clock, whose answers have it in whole seconds, rounded up."""
    return date_of(answer) + timedelta(seconds=1)


async def _last_arrival(client: S3Client, key: str, upload_id: str, initiated: datetime) -> datetime:
    latest, position = initiated, 0
    while True:
        try:
            page = await client.call("list_parts", Key=key, UploadId=upload_id, PartNumberMarker=position)
        except MissingUploadError:
            return datetime.max.replace(tzinfo=UTC)
        for part in page.get("Parts", ()):
            latest = max(latest, part["LastModified"])
        if not page.get("IsTruncated"):
            return latest
        position = page["NextPartNumberMarker"]


async def _abort(client: S3Client, key: str, upload_id: str) -> None:
    """Abort an upload until no part is left: one that is in flight may still arrive."""
    for attempt in range(1, _ABORTS + 1):
        try:
            await client.call("abort_multipart_upload", Key=key, UploadId=upload_id)
        except MissingUploadError:
            return
        if not await _has_parts(client, key, upload_id):
            return
        await asyncio.sleep(backoff(attempt))
    raise BackendError(f"the parts of an aborted upload of {key!r} remain")


async def _has_parts(client: S3Client, key: str, upload_id: str) -> bool:
    try:
        answer = await client.call("list_parts", Key=key, UploadId=upload_id, MaxParts=1)
    except BackendUnavailableError:
        return True
    except BackendError:
        return False
    return bool(answer.get("Parts"))
