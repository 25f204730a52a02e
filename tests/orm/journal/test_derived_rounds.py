"""Many derivers on one row at once, and derivers beside writers: every variant comes, none is another file's, nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import delete
from sqlalchemy.exc import DBAPIError

from granite_storage.exceptions import ObjectNotFoundError, StaleAttachmentError
from granite_storage.orm.journal.variant_jobs import VariantJobs
from tests.orm.derivations import Upper, declared, expected, jobs, journal_of, make_due, ref_of, shown
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.tiers import is_exhaustive, repetitions, seed

EIGHT = {f"v{number}": Upper(str(number)) for number in range(8)}


@pytest.mark.timeout(7200)
async def test_64_jobs_on_one_row(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight derivers, each with eight jobs for one of eight variants each: eight of eight."""
    monkeypatch.setattr("granite_storage.orm.journal.variant_jobs._JOB_BATCH_SIZE", 1)
    with declared(EIGHT):
        for number in range(repetitions("GRANITE_DERIVER_ROUNDS", default=2, exhaustive=1000)):
            content = f"x{number}"
            await env.add(Doc(id=1, file=file(content)))
            working = [asyncio.create_task(journal_of(env)._jobs(VariantJobs).run("store")) for _ in range(8)]
            again = asyncio.create_task(make_due(env))  # what one has taken over, others take over as well
            await asyncio.gather(*working, again)
            await journal_of(env).recover()
            assert await shown(env) == expected(EIGHT, content)
            assert await jobs(env) == []
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
    await env.recover()
    assert await env.objects() == set()


async def test_beside_writers(env: OrmEnvironment) -> None:
    """Rows are replaced, cleared, deleted, moved, copied and undone while derivers work on them."""
    random_of = random.Random(seed())
    recipes = {"a": Upper("a"), "b": Upper("b", when="flush")}
    count = 0

    async def write() -> None:
        nonlocal count
        for _ in range(repetitions("GRANITE_DERIVER_WRITES", default=12, exhaustive=400)):
            one, other = random_of.sample(range(1, 5), 2)
            count += 1
            try:
                async with env.sessions() as session, session.begin():
                    first, second = await session.get_one(Doc, one), await session.get_one(Doc, other)
                    match random_of.randrange(5):
                        case 0:
                            first.file = file(f"content {count}")
                        case 1:
                            first.file, first.other = first.other, first.file
                        case 2:
                            second.other, first.file = first.file, None
                        case 3:
                            second.file = first.file
                        case _:
                            first.file = None
            except (StaleAttachmentError, ObjectNotFoundError, DBAPIError):  # two writers at one row
                continue

    with declared(recipes, ("other", recipes)):
        await env.add(*(Doc(id=number, file=file(f"first {number}")) for number in range(1, 5)))
        writers = [asyncio.create_task(write()) for _ in range(2)]
        while not all(task.done() for task in writers):
            await make_due(env)
            await asyncio.gather(*(journal_of(env)._jobs(VariantJobs).run("store") for _ in range(2)))
        await asyncio.gather(*writers)
        for _ in range(3):
            await make_due(env)
            await journal_of(env).recover()
        assert await jobs(env) == []
        for (_, number, column), content in (await env.contents()).items():
            assert await shown(env, number, column) == expected(recipes, content)


class Interleaved:
    """Runs work, and at one of its awaits something else, which it waits for, but not for ever: that may wait for the work."""

    def __init__(self, work: Coroutine[Any, Any, object], at: int, other: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.work = work
        self.at = at
        self.other = other
        self.task: asyncio.Task[None] | None = None

    def __await__(self) -> Generator[Any, Any, None]:
        steps, taken = self.work.__await__(), 0
        sent: BaseException | None = None
        while True:
            try:
                waited_for = steps.send(None) if sent is None else steps.throw(sent)
            except StopIteration:
                break
            sent = None
            try:
                yield waited_for
            except BaseException as error:  # noqa: BLE001  # it is the work's to see
                sent = error
            if taken == self.at:
                self.task = asyncio.create_task(self.other())
                yield from asyncio.wait([self.task], timeout=0.2).__await__()
            taken += 1
        if self.task is not None:
            yield from self.task.__await__()


async def replace(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        (await session.get_one(Doc, 1)).file = file("y")


async def clear(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        (await session.get_one(Doc, 1)).file = None


async def remove(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        await session.delete(await session.get_one(Doc, 1))


async def move(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        second.other, first.file = first.file, None


async def swap(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        doc = await session.get_one(Doc, 1)
        doc.file, doc.other = doc.other, doc.file


async def copy(env: OrmEnvironment) -> None:
    async with env.sessions() as session, session.begin():
        (await session.get_one(Doc, 2)).file = (await session.get_one(Doc, 1)).file


@pytest.mark.parametrize("write", [replace, clear, remove, move, swap, copy])
async def test_a_writer_at_every_await(env: OrmEnvironment, write: Callable[[OrmEnvironment], Coroutine[Any, Any, None]]) -> None:
    """Whenever a writer comes, each row has in the end the variants of the very file that it holds."""
    recipes, apart = {"a": Upper("a"), "b": Upper("b")}, 1 if is_exhaustive() else 16
    at, reached = 0, True
    with declared(recipes, ("other", recipes)):
        while reached:
            await env.add(Doc(id=1, file=file("x"), other=file("z")), Doc(id=2))
            deriver = journal_of(env)._jobs(VariantJobs)
            mine = journal_of(env).tables.job.c.location == (await ref_of(env)).location
            working = Interleaved(deriver._derive(await deriver._claim("store", 8, mine)), at, partial(write, env))
            await working
            reached = working.task is not None
            for (_, number, column), content in (await env.contents()).items():
                assert (await shown(env, number, column)).items() <= expected(recipes, content).items()
            for _ in range(2):
                await make_due(env)
                await journal_of(env).recover()
            for (_, number, column), content in (await env.contents()).items():
                assert await shown(env, number, column) == expected(recipes, content)
            assert await jobs(env) == []
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            await env.recover()
            assert await env.objects() == set()
            at += apart
