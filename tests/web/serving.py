"""What the tests of serving share: a manager with one object, and requests for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.web import StoredObjectResponse
from tests.core.support import SLOT, eventually, manager_on

HUNDRED = bytes(range(100))


def memory_manager() -> StorageManager:
    return manager_on(MemoryStorageBackend())


async def stored(
    manager: StorageManager, content: bytes, content_type: str | None = None, name: str | None = None
) -> StoredObjectRef:
    return await manager.put_bytes(**SLOT, content=content, content_type=content_type, original_filename=name)


def serving(manager: StorageManager, ref: StoredObjectRef, **options: Any) -> ASGIApp:
    """Return an application that answers everything with one object."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StoredObjectResponse(ref, Request(scope), manager=manager, **options)(scope, receive, send)

    return app


async def ask(app: ASGIApp, method: str = "GET", url: str = "http://files.example/", **headers: str) -> httpx.Response:
    """Make one request; underscores in a header's name stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
        return await client.request(method, url, headers=named)


def parts_of(response: httpx.Response) -> list[tuple[str, bytes]]:
    """Take a multipart/byteranges body apart: the Content-Range and the bytes of each part."""
    kind, _, boundary = response.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    pieces = response.content.split(f"\r\n--{boundary}".encode())
    assert (pieces[0], pieces[-1]) == (b"", b"--\r\n")
    parts = []
    for piece in pieces[1:-1]:
        head, _, body = piece.partition(b"\r\n\r\n")
        lines = dict(line.split(": ", 1) for line in head.decode().strip().split("\r\n"))
        parts.append((lines["Content-Range"], body))
    return parts


@contextlib.asynccontextmanager
async def server(app: ASGIApp) -> AsyncIterator[int]:
    """Serve an application with uvicorn, and give the port."""
    config = uvicorn.Config(app, log_level="critical", lifespan="off", ws="none")
    running = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.ensure_future(running._serve([listening]))
    await eventually(lambda: running.started)
    try:
        yield listening.getsockname()[1]
    finally:
        running.should_exit = running.force_exit = True
        await task
        listening.close()
