"""Images with libvips, in a worker process."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

# Before the library is loaded: loaders that were not written for hostile files stay closed, also those of plugins.
os.environ["VIPS_BLOCK_UNTRUSTED"] = "1"
os.environ["VIPS_CONCURRENCY"] = "1"  # one process, one processor

from granite_storage.derived._rendering import Rendering, plan, recognize
from granite_storage.derived.base import Derivation
from granite_storage.exceptions import DerivationRefusedError

pyvips: Any = importlib.import_module("pyvips")

_LOADERS = {"JPEG": "Jpeg", "PNG": "Png", "GIF": "Nsgif", "WEBP": "Webp", "AVIF": "Heif", "TIFF": "Tiff"}
_DEPTHS = {"uchar": 8, "ushort": 16}
_SAVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "webp": ("webpsave_buffer", {"Q": 80}),
    "jpeg": ("jpegsave_buffer", {"Q": 82, "optimize_coding": True, "interlace": True}),
    "png": ("pngsave_buffer", {}),
    "avif": ("heifsave_buffer", {"Q": 60, "compression": "av1"}),
}


def render(file: BinaryIO, **arguments: Any) -> Derivation:
    """Return an image in another size and format, given by the fields of `Rendering`; see `ImageVariant`.

    Raises:
        DerivationRefusedError: The image has too many pixels, is damaged, or of a type that is not opened.
    """
    wanted = Rendering(**arguments)
    loader = _LOADERS.get(recognize(file, wanted.max_pixels))
    if loader is None:
        raise DerivationRefusedError("the file is not an image of a supported type: JPEG, PNG, GIF, WebP, AVIF or TIFF")
    pyvips.cache_set_max(0)
    pyvips.operation_block_set("VipsForeignLoad", True)
    pyvips.operation_block_set(f"VipsForeignLoad{loader}", False)
    with _refusing():
        image = pyvips.Image.new_from_file(file.name, access="sequential")
        width, height = image.width, image.height
        if width * height > wanted.max_pixels:
            raise DerivationRefusedError(f"the image has more than {wanted.max_pixels} pixels")
        if image.format not in _DEPTHS:
            raise DerivationRefusedError("the pixels of the image are 32-bit numbers, not colours")
        if image.get_typeof("orientation") and image.get("orientation") >= 5:
            width, height = height, width
        size, _ = plan((width, height), wanted.box, wanted.crop)
        how = {"crop": "centre", "size": "down"} if wanted.crop else {"size": "force"}
        image = pyvips.Image.thumbnail(
            file.name, size[0], height=size[1], output_profile="srgb", fail_on="error", **how
        ).colourspace("srgb")
        image = image.cast("uchar").copy_memory()  # until now, nothing was decoded
    if image.hasalpha() and (wanted.background is not None or wanted.image_format == "jpeg"):
        colour = bytes.fromhex((wanted.background or "#ffffff")[1:])
        image = image.flatten(background=list(colour))
    saver, options = _SAVERS[wanted.image_format]
    content = getattr(image, saver)(**options | ({} if wanted.quality is None else {"Q": wanted.quality}), keep="none")

    def shrink(size: tuple[int, int], quality: int) -> Any:
        small = image.thumbnail_image(size[0], height=size[1], size="force")
        return small.webpsave_buffer(Q=quality, alpha_q=quality, effort=6, keep="none")

    return wanted.describe(content, (image.width, image.height), shrink)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except pyvips.Error as error:
        if "out of memory" in str(error):
            raise MemoryError from error
        raise DerivationRefusedError("the image is damaged and cannot be read") from error
