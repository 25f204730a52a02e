"""What hostile requests cost: CPU seconds and memory per MiB that is sent, and how long they hold the event loop.

Forms, bodies, headers of parts, ranges and tokens go straight to the application, without a server, in pieces of 64 KiB. Beside
ours runs what Starlette has for the same. `--rounds N` repeats, `--only TEXT` chooses, `--json FILE` keeps the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from starlette.formparsers import MultiPartException
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.signing import UrlSigner
from granite_storage.web import (
    FileList,
    FilePart,
    RequestError,
    SignedFiles,
    StoredObjectResponse,
    stream_body,
    stream_upload,
)
from tests.benchmarks.harness import MIB, Contender, Measurement, Meter

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

PIECE = 64 * 1024
WANTED = 8 * MIB
MAX_HOLD = 0.05
BOUNDARY = b"----WebKitFormBoundary7MA4YWxkTrZu0gW"
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}


def form(*parts: bytes, boundary: bytes = BOUNDARY, before: bytes = b"", after: bytes = b"") -> tuple[dict[str, str], bytes]:
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    headers = {"content-type": f"multipart/form-data; boundary={boundary.decode()}"}
    return headers, before + body + b"--" + boundary + b"--\r\n" + after


def field(rest: bytes = b'; name="a"', headers: bytes = b"", content: bytes = b"") -> bytes:
    return b"Content-Disposition: form-data" + rest + b"\r\n" + headers + b"\r\n" + content


def file(content: bytes) -> bytes:
    return field(b'; name="file"; filename="a"', content=content)


def filled(unit: bytes, size: int = MIB) -> bytes:
    return unit * (size // len(unit))


FORMS: dict[str, Callable[[], tuple[dict[str, str], bytes]]] = {
    "form: a file": lambda: form(file(os.urandom(4 * MIB))),
    "form: a file of what looks like boundaries": lambda: form(file(filled(b"\r\n--" + BOUNDARY + b"x", 4 * MIB))),
    "form: a file of what looks like short boundaries": lambda: form(file(filled(b"\r\n--bx")), boundary=b"b"),
    "form: a file of boundaries with padding": lambda: form(file(filled(b"\r\n--" + BOUNDARY + b" " * 80, 4 * MIB))),
    "form: a file of beginnings of boundaries": lambda: form(file(filled(b"\r\n--" + BOUNDARY[:-1], 4 * MIB))),
    "form: a file of line ends": lambda: form(file(filled(b"\r\n", 4 * MIB))),
    "form: a file of CRs": lambda: form(file(filled(b"\r", 4 * MIB))),
    "form: a field of a MiB": lambda: form(field(content=bytes(MIB - 10))),
    "form: 1,000 fields": lambda: form(*[field(content=b"1")] * 1000),
    "form: 100,000 fields": lambda: form(*[field(content=b"1")] * 100_000),
    "form: 100 files": lambda: form(*[file(b"1")] * 100),
    "form: a small one": lambda: form(field(content=b"1")),
    "form: a small one that is cut off": lambda: (form()[0], form(field(content=b"1"))[1][:-10]),
    "form: no boundary": lambda: (form()[0], filled(b"x")),
    "form: line ends before the boundary": lambda: form(field(), before=filled(b"\r\n")),
    "form: dashes before the boundary": lambda: form(field(), before=filled(b"-")),
    "form: what follows the last boundary": lambda: form(field(), after=filled(b"\r\n-")),
    "headers: full ones": lambda: form(*[field(headers=b"".join(b"X-%d: %b\r\n" % (i, b"y" * 4000) for i in range(7)))] * 100),
    "headers: short ones": lambda: form(*[field(headers=b"".join(b"%d:\r\n" % number for number in range(7)))] * 900),
    "headers: too many": lambda: form(field(headers=filled(b"A: b\r\n"))),
    "headers: one without end": lambda: form(field(headers=b"X: " + filled(b"y"))),
    "headers: semicolons": lambda: form(*[field(b'; name="a"' + b";" * 4000)] * 200),
    "headers: parameters": lambda: form(*[field(b'; name="a"' + b"".join(b";p%d=x" % number for number in range(500)))] * 200),
    "headers: quotes": lambda: form(*[field(b'; name="a"; b="' + b';"' * 2000)] * 200),
    "headers: backslashes": lambda: form(*[field(b'; name="a' + b'\\"' * 2000 + b'"')] * 200),
    "headers: percent signs": lambda: form(*[field(b'; name="' + b"%22" * 1300 + b'"')] * 200),
    "headers: folds": lambda: form(*[field(b'; name="a"', headers=b"X: y" + b"\r\n " * 1300 + b"\r\n")] * 200),
    "url-encoded: percent signs": lambda: (URLENCODED, b"a=" + filled(b"%", MIB - 10)),
    "url-encoded: escapes": lambda: (URLENCODED, b"a=" + filled(b"%41", MIB - 10)),
    "url-encoded: escapes between letters": lambda: (URLENCODED, b"a=" + filled(b"a%41", MIB - 10)),
    "url-encoded: no escapes": lambda: (URLENCODED, b"a=" + filled(b"%zz", MIB - 10)),
    "url-encoded: 4 MiB of percent signs": lambda: (URLENCODED, b"a=" + filled(b"%", 4 * MIB)),
    "url-encoded: plus signs": lambda: (URLENCODED, b"a=" + filled(b"+", MIB - 10)),
    "url-encoded: 1,000 fields": lambda: (URLENCODED, b"a=%41&" * 999),
    "url-encoded: ampersands": lambda: (URLENCODED, filled(b"&")),
    "url-encoded: a million fields": lambda: (URLENCODED, filled(b"a=1&", 4 * MIB)),
}
BODIES: dict[str, Callable[[], tuple[dict[str, str], bytes]]] = {
    "body: random": lambda: ({}, os.urandom(4 * MIB)),
    "body: encoded twice": lambda: ({"content-encoding": "gzip, gzip"}, bytes(MIB)),
}
RANGES: dict[str, str] = {
    "ranges: one": "bytes=0-0",
    "ranges: the same, 1,000 times": "bytes=" + ",".join(["0-0"] * 1000),
    "ranges: 1,000 that touch": "bytes=" + ",".join(f"{start}-{start}" for start in range(1000)),
    "ranges: 1,000 apart": "bytes=" + ",".join(f"{start * 1000}-{start * 1000}" for start in range(1000)),
    "ranges: backwards": "bytes=" + ",".join(f"{start * 1000}-" for start in range(1000, 0, -1)),
    "ranges: commas": "bytes=" + "," * 8000,
    "ranges: digits": "bytes=" + "9" * 8000 + "-",
    "ranges: blanks": "bytes=" + " " * 8000 + "0-0",
}
TOKENS: dict[str, str] = {
    "tokens: of letters": "a" * 8000,
    "tokens: of points": "." * 8000,
    "tokens: of encoded braces": base64.urlsafe_b64encode(b"[" * 6000).decode() + ".x.y",
    "tokens: of percent signs": "%25" * 2600,
}


class Sender:
    """Sends a body in pieces, and counts what was taken of it; afterwards nothing comes any more, as from a server."""

    def __init__(self, body: bytes) -> None:
        self._pieces: Iterator[bytes] = iter([body[start : start + PIECE] for start in range(0, len(body), PIECE)])
        self._has_ended = False
        self.taken = 0

    async def __call__(self) -> Message:
        if self._has_ended:
            await asyncio.Event().wait()
        piece = next(self._pieces, None)
        self.taken += len(piece or b"")
        self._has_ended = piece is None
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}


async def ignore(part: FilePart) -> None:
    """Read a file, and keep nothing of it."""
    async for _ in part:
        pass


async def granite_form(request: Request) -> None:
    await stream_upload(request, {"file": FileList(ignore, 100)})


async def starlette_form(request: Request) -> None:
    async with request.form():
        pass


async def granite_body(request: Request) -> None:
    await stream_body(request, ignore)


async def starlette_body(request: Request) -> None:
    async for _ in request.stream():
        pass


RECEIVERS: dict[tuple[str, str], Callable[[Request], Awaitable[None]]] = {
    ("form", "granite"): granite_form,
    ("form", "starlette"): starlette_form,
    ("body", "granite"): granite_body,
    ("body", "starlette"): starlette_body,
}


def scope_of(headers: dict[str, str], path: str = "/") -> Scope:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": raw}


async def receive(meter: Meter, *, case: str, kind: str) -> None:
    """Receive a form or a body, as often as it takes to send some MiB."""
    receiver = RECEIVERS["body" if case in BODIES else "form", kind]
    headers, body = (BODIES | FORMS)[case]()

    async def once() -> int:
        sender = Sender(body)
        with contextlib.suppress(RequestError, MultiPartException):
            await receiver(Request(scope_of(headers), sender))
        return len(body)

    await measure(meter, once)


class Hold:
    """Watches how long the event loop works between two turns of this task, in CPU time: other processes do not count."""

    worst = 0.0

    async def watch(self) -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            self.worst = max(self.worst, time.thread_time() - before)


async def measure(meter: Meter, once: Callable[[], Awaitable[int]], harmless: Callable[[], Awaitable[int]] | None = None) -> None:
    """Measure the CPU time of a task that says how many bytes it has received, beyond that of a harmless one."""
    hold = Hold()
    await once()
    size = await once()
    times = max(3, min(2000, WANTED // size))
    usual = await spent(harmless, times) if harmless is not None else 0.0
    watch = asyncio.create_task(hold.watch())
    async with meter.measure(size=size * times, ticking=False):
        seconds = max(await spent(once, times) - usual, 1e-6)
    watch.cancel()
    assert meter.measurement is not None
    meter.measurement = replace(meter.measurement, seconds=seconds, stall=hold.worst, notes={"request": size})


async def spent(once: Callable[[], Awaitable[int]], times: int) -> float:
    """Return the seconds of CPU that some calls take."""
    start = time.process_time()
    for _ in range(times):
        await once()
        await asyncio.sleep(0)
    return time.process_time() - start


async def ranges(meter: Meter, *, case: str, kind: str) -> None:
    """Answer a Range header for a file of 2 MiB, as a HEAD: neither what is sent counts, nor what a HEAD costs without it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(bytes(2 * MIB))
        manager = StorageManager(
            backends={"local": LocalStorageBackend(folder, fsync=False)}, policies={"files": StoragePolicy("files", "local")}
        )
        ref = StoredObjectRef("files", "local", path.name, 2 * MIB, "sha256:" + "0" * 64, created_at="2024-01-01T00:00:00+00:00")
        scope, harmless = (scope_of(headers) | {"method": "HEAD"} for headers in ({"range": RANGES[case]}, {}))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if kind == "granite":
                await StoredObjectResponse(ref, Request(scope), manager=manager)(scope, receive, send)
            else:
                await FileResponse(path)(scope, receive, send)

        size = len(RANGES[case])
        await measure(meter, lambda: served(app, scope, size), lambda: served(app, harmless, size))
        await manager.aclose()


async def tokens(meter: Meter, *, case: str, kind: str) -> None:
    """Refuse a token that is worth nothing: ours in a URL, Starlette's in the cookie of a session."""
    signer = UrlSigner("https://example.org/files", keys={"one": "x" * 32}, max_expires_in=timedelta(hours=1))
    manager = StorageManager(
        backends={"memory": MemoryStorageBackend()}, policies={"files": StoragePolicy("files", "memory")}, url_signer=signer
    )

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    token = TOKENS[case]
    if kind == "granite":
        app: ASGIApp = SignedFiles(manager)
        scope = scope_of({}, f"/{token}") | {"method": "GET", "root_path": ""}
    else:
        app, scope = SessionMiddleware(nothing, "x" * 32), scope_of({"cookie": f"session={token}"})
    await measure(meter, lambda: served(app, scope, len(token)))


async def served(app: ASGIApp, scope: Scope, size: int) -> int:
    async def send(message: Message) -> None:
        pass

    await app(dict(scope), Sender(b""), send)
    return size


def contenders() -> dict[str, dict[str, Contender]]:
    """Return ours and Starlette's for each case."""
    works: dict[str, Callable[..., Awaitable[None]]] = dict.fromkeys([*FORMS, *BODIES], receive)
    works |= dict.fromkeys(RANGES, ranges) | dict.fromkeys(TOKENS, tokens)
    return {
        case: {kind: Contender(work, case=case, kind=kind) for kind in ("granite", "starlette")} for case, work in works.items()
    }


def row(case: str, measured: dict[str, list[Measurement]]) -> list[str]:
    """Return a line of the table: the best time, the most memory, and the middle one of the worst holds."""
    cells, best, hold = [case], {}, {}
    for kind, runs in measured.items():
        best[kind] = min(run.seconds / run.size * MIB for run in runs)
        hold[kind] = sorted(run.stall for run in runs)[len(runs) // 2]
        memory = max(run.memory / max(run.notes["request"], MIB) for run in runs)
        cells += [f"{best[kind] * 1000:.1f} ms", f"{memory:.1f}", f"{hold[kind] * 1000:.0f} ms"]
    # Two runs of the same differ by as much; so does a whole request, from which that of a harmless header is subtracted.
    spread = 0.003 if case in RANGES else 0.0001
    no_worse = best["granite"] <= best["starlette"] * 1.1 + spread
    return [*cells, f"{best['granite'] / best['starlette']:.2f}", "yes" if no_worse and hold["granite"] <= MAX_HOLD else "NO"]


def main() -> None:
    """Run what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="add the numbers to this file")
    options = parser.parse_args()
    kept: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    head = ["case", "CPU per MiB", "MiB per MiB", "worst hold", "Starlette: CPU", "memory", "hold", "ratio", "reached"]
    print("| " + " | ".join(head) + " |", "|" + "---|" * len(head), sep="\n")
    for case, chosen in contenders().items():
        if options.only in case:
            measured: dict[str, list[Measurement]] = {kind: [] for kind in chosen}
            for _ in range(options.rounds):
                for kind, contender in chosen.items():
                    measured[kind].append(contender.run())
            print("| " + " | ".join(row(case, measured)) + " |", flush=True)
            kept[case] = {kind: [asdict(run) for run in runs] for kind, runs in measured.items()}
    if options.json:
        options.json.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
