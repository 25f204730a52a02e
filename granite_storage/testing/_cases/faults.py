"""Faults: a full store, a refused permission, a lost answer, a killed process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from granite_storage.backends.base import StorageBackend, SupportsCleanup
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendUnavailableError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
)
from granite_storage.testing._cases.base import Cases, chunked, held, infos, listed, must_raise, pattern
from granite_storage.testing._cases.write import VERBS, put

__all__ = ["FaultCases"]

_WRITE_ELSEWHERE = """
import asyncio, os, signal
{make_backend}
async def stream():
    for _ in range({chunks}):
        yield bytes(65536)
    if {during}:
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
async def main():
    await backend.put_stream({location!r}, stream())
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


class FaultCases(Cases):
    """What a backend owes when something breaks."""

    @pytest.mark.parametrize("verb", VERBS)
    async def test_full_store(self, backend: StorageBackend, verb: str) -> None:
        """A write that does not fit is a `StorageFullError` that names the location; nothing of it is kept, and it can go on."""
        self.needs("can_be_full")
        room = self.parts_size
        async with self.with_room_for(backend, room) as small:
            await small.put_bytes("first", b"fits")
            for attempt in (1, 2):
                promise = f"{verb} of more than fits must be refused"
                with self.no_task_left(), must_raise(StorageFullError, promise, location="huge"):
                    await put(small, verb, "huge", pattern(2 * room))
                await self.require_absent(small, "huge", f"after {verb} number {attempt} to a full store")
            await self.require_whole(small, "first", b"fits", "after the store was full")
            await small.put_bytes("second", b"fits too")
            await self.require_whole(small, "second", b"fits too", "after the store was full")

    @pytest.mark.parametrize(
        "verb", ["put_bytes", "put_stream", "open", "stat", "exists", "delete", "iter_objects", "open missing", "exists missing"]
    )
    async def test_refused_permission(self, backend: StorageBackend, verb: str) -> None:
        """A refused permission is an `AccessDeniedError`, never "missing", "there" or success."""
        self.needs("can_refuse")
        await backend.put_bytes("there", b"...")
        async with self.refusing(backend) as refusing:
            calls = _calls(refusing)
            with self.no_task_left(), must_raise(AccessDeniedError, f"{verb} without permission must be refused"):
                await calls[verb]()
        await self.require_whole(backend, "there", b"...", "after refused calls")
        assert await listed(backend) == ["there"], "refused calls changed the store"

    @pytest.mark.parametrize("verb", ["put_bytes", "put_stream", "open", "stat", "exists", "delete", "iter_objects"])
    async def test_unreachable_store(self, backend: StorageBackend, verb: str) -> None:
        """A store out of reach is a `BackendUnavailableError`, and nothing is left running."""
        self.needs("can_be_unreachable")
        async with self.unreachable(backend) as unreachable:
            calls = _calls(unreachable)
            with self.no_task_left(), must_raise(BackendUnavailableError, f"{verb} on a store out of reach must raise") as caught:
                async with asyncio.timeout(self.patience):
                    await calls[verb]()
        assert not isinstance(caught.error, OSError), "an error of the library must not be an OSError"
        assert caught.error.__cause__ is not None, "the error of the system or the SDK must be the cause"

    @pytest.mark.parametrize(("verb", "kind"), [("put_bytes", "small"), ("put_stream", "small"), ("put_stream", "parts")])
    async def test_lost_answer_of_a_write(self, backend: StorageBackend, verb: str, kind: str) -> None:
        """A write whose answer is lost succeeds, and is stored once."""
        self.needs("can_lose_answers")
        content = self.content(kind)
        async with self.losing_answers(backend, "put_stream" if kind == "parts" else "put_bytes") as lossy:
            await put(lossy, verb, "settled", content)
        await self.require_whole(backend, "settled", content, f"after {verb} whose answer was lost")
        await self.require_nothing_unfinished(backend, "after a write whose answer was lost")

    async def test_lost_answer_of_a_delete(self, backend: StorageBackend) -> None:
        """A delete whose answer is lost ends with the object gone."""
        self.needs("can_lose_answers")
        await backend.put_bytes("settled", b"...")
        async with self.losing_answers(backend, "delete") as lossy:
            await lossy.delete("settled")
        await self.require_absent(backend, "settled", "after a delete whose answer was lost")

    @pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.03])
    async def test_late_write_after_a_delete(self, backend: StorageBackend, delay: float) -> None:
        """A write that is cancelled in progress and then deleted does not come up later."""
        writer = asyncio.ensure_future(put(backend, "put_stream", "late", self.content("parts")))
        await asyncio.sleep(delay)
        writer.cancel()
        await asyncio.wait([writer])
        await backend.delete("late")
        await asyncio.sleep(0.05)
        await self.require_absent(backend, "late", "after a cancelled write and a delete")
        await self.require_nothing_unfinished(backend, "after a cancelled write and a delete")

    async def test_killed_writer(self, backend: StorageBackend) -> None:
        """A process killed during a write leaves no object, and what it leaves can be cleared away."""
        self.needs("is_shared")
        await self._write_elsewhere(backend, "killed/object", during=True)
        await self.require_absent(backend, "killed/object", "after its writer was killed")
        assert await listed(backend) == [], "what a killed writer left is listed"
        if isinstance(backend, SupportsCleanup):
            await asyncio.sleep(0.01)
            await backend.cleanup_incomplete(older_than=timedelta(0))
            await self.require_nothing_unfinished(backend, "after a writer was killed, and a clean-up")
        await backend.put_bytes("killed/object", b"second")
        await self.require_whole(backend, "killed/object", b"second", "written again after its writer was killed")

    async def test_killed_after_a_write(self, backend: StorageBackend) -> None:
        """A process killed right after a write returned leaves the whole object, for other processes to read."""
        self.needs("is_shared")
        await self._write_elsewhere(backend, "written/object", during=False)
        await self.require_whole(backend, "written/object", bytes(self.parts_size), "after its writer was killed")

    async def test_cleanup_leaves_what_is_under_way(self, backend: StorageBackend) -> None:
        """Clearing away what is old disturbs no write in progress and no object."""
        cleaner = self.require_ability(backend, SupportsCleanup)
        reached, go_on = asyncio.Event(), asyncio.Event()
        content = self.content("parts")
        await backend.put_bytes("old", b"...")
        writer = asyncio.ensure_future(backend.put_stream("under/way", held(content, reached, go_on)))
        try:
            await self.reach(reached, writer)
            removed = await cleaner.cleanup_incomplete(older_than=timedelta(hours=1))
            assert removed == 0, f"cleanup_incomplete removed {removed} thing(s) that are not old"
        finally:
            go_on.set()
            await writer
        await self.require_whole(backend, "under/way", content, "after a clean-up beside it")
        await self.require_whole(backend, "old", b"...", "after a clean-up")

    async def test_cleanup_of_nothing(self, backend: StorageBackend) -> None:
        """Where nothing is unfinished a clean-up removes nothing, in an empty store too."""
        cleaner = self.require_ability(backend, SupportsCleanup)
        assert await cleaner.cleanup_incomplete(older_than=timedelta(0)) == 0, "a clean-up of an empty store removed something"
        await backend.put_bytes("kept", b"...")
        assert await cleaner.cleanup_incomplete(older_than=timedelta(0)) == 0, "a clean-up removed something that was finished"
        await self.require_whole(backend, "kept", b"...", "after a clean-up")

    async def test_errors_are_of_the_family(self, backend: StorageBackend) -> None:
        """An error is a `StorageError`, and not an `OSError`, which web frameworks take for a client that disconnected."""
        with must_raise(ObjectNotFoundError, "open() of a missing object must raise") as caught:
            await backend.open("missing")
        assert isinstance(caught.error, StorageError), f"{caught.error!r} is not a StorageError"
        assert not isinstance(caught.error, OSError), f"{caught.error!r} is an OSError"

    async def _write_elsewhere(self, backend: StorageBackend, location: str, *, during: bool) -> None:
        source = _WRITE_ELSEWHERE.format(
            make_backend=self.elsewhere(backend), chunks=self.parts_size // 65536, during=during, location=location
        )
        done = await self.run_elsewhere(source)
        assert done.returncode == -9, f"the other process did not get to its end: {done.stderr.decode()[-2000:]}"


def _calls(backend: StorageBackend) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every call of a backend, by name."""
    return {
        "put_bytes": lambda: backend.put_bytes("new", b"..."),
        "put_stream": lambda: backend.put_stream("new", chunked(b"...")),
        "open": lambda: backend.open("there"),
        "stat": lambda: backend.stat("there"),
        "exists": lambda: backend.exists("there"),
        "delete": lambda: backend.delete("there"),
        "iter_objects": lambda: infos(backend),
        "open missing": lambda: backend.open("missing"),
        "exists missing": lambda: backend.exists("missing"),
    }
