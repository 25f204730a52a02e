"""The journal on SQLite: the intents of uploads are in a file of their own, the sidecar, and all else in the rows' database.

While a session writes, no other connection can write to its database. So the intents of uploads, which must be committed in a
flush, are in a second file beside it. What must be true together with the rows is in their database and their transaction:
intents to delete, their fences, and jobs. No transaction spans both files.

Why it is safe. The rows' database has one lock of writers. A transaction that writes a ref looks for the intent of the upload
after it has this lock, and keeps the lock until it ends. It does not consume the intent, because the committed row decides. A
worker fences the intent in the sidecar, and then looks with the same lock for rows that refer to the object. So either the worker
sees the row, or the transaction sees the fence. An object that has an intent to delete, or a fence, in the rows' database is left
to those: an undo may bring it back.

With `synchronous=NORMAL` a power loss may take commits of the application back. What a worker has seen is made durable by a write
of its own at `synchronous=EXTRA` (https://www.sqlite.org/pragma.html#pragma_synchronous) before it acts on it. So the intent also
outlives the COMMIT of its row, until its lease is over. The sidecar is in WAL mode at FULL, where no commit is lost.

The sidecar has a random name, and the rows' database says which one counts. Where the file is lost or replaced, even under
running processes, the uploads that the old one knew of can no longer be committed once a new one is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar
from uuid import UUID, uuid4
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, MetaData, Row, Select, create_engine, event, false, null, select, union_all
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.pool import QueuePool
from sqlalchemy.schema import CreateIndex, CreateTable

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError, StorageError
from granite_storage.orm._faults import damaged_sidecar, explain_missing, explain_sidecar
from granite_storage.orm._threaded import as_async_engine
from granite_storage.orm._util import batches, file_of, is_busy, wait, without_pool
from granite_storage.orm.journal.database import Engines, JournalPool, effective, has_beat
from granite_storage.orm.journal.references import OF_FENCES, References
from granite_storage.orm.journal.tables import SIDECAR_NAME, UPLOAD, clock, journal_tables

if TYPE_CHECKING:
    from sqlalchemy import Column, CompoundSelect, Connection, Insert, Table
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

    from granite_storage.orm._interfaces import JournalTables

__all__ = ["SQLitePool", "SidecarPool", "SidecarReferences"]

T = TypeVar("T")

_SUFFIX: Final = "-granite_storage"
_BARRIER: Final = "barrier"
_TABLES: Final = journal_tables(MetaData())
"""The journal's tables as both files have them; the sidecar uses those of intents, of fences, and `granite_storage_meta`."""
_DIALECT: Final = sqlite.dialect(paramstyle="qmark")

_BUSY_MILLISECONDS = 200
_PATIENCE = 30.0
_LONGEST_PAUSE = 0.02
_BATCH = 20
"""The most objects for which rows are looked through while the lock of writers is held."""

_BATCH_SIZE = 500
_OF_CONNECTION: Final = "granite_storage.file"
_NETWORK_KINDS = frozenset(
    {
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"),
        *("fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
        *("ocfs2", "orangefs", "smb2", "smb3", "smbfs"),
    }
)
"""As `/proc/self/mountinfo` names them."""


class _LockingPool(JournalPool):
    """Connections whose transactions say whether they write, and get the write lock before they read anything."""

    @property
    def dialect(self) -> str:
        """The name of the database."""
        return "sqlite"

    @property
    def batch_size(self) -> int:
        """How many intents are processed together at most."""
        return _BATCH

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in a transaction that sees one moment, and must not write."""
        async with self._in_time(), AsyncExitStack() as stack:
            yield await self._begin(stack, "BEGIN")

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection in a transaction that has the write lock, and is durable once it is committed."""
        async with self._in_time(), AsyncExitStack() as stack:
            connection = await self._begin(stack, "BEGIN IMMEDIATE")
            yield connection
            await self._commit(connection)

    def durable(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Do as `writing`."""
        return self.writing()

    async def may_find(self, statement: Select[Any] | CompoundSelect[Any]) -> bool:
        """Return whether a statement finds something now."""
        async with self.reading() as connection:
            return (await connection.execute(statement.limit(1))).first() is not None

    async def _begin(self, stack: AsyncExitStack, statement: str) -> AsyncConnection:
        """Begin a transaction that ends with a stack; try again while another connection has the lock."""

        async def begin() -> AsyncConnection:
            async with AsyncExitStack() as attempt:
                connection = await attempt.enter_async_context(self._engine.begin())
                await connection.run_sync(_begin, statement)
                stack.push_async_exit(attempt.pop_all())
                return connection

        return await self._try_while_busy(begin)

    async def _commit(self, connection: AsyncConnection) -> None:
        """Commit; try again where readers hold it up, as in rollback mode: the transaction stays open with its lock."""
        try:
            await self._try_while_busy(partial(connection.run_sync, _commit))
        except sqlite3.Error as error:
            if (fault := self._explain_fault(error)) is None:
                raise
            raise fault from error

    async def _try_while_busy(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do some work, again while another connection has the lock and there is time."""
        until = time.monotonic() + self._patience
        while True:
            try:
                return await work()
            except (DBAPIError, sqlite3.OperationalError) as error:
                if not is_busy(error.orig if isinstance(error, DBAPIError) else error):
                    raise
                if time.monotonic() >= until:
                    raise TimeoutError from error
            await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311  # not a secret

    @property
    def _patience(self) -> float:
        return _PATIENCE if self._timeout is None else self._timeout

    def _describe_timeout(self) -> str:
        return (
            f"the SQLite database was locked for {self._patience:g} s, so nothing is stored: another transaction that writes"
            " lasts that long, or it is the session's own and the journal is only being opened now. Let transactions be short,"
            " and await journal.check() when the application starts"
        )


def _begin(connection: Connection, statement: str) -> None:
    if _driver(connection).in_transaction:  # a driver with autocommit=False begins by itself
        connection.exec_driver_sql("ROLLBACK")
    connection.exec_driver_sql(statement)


def _try_to_lock(connection: Connection) -> bool:
    """Take the write lock if no other connection has it; return whether it was taken.

    Raises:
        ConfigurationError: The database is read-only.
    """
    connection.exec_driver_sql("PRAGMA busy_timeout = 0")
    try:
        _begin(connection, "BEGIN IMMEDIATE")
        connection.execute(_TABLES.meta.delete().where(false()))  # BEGIN alone does not fail if the database is read-only
    except DBAPIError as error:
        if is_busy(error.orig):
            return False
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_READONLY:
            raise _refuse(
                f"it cannot be written to ({error.orig}): leave mode=ro and immutable=1 out of the URL, and let the application's"
                " user write to the file and to its folder"
            ) from error
        if explain_missing(error) is None:  # which is refused later
            raise
    return True


def _commit(connection: Connection) -> None:
    connection.dialect.do_commit(connection.connection)


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


def _put(name: str, value: str) -> Insert:
    """Return the statement that sets a value of `granite_storage_meta`."""
    new = insert(_TABLES.meta).values(name=name, value=value, changed=clock())
    return new.on_conflict_do_update(index_elements=["name"], set_={"value": new.excluded.value, "changed": new.excluded.changed})


_NAME_OF_SIDECAR: Final = select(_TABLES.meta.c.value).where(_TABLES.meta.c.name == SIDECAR_NAME)


# The rows' database.


@dataclass(slots=True)
class _Known:
    """What is known of the rows' database: its path, and the settings of the application's connections."""

    path: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class SQLitePool(_LockingPool):
    """The connections to the rows' database, and the sidecar.

    Args:
        engine: The application's engine.
        size: The most connections to each of the files.
        sidecar: The path of the sidecar; None for beside the database.
        one_machine: Whether the caller has said that one machine alone uses the files, which may be on a network file system.

    Raises:
        ConfigurationError: The database is in memory, or its connections share a cache.
    """

    def __init__(
        self, engine: AsyncEngine | Engine, size: int, *, sidecar: str | os.PathLike[str] | None, one_machine: bool
    ) -> None:
        super().__init__(engine, size)
        url = self._outer.url
        asked = f"{url.database or ':memory:'} {' '.join(f'{name}={value}' for name, value in url.query.items())}"
        if ":memory:" in asked or "mode=memory" in asked:
            raise _refuse("a database in memory has no second connection: use a file")
        if "cache=shared" in asked:
            raise _refuse("connections that share a cache do not lock each other out: leave cache=shared out of the URL")
        self._one_machine = one_machine
        self._known = _Known()
        self._sidecar = SidecarPool(self, size, sidecar)

    @property
    def uploads(self) -> SidecarPool:
        """The sidecar."""
        return self._sidecar

    def upload_tables(self, tables: JournalTables) -> JournalTables:
        """Return the sidecar's tables."""
        return _TABLES

    def within(self, seconds: float) -> Self:
        """Return the same pool for callers that hold a connection already; so is its sidecar."""
        bounded = super().within(seconds)
        bounded._sidecar = self._sidecar.of(bounded)
        return bounded

    def deciding(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Do as `writing`: no session is between its look at an intent and its COMMIT."""
        return self.writing()

    async def make_durable(self, connection: AsyncConnection) -> None:
        """Write something: a COMMIT without a write brings nothing to the disk."""
        await connection.execute(_put(_BARRIER, ""))

    async def path(self) -> str:
        """Return the path of the database.

        Raises:
            ConfigurationError: It has no file.
        """
        if self._known.path is None:
            async with self.reading() as connection:
                found = await connection.run_sync(file_of)
            self._known.path = await asyncio.to_thread(os.path.realpath, found) if found else ""
        if not self._known.path:
            raise _refuse("the database has no file: use one")
        return self._known.path

    async def require_fit(self, tables: JournalTables, others: Sequence[Table]) -> None:
        """Refuse a database or settings with which a committed transaction may be lost or torn, or locks do not hold."""
        path, settings = await self.path(), self._known.settings
        if settings["synchronous"] == 0:
            raise _refuse("with synchronous=OFF a crash of the machine damages the database: set NORMAL or FULL")
        if settings["journal_mode"] in ("off", "memory"):
            raise _refuse(
                f"with journal_mode={settings['journal_mode'].upper()} a crash in a transaction damages the database: set WAL or"
                " DELETE"
            )
        if settings["locking_mode"] == "exclusive":
            raise _refuse("with locking_mode=EXCLUSIVE no second connection can read: set NORMAL")
        attached = {effective(table.schema, self.translate_map) for table in (*tables.all, *others)} - {None, "main"}
        if attached:
            raise _refuse(
                f"tables of attached databases ({', '.join(sorted(map(str, attached)))}) are in separate files, across which "
                "no transaction is atomic: keep the rows with files, and the journal, in the main database"
            )
        await self._require_local(path)
        await self._require_lock()

    async def _require_lock(self) -> None:
        """Refuse a database that cannot be written to, or that two connections can write to at once.

        Where the lock is taken already, as by the caller's own session, it is one that excludes.
        """
        engine = as_async_engine(without_pool(self._outer))
        async with self._in_time(), AsyncExitStack() as stack:
            stack.push_async_callback(engine.dispose)
            locked = []
            for _ in range(2):
                connection = await engine.connect()
                stack.push_async_callback(connection.close)
                locked.append(await connection.run_sync(_try_to_lock))
            if all(locked):
                raise _refuse(
                    "its lock does not keep a second connection from writing, so commits damage each other: leave nolock=1,"
                    " and the name of a VFS without locks, such as vfs=unix-none, out of the URL"
                )

    async def _require_local(self, path: str) -> None:
        if not self._one_machine and (kind := await asyncio.to_thread(_network_file_system, path)) is not None:
            raise _refuse(
                f"{path} is on a network file system ({kind}), where the locks of SQLite may not hold: move it to a local disk,"
                " or pass StorageJournal(..., one_machine=True) if one machine alone uses it and its locks hold there"
            )

    async def open(self) -> None:
        """Create the sidecar if it is not there, and name it in the database."""
        await self._require_local(await self._sidecar.open())

    async def name(self, sidecar: _Opened) -> None:
        """Name a sidecar in the database, durably; from then on the intents of any other are void."""
        async with self.reading() as connection:
            if (await connection.execute(_NAME_OF_SIDECAR)).scalar_one_or_none() == sidecar.name:
                return
        async with self.writing() as connection:
            if await asyncio.to_thread(sidecar.is_there):
                await connection.execute(_put(SIDECAR_NAME, sidecar.name))

    async def forget_uploads(self, locations: Sequence[str]) -> None:
        """Delete the intents of uploads from the sidecar whose objects are gone: they would say that those are there."""
        intent = self._sidecar.tables.intent
        gone = intent.c.location.in_(locations) & (intent.c.kind == UPLOAD)
        if await self._sidecar.may_find(select(intent.c.id).where(gone)):
            async with self._sidecar.writing() as connection:
                await connection.execute(intent.delete().where(gone))

    async def has_displaced(self, tables: JournalTables, location: str) -> bool:
        """Return whether an object has an intent to delete or a fence here."""
        found = [select(table.c.id).where(table.c.location == location) for table in (tables.intent, tables.reclaim)]
        return await self.may_find(union_all(*found))

    def require_here(self, connection: Connection) -> None:
        """Refuse the transaction of a session on another file."""
        info = connection.info
        if _OF_CONNECTION not in info:
            found = file_of(connection)
            info[_OF_CONNECTION] = wait(asyncio.to_thread(os.path.realpath, found)) if found else ""
        own = self._known.path or wait(self.path())
        if info[_OF_CONNECTION] != own:
            raise ConfigurationError(
                f"the session is on the database {info[_OF_CONNECTION] or ':memory:'}, and the journal's engine on {own}: give"
                " each database a journal",
                see=Page.JOURNAL_ON_SQLITE,
            )

    def sees_uploads(self, connection: Connection, ids: set[UUID]) -> bool:
        """Return whether uploads are pending in the sidecar that the database names; with the lock of writers.

        An intent that is not there is as good as a fenced one, because a worker forgets what it has done.

        Raises:
            ConfigurationError: The driver commits each statement, so that nothing is locked.
        """
        if not _driver(connection).in_transaction:
            raise ConfigurationError(
                "the driver commits each statement by itself (isolation_level=None), so no rollback can restore rows: "
                "begin transactions with BEGIN IMMEDIATE, by the recipe on the page SQLAlchemy, section SQLite",
                see=Page.JOURNAL_ON_SQLITE,
            )
        named = connection.execute(_NAME_OF_SIDECAR, execution_options=self.options).scalar_one_or_none()
        name, pending = wait(self._sidecar.look(ids))
        if name != named:
            self._sidecar.doubt()
        return name == named and ids <= pending

    async def aclose(self) -> None:
        """Close the connections to both files."""
        await super().aclose()
        await self._sidecar.aclose()

    def dispose(self) -> None:
        """Close the connections to both files from within an event of SQLAlchemy."""
        super().dispose()
        self._sidecar.dispose()

    def _bring_events(self, inner: Engine) -> None:
        """Leave the application's events out: where they BEGIN IMMEDIATE, each read would wait for the session's own lock."""

    def _on_connect(self, connection: Any, _: Any) -> None:
        self._open_pools.add(self)
        cursor = connection.cursor()
        try:
            cursor.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
            for name in ("synchronous", "journal_mode", "locking_mode"):  # as the application's listeners have set them
                cursor.execute(f"PRAGMA {name}")
                self._known.settings[name] = cursor.fetchone()[0]
            cursor.execute("PRAGMA synchronous = EXTRA")
        finally:
            cursor.close()


def _refuse(why: str) -> ConfigurationError:
    return ConfigurationError(f"this SQLite database cannot have a journal: {why}", see=Page.JOURNAL_ON_SQLITE)


def _network_file_system(path: str) -> str | None:
    """Return the kind of the network file system that a file is on; None for another one, or where Linux does not tell it."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    device, found = os.stat(path).st_dev, None
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        fields, _, described = line.partition(" - ")
        if fields.split()[2] == number:
            found = described.split()[0]
    return found if found in _NETWORK_KINDS else None


# The sidecar.


@dataclass(frozen=True, slots=True)
class _Opened:
    """The file that a connection has open."""

    path: str
    identity: tuple[int, int]
    name: str

    def is_there(self) -> bool:
        """Return whether it is still the one at its path."""
        with contextlib.suppress(FileNotFoundError):
            return _identity(self.path) == self.identity
        return False


@dataclass(slots=True)
class _File:
    """What the pools of one sidecar share: its path, and the name that the rows' database has confirmed."""

    path: str | None = None
    named: str | None = None


class SidecarPool(_LockingPool):
    """The connections to the sidecar, each in a thread of its own while it is used.

    Nothing waits for the rows' database while it has a transaction open here.

    Args:
        main: The connections to the rows' database.
        size: The most connections.
        path: Where the file is; None for beside the database.
    """

    tables: JournalTables = _TABLES

    def __init__(self, main: SQLitePool, size: int, path: str | os.PathLike[str] | None) -> None:
        self.translate_map: Mapping[str | None, str | None] = {}
        self._size = size
        self._timeout: float | None = None
        self._places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._main = main
        self._given = path
        self._file = _File()
        self._engines = Engines(self._new_engine)
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, main: SQLitePool) -> SidecarPool:
        """Return the same pool, with the time limit of the connections to the rows' database."""
        bounded = self.within(main._patience)
        bounded._main = main
        return bounded

    async def open(self) -> str:
        """Create the file if it is not there, let the rows' database name it, and return its path."""
        async with AsyncExitStack() as stack:
            opened = _opened(await self._begin_unnamed(stack, "BEGIN"))
        await self._main.name(opened)
        self._file.named = opened.name
        return opened.path

    def doubt(self) -> None:
        """Ask the rows' database again whether it names this sidecar, before the next intent."""
        self._file.named = None

    async def look(self, ids: Iterable[UUID]) -> tuple[str, set[UUID]]:
        """Return the name of the sidecar, and which of these uploads are pending in it."""
        intent, pending = self.tables.intent, set[UUID]()
        async with self.looking() as (name, connection):
            for batch in batches(ids, _BATCH_SIZE):
                found = select(intent.c.id).where(intent.c.id.in_(batch), intent.c.kind == UPLOAD)
                pending.update((await connection.execute(found)).scalars())
        return name, pending

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[tuple[str, AsyncConnection]]:
        """Yield the name of the sidecar, whether it counts or not, and a connection that sees one moment of it."""
        async with self._in_time(), AsyncExitStack() as stack:
            connection = await self._begin_unnamed(stack, "BEGIN")
            yield _opened(connection).name, connection

    async def require_beat(
        self, main: AsyncConnection, tables: JournalTables, error: type[StorageError] = ConfigurationError
    ) -> None:
        """Refuse a database in which no worker ever ran, if one ran with the sidecar: its rows are elsewhere.

        Args:
            main: A connection to the database.
            tables: The journal's tables there.
            error: The class of the error.
        """
        async with self.looking() as (_, connection):
            is_known = await has_beat(connection, self.tables)
        if is_known and not await has_beat(main, tables):
            raise error(
                "no worker has ever run in this database, but one has with the sidecar beside it: the database was lost or"
                " replaced, or the journal's tables were dropped and created again. Restore it, or confirm that it is the right"
                " one: await journal.allow_restored_database()"
            )

    @asynccontextmanager
    async def fencing(self) -> AsyncIterator[AsyncConnection]:
        """Yield a connection that fences uploads, while no session is between its look at them and its COMMIT."""
        await self.open()
        async with self._main.writing() as main:
            # What a flush has recorded for the triggers, and has committed because an error kept it from deleting that.
            if (await main.execute(select(_TABLES.decision.c.outcome).limit(1))).first() is not None:
                await main.execute(_TABLES.decision.delete())
            async with self.writing() as connection:
                yield connection

    def _explain_fault(self, error: BaseException) -> StorageError | None:
        path = str(self._file.path)
        return explain_missing(error, sidecar=path) or explain_sidecar(error, path)

    async def _begin(self, stack: AsyncExitStack, statement: str) -> AsyncConnection:
        while True:
            async with AsyncExitStack() as attempt:
                connection = await self._begin_unnamed(attempt, statement)
                if _opened(connection).name == self._file.named:
                    stack.push_async_exit(attempt.pop_all())
                    return connection
            await self.open()

    async def _begin_unnamed(self, stack: AsyncExitStack, statement: str) -> AsyncConnection:
        """Begin a transaction in the file that is there, whether the rows' database names it or not."""
        if self._file.path is None:
            path = self._given or f"{await self._main.path()}{_SUFFIX}"
            self._file.path = await asyncio.to_thread(os.path.abspath, os.fspath(path))
        return await super()._begin(stack, statement)

    def _new_engine(self) -> AsyncEngine:
        options = {"poolclass": QueuePool, "pool_size": self._size, "max_overflow": 0, "hide_parameters": True}
        engine = create_engine("sqlite://", creator=self._connect, **options)
        event.listen(engine, "checkout", _on_checkout)
        return as_async_engine(engine)

    def _connect(self) -> _SidecarConnection:
        """Open the file in a thread, and create it if it is not there.

        Raises:
            ConfigurationError: It cannot be created there, or is damaged.
            BackendUnavailableError: The disk is full.
        """
        path = str(self._file.path)
        while True:
            try:
                before = _create(path, like=self._main._known.path)
                connection = sqlite3.connect(
                    path, timeout=_BUSY_MILLISECONDS / 1000, check_same_thread=False, factory=_SidecarConnection
                )
                with contextlib.ExitStack() as stack:
                    stack.callback(connection.close)
                    connection.isolation_level = None
                    connection.opened = _Opened(path, before, _prepare(connection))
                    if connection.opened.is_there():
                        stack.pop_all()
                        return connection
                    # It was replaced meanwhile.
            except (OSError, sqlite3.Error) as error:
                if isinstance(error, sqlite3.Error) and is_busy(error):
                    raise
                raise explain_sidecar(error, path) or damaged_sidecar(error, path) from error

    async def aclose(self) -> None:
        """Close the connections; idempotent, and a later call opens new ones."""
        await self._engines.aclose()


class _SidecarConnection(sqlite3.Connection):
    """A connection of the driver that knows which file it has open."""

    opened: _Opened


def _opened(connection: AsyncConnection) -> _Opened:
    found: _Opened = _driver(connection.sync_connection).opened  # type: ignore[arg-type]  # it is open
    return found


def _on_checkout(connection: Any, _: Any, __: Any) -> None:
    if not connection.opened.is_there():
        raise DisconnectionError("the file is missing or was replaced")


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _create(path: str, *, like: str | None) -> tuple[int, int]:
    """Create an empty file with the permissions of another one unless there is one; return its identity."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            if like:
                os.fchmod(descriptor, os.stat(like).st_mode & 0o666)
        finally:
            os.close(descriptor)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return _identity(path)


def _prepare(connection: sqlite3.Connection) -> str:
    """Set a connection up, create the tables and the name if they are not there, and return the name."""
    if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        raise OSError("it cannot be in WAL mode there")
    connection.execute("PRAGMA synchronous = FULL")
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (_TABLES.meta.name,)).fetchone() is None:
        connection.execute("BEGIN IMMEDIATE")
        for table in _TABLES.all:
            connection.execute(_sql(CreateTable(table, if_not_exists=True)))
            for index in table.indexes:
                connection.execute(_sql(CreateIndex(index, if_not_exists=True)))
        new = f"INSERT OR IGNORE INTO {_TABLES.meta.name} (name, value, changed) VALUES (?, ?, ?)"  # noqa: S608  # ours
        connection.execute(new, (SIDECAR_NAME, uuid4().hex, "2000-01-01 00:00:00.000000"))
        connection.execute("COMMIT")
    found = connection.execute(_sql(_NAME_OF_SIDECAR), (SIDECAR_NAME,)).fetchone()
    if found is None:
        raise sqlite3.DatabaseError("it has no name, so something else has written to it")
    return str(found[0])


def _sql(statement: Any) -> str:
    return str(statement.compile(dialect=_DIALECT))


# What a worker asks before it deletes the object of an upload.


class SidecarReferences(References):
    """Finds references to the objects of uploads, and what the rows' database knows of them otherwise.

    Args:
        pool: The journal's own connections to the rows' database.
        tables: The journal's tables there.
        columns: Every column of the journal's own bases that may refer to an object.
        others: Those of all other bases.
    """

    def __init__(
        self, pool: SQLitePool, tables: JournalTables, columns: Sequence[Column[Any]], others: Sequence[Column[Any]] = ()
    ) -> None:
        super().__init__(pool, tables, columns, others)
        self._sidecar = pool.uploads

    async def check(self, fenced: Iterable[Any], objects: Mapping[str, str | None]) -> tuple[list[Row[Any]], set[str]]:
        """Return rows of the sidecar's `reclaim`, and which objects are not for the sidecar's worker to delete.

        Those are the objects that rows refer to, and those that have an intent to delete or a fence in the rows' database. All of
        it is seen with the lock of writers, and becomes durable before this returns. Where there is none, there is nothing to
        make durable: what had a row once has an intent to delete, until a worker that has seen to that deletes it.

        Raises:
            ConfigurationError: No worker ever ran in this database, but one ran with this sidecar: its rows are elsewhere.
        """
        own: list[Any] = []
        wanted = list(fenced)

        @asynccontextmanager
        async def deciding() -> AsyncIterator[AsyncConnection]:
            async with self._pool.deciding() as connection:
                own[:] = await self._read_own(connection, wanted)
                yield connection

        nothing = [null().label(name) for name in OF_FENCES]
        known = [
            select(*nothing, table.c.location, null().label("variants")).where(table.c.location.in_(objects))
            for table in (self._tables.intent, self._tables.reclaim)
        ]
        referenced = self._locations_in(await self._rows(known, objects, deciding))
        return own, referenced

    async def _read_own(self, main: AsyncConnection, wanted: Sequence[UUID]) -> list[Any]:
        reclaim = self._sidecar.tables.reclaim
        await self._sidecar.require_beat(main, self._tables)
        async with self._sidecar.looking() as (_, connection):
            seen = select(*(reclaim.c[name] for name in OF_FENCES)).where(reclaim.c.id.in_(wanted))
            return list(await connection.execute(seen))
