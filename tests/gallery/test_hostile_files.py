"""Hostile files in the gallery: what is taken, and what a browser is answered that asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.docs.hostile import HOSTILE, post_too_large, require_harmless
from tests.gallery.conftest import MAX_SIZE
from tests.gallery.support import until_stored
from tests.tiers import is_exhaustive


@pytest.mark.case("RE-08")
async def test_what_is_posted(client: httpx.AsyncClient, tmp_path: Path) -> None:
    taken = 0
    for file in HOSTILE:
        headers = {"Content-Type": file.kind}
        answer = require_harmless(
            await client.post("/albums/1/files", params={"name": file.name}, content=file.content, headers=headers)
        )
        if answer.is_success:
            taken += 1
            url = f"/files/{answer.json()['id']}"
            require_harmless(await client.get(f"{url}/state"))
            for asked in ({}, {"Range": "bytes=0-0"}):
                require_harmless(await client.get(url, headers=asked))
            require_harmless(await client.put(url, params={"name": file.name}, content=file.content, headers=headers))
            require_harmless(await client.get(url, params={"download": True}))
            assert (await client.delete(url)).status_code == 204
    assert 0 < taken < len(HOSTILE)
    await post_too_large(client, "/albums/1/files", MAX_SIZE, form=False, media_type="application/pdf", begin=b"%PDF-1.7\n")
    await until_stored(tmp_path)


@pytest.mark.case("RE-08")
async def test_what_is_sent_directly(client: httpx.AsyncClient, gallery: Any) -> None:
    for file in HOSTILE if is_exhaustive() else HOSTILE[::3]:  # what is posted goes through the same inspection
        announced = {"name": file.name, "type": file.kind, "size": len(file.content)}
        begun = require_harmless(await client.post("/albums/1/direct/begin", json=announced))
        if not begun.is_success:
            continue
        upload = begun.json()
        require_harmless(await client.put(upload["url"], content=file.content, headers=upload["headers"]))
        finished = require_harmless(await client.post("/albums/1/direct/finish", json={"token": upload["token"]}))
        if finished.is_success:
            require_harmless(await client.get(f"/files/{finished.json()['id']}"))
