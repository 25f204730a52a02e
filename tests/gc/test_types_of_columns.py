"""Which types of columns are searched for mentions: all that can hold text, however deep; what is not searched is named."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from granite_storage.locations import generated_id
from granite_storage.orm import discovery
from tests.gc.environment import Crate, GcEnvironment, file, gc_environment
from tests.orm.conftest import new_database
from tests.orm.databases import Database

BYTES = "convert_to(:raw, 'UTF8')"
POSTGRESQL = {
    "gc_with_bytes": f"CAST(ROW(1, {BYTES}) AS gc_with_bytes)",
    "gc_with_bytes[]": f"ARRAY[CAST(ROW(1, {BYTES}) AS gc_with_bytes)]",
    "gc_deep": f"CAST(ROW(ARRAY[CAST(ROW(1, {BYTES}) AS gc_with_bytes)]) AS gc_deep)",
    "bytea[]": f"ARRAY[{BYTES}]",
    "gc_range": "gc_range(:raw, NULL)",
    "gc_range[]": "ARRAY[gc_range(:raw, NULL)]",
    "gc_multirange": "gc_multirange(gc_range(:raw, NULL))",
    "gc_of_bytes": f"gc_of_bytes({BYTES}, NULL)",
    "name": "CAST(:id AS name)",
    "name[]": "ARRAY[CAST(:id AS name)]",
    "tsvector": "CAST(:id AS tsvector)",
    "tsquery": "CAST(:id AS tsquery)",
    "refcursor": "CAST(:id AS refcursor)",
    "gc_composite_of_name": "CAST(ROW(CAST(:id AS name)) AS gc_composite_of_name)",
}
EXTENSIONS = {"ltree": "CAST(:id AS ltree)", "ltree[]": "ARRAY[CAST(:id AS ltree)]", "hstore": "hstore(:id, 'a')"}
MAKE = (
    "CREATE TYPE gc_with_bytes AS (id int, note bytea)",
    "CREATE TYPE gc_deep AS (notes gc_with_bytes[])",
    "CREATE TYPE gc_range AS RANGE (subtype = text, multirange_type_name = gc_multirange)",
    "CREATE TYPE gc_of_bytes AS RANGE (subtype = bytea)",
    "CREATE TYPE gc_composite_of_name AS (note name)",
)
TYPES = ("gc_deep", "gc_with_bytes", "gc_range", "gc_of_bytes", "gc_composite_of_name")


async def expect_kept(env: GcEnvironment, column: str, location: str) -> None:
    orphan = await env.orphan()
    env.age()
    report = await env.collect()
    assert (report.mentions, report.unseen, report.deleted) == ({column: 1}, [], 1)
    left = await env.locations()
    assert location in left
    assert orphan.location not in left


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("output", ["hex", "escape"])
async def test_types_of_postgresql(postgres_only: Database, output: str) -> None:
    options = {"connect_args": {"server_settings": {"bytea_output": output}}}
    async with gc_environment(postgres_only, **options) as env:
        await env.add(Crate(id=1, file=file("a")))
        shapes = dict(POSTGRESQL)
        for statement in MAKE:
            await env.sql(statement)
        try:
            async with env.engine.connect() as connection:
                asked = "SELECT name FROM pg_available_extensions WHERE name IN ('ltree', 'hstore')"
                available = list((await connection.exec_driver_sql(asked)).scalars())
            for extension in available:
                await env.sql(f"CREATE EXTENSION IF NOT EXISTS {extension}")
                shapes |= {kind: value for kind, value in EXTENSIONS.items() if kind.startswith(extension)}
            kept: dict[str, str] = {}
            for number, (kind, value) in enumerate(shapes.items()):
                await env.sql(f"CREATE TABLE gc_note_{number} (id INT, note {kind})")
                ref = await env.orphan()
                raw = {"id": generated_id(ref.location)} if ":id" in value else {"raw": json.dumps({"file": ref.to_dict()})}
                value = value.replace(":id", "CAST(:id AS text)").replace(":raw", "CAST(:raw AS text)")
                await env.sql(f"INSERT INTO gc_note_{number} VALUES (1, {value})", **raw)  # noqa: S608  # of our own
                kept[f"public.gc_note_{number}.note"] = ref.location
            await env.orphan()
            env.age()
            report = await env.collect()
            assert (report.mentions, report.unseen, report.deleted) == (dict.fromkeys(kept, 1), [], 1)
            assert set(kept.values()) < await env.locations()
        finally:
            for number in range(len(shapes)):
                await env.sql(f"DROP TABLE IF EXISTS gc_note_{number}")
            for kind in TYPES:
                await env.sql(f"DROP TYPE {kind}")


@pytest.mark.case("RA-07")
async def test_labels_of_postgresql(postgres_only: Database) -> None:
    async with gc_environment(postgres_only) as env:
        await env.add(Crate(id=1, file=file("a")))
        ref = await env.orphan()
        await env.sql(f"CREATE TYPE gc_label AS ENUM ('short', '{generated_id(ref.location)}')")
        try:
            await env.sql("CREATE TABLE gc_note (id INT, note gc_label)")
            await env.sql(f"INSERT INTO gc_note VALUES (1, '{generated_id(ref.location)}')")  # noqa: S608  # of our own
            await expect_kept(env, "public.gc_note.note", ref.location)
        finally:
            await env.sql("DROP TABLE gc_note")
            await env.sql("DROP TYPE gc_label")


async def test_types_of_postgresql_that_hold_no_text_are_left_out(postgres_only: Database) -> None:
    """They would have to be printed, row by row."""
    kinds = (
        "int",
        "bigint[]",
        "numeric",
        "float8",
        "bool",
        "date",
        "timestamptz",
        "uuid",
        "inet",
        "int4range",
        "point",
        "bit(40)",
    )
    async with gc_environment(postgres_only) as env:
        columns = ", ".join(f"c{number} {kind}" for number, kind in enumerate((*kinds, "gc_numbers", "gc_short", "numrange[]")))
        await env.sql("CREATE TYPE gc_numbers AS (a int, b numeric[])")
        await env.sql("CREATE TYPE gc_short AS ENUM ('a', 'b')")
        try:
            await env.sql(f"CREATE TABLE gc_note ({columns})")
            async with env.engine.connect() as connection:
                found = await connection.run_sync(discovery.find_text_columns)
            assert [item.label for item in found if item.table == "gc_note"] == []
        finally:
            await env.sql("DROP TABLE gc_note")
            for kind in ("gc_numbers", "gc_short"):
                await env.sql(f"DROP TYPE {kind}")


@pytest.fixture
async def mariadb_env(request: pytest.FixtureRequest) -> AsyncIterator[GcEnvironment]:
    async with new_database(request, "mariadb") as database, gc_environment(database) as env:
        yield env


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("kind", ["ENUM", "SET"])
async def test_labels_of_mariadb(mariadb_env: GcEnvironment, kind: str) -> None:
    env = mariadb_env
    await env.add(Crate(id=1, file=file("a")))
    ref = await env.orphan()
    label = generated_id(ref.location)
    await env.sql(f"CREATE TABLE gc_note (id INT, note {kind}('short', '{label}'), small {kind}('a', 'b'))")
    await env.sql(f"INSERT INTO gc_note VALUES (1, '{label}', 'a')")  # noqa: S608  # of our own
    try:
        await expect_kept(env, f"{env.database.url.database}.gc_note.note", ref.location)
    finally:
        await env.sql("DROP TABLE gc_note")


@pytest.mark.case("RA-07")
async def test_a_type_that_is_unknown_is_named(mariadb_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of MariaDB may have other types; here, that of years is taken for one."""
    env = mariadb_env
    await env.add(Crate(id=1, file=file("a")))
    statement = str(discovery._MARIADB_COLUMNS)
    assert "'year'" in statement
    monkeypatch.setattr(discovery, "_MARIADB_COLUMNS", discovery.text(statement.replace("'year'", "'other'")))
    await env.sql("CREATE TABLE gc_note (id INT, note YEAR)")
    try:
        await env.orphan()
        env.age()
        report = await env.collect()
        assert report.unseen == [f"{env.database.url.database}.gc_note.note"]
        assert report.deleted == 1
    finally:
        await env.sql("DROP TABLE gc_note")


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("shape", ["'ab' || char(0) || :raw", "char(0) || char(0) || :raw", ":raw || char(0)"])
async def test_a_text_with_a_zero(plain_env: GcEnvironment, shape: str) -> None:
    """SQLite's GLOB reads up to it."""
    env = plain_env
    await env.add(Crate(id=1, file=file("a")))
    await env.sql("CREATE TABLE gc_note (id INT, note TEXT)")
    try:
        ref = await env.orphan()
        await env.sql(f"INSERT INTO gc_note VALUES (1, {shape})", raw=json.dumps(ref.to_dict()))  # noqa: S608  # of our own
        await expect_kept(env, "main.gc_note.note", ref.location)
    finally:
        await env.sql("DROP TABLE gc_note")
