"""What a client adds to a presigned upload: no header that was not agreed reaches the object that a row refers to."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from granite_storage.backends.base import StorageBackend
from granite_storage.backends.s3 import S3ConfigurationError, S3StorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.locations import uuid7_hex
from granite_storage.orm import Attachment, bind_storage
from granite_storage.web import DirectUpload, DirectUploads, UploadMismatchError, problem_response
from tests.servers import S3Server
from tests.web.direct_uploads import PDF, Client, client_of, uploads_of
from tests.web.receiving import Base, Document, manager_of, stored_in

BOMB = gzip.compress(bytes(9_000_000))
ADDED = {
    "Cache-Control": "public, max-age=31536000",
    "Content-Disposition": "inline; filename=evil.html",
    "Content-Language": "de",
    "Expires": "Sun, 06 Nov 2044 08:49:37 GMT",
}


@dataclass
class Direct:
    backend: S3StorageBackend
    uploads: DirectUploads
    client: Client
    manager: Any

    async def send(self, content: bytes, added: dict[str, str], **options: Any) -> DirectUpload:
        given = {"content_type": "application/pdf", "size": len(content), **options}
        upload = await self.uploads.begin(Document.file, **given)
        added_to = {"fields": added} if upload.method == "POST" else {"headers": added}
        answer = await self.client.send(upload, content, **added_to)
        assert answer.is_success, answer.text
        return upload

    async def head(self, location: str) -> dict[str, Any]:
        async with self.backend.client() as client:
            key = f"{self.backend.prefix}/{location}"
            head: dict[str, Any] = await client.head_object(Bucket=self.backend.bucket, Key=key)
            return head


@asynccontextmanager
async def direct_to(server: S3Server, *, wrapped: bool = False, **options: Any) -> AsyncIterator[Direct]:
    bucket = await asyncio.to_thread(lambda: server.shared_bucket)
    backend = server.backend(bucket, prefix=uuid7_hex(), **options)
    store: StorageBackend = PrefixedBackend(backend, "inside") if wrapped else backend
    async with manager_of(store) as manager:
        binding = bind_storage(Base, manager)
        uploads = uploads_of(binding, base_url=None)
        async with client_of(uploads) as client:
            yield Direct(backend, uploads, client, manager)
        for location in await stored_in(manager):
            await store.delete(location)
        binding.unbind()


@pytest.fixture(params=["form", "put", "put-wrapped"])
async def direct(request: pytest.FixtureRequest, seaweedfs_server: S3Server) -> AsyncIterator[Direct]:
    """A server that takes whatever headers come with a signed request, as many do."""
    wrapped = request.param.endswith("wrapped")
    async with direct_to(seaweedfs_server, presigned_post=request.param == "form", wrapped=wrapped) as direct:
        yield direct


@pytest.mark.case("RE-07")
@pytest.mark.parametrize("presigned_post", [True, False])
async def test_metadata_of_a_client(moto_server: S3Server, presigned_post: bool) -> None:
    """It reaches the copy from no server, not even from one that checks no signature."""
    async with direct_to(moto_server, presigned_post=presigned_post) as direct:
        upload = await direct.send(PDF, ADDED | {"x-amz-meta-added": "by the client"})
        await require_bare(direct, await direct.uploads.finish(upload.token, Document.file))


async def require_bare(direct: Direct, file: Attachment) -> None:
    """Check that an object has no header that was not agreed."""
    inside = "inside/" if isinstance(direct.manager.backend("store"), PrefixedBackend) else ""
    head = await direct.head(inside + file.location)
    assert head["ContentType"] == "application/pdf"
    assert not {"CacheControl", "ContentDisposition", "ContentEncoding", "ContentLanguage", "Expires"} & set(head)
    assert set(head["Metadata"]) == {"granite-write-id"}
    assert await file.read() == PDF


@pytest.mark.case("RE-07")
async def test_only_what_was_agreed_is_copied(direct: Direct) -> None:
    upload = await direct.send(PDF, ADDED)
    await require_bare(direct, await direct.uploads.finish(upload.token, Document.file))


@pytest.mark.case("RE-07")
@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP", "identity, gzip"])
async def test_a_content_encoding_is_refused(direct: Direct, coding: str) -> None:
    """The row would say 8,781 bytes, and a browser would unpack 9,000,000."""
    upload = await direct.send(BOMB, {"Content-Encoding": coding}, content_type="text/plain")
    staged = await stored_in(direct.manager)
    with pytest.raises(UploadMismatchError, match="Content-Encoding") as raised:
        await direct.uploads.finish(upload.token, Document.file)
    assert problem_response(raised.value).status_code == 422
    assert await stored_in(direct.manager) == staged


@pytest.mark.case("RE-07")
async def test_a_copy_of_what_another_program_has_stored(direct: Direct) -> None:
    """It has the bytes and the media type, as `SupportsCopy.copy` says, and nothing else of it."""
    async with direct.backend.client() as client:
        key = f"{direct.backend.prefix}/theirs"
        added = {"CacheControl": "max-age=1", "ContentEncoding": "gzip", "Metadata": {"a": "b"}}
        await client.put_object(Bucket=direct.backend.bucket, Key=key, Body=BOMB, ContentType="text/plain", **added)
    assert (await direct.backend.stat("theirs")).content_encoding == "gzip"
    await direct.backend.copy("theirs", "ours")
    head = await direct.head("ours")
    assert (head["ContentType"], head["ContentLength"]) == ("text/plain", len(BOMB))
    assert not {"CacheControl", "ContentEncoding"} & set(head)
    await direct.backend.delete_many(["ours", "theirs"])


@pytest.mark.case("RE-15")
@pytest.mark.parametrize("presigned_post", [True, False])
async def test_the_parameters_of_every_write(moto_server: S3Server, presigned_post: bool) -> None:
    extra = {
        "ACL": "bucket-owner-full-control",
        "BucketKeyEnabled": True,
        "CacheControl": "max-age=60",
        "Metadata": {"origin": "tests"},
        "SSEKMSKeyId": "a-key",
        "ServerSideEncryption": "aws:kms",
        "StorageClass": "STANDARD_IA",
        "Tagging": "kind=upload",
    }
    async with direct_to(moto_server, presigned_post=presigned_post, extra_put_kwargs=extra) as direct:
        upload = await direct.send(PDF, {})
        sent = upload.fields if presigned_post else upload.headers
        assert sent["x-amz-server-side-encryption"] == "aws:kms"
        assert sent["x-amz-server-side-encryption-aws-kms-key-id"] == "a-key"
        assert sent["x-amz-server-side-encryption-bucket-key-enabled"] == "true"
        assert sent["x-amz-storage-class"] == "STANDARD_IA"
        assert sent["acl" if presigned_post else "x-amz-acl"] == "bucket-owner-full-control"
        file = await direct.uploads.finish(upload.token, Document.file)
        head = await direct.head(file.location)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "a-key")
        assert (head["StorageClass"], head["CacheControl"]) == ("STANDARD_IA", "max-age=60")
        assert head["Metadata"]["origin"] == "tests"
        assert (file.checksum, await file.read()) == (f"sha256:{hashlib.sha256(PDF).hexdigest()}", PDF)


@pytest.mark.case("RE-15")
@pytest.mark.parametrize("presigned_post", [True, False])
async def test_they_are_signed(seaweedfs_server: S3Server, presigned_post: bool) -> None:
    extra = {"ACL": "private", "StorageClass": "STANDARD_IA"}
    async with direct_to(seaweedfs_server, presigned_post=presigned_post, extra_put_kwargs=extra) as direct:
        upload = await direct.uploads.begin(Document.file, content_type="application/pdf", size=len(PDF))
        for name in ("acl" if presigned_post else "x-amz-acl", "x-amz-storage-class"):
            changed = {name: "another"}
            answer = await direct.client.send(upload, **{"fields" if presigned_post else "headers": changed})
            assert answer.status_code == 403, name
        await direct.client.sent(upload)
        assert await (await direct.uploads.finish(upload.token, Document.file)).read() == PDF


@pytest.mark.case("RE-15")
@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}, "key of your own"),
        ({"StorageClass": "DEEP_ARCHIVE"}, "'DEEP_ARCHIVE'"),
    ],
)
async def test_what_no_client_can_send(moto_server: S3Server, extra: dict[str, Any], why: str) -> None:
    async with direct_to(moto_server, extra_put_kwargs=extra) as direct:
        with pytest.raises(S3ConfigurationError, match=why) as raised:
            await direct.uploads.begin(Document.file)
    assert "k" * 32 not in str(raised.value)
