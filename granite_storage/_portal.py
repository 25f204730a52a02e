"""The event loop of synchronous callers: it runs in a thread of its own, and they wait for what it does.

There is one for each process. It starts at its first use, a forked child makes its own, and it ends with the last manager that
was used on it, or with the process.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager, suppress
from contextvars import Context, copy_context
from typing import Any, Generic, TypeVar

from granite_storage._documentation import Page
from granite_storage._tasks import CLEANUP_TIMEOUT, shielded, wait_uncancelled
from granite_storage.exceptions import ConfigurationError

__all__ = ["Portal", "enter_blocking", "has_running_loop", "portal", "require_no_loop", "run_blocking"]

T = TypeVar("T")

_thread = threading.local()

_MOST_AT_ONCE = 500
"""Items of an asynchronous generator that one visit to the loop brings along."""


class Portal:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        # A loop of the parent is kept in a forked child: closing it would unregister the parent's own sockets.
        self._inherited: list[asyncio.AbstractEventLoop] = []
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a garbage collection in between may end a session, and call again
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None
        self._users: weakref.WeakSet[object] = weakref.WeakSet()
        self._calls: set[_Call[Any]] = set()
        self._is_ending = False

    @property
    def is_here(self) -> bool:
        """Whether the running thread is the portal's own, in which nothing can be waited for."""
        return getattr(_thread, "is_portal", False)

    def run(self, work: Coroutine[Any, Any, T], undo: Callable[[T], Coroutine[Any, Any, object]] | None = None) -> T:
        """Run a coroutine on the loop, in the caller's context, and return its result.

        An exception that interrupts the wait, such as `KeyboardInterrupt` or a task queue's time limit, cancels the coroutine
        and is raised once that has ended.

        Args:
            work: The coroutine.
            undo: Called with the result where the interrupt came after the coroutine had ended, and before its result was known.

        Raises:
            RuntimeError: The caller is on the loop itself, and would wait for itself.
            concurrent.futures.CancelledError: The coroutine was cancelled by other code, as when its manager is closed.
        """
        if self.is_here:
            work.close()
            raise RuntimeError("the event loop of synchronous callers cannot wait for itself: await the coroutine")
        call = self._call(work)
        try:
            # An interrupt may come at any moment from here on: once it has begun, the call is cancelled.
            self._begin(call)
            return call.result()
        except BaseException:
            call.abandon()
            if undo is not None and call.has_succeeded:
                self.run(undo(call.result()))
            raise
        finally:
            del call  # otherwise its error and this frame would keep each other alive

    async def run_here(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop for a caller on another one, and return its result."""
        call = self._call(work)
        future = asyncio.wrap_future(call.future)
        try:
            await shielded(asyncio.to_thread(self._begin, call))  # it may have to start the loop, and to wait for that
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            call.cancel()
            await wait_uncancelled(future, CLEANUP_TIMEOUT)
            raise

    def run_later(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine on the loop without waiting for it."""
        self._begin(self._call(work))

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """Yield what an asynchronous generator yields, a few hundred items with each visit to the loop, and close it."""
        pages = _Pages(items)
        pumping = self._call(pages.pump())
        try:
            self._begin(pumping)
            while page := self.run(pages.next()):
                yield from page
            pumping.result()
        finally:
            pumping.abandon()

    def add_user(self, user: object) -> None:
        """Keep the loop running until the user is released; for callers on the loop."""
        with self._lock:
            self._users.add(user)
            self._is_ending = False

    def is_used_by(self, user: object) -> bool:
        """Return whether a user has used the loop, and was not released since."""
        return self._loop is not None and user in self._users

    def release(self, user: object) -> None:
        """Note that a user no longer needs the loop, which ends some time after the last release."""
        with self._lock:
            self._users.discard(user)
            self._is_ending = not self._users
        self._end()

    def close(self) -> None:
        """End the loop even if it is in use; a later call starts another one."""
        with self._lock:
            self._users.clear()
            self._calls.clear()
            self._is_ending = True
            thread = self._thread
        self._end()
        if thread is not None:
            thread.join(CLEANUP_TIMEOUT)

    def forget(self) -> None:
        """Reset the state in a forked child, in which the loop's thread does not exist."""
        if self._loop is not None:
            self._inherited.append(self._loop)
        self._reset()

    def _call(self, work: Coroutine[Any, Any, T]) -> _Call[T]:
        return _Call(work, copy_context(), self._end)

    def _begin(self, call: _Call[Any]) -> None:
        if sys.is_finalizing():  # what the program has left open is dropped; a thread would never start
            raise RuntimeError("the interpreter is shutting down, so this call can no longer wait for the storage")
        with self._lock:
            loop = self._loop or self._start()
            call.loop = loop  # first: from here on, an interrupted call is cancelled on the loop, which forgets it
            self._calls.add(call)
            loop.call_soon_threadsafe(call.begin)

    def _start(self) -> asyncio.AbstractEventLoop:
        loop, stop = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=_serve, args=(loop, stop), name="granite-storage-portal", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            loop.close()
            raise
        except BaseException:
            loop.call_soon_threadsafe(stop.set)  # the thread may have started
            raise
        self._loop, self._stop, self._thread = loop, stop, thread
        return loop

    def _end(self, call: _Call[Any] | None = None) -> None:
        """Forget a call that has ended, and end the loop after the last one once its last user is gone."""
        with self._lock:
            if call is not None:
                self._calls.discard(call)
            if self._loop is None or self._stop is None:
                self._is_ending = False
            if not self._is_ending or self._calls or self._loop is None or self._stop is None:
                return
            loop, stop = self._loop, self._stop
            self._loop = self._stop = self._thread = None
            self._is_ending = False
        loop.call_soon_threadsafe(stop.set)


def _serve(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    _thread.is_portal = True
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        serving = runner.get_loop().create_task(stop.wait())
        while not serving.done():
            # asyncio lets these two leave the loop after it has given them to the task that raised them, whose caller gets
            # them: a source or a backend that raises one does not end the loop of all others.
            with suppress(KeyboardInterrupt, SystemExit):
                loop.run_until_complete(serving)


class _Pages(Generic[T]):
    """The items of an asynchronous generator in pages; one task iterates, because a generator may have timeouts of its task."""

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._wanted = asyncio.Semaphore(0)
        self._page: list[T] = []
        self._ready = asyncio.Semaphore(0)

    async def next(self) -> list[T]:
        """Return the next page; an empty one at the end, and after an error."""
        self._wanted.release()
        await self._ready.acquire()
        page, self._page = self._page, []
        return page

    async def pump(self) -> None:
        """Fill the pages that are asked for."""
        try:
            async with aclosing(self._items):
                await self._wanted.acquire()
                async for item in self._items:
                    self._page.append(item)
                    if len(self._page) == _MOST_AT_ONCE:
                        self._ready.release()
                        await self._wanted.acquire()
        finally:
            self._ready.release()
            if self._page:
                self._ready.release()  # for the empty page after the last one


class _Call(Generic[T]):
    """A coroutine that another thread waits for.

    An interrupt may come in the caller's thread between any two instructions. It must not come while that thread holds what the
    loop needs: a `Condition`, which a future and most of `threading` have, stays locked for ever where the interrupt comes as
    its `__enter__` returns. So the caller waits for a plain lock, and reads the future once the loop has left it.
    """

    def __init__(self, work: Coroutine[Any, Any, T], context: Context, on_end: Callable[[_Call[Any]], object]) -> None:
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._on_end = on_end
        self._has_ended = False
        self._ending = threading.Lock()
        self._ending.acquire()
        self._work = work
        self._context = context
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        """Start it; for the loop."""
        self._task = asyncio.get_running_loop().create_task(self._work, context=self._context)
        self._task.add_done_callback(self._end)

    def result(self) -> T:
        """Wait for it, and return its result."""
        self._wait()
        return self.future.result()

    @property
    def has_succeeded(self) -> bool:
        """Whether it has ended with a result."""
        return self._has_ended and self.future.exception() is None

    def abandon(self) -> None:
        """Cancel it where it has not ended, and wait for its end."""
        if self.loop is None:
            self._work.close()
        elif not self._has_ended:
            self.cancel()
            self._wait(CLEANUP_TIMEOUT)

    def _wait(self, timeout: float = -1) -> None:
        """Wait for its end; for the one thread that called."""
        if not self._has_ended:
            self._ending.acquire(timeout=timeout)

    def cancel(self) -> None:
        """Cancel it; it ends some time later."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:  # the caller was interrupted before it could start it
            self._work.close()
            self.future.set_exception(concurrent.futures.CancelledError())
            self._note_end()

    def _end(self, task: asyncio.Task[T]) -> None:
        try:
            result = task.result()
        except asyncio.CancelledError as error:
            self.future.set_exception(concurrent.futures.CancelledError(*error.args))
        except BaseException as error:  # noqa: BLE001  # it is raised where the coroutine is waited for
            self.future.set_exception(error)
        else:
            self.future.set_result(result)
        finally:
            del task
            self._note_end()

    def _note_end(self) -> None:
        self._has_ended = True
        self._ending.release()
        self._on_end(self)


def run_blocking(
    work: Coroutine[Any, Any, T], name: str, awaited: str, undo: Callable[[T], Coroutine[Any, Any, object]] | None = None
) -> T:
    """Run a coroutine for the synchronous API of the library.

    Args:
        work: The coroutine.
        name: The method that was called.
        awaited: What asynchronous code calls instead.
        undo: See `Portal.run`.

    Raises:
        ConfigurationError: An event loop runs in this thread, which would stand still meanwhile.
    """
    try:
        require_no_loop(name, awaited)
    except ConfigurationError:
        work.close()
        raise
    return portal.run(work, undo)


def require_no_loop(name: str, awaited: str) -> None:
    """Raise `ConfigurationError` where an event loop runs in this thread; see `run_blocking`."""
    if has_running_loop():
        raise ConfigurationError(
            f"{name}() would block the event loop that runs in this thread: use {awaited} instead", see=Page.THREADS
        )


@contextmanager
def enter_blocking(entered: AbstractAsyncContextManager[T], name: str, awaited: str) -> Generator[T, None, None]:
    """Enter and leave an asynchronous context manager in synchronous code; its tasks run on the loop meanwhile.

    The arguments and errors are those of `run_blocking`.
    """
    value = run_blocking(entered.__aenter__(), name, awaited, undo=lambda _: entered.__aexit__(None, None, None))
    try:
        yield value
    finally:
        if not sys.is_finalizing():
            portal.run(entered.__aexit__(None, None, None))


def has_running_loop() -> bool:
    """Return whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


portal = Portal()
atexit.register(portal.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=portal.forget)
