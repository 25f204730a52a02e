"""An S3 server with faults: a proxy before a real one that answers wrongly, loses answers or cuts bodies when it is told to.

    with fault_proxy(server.endpoint_url) as proxy:
        proxy.on("UploadPart", answer(503, "SlowDown"), times=2)
        backend = server.backend(bucket, endpoint_url=proxy.url)

Each request meets the first of the rules that fit it and are not used up; where none fits it is passed on as it is.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = [
    "FaultProxy",
    "Gate",
    "Request",
    "answer",
    "answer_after",
    "answer_with_header",
    "answer_without_header",
    "cut_body",
    "fault_proxy",
    "lose_answer",
    "lose_request",
    "wait_for",
    "without_header",
]

Fault = Callable[["Request"], Awaitable[bytes | None]]
"""Returns what the client gets, None for a connection that closes without an answer."""


@dataclass
class Request:
    """What a client asked, and how to pass it on."""

    method: str
    target: str
    headers: dict[str, str]
    read_body: Callable[[], Awaitable[bytes]]
    upstream: str
    operation: str = field(init=False)
    query: dict[str, list[str]] = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.target)
        self.query = parse_qs(parts.query, keep_blank_values=True)
        self.key = unquote(parts.path).removeprefix("/").partition("/")[2]
        self.operation = _operation(self)

    async def forward(self) -> bytes:
        """Have the server do it, and return the server's whole answer."""
        body = await self.read_body()
        host = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(host.hostname, host.port)
        try:
            sent = {**self.headers, "connection": "close"}
            sent.pop("expect", None)
            head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
            writer.write(f"{self.method} {self.target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


_BY_QUERY = {
    ("POST", "uploads"): "CreateMultipartUpload",
    ("POST", "uploadId"): "CompleteMultipartUpload",
    ("POST", "delete"): "DeleteObjects",
    ("DELETE", "uploadId"): "AbortMultipartUpload",
    ("GET", "uploadId"): "ListParts",
    ("GET", "uploads"): "ListMultipartUploads",
    ("GET", "list-type"): "ListObjectsV2",
}
_BY_METHOD = {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}


def _operation(request: Request) -> str:
    copies = "x-amz-copy-source" in request.headers
    if request.method == "PUT" and "partNumber" in request.query:
        return "UploadPartCopy" if copies else "UploadPart"
    for (method, parameter), operation in _BY_QUERY.items():
        if method == request.method and parameter in request.query:
            return operation
    if request.method == "HEAD" and not request.key:
        return "HeadBucket"
    return "CopyObject" if copies else _BY_METHOD.get(request.method, request.method)


@dataclass
class _Rule:
    operation: str
    fault: Fault
    times: int
    fits: Callable[[Request], bool]


class FaultProxy:
    """Listens on a port of its own.

    Attributes:
        url: Where; an `endpoint_url`.
        requests: What was asked, in order.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        self.loop: asyncio.AbstractEventLoop
        self.requests: list[Request] = []
        self._rules: list[_Rule] = []
        self._connections: set[asyncio.Task[None]] = set()

    def on(
        self,
        operation: str,
        fault: Fault,
        *,
        times: int = 1,
        after: int = 0,
        fits: Callable[[Request], bool] = lambda request: True,
    ) -> None:
        """Let the next requests of an operation meet a fault.

        Args:
            operation: As S3 calls it, such as `UploadPart`; `*` for all.
            fault: What happens instead.
            times: How often.
            after: How many are passed on first.
            fits: Which of them.
        """
        if after:
            self._rules.append(_Rule(operation, _pass_on, after, fits))
        self._rules.append(_Rule(operation, fault, times, fits))

    def count(self) -> Counter[str]:
        """Return how often each operation was asked for."""
        return Counter(request.operation for request in self.requests)

    def _fault(self, request: Request) -> Fault:
        for rule in self._rules:
            if rule.operation in {request.operation, "*"} and rule.times > 0 and rule.fits(request):
                rule.times -= 1
                return rule.fault
        return _pass_on

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, which is closed after its answer."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                request = await self._read(reader, writer)
                self.requests.append(request)
                response = await self._fault(request)(request)
                if response is not None:
                    writer.write(response)
                    await writer.drain()
        finally:
            self._connections.discard(task)
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}

        async def read_body() -> bytes:
            if headers.get("expect"):
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return await reader.readexactly(int(headers.get("content-length", 0)))

        return Request(method, target, headers, read_body, self.upstream)

    async def close(self) -> None:
        """Drop what is still in progress."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Run a proxy before a server, on an event loop of its own in a thread, so that no task of it is among the test's."""
    proxy = FaultProxy(upstream)
    started: Future[asyncio.Event] = Future()
    thread = threading.Thread(target=asyncio.run, args=(_run(proxy, started),), name="fault-proxy")
    thread.start()
    stop = started.result(10)
    try:
        yield proxy
    finally:
        proxy.loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _run(proxy: FaultProxy, started: Future[asyncio.Event]) -> None:
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
    proxy.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    proxy.loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    started.set_result(stop)
    await stop.wait()
    listener.close()
    await proxy.close()
    await listener.wait_closed()


class Gate:
    """Holds requests up until the test lets them go on."""

    def __init__(self) -> None:
        self._reached: Future[None] = Future()
        self._opened: Future[None] = Future()

    async def reached(self) -> None:
        """Wait until a request has arrived with its body."""
        await asyncio.wrap_future(self._reached)

    def open(self) -> None:
        """Let the requests go on."""
        self._opened.set_result(None)

    async def pass_through(self) -> None:
        """Be a request."""
        if not self._reached.done():
            self._reached.set_result(None)
        await asyncio.wrap_future(self._opened)


async def _pass_on(request: Request) -> bytes | None:
    return await request.forward()


def _response(status: int, body: bytes, content_type: str = "application/xml") -> bytes:
    head = f"HTTP/1.1 {status} Fault\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def _error(code: str, message: str, details: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{message}</Message>{details}</Error>".encode()


def answer(status: int, code: str, message: str = "a fault", *, details: str = "") -> Fault:
    """Answer with an error, before the body is read, and do not ask the server."""

    async def fault(request: Request) -> bytes:
        body = b"" if request.method == "HEAD" else _error(code, message, details)
        return _response(status, body)

    return fault


def answer_after(status: int, code: str) -> Fault:
    """Have the server do it, and then answer with an error."""

    async def fault(request: Request) -> bytes:
        await request.forward()
        return _response(status, _error(code, "a fault", ""))

    return fault


async def lose_answer(request: Request) -> None:
    """Have the server do it, and close the connection without an answer."""
    await request.forward()


async def lose_request(request: Request) -> None:
    """Close the connection; the server hears nothing."""


def wait_for(gate: Gate) -> Fault:
    """Let the server hear of a request, all of which has arrived, only when the test opens the gate."""

    async def fault(request: Request) -> bytes:
        body = await request.read_body()

        async def read() -> bytes:
            return body

        request.read_body = read
        await gate.pass_through()
        return await request.forward()

    return fault


def without_header(name: str) -> Fault:
    """Pass a request on without one of its headers, as a server does that ignores it; not for servers that check signatures."""

    async def fault(request: Request) -> bytes:
        request.headers.pop(name, None)
        return await request.forward()

    return fault


def answer_without_header(name: str) -> Fault:
    """Pass an answer on without one of its headers."""

    async def fault(request: Request) -> bytes:
        head, _, body = (await request.forward()).partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(name.encode() + b":")]
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    return fault


def answer_with_header(name: str, value: str) -> Fault:
    """Pass an answer on with another value of one of its headers."""
    without = answer_without_header(name)

    async def fault(request: Request) -> bytes | None:
        head, _, body = (await without(request) or b"").partition(b"\r\n\r\n")
        return head + f"\r\n{name}: {value}".encode() + b"\r\n\r\n" + body

    return fault


def cut_body(count: int) -> Fault:
    """Pass on an answer up to so many bytes of its body, and close the connection."""

    async def fault(request: Request) -> bytes:
        head, _, body = (await request.forward()).partition(b"\r\n\r\n")
        return head + b"\r\n\r\n" + body[:count]

    return fault
