"""Helpers around SQLAlchemy: greenlets, batches, engines with options, and retries after a deadlock."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache, wraps
from itertools import islice
from typing import Any, Final, ParamSpec, TypeVar

from greenlet import getcurrent
from sqlalchemy import CTE, Connection, CursorResult, Engine, Executable, Insert, Table, Update, event, insert, text
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.event.attr import _ListenerCollection
from sqlalchemy.exc import DBAPIError, MissingGreenlet
from sqlalchemy.ext.asyncio import AsyncConnection, async_session
from sqlalchemy.orm import FromStatement, InstanceState, ORMExecuteState, Session
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from granite_storage._portal import has_running_loop, portal

logger: logging.Logger = logging.getLogger("granite_storage")

T = TypeVar("T")
K = TypeVar("K")

TRANSLATE_MAP: Final = "schema_translate_map"
"""The name of SQLAlchemy's option."""

UNTRANSLATED: Final = {TRANSLATE_MAP: None}
"""Options of a statement that names no table of a model: SQLAlchemy compiles one for one set of a map's keys only."""

SYNCHRONOUS: Final = text("SET LOCAL synchronous_commit = on")
"""Has PostgreSQL wait until a COMMIT is on its disk."""

_BARRIER: Final = text("SELECT pg_logical_emit_message(true, 'granite_storage', 'barrier')")


def in_greenlet() -> bool:
    """Return whether the code runs below an `await` of SQLAlchemy's asyncio layer."""
    return bool(getattr(getcurrent(), "__sqlalchemy_greenlet_provider__", False))


def can_wait(*, is_async: bool) -> bool:
    """Return whether an event of SQLAlchemy can wait for a coroutine.

    Args:
        is_async: Whether the session or connection is that of an asynchronous engine, which waits by an `await` of its caller.
    """
    return in_greenlet() or not (is_async or portal.is_here)


def wait(work: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine in an event of SQLAlchemy: by its caller's `await`, or in the thread of a synchronous session."""
    if in_greenlet():
        return await_only(work)
    if has_running_loop():
        _warn_of_blocked_loop()
    return portal.run(work)


@cache  # once for each process
def _warn_of_blocked_loop() -> None:
    logger.warning(
        "a synchronous Session blocks the event loop of its thread while it waits for the storage: use an AsyncSession there, "
        "or run the session in a thread, as a 'def' endpoint does"
    )


def require_wait(what: str, session: Session) -> None:
    """Refuse to wait for the storage where nothing can be awaited, before anything has happened.

    Args:
        what: What needs it.
        session: The session.

    Raises:
        MissingGreenlet: The session is that of an `AsyncSession`, but works without an `await`: an attribute that is loaded when
            it is read flushes before.
    """
    if not in_greenlet() and is_async(session):
        raise MissingGreenlet(
            f"{what} awaits the storage, but the AsyncSession was used without an await, such as by reading an expired or "
            "unloaded attribute, which flushes before it loads: await session.flush() or session.refresh(...) first",
            code="xd2s",
        )


def is_async(session: Session) -> bool:
    """Return whether a session is that of an `AsyncSession`."""
    return async_session(session) is not None


@contextmanager
def deferred_cancellation() -> Iterator[None]:
    """Postpone a cancellation to the task's next await, where it interrupts no work that must be completed."""
    try:
        yield
    except asyncio.CancelledError:  # which a synchronous session's thread never sees
        task = asyncio.current_task()
        if task is None:
            raise
        task.uncancel()
        task.cancel()


# Batches that fit into a statement, and groups.


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def group(items: Iterable[T], by: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the items in lists by what a function returns for them, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(by(item), []).append(item)
    return groups


# Statements that insert rows. SQLAlchemy caches no compiled form of an INSERT whose rows are in `values()`, and compiling takes
# longer than executing. So a statement is made once for each table, and the rows are its parameters.


def insert_rows(dialect: str, table: Table, values: Mapping[str, Any]) -> Insert:
    """Return the INSERT of rows that are passed as the parameters of its execution.

    Args:
        dialect: The name of the database.
        table: The table.
        values: The values that all rows have, and expressions of parameters.
    """
    return _in_one_statement(dialect, table, insert(table).values(values))


def upsert_rows(dialect: str, table: Table, values: Mapping[str, Any], renewed: Callable[[Any], Mapping[str, Any]]) -> Insert:
    """Return an INSERT as `insert_rows` does, which updates the rows whose primary keys are there.

    Args:
        dialect: The name of the database.
        table: The table.
        values: The values that all rows have, and expressions of parameters.
        renewed: Returns the new values by column, given the collection of those that were to be inserted.
    """
    if dialect in ("mysql", "mariadb"):
        inserted = mysql_insert(table).values(values)
        return _in_one_statement(dialect, table, inserted.on_duplicate_key_update(dict(renewed(inserted.inserted))))
    new = (sqlite_insert if dialect == "sqlite" else postgresql_insert)(table).values(values)
    return new.on_conflict_do_update(index_elements=list(table.primary_key), set_=renewed(new.excluded))


def _in_one_statement(dialect: str, table: Table, statement: Insert) -> Insert:
    """Let SQLAlchemy write several rows into one statement on MariaDB, which it does for RETURNING alone.

    The drivers for MariaDB would send a statement for each row otherwise, because the values are expressions.
    """
    return statement.returning(*table.primary_key) if dialect in ("mysql", "mariadb") else statement


# Engines that `Engine.execution_options` makes: another object than its original, with the same pool and events.


def root_engine(engine: Engine) -> Engine:
    """Return the engine that one with options of its own was made from."""
    while isinstance(proxied := getattr(engine, "_proxied", None), Engine):
        engine = proxied
    return engine


def without_pool(engine: Engine) -> Engine:
    """Return an engine that connects like another one, but takes no connection of its pool, which may be a small one."""
    pool = engine.pool
    alone = NullPool(pool._creator, _dispatch=pool.dispatch, dialect=pool._dialect)
    return Engine(alone, engine.dialect, engine.url, hide_parameters=True)


def copy_listeners(engine: Engine, other: Engine) -> None:
    """Let the listeners of an engine, such as one that sets a role, listen to another one as well."""
    if isinstance(proxied := getattr(engine, "_proxied", None), Engine):
        copy_listeners(proxied, other)
    root: Any = root_engine(engine)
    for name in root.dispatch._event_names:
        listeners: Any = getattr(engine.dispatch, name)
        # SQLAlchemy keeps the listeners of an engine with other options beside those of its original.
        if isinstance(own := getattr(listeners, "local", listeners), _ListenerCollection):
            getattr(other.dispatch, name).for_modify(other.dispatch)._update(own, only_propagate=False)
    if engine._has_events:  # else what listens to the class `Engine` later decides
        other._has_events = True


def add_listeners(engine: Engine, listeners: Mapping[str, Callable[..., Any]]) -> None:
    """Listen to events of an engine and its pool, by their names; calls that are in progress go on without these listeners.

    A listener of the application's may await, such as one that emits BEGIN on SQLite; SQLAlchemy's list of listeners must not
    grow while another session is in it.
    """
    for name, listener in listeners.items():
        for dispatch in (engine.dispatch, engine.pool.dispatch):
            if (known := getattr(dispatch, name, None)) is not None:
                modifiable = known.for_modify(dispatch)
                modifiable.listeners = copy(modifiable.listeners)
        event.listen(engine, name, listener)


# Locks of other transactions: retries after a deadlock, and statements that do not wait.


P = ParamSpec("P")

_DEADLOCKS = ("40P01", "40001", 1205, 1213)
_TRIES = 6

_LOCK_TIMEOUTS = ("55P03", 1205)
_BRIEFLY = text("SET LOCAL lock_timeout = '250ms'")
_PATIENCE_ON_MARIADB = text("SELECT @@innodb_lock_wait_timeout")


def again_after_deadlock(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Retry a transaction that the database has rolled back to resolve a deadlock."""

    @wraps(method)
    async def retried(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(_TRIES):
            try:
                return await method(*args, **kwargs)
            except DBAPIError as error:
                if codes_of(error).isdisjoint(_DEADLOCKS) or attempt == _TRIES - 1:
                    raise
            await asyncio.sleep(random.uniform(0, 0.05 * 2**attempt))  # noqa: S311  # not a secret
        raise AssertionError("unreachable: the last attempt returns or raises")

    return retried


async def try_briefly(
    connection: AsyncConnection, statement: Executable, rows: Sequence[Mapping[str, Any]] | None = None
) -> CursorResult[Any] | None:
    """Execute a statement in a savepoint; return None, with nothing done, if it would wait for a lock of another transaction.

    On SQLite nothing waits in a transaction that has the lock of a writer.
    """
    if connection.dialect.name == "sqlite":
        return await _try(connection, statement, rows)
    if connection.dialect.name == "postgresql":
        await connection.execute(_BRIEFLY)
        return await _try(connection, statement, rows)
    usual = (await connection.execute(_PATIENCE_ON_MARIADB)).scalar_one()
    await connection.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
    try:
        return await _try(connection, statement, rows)
    finally:
        await connection.execute(text(f"SET SESSION innodb_lock_wait_timeout = {int(usual)}"))


async def _try(
    connection: AsyncConnection, statement: Executable, rows: Sequence[Mapping[str, Any]] | None
) -> CursorResult[Any] | None:
    try:
        async with connection.begin_nested():
            return await connection.execute(statement, rows)
    except DBAPIError as error:
        if codes_of(error).isdisjoint(_LOCK_TIMEOUTS):
            raise
        return None


async def put_barrier(connection: AsyncConnection) -> None:
    """Have the COMMIT of a transaction on PostgreSQL make durable what it has seen, asynchronous commits of others included.

    A transaction that has only read, or has only been given an id, ends without waiting for the disk: it must write something.
    """
    await connection.execute(SYNCHRONOUS)
    await connection.execute(_BARRIER)


def codes_of(error: DBAPIError) -> set[str | int]:
    """Return the database's codes of an error: the SQLSTATE, and on MariaDB a number as well, which says more."""
    original = error.orig
    found = {getattr(original, "sqlstate", None), getattr(original, "pgcode", None), *getattr(original, "args", ())[:1]}
    return {code for code in found if isinstance(code, str | int)}


def is_busy(error: object) -> bool:
    """Return whether SQLite's driver has raised an error because another connection has the lock."""
    code = getattr(error, "sqlite_errorcode", None)
    # The low byte is the error, and the rest says more of it.
    return "locked" in str(error) if code is None else code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def executed_statement(state: ORMExecuteState) -> Any:
    """Return the statement that runs: `select(Document).from_statement(...)` may be about one that writes rows."""
    statement = state.statement
    return statement.element if isinstance(statement, FromStatement) else statement


def written_within(statement: Any) -> Iterator[Insert | Update]:
    """Yield the statements in a WITH that write rows, for which there is no event."""
    selected = (getattr(column, "table", column) for column in getattr(statement, "_raw_columns", ()))
    for source in (*selected, *getattr(statement, "_independent_ctes", ())):
        if isinstance(source, CTE) and isinstance(source.element, Insert | Update):
            yield source.element


def schema_on(connection: Connection, table: Table) -> str | None:
    """Return the schema of a model's table on a connection, which may translate the one that the model names."""
    translated: Mapping[str | None, str | None] = connection.get_execution_options().get(TRANSLATE_MAP) or {}
    return translated.get(table.schema, table.schema)


def quoted_name(connection: Connection, schema: str | None, table: str) -> str:
    """Return the name of a table as SQL spells it."""
    quote = connection.dialect.identifier_preparer.quote
    return ".".join(quote(part) for part in (schema, table) if part)


def attached_databases(connection: Connection) -> list[str]:
    """Return the databases of an SQLite connection in the order in which it resolves tables."""
    names = [row[1] for row in connection.exec_driver_sql("PRAGMA database_list")]
    return sorted(names, key=lambda name: name != "temp")


def file_of(connection: Connection) -> str:
    """Return the path of an SQLite connection's main database; empty for one without a file."""
    return next(file or "" for _, name, file in connection.exec_driver_sql("PRAGMA database_list") if name == "main")


def connection_of(session: Session, state: InstanceState[Any]) -> Connection:
    """Return the connection that a session's flush writes an instance on; a sharded session has one for each shard."""
    if session.connection_callable is not None:
        return session.connection_callable(state.mapper, state.obj())
    return session.connection(bind_arguments={"mapper": state.mapper})
