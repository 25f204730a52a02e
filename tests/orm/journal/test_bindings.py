"""Several bases with a journal each in one process, and bindings that change while a worker is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import MetaData, select, update
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateSchema, DropSchema

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.tables import clock
from tests.core.support import eventually
from tests.orm.environment import Base, Doc, OrmEnvironment, file
from tests.orm.journal.test_recovery import eventually_true, expire, journal_of, rows

QUICK = timedelta(milliseconds=20)


class Other(DeclarativeBase):
    metadata = MetaData(schema="other")


class Memo(Other):
    __tablename__ = "memo"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("memos")


TABLES = journal_tables(Other.metadata)


@dataclass
class Neighbour:
    """Another base, with a journal and a storage of its own, whose backend goes by the same key."""

    backend: MemoryStorageBackend
    journal: StorageJournal
    sessions: Any

    async def objects(self) -> int:
        return len([info async for info in self.backend.iter_objects()])


@pytest.fixture
async def neighbour(env: OrmEnvironment) -> AsyncIterator[Neighbour]:
    async with env.engine.begin() as connection:
        await connection.execute(CreateSchema("other"))
        await connection.run_sync(Other.metadata.create_all)
    backend = MemoryStorageBackend()
    manager = StorageManager(backends={"store": backend}, policies={"memos": StoragePolicy("memos", "store")})
    journal = StorageJournal(env.engine)
    binding = bind_storage(Other, manager, journal=journal)
    try:
        yield Neighbour(backend, journal, async_sessionmaker(env.engine, expire_on_commit=False))
    finally:
        binding.unbind()
        await journal.aclose()
        await manager.aclose()
        async with env.engine.begin() as connection:
            await connection.execute(DropSchema("other", cascade=True))


async def intents_of(env: OrmEnvironment) -> tuple[int, int]:
    """Return how many intents each of the two journals has."""
    async with env.engine.connect() as connection:
        others = list(await connection.execute(select(TABLES.intent)))
    return len(await rows(env, "intent")), len(others)


@pytest.mark.parametrize("database", ["asyncpg", "psycopg"], indirect=True)
class TestTwoJournals:
    async def test_two_sessions_at_once(self, env: OrmEnvironment, neighbour: Neighbour) -> None:
        """One commits and one is rolled back; each leaves nothing in either journal."""
        async with env.sessions() as one, neighbour.sessions() as two:
            one.add(Doc(id=1, file=file("a")))
            two.add(Memo(id=1, file=file("b")))
            await one.flush()
            await two.flush()
            assert await intents_of(env) == (1, 1), "as others see them, none of them is consumed yet"
            await two.rollback()
            await one.commit()
        assert await intents_of(env) == (0, 0)
        assert (len(await env.objects()), await neighbour.objects()) == (1, 0)
        await env.check(file_1="a")

    @pytest.mark.parametrize("commit", [True, False])
    async def test_one_session_for_both(self, env: OrmEnvironment, neighbour: Neighbour, commit: bool) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            (await session.get_one(Doc, 1)).file = file("b")
            session.add(Memo(id=1, file=file("c")))
            await session.flush()
            await (session.commit() if commit else session.rollback())
        assert await intents_of(env) == (1 if commit else 0, 0)
        assert await neighbour.objects() == (1 if commit else 0)
        await neighbour.journal.recover()
        await env.check(file_1="b" if commit else "a")

    async def test_a_worker_does_nothing_to_the_other_ones_objects(self, env: OrmEnvironment, neighbour: Neighbour) -> None:
        await file("a").store(Doc.file)
        await file("b").store(Memo.file)
        await expire(env)
        async with env.engine.begin() as connection:
            await connection.execute(update(TABLES.intent).values(due=clock(-1.0)))
        assert (await journal_of(env).recover()).deleted == 1
        assert (len(await env.objects()), await neighbour.objects()) == (0, 1)
        assert (await neighbour.journal.recover()).deleted == 1
        assert await neighbour.objects() == 0


def manager_of(env: OrmEnvironment, *more: str) -> StorageManager:
    """Return another manager of the environment's storage, which may have more backends."""
    others = {key: MemoryStorageBackend() for key in more}
    return StorageManager(
        backends={"store": env.backend, **others}, policies={"docs": StoragePolicy("docs", "store", max_size=1 << 20)}
    )


class TestWhileAWorkerRuns:
    async def test_unbound_and_bound_again(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """Unbound it deletes nothing, since it does not know what refers to an object; bound to a new manager it goes on."""
        journal = journal_of(env)
        stored = await file("a").store(Doc.file)
        async with journal.worker(interval=QUICK):
            env.binding.unbind()
            async with env.uploads() as (connection, tables):
                await connection.execute(update(tables.intent).values(due=clock(-1.0)))
            await eventually_true(lambda: said(caplog, "belongs to no base"))
            assert await env.backend.exists(stored.location)
            env.manager = manager_of(env)
            env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=journal)
            await eventually_true(lambda: is_gone(env, stored.location))
            await env.add(Doc(id=1, file=file("b")))
        await env.check(file_1="b")

    async def test_bound_twice(self, env: OrmEnvironment) -> None:
        """A second binding of the same base changes nothing, and its end neither."""
        journal = journal_of(env)
        async with journal.worker(interval=QUICK):
            second = bind_storage(Base, env.manager, journal=journal)
            await env.add(Doc(id=1, file=file("a")))
            second.unbind()
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                assert doc.file is not None
                old, doc.file = doc.file.location, file("b")
            await eventually_true(lambda: is_gone(env, old))
        await env.check(file_1="b")

    async def test_a_backend_that_the_new_manager_does_not_have(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its rows are kept as they are: no worker takes them for objects that it cannot delete."""
        journal = journal_of(env)
        env.binding.unbind()
        binding = bind_storage(Base, manager_of(env, "former"), journal=journal)
        original, in_progress = Recovery.run, Counter[str]()

        async def run(self: Recovery, backend: str, *args: Any) -> Any:
            in_progress[backend] += 1
            try:
                return await original(self, backend, *args)
            finally:
                in_progress[backend] -= 1

        monkeypatch.setattr(Recovery, "run", run)
        async with journal.worker(interval=QUICK):
            await file("a").store(Doc.file)
            binding.unbind()
            env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=journal)
            await eventually(lambda: not in_progress["former"])  # calls in progress end with the manager that they began with
            async with env.uploads() as (connection, tables):
                await connection.execute(update(tables.intent).values(backend="former", due=clock(-1.0)))
            lost = await file("b").store(Doc.file)
            async with env.uploads() as (connection, tables):
                own = tables.intent.c.backend == "store"
                await connection.execute(update(tables.intent).where(own).values(due=clock(-1.0)))
            await eventually_true(lambda: is_gone(env, lost.location))
            await journal.recover()
            assert [row.backend for row in await rows(env, "intent")] == ["former"]
        async with env.uploads() as (connection, tables):
            await connection.execute(update(tables.intent).values(backend="store"))
        await env.recover()

    async def test_the_heartbeat_of_a_worker_without_backends(self, env: OrmEnvironment) -> None:
        """It goes on with a manager that has none of those that the worker began with: a silence stops the collector."""
        journal = journal_of(env)
        env.binding.unbind()
        former = StorageManager(backends={"former": env.backend}, policies={"docs": StoragePolicy("docs", "former")})
        binding = bind_storage(Base, former, journal=journal)
        async with journal.worker(interval=QUICK):
            binding.unbind()
            env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=journal)
            before = [row.changed for row in await rows(env, "meta") if row.name == "heartbeat"]

            async def has_beaten() -> bool:
                beats = [row.changed for row in await rows(env, "meta") if row.name == "heartbeat"]
                return len(set(beats + before)) > len(before)

            for _ in range(3):  # the first ones may be of passes that were in progress
                await eventually_true(has_beaten)
                before += [row.changed for row in await rows(env, "meta") if row.name == "heartbeat"]


async def said(caplog: pytest.LogCaptureFixture, words: str) -> bool:
    return words in caplog.text


async def is_gone(env: OrmEnvironment, location: str) -> bool:
    return location not in await env.objects()
