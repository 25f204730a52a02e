"""What a browser may do on the gallery's pages, and who may change anything."""

from __future__ import annotations

import os

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OUR_OWN_HEADER = "x-gallery"

# Where a bucket is, if the page shall send files straight to it.
BUCKET_ORIGIN = os.environ.get("S3_ORIGIN", "")

HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
        f"connect-src 'self' {BUCKET_ORIGIN}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Gives every answer the headers above, unless it has its own, and refuses changes that another site's page asks for.

    A page of another site can send a form here, but no header of its own choice: the browser would ask us first, and is never
    told that it may.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        changes = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD")
        if changes and OUR_OWN_HEADER not in Headers(scope=scope):
            refusal = JSONResponse({"detail": f"A change needs the header {OUR_OWN_HEADER}."}, 403)
            await refusal(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)
