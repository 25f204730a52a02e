"""What the search of `protocol_model.py` has found, on PostgreSQL with triggers: ways to lose an object, or to leave one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text

from granite_storage import StoredObjectRef
from granite_storage.exceptions import ObjectNotFoundError
from granite_storage.orm.journal.deletes import delete_id
from granite_storage.orm.journal.intents import Intents
from tests.orm.conftest import new_database
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import Doc, environment, locations, refused, run, stored
from tests.orm.journal.sharing import Worker, make_due, steps_are_watched, worker
from tests.orm.journal.test_recovery import journal_of

INSERT = "INSERT INTO doc (id, file) VALUES "
LOCK = text("SELECT 1 FROM granite_storage_intent WHERE location = :location FOR UPDATE")


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """PostgreSQL alone, with triggers."""
    async with new_database(request, "asyncpg") as found:
        yield found


@pytest.fixture
async def env(database: Any) -> AsyncIterator[OrmEnvironment]:
    async with environment(database) as found:
        yield found


async def test_a_fence_that_waits_for_a_guard(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard has locked a newer intent and is to find the fence, which a worker that was overtaken before does not lift."""
    refs = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    gone, other = sorted(refs, key=lambda ref: delete_id(ref.backend, ref.location))
    await run(env, INSERT + "(3, {gone})", "DELETE FROM doc WHERE file = {gone} AND id < 3", gone=gone)
    with steps_are_watched(monkeypatch):
        overtaken = Worker(env, ("_let_go",))
        await overtaken.run_to("_let_go")
        await run(env, "DELETE FROM doc")
        async with env.engine.connect() as blocker, env.engine.connect() as writer:
            await blocker.execute(LOCK, {"location": other.location})
            # The guard locks intents in the order of their ids: it has locked the first one, and waits for the second one.
            writing = asyncio.create_task(refused(writer, INSERT + "(4, {gone}), (5, {other})", gone=gone, other=other))
            await wait_until_locked(env, gone)
            await make_due(env)
            await journal_of(env).recover()
            assert await env.objects() == {other.location}
            await overtaken.finish()
            await blocker.rollback()
            assert await writing
    await env.recover()
    assert await env.objects() == set()


async def test_a_later_fence_of_the_same_object(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that was overtaken does not lift it, though both have been taken over as often."""
    [ref] = await stored(env, Doc(id=1, file=file("a")))
    await run(env, INSERT + "(2, {ref})", "DELETE FROM doc WHERE id = 1", ref=ref)
    with steps_are_watched(monkeypatch):
        overtaken = Worker(env, ("_let_go",))
        await overtaken.run_to("_let_go")
        await make_due(env)
        async with worker(env, "_let_go"):
            await run(env, "DELETE FROM doc")
        async with worker(env, "_check"):
            await overtaken.finish()
    await env.recover()
    assert await env.objects() == set()


async def wait_until_locked(env: OrmEnvironment, ref: StoredObjectRef) -> None:
    """Wait until a transaction has locked the intent of an object."""
    async with env.engine.connect() as connection:
        while (await connection.execute(text(f"{LOCK} SKIP LOCKED"), {"location": ref.location})).first() is not None:
            await connection.rollback()
            await asyncio.sleep(0.01)


async def test_an_adoption_of_what_is_gone(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its intent is not evidence for other writers before it is known that the object exists."""
    [ref] = await stored(env, Doc(id=1, file=file("a")))
    await run(env, "DELETE FROM doc")
    adopt, was_refused = Intents.adopt, []

    async def overtaken(*args: Any, **options: Any) -> None:
        await env.recover()
        try:
            await adopt(*args, **options)
        finally:
            was_refused.append(await refused(env, INSERT + "(2, {ref})", ref=ref))

    monkeypatch.setattr(Intents, "adopt", overtaken)
    with pytest.raises(ObjectNotFoundError):
        await journal_of(env).adopt([ref])
    assert was_refused == [True]
    assert locations(*(await env.references()).values()) == set()
