"""Bytes on their way to a client: never a whole answer made of half an object, and nothing read for a client that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Send

from granite_storage._tasks import finish
from granite_storage.backends.base import ByteRange
from granite_storage.exceptions import BackendError
from granite_storage.readers import StoredObjectReader

__all__ = [
    "Body",
    "Part",
    "multipart",
    "reads_of",
    "send_chunk",
    "send_departed",
    "send_headers",
    "send_part",
    "send_status",
    "while_connected",
]

# One visit to a thread each: fewer would cost speed, larger ones memory with every slow client.
_CHUNK_SIZE = 128 * 1024
# Bytes between two ranges that are read and dropped: it costs less than another request to the storage.
_LARGEST_GAP = _CHUNK_SIZE
# How long a client may take no bytes before what is held for it in the storage, such as a connection, is released, in seconds.
_STALL_SECONDS = 5.0
# What nginx logs for it; the client does not see it.
_CLIENT_CLOSED_REQUEST = 499


@dataclass(frozen=True, slots=True)
class Part:
    """One range of an answer.

    Attributes:
        head: What goes before its bytes.
        span: Which bytes of the object they are.
    """

    head: bytes
    span: ByteRange


@dataclass(frozen=True, slots=True)
class Body:
    """What an answer consists of.

    Attributes:
        headers: What its headers say of it.
        parts: The ranges, in the order in which they are sent.
        end: What goes after the last of them.
    """

    headers: Mapping[str, str]
    parts: Sequence[Part]
    end: bytes


def multipart(ranges: Sequence[ByteRange], size: int, content_type: str) -> Body:
    """Return several ranges of an object as `multipart/byteranges`. Source: RFC 9110, section 14.6."""
    boundary = secrets.token_hex(16)
    head = f"\r\n--{boundary}\r\nContent-Type: {content_type}\r\nContent-Range: bytes "
    parts = [Part(f"{head}{span.start}-{span.stop - 1}/{size}\r\n\r\n".encode("latin-1"), span) for span in ranges]
    end = f"\r\n--{boundary}--\r\n".encode()
    length = sum(len(part.head) + part.span.stop - part.span.start for part in parts) + len(end)
    return Body({"content-type": f"multipart/byteranges; boundary={boundary}", "content-length": str(length)}, parts, end)


def reads_of(parts: Sequence[Part]) -> list[list[Part]]:
    """Group parts into those that are read from the storage together, as one range: each begins close behind the one before."""
    reads: list[list[Part]] = []
    for part in parts:
        if reads and 0 <= part.span.start - reads[-1][-1].span.stop <= _LARGEST_GAP:
            reads[-1].append(part)
        else:
            reads.append([part])
    return reads


async def send_status(send: Send, status: int, more_headers: Iterable[tuple[str, str]] = ()) -> None:
    """Send an answer that says nothing but its status."""
    text = HTTPStatus(status).phrase.encode()
    headers = MutableHeaders(
        {"content-type": "text/plain; charset=utf-8", "content-length": str(len(text)), "cache-control": "no-store"}
    )
    for name, value in more_headers:
        headers.append(name, value)
    headers.setdefault("x-content-type-options", "nosniff")
    await send_headers(send, status, headers, more=True)
    await send_chunk(send, text, more=False)


async def send_departed(send: Send, *, begun: bool = False) -> None:
    """Answer a client that has gone away: a middleware that waits for an answer would report that there is none."""
    with contextlib.suppress(OSError):
        if begun:
            await send_chunk(send, b"", more=False)
        else:
            await send_headers(send, _CLIENT_CLOSED_REQUEST, MutableHeaders({"content-length": "0", "cache-control": "no-store"}))


async def send_headers(send: Send, status: int, headers: MutableHeaders, *, more: bool = False) -> None:
    """Send the beginning of an answer, which is all of it unless there is more."""
    await send({"type": "http.response.start", "status": status, "headers": headers.raw})
    if not more:
        await send_chunk(send, b"", more=False)


async def send_chunk(send: Send, chunk: bytes, *, more: bool = True) -> None:
    """Send a part of the body."""
    if chunk or not more:
        await send({"type": "http.response.body", "body": chunk, "more_body": more})


async def send_part(send: Send, reader: StoredObjectReader, part: Part, start: int) -> None:
    """Send one part; an `OSError` of a backend does not pass for one of the connection.

    Args:
        send: Where to.
        reader: What its bytes are read from; it goes on where the part before has ended.
        part: The part.
        start: Which byte of the object is the reader's first.

    Raises:
        BackendError: The bytes could not be read.
    """
    while gap := part.span.start - start - reader.tell():
        await _read(reader, gap)
    await send_chunk(send, part.head)
    while left := part.span.stop - start - reader.tell():
        chunk = await _read(reader, left)
        await _send_patiently(send, chunk, reader)
        del chunk  # a slow client's chunk is kept once, by the server


async def _read(reader: StoredObjectReader, count: int) -> bytes:
    try:
        return await reader.read(min(count, _CHUNK_SIZE))
    except OSError as error:
        location = reader.ref.location
        raise BackendError(f"the object at {location!r} could not be read", location=location) from error


async def _send_patiently(send: Send, chunk: bytes, reader: StoredObjectReader) -> None:
    """Send a chunk; while the client does not take it, nothing is held for it in the storage."""
    releases: list[asyncio.Task[None]] = []
    timer = asyncio.get_running_loop().call_later(
        _STALL_SECONDS, lambda: releases.append(asyncio.ensure_future(reader.release()))
    )
    try:
        await send_chunk(send, chunk)
    finally:
        timer.cancel()
        for release in releases:
            await finish(release, f"releasing the reader of {reader.ref.location!r}")


async def while_connected(answer: Callable[[Send], Coroutine[Any, Any, None]], receive: Receive, send: Send) -> None:
    """Answer until it is done or the client is gone; the answer is then cancelled, and has cleaned up when this returns.

    Servers only tell of a client that went away to whoever asks: uvicorn lets everything be sent to nobody. One that goes away
    before the first byte is sent an empty body, so that a middleware that waits for an answer has something to pass on.
    """
    sent = 0

    async def noting(message: Message) -> None:
        nonlocal sent
        sent += 1
        try:
            await send(message)
        except OSError as error:  # which is how a server tells it, and not to be mistaken for a failure of the storage
            raise ClientDisconnect from error

    task = asyncio.ensure_future(answer(noting))
    watch = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await finish(_ended(task, watch), "ending a response")
    if not task.cancelled():
        try:
            task.result()
        except ClientDisconnect:
            return
    elif not watch.cancelled():
        watch.result()
        if sent < 2:  # the headers at the most, which a compressor holds back until there is a body
            await send_departed(send, begun=sent == 1)


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":  # noqa: ASYNC110  # nothing else tells of it
        await asyncio.sleep(0)  # what wraps `receive` may repeat the end of the body for ever, without a wait
