"""Headers for browsers: an object's URL, its name and type, and whether it is shown or downloaded."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Literal, TypeAlias
from urllib.parse import quote, urlsplit

from granite_storage.exceptions import ConfigurationError
from granite_storage.locations import clean_filename

Disposition: TypeAlias = Literal["attachment", "inline"]

INLINE_TYPES: frozenset[str] = frozenset(
    {
        "audio/aac",
        "audio/flac",
        "audio/mp3",
        "audio/mp4",
        "audio/mpeg",
        "audio/ogg",
        "audio/opus",
        "audio/wav",
        "audio/wave",
        "audio/webm",
        "audio/x-aac",
        "audio/x-flac",
        "audio/x-m4a",
        "audio/x-wav",
        "image/apng",
        "image/avif",
        "image/bmp",
        "image/gif",
        "image/heic",
        "image/heif",
        "image/jpeg",
        "image/png",
        "image/webp",
        "text/plain",
        "video/mp4",
        "video/ogg",
        "video/quicktime",
        "video/webm",
        "video/x-m4v",
    }
)
"""The media types that a browser may show in its window: none of them runs anything."""

REVALIDATED = "private, no-cache"
"""The Cache-Control with which clients keep an object, and ask each time whether it has changed."""

_OPAQUE = "application/octet-stream"
_SANDBOX = "sandbox; default-src 'none'"
_PLAYER = "default-src 'none'; media-src 'self'"
_CHARSET = re.compile(r";[ \t]*charset=", re.IGNORECASE)
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,127}/[A-Za-z0-9!#$&^_.+-]{1,127}(?:[ \t]*;[\x20-\x7e]{0,200})?")
_ACTIVE_FAMILIES = ("multipart/", "message/")
_ACTIVE_WORDS = (
    "css",
    "ecmascript",
    "flash",
    "html",
    "javascript",
    "jscript",
    "livescript",
    "mhtml",
    "shockwave",
    "svg",
    "vbscript",
    "wasm",
    "xhtml",
    "xml",
    "xsl",
    "xul",
)
_ATTR_CHARACTERS = "!#$&+-.^_`|~"
_BASE_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~-]+)*")
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/_.~-]*")
_NOT_QUOTABLE = re.compile(r"[^\x20-\x7e]|[\"%\\]")


def require_base_url(base_url: object) -> str:
    """Return an absolute URL without a slash at its end, or raise `ConfigurationError`."""
    text = base_url.removesuffix("/") if isinstance(base_url, str) else ""
    try:
        named = bool(urlsplit(text).hostname) and urlsplit(text).port != 0
    except ValueError:
        named = False
    if not named or not _BASE_URL.fullmatch(text):
        raise ConfigurationError("base_url must be an absolute URL such as 'https://example.com/files', without query or user")
    return text


def url_path(location: str) -> str:
    """Return a location as the path of a URL; everything but the unreserved characters of RFC 3986 is percent-encoded."""
    return location if _PLAIN_PATH.fullmatch(location) else quote(location, safe="/~")


@lru_cache(maxsize=512)
def served_type(content_type: str | None) -> str:
    """Return the Content-Type for what a writer declared.

    What a page could run or style itself with, and any other text, becomes `application/octet-stream`: a browser ignores
    Content-Disposition where `<script src>` loads the object, but never runs bytes of that type under `nosniff`. Text without
    a charset is said to be UTF-8: browsers would take it for windows-1252.
    """
    if content_type is None or not _MEDIA_TYPE.fullmatch(content_type) or is_active(content_type):
        return _OPAQUE
    if content_type[:5].lower() == "text/" and not _CHARSET.search(content_type):
        return f"{content_type.rstrip(' ;')}; charset=utf-8"
    return content_type


def is_active(content_type: str) -> bool:
    """Return whether a browser could execute the media type; a word counts at the start of any part, as in `image/svg+xml`."""
    essence = _essence(content_type)
    words = re.split(r"[/.+-]", essence)
    return essence.startswith(_ACTIVE_FAMILIES) or any(word.startswith(_ACTIVE_WORDS) for word in words)


def content_security_policy(content_type: str) -> str:
    """Return the Content-Security-Policy for a media type.

    A browser plays sound and film in a page of its own, whose player loads the file from its URL once more: the policy must
    allow that, and a sandbox would take the page's origin away, without which it is refused.
    """
    return _PLAYER if _essence(content_type).startswith(("audio/", "video/")) else _SANDBOX


def content_disposition(
    disposition: Disposition, filename: str | None, content_type: str | None, inline_types: Collection[str] = INLINE_TYPES
) -> str:
    """Return the Content-Disposition: inline only where it is asked for and the exact media type is one of `inline_types`.

    The name is made safe. Where it is not plain ASCII it is given twice: for old clients, and percent-encoded for all others.
    Source: RFC 6266, section 4, and RFC 8187, section 3.2.
    """
    shown = disposition == "inline" and _essence(served_type(content_type)) in inline_types
    kind = "inline" if shown else "attachment"
    name = clean_filename(filename)
    if name is None:
        return kind
    plain = _NOT_QUOTABLE.sub("_", name)
    encoded = "" if plain == name else f"; filename*=UTF-8''{quote(name, safe=_ATTR_CHARACTERS)}"
    return f'{kind}; filename="{plain}"{encoded}'


def safe_headers(
    content_type: str, filename: str | None, disposition: Disposition, inline_types: Collection[str] = INLINE_TYPES
) -> dict[str, str]:
    """Return the headers that keep a browser from executing an object, by lower-case names.

    Args:
        content_type: The Content-Type, as `served_type` returns it.
        filename: The name for saving it.
        disposition: How it is shown where that is safe.
        inline_types: The media types for which that is so.
    """
    return {
        "cache-control": REVALIDATED,
        "content-disposition": content_disposition(disposition, filename, content_type, inline_types),
        "content-security-policy": content_security_policy(content_type),
        "content-type": content_type,
        "x-content-type-options": "nosniff",
    }


def require_disposition(disposition: object) -> None:
    """Raise `ValueError` unless the disposition is `attachment` or `inline`."""
    if disposition not in ("attachment", "inline"):
        raise ValueError(f"disposition must be 'attachment' or 'inline', not {disposition!r}")


def require_inline_types(types: Collection[str]) -> frozenset[str]:
    """Return media types that may be shown inline, lower case.

    Raises:
        ConfigurationError: One is not a media type, or a browser would run what it finds in it.
    """
    lowered = frozenset(one.lower() for one in types)
    for one in sorted(lowered):
        if ";" in one or served_type(one) == _OPAQUE:
            raise ConfigurationError(
                f"{one!r} must not be shown inline: it is not a media type, or it is one that a browser may execute"
            )
    return lowered


def _essence(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()
