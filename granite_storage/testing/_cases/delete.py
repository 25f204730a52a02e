"""Delete, one by one and in batches."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from granite_storage.backends.base import StorageBackend, SupportsBatchDelete
from granite_storage.exceptions import AccessDeniedError, InvalidLocationError, ObjectNotFoundError, StorageError
from granite_storage.testing._cases.base import Cases, listed, must_raise, read_all, same_bytes
from granite_storage.testing._cases.cancelling import cancel_at_every_await

__all__ = ["DeleteCases"]


class DeleteCases(Cases):
    """Deleting."""

    async def test_deleted(self, backend: StorageBackend) -> None:
        """A deleted object is not found by any call."""
        await backend.put_bytes("doomed", self.content("parts"))
        await backend.delete("doomed")
        await self.require_absent(backend, "doomed", "after a delete")

    @pytest.mark.parametrize("location", ["missing", "missing/in/folders", "folder", "folder/object/below"])
    async def test_missing_is_silent(self, backend: StorageBackend, location: str) -> None:
        """Deleting what is not there is no error and harms nothing."""
        await backend.put_bytes("folder/object", b"...")
        await backend.delete(location)
        await backend.delete(location)
        await self.require_whole(backend, "folder/object", b"...", f"after delete({location!r})")

    async def test_delete_is_exact(self, backend: StorageBackend) -> None:
        """Deleting `a` leaves `a/b` and `ab`; deleting the last object of a folder leaves the other folders."""
        for location in ("a/b", "a/c", "ab", "b/c/d/e"):
            await backend.put_bytes(location, location.encode())
        await backend.delete("a")
        await backend.delete("b/c/d/e")
        await backend.delete("a/b")
        assert await listed(backend) == ["a/c", "ab"], "a delete took more or less than its object"

    @pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a")])
    async def test_object_and_folder_of_one_name(self, backend: StorageBackend, first: str, second: str) -> None:
        """`a` and `a/b` can both be objects, or, where that is declared off, the second may be refused; the first stays."""
        await backend.put_bytes(first, b"first")
        try:
            await backend.put_bytes(second, b"second")
            refused = False
        except StorageError:
            refused = True
        assert not (refused and self.nests_objects), f"nests_objects is declared, but {second!r} beside {first!r} was refused"
        if refused:
            await self.require_absent(backend, second, "after it was refused")
        else:
            await self.require_whole(backend, second, b"second", f"beside {first!r}")
            await backend.delete(second)
        await self.require_whole(backend, first, b"first", f"after {second!r} was deleted or refused")

    async def test_concurrent_deletes(self, backend: StorageBackend) -> None:
        """Deleting one object many times at once is not an error."""
        await backend.put_bytes("once", b"...")
        await asyncio.gather(*(backend.delete("once") for _ in range(10)))
        await self.require_absent(backend, "once", "after ten deletes at once")

    async def test_folders_come_and_go(self, backend: StorageBackend) -> None:
        """Writers and deleters in one folder at a time never make each other fail."""

        async def cycle(number: int) -> None:
            for turn in range(5):
                location = f"busy/folder/{number}-{turn}"
                await backend.put_bytes(location, b"...")
                await backend.delete(location)

        await asyncio.gather(*(cycle(number) for number in range(8)))
        assert await listed(backend) == [], "something is left of objects that were all deleted"

    async def test_cancelled_delete(self, backend: StorageBackend) -> None:
        """A delete can be cancelled at any await; the object is whole or gone, and a second delete ends it."""

        async def delete(step: int) -> None:
            await backend.delete(f"cancelled/{step}")

        await backend.put_bytes("cancelled/0", b"whole")
        with self.no_task_left():
            async for step, task, struck in cancel_at_every_await(delete, "at once"):
                location = f"cancelled/{step}"
                assert task.cancelled() or not struck, f"a delete cancelled at its await {step} swallowed the cancellation"
                with suppress(ObjectNotFoundError):  # now, or in a moment: what was on its way to a service may still arrive
                    same_bytes(await read_all(backend, location), b"whole", "after a cancelled delete")
                await backend.delete(location)
                await self.require_absent(backend, location, "after a cancelled and a second delete")
                await backend.put_bytes(f"cancelled/{step + 1}", b"whole")

    async def test_batch(self, backend: StorageBackend) -> None:
        """A batch over the service's limit is deleted to the last; what is missing is not a failure; the rest stays."""
        deleter = self.require_ability(backend, SupportsBatchDelete)
        names = [f"batch/{number:05}" for number in range(self.batch_size + 2)]
        there = [names[0], names[1], names[len(names) // 2], *names[-3:]]
        others = ["batch", "batches/1"] if self.nests_objects else ["batches/1"]
        await asyncio.gather(*(backend.put_bytes(location, b"...") for location in (*there, *others)))
        failures = await deleter.delete_many(names)
        assert dict(failures) == {}, f"a batch delete reports failures: {dict(failures)}"
        left = await listed(backend)
        assert left == others, f"after a batch delete {left} are there instead of {others}"

    async def test_batch_of_none(self, backend: StorageBackend) -> None:
        """An empty batch deletes nothing."""
        deleter = self.require_ability(backend, SupportsBatchDelete)
        await backend.put_bytes("kept", b"...")
        assert dict(await deleter.delete_many([])) == {}, "an empty batch reports failures"
        assert await listed(backend) == ["kept"], "an empty batch deleted something"

    async def test_batch_of_odd_locations(self, backend: StorageBackend) -> None:
        """A batch takes every location that a write takes, and the same one twice."""
        deleter = self.require_ability(backend, SupportsBatchDelete)
        locations = ["odd/a b", "odd/<&>'\"", "odd/%41+", "odd/\u00e9", "odd/e\u0301", "odd/\U0001f600"]
        for location in locations:
            await backend.put_bytes(location, b"...")
        assert dict(await deleter.delete_many([*locations, *locations])) == {}, "a batch of odd locations reports failures"
        assert await listed(backend) == [], "a batch of odd locations left some"

    async def test_batch_with_a_hostile_location(self, backend: StorageBackend) -> None:
        """A batch that has an unsafe location is refused before anything is deleted."""
        deleter = self.require_ability(backend, SupportsBatchDelete)
        await backend.put_bytes("kept", b"...")
        with must_raise(InvalidLocationError, "a batch with an unsafe location must be refused"):
            await deleter.delete_many(["kept", "../outside"])
        await self.require_whole(backend, "kept", b"...", "after a refused batch")

    async def test_batch_failures_are_named(self, backend: StorageBackend) -> None:
        """Each location that a batch could not delete is reported with its error, and nothing refused is reported as done."""
        self.require_ability(backend, SupportsBatchDelete, "can_refuse")
        await backend.put_bytes("refused/1", b"...")
        await backend.put_bytes("refused/2", b"...")
        async with self.refusing(backend) as refusing:
            batch: Any = refusing
            try:
                failures = dict(await batch.delete_many(["refused/1", "refused/2"]))
            except AccessDeniedError:
                failures = None
        if failures is not None:
            assert set(failures) == {"refused/1", "refused/2"}, f"the failures of a refused batch are {failures}"
            for location, error in failures.items():
                assert isinstance(error, AccessDeniedError), f"{location} was refused, but reported as {error!r}"
                assert error.location == location, f"the error of {location} says location={error.location!r}"
        assert await listed(backend) == ["refused/1", "refused/2"], "a refused batch deleted something"
