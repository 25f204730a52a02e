"""Triggers of PostgreSQL that keep the journal's promise for every program that writes the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, Connection, MetaData, Table, bindparam, event, text

from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._interfaces import TRIGGERS_KEY, JournalTables, are_triggers_declared
from granite_storage.orm._util import UNTRANSLATED
from granite_storage.orm.columns import attachment_tables, location_index_name
from granite_storage.orm.discovery import resolve
from granite_storage.orm.journal._postgresql_triggers import TRIGGERS, GuardedTable, Holder, TriggerSource, quoted
from granite_storage.orm.journal.tables import tables_of

__all__ = [
    "create_triggers",
    "drop_triggers",
    "find_sources",
    "find_trigger_problems",
    "has_current_triggers",
    "has_some_triggers",
    "sources_of",
    "storage_triggers",
]


def storage_triggers(metadata: MetaData) -> None:
    """Declare triggers on the tables with attachments, for writers past the sessions: SQL, other programs, COPY. Idempotent.

    They record in the writer's own transaction which objects it takes out of rows, and refuse what it would bring in without
    knowing that the object stays. `create_all` creates them, those that are missing or of another version, with the indexes over
    locations that they need; `drop_all` drops them, and Alembic's autogenerate renders them. It is for PostgreSQL.

    Args:
        metadata: The declarative base's metadata, beside whose models `journal_tables` has declared the journal's tables.

    Raises:
        ConfigurationError: The journal's tables are not declared; on `create_all`: the database is not PostgreSQL, or a table has
            no primary key.

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


def _after_create(metadata: MetaData, connection: Connection, **_: Any) -> None:
    create_triggers(connection, sources_of(connection, metadata))


def _before_drop(metadata: MetaData, connection: Connection, *, tables: Iterable[Table], **_: Any) -> None:
    if connection.dialect.name == "postgresql":
        dropped = set(tables)
        drop_triggers(connection, [table for table in _guarded_tables(metadata) if table in dropped])


def _guarded_tables(metadata: MetaData) -> list[Table]:
    return list(dict.fromkeys(column.table for column in attachment_tables(metadata).all_attachments()))


def sources_of(connection: Connection, metadata: MetaData) -> list[TriggerSource]:
    """Return the triggers that the models of a metadata need, on those of their tables that are there.

    Raises:
        ConfigurationError: The database is not PostgreSQL, the journal's tables are not there, or a table has no primary key.
    """
    tables = attachment_tables(metadata)
    journal = tables_of(metadata)
    if journal is None:
        raise ConfigurationError("the journal's tables are not declared: call journal_tables(Base.metadata) beside the models")
    return find_sources(connection, tables.all_attachments(), tables.refs(), journal)


def find_sources(
    connection: Connection, columns: Iterable[Column[Any]], holders: Iterable[Column[Any]], journal: JournalTables
) -> list[TriggerSource]:
    """Return the triggers for attachment columns, on those of their tables that are there.

    Args:
        connection: A connection to the database.
        columns: The attachment columns.
        holders: Every column whose rows are evidence that an object is there.
        journal: The journal's tables.

    Raises:
        ConfigurationError: As `sources_of`.
    """
    if connection.dialect.name != "postgresql":
        raise ConfigurationError(
            f"storage_triggers are for PostgreSQL, and this database is {connection.dialect.name}: leave the call out there, and"
            " let the garbage collector find what SQL past the sessions leaves behind"
        )
    place = resolve(connection, journal.intent)
    if place is None:
        raise ConfigurationError(
            f"triggers write into {journal.intent.fullname}, which is not there: create the journal's tables"
        )
    names = (journal.intent.name, journal.reclaim.name, journal.meta.name)
    columns, holders = list(columns), list(holders)
    places = {table: resolve(connection, table) for table in {column.table for column in (*columns, *holders)}}
    evidence = [Holder(*found, column.name) for column in holders if (found := places[column.table]) is not None]
    by_table: dict[Table, list[str]] = {}
    for column in columns:
        by_table.setdefault(column.table, []).append(column.name)
    return [
        TriggerSource(GuardedTable(*found, _keys_of(table), tuple(sorted(names_in))), evidence, place[0], names)
        for table, names_in in by_table.items()
        if (found := places[table]) is not None
    ]


def _keys_of(table: Table) -> tuple[str, ...]:
    if not table.primary_key.columns:
        raise ConfigurationError(
            f"the table {table.fullname} has no primary key, by which its triggers know its rows: give it one"
        )
    return tuple(column.name for column in table.primary_key)


def create_triggers(connection: Connection, sources: Iterable[TriggerSource]) -> None:
    """Create triggers that are missing, or replace those of another version or for other columns; and the indexes they need."""
    for source in sources:
        for holder in _unindexed(connection, source.holders):
            _run(connection, _create_index(holder))
        outdated = _outdated(connection, source)
        if not outdated:
            continue
        for statement in source.functions:
            _run(connection, statement)
        for relation, is_parent in outdated:
            for statement in source.triggers(relation, is_parent=is_parent):
                _run(connection, statement)


def drop_triggers(connection: Connection, tables: Iterable[Table]) -> None:
    """Drop the triggers of tables, and their functions; nothing happens where they are gone already."""
    for table in tables:
        place = resolve(connection, table)
        if place is not None:
            for statement in GuardedTable(*place, (), ()).drop_functions:
                _run(connection, statement)


def find_trigger_problems(connection: Connection, sources: Iterable[TriggerSource]) -> list[str]:
    """Return what is wrong with triggers and their indexes, in words, relation by relation."""
    problems: list[str] = []
    for source in sources:
        for relation, found in _read(connection, source.table).items():
            problems += _describe(relation, found, source.digest)
    holders = dict.fromkeys(holder for source in sources for holder in source.holders)
    return problems + [
        f"{holder.schema}.{holder.table} has no index over the locations in {holder.column}, which each guarded row looks in:"
        " create_location_index(op, ...) in a migration makes one"
        for holder in _unindexed(connection, holders)
    ]


def has_current_triggers(connection: Connection, source: TriggerSource) -> bool:
    """Return whether a table and its partitions have these very triggers."""
    return not _outdated(connection, source)


def has_some_triggers(connection: Connection, table: Table) -> bool:
    """Return whether a table has any of these triggers."""
    place = resolve(connection, table)
    return place is not None and any(_read(connection, GuardedTable(*place, (), ())).values())


def _describe(relation: str, found: dict[str, tuple[str, str]], digest: str) -> list[str]:
    missing = sorted(TRIGGERS.keys() - found.keys())
    disabled = sorted(name for name, (state, _) in found.items() if state != "O")
    outdated = sorted(name for name, (_, made) in found.items() if made != digest)
    again = "create them with create_all, or by a migration with create_storage_triggers(op, ...)"
    return [
        *([f"{relation} lacks the triggers {', '.join(missing)}: {again}"] if missing else ()),
        *(
            [f"the triggers {', '.join(outdated)} of {relation} are of another version or for other columns: {again}"]
            if outdated
            else ()
        ),
        *([f"the triggers {', '.join(disabled)} of {relation} do not fire: ALTER TABLE ... ENABLE TRIGGER"] if disabled else ()),
    ]


def _outdated(connection: Connection, source: TriggerSource) -> list[tuple[str, bool]]:
    """Return the relations whose triggers are not these, in SQL, the table before its partitions, and whether each is the table.

    The trigger for each row is made on the table alone, so where that is outdated all of them are made.
    """
    found = _read(connection, source.table)
    wrong = [
        relation
        for relation, triggers in found.items()
        if triggers.keys() != TRIGGERS.keys() or any(made != source.digest for _, made in triggers.values())
    ]
    parent = source.table.qualified
    if parent in wrong:
        wrong = list(found)
    return [(relation, relation == parent) for relation in wrong]


_TRIGGERS = text("""
    SELECT n.nspname, c.relname, t.tgname, t.tgenabled, encode(t.tgargs, 'escape')
    FROM (
        SELECT to_regclass(:name) AS relid, 0 AS level
        UNION SELECT relid, level FROM pg_partition_tree(to_regclass(:name)) WHERE level > 0
    ) r
    JOIN pg_class c ON c.oid = r.relid AND c.relkind <> 'f'
    JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname IN :triggers
    ORDER BY r.level, n.nspname, c.relname
""").bindparams(bindparam("triggers", value=list(TRIGGERS), expanding=True))

_INDEXED = text("""
    SELECT EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = to_regclass(:name) AND indisvalid AND indpred IS NULL
            AND trim(pg_get_indexdef(indexrelid, 1, false), '()') = quote_ident(:column) || ' ->> ''location''::text'
    )
""")


def _read(connection: Connection, table: GuardedTable) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the triggers of a table and of its partitions, by their names in SQL: whether they fire, and their argument."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    rows = connection.execute(_TRIGGERS, {"name": table.qualified}, execution_options=UNTRANSLATED)
    for schema, name, trigger, state, argument in rows:
        triggers = found.setdefault(f"{quoted(schema)}.{quoted(name)}", {})
        if trigger is not None:
            triggers[trigger] = (_text(state), argument.removesuffix("\\000"))
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # drivers differ in the type "char"


def _unindexed(connection: Connection, holders: Iterable[Holder]) -> list[Holder]:
    return [
        holder
        for holder in holders
        if not connection.execute(
            _INDEXED, {"name": holder.qualified, "column": holder.column}, execution_options=UNTRANSLATED
        ).scalar_one()
    ]


def _create_index(holder: Holder) -> str:
    name = quoted(location_index_name(holder.table, holder.column))
    return f"CREATE INDEX IF NOT EXISTS {name} ON {holder.qualified} (({quoted(holder.column)} ->> 'location'))"


def _run(connection: Connection, statement: str) -> None:
    connection.execute(text(statement.replace(":", r"\:")), execution_options=UNTRANSLATED)
