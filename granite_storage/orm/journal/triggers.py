"""Triggers that keep the journal's promise for every program that writes the rows, on the databases that have them.

Each database has a module of its own, such as `_postgresql_triggers`, with a class of `TableTriggers`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import Column, Connection, MetaData, Table, event, inspect

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._interfaces import TRIGGERS_KEY, JournalTables, are_triggers_declared, tables_of
from granite_storage.orm._util import group, schema_on
from granite_storage.orm.columns import attachment_tables
from granite_storage.orm.journal._mariadb_triggers import MariaDBTriggers
from granite_storage.orm.journal._postgresql_triggers import PostgreSQLTriggers
from granite_storage.orm.journal._sqlite_triggers import SQLiteTriggers
from granite_storage.orm.journal._trigger_base import GuardedTable, Holder, TableTriggers
from granite_storage.orm.journal.database import require_current_workers
from granite_storage.orm.locking import resolve

__all__ = [
    "create_triggers",
    "drop_triggers",
    "find_sources",
    "find_trigger_problems",
    "find_triggers_in_the_way",
    "has_some_triggers",
    "have_triggers",
    "sources_of",
    "storage_triggers",
    "triggers_work",
]

_KINDS: Final[Mapping[str, type[TableTriggers]]] = {
    "mariadb": MariaDBTriggers,
    "mysql": MariaDBTriggers,  # the name of SQLAlchemy's dialect for both, which can tell them apart
    "postgresql": PostgreSQLTriggers,
    "sqlite": SQLiteTriggers,
}
"""The databases that have triggers, by the names of SQLAlchemy's dialects."""


def storage_triggers(metadata: MetaData) -> None:
    """Declare triggers on the tables with attachments, for SQL and programs that bypass the sessions. Idempotent.

    They record in the writer's own transaction which objects it takes out of rows, and refuse what it would bring in without
    knowing that the object stays. `create_all` creates them, those that are missing or of another version, with the indexes over
    locations that they need; `drop_all` drops them, and Alembic's autogenerate renders them. They are for PostgreSQL,
    MariaDB and SQLite.

    On MariaDB and SQLite every process that stores files must have this version of the library before they are created.

    Args:
        metadata: The declarative base's metadata, beside whose models `journal_tables` has declared the journal's tables.

    Raises:
        ConfigurationError: The journal's tables are not declared. `create_all` raises it if the database is another one, if a
            table has no primary key, if a worker of an older version was at work lately, if on SQLite the journal's tables are
            not in the file of the rows, or if on MariaDB cascades of several tables lead in a circle.

    Example:
        ```python
        journal_tables(Base.metadata)
        storage_triggers(Base.metadata)
        ```
    """
    if tables_of(metadata) is None:
        raise ConfigurationError("triggers write into the journal: call journal_tables(Base.metadata) before storage_triggers")
    if not are_triggers_declared(metadata):
        metadata.info[TRIGGERS_KEY] = True
        event.listen(metadata, "after_create", _after_create)
        event.listen(metadata, "before_drop", _before_drop)


def have_triggers(dialect: str) -> bool:
    """Return whether a database, by the name of its dialect, can have these triggers."""
    return dialect in _KINDS


def triggers_work(dialect: str, metadata: MetaData) -> bool:
    """Return whether triggers are declared for a metadata, and a database has them.

    Args:
        dialect: The name of the database.
        metadata: The metadata.
    """
    return have_triggers(dialect) and are_triggers_declared(metadata)


def _after_create(metadata: MetaData, connection: Connection, **_: Any) -> None:
    create_triggers(connection, sources_of(connection, metadata))


def _before_drop(metadata: MetaData, connection: Connection, *, tables: Iterable[Table], **_: Any) -> None:
    if have_triggers(connection.dialect.name):
        dropped = set(tables)
        drop_triggers(connection, [table for table in _guarded_tables(metadata) if table in dropped])


def _guarded_tables(metadata: MetaData) -> list[Table]:
    return list(dict.fromkeys(column.table for column in attachment_tables(metadata).all_attachments()))


def sources_of(connection: Connection, metadata: MetaData) -> list[TableTriggers]:
    """Return the triggers that the models of a metadata need, on those of their tables that are there.

    Raises:
        ConfigurationError: The database has no triggers, the journal's tables are not there, or a table has no primary key.
    """
    tables = attachment_tables(metadata)
    journal = tables_of(metadata)
    if journal is None:
        raise ConfigurationError("the journal's tables are not declared: call journal_tables(Base.metadata) beside the models")
    return find_sources(connection, tables.all_attachments(), tables.refs(), journal)


def find_sources(
    connection: Connection, columns: Iterable[Column[Any]], holders: Iterable[Column[Any]], journal: JournalTables
) -> list[TableTriggers]:
    """Return the triggers for attachment columns, on those of their tables that are there.

    Args:
        connection: A connection to the database.
        columns: The attachment columns.
        holders: Every column whose rows are evidence that an object is there.
        journal: The journal's tables.

    Raises:
        ConfigurationError: As `sources_of`.
    """
    kind = _kind_of(connection)
    place = resolve(connection, journal.intent)
    if place is None:
        raise ConfigurationError(
            f"triggers write into {journal.intent.fullname}, which is not there: create the journal's tables. If a"
            " schema_translate_map or a search_path leads past them, as with a schema for each tenant, give them a schema of"
            " their own: journal_tables(Base.metadata, schema=...)",
            see=Page.SCHEMAS,
        )
    columns, holders = list(columns), list(holders)
    places = {table: resolve(connection, table) for table in {column.table for column in (*columns, *holders)}}
    evidence = sorted(Holder(*found, column.name) for column in holders if (found := places[column.table]) is not None)
    sources: list[TableTriggers] = []
    for table, own in group(columns, attrgetter("table")).items():
        if (found := places[table]) is not None:
            guarded = GuardedTable(*found, _keys_of(table), tuple(sorted(column.name for column in own)), evidence)
            sources.append(kind(connection, guarded, journal, place[0]))
    return sources


def _kind_of(connection: Connection) -> type[TableTriggers]:
    found = _KINDS.get(connection.dialect.name)
    if found is None:
        raise ConfigurationError(
            f"storage_triggers are for PostgreSQL, MariaDB and SQLite, and this database is {connection.dialect.name}: leave the"
            " call out there, and let the garbage collector find what SQL that bypasses the sessions leaves"
        )
    return found


def _keys_of(table: Table) -> tuple[str, ...]:
    if not table.primary_key.columns:
        raise ConfigurationError(
            f"the table {table.fullname} has no primary key, by which its triggers identify its rows: give it one"
        )
    return tuple(column.name for column in table.primary_key)


def create_triggers(connection: Connection, sources: Sequence[TableTriggers]) -> None:
    """Create triggers that are missing, or replace those of another version or for other columns; and the indexes they need.

    Raises:
        ConfigurationError: A worker of an older version was at work lately, and triggers are to be created.
    """
    outdated = [source for source in sources if not source.is_current(connection)]
    if outdated:
        require_current_workers(connection, outdated[0].journal)
    for source in sources:
        source.create(connection)


def drop_triggers(connection: Connection, tables: Iterable[Table]) -> None:
    """Drop the triggers of tables, and their functions; nothing happens where they are gone already."""
    kind = _kind_of(connection)
    for table in tables:
        place = resolve(connection, table)
        if place is not None:
            kind.drop(connection, *place)


def find_trigger_problems(connection: Connection, metadata: MetaData) -> list[str]:
    """Return what is wrong with the triggers of a metadata and their indexes, in words, relation by relation.

    Raises:
        ConfigurationError: As `sources_of`.
    """
    sources = sources_of(connection, metadata)
    declared = _declared(connection, metadata)
    gone = _kind_of(connection).find_gone(connection, {item.schema for item in declared}, declared)
    return list(dict.fromkeys([*gone, *(problem for source in sources for problem in source.find_problems(connection))]))


def _declared(connection: Connection, metadata: MetaData) -> list[Holder]:
    """Return the columns of refs, and the primary keys of guarded tables, where they are or should be."""
    tables, usual = attachment_tables(metadata), inspect(connection).default_schema_name or ""
    keys = [key for table in _guarded_tables(metadata) for key in table.primary_key]
    columns = dict.fromkeys([*tables.all_attachments(), *tables.refs(), *keys])
    places = {
        table: resolve(connection, table) or (schema_on(connection, table) or usual, table.name)
        for table in {column.table for column in columns}
    }
    return [Holder(*places[column.table], column.name) for column in columns]


def find_triggers_in_the_way(connection: Connection, tables: Collection[str]) -> list[str]:
    """Return the tables whose triggers are to be dropped before others are changed; see `TableTriggers.find_in_the_way`."""
    return _kind_of(connection).find_in_the_way(connection, tables)


def has_some_triggers(connection: Connection, table: Table) -> bool:
    """Return whether a table has any of these triggers."""
    place = resolve(connection, table)
    return place is not None and _kind_of(connection).has_some(connection, *place)
