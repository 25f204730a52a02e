"""Several sessions at once on the same rows, and what a session holds while it waits."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from granite_storage.exceptions import BackendUnavailableError, ConfigurationError
from granite_storage.orm import Attachment, bind_storage, transactions
from tests.orm.databases import Database
from tests.orm.environment import Base, Child, Doc, OrmEnvironment, Parent, file, orm_environment


class TestSameRow:
    @pytest.mark.case("CON-01")
    async def test_two_replace_with_stale_identity_maps(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as one, env.sessions() as two:
            first, second = await one.get_one(Doc, 1), await two.get_one(Doc, 1)
            await one.commit()
            await two.commit()
            first.file, second.file = file("b"), file("c")
            await asyncio.gather(one.commit(), two.commit())
        assert len(await env.objects()) == 1

    async def test_one_replaces_and_one_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as one, env.sessions() as two:
            first, second = await one.get_one(Doc, 1), await two.get_one(Doc, 1)
            await one.commit()
            await two.commit()
            first.file = file("b")
            await one.flush()
            await two.delete(second)
            await asyncio.gather(two.commit(), one.commit())
        assert await env.objects() == set()

    async def test_both_clear_by_bulk(self, env: OrmEnvironment) -> None:
        await env.add(*(Doc(id=number, file=file(str(number))) for number in range(1, 6)))

        async def clear() -> None:
            async with env.sessions.begin() as session:
                await session.execute(Doc.__table__.update().values(file=None))

        await asyncio.gather(clear(), clear())
        assert await env.objects() == set()

    async def test_two_rows_in_opposite_order(self, env: OrmEnvironment) -> None:
        if env.database.name == "sqlite-begin":
            pytest.skip("a real transaction of SQLite that has read may not write after another one has")
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))

        async def replace(numbers: tuple[int, int], content: str) -> None:
            async with env.sessions.begin() as session:
                for doc in [await session.get_one(Doc, number) for number in numbers]:
                    doc.file = file(content)

        for _ in range(5):
            await asyncio.gather(replace((1, 2), "x"), replace((2, 1), "y"))
        assert len(set((await env.contents()).values())) == 1


class TestLocks:
    async def test_children_and_their_parents_replacement(self, env: OrmEnvironment) -> None:
        """Each inserts a child, which shares a lock on the parent, and then replaces the parent's file."""
        if not env.database.is_postgres:
            pytest.skip("the lock of a foreign key that lets a plain UPDATE through is PostgreSQL's")
        await env.add(Parent(id=1, file=file("a")))
        inserted = asyncio.Barrier(2)

        async def work(number: int) -> None:
            async with env.sessions() as session, session.begin():
                session.add(Child(id=number, parent_id=1, file=file(str(number))))
                await session.flush()
                await inserted.wait()
                (await session.get_one(Parent, 1)).file = file(f"p{number}")

        await asyncio.wait_for(asyncio.gather(work(1), work(2)), 10)
        assert len(await env.objects()) == 3

    async def test_stress(self, env: OrmEnvironment) -> None:
        """Many tasks replace, copy, delete and roll back; what the database refuses is tried no second time."""
        await env.add(*(Doc(id=number, file=file(str(number))) for number in range(1, 6)))

        refused: list[str] = []

        async def work(number: int) -> None:
            try:
                async with env.sessions() as session, session.begin():
                    doc = await session.get(Doc, number % 5 + 1)
                    if doc is not None:
                        doc.file = None if number % 7 == 0 else file(f"n{number}")
                    session.add(Doc(id=100 + number, file=file(f"x{number}"), code=str(number % 20)))
                    await session.flush()
                    if number % 3 == 0:
                        await session.rollback()
            except DBAPIError as error:
                refused.append(str(error).lower())

        await asyncio.gather(*(work(number) for number in range(40)))
        known = ("deadlock", "unique", "duplicate", "database is locked" if env.database.is_sqlite else "deadlock")
        assert all(any(word in error for word in known) for error in refused)


class TestConnections:
    @pytest.mark.case("DBF-18")
    async def test_pool_of_one(self, database: Database) -> None:
        async with orm_environment(database, pool_size=1, max_overflow=0, pool_timeout=5) as env:
            await env.add(Doc(id=1, file=file("a")))
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                doc.file, doc.other = file("b"), doc.file
                await session.flush()
                doc.file = file("c")
            await env.check(file_1="c", other_1="a")

    async def test_none_is_held_while_uploading(self, env: OrmEnvironment) -> None:
        used: list[int] = []

        async def watched() -> AsyncIterator[bytes]:
            used.append(env.engine.pool.checkedout())  # type: ignore[attr-defined]
            yield b"content"

        await env.add(Doc(id=1, file=Attachment(watched())))
        assert used == [0]

    @pytest.mark.case("DBF-15")
    async def test_upload_while_the_write_lock_is_held(self, env: OrmEnvironment) -> None:
        async def slow() -> AsyncIterator[bytes]:
            await asyncio.sleep(0.2)
            yield b"slow"

        async def quick() -> None:
            await asyncio.sleep(0.05)
            await env.add(Doc(id=3, file=file("c")))

        async def work() -> None:
            async with env.sessions() as session, session.begin():
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                session.add(Doc(id=2, file=Attachment(slow())))

        await asyncio.gather(work(), quick())
        await env.check(file_1="a", file_2="slow", file_3="c")

    @pytest.mark.case("DBF-16")
    async def test_upload_between_a_read_and_a_write(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))

        async def slow() -> AsyncIterator[bytes]:
            await env.add(Doc(id=2, file=file("b")))
            yield b"slow"

        async def replace() -> None:
            async with env.sessions() as session, session.begin():
                (await session.get_one(Doc, 1)).file = Attachment(slow())

        if env.database.name == "sqlite-begin":
            # What SQLite says to any write after a read that another connection has overtaken.
            with pytest.raises(OperationalError, match="locked"):
                await replace()
            await env.check(file_1="a", file_2="b")
        else:
            await replace()
            await env.check(file_1="slow", file_2="b")

    async def test_many_uploads_are_bounded(self, env: OrmEnvironment) -> None:
        running = most = 0

        async def watched() -> AsyncIterator[bytes]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            yield b"x"
            running -= 1

        await env.add(*(Doc(id=number, file=Attachment(watched())) for number in range(1, 31)))
        assert 1 < most <= 8


class TestRefusals:
    async def test_autocommit(self, env: OrmEnvironment) -> None:
        sessions = async_sessionmaker(env.engine.execution_options(isolation_level="AUTOCOMMIT"))
        async with sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await session.commit()
        await env.check()

    async def test_autocommit_engine(self, env: OrmEnvironment) -> None:
        engine = create_async_engine(env.database.url, isolation_level="AUTOCOMMIT")
        async with AsyncSession(engine) as session:
            session.add(Doc(id=1, file=file("a")))
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await session.commit()
        await engine.dispose()
        await env.check()


class TestRemovals:
    async def test_failure_is_logged_once_and_kept_from_the_caller(
        self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture
    ) -> None:
        await env.add(Doc(id=1, file=file("a")))
        (left,) = await env.objects()
        env.backend.fail("delete", error=BackendUnavailableError("out of reach", backend="store"))
        with caplog.at_level(logging.WARNING, "granite_storage"):
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("b")
        assert len([record for record in caplog.records if left in record.getMessage()]) == 1
        assert left in await env.objects()
        await env.backend.delete(left)
        await env.check(file_1="b")

    async def test_failure_does_not_mask_the_callers_error(self, env: OrmEnvironment) -> None:
        env.backend.fail("delete", error=BackendUnavailableError("out of reach", backend="store"))
        with pytest.raises(ZeroDivisionError):
            await self.fail_after_a_flush(env)
        for location in await env.objects():
            await env.backend.delete(location)

    async def fail_after_a_flush(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            raise ZeroDivisionError

    @pytest.mark.case("DBF-08")
    @pytest.mark.filterwarnings("ignore")
    async def test_session_that_is_dropped(self, database: Database) -> None:
        if database.name == "mariadb":
            pytest.skip("its driver writes to a closed loop when it is dropped")
        async with orm_environment(database) as env:
            session = env.sessions()
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            reference = weakref.ref(session.sync_session)
            del session
            gc.collect()
            assert reference() is None
            assert env.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            assert len(await env.objects()) == 1
            assert await env.references() == {}

    async def test_nothing_is_kept_after_a_transaction(self, env: OrmEnvironment) -> None:
        content = b"x" * 100_000
        doc = Doc(id=1, file=file(content))
        before = len(transactions._units)
        async with env.sessions() as session:
            session.add(doc)
            await session.commit()
            assert len(transactions._units) == before
            assert doc.file is not None
            assert doc.file._state.source is None
            await session.execute(text("SELECT 1"))
        assert len(transactions._units) == before

    async def test_listeners_leave_with_the_last_binding(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        env.binding.unbind()
        assert not transactions._engines
        async with env.sessions.begin() as session:
            session.add(Doc(id=2))
        env.binding = bind_storage(Base, env.manager)
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("b")
        await env.check(file_1="b")


class TestSQLiteSavepoints:
    async def test_release_does_not_commit(self, env: OrmEnvironment) -> None:
        """Python's driver begins no transaction at a SAVEPOINT, and its RELEASE would then commit."""
        async with env.sessions() as session:
            async with session.begin_nested():
                session.add(Doc(id=1, file=file("a")))
            await session.rollback()
        async with env.sessions() as session:
            assert await session.get(Doc, 1) is None


async def test_two_engines_in_one_session(env: OrmEnvironment, database: Database) -> None:
    """One session writes through two engines; a failure of either rolls both back."""
    other = database.engine()
    try:
        binds: dict[Any, Any] = {Doc: env.engine, Parent: other}
        if not database.is_sqlite:
            async with AsyncSession(binds=binds) as session:
                session.add_all([Doc(id=1, file=file("a")), Parent(id=1, file=file("p"))])
                await session.commit()
            assert sorted((await env.contents()).values()) == [b"a", b"p"]
            async with AsyncSession(binds=binds) as session:
                session.add_all([Doc(id=2, file=file("b")), Parent(id=2, file=file("q"))])
                await session.flush()
    finally:
        await other.dispose()
