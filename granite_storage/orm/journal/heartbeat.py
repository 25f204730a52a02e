"""The heartbeat of the workers, in the journal's table `granite_storage_meta`, and the gaps in it.

A database that was restored from a backup has the heartbeat of the backup, and so has one that was out of use. Whoever beats
first after such a silence notes it, and the note stays until a person has said that all is well: meanwhile the garbage collector
deletes nothing, for what it would take for orphans may be the files of a database that is about to be restored once more.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.tables import JournalTables, clock

__all__ = ["accept_gap", "beat", "find_gap", "insert_if_absent"]

_HEARTBEAT = "heartbeat"
_GAP = "heartbeat gap"
_SHORTEST_GAP = timedelta(hours=1)
_MISSED = 4


async def beat(pool: JournalPool, tables: JournalTables, *, within: timedelta) -> None:
    """Note that a worker is at work, and that none was where the last beat is long overdue.

    Args:
        pool: The journal's connections.
        tables: The journal's tables.
        within: When the next beat is to be expected.
    """
    meta = tables.meta
    async with pool.reading() as connection:
        last = await _last_beat(connection, tables)
        new = {"value": f"{within.total_seconds():.0f}", "changed": clock()}
        if last is None:
            await insert_if_absent(connection, tables, {"name": _HEARTBEAT, **new})
            return
        silence = _silence(last)
        if silence is not None:
            said = {"name": _GAP, "value": f"{silence.total_seconds():.0f}", "changed": clock()}
            await insert_if_absent(connection, tables, said)
        await connection.execute(meta.update().where(meta.c.name == _HEARTBEAT).values(new))


async def find_gap(connection: AsyncConnection, tables: JournalTables) -> timedelta | None:
    """Return for how long no worker was at work, where that is noted or going on; None where all is well or none ever was."""
    meta = tables.meta
    noted = (await connection.execute(select(meta.c.value).where(meta.c.name == _GAP))).scalar_one_or_none()
    if noted is not None:
        return timedelta(seconds=float(noted))
    last = await _last_beat(connection, tables)
    return None if last is None else _silence(last)


async def accept_gap(pool: JournalPool, tables: JournalTables, *, within: timedelta) -> None:
    """Forget a gap: a person has said that this is the right database."""
    await beat(pool, tables, within=within)
    meta = tables.meta
    async with pool.durable() as connection:
        await connection.execute(meta.delete().where(meta.c.name == _GAP))


async def insert_if_absent(connection: AsyncConnection, tables: JournalTables, values: dict[str, Any]) -> None:
    """Insert a row of `granite_storage_meta`, unless there is one of its name."""
    try:
        async with connection.begin_nested():
            await connection.execute(insert(tables.meta).values(values))
    except IntegrityError:
        return


async def _last_beat(connection: AsyncConnection, tables: JournalTables) -> Row[Any, Any, Any] | None:
    meta = tables.meta
    found = await connection.execute(select(meta.c.value, meta.c.changed, clock().label("now")).where(meta.c.name == _HEARTBEAT))
    return found.first()


def _silence(last: Row[Any, Any, Any]) -> timedelta | None:
    """Return for how long there was no beat, where one is overdue, by the database's clock alone."""
    silence = _naive(last.now) - _naive(last.changed)
    expected = timedelta(seconds=float(last.value)) if last.value.isdigit() else timedelta(0)
    return silence if silence > max(_SHORTEST_GAP, _MISSED * expected) else None


def _naive(moment: datetime) -> datetime:
    return moment.replace(tzinfo=None)
