"""Security headers for the pages, and a guard against requests from other sites."""

from __future__ import annotations

import os

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OUR_OWN_HEADER = "x-gallery"

# The origin of a bucket to which the page may send files directly.
BUCKET_ORIGIN = os.environ.get("S3_ORIGIN", "")

HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self'; media-src 'self'; "
        f"connect-src 'self' {BUCKET_ORIGIN}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Adds the headers above to responses, and refuses changes by pages of other sites.

    A page of another site can send a form here, but no custom header: the browser would
    send a preflight request, which is never allowed.
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
            refusal = JSONResponse(
                {"detail": f"A change needs the header {OUR_OWN_HEADER}."}, 403
            )
            await refusal(scope, receive, with_headers)
        else:
            await self.app(scope, receive, with_headers)
