"""A database that gives no more connections: what the journal waits for, how long, and how many it opens itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from granite_storage import ConfigurationError
from granite_storage.exceptions import BackendUnavailableError
from granite_storage.orm import StorageJournal, bind_storage
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, OrmEnvironment, file
from tests.orm.journal.test_recovery import rows

SERVER_CONNECTIONS = 3


@pytest.fixture
def database(asyncpg_database: Database) -> Database:
    """One database: a pooler is the same to all."""
    return asyncpg_database


class Pooler:
    """Passes on what clients and the server say, for so many clients at a time; all others wait without an answer."""

    def __init__(self, target: Path, most: int) -> None:
        self._target = target
        self._places = asyncio.Semaphore(most)
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            async with self._places:
                server, to_server = await asyncio.open_unix_connection(self._target)
                try:
                    pumps = [asyncio.ensure_future(pump(client, to_server)), asyncio.ensure_future(pump(server, to_client))]
                    self._tasks.update(pumps)
                    await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in pumps:
                        each.cancel()
                    self._tasks.difference_update(pumps)
                    to_server.close()
        to_client.close()


async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while chunk := await source.read(65536):
        target.write(chunk)
        await target.drain()


@contextlib.asynccontextmanager
async def pooled_engine(env: OrmEnvironment, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """Give an engine whose pool takes all connections that the pooler has."""
    url = env.database.url
    folder = Path(str(url.query["host"]))
    port = url.query.get("port", "5432")
    async with Pooler(folder / f".s.PGSQL.{port}", SERVER_CONNECTIONS).listening(tmp_path / ".s.PGSQL.5432"):
        pooled = url.set(query={"host": str(tmp_path), "port": "5432"})
        engine = create_async_engine(pooled, pool_size=SERVER_CONNECTIONS, max_overflow=0)
        try:
            yield engine
        finally:
            await engine.dispose()


@contextlib.asynccontextmanager
async def bound(env: OrmEnvironment, engine: AsyncEngine, **options: Any) -> AsyncIterator[StorageJournal]:
    """Bind the base to another journal meanwhile."""
    env.binding.unbind()
    journal = StorageJournal(engine, **options)
    binding = bind_storage(Base, env.manager, journal=journal)
    try:
        yield journal
    finally:
        binding.unbind()
        await journal.aclose()
        env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=env.journal)


async def read_then_upload(engine: AsyncEngine, everybody: asyncio.Barrier) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(select(Doc.id))
        await everybody.wait()
        session.add(Doc(file=file("a")))
        await session.commit()


async def upload_at_once(engine: AsyncEngine) -> list[BaseException | None]:
    everybody = asyncio.Barrier(SERVER_CONNECTIONS)
    work = (read_then_upload(engine, everybody) for _ in range(SERVER_CONNECTIONS))
    return await asyncio.gather(*work, return_exceptions=True)


@pytest.mark.case("RB-08")
async def test_no_wait_without_end(env: OrmEnvironment, tmp_path: Path) -> None:
    """All connections of a pooler are in transactions whose sessions wait for one more: all fail in time, and may try again."""
    async with pooled_engine(env, tmp_path) as engine, bound(env, engine, timeout=timedelta(seconds=1)):
        begun = time.monotonic()
        done = await upload_at_once(engine)
        assert time.monotonic() - begun < 20
        assert [type(error) for error in done] == [BackendUnavailableError] * SERVER_CONNECTIONS
        assert "pooler" in str(done[0])
        assert await env.objects() == set()
        await engine.dispose()
        await read_then_upload(engine, asyncio.Barrier(1))
    assert len(await env.references()) == 1


@pytest.mark.case("RB-08")
async def test_an_engine_of_its_own(env: OrmEnvironment, tmp_path: Path) -> None:
    own = env.database.engine(pool_size=1)
    async with pooled_engine(env, tmp_path) as engine, bound(env, own):
        assert await upload_at_once(engine) == [None] * SERVER_CONNECTIONS
    await own.dispose()
    assert len(await env.references()) == SERVER_CONNECTIONS


@pytest.mark.case("RB-08")
@pytest.mark.parametrize("pool", [{"poolclass": NullPool}, {"pool_size": 20}], ids=["no pool", "a pool"])
async def test_it_opens_few_connections(env: OrmEnvironment, pool: dict[str, Any]) -> None:
    engine = create_async_engine(env.database.url, **pool)
    async with bound(env, engine, pool_size=2) as journal:
        await journal.check()
        opened = most = 0

        def checkout(*_: Any) -> None:
            nonlocal opened, most
            opened += 1
            most = max(most, opened)

        def checkin(*_: Any) -> None:
            nonlocal opened
            opened -= 1

        inner = journal._pool._engine.sync_engine
        event.listen(inner, "checkout", checkout)
        event.listen(inner, "checkin", checkin)
        lifetime = timedelta(hours=1)
        staging = await journal.staging()
        await asyncio.gather(*(staging.begin("store", f"doc/1/file/{number}", lifetime) for number in range(60)))
    await engine.dispose()
    assert most == 2
    assert len(await rows(env, "intent")) == 60
    await env.recover()


def test_a_timeout_of_nothing_is_refused() -> None:
    engine = create_async_engine("postgresql+asyncpg://nowhere/")
    with pytest.raises(ConfigurationError, match="timeout"):
        StorageJournal(engine, timeout=timedelta(0))
