"""The journal's database: connections of its own, the checks at start-up, the heartbeat, and the schemas in use.

What the journal commits must neither wait for the application's pool nor join its transactions.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import json
import os
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import Column, Connection, Engine, Row, Select, Table, bindparam, event, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool, QueuePool

from granite_storage._documentation import Page
from granite_storage._portal import has_running_loop, portal
from granite_storage._tasks import CLEANUP_TIMEOUT
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError, StorageError
from granite_storage.orm._faults import explain_denied, explain_fault
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm._loops import make_apart
from granite_storage.orm._threaded import as_async_engine
from granite_storage.orm._util import SYNCHRONOUS, TRANSLATE_MAP, copy_listeners, put_barrier, root_engine, upsert_rows, wait
from granite_storage.orm.journal.tables import (
    LONGEST_META_NAME,
    RETENTION_PREFIX,
    SCHEMA_VERSION,
    SIDECAR_NAME,
    VERSION_NAME,
    WORKER_VERSION,
    clock,
    in_utc,
)

if TYPE_CHECKING:
    from uuid import UUID

    from granite_storage.policies import StoragePolicy


_Row: TypeAlias = "Row[*tuple[Any, ...]]"

_ISOLATION: Final = "READ COMMITTED"


class JournalPool:
    """A small pool beside an engine's, with the same creator, arguments and events.

    Its connections are always at READ COMMITTED: on MariaDB a worker that reads at REPEATABLE READ holds gap locks, which would
    keep new intents waiting. Disposing of the engine disposes of it.

    Args:
        engine: The application's engine, or one that was made for the journal.
        size: The most connections it opens; those of each event loop where the engine's pool keeps none. The loop of synchronous
            callers has as many of its own, where the engine is an asynchronous one.

    Attributes:
        translate_map: The engine's own `schema_translate_map`, which says where the journal's tables are.

    Raises:
        ConfigurationError: The engine's database or its pool cannot have a journal.
    """

    def __init__(self, engine: AsyncEngine | Engine, size: int) -> None:
        self._outer = _require_able(engine)
        self.translate_map: Mapping[str | None, str | None] = self._outer.get_execution_options().get(TRANSLATE_MAP) or {}
        self._size = size
        self._timeout: float | None = None
        self._places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._engines = Engines(self._new_engine)
        self._tasks: set[asyncio.Task[None]] = set()
        self._open_pools = _open_pools_of(root_engine(self._outer))
        self._open_pools.add(self)

    def _new_engine(self) -> AsyncEngine:
        inner = Engine(
            _small_pool(self._outer.pool, self._size, is_async=self._outer.dialect.is_async),
            self._outer.dialect,
            self._outer.url,
            hide_parameters=True,
            # The same dialect compiles for both, so that what one has compiled serves the other.
            execution_options={**self.options, "compiled_cache": self._outer._compiled_cache},
        )
        self._bring_events(inner)
        event.listen(inner, "connect", self._on_connect)
        return as_async_engine(inner)

    def _bring_events(self, inner: Engine) -> None:
        """Copy the listeners of the application's engine to the journal's."""
        copy_listeners(self._outer, inner)

    @property
    def _engine(self) -> AsyncEngine:
        return self._engines.of_caller

    @property
    def options(self) -> dict[str, Any]:
        """The options of a statement on the journal's tables, on any connection."""
        return {TRANSLATE_MAP: self.translate_map or None}

    @property
    def dialect(self) -> str:
        """The name of the database: `postgresql`, `mysql`, `mariadb` or `sqlite`."""
        return self._outer.dialect.name

    @property
    def batch_size(self) -> int | None:
        """How many intents are processed together at most, where the database bounds that."""
        return None

    @property
    def uploads(self) -> JournalPool:
        """The pool of the database that has the intents of uploads; that of the rows, but on SQLite."""
        return self

    def upload_tables(self, tables: JournalTables) -> JournalTables:
        """Return the tables of the intents of uploads, where those beside the rows are given."""
        return tables

    async def open(self) -> object:
        """Prepare what a session could not wait for, once the tables have passed their checks."""

    async def forget_uploads(self, locations: Sequence[str]) -> None:
        """Delete the intents of uploads that outlive the COMMIT of their rows, once these objects are gone."""

    async def has_displaced(self, tables: JournalTables, location: str) -> bool:
        """Return whether an object was displaced from its row, where the intents of uploads outlive the COMMIT."""
        return False

    def require_here(self, connection: Connection) -> None:
        """Refuse the transaction of a session on another database, where that is seen before its first statement.

        Raises:
            ConfigurationError: It is.
        """

    def sees_uploads(self, connection: Connection, ids: set[UUID]) -> bool:
        """Return whether these uploads are pending in another database than that of the transaction.

        Args:
            connection: The connection of the transaction, which has written to the table of intents.
            ids: The intents of the uploads.
        """
        return False

    @property
    def is_mariadb(self) -> bool:
        """Whether it is MariaDB."""
        return self.dialect in ("mysql", "mariadb")

    @property
    def is_postgresql(self) -> bool:
        """Whether it is PostgreSQL."""
        return self.dialect == "postgresql"

    def within(self, seconds: float) -> Self:
        """Return the same pool for callers that already hold a connection, so that their transactions wait only so long.

        Raises:
            BackendUnavailableError: From then on, by a transaction of it that has not ended in time.
        """
        bounded = copy.copy(self)
        bounded._timeout = seconds
        return bounded

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in a transaction whose commit need not be durable."""
        async with self._in_time(), self._engine.begin() as connection:
            yield connection

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Yield a connection in a transaction that writes, whose commit need not be durable."""
        return self.reading()

    def deciding(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Yield a connection whose transaction sees which objects rows refer to, before the others are deleted."""
        return self.reading()

    async def make_durable(self, connection: AsyncConnection) -> None:
        """Let the COMMIT of such a transaction make durable what it has seen, where the database does not by itself.

        PostgreSQL writes what a session has committed with `synchronous_commit = off` with the next commit that waits for it.
        """
        if self.is_postgresql:
            await put_barrier(connection)

    async def may_find(self, statement: Select[Any]) -> bool:
        """Return False if a read that waits for no lock shows that a statement finds nothing now."""
        return True

    def fencing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Yield a connection in a durable transaction that fences intents."""
        return self.durable()

    def durable(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Yield a connection in a transaction whose commit survives a crash of the database."""
        return self._synchronous()

    @asynccontextmanager
    async def _synchronous(self) -> AsyncIterator[AsyncConnection]:
        async with self._in_time(), self._engine.begin() as connection:
            if self.is_postgresql:
                await connection.execute(SYNCHRONOUS)
            yield connection

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Bound a transaction: in time, where that is wanted, and in number, where the pool itself keeps no count.

        Raises:
            ConfigurationError: A table of the journal is missing by now, or the role may not use it.
        """
        try:
            async with asyncio.timeout(self._timeout), AsyncExitStack() as stack:
                if isinstance(self._engine.sync_engine.pool, NullPool):
                    loop = asyncio.get_running_loop()
                    await stack.enter_async_context(self._places.setdefault(loop, asyncio.Semaphore(self._size)))
                yield
        except (TimeoutError, PoolTimeoutError) as error:
            raise BackendUnavailableError(self._describe_timeout()) from error
        except DBAPIError as error:
            if (fault := self._explain_fault(error)) is None:
                raise
            raise fault from error.orig

    def _explain_fault(self, error: BaseException) -> StorageError | None:
        """Return what to raise for an error of the database about the journal's tables, or about their file."""
        return explain_fault(error, self.role)

    @property
    def role(self) -> str | None:
        """The name that the connections are made with."""
        return self._outer.url.username

    async def require_fit(self, tables: JournalTables, others: Sequence[Table]) -> None:
        """Refuse storage engines and settings of the database; see `check_database`."""
        async with self.durable() as connection:
            if not self.is_postgresql:
                names = [(effective(table.schema, self.translate_map), table.name) for table in (*tables.all, *others)]
                await _check_mariadb(connection, names)

    def _describe_timeout(self) -> str:
        pool = self._engine.sync_engine.pool
        pool_timeout = pool._timeout if isinstance(pool, QueuePool) else 0.0
        return (
            f"the journal had no answer from the database within {self._timeout or pool_timeout:g} s, so nothing is"
            " stored. It needs a connection beside the one that the session's transaction holds: leave room for its"
            " pool_size connections, in the database and in a connection pooler before it. Behind a pooler, pass"
            " StorageJournal an engine of its own, whose URL leads to a pool of its own or past the pooler"
        )

    def run_aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the caller, on its event loop or on that of synchronous callers, until the pool is closed."""
        self._open_pools.add(self)
        if has_running_loop():
            self._keep(asyncio.get_running_loop().create_task(work))
        else:
            portal.run_later(self._keep_aside(work))

    async def _keep_aside(self, work: Coroutine[Any, Any, None]) -> None:
        await self._keep(asyncio.ensure_future(work))

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _end_tasks(self) -> list[asyncio.Task[None]]:
        """Cancel what runs aside, and return those of the tasks that the caller can wait for."""
        tasks, here = list(self._tasks), _running_loop()
        for task in tasks:
            loop = task.get_loop()
            if loop is not here and not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
        own = [task for task in tasks if task.get_loop() is here]
        for task in own:
            task.cancel()
        return own

    async def aclose(self) -> None:
        """Close the connections; idempotent, and a later call opens new ones."""
        self._open_pools.discard(self)
        await asyncio.gather(*self._end_tasks(), return_exceptions=True)
        await self._engines.aclose()

    def dispose(self) -> None:
        """Close the connections from within an event of SQLAlchemy."""
        self._end_tasks()
        self._engines.dispose()

    def _on_connect(self, connection: Any, _: Any) -> None:
        self._open_pools.add(self)
        self._outer.dialect.set_isolation_level(connection, _ISOLATION)


class Engines:
    """The engines of a pool: one, and others for other event loops, where connections belong to the loop that opened them.

    The loop of synchronous callers has a pool of its own. A second loop of the application opens a connection for each
    transaction, since it may end without a word. A forked child makes its own engines and closes none of its parent's
    connections.
    """

    def __init__(self, make: Callable[[], AsyncEngine]) -> None:
        self._make = make
        self._first = make()
        # The loop that the first one's connections belong to.
        self._first_loop: weakref.ref[asyncio.AbstractEventLoop] | None = None
        # A child must not close what its parent has opened: on SQLite that may take the parent's locks from it.
        self._inherited: list[Pool] = []
        self._elsewhere: WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncEngine] = WeakKeyDictionary()
        self._process = os.getpid()

    @property
    def of_caller(self) -> AsyncEngine:
        """The one that the running event loop uses."""
        self._leave_to_parent()
        if not self._first.dialect.is_async:
            return self._first
        loop = asyncio.get_running_loop()
        if not portal.is_here:
            if self._first_loop is None:
                self._first_loop = weakref.ref(loop)
            if self._first_loop() is loop or isinstance(self._first.sync_engine.pool, NullPool):
                return self._first
        if loop not in self._elsewhere:
            self._elsewhere[loop] = self._make() if portal.is_here else as_async_engine(make_apart(self._first.sync_engine))
            if portal.is_here:
                portal.add_user(self)
        return self._elsewhere[loop]

    async def aclose(self) -> None:
        """Close all connections."""
        self._leave_to_parent()
        if (closing := self._close_on_its_loop()) is None:
            await self._first.dispose()
        else:
            await asyncio.wait([asyncio.wrap_future(closing)], timeout=CLEANUP_TIMEOUT)  # that loop may be held up
        if portal.is_used_by(self):
            await portal.run_here(self._dispose_on_portal())
            portal.release(self)

    def dispose(self) -> None:
        """Close all connections from within an event of SQLAlchemy; those of another loop some time later."""
        self._leave_to_parent()
        if self._close_on_its_loop() is None:
            self._first.sync_engine.dispose()
        if portal.is_used_by(self):
            portal.run_later(self._dispose_on_portal())

    def _close_on_its_loop(self) -> concurrent.futures.Future[None] | None:
        """Begin to close the first one's connections on their own loop; return None where the caller may close them itself."""
        reference, self._first_loop = self._first_loop, None
        loop = None if reference is None else reference()
        if reference is None or loop is _running_loop():
            return None
        if loop is not None and loop.is_running():
            return asyncio.run_coroutine_threadsafe(self._first.dispose(), loop)
        if self._first.dialect.name != "sqlite":  # whose connections are threads, which any loop can end
            self._first.sync_engine.dispose(close=False)
        return None

    def _leave_to_parent(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._inherited.append(self._first.sync_engine.pool)
            self._first.sync_engine.dispose(close=False)
            self._first_loop = None
            self._elsewhere.clear()

    async def _dispose_on_portal(self) -> None:
        engine = self._elsewhere.get(asyncio.get_running_loop())
        if engine is not None:
            await engine.dispose()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    return asyncio.get_running_loop() if has_running_loop() else None


_OPEN_POOLS: Final = "_granite_storage_open_pools"
"""The attribute of an engine that has the open pools beside it: a dictionary of this module's would hold the engine by them."""


def _open_pools_of(engine: Engine) -> set[JournalPool]:
    """Return the open pools beside an engine: disposing of the engine disposes of them, even if the journal was dropped."""
    if not hasattr(engine, _OPEN_POOLS):
        setattr(engine, _OPEN_POOLS, set())
        event.listen(engine, "engine_disposed", _dispose_of_open_pools)
    found: set[JournalPool] = getattr(engine, _OPEN_POOLS)
    return found


def _dispose_of_open_pools(engine: Engine) -> None:
    # The engines of journals have a copy of this listener, as of all others of the application's engine, and no such pools.
    for pool in list(getattr(engine, _OPEN_POOLS, ())):
        pool.dispose()


def _require_able(given: AsyncEngine | Engine) -> Engine:
    if not isinstance(given, AsyncEngine | Engine):
        raise _refuse(f"a journal needs an AsyncEngine or an Engine, not {type(given).__name__}")
    engine = given.sync_engine if isinstance(given, AsyncEngine) else given
    name, pool = engine.dialect.name, engine.pool
    if name not in ("postgresql", "mysql", "mariadb", "sqlite"):
        raise _refuse(f"a journal needs PostgreSQL, MariaDB or SQLite, and does not support {name}")
    if not isinstance(pool, QueuePool | NullPool):
        raise ConfigurationError(
            f"an engine with a {type(pool).__name__} cannot have a journal: on a connection that is shared, the journal's commits"
            " would commit the application's transactions. Use SQLAlchemy's default pool, or NullPool",
            see=Page.CONNECTIONS,
        )
    return engine


def _refuse(why: str) -> ConfigurationError:
    return ConfigurationError(why, see=Page.JOURNAL)


def _small_pool(pool: Pool, size: int, *, is_async: bool) -> Pool:
    """Make a pool like another, of another size: `Pool.recreate` knows all that it was made with, but not how to change it."""
    if not isinstance(pool, QueuePool):
        return pool.recreate()
    kind: type[QueuePool] = AsyncAdaptedQueuePool if is_async else QueuePool
    return kind(
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


# The heartbeat of the workers, in the table `granite_storage_meta`, and the gaps in it.
#
# A database that was restored from a backup has the heartbeat of the backup, and so has one that was out of use. The process
# that beats first after such a silence notes it, and the note stays until a person has confirmed the database: meanwhile the
# garbage collector deletes nothing, for what it would take for orphans may be the files of a database that is about to be
# restored once more.


_HEARTBEAT = "heartbeat"
_GAP = "heartbeat gap"
_WORKER = "worker:"
"""Followed by a version of the workers' protocol: the last beat of a worker of that version."""

_SHORTEST_GAP = timedelta(hours=1)
_MISSED = 4
_WITHOUT_VERSION = 1
"""The version of workers that write the heartbeat alone."""


async def beat(pool: JournalPool, tables: JournalTables, *, within: timedelta) -> None:
    """Note that a worker is at work, and that none was where the last beat is long overdue.

    The row of the version gets the very moment that the heartbeat gets. A heartbeat with another one is that of a version which
    writes no such row, and is noted before it is overwritten.

    Args:
        pool: The journal's connections.
        tables: The journal's tables.
        within: When the next beat is to be expected.
    """
    async with pool.writing() as connection:
        beats = {row.name: row for row in await connection.execute(_beats(tables))}
        last = beats.get(_HEARTBEAT)
        now = (await connection.execute(select(clock()))).scalar_one() if last is None else last.now
        if last is not None:
            if (silence := _silence(last)) is not None:
                said = {"name": _GAP, "value": f"{silence.total_seconds():.0f}", "changed": clock()}
                await insert_if_absent(connection, tables, said)
            if _has_no_version(beats):
                await put_values(connection, tables, {f"{_WORKER}{_WITHOUT_VERSION}": last.value}, last.changed)
        names = (_HEARTBEAT, f"{_WORKER}{WORKER_VERSION}")
        await put_values(connection, tables, dict.fromkeys(names, f"{within.total_seconds():.0f}"), now)


def find_older_worker(connection: Connection, tables: JournalTables) -> str | None:
    """Return in words that a worker of an older version was at work, and may be still; None where none was for long enough."""
    beats = {row.name: row for row in connection.execute(_beats(tables))}
    older = [row for name, row in beats.items() if _version_of(name) < WORKER_VERSION]
    if _has_no_version(beats):
        older.append(beats[_HEARTBEAT])
    running = [row for row in older if _silence(row) is None]
    if not running:
        return None
    last = max(running, key=lambda row: in_utc(row.changed))
    begun, over = in_utc(last.changed), in_utc(last.changed) + _longest_silence(last)
    row = f"the row {_WORKER}{_WITHOUT_VERSION} of {tables.meta.fullname}"
    return (
        f"a worker of an older version of the library was at work at {begun:%Y-%m-%d %H:%M} UTC, and beside triggers it can"
        " delete objects that rows have taken: deploy this version wherever journal.worker(), journal.recover() or"
        f" granite-storage recover runs. It counts as running until {over:%Y-%m-%d %H:%M} UTC. If you know that none is left,"
        f" run granite-storage recover with this version, then delete {row}"
    )


def require_current_workers(connection: Connection, tables: JournalTables) -> None:
    """Refuse to create triggers while a worker of an older version may run.

    Raises:
        ConfigurationError: One was at work lately.
    """
    found = find_older_worker(connection, tables)
    if found is not None:
        raise ConfigurationError(found, see=Page.TRIGGERS)


def _beats(tables: JournalTables) -> Select[*tuple[Any, ...]]:
    meta = tables.meta
    are_beats = (meta.c.name == _HEARTBEAT) | meta.c.name.startswith(_WORKER)
    return select(meta.c.name, meta.c.value, meta.c.changed, clock().label("now")).where(are_beats)


def _has_no_version(beats: Mapping[str, _Row]) -> bool:
    """Return whether a worker without a version has written the heartbeat."""
    last = beats.get(_HEARTBEAT)
    return last is not None and last.changed not in {row.changed for name, row in beats.items() if name != _HEARTBEAT}


def _version_of(name: str) -> int:
    version = name.removeprefix(_WORKER)
    return int(version) if version.isdigit() else WORKER_VERSION


async def find_gap(connection: AsyncConnection, tables: JournalTables) -> timedelta | None:
    """Return for how long no worker was at work, where that is noted or going on; None where all is well or none ever was."""
    noted = await _read(connection, tables, _GAP)
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


async def note_retentions(pool: JournalPool, tables: JournalTables, policies: Iterable[StoragePolicy]) -> None:
    """Note how long the objects of each policy wait, in seconds, for the triggers, which know no policies."""
    meta = tables.meta
    names = meta.c.name.startswith(RETENTION_PREFIX)
    wanted: dict[str, float] = {}
    for policy in policies:
        name = f"{RETENTION_PREFIX}{policy.storage_key}"[:LONGEST_META_NAME]
        wanted[name] = max(wanted.get(name, 0.0), policy.retention.total_seconds())
    async with pool.reading() as connection:
        known = {row.name: float(row.value) for row in await connection.execute(select(meta.c.name, meta.c.value).where(names))}
    changed = {name: seconds for name, seconds in wanted.items() if known.get(name) != seconds}
    if changed:
        async with pool.writing() as connection:
            await put_values(connection, tables, {name: f"{seconds:.6f}" for name, seconds in changed.items()}, clock())


async def find_sidecar(connection: AsyncConnection, tables: JournalTables) -> str | None:
    """Return the name of the sidecar that a database on SQLite names; see `granite_storage.orm.journal.sqlite`."""
    return await _read(connection, tables, SIDECAR_NAME)


async def has_beat(connection: AsyncConnection, tables: JournalTables) -> bool:
    """Return whether a worker was ever at work."""
    return await _last_beat(connection, tables) is not None


async def _read(connection: AsyncConnection, tables: JournalTables, name: str) -> str | None:
    """Return a value of `granite_storage_meta`."""
    meta = tables.meta
    return (await connection.execute(select(meta.c.value).where(meta.c.name == name))).scalar_one_or_none()


async def put_values(connection: AsyncConnection, tables: JournalTables, values: Mapping[str, str], changed: Any) -> None:
    """Set values of `granite_storage_meta`, in the order of their names, so that transactions do not deadlock.

    Args:
        connection: The connection of a transaction that writes.
        tables: The journal's tables.
        values: The values by their names.
        changed: When they have changed, as a moment or an expression.
    """
    statement = upsert_rows(
        connection.dialect.name, tables.meta, {"changed": changed}, lambda new: {"value": new.value, "changed": new.changed}
    )
    await connection.execute(statement, [{"name": name, "value": values[name]} for name in sorted(values)])


async def insert_if_absent(connection: AsyncConnection, tables: JournalTables, values: dict[str, Any]) -> None:
    """Insert a row of `granite_storage_meta`, unless there is one of its name."""
    try:
        async with connection.begin_nested():
            await connection.execute(insert(tables.meta).values(values))
    except IntegrityError:
        return


async def _last_beat(connection: AsyncConnection, tables: JournalTables) -> _Row | None:
    meta = tables.meta
    found = await connection.execute(select(meta.c.value, meta.c.changed, clock().label("now")).where(meta.c.name == _HEARTBEAT))
    return found.first()


def _silence(last: _Row) -> timedelta | None:
    """Return for how long there was no beat, where one is overdue, by the database's clock alone."""
    silence = in_utc(last.now) - in_utc(last.changed)
    return silence if silence > _longest_silence(last) else None


def _longest_silence(last: _Row) -> timedelta:
    expected = timedelta(seconds=float(last.value)) if last.value.isdigit() else timedelta(0)
    return max(_SHORTEST_GAP, _MISSED * expected)


# The schemas that an application's tables are in, where a `schema_translate_map` says so.
#
# The journal's own tables are in one place, whatever the map of a session: its statements go there by their own options.
# The tables that have attachments are wherever the connection of a session has them, another schema for each tenant
# perhaps; and the worker asks all of them before it deletes. So a transaction that writes into the journal first makes
# known, in the table `granite_storage_meta`, to which schemas its connection leads, once for each process. From then on
# every worker knows.


Translation: TypeAlias = tuple[tuple[str | None, str | None], ...]
"""The schemas that the models name, each with the one that it stands for."""

_PREFIX = "schemas:"
_DIGITS = 32


class KnownSchemas:
    """What this process knows to be known to all.

    Args:
        pool: The journal's own connections.
    """

    def __init__(self, pool: JournalPool) -> None:
        self._pool = pool
        self._known: set[Translation] = set()

    def make_known(self, connection: Connection, tables: JournalTables, columns: Callable[[], Sequence[Column[Any]]]) -> None:
        """Make known to workers where the tables are that a session's connection leads to; durably, before it commits.

        Args:
            connection: The connection of the session.
            tables: The journal's tables.
            columns: Returns the columns of the models.
        """
        mapping = connection.get_execution_options().get(TRANSLATE_MAP) or {}
        if mapping == self._pool.translate_map:
            return
        named = {column.table.schema for column in columns()}
        translation = _translation(named, mapping)
        if translation == _translation(named, self._pool.translate_map) or translation in self._known:
            return
        wait(self._write(tables, translation))
        self._known.add(translation)

    async def _write(self, tables: JournalTables, translation: Translation) -> None:
        if self._pool.dialect == "sqlite":
            raise ConfigurationError(
                "on SQLite a session's schema_translate_map must be that of the engine that was passed to StorageJournal: "
                "schemas are separate files there, across which no transaction is atomic",
                see=Page.JOURNAL_ON_SQLITE,
            )
        value = json.dumps(translation)
        name = f"{_PREFIX}{sha256(value.encode()).hexdigest()[:_DIGITS]}"
        async with self._pool.durable() as connection:
            await insert_if_absent(connection, tables, {"name": name, "value": value, "changed": clock()})


async def read_translations(connection: AsyncConnection, tables: JournalTables) -> list[Mapping[str | None, str | None]]:
    """Return every translation that a transaction has made known."""
    meta = tables.meta
    found = await connection.execute(select(meta.c.value).where(meta.c.name.startswith(_PREFIX)).order_by(meta.c.name))
    return [dict(json.loads(value)) for value in found.scalars()]


def effective(schema: str | None, mapping: Mapping[str | None, str | None]) -> str | None:
    """Return the schema that one named in a model stands for."""
    return mapping.get(schema, schema)


def _translation(named: Iterable[str | None], mapping: Mapping[str | None, str | None]) -> Translation:
    return tuple((schema, effective(schema, mapping)) for schema in sorted(named, key=str))


# Refusing at start-up what could not keep the promise.


_OLDEST_MARIADB = (10, 6)
_WITHOUT_JOBS = "1"
"""The version of the tables before there were jobs and variants."""


async def check_database(pool: JournalPool, tables: JournalTables, others: list[Table], *, has_jobs: bool) -> None:
    """Refuse tables, storage engines and settings of the database with which the journal could not keep its promise.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        others: The tables of the application that have attachments.
        has_jobs: Whether jobs are recorded from now on, of which processes with version 1 of the tables know nothing.

    Raises:
        ConfigurationError: The message says what to do.
    """
    await pool.require_fit(tables, others)
    for table in tables.all:
        try:
            await _check_table(pool, table)
        except ConfigurationError as error:
            if await _is_of_version_1(pool, tables):
                raise ConfigurationError(
                    f"the journal's tables are of version {_WITHOUT_JOBS}, without {tables.job.name} and the columns 'source' of"
                    f" {tables.intent.name} and {tables.reclaim.name}, and this library works with version {SCHEMA_VERSION}: add"
                    " them, by a migration that Alembic's --autogenerate writes, or by upgrade_journal_tables(op) where"
                    " create_journal_tables(op) has made the tables. They do not disturb processes of the earlier version",
                    see=Page.ALEMBIC,
                ) from error
            raise
    await _check_version(pool, tables, has_jobs=has_jobs)
    await pool.open()


async def _is_of_version_1(pool: JournalPool, tables: JournalTables) -> bool:
    try:
        return await _read_version(pool, tables) == _WITHOUT_JOBS
    except (ConfigurationError, DBAPIError):
        return False


async def _check_table(pool: JournalPool, table: Table) -> None:
    """See that a table is there with its columns, and may be written to."""
    nothing = table.delete().where(text("1 = 0"))
    async with pool.reading() as connection:
        try:
            await connection.execute(select(table).limit(0))
            if pool.dialect == "sqlite":  # a write would wait for the lock, which the caller's own session may have
                return
            await connection.execute(nothing)
            await connection.execute(insert(table).from_select(list(table.c.keys()), select(table).where(text("1 = 0"))))
        except DBAPIError as error:
            schema = effective(table.schema, pool.translate_map)
            name = f"{schema}.{table.name}" if schema else table.name
            problem = f"the journal's table {name} is missing or is of another version: {error.orig}"
            if (denied := explain_denied(error, pool.role)) is not None:
                if pool.dialect == "postgresql" or not schema:
                    raise denied from error.orig
                problem = f"{denied}; or {name} is missing, which MariaDB reports alike where the role may not use the schema"
            raise _refuse(
                f"{problem}. Create it with the models' own (Base.metadata.create_all or a migration) after"
                " journal_tables(Base.metadata). Sessions with a schema_translate_map of their own share one set of the"
                " journal's tables: it is where the engine that was passed to StorageJournal finds it, with that engine's map"
                " if it has one, or in journal_tables(Base.metadata, schema=...)"
            ) from error


async def _check_version(pool: JournalPool, tables: JournalTables, *, has_jobs: bool) -> None:
    """See that the tables are of this version; those of version 1 are where the table that it lacks is there.

    So processes of both versions can work side by side. They are recorded as this version, which the earlier one refuses, once
    there may be jobs.
    """
    meta = tables.meta
    found = await _read_version(pool, tables)
    if found is None or (has_jobs and found == _WITHOUT_JOBS):
        async with pool.durable() as connection:
            await insert_if_absent(connection, tables, {"name": VERSION_NAME, "value": str(SCHEMA_VERSION), "changed": clock()})
            if has_jobs:
                is_older = (meta.c.name == VERSION_NAME) & (meta.c.value == _WITHOUT_JOBS)
                await connection.execute(meta.update().where(is_older).values(value=str(SCHEMA_VERSION), changed=clock()))
        found = await _read_version(pool, tables)
    if found not in (str(SCHEMA_VERSION), _WITHOUT_JOBS):
        raise ConfigurationError(
            f"the journal's tables are of version {found}, and this library works with version {SCHEMA_VERSION}:"
            " run the migrations of the library's version, or install the version of the library that made them",
            see=Page.ALEMBIC,
        )


async def _read_version(pool: JournalPool, tables: JournalTables) -> str | None:
    async with pool.reading() as connection:
        return await _read(connection, tables, VERSION_NAME)


async def _check_mariadb(connection: AsyncConnection, tables: list[tuple[str | None, str]]) -> None:
    version = (await connection.execute(text("SELECT VERSION()"))).scalar_one()
    numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    if "mariadb" not in version.lower():
        raise _refuse(f"the journal supports MariaDB, but this is MySQL {version}: leave journal=... out")
    if numbers < _OLDEST_MARIADB:
        raise _refuse(f"the journal needs MariaDB 10.6 or newer, which has SKIP LOCKED, but this is {version}")
    if (await connection.execute(text("SELECT @@innodb_flush_log_at_trx_commit"))).scalar_one() != 1:
        raise _refuse("with innodb_flush_log_at_trx_commit other than 1 a crash undoes committed transactions: set it to 1")
    level = (await connection.execute(text("SELECT @@global.tx_isolation"))).scalar_one()
    if level == "READ-UNCOMMITTED":
        raise _refuse("at READ UNCOMMITTED the journal can miss its own rows: set another isolation level")
    await _check_engines(connection, tables)


async def _check_engines(connection: AsyncConnection, tables: list[tuple[str | None, str]]) -> None:
    """Refuse tables whose engine knows no transactions, such as MyISAM and Aria."""
    found = await connection.execute(
        text(
            "SELECT table_schema, table_schema = DATABASE(), table_name, engine FROM information_schema.tables"
            " WHERE table_name IN :names AND engine <> 'InnoDB'"
        ).bindparams(bindparam("names", expanding=True)),
        {"names": sorted({name for _, name in tables})},
    )
    wrong = [
        f"{name} ({engine})"
        for schema, is_default, name, engine in found
        if (schema, name) in tables or (is_default and (None, name) in tables)
    ]
    if wrong:
        raise _refuse(
            f"the journal needs InnoDB, and these tables have another engine: {', '.join(wrong)};"
            " change them with ALTER TABLE ... ENGINE=InnoDB"
        )
