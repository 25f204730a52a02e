"""Content and paths become files, on real databases, by migrations that Alembic runs."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.alembic.conftest import Target
from tests.alembic.project import NO_MODELS, Project

STORAGE = """
import os, signal
from pathlib import Path
from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.testing import FaultInjectingBackend

FILES = Path(__file__).parent / "files"
backend = FaultInjectingBackend(LocalStorageBackend(FILES, fsync=False))
storage = StorageManager(
    backends={"local": backend}, policies={"articles": StoragePolicy("articles", "local", key_prefix="articles")}
)

def progress(report):
    print("progress", report.done, "of", report.total, flush=True)
    if report.done >= int(os.environ.get("KILL_AT", "1000000")):
        os.kill(os.getpid(), signal.SIGKILL)
"""
CREATE = """
from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

def upgrade():
    op.create_table(
        "article",
        sa.Column("tenant", sa.String(20), primary_key=True),
        sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(100)),
        sa.Column("body", sa.Text()),
        sa.Column("picture", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql")),
        sa.Column("path", sa.String(500)),
    )
    article = sa.table("article", *map(sa.column, ("tenant", "id", "name", "body", "picture", "path")))
    rows = []
    for number in range(703):
        rows.append({
            "tenant": f"t/{number % 3}", "id": number, "name": f"n{number}.txt",
            "body": None if number % 100 == 7 else "" if number == 8 else f"Grüße {number} ☃",
            "picture": bytes(range(256)) * (number // 50 % 5) if number % 50 == 0 else None,
            "path": None,
        })
    op.bulk_insert(article, rows)

def downgrade():
    op.drop_table("article")
"""
TEXT = """
from alembic import op
import sqlalchemy as sa
from granite_storage.alembic import *
from storage import progress, storage

def upgrade():
    add_storage_column(op, "article", "body_file")
    text_to_storage(op, storage, "article", "body", "body_file", storage_key="articles", filename=lambda row: row["name"],
        also_read=["name"], progress=progress, concurrency=20)
    drop_converted_column(op, storage, "article", "body", "body_file", concurrency=50)

def downgrade():
    add_column_once(op, "article", sa.Column("body", sa.Text()))
    storage_to_text(op, storage, "article", "body_file", "body", concurrency=100)
    drop_restored_column(op, "article", "body_file", "body")
"""
BLOB = """
from alembic import op
import sqlalchemy as sa
from granite_storage.alembic import *
from storage import storage

def upgrade():
    add_storage_column(op, "article", "picture_file")
    blob_to_storage(op, storage, "article", "picture", "picture_file", storage_key="articles", content_type="image/x")
    drop_converted_column(op, storage, "article", "picture", "picture_file")

def downgrade():
    add_column_once(op, "article", sa.Column("picture", sa.LargeBinary()))
    storage_to_blob(op, storage, "article", "picture_file", "picture")
    drop_restored_column(op, "article", "picture_file", "picture")
"""


def prepared(target: Target, folder: Path) -> Project:
    project = Project.made(folder, target.url, NO_MODELS, template=target.template)
    (folder / "storage.py").write_text(STORAGE)
    project.revision("create", CREATE)
    project.alembic("upgrade", "create")
    return project


def rows(target: Target, statement: str) -> list[Any]:
    """Ask the database through a synchronous driver, or through an asynchronous one on a loop of its own."""
    return target.ask(statement)


def decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def objects(folder: Path) -> dict[str, bytes]:
    files = folder / "files"
    found = (path for path in files.rglob("*") if path.is_file() and not path.name.startswith(".granite-"))
    return {str(path.relative_to(files)): path.read_bytes() for path in found}


@pytest.mark.parametrize(
    "kind",
    [
        "sqlite",
        pytest.param("aiosqlite", marks=pytest.mark.exhaustive("the same SQL as through the synchronous driver")),
        pytest.param("psycopg", marks=pytest.mark.exhaustive("the same SQL as through asyncpg")),
        "asyncpg",
        "mariadb",
    ],
    indirect=True,
)
def test_text_becomes_files_through_a_crash_and_comes_back(target: Target, tmp_path: Path) -> None:
    project = prepared(target, tmp_path)
    before = rows(target, "SELECT tenant, id, body FROM article ORDER BY tenant, id")
    project.revision("text", TEXT, down="create")
    killed = project.alembic_process("upgrade", "head", env={"KILL_AT": "520"})
    assert killed.returncode == -signal.SIGKILL
    assert "progress 520 of 696" in killed.stdout
    done = rows(target, "SELECT count(*) FROM article WHERE body_file IS NOT NULL")[0][0]
    assert done == 520  # what was committed is kept
    assert rows(target, "SELECT tenant, id, body FROM article ORDER BY tenant, id") == before
    said = project.alembic("upgrade", "head")
    assert "progress 176 of 176" in said
    stored = objects(tmp_path)
    found = {(row[0], row[1]): decoded(row[2]) for row in rows(target, "SELECT tenant, id, body_file FROM article")}
    for tenant, key, body in before:
        ref = found.pop((tenant, key))
        if body is None:
            assert ref is None
            continue
        content = stored.pop(ref["location"])
        assert content == body.encode()
        assert ref["size"] == len(content)
        assert ref["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert ref["original_filename"] == f"n{key}.txt"
        assert ref["content_type"] == "text/plain; charset=utf-8"
    assert not found
    assert not stored  # a step had ended, so nothing was left
    assert "body" not in target.columns("article")
    project.alembic("downgrade", "-1")
    assert rows(target, "SELECT tenant, id, body FROM article ORDER BY tenant, id") == before
    assert "body_file" not in target.columns("article")
    project.alembic("upgrade", "head")


def test_blobs_become_files_and_come_back(target: Target, tmp_path: Path) -> None:
    project = prepared(target, tmp_path)
    before = rows(target, "SELECT id, picture FROM article ORDER BY tenant, id")
    project.revision("blob", BLOB, down="create")
    project.alembic("upgrade", "head")
    found = {row[0]: decoded(row[1]) for row in rows(target, "SELECT id, picture_file FROM article")}
    stored = objects(tmp_path)
    assert {key: None if ref is None else stored[ref["location"]] for key, ref in found.items()} == {
        key: None if value is None else bytes(value) for key, value in before
    }
    project.alembic("downgrade", "-1")
    assert rows(target, "SELECT id, picture FROM article ORDER BY tenant, id") == before
