"""Legacy bulk operations, `Session.bulk_update_mappings` and its like: no event tells of them, only of the transaction they begin.

While one is in progress, the statements of its session are looked at. An UPDATE of an attachment would displace an object that
nothing would ever delete, so it is refused; an INSERT with a file is refused by the column's type, as everywhere.
"""

from __future__ import annotations

import weakref
from typing import Any

from sqlalchemy import Connection, Update, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.unitofwork import UOWTransaction

from granite_storage.exceptions import InvalidReferenceError
from granite_storage.orm._registry import active_bindings

__all__ = ["begin_connection", "begin_transaction", "end_transaction", "note_flush", "unlisten_all"]

_flushes: weakref.WeakKeyDictionary[Session, weakref.ref[UOWTransaction]] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[Session, weakref.WeakSet[Connection]] = weakref.WeakKeyDictionary()
_guards: weakref.WeakKeyDictionary[SessionTransaction, _Guard] = weakref.WeakKeyDictionary()


def note_flush(session: Session, context: UOWTransaction) -> None:
    """Remember the flush of a session that is about to begin its own part of the transaction."""
    _flushes[session] = weakref.ref(context)


def begin_connection(session: Session, connection: Connection) -> None:
    """Remember a connection that a session works on."""
    _connections.setdefault(session, weakref.WeakSet()).add(connection)
    for guard in _guards.values():
        if guard.session is session:
            guard.listen(connection)


def begin_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Look at the statements of a part of a transaction that is no flush's, so that it must be a bulk operation's."""
    reference = _flushes.get(session)
    context = None if reference is None else reference()
    if context is not None and context.has_work and getattr(context, "transaction", None) is None:
        return
    _guards[transaction] = guard = _Guard(session)
    for connection in _connections.get(session, ()):
        guard.listen(connection)


def end_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Look at the statements no longer."""
    guard = _guards.pop(transaction, None)
    if guard is not None:
        guard.close()
    if transaction.parent is None:
        _connections.pop(session, None)


def unlisten_all() -> None:
    """Look at nothing any more."""
    for guard in _guards.values():
        guard.close()
    _guards.clear()


class _Guard:
    """Refuses statements of one bulk operation."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._listening: weakref.WeakSet[Connection] = weakref.WeakSet()

    @property
    def session(self) -> Session | None:
        return self._session()

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
        f"a legacy bulk operation may not update the attachment {label}: nothing would delete the object that the row held; leave"
        " the attribute out, assign to an instance and flush it, or set None by session.execute(update(...))"
    )
