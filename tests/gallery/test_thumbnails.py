"""Thumbnails and large copies in the gallery, over HTTP and on a real disk."""

from __future__ import annotations

import asyncio
import io
import time
from pathlib import Path
from typing import Any

import httpx
import pillow_heif
import pytest
from PIL import Image
from sqlalchemy import event

from tests.gallery.support import files_in, picture, stored, until_stored, upload
from tests.gallery.test_http import begun, sent
from tests.inspection.corpus import content_of


def heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "teal")).save(out, quality=80)
    return out.getvalue()


def opened(answer: httpx.Response) -> Image.Image:
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    return Image.open(io.BytesIO(answer.content), formats=["WEBP"])


def url_of(file: Any, name: str = "thumb") -> str:
    return f"/files/{file['id']}/{name}?v={file[name]['checksum'][7:19]}"


async def with_large_copy(client: httpx.AsyncClient, file: Any) -> Any:
    """Wait for the worker to make the large copy."""
    deadline = time.monotonic() + 60
    while file["is_pending"]:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
        file = (await client.get(f"/files/{file['id']}/state")).json()
    return file


async def test_copies_come_and_go_with_their_picture(client: httpx.AsyncClient, tmp_path: Path) -> None:
    """The thumbnail comes with the upload, the large copy by the worker."""
    content = picture(2000, 1000)
    file = await upload(client, "a.png", content, "image/png")
    assert file["thumb"]["media"] == {"type": "image/webp", "width": 480, "height": 240}
    assert (file["large"], file["is_pending"]) == (None, True)
    assert (await client.get(f"/files/{file['id']}/large")).status_code == 404
    thumb = await client.get(url_of(file))
    assert opened(thumb).size == (480, 240)
    assert len(thumb.content) == file["thumb"]["size"]
    assert thumb.headers["content-disposition"] == 'inline; filename="a.webp"'

    file = await with_large_copy(client, file)
    large = await client.get(url_of(file, "large"))
    assert opened(large).size == (1600, 800)
    assert await files_in(client) == [file]
    assert (await client.get(f"/files/{file['id']}")).content == content
    assert sorted(stored(tmp_path).values()) == sorted([content, thumb.content, large.content])

    other = picture(300, 600, "olive")
    url = f"/files/{file['id']}"
    replaced = (await client.put(url, params={"name": "b.png"}, content=other, headers={"content-type": "image/png"})).json()
    assert (replaced["thumb"]["media"]["width"], replaced["thumb"]["media"]["height"]) == (240, 480)
    assert (replaced["large"], replaced["is_pending"]) == (None, True)
    replaced = await with_large_copy(client, replaced)
    copies = [(await client.get(url_of(replaced, name))).content for name in ("thumb", "large")]
    await until_stored(tmp_path, other, *copies)

    assert (await client.delete(url)).status_code == 204
    await until_stored(tmp_path)
    assert (await client.get(url_of(replaced))).status_code == 404


async def test_only_the_address_of_its_own_content_is_kept_for_good(client: httpx.AsyncClient) -> None:
    file = await upload(client, "a.png", picture(20, 10), "image/png")
    thumb = await client.get(url_of(file))
    assert thumb.headers["cache-control"] == "private, max-age=31536000, immutable"
    for other in ("", "?v=", "?v=000000000000"):
        answer = await client.get(f"/files/{file['id']}/thumb{other}")
        assert (answer.content, answer.headers["cache-control"]) == (thumb.content, "private, no-cache")
    head = await client.head(url_of(file))
    assert (head.headers["content-length"], head.content) == (str(len(thumb.content)), b"")


async def test_what_is_no_picture_has_none(client: httpx.AsyncClient, tmp_path: Path) -> None:
    for name, kind in (("page.pdf", "application/pdf"), ("film.mkv", "video/x-matroska")):
        file = await upload(client, name, content_of(name), kind)
        assert (file["thumb"], file["large"], file["is_pending"]) == (None, None, False)
        for copy in ("thumb", "large"):
            assert (await client.get(f"/files/{file['id']}/{copy}")).status_code == 404
    assert len(stored(tmp_path)) == 2


async def test_a_picture_that_no_browser_may_show_has_one(client: httpx.AsyncClient) -> None:
    file = await upload(client, "a.tiff", picture(30, 20, kind="TIFF"), "image/tiff")
    assert opened(await client.get(url_of(file))).size == (30, 20)


async def test_a_damaged_picture_is_refused(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = picture(500, 400, kind="JPEG")[:-2000]
    answer = await client.post("/albums/1/files", content=content, headers={"content-type": "image/jpeg"})
    assert (answer.status_code, answer.json()["detail"]) == (422, "The image is damaged: it is cut off.")
    assert stored(tmp_path) == {}


@pytest.mark.time_bound  # a rollback deletes at once, unless others lock the database for a second
@pytest.mark.parametrize("way", ["posted", "replacing", "directly"])
async def test_what_cannot_be_shown_is_refused(client: httpx.AsyncClient, tmp_path: Path, way: str) -> None:
    """The answer says why, and nothing is stored."""
    content, kind, words = heic(), "image/heic", "The file is not an image of a supported type: JPEG,"
    file = await upload(client)
    if way == "directly":
        start = (await begun(client, content, kind, "a")).json()
        await sent(client, start, content)
        before = stored(tmp_path)
        answer = await client.post("/albums/1/direct/finish", json={"token": start["token"]})
    else:
        before = stored(tmp_path)
        method, url = ("POST", "/albums/1/files") if way == "posted" else ("PUT", f"/files/{file['id']}")
        answer = await client.request(method, url, params={"name": "a"}, content=content, headers={"content-type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["detail"].startswith(words)
    await until_stored(tmp_path, *before.values())
    assert await files_in(client) == [file]


async def test_a_page_of_albums_is_two_queries(client: httpx.AsyncClient, gallery: Any) -> None:
    """And one for the user; none for each album or picture."""
    other = (await client.post("/albums", json={"title": "Other"})).json()["id"]
    for number in range(5):
        await upload(client, f"{number}.png", picture(20, 10 + number), "image/png", album=1 if number < 3 else other)
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(gallery.engine.sync_engine, "before_cursor_execute", note)
    albums = (await client.get("/albums")).json()
    event.remove(gallery.engine.sync_engine, "before_cursor_execute", note)
    assert [[file["thumb"]["media"]["height"] for file in album["files"]] for album in albums] == [[13, 14], [10, 11, 12]]
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 3
