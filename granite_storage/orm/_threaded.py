"""Synchronous engines and sessions as the library's coroutines use them: each connection works in a thread of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar, cast

from sqlalchemy import Connection, Dialect, Engine, Executable, Result
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session
from sqlalchemy.pool import SingletonThreadPool

from granite_storage._documentation import Page
from granite_storage._tasks import CLEANUP_TIMEOUT, shielded, shielded_cleanup, wait_uncancelled
from granite_storage.exceptions import ConfigurationError

T = TypeVar("T")

SessionFactory: TypeAlias = Callable[[], AsyncSession | Session]
"""What makes the sessions of an application: an `async_sessionmaker`, a `sessionmaker`, a `scoped_session`, or a function."""


class Worker:
    """A daemon thread that runs functions one after the other; it starts with the first and ends when the worker is closed."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._has_started = False
        self.interrupt: Callable[[], object] | None = None
        weakref.finalize(self, self._jobs.put, None)

    async def run(self, function: Callable[..., T], *args: Any, is_waited: bool = True, **kwargs: Any) -> T:
        """Run a function and return its result.

        A cancelled caller interrupts the database's work and waits for its end, unless it is not to be waited for.
        """
        future = self._submit(lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if self.interrupt is not None and not future.done():
                await shielded_cleanup(asyncio.to_thread(self.interrupt), "interrupting a statement")
            if is_waited:
                await wait_uncancelled(future, CLEANUP_TIMEOUT)
            else:
                future.add_done_callback(_ignore)
            raise

    def submit(self, function: Callable[[], object]) -> None:
        """Queue a function for the thread without waiting for its result."""
        self._submit(function).add_done_callback(_ignore)

    def _submit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        if not self._has_started:
            self._has_started = True
            threading.Thread(target=_work, args=(self._jobs,), name="granite-storage-database", daemon=True).start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put(partial(_do, partial(copy_context().run, function), future))
        return future

    def close(self) -> None:
        """End the thread after what it has to do."""
        self._jobs.put(None)


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _work(jobs: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job


def _do(function: Callable[[], T], future: asyncio.Future[T]) -> None:
    deliver: Callable[[], object]
    try:
        deliver = partial(future.set_result, function())
    except StopIteration as error:  # a future refuses it
        deliver = partial(future.set_exception, RuntimeError(f"{error!r} was raised"))
    except BaseException as error:  # noqa: BLE001  # it is raised where the result is awaited
        deliver = partial(future.set_exception, error)
    with suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(lambda: None if future.done() else deliver())


class _ThreadedConnection:
    """What the library uses of an `AsyncConnection`, over a synchronous connection."""

    def __init__(self, worker: Worker, connection: Connection) -> None:
        self._worker = worker
        self.sync_connection = connection
        self._worker.interrupt = _interrupting(connection)

    @property
    def dialect(self) -> Dialect:
        return self.sync_connection.dialect

    async def run_sync(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return await self._worker.run(function, self.sync_connection, *args, **kwargs)

    async def execute(self, statement: Executable, parameters: Any = None, **options: Any) -> Result[Any]:
        return await self._worker.run(_fetched, self.sync_connection.execute, statement, parameters, **options)

    async def scalars(self, statement: Executable, parameters: Any = None, **options: Any) -> Any:
        return (await self.execute(statement, parameters, **options)).scalars()

    async def exec_driver_sql(self, statement: str) -> Result[Any]:
        return await self._worker.run(_fetched, self.sync_connection.exec_driver_sql, statement)

    async def stream(self, statement: Executable) -> _ThreadedResult:
        streamed = statement.execution_options(stream_results=True)
        return _ThreadedResult(self._worker, await self._worker.run(self.sync_connection.execute, streamed))

    def begin_nested(self) -> _Savepoint:
        return _Savepoint(self._worker, self.sync_connection)

    async def commit(self) -> None:
        await self._worker.run(self.sync_connection.commit)

    async def close(self) -> None:
        try:
            await self._worker.run(self.sync_connection.close)
        finally:
            self._worker.close()

    async def get_isolation_level(self) -> str:
        return await self._worker.run(self.sync_connection.get_isolation_level)

    async def get_raw_connection(self) -> Any:
        return self.sync_connection.connection


def _fetched(execute: Callable[..., Result[Any]], *args: Any, **kwargs: Any) -> Result[Any]:
    """Execute a statement and fetch all of its rows, so that the event loop finds them in memory."""
    result: Any = execute(*args, **kwargs)
    return cast("Result[Any]", result.freeze()()) if result.returns_rows else cast("Result[Any]", result)


def _interrupting(connection: Connection) -> Callable[[], object] | None:
    """Return what ends the running statement of a connection from another thread, where its driver can."""
    driver = connection.connection.driver_connection
    found = (getattr(driver, name, None) for name in ("interrupt", "cancel"))
    return next((method for method in found if callable(method)), None)


class _ThreadedResult:
    """What the library uses of an `AsyncResult`."""

    def __init__(self, worker: Worker, result: Result[Any]) -> None:
        self._worker = worker
        self._result = result

    async def partitions(self) -> AsyncIterator[Sequence[Any]]:
        pages = self._result.partitions()
        while page := await self._worker.run(lambda: next(pages, ())):
            yield page

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for page in self.partitions():
            for row in page:
                yield row

    async def close(self) -> None:
        await self._worker.run(self._result.close)


class _Savepoint:
    """A savepoint to enter or to await, as `AsyncConnection.begin_nested` returns."""

    def __init__(self, worker: Worker, connection: Connection) -> None:
        self._worker = worker
        self._connection = connection
        self._transaction: Any = None

    def __await__(self) -> Any:
        return self._begin().__await__()

    async def _begin(self) -> Self:
        self._transaction = await self._worker.run(self._connection.begin_nested)
        return self

    async def rollback(self) -> None:
        await self._worker.run(self._transaction.rollback)

    async def __aenter__(self) -> Self:
        return await self._begin()

    async def __aexit__(self, *error: Any) -> None:
        await shielded(self._worker.run(self._transaction.__exit__, *error))


class _ThreadedEngine:
    """What the library uses of an `AsyncEngine`, over a synchronous engine."""

    def __init__(self, engine: Engine) -> None:
        self.sync_engine = engine
        self.dialect = engine.dialect

    async def connect(self) -> _ThreadedConnection:
        worker, opened = Worker(), list[Connection]()

        def connect() -> Connection:
            opened.append(self.sync_engine.connect())
            return _require_shared(opened[0])

        def close() -> None:
            for connection in opened:
                connection.close()

        try:
            return _ThreadedConnection(worker, await worker.run(connect, is_waited=False))
        except BaseException:
            worker.submit(close)
            worker.close()
            raise

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[_ThreadedConnection]:
        connection = await self.connect()
        try:
            yield connection
            await connection.commit()
        finally:
            await shielded_cleanup(connection.close(), "closing a connection")

    async def dispose(self) -> None:
        await asyncio.to_thread(self.sync_engine.dispose)


def _require_shared(connection: Connection) -> Connection:
    """Refuse a pool with another connection for each thread: on SQLite in memory that is another, empty database."""
    if isinstance(connection.engine.pool, SingletonThreadPool):
        connection.close()
        raise ConfigurationError(
            "each thread has its own SQLite database in memory, so the library's threads cannot read these rows: use a file, "
            "or create_engine(..., poolclass=StaticPool, connect_args={'check_same_thread': False})",
            see=Page.JOURNAL_ON_SQLITE,
        )
    return connection


class ThreadedSession:
    """What the library uses of an `AsyncSession`, over a synchronous session."""

    def __init__(self, session: Session) -> None:
        self.sync_session = session
        self._worker = Worker()

    async def connection(
        self, bind_arguments: dict[str, Any] | None = None, execution_options: Mapping[str, Any] | None = None
    ) -> _ThreadedConnection:
        """Return the connection of its transaction."""
        made = await self._worker.run(
            lambda: _require_shared(
                self.sync_session.connection(bind_arguments=bind_arguments, execution_options=execution_options)
            )
        )
        return _ThreadedConnection(self._worker, made)

    def get_bind(self, **arguments: Any) -> Any:
        """Return the engine or connection that it uses for something."""
        return self.sync_session.get_bind(**arguments)

    async def run_sync(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function with the synchronous session."""
        return await self._worker.run(function, self.sync_session, *args, **kwargs)

    async def commit(self) -> None:
        """Commit its transaction."""
        await self._worker.run(self.sync_session.commit)

    async def rollback(self) -> None:
        """Roll its transaction back."""
        await self._worker.run(self.sync_session.rollback)

    async def close(self) -> None:
        """Close it, and end its thread."""
        try:
            await self._worker.run(self.sync_session.close)
        finally:
            self._worker.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await shielded_cleanup(self.close(), "closing a session")


class _Sessions:
    """A session factory as the library's coroutines use it: what it makes is an `AsyncSession` or works like one."""

    def __init__(self, factory: SessionFactory) -> None:
        # A `scoped_session` gives every thread its own session; what makes them is asked.
        self._factory = getattr(factory, "session_factory", factory)

    @property
    def kw(self) -> Mapping[str, Any]:
        return getattr(self._factory, "kw", {})

    def __call__(self) -> AsyncSession:
        made = self._factory()
        return cast("AsyncSession", ThreadedSession(made)) if isinstance(made, Session) else cast("AsyncSession", made)


def as_async_sessions(factory: SessionFactory) -> async_sessionmaker[AsyncSession]:
    """Return a session factory, synchronous or not, as what makes asynchronous sessions."""
    return factory if isinstance(factory, async_sessionmaker) else cast("async_sessionmaker[AsyncSession]", _Sessions(factory))


def as_async_engine(engine: Engine) -> AsyncEngine:
    """Return an engine, synchronous or not, as an asynchronous one."""
    return AsyncEngine(engine) if engine.dialect.is_async else cast("AsyncEngine", _ThreadedEngine(engine))
