"""Clients that go away before an answer has begun: nothing is logged as an error, whatever middleware stands around."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import bind_storage
from granite_storage.web import StoredObjectResponse
from tests.core.support import MIB, eventually, manager_on
from tests.web.direct_uploads import uploads_of
from tests.web.receiving import Base, Document, manager_of
from tests.web.serving import server, stored


class Slow(MemoryStorageBackend):
    """Takes its time with one operation until it is let go, and counts who waits there."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation
        self.waiting = self.left = 0
        self.hold = False

    async def _pause(self, operation: str) -> None:
        if self.hold and operation == self.operation:
            self.waiting += 1
            try:
                await asyncio.sleep(3600)
            finally:
                self.left += 1

    async def stat(self, location: str) -> Any:
        await self._pause("stat")
        return await super().stat(location)

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        await self._pause("open")
        reader = await super().open(location, offset=offset, length=length)
        read = reader.read

        async def slow(size: int = -1, /) -> bytes:
            await self._pause("read")
            return await read(size)

        reader.read = slow  # type: ignore[method-assign]
        return reader


def with_middleware(app: FastAPI, count: int) -> FastAPI:
    for _ in range(count):

        @app.middleware("http")
        async def passing(request: Request, call_next: Callable[[Request], Any]) -> Response:
            response: Response = await call_next(request)
            return response

    return app


@contextlib.asynccontextmanager
async def left_early(port: int, head: str) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}\r\nHost: x\r\n".encode() + b"\r\n")
    try:
        yield reader
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Watched:
    """An application, and what it has raised to the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.errors: list[BaseException] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            self.errors.append(error)
            raise


def require_quiet(caplog: pytest.LogCaptureFixture, watched: Watched | None = None) -> None:
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert watched is None or watched.errors == []


@pytest.mark.case("RB-12")
@pytest.mark.parametrize("operation", ["open", "stat", "read"])
@pytest.mark.parametrize("middleware", [0, 1, 2])
@pytest.mark.parametrize("compressed", [False, True], ids=["", "gzip"])
async def test_a_download(operation: str, middleware: int, compressed: bool, caplog: pytest.LogCaptureFixture) -> None:
    backend = Slow(operation)
    async with manager_on(backend) as manager:
        ref = await stored(manager, bytes(MIB))
        backend.hold = True
        app = FastAPI()
        if compressed:
            app.add_middleware(GZipMiddleware)
        with_middleware(app, middleware)

        @app.api_route("/", methods=["GET", "HEAD"])
        async def download(request: Request) -> StoredObjectResponse:
            return StoredObjectResponse(ref, request, manager=manager)

        watched = Watched(app)
        async with server(watched) as port:
            for number in range(2):
                async with left_early(port, f"{'HEAD' if operation == 'stat' else 'GET'} / HTTP/1.1"):
                    await eventually(lambda number=number: backend.waiting == number + 1)
                await eventually(lambda number=number: backend.left == number + 1)
            await asyncio.sleep(0.05)
    require_quiet(caplog, watched)


@pytest.mark.case("RB-12")
@pytest.mark.parametrize("compressed", [False, True], ids=["", "gzip"])
async def test_an_answer_that_had_begun(compressed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its headers were sent, and held back by a compressor that waits for the first bytes."""
    sent: list[Any] = []
    backend = Slow("read")
    gone = asyncio.Event()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async with manager_on(backend) as manager:
        ref = await stored(manager, bytes(MIB))
        backend.hold = True

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await StoredObjectResponse(ref, Request(scope), manager=manager)(scope, receive, send)

        scope = {"type": "http", "method": "GET", "headers": [(b"accept-encoding", b"gzip")]}
        dressed = GZipMiddleware(app) if compressed else app
        task = asyncio.ensure_future(dressed(scope, receive, send))
        await eventually(lambda: backend.waiting)
        gone.set()
        await task
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (sent[0]["status"], sent[1]["body"]) == (200, b"")
    require_quiet(caplog)


@pytest.mark.case("RB-12")
async def test_a_server_that_tells_it_when_something_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        raise OSError("the client is gone")

    async with manager_on(MemoryStorageBackend()) as manager:
        ref = await stored(manager, b"x")
        scope = {"type": "http", "method": "GET", "headers": []}
        await StoredObjectResponse(ref, Request(scope), manager=manager)(scope, receive, send)
    require_quiet(caplog)


@pytest.mark.case("RB-12")
@pytest.mark.parametrize("middleware", [0, 1])
async def test_a_direct_upload(middleware: int, caplog: pytest.LogCaptureFixture) -> None:
    async with manager_of(MemoryStorageBackend()) as manager:
        binding = bind_storage(Base, manager)
        try:
            uploads = uploads_of(binding)
            app = with_middleware(FastAPI(), middleware)
            app.mount("/uploads", uploads)
            upload = await uploads.begin(Document.file, content_type="text/plain")
            path = upload.url.removeprefix("http://test")
            watched = Watched(app)
            async with server(watched) as port:
                head = f"PUT {path} HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: 1000"
                async with left_early(port, head):
                    await asyncio.sleep(0.1)
                await asyncio.sleep(0.2)
        finally:
            binding.unbind()
    require_quiet(caplog, watched)


async def test_an_end_of_the_body_that_is_repeated() -> None:
    """A `receive` that something wraps may never wait: the answer is sent, and other tasks go on."""

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async with manager_on(MemoryStorageBackend()) as manager:
        ref = await stored(manager, b"x" * MIB, "image/png")
        scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
        async with asyncio.timeout(10):
            await StoredObjectResponse(ref, Request(scope), manager=manager)(scope, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b"x" * MIB
