"""A migration under writers and readers that never stop: no read is wrong, and rows and objects agree afterwards."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.orm.exc import StaleDataError

from granite_storage import ObjectNotFoundError, StaleAttachmentError
from granite_storage.migration import migrate
from tests.migration.environment import MigrationEnvironment, Shelf, file
from tests.tiers import is_exhaustive

ROWS = 60 if is_exhaustive() else 20
RETRIABLE = (StaleAttachmentError, ObjectNotFoundError, StaleDataError, SAWarning, DBAPIError)
"""What a writer may be told, with a migration or without: another transaction was faster."""


class Traffic:
    """Writers and readers on the same few rows.

    Attributes:
        done: How often each kind of change was committed, and how often one was refused.
    """

    def __init__(self, env: MigrationEnvironment, seed: int) -> None:
        self.env = env
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.stopping = False

    async def write(self, number: int) -> None:
        changes = [self.replace, self.clear, self.delete, self.insert, self.copy, self.move, self.exchange]
        while not self.stopping:
            change = self.random.choice(changes)
            try:
                await change()
                self.done[change.__name__] += 1
            except RETRIABLE as error:
                self.done[type(error).__name__] += 1
            await asyncio.sleep(0.002 * number)

    async def read(self) -> None:
        """Read what rows refer to; an object may be gone only where the row has another one by then."""
        while not self.stopping:
            async with self.env.sessions() as session:
                shelf = await session.get(Shelf, self.some())
            if shelf is not None and shelf.file is not None:
                try:
                    content = await shelf.file.read()
                except (ObjectNotFoundError, StaleAttachmentError):
                    async with self.env.sessions() as session:
                        now = await session.get(Shelf, shelf.id)
                    assert now is None or now.file is None or now.file.ref != shelf.file.ref, "a row's object was gone"
                    self.done["too late"] += 1
                else:
                    assert content.startswith(b"content ")
                    self.done["read"] += 1
            await asyncio.sleep(0.001)

    def some(self) -> int:
        return self.random.randint(1, ROWS)

    def new(self) -> str:
        return f"content {self.random.random()}"

    async def replace(self) -> None:
        async with self.env.sessions.begin() as session:
            shelf = await session.get(Shelf, self.some())
            if shelf is not None:
                shelf.file = file(self.new())

    async def clear(self) -> None:
        async with self.env.sessions.begin() as session:
            await session.execute(Shelf.__table__.update().where(Shelf.id == self.some()).values(other=None))

    async def delete(self) -> None:
        async with self.env.sessions.begin() as session:
            shelf = await session.get(Shelf, self.some())
            if shelf is not None:
                await session.delete(shelf)

    async def insert(self) -> None:
        async with self.env.sessions.begin() as session:
            number = self.some()
            if await session.get(Shelf, number) is None:
                session.add(Shelf(id=number, file=file(self.new()), other=file(self.new())))

    async def copy(self) -> None:
        async with self.env.sessions.begin() as session:
            source, target = await session.get(Shelf, self.some()), await session.get(Shelf, self.some())
            if source is not None and target is not None:
                target.other = source.file

    async def move(self) -> None:
        async with self.env.sessions.begin() as session:
            shelf = await session.get(Shelf, self.some())
            if shelf is not None and shelf.file is not None:
                shelf.other, shelf.file = shelf.file, None

    async def exchange(self) -> None:
        async with self.env.sessions.begin() as session:
            one, two = await session.get(Shelf, self.some()), await session.get(Shelf, self.some())
            if one is not None and two is not None and one is not two:
                one.file, two.file = two.file, one.file


_ONCE_MORE = pytest.mark.exhaustive("the same traffic in another order")


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=_ONCE_MORE) for seed in (2, 3))])
async def test_objects_are_those_that_rows_refer_to(env: MigrationEnvironment, seed: int) -> None:
    await env.add(*(Shelf(id=n, file=file(f"content {n}"), other=file(f"content {n}")) for n in range(1, ROWS + 1)))
    binding = env.write_to("new")
    for name in ("old", "new"):
        getattr(env, name).delay("open", seconds=0.001, times=100_000)
    traffic = Traffic(env, seed)
    async with asyncio.TaskGroup() as group:
        for number in range(1, 5):
            group.create_task(traffic.write(number))
        group.create_task(traffic.read())
        await asyncio.sleep(0.05)
        report = await migrate(binding, storage_key="docs", to_backend="new", concurrency=3)
        await asyncio.sleep(0.05)
        traffic.stopping = True
    assert report.moved, traffic.done
    assert report.failed == 0, report.failures
    assert report.complete
    assert traffic.done["read"]
    await env.check()
    async with env.sessions() as session:
        for shelf in await session.scalars(select(Shelf)):
            for held in (shelf.file, shelf.other):
                assert held is None or (await held.read()).startswith(b"content ")
