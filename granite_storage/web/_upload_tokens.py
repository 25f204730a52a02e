"""The tokens of direct uploads, and the URLs that end in one."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Self, get_type_hints
from uuid import UUID

from starlette.types import Scope

from granite_storage.signing import TokenSigner

_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class UploadToken:
    """What a token of a direct upload says.

    Attributes:
        audience: The application that it is for.
        table: The table of the column that it is for.
        column: That column.
        backend: The key of the backend that the client uploads to.
        location: Where the client uploads to.
        content_type: The announced media type.
        filename: The announced name, cleaned.
        min_size: The fewest bytes.
        max_size: The most bytes.
        checksum: The announced checksum, or None.
        owner: Who may finish it, or None.
        intent: The id of the journal's intent, or None where there is no journal.
        expires: When the client may no longer begin to send, in seconds since 1970.
        ends: When it can no longer be finished.
    """

    audience: str
    table: str
    column: str
    backend: str
    location: str
    content_type: str
    filename: str | None
    min_size: int
    max_size: int
    checksum: str | None
    owner: str | None
    intent: str | None
    expires: int
    ends: int

    @classmethod
    def of(cls, claims: Mapping[str, Any]) -> Self | None:
        """Return the token of decoded claims; None where they are not valid."""
        sound = (
            claims.keys() == _CLAIMS.keys()
            and all(isinstance(claims[name], kind) and not isinstance(claims[name], bool) for name, kind in _CLAIMS.items())
            and claims["expires"] <= claims["ends"]
            and (claims["intent"] is None or _ID.fullmatch(claims["intent"]))
        )
        return cls(**claims) if sound else None

    @classmethod
    def read(cls, tokens: TokenSigner, token: object, longest: timedelta) -> Self | None:
        """Return what a signed token says; None where it is changed, expired, signed by another key, or lasts too long."""
        claims = tokens.read(token) if isinstance(token, str) else None
        upload_token = None if claims is None else cls.of(claims)
        if upload_token is None or not 0 < upload_token.ends - time.time() <= longest.total_seconds():
            return None
        return upload_token

    def sign(self, tokens: TokenSigner) -> str:
        """Return the signed text of the token."""
        return tokens.sign(asdict(self))

    @property
    def staging_id(self) -> UUID | None:
        """The id of the journal's intent."""
        return None if self.intent is None else UUID(self.intent)


_CLAIMS = get_type_hints(UploadToken)


# URLs that end in a token.


def path_below(scope: Scope) -> str:
    """Return the decoded path of a URL below the mount point, without the slash that begins it."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    below: str = path.removeprefix("/")
    raw: bytes = scope.get("raw_path") or path.encode()
    return below if raw.endswith(b"/") else below.removesuffix("/")  # Litestar ends every path that it hands on in a slash


def token_of(scope: Scope) -> str | None:
    """Return the only segment below the mount point; None where the URL is written otherwise than it was signed."""
    token = path_below(scope)
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    if scope.get("query_string") or not token.isascii() or not raw.endswith(f"/{token}".encode()):
        return None
    return token
