"""Options that several commands have."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import click

__all__ = ["AFTER", "AT_A_TIME", "DRY_RUN", "JSON", "RATE", "YES", "ByteCount", "Duration"]

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?(?:/s)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FACTORS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class ByteCount(click.ParamType[float]):
    """A number of bytes, such as `10MB` or `512KiB`."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a number and its unit; what has none counts bytes."""
        found = _COUNT.fullmatch(str(value).strip())
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is not a number of bytes above 0, such as 10MB", param, ctx)
        factor: int = (1024 if found[3] else 1000) ** _FACTORS[found[2].lower()]
        return float(found[1]) * factor


class Duration(click.ParamType[timedelta]):
    """A time, such as `24h`, `90m` or `7d`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Read a number and its unit."""
        found = _DURATION.fullmatch(str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a time, such as 24h, 90m or 7d", param, ctx)
        return timedelta(seconds=float(found[1]) * _SECONDS[found[2]])


JSON = click.option("--json", "as_json", is_flag=True, help="Answer for a program: one JSON object on each line.")
YES = click.option("--yes", is_flag=True, help="Do not ask.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only show what would be done.")
AFTER = click.option("--after", metavar="KEY", help="Go on after this key, which an earlier run has told.")
AT_A_TIME = click.option("--at-a-time", type=click.IntRange(min=1), metavar="N", help="How many rows at a time.")
RATE = click.option("--rate", type=ByteCount(), metavar="BYTES", help="The most bytes in a second, such as 10MB.")
