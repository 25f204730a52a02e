"""What another library wrote becomes refs; and what is not right stops before anything is dropped."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from sqlalchemy import make_url

from granite_storage.alembic import CopyOf, InPlace, PlainPath
from granite_storage.exceptions import InvalidLocationError
from tests.alembic.conftest import Target
from tests.alembic.project import NO_MODELS, Project
from tests.alembic.test_conversions import STORAGE, TEXT, decoded, objects, prepared

CREATE = """
from alembic import op
import sqlalchemy as sa

def upgrade():
    key = sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False)
    op.create_table("photo", key, sa.Column("path", sa.String(500)))
    photo = sa.table("photo", sa.column("id"), sa.column("path"))
    paths = ["/media/a/cat.png", "/media/a/dog.png", "/media/a/cat.png", "", None, "/media/odd//name.txt", *MORE]
    op.bulk_insert(photo, [{"id": key, "path": path} for key, path in enumerate(paths)])

def downgrade():
    op.drop_table("photo")
"""
PATHS = """
import os
from pathlib import Path
from alembic import op
import sqlalchemy as sa
from granite_storage.alembic import *
from storage import FILES, progress, storage

PATH = PlainPath("local", strip="/media/", folder=FILES)

def upgrade():
    add_storage_column(op, "photo", "file")
    create_location_index(op, "photo", "file")
    report = paths_to_storage(op, storage, "photo", "path", "file", storage_key="articles", mapping=PATH,
        skip_missing=bool(os.environ.get("SKIP")), progress=progress)
    print("report", report.adopted, report.stored, report.skipped)
    drop_converted_column(op, storage, "photo", "path", "file", empty=["", "/media/missing.png"])

def downgrade():
    drop_location_index(op, "photo", "file")
    add_column_once(op, "photo", sa.Column("path", sa.String(500)))
    storage_to_paths(op, "photo", "file", "path", mapping=PATH.back)
    drop_restored_column(op, "photo", "file", "path")
"""


def with_photos(target: Target, folder: Path, *more: str) -> Project:
    project = Project.made(folder, target.url, NO_MODELS, template=target.template)
    (folder / "storage.py").write_text(STORAGE)
    for name, content in {"a/cat.png": b"cat", "a/dog.png": b"dog" * 1000, "odd/name.txt": b"odd"}.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(content)
    project.revision("create", CREATE.replace("*MORE", ", ".join(map(repr, more))))
    project.revision("paths", PATHS, down="create")
    project.alembic("upgrade", "create")
    return project


def test_paths_are_adopted_where_they_lie(target: Target, tmp_path: Path) -> None:
    project = with_photos(target, tmp_path)
    assert "report 2 2 1" in project.alembic("upgrade", "head")
    refs = {key: decoded(ref) for key, ref in target.ask("SELECT id, file FROM photo")}
    assert refs[0]["location"] == "a/cat.png"  # in place
    assert refs[1]["location"] == "a/dog.png"
    assert refs[1]["size"] == 3000
    assert refs[1]["checksum"] == f"sha256:{hashlib.sha256(b'dog' * 1000).hexdigest()}"
    assert refs[1]["content_type"] == "image/png"
    assert refs[2]["location"].startswith("articles/photo/2/file/")  # the first row has that object
    assert refs[3] is refs[4] is None
    assert refs[5]["location"].startswith("articles/photo/5/file/")  # the library would never use that location
    found = objects(tmp_path)
    assert [found[refs[key]["location"]] for key in (0, 1, 2, 5)] == [b"cat", b"dog" * 1000, b"cat", b"odd"]
    assert "path" not in target.columns("photo")
    project.alembic("downgrade", "-1")
    paths = dict(target.ask("SELECT id, path FROM photo"))
    assert (paths[0], paths[1], paths[4]) == ("/media/a/cat.png", "/media/a/dog.png", None)
    assert objects(tmp_path) == found  # nothing is removed on the way back


@pytest.fixture
def sqlite(tmp_path: Path) -> Target:
    return Target(make_url(f"sqlite:///{tmp_path}/app.db"), "generic")


def test_a_missing_object_is_an_error_or_skipped(sqlite: Target, tmp_path: Path) -> None:
    project = with_photos(sqlite, tmp_path, "/media/missing.png")
    before = objects(tmp_path)
    said = project.alembic("upgrade", "head", fails=True)
    assert "ObjectNotFoundError" in said
    assert "while converting photo (6,)" in said
    assert objects(tmp_path) == before  # copies of the step that failed are gone
    assert sqlite.ask("SELECT count(*) FROM photo WHERE file IS NOT NULL") == [(0,)]
    assert "report 2 2 2" in project.alembic("upgrade", "head", env={"SKIP": "1"})


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        ("lambda path: path and 'a/cat.png'", "TypeError: mapping must return an InPlace, a CopyOf or None, not 'a/cat.png'"),
        ("{None: None}.__getitem__", "KeyError"),
        ("lambda path: PATH(path and path + chr(0))", "has a NUL character"),
        ("lambda path: InPlace('local', 'a/cat.png', 'text/html\\r\\nX: y') if path else None", "InvalidReferenceError"),
    ],
)
def test_what_a_mapping_does_wrong_names_the_row(sqlite: Target, tmp_path: Path, mapping: str, error: str) -> None:
    project = with_photos(sqlite, tmp_path)
    project.replace("migrations/versions/paths.py", "mapping=PATH,", f"mapping={mapping},")
    before = objects(tmp_path)
    said = project.alembic("upgrade", "head", fails=True)
    assert error in said
    assert "while converting photo (0,)" in said
    assert objects(tmp_path) == before


def test_a_name_is_kept_without_path_and_control_characters(sqlite: Target, tmp_path: Path) -> None:
    project = with_photos(sqlite, tmp_path)
    mapping = "lambda path: InPlace('local', 'a/cat.png', filename='/../../../evil\\n\\u202e.txt') if path else None"
    project.replace("migrations/versions/paths.py", "mapping=PATH,", f"mapping={mapping},")
    project.alembic("upgrade", "head")
    names = {decoded(row[0])["original_filename"] for row in sqlite.ask("SELECT file FROM photo WHERE file IS NOT NULL")}
    assert names == {"evil.txt"}


def test_two_rows_that_were_done_in_different_runs_share_nothing(sqlite: Target, tmp_path: Path) -> None:
    """A row of an earlier step has the object."""
    project = with_photos(sqlite, tmp_path, *["/media/a/cat.png"] * 205)
    project.alembic("upgrade", "head")
    locations = [decoded(row[0])["location"] for row in sqlite.ask("SELECT file FROM photo WHERE file IS NOT NULL")]
    assert len(set(locations)) == len(locations) == 209
    assert locations.count("a/cat.png") == 1


def test_wrong_bytes_are_noticed_as_they_are_stored(sqlite: Target, tmp_path: Path) -> None:
    """The backend says that it has stored, and gives back something else."""
    project = prepared(sqlite, tmp_path)
    project.revision("text", TEXT, down="create")
    project.replace("storage.py", "FILES = ", "from wrong import Wrong as LocalStorageBackend\nFILES = ")
    (tmp_path / "wrong.py").write_text(
        "from granite_storage.backends.local import LocalStorageBackend\n"
        "class Wrong(LocalStorageBackend):\n"
        "    async def put_bytes(self, location, content, **arguments):\n"
        "        wrong = content[:-1] + b'?' if '-n300.txt' in location else content\n"
        "        return await super().put_bytes(location, wrong, **arguments)\n"
    )
    said = project.alembic("upgrade", "head", fails=True)
    assert "ChecksumMismatchError" in said
    assert "while converting article ('t/0', 300)" in said
    assert "body" in sqlite.columns("article")
    done = sqlite.ask("SELECT count(*) FROM article WHERE body_file IS NOT NULL")[0][0]
    assert len(objects(tmp_path)) == done  # nothing is left of the step that failed
    project.replace("storage.py", "from wrong import Wrong as LocalStorageBackend\n", "")
    project.alembic("upgrade", "head")
    assert len(objects(tmp_path)) == 696


@pytest.mark.parametrize("damage", ["changed", "gone", "row"])
def test_nothing_is_dropped_where_an_object_is_wrong(sqlite: Target, tmp_path: Path, damage: str) -> None:
    project = prepared(sqlite, tmp_path)
    start, end = TEXT.split("    drop_converted_column")
    dropping = "    drop_converted_column" + end.partition("\n\ndef downgrade")[0]
    project.revision("text", start + "\n\ndef downgrade():\n    pass\n", down="create")
    project.alembic("upgrade", "head")
    head = start.partition("def upgrade():")[0]
    project.revision("drop", f"{head}\ndef upgrade():\n{dropping}\n\ndef downgrade():\n    pass\n", down="text")
    victim = next(path for path in (tmp_path / "files").rglob("*-n700.txt"))
    content = victim.read_bytes()
    if damage == "changed":
        victim.write_bytes(content[:-1] + b"?")
    elif damage == "gone":
        victim.unlink()
    else:
        sqlite.ask_nothing("UPDATE article SET body = 'written meanwhile' WHERE id = 107")
    said = project.alembic("upgrade", "head", fails=True)
    assert {"changed": "ChecksumMismatchError", "gone": "ObjectNotFoundError", "row": "1 row of article"}[damage] in said
    assert "body" in sqlite.columns("article")
    if damage != "row":
        victim.write_bytes(content)
        project.alembic("upgrade", "head")
        assert "body" not in sqlite.columns("article")


def test_a_plain_path_never_leads_out(tmp_path: Path) -> None:
    path = PlainPath("local", strip="/media/", folder=tmp_path)
    assert path("/media/a.png") == InPlace("local", "a.png")
    assert path("") is path(None) is None
    assert path("/media/x//y") == CopyOf(tmp_path / "x/y")
    for bad in ("/media/../../etc/passwd", "/media/a/../../b", "/etc/passwd"):
        with pytest.raises(InvalidLocationError, match="out of the folder"):
            path(bad)
    with pytest.raises(InvalidLocationError, match="no folder"):
        PlainPath("local")("../x")
