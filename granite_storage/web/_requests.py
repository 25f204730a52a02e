"""The bodies of requests as they arrive: their limits, their headers, multipart/form-data, and URL-encoded forms."""

from __future__ import annotations

import binascii
import re
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing
from dataclasses import dataclass, fields
from enum import Enum, auto
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote_to_bytes

from starlette.requests import Request

from granite_storage._engine import is_media_type
from granite_storage.exceptions import ConfigurationError, ConsumedSourceError
from granite_storage.streams import BytesLike, Turn
from granite_storage.web.errors import MalformedRequestError, RequestError, RequestTooLargeError, UnsupportedRequestError

# What a request may bring.


_MAY_BE_NONE = frozenset({"max_size", "max_file_size"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """The limits of a request; the first byte or part over a limit ends it, whatever its Content-Length says.

    Files are limited by the policy that they are stored under as well, whichever is less.

    Attributes:
        max_size: The most bytes of the whole body, 1 GiB; None for as much as the other limits let pass.
        max_file_size: The most bytes of one file; None for the policy's limit alone.
        max_files: The most files, in all fields together.
        max_fields: The most fields that are not files.
        max_field_size: The most bytes of one field; in a URL-encoded body, with its name and before it is decoded.
        max_fields_size: The most bytes of all fields together, which are kept in memory; of a URL-encoded body, all of it.
        max_headers: The most headers of one part.
        max_header_size: The most bytes of one header of a part.
        max_padding: The most bytes before the first boundary, and after the last one.

    Raises:
        ConfigurationError: A limit is not a number, or is negative.
    """

    max_size: int | None = 1 << 30
    max_file_size: int | None = None
    max_files: int = 100
    max_fields: int = 1000
    max_field_size: int = 1 << 20
    max_fields_size: int = 4 << 20
    max_headers: int = 8
    max_header_size: int = 4224
    max_padding: int = 65536

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(
                    f"{name} must be an integer of at least 0{' or None' if name in _MAY_BE_NONE else ''}, not {value!r}"
                )

    def require(self, limit: str, actual: int, what: str) -> None:
        """Raise `RequestTooLargeError` where there is more of something than a limit allows."""
        maximum = getattr(self, limit)
        if maximum is not None and actual > maximum:
            raise RequestTooLargeError(f"{what} (at most {maximum})", limit=limit, maximum=maximum)


DEFAULT_LIMITS = UploadLimits()


# The headers and the bytes of a body.


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
_OF_BODY = frozenset({b"content-encoding", b"content-length", b"content-range", b"content-type"})
_FORM = b"multipart/form-data"
_USUAL_FORM = re.compile(_FORM + rb"; boundary=([!#$%&'*+.^_`|~0-9A-Za-z-]+)")
_LINE_ENDS = ((b"%0D", b"\r"), (b"%0d", b"\r"), (b"%0A", b"\n"), (b"%0a", b"\n"))


class RequestBody:
    """The body of a request: what its headers say of it, and its bytes.

    Args:
        request: The request; nothing of its body has been read.
        limits: The limits of the body.

    Attributes:
        size: The Content-Length, where there is a sound one; the server sees to it that the body has no more.
        content_type: The Content-Type, empty where it has none.

    Raises:
        RequestTooLargeError: Its Content-Length is over the limit.
        UnsupportedRequestError: It has a Content-Encoding: what would be stored is not what the client means.
        MalformedRequestError: It has a Content-Range (RFC 9110, section 14.5), or two sizes or types.
    """

    __slots__ = ("_limits", "_request", "content_type", "size")

    def __init__(self, request: Request, limits: UploadLimits) -> None:
        found: dict[bytes, bytes] = {}
        for name, value in request.headers.raw:  # one pass over the headers, of which a small form is a good part
            if name not in _OF_BODY:
                continue
            if name in found and name != b"content-encoding":
                raise MalformedRequestError(f"the request has the header {name.decode().title()} more than once")
            found[name] = value
            if name == b"content-encoding" and not {coding.strip().lower() for coding in value.split(b",")} <= _NO_CODING:
                raise UnsupportedRequestError(
                    f"the Content-Encoding {value.decode('latin-1')!r:.80} is not supported; send the body without one"
                )
            if name == b"content-range":
                raise MalformedRequestError("a body with a Content-Range is not supported; send the whole file")
        declared = found.get(b"content-length", b"")
        self.size: int | None = int(declared) if declared.isdigit() and len(declared) < 20 else None
        self.content_type: str = found.get(b"content-type", b"").decode("latin-1")
        self._request, self._limits = request, limits
        if self.size is not None:
            limits.require("max_size", self.size, "the body is too large")

    def media_type(self) -> tuple[bytes, dict[bytes, bytes]]:
        """Return the media type and its parameters."""
        given = self.content_type.encode("latin-1")
        if len(given) > _LONGEST_CONTENT_TYPE:
            raise MalformedRequestError(f"the Content-Type is longer than {_LONGEST_CONTENT_TYPE} characters")
        usual = _USUAL_FORM.fullmatch(given)
        return (_FORM, {b"boundary": usual[1]}) if usual is not None else parse_parameters(given)

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes in pieces that are looked through in a moment, however much the server hands over at a time.

        Raises:
            RequestTooLargeError: There are more bytes than allowed; those that are allowed were yielded.
            MalformedRequestError: There are fewer bytes than the Content-Length says: the body was cut off, or the application
                has read its beginning.
            ClientDisconnect: The client went away before the end.
            ConsumedSourceError: The application has read it already.
        """
        size, maximum = 0, self._limits.max_size
        turn = Turn(_TURN_SECONDS)
        has_begun = False
        try:
            async with aclosing(self._request.stream()) as chunks:
                async for chunk in chunks:
                    has_begun = True
                    size += len(chunk)
                    is_too_large = maximum is not None and size > maximum
                    allowed = chunk[: maximum - size] if maximum is not None and is_too_large else chunk
                    for start in range(0, len(allowed), _PIECE):
                        yield allowed[start : start + _PIECE]  # which is the chunk itself where it is no longer
                        if turn.is_due:
                            await turn.end()
                    if is_too_large:
                        self._limits.require("max_size", size, "the body is too large")
        except RuntimeError as error:
            if has_begun or error.args != ("Stream consumed",):
                raise
            raise ConsumedSourceError(
                "the body of the request was read before the library could receive its files: remove the parameters of the"
                " endpoint and of its dependencies that are declared with Form, File, UploadFile or Body, and what calls"
                " request.form(), request.body(), request.json() or request.stream(), also in a middleware, and receive all files"
                " by one upload_form or upload_body"
            ) from error
        if self.size is not None and size < self.size:
            raise MalformedRequestError(
                f"the body is cut off: it has {size} of the {self.size} bytes that its Content-Length declares"
            )


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
            parameters[name] = _parse_value(match, is_of_form)
    if position == len(header):
        return value.strip(b" \t").lower(), parameters
    raise MalformedRequestError(f"a header has too many parameters (at most {_MOST_PARAMETERS})")


def _parse_value(match: re.Match[bytes], is_of_form: bool) -> bytes:
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


# multipart/form-data (RFC 7578, RFC 2046): heads of parts and their data, in order, never more than was received.
#
# What is read does not depend on how the network cuts the body: the parser decides nothing before it has all the bytes that
# the decision needs, and it holds back no more than a header line or a delimiter.


_LONGEST_BOUNDARY = 256
_MOST_FOLDS = 16
_PARTS_OF_A_TURN = 64
_NO_HEADER = "the body is not multipart/form-data: a part has a header that cannot be read"
# What may follow a boundary: blanks and the end of the line, or two dashes for the last one; or the end of what has arrived.
_AFTER_BOUNDARY = re.compile(rb"(?P<next>[ \t]{0,64}\r\n)|(?P<last>--[ \t]{0,64}\r?\n)|(?P<open>(?:-|(?:--)?[ \t]{0,64}\r?)\Z)")
_LINE_FEED = 0x0A
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_FOLD = re.compile(rb"\r\n[ \t]+")
_HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_KNOWN = frozenset({b"content-disposition", b"content-type"})
_USUAL_DISPOSITION = re.compile(rb'form-data; name="([^"\\%]*)"(?:; filename="([^"\\%]*)")?')


class PartHead(NamedTuple):
    """What a part says of itself.

    Attributes:
        name: The name of its field.
        filename: The name of its file, which may be empty; None where it is not a file.
        content_type: Its media type.
    """

    name: str
    filename: str | None
    content_type: str | None


class _End(Enum):
    PART = auto()
    FORM = auto()


_Event: TypeAlias = PartHead | BytesLike | _End


class MultipartReader:
    """Reads the parts of a form one after the other.

    Args:
        boundary: The boundary, as the Content-Type gives it.
        body: The body; the caller closes it.
        limits: How many parts, and what else, there may be.

    Raises:
        MalformedRequestError: The boundary is unusable; later, the body is not multipart/form-data or is cut off.
        RequestTooLargeError: There are too many parts, or one of them has too many or too long headers.
    """

    def __init__(self, boundary: bytes, body: AsyncIterator[bytes], limits: UploadLimits) -> None:
        self._body = body
        self._parser = MultipartParser(boundary, limits)
        self._current: PartHead | None = None
        self._turn = Turn(_TURN_SECONDS)
        self._count = 0

    async def next_part(self) -> PartHead | None:
        """Return the head of the next part, None after the last; what was not read of the part before it is passed over."""
        while self._current is not None:
            await self.next_chunk(self._current)
        self._count += 1
        if self._count % _PARTS_OF_A_TURN == 0 and self._turn.is_due:
            await self._turn.end()
        event = await self._next_event()
        if isinstance(event, PartHead):
            self._current = event
            return event
        await self._read_to_end()
        return None

    async def next_chunk(self, part: PartHead) -> BytesLike | None:
        """Return more data of a part, None at its end and for a part that has been passed."""
        if part is not self._current:
            return None
        event = await self._next_event()
        if isinstance(event, _End):
            self._current = None
            return None
        assert not isinstance(event, PartHead)  # noqa: S101  # a part ends before the next one begins
        return event

    async def _next_event(self) -> _Event:
        while (event := self._parser.next_event()) is None:
            self._parser.feed(await anext(self._body, None))
        return event

    async def _read_to_end(self) -> None:
        """Pass over what follows the last boundary: only a body that has arrived whole is a form."""
        async for piece in self._body:
            self._parser.feed(piece)
            self._parser.next_event()


class MultipartParser:
    """The grammar: fed with pieces of a body, it gives what is in them.

    Args:
        boundary: The boundary.
        limits: How many parts, and what else, there may be.
    """

    def __init__(self, boundary: bytes, limits: UploadLimits) -> None:
        if not boundary:
            raise MalformedRequestError("the Content-Type multipart/form-data has no boundary")
        if len(boundary) > _LONGEST_BOUNDARY or _CONTROL.search(boundary):
            raise MalformedRequestError(
                f"the boundary in the Content-Type is longer than {_LONGEST_BOUNDARY} bytes, or has control characters"
            )
        self._dashes = b"--" + boundary
        self._delimiter = b"\r\n" + self._dashes
        self._limits = limits
        self._buffer = b""
        self._position = 0
        self._has_ended = False
        self._padding = self._files = self._fields = 0
        self._events = self._read()
        self._error: RequestError | None = None

    def feed(self, piece: bytes | None) -> None:
        """Take the next piece of the body, None at its end; for when there is no event in the pieces before it."""
        if piece is None and self._has_ended:
            raise MalformedRequestError("the form is cut off: its last boundary is missing")
        self._has_ended = piece is None
        rest = self._buffer[self._position :]
        self._buffer = rest + (piece or b"") if rest else piece or b""
        self._position = 0

    def next_event(self) -> _Event | None:
        """Return the head of a part, data of it, or an end; None where more of the body is needed.

        Once it has raised an error, it raises the same one again: what stores a file may have caught the first.
        """
        if self._error is None:
            try:
                return next(self._events)
            except RequestError as error:
                self._error = error
        raise self._error

    def _read(self) -> Generator[_Event | None, None, None]:
        after = yield from self._read_preamble()
        while not self._is_last(after):
            self._position = after.end()
            yield self._head_of((yield from self._read_headers()))
            after = yield from self._read_data()
            yield _End.PART
        self._position = after.end()
        self._padding = 0
        yield _End.FORM
        while True:
            self._skip(len(self._buffer))
            yield None

    def _read_preamble(self) -> Generator[None, None, re.Match[bytes]]:
        """Pass over what comes before the first delimiter, at most `max_padding` bytes (RFC 2046, section 5.1.1).

        Raises:
            MalformedRequestError: There is no part after it: what was passed over may have been meant for one.
        """
        is_blank = True
        while True:
            buffer, start = self._buffer, self._position
            # The last bytes may belong to a delimiter, and the one before them tells whether a line begins there.
            after, end = None, max(start, len(buffer) - len(self._dashes))
            found = buffer.find(self._dashes, start)
            while found >= 0:
                begins_line = buffer[found - 1] == _LINE_FEED if found else not self._padding
                if begins_line and (after := self._after(found)) is not None:
                    self._require_padding(found - start)
                    end = max(start, found - 1) if self._is_open(after) else found
                    break
                found = buffer.find(self._dashes, found + 1)
            is_blank = is_blank and not buffer[start:end].strip()
            self._skip(end)
            if after is not None and not self._is_open(after):
                if self._is_last(after) and not is_blank:
                    raise MalformedRequestError("the form has no part, but other data before its last boundary")
                return after
            yield None

    def _read_headers(self) -> Generator[None, None, dict[bytes, bytes]]:
        headers: dict[bytes, bytes] = {}
        while True:
            buffer, start = self._buffer, self._position
            if buffer.startswith(self._dashes, start) and (after := self._after(start)) is not None:
                if not self._is_open(after):
                    return headers  # a part without data may end with its headers
            elif buffer.startswith(b"\r\n", start):
                self._position += 2
                return headers
            elif (end := self._end_of_header(start)) >= 0:
                self._position = end + 2
                self._add_header(headers, buffer[start:end])
                continue
            else:
                self._limits.require("max_header_size", len(buffer) - 2 - start, "a header of a part is too long")
            yield None

    def _end_of_header(self, start: int) -> int:
        """Return where the line of a header ends, with the lines that it goes on in; -1 where that is not known yet."""
        buffer = self._buffer
        folds = 0
        end = buffer.find(b"\r", start)  # one byte is found ten times faster than two
        while end >= 0 and (end + 2 < len(buffer) or self._has_ended):
            if end - start > self._limits.max_header_size:
                self._limits.require("max_header_size", end - start, "a header of a part is too long")
            if buffer[end + 1 : end + 2] != b"\n":
                raise MalformedRequestError(_NO_HEADER)
            if buffer[end + 2 : end + 3] not in (b" ", b"\t"):
                return end
            folds += 1
            if folds > _MOST_FOLDS:
                raise MalformedRequestError(f"a header of a part is folded over too many lines (at most {_MOST_FOLDS})")
            end = buffer.find(b"\r", end + 2)
        return -1

    def _read_data(self) -> Generator[BytesLike | None, None, re.Match[bytes]]:
        # A part may have no data: then the end of its last header line is the beginning of the delimiter.
        while self._dashes.startswith(rest := self._buffer[self._position : self._position + len(self._dashes)]):
            after = self._after(self._position) if rest == self._dashes else None
            if after is not None and not self._is_open(after):
                return after
            if after is None and (rest == self._dashes or self._has_ended):
                break
            yield None
        while True:
            buffer, start = self._buffer, self._position
            end = buffer.find(self._delimiter, start)
            while end >= 0 and self._after(end + 2) is None:
                end = buffer.find(self._delimiter, end + len(self._delimiter))
            if end == start and (after := self._after(end + 2)) is not None and not self._is_open(after):
                return after
            self._position = end = end if end >= 0 else self._end_of_data()
            yield None if start == end else buffer if end - start == len(buffer) else memoryview(buffer)[start:end]

    def _after(self, dashes: int) -> re.Match[bytes] | None:
        """Return what follows a boundary, where that makes it a delimiter, or may yet.

        Raises:
            MalformedRequestError: It is neither a delimiter nor data.
        """
        position = dashes + len(self._dashes)
        after = _AFTER_BOUNDARY.match(self._buffer, position)
        if after is None and self._buffer[position] in b" \t":
            raise MalformedRequestError("a boundary is followed by blanks and then by other characters than the end of its line")
        if after is None and self._buffer[position] == _LINE_FEED:
            raise MalformedRequestError("the line of a boundary ends with a line feed alone; lines of a form end with CR LF")
        return after

    def _is_open(self, after: re.Match[bytes]) -> bool:
        """Return whether it depends on more of the body if this is a delimiter."""
        return after["open"] is not None and not self._is_last(after)

    def _is_last(self, after: re.Match[bytes]) -> bool:
        """Return whether it is the last delimiter, with which a body may end."""
        return after["last"] is not None or (self._has_ended and after[0].startswith(b"--"))

    def _head_of(self, headers: dict[bytes, bytes]) -> PartHead:
        head = _parse_head(headers)
        if head.filename is None:
            self._fields += 1
            self._limits.require("max_fields", self._fields, "there are too many fields")
        else:
            self._files += 1
            self._limits.require("max_files", self._files, "there are too many files")
        return head

    def _add_header(self, headers: dict[bytes, bytes], line: bytes) -> None:
        if len(headers) >= self._limits.max_headers:
            self._limits.require("max_headers", len(headers) + 1, "a part has too many headers")
        if b"\r" in line:
            line = _FOLD.sub(b" ", line)
        colon = line.find(b":")
        name = line[: max(colon, 0)].lower()
        if not _HEADER_NAME.fullmatch(name) or b"\n" in line or b"\0" in line:
            raise MalformedRequestError(_NO_HEADER)
        if name in headers:
            raise MalformedRequestError("a part has a header twice")
        headers[name] = line[colon + 1 :].strip(b" \t") if name in _KNOWN else b""

    def _end_of_data(self) -> int:
        """Return where the data ends that cannot belong to a delimiter: one begins with the last CR, if at all."""
        buffer = self._buffer
        last = buffer.rfind(b"\r", max(self._position, len(buffer) - len(self._delimiter) + 1))
        return last if last >= 0 and self._delimiter.startswith(buffer[last:]) else len(buffer)

    def _skip(self, end: int) -> None:
        self._require_padding(end - self._position)
        self._padding += end - self._position
        self._position = end

    def _require_padding(self, more: int) -> None:
        if self._padding + more > self._limits.max_padding:
            self._limits.require("max_padding", self._padding + more, "there is too much outside of the boundaries")


def _parse_head(headers: dict[bytes, bytes]) -> PartHead:
    """Return what the headers of a part say; Content-Transfer-Encoding says nothing in a form (RFC 7578, section 4.7)."""
    given = headers.get(b"content-disposition", b"")
    usual = _USUAL_DISPOSITION.fullmatch(given)
    if usual is not None:
        name, filename = usual.groups()
    else:
        disposition, parameters = parse_parameters(given, is_of_form=True)
        if disposition != b"form-data" or b"name" not in parameters:
            raise MalformedRequestError("a part has no Content-Disposition: form-data with a name")
        name, filename = parameters[b"name"], _find_filename(parameters)
    content_type = headers.get(b"content-type")
    return PartHead(
        decode_text(name, "the name of a field"),
        None if filename is None else filename.decode("utf-8", "replace"),
        None if content_type is None else content_type_to_keep(content_type.decode("latin-1")),
    )


def _find_filename(parameters: dict[bytes, bytes]) -> bytes | None:
    """Return the file name; `filename*`, which no form should have (RFC 7578, section 4.2), counts where it is the only one."""
    filename = parameters.get(b"filename")
    if filename is None and (extended := parameters.get(b"filename*")) is not None:
        return unquote_to_bytes(extended.rpartition(b"'")[2])
    return filename


def decode_text(raw: bytes, what: str = "a field") -> str:
    """Return a text of a form, whose fields are in UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequestError(f"{what} is not UTF-8") from error


# application/x-www-form-urlencoded


_SLICE = 16 * 1024
_BLANKS = bytes.maketrans(b"+", b" ")
_NO_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


async def read_fields(body: AsyncIterator[bytes], limits: UploadLimits) -> list[tuple[str, str]]:
    """Return the fields of a body; each is limited as it is sent, before anything of it is decoded.

    Raises:
        MalformedRequestError: A field is not UTF-8.
        RequestTooLargeError: There are too many fields, or too large ones.
    """
    fields: list[tuple[str, str]] = []
    turn = Turn(_TURN_SECONDS)
    begun: list[bytes] = []  # of a field whose end has not arrived yet
    size, count, begun_size = 0, 1, 0
    async for piece in body:
        size += len(piece)
        limits.require("max_fields_size", size, "the fields are too large together")
        if b"+" in piece:
            piece = piece.translate(_BLANKS)
        *complete, last = piece.split(b"&", limits.max_fields) if b"&" in piece else [piece]
        count += len(complete)
        limits.require("max_fields", count, "there are too many fields")
        for raw in complete:
            await _add_field(fields, b"".join((*begun, raw)), limits, turn)
            begun, begun_size = [], 0
        begun.append(last)
        begun_size += len(last)
        limits.require("max_field_size", begun_size, "a field is too large")
    await _add_field(fields, b"".join(begun), limits, turn)
    return fields


async def _add_field(fields: list[tuple[str, str]], raw: bytes, limits: UploadLimits, turn: Turn) -> None:
    if not raw:
        return
    limits.require("max_field_size", len(raw), "a field is too large")
    try:
        if b"%" not in raw and len(raw) > _SLICE and (equals := raw.find(b"=")) >= 0:
            # A long value is decoded where it lies: to copy it once more takes a quarter of all the time.
            fields.append((raw[:equals].decode(), str(memoryview(raw)[equals + 1 :], "utf-8")))
            if turn.is_due:
                await turn.end()
            return
        name, _, value = raw.partition(b"=")
        if len(raw) <= _SLICE:
            fields.append((_unquote(name).decode(), _unquote(value).decode()))
        else:
            fields.append(((await _unquote_in_slices(name, turn)).decode(), (await _unquote_in_slices(value, turn)).decode()))
    except UnicodeDecodeError as error:
        raise MalformedRequestError("a field is not UTF-8") from error
    if (len(raw) > _SLICE or not len(fields) % 64) and turn.is_due:
        await turn.end()


async def _unquote_in_slices(raw: bytes, turn: Turn) -> bytes:
    """Decode percent-encoding, and let other tasks run from time to time."""
    decoded: list[bytes] = []
    start = 0
    while start < len(raw):
        end = start + _SLICE
        cut = raw.rfind(b"%", end - 2, end) if end < len(raw) else -1  # an escape there may go on in the next slice
        end = cut if cut >= 0 else end
        decoded.append(_unquote(raw[start:end]))
        start = end
        if turn.is_due:
            await turn.end()
    return b"".join(decoded)


def _unquote(raw: bytes) -> bytes:
    """Decode percent-encoding as quoted-printable, which has `=` for `%` and is decoded in C whatever it holds."""
    if b"%" not in raw:
        return raw
    return binascii.a2b_qp(_NO_ESCAPE.sub(b"=25", raw.replace(b"=", b"=3D")).replace(b"%", b"="))
