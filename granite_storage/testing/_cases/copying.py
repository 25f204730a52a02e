"""Copy, where it is declared."""

from __future__ import annotations

import asyncio

import pytest

from granite_storage.backends.base import StorageBackend, SupportsCopy
from granite_storage.exceptions import ObjectExistsError, ObjectNotFoundError
from granite_storage.testing._cases.base import Cases, listed, must_raise
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await

__all__ = ["CopyCases"]


class CopyCases(Cases):
    """Copying inside the store."""

    @pytest.mark.parametrize("kind", ["empty", "small", "parts"])
    async def test_copy(self, backend: StorageBackend, kind: str) -> None:
        """A copy has the bytes and the content type of its source, and a time of its own."""
        content = self.content(kind)
        await backend.put_bytes("source", content, content_type="image/png")
        await self.require_ability(backend, SupportsCopy).copy("source", "target/copy")
        await self.require_whole(backend, "target/copy", content, "a copy")
        await self.require_whole(backend, "source", content, "the source of a copy")
        source, copy = await backend.stat("source"), await backend.stat("target/copy")
        assert copy.content_type == source.content_type, f"a copy has the content type {copy.content_type!r}"
        assert copy.modified >= source.modified, "a copy is older than its source"

    async def test_copy_stands_alone(self, backend: StorageBackend) -> None:
        """Deleting the source leaves the copy, and the other way round."""
        content = self.content("small")
        await backend.put_bytes("source", content)
        await self.require_ability(backend, SupportsCopy).copy("source", "one")
        await self.require_ability(backend, SupportsCopy).copy("source", "two")
        await backend.delete("one")
        await self.require_whole(backend, "source", content, "after its copy was deleted")
        await backend.delete("source")
        await self.require_whole(backend, "two", content, "after its source was deleted")

    async def test_copy_of_nothing(self, backend: StorageBackend) -> None:
        """A missing source is not found, the error names it, and there is no target."""
        with must_raise(ObjectNotFoundError, "a copy of a missing object must fail", location="missing"):
            await self.require_ability(backend, SupportsCopy).copy("missing", "target")
        await self.require_absent(backend, "target", "after a copy of nothing")

    @pytest.mark.parametrize("target", ["target", "source"])
    async def test_copy_never_overwrites(self, backend: StorageBackend, target: str) -> None:
        """A target that has an object, the source itself among them, is refused and stays as it was."""
        copier = self.require_ability(backend, SupportsCopy)
        await backend.put_bytes("source", b"the source")
        await backend.put_bytes("target", b"the target")
        before = await backend.stat(target)
        with must_raise(ObjectExistsError, f"a copy to {target!r}, which has an object, must be refused", location=target):
            await copier.copy("source", target)
        assert await backend.stat(target) == before, "a refused copy changed its target"
        await self.require_whole(backend, target, f"the {target}".encode(), "after a refused copy")

    async def test_race_of_copies(self, backend: StorageBackend) -> None:
        """Of several copies to one location exactly one succeeds, or at least one where that is declared off."""
        copier = self.require_ability(backend, SupportsCopy)
        await backend.put_bytes("source", self.content("small"))
        results = await asyncio.gather(*(copier.copy("source", "target") for _ in range(4)), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        made = 4 - len(errors)
        assert made == 1 or (made and not self.settles_races_of_copies), (
            f"{made} of 4 copies to one location were told that they made it"
        )
        assert all(isinstance(error, ObjectExistsError) for error in errors), f"the others must get ObjectExistsError: {errors}"
        await self.require_whole(backend, "target", self.content("small"), "after a race of copies")

    @pytest.mark.parametrize("moment", ["at once", "a little later"])
    async def test_cancelled_copy(self, backend: StorageBackend, moment: Moment) -> None:
        """A copy cancelled at any of its awaits raises the cancellation and leaves nothing; the source stays."""
        content, copier = self.content("parts"), self.require_ability(backend, SupportsCopy)
        await backend.put_bytes("source", content)

        whole = ["source"]
        with self.no_task_left():
            async for step, task, struck in cancel_at_every_await(lambda step: copier.copy("source", f"target/{step}"), moment):
                why = f"a copy that was cancelled {moment} at its await {step}"
                if self.was_cancelled(task, struck, why):
                    await self.require_absent(backend, f"target/{step}", why)
                    continue
                await self.require_whole(backend, f"target/{step}", content, f"a copy that completed before await {step}")
                whole.append(f"target/{step}")
        assert await listed(backend) == sorted(whole), "cancelled copies are listed"
        await self.require_whole(backend, "source", content, "after cancelled copies")
        await self.require_nothing_unfinished(backend, "after cancelled copies")
