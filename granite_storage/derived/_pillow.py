"""Images with Pillow, in a worker process."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from PIL import AvifImagePlugin, Image, ImageCms, ImageSequence

from granite_storage.derived._rendering import Rendering, plan, recognize
from granite_storage.derived.base import Derivation
from granite_storage.exceptions import DerivationRefusedError

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GAP = 2.0
_OPTIONS: dict[str, dict[str, Any]] = {
    "webp": {"quality": 80},
    "jpeg": {"quality": 82, "optimize": True, "progressive": True},
    "png": {},
    "avif": {"quality": 60, "max_threads": 1},
}


def render(file: BinaryIO, **arguments: Any) -> Derivation:
    """Return an image in another size and format, given by the fields of `Rendering`; see `ImageVariant`.

    Raises:
        DerivationRefusedError: The image has too many pixels, is damaged, or of a type that is not opened.
    """
    wanted = Rendering(**arguments)
    Image.MAX_IMAGE_PIXELS = wanted.max_pixels / 2  # type: ignore[assignment]  # Pillow raises beyond twice as many, and warns before
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with _refusing(wanted.max_pixels), warnings.catch_warnings(action="ignore"):
        image = Image.open(file, formats=[recognize(file, wanted.max_pixels)])
        frames = getattr(image, "n_frames", 1) if wanted.animated else 1
        is_animated = frames > 1 and frames * image.width * image.height <= wanted.max_pixels
        durations: list[int] = []
        images: list[Image.Image] = []
        for frame in ImageSequence.Iterator(image) if is_animated else [image]:
            images.append(_flatten(_shape(frame, wanted.box, wanted.crop), wanted.image_format, wanted.background))
            durations.append(int(frame.info.get("duration") or 100))
        loop = int(image.info.get("loop", 1 if image.format == "GIF" else 0))  # a GIF that says nothing is shown once
    first = images[0]
    options = _OPTIONS[wanted.image_format] | ({} if wanted.quality is None else {"quality": wanted.quality})
    if is_animated:
        options |= {"save_all": True, "append_images": images[1:], "duration": durations, "loop": loop}
    content = _save(first, wanted.image_format, options)

    def shrink(size: tuple[int, int], quality: int) -> bytes:
        small = first.resize(size, Image.Resampling.BICUBIC, reducing_gap=_GAP)
        return _save(small, "webp", {"quality": quality, "alpha_quality": quality, "method": 6})

    return wanted.describe(content, first.size, shrink, frames=frames if is_animated else None)


@contextmanager
def _refusing(max_pixels: int) -> Iterator[None]:
    try:
        yield
    except (DerivationRefusedError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DerivationRefusedError(f"the image has more than {max_pixels} pixels") from error
    except Exception as error:  # what a damaged or hostile file raises differs from plugin to plugin
        if "out of memory" in str(error):
            raise MemoryError from error
        if isinstance(error, OSError) and error.errno is not None:  # of the system: Pillow's own have no number
            raise
        raise DerivationRefusedError("the image is damaged and cannot be read") from error


def _shape(image: Image.Image, box: tuple[int, int], crop: bool) -> Image.Image:
    """Return a frame in its new size, upright, in sRGB or grey, perhaps with an alpha channel."""
    if image.format != "JPEG":
        image.load()
    orientation = _orientation_of(image)
    wanted = box if orientation < 5 else (box[1], box[0])
    size, region = plan(image.size, wanted, crop)
    if image.format == "JPEG":
        shrink = _GAP * size[0] / (region[2] - region[0])
        original = image.width
        drafted = image.draft(None, (math.ceil(image.width * shrink), math.ceil(image.height * shrink)))
        if drafted is not None:
            scale = drafted[1][2] / original
            region = (region[0] * scale, region[1] * scale, region[2] * scale, region[3] * scale)
        image.load()
    profile = image.info.get("icc_profile")
    image = _to_continuous(image)
    region = (*region[:2], min(region[2], image.width), min(region[3], image.height))
    if size != image.size or region != (0, 0, *size):
        image = image.resize(size, Image.Resampling.LANCZOS, box=region, reducing_gap=_GAP)
    image = _to_srgb(image, profile)
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation_of(image: Image.Image) -> int:
    if image.format == "TIFF":  # turned when it is loaded
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # damaged metadata does not make the image worthless
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_continuous(image: Image.Image) -> Image.Image:
    """Return pixels that can be averaged."""
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):
        raise DerivationRefusedError("the pixels of the image are 32-bit numbers, not colours")
    if image.has_transparency_data:
        return image.convert("RGBA")
    if image.mode in ("P", "1"):
        return image.convert("RGB" if image.mode == "P" else "L")
    return image


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if alpha is not None else image
    converted = _convert_profile(colours, profile) if profile else None
    if converted is None:
        converted = colours if colours.mode in ("L", "RGB") else colours.convert("RGB")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _convert_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Return an image in sRGB; None where the profile is damaged or of another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _flatten(image: Image.Image, image_format: str, background: str | None) -> Image.Image:
    """Put a transparent image on the background, where there is one or the format has no transparency."""
    if image.mode == "RGBA" and (background is not None or image_format == "jpeg"):
        ground = Image.new("RGB", image.size, background or "#ffffff")
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image


def _save(image: Image.Image, image_format: str, options: dict[str, Any]) -> bytes:
    image.info = {}  # some formats would take comments, profiles and transparency from there
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()
