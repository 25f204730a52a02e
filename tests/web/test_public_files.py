"""Public policies over HTTP: what is served by its location, and everything that never is."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage._engine import is_media_type
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.locations import STAGED_NAME, uuid7_hex
from granite_storage.policies import PublicURL
from granite_storage.testing import FaultInjectingBackend
from granite_storage.web import PublicFiles
from tests.docs.hostile import HOSTILE, File, require_harmless
from tests.web.serving import HUNDRED, ask

BASE = "https://example.com/media"
PLACE = {"model_name": "photo", "entity_id": "1", "field_name": "file"}


def policy(
    name: str, prefix: str | None = None, backend: str = "store", *, public: bool = False, **options: Any
) -> StoragePolicy:
    return StoragePolicy(name, backend, key_prefix=prefix, public=PublicURL(BASE, **options) if public else None)


def manager_of(*policies: StoragePolicy, **backends: Any) -> StorageManager:
    return StorageManager(backends=backends, policies={one.storage_key: one for one in policies})


@pytest.fixture(params=["local", "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return LocalStorageBackend(tmp_path, fsync=False) if request.param == "local" else MemoryStorageBackend()


@pytest.fixture
def manager(backend: Any) -> StorageManager:
    return manager_of(policy("avatars", "avatars", public=True), policy("secrets", "secrets"), store=backend)


@pytest.fixture
def app(manager: StorageManager) -> ASGIApp:
    return Starlette(routes=[Mount("/media", PublicFiles(manager))])


async def put(
    manager: StorageManager, key: str = "avatars", name: str | None = "me.png", kind: str | None = "image/png"
) -> StoredObjectRef:
    return await manager.put_bytes(storage_key=key, **PLACE, content=HUNDRED, original_filename=name, content_type=kind)


async def test_it_is_served(manager: StorageManager, app: ASGIApp) -> None:
    ref = await put(manager, name="caf\u00e9 100% + a.png")
    url = manager.public_url(ref)
    response = await ask(app, url=url)
    assert (response.status_code, response.content, response.headers["content-type"]) == (200, HUNDRED, "image/png")
    assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert response.headers["content-disposition"].startswith("inline; ")
    assert response.headers["x-content-type-options"] == "nosniff"
    etag = response.headers["etag"]
    assert (await ask(app, url=url, range="bytes=1-2")).content == HUNDRED[1:3]
    assert (await ask(app, url=url, range="bytes=1-2", if_range=etag)).status_code == 206
    assert (await ask(app, url=url, range="bytes=1-2", if_range='"other"')).status_code == 200
    assert (await ask(app, url=url, if_none_match=etag)).status_code == 304
    head = await ask(app, "HEAD", url=url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "100", b"")
    assert (await ask(app, "POST", url=url)).status_code == 405
    other = manager.public_url(await put(manager))
    assert (await ask(app, url=other)).headers["etag"] != etag


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.html", "text/html"),
        ("image.svg", "image/svg+xml"),
        ("code.js", "text/javascript"),
        ("data.xml", "application/xml"),
        ("page.xhtml", None),
        ("nothing", None),
    ],
)
async def test_what_a_browser_might_run_is_a_download(manager: StorageManager, app: ASGIApp, name: str, kind: str | None) -> None:
    response = await ask(app, url=manager.public_url(await put(manager, name=name, kind=kind)))
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment")
    assert response.headers["content-security-policy"] == "sandbox; default-src 'none'"


@pytest.mark.parametrize("file", HOSTILE, ids=lambda file: f"{file.name[:20]!a} {file.kind[:20]!a}")
async def test_hostile_files(manager: StorageManager, app: ASGIApp, file: File) -> None:
    ref = await manager.put_bytes(
        storage_key="avatars",
        **PLACE,
        content=file.content,
        original_filename=file.name,
        content_type=file.kind if is_media_type(file.kind) else None,
    )
    response = await ask(app, url=manager.public_url(ref))
    assert response.content == file.content
    require_harmless(response)


async def test_what_is_never_served(manager: StorageManager, app: ASGIApp, backend: Any) -> None:
    """The location decides: neither what is private is served, nor what is staged, nor what others have put there."""
    secret, public = await put(manager, "secrets"), await put(manager)
    name = f"{uuid7_hex()}-me.png"
    for location in (
        f"avatars/photo/{uuid7_hex()}/file/{uuid7_hex()}-{STAGED_NAME}",
        "avatars/photo/1/file/foreign.png",
        f"avatars2/photo/1/file/{name}",
        f"Avatars/photo/1/file/{name}",
        name,
    ):
        await backend.put_bytes(location, b"secret")
        assert (await ask(app, url=f"{BASE}/{quote(location)}")).status_code == 404, location
    for path in (
        secret.location,
        ".granite-storage",
        "avatars/.granite-storage",
        f"avatars/../{secret.location}",
        f"avatars/%2e%2e/{secret.location}",
        f"avatars%2f..%2f{secret.location}",
        f"avatars/..%5c{secret.location}",
        f"avatars//{secret.location}",
        f"/{public.location}",
        f"%2e/{public.location}",
        f"{public.location}%00",
        f"{public.location}%00.png",
        f"{public.location}/",
        f"{public.location}%20",
        f"{public.location}.",
        f"%00{public.location}",
        public.location.replace("-me", "-ME"),
        public.location.upper(),
        "",
        "avatars",
        "avatars/",
        "%ff",
        "a" * 20_000,
    ):
        response = await ask(app, url=f"{BASE}/{path}")
        assert response.status_code in (404, 307), path
        assert HUNDRED not in response.content
    assert (await ask(app, url=f"{BASE}/{public.location}")).status_code == 200


async def test_a_file_has_one_url(manager: StorageManager, app: ASGIApp) -> None:
    """A cache would keep any other form by itself, and a purge would not find it there."""
    ref = await put(manager)
    url = manager.public_url(ref)
    slashes, letter = ref.location.replace("/", "%2F"), f"%{ord(ref.location[0]):02x}{ref.location[1:]}"
    for other in (f"{BASE}/{slashes}", f"{BASE}/{letter}", f"{url}?keep=1", f"{url}/"):
        response = await ask(app, url=other)
        assert (response.status_code, response.headers["cache-control"]) == (404, "no-store"), other
    assert (await ask(app, url=url)).content == HUNDRED


async def test_a_name_like_that_of_a_staged_file(manager: StorageManager, app: ASGIApp) -> None:
    for name in ("report-_staged", "-_staged"):
        ref = await put(manager, name=name)
        assert (await ask(app, url=manager.public_url(ref))).status_code == 200


@pytest.mark.parametrize("name", ["page.html", "x.js", "style.CSS", "image.svg", "feed.xml", "a.b.mjs", "page.html. "])
async def test_the_extension_of_what_runs(manager: StorageManager, name: str) -> None:
    """Servers that go by the extension run nothing, whatever type the client has declared."""
    ref = await put(manager, name=name, kind="image/png")
    assert ref.location.endswith(".bin")
    assert ref.original_filename == name.strip()
    private = await put(manager, "private", name=name) if "private" in manager.policies else None
    assert private is None or not private.location.endswith(".bin")


@pytest.mark.parametrize(
    ("name", "kind", "end"),
    [
        (None, "image/png", "-file.png"),
        ("photo", "image/jpeg", "-photo.jpg"),
        ("release.v2", "application/pdf", "-release_v2.pdf"),
        (None, "text/html", "-file"),
        (None, "image/svg+xml", "-file"),
        (None, "application/x-php", "-file"),
        (None, "application/x-msdownload", "-file"),
        ("setup", "text/x-python", "-setup"),
        (None, "application/octet-stream", "-file"),
        (None, None, "-file"),
        ("a.png", "text/html", "-a.png"),
    ],
)
async def test_a_name_without_an_extension(
    manager: StorageManager, app: ASGIApp, name: str | None, kind: str | None, end: str
) -> None:
    """What knows the location alone shows a picture as one; no type gives a name the extension of what runs."""
    ref = await put(manager, name=name, kind=kind)
    assert ref.location.endswith(end)
    assert ref.original_filename == name
    response = await ask(app, url=manager.public_url(ref))
    assert response.status_code == 200
    if end.endswith((".png", ".jpg")) and kind != "text/html":
        assert response.headers["content-type"] == kind


async def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    manager = manager_of(policy("avatars", "avatars", public=True), store=LocalStorageBackend(tmp_path / "store", fsync=False))
    ref = await put(manager)
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    name = f"{uuid7_hex()}-me.png"
    (tmp_path / "store" / ref.location).with_name(name).symlink_to(secret)
    response = await ask(PublicFiles(manager), url=f"https://example.com/{ref.location.rpartition('/')[0]}/{name}")
    assert response.status_code >= 400
    assert b"secret" not in response.content
    await manager.aclose()


class TestConfigurations:
    """A public policy's locations must have a prefix that no other locations have."""

    def refused(self, *policies: StoragePolicy, **backends: Any) -> None:
        with pytest.raises(ConfigurationError, match="cannot tell"):
            PublicFiles(manager_of(*policies, **backends))

    @pytest.mark.parametrize(
        ("public", "private"),
        [
            (None, None),
            (None, "b"),
            ("a", None),
            ("a", "a"),
            ("a", "a/b"),
            ("a/b", "a"),
            ("a", "A"),
            ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")),
            ("stra\u00dfe", "STRASSE"),
        ],
    )
    def test_on_one_backend(self, public: str | None, private: str | None) -> None:
        self.refused(policy("p", public, public=True), policy("q", private), store=MemoryStorageBackend())

    def test_on_one_backend_under_two_keys(self) -> None:
        backend = MemoryStorageBackend()
        self.refused(policy("p", "a", public=True), policy("q", "a", "other"), store=backend, other=backend)

    def test_two_public_ones_of_different_backends(self) -> None:
        stores = {"store": MemoryStorageBackend(), "other": MemoryStorageBackend()}
        self.refused(policy("p", public=True), policy("q", "a", "other", public=True), **stores)

    def test_two_public_ones_with_different_headers(self) -> None:
        store = MemoryStorageBackend()
        self.refused(policy("p", public=True), policy("q", public=True, cache_control="no-store"), store=store)

    def test_what_works(self) -> None:
        PublicFiles(manager_of(policy("p", public=True), policy("q", public=True), store=MemoryStorageBackend()))
        PublicFiles(manager_of(policy("p", "a", public=True), policy("q", "ab"), store=MemoryStorageBackend()))
        PublicFiles(manager_of(policy("p", "a/b", public=True), policy("q", "a/c"), store=MemoryStorageBackend()))
        stores = {"store": MemoryStorageBackend(), "other": MemoryStorageBackend()}
        PublicFiles(manager_of(policy("p", public=True), policy("q", None, "other"), **stores))
        with pytest.raises(ConfigurationError, match="no policy is public"):
            PublicFiles(manager_of(policy("q"), store=MemoryStorageBackend()))

    @pytest.mark.parametrize("below", ["", "a", "A/private"])
    async def test_one_folder_under_two_keys(self, tmp_path: Path, below: str) -> None:
        stores = {
            "store": LocalStorageBackend(tmp_path, fsync=False),
            "other": LocalStorageBackend(tmp_path / below, fsync=False),
        }
        manager = manager_of(policy("p", "a", public=True), policy("q", None, "other"), **stores)
        ref = await put(manager, "p")
        files = PublicFiles(manager)
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="cannot tell"):
                await ask(files, url=f"https://example.com/{ref.location}")
        await manager.aclose()

    async def test_folders_apart(self, tmp_path: Path) -> None:
        memory = MemoryStorageBackend()
        stores = {
            "store": LocalStorageBackend(tmp_path / "public", fsync=False),
            "other": LocalStorageBackend(tmp_path / "private", fsync=False),
            "wrapped": PrefixedBackend(memory, "a"),
        }
        manager = manager_of(policy("p", public=True), policy("q", None, "other"), policy("r", None, "wrapped"), **stores)
        ref = await put(manager, "p")
        assert (await ask(PublicFiles(manager), url=f"https://example.com/{ref.location}")).status_code == 200
        await manager.aclose()


async def test_what_storage_answers(caplog: pytest.LogCaptureFixture) -> None:
    backend = FaultInjectingBackend(MemoryStorageBackend())
    manager = manager_of(policy("p", public=True), store=backend)
    ref = await put(manager, "p")
    url = f"https://example.com/{ref.location}"
    backend.fail("stat")
    response = await ask(PublicFiles(manager), url=url)
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    backend.fail("open")
    assert (await ask(PublicFiles(manager), url=url)).status_code == 503
    assert len(caplog.records) == 2
    await manager.delete(ref)
    response = await ask(PublicFiles(manager), url=url)
    assert (response.status_code, response.headers["cache-control"]) == (404, "no-store")
