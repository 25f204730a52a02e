"""What an index over the locations of a column of refs is called, and the generated column that it needs on MariaDB."""

from __future__ import annotations

from hashlib import sha256

__all__ = ["LOCATION_COLUMN_PREFIX", "LOCATION_INDEX_PREFIX", "location_column_name", "location_index_name"]

LOCATION_INDEX_PREFIX = "ix_granite_storage_location_"
LOCATION_COLUMN_PREFIX = "granite_storage_location_"

_LONGEST_NAME = 63
_DIGITS = 8


def location_index_name(table: str, column: str) -> str:
    """Return the name of the index over a column's locations; it fits every database."""
    return _fitting(LOCATION_INDEX_PREFIX, f"{table}_{column}")


def location_column_name(column: str) -> str:
    """Return the name of the generated column that holds another column's locations, where no index can be on an expression."""
    return _fitting(LOCATION_COLUMN_PREFIX, column)


def _fitting(prefix: str, rest: str) -> str:
    """Cut a name that is too long, and let digits tell it from others that begin alike."""
    if len(f"{prefix}{rest}".encode()) <= _LONGEST_NAME:
        return f"{prefix}{rest}"
    digits = sha256(rest.encode()).hexdigest()[:_DIGITS]
    room = _LONGEST_NAME - len(prefix) - _DIGITS - 1
    return f"{prefix}{rest.encode()[:room].decode(errors='ignore')}_{digits}"
