"""The extra `web`."""

from __future__ import annotations

import re

import pytest

from granite_storage import web
from tests.core.support import API_REFERENCE, in_new_process


def test_what_is_missing_is_named() -> None:
    in_new_process("""
import sys
sys.modules["starlette"] = None
from granite_storage.exceptions import MissingDependencyError
try:
    import granite_storage.web
except MissingDependencyError as error:
    assert "granite-storage[web]" in str(error), error
else:
    raise AssertionError("nothing is missed")
""")


def test_forms_are_received_without_python_multipart() -> None:
    in_new_process("""
import sys
sys.modules["python_multipart"] = sys.modules["multipart"] = None
import granite_storage.web
""")


@pytest.mark.parametrize("name", web.__all__)
def test_public_names_are_in_the_reference(name: str) -> None:
    assert hasattr(web, name)
    assert re.search(rf"^\.\. auto\w+:: granite_storage\.web\.{name}\b", API_REFERENCE, re.MULTILINE)
