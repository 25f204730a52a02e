"""Public policies: the URLs of their objects, and the headers that every way of writing stores with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from hypothesis import given

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.base import ObjectHeaders, object_headers
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.obstore import ObjectStoreBackend
from granite_storage.backends.wrappers import WrappedBackend
from granite_storage.exceptions import InfectedObjectError, InvalidLocationError, ScanPendingError, UnknownPolicyError
from granite_storage.inspection import ClamdScanner
from granite_storage.locations import check_location
from granite_storage.policies import PublicURL
from tests.core.support import texts
from tests.servers import S3Server

CDN = "https://cdn.example.com"
YEAR = "public, max-age=31536000, immutable"
PHOTO = {"model_name": "photo", "entity_id": "1", "field_name": "file"}
HOUR = timedelta(hours=1)


def manager_with(backend: Any, **public: Any) -> StorageManager:
    return StorageManager(
        backends={"store": backend, "other": MemoryStorageBackend()},
        policies={
            "public": StoragePolicy("public", "store", key_prefix="public", public=PublicURL(CDN, **public)),
            "private": StoragePolicy("private", "store", key_prefix="private"),
            "elsewhere": StoragePolicy("elsewhere", "other"),
        },
    )


class Recording(WrappedBackend):
    """Notes what each write and copy is to store with its object."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.headers: dict[str, ObjectHeaders | None] = {}
        self.types: dict[str, str | None] = {}

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Mapping[str, Any] | None:
        self.headers[location], self.types[location] = object_headers.get(), content_type
        return await super().put_bytes(location, content, content_type=content_type)

    async def put_stream(
        self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None
    ) -> Mapping[str, Any] | None:
        self.headers[location], self.types[location] = object_headers.get(), content_type
        return await super().put_stream(location, stream, content_type=content_type)

    async def copy(self, source: str, target: str) -> Mapping[str, Any] | None:
        self.headers[target] = object_headers.get()
        copied: Mapping[str, Any] | None = await super().copy(source, target)  # type: ignore[misc]
        return copied


class TestURL:
    @given(texts(min_size=1))
    def test_every_location_is_one_path(self, location: str) -> None:
        try:
            check_location(location)
        except InvalidLocationError:
            return
        url = PublicURL(CDN).url_of(location)
        parts = urlsplit(url)
        assert unquote(parts.path) == f"/{location}"
        assert (parts.netloc, parts.query, parts.fragment) == ("cdn.example.com", "", "")
        assert url.isascii()
        assert not set(url) & set(" +?#\"'<>&")

    def test_what_it_may_be(self) -> None:
        assert PublicURL("https://cdn.example.com/media/").base_url == "https://cdn.example.com/media"
        for base in ("cdn.example.com", "", None, "https://a@b.example", "javascript:x"):
            with pytest.raises(ConfigurationError, match="base_url"):
                PublicURL(base)  # type: ignore[arg-type]
        for options in (
            {"cache_control": ""},
            {"cache_control": "a\r\nX: y"},
            {"cache_control": None},
            {"cache_control": "caf\u00e9"},
            {"acl": "a\nb"},
            {"acl": 7},
            {"disposition": "form-data"},
        ):
            (name,) = options
            with pytest.raises(ConfigurationError, match=name):
                PublicURL(CDN, **options)  # type: ignore[arg-type]

    def test_of_a_policy(self) -> None:
        with pytest.raises(ConfigurationError, match="PublicURL"):
            StoragePolicy("photos", "store", public=CDN)  # type: ignore[arg-type]
        holding = ClamdScanner("127.0.0.1:3310", on_unavailable="hold")
        with pytest.raises(ConfigurationError, match="holds uploads"):
            StoragePolicy("photos", "store", public=PublicURL(CDN), scanner=holding)
        StoragePolicy("photos", "store", public=PublicURL(CDN), scanner=ClamdScanner("127.0.0.1:3310"))

    async def test_of_an_object(self) -> None:
        async with manager_with(MemoryStorageBackend()) as manager:
            ref = await manager.put_bytes(storage_key="public", **PHOTO, content=b"...", original_filename="caf\u00e9 100%.png")
            assert manager.public_url(ref) == f"{CDN}/public/photo/1/file/{ref.location[20:53]}caf%C3%A9_100.png"
            private = await manager.put_bytes(storage_key="private", **PHOTO, content=b"...")
            with pytest.raises(ConfigurationError, match=r"'private' is not public.*storage\.url"):
                manager.public_url(private)
            with pytest.raises(ConfigurationError, match=r"'other'.*'store'.*migrate"):
                manager.public_url(replace(ref, backend="other"))
            with pytest.raises(UnknownPolicyError):
                manager.public_url(replace(ref, storage_key="gone"))
            for status, error in (("pending", ScanPendingError), ("infected", InfectedObjectError)):
                with pytest.raises(error):
                    manager.public_url(StoredObjectRef.from_dict({**ref.to_dict(), "scan": {"status": status}}))


class TestHeaders:
    """Every way in stores the headers of the policy that it writes to, and no other write does."""

    async def test_of_every_way_in(self, tmp_path: Any) -> None:
        backend = Recording(MemoryStorageBackend())
        async with manager_with(backend) as manager:
            page = {"content_type": "text/html", "original_filename": "page.html"}
            put = await manager.put_bytes(storage_key="public", **PHOTO, content=b"<script>", **page)
            streamed = await manager.put_stream(storage_key="public", **PHOTO, stream=[b"<script>"], **page)
            private = await manager.put_bytes(storage_key="private", **PHOTO, content=b"<script>", **page)
            copied = await manager.copy(private, **PHOTO, storage_key="public")
            elsewhere = await manager.copy(put, **PHOTO, storage_key="elsewhere")
            returned = await manager.copy(elsewhere, **PHOTO, storage_key="public")
            back = await manager.copy(put, **PHOTO, storage_key="private")
            for ref in (put, streamed, copied, returned):
                assert backend.headers[ref.location] == ObjectHeaders(
                    "application/octet-stream", 'attachment; filename="page.html"', YEAR
                )
                assert ref.content_type == "text/html"
            assert {backend.types[ref.location] for ref in (put, streamed, returned)} == {"application/octet-stream"}
            assert backend.headers[private.location] is backend.headers[back.location] is None
            assert backend.types[private.location] == "text/html"

    async def test_of_what_may_be_shown(self) -> None:
        backend = Recording(MemoryStorageBackend())
        async with manager_with(backend, acl="public-read", cache_control="no-cache") as manager:
            ref = await manager.put_bytes(
                storage_key="public", **PHOTO, content=b"...", content_type="image/png", original_filename="\u65e5.png"
            )
            assert backend.headers[ref.location] == ObjectHeaders(
                "image/png", "inline; filename=\"_.png\"; filename*=UTF-8''%E6%97%A5.png", "no-cache", "public-read"
            )
        async with manager_with(backend, disposition="attachment") as manager:
            ref = await manager.put_bytes(storage_key="public", **PHOTO, content=b"...", content_type="image/png")
            headers = backend.headers[ref.location]
            assert headers is not None
            assert headers.content_disposition == "attachment"

    async def test_a_stream_that_stores_another_object(self) -> None:
        """A private object that is stored while a public one is read must not become public."""
        backend = Recording(MemoryStorageBackend())
        async with manager_with(backend, acl="public-read") as manager:
            private: list[StoredObjectRef] = []

            async def stream() -> AsyncIterator[bytes]:
                private.append(await manager.put_bytes(storage_key="private", **PHOTO, content=b"secret"))
                yield b"public"

            public = await manager.put_stream(storage_key="public", **PHOTO, stream=stream())
            assert backend.headers[private[0].location] is None
            assert backend.headers[public.location] is not None
            assert object_headers.get() is None


PARTS = bytes(6 << 20)


class TestS3:
    async def test_stored_headers(self, moto_server: S3Server) -> None:
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket, part_size=5 << 20)
            async with manager_with(backend, acl="public-read") as manager:
                page = {"content_type": "image/svg+xml", "original_filename": "x.svg"}
                private = await manager.put_bytes(storage_key="private", **PHOTO, content=b"<svg>", **page)
                refs = [
                    await manager.put_bytes(storage_key="public", **PHOTO, content=b"<svg>", **page),
                    await manager.put_stream(storage_key="public", **PHOTO, stream=[PARTS], **page),
                    await manager.copy(private, **PHOTO, storage_key="public"),
                ]
                refs.append(await manager.copy(refs[1], **PHOTO))
                async with backend.client() as client, httpx.AsyncClient() as http:
                    for ref in refs:
                        head = await client.head_object(Bucket=bucket, Key=ref.location)
                        found = (head["CacheControl"], head["ContentType"], head["ContentDisposition"])
                        assert found == (YEAR, "application/octet-stream", 'attachment; filename="x.svg"')
                        acl = await client.get_object_acl(Bucket=bucket, Key=ref.location)
                        assert any("AllUsers" in str(grant) for grant in acl["Grants"])
                        url = PublicURL(f"{moto_server.endpoint_url}/{bucket}").url_of(ref.location)
                        assert (await http.get(url)).headers["content-type"] == "application/octet-stream"
                    back = await manager.copy(refs[0], **PHOTO, storage_key="private")
                    head = await client.head_object(Bucket=bucket, Key=back.location)
                    assert "CacheControl" not in head
                    assert "ContentDisposition" not in head

    async def test_a_server_that_goes_by_the_extension(self, seaweedfs_server: S3Server) -> None:
        """SeaweedFS takes `application/octet-stream` for unknown."""
        names = {
            "x.js": "text/javascript",
            "page.html": "text/html",
            "x.css": None,
            "image.svg": "image/svg+xml",
            "me.png": "image/png",
        }
        async with seaweedfs_server.bucket() as bucket:
            backend = seaweedfs_server.backend(bucket)
            async with manager_with(backend) as manager, backend.client() as client:
                for name, kind in names.items():
                    page = {"content_type": kind, "original_filename": name}
                    private = await manager.put_bytes(storage_key="private", **PHOTO, content=b"content", **page)
                    public = await manager.put_bytes(storage_key="public", **PHOTO, content=b"content", **page)
                    for ref in (public, await manager.copy(private, **PHOTO, storage_key="public")):
                        head = await client.head_object(Bucket=bucket, Key=ref.location)
                        assert head["ContentType"] == ("image/png" if name == "me.png" else "application/octet-stream"), name

    @pytest.mark.parametrize("location", ["plain", "a+b c%2Fd?e#f&g=h.png", "caf\u00e9/\U0001f600/~it's.png"])
    async def test_the_path_of_a_url(self, seaweedfs_server: S3Server, location: str) -> None:
        """A server finds the object by the URL's path; a signature in the query lets the test in."""
        async with seaweedfs_server.bucket() as bucket:
            backend = seaweedfs_server.backend(bucket)
            await backend.put_bytes(location, b"content")
            signed = await backend.presign_get(location, expires_in=HOUR)
            url = PublicURL(f"{seaweedfs_server.endpoint_url}/{bucket}").url_of(location)
            assert signed.partition("?")[0] == url
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"{url}?{signed.partition('?')[2]}")).content == b"content"
            await backend.aclose()


class TestObstore:
    async def test_stored_headers(self, moto_server: S3Server) -> None:
        async with moto_server.bucket() as bucket:
            backend = ObjectStoreBackend(f"s3://{bucket}", **moto_server.obstore_options())
            direct = moto_server.backend(bucket)
            async with manager_with(backend) as manager:
                page = {"content_type": "text/html", "original_filename": "x.html"}
                private = await manager.put_bytes(storage_key="private", **PHOTO, content=b"<p>", **page)
                refs = [
                    await manager.put_bytes(storage_key="public", **PHOTO, content=b"<p>", **page),
                    await manager.put_stream(storage_key="public", **PHOTO, stream=[b"<p>"], **page),
                    await manager.copy(private, **PHOTO, storage_key="public"),
                ]
                async with direct.client() as client:
                    for ref in refs:
                        head = await client.head_object(Bucket=bucket, Key=ref.location)
                        found = (head["CacheControl"], head["ContentType"], head["ContentDisposition"])
                        assert found == (YEAR, "application/octet-stream", 'attachment; filename="x.html"')
            async with manager_with(backend, acl="public-read") as manager:
                with pytest.raises(ConfigurationError, match="ACL"):
                    await manager.put_bytes(storage_key="public", **PHOTO, content=b"...")
            await direct.aclose()


async def test_a_local_disk_needs_no_headers(tmp_path: Any) -> None:
    async with manager_with(LocalStorageBackend(tmp_path, fsync=False), acl="public-read") as manager:
        ref = await manager.put_bytes(storage_key="public", **PHOTO, content=b"...", content_type="text/html")
        copy = await manager.copy(ref, **PHOTO)
        assert await manager.get(copy) == b"..."
