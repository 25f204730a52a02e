"""Cancelled at every step of the event loop in turn: no row without its file, no connection kept, and no file without a row.

The one exception is a COMMIT that was on its way: it is unknown how it ended, so nothing is deleted.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any

import anyio
import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from granite_storage.exceptions import BackendUnavailableError
from granite_storage.orm import Attachment
from granite_storage.orm._interfaces import StoredObject
from granite_storage.orm.locking import find_shared_afresh
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment

Work = Callable[[OrmEnvironment], Coroutine[Any, Any, None]]


async def save(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        session.add_all([Doc(id=2, file=file("b"), other=file("c")), Doc(id=3, file=file("d"))])


async def replace(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        doc = await session.get_one(Doc, 1)
        doc.file, doc.other = file("b"), file("c")


async def delete(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        await session.delete(await session.get_one(Doc, 1))


async def roll_back(env: OrmEnvironment) -> None:
    async with env.sessions() as session:
        doc = await session.get_one(Doc, 1)
        doc.file = file("b")
        session.add(Doc(id=2, file=doc.other))
        await session.flush()
        await session.rollback()


async def savepoints(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        doc = await session.get_one(Doc, 1)
        savepoint = await session.begin_nested()
        doc.file = file("b")
        await session.flush()
        await savepoint.rollback()
        async with session.begin_nested():
            doc.other = None


async def swap(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        doc = await session.get_one(Doc, 1)
        doc.file, doc.other = doc.other, doc.file
        session.add(Doc(id=2, file=doc.file))


async def joined(env: OrmEnvironment) -> None:
    async with env.engine.begin() as connection, AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
        (await session.get_one(Doc, 1)).file = file("b")
        await session.commit()


CASES: list[Work] = [save, replace, delete, roll_back, savepoints, swap, joined]


class Steps:
    """Runs work in a task that is cancelled at one of its awaits, some turns of the loop after that began."""

    def __init__(self, work: Coroutine[Any, Any, None], cancelled_at: set[int], turns: int) -> None:
        self.work = work
        self.cancelled_at = cancelled_at
        self.turns = turns
        self.taken = 0
        self.cancelled = False
        self.reached = False

    async def run(self) -> None:
        self.task = asyncio.ensure_future(self._counted())
        try:
            await self.task
        except asyncio.CancelledError as error:
            # Its frames hold cursors, and SQLite closes a connection, with its lock, only when its last cursor is gone.
            traceback.clear_frames(error.__traceback__)
            self.cancelled = True
        del self.task, self.work

    async def _counted(self) -> None:
        await self

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self.work.__await__()
        sent: BaseException | None = None
        while True:
            try:
                waited_for = steps.send(None) if sent is None else steps.throw(sent)
            except StopIteration:
                return
            if self.taken in self.cancelled_at:
                self.reached = True
                self._cancel(self.turns)
            self.taken += 1
            sent = None
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001  # it is the work's to see
                sent = error

    def _cancel(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._cancel, turns - 1)
        elif (task := getattr(self, "task", None)) is not None:
            task.cancel()


class Commits:
    """Knows whether a COMMIT is on its way: it has been sent, and the session has not been told that it was answered."""

    def __init__(self, env: OrmEnvironment) -> None:
        self.in_flight = False
        self._heard: list[tuple[Any, str, Any]] = [
            (env.engine.sync_engine, "commit", self._on_commit),
            (Session, "after_commit", self._on_answer),
        ]
        for heard in self._heard:
            event.listen(*heard)

    def stop(self) -> None:
        for heard in self._heard:
            event.remove(*heard)

    def _on_commit(self, _: Any) -> None:
        self.in_flight = True

    def _on_answer(self, session: Session) -> None:
        if session.get_nested_transaction() is None:
            self.in_flight = False


async def settled(env: OrmEnvironment) -> None:
    """Wait for what SQLAlchemy does in the background for a task that was cancelled."""
    for _ in range(400):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others and env.engine.pool.checkedout() == 0:  # type: ignore[attr-defined]
            break
        await asyncio.sleep(0.005)


async def cancel_everywhere(database: Database, work: Work, *, turns: int, again_after: int | None = None) -> tuple[int, int]:
    """Return how many times the work was cancelled, and how often a COMMIT was on its way then."""
    runs = doubts = step = 0
    async with orm_environment(database) as env:
        while True:
            await env.sql("DELETE FROM doc")
            await remove_all(env)
            await env.add(Doc(id=1, file=file("a"), other=file("o")))
            commits = Commits(env)
            steps = Steps(work(env), {step, step + (again_after or 0)}, turns)
            await steps.run()
            await settled(env)
            commits.stop()
            env.check_connections()
            references = {ref.location for ref in (await env.references()).values()}
            objects = await env.objects()
            assert references <= objects, f"await {step}: a row has lost its file"
            await env.contents()
            assert commits.in_flight or references == objects, f"await {step}: left behind {objects - references}"
            if not steps.reached:
                return runs, doubts
            runs += 1
            doubts += commits.in_flight
            step += 1


async def remove_all(env: OrmEnvironment) -> None:
    for location in await env.objects():
        await env.backend.delete(location)


STEPPED = ["sqlite", "asyncpg"]


@pytest.mark.case("CAN-01")
@pytest.mark.parametrize("database", STEPPED, indirect=True)
@pytest.mark.parametrize("turns", [0, 3])
@pytest.mark.parametrize("work", CASES)
async def test_at_every_await(database: Database, work: Work, turns: int) -> None:
    runs, doubts = await cancel_everywhere(database, work, turns=turns)
    assert runs > 3  # with a warm pool some awaits do not wait
    assert doubts < runs


@pytest.mark.case("CAN-04")
@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("work", [save, replace, roll_back])
async def test_twice(database: Database, work: Work) -> None:
    # Not on SQLite: a second cancellation leaves the closing of aiosqlite's connection waiting, with or without attachments.
    runs, _ = await cancel_everywhere(database, work, turns=1, again_after=1)
    assert runs > 3


@pytest.mark.case("CAN-04")
@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
@pytest.mark.parametrize("again_after", [0, 1, 2, 3])
async def test_question_on_a_connection_of_its_own(database: Database, again_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is cut off, its connection is closed, and not left to the garbage collector of a later test."""
    opened: list[asyncpg.Connection] = []
    connect = asyncpg.connect

    async def noted(*args: Any, **options: Any) -> asyncpg.Connection:
        opened.append(await connect(*args, **options))
        return opened[-1]

    async with orm_environment(database) as env:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await session.get_one(Doc, 1)
        assert doc.file is not None
        stored = StoredObject(env.manager, doc.file.ref, None)
        places: list[Any] = [(env.engine.sync_engine, {})]
        monkeypatch.setattr(asyncpg, "connect", noted)
        step = 0
        while True:
            steps = Steps(greenlet_spawn(find_shared_afresh, places, [stored]), {step, step + again_after}, 0)
            await steps.run()
            await settled(env)
            left = [connection for connection in opened if not connection.is_closed()]
            assert not left, f"await {step}: {left} is open"
            if not steps.reached:
                break
            step += 1
    assert step > 5
    assert opened


async def slow() -> AsyncIterator[bytes]:
    """Some bytes, and then nothing for a long time."""
    yield b"some"
    await asyncio.sleep(60)


class TestFromOutside:
    @pytest.mark.case("CAN-03")
    async def test_timeout(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await self.replace_slowly(env)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await settled(env)
        await env.check(file_1="a")

    @pytest.mark.case("CAN-05")
    async def test_sibling_fails(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.replace_slowly(env))
                group.create_task(fail_soon())
        assert isinstance(caught.value.exceptions[0], BackendUnavailableError)
        await settled(env)
        await env.check(file_1="a")

    @pytest.mark.case("CAN-05")
    async def test_anyio_scope(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with anyio.move_on_after(0.1) as scope:
            await self.replace_slowly(env)
        assert scope.cancelled_caught
        await settled(env)
        await env.check(file_1="a")

    @pytest.mark.case("CAN-07")
    async def test_waiting_for_the_lock_of_a_row(self, env: OrmEnvironment) -> None:
        if env.database.is_sqlite:
            pytest.skip("SQLite waits in a thread that nobody can interrupt")
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as first:
            (await first.get_one(Doc, 1)).file = file("b")
            await first.flush()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await replace(env)
        await settled(env)
        await env.check(file_1="b")

    async def test_cancelled_while_displaced_objects_are_deleted(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        env.backend.delay("delete", seconds=0.3)
        task = asyncio.ensure_future(replace_one(env))
        await asyncio.wait_for(deletion_begun(env), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(env)
        await env.check(file_1="b")

    async def replace_slowly(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            doc.file, doc.other = Attachment(slow()), file("c")
            # SQLAlchemy shields the commit of this block from cancellation, and so the uploads of a flush that comes with it.
            await session.flush()


async def replace_one(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = file("b")


async def deletion_begun(env: OrmEnvironment) -> None:
    for _ in range(5000):
        if env.backend.count("delete"):
            return
        await asyncio.sleep(0.001)


async def fail_soon() -> None:
    await asyncio.sleep(0.1)
    raise BackendUnavailableError("out of reach", backend="store")
