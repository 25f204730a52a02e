"""Uploads and downloads over HTTP, on a real server with real connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from granite_storage import ContentTooLargeError, StorageManager, StoredObjectRef
from tests.core.support import MIB, SLOT, eventually, left_below, local_manager, open_files

CONTENT = bytes(range(256)) * 4096 * 12


class App:
    """Takes uploads by stream and by form, and serves downloads."""

    def __init__(self, manager: StorageManager) -> None:
        self.manager = manager
        self.refs: list[StoredObjectRef] = []
        self.errors: list[BaseException] = []

    async def upload(self, request: Request) -> Response:
        declared = request.headers.get("content-length")
        try:
            ref = await self.manager.put_stream(**SLOT, stream=request.stream(), size=int(declared) if declared else None)
        except ContentTooLargeError as error:
            return JSONResponse({"max_size": error.max_size}, status_code=413)
        except BaseException as error:
            self.errors.append(error)
            raise
        self.refs.append(ref)
        return JSONResponse(ref.to_dict())

    async def form(self, request: Request) -> Response:
        async with request.form() as form:
            file = form["file"]
            assert not isinstance(file, str)
            ref = await self.manager.put_stream(
                **SLOT, stream=file, original_filename=file.filename, content_type=file.content_type
            )
        return JSONResponse(ref.to_dict())

    async def download(self, request: Request) -> Response:
        reader = await self.manager.open(self.refs[0], offset=int(request.query_params.get("offset", 0)))
        return StreamingResponse(reader, headers={"Content-Length": str(reader.size)})


async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@pytest.fixture
def app(tmp_path: Path) -> App:
    return App(local_manager(tmp_path, max_size=16 * MIB))


@pytest.fixture(params=["plain", "behind BaseHTTPMiddleware"])
async def url(app: App, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    routes = [
        Route("/", app.upload, methods=["PUT"]),
        Route("/", app.form, methods=["POST"]),
        Route("/", app.download, methods=["GET"]),
    ]
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=passing)] if request.param != "plain" else []
    config = uvicorn.Config(Starlette(routes=routes, middleware=middleware), log_level="critical", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.ensure_future(server._serve([listening]))
    await eventually(lambda: server.started)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = server.force_exit = True
    await serving
    listening.close()


async def body(size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(CONTENT), size):
        yield CONTENT[start : start + size]


async def test_up_and_down(app: App, url: str) -> None:
    async with httpx.AsyncClient() as client:
        stored = (await client.put(url, content=body())).json()
        assert stored["size"] == len(CONTENT)
        assert (await client.get(url)).content == CONTENT
        assert (await client.get(url, params={"offset": len(CONTENT) - 5})).content == CONTENT[-5:]


async def test_an_uploaded_form(app: App, url: str) -> None:
    async with httpx.AsyncClient() as client:
        stored = (await client.post(url, files={"file": ("../../a b.TXT", CONTENT, "text/plain")})).json()
    assert (stored["size"], stored["original_filename"], stored["content_type"]) == (len(CONTENT), "a b.TXT", "text/plain")


@pytest.mark.case("LIM-02", "LIM-03")
@pytest.mark.parametrize("declared", [True, False])
async def test_too_much(app: App, url: str, tmp_path: Path, declared: bool) -> None:
    async def too_much() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield bytes(MIB)

    headers = {"Content-Length": str(17 * MIB)} if declared else {}
    async with httpx.AsyncClient() as client:
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            response = await client.put(url, content=too_much(), headers=headers)
            assert (response.status_code, response.json()) == (413, {"max_size": 16 * MIB})
    assert left_below(tmp_path) == []


@pytest.mark.case("STR-11", "CAN-05")
async def test_a_client_that_goes_away_while_it_sends(app: App, url: str, tmp_path: Path) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2].rstrip("/")))
    writer.write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n" + bytes(3 * MIB))
    await writer.drain()
    await eventually(lambda: open_files(tmp_path) or left_below(tmp_path))
    writer.transport.abort()
    await eventually(lambda: app.errors)
    assert isinstance(app.errors[0], ClientDisconnect)
    assert app.refs == []
    await eventually(lambda: left_below(tmp_path) == [])


@pytest.mark.case("STR-13")
async def test_a_client_that_goes_away_while_it_receives(app: App, url: str, tmp_path: Path) -> None:
    app.refs.append(await app.manager.put_bytes(**SLOT, content=CONTENT))
    for _ in range(3):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2].rstrip("/")), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read(10)
        assert open_files(tmp_path)
        writer.transport.abort()
        await eventually(lambda: not open_files(tmp_path))
