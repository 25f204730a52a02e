"""Servers that do less than S3 without a word, clocks that are wrong, and the addresses and ends of what is presigned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiobotocore.credentials import AioRefreshableCredentials
from botocore.config import Config

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends import _s3_upload
from granite_storage.backends._s3_upload import MAX_PARTS, PROBE_PREFIX, part_size_of
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.exceptions import AccessDeniedError, ObjectExistsError
from tests.core.support import many
from tests.faults.s3_proxy import (
    FaultProxy,
    Request,
    answer,
    answer_with_header,
    answer_without_header,
    fault_proxy,
    without_header,
)
from tests.servers import S3Server, new_session

MIB = 1 << 20
ALWAYS = 10_000
CONTENT = bytes(range(256)) * 4096 * 6  # 6 MiB: two parts
MINUTES = timedelta(minutes=10)


def stream(content: bytes = CONTENT) -> AsyncIterator[bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), MIB):
            yield content[start : start + MIB]

    return pieces()


async def content_of(backend: S3StorageBackend, location: str) -> bytes:
    reader = await backend.open(location)
    try:
        return await reader.read()
    finally:
        await reader.aclose()


async def keys_in(backend: S3StorageBackend) -> list[str]:
    async with backend.client() as client:
        answer = await client.list_objects_v2(Bucket=backend.bucket)
    return [entry["Key"] for entry in answer.get("Contents", ())]


@asynccontextmanager
async def behind_proxy(server: S3Server, **options: Any) -> AsyncIterator[tuple[FaultProxy, S3StorageBackend]]:
    async with server.bucket() as bucket:
        with fault_proxy(server.endpoint_url) as proxy:
            backend = server.backend(bucket, endpoint_url=proxy.url, part_size=5 * MIB, **options)
            yield proxy, backend
            await backend.aclose()


@pytest.fixture
async def ceph(moto_server: S3Server) -> AsyncIterator[tuple[FaultProxy, S3StorageBackend]]:
    """A server that ignores the condition of a CompleteMultipartUpload, as Ceph 16 does."""
    async with behind_proxy(moto_server) as (proxy, backend):
        proxy.on("CompleteMultipartUpload", without_header("if-none-match"), times=ALWAYS)
        proxy.on("CopyObject", without_header("if-none-match"), times=ALWAYS)
        yield proxy, backend


@pytest.mark.case("RD-01")
class TestConditions:
    async def test_nothing_is_written_over_where_the_server_would(
        self, ceph: tuple[FaultProxy, S3StorageBackend], caplog: pytest.LogCaptureFixture
    ) -> None:
        proxy, backend = ceph
        await backend.put_bytes("kept", b"kept")
        await backend.put_bytes("source", b"source")
        with caplog.at_level(logging.WARNING, "granite_storage"):
            for _ in range(2):  # the first write of a client is as safe as the later ones
                with pytest.raises(ObjectExistsError):
                    await backend.put_stream("kept", stream())
                with pytest.raises(ObjectExistsError):
                    await backend.put_bytes("kept", CONTENT)
                with pytest.raises(ObjectExistsError):
                    await backend.copy("source", "kept")
                assert await content_of(backend, "kept") == b"kept"
                await backend.put_stream("large", stream())
                assert await content_of(backend, "large") == CONTENT
                await backend.delete("large")
            await backend.copy("source", "copy")
        said = [record.getMessage() for record in caplog.records if "ignores If-None-Match" in record.getMessage()]
        assert len(said) == 1
        assert backend.bucket in said[0]
        assert "conditional_writes=False" in said[0]
        assert await keys_in(backend) == ["copy", "kept", "source"]
        assert proxy.count()["CreateMultipartUpload"] > 0

    async def test_a_server_that_looks_at_conditions_is_asked_once(
        self, seaweedfs_server: S3Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with behind_proxy(seaweedfs_server) as (proxy, backend):
            await backend.put_stream("one", stream())
            first = proxy.count()
            proxy.requests.clear()
            await backend.put_stream("two", stream())
            await backend.copy("one", "three")
            assert proxy.count()["HeadObject"] == 1  # of the copy's source
            assert proxy.count()["CompleteMultipartUpload"] == 2
            assert first["CompleteMultipartUpload"] == 2
            assert first["HeadObject"] == 1
            with pytest.raises(ObjectExistsError):
                await backend.put_stream("one", stream())
            assert await keys_in(backend) == ["one", "three", "two"]
            async with backend.client() as client:
                assert "Uploads" not in await client.list_multipart_uploads(Bucket=backend.bucket)
        assert "If-None-Match" not in caplog.text

    @pytest.mark.parametrize("told", [True, False])
    async def test_what_it_is_told_is_not_found_out(self, told: bool, moto_server: S3Server) -> None:
        async with behind_proxy(moto_server, conditional_writes=told) as (proxy, backend):
            await backend.put_stream("one", stream())
            assert proxy.count()["CompleteMultipartUpload"] == 1
            assert proxy.count()["HeadObject"] == (0 if told else 2)

    async def test_amazon_is_known_by_its_name(self, moto_server: S3Server) -> None:
        async with behind_proxy(moto_server) as (proxy, backend):
            proxy.on("CompleteMultipartUpload", answer_with_header("server", "AmazonS3"), times=ALWAYS)
            await backend.put_stream("one", stream())
            await backend.put_stream("two", stream())
            assert proxy.count()["CompleteMultipartUpload"] == 2
            assert proxy.count()["HeadObject"] == 1
            assert proxy.count()["PutObject"] == 0

    async def test_a_server_that_cannot_be_asked_is_not_trusted(
        self, moto_server: S3Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with behind_proxy(moto_server) as (proxy, backend):
            proxy.on("PutObject", answer(403, "AccessDenied"), times=ALWAYS)
            with caplog.at_level(logging.WARNING, "granite_storage"):
                for name in ("one", "two"):
                    await backend.put_stream(name, stream())
            assert [record.getMessage() for record in caplog.records if "is unknown whether" in record.getMessage()]
            assert proxy.count()["PutObject"] == 1
            assert proxy.count()["HeadObject"] == 2

    async def test_a_server_that_does_not_answer_is_asked_again(self, moto_server: S3Server) -> None:
        async with behind_proxy(moto_server, max_attempts=1) as (proxy, backend):
            proxy.on("PutObject", answer(503, "SlowDown"))
            await backend.put_stream("one", stream())
            await backend.put_stream("two", stream())
            await backend.put_stream("three", stream())
            assert proxy.count()["PutObject"] == 2
            assert proxy.count()["HeadObject"] == 2

    async def test_a_cancelled_write_leaves_neither_its_object_nor_a_probe(self, moto_server: S3Server) -> None:
        async with behind_proxy(moto_server) as (proxy, backend):
            probing = asyncio.Event()
            loop = asyncio.get_running_loop()

            async def slow(request: Request) -> bytes:
                loop.call_soon_threadsafe(probing.set)
                await asyncio.sleep(0.2)
                return await request.forward()

            proxy.on("PutObject", slow)
            write = asyncio.ensure_future(backend.put_stream("one", stream()))
            await asyncio.wait_for(probing.wait(), 30)
            write.cancel()
            with pytest.raises(asyncio.CancelledError):
                await write
            assert await keys_in(backend) == []

    async def test_a_probe_that_a_crash_left_is_in_no_listing_and_cleaned_up(self, moto_server: S3Server) -> None:
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket, prefix="app")
            async with backend.client() as client:
                await client.put_object(Bucket=bucket, Key=f"app/{PROBE_PREFIX}left", Body=b"probe")
            await backend.put_bytes("one", b"1")
            assert [info.location async for info in backend.iter_objects()] == ["one"]
            assert await backend.cleanup_incomplete(older_than=timedelta(days=1)) == 0
            assert await backend.cleanup_incomplete(older_than=timedelta(days=-1)) == 1
            assert await keys_in(backend) == ["app/one"]
            await backend.aclose()


class TestChecksums:
    @pytest.mark.parametrize("parts", [True, False])
    async def test_an_answer_that_confirms_no_checksum_is_said_once(
        self, parts: bool, seaweedfs_server: S3Server, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As Ceph 16, which stores what has another SHA-256."""
        async with behind_proxy(seaweedfs_server) as (proxy, backend):
            with caplog.at_level(logging.WARNING, "granite_storage"):
                await backend.put_stream("confirmed", stream(CONTENT if parts else b"small"))
                assert not caplog.records
                for operation in ("PutObject", "UploadPart"):
                    proxy.on(operation, answer_without_header("x-amz-checksum-sha256"), times=ALWAYS)
                for name in ("one", "two"):
                    await backend.put_stream(name, stream(CONTENT if parts else b"small"))
        (record,) = caplog.records
        assert "does not confirm the SHA-256" in record.getMessage()
        assert "checksums=False" in record.getMessage()

    async def test_without_checksums_nothing_is_expected(self, moto_server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
        async with moto_server.bucket() as bucket:
            backend = moto_server.backend(bucket, checksums=False)
            await backend.put_bytes("one", b"1")
            await backend.aclose()
        assert not caplog.records


class TestClock:
    @pytest.mark.parametrize(("ahead", "words"), [(7200, "7200 s, ahead"), (-3600, "3600 s, behind")])
    @pytest.mark.parametrize("verb", ["put_bytes", "stat"])
    async def test_a_wrong_clock_is_named(self, ahead: int, words: str, verb: str, moto_server: S3Server) -> None:
        """A HEAD is answered without a code, but with the server's date."""
        async with behind_proxy(moto_server, max_attempts=1) as (proxy, backend):
            refused = answer(403, "RequestTimeTooSkewed")

            async def dated(request: Request) -> bytes:
                head, _, body = (await refused(request) or b"").partition(b"\r\n\r\n")
                date = format_datetime(datetime.now(UTC) - timedelta(seconds=ahead), usegmt=True)
                return head + f"\r\nDate: {date}\r\n\r\n".encode() + body

            proxy.on("*", dated, times=ALWAYS)
            call = backend.put_bytes("one", b"1") if verb == "put_bytes" else backend.stat("one")
            with pytest.raises(AccessDeniedError, match="the clock of this machine") as raised:
                await call
            number, _, side = words.partition(" s, ")
            assert any(f"{int(number) + off} s, {side}" in str(raised.value) for off in (-2, -1, 0, 1, 2))

    async def test_a_refusal_at_the_right_time_says_nothing_of_clocks(self, moto_server: S3Server) -> None:
        async with behind_proxy(moto_server, max_attempts=1) as (proxy, backend):
            proxy.on("PutObject", answer(403, "AccessDenied"))
            with pytest.raises(AccessDeniedError) as raised:
                await backend.put_bytes("one", b"1")
            assert "clock" not in str(raised.value)


def amazon(bucket: str, region: str, **options: Any) -> S3StorageBackend:
    session = new_session(aws_access_key_id="AKID", aws_secret_access_key="secret", region_name=region)
    return S3StorageBackend(bucket, session=session, **options)


async def presigned_hosts(backend: S3StorageBackend) -> set[tuple[str, str]]:
    """The hosts and beginnings of the paths of a presigned URL, form and PUT."""
    url = await backend.presign_get("folder/one", expires_in=MINUTES)
    form = await backend.presign_upload("two", expires_in=MINUTES, content_type="a/b", min_size=0, max_size=9)
    await backend.aclose()
    parts = [urlsplit(url), urlsplit(form.url)]
    return {(part.hostname or "", part.path.partition("/folder/one")[0].rstrip("/")) for part in parts}


@pytest.mark.case("RB-06")
class TestRegions:
    @pytest.mark.parametrize("region", ["eu-central-1", "ap-southeast-5", "us-east-1", "us-gov-west-1"])
    async def test_a_url_is_for_the_buckets_own_host_in_its_region(self, region: str) -> None:
        assert await presigned_hosts(amazon("bucket", region)) == {(f"bucket.s3.{region}.amazonaws.com", "")}

    async def test_china_has_a_domain_of_its_own(self) -> None:
        assert await presigned_hosts(amazon("bucket", "cn-north-1")) == {("bucket.s3.cn-north-1.amazonaws.com.cn", "")}

    @pytest.mark.parametrize("region", ["eu-central-1", "us-east-1"])
    async def test_a_name_with_a_dot_stays_in_the_path_of_the_regions_host(self, region: str) -> None:
        assert await presigned_hosts(amazon("my.bucket", region)) == {(f"s3.{region}.amazonaws.com", "/my.bucket")}

    async def test_what_the_configuration_says_goes_first(self) -> None:
        backend = amazon("bucket", "eu-central-1", config=Config(s3={"addressing_style": "path"}))
        assert await presigned_hosts(backend) == {("s3.eu-central-1.amazonaws.com", "/bucket")}

    async def test_an_endpoint_that_is_given_stays(self) -> None:
        assert await presigned_hosts(amazon("bucket", "eu-central-1", endpoint_url="https://minio.example.com")) == {
            ("minio.example.com", "/bucket")
        }

    async def test_an_endpoint_of_the_environment_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://minio.example.com")
        assert await presigned_hosts(amazon("bucket", "eu-central-1")) == {("minio.example.com", "/bucket")}


@pytest.mark.case("RB-07")
class TestPublicAddress:
    async def test_urls_and_forms_are_for_the_address_of_browsers(self) -> None:
        options = {"endpoint_url": "http://minio:9000", "presign_endpoint_url": "https://files.example.com"}
        for style in ("path", "auto"):
            config = Config(s3={"addressing_style": style})
            backend = amazon("bucket", "us-east-1", config=config, **options)
            assert await presigned_hosts(backend) == {("files.example.com", "/bucket")}
        put = amazon("bucket", "us-east-1", presigned_post=False, **options)
        request = await put.presign_upload("two", expires_in=MINUTES, content_type="a/b", min_size=9, max_size=9)
        assert request.url.startswith("https://files.example.com/bucket/two?")
        await put.aclose()

    async def test_a_url_for_another_address_works_there(self, seaweedfs_server: S3Server) -> None:
        """SeaweedFS checks the signature, which covers the host; the calls themselves go to the other address."""
        import urllib.request

        async with seaweedfs_server.bucket() as bucket:
            with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
                public = seaweedfs_server.endpoint_url.replace("127.0.0.1", "localhost")
                backend = seaweedfs_server.backend(bucket, endpoint_url=proxy.url, presign_endpoint_url=public)
                await backend.put_bytes("one", b"content")
                url = await backend.presign_get("one", expires_in=MINUTES)
                assert url.startswith(f"{public}/")

                def fetch() -> bytes:
                    with urllib.request.urlopen(url) as answer:  # noqa: S310  # it is plain HTTP on purpose
                        return bytes(answer.read())

                assert await asyncio.to_thread(fetch) == b"content"
                assert proxy.count()["PutObject"] == 1
                assert proxy.count()["GetObject"] == 0
                await backend.aclose()

    @pytest.mark.parametrize(
        "url", ["files.example.com", "ftp://files.example.com", "https://", "https://u:p@files.example.com", "https://a/?b=c"]
    )
    def test_what_is_no_address_is_refused_at_once(self, url: str) -> None:
        with pytest.raises(ConfigurationError, match="presign_endpoint_url") as raised:
            S3StorageBackend("bucket", presign_endpoint_url=url)
        assert "u:p" not in str(raised.value)


class TestTemporaryCredentials:
    def lasting(self, session: Any, life: timedelta) -> None:
        async def refresh() -> dict[str, str]:
            raise AssertionError("nothing is refreshed here")

        expiry = datetime.now(UTC) + life
        credentials = AioRefreshableCredentials("AKID", "secret", "token", expiry, refresh, "tests")
        getattr(session, "_session", session)._credentials = credentials

    async def test_a_url_that_would_outlive_them_is_warned_of_once(self, caplog: pytest.LogCaptureFixture) -> None:
        session = new_session(region_name="eu-central-1")
        self.lasting(session, timedelta(hours=1))
        backend = S3StorageBackend("bucket", session=session)
        with caplog.at_level(logging.WARNING, "granite_storage"):
            await backend.presign_get("one", expires_in=timedelta(minutes=30))
            assert not caplog.records
            await backend.presign_get("one", expires_in=timedelta(days=1))
            await backend.presign_upload("two", expires_in=timedelta(days=1), content_type="a/b", min_size=0, max_size=9)
        (record,) = caplog.records
        assert "1 day, 0:00:00" in record.getMessage()
        assert "0:59:" in record.getMessage()
        assert "bucket" in record.getMessage()
        await backend.aclose()

    async def test_lasting_credentials_are_not_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        backend = amazon("bucket", "eu-central-1")
        await backend.presign_get("one", expires_in=timedelta(days=7))
        await backend.aclose()
        assert not caplog.records


EXTRA: dict[str, Any] = {
    "ServerSideEncryption": "aws:kms",
    "SSEKMSKeyId": "alias/uploads",
    "StorageClass": "STANDARD_IA",
    "ACL": "bucket-owner-full-control",
    "Tagging": "a=b",
    "Metadata": {"owner": "uploads"},
}
HEADERS = {
    "x-amz-server-side-encryption": "aws:kms",
    "x-amz-server-side-encryption-aws-kms-key-id": "alias/uploads",
    "x-amz-storage-class": "STANDARD_IA",
    "x-amz-acl": "bucket-owner-full-control",
    "x-amz-tagging": "a=b",
    "x-amz-meta-owner": "uploads",
}


@pytest.mark.case("RE-15")
@pytest.mark.parametrize("write", ["put_bytes", "put_stream", "small stream", "large bytes", "copy", "empty copy"])
async def test_extra_parameters_go_with_every_write(write: str, moto_server: S3Server) -> None:
    """Those of the source of a copy do not stay: it may be from before the encryption was asked for."""
    async with behind_proxy(moto_server, extra_put_kwargs=EXTRA, conditional_writes=True) as (proxy, backend):
        plain = moto_server.backend(backend.bucket, extra_put_kwargs={"StorageClass": "REDUCED_REDUNDANCY"})
        await plain.put_bytes("source", b"" if write == "empty copy" else b"source", content_type="text/x")
        await plain.aclose()
        await {
            "put_bytes": lambda: backend.put_bytes("one", b"1"),
            "put_stream": lambda: backend.put_stream("one", stream()),
            "small stream": lambda: backend.put_stream("one", stream(b"1")),
            "large bytes": lambda: backend.put_bytes("one", CONTENT),
            "copy": lambda: backend.copy("source", "one"),
            "empty copy": lambda: backend.copy("source", "one"),
        }[write]()
        creating = [request for request in proxy.requests if request.operation in {"PutObject", "CreateMultipartUpload"}]
        assert len(creating) == 1
        assert {name: creating[0].headers.get(name) for name in HEADERS} == HEADERS
        async with backend.client() as client:
            head = await client.head_object(Bucket=backend.bucket, Key="one")
        assert head["StorageClass"] == "STANDARD_IA"
        assert head["ServerSideEncryption"] == "aws:kms"
        if "copy" in write:
            assert head["ContentType"] == "text/x"


@pytest.mark.case("RE-15")
async def test_a_key_of_the_customers_goes_with_every_request_of_a_multipart_upload(moto_server: S3Server) -> None:
    extra = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "0" * 32}
    options = {"client_kwargs": {"use_ssl": False}}
    async with behind_proxy(moto_server, extra_put_kwargs=extra, conditional_writes=True, **options) as (proxy, backend):
        try:
            await backend.put_stream("one", stream())
        except ConfigurationError:  # the SDK sends such keys over TLS only
            pytest.fail("the key was not sent")
        sent = {request.operation for request in proxy.requests if "x-amz-server-side-encryption-customer-key" in request.headers}
        assert sent >= {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}


class TestPartSizes:
    @pytest.mark.parametrize("size", [1, 5 * MIB, 78 * 1024 * MIB, 5 * 1024 * 1024 * MIB])
    def test_all_parts_are_equal_where_the_size_is_known(self, size: int) -> None:
        """R2 refuses an upload whose parts, but for the last, are not of one size."""
        sizes = {part_size_of(number, 8 * MIB, size) for number in range(1, MAX_PARTS + 1)}
        assert len(sizes) == 1
        (one,) = sizes
        assert one >= 8 * MIB
        assert one * MAX_PARTS >= size

    async def test_a_declared_size_reaches_the_parts(self, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_s3_upload, "_EQUAL_PARTS", 1)
        monkeypatch.setattr(_s3_upload, "_PARTS_UNTIL_DOUBLED", 1)
        content = bytes(26 * MIB)
        for declared, parts in ((len(content), [5, 5, 5, 5, 5, 1]), (None, [5, 10, 11])):
            async with behind_proxy(moto_server, conditional_writes=True) as (proxy, backend):
                manager = StorageManager(backends={"s3": backend}, policies={"p": StoragePolicy("p", "s3")})
                await manager.put_stream(
                    storage_key="p",
                    model_name="m",
                    entity_id="1",
                    field_name="f",
                    stream=many(bytes(MIB), 26),
                    size=declared,
                )
                sent = {
                    int(request.query["partNumber"][0]): int(request.headers["content-length"]) // MIB
                    for request in proxy.requests
                    if request.operation == "UploadPart"
                }
                assert [sent[number] for number in sorted(sent)] == parts
