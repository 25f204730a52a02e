"""What a transaction's end decides, without a database or a storage."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table
from sqlalchemy.orm import SessionTransaction

from granite_storage import StorageManager
from granite_storage.orm import Attachment, AttachmentType, bulk
from granite_storage.orm._interfaces import Binding, StoredObject, add_binding, remove_binding
from granite_storage.orm._util import deferred_cancellation
from granite_storage.orm.attachment import Owner
from granite_storage.orm.columns import Tables, attachment_tables
from granite_storage.orm.transactions import Outcome, UnitOfWork
from granite_storage.refs import StoredObjectRef


class Transaction:
    """As much of a session's transaction as the unit of work looks at."""

    def __init__(self, parent: Transaction | None = None, *, nested: bool = False) -> None:
        self.parent = parent
        self.nested = nested


def transaction(parent: Any = None) -> SessionTransaction:
    return cast(SessionTransaction, Transaction(parent, nested=parent is not None))


def stored(name: str) -> StoredObject:
    ref = StoredObjectRef.from_dict({"storage_key": "docs", "backend": "store", "location": name, "size": 1})
    return StoredObject(cast(StorageManager, None), ref)


def put(unit: UnitOfWork, where: SessionTransaction, *names: str) -> list[Attachment]:
    """Let rows take new objects."""
    made = []
    for name in names:
        attachment, item = Attachment(b"x"), stored(name)
        attachment._state.correct(item.ref)
        unit.frame(where).puts.append((item, attachment))
        unit.frame(where).log.append((item, True))
        made.append(attachment)
    return made


def displace(unit: UnitOfWork, where: SessionTransaction, name: str) -> None:
    unit.frame(where).log.append((stored(name), False))


def removed(unit: UnitOfWork, root: SessionTransaction, outcome: Outcome) -> set[str]:
    return {item.ref.location for item in unit.end(unit.close(root), outcome)}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [(Outcome.COMMITTED, {"old"}), (Outcome.ROLLED_BACK, {"new"}), (Outcome.UNKNOWN, set())],
)
def test_replacement(outcome: Outcome, expected: set[str]) -> None:
    unit, root = UnitOfWork(), transaction()
    put(unit, root, "new")
    displace(unit, root, "old")
    assert removed(unit, root, outcome) == expected


def test_last_word_counts() -> None:
    unit, root = UnitOfWork(), transaction()
    displace(unit, root, "old")
    unit.frame(root).log.append((stored("old"), True))
    put(unit, root, "new")
    displace(unit, root, "new")
    assert removed(unit, root, Outcome.COMMITTED) == {"new"}


@pytest.mark.parametrize(
    ("released", "outcome", "expected"),
    [
        (True, Outcome.COMMITTED, {"old"}),
        (True, Outcome.ROLLED_BACK, {"new"}),
        (False, Outcome.COMMITTED, {"new"}),
        (False, Outcome.ROLLED_BACK, {"new"}),
        (False, Outcome.UNKNOWN, set()),
    ],
)
def test_savepoint(released: bool, outcome: Outcome, expected: set[str]) -> None:
    unit, root = UnitOfWork(), transaction()
    inner = transaction(root)
    put(unit, inner, "new")
    displace(unit, inner, "old")
    unit.frames[inner].committed = released
    unit.end_savepoint(inner)
    assert removed(unit, root, outcome) == expected


def test_savepoint_that_never_ended() -> None:
    unit, root = UnitOfWork(), transaction()
    inner = transaction(root)
    (attachment,) = put(unit, inner, "new")
    assert removed(unit, root, Outcome.ROLLED_BACK) == {"new"}
    assert attachment.is_pending


def test_history() -> None:
    unit, root = UnitOfWork(), transaction()
    key = stored("old").key
    assert unit.history == {}
    displace(unit, root, "old")
    assert unit.history == {key: False}
    unit.flush.log.append((stored("old"), True))
    assert unit.history == {key: True}
    unit.abandon_flush()
    assert unit.history == {key: False}


def test_abandoned_flush_leaves_its_objects_to_nobody() -> None:
    unit, root = UnitOfWork(), transaction()
    attachment, item = Attachment(b"x"), stored("new")
    attachment._state.correct(item.ref)
    unit.frame(root).puts.append((item, attachment))
    unit.flush.puts.append((item, attachment))
    unit.flush.log += [(item, True), (stored("old"), False)]
    unit.abandon_flush()
    assert attachment._state.owner is Owner.NONE
    assert removed(unit, root, Outcome.COMMITTED) == {"new"}
    assert attachment.is_pending


def test_unit_does_not_hold_its_transactions() -> None:
    unit, root = UnitOfWork(), transaction()
    unit.frame(transaction(root))
    del root
    assert not unit.frames


class TestTables:
    def make(self) -> tuple[MetaData, Tables]:
        metadata = MetaData()

        def table(name: str, *columns: Any) -> None:
            Table(name, metadata, Column("id", Integer, primary_key=True), *columns)

        table("root")
        table("middle", Column("up", ForeignKey("root.id", ondelete="cascade")))
        table("leaf", Column("up", ForeignKey("middle.id", ondelete="CASCADE")), Column("file", AttachmentType("docs")))
        table("kept", Column("up", ForeignKey("root.id")), Column("file", AttachmentType("docs")))
        table("other")
        return metadata, attachment_tables(metadata)

    def test_concerns(self) -> None:
        metadata, tables = self.make()
        assert {name for name, table in metadata.tables.items() if tables.concerns(table)} == {"root", "middle", "leaf", "kept"}

    def test_cascades(self) -> None:
        metadata, tables = self.make()
        found = {name: [key.table.name for key in tables.cascades(table)] for name, table in metadata.tables.items()}
        assert found == {"root": ["middle"], "middle": ["leaf"], "leaf": [], "kept": [], "other": []}

    def test_tables_declared_later(self) -> None:
        metadata, tables = self.make()
        assert not tables.concerns(metadata.tables["other"])
        Table("late", metadata, Column("id", ForeignKey("other.id", ondelete="CASCADE")), Column("file", AttachmentType("docs")))
        assert attachment_tables(metadata).concerns(metadata.tables["other"])

    def test_table_of_the_same_name_in_another_metadata(self) -> None:
        (ours, _), (other, _) = self.make(), self.make()
        binding = cast(Binding, SimpleNamespace(metadata=ours))
        add_binding(binding)
        try:
            assert bulk._tables_of(ours.tables["leaf"]) is attachment_tables(ours)
            assert bulk._tables_of(other.tables["leaf"]) is None
        finally:
            remove_binding(binding)


async def test_a_deferred_cancellation_comes_at_the_next_await() -> None:
    """What must be done in an event is done, and the task is cancelled all the same."""
    done = reached = False

    async def work() -> None:
        nonlocal done, reached
        with deferred_cancellation():
            await asyncio.sleep(10)
        done = True
        await asyncio.sleep(10)
        reached = True

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (done, reached) == (True, False)
