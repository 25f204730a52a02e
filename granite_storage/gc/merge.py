"""Joining objects with the references to them, both in byte order, a page of each at a time."""

from __future__ import annotations

import asyncio
import heapq
import json
import tempfile
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import IO, Any, TypeAlias

from granite_storage._tasks import shielded
from granite_storage.exceptions import CollectionRefusedError

__all__ = [
    "PAGE",
    "Joined",
    "Page",
    "Reference",
    "SortedSpool",
    "Spool",
    "join_pages",
    "merge_pages",
    "require_byte_order",
    "take_page",
    "temporary_file",
]

PAGE = 2000
"""How many items are written, read and compared together."""

_IN_MEMORY = 50_000
_RUN_PAGE = 200
Page: TypeAlias = list[Any]

Reference: TypeAlias = tuple[str, bool]
"""The location that something refers to, and whether it names a backend that leads to the objects in question."""

_location = itemgetter(0)

# Lists on disk.


@asynccontextmanager
async def temporary_file() -> AsyncIterator[IO[bytes]]:
    """Open a file that has no name and is deleted when it is closed."""
    file: IO[bytes] = await shielded(asyncio.to_thread(tempfile.TemporaryFile, prefix="granite-"), undo=_close)
    try:
        yield file
    finally:
        await shielded(_close(file))


async def _close(file: IO[bytes]) -> None:
    await asyncio.to_thread(file.close)


class Spool:
    """Pages in the order in which they were written; they can be read any number of times.

    Args:
        file: An empty file, which stays the caller's to close.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    async def write(self, page: Page) -> None:
        """Write a page, unless it is empty."""
        if page:
            await shielded(asyncio.to_thread(_write, self._file, page))

    async def pages(self) -> AsyncIterator[Page]:
        """Yield the pages; nothing may be written meanwhile."""
        position = 0
        while True:
            page, position = await shielded(asyncio.to_thread(_read, self._file, position))
            if page is None:
                return
            yield page


class SortedSpool:
    """Strings, each with a mark, in the order of their code points, which is the byte order of UTF-8.

    They are sorted on disk, but for the last 50,000, which stay in memory.

    Args:
        file: An empty file, which stays the caller's to close.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._waiting: list[tuple[str, bool]] = []
        self._runs: list[tuple[int, int]] = []

    async def add(self, item: str, mark: bool) -> None:
        """Add a string."""
        self._waiting.append((item, mark))
        if len(self._waiting) >= _IN_MEMORY:
            waiting, self._waiting = self._waiting, []
            self._runs.append(await shielded(asyncio.to_thread(_sort_to, self._file, waiting)))

    async def pages(self) -> AsyncIterator[list[tuple[str, bool]]]:
        """Yield all strings in order, each with its mark; nothing may be added any more."""
        runs = [_read_run(self._file, start, stop) for start, stop in self._runs]
        merged = heapq.merge(*runs, _sort(self._waiting))
        while page := await shielded(asyncio.to_thread(take_page, merged)):
            yield page


def _write(file: IO[bytes], page: Page) -> None:
    file.seek(0, 2)
    file.write(json.dumps(page).encode() + b"\n")


def _read(file: IO[bytes], position: int) -> tuple[Page | None, int]:
    file.seek(position)
    line = file.readline()
    return (json.loads(line) if line else None), file.tell()


def _sort(items: list[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yield items in order; they are sorted where the first one is asked for."""
    items.sort()
    yield from items


def _sort_to(file: IO[bytes], items: list[tuple[str, bool]]) -> tuple[int, int]:
    items.sort()
    start = file.seek(0, 2)
    for first in range(0, len(items), _RUN_PAGE):
        file.write(json.dumps(items[first : first + _RUN_PAGE]).encode() + b"\n")
    return start, file.tell()


def _read_run(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[str, bool]]:
    while start < stop:
        page, start = _read(file, start)
        yield from ((item, mark) for item, mark in page or ())


def take_page(items: Iterator[Any]) -> Page:
    """Take the next items, at most a page of them; blocking where the iterator is."""
    return list(islice(items, PAGE))


# Joining and merging pages.


@dataclass(slots=True)
class Joined:
    """The result of the join for a range of locations.

    Attributes:
        referenced: The objects with a reference.
        unreferenced: The objects without one.
        missing: The locations of references that lead here and have no object, none twice.
    """

    referenced: Page
    unreferenced: Page
    missing: set[str]


async def join_pages(objects: AsyncIterator[Page], references: AsyncIterator[list[Reference]]) -> AsyncIterator[Joined]:
    """Join pages of objects, of which each begins with its location, with pages of references to locations.

    A reference counts whatever backend it names: a place may have two keys, or have had another one.

    An object is decided on once every reference to it, and to what comes before it, was read. No object may come twice; a
    reference may.
    """
    last = ""
    async for bound, items, refs in _stretches(_Pages(objects), _Pages(references)):
        found = set(map(_location, refs))
        referenced = [item for item in items if item[0] in found]
        unreferenced = [item for item in items if item[0] not in found] if len(referenced) < len(items) else []
        missing: set[str] = set()
        if len(found) > len(referenced):
            missing = {location for location, is_here in refs if is_here}.difference(map(_location, referenced))
        missing.discard(last)
        last = bound if bound is not None else last
        yield Joined(referenced, unreferenced, missing)


async def require_byte_order(pages: AsyncIterator[list[Reference]], what: str) -> AsyncIterator[list[Reference]]:
    """Yield pages, and refuse them out of order: an object with a reference would be taken for an orphan."""
    last = ""
    async for page in pages:
        locations = list(map(_location, page))
        if locations and (locations[0] < last or locations != sorted(locations)):
            raise CollectionRefusedError(
                f"{what} are not in the byte order of UTF-8, so they cannot be compared with the objects"
            )
        last = locations[-1] if locations else last
        yield page


async def merge_pages(
    one: AsyncIterator[list[Reference]], other: AsyncIterator[list[Reference]]
) -> AsyncIterator[list[Reference]]:
    """Merge two sequences of pages, both in order, into one."""
    async for _, ours, theirs in _stretches(_Pages(one), _Pages(other)):
        yield sorted(ours + theirs, key=_location) if ours and theirs else ours or theirs


class _Pages:
    """Pages that are taken from piece by piece."""

    def __init__(self, pages: AsyncIterator[Page]) -> None:
        self._pages = pages
        self.page: Sequence[Any] = ()

    @property
    def last(self) -> str:
        return str(_location(self.page[-1]))

    async def fill(self) -> None:
        """Read the next page, unless something of the current one is left."""
        while not self.page:
            try:
                self.page = await anext(self._pages)
            except StopAsyncIteration:
                return

    def take(self, bound: str | None) -> Page:
        """Take everything up to a location, and all of the page for None."""
        cut = len(self.page) if bound is None else bisect_right(self.page, bound, key=_location)
        taken, self.page = list(self.page[:cut]), self.page[cut:]
        return taken


async def _stretches(left: _Pages, right: _Pages) -> AsyncIterator[tuple[str | None, Page, Page]]:
    """Yield what both sides have up to a location to which both were read; it is None once one side has ended."""
    while True:
        await left.fill()
        await right.fill()
        if not left.page and not right.page:
            return
        bound = min(left.last, right.last) if left.page and right.page else None
        yield bound, left.take(bound), right.take(bound)
