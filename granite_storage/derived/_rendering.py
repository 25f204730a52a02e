"""What both engines agree on: which images are opened, what of them is shown, and in which size."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from granite_storage.derived.base import Derivation
from granite_storage.exceptions import DerivationRefusedError
from granite_storage.inspection._image_headers import read_webp

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)

_PLACEHOLDERS = ((32, 30), (32, 5), (24, 5), (16, 5), (8, 5))
"""Sides in pixels and qualities that are tried until a placeholder is small enough."""

_MOST_PLACEHOLDER = 400
"""The longest placeholder, in bytes."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """What an `ImageVariant` asks of an engine, in the words of its digest."""

    box: tuple[int, int]
    crop: bool
    image_format: str
    quality: int | None
    background: str | None
    animated: bool
    max_pixels: int
    placeholder: bool

    def describe(
        self,
        content: bytes,
        size: tuple[int, int],
        shrink: Callable[[tuple[int, int], int], bytes],
        *,
        frames: int | None = None,
    ) -> Derivation:
        """Return an image that was made, with what the receipt says of it; `shrink` is that of `make_placeholder`."""
        content_type = f"image/{self.image_format}"
        media: dict[str, Any] = {"type": content_type, "width": size[0], "height": size[1]}
        if frames is not None:
            media["frames"] = frames
        if self.placeholder and (url := make_placeholder(size, shrink)):
            media["placeholder"] = url
        return Derivation(content, content_type, media)


def recognize(file: BinaryIO, max_pixels: int) -> str:
    """Return the name that Pillow has for the format, and leave the file at its start.

    Raises:
        DerivationRefusedError: It is none that is opened, such as SVG, EPS or HEIC, or a WebP of too many pixels.
    """
    head = file.read(256)
    file.seek(0)
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        size = read_webp(head)  # a decoder makes room for all pixels before it tells how many there are
        if size is not None and size["width"] * size["height"] > max_pixels:
            raise DerivationRefusedError(f"the image has more than {max_pixels} pixels")
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
    raise DerivationRefusedError("the file is not an image of a supported type: JPEG, PNG, GIF, WebP, AVIF, BMP or TIFF")


def plan(size: tuple[int, int], box: tuple[int, int], crop: bool) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
    """Return the new size, and the region of the image that it shows; nothing is ever made larger."""
    width, height = size
    if not crop:
        scale = min(1.0, box[0] / width, box[1] / height)
        return (max(1, round(width * scale)), max(1, round(height * scale))), (0, 0, width, height)
    # The largest region of the wanted proportions, in the middle.
    region_width, region_height = min(width, height * box[0] / box[1]), min(height, width * box[1] / box[0])
    left, top = (width - region_width) / 2, (height - region_height) / 2
    scale = min(1.0, box[0] / region_width)
    new = (max(1, round(region_width * scale)), max(1, round(region_height * scale)))
    return new, (left, top, left + region_width, top + region_height)


def make_placeholder(size: tuple[int, int], shrink: Callable[[tuple[int, int], int], bytes]) -> str | None:
    """Return the data URL of a tiny image; None if each one is too long.

    Args:
        size: The size of the whole image.
        shrink: Returns it in another size, in WebP of a quality.
    """
    for side, quality in _PLACEHOLDERS:
        webp = shrink(plan(size, (side, side), crop=False)[0], quality)
        url = f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
        if len(url) <= _MOST_PLACEHOLDER:
            return url
    return None
