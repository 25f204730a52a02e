"""Databases of SQLite in UTF-16, which gives a text that is cast to bytes in the encoding of the database."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations

from granite_storage import StorageManager, StoragePolicy
from granite_storage.alembic import PlainPath, add_storage_column, paths_to_storage
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.locations import generated_id
from granite_storage.migration import migrate
from granite_storage.verification import Problem, verify
from tests.gc.environment import Crate, GcEnvironment, file, gc_environment
from tests.migration.environment import Shelf, migration_environment
from tests.orm.databases import Database, sqlite

ENCODINGS = ["UTF-16le", "UTF-16be"]


@pytest.fixture(params=ENCODINGS)
def utf16(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database that another program has made."""
    with sqlite("sqlite") as database:
        make(Path(str(database.url.database)), request.param)
        yield database


@pytest.fixture
async def env(utf16: Database) -> AsyncIterator[GcEnvironment]:
    async with gc_environment(utf16) as found:
        yield found


def make(path: Path, encoding: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA encoding = '{encoding}'")
    connection.execute("CREATE TABLE of_another_program (id INT)")
    connection.commit()
    assert connection.execute("PRAGMA encoding").fetchone() == (encoding,)
    connection.close()


@pytest.mark.case("RA-07")
async def test_references_are_seen(env: GcEnvironment) -> None:
    derived = await env.orphan()
    given = file("c")
    given._state.extra = {"thumbnail": derived.location}
    await env.add(*[Crate(id=number, file=file(str(number)), scan=await env.orphan()) for number in range(1, 4)])
    await env.add(Crate(id=9, file=given))
    kept, orphan = await env.locations(), await env.orphan()
    env.age()
    report = await env.collect()
    assert (report.referenced, report.deleted, report.dangling, report.unseen) == (8, 1, [], [])
    assert await env.locations() == kept
    assert orphan.location not in kept


@pytest.mark.case("RA-07")
async def test_locations_whose_order_is_another_one_in_utf16(env: GcEnvironment) -> None:
    names = ["\u0101", "b", "\u00ff", "\U0001f600", "\uffee", "\u0201"]
    for number, name in enumerate(names, 1):
        ref = await env.manager.put_bytes(
            storage_key="docs", model_name=name, entity_id="1", field_name="f", content=b"a", original_filename="o.txt"
        )
        await env.add(Crate(id=number, scan=ref))
    kept = await env.locations()
    await env.orphan()
    env.age()
    report = await env.collect()
    assert (report.referenced, report.deleted) == (len(names), 1)
    assert await env.locations() == kept


@pytest.mark.case("RA-07")
async def test_the_recheck_sees_a_row_that_came_late(env: GcEnvironment) -> None:
    ref = await env.orphan()
    env.age()
    await env.add(Crate(id=1, file=file("a")))
    run = env.collector().collection(storage_key="docs", dry_run=False)
    find_references = run._source.find_references

    async def late(locations: list[str]) -> set[str]:
        await env.sql("UPDATE gc_crate SET scan = :raw", raw=json.dumps(ref.to_dict()))
        return await find_references(locations)

    run._source.find_references = late  # type: ignore[method-assign, assignment]
    report = await run
    assert (report.referenced_on_recheck, report.deleted) == (1, 0)
    assert ref.location in await env.locations()


MENTIONS = {
    "text": "'see ' || :raw",
    "text after a zero": "'a' || char(0) || :raw",
    "bytes of a text": "CAST(:raw AS BLOB)",
    "bytes in UTF-8": ":encoded",
}


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("shape", MENTIONS)
async def test_mentions_are_seen(env: GcEnvironment, shape: str) -> None:
    await env.add(Crate(id=1, file=file("a")))
    await env.sql("CREATE TABLE note (note)")
    ref, orphan = await env.orphan(), await env.orphan()
    raw = f"see {generated_id(ref.location)}"
    values = {"encoded": raw.encode()} if ":encoded" in MENTIONS[shape] else {"raw": raw}
    await env.sql(f"INSERT INTO note VALUES ({MENTIONS[shape]})", **values)  # noqa: S608  # of our own
    env.age()
    report = await env.collect()
    assert (report.mentions, report.deleted) == ({"main.note.note": 1}, 1)
    left = await env.locations()
    assert ref.location in left
    assert orphan.location not in left


@pytest.mark.case("RA-07")
async def test_a_row_of_an_unknown_backend_is_named(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    await env.sql("UPDATE gc_crate SET file = json_set(file, '$.backend', 'gone')")
    with pytest.raises(CollectionRefusedError, match="the row 1 names the backend 'gone'"):
        await env.collect()


@pytest.mark.case("RE-14")
async def test_rows_are_verified_and_moved(utf16: Database) -> None:
    """A text that is not in UTF-16 is reported."""
    async with migration_environment(utf16) as env:
        await env.add(Shelf(id=1, title="\u0101", file=file("a")), Shelf(id=2, file=file("b")))
        report = await verify(env.binding, deep=True)
        assert (report.checked, report.problems) == (2, 0)
        await env.sql("UPDATE migration_shelf SET other = CAST(x'd8d8' AS TEXT) WHERE id = 2")
        assert [finding.problem async for finding in verify(env.binding)] == [Problem.UNDECODABLE]
        moved = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (moved.moved, len(await env.objects("old")), len(await env.objects("new"))) == (2, 0, 2)


@pytest.mark.case("RE-03")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_has_one_owner(encoding: str, tmp_path: Path) -> None:
    make(tmp_path / "app.db", encoding)
    (tmp_path / "cat.png").write_bytes(b"cat")
    manager = StorageManager(
        backends={"local": LocalStorageBackend(tmp_path, fsync=False)}, policies={"docs": StoragePolicy("docs", "local")}
    )
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.connect() as connection:
        op = Operations(MigrationContext.configure(connection))
        op.create_table("page", sa.Column("id", sa.Integer, primary_key=True), sa.Column("a", sa.Text), sa.Column("b", sa.Text))
        connection.execute(sa.text("INSERT INTO page VALUES (1, 'cat.png', 'cat.png')"))
        done = []
        for name in ("a", "b"):
            add_storage_column(op, "page", f"{name}_file")
            report = paths_to_storage(op, manager, "page", name, f"{name}_file", storage_key="docs", mapping=PlainPath("local"))
            done.append((report.adopted, report.stored))
    engine.dispose()
    assert done == [(1, 0), (0, 1)]
