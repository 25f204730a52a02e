"""Adding columns of files, and dropping what they have replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, Connection, Table, and_, select

from granite_storage._jobs import places
from granite_storage.alembic._running import storage_thread
from granite_storage.alembic._storing import read_whole
from granite_storage.alembic._transactions import Op, columns_of, count, key_pages, online, table_with
from granite_storage.exceptions import ContentError
from granite_storage.manager import StorageManager
from granite_storage.orm.locking import among
from granite_storage.orm.types import portable_storage_ref_type
from granite_storage.refs import StoredObjectRef

__all__ = ["add_column_once", "add_storage_column", "drop_converted_column", "drop_restored_column"]

logger: logging.Logger = logging.getLogger("granite_storage")


def add_storage_column(op: Op, table: str, column: str, *, schema: str | None = None) -> None:
    """Add a column for refs to a table, empty and nullable; nothing happens where it is there already.

    A conversion commits what came before it, so the migration that it belongs to must be able to run again after a crash.
    """
    add_column_once(op, table, Column(column, portable_storage_ref_type(), nullable=True), schema=schema)


def add_column_once(op: Op, table: str, column: Column[Any], *, schema: str | None = None) -> None:
    """Add a column to a table, as `op.add_column` does, unless it has one of that name."""
    if not op.get_context().as_sql and column.name in columns_of(op.get_bind(), table, schema):
        return
    op.add_column(table, column, schema=schema)


def drop_converted_column(
    op: Op,
    manager: StorageManager,
    table: str,
    source: str,
    target: str,
    *,
    empty: Sequence[object] = (),
    schema: str | None = None,
    at_a_time: int = 8,
) -> None:
    """Drop a column that was converted, once every object that has replaced it was read and found right.

    Nothing is dropped where one is missing or wrong, or a row holds something that was never converted. It does nothing where
    the column is gone already.

    Args:
        op: Alembic's `op`.
        manager: The manager.
        table: The table.
        source: The column to drop.
        target: The column of refs that replaces it.
        empty: Values of the source that stand for no file, such as `""`, and need no ref.
        schema: The table's schema.
        at_a_time: How many objects are read side by side.

    Raises:
        ContentError: A row was not converted; an object has another size or checksum than its ref says.
        ObjectNotFoundError: An object is not there.
    """
    connection = online(op, "verifying a conversion")
    places(at_a_time)
    if source not in columns_of(connection, table, schema):
        return
    found = table_with(connection, table, schema, refs=target, others=[source])
    with storage_thread(manager) as thread:
        for keys in key_pages(connection, found, found.c[target].is_not(None), at_a_time):
            thread.run(_verified(manager, _refs(connection, found, found.c[target], keys)))
    _require_done(connection, found, found.c[source], found.c[target], empty)
    op.drop_column(table, source, schema=schema)


def drop_restored_column(op: Op, table: str, source: str, target: str, *, schema: str | None = None) -> None:
    """Drop a column of refs, once every row has got its old value back; its objects stay where they are.

    Args:
        op: Alembic's `op`.
        table: The table.
        source: The column of refs.
        target: The column that the values were brought back to.
        schema: The table's schema.

    Raises:
        ContentError: A row has got nothing back.
    """
    connection = online(op, "dropping a column of refs")
    if source not in columns_of(connection, table, schema):
        return
    found = table_with(connection, table, schema, refs=source, others=[target])
    _require_done(connection, found, found.c[source], found.c[target], ())
    kept = count(connection, found, found.c[source].is_not(None))
    logger.warning("%d objects of %s.%s stay in the storage, and no row refers to them any longer", kept, table, source)
    op.drop_column(table, source, schema=schema)


def _require_done(
    connection: Connection, table: Table, source: Column[Any], target: Column[Any], empty: Sequence[object]
) -> None:
    left = and_(source.is_not(None), target.is_(None), *(source != value for value in empty))
    number = count(connection, table, left)
    if number:
        raise ContentError(
            f"{number} rows of {table.name} have something in {source.name} and nothing in {target.name}: nothing was dropped"
        )


def _refs(connection: Connection, table: Table, column: Column[Any], keys: list[tuple[Any, ...]]) -> list[StoredObjectRef]:
    found = connection.execute(select(column).where(among(table, keys), column.is_not(None))).scalars()
    return [StoredObjectRef.from_dict(value) for value in found]


async def _verified(manager: StorageManager, refs: Sequence[StoredObjectRef]) -> None:
    found = await asyncio.gather(*(read_whole(manager, ref) for ref in refs), return_exceptions=True)
    for ref, error in zip(refs, found, strict=True):
        if error is not None:
            error.add_note(f"while verifying {ref.location!r} in {ref.backend!r}; nothing was dropped")
            raise error
