"""Direct uploads into a public policy: nothing that a client sends is public as what the client calls it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import bind_storage
from granite_storage.policies import PublicURL
from granite_storage.web import PublicFiles, UploadMismatchError
from tests.servers import S3Server
from tests.web.direct_uploads import Client, client_of, uploads_of
from tests.web.receiving import Base, Document, engine_of
from tests.web.serving import ask

PAGE = b"<script>alert(1)</script>"


@pytest.fixture(params=["memory", "s3"])
async def backend(request: pytest.FixtureRequest, moto_server: S3Server) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield MemoryStorageBackend()
        return
    async with moto_server.bucket() as bucket:
        backend = moto_server.backend(bucket)
        yield backend
        await backend.aclose()


async def test_a_page(backend: Any, tmp_path: Path) -> None:
    public = PublicURL("https://cdn.example.com")
    policies = {"files": StoragePolicy("files", "store", max_size=1000, key_prefix="files", public=public)}
    engine = engine_of(tmp_path / "database")
    async with StorageManager(backends={"store": backend}, policies=policies) as manager:
        binding = bind_storage(Base, manager, session_factory=async_sessionmaker(engine))
        uploads = uploads_of(binding)
        async with client_of(uploads) as client:
            upload = await uploads.begin(Document.file, filename="page.html", content_type="text/html", size=len(PAGE))
            await client.sent(upload, PAGE)
            objects = {info.location: info async for info in backend.iter_objects("files/")}
            (staged,) = objects
            assert (await backend.stat(staged)).content_type == "application/octet-stream"
            files = PublicFiles(manager)
            assert (await ask(files, url=f"https://cdn.example.com/{staged}")).status_code == 404
            attachment = await uploads.finish(upload.token, Document.file)
            assert attachment.content_type == "text/html"
            assert (await backend.stat(attachment.location)).content_type == "application/octet-stream"
            response = await ask(files, url=attachment.public_url)
            assert (response.content, response.headers["content-type"]) == (PAGE, "application/octet-stream")
            assert response.headers["content-disposition"].startswith("attachment")
            await _another_type(uploads, client, backend)
        binding.unbind()
    await engine.dispose()


async def _another_type(uploads: Any, client: Client, backend: Any) -> None:
    """What stands there with a type that was not agreed is refused."""
    upload = await uploads.begin(Document.file, filename="a.png", content_type="image/png", size=len(PAGE))
    objects = {info.location async for info in backend.iter_objects("files/")}
    await client.sent(upload, PAGE)
    (staged,) = {info.location async for info in backend.iter_objects("files/")} - objects
    await backend.delete(staged)
    await backend.put_bytes(staged, PAGE, content_type="text/html")
    with pytest.raises(UploadMismatchError, match="Content-Type"):
        await uploads.finish(upload.token, Document.file)


async def test_the_form_says_nothing_of_the_type(moto_server: S3Server) -> None:
    async with moto_server.bucket() as bucket:
        public = PublicURL("https://cdn.example.com", acl="public-read")
        policies = {"files": StoragePolicy("files", "store", max_size=1000, public=public)}
        async with StorageManager(backends={"store": moto_server.backend(bucket)}, policies=policies) as manager:
            binding = bind_storage(Base, manager)
            upload = await uploads_of(binding, base_url=None).begin(Document.file, content_type="text/html", max_size=100)
            binding.unbind()
        assert upload.fields["Content-Type"] == "application/octet-stream"
        assert not {"acl", "x-amz-acl"} & set(upload.fields)
        async with httpx.AsyncClient() as http:
            answer = await http.post(upload.url, data=dict(upload.fields), files={"file": ("a", PAGE)})
        assert answer.is_success


@pytest.mark.parametrize(
    ("filename", "kind", "content"),
    [("page.html", "text/html", PAGE), ("x.js", "text/javascript", b"alert(1)"), ("x.css", "text/css", b"a { color: red }")],
)
async def test_a_server_that_makes_up_a_type(
    seaweedfs_server: S3Server, tmp_path: Path, filename: str, kind: str, content: bytes
) -> None:
    """SeaweedFS takes `application/octet-stream` for unknown, and answers by the content or the extension."""
    policies = {"files": StoragePolicy("files", "store", max_size=1000, public=PublicURL("https://cdn.example.com"))}
    engine = engine_of(tmp_path / "database")
    async with (
        seaweedfs_server.bucket() as bucket,
        StorageManager(backends={"store": seaweedfs_server.backend(bucket)}, policies=policies) as manager,
    ):
        binding = bind_storage(Base, manager, session_factory=async_sessionmaker(engine))
        uploads = uploads_of(binding, base_url=None)
        async with client_of(uploads) as client:
            upload = await uploads.begin(Document.file, filename=filename, content_type=kind, size=len(content))
            await client.sent(upload, content)
            attachment = await uploads.finish(upload.token, Document.file)
        assert await attachment.read() == content
        assert attachment.location.endswith(".bin")
        binding.unbind()
    await engine.dispose()
