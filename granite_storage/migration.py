"""Moves objects from one backend to another while the application keeps running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from sqlalchemy import ColumnElement, Connection, LargeBinary, Text, Update, bindparam, cast, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from granite_storage._jobs import (
    MOST_KEPT,
    Budget,
    RowReport,
    RowRun,
    Rows,
    ends_run,
    rate_limited,
    require_in_force,
    require_mounted,
    retry_unavailable,
)
from granite_storage._tasks import shielded_cleanup
from granite_storage.exceptions import (
    ConfigurationError,
    ObjectNotFoundError,
    StaleAttachmentError,
    StorageError,
)
from granite_storage.locations import matches_generated_name, uuid7_hex
from granite_storage.orm import flush, transactions
from granite_storage.orm._interfaces import Intent
from granite_storage.orm._util import codes_of
from granite_storage.orm.attachment import Attachment, AttachmentState
from granite_storage.orm.columns import AttachmentType, StoredObjectRefType
from granite_storage.orm.flush import write_displaced
from granite_storage.orm.locking import RowRef, among
from granite_storage.orm.references import RowValue, RowValues, as_stored, asked_to_the_end, keeping_other_columns
from granite_storage.orm.uploads import Upload, remove, store, stored_object
from granite_storage.refs import StoredObjectRef, iter_refs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from granite_storage._engine import PreparedUpload
    from granite_storage.manager import StorageManager
    from granite_storage.orm._interfaces import ColumnType
    from granite_storage.orm.binding import StorageBinding
    from granite_storage.orm.transactions import Frame

__all__ = ["MigratedObject", "Migration", "MigrationReport", "MigrationStatus", "migrate", "relocate"]


_CONCURRENCY = 8
_TRIES = 5
_MOST_PASSES = 20
_REFUSED = ("42501", "42809", 1142, 1143)
"""The role may not change the table or the column, or it is a materialized view."""


class MigrationStatus(StrEnum):
    """The outcome for a reference to an object on another backend."""

    MOVED = "moved"
    CHANGED = "changed meanwhile"
    FAILED = "failed"
    MANUAL = "left to the application"


@dataclass(frozen=True, slots=True)
class MigratedObject:
    """A reference that a migration has processed.

    Attributes:
        status: What became of it.
        table: The table's name, with its schema where it has one.
        primary_key: The row's primary key.
        column: The column's name.
        ref: What the column contained, where that was a ref.
        message: Why the object was not moved.
    """

    status: MigrationStatus
    table: str
    primary_key: tuple[Any, ...]
    column: str
    ref: StoredObjectRef | None
    message: str = ""


@dataclass(slots=True)
class MigrationReport(RowReport):
    """The results of a migration; `rows`, `key` and `unseen` are those of every job over rows.

    Attributes:
        passes: How many passes were started.
        moved: How many objects were moved, variants included.
        bytes_moved: How many bytes they have.
        changed: How many references a writer replaced or removed before their object could be moved.
        manual: How many references are in plain columns of refs, which only the application may change.
        failed: How many could not be moved.
        failures: The first thousand of those.
        complete: Whether it has ended: a whole pass found nothing more that could be moved, and could see all rows.
    """

    passes: int = 0
    moved: int = 0
    bytes_moved: int = 0
    changed: int = 0
    manual: int = 0
    failed: int = 0
    failures: list[MigratedObject] = field(default_factory=list)


class Migration(RowRun[MigratedObject, MigrationReport]):
    """The result of `migrate`: iterate over it for the objects that it processes, or await it for the report."""

    def __init__(self, rows: Rows, storage_key: str, to_backend: str) -> None:
        super().__init__(MigrationReport(), rows)
        self._storage_key = storage_key
        self._to_backend = to_backend
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._failed: set[tuple[str, str, tuple[Any, ...], Any]] = set()
        self._first_whole_pass = 1 if rows.after is None else 2

    async def waiting(self) -> dict[str, tuple[int, int]]:
        """Return the number of objects to move and their bytes, by their backend, without changing anything."""
        found: dict[str, tuple[int, int]] = {}
        async with aclosing(self._scan.rows(after=self.report.key)) as rows:
            async for row in rows:
                for held in row.values:
                    if held.is_managed and held.ref is not None and self._concerns(held):
                        for ref in iter_refs(held.ref):
                            number, size = found.get(ref.backend, (0, 0))
                            found[ref.backend] = number + 1, size + ref.size
        self.report.unseen = list(self._scan.unseen)
        return found

    async def _items(self) -> AsyncGenerator[MigratedObject, None]:
        """Pass over the rows until nothing is left to do: rows may exchange their files behind a pass."""
        report = self.report
        while not (self.has_ended or self._stopped or report.passes == _MOST_PASSES):
            before = report.moved + report.changed
            report.passes += 1
            is_whole = report.passes >= self._first_whole_pass
            async with aclosing(self._process_rows(None if is_whole else report.key)) as items:
                async for moved in items:
                    yield moved
            report.complete = self._end(is_whole=is_whole and report.moved + report.changed == before)

    def _record(self, item: MigratedObject) -> None:
        report = self.report
        match item.status:
            case MigrationStatus.MOVED:
                sizes = [ref.size for ref in iter_refs(item.ref)] if item.ref is not None else []
                report.moved += len(sizes)
                report.bytes_moved += sum(sizes)
            case MigrationStatus.CHANGED:
                report.changed += 1
            case MigrationStatus.MANUAL:
                report.manual += 1
            case MigrationStatus.FAILED:
                report.failed += 1
                if len(report.failures) < MOST_KEPT:
                    report.failures.append(item)

    def _concerns(self, held: RowValue) -> bool:
        """Return whether a value is to be moved, or to be reported because it cannot be read; not again where it has failed."""
        if (held.table_name, held.column.name, held.primary_key, held.raw) in self._failed:
            return False
        if not held.is_managed and self.report.passes != self._first_whole_pass:
            return False  # each is reported once
        if held.ref is None:
            return True
        is_elsewhere = any(ref.backend != self._to_backend for ref in iter_refs(held.ref))
        return held.ref.storage_key == self._storage_key and is_elsewhere

    async def _process_row(self, row: RowValues) -> list[MigratedObject]:
        return [await self._migrate_value(held) for held in row.values if self._concerns(held)]

    async def _migrate_value(self, held: RowValue) -> MigratedObject:
        dealt_with = await self._try_to_move(held)
        if dealt_with.status is MigrationStatus.FAILED:
            self._failed.add((held.table_name, held.column.name, held.primary_key, held.raw))
        return dealt_with

    async def _try_to_move(self, held: RowValue) -> MigratedObject:
        """Move what a column contains; where a writer has changed it, what it contains then, unless that needs no move."""
        if not held.is_managed:
            return _to_migrated(MigrationStatus.MANUAL, held, "only the application may change a plain column of refs")
        if held.other_schema is not None and held.other_schema.doubt:
            return _to_migrated(MigrationStatus.FAILED, held, held.other_schema.doubt)
        error: Exception | None = None
        for _ in range(_TRIES):
            if held.ref is None:
                return _to_migrated(MigrationStatus.FAILED, held, held.error)
            error = None
            try:
                if await retry_unavailable(partial(self._relocate, held, held.ref.location)):
                    return _to_migrated(MigrationStatus.MOVED, held)
            except (StorageError, SQLAlchemyError) as problem:
                if ends_run(problem):
                    raise
                error = problem
            found = await self._scan.read_again(held)
            if found is None or not self._concerns(found):
                return _to_migrated(MigrationStatus.CHANGED, held, "a writer changed it first")
            if error is not None and found.raw == held.raw and not _is_transient(error):
                if isinstance(error, ObjectNotFoundError):
                    for backend in {ref.backend for ref in iter_refs(held.ref)}:
                        await require_mounted(backend, self._binding.manager.backend(backend))
                return _to_migrated(MigrationStatus.FAILED, held, _describe(error, held.ref))
            held = found
        return _to_migrated(MigrationStatus.CHANGED, held, error or f"writers changed it first, {_TRIES} times")

    async def _relocate(self, held: RowValue, location: str) -> bool:
        # Of two transactions at a time that move rows of one object, each would see the other's row still refer to it.
        async with self._locks.setdefault(location, asyncio.Lock()):
            return await relocate(self._binding, held, self._budget)


def migrate(
    binding: StorageBinding,
    *,
    storage_key: str,
    to_backend: str,
    concurrency: int = _CONCURRENCY,
    after: str | None = None,
    bytes_per_second: float | None = None,
    schemas: Collection[str] = (),
) -> Migration:
    """Move the objects of a storage key to another backend, while the application keeps reading and writing.

    An object and its variants move together, or not at all: if one of them cannot be copied, the row is left unchanged.

    The policy must already write to the new backend in every process, or new files would keep arriving on the old one. Each
    object on any other backend is copied, and its checksum verified on the way; its row gets the copy's ref by a compare-and-set;
    and the old object is deleted like one that was replaced: after the commit, or with a journal after its retention. A writer
    that replaces or deletes the file meanwhile wins, and the copy is deleted. At every moment each row refers to an existing
    object. The location, the backend and its keys in `extra` change; name, media type, age and the application's own keys stay.

    It may be stopped, cancelled or killed at any time; another run completes the work. To go back, let the policy write to the
    old backend again, and migrate to that. Plain columns of refs are left to the application, because only it knows where else
    a ref is stored.

    Rows are moved in the schema that the sessions lead to, and then in every other schema of the database that has the table,
    as those of tenants. One whose refs do not say that they are of a store of this application is left unchanged, and each of
    its rows is a failure, unless `schemas` names it. What cannot be read is in `report.unseen`, and `report.complete` is false.

    Args:
        binding: The result of `bind_storage(..., session_factory=...)`; it must be active.
        storage_key: The policy whose objects are moved.
        to_backend: The key of the backend to move them to.
        concurrency: How many rows are processed at a time.
        after: The `report.key` of an earlier run, to continue after it; the rows before it are re-checked at the end.
        bytes_per_second: The most bytes that are copied per second; None for no limit.
        schemas: The schemas, by their names in the database; empty for all. Tables in a schema that is named count as the
            application's own.

    Returns:
        A job: `async for moved in migrate(...)` yields each object as it is processed, `await migrate(...)` returns the report.

    Raises:
        UnknownPolicyError: There is no such policy.
        ConfigurationError: The policy writes to another backend, the binding has no sessions or is not active, a table has no
            primary key, or `after` is not a key of it; while it runs: a schema has none of the tables.
        BackendUnavailableError: While it runs: a backend is unavailable, or a local folder has no marker file.
        StorageFullError: While it runs: the new backend is full.
    """
    policy = binding.manager.policy(storage_key)
    if policy.backend_key != to_backend:
        raise ConfigurationError(
            f"the policy {storage_key!r} writes to the backend {policy.backend_key!r}, so new files would keep arriving"
            f" there: let it write to {to_backend!r} in every process first, and keep {policy.backend_key!r} until all are moved"
        )
    require_in_force(binding)
    return Migration(Rows(binding, concurrency, after, bytes_per_second, schemas), storage_key, to_backend)


def _is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed though the row has not changed: after a lock, a deadlock, a short lease."""
    if isinstance(error, DBAPIError) and not codes_of(error).isdisjoint(_REFUSED):
        return False
    return isinstance(error, SQLAlchemyError | StaleAttachmentError)


def _describe(error: Exception, ref: StoredObjectRef) -> str:
    """Return what an error says, and where it is about a variant, what to do: the original stays where it is because of it."""
    location = getattr(error, "location", None)
    name = next((name for name, variant in (ref.variants or {}).items() if variant.location == location), None)
    if name is None:
        return str(error)
    return (
        f"the variant {name!r} cannot be copied, so its original stays as well: {error}; make the variant again, and run the"
        " migration once more"
    )


def _to_migrated(status: MigrationStatus, held: RowValue, message: object = "") -> MigratedObject:
    return MigratedObject(status, held.table_name, held.primary_key, held.column.name, held.ref, str(message))


# Moving one object: copy, swap, and only then delete the original.
#
# The copy is an upload like any other, with an intent where there is a journal. The swap is one transaction: an UPDATE that
# hits only where the column still contains exactly what was copied; the copy's intent is consumed; and the old object is
# displaced, as by a replacement. The end of the transaction decides what the same hooks delete: committed, the old object;
# rolled back, or where the row has changed, the copy; unknown, neither.


async def relocate(binding: StorageBinding, held: RowValue, budget: Budget) -> bool:
    """Copy the object of an attachment column and its variants to where its policy writes now; let the row refer to the copies.

    All of them are copied, whichever backend they are on: a variant belongs to the location of its original, which changes.

    Args:
        binding: The binding in force for the base.
        held: What the column holds.
        budget: How many bytes per second pass on their way.

    Returns:
        Whether the row refers to the copies now; False where a writer was faster, and then nothing is left of them.

    Raises:
        StorageError: An object could not be copied, or is not what its ref says; nothing is left of the copies.
        SQLAlchemyError: The database refused the swap; nothing is left of the copies, except where it is unknown whether it has
            committed: then all objects stay, for the journal or the garbage collector.
    """
    column_type = held.column.type
    if (sessions := binding.own_sessions) is None or not isinstance(column_type, AttachmentType) or held.ref is None:
        raise TypeError("only objects of attachment columns can be relocated, through a binding with a session_factory")
    relocation = _Relocation(held.ref, held, budget)
    variants = held.ref.variants or {}
    states = [relocation, *(_Relocation(variant, held, budget, source=relocation) for variant in variants.values())]
    copies = [Attachment._in(state) for state in states]
    await store([Upload(copy, column_type, "", has_variants=False) for copy in copies])
    swap = _Swap(held, held.ref, list(variants), copies)
    try:
        return await _commit(sessions, swap)
    finally:
        if not swap.is_told:
            await shielded_cleanup(_discard_copies(copies), "deleting copies that their row could not be told of")


@asked_to_the_end
async def _commit(sessions: async_sessionmaker[AsyncSession], swap: _Swap) -> bool:
    async with sessions() as session:
        if await session.run_sync(swap):
            await session.commit()
            return True
        await session.rollback()
        return False


async def _discard_copies(copies: Sequence[Attachment]) -> None:
    stored = [stored_object(copy) for copy in copies]
    plain = [item for item in stored if item.intent is None]
    await remove(plain, [item.intent for item in stored if item.intent is not None])


class _Relocation(AttachmentState):
    """The state of a pending attachment that becomes a copy of what a row holds, on the backend that its policy names now.

    Args:
        original: The ref of what is copied.
        held: What the row holds.
        budget: How many bytes per second pass on their way.
        source: The copy of its original, which is prepared before, where it is a variant.
    """

    def __init__(self, original: StoredObjectRef, held: RowValue, budget: Budget, *, source: _Relocation | None = None) -> None:
        self._original = original
        self._held = held
        self._budget = budget
        self._source = source
        self.location: str | None = None

    def prepare(self, manager: StorageManager, column_type: ColumnType, entity_id: str) -> PreparedUpload:
        """Decide where the copy will be: below the same names, and whatever it is, for it was let in once."""
        storage_key = (self._source or self)._original.storage_key
        names = _names_of(self._held, self._original)
        prepared = manager._engine.prepare_copy(self._original, storage_key=storage_key, **names)
        prepared = replace(prepared, policy=replace(prepared.policy, max_size=None), checks=None)
        if self._source is not None:
            prepared = replace(prepared, source=self._source.location, recipe=self._original.recipe)
        self.location = prepared.location
        return prepared

    async def put(self, manager: StorageManager, column_type: ColumnType, prepared: PreparedUpload) -> None:
        """Copy what the row holds to the prepared location."""
        async with manager.open(self._original, verify=True) as reader, aclosing(rate_limited(reader, self._budget)) as chunks:
            copy = await manager._engine.put(prepared, chunks)
            # Before the reader is closed: a cancellation that comes then has to find what is stored.
            self._store(_keep_metadata(self._original, copy), column_type)


def _keep_metadata(original: StoredObjectRef, copy: StoredObjectRef) -> StoredObjectRef:
    """Return the copy's ref with what the original's says of the file: its name, its age, and what newer versions wrote."""
    moved = {"backend": copy.backend, "location": copy.location, "size": copy.size, "checksum": copy.checksum}
    said = original.with_variants(None).to_dict()
    ref = StoredObjectRef.from_dict({**said, **moved, "extra": copy.to_dict()["extra"]})
    return ref.with_identity(copy.identity)


def _names_of(held: RowValue, ref: StoredObjectRef) -> dict[str, Any]:
    """Return the segments of the copy's location: those of the original, where the library has generated them."""
    segments = ref.location.split("/")
    if matches_generated_name(ref.location) and len(segments) > 3:
        return dict(zip(("model_name", "entity_id", "field_name"), segments[-4:-1], strict=True))
    return {"model_name": str(held.table.name), "entity_id": uuid7_hex(), "field_name": str(held.column.name)}


class _Swap:
    """The statements of the transaction that lets a row refer to the copies; run inside a session.

    Args:
        held: What the column holds.
        original: Its ref.
        names: The names of its variants.
        copies: The copy of the object, and those of its variants.
    """

    def __init__(self, held: RowValue, original: StoredObjectRef, names: Sequence[str], copies: Sequence[Attachment]) -> None:
        self._held = held
        self._original = original
        self._copies = copies
        own, *variants = [copy.ref for copy in copies]
        self._ref = own.with_variants(dict(zip(names, variants, strict=True)))
        self.is_told = False

    def __call__(self, session: Session) -> bool:
        held = self._held
        connection = session.connection(bind_arguments={"clause": held.table})
        transactions.require_transactions(connection)
        transactions.watch(session, connection)
        frame = transactions.unit_of(session).frame(flush.current_transaction(session))
        stored = [stored_object(copy) for copy in self._copies]
        frame.puts += zip(stored, self._copies, strict=True)
        self.is_told = True
        statement = _compare_and_set(held, self._ref, connection)
        # With options of the statement alone: the journal would take a map of the connection for that of a writer.
        if connection.execute(statement, execution_options=held.options).rowcount != 1:
            return False
        frame.log += [(item, True) for item in stored]
        self._consume_intents(connection, [item.intent for item in stored if item.intent is not None], frame)
        original = RowRef(held.table, held.primary_key, held.column, self._original)
        write_displaced(connection, flush.displace(frame, [original]))
        return True

    def _consume_intents(self, connection: Connection, consumed: Sequence[Intent], frame: Frame) -> None:
        if consumed:
            journal, column = consumed[0].journal, self._held.column
            journal.intents.consume(connection, [intent.id for intent in consumed])
            if journal.intents.enqueue(connection, [(column, self._ref)], [(column, self._original)]):
                frame.wakes.add(journal)


def _compare_and_set(held: RowValue, ref: StoredObjectRef, connection: Connection) -> Update:
    """Return an UPDATE that hits only a row with exactly the same value; columns with `onupdate` keep their values."""
    table = held.table
    statement = update(table).where(among(table, [held.primary_key]), _still_holds(held, connection))
    new = bindparam(None, ref, type_=StoredObjectRefType())
    return statement.values({held.column: new, **keeping_other_columns(held.column)})


def _still_holds(held: RowValue, connection: Connection) -> ColumnElement[bool]:
    """Compare with what was read: PostgreSQL prints the same JSON the same way; the others keep the text, whose bytes count."""
    stored, read = as_stored(held.column, connection.dialect), bindparam(None, held.raw, type_=Text())
    if connection.dialect.name in ("postgresql", "sqlite"):
        return stored == read
    return cast(stored, LargeBinary) == cast(read, LargeBinary)
