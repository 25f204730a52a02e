"""What is S3's own in the S3 backend: its settings, its clients, how it cuts, lists, deletes and signs."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import sys
import traceback
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from aiobotocore.config import AioConfig
from botocore.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.s3.models import s3_backends

from granite_storage import streams
from granite_storage.backends import _s3_upload
from granite_storage.backends._s3_client import client_config
from granite_storage.backends._s3_upload import MAX_PARTS, PartSource, part_size_of
from granite_storage.backends.s3 import S3ConfigurationError, S3StorageBackend
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    ConfigurationError,
    InvalidLocationError,
    MissingDependencyError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from granite_storage.streams import MeasuredStream
from tests.faults.s3_proxy import Gate, answer, fault_proxy, wait_for
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server, new_client, new_session

MIB = 1 << 20


async def chunks(*sizes: int) -> AsyncIterator[bytes]:
    for number, size in enumerate(sizes):
        await asyncio.sleep(0)
        yield bytes([number % 251]) * size


async def content_of(backend: S3StorageBackend, location: str) -> bytes:
    reader = await backend.open(location)
    try:
        return await reader.read()
    finally:
        await reader.aclose()


async def locations_of(backend: S3StorageBackend, prefix: str = "", start_after: str | None = None) -> list[str]:
    return [info.location async for info in backend.iter_objects(prefix, start_after=start_after)]


@pytest.fixture
def _buckets(moto_server: S3Server, seaweedfs_server: S3Server) -> None:
    """Have the buckets made where it may block."""
    assert moto_server.shared_bucket
    assert seaweedfs_server.shared_bucket


@asynccontextmanager
async def fresh(server: S3Server) -> AsyncIterator[S3StorageBackend]:
    """Give a backend with a prefix of its own, and empty it."""
    backend = server.backend(server.shared_bucket, prefix=uuid.uuid4().hex, part_size=5 * MIB)
    yield backend
    await backend.delete_many(await locations_of(backend))
    await backend.aclose()


@pytest.fixture
async def moto(_buckets: None, moto_server: S3Server) -> AsyncIterator[S3StorageBackend]:
    async with fresh(moto_server) as backend:
        yield backend


@pytest.fixture
async def weed(_buckets: None, seaweedfs_server: S3Server) -> AsyncIterator[S3StorageBackend]:
    async with fresh(seaweedfs_server) as backend:
        yield backend


class TestSettings:
    def test_as_in_the_guide(self) -> None:
        backend = S3StorageBackend(bucket="my-bucket")
        assert (backend.bucket, backend.prefix) == ("my-bucket", "")
        assert repr(backend) == "S3StorageBackend('my-bucket')"

    @pytest.mark.parametrize("prefix", ["app/uploads", "app/uploads/"])
    def test_prefix_is_whole_segments(self, prefix: str) -> None:
        assert S3StorageBackend("b", prefix=prefix).prefix == "app/uploads"

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ({"bucket": ""}, "bucket"),
            ({"prefix": "/a"}, "prefix"),
            ({"prefix": "a//b"}, "prefix"),
            ({"prefix": "../a"}, "prefix"),
            ({"prefix": "a\\b"}, "prefix"),
            ({"part_size": 5 * MIB - 1}, "part_size"),
            ({"part_size": (5 << 30) + 1}, "part_size"),
            ({"part_concurrency": 0}, "part_concurrency"),
            ({"max_parts_in_memory": 0}, "max_parts_in_memory"),
            ({"max_pool_connections": 0}, "max_pool_connections"),
            ({"max_attempts": 0}, "max_attempts"),
            ({"read_timeout": -1}, "read_timeout"),
            ({"pool_timeout": 0}, "pool_timeout"),
            ({"client_kwargs": {"config": None}}, "config"),
            ({"extra_put_kwargs": {"Bucket": "other"}}, "Bucket"),
            ({"extra_put_kwargs": {"IfNoneMatch": "*"}}, "IfNoneMatch"),
            ({"extra_put_kwargs": {"ChecksumCRC32": "..."}}, "ChecksumCRC32"),
        ],
    )
    def test_what_cannot_work_is_refused_at_once(self, wrong: dict[str, Any], named: str) -> None:
        with pytest.raises(ConfigurationError, match=named):
            S3StorageBackend(**{"bucket": "b", **wrong})

    def test_without_an_sdk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "aioboto3", None)
        S3StorageBackend("b")
        monkeypatch.setitem(sys.modules, "aiobotocore", None)
        with pytest.raises(MissingDependencyError, match=r"granite-storage\[s3\]"):
            S3StorageBackend("b")

    @pytest.mark.case("POL-08")
    def test_repr_has_no_secret(self) -> None:
        backend = S3StorageBackend(
            "b",
            endpoint_url="https://user:hunter2@example.com",
            client_kwargs={
                "aws_access_key_id": "AKIDHUNTER2",
                "aws_secret_access_key": "hunter2",
                "aws_session_token": "hunter2",
            },
            extra_put_kwargs={"SSECustomerKey": "hunter2"},
        )
        assert "hunter2" not in (repr(backend) + str(backend) + repr(backend._settings)).lower()

    @pytest.mark.parametrize("config_class", [Config, AioConfig])
    def test_the_callers_config_goes_first(self, config_class: type) -> None:
        given = config_class(max_pool_connections=7, s3={"addressing_style": "virtual", "payload_signing_enabled": True})
        merged = client_config(S3StorageBackend("b", config=given, read_timeout=3)._settings)
        assert (merged.max_pool_connections, merged.read_timeout, merged.signature_version) == (7, 3, "s3v4")
        assert merged.s3 == {"addressing_style": "virtual", "payload_signing_enabled": False}

    def test_the_callers_connector_arguments_are_kept(self) -> None:
        given = AioConfig(connector_args={"keepalive_timeout": 3})
        assert client_config(S3StorageBackend("b", config=given)._settings).connector_args["keepalive_timeout"] == 3


class CountingSession:
    """A session that counts the clients it makes."""

    def __init__(self, session: Any) -> None:
        self._session = getattr(session, "_session", session)
        self._inner = session
        self.made = 0

    def client(self, _: str, **options: Any) -> Any:
        self.made += 1
        return new_client(self._inner, **options)


class TestClients:
    async def test_calls_at_once_open_one_client(self, moto_server: S3Server) -> None:
        session = CountingSession(moto_server.session)
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket, session=session)
            await asyncio.gather(*(backend.exists(f"a/{number}") for number in range(20)))
            await backend.put_bytes("a", b"...")
            assert session.made == 1
            await backend.aclose()
            await backend.aclose()
            assert await content_of(backend, "a") == b"..."
            assert session.made == 2
            await backend.aclose()

    async def test_a_cancelled_first_call_does_not_spoil_the_next(self, moto: S3StorageBackend) -> None:
        first = asyncio.ensure_future(moto.exists("a"))
        second = asyncio.ensure_future(moto.exists("a"))
        await asyncio.sleep(0.001)
        first.cancel()
        assert await second is False
        with pytest.raises(asyncio.CancelledError):
            await first

    def test_asyncio_run_closes_what_nobody_closed(self, moto_server: S3Server) -> None:
        backend = moto_server.backend(moto_server.new_bucket())
        for turn in range(3):
            asyncio.run(backend.put_bytes(f"turn/{turn}", b"..."))
        gc.collect()
        (state,) = backend._clients._loops.values()
        assert state.client is not None
        assert state.client.closed

    def test_a_loop_closed_by_hand(self, moto_server: S3Server) -> None:
        backend = moto_server.backend(moto_server.new_bucket())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(backend.put_bytes("turn/0", b"..."))
        loop.close()

        async def use_and_close() -> None:
            assert await content_of(backend, "turn/0") == b"..."
            await backend.aclose()

        asyncio.run(use_and_close())
        del loop
        gc.collect()
        assert len(backend._clients._loops) == 0

    async def test_a_dropped_backend_closes_its_client(self, moto_server: S3Server) -> None:
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket)
            await backend.exists("a")
            del backend
            gc.collect()

    async def test_the_raw_client(self, moto: S3StorageBackend) -> None:
        await moto.put_bytes("a", b"12345")
        async with moto.client() as client:
            assert (await client.head_object(Bucket=moto.bucket, Key=f"{moto.prefix}/a"))["ContentLength"] == 5

    async def test_an_impossible_endpoint(self) -> None:
        session = new_session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY)
        backend = S3StorageBackend("b", session=session, endpoint_url="no url")
        with pytest.raises(S3ConfigurationError, match="endpoint_url"):
            await backend.exists("a")


class TestWrites:
    async def test_small_is_one_verified_exclusive_request(self, moto_server: S3Server, moto: S3StorageBackend) -> None:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            backend = moto_server.backend(moto.bucket, prefix=moto.prefix, endpoint_url=proxy.url)
            result = await backend.put_stream("a/b", chunks(100, 1000), content_type="text/plain")
            await backend.aclose()
        assert result == {"bucket": moto.bucket}
        (request,) = proxy.requests
        expected = hashlib.sha256(await content_of(moto, "a/b")).digest()
        assert request.operation == "PutObject"
        assert request.headers["if-none-match"] == "*"
        assert request.headers["x-amz-checksum-sha256"] == _s3_upload.base64_text(expected)
        assert request.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert "x-amz-checksum-sha256" in request.headers["authorization"]

    @pytest.mark.case("STR-10")
    @pytest.mark.parametrize("stream", [True, False])
    async def test_empty_is_one_put(self, moto_server: S3Server, moto: S3StorageBackend, stream: bool) -> None:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            backend = moto_server.backend(moto.bucket, prefix=moto.prefix, endpoint_url=proxy.url)
            await (backend.put_stream("empty", chunks()) if stream else backend.put_bytes("empty", b""))
            assert await content_of(backend, "empty") == b""
            await backend.aclose()
        assert proxy.count() == {"PutObject": 1, "GetObject": 1}

    @pytest.mark.parametrize(
        ("sizes", "parts"),
        [((5 * MIB,), []), ((MIB,) * 5, []), ((MIB,) * 5 + (1,), [5 * MIB, 1]), ((700_000,) * 16, [5 * MIB, 5 * MIB, 714_240])],
    )
    @pytest.mark.parametrize("stream", [True, False])
    async def test_parts(
        self, seaweedfs_server: S3Server, weed: S3StorageBackend, sizes: tuple[int, ...], parts: list[int], stream: bool
    ) -> None:
        content = b"".join([chunk async for chunk in chunks(*sizes)])
        with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
            backend = seaweedfs_server.backend(
                weed.bucket, prefix=weed.prefix, endpoint_url=proxy.url, part_size=5 * MIB, conditional_writes=True
            )
            await (backend.put_stream("a", chunks(*sizes)) if stream else backend.put_bytes("a", content))
            await backend.aclose()
        sent = {r.query["partNumber"][0]: int(r.headers["content-length"]) for r in proxy.requests if r.operation == "UploadPart"}
        assert [sent[number] for number in sorted(sent)] == parts
        assert proxy.count()["PutObject"] == (0 if parts else 1)
        assert await content_of(weed, "a") == content

    async def test_parts_side_by_side_and_no_more(self, seaweedfs_server: S3Server, weed: S3StorageBackend) -> None:
        most = in_progress = 0
        others = asyncio.Event()

        async def counted(request: Any) -> bytes:
            nonlocal most, in_progress
            in_progress += 1
            most = max(most, in_progress)
            if most > 1:
                others.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(others.wait(), 60)
            await asyncio.sleep(0.02)  # for one more than there may be
            try:
                return await request.forward()
            finally:
                in_progress -= 1

        with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
            proxy.on("UploadPart", counted, times=100)
            backend = seaweedfs_server.backend(
                weed.bucket, prefix=weed.prefix, endpoint_url=proxy.url, part_size=5 * MIB, part_concurrency=3
            )
            await backend.put_stream("a", chunks(*(MIB,) * 40))
            await backend.aclose()
        assert 2 <= most <= 3

    @pytest.mark.case("LIM-06")
    async def test_many_uploads_share_the_memory(self, seaweedfs_server: S3Server, weed: S3StorageBackend) -> None:
        """However many streams there are, only so many parts are read ahead, and small ones do not wait for large ones.

        No part leaves the memory while the server does not say how the uploads are called; so what was pulled is in memory.
        """
        pulled = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal pulled
            for _ in range(7):
                pulled += MIB
                yield bytes(MIB)
                await asyncio.sleep(0)

        gate = Gate()
        with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
            proxy.on("CreateMultipartUpload", wait_for(gate), times=30)
            backend = seaweedfs_server.backend(
                weed.bucket, prefix=weed.prefix, endpoint_url=proxy.url, part_size=5 * MIB, max_parts_in_memory=3
            )
            uploads = [asyncio.ensure_future(backend.put_stream(f"large/{number}", counted())) for number in range(30)]
            await gate.reached()
            for number in range(10):
                await backend.put_stream(f"small/{number}", chunks(1000))
            assert 3 * 5 * MIB < pulled <= 30 * 2 * MIB + 3 * 5 * MIB
            gate.open()
            await asyncio.gather(*uploads)
            assert len(await locations_of(weed)) == 40
            (state,) = backend._clients._loops.values()
            assert state.client is not None
            assert state.client.room._value == 3
            await backend.aclose()

    async def test_a_part_is_let_go_before_the_next_one_is_filled(
        self, seaweedfs_server: S3Server, weed: S3StorageBackend
    ) -> None:
        """The parts of one stream that are in memory are never more than `part_concurrency`, not even for a moment."""
        in_memory = most = 0

        class Counted(bytes):
            def __del__(self) -> None:
                nonlocal in_memory
                in_memory -= 1

        async def counted() -> AsyncIterator[bytes]:
            nonlocal in_memory, most
            for _ in range(60):
                chunk = Counted(MIB)
                in_memory += 1
                most = max(most, in_memory)
                yield chunk
                del chunk

        backend = seaweedfs_server.backend(weed.bucket, prefix=weed.prefix, part_size=5 * MIB, part_concurrency=3)
        await backend.put_stream("a", counted())
        await backend.aclose()
        assert 10 < most <= 3 * 5 + 2

    async def test_all_parts_of_a_known_size_are_equal(self, moto: S3StorageBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first one too, although it is taken before it is known whether there is a second: R2 wants them equal."""
        sizes: list[int] = []
        send_part = _s3_upload.MultipartUpload._send_part

        async def counted(self: _s3_upload.MultipartUpload, number: int, body: _s3_upload.Body, room: asyncio.Semaphore) -> None:
            sizes.append(len(body))
            await send_part(self, number, body, room)

        monkeypatch.setattr(_s3_upload, "MAX_PARTS", 2)
        monkeypatch.setattr(_s3_upload.MultipartUpload, "_send_part", counted)
        await moto.put_stream("a", MeasuredStream(chunks(*(MIB,) * 20), size=20 * MIB))
        assert sizes == [10 * MIB] * 2

    @settings(deadline=None, max_examples=30)
    @given(st.integers(5 * MIB, 5 << 30))
    def test_parts_never_run_out(self, part_size: int) -> None:
        sizes = [part_size_of(number, part_size) for number in range(1, MAX_PARTS + 1)]
        assert sum(sizes) >= 5 << 40
        assert sizes == sorted(sizes)
        assert sizes[:4500] == [part_size] * 4500
        assert sizes[-1] <= 5 << 30

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(1, 20_000), max_size=10), st.integers(1, 30_000))
    def test_cutting_a_stream(self, sizes: list[int], part_size: int) -> None:
        async def cut(source: PartSource) -> list[bytes]:
            parts, left = [], sum(sizes)
            while body := await source.take(part_size):
                parts.append(b"".join(body.pieces))
                body.drop()
                left -= len(parts[-1])
                assert await source.ended() is (left == 0)
            assert await source.ended()
            return parts

        async def check() -> None:
            content = b"".join([chunk async for chunk in chunks(*sizes)])
            expected = [content[start : start + part_size] for start in range(0, len(content), part_size)]
            room = asyncio.Semaphore(1)
            assert await cut(PartSource(content, room)) == expected
            assert await cut(PartSource(chunks(*sizes), room)) == expected
            assert not room.locked()

        asyncio.run(check())

    async def test_slivers_are_joined(self, moto: S3StorageBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        bodies = []

        async def write(self: S3StorageBackend, location: str, content: Any, *_: Any) -> Any:
            bodies.append(await PartSource(content, asyncio.Semaphore(1)).take(5 * MIB))

        monkeypatch.setattr(S3StorageBackend, "_write", write)
        await moto.put_stream("slivers", chunks(*(10,) * 100_000))
        (body,) = bodies
        whole, rest = divmod(100_000, streams._MAX_GROUPED)
        assert [len(piece) for piece in body.pieces] == [10 * streams._MAX_GROUPED] * whole + [10 * rest]

    @pytest.mark.parametrize("size", [10, 6 * MIB])
    async def test_extra_parameters(self, moto_server: S3Server, moto: S3StorageBackend, size: int) -> None:
        extra = {"CacheControl": "max-age=60", "Metadata": {"origin": "tests"}, "ContentType": "text/plain"}
        backend = moto_server.backend(moto.bucket, prefix=moto.prefix, extra_put_kwargs=extra, part_size=5 * MIB)
        await backend.put_stream("a", chunks(size))
        await backend.put_stream("b", chunks(size), content_type="image/png")
        await backend.copy("b", "c")
        async with backend.client() as client:
            for key, content_type in (("a", "text/plain"), ("b", "image/png"), ("c", "image/png")):
                head = await client.head_object(Bucket=moto.bucket, Key=f"{moto.prefix}/{key}")
                assert (head["CacheControl"], head["Metadata"]["origin"]) == ("max-age=60", "tests")
                assert head["ContentType"] == content_type
        await backend.aclose()

    async def test_an_unknown_content_is_nothing_that_a_browser_runs(self, weed: S3StorageBackend) -> None:
        await weed.put_bytes("page", b"<html><script>alert(1)</script></html>")
        assert (await weed.stat("page")).content_type == "application/octet-stream"

    @pytest.mark.parametrize("size", [10, 6 * MIB])
    async def test_without_conditional_writes(self, seaweedfs_server: S3Server, weed: S3StorageBackend, size: int) -> None:
        with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
            backend = seaweedfs_server.backend(
                weed.bucket, prefix=weed.prefix, endpoint_url=proxy.url, conditional_writes=False, part_size=5 * MIB
            )
            await backend.put_stream("a", chunks(size))
            for write in (backend.put_stream("a", chunks(size)), backend.put_bytes("a", b"b"), backend.copy("a", "a")):
                with pytest.raises(ObjectExistsError):
                    await write
            await backend.copy("a", "b")
            await backend.aclose()
        assert not any("if-none-match" in request.headers for request in proxy.requests)
        assert len(await content_of(weed, "a")) == len(await content_of(weed, "b")) == size

    @pytest.mark.parametrize("size", [10, 6 * MIB])
    async def test_without_checksums(self, seaweedfs_server: S3Server, weed: S3StorageBackend, size: int) -> None:
        with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
            backend = seaweedfs_server.backend(
                weed.bucket, prefix=weed.prefix, endpoint_url=proxy.url, checksums=False, part_size=5 * MIB
            )
            await backend.put_stream("a", chunks(size))
            await backend.aclose()
        bodies = [request for request in proxy.requests if request.operation in {"PutObject", "UploadPart"}]
        assert all("content-md5" in request.headers for request in bodies)
        assert not any("x-amz-checksum-sha256" in request.headers for request in proxy.requests)
        assert len(await content_of(weed, "a")) == size

    async def test_a_copy_in_parts(self, weed: S3StorageBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_s3_upload, "_COPY_PART_SIZE", 5 * MIB)
        await weed.put_stream("a", chunks(*(MIB,) * 12), content_type="text/plain")
        await weed.copy("a", "b")
        assert await content_of(weed, "b") == await content_of(weed, "a")
        assert (await weed.stat("b")).content_type == "text/plain"

    @pytest.mark.case("S3F-15")
    async def test_a_bucket_with_versions(self, moto_server: S3Server) -> None:
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket)
            async with backend.client() as client:
                await client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
                version = (await backend.put_bytes("a", b"first"))["version_id"]
                await backend.delete("a")
                await backend.delete("a")
                assert not await backend.exists("a")
                old = await client.get_object(Bucket=bucket, Key="a", VersionId=version)
                assert await old["Body"].read() == b"first"
                for marker in (await client.list_object_versions(Bucket=bucket))["DeleteMarkers"]:
                    await client.delete_object(Bucket=bucket, Key="a", VersionId=marker["VersionId"])
                await client.delete_object(Bucket=bucket, Key="a", VersionId=version)
            await backend.aclose()

    async def test_the_prefix_counts_for_the_length(self, moto_server: S3Server) -> None:
        backend = moto_server.backend("b", prefix="p" * 200)
        with pytest.raises(InvalidLocationError, match="1024 bytes"):
            await backend.put_bytes("/".join(["s" * 200] * 4) + "/" + "e" * 20, b"...")


ODD_KEYS = [
    "a b",
    "a+b",
    "a&b",
    "é",
    "e\u0301",
    "a%2Fb",
    "%41",
    "a=b;c",
    "'\"",
    "a#b?c",
    "中/文",
    "\U0001f600",
    "~!@$^*()",
    "<k>",
]


class TestListing:
    @pytest.mark.case("S3F-11")
    async def test_2501_keys(self, moto_server: S3Server) -> None:
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket, prefix="p")
            expected = [f"many/{number:04}" for number in range(2501)]
            for location in expected:  # by the way of moto's own tests: thousands of requests would take it a minute
                s3_backends["123456789012"]["aws"].put_object(bucket, f"p/{location}", b"")
            listing: Any = backend.iter_objects()
            seen = [(await anext(listing)).location for _ in range(1000)]
            await asyncio.gather(backend.delete("many/0000"), backend.put_bytes("many/0000-", b""), backend.delete("many/2000"))
            seen += [info.location async for info in listing]
            assert seen == [location for location in expected if location != "many/2000"]
            failures = await backend.delete_many(expected)
            assert failures == {}
            assert await locations_of(backend) == ["many/0000-"]
            await backend.aclose()

    @pytest.mark.case("S3F-12")
    @pytest.mark.parametrize("fixture", ["moto", "weed"])
    async def test_odd_keys(self, moto: S3StorageBackend, weed: S3StorageBackend, fixture: str) -> None:
        backend = {"moto": moto, "weed": weed}[fixture]
        for key in ODD_KEYS:
            await backend.put_bytes(f"odd/{key}", key.encode())
        assert await locations_of(backend) == sorted([f"odd/{key}" for key in ODD_KEYS], key=str.encode)
        for key in ODD_KEYS:
            assert await locations_of(backend, f"odd/{key}")
            assert await content_of(backend, f"odd/{key}") == key.encode()
        assert await backend.delete_many([f"odd/{key}" for key in ODD_KEYS]) == {}
        assert await locations_of(backend) == []

    @pytest.mark.case("S3F-11")
    @pytest.mark.parametrize("page_size", [1, 2, 3, None])
    @pytest.mark.parametrize("fixture", ["moto", "weed"])
    async def test_folders_and_their_neighbours(
        self, request: pytest.FixtureRequest, fixture: str, page_size: int | None, moto: S3StorageBackend, weed: S3StorageBackend
    ) -> None:
        """Walked by folders or listed at once, on a server that has a tree of them and on one that has none."""
        names = ["t-/1", "t/1", "t/2", "t/a-/1", "t/a/1", "t/a/2/3", "t.x", "t!/1", "t0", "tt/1", "u", "a/b/c/d/e", "a/b/c/d-"]
        filled = {"moto": moto, "weed": weed}[fixture]
        await asyncio.gather(*(filled.put_bytes(name, b"") for name in names))
        server: S3Server = request.getfixturevalue({"moto": "moto_server", "weed": "seaweedfs_server"}[fixture])
        backend = server.backend(filled.bucket, prefix=filled.prefix, list_by_folder=True)
        backend._page_size = page_size
        expected = sorted(names, key=str.encode)
        assert await locations_of(backend) == expected
        for prefix in ("t", "t/", "t/a", "a/b", "x"):
            assert await locations_of(backend, prefix) == [name for name in expected if name.startswith(prefix)]
        for after in ("t", "t/", "t-/1", "t/1", "t/a/2", "t/a/2/3", "t/b", "u", "a/b/c/d/"):
            assert await locations_of(backend, "", after) == [name for name in expected if name.encode() > after.encode()]
        await backend.aclose()

    async def test_a_server_that_lists_in_another_order(self, weed: S3StorageBackend, seaweedfs_server: S3Server) -> None:
        for name in ("t/1", "t-/1"):
            await weed.put_bytes(name, b"")
        backend = seaweedfs_server.backend(weed.bucket, prefix=weed.prefix, list_by_folder=False)
        with pytest.raises(S3ConfigurationError, match="list_by_folder"):
            await locations_of(backend)
        await backend.aclose()

    async def test_keys_of_other_programs_are_seen(self, moto: S3StorageBackend) -> None:
        async with moto.client() as client:
            for key in ("folder/", "a//b"):
                await client.put_object(Bucket=moto.bucket, Key=f"{moto.prefix}/{key}", Body=b"")
            assert await locations_of(moto) == ["a//b", "folder/"]
            for key in ("folder/", "a//b"):
                await client.delete_object(Bucket=moto.bucket, Key=f"{moto.prefix}/{key}")


class TestDelete:
    async def test_failures_are_named_key_by_key(self, moto_server: S3Server, moto: S3StorageBackend) -> None:
        locations = ["a", "b/c & d", "e"]
        for location in locations:
            await moto.put_bytes(location, b"")
        body = "".join(
            f"<Error><Key>{moto.prefix}/{key}</Key><Code>{code}</Code><Message>no</Message></Error>"
            for key, code in (("a", "AccessDenied"), ("b/c &amp; d", "InternalError"), ("e", "NoSuchKey"))
        )

        async def partly(request: Any) -> bytes:
            await request.read_body()
            xml = f"<DeleteResult>{body}</DeleteResult>"
            return f"HTTP/1.1 200 OK\r\nContent-Length: {len(xml)}\r\nConnection: close\r\n\r\n{xml}".encode()

        with fault_proxy(moto_server.endpoint_url) as proxy:
            proxy.on("DeleteObjects", partly)
            backend = moto_server.backend(moto.bucket, prefix=moto.prefix, endpoint_url=proxy.url)
            failures = await backend.delete_many(locations)
            await backend.aclose()
        assert {location: type(error) for location, error in failures.items()} == {
            "a": AccessDeniedError,
            "b/c & d": type(failures["b/c & d"]),
        }
        assert all(error.location == location for location, error in failures.items())

    async def test_a_server_without_batches(self, moto_server: S3Server, moto: S3StorageBackend) -> None:
        locations = [f"a/{number}" for number in range(12)]
        for location in locations:
            await moto.put_bytes(location, b"")
        with fault_proxy(moto_server.endpoint_url) as proxy:
            proxy.on("DeleteObjects", answer(501, "NotImplemented"))
            proxy.on("DeleteObject", answer(403, "AccessDenied"), fits=lambda request: request.key.endswith("/a/7"))
            backend = moto_server.backend(moto.bucket, prefix=moto.prefix, endpoint_url=proxy.url)
            failures = await backend.delete_many(locations)
            await backend.aclose()
        assert list(failures) == ["a/7"]
        assert isinstance(failures["a/7"], AccessDeniedError)
        assert await locations_of(moto) == ["a/7"]

    @pytest.mark.case("S3F-15")
    async def test_a_locked_object_is_asked_for_once(self, moto_server: S3Server, moto: S3StorageBackend) -> None:
        await moto.put_bytes("locked", b"")
        with fault_proxy(moto_server.endpoint_url) as proxy:
            proxy.on("DeleteObject", answer(403, "AccessDenied"), times=99)
            backend = moto_server.backend(moto.bucket, prefix=moto.prefix, endpoint_url=proxy.url)
            with pytest.raises(AccessDeniedError) as caught:
                await backend.delete("locked")
            await backend.aclose()
        assert caught.value.location == "locked"
        assert proxy.count() == Counter(DeleteObject=1)

    async def test_a_server_that_says_what_was_missing(self, moto_server: S3Server, moto: S3StorageBackend) -> None:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            proxy.on("DeleteObject", answer(404, "NoSuchKey"))
            backend = moto_server.backend(moto.bucket, prefix=moto.prefix, endpoint_url=proxy.url)
            await backend.delete("missing")
            await backend.aclose()


class TestCleanup:
    async def test_only_what_is_old_and_below_the_prefix(self, seaweedfs_server: S3Server) -> None:
        async with seaweedfs_server.bucket() as bucket:
            backend = seaweedfs_server.backend(bucket, prefix="mine")
            async with backend.client() as client:
                for key in ("mine/a", "mine/b", "mine2/c", "other"):
                    upload = await client.create_multipart_upload(Bucket=bucket, Key=key)
                    await client.upload_part(Bucket=bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"...")
                assert await backend.cleanup_incomplete(older_than=timedelta(hours=1)) == 0
                assert await backend.cleanup_incomplete(older_than=timedelta(0)) == 2
                left = await client.list_multipart_uploads(Bucket=bucket)
            assert sorted(upload["Key"] for upload in left["Uploads"]) == ["mine2/c", "other"]
            await backend.aclose()


class TestPresign:
    async def test_a_browser_can_read(self, weed: S3StorageBackend) -> None:
        await weed.put_bytes("a b/é+&.txt", b"content")
        url = await weed.presign_get(
            "a b/é+&.txt", expires_in=timedelta(minutes=1), content_type="text/plain", disposition='attachment; filename="é.txt"'
        )

        def get(url: str) -> tuple[bytes, str, str]:
            with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  # it is an HTTP URL
                return response.read(), response.headers["Content-Type"], response.headers["Content-Disposition"]

        assert (await asyncio.to_thread(get, url))[:2] == (b"content", "text/plain")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            await asyncio.to_thread(get, url.replace("%2B", "%2b-"))

    @pytest.mark.parametrize("expires_in", [timedelta(0), timedelta(seconds=-1), timedelta(days=7, seconds=1)])
    async def test_impossible_expiry(self, moto: S3StorageBackend, expires_in: timedelta) -> None:
        with pytest.raises(ValueError, match="expires_in"):
            await moto.presign_get("a", expires_in=expires_in)


CALLS: dict[str, Any] = {
    "put_bytes": lambda backend: backend.put_bytes("a", b"..."),
    "put_stream": lambda backend: backend.put_stream("a", chunks(6 * MIB)),
    "open": lambda backend: backend.open("a"),
    "stat": lambda backend: backend.stat("a"),
    "exists": lambda backend: backend.exists("a"),
    "delete": lambda backend: backend.delete("a"),
    "copy": lambda backend: backend.copy("a", "b"),
    "iter_objects": lambda backend: locations_of(backend),
    "cleanup_incomplete": lambda backend: backend.cleanup_incomplete(older_than=timedelta(0)),
}


class TestErrors:
    @pytest.mark.case("S3F-16")
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("fixture", ["moto", "weed"])
    async def test_wrong_bucket(self, moto_server: S3Server, seaweedfs_server: S3Server, fixture: str, call: str) -> None:
        server = {"moto": moto_server, "weed": seaweedfs_server}[fixture]
        if fixture == "weed" and call == "delete":
            pytest.skip("SeaweedFS has nothing to say against it")
        backend = server.backend("there-is-no-such-bucket", part_size=5 * MIB)
        with pytest.raises(S3ConfigurationError, match="there-is-no-such-bucket") as caught:
            await CALLS[call](backend)
        assert isinstance(caught.value, BackendError)
        assert not isinstance(caught.value, ObjectNotFoundError)
        await backend.aclose()

    @pytest.mark.case("S3F-16")
    @pytest.mark.parametrize(
        ("status", "code", "details"),
        [(301, "PermanentRedirect", ""), (400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>")],
    )
    async def test_wrong_region(self, moto_server: S3Server, status: int, code: str, details: str) -> None:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            proxy.on("PutObject", answer(status, code, details=details), times=99)
            backend = moto_server.backend("bucket", endpoint_url=proxy.url)
            with pytest.raises(S3ConfigurationError, match="region_name") as caught:
                await backend.put_bytes("a", b"")
            await backend.aclose()
        assert "eu-west-1" in str(caught.value) or not details

    @pytest.mark.case("POL-08")
    @pytest.mark.parametrize("call", CALLS)
    async def test_wrong_secret(self, weed: S3StorageBackend, seaweedfs_server: S3Server, call: str) -> None:
        secret = SECRET_KEY[::-1]
        session = new_session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=secret, region_name="us-east-1")
        backend = seaweedfs_server.backend(weed.bucket, prefix=weed.prefix, session=session, part_size=5 * MIB)
        with pytest.raises(AccessDeniedError) as caught:
            await CALLS[call](backend)
        assert caught.value.__cause__ is not None
        told = str(caught.value) + repr(caught.value) + "".join(traceback.format_exception(caught.value))
        assert secret not in told
        assert ACCESS_KEY not in told
        await backend.aclose()

    async def test_half_of_the_credentials(self) -> None:
        backend = S3StorageBackend("b", endpoint_url="http://127.0.0.1:1", client_kwargs={"aws_access_key_id": "AKID"})
        with pytest.raises(AccessDeniedError, match="no usable credentials"):
            await backend.stat("a")

    @pytest.mark.parametrize("location", ["../a", "a//b", "a/", "/a", "a\\b", "a\nb", ""])
    @pytest.mark.case("LOC-20")
    async def test_hostile_locations_reach_no_server(self, location: str) -> None:
        backend = S3StorageBackend("b", endpoint_url="http://127.0.0.1:1")
        for call in (backend.stat(location), backend.put_bytes(location, b""), backend.copy("a", location)):
            with pytest.raises(InvalidLocationError):
                await call
        with pytest.raises(InvalidLocationError):
            await backend.delete_many(["a", location])
        with pytest.raises(InvalidLocationError):
            await backend.presign_get(location, expires_in=timedelta(minutes=1))
