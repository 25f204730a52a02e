"""Read the sizes of images from a few hundred bytes of their headers, without a decoder.

A reader returns what it found, and None where the header is not all there or is none that it understands. What follows a size
without changing it is not looked at.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

Found: TypeAlias = dict[str, Any]
"""Width and height, and orientation and frames where there is something to say."""

_MOST_BOXES = 4096
_MOST_PARTS = 1000
"""How many parts a header may be cut into: a photograph has some 30, and each takes a microsecond."""

_PNG = b"\x89PNG\r\n\x1a\n"


_JPEG_PASSED = frozenset({0xC4, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xE0, 0xE1, 0xE2, 0xED, 0xEE})
_JPEG_LEAST = {0xE0: (b"JFIF", 7), 0xE2: (b"ICC_PROFILE\0", 14), 0xED: (b"Photoshop 3.0\0", 1 << 16), 0xEE: (b"Adobe", 7)}
"""Applications' segments, and what readers take for granted in them; of Photoshop's that takes more than a glance to tell."""


def read_jpeg(header: bytes) -> Found | None:
    """Read the segments of a JPEG up to its first scan. Source: ITU-T T.81, annex B."""
    found: Found | None = None
    exif = b""
    place, size = 2, len(header)
    for _ in range(_MOST_PARTS):
        if size < place + 4 or header[place] != 0xFF:
            return None
        kind, start = header[place + 1], place + 4
        place += 2 + (header[place + 2] << 8 | header[place + 3])
        if not start <= place <= size:
            return None
        if kind in _JPEG_PASSED:
            continue
        body = header[start:place]
        if kind == 0xDA:
            return None if found is None else found | (orientation_in(exif) if exif else {})
        if kind in (0xC0, 0xC1, 0xC2):
            if found is not None or len(body) < 9 or len(body) % 3 or body[0] != 8 or body[5] not in (1, 3, 4):
                return None
            found = {"width": body[3] << 8 | body[4], "height": body[1] << 8 | body[2]}
        elif kind == 0xE1:
            if body.startswith(b"Exif\0\0"):
                exif = exif + body[6:] if exif else body
        elif kind == 0xDB:
            if not _are_tables(body):
                return None
        elif kind not in _JPEG_LEAST or (body.startswith(_JPEG_LEAST[kind][0]) and len(body) < _JPEG_LEAST[kind][1]):
            return None
    return None


def _are_tables(body: bytes) -> bool:
    """Return whether a segment has whole tables of quantization, and nothing else."""
    place = 0
    while place < len(body):
        place += 1 + 64 * (2 if body[place] >> 4 else 1)
    return place == len(body)


def read_png(header: bytes) -> Found | None:
    """Read the chunks of a PNG up to its pixels. Source: the W3C's Portable Network Graphics, section 11."""
    found = read_png_size(header)
    if found is None:
        return None
    place = 8 + 25
    for _ in range(_MOST_PARTS):
        if len(header) < place + 8:
            return None
        length, name = struct.unpack_from(">I4s", header, place)
        if name == b"IDAT":
            return found
        body = header[place + 8 : place + 8 + length]
        if name in (b"acTL", b"eXIf"):
            if not _is_intact(header, place, length):
                return None
            if name == b"eXIf":
                found |= orientation_in(body)
            elif length >= 8 and 1 < (frames := int.from_bytes(body[:4], "big")) < 1 << 31:
                found["frames"] = frames
        place += 12 + length
    return None


def read_png_size(header: bytes) -> Found | None:
    """Read the first chunk of a PNG, which is enough where what follows it is damaged, or long."""
    if header[:16] != _PNG + b"\0\0\0\rIHDR" or not _is_intact(header, 8, 13):
        return None
    width, height, depth, colour, _, filtering = struct.unpack_from(">IIBBBB", header, 16)
    if depth not in {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8), 2: (8, 16), 4: (8, 16), 6: (8, 16)}.get(colour, ()) or filtering:
        return None
    return {"width": width, "height": height}


def _is_intact(header: bytes, place: int, length: int) -> bool:
    end = place + 8 + length
    return len(header) >= end + 4 and zlib.crc32(header[place + 4 : end]) == int.from_bytes(header[end : end + 4], "big")


def read_gif(header: bytes) -> Found | None:
    """Read a GIF up to its first frame, which may be larger than its screen. Source: GIF89a, sections 18 to 26."""
    if header[:6] not in (b"GIF87a", b"GIF89a") or len(header) < 13:
        return None
    width, height, flags = struct.unpack_from("<HHB", header, 6)
    place = 13 + _palette_size(flags)
    for _ in range(_MOST_PARTS):
        kind = header[place : place + 1]
        if kind == b"!":
            place = -1 if _is_cut_short(header[place + 1 : place + 15]) else _end_of_blocks(header, place + 2)
            if place < 0:
                return None
        elif kind == b"," and len(header) >= place + 10:
            left, top, across, down, flags = struct.unpack_from("<HHHHB", header, place + 1)
            if len(header) <= place + 10 + _palette_size(flags):
                return None
            return {"width": max(width, left + across), "height": max(height, top + down)}
        else:
            return None
    return None


def _is_cut_short(extension: bytes) -> bool:
    """Return whether an extension ends before readers expect its end, where they disagree on the rest. A comment may be empty."""
    kind, size = extension[:1], extension[1:2]
    if kind == b"\xf9":
        return size < b"\4"
    return kind != b"\xfe" and (size in (b"", b"\0") or (extension[2:13] == b"NETSCAPE2.0" and extension[13:] in (b"", b"\0")))


def _palette_size(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _end_of_blocks(header: bytes, place: int) -> int:
    """Return where a row of blocks ends, or -1 if its end is not in the data."""
    for _ in range(_MOST_PARTS):
        if place >= len(header):
            break
        if not header[place]:
            return place + 1
        place += 1 + header[place]
    return -1


def read_webp(header: bytes) -> Found | None:
    """Read the first chunk of a WebP image. Source: RFC 9649, sections 2.5 to 2.7."""
    kind, body = header[12:16], header[20:30]
    if kind == b"VP8X" and len(body) >= 10:
        width, height = (int.from_bytes(body[start : start + 3], "little") + 1 for start in (4, 7))
    elif kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", body, 6))
    else:
        return None
    return {"width": width, "height": height}


def read_icon(header: bytes) -> Found | None:
    """Read the size of the largest picture of an icon: a PNG, or a bitmap with its mask below it. Source: Microsoft's ICONDIR."""
    count = int.from_bytes(header[4:6], "little")
    if header[:4] != b"\0\0\1\0" or count > _MOST_PARTS:
        return None
    sizes: list[tuple[int, int]] = []
    for entry in range(count):
        if len(header) < 22 + 16 * entry:
            return None
        start = int.from_bytes(header[18 + 16 * entry : 22 + 16 * entry], "little")
        picture = header[start : start + 33]
        if picture.startswith(_PNG):
            found = read_png_size(picture)
            if found is None:
                return None
            sizes.append((found["width"], found["height"]))
        elif len(picture) >= 12 and picture[:4] == b"\x28\0\0\0":
            width, height = struct.unpack_from("<ii", picture, 4)
            sizes.append((abs(width), abs(height) // 2))
        else:
            return None
    return _largest(sizes)


def read_heif(header: bytes) -> Found | None:
    """Read the size of the largest picture or track of an AVIF or HEIC file.

    Source: ISO/IEC 23008-12, section 6.5.3, and ISO/IEC 14496-12, section 8.3.2.
    """
    found = list(_sizes_in_boxes(header, 0, len(header), 0))
    kinds = {kind for kind, _, _ in found}
    brands = header[8 : int.from_bytes(header[:4], "big")]
    is_sequence = b"avis" in brands or b"msf1" in brands  # readers then go by its track, wherever that is
    if b"" in kinds or (is_sequence and b"tkhd" not in kinds):
        return None
    return _largest([size for _, *size in found])


def _largest(sizes: list[Any]) -> Found | None:
    if not sizes:
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return {"width": width, "height": height}


_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"moov": 0, b"trak": 0}
_DEEPEST = 3


def _sizes_in_boxes(header: bytes, start: int, stop: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes that contain sizes, and one without a name if the data may contain more."""
    for number, (kind, begin, end) in enumerate(_boxes(header, start, stop)):
        if number == _MOST_BOXES or (kind in _CONTAINERS and end > stop):
            yield b"", 0, 0
            return
        if kind == b"ispe" and begin + 12 <= min(end, stop):
            yield kind, *struct.unpack_from(">II", header, begin + 4)
        elif kind == b"tkhd" and (place := begin + (88 if header[begin : begin + 1] == b"\1" else 76)) + 8 <= min(end, stop):
            yield kind, *struct.unpack_from(">H2xH", header, place)
        elif kind in _CONTAINERS and depth < _DEEPEST:
            yield from _sizes_in_boxes(header, begin + _CONTAINERS[kind], end, depth + 1)


def _boxes(header: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the boxes of a file of the ISO family: their names, and where their content begins and ends."""
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", header, start)
        begin = start + 8
        if size == 1 and begin + 8 <= stop:
            size = struct.unpack_from(">Q", header, begin)[0]
            begin += 8
        end = start + size if size else stop + 1  # it ends where the file does
        if end <= start:
            break
        yield kind, begin, end
        start = end


def read_jpeg2000_size(header: bytes) -> tuple[int, int] | None:
    """Read the size in the codestream of a JPEG 2000, which is what is decoded. Source: ITU-T T.800, sections A.5.1 and I.5.4."""
    if header.startswith(b"\xff\x4f\xff\x51"):
        place = 0
    else:
        place = next((begin for kind, begin, _ in _boxes(header, 0, len(header)) if kind == b"jp2c"), len(header))
    if header[place : place + 4] != b"\xff\x4f\xff\x51" or len(header) < place + 24:
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", header, place + 8)
    return right - left, bottom - top


ORIENTATION = 0x0112
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 129: 1}
_ENTRIES = {order: struct.Struct(order + "HHII") for order in "<>"}

Tag: TypeAlias = tuple[int, int, bytes]
"""The type of a tag, the number of its values, and all of them."""


class Ifd(NamedTuple):
    """A directory of a TIFF, or of EXIF, which has the structure of one.

    Attributes:
        order: How its numbers are written, as `struct` names it; nothing where it is no TIFF.
        tags: Its tags, the first of each number, without those of unknown types and those that lie outside.
        following: Where the next directory is; 0 for none.
        is_sound: Whether all of it, and of what its tags lead to, is there.
    """

    order: str
    tags: dict[int, Tag]
    following: int
    is_sound: bool

    def number(self, tag: int) -> int:
        """Return the value of a tag that is one number, or 0 if it is not one."""
        kind, count, value = self.tags.get(tag, (0, 0, b""))
        return int.from_bytes(value, "little" if self.order == "<" else "big") if count == 1 and kind in (3, 4, 13) else 0


def read_ifd(tiff: bytes, offset: int | None = None) -> Ifd:
    """Read a directory, by default the first one. Source: TIFF 6.0, section 2."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4], "") if len(tiff) >= 8 else ""
    place = struct.unpack_from(order + "I", tiff, 4)[0] if order and offset is None else offset or 0
    tags: dict[int, Tag] = {}
    if not order or not 8 <= place <= len(tiff) - 2:
        return Ifd(order, tags, 0, False)
    end = place + 2 + 12 * struct.unpack_from(order + "H", tiff, place)[0]
    budget = len(tiff)  # values that overlap could be a thousand times as long as the whole
    is_sound = end + 4 <= len(tiff)
    unpack, sizes = _ENTRIES[order].unpack_from, _TYPE_SIZES
    for at in range(place + 2, min(end, len(tiff) - 11), 12):
        tag, kind, count, start = unpack(tiff, at)
        size = sizes.get(kind, 0) * count
        if tag in tags or not size:
            continue
        if size <= 4:
            start = at + 8
        elif size <= budget and start + size <= len(tiff):
            budget -= size
        else:
            is_sound = False
            continue
        tags[tag] = kind, count, tiff[start : start + size]
    following: int = struct.unpack_from(order + "I", tiff, end)[0] if end + 4 <= len(tiff) else 0
    return Ifd(order, tags, following, is_sound)


def orientation_in(exif: bytes) -> Found:
    """Return the EXIF orientation; an empty mapping if there is none or EXIF cannot be read."""
    value = read_ifd(exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")).number(ORIENTATION)
    return {"orientation": value} if 1 < value <= 8 else {}


QUICK: dict[str, Callable[[bytes], Found | None]] = {
    "image/jpeg": read_jpeg,
    "image/png": read_png,
    "image/gif": read_gif,
    "image/webp": read_webp,
}
"""Those that a few KiB are enough for, so that they need no thread."""
