"""The journal's tables in migrations: they have a version, and the library upgrades them to its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Column, Connection, MetaData, func, insert, inspect, select, update

from granite_storage._words import count_of
from granite_storage.alembic._transactions import Op, count, require_online
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm.journal.tables import SCHEMA_VERSION, VERSION_NAME, clock, journal_tables

__all__ = ["create_journal_tables", "drop_journal_tables", "upgrade_journal_tables"]


def _add_jobs_and_sources(op: Op, tables: JournalTables) -> None:
    """Create the table of jobs and the columns of the originals, where a migration by autogenerate has not done so."""
    inspector, schema = inspect(op.get_bind()), tables.job.schema
    if not inspector.has_table(tables.job.name, schema=schema):
        op.get_context().impl.create_table(tables.job)
    for table in (tables.intent, tables.reclaim):
        if "source" not in {column["name"] for column in inspector.get_columns(table.name, schema=schema)}:
            op.get_context().impl.add_column(table.name, Column("source", table.c.source.type), schema=schema)


STEPS: dict[int, Callable[[Op, JournalTables], None]] = {1: _add_jobs_and_sources}
"""The upgrade of the tables from each version to the next one."""


def create_journal_tables(op: Op, *, schema: str | None = None) -> None:
    """Create the journal's tables with their indexes, in the library's version, and record the version in them.

    Existing tables are left as they are. It also works with `--sql`.

    Args:
        op: Alembic's `op`.
        schema: Their schema, as passed to `journal_tables`.
    """
    context = op.get_context()
    tables = _tables(schema)
    found = set() if context.as_sql else set(inspect(op.get_bind()).get_table_names(schema=schema))
    for table in tables.all:
        if table.name not in found:
            context.impl.create_table(table)
    if context.as_sql or _version(op.get_bind(), tables) is None:
        op.execute(insert(tables.meta).values(name=VERSION_NAME, value=str(SCHEMA_VERSION), changed=_now(context.dialect.name)))


def upgrade_journal_tables(op: Op, *, schema: str | None = None) -> None:
    """Upgrade the journal's tables to the library's version, if they are older.

    Args:
        op: Alembic's `op`.
        schema: The schema they are in.

    Raises:
        ConfigurationError: They are newer than the library, or there is no database (`--sql`).
    """
    connection = require_online(op, "upgrading the journal's tables")
    tables = _tables(schema)
    version = _version(connection, tables) or SCHEMA_VERSION
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"the journal's tables have version {version}, and this version of the library supports {SCHEMA_VERSION} at most:"
            " install the version that created them"
        )
    for step in range(version, SCHEMA_VERSION):
        STEPS[step](op, tables)
        mine = tables.meta.c.name == VERSION_NAME
        connection.execute(update(tables.meta).where(mine).values(value=str(step + 1), changed=_now(connection.dialect.name)))


def drop_journal_tables(op: Op, *, schema: str | None = None, discard_pending: bool = False) -> None:
    """Drop the journal's tables, if they contain no pending work.

    Args:
        op: Alembic's `op`.
        schema: The schema they are in.
        discard_pending: Whether to drop them all the same; objects that only they know of become orphans.

    Raises:
        ConfigurationError: They still have objects to delete or to check.
    """
    context, tables = op.get_context(), _tables(schema)
    if not discard_pending:
        _require_nothing_pending(require_online(op, "looking for what the journal has left to do"), tables)
    inspector = None if context.as_sql else inspect(op.get_bind())
    for table in reversed(tables.all):
        if inspector is None or inspector.has_table(table.name, schema=schema):  # an earlier version had fewer of them
            context.impl.drop_table(table)


def _tables(schema: str | None) -> JournalTables:
    return journal_tables(MetaData(), schema=schema)


def _version(connection: Connection, tables: JournalTables) -> int | None:
    found = connection.execute(select(tables.meta.c.value).where(tables.meta.c.name == VERSION_NAME)).scalar()
    return None if found is None else int(found)


def _now(dialect: str) -> Any:
    return func.current_timestamp() if dialect == "sqlite" else clock()


def _require_nothing_pending(connection: Connection, tables: JournalTables) -> None:
    has_jobs = inspect(connection).has_table(tables.job.name, schema=tables.job.schema)
    used = (tables.intent, tables.reclaim, *((tables.job,) if has_jobs else ()))
    pending = sum(count(connection, table, table.c.id.is_not(None)) for table in used)
    if pending:
        raise ConfigurationError(
            f"the journal still has {count_of(pending, 'object')} to delete, to check or to scan: let its worker finish, or pass"
            " discard_pending=True to leave them as orphans"
        )
