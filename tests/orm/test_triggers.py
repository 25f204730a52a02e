"""Triggers of the database that put something else into a row than the session has written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from granite_storage.orm import flush
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment


@pytest.fixture(params=["hooks", "journal"])
async def env(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[OrmEnvironment]:
    """Environments without a journal and with one, where the database can have one."""
    flush._answers.clear()
    async with orm_environment(database, journaled=request.param == "journal" and not database.is_sqlite) as env:
        yield env
        await env.check()
    flush._answers.clear()


@asynccontextmanager
async def trigger(env: OrmEnvironment, event: str, value: str) -> AsyncIterator[None]:
    """Let a trigger of `doc` put a value into the file of each row that is written."""
    if env.database.is_sqlite:
        made = [f"CREATE TRIGGER t AFTER {event} ON doc BEGIN UPDATE doc SET file = {value} WHERE id = NEW.id; END"]  # noqa: S608
        dropped = ["DROP TRIGGER t"]
    elif env.database.is_postgres:
        made = [
            f"CREATE FUNCTION f() RETURNS trigger AS $$ BEGIN NEW.file = {value}; RETURN NEW; END $$ LANGUAGE plpgsql",
            f"CREATE TRIGGER t BEFORE {event} ON doc FOR EACH ROW EXECUTE FUNCTION f()",
        ]
        dropped = ["DROP TRIGGER t ON doc", "DROP FUNCTION f()"]
    else:
        made, dropped = [f"CREATE TRIGGER t BEFORE {event} ON doc FOR EACH ROW SET NEW.file = {value}"], ["DROP TRIGGER t"]
    for statement in made:
        await env.sql(statement)
    try:
        yield
    finally:
        for statement in dropped:
            await env.sql(statement)


async def test_update_that_keeps_the_old_value(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    async with trigger(env, "UPDATE", "OLD.file"):
        flush._answers.clear()
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("b")
        await env.check(file_1="a")


async def test_insert_that_clears_the_value(env: OrmEnvironment) -> None:
    async with trigger(env, "INSERT", "NULL"):
        await env.add(Doc(id=1, title="x", file=file("a"), other=file("b")))
        await env.check(other_1="b")


async def test_key_that_the_database_makes(env: OrmEnvironment) -> None:
    async with trigger(env, "INSERT", "NULL"):
        await env.add(Doc(title="x", file=file("a")), Doc(title="y", file=file("b")))
        assert await env.objects() == set()


async def test_trigger_that_changes_nothing(env: OrmEnvironment) -> None:
    async with trigger(env, "INSERT", "NEW.file"):
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("c")
        await env.check(file_1="c", file_2="b")


async def test_rolled_back(env: OrmEnvironment) -> None:
    async with trigger(env, "INSERT", "NULL"):
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            await session.rollback()
        await env.check()


async def test_inside_a_savepoint(env: OrmEnvironment) -> None:
    async with trigger(env, "INSERT", "NULL"), env.sessions.begin() as session, session.begin_nested():
        session.add(Doc(id=1, file=file("a"), other=file("b")))
    await env.check(other_1="b")


async def test_the_catalogue_is_asked_once(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = flush._ask
    monkeypatch.setattr(flush, "_ask", lambda *args: asked.append(args[2]) or original(*args))
    for number in range(1, 4):
        await env.add(Doc(id=number, file=file("a")))
    assert asked == ["doc"]
    await env.check()


async def test_sessions_with_maps_of_other_keys(env: OrmEnvironment) -> None:
    """SQLAlchemy compiles a statement for one set of keys of a `schema_translate_map`, and refuses it with another one."""
    for mapping in ({"tenant": None}, {None: None}):
        flush._answers.clear()
        async with env.engine.connect() as connection:
            mapped = await connection.execution_options(schema_translate_map=mapping)
            assert not await mapped.run_sync(flush.has_triggers, Doc.__table__)
