"""A request or a whole program ends while a session stores: a client that disconnects, and Ctrl+C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from granite_storage.orm import Attachment
from tests.orm.environment import Doc, OrmEnvironment, file

ROOT = Path(__file__).parents[2]


async def eventually(holds: Callable[[], Any]) -> None:
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen")


async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@contextlib.asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[int]:
    """Serve an application on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    listening = socket.create_server(("127.0.0.1", 0))
    task = asyncio.ensure_future(server._serve([listening]))
    try:
        await eventually(lambda: server.started)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task
        listening.close()


@pytest.mark.case("CAN-05", "STR-11")
@pytest.mark.parametrize("middleware", [[], [Middleware(BaseHTTPMiddleware, dispatch=passing)]], ids=["plain", "middleware"])
@pytest.mark.parametrize("change", ["insert", "replace"])
async def test_client_disconnects(env: OrmEnvironment, middleware: list[Middleware], change: str) -> None:
    """The half of a body that has arrived leaves no object, its row is as it was, and its connection is free again."""
    await env.add(Doc(id=1, file=file("a")))
    errors: list[BaseException] = []
    begun = asyncio.Event()

    async def body(request: Request) -> AsyncIterator[bytes]:
        async for chunk in request.stream():
            begun.set()
            yield chunk

    async def upload(request: Request) -> Response:
        try:
            async with env.sessions.begin() as session:
                new = Attachment(body(request), filename="new.bin")
                if change == "insert":
                    session.add(Doc(id=2, file=new))
                else:
                    (await session.get_one(Doc, 1)).file = new
        except BaseException as error:
            errors.append(error)
            raise
        return Response("stored")

    app = Starlette(routes=[Route("/", upload, methods=["PUT"])], middleware=middleware)
    async with serving(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n" + bytes(300_000))
        await asyncio.wait_for(begun.wait(), 30)
        writer.transport.abort()
        await eventually(lambda: errors)
        assert isinstance(errors[0], ClientDisconnect | asyncio.CancelledError)
        await eventually(lambda: env.engine.pool.checkedout() == 0)  # type: ignore[attr-defined]
    await env.check(file_1="a")


PROGRAM = """
import asyncio, json, signal, sys
from pathlib import Path
from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import Attachment, bind_storage
from tests.orm.values import Base, Document, add, sqlite

folder, stage = Path(sys.argv[1]), sys.argv[2]

async def endless():
    while True:
        await asyncio.sleep(0.001)
        yield b"x" * 65536
        print("going", flush=True)

async def main():
    policies = {key: StoragePolicy(key, "disk") for key in ("documents", "thumbnails")}
    async with StorageManager(backends={"disk": LocalStorageBackend(folder / "store")}, policies=policies) as manager:
        bind_storage(Base, manager)
        async with sqlite(folder) as sessions:
            kept = await add(sessions, Document(file=Attachment(b"kept")))
            print(json.dumps(kept.file.location), flush=True)
            async with sessions.begin() as session:
                (await session.get_one(Document, 1)).file = Attachment(b"new" if stage == "open" else endless())
                session.add(Document(file=Attachment(b"another")))
                await session.flush()
                while True:
                    print("going", flush=True)
                    await asyncio.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.case("CAN-04")
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("stage", ["uploading", "open"])
def test_a_keyboard_interrupt(tmp_path: Path, stage: str, times: int) -> None:
    """Ctrl+C in the midst of an upload, or in a transaction that has stored: the replaced file is there, and nothing else."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), stage],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        location = json.loads(process.stdout.readline())
        assert process.stdout.readline() == "going\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert times > 1 or said.endswith("interrupted\n"), errors
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file() and not path.name.startswith(".granite")]
    kept = tmp_path / "store" / location
    assert kept.read_bytes() == b"kept"
    if times == 1:
        assert left == [kept]
