"""The locations of a column of refs in SQL, the index over them, and the generated column that it needs on MariaDB."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from sqlalchemy import Text, bindparam, func, literal_column, text
from sqlalchemy import column as named_column

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection, Dialect
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = [
    "LOCATION_COLUMN_PREFIX",
    "LOCATION_INDEX_PREFIX",
    "find_location_columns",
    "location_column_name",
    "location_index_name",
    "location_of",
    "value_in",
    "with_location_column",
]

LOCATION_INDEX_PREFIX = "ix_granite_storage_location_"
LOCATION_COLUMN_PREFIX = "granite_storage_location_"

_GENERATED = text(
    "SELECT table_schema, table_name, column_name, table_schema = DATABASE() FROM information_schema.columns"
    " WHERE table_name IN :tables AND column_name IN :names"
).bindparams(bindparam("tables", expanding=True), bindparam("names", expanding=True))

_LONGEST_NAME = 63
_DIGITS = 8


def location_index_name(table: str, column: str) -> str:
    """Return the name of the index over a column's locations; it fits every database."""
    return _fitting(LOCATION_INDEX_PREFIX, f"{table}_{column}")


def location_column_name(column: str) -> str:
    """Return the name of the generated column that holds another column's locations, where no index can be on an expression."""
    return _fitting(LOCATION_COLUMN_PREFIX, column)


def location_of(
    column: Column[Any], dialect: str, *, is_generated: bool = False
) -> tuple[ColumnElement[str], ColumnElement[str]]:
    """Return the backend and the location of a column's refs in SQL, spelled as an index over them would be.

    The keys are literals: a database uses an index on an expression only for the very same expression.

    Args:
        column: The column of refs.
        dialect: The name of the database.
        is_generated: Whether its table has a generated column with the locations.
    """
    generated: ColumnElement[str] = named_column(location_column_name(column.name), Text())
    return value_in(column, "backend", dialect), generated if is_generated else value_in(column, "location", dialect)


def value_in(column: Column[Any], key: str, dialect: str) -> ColumnElement[str]:
    """Return a text that the refs of a column have under a key, in SQL; the key is trusted."""
    if dialect == "postgresql":
        return column.op("->>", return_type=Text())(literal_column(f"'{key}'"))
    extract = func.json_extract if dialect == "sqlite" else func.json_value
    return extract(column, literal_column(f"'$.{key}'"), type_=Text())


async def with_location_column(connection: AsyncConnection, columns: Collection[Column[Any]]) -> set[Column[Any]]:
    """Return which columns of refs have a generated column with their locations; only on MariaDB there are any."""
    return await connection.run_sync(find_location_columns, columns) if _may_have_some(connection.dialect, columns) else set()


def find_location_columns(connection: Connection, columns: Collection[Column[Any]]) -> set[Column[Any]]:
    """Return which columns of refs have a generated column with their locations, as `with_location_column` does."""
    if not _may_have_some(connection.dialect, columns):
        return set()
    names = [location_column_name(column.name) for column in columns]
    tables = sorted({column.table.name for column in columns})
    rows = connection.execute(_GENERATED, {"tables": tables, "names": names})
    found = {place for schema, table, name, is_default in rows for place in _places(schema, table, name, is_default)}
    return {column for column in columns if (column.table.schema, column.table.name, location_column_name(column.name)) in found}


def _may_have_some(dialect: Dialect, columns: Collection[Column[Any]]) -> bool:
    return dialect.name in ("mysql", "mariadb") and bool(columns)


def _places(schema: str, table: str, name: str, is_default: bool) -> list[tuple[str | None, str, str]]:
    return [(schema, table, name), *([(None, table, name)] if is_default else [])]


def _fitting(prefix: str, rest: str) -> str:
    """Cut a name that is too long, and let digits tell it from others that begin alike."""
    if len(f"{prefix}{rest}".encode()) <= _LONGEST_NAME:
        return f"{prefix}{rest}"
    digits = sha256(rest.encode()).hexdigest()[:_DIGITS]
    room = _LONGEST_NAME - len(prefix) - _DIGITS - 1
    return f"{prefix}{rest.encode()[:room].decode(errors='ignore')}_{digits}"
