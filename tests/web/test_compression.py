"""Compressors around an application: no range of an object is compressed, and a strong validator is never one of other bytes."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from litestar import Litestar, Request, get
from litestar.config.compression import CompressionConfig
from litestar.types import ASGIApp as LitestarApp
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from granite_storage import StorageManager
from granite_storage.web import StoredObjectResponse
from tests.web.serving import ask, serving, stored

CONTENT = b"All is well. " * 1000


class EagerGZip:
    """Compresses whatever has no Content-Encoding, also ranges, and leaves the validators alone, as Starlette did before 1.5."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "gzip" not in Headers(scope=scope).get("accept-encoding", ""):
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, keep)
        headers = MutableHeaders(raw=messages[0]["headers"])
        body = b"".join(message["body"] for message in messages[1:])
        if "content-encoding" not in headers:
            body = gzip.compress(body)
            headers.update({"content-encoding": "gzip", "content-length": str(len(body))})
        await send(messages[0])
        await send({"type": "http.response.body", "body": body})


COMPRESSORS: dict[str, Callable[[ASGIApp], ASGIApp]] = {
    "starlette": lambda app: GZipMiddleware(app, minimum_size=0),
    "eager": EagerGZip,
}


def require_sound(response: httpx.Response, start: int, stop: int) -> None:
    """Check that the bytes are those of the object, or compressed as a whole and under a weak validator."""
    assert response.content == CONTENT[start:stop]  # httpx has taken the coding off
    coded = response.headers.get("content-encoding", "identity") != "identity"
    assert not (coded and response.status_code == 206)
    assert not coded or response.headers["etag"].startswith("W/")


@pytest.mark.case("RB-13")
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("accepted", ["gzip", "gzip, deflate, br, zstd", "identity;q=0.5, *;q=0"])
async def test_nothing_is_compressed(manager: StorageManager, compressor: str, accepted: str) -> None:
    app = COMPRESSORS[compressor](serving(manager, await stored(manager, CONTENT, "text/plain")))
    whole = await ask(app, accept_encoding=accepted)
    require_sound(whole, 0, len(CONTENT))
    assert int(whole.headers["content-length"]) == len(CONTENT)
    part = await ask(app, accept_encoding=accepted, range="bytes=100-999", if_range=whole.headers["etag"])
    assert (part.status_code, part.headers["content-range"]) == (206, f"bytes 100-999/{len(CONTENT)}")
    require_sound(part, 100, 1000)
    several = await ask(app, accept_encoding=accepted, range="bytes=0-9,5000-5009")
    assert (several.status_code, several.headers.get("content-encoding")) == (206, "identity")
    again = await ask(app, accept_encoding=accepted, if_none_match=whole.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    head = await ask(app, "HEAD", accept_encoding=accepted)
    assert head.headers == whole.headers


@pytest.mark.case("RB-13")
async def test_clients_that_take_no_codings_hear_of_none(manager: StorageManager) -> None:
    app = serving(manager, await stored(manager, CONTENT, "text/plain"))
    for accepted in ("", "identity"):
        for method in ("GET", "HEAD"):
            assert "content-encoding" not in (await ask(app, method, accept_encoding=accepted)).headers
    answers = [
        await ask(app, accept_encoding="gzip", **headers) for headers in ({"range": "bytes=90000-"}, {"if_none_match": "*"})
    ]
    assert [(answer.status_code, "content-encoding" in answer.headers) for answer in answers] == [(416, False), (304, False)]


@pytest.mark.case("RB-13")
async def test_what_was_stored_compressed(manager: StorageManager) -> None:
    """The application says so, and ranges are then of the compressed bytes, as RFC 9110 has it."""
    coded = gzip.compress(CONTENT)
    app = EagerGZip(serving(manager, await stored(manager, coded, "text/plain"), headers={"Content-Encoding": "gzip"}))
    whole = await ask(app, accept_encoding="gzip")
    assert (whole.content, whole.headers["content-length"]) == (CONTENT, str(len(coded)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        asked = {"Range": "bytes=0-9", "Accept-Encoding": "gzip"}
        async with client.stream("GET", "http://files.example/", headers=asked) as part:
            assert (part.status_code, b"".join([chunk async for chunk in part.aiter_raw()])) == (206, coded[:10])


@pytest.mark.case("RB-13")
@pytest.mark.parametrize("excluded", [False, True])
async def test_litestar_compresses_whatever_it_gets(manager: StorageManager, excluded: bool) -> None:
    """So ranges are off and the validator is weak, except where the route is excluded from the compression."""
    ref = await stored(manager, CONTENT, "text/plain")

    @get("/", opt={"as_it_is": excluded})
    async def file(request: Request[Any, Any, Any]) -> LitestarApp:
        return StoredObjectResponse(ref, HTTPConnection(request.scope), manager=manager)

    config = CompressionConfig(backend="gzip", minimum_size=1, exclude_opt_key="as_it_is")
    app = Litestar([file], compression_config=config, openapi_config=None, logging_config=None)
    whole = await ask(app, accept_encoding="gzip")  # type: ignore[arg-type]
    require_sound(whole, 0, len(CONTENT))
    assert whole.headers["accept-ranges"] == ("bytes" if excluded else "none")
    part = await ask(app, accept_encoding="gzip", range="bytes=100-999")  # type: ignore[arg-type]
    require_sound(part, *((100, 1000) if excluded else (0, len(CONTENT))))
    assert part.status_code == (206 if excluded else 200)
    again = await ask(app, accept_encoding="gzip", if_none_match=whole.headers["etag"])  # type: ignore[arg-type]
    assert again.status_code == 304
    plain = await ask(app, accept_encoding="identity", range="bytes=100-999")  # type: ignore[arg-type]
    assert (plain.status_code, plain.content) == (206, CONTENT[100:1000])
