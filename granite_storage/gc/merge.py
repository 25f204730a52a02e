"""Objects beside the references to them, both in byte order: a page of each at a time, however many there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.spool import Page

__all__ = ["Joined", "Reference", "in_byte_order", "joined", "merged"]

Reference: TypeAlias = tuple[str, bool]
"""The location that something refers to, and whether it names a backend that leads to the objects in question."""

_location = itemgetter(0)


@dataclass(slots=True)
class Joined:
    """What a stretch of locations has.

    Attributes:
        referenced: The objects that something refers to.
        unreferenced: The objects that nothing refers to.
        missing: The locations without an object of references that lead here, none twice.
    """

    referenced: Page
    unreferenced: Page
    missing: set[str]


async def joined(objects: AsyncIterator[Page], references: AsyncIterator[list[Reference]]) -> AsyncIterator[Joined]:
    """Join pages of objects, of which each begins with its location, with pages of references to locations.

    A reference counts whatever backend it names: a place may have two keys, or its key may have been another one.

    An object is decided on only when every reference to what comes before it, and to itself, was seen. Nothing may come twice
    among the objects; among the references it may.
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


async def in_byte_order(pages: AsyncIterator[list[Reference]], what: str) -> AsyncIterator[list[Reference]]:
    """Pass pages on, and refuse them where they are not in order: an object would be taken for one that nothing refers to."""
    last = ""
    async for page in pages:
        locations = list(map(_location, page))
        if locations and (locations[0] < last or locations != sorted(locations)):
            raise CollectionRefusedError(f"{what} do not come in the byte order of UTF-8, so they cannot be compared")
        last = locations[-1] if locations else last
        yield page


async def merged(one: AsyncIterator[list[Reference]], other: AsyncIterator[list[Reference]]) -> AsyncIterator[list[Reference]]:
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
        """See that something is there, as long as there is anything."""
        while not self.page:
            try:
                self.page = await anext(self._pages)
            except StopAsyncIteration:
                return

    def take(self, bound: str | None) -> Page:
        """Take what is not after a location; all there is for None."""
        cut = len(self.page) if bound is None else bisect_right(self.page, bound, key=_location)
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
