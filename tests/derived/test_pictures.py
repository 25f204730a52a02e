"""Responsive pictures as data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_storage import StoredObjectRef
from granite_storage.derived import ImageCandidate, Picture, PictureSource, picture, srcset
from granite_storage.exceptions import ConfigurationError


def ref(width: Any, kind: str | None = "image/webp", **media: Any) -> StoredObjectRef:
    found = None if width is None else {"width": width, "height": 10, **media}
    return StoredObjectRef("files", "disk", f"{width}.{(kind or '').partition('/')[2]}", 9, "", kind, media=found)


def url(one: StoredObjectRef) -> str:
    return f"/files/{one.location}"


def image(width: int, kind: str = "image/webp") -> ImageCandidate:
    return ImageCandidate(f"/files/{width}.{kind.partition('/')[2]}", width, 10, kind)


def test_widths_in_order_and_once() -> None:
    assert srcset([ref(800), None, ref(200), ref(800), ref(None), ref("9"), ref(0), ref(True), ref(5, None)], url) == (
        image(200),
        image(800),
    )
    assert srcset([], url) == ()


def test_urls_that_were_awaited() -> None:
    urls = {ref(200): "https://signed.example/1"}
    assert srcset([ref(200)], urls.__getitem__)[0].url == "https://signed.example/1"


def test_a_picture_has_the_newest_type_first_and_the_oldest_as_its_image() -> None:
    refs = [
        ref(400, "image/jpeg", placeholder="data:image/webp;base64,AA=="),
        ref(800, "image/jpeg"),
        ref(800),
        ref(400),
        ref(400, "image/avif"),
    ]
    assert picture(refs, url) == Picture(
        (
            PictureSource("image/avif", (image(400, "image/avif"),)),
            PictureSource("image/webp", (image(400), image(800))),
            PictureSource("image/jpeg", (image(400, "image/jpeg"), image(800, "image/jpeg"))),
        ),
        image(800, "image/jpeg"),
        "data:image/webp;base64,AA==",
    )


def test_a_picture_of_one_type() -> None:
    assert picture([ref(9)], url) == Picture((PictureSource("image/webp", (image(9),)),), image(9), None)


def test_nothing_to_show() -> None:
    with pytest.raises(ConfigurationError, match="nothing can be shown"):
        picture([None, ref(None)], url)


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["image/avif", "image/webp", "image/png"])), min_size=1))
def test_each_width_of_each_type_is_there_once(sizes: list[tuple[int, str]]) -> None:
    made = picture([ref(*size) for size in sizes], url)
    assert sorted((one.width, one.type) for source in made.sources for one in source.srcset) == sorted(set(sizes))
    assert all(list(source.srcset) == sorted(source.srcset, key=lambda one: one.width) for source in made.sources)
    assert made.img in made.sources[-1].srcset
