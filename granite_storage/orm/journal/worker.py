"""The task that recovers for as long as the application runs."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta

__all__ = ["Alarm", "at_work"]

logger: logging.Logger = logging.getLogger("granite_storage")

_JITTER = 0.25
_PAUSE = 1.0


class Alarm:
    """Wakes the workers of this process when a transaction has left them something to do, from whatever loop or thread."""

    def __init__(self) -> None:
        self._sleepers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    def ring(self) -> None:
        """Wake them."""
        for event, loop in list(self._sleepers.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    @contextmanager
    def heard_by(self, event: asyncio.Event) -> Iterator[None]:
        """Set an event whenever it rings while the block runs."""
        self._sleepers[event] = asyncio.get_running_loop()
        try:
            yield
        finally:
            del self._sleepers[event]


@asynccontextmanager
async def at_work(
    backends: Iterable[str], recover: Callable[[str], Awaitable[object]], interval: timedelta, alarm: Alarm
) -> AsyncIterator[None]:
    """Recover every backend again and again, each in a task of its own: a slow or dead one holds up no other.

    What is under way is cancelled when the block ends: any worker resumes it.
    """
    tasks = [asyncio.create_task(_recover_forever(backend, recover, interval, alarm)) for backend in backends]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _recover_forever(backend: str, recover: Callable[[str], Awaitable[object]], interval: timedelta, alarm: Alarm) -> None:
    woken = asyncio.Event()
    with alarm.heard_by(woken):
        while True:
            woken.clear()
            try:
                await recover(backend)
            except Exception:
                logger.exception("recovering the objects of the backend %r failed and is tried again", backend)
            # Transactions that end meanwhile are looked after together.
            await asyncio.sleep(min(_PAUSE, interval.total_seconds()))
            await _sleep(woken, interval)


async def _sleep(woken: asyncio.Event, interval: timedelta) -> None:
    """Sleep for an interval, or until woken; workers that began together would ask the database all at once, again and again."""
    with suppress(TimeoutError):
        async with asyncio.timeout(interval.total_seconds() * random.uniform(1 - _JITTER, 1 + _JITTER)):  # noqa: S311  # not a secret
            await woken.wait()
