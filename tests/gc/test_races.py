"""The ways in which a simpler collector loses data, each played so that it would."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Table, event, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker, create_async_engine

from granite_storage import Attachment, StoragePolicy, StoredObjectRef, bind_storage
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import database as gc_database
from granite_storage.gc.database import DatabaseReferences
from granite_storage.orm import references
from granite_storage.orm.journal.tables import clock
from tests.gc.environment import AgedBackend, Base, Crate, GcEnvironment, file, gc_environment
from tests.orm.databases import Database, crash_postgres, mariadb_admin, postgres, postgres_database

Step = Callable[[], Awaitable[None]]


@contextlib.contextmanager
def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: Step) -> Iterator[None]:
    """Let something happen once, right before a step of the collector."""
    original, todo = getattr(owner, name), [step]

    async def stepped(*args: Any, **kwargs: Any) -> Any:
        if todo:
            await todo.pop()()
        return await original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stepped)
        yield
    assert not todo, "the step was never reached"


async def raw_insert(env: GcEnvironment, number: int, ref: StoredObjectRef) -> None:
    """Let a row refer to an object, as an application does with a plain column."""
    await env.add(Crate(id=number, scan=ref))


@pytest.mark.case("GCX-01")
async def test_an_upload_whose_transaction_is_open(journaled_env: GcEnvironment) -> None:
    """No row refers to it and its intent is locked, however old it is."""
    env = journaled_env
    await env.add(Crate(id=1, file=file("a")))
    async with env.sessions.begin() as session:
        session.add(Crate(id=2, file=file("b")))
        await session.flush()
        env.age(24 * 365)
        assert (await env.collect()).referenced_on_recheck == 1
    assert (await env.collect()).referenced == 2


async def test_an_upload_that_waits_for_its_row(journaled_env: GcEnvironment) -> None:
    env = journaled_env
    await env.add(Crate(id=1, file=file("a")))
    stored = await file("b").store(Crate.file)
    env.age()
    assert (await env.collect()).referenced_on_recheck == 1
    await env.add(Crate(id=2, file=stored))


async def test_a_journal_that_only_another_program_uses_counts(journaled_env: GcEnvironment) -> None:
    env = journaled_env
    await env.add(Crate(id=1, file=file("a")))
    await file("b").store(Crate.file)
    env.age()
    env.binding.journal = None
    assert (await env.collect()).referenced_on_recheck == 1


@pytest.mark.parametrize("table", ["intent", "reclaim"])
async def test_what_the_journal_knows_of_is_the_workers(journaled_env: GcEnvironment, table: str) -> None:
    env = journaled_env
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    assert env.journal is not None
    env.store.fail("delete", times=1000)
    env.store.fail("delete_many", times=1000)
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Crate, 2))
    if table == "reclaim":
        await env.journal.recover()
    tables = env.journal.tables
    async with env.engine.connect() as connection:
        assert len(list(await connection.execute(select(tables.reclaim if table == "reclaim" else tables.intent)))) <= 1
    env.age()
    report = await env.collect()
    assert (report.referenced_on_recheck, report.orphaned) == (1, 0)


async def test_a_journal_of_which_a_role_may_read_some_columns(mariadb_only: Database) -> None:
    """The catalogue of MariaDB shows no others to that role."""
    async with gc_environment(mariadb_only, journaled=True) as env:
        await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
        for name in ("delete", "delete_many"):
            env.store.fail(name, times=1000)
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Crate, 2))
        env.age()
        journal = dict.fromkeys(("granite_storage_intent", "granite_storage_reclaim"), "(backend, location)")
        async with limited_role(mariadb_only, {"gc_crate": "", "gc_drum": "", **journal}) as engine:
            binding = bind_storage(Base, env.manager, session_factory=async_sessionmaker(engine))
            report = await env.collector(binding=binding).collect(storage_key="docs")
            binding.unbind()
        assert (report.referenced_on_recheck, report.orphaned) == (1, 0)


@contextlib.asynccontextmanager
async def limited_role(database: Database, columns: Mapping[str, str]) -> AsyncIterator[AsyncEngine]:
    """Give an engine of a role that may read some columns of some tables, and nothing else."""
    role, admin = f"collector_{uuid.uuid4().hex[:12]}", create_async_engine(mariadb_admin())
    engine = replace(database, url=database.url.set(username=role, password="x"), loop=None).engine()
    grants = [f"GRANT SELECT {some} ON {database.url.database}.{table} TO {role}" for table, some in columns.items()]
    try:
        async with admin.begin() as connection:
            for statement in (f"CREATE USER {role} IDENTIFIED BY 'x'", *grants):
                await connection.execute(text(statement))
        yield engine
    finally:
        await engine.dispose()
        async with admin.begin() as connection:
            await connection.execute(text(f"DROP USER IF EXISTS {role}"))
        await admin.dispose()


async def test_a_row_that_comes_while_the_storage_is_listed(env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """References are read after the listing: those read before it would miss this one."""
    await env.add(Crate(id=1, file=file("a")))
    orphan = await env.orphan()
    env.age()
    listing = env.store.iter_objects

    async def listed(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for info in listing(*args, **kwargs):
            yield info
        await raw_insert(env, 2, orphan)

    monkeypatch.setattr(env.store, "iter_objects", listed)
    report = await env.collect()
    assert (report.referenced, report.referenced_on_recheck, report.orphaned) == (2, 0, 0)


async def test_a_row_that_comes_after_the_nomination(env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The join only nominates; each batch is re-checked before it is deleted."""
    await env.add(Crate(id=1, file=file("a")))
    orphan = await env.orphan()
    env.age()
    with before(monkeypatch, DatabaseReferences, "find_references", lambda: raw_insert(env, 2, orphan)):
        report = await env.collect()
    assert (report.referenced_on_recheck, report.deleted) == (1, 0)
    assert orphan.location in await env.locations()


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 2), (0.7, 1)])
async def test_a_row_that_comes_after_all_were_counted(
    env: GcEnvironment, monkeypatch: pytest.MonkeyPatch, limit: float, expected: int
) -> None:
    """After the count, by which the limit is judged, all are re-checked again; where it cannot be exceeded, none is counted."""
    await env.add(Crate(id=1, file=file("a")))
    orphans = [await env.orphan() for _ in range(2)]
    env.age()
    looks = 0
    original = DatabaseReferences.find_references

    async def looked(self: Any, locations: Any) -> set[str]:
        nonlocal looks
        await raw_insert(env, 2 + looks, orphans[looks])
        looks += 1
        return await original(self, locations)

    monkeypatch.setattr(DatabaseReferences, "find_references", looked)
    report = await env.collector(max_deleted_share=limit).collect(storage_key="docs", dry_run=False)
    assert (looks, report.referenced_on_recheck, report.deleted) == (expected, expected, 2 - expected)
    assert {orphan.location for orphan in orphans[:expected]} <= await env.locations()


async def test_the_look_is_one_statement(journaled_env: GcEnvironment) -> None:
    """Over the journal and every column of every table, also those of subclasses."""
    env = journaled_env
    await env.add(Crate(id=1, file=file("a")))
    await env.orphan()
    env.age()
    statements: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    event.listen(env.engine.sync_engine, "before_cursor_execute", note)
    assert (await env.collect()).deleted == 1
    [look] = [statement for statement in statements if "granite_storage_reclaim.location" in statement]
    for name in ("granite_storage_intent.location", "gc_crate.file", "gc_crate.scan", "gc_crate.label", "gc_drum.seal"):
        assert name in look


async def _in_two_statements(connection: AsyncConnection, undo: Step, journals: Any, columns: Any, locations: Any) -> set[Any]:
    """Look as a simpler collector would: into the journal first, and then at the rows."""
    [tables] = journals
    found = await connection.execute(select(tables.intent.c.backend, tables.intent.c.location))
    in_journal = {(row.backend, row.location) for row in found}
    await connection.rollback()
    await undo()
    return in_journal | await references.find_references(connection, columns, locations)


@pytest.mark.parametrize("simpler", [False, True])
async def test_an_undo_while_the_collector_looks(postgres_only: Database, monkeypatch: pytest.MonkeyPatch, simpler: bool) -> None:
    """An object comes back and goes to the journal again while two statements look where it is not; one sees it somewhere."""
    policies = {"docs": StoragePolicy("docs", "store", key_prefix="docs", retention=timedelta(days=7))}
    async with gc_environment(postgres_only, journaled=True, policies=policies) as env:
        await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
        async with env.sessions() as session:
            crate = await session.get_one(Crate, 1)
            assert crate.file is not None
            ref = crate.file.ref
        env.age()

        async def displace() -> None:
            async with env.sessions.begin() as session:
                (await session.get_one(Crate, 1)).file = None

        async def undo() -> None:
            async with env.sessions.begin() as session:
                (await session.get_one(Crate, 1)).file = Attachment.restore(ref)

        async def look(connection: Any, columns: Any, locations: Any, *, journals: Any, extra: bool) -> set[Any]:
            await undo()
            if simpler:
                return await _in_two_statements(connection, displace, journals, columns, locations)
            return await references.find_references(connection, columns, locations, journals=journals, extra=extra)

        await displace()
        with monkeypatch.context() as patch:
            patch.setattr("granite_storage.gc.database.find_references", look)
            report = await env.collect(dry_run=True)
        assert (report.referenced_on_recheck, report.orphaned) == ((0, 1) if simpler else (1, 0))


@pytest.mark.case("DBF-21")
@pytest.mark.parametrize("level", ["READ UNCOMMITTED", "AUTOCOMMIT"])
async def test_levels_at_which_a_row_can_be_in_neither_place(database: Database, level: str) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite's levels are of its shared cache")
    if (database.name, level) in (("asyncpg", "READ UNCOMMITTED"), ("mariadb", "AUTOCOMMIT")):
        pytest.skip("the driver does not know it, or it does no harm")
    async with gc_environment(database) as env:
        await env.add(Crate(id=1, file=file("a")))
        await env.orphan()
        env.age()
        env.sessions.configure(bind=env.engine.execution_options(isolation_level=level))
        for dry_run in (True, False):
            with pytest.raises(CollectionRefusedError, match=level):
                await env.collect(dry_run=dry_run)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_stronger_levels(database: Database, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot lasts for one look only, so what is committed between two is seen."""
    if database.is_sqlite:
        pytest.skip("SQLite has one level")
    async with gc_environment(database) as env:
        await env.add(Crate(id=1, file=file("a")))
        orphan, other = await env.orphan(), await env.orphan()
        env.age()
        env.sessions.configure(bind=env.engine.execution_options(isolation_level=level))
        with before(monkeypatch, DatabaseReferences, "find_references", lambda: raw_insert(env, 2, orphan)):
            assert (await env.collect()).deleted == 1
        locations = await env.locations()
        assert orphan.location in locations
        assert other.location not in locations


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_a_table_that_is_truncated_and_filled_again(
    database: Database, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRUNCATE follows no snapshot: one from before its end shows neither the old rows nor the new ones."""
    if database.url.get_backend_name() != "postgresql":
        pytest.skip("elsewhere TRUNCATE waits for no transaction, or is none")
    async with gc_environment(database) as env, env.engine.connect() as connection:
        await env.add(Crate(id=1, file=file("a")))
        orphan = await env.orphan()
        env.age()
        env.sessions.configure(bind=env.engine.execution_options(isolation_level=level))
        committing: list[asyncio.Task[None]] = []

        async def fill_again() -> None:
            await raw_insert(env, 2, orphan)
            for statement in (
                "CREATE TEMPORARY TABLE filled ON COMMIT DROP AS SELECT * FROM gc_crate",
                "TRUNCATE gc_crate CASCADE",
                "INSERT INTO gc_crate SELECT * FROM filled",
            ):
                await connection.execute(text(statement))
            committing.append(asyncio.create_task(commit()))

        async def commit() -> None:
            await asyncio.sleep(0.3)
            await connection.commit()

        with before(monkeypatch, DatabaseReferences, "find_references", fill_again):
            assert (await env.collect()).deleted == 0
        await asyncio.gather(*committing)
        assert orphan.location in await env.locations()


@pytest.mark.case("GCX-11", "DBF-19")
@pytest.mark.parametrize("with_barrier", [True, False])
def test_a_delete_that_a_crash_of_the_database_takes_back(with_barrier: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row deleted by raw SQL is back after the crash, and its object must be there; without the barrier it is not."""
    backend = AgedBackend()

    async def nothing(connection: Any) -> None:
        await connection.commit()

    if not with_barrier:
        monkeypatch.setattr(gc_database, "commit_durably", nothing)
    settings = ("synchronous_commit = off", "wal_writer_delay = '10s'", "wal_writer_flush_after = 1000", "autovacuum = off")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="granite-")))
        database = stack.enter_context(postgres_database(stack.enter_context(postgres(folder, *settings)), "asyncpg"))
        location = asyncio.run(_lose(database, backend))
        crash_postgres(folder)
        came_back = asyncio.run(_rows(database)) == 2
    has_object = asyncio.run(backend.exists(location))
    assert came_back is not with_barrier
    assert has_object is False


async def _lose(database: Database, backend: AgedBackend) -> str:
    """Delete a row by raw SQL, acknowledged but not durable, and let the collector act on it."""
    async with gc_environment(database, backend=backend) as env:
        await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
        async with env.engine.begin() as connection:
            await connection.execute(text("SET LOCAL synchronous_commit = on"))
            await connection.execute(text("UPDATE gc_crate SET deleted = false"))
        location = await env.location_of(2)
        env.age()
        await env.sql("DELETE FROM gc_crate WHERE id = 2")
        assert (await env.collect()).deleted == 1
        return location


async def _rows(database: Database) -> int:
    engine = database.engine()
    try:
        for _ in range(50):
            with contextlib.suppress(DBAPIError, OSError):
                async with engine.connect() as connection:
                    return (await connection.execute(text("SELECT count(*) FROM gc_crate"))).scalar_one()
            await asyncio.sleep(0.1)
    finally:
        await engine.dispose()
    raise AssertionError("the database did not come back")


@pytest.mark.case("GCX-12")
async def test_two_collectors_at_once(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    for _ in range(30):
        await env.orphan()
    env.age()
    one, two = await asyncio.gather(env.collect(), env.collect())
    assert (one.failed, two.failed) == (0, 0)
    assert max(one.orphaned, two.orphaned) <= 30
    assert len(await env.locations()) == 1


async def _wait_for_heartbeat(env: GcEnvironment, meta: Table) -> None:
    async with asyncio.timeout(30):
        while True:
            async with env.engine.connect() as connection:
                if (await connection.execute(select(meta.c.value).where(meta.c.name == "heartbeat"))).first():
                    return
            await asyncio.sleep(0.02)


@pytest.mark.case("DBF-23")
async def test_a_database_restored_from_a_backup(journaled_env: GcEnvironment) -> None:
    """The heartbeat of its backup is old, also for a collector that comes after the first worker has beaten again."""
    env = journaled_env
    await env.add(Crate(id=1, file=file("a")))
    await env.orphan()
    env.age()
    assert env.journal is not None
    meta = env.journal.tables.meta
    async with env.journal.worker(interval=timedelta(seconds=30)):
        await _wait_for_heartbeat(env, meta)
    assert (await env.collect(dry_run=True)).orphaned == 1
    async with env.engine.begin() as connection:
        await connection.execute(meta.update().where(meta.c.name == "heartbeat").values(changed=clock(-7200.0)))
    with pytest.raises(CollectionRefusedError, match="allow_restored_database"):
        await env.collect()
    async with env.journal.worker(interval=timedelta(seconds=30)):
        await asyncio.sleep(0.3)
    with pytest.raises(CollectionRefusedError, match=r"no worker of the journal was running for 2 hours"):
        await env.collect()
    assert len(await env.locations()) == 2
    assert (await env.collect(allow_restored_database=True)).deleted == 1
    assert (await env.collect()).complete
