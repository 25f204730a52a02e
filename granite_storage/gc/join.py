"""Joining objects with the references to them, in a temporary database of SQLite: memory does not grow with either."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, TypeAlias

from granite_storage._tasks import shielded

__all__ = ["PAGE", "Join", "Listed", "Nominee", "Reference", "open_join", "take_page"]

PAGE = 2000
"""How many items are written and read together."""

Listed: TypeAlias = tuple[str, int, bool]
"""The location of an object, its size, and whether it is older than the grace period."""

Nominee: TypeAlias = tuple[str, int]
"""The location and the size of an object that may be an orphan."""

Reference: TypeAlias = tuple[str, bool]
"""The location that something refers to, and whether it names a backend that leads to the objects in question."""

# Locations are kept as the bytes of UTF-8: SQLite takes no text with a lone surrogate, which a ref may have.
_TABLES = """
    PRAGMA cache_size = -16384;
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    BEGIN;
    CREATE TABLE object (location BLOB PRIMARY KEY, size INTEGER, is_old INTEGER) WITHOUT ROWID;
    CREATE TABLE reference (location BLOB PRIMARY KEY, is_here INTEGER) WITHOUT ROWID;
    CREATE TABLE nominee (location BLOB PRIMARY KEY, size INTEGER) WITHOUT ROWID;
"""
_ADD_OBJECT = "INSERT INTO object VALUES (?, ?, ?)"
_ADD_REFERENCE = "INSERT INTO reference VALUES (?, ?) ON CONFLICT (location) DO UPDATE SET is_here = is_here OR excluded.is_here"
_ADD_NOMINEE = "INSERT INTO nominee VALUES (?, ?)"
_DROP_NOMINEE = "DELETE FROM nominee WHERE location = ?"
_OBJECTS = """
    SELECT location, size, is_old, EXISTS (SELECT 1 FROM reference WHERE reference.location = object.location)
    FROM object WHERE location > ? ORDER BY location LIMIT ?
"""
_REFERENCES = """
    SELECT location, is_here AND NOT EXISTS (SELECT 1 FROM object WHERE object.location = reference.location)
    FROM reference WHERE location > ? ORDER BY location LIMIT ?
"""
_NOMINEES = "SELECT location, size FROM nominee WHERE location > ? ORDER BY location LIMIT ?"


class Join:
    """The objects of a collection, the references to them, and the nominees: the objects that may be orphans.

    A reference counts whatever backend it names: a place may have two keys, or have had another one. What is added in the byte
    order of the locations is added fastest.

    Args:
        database: An empty database, which stays the caller's to close; used by one thread at a time.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    async def add_objects(self, objects: Sequence[Listed]) -> None:
        """Add objects, none of which may come twice."""
        await self._write(_ADD_OBJECT, objects)

    async def add_references(self, references: Sequence[Reference]) -> None:
        """Add references, which may come in any order and several times."""
        await self._write(_ADD_REFERENCE, references)

    def objects(self) -> AsyncIterator[list[tuple[str, int, bool, bool]]]:
        """Yield pages of the objects as they were added, each with whether anything refers to it."""
        return self._pages(_OBJECTS, PAGE)

    def references(self) -> AsyncIterator[list[tuple[str, bool]]]:
        """Yield pages of the locations that are referenced, none twice, each with whether it leads here and has no object."""
        return self._pages(_REFERENCES, PAGE)

    async def nominate(self, objects: Sequence[Nominee]) -> None:
        """Add nominees."""
        await self._write(_ADD_NOMINEE, objects)

    async def dismiss(self, locations: Iterable[str]) -> None:
        """Remove nominees."""
        await self._write(_DROP_NOMINEE, [(location,) for location in locations])

    def nominees(self, size: int) -> AsyncIterator[list[Nominee]]:
        """Yield pages of this size of the nominees; those of a page that was yielded may be dismissed meanwhile."""
        return self._pages(_NOMINEES, size)

    async def _write(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            await shielded(asyncio.to_thread(self._execute_many, statement, rows))

    def _execute_many(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self._database.executemany(statement, [(location.encode("utf-8", "surrogatepass"), *rest) for location, *rest in rows])

    async def _pages(self, statement: str, size: int) -> AsyncIterator[list[Any]]:
        after = ""
        while page := await shielded(asyncio.to_thread(self._read, statement, after, size)):
            yield page
            after = page[-1][0]

    def _read(self, statement: str, after: str, size: int) -> list[tuple[Any, ...]]:
        rows = self._database.execute(statement, (after.encode("utf-8", "surrogatepass"), size))
        return [(location.decode("utf-8", "surrogatepass"), *rest) for location, *rest in rows]


@asynccontextmanager
async def open_join() -> AsyncIterator[Join]:
    """Open a database without a name; what of it does not fit into 16 MiB is in a file that is gone when it is closed."""
    database = await shielded(asyncio.to_thread(_connect), undo=_close)
    try:
        yield Join(database)
    finally:
        await shielded(_close(database))


def _connect() -> sqlite3.Connection:
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.executescript(_TABLES)
    return database


async def _close(database: sqlite3.Connection) -> None:
    await asyncio.to_thread(database.close)


def take_page(items: Iterator[Any]) -> list[Any]:
    """Take the next items, at most a page of them; blocking where the iterator is."""
    return list(islice(items, PAGE))
