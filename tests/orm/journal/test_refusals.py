"""What is refused at start-up because the promise could not be kept with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import MetaData, inspect, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, StaticPool

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, OrmEnvironment, file
from tests.orm.journal.scans import ScriptedScanner


def journal_of(env: OrmEnvironment) -> StorageJournal:
    assert env.journal is not None
    return env.journal


def manager(**policy: Any) -> StorageManager:
    return StorageManager(backends={"store": MemoryStorageBackend()}, policies={"docs": StoragePolicy("docs", "store", **policy)})


@contextlib.asynccontextmanager
async def changed(env: OrmEnvironment, change: str, back: str) -> AsyncIterator[None]:
    """Change the database, and change it back."""
    await env.sql(change)
    try:
        yield
    finally:
        async with env.engine.begin() as connection:
            if connection.dialect.name == "sqlite":
                # Only a query makes a connection notice that another one has changed the schema; ALTER TABLE does not.
                await connection.execute(text("SELECT count(*) FROM sqlite_master"))
            await connection.execute(text(back))


async def require_refused(env: OrmEnvironment, why: str) -> None:
    """The start-up check, a pass, a worker and an upload are refused, and nothing is uploaded."""
    journal = StorageJournal(env.engine)
    binding = bind_storage(Base, env.manager, journal=journal)
    try:
        with pytest.raises(ConfigurationError, match=why):
            await journal.check()
        with pytest.raises(ConfigurationError, match=why):
            await journal.recover()
        with pytest.raises(ConfigurationError, match=why):
            async with journal.worker():
                pass
        with pytest.raises(ConfigurationError, match=why):
            await env.add(Doc(id=1, file=file("a")))
    finally:
        binding.unbind()
        await journal.aclose()
    assert await env.objects() == set()


@pytest.mark.case("DBF-27")
class TestTables:
    async def test_a_missing_one(self, env: OrmEnvironment) -> None:
        async with changed(
            env,
            "ALTER TABLE granite_storage_reclaim RENAME TO moved_away",
            "ALTER TABLE moved_away RENAME TO granite_storage_reclaim",
        ):
            await require_refused(env, "granite_storage_reclaim is missing")

    async def test_one_without_a_column(self, env: OrmEnvironment) -> None:
        async with changed(
            env,
            "ALTER TABLE granite_storage_intent RENAME COLUMN upload_id TO other_id",
            "ALTER TABLE granite_storage_intent RENAME COLUMN other_id TO upload_id",
        ):
            await require_refused(env, "granite_storage_intent is missing or is of another version")

    async def test_another_version(self, env: OrmEnvironment) -> None:
        await journal_of(env).check()
        async with changed(
            env,
            "UPDATE granite_storage_meta SET value = '99' WHERE name = 'schema_version'",
            "UPDATE granite_storage_meta SET value = '2' WHERE name = 'schema_version'",
        ):
            await require_refused(env, "version 99")

    async def test_the_version_before(self, env: OrmEnvironment) -> None:
        """It lacks the table of jobs; the message names it, and every way to create it."""
        await journal_of(env).check()
        async with (
            changed(
                env,
                "UPDATE granite_storage_meta SET value = '1' WHERE name = 'schema_version'",
                "UPDATE granite_storage_meta SET value = '2' WHERE name = 'schema_version'",
            ),
            changed(
                env,
                "ALTER TABLE granite_storage_job RENAME TO moved_away",
                "ALTER TABLE moved_away RENAME TO granite_storage_job",
            ),
        ):
            await require_refused(env, "version 1, without granite_storage_job.*source.*autogenerate.*upgrade_journal_tables")

    async def test_processes_of_the_version_before_go_on_until_something_may_be_held(self, env: OrmEnvironment) -> None:
        """They refuse tables of a later version, so these are not recorded as such before jobs can be in them."""
        await journal_of(env).check()
        question = "SELECT value FROM granite_storage_meta WHERE name = 'schema_version'"
        scanner = ScriptedScanner()
        async with changed(
            env,
            "UPDATE granite_storage_meta SET value = '1' WHERE name = 'schema_version'",
            "UPDATE granite_storage_meta SET value = '2' WHERE name = 'schema_version'",
        ):
            for on_unavailable, version in (("refuse", "1"), ("hold", "2")):
                scanner.on_unavailable = on_unavailable  # type: ignore[assignment]
                policies = {"docs": StoragePolicy("docs", "store", scanner=scanner)}
                journal = StorageJournal(env.engine)
                binding = bind_storage(Base, StorageManager(backends=env.manager.backends, policies=policies), journal=journal)
                try:
                    await journal.check()
                finally:
                    binding.unbind()
                    await journal.aclose()
                async with env.engine.connect() as connection:
                    assert (await connection.execute(text(question))).scalar_one() == version

    async def test_no_privilege(self, env: OrmEnvironment) -> None:
        if not env.database.is_postgres:
            pytest.skip("one kind of privilege is enough")
        await env.sql("CREATE ROLE reader LOGIN")
        await env.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        engine = create_async_engine(env.database.url.set(username="reader"), poolclass=NullPool)
        journal = StorageJournal(engine)
        binding = bind_storage(Base, env.manager, journal=journal)
        try:
            with pytest.raises(ConfigurationError, match=r"GRANT .* ON granite_storage_intent TO reader"):
                await journal.check()
        finally:
            binding.unbind()
            await engine.dispose()
            await env.sql("DROP OWNED BY reader")
            await env.sql("DROP ROLE reader")


@pytest.mark.case("DBF-28")
@pytest.mark.parametrize("table", ["granite_storage_decision", "doc"])
@pytest.mark.parametrize("engine", ["MyISAM", "Aria"])
async def test_an_engine_without_transactions(env: OrmEnvironment, table: str, engine: str) -> None:
    if env.database.is_postgres:
        pytest.skip("storage engines are MariaDB's")
    async with changed(env, f"ALTER TABLE {table} ENGINE={engine}", f"ALTER TABLE {table} ENGINE=InnoDB"):
        await require_refused(env, rf"{table} \({engine}\)")


@pytest.mark.case("DBF-21")
async def test_isolation_that_shows_too_little(env: OrmEnvironment) -> None:
    if env.database.is_postgres:
        pytest.skip("PostgreSQL has no READ UNCOMMITTED")
    async with changed(
        env,
        "SET GLOBAL TRANSACTION ISOLATION LEVEL READ UNCOMMITTED",
        "SET GLOBAL TRANSACTION ISOLATION LEVEL REPEATABLE READ",
    ):
        await require_refused(env, "READ UNCOMMITTED")


@pytest.mark.case("DBF-21")
async def test_the_journals_own_connections_read_what_is_committed(env: OrmEnvironment) -> None:
    question = "SHOW transaction_isolation" if env.database.is_postgres else "SELECT @@tx_isolation"
    engine = env.database.engine(isolation_level="SERIALIZABLE")
    try:
        async with StorageJournal(engine)._pool.reading() as connection:
            level = (await connection.execute(text(question))).scalar_one()
        assert level.upper().replace("-", " ") == "READ COMMITTED"
    finally:
        await engine.dispose()


async def test_a_pool_of_one_shared_connection(database: Database) -> None:
    engine = create_async_engine(database.url, poolclass=StaticPool)
    with pytest.raises(ConfigurationError, match="StaticPool cannot have a journal"):
        StorageJournal(engine)
    await engine.dispose()


async def test_a_pool_that_keeps_nothing_will_do(env: OrmEnvironment) -> None:
    engine = create_async_engine(env.database.url, poolclass=NullPool)
    binding = bind_storage(Base, env.manager, journal=StorageJournal(engine))
    try:
        async with env.sessions(bind=engine) as session:
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
    finally:
        binding.unbind()
        await engine.dispose()
    await env.check(file_1="a")


def test_an_engine_that_is_none(env: OrmEnvironment) -> None:
    with pytest.raises(ConfigurationError, match="AsyncEngine or an Engine, not async_sessionmaker"):
        StorageJournal(env.sessions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [{"lease": timedelta(0)}, {"lease": 900}, {"pool_size": 0}, {"pool_size": True}, {"max_attempts": 0}],
    ids=str,
)
async def test_arguments_that_cannot_work(env: OrmEnvironment, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        StorageJournal(env.engine, **arguments)


class TestBinding:
    def test_tables_that_are_not_declared(self, env: OrmEnvironment) -> None:
        class Other(DeclarativeBase):
            pass

        with pytest.raises(ConfigurationError, match="call journal_tables"):
            bind_storage(Other, manager(), journal=StorageJournal(env.engine))

    def test_another_manager(self, env: OrmEnvironment) -> None:
        with pytest.raises(ConfigurationError, match="one manager"):
            bind_storage(Base, manager(), journal=env.journal)

    def test_something_else(self, env: OrmEnvironment) -> None:
        with pytest.raises(ConfigurationError, match="StorageJournal"):
            bind_storage(Base, env.manager, journal="journal")  # type: ignore[arg-type]

    def test_before_it_is_bound_it_says_so(self, env: OrmEnvironment) -> None:
        with pytest.raises(ConfigurationError, match="pass it to bind_storage"):
            _ = StorageJournal(env.engine).tables

    def test_a_retention_without_a_journal(self) -> None:
        class Other(DeclarativeBase):
            pass

        class Letter(Other):
            __tablename__ = "letter"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("docs")

        with pytest.raises(ConfigurationError, match="retention, which needs a journal"):
            bind_storage(Other, manager(retention=timedelta(days=1)))

    @pytest.mark.parametrize("retention", [timedelta(seconds=-1), 3600, None])
    def test_a_retention_that_is_none(self, retention: Any) -> None:
        with pytest.raises(ConfigurationError, match="retention"):
            StoragePolicy("docs", "store", retention=retention)


class TestDeclaring:
    def test_twice_is_once(self) -> None:
        metadata = MetaData()
        assert journal_tables(metadata) is journal_tables(metadata)

    def test_another_schema_is_refused(self) -> None:
        metadata = MetaData()
        journal_tables(metadata, schema="files")
        with pytest.raises(ConfigurationError, match="'files'"):
            journal_tables(metadata)

    async def test_in_a_schema_of_its_own(self, database: Database) -> None:
        if not database.is_postgres:
            pytest.skip("a schema is a database there")

        class Other(DeclarativeBase):
            pass

        class Letter(Other):
            __tablename__ = "letter_of_another_schema"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("docs")

        tables = journal_tables(Other.metadata, schema="files")
        engine = database.engine()
        try:
            async with engine.begin() as connection:
                await connection.execute(text("CREATE SCHEMA files"))
                await connection.run_sync(Other.metadata.create_all)
                names = await connection.run_sync(lambda sync: inspect(sync).get_table_names("files"))
            assert set(names) == {table.name for table in tables.all}
            journal = StorageJournal(engine)
            binding = bind_storage(Other, manager(), journal=journal)
            await journal.check()
            assert (await journal.recover()).claimed == 0
            binding.unbind()
        finally:
            async with engine.begin() as connection:
                await connection.run_sync(Other.metadata.drop_all)
                await connection.execute(text("DROP SCHEMA files CASCADE"))
            await engine.dispose()
