"""What the project says of itself holds."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import granite_storage
from granite_storage import exceptions

ROOT = Path(__file__).parents[2]
PUBLIC = [name for name in granite_storage.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(granite_storage, name)
    assert inspect.getdoc(value)
    assert name in dir(granite_storage)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_in_the_reference(name: str) -> None:
    reference = (ROOT / "docs/api.md").read_text()
    assert re.search(rf"^\.\. auto\w+:: granite_storage\.{name}$", reference, re.MULTILINE)


def test_every_exception_is_public() -> None:
    assert set(exceptions.__all__) <= set(granite_storage.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = granite_storage.nothing


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("granite-storage") == granite_storage.__version__
