"""Joining objects with the references to them, both in byte order, a page of each at a time."""

from __future__ import annotations

import asyncio
import heapq
import json
import tempfile
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter
from typing import IO, Any, Self, TypeAlias

from granite_storage._tasks import shielded
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.orm._util import batches

PAGE = 2000
"""How many items are written, read and compared together."""

_IN_MEMORY = 50_000
_RUN_PAGE = 200
Page: TypeAlias = list[Any]

Reference: TypeAlias = tuple[str, bool]
"""The location that something refers to, and whether it names a backend that leads to the objects in question."""

_location = itemgetter(0)

# Lists that are too long for the memory.


class _OnDisk:
    """Pages in a file without a name, which is made for the first one, and closed where the block ends."""

    _file: IO[bytes] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._file is not None:
            await shielded(asyncio.to_thread(self._file.close))

    def _append(self, pages: Iterable[Page]) -> tuple[int, int]:
        """Write pages; return where they begin and end; blocking, as is `_read`."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="granite-")  # noqa: SIM115  # the block closes it
        start = self._file.seek(0, 2)
        self._file.writelines(json.dumps(page).encode() + b"\n" for page in pages)
        return start, self._file.tell()

    def _read(self, position: int) -> tuple[Page, int]:
        """Return the page that begins at a position, which is empty at the end, and where the next one does."""
        if self._file is None:
            return [], position
        self._file.seek(position)
        line = self._file.readline()
        return (json.loads(line) if line else []), self._file.tell()


class Spool(_OnDisk):
    """Pages in the order in which they were written; they can be read any number of times. The first one stays in memory."""

    def __init__(self) -> None:
        self._first: Page = []

    async def write(self, page: Page) -> None:
        """Write a page, unless it is empty; the caller leaves it as it is."""
        if not self._first:
            self._first = page
        elif page:
            await shielded(asyncio.to_thread(self._append, [page]))

    async def pages(self) -> AsyncIterator[Page]:
        """Yield the pages; nothing may be written meanwhile."""
        page, position = self._first, 0
        while page:
            yield page
            if self._file is None:
                return
            page, position = await shielded(asyncio.to_thread(self._read, position))


class SortedSpool(_OnDisk):
    """Strings, each with a mark, in the order of their code points, which is the byte order of UTF-8.

    They are sorted on disk, but for the last 50,000, which stay in memory.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[str, bool]] = []
        self._runs: list[tuple[int, int]] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return not self._waiting and not self._runs

    async def add(self, item: str, mark: bool) -> None:
        """Add a string."""
        self._waiting.append((item, mark))
        if len(self._waiting) >= _IN_MEMORY:
            waiting, self._waiting = self._waiting, []
            self._runs.append(await shielded(asyncio.to_thread(self._append, _sort(waiting))))

    async def pages(self) -> AsyncIterator[list[tuple[str, bool]]]:
        """Yield all strings in order, each with its mark; nothing may be added any more."""
        merged = heapq.merge(
            *(self._read_run(start, stop) for start, stop in self._runs), chain.from_iterable(_sort(self._waiting))
        )
        while page := await shielded(asyncio.to_thread(take_page, merged)):
            yield page

    def _read_run(self, start: int, stop: int) -> Iterator[tuple[str, bool]]:
        while start < stop:
            page, start = self._read(start)
            yield from ((item, mark) for item, mark in page)


def _sort(items: list[tuple[str, bool]]) -> Iterator[Page]:
    """Yield items in order and in pages; they are sorted where the first one is asked for."""
    items.sort()
    yield from batches(items, _RUN_PAGE)


def take_page(items: Iterator[Any]) -> Page:
    """Take the next items, at most a page of them; blocking where the iterator is."""
    return list(islice(items, PAGE))


# Joining and merging pages.


async def join_pages(
    objects: AsyncIterator[Page], references: AsyncIterator[list[Reference]]
) -> AsyncIterator[tuple[Page, Page, set[str]]]:
    """Join pages of objects, of which each begins with its location, with pages of references to locations.

    A reference counts whatever backend it names: a place may have two keys, or have had another one.

    An object is decided on once every reference to it, and to what comes before it, was read. No object may come twice; a
    reference may.

    Yields:
        For one range of locations after the other: the objects with a reference, those without one, and the locations of
        references that lead here and have no object, none twice.
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
        yield referenced, unreferenced, missing


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
