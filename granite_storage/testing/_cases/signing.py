"""Sign, where it is declared: URLs, tried by real requests."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from datetime import timedelta
from email.message import Message
from urllib.parse import urlsplit, urlunsplit

import pytest

from granite_storage.backends.base import StorageBackend, SupportsPresign
from granite_storage.testing._cases.base import Cases, must_raise, same_bytes

__all__ = ["SignCases"]

MINUTE = timedelta(minutes=1)


class SignCases(Cases):
    """Signed URLs."""

    @pytest.mark.parametrize("location", ["signed", "a folder/it's 50% & more+\u00e9.txt"])
    async def test_signed_get(self, backend: StorageBackend, location: str) -> None:
        """A signed URL gives the object to anybody, whole or in ranges."""
        content = self.content("small")
        await backend.put_bytes(location, content)
        url = await self._signer(backend).presign_get(location, expires_in=MINUTE)
        status, body, _ = await request(url)
        assert status == 200, f"a GET of a signed URL answered {status}"
        same_bytes(body, content, "the body behind a signed URL")
        status, body, _ = await request(url, headers={"Range": "bytes=10-19"})
        assert status == 206, f"a GET of a range of a signed URL answered {status}"
        same_bytes(body, content[10:20], "a range behind a signed URL")

    async def test_signed_headers(self, backend: StorageBackend) -> None:
        """The answer carries the content type and disposition that were asked for."""
        await backend.put_bytes("headed", b"...", content_type="text/html")
        url = await self._signer(backend).presign_get(
            "headed", expires_in=MINUTE, content_type="text/plain", disposition='attachment; filename="a.txt"'
        )
        _, _, headers = await request(url)
        assert headers["Content-Type"] == "text/plain", f"the answer has the content type {headers['Content-Type']!r}"
        disposition = headers["Content-Disposition"]
        assert disposition == 'attachment; filename="a.txt"', f"the answer has the disposition {disposition!r}"

    async def test_signed_url_of_nothing(self, backend: StorageBackend) -> None:
        """A URL may be signed before the object is there; until then it answers 404."""
        url = await self._signer(backend).presign_get("later", expires_in=MINUTE)
        status, _, _ = await request(url)
        assert status == 404, f"a signed URL of a missing object answered {status}"
        await backend.put_bytes("later", b"now")
        status, body, _ = await request(url)
        assert (status, body) == (200, b"now"), f"a URL that was signed before its object was stored answered {status}"

    @pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
    async def test_signed_for_one_method(self, backend: StorageBackend, method: str) -> None:
        """A URL signed for reading neither writes nor deletes."""
        signer = self._signer(backend)
        self.needs("checks_signatures")
        await backend.put_bytes("readable", b"as it was")
        url = await signer.presign_get("readable", expires_in=MINUTE)
        status, _, _ = await request(url, method, b"changed" if method != "DELETE" else None)
        assert status >= 400, f"a {method} with a URL signed for GET answered {status}"
        await self.require_whole(backend, "readable", b"as it was", f"after a {method} with a URL signed for GET")

    @pytest.mark.parametrize("change", ["stripped", "another object", "another type", "longer life"])
    async def test_changed_url(self, backend: StorageBackend, change: str) -> None:
        """A signed URL that was changed is refused."""
        signer = self._signer(backend)
        self.needs("checks_signatures")
        await backend.put_bytes("signed", b"public")
        await backend.put_bytes("secret", b"private")
        url = await signer.presign_get("signed", expires_in=MINUTE, content_type="text/plain")
        status, _, _ = await request(_changed(url, change))
        assert status >= 400, f"a signed URL that was changed ({change}) answered {status}"

    async def test_expired_url(self, backend: StorageBackend) -> None:
        """A signed URL ends when it should."""
        signer = self._signer(backend)
        self.needs("checks_signatures")
        await backend.put_bytes("short", b"...")
        url = await signer.presign_get("short", expires_in=timedelta(seconds=1))
        await asyncio.sleep(2.1)
        status, _, _ = await request(url)
        assert status >= 400, f"an expired URL answered {status}"

    @pytest.mark.parametrize("seconds", [0, -1, -3600])
    async def test_impossible_expiry(self, backend: StorageBackend, seconds: int) -> None:
        """A URL that would never work is refused when it is asked for."""
        signer = self._signer(backend)
        with must_raise(ValueError, f"a URL that expires in {seconds} seconds must be refused"):
            await signer.presign_get("signed", expires_in=timedelta(seconds=seconds))

    def _signer(self, backend: StorageBackend) -> SupportsPresign:
        self.needs("supports_presign")
        assert isinstance(backend, SupportsPresign), "supports_presign is declared, but there is no presign_get()"
        return backend


async def request(
    url: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, bytes, Message]:
    """Make one HTTP request in a thread; return its status, body and headers."""
    return await asyncio.to_thread(_request, url, method, body, headers or {})


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
