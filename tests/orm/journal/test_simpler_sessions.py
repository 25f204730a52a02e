"""Simpler variants of what sessions do at a flush, a savepoint, a rollback and a commit: each breaks an invariant here."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.util import await_only

from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import InvalidReferenceError
from granite_storage.orm import Attachment, StorageJournal, bulk, flush, uploads
from granite_storage.orm._interfaces import StoredObject
from granite_storage.orm.attachment import AttachmentState
from granite_storage.orm.transactions import UnitOfWork
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.orm.journal.variants import (
    Scenario,
    Variant,
    expire,
    name_of,
    recover,
    require_broken,
    violations,
    without_reference_check,
)


async def uploader_dies(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A program stores an object, and nobody hears of it any more."""
    await file("a").store(Doc.file)


async def savepoint_is_tried_again(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A row takes an object in a savepoint that is rolled back, and then again."""
    stored = await file("a").store(Doc.file)
    async with env.sessions.begin() as session:
        async with session.begin_nested() as savepoint:
            session.add(Doc(id=1, file=stored))
            await session.flush()
            await savepoint.rollback()
        session.add(Doc(id=1, file=stored))


async def released_and_rolled_back(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A file is replaced in a savepoint that is released, and the transaction around it is rolled back."""
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions() as session:
        doc = await session.get_one(Doc, 1)
        async with session.begin_nested():
            doc.file = file("b")
        await session.rollback()


async def replaced_and_rolled_back(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions() as session:
        (await session.get_one(Doc, 1)).file = file("b")
        await session.flush()
        await session.rollback()


async def rolled_back_and_tried_again(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A transaction is rolled back, and the application tries it again with the same attachment."""
    stored = await file("a").store(Doc.file)
    async with env.sessions() as session:
        session.add(Doc(id=1, file=stored))
        await session.flush()
        await session.rollback()
    await env.add(Doc(id=1, file=stored))


async def rolled_back_though_referenced(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A transaction is rolled back, and another row refers to its object already, by raw SQL."""
    await env.add(Doc(id=2))
    stored = await file("a").store(Doc.file)
    async with env.sessions() as session:
        session.add(Doc(id=1, file=stored))
        await session.flush()
        stored._state.claim()
        async with env.engine.begin() as connection:
            await connection.execute(update(Doc).where(Doc.id == 2).values(other=stored))
        await session.rollback()


async def two_replace(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """Two sessions replace a file that both have seen."""
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions() as one, env.sessions() as two:
        first, second = await one.get_one(Doc, 1), await two.get_one(Doc, 1)
        await two.commit()
        first.file = file("b")
        await one.commit()
        second.file = file("c")
        await two.commit()


async def copied_while_given_up(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A row takes a file of another one, which gives it up before the first one's transaction is committed."""
    await env.add(Doc(id=1, file=file("a")), Doc(id=2))
    async with env.sessions.begin() as session:
        source, copy = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        copy.file = source.file
        await session.flush()
        await give_up(env)
        await expire(env)
        await recover(env)


async def copied_then_given_up(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    await env.add(Doc(id=1, file=file("a")), Doc(id=2))
    async with env.sessions.begin() as session:
        source, copy = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        copy.file = source.file
    await give_up(env)


async def give_up(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = None


async def written_in_bulk(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A bulk statement writes the ref of an object that nobody has claimed."""
    stored = await file("a").store(Doc.file)
    with contextlib.suppress(InvalidReferenceError):
        async with env.sessions.begin() as session:
            await session.execute(insert(Doc).values(id=1, title="", file=stored))


async def being_written_in_bulk(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """The same, while a worker looks."""
    stored = await file("a").store(Doc.file)
    with contextlib.suppress(InvalidReferenceError):
        async with env.sessions.begin() as session:
            await session.execute(insert(Doc).values(id=1, title="", file=stored))
            await expire(env)
            await recover(env)


def without_intents(patch: pytest.MonkeyPatch) -> None:
    """Nothing is written down before it is stored: there are the session's hooks only."""

    async def begin(*_: Any) -> dict[Any, Any]:
        return {}

    patch.setattr(uploads, "_begin", begin)


def deleting_where_a_savepoint_is_rolled_back(patch: pytest.MonkeyPatch) -> None:
    original = UnitOfWork.end_savepoint

    def end_savepoint(self: UnitOfWork, transaction: Any) -> None:
        frame = self.frames[transaction]
        if frame.committed:
            original(self, transaction)
            return
        for stored, attachment in self.frames.pop(transaction).puts:
            attachment._state.release()
            delete_at_once(stored)

    patch.setattr(UnitOfWork, "end_savepoint", end_savepoint)


def deleting_where_a_savepoint_is_released(patch: pytest.MonkeyPatch) -> None:
    original = UnitOfWork.end_savepoint

    def end_savepoint(self: UnitOfWork, transaction: Any) -> None:
        frame = self.frames[transaction]
        for stored, held in frame.log if frame.committed else ():
            if not held:
                delete_at_once(stored)
        original(self, transaction)

    patch.setattr(UnitOfWork, "end_savepoint", end_savepoint)


def deleting_at_the_flush(patch: pytest.MonkeyPatch) -> None:
    original = flush.write_entries

    def write(unit: UnitOfWork, *args: Any) -> None:
        for stored, held in unit.flush.net:
            if not held:
                delete_at_once(stored)
        original(unit, *args)

    patch.setattr(flush, "write_entries", write)


def delete_at_once(stored: StoredObject) -> None:
    await_only(stored.manager.delete(stored.ref))


def overwriting_in_place(patch: pytest.MonkeyPatch) -> None:
    """A replacement is stored where the object is that it replaces."""
    patch.setattr("granite_storage.locations.uuid7_hex", lambda: "0" * 32)
    patch.setattr(MemoryStorageBackend, "_require_free", lambda *_: None)


def deleting_at_a_rollback(patch: pytest.MonkeyPatch) -> None:
    """What a rollback leaves is deleted at once, without a fence or a look."""

    async def settle(self: StorageJournal, ids: Any) -> None:
        intent = self.tables.intent
        async with self._pool.reading() as connection:
            left = list(await connection.execute(select(intent).where(intent.c.id.in_(ids))))
        for row in left:
            await self.manager._engine.delete_many(row.backend, [row.location])

    patch.setattr(StorageJournal, "settle", settle)


def deleting_at_a_rollback_and_forgetting_nothing(patch: pytest.MonkeyPatch) -> None:
    """The attachment goes on to be the object that is deleted."""
    patch.setattr(AttachmentState, "undo", AttachmentState.release)
    deleting_at_a_rollback(patch)


def trusting_what_sessions_remember(patch: pytest.MonkeyPatch) -> None:
    """A row releases what its session has once read of it."""
    original = flush._locked_refs

    def remembered(session: Any, unit: Any, changes: Any, *others: Any) -> Any:
        old = {change.slot.column: change.old.ref for change in changes if isinstance(change.old, Attachment)}
        held = original(session, unit, changes, *others)
        return [replace(entry, ref=old.get(entry.column, entry.ref)) for entry in held]

    patch.setattr(flush, "_locked_refs", remembered)


def sharing_instead_of_copying(patch: pytest.MonkeyPatch) -> None:
    """A copy is the same object once more, and nothing keeps its row from giving it up meanwhile."""

    def share(_: Any, unit: UnitOfWork, __: Any, changes: Any) -> None:
        unit.flush.log += [(StoredObject(change.attachment.manager, change.attachment.ref), True) for change in changes]

    patch.setattr(flush, "_copy_all", share)


def sharing_and_not_looking(patch: pytest.MonkeyPatch) -> None:
    sharing_instead_of_copying(patch)
    without_reference_check(patch)


def writing_past_the_hooks(patch: pytest.MonkeyPatch) -> None:
    """A bulk statement may write any ref."""

    def accept(state: Any, statement: Any, _: Any) -> None:
        for _name, value in bulk._values(statement, state.parameters):
            value = getattr(value, "value", value)
            if isinstance(value, Attachment):
                value._state.claim()

    patch.setattr(bulk, "_refuse_values", accept)


def writing_past_the_hooks_and_not_looking(patch: pytest.MonkeyPatch) -> None:
    writing_past_the_hooks(patch)
    without_reference_check(patch)


VARIANTS: list[tuple[Scenario, Variant, str]] = [
    (uploader_dies, without_intents, "I2"),
    (savepoint_is_tried_again, deleting_where_a_savepoint_is_rolled_back, "I1"),
    (released_and_rolled_back, deleting_where_a_savepoint_is_released, "I1"),
    (replaced_and_rolled_back, deleting_at_the_flush, "I1"),
    (replaced_and_rolled_back, overwriting_in_place, "I1"),
    (rolled_back_and_tried_again, deleting_at_a_rollback_and_forgetting_nothing, "I1"),
    (rolled_back_though_referenced, deleting_at_a_rollback, "I1"),
    (two_replace, trusting_what_sessions_remember, "I2"),
    (copied_while_given_up, sharing_instead_of_copying, "I1"),
    (copied_then_given_up, sharing_and_not_looking, "I1"),
    (written_in_bulk, writing_past_the_hooks_and_not_looking, "I1"),
    (being_written_in_bulk, writing_past_the_hooks, "I1"),
]


@pytest.mark.parametrize("scenario", dict.fromkeys(scenario for scenario, _, _ in VARIANTS), ids=name_of)
async def test_the_protocol_holds(env: OrmEnvironment, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    await scenario(env, monkeypatch)
    assert await violations(env) == set()


@pytest.mark.parametrize(("scenario", "variant", "broken"), VARIANTS, ids=name_of)
async def test_a_simpler_variant_breaks(unchecked_env: OrmEnvironment, scenario: Scenario, variant: Variant, broken: str) -> None:
    await require_broken(unchecked_env, scenario, variant, broken)
