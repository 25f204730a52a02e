"""Stored objects as responses."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from http import HTTPStatus
from typing import Any, Literal, Protocol

from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from granite_storage._engine import require_ref
from granite_storage._headers import (
    INLINE_TYPES,
    REVALIDATED,
    Disposition,
    require_disposition,
    require_inline_types,
    safe_headers,
    served_type,
    url_path,
)
from granite_storage._tasks import shielded_cleanup
from granite_storage._telemetry import fields_of
from granite_storage.backends.base import ByteRange
from granite_storage.exceptions import (
    BackendError,
    ConfigurationError,
    InfectedObjectError,
    ObjectNotFoundError,
    ScanPendingError,
)
from granite_storage.manager import StorageManager
from granite_storage.orm.attachment import Attachment, AttachmentVariant
from granite_storage.readers import OpeningReader, StoredObjectReader, require_recorded_size
from granite_storage.refs import StoredObjectRef, require_scanned
from granite_storage.web._conditional import (
    Validators,
    failed_precondition,
    header_of,
    http_date,
    is_entity_tag,
    range_applies,
    requested_ranges,
)

logger: logging.Logger = logging.getLogger("granite_storage")

# One visit to a thread each: fewer would cost speed, larger ones memory with every slow client.
_CHUNK_SIZE = 128 * 1024
# Bytes between two ranges that are read and dropped: it costs less than another request to the storage.
_LARGEST_GAP = _CHUNK_SIZE
# How long a client may take no bytes before what the storage holds for it, such as a connection, is released, in seconds.
_STALL_SECONDS = 5.0
# What nginx logs for it; the client does not see it.
_CLIENT_CLOSED_REQUEST = 499
_COMPUTED = frozenset({"accept-ranges", "content-length", "content-range", "transfer-encoding"})
_OF_THE_OBJECT = _COMPUTED | {
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "etag",
    "expires",
    "last-modified",
}
_UNCACHED = {"cache-control": "no-store"}
_IMMUTABLE = "private, max-age=31536000, immutable"

# Sending bytes: an answer is never complete without the whole object, and nothing is read for a client that has disconnected.


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


def group_reads(parts: Sequence[Part]) -> list[list[Part]]:
    """Group parts into those that are read from the storage together, as one range: each begins close behind the one before."""
    reads: list[list[Part]] = []
    for part in parts:
        if reads and 0 <= part.span.start - reads[-1][-1].span.stop <= _LARGEST_GAP:
            reads[-1].append(part)
        else:
            reads.append([part])
    return reads


async def is_request(scope: Scope, send: Send, methods: Sequence[str], server: str) -> bool:
    """Return whether an ASGI application is called for a request of one of its methods; anything else is refused here.

    Raises:
        ValueError: It is neither HTTP nor a websocket.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
        return False
    if scope["type"] != "http":
        raise ValueError(f"{server} serves HTTP, not the ASGI scope {scope['type']!r}")
    if scope["method"] not in methods:
        await send_status(send, 405, [("allow", ", ".join(methods))])
        return False
    return True


async def send_status(send: Send, status: int, more_headers: Iterable[tuple[str, str]] = ()) -> None:
    """Send an answer with nothing but its status."""
    text = HTTPStatus(status).phrase.encode()
    headers = MutableHeaders({"content-type": "text/plain; charset=utf-8", "content-length": str(len(text)), **_UNCACHED})
    for name, value in more_headers:
        headers.append(name, value)
    headers.setdefault("x-content-type-options", "nosniff")
    await send_headers(send, status, headers, more=True)
    await send_chunk(send, text, more=False)


async def send_departed(send: Send, *, begun: bool = False) -> None:
    """Answer a client that has disconnected: a middleware that waits for an answer would report a missing one."""
    with contextlib.suppress(OSError):
        if begun:
            await send_chunk(send, b"", more=False)
        else:
            await send_headers(send, _CLIENT_CLOSED_REQUEST, MutableHeaders({"content-length": "0", **_UNCACHED}))


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
    """Send one part; an `OSError` of a backend is not taken for one of the connection.

    Args:
        send: The ASGI callable.
        reader: The reader of its bytes, which stands where the part before has ended.
        part: The part.
        start: The position in the object of the reader's first byte.

    Raises:
        BackendError: The bytes could not be read.
    """
    while gap := part.span.start - start - reader.tell():
        await _read(reader, gap)
    await send_chunk(send, part.head)
    while left := part.span.stop - start - reader.tell():
        chunk = await _read(reader, left)
        await _send_or_release(send, chunk, reader)
        del chunk  # a slow client's chunk is kept once, by the server


async def _read(reader: StoredObjectReader, count: int) -> bytes:
    try:
        return await reader.read(min(count, _CHUNK_SIZE))
    except OSError as error:
        location = reader.ref.location
        raise BackendError(f"the object at {location!r} could not be read", location=location) from error


async def _send_or_release(send: Send, chunk: bytes, reader: StoredObjectReader) -> None:
    """Send a chunk; release what the reader holds in the storage while the client does not take it."""
    releases: list[asyncio.Task[None]] = []
    timer = asyncio.get_running_loop().call_later(
        _STALL_SECONDS, lambda: releases.append(asyncio.ensure_future(reader.release()))
    )
    try:
        await send_chunk(send, chunk)
    finally:
        timer.cancel()
        for release in releases:
            await shielded_cleanup(release, f"releasing the reader of {reader.ref.location!r}")


async def serve_connected(answer: Callable[[Send], Coroutine[Any, Any, None]], receive: Receive, send: Send) -> None:
    """Answer until it is done or the client disconnects; the answer is then cancelled, and has cleaned up when this returns.

    A server reports a disconnect only to `receive`: uvicorn accepts everything that is sent to a client that is gone. A client
    that disconnects before the first byte is sent an empty body, so that a middleware that waits for an answer gets one.
    """
    sent = 0

    async def noting(message: Message) -> None:
        nonlocal sent
        sent += 1
        try:
            await send(message)
        except OSError as error:  # how a server reports a disconnect, not to be mistaken for an error of the storage
            raise ClientDisconnect from error

    task = asyncio.ensure_future(answer(noting))
    watch = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await shielded_cleanup(_cancel_all(task, watch), "ending a response")
    if not task.cancelled():
        try:
            task.result()
        except ClientDisconnect:
            return
    elif not watch.cancelled():
        watch.result()
        if sent < 2:  # the headers at the most, which a compressor holds back until there is a body
            await send_departed(send, begun=sent == 1)


async def _cancel_all(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":  # noqa: ASYNC110  # nothing else reports it
        await asyncio.sleep(0)  # what wraps `receive` may repeat the end of the body for ever, without a wait


# The response.


class Request(Protocol):
    """What a response needs of a request, of any framework."""

    @property
    def scope(self) -> Any:
        """The ASGI scope."""
        ...


@dataclass(frozen=True, slots=True)
class Offload:
    """Lets the web server in front of the application send objects of a local disk, with the headers of the response.

    nginx takes `X-Accel-Redirect`, Apache's mod_xsendfile and lighttpd take `X-Sendfile`. The server sends the bytes, and
    answers ranges and conditions with its own validators. The path is percent-encoded, so that a location cannot lead out of
    its root.

    Args:
        header: The header that the server takes.
        roots: What locations are below, by the key of their backend: the internal URI of nginx, such as
            `{"local": "/stored"}`, or the folder for `X-Sendfile`. Objects of other backends are streamed by the application.

    Raises:
        ConfigurationError: The header is not known, or a root does not begin with a slash or has control characters. A response
            also refuses a key that its manager has no backend for.
    """

    header: Literal["X-Accel-Redirect", "X-Sendfile"]
    roots: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.header not in ("X-Accel-Redirect", "X-Sendfile"):
            raise ConfigurationError(f"header of an Offload must be 'X-Accel-Redirect' or 'X-Sendfile', not {self.header!r}")
        if not isinstance(self.roots, Mapping):
            raise ConfigurationError(f"roots of an Offload must be a mapping of backend keys to paths, not {self.roots!r}")
        for key, root in self.roots.items():
            if not isinstance(key, str) or not key:
                raise ConfigurationError(f"the keys of roots of an Offload must be non-empty strings, not {key!r}")
            if not isinstance(root, str) or not root.startswith("/") or not root.isprintable():
                raise ConfigurationError(
                    f"the root of {key!r} must be a path that begins with a slash and has no control characters, not {root!r}"
                )

    def require_backends(self, manager: StorageManager) -> None:
        """Refuse roots of backends that a manager does not have, whose objects would never be sent by the web server."""
        unknown = sorted(set(self.roots).difference(manager.backends))
        if unknown:
            known = ", ".join(sorted(manager.backends))
            raise ConfigurationError(
                f"roots of an Offload names {', '.join(map(repr, unknown))}, but the manager has no such backend (there are:"
                f" {known}): name only backends of this manager"
            )

    def target_of(self, ref: StoredObjectRef) -> str | None:
        """Return the value of the header for an object; None where the application sends it."""
        root = self.roots.get(ref.backend)
        return None if root is None else url_path(f"{root.rstrip('/')}/{ref.location}")


class StoredObjectResponse(Response):
    """Streams a stored object from any backend, whole or in ranges.

    Ranges, preconditions, If-Range and HEAD follow RFC 9110, and the ETag is a strong one made of the checksum. Memory is
    bounded per response, and a client that disconnects or does not read stops the reading. A missing object is answered with
    404 and logged as an error, one that a virus scanner has not scanned yet with 409, and an infected one with 404. Once the
    first byte is sent, a response is complete or broken: an error in the body is logged, and the connection is closed.

    A browser executes nothing in it: the response has `nosniff`, a Content-Security-Policy that allows only a player for audio
    and video, and is a download unless the media type is one of `inline_types`. Scripts, HTML, SVG and XML are served as
    `application/octet-stream`.

    No middleware compresses it, because a range of a compressed body is not a range of the object: to a client that accepts
    compressed bodies it sends `Content-Encoding: identity`, which compressors leave alone.

    It is a response of Starlette and FastAPI, and an ASGI application that Litestar returns as well.

    Args:
        stored: A stored attachment, a variant of one, or a ref with its `manager`.
        request: The request; its method and headers are read.
        manager: The manager of a ref; an attachment and a variant have their own.
        disposition: `inline` lets a browser show it if that is safe.
        filename: The name for saving it; None for its original name.
        inline_types: The exact media types that may be shown inline; types that a browser would execute are refused.
        immutable: Whether the URL will never have other content, so that clients need not ask again for a year.
        cache_control: The Cache-Control instead of `private, no-cache`, with which clients keep it and ask whether it changed.
        verify: Whether to verify a whole body against the checksum as it is sent, and to cut it off before its end if it is
            wrong. It costs the hashing.
        offload: The web server in front that sends the bytes instead, for objects on a disk that it can read. With `verify` the
            application sends them.
        headers: More headers, which override the response's own: a Content-Type is also used in each part of several ranges, and
            conditions are compared with an ETag and a Last-Modified. Headers that describe the object are left out of a 404.
        background: A task that Starlette runs afterwards.

    Raises:
        UnboundAttachmentError: The attachment is not stored yet.
        ConfigurationError: A ref has no manager, `inline_types` has one that must not be shown, or `offload` has the root of a
            backend that the manager does not have.
        ValueError: The disposition is not known, or `headers` has one that the response computes, or an invalid ETag or
            Last-Modified.
    """

    def __init__(
        self,
        stored: Attachment | AttachmentVariant | StoredObjectRef,
        request: Request,
        *,
        manager: StorageManager | None = None,
        disposition: Disposition = "attachment",
        filename: str | None = None,
        inline_types: Collection[str] = INLINE_TYPES,
        immutable: bool = False,
        cache_control: str | None = None,
        verify: bool = False,
        offload: Offload | None = None,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        require_disposition(disposition)
        types = inline_types if inline_types is INLINE_TYPES else require_inline_types(inline_types)
        given = {key.lower(): value for key, value in (headers or {}).items()}
        _require_headers(given)
        self._ref, self._manager = _resolve(stored, manager)
        self._method: str = request.scope["method"]
        self._asked = Headers(scope=request.scope)
        self._compressed = _is_compressed(request.scope, self._asked)
        self._verify = verify
        if offload is not None:
            offload.require_backends(self._manager)
        self._offload = None if verify else offload
        self.status_code = 200
        self.background = background
        self.body = b""
        content_type = given.get("content-type") or served_type(self._ref.content_type)
        name = self._ref.original_filename if filename is None else filename
        self.raw_headers: list[tuple[bytes, bytes]] = [
            (key.encode("latin-1"), value.encode("latin-1"))
            for key, value in {
                **safe_headers(content_type, name, disposition, types),
                "cache-control": cache_control or (_IMMUTABLE if immutable else REVALIDATED),
                **given,
            }.items()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        await serve_connected(self._answer, receive, send)
        if self.background is not None:
            await self.background()

    async def _answer(self, send: Send) -> None:
        """Decide what to send before anything is sent, and send it."""
        headers = MutableHeaders(raw=list(self.raw_headers))
        try:
            require_scanned(self._ref)
            target = None if self._offload is None else self._offload.target_of(self._ref)
            if self._offload is not None and target is not None:
                require_recorded_size(self._ref, (await self._manager.stat(self._ref)).size)
                headers.update({self._offload.header: target, "content-length": "0"})
                await send_headers(send, 200, headers)
                return
            validators = await self._validators(headers)
            status, ranges = _decide(self._method, self._asked, validators, self._ref.size, whole=self._compressed)
            self._describe(headers, validators)
            if self._method == "HEAD" or status not in (200, 206):
                require_recorded_size(self._ref, (await self._manager.stat(self._ref)).size)
                await send_headers(send, status, self._without_body(headers, status))
                return
            body = _build_body(status, ranges, self._ref.size, headers["content-type"])
            reads = group_reads(body.parts)
            first = await self._open(reads[0], whole=status == 200)
        except ObjectNotFoundError as error:
            logger.error("a response was 404, because the object of its ref is missing: %s", error, extra=fields_of(self._ref))
            kept = [(name, value) for name, value in headers.items() if name not in _OF_THE_OBJECT]
            await send_status(send, 404, kept)
            return
        except (ScanPendingError, InfectedObjectError) as error:
            await send_status(send, 409 if isinstance(error, ScanPendingError) else 404)
            return
        async with first:
            headers.update(body.headers)
            self._refuse_compression(headers)
            await send_headers(send, status, headers, more=True)
            await self._send_body(send, body, first, reads)

    async def _send_body(self, send: Send, body: Body, first: StoredObjectReader, reads: list[list[Part]]) -> None:
        try:
            for parts in reads:
                async with first if parts is reads[0] else await self._open(parts) as reader:
                    for part in parts:
                        await send_part(send, reader, part, parts[0].span.start)
        except ClientDisconnect:
            raise
        except Exception:
            # The headers are sent, so the server can only cut the connection, which it does where the error propagates.
            logger.exception(
                "sending the object at %r of %r failed half-way",
                self._ref.location,
                self._ref.backend,
                extra=fields_of(self._ref),
            )
            raise
        await send_chunk(send, body.end, more=False)

    def _open(self, parts: Sequence[Part], *, whole: bool = False) -> OpeningReader:
        """Open what has all of the parts, which follow each other."""
        start, stop = parts[0].span.start, parts[-1].span.stop
        verify = self._verify and whole and bool(self._ref.checksum)
        return self._manager.open(self._ref, offset=start, length=stop - start, verify=verify)

    def _describe(self, headers: MutableHeaders, validators: Validators) -> None:
        headers["accept-ranges"] = "none" if self._compressed else "bytes"
        headers["etag"] = validators.etag
        headers["last-modified"] = format_datetime(validators.modified, usegmt=True)

    def _refuse_compression(self, headers: MutableHeaders) -> None:
        if _accepts_codings(self._asked):
            headers.setdefault("content-encoding", "identity")

    def _without_body(self, headers: MutableHeaders, status: int) -> MutableHeaders:
        """Return the headers of an answer that has none of the object's bytes."""
        if status == 200:
            headers["content-length"] = str(self._ref.size)
            self._refuse_compression(headers)
            return headers
        for name in ("content-type", "content-disposition", "content-encoding"):
            del headers[name]
        if status != 304:
            headers.update({"content-length": "0", **_UNCACHED})
        if status == 416:
            headers["content-range"] = f"bytes */{self._ref.size}"
        return headers

    async def _validators(self, headers: MutableHeaders) -> Validators:
        """Return what distinguishes this object from others: the application's own headers, or the ref's."""
        _require_headers(headers)
        etag, modified = headers.get("etag"), http_date(headers.get("last-modified"))
        if modified is None:
            # Objects are never overwritten, so it was modified when it was stored.
            modified = _parse_created_at(self._ref.created_at) or (await self._manager.stat(self._ref)).modified
            modified = min(modified, datetime.now(UTC)).replace(microsecond=0)
        if etag is None:
            etag = _entity_tag(self._ref, modified)
        return Validators(f"W/{etag.removeprefix('W/')}" if self._compressed else etag, modified)


def _resolve(
    stored: Attachment | AttachmentVariant | StoredObjectRef, manager: StorageManager | None
) -> tuple[StoredObjectRef, StorageManager]:
    if isinstance(stored, Attachment | AttachmentVariant):
        return stored.ref, manager or stored.manager
    require_ref(stored)
    if manager is None:
        raise ConfigurationError("a ref does not know its manager: pass manager=")
    return stored, manager


def _require_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers that would contradict what is sent."""
    for name in _COMPUTED:
        if name in headers:
            raise ValueError(f"headers must not contain {name!r}, which the response computes: leave it out")
    if "etag" in headers and not is_entity_tag(headers["etag"]):
        raise ValueError(f"the ETag must be quoted, as in '\"v1\"' or 'W/\"v1\"', not {headers['etag']!r}")
    if "last-modified" in headers and http_date(headers["last-modified"]) is None:
        raise ValueError(
            f"Last-Modified must be an HTTP date, such as 'Sun, 06 Nov 1994 08:49:37 GMT', not {headers['last-modified']!r}"
        )


def _accepts_codings(asked: Headers) -> bool:
    return (header_of(asked, "accept-encoding") or "identity").lower() != "identity"


def _is_compressed(scope: Any, asked: Headers) -> bool:
    """Return whether Litestar compresses the response: it checks neither the status nor a Content-Encoding."""
    config = getattr(scope.get("litestar_app"), "compression_config", None)
    if config is None or not _accepts_codings(asked):
        return False
    options = getattr(scope.get("route_handler"), "opt", {})
    return not (config.exclude_opt_key and options.get(config.exclude_opt_key))


def _decide(method: str, asked: Headers, validators: Validators, size: int, *, whole: bool) -> tuple[int, list[ByteRange]]:
    """Return the status and the ranges to send, in the order of RFC 9110, section 13.2.2; no range where it must be `whole`."""
    everything = [ByteRange(0, size)]
    if method not in ("GET", "HEAD"):
        return 200, everything
    refused = failed_precondition(asked, validators)
    if refused is not None:
        return refused, []
    wanted = header_of(asked, "range") if method == "GET" and not whole else None
    if wanted is None or not range_applies(asked, validators, datetime.now(UTC)):
        return 200, everything
    ranges = requested_ranges(wanted, size)
    if ranges is None:
        return 200, everything
    return (206, ranges) if ranges else (416, [])


def _build_body(status: int, ranges: Sequence[ByteRange], size: int, content_type: str) -> Body:
    if len(ranges) > 1:
        return multipart(ranges, size, content_type)
    span = ranges[0]
    headers = {"content-length": str(span.stop - span.start)}
    if status == 206:
        headers["content-range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
    return Body(headers, [Part(b"", span)], b"")


def _entity_tag(ref: StoredObjectRef, modified: datetime) -> str:
    """Return the checksum as a strong entity tag; without one a weak tag, of all else that tells the object from others."""
    if ref.checksum:
        return f'"{ref.checksum.removeprefix("sha256:")}"'
    identity = "\n".join([ref.backend, ref.location, str(ref.size), modified.isoformat()])
    return f'W/"{hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()[:32]}"'


def _parse_created_at(created_at: str | None) -> datetime | None:
    """Return when an object was stored; None where a ref of another origin does not say it in a readable form."""
    try:
        moment = datetime.fromisoformat(created_at or "")
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
