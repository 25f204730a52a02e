"""URLs for objects of backends that sign none of their own, and the one place that decides who signs."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from granite_storage._documentation import Page
from granite_storage._headers import Disposition, content_disposition, require_base_url, require_disposition, served_type
from granite_storage._words import require_timedelta
from granite_storage.backends.base import PresignRequest, StorageBackend, SupportsBatchPresign, SupportsPresign
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError
from granite_storage.refs import StoredObjectRef, require_scanned

__all__ = ["SignedObject", "TokenSigner", "UrlSigner", "signed_urls"]


# Tokens: claims that anyone can read and no one can change, written in exactly one way.


_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,32}")
_TOKEN = re.compile(r"([A-Za-z0-9_-]{1,32})\.([A-Za-z0-9_-]{1,12000})\.([A-Za-z0-9_-]{43})")
_LEAST_SECRET = 32


class TokenSigner:
    """Signs claims for one purpose, and reads what it has signed.

    Args:
        purpose: What the tokens are for; a key of its own is derived for it, so that they are worth nothing elsewhere.
        keys: Secrets by their ids, of at least 32 bytes each. The first one signs; all are accepted.
        audience: What is signed with every token and stands in none, such as a base URL.

    Raises:
        ConfigurationError: The keys cannot work; no message shows a secret.
    """

    def __init__(self, purpose: str, keys: Mapping[str, str | bytes], *, audience: str = "") -> None:
        if not isinstance(keys, Mapping) or not keys:
            raise ConfigurationError("keys must be a mapping of ids to secrets, with at least one")
        self._keys = {key_id: _derived(key_id, secret, purpose) for key_id, secret in keys.items()}
        self._audience = audience

    @property
    def key_ids(self) -> list[str]:
        """The ids of the keys; the first one's signs."""
        return list(self._keys)

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Return the token of claims, which are JSON values."""
        return self._signed(next(iter(self._keys)), _encoded(_canonical(claims)))

    def read(self, token: str) -> dict[str, Any] | None:
        """Return the claims of a token; None if it is invalid, for whatever reason."""
        match = _TOKEN.fullmatch(token)
        if match is None or match[1] not in self._keys:
            return None
        if not hmac.compare_digest(self._signed(match[1], match[2]).encode(), token.encode()):
            return None
        return _claims(match[2])

    def _signed(self, key_id: str, payload: str) -> str:
        text = f"{key_id}.{payload}"
        digest = hmac.digest(self._keys[key_id], f"{self._audience}\n{text}".encode(), "sha256")
        return f"{text}.{_encoded(digest)}"

    def __repr__(self) -> str:
        return f"<TokenSigner keys={self.key_ids}>"

    def __reduce__(self) -> Any:
        raise TypeError("a signer holds secrets and cannot be pickled")


def _claims(payload: str) -> dict[str, Any] | None:
    """Parse what was signed, and check it all the same: another holder of the key may write it in another way."""
    try:
        content = base64.b64decode(payload + "=" * (-len(payload) % 4), altchars=b"-_", validate=True)
        claims = json.loads(content)
        return claims if isinstance(claims, dict) and _canonical(claims) == content else None
    except (ValueError, RecursionError):
        return None


def _canonical(claims: Mapping[str, Any]) -> bytes:
    return json.dumps(claims, sort_keys=True, separators=(",", ":")).encode()


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _derived(key_id: object, secret: object, purpose: str) -> bytes:
    """Return the key for this purpose, so that a signature for another purpose is invalid here."""
    if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
        raise ConfigurationError(f"the id of a key must be 1 to 32 letters, digits, '-' or '_', not {key_id!r}")
    material = secret.encode() if isinstance(secret, str) else secret
    if not isinstance(material, bytes) or len(material) < _LEAST_SECRET:
        raise ConfigurationError(f"the secret of the key {key_id!r} must be a string or bytes, of at least {_LEAST_SECRET} bytes")
    return hmac.digest(material, purpose.encode(), "sha256")


_PURPOSE = "granite-storage: url to read an object, version 1"
_LONGEST_LIFE = timedelta(days=7)
# How many URLs are signed in one turn of the event loop: about 2 ms.
_URLS_IN_A_TURN = 128
_REF_FIELDS = ("storage_key", "backend", "location", "size", "checksum", "content_type", "original_filename", "created_at")


@dataclass(frozen=True, slots=True)
class SignedObject:
    """The permission of a signed URL: to read one object, with one disposition, until it expires.

    Attributes:
        ref: The object.
        disposition: Whether it may be shown in the browser's window.
        filename: The name it is saved under; None for that of the ref.
        expires: When it ends, in seconds since 1970.
    """

    ref: StoredObjectRef
    disposition: Disposition
    filename: str | None
    expires: int


class UrlSigner:
    """Signs URLs that `granite_storage.web.SignedFiles` serves.

    The URL contains everything that the response depends on, and a signature over it and the base URL, with a key derived for
    this purpose only: nothing can be changed, and a URL has exactly one form. Anyone who has the URL can read its contents.

    Args:
        base_url: Where `SignedFiles` is mounted, as clients see it, such as `https://example.com/files`. URLs are built from it
            alone, never from the Host of a request.
        keys: Secrets by their ids, of at least 32 bytes each. The first one signs; all are accepted. To rotate, put a new one
            first, and remove the old one when its URLs have expired.
        max_expires_in: The longest that a URL may work.

    Raises:
        ConfigurationError: An argument is invalid; no message shows a secret.

    Example:
        >>> import secrets
        >>> keys = {"2026-11": secrets.token_bytes(32)}
        >>> UrlSigner("https://example.com/files", keys=keys)
        <UrlSigner https://example.com/files keys=['2026-11']>
    """

    def __init__(self, base_url: str, *, keys: Mapping[str, str | bytes], max_expires_in: timedelta = _LONGEST_LIFE) -> None:
        self.base_url: str = require_base_url(base_url)
        self.max_expires_in: timedelta = max_expires_in
        if not isinstance(max_expires_in, timedelta) or max_expires_in < timedelta(seconds=1):
            raise ConfigurationError(f"max_expires_in must be a timedelta of at least one second, not {max_expires_in!r}")
        self._tokens = TokenSigner(_PURPOSE, keys, audience=self.base_url)

    def sign(
        self,
        ref: StoredObjectRef,
        *,
        expires_in: timedelta,
        disposition: Disposition = "attachment",
        filename: str | None = None,
        stable_for: timedelta | None = None,
    ) -> str:
        """Return the URL; applications call `StorageManager.url`.

        Raises:
            ValueError: `expires_in` is less than a second, or more than `max_expires_in` together with `stable_for`, or the
                disposition is not known.
            ScanPendingError: A virus scanner has not scanned the object yet.
            InfectedObjectError: A virus scanner has found the object infected.
        """
        require_disposition(disposition)
        require_timedelta("expires_in", expires_in)
        if stable_for is not None:
            require_timedelta("stable_for", stable_for)
        require_scanned(ref)
        begin, life = _window(ref.location, expires_in, stable_for)
        if not timedelta(seconds=1) <= expires_in or life > self.max_expires_in:
            together = "" if stable_for is None else f", together with stable_for={stable_for}"
            raise ValueError(f"expires_in must be from one second to {self.max_expires_in}, not {expires_in}{together}")
        claims = {name: value for name in _REF_FIELDS if (value := getattr(ref, name)) is not None}
        claims |= {"disposition": disposition, "expires": int(begin + life.total_seconds())}
        if filename is not None:
            claims["filename"] = filename
        return f"{self.base_url}/{self._tokens.sign(claims)}"

    def verify(self, token: str) -> SignedObject | None:
        """Return the permission of a token, the last segment of a URL; None if it is invalid, for whatever reason."""
        claims = self._tokens.read(token)
        signed = None if claims is None else _granted(claims)
        if signed is None or not 0 < signed.expires - time.time() <= self.max_expires_in.total_seconds():
            return None
        return signed

    def __repr__(self) -> str:
        return f"<UrlSigner {self.base_url} keys={self._tokens.key_ids}>"


async def signed_urls(
    backend: StorageBackend,
    signer: UrlSigner | None,
    refs: Sequence[StoredObjectRef],
    *,
    expires_in: timedelta,
    disposition: Disposition,
    filename: str | None,
    stable_for: timedelta | None,
) -> Sequence[str]:
    """Return a URL for each ref to one backend, which signs them where it can, else the signer; see `StorageManager.url`."""
    require_disposition(disposition)
    for ref in refs:
        require_scanned(ref)
    if isinstance(backend, SupportsBatchPresign | SupportsPresign):
        requests = [_presign_request(ref, expires_in, disposition, filename, stable_for) for ref in refs]
        if isinstance(backend, SupportsBatchPresign):
            return await backend.presign_many(requests)
        if stable_for is not None:
            raise ConfigurationError(
                f"the backend {refs[0].backend!r} cannot sign stable URLs, because it has no presign_many(): omit stable_for"
            )
        return [
            await backend.presign_get(
                one.location, expires_in=one.expires_in, content_type=one.content_type, disposition=one.disposition
            )
            for one in requests
        ]
    if signer is None:
        raise ConfigurationError(
            f"the backend {refs[0].backend!r} cannot sign URLs: give the manager a url_signer", see=Page.SIGNED_URLS
        )
    urls: list[str] = []
    for ref in refs:
        urls.append(signer.sign(ref, expires_in=expires_in, disposition=disposition, filename=filename, stable_for=stable_for))
        if not len(urls) % _URLS_IN_A_TURN:
            await asyncio.sleep(0)
    return urls


def _presign_request(
    ref: StoredObjectRef, expires_in: timedelta, disposition: Disposition, filename: str | None, stable_for: timedelta | None
) -> PresignRequest:
    name = ref.original_filename if filename is None else filename
    begin, life = _window(ref.location, expires_in, stable_for)
    return PresignRequest(
        ref.location,
        life,
        served_type(ref.content_type),
        content_disposition(disposition, name, ref.content_type),
        None if stable_for is None else int(begin),
    )


def _window(location: str, expires_in: timedelta, stable_for: timedelta | None) -> tuple[float, timedelta]:
    """Return from when on a URL works, in seconds since 1970, and how long.

    Windows of `stable_for` follow each other without a gap, and begin at another time for each location, so that the URLs of a
    page do not all change at once. A URL works to the end of its window and `expires_in` after it.
    """
    now = time.time()
    if stable_for is None:
        return now, expires_in
    length = int(stable_for.total_seconds())
    if length < 1:
        raise ValueError(f"stable_for must be at least one second, not {stable_for}")
    try:
        life = expires_in + timedelta(seconds=length)
    except OverflowError:
        raise ValueError(f"expires_in and stable_for are too long together: {expires_in}, {stable_for}") from None
    offset = zlib.crc32(location.encode()) % length
    return (int(now) - offset) // length * length + offset, life


def _granted(claims: Mapping[str, Any]) -> SignedObject | None:
    """Parse what was signed, and check it all the same: another holder of the key may write it in another way."""
    try:
        disposition, filename, expires = claims["disposition"], claims.get("filename"), claims["expires"]
        require_disposition(disposition)
        if type(expires) is not int or not (filename is None or isinstance(filename, str)):
            return None
        return SignedObject(StoredObjectRef.from_dict(claims), cast(Disposition, disposition), filename, expires)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, InvalidReferenceError):
        return None
