"""What a client has stored by itself, compared with what it had announced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import ChecksumMismatchError, ObjectNotFoundError
from granite_storage.manager import StorageManager
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import MeasuredStream, require_size
from granite_storage.web._media import HEAD_SIZE, contradicts, is_known
from granite_storage.web._upload_tokens import Ticket
from granite_storage.web.exceptions import UploadMismatchError, UploadMissingError

__all__ = ["Staged", "find_staged", "inspect", "require_beginning"]

_WRONG_TYPE = "the file is not of the media type that was announced"


@dataclass(frozen=True, slots=True)
class Staged:
    """What a client has stored by itself.

    Attributes:
        ref: Where it is; nothing but the number of its bytes is known of it.
        identity: What tells it from what the client may store there later.
    """

    ref: StoredObjectRef
    identity: str

    def verdict(self, error: UploadMismatchError) -> dict[str, str]:
        """Return what is to be remembered where it is refused."""
        return {"identity": self.identity, "why": str(error)}

    def require_not_refused(self, verdict: Mapping[str, Any] | None) -> None:
        """Raise `UploadMismatchError` where just this object was refused before."""
        if verdict is not None and verdict["identity"] == self.identity:
            raise UploadMismatchError(verdict["why"])


async def find_staged(manager: StorageManager, storage_key: str, ticket: Ticket) -> Staged:
    """Return what a client has stored, if nothing that can be told without reading it speaks against it.

    Raises:
        UploadMissingError: There is nothing.
        ContentTooLargeError: There are more bytes than may be.
        UploadMismatchError: There are fewer; or it was sent with a header that was not agreed, and that changes what it is.
    """
    place = StoredObjectRef(
        storage_key=storage_key,
        backend=ticket.backend,
        location=ticket.location,
        size=0,
        checksum="",
        content_type=ticket.content_type,
        original_filename=ticket.filename,
    )
    try:
        info = await manager.stat(place)
    except ObjectNotFoundError as error:
        raise UploadMissingError("nothing was uploaded yet") from error
    require_size(info.size, ticket.max_size)
    if info.size < ticket.min_size:
        raise UploadMismatchError("the file is smaller than was announced")
    _require_headers(info, ticket)
    return Staged(replace(place, size=info.size), f"{info.size} {info.modified.isoformat()} {info.etag}")


async def require_beginning(manager: StorageManager, ref: StoredObjectRef, ticket: Ticket) -> None:
    """Read the first bytes of what a client has stored, before anything is copied.

    Raises:
        SizeMismatchError: It was replaced meanwhile.
        UploadMismatchError: It does not begin like its media type.
    """
    if is_known(ticket.content_type):
        async with manager.open(ref, length=HEAD_SIZE) as reader:
            head = await reader.read()
        if contradicts(head, ticket.content_type):
            raise UploadMismatchError(_WRONG_TYPE)


async def inspect(manager: StorageManager, ref: StoredObjectRef, ticket: Ticket) -> StoredObjectRef:
    """Read the copy of what a client has stored, and return its ref with the checksum of what was read.

    Raises:
        SizeMismatchError: It has not the size that was copied.
        UploadMismatchError: It is not what was announced.
    """
    async with manager.open(ref) as reader:
        _require_headers(reader.info, ticket)
        content = MeasuredStream(aiter(reader), checksum=ticket.checksum)
        head = b""
        try:
            async for chunk in content:
                head += chunk[: HEAD_SIZE - len(head)]
        except ChecksumMismatchError as error:
            raise UploadMismatchError("the file has not the checksum that was announced") from error
        finally:
            await content.aclose()
    if contradicts(head, ticket.content_type):
        raise UploadMismatchError(_WRONG_TYPE)
    return replace(ref, checksum=content.checksum or "")


def _require_headers(info: ObjectInfo, ticket: Ticket) -> None:
    """Refuse what a browser would be sent as another file than the one that was announced."""
    if info.content_type not in (None, ticket.content_type):
        raise UploadMismatchError("the file has not the Content-Type that was announced")
    if (info.content_encoding or "identity").lower() != "identity":
        raise UploadMismatchError("the file was sent with a Content-Encoding, which was not agreed")
