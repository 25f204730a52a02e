"""Many derivers on one row at once, and derivers beside writers: every variant comes, none is another file's, nothing is left."""

from __future__ import annotations

import asyncio
import random

import pytest
from sqlalchemy import delete
from sqlalchemy.exc import DBAPIError

from granite_storage.exceptions import ObjectNotFoundError, StaleAttachmentError
from tests.orm.derivations import Upper, declared, expected, jobs, journal_of, make_due, shown
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.tiers import repetitions, seed

EIGHT = {f"v{number}": Upper(str(number)) for number in range(8)}


async def test_64_jobs_on_one_row(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight derivers, each with eight jobs for one of eight variants each: eight of eight."""
    monkeypatch.setattr("granite_storage.orm.journal.jobs._JOBS_AT_A_TIME", 1)
    with declared(EIGHT):
        for number in range(repetitions("GRANITE_DERIVER_ROUNDS", default=2, exhaustive=1000)):
            content = f"x{number}"
            await env.add(Doc(id=1, file=file(content)))
            working = [asyncio.create_task(journal_of(env)._jobs().derive("store")) for _ in range(8)]
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
            await asyncio.gather(*(journal_of(env)._jobs().derive("store") for _ in range(2)))
        await asyncio.gather(*writers)
        for _ in range(3):
            await make_due(env)
            await journal_of(env).recover()
        assert await jobs(env) == []
        for (_, number, column), content in (await env.contents()).items():
            assert await shown(env, number, column) == expected(recipes, content)
