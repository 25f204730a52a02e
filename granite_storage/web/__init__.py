"""Serving and receiving files over HTTP, on Starlette and so on FastAPI; the extra `web` brings what it needs."""

from granite_storage.exceptions import MissingDependencyError

try:
    import starlette as _starlette
except ImportError as error:
    raise MissingDependencyError("granite_storage.web needs Starlette: pip install 'granite-storage[web]'") from error

from granite_storage.web.responses import StoredObjectResponse
from granite_storage.web.urls import SignedFiles

__all__ = [
    "SignedFiles",
    "StoredObjectResponse",
]

del _starlette
