"""Writing an object to S3: all at once, exclusively, and known to be there or not when the write returns.

What fits in one part is a single PUT. More is a multipart upload, whose parts are in flight side by side in bounded memory, and
of which nothing is left when it is aborted.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NoReturn

from granite_storage._tasks import run_bounded, shielded_cleanup, task_group, wait_or_cancel
from granite_storage.backends._remote import ANSWER_TIMEOUT, MAX_PARTS, Found, PreconditionFailedError, RemoteWriter
from granite_storage.backends._s3_client import S3Client, backoff, threads, version_of
from granite_storage.backends._s3_errors import MissingUploadError
from granite_storage.backends.base import upload_begun
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from granite_storage.locations import RESERVED_PREFIX
from granite_storage.streams import INLINE_HASH

logger = logging.getLogger("granite_storage")

Piece = bytes | memoryview

SMALL = 256 * 1024
"""Up to this size a body is sent as plain `bytes`, and larger ones in slices of it."""

UNRESERVED = 1024 * 1024
"""What a stream may hold in memory without a reservation, in bytes: small objects never wait for large ones."""

LARGEST_PART = 5 * 1024**3
"""The most bytes of a part, or of an object that one request stores."""

_EQUAL_PARTS = 4_500
_PARTS_UNTIL_DOUBLED = 500
_ABORTS = 8

PROBE_PREFIX = f"{RESERVED_PREFIX}probe-"
"""How the locations of objects begin that are made to find something out; they are in no listing."""

_KNOWN_SERVERS = ("AmazonS3",)
"""The names of servers that are known to honour the conditions of every write."""

_WRITE_ID = "granite-write-id"
_COPY_PART_SIZE = 512 * 1024**2


# Parts: cut from bytes or a stream without being joined, and hashed off the loop.


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
        self._timeout = 0.0

    def __len__(self) -> int:
        return self._size

    def read(self, size: int = -1, /) -> NoReturn:
        """Never called; it makes the SDK take this for a file."""
        raise TypeError("the body is iterated, not read")

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Do nothing: every iteration begins at the start."""
        return 0

    def drop(self, _: object = None) -> None:
        """Release the bytes and the memory that was reserved for them; idempotent, and usable as a callback."""
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
    async def watched(self, timeout: float) -> AsyncIterator[None]:
        """Raise `TimeoutError` where neither the body nor the answer has moved for so many seconds."""
        self._timeout = timeout
        try:
            async with asyncio.timeout(timeout) as self._deadline:
                yield
        finally:
            self._deadline = None

    def _postpone(self) -> None:
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + self._timeout)

    def digest(self, algorithm: str) -> bytes:
        """Return the hash of the bytes; slow where they are many."""
        digest = hashlib.new(algorithm, usedforsecurity=False)
        for piece in self.pieces:
            digest.update(piece)
        return digest.digest()


def base64_text(digest: bytes) -> str:
    """Return a digest as S3's headers have it."""
    return base64.b64encode(digest).decode()


class PartSource:
    """Where the parts of an object come from, in order; all have the size that is asked for, since some servers want them equal.

    Args:
        content: Bytes, of which none is copied, or a stream of pieces that are not short: a list of those would be larger than
            they are.
        room: How many parts of all streams may be in memory; one that is larger than `UNRESERVED` waits for its place.
        size: How many bytes a stream will yield, None where that is not known.

    Attributes:
        size: How many bytes there will be, None where that is not known.
    """

    def __init__(self, content: bytes | AsyncIterator[bytes], room: asyncio.Semaphore, size: int | None = None) -> None:
        self.size = size if isinstance(content, AsyncIterator) else len(content)
        self._stream = content if isinstance(content, AsyncIterator) else None
        self._rest: Piece = b"" if isinstance(content, AsyncIterator) else content
        self._room = room

    async def take(self, size: int) -> Body:
        """Return the next `size` bytes, fewer only at the end; the caller drops them."""
        pieces: list[Piece] = []
        left = size
        room: asyncio.Semaphore | None = None
        try:
            while left and not await self.ended():
                if room is None and size - left >= UNRESERVED:
                    await self._room.acquire()
                    room = self._room
                pieces.append(self._cut(left))
                left -= len(pieces[-1])
        except BaseException:
            if room is not None:
                room.release()
            raise
        return Body(pieces, room)

    async def ended(self) -> bool:
        """Return whether nothing is left, which the stream itself must have said."""
        while not self._rest and self._stream is not None:
            try:
                self._rest = await anext(self._stream)
            except StopAsyncIteration:
                self._stream = None
        return not self._rest

    def _cut(self, size: int) -> Piece:
        piece, rest = self._rest, self._rest[:0]
        if len(piece) > size:
            piece, rest = memoryview(piece)[:size], memoryview(piece)[size:]
        self._rest = rest
        return piece


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
    return min(part_size << doublings, LARGEST_PART)


async def checksum_header(body: Body, *, sha256: bool) -> dict[str, str]:
    """Return the parameter with which the server verifies the bytes; a thread computes it."""
    algorithm, parameter = ("sha256", "ChecksumSHA256") if sha256 else ("md5", "ContentMD5")
    digest = body.digest(algorithm) if len(body) <= INLINE_HASH else await threads.run(body.digest, algorithm)
    return {parameter: base64_text(digest)}


class MultipartUpload:
    """A multipart upload, from its creation to the moment before it is completed.

    Args:
        client: The event loop's client.
        location: The object's location.
        parameters: The other parameters of the creation, such as the content type.
    """

    def __init__(self, client: S3Client, location: str, parameters: Mapping[str, Any]) -> None:
        self._client = client
        self._location = location
        self._parameters = parameters
        self._creating: asyncio.Task[dict[str, Any]] | None = None
        self._id: str | None = None
        self._parts: dict[int, dict[str, Any]] = {}
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

    async def send(self, first: Body, source: PartSource) -> None:
        """Send the first part, and all that its source has left.

        At most `part_concurrency` parts are in memory, the one that is being filled included. A part that is in flight waits for
        no room of another one, so what it holds is free again whatever the others do.

        Raises:
            BackendError: A part could not be sent.
            Exception: What the source raised, unchanged.
        """
        settings = self._client.settings
        room = asyncio.Semaphore(settings.part_concurrency)
        await room.acquire()
        async with task_group() as group:
            self._start_part(group, 1, first, room)
            number = 1
            while not await source.ended():
                number += 1
                await room.acquire()
                part_size = part_size_of(number, settings.part_size, source.size)
                self._start_part(group, number, await source.take(part_size), room)

    def _start_part(self, group: asyncio.TaskGroup, number: int, body: Body, room: asyncio.Semaphore) -> None:
        self.size += len(body)
        task = group.create_task(self._send_part(number, body, room))
        task.add_done_callback(body.drop)  # of one that is cancelled before it has begun, too

    async def _send_part(self, number: int, body: Body, room: asyncio.Semaphore) -> None:
        try:
            checksums = self._client.settings.checksums
            header = await checksum_header(body, sha256=checksums)
            answer = await self._client.call(
                "upload_part", location=self._location, UploadId=self._id, PartNumber=number, Body=body, **header
            )
            self._parts[number] = {"PartNumber": number, "ETag": answer["ETag"], **(header if checksums else {})}
            if checksums:
                self._client.traits.note_checksum(answer)
        finally:
            body.drop()  # first, or the next part would be filled while this one is still in memory
            room.release()

    async def copy(self, copy_source: Mapping[str, Any], size: int, part_size: int) -> None:
        """Let the server copy another object into the parts.

        Args:
            copy_source: The parameters that name the object.
            size: Its size in bytes.
            part_size: The size of the parts.
        """
        self.size = size
        starts = list(enumerate(range(0, size, part_size), 1))

        async def copy_part(part: tuple[int, int]) -> None:
            number, start = part
            span = {"CopySourceRange": f"bytes={start}-{min(start + part_size, size) - 1}"} if len(starts) > 1 else {}
            answer = await self._client.call(
                "upload_part_copy", location=self._location, UploadId=self._id, PartNumber=number, **copy_source, **span
            )
            self._parts[number] = {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        await run_bounded(starts, copy_part, self._client.settings.part_concurrency)

    def completion(self) -> dict[str, Any]:
        """Return the parameters of the request that turns the parts into an object."""
        return {"UploadId": self._id, "MultipartUpload": {"Parts": [self._parts[number] for number in sorted(self._parts)]}}

    async def checksum(self) -> str | None:
        """Return S3's checksum of the whole, the hash of the parts' hashes; None where the parts were not hashed here."""
        parts = [self._parts[number] for number in sorted(self._parts)]
        if not all("ChecksumSHA256" in part for part in parts):
            return None
        hashes = Body([base64.b64decode(part["ChecksumSHA256"]) for part in parts])
        return (await checksum_header(hashes, sha256=True))["ChecksumSHA256"]

    async def abort(self) -> None:
        """Leave nothing of the upload behind, also where its creation was cut off before its answer came."""
        if self._creating is None:
            return
        await wait_or_cancel(self._creating, ANSWER_TIMEOUT)
        if self._creating.cancelled():
            await self._abort_strays()
        elif self._creating.exception() is None:
            await abort_upload(self._client, self._location, self._creating.result()["UploadId"])
        elif isinstance(self._creating.exception(), BackendUnavailableError):
            await self._abort_strays()

    async def _abort_strays(self) -> None:
        """Abort uploads of the key that the server may have created although its response was lost."""
        await _abort_all(self._client, self._client.settings.key(self._location), but=self._id)


async def abort_uploads(client: S3Client, *, older_than: timedelta) -> int:
    """Abort the uploads under the prefix of which nothing has arrived since, by the server's clock; return how many."""
    position: dict[str, str] = {}
    count = 0
    while True:
        page = await client.call("list_multipart_uploads", Prefix=client.settings.prefix, **position)
        oldest = date_of(page) + timedelta(seconds=1) - older_than  # servers say whole seconds
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
    raise BackendError(
        f"the aborted multipart upload of {key!r} still has parts: cleanup_incomplete, or a lifecycle rule, removes them"
    )


async def _has_parts(client: S3Client, key: str, upload_id: str) -> bool:
    try:
        answer = await client.call("list_parts", Key=key, UploadId=upload_id, MaxParts=1)
    except BackendUnavailableError:
        return True
    except BackendError:
        return False
    return bool(answer.get("Parts"))


# Probing, once for a backend, whether its server honours the condition of the request that completes a multipart upload.
#
# A server that refuses a header says so. One that does not know it stores all the same: Ceph 16 ignores `If-None-Match: *`
# of a CompleteMultipartUpload, and would write over an object. So a HEAD precedes the end of a multipart upload until the
# server has shown on a probe object that it honours the condition, and always where it does not.


async def probe_conditions(client: S3Client, answer: Mapping[str, Any]) -> None:
    """Probe whether the server honours the condition of a CompleteMultipartUpload, unless that is known.

    Args:
        client: The event loop's client.
        answer: The answer to such a request, by whose headers some servers are known.
    """
    traits = client.traits
    if traits.checks_completions is not None or traits.asking:
        return
    if answer["ResponseMetadata"].get("HTTPHeaders", {}).get("server", "") in _KNOWN_SERVERS:
        traits.checks_completions = True
        return
    traits.asking = True
    try:
        await shielded_cleanup(_ask(client), f"finding out whether the S3 server of bucket {traits.bucket!r} honours conditions")
    finally:
        traits.asking = False


async def remove_probes(client: S3Client, before: datetime) -> int:
    """Remove the objects that a crash left of this, if they are from before a time; return how many."""
    answer = await client.call("list_objects_v2", Prefix=client.settings.key(PROBE_PREFIX))
    old = [entry["Key"] for entry in answer.get("Contents", ()) if entry["LastModified"] < before]
    for key in old:
        await client.call("delete_object", Key=key)
    return len(old)


async def _ask(client: S3Client) -> None:
    traits = client.traits
    try:
        traits.checks_completions = await _checks_completions(client)
    except BackendUnavailableError:
        return  # the next multipart upload asks again
    except BackendError as error:
        traits.checks_completions = False
        logger.warning(
            "it is unknown whether the S3 server of bucket %r honours If-None-Match of CompleteMultipartUpload (%s): the backend "
            "checks for an existing object before it completes each multipart upload or copy; pass conditional_writes=True if "
            "the server honours it",
            traits.bucket,
            error,
        )
        return
    if not traits.checks_completions:
        logger.warning(
            "the S3 server of bucket %r ignores If-None-Match of CompleteMultipartUpload: the backend checks for an "
            "existing object before it completes each multipart upload or copy, and of two concurrent writers of one location "
            "the later one wins; pass conditional_writes=False to accept that without this warning",
            traits.bucket,
        )


async def _checks_completions(client: S3Client) -> bool:
    """Upload onto an object made for this, on the condition that there is none; return whether the server refuses."""
    key = client.settings.key(f"{PROBE_PREFIX}{uuid.uuid4().hex}")
    made: list[dict[str, Any]] = []
    upload_id: str | None = None
    content = Body([b"probe"])
    header = await checksum_header(content, sha256=client.settings.checksums)
    try:
        made.append(await client.call("put_object", Key=key, Body=content, **header, **_extra(client, "put_object")))
        upload_id = (await client.call("create_multipart_upload", Key=key, **_extra(client, "create_multipart_upload")))[
            "UploadId"
        ]
        part = await client.call("upload_part", Key=key, UploadId=upload_id, PartNumber=1, Body=content, **header)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        request: dict[str, Any] = {"Key": key, "UploadId": upload_id, "MultipartUpload": parts, "IfNoneMatch": "*"}
        made.append(await client.call("complete_multipart_upload", **request))
    except PreconditionFailedError:
        return True
    else:
        upload_id = None
        return False
    finally:
        await shielded_cleanup(_remove(client, key, upload_id, made), f"removing the probe {key!r}")


def _extra(client: S3Client, operation: str) -> dict[str, Any]:
    """Return what the bucket may demand of every write, such as encryption; no lock, which would keep the probe."""
    given = client.settings.extra_put_kwargs.items()
    return {name: value for name, value in given if client.supports(operation, name) and not name.startswith("ObjectLock")}


async def _remove(client: S3Client, key: str, upload_id: str | None, made: list[dict[str, Any]]) -> None:
    if upload_id is not None:
        await client.call("abort_multipart_upload", Key=key, UploadId=upload_id)
    for version in {answer.get("VersionId") for answer in made}:
        named = version_of({"VersionId": version})
        try:
            await client.call("delete_object", Key=key, **named)
        except AccessDeniedError:  # a version needs a permission of its own
            await client.call("delete_object", Key=key)


class ObjectWriter(RemoteWriter):
    """One write of one object; see `RemoteWriter`.

    Args:
        client: The event loop's client.
        location: Where the object is to be.
        content: What the object is stored with, such as its `ContentType`.
    """

    _doubts = (BackendUnavailableError, MissingUploadError, PreconditionFailedError)

    def __init__(self, client: S3Client, location: str, content: Mapping[str, Any]) -> None:
        super().__init__(location)
        self._client = client
        self._settings = client.settings
        self._traits = client.traits
        self._content = content

    async def write(self, source: PartSource) -> Mapping[str, Any]:
        """Store all that a source has: by a single PUT where it fits in a part, else by a multipart upload.

        Returns:
            The SDK's answer to the request that created the object, or to the HEAD that found it created.
        """
        if not self._traits.sends_conditions:
            await self._require_absent()
        first = await source.take(part_size_of(1, self._settings.part_size, source.size))
        try:
            if await source.ended():
                return await self._put(first)
            algorithm = {"ChecksumAlgorithm": "SHA256"} if self._settings.checksums else {}
            upload = MultipartUpload(self._client, self._location, {**self._parameters("create_multipart_upload"), **algorithm})
            return await self._in_parts(upload, lambda: upload.send(first, source))
        finally:
            first.drop()

    async def copy(self, source: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
        """Copy another object inside the server.

        It is copied by a multipart upload, also where one part suffices: many servers ignore `If-None-Match` of CopyObject.
        Of its headers only the content type comes along: a client that has stored it by itself may have sent others.

        Args:
            source: Its location.
            info: The answer to a HEAD of it.
        """
        if "ContentType" in info:
            self._content = {"ContentType": info["ContentType"], **self._content}
        if not self._traits.sends_conditions:
            await self._require_absent()
        size = int(info["ContentLength"])
        if not size:
            return await self._put(Body([]))
        upload = MultipartUpload(self._client, self._location, self._parameters("create_multipart_upload"))
        part_size = max(_COPY_PART_SIZE, -(-size // MAX_PARTS))
        return await self._in_parts(upload, lambda: upload.copy(self._copy_source(source, info), size, part_size))

    async def _put(self, body: Body) -> Mapping[str, Any]:
        try:
            header = await checksum_header(body, sha256=self._settings.checksums)
            request = {**self._parameters("put_object"), **self._only_if_absent(), **header, "Body": body}
            checksum = header.get("ChecksumSHA256")
            answer = await self._published("put_object", request, len(body), checksum, landed=lambda: body.sent)
            if checksum is not None:
                self._traits.note_checksum(answer)
            return answer
        except asyncio.CancelledError:
            if body.sent:
                await self._clean_up(self._withdraw())
            raise

    async def _in_parts(self, upload: MultipartUpload, fill: Callable[[], Any]) -> Mapping[str, Any]:
        completing = False
        try:
            await upload.create()
            await fill()
            if not self._traits.checks_completions:
                await self._require_absent()
            request = {**upload.completion(), **self._only_if_absent()}
            checksum = await upload.checksum()
            completing = True
            answer = await self._published("complete_multipart_upload", request, upload.size, checksum)
            await probe_conditions(self._client, answer)
            return answer
        except BaseException as error:

            async def undo(*, published: bool) -> None:
                await upload.abort()
                if published:
                    await self._withdraw()

            await self._clean_up(undo(published=completing and not isinstance(error, ObjectExistsError)))
            raise

    async def _published(
        self,
        operation: str,
        request: Mapping[str, Any],
        size: int,
        checksum: str | None,
        *,
        landed: Callable[[], bool] = lambda: True,
    ) -> Mapping[str, Any]:
        """Make the request that creates the object, and learn what became of it, also for a caller that is cancelled.

        Args:
            operation: The name of the SDK's method.
            request: Its parameters.
            size: The object's size in bytes.
            checksum: The SHA-256 that the server will have of it, None where it has none.
            landed: See `_answered`.
        """
        send = partial(self._client.call, operation, location=self._location, **request)
        try:
            return await self._answered(self._create(send, size, checksum), landed=landed)
        except PreconditionFailedError as refusal:
            raise BackendUnavailableError(
                f"the server refused to create {self._location!r} because it exists, but no object is there: another write was "
                "removed meanwhile, or the server has a folder of this name; try again",
                location=self._location,
            ) from refusal.__cause__

    async def _find(self, *, with_checksum: bool = False) -> Found | None:
        mode = {"ChecksumMode": "ENABLED"} if with_checksum and self._settings.checksums else {}
        try:
            head = await self._client.head(self._location, **mode)
        except ObjectNotFoundError:
            return None
        checksum = str(head.get("ChecksumSHA256") or "").partition("-")[0] or None
        return Found(head.get("Metadata", {}).get(_WRITE_ID), head["ContentLength"], head, checksum)

    async def _remove(self, found: Found | None) -> None:
        version = version_of(found.receipt) if found is not None else {}
        await self._client.call("delete_object", location=self._location, **version)

    def _parameters(self, operation: str) -> dict[str, Any]:
        extra = self._settings.extra_put_kwargs
        return {
            "ContentType": "application/octet-stream",  # some servers would guess, and serve what claims to be HTML as HTML
            **{name: value for name, value in extra.items() if self._client.supports(operation, name)},
            **self._content,
            "Metadata": {**self._content.get("Metadata", {}), **extra.get("Metadata", {}), _WRITE_ID: self._id},
        }

    def _only_if_absent(self) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self._traits.sends_conditions else {}

    def _copy_source(self, location: str, info: Mapping[str, Any]) -> dict[str, Any]:
        source = {"Bucket": self._settings.bucket, "Key": self._settings.key(location), **version_of(info)}
        extra = self._settings.extra_put_kwargs
        keys = {f"CopySource{name}": value for name, value in extra.items() if name.startswith("SSECustomer")}
        return {"CopySource": source, "CopySourceIfMatch": info["ETag"], **keys}
