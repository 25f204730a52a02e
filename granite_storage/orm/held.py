"""Who holds an object: the rows that refer to it, and the journal's entries about it.

The worker and the garbage collector ask here before they delete. All of it is one statement, and so one snapshot: between two
statements a transaction can take an object out of the one place and put it into the other, and both looks would miss it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, ColumnElement, Select, Table, Text, case, cast, func, literal_column, null, select, union_all
from sqlalchemy.dialects.postgresql import JSONB

from granite_storage.locations import GENERATED_STEM, matches_generated_name
from granite_storage.orm.indexed import with_location_column
from granite_storage.orm.types import location_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.orm.journal.tables import JournalTables

__all__ = ["find_held", "most_at_once", "named_in", "selected_extra"]

_MOST_PARAMETERS = 20_000
_MOST_LOCATIONS = 1000
_STEM_AS_GLOB = "[0-9a-f]" * 12 + "7" + "[0-9a-f]" * 3 + "[89ab]" + "[0-9a-f]" * 15


def most_at_once(columns: Sequence[Column[Any]], journals: Sequence[JournalTables] = ()) -> int:
    """Return how many locations one statement can ask for: each stands in it once for every column and table."""
    return max(1, min(_MOST_LOCATIONS, _MOST_PARAMETERS // (len(columns) + 2 * len(journals) + 1)))


async def find_held(
    connection: AsyncConnection,
    columns: Sequence[Column[Any]],
    locations: Sequence[str],
    *,
    journals: Sequence[JournalTables] = (),
    extra: bool = False,
) -> set[tuple[str, str]]:
    """Return which objects are held, as (backend, location), by one statement.

    Args:
        connection: A connection in a transaction that has read nothing yet, at READ COMMITTED or stronger.
        columns: Every column that may refer to an object.
        locations: The objects in question; of others nothing is said, unless an `extra` names them.
        journals: The journals whose entries hold an object, too.
        extra: Whether an object is held that the `extra` of a ref names; that reads every row that has one. It holds an object
            of that location on the ref's own backend.
    """
    dialect = connection.dialect.name
    # What it reads is the database's dictionary: that some column is there says nothing of any row.
    generated = await with_location_column(connection, columns)
    parts = [_referring(column, dialect, locations, is_generated=column in generated) for column in columns]
    parts += [_noted(table, locations) for journal in journals for table in (journal.intent, journal.reclaim)]
    if extra:
        parts += [selected_extra(column, dialect) for column in columns]
    if not parts:
        return set()
    held: set[tuple[str, str]] = set()
    for backend, location, names in await connection.execute(union_all(*parts)):
        if names is None:
            held.add((backend, location))
        else:
            held.update((backend, name) for name in named_in(json.loads(names)))
    return held


def named_in(extra: Any) -> Iterator[str]:
    """Yield what a ref's `extra` names at any depth that has the form of a location, such as a derived object's."""
    match extra:
        case str():
            if "/" in extra and matches_generated_name(extra):
                yield extra
        case dict():
            for value in extra.values():
                yield from named_in(value)
        case list():
            for value in extra:
                yield from named_in(value)


def selected_extra(column: Column[Any], dialect: str) -> Select[*tuple[Any, ...]]:
    """Select backend, nothing, and `extra` as JSON text, of the refs whose `extra` may name an object."""
    text, names_one = _extra_of(column, dialect)
    backend, _ = location_of(column, dialect)
    found: Select[*tuple[Any, ...]] = select(
        backend.label("backend"), cast(null(), Text()).label("location"), text.label("extra")
    )
    return found.where(names_one)


def _referring(column: Column[Any], dialect: str, locations: Sequence[str], *, is_generated: bool) -> Select[*tuple[Any, ...]]:
    backend, location = location_of(column, dialect, is_generated=is_generated)
    found: Select[*tuple[Any, ...]] = select(
        backend.label("backend"), location.label("location"), cast(null(), Text()).label("extra")
    )
    return found.where(location.in_(locations))


def _noted(table: Table, locations: Sequence[str]) -> Select[*tuple[Any, ...]]:
    found: Select[*tuple[Any, ...]] = select(table.c.backend, table.c.location, cast(null(), Text()).label("extra"))
    return found.where(table.c.location.in_(locations))


def _extra_of(column: Column[Any], dialect: str) -> tuple[ColumnElement[Any], ColumnElement[bool]]:
    """Return `extra` as JSON text, and whether it has something of the form of a generated name; its digits are never escaped."""
    if dialect == "postgresql":
        text: ColumnElement[Any] = cast(cast(column, JSONB).op("->", return_type=JSONB())(literal_column("'extra'")), Text())
        return text, text.op("~", is_comparison=True)(f"{GENERATED_STEM}-")
    text = func.json_extract(column, literal_column("'$.extra'"), type_=Text())
    if dialect == "sqlite":
        text = case((func.json_valid(column) == 1, text))
        return text, text.op("GLOB", is_comparison=True)(f"*{_STEM_AS_GLOB}-*")
    return text, text.op("REGEXP", is_comparison=True)(f"{GENERATED_STEM}-")
