"""How an object comes to be: all at once, exclusively, and known to be there or not when its write returns."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from granite_storage._tasks import finish, settle
from granite_storage.backends._s3_body import Body, PartSource, base64_text
from granite_storage.backends._s3_client import S3Client, version_of
from granite_storage.backends._s3_errors import MissingUploadError
from granite_storage.backends._s3_multipart import ANSWER_TIMEOUT, MAX_PARTS, MultipartUpload, checksum_header
from granite_storage.backends._s3_probes import find_out
from granite_storage.backends._service_errors import PreconditionFailedError
from granite_storage.exceptions import BackendError, BackendUnavailableError, ObjectExistsError, ObjectNotFoundError

__all__ = ["ObjectWriter"]

_WRITE_ID = "granite-write-id"
_COPIED_AT_A_TIME = 512 * 1024**2
_DOUBTFUL = (BackendUnavailableError, MissingUploadError, PreconditionFailedError)


class ObjectWriter:
    """One write of one object.

    The object carries an id of the write in its metadata. So where an answer was lost, and the same request made again is
    refused because the object exists, a HEAD tells whether it is this write's own. ETags are never compared: they are an MD5 of
    the bytes only sometimes.

    Args:
        client: The event loop's client.
        location: Where the object is to be.
        content: What the object is stored with, such as its `ContentType`.
    """

    def __init__(self, client: S3Client, location: str, content: Mapping[str, Any]) -> None:
        self._client = client
        self._settings = client.settings
        self._traits = client.traits
        self._location = location
        self._content = content
        self._id = uuid.uuid4().hex

    async def write(self, source: PartSource) -> dict[str, Any]:
        """Store all that a source has: by one request where it fits in a part, in parts otherwise.

        Returns:
            The SDK's answer to the request that created the object, or to the HEAD that found it created.
        """
        try:
            if not self._traits.sends_conditions:
                await self.require_absent()
            body = await self._only_part(source)
            if body is not None:
                return await self._put(body)
            upload = MultipartUpload(self._client, self._location, self._multipart_parameters())
            return await self._in_parts(upload, lambda: upload.send(source))
        finally:
            source.close()

    async def copy(self, source: str, info: Mapping[str, Any]) -> dict[str, Any]:
        """Copy another object inside the server.

        It is copied in parts, also where one suffices: many servers ignore `If-None-Match` for CopyObject, and would overwrite.
        Of its headers only the content type comes along: a client that has stored it by itself may have sent others.

        Args:
            source: Its location.
            info: The answer to a HEAD of it.
        """
        self._content = {"ContentType": info["ContentType"]} if "ContentType" in info else {}
        if not self._traits.sends_conditions:
            await self.require_absent()
        size = int(info["ContentLength"])
        if not size:
            return await self._put(Body([]))
        upload = MultipartUpload(self._client, self._location, self._parameters("create_multipart_upload"))
        part_size = max(_COPIED_AT_A_TIME, -(-size // MAX_PARTS))
        return await self._in_parts(upload, lambda: upload.copy(self._copy_source(source, info), size, part_size))

    async def require_absent(self) -> None:
        """Raise `ObjectExistsError` where an object is at the location."""
        try:
            await self._client.head(self._location)
        except ObjectNotFoundError:
            return
        raise self._exists()

    async def _only_part(self, source: PartSource) -> Body | None:
        """Return all that a source has if it fits in a part; None, with nothing taken, if it does not."""
        body = await source.take(self._settings.part_size)
        try:
            if await source.ended():
                return body
        except BaseException:
            body.drop()
            raise
        source.give_back(body)
        return None

    async def _put(self, body: Body) -> dict[str, Any]:
        try:
            header, digest = await checksum_header(body, sha256=self._settings.checksums)
            request = {**self._parameters("put_object"), **self._only_if_absent(), **header, "Body": body}
            checksum = base64_text(digest) if self._settings.checksums else None
            answer = await self._published("put_object", request, size=len(body), checksum=checksum, landed=lambda: body.sent)
            if checksum is not None:
                self._traits.note_checksum(answer)
            return answer
        except asyncio.CancelledError:
            if body.sent:
                await self._withdraw()
            raise
        finally:
            body.drop()

    async def _in_parts(self, upload: MultipartUpload, fill: Callable[[], Any]) -> dict[str, Any]:
        completing = False
        try:
            await upload.create()
            await fill()
            if not self._traits.checks_completions:
                await self.require_absent()
            request = {**upload.completion(), **self._only_if_absent()}
            checksum = await upload.checksum()
            completing = True
            answer = await self._published("complete_multipart_upload", request, size=upload.size, checksum=checksum)
            await find_out(self._client, answer)
            return answer
        except BaseException as error:
            ours = completing and not isinstance(error, ObjectExistsError)
            await self._withdraw(upload, published=ours)
            raise

    async def _published(
        self,
        operation: str,
        request: Mapping[str, Any],
        *,
        size: int,
        checksum: str | None = None,
        landed: Callable[[], bool] = lambda: True,
    ) -> dict[str, Any]:
        """Make the request that creates the object, and learn what became of it, also for a caller that is cancelled.

        Args:
            operation: The name of the SDK's method.
            request: Its parameters.
            size: The object's size in bytes.
            checksum: The SHA-256 that the server will have of it, None where it has none.
            landed: Tells whether the server may have acted on the request; before that, a cancellation need not wait.
        """
        task = asyncio.ensure_future(self._request(operation, request, size, checksum))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not landed():
                task.cancel()
            if not await settle(task, ANSWER_TIMEOUT):
                task.cancel()
                await settle(task)
            raise
        finally:
            del task  # or its error would hold this frame, and the frame the error

    async def _request(self, operation: str, request: Mapping[str, Any], size: int, checksum: str | None) -> dict[str, Any]:
        try:
            return await self._client.call(operation, location=self._location, **request)
        except _DOUBTFUL as doubt:
            found = await self._find(size, checksum, doubt)
            if found is not None:
                return found
            if isinstance(doubt, PreconditionFailedError):
                raise BackendUnavailableError(
                    f"the server refused {self._location!r} as taken, and then had nothing there: another write was undone "
                    "meanwhile, or the server keeps a folder of this name",
                    location=self._location,
                ) from doubt.__cause__
            raise

    async def _find(self, size: int, checksum: str | None, doubt: BackendError) -> dict[str, Any] | None:
        """Return the headers of the object if this write has created it, None if nobody has created one.

        Raises:
            ObjectExistsError: Somebody else has.
        """
        mode = {"ChecksumMode": "ENABLED"} if self._settings.checksums else {}
        try:
            head = await self._client.head(self._location, **mode)
        except ObjectNotFoundError:
            return None
        reported = str(head.get("ChecksumSHA256") or "").partition("-")[0]
        same = head["ContentLength"] == size and (not reported or checksum is None or reported == checksum)
        if same and head.get("Metadata", {}).get(_WRITE_ID) == self._id:
            return head
        raise self._exists() from doubt.__cause__

    async def _withdraw(self, upload: MultipartUpload | None = None, *, published: bool = True) -> None:
        """Remove what the write has made, parts or an object; nobody else's."""

        async def remove() -> None:
            if upload is not None:
                await upload.abort()
            if published:
                await self._delete_own()

        await finish(remove(), f"the clean-up of a write of {self._location!r}")

    async def _delete_own(self) -> None:
        try:
            head = await self._client.head(self._location)
        except ObjectNotFoundError:
            return
        if head.get("Metadata", {}).get(_WRITE_ID) == self._id:
            await self._client.call("delete_object", location=self._location, **version_of(head))

    def _parameters(self, operation: str) -> dict[str, Any]:
        extra = self._settings.extra_put_kwargs
        return {
            "ContentType": "application/octet-stream",  # some servers would guess, and serve what claims to be HTML as HTML
            **{name: value for name, value in extra.items() if self._client.supports(operation, name)},
            **self._content,
            "Metadata": {**self._content.get("Metadata", {}), **extra.get("Metadata", {}), _WRITE_ID: self._id},
        }

    def _multipart_parameters(self) -> dict[str, Any]:
        algorithm = {"ChecksumAlgorithm": "SHA256"} if self._settings.checksums else {}
        return {**self._parameters("create_multipart_upload"), **algorithm}

    def _only_if_absent(self) -> dict[str, str]:
        return {"IfNoneMatch": "*"} if self._traits.sends_conditions else {}

    def _copy_source(self, location: str, info: Mapping[str, Any]) -> dict[str, Any]:
        source = {"Bucket": self._settings.bucket, "Key": self._settings.key(location), **version_of(info)}
        extra = self._settings.extra_put_kwargs
        keys = {f"CopySource{name}": value for name, value in extra.items() if name.startswith("SSECustomer")}
        return {"CopySource": source, "CopySourceIfMatch": info["ETag"], **keys}

    def _exists(self) -> ObjectExistsError:
        return ObjectExistsError(f"an object is at {self._location!r} already", location=self._location)
