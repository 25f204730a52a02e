"""URLs that end in a token, read in the one way that they are written in."""

from __future__ import annotations

from starlette.types import Scope

__all__ = ["token_of"]


def token_of(scope: Scope) -> str | None:
    """Return the only segment below where the application is mounted, if the URL is written in the one way it was signed in."""
    path, root = scope["path"], scope.get("root_path", "").rstrip("/")
    if root and path.startswith(f"{root}/"):
        path = path[len(root) :]
    raw: bytes = scope.get("raw_path") or path.encode()
    token: str = path.removeprefix("/")
    if not raw.endswith(b"/"):
        token = token.removesuffix("/")  # Litestar ends every path that it hands on in a slash
    if scope.get("query_string") or not token.isascii() or not raw.endswith(f"/{token}".encode()):
        return None
    return token
