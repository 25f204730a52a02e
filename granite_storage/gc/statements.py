"""Every reference of an application in SQL: in the byte order of its location, and what cannot be read as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    null,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from granite_storage.orm.held import selected_text
from granite_storage.orm.types import location_of, value_in

__all__ = [
    "ELSEWHERE",
    "HERE",
    "UNKNOWN_BACKEND",
    "UNKNOWN_IDENTITY",
    "RefColumn",
    "all_locations",
    "first_illegible",
    "first_of",
    "has_refs",
]

ELSEWHERE, HERE, UNKNOWN_BACKEND, UNKNOWN_IDENTITY = range(4)
"""What a reference is: to an object of another backend; to one in question; of a backend that no manager has; to one in another
store than the one that its backend leads to."""

_LOOKED_AT = 100


@dataclass(frozen=True, slots=True)
class RefColumn:
    """A column that may refer to objects.

    Attributes:
        column: The column, of a table that is named as the database names it.
        known: The keys of backends that its refs may name; None where no manager is known that could tell.
        here: Those of them that lead to the objects in question.
        is_declared: Whether a model has it, so that each of its values has to be a reference.
    """

    column: Column[Any]
    known: frozenset[str] | None
    here: frozenset[str]
    is_declared: bool

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.column.table.fullname}.{self.column.name}"


def all_locations(columns: Sequence[RefColumn], dialect: str, identities: Sequence[str] | None) -> Select[Any]:
    """Select location and kind of all references in the byte order of the locations, and NULL for what is no reference.

    It is one statement, so what moves from one column to another meanwhile is seen in one of them.

    Args:
        columns: Every column that may refer to objects.
        dialect: The name of the database.
        identities: Those that the store of the objects in question answers to; None where it has none to compare with.
    """
    found = union_all(*(_locations(column, dialect, identities) for column in columns)).subquery("found")
    location = selected_text(found.c.location, dialect)
    return select(location, found.c.kind).order_by(_in_byte_order(found.c.location, dialect))


def first_of(column: RefColumn, dialect: str, kind: int, identities: Sequence[str] | None) -> Select[Any]:
    """Select the primary key, the backend and the identity of a row whose reference is of a kind."""
    ref = column.column
    wanted = and_(
        _has_value(ref, dialect),
        case((_is_legible(ref, dialect), _kind(column, dialect, identities)), else_=null()) == literal_column(str(kind)),
    )
    said = (location_of(ref, dialect)[0], value_in(ref, "identity", dialect))
    found = select(*ref.table.primary_key, *(selected_text(value, dialect) for value in said))
    return found.where(wanted).limit(1)


def has_refs(column: Column[Any], dialect: str, identities: Sequence[str] | None, *, is_sample: bool) -> Select[Any]:
    """Select 1 where a column has a reference that may lead to the store in question.

    Args:
        column: A column of which it is not known whether it is one of refs.
        dialect: The name of the database.
        identities: Those that the store answers to; a ref without one may lead there. None: every ref may.
        is_sample: Whether to look at its first hundred values only.
    """
    if is_sample:
        rows = select(column).where(column.is_not(None)).limit(_LOOKED_AT).subquery("looked_at")
        value: Column[Any] = rows.c[column.name]  # type: ignore[assignment]  # it is one of a subquery
    else:
        value = column
    identity = value_in(value, "identity", dialect)
    here = true() if identities is None else or_(identity.is_(None), identity.in_(identities))
    return select(literal_column("1")).where(_has_value(value, dialect), case((_is_legible(value, dialect), here), else_=false()))


def first_illegible(column: Column[Any], dialect: str) -> Select[Any]:
    """Select the primary key of a row whose value is no reference."""
    wrong = and_(_has_value(column, dialect), not_(_is_legible(column, dialect)))
    return select(*column.table.primary_key, literal_column("1")).where(wrong).limit(1)


def _locations(column: RefColumn, dialect: str, identities: Sequence[str] | None) -> Select[Any]:
    ref = column.column
    legible = _is_legible(ref, dialect)
    kind = _kind(column, dialect, identities)
    found = select(
        case((legible, location_of(ref, dialect)[1])).label("location"),
        case((legible, kind), else_=literal_column(str(ELSEWHERE))).label("kind"),
    ).where(_has_value(ref, dialect))
    return found if column.is_declared else found.where(legible)


def _kind(column: RefColumn, dialect: str, identities: Sequence[str] | None) -> ColumnElement[int]:
    backend = location_of(column.column, dialect)[0]
    identity = value_in(column.column, "identity", dialect)
    kinds: list[tuple[ColumnElement[bool], Any]] = []
    if identities is not None:
        kinds.append(
            (
                and_(backend.in_(column.here), identity.is_not(None), identity.not_in(identities)),
                literal_column(str(UNKNOWN_IDENTITY)),
            )
        )
    kinds.append((backend.in_(column.here), literal_column(str(HERE))))
    if column.known is not None:
        kinds.append((backend.not_in(column.known), literal_column(str(UNKNOWN_BACKEND))))
    return case(*kinds, else_=literal_column(str(ELSEWHERE)))


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
