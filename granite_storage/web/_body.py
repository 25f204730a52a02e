"""The body of a request as it arrives, what its headers promise of it, and the grammar of headers with parameters."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request

from granite_storage._engine import is_media_type
from granite_storage.web.exceptions import MalformedRequestError, UnsupportedRequestError
from granite_storage.web.limits import UploadLimits

__all__ = [
    "Turn",
    "body_of",
    "content_type_of",
    "content_type_to_keep",
    "declared_size",
    "media_type_of",
    "parse_parameters",
    "require_whole_body",
]

_PIECE = 64 * 1024
_TURN_SECONDS = 0.005
_LONGEST_CONTENT_TYPE = 1024
_MOST_PARAMETERS = 16
_MOST_ESCAPES = 256  # the longest file name has fewer characters

# A quoted value may have backslashes before quotes and backslashes (RFC 9110, section 5.6.4). Browsers write a backslash as it
# is: the second form takes what is no such value, up to the last quote before a semicolon.
_PARAMETER = re.compile(
    rb";[ \t]*(?:(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*=[ \t]*"
    rb"(?:"
    rb'"(?P<quoted>[^"\\]*+(?:\\.[^"\\]*+)*+)"(?=[ \t]*(?:;|\Z))'
    rb'|"(?P<written>[^;]*)"(?=[ \t]*(?:;|\Z))'
    rb'|(?P<token>(?:[^";][^;]*)?)'
    rb"))?[ \t]*(?=;|\Z)",
    re.DOTALL,
)
_NO_CODING = frozenset({b"", b"identity"})
_LINE_ENDS = ((b"%0D", b"\r"), (b"%0d", b"\r"), (b"%0A", b"\n"), (b"%0a", b"\n"))


class Turn:
    """Lets other tasks run, from time to time, in work that never waits."""

    def __init__(self) -> None:
        self._ends = time.monotonic() + _TURN_SECONDS

    async def end_if_due(self) -> None:
        """Let other tasks run if this one has run for long enough."""
        if time.monotonic() > self._ends:
            await asyncio.sleep(0)
            self._ends = time.monotonic() + _TURN_SECONDS


def require_whole_body(request: Request, limits: UploadLimits) -> None:
    """Refuse, before the first byte is read, a body that is too large by its own account, encoded, or a range of one.

    Raises:
        RequestTooLargeError: Its Content-Length is over the limit.
        UnsupportedRequestError: It has a Content-Encoding: what would be stored is not what the client means.
        MalformedRequestError: It has a Content-Range (RFC 9110, section 14.5), or two sizes.
    """
    for name, value in request.headers.raw:  # one pass over the headers, of which a small form is a good part
        if name == b"content-encoding" and not {coding.strip().lower() for coding in value.split(b",")} <= _NO_CODING:
            raise UnsupportedRequestError("the body has a Content-Encoding, which is not taken here")
        if name == b"content-range":
            raise MalformedRequestError("the body is a range of a file, which is not taken here")
    declared = declared_size(request)
    if declared is not None:
        limits.require("max_size", declared, "the body is too large")


def declared_size(request: Request) -> int | None:
    """Return the Content-Length, where there is a sound one; the server sees to it that the body has no more."""
    declared = _header(request, "content-length")
    return int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else None


def content_type_of(request: Request) -> str:
    """Return the Content-Type of the body, empty where it has none."""
    return _header(request, "content-type")


def media_type_of(request: Request) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the media type of the body and its parameters."""
    given = content_type_of(request)
    if len(given) > _LONGEST_CONTENT_TYPE:
        raise MalformedRequestError("the Content-Type is too long")
    return parse_parameters(given.encode("latin-1"))


def content_type_to_keep(given: str) -> str | None:
    """Return the media type that a client gives a file, as it will be kept; None where it gives none.

    Raises:
        MalformedRequestError: It is not one media type (RFC 9110, section 8.3.1), or is too long to be kept.
    """
    given = given.strip(" \t")
    if not given:
        return None
    if not is_media_type(given):
        raise MalformedRequestError(
            f"the Content-Type of a file is not a media type, such as 'image/png' or 'text/plain; charset=utf-8': {given!r:.80}"
        )
    return given


def parse_parameters(header: bytes, *, is_of_form: bool = False) -> tuple[bytes, dict[bytes, bytes]]:
    """Return the first part of a header in lower case, and the parameters that follow it by their names in lower case.

    The numbers of parameters and of escapes are bounded.

    Args:
        header: The header's value.
        is_of_form: Whether `%22`, `%0D` and `%0A` in quoted values are decoded: browsers write quotes and the ends of lines so
            in names of fields and files (HTML, section "Multipart form data").

    Raises:
        MalformedRequestError: It is not a list of parameters, has too many of them, or has one twice.
    """
    if header.count(b"\\") > _MOST_ESCAPES:
        raise MalformedRequestError(f"a header has too many backslashes (at most {_MOST_ESCAPES})")
    value, parameters = header.partition(b";")[0], dict[bytes, bytes]()
    position = len(value)
    for _ in range(_MOST_PARAMETERS):
        if position == len(header):
            return value.strip(b" \t").lower(), parameters
        match = _PARAMETER.match(header, position)
        if match is None:
            raise MalformedRequestError("a header has parameters that cannot be read")
        position = match.end()
        if match["name"] is not None:
            name = match["name"].lower()
            if name in parameters:
                raise MalformedRequestError("a header has a parameter twice")
            parameters[name] = _value_of(match, is_of_form)
    if position == len(header):
        return value.strip(b" \t").lower(), parameters
    raise MalformedRequestError(f"a header has too many parameters (at most {_MOST_PARAMETERS})")


async def body_of(request: Request, limits: UploadLimits) -> AsyncGenerator[bytes, None]:
    """Yield the body in pieces that are looked through in a moment, however much the server hands over at a time.

    Raises:
        RequestTooLargeError: It has more bytes than allowed; those that are allowed were yielded.
        ClientDisconnect: The client went away before its end.
    """
    size = 0
    turn = Turn()
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            is_too_large = limits.max_size is not None and size > limits.max_size
            allowed = chunk[: limits.max_size - size] if limits.max_size is not None and is_too_large else chunk
            for start in range(0, len(allowed), _PIECE):
                yield allowed[start : start + _PIECE]  # which is the chunk itself where it is no longer
                await turn.end_if_due()
            if is_too_large:
                limits.require("max_size", size, "the body is too large")


def _header(request: Request, name: str) -> str:
    key = name.encode()
    values = [value for given, value in request.headers.raw if given == key]
    if len(values) > 1:
        raise MalformedRequestError(f"the request has the header {name.title()} more than once")
    return values[0].decode("latin-1") if values else ""


def _value_of(match: re.Match[bytes], is_of_form: bool) -> bytes:
    token: bytes | None = match["token"]
    if token is not None:
        return token.rstrip(b" \t")
    value: bytes = match["written"] if match["quoted"] is None else match["quoted"]
    if b"\\" in value:
        value = value.replace(b"\\\\", b"\0").replace(b'\\"', b'"').replace(b"\0", b"\\")  # no header has a NUL
    if is_of_form and b"%" in value:
        if value.count(b"%") > _MOST_ESCAPES:
            raise MalformedRequestError(f"a name in a form has too many percent signs (at most {_MOST_ESCAPES})")
        value = value.replace(b"%22", b'"')
        if b"%0" in value:
            for escape, character in _LINE_ENDS:
                value = value.replace(escape, character)
    return value
