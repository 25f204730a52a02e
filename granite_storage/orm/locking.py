"""Which objects rows refer to: the refs of locked rows, other rows that refer to the same objects, and where such rows may be.

All of it is read from the database, since the identity map may be out of date. All functions block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    ColumnElement,
    CompoundSelect,
    Connection,
    Engine,
    ForeignKeyConstraint,
    FromClause,
    Row,
    Select,
    Table,
    Text,
    TextClause,
    and_,
    bindparam,
    cast,
    event,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    text,
    union_all,
)
from sqlalchemy import column as named_column
from sqlalchemy import table as named_table
from sqlalchemy.exc import DBAPIError

from granite_storage._telemetry import fields_of
from granite_storage.exceptions import InvalidReferenceError
from granite_storage.locations import GENERATED_ID_LENGTH, generated_id
from granite_storage.orm._interfaces import StoredObject, active_bindings
from granite_storage.orm._util import (
    UNTRANSLATED,
    attached_databases,
    batches,
    codes_of,
    file_of,
    group,
    quoted_name,
    schema_on,
    without_pool,
)
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import (
    Tables,
    as_found,
    attachment_tables,
    location_column_name,
    location_of,
    variant_locations,
    variants_in,
    where_json,
)
from granite_storage.refs import StoredObjectRef

_BATCH_SIZE = 200


@dataclass(frozen=True, slots=True)
class RowRef:
    """A ref, and the row and column that it was read from."""

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
    inserts of children and the replacement of their parent's file would deadlock.

    Rows that are not found are selected a second time if that may help; see `_looks`.
    """
    take_write_lock(connection, table)
    rows: list[Row[Any]] = []
    missing: list[tuple[Any, ...]] = []
    for keys in batches(_in_order(primary_keys), _BATCH_SIZE):
        for _ in range(_looks(connection)):
            found = _rows(connection, table, columns, among(table, keys), deleting=deleting)
            rows += found
            if not (keys := _missing(keys, found, table)):
                break
        missing += keys
    return [ref for row in rows for ref in _refs_in(table, columns, row)], missing


def are_there(connection: Connection, table: Table, primary_keys: Iterable[tuple[Any, ...]]) -> bool:
    """Lock the rows with these primary keys, and return whether there are any."""
    return any(True for _ in _read(connection, table, primary_keys, []))


class CountedDeletes:
    """Counts the rows of a table that a flush deletes, if it found fewer rows to lock than it is to delete.

    Args:
        connection: The connection of the flush.
        table: The table.
        known: How many rows were found.
    """

    def __init__(self, connection: Connection, table: Table, known: int) -> None:
        self._connection = connection
        self._table = table
        self._known = known
        self._deleted = 0
        event.listen(connection, "after_cursor_execute", self._count)

    @property
    def has_hit_others(self) -> bool:
        """Whether more rows were deleted than were found, because others were inserted with the same primary keys since."""
        return self._deleted > self._known

    def close(self) -> None:
        """Stop counting."""
        event.remove(self._connection, "after_cursor_execute", self._count)

    def _count(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        if context is not None and context.isdelete and context.compiled.statement.table is self._table:
            self._deleted += max(cursor.rowcount, 0)  # some drivers do not report it for several rows


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
    """Lock the rows that a bulk statement matches, for each set of parameters; return their refs and their primary keys.

    Args:
        connection: The connection.
        table: The table.
        columns: The columns of refs to read.
        where: The statement's criteria.
        parameters: Its sets of parameters.
        deleting: Whether it deletes the rows.
        source: The table as the criteria name it, such as an alias; None for the table itself.
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
    return [ref for row in _read(connection, table, primary_keys, columns) for ref in _refs_in(table, columns, row)]


def read_rows(
    connection: Connection,
    table: Table,
    primary_keys: Iterable[tuple[Any, ...]],
    columns: Sequence[Column[Any]],
    *,
    shared: bool = False,
) -> dict[tuple[Any, ...], dict[Column[Any], Any]]:
    """Return the values of columns by primary key, read under the locks of the rows, or under locks that others may share."""
    count = len(table.primary_key)
    rows = _read(connection, table, primary_keys, columns, shared=shared)
    return {tuple(row[:count]): dict(zip(columns, row[count:], strict=True)) for row in rows}


def still_referenced(connection: Connection, held: Sequence[RowRef]) -> set[tuple[str, str]]:
    """Return the objects that their rows still refer to, as pairs of backend and location.

    The rows are read under their locks, because a snapshot would show earlier values.
    """
    found: set[tuple[str, str]] = set()
    for table, column in {(entry.table, entry.column) for entry in held}:
        keys = [entry.primary_key for entry in held if entry.column is column]
        found |= {entry.place for entry in read_refs(connection, table, keys, [column])}
    return found


def find_cascaded(connection: Connection, tables: Tables, table: Table, primary_keys: Iterable[tuple[Any, ...]]) -> list[RowRef]:
    """Return the refs of rows that `ON DELETE CASCADE` will delete along with rows of `table`.

    Foreign keys are followed row by row, also those of a table that refers to itself.
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
            for batch in batches(keys, _BATCH_SIZE):
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
    """On SQLite, acquire the write lock before the first read, and wait for it.

    After a read, a write would fail at once in WAL mode, whatever the timeout, if another connection has written in between. The
    statement changes no row and applies no `onupdate`.
    """
    if connection.dialect.name == "sqlite":
        column = connection.dialect.identifier_preparer.quote(next(iter(table.primary_key)).name)
        name = quoted_name(connection, schema_on(connection, table), table.name)  # which nothing translates
        connection.exec_driver_sql(f"UPDATE {name} SET {column} = {column} WHERE 0")  # noqa: S608  # quoted


def _read(
    connection: Connection,
    table: Table,
    primary_keys: Iterable[tuple[Any, ...]],
    columns: Sequence[Column[Any]],
    *,
    shared: bool = False,
) -> Iterator[Row[Any]]:
    for keys in batches(_in_order(primary_keys), _BATCH_SIZE):
        yield from _rows(connection, table, columns, among(table, keys), deleting=False, shared=shared)


def _looks(connection: Connection) -> int:
    """Return how often rows are selected, to find all that a later statement will match.

    On PostgreSQL a SELECT that had to wait for a transaction does not see what that one inserted: it finds no row if the row was
    deleted and inserted again with its primary key, while an UPDATE that follows matches the new row.
    """
    return 2 if connection.dialect.name == "postgresql" else 1


def _rows(
    connection: Connection,
    table: Table,
    columns: Sequence[Column[Any]],
    where: ColumnElement[bool],
    *,
    deleting: bool,
    shared: bool = False,
) -> list[Row[Any]]:
    keys = list(table.primary_key)
    statement = _locked(connection, select(*keys, *columns).where(where), keys, deleting=deleting, shared=shared)
    return list(connection.execute(statement))


def _missing(keys: Sequence[tuple[Any, ...]], rows: Sequence[Row[Any]], table: Table) -> list[tuple[Any, ...]]:
    """Return the primary keys without a row; the number is compared first, because a driver may return another type."""
    if len(rows) == len(keys):
        return []
    found = {tuple(row[: len(table.primary_key)]) for row in rows}
    return [key for key in keys if key not in found]


def _named_in(source: FromClause, column: Column[Any]) -> Column[Any]:
    """Return the column of an alias that corresponds to a column of the table."""
    found: Any = source.corresponding_column(column)
    return column if found is None else found


def _locked(
    connection: Connection, statement: Select[Any], keys: Sequence[Column[Any]], *, deleting: bool, shared: bool = False
) -> Select[Any]:
    of = keys[0].table if connection.dialect.name == "postgresql" else None
    return statement.order_by(*keys).with_for_update(read=shared, key_share=not deleting, of=of)


def _children(
    connection: Connection,
    parent: Table,
    keys: Sequence[tuple[Any, ...]],
    constraint: ForeignKeyConstraint,
    columns: Sequence[Column[Any]],
) -> Select[Any]:
    """Select and lock the children of some parents; the parent is aliased, for a table that refers to itself."""
    child, other = constraint.table, parent.alias()
    joined = and_(*(link.parent == other.c[link.column.key] for link in constraint.elements))
    statement = select(*child.primary_key, *columns).join_from(child, other, joined).where(among(other, keys))
    return _locked(connection, statement, list(child.primary_key), deleting=True)


def _refs_in(table: Table, columns: Sequence[Column[Any]], row: Row[Any]) -> Iterator[RowRef]:
    count = len(table.primary_key)
    for column, value in zip(columns, row[count:], strict=True):
        # A value that cannot be decoded names no object to delete.
        if isinstance(value, Attachment) and value._state.ref is not None:
            yield RowRef(table, tuple(row[:count]), column, value._state.ref)


def among(table: FromClause, keys: Sequence[tuple[Any, ...]]) -> ColumnElement[bool]:
    """Return the criterion for the rows with these primary keys."""
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


# Objects that several rows refer to, which only SQL without the session can cause: an object is kept while any row refers to it.
#
# The transaction that displaces objects searches before its COMMIT, on its own connection, which sees its own writes and has the
# schema and settings of its statements. The worker of a journal searches by itself before it deletes.


logger: logging.Logger = logging.getLogger("granite_storage")

_MOST_PARAMETERS = 20_000
_MOST_COLUMNS = 50
"""Of one statement: PostgreSQL starts parallel workers for an expensive one, which takes longer than the statement itself."""
_MOST_ROWS = 200
_ROLLED_BACK = (1020, 1213)
"""Record changed, deadlock: https://mariadb.com/kb/en/mariadb-error-codes/"""
_LOCK_WAIT_TIMEOUT = 1205
_SERIALIZATION_FAILURES = ("40001", "40P01")
_LOCK_TIMEOUT = 3
"""Seconds that the search waits for locks: a migration in one schema must not block commits in another."""


def find_shared(connection: Connection, objects: Sequence[StoredObject]) -> set[str]:
    """Return the locations of displaced objects, and of their variants, that a row refers to, or may refer to.

    The tables of every base are searched for every object, whatever its manager: two managers may lead to the same place. Of an
    object and its variants each is searched for by itself: the ref in a row may nest a variant, or be a variant's own. If the
    database cannot tell, an object counts as referenced: an orphan is better than a lost file.
    """
    bindings = active_bindings()
    columns = list(dict.fromkeys(column for binding in bindings for column in attachment_tables(binding.metadata).refs()))
    managers = [item.manager for item in objects]
    required = {
        column for binding in bindings if binding.manager in managers for column in attachment_tables(binding.metadata).refs()
    }
    sources = {part.ref.location: part.source for item in objects for part in item.parts}
    try:
        shared = find_referenced(connection, columns, sources, required=required)
    except (DBAPIError, LookupError, InvalidReferenceError) as error:
        if isinstance(error, DBAPIError) and _ends_transaction(connection, error):
            raise
        logger.warning(
            "it is unknown whether other rows refer to %d displaced objects; they are left to the garbage collector: %s",
            len(sources),
            ", ".join(map(repr, sources)),
            exc_info=True,
        )
        return set(sources)
    for location in shared:
        logger.info("the object %r is kept, because another row refers to it", location, extra=fields_of(location=location))
    return shared


def find_shared_afresh(places: Sequence[tuple[Engine, Mapping[str, Any]]], objects: Sequence[StoredObject]) -> set[str]:
    """Return the result of `find_shared` in new transactions, on connections of their own.

    A snapshot does not show rows that others have committed since, and a transaction that is rolled back does not show which of
    its rows were committed before. An SQLite database in memory is not searched, since it has no second connection.

    Args:
        places: The engines to connect to, each with the options of the connection that the objects were displaced on.
        objects: The objects.
    """
    shared: set[str] = set()
    for engine, options in places:
        try:
            with without_pool(engine).connect() as connection:
                fresh = connection.execution_options(**options)
                match connection.dialect.name:
                    case "sqlite":
                        if not file_of(fresh):
                            continue
                        fresh.exec_driver_sql(f"PRAGMA busy_timeout = {_LOCK_TIMEOUT * 1000}")
                    case name:
                        fresh = fresh.execution_options(isolation_level="READ COMMITTED")
                        if name in ("mysql", "mariadb"):
                            fresh.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {_LOCK_TIMEOUT}")
                shared |= find_shared(fresh, objects)
        except (DBAPIError, OSError):
            logger.warning(
                "%d objects of an ended transaction are kept, since rows may refer to them", len(objects), exc_info=True
            )
            return {part.ref.location for item in objects for part in item.parts}
    return shared


def find_referenced(
    connection: Connection,
    columns: Sequence[Column[Any]],
    objects: Mapping[str, str | None],
    *,
    required: Collection[Column[Any]] = (),
) -> set[str]:
    """Return the locations of those of some objects that rows refer to, as the connection's transaction sees them.

    The columns are searched where the connection resolves them, and those of the same name in every other schema. Tables that the
    database does not have are ignored: a base may have tables in several databases. MariaDB and MySQL read from a snapshot, in
    which an object may still be in a row that another transaction has moved it from, so the rows found there are read again under
    a lock.

    Args:
        connection: The connection.
        columns: Columns of refs.
        objects: The locations of the objects; a variant's with that of its original, in whose rows alone it is nested.
        required: Those of the columns that existing tables must have.

    Raises:
        DBAPIError: The search failed; the transaction continues unless the error has ended it.
        LookupError: A table lacks a column, or this role may not read it.
        InvalidReferenceError: A row that holds an original has variants that this version cannot read.
    """
    if not columns or not objects:
        return set()

    def look() -> dict[Place, Sequence[Column[Any]]]:
        with _savepoint(connection):
            return _places(connection, columns, required)

    try:
        with _savepoint(connection):
            places = _places(connection, columns, required)
            found = _answers(connection, tuple(places), objects)
    except DBAPIError as error:
        if _ends_transaction(connection, error):
            raise
        # One of them was dropped since the catalogue was read, or has a row whose JSON is damaged.
        places = look()
        found = set()
        for place in places:
            ask = partial(_answers, connection, (place,), objects, is_guarded=True)
            found |= _tolerantly(connection, place, ask, look)
    if found and connection.dialect.name in ("mysql", "mariadb"):
        confirmed: set[str] = set()
        doubted = {location: objects[location] for location in sorted(found)}
        for place, key in places.items():
            confirmed |= _tolerantly(connection, place, partial(_confirmed, connection, place, key, doubted), look)
        return confirmed
    return found


def refers(connection: Connection, column: Column[Any], ref: StoredObjectRef) -> bool:
    """Return whether a row of one column refers to an object, whatever the backend key of its ref."""
    location = location_of(column, connection.dialect.name)[1]
    if connection.dialect.name == "sqlite":
        location = where_json(column, location)
    statement = select(func.count()).select_from(column.table).where(location == ref.location)
    return connection.execute(statement).scalar_one() > 0


def _places(
    connection: Connection, columns: Sequence[Column[Any]], required: Collection[Column[Any]]
) -> dict[Place, Sequence[Column[Any]]]:
    """Return where the columns are, in every schema, each with the primary key that its table has by the models."""
    catalogue = read_catalogue(connection, columns)
    places: dict[Place, Sequence[Column[Any]]] = {}
    for column in columns:
        schema = schema_on(connection, column.table)
        place = catalogue.place(schema, column)
        if place is not None:
            places.setdefault(place, list(column.table.primary_key))
        elif column in required and catalogue.table(schema, column.table.name):
            raise LookupError(f"the table {column.table.fullname} has no column {column.name}")
    for place, column in catalogue.namesakes().items():
        places.setdefault(place, list(column.table.primary_key))
    obstacles = describe_obstacles(places)
    if obstacles:
        raise LookupError(
            "; ".join(f"{problem}, where rows may refer to the same objects: {remedy}" for problem, remedy in obstacles)
        )
    # Sorted, so that the statements are the same for all tenants.
    return dict(sorted(places.items(), key=lambda item: item[0].names))


@lru_cache(maxsize=256)  # transactions share the statements, and so their compiled forms
def _question(places: tuple[Place, ...], dialect: str, is_guarded: bool, has_variants: bool) -> CompoundSelect[Any]:
    wanted = bindparam("locations", expanding=True, type_=Text())
    parts = []
    for place in places:
        column = place.column
        _, location = location_of(column, dialect, is_generated=place.is_generated)
        selected = _selected(column, location, dialect, has_variants=has_variants)
        if is_guarded and dialect == "sqlite":
            # One row whose JSON is damaged would fail the whole statement; an index has only valid ones.
            location, *selected = (where_json(column, value) for value in (location, *selected))
        parts.append(select(*_labelled(selected)).select_from(column.table).where(location.in_(wanted)))
    return union_all(*parts)


def _selected(column: Column[Any], location: ColumnElement[str], dialect: str, *, has_variants: bool) -> list[ColumnElement[Any]]:
    """Return what `_named` reads of the rows of a column: the location, and the variants where some are in question."""
    return [location, variants_in(column, dialect)] if has_variants else [location]


def _labelled(selected: Iterable[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    return [value.label(name) for value, name in zip(selected, ("location", "variants"), strict=False)]


def _asked(objects: Mapping[str, str | None]) -> list[str]:
    """Return the locations by which rows are found: those of the objects, and of the originals that nest some of them."""
    return list(dict.fromkeys([*objects, *(source for source in objects.values() if source is not None)]))


def _has_variants(objects: Mapping[str, str | None]) -> bool:
    return any(source is not None for source in objects.values())


def _named(rows: Iterable[Row[Any]], objects: Mapping[str, str | None]) -> set[str]:
    """Return which of some objects rows refer to, each of which is a location and the variants beside it."""
    named: set[str] = set()
    for row in rows:
        named.add(row.location)
        if len(row) > 1:
            named |= variant_locations(row.variants)
    return named & objects.keys()


def _answers(
    connection: Connection, places: tuple[Place, ...], objects: Mapping[str, str | None], *, is_guarded: bool = False
) -> set[str]:
    found: set[str] = set()
    asked_for, has_variants = _asked(objects), _has_variants(objects)
    texts = [place for place in places if place.is_text]
    mentions = [one for place in texts for one in mentions_at(place, connection.dialect.name, objects)]
    for mentioned in batches(mentions, _MOST_COLUMNS):
        asked = union_all(*(select(location.label("location")).where(is_there) for location, is_there in mentioned))
        found |= set(connection.execute(asked, execution_options=UNTRANSLATED).scalars())
    for some in batches([place for place in places if not place.is_text], _MOST_COLUMNS):
        question = _question(tuple(some), connection.dialect.name, is_guarded, has_variants)
        for batch in batches(asked_for, max(1, _MOST_PARAMETERS // len(some))):
            found |= _named(connection.execute(question, {"locations": batch}, execution_options=UNTRANSLATED), objects)
    return found


def _tolerantly(
    connection: Connection, place: Place, ask: Callable[[], set[str]], look: Callable[[], Collection[Place]]
) -> set[str]:
    """Search one place; return nothing if it was dropped since the catalogue was read."""
    try:
        with _savepoint(connection):
            return ask()
    except DBAPIError as error:
        if _ends_transaction(connection, error):
            raise
        if place not in look():
            return set()
        raise


def _confirmed(
    connection: Connection, place: Place, primary_key: Sequence[Column[Any]], objects: Mapping[str, str | None]
) -> set[str]:
    """Return which of these objects, all found in the snapshot of the transaction, rows at a place refer to now.

    Mentions in the text of a column are not re-checked.
    """
    if place.is_text:
        return _answers(connection, (place,), objects)
    column = as_found(str(place.schema), place.table, place.name, keys=tuple(primary_key))
    table, keys = column.table, list(column.table.primary_key)
    _, location = location_of(column, connection.dialect.name, is_generated=place.is_generated)
    is_wanted = location.in_(_asked(objects))
    selected = _selected(column, location, connection.dialect.name, has_variants=_has_variants(objects))
    found = select(*_labelled(selected)).select_from(table)
    if not keys:
        return _named(connection.execute(found.where(is_wanted), execution_options=UNTRANSLATED), objects)
    unlocked = select(*keys).where(is_wanted).order_by(*keys)
    rows = [tuple(row) for row in connection.execute(unlocked, execution_options=UNTRANSLATED)]
    confirmed: set[str] = set()
    for batch in batches(rows, _MOST_ROWS):
        locked = found.where(among(table, batch), is_wanted).with_for_update(read=True)
        confirmed |= _named(connection.execute(locked, execution_options=UNTRANSLATED), objects)
    return confirmed


def _ends_transaction(connection: Connection, error: DBAPIError) -> bool:
    """Return whether an error has ended the transaction or made it fail at COMMIT, so that the caller must retry it.

    MariaDB and MySQL roll back the transaction after a deadlock, and after a timeout if `innodb_rollback_on_timeout` is set.
    """
    codes = codes_of(error)
    if connection.dialect.name == "postgresql" and not codes.isdisjoint(_SERIALIZATION_FAILURES):
        return True
    if connection.dialect.name in ("mysql", "mariadb"):
        if not codes.isdisjoint(_ROLLED_BACK):
            return True
        if _LOCK_WAIT_TIMEOUT in codes:
            is_mariadb = getattr(connection.dialect, "is_mariadb", False)  # MySQL does not tell
            return not is_mariadb or not connection.exec_driver_sql("SELECT @@in_transaction").scalar()
    return connection.invalidated


@contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    """Confine an error to the search, and limit how long it waits for locks.

    It is not one of SQLAlchemy's savepoints, because their events would be taken for a rollback of the session's work.
    """
    match connection.dialect.name:
        case "postgresql":
            connection.exec_driver_sql("SAVEPOINT granite_storage_question")
            try:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}s'")
                yield
            finally:
                # It has written nothing; this restores the timeout.
                if not connection.invalidated:
                    connection.exec_driver_sql("ROLLBACK TO SAVEPOINT granite_storage_question")
        case "mysql" | "mariadb":
            connection.exec_driver_sql(
                f"SET @granite_storage_wait = @@lock_wait_timeout, SESSION lock_wait_timeout = {_LOCK_TIMEOUT}"
            )
            try:
                yield
            finally:
                if not connection.invalidated:
                    connection.exec_driver_sql("SET SESSION lock_wait_timeout = @granite_storage_wait")
        case _:
            yield


# Where the columns of refs are in a database: those of the models, and those of the same names in every other schema.
#
# A table may have been cloned into another schema, with rows that refer to the same objects: of a tenant, of an archive, of a
# copy for tests. No model declares such a table and no session need have used it, so each check asks the catalogue of the
# database.


_CANNOT_SHOW = (1142, 1146, 1356)
"""No privilege, no such table, a broken view: https://mariadb.com/kb/en/mariadb-error-codes/"""

Form = Literal["json", "text"]
Obstacle = Literal["privileges", "row security", "temporary table"]

_POSTGRESQL_NAMED = text("""
    SELECT n.nspname, c.relname, a.attname, pg_table_is_visible(c.oid),
        CASE
            WHEN NOT COALESCE(has_schema_privilege(n.oid, 'USAGE') AND has_column_privilege(c.oid, a.attnum, 'SELECT'), true)
                THEN 'privileges'
            WHEN row_security_active(c.oid) THEN 'row security'
        END,
        CASE
            WHEN c.relkind NOT IN ('r', 'p', 'f', 'm') OR c.relispartition OR NOT c.relispopulated THEN NULL
            WHEN b.oid IN ('jsonb'::regtype, 'json'::regtype) THEN 'json'
            WHEN t.typlen = -1 AND t.typcategory NOT IN ('N', 'V', 'I') OR t.typlen >= :shortest THEN CASE
                WHEN b.oid IN ('varchar'::regtype, 'bpchar'::regtype) AND a.atttypmod BETWEEN 4 AND 3 + :shortest THEN NULL
                ELSE 'text'
            END
        END
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    LEFT JOIN pg_attribute AS a
        ON a.attrelid = c.oid AND a.attname = ANY (:columns) AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN LATERAL (
        SELECT CASE WHEN t.typtype <> 'd' THEN t.oid ELSE (
            WITH RECURSIVE types(oid, base) AS (
                SELECT t.oid, t.typbasetype
                UNION ALL SELECT u.oid, u.typbasetype FROM pg_type AS u JOIN types ON u.oid = types.base
            )
            SELECT types.oid FROM types WHERE types.base = 0
        ) END AS oid
    ) AS b ON true
    WHERE c.relname = ANY (:tables) AND c.relkind IN ('r', 'p', 'f', 'm', 'v')
        AND n.nspname <> 'information_schema' AND (left(n.nspname, 3) <> 'pg_' OR n.oid = pg_my_temp_schema())
    ORDER BY 1, 2, 3
""").bindparams(bindparam("tables", type_=ARRAY(Text())), bindparam("columns", type_=ARRAY(Text())))
_MARIADB_NAMED = text("""
    SELECT table_schema, table_name, column_name, table_schema = DATABASE(),
        CASE WHEN privileges NOT LIKE '%select%' THEN 'privileges' END,
        CASE
            WHEN data_type = 'json' OR data_type = 'longtext' AND collation_name = 'utf8mb4_bin' THEN 'json'
            WHEN character_maximum_length >= :shortest THEN 'text'
        END
    FROM information_schema.columns
    WHERE table_name IN :tables AND (column_name IN :columns OR ordinal_position = 1)
        AND table_schema NOT IN ('information_schema', 'mysql', 'performance_schema', 'sys')
    ORDER BY 1, 2, 3
""").bindparams(bindparam("tables", expanding=True), bindparam("columns", expanding=True))
_MARIADB_TABLE = text("""
    SELECT table_schema, table_name FROM information_schema.tables
    WHERE table_name = :name AND table_schema = COALESCE(:schema, DATABASE())
""")
_MARIADB_TEMPORARY = "SHOW SESSION STATUS LIKE 'Com_create_temporary_table'"


def find_named(connection: Connection, tables: list[str], columns: list[str]) -> list[tuple[Any, ...]]:
    """Return the columns of given names in tables of given names, in every schema that is visible to this role.

    It is one question, of the catalogue alone, on all databases but SQLite, and one more on MariaDB, whose catalogue does not
    show temporary tables: transactions ask it before they commit.

    Returns:
        For each the schema, as the database calls it; the table or view; the column, None or any other if the table has none of
        the requested ones; whether the name of the table without a schema resolves to this table; and the obstacle and the form
        as in a `Place`, but no form for what has no rows of its own.
    """
    names: dict[str, Any] = {"tables": tables, "columns": columns, "shortest": GENERATED_ID_LENGTH}
    if connection.dialect.name == "sqlite":
        return _sqlite_named(connection, tables, columns)
    is_postgresql = connection.dialect.name == "postgresql"
    statement = _POSTGRESQL_NAMED if is_postgresql else _MARIADB_NAMED
    rows = [tuple(row) for row in connection.execute(statement, names, execution_options=UNTRANSLATED)]
    if is_postgresql or not _has_temporary(connection):
        return rows
    shadowed = {place for place in {row[:2] for row in rows} if _is_temporary(connection, *place)}
    return [(*row[:4], "temporary table" if row[:2] in shadowed else row[4], row[5]) for row in rows]


def _sqlite_named(connection: Connection, tables: list[str], columns: list[str]) -> list[tuple[Any, ...]]:
    schemas = attached_databases(connection)
    quote = connection.dialect.identifier_preparer.quote
    statement = _sqlite_question(tuple(map(quote, schemas)))
    values = {f"schema_{number}": schema for number, schema in enumerate(schemas)}
    default: dict[str, int] = {}
    return [
        (schemas[number], table, name, default.setdefault(table.lower(), number) == number, None, "json" if is_table else None)
        for number, table, name, is_table in connection.execute(statement, {"tables": tables, "columns": columns, **values})
    ]


def _has_temporary(connection: Connection) -> bool:
    """Return whether a session of MariaDB may have temporary tables, by its counter of those that it created."""
    row = connection.exec_driver_sql(_MARIADB_TEMPORARY).first()
    return row is None or str(row[1]) != "0"


def _is_temporary(connection: Connection, schema: str, table: str) -> bool:
    """Return whether a name resolves to a temporary table, which shadows the one in the catalogue even with its schema."""
    quote = connection.dialect.identifier_preparer.quote
    try:
        row: Any = connection.exec_driver_sql(f"SHOW CREATE TABLE {quote(schema)}.{quote(table)}").first()
    except DBAPIError as error:
        if codes_of(error).isdisjoint(_CANNOT_SHOW):
            raise
        return False
    return row is not None and str(row[1]).startswith("CREATE TEMPORARY TABLE")


@lru_cache(maxsize=64)
def _sqlite_question(schemas: tuple[str, ...]) -> TextClause:
    parts = [
        f"SELECT {number}, m.name, c.name, m.type = 'table' FROM {schema}.sqlite_master AS m"  # noqa: S608  # quoted
        f" LEFT JOIN pragma_table_info(m.name, :schema_{number}) AS c ON c.name COLLATE NOCASE IN :columns"
        " WHERE m.type IN ('table', 'view') AND m.name COLLATE NOCASE IN :tables"
        for number, schema in enumerate(schemas)
    ]
    statement = text(f"{' UNION ALL '.join(parts)} ORDER BY 1, 2, 3")
    return statement.bindparams(bindparam("tables", expanding=True), bindparam("columns", expanding=True))


_OBSTACLES: dict[Obstacle, tuple[str, str]] = {
    "privileges": ("{role} may not read {tables}", "grant it SELECT"),
    "row security": (
        "row-level security may hide rows of {tables} from {role}",
        "bind a StorageJournal whose engine has a role that sees all rows, or leave the objects to a garbage collector that does",
    ),
    "temporary table": (
        "a temporary table of the same name hides the rows of {tables}",
        "drop it before the transaction deletes or replaces files",
    ),
}
_UNESCAPED = re.compile("[0-9A-Za-z._-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """A column in the database.

    Attributes:
        schema: The schema; None for a table that is looked for where its name leads.
        table: The table.
        name: The column.
        is_generated: Whether a generated column beside it has the locations; see `granite_storage.orm.references`.
        obstacle: What may hide its rows from this connection; None where nothing does.
        form: How it contains refs: as JSON that SQL queries by key, or anywhere in its text; None where that is not known.
    """

    schema: str | None
    table: str
    name: str
    is_generated: bool = False
    obstacle: Obstacle | None = None
    form: Form | None = None

    @property
    def is_text(self) -> bool:
        """Whether refs may be anywhere in its text, rather than JSON into which SQL looks by key."""
        return self.form == "text"

    @property
    def names(self) -> tuple[str, str, str]:
        """The key to sort by."""
        return self.schema or "", self.table, self.name

    @property
    def label(self) -> str:
        """The name of the table in messages."""
        return f"{self.schema}.{self.table}" if self.schema else self.table

    @property
    def column(self) -> Column[Any]:
        """The column for statements without schema translation; they are compiled once, because its table is given by name."""
        found = named_table(self.table, named_column(self.name, JSON()), schema=self.schema)
        named: Column[Any] = found.c[self.name]  # type: ignore[assignment]  # the columns of a `TableClause` are of this class
        return named


class Catalogue:
    """The columns of given names in a database at one moment.

    Args:
        connection: A connection, whose dialect tells which names are the same.
        columns: The columns.
        found: What it has; see `find_named`.
    """

    def __init__(self, connection: Connection, columns: Iterable[Column[Any]], found: Iterable[tuple[Any, ...]]) -> None:
        dialect: Any = connection.dialect
        self._preparer = dialect.identifier_preparer
        self._is_postgresql = dialect.name == "postgresql"
        # MariaDB's `lower_case_table_names` is 0 on Linux: `Doc` and `doc` are two tables there, and two databases.
        self._has_exact_tables = dialect.name in ("mysql", "mariadb") and dialect._casing == 0
        self._columns = list(columns)
        self._tables: dict[tuple[str, str], dict[str, Place]] = {}
        self._names: dict[tuple[str, str], tuple[str, str]] = {}
        self._default: dict[str, str] = {}
        for schema, table, name, is_default, obstacle, form in found:
            key = (schema, table) if self._has_exact_tables else (self._known(schema), self._known(table))
            self._names[key] = schema, table
            named = self._tables.setdefault(key, {})
            if name is not None:
                named[self._known(name)] = Place(schema, table, name, obstacle=obstacle, form=form)
            if is_default:
                self._default[key[1]] = key[0]

    def table(self, schema: str | None, name: str) -> tuple[str, str] | None:
        """Return schema and name of a model's table, in its schema or in a translated one; None if there is none."""
        key = self._key(schema, name)
        return None if key is None else self._names.get(key)

    def place(self, schema: str | None, wanted: Column[Any]) -> Place | None:
        """Return the place of a model's column, in its schema or in a translated one; None if there is none."""
        key = self._key(schema, wanted.table.name)
        named = None if key is None else self._tables.get(key)
        return None if named is None else self._place(named, wanted)

    def namesakes(self) -> dict[Place, Column[Any]]:
        """Return all columns with the names of a model's column and table that may contain refs, in all schemas."""
        places: dict[Place, Column[Any]] = {}
        by_table = group(self._columns, lambda item: self._table_name(item.table.name))
        for (_, name), named in self._tables.items():
            for wanted in by_table.get(name, ()):
                place = self._place(named, wanted)
                if place is not None and place.form is not None:
                    places.setdefault(place, wanted)
        return places

    def _key(self, schema: str | None, name: str) -> tuple[str, str] | None:
        table_name = self._table_name(name)
        schema_name = self._default.get(table_name) if schema is None else self._table_name(schema)
        return None if schema_name is None else (schema_name, table_name)

    def _place(self, named: Mapping[str, Place], wanted: Column[Any]) -> Place | None:
        found = named.get(self._folded(wanted.name))
        is_generated = self._known(location_column_name(wanted.name)) in named
        return found if found is None or not is_generated else replace(found, is_generated=True)

    def _known(self, name: str) -> str:
        """Return a name of the database in a form that can be compared."""
        return name if self._is_postgresql else name.lower()

    def _table_name(self, name: str) -> str:
        """Return the name of a model's table or schema as the database has it."""
        return str(name) if self._has_exact_tables else self._folded(name)

    def _folded(self, name: str) -> str:
        """Return a name of a model as the database has it: PostgreSQL folds one that is not quoted."""
        if self._is_postgresql and self._preparer.quote(name) != name:
            return str(name)
        return name.lower()


def describe_obstacles(places: Iterable[Place], role: str = "this role") -> list[tuple[str, str]]:
    """Return what hides, or may hide, rows of some places from a role, each with its remedy."""
    labels: dict[Obstacle, set[str]] = {}
    for place in places:
        if place.obstacle is not None:
            labels.setdefault(place.obstacle, set()).add(place.label)
    return [
        (problem.format(role=role, tables=", ".join(sorted(labels[kind]))), remedy)
        for kind, (problem, remedy) in _OBSTACLES.items()
        if kind in labels
    ]


def mentions_at(place: Place, dialect: str, locations: Iterable[str]) -> Iterator[tuple[ColumnElement[str], ColumnElement[bool]]]:
    """Yield each of the locations with whether a value at a place mentions it.

    What counts is the generated id, which no encoder of text escapes, or else as much of the location as none escapes. Bytes
    within an array or a row of PostgreSQL are hex digits in its text.
    """
    stored = place.column
    for location in locations:
        sought = generated_id(location) or max(_UNESCAPED.findall(location), key=len, default="")
        if dialect == "postgresql":
            value = cast(stored, Text())
            is_mentioned = or_(func.strpos(value, sought) > 0, func.strpos(value, sought.encode().hex()) > 0)
        else:
            is_mentioned = func.locate(sought, stored) > 0
        yield literal(location, Text()), exists(select(literal_column("1")).select_from(stored.table).where(is_mentioned))


def read_catalogue(connection: Connection, columns: Sequence[Column[Any]], tables: Sequence[Table] = ()) -> Catalogue:
    """Read from the catalogue all columns with the names of some, and the tables that lack them; blocking.

    Args:
        connection: The connection.
        columns: The columns.
        tables: Tables to look for as well, whatever their columns.
    """
    wanted = {item.table.name for item in columns} | {table.name for table in tables}
    spelled = sorted({_spelled(connection, name) for name in wanted})
    names = {_spelled(connection, item.name) for item in columns}
    if connection.dialect.name in ("mysql", "mariadb"):
        names |= {location_column_name(item.name) for item in columns}
    return Catalogue(connection, columns, find_named(connection, spelled, sorted(names)) if spelled else [])


def resolve(connection: Connection, table: Table) -> tuple[str, str] | None:
    """Return schema and name of the table that a model's table resolves to on a connection, after translation; or None.

    It blocks: call it with `AsyncConnection.run_sync`.
    """
    schema = schema_on(connection, table)
    found = read_catalogue(connection, [], [table]).table(schema, table.name)
    if found is None and connection.dialect.name in ("mysql", "mariadb"):
        # The catalogue has no columns of a table for a role that may change it and not use it.
        names = {"name": table.name, "schema": schema}
        row = connection.execute(_MARIADB_TABLE, names, execution_options=UNTRANSLATED).first()
        found = None if row is None else (str(row[0]), str(row[1]))
    return found


def _spelled(connection: Connection, name: str) -> str:
    """Return a name as the catalogue of the database spells it, which only PostgreSQL folds."""
    if connection.dialect.name == "postgresql" and connection.dialect.identifier_preparer.quote(name) == name:
        return name.lower()
    return str(name)
