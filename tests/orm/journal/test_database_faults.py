"""What databases do to a transaction: they time it out, keep it prepared, forget its end in a crash, or are restored."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from granite_storage.orm import transactions
from granite_storage.orm._interfaces import StoredObject
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.references import References
from tests.orm.databases import Database, crash_postgres, postgres, postgres_database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.journal.test_recovery import eventually_true, expire, journal_of, retention, rows


@pytest.fixture(params=["statement", "idle"])
async def timed_out(request: pytest.FixtureRequest, env: OrmEnvironment) -> Any:
    """Let the database end a transaction that waits or works for too long; return what makes it do so."""
    if env.database.is_postgres:
        if request.param == "statement":
            return ["SET LOCAL statement_timeout = '50ms'"], "SELECT pg_sleep(60)"
        return ["SET LOCAL idle_in_transaction_session_timeout = '50ms'"], None
    if request.param == "statement":
        return ["SET STATEMENT max_statement_time = 0 FOR SELECT 1", "SET SESSION max_statement_time = 0.05"], "SELECT SLEEP(60)"
    return ["SET SESSION idle_transaction_timeout = 1"], None


@pytest.mark.case("DBF-29")
async def test_a_transaction_that_the_database_has_ended(env: OrmEnvironment, timed_out: tuple[list[str], str | None]) -> None:
    """The intents that it had consumed are there again, so nothing stays; and the same attachment can be tried again."""
    settings, slow = timed_out
    await env.add(Doc(id=1, file=file("a")))
    new = file("b")

    async def replace() -> None:
        async with env.sessions() as session:
            (await session.get_one(Doc, 1)).file = new
            await session.flush()
            assert [row.kind for row in await rows(env, "intent")] == ["upload"]  # as others still see it
            for setting in settings:
                await session.execute(text(setting))
            if slow is not None:
                await session.execute(text(slow))
            await eventually_true(lambda: is_gone(env))
            await session.commit()

    with pytest.raises(DBAPIError):
        await replace()
    await env.engine.dispose()
    await env.recover()
    await env.check(file_1="a")
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = new
    await env.recover()
    await env.check(file_1="b")


async def is_gone(env: OrmEnvironment) -> bool:
    """Tell whether no transaction locks the row any more."""
    async with env.engine.connect() as connection:
        free = select(Doc.__table__.c.id).with_for_update(skip_locked=True)
        return bool(list(await connection.execute(free)))


@pytest.mark.parametrize("database", ["psycopg", "mariadb"], indirect=True)  # asyncpg has no two-phase transactions in SQLAlchemy
@pytest.mark.parametrize("committed", [True, False])
async def test_a_prepared_transaction_is_left_for_later(env: OrmEnvironment, committed: bool) -> None:
    """Its program is gone and its outcome is unknown: its objects stay until it is known."""
    await env.add(Doc(id=1, file=file("a")))
    async with AsyncSession(env.engine, twophase=True) as session:
        (await session.get_one(Doc, 1)).file = file("b")
        session.add(Doc(id=2, file=file("c")))
        await session.flush()
        connection = await session.connection()
        prepared = await connection.run_sync(lambda it: it.get_transaction().xid)
        await session.run_sync(Session.prepare)
        await connection.invalidate()
        with pytest.raises(Exception):  # noqa: B017, PT011  # whatever a program that dies would have come to
            await session.commit()
    assert len(await env.objects()) == 3
    try:
        for _ in range(2):
            await expire_what_is_free(env)
            assert env.journal is not None
            assert (await env.journal.recover()).claimed == 0
        assert len(await env.objects()) == 3
    finally:
        end = "COMMIT" if committed else "ROLLBACK"
        async with env.engine.connect() as connection:
            connection = await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(
                text(f"{end} PREPARED '{prepared}'" if env.database.is_postgres else f"XA {end} '{prepared}'")
            )
    await env.recover()
    await env.check(**({"file_1": "b", "file_2": "c"} if committed else {"file_1": "a"}))


async def expire_what_is_free(env: OrmEnvironment) -> None:
    assert env.journal is not None
    intent = env.journal.tables.intent
    async with env.engine.begin() as connection:
        free = (await connection.execute(select(intent.c.id).with_for_update(skip_locked=True))).scalars().all()
        await connection.execute(intent.update().where(intent.c.id.in_(free)).values(due=text("'2000-01-01'")))


@pytest.mark.case("DBF-08")
@pytest.mark.filterwarnings("ignore")  # the pool says that a connection was dropped
@pytest.mark.parametrize("database", ["asyncpg", "psycopg"], indirect=True)
async def test_a_session_that_is_dropped_is_left_to_the_worker(env: OrmEnvironment) -> None:
    """No event tells of its end; its connection goes with it, and with that the lock that kept the worker away."""
    journal = journal_of(env)
    session = env.sessions()
    session.add(Doc(id=1, file=file("a")))
    await session.flush()
    await expire_what_is_free(env)
    assert (await journal.recover()).claimed == 0
    del session
    gc.collect()

    async def is_recovered() -> bool:
        await expire_what_is_free(env)
        await journal.recover()
        return await is_empty(env)

    await eventually_true(is_recovered)


@pytest.mark.case("DBF-14")
async def test_a_worker_in_its_transaction_is_in_nobodys_way(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a worker fences, other sessions store, replace and delete."""
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    await file("lost").store(Doc.file)
    await expire(env)
    original, reached, go = Recovery._drop, asyncio.Event(), asyncio.Event()

    async def drop(*args: Any) -> None:
        await original(*args)
        reached.set()
        await go.wait()

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "_drop", drop)
        assert env.journal is not None
        worker = asyncio.create_task(env.journal.recover())
        await reached.wait()
        async with asyncio.timeout(10):
            await asyncio.gather(*(env.add(Doc(id=number, file=file(str(number)))) for number in range(3, 9)))
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("c")
                await session.delete(await session.get_one(Doc, 2))
        go.set()
        await worker
    await env.recover()
    await env.check(file_1="c", **{f"file_{number}": str(number) for number in range(3, 9)})


@pytest.mark.case("DBF-23")
@pytest.mark.parametrize("kept", [True, False], ids=["retention", "no retention"])
async def test_a_restored_backup(env: OrmEnvironment, kept: bool) -> None:
    """Rows of a backup find the objects that were released since, where the retention is longer than that."""
    assert env.journal is not None
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    tables = ["doc", *(table.name for table in env.journal.tables.all)]
    for table in tables:
        await env.sql(f"CREATE TABLE backup_{table} AS SELECT * FROM {table}")  # noqa: S608
    try:
        with retention(timedelta(days=7) if kept else timedelta(0)):
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("c")
                await session.delete(await session.get_one(Doc, 2))
            await env.journal.recover()
        for table in tables:
            await env.sql(f"DELETE FROM {table}")  # noqa: S608
            await env.sql(f"INSERT INTO {table} SELECT * FROM backup_{table}")  # noqa: S608
        references = (await env.references()).values()
        await env.recover()
        assert [await env.manager.exists(ref) for ref in references] == [kept, kept]
    finally:
        for table in tables:
            await env.sql(f"DROP TABLE backup_{table}")
        await env.sql("DELETE FROM doc")
        for location in await env.objects():
            await env.backend.delete(location)


@pytest.fixture(scope="session")
def crashing(_temporary_folder: Path) -> Iterator[tuple[Path, Database]]:
    """A PostgreSQL that commits asynchronously, and takes its time to write down what it has committed."""
    folder = _temporary_folder / "crashing"
    folder.mkdir(mode=0o700)
    settings = "synchronous_commit = off", "wal_writer_delay = '10s'", "bgwriter_delay = '10s'"
    with postgres(folder, *settings) as url, postgres_database(url, "asyncpg") as database:
        yield folder, database


@pytest.mark.case("DBF-19")
@pytest.mark.parametrize("given_up", ["replaced", "deleted"])
async def test_a_crash_that_forgets_commits(crashing: tuple[Path, Database], given_up: str) -> None:
    """What a worker acts upon is written down before it acts: no commit is forgotten that an object was deleted for."""
    folder, database = crashing
    async with orm_environment(database, journaled=True) as env:
        assert env.journal is not None
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, title="kept"))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            if given_up == "replaced":
                doc.file = file("b")
            else:
                await session.delete(doc)
        assert (await env.journal.recover()).deleted == 1
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 2)).title = "forgotten"
        await env.engine.dispose()
        await env.journal._pool.aclose()
        await asyncio.to_thread(crash_postgres, folder)
        async with env.sessions() as session:
            assert (await session.get_one(Doc, 2)).title == "kept", "it was no crash: nothing was forgotten"
        await env.check(**({"file_1": "b"} if given_up == "replaced" else {}))
        await env.recover()
        await env.check(**({"file_1": "b"} if given_up == "replaced" else {}))


@pytest.mark.parametrize("at_once", [False, True], ids=["protocol", "variant"])
async def test_a_crash_that_forgets_what_was_acknowledged(
    crashing: tuple[Path, Database], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a transaction releases is not deleted as soon as its COMMIT is answered: the simpler variant loses a file."""
    folder, database = crashing
    async with orm_environment(database, journaled=True) as env:
        assert env.journal is not None
        await env.add(Doc(id=1, file=file("a")))
        async with env.journal._pool.durable() as connection:  # by which all until here is written down
            await connection.execute(text("UPDATE doc SET title = 'kept'"))
        if at_once:
            monkeypatch.setattr(transactions, "remove_now", delete_at_once)
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = None
        await env.engine.dispose()
        await env.journal._pool.aclose()
        await asyncio.to_thread(crash_postgres, folder)
        assert len(await env.references()) == 1, "it was no crash: nothing was forgotten"
        assert len(await env.objects()) == (0 if at_once else 1)


def delete_at_once(stored: Iterable[StoredObject], **_: Any) -> None:
    """Delete what a transaction has left to nobody, before its COMMIT is written down."""
    for item in stored:
        await_only(item.manager.delete(item.ref))


async def test_a_crash_that_forgets_a_commit_of_a_moment_ago(
    crashing: tuple[Path, Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQL takes an object out of its last row after the fence: the look that misses it there is a barrier as well."""
    folder, database = crashing
    async with orm_environment(database, journaled=True) as env:
        assert env.journal is not None
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        async with env.sessions.begin() as session:
            await session.execute(text("UPDATE doc SET file = (SELECT file FROM doc WHERE id = 1) WHERE id = 2"))
            (await session.get_one(Doc, 1)).file = None
        check = References.check

        async def check_later(*args: Any) -> Any:
            async with env.sessions.begin() as session:
                await session.execute(text("UPDATE doc SET file = NULL WHERE id = 2"))
            return await check(*args)

        monkeypatch.setattr(References, "check", check_later)
        assert (await env.journal.recover()).deleted == 1
        await env.engine.dispose()
        await env.journal._pool.aclose()
        await asyncio.to_thread(crash_postgres, folder)
        await env.check()


async def test_a_crash_does_not_forget_an_intent(crashing: tuple[Path, Database]) -> None:
    """What is about to be stored is written down before it is: after the crash somebody knows of the object."""
    folder, database = crashing
    async with orm_environment(database, journaled=True) as env:
        assert env.journal is not None
        await env.add(Doc(id=1, title="kept"))
        stored = await file("a").store(Doc.file)
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).title = "forgotten"
        await env.engine.dispose()
        await env.journal._pool.aclose()
        await asyncio.to_thread(crash_postgres, folder)
        async with env.sessions() as session:
            assert (await session.get_one(Doc, 1)).title == "kept", "it was no crash: nothing was forgotten"
        assert [row.location for row in await rows(env, "intent")] == [stored.location]
        await env.recover()
        await env.check()


async def test_a_worker_outlives_a_crash_of_its_database(
    crashing: tuple[Path, Database], caplog: pytest.LogCaptureFixture
) -> None:
    """Its connections are gone and the database is away for a while; it says so, and goes on when the database is back."""
    folder, database = crashing
    async with orm_environment(database, journaled=True) as env:
        assert env.journal is not None
        await env.sql("CHECKPOINT")  # the crash would bring back the rows of the test before
        await env.engine.dispose()
        async with env.journal.worker(interval=timedelta(milliseconds=20)):
            await asyncio.to_thread(crash_postgres, folder)
            await eventually_true(lambda: has_said(caplog, "will be retried"))
            await file("a").store(Doc.file)
            await expire(env)
            await eventually_true(lambda: is_empty(env))
        await env.recover()
        await env.check()


async def has_said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text


async def is_empty(env: OrmEnvironment) -> bool:
    return not await env.objects()
