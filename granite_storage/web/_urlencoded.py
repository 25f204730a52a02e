"""application/x-www-form-urlencoded bodies as they arrive."""

from __future__ import annotations

import binascii
import re
from collections.abc import AsyncIterator

from granite_storage.web._body import Turn
from granite_storage.web.exceptions import MalformedRequestError
from granite_storage.web.limits import UploadLimits

__all__ = ["read_fields"]

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
    turn = Turn()
    size, count, begun = 0, 1, _Begun()
    async for piece in body:
        size += len(piece)
        limits.require("max_fields_size", size, "the fields are too large together")
        *complete, last = piece.split(b"&", limits.max_fields) if b"&" in piece else [piece]
        count += len(complete)
        limits.require("max_fields", count, "there are too many fields")
        for raw in complete:
            await _add_field(fields, begun.ended(raw), limits, turn)
        begun.add(last)
        limits.require("max_field_size", begun.size, "a field is too large")
    await _add_field(fields, begun.ended(b""), limits, turn)
    return fields


class _Begun:
    """A field whose end has not arrived yet."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._pieces.append(piece)

    def ended(self, last: bytes) -> bytes:
        """Return the field, and begin another."""
        if not self.size:
            return last
        pieces, self._pieces, self.size = [*self._pieces, last], [], 0
        return b"".join(pieces)


async def _add_field(fields: list[tuple[str, str]], raw: bytes, limits: UploadLimits, turn: Turn) -> None:
    if not raw:
        return
    limits.require("max_field_size", len(raw), "a field is too large")
    name, _, value = (raw.translate(_BLANKS) if b"+" in raw else raw).partition(b"=")
    try:
        if b"%" not in raw:
            fields.append((name.decode(), value.decode()))
        elif len(raw) <= _SLICE:
            fields.append((_unquoted(name).decode(), _unquoted(value).decode()))
        else:
            fields.append(((await _unquoted_in_slices(name, turn)).decode(), (await _unquoted_in_slices(value, turn)).decode()))
    except UnicodeDecodeError as error:
        raise MalformedRequestError("a field is not UTF-8") from error
    if len(raw) > _SLICE or not len(fields) % 64:
        await turn.end_if_due()


async def _unquoted_in_slices(raw: bytes, turn: Turn) -> bytes:
    """Decode percent-encoding, and let other tasks run from time to time."""
    decoded: list[bytes] = []
    start = 0
    while start < len(raw):
        end = start + _SLICE
        cut = raw.rfind(b"%", end - 2, end) if end < len(raw) else -1  # an escape there may go on in the next slice
        end = cut if cut >= 0 else end
        decoded.append(_unquoted(raw[start:end]))
        start = end
        await turn.end_if_due()
    return b"".join(decoded)


def _unquoted(raw: bytes) -> bytes:
    """Decode percent-encoding as quoted-printable, which has `=` for `%` and is decoded in C whatever it holds."""
    if b"%" not in raw:
        return raw
    return binascii.a2b_qp(_NO_ESCAPE.sub(b"=25", raw.replace(b"=", b"=3D")).replace(b"%", b"="))
