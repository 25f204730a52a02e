"""Migrations that turn content into files go through the policy, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from granite_storage import StorageManager, StoragePolicy
from granite_storage.alembic import add_storage_column, blob_to_storage, text_to_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import (
    ContentRejectedError,
    InfectedContentError,
    ScannerUnavailableError,
    UnsupportedContentError,
)
from granite_storage.inspection import ImageLimits, UploadPreview
from tests.inspection.support import INFECTED, UNAVAILABLE, ScriptedScanner, png


def refuse(_: UploadPreview) -> None:
    raise ContentRejectedError("not this one")


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sa.Connection]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE note (id INTEGER PRIMARY KEY, body TEXT, picture BLOB)")
        connection.commit()
        yield connection
    engine.dispose()


def convert(connection: sa.Connection, convert_column: Any, column: str, content: Any, **checks: Any) -> StorageManager:
    """Convert a row's content; return the manager that it was stored by."""
    connection.execute(sa.text(f"INSERT INTO note (id, {column}) VALUES (1, :content)"), {"content": content})  # noqa: S608
    connection.commit()
    policies = {"notes": StoragePolicy("notes", "b", **checks)}
    manager = StorageManager(backends={"b": MemoryStorageBackend()}, policies=policies)
    op = Operations(MigrationContext.configure(connection))
    add_storage_column(op, "note", "file")
    try:
        convert_column(op, manager, "note", column, "file", storage_key="notes")
    except BaseException:
        assert objects(manager) == []
        manager.sync.close()
        raise
    return manager


def objects(manager: StorageManager) -> list[str]:
    return [info.location for info in manager.sync.list(storage_key="notes")]


@pytest.mark.parametrize(
    ("convert_column", "column", "content", "media"),
    [
        (text_to_storage, "body", "just text", {"type": "text/plain"}),
        (blob_to_storage, "picture", png(), {"type": "image/png", "width": 3, "height": 2}),
    ],
    ids=["text", "picture"],
)
def test_what_is_accepted(
    connection: sa.Connection, convert_column: Any, column: str, content: Any, media: dict[str, Any]
) -> None:
    checks = {"accept": ("text/plain", "image/*"), "inspect": [ImageLimits()], "scanner": ScriptedScanner()}
    manager = convert(connection, convert_column, column, content, **checks)
    ref = json.loads(connection.execute(sa.text("SELECT file FROM note")).scalar_one())
    assert ref["media"] == media
    assert ref["content_type"].partition(";")[0] == media["type"]
    assert ref["scan"]["status"] == "clean"
    assert objects(manager) == [ref["location"]]
    manager.sync.close()


@pytest.mark.parametrize(
    ("checks", "content", "error"),
    [
        ({"accept": ("image/*",)}, b"just text", UnsupportedContentError),
        ({"inspect": [ImageLimits()]}, png(65_500, 65_500), ContentRejectedError),
        ({"validate": refuse}, b"any", ContentRejectedError),
        ({"scanner": ScriptedScanner()}, INFECTED, InfectedContentError),
        ({"scanner": ScriptedScanner("hold", fails=UNAVAILABLE)}, b"any", ScannerUnavailableError),
    ],
    ids=["type", "image", "validator", "infected", "held"],
)
def test_what_is_refused(connection: sa.Connection, checks: dict[str, Any], content: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        convert(connection, blob_to_storage, "picture", content, **checks)
    assert connection.execute(sa.text("SELECT file FROM note")).scalar_one() is None
