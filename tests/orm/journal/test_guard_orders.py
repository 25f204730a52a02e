"""A row is deleted, another transaction brings its object in again, and a worker deletes it: their steps in every order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import combinations
from random import Random
from typing import Any, TypeAlias

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from granite_storage import StoredObjectRef
from tests.orm.conftest import new_database
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import Doc, Parent, code_of, environment, locations, run
from tests.orm.journal.sharing import Worker, steps_are_watched
from tests.tiers import is_exhaustive, seed

Step: TypeAlias = Callable[[], Awaitable[object]]

WRITES = {"insert": "INSERT INTO parent VALUES (2, {ref})", "update": "UPDATE parent SET file = {ref}"}
REFUSALS = {"23503", "40001", "40P01"}
PATIENCE = 0.1
"""How long a step may take before it counts as waiting for a lock, in seconds; the next step goes on beside it."""

WRITER, OTHERS = 3, 5
ORDERS = list(combinations(range(WRITER + OTHERS), WRITER))
"""Where the steps of the writer are among all. Those of the delete come before those of the worker, which needs it."""


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """PostgreSQL alone, with triggers."""
    async with new_database(request, "asyncpg") as found:
        yield found


class Actor:
    """Takes its steps one after the other, each when it is let go; a refusal of the database ends it."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._go = asyncio.Semaphore(0)
        self._stepped = asyncio.Event()
        self._task = asyncio.create_task(self._run(steps))

    async def _run(self, steps: Sequence[Step]) -> None:
        try:
            for step in steps:
                await self._go.acquire()
                await step()
                self._stepped.set()
        except DBAPIError as error:
            if code_of(error) not in REFUSALS:
                raise
        finally:
            self._stepped.set()

    async def step(self) -> None:
        """Let it go one step further, and wait until it has, or waits for a lock."""
        self._stepped.clear()
        self._go.release()
        if not self._task.done():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stepped.wait(), PATIENCE)

    async def finish(self) -> None:
        await self._task


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("stays_pending", [True, False])
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
async def test_every_order(database: Any, monkeypatch: pytest.MonkeyPatch, level: str, stays_pending: bool, write: str) -> None:
    """The object is there as long as a row refers to it, and goes when none does."""
    orders = ORDERS if is_exhaustive() else Random(seed()).sample(ORDERS, 2)
    async with environment(database) as env:
        with steps_are_watched(monkeypatch):
            for order in orders:
                try:
                    await play(env, order, level, WRITES[write], stays_pending=stays_pending)
                except BaseException as error:
                    error.add_note(f"{order} of {WRITER + OTHERS}")
                    raise


async def play(env: OrmEnvironment, order: tuple[int, ...], level: str, write: str, *, stays_pending: bool) -> None:
    ref = await begin(env, stays_pending=stays_pending)
    async with contextlib.AsyncExitStack() as stack:
        writer, other = [await stack.enter_async_context(env.engine.connect()) for _ in range(2)]
        await writer.execution_options(isolation_level=level)
        worker: list[Worker] = []

        async def fence() -> None:
            worker.append(Worker(env, ("_check", "_conclude")))
            await worker[0].run_to("_check")

        async def end() -> None:
            await worker[0].finish()

        actors = {
            True: Actor([lambda: writer.execute(text("SELECT 1 FROM doc")), lambda: run(writer, write, ref=ref), writer.commit]),
            False: Actor(
                [
                    lambda: run(other, "DELETE FROM doc"),
                    other.commit,
                    fence,
                    lambda: worker[0].run_to("_conclude"),
                    end,
                ]
            ),
        }
        for number in range(WRITER + OTHERS):
            await actors[number in order].step()
        for actor in actors.values():
            await actor.finish()
    held = locations(*(await env.references()).values())
    assert held <= await env.objects(), "a row refers to an object that is gone"
    await env.recover()
    assert held == await env.objects(), "an object is left"


async def begin(env: OrmEnvironment, *, stays_pending: bool) -> StoredObjectRef:
    """Let one row have a file, whose upload stays pending where a session has an older snapshot, and another one none."""
    await run(env, "DELETE FROM doc", "DELETE FROM parent")
    await env.recover()
    async with env.sessions() as session:
        if stays_pending:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            await session.scalars(select(Doc))
        doc = Doc(id=1, file=file("a"))
        session.add_all([doc, Parent(id=1)])
        await session.commit()
    assert doc.file is not None
    return doc.file.ref
