"""The extra `alembic`, and its names."""

from __future__ import annotations

import re

import pytest
from sqlalchemy.dialects import mysql, postgresql, sqlite

import granite_storage
from granite_storage import alembic
from tests.core.support import API_REFERENCE, in_new_process


def test_what_is_missing_is_named() -> None:
    in_new_process("""
import sys
sys.modules["alembic"] = None
from granite_storage import portable_storage_ref_type
from granite_storage.exceptions import MissingDependencyError
portable_storage_ref_type()
try:
    import granite_storage.alembic
except MissingDependencyError as error:
    assert "granite-storage[alembic]" in str(error), error
else:
    raise AssertionError("nothing is missed")
""")


@pytest.mark.parametrize("name", alembic.__all__)
def test_public_names_are_in_the_reference(name: str) -> None:
    assert hasattr(alembic, name)
    where = "granite_storage" if name in granite_storage.__all__ else "granite_storage.alembic"
    assert re.search(rf"^\.\. auto\w+:: {where}\.{name}\b", API_REFERENCE, re.MULTILINE)


def test_the_type_is_json_everywhere() -> None:
    kind = granite_storage.portable_storage_ref_type()
    compiled = [kind.compile(dialect.dialect()) for dialect in (sqlite, postgresql, mysql)]
    assert compiled == ["JSON", "JSONB", "JSON"]
