"""Direct uploads: bytes that go from the browser to the storage, and not through the application."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy.orm import InstrumentedAttribute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from granite_storage._documentation import Page
from granite_storage._engine import PreparedUpload
from granite_storage._headers import require_base_url
from granite_storage._tasks import is_cancellation
from granite_storage._words import require_timedelta
from granite_storage.backends.base import UploadRequest
from granite_storage.exceptions import (
    ChecksumMismatchError,
    ConfigurationError,
    InfectedContentError,
    InvalidReferenceError,
    ObjectExistsError,
    SizeMismatchError,
    StaleAttachmentError,
    StorageError,
    UnsupportedContentError,
)
from granite_storage.locations import GENERATED_STEM, STAGED_NAME, clean_filename, safe_name, uuid7_hex
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.binding import StorageBinding
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.uploads import discard
from granite_storage.policies import StoragePolicy
from granite_storage.refs import canonical_checksum
from granite_storage.signing import TokenSigner
from granite_storage.streams import require_declared_size, require_size
from granite_storage.web._direct_state import (
    Found,
    JournalCompletionStore,
    MemoryCompletionStore,
    Staged,
    find_staged,
    inspect,
    require_beginning,
    require_least,
)
from granite_storage.web._requests import RequestBody, UploadLimits, content_type_to_keep
from granite_storage.web._upload_tokens import UploadToken, token_of
from granite_storage.web.errors import (
    MalformedRequestError,
    RequestError,
    UnsupportedRequestError,
    UploadMismatchError,
    UploadTokenError,
    problem_response,
)
from granite_storage.web.responses import is_request, send_departed

_PURPOSE = "granite-storage: a direct upload to"
_LONGEST_OWNER = 255
_OPAQUE = "application/octet-stream"
_INVALID = "the upload's token is invalid or has expired"
_INVALID_URL = "the URL is invalid or has expired"
_ATTEMPTS = 5
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 2.0


class _ReceivedAlreadyError(RequestError):
    """The file of the URL has arrived already: nothing that is sent later is kept."""

    status = 409


async def _require_whole(body: AsyncIterator[bytes], min_size: int) -> AsyncGenerator[bytes, None]:
    """Yield a body, and raise at its end where it is too short, so that nothing of it is kept."""
    size = 0
    async for chunk in body:
        size += len(chunk)
        yield chunk
    require_least(size, min_size)


@dataclass(frozen=True, slots=True)
class DirectUpload:
    """The request for one file, as `DirectUploads.begin` returns it. Any holder can send the file: do not log it.

    Attributes:
        method: `POST`: a form (multipart/form-data) of the fields, in their order, and after them the file in a field `file`.
            `PUT`: the file as the body, with the headers.
        url: The URL to send it to.
        fields: The fields of the form.
        headers: The headers of the request. A browser sets Content-Length by itself.
        token: What `DirectUploads.finish` takes once the file has arrived.
        expires_at: When the client must have started to send.
    """

    method: str
    url: str = field(repr=False)
    fields: Mapping[str, str] = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    token: str = field(repr=False)
    expires_at: datetime

    def to_dict(self) -> dict[str, Any]:
        """Return the request as JSON values for the client."""
        return {
            "method": self.method,
            "url": self.url,
            "fields": dict(self.fields),
            "headers": dict(self.headers),
            "token": self.token,
            "expires_at": self.expires_at.isoformat(),
        }


class DirectUploads:
    """Lets clients upload files directly to the storage, and checks them before a row takes them.

    `begin` returns a signed request for one file. The client sends it: to S3 itself, to any other backend through this object,
    which is an ASGI application for that. `finish` copies the file to a location that no client can write, checks the copy, and
    returns an attachment for a row to take. Sending the file again later changes nothing that a row refers to.

    With a journal, uploads that are never finished or arrive late are deleted by it. Without one they are left to the garbage
    collector, whose grace period must be longer than `max_expires_in` and `finish_within` together; the result of finishing an
    upload is then known in this process only, and another one finishes it again, as an object of its own.

    Args:
        binding: What `bind_storage` returned.
        secret: What tokens are signed with, of at least 32 bytes; or several by their ids, of which the first one signs and all
            are accepted. To rotate, put a new one first, and remove the old one once its tokens have expired.
        base_url: Where this is mounted, as clients see it, such as `https://example.com/uploads`, for backends that sign no
            requests of their own. URLs are built from it alone, never from the host that a request names.
        max_expires_in: The longest time that a client may have to start sending.
        finish_within: How long after that the file may take to arrive and be finished.
        audience: What distinguishes this application from others that sign with the same secret; None for the name of the base.

    Raises:
        ConfigurationError: An argument is invalid; no message shows a secret.

    Example:
        ```python
        uploads = DirectUploads(
            binding,
            secret=os.environ["UPLOADS_SECRET"],
            base_url="https://example.com/uploads",
        )
        app.mount("/uploads", uploads)
        ```
    """

    def __init__(
        self,
        binding: StorageBinding,
        *,
        secret: str | bytes | Mapping[str, str | bytes],
        base_url: str | None = None,
        max_expires_in: timedelta = timedelta(hours=12),
        finish_within: timedelta = timedelta(hours=1),
        audience: str | None = None,
    ) -> None:
        if not isinstance(binding, StorageBinding):
            raise ConfigurationError(f"binding must be what bind_storage() returned, not {type(binding).__name__}")
        for argument, duration in (("max_expires_in", max_expires_in), ("finish_within", finish_within)):
            if not isinstance(duration, timedelta) or duration < timedelta(seconds=1):
                raise ConfigurationError(f"{argument} must be a timedelta of at least one second, not {duration!r}")
        if audience is not None and not isinstance(audience, str):
            raise ConfigurationError(f"audience must be a string, not {audience!r:.40}")
        keys = {"default": secret} if isinstance(secret, str | bytes) else secret
        self.base_url: str | None = None if base_url is None else require_base_url(base_url)
        self._binding = binding
        self._manager = binding.manager
        self._max_expires_in = max_expires_in
        self._finish_within = finish_within
        self._longest = max_expires_in + finish_within
        self._audience = binding.base_name if audience is None else audience
        self._locks: WeakValueDictionary[tuple[asyncio.AbstractEventLoop, str], asyncio.Lock] = WeakValueDictionary()
        self._to_finish = TokenSigner(f"{_PURPOSE} finish, version 1", keys)
        self._to_send = TokenSigner(f"{_PURPOSE} send, version 1", keys, audience=self.base_url or "")
        self._completions = MemoryCompletionStore() if binding.journal is None else JournalCompletionStore(binding.journal)

    async def begin(
        self,
        attribute: InstrumentedAttribute[Any],
        *,
        filename: str | None = None,
        content_type: str | None = None,
        size: int | None = None,
        min_size: int = 1,
        max_size: int | None = None,
        checksum: str | None = None,
        owner: str | None = None,
        expires_in: timedelta = timedelta(minutes=15),
    ) -> DirectUpload:
        """Return a signed request with which a client sends one file of this name, type and size.

        The application decides whether the upload is allowed before it calls this. With a journal, the file is recorded before
        this returns.

        Args:
            attribute: The attachment attribute that the file is for, such as `Document.file`.
            filename: The client's file name; made safe, never trusted.
            content_type: The media type that it must be sent with; where it is None or empty, as a browser's for a file that it
                does not know, `application/octet-stream`.
            size: Exactly how many bytes it has, where the client says so.
            min_size: The fewest bytes, where `size` is not given; 0 lets an empty file pass.
            max_size: The most bytes, where `size` is not given; None for what the policy allows.
            checksum: `sha256:<hex>`, where the client says so.
            owner: Who may finish it, such as the id of a user; kept in the token, where it can be read.
            expires_in: The time that the client has to start sending.

        Raises:
            ContentTooLargeError: `size` is more than the policy allows, or than the backend takes in one request (413).
            MalformedRequestError: `size`, `checksum` or `content_type` is not valid (400).
            ConfigurationError: The attribute is not an attachment of this binding, neither its policy nor this call has a
                `max_size`, or its backend signs no requests and there is no `base_url`.
            ValueError: Another argument is out of bounds, or the backend needs the exact `size`.
            BackendError: The backend could not sign.
        """
        column_type = self._column_type_of(attribute)
        policy = column_type.manager_in(self._binding).policy(column_type.storage_key)
        self._require_life(expires_in)
        _require_owner(owner)
        least, most = _resolve_sizes(column_type, policy, size, min_size, max_size)
        content_type = _media_type(content_type)
        prepared = self._prepare_staging(column_type, content_type)
        expires = int(time.time() + expires_in.total_seconds())
        upload_token = UploadToken(
            audience=self._audience,
            table=column_type.table.fullname,
            column=column_type.field_name,
            backend=policy.backend_key,
            location=prepared.location,
            content_type=content_type,
            filename=clean_filename(filename),
            min_size=least,
            max_size=most,
            checksum=_announced_checksum(checksum),
            owner=owner,
            intent=None,
            expires=expires,
            ends=expires + int(self._finish_within.total_seconds()),
        )
        request = await self._manager._engine.upload_request(prepared, expires_in=expires_in, min_size=least, max_size=most)
        if request is None:
            request = self._signed_request(upload_token)
        token = (await self._record_intent(upload_token, expires_in)).sign(self._to_finish)
        expires_at = datetime.fromtimestamp(expires, UTC)
        return DirectUpload(request.method, request.url, request.fields, request.headers, token, expires_at)

    async def finish(self, token: str, attribute: InstrumentedAttribute[Any], *, owner: str | None = None) -> Attachment:
        """Check the file that a client has sent, and return it as an attachment to assign to a row.

        Size and headers are checked first, and then the first bytes. Only then the file is copied to where the client cannot
        write, by the storage itself where it can, and read there once: size, checksum and media type are those of the copy. One
        copy of an upload is made at a time, and concurrent calls wait for it. After an error or a cancellation nothing is left
        of the copy, or the journal removes it; the file stays, and may be finished again until its time is over.

        Finishing it again returns the same ref, whether or not a row has taken it; the first row takes the object itself, and
        others a copy. Where a rollback has removed the object, a new one is made. A file that was refused is refused again
        without being read. An object that no row takes is removed like that of `Attachment.store`.

        Args:
            token: The token that `begin` returned.
            attribute: The attribute that the file is for, as passed to `begin`.
            owner: Who finishes it, as passed to `begin`.

        Raises:
            UploadTokenError: The token is changed, expired, or of another owner, attribute or application (403).
            UploadMissingError: No file was uploaded yet (409).
            UploadMismatchError: It is not what was announced, or was refused before (422).
            UnsupportedContentError: The policy does not accept its type (415).
            ContentRejectedError: An inspector or a validator of the policy refuses it (422).
            InfectedContentError: The policy's scanner found something in it (422).
            ContentTooLargeError: It has more bytes than announced, or than the policy allows now (413).
            StaleAttachmentError: It was not finished in time, or was replaced meanwhile (409).
            ConfigurationError: The attribute is not an attachment of this binding.
            BackendError: The storage could not copy or read it.
        """
        wanted = self._column_type_of(attribute)
        upload_token = UploadToken.read(self._to_finish, token, self._longest)
        if (
            upload_token is None
            or upload_token.owner != owner
            or (upload_token.table, upload_token.column) != (wanted.table.fullname, wanted.field_name)
        ):
            raise UploadTokenError(_INVALID)
        column_type = self._column_type_in(upload_token)
        async with self._lock(upload_token.location):
            for _ in range(_ATTEMPTS):
                attachment = await self._try_finish(upload_token, column_type)
                if attachment is not None:
                    return attachment
        raise StaleAttachmentError(
            f"the direct upload was completed elsewhere and rolled back {_ATTEMPTS} times; finish it again"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request to a URL of `begin`: store what a client sends, where the backend signs no requests of its own."""
        if not await is_request(scope, send, ("PUT",), "DirectUploads"):
            return
        try:
            await self._receive(Request(scope, receive))
            response = Response(status_code=204, headers={"Cache-Control": "no-store"})
        except ClientDisconnect:
            await send_departed(send)
            return
        except StorageError as error:
            response = problem_response(error)
        await response(scope, receive, send)

    async def _receive(self, request: Request) -> None:
        """Store a body as it arrives, if it is what was announced and arrives while the upload can be finished."""
        token = token_of(request.scope)
        upload_token = None if token is None else UploadToken.read(self._to_send, token, self._longest)
        if upload_token is None or upload_token.expires <= time.time():
            raise UploadTokenError(_INVALID_URL)
        prepared, limits = self._staged_upload(upload_token), UploadLimits(max_size=upload_token.max_size)
        if request.headers.get("content-type") != upload_token.content_type:
            raise UnsupportedRequestError(f"the Content-Type must be the announced {upload_token.content_type!r:.80}")
        body = RequestBody(request, limits)
        require_least(body.size, upload_token.min_size)
        time_left = asyncio.timeout(upload_token.ends - time.time())
        try:
            async with (
                time_left,
                aclosing(body.chunks()) as chunks,
                aclosing(_require_whole(chunks, upload_token.min_size)) as content,
            ):
                await self._manager._engine.put(prepared, content)
        except ObjectExistsError as error:
            message = "the file was received already, so the upload is complete; finish it"
            raise _ReceivedAlreadyError(message) from error
        except TimeoutError as error:
            if not time_left.expired():
                raise
            raise UploadTokenError("this upload has expired; begin a new one") from error

    async def _try_finish(self, upload_token: UploadToken, column_type: AttachmentType) -> Attachment | None:
        """Return the attachment of an upload; None where another process has changed its state meanwhile."""
        found = await self._wait_unclaimed(upload_token, column_type)
        if found.attachment is not None:
            return found.attachment
        staged = await find_staged(self._manager, column_type.storage_key, upload_token)
        staged.require_not_refused(found.verdict)
        claim = await self._completions.claim(upload_token, found)
        if claim is None:
            return None
        async with claim as claimed:
            try:
                attachment = await self._adopt_staged(upload_token, column_type, staged)
            except (UploadMismatchError, UnsupportedContentError, InfectedContentError) as error:
                await claimed.refuse(staged.verdict(error))
                raise
            except ChecksumMismatchError as error:
                mismatch = UploadMismatchError("the file does not have the announced checksum")
                await claimed.refuse(staged.verdict(mismatch))
                raise mismatch from error
            except SizeMismatchError as error:
                raise StaleAttachmentError("the file was replaced while the upload was finished; finish it again") from error
            try:
                if await claimed.publish(attachment):
                    return attachment
            except BaseException as error:
                # A cancelled one may be published, and is then found by the next request; otherwise it goes with its lease.
                if not is_cancellation(error):
                    await discard([attachment])
                raise
            await discard([attachment])
        return None

    async def _wait_unclaimed(self, upload_token: UploadToken, column_type: AttachmentType) -> Found:
        """Return the state of an upload once no other process is finishing it."""
        pause = _FIRST_PAUSE
        while (found := await self._completions.find(upload_token, column_type)).is_claimed:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        return found

    async def _adopt_staged(self, upload_token: UploadToken, column_type: AttachmentType, staged: Staged) -> Attachment:
        policy = self._manager.policy(column_type.storage_key)
        if policy.checks is None or not policy.checks.needs_type:  # otherwise the copy is judged by more than its first bytes
            await require_beginning(self._manager, staged.ref, upload_token)
        return await Attachment._adopt(staged.ref, column_type, lambda ref: inspect(self._manager, ref, upload_token))

    def _lock(self, location: str) -> asyncio.Lock:
        """Return what lets one task of this event loop at a time finish an upload."""
        return self._locks.setdefault((asyncio.get_running_loop(), location), asyncio.Lock())

    async def _record_intent(self, upload_token: UploadToken, expires_in: timedelta) -> UploadToken:
        """Record what may be uploaded in the journal, if any, before the client can upload it."""
        if self._binding.journal is None:
            return upload_token
        lifetime = expires_in + self._finish_within
        staging = await self._binding.journal.staging()
        intent = await staging.begin(upload_token.backend, upload_token.location, lifetime)
        return replace(upload_token, intent=intent.hex)

    def _signed_request(self, upload_token: UploadToken) -> UploadRequest:
        if self.base_url is None:
            raise ConfigurationError(
                f"the backend {upload_token.backend!r} cannot sign requests: pass base_url= to DirectUploads, and mount it there",
                see=Page.DIRECT_UPLOADS,
            )
        token = replace(upload_token, filename=None, owner=None).sign(self._to_send)
        return UploadRequest("PUT", f"{self.base_url}/{token}", headers={"Content-Type": upload_token.content_type})

    def _column_type_of(self, attribute: object) -> AttachmentType:
        column_type = getattr(attribute, "type", None)
        if not isinstance(column_type, AttachmentType) or column_type.table.metadata is not self._binding.metadata:
            raise ConfigurationError(f"attribute must be an attachment attribute of {self._binding.base_name}, not {attribute!r}")
        return column_type

    def _column_type_in(self, upload_token: UploadToken) -> AttachmentType:
        """Return the column of an upload token, if its location belongs there: another holder of the key may claim anything."""
        column_type = self._binding.column_type(upload_token.table, upload_token.column)
        if (
            upload_token.audience != self._audience
            or upload_token.backend not in self._manager.backends
            or column_type is None
            or not _is_of(
                upload_token.location, column_type, column_type.manager_in(self._binding).policy(column_type.storage_key)
            )
        ):
            raise UploadTokenError(_INVALID)
        return column_type

    def _staged_upload(self, upload_token: UploadToken) -> PreparedUpload:
        """Return what a client may upload."""
        policy = self._manager.policy(self._column_type_in(upload_token).storage_key)
        if policy.backend_key != upload_token.backend:
            raise UploadTokenError(_INVALID_URL)
        return PreparedUpload(policy, upload_token.location, upload_token.content_type, None, None)

    def _prepare_staging(self, column_type: AttachmentType, content_type: str) -> PreparedUpload:
        """Choose where a client uploads to: the location says nothing of the file, and the garbage collector recognises it."""
        prepared = self._manager._engine.prepare(
            storage_key=column_type.storage_key,
            model_name=column_type.model_name,
            entity_id=uuid7_hex(),
            field_name=column_type.field_name,
        )
        location = f"{prepared.location.removesuffix(safe_name(None))}{STAGED_NAME}"
        return replace(prepared, location=location, content_type=content_type)

    def _require_life(self, expires_in: timedelta) -> None:
        require_timedelta("expires_in", expires_in)
        if not timedelta(seconds=1) <= expires_in <= self._max_expires_in:
            raise ValueError(f"expires_in must be from one second to {self._max_expires_in}, not {expires_in}")

    def __repr__(self) -> str:
        return f"<DirectUploads of {self._binding.base_name} keys={self._to_finish.key_ids}>"


def _resolve_sizes(
    column_type: AttachmentType, policy: StoragePolicy, size: int | None, min_size: int, max_size: int | None
) -> tuple[int, int]:
    """Return the fewest and the most bytes that a client may send."""
    if size is not None:
        try:
            require_declared_size(size)
        except ValueError as error:
            raise MalformedRequestError(f"the size of the file is not a number of bytes: {size!r:.40}") from error
        require_size(size, policy.max_size)
        return size, size
    limits = [limit for limit in (policy.max_size, max_size) if limit is not None]
    if not limits:
        raise ConfigurationError(
            f"the policy {policy.storage_key!r} of {column_type.label} has no max_size: pass max_size= or size= to begin()",
            see=Page.DIRECT_UPLOADS,
        )
    if not 0 <= min_size <= min(limits):
        raise ValueError(f"min_size must be from 0 to {min(limits)} bytes, not {min_size}")
    return min_size, min(limits)


def _media_type(content_type: str | None) -> str:
    """Return the media type that a file must be sent with; the client's value may be anything that JSON has."""
    if content_type is None:
        return _OPAQUE
    if not isinstance(content_type, str):
        raise MalformedRequestError(f"the Content-Type of a file is not a media type, but a {type(content_type).__name__}")
    return content_type_to_keep(content_type) or _OPAQUE


def _announced_checksum(checksum: str | None) -> str | None:
    try:
        return None if checksum is None else canonical_checksum(checksum)
    except InvalidReferenceError as error:
        raise MalformedRequestError(f"the checksum of the file is not 'sha256:' and 64 hex digits: {checksum!r:.80}") from error


def _require_owner(owner: object) -> None:
    if owner is not None and not (isinstance(owner, str) and 0 < len(owner) <= _LONGEST_OWNER):
        raise ValueError(f"owner must be a string of 1 to {_LONGEST_OWNER} characters, not {owner!r:.40}")


def _is_of(location: str, column_type: AttachmentType, policy: StoragePolicy) -> bool:
    """Return whether a location is one that `begin` could have chosen for a column."""
    prefix = f"{policy.key_prefix}/" if policy.key_prefix else ""
    names = (
        re.escape(column_type.model_name),
        GENERATED_STEM,
        re.escape(column_type.field_name),
        f"{GENERATED_STEM}-{STAGED_NAME}",
    )
    return re.fullmatch(re.escape(prefix) + "/".join(names), location) is not None
