"""Metadata is taken out of JPEG, PNG and WebP while they pass, without loss: the compressed picture is copied byte for byte.

The lists say what stays, not what goes: a segment or chunk of an unknown format may contain anything. In the
mode `all` that list holds what a picture needs to be shown; in the mode `location` also what was searched for a position and
has none. Both drop what follows the end of the picture: phones append videos and second pictures there, each with metadata.
"""

from __future__ import annotations

import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import TypeAlias

from granite_storage.exceptions import ContentRejectedError
from granite_storage.inspection._image_headers import ORIENTATION, Ifd, Tag, read_ifd
from granite_storage.inspection.base import StripMode

_MAX_HELD = 4 << 20
"""The longest piece of metadata that is parsed, before and after decompression, in bytes; JPEG has none over 64 KiB."""

_FREE_PARTS, _LEAST_PART = 4096, 512
"""How many segments or chunks a picture may have in any case, and one more for each so many bytes."""

_Steps: TypeAlias = Generator[None, None, None]
_Held: TypeAlias = Generator[None, None, bytes]


def can_strip(content_type: str) -> bool:
    """Return whether a `Stripper` knows this media type: `image/jpeg`, `image/png`, `image/webp`."""
    return content_type in _PARSERS


class Stripper:
    """Takes metadata out of one picture that passes in pieces of any size, in bounded memory and without loss.

    Pixels, animation, orientation and colour profile are kept. Of a JPEG at most 64 KiB are held, of PNG and WebP a chunk of
    metadata of at most 4 MiB, which takes up to five times that while it is parsed.

    `location` takes out the GPS tags of EXIF, XMP packets and texts that mention a position or a place, the IPTC record where it
    names a place, and what cannot be searched for one: maker notes (Nikon and Panasonic write names of cities there, and the
    formats are secret), extended XMP (it may hold another whole JPEG), C2PA manifests, other vendors' segments, unknown chunks.
    All else stays, byte for byte; EXIF is rebuilt from its tags, so that nothing stays in the gaps between them.

    `all` leaves what is needed to show the picture, and of EXIF the orientation.

    Both drop what follows the picture, and the segment that leads there (MPF): motion photos lose their video, stereo pictures
    their second view, gain maps their HDR.

    Args:
        content_type: One that `can_strip` knows, found from the content.
        mode: What is taken out.

    Raises:
        ValueError: The content type or the mode is none of these.

    Example:
        >>> stripper = Stripper("image/jpeg", "all")
        >>> picture = bytes.fromhex("ffd8 fffe00064e6f7465 ffda0002 aabb ffd9")
        >>> stripper.feed(picture).hex(" ", 2)
        'ffd8 ffda 0002 aabb ffd9'
        >>> stripper.finish()
        b''
    """

    def __init__(self, content_type: str, mode: StripMode) -> None:
        if not can_strip(content_type):
            raise ValueError(f"metadata can be removed only from {', '.join(_PARSERS)}, not from {content_type!r}")
        if mode not in ("location", "all"):
            raise ValueError(f"strip must be 'location' or 'all', not {mode!r}")
        self._parser = _PARSERS[content_type](mode)

    def feed(self, piece: bytes) -> bytes:
        """Take the next piece and return the bytes that can be passed on so far, possibly none.

        Raises:
            ContentRejectedError: The picture is damaged, or its metadata too long to be searched.
        """
        return self._parser.advance(piece)

    def finish(self) -> bytes:
        """Return the rest.

        Raises:
            ContentRejectedError: The picture is cut off.
        """
        rest = self._parser.advance(b"")
        if not self._parser.is_complete:
            raise _damaged("it is cut off")
        return rest

    def strip(self, picture: bytes) -> bytes:
        """Take the whole picture, and return what is left of it; raises as `feed` and `finish` do."""
        return self.feed(picture) + self.finish()


def _damaged(why: str) -> ContentRejectedError:
    return ContentRejectedError(f"the image is damaged: {why}")


class _Parser(ABC):
    """Reads one format: a generator that stops wherever it needs more than has come."""

    def __init__(self, mode: StripMode) -> None:
        self.is_complete = False
        self._error: ContentRejectedError | None = None
        self._mode: StripMode = mode
        self._buffer = bytearray()
        self._output: list[bytes] = []
        self._steps = self._run()
        self._has_exif = False
        self._has_image = False
        self._received = 0
        self._parts = 0

    def advance(self, piece: bytes) -> bytes:
        """Read on as far as the piece leads."""
        if self._error is not None:
            raise self._error
        if self.is_complete:
            return b""
        self._buffer += piece
        self._received += len(piece)
        try:
            next(self._steps, None)
        except ContentRejectedError as error:
            self._error = error
            raise
        output, self._output = b"".join(self._output), []
        return output

    def _run(self) -> _Steps:
        yield from self._read()
        if not self._has_image:
            raise _damaged("it has no picture")
        self.is_complete = True

    @abstractmethod
    def _read(self) -> _Steps:
        """Read one picture up to its end."""

    def _count_part(self) -> None:
        """Refuse a picture that is cut into pieces of a few bytes: a million of them would take ten seconds."""
        self._parts += 1
        if self._parts > _FREE_PARTS + self._received // _LEAST_PART:
            raise _damaged("it consists of too many parts")

    def _take(self, size: int) -> _Held:
        while len(self._buffer) < size:
            yield
        taken = bytes(memoryview(self._buffer)[:size])
        del self._buffer[:size]
        return taken

    def _hold(self, size: int) -> _Held:
        if size > _MAX_HELD:
            raise ContentRejectedError(f"the image has metadata of {size} bytes, more than the {_MAX_HELD} that can be searched")
        return self._take(size)

    def _pass(self, size: int, *, blank: bool = False, drop: bool = False) -> _Steps:
        """Copy, blank or drop so many bytes, as they come."""
        while size:
            while not self._buffer:
                yield
            count = min(size, len(self._buffer))
            if not drop:
                self._output.append(bytes(count) if blank else bytes(memoryview(self._buffer)[:count]))
            del self._buffer[:count]
            size -= count

    def _clean_exif(self, data: bytes, limit: int) -> bytes | None:
        """Clean the first EXIF, which is the one that readers go by, and drop any other."""
        had_exif, self._has_exif = self._has_exif, True
        return None if had_exif else _clean_exif(data, self._mode, limit)


# JPEG (ITU-T T.81, annex B)

_EOI, _SOS, _APP, _COM = 0xD9, 0xDA, 0xE0, 0xFE
_TABLES = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)} - {0xC8}
_FILL = re.compile(rb"\xff+")
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_MAX_SEGMENT = 0xFFFF - 2
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_PHOTOSHOP = b"Photoshop 3.0\0"
_JPEG_SEARCHED = {_APP: b"JFIF\0", _APP + 1: _XMP, _APP + 12: b"Ducky", _APP + 14: b"Adobe", _COM: b""}
"""Segments that are text, or too short to hold much besides, by the beginning of each."""


class _JpegParser(_Parser):
    def _read(self) -> _Steps:
        if (yield from self._take(2)) != b"\xff\xd8":
            raise _damaged("it does not begin like a JPEG")
        self._output.append(b"\xff\xd8")
        code = 0
        while code != _EOI:
            while len(self._buffer) < 2:
                yield
            fill = _FILL.match(self._buffer)  # any number of such bytes may stand before a marker
            if not fill:
                raise _damaged("a segment has a wrong length")
            if fill.end() > 1:
                yield from self._pass(fill.end() - 1)
                continue
            self._count_part()
            marker = yield from self._take(2)
            code = marker[1]
            if code == _EOI:
                self._output.append(marker)
            else:
                yield from self._read_segment(marker, code)

    def _read_segment(self, marker: bytes, code: int) -> _Steps:
        if code not in _TABLES and code & 0xF0 != _APP and code != _COM:
            raise _damaged(f"it has an unknown marker 0x{code:02x}")
        size = int.from_bytes((yield from self._take(2)), "big") - 2
        if size < 0:
            raise _damaged("a segment has a wrong length")
        content = yield from self._take(size)
        kept = content if code in _TABLES else self._clean(code, content)
        if kept is not None:
            self._output += (marker, (len(kept) + 2).to_bytes(2, "big"), kept)
        if code == _SOS:
            self._has_image = True
            yield from self._copy_scan()

    def _copy_scan(self) -> _Steps:
        """Copy entropy-coded data up to the next marker: 0xFF stands before zero in it, before restart markers, and as fill."""
        while not (found := _MARKER.search(self._buffer)):
            yield from self._pass(len(self._buffer) - self._buffer.endswith(b"\xff"))
            yield
        yield from self._pass(found.start())

    def _clean(self, code: int, content: bytes) -> bytes | None:
        """Return what remains of an application's segment or a comment, or None if nothing does."""
        if code == _APP + 1 and content.startswith(_EXIF):
            return None if self._has_image else self._clean_exif(content, _MAX_SEGMENT)  # none counts after a scan
        if code == _APP + 2 and content.startswith(b"ICC_PROFILE\0"):
            return content
        if code == _APP + 13 and content.startswith(_PHOTOSHOP) and self._mode == "location":
            resources = _clean_photoshop(content[len(_PHOTOSHOP) :])
            return _PHOTOSHOP + resources if resources else None
        if code not in _JPEG_SEARCHED or not content.startswith(_JPEG_SEARCHED[code]):
            return None
        if self._mode == "location":
            return None if _tells_location(content) else content
        if code == _APP:
            return content[:12].ljust(14, b"\0")  # without its thumbnail
        return content[:12] if code == _APP + 14 else None  # how the colours are coded


# PNG (W3C PNG 3)

_ANY = 1 << 31
_PNG_PICTURE = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256, b"IDAT": _ANY, b"IEND": 0, b"bKGD": 6, b"pHYs": 9, b"sBIT": 4}
_PNG_COLOURS = {b"iCCP": _ANY, b"cHRM": 32, b"cICP": 4, b"cLLI": 8, b"gAMA": 4, b"mDCV": 24, b"sRGB": 1}
_PNG_SHOWN = {**_PNG_PICTURE, **_PNG_COLOURS, b"acTL": 8, b"fcTL": 26, b"fdAT": _ANY}
"""Chunks that a picture is shown with, and the most bytes that each may have, so that nothing else hides in them."""

_PNG_HARMLESS = {b"hIST": 512, b"oFFs": 9, b"sTER": 1, b"tIME": 7}
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
_RAW_PROFILE = b"raw profile type "


class _PngParser(_Parser):
    _to_inflate = _MAX_HELD  # of all texts together: a thousand small ones that unpack to 4 MiB each would take minutes

    def _read(self) -> _Steps:
        if (yield from self._take(8)) != b"\x89PNG\r\n\x1a\n":
            raise _damaged("it does not begin like a PNG")
        self._output.append(b"\x89PNG\r\n\x1a\n")
        name, kept = b"", _PNG_SHOWN if self._mode == "all" else _PNG_SHOWN | _PNG_HARMLESS
        while name != b"IEND":
            self._count_part()
            is_first = not name
            head = yield from self._take(8)
            size, name = int.from_bytes(head[:4], "big"), head[4:]
            if size >= _ANY or not name.isalpha() or size > kept.get(name, _ANY) or is_first is not (name == b"IHDR"):
                raise _damaged("a chunk has a wrong name, place or length")
            if name in kept:
                self._has_image |= name == b"IDAT"
                self._output.append(head)
                yield from self._pass(size + 4)
            elif name == b"eXIf" or (name in _PNG_TEXTS and (self._mode == "location" or size <= _MAX_HELD)):
                yield from self._read_metadata(name, size)
            elif name[:1].isupper():
                raise _damaged("it has an unknown critical chunk")
            else:
                yield from self._pass(size + 4, drop=True)

    def _read_metadata(self, name: bytes, size: int) -> _Steps:
        content = yield from self._hold(size)
        checksum = yield from self._take(4)
        kept = self._clean_exif(content, _MAX_HELD) if name == b"eXIf" else self._clean_text(name, content)
        if kept is not None:
            if kept != content:
                checksum = zlib.crc32(kept, zlib.crc32(name)).to_bytes(4, "big")
            self._output += (len(kept).to_bytes(4, "big"), name, kept, checksum)

    def _clean_text(self, name: bytes, content: bytes) -> bytes | None:
        """Return what remains of a text chunk, or None if nothing does."""
        keyword, _, rest = content.partition(b"\0")
        is_compressed = name == b"zTXt" or (name == b"iTXt" and rest[:1] == b"\1")
        if name == b"iTXt":
            *labels, text = rest[2:].split(b"\0", 2)
        else:
            labels, text = [], rest[1:] if is_compressed else rest
        is_profile = keyword.lower().startswith(_RAW_PROFILE)
        if self._mode == "all" and not is_profile:
            return None
        plain = self._inflate(text) if is_compressed else text
        if plain is None:
            return None
        if not is_profile:
            return None if any(map(_tells_location, (b":" + keyword, *labels, plain))) else content
        profile = None if name == b"iTXt" else self._clean_raw_profile(keyword, plain)
        if profile is None or profile == plain:
            return content if profile else None
        return keyword + (b"\0\0" + zlib.compress(profile) if is_compressed else b"\0" + profile)

    def _clean_raw_profile(self, keyword: bytes, text: bytes) -> bytes | None:
        """Clean what ImageMagick and ExifTool write where they know no chunk of its own for it: a name, a length, and hex."""
        try:
            name, _, digits = text.split(None, 2)
            content = bytes.fromhex(digits.decode("ascii"))
        except ValueError:
            return None
        kind = keyword[len(_RAW_PROFILE) :].lower()
        if content.startswith(_EXIF) or kind == b"exif":
            kept = _clean_exif(content, self._mode, _MAX_HELD)
        elif kind in (b"icc", b"icm"):
            kept = content
        elif self._mode == "all":
            kept = None
        elif content.startswith(b"8BIM"):
            kept = _clean_photoshop(content)
        else:
            kept = None if _tells_location(content) or _IPTC_PLACE.search(content) else content
        if not kept or kept == content:
            return text if kept else None
        hexed = kept.hex()
        return b"\n%s\n%8d\n%s\n" % (name, len(kept), "\n".join(hexed[at : at + 72] for at in range(0, len(hexed), 72)).encode())

    def _inflate(self, data: bytes) -> bytes | None:
        decompressor = zlib.decompressobj()
        try:
            text = decompressor.decompress(data, self._to_inflate + 1)
        except zlib.error:
            return None
        self._to_inflate -= len(text)
        if self._to_inflate < 0:
            raise ContentRejectedError(f"the image has compressed texts of more than the {_MAX_HELD} bytes that can be searched")
        return None if decompressor.unused_data else text


# WebP (RFC 9649). The size of the file and the flags that say what is in it come first, metadata comes last. So that both stay
# right without waiting for the end, no chunk changes its length: what goes becomes a chunk JUNK of zeros, which readers pass
# over. EXIF stays EXIF, if only with the orientation, and XMP in the mode `location` stays XMP, if only with an empty packet,
# since their flags stay set. In the mode `all` XMP's flag is cleared, and XMP becomes JUNK.

_WEBP_SHOWN = {b"VP8 ", b"VP8L", b"ALPH"}
_WEBP_XMP_FLAG = 0x04
_BLANK_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'


class _WebPParser(_Parser):
    def _read(self) -> _Steps:
        head = yield from self._take(12)
        if head[:4] != b"RIFF" or head[8:] != b"WEBP":
            raise _damaged("it does not begin like a WebP")
        self._output.append(head)
        yield from self._read_chunks(int.from_bytes(head[4:8], "little") - 4, in_frame=False)

    def _read_chunks(self, remaining: int, *, in_frame: bool) -> _Steps:
        while remaining > 0:
            self._count_part()
            head = (yield from self._take(8)) if remaining >= 8 else b""
            name, size = head[:4], int.from_bytes(head[4:], "little")
            remaining -= 8 + size
            if remaining < 0:
                raise _damaged("a chunk has a wrong length")
            yield from self._read_chunk(name, size, in_frame=in_frame)
            padding = min(size & 1, remaining)  # some writers leave it out at the end
            yield from self._pass(padding, blank=True)
            remaining -= padding

    def _read_chunk(self, name: bytes, size: int, *, in_frame: bool) -> _Steps:
        length = size.to_bytes(4, "little")
        if name in _WEBP_SHOWN or (name in (b"ICCP", b"ANIM") and not in_frame):
            self._has_image |= name != b"ALPH" and name in _WEBP_SHOWN
            self._output += (name, length)
            yield from self._pass(size)
        elif name == b"ANMF" and size >= 16 and not in_frame:
            self._output += (name, length)
            yield from self._pass(16)
            yield from self._read_chunks(size - 16, in_frame=True)
        elif name == b"VP8X" and size == 10 and not in_frame:
            features = bytearray((yield from self._take(size)))
            if self._mode == "all":
                features[0] &= ~_WEBP_XMP_FLAG
            self._output += (name, length, bytes(features))
        elif (name == b"EXIF" or (name == b"XMP " and self._mode == "location")) and not in_frame:
            content = yield from self._hold(size)
            kept = self._clean_metadata(name, content)
            self._output += (name if kept else b"JUNK", length, kept or bytes(size))
        else:
            self._output += (b"JUNK", length)
            yield from self._pass(size, blank=True)

    def _clean_metadata(self, name: bytes, content: bytes) -> bytes | None:
        """Return what remains of metadata in the same length, or None if it can only be JUNK."""
        size = len(content)
        if name == b"XMP ":
            return (_BLANK_XMP if size >= len(_BLANK_XMP) else b"").ljust(size) if _tells_location(content) else content
        had_exif = self._has_exif
        cleaned = self._clean_exif(content, size) or _MINIMAL_EXIF % 1
        return None if had_exif or len(cleaned) > size else cleaned.ljust(size, b"\0")


# EXIF (CIPA DC-008), the structure of TIFF 6

_EXIF_IFD, _INTEROP_IFD, _THUMBNAIL, _THUMBNAIL_SIZE = 0x8769, 0xA005, 0x0201, 0x0202
_GPS, _MAKER_NOTE, _DNG_MAKER_NOTE, _EXIF_IPTC, _EXIF_PHOTOSHOP = 0x8825, 0x927C, 0xC634, 0x83BB, 0x8649
_OFFSETS = (0x0111, 0x0117, 0x0144, 0x0145, 0x014A)
"""Tags of TIFF files that lead to strips, tiles and further IFDs."""

_DROPPED_TAGS = {_GPS, _MAKER_NOTE, _DNG_MAKER_NOTE, _EXIF_IPTC, _EXIF_PHOTOSHOP, *_OFFSETS}
_REWRITTEN_TAGS = {_EXIF_IFD, _INTEROP_IFD, _THUMBNAIL, _THUMBNAIL_SIZE}
_OFFSET_TYPES = (13, 16)
_POINTER: Tag = (4, 1, bytes(4))
_MINIMAL_EXIF = b"MM\0*\0\0\0\x08\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0%c\0\0" + b"\0\0\0\0"


def _clean_exif(data: bytes, mode: StripMode, limit: int) -> bytes | None:
    """Return what remains of EXIF, in at most `limit` bytes, or None if nothing does or it is not EXIF."""
    prefix = _EXIF if data.startswith(_EXIF) else b""  # PNG and WebP have none, but some writers put one there
    tiff = data[len(prefix) :]
    first = read_ifd(tiff)
    orientation = first.number(ORIENTATION)
    minimal = prefix + _MINIMAL_EXIF % orientation if 1 < orientation <= 8 else None
    if mode == "all":
        return minimal
    cleaned = prefix + _rebuild_exif(tiff, first)
    return cleaned if len(prefix) < len(cleaned) <= limit else minimal


def _rebuild_exif(tiff: bytes, old: Ifd) -> bytes:
    """Write the four IFDs that EXIF has besides that of GPS again: no cycle, overlap or gap of the old ones is carried on."""
    old_details = read_ifd(tiff, old.number(_EXIF_IFD))
    old_second = read_ifd(tiff, old.following)
    start = old_second.number(_THUMBNAIL)
    thumbnail = _clean_thumbnail(tiff[start : start + old_second.number(_THUMBNAIL_SIZE)])

    first, details, second = _keep_tags(old), _keep_tags(old_details), _keep_tags(old_second) if thumbnail else {}
    interop = _keep_tags(read_ifd(tiff, old_details.number(_INTEROP_IFD)))
    if interop:
        details[_INTEROP_IFD] = _POINTER
    if details:
        first[_EXIF_IFD] = _POINTER
    if thumbnail:
        second |= {_THUMBNAIL: _POINTER, _THUMBNAIL_SIZE: (4, 1, struct.pack(old.order + "I", len(thumbnail)))}
    if not first:
        return b""

    ifds = (first, details, interop, second)
    starts = [8]
    for ifd in ifds:
        starts.append(starts[-1] + len(_write_ifd(ifd, 0, 0, old.order)))
    for ifd, tag, offset in ((first, _EXIF_IFD, starts[1]), (details, _INTEROP_IFD, starts[2]), (second, _THUMBNAIL, starts[4])):
        if tag in ifd:
            ifd[tag] = (4, 1, struct.pack(old.order + "I", offset))
    following = (starts[3] if second else 0, 0, 0, 0)
    written = [_write_ifd(*each, old.order) for each in zip(ifds, starts, following, strict=False)]
    return b"".join((tiff[:4], struct.pack(old.order + "I", 8), *written, thumbnail))


def _keep_tags(ifd: Ifd) -> dict[int, Tag]:
    dropped = _DROPPED_TAGS | _REWRITTEN_TAGS
    return {
        tag: (kind, count, value)
        for tag, (kind, count, value) in ifd.tags.items()
        if tag not in dropped and kind not in _OFFSET_TYPES and not _tells_location(value)
    }


def _clean_thumbnail(thumbnail: bytes) -> bytes:
    stripper = Stripper("image/jpeg", "all")  # not "location": thumbnails in thumbnails would be read without end
    try:
        return stripper.strip(thumbnail)
    except ContentRejectedError:
        return b""


def _write_ifd(tags: dict[int, Tag], start: int, following: int, order: str) -> bytes:
    if not tags:
        return b""
    entries, values = [struct.pack(order + "H", len(tags))], []
    end = start + 6 + 12 * len(tags)
    for tag, (kind, length, value) in sorted(tags.items()):
        entries.append(struct.pack(order + "HHI", tag, kind, length))
        if len(value) <= 4:
            entries.append(value.ljust(4, b"\0"))
        else:
            entries.append(struct.pack(order + "I", end))
            values.append(value + bytes(len(value) & 1))
            end += len(values[-1])
    return b"".join((*entries, struct.pack(order + "I", following), *values))


# Photoshop's resources, and what tells a place in words

_IPTC, _PHOTOSHOP_EXIF = 0x0404, (0x0422, 0x0423)
_IPTC_PLACE = re.compile(rb"\x1c\x02[\x1a\x1b\x5a\x5c\x5f\x64\x65]")
_PROPERTY = (
    rb"(?:[\w.-]*(?:altitude|location)"
    rb"|(?:city|state|country|countrycode|countryname|provincestate|worldregion|lat|lon|long|lng|coordinates)\b)"
)
_LOCATION = re.compile(  # each branch begins with one letter, so that all others are passed at once
    rb"l(?:at|ong)itude|g(?:eo(?:rss|tag|(?<=\bgeo):-?[0-9])"
    rb"|ps(?<![a-z0-9+/]gps))"  # after none of the letters of base64: a thumbnail in XMP has any three letters somewhere
    rb"|<" + _PROPERTY + rb"|:" + _PROPERTY
)
_WINDOW, _CONTEXT, _LONGEST_MENTION = 16384, 4, 1024


def _tells_location(content: bytes) -> bool:
    """Return whether a text mentions a position, or a property of XMP names a place. It may be in UTF-16 as well."""
    for start in range(0, len(content), _WINDOW):  # or no other thread would run until all of it is searched
        end = start + _WINDOW + _LONGEST_MENTION
        before, piece = content[max(start - _CONTEXT, 0) : start].lower(), content[start:end].lower()
        texts = [(before, piece)]
        if b"\0" in piece:
            texts.append((before.replace(b"\0", b""), piece.replace(b"\0", b"")))
        for context, text in texts:
            found = _LOCATION.search(context + text, len(context))
            if found and (found.end() < len(context + text) or end >= len(content)):
                return True  # what ends where the window does may go on
    return False


def _clean_photoshop(resources: bytes) -> bytes:
    """Drop the resources that contain a place, or all of them if they cannot be parsed or continue in another segment."""
    kept: list[bytes] = []
    at = 0
    for _ in range(_FREE_PARTS):
        if at >= len(resources):
            return b"".join(kept)
        size_at = at + 6 + (resources[at + 6] + 2 & ~1) if at + 6 < len(resources) else len(resources)
        start = size_at + 4
        size = int.from_bytes(resources[size_at:start], "big")
        data = resources[start : start + size]
        if resources[at : at + 4] != b"8BIM" or start > len(resources) or len(data) < size:
            return b""
        kind = int.from_bytes(resources[at + 4 : at + 6], "big")
        if kind not in _PHOTOSHOP_EXIF and not (kind == _IPTC and _IPTC_PLACE.search(data)) and not _tells_location(data):
            kept.append(resources[at : start + size + (size & 1)])
        at = start + size + (size & 1)
    return b""


_PARSERS: dict[str, type[_Parser]] = {"image/jpeg": _JpegParser, "image/png": _PngParser, "image/webp": _WebPParser}
