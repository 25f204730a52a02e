"""List: complete, exact, and in one order on every backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from granite_storage.backends.base import ObjectInfo, StorageBackend, close_listing
from granite_storage.testing._cases.base import Cases, infos, listed
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await

__all__ = ["ListCases"]

SAMPLE = [
    "A/1",
    "a-/1",
    "a.b/1",
    "a/1",
    "a/10",
    "a/2",
    "a/b/1",
    "a/b-/1",
    "a/b/c/1",
    "a0/1",
    "ab/1",
    "t-/1",
    "t/1",
    "z",
    "\u00e9/1",
    "\u4e2d/1",
    "\uff5e/1",
    "\U0001f600/1",
]
"""Locations whose order in UTF-8 differs from the order of folders, of cases, and of UTF-16."""


PREFIXES = [
    *("a", "a/", "a/b", "a/b/", "a/1", "a/10", "t", "t/", "t-", "z", "z/", "\u00e9", "b", "a/b/c/1/", "A", "nothing/", "a/1/"),
    *("*", "a*", "?", "[a]", "%", "a_", "A/", ".", "a.", "\\", ".*", "z\\", "+", "%61"),
]
"""Beginnings of locations, and what would match some of them if it were a pattern."""

STARTS = [*SAMPLE[2:9], "z", "a", "a/", "a/11", "", "zz", "A", "b", "a/b/1", "a/zzz", "t/1", "\U0001f600/1", "\U0010ffff"]
"""Where a listing may start, whether there is an object or not."""


def in_order(locations: list[str]) -> list[str]:
    """Sort by the bytes of UTF-8."""
    return sorted(locations, key=str.encode)


async def fill(backend: StorageBackend, locations: list[str]) -> None:
    """Store an object at each location."""
    for location in locations:
        await backend.put_bytes(location, location.encode())


async def take(listing: Any, count: int) -> list[str]:
    """Return the next locations of a listing."""
    return [(await anext(listing)).location for _ in range(count)]


class ListCases(Cases):
    """Listing."""

    async def test_empty_store(self, backend: StorageBackend) -> None:
        """A store that holds nothing lists nothing, without an error, also below a prefix."""
        assert await listed(backend) == [], "a fresh store lists something"
        assert await listed(backend, "a/") == [], "a fresh store lists something below a prefix"

    async def test_one_object(self, backend: StorageBackend) -> None:
        """One object is listed once, as an `ObjectInfo` with a size and a time with a zone."""
        await backend.put_bytes("the/only", b"12345")
        (info,) = await infos(backend)
        assert isinstance(info, ObjectInfo), f"a listing yielded {info!r}"
        assert (info.location, info.size) == ("the/only", 5), f"a listing yielded {info}"
        assert info.modified.tzinfo is not None, "a listing gives a time without a zone"

    async def test_byte_order(self, backend: StorageBackend) -> None:
        """All objects are listed, each once, in the byte order of UTF-8; `t-/` comes before `t/`."""
        await fill(backend, SAMPLE[::-1])
        assert await listed(backend) == in_order(SAMPLE), "the listing is not all objects in the byte order of UTF-8"

    async def test_prefix(self, backend: StorageBackend) -> None:
        """A prefix is taken literally, to the character: `a/` never yields `ab/`, and one that matches nothing is empty."""
        await fill(backend, SAMPLE)
        for prefix in PREFIXES:
            expected = in_order([location for location in SAMPLE if location.startswith(prefix)])
            assert await listed(backend, prefix) == expected, f"a listing below {prefix!r} is not what begins so"

    async def test_prefix_leads_nowhere(self, backend: StorageBackend) -> None:
        """A prefix that no location can begin with is empty: it is not followed as a path."""
        await fill(backend, SAMPLE)
        for prefix in ("../", "/", "a//", "./", "a/../", "//", "a/./", "a/b/../"):
            assert await listed(backend, prefix) == [], f"a listing below {prefix!r} yielded something"

    @pytest.mark.parametrize("prefix", ["", "a/", "a"])
    async def test_start_after(self, backend: StorageBackend, prefix: str) -> None:
        """`start_after` yields what comes after a location, which need not exist, and not the location; a prefix holds too."""
        await fill(backend, SAMPLE)
        for start_after in STARTS:
            matching = [location for location in in_order(SAMPLE) if location.startswith(prefix)]
            expected = [location for location in matching if location.encode() > start_after.encode()]
            found = await listed(backend, prefix, start_after)
            assert found == expected, f"a listing below {prefix!r} after {start_after!r} is not what comes after it"

    @pytest.mark.parametrize("size", [1, 2, 3])
    async def test_page_sizes(self, backend: StorageBackend, size: int) -> None:
        """However many objects a page has, the sequence is the same, with a prefix and `start_after` too."""
        self.needs("has_pages")
        await fill(backend, SAMPLE)
        async with self._paged(backend, size) as paged:
            for prefix, start_after in (("", None), ("a/", None), ("a", "a/10"), ("", "a/b/1")):
                expected = await listed(backend, prefix, start_after)
                found = await listed(paged, prefix, start_after)
                assert found == expected, f"pages of {size} give another sequence below {prefix!r} after {start_after!r}"

    async def test_more_than_one_page(self, backend: StorageBackend) -> None:
        """A listing of several pages is complete and has no duplicates."""
        locations = [f"pages/{number:03}" for number in range(60)]
        await asyncio.gather(*(backend.put_bytes(location, b"") for location in locations))
        async with self._paged(backend, 7) as paged:
            assert await listed(paged) == locations, "a listing of several pages is not complete, or has duplicates"

    async def test_change_behind_a_listing(self, backend: StorageBackend) -> None:
        """What is stored and deleted where a listing has already passed leaves the rest of it as it was."""
        locations = [f"change/{number}" for number in range(9)]
        await fill(backend, locations)
        async with self._paged(backend, 2) as paged:
            listing: Any = paged.iter_objects("change/")
            try:
                seen = await take(listing, 4)
                await backend.delete("change/0")
                await backend.delete("change/1")
                await backend.put_bytes("change/00", b"new")
                await backend.put_bytes("change/000", b"new")
                seen += [info.location async for info in listing]
                assert seen == locations, f"a change behind a listing disturbed what came next: {seen}"
            finally:
                await close_listing(listing)

    async def test_delete_while_listing(self, backend: StorageBackend) -> None:
        """Deleting each object as it is listed deletes them all."""
        locations = [f"swept/{number:02}" for number in range(20)]
        await fill(backend, locations)
        async with self._paged(backend, 3) as paged:
            async for info in paged.iter_objects("swept/"):
                await backend.delete(info.location)
        assert await listed(backend) == [], "objects that were deleted as they were listed are still there"

    async def test_abandoned_listing(self, backend: StorageBackend) -> None:
        """A listing that is not read to its end leaves nothing running."""
        await fill(backend, SAMPLE)
        with self.no_task_left():
            listing: Any = backend.iter_objects()
            await take(listing, 2)
            await close_listing(listing)

    @pytest.mark.parametrize("moment", ["at once", "a little later"])
    async def test_cancelled_listing(self, backend: StorageBackend, moment: Moment) -> None:
        """A listing can be cancelled at any await: the cancellation is raised and nothing is left running."""
        await fill(backend, SAMPLE)

        with self.no_task_left():
            async for step, task, struck in cancel_at_every_await(lambda _: listed(backend), moment):
                self.was_cancelled(task, struck, f"a listing that was cancelled {moment} at its await {step}")
        assert await listed(backend) == in_order(SAMPLE), "after cancelled listings"

    async def test_listings_at_a_time(self, backend: StorageBackend) -> None:
        """Listings at a time do not disturb each other."""
        await fill(backend, SAMPLE)
        for found in await asyncio.gather(*(listed(backend) for _ in range(5))):
            assert found == in_order(SAMPLE), "one of five listings at a time is not complete"

    @asynccontextmanager
    async def _paged(self, backend: StorageBackend, size: int) -> AsyncIterator[StorageBackend]:
        """Enter to a backend for the same store that lists so many objects at a time, where it has pages."""
        paged = self.with_page_size(backend, size) if self.has_pages else backend
        try:
            yield paged
        finally:
            if paged is not backend:
                await paged.aclose()
