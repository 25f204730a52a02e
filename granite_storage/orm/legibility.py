"""Telling references from what is none in SQL, in columns of which nobody has said what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Select,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from granite_storage.orm._batches import batches
from granite_storage.orm.indexed import location_of, value_in

__all__ = ["find_with_refs", "has_value", "is_legible"]

_ASKED_AT_A_TIME = 50
_LOOKED_AT = 100


def find_with_refs(
    connection: Connection,
    columns: Sequence[Column[Any]],
    identities: Sequence[str] | None,
    *,
    is_certain: bool = False,
    is_sample: bool,
) -> list[Column[Any]]:
    """Return those of the columns that have a reference which may lead to a store; blocking.

    Args:
        connection: A connection.
        columns: Columns of tables that are named as the database names them.
        identities: Those that the store answers to. None: every ref may lead there.
        is_certain: Whether a ref without an identity does not count: it may be of any store.
        is_sample: Whether to look at the first hundred values of each only.
    """
    dialect, found = connection.dialect.name, list[Column[Any]]()
    for batch in batches(columns, _ASKED_AT_A_TIME):
        asked: list[Select[Any]] = [
            select(literal_column(str(number))).where(exists(_refs_in(column, dialect, identities, is_certain, is_sample)))
            for number, column in enumerate(batch)
        ]
        statement = union_all(*asked).execution_options(schema_translate_map={})
        found += [batch[number] for (number,) in connection.execute(statement)]
    return found


def has_value(column: Column[Any], dialect: str) -> ColumnElement[bool]:
    """Tell NULL, and the JSON value null, from a reference."""
    if dialect == "postgresql":
        return func.jsonb_typeof(cast(column, JSONB)) != "null"
    if dialect == "sqlite":
        return and_(column.is_not(None), case((func.json_valid(column) == 1, func.json_type(column) != "null"), else_=true()))
    return and_(column.is_not(None), func.coalesce(func.json_type(column), "") != "NULL")


def is_legible(column: Column[Any], dialect: str) -> ColumnElement[bool]:
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


def _refs_in(
    column: Column[Any], dialect: str, identities: Sequence[str] | None, is_certain: bool, is_sample: bool
) -> Select[Any]:
    if is_sample:
        rows = select(column).where(column.is_not(None)).limit(_LOOKED_AT).subquery("looked_at")
        value: Column[Any] = rows.c[column.name]  # type: ignore[assignment]  # it is one of a subquery
    else:
        value = column
    identity = value_in(value, "identity", dialect)
    here: ColumnElement[bool] = true()
    if identities is not None:
        here = identity.in_(identities) if is_certain else or_(identity.is_(None), identity.in_(identities))
    return select(literal_column("1")).where(has_value(value, dialect), case((is_legible(value, dialect), here), else_=false()))


_KINDS: dict[str, tuple[str, str, Any]] = {
    "postgresql": ("string", "number", _kind_on_postgresql),
    "sqlite": ("text", "integer", _kind_on_sqlite),
    "mysql": ("STRING", "INTEGER", _kind_on_mariadb),
    "mariadb": ("STRING", "INTEGER", _kind_on_mariadb),
}
