"""What the backend on obstore refuses, shows, hides and translates; the public suite checks what it promises."""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from granite_storage.backends import _obstore_upload, obstore
from granite_storage.backends._obstore_client import _DEFAULT_CLIENT_OPTIONS, _DEFAULT_RETRY_CONFIG, translate
from granite_storage.backends.base import SupportsBatchDelete, SupportsCopy, SupportsPresign
from granite_storage.backends.obstore import ObjectStoreBackend, ObjectStoreConfigurationError
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    InvalidLocationError,
    MissingDependencyError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)
from tests.azurite import AzureServer
from tests.servers import S3Server

MIB = 1 << 20
MINUTE = timedelta(minutes=1)
SECRET = "a-secret-that-nobody-may-see"


async def locations(backend: ObjectStoreBackend, prefix: str = "", start_after: str | None = None) -> list[str]:
    return [info.location async for info in backend.iter_objects(prefix, start_after=start_after)]


async def read(backend: ObjectStoreBackend, location: str, **where: int) -> bytes:
    reader = await backend.open(location, **where)
    try:
        return await reader.read()
    finally:
        await reader.aclose()


def memory() -> Any:
    from obstore.store import MemoryStore

    return MemoryStore()


@pytest.mark.case("POL-01")
@pytest.mark.parametrize(
    ("store", "options", "says"),
    [
        ("s3://bucket", {"config": {"nonsense": "x"}}, "cannot make a store"),
        ("s3://bucket", {"client_options": {"nonsense": "x"}}, "cannot make a store"),
        ("s3://bucket", {"retry_config": {"nonsense": 1}}, "but not nonsense"),
        ("az://container", {}, "cannot make a store"),
        ("ftp://host", {}, "cannot make a store"),
        ("no url", {}, "cannot make a store"),
        ("memory:///", {"client_options": {"timeout": "1s"}}, "client_options cannot be passed with"),
        (17, {}, "must be a URL or a store"),
        ("memory:///", {"part_size": 5 * MIB - 1}, "part_size must be at least 5 MiB"),
        ("memory:///", {"part_concurrency": 0}, "part_concurrency must be at least"),
    ],
)
def test_what_cannot_work_is_refused_at_once(store: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        ObjectStoreBackend(store, **options)


@pytest.mark.case("POL-01")
@pytest.mark.parametrize("key", ["allow_http", "TIMEOUT", "proxy_url", "{prefix}_allow_http", "user_agent"])
@pytest.mark.parametrize(("url", "prefix"), [("s3://bucket", "aws"), ("az://container", "azure"), ("gs://bucket", "google")])
def test_options_of_the_client_are_none_of_the_store(url: str, prefix: str, key: str) -> None:
    given = key.format(prefix=prefix)
    with pytest.raises(ConfigurationError, match=rf"config has {given}.*: pass client_options=") as caught:
        ObjectStoreBackend(url, config={given: SECRET})
    assert SECRET not in str(caught.value)


def test_a_panic_of_obstore_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore.store

    class PanicException(BaseException):  # it has the name of pyo3's
        pass

    def from_url(*_: Any, **__: Any) -> Any:
        raise raised[0]

    monkeypatch.setattr(obstore.store, "from_url", from_url)
    raised: list[BaseException] = [PanicException(SECRET)]
    with pytest.raises(ConfigurationError, match=r"obstore cannot make a store from 's3://bucket'.*PanicException") as caught:
        ObjectStoreBackend("s3://bucket")
    assert SECRET not in str(caught.value)
    raised[0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        ObjectStoreBackend("s3://bucket")


def test_options_go_with_a_url() -> None:
    with pytest.raises(ConfigurationError, match="config can be passed only with a URL"):
        ObjectStoreBackend(memory(), config={"region": "eu-central-1"})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"granite-storage\[obstore\]"):
        ObjectStoreBackend("memory:///")


@pytest.mark.case("POL-08")
async def test_no_secret_is_shown() -> None:
    config = {"access_key_id": SECRET, "secret_access_key": SECRET, "region": "r", "endpoint": "http://127.0.0.1:9"}
    backend = ObjectStoreBackend(
        f"s3://user:{SECRET}@bucket/folder?token={SECRET}",
        config=config,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    assert repr(backend) == "ObjectStoreBackend('s3://bucket/folder')"
    with pytest.raises(BackendUnavailableError) as caught:
        await backend.exists("object")
    assert SECRET not in f"{caught.value!r} {caught.value.__cause__!r}"
    with pytest.raises(ConfigurationError) as refused:
        ObjectStoreBackend(f"s3://user:{SECRET}@bucket?{SECRET}", config={**config, "nonsense": SECRET})
    assert SECRET not in f"{refused.value!r} {refused.value.__cause__!r}"


def test_timeouts_and_retries_are_ours_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore.store as stores

    made: list[Mapping[str, Any]] = []

    def from_url(url: str, **options: Any) -> Any:
        made.append(options)
        return memory()

    monkeypatch.setattr(stores, "from_url", from_url)
    ObjectStoreBackend("s3://bucket", client_options={"timeout": "5s"}, retry_config={"max_retries": 0})
    assert made == [
        {
            "client_options": {**_DEFAULT_CLIENT_OPTIONS, "timeout": "5s"},
            "retry_config": {**_DEFAULT_RETRY_CONFIG, "max_retries": 0},
        }
    ]


async def test_a_store_passed_in_stays_open_and_one_of_ours_is_built_again() -> None:
    store = memory()
    backend = ObjectStoreBackend(store)
    await backend.aclose()
    assert await backend.store() is store
    ours = ObjectStoreBackend("s3://bucket")
    first = await ours.store()
    await ours.aclose()
    await ours.aclose()
    assert await ours.store() is not first
    kept = ObjectStoreBackend("memory:///")
    await kept.put_bytes("object", b"...")
    await kept.aclose()
    assert await kept.exists("object")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("status code: 401", AccessDeniedError),
        ("status code: 403", AccessDeniedError),
        ("status code: 404", ObjectNotFoundError),
        ("status code: 429", BackendUnavailableError),
        ("status code: 503", BackendUnavailableError),
        ("status code: 507", StorageFullError),
        ("status code: 403 Forbidden: <Error><Code>QuotaExceeded</Code></Error>", StorageFullError),
        ("status code: 404 Not Found: <Error><Code>NoSuchBucket</Code></Error>", ObjectStoreConfigurationError),
        ("status code: 418", BackendError),
        ("HTTP error: error sending request", BackendUnavailableError),
        ("HTTP error: operation timed out", BackendUnavailableError),
        ("No space left on device (os error 28)", StorageFullError),
        ("Permission denied (os error 13)", AccessDeniedError),
        ("something else", BackendError),
    ],
)
def test_errors_are_of_the_family(error: str, kind: type[BackendError]) -> None:
    translated = translate(OSError(error), "get", store="s3://bucket", location="an object")
    assert type(translated) is kind
    assert translated.location == "an object"
    assert "an object" in str(translated)


@pytest.mark.parametrize("name", ["status code: 404", "<Code>QuotaExceeded</Code>", "(os error 28)", "timed out"])
def test_an_object_called_like_an_answer_is_none(name: str) -> None:
    translated = translate(Exception(f"get {name}: no idea"), "get", store="s3://bucket", location=name)
    assert type(translated) is BackendError


async def test_a_bucket_that_is_not_there(seaweedfs_server: S3Server) -> None:
    backend = ObjectStoreBackend("s3://no-such-bucket-here", **seaweedfs_server.obstore_options())
    with pytest.raises(ObjectStoreConfigurationError, match="check the bucket"):
        await backend.put_bytes("object", b"...")
    with pytest.raises(ObjectStoreConfigurationError, match="check the bucket"):
        await locations(backend)
    await backend.aclose()


async def test_over_http_it_only_reads(tmp_path: Path) -> None:
    content = os.urandom(MIB)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "object.bin").write_bytes(content)
    async with http_server(tmp_path) as url:
        backend = ObjectStoreBackend(url, client_options={"allow_http": True}, retry_config={"max_retries": 0})
        assert await read(backend, "folder/object.bin") == content
        assert await read(backend, "folder/object.bin", offset=10, length=90) == content[10:100]
        assert (await backend.stat("folder/object.bin")).size == MIB
        assert not await backend.exists("folder/another")
        with pytest.raises(ObjectNotFoundError):
            await backend.open("folder/another")
        with pytest.raises(BackendError):
            await locations(backend)
        for call in (
            backend.put_bytes("new", b"..."),
            backend.put_stream("new", untouchable()),
            backend.delete("folder/object.bin"),
            backend.delete_many(["folder/object.bin"]),
            backend.copy("folder/object.bin", "copied"),
        ):
            with pytest.raises(ObjectStoreConfigurationError, match="can only be read"):
                await call
        await backend.aclose()
    assert (tmp_path / "folder" / "object.bin").read_bytes() == content


async def test_a_local_disk_is_for_the_local_backend(tmp_path: Path) -> None:
    """Links are followed out of the folder, for reading and for writing: the documentation says so, and this notices a change."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (inside / "link").symlink_to(outside)
    backend = ObjectStoreBackend(inside.as_uri())
    assert await read(backend, "link/secret") == b"secret"
    await backend.put_bytes("link/new", b"...")
    assert (outside / "new").exists()


@pytest.mark.parametrize("location", ["../outside", "a/../../outside", "/etc/passwd", "file:///etc/passwd"])
async def test_no_location_leads_outside(tmp_path: Path, location: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    backend = ObjectStoreBackend((tmp_path / "inside").as_uri())
    with pytest.raises(InvalidLocationError):
        await backend.open(location)


@pytest.mark.parametrize("location", ["object#1", "folder#12/object", "s" * 246])
async def test_names_that_obstore_needs_on_a_disk_are_refused(tmp_path: Path, location: str) -> None:
    with pytest.raises(InvalidLocationError, match="on a local disk"):
        await ObjectStoreBackend(tmp_path.as_uri()).put_stream(location, untouchable())
    await ObjectStoreBackend("memory:///").put_bytes(location, b"...")


async def test_a_stream_of_too_many_parts_is_refused_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_obstore_upload, "MAX_PARTS", 2)
    backend = ObjectStoreBackend("memory:///", part_size=5 * MIB)
    await backend.put_bytes("just/enough", bytes(10 * MIB))
    with pytest.raises(BackendError, match="larger part_size"):
        await backend.put_bytes("too/much", bytes(10 * MIB + 1))
    assert await locations(backend) == ["just/enough"]


async def test_what_s3_does_not_copy_is_read_and_written(seaweedfs_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstore, "_LARGEST_COPY", MIB)
    content = os.urandom(2 * MIB)
    async with seaweedfs_server.bucket() as bucket:
        backend = ObjectStoreBackend(f"s3://{bucket}", **seaweedfs_server.obstore_options())
        assert isinstance(backend, SupportsCopy)
        await backend.put_bytes("source", content, content_type="image/png")
        await backend.copy("source", "target")
        assert await read(backend, "target") == content
        assert (await backend.stat("target")).content_type == "image/png"
        with pytest.raises(ObjectExistsError):
            await backend.copy("source", "target")
        await backend.aclose()


class TestSignedUrls:
    async def test_on_s3(self, seaweedfs_server: S3Server) -> None:
        async with seaweedfs_server.bucket() as bucket:
            backend = ObjectStoreBackend(f"s3://{bucket}/folder", **seaweedfs_server.obstore_options())
            await self.require_served(backend)

    async def test_on_azure(self, azurite_server: AzureServer) -> None:
        async with azurite_server.container() as container:
            backend = azurite_server.backend(container, path="/folder")
            await self.require_served(backend, "an-object")
            with pytest.raises(ObjectStoreConfigurationError, match="is escaped"):
                await backend.signed_url("an object", expires_in=MINUTE)

    async def test_on_google_without_asking_it(self) -> None:
        backend = ObjectStoreBackend("gs://bucket/folder", config={"service_account_key": made_up_key()})
        url = await backend.signed_url("an object", expires_in=MINUTE)
        assert url.startswith("https://storage.googleapis.com/bucket/folder/an%20object?X-Goog-Algorithm=GOOG4-RSA-SHA256")
        assert "X-Goog-Expires=60" in url

    async def test_a_store_without_a_signature_says_so(self) -> None:
        with pytest.raises(ObjectStoreConfigurationError, match="cannot sign URLs"):
            await ObjectStoreBackend("memory:///").signed_url("object", expires_in=MINUTE)

    @pytest.mark.parametrize("seconds", [-1, 0, 0.5, 7 * 86400 + 1])
    async def test_an_impossible_expiry_is_refused(self, seconds: float) -> None:
        with pytest.raises(ValueError, match="from one second to seven days"):
            await ObjectStoreBackend("memory:///").signed_url("object", expires_in=timedelta(seconds=seconds))

    async def test_it_is_not_taken_for_presigning(self) -> None:
        """`StorageManager.url` relies on headers of the answer that obstore cannot sign."""
        assert not isinstance(ObjectStoreBackend("s3://bucket"), SupportsPresign)

    async def require_served(self, backend: ObjectStoreBackend, location: str = "an object") -> None:
        await backend.put_bytes(location, b"content", content_type="image/png")
        url = await backend.signed_url(location, expires_in=MINUTE)
        assert await fetch(url) == (200, b"content", "image/png")
        assert (await fetch(url, method="DELETE"))[0] >= 400
        assert (await fetch(url.partition("?")[0]))[0] >= 400
        assert await backend.exists(location)
        await backend.aclose()


class TestGoogle:
    """No emulator speaks the protocol that obstore uses; what needs no service is tested."""

    async def test_it_is_built_with_the_abilities_of_the_service(self) -> None:
        backend = ObjectStoreBackend("gs://bucket/folder", config={"service_account_key": made_up_key()})
        assert repr(backend) == "ObjectStoreBackend('gs://bucket/folder')"
        assert isinstance(backend, SupportsCopy)
        assert isinstance(backend, SupportsBatchDelete)
        with pytest.raises(InvalidLocationError):
            await backend.open("../outside")

    async def test_a_service_out_of_reach(self) -> None:
        backend = ObjectStoreBackend(
            "gs://bucket",
            config={"service_account_key": made_up_key()},
            client_options={"proxy_url": "http://127.0.0.1:9"},
            retry_config={"max_retries": 0},
        )
        with pytest.raises(BackendUnavailableError) as caught:
            await backend.put_bytes("object", b"...")
        assert caught.value.__cause__ is not None


class TestListing:
    """How a listing is brought into byte order; the public suite checks that it is."""

    ORDERED = ("a", "b", "c", "d", "e", "f")

    @staticmethod
    async def backend(order: bool | None, by_folder: bool | None = None, **options: Any) -> ObjectStoreBackend:
        backend = ObjectStoreBackend("memory:///", list_by_folder=by_folder)
        backend._client.kind = replace(backend._client.kind, lists_in_order=order)
        backend._listing = replace(backend._listing, page_size=2, max_sorted=2, **options)
        return backend

    async def test_what_is_in_order_is_taken_as_it_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = await self.backend(None)
        for location in self.ORDERED:
            await backend.put_bytes(location, b"...")
        monkeypatch.setattr(type(backend._listing), "children", None)  # nothing is walked
        assert await locations(backend) == list(self.ORDERED)
        assert await locations(backend, start_after="c") == ["d", "e", "f"]

    async def test_what_begins_out_of_order_is_walked(self, seaweedfs_server: S3Server) -> None:
        """SeaweedFS lists `t/` before `t-/`."""
        async with seaweedfs_server.bucket() as bucket:
            backend = ObjectStoreBackend(f"s3://{bucket}", **seaweedfs_server.obstore_options())
            backend._listing = replace(backend._listing, page_size=2, max_sorted=2)
            for location in ("t/1", "t-/1", "u/1", "u/2"):
                await backend.put_bytes(location, b"...")
            assert await locations(backend) == ["t-/1", "t/1", "u/1", "u/2"]
            await backend.aclose()

    @pytest.mark.parametrize("by_folder", [None, False])
    async def test_what_is_out_of_order_later_is_never_passed_off(
        self, seaweedfs_server: S3Server, by_folder: bool | None
    ) -> None:
        async with seaweedfs_server.bucket() as bucket:
            options = seaweedfs_server.obstore_options()
            backend = ObjectStoreBackend(f"s3://{bucket}", list_by_folder=by_folder, **options)
            backend._listing = replace(backend._listing, page_size=2, max_sorted=2)
            for location in ("a", "b", "c", "t/1", "t-/1"):
                await backend.put_bytes(location, b"...")
            with pytest.raises(ObjectStoreConfigurationError, match="list_by_folder=True"):
                await locations(backend)
            walking = ObjectStoreBackend(f"s3://{bucket}", list_by_folder=True, **options)
            walking._listing = replace(walking._listing, page_size=2, max_sorted=2)
            assert await locations(walking) == ["a", "b", "c", "t-/1", "t/1"]
            await backend.aclose()
            await walking.aclose()

    async def test_an_order_that_is_trusted_begins_where_it_is_asked_to(self) -> None:
        class Recorded:
            def __init__(self, store: Any) -> None:
                self.store = store
                self.offsets: list[str | None] = []

            def list(self, prefix: str | None, *, offset: str | None, chunk_size: int) -> Any:
                self.offsets.append(offset)
                return self.store.list(prefix, offset=offset, chunk_size=chunk_size)

        backend = await self.backend(None, by_folder=False)
        for location in self.ORDERED:
            await backend.put_bytes(location, b"...")
        recorded = Recorded(await backend.store())
        backend._client._store = recorded
        assert await locations(backend, start_after="c") == ["d", "e", "f"]
        assert await locations(backend, start_after="c/") == ["d", "e", "f"]
        assert recorded.offsets == ["c", None]


def made_up_key() -> str:
    import json

    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "client_email": "tests@example.com", "private_key_id": "1", "private_key": key.decode()}
    return json.dumps({**account, "client_id": "1", "token_uri": "http://127.0.0.1:9/token"})


async def untouchable() -> AsyncIterator[bytes]:
    raise AssertionError("the stream was read")
    yield b""


async def fetch(url: str, method: str = "GET") -> tuple[int, bytes, str | None]:
    import asyncio

    def ask() -> tuple[int, bytes, str | None]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=30) as answer:  # noqa: S310
                return answer.status, answer.read(), answer.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), None

    return await asyncio.to_thread(ask)


class http_server:  # noqa: N801  # it is used as a function
    """A plain web server on a folder."""

    def __init__(self, folder: Path) -> None:
        application = web.Application()
        application.router.add_static("/", folder)
        self._runner = web.AppRunner(application)

    async def __aenter__(self) -> str:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()
