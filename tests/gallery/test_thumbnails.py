"""Thumbnails and previews of the gallery, over HTTP and on a real disk."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import httpx
import pillow_heif
import pytest
from PIL import Image
from sqlalchemy import event

from tests.gallery.support import stored
from tests.gallery.test_http import begun, sent, upload
from tests.inspection.corpus import content_of


def picture(width: int, height: int, colour: str = "teal", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, kind)
    return out.getvalue()


def heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "teal")).save(out, quality=80)
    return out.getvalue()


def opened(answer: httpx.Response) -> Image.Image:
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    return Image.open(io.BytesIO(answer.content), formats=["WEBP"])


def url_of(item: Any, name: str = "thumb") -> str:
    return f"/items/{item['id']}/{name}?v={item[name]['checksum'][7:19]}"


async def test_a_thumbnail_comes_and_goes_with_its_picture(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = picture(960, 600)
    item = await upload(client, "a.png", content, "image/png")
    assert item["thumb"]["media"] == {"type": "image/webp", "width": 480, "height": 300}
    assert item["preview"] is None
    assert (await client.get("/items")).json() == [item]
    thumb = await client.get(url_of(item))
    assert opened(thumb).size == (480, 300)
    assert len(thumb.content) == item["thumb"]["size"]
    assert thumb.headers["content-disposition"] == 'inline; filename="a.webp"'
    assert (await client.get(f"/items/{item['id']}/file")).content == content
    assert sorted(stored(tmp_path).values()) == sorted([content, thumb.content])

    other = picture(300, 600, "olive")
    url = f"/items/{item['id']}/file"
    replaced = (await client.put(url, params={"name": "b.png"}, content=other, headers={"content-type": "image/png"})).json()
    assert (replaced["thumb"]["media"]["width"], replaced["thumb"]["media"]["height"]) == (240, 480)
    new = await client.get(url_of(replaced))
    assert opened(new).size == (240, 480)
    assert sorted(stored(tmp_path).values()) == sorted([other, new.content])

    assert (await client.delete(f"/items/{item['id']}")).status_code == 204
    assert stored(tmp_path) == {}
    assert (await client.get(url_of(replaced))).status_code == 404


async def test_only_the_address_of_its_own_content_is_kept_for_good(client: httpx.AsyncClient) -> None:
    item = await upload(client, "a.png", picture(20, 10), "image/png")
    thumb = await client.get(url_of(item))
    assert thumb.headers["cache-control"] == "private, max-age=31536000, immutable"
    for other in ("", "?v=", "?v=000000000000"):
        answer = await client.get(f"/items/{item['id']}/thumb{other}")
        assert (answer.content, answer.headers["cache-control"]) == (thumb.content, "private, no-cache")
    head = await client.head(url_of(item))
    assert (head.headers["content-length"], head.content) == (str(len(thumb.content)), b"")


async def test_a_preview_is_made_when_it_is_asked_for(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = picture(2000, 1000)
    item = await upload(client, "a.png", content, "image/png")
    assert (await client.get(f"/items/{item['id']}/preview")).status_code == 404
    answers = await asyncio.gather(*(client.post(f"/items/{item['id']}/preview") for _ in range(5)))
    [told] = {answer.text for answer in answers}
    found = answers[0].json()
    assert told == (await client.post(f"/items/{item['id']}/preview")).text
    assert (found["preview"]["media"]["width"], found["thumb"]) == (1600, item["thumb"])
    assert (await client.get("/items")).json() == [found]
    preview = await client.get(url_of(found, "preview"))
    assert opened(preview).size == (1600, 800)
    assert len(stored(tmp_path)) == 3
    assert (await client.delete(f"/items/{item['id']}")).status_code == 204
    assert stored(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "kind"), [("page.pdf", "application/pdf"), ("film.mkv", "video/x-matroska"), ("a.txt", "text/plain")]
)
async def test_what_is_no_picture_has_none(client: httpx.AsyncClient, tmp_path: Path, name: str, kind: str) -> None:
    content = b"abc" if kind == "text/plain" else content_of(name)
    item = await upload(client, name, content, kind)
    assert (item["thumb"], item["preview"]) == (None, None)
    assert list(stored(tmp_path).values()) == [content]
    assert (await client.get(f"/items/{item['id']}/thumb")).status_code == 404
    answer = await client.post(f"/items/{item['id']}/preview")
    refusal = f"The variant 'preview' is not made for files of the type {kind}."
    assert (answer.status_code, answer.json()["detail"]) == (422, refusal)
    assert (await client.post("/items/999/preview")).status_code == 404


async def test_a_picture_that_no_browser_may_show_has_one(client: httpx.AsyncClient) -> None:
    item = await upload(client, "a.tiff", picture(30, 20, kind="TIFF"), "image/tiff")
    assert opened(await client.get(url_of(item))).size == (30, 20)


CORRUPT = {
    "cut off": (picture(500, 400, kind="JPEG")[:-2000], "image/jpeg", "The image is damaged and cannot be read."),
    "HEIC": (heic(), "image/heic", "The file is not an image of a supported type: JPEG,"),
}


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("way", ["posted", "replacing", "directly"])
async def test_what_cannot_be_shown_is_refused(client: httpx.AsyncClient, tmp_path: Path, name: str, way: str) -> None:
    """The answer says why, and nothing is stored."""
    content, kind, words = CORRUPT[name]
    item = await upload(client)
    if way == "directly":
        start = (await begun(client, content, kind, "a")).json()
        await sent(client, start, content)
        before = stored(tmp_path)
        answer = await client.post("/direct/finish", json={"token": start["token"]})
    else:
        before = stored(tmp_path)
        method, url = ("POST", "/items") if way == "posted" else ("PUT", f"/items/{item['id']}/file")
        answer = await client.request(method, url, params={"name": "a"}, content=content, headers={"content-type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["detail"].startswith(words)
    assert stored(tmp_path) == before
    assert (await client.get("/items")).json() == [item]


async def test_a_page_of_pictures_is_one_query(client: httpx.AsyncClient, gallery: Any) -> None:
    for number in range(5):
        await upload(client, f"{number}.png", picture(20, 10 + number), "image/png")
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(gallery.engine.sync_engine, "before_cursor_execute", note)
    page = (await client.get("/items")).json()
    event.remove(gallery.engine.sync_engine, "before_cursor_execute", note)
    assert [item["thumb"]["media"]["height"] for item in page] == [14, 13, 12, 11, 10]
    assert len(statements) == 1
