"""Work at an interval in one process of many: the one that has the database's advisory lock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sqlalchemy import TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from granite_storage._tasks import repeat, shielded_cleanup
from granite_storage.orm._threaded import as_async_engine
from granite_storage.orm._util import without_pool

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

_JITTER = 0.1
_LONGEST_FIRST_PAUSE = 60.0
_LOCKS: dict[str, TextClause] = {
    "postgresql": text("SELECT pg_try_advisory_lock(hashtext('granite_storage'), hashtext('gc'))"),
    "mysql": text("SELECT GET_LOCK(CONCAT('granite_storage.gc.', MD5(DATABASE())), 0)"),
    "mariadb": text("SELECT GET_LOCK(CONCAT('granite_storage.gc.', MD5(DATABASE())), 0)"),
}
_PING = text("SELECT 1")


async def repeat_as_leader(work: Callable[[], Awaitable[None]], seconds: float, binding: StorageBinding | None) -> None:
    """Do work at an interval, for as long as an application runs, in the process that has the lock.

    Args:
        work: The work.
        seconds: The time from one run to the next, within a tenth; the first one starts within a minute.
        binding: The binding whose database has the lock; None where every process does the work.
    """
    leadership = Leadership(binding)

    async def work_as_leader() -> None:
        if await leadership.acquire():
            await work()

    # Processes that began together would all begin to collect together.
    await asyncio.sleep(random.uniform(0, min(seconds, _LONGEST_FIRST_PAUSE)))  # noqa: S311  # not a secret
    try:
        await repeat(work_as_leader, seconds, "finding out whether this process is to collect garbage", jitter=_JITTER)
    finally:
        await leadership.release()


# It saves work and makes nothing safe: two collectors at once are harmless, so a lock that is lost with its connection, or
# that a connection pooler gives to two, does no harm.


class Leadership:
    """The lock of one process, once it has it, on a connection of its own.

    Args:
        binding: The binding whose database has the lock; None where every process is a leader.
    """

    def __init__(self, binding: StorageBinding | None) -> None:
        self._binding = binding
        self._connection: AsyncConnection | None = None

    async def acquire(self) -> bool:
        """Return whether this process is the leader; become it where no other process is."""
        engine = None if self._binding is None else _engine_of(self._binding)
        lock = None if engine is None else _LOCKS.get(engine.dialect.name)
        if engine is None or lock is None:
            return True
        if self._connection is not None and await _is_alive(self._connection):
            return True
        await self.release()
        connection = await engine.connect()
        try:
            is_leader = bool((await connection.execute(lock)).scalar_one())
            await connection.commit()
            if is_leader:
                self._connection = connection
        finally:
            if self._connection is not connection:
                await shielded_cleanup(connection.close(), "closing a connection that has no lock")
        return is_leader

    async def release(self) -> None:
        """Let another process become the leader; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await shielded_cleanup(connection.close(), "closing the connection of the garbage collector's lock")


def _engine_of(binding: StorageBinding) -> AsyncEngine | None:
    table = next(iter(binding.metadata.tables.values()), None)
    if (sessions := binding.own_sessions) is None or table is None:
        return None
    return as_async_engine(without_pool(sessions().get_bind(clause=table).engine))


async def _is_alive(connection: AsyncConnection) -> bool:
    try:
        await connection.execute(_PING)
        await connection.commit()
    except SQLAlchemyError:
        return False
    return True
