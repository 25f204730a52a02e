"""The task that recovers for as long as the application runs."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta

__all__ = ["at_work"]

logger: logging.Logger = logging.getLogger("granite_storage")

_JITTER = 0.25


@asynccontextmanager
async def at_work(
    backends: Iterable[str], recover: Callable[[str], Awaitable[object]], interval: timedelta
) -> AsyncIterator[None]:
    """Recover every backend again and again, each in a task of its own: a slow or dead one holds up no other.

    What is under way is cancelled when the block ends: any worker resumes it.
    """
    tasks = [asyncio.create_task(_recover_forever(backend, recover, interval)) for backend in backends]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _recover_forever(backend: str, recover: Callable[[str], Awaitable[object]], interval: timedelta) -> None:
    while True:
        try:
            await recover(backend)
        except Exception:
            logger.exception("recovering the objects of the backend %r failed and is tried again", backend)
        # Workers that began together would ask the database all at once, again and again.
        await asyncio.sleep(interval.total_seconds() * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311  # not a secret
