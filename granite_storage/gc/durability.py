"""A commit that no crash of the database takes back, and with it all commits before it."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["barrier"]

_SYNCHRONOUS = text("SET LOCAL synchronous_commit = on")
_WRITE = text("SELECT pg_logical_emit_message(true, 'granite_storage', 'barrier')")


async def barrier(connection: AsyncConnection) -> None:
    """Return once what other transactions have committed, and this program has seen, is durable.

    With `synchronous_commit = off` PostgreSQL acknowledges commits that a crash may take back; one that is synchronous, and has
    written something itself, takes all before it along. MariaDB is durable at each commit, as `checks` has made sure of; SQLite
    is what its `PRAGMA synchronous` makes it.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(_SYNCHRONOUS)
        await connection.execute(_WRITE)
    await connection.commit()
