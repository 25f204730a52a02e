"""What rows hold at this moment, read under their locks; not what the identity map remembers of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    ForeignKeyConstraint,
    FromClause,
    Row,
    Select,
    Table,
    and_,
    event,
    or_,
    select,
)

from granite_storage.orm._util import batches
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import Tables
from granite_storage.refs import StoredObjectRef

__all__ = [
    "CountedDeletes",
    "RowRef",
    "among",
    "are_there",
    "cascaded",
    "lock_rows",
    "lock_statement",
    "read_refs",
    "read_rows",
    "still_referenced",
    "take_write_lock",
]

_AT_A_TIME = 200


@dataclass(frozen=True, slots=True)
class RowRef:
    """A ref, and the row and column that hold it."""

    table: Table
    primary_key: tuple[Any, ...]
    column: Column[Any]
    ref: StoredObjectRef

    @property
    def place(self) -> tuple[str, str]:
        """Where the object is: its backend and location."""
        return self.ref.backend, self.ref.location


def lock_rows(
    connection: Connection,
    table: Table,
    primary_keys: Iterable[tuple[Any, ...]],
    columns: Sequence[Column[Any]],
    *,
    deleting: bool,
) -> tuple[list[RowRef], list[tuple[Any, ...]]]:
    """Lock rows in the order of their primary keys; return the refs they hold, and the primary keys of which there is no row.

    A replacement takes the weaker lock, `FOR NO KEY UPDATE` on PostgreSQL, as its UPDATE would: with the stronger one, two
    inserts of children and the replacement of their parent's file wait for each other in a ring.

    What is not found is looked for once more where that may help: see `_looks`.
    """
    take_write_lock(connection, table)
    rows: list[Row[Any]] = []
    missing: list[tuple[Any, ...]] = []
    for keys in batches(_in_order(primary_keys), _AT_A_TIME):
        for _ in range(_looks(connection)):
            found = _rows(connection, table, columns, among(table, keys), deleting=deleting)
            rows += found
            if not (keys := _missing(keys, found, table)):
                break
        missing += keys
    return [ref for row in rows for ref in _refs_in(table, columns, row)], missing


def are_there(connection: Connection, table: Table, primary_keys: Iterable[tuple[Any, ...]]) -> bool:
    """Tell whether there are rows with any of these primary keys, and lock them: nobody else's are overlooked."""
    batched = batches(_in_order(primary_keys), _AT_A_TIME)
    return any(_rows(connection, table, [], among(table, keys), deleting=False) for keys in batched)


class CountedDeletes:
    """Counts the rows of a table that a flush deletes, where it has found less of them to lock than it means to delete.

    Args:
        connection: The connection of the flush.
        table: The table.
        known: How many of the rows were found.
    """

    def __init__(self, connection: Connection, table: Table, known: int) -> None:
        self._connection = connection
        self._table = table
        self._known = known
        self._deleted = 0
        event.listen(connection, "after_cursor_execute", self._count)

    @property
    def has_hit_others(self) -> bool:
        """Whether more rows were deleted than were found: others have been inserted with their primary keys meanwhile."""
        return self._deleted > self._known

    def close(self) -> None:
        """Count no longer."""
        event.remove(self._connection, "after_cursor_execute", self._count)

    def _count(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        if context is not None and context.isdelete and context.compiled.statement.table is self._table:
            self._deleted += max(cursor.rowcount, 0)  # of many at once some drivers do not know it


def lock_statement(
    connection: Connection,
    table: Table,
    columns: Sequence[Column[Any]],
    where: ColumnElement[bool] | None,
    parameters: Sequence[Any],
    *,
    deleting: bool,
    source: FromClause | None = None,
) -> tuple[list[RowRef], list[tuple[Any, ...]]]:
    """Lock the rows that a bulk statement will hit, for each set of parameters; return their refs and their primary keys.

    Args:
        connection: The connection.
        table: The table.
        columns: Its columns of refs that count.
        where: The statement's criteria.
        parameters: Its sets of parameters.
        deleting: Whether it deletes the rows.
        source: The table as the criteria name it, such as an alias; None where that is the table itself.
    """
    take_write_lock(connection, table)
    named = table if source is None else source
    keys = [_named_in(named, column) for column in table.primary_key]
    found = select(*keys, *(_named_in(named, column) for column in columns)).select_from(named)
    statement = _locked(connection, found, keys, deleting=deleting)
    if where is not None:
        statement = statement.where(where)
    rows: dict[tuple[Any, ...], Row[Any]] = {}
    for values in parameters:
        for _ in range(_looks(connection)):
            rows |= {tuple(row[: len(keys)]): row for row in connection.execute(statement, values)}
    held = [ref for row in rows.values() for ref in _refs_in(table, columns, row)]
    return held, list(rows)


def read_refs(
    connection: Connection, table: Table, primary_keys: Iterable[tuple[Any, ...]], columns: Sequence[Column[Any]]
) -> list[RowRef]:
    """Return the refs that rows hold now, read under their locks."""
    batched = batches(_in_order(primary_keys), _AT_A_TIME)
    return [held for keys in batched for held in _read(connection, table, columns, among(table, keys), deleting=False)]


def read_rows(
    connection: Connection, table: Table, primary_keys: Iterable[tuple[Any, ...]], columns: Sequence[Column[Any]]
) -> dict[tuple[Any, ...], dict[Column[Any], Any]]:
    """Return what is in columns of the rows that are there, by their primary keys, read under their locks."""
    count = len(table.primary_key)
    batched = batches(_in_order(primary_keys), _AT_A_TIME)
    rows = (row for keys in batched for row in _rows(connection, table, columns, among(table, keys), deleting=False))
    return {tuple(row[:count]): dict(zip(columns, row[count:], strict=True)) for row in rows}


def still_referenced(connection: Connection, held: Sequence[RowRef]) -> set[tuple[str, str]]:
    """Return where the objects are, as (backend, location), that their rows still hold.

    It reads under the rows' locks: a database that reads from a snapshot would show what the rows held earlier.
    """
    found: set[tuple[str, str]] = set()
    for table, column in {(entry.table, entry.column) for entry in held}:
        keys = [entry.primary_key for entry in held if entry.column is column]
        found |= {entry.place for entry in read_refs(connection, table, keys, [column])}
    return found


def cascaded(connection: Connection, tables: Tables, table: Table, primary_keys: Iterable[tuple[Any, ...]]) -> list[RowRef]:
    """Return the refs of rows that the database will delete, by `ON DELETE CASCADE`, along with rows of `table`.

    It follows the foreign keys row by row, so a table that cascades into itself is followed to its end.
    """
    held: list[RowRef] = []
    seen: set[tuple[str, tuple[Any, ...]]] = set()
    waiting: list[tuple[Table, list[tuple[Any, ...]]]] = [(table, _in_order(primary_keys))]
    while waiting:
        parent, keys = waiting.pop()
        for constraint in tables.cascades(parent):
            child = constraint.table
            take_write_lock(connection, child)
            columns = tables.attachments(child)
            reached: list[tuple[Any, ...]] = []
            for batch in batches(keys, _AT_A_TIME):
                for row in connection.execute(_children(connection, parent, batch, constraint, columns)):
                    key = tuple(row[: len(child.primary_key)])
                    if (child.fullname, key) not in seen:
                        seen.add((child.fullname, key))
                        reached.append(key)
                        held += _refs_in(child, columns, row)
            if reached:
                waiting.append((child, reached))
    return held


def take_write_lock(connection: Connection, table: Table) -> None:
    """On SQLite, take the write lock before anything is read, and wait for it.

    A read that comes first would make the later write fail at once in WAL mode, whatever the timeout, if another connection has
    written meanwhile. The statement changes no row and fires no default.
    """
    if connection.dialect.name == "sqlite":
        quote = connection.dialect.identifier_preparer
        column = quote.quote(next(iter(table.primary_key)).name)
        connection.exec_driver_sql(f"UPDATE {quote.format_table(table)} SET {column} = {column} WHERE 0")  # noqa: S608  # quoted


def _read(
    connection: Connection,
    table: Table,
    columns: Sequence[Column[Any]],
    where: ColumnElement[bool],
    *,
    deleting: bool,
) -> list[RowRef]:
    return [ref for row in _rows(connection, table, columns, where, deleting=deleting) for ref in _refs_in(table, columns, row)]


def _looks(connection: Connection) -> int:
    """Return how often rows are looked for, to find all that the statement after that will hit.

    On PostgreSQL a SELECT that had to wait for a transaction does not see what that one has inserted: of a row that was deleted
    and inserted anew with its primary key it finds nothing, while an UPDATE that follows hits the new row.
    """
    return 2 if connection.dialect.name == "postgresql" else 1


def _rows(
    connection: Connection, table: Table, columns: Sequence[Column[Any]], where: ColumnElement[bool], *, deleting: bool
) -> list[Row[Any]]:
    keys = list(table.primary_key)
    statement = _locked(connection, select(*keys, *columns).where(where), keys, deleting=deleting)
    return list(connection.execute(statement))


def _missing(keys: Sequence[tuple[Any, ...]], rows: Sequence[Row[Any]], table: Table) -> list[tuple[Any, ...]]:
    """Return the primary keys without a row; by their number first, since a driver may return another type than was given."""
    if len(rows) == len(keys):
        return []
    found = {tuple(row[: len(table.primary_key)]) for row in rows}
    return [key for key in keys if key not in found]


def _named_in(source: FromClause, column: Column[Any]) -> Column[Any]:
    """Return a table's column as it is of an alias of the table."""
    found: Any = source.corresponding_column(column)
    return column if found is None else found


def _locked(connection: Connection, statement: Select[Any], keys: Sequence[Column[Any]], *, deleting: bool) -> Select[Any]:
    table = keys[0].table
    return statement.order_by(*keys).with_for_update(key_share=not deleting, of=_lockable(connection, table))


def _children(
    connection: Connection,
    parent: Table,
    keys: Sequence[tuple[Any, ...]],
    constraint: ForeignKeyConstraint,
    columns: Sequence[Column[Any]],
) -> Select[Any]:
    """Select and lock the children of some parents; the parent goes by another name, for a table that refers to itself."""
    child, other = constraint.table, parent.alias()
    joined = and_(*(link.parent == other.c[link.column.key] for link in constraint.elements))
    statement = select(*child.primary_key, *columns).join_from(child, other, joined).where(among(other, keys))
    return statement.order_by(*child.primary_key).with_for_update(of=_lockable(connection, child))


def _lockable(connection: Connection, table: FromClause) -> FromClause | None:
    """Return what to lock the rows of alone, where the database can leave out those that a statement joins to them."""
    return table if connection.dialect.name == "postgresql" else None


def _refs_in(table: Table, columns: Sequence[Column[Any]], row: Row[Any]) -> Iterator[RowRef]:
    count = len(table.primary_key)
    for column, value in zip(columns, row[count:], strict=True):
        # A value that cannot be decoded says nothing of an object, so there is none to delete.
        if isinstance(value, Attachment) and value._state.ref is not None:
            yield RowRef(table, tuple(row[:count]), column, value._state.ref)


def among(table: FromClause, keys: Sequence[tuple[Any, ...]]) -> ColumnElement[bool]:
    """Return what holds for the rows with these primary keys."""
    columns: list[ColumnElement[Any]] = list(table.primary_key)
    if len(columns) == 1:
        return columns[0].in_([key[0] for key in keys])
    return or_(*(and_(*(column == value for column, value in zip(columns, key, strict=True))) for key in keys))


def _in_order(keys: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    unique = dict.fromkeys(keys)
    try:
        return sorted(unique)
    except TypeError:
        return sorted(unique, key=repr)
