"""How files of common media types begin: bytes that claim to be an image, and are a page, are told by it."""

from __future__ import annotations

import re

__all__ = ["HEAD_SIZE", "contradicts"]

HEAD_SIZE = 16
"""How many of the first bytes are looked at."""

_ISO_MEDIA = rb"....ftyp"
_BEGINNINGS: dict[str, re.Pattern[bytes]] = {
    media_type: re.compile(pattern, re.DOTALL)
    for media_type, pattern in {
        "application/gzip": rb"\x1f\x8b",
        "application/pdf": rb"%PDF-",
        "application/zip": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
        "audio/flac": rb"fLaC",
        "audio/ogg": rb"OggS",
        "audio/wav": rb"RIFF....WAVE",
        "image/avif": _ISO_MEDIA + rb"(?:avif|avis|mif1|msf1)",
        "image/bmp": rb"BM",
        "image/gif": rb"GIF8[79]a",
        "image/heic": _ISO_MEDIA,
        "image/jpeg": rb"\xff\xd8\xff",
        "image/png": rb"\x89PNG\r\n\x1a\n",
        "image/tiff": rb"II\x2a\x00|MM\x00\x2a",
        "image/webp": rb"RIFF....WEBP",
        "video/mp4": _ISO_MEDIA,
        "video/ogg": rb"OggS",
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
    beginning = _BEGINNINGS.get(content_type.partition(";")[0].strip().lower())
    return beginning is not None and beginning.match(head) is None
