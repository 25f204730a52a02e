"""Concurrent and repeated work, and clean-up under cancellation.

A cancelled task that has work in progress waits for it before it lets the cancellation through; otherwise that work could publish
what the task has already cleaned up. No cancellation is lost on the way, and none is made up: code of the application may raise
a CancelledError though its task is not being cancelled, and that is a failure like any other.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

logger = logging.getLogger("granite_storage")

T = TypeVar("T")
R = TypeVar("R")

CLEANUP_TIMEOUT = 30.0
"""The longest that a clean-up holds up the error or cancellation that made it necessary, in seconds."""


def is_cancellation(error: BaseException) -> bool:
    """Return whether an error is the cancellation of the current task.

    A CancelledError may come from elsewhere, as from a task that was cancelled by other code, and that this one awaits. Each
    request to cancel a task, by `asyncio.timeout`, a task group or a cancel scope of anyio as well, counts in `cancelling`.
    """
    task = _current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


class UnexpectedExitError(RuntimeError):
    """Foreign code raised an exception that ends a task or a generator, though no caller had requested that."""


class contained:  # noqa: N801  # it is called as a function
    """Convert an exception that ends a task or a generator into an error, if foreign code in the block raises it unasked.

    A CancelledError while the task is not being cancelled, a GeneratorExit while the coroutine is not being closed and any other
    `BaseException` become an UnexpectedExitError, a RuntimeError as for a StopIteration inside a generator (PEP 479).
    KeyboardInterrupt and SystemExit pass through, also out of a group of errors. The block must not contain a `yield`, at which
    a generator is closed.

    Args:
        what: What is called in the block, for the message.
    """

    __slots__ = ("_task", "_what")

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        self._task = _current_task()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, Exception):
            return
        if (end := _end_of_program(error)) is not None:
            if end is error:
                return
            raise end from error
        is_closed = isinstance(error, GeneratorExit) and _current_task() is not self._task
        if not is_closed and not is_cancellation(error):
            raise UnexpectedExitError(f"{self._what} raised {type(error).__name__}, but nothing had cancelled it") from error


def _end_of_program(error: BaseException) -> BaseException | None:
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_end_of_program, error.exceptions)), None)
    return error if isinstance(error, KeyboardInterrupt | SystemExit) else None


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # a thread without a running loop
        return None


async def run_bounded(items: Iterable[T], work: Callable[[T], Awaitable[R]], limit: int) -> list[R]:
    """Run work on each item, at most `limit` at a time, and return the results in the order of the items.

    The first error cancels the rest and is raised once all of it has ended. A cancelled caller waits for the same.
    """
    places = asyncio.Semaphore(limit)

    async def run(item: T) -> R:
        async with places:
            with contained("concurrent work"):  # a task group ignores a CancelledError
                return await work(item)

    async with task_group() as group:
        tasks = [group.create_task(run(item)) for item in items]
        if tasks:
            # In the block: before Python 3.13 a task that fails while its group is left would leave the caller cancelling.
            await asyncio.wait(tasks)
    return [task.result() for task in tasks]


@asynccontextmanager
async def task_group() -> AsyncGenerator[asyncio.TaskGroup, None]:
    """Yield a task group that raises the first error itself, with its cause, and not a group of errors."""
    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
    try:
        if first is not None:
            raise first
    finally:
        del first  # otherwise the error and this frame would keep each other alive


@asynccontextmanager
async def background(*works: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run coroutines while the block runs, each in a task; at its end they are cancelled, and have ended when it is left."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def repeat(
    work: Callable[[], Awaitable[object]],
    interval: float,
    what: str,
    *,
    jitter: float = 0.0,
    wake: asyncio.Event | None = None,
    rest: float = 0.0,
) -> NoReturn:
    """Run work repeatedly until the task is cancelled; an error is logged, and does not prevent the next run.

    A CancelledError, or another `BaseException`, is such an error if nothing has cancelled the task.

    Args:
        work: The work.
        interval: The time from the end of a run to the next one, in seconds.
        what: What the work does, for the log.
        jitter: The part of the interval by which it may be shorter or longer, so that processes that began together do not go on
            in step.
        wake: Begins the next run early once it is set; it is cleared before each run, so one that is set meanwhile is not lost.
        rest: The least time between two runs that `wake` cannot shorten, in seconds; the interval comes on top of it.
    """
    task = asyncio.current_task()
    cancelled = task.cancelling() if task is not None else 0
    while True:
        if wake is not None:
            wake.clear()
        try:
            with contained(what):
                await work()
        except asyncio.CancelledError:
            if task is None or task.cancelling() > cancelled:
                raise
            logger.exception("%s failed and will be retried", what)
        except Exception:
            logger.exception("%s failed and will be retried", what)
        if task is not None and task.cancelling() > cancelled:
            raise asyncio.CancelledError  # what the work waited for has swallowed it
        if rest:
            await asyncio.sleep(rest)
        seconds = interval * random.uniform(1 - jitter, 1 + jitter)  # noqa: S311  # not a secret
        if wake is None:
            await asyncio.sleep(seconds)
            continue
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await wake.wait()


async def wait_uncancelled(future: asyncio.Future[Any], timeout: float | None = None) -> bool:
    """Wait until a future is done, however often the caller is cancelled meanwhile; return whether it is done.

    For `except asyncio.CancelledError` only: the caller goes on to raise the cancellation that brought it there, so none is lost.
    The future's exception is marked as seen.

    Args:
        future: What to wait for; it is not cancelled.
        timeout: The longest wait in seconds, None for no limit.
    """
    await _outlast(future, timeout)
    return future.done()


async def wait_or_cancel(future: asyncio.Future[Any], timeout: float | None) -> bool:
    """Do as `wait_uncancelled` does, and cancel the future when time is up; return whether it ended by itself."""
    if await wait_uncancelled(future, timeout):
        return True
    future.cancel()
    await wait_uncancelled(future)
    return False


async def shielded(
    work: Awaitable[T], *, undo: Callable[[T], Awaitable[object]] | None = None, timeout: float | None = None
) -> T:
    """Await work to its end: a cancelled caller waits for it before the cancellation is raised.

    Args:
        work: The work.
        undo: Called with its result if the caller was cancelled meanwhile, for instance to close a file that would stay open.
        timeout: The longest that a cancelled caller waits, in seconds, None for no limit; the work is cancelled then.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await wait_or_cancel(task, timeout)
        if undo is not None and not task.cancelled() and task.exception() is None:
            await shielded_cleanup(undo(task.result()), "undoing the work of a cancelled caller")
        raise
    finally:
        del task  # otherwise its error and this frame would keep each other alive


async def shielded_cleanup(cleanup: Awaitable[object], what: str, *, timeout: float = CLEANUP_TIMEOUT) -> None:
    """Run a clean-up to its end, whatever happens to the caller, bounded in time; log its failure instead of raising it.

    It is for `except` and `finally` blocks, where the caller must see the error in progress and not that of the clean-up. A
    cancellation that arrives meanwhile is raised once the clean-up has ended, so code after a clean-up may not be reached.

    Args:
        cleanup: The clean-up; it runs in a task of its own, so a cancellation of the caller does not reach it.
        what: What it does, for the log.
        timeout: The longest it may take in seconds; it is cancelled then.
    """
    task = asyncio.ensure_future(cleanup)
    cancellation = await _outlast(task, timeout)
    if not task.done():
        task.cancel()
        cancellation = await _outlast(task, 1.0) or cancellation
        logger.error("%s did not end within %s s and was abandoned", what, timeout)
    elif task.cancelled() or task.exception() is not None:
        logger.error("%s failed", what, exc_info=None if task.cancelled() else task.exception())
    if cancellation is not None:
        raise cancellation


async def _outlast(future: asyncio.Future[Any], timeout: float | None) -> asyncio.CancelledError | None:
    """Wait until a future is done or time is up; return the last cancellation of the caller that came meanwhile."""
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    cancellation: asyncio.CancelledError | None = None
    while not future.done():
        left = None if deadline is None else deadline - loop.time()
        if left is not None and left <= 0:
            return cancellation
        try:
            await asyncio.wait([future], timeout=left)
        except asyncio.CancelledError as error:
            cancellation = error
    if not future.cancelled():
        future.exception()
    return cancellation


def is_async_callable(function: object) -> bool:
    """Return whether it is an async function, a `partial` of one, or an object with an async `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    called = getattr(type(function), "__call__", None)  # noqa: B004  # what kind of function it is
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)
