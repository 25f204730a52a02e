"""The body of a request as it arrives, and what its headers promise of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from granite_storage.web.exceptions import MalformedRequestError, UnsupportedRequestError
from granite_storage.web.limits import UploadLimits

__all__ = ["body_of", "content_type_to_keep", "declared_size", "media_type_of", "require_whole_body"]

_PIECE = 64 * 1024
_TURN_SECONDS = 0.005
_LONGEST_CONTENT_TYPE = 1024
_LONGEST_KEPT = 255


def require_whole_body(request: Request, limits: UploadLimits) -> None:
    """Refuse, before the first byte is read, a body that is too large by its own account, encoded, or a range of one.

    Raises:
        RequestTooLargeError: Its Content-Length is over the limit.
        UnsupportedRequestError: It has a Content-Encoding: what would be stored is not what the client means.
        MalformedRequestError: It has a Content-Range (RFC 9110, section 14.5).
    """
    if request.headers.get("content-encoding", "identity").strip().lower() not in {"", "identity"}:
        raise UnsupportedRequestError("the body has a Content-Encoding, which is not taken here")
    if "content-range" in request.headers:
        raise MalformedRequestError("the body is a range of a file, which is not taken here")
    declared = declared_size(request)
    if declared is not None:
        limits.require("max_size", declared, "the body is too large")


def declared_size(request: Request) -> int | None:
    """Return the Content-Length, where there is a sound one; the server sees to it that the body has no more."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else None


def media_type_of(request: Request) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the media type of the body and its parameters."""
    given = request.headers.get("content-type", "")
    if len(given) > _LONGEST_CONTENT_TYPE:
        raise MalformedRequestError("the Content-Type is too long")
    return parse_options_header(given)


def content_type_to_keep(given: str) -> str | None:
    """Return the media type that a client gives a file, as it will be kept; None where it gives none."""
    given = given.strip(" \t")
    if not (given.isascii() and given.isprintable() and len(given) <= _LONGEST_KEPT):
        raise MalformedRequestError("the Content-Type of a file is not a media type")
    return given or None


async def body_of(request: Request, limits: UploadLimits) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces that are looked through in a moment, however much the server hands over at a time.

    Raises:
        RequestTooLargeError: It has more bytes than allowed.
        ClientDisconnect: The client went away before its end.
    """
    size = 0
    turn_ends = time.monotonic() + _TURN_SECONDS
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            limits.require("max_size", size, "the body is too large")
            for start in range(0, len(chunk), _PIECE):
                yield chunk[start : start + _PIECE]  # which is the chunk itself where it is no longer
                if time.monotonic() > turn_ends:
                    await asyncio.sleep(0)
                    turn_ends = time.monotonic() + _TURN_SECONDS
