"""The library's own questions to the database on another event loop than the application's: its pool is left alone."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

import granite_storage
from granite_storage import (
    ConfigurationError,
    ObjectNotFoundError,
    StaleAttachmentError,
    StorageGarbageCollector,
    StorageJournal,
    bind_storage,
)
from granite_storage.orm import Attachment
from tests.orm.databases import Database
from tests.orm.derivations import Upper, declared
from tests.orm.environment import Base, Doc, OrmEnvironment, file, orm_environment

T = TypeVar("T")


async def replaced(env: OrmEnvironment, number: int = 1) -> Attachment:
    """Return what a row held before it was given another file."""
    await env.add(Doc(id=number, file=file("a")))
    async with env.sessions() as session:
        old = (await session.get_one(Doc, number)).file
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, number)).file = file("b")
    assert old is not None
    return old


async def require_sound(env: OrmEnvironment) -> None:
    """Use several connections of the application's pool at a time, more than once."""

    async def look() -> None:
        async with env.sessions() as session:
            assert list(await session.scalars(select(Doc.id)))

    for _ in range(2):
        await asyncio.gather(*(look() for _ in range(4)))


def on_another_loop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on a loop of this thread."""
    return asyncio.run(work())


def read_with_open(attachment: Attachment) -> bytes:
    with attachment.sync.open() as stream:
        return stream.read()


@pytest.mark.parametrize("read", [lambda attachment: attachment.sync.read(), read_with_open])
async def test_stale_file_in_a_thread(env: OrmEnvironment, read: Callable[[Attachment], bytes]) -> None:
    old = await replaced(env)

    async def refused() -> None:
        with pytest.raises(StaleAttachmentError):
            await asyncio.to_thread(read, old)

    await asyncio.gather(*(refused() for _ in range(4)), require_sound(env))
    await require_sound(env)
    await env.check(file_1="b")


async def test_missing_file_in_a_thread(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions() as session:
        attachment = (await session.get_one(Doc, 1)).file
    assert attachment is not None
    await env.manager.delete(attachment.ref)
    with pytest.raises(ObjectNotFoundError):
        await asyncio.to_thread(attachment.sync.read)
    await require_sound(env)
    await env.sql("DELETE FROM doc")


async def test_variant_in_a_thread(env: OrmEnvironment) -> None:
    recipe = Upper(when="request")
    with declared({"card": recipe}):
        await env.add(Doc(id=1, file=file("x")))
        async with env.sessions() as session:
            attachment = (await session.get_one(Doc, 1)).file
        assert attachment is not None
        card = await asyncio.to_thread(attachment.sync.variant, "card")
        assert await card.read() == recipe.result(b"x")
        await require_sound(env)


async def test_collector_in_a_thread(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    collector = StorageGarbageCollector(env.manager, binding=env.binding, grace_period=timedelta(0))
    report = await asyncio.to_thread(collector.sync.collect, storage_key="docs")
    assert (report.scanned, report.referenced) == (1, 1)
    await require_sound(env)


async def test_second_loop_of_the_application(env: OrmEnvironment) -> None:
    old = await replaced(env)

    async def read() -> None:
        with pytest.raises(StaleAttachmentError):
            await old.read()

    for _ in range(2):
        await asyncio.to_thread(on_another_loop, read)
    await require_sound(env)
    await env.check(file_1="b")


async def test_pool_is_used_on_its_own_loop(env: OrmEnvironment) -> None:
    """Where the loop is the application's, nothing is opened beside its pool."""
    old = await replaced(env)
    await require_sound(env)
    opened: list[Any] = []
    event.listen(env.engine.sync_engine, "connect", lambda *_: opened.append(threading.current_thread()))
    env.database.spoil()
    with pytest.raises(StaleAttachmentError):
        await old.read()
    assert not opened
    with pytest.raises(StaleAttachmentError):
        await asyncio.to_thread(old.sync.read)
    assert len(opened) == 1


async def test_first_checkout_tells_the_loop(env: OrmEnvironment) -> None:
    """Later ones, of each transaction of the application, call nothing of the library's for that."""
    await env.add(Doc(id=1, file=file("a")))
    called = [listener.__module__ for listener in env.engine.sync_engine.pool.dispatch.checkout]  # type: ignore[attr-defined]
    assert not [module for module in called if module.startswith("granite_storage")]
    await env.check(file_1="a")


async def test_role_set_by_a_listener(env: OrmEnvironment) -> None:
    """The application's listeners, such as one that sets a role in each transaction, hear of the library's own ones."""
    old = await replaced(env)
    begun: list[Any] = []
    event.listen(env.engine.sync_engine, "begin", lambda connection: begun.append(threading.current_thread()))
    env.database.spoil()
    with pytest.raises(StaleAttachmentError):
        await asyncio.to_thread(old.sync.read)
    assert [thread.name for thread in begun] == ["granite-storage-portal"]


@pytest.fixture
async def in_memory() -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """Sessions on a database in memory, whose one connection is everybody's."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield async_sessionmaker(engine, expire_on_commit=False)
    await engine.dispose()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_shared_connection_is_refused(env: OrmEnvironment, in_memory: async_sessionmaker[AsyncSession]) -> None:
    binding = bind_storage(Base, env.manager, session_factory=in_memory)
    with declared({"card": Upper(when="request")}):
        async with in_memory.begin() as session:
            session.add(Doc(id=1, file=file("a")))
        async with in_memory() as session:
            attachment = (await session.get_one(Doc, 1)).file
        assert attachment is not None
        with pytest.raises(ConfigurationError, match="StaticPool"):
            await asyncio.to_thread(attachment.sync.variant, "card")
        async with in_memory.begin() as session:
            (await session.get_one(Doc, 1)).file = None
        with pytest.raises(ObjectNotFoundError):  # whether a row refers to it is unknown there
            await asyncio.to_thread(attachment.sync.read)
        with pytest.raises(StaleAttachmentError):
            await attachment.read()
    binding.unbind()


@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
async def test_bound_connection_is_refused(env: OrmEnvironment) -> None:
    old = await replaced(env)
    async with env.engine.connect() as connection:
        binding = bind_storage(Base, env.manager, session_factory=async_sessionmaker(connection))
        with pytest.raises(ObjectNotFoundError):
            await asyncio.to_thread(old.sync.read)
        with pytest.raises(StaleAttachmentError):
            await old.read()
        binding.unbind()


@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
class TestJournal:
    async def test_second_loop_of_the_application(self, database: Database) -> None:
        async with orm_environment(database, journaled=True) as env:
            assert env.journal is not None
            await env.add(Doc(id=1, file=file("a")))
            for _ in range(2):
                await asyncio.to_thread(on_another_loop, env.journal.recover)
            await asyncio.gather(*(env.add(Doc(id=number, file=file("b"))) for number in range(2, 6)))
            await env.check()

    async def test_closed_on_another_loop(self, database: Database) -> None:
        async with orm_environment(database, journaled=True) as env:
            assert env.journal is not None
            await env.add(Doc(id=1, file=file("a")))
            pool = env.journal._pool._engines._first.sync_engine.pool
            assert pool.checkedin()  # type: ignore[attr-defined]
            closed: list[threading.Thread] = []
            event.listen(pool, "close", lambda *_: closed.append(threading.current_thread()))
            await asyncio.to_thread(env.journal.sync.close)
            assert not pool.checkedin()  # type: ignore[attr-defined]
            assert closed
            assert set(closed) == {threading.current_thread()}
            await env.add(Doc(id=2, file=file("b")))
            await env.check()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the first loop leaves a connection behind
    def test_loops_one_after_the_other(self, database: Database, caplog: pytest.LogCaptureFixture) -> None:
        """A program that calls `asyncio.run` twice, and disposes of nothing in between."""

        async def use(journal: StorageJournal) -> None:
            async with journal._pool.reading() as connection:
                await connection.execute(select(1))

        engine = create_async_engine(database.url)
        journal = StorageJournal(engine)
        asyncio.run(use(journal))
        asyncio.run(use(journal))
        journal.sync.close()
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_library_opens_its_own_sessions_only() -> None:
    """No module calls the application's session factory as it is, or passes it on."""
    root = Path(granite_storage.__file__).parent
    calls = re.compile(r"binding\.session_factory(\(|, \w)")
    assert not [path.name for path in root.rglob("*.py") if calls.search(path.read_text())]
