"""Hostile files, posted to every program of the README, the documentation and the examples: what they answer is harmless."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.web import INLINE_TYPES
from tests.docs.test_documents import DOCUMENTS, ROOT, bucket_server, database, evaluate, surroundings

__all__ = ["bucket_server", "database", "surroundings"]

MIB = 1 << 20
PAGE = b"<!doctype html><title>owned</title><script>alert(document.domain)</script>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(document.domain)</script></svg>'
XML = b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><script>alert(1)</script></html>'
ACTIVE = re.compile(r"html|xml|svg|script|css|wasm|multipart|flash")


@dataclass(frozen=True)
class File:
    """A file that somebody posts.

    Attributes:
        name: What it is called.
        kind: Its media type, as its sender says.
        content: Its bytes.
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
    """Check that a browser runs nothing of an answer, and that nothing of its sender's stands in its headers."""
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
    """A body that is longer than anything that is taken, and how much of it was read."""

    def __init__(self, head: bytes, size: int) -> None:
        self.head, self.size, self.read = head, size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.head
        while self.read < self.size:
            self.read += 65536
            yield bytes(65536)


async def post_too_large(client: httpx.AsyncClient, url: str, limit: int, *, form: bool = True, **options: Any) -> None:
    """Check that a file over the limit is refused with 413, and that not much more of it is read than the limit."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    offered = Offered(head if form else b"", limit + 64 * MIB)
    kind = "multipart/form-data; boundary=x" if form else "image/png"
    method = options.pop("method", "POST")
    answer = await client.request(method, url, content=offered, headers={"Content-Type": kind}, **options)
    assert answer.status_code == 413, answer.text
    require_harmless(answer)
    assert offered.read <= limit + MIB


def client_of(app: Any, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", **options)


def form_of(file: File) -> dict[str, Any]:
    return {"files": {"file": (file.name, file.content, file.kind)}}


async def readme(names: Mapping[str, Any]) -> None:
    app = names["app"]
    async with app.router.lifespan_context(app), client_of(app) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", params={"title": file.name[:50]}, **form_of(file)))
            if answer.is_success:
                url = f"/documents/{answer.json()['id']}/file"
                whole = require_harmless(await client.get(url))
                assert whole.content == file.content
                part = require_harmless(await client.get(url, headers={"Range": "bytes=0-0"}))
                assert (part.status_code, part.content) == (206, file.content[:1])
                assert (await client.delete(f"/documents/{answer.json()['id']}")).status_code == 204
        await post_too_large(client, "/documents", 50 * MIB, params={"title": "large"})
        assert (await client.delete("/documents/999999")).status_code == 404
        assert [path for path in Path("uploads/document").rglob("*") if path.is_file()] == []


async def stored(manager: StorageManager, file: File) -> StoredObjectRef:
    """Store a file, with a row that says of its type just what its sender said."""
    key = next(iter(manager.policies))
    ref = await manager.put_bytes(
        storage_key=key,
        model_name="document",
        entity_id="1",
        field_name="file",
        content=file.content,
        original_filename=file.name,
    )
    return replace(ref, content_type=file.kind or None)


async def serving(names: Mapping[str, Any]) -> None:
    namespace, kept = names, names["ref"]
    assert isinstance(namespace, dict)
    signing = names["signing"]
    async with client_of(names["app"]) as client, client_of(names["plain"]) as plain:
        for file in HOSTILE:
            namespace["ref"] = ref = await stored(names["manager"], file)
            for answer in (await client.get("/report"), await plain.get("/")):
                assert require_harmless(answer).content == file.content
            for disposition in ("inline", "attachment"):
                url = await signing.url(ref, expires_in=timedelta(minutes=1), disposition=disposition)
                assert require_harmless(await client.get(url)).content == file.content
    namespace["ref"] = kept


async def guide(names: Mapping[str, Any]) -> None:
    namespace, kept = names, names["ref"]
    assert isinstance(namespace, dict)
    async with client_of(Starlette(routes=[Route("/", names["download"])])) as client:
        for file in HOSTILE:
            namespace["ref"] = await stored(names["manager"], file)
            assert require_harmless(await client.get("/")).content == file.content
    namespace["ref"] = kept


async def receiving(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            for url, data in (("/documents", {"title": "a"}), ("/reports", {"kind": "report"}), ("/avatars", {})):
                require_harmless(await client.post(url, data=data, **form_of(file)))
            headers = {"Content-Type": file.kind}
            require_harmless(await client.put("/documents/a.html", content=file.content, headers=headers))
        await post_too_large(client, "/documents", 100 * MIB)
        await post_too_large(client, "/avatars", 3 * MIB)
        await post_too_large(client, "/documents/a.png", 100 * MIB, form=False, method="PUT")


async def direct(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"], headers={"X-User": "anna"}) as client:
        for file in HOSTILE:
            query = {"name": file.name, "type": file.kind, "size": len(file.content)}
            begun = require_harmless(await client.post("/documents/begin", params=query))
            if begun.is_success:
                upload = begun.json()
                assert (await client.put(upload["url"], content=file.content + b"x", headers=upload["headers"])).is_client_error
                assert (await client.put(upload["url"], content=file.content, headers=upload["headers"])).is_success
                require_harmless(await client.post("/documents", json={"token": upload["token"]}))
        query = {"name": "a", "type": "image/png", "size": 5 * 1024**3 + 1}
        assert require_harmless(await client.post("/documents/begin", params=query)).status_code == 413


async def streams(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            answer = await client.post("/", content=file.content, headers={"Content-Type": file.kind})
            assert set(require_harmless(answer).json()) == {"size", "checksum"}
        await post_too_large(client, "/", 1000, form=False)


async def attachments(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", **form_of(file)))
            assert "location" not in answer.text
        limit = names["storage"].policy("documents").max_size
        await post_too_large(client, "/documents", limit)


PROGRAMS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Coroutine[Any, Any, None]]]] = {
    "README.md": ("app = FastAPI(", readme),
    "docs/direct-uploads.md": ("stolen = ", direct),
    "docs/guide.md": ("async def download", guide),
    "docs/receiving.md": ("Content Too Large", receiving),
    "docs/serving.md": ("async def plain", serving),
    "docs/sqlalchemy.md": ("app = FastAPI(", attachments),
    "docs/streams.md": ("app = Starlette(", streams),
}
"""Where the programs of a document are complete, and what posts to them or asks them for hostile files."""

HARMLESS = {"docs/quickstart.md"}
"""Programs that take and show nothing."""

PROGRAM = re.compile(
    r"FastAPI\(|Starlette\(|Litestar\(|StoredObjectResponse\(|SignedFiles\(|DirectUploads\(|stream_(upload|body)\(|received_\w+\("
)
UNSAFE = re.compile(r"StreamingResponse|: UploadFile|FileResponse\(")


@pytest.mark.case("RE-08", "RB-21")
@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_documented_program(name: str, tmp_path: Path) -> None:
    marker, probe = PROGRAMS[name]
    document = Sybil(parsers=[CodeBlockParser("python", evaluate)]).parse(ROOT / name)
    document.namespace |= {"EXAMPLES": ROOT / "examples", "__name__": "__main__"}
    probed = False
    with asyncio.Runner() as runner:
        for example in document:
            example.evaluate()
            result = example.namespace.pop("__result__")
            if inspect.iscoroutine(result):
                runner.run(result)
            if not probed and marker in example.parsed:
                probed = True
                before = set(tmp_path.parent.iterdir())
                runner.run(probe(document.namespace))
                assert set(tmp_path.parent.iterdir()) == before
    assert probed
    assert not [path for path in tmp_path.rglob("*") if path.name in ("passwd", "evil", "boot.ini", "evil.html")]


def python_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))


def sources() -> Iterable[Path]:
    return [*DOCUMENTS, *sorted((ROOT / "examples").rglob("*.py"))]


def test_no_program_is_overlooked() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if PROGRAM.search(python_of(path))}
    gallery = {name for name in found if name.startswith("examples/gallery/")}
    assert found - gallery == set(PROGRAMS) | HARMLESS
    assert gallery  # it is posted to below


@pytest.mark.case("RE-08")
@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_safe_way_is_shown(path: Path) -> None:
    """No snippet sends a file without its headers, or lets a framework keep a whole upload before its size is looked at."""
    unsafe = [line for line in python_of(path).splitlines() if UNSAFE.search(line) and "STATIC" not in line and "->" not in line]
    allowed = ["from fastapi.responses import FileResponse", '@app.get("/", response_class=FileResponse)']
    assert [line for line in unsafe if line not in allowed] == []
