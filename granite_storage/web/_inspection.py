"""What a client has stored by itself, compared with what it had announced."""

from __future__ import annotations

from dataclasses import replace

from granite_storage.exceptions import ChecksumMismatchError, ObjectNotFoundError
from granite_storage.manager import StorageManager
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import MeasuredStream, require_size
from granite_storage.web._media import HEAD_SIZE, contradicts
from granite_storage.web._tickets import Ticket
from granite_storage.web.exceptions import UploadMismatchError, UploadMissingError

__all__ = ["inspected", "staged_ref"]


async def staged_ref(manager: StorageManager, storage_key: str, ticket: Ticket) -> StoredObjectRef:
    """Return where the bytes are that a client has stored by itself; nothing but their number is known of them.

    Raises:
        UploadMissingError: There are none.
        ContentTooLargeError: There are more than may be.
        UploadMismatchError: There are fewer.
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
    return replace(place, size=info.size)


async def inspected(manager: StorageManager, ref: StoredObjectRef, ticket: Ticket) -> StoredObjectRef:
    """Read the copy of what a client has stored, and return its ref with the checksum of what was read.

    Raises:
        SizeMismatchError: It has not the size that was copied.
        UploadMismatchError: It is not what was announced.
    """
    async with manager.open(ref) as reader:
        if reader.info.content_type not in (None, ticket.content_type):
            raise UploadMismatchError("the file has not the Content-Type that was announced")
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
        raise UploadMismatchError("the file is not of the media type that was announced")
    return replace(ref, checksum=content.checksum or "")
