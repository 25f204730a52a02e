"""The limits of images, read from their headers: nothing is decoded, so 3 KB never become 12 GB of pixels in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from granite_storage.exceptions import ConfigurationError, ContentRejectedError, MissingDependencyError
from granite_storage.inspection._image_headers import (
    QUICK,
    Found,
    orientation_in,
    read_heif,
    read_icon,
    read_ifd,
    read_jpeg,
    read_jpeg2000_size,
    read_png_size,
)
from granite_storage.inspection._media_names import canonical
from granite_storage.inspection.base import HeadInspector, Inspection, UploadPreview, require_positive

_MOST_HEADER = 1 << 20
_QUICK_HEADER = 8192
_MOST_PARTS = 1000
_WIDTH, _HEIGHT, _SAMPLES = 0x0100, 0x0101, 0x0115
_MOST_SAMPLES = 6


class ImageLimits(HeadInspector):
    """Refuses images that are too large, or whose size cannot be read, and records width, height and orientation.

    It looks at the header, of at most 1 MiB. JPEG, PNG, GIF, WebP, AVIF, HEIC and icons need no more than that; bitmaps,
    TIFF, JPEG 2000, Photoshop's files and unusual JPEGs are shown to Pillow's reader of that one format, in a thread. An image
    whose header cannot be read there is refused. SVG has no size in pixels and is let through, as is what is not an image.

    The ref's `media` has `width` and `height` in pixels, as they are stored; `orientation` where the EXIF header of a JPEG, PNG
    or TIFF turns the image (2 to 8); and `frames` of a moving PNG. Those of a GIF or WebP would take all of the file to count.

    Args:
        max_pixels: The most pixels, width times height; None for any number.
        max_side: The most pixels of each side; None for any number.
        min_side: The fewest pixels of each side.

    Raises:
        ConfigurationError: A limit is not a number of pixels.
        MissingDependencyError: Pillow is not installed; `granite-storage[inspect]` has it.

    Example:
        >>> limits = ImageLimits(max_pixels=50_000_000, max_side=20_000)
    """

    def __init__(self, *, max_pixels: int | None = 50_000_000, max_side: int | None = 20_000, min_side: int = 1) -> None:
        for argument, value in (("max_pixels", max_pixels), ("max_side", max_side), ("min_side", min_side)):
            if value is not None:
                require_positive(f"{argument} of ImageLimits, in pixels,", value)
        if max_side is not None and min_side > max_side:
            raise ConfigurationError(f"min_side of ImageLimits is {min_side}, more than its max_side of {max_side}")
        _require_pillow()
        self.max_pixels = max_pixels
        self.max_side = max_side
        self.min_side = min_side

    def __repr__(self) -> str:
        return f"ImageLimits(max_pixels={self.max_pixels}, max_side={self.max_side}, min_side={self.min_side})"

    def inspect_head(self, upload: UploadPreview, /) -> Mapping[str, Any] | None:
        """Return the size of an image if a few KiB suffice, an empty mapping for other types, and None if more is needed."""
        if type(self).begin is not ImageLimits.begin:
            return None  # a subclass looks at more, or at less
        if not _has_pixels(upload.content_type):
            return {}
        read = QUICK.get(upload.content_type or "")
        found = None if read is None else read(upload.head[:_QUICK_HEADER])
        if found is not None:
            self.require(found["width"], found["height"])
        return found

    def begin(self, upload: UploadPreview, /) -> Inspection | None:
        """Return the inspection of an image, or None for other types."""
        return _HeaderInspection(self, upload.content_type or "") if _has_pixels(upload.content_type) else None

    def require(self, width: int, height: int) -> None:
        """Refuse a size that exceeds a limit.

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


def _has_pixels(content_type: str | None) -> bool:
    return content_type is not None and content_type.startswith("image/") and content_type != "image/svg+xml"


class _HeaderInspection:
    def __init__(self, limits: ImageLimits, content_type: str) -> None:
        self._limits = limits
        self._content_type = content_type
        self._read = _READERS.get(content_type) or partial(_ask_pillow, content_type)
        self._content = bytearray()
        self._tried = 0
        self._found: Mapping[str, Any] | None = None

    def feed(self, piece: bytes, /) -> bool:
        """Look for the header each time the data has doubled."""
        self._content += piece[: _MOST_HEADER - len(self._content)]
        if len(self._content) >= 2 * self._tried or len(self._content) == _MOST_HEADER:
            self._look()
        return self._found is None and len(self._content) < _MOST_HEADER

    def finish(self) -> Mapping[str, Any]:
        """Return the size of the image."""
        if self._found is None and self._tried < len(self._content):
            self._look()
        if self._found is None and self._content_type == "image/png":
            self._keep(read_png_size(bytes(self._content)))  # what stands before its pixels is too long, or damaged
        if self._found is None:
            raise ContentRejectedError("the size of the image cannot be read: it is damaged, or its header is too long")
        return self._found

    def _look(self) -> None:
        self._tried = len(self._content)
        self._keep(self._read(bytes(self._content)))

    def _keep(self, found: Found | None) -> None:
        if found is not None:
            self._limits.require(found["width"], found["height"])
            self._found = found
            self._content.clear()


def _ask_pillow(content_type: str, header: bytes) -> Found | None:
    """Read a header with Pillow's plugin of one format: none of the others ever sees hostile bytes, and none decodes.

    Pillow warns of what it finds odd, or logs it, and neither can be silenced for one thread only. So no plugin is shown what it
    would complain of.
    """
    Image = _require_pillow()  # noqa: N806
    plugins = (name for name, mime in Image.MIME.items() if canonical(mime) == content_type and name in Image.OPEN)
    return next((found for name in plugins if (found := _open_image(Image.OPEN[name][0], header))), None)


def _open_image(factory: Callable[[io.BytesIO, str], Any], header: bytes) -> Found | None:
    try:
        image = factory(io.BytesIO(header), "")
        width, height = image.size
        exif = image.info.get("exif")
    except Exception:  # noqa: BLE001  # what a cut off or hostile header raises differs from plugin to plugin
        return None
    return {"width": width, "height": height, **(orientation_in(exif) if isinstance(exif, bytes) else {})}


def _read_unusual_jpeg(header: bytes) -> Found | None:
    """Read a JPEG, with Pillow where it is unusual."""
    if (found := read_jpeg(header)) is not None:
        return found
    return None if _has_many_parts(header) else _open_image(_load_jpeg_reader(), header)


@lru_cache(maxsize=1)
def _load_jpeg_reader() -> Callable[[io.BytesIO, str], Any]:
    from PIL import JpegImagePlugin

    class JpegHeader(JpegImagePlugin.JpegImageFile):
        """A JPEG whose EXIF is not read for its resolution, of which Pillow would warn where it is damaged."""

        def _read_dpi_from_exif(self) -> None:
            pass

    return JpegHeader


def _has_many_parts(header: bytes) -> bool:
    """Return whether a JPEG is cut into thousands of parts, each of which would take Pillow microseconds."""
    place = 2
    for _ in range(_MOST_PARTS):
        if place + 4 > len(header) or header[place : place + 2] == b"\xff\xda":
            return False
        place += 2 + int.from_bytes(header[place + 2 : place + 4], "big")
    return True


def _read_tiff(header: bytes) -> Found | None:
    """Read a TIFF that Pillow knows; of tags that lie outside, or have too many values or samples, it would complain."""
    from PIL import TiffTags

    ifd = read_ifd(header)
    width, height = ifd.number(_WIDTH), ifd.number(_HEIGHT)
    samples = ifd.number(_SAMPLES) if _SAMPLES in ifd.tags else 1
    if not ifd.is_sound or len(ifd.tags) > _MOST_PARTS or not width or not height or not 0 < samples <= _MOST_SAMPLES:
        return None
    if any(count != 1 and TiffTags.lookup(tag).length == 1 for tag, (_, count, _) in ifd.tags.items()):
        return None
    return {"width": width, "height": height, **orientation_in(header)} if _ask_pillow("image/tiff", header) else None


def _read_jpeg2000(header: bytes) -> Found | None:
    """Read a JPEG 2000 that Pillow knows. It believes a box, and what is decoded is the codestream: both say the same."""
    found = _ask_pillow("image/jp2", header)
    return found if found is not None and read_jpeg2000_size(header) == (found["width"], found["height"]) else None


def _require_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "ImageLimits needs Pillow: install granite-storage[inspect], or leave it out of the policy"
        ) from error
    Image.init()
    return Image


_READERS: dict[str, Callable[[bytes], Found | None]] = {
    **QUICK,
    "image/jpeg": _read_unusual_jpeg,
    "image/tiff": _read_tiff,
    "image/jp2": _read_jpeg2000,
    "image/vnd.microsoft.icon": read_icon,  # Pillow would decode it
    **dict.fromkeys(("image/avif", "image/heic", "image/heif", "image/heic-sequence", "image/heif-sequence"), read_heif),
}
