"""The state of a direct upload: what the client has stored, whether it is what was announced, and what it was finished as."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from granite_storage._headers import served_type
from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import (
    InfectedContentError,
    ObjectNotFoundError,
    StaleAttachmentError,
    StorageError,
    UnsupportedContentError,
)
from granite_storage.inspection._media_names import canonical
from granite_storage.manager import StorageManager
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.journal import direct_uploads
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.uploads import stored_object
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import MeasuredStream, require_size
from granite_storage.web._upload_tokens import UploadToken
from granite_storage.web.errors import UploadMismatchError, UploadMissingError

# What uploads were finished as: finishing one again gives the same, and one that was refused is not read again.


@dataclass(frozen=True, slots=True)
class Found:
    """The result of finishing an upload, so far.

    Attributes:
        attachment: The attachment, where its object exists, or None.
        seen: The state that was read, by which `CompletionStore.claim` tells whether it has changed.
        is_claimed: Whether another process is finishing it.
        verdict: Why it was refused, where it was.
    """

    attachment: Attachment | None
    seen: Any
    is_claimed: bool = False
    verdict: Mapping[str, Any] | None = None


class JournalCompletionStore:
    """Keeps the results in the journal, for every process.

    Args:
        journal: The journal.
    """

    def __init__(self, journal: StorageJournal) -> None:
        self._journal = journal

    async def find(self, upload_token: UploadToken, column_type: AttachmentType) -> Found:
        """Return the result of an upload: rows may only take a copy of it, because another row may be taking it now."""
        finished = await (await self._journal.staging()).find(_staging_id(upload_token))
        attachment = None if finished.ref is None else Attachment._of(finished.ref, column_type)
        return Found(attachment, finished, finished.is_claimed, finished.verdict)

    async def claim(self, upload_token: UploadToken, found: Found) -> AbstractAsyncContextManager[_JournaledClaim] | None:
        """Return the right to finish it, which one of all processes has."""
        claim = await (await self._journal.staging()).claim(_staging_id(upload_token), found.seen)
        return None if claim is None else _enter(claim)


@asynccontextmanager
async def _enter(claim: direct_uploads.Claim) -> AsyncIterator[_JournaledClaim]:
    async with claim:
        yield _JournaledClaim(claim)


@dataclass(frozen=True, slots=True)
class _JournaledClaim:
    """The right to finish an upload, for as long as it is entered.

    Attributes:
        claim: That of the journal.
    """

    claim: direct_uploads.Claim

    async def publish(self, attachment: Attachment) -> bool:
        """Record the attachment, unless another process has recorded one meanwhile; return whether it was recorded."""
        stored = stored_object(attachment)
        if stored.intent is None:
            raise StaleAttachmentError(
                "the base was bound again without a journal while a direct upload was finished; finish it again"
            )
        return await self.claim.publish(stored.intent.id, stored.ref)

    async def refuse(self, verdict: Mapping[str, Any]) -> None:
        """Record why it is refused."""
        await self.claim.refuse(verdict)


class MemoryCompletionStore:
    """Keeps the results in this process, as long as the upload can be finished."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Attachment | Mapping[str, Any], int]] = {}

    async def find(self, upload_token: UploadToken, column_type: AttachmentType) -> Found:
        """Return the result of an upload: the same attachment, which one row takes and others copy."""
        now = time.time()
        for location in [location for location, (_, ends) in self._known.items() if ends <= now]:
            del self._known[location]
        known, _ = self._known.get(upload_token.location, (None, 0))
        if not isinstance(known, Attachment):
            return Found(None, known, verdict=known)
        there = not known.is_pending and await known.exists()
        return Found(known if there else None, known)

    async def claim(self, upload_token: UploadToken, found: Found) -> AbstractAsyncContextManager[_RememberedClaim]:
        """Return the right to finish it; within this process a lock has granted it already."""
        return nullcontext(_RememberedClaim(self._known, upload_token, found.seen))


@dataclass(frozen=True, slots=True)
class _RememberedClaim:
    known: dict[str, tuple[Attachment | Mapping[str, Any], int]]
    upload_token: UploadToken
    seen: Any

    async def publish(self, attachment: Attachment) -> bool:
        """Remember the attachment."""
        known, _ = self.known.get(self.upload_token.location, (None, 0))
        if known is not self.seen:  # another event loop of this process was faster
            return False
        self.known[self.upload_token.location] = attachment, self.upload_token.ends
        return True

    async def refuse(self, verdict: Mapping[str, Any]) -> None:
        """Remember why it is refused."""
        self.known[self.upload_token.location] = verdict, self.upload_token.ends


def _staging_id(upload_token: UploadToken) -> UUID:
    if upload_token.staging_id is None:
        raise StaleAttachmentError("the direct upload was begun before the application had a journal; begin it again")
    return upload_token.staging_id


# The first bytes of common media types, by which an HTML page that claims to be an image is recognised.


HEAD_SIZE = 1024
"""How many of the first bytes are checked."""

_BLANK = rb"(?:\xef\xbb\xbf)?[\x00\t\n\x0c\r ]*"
# QuickTime files, which are older than the box `ftyp`, begin with any of the others; so do the segments of a stream.
_ISO_MEDIA = rb"....(?:ftyp|free|mdat|moof|moov|pnot|sidx|skip|styp|wide)"
_BEGINNINGS: dict[str, re.Pattern[bytes]] = {
    media_type: re.compile(pattern, re.DOTALL)
    for media_type, pattern in {
        "application/gzip": rb"\x1f\x8b",
        "application/pdf": _BLANK + rb"%PDF-",
        "application/zip": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
        "audio/flac": rb"fLaC|ID3",
        "audio/mp4": _ISO_MEDIA,
        "audio/mpeg": rb"\x00*(?:ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff])",
        "audio/ogg": rb"OggS",
        "audio/wav": rb"(?:RIFF|RF64|BW64)....WAVE",
        "audio/webm": rb"\x1a\x45\xdf\xa3",
        "image/avif": rb"....ftyp(?:avif|avis|mif1|msf1)",
        "image/bmp": rb"BM",
        "image/gif": rb"GIF8[79]a",
        "image/heic": rb"....ftyp",
        "image/jpeg": rb"\xff\xd8\xff",
        "image/png": rb"\x89PNG\r\n\x1a\n",
        "image/tiff": rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]",
        "image/webp": rb"RIFF....WEBP",
        "video/mp4": _ISO_MEDIA,
        "video/ogg": rb"OggS",
        "video/quicktime": _ISO_MEDIA,
        "video/webm": rb"\x1a\x45\xdf\xa3",
    }.items()
}


def contradicts(head: bytes, content_type: str) -> bool:
    """Return whether a file that begins like this cannot be of a media type; False for types that are not known.

    Source: the WHATWG's MIME Sniffing Standard, section 6, and the formats' own specifications.

    Args:
        head: Its first `HEAD_SIZE` bytes, or all where it has fewer.
        content_type: The media type, with or without parameters.
    """
    beginning = _beginning_of(content_type)
    return beginning is not None and beginning.match(head) is None


def _beginning_of(content_type: str) -> re.Pattern[bytes] | None:
    return _BEGINNINGS.get(canonical(content_type))


# What a client has uploaded, compared with what it announced.


_WRONG_TYPE = "the file is not of the announced media type"


_REFUSALS: dict[Any, type[StorageError]] = {
    error.__name__: error for error in (UploadMismatchError, UnsupportedContentError, InfectedContentError)
}
"""Refusals of the content, which are remembered; a validator may change its mind."""


@dataclass(frozen=True, slots=True)
class Staged:
    """What a client has uploaded.

    Attributes:
        ref: Where it is; only its size is known.
        identity: What distinguishes it from what the client may upload there later.
    """

    ref: StoredObjectRef
    identity: str

    def verdict(self, error: StorageError) -> dict[str, str]:
        """Return what to remember about a refusal."""
        return {"identity": self.identity, "why": str(error), "kind": type(error).__name__}

    def require_not_refused(self, verdict: Mapping[str, Any] | None) -> None:
        """Raise the error with which this same object was refused before."""
        if verdict is not None and verdict["identity"] == self.identity:
            raise _REFUSALS.get(verdict.get("kind"), UploadMismatchError)(verdict["why"])


async def find_staged(manager: StorageManager, storage_key: str, upload_token: UploadToken) -> Staged:
    """Return what a client has uploaded, once its size and headers are checked.

    Raises:
        UploadMissingError: Nothing was uploaded.
        ContentTooLargeError: It has more bytes than allowed.
        UploadMismatchError: It has fewer; or it was sent with a header that was not agreed and changes its meaning.
    """
    place = StoredObjectRef(
        storage_key=storage_key,
        backend=upload_token.backend,
        location=upload_token.location,
        size=0,
        checksum=upload_token.checksum or "",
        content_type=upload_token.content_type,
        original_filename=upload_token.filename,
    )
    try:
        info = await manager.stat(place)
    except ObjectNotFoundError as error:
        raise UploadMissingError("no file has been uploaded yet") from error
    require_size(info.size, upload_token.max_size)
    require_least(info.size, upload_token.min_size)
    _require_headers(info, upload_token, is_public=manager.policy(storage_key).public is not None)
    return Staged(replace(place, size=info.size), f"{info.size} {info.modified.isoformat()} {info.etag}")


def require_least(size: int | None, min_size: int) -> None:
    """Raise `UploadMismatchError` where a file is known to be too short."""
    if size is not None and size < min_size:
        raise UploadMismatchError(f"the file has {size} bytes, fewer than the announced {min_size}")


async def require_beginning(manager: StorageManager, ref: StoredObjectRef, upload_token: UploadToken) -> None:
    """Read the first bytes of what a client has uploaded, before anything is copied.

    Raises:
        SizeMismatchError: It was replaced meanwhile.
        UploadMismatchError: Its first bytes contradict its media type.
    """
    if _beginning_of(upload_token.content_type) is not None:
        async with manager.open(ref, length=HEAD_SIZE) as reader:
            head = await reader.read()
        if contradicts(head, upload_token.content_type):
            raise UploadMismatchError(_WRONG_TYPE)


async def inspect(manager: StorageManager, ref: StoredObjectRef, upload_token: UploadToken) -> StoredObjectRef:
    """Read the copy of what a client has uploaded, and return its ref with the checksum of what was read.

    Raises:
        SizeMismatchError: It does not have the size that was copied.
        ChecksumMismatchError: It does not have the announced checksum.
        UploadMismatchError: It is not what was announced.
    """
    # What its policy has judged was compared with the announcement on the way in; what is stored may be without its metadata.
    was_judged = ref.media is not None or ref.scan is not None
    async with manager.open(ref) as reader:
        if not was_judged:
            _require_headers(reader.info, upload_token, is_public=manager.policy(ref.storage_key).public is not None)
        content = MeasuredStream(aiter(reader), checksum=None if was_judged else upload_token.checksum)
        head = b""
        try:
            async for chunk in content:
                head += chunk[: HEAD_SIZE - len(head)]
        finally:
            await content.aclose()
    if not was_judged and contradicts(head, upload_token.content_type):
        raise UploadMismatchError(_WRONG_TYPE)
    return replace(ref, checksum=content.checksum or "").with_identity(ref.identity)


def _require_headers(info: ObjectInfo, upload_token: UploadToken, *, is_public: bool) -> None:
    """Refuse headers with which a browser would get another file than the announced one.

    In a public policy, what no browser may run is stored as another type, of which a server may make its own, and what is not
    finished yet as none in particular.
    """
    opaque, served = served_type(None), served_type(upload_token.content_type)
    known = (None, upload_token.content_type, *((opaque, served) if is_public else ()))
    if info.content_type not in known and not (is_public and served == opaque):
        raise UploadMismatchError(f"the file does not have the announced Content-Type {upload_token.content_type!r:.80}")
    if (info.content_encoding or "identity").lower() != "identity":
        raise UploadMismatchError("the file was sent with a Content-Encoding that was not agreed; send it without one")
