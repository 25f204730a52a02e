"""Presigned URLs of S3, signed at a fraction of the SDK's cost, because the SDK resolves everything again for each URL.

Which host, path, region and credentials a URL has is the SDK's to decide: an own endpoint, a style of addressing, an access point
and whatever an application has hooked into its client. So the SDK signs one URL for a key of its own, and `QuerySigner` learns
from that, if it signs the same itself, to the byte. Otherwise the SDK's signer signs every URL.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from functools import lru_cache
from typing import Protocol, Self
from urllib.parse import quote, urlsplit

from granite_storage._headers import url_path

__all__ = ["Credentials", "QuerySigner", "timestamp"]

_ALGORITHM = "AWS4-HMAC-SHA256"
_DAYS_KEPT = 8
_PORTS = {"http": 80, "https": 443}
_QUERY = re.compile(
    rf"X-Amz-Algorithm={_ALGORITHM}&X-Amz-Credential=[^&]+%2F[0-9]{{8}}%2F(?P<region>[^&%]+)%2F(?P<service>[^&%]+)%2Faws4_request"
    r"&X-Amz-Date=(?P<date>[0-9]{8}T[0-9]{6}Z)&X-Amz-Expires=(?P<expires>[0-9]+)&X-Amz-SignedHeaders=host&[^#]+"
)


class Credentials(Protocol):
    """The SDK's frozen credentials."""

    @property
    def access_key(self) -> str:
        """The id of the key."""
        ...

    @property
    def secret_key(self) -> str:
        """The key."""
        ...

    @property
    def token(self) -> str | None:
        """The session token of temporary credentials."""
        ...


class QuerySigner:
    """Signs URLs to read objects, as the SDK does for one client and bucket.

    Source: Amazon S3 API reference, "Authenticating requests: using query parameters (AWS signature version 4)".

    Args:
        root: What stands before the key of an object in a URL, the path's first part included.
        region: The region of the signature.
        service: The service of the signature.
    """

    def __init__(self, root: str, region: str, service: str) -> None:
        parts = urlsplit(root)
        self._root = root
        self._path = parts.path
        # The header Host, which is what is signed: without the scheme's own port, and in small letters.
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        is_usual = parts.port in (None, _PORTS.get(parts.scheme))
        self._host = f"{host}" if is_usual else f"{host}:{parts.port}"
        self._scope = f"{region}/{service}/aws4_request"
        self._region, self._service = region, service
        self._days: dict[tuple[str, str], bytes] = {}

    @classmethod
    def learn(cls, url: str, key: str, credentials: Credentials) -> Self | None:
        """Return a signer that signs as the SDK has signed a URL, for a key that needs no encoding; None if it would differ."""
        address, _, query = url.partition("?")
        found = _QUERY.fullmatch(query)
        if found is None or not address.endswith(f"/{key}"):
            return None
        signer = cls(address.removesuffix(key), found["region"], found["service"])
        return signer if signer.sign(key, credentials, found["date"], int(found["expires"])) == url else None

    def sign(
        self,
        key: str,
        credentials: Credentials,
        date: str,
        expires: int,
        content_type: str | None = None,
        disposition: str | None = None,
    ) -> str:
        """Return the URL of an object.

        Args:
            key: Its key in the bucket.
            credentials: What signs.
            date: From when on it works, as `timestamp` writes it.
            expires: How long, in seconds.
            content_type: The Content-Type that the answer shall carry.
            disposition: The Content-Disposition that the answer shall carry.
        """
        path = url_path(key)
        day = date[:8]
        signed = (
            f"X-Amz-Algorithm={_ALGORITHM}&X-Amz-Credential={quote(credentials.access_key, safe='~')}%2F{day}"
            f"%2F{self._region}%2F{self._service}%2Faws4_request&X-Amz-Date={date}&X-Amz-Expires={expires}"
        )
        token = "" if credentials.token is None else f"&X-Amz-Security-Token={quote(credentials.token, safe='~')}"
        kind = "" if content_type is None else f"response-content-type={_quoted_type(content_type)}"
        shown = "" if disposition is None else f"response-content-disposition={quote(disposition, safe='~')}"
        # The canonical query is sorted by name; the SDK's URL has what is asked of the answer first, and the token last.
        query = "&".join(filter(None, (f"{signed}{token}&X-Amz-SignedHeaders=host", shown, kind)))
        request = f"GET\n{self._path}{path}\n{query}\nhost:{self._host}\n\nhost\nUNSIGNED-PAYLOAD"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = f"{_ALGORITHM}\n{date}\n{day}/{self._scope}\n{digest}"
        signature = hmac.digest(self._key(credentials.secret_key, day), text.encode(), "sha256").hex()
        query = "&".join(filter(None, (kind, shown, f"{signed}&X-Amz-SignedHeaders=host{token}&X-Amz-Signature={signature}")))
        return f"{self._root}{path}?{query}"

    def _key(self, secret: str, day: str) -> bytes:
        """Return the key of a day, which is the same for all URLs of it."""
        key = self._days.get((secret, day))
        if key is None:
            key = f"AWS4{secret}".encode()
            for text in (day, self._region, self._service, "aws4_request"):
                key = hmac.digest(key, text.encode(), "sha256")
            if len(self._days) >= _DAYS_KEPT:
                self._days.clear()
            self._days[secret, day] = key
        return key


@lru_cache(maxsize=512)
def _quoted_type(content_type: str) -> str:
    return quote(content_type, safe="~")


@lru_cache(maxsize=512)
def timestamp(moment: int) -> str:
    """Return a time, in seconds since 1970, as signatures have it."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(moment))
