"""How files of common media types begin: bytes that claim to be an image, and are a page, are told by it."""

from __future__ import annotations

import re

__all__ = ["HEAD_SIZE", "contradicts", "is_known"]

HEAD_SIZE = 1024
"""How many of the first bytes are looked at."""

_BLANK = rb"(?:\xef\xbb\xbf)?[\x00\t\n\x0c\r ]*"
# QuickTime files, which are older than the box `ftyp`, begin with any of the others; so do the segments of a stream.
_ISO_MEDIA = rb"....(?:ftyp|free|mdat|moof|moov|pnot|sidx|skip|styp|wide)"
_MP3 = rb"\x00*(?:ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff])"
_OGG = rb"OggS"
_WAVE = rb"(?:RIFF|RF64|BW64)....WAVE"
_BEGINNINGS: dict[str, re.Pattern[bytes]] = {
    media_type: re.compile(pattern, re.DOTALL)
    for media_type, pattern in {
        "application/gzip": rb"\x1f\x8b",
        "application/pdf": _BLANK + rb"%PDF-",
        "application/zip": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
        "audio/flac": rb"fLaC|ID3",
        "audio/mp3": _MP3,
        "audio/mp4": _ISO_MEDIA,
        "audio/mpeg": _MP3,
        "audio/ogg": _OGG,
        "audio/wav": _WAVE,
        "audio/wave": _WAVE,
        "audio/webm": rb"\x1a\x45\xdf\xa3",
        "audio/x-m4a": _ISO_MEDIA,
        "audio/x-wav": _WAVE,
        "image/avif": rb"....ftyp(?:avif|avis|mif1|msf1)",
        "image/bmp": rb"BM",
        "image/gif": rb"GIF8[79]a",
        "image/heic": rb"....ftyp",
        "image/heif": rb"....ftyp",
        "image/jpeg": rb"\xff\xd8\xff",
        "image/png": rb"\x89PNG\r\n\x1a\n",
        "image/tiff": rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]",
        "image/webp": rb"RIFF....WEBP",
        "video/mp4": _ISO_MEDIA,
        "video/ogg": _OGG,
        "video/quicktime": _ISO_MEDIA,
        "video/webm": rb"\x1a\x45\xdf\xa3",
    }.items()
}


def contradicts(head: bytes, content_type: str) -> bool:
    """Tell whether a file that begins like this cannot be of a media type; of types that are not known it never says so.

    Source: the WHATWG's MIME Sniffing Standard, section 6, and the formats' own specifications.

    Args:
        head: Its first `HEAD_SIZE` bytes, or all where it has fewer.
        content_type: The media type, with or without parameters.
    """
    beginning = _beginning_of(content_type)
    return beginning is not None and beginning.match(head) is None


def is_known(content_type: str) -> bool:
    """Tell whether it is known how files of a media type begin."""
    return _beginning_of(content_type) is not None


def _beginning_of(content_type: str) -> re.Pattern[bytes] | None:
    return _BEGINNINGS.get(content_type.partition(";")[0].strip().lower())
