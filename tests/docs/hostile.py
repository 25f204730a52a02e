"""Hostile uploads, and the checks that a response to them is harmless."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from granite_storage.web import INLINE_TYPES

MIB = 1 << 20
PAGE = b"<!doctype html><title>owned</title><script>alert(document.domain)</script>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(document.domain)</script></svg>'
XML = b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>'
ACTIVE = re.compile(r"html|xml|svg|script|css|wasm|multipart|flash")


@dataclass(frozen=True)
class File:
    """An uploaded file.

    Attributes:
        name: The file name.
        kind: The media type that the client declares.
        content: The bytes.
    """

    name: str
    kind: str
    content: bytes


HOSTILE = [
    File("page.html", "text/html", PAGE),
    File("page.html", "TEXT/HTML; charset=utf-7", PAGE),
    File("image.svg", "image/svg+xml", SVG),
    File("page.xhtml", "application/xhtml+xml", XML),
    File("feed.xml", "text/xml", XML),
    File("script.js", "text/javascript", b"alert(document.domain)"),
    File("worker.js", "application/x-javascript", b"self.onfetch = () => {}"),
    File("style.css", "text/css", b"@import 'https://evil.example/'"),
    File("mixed", "multipart/x-mixed-replace; boundary=x", b"--x\r\nContent-Type: text/html\r\n\r\n" + PAGE),
    File("photo.png", "image/png", PAGE),
    File("photo.png", "image/png, text/html", PAGE),
    File("photo.gif", "image/gif", b"GIF89a/*" + b"\x00" * 30 + b"*/=alert(document.domain)//"),
    File("photo.jpg", "image/jpeg", b"\xff\xd8\xff\xe0" + PAGE),
    File("paper.pdf", "application/pdf", b"%PDF-1.7\n" + PAGE),
    File("paper.pdf", "application/pdf", PAGE + b"%PDF-1.7"),
    File("film.mp4", "video/mp4", PAGE),
    File("note.txt", "text/plain", PAGE),
    File("program.mp3", "audio/mpeg", b"MZ\x90\x00" + bytes(100)),
    File("unknown", "", PAGE),
    File("../../../etc/passwd", "text/plain", b"root::0:0::/:/bin/sh"),
    File("..\\..\\boot.ini", "text/plain", b"x"),
    File("/etc/cron.d/evil", "text/plain", b"* * * * * root id"),
    File("..", "text/plain", b"x"),
    File('a"; filename="evil.html', "image/png", PAGE),
    File("a\r\nSet-Cookie: owned=1\r\n\r\n<script>.txt", "text/plain", PAGE),
    File("<img src=x onerror=alert(1)>.png", "image/png", PAGE),
    File("invoice\u202egnp.exe", "application/octet-stream", b"MZ"),
    File("a\x00.png", "image/png", PAGE),
    File("\u00fc" * 2000 + ".html", "text/html", PAGE),
    File("odd", "text/html\t;" + "x" * 200, PAGE),
    File("long", "text/plain; x=" + "y" * 400, b"x"),
]


def require_harmless(answer: httpx.Response) -> httpx.Response:
    """Check that a browser runs nothing of a response, and that the client's input is not in its headers."""
    assert answer.status_code < 500, answer.text
    assert "set-cookie" not in answer.headers
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("application/json", "application/problem+json") or not answer.content:
        return answer
    assert not ACTIVE.search(kind), kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith("attachment") or (disposition.startswith("inline") and kind in INLINE_TYPES)
    name = disposition.partition("filename=")[2]
    assert not re.search(r"[\x00-\x1f/\\]", name.partition('";')[0])
    return answer


class Offered:
    """A body over every limit, which counts how much of it was read."""

    def __init__(self, head: bytes, size: int) -> None:
        self.head, self.size, self.read = head, size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.head
        while self.read < self.size:
            self.read += 65536
            yield bytes(65536)


async def post_too_large(
    client: httpx.AsyncClient,
    url: str,
    limit: int,
    *,
    form: bool = True,
    media_type: str = "image/png",
    begin: bytes = b"\x89PNG\r\n\x1a\n",
    **options: Any,
) -> None:
    """Check that a file over the limit gets a 413, and that hardly more than the limit is read."""
    head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\nContent-Type: {media_type}\r\n\r\n'.encode()
    offered = Offered((head if form else b"") + begin, limit + 64 * MIB)
    kind = "multipart/form-data; boundary=x" if form else media_type
    method = options.pop("method", "POST")
    answer = await client.request(method, url, content=offered, headers={"Content-Type": kind}, **options)
    assert answer.status_code == 413, answer.text
    require_harmless(answer)
    assert offered.read <= limit + MIB


def client_of(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", **options)


def form_of(file: File) -> dict[str, Any]:
    return {"files": {"file": (file.name, file.content, file.kind)}}
