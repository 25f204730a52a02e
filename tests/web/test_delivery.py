"""How an object is shown to a browser, and what is answered where it cannot be."""

from __future__ import annotations

import logging
from dataclasses import replace
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.requests import Request

from granite_storage import ConfigurationError, StorageBackend, StorageManager, StoredObjectRef
from granite_storage._headers import INLINE_TYPES, content_disposition, served_type
from granite_storage.exceptions import InvalidReferenceError, SizeMismatchError, UnboundAttachmentError
from granite_storage.orm import Attachment, attachment, bind_storage
from granite_storage.web import StoredObjectResponse
from tests.core.support import manager_on
from tests.web.serving import HUNDRED, ask, parts_of, serving, stored


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "served_document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")


REQUEST = Request({"type": "http", "method": "GET", "headers": []})


async def test_every_backend(backend: StorageBackend) -> None:
    async with manager_on(backend) as manager:
        ref = await stored(manager, HUNDRED * 10_000, "image/png", "a.png")
        app = serving(manager, ref, verify=True)
        whole = await ask(app)
        assert (whole.status_code, whole.content) == (200, HUNDRED * 10_000)
        assert (await ask(app, range="bytes=500-1499")).content == (HUNDRED * 11)[:1000]
        several = parts_of(await ask(app, range="bytes=0-9,-10"))
        assert [body for _, body in several] == [HUNDRED[:10], HUNDRED[-10:]]
        head = await ask(app, "HEAD")
        assert (head.status_code, head.content, head.headers) == (200, b"", whole.headers)
        await manager.delete(ref)
        assert [(await ask(app, method)).status_code for method in ("GET", "HEAD")] == [404, 404]


@pytest.mark.case("HTP-17")
@pytest.mark.parametrize("content", [b"<html><script>", b"<svg xmlns=", b"<?xml version='1.0'?><html>", b"%PDF-1.7"])
async def test_a_disguise(manager: StorageManager, content: bytes) -> None:
    ref = await stored(manager, content, "image/png", "a.html")
    for disposition in ("attachment", "inline"):
        headers = (await ask(serving(manager, ref, disposition=disposition))).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert headers["content-type"] == "image/png"
        assert headers["content-disposition"] == f'{disposition}; filename="a.html"'


ACTIVE = [
    "text/html",
    "TEXT/HTML; charset=utf-8",
    "text/html ;x",
    "application/xhtml+xml",
    "image/svg+xml",
    "text/xml",
    "application/xml",
    "application/rss+xml",
    "text/xsl",
    "text/javascript",
    "application/x-javascript",
    "text/javascript1.5",
    "text/ecmascript",
    "text/css",
    "text/vbscript",
    "application/wasm",
    "application/x-shockwave-flash",
    "multipart/x-mixed-replace",
    "message/rfc822",
]
UNUSABLE = [None, "", "image", "image/png\r\nX: 1", "image/png\n", "image/p ng", "image/\u00e9", "a" * 200 + "/b", "*/*"]


@pytest.mark.case("HTP-17")
@pytest.mark.parametrize("content_type", [*ACTIVE, *UNUSABLE])
async def test_what_a_browser_could_run_is_only_bytes(manager: StorageManager, content_type: str | None) -> None:
    ref = replace(await stored(manager, b"alert(1)"), content_type=content_type)
    headers = (await ask(serving(manager, ref, disposition="inline"))).headers
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == "attachment"


@pytest.mark.parametrize("content_type", ["application/pdf", "image/tiff", "image/png-evil", "image/pngx", "application/json"])
def test_what_is_not_listed_is_an_attachment(content_type: str) -> None:
    assert served_type(content_type) == content_type
    assert content_disposition("inline", None, content_type) == "attachment"


@pytest.mark.parametrize("content_type", [*sorted(INLINE_TYPES - {"text/plain"}), "Image/PNG", "text/plain; charset=utf-8"])
def test_what_is_listed_may_be_inline(content_type: str) -> None:
    assert served_type(content_type) == content_type
    assert content_disposition("inline", None, content_type) == "inline"


def test_office_documents_keep_their_type() -> None:
    word = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    assert served_type(word) == word


async def test_other_inline_types(manager: StorageManager) -> None:
    ref = await stored(manager, b"%PDF", "application/pdf")
    app = serving(manager, ref, disposition="inline", inline_types={"application/PDF"})
    assert (await ask(app)).headers["content-disposition"] == "inline"
    for refused in ("text/html", "image/svg+xml", "nonsense", "text/plain; charset=utf-8"):
        with pytest.raises(ConfigurationError, match="must not be shown inline"):
            StoredObjectResponse(ref, REQUEST, manager=manager, inline_types=[refused])


NAMES = [
    ("report.pdf", 'attachment; filename="report.pdf"'),
    ("a b;c=d,e.txt", 'attachment; filename="a b;c=d,e.txt"'),
    ("\u00fcber.txt", "attachment; filename=\"_ber.txt\"; filename*=UTF-8''%C3%BCber.txt"),
    ("\u20ac rates", "attachment; filename=\"_ rates\"; filename*=UTF-8''%E2%82%AC%20rates"),
    ('a"b\\c.txt', 'attachment; filename="c.txt"'),
    ('a"b.txt', "attachment; filename=\"a_b.txt\"; filename*=UTF-8''a%22b.txt"),
    ("50%41.txt", "attachment; filename=\"50_41.txt\"; filename*=UTF-8''50%2541.txt"),
    ("../../etc/passwd", 'attachment; filename="passwd"'),
    ("a\r\nSet-Cookie: x=1.txt", 'attachment; filename="aSet-Cookie: x=1.txt"'),
    ("it's (1).txt", 'attachment; filename="it\'s (1).txt"'),
    ("\u00fc'(*).txt", "attachment; filename=\"_'(*).txt\"; filename*=UTF-8''%C3%BC%27%28%2A%29.txt"),
    ("\ud800.txt", "attachment; filename=\"_.txt\"; filename*=UTF-8''%EF%BF%BD.txt"),
    ("..", "attachment"),
    ("", "attachment"),
    (None, "attachment"),
]


@pytest.mark.parametrize(("name", "header"), NAMES, ids=[ascii(one[0]) for one in NAMES])
async def test_names(manager: StorageManager, name: str | None, header: str) -> None:
    ref = replace(await stored(manager, b""), original_filename=name)
    assert (await ask(serving(manager, ref))).headers["content-disposition"] == header
    if "*=" in header:
        encoded = header.partition("*=UTF-8''")[2]
        assert encoded.isascii()
        assert unquote(encoded) == (name or "").replace("\ud800", "\ufffd")


async def test_another_name(manager: StorageManager) -> None:
    ref = await stored(manager, b"", name="a.txt")
    assert (await ask(serving(manager, ref, filename="b.txt"))).headers["content-disposition"] == 'attachment; filename="b.txt"'


async def test_caching(manager: StorageManager) -> None:
    ref = await stored(manager, b"")
    shown = [
        (await ask(serving(manager, ref, **options))).headers["cache-control"]
        for options in (
            {},
            {"immutable": True},
            {"cache_control": "public, max-age=60"},
            {"headers": {"Cache-Control": "no-store"}},
        )
    ]
    assert shown == ["private, no-cache", "private, max-age=31536000, immutable", "public, max-age=60", "no-store"]


@pytest.mark.case("HTP-20")
@pytest.mark.parametrize(
    "headers", [{}, {"range": "bytes=0-0"}, {"range": "bytes=200-"}, {"if_none_match": "*"}, {"if_match": '"x"'}]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_missing_object(
    manager: StorageManager, method: str, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    ref = await stored(manager, HUNDRED, "image/png", "a.png")
    await manager.delete(ref)
    response = await ask(serving(manager, ref, immutable=True), method, **headers)
    assert (response.status_code, response.headers["cache-control"]) == (404, "no-store")
    assert response.text == ("Not Found" if method == "GET" else "")
    [record] = caplog.records
    assert (record.levelno, record.name) == (logging.ERROR, "granite_storage")
    assert ref.location in record.getMessage()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_object_of_another_size(manager: StorageManager, method: str) -> None:
    ref = await stored(manager, HUNDRED)
    for size in (99, 101):
        with pytest.raises(SizeMismatchError):
            await ask(serving(manager, replace(ref, size=size)), method)


async def test_what_cannot_be_served(manager: StorageManager) -> None:
    ref = await stored(manager, b"")
    with pytest.raises(ConfigurationError, match="manager="):
        StoredObjectResponse(ref, REQUEST)
    with pytest.raises(InvalidReferenceError):
        StoredObjectResponse(None, REQUEST, manager=manager)  # type: ignore[arg-type]
    with pytest.raises(UnboundAttachmentError):
        StoredObjectResponse(Attachment(b""), REQUEST, manager=manager)
    with pytest.raises(ValueError, match="disposition"):
        StoredObjectResponse(ref, REQUEST, manager=manager, disposition="form-data")  # type: ignore[arg-type]


async def test_an_attachment_knows_its_manager(manager: StorageManager) -> None:
    binding = bind_storage(Base, manager)
    try:
        file = await Attachment(HUNDRED, filename="a.png", content_type="image/png").store(Document.file)
        response = await ask(lambda scope, receive, send: StoredObjectResponse(file, Request(scope))(scope, receive, send))
    finally:
        binding.unbind()
    assert (response.status_code, response.content) == (200, HUNDRED)
    assert response.headers["content-disposition"] == 'attachment; filename="a.png"'


async def test_in_fastapi(manager: StorageManager) -> None:
    app = FastAPI()
    ref: StoredObjectRef = await stored(manager, HUNDRED, "image/png")

    @app.api_route("/file", methods=["GET", "HEAD"])
    async def file(request: Request) -> StoredObjectResponse:
        response = StoredObjectResponse(ref, request, manager=manager, headers={"Vary": "Cookie"})
        response.set_cookie("seen", "1")
        return response

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.get("/file", headers={"Range": "bytes=1-2"})
        assert (response.status_code, response.content) == (206, HUNDRED[1:3])
        assert (response.headers["vary"], response.cookies["seen"]) == ("Cookie", "1")
        assert (await client.head("/file")).headers["content-length"] == "100"
