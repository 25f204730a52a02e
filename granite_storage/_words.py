"""Numbers and durations in messages."""

from __future__ import annotations

from datetime import timedelta

__all__ = ["count_of", "describe_duration", "require_timedelta"]

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, and with the verb where that comes along: `1 row has`, `1,000 rows have`.

    Args:
        number: The number.
        one: The words for one.
        many: The words for any other number; None for those for one and an `s`.
    """
    return f"{number:,} {one if number == 1 else f'{one}s' if many is None else many}"


def describe_duration(duration: timedelta) -> str:
    """Return a duration in words, in its two largest units: `30 days`, `1 hour 5 minutes`."""
    left = round(abs(duration).total_seconds())
    parts = dict[str, int]()
    for unit, seconds in _UNITS:
        parts[unit], left = divmod(left, seconds)
    units = [unit for unit, _ in _UNITS]
    largest = next((index for index, unit in enumerate(units) if parts[unit]), len(units) - 1)
    shown = [unit for unit in units[largest : largest + 2] if parts[unit]]
    return " ".join(count_of(parts[unit], unit) for unit in shown) or "0 seconds"


def require_timedelta(argument: str, value: object) -> None:
    """Raise `TypeError` unless the value is a timedelta.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(value, timedelta):
        raise TypeError(f"{argument} must be a timedelta, such as timedelta(hours=1), not {value!r:.100}")
