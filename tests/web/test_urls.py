"""Signed URLs: what they grant, and everything that makes them worthless."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import pickle
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from granite_storage import BackendUnavailableError, ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.signing import UrlSigner
from granite_storage.testing import FaultInjectingBackend
from granite_storage.web import SignedFiles
from tests.core.support import manager_on
from tests.servers import S3Server
from tests.web.serving import HUNDRED, ask, stored

BASE = "https://files.example/signed"
NEW, OLD = "new-secret-" + "n" * 32, "old-secret-" + "o" * 32
HOUR = timedelta(hours=1)
URL_SAFE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def signer(**keys: str) -> UrlSigner:
    return UrlSigner(BASE, keys=keys or {"k1": NEW})


def manager_with(backend: Any, url_signer: UrlSigner | None) -> StorageManager:
    policies = {"files": StoragePolicy("files", "store")}
    return StorageManager(backends={"store": backend}, policies=policies, url_signer=url_signer)


@pytest.fixture(params=["memory", "local"])
async def manager(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[StorageManager]:
    backend = MemoryStorageBackend() if request.param == "memory" else LocalStorageBackend(tmp_path, fsync=False)
    async with manager_with(backend, signer()) as manager:
        yield manager


@pytest.fixture
async def ref(manager: StorageManager) -> StoredObjectRef:
    return await stored(manager, HUNDRED, "image/png", "caf\u00e9 a+b%2F.png")


@pytest.fixture
async def url(manager: StorageManager, ref: StoredObjectRef) -> str:
    return await manager.url(ref, expires_in=HOUR)


@pytest.fixture
def app(manager: StorageManager) -> ASGIApp:
    return Starlette(routes=[Mount("/signed", SignedFiles(manager))])


def forged(claims: Mapping[str, Any] | bytes, *, secret: str = NEW, base: str = BASE, key_id: str = "k1") -> str:
    """Sign as the library does, whatever is to be signed."""
    content = claims if isinstance(claims, bytes) else json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()
    text = f"{key_id}.{base64.urlsafe_b64encode(content).decode().rstrip('=')}"
    key = hmac.digest(secret.encode(), b"granite-storage: url to read an object, version 1", "sha256")
    digest = hmac.digest(key, f"{base}\n{text}".encode(), "sha256")
    return f"{BASE}/{text}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def claims_of(url: str) -> dict[str, Any]:
    payload = url.rpartition("/")[2].split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


async def test_it_is_served(manager: StorageManager, ref: StoredObjectRef, app: ASGIApp, url: str) -> None:
    assert url.startswith(f"{BASE}/")
    response = await ask(app, url=url)
    assert (response.status_code, response.content, response.headers["content-type"]) == (200, HUNDRED, "image/png")
    assert response.headers["content-disposition"].startswith("attachment; filename=")
    assert response.headers["etag"] == f'"{ref.checksum[7:]}"'
    assert (await ask(app, url=url, range="bytes=1-2")).content == HUNDRED[1:3]
    assert (await ask(app, "HEAD", url=url)).headers["content-length"] == "100"
    shown = await manager.url(ref, expires_in=HOUR, disposition="inline", filename="b.png")
    assert (await ask(app, url=shown)).headers["content-disposition"] == 'inline; filename="b.png"'
    assert forged(claims_of(url)) == url  # what the tests below sign is refused for what it says


async def test_one_call_for_s3(moto_server: S3Server) -> None:
    async with moto_server.bucket() as bucket, manager_with(moto_server.backend(bucket), signer()) as manager:
        ref = await stored(manager, HUNDRED, "text/html", "caf\u00e9.html")
        url = await manager.url(ref, expires_in=HOUR, disposition="inline")
        assert url.startswith(moto_server.endpoint_url)
        async with httpx.AsyncClient() as client:
            response = await client.get(url)
        assert (response.status_code, response.content) == (200, HUNDRED)
        assert response.headers["content-type"] == "application/octet-stream"
        assert response.headers["content-disposition"] == "attachment; filename=\"caf_.html\"; filename*=UTF-8''caf%C3%A9.html"
        with pytest.raises(ValueError, match="disposition"):
            await manager.url(ref, expires_in=HOUR, disposition="form-data")  # type: ignore[arg-type]


@pytest.mark.case("SIG-01")
async def test_expiry(ref: StoredObjectRef, app: ASGIApp, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for offset, status in ((-1, 200), (3599 - 10, 200), (3600, 403), (3601, 403), (7 * 86400, 403)):
        monkeypatch.setattr("granite_storage.signing.time.time", lambda offset=offset: now + offset)
        assert (await ask(app, url=url)).status_code == status


@pytest.mark.case("SIG-01")
async def test_an_expiry_that_cannot_be(app: ASGIApp, url: str) -> None:
    claims = claims_of(url)
    now = int(time.time())
    for expires in (now - 1, 0, -1, now + 8 * 86400, 10**30, float(now + 60), str(now + 60), True, None, [now + 60], 1e9):
        assert (await ask(app, url=forged(claims | {"expires": expires}))).status_code == 403
    del claims["expires"]
    assert (await ask(app, url=forged(claims))).status_code == 403
    for bad in (b"", b"null", b"[]", b"{}", b"\xff", b"[" * 5000, b'{"expires":1e9}', b'{"expires":NaN}', b"1" * 5000):
        assert (await ask(app, url=forged(bad))).status_code == 403


@pytest.mark.parametrize("expires_in", [timedelta(0), timedelta(seconds=-1), timedelta(days=7, seconds=1), timedelta.max])
async def test_an_expiry_that_is_not_signed(manager: StorageManager, ref: StoredObjectRef, expires_in: timedelta) -> None:
    with pytest.raises(ValueError, match="expires_in"):
        await manager.url(ref, expires_in=expires_in)


@pytest.mark.case("SIG-02")
async def test_a_signature_that_is_not_ours(app: ASGIApp, url: str) -> None:
    body, _, signature = url.rpartition(".")
    flipped = [signature[:-1] + letter for letter in URL_SAFE if letter != signature[-1]]
    changed = ["", signature[:-1], signature.swapcase(), signature + "=", signature + "A", "\u00e9" * 43, "A" * 43, signature * 2]
    for wrong in (*flipped, *changed):
        assert (await ask(app, url=f"{body}.{wrong}")).status_code == 403, wrong
    for wrong in (body, body + ".", url + "=", url + "/", url + ".", url + "%00", url + "%0a", url + "?", f"{BASE}/"):
        status = (await ask(app, url=wrong)).status_code
        assert status == (200 if wrong.endswith("?") else 403), wrong


async def test_each_changed_character_counts(manager: StorageManager, url: str) -> None:
    token = url.rpartition("/")[2]
    assert manager.url_signer is not None
    assert manager.url_signer.verify(token)
    for place, letter in enumerate(token):
        for other in {"A", "B", letter.swapcase(), "."} - {letter}:
            assert manager.url_signer.verify(token[:place] + other + token[place + 1 :]) is None


@pytest.mark.case("SIG-04")
async def test_one_form(app: ASGIApp, url: str) -> None:
    token = url.rpartition("/")[2]
    variants = [
        f"{BASE}/{quote(token[0], safe='').replace(token[0], f'%{ord(token[0]):02X}')}{token[1:]}",
        f"{BASE}/%25{ord(token[0]):02X}{token[1:]}",
        f"{BASE}//{token}",
        f"{BASE}/./{token}/",
        f"{BASE}/x/{token}",
        f"{BASE}%2F{token}",
        f"{BASE}/{token}%2F",
        f"{BASE}/{token}?download=1",
        f"{BASE}/{token}?{token}",
        f"{BASE}/{token};x",
        f"{BASE}/{token.replace('.', '%2E', 1)}",
        f"{BASE}/{token.replace('.', '+', 1)}",
        f"{BASE}/{token}%20",
        f"{BASE}/{token}e\u0301",
        f"{BASE}/\uff4b{token[1:]}",
    ]
    for variant in variants:
        assert (await ask(app, url=variant)).status_code in (403, 404), variant


@pytest.mark.case("SIG-04")
async def test_one_name(manager: StorageManager, app: ASGIApp, url: str) -> None:
    claims = claims_of(url)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    await manager.backend("store").put_bytes(f"a/{composed}", b"composed")
    granted = forged(claims | {"location": f"a/{composed}", "size": 8, "checksum": ""})
    assert (await ask(app, url=granted)).content == b"composed"
    assert (await ask(app, url=forged(claims | {"location": f"a/{decomposed}", "size": 8, "checksum": ""}))).status_code == 404


@pytest.mark.case("HTP-21")
@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2fetc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "%00",
        "/host/x",
        "\\\\host\\share",
        "..%5c..%5cx",
        "%ff",
        "a" * 20_000,
    ],
    ids=lambda path: path[:30],
)
async def test_a_path_leads_nowhere(path: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = FaultInjectingBackend(MemoryStorageBackend())
    async with manager_with(backend, signer()) as manager:
        for mounted in (SignedFiles(manager), Starlette(routes=[Mount("/signed", SignedFiles(manager))])):
            response = await ask(mounted, url=f"{BASE}/{path}")
            assert response.status_code in (403, 404)
        assert not backend.calls
    assert not caplog.records


@pytest.mark.case("HTP-21")
@pytest.mark.parametrize("location", ["../../etc/passwd", "a/../b", "/etc/passwd", "a\\b", "a\x00b", "//host/x", ""])
async def test_a_location_that_is_not_safe(app: ASGIApp, url: str, location: str) -> None:
    assert (await ask(app, url=forged(claims_of(url) | {"location": location}))).status_code == 403


@pytest.mark.case("SIG-06")
async def test_rotation(manager: StorageManager, ref: StoredObjectRef) -> None:
    old = UrlSigner(BASE, keys={"old": OLD}).sign(ref, expires_in=HOUR)
    both = UrlSigner(BASE, keys={"new": NEW, "old": OLD})
    only_new = UrlSigner(BASE, keys={"new": NEW})

    def token(url: str) -> str:
        return url.rpartition("/")[2]

    assert both.verify(token(old)) is not None
    assert only_new.verify(token(old)) is None
    assert both.sign(ref, expires_in=HOUR).startswith(f"{BASE}/new.")
    for key_id in ("unknown", "../x", "", "new", "OLD", "old\n", "\u00f6ld"):
        assert both.verify(f"{key_id}.{token(old).partition('.')[2]}") is None


async def test_a_signature_for_another_purpose(app: ASGIApp, url: str) -> None:
    claims = claims_of(url)
    assert (await ask(app, url=forged(claims))).status_code == 200
    assert (await ask(app, url=forged(claims, secret=OLD))).status_code == 403
    assert (await ask(app, url=forged(claims, base="https://staging.example/signed"))).status_code == 403
    assert (await ask(app, url=forged(claims | {"disposition": "form-data"}))).status_code == 403
    assert (await ask(app, url=forged(claims | {"filename": 7}))).status_code == 403
    assert (await ask(app, url=forged(json.dumps(claims).encode()))).status_code == 403  # not the canonical form
    raw = hmac.digest(NEW.encode(), f"{BASE}\n{url.rpartition('/')[2].rpartition('.')[0]}".encode(), "sha256")
    assert (await ask(app, url=url.rpartition(".")[0] + "." + base64.urlsafe_b64encode(raw).decode()[:-1])).status_code == 403


@pytest.mark.case("SIG-12")
async def test_the_host_is_configured(app: ASGIApp, url: str) -> None:
    for host in ("evil.com", "evil.com:443", "files.example@evil.com", ""):
        response = await ask(app, url=url, host=host)
        assert response.status_code == 200
        assert "evil.com" not in str(response.headers)
    for path in ("@google.com", "/@google.com/", ".evil.com/x"):
        assert (await ask(app, url=f"{BASE}/{path}")).status_code == 403


@pytest.mark.case("SIG-12")
@pytest.mark.parametrize(
    "base_url",
    [
        "/files",
        "files.example",
        "//files.example",
        "ftp://files.example",
        "javascript:alert(1)",
        "https://",
        "https:///x",
        "https://user:secret@files.example",
        "https://files.example@evil.com",
        "https://files.example/x?y=1",
        "https://files.example/x#y",
        "https://files.example\\@evil.com",
        "https://files.example/a//b",
        "https://files.example/\r\n",
        "https://files.example/%2e",
        "https://files.example:99999",
        "https://f\u00edles.example",
        "",
        None,
        7,
    ],
)
def test_a_base_url_that_cannot_be(base_url: Any) -> None:
    with pytest.raises(ConfigurationError, match="base_url"):
        UrlSigner(base_url, keys={"k1": NEW})


@pytest.mark.case("POL-08")
def test_no_secret_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    manager = manager_with(MemoryStorageBackend(), signer(k1=NEW, k2=OLD))
    shown = [repr(manager), repr(manager.url_signer), str(manager.url_signer), repr(SignedFiles(manager))]
    for keys in ({"k/1": NEW}, {"k1": NEW[:31]}, {"k1": None}, {"k1": bytearray(NEW.encode())}, {7: NEW}, {}, [NEW], NEW):
        with pytest.raises(ConfigurationError) as raised:
            UrlSigner(BASE, keys=keys)  # type: ignore[arg-type]
        shown.append(str(raised.value))
    with pytest.raises(TypeError) as refused:
        pickle.dumps(manager.url_signer)
    for text in (*shown, str(refused.value), caplog.text):
        assert "secret-" not in text
        assert base64.b64encode(NEW.encode()).decode()[:20] not in text


def test_what_the_life_of_a_url_may_be() -> None:
    for life in (timedelta(0), timedelta(milliseconds=1), 60, None):
        with pytest.raises(ConfigurationError, match="max_expires_in"):
            UrlSigner(BASE, keys={"k1": NEW}, max_expires_in=life)  # type: ignore[arg-type]


async def test_without_a_signer() -> None:
    async with manager_on(MemoryStorageBackend()) as manager:
        ref = await stored(manager, b"")
        with pytest.raises(ConfigurationError, match="url_signer"):
            await manager.url(ref, expires_in=HOUR)
        with pytest.raises(ConfigurationError, match="url_signer"):
            SignedFiles(manager)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_it_is_for_reading(app: ASGIApp, url: str, method: str) -> None:
    response = await ask(app, method, url=url)
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.case("HTP-20")
async def test_what_storage_answers(ref: StoredObjectRef, caplog: pytest.LogCaptureFixture) -> None:
    backend = FaultInjectingBackend(MemoryStorageBackend())
    async with manager_with(backend, signer()) as manager:
        app = SignedFiles(manager)
        ref = await stored(manager, HUNDRED)
        url = await manager.url(ref, expires_in=HOUR)
        backend.fail("open", error=BackendUnavailableError("it is out of reach"))
        refused = await ask(app, url=url.replace("/signed", ""))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        elsewhere = signer().sign(replace(ref, backend="gone"), expires_in=HOUR)
        assert (await ask(app, url=elsewhere.replace("/signed", ""))).status_code == 404
        await manager.delete(ref)
        assert (await ask(app, url=url.replace("/signed", ""))).status_code == 404


async def test_a_websocket_is_refused(manager: StorageManager) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    await SignedFiles(manager)({"type": "websocket", "path": "/x"}, receive, send)
    assert sent == [{"type": "websocket.close"}]
