"""Who holds an object: the rows that refer to it, and the journal's entries about it.

The worker and the garbage collector ask here before they delete. All of it is one statement, and so one snapshot: between two
statements a transaction can take an object out of the one place and put it into the other, and both looks would miss it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Dialect,
    LargeBinary,
    Select,
    Table,
    Text,
    case,
    cast,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from granite_storage.locations import GENERATED_ID_LENGTH, GENERATED_STEM, generated_id, matches_generated_name
from granite_storage.orm.indexed import location_of, with_location_column

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.orm.journal.tables import JournalTables

__all__ = ["as_text", "find_held", "held_among", "most_at_once", "named_in", "selected_extra", "selected_text"]

_MOST_PARAMETERS = 20_000
_MOST_LOCATIONS = 1000
_COUNTS_FROM_THE_END = (14,)
"""The version of PostgreSQL since which `split_part` does."""

_STEM_AS_GLOB = "[0-9a-f]" * 12 + "7" + "[0-9a-f]" * 3 + "[89ab]" + "[0-9a-f]" * 15


def most_at_once(columns: Sequence[Column[Any]], journals: Sequence[JournalTables] = ()) -> int:
    """Return how many locations one statement can ask for: each stands in it twice for every column and table."""
    return max(1, min(_MOST_LOCATIONS, _MOST_PARAMETERS // (2 * (len(columns) + 2 * len(journals) + 1))))


async def find_held(
    connection: AsyncConnection,
    columns: Sequence[Column[Any]],
    locations: Sequence[str],
    *,
    journals: Sequence[JournalTables] = (),
    extra: bool = False,
) -> set[tuple[str, str]]:
    """Return which objects are held, as (backend, location), by one statement: whatever backend is named.

    Args:
        connection: A connection in a transaction that has read nothing yet, at READ COMMITTED or stronger.
        columns: Every column that may refer to an object.
        locations: The objects in question; of others nothing is said, unless an `extra` names them.
        journals: The journals whose entries hold an object, too.
        extra: Whether to read every row for references that say the object otherwise: by another location with the same
            generated id, or in their `extra`.
    """
    dialect = connection.dialect
    ids = sorted({found for found in map(generated_id, locations) if found is not None}) if extra else []
    # What it reads is the database's dictionary: that some column is there says nothing of any row.
    generated = await with_location_column(connection, columns)
    parts = [_referring(column, dialect, locations, ids, is_generated=column in generated) for column in columns]
    parts += [_noted(table, dialect, locations, ids) for journal in journals for table in (journal.intent, journal.reclaim)]
    if extra:
        parts += [selected_extra(column, dialect.name) for column in columns]
    if not parts:
        return set()
    held: set[tuple[str, str]] = set()
    wanted = {*locations, *ids}
    for backend, location, names in await connection.execute(union_all(*parts)):
        if names is None:
            held.add((as_text(backend), as_text(location)))
        else:
            found = ((as_text(backend), name) for name in named_in(json.loads(names)))
            held.update((of, name) for of, name in found if name in wanted or generated_id(name) in wanted)
    return held


def held_among(locations: Sequence[str], held: Iterable[str]) -> set[str]:
    """Return which locations are among those that are held, or have the generated id of one: then it is the same object."""
    found = set(held)
    ids = {generated_id(location) for location in found} - {None}
    return {location for location in locations if location in found or generated_id(location) in ids}


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
        selected_text(backend, dialect).label("backend"),
        cast(null(), LargeBinary if dialect == "sqlite" else Text()).label("location"),
        text.label("extra"),
    )
    return found.where(names_one)


def as_text(value: str | bytes | None) -> str:
    """Return a text as it was selected: SQLite gives bytes, among which a lone surrogate may be."""
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return value.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return value.decode("utf-8", "surrogateescape")


def _referring(
    column: Column[Any], dialect: Dialect, locations: Sequence[str], ids: Sequence[str], *, is_generated: bool
) -> Select[*tuple[Any, ...]]:
    backend, location = location_of(column, dialect.name, is_generated=is_generated)
    if ids and dialect.name == "sqlite":  # there a look into what is no JSON fails
        location = case((func.json_valid(column) == 1, location))
    return _among(backend, location, dialect, locations, ids)


def _noted(table: Table, dialect: Dialect, locations: Sequence[str], ids: Sequence[str]) -> Select[*tuple[Any, ...]]:
    return _among(table.c.backend, table.c.location, dialect, locations, ids)


def _among(
    backend: ColumnElement[str], location: ColumnElement[str], dialect: Dialect, locations: Sequence[str], ids: Sequence[str]
) -> Select[*tuple[Any, ...]]:
    """Select backend, location and nothing, of what is at one of the locations or has one of the generated ids."""
    wanted: ColumnElement[bool] = location.in_(locations)
    if ids:
        wanted = or_(wanted, _id_in(location, dialect).in_(ids))
    found: Select[*tuple[Any, ...]] = select(
        selected_text(backend, dialect.name).label("backend"),
        selected_text(location, dialect.name).label("location"),
        cast(null(), Text()).label("extra"),
    )
    return found.where(wanted)


def selected_text(value: ColumnElement[str], dialect: str) -> ColumnElement[Any]:
    """Return a text as it can be selected, whatever it is; `as_text` reads it."""
    return cast(value, LargeBinary) if dialect == "sqlite" else value


def _id_in(location: ColumnElement[str], dialect: Dialect) -> ColumnElement[Any]:
    """Return the first characters of the last segment."""
    if dialect.name == "sqlite":
        folder = func.rtrim(location, func.replace(location, "/", ""))
        return func.substr(location, func.length(folder) + 1, GENERATED_ID_LENGTH)
    if dialect.name != "postgresql":
        return func.left(func.substring_index(location, "/", -1), GENERATED_ID_LENGTH)
    if (dialect.server_version_info or ()) >= _COUNTS_FROM_THE_END:
        return func.left(func.split_part(location, "/", -1), GENERATED_ID_LENGTH)
    return func.left(func.substring(location, "[^/]*$"), GENERATED_ID_LENGTH)


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
