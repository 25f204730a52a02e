"""What a column may declare of its variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, AttachmentType, attachment, bind_storage
from tests.orm.derivations import Upper


def manager() -> StorageManager:
    return StorageManager(backends={"store": MemoryStorageBackend()}, policies={"docs": StoragePolicy("docs", "store")})


def model(**recipes: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Letter(Base):
        __tablename__ = "letter"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs", variants=recipes)

    return Letter


def test_later_needs_a_journal() -> None:
    with pytest.raises(ConfigurationError, match=r"letter.file has variants that are made after the commit \(card\)"):
        bind_storage(model(card=Upper(when="later"), thumb=Upper(when="flush")).registry, manager())
    bind_storage(model(card=Upper(when="request"), thumb=Upper(when="flush")).registry, manager()).unbind()


@pytest.mark.parametrize("name", ["", "-a", "a b", "ä", "a/b", "a" * 41, "a.b", None, 1])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="a name has at most 40 letters"):
        AttachmentType("docs", variants={name: Upper()})


@pytest.mark.parametrize("name", ["a", "Thumb-2_x", "0", "a" * 40, "scan"])
def test_a_name(name: str) -> None:
    assert list(AttachmentType("docs", variants={name: Upper()}).variants) == [name]


class Broken(Upper):
    def digest(self, name: str, /) -> str:
        return None  # type: ignore[return-value]


def _with(**values: Any) -> Callable[[], Upper]:
    def make() -> Upper:
        recipe = Upper()
        for name, value in values.items():
            setattr(recipe, name, value)
        return recipe

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "the variant 'a' of .* is a NoneType, not a recipe"),
        (lambda: Upper, "not a recipe"),
        (lambda: "thumb", "not a recipe"),
        (_with(when="now"), "when of the variant 'a' .* must be one of 'flush', 'later', 'request', not 'now'"),
        (_with(missing="404"), "missing of the variant 'a' .* must be one of 'nothing', 'original'"),
        (Broken, "must return a string, not None"),
    ],
)
def test_a_recipe_that_is_none(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AttachmentType("docs", variants={"a": make()})


def test_no_mapping() -> None:
    with pytest.raises(ConfigurationError, match="must map names to recipes, not be a list"):
        AttachmentType("docs", variants=[Upper()])  # type: ignore[arg-type]


def test_statements_are_cached() -> None:
    """A recipe that cannot be hashed does not keep SQLAlchemy from it."""
    letter = model(thumb=Upper(when="request"))
    key = select(letter)._generate_cache_key()
    assert key is not None
    assert isinstance(hash(key.key), int)
    column_type = letter.__table__.c.file.type
    with pytest.raises(TypeError):
        column_type.variants["b"] = None
