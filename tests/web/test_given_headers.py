"""Headers that an application gives a response: they win in every answer and in every part of it, or are refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.web import StoredObjectResponse
from tests.web.serving import HUNDRED, ask, serving, stored

REQUEST = Request({"type": "http", "method": "GET", "headers": []})
LONG_AGO = "Sun, 06 Nov 1994 08:49:37 GMT"


@pytest.fixture
async def ref(manager: StorageManager) -> StoredObjectRef:
    return await stored(manager, HUNDRED * 10, "image/png", "a.png")


@pytest.mark.case("RD-02")
@pytest.mark.parametrize("name", ["Content-Type", "content-type", "CONTENT-TYPE"])
async def test_a_media_type_stands_in_every_part(manager: StorageManager, ref: StoredObjectRef, name: str) -> None:
    app = serving(manager, ref, headers={name: "application/x-ours"})
    assert (await ask(app)).headers["content-type"] == "application/x-ours"
    assert (await ask(app, range="bytes=0-9")).headers["content-type"] == "application/x-ours"
    several = await ask(app, range="bytes=0-9,500-509")
    assert several.headers["content-type"].startswith("multipart/byteranges; boundary=")
    assert several.content.count(b"Content-Type: application/x-ours\r\n") == 2
    assert b"image/png" not in several.content


@pytest.mark.case("RD-02")
async def test_a_media_type_that_is_set_later(manager: StorageManager, ref: StoredObjectRef) -> None:
    app = FastAPI()

    @app.get("/")
    async def file(request: Request) -> StoredObjectResponse:
        response = StoredObjectResponse(ref, request, manager=manager)
        response.headers["Content-Type"] = "application/x-ours"
        response.headers["ETag"] = '"ours"'
        return response

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        several = await client.get("/", headers={"Range": "bytes=0-9,500-509", "If-Range": '"ours"'})
        assert (several.status_code, several.headers["etag"]) == (206, '"ours"')
        assert several.content.count(b"Content-Type: application/x-ours\r\n") == 2


@pytest.mark.case("RD-02")
async def test_a_media_type_decides_how_it_is_shown(manager: StorageManager, ref: StoredObjectRef) -> None:
    shown = (await ask(serving(manager, ref, disposition="inline", headers={"Content-Type": "video/mp4"}))).headers
    assert shown["content-disposition"].startswith("inline")
    assert shown["content-security-policy"] == "default-src 'none'; media-src 'self'"
    page = (await ask(serving(manager, ref, disposition="inline", headers={"Content-Type": "text/html"}))).headers
    assert page["content-disposition"].startswith("attachment")
    assert page["content-security-policy"] == "sandbox; default-src 'none'"


@pytest.mark.case("RD-02")
@pytest.mark.parametrize("etag", ['"ours"', 'W/"ours"'])
async def test_an_entity_tag_is_what_conditions_are_compared_with(
    manager: StorageManager, ref: StoredObjectRef, etag: str
) -> None:
    app = serving(manager, ref, headers={"ETag": etag})
    whole = await ask(app)
    assert whole.headers.get_list("etag") == [etag]
    assert (await ask(app, if_none_match='"ours"')).status_code == 304
    own = f'"{ref.checksum.removeprefix("sha256:")}"'
    assert (await ask(app, if_none_match=own)).status_code == 200
    strong = not etag.startswith("W/")
    assert (await ask(app, if_match='"ours"')).status_code == (200 if strong else 412)
    assert (await ask(app, range="bytes=0-9", if_range=etag)).status_code == (206 if strong else 200)
    assert (await ask(app, range="bytes=0-9", if_range=own)).status_code == 200


@pytest.mark.case("RD-02")
async def test_a_date_is_what_conditions_are_compared_with(manager: StorageManager, ref: StoredObjectRef) -> None:
    app = serving(manager, ref, headers={"Last-Modified": LONG_AGO})
    assert (await ask(app)).headers["last-modified"] == LONG_AGO
    assert (await ask(app, if_modified_since=LONG_AGO)).status_code == 304
    assert (await ask(app, if_unmodified_since="Sun, 06 Nov 1994 08:49:36 GMT")).status_code == 412
    assert (await ask(app, range="bytes=0-9", if_range=LONG_AGO)).status_code == 206


@pytest.mark.case("RD-02")
@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"Content-Length": "5"}, "content-length"),
        ({"content-range": "bytes 0-1/2"}, "content-range"),
        ({"Accept-Ranges": "none"}, "accept-ranges"),
        ({"Transfer-Encoding": "chunked"}, "transfer-encoding"),
        ({"ETag": "unquoted"}, "ETag"),
        ({"ETag": '"a", "b"'}, "ETag"),
        ({"ETag": "*"}, "ETag"),
        ({"Last-Modified": "yesterday"}, "Last-Modified"),
        ({"Last-Modified": "2026-11-05"}, "Last-Modified"),
    ],
)
async def test_what_would_be_untrue_is_refused(
    manager: StorageManager, ref: StoredObjectRef, headers: dict[str, str], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        StoredObjectResponse(ref, REQUEST, manager=manager, headers=headers)
    later = StoredObjectResponse(ref, REQUEST, manager=manager)
    later.headers.update(headers)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await later(scope, receive, send)

    with pytest.raises(ValueError, match=why):
        await ask(app)


@pytest.mark.case("RD-02")
@pytest.mark.parametrize(
    ("request_headers", "status"),
    [
        ({}, 200),
        ({"range": "bytes=0-1"}, 206),
        ({"if_none_match": "*"}, 304),
        ({"if_match": '"x"'}, 412),
        ({"range": "bytes=9999-"}, 416),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
async def test_all_others_stand_in_every_answer(
    manager: StorageManager, ref: StoredObjectRef, request_headers: dict[str, str], status: int, missing: bool
) -> None:
    given = {
        "Access-Control-Allow-Origin": "https://example.com",
        "Content-Language": "de",
        "Vary": "Cookie",
        "X-Content-Type-Options": "ours",
        "Content-Security-Policy": "default-src 'self'",
        "Cache-Control": "public, max-age=60",
        "ETag": '"ours"',
    }
    if missing:
        await manager.delete(ref)
    response = await ask(serving(manager, ref, headers=given), **request_headers)
    assert response.status_code == (404 if missing else status)
    for name in ("Access-Control-Allow-Origin", "Vary", "X-Content-Type-Options", "Content-Security-Policy"):
        assert response.headers.get_list(name) == [given[name]]
    refused = response.status_code >= 400
    assert response.headers["cache-control"] == ("no-store" if refused else given["Cache-Control"])
    assert ("etag" in response.headers) is not missing
    assert ("content-language" in response.headers) is not missing


async def test_cookies_of_a_missing_object(manager: StorageManager, ref: StoredObjectRef) -> None:
    await manager.delete(ref)
    app = FastAPI()

    @app.get("/")
    async def file(request: Request) -> StoredObjectResponse:
        served = StoredObjectResponse(ref, request, manager=manager)
        served.set_cookie("one", "1")
        served.set_cookie("two", "2")
        return served

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.get("/")
    assert (answer.status_code, dict(answer.cookies)) == (404, {"one": "1", "two": "2"})
