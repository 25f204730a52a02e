"""Objects beside the references to them, both in byte order: a page of each at a time, however many there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.spool import Page

__all__ = ["Joined", "in_byte_order", "joined", "merged"]

_location = itemgetter(0)


@dataclass(slots=True)
class Joined:
    """What a stretch of locations has.

    Attributes:
        referenced: The objects that something refers to.
        unreferenced: The objects that nothing refers to.
        missing: The locations of references without an object, none twice.
    """

    referenced: Page
    unreferenced: Page
    missing: set[str]


async def joined(objects: AsyncIterator[Page], references: AsyncIterator[list[str]]) -> AsyncIterator[Joined]:
    """Join pages of objects, of which each begins with its location, with pages of the locations that are referred to.

    An object is decided on only when every reference to what comes before it, and to itself, was seen. Nothing may come twice
    among the objects; among the references it may.
    """
    last = ""
    async for bound, items, locations in _stretches(_Pages(objects, _location), _Pages(references, None)):
        found = set(locations)
        referenced = [item for item in items if item[0] in found]
        unreferenced = [item for item in items if item[0] not in found] if len(referenced) < len(items) else []
        missing = found.difference(map(_location, referenced)) if len(found) > len(referenced) else set()
        missing.discard(last)
        last = bound if bound is not None else last
        yield Joined(referenced, unreferenced, missing)


async def in_byte_order(pages: AsyncIterator[list[str]], what: str) -> AsyncIterator[list[str]]:
    """Pass pages on, and refuse them where they are not in order: an object would be taken for one that nothing refers to."""
    last = ""
    async for page in pages:
        if page and (page[0] < last or page != sorted(page)):
            raise CollectionRefusedError(f"{what} do not come in the byte order of UTF-8, so they cannot be compared")
        last = page[-1] if page else last
        yield page


async def merged(one: AsyncIterator[list[str]], other: AsyncIterator[list[str]]) -> AsyncIterator[list[str]]:
    """Merge two sequences of pages, both in order, into one."""
    async for _, ours, theirs in _stretches(_Pages(one, None), _Pages(other, None)):
        yield sorted(ours + theirs)


class _Pages:
    """Pages that are taken from piece by piece."""

    def __init__(self, pages: AsyncIterator[Page], key: Any) -> None:
        self._pages = pages
        self._key = key
        self.page: Sequence[Any] = ()

    @property
    def last(self) -> str:
        item = self.page[-1]
        return str(item if self._key is None else self._key(item))

    async def fill(self) -> None:
        """See that something is there, as long as there is anything."""
        while not self.page:
            try:
                self.page = await anext(self._pages)
            except StopAsyncIteration:
                return

    def take(self, bound: str | None) -> Page:
        """Take what is not after a location; all there is for None."""
        cut = len(self.page) if bound is None else bisect_right(self.page, bound, key=self._key)
        taken, self.page = list(self.page[:cut]), self.page[cut:]
        return taken


async def _stretches(left: _Pages, right: _Pages) -> AsyncIterator[tuple[str | None, Page, Page]]:
    """Yield what both sides have up to a location up to which both are known; it is None where one of them is at its end."""
    while True:
        await left.fill()
        await right.fill()
        if not left.page and not right.page:
            return
        bound = min(left.last, right.last) if left.page and right.page else None
        yield bound, left.take(bound), right.take(bound)
