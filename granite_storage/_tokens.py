"""Tokens: claims that anybody may read and nobody can change, written in exactly one way."""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Mapping
from typing import Any

from granite_storage.exceptions import ConfigurationError

__all__ = ["TokenSigner"]

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
        """Return the claims of a token; None where it is not one of ours, for whatever reason."""
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
        raise TypeError("what signs holds secrets and cannot be pickled")


def _claims(payload: str) -> dict[str, Any] | None:
    """Read what was signed, which is still checked: who shares a key may write it in another way."""
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
    """Return the key for this purpose, so that a signature made for another one is worth nothing here."""
    if not isinstance(key_id, str) or not _KEY_ID.fullmatch(key_id):
        raise ConfigurationError(f"the id of a key must be 1 to 32 letters, digits, '-' or '_', not {key_id!r}")
    material = secret.encode() if isinstance(secret, str) else secret
    if not isinstance(material, bytes) or len(material) < _LEAST_SECRET:
        raise ConfigurationError(f"the secret of the key {key_id!r} must be a string or bytes, of at least {_LEAST_SECRET} bytes")
    return hmac.digest(material, purpose.encode(), "sha256")
