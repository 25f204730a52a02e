import io

import httpx
import pytest
from PIL import Image

pytestmark = pytest.mark.anyio


async def test_avatar(anna: httpx.AsyncClient, picture: bytes) -> None:
    upload = {"file": ("me.png", picture, "image/png")}
    assert (await anna.put("/me/avatar", files=upload)).status_code == 204
    user = (await anna.get("/me")).json()["id"]
    answer = await anna.get(f"/users/{user}/avatar")
    assert answer.content == picture
    assert answer.headers["content-disposition"].startswith("inline")
    icon = await anna.get(f"/users/{user}/icon")
    assert icon.headers["content-type"] == "image/webp"
    assert (await anna.delete("/me/avatar")).status_code == 204
    assert (await anna.get(f"/users/{user}/avatar")).status_code == 404


async def test_another_type(anna: httpx.AsyncClient) -> None:
    upload = {"file": ("me.png", b"<html>", "image/png")}
    answer = await anna.put("/me/avatar", files=upload)
    assert answer.status_code == 415
    assert answer.headers["content-type"] == "application/problem+json"


async def test_too_large(anna: httpx.AsyncClient) -> None:
    file = io.BytesIO()
    Image.effect_noise((2000, 2000), 100).save(file, "PNG")
    upload = {"file": ("me.png", file.getvalue(), "image/png")}
    assert (await anna.put("/me/avatar", files=upload)).status_code == 413


async def test_without_a_token(anna: httpx.AsyncClient, picture: bytes) -> None:
    upload = {"file": ("me.png", picture, "image/png")}
    answer = await anna.put("/me/avatar", files=upload, headers={"Authorization": "x"})
    assert answer.status_code == 401
