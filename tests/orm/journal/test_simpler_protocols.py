"""The protocol, and what happens where a step of it is left out: each simpler variant breaks an invariant here.

A scenario is one interleaving that tells a variant from the protocol. As the library is, none leaves a dangling reference (I1)
or an orphan (I2); with the step left out, each does. So a change that loses the step fails here.

The simpler variants, and the scenario or the test that each of them fails in:

    hooks of the session, and no journal             test_session_variants: uploader_dies
    silence at a COMMIT taken for a rollback         tests/orm/test_unknown_commit.py
    deletes under a lock, without a fence            worker_dies
    the row count of the consumption ignored         reclaimed_meanwhile
    leases only, no locks                            slow_transaction
    consumed once and for all, whatever savepoints   undone_twice
    deletes where a savepoint is rolled back         test_session_variants: savepoint_is_tried_again
    deletes where a savepoint is released            test_session_variants: released_and_rolled_back
    deletes at the flush                             test_session_variants: replaced_and_rolled_back
    replacement in place                             test_session_variants: replaced_and_rolled_back
    clean-up by a cancelled task, without a fence    test_recovery: TestCancelled
    deletes at a rollback, without a fence           test_session_variants: rolled_back_and_tried_again and
                                                     rolled_back_though_referenced
    no re-check after an upload                      late_arrival
    the old value as the session remembers it        test_session_variants: two_replace
    copies that share an object                      test_session_variants: copied_while_given_up, and without the check of
                                                     references copied_then_given_up
    no check of references                           second_reference
    an undo that claims nothing                      undone_delete
    a move that gives its object up                  moved, moved_later
    bulk statements past the hooks                   test_session_variants: being_written_in_bulk, and without the check of
                                                     references written_in_bulk
    prepared transactions judged by their lease      test_database_faults: test_a_prepared_transaction_is_left_for_later
    deletes as soon as a COMMIT is answered          test_database_faults: test_a_crash_that_forgets_what_was_acknowledged
    a fence that a crash may forget                  test_database_faults: test_a_crash_that_forgets_commits
    an intent that a crash may forget                test_database_faults: test_a_crash_does_not_forget_an_intent
    no deadline for sending                          test_recovery: TestLeases
    a decision that is believed once it was purged   older_snapshot_too_late
    a check of references in an older snapshot       test_refusals: test_the_journals_own_connections_read_what_is_committed
    no retention, and a restored backup              test_database_faults: test_a_restored_backup

Those of the collector are told apart by the collector's own tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, text

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment, flush
from granite_storage.orm.journal.intents import Intents
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.tables import clock
from granite_storage.orm.transactions import FlushState
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.orm.journal.variants import (
    Scenario,
    commit,
    expire,
    name_of,
    recover,
    require_broken,
    stopped,
    violations,
    without_reference_check,
)


async def slow_transaction(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A worker looks while a transaction whose upload is long past its lease is open."""
    stored = await file("a").store(Doc.file)
    await expire(env)
    async with env.sessions.begin() as session:
        session.add(Doc(id=1, file=stored))
        await session.flush()
        await recover(env)


async def reclaimed_meanwhile(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has fenced the object and seen that no row refers to it, and then a row takes it."""
    stored = await file("a").store(Doc.file)
    await expire(env)
    async with stopped(monkeypatch, env, "_remove"):
        await commit(env, stored)


async def worker_dies(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies after it has deleted an object, and then a row takes it."""
    stored = await file("a").store(Doc.file)
    await expire(env)

    async def die(*_: Any) -> None:
        raise SystemError("dead")

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "_conclude", die)
        with contextlib.suppress(SystemError):
            await recover(env)
    await commit(env, stored)


async def second_reference(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """One of two rows that refer to an object, by raw SQL, gives it up."""
    await env.add(Doc(id=1, file=file("a")))
    await env.sql("UPDATE doc SET other = file")
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = None


async def late_arrival(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """An uploader dies; what it had sent arrives when the worker has looked already."""
    stored = await file("a").store(Doc.file)
    ref = stored.ref
    await env.manager.delete(ref)  # it has not arrived yet
    await expire(env)
    await recover(env)
    await env.backend.put_bytes(ref.location, b"a")


async def undone_delete(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A row restores what it had released while a worker checks."""
    ref = await given_up(env)
    await expire(env)
    with contextlib.suppress(StaleAttachmentError):
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = Attachment.restore(ref)
            await session.flush()
            await recover(env)


async def undone_twice(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A row restores what it had released in a savepoint that is rolled back, and then again, while a worker checks."""
    ref = await given_up(env)
    async with env.sessions.begin() as session:
        doc = await session.get_one(Doc, 1)
        async with session.begin_nested() as savepoint:
            doc.file = Attachment.restore(ref)
            await session.flush()
            await savepoint.rollback()
        await session.refresh(doc)
        doc.file = Attachment.restore(ref)
        await session.flush()
        await expire(env)
        await recover(env)


async def given_up(env: OrmEnvironment) -> Any:
    """Let a row release its file, which then waits to be deleted; return its ref."""
    await env.add(Doc(id=1, file=file("a")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("granite_storage.orm.journal.journal.StorageJournal.retention_of", lambda *_: timedelta(hours=1))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            assert doc.file is not None
            ref = doc.file.ref
            doc.file = None
    return ref


async def moved(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """An object moves from one column to another."""
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions.begin() as session:
        doc = await session.get_one(Doc, 1)
        doc.other, doc.file = doc.file, None


async def moved_later(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """An object is released by one flush and taken by the next one of the same transaction."""
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions.begin() as session:
        doc = await session.get_one(Doc, 1)
        given, doc.file = doc.file, None
        await session.flush()
        doc.other = given


async def older_snapshot(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """A transaction whose snapshot is older than the upload lets a row take the object, while a worker looks."""
    async with env.engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        async with env.sessions(bind=connection) as session:
            await session.execute(select(Doc.id))
            stored = await file("a").store(Doc.file)
            session.add(Doc(id=1, file=stored))
            await session.flush()
            await expire(env)
            await recover(env)
            await session.commit()


async def older_snapshot_too_late(env: OrmEnvironment, _: pytest.MonkeyPatch) -> None:
    """The same, when the worker has been there, is done, and has forgotten that it was."""
    async with env.engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        async with env.sessions(bind=connection) as session:
            await session.execute(select(Doc.id))
            stored = await file("a").store(Doc.file)
            for _ in range(2):
                await expire(env)
                await recover(env)
            session.add(Doc(id=1, file=stored))
            with contextlib.suppress(StaleAttachmentError):
                await session.commit()


def without_locks(patch: pytest.MonkeyPatch) -> None:
    """The worker goes by the lease alone."""

    async def fence(self: Recovery, condition: Any, _: int = 0) -> Any:
        intent = self._tables.intent
        async with self._pool.reading() as connection:
            rows = list(await connection.execute(select(intent).where(condition)))
        return [_claimed(row) for row in rows], False

    patch.setattr(Recovery, "_fence", fence)
    without_ownership(patch)


def without_ownership(patch: pytest.MonkeyPatch) -> None:
    """A worker does not see whether what it has fenced is still its own."""
    original = Recovery._check

    async def check(self: Recovery, claimed: Any) -> Any:
        _, referenced = await original(self, claimed)
        return {item.id for item in claimed}, referenced

    patch.setattr(Recovery, "_check", check)


def without_fence(patch: pytest.MonkeyPatch) -> None:
    """The worker locks, deletes and forgets in one transaction, which its death rolls back."""
    original = Recovery._process

    async def process(self: Recovery, claimed: Any) -> Any:
        try:
            return await original(self, claimed)
        except SystemError:
            intent = self._tables.intent
            rows = [
                {"id": item.id, "kind": item.kind, "backend": item.backend, "location": item.location, "due": clock()}
                for item in claimed
            ]
            async with self._pool.durable() as connection:
                for table in (self._tables.reclaim, self._tables.decision):
                    await connection.execute(table.delete())
                await connection.execute(insert(intent).values(rows))
            raise

    patch.setattr(Recovery, "_process", process)


def without_row_count(patch: pytest.MonkeyPatch) -> None:
    """The uploader does not look whether its intent was there."""
    original = Intents.consume

    def consume(*args: Any) -> None:
        with contextlib.suppress(StaleAttachmentError):
            original(*args)

    patch.setattr(Intents, "consume", consume)


def without_tombstone(patch: pytest.MonkeyPatch) -> None:
    async def conclude(self: Recovery, removed: Any) -> None:
        async with self._pool.reading() as connection:
            await self._forget(connection, self._tables.reclaim, [item.id for item in removed])

    patch.setattr(Recovery, "_conclude", conclude)


def without_claim_of_an_undo(patch: pytest.MonkeyPatch) -> None:
    original, consume, restored = flush.restore_deleted, Intents.consume, set[Any]()

    def restore(unit: Any, change: Any) -> None:
        original(unit, change)
        restored.add(unit.flush.restored[-1].id)

    def consume_others(self: Intents, connection: Any, ids: list[Any]) -> None:
        if left := [item for item in ids if item not in restored]:
            consume(self, connection, left)

    patch.setattr(flush, "restore_deleted", restore)
    patch.setattr(Intents, "consume", consume_others)
    patch.setattr(Intents, "require_unfenced", lambda *_: None)


def with_a_flag_that_survives_savepoints(patch: pytest.MonkeyPatch) -> None:
    """What was consumed once is thought to be consumed for good."""
    original, seen = Intents.consume, set[Any]()

    def consume(self: Intents, connection: Any, ids: list[Any]) -> None:
        new = [item for item in ids if item not in seen]
        seen.update(new)
        if new:
            original(self, connection, new)

    patch.setattr(Intents, "consume", consume)


def without_net_difference(patch: pytest.MonkeyPatch) -> None:
    """Whatever was displaced at some time is deleted; and nobody looks for references."""
    patch.setattr(FlushState, "net", property(lambda self: list(self.log)))
    patch.setattr(flush, "written_log", lambda _, unit, __: list(unit.flush.log))
    without_reference_check(patch)


def without_undoing_what_an_earlier_flush_noted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("granite_storage.orm.transactions.UnitOfWork.displacement", lambda *_: None)
    without_reference_check(patch)


def without_decision(patch: pytest.MonkeyPatch) -> None:
    """What an old snapshot does not see is thought to be fine."""
    without_row_count(patch)
    patch.setattr(Intents, "_decide", lambda *_: True)


def without_second_look(patch: pytest.MonkeyPatch) -> None:
    """A decision is believed, though the one that it should have lost against may have been purged."""

    async def are_there(*_: Any) -> bool:
        return True

    patch.setattr(Intents, "_are_there", are_there)


def _claimed(row: Any) -> Any:
    from granite_storage.orm.journal.recovery import _Reclaim

    return _Reclaim._make((*row[:6], row.due, 0, 1, False))


VARIANTS: list[tuple[Scenario, Callable[[pytest.MonkeyPatch], None], str]] = [
    (slow_transaction, without_locks, "I1"),
    (reclaimed_meanwhile, without_row_count, "I1"),
    (worker_dies, without_fence, "I1"),
    (second_reference, without_reference_check, "I1"),
    (late_arrival, without_tombstone, "I2"),
    (undone_delete, without_claim_of_an_undo, "I1"),
    (moved, without_net_difference, "I1"),
    (moved_later, without_undoing_what_an_earlier_flush_noted, "I1"),
]

# MariaDB breaks none of these: it keeps a lock when its savepoint is rolled back, and a DELETE there sees past its snapshot.
ON_POSTGRESQL: list[tuple[Scenario, Callable[[pytest.MonkeyPatch], None], str]] = [
    (undone_twice, with_a_flag_that_survives_savepoints, "I1"),
    (older_snapshot, without_decision, "I1"),
    (older_snapshot_too_late, without_second_look, "I1"),
]


@pytest.mark.parametrize("scenario", [scenario for scenario, _, _ in VARIANTS + ON_POSTGRESQL], ids=name_of)
async def test_the_protocol_holds(env: OrmEnvironment, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    await scenario(env, monkeypatch)
    assert await violations(env) == set()


@pytest.mark.parametrize(("scenario", "variant", "broken"), VARIANTS, ids=name_of)
async def test_a_simpler_variant_breaks(
    unchecked_env: OrmEnvironment, scenario: Scenario, variant: Callable[[pytest.MonkeyPatch], None], broken: str
) -> None:
    await require_broken(unchecked_env, scenario, variant, broken)


@pytest.mark.parametrize(("scenario", "variant", "broken"), ON_POSTGRESQL, ids=name_of)
async def test_a_simpler_variant_breaks_on_postgresql(
    unchecked_env: OrmEnvironment, scenario: Scenario, variant: Callable[[pytest.MonkeyPatch], None], broken: str
) -> None:
    if not unchecked_env.database.is_postgres:
        pytest.skip("MariaDB breaks none of these")
    await require_broken(unchecked_env, scenario, variant, broken)


async def test_durable_means_synchronous(env: OrmEnvironment) -> None:
    """What storage is touched upon must survive a crash of a database that commits asynchronously."""
    assert env.journal is not None
    if not env.database.is_postgres:
        pytest.skip("asynchronous commits of single transactions are PostgreSQL's")
    await env.sql(f"ALTER DATABASE {env.database.url.database} SET synchronous_commit = off")
    await env.engine.dispose()
    try:
        async with env.journal._pool.durable() as connection:
            assert (await connection.execute(text("SHOW synchronous_commit"))).scalar_one() == "on"
        async with env.journal._pool.reading() as connection:
            assert (await connection.execute(text("SHOW synchronous_commit"))).scalar_one() == "off"
    finally:
        await env.sql(f"ALTER DATABASE {env.database.url.database} RESET synchronous_commit")
