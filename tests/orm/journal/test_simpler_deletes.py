"""Objects that rows share by SQL: what each rule about their delete intents is for, shown by what breaks without it.

As in test_simpler_protocols, a scenario is one interleaving that tells a simpler variant from the protocol. Each of these was
found by exploring a model of the protocol: the shortest way to lose an object, or to leave one.

    an id of its own for each delete intent          given_up_twice
    a delete intent that is there is left alone      given_up_while_checked
    an overtaken worker trusts its own check         checked_by_one_that_was_overtaken
    a fence is lifted by one that was overtaken      lifted_by_one_that_was_overtaken
    a newer intent survives the delete               given_up_while_deleted
    an undo does not ask what is fenced              restored_while_checked
    a reference counts for its own backend only      renamed_backend
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import case, select

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment
from granite_storage.orm.journal import deletes, recovery, references
from granite_storage.orm.journal.intents import Intents
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.tables import DELETE
from tests.orm.environment import Doc, OrmEnvironment
from tests.orm.journal.sharing import delete, make_due, restore, shared, steps_are_watched, worker
from tests.orm.journal.test_recovery import retention
from tests.orm.journal.variants import Scenario, Variant, expire, name_of, recover, require_broken, violations


@pytest.fixture(scope="session", params=["asyncpg", "mariadb"])
def database(request: pytest.FixtureRequest) -> Any:
    """PostgreSQL and MariaDB: drivers make no difference here."""
    return request.getfixturevalue(f"{request.param}_database")


async def given_up_twice(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """Two rows that share an object are deleted; one delete is undone, and a worker looks before the undo is committed."""
    ref = await shared(env, 2)
    with retention(timedelta(hours=1)):
        for number in (1, 2):
            await delete(env, number)
    async with env.sessions.begin() as session:
        session.add(Doc(id=3, file=Attachment.restore(ref)))
        await session.flush()
        await expire(env)
        await recover(env)


async def given_up_while_checked(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row is being deleted while a worker looks, which sees it, and is gone when the worker drops the intent."""
    await shared(env, 2)
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with env.sessions() as session:
            await session.delete(await session.get_one(Doc, 2))
            await session.flush()
            async with worker(env, "_let_go"):
                await session.commit()


async def checked_by_one_that_was_overtaken(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker checks when the one that has overtaken it is about to lift the fence, and then the delete is undone."""
    ref = await shared(env, 2)
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with worker(env, "_check", "_conclude") as slow:
            async with env.sessions() as session:
                await session.delete(await session.get_one(Doc, 2))
                await session.flush()
                await make_due(env)
                async with worker(env, "_let_go"):
                    await session.commit()
                    await slow.run_to("_conclude")
            await restore(env, ref)


async def lifted_by_one_that_was_overtaken(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lifts the fence under which the one that has overtaken it is about to delete, and the delete is undone."""
    ref = await shared(env, 2)
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with env.sessions() as session:
            await session.delete(await session.get_one(Doc, 2))
            async with worker(env, "_check", "_let_go") as slow:
                await session.flush()
                await slow.run_to("_let_go")
                await session.commit()
                await make_due(env)
                async with worker(env, "_remove"):
                    await slow.finish()
                    await restore(env, ref)


async def given_up_while_deleted(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row is deleted between a worker's fence and its delete; then an undo finds the second delete intent."""
    ref = await shared(env, 2)
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with worker(env, "_check"):
            await delete(env, 2)
    await restore(env, ref)


async def restored_while_checked(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row is deleted between a worker's fence and its check, and an undo is open when it checks."""
    ref = await shared(env, 2)
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with worker(env, "_check", "_remove") as deleting:
            await delete(env, 2)
            with contextlib.suppress(StaleAttachmentError):
                async with env.sessions.begin() as session:
                    session.add(Doc(id=3, file=Attachment.restore(ref)))
                    await session.flush()
                    await deleting.run_to("_remove")


async def renamed_backend(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """Two rows share an object, and one of them names its backend by another of the manager's keys."""
    await shared(env, 2)
    set_key = {"mariadb": """JSON_SET(file, '$.backend', 'other')"""}.get(
        env.database.name, """jsonb_set(file, '{backend}', '"other"')"""
    )
    await env.sql(f"UPDATE doc SET file = {set_key} WHERE id = 2")  # noqa: S608
    await delete(env, 1)
    await recover(env)
    await env.sql(f"UPDATE doc SET file = {set_key.replace('other', 'store')} WHERE id = 2")  # noqa: S608


def with_ids_of_their_own(patch: pytest.MonkeyPatch) -> None:
    """Each delete intent has an id of its own, and an undo consumes one of them."""
    patch.setattr(deletes.PendingDelete, "id", property(lambda _: uuid4()))
    patch.setattr(recovery, "has_own_id", lambda _: False)

    async def find_committed(self: Intents, refs: Any) -> Any:
        intent = self._tables.intent
        async with self._pool.reading() as connection:
            same = (intent.c.kind == DELETE, intent.c.location.in_([ref.location for ref in refs]))
            return {row.location: row.id for row in await connection.execute(select(intent).where(*same))}

    patch.setattr(Intents, "_find_committed", find_committed)


def leaving_alone_what_is_there(patch: pytest.MonkeyPatch) -> None:
    """An intent that is there is not written to, and so not locked."""
    original = deletes.nominate

    def nominate(connection: Any, intent: Any, pending: Any, options: Any) -> None:
        known = set(connection.execute(select(intent.c.id)).scalars())
        original(connection, intent, [item for item in pending if item.id not in known], options)

    patch.setattr("granite_storage.orm.journal.intents.nominate", nominate)


def without_ownership(patch: pytest.MonkeyPatch) -> None:
    """A worker does not see, with its check, whether another one has taken over what it has fenced."""
    original = Recovery._check

    async def check(self: Recovery, claimed: Any) -> Any:
        _, referenced = await original(self, claimed)
        return {item.id for item in claimed}, referenced

    patch.setattr(Recovery, "_check", check)


def lifting_any_fence(patch: pytest.MonkeyPatch) -> None:
    """Any worker that has seen a reference lifts the fence, even one that another worker has taken over meanwhile."""

    async def let_go(self: Recovery, items: Any) -> None:
        async with self._pool.reading() as connection:
            await self._forget(connection, self._tables.reclaim, [item.id for item in items])

    patch.setattr(Recovery, "_let_go", let_go)


def leaving_newer_intents(patch: pytest.MonkeyPatch) -> None:
    async def drop_newer(*_: Any) -> set[str]:
        return set()

    patch.setattr(Recovery, "_drop_newer", drop_newer)


def without_asking_what_is_fenced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intents, "require_unfenced", lambda *_: None)


def comparing_backends(patch: pytest.MonkeyPatch) -> None:
    """A row that names another backend's key does not refer to the object."""
    original = references.location_of

    def of_store(*args: Any, **options: Any) -> Any:
        backend, location = original(*args, **options)
        return backend, case((backend == "store", location))

    patch.setattr(references, "location_of", of_store)


VARIANTS: list[tuple[Scenario, Variant, str]] = [
    (given_up_twice, with_ids_of_their_own, "I1"),
    (given_up_while_checked, leaving_alone_what_is_there, "I2"),
    (checked_by_one_that_was_overtaken, without_ownership, "I1"),
    (lifted_by_one_that_was_overtaken, lifting_any_fence, "I1"),
    (given_up_while_deleted, leaving_newer_intents, "I1"),
    (restored_while_checked, without_asking_what_is_fenced, "I1"),
    (renamed_backend, comparing_backends, "I1"),
]


@pytest.mark.case("RA-13")
@pytest.mark.parametrize("scenario", [scenario for scenario, _, _ in VARIANTS], ids=name_of)
async def test_the_protocol_holds(env: OrmEnvironment, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    await scenario(env, monkeypatch)
    assert await violations(env) == set()


@pytest.mark.parametrize(("scenario", "variant", "broken"), VARIANTS, ids=name_of)
async def test_a_simpler_variant_breaks(unchecked_env: OrmEnvironment, scenario: Scenario, variant: Variant, broken: str) -> None:
    await require_broken(unchecked_env, scenario, variant, broken)
