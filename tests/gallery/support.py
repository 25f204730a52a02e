"""Uploads to a gallery, and what is on its disk."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

__all__ = ["files_in", "picture", "stored", "until_stored", "upload"]


def picture(width: int, height: int, colour: str = "teal", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, kind)
    return out.getvalue()


def stored(folder: Path, prefix: str = "gallery") -> dict[str, bytes]:
    """The files that the gallery has stored below a prefix, by the name that a ref's location ends with."""
    found: dict[str, bytes] = {}
    for place, _, names in os.walk(folder / "data" / "files" / prefix):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the worker has deleted it meanwhile
                found[name] = Path(place, name).read_bytes()
    return dict(sorted(found.items()))


async def until_stored(folder: Path, *contents: bytes, prefix: str = "gallery") -> None:
    """Wait for the worker to delete what rows no longer refer to, until just these contents are stored."""
    deadline = time.monotonic() + 60
    while sorted(stored(folder, prefix).values()) != sorted(contents):
        assert time.monotonic() < deadline, f"{list(stored(folder, prefix))} are stored"
        await asyncio.sleep(0.05)


async def upload(
    client: httpx.AsyncClient, name: str = "a.txt", content: bytes = b"abc", kind: str = "text/plain", album: int = 1
) -> Any:
    """Add a file to an album, and return what the gallery answers."""
    headers = {"content-type": kind}
    answer = await client.post(f"/albums/{album}/files", params={"name": name}, content=content, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def files_in(client: httpx.AsyncClient, album: int = 1) -> list[dict[str, Any]]:
    """Return the files of an album, as the list of albums shows them."""
    albums: list[Mapping[str, Any]] = (await client.get("/albums")).json()
    return next(list(one["files"]) for one in albums if one["id"] == album)
