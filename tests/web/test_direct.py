"""Direct uploads on every backend, without a journal: what a client may send, and what becomes of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from granite_storage import ContentTooLargeError, StorageManager
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import ConsumedSourceError, InvalidLocationError
from granite_storage.gc import StorageGarbageCollector
from granite_storage.locations import GENERATED_STEM, uuid7_hex
from granite_storage.orm import Attachment, bind_storage
from granite_storage.web import (
    DirectUpload,
    DirectUploads,
    MalformedRequestError,
    UploadMismatchError,
    UploadMissingError,
    UploadTokenError,
    problem_response,
)
from granite_storage.web._direct_state import HEAD_SIZE, contradicts
from tests.servers import S3Server
from tests.web.direct_uploads import PDF, Client, client_of, uploads_of
from tests.web.receiving import Base, Document, engine_of, manager_of, stored_in

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
            await self.uploads.finish(upload.token, Document.file)

    async def objects(self) -> list[str]:
        return await stored_in(self.manager)


@pytest.fixture
async def direct(
    request: pytest.FixtureRequest, receiving_manager: StorageManager, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Direct]:
    engine = engine_of(tmp_path_factory.getbasetemp() / f"database-{uuid.uuid4().hex}")
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    binding = bind_storage(Base, receiving_manager, session_factory=sessions)
    uploads = uploads_of(binding)
    async with client_of(uploads) as client:
        yield Direct(receiving_manager, sessions, binding, uploads, client, checks="moto" not in request.node.name)
    binding.unbind()
    await engine.dispose()


@pytest.mark.usefixtures("backend")
async def test_an_upload_that_a_row_takes(direct: Direct) -> None:
    upload = await direct.sent()
    staged = await direct.objects()
    file = await direct.uploads.finish(upload.token, Document.file)
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
    first, second = await asyncio.gather(
        direct.uploads.finish(upload.token, Document.file), direct.uploads.finish(upload.token, Document.file)
    )
    assert first.ref == second.ref
    await direct.add(first)
    third = await direct.uploads.finish(upload.token, Document.file)
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
    with pytest.raises(UploadMissingError) as missing:
        await direct.uploads.finish(upload.token, Document.file, owner="anna")
    assert problem_response(missing.value).status_code == 409
    await direct.client.sent(upload)
    for owner in ("bert", None, "", "anna\x00"):
        with pytest.raises(UploadTokenError) as stolen:
            await direct.uploads.finish(upload.token, Document.file, owner=owner)
        assert problem_response(stolen.value).status_code == 403
    unowned = await direct.sent()
    with pytest.raises(UploadTokenError):
        await direct.uploads.finish(unowned.token, Document.file, owner="anna")
    assert len(await direct.objects()) == 2
    assert (await direct.uploads.finish(upload.token, Document.file, owner="anna")).size == 17


@pytest.mark.usefixtures("backend")
async def test_a_second_send_changes_nothing_that_was_finished(direct: Direct) -> None:
    upload = await direct.sent()
    file = await direct.uploads.finish(upload.token, Document.file)
    await direct.add(file)
    await direct.client.send(upload, b"%PDF-something else")
    assert await file.read() == PDF
    again = await direct.uploads.finish(upload.token, Document.file)
    assert again.ref == file.ref


@pytest.mark.usefixtures("backend")
async def test_a_rollback_lets_it_be_finished_again(direct: Direct) -> None:
    upload = await direct.sent()
    first = await direct.uploads.finish(upload.token, Document.file)
    with pytest.raises(RuntimeError):
        async with direct.sessions.begin() as session:
            session.add(Document(title="a", file=first))
            await session.flush()
            raise RuntimeError
    assert len(await direct.objects()) == 1
    await direct.client.send(upload, b"%PDF-another")
    with pytest.raises(ConsumedSourceError):
        await direct.add(first)
    second = await direct.uploads.finish(upload.token, Document.file)
    await direct.add(second)
    assert second.checksum == f"sha256:{hashlib.sha256(await second.read()).hexdigest()}"


@pytest.mark.usefixtures("backend")
async def test_what_is_not_as_announced_is_refused(direct: Direct) -> None:
    wrong = "sha256:" + "0" * 64
    checked = await direct.sent(checksum=wrong)
    with pytest.raises(UploadMismatchError, match="checksum") as mismatch:
        await direct.uploads.finish(checked.token, Document.file)
    assert problem_response(mismatch.value).status_code == 422
    page = await direct.sent(b"<html><script>alert(1)</script>", content_type="image/png", filename="a.png")
    with pytest.raises(UploadMismatchError, match="media type"):
        await direct.uploads.finish(page.token, Document.file)
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
    assert (await direct.uploads.finish(empty.token, Document.file)).size == 0
    with pytest.raises(ContentTooLargeError):
        await direct.begin(size=(400 << 20) + 1)


@pytest.mark.usefixtures("backend")
async def test_another_type_is_refused(direct: Direct) -> None:
    other = {"Content-Type": "text/html"}
    upload = await direct.begin()
    await direct.refused(upload, PDF, **({"fields": other} if upload.method == "POST" else {"headers": other}))


async def test_the_collector_takes_what_was_left(direct: Direct) -> None:
    upload = await direct.sent()
    document = await direct.add(await direct.uploads.finish(upload.token, Document.file))
    await direct.sent()
    collector = StorageGarbageCollector(
        direct.manager, binding=direct.binding, grace_period=timedelta(microseconds=1), max_deleted_share=1.0
    )
    report = await collector.collect(storage_key="files", dry_run=False)
    assert report.deleted == 2
    assert document.file is not None
    assert await direct.objects() == [document.file.location]


async def test_another_process_without_a_journal(direct: Direct) -> None:
    """It does not know what the first one has done, and takes no object away from it."""
    upload = await direct.sent()
    first = await direct.uploads.finish(upload.token, Document.file)
    second = await uploads_of(direct.binding).finish(upload.token, Document.file)
    assert first.location != second.location
    await direct.add(first)
    await direct.add(second)
    assert await first.read() == await second.read() == PDF


async def test_what_was_finished_is_forgotten_in_the_end(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = await direct.sent()
    await direct.uploads.finish(upload.token, Document.file)
    now = time.time()
    later = await direct.sent()
    monkeypatch.setattr("time.time", lambda: now + 3600 + 15 * 60 - 1)
    await direct.uploads.finish(later.token, Document.file)
    monkeypatch.setattr("time.time", lambda: now + 3600 * 24)
    last = await direct.begin()
    with pytest.raises(UploadMissingError):
        await direct.uploads.finish(last.token, Document.file)
    assert direct.uploads._completions._known == {}  # type: ignore[attr-defined]


async def test_its_object_is_gone(direct: Direct) -> None:
    upload = await direct.sent()
    document = await direct.add(await direct.uploads.finish(upload.token, Document.file))
    async with direct.sessions.begin() as session:
        await session.delete(document)
    again = await direct.uploads.finish(upload.token, Document.file)
    await direct.add(again)
    assert await again.read() == PDF


@pytest.mark.usefixtures("backend")
@pytest.mark.case("CAN-01")
async def test_cancelled_anywhere(direct: Direct) -> None:
    upload = await direct.sent()
    file: Attachment | None = None
    turns = 0
    while file is None:
        task = asyncio.create_task(direct.uploads.finish(upload.token, Document.file))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            file = await task
        except asyncio.CancelledError:
            turns += 1 + turns // 4
    assert turns > 1
    assert len(await direct.objects()) == 2
    await direct.add(file)
    assert await file.read() == PDF


@pytest.mark.parametrize("given", [None, ""])
async def test_a_file_of_no_media_type(direct: Direct, given: str | None) -> None:
    upload = await direct.sent(b"anything", content_type=given)
    file = await direct.uploads.finish(upload.token, Document.file)
    assert file.content_type == "application/octet-stream"


@pytest.mark.parametrize("given", [5, b"image/png", "image", "text/html, text/plain", "a/b\r\nX: y"])
async def test_what_is_no_media_type_is_refused(direct: Direct, given: Any) -> None:
    with pytest.raises(MalformedRequestError, match="not a media type"):
        await direct.begin(content_type=given)


@pytest.mark.case("SIG-07")
@pytest.mark.parametrize("wrapped", [False, True])
async def test_what_s3_is_told(moto_server: S3Server, wrapped: bool) -> None:
    bucket = "any"
    prefixed = PrefixedBackend(moto_server.backend(bucket), "tenants/7")
    async with manager_of(prefixed if wrapped else moto_server.backend(bucket, prefix="tenants/7")) as manager:
        binding = bind_storage(Base, manager)
        upload = await uploads_of(binding, base_url=None).begin(
            Document.file, filename="${filename}", content_type="image/png", max_size=1000, expires_in=timedelta(minutes=5)
        )
        binding.unbind()
    assert upload.method == "POST"
    assert "${filename}" not in json.dumps(upload.to_dict())
    key = upload.fields["key"]
    assert re.fullmatch(f"tenants/7/document/{GENERATED_STEM}/file/{GENERATED_STEM}-_staged", key)
    policy = json.loads(base64.b64decode(upload.fields["policy"]))
    conditions = policy["conditions"]
    assert ["eq", "$key", key] in conditions
    assert ["eq", "$Content-Type", "image/png"] in conditions
    assert ["content-length-range", 1, 1000] in conditions
    assert {"bucket": bucket} in conditions
    assert not [condition for condition in conditions if isinstance(condition, list) and condition[0] == "starts-with"]
    assert datetime.fromisoformat(policy["expiration"]) <= datetime.now(UTC) + timedelta(minutes=5)
    named = {name for item in conditions for name in (item if isinstance(item, dict) else [str(item[1]).removeprefix("$")])}
    assert set(upload.fields) - {"policy", "x-amz-signature"} <= named


@pytest.mark.case("SIG-07")
async def test_s3_puts_no_name_of_the_client_into_a_key(moto_server: S3Server) -> None:
    backend = moto_server.backend("any", prefix="")
    for location in ("a/${filename}", "${filename}", "a${filename}b/c"):
        with pytest.raises(InvalidLocationError, match="client's file name"):
            await backend.presign_upload(
                location, expires_in=timedelta(minutes=1), content_type="text/plain", min_size=1, max_size=2
            )


@pytest.mark.case("SIG-07")
async def test_a_service_without_forms(seaweedfs_server: S3Server) -> None:
    bucket = await asyncio.to_thread(lambda: seaweedfs_server.shared_bucket)
    backend = seaweedfs_server.backend(bucket, prefix=uuid7_hex(), presigned_post=False)
    async with manager_of(backend) as manager:
        binding = bind_storage(Base, manager)
        uploads = uploads_of(binding, base_url=None)
        async with client_of(uploads) as client:
            with pytest.raises(ValueError, match="equal min_size and max_size"):
                await uploads.begin(Document.file)
            upload = await uploads.begin(Document.file, content_type="application/pdf", size=len(PDF))
            assert (upload.method, dict(upload.headers)) == ("PUT", {"Content-Type": "application/pdf"})
            signed = parse_qs(urlsplit(upload.url).query)["X-Amz-SignedHeaders"][0].split(";")
            assert {"content-length", "content-type", "host"} <= set(signed)
            for content, headers in ((PDF + b"x", {}), (PDF[:-1], {}), (PDF, {"Content-Type": "text/html"})):
                assert (await client.send(upload, content, headers=headers)).status_code == 403
            await client.sent(upload)
            assert await (await uploads.finish(upload.token, Document.file)).read() == PDF
        binding.unbind()


async def test_more_than_s3_takes_in_one_request(moto_server: S3Server) -> None:
    async with manager_of(moto_server.backend("any"), max_size=50 << 30) as manager:
        binding = bind_storage(Base, manager)
        uploads = uploads_of(binding)
        with pytest.raises(ContentTooLargeError):
            await uploads.begin(Document.file, size=(5 << 30) + 1)
        assert (await uploads.begin(Document.file)).method == "POST"
        binding.unbind()


@pytest.mark.parametrize(
    ("content_type", "content", "fits"),
    [
        ("image/png", b"\x89PNG\r\n\x1a\n...", True),
        ("image/png", b"\x89PNG", False),
        ("IMAGE/PNG", b"GIF89a", False),
        ("image/png; charset=x", b"<svg>", False),
        ("image/jpeg", b"\xff\xd8\xff\xe0", True),
        ("image/gif", b"GIF87a...", True),
        ("image/gif", b"GIF88a...", False),
        ("image/webp", b"RIFF\x10\n\x00\x00WEBPVP8 ", True),
        ("image/webp", b"RIFF\x10\x00\x00\x00WAVEfmt ", False),
        ("image/avif", b"\x00\x00\x00\x1cftypavif", True),
        ("video/mp4", b"\x00\x00\x00\x18ftypmp42", True),
        ("video/mp4", b"MZ\x90", False),
        ("application/pdf", b"%PDF-1.7", True),
        ("application/pdf", b"\n%PDF-1.7", True),
        ("application/zip", b"PK\x03\x04", True),
        ("application/pdf", b"", False),
        ("text/plain", b"anything", True),
        ("application/octet-stream", b"", True),
        ("application/x-unknown", b"MZ", True),
    ],
)
def test_how_files_begin(content_type: str, content: bytes, fits: bool) -> None:
    assert contradicts(content[:HEAD_SIZE], content_type) is not fits
