"""The backend on obstore through the public suite: S3, Azure with obstore's own prefix, a local disk and memory."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from granite_storage.backends.base import StorageBackend
from granite_storage.backends.obstore import ObjectStoreBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.testing import BackendConformance
from tests.azurite import CLIENT_OPTIONS, AzureServer
from tests.faults.s3_proxy import Fault, FaultProxy, Request, answer, fault_proxy, lose_answer
from tests.servers import S3Server

MIB = 1 << 20
ALWAYS = 1 << 30
QUICK = {"max_retries": 1, "backoff": {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=20)}}


def answer_at_the_end(status: int, code: str) -> Fault:
    """Answer with an error when the whole body has come: obstore's client takes an earlier answer for a broken connection."""

    async def fault(request: Request) -> bytes | None:
        await request.read_body()
        return await answer(status, code)(request)

    return fault


class ObjectStoreConformance(BackendConformance):
    supports_copy = supports_batch_delete = True
    supports_extra_keys = supports_identity = supports_places = True
    supports_clock = supports_mount_check = False
    settles_races_in_parts = False  # obstore knows no condition for uploads in parts
    parts_size = 12 * MIB
    memory_growth = 32 * MIB  # four parts of 5 MiB in flight, one that is filled, and the first, by which a stream is judged

    def with_page_size(self, backend: StorageBackend, size: int) -> StorageBackend:
        paged: Any = self.again(backend)
        inner = paged.inner if isinstance(paged, PrefixedBackend) else paged
        inner._listing = replace(inner._listing, by_folder=True, page_size=size, max_sorted=size)
        return paged

    def again(self, backend: StorageBackend) -> StorageBackend:
        """Return another backend for the same store."""
        raise NotImplementedError


class ServedConformance(ObjectStoreConformance):
    """Over the network, with a proxy for faults."""

    path: ClassVar[str] = ""
    place: str
    requests: ClassVar[dict[str, str]]

    def make(self, place: str | None = None, endpoint_url: str | None = None) -> ObjectStoreBackend:
        raise NotImplementedError

    def another_place(self) -> Any:
        raise NotImplementedError

    def again(self, backend: StorageBackend) -> StorageBackend:
        return self.make()

    @asynccontextmanager
    async def behind_proxy(self, upstream: str, place: str | None = None) -> AsyncIterator[tuple[FaultProxy, StorageBackend]]:
        with fault_proxy(upstream) as proxy:
            backend = self.make(place, endpoint_url=proxy.url)
            yield proxy, backend
            await backend.aclose()

    @asynccontextmanager
    async def unreachable(self, backend: StorageBackend) -> AsyncIterator[StorageBackend]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            backend = self.make(endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
            yield backend
            await backend.aclose()


class TestSeaweedFS(ServedConformance):
    nests_objects = False  # it takes a folder that is there for an object
    settles_races_of_copies = False  # S3 copies on no condition
    server: S3Server

    @pytest.fixture
    async def backend(self, seaweedfs_server: S3Server) -> AsyncIterator[StorageBackend]:
        self.server = seaweedfs_server
        async with self.server.bucket() as self.place:
            backend = self.make()
            yield backend
            await backend.aclose()

    def make(self, place: str | None = None, endpoint_url: str | None = None) -> ObjectStoreBackend:
        return ObjectStoreBackend(f"s3://{place or self.place}{self.path}", **self.options(endpoint_url))

    def options(self, endpoint_url: str | None = None) -> dict[str, Any]:
        return {**self.server.obstore_options(endpoint_url), "retry_config": QUICK, "part_size": 5 * MIB}

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

        async with self.server.bucket() as bucket, self.behind_proxy(self.server.endpoint_url, bucket) as (proxy, small):
            proxy.on("PutObject", answer_at_the_end(403, "QuotaExceeded"), fits=too_large, times=ALWAYS)
            proxy.on("UploadPart", answer_at_the_end(507, "InsufficientStorage"), fits=too_large, times=ALWAYS)
            yield small

    @asynccontextmanager
    async def refusing(self, backend: StorageBackend) -> AsyncIterator[StorageBackend]:
        async with self.behind_proxy(self.server.endpoint_url) as (proxy, refusing):
            proxy.on("*", answer(403, "AccessDenied"), times=ALWAYS)
            yield refusing

    @asynccontextmanager
    async def losing_answers(self, backend: StorageBackend, operation: str) -> AsyncIterator[StorageBackend]:
        requests = {"put_bytes": "PutObject", "put_stream": "CompleteMultipartUpload", "delete": "DeleteObjects"}
        async with self.behind_proxy(self.server.endpoint_url) as (proxy, lossy):
            proxy.on(requests[operation], lose_answer)
            yield lossy
            assert proxy.count()[requests[operation]] > 0

    def elsewhere(self, backend: StorageBackend) -> str:
        options = {**self.options(), "retry_config": None}
        return "\n".join(
            [
                "from granite_storage.backends.obstore import ObjectStoreBackend",
                f"backend = ObjectStoreBackend({f's3://{self.place}{self.path}'!r}, **{options!r})",
            ]
        )

    async def count_unfinished(self, backend: StorageBackend) -> int:
        return await asyncio.to_thread(self.uploads)

    def uploads(self) -> int:
        with self.server._client() as client:
            return len(client.list_multipart_uploads(Bucket=self.place).get("Uploads", ()))


class TestAzurite(ServedConformance):
    path = "/tenants/7"
    longest_location = 1024 - len("tenants/7/")
    counts_unfinished = False  # parts that were never joined are invisible, cannot be removed, and end after a week
    can_be_full = False  # it is unknown in which words Azure would say so
    server: AzureServer

    @pytest.fixture
    async def backend(self, azurite_server: AzureServer) -> AsyncIterator[StorageBackend]:
        self.server = azurite_server
        async with self.server.container() as self.place:
            backend = self.make()
            yield backend
            await backend.aclose()

    def make(self, place: str | None = None, endpoint_url: str | None = None) -> ObjectStoreBackend:
        account = self.server.endpoint_url.rpartition("/")[2]
        if endpoint_url is not None:
            endpoint_url = f"{endpoint_url}/{account}"
        return self.server.backend(
            place or self.place, path=self.path, endpoint_url=endpoint_url, retry_config=QUICK, part_size=5 * MIB
        )

    @property
    def upstream(self) -> str:
        return self.server.endpoint_url.rpartition("/")[0]

    @asynccontextmanager
    async def refusing(self, backend: StorageBackend) -> AsyncIterator[StorageBackend]:
        async with self.behind_proxy(self.upstream) as (proxy, refusing):
            proxy.on("*", answer(403, "AuthorizationPermissionMismatch"), times=ALWAYS)
            yield refusing

    @asynccontextmanager
    async def losing_answers(self, backend: StorageBackend, operation: str) -> AsyncIterator[StorageBackend]:
        lost: list[str] = []
        wanted = {
            "put_bytes": lambda request: request.method == "PUT" and "comp" not in request.query,
            "put_stream": lambda request: request.method == "PUT" and request.query.get("comp") == ["blocklist"],
            "delete": lambda request: request.method == "POST" and request.query.get("comp") == ["batch"],
        }[operation]

        def fits(request: Request) -> bool:
            if wanted(request):
                lost.append(request.target)
                return True
            return False

        async with self.behind_proxy(self.upstream) as (proxy, lossy):
            proxy.on("*", lose_answer, fits=fits)
            yield lossy
            assert lost

    def elsewhere(self, backend: StorageBackend) -> str:
        options = {"config": self.server.config(), "client_options": CLIENT_OPTIONS, "part_size": 5 * MIB}
        return "\n".join(
            [
                "from granite_storage.backends.obstore import ObjectStoreBackend",
                f"backend = ObjectStoreBackend({f'az://{self.place}{self.path}'!r}, **{options!r})",
            ]
        )


class TestMemory(ObjectStoreConformance):
    can_be_full = can_refuse = can_be_unreachable = can_lose_answers = is_shared = counts_unfinished = False
    memory_growth = 100 * MIB

    @pytest.fixture
    async def backend(self) -> StorageBackend:
        from obstore.store import MemoryStore

        self.store = MemoryStore()
        return self.make()

    def make(self) -> StorageBackend:
        return ObjectStoreBackend(self.store, part_size=5 * MIB)

    def again(self, backend: StorageBackend) -> StorageBackend:
        return self.make()


class TestLocal(ObjectStoreConformance):
    keeps_content_type = False
    nests_objects = False
    can_be_full = can_refuse = can_be_unreachable = can_lose_answers = False
    unstorable = frozenset({"longest segment/" + "s" * 255, "longest segment in UTF-8/" + "é" * 127})

    @pytest.fixture
    async def backend(self, tmp_path: Path) -> StorageBackend:
        self.folder = tmp_path
        return self.make()

    def make(self) -> StorageBackend:
        return ObjectStoreBackend(self.folder.as_uri(), part_size=5 * MIB)

    def again(self, backend: StorageBackend) -> StorageBackend:
        return self.make()

    def elsewhere(self, backend: StorageBackend) -> str:
        return "\n".join(
            [
                "from granite_storage.backends.obstore import ObjectStoreBackend",
                f"backend = ObjectStoreBackend({self.folder.as_uri()!r})",
            ]
        )

    async def count_unfinished(self, backend: StorageBackend) -> int:
        return sum(1 for path in self.folder.rglob("*#*") if path.name.rpartition("#")[2].isdigit())
