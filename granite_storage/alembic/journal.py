"""The journal's tables in migrations: they have a version, which the library knows how to bring up to its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, MetaData, func, insert, inspect, select, update

from granite_storage.alembic._transactions import Op, count, require_online
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm.journal.tables import SCHEMA_VERSION, VERSION_NAME, clock, journal_tables

__all__ = ["create_journal_tables", "drop_journal_tables", "upgrade_journal_tables"]

STEPS: dict[int, Callable[[Op, JournalTables], None]] = {}
"""What brings the tables from a version to the next one; the first version needs none."""


def create_journal_tables(op: Op, *, schema: str | None = None) -> None:
    """Create the journal's tables with their indexes, in the library's own version, and note the version in them.

    What is there already is left as it is. It also works with `--sql`.

    Args:
        op: Alembic's `op`.
        schema: The schema to keep them in, as given to `journal_tables`.
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
    """Bring the journal's tables from whatever version they have to the library's own; nothing happens where they have it.

    Args:
        op: Alembic's `op`.
        schema: The schema they are in.

    Raises:
        ConfigurationError: They are newer than the library, or there is no database to look at (`--sql`).
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
    """Drop the journal's tables, where nothing is left to do in them.

    Args:
        op: Alembic's `op`.
        schema: The schema they are in.
        discard_pending: Whether to drop them all the same; objects that they know of, and no row, are orphans then.

    Raises:
        ConfigurationError: They still know of objects that are to be removed or settled.
    """
    context, tables = op.get_context(), _tables(schema)
    if not discard_pending:
        _require_nothing_pending(require_online(op, "looking for what the journal has left to do"), tables)
    for table in reversed(tables.all):
        context.impl.drop_table(table)


def _tables(schema: str | None) -> JournalTables:
    return journal_tables(MetaData(), schema=schema)


def _version(connection: Connection, tables: JournalTables) -> int | None:
    found = connection.execute(select(tables.meta.c.value).where(tables.meta.c.name == VERSION_NAME)).scalar()
    return None if found is None else int(found)


def _now(dialect: str) -> Any:
    return func.current_timestamp() if dialect == "sqlite" else clock()


def _require_nothing_pending(connection: Connection, tables: JournalTables) -> None:
    pending = sum(count(connection, table, table.c.id.is_not(None)) for table in (tables.intent, tables.reclaim))
    if pending:
        raise ConfigurationError(
            f"the journal still has {pending} objects to delete or to check: let its worker finish, or pass"
            " discard_pending=True to leave them as orphans"
        )
