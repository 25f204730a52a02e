"""Every route of the gallery, over HTTP and on a real disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gallery.conftest import MAX_SIZE
from tests.gallery.support import stored
from tests.inspection.corpus import content_of
from tests.inspection.support import png

STATIC = Path(__file__).parents[2] / "examples" / "gallery" / "static"
TEXT = {"content-type": "text/plain"}
PNG = {"content-type": "image/png"}


async def upload(client: httpx.AsyncClient, name: str = "a.txt", content: bytes = b"abc", kind: str = "text/plain") -> Any:
    answer = await client.post("/items", params={"name": name}, content=content, headers={"content-type": kind})
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_upload_list_show_replace_delete(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = png() + bytes(range(256)) * 1000
    item = await upload(client, "jährlich.png", content, "image/png")
    assert set(item) == {"id", "file", "thumb", "preview"}
    assert item["file"] == {
        "size": len(content),
        "content_type": "image/png",
        "original_filename": "jährlich.png",
        "checksum": f"sha256:{hashlib.sha256(content).hexdigest()}",
    }
    assert content in stored(tmp_path).values()
    assert (await client.get("/items")).json() == [item]

    url = f"/items/{item['id']}/file"
    shown = await client.get(url)
    assert (shown.content, shown.headers["content-type"]) == (content, "image/png")
    assert shown.headers["content-disposition"].startswith("inline;")
    assert (await client.get(url, params={"download": True})).headers["content-disposition"].startswith("attachment;")
    part = await client.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    head = await client.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(content)), b"")

    replaced = (await client.put(url, params={"name": "new.txt"}, content=b"new", headers=TEXT)).json()
    assert (replaced["id"], replaced["file"]["original_filename"]) == (item["id"], "new.txt")
    assert (await client.get(url)).content == b"new"
    assert list(stored(tmp_path).values()) == [b"new"]

    assert (await client.delete(f"/items/{item['id']}")).status_code == 204
    assert stored(tmp_path) == {}
    assert (await client.get("/items")).json() == []
    assert [(await client.get(url)).status_code, (await client.delete(f"/items/{item['id']}")).status_code] == [404, 404]


async def test_the_newest_come_first_in_pages(client: httpx.AsyncClient) -> None:
    made = [(await upload(client, f"{number}.txt"))["id"] for number in range(5)]
    first = (await client.get("/items", params={"limit": 3})).json()
    second = (await client.get("/items", params={"limit": 3, "before": first[-1]["id"]})).json()
    assert [item["id"] for item in first + second] == made[::-1]
    assert (await client.get("/items", params={"limit": 101})).status_code == 422


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in chunks"])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
async def test_what_is_too_large_changes_nothing(
    client: httpx.AsyncClient, tmp_path: Path, declared: bool, replacing: bool
) -> None:
    item = await upload(client)
    before = stored(tmp_path)
    read: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            read.append(100_000)
            yield png() + bytes(100_000)

    method, url = ("PUT", f"/items/{item['id']}/file") if replacing else ("POST", "/items")
    headers = PNG | ({"content-length": "2000000"} if declared else {})
    answer = await client.request(method, url, content=chunks(), headers=headers)
    assert (answer.status_code, answer.json()["max_size"]) == (413, MAX_SIZE)
    assert bool(read) != declared
    assert (await client.get("/items")).json() == [item]
    assert stored(tmp_path) == before


@pytest.mark.parametrize("kind", ["text/html", "application/javascript", "", "application/octet-stream", "text/plainer"])
async def test_what_is_nothing_for_a_gallery_is_not_read(client: httpx.AsyncClient, tmp_path: Path, kind: str) -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"abc")
        yield b"abc"

    answer = await client.post("/items", content=body(), headers={"content-type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (415, "application/problem+json")
    assert answer.json()["detail"] == "The gallery takes pictures, films, sound, plain text, PDF and ZIP."
    assert stored(tmp_path) == {}


async def test_a_replacement_for_nothing_is_taken_back(client: httpx.AsyncClient, tmp_path: Path) -> None:
    assert (await client.put("/items/7/file", content=b"abc", headers=TEXT)).status_code == 404
    assert stored(tmp_path) == {}
    for impossible in ("0", "-1", str(2**31), "9" * 30, "x"):
        assert (await client.get(f"/items/{impossible}/file")).status_code == 422


async def test_an_upload_that_breaks_off_leaves_nothing(client: httpx.AsyncClient, tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield png() + bytes(65536)
        raise ConnectionResetError("the visitor went away")

    with pytest.raises(ConnectionResetError):
        await client.post("/items", content=body(), headers=PNG)
    assert stored(tmp_path) == {}
    assert (await client.get("/items")).json() == []


async def test_a_missing_object_is_a_404(client: httpx.AsyncClient, tmp_path: Path) -> None:
    item = await upload(client)
    for path in (tmp_path / "data" / "files" / "gallery").rglob("*.txt"):
        path.unlink()
    assert (await client.get(f"/items/{item['id']}/file")).status_code == 404


@pytest.mark.parametrize(
    ("kind", "content"), [("application/pdf", content_of("page.pdf")), ("image/tiff", content_of("picture.tiff"))]
)
async def test_what_is_not_safe_in_a_window_is_saved(client: httpx.AsyncClient, kind: str, content: bytes) -> None:
    item = await upload(client, "x.svg", content, kind)
    answer = await client.get(f"/items/{item['id']}/file")
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"].startswith("attachment;")
    assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert kind not in (await client.get("/settings")).json()["shown"]


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"<svg onload='alert(1)'/>", 415, "The file is an image (image/svg+xml)"),
        (b"<html><script>alert(1)</script>", 415, "The file is text (text/html)"),
        (b"MZ" + bytes(100), 415, "The file is a program"),
        (png(65_500, 65_500), 422, "The image has 65500 x 65500 pixels"),
        (png()[:20], 422, "The size of the image cannot be read"),
    ],
)
@pytest.mark.parametrize("directly", [False, True], ids=["posted", "directly"])
async def test_what_is_none_of_it_by_its_content(
    client: httpx.AsyncClient, tmp_path: Path, directly: bool, content: bytes, status: int, words: str
) -> None:
    """Whatever is declared; and nothing of it hangs in the gallery."""
    if directly:
        begun_upload = (await begun(client, content, "image/png", "a.png")).json()
        await sent(client, begun_upload, content)
        answer = await client.post("/direct/finish", json={"token": begun_upload["token"]})
    else:
        answer = await client.post("/items", params={"name": "a.png"}, content=content, headers=PNG)
        assert stored(tmp_path) == {}
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["detail"].startswith(words)
    assert (await client.get("/items")).json() == []


async def test_a_renamed_picture_is_shown_as_what_it_is(client: httpx.AsyncClient) -> None:
    item = await upload(client, "a.jpg", png(), "image/jpeg")
    assert (item["file"]["content_type"], item["file"]["original_filename"]) == ("image/png", "a.jpg.png")


async def test_hostile_names_are_labels(client: httpx.AsyncClient, tmp_path: Path) -> None:
    for given, kept in [
        ("<img src=x onerror=alert(1)>.txt", "<img src=x onerror=alert(1)>.txt"),
        ("invoice\u202egnp.txt", "invoicegnp.txt"),
        ("../../etc/passwd", "passwd"),
    ]:
        assert (await upload(client, given))["file"]["original_filename"] == kept
    assert len(stored(tmp_path)) == 3
    assert not [name for name in stored(tmp_path) if set("<>\u202e") & set(name)]


CHANGES = [
    ("POST", "/items?name=a.txt"),
    ("PUT", "/items/1/file"),
    ("DELETE", "/items/1"),
    ("POST", "/rollback?fail=false"),
    ("POST", "/direct/begin"),
    ("POST", "/direct/finish"),
    ("PUT", "/uploads/x"),
]


@pytest.mark.parametrize(("method", "url"), CHANGES, ids=[f"{method} {url}" for method, url in CHANGES])
async def test_a_page_of_another_site_changes_nothing(client: httpx.AsyncClient, tmp_path: Path, method: str, url: str) -> None:
    item = await upload(client)
    before = stored(tmp_path), stored(tmp_path, "notes")
    del client.headers["X-Gallery"]
    answer = await client.request(method, url, content=b"abc", headers={**TEXT, "origin": "http://evil.example"})
    assert answer.status_code == 403
    assert (stored(tmp_path), stored(tmp_path, "notes")) == before
    assert (await client.get("/items")).json() == [item]
    asked = await client.options(url, headers={"origin": "http://evil.example", "access-control-request-method": method})
    assert "access-control-allow-origin" not in asked.headers


async def test_a_name_that_leads_here_is_not_enough(client: httpx.AsyncClient) -> None:
    assert (await client.get("/items", headers={"host": "evil.example"})).status_code == 400


@pytest.mark.parametrize(
    "url", ["/", "/rollback", "/items", "/static/gallery.js", "/static/style.css", "/nothing", "/items/1/file"]
)
async def test_every_answer_says_what_may_run(client: httpx.AsyncClient, url: str) -> None:
    answer = await client.get(url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_no_path_redirects_elsewhere(client: httpx.AsyncClient) -> None:
    for url in ("//evil.example", "//evil.example/", "/items/", "/static//evil.example/..", "/%2f%2fevil.example/"):
        answer = await client.get(f"http://127.0.0.1{url}")
        assert "evil" not in answer.headers.get("location", "").partition("127.0.0.1")[0]
        assert answer.headers.get("location", "http://127.0.0.1/").startswith("http://127.0.0.1/")


@pytest.mark.parametrize("page", ["gallery.html", "rollback.html"])
def test_pages_have_nothing_inline_and_nothing_from_elsewhere(page: str) -> None:
    text = (STATIC / page).read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=\"/static/)|<style|\son\w+=|\sstyle=|https?://|javascript:", text)
    for script in STATIC.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", script.read_text("utf-8")
        )


def found(tmp_path: Path) -> list[dict[str, Any]]:
    return [{"name": name, "size": len(content)} for name, content in sorted(stored(tmp_path, "notes").items())]


def in_order(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(files, key=lambda file: file["name"])


async def test_what_a_rollback_did(client: httpx.AsyncClient, tmp_path: Path) -> None:
    present = (await client.get("/rollback/state")).json()
    contents = stored(tmp_path, "notes")
    told = (await client.post("/rollback", params={"fail": True})).json()
    assert told["before"] == told["after"] == present
    assert "UNIQUE" in told["error"]
    assert in_order(told["after"]["files"]) == found(tmp_path)
    assert stored(tmp_path, "notes") == contents
    assert [len(told[moment]["files"]) for moment in ("before", "during", "after")] == [2, 4, 2]
    assert {row["title"] for row in told["during"]["rows"]} == {"note-1", "note-3"}


async def test_what_a_commit_did(client: httpx.AsyncClient, tmp_path: Path) -> None:
    for version in (2, 3, 4):
        told = (await client.post("/rollback", params={"fail": False})).json()
        assert told["error"] is None
        assert told["after"]["rows"] == told["during"]["rows"]
        assert {row["title"] for row in told["after"]["rows"]} == {"note-1", f"note-{version + 1}"}
        assert {row["file"] for row in told["after"]["rows"]} == {file["name"] for file in told["after"]["files"]}
        assert not {file["name"] for file in told["after"]["files"]} & {file["name"] for file in told["before"]["files"]}
        assert in_order(told["after"]["files"]) == found(tmp_path)
        assert any(b"note-1 in version %d" % version in content for content in stored(tmp_path, "notes").values())


async def test_experiments_at_the_same_time_do_not_mix(client: httpx.AsyncClient, tmp_path: Path) -> None:
    runs = [client.post("/rollback", params={"fail": number % 2}) for number in range(6)]
    for number, answer in enumerate(await asyncio.gather(*runs)):
        told = answer.json()
        assert bool(told["error"]) == bool(number % 2)
        assert [len(told[moment]["files"]) for moment in ("before", "during", "after")] == [2, 4, 2]
    assert len(found(tmp_path)) == 2


async def begun(client: httpx.AsyncClient, content: bytes, kind: str = "text/plain", name: str = "a.txt") -> httpx.Response:
    return await client.post("/direct/begin", json={"name": name, "type": kind, "size": len(content)})


async def sent(client: httpx.AsyncClient, upload: dict[str, Any], content: bytes) -> httpx.Response:
    return await client.request(upload["method"], upload["url"], content=content, headers=upload["headers"])


async def test_a_direct_upload(client: httpx.AsyncClient) -> None:
    content = content_of("film.mkv") + bytes(range(256)) * 1000
    upload = (await begun(client, content, "video/x-matroska", "a film.mkv")).json()
    assert upload["url"].startswith("/uploads/")
    assert (await client.get("/items")).json() == []
    assert (await sent(client, upload, content)).status_code == 204
    assert (await client.get("/items")).json() == []
    answer = await client.post("/direct/finish", json={"token": upload["token"]})
    assert answer.status_code == 201
    item = answer.json()
    assert item["file"] == {
        "size": len(content),
        "content_type": "video/x-matroska",
        "original_filename": "a film.mkv",
        "checksum": f"sha256:{hashlib.sha256(content).hexdigest()}",
    }
    assert (await client.get("/items")).json() == [item]
    assert (await client.get(f"/items/{item['id']}/file")).content == content
    changed = await sent(client, upload, content[::-1])
    assert changed.status_code != 500
    assert (await client.get(f"/items/{item['id']}/file")).content == content


async def test_what_was_sent_directly_is_collected_by_and_by(gallery: Any, client: httpx.AsyncClient, tmp_path: Path) -> None:
    upload = (await begun(client, b"abc")).json()
    await sent(client, upload, b"abc")
    item = (await client.post("/direct/finish", json={"token": upload["token"]})).json()
    for path in (tmp_path / "data" / "files" / "gallery").rglob("*"):
        os.utime(path, (0, 0))
    assert len(stored(tmp_path)) == 2
    report = await gallery.collector.collect(storage_key="gallery", dry_run=False)
    assert (report.deleted, report.refusal) == (1, None)
    assert list(stored(tmp_path).values()) == [b"abc"]
    assert (await client.get(f"/items/{item['id']}/file")).content == b"abc"


async def test_a_direct_upload_is_refused_before_it_is_sent(client: httpx.AsyncClient, tmp_path: Path) -> None:
    large = await client.post("/direct/begin", json={"name": "a", "type": "text/plain", "size": MAX_SIZE + 1})
    assert (large.status_code, large.json()["max_size"]) == (413, MAX_SIZE)
    assert (await begun(client, b"abc", "text/html")).status_code == 415
    for kind in ("", "text/plain\r\nx: y", "ü/ü", "a" * 256):
        assert (await begun(client, b"abc", kind)).status_code == 422
    assert stored(tmp_path) == {}


async def test_a_direct_upload_that_is_not_what_was_announced_hangs_nowhere(client: httpx.AsyncClient, tmp_path: Path) -> None:
    upload = (await begun(client, b"<p>", "image/png")).json()
    assert (await client.post("/direct/finish", json={"token": upload["token"]})).status_code == 409
    assert (await sent(client, upload, b"<p>d")).status_code == 413
    assert stored(tmp_path) == {}
    assert (await sent(client, upload, b"<p>")).status_code == 204
    answer = await client.post("/direct/finish", json={"token": upload["token"]})
    assert answer.status_code in (415, 422)
    for token in ("", "x", upload["token"][:-1], upload["url"].rpartition("/")[2]):
        assert (await client.post("/direct/finish", json={"token": token})).status_code == 403
    assert (await client.get("/items")).json() == []
