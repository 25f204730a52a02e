"""multipart/form-data (RFC 7578) as it arrives: heads of parts and their data, in order, and never more than was received.

The grammar is python-multipart's. It pushes: for each piece of the body it calls back for everything that is in it. What it
says is put into a queue that is empty again before the next piece is asked for, so whoever is slow to take the data of a part
holds up the client, and nothing piles up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from granite_storage.streams import BytesLike
from granite_storage.web._body import content_type_to_keep
from granite_storage.web.exceptions import MalformedRequestError
from granite_storage.web.limits import UploadLimits

__all__ = ["MultipartReader", "PartHead"]


@dataclass(frozen=True, slots=True, eq=False)
class PartHead:
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
        RequestTooLargeError: There are too many parts.
    """

    def __init__(self, boundary: bytes, body: AsyncIterator[bytes], limits: UploadLimits) -> None:
        self._body = body
        self._events: deque[_Event] = deque()
        self._parser = _Parser(boundary, limits, self._events)
        self._current: PartHead | None = None

    async def next_part(self) -> PartHead | None:
        """Return the head of the next part, None after the last; what was not read of the part before it is passed over."""
        while self._current is not None:
            await self.next_chunk(self._current)
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
        while not self._events:
            piece = await anext(self._body, None)
            if piece is None:
                raise MalformedRequestError("the form is cut off: its last boundary is missing")
            self._parser.write(piece)
        return self._events.popleft()

    async def _read_to_end(self) -> None:
        """Pass over what follows the last boundary: only a body that has arrived whole is a form."""
        async for piece in self._body:
            self._parser.write(piece)


class _Parser:
    """The push parser, and limits on what it may find."""

    def __init__(self, boundary: bytes, limits: UploadLimits, events: deque[_Event]) -> None:
        self._limits = limits
        self._events = events
        self._files = self._fields = self._padding = 0
        self._field, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._inside = False
        if not boundary:
            raise MalformedRequestError("the Content-Type has no boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
                max_header_count=limits.max_headers,
                max_header_size=limits.max_header_size,
            )
        except FormParserError as error:
            raise MalformedRequestError("the boundary in the Content-Type is too long") from error

    def write(self, piece: bytes) -> None:
        """Look through a piece of the body."""
        if not self._inside:
            self._padding += len(piece)
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise MalformedRequestError("the body is not multipart/form-data, or a header in it is too long") from error
        if not self._inside:
            self._limits.require("max_padding", self._padding, "there is too much outside of the boundaries")

    def _on_part_begin(self) -> None:
        self._inside, self._padding = True, 0
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        name = bytes(self._field).lower()
        if name in self._headers:
            raise MalformedRequestError("a part has a header twice")
        self._headers[name] = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        head = _head_of(self._headers)
        if head.filename is None:
            self._fields += 1
            self._limits.require("max_fields", self._fields, "there are too many fields")
        else:
            self._files += 1
            self._limits.require("max_files", self._files, "there are too many files")
        self._events.append(head)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data if end - start == len(data) else memoryview(data)[start:end])

    def _on_part_end(self) -> None:
        self._events.append(_End.PART)

    def _on_end(self) -> None:
        self._inside = False
        self._events.append(_End.FORM)


def _head_of(headers: dict[bytes, bytes]) -> PartHead:
    """Return what the headers of a part say; `filename*` and Content-Transfer-Encoding say nothing in a form (RFC 7578)."""
    disposition, options = parse_options_header(headers.get(b"content-disposition", b""))
    if disposition != b"form-data" or b"name" not in options:
        raise MalformedRequestError("a part has no Content-Disposition: form-data with a name")
    filename = options.get(b"filename")
    return PartHead(
        name=_decoded(options[b"name"]),
        filename=None if filename is None else filename.decode("utf-8", "replace"),
        content_type=content_type_to_keep(headers.get(b"content-type", b"").decode("latin-1")),
    )


def _decoded(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequestError("the name of a field is not UTF-8") from error
