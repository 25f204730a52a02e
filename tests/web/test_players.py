"""Sound and film opened by their own URL, in a headless Chromium: the browser's own player plays them, and nothing else runs."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import wave
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount, Route

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.signing import UrlSigner
from granite_storage.web import SignedFiles, StoredObjectResponse
from tests.gallery.browser import INSTALLING, Page, eventually, page, programs
from tests.gallery.browser import browser as started_browser
from tests.services import service
from tests.web.serving import server, stored

pytestmark = pytest.mark.timeout(INSTALLING + 300)

WEBM = base64.b64decode(
    """
    GkXfo59ChoEBQveBAULygQRC84EIQoKEd2VibUKHgQJChYECGFOAZwEAAAAAAAHWEU2bdLpNu4tTq4QVSalmU6yBoU27i1OrhBZUrmtTrIHGTb
    uMU6uEElTDZ1OsggEMTbuMU6uEHFO7a1OsggHA7AEAAAAAAABZAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
    AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAVSalmoCrXsYMPQkBNgIRMYXZmV0GETGF2ZkSJiECPQAAAAAAAFl
    Sua8GuAQAAAAAAADjXgQFzxYgAAAAAAAAAAZyBACK1nIN1bmSIgQCGhVZfVlA4g4EBI+ODhB3NZQDgibCBELqBEJqBAhJUw2fRc3POY8CLY8WI
    AAAAAAAAAAFnyJhFo4dFTkNPREVSRIeLTGF2YyBsaWJ2cHhnyKJFo4hEVVJBVElPTkSHlDAwOjAwOjAxLjAwMDAwMDAwMAAAH0O2ddnngQCjvY
    EAAIDwAgCdASoQABAAAEcIhYWIhYSIAgICdaoD+AP6Ag1NGAD+/W7z/+OZNzDE/45t//FhPA4oyP/xUQCjlYEB9ACxAQABEBAAGAAYWC/0AAgA
    ABxTu2uRu4+zgQC3iveBAfGCAWLwgQM=
    """
)
"""A second of a red square, in VP8."""

PAGE = b"<!doctype html><title>owned</title><script>document.title = 'owned'</script><img src=x onerror='document.title=1'>"
PLAYER = """
const player = document.querySelector("video, audio");
return player && [player.readyState, player.error && player.error.message, player.duration];
"""


def wav() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(1)
        sound.setframerate(8000)
        sound.writeframes(bytes([128]) * 8000)
    return file.getvalue()


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 3, 3, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(30))) + chunk(b"IEND", b"")


FILES = {
    "film": ("video/webm", WEBM),
    "sound": ("audio/wav", wav()),
    "picture": ("image/png", png()),
    "text": ("text/plain", "caf\u00e9 \u2713 <script>document.title='owned'</script>".encode()),
    "disguised film": ("video/webm", PAGE),
    "disguised sound": ("audio/mpeg", PAGE),
    "disguised picture": ("image/png", PAGE),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with service("Chromium", programs()) as found, started_browser(found) as driver:
        yield driver


@dataclass
class Seen:
    """What a client sees of a file."""

    player: Any
    picture: int | None
    text: str
    title: str


def look(driver: webdriver.Chrome, urls: dict[str, str], folder: Path) -> dict[str, Seen]:
    """Open each URL in a window of its own browser; what plays has a second for it."""
    with page(driver, "", folder) as window:
        return {name: _seen(window, url, name in ("film", "sound")) for name, url in urls.items()}


def _seen(window: Page, url: str, plays: bool) -> Seen:
    window.open(url)
    if plays:
        eventually(lambda: (window.run(PLAYER) or [0])[0] == 4, f"it does not play: {window.complaints()}", seconds=20)
        assert window.complaints() == []
    return Seen(
        player=window.run(PLAYER),
        picture=window.run("return document.querySelector('img')?.naturalWidth"),
        text=window.run("return document.body?.innerText ?? ''"),
        title=window.driver.title,
    )


@pytest.mark.case("RB-11")
@pytest.mark.parametrize("signed", [False, True], ids=["StoredObjectResponse", "SignedFiles"])
async def test_what_a_browser_shows(browser: webdriver.Chrome, tmp_path: Path, signed: bool) -> None:
    backends, policies = {"store": MemoryStorageBackend()}, {"files": StoragePolicy("files", "store")}
    async with StorageManager(backends=backends, policies=policies) as manager:
        refs = {name: await stored(manager, content, kind) for name, (kind, content) in FILES.items()}

        async def show(request: Request) -> StoredObjectResponse:
            return StoredObjectResponse(refs[request.path_params["name"]], request, manager=manager, disposition="inline")

        routes: list[Any] = [Route("/files/{name}", show)]
        app = Starlette(routes=routes)
        async with server(app) as port:
            address = f"http://127.0.0.1:{port}"
            urls = {name: f"{address}/files/{name}" for name in refs}
            if signed:
                signer = UrlSigner(f"{address}/signed", keys={"one": "x" * 32})
                signing = StorageManager(backends=manager.backends, policies=manager.policies, url_signer=signer)
                app.router.routes.append(Mount("/signed", SignedFiles(signing)))
                life = timedelta(minutes=5)
                urls = {name: await signing.url(ref, expires_in=life, disposition="inline") for name, ref in refs.items()}
            seen = await asyncio.to_thread(look, browser, urls, tmp_path)
    for name in ("film", "sound"):
        assert seen[name].player == [4, None, 1]
    assert seen["picture"].picture == 3
    assert seen["text"].text == FILES["text"][1].decode()
    assert "owned" not in {one.title for one in seen.values()}
    assert seen["disguised film"].player[0] == seen["disguised sound"].player[0] == 0
    assert seen["disguised picture"].picture == 0
