"""The journal on SQLite: the lock that decides, the sidecar with the intents of uploads, and what may happen to the two files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, StaticPool

from granite_storage import (
    ConfigurationError,
    StorageGarbageCollector,
    StorageJournal,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.cli.doctor import CheckResult, _check_journal
from granite_storage.exceptions import BackendUnavailableError, CollectionRefusedError, StaleAttachmentError, StorageError
from granite_storage.orm import Attachment
from granite_storage.orm.journal import sqlite
from granite_storage.orm.journal.sqlite import SidecarPool
from tests.orm.conftest import new_database
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, OrmEnvironment, file, orm_environment


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """SQLite alone."""
    async with new_database(request, "sqlite-journal") as found:
        yield found


@pytest.fixture
async def env(database: Database) -> AsyncIterator[OrmEnvironment]:
    async with orm_environment(database, journaled=True) as env:
        yield env


def journal_of(env: OrmEnvironment) -> StorageJournal:
    assert env.journal is not None
    return env.journal


def sidecar_of(env: OrmEnvironment) -> SidecarPool:
    sidecar = journal_of(env).sidecar
    assert sidecar is not None
    return sidecar


def sidecar_file(env: OrmEnvironment) -> Path:
    return Path(f"{env.database.url.database}-granite_storage")


async def expire(env: OrmEnvironment) -> None:
    """Let the leases of all uploads be over."""
    async with env.uploads() as (connection, tables):
        for table in (tables.intent, tables.reclaim):
            await connection.execute(table.update().values(due=sqlite.clock(-1.0)))


async def meta_of(env: OrmEnvironment) -> dict[str, str]:
    async with env.engine.connect() as connection:
        return {row.name: row.value for row in await connection.execute(text("SELECT name, value FROM granite_storage_meta"))}


class TestUploads:
    async def test_the_intent_outlives_the_commit_until_the_lease_is_over(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        assert (await journal_of(env).recover()).leased == 1
        await expire(env)
        report = await journal_of(env).recover()
        assert (report.kept, report.deleted, report.leased) == (1, 0, 0)
        await env.check(file_1="a")

    async def test_while_the_session_has_the_lock(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            session.add(Doc(id=2, file=file("b")))
            async with session.begin_nested() as savepoint:
                session.add(Doc(id=3, file=file("c")))
                await session.flush()
                await savepoint.rollback()
        await env.check(file_1="a", file_2="b")

    async def test_one_that_a_worker_has_reclaimed(self, env: OrmEnvironment) -> None:
        stored = await file("a").store(Doc.file)
        await expire(env)
        assert (await journal_of(env).recover()).deleted == 1
        with pytest.raises(StaleAttachmentError, match="reclaimed"):
            await env.add(Doc(id=1, file=stored))
        await expire(env)
        await env.check()

    async def test_rolled_back_while_another_connection_writes(self, env: OrmEnvironment) -> None:
        """What the rollback could not delete goes soon after it, or with the worker's next pass, and not after the lease."""
        with contextlib.closing(sqlite3.connect(str(env.database.url.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(OperationalError, match="locked"):
                async with env.sessions.begin() as session:
                    await session.execute(text("PRAGMA busy_timeout = 50"))
                    session.add(Doc(id=1, file=file("a")))
            assert len(await env.objects()) == 1
            other.execute("ROLLBACK")
        await journal_of(env).recover()
        for _ in range(100):
            if not await env.objects():
                break
            await asyncio.sleep(0.05)  # if the journal is at it, a worker leaves it to that
        await env.check()

    async def test_no_worker_comes_between_the_look_and_the_commit(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stored = await file("a").store(Doc.file)
        await expire(env)
        monkeypatch.setattr(sqlite, "_PATIENCE", 0.3)
        original = SidecarPool.look

        async def look(self: SidecarPool, ids: Iterable[UUID]) -> tuple[str, set[UUID]]:
            seen = await original(self, ids)
            with contextlib.suppress(BackendUnavailableError):
                await journal_of(env).recover()
            return seen

        monkeypatch.setattr(SidecarPool, "look", look)
        await env.add(Doc(id=1, file=stored))
        await env.check(file_1="a")

    async def test_what_a_delete_intent_keeps_is_not_deleted_as_an_upload(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(StorageJournal, "retention_of", lambda *_: timedelta(days=1))
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            document = await session.get_one(Doc, 1)
            assert document.file is not None
            previous = document.file.ref
            document.file = None
        await expire(env)
        assert (await journal_of(env).recover()).kept == 1
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = Attachment.restore(previous)
        await env.check(file_1="a")

    async def test_an_undo_in_a_process_that_has_done_nothing_else(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(StorageJournal, "retention_of", lambda *_: timedelta(days=1))
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            document = await session.get_one(Doc, 1)
            assert document.file is not None
            previous = document.file.ref
            document.file = None
        async with StorageJournal(env.engine) as journal:
            binding = bind_storage(Base, env.manager, journal=journal)
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = Attachment.restore(previous)
            binding.unbind()
        await env.check(file_1="a")

    async def test_what_a_worker_has_seen_is_durable_before_it_forgets(self, env: OrmEnvironment) -> None:
        """A COMMIT without a write brings nothing to the disk."""
        await env.add(Doc(id=1, file=file("a")))
        assert "barrier" not in await meta_of(env)
        await expire(env)
        await journal_of(env).recover()
        assert "barrier" in await meta_of(env)
        async with journal_of(env)._pool.writing() as connection, sidecar_of(env).writing() as beside:
            pragma = text("PRAGMA synchronous")
            found = [(await one.execute(pragma)).scalar_one() for one in (connection, beside)]
        assert found == [3, 2]  # EXTRA, FULL

    async def test_a_driver_that_commits_each_statement(self, env: OrmEnvironment) -> None:
        engine = create_async_engine(env.database.url, connect_args={"isolation_level": None})
        session = env.session(engine)
        session.add(Doc(id=1, file=file("a")))
        with pytest.raises(ConfigurationError, match="commits each statement by itself"):
            await session.flush()
        await session.close()
        await engine.dispose()
        await expire(env)
        await env.check(file_1="a")

    async def test_a_session_on_another_file(self, env: OrmEnvironment, tmp_path: Path) -> None:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/other.db")
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        session = env.session(engine)
        session.add(Doc(id=1, file=file("a")))
        with pytest.raises(ConfigurationError, match=r"other\.db.*give each database a journal"):
            await session.flush()
        await session.close()
        await engine.dispose()
        await expire(env)
        await env.check()


class TestSidecar:
    async def test_lost_under_a_running_process(self, env: OrmEnvironment) -> None:
        """What it knew of cannot be committed any more, and is the collector's."""
        stored = await file("a").store(Doc.file)
        env.database.remove_sidecar()
        with pytest.raises(StaleAttachmentError):
            await env.add(Doc(id=1, file=stored))
        await env.add(Doc(id=2, file=file("b")))
        await expire(env)
        await journal_of(env).recover()
        assert set(await env.contents()) == {("doc", 2, "file")}
        await collect(env)
        await env.check(file_2="b")

    async def test_one_that_the_database_does_not_name(self, env: OrmEnvironment) -> None:
        stored = await file("a").store(Doc.file)
        await env.sql("UPDATE granite_storage_meta SET value = 'another' WHERE name = 'sidecar'")
        with pytest.raises(StaleAttachmentError):
            await env.add(Doc(id=1, file=stored))
        await env.add(Doc(id=2, file=file("b")))  # which lets the database name it
        await expire(env)
        await env.check(file_2="b")

    async def test_restored_alone(self, env: OrmEnvironment, tmp_path: Path) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with (
            contextlib.closing(sqlite3.connect(sidecar_file(env))) as source,
            contextlib.closing(sqlite3.connect(tmp_path / "b")) as copy,
        ):
            source.backup(copy)
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("b")
        await expire(env)
        await journal_of(env).recover()
        await journal_of(env).aclose()
        env.database.remove_sidecar()
        os.replace(tmp_path / "b", sidecar_file(env))
        await expire(env)
        await env.check(file_1="b")

    async def test_a_database_that_was_lost(self, env: OrmEnvironment) -> None:
        """Nothing is deleted that a restore would need, until somebody says that this is the right database."""
        await env.add(Doc(id=1, file=file("a")))
        await journal_of(env).recover()
        before = await env.objects()
        await env.sql("DELETE FROM doc")
        await env.sql("DELETE FROM granite_storage_meta WHERE name = 'heartbeat'")
        await expire(env)
        with pytest.raises(ConfigurationError, match="lost or replaced"):
            await journal_of(env).recover()
        with pytest.raises(ConfigurationError, match="dropped and created again"):
            await journal_of(env).check()
        [told] = [check async for check in _check_journal(env.binding)]
        assert (told.result, told.what) == (CheckResult.BAD, "journal")
        assert told.message.endswith("granite-storage gc --allow-restored-database")
        with pytest.raises(CollectionRefusedError, match="lost or replaced"):
            await collect(env)
        assert await env.objects() == before
        await journal_of(env).allow_restored_database()
        await journal_of(env).check()
        await expire(env)
        await env.check()

    async def test_uploads_into_a_database_that_may_be_another(self, env: OrmEnvironment) -> None:
        await journal_of(env).recover()
        await env.sql("DELETE FROM granite_storage_meta WHERE name = 'heartbeat'")
        async with StorageJournal(env.engine) as journal:
            binding = bind_storage(Base, env.manager, journal=journal)
            await env.add(Doc(id=1, file=file("a")))
            binding.unbind()
        await journal_of(env).allow_restored_database()
        await env.check(file_1="a")

    @pytest.mark.parametrize("how", ["overwritten", "without its name"])
    async def test_a_damaged_one(self, env: OrmEnvironment, how: str) -> None:
        """The error says where the file is, and what is lost without it."""
        await env.add(Doc(id=1, file=file("a")))
        await journal_of(env).aclose()
        path = sidecar_file(env)
        if how == "overwritten":
            env.database.remove_sidecar()
            path.write_bytes(b"garbage!" * 1000)
        else:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("DELETE FROM granite_storage_meta")
        journal = journal_of(env)
        said = re.compile(re.escape(f"sidecar {path} is damaged") + ".*remove it.*garbage collector")
        for work in (journal.check, journal.recover, partial(env.add, Doc(id=2, file=file("b"))), partial(collect, env)):
            with pytest.raises(ConfigurationError, match=said):
                await work()
        env.database.remove_sidecar()
        await env.add(Doc(id=2, file=file("b")))
        await expire(env)
        await env.check(file_1="a", file_2="b")

    @pytest.mark.parametrize(
        ("pragma", "error", "said"),
        [
            ("max_page_count = 1", BackendUnavailableError, "cannot be written .*full.*tried again"),
            ("query_only = ON", ConfigurationError, "cannot be opened, created or written: .*readonly"),
        ],
    )
    async def test_one_that_cannot_be_written(
        self, env: OrmEnvironment, pragma: str, error: type[StorageError], said: str
    ) -> None:
        """SQLite says so as it does of a full disk, or of a file that belongs to another user."""

        def limit(connection: Any, *_: Any) -> None:
            connection.execute(f"PRAGMA {pragma}")

        engine = sidecar_of(env)._engine.sync_engine
        event.listen(engine, "checkout", limit)
        try:
            with pytest.raises(error, match=f"{re.escape(str(sidecar_file(env)))} {said}"):
                await env.add(*[Doc(id=number, file=Attachment(b"x", filename="n" * 200)) for number in range(1, 300)])
        finally:
            event.remove(engine, "checkout", limit)
            await journal_of(env).aclose()
        await env.add(Doc(id=1, file=file("a")))
        await expire(env)
        await env.check(file_1="a")

    async def test_at_a_path_of_its_own(self, env: OrmEnvironment, tmp_path: Path) -> None:
        journal = StorageJournal(env.engine, sidecar=tmp_path / "uploads")
        binding = bind_storage(Base, env.manager, journal=journal)
        await journal.check()
        assert (tmp_path / "uploads").exists()
        binding.unbind()
        await journal.aclose()


async def collect(env: OrmEnvironment) -> None:
    collector = StorageGarbageCollector(env.manager, binding=env.binding, grace_period=timedelta(0), max_deleted_share=1.0)
    await collector.collect(storage_key="docs", dry_run=False, allow_no_references=True)


class TestCollector:
    async def test_an_upload_that_no_row_has_yet(self, env: OrmEnvironment) -> None:
        stored = await file("a").store(Doc.file)
        await collect(env)
        await env.add(Doc(id=1, file=stored))
        await env.check(file_1="a")

    async def test_another_sidecar_than_the_database_names(self, env: OrmEnvironment) -> None:
        await file("a").store(Doc.file)
        before = await env.objects()
        await env.sql("UPDATE granite_storage_meta SET value = 'another' WHERE name = 'sidecar'")
        with pytest.raises(CollectionRefusedError, match="another sidecar"):
            await collect(env)
        assert await env.objects() == before


class TestRefusals:
    @pytest.mark.parametrize("url", ["", "/:memory:", "/file:x?mode=memory&uri=true"])
    def test_a_database_in_memory(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="memory"):
            StorageJournal(create_async_engine(f"sqlite+aiosqlite://{url}", poolclass=NullPool))

    def test_one_connection_for_all(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="StaticPool"):
            StorageJournal(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db", poolclass=StaticPool))

    def test_a_shared_cache(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="share a cache"):
            StorageJournal(create_async_engine(f"sqlite+aiosqlite:///file:{tmp_path}/a.db?cache=shared&uri=true"))

    @pytest.mark.parametrize(
        ("pragma", "why"),
        [
            ("synchronous = OFF", "synchronous=OFF"),
            ("journal_mode = OFF", "journal_mode=OFF"),
            ("journal_mode = MEMORY", "journal_mode=MEMORY"),
            ("locking_mode = EXCLUSIVE", "locking_mode=EXCLUSIVE"),
        ],
    )
    async def test_settings(self, tmp_path: Path, env: OrmEnvironment, pragma: str, why: str) -> None:
        def set_pragma(connection: Any, _: Any) -> None:
            connection.cursor().execute(f"PRAGMA {pragma}")

        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db")
        event.listen(engine.sync_engine, "connect", set_pragma)
        await require_refused(env, StorageJournal(engine), why)
        await engine.dispose()

    @pytest.mark.parametrize(
        ("query", "why"),
        [
            ("nolock=1", "does not keep a second connection from writing"),
            ("vfs=unix-none", "does not keep a second connection from writing"),
            ("mode=ro", "cannot be written to"),
            ("immutable=1", "cannot be written to"),
        ],
    )
    async def test_without_a_lock_or_without_writes(self, tmp_path: Path, env: OrmEnvironment, query: str, why: str) -> None:
        path = tmp_path / "a.db"
        engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()
        engine = create_async_engine(f"sqlite+aiosqlite:///file:{path}?{query}&uri=true")
        await require_refused(env, StorageJournal(engine), why)
        await engine.dispose()

    async def test_a_lock_that_is_taken(self, env: OrmEnvironment) -> None:
        """By the caller's own session perhaps, so it is not waited for."""
        await journal_of(env).check()
        with contextlib.closing(sqlite3.connect(str(env.database.url.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            begun = time.monotonic()
            await journal_of(env).check()
            assert time.monotonic() - begun < 5

    async def test_a_network_file_system(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kind of this file's own stands for one of them: a test cannot mount another."""
        with monkeypatch.context() as patch:
            patch.setattr(sqlite, "_NETWORK_KINDS", _Everything())
            await require_refused(env, StorageJournal(env.engine), "network file system")
            journal = StorageJournal(env.engine, one_machine=True)
            binding = bind_storage(Base, env.manager, journal=journal)
            await journal.check()
            binding.unbind()
            await journal.aclose()

    async def test_a_sidecar_that_cannot_be_there(self, env: OrmEnvironment, tmp_path: Path) -> None:
        await require_refused(
            env, StorageJournal(env.engine, sidecar=tmp_path / "nowhere" / "x"), "cannot be opened, created or written"
        )

    async def test_rows_in_an_attached_database(self, env: OrmEnvironment) -> None:
        class Other(DeclarativeBase):
            pass

        class Letter(Other):
            __tablename__ = "letter"
            __table_args__ = {"schema": "attached"}
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("docs")

        journal_tables(Other.metadata)
        journal = StorageJournal(env.engine)
        binding = bind_storage(Other, env.manager, journal=journal)
        with pytest.raises(ConfigurationError, match="attached databases"):
            await journal.check()
        binding.unbind()
        await journal.aclose()

    async def test_for_sqlite_alone(self) -> None:
        engine = create_async_engine("postgresql+asyncpg://x/y")
        with pytest.raises(ConfigurationError, match="SQLite only"):
            StorageJournal(engine, sidecar="x")


class _Everything(frozenset[str]):
    def __contains__(self, item: object) -> bool:
        return True


async def require_refused(env: OrmEnvironment, journal: StorageJournal, why: str) -> None:
    binding = bind_storage(Base, env.manager, journal=journal)
    try:
        with pytest.raises(ConfigurationError, match=why):
            await journal.check()
        with pytest.raises(ConfigurationError, match=why):
            await env.add(Doc(id=1, file=file("a")))
    finally:
        binding.unbind()
        await journal.aclose()
    assert await env.objects() == set()
