"""Whether a conditional request is answered with the object.

Source: RFC 9110, section 13.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from starlette.datastructures import Headers

__all__ = [
    "Validators",
    "failed_precondition",
    "format_date",
    "header_of",
    "http_date",
    "is_entity_tag",
    "range_applies",
]

_TAG = re.compile(r'(W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})"
_WEEKDAY = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_WEEKDAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_CLOCK = r"(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DATES = (
    re.compile(rf"{_WEEKDAY}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_CLOCK} GMT"),
    re.compile(rf"{_LONG_WEEKDAY}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_CLOCK} GMT"),
    re.compile(rf"{_WEEKDAY} {_MONTH} (?P<day>[ 0-9][0-9]) {_CLOCK} (?P<year>[0-9]{{4}})"),
)


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
        if not _lists(wanted, validators.etag, strong=True):
            return 412
    elif (date := http_date(header_of(headers, "if-unmodified-since"))) and validators.modified > date:
        return 412
    if (known := header_of(headers, "if-none-match")) is not None:
        return 304 if _lists(known, validators.etag, strong=False) else None
    date = http_date(header_of(headers, "if-modified-since"))
    return 304 if date and validators.modified <= date else None


def range_applies(headers: Headers, validators: Validators, now: datetime) -> bool:
    """Tell whether If-Range lets a Range be honoured: the client has part of just this object.

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
    """Tell whether it is one entity tag, weak or strong. Source: RFC 9110, section 8.8.3."""
    return _TAG.fullmatch(text) is not None


def http_date(text: str | None) -> datetime | None:
    """Read one of the three forms of a date in HTTP; None for anything else. Source: RFC 9110, section 5.6.7."""
    match = next(filter(None, (form.fullmatch(text) for form in _DATES)), None) if text else None
    if match is None:
        return None
    year = int(match["year"])
    if len(match["year"]) == 2:
        year = _full_year(year)
    clock = (int(match["hour"]), int(match["minute"]), int(match["second"]))
    try:
        return datetime(year, _MONTHS.index(match["month"]) + 1, int(match["day"]), *clock, tzinfo=UTC)
    except ValueError:
        return None


def format_date(moment: datetime) -> str:
    """Return a date as HTTP writes it."""
    return format_datetime(moment, usegmt=True)


def _full_year(year: int) -> int:
    """Choose the century: a year that seems more than 50 years ahead is the last one with these digits."""
    today = datetime.now(UTC).year
    full = today - today % 100 + year
    return full - 100 if full > today + 50 else full


def _lists(header: str, etag: str, *, strong: bool) -> bool:
    """Tell whether a list of entity tags, or `*`, has this one; a list that is malformed has none."""
    if header == "*":
        return True
    tags = _tags(header)
    if strong:
        return etag in tags and not etag.startswith("W/")
    return etag.removeprefix("W/") in {tag.removeprefix("W/") for tag in tags}


def _tags(header: str) -> list[str]:
    tags, position = [], 0
    while position < len(header):
        if header[position] in " \t,":
            position += 1
            continue
        match = _TAG.match(header, position)
        if match is None or (match.end() < len(header) and header[match.end()] not in " \t,"):
            return []
        tags.append(match[0])
        position = match.end()
    return tags
