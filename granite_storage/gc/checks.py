"""Refuse databases that may hide references, or forget what they have committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, func, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.exceptions import CollectionRefusedError
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm.journal.database import find_gap

__all__ = ["commit_durably", "require_fit", "require_heartbeat"]

_SYNCHRONOUS = text("SET LOCAL synchronous_commit = on")
_WRITE = text("SELECT pg_logical_emit_message(true, 'granite_storage', 'barrier')")
_BEGUN = text("SELECT transaction_timestamp()")


async def require_fit(connection: AsyncConnection, columns: Sequence[Column[Any]]) -> None:
    """Refuse a connection or a database that the collector cannot rely on.

    Args:
        connection: One of the application's sessions.
        columns: The columns that may refer to objects.

    Raises:
        CollectionRefusedError: The message says what to do.
    """
    if await connection.get_isolation_level() == "READ UNCOMMITTED":
        raise CollectionRefusedError(
            "the sessions use READ UNCOMMITTED, at which a reference that moves between two columns can be missed: give the"
            " binding sessions that use READ COMMITTED or stronger"
        )
    match connection.dialect.name:
        case "postgresql":
            await _require_fit_postgresql(connection, columns)
        case "mysql" | "mariadb":
            await _require_fit_mariadb(connection)
        case "sqlite":
            pass
        case other:
            raise CollectionRefusedError(
                f"the garbage collector does not support the database {other!r}: pass iter_references instead of binding"
            )


async def require_heartbeat(connection: AsyncConnection, tables: JournalTables) -> None:
    """Refuse a database in which no worker was running for long: it may have been restored from a backup.

    Raises:
        CollectionRefusedError: There is such a gap; `allow_restored_database=True` removes it.
    """
    gap = await find_gap(connection, tables)
    if gap is not None:
        raise CollectionRefusedError(
            f"no worker of the journal was running for {gap}: the database may have been restored from a backup, and objects"
            " without a row may belong to rows that are still to be restored. Once you are sure that it is the right one, pass"
            " allow_restored_database=True"
        )


async def _require_fit_postgresql(connection: AsyncConnection, columns: Sequence[Column[Any]]) -> None:
    begun = [(await connection.execute(_BEGUN)).scalar_one() for _ in range(2)]
    if begun[0] != begun[1]:
        raise CollectionRefusedError("the sessions use AUTOCOMMIT: give the binding sessions that use transactions")
    if (await connection.execute(text("SELECT pg_is_in_recovery()"))).scalar_one():
        raise CollectionRefusedError(
            "the database is a standby, which may lag behind the primary: give the binding sessions on the primary"
        )
    preparer = connection.dialect.identifier_preparer
    for table in dict.fromkeys(column.table for column in columns):
        name = preparer.format_table(table)
        if (await connection.execute(select(func.row_security_active(literal(name))))).scalar_one():
            raise CollectionRefusedError(
                f"row-level security may hide rows of {name} from this role: give the binding sessions of a role that sees all"
            )


async def _require_fit_mariadb(connection: AsyncConnection) -> None:
    row = (await connection.execute(text("SELECT @@global.read_only, @@innodb_flush_log_at_trx_commit"))).one()
    if row[0]:
        raise CollectionRefusedError(
            "the database is read-only, and may be a replica that lags behind: give the binding sessions on the primary"
        )
    if row[1] != 1:
        raise CollectionRefusedError(
            f"innodb_flush_log_at_trx_commit is {row[1]}, so a crash can undo a committed transaction and bring back a row whose"
            " object is deleted: set it to 1"
        )


# A commit that no crash of the database can undo, nor any commit before it.


async def commit_durably(connection: AsyncConnection) -> None:
    """Return once everything that other transactions have committed, and this program has seen, is durable.

    With `synchronous_commit = off` PostgreSQL acknowledges commits that a crash may undo; a synchronous commit that has written
    something makes all commits before it durable. MariaDB is durable at each commit, as `require_fit` has checked; SQLite
    follows its `PRAGMA synchronous`.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(_SYNCHRONOUS)
        await connection.execute(_WRITE)
    await connection.commit()
