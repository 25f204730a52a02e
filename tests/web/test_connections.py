"""Clients on real connections: some go away, some dawdle, some send more than they may."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from granite_storage import StorageBackend
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.web import FileList, FilePart, UploadLimits, stream_upload
from tests.core.support import eventually
from tests.web.receiving import BOUNDARY, CRLF, END, MIB, App, Document, part, served, stored_in

Send = Callable[[bytes], Awaitable[None]]

EVERY_KIND = pytest.mark.parametrize("backend", ["memory", "local", "s3-seaweedfs"], indirect=True)
IN_EVERY_WAY = pytest.mark.parametrize("sending", ["sized", "chunked"])


async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@pytest.fixture(params=["plain", "behind BaseHTTPMiddleware"])
async def port(request: pytest.FixtureRequest, receiving: App) -> AsyncIterator[int]:
    middleware = [] if request.param == "plain" else [Middleware(BaseHTTPMiddleware, dispatch=passing)]
    async with served(receiving.asgi(*middleware)) as port:
        yield port


def head(target: str, *headers: str) -> bytes:
    lines = [target + " HTTP/1.1", "Host: x", f"Content-Type: multipart/form-data; boundary={BOUNDARY}", *headers, "", ""]
    return CRLF.join(line.encode() for line in lines)


class Raw:
    """A client that sends what it is told, sized or in chunks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sending: str) -> None:
        self.reader = reader
        self.writer = writer
        self.chunked = sending == "chunked"

    async def begin(self, target: str, size: int) -> None:
        self.writer.write(head(target, "Transfer-Encoding: chunked" if self.chunked else f"Content-Length: {size}"))
        await self.writer.drain()

    async def send(self, content: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(content), content) if self.chunked else content)
        await self.writer.drain()

    async def end(self) -> None:
        self.writer.write(b"0\r\n\r\n" if self.chunked else b"")
        await self.writer.drain()

    async def status(self) -> int:
        return int((await self.reader.readline()).split()[1])


@asynccontextmanager
async def connected(port: int, sending: str = "sized") -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Raw(reader, writer, sending)
    finally:
        if not writer.is_closing():
            writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def open_uploads(backend: StorageBackend) -> list[str]:
    """The uploads in parts that are open in a bucket."""
    if not isinstance(backend, S3StorageBackend):
        return []
    async with backend.client() as client:
        answer = await client.list_multipart_uploads(Bucket=backend.bucket)
    return [upload["Key"] for upload in answer.get("Uploads", ())]


@EVERY_KIND
@IN_EVERY_WAY
@pytest.mark.case("STR-11", "CAN-05")
@pytest.mark.parametrize("leaving", ["abort", "close", "half-close"])
async def test_a_client_that_goes_away(backend: StorageBackend, receiving: App, port: int, sending: str, leaving: str) -> None:
    """In the middle of its second file, when the first is stored and much of the second has been."""
    first = part("file", os.urandom(100_000), filename="first")
    second = part("ref", os.urandom(18 * MIB), filename="second")
    async with connected(port, sending) as raw:
        await raw.begin("POST /form", 10**9)
        await raw.send(first)
        for start in range(0, len(second), MIB):
            await raw.send(second[start : start + MIB])
        if leaving == "abort":
            raw.writer.transport.abort()
        elif leaving == "close":
            raw.writer.close()
        else:
            raw.writer.write_eof()
        await eventually(lambda: receiving.errors)
    assert isinstance(receiving.errors[0], ClientDisconnect)
    assert await stored_in(receiving.manager) == []
    assert await open_uploads(backend) == []


@IN_EVERY_WAY
@pytest.mark.case("CAN-05")
@pytest.mark.parametrize("target", ["PUT /body/a", "PUT /body/a?ref"])
async def test_a_client_that_goes_away_in_a_body(receiving: App, port: int, sending: str, target: str) -> None:
    async with connected(port, sending) as raw:
        await raw.begin(target, 3 * MIB)
        await raw.send(bytes(3 * MIB - 1))
    await eventually(lambda: receiving.errors)
    assert isinstance(receiving.errors[0], ClientDisconnect)
    assert await stored_in(receiving.manager) == []


@IN_EVERY_WAY
async def test_a_client_that_goes_away_after_the_last_boundary(receiving: App, port: int, sending: str) -> None:
    """The form looks whole, but the request is not."""
    form = part("file", b"x" * 1000, filename="a") + END
    async with connected(port, sending) as raw:
        await raw.begin("POST /form", len(form) + 1)
        await raw.send(form)
    await eventually(lambda: receiving.errors)
    assert await stored_in(receiving.manager) == []


@IN_EVERY_WAY
async def test_a_client_that_dawdles(receiving: App, port: int, sending: str) -> None:
    form = part("title", b"x") + part("file", b"slow", filename="a") + END
    async with connected(port, sending) as raw:
        await raw.begin("POST /form", len(form))
        for byte in form:
            await raw.send(bytes([byte]))
            await asyncio.sleep(0.002)
        await raw.end()
        assert await raw.status() == 200
    assert await receiving.forms[0].files["file"].read() == b"slow"


@IN_EVERY_WAY
@pytest.mark.case("LIM-02", "LIM-03")
async def test_a_client_that_sends_too_much(receiving: App, port: int, sending: str) -> None:
    """It is answered while it still sends, or before it begins where it says how much it means to send."""
    receiving.limits = UploadLimits(max_size=2 * MIB)
    async with connected(port, sending) as raw:
        await raw.begin("POST /form", 3 * MIB)
        if sending == "chunked":
            await raw.send(part("file", filename="a").removesuffix(CRLF))
            with suppress(ConnectionError):
                for _ in range(3):
                    await raw.send(bytes(MIB))
        assert await raw.status() == 413
    assert await stored_in(receiving.manager) == []


async def test_a_slow_storage_holds_up_the_client(receiving: App) -> None:
    """Bytes that were not asked for stay with the client: memory is bounded without a limit on anything."""
    go_on = asyncio.Event()

    async def slow(file: FilePart) -> int:
        await go_on.wait()
        return sum([len(chunk) async for chunk in file])

    async def endpoint(request: Request) -> Response:
        form = await stream_upload(request, {"file": slow})
        return Response(str(form.files["file"]))

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        response = await endpoint(Request(scope, receive))  # type: ignore[arg-type]
        await response(scope, receive, send)  # type: ignore[arg-type]

    async with served(app) as port, connected(port, "chunked") as raw:
        await raw.begin("POST /form", 0)
        await raw.send(part("file", filename="a").removesuffix(CRLF))
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(64):
                await raw.send(bytes(MIB))
                sent += MIB

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.5)
        assert sent < 16 * MIB  # what the sockets of the system hold
        go_on.set()
        await flooding
        await raw.send(CRLF + END)
        await raw.end()
        assert await raw.status() == 200
        assert str(64 * MIB).encode() in await raw.reader.read(1000)


@EVERY_KIND
@pytest.mark.case("CAN-05")
async def test_a_sibling_that_fails(backend: StorageBackend, receiving: App) -> None:
    """The task group of the request is cancelled in the middle of the second file."""
    begun = asyncio.Event()

    async def receive() -> dict[str, object]:
        if not sent:
            begun.set()
            await asyncio.Event().wait()
        return {"type": "http.request", "body": sent.pop(0), "more_body": True}

    sent = [
        part("file", bytes(1000), filename="a"),
        part("ref", bytes(1000), filename="b"),
        part("file", bytes(MIB), filename="c")[:-2],
    ]
    headers = [(b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode())]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)  # type: ignore[arg-type]

    async def fail() -> None:
        await begun.wait()
        raise RuntimeError("a sibling failed")

    with pytest.raises(ExceptionGroup, match="unhandled"):
        async with asyncio.TaskGroup() as group:
            group.create_task(stream_upload(request, {"file": FileList(Document.file, 2), "ref": receiving.ref_target}))
            group.create_task(fail())
    assert await stored_in(receiving.manager) == []
    assert await open_uploads(backend) == []
