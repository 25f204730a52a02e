"""Responsive pictures as data for templates and JSON: which URLs there are, and how wide the images behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from granite_storage.exceptions import ConfigurationError
from granite_storage.refs import StoredObjectRef

_NEWEST_FIRST = ("image/avif", "image/webp")


@dataclass(frozen=True, slots=True)
class ImageCandidate:
    """One image to choose.

    Attributes:
        url: Where it is.
        width: Its width in pixels.
        height: Its height in pixels.
        type: Its media type.
    """

    url: str
    width: int
    height: int
    type: str


@dataclass(frozen=True, slots=True)
class PictureSource:
    """The images of one media type: a `<source>`.

    Attributes:
        type: The media type.
        srcset: The images, the narrowest first.
    """

    type: str
    srcset: tuple[ImageCandidate, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A `<picture>`: the browser takes the first source that it understands, and of it the image that fits.

    Attributes:
        sources: One for each media type, AVIF and WebP first.
        img: The image for a browser that understands none of them: the widest of the last type.
        placeholder: A data URL to show meanwhile, or None.
    """

    sources: tuple[PictureSource, ...]
    img: ImageCandidate
    placeholder: str | None


def srcset(refs: Iterable[StoredObjectRef | None], url: Callable[[StoredObjectRef], str]) -> tuple[ImageCandidate, ...]:
    """Return the images of refs, the narrowest first and each width once; None and refs without a width are left out.

    Args:
        refs: The receipts of variants, perhaps with that of the original; their `media` has the width and height.
        url: Returns the URL of a ref. Where URLs have to be awaited, pass the `__getitem__` of a dict of them.

    Example:
        >>> media = {"width": 200, "height": 100}
        >>> ref = StoredObjectRef("me", "disk", "a.webp", 9, "", "image/webp", media=media)
        >>> images = srcset([ref, None], lambda ref: f"/files/{ref.location}")
        >>> [(image.url, image.width) for image in images]
        [('/files/a.webp', 200)]
    """
    found: dict[tuple[int, str], StoredObjectRef] = {}
    for ref in refs:
        if ref is not None and ref.content_type and ref.media and _is_size(ref.media.get("width"), ref.media.get("height")):
            found.setdefault((ref.media["width"], ref.content_type), ref)
    return tuple(
        ImageCandidate(url(ref), width, (ref.media or {})["height"], kind)
        for (width, kind), ref in sorted(found.items(), key=lambda item: item[0])
    )


def picture(refs: Iterable[StoredObjectRef | None], url: Callable[[StoredObjectRef], str]) -> Picture:
    """Return the images of refs by their media types.

    Args:
        refs: The receipts, as for `srcset`.
        url: Returns the URL of a ref.

    Raises:
        ConfigurationError: None of the refs has a media type and a width.
    """
    given = [ref for ref in refs if ref is not None]
    by_type: dict[str, list[ImageCandidate]] = {}
    for image in srcset(given, url):
        by_type.setdefault(image.type, []).append(image)
    if not by_type:
        raise ConfigurationError("no ref has a media type, a width and a height: nothing can be shown")
    newest = [kind for kind in _NEWEST_FIRST if kind in by_type]
    kinds = [*newest, *(kind for kind in by_type if kind not in newest)]
    placeholders = (ref.media.get("placeholder") for ref in given if ref.media)
    return Picture(
        tuple(PictureSource(kind, tuple(by_type[kind])) for kind in kinds),
        by_type[kinds[-1]][-1],
        next((text for text in placeholders if isinstance(text, str)), None),
    )


def _is_size(*sides: object) -> bool:
    return all(type(side) is int and side > 0 for side in sides)
