"""What a conversion runs on: transactions of some rows each, and an event loop on which the manager is awaited."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeAlias, TypeVar

from alembic.operations import Operations
from sqlalchemy import Column, ColumnElement, Connection, MetaData, Table, func, inspect, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.util import await_only

from granite_storage._portal import portal
from granite_storage.exceptions import ConfigurationError
from granite_storage.manager import StorageManager
from granite_storage.orm._util import in_greenlet
from granite_storage.orm.columns import portable_storage_ref_type
from granite_storage.orm.references import following

T = TypeVar("T")

# `from alembic import op` gives a module that looks like an `Operations` and is none.
Op: TypeAlias = Operations | Any
Step: TypeAlias = Callable[[], AbstractContextManager[None]]

_KEYS_PER_PAGE = 500


def require_online(op: Op, what: str) -> Connection:
    """Return the migration's connection.

    Raises:
        ConfigurationError: The migration is rendered as SQL, and `what` needs the data.
    """
    if op.get_context().as_sql:
        raise ConfigurationError(
            f"{what} needs the database and the storage, so it cannot be rendered as SQL: run the migration without --sql"
        )
    connection: Connection = op.get_bind()
    return connection


@contextmanager
def own_transactions(op: Op) -> Iterator[Step]:
    """Commit what the migration has done so far, and yield the context manager for each further step.

    Where the migration runs in a transaction that was begun outside of Alembic, each step is a savepoint of it.
    """
    context = op.get_context()
    if context._in_external_transaction:
        yield lambda: _savepoint(op.get_bind())
        return
    begun = op.get_bind().get_transaction()
    if begun is not None and context._transaction is None:
        # The connection has begun it by itself with its first statement, and Alembic expects to have begun every transaction.
        begun.commit()
    with context.autocommit_block():
        yield lambda: _transaction(op.get_bind())


@contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    # Python's driver of SQLite may have begun nothing yet, and the savepoint's release would commit.
    if connection.dialect.name == "sqlite" and not getattr(connection.connection.driver_connection, "in_transaction", True):
        connection.exec_driver_sql("BEGIN")
    with connection.begin_nested():
        yield


@contextmanager
def _transaction(connection: Connection) -> Iterator[None]:
    # The connection is in autocommit mode here, so its driver begins no transaction.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.dialect.name == "sqlite" else "BEGIN")
    try:
        yield
    except BaseException:
        with suppress(SQLAlchemyError):
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


def columns_of(connection: Connection, table: str, schema: str | None) -> dict[str, Any]:
    """Return the types of a table's columns by their names, as they are in the database now."""
    return {column["name"]: column["type"] for column in inspect(connection).get_columns(table, schema=schema)}


def reflect_table(connection: Connection, name: str, schema: str | None, *, refs: str, others: Sequence[str]) -> Table:
    """Return a table with its primary key, a column of refs and other columns.

    Raises:
        ConfigurationError: It lacks one of the columns, or a primary key.
    """
    found = columns_of(connection, name, schema)
    keys = inspect(connection).get_pk_constraint(name, schema=schema)["constrained_columns"]
    missing = [column for column in (refs, *others) if column not in found]
    if missing:
        raise ConfigurationError(
            f"the table {name} has no column {', '.join(missing)}: correct the name, or add the column first"
        )
    if not keys:
        raise ConfigurationError(f"the table {name} has no primary key, which a conversion needs to find the rows: add one first")
    if refs in keys:
        raise ConfigurationError(f"{name}.{refs} is part of the primary key, so it cannot contain refs: use another column")
    plain = [Column(column, found[column], primary_key=column in keys) for column in dict.fromkeys([*keys, *others])]
    return Table(name, MetaData(), *plain, Column(refs, portable_storage_ref_type()), schema=schema)


def count(connection: Connection, table: Table, where: ColumnElement[bool]) -> int:
    """Return the number of rows that meet a condition."""
    return int(connection.execute(select(func.count()).select_from(table).where(where)).scalar_one())


def key_pages(connection: Connection, table: Table, where: ColumnElement[bool], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """Yield pages of the primary keys of the rows that meet a condition, in their order; no cursor stays open."""
    keys = list(table.primary_key)
    after: tuple[Any, ...] | None = None
    while True:
        statement = following(select(*keys).where(where), keys, after).order_by(*keys).limit(_KEYS_PER_PAGE)
        page = [tuple(row) for row in connection.execute(statement)]
        for start in range(0, len(page), size):
            yield page[start : start + size]
        if len(page) < _KEYS_PER_PAGE:
            return
        after = page[-1]


# Awaiting the manager from a migration, which is synchronous code.
#
# The manager runs on the event loop of synchronous callers, in whatever the migration runs: a plain program, `run_sync` of an
# asynchronous `env.py`, whose own loop goes on meanwhile, or a synchronous call inside of a coroutine. No loop waits for itself.


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; an interruption of the caller cancels it, and waits until it has ended."""
    return await_only(portal.run_here(work)) if in_greenlet() else portal.run(work)


@contextmanager
def closing(manager: StorageManager) -> Iterator[None]:
    """Close the manager's connections at the end of the block, unless the application itself has opened some there."""
    is_ours = not portal.is_used_by(manager._lifecycle)
    try:
        yield
    finally:
        if is_ours:
            run(manager._close_here())
            portal.release(manager._lifecycle)
