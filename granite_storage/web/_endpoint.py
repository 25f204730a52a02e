"""Where clients send direct uploads to, for backends that sign no requests of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from granite_storage._engine import ObjectDraft
from granite_storage.exceptions import ObjectExistsError, StorageError
from granite_storage.manager import StorageManager
from granite_storage.web._body import body_of, declared_size, require_whole_body
from granite_storage.web._paths import token_of
from granite_storage.web._sending import send_departed, send_status
from granite_storage.web._upload_tokens import Ticket, Tickets
from granite_storage.web.errors import problem_response
from granite_storage.web.exceptions import RequestError, UnsupportedRequestError, UploadMismatchError, UploadTokenError
from granite_storage.web.limits import UploadLimits

__all__ = ["UploadEndpoint"]


class _ReceivedAlreadyError(RequestError):
    """What the URL was signed for is there: nothing that is sent later is kept."""

    status = 409


class UploadEndpoint:
    """An ASGI application that stores what clients send to the URLs that were signed for them.

    Args:
        manager: Who stores it.
        tickets: What the URLs are signed with.
        draft_of: Says what a ticket lets a client store; raises `UploadTokenError` where nothing.
    """

    def __init__(self, manager: StorageManager, tickets: Tickets, draft_of: Callable[[Ticket], ObjectDraft]) -> None:
        self._manager = manager
        self._tickets = tickets
        self._draft_of = draft_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            raise ValueError(f"DirectUploads serves HTTP, not {scope['type']!r}")
        if scope["method"] != "PUT":
            await send_status(send, 405, [("allow", "PUT")])
            return
        response = await self._answer(Request(scope, receive))
        if response is None:
            await send_departed(send)
        else:
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """Store what the request brings, and return the answer; None where the client has gone away."""
        try:
            token = token_of(request.scope)
            ticket = None if token is None else self._tickets.read(token)
            if ticket is None or ticket.expires <= time.time():
                raise UploadTokenError("the URL is not valid, or has expired")
            await self._store(request, ticket)
        except ClientDisconnect:
            return None
        except StorageError as error:
            return problem_response(error)
        return Response(status_code=204, headers={"Cache-Control": "no-store"})

    async def _store(self, request: Request, ticket: Ticket) -> None:
        """Store a body as it arrives, if it is what was announced and has arrived before it could no longer be finished."""
        draft, limits = self._draft_of(ticket), UploadLimits(max_size=ticket.max_size)
        if request.headers.get("content-type") != ticket.content_type:
            raise UnsupportedRequestError("the Content-Type is not the one that was announced")
        require_whole_body(request, limits)
        _require_least(declared_size(request), ticket.min_size)
        time_left = asyncio.timeout(ticket.ends - time.time())
        try:
            async with time_left, aclosing(body_of(request, limits)) as body, aclosing(_whole(body, ticket.min_size)) as content:
                await self._manager.put_draft(draft, content)
        except ObjectExistsError as error:
            message = "the file was received already, so the upload is complete and this request was not needed: finish it"
            raise _ReceivedAlreadyError(message) from error
        except TimeoutError as error:
            if not time_left.expired():
                raise
            raise UploadTokenError("the time for this upload is over") from error


async def _whole(body: AsyncIterator[bytes], min_size: int) -> AsyncGenerator[bytes, None]:
    """Pass a body on, and raise at its end where there is too little of it: nothing is kept of it then."""
    size = 0
    async for chunk in body:
        size += len(chunk)
        yield chunk
    _require_least(size, min_size)


def _require_least(size: int | None, min_size: int) -> None:
    if size is not None and size < min_size:
        raise UploadMismatchError("the file is smaller than was announced")
