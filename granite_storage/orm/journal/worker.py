"""The task that runs recovery during the life of an application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial

from granite_storage._tasks import background, repeat

_JITTER = 0.25
_PAUSE = 1.0


class Alarm:
    """Wakes the workers of this process after a transaction that left work for them, from any loop or thread."""

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
    backends: Iterable[str],
    recover: Callable[[str], Awaitable[object]],
    interval: timedelta,
    alarm: Alarm,
    *,
    what: str = "recovering the objects",
) -> AsyncIterator[None]:
    """Run recovery of every backend periodically, each in a task of its own, so that a slow one does not delay the others.

    A pass in progress is cancelled when the block ends; any worker resumes it.
    """
    seconds = interval.total_seconds()

    async def recover_forever(backend: str) -> None:
        woken = asyncio.Event()
        rest = min(_PAUSE, seconds)  # transactions that end in the meantime are processed together
        with alarm.heard_by(woken):
            work, which = partial(recover, backend), f"{what} of the backend {backend!r}"
            await repeat(work, seconds, which, jitter=_JITTER, wake=woken, rest=rest)

    async with background(*map(recover_forever, backends)):
        yield
