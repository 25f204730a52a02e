"""Rights on the journal's tables, and a table that is missing, where triggers write into them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text

from tests.orm.conftest import new_database
from tests.orm.databases import WITH_JOURNAL, Database
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import Doc, environment, run, stored
from tests.orm.journal.test_table_faults import WRITES, denied, displace, explained, limited, missing, renamed


@pytest.fixture(scope="session", params=WITH_JOURNAL)
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """A database of these tests' own: its tables have triggers."""
    async with new_database(request, request.param) as found:
        yield found


@pytest.fixture
async def env(database: Database) -> AsyncIterator[OrmEnvironment]:
    """Empty tables with triggers."""
    async with environment(database) as env:
        yield env
        await env.recover()


@pytest.mark.parametrize("how", ["delete", "bulk delete", "clear", "replace"])
async def test_session_without_rights(env: OrmEnvironment, how: str) -> None:
    """A session records itself what it displaces, so it needs them though the triggers do not."""
    await stored(env, Doc(id=1, file=file("a")))
    async with limited(env, "doc") as engine:
        with denied(engine, *WRITES):
            await displace(env, how, env.database.sessionmaker(engine, expire_on_commit=False), Doc)
    assert len(await env.references()) == 1


async def test_sql_without_rights(env: OrmEnvironment) -> None:
    """Triggers write with the rights of the role that has created them."""
    [ref] = await stored(env, Doc(id=1, file=file("a")))
    async with limited(env, "doc") as engine, engine.begin() as connection:
        await run(connection, "DELETE FROM doc", "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
        await run(connection, "DELETE FROM doc")
    [row] = await env.journal_rows("intent")
    assert row.location == ref.location


async def test_owner_without_rights(env: OrmEnvironment) -> None:
    """The functions of PostgreSQL run with the rights of their owner, who may not be the role of the session."""
    if not env.database.is_postgres:
        pytest.skip("triggers have no owner on SQLite, and MariaDB names it as it names the role of a session")
    await stored(env, Doc(id=1, file=file("a")))
    async with limited(env, "doc") as engine:
        owner = await env_role(env)
        await env.sql(OWNED.format(owner=engine.url.username))
        try:
            said = "refuses what a trigger does on", "TO the role that has created the triggers"
            with explained("granite_storage_intent", *said):
                await displace(env, "delete", model=Doc)
        finally:
            await env.sql(OWNED.format(owner=owner))
    assert len(await env.references()) == 1


OWNED = """
    DO $$ DECLARE name regprocedure; BEGIN
        FOR name IN SELECT oid FROM pg_proc WHERE proname LIKE 'granite_storage_%' LOOP
            EXECUTE format('ALTER FUNCTION %s OWNER TO {owner}', name);
        END LOOP;
    END $$
"""


async def env_role(env: OrmEnvironment) -> str:
    async with env.engine.connect() as connection:
        return str((await connection.execute(text("SELECT current_user"))).scalar_one())


async def test_missing_table(env: OrmEnvironment) -> None:
    """The trigger misses it before the session does."""
    await stored(env, Doc(id=1, file=file("a")))
    async with renamed(env, "intent"):
        with missing("intent"):
            await displace(env, "delete", model=Doc)
    assert len(await env.references()) == 1
