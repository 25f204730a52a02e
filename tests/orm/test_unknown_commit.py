"""A COMMIT whose answer never comes, over a connection that is cut on the way."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from granite_storage.orm.transactions import ConnectionWatch
from tests.orm.commit_proxy import Cut, behind_proxy
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment


@pytest.mark.case("DBF-01")
@pytest.mark.parametrize("journaled", [False, True], ids=["without a journal", "with a journal"])
@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
@pytest.mark.parametrize("cut", ["before the server", "before the answer"])
async def test_connection_is_cut_at_the_commit(database: Database, cut: Cut, journaled: bool) -> None:
    async with orm_environment(database, journaled=journaled) as env, behind_proxy(database.url) as (proxy, engine):
        await env.add(Doc(id=1, file=file("a")))
        async with AsyncSession(engine) as session:
            (await session.get_one(Doc, 1)).file = file("b")
            session.add(Doc(id=2, file=file("c")))
            await session.flush()
            proxy.cut = cut
            with pytest.raises((DBAPIError, OSError)):
                await session.commit()
        await check_undecided(env, committed=cut == "before the answer")
        if journaled:
            await env.recover()
            await env.check(**({"file_1": "b", "file_2": "c"} if cut == "before the answer" else {"file_1": "a"}))


@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
async def test_taking_silence_for_a_rollback_loses_files(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simpler variant breaks: a row that was committed after all points nowhere."""
    monkeypatch.setattr(ConnectionWatch, "is_in_doubt", False)
    monkeypatch.setattr(ConnectionWatch, "must_ask", lambda *_: False)  # on MariaDB the rows would be found
    async with orm_environment(database) as env, behind_proxy(database.url) as (proxy, engine):
        async with AsyncSession(engine) as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            proxy.cut = "before the answer"
            with pytest.raises((DBAPIError, OSError)):
                await session.commit()
        async with asyncio.timeout(60):
            while not (references := await env.references()):  # noqa: ASYNC110  # the server goes on by itself
                await asyncio.sleep(0.01)
        assert references
        assert await env.objects() == set()


async def check_undecided(env: OrmEnvironment, *, committed: bool) -> None:
    """Check that nothing was deleted: what the rows hold is there, and what they would have held otherwise."""
    for _ in range(200):
        if (await env.contents()).get(("doc", 2, "file")) == (b"c" if committed else None):
            break
        await asyncio.sleep(0.01)
    expected = {1: b"b", 2: b"c"} if committed else {1: b"a"}
    assert await env.contents() == {("doc", number, "file"): content for number, content in expected.items()}
    assert len(await env.objects()) == 3
    assert env.backend.count("delete") == 0
