"""Indexes over the locations of a column of refs, for whoever asks which row refers to an object."""

from __future__ import annotations

from contextlib import nullcontext

from sqlalchemy import Column, Index, MetaData, Table
from sqlalchemy.dialects import mysql

from granite_storage.alembic._transactions import Op, columns_of
from granite_storage.orm.indexed import location_column_name, location_index_name, location_of
from granite_storage.orm.types import portable_storage_ref_type

__all__ = ["create_location_index", "drop_location_index"]

_LONGEST_LOCATION = 1024
_INDEXED = 255


def create_location_index(op: Op, table: str, column: str, *, schema: str | None = None, concurrently: bool = False) -> None:
    """Create an index over the locations of a column of refs, unless it is there already.

    The journal's worker, `migrate` and `paths_to_storage` ask which rows refer to an object; without the index each question
    reads the whole table. On PostgreSQL and SQLite it is an index on an expression, on MariaDB one on a generated column that
    `SELECT *` does not show. Autogenerate leaves it alone with `include_storage`. Batch operations of SQLite that rebuild the
    table lose it, and it is to be created again after them.

    Args:
        op: Alembic's `op`.
        table: The table.
        column: The column of refs.
        schema: The table's schema.
        concurrently: Whether PostgreSQL builds it without locking writers out; what the migration has done before is committed
            then. Other databases take no notice.
    """
    context = op.get_context()
    concurrently = concurrently and context.dialect.name == "postgresql"
    with context.autocommit_block() if concurrently else nullcontext():
        index = _index(op, table, column, schema, concurrently)
        if context.dialect.name in ("mysql", "mariadb"):
            _add_generated_column(op, table, column, schema)
        context.impl.create_index(index, if_not_exists=True)


def drop_location_index(op: Op, table: str, column: str, *, schema: str | None = None) -> None:
    """Drop what `create_location_index` has created; what is gone already is no error."""
    op.drop_index(location_index_name(table, column), table_name=table, schema=schema, if_exists=True)
    if op.get_context().dialect.name in ("mysql", "mariadb") and _has_generated_column(op, table, column, schema):
        op.drop_column(table, location_column_name(column), schema=schema)


def _index(op: Op, table: str, column: str, schema: str | None, concurrently: bool) -> Index:
    dialect = op.get_context().dialect.name
    refs = Column(column, portable_storage_ref_type())
    generated = Column(location_column_name(column), mysql.VARCHAR(_LONGEST_LOCATION))
    Table(table, MetaData(), refs, generated, schema=schema)
    if dialect in ("mysql", "mariadb"):
        length = {generated.name: _INDEXED}
        return Index(location_index_name(table, column), generated, mysql_length=length, mariadb_length=length)
    return Index(location_index_name(table, column), location_of(refs, dialect)[1], postgresql_concurrently=concurrently)


def _add_generated_column(op: Op, table: str, column: str, schema: str | None) -> None:
    name = location_column_name(column)
    context = op.get_context()
    if not context.as_sql and _has_generated_column(op, table, column, schema):
        return
    preparer = context.dialect.identifier_preparer
    qualified = preparer.format_table(Table(table, MetaData(), schema=schema))
    # The library's comparisons are exact, whatever the table's own collation; and no `SELECT *` of the application shall see it.
    op.execute(
        f"ALTER TABLE {qualified} ADD COLUMN {preparer.quote(name)} VARCHAR({_LONGEST_LOCATION})"
        f" CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        f" GENERATED ALWAYS AS (json_value({preparer.quote(column)}, '$.location')) VIRTUAL INVISIBLE"
    )


def _has_generated_column(op: Op, table: str, column: str, schema: str | None) -> bool:
    return op.get_context().as_sql or location_column_name(column) in columns_of(op.get_bind(), table, schema)
