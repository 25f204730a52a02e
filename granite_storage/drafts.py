"""What is known of an object before its bytes are stored, and the receipt that becomes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from granite_storage.exceptions import InvalidReferenceError
from granite_storage.locations import clean_filename, make_location
from granite_storage.policies import StoragePolicy
from granite_storage.refs import ReadOnlyDict, StoredObjectRef, canonical_timestamp, read_only

__all__ = ["ObjectDraft", "is_media_type", "upload_names"]

_LONGEST_CONTENT_TYPE = 255
# A token, and a quoted string, of RFC 9110, section 5.6; neither goes back over what it has taken.
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = r'"(?:[ !#-\[\]-~]|\\[ -~])*+"'
_MEDIA_TYPE = re.compile(rf"{_WORD}/{_WORD}(?:[ \t]*;[ \t]*(?:{_WORD}=(?:{_WORD}|{_QUOTED}))?)*+")


@dataclass(frozen=True, slots=True)
class ObjectDraft:
    """What is known of an object before its bytes are stored.

    Attributes:
        policy: The policy that it is stored under.
        location: Where it will be.
        content_type: Its media type.
        original_filename: Its name, cleaned.
        extra: The caller's own keys.
    """

    policy: StoragePolicy
    location: str
    content_type: str | None
    original_filename: str | None
    extra: ReadOnlyDict | None

    @classmethod
    def of(
        cls,
        policy: StoragePolicy,
        *,
        model_name: str,
        entity_id: str,
        field_name: str,
        content_type: str | None,
        original_filename: str | None,
        extra: Mapping[str, Any] | None,
    ) -> Self:
        """Choose a location of its own for an object, and check what is to be kept of it."""
        _require_content_type(content_type)
        filename = clean_filename(original_filename)
        location = make_location(
            key_prefix=policy.key_prefix,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            original_filename=filename,
        )
        return cls(policy, location, content_type, filename, None if extra is None else read_only(extra, "extra"))

    def receipt(
        self, size: int, checksum: str, details: Mapping[str, Any] | None, identity: str | None = None
    ) -> StoredObjectRef:
        """Return the ref of the object, now that its bytes are known.

        Args:
            size: How many they are.
            checksum: Their checksum.
            details: The backend's own keys.
            identity: That of the store.
        """
        extra = {**(self.extra or {}), **(details or {})}
        ref = StoredObjectRef(
            storage_key=self.policy.storage_key,
            backend=self.policy.backend_key,
            location=self.location,
            size=size,
            checksum=checksum,
            content_type=self.content_type,
            original_filename=self.original_filename,
            created_at=canonical_timestamp(datetime.now(UTC)),
            extra=extra or None,
        )
        return ref if identity is None else ref.with_identity(identity)


def upload_names(source: object) -> tuple[str | None, str | None]:
    """Return the file name and the media type that an upload says of itself, None for what it does not say.

    A client may send anything as a media type: what is none, or cannot be kept, is left out.
    """
    content_type = getattr(source, "content_type", None)
    is_named = hasattr(source, "filename")
    # Django's uploads have a `name`; of other files it is a path on this machine.
    filename = getattr(source, "filename" if is_named else "name", None) if is_named or hasattr(source, "content_type") else None
    return (
        filename if isinstance(filename, str) and filename else None,
        content_type if isinstance(content_type, str) and is_media_type(content_type) else None,
    )


def is_media_type(content_type: str) -> bool:
    """Tell whether a text that comes from a client is one media type (RFC 9110, section 8.3.1) that can be kept."""
    return _can_be_kept(content_type) and _MEDIA_TYPE.fullmatch(content_type) is not None


def _can_be_kept(content_type: str) -> bool:
    return 0 < len(content_type) <= _LONGEST_CONTENT_TYPE and content_type.isascii() and content_type.isprintable()


def _require_content_type(content_type: object) -> None:
    if content_type is not None and not (isinstance(content_type, str) and _can_be_kept(content_type)):
        raise InvalidReferenceError(f"content_type must be a media type in printable ASCII, not {content_type!r:.120}")
