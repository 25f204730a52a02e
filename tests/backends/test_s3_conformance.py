"""The S3 backend through the public suite, against two servers, with and without a prefix."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import pytest

from granite_storage.backends.base import StorageBackend
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.testing import BackendConformance
from tests.faults.s3_proxy import FaultProxy, Request, answer, fault_proxy, lose_answer
from tests.servers import S3Server

MIB = 1 << 20
ALWAYS = 1 << 30


class S3Conformance(BackendConformance):
    supports_copy = supports_batch_delete = supports_cleanup = supports_abort = True
    supports_presign = supports_batch_presign = supports_presigned_upload = True
    supports_clock = supports_extra_keys = supports_identity = supports_places = True
    supports_mount_check = False
    settles_races_in_parts = settles_races_of_copies = False  # both of these servers look first and act afterwards
    parts_size = 12 * MIB

    server: S3Server
    prefix: ClassVar[str] = ""

    @pytest.fixture
    async def backend(self, server: S3Server) -> AsyncIterator[StorageBackend]:
        self.server = server
        async with server.bucket() as bucket:
            self.bucket = bucket
            backend = self.make()
            yield backend
            await backend.aclose()

    def make(self, bucket: str | None = None, **options: Any) -> S3StorageBackend:
        options = {"part_size": 5 * MIB, "prefix": self.prefix, **options}
        return self.server.backend(bucket or self.bucket, **options)

    @asynccontextmanager
    async def behind_proxy(self, bucket: str | None = None) -> AsyncIterator[tuple[FaultProxy, StorageBackend]]:
        with fault_proxy(self.server.endpoint_url) as proxy:
            backend = self.make(bucket, endpoint_url=proxy.url)
            yield proxy, backend
            await backend.aclose()

    def with_page_size(self, backend: StorageBackend, size: int) -> StorageBackend:
        paged = self.make()
        paged._page_size = size
        return paged

    @asynccontextmanager
    async def with_room_for(self, backend: StorageBackend, size: int) -> AsyncIterator[StorageBackend]:
        room = size

        def too_large(request: Request) -> bool:
            nonlocal room
            length = int(request.headers["content-length"])
            if length > room:
                return True
            room -= length
            return False

        async with self.server.bucket() as bucket, self.behind_proxy(bucket) as (proxy, small):
            proxy.on("PutObject", answer(403, "QuotaExceeded"), fits=too_large, times=ALWAYS)
            proxy.on("UploadPart", answer(507, "InsufficientStorage"), fits=too_large, times=ALWAYS)
            yield small

    @asynccontextmanager
    async def refusing(self, backend: StorageBackend) -> AsyncIterator[StorageBackend]:
        async with self.behind_proxy() as (proxy, refusing):
            proxy.on("*", answer(403, "AccessDenied"), times=ALWAYS)
            yield refusing

    @asynccontextmanager
    async def unreachable(self, backend: StorageBackend) -> AsyncIterator[StorageBackend]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            backend = self.make(endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}", max_attempts=2)
            yield backend
            await backend.aclose()

    @asynccontextmanager
    async def losing_answers(self, backend: StorageBackend, operation: str) -> AsyncIterator[StorageBackend]:
        requests = {"put_bytes": "PutObject", "put_stream": "CompleteMultipartUpload", "delete": "DeleteObject"}
        async with self.behind_proxy() as (proxy, lossy):
            proxy.on(requests[operation], lose_answer)
            yield lossy
            assert proxy.count()[requests[operation]] > 0

    def elsewhere(self, backend: StorageBackend) -> str:
        options = {"endpoint_url": self.server.endpoint_url, "prefix": self.prefix, "part_size": 5 * MIB}
        return "\n".join(
            [
                "from tests.servers import new_session",
                "from granite_storage.backends.s3 import S3StorageBackend",
                f"session = new_session(**{self.server.session_kwargs!r})",
                f"backend = S3StorageBackend({self.bucket!r}, session=session, **{options!r})",
            ]
        )

    async def count_unfinished(self, backend: StorageBackend) -> int:
        async with self.make().client() as client:
            uploads = await client.list_multipart_uploads(Bucket=self.bucket)
        return len(uploads.get("Uploads", ()))


class TestMoto(S3Conformance):
    checks_signatures = False
    memory_growth = 200 * MIB  # moto keeps what it is given, in this process

    async def test_cleanup_leaves_what_is_under_way(self, backend: StorageBackend) -> None:
        pytest.skip("moto says of every upload that it began in 2010")

    @pytest.fixture
    def server(self, moto_server: S3Server) -> S3Server:
        return moto_server


class TestMotoPrefixed(TestMoto):
    prefix = "tenants/7"
    longest_location = 1024 - len("tenants/7/")


class TestSeaweedFS(S3Conformance):
    nests_objects = False  # it takes a folder that is there for an object

    @pytest.fixture
    def server(self, seaweedfs_server: S3Server) -> S3Server:
        return seaweedfs_server


class TestSeaweedFSPrefixed(TestSeaweedFS):
    prefix = "tenants/7"
    longest_location = 1024 - len("tenants/7/")
