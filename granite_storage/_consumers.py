"""Chunks on their way to a thread, in order and bounded."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from granite_storage._tasks import finished
from granite_storage._threads import ThreadPool

__all__ = ["ThreadConsumer"]


class ThreadConsumer:
    """Hands chunks, in order, to a function in a thread, and holds a bounded number of bytes meanwhile.

    It occupies a thread only while it has work: a slow producer costs none. A busy one keeps its thread for a few chunks at a
    time and then goes to the end of the pool's queue, so that any number of them share a few threads fairly.

    Args:
        pool: Where the function runs.
        consume: What to do with a chunk.
        max_pending: How many bytes may wait, before `feed` does.
        consume_several: What to do with several short ones that wait, where that is cheaper than one after the other.
    """

    TOGETHER: ClassVar = 1024 * 1024
    """How many bytes several short chunks have at most, together."""

    _CHUNKS_PER_TURN = 64

    def __init__(
        self,
        pool: ThreadPool,
        consume: Callable[[bytes], object],
        *,
        max_pending: int,
        consume_several: Callable[[list[bytes]], object] | None = None,
    ) -> None:
        self._pool = pool
        self._consume = consume
        self._consume_several = consume_several
        self._max_pending = max_pending
        self._chunks: deque[bytes] = deque()
        self._pending = 0
        self._running = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._waiter: tuple[int, asyncio.Future[None]] | None = None

    async def feed(self, chunk: bytes) -> None:
        """Hand over a chunk; wait while more than `max_pending` bytes are under way.

        Raises:
            Exception: What the function raised for an earlier chunk; later ones are dropped.
        """
        with self._lock:
            self._chunks.append(chunk)
            self._pending += len(chunk)
            start = not self._running
            self._running = True
        room = self._pool.count(len(chunk))
        if start:
            self._pool.submit(self._turn)
        if self._pending > (most := self._max_pending if room else 0):
            await self._wait_for(most // 2)
        if self._error is not None:
            raise self._error

    async def drain(self) -> None:
        """Wait until every chunk is consumed; raise what the function raised."""
        await self._wait_for(0)
        if self._error is not None:
            raise self._error

    async def stop(self) -> None:
        """Drop what waits and return once the thread is idle; a cancelled caller waits for it before the cancellation goes on."""
        with self._lock:
            dropped = sum(map(len, self._chunks))
            self._pending -= dropped
            self._chunks.clear()
            idle = self._is_at(0)
        self._pool.count(-dropped)
        if not idle:
            await finished(self._wait_for(0))

    async def _wait_for(self, level: int) -> None:
        with self._lock:
            if self._is_at(level):
                return
            future = self._loop.create_future()
            self._waiter = (level, future)
        await future

    def _is_at(self, level: int) -> bool:
        return self._pending <= level and (level > 0 or not self._running)

    def _turn(self) -> None:
        left = self._CHUNKS_PER_TURN
        while left > 0:
            with self._lock:
                chunks = self._next(left)
                if not chunks:
                    self._running = False
                    self._wake()
                    return
            left -= len(chunks)
            size = sum(map(len, chunks))
            self._consume_all(chunks)
            del chunks
            self._pool.count(-size)
            with self._lock:
                self._pending -= size
                self._wake()
        self._pool.resubmit(self._turn)

    def _next(self, most: int) -> list[bytes]:
        """Take what is to be consumed at once: a chunk, or several short ones."""
        taken: list[bytes] = []
        room = self.TOGETHER
        while self._chunks and len(taken) < most and (not taken or room >= len(self._chunks[0])):
            taken.append(self._chunks.popleft())
            room -= len(taken[-1])
            if self._consume_several is None:
                break
        return taken

    def _consume_all(self, chunks: list[bytes]) -> None:
        if self._error is not None:
            return
        try:
            if len(chunks) == 1 or self._consume_several is None:
                self._consume(chunks[0])
            else:
                self._consume_several(chunks)
        except BaseException as error:  # noqa: BLE001  # it is raised again where the producer waits
            self._error = error

    def _wake(self) -> None:
        if self._waiter is not None and self._is_at(self._waiter[0]):
            _, future = self._waiter
            self._waiter = None
            with suppress(RuntimeError):  # the event loop is closed, and nobody waits any more
                self._loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
