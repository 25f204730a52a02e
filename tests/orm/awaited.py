"""Synchronous sessions, connections and engines that tests await as they do asynchronous ones.

The scenarios are written once, with `await`. Here each call runs in the thread of its session or connection, so that what is
tried is a plain `Session`, as an endpoint in a thread pool has it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Self

from sqlalchemy import Connection, Engine, Result, ScalarResult
from sqlalchemy.orm import Session, sessionmaker

__all__ = ["AwaitedConnection", "AwaitedEngine", "AwaitedSession", "AwaitedSessions"]


class _Opening:
    """Something to await, or to enter and leave."""

    def __init__(self, open_: Callable[[], Awaitable[Any]]) -> None:
        self._open = open_
        self._opened: Any = None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._open().__await__()

    async def __aenter__(self) -> Any:
        self._opened = await self._open()
        return await self._opened.__aenter__()

    async def __aexit__(self, *error: Any) -> Any:
        return await self._opened.__aexit__(*error)


def _fetched(result: Any) -> Any:
    if isinstance(result, ScalarResult):
        raise TypeError("fetch the rows before their scalars")
    if not isinstance(result, Result):
        return result
    try:
        return result.freeze()()
    except NotImplementedError:  # it has no rows
        return result


class _Awaited:
    """An object whose blocking methods run in a thread."""

    BLOCKING: frozenset[str] = frozenset()

    def __init__(self, inner: Any, thread: ThreadPoolExecutor) -> None:
        self._inner = inner
        self._thread = thread

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return functools.partial(self._call, found) if name in self.BLOCKING else found

    async def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: _fetched(call()))

    async def run_sync(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await self._call(function, self._inner, *args, **kwargs)

    async def scalars(self, *args: Any, **kwargs: Any) -> Any:
        return (await self._call(self._inner.execute, *args, **kwargs)).scalars()

    def begin(self) -> _Opening:
        return _Opening(functools.partial(self._begin, self._inner.begin))

    def begin_nested(self) -> _Opening:
        return _Opening(functools.partial(self._begin, self._inner.begin_nested))

    async def _begin(self, begin: Callable[[], Any]) -> _AwaitedTransaction:
        return _AwaitedTransaction(await self._call(begin), self._thread)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.shield(self._call(self._inner.close))


class _AwaitedTransaction(_Awaited):
    BLOCKING = frozenset({"commit", "rollback", "close", "prepare"})

    async def __aenter__(self) -> Any:
        await self._call(self._inner.__enter__)
        return self

    async def __aexit__(self, *error: Any) -> Any:
        return await self._call(self._inner.__exit__, *error)


class AwaitedConnection(_Awaited):
    """A `Connection`."""

    BLOCKING = frozenset(
        {"close", "commit", "exec_driver_sql", "execute", "execution_options", "invalidate", "rollback", "scalar"}
    )

    @property
    def sync_connection(self) -> Connection:
        return self._inner  # type: ignore[no-any-return]

    async def get_raw_connection(self) -> Any:
        return self._inner.connection


class AwaitedSession(_Awaited):
    """A `Session`."""

    BLOCKING = frozenset(
        {
            "close",
            "commit",
            "delete",
            "execute",
            "flush",
            "get",
            "get_one",
            "invalidate",
            "merge",
            "refresh",
            "reset",
            "rollback",
            "scalar",
        }
    )

    def __init__(self, session: Session, thread: ThreadPoolExecutor | None = None) -> None:
        super().__init__(session, ThreadPoolExecutor(1) if thread is None else thread)

    @property
    def sync_session(self) -> Session:
        return self._inner  # type: ignore[no-any-return]

    async def connection(self, **kwargs: Any) -> AwaitedConnection:
        return AwaitedConnection(await self._call(self._inner.connection, **kwargs), self._thread)

    def __contains__(self, instance: object) -> bool:
        return instance in self._inner

    def __iter__(self) -> Any:
        return iter(self._inner)


class AwaitedSessions:
    """A `sessionmaker`."""

    def __init__(self, maker: sessionmaker[Session]) -> None:
        self.sync_maker = maker

    @property
    def kw(self) -> dict[str, Any]:
        return self.sync_maker.kw

    def __call__(self, **options: Any) -> AwaitedSession:
        return AwaitedSession(self.sync_maker(**options))

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AwaitedSession]:
        async with self() as session, session.begin():
            yield session


class AwaitedEngine:
    """An `Engine`."""

    def __init__(self, engine: Engine) -> None:
        self.sync_engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sync_engine, name)

    def execution_options(self, **options: Any) -> AwaitedEngine:
        return AwaitedEngine(self.sync_engine.execution_options(**options))

    def connect(self) -> _Opening:
        return _Opening(self._connect)

    async def _connect(self) -> AwaitedConnection:
        thread = ThreadPoolExecutor(1)
        connection = await asyncio.get_running_loop().run_in_executor(thread, self.sync_engine.connect)
        return AwaitedConnection(connection, thread)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AwaitedConnection]:
        async with self.connect() as connection, connection.begin():
            yield connection

    async def dispose(self) -> None:
        await asyncio.to_thread(self.sync_engine.dispose)
