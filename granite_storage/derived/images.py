"""Images in other sizes and formats."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import Any, Literal, TypeAlias

from granite_storage.derived.base import (
    Derivation,
    DerivationSource,
    Missing,
    When,
    check_accepted_types,
    make_digest,
    require_choice,
)
from granite_storage.derived.processes import MIB, Limits, run_in_process
from granite_storage.exceptions import ConfigurationError, MissingDependencyError
from granite_storage.inspection.base import require_positive

Format: TypeAlias = Literal["webp", "jpeg", "png", "avif"]
"""What an image may become."""

Engine: TypeAlias = Literal["pillow", "vips"]
"""Which library makes the image."""

_CODE = 1
"""The version of the code that makes images: another number makes all of them again."""

_ENGINES = {"pillow": ("_pillow", "PIL", "Pillow", "images"), "vips": ("_vips", "pyvips", "pyvips", "vips")}
_MOST_SIDE = 16383
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_PLACEHOLDER = re.compile(r"data:image/webp;base64,[A-Za-z0-9+/=]{1,377}")


class ImageVariant:
    """An image in another size and format, made in a worker process.

    An image is never enlarged, is turned upright, and is converted to sRGB. It has no metadata of the original: no location,
    camera, comment or colour profile.

    ======================================  ==============================================================================
    Original                                Result
    ======================================  ==============================================================================
    JPEG, PNG, GIF, WebP, AVIF, BMP, TIFF   made, by the decoder that the first bytes name; of several images the first
    HEIC, anything else that is an image    refused; no library looks at it
    PDF, SVG, anything but an image         has no such variant, and is stored without it; see `accept`
    more than `max_pixels`                  refused before it is decoded
    cut off or damaged                      refused
    takes more memory or time than allowed  fails, and may be tried again
    smaller than the box                    its own size; with `fill`, the largest region of the box's proportions
    1 pixel high or wide                    its shorter side stays 1 pixel
    EXIF orientation, `irot` and `imir`     turned, in every format
    with a colour profile                   converted to sRGB; a profile that is damaged or does not fit is ignored
    CMYK                                    converted to sRGB, by its profile or else by the simple formula
    transparent                             stays so; put on `background` if there is one, and for JPEG on white
    palette, black and white                full colours, grey
    16 bits a channel                       the upper 8 bits
    32 bits a channel (TIFF)                refused: integers and floating point are not colours
    animated GIF, WebP, PNG or AVIF         the first frame; with `animated=True` all of them, with their times
    animated, `max_pixels` in all frames    the first frame, where all frames together have more pixels
    ======================================  ==============================================================================

    The engine `vips` needs less memory for large images. It opens neither BMP nor sequences of AVIF, reads an orientation in PNG
    only before the pixels, has a profile of its own for CMYK, and makes no animations; the remainder of the table holds for it,
    too. All loaders but that of the recognized format are blocked.

    Args:
        fit: The box, width and height in pixels, that the whole image fits into.
        fill: The box that the image fills: what protrudes is cut off, as much on either side.
        format: `webp`, `jpeg`, `png` or `avif`.
        quality: From 1 to 100; by default 80 for WebP, 82 for JPEG and 60 for AVIF. PNG has none.
        when: When it is made: `flush`, `later` or `request`.
        accept: The media types of the originals that have the variant; those of other types are stored without it. None for all.
            An original of unknown type is examined, and refused if it is not an image.
        background: The colour behind a transparent image, `#rrggbb`; None keeps it transparent where the format can.
        animated: Whether an animation stays one, in WebP.
        placeholder: Whether the receipt's `media` gets a `placeholder`: a tiny WebP as a data URL of at most 400 bytes.
        max_pixels: The most pixels of the original, width times height.
        timeout: The longest that it may take, in seconds, and the most processor time.
        max_memory: The most private memory of the process, in bytes. Pillow needs 4 to 12 bytes for each pixel; JPEGs that are
            made much smaller take less.
        max_source: The largest original, in bytes; a larger one is refused.
        missing: What a reader sees while the image is missing: `nothing` or `original`.
        engine: `pillow` or `vips`.

    The `media` of the result has `type`, `width` and `height`, and for an animation `frames`.

    Raises:
        ConfigurationError: An argument is wrong.
        MissingDependencyError: The engine is not installed.

    Example:
        >>> ImageVariant(fit=(200, 200))
        ImageVariant(fit=(200, 200), format='webp', when='flush')
    """

    def __init__(
        self,
        *,
        fit: tuple[int, int] | None = None,
        fill: tuple[int, int] | None = None,
        format: Format = "webp",
        quality: int | None = None,
        when: When = "flush",
        accept: tuple[str, ...] | None = ("image/*",),
        background: str | None = None,
        animated: bool = False,
        placeholder: bool = False,
        max_pixels: int = 50_000_000,
        timeout: float = 30.0,
        max_memory: int = 1024 * MIB,
        max_source: int = 256 * MIB,
        missing: Missing = "nothing",
        engine: Engine = "pillow",
    ) -> None:
        require_choice("format", format, Format)
        require_choice("when", when, When)
        require_choice("missing", missing, Missing)
        require_choice("engine", engine, Engine)
        require_positive("max_pixels", max_pixels)
        if (fit is None) == (fill is None):
            raise ConfigurationError("an ImageVariant takes either fit=(width, height) or fill=(width, height)")
        box = fit or fill
        if not isinstance(box, tuple) or len(box) != 2 or not all(type(side) is int and 1 <= side <= _MOST_SIDE for side in box):
            raise ConfigurationError(
                f"the box of an ImageVariant must have a width and a height of 1 to {_MOST_SIDE} pixels, not {box!r}"
            )
        if quality is not None and (format == "png" or type(quality) is not int or not 1 <= quality <= 100):
            raise ConfigurationError(f"quality must be from 1 to 100, or None for PNG, not {quality!r} for {format}")
        if background is not None and not (isinstance(background, str) and _COLOUR.fullmatch(background)):
            raise ConfigurationError(f"background must be a colour such as '#ffffff', not {background!r}")
        if animated and (format != "webp" or engine != "pillow"):
            raise ConfigurationError(f"animated needs engine='pillow' and format='webp', not {engine} in {format}")
        module, package, name, extra = _ENGINES[engine]
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(f"ImageVariant needs {name}: install granite-storage[{extra}]")
        self.when: When = when
        self.accept: tuple[str, ...] | None = check_accepted_types(accept)
        self.missing: Missing = missing
        self.format = format
        self.engine = engine
        self._function = f"granite_storage.derived.{module}:render"
        self._limits = Limits(timeout, max_memory, max_source)
        self._max_pixels = max_pixels
        self._parameters: dict[str, Any] = {
            "box": list(box),
            "crop": fill is not None,
            "image_format": format,
            "quality": quality,
            "background": background,
            "animated": animated,
            "placeholder": placeholder,
        }

    def __repr__(self) -> str:
        box = f"{'fill' if self._parameters['crop'] else 'fit'}={tuple(self._parameters['box'])}"
        return f"ImageVariant({box}, format={self.format!r}, when={self.when!r})"

    @property
    def content_type(self) -> str:
        """The media type of the image."""
        return f"image/{self.format}"

    def digest(self, name: str, /) -> str:
        """Return what identifies the recipe under this name of a variant; see `Recipe.digest`."""
        return make_digest("image", name, self._parameters | {"engine": self.engine, "code": _CODE})

    @asynccontextmanager
    async def make(self, source: DerivationSource, /) -> AsyncIterator[Derivation]:
        """Make the image; see `Recipe.make`."""
        arguments = self._parameters | {"max_pixels": self._max_pixels}
        async with run_in_process(self._function, arguments, source, self._limits) as made:
            stem = PurePath(source.ref.original_filename or "").stem
            filename = f"{stem}.{self.format}" if stem else None
            yield Derivation(made.content, self.content_type, self._check(made.media or {}), filename)

    def _check(self, media: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the receipt may say: a decoder that a hostile file has taken over could say anything."""
        found: dict[str, Any] = {"type": self.content_type}
        for name, most in (("width", _MOST_SIDE), ("height", _MOST_SIDE), ("frames", self._max_pixels)):
            if type(value := media.get(name)) is int and 0 < value <= most:
                found[name] = value
        placeholder = media.get("placeholder")
        if self._parameters["placeholder"] and isinstance(placeholder, str) and _PLACEHOLDER.fullmatch(placeholder):
            found["placeholder"] = placeholder
        return found
