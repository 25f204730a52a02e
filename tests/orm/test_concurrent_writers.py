"""Many writers on a few rows: whatever the database makes of it, objects and references agree when they are done."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from sqlalchemy import update
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import StaleDataError

from granite_storage.exceptions import ObjectNotFoundError, StaleAttachmentError
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.tiers import repetitions, seed

SECONDS = repetitions("GRANITE_WRITERS_SECONDS", default=1, exhaustive=10)
ROWS = 12
WRITERS = 5
CHANGES = 7
REFUSED = (StaleAttachmentError, ObjectNotFoundError, StaleDataError, SAWarning, DBAPIError)
"""What a writer may be told: another transaction was faster."""


class Traffic:
    """Writers that do this and that to the same rows.

    Attributes:
        done: How often each kind of change was committed.
        refused: How often one was refused, by the error.
    """

    def __init__(self, env: OrmEnvironment, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.is_over = False
        self._has_seen_everything = asyncio.Event()
        self._env = env
        self._random = random.Random(seed)

    async def write(self) -> None:
        changes = [self._replace, self._clear, self._delete, self._insert, self._copy, self._move, self._exchange]
        while not self.is_over:
            change = self._random.choice(changes)
            try:
                async with self._env.sessions.begin() as session:
                    await change(session)
                self.done[change.__name__] += 1
            except REFUSED as error:
                self.refused[type(error).__name__] += 1
            if len(self.done) == CHANGES and self.refused:
                self._has_seen_everything.set()

    async def seen_everything(self) -> None:
        """Wait until each kind of change has succeeded, and one was in the way of another; a busy machine takes longer."""
        async with asyncio.timeout(60):
            await self._has_seen_everything.wait()

    def _some(self) -> int:
        return self._random.randint(1, ROWS)

    async def _replace(self, session: AsyncSession) -> None:
        doc = await session.get(Doc, self._some())
        if doc is not None:
            doc.file = file(str(self._random.random()))

    async def _clear(self, session: AsyncSession) -> None:
        await session.execute(update(Doc).where(Doc.id == self._some()).values(other=None))

    async def _delete(self, session: AsyncSession) -> None:
        doc = await session.get(Doc, self._some())
        if doc is not None:
            await session.delete(doc)

    async def _insert(self, session: AsyncSession) -> None:
        number = self._some()
        if await session.get(Doc, number) is None:
            session.add(Doc(id=number, file=file("new"), other=file("new")))

    async def _copy(self, session: AsyncSession) -> None:
        source, target = await session.get(Doc, self._some()), await session.get(Doc, self._some())
        if source is not None and target is not None:
            target.other = source.file

    async def _move(self, session: AsyncSession) -> None:
        doc = await session.get(Doc, self._some())
        if doc is not None:
            doc.other, doc.file = doc.file, None

    async def _exchange(self, session: AsyncSession) -> None:
        one, two = await session.get(Doc, self._some()), await session.get(Doc, self._some())
        if one is not None and two is not None and one is not two:
            one.file, two.file = two.file, one.file


@pytest.mark.case("CON-01", "CON-10")
@pytest.mark.parametrize("journaled", [False, True], ids=["without a journal", "with a journal"])
@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
async def test_writers_on_the_same_rows(database: Database, journaled: bool) -> None:
    async with orm_environment(database, journaled=journaled) as env:
        await env.add(*(Doc(id=number, file=file("a"), other=file("b")) for number in range(1, ROWS + 1)))
        traffic = Traffic(env, seed())
        async with asyncio.TaskGroup() as group:
            for _ in range(WRITERS):
                group.create_task(traffic.write())
            await asyncio.sleep(SECONDS)
            await traffic.seen_everything()
            traffic.is_over = True
        try:
            await env.recover()
            await env.check()
        except AssertionError as error:
            error.add_note(f"GRANITE_SEED={seed()}: {traffic.done} {traffic.refused}")
            raise
