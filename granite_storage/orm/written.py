"""What a flush has really written and deleted, according to its rows, whatever was planned.

Between the plan of a flush and its statements the application's own listeners, SQLAlchemy's cascades and the database's triggers
have their say: a row that was to be deleted is kept, an old value is put back, a new row is expunged. An object is displaced only
where the row that held it has been looked at and holds it no more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Connection, Engine, Table, text
from sqlalchemy.orm import Session

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm._interfaces import ObjectKey, StoredObject
from granite_storage.orm._util import TRANSLATE_MAP, UNTRANSLATED, connection_of, root_engine
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType, keys_of
from granite_storage.orm.locking import read_refs, read_rows
from granite_storage.orm.unit_of_work import Change, Displacement, FlushState, LogEntry, UnitOfWork
from granite_storage.refs import StoredObjectRef

__all__ = ["written_log"]


def written_log(session: Session, unit: UnitOfWork, planned: Iterable[StoredObject]) -> list[LogEntry]:
    """Return what the flush that has just run its statements did to objects; attachments that no row has taken may be used again.

    Args:
        session: The session.
        unit: Its unit of work.
        planned: The objects that the flush might have put, moved or displaced.

    Raises:
        StaleAttachmentError: Two rows hold one object now, because the one that was to give it to the other still holds it.
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
            raise _still_holds(stored.ref)
        if holders[key] or key in certain:
            claimed = taken.get(key) or unit.displacement(stored)
            log += [] if claimed is None else [(claimed, True)]
        elif key in puts:
            puts[key]._state.release()
        else:
            log.append((unit.origin(stored), False))
    return log


def _certain(session: Session, flush: FlushState) -> set[StoredObjectRef]:
    """Return what the rows that it was written to hold for certain: nothing in the flush or in the database took it away again.

    Only triggers could, where the flush neither deletes nor replaces rows: where their tables have some, the rows are looked at.
    One that is not found, such as one that a policy hides, is believed to hold what was written.
    """
    if flush.deletions or flush.has_successors:
        return set()
    written = [change for change in flush.taken if change.attachment._state.is_written]
    return {change.attachment.ref for change in written} - _taken_away(session, written)


def _taken_away(session: Session, written: Sequence[Change]) -> set[StoredObjectRef]:
    """Return the refs that rows were to hold, and are there without, because a trigger has put something else in their place."""
    by_table: dict[tuple[Connection, Table], list[Change]] = {}
    connections: dict[Any, Connection] = {}
    for change in written:
        if change.state.obj() is None:
            continue
        # Those of one class share a connection, but for a sharded session.
        kind = change.state.mapper if session.connection_callable is None else change.state
        connection = connections.get(kind) or connections.setdefault(kind, connection_of(session, change.state))
        by_table.setdefault((connection, change.slot.column.table), []).append(change)
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
    """Tell whether a column holds nothing, or another object; what cannot be understood may be this one."""
    if not isinstance(value, Attachment):
        return value is None
    held = value._state.ref
    return held is not None and held.location != ref.location


def _read(session: Session, flush: FlushState, certain: set[StoredObjectRef]) -> Counter[ObjectKey]:
    """Return how many of the rows that the flush has to do with hold each object now."""
    rows = _Rows()
    for displaced in flush.displaced:
        if not _is_surely_deleted(flush, displaced):
            held, state = displaced.held, displaced.state
            rows.add(displaced.connection, held.column, {held.primary_key})
            if state is not None and not displaced.deletes:
                rows.add(displaced.connection, held.column, keys_of(state, held.table))
    for connection, cascaded in flush.vanishing:
        for held in cascaded:
            rows.add(connection, held.column, {held.primary_key})
    puts = {attachment.ref for _, attachment in flush.puts}
    for change in flush.taken:
        if change.attachment.ref not in puts or change.attachment.ref not in certain:
            instance = change.state.obj()
            if instance is not None:  # else nothing has kept it, the flush the least
                column = change.slot.column
                rows.add(connection_of(session, change.state), column, keys_of(change.state, column.table))
    return rows.count()


def _is_surely_deleted(flush: FlushState, displaced: Displacement) -> bool:
    """Tell whether a row need not be looked for.

    MariaDB and MySQL skip no DELETE in silence, and there a look at a row that is gone would lock the gap that it has left.
    """
    context = None if flush.context is None else flush.context()
    if not displaced.deletes or context is None or displaced.connection.dialect.name not in ("mysql", "mariadb"):
        return False
    return context.states.get(displaced.state) == (True, False)


class _Rows:
    """Rows to look at, by connection and table, and the columns of theirs."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[Connection, Table], tuple[set[tuple[Any, ...]], set[Column[Any]]]] = {}

    def add(self, connection: Connection, column: Column[Any], keys: Iterable[tuple[Any, ...]]) -> None:
        wanted, columns = self._wanted.setdefault((connection, column.table), (set(), set()))
        wanted.update(key for key in keys if None not in key)
        columns.add(column)

    def count(self) -> Counter[ObjectKey]:
        return Counter(_key_of(column, ref) for column, ref in self._held())

    def _held(self) -> Iterator[tuple[Column[Any], StoredObjectRef]]:
        for (connection, table), (keys, columns) in self._wanted.items():
            # A row may have been asked for by two spellings of its key.
            found = read_refs(connection, table, keys, [column for column in table.columns if column in columns])
            yield from {(held.primary_key, held.column): (held.column, held.ref) for held in found}.values()


def _key_of(column: Column[Any], ref: StoredObjectRef) -> ObjectKey:
    column_type: AttachmentType = column.type  # type: ignore[assignment]  # only attachment columns are asked for
    return StoredObject(column_type.binding().manager, ref).key


def _still_holds(ref: StoredObjectRef) -> StaleAttachmentError:
    return StaleAttachmentError(
        f"the object at {ref.location!r} was to move to another row, but the row that it was to leave still holds it after the"
        " flush: a listener or a trigger has changed that row back; flush the two changes one after the other, and the second"
        " row gets a copy"
    )


# Triggers: whether the database may write something else into a row than the flush did.


_SECONDS = 60.0
"""How long an answer counts: a trigger that is made meanwhile may leave an object to the garbage collector, and loses none."""

_POSTGRESQL = text("""
    SELECT EXISTS (
        SELECT 1 FROM pg_trigger WHERE NOT tgisinternal
            AND (tgrelid = to_regclass(:name) OR tgrelid IN (SELECT relid FROM pg_partition_tree(to_regclass(:name))))
    ) OR EXISTS (SELECT 1 FROM pg_class WHERE oid = to_regclass(:name) AND relkind = 'r' AND relhasrules)
""")
_MARIADB = text("""
    SELECT EXISTS (
        SELECT 1 FROM information_schema.triggers
        WHERE event_object_schema = COALESCE(:schema, DATABASE()) AND event_object_table = :table
    )
""")
_answers: WeakKeyDictionary[Engine, dict[tuple[str | None, str], tuple[float, bool]]] = WeakKeyDictionary()


def has_triggers(connection: Connection, table: Table) -> bool:
    """Tell whether a table has triggers or rules of its own, by the catalogue of the database; remembered for a minute.

    MariaDB shows them only to roles with the privilege TRIGGER, and to others none.
    """
    translated: dict[str | None, str | None] = connection.get_execution_options().get(TRANSLATE_MAP) or {}
    schema = translated.get(table.schema, table.schema)
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
            name = ".".join(quote(part) for part in (schema, table) if part)
            found: Any = connection.execute(_POSTGRESQL, {"name": name}, execution_options=UNTRANSLATED).scalar()
        case "sqlite":
            # A trigger may be a temporary one, of a table in another file.
            schemas = {"temp", *(row[1] for row in connection.exec_driver_sql("PRAGMA database_list"))}
            parts = [
                f"SELECT 1 FROM {quote(one)}.sqlite_master"  # noqa: S608  # quoted
                " WHERE type = 'trigger' AND tbl_name = :table COLLATE NOCASE"
                for one in sorted(schemas)
            ]
            found = connection.execute(text(" UNION ALL ".join(parts)), {"table": table}, execution_options=UNTRANSLATED).first()
        case _:
            found = connection.execute(_MARIADB, {"schema": schema, "table": table}, execution_options=UNTRANSLATED).scalar()
    return bool(found)
