"""What a session's transaction does to objects, and what follows from how the transaction of the database really ended.

Each savepoint has a frame, which logs what happened in it. The log of a released savepoint is added to its parent's; of one
that is rolled back only the stored objects remain, which then have no row. The end of the outermost transaction decides which
objects are deleted:

- committed: displaced objects, objects that were stored for a row that was not written, and those of rolled-back savepoints;
- rolled back: all that were stored;
- unknown (the connection was lost during the COMMIT): none, because a row may refer to any of them.

A session alone does not know the end. Three things are seen only on the connection: that a COMMIT was on its way when the error
or the cancellation came, that the server refused it, and the end of an outer transaction that the session was joined to.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from greenlet import getcurrent
from sqlalchemy import Connection, Engine, Transaction, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.orm import InstanceState, LoaderCallableStatus, Session, SessionTransaction
from sqlalchemy.util import greenlet_spawn

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.orm._faults import explain_fault
from granite_storage.orm._interfaces import (
    CLAIMING_KEY,
    FORGET_CLAIMS,
    REFUSAL,
    Binding,
    Intent,
    Journal,
    ObjectKey,
    StoredObject,
    active_bindings,
    are_triggers_declared,
    leave_out,
)
from granite_storage.orm._util import (
    TRANSLATE_MAP,
    add_listeners,
    codes_of,
    deferred_cancellation,
    in_greenlet,
    is_async,
    root_engine,
)
from granite_storage.orm.locking import CountedDeletes, RowRef, find_shared, find_shared_afresh
from granite_storage.orm.uploads import remove_now

if TYPE_CHECKING:
    from sqlalchemy.orm.unitofwork import UOWTransaction

    from granite_storage.orm.attachment import Attachment
    from granite_storage.orm.columns import Slot


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
    """The frames of one session's transaction, from the outermost to the innermost, and the connections that it goes through."""

    def __init__(self) -> None:
        # Weak, because a transaction refers to its session, and one that is dropped without being closed must be collectable.
        self.frames: weakref.WeakKeyDictionary[SessionTransaction, Frame] = weakref.WeakKeyDictionary()
        self.to_delete: list[StoredObject] = []
        self.flush: FlushState = FlushState()
        # Locations of displaced objects and variants that other rows refer to, as the database said before the COMMIT.
        self.shared: set[str] = set()
        # The savepoints of each connection that it has worked in.
        self.spans: dict[ConnectionWatch, SavepointSpan] = {}
        # Looks after the transaction once it has committed, until it is concluded.
        self.watchdog: asyncio.Handle | None = None

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
        else:
            self._undo(frame)

    def close(self, transaction: SessionTransaction) -> Frame:
        """Return the frame of the outermost transaction; savepoints that are still open are rolled back with it."""
        frame = self.frames.pop(transaction, None) or Frame()
        for inner in self.frames.values():
            self._undo(inner)
        self.frames.clear()
        return frame

    def _undo(self, frame: Frame) -> None:
        """Note that what a savepoint has stored is rolled back."""
        self.to_delete += [stored for stored, _ in frame.puts]
        for _, attachment in frame.puts:
            attachment._state.undo()

    def displaced(self, frame: Frame | None = None) -> list[StoredObject]:
        """Return the objects without an intent that a commit would delete now.

        Args:
            frame: The frame of the outermost transaction, where it is closed already.
        """
        frames = [frame] if frame is not None else list(self.frames.values())
        return [stored for stored in self._without_row(frames) if stored.intent is None]

    def _without_row(self, frames: Sequence[Frame]) -> list[StoredObject]:
        """Return the objects that no row refers to once these frames are committed."""
        latest = _latest([entry for one in frames for entry in one.log])
        dropped = [stored for stored, held in latest.values() if not held]
        never_taken = [stored for one in frames for stored, _ in one.puts if stored.key not in latest]
        return [*dropped, *never_taken, *self.to_delete]

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
                return leave_out(self._without_row([frame]), self.shared)
            case Outcome.ROLLED_BACK:
                return [*(stored for stored, _ in frame.puts), *self.to_delete]
            case Outcome.UNKNOWN:
                return []

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


# How a transaction of the database really ended.


_INFO_KEY = "granite_storage.watch"
_PAUSE = 0.05
"""Seconds until a commit is looked at again that listeners of the application's hold up."""

_units: weakref.WeakKeyDictionary[Session, UnitOfWork] = weakref.WeakKeyDictionary()
_watches: weakref.WeakKeyDictionary[Connection, ConnectionWatch] = weakref.WeakKeyDictionary()
_begun: weakref.WeakKeyDictionary[SessionTransaction, weakref.ref[Transaction]] = weakref.WeakKeyDictionary()
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_concluding: set[asyncio.Task[Any]] = set()


@dataclass(slots=True)
class SavepointSpan:
    """The newest savepoints of a connection when a session first and last worked on it, by SQLAlchemy's numbers."""

    first: int
    last: int


@dataclass(slots=True, eq=False)
class _Joined:
    """A session's work that waits for the outer transaction it was joined to."""

    unit: UnitOfWork
    frame: Frame
    span: SavepointSpan


@dataclass(slots=True, eq=False)
class ConnectionWatch:
    """What is known of the transaction on one connection."""

    # Weak, because the pool's record of a connection knows its watch: a connection that is dropped must not be held by this.
    connection: weakref.ref[Connection]
    # What leads to the same tables, and whether a transaction that begins now sees rows there which this one does not see.
    engine: Engine
    options: Mapping[str, Any]
    has_snapshot: bool = False
    committing: bool = False
    refused: bool = False
    prepared: bool = False
    lost: bool = False
    rolled_back: bool = False
    sessions: weakref.WeakSet[Session] = field(default_factory=weakref.WeakSet)
    joined: list[_Joined] = field(default_factory=list)
    to_delete: list[StoredObject] = field(default_factory=list)
    # What a journal deletes once the database has really rolled back; until then its rows are locked.
    to_delete_after_rollback: list[StoredObject] = field(default_factory=list)

    @property
    def is_async(self) -> bool:
        """Whether the connection is that of an asynchronous engine."""
        return self.engine.dialect.is_async

    @property
    def is_open(self) -> bool:
        """Whether the database transaction goes on, though the session's has ended."""
        connection = self.connection()
        if self.lost or connection is None or connection.closed or connection.invalidated:
            return False
        return connection.in_transaction()

    @property
    def is_unfinished(self) -> bool:
        """Whether work was done on the connection of which neither a COMMIT nor a ROLLBACK is known to have ended it."""
        if self.rolled_back:
            return False
        units = [unit for session in self.sessions if (unit := known_unit(session)) is not None]
        return bool(self.joined or self.to_delete) or not all(unit.has_committed for unit in units)

    @property
    def is_in_doubt(self) -> bool:
        """Whether a COMMIT was sent and no answer came."""
        return self.committing and not self.refused

    def expect_answer(self, *, prepared: bool = False) -> None:
        """Note that a COMMIT is on its way; for one that was prepared not even a refusal means a rollback."""
        self.committing, self.refused, self.prepared = True, False, prepared

    def keep_shared(self) -> None:
        """Ask, before the COMMIT, which of the objects that it would displace other rows refer to."""
        units: dict[UnitOfWork, list[StoredObject]] = {
            unit: unit.displaced() for session in self.sessions if (unit := known_unit(session)) is not None
        }
        for work in self.joined:
            units[work.unit] = work.unit.displaced(work.frame)
        objects = [stored for displaced in units.values() for stored in displaced]
        objects += [stored for stored in self.to_delete if stored.intent is None]
        connection = self.connection()
        if objects and connection is not None:
            shared = find_shared(connection, objects)
            self.has_snapshot = connection.dialect.name != "sqlite" and connection.get_isolation_level() != "READ COMMITTED"
            for concerned in units:
                concerned.shared |= shared
            self.to_delete = leave_out(self.to_delete, shared)

    def reset(self) -> None:
        """Forget the transaction that has ended."""
        self.committing = self.refused = self.prepared = self.has_snapshot = False

    def must_ask(self, outcome: Outcome) -> bool:
        """Return whether rows must be looked for again before anything is deleted.

        A snapshot hides what others have committed. And a rollback leaves rows that were committed before it, unseen by
        SQLAlchemy: by a COMMIT in SQL or of the driver, such as that of SQLite's `executescript`; by a driver in autocommit mode;
        by MariaDB and MySQL before a DDL statement and in tables that know no transactions.
        """
        return outcome is Outcome.ROLLED_BACK or (outcome is Outcome.COMMITTED and self.has_snapshot)

    @deferred_cancellation()  # an event of a connection must not be broken off
    def resolve(self, outcome: Outcome, *, in_progress: bool = False, is_dropped: bool = False) -> None:
        """Act on the end of the outer transaction, which may still be in progress, or whose connection is being dropped."""
        joined, self.joined = self.joined, []
        to_delete, self.to_delete = self.to_delete, []
        keep = _asking([self], outcome)
        self.reset()
        removed = [stored for work in joined for stored in _end(work.unit, work.frame, outcome)]
        if outcome is Outcome.UNKNOWN:
            return
        if in_progress:
            self.to_delete_after_rollback += [stored for stored in (*removed, *to_delete) if stored.intent is not None]
        now = [stored for stored in (*removed, *to_delete) if not in_progress or stored.intent is None]
        remove_now(now, is_async=self.is_async, keep=keep, are_locked=is_dropped)

    @deferred_cancellation()
    def settle(self) -> None:
        """Let journals delete what a rollback has left, now that it is done."""
        stored, self.to_delete_after_rollback = self.to_delete_after_rollback, []
        if stored:
            remove_now(stored, is_async=self.is_async)


def unit_of(session: Session) -> UnitOfWork:
    """Return the unit of work of a session's transaction; made when it first has to do with attachments."""
    unit = _units.get(session)
    if unit is None:
        unit = _units[session] = UnitOfWork()
    return unit


def known_unit(session: Session) -> UnitOfWork | None:
    """Return the unit of work of a session's transaction if it has one."""
    return _units.get(session)


_of_sessions: weakref.WeakSet[Connection] = weakref.WeakSet()
"""The connections of sessions while triggers are declared, whose refusals a session raises as errors of its own."""


def begin(transaction: SessionTransaction, connection: Connection) -> None:
    """Note which transaction of the database an outermost transaction of a session has begun or joined."""
    ours = connection.get_nested_transaction() or connection.get_transaction()
    if transaction.parent is None and ours is not None:
        _begun[transaction] = weakref.ref(ours)
    has_triggers = any(are_triggers_declared(binding.metadata) for binding in active_bindings())
    if has_triggers:
        _of_sessions.add(connection)
    if has_triggers or connection.dialect.name == "sqlite":
        listen_to(connection.engine)


def watch(session: Session, connection: Connection) -> None:
    """Follow the transaction on a connection that a session's work goes through."""
    found = _watches.get(connection)
    if found is None:
        options = {TRANSLATE_MAP: connection.get_execution_options().get(TRANSLATE_MAP)}
        found = _watches[connection] = ConnectionWatch(weakref.ref(connection), connection.engine, options)
        connection.info[_INFO_KEY] = found
        listen_to(connection.engine)
    found.sessions.add(session)
    newest = _savepoints_made(connection)
    unit_of(session).spans.setdefault(found, SavepointSpan(newest, newest)).last = newest


def require_transactions(connection: Connection) -> None:
    """Refuse to store, replace or delete a file where a rollback would not bring rows back.

    Raises:
        ConfigurationError: The connection is in autocommit mode.
    """
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    if level == "AUTOCOMMIT":
        raise ConfigurationError(
            "storing, replacing or deleting a file needs a transaction, but this connection is in AUTOCOMMIT mode: use an engine"
            " or a session without isolation_level='AUTOCOMMIT'",
            see=Page.AUTOCOMMIT,
        )


def expect_end(session: Session, transaction: SessionTransaction) -> None:
    """Conclude a transaction that has committed, in case that its session never tells of its end.

    A listener of the application's that raises after the commit leaves SQLAlchemy's transaction open, and `sessions.begin()`
    does not close the session then.
    """
    unit = known_unit(session)
    if unit is not None and in_greenlet():
        loop = asyncio.get_running_loop()
        unit.watchdog = loop.call_soon(_conclude_later, loop, session, transaction, unit, getcurrent())


def _conclude_later(
    loop: asyncio.AbstractEventLoop, session: Session, transaction: SessionTransaction, unit: UnitOfWork, committing: Any
) -> None:
    """Conclude a transaction whose commit is over, as its greenlet tells; check again later where it is not."""
    unit.watchdog = None
    if known_unit(session) is not unit:
        return
    if not committing.dead:
        unit.watchdog = loop.call_later(_PAUSE, _conclude_later, loop, session, transaction, unit, committing)
        return
    task = loop.create_task(greenlet_spawn(conclude, session, transaction))
    _concluding.add(task)
    task.add_done_callback(_concluding.discard)


def conclude(session: Session, transaction: SessionTransaction, *, is_dropped: bool = False) -> None:
    """Act on the end of a session's outermost transaction, or leave that to the transaction it was joined to.

    Args:
        session: The session.
        transaction: Its outermost transaction.
        is_dropped: Whether it ends because its connection is being dropped, and has not ended in the database yet.
    """
    unit = _units.pop(session, None)
    if unit is None:
        return
    if unit.watchdog is not None:
        unit.watchdog.cancel()
    unit.abandon_flush()
    frame = unit.close(transaction)
    spans, unit.spans = unit.spans, {}
    for item in spans:
        item.sessions.discard(session)
    outer = next((item for item in spans if item.is_open), None)
    if outer is not None and (frame.committed or _is_left_open(transaction)):
        outer.joined.append(_Joined(unit, frame, spans[outer]))
        return
    if outer is not None:
        outer.to_delete += unit.end(frame, Outcome.ROLLED_BACK)
        return
    if frame.committed:
        outcome = Outcome.COMMITTED
    elif any(item.is_in_doubt for item in spans):
        outcome = Outcome.UNKNOWN
    else:
        outcome = Outcome.ROLLED_BACK
    keep = _asking(spans, outcome)
    for item in spans:
        item.reset()
    removed = _end(unit, frame, outcome)
    remove_now(removed, is_async=is_async(session) or any(item.is_async for item in spans), keep=keep, are_locked=is_dropped)


def _end(unit: UnitOfWork, frame: Frame, outcome: Outcome) -> list[StoredObject]:
    """Return the objects that are to be deleted now, and wake the workers that have something to do."""
    if outcome is Outcome.COMMITTED:
        for journal in frame.wakes:
            journal.wake_workers()
    return unit.end(frame, outcome)


def _asking(watches: Iterable[ConnectionWatch], outcome: Outcome) -> Callable[[Sequence[StoredObject]], set[str]] | None:
    """Return what tells which objects stay because rows refer to them, where that has to be asked once more."""
    places = [(watch.engine, watch.options) for watch in watches if watch.must_ask(outcome)]
    return partial(find_shared_afresh, places) if places else None


def listen_to(engine: Engine) -> None:
    """Listen to an engine's transactions, and to those of engines with other options; once for all of them."""
    engine = root_engine(engine)
    if engine not in _engines:
        _engines.add(engine)
        add_listeners(engine, _LISTENERS)


def unlisten_all() -> None:
    """Stop listening to any engine."""
    for engine in list(_engines):
        for name, listener in _LISTENERS.items():
            event.remove(engine, name, listener)
    _engines.clear()


def _is_left_open(transaction: SessionTransaction) -> bool:
    """Return whether closing a session left the transaction alone that it was joined to, and with it the session's rows."""
    reference = _begun.get(transaction)
    joined = None if reference is None else reference()
    return joined is not None and joined.is_active


def _savepoints_made(connection: Connection) -> int:
    """Return the number of the connection's newest savepoint: SQLAlchemy counts them in their names."""
    return int(getattr(connection, "_Connection__savepoint_seq"))  # noqa: B009  # its own name for it is mangled


def _on_commit(connection: Connection, *_: Any) -> None:
    if (found := _watches.get(connection)) is not None:
        found.keep_shared()
        found.expect_answer()


def _on_commit_prepared(connection: Connection, _: Any, is_prepared: bool) -> None:
    if (found := _watches.get(connection)) is not None:
        found.expect_answer(prepared=is_prepared)


def _on_rollback(connection: Connection, *_: Any) -> None:
    _forget_claims(connection)
    found = _watches.get(connection)
    if found is None:
        return
    found.rolled_back = True
    # A session's own rollback is reported by the session.
    if found.joined or found.to_delete:
        found.resolve(Outcome.UNKNOWN if found.is_in_doubt else Outcome.ROLLED_BACK, in_progress=True)


def _on_rollback_prepared(connection: Connection, *_: Any) -> None:
    """Roll back a prepared transaction: its PREPARE was answered, so nothing is in doubt."""
    if (found := _watches.get(connection)) is not None:
        found.refused = True
    _on_rollback(connection)


def _on_rollback_savepoint(connection: Connection, name: str, _: Any) -> None:
    """Undo the work of sessions that had ended inside a savepoint of the outer transaction.

    If work was done partly before the savepoint, it is unknown which part is rolled back, so none of it is deleted.
    """
    _forget_claims(connection)
    found = _watches.get(connection)
    if found is None or not found.joined:
        return
    number = int(name.rpartition("_")[2])
    for work in [work for work in found.joined if number <= work.span.last]:
        found.joined.remove(work)
        outcome = Outcome.ROLLED_BACK if number <= work.span.first else Outcome.UNKNOWN
        found.to_delete += work.unit.end(work.frame, outcome)


def _on_begin(connection: Connection, *_: Any) -> None:
    """A new transaction begins, so the one before it has ended: committed, for a rollback would have been seen."""
    found = _watches.get(connection)
    if found is None:
        return
    found.lost = found.rolled_back = False
    if found.committing:
        found.resolve(Outcome.ROLLED_BACK if found.refused else Outcome.COMMITTED)
    found.settle()


def _on_checkin(driver_connection: Any, record: Any) -> None:
    """The connection goes back to its pool, so its transaction has ended."""
    _forget_claims_at_last(driver_connection, record)
    found = record.info.pop(_INFO_KEY, None)
    if found is None:
        return
    if found.is_unfinished:
        _roll_back(driver_connection, record)
    found.settle()
    if not (found.joined or found.to_delete):
        return
    if found.refused:
        found.resolve(Outcome.ROLLED_BACK)
    else:
        found.resolve(Outcome.COMMITTED if found.committing else Outcome.UNKNOWN)


def _forget_claims(connection: Connection) -> None:
    """Clear what a flush that has failed has left on a connection to MariaDB, whose ROLLBACK reverts no variables."""
    if not connection.closed and not connection.invalidated and CLAIMING_KEY in connection.info:
        with suppress(DBAPIError):  # it is tried again when the connection goes back
            connection.exec_driver_sql(FORGET_CLAIMS)
            del connection.info[CLAIMING_KEY]


def _forget_claims_at_last(driver_connection: Any, record: Any) -> None:
    """Clear it before the next user of the connection, or drop the connection."""
    if driver_connection is not None and record.info.pop(CLAIMING_KEY, None) is not None:
        with _dropped_on_error(record):
            cursor = driver_connection.cursor()
            cursor.execute(FORGET_CLAIMS)
            cursor.close()


def _roll_back(driver_connection: Any, record: Any) -> None:
    """End the transaction of a connection that goes back to its pool with one.

    SQLAlchemy returns it like that where a COMMIT was interrupted before it was sent, by a signal or by a listener, and the
    session was closed and not rolled back. The next user of the connection would commit what this one has written.
    """
    with _dropped_on_error(record):
        driver_connection.rollback()


@contextmanager
def _dropped_on_error(record: Any) -> Iterator[None]:
    """Drop a connection that goes back to its pool where a block fails; the error is raised only if it ends the program."""
    try:
        yield
    except BaseException as error:
        record.invalidate(error)
        if not isinstance(error, Exception):
            raise


def _on_invalidate(_: Any, record: Any, __: Any) -> None:
    """The connection is dropped, and with it its transaction: a session that was cancelled as it ended tells no more of it."""
    found = record.info.get(_INFO_KEY)
    if found is None:
        return
    found.lost = True
    for session in list(found.sessions):
        unit = known_unit(session)
        root = None if unit is None else next(iter(unit.frames), None)
        if root is not None:
            with deferred_cancellation():
                conclude(session, root, is_dropped=True)
    if found.joined or found.to_delete:
        found.resolve(Outcome.UNKNOWN if found.is_in_doubt else Outcome.ROLLED_BACK, is_dropped=True)


def _on_error(context: ExceptionContext) -> BaseException | None:
    """Say that a trigger of the library has refused a ref, or what the journal's tables lack; see a COMMIT that was refused.

    Returns:
        The error to raise instead; None for the database's own.
    """
    _note_refused_commit(context)
    error, connection = context.sqlalchemy_exception, context.connection
    refused = refused_ref(error) if connection in _of_sessions else None
    if refused is None and connection is not None and (connection in _of_sessions or connection in _watches):
        return explain_fault(error, connection.engine.url.username)
    return refused


def refused_ref(error: BaseException | None) -> StaleAttachmentError | None:
    """Return what a session raises for an error of a guard: its own, or a conflict that its lock has run into."""
    if not isinstance(error, DBAPIError):
        return None
    said = str(error.orig)
    if REFUSAL[0] not in said:
        cause = getattr(error.orig, "diag", error.orig.__cause__ if error.orig is not None else None)
        is_of_guard = "granite_storage_" in (getattr(cause, "context", None) or "")
        if not is_of_guard or codes_of(error).isdisjoint(_CONFLICTS):
            return None
    return StaleAttachmentError(
        f"the database refused a ref ({said.splitlines()[0]}): its object is about to be deleted, or no pending delete and no row"
        " of the same metadata and schema vouches for it; the transaction may be tried again"
    )


_CONFLICTS = ("23503", "40001")


def _note_refused_commit(context: ExceptionContext) -> None:
    """Note a COMMIT that the server has refused: it has not committed. Without an answer the outcome stays unknown.

    SQLite keeps a transaction open whose COMMIT it has refused, and SQLAlchemy returns the connection to the pool like that, for
    the next one to commit what this one could not.
    """
    connection = context.connection
    found = None if connection is None else _watches.get(connection)
    if connection is None or found is None or not found.committing or found.prepared:
        return
    error = context.sqlalchemy_exception
    if isinstance(error, DBAPIError) and not isinstance(error, InterfaceError) and not context.is_disconnect:
        connection.dialect.do_rollback(connection.connection)
        found.refused = True
    else:
        found.refused = False


def _on_savepoint(connection: Connection, _: str | None) -> None:
    """Begin a real transaction before a savepoint on SQLite, where Python's driver by itself begins none.

    Without it the RELEASE of the savepoint would commit, whatever happens to the transaction around it.
    """
    if connection.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        if driver is not None and not driver.in_transaction:
            connection.exec_driver_sql("BEGIN")


_LISTENERS: dict[str, Callable[..., Any]] = {
    "commit": _on_commit,
    "prepare_twophase": _on_commit,
    "commit_twophase": _on_commit_prepared,
    "rollback": _on_rollback,
    "rollback_twophase": _on_rollback_prepared,
    "rollback_savepoint": _on_rollback_savepoint,
    "savepoint": _on_savepoint,
    "begin": _on_begin,
    "begin_twophase": _on_begin,
    "checkin": _on_checkin,
    "invalidate": _on_invalidate,
    "handle_error": _on_error,
}
