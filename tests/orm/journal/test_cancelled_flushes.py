"""A transaction with a journal is cancelled after some of its files were stored: once it has ended they are gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from granite_storage import StorageJournal, StorageManager, StoragePolicy, attachment, bind_storage, journal_tables
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment
from tests.core.interrupts import signalled
from tests.core.support import eventually
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.journal.test_recovery import eventually_true, rows

Work = Callable[[OrmEnvironment, Any], Awaitable[None]]


async def slow() -> AsyncIterator[bytes]:
    """Some bytes, and then nothing for a long time."""
    yield b"some"
    await asyncio.sleep(60)


async def one_flush(_: OrmEnvironment, session: Any) -> None:
    session.add(Doc(id=1, file=file("a"), other=Attachment(slow())))
    await session.flush()


async def second_flush(_: OrmEnvironment, session: Any) -> None:
    session.add(Doc(id=1, file=file("a")))
    await session.flush()
    session.add(Doc(id=2, file=file("b"), other=Attachment(slow())))
    await session.flush()


async def inside_a_savepoint(_: OrmEnvironment, session: Any) -> None:
    session.add(Doc(id=1, file=file("a")))
    await session.flush()
    async with session.begin_nested():
        session.add(Doc(id=2, file=file("b"), other=Attachment(slow())))
        await session.flush()


async def after_the_flush(_: OrmEnvironment, session: Any) -> None:
    session.add(Doc(id=1, file=file("a"), other=file("b")))
    await session.flush()
    await asyncio.sleep(60)


async def begin(env: OrmEnvironment, work: Work, count: int) -> asyncio.Task[None]:
    """Begin a transaction, and return its task when a number of files are stored."""

    async def transaction() -> None:
        async with env.sessions.begin() as session:
            await work(env, session)

    task = asyncio.create_task(transaction())

    async def are_stored() -> bool:
        return len(await env.objects()) == count

    await eventually_true(are_stored)
    await asyncio.sleep(0.1)
    return task


WORKS = [(one_flush, 1), (second_flush, 2), (inside_a_savepoint, 2), (after_the_flush, 2)]


@pytest.mark.case("CAN-04")
@pytest.mark.parametrize(("work", "count"), WORKS)
@pytest.mark.parametrize("times", [1, 3])
async def test_nothing_remains(env: OrmEnvironment, work: Work, count: int, times: int) -> None:
    task = await begin(env, work, count)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.001)
    with pytest.raises(asyncio.CancelledError):
        await task
    # On SQLite the rollback may end after the transaction's block.
    await eventually_true(env.is_settled_but_for_late_arrivals)
    assert await env.objects() == set()
    assert await rows(env, "intent") == []
    await env.recover()


@pytest.mark.parametrize("work", [one_flush, after_the_flush])
async def test_at_once(env: OrmEnvironment, work: Work) -> None:
    """Where nothing holds a lock any more, the files are gone before the caller goes on."""
    if env.database.is_sqlite and work is after_the_flush:
        pytest.skip("aiosqlite ends the transaction after it has answered")
    task = await begin(env, work, dict(WORKS)[work])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await env.objects() == set()
    await env.recover()


async def test_while_a_statement_runs(env: OrmEnvironment) -> None:
    """The connection is dropped, and the server rolls back some time later."""
    if env.database.is_sqlite:
        pytest.skip("it waits in a thread that nothing can interrupt")
    sleep = "SELECT SLEEP(1.5)" if env.database.name == "mariadb" else "SELECT pg_sleep(1.5)"

    async def work(_: OrmEnvironment, session: Any) -> None:
        session.add(Doc(id=1, file=file("a"), other=file("b")))
        await session.flush()
        await session.execute(text(sleep))

    task = await begin(env, work, 2)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually_true(env.is_settled_but_for_late_arrivals)
    assert await env.objects() == set()
    await env.recover()


@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
async def test_commit_in_doubt_deletes_nothing(env: OrmEnvironment) -> None:
    """Only a row that is there, or an intent, says what to do; a cancellation says nothing."""
    env.database.spoil()
    stored = [file("a"), file("b")]

    async def work() -> None:
        async with env.sessions() as session:
            session.add(Doc(id=1, file=stored[0], other=stored[1]))
            await session.commit()

    for turn in range(60):
        task = asyncio.create_task(work())
        for _ in range(turn):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await eventually(lambda: len(asyncio.all_tasks()) == 1)
        references = await env.references()
        held = {ref.location for ref in references.values()}
        assert held <= await env.objects()
        await env.sql("DELETE FROM doc")
        await env.recover()
        for location in await env.objects():
            await env.backend.delete(location)
        stored = [file("a"), file("b")]


@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
async def test_engine_is_disposed_meanwhile(database: Database) -> None:
    """What still waits for a server ends with the journal's connections, and is left to the next worker."""
    async with orm_environment(database, journaled=True) as env:
        database.spoil()
        assert env.journal is not None
        stored = await file("a").store(Doc.file)
        assert stored._state.intent is not None
        async with env.engine.begin() as connection:
            intent = env.journal.tables.intent
            await connection.execute(intent.delete().where(intent.c.id == stored._state.intent.id))
            await env.journal.settle([stored._state.intent.id])
            assert env.journal._pool._tasks
            await env.journal.aclose()
            assert not env.journal._pool._tasks
            await connection.rollback()
        assert await stored.exists()
        await env.expire()
        await env.recover()
        assert await env.objects() == set()


class Base(DeclarativeBase):
    pass


class Album(Base):
    __tablename__ = "interrupted_album"
    id: Mapped[int] = mapped_column(primary_key=True)
    cover: Mapped[Attachment | None] = attachment("docs")


journal_tables(Base.metadata)


@pytest.mark.parametrize("when", ["during the upload", "after the flush"])
def test_synchronous_session_is_interrupted(when: str, tmp_path: Path) -> None:
    backend = MemoryStorageBackend()
    manager = StorageManager(backends={"store": backend}, policies={"docs": StoragePolicy("docs", "store")})
    engine = create_engine(f"sqlite:///{tmp_path}/test.db")
    Base.metadata.create_all(engine)
    journal = StorageJournal(engine)
    binding = bind_storage(Base, manager, journal=journal)
    begun = threading.Event()

    def chunks() -> Iterator[bytes]:
        for _ in range(2000):
            begun.set()
            yield b"x"
            time.sleep(0.01)

    with (
        signalled(begun, KeyboardInterrupt, delay=0.2),
        pytest.raises(KeyboardInterrupt),
        Session(engine) as session,
        session.begin(),
    ):
        session.add(Album(cover=Attachment(b"first")))
        if when == "during the upload":
            session.add(Album(cover=Attachment(chunks())))
        session.flush()
        begun.set()
        time.sleep(10)
    found = [info.location for info in manager.sync.list(storage_key="docs")]
    binding.unbind()
    journal.sync.close()
    manager.sync.close()
    engine.dispose()
    assert found == []
