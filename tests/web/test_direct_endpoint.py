"""Direct uploads that the application receives itself: what a client sends wrong, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from granite_storage import BackendUnavailableError, StorageManager
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import bind_storage
from granite_storage.testing import FaultInjectingBackend
from granite_storage.web import DirectUpload, DirectUploads, UploadMissingError
from tests.core.support import eventually
from tests.web.direct_uploads import BASE, PDF, Client, client_of, uploads_of
from tests.web.receiving import MIB, Base, Document, manager_of, served, sliced, stored_in


@dataclass
class Place:
    manager: StorageManager
    backend: FaultInjectingBackend
    uploads: DirectUploads
    client: Client

    async def begin(self, **options: Any) -> DirectUpload:
        return await self.uploads.begin(Document.file, **{"content_type": "application/pdf", **options})


@pytest.fixture(params=["memory", "local"])
async def place(request: pytest.FixtureRequest, tmp_path: Any) -> AsyncIterator[Place]:
    inner = MemoryStorageBackend() if request.param == "memory" else LocalStorageBackend(tmp_path, fsync=False)
    backend = FaultInjectingBackend(inner)
    async with manager_of(backend) as manager:
        binding = bind_storage(Base, manager)
        uploads = uploads_of(binding)
        async with client_of(uploads) as client:
            yield Place(manager, backend, uploads, client)
        binding.unbind()


async def stored(place: Place) -> int:
    return len(await stored_in(place.manager))


async def test_a_second_file_is_refused(place: Place) -> None:
    upload = await place.client.sent(await place.begin())
    answer = await place.client.send(upload, b"%PDF-another")
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert "received already" in answer.json()["detail"]
    assert "again" not in answer.json()["detail"]
    assert await (await place.uploads.finish(upload.token, Document.file)).read() == PDF


async def test_two_files_at_the_same_time(place: Place) -> None:
    upload = await place.begin()
    contents = [b"%PDF-" + bytes([number]) * MIB for number in range(4)]
    answers = await asyncio.gather(*(place.client.send(upload, sliced(content, 65536)) for content in contents))
    assert sorted(answer.status_code for answer in answers) == [204, 409, 409, 409]
    assert await (await place.uploads.finish(upload.token, Document.file)).read() in contents


async def test_the_limit_holds_chunk_by_chunk(place: Place) -> None:
    passed = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal passed
        while True:
            passed += 1
            yield bytes(1000)

    upload = await place.begin(max_size=10_000)
    answer = await place.client.send(upload, endless())
    assert (answer.status_code, answer.json()["maximum"]) == (413, 10_000)
    assert passed < 20
    assert await stored(place) == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/html"}, 415),
        ({"Content-Type": "application/pdf; charset=utf-8"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Range": "bytes 0-3/17"}, 400),
        ({"Content-Length": "10000000000"}, 413),
        ({"Content-Length": "3"}, 422),
    ],
)
async def test_what_its_headers_say(place: Place, headers: dict[str, str], status: int) -> None:
    upload = await place.begin(min_size=5)
    answer = await place.client.send(upload, headers=headers)
    assert answer.status_code == status
    assert place.backend.calls == []


async def test_too_little(place: Place) -> None:
    upload = await place.begin(size=17)
    assert (await place.client.send(upload, sliced(PDF[:-1], 5))).status_code == 422
    assert await stored(place) == 0
    await place.client.sent(upload)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH"])
async def test_it_is_for_sending(place: Place, method: str) -> None:
    answer = await place.client.http.request(method, (await place.begin()).url)
    assert (answer.status_code, answer.headers["allow"]) == (405, "PUT")


@pytest.mark.case("CAN-05")
@pytest.mark.parametrize("size", [3, 3 * MIB])
async def test_a_client_that_goes_away_leaves_nothing(place: Place, size: int) -> None:
    upload = await place.begin()
    async with served(Starlette(routes=[Mount("/uploads", place.uploads)])) as port:
        path = upload.url.removeprefix("http://test")
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/pdf\r\nContent-Length: {4 * MIB}\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + bytes(size))
        await writer.drain()
        await eventually(lambda: place.backend.count("put_stream") == 1)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        with pytest.raises(UploadMissingError):
            await place.uploads.finish(upload.token, Document.file)
    assert await stored(place) == 0


@pytest.mark.case("SIG-01")
async def test_one_that_takes_too_long(place: Place) -> None:
    slow = uploads_of(place.uploads._binding, finish_within=timedelta(seconds=1))
    begun = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        yield b"%PDF-"
        begun.set()
        await asyncio.sleep(60)

    async with client_of(slow) as client:
        upload = await slow.begin(Document.file, content_type="application/pdf", expires_in=timedelta(seconds=1))
        answer = await client.send(upload, stalling())
    assert begun.is_set()
    assert answer.status_code == 403
    assert await stored(place) == 0


async def test_a_storage_out_of_reach(place: Place) -> None:
    upload = await place.begin()
    place.backend.fail("put_stream", error=BackendUnavailableError("it is out of reach"))
    answer = await place.client.send(upload)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "out of reach" not in answer.text
    await place.client.sent(upload)


async def test_a_websocket_is_refused(place: Place) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(3600)

    await place.uploads({"type": "websocket", "path": "/x"}, receive, send)
    assert sent == [{"type": "websocket.close"}]


async def test_a_large_file_over_the_network(place: Place) -> None:
    upload = await place.begin(size=20 * MIB)
    content = b"%PDF-" + bytes(20 * MIB - 5)
    async with served(Starlette(routes=[Mount("/uploads", place.uploads)])) as port, httpx.AsyncClient() as http:
        url = upload.url.replace(BASE, f"http://127.0.0.1:{port}/uploads")
        assert (await http.put(url, content=content, headers=dict(upload.headers))).status_code == 204
    assert (await place.uploads.finish(upload.token, Document.file)).size == 20 * MIB
