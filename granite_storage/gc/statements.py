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
    func,
    literal_column,
    not_,
    null,
    select,
    union_all,
)

from granite_storage.orm.held import selected_text
from granite_storage.orm.indexed import location_of, value_in
from granite_storage.orm.legibility import has_value, is_legible

__all__ = [
    "ELSEWHERE",
    "HERE",
    "UNKNOWN_BACKEND",
    "UNKNOWN_IDENTITY",
    "RefColumn",
    "all_locations",
    "counted_by_store",
    "first_illegible",
    "first_of",
]

ELSEWHERE, HERE, UNKNOWN_BACKEND, UNKNOWN_IDENTITY = range(4)
"""What a reference is: to an object of another backend; to one in question; of a backend that no manager has; to one in another
store than the one that its backend leads to."""


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


def all_locations(columns: Sequence[RefColumn], dialect: str, identities: Sequence[str] | None) -> Select[*tuple[Any, ...]]:
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


def first_of(column: RefColumn, dialect: str, kind: int, identities: Sequence[str] | None) -> Select[*tuple[Any, ...]]:
    """Select the primary key, the backend and the identity of a row whose reference is of a kind."""
    ref = column.column
    wanted = and_(
        has_value(ref, dialect),
        case((is_legible(ref, dialect), _kind(column, dialect, identities)), else_=null()) == literal_column(str(kind)),
    )
    said = (location_of(ref, dialect)[0], value_in(ref, "identity", dialect))
    found = select(*ref.table.primary_key, *(selected_text(value, dialect) for value in said))
    return found.where(wanted).limit(1)


def counted_by_store(column: RefColumn, dialect: str) -> Select[*tuple[Any, ...]]:
    """Select backend, identity and number of the references of a column."""
    ref = column.column
    backend, identity = location_of(ref, dialect)[0], value_in(ref, "identity", dialect)
    if dialect == "sqlite":  # there a look into what is no JSON fails
        backend, identity = (case((is_legible(ref, dialect), value)) for value in (backend, identity))
    counted = select(selected_text(backend, dialect), selected_text(identity, dialect), func.count())
    return counted.where(is_legible(ref, dialect)).group_by(backend, identity)


def first_illegible(column: Column[Any], dialect: str) -> Select[*tuple[Any, ...]]:
    """Select the primary key of a row whose value is no reference."""
    wrong = and_(has_value(column, dialect), not_(is_legible(column, dialect)))
    return select(*column.table.primary_key, literal_column("1")).where(wrong).limit(1)


def _locations(column: RefColumn, dialect: str, identities: Sequence[str] | None) -> Select[*tuple[Any, ...]]:
    ref = column.column
    legible = is_legible(ref, dialect)
    kind = _kind(column, dialect, identities)
    found = select(
        case((legible, location_of(ref, dialect)[1])).label("location"),
        case((legible, kind), else_=literal_column(str(ELSEWHERE))).label("kind"),
    ).where(has_value(ref, dialect))
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
