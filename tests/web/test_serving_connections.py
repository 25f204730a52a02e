"""Serving on real connections: what is cut off, who goes away, and who does not read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.types import ASGIApp

from granite_storage import StorageManager
from granite_storage.backends.base import ObjectReader
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import BackendError
from tests.core.support import MIB, eventually, local_manager, manager_on, open_files
from tests.web.serving import server, serving, stored

SIZE = 8 * MIB


async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def dressed(app: ASGIApp, how: str) -> ASGIApp:
    if how == "plain":
        return app
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=passing)] if how == "middleware" else []
    return Starlette(routes=[Mount("/", app)], middleware=middleware)


@contextlib.asynccontextmanager
async def connected(port: int, *headers: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    lines = ["GET / HTTP/1.1", "Host: x", *headers]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Failing(MemoryStorageBackend):
    """Fails in the middle of a body, in a way that a backend must not."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.closed = 0

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        return _FailingReader(await super().open(location, offset=offset, length=length), self)


class _FailingReader:
    def __init__(self, inner: ObjectReader, backend: Failing) -> None:
        self.inner, self.backend, self.info, self.left = inner, backend, inner.info, 3

    async def read(self, size: int = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise self.backend.error
        return await self.inner.read(size)

    async def aclose(self) -> None:
        self.backend.closed += 1
        await self.inner.aclose()


ERRORS = [
    FileNotFoundError("gone"),
    OSError(5, "I/O error"),
    ConnectionResetError("reset"),
    BackendError("it broke"),
    ValueError("a bug"),
]


@pytest.mark.case("HTP-19")
@pytest.mark.parametrize(
    "headers", [(), ("Range: bytes=0-",), ("Range: bytes=0-2000000,-2000000",)], ids=["whole", "range", "ranges"]
)
@pytest.mark.parametrize("how", ["plain", "starlette", "middleware"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_a_body_that_goes_wrong(
    error: Exception, how: str, headers: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    backend = Failing(error)
    async with manager_on(backend) as manager:
        ref = await stored(manager, bytes(SIZE))
        async with server(dressed(serving(manager, ref), how)) as port, connected(port, *headers) as (reader, _):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            declared = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            assert head.startswith((b"http/1.1 200", b"http/1.1 206"))
            body = await reader.read(-1)
            assert 0 < len(body) < declared
            assert not body.endswith(b"--\r\n")
    assert backend.closed >= 1
    [record] = [record for record in caplog.records if record.name == "granite_storage"]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    raised = record.exc_info[1]
    assert not isinstance(raised, OSError)
    assert raised is error or raised.__cause__ is error  # type: ignore[union-attr]


@pytest.mark.case("HTP-19")
async def test_a_wrong_body_is_broken_off_where_it_is_verified(tmp_path: Path) -> None:
    async with local_manager(tmp_path) as manager:
        ref = await stored(manager, bytes(SIZE))
        file = tmp_path / ref.location
        file.chmod(0o600)
        file.write_bytes(bytes(SIZE - 1) + b"x")
        async with server(serving(manager, ref, verify=True)) as port, connected(port) as (reader, _):
            await reader.readuntil(b"\r\n\r\n")
            assert len(await reader.read(-1)) < SIZE


@pytest.mark.parametrize("how", ["plain", "starlette", "middleware"])
async def test_a_client_that_goes_away(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    async with local_manager(tmp_path) as manager:
        ref = await stored(manager, bytes(4 * SIZE))
        async with server(dressed(serving(manager, ref), how)) as port:
            for _ in range(3):
                async with connected(port) as (reader, _writer):
                    assert await reader.readexactly(100)
                    await eventually(lambda: open_files(tmp_path))
                await eventually(lambda: not open_files(tmp_path))
    assert not [record for record in caplog.records if record.name == "granite_storage"]


class Silent(Failing):
    """Never answers a read."""

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        reader = _FailingReader(await MemoryStorageBackend.open(self, location, offset=offset, length=length), self)
        reader.read = lambda size=-1, /: asyncio.sleep(3600)  # type: ignore[assignment,method-assign]
        return reader


async def test_a_client_that_goes_away_while_storage_is_silent() -> None:
    backend = Silent(BackendError())
    async with manager_on(backend) as manager:
        ref = await stored(manager, bytes(SIZE))
        async with server(serving(manager, ref)) as port:
            async with connected(port) as (reader, _):
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.05)
                assert not backend.closed
            await eventually(lambda: backend.closed, within=10)


class Counting(MemoryStorageBackend):
    """Counts the bytes that are read."""

    count = 0

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        return _CountingReader(await super().open(location, offset=offset, length=length), self)


class _CountingReader:
    def __init__(self, inner: ObjectReader, backend: Counting) -> None:
        self.inner, self.backend, self.info, self.aclose = inner, backend, inner.info, inner.aclose

    async def read(self, size: int = -1, /) -> bytes:
        chunk = await self.inner.read(size)
        self.backend.count += len(chunk)
        return chunk


async def test_a_client_that_does_not_read() -> None:
    backend = Counting()
    async with manager_on(backend) as manager:
        ref = await stored(manager, bytes(64 * MIB))
        async with server(serving(manager, ref)) as port, connected(port):
            await eventually(lambda: backend.count)
            before = -1
            while before != backend.count:
                before = backend.count
                await asyncio.sleep(0.2)
            assert backend.count < 16 * MIB  # what the buffers of the two sockets hold


async def test_cancelled(tmp_path: Path) -> None:
    async with local_manager(tmp_path) as manager:
        ref = await stored(manager, bytes(SIZE))
        await _cancel_at_every_send(manager, ref)
        assert not open_files(tmp_path)


async def _cancel_at_every_send(manager: StorageManager, ref: Any) -> None:
    for number in range(4):
        reached = asyncio.Event()
        sent = 0

        async def send(_: Any) -> None:
            nonlocal sent
            if sent == number:  # noqa: B023  # it is used in this turn only
                reached.set()  # noqa: B023
                await asyncio.sleep(3600)
            sent += 1

        async def receive() -> Any:
            await asyncio.sleep(3600)

        scope = {"type": "http", "method": "GET", "headers": []}
        task = asyncio.ensure_future(serving(manager, ref)(scope, receive, send))  # type: ignore[arg-type]
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
