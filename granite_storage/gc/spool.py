"""Lists of any length on disk, so that memory stays the same however many objects there are."""

from __future__ import annotations

import asyncio
import heapq
import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from typing import IO, Any, TypeAlias

from granite_storage._tasks import finished

__all__ = ["PAGE", "Page", "SortedSpool", "Spool", "temporary_file"]

Page: TypeAlias = list[Any]

PAGE = 2000
"""How many items are written, read and compared together."""

_IN_MEMORY = 50_000
_RUN_PAGE = 200


@asynccontextmanager
async def temporary_file() -> AsyncIterator[IO[bytes]]:
    """Give a file that has no name and is gone when it is closed."""
    file = await finished(asyncio.to_thread(_open), undo=_close)
    try:
        yield file
    finally:
        await finished(_close(file))


def _open() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="granite-")


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
            await finished(asyncio.to_thread(_write, self._file, page))

    async def pages(self) -> AsyncIterator[Page]:
        """Yield the pages; nothing may be written meanwhile."""
        position = 0
        while True:
            page, position = await finished(asyncio.to_thread(_read, self._file, position))
            if page is None:
                return
            yield page


class SortedSpool:
    """Strings, each with a mark, in the order of their code points, which is the byte order of UTF-8: sorted on disk.

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
            await self._write_run()

    async def pages(self) -> AsyncIterator[list[tuple[str, bool]]]:
        """Yield all strings in order, each with its mark; nothing may be added any more."""
        await self._write_run()
        merged = heapq.merge(*(_marked(self._file, start, stop) for start, stop in self._runs))
        while page := await finished(asyncio.to_thread(_take, merged)):
            yield page

    async def _write_run(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._runs.append(await finished(asyncio.to_thread(_sort_to, self._file, waiting)))


def _write(file: IO[bytes], page: Page) -> None:
    file.seek(0, 2)
    file.write(json.dumps(page).encode() + b"\n")


def _read(file: IO[bytes], position: int) -> tuple[Page | None, int]:
    file.seek(position)
    line = file.readline()
    return (json.loads(line) if line else None), file.tell()


def _sort_to(file: IO[bytes], items: list[tuple[str, bool]]) -> tuple[int, int]:
    items.sort()
    start = file.seek(0, 2)
    for first in range(0, len(items), _RUN_PAGE):
        file.write(json.dumps(items[first : first + _RUN_PAGE]).encode() + b"\n")
    return start, file.tell()


def _marked(file: IO[bytes], start: int, stop: int) -> Iterator[tuple[str, bool]]:
    while start < stop:
        page, start = _read(file, start)
        yield from ((item, mark) for item, mark in page or ())


def _take(items: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    return list(islice(items, PAGE))
