"""Many tasks that do this and that while a worker and a collector run: no row loses its object, and nothing stays behind.

`GRANITE_GC_STEPS` says how many transactions there are, 10,000 for a long run, and `GRANITE_SEED` plays one again: the choices
are the same then, though not the moments at which tasks run.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import select, type_coerce, update
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import StaleDataError

from granite_storage import (
    BackendUnavailableError,
    ObjectNotFoundError,
    StaleAttachmentError,
    StoredObjectRef,
    StoredObjectRefType,
)
from granite_storage.orm.journal.tables import clock
from tests.gc.environment import Crate, GcEnvironment, Keg, file
from tests.tiers import repetitions, seed

STEPS = repetitions("GRANITE_GC_STEPS", default=150, exhaustive=2000)
TASKS = 50 if STEPS >= 10_000 else 12
ROWS = 15
PAUSES = (*[0.0] * 9, 1.0)
"""How long transactions stay open after their flush, in seconds: long enough for a whole collection, now and then."""

REFUSED = (StaleAttachmentError, ObjectNotFoundError, StaleDataError, SAWarning, DBAPIError, TimeoutError)
"""What a transaction may be told: another one was faster, or the pool is exhausted for the moment."""


class ChangedMindError(Exception):
    """A transaction is abandoned by its application."""


class Traffic:
    """Tasks on the same few rows.

    Attributes:
        done: How often each kind of change was committed.
        collected: How many orphans the collector has deleted meanwhile.
        kept: How many objects it has kept because only the journal knew of them.
    """

    def __init__(self, env: GcEnvironment, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.collected = self.kept = 0
        self._env = env
        self._random = random.Random(seed)
        self._steps = STEPS

    async def play(self) -> None:
        """Play all steps in several tasks, while a worker and a collector run and what rows refer to is checked."""
        assert self._env.journal is not None
        async with self._env.journal.worker(interval=timedelta(seconds=0.1)):
            watching = [asyncio.create_task(work()) for work in (self._collect_forever, self._check_forever)]
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(TASKS):
                        group.create_task(self._work())
            finally:
                failures = [task.exception() for task in watching if task.done()]
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
        for failure in failures:
            assert failure is None, failure

    async def check(self) -> None:
        """See that no row refers to what is not there: by what it refers to before and after the look."""
        before = await self._referenced()
        objects = await self._env.locations()
        missing = (before & await self._referenced()) - objects
        assert not missing, f"I1: {missing}"

    async def _work(self) -> None:
        changes = [
            self._replace,
            self._clear,
            self._delete,
            self._insert,
            self._copy,
            self._swap,
            self._savepoint,
            self._rollback,
        ]
        while self._steps > 0:
            self._steps -= 1
            change = self._random.choice([*changes, self._abandon, self._cancelled])
            try:
                async with self._env.sessions.begin() as session:
                    await change(session)
                    await session.flush()
                    await asyncio.sleep(self._random.choice(PAUSES))
                self.done[change.__name__] += 1
            except ChangedMindError:
                self.done[change.__name__] += 1
            except REFUSED:
                self.done["refused"] += 1

    def _some(self) -> int:
        return self._random.randint(1, ROWS)

    async def _replace(self, session: AsyncSession) -> None:
        crate = await session.get(Crate, self._some())
        if crate is not None:
            crate.file = file(str(self._random.random()))

    async def _clear(self, session: AsyncSession) -> None:
        await session.execute(update(Crate).where(Crate.id == self._some()).values(file=None))

    async def _delete(self, session: AsyncSession) -> None:
        crate = await session.get(Crate, self._some())
        if crate is not None:
            await session.delete(crate)

    async def _insert(self, session: AsyncSession) -> None:
        number = self._some()
        if await session.get(Crate, number) is None:
            session.add(Keg(id=number, file=file("new"), label=file("new")))

    async def _copy(self, session: AsyncSession) -> None:
        one, two = await session.get(Crate, self._some()), await session.get(Crate, self._some())
        if one is not None and two is not None:
            one.file = two.file

    async def _swap(self, session: AsyncSession) -> None:
        keg = await session.get(Keg, self._some())
        if keg is not None:
            keg.file, keg.label = keg.label, keg.file

    async def _savepoint(self, session: AsyncSession) -> None:
        crate = await session.get(Crate, self._some())
        if crate is not None:
            savepoint = await session.begin_nested()
            crate.file = file("in a savepoint")
            await session.flush()
            await (savepoint.rollback() if self._random.random() < 0.5 else savepoint.commit())

    async def _rollback(self, session: AsyncSession) -> None:
        await self._replace(session)
        await session.flush()
        raise ChangedMindError

    async def _abandon(self, _: AsyncSession) -> None:
        """Leave an object that only the collector will find."""
        await self._env.orphan()

    async def _cancelled(self, _: AsyncSession) -> None:
        async def replace() -> None:
            async with self._env.sessions.begin() as session:
                await self._replace(session)

        task = asyncio.create_task(replace())
        await asyncio.sleep(self._random.uniform(0, 0.02))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _collect_forever(self) -> None:
        """Collect in a storage where it is always the day after tomorrow: everything is old, and only looks protect it."""
        collector = self._env.collector()
        while True:
            report = await collector.collect(storage_key="docs", dry_run=False, allow_no_references=True)
            self.collected += report.deleted
            self.kept += report.referenced_on_recheck
            await asyncio.sleep(0.02)

    async def _check_forever(self) -> None:
        while True:
            await self.check()
            await asyncio.sleep(0.05)

    async def _referenced(self) -> set[str]:
        found: set[str] = set()
        async with self._env.engine.connect() as connection:
            for column in self._env.binding.ref_columns():
                refs = await connection.execute(select(type_coerce(column, StoredObjectRefType())).where(column.is_not(None)))
                found.update(ref.location for ref in refs.scalars() if isinstance(ref, StoredObjectRef))
        return found

    async def settle(self) -> None:
        """Let every lease run out, and worker and collector end all there is."""
        assert self._env.journal is not None
        tables = self._env.journal.tables
        for _ in range(3):
            async with self._env.engine.begin() as connection:
                for table in (tables.intent, tables.reclaim):
                    await connection.execute(table.update().values(due=clock(-1.0)))
            await self._env.journal.recover()
        await self._env.collect(allow_no_references=True)
        referenced, objects = await self._referenced(), await self._env.locations()
        assert referenced == objects, f"I1: {referenced - objects}; I2: {objects - referenced}"


@pytest.mark.case("CON-10")
@pytest.mark.timeout(3600)
async def test_traffic_with_a_worker_and_a_collector(journaled_env: GcEnvironment) -> None:
    env = journaled_env
    env.age(48)
    await env.add(*(Crate(id=number, file=file("a")) for number in range(1, ROWS + 1)))
    traffic = Traffic(env, seed())
    try:
        await traffic.play()
        await traffic.settle()
    except (AssertionError, BackendUnavailableError) as error:
        error.add_note(f"GRANITE_SEED={seed()}: {traffic.done}")
        raise
    assert traffic.done["_abandon"]
    assert traffic.collected, "the collector has had nothing to do"
    assert traffic.kept, "no transaction was open while the collector looked"
    assert len(traffic.done) > 8, traffic.done
