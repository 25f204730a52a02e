"""URLs of S3 that are signed in the process: the same as the SDK's, to the byte, and accepted by a server that checks them."""

from __future__ import annotations

import asyncio
import calendar
import functools
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from aiobotocore.credentials import AioRefreshableCredentials
from botocore import UNSIGNED
from botocore.config import Config
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.base import PresignRequest
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import InvalidLocationError
from granite_storage.locations import check_location
from tests import tiers
from tests.core.support import texts
from tests.servers import S3Server, new_session

HOUR = timedelta(hours=1)
PLAIN = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"}
TOKEN = "FwoGZXIvYXdzEJr//////////wEaDLs+=/" * 8
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "virtual": {"bucket": "my-bucket", "region_name": "eu-central-1"},
    "first region": {"bucket": "my-bucket", "region_name": "us-east-1"},
    "dotted": {"bucket": "my.bucket.example", "region_name": "eu-west-3"},
    "path": {"bucket": "my-bucket", "region_name": "ap-south-2", "config": Config(s3={"addressing_style": "path"})},
    "endpoint": {"bucket": "my-bucket", "region_name": "us-east-1", "endpoint_url": "http://127.0.0.1:9000"},
    "endpoint with a path": {"bucket": "my-bucket", "region_name": "garage", "endpoint_url": "https://files.example/s3"},
    "endpoint, virtual": {
        "bucket": "my-bucket",
        "region_name": "auto",
        "endpoint_url": "https://account.r2.example",
        "config": Config(s3={"addressing_style": "virtual"}),
    },
    "for browsers": {
        "bucket": "my-bucket",
        "region_name": "us-east-1",
        "endpoint_url": "http://minio:9000",
        "presign_endpoint_url": "https://files.example:8443",
    },
    "the scheme's port": {"bucket": "my-bucket", "region_name": "us-east-1", "endpoint_url": "https://files.example:443"},
    "the other scheme's port": {"bucket": "my-bucket", "region_name": "us-east-1", "endpoint_url": "http://files.example:443"},
    "capitals, for browsers": {
        "bucket": "my-bucket",
        "region_name": "us-east-1",
        "endpoint_url": "http://minio:9000",
        "presign_endpoint_url": "http://Files.Example:80",
    },
    "IPv6": {"bucket": "my-bucket", "region_name": "us-east-1", "endpoint_url": "http://[2001:db8::1]:9000"},
    "dual stack": {"bucket": "my-bucket", "region_name": "eu-west-1", "config": Config(s3={"use_dualstack_endpoint": True})},
    "accelerated": {"bucket": "my-bucket", "region_name": "eu-west-1", "config": Config(s3={"use_accelerate_endpoint": True})},
    "government": {"bucket": "my-bucket", "region_name": "us-gov-west-1", "config": Config(use_fips_endpoint=True)},
    "access point": {
        "bucket": "arn:aws:s3:eu-west-1:123456789012:accesspoint/uploads",
        "region_name": "eu-west-1",
    },
    "prefixed": {"bucket": "my-bucket", "region_name": "eu-north-1", "prefix": "app/caf\u00e9 +"},
    "temporary": {"bucket": "my-bucket", "region_name": "eu-central-1", "client_kwargs": {"aws_session_token": TOKEN}},
}


@functools.cache
def shared_session() -> Any:
    """One for all: it reads the SDK's models once."""
    return new_session()


def new_backend(bucket: str, **options: Any) -> S3StorageBackend:
    client_kwargs = {**PLAIN, **options.pop("client_kwargs", {})}
    return S3StorageBackend(bucket, session=shared_session(), client_kwargs=client_kwargs, **options)


class Signers:
    """A backend for each configuration, and what runs them."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.run = runner.run
        self._backends: dict[str, S3StorageBackend] = {}

    def __getitem__(self, name: str) -> S3StorageBackend:
        return self._backends.setdefault(name, new_backend(**CONFIGURATIONS[name]))

    async def aclose(self) -> None:
        for backend in self._backends.values():
            await backend.aclose()


@pytest.fixture(scope="module")
def signers() -> Iterator[Signers]:
    with asyncio.Runner() as runner:
        signers = Signers(runner)
        yield signers
        runner.run(signers.aclose())


async def sdk_url(backend: S3StorageBackend, request: PresignRequest) -> str:
    """What the SDK signs, at the time of its own."""
    client = await backend._clients.get()
    parameters = {"Bucket": backend.bucket, "Key": client.settings.key(request.location)}
    if request.content_type is not None:
        parameters["ResponseContentType"] = request.content_type
    if request.disposition is not None:
        parameters["ResponseContentDisposition"] = request.disposition
    url: str = await client.signer.generate_presigned_url(
        "get_object", Params=parameters, ExpiresIn=int(request.expires_in.total_seconds())
    )
    return url


def signed_at(url: str) -> int:
    return calendar.timegm(time.strptime(parse_qs(urlsplit(url).query)["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ"))


async def both(backend: S3StorageBackend, request: PresignRequest) -> tuple[str, str]:
    """What the SDK signs, and what is signed here for the same time."""
    theirs = await sdk_url(backend, request)
    (ours,) = await backend.presign_many(
        [PresignRequest(request.location, request.expires_in, request.content_type, request.disposition, signed_at(theirs))]
    )
    return theirs, ours


def is_location(text: str) -> bool:
    try:
        check_location(text)
    except InvalidLocationError:
        return False
    return True


LOCATIONS = st.lists(texts().filter(is_location), min_size=1, max_size=4).map("/".join).filter(is_location)
HEADERS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_same_as_the_sdk(signers: Signers, name: str) -> None:
    """In the exhaustive tier there are 18 times 100 random URLs."""

    @settings(max_examples=tiers.repetitions("GRANITE_URLS", default=4, exhaustive=100), deadline=None)
    @given(LOCATIONS, st.integers(1, 7 * 86400), HEADERS, HEADERS)
    def compare(location: str, seconds: int, content_type: str | None, disposition: str | None) -> None:
        request = PresignRequest(location, timedelta(seconds=seconds), content_type, disposition)
        theirs, ours = signers.run(both(signers[name], request))
        assert ours == theirs

    compare()
    client = signers.run(signers[name]._clients.get())
    assert all(signer is not None for _, signer in client._learned.values())


CURIOUS = [
    "a+b c%2Fd?e#f&g=h",
    "caf\u00e9/\u65e5\u672c\u8a9e/\U0001f600.png",
    "~tilde/a.b_c-d",
    "it's (a) [b] {c} $d !e *f, g;h:i@j",
]


@pytest.mark.parametrize("location", CURIOUS)
def test_curious_names(signers: Signers, location: str) -> None:
    request = PresignRequest(
        location, HOUR, "text/plain; charset=utf-8", "inline; filename=\"a+b c~.txt\"; filename*=UTF-8''%C3%A9"
    )
    theirs, ours = signers.run(both(signers["virtual"], request))
    assert ours == theirs


@pytest.mark.parametrize("location", ["plain", *CURIOUS])
async def test_a_server_that_checks_signatures(seaweedfs_server: S3Server, location: str) -> None:
    async with seaweedfs_server.bucket() as bucket:
        backend = seaweedfs_server.backend(bucket, prefix="below")
        await backend.put_bytes(location, b"content", content_type="text/html")
        now = int(time.time())
        requests = [
            PresignRequest(location, HOUR, "text/plain", "attachment", moment)
            for moment in (None, now - 1800, now - 3000, now - 7200)
        ]
        urls = await PrefixedBackend(seaweedfs_server.backend(bucket), "below").presign_many(requests)
        assert len(set(urls)) == 4
        async with httpx.AsyncClient() as client:
            for url in urls[:3]:
                response = await client.get(url)
                assert (response.status_code, response.content) == (200, b"content")
                assert response.headers["content-type"] == "text/plain"
                assert response.headers["content-disposition"] == "attachment"
            assert (await client.get(urls[3])).status_code == 403  # it has ended
            assert (await client.get(urls[1].replace("text%2Fplain", "text%2Fhtml"))).status_code == 403
        await backend.aclose()


@pytest.mark.parametrize("version", ["s3", UNSIGNED])
async def test_another_signature_is_the_sdks(version: Any) -> None:
    backend = new_backend("my-bucket", region_name="eu-central-1", config=Config(signature_version=version))
    request = PresignRequest("a b", HOUR, "image/png")
    url = await backend.presign_get("a b", expires_in=HOUR, content_type="image/png")
    expected = await sdk_url(backend, request)
    assert url.partition("?")[0] == expected.partition("?")[0]
    assert parse_qs(urlsplit(url).query).keys() == parse_qs(urlsplit(expected).query).keys()
    with pytest.raises(ConfigurationError, match="stable_for"):
        await backend.presign_many([PresignRequest("a", HOUR, signed_at=int(time.time()))])
    await backend.aclose()


def add_header(request: Any, **_: Any) -> None:
    request.headers["x-amz-request-payer"] = "requester"


async def test_what_an_application_has_hooked_into_its_client() -> None:
    """A handler that changes what is signed is honoured: the SDK signs."""
    backend = new_backend("my-bucket", region_name="eu-central-1")
    async with backend.client() as client:
        client.meta.events.register("before-sign.s3.GetObject", add_header)
    assert "SignedHeaders=host%3Bx-amz-request-payer" in await backend.presign_get("a", expires_in=HOUR)
    await backend.aclose()


async def test_what_was_learned_counts_for_a_minute() -> None:
    backend = new_backend("my-bucket", region_name="eu-central-1")
    assert "SignedHeaders=host&" in await backend.presign_get("a", expires_in=HOUR)
    client = await backend._clients.get()
    client.raw.meta.events.register("before-sign.s3.GetObject", add_header)
    assert "SignedHeaders=host&" in await backend.presign_get("a", expires_in=HOUR)
    client._learned = {has_token: (learned - 60, signer) for has_token, (learned, signer) in client._learned.items()}
    assert "SignedHeaders=host%3Bx-amz-request-payer" in await backend.presign_get("a", expires_in=HOUR)
    await backend.aclose()


async def test_credentials_that_are_refreshed() -> None:
    """Each batch is signed with the credentials of its time, which are refreshed without blocking."""
    refreshed = 0

    async def refresh() -> dict[str, str]:
        nonlocal refreshed
        refreshed += 1
        await asyncio.sleep(0.01)
        end = datetime.now(UTC) + timedelta(seconds=1 if refreshed == 1 else 7200)
        return {"access_key": f"AKID{refreshed}", "secret_key": "s", "token": f"t{refreshed}", "expiry_time": end.isoformat()}

    session = new_session(region_name="eu-central-1")
    inner = getattr(session, "_session", session)
    inner._credentials = AioRefreshableCredentials.create_from_metadata(await refresh(), refresh, "test")
    backend = S3StorageBackend("my-bucket", session=session)
    first = await backend.presign_get("a", expires_in=timedelta(seconds=1))
    assert "Credential=AKID2%2F" in first
    assert "X-Amz-Security-Token=t2" in first
    assert (await both(backend, PresignRequest("b", timedelta(minutes=1))))[0].count("AKID2") == 1
    await backend.aclose()


async def test_two_days_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of a day is made for that day, whatever is in memory; the SDK signs at a time that the test sets."""
    backend = new_backend("my-bucket", region_name="eu-central-1")
    now = int(time.time())
    moments = [now - 86400 * days for days in (0, 1, 0, 2, 1, *range(12), 3)]
    urls = await backend.presign_many([PresignRequest("a", HOUR, signed_at=moment) for moment in moments])
    for moment, url in zip(moments, urls, strict=True):
        monkeypatch.setattr("botocore.auth.get_current_datetime", lambda moment=moment: datetime.fromtimestamp(moment, UTC))
        assert await sdk_url(backend, PresignRequest("a", HOUR)) == url
    await backend.aclose()


class TestStable:
    """`stable_for` of the manager, on S3."""

    def manager(self, backend: S3StorageBackend) -> StorageManager:
        return StorageManager(backends={"s3": backend}, policies={"files": StoragePolicy("files", "s3")})

    async def test_seven_days_altogether(self) -> None:
        async with self.manager(new_backend("my-bucket", region_name="eu-central-1")) as manager:
            ref = _ref("file/1/content/a")
            url = await manager.url(ref, expires_in=timedelta(days=6), stable_for=timedelta(days=1))
            assert "X-Amz-Expires=604800&" in url
            with pytest.raises(ValueError, match="seven days"):
                await manager.url(ref, expires_in=timedelta(days=6), stable_for=timedelta(days=1, seconds=1))
            assert await manager.urls([], expires_in=HOUR) == []

    async def test_processes_agree(self) -> None:
        urls = set()
        for _ in range(2):
            async with self.manager(new_backend("my-bucket", region_name="eu-central-1")) as manager:
                urls.add(await manager.url(_ref("file/1/content/a"), expires_in=HOUR, stable_for=timedelta(days=5)))
        assert len(urls) == 1


def _ref(location: str) -> Any:
    from granite_storage import StoredObjectRef

    return StoredObjectRef(storage_key="files", backend="s3", location=location, size=1, checksum="")
