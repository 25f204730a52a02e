"""Sessions of asynchronous engines on any event loop: connections belong to the loop that opened them.

The pool of the application's engine has the connections of one loop. The library's own sessions may run on another: on that of
synchronous callers, or on a second one of the application. There they take no connection of that pool, but open their own as the
engine does, and close them when they end.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.pool import NullPool, Pool, QueuePool

from granite_storage._documentation import Page
from granite_storage._portal import portal
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._util import add_listeners, copy_listeners, root_engine, without_pool

# The loop of the last connection that a pool has opened. A pool that is disposed of is replaced by another one.
_loops: weakref.WeakKeyDictionary[Pool, weakref.ref[asyncio.AbstractEventLoop]] = weakref.WeakKeyDictionary()


class OwnSessions:
    """A session factory of the application for the library's own sessions.

    Args:
        factory: What makes the sessions; those of synchronous engines are as they are on any loop.
    """

    def __init__(self, factory: async_sessionmaker[AsyncSession]) -> None:
        self._factory = factory

    @property
    def kw(self) -> dict[str, Any]:
        """What the application has given its factory."""
        return self._factory.kw

    def __call__(self) -> AsyncSession:
        """Return a new session, whose connections belong to the loop that it is used on.

        A session raises `ConfigurationError` where its engine lends one connection to all, as for SQLite in memory, or where it
        was bound to a connection, and that belongs to another loop.
        """
        session = self._factory()
        if isinstance(session, AsyncSession):
            _bind_here(session)
        return session


def note_loops(factory: async_sessionmaker[AsyncSession]) -> None:
    """Note from now on which loop the pools belong to of the engines and connections that a session factory was given."""
    for bind in (factory.kw.get("bind"), *(factory.kw.get("binds") or {}).values()):
        if isinstance(bind, AsyncEngine | AsyncConnection):
            _note_loop(bind.sync_engine if isinstance(bind, AsyncEngine) else bind.engine.sync_engine)


def _bind_here(session: AsyncSession) -> None:
    """Let a session connect to an engine like its own, where the loop that runs has no connection in its pool."""
    find: Callable[..., Engine | Connection] = session.sync_session.get_bind
    found: dict[Engine, Engine] = {}

    def get_bind(*args: Any, **arguments: Any) -> Engine | Connection:
        bind = find(*args, **arguments)
        if is_here(bind.engine):
            return bind
        if isinstance(bind, Connection):
            raise ConfigurationError(
                "the session factory binds its sessions to a connection, which belongs to another event loop than the one that"
                " runs: await the method on the application's own loop, or bind the factory to an engine",
                see=Page.THREADS,
            )
        if bind not in found:  # a session has one transaction for each engine
            found[bind] = make_apart(bind)
        return found[bind]

    session.sync_session.get_bind = get_bind  # type: ignore[method-assign]  # it is asked for each statement


def is_here(engine: Engine) -> bool:
    """Return whether the loop that runs may use the connections in the pool of an engine."""
    if not engine.dialect.is_async or isinstance(engine.pool, NullPool):
        return True
    _note_loop(engine)
    known = _loops.get(engine.pool)
    if known is None:
        return not portal.is_here
    return known() is asyncio.get_running_loop()


def _note_loop(engine: Engine) -> None:
    engine = root_engine(engine)
    if engine.dialect.is_async and _on_connect not in list(engine.pool.dispatch.connect):
        add_listeners(engine, {"connect": _on_connect, "checkout": _on_checkout})


def _on_connect(_: Any, record: Any) -> None:
    # Engines of the library have a copy of this listener, as of all others of the application's engine.
    if not portal.is_here:  # no pool may belong to that loop, which ends with its last user
        pool: Pool = record._ConnectionRecord__pool
        _loops[pool] = weakref.ref(asyncio.get_running_loop())


def _on_checkout(connection: Any, record: Any, _: Any) -> None:
    # The first checkout tells the loop of connections that a pool had opened before it was bound; the later ones are not listened
    # to. `event.remove` would change the lists of the pool's copies, too, which may be in the middle of a call.
    pool: Pool = record._ConnectionRecord__pool
    if pool not in _loops:
        _on_connect(connection, record)
    own: Any = pool.dispatch.checkout
    own.listeners = deque(listener for listener in own.listeners if listener is not _on_checkout)


def make_apart(engine: Engine) -> Engine:
    """Return an engine that connects like another one, with its options and listeners, and keeps no connection.

    Raises:
        ConfigurationError: The engine lends one connection to all.
    """
    if not isinstance(engine.pool, QueuePool):
        raise ConfigurationError(
            f"an engine with a {type(engine.pool).__name__} has one connection, as for SQLite in memory, which belongs to"
            " another event loop than the one that runs: await the method on the application's own loop, or use a database with"
            " SQLAlchemy's default pool",
            see=Page.THREADS,
        )
    apart = without_pool(engine)
    apart.update_execution_options(**{"compiled_cache": engine._compiled_cache, **engine.get_execution_options()})
    copy_listeners(engine, apart)
    return apart
