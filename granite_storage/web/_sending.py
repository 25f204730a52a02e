"""Bytes on their way to a client: never a whole answer made of half an object, and nothing read for a client that is gone."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Send

from granite_storage._concurrency import finish
from granite_storage.backends.base import ByteRange
from granite_storage.exceptions import BackendError
from granite_storage.readers import StoredObjectReader

__all__ = [
    "Body",
    "multipart",
    "noticing_departure",
    "send_chunk",
    "send_headers",
    "send_object",
    "send_status",
    "while_connected",
]

# One visit to a thread each: fewer would cost speed, larger ones memory with every slow client.
_CHUNK_SIZE = 128 * 1024


@dataclass(frozen=True, slots=True)
class Body:
    """What an answer consists of.

    Attributes:
        headers: What its headers say of it.
        parts: What goes before the bytes of each range, and the range.
        end: What goes after the last of them.
    """

    headers: Mapping[str, str]
    parts: Sequence[tuple[bytes, ByteRange]]
    end: bytes


def multipart(ranges: Sequence[ByteRange], size: int, content_type: str) -> Body:
    """Return several ranges of an object as `multipart/byteranges`. Source: RFC 9110, section 14.6."""
    boundary = secrets.token_hex(16)
    head = f"\r\n--{boundary}\r\nContent-Type: {content_type}\r\nContent-Range: bytes "
    parts = [(f"{head}{span.start}-{span.stop - 1}/{size}\r\n\r\n".encode("latin-1"), span) for span in ranges]
    end = f"\r\n--{boundary}--\r\n".encode()
    length = sum(len(head) + span.stop - span.start for head, span in parts) + len(end)
    return Body({"content-type": f"multipart/byteranges; boundary={boundary}", "content-length": str(length)}, parts, end)


async def send_status(send: Send, status: int, more_headers: Mapping[str, str] | None = None) -> None:
    """Send an answer that says nothing but its status."""
    text = HTTPStatus(status).phrase.encode()
    headers = MutableHeaders({"content-type": "text/plain", "content-length": str(len(text)), "cache-control": "no-store"})
    headers.update(more_headers or {})
    await send_headers(send, status, headers, more=True)
    await send_chunk(send, text, more=False)


async def send_headers(send: Send, status: int, headers: MutableHeaders, *, more: bool = False) -> None:
    """Send the beginning of an answer, which is all of it unless there is more."""
    await send({"type": "http.response.start", "status": status, "headers": headers.raw})
    if not more:
        await send_chunk(send, b"", more=False)


async def send_chunk(send: Send, chunk: bytes, *, more: bool = True) -> None:
    """Send a part of the body."""
    if chunk or not more:
        await send({"type": "http.response.body", "body": chunk, "more_body": more})


async def send_object(send: Send, reader: StoredObjectReader) -> None:
    """Send the bytes of a reader; an `OSError` of a backend does not pass for one of the connection."""
    while True:
        try:
            chunk = await reader.read(_CHUNK_SIZE)
        except OSError as error:
            location = reader.ref.location
            raise BackendError(f"the object at {location!r} could not be read", location=location) from error
        if not chunk:
            return
        await send_chunk(send, chunk)
        del chunk  # a slow client's chunk is kept once, by the server


def noticing_departure(send: Send) -> Send:
    """Tell a client that went away, as a server says it by an `OSError`, from every other failure."""

    async def guarded(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise ClientDisconnect from error

    return guarded


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do something until it is done or the client is gone; it is then cancelled, and has cleaned up when this returns.

    Servers only tell of a client that went away to whoever asks: uvicorn lets everything be sent to nobody.
    """
    task = asyncio.ensure_future(work)
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


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
