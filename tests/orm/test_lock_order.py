"""Rows are locked in the order of their primary keys, so that two transactions on the same rows wait, and never in a ring."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import event, insert, update

from tests.orm.environment import Doc, OrmEnvironment, file

pytestmark = pytest.mark.parametrize("database", ["asyncpg"], indirect=True)


async def test_two_bulk_updates_of_many_rows_in_opposite_order(env: OrmEnvironment) -> None:
    numbers = range(1, 401)  # more than are locked by one statement
    async with env.sessions.begin() as session:
        await session.execute(insert(Doc), [{"id": number, "title": ""} for number in numbers])

    async def clear(numbers: Sequence[int]) -> None:
        async with env.sessions.begin() as session:
            await session.execute(update(Doc), [{"id": number, "file": None} for number in numbers])

    for _ in range(3):
        await asyncio.gather(clear(numbers), clear(numbers[::-1]))


async def test_each_statement_locks_in_order(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(env.engine.sync_engine, "before_cursor_execute", note)
    async with env.sessions.begin() as session:
        for doc in [await session.get_one(Doc, number) for number in (2, 1)]:
            doc.file = file("c")
    locking = [statement for statement in statements if "FOR NO KEY UPDATE" in statement]
    assert locking
    assert [statement for statement in locking if "ORDER BY doc.id" not in statement] == []
