"""Clients that stop reading: nothing of the storage is held for them, and they get the rest when they go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.web import responses
from tests.core.support import MIB, eventually, local_manager, manager_on, open_files
from tests.servers import S3Server
from tests.web.serving import server, serving, stored

CONTENT = os.urandom(MIB) * 16  # more than the buffers of two sockets hold


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "_STALL_SECONDS", 0.3)


@contextlib.asynccontextmanager
async def asking(port: int, *headers: str) -> AsyncIterator[asyncio.StreamReader]:
    """Ask for the object, and read nothing of the answer but its headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    writer.write("\r\n".join(["GET / HTTP/1.1", "Host: x", *headers, "", ""]).encode())
    try:
        await reader.readuntil(b"\r\n\r\n")
        yield reader
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.case("RE-04")
@pytest.mark.parametrize("verify", [False, True])
async def test_nothing_is_held_open(tmp_path: Path, verify: bool) -> None:
    async with local_manager(tmp_path) as manager:
        ref = await stored(manager, CONTENT)
        async with server(serving(manager, ref, verify=verify)) as port, asking(port) as reader:
            await eventually(lambda: open_files(tmp_path))
            await eventually(lambda: not open_files(tmp_path))
            assert await reader.readexactly(len(CONTENT)) == CONTENT


@pytest.mark.case("RE-04")
async def test_one_that_goes_away(tmp_path: Path) -> None:
    async with local_manager(tmp_path) as manager:
        ref = await stored(manager, CONTENT)
        ended = asyncio.Event()
        async with server(noting(serving(manager, ref), ended)) as port:
            async with asking(port):
                await eventually(lambda: open_files(tmp_path))
                await eventually(lambda: not open_files(tmp_path))
            await asyncio.wait_for(ended.wait(), 10)


def noting(app: ASGIApp, ended: asyncio.Event) -> ASGIApp:
    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        ended.set()

    return noted


@pytest.fixture
async def s3(seaweedfs_server: S3Server) -> AsyncIterator[tuple[StorageManager, StoredObjectRef]]:
    bucket = await asyncio.to_thread(lambda: seaweedfs_server.shared_bucket)
    backend = seaweedfs_server.backend(bucket, prefix=uuid.uuid4().hex, max_pool_connections=4, pool_timeout=10)
    async with manager_on(backend) as manager:
        ref = await stored(manager, CONTENT)
        yield manager, ref
        await manager.delete(ref)


@pytest.mark.case("RE-04")
async def test_the_storage_serves_others(s3: tuple[StorageManager, StoredObjectRef]) -> None:
    """With places for four, twelve clients that do not read hold up nothing, and are served when they do."""
    manager, ref = s3
    async with server(serving(manager, ref)) as port, contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(20):
            readers = [await stack.enter_async_context(asking(port)) for _ in range(12)]
            for _ in range(4):
                other = await stored(manager, b"meanwhile")
                assert await manager.get(other) == b"meanwhile"
                await manager.delete(other)
        contents = await asyncio.gather(*(reader.readexactly(len(CONTENT)) for reader in readers))
    assert all(content == CONTENT for content in contents)
