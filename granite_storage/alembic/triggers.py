"""The journal's triggers in migrations: creating, replacing and dropping them, and what autogenerate writes for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from alembic.operations import ops
from sqlalchemy import Column, Connection, MetaData, Table, inspect

from granite_storage.alembic._calls import CallOp
from granite_storage.alembic._transactions import Op, require_online
from granite_storage.orm._interfaces import JournalTables, are_triggers_declared, tables_of
from granite_storage.orm._util import group, schema_on
from granite_storage.orm.columns import attachment_tables, portable_storage_ref_type
from granite_storage.orm.journal.tables import journal_tables
from granite_storage.orm.journal.triggers import (
    create_triggers,
    drop_triggers,
    find_sources,
    find_triggers_in_the_way,
    has_some_triggers,
    have_triggers,
    sources_of,
)
from granite_storage.orm.locking import read_catalogue

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["compare_triggers", "create_storage_triggers", "drop_storage_triggers"]

_LEFT_TO_DO = "  # then create those of the earlier models, if there were any"
"""What a downgrade says is left to do."""


def create_storage_triggers(
    op: Op,
    tables: Mapping[str, Sequence[str]],
    *,
    plain: Mapping[str, Sequence[str]] | None = None,
    journal_schema: str | None = None,
) -> None:
    """Create the journal's triggers, or replace those of another version or for other columns, with the indexes they need.

    They are those that `storage_triggers` declares, on the same databases. Each index over locations that is missing is created,
    which keeps writers out for as long; on large tables of PostgreSQL create it before, by `create_location_index(...,
    concurrently=True)`. Partitions that are made later lack some of the triggers, and on SQLite unique indexes are not known to
    them: call it again after those.

    On SQLite a batch operation fails on a table that a trigger names, and the triggers of the table go with it: call
    `drop_storage_triggers` for all tables before it, and this afterwards, as autogenerate does.

    Args:
        op: Alembic's `op`.
        tables: The attachment columns by table; a table that is not in the default schema as `"schema.table"`.
        plain: The other columns of refs by table, whose rows also say that an object is there.
        journal_schema: The schema of the journal's tables, as passed to `journal_tables`.

    Raises:
        ConfigurationError: The database has none, a table has no primary key, a worker of an older version was at work lately, or
            the migration is rendered as SQL.
    """
    connection = require_online(op, "creating triggers")
    metadata = MetaData()
    columns = _declare(connection, metadata, tables)
    others = _declare(connection, metadata, plain or {})
    journal = journal_tables(metadata, schema=journal_schema)
    create_triggers(connection, find_sources(connection, columns, [*columns, *others], journal))


def drop_storage_triggers(op: Op, tables: Iterable[str]) -> None:
    """Drop the triggers of tables, and their functions; nothing happens where they are gone already.

    Args:
        op: Alembic's `op`.
        tables: The tables; one that is not in the default schema as `"schema.table"`.
    """
    metadata = MetaData()
    drop_triggers(require_online(op, "dropping triggers"), [_table(metadata, name) for name in tables])


def _table(metadata: MetaData, fullname: str) -> Table:
    schema, _, name = fullname.rpartition(".")
    return Table(name, metadata, schema=schema or None, extend_existing=True)


def _declare(connection: Connection, metadata: MetaData, tables: Mapping[str, Sequence[str]]) -> list[Column[Any]]:
    """Return columns of refs, in tables with the primary keys that they have in the database."""
    declared: list[Column[Any]] = []
    for fullname, names in tables.items():
        table = _table(metadata, fullname)
        keys: Sequence[str] = inspect(connection).get_pk_constraint(table.name, schema=table.schema)["constrained_columns"]
        for name in keys:
            if name not in table.columns:
                table.append_column(Column(name, primary_key=True))
        for name in names:
            column: Column[Any] = Column(name, portable_storage_ref_type())
            table.append_column(column)
            declared.append(column)
    return declared


def _drop(tables: Sequence[str], comment: str = "") -> CallOp:
    """Return the call that drops triggers; a downgrade drops them as well, since it knows no earlier columns."""
    return CallOp("drop_storage_triggers", tables, comment=comment, undo=partial(_drop, tables, _LEFT_TO_DO))


def compare_triggers(autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps) -> None:
    """Let a migration drop triggers before the columns that they depend on, and create what the models declare after all else."""
    connection, metadata = autogen_context.connection, autogen_context.metadata
    if connection is None or not have_triggers(connection.dialect.name) or not isinstance(metadata, MetaData):
        return
    journal = tables_of(metadata)  # None as well where a migration drops it, with the columns that triggers depend on
    found = attachment_tables(metadata)
    columns = found.all_attachments() if journal is not None and are_triggers_declared(metadata) else []
    guarded = {column.table for column in columns}
    shrinking = {name for operation in upgrade_ops.ops for name in _shrinking(operation)}
    changed = {name for operation in upgrade_ops.ops for name in _changed(operation)}
    dropped = {
        *(
            fullname
            for fullname, table in _named(metadata, shrinking).items()
            if (table not in guarded or fullname in shrinking) and has_some_triggers(connection, table)
        ),
        *find_triggers_in_the_way(connection, changed),
    }
    if dropped:
        upgrade_ops.ops.insert(0, _drop(sorted(dropped)))
    if journal is not None and columns and (dropped or not _are_current(connection, metadata, journal)):
        tables, plain = _by_table(columns), _by_table(column for column in found.refs() if column not in set(columns))
        undo, schema = partial(_drop, list(tables), _LEFT_TO_DO), journal.intent.schema
        upgrade_ops.ops.append(CallOp("create_storage_triggers", tables, undo=undo, plain=plain, journal_schema=schema))


def _are_current(connection: Connection, metadata: MetaData, journal: JournalTables) -> bool:
    """Return whether the tables and columns are there, and have their triggers: without a column its index is missing, too."""
    refs = attachment_tables(metadata).refs()
    catalogue = read_catalogue(connection, refs, journal.all)
    return (
        all(catalogue.table(schema_on(connection, table), table.name) for table in journal.all)
        and all(catalogue.place(schema_on(connection, column.table), column) for column in refs)
        and all(source.is_current(connection) for source in sources_of(connection, metadata))
    )


def _named(metadata: MetaData, others: Iterable[str]) -> dict[str, Table]:
    """Return the tables of the models, and others by name, which may no longer be in any model."""
    scratch = MetaData()
    return {**{name: _table(scratch, name) for name in others}, **metadata.tables}


def _shrinking(operation: ops.MigrateOperation) -> list[str]:
    """Return the table that an operation drops, or drops columns of."""
    items = operation.ops if isinstance(operation, ops.ModifyTableOps) else [operation]
    return _changed(operation) if any(isinstance(item, ops.DropTableOp | ops.DropColumnOp) for item in items) else []


def _changed(operation: ops.MigrateOperation) -> list[str]:
    """Return the table that an operation changes in any way, or drops."""
    if isinstance(operation, ops.DropTableOp | ops.ModifyTableOps):
        return [f"{operation.schema}.{operation.table_name}" if operation.schema else operation.table_name]
    return []


def _by_table(columns: Iterable[Column[Any]]) -> dict[str, list[str]]:
    found = group(columns, lambda column: column.table.fullname)
    return {name: sorted(column.name for column in found[name]) for name in sorted(found)}
