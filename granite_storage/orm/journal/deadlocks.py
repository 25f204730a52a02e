"""Deadlocks between workers: the database ends one of the transactions, which can be done again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import DBAPIError

__all__ = ["again_after_deadlock", "code_of"]

P = ParamSpec("P")
T = TypeVar("T")

_DEADLOCKS = ("40P01", "40001", 1205, 1213)
_TRIES = 6


def again_after_deadlock(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Do one transaction again when the database has chosen it to end a deadlock between workers, and so has rolled it back."""

    @wraps(method)
    async def retried(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(_TRIES):
            try:
                return await method(*args, **kwargs)
            except DBAPIError as error:
                if code_of(error) not in _DEADLOCKS or attempt == _TRIES - 1:
                    raise
            await asyncio.sleep(random.uniform(0, 0.05 * 2**attempt))  # noqa: S311  # not a secret
        raise AssertionError("the last try returns or raises")

    return retried


def code_of(error: DBAPIError) -> str | int | None:
    """Return the database's code of an error: PostgreSQL's is text, MariaDB's a number."""
    found: str | int | None = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if found is None and error.orig is not None and error.orig.args and isinstance(error.orig.args[0], int):
        return error.orig.args[0]
    return found
