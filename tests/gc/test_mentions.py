"""Objects that a column mentions of which no model says that it holds references: in JSON at any depth, in text, in a copy."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import LargeBinary, bindparam, text

from granite_storage import StoredObjectRef
from granite_storage.backends.base import ObjectInfo
from granite_storage.gc import collection as gc_collection
from granite_storage.locations import generated_id
from tests.gc.environment import Crate, GcEnvironment, file, gc_environment
from tests.orm.databases import Database

SHAPES = {
    "reference": lambda ref: json.dumps(ref.to_dict()),
    "nested": lambda ref: json.dumps({"old": {"files": [1, ref.to_dict()]}}),
    "twice encoded": lambda ref: json.dumps(json.dumps(ref.to_dict())),
    "location": lambda ref: json.dumps(ref.location),
    "id": lambda ref: json.dumps({"id": generated_id(ref.location)}),
    "in a URL": lambda ref: json.dumps("https://example.org/" + quote(ref.location, safe="").replace("%2F", "%2f")),
}
"""How an application may write down a reference, as JSON text."""

JSON_TYPES = {"sqlite": ["JSON", "NUM", ""], "asyncpg": ["JSON", "JSONB"], "mariadb": ["JSON"]}
TEXT_TYPES = {"sqlite": ["TEXT", "VARCHAR(800)"], "asyncpg": ["TEXT", "VARCHAR(800)"], "mariadb": ["TEXT", "VARCHAR(800)"]}


def types_of(database: Database, known: dict[str, list[str]]) -> list[str]:
    family = "sqlite" if database.is_sqlite else "asyncpg" if database.is_postgres else "mariadb"
    return known[family]


async def add_note(env: GcEnvironment, kind: str, raw: str, *, table: str = "gc_note", number: int = 1) -> None:
    value = f"CAST(:raw AS {kind})" if env.database.is_postgres else ":raw"
    await env.sql(f"INSERT INTO {table} (id, note) VALUES ({number}, {value})", raw=raw)  # noqa: S608  # names of our own


async def drop(env: GcEnvironment, table: str) -> None:
    await env.sql(f"DROP TABLE IF EXISTS {table}")


@pytest.fixture
async def noted(env: GcEnvironment) -> AsyncIterator[GcEnvironment]:
    """An environment with a row and its object, in whose database the tests make tables that no model has."""
    await env.add(Crate(id=1, file=file("a")))
    for table in ("gc_note", "gc_copy"):
        await drop(env, table)
    yield env
    for table in ("gc_note", "gc_copy"):
        await drop(env, table)


async def expect_kept(env: GcEnvironment, kept: StoredObjectRef | str, column: str) -> None:
    """Collect, with one more orphan, and see that only this one goes, and that the report says what kept the other."""
    location = kept if isinstance(kept, str) else kept.location
    orphan = await env.orphan()
    env.age()
    dry = await env.collect(dry_run=True)
    report = await env.collect()
    left = await env.locations()
    assert location in left
    assert orphan.location not in left
    for each in (dry, report):
        assert (each.orphaned, each.mentioned, each.mentions) == (1, 1, {column: 1})
        assert each.mentioned_bytes > 0
        assert (
            each.scanned
            == each.referenced
            + each.unmanaged
            + each.within_grace_period
            + each.referenced_on_recheck
            + each.mentioned
            + each.orphaned
        )
    assert report.deleted == 1


def label(env: GcEnvironment, column: str) -> str:
    """Return what the report calls a column of the schema that the sessions look at."""
    if env.database.is_sqlite:
        return f"main.{column}"
    return f"public.{column}" if env.database.is_postgres else f"{env.database.url.database}.{column}"


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("shape", SHAPES)
async def test_json_of_which_no_model_says_that_it_holds_references(noted: GcEnvironment, shape: str) -> None:
    for kind in types_of(noted.database, JSON_TYPES):
        if shape == "reference" and kind in ("JSONB", "JSON") and not (noted.database.is_postgres and kind == "JSON"):
            continue  # that one is found as a column of references
        await noted.sql(f"CREATE TABLE gc_note (id INT, note {kind})")
        ref = await noted.orphan()
        await add_note(noted, kind, SHAPES[shape](ref))
        await expect_kept(noted, ref, label(noted, "gc_note.note"))
        await noted.aged.delete(ref.location)
        await drop(noted, "gc_note")


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("shape", SHAPES)
async def test_text(noted: GcEnvironment, shape: str) -> None:
    for kind in types_of(noted.database, TEXT_TYPES):
        await noted.sql(f"CREATE TABLE gc_note (id INT, note {kind})")
        ref = await noted.orphan()
        raw = SHAPES[shape](ref)
        await add_note(noted, kind, json.loads(raw) if shape in ("location", "in a URL") else raw)
        await expect_kept(noted, ref, label(noted, "gc_note.note"))
        await noted.aged.delete(ref.location)
        await drop(noted, "gc_note")


@pytest.mark.case("RA-07")
async def test_references_after_a_hundred_values_that_are_none(noted: GcEnvironment) -> None:
    kind = types_of(noted.database, JSON_TYPES)[-1 if noted.database.is_postgres else 0]
    await noted.sql(f"CREATE TABLE gc_note (id INT, note {kind})")
    for number in range(150):
        await add_note(noted, kind, "{}", number=number)
    ref = await noted.orphan()
    await add_note(noted, kind, json.dumps(ref.to_dict()), number=1000)
    await expect_kept(noted, ref, label(noted, "gc_note.note"))


@pytest.mark.case("RA-07")
async def test_a_column_that_holds_references_and_nests_others(noted: GcEnvironment) -> None:
    kind = types_of(noted.database, JSON_TYPES)[-1 if noted.database.is_postgres else 0]
    await noted.sql(f"CREATE TABLE gc_note (id INT, note {kind})")
    top, nested = await noted.orphan(), await noted.orphan()
    await add_note(noted, kind, json.dumps(top.to_dict()), number=1)
    await add_note(noted, kind, json.dumps({"old": nested.to_dict()}), number=2)
    await expect_kept(noted, nested, label(noted, "gc_note.note"))
    assert top.location in await noted.locations()


@pytest.mark.case("RA-07")
async def test_a_copy_of_a_table(noted: GcEnvironment) -> None:
    """`CREATE TABLE ... AS` forgets on SQLite what the columns were declared as."""
    await noted.add(Crate(id=2, file=file("b")))
    await noted.sql("CREATE TABLE gc_copy AS SELECT * FROM gc_crate WHERE id = 2")
    location = await noted.location_of(2)
    await noted.sql("DELETE FROM gc_crate WHERE id = 2")
    orphan = await noted.orphan()
    noted.age()
    report = await noted.collect()
    assert (report.deleted, report.referenced + report.mentioned) == (1, 2)
    left = await noted.locations()
    assert location in left
    assert orphan.location not in left


@pytest.mark.case("RA-07")
async def test_a_copy_that_is_made_while_the_objects_are_listed(noted: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    await noted.add(Crate(id=2, file=file("b")))
    location = await noted.location_of(2)
    noted.age()
    listing = noted.aged.iter_objects

    async def iter_objects(*args: Any, **options: Any) -> AsyncIterator[ObjectInfo]:
        async for info in listing(*args, **options):
            yield info
        await noted.sql("CREATE TABLE gc_copy AS SELECT * FROM gc_crate WHERE id = 2")
        await noted.sql("DELETE FROM gc_crate WHERE id = 2")

    monkeypatch.setattr(noted.aged, "iter_objects", iter_objects)
    report = await noted.collect()
    monkeypatch.undo()
    assert (report.mentions, report.deleted) == ({label(noted, "gc_copy.file"): 1}, 0)
    assert location in await noted.locations()


@pytest.mark.case("RA-07")
async def test_more_objects_than_one_look_takes(
    noted: GcEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gc_collection, "PAGE", 1)
    monkeypatch.setattr(gc_collection, "_LOOKED_FOR_AT_ONCE", 2)
    await noted.sql("CREATE TABLE gc_note (id INT, note TEXT, other TEXT)")
    refs = [await noted.orphan() for _ in range(7)]
    await add_note(noted, "TEXT", " ".join(ref.location for ref in refs[::2]))
    await noted.sql("UPDATE gc_note SET other = :location", location=refs[0].location)
    noted.age()
    with caplog.at_level(logging.WARNING, "granite_storage"):
        report = await noted.collect()
    columns = {label(noted, "gc_note.note"): 4, label(noted, "gc_note.other"): 1}
    assert (report.mentioned, report.mentions, report.deleted) == (4, columns, 3)
    assert {ref.location for ref in refs[::2]} < await noted.locations()
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" objects")[0] for line in said] == [f"{name} mentions {n}" for name, n in columns.items()]


async def test_nothing_is_kept_by_what_mentions_something_else(noted: GcEnvironment) -> None:
    await noted.sql("CREATE TABLE gc_note (id INT, note TEXT)")
    orphan, gone = await noted.orphan(), await noted.orphan()
    await noted.aged.delete(gone.location)
    await add_note(noted, "TEXT", f"{gone.location} {'0' * 500} {json.dumps(gone.to_dict())}")
    noted.age()
    report = await noted.collect()
    assert (report.mentioned, report.mentions, report.unseen, report.deleted) == (0, {}, [], 1)
    assert orphan.location not in await noted.locations()


async def test_a_run_that_is_stopped_while_it_looks(noted: GcEnvironment) -> None:
    """What was not looked for is not deleted."""
    await noted.sql("CREATE TABLE gc_note (id INT, note TEXT)")
    ref = await noted.orphan()
    await add_note(noted, "TEXT", ref.location)
    noted.age()
    run = noted.collector().collection(storage_key="docs", dry_run=False)
    find_mentions = run._source.find_mentions

    async def stopping(locations: Any) -> AsyncIterator[Any]:
        run.stop()
        async for mention in find_mentions(locations):
            yield mention

    run._source.find_mentions = stopping  # type: ignore[method-assign]
    report = await run
    assert (report.deleted, report.complete) == (0, False)
    assert ref.location in await noted.locations()


POSTGRES_TYPES = {
    "json[]": "ARRAY[CAST(:raw AS json)]",
    "jsonb[]": "ARRAY[CAST(:raw AS jsonb)]",
    "text[]": "ARRAY[CAST(:raw AS text)]",
    "gc_json": "CAST(:raw AS gc_json)",
    "gc_jsonb": "CAST(:raw AS gc_jsonb)",
    "gc_jsonb[]": "ARRAY[CAST(:raw AS gc_jsonb)]",
    "gc_text": "CAST(:raw AS gc_text)",
    "gc_pair": "CAST(ROW(1, CAST(:raw AS text)) AS gc_pair)",
    "gc_pair[]": "ARRAY[CAST(ROW(1, CAST(:raw AS text)) AS gc_pair)]",
}


@pytest.mark.case("RA-07")
async def test_types_of_postgresql(postgres_only: Database) -> None:
    async with gc_environment(postgres_only) as env:
        await env.add(Crate(id=1, file=file("a")))
        for statement in (
            "CREATE DOMAIN gc_json AS json",
            "CREATE DOMAIN gc_jsonb AS jsonb",
            "CREATE DOMAIN gc_text AS varchar(2000)",
            "CREATE TYPE gc_pair AS (id int, note text)",
        ):
            await env.sql(statement)
        try:
            kept = []
            for number, (kind, value) in enumerate(POSTGRES_TYPES.items()):
                await env.sql(f"CREATE TABLE gc_note_{number} (id INT, note {kind})")
                kept.append(await env.orphan())
                raw = json.dumps({"file": kept[-1].to_dict()})
                statement = f"INSERT INTO gc_note_{number} VALUES (1, {value})"  # noqa: S608  # names of our own
                await env.sql(statement, raw=raw)
            env.age()
            await env.orphan()
            report = await env.collect()
            assert report.mentions == {f"public.gc_note_{number}.note": 1 for number in range(len(POSTGRES_TYPES))}
            assert {ref.location for ref in kept} < await env.locations()
        finally:
            for number in range(len(POSTGRES_TYPES)):
                await drop(env, f"gc_note_{number}")
            for statement in ("DROP TYPE gc_pair", "DROP DOMAIN gc_json", "DROP DOMAIN gc_jsonb", "DROP DOMAIN gc_text"):
                await env.sql(statement)


@pytest.mark.case("RA-07")
async def test_json_that_cannot_be_jsonb(postgres_only: Database) -> None:
    """PostgreSQL stores JSON that it cannot read into: it is searched as text."""
    async with gc_environment(postgres_only) as env:
        await env.add(Crate(id=1, file=file("a")))
        await env.sql("CREATE TABLE gc_note (id INT, note json)")
        try:
            ref = await env.orphan()
            await add_note(env, "json", '{"a": "\\u0000", "file": ' + json.dumps(ref.to_dict()) + "}")
            await expect_kept(env, ref, "public.gc_note.note")
        finally:
            await drop(env, "gc_note")


@pytest.mark.case("RA-07")
async def test_what_the_role_may_not_see(postgres_only: Database, caplog: pytest.LogCaptureFixture) -> None:
    """It is passed over, and named; rows that row-level security may hide, too."""
    role = f"collector_{uuid.uuid4().hex[:8]}"
    async with gc_environment(postgres_only) as env:
        await env.add(Crate(id=1, file=file("a")))
        for table in ("gc_note", "gc_secret", "gc_rows"):
            await env.sql(f"CREATE TABLE {table} (id INT, note TEXT)")
        await env.sql("ALTER TABLE gc_rows ENABLE ROW LEVEL SECURITY")
        await env.sql(f"CREATE ROLE {role}")
        await env.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        await env.sql(f"REVOKE SELECT ON gc_secret FROM {role}")  # noqa: S608  # no query
        reader = postgres_only.engine(connect_args={"server_settings": {"role": role}})
        try:
            ref = await env.orphan()
            await add_note(env, "TEXT", ref.location)
            env.age()
            env.sessions.configure(bind=reader)
            with caplog.at_level(logging.WARNING, "granite_storage"):
                report = await env.collect()
            assert report.mentions == {"public.gc_note.note": 1}
            assert report.unseen == ["public.gc_rows.note", "public.gc_secret.note"]
            assert any("public.gc_secret.note" in record.getMessage() for record in caplog.records)
        finally:
            env.sessions.configure(bind=env.engine)
            await reader.dispose()
            for table in ("gc_note", "gc_secret", "gc_rows"):
                await drop(env, table)
            await env.sql(f"DROP OWNED BY {role}")
            await env.sql(f"DROP ROLE {role}")


async def test_a_table_that_is_altered_while_others_are_looked_at(noted: GcEnvironment) -> None:
    """Tables are let go of one by one, so that a look at many of them needs no more locks than one at a few."""
    tables = ["gc_copy", "gc_note"]
    for table in tables:
        await noted.sql(f"CREATE TABLE {table} (id INT, note TEXT)")
    orphan, mentioned = await noted.orphan(), await noted.orphan()
    await add_note(noted, "TEXT", mentioned.location)
    noted.age()
    run = noted.collector().collection(storage_key="docs")
    find_mentions, altered = run._source.find_mentions, []

    async def slowly(locations: Any) -> AsyncIterator[Any]:
        async for mention in find_mentions(locations):
            if mention.column.startswith(label(noted, "gc_copy.")):
                async with asyncio.timeout(10):
                    await noted.sql("ALTER TABLE gc_copy ADD COLUMN more INT")
                altered.append(mention)
            yield mention

    run._source.find_mentions = slowly  # type: ignore[method-assign]
    assert [item.location async for item in run] == [orphan.location]
    assert (run.report.mentioned, len(altered)) == (1, 1)


async def test_a_view_without_rows_and_a_virtual_table(noted: GcEnvironment) -> None:
    """Neither can be read, and neither has anything of its own."""
    if noted.database.is_postgres:
        await noted.sql("CREATE MATERIALIZED VIEW gc_view AS SELECT file FROM gc_crate WITH NO DATA")
    elif noted.database.is_sqlite:
        await noted.sql("CREATE VIRTUAL TABLE gc_view USING fts5(note)")
    else:
        await noted.sql("CREATE VIEW gc_view AS SELECT file FROM gc_crate")
    try:
        await noted.orphan()
        noted.age()
        assert (await noted.collect()).deleted == 1
    finally:
        kind = "MATERIALIZED VIEW" if noted.database.is_postgres else "TABLE" if noted.database.is_sqlite else "VIEW"
        await noted.sql(f"DROP {kind} gc_view")


@pytest.mark.case("RA-07")
async def test_old_rows_that_mariadb_keeps_versions_of(noted: GcEnvironment) -> None:
    """The table of such is no `BASE TABLE`."""
    if noted.database.is_sqlite or noted.database.is_postgres:
        pytest.skip("other databases have no such tables")
    await noted.sql("CREATE TABLE gc_note (id INT, note TEXT) WITH SYSTEM VERSIONING")
    ref = await noted.orphan()
    await add_note(noted, "TEXT", ref.location)
    await expect_kept(noted, ref, label(noted, "gc_note.note"))


BYTES_TYPES = {"sqlite": ["BLOB"], "asyncpg": ["BYTEA", "gc_bytes"], "mariadb": ["BLOB", "LONGBLOB", "VARBINARY(4000)"]}


@pytest.mark.case("RA-07")
async def test_bytes(noted: GcEnvironment) -> None:
    """Pickles, and JSON that was encoded; what is long is hardly a note about an object, and is left out."""
    if noted.database.is_postgres:
        await noted.sql("CREATE DOMAIN gc_bytes AS bytea")
    try:
        for kind in types_of(noted.database, BYTES_TYPES):
            await noted.sql(f"CREATE TABLE gc_note (id INT, note {kind})")
            insert = text("INSERT INTO gc_note VALUES (:id, :note)").bindparams(bindparam("note", type_=LargeBinary()))
            for ref_as_bytes in (pickle.dumps, lambda ref: b"\xff\x00" + json.dumps(ref.to_dict()).encode()):
                ref, other = await noted.orphan(), await noted.orphan()
                async with noted.engine.begin() as connection:
                    await connection.execute(insert, {"id": 1, "note": ref_as_bytes(ref)})
                    if kind in ("BLOB", "LONGBLOB", "BYTEA") and not (kind == "BLOB" and noted.database.name == "mariadb"):
                        long = b"\x00" * 70_000 + other.location.encode()
                        await connection.execute(insert, {"id": 2, "note": long})
                await noted.aged.delete(other.location)
                await expect_kept(noted, ref, label(noted, "gc_note.note"))
                await noted.aged.delete(ref.location)
            await drop(noted, "gc_note")
    finally:
        if noted.database.is_postgres:
            await drop(noted, "gc_note")
            await noted.sql("DROP DOMAIN gc_bytes")
