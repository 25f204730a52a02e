"""Recipes for originals of certain media types: what is of another type is stored without that variant."""

from __future__ import annotations

from typing import Any

import pytest

from granite_storage import Attachment, ConfigurationError
from granite_storage.derived import Derived, ImageVariant, When
from granite_storage.derived.base import is_accepted
from granite_storage.exceptions import DerivationRefusedError
from granite_storage.orm import AttachmentType
from granite_storage.refs import StoredObjectRef
from tests.orm.derivations import Upper, declared, expected, shown
from tests.orm.environment import Doc, OrmEnvironment
from tests.orm.test_derived_requests import stored


def text(content: str = "x", kind: str | None = "text/plain") -> Attachment:
    return Attachment(content.encode(), content_type=kind)


@pytest.mark.parametrize("when", ["flush", "request"])
async def test_another_type(env: OrmEnvironment, when: When) -> None:
    recipes = {"thumb": Upper("a", when=when, accept=("image/*",)), "text": Upper("b", when="flush")}
    with declared(recipes):
        await env.add(Doc(id=1, file=text()))
        assert await shown(env) == expected({"text": recipes["text"]}, "x")
        assert not recipes["thumb"].made
        file = await stored(env)
        assert file.variants["thumb"] is None
        assert list(file.variants) == ["thumb", "text"]
        with pytest.raises(DerivationRefusedError, match="the variant 'thumb' is not made for files of the type text/plain"):
            await file.variant("thumb")
    await env.check(file_1="x")


async def test_it_is_no_original_in_its_place(env: OrmEnvironment) -> None:
    recipes = {"thumb": Upper(when="request", accept=("image/*",), missing="original")}
    with declared(recipes):
        await env.add(Doc(id=1, file=text()), Doc(id=2, file=text(kind="image/png")))
        assert (await stored(env)).variants["thumb"] is None
        other = (await stored(env, 2)).variants["thumb"]
        assert other is not None
        assert other.is_original


@pytest.mark.parametrize("kind", ["image/png", "IMAGE/PNG; q=1", None, "application/octet-stream"])
async def test_its_own_type_and_none(env: OrmEnvironment, kind: str | None) -> None:
    recipes = {"thumb": Upper(when="flush", accept=("image/*",))}
    with declared(recipes):
        await env.add(Doc(id=1, file=text(kind=kind)))
        assert await shown(env) == expected(recipes, "x")


async def test_a_replacement_of_another_type(env: OrmEnvironment) -> None:
    recipes = {"thumb": Upper(when="flush", accept=("image/*",))}
    with declared(recipes):
        await env.add(Doc(id=1, file=text(kind="image/png")))
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = text("y")
        assert await shown(env) == {}
    await env.check(file_1="y")


@pytest.mark.parametrize(
    ("content_type", "media", "outcome"),
    [
        ("image/png", None, True),
        ("image/png", {"type": "application/pdf"}, False),
        ("application/pdf", {"type": "image/png"}, True),
        ("application/pdf", {"width": 3}, False),
        ("image/svg+xml", None, False),  # a wildcard matches nothing that a browser would run
        (None, {"type": "application/octet-stream"}, False),  # it was looked at, and is of no known type
        (None, None, True),
        ("", None, True),
    ],
)
def test_what_was_found_counts(content_type: str | None, media: dict[str, Any] | None, outcome: bool) -> None:
    ref = StoredObjectRef("docs", "store", "x", 1, "", content_type, media=media)
    assert is_accepted(ref, ("image/*",)) is outcome
    assert is_accepted(ref, None)


@pytest.mark.parametrize(
    ("accept", "words"), [((), "must not be empty"), ("image/*", "tuple of media ranges"), (("image",), "not a media range")]
)
def test_what_no_recipe_may_accept(accept: Any, words: str) -> None:
    for make in (
        lambda: ImageVariant(fit=(9, 9), accept=accept),
        lambda: Derived(len, content_type="text/plain", accept=accept),  # type: ignore[arg-type]
        lambda: AttachmentType("docs", variants={"a": Upper(accept=accept)}),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make()


def test_an_image_variant_is_for_images() -> None:
    assert ImageVariant(fit=(9, 9)).accept == ("image/*",)
    assert ImageVariant(fit=(9, 9), accept=("image/PNG",)).accept == ("image/png",)
    assert Derived(len, content_type="text/plain").accept is None  # type: ignore[arg-type]
    digests = {ImageVariant(fit=(9, 9), accept=accept).digest("a") for accept in (None, ("image/png",))}
    assert len(digests) == 1
