"""Read and stat: the exact bytes that were asked for, or an error; never fewer."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from granite_storage.backends.base import ObjectInfo, StorageBackend, SupportsReopen
from granite_storage.exceptions import BackendError, InvalidLocationError, ObjectNotFoundError
from granite_storage.testing._cases.base import Cases, infos, must_raise, pattern, read_all, same_bytes
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await

__all__ = ["ReadCases"]

SIZE = 1000
NOT_THERE = ["missing", "folder", "folder/object/below", "folder/objec", "folder/object2"]
RANGES = [
    *((0, None), (0, 0), (0, 1), (0, SIZE), (1, None), (300, 400), (500, 0), (SIZE - 1, None), (SIZE - 1, 1)),
    *((SIZE, None), (SIZE, 0), (SIZE, 5), (900, 101), (0, SIZE + 1), (10, 1 << 40)),
]


class ReadCases(Cases):
    """Reading, and what is known of an object."""

    @pytest.mark.parametrize("verb", ["open", "stat"])
    @pytest.mark.parametrize("location", NOT_THERE)
    async def test_missing(self, backend: StorageBackend, verb: str, location: str) -> None:
        """What is not there, a folder, and what seems to lie below an object are not found, and the error names the location."""
        await backend.put_bytes("folder/object", b"...")
        call: Any = getattr(backend, verb)
        with must_raise(ObjectNotFoundError, f"{verb}({location!r}) must find nothing", location=location) as caught:
            await call(location)
        assert location in str(caught.error), f"the message does not name the location: {caught.error}"

    async def test_exists(self, backend: StorageBackend) -> None:
        """Only an object exists: no folder, no part of a name, nothing below an object."""
        await backend.put_bytes("folder/object", b"...")
        assert await backend.exists("folder/object") is True, "exists() must return True for an object"
        for location in NOT_THERE:
            assert await backend.exists(location) is False, f"exists({location!r}) must return False"

    async def test_folder_with_a_slash(self, backend: StorageBackend) -> None:
        """`folder/` is not a location."""
        await backend.put_bytes("folder/object", b"...")
        for verb in ("open", "stat", "exists", "delete"):
            call: Any = getattr(backend, verb)
            with must_raise(InvalidLocationError, f"{verb}('folder/') must be refused"):
                await call("folder/")

    async def test_range(self, backend: StorageBackend) -> None:
        """A range has exactly its bytes, is cut at the end of the object, and tells the size of the whole."""
        content = pattern(SIZE)
        await backend.put_bytes("ranged", content)
        for offset, length in RANGES:
            expected = content[offset:] if length is None else content[offset : offset + length]
            same_bytes(await read_all(backend, "ranged", offset, length), expected, f"range offset={offset} length={length}")
            same_bytes(await read_all(backend, "ranged", offset, length, 77), expected, "the same range, 77 bytes at a time")
            reader = await backend.open("ranged", offset=offset, length=length)
            await reader.aclose()
            assert reader.info.size == SIZE, f"a range's reader says that the object has {reader.info.size} bytes, not {SIZE}"

    async def test_impossible_range(self, backend: StorageBackend) -> None:
        """A negative range, or one that begins past the end, is a `ValueError`, never an empty body."""
        await backend.put_bytes("ranged", pattern(SIZE))
        for offset, length in ((-1, None), (0, -1), (-5, 3), (SIZE + 1, None), (SIZE + 1, 0), (1 << 40, 1)):
            with self.no_task_left(), must_raise(ValueError, f"open(offset={offset}, length={length}) must be refused"):
                await (await backend.open("ranged", offset=offset, length=length)).aclose()

    async def test_empty_object(self, backend: StorageBackend) -> None:
        """An empty object opens, from its start, which is also its end."""
        await backend.put_bytes("empty", b"")
        same_bytes(await read_all(backend, "empty"), b"", "an empty object")
        same_bytes(await read_all(backend, "empty", 0, 10), b"", "ten bytes of an empty object")
        with must_raise(ValueError, "an offset past the end of an empty object must be refused"):
            await (await backend.open("empty", offset=1)).aclose()

    async def test_read_sizes(self, backend: StorageBackend) -> None:
        """`read(n)` gives at most n bytes and some until the end; a negative n gives all that is left; then there is nothing."""
        content = self.content("parts")
        await backend.put_bytes("sizes", content)
        reader = await backend.open("sizes")
        position = 0
        for size in (1, 2, 1000, 4096, 65536):
            chunk = await reader.read(size)
            assert 0 < len(chunk) <= size, f"read({size}) in the middle of an object returned {len(chunk)} bytes"
            same_bytes(chunk, content[position : position + len(chunk)], f"read({size}) at {position}")
            position += len(chunk)
        same_bytes(await reader.read(-1), content[position:], "read(-1) must return all that is left")
        assert await reader.read(1) == b"", "read(1) at the end must return nothing"
        assert await reader.read(-1) == b"", "read(-1) at the end must return nothing"
        await reader.aclose()

    async def test_reader_info(self, backend: StorageBackend) -> None:
        """A reader knows of its object what `stat` knows, under the same location."""
        await backend.put_bytes("known/object", b"12345", content_type="text/plain")
        reader = await backend.open("known/object")
        await reader.aclose()
        assert reader.info == await backend.stat("known/object"), "a reader's info differs from stat()"

    async def test_closed_reader(self, backend: StorageBackend) -> None:
        """A reader closes any number of times, and a closed one raises: an early end would look like the end of the object."""
        await backend.put_bytes("closed", self.content("parts"))
        reader = await backend.open("closed")
        await reader.read(1)
        await reader.aclose()
        await reader.aclose()
        with must_raise((ValueError, BackendError), "reading from a closed reader must raise"):
            await reader.read(1)

    async def test_reopened_reader(self, backend: StorageBackend) -> None:
        """A reader that supports it opens a range of its own object again, also when it is closed, and of no other object."""
        content = pattern(SIZE)
        await backend.put_bytes("reopened", content)
        reader = await backend.open("reopened", offset=100)
        await reader.aclose()
        if not isinstance(reader, SupportsReopen):
            return
        assert reader.max_attempts >= 1, f"a reader says max_attempts={reader.max_attempts}"
        again = await reader.reopen(300, 400)
        same_bytes(await again.read(-1), content[300:700], "a range that was opened again")
        await again.aclose()
        assert again.info == reader.info, f"a reader that was opened again knows {again.info}, not {reader.info}"
        await backend.delete("reopened")
        await backend.put_bytes("reopened", content[::-1])
        try:
            other = await reader.reopen(300, 400)
        except BackendError:
            return
        found = await other.read(-1)
        await other.aclose()
        if other.info == reader.info or found == content[300:700]:
            same_bytes(found, content[300:700], "a reader was opened again on another object, and says that it is the same")

    async def test_concurrent_ranges(self, backend: StorageBackend) -> None:
        """An object read in many ranges at a time is the same object."""
        content = self.content("parts")
        await backend.put_bytes("ranges", content)
        step = len(content) // 16 + 1
        parts = await asyncio.gather(*(read_all(backend, "ranges", start, step, 5000) for start in range(0, len(content), step)))
        same_bytes(b"".join(parts), content, "16 ranges read at a time")

    async def test_independent_readers(self, backend: StorageBackend) -> None:
        """Two readers of one object do not move each other."""
        content = pattern(SIZE)
        await backend.put_bytes("twice", content)
        async with aclosing(await backend.open("twice")) as one, aclosing(await backend.open("twice", offset=500)) as other:
            head = await one.read(10)
            await other.aclose()
            same_bytes(head + await one.read(-1), content, "a reader beside another one that was closed")

    async def test_abandoned_readers(self, backend: StorageBackend) -> None:
        """Readers that are closed after their first bytes hold nothing: any number can follow each other."""
        content = self.content("parts")
        await backend.put_bytes("abandoned", content)
        with self.no_task_left():
            async with asyncio.timeout(self.patience):
                for _ in range(40):
                    reader = await backend.open("abandoned")
                    assert await reader.read(10), "the first read of an object returned nothing"
                    await reader.aclose()
                same_bytes(await read_all(backend, "abandoned"), content, "after 40 abandoned readers")

    async def test_many_readers(self, backend: StorageBackend) -> None:
        """A hundred readers at a time all end."""
        content = pattern(SIZE)
        await backend.put_bytes("popular", content)
        async with asyncio.timeout(self.patience):
            for found in await asyncio.gather(*(read_all(backend, "popular", step=300) for _ in range(100))):
                same_bytes(found, content, "one of a hundred readers")

    async def test_deleted_while_open(self, backend: StorageBackend) -> None:
        """A reader whose object is deleted gives all of it or raises; it never ends short."""
        content = self.content("parts")
        await backend.put_bytes("vanishing", content)
        async with aclosing(await backend.open("vanishing")) as reader:
            head = await reader.read(10)
            await backend.delete("vanishing")
            try:
                rest = await reader.read(-1)
            except BackendError:
                return
            same_bytes(head + rest, content, "a reader whose object was deleted ended short")

    @pytest.mark.parametrize("moment", ["at once", "a little later", "twice"])
    async def test_cancelled_read(self, backend: StorageBackend, moment: Moment) -> None:
        """Opening and reading can be cancelled at any await: the cancellation is raised and nothing is left running."""
        content = self.content("parts")
        await backend.put_bytes("read", content)

        with self.no_task_left():
            async for step, task, struck in cancel_at_every_await(lambda _: read_all(backend, "read", step=100_000), moment):
                self.was_cancelled(task, struck, f"a read that was cancelled {moment} at its await {step}")
        same_bytes(await read_all(backend, "read"), content, "after cancelled reads")

    async def test_undeclared_condition(self, backend: StorageBackend) -> None:
        """A conditional read is not among the promises, so it raises, and is not ignored."""
        await backend.put_bytes("condition", b"...")
        open_if: Any = backend.open
        with must_raise(TypeError, "open() with an unknown condition must raise"):
            await (await open_if("condition", if_match="another")).aclose()

    async def test_stat(self, backend: StorageBackend) -> None:
        """An object's size, the time it was published, with a zone, and its location are known."""
        earliest = datetime.now(UTC) - timedelta(seconds=self.clock_skew + 1)
        await backend.put_bytes("known/object", b"12345")
        latest = datetime.now(UTC) + timedelta(seconds=self.clock_skew)
        info = await backend.stat("known/object")
        assert isinstance(info, ObjectInfo), f"stat() returned {info!r}, not an ObjectInfo"
        assert info.location == "known/object", f"stat() says location={info.location!r}"
        assert info.size == 5, f"stat() says {info.size} bytes instead of 5"
        assert info.modified.tzinfo is not None, "stat() gives a time without a zone"
        assert earliest <= info.modified <= latest, f"stat() says {info.modified}, but it is between {earliest} and {latest}"
        assert await backend.stat("known/object") == info, "stat() of an object that has not changed has changed"

    async def test_etag(self, backend: StorageBackend) -> None:
        """An etag changes when the bytes do, and else not; where that is declared off, there is none."""
        await backend.put_bytes("tagged", b"one")
        first = (await backend.stat("tagged")).etag
        if not self.keeps_etag:
            assert first is None, f"keeps_etag is declared off, but stat() gives {first!r}"
            return
        assert isinstance(first, str), f"stat() gives the etag {first!r}"
        assert first, "stat() gives an empty etag"
        await backend.delete("tagged")
        await backend.put_bytes("tagged", b"two")
        assert (await backend.stat("tagged")).etag != first, "other bytes at the same location have the same etag"

    async def test_listed_as_stat_says(self, backend: StorageBackend) -> None:
        """A listing and `stat` agree on size, time (to the second) and etag."""
        for number in range(3):
            await backend.put_bytes(f"agreed/{number}", bytes(number))
        for info in await infos(backend):
            stated = await backend.stat(info.location)
            assert (info.size, info.etag) == (stated.size, stated.etag), f"listed as {info}, but stat() says {stated}"
            apart = abs((info.modified - stated.modified).total_seconds())
            assert apart < 1, f"listed with the time {info.modified}, but stat() says {stated.modified}"
