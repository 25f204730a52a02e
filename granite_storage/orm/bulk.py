"""Bulk statements of a session: the objects that they displace, and the values that they must not write."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Alias, Column, Connection, Delete, FromClause, Insert, Null, Result, Table, Update, event
from sqlalchemy.ext.horizontal_shard import ShardedSession, set_shard_id
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, SessionTransaction
from sqlalchemy.sql.elements import BindParameter

from granite_storage.exceptions import ConfigurationError, InvalidReferenceError, StaleAttachmentError
from granite_storage.orm import flush, transactions
from granite_storage.orm._interfaces import active_bindings, find_binding
from granite_storage.orm._util import TRANSLATE_MAP, executed_statement, written_within
from granite_storage.orm.columns import Tables, attachment_tables, slots_of
from granite_storage.orm.flush import write_displaced
from granite_storage.orm.locking import RowRef, are_there, find_cascaded, lock_rows, lock_statement, still_referenced


def execute_bulk(state: ORMExecuteState) -> Result[Any] | None:
    """Handle a statement of a session that inserts, updates or deletes rows with attachments, or rows that cascade to some."""
    statement = executed_statement(state)
    for inner in written_within(statement):
        _refuse_values(state, inner, _written(state, inner))
    if not isinstance(statement, Insert | Update | Delete):
        return None
    if isinstance(statement, Delete):
        return _delete(state, statement)
    written = list(_written(state, statement))
    if not written:
        return None
    _refuse_values(state, statement, written)
    return None if isinstance(statement, Insert) else _update(state, statement, written)


def _delete(state: ORMExecuteState, statement: Delete) -> Result[Any] | None:
    tables, table = _tables_of(statement.table), _table(statement.table)
    if tables is None or not tables.concerns(table):
        return None
    parameters = _parameter_sets(state)
    columns = tables.attachments(table)
    reached: list[tuple[Connection, list[RowRef]]] = []
    known = 0
    for connection in _connections(state, statement):
        held, keys = lock_statement(
            connection, table, columns, statement.whereclause, parameters, deleting=True, source=_source(statement, table)
        )
        reached.append((connection, [*held, *find_cascaded(connection, tables, table, keys)]))
        known += len(keys)
    result = _displacing(state, reached)
    _require_known(result, known, parameters)
    return result


def _update(state: ORMExecuteState, statement: Update, written: list[Column[Any]]) -> Result[Any]:
    parameters = _parameter_sets(state)
    reached: list[tuple[Connection, list[RowRef]]] = []
    matched: dict[Table, int] = {}
    missed: list[tuple[Connection, Table, list[tuple[Any, ...]]]] = []
    for connection in _connections(state, statement):
        for table in dict.fromkeys(column.table for column in written):
            columns = [column for column in written if column.table is table]
            keys = _listed_keys(state, statement, table)
            if keys is None:
                source, where = _source(statement, table), statement.whereclause
                held, keys = lock_statement(connection, table, columns, where, parameters, deleting=False, source=source)
                matched[table] = matched.get(table, 0) + len(keys)
            else:
                held, missing = lock_rows(connection, table, keys, columns, deleting=False)
                missed.append((connection, table, missing))
            reached.append((connection, held))
    result = _displacing(state, reached)
    if any(are_there(connection, table, keys) for connection, table, keys in missed):
        raise _hit_unknown_rows()
    for known in matched.values():
        _require_known(result, known, parameters)
    return result


def _displacing(state: ORMExecuteState, reached: Sequence[tuple[Connection, list[RowRef]]]) -> Result[Any]:
    """Execute the statement, and displace the objects that its rows no longer refer to.

    Raises:
        ConfigurationError: A row holds a file, and the connection is in autocommit mode; the statement was not executed.
    """
    for connection, held in reached:
        if held:
            transactions.require_transactions(connection)
    result = state.invoke_statement()
    frame = transactions.unit_of(state.session).frame(flush.current_transaction(state.session))
    for connection, held in reached:
        remaining = still_referenced(connection, held)
        displaced = flush.displace(frame, [entry for entry in held if entry.place not in remaining])
        write_displaced(connection, displaced)
        flush.write_left(connection, frame, held)
    return result


def _require_known(result: Result[Any], known: int, parameters: Sequence[Any]) -> None:
    """Raise if a statement matched a row that another transaction has committed since the rows were read: its object is unknown.

    Several sets of parameters may match a row more than once, so their row count proves nothing.
    """
    if len(parameters) == 1 and getattr(result, "rowcount", -1) > known:
        raise _hit_unknown_rows()


def _hit_unknown_rows() -> StaleAttachmentError:
    return StaleAttachmentError(
        "a bulk statement matched rows that another transaction has committed since they were read; retry the transaction"
    )


def _connections(state: ORMExecuteState, statement: Update | Delete) -> Iterator[Connection]:
    """Yield the connections that a statement executes on: one, except in a sharded session."""
    session = state.session
    if state.is_orm_statement and state.execution_options.get("autoflush", True):
        # The statement autoflushes, which would change its rows after they were read.
        session._autoflush()
    for arguments in _bind_arguments(state, statement):
        connection = session.connection(bind_arguments=arguments)
        transactions.watch(session, connection)
        yield connection


def _bind_arguments(state: ORMExecuteState, statement: Update | Delete) -> Iterator[dict[str, Any]]:
    """Yield the bind arguments of a statement; in a sharded session once for each shard that the session chooses."""
    given = {"clause": statement, **state.bind_arguments}
    if not isinstance(state.session, ShardedSession):
        yield given
        return
    options = getattr(statement, "_with_options", ())
    chosen: list[Any] = [option.shard_id for option in options if isinstance(option, set_shard_id)]
    chosen += [state.execution_options.get("identity_token"), state.execution_options.get("_sa_shard_id")]
    chosen.append(given.get("shard_id"))
    one = next((shard for shard in chosen if shard is not None), None)
    for shard in state.session.execute_chooser(state) if one is None else [one]:
        yield {**given, "shard_id": shard}


def _parameter_sets(state: ORMExecuteState) -> list[Any]:
    given = state.parameters
    return list(given) if isinstance(given, Sequence) and given else [given or None]


def _tables_of(target: Any) -> Tables | None:
    """Return the tables of the base that the table of a statement belongs to, if the base is bound."""
    table = _table(target)
    binding = find_binding(table.metadata) if isinstance(table, Table) else None
    return None if binding is None else attachment_tables(binding.metadata)


def _source(statement: Update | Delete, table: Table) -> FromClause:
    """Return the table as the criteria of a statement name it, which may be an alias."""
    return statement.table if isinstance(statement.table, Alias) and _table(statement.table) is table else table


def _table(target: Any) -> Any:
    """Return the metadata's table for the annotated form or the alias in a statement."""
    target = getattr(target, "element", target)
    metadata = getattr(target, "metadata", None)
    return target if metadata is None else metadata.tables.get(target.fullname, target)


def _listed_keys(state: ORMExecuteState, statement: Update, table: Table) -> list[tuple[Any, ...]] | None:
    """Return the primary keys of a bulk UPDATE by primary key; None for any other statement."""
    mapper = state.bind_mapper
    if mapper is None or statement.whereclause is not None or not isinstance(state.parameters, list):
        return None
    names = [mapper.get_property_by_column(column).key for column in table.primary_key]
    return [tuple(row[name] for name in names) for row in state.parameters]


def _written(state: ORMExecuteState, statement: Insert | Update) -> Iterator[Column[Any]]:
    """Yield the attachment columns that a statement writes, by column or attribute names."""
    names = {name for name, _ in _values(statement, state.parameters)}
    names |= {getattr(name, "key", name) for name in getattr(statement, "_select_names", None) or ()}
    tables, mapper = _tables_of(statement.table), state.bind_mapper
    if not names or tables is None:
        return
    written: dict[Any, None] = dict.fromkeys([_table(statement.table), *(mapper.tables if mapper is not None else ())])
    for table in written:
        yield from (column for column in tables.attachments(table) if names & _names(mapper, column))


def _names(mapper: Mapper[Any] | None, column: Column[Any]) -> set[str]:
    attributes = () if mapper is None else (slot.key for slot in slots_of(mapper) if slot.column is column)
    return {column.key, column.name, *attributes}


def _refuse_values(state: ORMExecuteState, statement: Insert | Update, written: Iterable[Column[Any]]) -> None:
    """Raise if a statement would write a ref without the hooks, from whatever source."""
    values = list(_values(statement, state.parameters))
    copied = {getattr(name, "key", name) for name in getattr(statement, "_select_names", None) or ()}
    overwritten = {name for name, _ in _values_on_conflict(statement)}
    for column in written:
        names = _names(state.bind_mapper, column)
        if names & overwritten:
            raise InvalidReferenceError(
                f"an upsert may not set the attachment {column.table.name}.{column.name}: the existing row may hold an object"
                " that would never be deleted; load the row and assign to it instead"
            )
        if names & copied or any(name in names and not _is_null(value) for name, value in values):
            raise InvalidReferenceError(
                f"a bulk statement may set the attachment {column.table.name}.{column.name} to None only;"
                " assign an Attachment to an instance and flush it instead"
            )


def _values(statement: Insert | Update, parameters: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that a statement writes, from all of its sources."""
    sources: list[Any] = [getattr(statement, "_values", None) or {}]
    sources.append(dict(getattr(statement, "_ordered_values", None) or ()))
    sources += [row for rows in getattr(statement, "_multi_values", ()) for row in rows]
    sources += [parameters] if isinstance(parameters, Mapping) else list(parameters or ())
    for source in sources:
        items = source.items() if isinstance(source, Mapping) else ()
        yield from ((str(getattr(key, "key", key)), value) for key, value in items)
    yield from _values_on_conflict(statement)


def _values_on_conflict(statement: Insert | Update) -> Iterator[tuple[str, Any]]:
    """Yield the names and values that an upsert writes to an existing row; dialects keep them in different attributes."""
    clause = getattr(statement, "_post_values_clause", None)
    written = getattr(clause, "update_values_to_set", None) or getattr(clause, "update", None) or ()
    items = written.items() if isinstance(written, Mapping) else written
    yield from ((str(getattr(key, "key", key)), value) for key, value in items)


def _is_null(value: Any) -> bool:
    if isinstance(value, BindParameter):
        return value.value is None
    return value is None or isinstance(value, Null)


# Legacy bulk operations such as `Session.bulk_update_mappings`. They have no event, except that of the subtransaction that they
# begin.
#
# While one is in progress, the statements of its session are checked. An UPDATE of an attachment would displace an object that
# would never be deleted, so it is refused; an INSERT with a file is refused by the column type, as everywhere.


guards: weakref.WeakKeyDictionary[Session, dict[SessionTransaction, _Guard]] = weakref.WeakKeyDictionary()
"""The sessions with a legacy bulk operation in progress, which is rare; the functions below are called for these only."""


def begin_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Check the statements of a subtransaction that is not a flush's, and so a bulk operation's."""
    guards.setdefault(session, {})[transaction] = guard = _Guard()
    around: SessionTransaction | None = transaction
    while around is not None:
        for connection, *_ in around._connections.values():
            guard.listen(connection)
        around = around.parent


def begin_connection(session: Session, connection: Connection) -> None:
    """Check the statements on a connection that a bulk operation has just begun to use."""
    for guard in guards[session].values():
        guard.listen(connection)


def end_transaction(session: Session, transaction: SessionTransaction) -> None:
    """Stop checking statements when a subtransaction ends."""
    guard = guards[session].pop(transaction, None)
    if guard is not None:
        guard.close()
    if not guards[session]:
        del guards[session]


def unlisten_all() -> None:
    """Remove all listeners."""
    for begun in guards.values():
        for guard in begun.values():
            guard.close()
    guards.clear()


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
        tables = _tables_of(statement.table)
        for column in () if tables is None else tables.attachments(_table(statement.table)):
            if column.key in written:
                raise InvalidReferenceError(
                    f"a legacy bulk operation must not write the attachment {column.table.name}.{column.name}, because nothing"
                    " would delete the object that its row holds: leave the attribute out, assign to an instance and flush it,"
                    " or set None by session.execute() and an update()"
                )


# Bulk statements with a `schema_translate_map` of their own: their rows are in other schemas than the session's.


def on_execute(state: ORMExecuteState) -> Result[Any] | None:
    """Handle a statement that a session executes, with the connection translating schemas as the statement does.

    Other listeners may replace the statement, so it is handled after all of them were called.

    Raises:
        ConfigurationError: The session is sharded, so the statement may have several connections.
    """
    statement = executed_statement(state)
    if len(state._events_todo) > 1 and isinstance(statement, Insert | Update | Delete):
        # This calls the remaining listeners, and then this one, with the state of the resulting statement.
        state._events_todo.append(on_execute)
        return state.invoke_statement()
    if TRANSLATE_MAP not in state.execution_options or not isinstance(statement, Update | Delete) or not _is_known(statement):
        return execute_bulk(state)
    if getattr(state.session, "connection_callable", None) is not None:
        raise ConfigurationError(
            "a bulk statement on rows with attachments cannot have a schema_translate_map of its own in a sharded session:"
            " set it on the shards' engines"
        )
    if state.is_orm_statement and state.execution_options.get("autoflush", True):
        # The statement autoflushes, and the flush needs the map of the session.
        state.session._autoflush()
    connection = state.session.connection(bind_arguments={"clause": statement, **state.bind_arguments})
    with _translating(connection, state.execution_options[TRANSLATE_MAP]):
        return execute_bulk(state)


def _is_known(statement: Update | Delete) -> bool:
    name = getattr(_table(statement.table), "name", None)
    return any(table.name == name for binding in active_bindings() for table in binding.metadata.tables.values())


@contextmanager
def _translating(connection: Connection, mapping: Any) -> Iterator[None]:
    usual = connection.get_execution_options().get(TRANSLATE_MAP)
    connection.execution_options(schema_translate_map=mapping)
    try:
        yield
    finally:
        connection.execution_options(schema_translate_map=usual)
