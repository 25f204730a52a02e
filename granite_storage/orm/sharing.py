"""Objects that several rows refer to, which only statements past the session bring about: an object stays while any row does.

The transaction that displaces objects asks before its COMMIT, on its own connection: there it sees what it has written itself,
in the schema and under the settings that its statements run with. A journal's worker asks by itself before it deletes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, CompoundSelect, Connection, Text, bindparam, func, inspect, select, union_all
from sqlalchemy.exc import DBAPIError

from granite_storage.orm._batches import batches
from granite_storage.orm._registry import active_bindings
from granite_storage.orm.indexed import find_location_columns
from granite_storage.orm.journal.deadlocks import codes_of
from granite_storage.orm.rows import among
from granite_storage.orm.scanning import where_json
from granite_storage.orm.types import location_of

if TYPE_CHECKING:
    from granite_storage.orm.columns import Tables
    from granite_storage.orm.unit import StoredObject
    from granite_storage.refs import StoredObjectRef

__all__ = ["find_referenced", "find_shared", "refers"]

logger: logging.Logger = logging.getLogger("granite_storage")

_MOST_PARAMETERS = 20_000
_MOST_ROWS = 200
_ROLLED_BACK = (1020, 1205, 1213)
"""Record changed, lock wait timeout, deadlock: https://mariadb.com/kb/en/mariadb-error-codes/"""


def find_shared(connection: Connection, objects: Sequence[StoredObject]) -> set[str]:
    """Return the locations of the objects that a row refers to, or may refer to, though other rows have let them go.

    An object counts as referred to where the database cannot say: an orphan is better than a file that is lost.
    """
    shared: set[str] = set()
    for binding in active_bindings():
        locations = [item.ref.location for item in objects if item.manager is binding.manager]
        try:
            found = find_referenced(connection, binding.tables, locations)
        except DBAPIError as error:
            if _ends_transaction(connection, error):
                raise
            logger.warning(
                "it is unknown whether other rows refer to %d objects that were displaced; the garbage collector deletes orphans",
                len(locations),
                exc_info=True,
            )
            found = set(locations)
        for location in found:
            logger.info("the object %r stays: another row refers to it", location)
        shared |= found
    return shared


def find_referenced(connection: Connection, tables: Tables, locations: Iterable[str]) -> set[str]:
    """Return which of these locations rows refer to, as the connection's transaction sees them.

    Tables that the database does not have are passed over: a base may have some in another one. MariaDB and MySQL answer from a
    snapshot, in which an object may still be in the row that another transaction has moved it out of: the rows that are found
    there are read once more under a lock.

    Raises:
        DBAPIError: The database cannot say; its transaction goes on, unless the error has ended it.
    """
    wanted = list(dict.fromkeys(locations))
    columns = tables.refs()
    if not columns or not wanted:
        return set()
    dialect = connection.dialect.name
    try:
        with _savepoint(connection):
            generated = frozenset(find_location_columns(connection, columns))
            question = tables.questions.get((dialect, generated))
            if question is None:
                question = tables.questions[dialect, generated] = _question(columns, dialect, generated)
            found = _answers(connection, question, wanted, len(columns))
    except DBAPIError as error:
        if _ends_transaction(connection, error):
            raise
        with _savepoint(connection):
            columns = _present(connection, columns)
            generated = frozenset(find_location_columns(connection, columns))
            question = _question(columns, dialect, generated, is_guarded=True) if columns else None
            found = _answers(connection, question, wanted, len(columns)) if question is not None else set()
    if found and dialect in ("mysql", "mariadb"):
        return _confirmed(connection, columns, generated, found)
    return found


def refers(connection: Connection, column: Column[Any], ref: StoredObjectRef) -> bool:
    """Tell whether a row of one column refers to an object, under whatever backend's key."""
    location = location_of(column, connection.dialect.name)[1]
    if connection.dialect.name == "sqlite":
        location = where_json(column, location)
    statement = select(func.count()).select_from(column.table).where(location == ref.location)
    return connection.execute(statement).scalar_one() > 0


def _question(
    columns: Sequence[Column[Any]], dialect: str, generated: frozenset[Column[Any]], *, is_guarded: bool = False
) -> CompoundSelect[Any]:
    wanted = bindparam("locations", expanding=True, type_=Text())
    parts = []
    for column in columns:
        _, location = location_of(column, dialect, is_generated=column in generated)
        if is_guarded and dialect == "sqlite":
            # One row whose JSON is damaged would spoil the whole statement; an index has only sound ones.
            location = where_json(column, location)
        parts.append(select(location.label("location")).select_from(column.table).where(location.in_(wanted)))
    return union_all(*parts)


def _answers(connection: Connection, question: CompoundSelect[Any], locations: Sequence[str], columns: int) -> set[str]:
    found: set[str] = set()
    for batch in batches(locations, max(1, _MOST_PARAMETERS // columns)):
        found |= set(connection.execute(question, {"locations": batch}).scalars())
    return found


def _confirmed(
    connection: Connection, columns: Sequence[Column[Any]], generated: frozenset[Column[Any]], locations: set[str]
) -> set[str]:
    """Return which of these locations, all of them in the snapshot of the transaction, rows refer to now."""
    confirmed: set[str] = set()
    for column in columns:
        table, keys = column.table, list(column.table.primary_key)
        _, location = location_of(column, connection.dialect.name, is_generated=column in generated)
        is_wanted = location.in_(sorted(locations))
        if not keys:
            confirmed |= set(connection.scalars(select(location).select_from(table).where(is_wanted)))
            continue
        rows = [tuple(row) for row in connection.execute(select(*keys).where(is_wanted).order_by(*keys))]
        for batch in batches(rows, _MOST_ROWS):
            locked = select(location).select_from(table).where(among(table, batch), is_wanted).with_for_update(read=True)
            confirmed |= set(connection.scalars(locked))
    return confirmed


def _ends_transaction(connection: Connection, error: DBAPIError) -> bool:
    """Tell whether the transaction may have ended with an error: MariaDB and MySQL roll back all of it after a deadlock."""
    if connection.dialect.name in ("mysql", "mariadb") and not codes_of(error).isdisjoint(_ROLLED_BACK):
        return True
    return connection.invalidated


def _present(connection: Connection, columns: Sequence[Column[Any]]) -> list[Column[Any]]:
    inspector = inspect(connection)
    tables = {column.table: inspector.has_table(column.table.name, schema=column.table.schema) for column in columns}
    return [column for column in columns if tables[column.table]]


@contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    """Let an error take back nothing but the question; only PostgreSQL would take back the transaction.

    It is none of SQLAlchemy's savepoints, whose events would tell of work that is undone.
    """
    if connection.dialect.name != "postgresql":
        yield
        return
    connection.exec_driver_sql("SAVEPOINT granite_storage_question")
    try:
        yield
    except DBAPIError:
        if not connection.invalidated:
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT granite_storage_question")
        raise
    connection.exec_driver_sql("RELEASE SAVEPOINT granite_storage_question")
