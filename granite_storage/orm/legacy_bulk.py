"""Legacy bulk operations, `Session.bulk_update_mappings` and its like: no event tells of them, but of the transaction they begin.

While one is in progress, the statements of its session are looked at. An UPDATE of an attachment would displace an object that
nothing would ever delete, so it is refused; an INSERT with a file is refused by the column's type, as everywhere.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Update, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.unitofwork import UOWTransaction

from granite_storage.exceptions import InvalidReferenceError
from granite_storage.orm._registry import active_bindings

__all__ = ["begin_connection", "begin_transaction", "end_transaction", "note_flush", "unlisten_all"]


@dataclass(slots=True, eq=False)
class _Observed:
    """What is known of a session: its newest flush, the connections it works on, and its bulk operations in progress."""

    flush: weakref.ref[UOWTransaction] | None = None
    connections: weakref.WeakSet[Connection] = field(default_factory=weakref.WeakSet)
    guards: weakref.WeakKeyDictionary[SessionTransaction, _Guard] = field(default_factory=weakref.WeakKeyDictionary)

    def begins_flush(self) -> bool:
        """Tell whether the part of the transaction that has just begun is that of a flush."""
        context = None if self.flush is None else self.flush()
        return context is not None and context.has_work and getattr(context, "transaction", None) is None


_sessions: weakref.WeakKeyDictionary[Session, _Observed] = weakref.WeakKeyDictionary()


def note_flush(session: Session, context: UOWTransaction) -> None:
    """Remember the flush of a session that is about to begin its own part of the transaction."""
    _observed(session).flush = weakref.ref(context)


def begin_connection(session: Session, connection: Connection) -> None:
    """Remember a connection that a session works on."""
    observed = _observed(session)
    observed.connections.add(connection)
    for guard in observed.guards.values():
        guard.listen(connection)


def begin_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Look at the statements of a part of a transaction that is no flush's, so that it must be a bulk operation's."""
    observed = _observed(session)
    if not observed.begins_flush():
        observed.guards[transaction] = guard = _Guard()
        for connection in observed.connections:
            guard.listen(connection)


def end_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Look at the statements no longer."""
    observed = _sessions.get(session)
    guard = None if observed is None else observed.guards.pop(transaction, None)
    if guard is not None:
        guard.close()
    if transaction.parent is None:
        _sessions.pop(session, None)


def unlisten_all() -> None:
    """Look at nothing any more."""
    for observed in list(_sessions.values()):
        for guard in observed.guards.values():
            guard.close()
    _sessions.clear()


def _observed(session: Session) -> _Observed:
    found = _sessions.get(session)
    if found is None:
        found = _sessions[session] = _Observed()
    return found


class _Guard:
    """Refuses statements of one bulk operation."""

    def __init__(self) -> None:
        self._listening: weakref.WeakSet[Connection] = weakref.WeakSet()

    def listen(self, connection: Connection) -> None:
        if connection not in self._listening:
            self._listening.add(connection)
            event.listen(connection, "before_execute", self._check)

    def close(self) -> None:
        for connection in self._listening:
            event.remove(connection, "before_execute", self._check)
        self._listening.clear()

    def _check(self, _: Connection, statement: Any, several: Any, one: Any, __: Any) -> None:
        if not isinstance(statement, Update):
            return
        written = {name for parameters in [*(several or ()), one or {}] for name in parameters}
        for binding in active_bindings():
            table = binding.tables.find(statement.table)
            columns = () if table is None else binding.tables.attachments(table)
            for column in columns:
                if column.key in written:
                    raise _refusal(f"{column.table.name}.{column.name}")


def _refusal(label: str) -> InvalidReferenceError:
    return InvalidReferenceError(
        f"a legacy bulk operation must not write the attachment {label}, because nothing would delete the object that its row"
        " holds: leave the attribute out, assign to an instance and flush it, or set None by session.execute() and an update()"
    )
