"""The task that collects for as long as an application runs."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from granite_storage.gc.leader import Leadership
from granite_storage.gc.report import GarbageCollectionReport

__all__ = ["at_work"]

logger: logging.Logger = logging.getLogger("granite_storage")

_JITTER = 0.1
_FIRST = 60.0


@asynccontextmanager
async def at_work(
    storage_keys: Sequence[str],
    collect: Callable[[str], Awaitable[GarbageCollectionReport]],
    interval: timedelta,
    leadership: Leadership,
) -> AsyncIterator[None]:
    """Collect every policy again and again in a task; what is under way is cancelled when the block ends."""
    task = asyncio.create_task(_collect_forever(storage_keys, collect, interval.total_seconds(), leadership))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _collect_forever(
    storage_keys: Sequence[str],
    collect: Callable[[str], Awaitable[GarbageCollectionReport]],
    seconds: float,
    leadership: Leadership,
) -> None:
    # Processes that began together would all begin to collect together.
    await asyncio.sleep(random.uniform(0, min(seconds, _FIRST)))  # noqa: S311  # not a secret
    try:
        while True:
            try:
                if await leadership.has_it():
                    await _collect_all(storage_keys, collect)
            except Exception:
                logger.exception("whether this process is to collect garbage could not be found out; it is tried again")
            await asyncio.sleep(seconds * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311  # not a secret
    finally:
        await leadership.give_up()


async def _collect_all(storage_keys: Sequence[str], collect: Callable[[str], Awaitable[GarbageCollectionReport]]) -> None:
    for storage_key in storage_keys:
        try:
            report = await collect(storage_key)
        except Exception:
            logger.exception("collecting the garbage of %r failed and is tried again", storage_key)
            continue
        logger.info(
            "garbage of %r: %d objects scanned, %d orphans, %d deleted, %d failed, %d dangling references",
            storage_key,
            report.scanned,
            report.orphaned,
            report.deleted,
            report.failed,
            len(report.dangling),
        )
