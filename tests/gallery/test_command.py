"""The gallery, started as its documentation says: as it is, and with PostgreSQL and S3."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.gallery.support import files_in, picture, stored, upload
from tests.gallery.test_http import settled
from tests.inspection.corpus import content_of
from tests.orm.databases import postgres, postgres_database

if TYPE_CHECKING:
    from tests.servers import S3Server

ROOT = Path(__file__).parents[2]
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
    """Count the objects that the gallery has stored."""
    environment, server = services

    async def count() -> int:
        if server is None:
            return len(stored(tmp_path))
        backend = server.backend(environment["S3_BUCKET"])
        found = [info async for info in backend.iter_objects("gallery/")]
        await backend.aclose()
        return len(found)

    return count


async def test_a_gallery_on_any_database_and_storage(
    tmp_path: Path, services: tuple[dict[str, str], S3Server | None], objects: Objects
) -> None:
    content = content_of("film.mkv") + os.urandom(12_000_000)
    text = {"content-type": "text/plain"}
    async with started(tmp_path, {**services[0], "MAX_SIZE": "20_000_000"}) as client:
        posts = [client.post("/albums/1/files", params={"name": f"{n}.txt"}, content=b"%d" % n, headers=text) for n in range(10)]
        answers = await asyncio.gather(*posts)
        assert {answer.status_code for answer in answers} == {201}
        files = await files_in(client)
        assert sorted(file["file"]["original_filename"] for file in files) == [f"{n}.txt" for n in range(10)]
        assert await objects() == 10

        url = f"/files/{files[0]['id']}"
        file = (await client.put(url, content=content, headers={"content-type": "video/x-matroska"})).json()
        assert file["file"]["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        part = await client.get(url, headers={"range": "bytes=9000000-9000099"})
        assert (part.status_code, part.content) == (206, content[9_000_000:9_000_100])
        assert (await client.put(url, content=bytes(20_000_001), headers=text)).status_code == 413
        assert (await client.get(url)).content == content
        await until(objects, 10)

        file = await sent_directly(client, content)
        assert file["file"]["checksum"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert (await client.get(f"/files/{file['id']}")).content == content
        assert await objects() == 12  # where it was sent to, until it can no longer be sent, and the copy
        assert (await client.delete(f"/files/{file['id']}")).status_code == 204
        await until(objects, 11)

        failed = (await client.post("/rollback", params={"fail": True})).json()
        assert failed["error"]
        assert await settled(client) == failed["before"]
        kept = (await client.post("/rollback", params={"fail": False})).json()
        assert (kept["before"], kept["error"]) == (failed["before"], None)
        assert len((await settled(client))["files"]) == 2
        assert [len(seen["during"]["files"]) for seen in (failed, kept)] == [4, 4]

        file = await upload(client, "a.png", picture(2000, 1000), "image/png")
        await until(lambda: is_pending(client, file["id"]), False)
        await until(objects, 14)
        assert (await client.delete("/albums/1")).status_code == 204
        await until(objects, 1)


async def test_what_is_in_a_folder_is_there_again(tmp_path: Path) -> None:
    async with started(tmp_path, {}) as client:
        file = await upload(client)
    async with started(tmp_path, {}) as client:
        assert await files_in(client) == [file]
        assert (await client.get(f"/files/{file['id']}")).content == b"abc"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
async def test_a_folder_that_nobody_chose_goes_at_the_end(tmp_path: Path, end: signal.Signals) -> None:
    async with started(tmp_path, {"TMPDIR": str(tmp_path)}, folder=None, end=end) as client:
        await upload(client)
        assert list(tmp_path.glob("gallery-*/files/gallery/**/*.txt"))
    assert list(tmp_path.iterdir()) == []


async def until(look: Callable[[], Awaitable[object]], expected: object) -> None:
    """Wait for what the journal's worker does."""
    deadline = time.monotonic() + 60
    while (found := await look()) != expected:
        assert time.monotonic() < deadline, f"{found!r}"
        await asyncio.sleep(0.1)


async def is_pending(client: httpx.AsyncClient, file_id: int) -> bool:
    return bool((await client.get(f"/files/{file_id}/state")).json()["is_pending"])


async def sent_directly(client: httpx.AsyncClient, content: bytes) -> Any:
    """Do what the page does: ask where to, send it there, and say that it has arrived."""
    announced = {"name": "film.mkv", "type": "video/x-matroska", "size": len(content)}
    upload = (await client.post("/albums/1/direct/begin", json=announced)).json()
    body: dict[str, Any] = {"content": content}
    if upload["method"] == "POST":
        body = {"data": upload["fields"], "files": {"file": ("film.mkv", content, announced["type"])}}
    headers = upload["headers"] | dict(client.headers if upload["url"].startswith("/") else {})
    async with httpx.AsyncClient(timeout=60) as plain:
        answer = await plain.request(upload["method"], client.base_url.join(upload["url"]), headers=headers, **body)
    assert answer.is_success, answer.text
    return (await client.post("/albums/1/direct/finish", json={"token": upload["token"]})).json()


@asynccontextmanager
async def started(
    tmp_path: Path, environment: Mapping[str, str], *, folder: str | None = "data", end: signal.Signals = signal.SIGINT
) -> AsyncIterator[httpx.AsyncClient]:
    """Run the documented command, and end it, as a person does by Ctrl+C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "examples.gallery", "--port", str(port)]
    if folder is not None:
        command += ["--folder", str(tmp_path / folder)]
    chosen = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    server = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=chosen, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    try:
        assert f"http://127.0.0.1:{port}" in (await server.stdout.readline()).decode()
        links = [(await server.stdout.readline()).decode().strip() for _ in ("Anna", "Ben")]
        assert [link.partition("=")[0] for link in links] == [
            f"{name}: http://127.0.0.1:{port}/#sign-in" for name in ("Anna", "Ben")
        ]
        token = links[0].partition("=")[2]
        assert len(token) > 40
        headers = {"X-Gallery": "1"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            await _until_it_answers(client)
            assert (await client.post("/session", json={"token": token})).status_code == 204
            yield client
    finally:
        server.send_signal(end)
        await server.communicate()
    assert server.returncode == 0


async def _until_it_answers(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            await client.get("/session")
        except httpx.TransportError:
            await asyncio.sleep(0.1)
        else:
            return
    pytest.fail("the gallery did not start")
