"""The example application, over HTTP: in this process, and started as its documentation says."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.orm.databases import postgres, postgres_database

if TYPE_CHECKING:
    from tests.servers import S3Server

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


Objects = Callable[[], Awaitable[int]]


@pytest.fixture(scope="module", params=["as it is", "with PostgreSQL and S3"])
def services(request: pytest.FixtureRequest, _temporary_folder: Path) -> Iterator[tuple[dict[str, str], S3Server | None]]:
    """What the environment says to the application, and the server of its bucket."""
    if request.param == "as it is":
        yield {}, None
        return
    server: S3Server = request.getfixturevalue("seaweedfs_server")
    folder = _temporary_folder / "example"
    folder.mkdir(mode=0o700)  # as the system makes a folder of sockets
    with postgres(folder) as found, postgres_database(found, "asyncpg") as database:
        environment = {
            "DATABASE_URL": database.url.render_as_string(hide_password=False),
            "S3_BUCKET": server.shared_bucket,
            "AWS_ENDPOINT_URL_S3": server.endpoint_url,
            "AWS_ACCESS_KEY_ID": server.session_kwargs["aws_access_key_id"],
            "AWS_SECRET_ACCESS_KEY": server.session_kwargs["aws_secret_access_key"],
            "AWS_DEFAULT_REGION": server.session_kwargs["region_name"],
        }
        yield environment, server


@pytest.fixture
def objects(services: tuple[dict[str, str], S3Server | None], tmp_path: Path) -> Objects:
    """Count the objects that the application has stored."""
    environment, server = services

    async def count() -> int:
        if server is None:
            return len(stored(tmp_path))
        backend = server.backend(environment["S3_BUCKET"])
        found = [info async for info in backend.iter_objects("documents/")]
        await backend.aclose()
        return len(found)

    return count


async def test_started_as_documented(tmp_path: Path, services: tuple[dict[str, str], Any], objects: Objects) -> None:
    async with started(tmp_path, services[0]) as client:
        uploads = [client.post("/documents", files={"file": (f"{n}.txt", b"%d" % n)}) for n in range(10)]
        answers = await asyncio.gather(*uploads)
        assert {answer.status_code for answer in answers} == {201}
        listed = (await client.get("/documents")).json()
        assert sorted(document["file"]["original_filename"] for document in listed) == [f"{n}.txt" for n in range(10)]
        assert await objects() == 10
        for document in listed:
            content = (await client.get(f"/documents/{document['id']}/file")).content
            assert content.decode() == document["title"].removesuffix(".txt")
            assert (await client.delete(f"/documents/{document['id']}")).status_code == 204
        assert await objects() == 0


async def test_a_large_body_is_streamed_replaced_and_refused(
    tmp_path: Path, services: tuple[dict[str, str], Any], objects: Objects
) -> None:
    content = os.urandom(12_000_000)
    async with started(tmp_path, {**services[0], "MAX_SIZE": "20000000"}) as client:
        document = (await client.put("/documents/raw/film.mkv", content=content)).json()
        assert document["file"]["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        url = f"/documents/{document['id']}"
        assert (await client.get(f"{url}/file")).content == content
        answer = await client.put(f"{url}/file", files={"file": ("new.txt", b"new", "text/plain")})
        assert answer.json()["file"]["size"] == 3
        assert await objects() == 1
        answer = await client.put(f"{url}/file", files={"file": ("large", bytes(20_000_001))})
        assert answer.status_code == 413
        assert (await client.get(f"{url}/file")).content == b"new"
        assert await objects() == 1
        assert (await client.delete(url)).status_code == 204
        assert await objects() == 0


@asynccontextmanager
async def started(folder: Path, environment: Mapping[str, str]) -> AsyncIterator[httpx.AsyncClient]:
    """Run the documented command in a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "examples.fastapi_app:app", "--port", str(port), "--log-level", "warning"]
    chosen = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    server = await asyncio.create_subprocess_exec(*command, cwd=folder, env=chosen)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            await _until_it_answers(client)
            yield client
    finally:
        server.terminate()
        assert await server.wait() in {0, -15}


async def _until_it_answers(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            await client.get("/documents")
        except httpx.TransportError:
            await asyncio.sleep(0.1)
        else:
            return
    pytest.fail("the application did not start")
