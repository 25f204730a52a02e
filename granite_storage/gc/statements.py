"""Every reference of an application in SQL: in the byte order of its location, and what cannot be read as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    LargeBinary,
    Select,
    and_,
    case,
    cast,
    collate,
    false,
    func,
    literal_column,
    not_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from granite_storage.orm.types import location_of

__all__ = ["all_locations", "first_illegible"]


def all_locations(columns: Sequence[Column[Any]], dialect: str, backend: str) -> Select[Any]:
    """Select the locations of all references to a backend in byte order, and NULL for each value that is no reference.

    It is one statement, so what moves from one column to another meanwhile is seen in one of them.
    """
    found = union_all(*(_locations(column, dialect, backend) for column in columns)).subquery("found")
    return select(found.c.location).order_by(_in_byte_order(found.c.location, dialect))


def first_illegible(column: Column[Any], dialect: str) -> Select[Any]:
    """Select the primary key of a row whose value is no reference."""
    wrong = and_(_has_value(column, dialect), not_(_is_legible(column, dialect)))
    return select(*column.table.primary_key, literal_column("1")).where(wrong).limit(1)


def _locations(column: Column[Any], dialect: str, backend: str) -> Select[Any]:
    of_backend, location = location_of(column, dialect)
    legible = _is_legible(column, dialect)
    found = select(case((legible, location)).label("location"))
    return found.where(_has_value(column, dialect), case((legible, of_backend == backend), else_=true()))


def _in_byte_order(location: ColumnElement[str], dialect: str) -> ColumnElement[Any]:
    if dialect == "postgresql":
        return collate(location, "C")
    return location if dialect == "sqlite" else cast(location, LargeBinary())


def _has_value(column: Column[Any], dialect: str) -> ColumnElement[bool]:
    """Tell NULL, and the JSON value null, from a reference."""
    if dialect == "postgresql":
        return func.jsonb_typeof(cast(column, JSONB)) != "null"
    if dialect == "sqlite":
        return and_(column.is_not(None), case((func.json_valid(column) == 1, func.json_type(column) != "null"), else_=true()))
    return and_(column.is_not(None), func.coalesce(func.json_type(column), "") != "NULL")


def _is_legible(column: Column[Any], dialect: str) -> ColumnElement[bool]:
    """Tell whether a value says what it refers to, and is otherwise of the form of a reference; never NULL."""
    texts, number, kind_of = _KINDS[dialect]
    kinds = [kind_of(column, key) == texts for key in ("storage_key", "backend", "location")]
    sound = and_(*kinds, kind_of(column, "size") == number, location_of(column, dialect)[1] != "")
    if dialect == "sqlite":  # there a look into what is no JSON fails
        return case((func.json_valid(column) == 1, func.coalesce(sound, false())), else_=false())
    return func.coalesce(sound, false())


def _kind_on_postgresql(column: Column[Any], key: str) -> ColumnElement[Any]:
    return func.jsonb_typeof(cast(column, JSONB).op("->", return_type=JSONB())(literal_column(f"'{key}'")))


def _kind_on_sqlite(column: Column[Any], key: str) -> ColumnElement[Any]:
    return func.json_type(column, literal_column(f"'$.{key}'"))


def _kind_on_mariadb(column: Column[Any], key: str) -> ColumnElement[Any]:
    return func.json_type(func.json_extract(column, literal_column(f"'$.{key}'")))


_KINDS: dict[str, tuple[str, str, Any]] = {
    "postgresql": ("string", "number", _kind_on_postgresql),
    "sqlite": ("text", "integer", _kind_on_sqlite),
    "mysql": ("STRING", "INTEGER", _kind_on_mariadb),
    "mariadb": ("STRING", "INTEGER", _kind_on_mariadb),
}
