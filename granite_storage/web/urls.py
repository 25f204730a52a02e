"""Serving signed URLs."""

from __future__ import annotations

import logging
from collections.abc import Collection

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from granite_storage._headers import INLINE_TYPES, require_inline_types
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError, InvalidLocationError, UnknownBackendError
from granite_storage.manager import StorageManager
from granite_storage.signing import SignedObject
from granite_storage.web._upload_tokens import token_of
from granite_storage.web.errors import RETRY_AFTER
from granite_storage.web.responses import StoredObjectResponse, is_request, send_status

__all__ = ["SignedFiles"]

logger: logging.Logger = logging.getLogger("granite_storage")


class SignedFiles:
    """An ASGI application that serves the URLs that `StorageManager.url` signs; mount it at the signer's base URL.

    An invalid URL is answered with 403 before any storage is touched, whether it is expired, changed, cut, written otherwise,
    has a query, or was signed with a key that is gone. A valid one is answered as by `StoredObjectResponse`.

    Args:
        manager: The manager; it must have a `url_signer`.
        inline_types: The media types that may be shown inline where a URL allows it.

    Raises:
        ConfigurationError: The manager has no signer, or `inline_types` has one that must not be shown.

    Example:
        ```python
        app.mount("/files", SignedFiles(manager))
        ```
    """

    def __init__(self, manager: StorageManager, *, inline_types: Collection[str] = INLINE_TYPES) -> None:
        if manager.url_signer is None:
            raise ConfigurationError("the manager signs no URLs: pass url_signer= to StorageManager")
        self._manager = manager
        self._signer = manager.url_signer
        self._inline_types = require_inline_types(inline_types)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if not await is_request(scope, send, ("GET", "HEAD"), "SignedFiles"):
            return
        token = token_of(scope)
        signed = None if token is None else self._signer.verify(token)
        if signed is None:
            await send_status(send, 403)
            return
        await self._serve(signed, scope, receive, send)

    async def _serve(self, signed: SignedObject, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        response = StoredObjectResponse(
            signed.ref,
            Request(scope),
            manager=self._manager,
            disposition=signed.disposition,
            filename=signed.filename,
            inline_types=self._inline_types,
        )
        try:
            await response(scope, receive, noting)
        except (BackendUnavailableError, InvalidLocationError, UnknownBackendError) as error:
            if begun:
                raise
            logger.error("the object of a signed URL could not be served", exc_info=error)
            status, headers = _refusal(error)
            await send_status(send, status, headers)


def _refusal(error: BackendUnavailableError | InvalidLocationError | UnknownBackendError) -> tuple[int, list[tuple[str, str]]]:
    match error:
        case BackendUnavailableError():
            return 503, [("retry-after", str(RETRY_AFTER))]
        case UnknownBackendError():
            return 404, []
        case _:
            return 403, []
