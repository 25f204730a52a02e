"""What a flush does with objects: read the session's state, decide, and upload, move, copy and displace.

`plan_uploads` and `plan_flush` decide, without I/O.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Connection, Engine, Table, text
from sqlalchemy.exc import NoReferenceError
from sqlalchemy.orm import InstanceState, Mapper, PassiveFlag, Session
from sqlalchemy.orm.unitofwork import UOWTransaction

from granite_storage._documentation import Page
from granite_storage._telemetry import traced
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError, ObjectNotFoundError, StaleAttachmentError
from granite_storage.locations import uuid7_hex
from granite_storage.orm._interfaces import Intent, Journal, ObjectKey, StoredObject, binding_for, find_binding
from granite_storage.orm._util import (
    UNTRANSLATED,
    attached_databases,
    connection_of,
    group,
    in_greenlet,
    quoted_name,
    require_wait,
    root_engine,
    schema_on,
    wait,
)
from granite_storage.orm.attachment import Attachment, Owner, Status
from granite_storage.orm.columns import AttachmentType, Slot, attachment_tables, keys_of, primary_key_of, slots_of
from granite_storage.orm.locking import CountedDeletes, RowRef, find_cascaded, lock_rows, read_refs, read_rows, refers
from granite_storage.orm.transactions import (
    UNKNOWN,
    Change,
    Displacement,
    FlushState,
    Frame,
    LogEntry,
    UnitOfWork,
    put_value,
    require_transactions,
    watch,
)
from granite_storage.orm.uploads import Upload, ids_by_journal, store, stored_object
from granite_storage.refs import StoredObjectRef, iter_refs

# What a flush is to do with the objects of the values that it writes.
#
# `plan_uploads` decides before a connection is held: which values are uploaded, and which objects other rows certainly keep, so
# that copies are made. `plan_flush` decides once the rows are locked and the objects that they lose are known: which of those
# move to another row, and which are copied after all.


C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Assigned(Generic[C]):
    """A value that a flush writes into a row, and what is known of its object.

    Attributes:
        change: The change that writes it.
        value: Identifies the value: one may be assigned to several rows.
        object: Identifies its object; None while it is pending.
        is_unowned: Whether the object was stored before the transaction, and no row has taken it.
        is_restored: Whether it cancels the pending delete of its object.
        is_of_another_manager: Whether the column's manager is another one than that of the object.
        is_replaced: Whether the flush replaces or clears it in another row, as far as the session knows.
    """

    change: C
    value: Hashable
    object: Hashable | None
    is_unowned: bool = False
    is_restored: bool = False
    is_of_another_manager: bool = False
    is_replaced: bool = False

    @property
    def is_pending(self) -> bool:
        """Whether it is still to be uploaded."""
        return self.object is None


@dataclass(slots=True)
class UploadPlan(Generic[C]):
    """What a flush does before it holds a connection.

    Attributes:
        put: The changes whose pending values are uploaded.
        copy: The changes that get a copy, because another row certainly keeps the object.
        undecided: The changes that wait until the rows are locked.
    """

    put: list[C] = field(default_factory=list)
    copy: list[C] = field(default_factory=list)
    undecided: list[C] = field(default_factory=list)


@dataclass(slots=True)
class FlushPlan(Generic[C]):
    """What a flush does once the rows are locked.

    Attributes:
        take: The changes that assign an object which no row has had.
        move: The changes whose objects are moved here from another row.
        restore: The changes that cancel a pending delete.
        copy: The changes that get a copy.
        stale: The changes whose objects were to move, but whose rows no longer refer to them.
    """

    take: list[C] = field(default_factory=list)
    move: list[C] = field(default_factory=list)
    restore: list[C] = field(default_factory=list)
    copy: list[C] = field(default_factory=list)
    stale: list[C] = field(default_factory=list)


def plan_uploads(assigned: Iterable[Assigned[C]], *, history: Mapping[Any, bool], knows_all_rows: bool) -> UploadPlan[C]:
    """Decide what is uploaded and copied before a connection is held.

    Args:
        assigned: The values, in the order of the changes.
        history: The objects of the transaction: True if a row refers to it, False if it was displaced.
        knows_all_rows: Whether the session knows which object each row loses; otherwise nothing is copied yet.
    """
    plan: UploadPlan[C] = UploadPlan()
    uploaded: set[Hashable] = set()
    for item in assigned:
        if item.is_pending and item.value not in uploaded:
            uploaded.add(item.value)
            plan.put.append(item.change)
        elif knows_all_rows and (item.is_pending or not _may_move(item, history)):
            plan.copy.append(item.change)
        else:
            plan.undecided.append(item.change)
    return plan


def plan_flush(assigned: Iterable[Assigned[C]], *, displaced: Collection[Hashable], history: Mapping[Any, bool]) -> FlushPlan[C]:
    """Decide for each stored value whether its object is taken, moved, restored or copied, once the rows are locked.

    An object belongs to at most one row: the first change gets it, the others get copies.

    Args:
        assigned: The values, none of them pending, in the order of the changes.
        displaced: The objects that the locked rows lose.
        history: The objects of the transaction before this flush, as for `plan_uploads`.
    """
    plan: FlushPlan[C] = FlushPlan()
    is_held = {**history, **dict.fromkeys(displaced, False)}
    used: set[Hashable] = set()
    restored: set[Hashable] = set()
    for item in assigned:
        is_first = item.value not in used
        if not _may_move(item, is_held, is_first=is_first):
            plan.copy.append(item.change)
            continue
        used.add(item.value)
        if is_first and item.is_unowned:
            plan.take.append(item.change)
        elif is_held.get(item.object) is False:
            plan.move.append(item.change)
        elif is_first and item.is_restored and item.object not in restored:
            restored.add(item.object)  # the journal knows whether it waits; another row of this flush gets a copy
            plan.restore.append(item.change)
        elif item.object in is_held:
            plan.copy.append(item.change)
            continue
        else:
            plan.stale.append(item.change)
            continue
        is_held[item.object] = True
    return plan


def _may_move(item: Assigned[C], is_held: Mapping[Any, bool], *, is_first: bool = True) -> bool:
    """Return whether a row may take an object: no row refers to it, or its row loses it in this transaction."""
    if item.is_restored and is_first:
        return True
    if item.is_of_another_manager:
        return False
    return (item.is_unowned and is_first) or item.is_replaced or is_held.get(item.object) is False


# What a flush writes into the journal, in the transaction of its rows.


def write_entries(unit: UnitOfWork, frame: Frame) -> None:
    """Consume the intents of objects that rows now refer to, record the displaced ones, and what is still to be done for the new.

    The rows are written already, in the same transaction. An error here rolls the flush back with the intents that it consumed;
    the next flush that writes the ref consumes them again.
    """
    flush = unit.flush
    taken: list[Intent] = []
    displaced: list[StoredObject] = []
    moved: list[StoredObjectRef] = []
    put = {stored.key for stored, _ in flush.puts}
    for stored, held in flush.net:
        if held:
            intents = (unit.displacement(stored) or stored).intents
            taken += intents
            if not intents and stored.key not in flush.restored_by:
                moved.append(stored.ref)
        elif stored.key not in put:
            displaced.append(stored)
    for journal, ids in ids_by_journal([*taken, *flush.restored]).items():
        journal.intents.consume(flush.connections[journal], ids)
        journal.intents.require_unfenced(intent for intent in flush.restored if intent.journal is journal)
    # Whether they have lost them or not, which the worker sees.
    left = [*(entry.held for entry in flush.displaced), *(held for _, cascaded in flush.vanishing for held in cascaded)]
    for journal, connection in flush.connections.items():
        write_displaced(connection, [stored for stored in displaced if stored.intent and stored.intent.journal is journal])
        written = [(one.slot.column, one.attachment.ref) for one in flush.taken if one.binding.journal is journal]
        journal.intents.cancel(connection, moved)
        journal.intents.end_claim(connection, _claimed_locations(flush))
        if journal.intents.enqueue(connection, written, _affected(left).get(journal, ())):
            frame.wakes.add(journal)


def write_displaced(connection: Connection, displaced: Iterable[StoredObject]) -> None:
    """Record in the transaction of a connection that objects are to be deleted."""
    for journal, items in group(displaced, lambda stored: None if stored.intent is None else stored.intent.journal).items():
        if journal is not None:
            journal.intents.displace(connection, [(item.ref, journal.retention_of(item.ref)) for item in items])


def restore_deleted(unit: UnitOfWork, change: Change) -> None:
    """Assign an object that waits to be deleted to a row, by cancelling its pending delete and those of its variants.

    A variant that no longer waits to be deleted is left out: another transaction may have given it to another row, or it is gone.
    """
    state = change.attachment._state
    ref, journal = state.require_ref(), change.binding.journal
    if journal is None:
        raise ConfigurationError(
            "restoring an attachment needs a journal, and this base is bound without one: bind_storage(..., journal=...)",
            see=Page.JOURNAL,
        )
    connection = unit.flush.connections[journal]
    found = journal.intents.find_deletes(connection, [ref])
    if ref.location not in found:
        raise StaleAttachmentError(f"the object at {ref.location!r} has no pending delete, so it cannot be restored")
    if ref.variants is not None:
        waiting = journal.intents.find_deletes(connection, list(ref.variants.values()), without_fenced=True)
        kept = {name: variant for name, variant in ref.variants.items() if variant.location in waiting}
        found |= waiting
        state.correct(ref.with_variants(kept))
    stored = StoredObject(change.binding.manager, state.require_ref())
    cancelled = [Intent(journal, item, deletes=True, location=location) for location, item in found.items()]
    unit.flush.restored += cancelled
    unit.flush.restored_by[stored.key] = cancelled
    unit.flush.log.append((stored, True))
    state.take(change.slot.column_type)


def write_left(connection: Connection, frame: Frame, left: Iterable[RowRef]) -> None:
    """Record in the transaction of a connection that columns may have lost refs, for their effects."""
    for journal, lost in _affected(left).items():
        if journal.intents.enqueue(connection, (), lost):
            frame.wakes.add(journal)


def _affected(left: Iterable[RowRef]) -> dict[Journal, list[tuple[Column[Any], StoredObjectRef]]]:
    """Return the refs in columns that have effects, by their journals."""
    found: dict[Journal, list[tuple[Column[Any], StoredObjectRef]]] = {}
    for entry in left:
        column_type: AttachmentType = entry.column.type  # type: ignore[assignment]  # only attachment columns are read under locks
        if column_type.effects and (journal := column_type.binding().journal) is not None:
            found.setdefault(journal, []).append((entry.column, entry.ref))
    return found


_UNSAFE = re.compile(r"[^\w.@=+-]+")
_ENTITY_BYTES = 100


def changes_of(states: Iterable[InstanceState[Any]]) -> list[Change]:
    """Return the attachment attributes of new and changed instances that a flush will write."""
    return [change for state in states for slot in slots_of(state.mapper) if (change := _change(state, slot)) is not None]


def _change(state: InstanceState[Any], slot: Slot) -> Change | None:
    if state.key is None:
        value = state.dict.get(slot.key)
        if value is None and slot.column.default is not None:
            value = _default(state, slot)
        old = None
        if value is None:
            return None
    else:
        history = state.get_history(slot.key, PassiveFlag.PASSIVE_NO_INITIALIZE)
        if not history.has_changes():
            return None
        value = history.added[0] if history.added else None
        old = history.deleted[0] if history.deleted else UNKNOWN
    if not isinstance(value, Attachment | None):
        raise refused_value(value, slot.column_type.label)
    return Change(state, slot, value, old, slot.column_type.binding())


def _default(state: InstanceState[Any], slot: Slot) -> Any:
    """Give a new instance the default of its column, as the INSERT would."""
    default: Any = slot.column.default
    value = default.arg(_NoContext(slot.column_type.label))
    if value is not None:
        put_value(state, slot.key, value)
    return value


class _NoContext:
    """Takes the place of the statement's context: the file is uploaded before the INSERT, so there is no statement yet."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __getattr__(self, name: str) -> Any:
        raise ConfigurationError(
            f"the default of {self._label} uses the context of the INSERT, but the file is stored before that statement: make"
            " the default a function without arguments",
            see=Page.MODELS,
        )


def refused_value(value: object, label: str) -> InvalidReferenceError:
    """Return the error for a value that is neither an attachment nor None: only the manager makes refs."""
    return InvalidReferenceError(
        f"{label} is a managed attachment column and takes an Attachment or None, not {type(value).__name__}: write"
        " Attachment(content, filename=...), or Attachment.from_upload(upload)"
    )


def clear_unset_attachments(state: InstanceState[Any]) -> None:
    """Set unset attachments of a new instance to None when it replaces a deleted one with the same primary key.

    SQLAlchemy then emits an UPDATE that omits attributes which are not set, and the row would keep the old files.
    """
    for slot in slots_of(state.mapper):
        if slot.key not in state.dict:
            put_value(state, slot.key, None)


@traced("flush")
def save(
    session: Session,
    unit: UnitOfWork,
    changes: Sequence[Change],
    deletions: Sequence[InstanceState[Any]],
    dirty: Sequence[InstanceState[Any]] = (),
    lock_parents: Callable[[Session], None] | None = None,
) -> None:
    """Store, move and copy objects for the changes and deletions of a flush, before its first statement.

    Uploads come first, since the session may not hold a connection yet. Then the rows are locked and read, which decides which
    objects are displaced, which of them move to other rows, and which are copied. The parents of collections are locked before
    the rows of their files: MariaDB would find a deadlock otherwise, since the limits are counted under locks of all files.

    Args:
        session: The session.
        unit: Its unit of work.
        changes: The attachments that the flush writes.
        deletions: The instances whose rows it deletes.
        dirty: All instances whose rows it may update; see `_Locks.add_others`.
        lock_parents: Locks the parents of collections.

    Raises:
        MissingGreenlet: The session is that of an `AsyncSession`, but was made to flush without an `await`.
    """
    flush, frame = unit.flush, unit.frame(current_transaction(session))
    if any(change.value is not None for change in changes):
        require_wait("storing a file", session)
    written = [change for change in changes if change.value is not None and not flush.has_handled(change.marker, change.value)]
    replaced = {change.old.ref for change in changes if isinstance(change.old, Attachment) and change.old._state.ref is not None}
    # If every row that loses an object is known, objects that other rows keep are copied before any row is locked.
    knows_all_rows = not deletions and not any(change.old is UNKNOWN for change in changes)
    uploads = plan_uploads(
        [_assigned(change, replaced) for change in written], history=unit.history, knows_all_rows=knows_all_rows
    )
    _store_all(unit, frame, [(change, change.attachment) for change in uploads.put])
    _copy_all(session, unit, frame, uploads.copy)
    if lock_parents is not None:
        lock_parents(session)
    displaced = displace(flush, _locked_refs(session, unit, changes, deletions, dirty))
    plan = plan_flush(
        [_assigned(change, replaced) for change in uploads.undecided],
        displaced={stored.key for stored in displaced},
        history=unit.history,
    )
    _execute(session, unit, frame, plan)
    for change in changes:
        flush.handled[change.marker] = change.value
        if change.value is not None:
            _claim(flush, change.value)
            flush.taken.append(change)
    flush.deletions.update((id(state), state) for state in deletions)
    _claim_uploads(flush)


def _claim_uploads(flush: FlushState) -> None:
    """Claim the objects that a flush has stored before it writes their rows, where triggers ask for that."""
    for journal, connection in flush.connections.items():
        ids = [intent.id for stored, _ in flush.puts for intent in stored.intents if intent.journal is journal]
        if locations := _claimed_locations(flush):
            journal.intents.claim(connection, ids, locations)


def _claimed_locations(flush: FlushState) -> list[str]:
    """Return the locations of the objects that the statements of a flush may write into rows, with the variants."""
    return [one.location for attachment in flush.claims for one in iter_refs(attachment.ref)]


def _claim(flush: FlushState, attachment: Attachment) -> None:
    """Permit the statements of the flush to write the ref of an attachment."""
    attachment._state.claim()
    flush.claims.append(attachment)


def recheck_moves(session: Session, unit: UnitOfWork) -> None:
    """Copy objects that were planned to move, if their rows keep them after all; before the first statement.

    Listeners that run after the plan was made may have cancelled a delete or restored an old value.
    """
    flush = unit.flush
    moved, flush.moved = flush.moved, []
    context = None if flush.context is None else flush.context()
    if not moved or context is None:
        return
    kept = {entry.held.place for entry in flush.displaced if not _still_leaves(entry, context)}
    copied = [change for change in moved if change.is_pending and _place_of(change.attachment.ref) in kept]
    _copy_all(session, unit, unit.frame(current_transaction(session)), copied)
    for change in copied:
        _claim(flush, change.attachment)
    if copied:
        _claim_uploads(flush)


def _place_of(ref: StoredObjectRef) -> tuple[str, str]:
    return ref.backend, ref.location


def _still_leaves(displaced: Displacement, context: UOWTransaction) -> bool:
    """Return whether a flush will still remove a ref from its row, according to the instance."""
    state = displaced.state
    if state is None or state not in context.states or state.key is None:
        return False
    if primary_key_of(state, displaced.held.table) != displaced.held.primary_key:  # a listener has changed its key
        return False
    is_deleted, is_listed_only = context.states[state]
    if is_deleted:
        return not is_listed_only
    keys = [slot.key for slot in slots_of(state.mapper) if slot.column is displaced.held.column]
    return any(_has_left(state, key, displaced.held.ref) for key in keys)


def _has_left(state: InstanceState[Any], key: str, ref: StoredObjectRef) -> bool:
    history = state.get_history(key, PassiveFlag.PASSIVE_NO_INITIALIZE)
    if not history.has_changes():
        return False
    return not any(isinstance(value, Attachment) and value._state.ref == ref for value in history.added)


def end(session: Session, unit: UnitOfWork) -> None:
    """Record what a flush has done, which may differ from its plan.

    Raises:
        StaleAttachmentError: A row that it writes to was not there to be locked. SQLAlchemy does not notice where a driver does
            not report the number of rows; then no row has the file, or a row whose previous file is unknown.
    """
    flush = unit.flush
    if flush.has_missed_rows or any(counted.has_hit_others for counted in flush.counted):
        raise StaleAttachmentError(
            "another transaction has deleted a row whose file was being replaced, or inserted one again that was being deleted;"
            " the transaction may be tried again"
        )
    vanished = [_stored(held) for _, cascaded in flush.vanishing for held in cascaded]
    flush.log = written_log(session, unit, [*(stored for stored, _ in flush.log), *vanished])
    held = {stored.key for stored, is_held in flush.log if is_held}
    flush.restored = [intent for key, cancelled in flush.restored_by.items() if key in held for intent in cancelled]
    frame = unit.frame(current_transaction(session))
    write_entries(unit, frame)
    unit.end_flush(frame)


def recheck_cascades(unit: UnitOfWork) -> None:
    """Find rows that the flush itself has written below the rows that it deletes, because the database deletes those too.

    A flush writes rows before it deletes those that they depend on.
    """
    flush = unit.flush
    flush.has_written = False
    flush.vanishing += [(connection, reached()) for connection, reached in flush.cascading]


def displace(log: Frame | FlushState, held: Iterable[RowRef]) -> list[StoredObject]:
    """Record that rows no longer refer to their objects."""
    displaced = [_stored(entry) for entry in held]
    log.log += [(stored, False) for stored in displaced]
    return displaced


def _stored(entry: RowRef) -> StoredObject:
    column_type: AttachmentType = entry.column.type  # type: ignore[assignment]  # only attachment columns are read under locks
    binding = column_type.binding()
    if binding.journal is None:
        return StoredObject(binding.manager, entry.ref)
    own, *others = [binding.journal.delete_intent(ref.backend, ref.location) for ref in iter_refs(entry.ref)]
    return StoredObject(binding.manager, entry.ref, own, tuple(others))


def _copy_all(session: Session, unit: UnitOfWork, frame: Frame, changes: Sequence[Change]) -> None:
    """Store a copy of each change's attachment, and assign it to the row.

    Raises:
        StaleAttachmentError: An object is gone because its row has been given another file since the attachment was read.
        StorageError: One cannot be copied; nothing is left of the others.
    """
    copies = [change.attachment._copy() for change in changes]
    try:
        _store_all(unit, frame, list(zip(changes, copies, strict=True)))
    except ObjectNotFoundError as error:
        for change in changes:
            if change.attachment.ref.location == error.location and not _is_referred_to(session, change):
                raise StaleAttachmentError(
                    f"the object at {error.location!r} cannot be copied to {change.slot.column_type.label}, because its row has"
                    " been given another file since the attachment was read, or has been deleted: load the row again"
                ) from error
        raise
    for change, copy in zip(changes, copies, strict=True):
        change.replace(copy)


def _is_referred_to(session: Session, change: Change) -> bool:
    """Return whether a row of the column that an attachment was read from still refers to its object."""
    original = change.attachment._state.column_type
    if original.table.metadata is not change.slot.column_type.table.metadata:
        return True  # another base's, perhaps in another database: that is not known here
    return refers(connection_of(session, change.state), original.column, change.attachment.ref)


def _store_all(unit: UnitOfWork, frame: Frame, pending: Sequence[tuple[Change, Attachment]]) -> None:
    """Store attachments concurrently, or none of them, and assign them to their rows."""
    if not pending:
        return
    if not in_greenlet():
        for _, attachment in pending:
            attachment._state.require_synchronous()
    try:
        wait(store([Upload(attachment, change.slot.column_type, _entity_id(change)) for change, attachment in pending]))
    finally:
        # A signal may interrupt the wait after the uploads have ended: then the rollback deletes what they stored.
        for change, attachment in pending:
            if attachment._state.status is Status.STORED:
                _take(unit, frame, change, attachment)
                unit.flush.handled[change.marker] = attachment


def _take(unit: UnitOfWork, frame: Frame, change: Change, attachment: Attachment) -> None:
    """Assign an object that is new to the transaction to a row."""
    stored = stored_object(attachment)
    attachment._state.take(change.slot.column_type)
    frame.puts.append((stored, attachment))
    unit.flush.puts.append((stored, attachment))
    unit.flush.log.append((stored, True))


def _assigned(change: Change, replaced: set[StoredObjectRef]) -> Assigned[Change]:
    """Return what is known of the object of a value that a flush is to write."""
    value, given = change.attachment, change.attachment._state
    if given.status is Status.PENDING:
        return Assigned(change, id(value), None)
    ours, ref = change.binding.manager, given.require_ref()
    is_ours = given.owner is Owner.DELETE or given.address is change.slot.column_type
    manager = ours if is_ours else given.manager
    return Assigned(
        change,
        id(value),
        StoredObject(manager, ref).key,
        is_unowned=given.owner is Owner.NONE,
        is_restored=given.owner is Owner.DELETE,
        is_of_another_manager=manager is not ours,
        is_replaced=ref in replaced,
    )


def _locked_refs(
    session: Session,
    unit: UnitOfWork,
    changes: Sequence[Change],
    deletions: Sequence[InstanceState[Any]],
    dirty: Sequence[InstanceState[Any]],
) -> list[RowRef]:
    """Lock the rows in a fixed order, table by table, and return the refs that they hold now.

    Rows that the database deletes with them are recorded, and are read again after the flush.
    """
    locks = _Locks(session)
    for change in changes:
        rows = locks.rows(change.slot.column_type.table, change.state, deleting=False)
        rows.stores = rows.stores or change.value is not None
        if change.state.key is not None:
            rows.add(change.state, {change.slot.column})
    for state in deletions:
        for table in concerned_tables(state.mapper):
            columns = set(attachment_tables(table.metadata).attachments(table))
            locks.rows(table, state, deleting=True).add(state, columns)
    locks.add_others(dirty)
    held: list[RowRef] = []
    for connection, rows, deleting in locks.in_order():
        if rows.are_only_updated and not deleting:
            lock_rows(connection, rows.table, rows.columns_by_key, [], deleting=False)
            continue
        watch(session, connection)
        binding = binding_for(rows.table.metadata, f"the table {rows.table.name}")
        if binding.journal is not None:
            unit.flush.connections[binding.journal] = connection
        if rows.stores:
            require_transactions(connection)
        if rows.columns_by_key:
            found, missing = _lock(connection, rows, deleting=deleting)
            if found:
                require_transactions(connection)
            held += found
            states = rows.states
            unit.flush.displaced += [Displacement(connection, ref, states.get(ref.primary_key), deleting) for ref in found]
            if missing and deleting:
                unit.flush.counted.append(CountedDeletes(connection, rows.table, len(rows.columns_by_key) - len(missing)))
            elif any(rows.columns_by_key[key] for key in missing):  # of another row SQLAlchemy will say that it is gone
                unit.flush.has_missed_rows = True
            if deleting:
                reached = partial(
                    find_cascaded, connection, attachment_tables(rows.table.metadata), rows.table, rows.columns_by_key
                )
                cascading = reached()
                if cascading:
                    require_transactions(connection)
                unit.flush.vanishing.append((connection, cascading))
                unit.flush.cascading.append((connection, reached))
    return held


class _Locks:
    """The rows that a flush locks before its first statement, and their order."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._connection_of = _connections(session)
        self._rows: dict[tuple[Table, bool, Connection], _Rows] = {}

    def rows(self, table: Table, state: InstanceState[Any], *, deleting: bool) -> _Rows:
        """Return the rows of a table that are locked on the connection of an instance."""
        return self._rows.setdefault((table, deleting, self._connection_of(state)), _Rows(table))

    def add_others(self, dirty: Sequence[InstanceState[Any]]) -> None:
        """Add rows that the flush will only update, of the same tables and of those that they refer to.

        SQLAlchemy updates the rows of a table in the order of their primary keys, and those that they refer to before. A flush
        that locked some of them first and the others by its updates would deadlock with another one. Where no attachment is
        replaced or deleted, the updates have that order by themselves, unless orphans are deleted after them.
        """
        locked: set[Any] = {table for (table, _, _), rows in self._rows.items() if rows.columns_by_key}
        orphaned = {table for state in dirty if is_orphan(state) for table in concerned_tables(state.mapper)}
        if not locked and not orphaned:
            return
        near = locked.union(orphaned, *map(_referred, locked | orphaned))
        updated = [state for state in dirty if not near.isdisjoint(state.mapper.tables) and self._is_updated(state)]
        locked |= {table for state in updated if not is_orphan(state) for table in state.mapper.tables if table in orphaned}
        related = locked.union(*map(_referred, locked))
        for state in updated:
            for table in state.mapper.tables:
                if table in related:
                    self.rows(cast(Table, table), state, deleting=False).add(state, set())
        for (table, deleting, connection), rows in self._rows.items():
            others = self._rows.get((table, False, connection))
            if deleting and others is not None and others.columns_by_key:
                for key in rows.columns_by_key:
                    others.columns_by_key.setdefault(key, set())  # of which nothing is read

    def _is_updated(self, state: InstanceState[Any]) -> bool:
        """Return whether a flush updates or deletes the row of an instance; on SQLite no order is needed."""
        if not self._session.is_modified(cast(Any, state.obj()), include_collections=False):
            return False
        return self._connection_of(state).dialect.name != "sqlite"

    def in_order(self) -> list[tuple[Connection, _Rows, bool]]:
        """Return the rows by table, after those of the tables that it refers to, and those to be deleted after the others."""
        order = sorted(self._rows.items(), key=lambda item: (attachment_tables(item[0][0].metadata).rank(item[0][0]), item[0][1]))
        return [(connection, rows, deleting) for (_, deleting, connection), rows in order]


def _referred(table: Table) -> Iterator[Table]:
    """Yield the tables that a table refers to."""
    for link in table.foreign_keys:
        with suppress(NoReferenceError):  # to a table that the models do not have
            yield link.column.table


def is_orphan(state: InstanceState[Any]) -> bool:
    """Return whether a flush will delete the row of an instance because no parent has it any more."""
    return state.key is not None and bool(state.mapper._is_orphan(state))


def _connections(session: Session) -> Callable[[InstanceState[Any]], Connection]:
    """Return what finds the connections of instances; those of one class share one, except in a sharded session."""
    if session.connection_callable is not None:
        return partial(connection_of, session)
    of_class = cache(lambda mapper: session.connection(bind_arguments={"mapper": mapper}))
    return lambda state: of_class(state.mapper)


class _Rows:
    """Rows of one table that a flush touches, and the attachment columns it touches in each."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.columns_by_key: dict[tuple[Any, ...], set[Column[Any]]] = {}
        self.states: dict[tuple[Any, ...], InstanceState[Any]] = {}
        self.stores = False

    def add(self, state: InstanceState[Any], columns: set[Column[Any]]) -> None:
        key = primary_key_of(state, self.table)
        self.columns_by_key.setdefault(key, set()).update(columns)
        self.states[key] = state

    @property
    def are_only_updated(self) -> bool:
        """Whether no attachment of these rows is replaced, and none is stored."""
        return bool(self.columns_by_key) and not self.stores and not any(self.columns_by_key.values())


def _lock(connection: Connection, rows: _Rows, *, deleting: bool) -> tuple[list[RowRef], list[tuple[Any, ...]]]:
    touched = set().union(*rows.columns_by_key.values())
    columns = [column for column in rows.table.columns if column in touched]
    if deleting and not columns:
        return [], []
    found, missing = lock_rows(connection, rows.table, rows.columns_by_key, columns, deleting=deleting)
    return [entry for entry in found if entry.column in rows.columns_by_key.get(entry.primary_key, ())], missing


def _execute(session: Session, unit: UnitOfWork, frame: Frame, plan: FlushPlan[Change]) -> None:
    """Assign objects to rows as a plan says, and store its copies.

    Raises:
        ContentTooLargeError: An object is larger than the policy of its new column allows.
        StaleAttachmentError: An object was to leave a row that does not hold it any more.
    """
    for change in plan.stale:
        raise StaleAttachmentError(
            f"the object at {change.attachment.ref.location!r} was to move to another row, but its row no longer refers to it"
        )
    for change in (*plan.take, *plan.move, *plan.restore):
        change.slot.column_type.require_fit(change.attachment.ref)
    for change in plan.take:
        _take(unit, frame, change, change.attachment)
    read = {stored.key: stored.ref for stored, is_held in unit.log if not is_held} if plan.move else {}
    for change in plan.move:
        given = change.attachment
        # What was read under the lock: a worker may have changed parts of it since the session loaded the value.
        given._state.correct(read.get(StoredObject(change.binding.manager, given.ref).key, given.ref))
        given._state.take(change.slot.column_type)
        unit.flush.log.append((StoredObject(given.manager, given.ref), True))
        unit.flush.moved.append(change)
    for change in plan.restore:
        restore_deleted(unit, change)
    for change in plan.copy:
        if change.attachment._state.owner is Owner.DELETE:
            change.attachment._state.take(change.slot.column_type)
    _copy_all(session, unit, frame, plan.copy)


def concerned_tables(mapper: Mapper[Any]) -> Sequence[Table]:
    """Return the tables of a mapper that have attachments, or whose deletes cascade to tables that have."""
    # A class may be mapped to a join of tables.
    table = next((table for table in mapper.tables if isinstance(table, Table)), None)
    binding = None if table is None else find_binding(table.metadata)
    return () if binding is None else attachment_tables(binding.metadata).concerned(mapper)


def _entity_id(change: Change) -> str:
    """Return the segment of the location that says which row it is."""
    instance = change.state.obj()
    if change.slot.column_type.entity_id is not None:
        return str(change.slot.column_type.entity_id(instance))
    values = [_primary_key_value(change.state, column) for column in change.state.mapper.primary_key]
    if change.state.key is not None:  # an expired row's values are not loaded
        values = [known if value is None else value for value, known in zip(values, change.state.key[1], strict=True)]
    if any(value is None for value in values):
        return uuid7_hex()
    cut = _UNSAFE.sub("_", "-".join(map(str, values))).encode()[:_ENTITY_BYTES].decode(errors="ignore")
    segment = cut.strip(". ")
    # "None" in a location would look like an unknown key, so a key with that text gets a generated segment.
    return segment if segment not in ("", "None") else uuid7_hex()


def _primary_key_value(state: InstanceState[Any], column: Any) -> Any:
    """Return a primary key value where it is known before the INSERT; a client-side default is computed for it."""
    key = state.mapper.get_property_by_column(column).key
    value = state.dict.get(key)
    default = column.default
    if value is not None or default is None or state.key is not None:
        return value
    if default.is_scalar:
        value = default.arg
    elif default.is_callable:
        try:
            value = default.arg(None)
        except Exception:  # noqa: BLE001  # a default that needs the statement's context is computed by the INSERT
            return None
    if value is not None:
        put_value(state, key, value)
    return value


def current_transaction(session: Session) -> Any:
    """Return the savepoint or transaction that the session's work belongs to now."""
    if not session.in_transaction():
        session.begin()
    return session.get_nested_transaction() or session.get_transaction()


# What a flush has written and deleted, according to its rows.
#
# Between the plan of a flush and its statements, listeners of the application, cascades of SQLAlchemy and triggers of the
# database can change the outcome: a row that was to be deleted is kept, an old value is restored, a new row is expunged. An
# object is displaced only after its row was read and no longer refers to it.


def written_log(session: Session, unit: UnitOfWork, planned: Iterable[StoredObject]) -> list[LogEntry]:
    """Return what the statements of a flush have done to objects; attachments that no row refers to can be assigned again.

    Args:
        session: The session.
        unit: Its unit of work.
        planned: The objects that the flush planned to store, move or displace.

    Raises:
        StaleAttachmentError: Two rows refer to one object, because the row that it was moved from still refers to it.
    """
    flush = unit.flush
    is_certain = _certain(session, flush)
    holders = _read(session, flush, is_certain)
    puts = {stored.key: attachment for stored, attachment in flush.puts}
    taken = {stored.key: stored for stored, is_held in flush.log if is_held}
    certain = {key for key, attachment in puts.items() if attachment.ref in is_certain}
    log: list[LogEntry] = []
    for key, stored in {stored.key: stored for stored in planned}.items():
        if holders[key] > 1 and key in taken:
            raise StaleAttachmentError(
                f"the object at {stored.ref.location!r} was to move to another row, but its own row still refers to it after the"
                " flush: a listener or a trigger has restored that row; flush the two changes one after the other, and the"
                " second row gets a copy"
            )
        if holders[key] or key in certain:
            claimed = taken.get(key) or unit.displacement(stored)
            log += [] if claimed is None else [(claimed, True)]
        elif key in puts:
            puts[key]._state.release()
        else:
            log.append((unit.origin(stored), False))
    return log


def _certain(session: Session, flush: FlushState) -> set[StoredObjectRef]:
    """Return the refs that rows hold for certain, because nothing in the flush or in the database can have removed them.

    If the flush neither deletes nor replaces rows, only triggers can; rows of tables with triggers are read. A row that is not
    found, such as one that row-level security hides, is assumed to hold what was written.
    """
    if flush.deletions or flush.has_successors:
        return set()
    written = [change for change in flush.taken if change.attachment._state.is_written]
    return {change.attachment.ref for change in written} - _taken_away(session, written)


def _taken_away(session: Session, written: Sequence[Change]) -> set[StoredObjectRef]:
    """Return the refs that a trigger has replaced in their rows by another value."""
    find_connection = _connections(session)
    present = [change for change in written if change.state.obj() is not None]
    by_table = group(present, lambda change: (find_connection(change.state), change.slot.column.table))
    lost: set[StoredObjectRef] = set()
    for (connection, table), changes in by_table.items():
        if has_triggers(connection, table):
            keys = {id(change): keys_of(change.state, table) for change in changes}
            columns = list(dict.fromkeys(change.slot.column for change in changes))
            rows = read_rows(connection, table, {key for some in keys.values() for key in some if None not in key}, columns)
            for change in changes:
                seen = [rows[key][change.slot.column] for key in keys[id(change)] if key in rows]
                if seen and all(_is_another(value, change.attachment.ref) for value in seen):
                    lost.add(change.attachment.ref)
    return lost


def _is_another(value: Any, ref: StoredObjectRef) -> bool:
    """Return whether a column holds NULL or another object; a value that cannot be decoded may be this one."""
    if not isinstance(value, Attachment):
        return value is None
    held = value._state.ref
    return held is not None and held.location != ref.location


def _read(session: Session, flush: FlushState, certain: set[StoredObjectRef]) -> Counter[ObjectKey]:
    """Return how many rows of the flush refer to each object now."""
    wanted: dict[tuple[Connection, Table], tuple[set[tuple[Any, ...]], set[Column[Any]]]] = {}

    def want(connection: Connection, column: Column[Any], *given: tuple[Any, ...]) -> None:
        keys, columns = wanted.setdefault((connection, column.table), (set(), set()))
        keys.update(key for key in given if None not in key)
        columns.add(column)

    for displaced in flush.displaced:
        if not _is_surely_deleted(flush, displaced):
            held, state = displaced.held, displaced.state
            want(displaced.connection, held.column, held.primary_key)
            if state is not None and not displaced.deletes:
                want(displaced.connection, held.column, *keys_of(state, held.table))
    for connection, vanishing in flush.vanishing:
        for held in vanishing:
            want(connection, held.column, held.primary_key)
    puts = {attachment.ref for _, attachment in flush.puts}
    for change in flush.taken:
        if change.attachment.ref not in puts or change.attachment.ref not in certain:
            instance = change.state.obj()
            if instance is not None:  # otherwise it was garbage-collected and not flushed
                column = change.slot.column
                want(connection_of(session, change.state), column, *keys_of(change.state, column.table))
    counted: Counter[ObjectKey] = Counter()
    for (connection, table), (keys, columns) in wanted.items():
        found = read_refs(connection, table, keys, [column for column in table.columns if column in columns])
        # A row may have been requested by two spellings of its key.
        counted.update(_stored(held).key for held in {(held.primary_key, held.column): held for held in found}.values())
    return counted


def _is_surely_deleted(flush: FlushState, displaced: Displacement) -> bool:
    """Return whether a row need not be read because it is deleted for certain.

    MariaDB and MySQL skip no DELETE silently, and reading a deleted row there would lock the gap that it leaves.
    """
    context = None if flush.context is None else flush.context()
    if not displaced.deletes or context is None or displaced.connection.dialect.name not in ("mysql", "mariadb"):
        return False
    return context.states.get(displaced.state) == (True, False)


# Triggers: whether the database may have changed what the flush wrote.


_SECONDS = 60.0
"""How long an answer is cached. A trigger created meanwhile can leave an orphan to the garbage collector, and loses no object."""

_POSTGRESQL = text("""
    SELECT EXISTS (
        SELECT 1 FROM pg_trigger WHERE NOT tgisinternal AND strpos(CAST(tgname AS text), 'granite_storage_') = 0
            AND (tgrelid = to_regclass(:name) OR tgrelid IN (SELECT relid FROM pg_partition_tree(to_regclass(:name))))
    ) OR EXISTS (SELECT 1 FROM pg_class WHERE oid = to_regclass(:name) AND relkind = 'r' AND relhasrules)
""")
_MARIADB = text("""
    SELECT EXISTS (
        SELECT 1 FROM information_schema.triggers
        WHERE event_object_schema = COALESCE(:schema, DATABASE()) AND event_object_table = :table
            AND LOCATE('granite_storage_', trigger_name) <> 1
    )
""")
_answers: WeakKeyDictionary[Engine, dict[tuple[str | None, str], tuple[float, bool]]] = WeakKeyDictionary()


def has_triggers(connection: Connection, table: Table) -> bool:
    """Return whether a table has triggers or rules of the application, by the catalogue of the database; cached for a minute.

    MariaDB shows triggers only to roles with the privilege TRIGGER.
    """
    schema = schema_on(connection, table)
    answers = _answers.setdefault(root_engine(connection.engine), {})
    until, answer = answers.get((schema, table.name), (0.0, False))
    if time.monotonic() >= until:
        answer = _ask(connection, schema, table.name)
        answers[schema, table.name] = (time.monotonic() + _SECONDS, answer)
    return answer


def _ask(connection: Connection, schema: str | None, table: str) -> bool:
    quote = connection.dialect.identifier_preparer.quote
    match connection.dialect.name:
        case "postgresql":
            name = quoted_name(connection, schema, table)
            found: Any = connection.execute(_POSTGRESQL, {"name": name}, execution_options=UNTRANSLATED).scalar()
        case "sqlite":
            # A temporary trigger may belong to a table in another file.
            schemas = {"temp", *attached_databases(connection)}
            parts = [
                f"SELECT 1 FROM {quote(one)}.sqlite_master"  # noqa: S608  # quoted
                " WHERE type = 'trigger' AND tbl_name = :table COLLATE NOCASE AND substr(name, 1, 16) <> 'granite_storage_'"
                for one in sorted(schemas)
            ]
            found = connection.execute(text(" UNION ALL ".join(parts)), {"table": table}, execution_options=UNTRANSLATED).first()
        case _:
            found = connection.execute(_MARIADB, {"schema": schema, "table": table}, execution_options=UNTRANSLATED).scalar()
    return bool(found)
