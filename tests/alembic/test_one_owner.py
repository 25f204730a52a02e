"""An object that is adopted belongs to one row, whichever table, column, schema or key names it; and what is no file is none."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from granite_storage import ObjectNotFoundError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.alembic import (
    CopyOf,
    InPlace,
    PlainPath,
    add_storage_column,
    drop_restored_column,
    paths_to_storage,
    storage_to_paths,
)
from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import InvalidLocationError
from tests.alembic.conftest import Target
from tests.alembic.test_conversions import decoded
from tests.alembic.test_paths import with_photos

SECOND = """
from alembic import op
import sqlalchemy as sa
from granite_storage.alembic import *
from storage import storage

PATH = PlainPath("local", strip="/media/")

def upgrade():
    key = sa.Column("id", sa.Integer(), primary_key=True, autoincrement=False)
    op.create_table("album", key, sa.Column("cover", sa.String(500)))
    album = sa.table("album", sa.column("id"), sa.column("cover"))
    op.bulk_insert(album, [{"id": 1, "cover": "/media/a/cat.png"}, {"id": 2, "cover": "/media/b/only.png"}])
    add_storage_column(op, "album", "cover_file")
    report = paths_to_storage(op, storage, "album", "cover", "cover_file", storage_key="articles", mapping=PATH)
    print("report", report.adopted, report.stored, report.skipped)

def downgrade():
    op.drop_table("album")
"""


@pytest.mark.case("RE-03")
@pytest.mark.parametrize("kind", ["sqlite", "psycopg", "mariadb"], indirect=True)
def test_the_second_table_gets_a_copy(target: Target, tmp_path: Path) -> None:
    """On every kind of database: another table has the file already, and its row would lose it with the second one's."""
    project = with_photos(target, tmp_path)
    (tmp_path / "files/b").mkdir()
    (tmp_path / "files/b/only.png").write_bytes(b"only")
    project.alembic("upgrade", "head")
    project.revision("second", SECOND, down="paths")
    assert "report 1 1 0" in project.alembic("upgrade", "head")
    covers = {key: decoded(ref)["location"] for key, ref in target.ask("SELECT id, cover_file FROM album")}
    photos = {decoded(ref)["location"] for (ref,) in target.ask("SELECT file FROM photo WHERE file IS NOT NULL")}
    assert covers[2] == "b/only.png"
    assert "a/cat.png" in photos
    assert covers[1].startswith("articles/album/1/cover_file/")
    assert (tmp_path / "files" / covers[1]).read_bytes() == b"cat"


@pytest.fixture
def op(tmp_path: Path) -> Iterator[Operations]:
    """A migration on SQLite, with one table of two columns of paths."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        paths = [sa.Column(name, sa.String(200)) for name in ("photo", "thumb")]
        operations.create_table("page", sa.Column("id", sa.Integer, primary_key=True), *paths)
        for column in ("photo_file", "thumb_file"):
            add_storage_column(operations, "page", column)
        connection.commit()
        yield operations
    engine.dispose()


def storage_of(**backends: StorageBackend) -> StorageManager:
    return StorageManager(backends=backends, policies={"docs": StoragePolicy("docs", next(iter(backends)))})


def insert(op: Operations, **values: Any) -> None:
    columns, names = ", ".join(values), ", ".join(f":{name}" for name in values)
    connection = op.get_bind()
    connection.execute(sa.text(f"INSERT INTO page ({columns}) VALUES ({names})"), values)  # noqa: S608  # names of our own
    connection.commit()


def convert(op: Operations, storage: StorageManager, source: str, mapping: Any, **options: Any) -> tuple[int, int, int]:
    report = paths_to_storage(op, storage, "page", source, f"{source}_file", storage_key="docs", mapping=mapping, **options)
    return report.adopted, report.stored, report.skipped


def locations(op: Operations, column: str) -> list[str]:
    found = op.get_bind().execute(sa.text(f"SELECT {column} FROM page WHERE {column} IS NOT NULL ORDER BY id"))  # noqa: S608
    return [json.loads(raw)["location"] for (raw,) in found]


@pytest.mark.case("RE-03")
def test_the_second_column_gets_a_copy(op: Operations, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    storage = storage_of(local=LocalStorageBackend(tmp_path, fsync=False))
    insert(op, id=1, photo="cat.png", thumb="cat.png")
    assert convert(op, storage, "photo", PlainPath("local")) == (1, 0, 0)
    assert convert(op, storage, "thumb", PlainPath("local")) == (0, 1, 0)
    assert locations(op, "photo_file") == ["cat.png"] != locations(op, "thumb_file")


@pytest.mark.case("RE-03")
def test_a_variant_of_another_file_has_an_owner(op: Operations, tmp_path: Path) -> None:
    """A ref that nests it owns it: its original would take it along."""
    for name in ("cat.png", "cat-small.png"):
        (tmp_path / name).write_bytes(name.encode())
    storage = storage_of(local=LocalStorageBackend(tmp_path, fsync=False))
    insert(op, id=1, photo="cat.png", thumb="cat-small.png")
    assert convert(op, storage, "photo", PlainPath("local")) == (1, 0, 0)
    (raw,) = op.get_bind().execute(sa.text("SELECT photo_file FROM page")).scalars()
    small = {**json.loads(raw), "location": "cat-small.png"}
    insert(op, id=2, photo_file="{broken")
    op.get_bind().execute(sa.text("UPDATE page SET photo_file = :raw WHERE id = 1"), {"raw": nesting(raw, small)})
    op.get_bind().commit()
    assert convert(op, storage, "thumb", PlainPath("local")) == (0, 1, 0)
    assert locations(op, "thumb_file") != ["cat-small.png"]


@pytest.mark.case("RE-03")
@pytest.mark.parametrize("kind", ["sqlite", "psycopg", "mariadb"], indirect=True)
def test_a_variant_of_another_table_has_an_owner(target: Target, tmp_path: Path) -> None:
    project = with_photos(target, tmp_path)
    (tmp_path / "files/b").mkdir()
    (tmp_path / "files/b/only.png").write_bytes(b"only")
    project.alembic("upgrade", "head")
    [(key, raw)] = target.ask("SELECT id, file FROM photo WHERE file IS NOT NULL")[:1]
    small = {**decoded(raw), "location": "b/only.png"}
    literal = nesting(json.dumps(decoded(raw)), small).replace("'", "''").replace(":", "\\:")
    target.ask_nothing(f"UPDATE photo SET file = '{literal}' WHERE id = {key!r}")  # noqa: S608
    project.revision("second", SECOND, down="paths")
    assert "report 0 2 0" in project.alembic("upgrade", "head")


def nesting(raw: str, variant: dict[str, Any]) -> str:
    """Return a ref in JSON with a variant."""
    return json.dumps({**json.loads(raw), "variants": {"$.small": variant}})


@pytest.mark.case("RE-03", "RA-07")
def test_the_owner_comes_after_a_hundred_values_that_are_none(op: Operations, tmp_path: Path) -> None:
    """A table that no model has owns an object, and nothing among its first rows shows that it holds references."""
    (tmp_path / "cat.png").write_bytes(b"cat")
    storage = storage_of(local=LocalStorageBackend(tmp_path, fsync=False))
    insert(op, id=1, photo="cat.png")
    assert convert(op, storage, "photo", PlainPath("local")) == (1, 0, 0)
    connection = op.get_bind()
    connection.execute(sa.text("CREATE TABLE audit (id INT, old JSON)"))
    connection.execute(sa.text("INSERT INTO audit VALUES (:id, '{}')"), [{"id": number} for number in range(150)])
    connection.execute(sa.text("INSERT INTO audit SELECT 1000, photo_file FROM page"))
    connection.execute(sa.text("UPDATE page SET photo_file = NULL, photo = NULL, thumb = 'cat.png'"))
    connection.commit()
    assert convert(op, storage, "thumb", PlainPath("local")) == (0, 1, 0)
    assert locations(op, "thumb_file") != ["cat.png"]


@pytest.mark.case("RE-03", "RA-01")
def test_two_keys_for_one_place_have_one_owner(op: Operations, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    (tmp_path / "link").symlink_to(tmp_path)
    local, link = (LocalStorageBackend(path, fsync=False) for path in (tmp_path, tmp_path / "link"))
    storage = storage_of(local=local, link=link, other=MemoryStorageBackend())
    insert(op, id=1, photo="cat.png", thumb="cat.png")
    insert(op, id=2, thumb="cat.png")
    assert convert(op, storage, "photo", PlainPath("local")) == (1, 0, 0)
    assert convert(op, storage, "thumb", PlainPath("link")) == (0, 2, 0)


@pytest.mark.case("RE-03", "RA-02")
def test_a_key_that_was_renamed(op: Operations, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    insert(op, id=1, photo="cat.png", thumb="cat.png")
    local = LocalStorageBackend(tmp_path, fsync=False)
    assert convert(op, storage_of(local=local), "photo", PlainPath("local")) == (1, 0, 0)
    assert convert(op, storage_of(disk=local), "thumb", PlainPath("disk")) == (0, 1, 0)


def test_the_same_path_on_another_backend_is_another_object(op: Operations, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat.png").write_bytes(name.encode())
    storage = storage_of(**{name: LocalStorageBackend(tmp_path / name, fsync=False) for name in ("one", "two")})
    insert(op, id=1, photo="cat.png", thumb="cat.png")
    assert convert(op, storage, "photo", PlainPath("one")) == (1, 0, 0)
    assert convert(op, storage, "thumb", PlainPath("two")) == (1, 0, 0)


@pytest.mark.case("RE-03")
def test_a_value_that_is_no_json_beside_it(op: Operations, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"cat")
    storage = storage_of(local=LocalStorageBackend(tmp_path, fsync=False))
    insert(op, id=1, photo="cat.png", thumb="cat.png")
    assert convert(op, storage, "photo", PlainPath("local")) == (1, 0, 0)
    insert(op, id=2, photo_file="{broken")
    assert convert(op, storage, "thumb", PlainPath("local")) == (0, 1, 0)


@contextlib.contextmanager
def late_writer(pipe: Path) -> Iterator[list[Path]]:
    """Open a pipe to write after some seconds, so that a reader that waits for a writer is noticed, and does not hang."""
    came: list[Path] = []

    def come() -> None:
        came.append(pipe)
        with contextlib.suppress(OSError):
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    timer = threading.Timer(10, come)
    timer.start()
    try:
        yield came
    finally:
        timer.cancel()
        timer.join()


@pytest.mark.case("RE-15")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_regular_file(op: Operations, tmp_path: Path, kind: str) -> None:
    """Opening a pipe waits for a writer who may never come, and /dev/zero has no end."""
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    storage = storage_of(local=LocalStorageBackend(tmp_path / "store", fsync=False))
    insert(op, id=1, photo="odd")
    with late_writer(path) as came, pytest.raises(ObjectNotFoundError, match="not a regular file"):
        convert(op, storage, "photo", lambda _: CopyOf(path))
    assert not came, "it was opened as if somebody wrote to it"
    assert convert(op, storage, "photo", lambda _: CopyOf(path), skip_missing=True) == (0, 0, 1)
    assert convert(op, storage, "photo", lambda _: InPlace("local", "odd"), skip_missing=True) == (0, 0, 1)


def test_paths_that_no_file_can_have(op: Operations, tmp_path: Path) -> None:
    """One that is too long is missing, like any other; one with a NUL is named."""
    storage = storage_of(local=LocalStorageBackend(tmp_path / "store", fsync=False))
    path = PlainPath("local", folder=tmp_path)
    insert(op, id=1, photo="x" * 300)
    with pytest.raises(ObjectNotFoundError, match="longer than the name of any file"):
        convert(op, storage, "photo", path)
    assert convert(op, storage, "photo", path, skip_missing=True) == (0, 0, 1)
    with pytest.raises(InvalidLocationError, match=r"'cat\\x00.png' has a NUL character"):
        path("cat\0.png")


def test_the_way_back_says_what_becomes_of_variants(op: Operations, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They have no path in the old column, and stay for the garbage collector, as the objects do."""
    names = ("cat.png", "cat-small.png", "cat-large.png")
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    storage = storage_of(local=LocalStorageBackend(tmp_path, fsync=False))
    insert(op, id=1, photo="cat.png")
    insert(op, id=2)
    assert convert(op, storage, "photo", PlainPath("local")) == (1, 0, 0)
    (raw,) = op.get_bind().execute(sa.text("SELECT photo_file FROM page WHERE id = 1")).scalars()
    variants = {name: {**json.loads(raw), "location": name} for name in names[1:]}
    whole = json.dumps({**json.loads(raw), "variants": variants})
    op.get_bind().execute(sa.text("UPDATE page SET photo_file = :raw, photo = NULL WHERE id = 1"), {"raw": whole})
    op.get_bind().commit()
    seen: list[StoredObjectRef] = []

    def back(ref: StoredObjectRef) -> str:
        seen.append(ref)
        return PlainPath("local").back(ref)

    report = storage_to_paths(op, "page", "photo_file", "photo", mapping=back)
    assert (report.stored, [set(ref.variants or ()) for ref in seen]) == (1, [set(names[1:])])
    assert op.get_bind().execute(sa.text("SELECT photo_file FROM page WHERE id = 1")).scalar() == whole, "the refs stay whole"
    with caplog.at_level("WARNING"):
        drop_restored_column(op, "page", "photo_file", "photo")
    said = [record.getMessage() for record in caplog.records]
    assert "1 object of page.photo_file remains in storage, and no row refers to it any more" in said
    assert "2 variants of this object remain as well, for the garbage collector" in said
    assert {path.name for path in tmp_path.glob("*.png")} == set(names)
