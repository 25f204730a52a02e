"""The example application, over HTTP: in this process, and started as its documentation says."""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The application, made anew in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAX_SIZE", "1000000")
    sys.modules.pop("examples.fastapi_app", None)
    yield importlib.import_module("examples.fastapi_app")
    sys.modules.pop("examples.fastapi_app", None)


@pytest.fixture
async def example(module: Any) -> AsyncIterator[Any]:
    async with module.app.router.lifespan_context(module.app):
        yield module


@pytest.fixture
async def client(example: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(example.app), base_url="http://test") as client:
        yield client


def stored(folder: Path) -> list[Path]:
    return [path for path in (folder / "data" / "files" / "documents").rglob("*") if path.is_file()]


async def test_upload_list_download_delete(client: httpx.AsyncClient, tmp_path: Path) -> None:
    content = b"0123456789" * 50_000
    answer = await client.post(
        "/documents", files={"file": ("jährlich.pdf", content, "application/pdf")}, data={"title": "Annual report"}
    )
    assert answer.status_code == 201
    document = answer.json()
    assert document["title"] == "Annual report"
    assert set(document["file"]) == {"size", "content_type", "original_filename", "checksum"}
    assert (document["file"]["size"], document["file"]["original_filename"]) == (len(content), "jährlich.pdf")
    assert len(stored(tmp_path)) == 1

    assert (await client.get("/documents")).json() == [document]
    assert (await client.get("/documents", params={"after": document["id"]})).json() == []
    url = f"/documents/{document['id']}"
    assert (await client.get(url)).json() == document

    answer = await client.get(f"{url}/file")
    assert answer.content == content
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''j%C3%A4hrlich.pdf"

    answer = await client.put(f"{url}/file", files={"file": ("new.txt", b"new", "text/plain")})
    assert answer.json()["file"]["size"] == 3
    assert (await client.get(f"{url}/file")).content == b"new"
    assert len(stored(tmp_path)) == 1

    assert (await client.delete(url)).status_code == 204
    assert stored(tmp_path) == []
    assert [(await client.get(path)).status_code for path in (url, f"{url}/file")] == [404, 404]
    assert (await client.delete(url)).status_code == 404


async def test_a_body_is_streamed_to_its_row(client: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield bytes(65536)

    answer = await client.put("/documents/raw/zeros.bin", content=body(), headers={"content-type": "application/x-zeros"})
    assert answer.status_code == 201
    file = answer.json()["file"]
    assert (file["size"], file["content_type"]) == (655360, "application/x-zeros")


@pytest.mark.parametrize("raw", [False, True], ids=["form", "raw"])
async def test_what_is_too_large_leaves_neither_row_nor_file(client: httpx.AsyncClient, tmp_path: Path, raw: bool) -> None:
    if raw:
        answer = await client.put("/documents/raw/large", content=bytes(1_000_001))
    else:
        answer = await client.post("/documents", files={"file": ("large", bytes(1_000_001))})
    assert answer.status_code == 413
    assert stored(tmp_path) == []
    assert (await client.get("/documents")).json() == []


async def test_a_missing_object_is_a_404(client: httpx.AsyncClient, tmp_path: Path) -> None:
    document = (await client.post("/documents", files={"file": ("a.txt", b"abc")})).json()
    stored(tmp_path)[0].unlink()
    assert (await client.get(f"/documents/{document['id']}/file")).status_code == 404


async def test_an_upload_that_breaks_off_leaves_nothing(example: Any, client: httpx.AsyncClient, tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield bytes(65536)
        raise ConnectionResetError("the visitor went away")

    with pytest.raises(ConnectionResetError):
        await client.put("/documents/raw/half", content=body())
    assert stored(tmp_path) == []
    assert (await client.get("/documents")).json() == []


async def test_started_as_documented(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "examples.fastapi_app:app", "--port", str(port), "--log-level", "warning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, env=environment)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            await _until_it_answers(client)
            uploads = [client.post("/documents", files={"file": (f"{n}.txt", b"%d" % n)}) for n in range(10)]
            answers = await asyncio.gather(*uploads)
            assert {answer.status_code for answer in answers} == {201}
            listed = (await client.get("/documents")).json()
            assert sorted(document["file"]["original_filename"] for document in listed) == [f"{n}.txt" for n in range(10)]
            for document in listed:
                content = (await client.get(f"/documents/{document['id']}/file")).content
                assert content.decode() == document["title"].removesuffix(".txt")
                assert (await client.delete(f"/documents/{document['id']}")).status_code == 204
            assert stored(tmp_path) == []
    finally:
        server.terminate()
        assert await server.wait() in {0, -15}


async def _until_it_answers(client: httpx.AsyncClient) -> None:
    for _ in range(300):
        try:
            await client.get("/documents")
        except httpx.TransportError:
            await asyncio.sleep(0.1)
        else:
            return
    pytest.fail("the application did not start")
