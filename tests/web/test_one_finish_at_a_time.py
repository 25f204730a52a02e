"""Many clients that finish one upload at once make one copy of it, and none where it can be told without one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from granite_storage import BackendUnavailableError, StorageManager
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import bind_storage
from granite_storage.testing import FaultInjectingBackend
from granite_storage.web import DirectUpload, DirectUploads, UploadMismatchError
from tests.core.support import eventually
from tests.web.direct_uploads import PDF, Client, client_of, uploads_of
from tests.web.receiving import MIB, Base, Document, manager_of, stored_in

LARGE = b"%PDF-".ljust(3 * MIB, b"x")
WRONG = "sha256:" + "0" * 64


@dataclass
class Place:
    manager: StorageManager
    backend: FaultInjectingBackend
    uploads: DirectUploads
    client: Client

    async def sent(self, content: bytes = LARGE, **options: Any) -> DirectUpload:
        given = {"content_type": "application/pdf", **options}
        return await self.client.sent(await self.uploads.begin(Document.file, **given), content)

    async def finish(self, upload: DirectUpload) -> Any:
        return await self.uploads.finish(upload.token, Document.file)

    async def all_at_once(self, upload: DirectUpload, count: int = 50) -> list[Any]:
        return await asyncio.gather(*(self.finish(upload) for _ in range(count)), return_exceptions=True)

    async def resend(self, content: bytes) -> None:
        """Replace what was sent, as clients can on S3."""
        [staged] = await stored_in(self.manager)
        await self.backend.inner.delete(staged)
        await self.backend.inner.put_bytes(staged, content, content_type="application/pdf")


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    backend = FaultInjectingBackend(MemoryStorageBackend())
    async with manager_of(backend) as manager:
        binding = bind_storage(Base, manager)
        uploads = uploads_of(binding)
        async with client_of(uploads) as client:
            yield Place(manager, backend, uploads, client)
        binding.unbind()


@pytest.mark.case("RE-06")
async def test_fifty_finishes(place: Place) -> None:
    upload = await place.sent()
    files = await place.all_at_once(upload)
    assert len({file.ref for file in files}) == 1
    assert files[0].checksum == f"sha256:{hashlib.sha256(LARGE).hexdigest()}"
    assert place.backend.count("copy") == 1
    assert place.backend.count("open") == 2  # the first bytes, and the copy
    assert len(await stored_in(place.manager)) == 2


@pytest.mark.case("RE-06")
async def test_fifty_finishes_of_a_page_that_claims_to_be_a_pdf(place: Place) -> None:
    upload = await place.sent(b"<html>".ljust(3 * MIB))
    for _ in range(2):
        errors = await place.all_at_once(upload)
        assert {type(error) for error in errors} == {UploadMismatchError}
        assert {str(error) for error in errors} == {"the file is not of the announced media type"}
    assert (place.backend.count("copy"), place.backend.count("open")) == (0, 1)
    assert len(await stored_in(place.manager)) == 1


@pytest.mark.case("RE-06")
async def test_fifty_finishes_with_a_wrong_checksum(place: Place) -> None:
    upload = await place.sent(checksum=WRONG)
    for _ in range(2):
        errors = await place.all_at_once(upload)
        assert {str(error) for error in errors} == {"the file does not have the announced checksum"}
    assert (place.backend.count("copy"), place.backend.count("open")) == (1, 2)
    assert len(await stored_in(place.manager)) == 1


@pytest.mark.case("RE-06")
async def test_a_verdict_is_of_what_was_sent(place: Place) -> None:
    upload = await place.sent(PDF, checksum=f"sha256:{hashlib.sha256(LARGE).hexdigest()}", max_size=len(LARGE))
    with pytest.raises(UploadMismatchError):
        await place.finish(upload)
    await place.resend(LARGE)
    assert (await place.finish(upload)).size == len(LARGE)


@pytest.mark.case("RE-06")
async def test_a_failure_is_no_verdict(place: Place) -> None:
    upload = await place.sent()
    place.backend.fail("copy")
    results = await place.all_at_once(upload, 5)
    assert [type(result) for result in results].count(BackendUnavailableError) == 1
    assert len({result.ref for result in results if not isinstance(result, Exception)}) == 1
    assert place.backend.count("copy") == 2


@pytest.mark.case("RE-06")
async def test_one_that_is_cancelled_lets_the_others_go_on(place: Place) -> None:
    upload = await place.sent()
    place.backend.delay("copy", seconds=60)
    first = asyncio.create_task(place.finish(upload))
    await eventually(lambda: place.backend.count("copy"))
    others = [asyncio.create_task(place.finish(upload)) for _ in range(3)]
    await asyncio.sleep(0.05)
    others[0].cancel()
    first.cancel()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, True, False, False]
    assert results[2].ref == results[3].ref


@pytest.mark.case("RE-06")
async def test_other_uploads_do_not_wait(place: Place) -> None:
    uploads = [await place.sent(PDF) for _ in range(3)]
    place.backend.delay("copy", seconds=0.3, times=3)
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*map(place.finish, uploads))
    assert asyncio.get_running_loop().time() - began < 0.8
    assert not place.uploads._locks
