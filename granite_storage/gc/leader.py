"""One collector among many processes: who has the database's advisory lock.

It saves work and makes nothing safe: two collectors at once are harmless, so a lock that is lost with its connection, or that a
connection pooler gives to two, does no harm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Engine, NullPool, TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from granite_storage._tasks import finish

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

__all__ = ["Leadership"]

_LOCKS: dict[str, TextClause] = {
    "postgresql": text("SELECT pg_try_advisory_lock(hashtext('granite_storage'), hashtext('gc'))"),
    "mysql": text("SELECT GET_LOCK(CONCAT('granite_storage.gc.', MD5(DATABASE())), 0)"),
    "mariadb": text("SELECT GET_LOCK(CONCAT('granite_storage.gc.', MD5(DATABASE())), 0)"),
}
_PING = text("SELECT 1")


class Leadership:
    """The lock of one process, once it has it, on a connection of its own.

    Args:
        binding: Whose database; None where there is none, and every process leads.
    """

    def __init__(self, binding: StorageBinding | None) -> None:
        self._binding = binding
        self._connection: AsyncConnection | None = None

    async def has_it(self) -> bool:
        """Tell whether this process is the leader, and let it be if nobody else is."""
        engine = None if self._binding is None else _engine_of(self._binding)
        lock = None if engine is None else _LOCKS.get(engine.dialect.name)
        if engine is None or lock is None:
            return True
        if self._connection is not None and await _answers(self._connection):
            return True
        await self.give_up()
        return await self._try(engine, lock)

    async def give_up(self) -> None:
        """Let another process lead; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await finish(connection.close(), "closing the connection of the garbage collector's lock")

    async def _try(self, engine: AsyncEngine, lock: TextClause) -> bool:
        connection = await engine.connect()
        try:
            has_it = bool((await connection.execute(lock)).scalar_one())
            await connection.commit()
            if has_it:
                self._connection = connection
        finally:
            if self._connection is not connection:
                await finish(connection.close(), "closing a connection that has no lock")
        return has_it


def _engine_of(binding: StorageBinding) -> AsyncEngine | None:
    table = next(iter(binding.metadata.tables.values()), None)
    if binding.sessions is None or table is None:
        return None
    return AsyncEngine(_without_pool(binding.sessions().get_bind(clause=table).engine))


def _without_pool(engine: Engine) -> Engine:
    """Return an engine that connects as another does, and keeps no connection: the lock's must not be one of a small pool's."""
    pool = engine.pool
    alone = NullPool(pool._creator, _dispatch=pool.dispatch, dialect=pool._dialect)
    return Engine(alone, engine.dialect, engine.url, hide_parameters=True)


async def _answers(connection: AsyncConnection) -> bool:
    try:
        await connection.execute(_PING)
        await connection.commit()
    except SQLAlchemyError:
        return False
    return True
