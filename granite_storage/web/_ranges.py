"""Which bytes a Range header asks for.

Source: RFC 9110, section 14. What is malformed, of another unit, or asks for too much in too many pieces is ignored, as the RFC
allows: the answer is then the whole object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from granite_storage.backends.base import ByteRange

__all__ = ["MAX_RANGES", "requested_ranges"]

MAX_RANGES = 10
"""The most ranges that are sent, once those that lie close together are joined: each may be a request to the storage."""

_MAX_SPECS = 100
_PART_OVERHEAD = 100
_SPEC = re.compile(r"([0-9]*)-([0-9]*)")
_LARGEST = 10**20


def requested_ranges(header: str, size: int) -> list[ByteRange] | None:
    """Return the ranges to send, in the order they were asked for, those that lie close together joined.

    Args:
        header: The value of the Range header.
        size: The size of the object, in bytes.

    Returns:
        None where the header is to be ignored; nothing where none of its ranges can be satisfied.
    """
    unit, _, specs = header.partition("=")
    if unit.lower() != "bytes" or specs.count(",") >= _MAX_SPECS:
        return None
    texts = [text for text in (spec.strip(" \t") for spec in specs.split(",")) if text]
    matches = [_SPEC.fullmatch(text) for text in texts]
    ranges = []
    for match in matches:
        span = None if match is None else _span(match[1], match[2], size)
        if span is None:
            return None
        ranges.append(span)
    if not ranges or (size == 0 and any(_is_suffix(text) for text in texts)):
        return None
    joined = _joined(span for span in ranges if span.start < span.stop)
    return joined if len(joined) <= MAX_RANGES else None


def _span(first: str, last: str, size: int) -> ByteRange | None:
    """Return a range cut to the object, an empty one where it lies outside; None where it is malformed."""
    if not first:
        return ByteRange(max(0, size - _number(last)), size) if last else None
    start = _number(first)
    if not last:
        return ByteRange(start, size)
    return ByteRange(start, min(_number(last) + 1, size)) if start <= _number(last) else None


def _is_suffix(spec: str) -> bool:
    """Tell whether it asks for some last bytes, which even an empty object has; but no 206 can say so."""
    return spec.startswith("-") and _number(spec[1:]) > 0


def _number(digits: str) -> int:
    """Read a number of any length, in time that does not grow with its square."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= 20 else _LARGEST


def _joined(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Join ranges that overlap, or whose gap costs less than another part; each stands where the first of them stood."""
    numbered = sorted((span.start, span.stop, place) for place, span in enumerate(ranges))
    joined: list[tuple[int, int, int]] = []
    for start, stop, place in numbered:
        if joined and start <= joined[-1][1] + _PART_OVERHEAD:
            before, end, first = joined[-1]
            joined[-1] = (before, max(end, stop), min(first, place))
        else:
            joined.append((start, stop, place))
    return [ByteRange(start, stop) for start, stop, _ in sorted(joined, key=lambda one: one[2])]
