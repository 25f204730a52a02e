"""Columns of files in migrations: adding them, indexing their locations, and dropping what they have replaced."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from sqlalchemy import Column, Connection, MetaData, Table, and_, func, select

from granite_storage._jobs import require_concurrency
from granite_storage._tasks import run_bounded
from granite_storage._words import count_of
from granite_storage.alembic._transactions import Op, closing, columns_of, count, key_pages, reflect_table, require_online, run
from granite_storage.alembic.sources import read_whole
from granite_storage.exceptions import ContentError
from granite_storage.manager import StorageManager
from granite_storage.orm.columns import (
    generated_location,
    join_variants,
    location_column_name,
    location_index,
    location_index_name,
    portable_storage_ref_type,
)
from granite_storage.orm.locking import among
from granite_storage.refs import StoredObjectRef

__all__ = [
    "add_column_once",
    "add_storage_column",
    "create_location_index",
    "drop_converted_column",
    "drop_location_index",
    "drop_restored_column",
]


logger: logging.Logger = logging.getLogger("granite_storage")


def add_storage_column(op: Op, table: str, column: str, *, schema: str | None = None) -> None:
    """Add an empty, nullable column of refs to a table, unless it exists already.

    A conversion commits what the migration did before it, so the migration must be able to run again after a crash.
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
    concurrency: int = 8,
) -> None:
    """Drop a column that was converted, after reading and verifying every object of the new column.

    Nothing is dropped where an object is missing or wrong, or a row has a value that was never converted. Nothing happens where
    the column is gone already.

    Args:
        op: Alembic's `op`.
        manager: The manager.
        table: The table.
        source: The column to drop.
        target: The column of refs that replaces it.
        empty: Values of the source that mean no file, such as `""`, and need no ref.
        schema: The table's schema.
        concurrency: How many objects are read at a time.

    Raises:
        ContentError: A row was not converted; an object has another size or checksum than its ref says.
        ObjectNotFoundError: An object is missing.
    """
    connection = require_online(op, "verifying a conversion")
    require_concurrency(concurrency)
    if source not in columns_of(connection, table, schema):
        return
    found = reflect_table(connection, table, schema, refs=target, others=[source])
    with closing(manager):
        for keys in key_pages(connection, found, found.c[target].is_not(None), concurrency):
            run(_verify(manager, _refs(connection, found, found.c[target], keys)))
    _require_done(connection, found, found.c[source], found.c[target], empty)
    op.drop_column(table, source, schema=schema)


def drop_restored_column(op: Op, table: str, source: str, target: str, *, schema: str | None = None) -> None:
    """Drop a column of refs once every row has its old value back; the objects and their variants stay.

    How many that are is logged. No row refers to them any more, so the garbage collector deletes those that nothing mentions, as
    a column of paths mentions an object. Variants are not converted: nothing but the dropped column knows of them.

    Args:
        op: Alembic's `op`.
        table: The table.
        source: The column of refs.
        target: The column with the restored values.
        schema: The table's schema.

    Raises:
        ContentError: A row has no restored value.
    """
    connection = require_online(op, "dropping a column of refs")
    if source not in columns_of(connection, table, schema):
        return
    found = reflect_table(connection, table, schema, refs=source, others=[target])
    _require_done(connection, found, found.c[source], found.c[target], ())
    kept = count(connection, found, found.c[source].is_not(None))
    objects = count_of(kept, f"object of {table}.{source} remains", f"objects of {table}.{source} remain")
    logger.warning("%s in storage, and no row refers to %s any more", objects, "it" if kept == 1 else "them")
    variants, _ = join_variants(found.c[source], connection.dialect.name)
    nested = select(func.count()).select_from(variants)
    if number := connection.execute(nested).scalar_one():
        originals = "this object" if kept == 1 else "these objects"
        variants_too = count_of(number, f"variant of {originals} remains", f"variants of {originals} remain")
        logger.warning("%s as well, for the garbage collector", variants_too)
    op.drop_column(table, source, schema=schema)


def _require_done(
    connection: Connection, table: Table, source: Column[Any], target: Column[Any], empty: Sequence[object]
) -> None:
    left = and_(source.is_not(None), target.is_(None), *(source != value for value in empty))
    number = count(connection, table, left)
    if number:
        raise ContentError(
            f"{count_of(number, f'row of {table.name} has', f'rows of {table.name} have')} a value in {source.name} and none in"
            f" {target.name}: convert them first; nothing was dropped"
        )


def _refs(connection: Connection, table: Table, column: Column[Any], keys: list[tuple[Any, ...]]) -> list[StoredObjectRef]:
    found = connection.execute(select(column).where(among(table, keys), column.is_not(None))).scalars()
    return [StoredObjectRef.from_dict(value) for value in found]


async def _verify(manager: StorageManager, refs: Sequence[StoredObjectRef]) -> None:
    async def read(ref: StoredObjectRef) -> None:
        try:
            await read_whole(manager, ref)
        except Exception as error:
            error.add_note(f"while verifying {ref.location!r} in {ref.backend!r}; nothing was dropped")
            raise

    await run_bounded(refs, read, len(refs))


# Indexes over the locations of a column of refs, by which the rows that refer to an object are found.


def create_location_index(op: Op, table: str, column: str, *, schema: str | None = None, concurrently: bool = False) -> None:
    """Create an index on the locations of a column of refs, unless it exists already.

    The journal's worker, `migrate` and `paths_to_storage` ask which rows refer to an object; without the index each question
    reads the whole table. On PostgreSQL and SQLite it is an index on an expression, on MariaDB one on a stored column that
    `SELECT *` does not show. Autogenerate leaves it alone with `include_storage`. Batch operations of SQLite that rebuild the
    table drop it; create it again after them.

    Args:
        op: Alembic's `op`.
        table: The table.
        column: The column of refs.
        schema: The table's schema.
        concurrently: Whether PostgreSQL builds it without locking out writers; what the migration did before is committed then.
            Other databases ignore it.
    """
    context = op.get_context()
    concurrently = concurrently and context.dialect.name == "postgresql"
    with context.autocommit_block() if concurrently else nullcontext():
        index = location_index(context.dialect.name, table, column, schema, concurrently=concurrently)
        if context.dialect.name in ("mysql", "mariadb"):
            _add_generated_column(op, table, column, schema)
        context.impl.create_index(index, if_not_exists=True)


def drop_location_index(op: Op, table: str, column: str, *, schema: str | None = None) -> None:
    """Drop the index of `create_location_index`, if it exists."""
    op.drop_index(location_index_name(table, column), table_name=table, schema=schema, if_exists=True)
    if op.get_context().dialect.name in ("mysql", "mariadb") and _has_generated_column(op, table, column, schema):
        op.drop_column(table, location_column_name(column), schema=schema)


def _add_generated_column(op: Op, table: str, column: str, schema: str | None) -> None:
    name = location_column_name(column)
    context = op.get_context()
    found = None if context.as_sql else columns_of(op.get_bind(), table, schema).get(name)
    if found is not None and found.get("computed", {}).get("persisted"):
        return
    preparer = context.dialect.identifier_preparer
    qualified = preparer.format_table(Table(table, MetaData(), schema=schema))
    if found is not None:  # a virtual one, of an earlier version
        op.drop_column(table, name, schema=schema)
    op.execute(f"ALTER TABLE {qualified} ADD COLUMN {preparer.quote(name)} {generated_location(preparer.quote(column))}")


def _has_generated_column(op: Op, table: str, column: str, schema: str | None) -> bool:
    return op.get_context().as_sql or location_column_name(column) in columns_of(op.get_bind(), table, schema)
