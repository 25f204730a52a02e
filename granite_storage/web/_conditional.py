"""Conditional requests and ranges: whether a request is answered with the object, and with which bytes of it.

Source: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate

from starlette.datastructures import Headers

from granite_storage.backends.base import ByteRange

MAX_RANGES = 10
"""The most ranges that are sent, once those that lie close together are joined: each may be a request to the storage."""
_MAX_SPECS = 100
_PART_OVERHEAD = 100
_SPEC = re.compile(r"([0-9]*)-([0-9]*)")
_LARGEST = 10**20
_TAG = re.compile(r'(W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_TAGS = re.compile(rf"(?:[ \t,]*{_TAG.pattern}(?=[ \t,]|\Z))*[ \t,]*")
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_WEEKDAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_WEEKDAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_CLOCK = r"[0-9]{2}:[0-9]{2}:[0-9]{2}"
_DATE = re.compile(
    rf"{_WEEKDAY}, [0-9]{{2}} {_MONTH} [0-9]{{4}} {_CLOCK} GMT"
    rf"|{_LONG_WEEKDAY}, [0-9]{{2}}-{_MONTH}-[0-9]{{2}} {_CLOCK} GMT"
    rf"|{_WEEKDAY} {_MONTH} [ 0-9][0-9] {_CLOCK} [0-9]{{4}}"
)
_YEAR = re.compile(r"\b[0-9]{4}\b")


@dataclass(frozen=True, slots=True)
class Validators:
    """What tells one state of an object from another.

    Attributes:
        etag: The entity tag, quoted; `W/` before it where it is weak.
        modified: When the object was stored, in whole seconds.
    """

    etag: str
    modified: datetime


def failed_precondition(headers: Headers, validators: Validators) -> int | None:
    """Return 412 or 304 where a GET or HEAD is not to be answered with the object, in the order of section 13.2.2."""
    if (wanted := header_of(headers, "if-match")) is not None:
        if not _has_tag(wanted, validators.etag, strong=True):
            return 412
    elif (date := http_date(header_of(headers, "if-unmodified-since"))) and validators.modified > date:
        return 412
    if (known := header_of(headers, "if-none-match")) is not None:
        return 304 if _has_tag(known, validators.etag, strong=False) else None
    date = http_date(header_of(headers, "if-modified-since"))
    return 304 if date and validators.modified <= date else None


def range_applies(headers: Headers, validators: Validators, now: datetime) -> bool:
    """Return whether If-Range lets a Range be honoured: the client has part of just this object.

    A date serves only where it is strong, a second old at least: within one second there may have been two objects.
    Source: RFC 9110, sections 13.1.5 and 8.8.2.2.
    """
    condition = header_of(headers, "if-range")
    if condition is None:
        return True
    if condition.endswith('"'):
        return condition == validators.etag and not condition.startswith("W/")
    return http_date(condition) == validators.modified and now - validators.modified >= timedelta(seconds=1)


def header_of(headers: Headers, name: str) -> str | None:
    """Return the value of a header; that of several lines is their list."""
    values = headers.getlist(name)
    return ", ".join(values).strip(" \t") if values else None


def is_entity_tag(text: str) -> bool:
    """Return whether it is one entity tag, weak or strong. Source: RFC 9110, section 8.8.3."""
    return _TAG.fullmatch(text) is not None


def http_date(text: str | None) -> datetime | None:
    """Read one of the three forms of a date in HTTP; None for anything else. Source: RFC 9110, section 5.6.7."""
    if text is None or not _DATE.fullmatch(text) or (parsed := parsedate(text)) is None:
        return None
    year, month, day, hour, minute, second = parsed[:6]
    try:
        # To parsedate the years 0 to 99 are of this century or the last one; a client without a date may send the year 1.
        year = int(found[0]) if (found := _YEAR.search(text)) else _full_year(year % 100)
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        return None


def _full_year(year: int) -> int:
    """Choose the century: a year that seems more than 50 years ahead is the last one with these digits."""
    today = datetime.now(UTC).year
    full = today - today % 100 + year
    return full - 100 if full > today + 50 else full


def _has_tag(header: str, etag: str, *, strong: bool) -> bool:
    """Return whether a list of entity tags, or `*`, has this one; a list that is malformed has none."""
    if header == "*":
        return True
    tags = [tag[0] for tag in _TAG.finditer(header)] if _TAGS.fullmatch(header) else []
    if strong:
        return etag in tags and not etag.startswith("W/")
    return etag.removeprefix("W/") in {tag.removeprefix("W/") for tag in tags}


# Which bytes a Range header asks for.
#
# Source: RFC 9110, section 14. What is malformed, of another unit, or asks for too much in too many pieces is ignored, as
# the RFC allows: the answer is then the whole object.


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
    ranges = []
    for text in filter(None, (spec.strip(" \t") for spec in specs.split(","))):
        match = _SPEC.fullmatch(text)
        span = None if match is None else _parse_span(match[1], match[2], size)
        if span is None or (size == 0 and _is_suffix(text)):
            return None
        ranges.append(span)
    if not ranges:
        return None
    joined = _join_near(span for span in ranges if span.start < span.stop)
    return joined if len(joined) <= MAX_RANGES else None


def _parse_span(first: str, last: str, size: int) -> ByteRange | None:
    """Return a range cut to the object, an empty one where it lies outside; None where it is malformed."""
    if not first:
        return ByteRange(max(0, size - _parse_number(last)), size) if last else None
    start = _parse_number(first)
    if not last:
        return ByteRange(start, size)
    return ByteRange(start, min(_parse_number(last) + 1, size)) if start <= _parse_number(last) else None


def _is_suffix(spec: str) -> bool:
    """Return whether it asks for some last bytes, which even an empty object has; but no 206 can say so."""
    return spec.startswith("-") and _parse_number(spec[1:]) > 0


def _parse_number(digits: str) -> int:
    """Read a number of any length, in time that does not grow with its square."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= 20 else _LARGEST


def _join_near(ranges: Iterable[ByteRange]) -> list[ByteRange]:
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
