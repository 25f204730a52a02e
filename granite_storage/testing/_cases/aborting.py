"""Unfinished uploads that another program aborts, where the ability is declared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from granite_storage.backends.base import StorageBackend, SupportsAbort, upload_begun
from granite_storage.exceptions import BackendError
from granite_storage.testing._cases.base import Cases, chunked, held, must_raise

__all__ = ["AbortCases"]

LOCATION = "parts/object"


@dataclass(eq=False)
class Upload:
    """An upload that stands still before its end."""

    id: str | None
    go_on: asyncio.Event
    writer: asyncio.Future[Any]


class AbortCases(Cases):
    """Telling the ids of uploads, and aborting them."""

    async def test_upload_tells_its_id(self, backend: StorageBackend) -> None:
        """A multipart upload tells its id once, before its first part; any other write tells none."""
        self.require_ability(backend, SupportsAbort, "tells_upload_ids")
        content, told = self.content("parts"), list[str]()

        async def tell(upload_id: str) -> None:
            told.append(upload_id)

        upload_begun.set(tell)
        await backend.put_stream("small", chunked(self.content("small")))
        assert told == [], f"a write by one request told the id of an upload: {told}"
        await backend.put_stream(LOCATION, chunked(content))
        assert len(told) == 1, f"a multipart upload must tell its id once, but told {told}"
        assert told[0], "the id of an upload is empty"
        await self.require_whole(backend, LOCATION, content, "an upload that told its id")

    async def test_upload_that_may_not_go_on(self, backend: StorageBackend) -> None:
        """Where what is called with the id raises, the write raises that error and leaves nothing."""
        self.require_ability(backend, SupportsAbort, "tells_upload_ids")

        async def refuse(upload_id: str) -> None:
            raise LookupError(upload_id)

        upload_begun.set(refuse)
        with must_raise(LookupError, "the error of the function that receives the id must be raised"):
            await backend.put_stream(LOCATION, chunked(self.content("parts")))
        await self.require_absent(backend, LOCATION, "after an upload that might not go on")
        await self.require_nothing_unfinished(backend, "after an upload that might not go on")

    @pytest.mark.parametrize("known", ["by its id", "by its location"])
    async def test_aborted_upload(self, backend: StorageBackend, known: Literal["by its id", "by its location"]) -> None:
        """No part is left of an upload that was aborted, and its writer fails with an error of the family.

        A write without an id may still succeed, as if it had not been aborted: nothing of it could be found.
        """
        aborter, why = self.require_ability(backend, SupportsAbort), f"after an upload was aborted {known}"
        self._needs_ids(known)
        async with self._upload_in_progress(backend) as upload:
            await aborter.abort_upload(LOCATION, upload.id if known == "by its id" else None)
            await self.require_nothing_unfinished(backend, why)
            upload.go_on.set()
            if self.tells_upload_ids:
                with must_raise(BackendError, f"a write {why} must fail"):
                    await upload.writer
            else:
                with suppress(BackendError):
                    await upload.writer
                    await self.require_whole(backend, LOCATION, self.content("parts"), f"written {why}")
                await backend.delete(LOCATION)
        await self.require_absent(backend, LOCATION, why)
        await self.require_nothing_unfinished(backend, why)
        await backend.put_bytes(LOCATION, b"second")
        await self.require_whole(backend, LOCATION, b"second", f"written again {why}")

    @pytest.mark.parametrize("other", ["parts", "parts/objec", "parts/object2", "parts/other"])
    async def test_abort_of_another_location(self, backend: StorageBackend, other: str) -> None:
        """An abort leaves the uploads of other locations alone, however alike their names are."""
        aborter = self.require_ability(backend, SupportsAbort)
        async with self._upload_in_progress(backend) as upload:
            await aborter.abort_upload(other, None)
            upload.go_on.set()
            await upload.writer
        await self.require_whole(backend, LOCATION, self.content("parts"), f"after an abort for {other!r}")

    @pytest.mark.parametrize("known", ["by its id", "by its location"])
    async def test_abort_of_what_is_finished(self, backend: StorageBackend, known: str) -> None:
        """An abort after the end, or of an upload that was aborted before, is not an error and leaves the object as it is."""
        aborter = self.require_ability(backend, SupportsAbort)
        self._needs_ids(known)
        async with self._upload_in_progress(backend) as upload:
            upload.go_on.set()
            await upload.writer
        upload_id = upload.id if known == "by its id" else None
        for _ in range(2):
            await aborter.abort_upload(LOCATION, upload_id)
            await aborter.abort_upload("never/there", upload_id)
        await self.require_whole(backend, LOCATION, self.content("parts"), f"after it was aborted {known}, which is too late")

    @asynccontextmanager
    async def _upload_in_progress(self, backend: StorageBackend) -> AsyncIterator[Upload]:
        """Enter to an upload that has sent all but its end, and waits."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[str] = loop.create_future()
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def tell(upload_id: str) -> None:
            told.set_result(upload_id)

        async def write() -> None:
            upload_begun.set(tell)
            await backend.put_stream(LOCATION, held(self.content("parts"), reached, go_on))

        writer = asyncio.ensure_future(write())
        try:
            await self.reach(reached, writer)
            async with asyncio.timeout(self.patience):
                yield Upload(await told if self.tells_upload_ids else None, go_on, writer)
        finally:
            writer.cancel()
            await asyncio.wait([writer])

    def _needs_ids(self, known: str) -> None:
        if known == "by its id":
            self.needs("tells_upload_ids")
