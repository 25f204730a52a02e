"""What the project says of itself holds."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import granite_storage
from granite_storage import exceptions
from granite_storage.testing import fixtures
from tests.core.support import API_REFERENCE

ROOT = Path(__file__).parents[2]
API = ROOT / "docs/api"
TOP_LEVEL = [
    "Attachment",
    "AttachmentType",
    "BackendUnavailableError",
    "ChecksumMismatchError",
    "ConfigurationError",
    "ContentTooLargeError",
    "ObjectInfo",
    "ObjectNotFoundError",
    "SizeLimitedStream",
    "StaleAttachmentError",
    "StorageBackend",
    "StorageBinding",
    "StorageError",
    "StorageGarbageCollector",
    "StorageJournal",
    "StorageManager",
    "StoragePolicy",
    "StoredContentMixin",
    "StoredObjectReader",
    "StoredObjectRef",
    "StoredObjectRefType",
    "attachment",
    "bind_storage",
    "iter_model_storage_refs",
    "journal_tables",
    "portable_storage_ref_type",
]


def test_the_top_level_is_these_26_names() -> None:
    assert sorted(granite_storage.__all__) == TOP_LEVEL
    listed = set(dir(granite_storage))
    assert listed >= set(TOP_LEVEL)
    assert all(inspect.ismodule(getattr(granite_storage, name)) for name in listed - set(TOP_LEVEL))
    assert not any(name.startswith("_") for name in listed)


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(granite_storage, name))


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_public_name_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^\.\. auto\w+:: granite_storage\.{name}(\(.+\))?$", API_REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", exceptions.__all__)
def test_every_exception_is_in_the_reference(name: str) -> None:
    where = "granite_storage" if name in TOP_LEVEL else "granite_storage.exceptions"
    assert re.search(rf"^\.\. autoexception:: {re.escape(where)}\.{name}$", API_REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("name", fixtures.__all__)
def test_every_fixture_is_in_the_reference(name: str) -> None:
    assert re.search(rf"^\.\. (py:data:: |autoclass:: .*\.){name}\b", API_REFERENCE, re.MULTILINE)


@pytest.mark.parametrize("page", sorted(API.glob("*.md")), ids=lambda page: page.stem)
def test_each_page_of_the_reference_is_in_its_index(page: Path) -> None:
    index = (API / "index.md").read_text()
    assert page.stem == "index" or re.search(rf"^{page.stem}$", index, re.MULTILINE)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = granite_storage.nothing


def test_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("granite-storage") == granite_storage.__version__
