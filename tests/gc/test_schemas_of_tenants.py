"""Tables of the same name in the schemas of tenants, and those of which no model knows: all of their references are found."""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    StorageGarbageCollector,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import GarbageCollectionReport
from granite_storage.gc import database as gc_database
from tests.orm.databases import Database


class Base(DeclarativeBase):
    pass


class Letter(Base):
    """A table in the schema of a tenant, whichever that is."""

    __tablename__ = "tenant_letter"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


journal_tables(Base.metadata)


class Placeholder(DeclarativeBase):
    pass


class Stamp(Placeholder):
    """A table in a schema that there is only where it is translated."""

    __tablename__ = "tenant_stamp"
    __table_args__ = {"schema": "tenant"}
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


class Tenants:
    """Schemas of tenants, and one storage for all."""

    def __init__(self, engine: AsyncEngine, names: list[str]) -> None:
        self.engine = engine
        self.names = names
        self.memory = MemoryStorageBackend()
        self.manager = StorageManager(backends={"files": self.memory}, policies={"docs": StoragePolicy("docs", "files")})

    def sessions(self, name: str | None, key: str | None = None) -> Any:
        engine = self.engine if name is None else self.engine.execution_options(schema_translate_map={key: name})
        return async_sessionmaker(engine, expire_on_commit=False)

    @contextlib.contextmanager
    def bound(self, base: Any, name: str | None, key: str | None = None) -> Any:
        binding = bind_storage(base, self.manager, session_factory=self.sessions(name, key))
        try:
            yield binding
        finally:
            binding.unbind()

    async def collect(self, base: Any, name: str | None, key: str | None = None) -> GarbageCollectionReport:
        """Collect with sessions that look at one schema."""
        with self.bound(base, name, key) as binding:
            collector = StorageGarbageCollector(self.manager, binding=binding, grace_period=timedelta(0), max_deleted_share=1.0)
            return await collector.collect(storage_key="docs", dry_run=False, allow_no_references=True)

    async def add(self, model: Any, name: str, number: int, key: str | None = None) -> str:
        with self.bound(model, name, key):
            row = model(id=number, file=Attachment(b"...", filename="a.txt"))
            async with self.sessions(name, key).begin() as session:
                session.add(row)
        location: str = row.file.ref.location
        return location

    async def orphan(self) -> StoredObjectRef:
        return await self.manager.put_bytes(storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"...")

    async def locations(self) -> list[str]:
        return [info.location async for info in self.memory.iter_objects()]

    async def insert(self, schema: str, table: str, number: int, raw: str) -> None:
        """Let the file of a row be whatever the database takes, past every session."""
        value = "CAST(:raw AS JSONB)" if self.engine.dialect.name == "postgresql" else ":raw"
        statement = f"INSERT INTO {schema}.{table} (id, file) VALUES ({number}, {value})"  # noqa: S608  # names of our own
        await self.sql(statement, raw=raw)

    async def sql(self, statement: str, **values: Any) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)


@pytest.fixture
async def tenants(database: Database, tmp_path: Path) -> AsyncIterator[Tenants]:
    """Two schemas with the tables of both bases; on SQLite two databases that each connection attaches."""
    # On MariaDB the role of the tests is shown only databases whose names begin like its own.
    prefix = f"{database.url.database}_" if database.name == "mariadb" else ""
    names = [f"{prefix}tenant_{letter}_{uuid.uuid4().hex[:8]}" for letter in "ab"]
    engine = database.engine()
    if database.is_sqlite:
        from sqlalchemy import event

        @event.listens_for(engine.sync_engine, "connect")
        def _(connection: Any, _: Any) -> None:
            for name in names:
                connection.execute(f"ATTACH DATABASE '{tmp_path}/{name}.db' AS {name}")

    try:
        for name in names:
            async with engine.begin() as connection:
                if not database.is_sqlite:
                    await connection.execute(text(f"CREATE SCHEMA {name}"))
                for base, key in ((Base, None), (Placeholder, "tenant")):
                    translated = await connection.execution_options(schema_translate_map={key: name})
                    await translated.run_sync(base.metadata.create_all)
        yield Tenants(engine, names)
    finally:
        if not database.is_sqlite:
            async with engine.begin() as connection:
                for name in names:
                    await connection.execute(text(f"DROP SCHEMA {name} {'CASCADE' if database.is_postgres else ''}"))
        await engine.dispose()


@pytest.mark.case("RA-07")
async def test_a_collector_that_looks_at_one_tenant_keeps_the_files_of_all(tenants: Tenants) -> None:
    one, other = tenants.names
    live = [await tenants.add(Letter, one, 1), await tenants.add(Letter, other, 1), await tenants.add(Letter, other, 2)]
    orphan = await tenants.orphan()
    report = await tenants.collect(Base, one)
    assert (report.referenced, report.orphaned, report.deleted, report.dangling) == (3, 1, 1, [])
    assert await tenants.locations() == sorted(live)
    assert orphan.location not in live


@pytest.mark.case("RA-07", "RE-15")
async def test_a_schema_that_is_only_translated(tenants: Tenants) -> None:
    """The sessions of the collector translate nothing, and the table of the model is in no schema of its name."""
    live = [await tenants.add(Stamp, name, 1, key="tenant") for name in tenants.names]
    await tenants.orphan()
    report = await tenants.collect(Placeholder, None)
    assert (report.referenced, report.deleted) == (2, 1)
    assert await tenants.locations() == sorted(live)


@pytest.mark.case("RA-07")
async def test_a_schema_that_is_there_and_translated_to_another(tenants: Tenants) -> None:
    """The collector names each table as the database does: the map of its sessions would lead to one tenant twice."""
    one, other = tenants.names

    class Swapped(DeclarativeBase):
        pass

    class _Letter(Swapped):
        __tablename__ = "tenant_letter"
        __table_args__ = {"schema": one}
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    live = [await tenants.add(Letter, one, 1), await tenants.add(Letter, other, 1), await tenants.add(Letter, other, 2)]
    await tenants.orphan()
    report = await tenants.collect(Swapped, other, key=one)
    assert (report.referenced, report.deleted) == (3, 1)
    assert await tenants.locations() == sorted(live)


@pytest.mark.case("RE-15")
async def test_a_table_that_is_nowhere(tenants: Tenants) -> None:
    class Nowhere(DeclarativeBase):
        pass

    class Ghost(Nowhere):
        __tablename__ = "tenant_ghost"
        __table_args__ = {"schema": "tenant"}
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    await tenants.orphan()
    with pytest.raises(CollectionRefusedError, match=r"the table tenant\.tenant_ghost of a model is in no schema"):
        await tenants.collect(Nowhere, None)
    assert len(await tenants.locations()) == 1


@pytest.mark.case("RE-15")
async def test_a_column_that_is_nowhere(tenants: Tenants) -> None:
    """The program is newer than its database, as between a deployment and its migration."""

    class Newer(DeclarativeBase):
        pass

    class _Letter(Newer):
        __tablename__ = "tenant_letter"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")
        scan: Mapped[Attachment | None] = attachment("docs")

    await tenants.orphan()
    with pytest.raises(CollectionRefusedError, match=r"the table tenant_letter has no column scan .* run the migrations"):
        await tenants.collect(Newer, tenants.names[0])
    assert len(await tenants.locations()) == 1


@pytest.mark.case("RA-07")
async def test_a_schema_of_another_tenant_that_cannot_be_read_as_references(tenants: Tenants) -> None:
    """It holds references, and one value that is none: the same as in the schema that the sessions look at."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    live = await tenants.add(Letter, other, 1)
    await tenants.insert(other, "tenant_letter", 2, "[]")
    with pytest.raises(CollectionRefusedError, match=rf"{other}\.tenant_letter\.file of the row 2"):
        await tenants.collect(Base, one)
    assert live in await tenants.locations()


async def test_a_table_of_the_same_name_that_is_something_else(tenants: Tenants) -> None:
    """Another application has one in its schema, without a reference in it."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    await tenants.insert(other, "tenant_letter", 1, "[1]")
    await tenants.insert(other, "tenant_letter", 2, '{"location": "here"}')
    await tenants.orphan()
    assert (await tenants.collect(Base, one)).deleted == 1


async def test_a_table_of_the_same_name_with_references_to_another_store(tenants: Tenants) -> None:
    """Another installation of the same application, such as one for tests."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    orphan = await tenants.orphan()
    await tenants.insert(other, "tenant_letter", 1, json.dumps(orphan.with_identity("another store").to_dict()))
    assert (await tenants.collect(Base, one)).deleted == 1


@pytest.mark.case("RA-07")
async def test_a_table_of_the_same_name_whose_references_are_of_an_earlier_version(tenants: Tenants) -> None:
    """They do not say of which store they are: they protect, and what else the table holds may be another installation's."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    live, gone = await tenants.orphan(), await tenants.orphan()
    await tenants.memory.delete(gone.location)
    for number, ref in enumerate((live, gone), 1):
        await tenants.insert(other, "tenant_letter", number, json.dumps(ref.with_identity(None).to_dict()))
    unknown = {**live.with_identity(None).to_dict(), "backend": "unknown", "location": "a/b/c/d"}
    await tenants.insert(other, "tenant_letter", 3, json.dumps(unknown))
    await tenants.insert(other, "tenant_letter", 4, "[]")
    await tenants.orphan()
    report = await tenants.collect(Base, one)
    assert (report.referenced, report.deleted, report.dangling) == (2, 1, [])
    assert live.location in await tenants.locations()


@pytest.mark.case("RA-07")
async def test_the_journal_of_another_tenant(tenants: Tenants) -> None:
    """What it is about to store, or keeps for a while, is referred to by no row."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    await tenants.add(Letter, other, 1)
    kept, orphan = await tenants.orphan(), await tenants.orphan()
    journal = journal_tables(Base.metadata).intent
    async with tenants.engine.begin() as connection:
        translated = await connection.execution_options(schema_translate_map={None: other})
        due = datetime.now(UTC) + timedelta(hours=1)
        new = {"id": uuid.uuid4(), "kind": "delete", "backend": "files", "location": kept.location, "due": due}
        await translated.execute(journal.insert().values(new))
    report = await tenants.collect(Base, one)
    assert (report.referenced_on_recheck, report.deleted) == (1, 1)
    assert kept.location in await tenants.locations()
    assert orphan.location not in await tenants.locations()


@pytest.mark.case("RA-07")
async def test_more_columns_than_one_statement_takes(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read in several statements of one snapshot."""
    monkeypatch.setattr(gc_database, "_COLUMNS_IN_A_STATEMENT", 1)
    live = [await tenants.add(Letter, name, number) for name in tenants.names for number in range(1, 4)]
    gone = await tenants.add(Letter, tenants.names[0], 9)
    await tenants.memory.delete(gone)
    await tenants.orphan()
    report = await tenants.collect(Base, tenants.names[1])
    assert (report.referenced, report.deleted) == (6, 1)
    assert [found.location for found in report.dangling] == [gone]
    assert await tenants.locations() == sorted(live)


@pytest.mark.case("RA-07")
async def test_a_reference_that_moves_between_two_of_several_statements(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from where is still to be looked to where was looked already; in one snapshot it is in one of both places."""
    if tenants.engine.dialect.name == "sqlite":
        return  # nobody can write there while somebody reads
    one, other = tenants.names
    for name in tenants.names:
        await tenants.add(Letter, name, 1)
    moving = await tenants.orphan()
    raw = json.dumps(moving.to_dict())
    find_references, looks = gc_database.find_references, 0

    async def slow_find_references(*given: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 1:  # of the two right before the deletion
            await tenants.insert(other, "tenant_letter", 2, raw)
        held = await find_references(*given, **options)
        if looks == 1:
            await tenants.insert(one, "tenant_letter", 2, raw)
            await tenants.sql(f"DELETE FROM {other}.tenant_letter WHERE id = 2")  # noqa: S608  # a name of our own
        return held

    monkeypatch.setattr(gc_database, "_COLUMNS_IN_A_STATEMENT", 1)
    monkeypatch.setattr(gc_database, "find_references", slow_find_references)
    report = await tenants.collect(Base, one)
    assert looks == 2
    assert (report.referenced_on_recheck, report.deleted) == (1, 0)
    assert moving.location in await tenants.locations()


@pytest.mark.case("RA-07")
async def test_a_table_of_which_no_model_knows(tenants: Tenants, caplog: pytest.LogCaptureFixture) -> None:
    """Its module was not imported; or it is a copy, or it was renamed by a migration that this program does not know of yet."""
    one = tenants.names[0]
    await tenants.add(Letter, one, 1)
    live = await tenants.add(Stamp, one, 1, key="tenant")
    await tenants.insert(one, "tenant_stamp", 2, "[]")  # which nobody has said to be a reference
    await tenants.orphan()
    with caplog.at_level(logging.WARNING, "granite_storage"):
        report = await tenants.collect(Base, one)
    assert (report.referenced, report.deleted) == (2, 1)
    assert live in await tenants.locations()
    assert [record.getMessage() for record in caplog.records] == [
        f"{one}.tenant_stamp.file contains references and belongs to no model of a bound base; their objects are kept"
    ]


@pytest.mark.case("RA-07")
async def test_a_schema_that_the_role_may_not_read(postgres_only: Database) -> None:
    """It shows that there is a table of the same name, and not what it refers to."""
    role = f"collector_{uuid.uuid4().hex[:8]}"
    engine = postgres_only.engine()
    tenants = Tenants(engine, [f"tenant_{letter}_{uuid.uuid4().hex[:8]}" for letter in "ab"])
    one, other = tenants.names
    try:
        for name in tenants.names:
            await tenants.sql(f"CREATE SCHEMA {name}")
            async with engine.begin() as connection:
                translated = await connection.execution_options(schema_translate_map={None: name})
                await translated.run_sync(Base.metadata.create_all)
        live = [await tenants.add(Letter, name, 1) for name in tenants.names]
        for statement in (
            f"CREATE ROLE {role}",
            f"GRANT USAGE ON SCHEMA {one} TO {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA {one} TO {role}",
        ):
            await tenants.sql(statement)
        reader = postgres_only.engine(connect_args={"server_settings": {"role": role}})
        try:
            tenants.engine = reader
            with pytest.raises(CollectionRefusedError, match=rf"may not read {other}\.tenant_letter"):
                await tenants.collect(Base, one)
        finally:
            tenants.engine = engine
            await reader.dispose()
        assert await tenants.locations() == sorted(live)
    finally:
        for name in tenants.names:
            await tenants.sql(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        await tenants.sql(f"DROP ROLE IF EXISTS {role}")
        await engine.dispose()


@pytest.mark.case("RA-07")
@pytest.mark.parametrize("table", ["tenant_letter_old", "old_letters"])
async def test_a_copy_in_a_schema_without_a_table_of_a_model(tenants: Tenants, table: str) -> None:
    """A tenant's table was renamed, or rows were put away elsewhere."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    location = await tenants.add(Letter, one, 2)
    await tenants.sql(f"DROP TABLE {other}.tenant_letter")
    await tenants.sql(f"DROP TABLE {other}.tenant_stamp")
    await tenants.sql(f"CREATE TABLE {other}.{table} AS SELECT * FROM {one}.tenant_letter WHERE id = 2")  # noqa: S608
    await tenants.sql(f"DELETE FROM {one}.tenant_letter WHERE id = 2")  # noqa: S608
    orphan = await tenants.orphan()
    report = await tenants.collect(Base, one)
    assert location in await tenants.locations()
    assert orphan.location not in await tenants.locations()
    assert (report.mentions, report.deleted) == ({f"{other}.{table}.file": 1}, 1)


@pytest.mark.case("RA-07")
async def test_a_table_of_the_same_name_that_nests_references(tenants: Tenants) -> None:
    """It is another application's, or of an earlier version: no value of it is a reference as it is."""
    one, other = tenants.names
    await tenants.add(Letter, one, 1)
    live = await tenants.orphan()
    await tenants.insert(other, "tenant_letter", 1, json.dumps({"files": [live.to_dict()]}))
    report = await tenants.collect(Base, one)
    assert (report.mentions, report.deleted) == ({f"{other}.tenant_letter.file": 1}, 0)
