"""Creates locations, and checks those that come from outside.

A location is `[key_prefix/]model_name/entity_id/field_name/<uuid7 as 32 hex digits>-<safe name>`. It is unique, so an object is
never overwritten; it begins with the time, so a listing is in order of creation; and a person can read it.

What the application names (model, entity, field, prefix) is refused when it is unsafe, because it is a mistake to be seen. What a
client names (the file) is made safe, because an upload must not fail for it.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from math import inf

from granite_storage.exceptions import InvalidLocationError

__all__ = [
    "GENERATED_ID_LENGTH",
    "GENERATED_STEM",
    "MAX_LOCATION_BYTES",
    "MAX_SEGMENT_BYTES",
    "RESERVED_PREFIX",
    "STAGED_NAME",
    "check_location",
    "check_segment",
    "clean_filename",
    "generated_id",
    "generated_time",
    "make_location",
    "matches_generated_name",
    "safe_name",
    "uuid7_hex",
]

MAX_LOCATION_BYTES = 1024
"""The longest key that S3 takes, in UTF-8 bytes; every backend has the same limit, so that objects can move between them."""

MAX_SEGMENT_BYTES = 255
"""The longest file name of the common file systems, in bytes."""

RESERVED_PREFIX = ".granite-"
"""Begins the names of temporary files and markers; no location may contain a segment that begins so, in any case of letters."""

GENERATED_STEM = "[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}"
"""The regular expression of how a generated name begins: a UUID of version 7, before a hyphen and the safe name."""

STAGED_NAME = "_staged"
"""What a generated name ends in where a client stores directly; no file is called so, whose safe name begins with no `_`."""

GENERATED_ID_LENGTH = 32
"""How many hex digits that UUID has."""

_PLAIN_LOCATION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254})*")
_LONGEST_EXTENSION = 20
_LONGEST_READ = 1024
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_GENERATED_NAME = re.compile(rf"{GENERATED_STEM}-[^/]+")
_NOT_PLAIN = re.compile(r"[^0-9A-Za-z_-]")
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(?:\.|:|$)", re.IGNORECASE)


def make_location(
    *, key_prefix: str | None, model_name: str, entity_id: str, field_name: str, original_filename: str | None
) -> str:
    """Return a new, unique location.

    Args:
        key_prefix: The policy's prefix, or None.
        model_name: What kind of thing owns the object, such as `user`.
        entity_id: Which of them.
        field_name: Which of its files.
        original_filename: The client's file name, cleaned by `clean_filename` or not; None if there is none.

    Raises:
        InvalidLocationError: A part is unsafe or the text of None, or the whole would be longer than `MAX_LOCATION_BYTES`.
    """
    for argument, segment in (("model_name", model_name), ("entity_id", entity_id), ("field_name", field_name)):
        check_segment(segment, argument)
        if segment == "None":
            raise InvalidLocationError(
                f"{argument} is 'None', the text of a missing value: flush the session first, so that the row has its key"
            )
    folder = "/".join(part for part in (key_prefix, model_name, entity_id, field_name) if part)
    stem = f"{folder}/{uuid7_hex()}-"
    room = MAX_LOCATION_BYTES - len(stem.encode())
    if room < 1:
        raise InvalidLocationError(f"the location would be longer than {MAX_LOCATION_BYTES} bytes: {folder[:80]!r}...")
    return stem + safe_name(original_filename, max_bytes=min(room, MAX_SEGMENT_BYTES - 33))


def check_segment(segment: object, argument: str = "segment", *, windows: bool = os.name == "nt") -> None:
    """Raise `InvalidLocationError` unless a text can be one segment of a location, whatever the backend.

    Args:
        segment: The value to check.
        argument: What the message calls it.
        windows: Whether names that Windows gives to devices are refused too.

    Raises:
        InvalidLocationError: It is not a string, is empty, `.`, `..`, or too long, ends in a dot or a space, or has a slash,
            a backslash, a control character or a lone surrogate.
    """
    problem = _segment_problem(segment, windows)
    if problem:
        raise InvalidLocationError(f"{argument} {problem}: {_shown(segment)}")
    if isinstance(segment, str) and segment[-1] in ". ":
        raise InvalidLocationError(f"{argument} ends in a dot or a space: {_shown(segment)}")


def check_location(location: object, *, windows: bool = os.name == "nt") -> None:
    """Refuse a location that could reach outside a backend or name two objects; nothing is normalised.

    The manager calls it before a backend sees a location, and a backend calls it again: a row may have been edited by hand.

    Raises:
        InvalidLocationError: It is not a string, is longer than `MAX_LOCATION_BYTES`, or one of its segments is empty, `.`,
            `..`, too long, reserved, or has a backslash, a control character or a lone surrogate.
    """
    if not isinstance(location, str):
        raise InvalidLocationError(f"a location must be a string, not {type(location).__name__}")
    if len(location) <= MAX_LOCATION_BYTES and not windows and _PLAIN_LOCATION.fullmatch(location):
        return
    if len(location) > MAX_LOCATION_BYTES:
        raise InvalidLocationError(f"the location is longer than {MAX_LOCATION_BYTES} bytes: {_shown(location)}")
    for segment in location.split("/"):
        problem = _segment_problem(segment, windows)
        if problem:
            raise InvalidLocationError(f"a segment of the location {problem}: {_shown(location)}")
    if len(location.encode()) > MAX_LOCATION_BYTES:
        raise InvalidLocationError(f"the location is longer than {MAX_LOCATION_BYTES} bytes: {_shown(location)}")


def matches_generated_name(location: str) -> bool:
    """Return whether the last segment has the form that `make_location` gives; no other objects are collected."""
    return _GENERATED_NAME.fullmatch(location.rpartition("/")[2]) is not None


def generated_id(location: str) -> str | None:
    """Return the UUID with which a generated name begins, 32 hex digits; None where the last segment is no such name.

    No other object has it, whatever the place is called and however its file system spells the rest of the name.
    """
    name = location.rpartition("/")[2]
    return name[:GENERATED_ID_LENGTH] if _GENERATED_NAME.fullmatch(name) else None


def generated_time(location: str) -> float:
    """Return when the name of a location was generated, in seconds since 1970; infinity where it is no such name."""
    made = generated_id(location)
    return inf if made is None else int(made[:12], 16) / 1000


def clean_filename(filename: str | None) -> str | None:
    """Return what a ref keeps of the client's file name, or None if nothing is left of it.

    The last component after slashes and backslashes (on every system), without control and bidirectional-override
    characters, lone surrogates replaced, at most 255 bytes with its extension kept; otherwise as given.
    """
    if filename is None:
        return None
    if not isinstance(filename, str):
        raise TypeError(f"original_filename must be a string or None, not {type(filename).__name__}")
    name = filename.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if len(name) > 2 * _LONGEST_READ:
        name = name[:_LONGEST_READ] + name[-_LONGEST_READ:]
    if not (name.isascii() and name.isprintable()):
        name = "".join(map(_clean_character, name))
    name = _shortened(name.strip(), MAX_SEGMENT_BYTES).strip()
    return name if name.strip(". ") else None


def safe_name(filename: str | None, *, max_bytes: int = MAX_SEGMENT_BYTES - 33) -> str:
    """Return a name fit for the last segment of a location: never empty, hidden, or with two extensions.

    Letters and digits of any script, `-` and `_` stay, in NFC; every other character becomes `_`; the only dot stands before
    the extension, which is lower case. A server that picks a handler by any of several extensions finds just one.

    Args:
        filename: The client's file name, or None.
        max_bytes: The most UTF-8 bytes the name may have.
    """
    cleaned = unicodedata.normalize("NFC", clean_filename(filename) or "").rstrip(". ")
    stem, dot, extension = cleaned.rpartition(".")
    if not dot:
        stem, extension = cleaned, ""
    stem, extension = _plain(stem) or "file", _plain(extension.lower())
    return _shortened(f"{stem}.{extension}" if extension else stem, max_bytes).strip("._") or "_"


def uuid7_hex() -> str:
    """Return a new UUID of version 7 as 32 hex digits: 48 bits of milliseconds, then random bits.

    Source: RFC 9562, section 5.7.
    """
    milliseconds = time.time_ns() // 1_000_000
    randomness = int.from_bytes(os.urandom(10))
    value = (milliseconds & (1 << 48) - 1) << 80 | randomness
    value = value & ~(0xF << 76) | 7 << 76
    value = value & ~(0x3 << 62) | 2 << 62
    return f"{value:032x}"


def _segment_problem(segment: object, windows: bool) -> str | None:
    if not isinstance(segment, str):
        return f"must be a string, not {type(segment).__name__}"
    if not windows and len(segment) <= MAX_SEGMENT_BYTES and "/" not in segment and _PLAIN_LOCATION.fullmatch(segment):
        return None
    if segment in {"", ".", ".."}:
        return "must not be empty, '.' or '..'"
    if segment[:1] == "." and segment.lower().startswith(RESERVED_PREFIX):
        return f"begins with {RESERVED_PREFIX!r}, which is reserved"
    if segment.isascii():
        if "/" in segment or "\\" in segment or not segment.isprintable():
            return "has a slash, a backslash or a control character"
    elif any(character in "/\\" or unicodedata.category(character) in _UNSAFE_CATEGORIES for character in segment):
        return "has a slash, a backslash, a control character or a lone surrogate"
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        return f"is longer than {MAX_SEGMENT_BYTES} bytes"
    if windows and (_WINDOWS_DEVICE.match(segment) or any(character in '<>:"|?*' for character in segment)):
        return "is the name of a device, or has a character that Windows does not allow"
    return None


def _clean_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cs":
        return "\ufffd"
    return "" if category in _UNSAFE_CATEGORIES or character in _BIDI_CONTROLS else character


def _plain(text: str) -> str:
    if text.isascii():
        return _NOT_PLAIN.sub("_", text).strip("_")
    plain = (character if character in "-_" or unicodedata.category(character)[0] in "LNM" else "_" for character in text)
    return "".join(plain).strip("_")


def _shortened(name: str, max_bytes: int) -> str:
    """Cut a name on a code point, before its extension if that is of a reasonable length."""
    if len(name.encode()) <= max_bytes:
        return name
    stem, dot, extension = name.rpartition(".")
    suffix = (dot + extension).encode()
    if not stem or len(suffix) > _LONGEST_EXTENSION or len(suffix) >= max_bytes:
        stem, suffix = name, b""
    room = max_bytes - len(suffix)
    return stem.encode()[:room].decode(errors="ignore") + suffix.decode()


def _shown(value: object) -> str:
    text = ascii(value[:120] if isinstance(value, str) else value)
    return text if len(text) <= 120 else f"{text[:117]}..."
