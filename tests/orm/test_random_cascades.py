"""Random flushes over rows that take each other along when they are deleted: moves below them, files put and moved, deletes.

After each transaction the objects are those that rows refer to. `GRANITE_CASCADES` says how many transactions each database has,
and `GRANITE_SEED` what they do; a failure says its seed.
"""

from __future__ import annotations

import contextlib
import warnings
from random import Random
from typing import Any, ClassVar

import pytest
from sqlalchemy import delete
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from granite_storage.exceptions import StaleAttachmentError
from tests.orm.environment import Child, Node, OrmEnvironment, Parent, Tag, file
from tests.tiers import repetitions, seed

TRANSACTIONS = repetitions("GRANITE_CASCADES", default=25, exhaustive=150)
SEED = seed()
MOST = 4
KINDS: list[type[Any]] = [Node, Parent, Child, Tag]

# A foreign key to a row that has gone, a row that a cascade has deleted while the session still knows it.
EXPECTED = (DBAPIError, StaleDataError, ObjectDeletedError, InvalidRequestError, StaleAttachmentError)


class Family:
    """Changes the rows of one transaction at random."""

    PARENTS: ClassVar[dict[type[Any], tuple[type[Any], str]]] = {
        Node: (Node, "parent_id"),
        Child: (Parent, "parent_id"),
        Tag: (Child, "child_id"),
    }

    def __init__(self, session: AsyncSession, random: Random) -> None:
        self._session = session
        self._random = random

    async def live(self, depth: int = 0) -> None:
        """Do some of all that may be done, flushing now and then."""
        steps = [self.move, self.move, self.put, self.move_file, self.delete, self.delete, self.insert, self.insert]
        for _ in range(self._random.randint(1, 7)):
            what = self._random.random()
            if what < 0.08 and depth < 2:
                await self._live_in_savepoint(depth + 1)
            elif what < 0.14:
                await self._delete_in_bulk()
            else:
                await self._random.choice(steps)()
            if self._random.random() < 0.15:
                await self._session.flush()

    async def _live_in_savepoint(self, depth: int) -> None:
        async with self._session.begin_nested() as savepoint:
            await self.live(depth)
            if self._random.random() < 0.4:
                await savepoint.rollback()

    async def _delete_in_bulk(self) -> None:
        kind = self._random.choice(KINDS)
        await self._session.execute(delete(kind).where(kind.id == self._number()))

    async def insert(self) -> None:
        kind = self._random.choice(KINDS)
        row = await self._any(kind, self._number())
        if row is None:
            row = kind(id=self._number(), file=self._file())
            if kind is Tag:
                row.child_id = self._number()
            self._session.add(row)

    async def move(self) -> None:
        kind = self._random.choice(list(self.PARENTS))
        row = await self._any(kind)
        if row is not None:
            _, name = self.PARENTS[kind]
            may_be_free = kind is not Tag and self._random.random() < 0.2
            setattr(row, name, None if may_be_free else self._number())

    async def put(self) -> None:
        row = await self._any(self._random.choice(KINDS))
        if row is not None:
            row.file = self._file()

    async def move_file(self) -> None:
        kind = self._random.choice([Node, Child, Tag])
        one, other = await self._any(kind), await self._any(kind)
        if one is not None and other is not None and one is not other:
            other.file, one.file = one.file, None

    async def delete(self) -> None:
        row = await self._any(self._random.choice([Node, Node, Parent, Parent, Child, Tag]))
        if row is not None and row not in self._session.new:
            await self._session.delete(row)

    async def _any(self, kind: type[Any], number: int | None = None) -> Any:
        with self._session.no_autoflush:
            row = await self._session.get(kind, number or self._number())
        return None if row in self._session.deleted else row

    def _number(self) -> int:
        return self._random.randint(1, MOST)

    def _file(self) -> Any:
        return file(self._random.choice("abc")) if self._random.random() < 0.9 else None


@pytest.mark.case("CON-10")
@pytest.mark.timeout(600)
async def test_random_cascades(env: OrmEnvironment) -> None:
    random = Random(f"{SEED}-{env.database.name}")
    committed = 0
    for number in range(TRANSACTIONS):
        with contextlib.suppress(*EXPECTED), warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            async with env.sessions() as session:
                await Family(session, random).live()
                await session.commit()
                committed += 1
        try:
            await env.check()
        except BaseException as error:
            error.add_note(f"GRANITE_SEED={SEED} GRANITE_CASCADES={TRANSACTIONS} replays it: transaction {number}")
            raise
    assert committed > TRANSACTIONS / 4
