"""A task is cancelled while the objects are deleted that its transaction has displaced."""

from __future__ import annotations

import asyncio

import pytest

from tests.orm.environment import Doc, OrmEnvironment, file


@pytest.mark.parametrize("database", ["sqlite-begin"], indirect=True)
async def test_they_are_deleted_to_the_end(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    env.backend.delay("delete", seconds=0.3)

    async def replace() -> None:
        async with env.sessions() as session:
            (await session.get_one(Doc, 1)).file = file("b")
            await session.commit()  # which SQLAlchemy does not shield, unlike that of `sessions.begin()`

    task = asyncio.create_task(replace())
    async with asyncio.timeout(10):
        while not env.backend.count("delete"):  # noqa: ASYNC110  # the backend has no event to tell of a call
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await env.check(file_1="b")
