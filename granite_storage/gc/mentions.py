"""Objects that are mentioned outside of columns of refs: in JSON that nests refs, in text, in a copy of a table.

An application may keep refs in JSON of its own, an audit may record old rows, and someone may have copied a table. None of these
can be read as a column of refs, but whatever leads to an object contains its generated id, 32 hex digits that no other object
has. So every column of text or bytes is searched for values of that form, once in a run, and the objects that it mentions are
kept.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    ColumnElement,
    LargeBinary,
    Select,
    Table,
    Text,
    case,
    cast,
    column,
    false,
    func,
    literal_column,
    or_,
    select,
    table,
)

from granite_storage._tasks import shielded
from granite_storage.locations import GENERATED_ID_LENGTH, GENERATED_STEM, generated_id
from granite_storage.orm._util import batches
from granite_storage.orm.discovery import FoundColumn, find_text_columns
from granite_storage.orm.references import UTF_8, as_text, text_encoding

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

_COLUMNS_PER_STATEMENT = 100
_ROWS_PER_PAGE = 200
_LONGEST_BYTES = 16 * 1024
"""The longest value of bytes that is searched: a longer one hardly mentions an object."""
_RUN = re.compile(rf"[0-9a-f]{{{GENERATED_ID_LENGTH},}}")
_STEM = re.compile(rf"(?=({GENERATED_STEM}))")
_STEM_IN_HEX = "(3[0-9]|6[1-6]){12}37(3[0-9]|6[1-6]){3}(3[89]|6[12])(3[0-9]|6[1-6]){15}"
"""The regular expression of a generated id in bytes that PostgreSQL prints within another value."""

_TAIL_AS_GLOB = "*7" + "[0-9a-f]" * 3 + "[89ab]" + "[0-9a-f]" * 15 + "*"
_TAIL_IN_HEX = "*37" + "[36][0-9]" * 3 + "[36][1289]" + "[36][0-9]" * 15 + "*"
"""How a generated id goes on after its time, as text and as the digits of its bytes.

A literal character at the beginning makes SQLite several times as fast.
"""


@dataclass(frozen=True, slots=True)
class Mention:
    """What was seen in a column.

    Attributes:
        column: Its schema, its table and its name.
        locations: The objects that it mentions.
        is_seen: Whether every row of it could be searched.
    """

    column: str
    locations: frozenset[str] = frozenset()
    is_seen: bool = True


async def find_mentions(
    connection: AsyncConnection,
    locations: Sequence[str],
    identities: Sequence[str] | None,
    *,
    references: Sequence[Column[Any]],
    journals: Sequence[Table],
) -> AsyncGenerator[Mention, None]:
    """Yield what the columns of a database mention; each searched one also without locations, so that a caller can stop.

    Args:
        connection: A connection, all of whose statements see the same moment.
        locations: The objects to search for. One without a generated id is not found: the library has not named it.
        identities: Those that the store of the objects answers to; None where it knows none.
        references: Columns of references, which are left out. In tables of the same name in other schemas, such as those of
            another installation, references that say that they are of another store are passed over.
        journals: Tables that are left out.
    """
    wanted: dict[str, list[str]] = {}
    for location in locations:
        if (found := generated_id(location)) is not None:
            wanted.setdefault(found, []).append(location)
    left_out = {(str(item.table.schema), item.table.name, item.name) for item in references}
    names = {(of_table, name) for _, of_table, name in left_out}
    tables_left_out = {(str(item.schema), item.name) for item in journals}
    columns = [
        item
        for item in await connection.run_sync(find_text_columns)
        if (item.schema, item.table) not in tables_left_out and (item.schema, item.table, item.name) not in left_out
    ]
    for item in columns:
        if item.is_partial or item.is_foreign or item.is_unknown or not item.is_readable:
            yield Mention(item.label, is_seen=False)
    readable = [item for item in columns if item.is_readable and not item.is_foreign and not item.is_unknown]
    encodings = dict.fromkeys((UTF_8, await connection.run_sync(text_encoding)))
    for _, of_table in groupby(readable, key=lambda item: (item.schema, item.table)):
        for some in batches(list(of_table), _COLUMNS_PER_STATEMENT):
            async with _release_locks(connection):
                result = await connection.stream(_select_mentions(some, connection.dialect.name))
                try:
                    async for page in result.partitions():
                        for number, item in enumerate(some):
                            stated = identities if (item.table, item.name) in names else None
                            texts = [row[number] for row in page if row[number] is not None]
                            ids = await shielded(asyncio.to_thread(_find_ids, texts, wanted.keys(), stated, encodings))
                            if ids:
                                yield Mention(item.label, frozenset(place for found in ids for place in wanted[found]))
                finally:
                    await result.close()
            yield Mention(some[0].label)


def _select_mentions(columns: Sequence[FoundColumn], dialect: str) -> Select[*tuple[Any, ...]]:
    """Select the values of columns of one table that mention anything, and NULL for the others of such a row."""
    first = columns[0]
    # It goes by its name, so that the statements of each run are compiled once.
    named = table(
        first.table,
        *(column(item.name, LargeBinary() if item.is_binary else Text()) for item in columns),
        schema=first.schema,
    )
    texts = [(_value(named.c[item.name], item, dialect), _mentions(named.c[item.name], item, dialect)) for item in columns]
    found = select(*(case((is_one, text)).label(f"text_{number}") for number, (text, is_one) in enumerate(texts)))
    return found.where(or_(*(is_one for _, is_one in texts))).execution_options(yield_per=_ROWS_PER_PAGE)


def _value(column: ColumnElement[Any], item: FoundColumn, dialect: str) -> ColumnElement[Any]:
    if item.is_binary:
        return column
    return cast(column, LargeBinary if dialect == "sqlite" else Text())


def _mentions(column: ColumnElement[Any], item: FoundColumn, dialect: str) -> ColumnElement[bool]:
    if dialect == "sqlite":
        # GLOB reads up to the first zero, so a text that has one is read in Python.
        as_text = column.op("GLOB", is_comparison=True)(_TAIL_AS_GLOB)
        with_zero = func.instr(column, func.char(0)) > 0
        in_encoding = cast(column, Text()).op("GLOB", is_comparison=True)(_TAIL_AS_GLOB)  # bytes of a text in UTF-16
        in_utf8 = func.hex(column).op("GLOB", is_comparison=True)(_TAIL_IN_HEX)
        as_bytes = case((func.length(column) <= _LONGEST_BYTES, or_(in_utf8, in_encoding)), else_=false())
        kind = func.typeof(column)
        return case((kind == "text", or_(as_text, with_zero)), (kind == "blob", or_(as_text, as_bytes)), else_=false())
    value: ColumnElement[Any] = column
    if dialect == "postgresql":
        value = func.encode(column, "escape") if item.is_binary else cast(column, Text())
    elif item.is_binary:
        value = func.convert(column.op("USING")(literal_column("latin1")))
    is_one = value.op("~" if dialect == "postgresql" else "REGEXP", is_comparison=True)(GENERATED_STEM)
    if item.nests_bytes:
        is_one = value.op("~", is_comparison=True)(f"{GENERATED_STEM}|{_STEM_IN_HEX}")
    return case((func.octet_length(column) <= _LONGEST_BYTES, is_one), else_=false()) if item.is_binary else is_one


def _find_ids(
    texts: Sequence[str | bytes], wanted: Collection[str], identities: Collection[str] | None, encodings: Collection[str]
) -> set[str]:
    """Return which of the ids the values mention, apart from references to another store than that of the identities, if any.

    Bytes are read in each of the encodings: on SQLite a value may be a text in that of the database, or bytes in UTF-8.
    """
    found: set[str] = set()
    for value in texts:
        for text in (value,) if isinstance(value, str) else (as_text(value, encoding) for encoding in encodings):
            ids = {one for one in _iter_ids(text) if one in wanted}
            if ids and (identities is None or not _is_elsewhere(text, identities)):
                found |= ids
    return found


def _iter_ids(text: str) -> Iterator[str]:
    """Yield what has the form of a generated id, also within more hex digits, as after an escaped slash, and as bytes in hex."""
    for run in _RUN.findall(text):
        yield from _STEM.findall(run)
        if len(run) >= 2 * GENERATED_ID_LENGTH:
            for digits in (run, run[1:]):
                yield from _STEM.findall(bytes.fromhex(digits[: len(digits) // 2 * 2]).decode("latin-1"))


def _is_elsewhere(text: str, identities: Collection[str]) -> bool:
    """Return whether a value is a reference that says that it is of another store, as its variants do."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or not isinstance(value.get("location"), str):
        return False
    variants = value.get("variants") or {}
    said = (
        [one.get("identity") if isinstance(one, dict) else None for one in variants.values()]
        if isinstance(variants, dict)
        else [None]
    )
    return all(isinstance(identity, str) and identity not in identities for identity in (value.get("identity"), *said))


@asynccontextmanager
async def _release_locks(connection: AsyncConnection) -> AsyncIterator[None]:
    """Release the lock of a table after reading it: PostgreSQL has a limited number of locks, and ALTER TABLE waits."""
    if connection.dialect.name == "sqlite":
        yield
        return
    nested = await connection.begin_nested()
    try:
        yield
    finally:
        await nested.rollback()
