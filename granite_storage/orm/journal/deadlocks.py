"""Locks of others: what is done again after a deadlock, and what is not waited for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import CursorResult, Executable, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["again_after_deadlock", "codes_of", "try_briefly"]

P = ParamSpec("P")
T = TypeVar("T")

_DEADLOCKS = ("40P01", "40001", 1205, 1213)
_TRIES = 6

_LOCK_TIMEOUTS = ("55P03", 1205)
_BRIEFLY = text("SET LOCAL lock_timeout = '250ms'")
_PATIENCE_ON_MARIADB = text("SELECT @@innodb_lock_wait_timeout")


def again_after_deadlock(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Do one transaction again when the database has chosen it to end a deadlock between workers, and so has rolled it back."""

    @wraps(method)
    async def retried(*args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in range(_TRIES):
            try:
                return await method(*args, **kwargs)
            except DBAPIError as error:
                if codes_of(error).isdisjoint(_DEADLOCKS) or attempt == _TRIES - 1:
                    raise
            await asyncio.sleep(random.uniform(0, 0.05 * 2**attempt))  # noqa: S311  # not a secret
        raise AssertionError("the last try returns or raises")

    return retried


async def try_briefly(connection: AsyncConnection, statement: Executable) -> CursorResult[Any] | None:
    """Execute a statement in a savepoint; return None, with nothing done, where another transaction's lock is in its way."""
    if connection.dialect.name == "postgresql":
        await connection.execute(_BRIEFLY)
        return await _try(connection, statement)
    usual = (await connection.execute(_PATIENCE_ON_MARIADB)).scalar_one()
    await connection.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
    try:
        return await _try(connection, statement)
    finally:
        await connection.execute(text(f"SET SESSION innodb_lock_wait_timeout = {int(usual)}"))


async def _try(connection: AsyncConnection, statement: Executable) -> CursorResult[Any] | None:
    try:
        async with connection.begin_nested():
            return await connection.execute(statement)
    except DBAPIError as error:
        if codes_of(error).isdisjoint(_LOCK_TIMEOUTS):
            raise
        return None


def codes_of(error: DBAPIError) -> set[str | int]:
    """Return the database's codes of an error: the SQLSTATE, and on MariaDB a number as well, which says more."""
    original = error.orig
    found = {getattr(original, "sqlstate", None), getattr(original, "pgcode", None), *getattr(original, "args", ())[:1]}
    return {code for code in found if isinstance(code, str | int)}
