"""Listeners of the library's own on engines, beside those of the application that await."""

from __future__ import annotations

import asyncio
from typing import Any

from sqlalchemy import create_engine, event
from sqlalchemy.util import await_only

from granite_storage.orm import transactions
from granite_storage.orm._util import copy_listeners, root_engine, without_pool
from tests.orm.environment import Doc, OrmEnvironment, file


async def test_an_engine_is_first_used_while_another_session_begins(env: OrmEnvironment) -> None:
    """The listener of the other one awaits, and so the list of listeners grows while it is gone through."""
    env.database.spoil()
    transactions.unlisten_all()
    first_begins, may_begin = asyncio.Event(), asyncio.Event()

    @event.listens_for(root_engine(env.engine.sync_engine), "begin")
    def wait(_: Any) -> None:
        if not first_begins.is_set():
            first_begins.set()
            await_only(may_begin.wait())

    async def write(number: int) -> None:
        async with env.sessions.begin() as session:
            session.add(Doc(id=number, file=file("a")))

    first = asyncio.create_task(write(1))
    await first_begins.wait()
    second = asyncio.create_task(write(2))
    while not transactions._engines:  # noqa: ASYNC110  # nothing tells of it
        await asyncio.sleep(0)
    may_begin.set()
    await asyncio.gather(first, second)
    await env.check(file_1="a", file_2="a")


def test_listeners_of_an_engine_with_other_options() -> None:
    """The library's own engine has the listeners of the one that it was given, and of the one that that was made from."""
    original = create_engine("sqlite://")
    given = original.execution_options(isolation_level="SERIALIZABLE")
    begun: list[str] = []
    event.listen(given, "begin", lambda _: begun.append("given"))
    event.listen(original, "begin", lambda _: begun.append("original"))
    own = without_pool(given)
    copy_listeners(given, own)
    with own.begin():
        assert begun == ["original", "given"]
