"""Every route of the gallery, over HTTP and on a real disk."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gallery.conftest import MAX_SIZE, TOKENS
from tests.gallery.support import files_in, stored, until_stored, upload
from tests.inspection.corpus import content_of
from tests.inspection.support import png

STATIC = Path(__file__).parents[2] / "examples" / "gallery" / "static"
TEXT = {"content-type": "text/plain"}
PNG = {"content-type": "image/png"}


async def test_upload_list_show_replace_delete(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = content_of("film.mkv") + bytes(range(256)) * 1000
    file = await upload(client, "jährlich.mkv", content, "video/x-matroska")
    assert set(file) == {"id", "file", "thumb", "large", "is_pending"}
    assert file["file"] == {
        "size": len(content),
        "content_type": "video/x-matroska",
        "original_filename": "jährlich.mkv",
        "checksum": f"sha256:{hashlib.sha256(content).hexdigest()}",
    }
    assert list(stored(tmp_path).values()) == [content]
    [album] = (await client.get("/albums")).json()
    assert album == {
        "id": 1,
        "title": "Anna’s pictures",
        "owner": "Anna",
        "is_public": False,
        "is_own": True,
        "files": [file],
    }

    url = f"/files/{file['id']}"
    assert (await client.get(f"{url}/state")).json() == file
    shown = await client.get(url)
    assert (shown.content, shown.headers["content-type"]) == (content, "video/x-matroska")
    assert (await client.get(url, params={"download": True})).headers["content-disposition"].startswith("attachment;")
    part = await client.get(url, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, content[10:20])
    head = await client.head(url)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(content)), b"")

    replaced = (await client.put(url, params={"name": "new.txt"}, content=b"new", headers=TEXT)).json()
    assert (replaced["id"], replaced["file"]["original_filename"]) == (file["id"], "new.txt")
    shown = await client.get(url)
    assert (shown.content, shown.headers["content-disposition"]) == (b"new", 'inline; filename="new.txt"')
    await until_stored(tmp_path, b"new")

    assert (await client.delete(url)).status_code == 204
    await until_stored(tmp_path)
    assert await files_in(client) == []
    assert [(await client.get(url)).status_code, (await client.delete(url)).status_code] == [404, 404]


async def test_an_album_keeps_its_order_and_goes_with_its_files(client: httpx.AsyncClient, tmp_path: Path) -> None:
    added = await client.post("/albums", json={"title": "Norway"})
    assert added.status_code == 201
    album = added.json()["id"]
    made = [(await upload(client, f"{number}.txt", b"%d" % number, album=album))["id"] for number in range(3)]
    assert (await client.put(f"/files/{made[2]}/first")).status_code == 204
    assert [file["id"] for file in await files_in(client, album)] == [made[2], made[0], made[1]]
    assert (await client.delete(f"/albums/{album}")).status_code == 204
    assert [one["title"] for one in (await client.get("/albums")).json()] == ["Anna’s pictures"]
    await until_stored(tmp_path)
    for title in ("", "a" * 101, "a\nb", "\x00"):
        assert (await client.post("/albums", json={"title": title})).status_code == 422
    lone = b'{"title": "\\ud800"}'
    assert (await client.post("/albums", content=lone, headers={"content-type": "application/json"})).status_code == 422


@pytest.mark.exhaustive("how many files a collection takes is the library's rule, which has tests of its own")
async def test_an_album_takes_so_many_files(client: httpx.AsyncClient, gallery: Any, tmp_path: Path) -> None:
    async with gallery.albums.sessions.begin() as session:
        album = await session.get_one(gallery.Album, 1)
        gallery.albums.append_files(album, gallery.Album.files, [b"x"] * 40)
    answer = await client.post("/albums/1/files", params={"name": "a.txt"}, content=b"one more", headers=TEXT)
    assert (answer.status_code, answer.json()["max_files"]) == (413, 40)
    assert len(await files_in(client)) == 40
    assert b"one more" not in stored(tmp_path).values()


async def test_the_newest_albums_come_first_in_pages(client: httpx.AsyncClient) -> None:
    made = [1] + [(await client.post("/albums", json={"title": f"{number}"})).json()["id"] for number in range(4)]
    first = (await client.get("/albums", params={"limit": 3})).json()
    second = (await client.get("/albums", params={"limit": 3, "before": first[-1]["id"]})).json()
    assert [album["id"] for album in first + second] == made[::-1]
    for wrong in ({"limit": 51}, {"limit": 0}, {"before": 0}, {"before": 9**30}):
        assert (await client.get("/albums", params=wrong)).status_code == 422


@pytest.mark.parametrize(("declared", "replacing"), [(True, False), (False, True)], ids=["declared, new", "in chunks, replacing"])
async def test_what_is_too_large_changes_nothing(
    client: httpx.AsyncClient, tmp_path: Path, declared: bool, replacing: bool
) -> None:
    file = await upload(client)
    before = stored(tmp_path)
    read: list[int] = []

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            read.append(100_000)
            yield png() + bytes(100_000)

    method, url = ("PUT", f"/files/{file['id']}") if replacing else ("POST", "/albums/1/files")
    headers = PNG | ({"content-length": "2000000"} if declared else {})
    answer = await client.request(method, url, content=chunks(), headers=headers)
    assert (answer.status_code, answer.json()["max_size"]) == (413, MAX_SIZE)
    assert bool(read) != declared
    assert await files_in(client) == [file]
    assert stored(tmp_path) == before


async def test_what_is_nothing_for_a_gallery_is_not_read(client: httpx.AsyncClient, tmp_path: Path) -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"abc")
        yield b"abc"

    for kind in ("text/html", "application/javascript", "", "application/octet-stream", "text/plainer"):
        answer = await client.post("/albums/1/files", content=body(), headers={"content-type": kind})
        assert (answer.status_code, answer.headers["content-type"]) == (415, "application/problem+json"), kind
        assert answer.json()["detail"] == "The gallery takes pictures, films, sound, plain text, PDF and ZIP."
    assert read == []
    assert stored(tmp_path) == {}


async def test_what_is_uploaded_to_nothing_is_not_read(client: httpx.AsyncClient) -> None:
    read: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        read.append(b"abc")
        yield b"abc"

    assert (await client.put("/files/7", content=body(), headers=TEXT)).status_code == 404
    assert (await client.post("/albums/7/files", content=body(), headers=TEXT)).status_code == 404
    assert read == []
    for impossible in ("0", "-1", str(2**31), "9" * 30, "x"):
        assert (await client.get(f"/files/{impossible}")).status_code == 422
        assert (await client.delete(f"/albums/{impossible}")).status_code == 422


async def test_an_upload_that_breaks_off_leaves_nothing(client: httpx.AsyncClient, tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield png() + bytes(65536)
        raise ConnectionResetError("the client went away")

    with pytest.raises(ConnectionResetError):
        await client.post("/albums/1/files", content=body(), headers=PNG)
    assert stored(tmp_path) == {}
    assert await files_in(client) == []


@pytest.mark.time_bound  # a rollback deletes at once, unless others lock the database for a second
@pytest.mark.parametrize("gone", ["album", "file"])
async def test_what_goes_during_an_upload_takes_nothing(client: httpx.AsyncClient, tmp_path: Path, gone: str) -> None:
    """It was allowed before the first byte; the row has been deleted since, so the upload is deleted, too."""
    file = await upload(client)

    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        assert (await client.delete("/albums/1" if gone == "album" else f"/files/{file['id']}")).status_code == 204
        yield b"ended"

    method, url = ("POST", "/albums/1/files") if gone == "album" else ("PUT", f"/files/{file['id']}")
    answer = await client.request(method, url, content=body(), headers=TEXT)
    assert (answer.status_code, answer.json()["detail"]) == (409, "It has been changed or deleted meanwhile. Reload the page.")
    await until_stored(tmp_path)


async def test_a_missing_object_is_a_404(client: httpx.AsyncClient, tmp_path: Path) -> None:
    file = await upload(client)
    for path in (tmp_path / "data" / "files" / "gallery").rglob("*.txt"):
        path.unlink()
    assert (await client.get(f"/files/{file['id']}")).status_code == 404


async def test_what_is_not_safe_in_a_window_is_saved(client: httpx.AsyncClient) -> None:
    for kind, name in (("application/pdf", "page.pdf"), ("image/tiff", "picture.tiff")):
        file = await upload(client, "x.svg", content_of(name), kind)
        answer = await client.get(f"/files/{file['id']}")
        assert answer.headers["content-type"] == kind
        assert answer.headers["content-disposition"].startswith("attachment;")
        assert answer.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert kind not in (await client.get("/settings")).json()["shown"]


UNSUITABLE = [
    (b"<svg onload='alert(1)'/>", 415, "The file is an image (image/svg+xml)"),
    (b"<html><script>alert(1)</script>", 415, "The file is text (text/html)"),
    (b"MZ" + bytes(100), 415, "The file is a program"),
    (png(65_500, 65_500), 422, "The image has 65500 x 65500 pixels"),
    (png()[:20], 422, "The image is damaged: it is cut off."),
]


@pytest.mark.parametrize("directly", [False, True], ids=["posted", "directly"])
async def test_what_is_none_of_it_by_its_content(client: httpx.AsyncClient, tmp_path: Path, directly: bool) -> None:
    """Whatever is declared; and no album has it."""
    for content, status, words in UNSUITABLE:
        if directly:
            start = (await begun(client, content, "image/png", "a.png")).json()
            await sent(client, start, content)
            answer = await client.post("/albums/1/direct/finish", json={"token": start["token"]})
        else:
            answer = await client.post("/albums/1/files", params={"name": "a.png"}, content=content, headers=PNG)
            assert stored(tmp_path) == {}
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), words
        assert answer.json()["detail"].startswith(words)
    assert await files_in(client) == []


async def test_a_renamed_picture_is_shown_as_what_it_is(client: httpx.AsyncClient) -> None:
    file = await upload(client, "a.jpg", png(), "image/jpeg")
    assert (file["file"]["content_type"], file["file"]["original_filename"]) == ("image/png", "a.jpg.png")


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
    ("POST", "/albums"),
    ("PUT", "/albums/1/public?is_public=true"),
    ("POST", "/albums/1/files?name=a.txt"),
    ("POST", "/albums/1/direct/begin"),
    ("POST", "/albums/1/direct/finish"),
    ("DELETE", "/albums/1"),
    ("PUT", "/files/1"),
    ("PUT", "/files/1/first"),
    ("DELETE", "/files/1"),
]
BY_ANYBODY = [("POST", "/rollback?fail=false"), ("PUT", "/uploads/x"), ("POST", "/session"), ("DELETE", "/session")]


async def test_a_page_of_another_site_changes_nothing(client: httpx.AsyncClient, tmp_path: Path) -> None:
    file = await upload(client)
    before = stored(tmp_path), stored(tmp_path, "notes")
    del client.headers["X-Gallery"]
    for method, url in CHANGES + BY_ANYBODY:
        answer = await client.request(method, url, content=b"abc", headers={**TEXT, "origin": "http://evil.example"})
        assert answer.status_code == 403, url
        assert "set-cookie" not in answer.headers
        asked = await client.options(url, headers={"origin": "http://evil.example", "access-control-request-method": method})
        assert "access-control-allow-origin" not in asked.headers
    assert (stored(tmp_path), stored(tmp_path, "notes")) == before
    assert await files_in(client) == [file]


async def test_a_name_that_leads_here_is_not_enough(idle: httpx.AsyncClient) -> None:
    assert (await idle.get("/albums", headers={"host": "evil.example"})).status_code == 400


def test_every_route_that_changes_something_is_tried(module: Any) -> None:
    """So that a new one is not left out of the tests of permissions."""
    known = {(method, re.sub(r"/\d+", "/{}", url.partition("?")[0])) for method, url in CHANGES + BY_ANYBODY}
    found = {
        (method.upper(), re.sub(r"{\w+}", "{}", path))
        for path, routes in module.app.openapi()["paths"].items()
        for method in routes
        if method not in ("get", "head")
    }
    assert found == known - {("PUT", "/uploads/x")}


class TestPermissions:
    """Who may see and change what; see `examples/gallery/users.py`."""

    async def test_a_guest_sees_public_albums_and_changes_nothing(
        self, client: httpx.AsyncClient, guest: httpx.AsyncClient
    ) -> None:
        await self._check(client, guest, refusal=401)
        assert (await guest.get("/session")).json() == {"name": None}

    async def test_a_user_changes_only_their_own(self, client: httpx.AsyncClient, ben: httpx.AsyncClient) -> None:
        await self._check(client, ben, refusal=403)
        assert (await ben.get("/session")).json() == {"name": "Ben"}

    async def _check(self, client: httpx.AsyncClient, other: httpx.AsyncClient, refusal: int) -> None:
        file = await upload(client, "a.png", png(), "image/png")
        shown = ["/files/1", "/files/1/state", "/files/1/thumb"]
        own = [(method, url) for method, url in CHANGES if url != "/albums"]
        for is_public in (False, True):
            assert (await client.put(f"/albums/1/public?is_public={is_public}")).status_code == 204
            assert [(await client.get(url)).status_code for url in shown] == [200] * 3
            assert [(await other.get(url)).status_code for url in shown] == [200 if is_public else 404] * 3
            [album] = (await client.get("/albums")).json()
            assert album["is_own"]
            listed = [one for one in (await other.get("/albums")).json() if one["id"] == 1]
            assert [(one["title"], one["is_own"], len(one["files"])) for one in listed] == [
                ("Anna’s pictures", False, 1)
            ] * is_public
            for method, url in own:
                answer = await other.request(method, url, content=b"abc", headers=TEXT)
                assert answer.status_code == (refusal if is_public else 404), (method, url)
        assert [one["id"] for one in await files_in(client)] == [file["id"]]

    async def test_an_upload_that_is_not_allowed_is_not_read(self, client: httpx.AsyncClient, ben: httpx.AsyncClient) -> None:
        await client.put("/albums/1/public?is_public=true")
        read: list[bytes] = []

        async def body() -> AsyncIterator[bytes]:
            read.append(b"abc")
            yield b"abc"

        assert (await ben.post("/albums/1/files", content=body(), headers=TEXT)).status_code == 403
        assert read == []

    async def test_a_direct_upload_is_for_its_album_alone(self, client: httpx.AsyncClient) -> None:
        other = (await client.post("/albums", json={"title": "Other"})).json()["id"]
        start = (await begun(client, b"abc")).json()
        await sent(client, start, b"abc")
        finish = {"token": start["token"]}
        assert (await client.post(f"/albums/{other}/direct/finish", json=finish)).status_code == 403
        assert (await client.post("/albums/1/direct/finish", json=finish)).status_code == 201

    async def test_signing_in_and_out(self, guest: httpx.AsyncClient, gallery: Any) -> None:
        assert (await guest.post("/albums", json={"title": "a"})).status_code == 401
        for wrong in ("x", "the-token-of-Anna", TOKENS["Anna"] + "=", "~" * 200):
            answer = await guest.post("/session", json={"token": wrong})
            assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
        for impossible in (b"", b"\\u00fc", b"\\u0000", b"\\ud800", b"~" * 201):
            content = b'{"token": "%s"}' % impossible
            answer = await guest.post("/session", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 422, impossible
        answer = await guest.post("/session", json={"token": TOKENS["Anna"]})
        assert answer.status_code == 204
        assert re.search("HttpOnly; Path=/; SameSite=strict$", answer.headers["set-cookie"])
        assert (await guest.get("/session")).json() == {"name": "Anna"}
        assert (await guest.delete("/session")).status_code == 204
        assert (await guest.get("/session")).json() == {"name": None}
        async with gallery.engine.connect() as connection:
            stored_tokens = str((await connection.exec_driver_sql("SELECT * FROM user_account")).all())
        assert not [token for token in TOKENS.values() if token in stored_tokens]

        transport = httpx.ASGITransport(gallery.app)  # over HTTPS the cookie is for HTTPS only
        async with httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1") as client:
            answer = await client.post("/session", json={"token": TOKENS["Anna"]}, headers={"X-Gallery": "1"})
        assert answer.headers["set-cookie"].endswith("; Secure")

    async def test_a_start_gives_users_new_tokens(self, gallery: Any, client: httpx.AsyncClient) -> None:
        await gallery.users.add_users({"Anna": "another-token"})
        assert (await client.get("/session")).json() == {"name": None}
        client.cookies.set("gallery_token", "another-token", domain="127.0.0.1")
        assert [album["id"] for album in (await client.get("/albums")).json()] == [1]


async def test_every_answer_says_what_may_run(client: httpx.AsyncClient) -> None:
    for url in ("/", "/code", "/albums", "/static/gallery.js", "/static/style.css", "/nothing", "/files/1"):
        answer = await client.get(url)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy, url
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


async def test_no_path_redirects_elsewhere(idle: httpx.AsyncClient) -> None:
    for url in ("//evil.example", "//evil.example/", "/albums/", "/static//evil.example/..", "/%2f%2fevil.example/"):
        answer = await idle.get(f"http://127.0.0.1{url}")
        assert "evil" not in answer.headers.get("location", "").partition("127.0.0.1")[0]
        assert answer.headers.get("location", "http://127.0.0.1/").startswith("http://127.0.0.1/")


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    text = (STATIC / "gallery.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=\"/static/)|<style|\son\w+=|\sstyle=|https?://|javascript:", text)
    for script in STATIC.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://", script.read_text("utf-8")
        )


async def settled(client: httpx.AsyncClient) -> dict[str, Any]:
    """Return what the rollback demonstration shows at last."""
    state: dict[str, Any] = {"rows": [], "files": [""]}
    deadline = time.monotonic() + 60
    while len(state["files"]) != len(state["rows"]) and time.monotonic() < deadline:
        state = (await client.get("/rollback")).json()
        await asyncio.sleep(0.02)
    return state


def counts(seen: dict[str, Any]) -> list[tuple[int, int]]:
    return [(len(seen[moment]["rows"]), len(seen[moment]["files"])) for moment in ("before", "during", "ended")]


@pytest.mark.time_bound  # a rollback deletes at once, unless others lock the database for a second
async def test_what_a_rollback_does(guest: httpx.AsyncClient, tmp_path: Path) -> None:
    before = (await guest.get("/rollback")).json()
    contents = stored(tmp_path, "notes")
    assert before["files"] == sorted(contents)
    seen = (await guest.post("/rollback", params={"fail": True})).json()
    assert counts(seen)[:2] == [(2, 2), (2, 4)]
    assert seen["before"] == before
    assert seen["ended"]["rows"] == before["rows"]
    assert "UNIQUE" in seen["error"]
    assert {row["title"] for row in seen["during"]["rows"]} == {"note-1", "note-3"}
    assert await settled(guest) == before
    assert stored(tmp_path, "notes") == contents


async def test_what_a_commit_does(guest: httpx.AsyncClient, tmp_path: Path) -> None:
    for version in (2, 3):
        seen = (await guest.post("/rollback", params={"fail": False})).json()
        assert (seen["error"], counts(seen)[1]) == (None, (2, 4))
        assert seen["ended"]["rows"] == seen["during"]["rows"]
        after = await settled(guest)
        assert after["rows"] == seen["during"]["rows"]
        assert {row["title"] for row in after["rows"]} == {"note-1", f"note-{version + 1}"}
        assert sorted(row["file"] for row in after["rows"]) == after["files"] == sorted(stored(tmp_path, "notes"))
        assert not set(after["files"]) & set(seen["before"]["files"])
        assert any(b"note-1 in version %d" % version in content for content in stored(tmp_path, "notes").values())


@pytest.mark.time_bound  # a rollback deletes at once, unless others lock the database for a second
async def test_experiments_at_the_same_time_do_not_mix(guest: httpx.AsyncClient) -> None:
    runs = [guest.post("/rollback", params={"fail": number % 2}) for number in range(2)]
    for number, answer in enumerate(await asyncio.gather(*runs)):
        seen = answer.json()
        assert bool(seen["error"]) == bool(number % 2)
        assert [rows for rows, _ in counts(seen)] == [2, 2, 2]
        referenced = {row["file"] for moment in ("before", "during", "ended") for row in seen[moment]["rows"]}
        assert referenced <= {name for moment in ("before", "during", "ended") for name in seen[moment]["files"]}
    assert len((await settled(guest))["files"]) == 2


async def test_the_code_is_what_runs(idle: httpx.AsyncClient) -> None:
    code = (await idle.get("/code")).json()
    source = "".join(path.read_text("utf-8") for path in sorted(STATIC.parent.glob("*.py")))
    for shown in code.values():
        assert all(part in source for part in shown.split("\n\n\n"))
    assert set(re.findall(r'data-code="(\w+)"', (STATIC / "gallery.html").read_text("utf-8"))) == set(code)


async def begun(client: httpx.AsyncClient, content: bytes, kind: str = "text/plain", name: str = "a.txt") -> httpx.Response:
    return await client.post("/albums/1/direct/begin", json={"name": name, "type": kind, "size": len(content)})


async def sent(client: httpx.AsyncClient, upload: dict[str, Any], content: bytes) -> httpx.Response:
    return await client.request(upload["method"], upload["url"], content=content, headers=upload["headers"])


async def test_a_direct_upload(client: httpx.AsyncClient) -> None:
    content = content_of("film.mkv") + bytes(range(256)) * 1000
    upload = (await begun(client, content, "video/x-matroska", "a film.mkv")).json()
    assert upload["url"].startswith("/uploads/")
    assert await files_in(client) == []
    assert (await sent(client, upload, content)).status_code == 204
    assert await files_in(client) == []
    answer = await client.post("/albums/1/direct/finish", json={"token": upload["token"]})
    assert answer.status_code == 201
    file = answer.json()
    assert file["file"] == {
        "size": len(content),
        "content_type": "video/x-matroska",
        "original_filename": "a film.mkv",
        "checksum": f"sha256:{hashlib.sha256(content).hexdigest()}",
    }
    assert await files_in(client) == [file]
    assert (await client.get(f"/files/{file['id']}")).content == content
    changed = await sent(client, upload, content[::-1])
    assert changed.status_code != 500
    assert (await client.get(f"/files/{file['id']}")).content == content


async def test_a_direct_upload_is_refused_before_it_is_sent(client: httpx.AsyncClient, tmp_path: Path) -> None:
    large = await client.post("/albums/1/direct/begin", json={"name": "a", "type": "text/plain", "size": MAX_SIZE + 1})
    assert (large.status_code, large.json()["max_size"]) == (413, MAX_SIZE)
    assert (await begun(client, b"abc", "text/html")).status_code == 415
    for kind in ("", "text/plain\r\nx: y", "ü/ü", "a" * 256):
        assert (await begun(client, b"abc", kind)).status_code == 422
    assert stored(tmp_path) == {}


async def test_a_direct_upload_that_is_not_what_was_announced_is_kept_nowhere(client: httpx.AsyncClient, tmp_path: Path) -> None:
    upload = (await begun(client, b"<p>", "image/png")).json()
    assert (await client.post("/albums/1/direct/finish", json={"token": upload["token"]})).status_code == 409
    assert (await sent(client, upload, b"<p>d")).status_code == 413
    assert stored(tmp_path) == {}
    assert (await sent(client, upload, b"<p>")).status_code == 204
    answer = await client.post("/albums/1/direct/finish", json={"token": upload["token"]})
    assert answer.status_code in (415, 422)
    for token in ("", "x", upload["token"][:-1], upload["url"].rpartition("/")[2]):
        assert (await client.post("/albums/1/direct/finish", json={"token": token})).status_code == 403
    assert await files_in(client) == []
