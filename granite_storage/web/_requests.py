"""multipart/form-data (RFC 7578, RFC 2046) as it arrives: heads of parts and their data, in order, never more than was received.

What is read does not depend on how the network cuts the body: the parser decides nothing before it has all the bytes that the
decision needs, and it holds back no more than a header line or a delimiter.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from enum import Enum, auto
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote_to_bytes

from granite_storage.streams import BytesLike
from granite_storage.web._body import Turn, content_type_to_keep, parse_parameters
from granite_storage.web.exceptions import MalformedRequestError
from granite_storage.web.limits import UploadLimits

__all__ = ["MultipartParser", "MultipartReader", "PartHead"]

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
        filename: The name of its file, which may be empty; None where it is no file.
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
        self._turn = Turn()
        self._count = 0

    async def next_part(self) -> PartHead | None:
        """Return the head of the next part, None after the last; what was not read of the part before it is passed over."""
        while self._current is not None:
            await self.next_chunk(self._current)
        self._count += 1
        if self._count % _PARTS_OF_A_TURN == 0:
            await self._turn.end_if_due()
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
            raise MalformedRequestError("the Content-Type has no boundary")
        if len(boundary) > _LONGEST_BOUNDARY or _CONTROL.search(boundary):
            raise MalformedRequestError("the boundary in the Content-Type is too long, or has control characters")
        self._dashes = b"--" + boundary
        self._delimiter = b"\r\n" + self._dashes
        self._limits = limits
        self._buffer = b""
        self._position = 0
        self._has_ended = False
        self._next: Callable[[], _Event | None] = self._in_preamble
        self._has_preamble = False
        self._padding = self._files = self._fields = 0
        self._headers: dict[bytes, bytes] = {}

    def feed(self, piece: bytes | None) -> None:
        """Take the next piece of the body, None at its end; for when there is no event in the pieces before it."""
        if piece is None and self._has_ended:
            raise MalformedRequestError("the form is cut off: its last boundary is missing")
        self._has_ended = piece is None
        rest = self._buffer[self._position :]
        self._buffer = rest + (piece or b"") if rest else piece or b""
        self._position = 0

    def next_event(self) -> _Event | None:
        """Return the head of a part, data of it, or an end; None where more of the body is needed."""
        return self._next()

    def _in_preamble(self) -> _Event | None:
        """Pass over what comes before the first delimiter, at most `max_padding` bytes (RFC 2046, section 5.1.1).

        Raises:
            MalformedRequestError: There is no part after it: what was passed over may have been meant for one.
        """
        buffer, start = self._buffer, self._position
        found = buffer.find(self._dashes, start)
        while found >= 0:
            begins_line = buffer[found - 1] == _LINE_FEED if found else not self._padding
            if begins_line and (after := self._after(found)) is not None:
                self._require_padding(found - start)
                if self._is_open(after):
                    self._skip_preamble(max(start, found - 1))
                    return None
                self._skip_preamble(found)
                if self._has_preamble and self._is_last(after):
                    raise MalformedRequestError("the form has no part, but something else before its last boundary")
                return self._begin_next(after)
            found = buffer.find(self._dashes, found + 1)
        # The last bytes may belong to a delimiter, and the one before them tells whether a line begins there.
        self._skip_preamble(max(start, len(buffer) - len(self._dashes)))
        return None

    def _skip_preamble(self, end: int) -> None:
        self._has_preamble = self._has_preamble or bool(self._buffer[self._position : end].strip())
        self._skip(end)

    def _in_headers(self) -> _Event | None:
        buffer = self._buffer
        while True:
            start = self._position
            if buffer.startswith(self._dashes, start) and (after := self._after(start)) is not None:
                # A part without data may end with its headers.
                return None if self._is_open(after) else self._begin_data()
            if buffer.startswith(b"\r\n", start):
                self._position += 2
                return self._begin_data()
            end = self._end_of_header(start)
            if end < 0:
                self._limits.require("max_header_size", len(buffer) - 2 - start, "a header of a part is too long")
                return None
            self._position = end + 2
            self._add_header(buffer[start:end])

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
                raise MalformedRequestError(f"a header of a part goes on over too many lines (at most {_MOST_FOLDS})")
            end = buffer.find(b"\r", end + 2)
        return -1

    def _before_data(self) -> _Event | None:
        """See whether a part has no data: then the end of its last header line is the beginning of the delimiter."""
        rest = self._buffer[self._position : self._position + len(self._dashes)]
        if rest == self._dashes and (after := self._after(self._position)) is not None:
            return None if self._is_open(after) else self._end_part(after)
        if not self._has_ended and len(rest) < len(self._dashes) and self._dashes.startswith(rest):
            return None
        self._next = self._in_data
        return self._in_data()

    def _in_data(self) -> _Event | None:
        buffer, start = self._buffer, self._position
        found = buffer.find(self._delimiter, start)
        while found >= 0:
            after = self._after(found + 2)
            if after is not None and found > start:
                return self._data_to(found)
            if after is not None:
                return None if self._is_open(after) else self._end_part(after)
            found = buffer.find(self._delimiter, found + len(self._delimiter))
        return self._data_to(self._end_of_data())

    def _in_epilogue(self) -> _Event | None:
        self._skip(len(self._buffer))
        return None

    def _after(self, dashes: int) -> re.Match[bytes] | None:
        """Return what follows a boundary, where that makes it a delimiter, or may yet.

        Raises:
            MalformedRequestError: It is neither a delimiter nor data.
        """
        position = dashes + len(self._dashes)
        after = _AFTER_BOUNDARY.match(self._buffer, position)
        if after is None and self._buffer[position] in b" \t":
            raise MalformedRequestError("a boundary is followed by blanks, and then by more than the end of its line")
        if after is None and self._buffer[position] == _LINE_FEED:
            raise MalformedRequestError("the line of a boundary ends with a line feed alone: lines of a form end with CR LF")
        return after

    def _is_open(self, after: re.Match[bytes]) -> bool:
        """Tell whether more of the body must say if it is a delimiter."""
        return after["open"] is not None and not self._is_last(after)

    def _is_last(self, after: re.Match[bytes]) -> bool:
        """Tell whether it is the last delimiter, with which a body may end."""
        return after["last"] is not None or (self._has_ended and after[0].startswith(b"--"))

    def _begin_next(self, after: re.Match[bytes]) -> _Event | None:
        self._position = after.end()
        self._padding = 0
        if self._is_last(after):
            self._next = self._in_epilogue
            return _End.FORM
        self._headers = {}
        self._next = self._in_headers
        return self._in_headers()

    def _end_part(self, after: re.Match[bytes]) -> _Event:
        """End a part; the delimiter stays for the next event."""
        self._next = lambda: self._begin_next(after)
        return _End.PART

    def _begin_data(self) -> PartHead:
        head = _head_of(self._headers)
        if head.filename is None:
            self._fields += 1
            self._limits.require("max_fields", self._fields, "there are too many fields")
        else:
            self._files += 1
            self._limits.require("max_files", self._files, "there are too many files")
        self._next = self._before_data
        return head

    def _add_header(self, line: bytes) -> None:
        if len(self._headers) >= self._limits.max_headers:
            self._limits.require("max_headers", len(self._headers) + 1, "a part has too many headers")
        if b"\r" in line:
            line = _FOLD.sub(b" ", line)
        colon = line.find(b":")
        name = line[: max(colon, 0)].lower()
        if not _HEADER_NAME.fullmatch(name) or b"\n" in line or b"\0" in line:
            raise MalformedRequestError(_NO_HEADER)
        if name in self._headers:
            raise MalformedRequestError("a part has a header twice")
        self._headers[name] = line[colon + 1 :].strip(b" \t") if name in _KNOWN else b""

    def _data_to(self, end: int) -> BytesLike | None:
        buffer, start = self._buffer, self._position
        self._position = end
        if start == end:
            return None
        return buffer if end - start == len(buffer) else memoryview(buffer)[start:end]

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
        self._limits.require("max_padding", self._padding + more, "there is too much outside of the boundaries")


def _head_of(headers: dict[bytes, bytes]) -> PartHead:
    """Return what the headers of a part say; Content-Transfer-Encoding says nothing in a form (RFC 7578, section 4.7)."""
    given = headers.get(b"content-disposition", b"")
    usual = _USUAL_DISPOSITION.fullmatch(given)
    if usual is not None:
        name, filename = usual.groups()
    else:
        disposition, parameters = parse_parameters(given, is_of_form=True)
        if disposition != b"form-data" or b"name" not in parameters:
            raise MalformedRequestError("a part has no Content-Disposition: form-data with a name")
        name, filename = parameters[b"name"], _filename_of(parameters)
    content_type = headers.get(b"content-type")
    return PartHead(
        _decoded(name),
        None if filename is None else filename.decode("utf-8", "replace"),
        None if content_type is None else content_type_to_keep(content_type.decode("latin-1")),
    )


def _filename_of(parameters: dict[bytes, bytes]) -> bytes | None:
    """Return the file name; `filename*`, which no form should have (RFC 7578, section 4.2), counts where it is the only one."""
    filename = parameters.get(b"filename")
    if filename is None and (extended := parameters.get(b"filename*")) is not None:
        return unquote_to_bytes(extended.rpartition(b"'")[2])
    return filename


def _decoded(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequestError("the name of a field is not UTF-8") from error
