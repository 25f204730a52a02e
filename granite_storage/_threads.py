"""The library's thread pool for blocking work, which leaves nothing behind when its caller is cancelled.

Asyncio's default executor wakes the event loop for every result, and the whole program shares it. Here a worker takes the next
job without waking the loop, and results that are ready together are delivered together, which makes many small calls fast.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import Any, ClassVar, Generic, TypeVar

from granite_storage._tasks import shielded, wait_uncancelled
from granite_storage.exceptions import StreamTimeoutError

logger = logging.getLogger("granite_storage")

T = TypeVar("T")

_MAX_PENDING = 64 << 20
"""Bytes that all consumers of a pool may hold together before each has to empty its own queue: many uploads stay bounded."""

_FEW = 2
_STALLED_SECONDS = 0.002
_STUCK_SECONDS = 1.0
_STUCK_CHECK_SECONDS = 0.1


class ThreadPool:
    """A bounded number of threads, started when first needed; a slow disk in one pool does not delay the others.

    Two threads do what is quick: more of them would spend their time waiting for the interpreter, one system call after the
    other. As soon as a job has to wait because they are blocked, a third one joins them, and so on.

    It survives a fork: the child, in which the parent's threads do not exist, makes its own.

    Args:
        name: The prefix of the threads' names.
        max_workers: The most threads at a time.
        max_stuck: The most threads besides, in the place of those whose job has run for more than a second: jobs that may never
            end must not stop all others. Where there are that many, waiting jobs fail.
    """

    def __init__(self, name: str, max_workers: int, max_stuck: int = 0) -> None:
        self._name = name
        self._max_workers = max_workers
        self._max_stuck = max_stuck
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending = 0
        self._jobs: deque[_Job] = deque()
        self._workers = 0
        self._begun: dict[int, float] = {}
        self._moved = 0.0
        self._lock = threading.Lock()
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()

    @property
    def executor(self) -> ThreadPoolExecutor:
        """The running executor, for libraries that take one."""
        with self._lock:
            return self._running_executor()

    def _running_executor(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._max_workers + self._max_stuck, thread_name_prefix=self._name)
        return self._executor

    async def run(
        self,
        function: Callable[..., T],
        *args: Any,
        undo: Callable[[T], object] | None = None,
        cancel_timeout: float | None = None,
    ) -> T:
        """Run a function in a thread and return its result.

        A cancelled caller waits until a function that has begun ends; then the cancellation is raised.

        Args:
            function: What to run.
            *args: Its arguments.
            undo: Called in a thread with the result when the caller was cancelled meanwhile and will never see it.
            cancel_timeout: The longest that a cancelled caller waits, in seconds; for a function of others, which may never end.

        Raises:
            StreamTimeoutError: All threads are stuck, in a pool that has a limit of them.
        """
        mailbox = self._mailbox()
        job: _Result[T] = _Result(function, args, mailbox)
        self._submit(job)
        mailbox.watch(self)
        try:
            return await job.future
        except asyncio.CancelledError:
            if not job.withdraw():
                await self._outlive(job, undo, cancel_timeout)
            raise

    async def _outlive(self, job: _Result[T], undo: Callable[[T], object] | None, cancel_timeout: float | None) -> None:
        if not await wait_uncancelled(job.watch(), cancel_timeout):
            called = [job.function, *job.args]
            if isinstance(getattr(job.function, "__self__", None), Context):  # what runs in it follows
                del called[0]
            shown = " of ".join([repr(called[0]), *(type(item).__name__ for item in called[1:])])  # no content in a log
            logger.warning("the thread of a cancelled call is still running after %s s: %s", cancel_timeout, shown)
        elif undo is not None and job.error is None:
            undoing: _Result[object] = _Result(undo, (job.result,), self._mailbox())
            self._submit(undoing)
            await wait_uncancelled(undoing.future)
            if undoing.error is not None:
                logger.error("undoing a cancelled call failed: %r", job.function, exc_info=undoing.error)

    def submit(self, function: Callable[[], object]) -> None:
        """Queue a function, which must not raise, for some time later. For the event loop."""
        self._submit(_Job(function, ()))
        self._mailbox().watch(self)

    def resubmit(self, function: Callable[[], object]) -> None:
        """Queue a function again, behind all that waits; for a job that releases its thread."""
        self._submit(_Job(function, ()))

    def help(self) -> float | None:
        """Add a thread if jobs wait because the others are blocked; return after how many seconds to check again, if at all."""
        with self._lock:
            if self._may_grow() and self._is_stalled():
                self._add_worker()
            if self._may_grow():
                return _STALLED_SECONDS
            if not self._jobs or not self._max_stuck:
                return None
            if self._stuck() >= self._max_workers + self._max_stuck:
                self._refuse_jobs()
            return _STUCK_CHECK_SECONDS

    def count(self, pending: int) -> bool:
        """Add to the bytes that all consumers hold for this pool; return whether there is room for any of them to hold more."""
        with self._lock:
            self._pending += pending
            return self._pending < _MAX_PENDING

    def close(self) -> None:
        """Drop the executor; its threads end when it is no longer used. A later call creates another one."""
        with self._lock:
            self._executor = None

    def _submit(self, job: _Job) -> None:
        with self._lock:
            if not self._jobs:
                self._moved = time.monotonic()
            self._jobs.append(job)
            if self._may_grow() and (self._workers < _FEW or self._is_stalled()):
                self._add_worker()

    def _may_grow(self) -> bool:
        if not self._jobs or self._workers >= self._max_workers + self._max_stuck:
            return False
        return self._workers < self._max_workers or self._workers - self._stuck() < self._max_workers

    def _stuck(self) -> int:
        """Return how many threads have been at one job for too long."""
        before = time.monotonic() - _STUCK_SECONDS
        return sum(begun < before for begun in self._begun.values())

    def _refuse_jobs(self) -> None:
        for job in self._jobs:
            job.refuse(StreamTimeoutError(f"no thread is free: {self._workers} are waiting for streams that yield nothing"))
        self._jobs.clear()

    def _is_stalled(self) -> bool:
        """Return whether the job that comes next has waited for too long."""
        return time.monotonic() - self._moved > _STALLED_SECONDS

    def _add_worker(self) -> None:
        """Start one more worker; where the system cannot start a thread, the running ones do all jobs."""
        self._workers += 1
        try:
            self._start(self._work)
        except RuntimeError:
            self._workers -= 1
            if not self._workers:
                self._jobs.pop()
                raise

    def _start(self, work: Callable[[], None]) -> None:
        try:
            self._running_executor().submit(work)
        except RuntimeError:
            # When the main thread ends, executors are closed before Python waits for the threads that go on.
            threading.Thread(target=work, name=f"{self._name}-late", daemon=True).start()

    def _work(self) -> None:
        thread = threading.get_ident()
        while True:
            with self._lock:
                self._begun.pop(thread, None)
                if not self._jobs or (self._workers > self._max_workers and self._workers - self._stuck() > self._max_workers):
                    # An executor that could not start a thread still keeps the work for later: that worker was not counted.
                    self._workers = max(0, self._workers - 1)
                    return
                job = self._jobs.popleft()
                self._begun[thread] = self._moved = time.monotonic()
            try:
                job.run()
            except BaseException:
                logger.exception("a job in a thread failed: %r", job.function)
            del job

    def _mailbox(self) -> _Mailbox:
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            with self._lock:
                mailbox = self._mailboxes.setdefault(loop, _Mailbox(loop))
        return mailbox


_pools: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _reset_pools() -> None:
    for pool in _pools:
        pool._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_pools)


class _Job:
    """Something to do in a thread."""

    __slots__ = ("args", "function")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args

    def run(self) -> None:
        self.function(*self.args)

    def refuse(self, error: Exception) -> None:
        """Fail without having run."""
        logger.error("no thread could run a job: %r", self.function, exc_info=error)


class _Result(_Job, Generic[T]):
    """A job whose result an event loop waits for."""

    __slots__ = ("_begun", "_done", "_lock", "_mailbox", "error", "future", "result")

    result: T

    def __init__(self, function: Callable[..., T], args: tuple[Any, ...], mailbox: _Mailbox) -> None:
        super().__init__(function, args)
        self.error: BaseException | None = None
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._mailbox = mailbox
        self._begun = self._done = False
        self._lock = threading.Lock()

    def run(self) -> None:
        with self._lock:
            if self._begun:
                return
            self._begun = True
        try:
            self.result = self.function(*self.args)
        except StopIteration as error:
            # A future takes none: it would end the coroutine that awaits it as if it had returned.
            self.error = RuntimeError(f"{self.function!r} raised StopIteration")
            self.error.__cause__ = error
        except BaseException as error:  # noqa: BLE001  # it is raised where the result is awaited
            self.error = error
        with self._lock:
            self._done = True
        self._mailbox.post(self)

    def refuse(self, error: Exception) -> None:
        """Fail without having run."""
        if self.withdraw():
            self.error = error
            with self._lock:
                self._done = True
            self._mailbox.post(self)

    def withdraw(self) -> bool:
        """Prevent the function from running; return False where it has begun."""
        with self._lock:
            begun, self._begun = self._begun, True
        return not begun

    def watch(self) -> asyncio.Future[T]:
        """Return another future for the result, after the first was cancelled."""
        with self._lock:
            self.future = asyncio.get_running_loop().create_future()
            if self._done:
                self.deliver()
        return self.future

    def deliver(self) -> None:
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class _Mailbox:
    """Results on their way to one event loop; those that are ready together wake it once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._results: list[_Result[Any]] = []
        self._lock = threading.Lock()
        self._watching = False

    def watch(self, pool: ThreadPool, delay: float | None = None) -> None:
        """Check a pool from the event loop for as long as it may need another thread."""
        if not self._watching:
            self._watching = True
            asyncio.get_running_loop().call_later(_STALLED_SECONDS if delay is None else delay, self._look, pool)

    def _look(self, pool: ThreadPool) -> None:
        self._watching = False
        delay = pool.help()
        if delay is not None:
            self.watch(pool, delay)

    def post(self, result: _Result[Any]) -> None:
        with self._lock:
            self._results.append(result)
            first = len(self._results) == 1
        loop = self._loop()
        if first and loop is not None:
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                # The event loop is closed: no caller waits any more, and what is kept would keep the loop.
                self._results.clear()

    def _deliver(self) -> None:
        with self._lock:
            results, self._results = self._results, []
        for result in results:
            result.deliver()


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
        """Hand over a chunk; wait while more than `max_pending` bytes are pending.

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
        """Drop the pending chunks and return once the thread is idle; a cancelled caller waits for that too."""
        with self._lock:
            dropped = sum(map(len, self._chunks))
            self._pending -= dropped
            self._chunks.clear()
            idle = self._is_at(0)
        self._pool.count(-dropped)
        if not idle:
            await shielded(self._wait_for(0))

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
            with suppress(RuntimeError):  # the event loop is closed, and no caller waits any more
                self._loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
