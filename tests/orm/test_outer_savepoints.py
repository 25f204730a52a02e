"""A savepoint around part of a session's work that is rolled back: which part is undone cannot be told."""

from __future__ import annotations

import pytest

from tests.orm.environment import Doc, OrmEnvironment, file


@pytest.mark.parametrize("database", ["sqlite-begin", "asyncpg"], indirect=True)
async def test_nothing_is_deleted_of_work_that_was_done_partly_before_it(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    async with env.engine.connect() as connection:
        await connection.begin()
        async with env.session(connection, join_transaction_mode="rollback_only") as session:
            doc = await session.get_one(Doc, 1)
            doc.file = file("b")
            await session.flush()
            savepoint = await connection.begin_nested()
            doc.other = file("c")
            await session.flush()
            await session.commit()
        await savepoint.rollback()
        await connection.commit()
    assert await env.contents() == {("doc", 1, "file"): b"b"}
    # Without a journal the other two are the garbage collector's.
    orphans = await env.objects() - {ref.location for ref in (await env.references()).values()}
    assert len(orphans) == 2
    for location in orphans:
        await env.backend.delete(location)
