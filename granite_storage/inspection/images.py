"""The limits of images, read from their headers: nothing is decoded, so 3 KB never become 12 GB of pixels in memory."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import Any, Protocol

from granite_storage.exceptions import ConfigurationError, ContentRejectedError, MissingDependencyError
from granite_storage.inspection.base import Inspection, UploadPreview
from granite_storage.inspection.media_types import canonical

__all__ = ["ImageLimits", "read_webp"]

_MOST_HEADER = 1 << 20
_ORIENTATION = 0x0112
_MOST_BOXES = 4096
_MOST_PARTS = 1000


class ImageLimits:
    """Refuses images that are too large to show, or whose size cannot be told, and finds out width, height and orientation.

    It looks at the header, of at most 1 MiB, with Pillow's reader of that one format; AVIF, HEIC and WebP are read without it. An
    image whose header cannot be read there is refused. SVG has no size in pixels and is let through, as is what is no image.

    The ref's `media` has `width` and `height` in pixels, as they are stored, `orientation` where an EXIF header turns the image
    (2 to 8), and `frames` where the header tells that there are several.

    Args:
        max_pixels: The most pixels, width times height; None for any number.
        max_side: The most pixels of each side; None for any number.
        min_side: The fewest pixels of each side.

    Raises:
        ConfigurationError: A limit is no number of pixels.
        MissingDependencyError: Pillow is not installed; `granite-storage[inspect]` has it.

    Example:
        >>> limits = ImageLimits(max_pixels=50_000_000, max_side=20_000)
    """

    def __init__(self, *, max_pixels: int | None = 50_000_000, max_side: int | None = 20_000, min_side: int = 1) -> None:
        for argument, value in (("max_pixels", max_pixels), ("max_side", max_side), ("min_side", min_side)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{argument} of ImageLimits must be a number of pixels, not {value!r}")
        if max_side is not None and min_side > max_side:
            raise ConfigurationError(f"min_side of ImageLimits is {min_side}, more than its max_side of {max_side}")
        _require_pillow()
        self.max_pixels = max_pixels
        self.max_side = max_side
        self.min_side = min_side

    def __repr__(self) -> str:
        return f"ImageLimits(max_pixels={self.max_pixels}, max_side={self.max_side}, min_side={self.min_side})"

    def begin(self, upload: UploadPreview, /) -> Inspection | None:
        """Return what looks at an image; None for anything else."""
        content_type = upload.content_type or ""
        if not content_type.startswith("image/") or content_type == "image/svg+xml":
            return None
        return _HeaderInspection(self, content_type)

    def require(self, width: int, height: int) -> None:
        """Refuse a size that is out of bounds.

        Raises:
            ContentRejectedError: It is.
        """
        if min(width, height) < self.min_side:
            raise ContentRejectedError(f"the image has {width} x {height} pixels; each side must have at least {self.min_side}")
        if self.max_side is not None and max(width, height) > self.max_side:
            raise ContentRejectedError(f"the image has {width} x {height} pixels; each side may have at most {self.max_side}")
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise ContentRejectedError(
                f"the image has {width} x {height} pixels, {width * height} in all; it may have at most {self.max_pixels}"
            )


class _HeaderInspection:
    def __init__(self, limits: ImageLimits, content_type: str) -> None:
        self._limits = limits
        self._read = _READERS.get(content_type) or _PillowReader(content_type)
        self._content = bytearray()
        self._tried = 0
        self._found: Mapping[str, Any] | None = None

    def feed(self, piece: bytes, /) -> bool:
        """Look for the header; each time as much again has come."""
        self._content += piece[: _MOST_HEADER - len(self._content)]
        if len(self._content) >= 2 * self._tried or len(self._content) == _MOST_HEADER:
            self._look()
        return self._found is None and len(self._content) < _MOST_HEADER

    def finish(self) -> Mapping[str, Any]:
        """Return the size of the image."""
        if self._found is None and self._tried < len(self._content):
            self._look()
        if self._found is None:
            raise ContentRejectedError("the size of the image cannot be read: it is damaged, or its header is too long")
        return self._found

    def _look(self) -> None:
        self._tried = len(self._content)
        found = self._read(bytes(self._content))
        if found is not None:
            self._limits.require(found["width"], found["height"])
            self._found = found
            self._content.clear()


class _Reader(Protocol):
    def __call__(self, header: bytes, /) -> dict[str, Any] | None: ...


class _PillowReader:
    """Reads a header with Pillow's plugin of one format: none of the others ever sees hostile bytes, and none decodes."""

    def __init__(self, content_type: str) -> None:
        self._content_type = content_type

    def __call__(self, header: bytes, /) -> dict[str, Any] | None:
        if _has_many_parts(header, self._content_type):
            return _read_png(header)
        Image = _require_pillow()  # noqa: N806
        names = [name for name, mime in Image.MIME.items() if canonical(mime) == self._content_type and name in Image.OPEN]
        for name in names:
            factory, _ = Image.OPEN[name]
            try:
                image = factory(io.BytesIO(header), "")
                found: dict[str, Any] = {"width": image.size[0], "height": image.size[1]}
                if (frames := getattr(image, "n_frames", 1) if name == "PNG" else 1) > 1:
                    found["frames"] = frames
                if (orientation := _orientation_of(Image, image)) > 1:
                    found["orientation"] = orientation
            except Exception:  # noqa: BLE001, S112  # what a cut off or hostile header raises differs from plugin to plugin
                continue
            return found
        return _read_png(header)  # Pillow reads one up to its pixels, and gives up where texts before them are long


def _has_many_parts(header: bytes, content_type: str) -> bool:
    """Tell whether a header is cut into thousands of parts, each of which would take Pillow microseconds."""
    place, step = {"image/jpeg": (2, 2), "image/png": (8, 12)}.get(content_type, (len(header), 0))
    for _ in range(_MOST_PARTS):
        if place + 8 > len(header) or header[place : place + 2] == b"\xff\xda" or header[place + 4 : place + 8] == b"IDAT":
            return False
        size = struct.unpack_from(">H", header, place + 2)[0] if step == 2 else struct.unpack_from(">I", header, place)[0]
        place += step + size
    return True


def _read_png(header: bytes) -> dict[str, Any] | None:
    if not header.startswith(b"\x89PNG\r\n\x1a\n") or header[12:16] != b"IHDR" or len(header) < 24:
        return None
    width, height = struct.unpack_from(">II", header, 16)
    return {"width": width, "height": height}


def _orientation_of(Image: Any, image: Any) -> int:  # noqa: N803
    exif = image.info.get("exif")
    if not isinstance(exif, bytes):
        return 1
    tags = Image.Exif()
    tags.load(exif)
    value = tags.get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _require_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "ImageLimits needs Pillow: install granite-storage[inspect], or leave it out of the policy"
        ) from error
    Image.init()
    return Image


def read_webp(header: bytes) -> dict[str, Any] | None:
    """Return the size of a WebP image. Source: RFC 9649, sections 2.5 to 2.7."""
    kind, body = header[12:16], header[20:]
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


def _read_heif(header: bytes) -> dict[str, Any] | None:
    """Return the size of the largest picture of an AVIF or HEIC file. Source: ISO/IEC 23008-12, section 6.5.3."""
    sizes = list(_spatial_extents(header, 0, len(header), 0))
    if not sizes:
        return None
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return {"width": width, "height": height}


_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0}


def _spatial_extents(header: bytes, start: int, stop: int, depth: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for _ in range(_MOST_BOXES):
        if start + 8 > stop:
            break
        size, kind = struct.unpack_from(">I4s", header, start)
        begin = start + 8
        if size == 1 and begin + 8 <= stop:
            size = struct.unpack_from(">Q", header, begin)[0]
            begin += 8
        end = stop if size == 0 else start + size
        if end <= start:
            break
        if kind in _CONTAINERS and end > stop:
            return []  # the rest of it is still to come
        if kind == b"ispe" and begin + 12 <= min(end, stop):
            found.append(struct.unpack_from(">II", header, begin + 4))
        elif kind in _CONTAINERS and depth < len(_CONTAINERS):
            found += _spatial_extents(header, begin + _CONTAINERS[kind], end, depth + 1)
        start = end
    return found


_READERS: dict[str, _Reader] = {
    "image/webp": read_webp,
    **dict.fromkeys(("image/avif", "image/heic", "image/heif", "image/heic-sequence", "image/heif-sequence"), _read_heif),
}
