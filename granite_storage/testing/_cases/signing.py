"""Sign, where it is declared: URLs and uploads, tried by real requests."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
import uuid
from datetime import timedelta
from email.message import Message
from urllib.parse import urlsplit, urlunsplit

import pytest

from granite_storage.backends.base import (
    PresignRequest,
    StorageBackend,
    SupportsBatchPresign,
    SupportsPresign,
    SupportsPresignedUpload,
    UploadRequest,
)
from granite_storage.testing._cases.base import Cases, listed, must_raise, same_bytes

__all__ = ["SignCases"]

MINUTE = timedelta(minutes=1)


class SignCases(Cases):
    """Signed URLs and requests."""

    @pytest.mark.parametrize("location", ["signed", "a folder/it's 50% & more+\u00e9.txt"])
    async def test_signed_get(self, backend: StorageBackend, location: str) -> None:
        """A signed URL gives the object to any client, whole or in ranges."""
        content = self.content("small")
        await backend.put_bytes(location, content)
        url = await self.require_ability(backend, SupportsPresign).presign_get(location, expires_in=MINUTE)
        status, body, _ = await request(url)
        assert status == 200, f"a GET of a signed URL answered {status}"
        same_bytes(body, content, "the body behind a signed URL")
        status, body, _ = await request(url, headers={"Range": "bytes=10-19"})
        assert status == 206, f"a GET of a range of a signed URL answered {status}"
        same_bytes(body, content[10:20], "a range behind a signed URL")

    async def test_signed_headers(self, backend: StorageBackend) -> None:
        """The answer carries the content type and disposition that were asked for."""
        await backend.put_bytes("headed", b"...", content_type="text/html")
        url = await self.require_ability(backend, SupportsPresign).presign_get(
            "headed", expires_in=MINUTE, content_type="text/plain", disposition='attachment; filename="a.txt"'
        )
        _, _, headers = await request(url)
        assert headers["Content-Type"] == "text/plain", f"the answer has the content type {headers['Content-Type']!r}"
        disposition = headers["Content-Disposition"]
        assert disposition == 'attachment; filename="a.txt"', f"the answer has the disposition {disposition!r}"

    async def test_signed_many(self, backend: StorageBackend) -> None:
        """URLs of a batch are in the order of the requests, and the same request for the same time gives the same URL."""
        signer = self.require_ability(backend, SupportsBatchPresign)
        names = ["many/a", "many/b", "many/a"]
        for name in set(names):
            await backend.put_bytes(name, name.encode())
        signed_at = int(time.time()) - 30
        requests = [PresignRequest(name, 2 * MINUTE, "text/plain", "inline", signed_at) for name in names]
        urls = await signer.presign_many(requests)
        assert len(urls) == len(names), f"{len(names)} requests gave {len(urls)} URLs"
        for name, url in zip(names, urls, strict=True):
            _, body, headers = await request(url)
            same_bytes(body, name.encode(), "the body behind one of many signed URLs")
            assert headers["Content-Type"] == "text/plain", f"the answer has the content type {headers['Content-Type']!r}"
        assert list(await signer.presign_many(requests)) == list(urls), "the same requests gave other URLs"
        assert list(await signer.presign_many([])) == [], "no requests gave URLs"

    async def test_signed_url_of_nothing(self, backend: StorageBackend) -> None:
        """A URL may be signed before the object is there; until then it answers 404."""
        url = await self.require_ability(backend, SupportsPresign).presign_get("later", expires_in=MINUTE)
        status, _, _ = await request(url)
        assert status == 404, f"a signed URL of a missing object answered {status}"
        await backend.put_bytes("later", b"now")
        status, body, _ = await request(url)
        assert (status, body) == (200, b"now"), f"a URL that was signed before its object was stored answered {status}"

    @pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
    async def test_signed_for_one_method(self, backend: StorageBackend, method: str) -> None:
        """A URL signed for reading neither writes nor deletes."""
        signer = self.require_ability(backend, SupportsPresign, "checks_signatures")
        await backend.put_bytes("readable", b"as it was")
        url = await signer.presign_get("readable", expires_in=MINUTE)
        status, _, _ = await request(url, method, b"changed" if method != "DELETE" else None)
        assert status >= 400, f"a {method} with a URL signed for GET answered {status}"
        await self.require_whole(backend, "readable", b"as it was", f"after a {method} with a URL signed for GET")

    @pytest.mark.parametrize("change", ["stripped", "another object", "another type", "longer life"])
    async def test_changed_url(self, backend: StorageBackend, change: str) -> None:
        """A signed URL that was changed is refused."""
        signer = self.require_ability(backend, SupportsPresign, "checks_signatures")
        await backend.put_bytes("signed", b"public")
        await backend.put_bytes("secret", b"private")
        url = await signer.presign_get("signed", expires_in=MINUTE, content_type="text/plain")
        status, _, _ = await request(_changed(url, change))
        assert status >= 400, f"a signed URL that was changed ({change}) answered {status}"

    async def test_expired_url(self, backend: StorageBackend) -> None:
        """A signed URL ends when it should."""
        signer = self.require_ability(backend, SupportsPresign, "checks_signatures")
        await backend.put_bytes("short", b"...")
        url = await signer.presign_get("short", expires_in=timedelta(seconds=1))
        await asyncio.sleep(2.1)
        status, _, _ = await request(url)
        assert status >= 400, f"an expired URL answered {status}"

    @pytest.mark.parametrize("seconds", [0, -1, -3600])
    async def test_impossible_expiry(self, backend: StorageBackend, seconds: int) -> None:
        """A URL that would never work is refused when it is asked for."""
        signer = self.require_ability(backend, SupportsPresign)
        with must_raise(ValueError, f"a URL that expires in {seconds} seconds must be refused"):
            await signer.presign_get("signed", expires_in=timedelta(seconds=seconds))

    @pytest.mark.parametrize("location", ["sent", "a folder/it's 50% & more+\u00e9.txt"])
    async def test_signed_upload(self, backend: StorageBackend, location: str) -> None:
        """A signed request of any client stores an object at its location."""
        content = self.content("small")
        signed = await self.require_ability(backend, SupportsPresignedUpload).presign_upload(
            location, expires_in=MINUTE, content_type="text/x-any", min_size=1, max_size=len(content)
        )
        assert await send(signed, content) < 300, "a signed request was refused"
        await self.require_whole(backend, location, content, "after a signed request")
        kept = (await backend.stat(location)).content_type
        assert not self.keeps_content_type or kept == "text/x-any", f"a signed request stored the content type {kept!r}"

    @pytest.mark.parametrize("size", [0, 9, 21])
    async def test_signed_upload_of_another_size(self, backend: StorageBackend, size: int) -> None:
        """A signed request brings no fewer and no more bytes than it was signed for."""
        uploader = self.require_ability(backend, SupportsPresignedUpload, "checks_signatures")
        signed = await uploader.presign_upload("sized", expires_in=MINUTE, content_type="text/plain", min_size=10, max_size=20)
        status = await send(signed, bytes(size))
        assert status >= 400, f"a request with {size} bytes, signed for 10 to 20, answered {status}"
        assert not await backend.exists("sized"), "what a refused request brought was stored"

    @pytest.mark.parametrize("change", ["another location", "another type", "no signature", "the file's own name"])
    async def test_changed_upload(self, backend: StorageBackend, change: str) -> None:
        """A signed request that was changed stores nothing."""
        uploader = self.require_ability(backend, SupportsPresignedUpload, "checks_signatures")
        signed = await uploader.presign_upload("sent", expires_in=MINUTE, content_type="text/plain", min_size=1, max_size=20)
        status = await send(_changed_upload(signed, change), b"content")
        assert status >= 400, f"a signed request that was changed ({change}) answered {status}"
        assert await listed(backend) == [], f"a signed request that was changed ({change}) has stored something"

    async def test_expired_upload(self, backend: StorageBackend) -> None:
        """A signed request ends when it should."""
        uploader = self.require_ability(backend, SupportsPresignedUpload, "checks_signatures")
        signed = await uploader.presign_upload(
            "late", expires_in=timedelta(seconds=1), content_type="text/plain", min_size=1, max_size=20
        )
        await asyncio.sleep(2.1)
        status = await send(signed, b"content")
        assert status >= 400, f"an expired request answered {status}"

    @pytest.mark.parametrize("seconds", [0, -1, -3600])
    async def test_impossible_expiry_of_an_upload(self, backend: StorageBackend, seconds: int) -> None:
        """A request that would never work is refused when it is asked for."""
        uploader = self.require_ability(backend, SupportsPresignedUpload)
        with must_raise(ValueError, f"a request that expires in {seconds} seconds must be refused"):
            await uploader.presign_upload(
                "sent", expires_in=timedelta(seconds=seconds), content_type="text/plain", min_size=1, max_size=20
            )


async def request(
    url: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, Message]:
    """Make one HTTP request in a thread; return its status, body and headers."""
    return await asyncio.to_thread(_request, url, method, body, headers or {})


async def send(signed: UploadRequest, content: bytes) -> int:
    """Make a signed request, as a browser would; return its status."""
    if signed.method == "PUT":
        return (await request(signed.url, "PUT", content, dict(signed.headers)))[0]
    boundary = uuid.uuid4().hex
    parts = [f'form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in signed.fields.items()]
    parts.append(b'form-data; name="file"; filename="name.bin"\r\n\r\n' + content)
    body = b"".join(b"--%b\r\nContent-Disposition: %b\r\n" % (boundary.encode(), part) for part in parts)
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return (await request(signed.url, "POST", body + f"--{boundary}--\r\n".encode(), headers))[0]


def _request(url: str, method: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes, Message]:
    if not url.startswith(("http://", "https://")):
        raise AssertionError(f"a signed URL must be one of HTTP, not {url!r:.60}")
    prepared = urllib.request.Request(url, body, headers, method=method)  # noqa: S310  # its scheme was checked
    try:
        with urllib.request.urlopen(prepared, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def _changed(url: str, change: str) -> str:
    parts = urlsplit(url)
    if change == "stripped":
        return urlunsplit(parts._replace(query=""))
    if change == "another object":
        return urlunsplit(parts._replace(path=parts.path.removesuffix("signed") + "secret"))
    if change == "another type":
        return url.replace("text%2Fplain", "text%2Fhtml").replace("text/plain", "text/html")
    return url.replace("Expires=60", "Expires=6000").replace("expires=60", "expires=6000")


def _changed_upload(signed: UploadRequest, change: str) -> UploadRequest:
    fields, headers, url = dict(signed.fields), dict(signed.headers), signed.url
    match change:
        case "another location":
            fields = {name: value.replace("sent", "other") if name == "key" else value for name, value in fields.items()}
            url = url.replace("/sent", "/other")
        case "another type":
            fields = {name: value.replace("text/plain", "text/html") for name, value in fields.items()}
            headers = {name: value.replace("text/plain", "text/html") for name, value in headers.items()}
        case "the file's own name":
            fields = {name: "${filename}" if name == "key" else value for name, value in fields.items()}
            url = url.replace("/sent", "/name.bin")
        case _:
            fields = {name: value for name, value in fields.items() if "signature" not in name.lower()}
            url = urlunsplit(urlsplit(url)._replace(query=""))
    return UploadRequest(signed.method, url, fields, headers)
