"""What a manager holds per event loop: whether it is open there, what is under way, and what must be closed."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from granite_storage._tasks import CLEANUP_TIMEOUT, finish, settle
from granite_storage.exceptions import ConfigurationError

if TYPE_CHECKING:
    from granite_storage.readers import StoredObjectReader

__all__ = ["Lifecycle"]

Release: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class Lifecycle:
    """Counts a manager's calls on each event loop, so that closing can wait for them.

    A manager may serve several loops, one after the other or in threads; closing it on one does not disturb another.

    Args:
        max_uploads: How many streams may come in at a time on each loop; None for any number.
    """

    def __init__(self, max_uploads: int | None = None) -> None:
        self._max_uploads = max_uploads
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Stand around one call: refuse it where the manager is closed, and let closing wait for it."""
        state = self._here()
        task = asyncio.current_task()
        if task not in state.calls:
            state.require_open()
        state.calls[task] += 1
        try:
            yield
        finally:
            state.leave(task)

    @asynccontextmanager
    async def upload(self, begin: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[None]:
        """Stand around a call that takes a stream in; wait for room, except in a call that has room already.

        Args:
            begin: Waits for the first piece of the stream; a stream that yields nothing takes no room.
        """
        with self.call():
            state, task = self._here(), asyncio.current_task()
            if self._max_uploads is None or task in state.with_room:
                yield
                return
            if begin is not None:
                await begin()
            state.room = state.room or asyncio.Semaphore(self._max_uploads)
            async with state.room:
                state.with_room.add(task)
                try:
                    yield
                finally:
                    state.with_room.discard(task)

    def track(self, reader: StoredObjectReader) -> None:
        """Have a reader closed with the manager, if it is still open then."""
        self._here().readers.add(reader)

    async def open(self) -> None:
        """Let calls in again, once a closing that is under way has ended."""
        state = self._here()
        if state.closing is not None:
            await asyncio.wait([state.closing])
            state.closing = None

    async def close(self, drain_timeout: float, release: Release) -> None:
        """Refuse new calls, wait for those under way, cancel the late ones, and release what was opened; all of it once.

        Everybody who calls it waits until all is closed. Being cancelled shortens the wait, and closes all the same: the calls
        under way are then cancelled at once.
        """
        state = self._here()
        state.exempt(asyncio.current_task())
        if state.closing is None:
            state.closing = asyncio.ensure_future(state.close(drain_timeout, release))
        try:
            await asyncio.shield(state.closing)
        except asyncio.CancelledError:
            state.cancel_calls()
            await settle(state.closing)
            raise

    def _here(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            with self._lock:
                state = self._loops.setdefault(loop, _LoopState())
        return state


class _LoopState:
    def __init__(self) -> None:
        self.closing: asyncio.Task[None] | None = None
        self.room: asyncio.Semaphore | None = None
        self.with_room: set[asyncio.Task[Any] | None] = set()
        self.calls: Counter[asyncio.Task[Any] | None] = Counter()
        self.readers: weakref.WeakSet[StoredObjectReader] = weakref.WeakSet()
        self._closers: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._changed = asyncio.Event()

    def require_open(self) -> None:
        if self.closing is not None:
            raise ConfigurationError("the storage manager is closed; enter it again with 'async with', or make another")

    def leave(self, task: asyncio.Task[Any] | None) -> None:
        self.calls[task] -= 1
        if not self.calls[task]:
            del self.calls[task]
        self._changed.set()

    def exempt(self, task: asyncio.Task[Any] | None) -> None:
        """Do not wait for a task that closes the manager from within a call: it would wait for itself."""
        if task is not None:
            self._closers.add(task)
            self._changed.set()

    async def close(self, drain_timeout: float, release: Release) -> None:
        try:
            if not await self._wait_until_idle(drain_timeout):
                self.cancel_calls()
                await self._wait_until_idle(CLEANUP_TIMEOUT)
            for reader in list(self.readers):
                await finish(reader.aclose(), f"closing the reader of {reader.ref.location!r}")
        finally:
            self._closers.clear()
            await release()

    def cancel_calls(self) -> None:
        for task in self._waited_for():
            task.cancel("the storage manager is closing")

    async def _wait_until_idle(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                while self._waited_for():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _waited_for(self) -> list[asyncio.Task[Any]]:
        return [task for task in self.calls if task is not None and task not in self._closers]
