"""What a session's transaction does to objects, what a flush is to do, and what follows at the end: decisions only, no I/O.

Each savepoint has a frame, which logs what happened in it. The log of a released savepoint is added to its parent's; of one
that is rolled back only the stored objects remain, which then have no row. The end of the outermost transaction decides which
objects are deleted:

- committed: displaced objects, objects that were stored for a row that was not written, and those of rolled-back savepoints;
- rolled back: all that were stored;
- unknown (the connection was lost during the COMMIT): none, because a row may refer to any of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

from sqlalchemy.orm import LoaderCallableStatus

from granite_storage.orm._interfaces import Intent, ObjectKey, StoredObject

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.orm import InstanceState, SessionTransaction
    from sqlalchemy.orm.unitofwork import UOWTransaction

    from granite_storage.orm._interfaces import Binding, Journal
    from granite_storage.orm.attachment import Attachment
    from granite_storage.orm.columns import Slot
    from granite_storage.orm.locking import CountedDeletes, RowRef

__all__ = [
    "UNKNOWN",
    "Assigned",
    "Change",
    "Displacement",
    "FlushPlan",
    "FlushState",
    "Frame",
    "LogEntry",
    "Outcome",
    "UnitOfWork",
    "UploadPlan",
    "plan_flush",
    "plan_uploads",
    "put_value",
]

LogEntry: TypeAlias = "tuple[StoredObject, bool]"


class Outcome(Enum):
    """How a transaction ended."""

    COMMITTED = auto()
    ROLLED_BACK = auto()
    UNKNOWN = auto()


@dataclass(slots=True, eq=False)
class Change:
    """An attachment attribute whose value a flush will write.

    Attributes:
        state: The instance.
        slot: The attribute.
        value: The new value.
        old: The previous value as far as the session knows: None, an attachment, or `UNKNOWN`.
        binding: The binding of its column, which each step of the flush needs.
    """

    state: InstanceState[Any]
    slot: Slot
    value: Attachment | None
    old: Any
    binding: Binding

    @property
    def marker(self) -> tuple[int, str]:
        """Identifies the change when it is seen a second time in one flush."""
        return id(self.state), self.slot.key

    @property
    def is_pending(self) -> bool:
        """Whether the instance still holds the value; a listener may have replaced it."""
        return self.state.obj() is not None and self.state.dict.get(self.slot.key) is self.value

    @property
    def attachment(self) -> Attachment:
        """The value, if it is not None."""
        return cast("Attachment", self.value)

    def replace(self, value: Attachment) -> None:
        """Replace the assigned value."""
        put_value(self.state, self.slot.key, value)
        self.value = value


UNKNOWN = object()
"""An old value that the session has not loaded."""


def put_value(state: InstanceState[Any], key: str, value: Any) -> None:
    """Set an attribute to a value that the flush writes and the application did not assign.

    The attribute's history contains it. Validators and listeners are not called: they have seen the value that it replaces, and
    could refuse this one.
    """
    # This is an assignment without its events; the public functions lose the history or call the listeners.
    state._modified_event(state.dict, state.manager[key].impl, state.dict.get(key, LoaderCallableStatus.NO_VALUE))
    state.dict[key] = value


@dataclass(slots=True, eq=False)
class Frame:
    """The log of one transaction or savepoint."""

    # True: a row refers to the object now. False: no row of this transaction refers to it any more.
    log: list[LogEntry] = field(default_factory=list)
    puts: list[tuple[StoredObject, Attachment]] = field(default_factory=list)
    committed: bool = False
    # Whose workers have something to do once it is committed.
    wakes: set[Journal] = field(default_factory=set)

    def merge(self, inner: Frame) -> None:
        """Add the log of a released savepoint."""
        self.log += inner.log
        self.puts += inner.puts
        self.wakes |= inner.wakes


@dataclass(frozen=True, slots=True, eq=False)
class Displacement:
    """A ref that a flush will remove from its row, as it was read under the row's lock.

    Attributes:
        connection: The connection that it was read on.
        held: The ref and its row.
        state: The instance that is changed or deleted; None if it is unknown which one has the row.
        deletes: Whether the row is to be deleted.
    """

    connection: Connection
    held: RowRef
    state: InstanceState[Any] | None
    deletes: bool


@dataclass(slots=True, eq=False)
class FlushState:
    """What one flush plans to do; after its statements the rows are read to find what it did."""

    # SQLAlchemy's context of the flush, which refers to its session.
    context: weakref.ref[UOWTransaction] | None = None
    log: list[LogEntry] = field(default_factory=list)
    puts: list[tuple[StoredObject, Attachment]] = field(default_factory=list)
    claims: list[Attachment] = field(default_factory=list)
    # Values that rows are to hold after the flush, and refs that they are to lose.
    taken: list[Change] = field(default_factory=list)
    displaced: list[Displacement] = field(default_factory=list)
    # Changes that move an object here from another row of the same flush.
    moved: list[Change] = field(default_factory=list)
    # What has been processed: changed attributes, and deleted rows.
    handled: dict[tuple[int, str], Attachment | None] = field(default_factory=dict)
    deletions: dict[int, InstanceState[Any]] = field(default_factory=dict)
    # Refs of rows that the database may delete by a cascade, and the connection to read them on.
    vanishing: list[tuple[Connection, list[RowRef]]] = field(default_factory=list)
    # Functions that find such refs, and whether the flush has written rows since, which the cascade may reach too.
    cascading: list[tuple[Connection, Callable[[], list[RowRef]]]] = field(default_factory=list)
    has_written: bool = False
    # Whether new instances replace deleted ones with the same key; SQLAlchemy permits several for one row.
    has_successors: bool = False
    # Rows that were not there to be locked: whether any of them was to be updated, and how many of the others are deleted
    # nevertheless, because another transaction has inserted them again.
    has_missed_rows: bool = False
    counted: list[CountedDeletes] = field(default_factory=list)
    # Intents of pending deletes that the transaction cancels, and the connection on which each journal's tables are written.
    restored: list[Intent] = field(default_factory=list)
    restored_by: dict[ObjectKey, list[Intent]] = field(default_factory=dict)
    connections: dict[Journal, Connection] = field(default_factory=dict)

    def has_handled(self, marker: tuple[int, str], value: Attachment | None) -> bool:
        """Return whether the flush has processed this change."""
        return marker in self.handled and self.handled[marker] is value

    @property
    def net(self) -> list[LogEntry]:
        """The result of the flush: for each object whether a row refers to it at the end."""
        return list(_latest(self.log).values())


class UnitOfWork:
    """The frames of one session's transaction, from the outermost to the innermost."""

    def __init__(self) -> None:
        # Weak, because a transaction refers to its session, and one that is dropped without being closed must be collectable.
        self.frames: weakref.WeakKeyDictionary[SessionTransaction, Frame] = weakref.WeakKeyDictionary()
        self.to_delete: list[StoredObject] = []
        self.flush: FlushState = FlushState()
        # Locations of displaced objects that other rows refer to, as the database said before the COMMIT.
        self.shared: set[str] = set()

    def frame(self, transaction: SessionTransaction) -> Frame:
        """Return the frame of a transaction or savepoint; created on first use, with the enclosing ones."""
        found = self.frames.get(transaction)
        if found is None:
            around = _enclosing(transaction)
            if around is not None:
                self.frame(around)
            found = self.frames[transaction] = Frame()
        return found

    @property
    def has_committed(self) -> bool:
        """Whether its outermost transaction has committed, or has nothing to commit."""
        outermost = next(iter(self.frames.values()), None)
        return outermost is None or outermost.committed

    @property
    def history(self) -> dict[ObjectKey, bool]:
        """The objects that this transaction stored, moved or displaced: True if a row refers to it now."""
        return {stored.key: is_held for stored, is_held in self.log}

    @property
    def log(self) -> list[LogEntry]:
        """What this transaction has done to objects, in order."""
        return [*(entry for frame in self.frames.values() for entry in frame.log), *self.flush.log]

    def displacement(self, stored: StoredObject) -> StoredObject | None:
        """Return an object as an earlier flush of this transaction displaced it; None if a row refers to it again."""
        earlier = _latest([entry for frame in self.frames.values() for entry in frame.log]).get(stored.key)
        return earlier[0] if earlier is not None and not earlier[1] else None

    def origin(self, stored: StoredObject) -> StoredObject:
        """Return an object with its intent if the transaction has stored or displaced it and no row refers to it."""
        put = next((put for put, _ in self.flush.puts if put.key == stored.key), None)
        return put or self.displacement(stored) or stored

    def end_flush(self, frame: Frame) -> None:
        """Add the log of a flush whose statements have run; no later statement may bind its refs."""
        frame.log += self.flush.log
        self._forget_flush()

    def abandon_flush(self) -> None:
        """Discard the plan of a failed flush; the objects that it stored belong to no row, and any row may take them."""
        puts = self.flush.puts
        self._forget_flush()
        for _, attachment in puts:
            attachment._state.release()

    def end_savepoint(self, transaction: SessionTransaction) -> None:
        """Close the frame of a savepoint, and keep its log only if it was released."""
        frame = self.frames.pop(transaction)
        outer = _enclosing(transaction)
        if frame.committed and outer is not None:
            self.frame(outer).merge(frame)
            return
        self.to_delete += [stored for stored, _ in frame.puts]
        for _, attachment in frame.puts:
            attachment._state.undo()

    def close(self, transaction: SessionTransaction) -> Frame:
        """Return the frame of the outermost transaction; savepoints that are still open are rolled back with it."""
        frame = self.frames.pop(transaction, None) or Frame()
        for inner in self.frames.values():
            self.to_delete += [stored for stored, _ in inner.puts]
            for _, attachment in inner.puts:
                attachment._state.undo()
        self.frames.clear()
        return frame

    def displaced(self, frame: Frame | None = None) -> list[StoredObject]:
        """Return the objects without an intent that a commit would delete now.

        Args:
            frame: The frame of the outermost transaction, where it is closed already.
        """
        frames = [frame] if frame is not None else list(self.frames.values())
        latest = _latest([entry for one in frames for entry in one.log])
        dropped = [stored for stored, held in latest.values() if not held]
        never_taken = [stored for one in frames for stored, _ in one.puts if stored.key not in latest]
        return [stored for stored in (*dropped, *never_taken, *self.to_delete) if stored.intent is None]

    def end(self, frame: Frame, outcome: Outcome) -> list[StoredObject]:
        """Return the objects that are to be deleted now that the outermost transaction has ended."""
        latest = _latest(frame.log)
        for stored, attachment in frame.puts:
            # Whatever the outcome of an interrupted COMMIT, a retry with the same attachment stores its bytes again.
            is_taken = not attachment._state.is_repeatable if outcome is Outcome.UNKNOWN else stored.key in latest
            if outcome is Outcome.ROLLED_BACK or not is_taken:
                attachment._state.undo()
            else:
                attachment._state.settle()
        match outcome:
            case Outcome.COMMITTED:
                dropped = [stored for stored, held in latest.values() if not held]
                never_taken = [stored for stored, _ in frame.puts if stored.key not in latest]
                return [
                    stored for stored in (*dropped, *never_taken, *self.to_delete) if stored.intent or not self._is_shared(stored)
                ]
            case Outcome.ROLLED_BACK:
                return [*(stored for stored, _ in frame.puts), *self.to_delete]
            case Outcome.UNKNOWN:
                return []

    def _is_shared(self, stored: StoredObject) -> bool:
        return stored.ref.location in self.shared

    def _forget_flush(self) -> None:
        for counted in self.flush.counted:
            counted.close()
        for attachment in self.flush.claims:
            attachment._state.end_claim()
        self.flush = FlushState()


def _latest(log: list[LogEntry]) -> dict[ObjectKey, LogEntry]:
    return {stored.key: (stored, held) for stored, held in log}


def _enclosing(transaction: SessionTransaction) -> SessionTransaction | None:
    """Return the enclosing savepoint or transaction, skipping the subtransactions of the session itself."""
    outer = transaction.parent
    while outer is not None and outer.parent is not None and not outer.nested:
        outer = outer.parent
    return outer


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
