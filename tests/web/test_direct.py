"""Direct uploads on every backend, without a journal: what a client may send, and what becomes of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from granite_storage import ContentTooLargeError, StorageManager
from granite_storage.orm import Attachment, bind_storage
from granite_storage.web import (
    DirectUpload,
    DirectUploads,
    UploadMismatchError,
    UploadMissingError,
    UploadTokenError,
)
from tests.web.directly import PDF, Client, client_of, uploads_of
from tests.web.receiving import Base, Document, stored_in

SHA = "sha256:" + hashlib.sha256(PDF).hexdigest()


@dataclass
class Direct:
    """A base, its uploads and a client."""

    manager: StorageManager
    sessions: async_sessionmaker[AsyncSession]
    binding: Any
    uploads: DirectUploads
    client: Client
    checks: bool

    async def begin(self, **options: Any) -> DirectUpload:
        return await self.uploads.begin(Document.file, **{"filename": "report.pdf", "content_type": "application/pdf", **options})

    async def sent(self, content: bytes = PDF, **options: Any) -> DirectUpload:
        return await self.client.sent(await self.begin(**options), content)

    async def add(self, file: Attachment, title: str = "report") -> Document:
        document = Document(title=title, file=file)
        async with self.sessions.begin() as session:
            session.add(document)
        return document

    async def refused(self, upload: DirectUpload, content: bytes, **changed: Any) -> None:
        """Check that the storage refuses a file, or where it checks nothing, as moto, that it cannot be finished."""
        answer = await self.client.send(upload, content, **changed)
        refusal = UploadMissingError if answer.is_client_error else (ContentTooLargeError, UploadMismatchError)
        assert answer.is_client_error or not self.checks, answer.status_code
        with pytest.raises(refusal):
            await self.uploads.finish(upload.token)

    async def objects(self) -> list[str]:
        return await stored_in(self.manager)


@pytest.fixture
async def direct(
    request: pytest.FixtureRequest, receiving_manager: StorageManager, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Direct]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('database') / 'rows.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    binding = bind_storage(Base, receiving_manager, sessions=sessions)
    uploads = uploads_of(binding)
    async with client_of(uploads) as client:
        yield Direct(receiving_manager, sessions, binding, uploads, client, checks="moto" not in request.node.name)
    binding.unbind()
    await engine.dispose()


@pytest.mark.usefixtures("backend")
async def test_an_upload_that_a_row_takes(direct: Direct) -> None:
    upload = await direct.sent()
    staged = await direct.objects()
    file = await direct.uploads.finish(upload.token)
    assert (file.size, file.checksum, file.content_type, file.original_filename) == (17, SHA, "application/pdf", "report.pdf")
    document = await direct.add(file)
    assert document.file is file
    assert await file.read() == PDF
    assert set(await direct.objects()) == {*staged, file.location}
    assert (await direct.manager.stat(file.ref)).content_type in (None, "application/pdf")


@pytest.mark.usefixtures("backend")
@pytest.mark.case("SIG-09")
async def test_finished_twice(direct: Direct) -> None:
    upload = await direct.sent()
    first, second = await asyncio.gather(direct.uploads.finish(upload.token), direct.uploads.finish(upload.token))
    assert first.ref == second.ref
    await direct.add(first)
    third = await direct.uploads.finish(upload.token)
    assert third.ref == first.ref
    other = await direct.add(third)
    assert other.file is not None
    assert other.file.location != first.location
    assert len(await direct.objects()) == 3
    assert await first.read() == await other.file.read() == PDF


@pytest.mark.usefixtures("backend")
@pytest.mark.case("SIG-09")
async def test_what_cannot_be_finished(direct: Direct) -> None:
    upload = await direct.begin(owner="anna")
    with pytest.raises(UploadMissingError):
        await direct.uploads.finish(upload.token, owner="anna")
    await direct.client.sent(upload)
    for owner in ("bert", None, "", "anna\x00"):
        with pytest.raises(UploadTokenError):
            await direct.uploads.finish(upload.token, owner=owner)
    unowned = await direct.sent()
    with pytest.raises(UploadTokenError):
        await direct.uploads.finish(unowned.token, owner="anna")
    assert len(await direct.objects()) == 2
    assert (await direct.uploads.finish(upload.token, owner="anna")).size == 17


@pytest.mark.usefixtures("backend")
async def test_a_second_send_changes_nothing_that_was_finished(direct: Direct) -> None:
    upload = await direct.sent()
    file = await direct.uploads.finish(upload.token)
    await direct.add(file)
    await direct.client.send(upload, b"%PDF-something else")
    assert await file.read() == PDF
    again = await direct.uploads.finish(upload.token)
    assert again.ref == file.ref


@pytest.mark.usefixtures("backend")
async def test_a_rollback_lets_it_be_finished_again(direct: Direct) -> None:
    upload = await direct.sent()
    first = await direct.uploads.finish(upload.token)
    with pytest.raises(RuntimeError):
        async with direct.sessions.begin() as session:
            session.add(Document(title="a", file=first))
            await session.flush()
            raise RuntimeError
    assert len(await direct.objects()) == 1
    second = await direct.uploads.finish(upload.token)
    await direct.add(second)
    assert await second.read() == PDF


@pytest.mark.usefixtures("backend")
async def test_what_is_not_as_announced_is_refused(direct: Direct) -> None:
    wrong = "sha256:" + "0" * 64
    checked = await direct.sent(checksum=wrong)
    with pytest.raises(UploadMismatchError, match="checksum"):
        await direct.uploads.finish(checked.token)
    page = await direct.sent(b"<html><script>alert(1)</script>", content_type="image/png", filename="a.png")
    with pytest.raises(UploadMismatchError, match="media type"):
        await direct.uploads.finish(page.token)
    assert len(await direct.objects()) == 2


@pytest.mark.usefixtures("backend")
async def test_sizes(direct: Direct) -> None:
    for options, content in (
        ({"max_size": 20}, bytes(21)),
        ({"max_size": 20}, b""),
        ({"min_size": 5, "max_size": 20}, b"1234"),
        ({"size": 17}, bytes(16)),
        ({"size": 17}, bytes(18)),
    ):
        await direct.refused(await direct.begin(content_type="text/plain", **options), content)
    empty = await direct.sent(b"", content_type="text/plain", min_size=0)
    assert (await direct.uploads.finish(empty.token)).size == 0
    with pytest.raises(ContentTooLargeError):
        await direct.begin(size=(400 << 20) + 1)


@pytest.mark.usefixtures("backend")
async def test_another_type_is_refused(direct: Direct) -> None:
    other = {"Content-Type": "text/html"}
    upload = await direct.begin()
    await direct.refused(upload, PDF, **({"fields": other} if upload.method == "POST" else {"headers": other}))


async def test_arguments(direct: Direct) -> None:
    for expires_in in (timedelta(0), timedelta(seconds=-1), timedelta(hours=12, seconds=1)):
        with pytest.raises(ValueError, match="expires_in"):
            await direct.begin(expires_in=expires_in)
