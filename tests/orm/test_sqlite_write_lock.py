"""On SQLite a flush takes the write lock before it reads: what has read can no longer write once another one has written."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.orm import make_transient_to_detached

from tests.orm.environment import Doc, OrmEnvironment, file


@pytest.mark.parametrize("database", ["sqlite-begin"], indirect=True)
async def test_another_writer_waits_for_a_flush_that_has_read_its_rows(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    async with env.sessions() as session:
        given = (await session.get_one(Doc, 2)).file
    unread = Doc(id=1)
    make_transient_to_detached(unread)
    env.backend.delay("copy", seconds=0.3)

    async def copy() -> None:
        async with env.sessions.begin() as session:
            session.add(unread)
            unread.file = given  # copied once the row is locked, because nothing is known of what it holds

    async def write() -> None:
        async with asyncio.timeout(10):
            while not env.backend.count("copy"):  # noqa: ASYNC110  # the backend has no event to tell of a call
                await asyncio.sleep(0.01)
        await env.add(Doc(id=3))

    await asyncio.gather(copy(), write())
    await env.check(file_1="b", file_2="b")
