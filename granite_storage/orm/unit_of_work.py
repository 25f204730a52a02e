"""What one session's transaction did to objects, and what follows when it ends: decisions only, no I/O.

Each savepoint has a frame of its own, a log of what happened in it. A released savepoint's log is added to its parent's; one
that is rolled back leaves nothing but the objects it put, which then have no row. Only the end of the outermost transaction says
which objects go:

- committed: those that were displaced last, those that were put for a row that never took them, and those that a rolled-back
  savepoint put;
- rolled back: all that were put;
- unknown (the COMMIT was cut off in flight): none; a row may point at any of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeAlias, cast

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

__all__ = ["UNKNOWN", "Change", "Displacement", "FlushState", "Frame", "LogEntry", "Outcome", "UnitOfWork", "put_value"]

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
        value: What it shall hold.
        old: What it held, as far as the session knows: None for nothing, a value, or `UNKNOWN`.
        binding: The binding of its column, which each step of the flush needs.
    """

    state: InstanceState[Any]
    slot: Slot
    value: Attachment | None
    old: Any
    binding: Binding

    @property
    def marker(self) -> tuple[int, str]:
        """What makes it the same change when it is seen a second time in one flush."""
        return id(self.state), self.slot.key

    @property
    def is_pending(self) -> bool:
        """Whether the instance is still there and holds the value: a listener may have dropped it, or put another one there."""
        return self.state.obj() is not None and self.state.dict.get(self.slot.key) is self.value

    @property
    def attachment(self) -> Attachment:
        """The value, where it is not None."""
        return cast("Attachment", self.value)

    def replace(self, value: Attachment) -> None:
        """Give the instance another value than the one that was assigned."""
        put_value(self.state, self.slot.key, value)
        self.value = value


UNKNOWN = object()
"""Stands for an old value that the session has not loaded."""


def put_value(state: InstanceState[Any], key: str, value: Any) -> None:
    """Give an instance a value that a statement of the flush is to write, and that the application has not assigned.

    It is in the history of the attribute like any other. Validators and listeners of the application do not see it: they could
    refuse it, or put another value in its place, and they were asked for the value that it stands for.
    """
    # What an assignment does, but for its events; the public functions lose the history, or call the listeners.
    state._modified_event(state.dict, state.manager[key].impl, state.dict.get(key, LoaderCallableStatus.NO_VALUE))
    state.dict[key] = value


@dataclass(slots=True, eq=False)
class Frame:
    """The log of one transaction or savepoint."""

    # True: the object belongs to a row now. False: no row of this transaction holds it any more.
    log: list[LogEntry] = field(default_factory=list)
    puts: list[tuple[StoredObject, Attachment]] = field(default_factory=list)
    committed: bool = False

    def merge(self, inner: Frame) -> None:
        """Take over the log of a savepoint that was released."""
        self.log += inner.log
        self.puts += inner.puts


@dataclass(frozen=True, slots=True, eq=False)
class Displacement:
    """A ref that a flush is to take out of its row, as it was read under the row's lock.

    Attributes:
        connection: The connection that it was read on.
        held: The ref and its row.
        state: The instance that is changed or deleted; None where the row cannot be told from others.
        deletes: Whether the row is to be deleted.
    """

    connection: Connection
    held: RowRef
    state: InstanceState[Any] | None
    deletes: bool


@dataclass(slots=True, eq=False)
class FlushState:
    """What one flush is to do; what it has really done is asked of the rows when it has ended: see `written`."""

    # SQLAlchemy's own record of the flush, which knows its session.
    context: weakref.ref[UOWTransaction] | None = None
    log: list[LogEntry] = field(default_factory=list)
    puts: list[tuple[StoredObject, Attachment]] = field(default_factory=list)
    claims: list[Attachment] = field(default_factory=list)
    # What rows are to hold after the flush, and what they are not to hold any more.
    taken: list[Change] = field(default_factory=list)
    displaced: list[Displacement] = field(default_factory=list)
    # Changes by which a row takes over an object that another one is to lose in the same flush.
    moved: list[Change] = field(default_factory=list)
    # What has been dealt with: changed attributes, and rows that are deleted.
    handled: dict[tuple[int, str], Attachment | None] = field(default_factory=dict)
    deletions: dict[int, InstanceState[Any]] = field(default_factory=dict)
    # Refs of rows that the database may delete by a cascade, and the connection that can tell whether it did.
    vanishing: list[tuple[Connection, list[RowRef]]] = field(default_factory=list)
    # What finds such refs, and whether the flush has written rows since it was asked: those are reached by the cascade, too.
    cascading: list[tuple[Connection, Callable[[], list[RowRef]]]] = field(default_factory=list)
    has_written: bool = False
    # Whether new instances have taken over rows of deleted ones: SQLAlchemy lets several of them take the same.
    has_successors: bool = False
    # Rows that were not there to be locked: of those to be replaced whether there are any, and how many of the others are deleted
    # all the same, because another transaction has inserted them anew.
    has_missed_rows: bool = False
    counted: list[CountedDeletes] = field(default_factory=list)
    # Undone deletes, by the intents that the transaction takes back, and where each journal's tables are written to.
    restored: list[Intent] = field(default_factory=list)
    restored_by: dict[ObjectKey, Intent] = field(default_factory=dict)
    connections: dict[Journal, Connection] = field(default_factory=dict)

    def has_handled(self, marker: tuple[int, str], value: Attachment | None) -> bool:
        """Tell whether the flush has dealt with this change."""
        return marker in self.handled and self.handled[marker] is value

    @property
    def net(self) -> list[LogEntry]:
        """What the flush comes to: for each object whether a row holds it in the end."""
        return list(_latest(self.log).values())


class UnitOfWork:
    """The frames of one session's transaction, from the outermost to the innermost."""

    def __init__(self) -> None:
        # Weak, because a transaction knows its session: one that is dropped without being closed must not be held by this.
        self.frames: weakref.WeakKeyDictionary[SessionTransaction, Frame] = weakref.WeakKeyDictionary()
        self.to_delete: list[StoredObject] = []
        self.flush: FlushState = FlushState()
        # Locations of displaced objects that other rows refer to, as the database said before the COMMIT.
        self.shared: set[str] = set()

    def frame(self, transaction: SessionTransaction) -> Frame:
        """Return the frame of a transaction or savepoint; made when something happens in it, with those around it."""
        found = self.frames.get(transaction)
        if found is None:
            around = _enclosing(transaction)
            if around is not None:
                self.frame(around)
            found = self.frames[transaction] = Frame()
        return found

    @property
    def history(self) -> dict[ObjectKey, bool]:
        """The objects that came to rows or went from them in this transaction: True where a row holds it now."""
        log = [*(entry for frame in self.frames.values() for entry in frame.log), *self.flush.log]
        return {stored.key: is_held for stored, is_held in log}

    def displacement(self, stored: StoredObject) -> StoredObject | None:
        """Return what an earlier flush of this transaction noted when a row gave the object up, where none has taken it since."""
        earlier = _latest([entry for frame in self.frames.values() for entry in frame.log]).get(stored.key)
        return earlier[0] if earlier is not None and not earlier[1] else None

    def origin(self, stored: StoredObject) -> StoredObject:
        """Return an object with the intent that stands for it already, where it was put or given up earlier and none took it."""
        put = next((put for put, _ in self.flush.puts if put.key == stored.key), None)
        return put or self.displacement(stored) or stored

    def end_flush(self, frame: Frame) -> None:
        """Let what a flush decided count: its statements are done. No statement may bind its refs any more."""
        frame.log += self.flush.log
        self._forget_flush()

    def abandon_flush(self) -> None:
        """Forget what a flush decided: it has failed. Any row may still take what it had put, or it has no row."""
        puts = self.flush.puts
        self._forget_flush()
        for _, attachment in puts:
            attachment._unowned = True

    def end_savepoint(self, transaction: SessionTransaction) -> None:
        """Close the frame of a savepoint; what happened in it survives only if it was released."""
        frame = self.frames.pop(transaction)
        outer = _enclosing(transaction)
        if frame.committed and outer is not None:
            self.frame(outer).merge(frame)
            return
        self.to_delete += [stored for stored, _ in frame.puts]
        for _, attachment in frame.puts:
            attachment._undo()

    def close(self, transaction: SessionTransaction) -> Frame:
        """Return the frame of the outermost transaction; savepoints that have not ended by themselves end with it, undone."""
        frame = self.frames.pop(transaction, None) or Frame()
        for inner in self.frames.values():
            self.to_delete += [stored for stored, _ in inner.puts]
            for _, attachment in inner.puts:
                attachment._undo()
        self.frames.clear()
        return frame

    def displaced(self, frame: Frame | None = None) -> list[StoredObject]:
        """Return the objects that the hooks themselves would delete if the transaction were committed as it is.

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
            # Whatever the outcome of a COMMIT that was cut off: bytes are stored anew where the same attachment is tried again.
            is_taken = not attachment._reusable if outcome is Outcome.UNKNOWN else stored.key in latest
            if outcome is Outcome.ROLLED_BACK or not is_taken:
                attachment._undo()
            else:
                attachment._settle()
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
            attachment._forget_claim()
        self.flush = FlushState()


def _latest(log: list[LogEntry]) -> dict[ObjectKey, LogEntry]:
    return {stored.key: (stored, held) for stored, held in log}


def _enclosing(transaction: SessionTransaction) -> SessionTransaction | None:
    """Return the savepoint or transaction around one; the session's own bookkeeping transactions are passed over."""
    outer = transaction.parent
    while outer is not None and outer.parent is not None and not outer.nested:
        outer = outer.parent
    return outer
