"""Objects that several rows refer to, which only statements past the session bring about: an object stays while any row does.

The transaction that displaces objects asks before its COMMIT, on its own connection: there it sees what it has written itself,
in the schema and under the settings that its statements run with. A journal's worker asks by itself before it deletes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, CompoundSelect, Connection, Engine, Text, bindparam, func, select, union_all
from sqlalchemy.exc import DBAPIError

from granite_storage.orm._registry import active_bindings
from granite_storage.orm._util import TRANSLATE_MAP, UNTRANSLATED, batches, codes_of, without_pool
from granite_storage.orm.catalogue import Place, describe_obstacles, mentions_at, read_catalogue
from granite_storage.orm.columns import attachment_tables
from granite_storage.orm.locking import among
from granite_storage.orm.references import location_of, where_json

if TYPE_CHECKING:
    from granite_storage.orm._interfaces import StoredObject
    from granite_storage.refs import StoredObjectRef

__all__ = ["find_referenced", "find_shared", "find_shared_afresh", "refers"]

logger: logging.Logger = logging.getLogger("granite_storage")

_MOST_PARAMETERS = 20_000
_MOST_COLUMNS = 50
"""Of one statement: PostgreSQL starts workers for one that looks expensive, which takes longer than the statement itself."""
_MOST_ROWS = 200
_ROLLED_BACK = (1020, 1213)
"""Record changed, deadlock: https://mariadb.com/kb/en/mariadb-error-codes/"""
_LOCK_WAIT_TIMEOUT = 1205
_SERIALIZATION_FAILURES = ("40001", "40P01")
_LOCK_TIMEOUT = 3
"""Seconds that the question waits for the locks of others: a migration in one schema must not hold up the commits in another."""


def find_shared(connection: Connection, objects: Sequence[StoredObject]) -> set[str]:
    """Return the locations of the objects that a row refers to, or may refer to, though other rows have let them go.

    Every base is asked about every object, whatever manager it is bound to: two of them may lead to the same place. An object
    counts as referred to where the database cannot say: an orphan is better than a file that is lost.
    """
    bindings = active_bindings()
    columns = list(dict.fromkeys(column for binding in bindings for column in attachment_tables(binding.metadata).refs()))
    managers = [item.manager for item in objects]
    required = {
        column for binding in bindings if binding.manager in managers for column in attachment_tables(binding.metadata).refs()
    }
    locations = list(dict.fromkeys(item.ref.location for item in objects))
    try:
        shared = find_referenced(connection, columns, locations, required=required)
    except (DBAPIError, LookupError) as error:
        if isinstance(error, DBAPIError) and _ends_transaction(connection, error):
            raise
        logger.warning(
            "it is unknown whether other rows refer to %d objects that were displaced; they stay, for the garbage collector: %s",
            len(locations),
            ", ".join(map(repr, locations)),
            exc_info=True,
        )
        return set(locations)
    for location in shared:
        logger.info("the object %r stays: another row refers to it", location)
    return shared


def find_shared_afresh(places: Sequence[tuple[Engine, Mapping[str, Any]]], objects: Sequence[StoredObject]) -> set[str]:
    """Return what `find_shared` returns to transactions that begin now, on connections of their own.

    A snapshot does not show rows that others have committed since, and a transaction that is rolled back does not show which of
    its rows were committed before. A database of SQLite in memory cannot be asked: it has no second connection.

    Args:
        places: The engines to ask, each with the options of the connection that the objects were displaced on.
        objects: The objects.
    """
    shared: set[str] = set()
    for engine, options in places:
        try:
            with without_pool(engine).connect() as connection:
                fresh = connection.execution_options(**options)
                match connection.dialect.name:
                    case "sqlite":
                        if not _has_file(fresh):
                            continue
                        fresh.exec_driver_sql(f"PRAGMA busy_timeout = {_LOCK_TIMEOUT * 1000}")
                    case name:
                        fresh = fresh.execution_options(isolation_level="READ COMMITTED")
                        if name in ("mysql", "mariadb"):
                            fresh.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {_LOCK_TIMEOUT}")
                shared |= find_shared(fresh, objects)
        except (DBAPIError, OSError):
            logger.warning(
                "%d objects of an ended transaction stay: it is unknown whether rows refer to them", len(objects), exc_info=True
            )
            return {item.ref.location for item in objects}
    return shared


def _has_file(connection: Connection) -> bool:
    """Tell whether a database of SQLite is in a file, which a second connection reads as well."""
    return any(name == "main" and file for _, name, file in connection.exec_driver_sql("PRAGMA database_list"))


def find_referenced(
    connection: Connection, columns: Sequence[Column[Any]], locations: Iterable[str], *, required: Collection[Column[Any]] = ()
) -> set[str]:
    """Return which of these locations rows refer to, as the connection's transaction sees them.

    The columns are asked where the connection leads to, and those of the same name in every other schema. Tables that the
    database does not have are passed over: a base may have some in another one. MariaDB and MySQL answer from a snapshot, in
    which an object may still be in the row that another transaction has moved it out of: the rows that are found there are read
    once more under a lock.

    Args:
        connection: The connection.
        columns: Columns of refs.
        locations: The locations.
        required: Those of the columns that tables of their name may not lack.

    Raises:
        DBAPIError: The database cannot say; its transaction goes on, unless the error has ended it.
        LookupError: A table lacks a column, or this role may not read it.
    """
    wanted = list(dict.fromkeys(locations))
    if not columns or not wanted:
        return set()
    try:
        with _savepoint(connection):
            places = _places(connection, columns, required)
            found = _answers(connection, tuple(places), wanted)
    except DBAPIError as error:
        if _ends_transaction(connection, error):
            raise
        # One of them was dropped after the catalogue had named it, or has a row whose JSON is damaged.
        look = partial(_places_again, connection, columns, required)
        places = look()
        found = set()
        for place in places:
            ask = partial(_answers, connection, (place,), wanted, is_guarded=True)
            found |= _tolerantly(connection, place, ask, look)
    if found and connection.dialect.name in ("mysql", "mariadb"):
        look = partial(_places_again, connection, columns, required)
        confirmed: set[str] = set()
        for place, key in places.items():
            confirmed |= _tolerantly(connection, place, partial(_confirmed, connection, place, key, found), look)
        return confirmed
    return found


def refers(connection: Connection, column: Column[Any], ref: StoredObjectRef) -> bool:
    """Tell whether a row of one column refers to an object, under whatever backend's key."""
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
    translated = connection.get_execution_options().get(TRANSLATE_MAP) or {}
    places: dict[Place, Sequence[Column[Any]]] = {}
    for column in columns:
        schema = translated.get(column.table.schema, column.table.schema)
        place = catalogue.place(schema, column)
        if place is not None:
            places.setdefault(place, list(column.table.primary_key))
        elif column in required and catalogue.has_table(schema, column.table.name):
            raise LookupError(f"the table {column.table.fullname} has no column {column.name}")
    for place, column in catalogue.namesakes().items():
        places.setdefault(place, list(column.table.primary_key))
    obstacles = describe_obstacles(places)
    if obstacles:
        raise LookupError(
            "; ".join(f"{problem}, where rows may refer to the same objects: {remedy}" for problem, remedy in obstacles)
        )
    # In one order, so that the statements are the same for all tenants.
    return dict(sorted(places.items(), key=lambda item: item[0].names))


def _places_again(
    connection: Connection, columns: Sequence[Column[Any]], required: Collection[Column[Any]]
) -> dict[Place, Sequence[Column[Any]]]:
    with _savepoint(connection):
        return _places(connection, columns, required)


@lru_cache(maxsize=256)  # transactions share the statements, and so their compiled forms
def _question(places: tuple[Place, ...], dialect: str, is_guarded: bool) -> CompoundSelect[Any]:
    wanted = bindparam("locations", expanding=True, type_=Text())
    parts = []
    for place in places:
        column = place.column
        _, location = location_of(column, dialect, is_generated=place.is_generated)
        if is_guarded and dialect == "sqlite":
            # One row whose JSON is damaged would spoil the whole statement; an index has only sound ones.
            location = where_json(column, location)
        parts.append(select(location.label("location")).select_from(column.table).where(location.in_(wanted)))
    return union_all(*parts)


def _answers(
    connection: Connection, places: tuple[Place, ...], locations: Sequence[str], *, is_guarded: bool = False
) -> set[str]:
    found: set[str] = set()
    texts = [place for place in places if place.is_text]
    mentions = [one for place in texts for one in mentions_at(place, connection.dialect.name, locations)]
    for mentioned in batches(mentions, _MOST_COLUMNS):
        asked = union_all(*(select(location.label("location")).where(is_there) for location, is_there in mentioned))
        found |= set(connection.execute(asked, execution_options=UNTRANSLATED).scalars())
    for some in batches([place for place in places if not place.is_text], _MOST_COLUMNS):
        question = _question(tuple(some), connection.dialect.name, is_guarded)
        for batch in batches(locations, max(1, _MOST_PARAMETERS // len(some))):
            found |= set(connection.execute(question, {"locations": batch}, execution_options=UNTRANSLATED).scalars())
    return found


def _tolerantly(
    connection: Connection, place: Place, ask: Callable[[], set[str]], look: Callable[[], Collection[Place]]
) -> set[str]:
    """Return what one place is asked; nothing where a look at what places there are tells that it has been dropped meanwhile."""
    try:
        with _savepoint(connection):
            return ask()
    except DBAPIError as error:
        if _ends_transaction(connection, error):
            raise
        if place not in look():
            return set()
        raise


def _confirmed(connection: Connection, place: Place, primary_key: Sequence[Column[Any]], locations: set[str]) -> set[str]:
    """Return which of these locations, all of them in the snapshot of the transaction, rows at a place refer to now.

    What the text of a column mentions in the snapshot counts without a second look.
    """
    if place.is_text:
        return _answers(connection, (place,), sorted(locations))
    column = place.keyed(primary_key)
    table, keys = column.table, list(column.table.primary_key)
    _, location = location_of(column, connection.dialect.name, is_generated=place.is_generated)
    is_wanted = location.in_(sorted(locations))
    if not keys:
        return set(connection.scalars(select(location).select_from(table).where(is_wanted), execution_options=UNTRANSLATED))
    unlocked = select(*keys).where(is_wanted).order_by(*keys)
    rows = [tuple(row) for row in connection.execute(unlocked, execution_options=UNTRANSLATED)]
    confirmed: set[str] = set()
    for batch in batches(rows, _MOST_ROWS):
        locked = select(location).select_from(table).where(among(table, batch), is_wanted).with_for_update(read=True)
        confirmed |= set(connection.scalars(locked, execution_options=UNTRANSLATED))
    return confirmed


def _ends_transaction(connection: Connection, error: DBAPIError) -> bool:
    """Tell whether the transaction has ended with an error, or cannot commit any more: then the caller has to know, and retries.

    MariaDB and MySQL roll back all of it after a deadlock, and after a timeout where `innodb_rollback_on_timeout` is set.
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
    """Let an error take back nothing but the question, which waits for no lock without end.

    It is none of SQLAlchemy's savepoints, whose events would tell of work that is undone.
    """
    match connection.dialect.name:
        case "postgresql":
            connection.exec_driver_sql("SAVEPOINT granite_storage_question")
            try:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}s'")
                yield
            finally:
                # It has written nothing; what is taken back is the timeout.
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
