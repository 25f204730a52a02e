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
_NO_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


async def read_fields(body: AsyncIterator[bytes], limits: UploadLimits) -> list[tuple[str, str]]:
    """Return the fields of a body; each is limited as it is sent, before anything of it is decoded.

    Raises:
        MalformedRequestError: A field is not UTF-8.
        RequestTooLargeError: There are too many fields, or too large ones.
    """
    fields: list[tuple[str, str]] = []
    turn = Turn()
    size, count, raw = 0, 1, bytearray()
    async for piece in body:
        size += len(piece)
        limits.require("max_fields_size", size, "the fields are too large together")
        start = 0
        while (end := piece.find(b"&", start)) >= 0:
            count += 1
            limits.require("max_fields", count, "there are too many fields")
            raw += piece[start:end]
            start = end + 1
            await _add_field(fields, raw, limits, turn)
            raw.clear()
        raw += piece[start:]
        limits.require("max_field_size", len(raw), "a field is too large")
    await _add_field(fields, raw, limits, turn)
    return fields


async def _add_field(fields: list[tuple[str, str]], raw: bytearray, limits: UploadLimits, turn: Turn) -> None:
    limits.require("max_field_size", len(raw), "a field is too large")
    if not raw:
        return
    name, _, value = raw.partition(b"=")
    try:
        fields.append(((await _decoded(name, turn)).decode(), (await _decoded(value, turn)).decode()))
    except UnicodeDecodeError as error:
        raise MalformedRequestError("a field is not UTF-8") from error
    await turn.end_if_due()


async def _decoded(raw: bytearray, turn: Turn) -> bytearray:
    """Decode percent-encoding, a slice at a time; what is no escape stays as it is."""
    raw = raw.replace(b"+", b" ")
    if b"%" not in raw:
        return raw
    decoded = bytearray()
    start = 0
    while start < len(raw):
        end = start + _SLICE
        cut = raw.rfind(b"%", end - 2, end) if end < len(raw) else -1  # an escape there may go on in the next slice
        end = cut if cut >= 0 else end
        decoded += _unquoted(raw[start:end])
        start = end
        await turn.end_if_due()
    return decoded


def _unquoted(raw: bytearray) -> bytes:
    """Decode percent-encoding as quoted-printable, which has `=` for `%` and is decoded in C whatever it holds."""
    return binascii.a2b_qp(_NO_ESCAPE.sub(b"=25", raw.replace(b"=", b"=3D")).replace(b"%", b"="))
