"""URLs for objects of backends that sign none of their own, and the one place that decides who signs."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast
from urllib.parse import urlsplit

from granite_storage._headers import Disposition, content_disposition, require_disposition, served_type
from granite_storage._tokens import TokenSigner
from granite_storage.backends.base import StorageBackend, SupportsPresign
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError
from granite_storage.refs import StoredObjectRef

__all__ = ["SignedObject", "UrlSigner", "require_base_url", "signed_url"]

_PURPOSE = "granite-storage: url to read an object, version 1"
_BASE_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+(?:/[A-Za-z0-9._~-]+)*")
_LONGEST_LIFE = timedelta(days=7)
_REF_FIELDS = ("storage_key", "backend", "location", "size", "checksum", "content_type", "original_filename", "created_at")


@dataclass(frozen=True, slots=True)
class SignedObject:
    """What a signed URL grants: reading one object, shown in one way, until it expires.

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

    Everything that the answer depends on is in the URL and signed, with a key made for this one purpose, and so is the base URL:
    nothing can be changed, and a URL has exactly one form. What is signed can be read by whoever has the URL.

    Args:
        base_url: Where `SignedFiles` is mounted, as clients see it, such as `https://example.com/files`. URLs are built from it
            alone, never from what a request says of its host.
        keys: Secrets by their ids, of at least 32 bytes each. The first one signs; all are accepted. To rotate, put a new one
            first, and remove the old one when its URLs have expired.
        max_expires_in: The longest that a URL may work.

    Raises:
        ConfigurationError: An argument cannot work; no message shows a secret.

    Example:
        >>> import secrets
        >>> UrlSigner("https://example.com/files", keys={"2026-11": secrets.token_bytes(32)})
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
    ) -> str:
        """Return the URL; `StorageManager.url` is what applications call.

        Raises:
            ValueError: `expires_in` is less than a second or more than `max_expires_in`, or the disposition is not known.
        """
        require_disposition(disposition)
        if not timedelta(seconds=1) <= expires_in <= self.max_expires_in:
            raise ValueError(f"expires_in must be from one second to {self.max_expires_in}, not {expires_in}")
        claims = {name: value for name in _REF_FIELDS if (value := getattr(ref, name)) is not None}
        claims |= {"disposition": disposition, "expires": int(time.time() + expires_in.total_seconds())}
        if filename is not None:
            claims["filename"] = filename
        return f"{self.base_url}/{self._tokens.sign(claims)}"

    def verify(self, token: str) -> SignedObject | None:
        """Return what a token, the last segment of a URL, grants; None where it grants nothing, for whatever reason."""
        claims = self._tokens.read(token)
        signed = None if claims is None else _granted(claims)
        if signed is None or not 0 < signed.expires - time.time() <= self.max_expires_in.total_seconds():
            return None
        return signed

    def __repr__(self) -> str:
        return f"<UrlSigner {self.base_url} keys={self._tokens.key_ids}>"


async def signed_url(
    backend: StorageBackend,
    signer: UrlSigner | None,
    ref: StoredObjectRef,
    expires_in: timedelta,
    disposition: Disposition,
    filename: str | None,
) -> str:
    """Return a URL that the backend signs where it can, else the signer; see `StorageManager.url`."""
    if isinstance(backend, SupportsPresign):
        require_disposition(disposition)
        name = ref.original_filename if filename is None else filename
        return await backend.presign_get(
            ref.location,
            expires_in=expires_in,
            content_type=served_type(ref.content_type),
            disposition=content_disposition(disposition, name, ref.content_type),
        )
    if signer is None:
        raise ConfigurationError(f"the backend {ref.backend!r} signs no URLs: give the manager a url_signer")
    return signer.sign(ref, expires_in=expires_in, disposition=disposition, filename=filename)


def _granted(claims: Mapping[str, Any]) -> SignedObject | None:
    """Read what was signed, which is still checked: who shares a key may write it in another way."""
    try:
        disposition, filename, expires = claims["disposition"], claims.get("filename"), claims["expires"]
        require_disposition(disposition)
        if type(expires) is not int or not (filename is None or isinstance(filename, str)):
            return None
        return SignedObject(StoredObjectRef.from_dict(claims), cast(Disposition, disposition), filename, expires)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, InvalidReferenceError):
        return None


def require_base_url(base_url: object) -> str:
    """Return an absolute URL without a slash at its end, or raise `ConfigurationError`."""
    text = base_url.removesuffix("/") if isinstance(base_url, str) else ""
    try:
        named = bool(urlsplit(text).hostname) and urlsplit(text).port != 0
    except ValueError:
        named = False
    if not named or not _BASE_URL.fullmatch(text):
        raise ConfigurationError("base_url must be an absolute URL such as 'https://example.com/files', without query or user")
    return text
