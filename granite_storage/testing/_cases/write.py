"""Write: what is stored is all there or not at all, and never over something else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import pytest

from granite_storage.backends.base import StorageBackend
from granite_storage.exceptions import (
    BackendError,
    ChecksumMismatchError,
    ContentTooLargeError,
    ObjectExistsError,
    ObjectNotFoundError,
    SizeMismatchError,
)
from granite_storage.manager import StorageManager
from granite_storage.policies import StoragePolicy
from granite_storage.testing._cases.base import (
    CHUNK,
    Cases,
    chunked,
    digest,
    held,
    listed,
    must_raise,
    pattern,
    read_all,
    same_bytes,
)
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await

__all__ = ["WriteCases"]

KINDS = ["empty", "byte", "small", "parts"]
VERBS = ["put_bytes", "put_stream"]
ODD_SIZES = [1, 2, 3, 5, 7, 11, 13, 127, 1, 255, 4095, 1, 4097, 8191, 65537, 1, 99991]


async def put(
    backend: StorageBackend, verb: str, location: str, content: bytes, *, content_type: str | None = None
) -> Mapping[str, Any] | None:
    """Store content by one of the two verbs."""
    if verb == "put_bytes":
        return await backend.put_bytes(location, content, content_type=content_type)
    return await backend.put_stream(location, chunked(content), content_type=content_type)


class WriteCases(Cases):
    """Writing."""

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("kind", KINDS)
    async def test_round_trip(self, backend: StorageBackend, verb: str, kind: str) -> None:
        """What was stored is read back, byte for byte; empty content is an object of size 0."""
        content = self.content(kind)
        await put(backend, verb, "round/trip", content)
        await self.require_whole(backend, "round/trip", content, f"after {verb} of {len(content)} bytes")

    async def test_chunks_of_odd_sizes(self, backend: StorageBackend) -> None:
        """How a stream is cut into chunks leaves no trace in what is stored."""
        content = pattern(self.parts_size + 12345)
        await backend.put_stream("odd/chunks", chunked(content, ODD_SIZES))
        stored = await read_all(backend, "odd/chunks")
        assert digest(stored) == digest(content), "a stream in chunks of odd sizes is not what was read back"

    async def test_chunks_as_large_as_they_come(self, backend: StorageBackend) -> None:
        """Chunks of 1 MiB, the largest there are, and a rest are stored in order."""
        content = pattern(2 * CHUNK + 17)
        await backend.put_stream("large/chunks", chunked(content, [CHUNK, CHUNK]))
        same_bytes(await read_all(backend, "large/chunks"), content, "a stream of 1 MiB chunks")

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("content_type", ["image/png", 'text/plain; charset="utf-8"'])
    async def test_content_type(self, backend: StorageBackend, verb: str, content_type: str) -> None:
        """The content type is kept as given, or, where that is declared off, there is none."""
        await put(backend, verb, "typed", b"...", content_type=content_type)
        kept = (await backend.stat("typed")).content_type
        expected = content_type if self.keeps_content_type else None
        assert kept == expected, f"stored as {content_type!r}, stat() says {kept!r} instead of {expected!r}"

    @pytest.mark.parametrize("verb", VERBS)
    async def test_result_joins_the_ref(self, backend: StorageBackend, verb: str) -> None:
        """A write returns nothing, or a mapping that can be kept as JSON."""
        result = await put(backend, verb, "result", b"...")
        assert result is None or isinstance(result, Mapping), f"{verb} returned {result!r}, neither a mapping nor None"
        assert result is None or json.loads(json.dumps(dict(result))) == dict(result), f"{verb} returned what JSON cannot keep"

    @pytest.mark.parametrize("kind", ["small", "parts"])
    @pytest.mark.parametrize("verb", VERBS)
    async def test_never_overwrites(self, backend: StorageBackend, verb: str, kind: str) -> None:
        """A location that has an object is refused with an error that names it, and the object stays as it was."""
        first = self.content("small")
        await backend.put_bytes("taken", first, content_type="text/plain")
        before = await backend.stat("taken")
        with must_raise(ObjectExistsError, f"{verb} to a location that has an object must be refused", location="taken"):
            await put(backend, verb, "taken", self.content(kind)[::-1], content_type="text/html")
        assert await backend.stat("taken") == before, "a refused write changed what stat() says of the object that was there"
        await self.require_whole(backend, "taken", first, "after a refused second write")
        await self.require_nothing_unfinished(backend, "after a refused second write")

    async def test_a_deleted_location_is_free(self, backend: StorageBackend) -> None:
        """After a delete the location can be written again, and the old content never comes back."""
        await backend.put_bytes("again", b"first")
        await backend.delete("again")
        await backend.put_bytes("again", b"the second")
        await self.require_whole(backend, "again", b"the second", "after put, delete, put")

    @pytest.mark.parametrize("kind", ["small", "parts"])
    async def test_unfinished_write_is_invisible(self, backend: StorageBackend, kind: str) -> None:
        """No reader sees the object before the stream has ended; then every reader sees all of it."""
        content, reached, go_on = self.content(kind), asyncio.Event(), asyncio.Event()
        writer = asyncio.ensure_future(backend.put_stream("being/written", held(content, reached, go_on)))
        try:
            await self.reach(reached, writer)
            await self.require_absent(backend, "being/written", "while its stream has not ended")
        finally:
            go_on.set()
            await writer
        await self.require_whole(backend, "being/written", content, "after its stream has ended")

    @pytest.mark.parametrize("kind", ["empty", "small", "parts"])
    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("the source broke"),
            ConnectionResetError("the client disconnected"),
            TimeoutError("the source is slow"),
            ObjectNotFoundError("another backend's error", location="elsewhere"),
            ChecksumMismatchError("the check at the end failed"),
            asyncio.CancelledError("the source was cancelled"),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_source_raises(self, backend: StorageBackend, error: BaseException, kind: str) -> None:
        """An error of the stream, also one at its very end, comes out as the same object, and nothing is left."""
        with self.no_task_left(), must_raise(type(error), "the stream's error must come out") as caught:
            await backend.put_stream("broken", chunked(self.content(kind), error=error))
        assert caught.error is error, f"the stream raised {error!r}, but another object came out: {caught.error!r}"
        await self.require_absent(backend, "broken", "after its stream raised")
        await self.require_nothing_unfinished(backend, "after a stream raised")

    async def test_source_raises_over_an_object(self, backend: StorageBackend) -> None:
        """A failing write to a location that has an object leaves that object alone when it clears up."""
        await backend.put_bytes("kept", b"first")
        with must_raise((ObjectExistsError, RuntimeError), "a failing write to a taken location must fail"):
            await backend.put_stream("kept", chunked(self.content("parts"), error=RuntimeError("the source broke")))
        await self.require_whole(backend, "kept", b"first", "after a failing second write")

    @pytest.mark.parametrize("moment", ["at once", "a little later", "twice"])
    @pytest.mark.parametrize(("verb", "kind"), [("put_bytes", "small"), ("put_stream", "small"), ("put_stream", "parts")])
    async def test_cancelled_write(self, backend: StorageBackend, verb: str, kind: str, moment: Moment) -> None:
        """A write cancelled at any of its awaits raises the cancellation and leaves nothing: no object, part or task."""
        content = self.content(kind)

        def write(step: int) -> Any:
            return put(backend, verb, f"cancelled/{step}", content)

        whole: list[str] = []
        with self.no_task_left():
            async for step, task, struck in cancel_at_every_await(write, moment):
                why, location = f"{verb} cancelled {moment} at its await {step}", f"cancelled/{step}"
                if self.was_cancelled(task, struck, why):
                    await self.require_absent(backend, location, why)
                else:
                    whole.append(location)
                    await self.require_whole(backend, location, content, f"{verb} completed before await {step}")
        assert await listed(backend) == sorted(whole), "cancelled writes are listed"
        await self.require_nothing_unfinished(backend, "after cancelled writes")

    @pytest.mark.parametrize("verb", VERBS)
    async def test_cancelled_second_write(self, backend: StorageBackend, verb: str) -> None:
        """A cancelled write to a location that has an object leaves that object alone when it clears up."""
        first = self.content("small")
        await backend.put_bytes("kept", first)

        async for step, task, _ in cancel_at_every_await(lambda _: put(backend, verb, "kept", self.content("parts")), "at once"):
            assert task.cancelled() or isinstance(task.exception(), ObjectExistsError), "a second write was not refused"
            await self.require_whole(backend, "kept", first, f"after a second {verb} was cancelled at its await {step}")

    async def test_timeout(self, backend: StorageBackend) -> None:
        """`asyncio.timeout` around a write from a source that never ends stops it, and nothing is left."""
        endless = held(b"some", asyncio.Event(), asyncio.Event())
        with self.no_task_left(), must_raise(TimeoutError, "asyncio.timeout must end a write"):
            async with asyncio.timeout(0.05):
                await backend.put_stream("slow", endless)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0, "a cancellation was swallowed on its way to asyncio.timeout"
        await self.require_absent(backend, "slow", "after a timeout")
        await self.require_nothing_unfinished(backend, "after a timeout")

    async def test_failing_sibling(self, backend: StorageBackend) -> None:
        """A write in a task group ends when another task of the group fails, and nothing is left."""
        started = asyncio.Event()

        async def fail() -> None:
            await started.wait()
            raise RuntimeError("the sibling failed")

        with self.no_task_left(), must_raise(ExceptionGroup, "the task group must end"):
            async with asyncio.timeout(self.patience), asyncio.TaskGroup() as group:
                group.create_task(backend.put_stream("sibling", held(self.content("small"), started, asyncio.Event())))
                group.create_task(fail())
        await self.require_absent(backend, "sibling", "after a task of the same group failed")

    async def test_many_writers(self, backend: StorageBackend) -> None:
        """Twenty writers at a time, then twenty readers: each gets its own bytes."""
        contents = {f"writers/{number:02}": pattern(20_000 + number, number) for number in range(20)}
        await asyncio.gather(*(put(backend, VERBS[number % 2], *item) for number, item in enumerate(contents.items())))
        stored = await asyncio.gather(*(read_all(backend, location) for location in contents))
        for (location, content), found in zip(contents.items(), stored, strict=True):
            same_bytes(found, content, f"{location}, one of twenty written at a time")
        assert await listed(backend) == sorted(contents), "twenty writers at a time: the listing is not the twenty"

    @pytest.mark.parametrize(("verb", "kind"), [("put_bytes", "small"), ("put_stream", "small"), ("put_stream", "parts")])
    async def test_race_for_one_location(self, backend: StorageBackend, verb: str, kind: str) -> None:
        """Of several writers to one location exactly one wins, the others are refused, and the winner's content stays."""
        contents = [bytes([65 + number]) * len(self.content(kind)) for number in range(4)]
        results = await asyncio.gather(*(put(backend, verb, "race", content) for content in contents), return_exceptions=True)
        winners = [number for number, result in enumerate(results) if not isinstance(result, BaseException)]
        losers = [result for result in results if isinstance(result, BaseException)]
        settled = kind != "parts" or self.settles_races_in_parts
        assert len(winners) == 1 or (winners and not settled), (
            f"{len(winners)} of 4 writers to one location were told that they won"
        )
        assert all(isinstance(error, ObjectExistsError) for error in losers), f"the losers must get ObjectExistsError: {losers}"
        stored = await read_all(backend, "race")
        assert stored in [contents[winner] for winner in winners], "after a race the object is not what a winner wrote"
        await self.require_whole(backend, "race", stored, "after a race")
        await self.require_nothing_unfinished(backend, "after a race")

    async def test_interleaved_writers(self, backend: StorageBackend) -> None:
        """Two streams that advance in turns never mix."""
        contents = [pattern(self.parts_size + number, number) for number in (1, 2)]
        turns = [asyncio.Semaphore(1), asyncio.Semaphore(0)]

        async def alternating(own: int) -> AsyncIterator[bytes]:
            async for chunk in chunked(contents[own]):
                await turns[own].acquire()
                yield chunk
                turns[1 - own].release()
            turns[1 - own].release()

        async with asyncio.timeout(self.patience):
            await asyncio.gather(*(backend.put_stream(f"turns/{number}", alternating(number)) for number in (0, 1)))
        for number in (0, 1):
            same_bytes(await read_all(backend, f"turns/{number}"), contents[number], "one of two interleaved writes")

    async def test_bounded_memory(self, backend: StorageBackend) -> None:
        """A large stream is stored and read back in memory that does not grow with it."""
        sent, received = hashlib.sha256(), hashlib.sha256()

        async def large() -> AsyncIterator[bytes]:
            for number in range(self.large_size // CHUNK):
                chunk = bytes([number % 251]) * CHUNK
                sent.update(chunk)
                yield chunk

        async def send() -> None:
            await backend.put_stream("large", large())

        async def receive() -> None:
            async with aclosing(await backend.open("large")) as reader:
                while chunk := await reader.read(CHUNK):
                    received.update(chunk)

        await backend.put_bytes("warm", b"...")  # what a first call opens is not what a stream takes
        await read_all(backend, "warm")
        for what, call in (("storing", send), ("reading", receive)):
            growth = await _memory_growth(call)
            assert growth <= self.memory_growth, (
                f"{what} {self.large_size >> 20} MiB took {growth >> 20} MiB of memory, allowed are {self.memory_growth >> 20}"
            )
        assert received.digest() == sent.digest(), "a large stream was not read back as it was stored"

    @pytest.mark.parametrize(
        ("declared", "error"),
        [
            ({"checksum": "sha256:" + "0" * 64}, ChecksumMismatchError),
            ({"size": 999}, SizeMismatchError),
            ({"size": 1001}, SizeMismatchError),
        ],
        ids=["checksum", "shorter", "longer"],
    )
    async def test_wrong_declaration(self, backend: StorageBackend, declared: dict[str, Any], error: type[Exception]) -> None:
        """Through a manager, content that is not what its sender declared is refused, and nothing of it is kept."""
        with must_raise(error, f"content that is not as declared ({declared}) must be refused"):
            await _put_through_manager(backend, chunked(self.content("small")), **declared)
        assert await listed(backend) == [], "content that is not as declared was kept"
        await self.require_nothing_unfinished(backend, "after content that was not as declared")

    async def test_over_the_limit(self, backend: StorageBackend) -> None:
        """Through a manager, a stream one byte over the policy's limit is refused, one of exactly the limit is stored."""
        limit = self.parts_size
        with must_raise(ContentTooLargeError, "a stream over the limit must be refused"):
            await _put_through_manager(backend, chunked(pattern(limit + 1)), max_size=limit)
        assert await listed(backend) == [], "content over the limit was kept"
        await self.require_nothing_unfinished(backend, "after content over the limit")
        await _put_through_manager(backend, chunked(pattern(limit)), max_size=limit)
        assert len(await listed(backend)) == 1, "content of exactly the limit was not kept"

    @pytest.mark.parametrize("verb", VERBS)
    async def test_undeclared_option(self, backend: StorageBackend, verb: str) -> None:
        """An option that the backend does not have raises, and is not ignored."""
        write: Any = getattr(backend, verb)
        with must_raise(TypeError, f"{verb} with an unknown option must raise"):
            await write("option", b"" if verb == "put_bytes" else chunked(b""), overwrite=True)
        await self.require_absent(backend, "option", "after an unknown option")


async def _memory_growth(call: Callable[[], Awaitable[None]]) -> int:
    """Run a call and return by how many bytes Python's memory grew meanwhile, at most."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


async def _put_through_manager(
    backend: StorageBackend, stream: AsyncIterator[bytes], *, max_size: int | None = None, **declared: Any
) -> None:
    manager = StorageManager(backends={"it": backend}, policies={"files": StoragePolicy("files", "it", max_size=max_size)})
    try:
        await manager.put_stream(
            storage_key="files", model_name="model", entity_id="1", field_name="field", stream=stream, **declared
        )
    except BackendError as error:
        raise AssertionError(f"the manager blamed the backend: {error!r}") from error
