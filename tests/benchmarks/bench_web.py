"""What serving costs: a large local file through uvicorn beside Starlette's own FileResponse, and many slow readers."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.web import StoredObjectResponse
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main

SIZE = int(os.environ.get("BENCH_WEB_MIB", "1024")) * MIB
READERS = int(os.environ.get("BENCH_WEB_READERS", "64"))

# In a process of its own, so that what is measured is the server; it reads everything and keeps nothing.
CLIENT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
buffer = bytearray(1 << 20)
total = 0
while count := connection.recv_into(buffer):
    total += count
print(total)
"""


@asynccontextmanager
async def served(kind: str) -> AsyncIterator[int]:
    """Serve a file of zeros, by ours or by Starlette, and give the port."""
    with tempfile.TemporaryDirectory() as folder:
        manager = StorageManager(
            backends={"local": LocalStorageBackend(folder)}, policies={"files": StoragePolicy("files", "local")}
        )
        file = Path(folder, "file")
        with file.open("wb") as target:
            for _ in range(SIZE // MIB):
                target.write(bytes(MIB))
        async with manager, listening(_app(kind, manager, file)) as port:
            yield port


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as socket_:
        task = asyncio.ensure_future(server._serve([socket_]))
        while not server.started:  # noqa: ASYNC110  # it has no event to wait for
            await asyncio.sleep(0.01)
        yield socket_.getsockname()[1]
        server.should_exit = server.force_exit = True
        await task


def _app(kind: str, manager: StorageManager, file: Path) -> ASGIApp:
    ref = StoredObjectRef("files", "local", file.name, SIZE, "sha256:" + "0" * 64, created_at="2024-01-01T00:00:00+00:00")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if kind == "granite":
            await StoredObjectResponse(ref, Request(scope), manager=manager)(scope, receive, send)
        else:
            await FileResponse(file)(scope, receive, send)

    return app


async def download(meter: Meter, *, kind: str) -> None:
    async with served(kind) as port:
        async with meter.measure(size=SIZE):
            client = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, str(port), stdout=subprocess.PIPE)
            answered, _ = await client.communicate()
        if int(answered) < SIZE:
            raise SystemExit(f"only {int(answered)} bytes came")


async def slow_readers(meter: Meter, *, kind: str) -> None:
    async with served(kind) as port, AsyncExitStack() as stack, meter.measure(operations=READERS):
        for _ in range(READERS):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, ("127.0.0.1", port))
            await loop.sock_sendall(connection, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await loop.sock_recv(connection, 1024)
        await asyncio.sleep(2)


COMPARISONS = [
    Comparison(
        f"{SIZE // MIB} MiB from disk through uvicorn",
        {"granite": Contender(download, kind="granite"), "FileResponse": Contender(download, kind="starlette")},
        baseline="FileResponse",
        reach=1 / 1.15,
        max_memory=16 * MIB,
    ),
    Comparison(
        f"{READERS} readers that stop reading",
        {"granite": Contender(slow_readers, kind="granite"), "FileResponse": Contender(slow_readers, kind="starlette")},
        baseline="FileResponse",
        max_memory=READERS * MIB,
        rounds=1,
    ),
]

if __name__ == "__main__":
    main(COMPARISONS)
