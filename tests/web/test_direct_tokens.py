"""The tokens and URLs of direct uploads: everything that makes them worthless."""

from __future__ import annotations

import base64
import hmac
import json
import logging
import pickle
import time
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from granite_storage import ConfigurationError, ContentTooLargeError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import bind_storage
from granite_storage.web import DirectUploads, MalformedRequestError, UploadTokenError, problem_response
from tests.orm.environment import Doc
from tests.web.direct_uploads import BASE, PDF, SECRET, Client, claims_of, client_of, uploads_of
from tests.web.receiving import Base, Document, manager_of, stored_in

URL_SAFE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
FINISH, SEND = "a direct upload to finish", "a direct upload to send"
OLD = "old-secret-" + "o" * 32


@pytest.fixture
async def binding(receiving_manager: StorageManager) -> AsyncIterator[Any]:
    engine = create_async_engine("sqlite+aiosqlite://")
    binding = bind_storage(Base, receiving_manager, session_factory=async_sessionmaker[AsyncSession](engine))
    yield binding
    binding.unbind()
    await engine.dispose()


@pytest.fixture
def uploads(binding: Any) -> DirectUploads:
    return uploads_of(binding)


@pytest.fixture
async def client(uploads: DirectUploads) -> AsyncIterator[Client]:
    async with client_of(uploads) as client:
        yield client


def signed(
    claims: Mapping[str, Any] | bytes, purpose: str = FINISH, *, secret: str = SECRET, key_id: str = "default", audience: str = ""
) -> str:
    """Sign as the library does, whatever is to be signed."""
    content = claims if isinstance(claims, bytes) else json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()
    text = f"{key_id}.{base64.urlsafe_b64encode(content).decode().rstrip('=')}"
    key = hmac.digest(secret.encode(), f"granite-storage: {purpose}, version 1".encode(), "sha256")
    digest = hmac.digest(key, f"{audience}\n{text}".encode(), "sha256")
    return f"{text}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def url_of(claims: Mapping[str, Any] | bytes, **options: Any) -> str:
    return f"{BASE}/{signed(claims, SEND, **{'audience': BASE, **options})}"


async def begun(uploads: DirectUploads, **options: Any) -> Any:
    return await uploads.begin(Document.file, **{"filename": "a.pdf", "content_type": "application/pdf", **options})


async def refused(uploads: DirectUploads, token: Any) -> None:
    with pytest.raises(UploadTokenError) as raised:
        await uploads.finish(token, Document.file)
    assert problem_response(raised.value).status_code == 403


async def test_what_the_tests_below_sign_is_ours(uploads: DirectUploads) -> None:
    upload = await begun(uploads, owner=None)
    assert signed(claims_of(upload.token)) == upload.token
    assert url_of(claims_of(upload.url)) == upload.url
    assert claims_of(upload.url)["filename"] is None


@pytest.mark.case("SIG-01")
async def test_expiry(uploads: DirectUploads, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    upload = await begun(uploads, expires_in=timedelta(minutes=1))
    for offset, status in ((61, 403), (3600, 403), (-3600 * 24, 403), (59, 204)):
        monkeypatch.setattr("time.time", lambda offset=offset: now + offset)
        assert (await client.send(upload)).status_code == status, offset
    for offset, ends in ((3659, False), (3661, True), (86400, True)):
        monkeypatch.setattr("time.time", lambda offset=offset: now + offset)
        if ends:
            await refused(uploads, upload.token)
        else:
            assert (await uploads.finish(upload.token, Document.file)).size == len(PDF)


@pytest.mark.case("SIG-01")
async def test_an_expiry_that_cannot_be(uploads: DirectUploads, client: Client) -> None:
    upload = await begun(uploads)
    now = int(time.time())
    for ends in (now - 1, 0, -1, now + 14 * 3600, 10**30, float(now + 60), str(now + 60), True, None, [now + 60], 1e9):
        for claims, sign in ((claims_of(upload.token), signed), (claims_of(upload.url), url_of)):
            claims |= {"ends": ends, "expires": ends}
            if sign is signed:
                await refused(uploads, sign(claims))
            else:
                assert (await client.send(upload, url=sign(claims))).status_code == 403
    for name in claims_of(upload.token):
        await refused(uploads, signed({key: value for key, value in claims_of(upload.token).items() if key != name}))
        await refused(uploads, signed(claims_of(upload.token) | {name: ["x"]}))
    for bad in (b"", b"null", b"[]", b"{}", b"\xff", b"[" * 5000, b'{"ends":1e9}', b'{"ends":NaN}', b"1" * 5000):
        await refused(uploads, signed(bad))
        assert (await client.send(upload, url=url_of(bad))).status_code == 403


@pytest.mark.case("SIG-02")
async def test_a_signature_that_is_not_ours(uploads: DirectUploads, client: Client) -> None:
    upload = await begun(uploads)
    for whole in (upload.token, upload.url):
        body, _, signature = whole.rpartition(".")
        flipped = [signature[:-1] + letter for letter in URL_SAFE if letter != signature[-1]]
        changed = ["", signature[:-1], signature.swapcase(), f"{signature}=", f"{signature}A", "\u00e9" * 43, "A" * 43, *flipped]
        for bad in changed:
            if whole is upload.token:
                await refused(uploads, f"{body}.{bad}")
            else:
                assert (await client.send(upload, url=f"{body}.{bad}")).status_code == 403
    for odd in ("", ".", "..", "a.b.c", None, 7, b"x", upload.token.encode(), f" {upload.token}", f"{upload.token}\n"):
        await refused(uploads, odd)
    assert await stored_in(uploads._manager) == []


@pytest.mark.case("SIG-04")
async def test_one_form(uploads: DirectUploads, client: Client) -> None:
    upload = await begun(uploads)
    token = upload.url.removeprefix(f"{BASE}/")
    spaced = json.dumps(claims_of(upload.token)).encode()
    await refused(uploads, signed(spaced))
    turned = dict(reversed(claims_of(upload.token).items()))
    await refused(uploads, signed(json.dumps(turned, separators=(",", ":")).encode()))
    for path in (
        f"{token}?",
        f"{token}?a=b",
        f"/{token}",
        f"x/{token}",
        f"{token}/",
        token.replace(".", "%2E"),
        quote(token, safe="") + "%20",
    ):
        answer = await client.send(upload, url=f"{BASE}/{path}")
        assert answer.status_code in (403, 204), path
        if answer.status_code == 204:
            assert path == f"{token}?"  # the client writes no empty query


@pytest.mark.case("SIG-06")
async def test_rotated_keys(binding: Any) -> None:
    old = uploads_of(binding, secret={"k1": OLD})
    upload = await begun(old)
    both = uploads_of(binding, secret={"k2": SECRET, "k1": OLD})
    async with client_of(both) as client:
        assert (await client.send(upload)).status_code == 204
    assert (await both.finish(upload.token, Document.file)).size == len(PDF)
    assert (await begun(both)).token.startswith("k2.")
    new = uploads_of(binding, secret={"k2": SECRET})
    await refused(new, upload.token)
    async with client_of(new) as client:
        assert (await client.send(upload)).status_code == 403
    for key_id in ("k1", "k3", "../x", "", "k2\x00", "K2"):
        await refused(new, signed(claims_of(upload.token), key_id=key_id))
    await refused(new, signed(claims_of(upload.token), key_id="k2", secret=OLD))


@pytest.mark.case("SIG-09")
async def test_a_place_that_is_not_of_its_column(uploads: DirectUploads, client: Client) -> None:
    """A program that shares the key still reaches only objects that clients have sent for this column."""
    upload = await client.sent(await begun(uploads))
    file = await uploads.finish(upload.token, Document.file)
    claims = claims_of(upload.token)
    segments = claims["location"].split("/")
    elsewhere = [
        f"../{claims['location']}",
        "/".join(["other", *segments[1:]]),
        "/".join([segments[0], "..", *segments[2:]]),
        "/".join([segments[0], "1", *segments[2:]]),
        "/".join([*segments[:2], "scan", segments[3]]),
        "/".join([*segments[:3], "report.pdf"]),
        f"{claims['location']}/x",
        f"x/{claims['location']}",
        claims["location"].upper(),
        f"{claims['location']}\n",
        "",
        file.location.replace("a.pdf", "b.pdf"),
    ]
    for location in elsewhere:
        await refused(uploads, signed(claims | {"location": location}))
        assert (await client.send(upload, url=url_of(claims | {"location": location}))).status_code == 403
    for change in ({"table": "other"}, {"column": "title"}, {"column": "gone"}, {"backend": "gone"}, {"intent": "../x"}):
        await refused(uploads, signed(claims | change))
        assert (await client.send(upload, url=url_of(claims | change))).status_code == 403
    assert len(await stored_in(uploads._manager)) == 2


async def test_a_token_is_for_one_purpose(uploads: DirectUploads, client: Client) -> None:
    upload = await begun(uploads)
    await client.sent(upload)
    await refused(uploads, upload.url.removeprefix(f"{BASE}/"))
    assert (await client.send(upload, url=f"{BASE}/{upload.token}")).status_code == 403


@pytest.mark.case("SIG-12")
async def test_the_host_of_a_request_is_not_asked(binding: Any, client: Client) -> None:
    elsewhere = uploads_of(binding, base_url="https://uploads.example/send/")
    upload = await begun(elsewhere)
    assert upload.url.startswith("https://uploads.example/send/")
    token = upload.url.rpartition("/")[2]
    assert (await client.send(upload, url=f"{BASE}/{token}")).status_code == 403
    here = await begun(uploads_of(binding))
    for host in ("evil.com", "evil.com:80@test", "test@google.com"):
        sent = await begun(uploads_of(binding))
        assert sent.url.startswith(f"{BASE}/")
        assert (await client.send(sent, headers={"Host": host})).status_code == 204
    assert (await client.send(here)).status_code == 204
    for base_url in ("/uploads", "https://user:secret@test/uploads", "https://test@evil.com", "", 7, "https://test/a?b"):
        with pytest.raises(ConfigurationError, match="base_url"):
            uploads_of(binding, base_url=base_url)


async def test_without_a_base_url(binding: Any) -> None:
    with pytest.raises(ConfigurationError, match="base_url"):
        await begun(uploads_of(binding, base_url=None))


@pytest.mark.case("POL-08")
async def test_no_secret_is_shown(binding: Any, uploads: DirectUploads, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    upload = await begun(uploads)
    shown = [repr(uploads), repr(upload)]
    for secret in ("short", b"short", {}, {"k/1": SECRET}, {"k1": SECRET[:31]}, None, 7, [SECRET]):
        with pytest.raises(ConfigurationError) as raised:
            uploads_of(binding, secret=secret)
        shown.append(str(raised.value))
    with pytest.raises(TypeError) as refused:
        pickle.dumps(uploads._to_finish)
    for text in (*shown, str(refused.value), caplog.text):
        assert "a-secret" not in text
        assert upload.token not in text
        assert upload.url not in text


async def test_arguments(binding: Any, uploads: DirectUploads) -> None:
    for expires_in in (timedelta(0), timedelta(seconds=-1), timedelta(hours=12, seconds=1), timedelta.max):
        with pytest.raises(ValueError, match="expires_in"):
            await begun(uploads, expires_in=expires_in)
    for wrong in (
        {"size": -1},
        {"size": True},
        {"size": 1.5},
        {"checksum": "md5:x"},
        {"checksum": ""},
        {"content_type": "a\r\nb"},
    ):
        with pytest.raises(MalformedRequestError):
            await begun(uploads, **wrong)
    for owner in ("", "x" * 256, 7):
        with pytest.raises(ValueError, match="owner"):
            await begun(uploads, owner=owner)
    for least in (-1, (400 << 20) + 1):
        with pytest.raises(ValueError, match="min_size"):
            await begun(uploads, min_size=least)
    with pytest.raises(ContentTooLargeError):
        await begun(uploads, size=10**18)
    for attribute in (Document.title, Document, "file", None, Doc.file):
        with pytest.raises(ConfigurationError, match="attachment attribute"):
            await uploads.begin(attribute)  # type: ignore[arg-type]
    for wrong in ({"max_expires_in": timedelta(0)}, {"max_expires_in": 60}, {"finish_within": timedelta(0)}):
        with pytest.raises(ConfigurationError, match="timedelta"):
            uploads_of(binding, **wrong)
    with pytest.raises(ConfigurationError, match="bind_storage"):
        uploads_of(Base)


async def test_a_limit_must_come_from_somewhere() -> None:
    async with manager_of(MemoryStorageBackend(), max_size=None) as manager:
        binding = bind_storage(Base, manager)
        try:
            with pytest.raises(ConfigurationError, match="max_size"):
                await begun(uploads_of(binding))
            assert claims_of((await begun(uploads_of(binding), max_size=7)).token)["max_size"] == 7
        finally:
            binding.unbind()


async def test_the_policy_limits_what_is_asked_for(uploads: DirectUploads) -> None:
    claims = claims_of((await begun(uploads, max_size=10**18)).token)
    assert (claims["min_size"], claims["max_size"]) == (1, 400 << 20)


async def test_what_a_client_is_given(uploads: DirectUploads) -> None:
    upload = await begun(uploads, content_type="", filename="C:\\a\\caf\u00e9\u202e.pdf")
    given = json.loads(json.dumps(upload.to_dict()))
    assert given["headers"] == {"Content-Type": "application/octet-stream"}
    assert (given["method"], given["fields"], given["token"]) == ("PUT", {}, upload.token)
    assert claims_of(upload.token)["filename"] == "caf\u00e9.pdf"
    assert given["expires_at"] == upload.expires_at.isoformat()


async def test_a_prefix_belongs_to_the_place() -> None:
    policies = {"files": StoragePolicy("files", "store", max_size=100, key_prefix="tenant/7")}
    async with StorageManager(backends={"store": MemoryStorageBackend()}, policies=policies) as manager:
        binding = bind_storage(Base, manager)
        uploads = uploads_of(binding)
        async with client_of(uploads) as client:
            upload = await client.sent(await begun(uploads))
            assert claims_of(upload.token)["location"].startswith("tenant/7/document/")
            assert (await uploads.finish(upload.token, Document.file)).location.startswith("tenant/7/document/")
            outside = claims_of(upload.token)["location"].removeprefix("tenant/7/")
            await refused(uploads, signed(claims_of(upload.token) | {"location": outside}))
        binding.unbind()
