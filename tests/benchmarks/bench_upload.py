"""Uploads of a form over a socket: straight into storage, and through Starlette's `UploadFile`."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.web import PolicyTarget, stream_body, stream_upload
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main

BOUNDARY = "----WebKitFormBoundary7MA4YWxkTrZu0gW"
HEAD = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="film.mkv"\r\n\r\n'.encode()
END = f"\r\n--{BOUNDARY}--\r\n".encode()

Endpoint = Callable[[Request, StorageManager], Awaitable[object]]


def target(manager: StorageManager) -> PolicyTarget:
    return PolicyTarget(manager=manager, storage_key="files", model_name="file", entity_id="1", field_name="content")


async def straight(request: Request, manager: StorageManager) -> None:
    await stream_upload(request, {"file": target(manager)})


async def body(request: Request, manager: StorageManager) -> None:
    await stream_body(request, target(manager))


async def spooled(request: Request, manager: StorageManager) -> None:
    """What Starlette does: a temporary file first, and then the storage."""
    async with request.form() as form:
        file = form["file"]
        assert not isinstance(file, str)
        await manager.put_stream(storage_key="files", model_name="file", entity_id="1", field_name="content", stream=file)


ENDPOINTS: dict[str, Endpoint] = {"straight": straight, "body": body, "spooled": spooled}


def client(port: int, size: int, method: str, pipe: Connection) -> None:
    """Be the client, in a process of its own: say that it is ready, wait to be let go, send one form and read the answer."""
    different = [os.urandom(MIB) for _ in range(4)]
    head, end = (HEAD, END) if method == "POST" else (b"", b"")
    length = len(head) + size + len(end)
    pipe.send("ready")
    pipe.recv()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"{method} / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n".encode()
            + head
        )
        for chunk in itertools.islice(itertools.cycle(different), size // MIB):
            connection.sendall(chunk)
        connection.sendall(end)
        pipe.send(connection.recv(1000))


@asynccontextmanager
async def sender(port: int, size: int, method: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Give what lets a client go, and waits until it is answered."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=client, args=(port, size, method, theirs))
    process.start()
    await asyncio.to_thread(ours.recv)

    async def send() -> None:
        ours.send("go")
        answer = await asyncio.to_thread(ours.recv)
        if b" 200 " not in answer:
            raise SystemExit(f"the upload failed: {answer!r}")

    yield send
    process.join()


@asynccontextmanager
async def served(app: Starlette) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.ensure_future(server._serve([listening]))
        while not server.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        await serving


@contextmanager
def folder() -> Iterator[Path]:
    """Give a folder on the disk that `TMPDIR` names; Starlette spools to it as well."""
    with tempfile.TemporaryDirectory(prefix="granite-bench-") as name:
        yield Path(name)


async def upload(meter: Meter, *, way: str, size: int) -> None:
    """Receive one large file."""
    endpoint = ENDPOINTS[way]
    method = "PUT" if way == "body" else "POST"

    async def receive(request: Request) -> Response:
        await endpoint(request, manager)
        return PlainTextResponse("stored")

    with folder() as root:
        manager = StorageManager(
            backends={"local": LocalStorageBackend(root, fsync=False)}, policies={"files": StoragePolicy("files", "local")}
        )
        async with manager, served(Starlette(routes=[Route("/", receive, methods=["POST", "PUT"])])) as port:
            async with sender(port, MIB, method) as send:
                await send()
            async with sender(port, size, method) as send, meter.measure(size=size):
                await send()


SIZE = int(os.environ.get("GRANITE_BENCH_MIB", 1024)) * MIB

COMPARISONS = [
    Comparison(
        f"form: {SIZE // MIB} MiB over a socket to the disk, no fsync",
        {
            "granite": Contender(upload, way="straight", size=SIZE),
            "UploadFile, then storage": Contender(upload, way="spooled", size=SIZE),
            "granite, a bare body": Contender(upload, way="body", size=SIZE),
        },
        baseline="UploadFile, then storage",
        reach=1.5,
        max_memory=32 * MIB,
        max_stall=0.020,
    )
]

if __name__ == "__main__":
    main(COMPARISONS)
