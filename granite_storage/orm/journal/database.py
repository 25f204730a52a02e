"""Connections of the journal's own: what it commits must not wait for the application's pool, nor join its transactions."""

from __future__ import annotations

import asyncio
import copy
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool

from granite_storage.exceptions import BackendUnavailableError, ConfigurationError
from granite_storage.orm._util import dispatchers_of, root_engine

__all__ = ["TRANSLATE_MAP", "JournalPool"]

TRANSLATE_MAP: Final = "schema_translate_map"
"""The name of SQLAlchemy's option."""

_ISOLATION: Final = "READ COMMITTED"


class JournalPool:
    """A small pool beside an engine's, with the same creator, arguments and events.

    Its connections are always at READ COMMITTED: on MariaDB a worker that reads at REPEATABLE READ holds gap locks, which would
    keep new intents waiting. Disposing of the engine disposes of it.

    Args:
        engine: The application's engine, or one that was made for the journal.
        size: The most connections it opens; those of each event loop where the engine's pool keeps none.

    Attributes:
        translate_map: The engine's own `schema_translate_map`, which says where the journal's tables are.

    Raises:
        ConfigurationError: The engine's database or its pool cannot have a journal.
    """

    def __init__(self, engine: AsyncEngine, size: int) -> None:
        _require_able(engine)
        self._outer = engine.sync_engine
        self.translate_map: Mapping[str | None, str | None] = self._outer.get_execution_options().get(TRANSLATE_MAP) or {}
        inner = Engine(
            _small_pool(self._outer.pool, size),
            self._outer.dialect,
            self._outer.url,
            hide_parameters=True,
            # The same dialect compiles for both, so that what one has compiled serves the other.
            execution_options={**self.options, "compiled_cache": self._outer._compiled_cache},
        )
        # The application's own events come along, such as one that sets a role; ours are those of its sessions.
        for dispatcher in dispatchers_of(self._outer):
            inner.dispatch._update(dispatcher, only_propagate=False)
        if self._outer._has_events:  # else what listens to the class `Engine` later decides
            inner._has_events = True
        event.listen(inner, "connect", self._on_connect)
        self._engine = AsyncEngine(inner)
        self._size = size
        self._timeout: float | None = None
        self._places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._open_pools = _open_pools_of(root_engine(self._outer))
        self._open_pools.add(self)

    @property
    def options(self) -> dict[str, Any]:
        """The options of a statement on the journal's tables, whoever's connection executes it."""
        return {TRANSLATE_MAP: self.translate_map or None}

    @property
    def dialect(self) -> str:
        """The name of the database: `postgresql`, `mysql` or `mariadb`."""
        return self._outer.dialect.name

    @property
    def is_postgresql(self) -> bool:
        """Whether it is PostgreSQL."""
        return self.dialect == "postgresql"

    def within(self, seconds: float) -> Self:
        """Return the same pool for callers that hold a connection already: whose transactions must not wait without end.

        Raises:
            BackendUnavailableError: From then on, by a transaction of it that has not ended in time.
        """
        bounded = copy.copy(self)
        bounded._timeout = seconds
        return bounded

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection in a transaction whose commit nobody relies on."""
        async with self._in_time(), self._engine.begin() as connection:
            yield connection

    @asynccontextmanager
    async def durable(self) -> AsyncIterator[AsyncConnection]:
        """Give a connection in a transaction that, once it is committed, no crash of the database takes back."""
        async with self._in_time(), self._engine.begin() as connection:
            if self.is_postgresql:
                await connection.execute(_SYNCHRONOUS)
            yield connection

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Bound a transaction: in time, where that is wanted, and in number, where the pool itself keeps no count."""
        try:
            async with asyncio.timeout(self._timeout), AsyncExitStack() as stack:
                if isinstance(self._engine.sync_engine.pool, NullPool):
                    loop = asyncio.get_running_loop()
                    await stack.enter_async_context(self._places.setdefault(loop, asyncio.Semaphore(self._size)))
                yield
        except (TimeoutError, PoolTimeoutError) as error:
            raise BackendUnavailableError(
                f"the journal had no answer from the database within {self._timeout or self._pool_timeout:g} s, so that nothing"
                " is stored. It needs a connection beside the one that the session's transaction holds: leave room for its"
                " pool_size connections, in the database and in a connection pooler before it. Behind a pooler, pass"
                " StorageJournal an engine of its own, whose URL leads to a pool of its own or past the pooler"
            ) from error

    @property
    def _pool_timeout(self) -> float:
        pool = self._engine.sync_engine.pool
        return pool._timeout if isinstance(pool, QueuePool) else 0.0

    async def aclose(self) -> None:
        """Close the connections; idempotent, and a later call opens new ones."""
        self._open_pools.discard(self)
        await self._engine.dispose()

    def dispose(self) -> None:
        """Close the connections from within an event of SQLAlchemy."""
        self._engine.sync_engine.dispose()

    def _on_connect(self, connection: Any, _: Any) -> None:
        self._open_pools.add(self)
        self._outer.dialect.set_isolation_level(connection, _ISOLATION)


_SYNCHRONOUS = text("SET LOCAL synchronous_commit = on")


class _OpenPools:
    """The open pools beside an engine: disposing of the engine disposes of them, even if the journal was dropped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._pools: set[JournalPool] = set()
        event.listen(engine, "engine_disposed", self._dispose)

    def add(self, pool: JournalPool) -> None:
        self._pools.add(pool)

    def discard(self, pool: JournalPool) -> None:
        self._pools.discard(pool)

    def _dispose(self, engine: Engine) -> None:
        # The engines of journals have a copy of this listener, as of all others of the application's engine.
        if engine is self._engine():
            for pool in list(self._pools):
                pool.dispose()


_open_pools: WeakKeyDictionary[Engine, weakref.ref[_OpenPools]] = WeakKeyDictionary()
"""By engine; what is held here strongly would hold the engine."""


def _open_pools_of(engine: Engine) -> _OpenPools:
    reference = _open_pools.get(engine)
    found = None if reference is None else reference()
    if found is None:
        found = _OpenPools(engine)  # its listener, and so the engine, keeps it alive
        _open_pools[engine] = weakref.ref(found)
    return found


def _require_able(engine: AsyncEngine) -> None:
    if not isinstance(engine, AsyncEngine):
        raise ConfigurationError(f"a journal needs an AsyncEngine, not {type(engine).__name__}")
    name, pool = engine.dialect.name, engine.sync_engine.pool
    if name == "sqlite":
        raise ConfigurationError(
            "SQLite cannot have a journal: while a session writes, no second connection can. Leave journal=... out;"
            " rollbacks are handled all the same, and the garbage collector removes what a crash leaves behind"
        )
    if name not in ("postgresql", "mysql", "mariadb"):
        raise ConfigurationError(f"a journal needs PostgreSQL or MariaDB, and does not know {name}")
    if not isinstance(pool, QueuePool | NullPool):
        raise ConfigurationError(
            f"an engine with a {type(pool).__name__} cannot have a journal: on a connection that is shared, the journal's commits"
            " would commit the application's transactions. Use SQLAlchemy's default pool, or NullPool"
        )


def _small_pool(pool: Pool, size: int) -> Pool:
    """Make a pool like another, of another size: `Pool.recreate` knows all that it was made with, but not how to change it."""
    if not isinstance(pool, QueuePool):
        return pool.recreate()
    return AsyncAdaptedQueuePool(
        pool._creator,
        pool_size=size,
        max_overflow=0,
        timeout=pool._timeout,
        recycle=pool._recycle,
        pre_ping=pool._pre_ping,
        reset_on_return=pool._reset_on_return,
        _dispatch=pool.dispatch,
        dialect=pool._dialect,
    )
