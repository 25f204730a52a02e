"""The connections to an S3 server that may be in use at a time, and who uses them.

A reader holds a connection for as long as it is open, but uses it only while it is read. Clients that do not read would so hold
up every other call. So a call that waits takes the connection of a reader that is not being read: the reader goes on with another
request where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from granite_storage.exceptions import BackendUnavailableError

__all__ = ["ConnectionPool", "Lease"]

# How long a reader is not read before its connection is taken for a call that waits.
_IDLE_SECONDS = 1.0
# How long a call waits before it takes the connection of a reader between two reads, however short the time between them.
_OVERDUE_SECONDS = 1.0
_CHECK_SECONDS = 0.05


class Lease:
    """One of the connections that may be in use at a time, with the body that is read from it.

    Attributes:
        body: The body, where there is one.
        idle_since: Since when a reader that holds it has not been reading, by the loop's clock; None while it is in use.
    """

    __slots__ = ("__weakref__", "_loop", "_pool", "body", "idle_since")

    def __init__(self, pool: ConnectionPool) -> None:
        self.body: Any = None
        self.idle_since: float | None = None
        self._pool: ConnectionPool | None = pool
        self._loop = asyncio.get_running_loop()

    @property
    def is_released(self) -> bool:
        """Whether it is over: the connection may be another call's."""
        return self._pool is None

    def lend(self) -> None:
        """Say that a reader holds it: a call that waits may take the connection, except during `reading`."""
        if self._pool is not None:
            self.idle_since = self._loop.time()
            self._pool.readers.add(self)

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Give the body to read from."""
        self.idle_since = None
        try:
            yield self.body
        finally:
            if self._pool is not None:
                self.idle_since = self._loop.time()
                self._pool.serve_overdue()

    def release(self) -> None:
        """Let the next one have it, a new one where bytes are still to come on it; idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self.idle_since = None
            pool.end(self.body)
            self.body = None

    def __del__(self) -> None:
        if self._pool is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._pool.end, self.body)


class ConnectionPool:
    """Lets so many calls at a time have a connection, and the others wait for one, in the order in which they came.

    Args:
        size: How many.
        timeout: The longest wait, in seconds.
        bucket: The bucket's name, for messages.

    Attributes:
        readers: The leases that readers hold.
    """

    def __init__(self, size: int, *, timeout: float, bucket: str) -> None:
        self.readers: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._free = size
        self._timeout = timeout
        self._bucket = bucket
        self._waiting: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def lease(self) -> Lease:
        """Wait for a connection.

        Raises:
            BackendUnavailableError: None became free in time.
        """
        if self._free:
            self._free -= 1
            return Lease(self)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), loop.time())
        self._waiting.append(waiter)
        if self._timer is None:
            self._take_idle()
        try:
            async with asyncio.timeout(self._timeout):
                await waiter.turn
        except BaseException as error:
            self._leave(waiter)
            if not isinstance(error, TimeoutError):
                raise
            raise BackendUnavailableError(
                f"none of the connections to bucket {self._bucket!r} became free within {self._timeout:g} s: "
                "raise max_pool_connections"
            ) from error
        return Lease(self)

    def end(self, body: Any) -> None:
        """Close what is left of a body, and let the next call have its connection."""
        if body is not None:
            body.close()
        while self._waiting:
            turn = self._waiting.popleft().turn
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def serve_overdue(self) -> None:
        """Take the connection of a reader that has just been read, where a call has waited for too long."""
        if self._waiting and asyncio.get_running_loop().time() - self._waiting[0].began >= _OVERDUE_SECONDS:
            self._take_idle()

    def _take_idle(self) -> None:
        """Take connections of readers that are not being read, one for each call that waits; look again while one waits."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        idle = sorted((lease.idle_since, id(lease), lease) for lease in self.readers if lease.idle_since is not None)
        for since, _, lease in idle:
            if not self._waiting:
                break
            if now - since < _IDLE_SECONDS and now - self._waiting[0].began < _OVERDUE_SECONDS:
                break
            lease.release()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(_CHECK_SECONDS, self._take_idle) if self._waiting else None

    def _leave(self, waiter: _Waiter) -> None:
        """Wait no more, and pass on the connection that came at the same moment."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
        elif not waiter.turn.cancelled():
            self.end(None)


class _Waiter(NamedTuple):
    """A call that waits for a connection.

    Attributes:
        turn: Done when it has one.
        began: Since when it has waited, by the loop's clock.
    """

    turn: asyncio.Future[None]
    began: float
