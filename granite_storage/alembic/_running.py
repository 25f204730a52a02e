"""Awaiting the manager from a migration, which is synchronous code.

The manager runs on an event loop of its own, in a thread of its own. It makes no difference whether the migration runs in a
plain program, below `run_sync` of an asynchronous `env.py`, or in a synchronous call inside of a coroutine: nobody waits for a
loop that waits for him, and what the manager opens for this loop is closed with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy.util import await_only

from granite_storage.manager import StorageManager
from granite_storage.orm._util import in_greenlet

__all__ = ["StorageThread", "storage_thread"]

T = TypeVar("T")


class StorageThread:
    """The thread's event loop, as the migration sees it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end; an interruption of the caller cancels it, and waits until it has ended."""
        return _outcome(asyncio.run_coroutine_threadsafe(work, self._loop))


@contextmanager
def storage_thread(manager: StorageManager) -> Iterator[StorageThread]:
    """Give an event loop on which the manager is open; its clients are closed afterwards."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    executor = ThreadPoolExecutor(1, thread_name_prefix="granite-alembic")
    ended = executor.submit(asyncio.run, _serve(manager, ready))
    executor.shutdown(wait=False)
    loop, stop = _outcome(ready)
    try:
        yield StorageThread(loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        _outcome(ended)


async def _serve(manager: StorageManager, ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
    stop = asyncio.Event()
    try:
        async with manager:
            ready.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()
    except BaseException as error:
        if not ready.done():
            ready.set_exception(error)
        raise


def _outcome(future: Future[T]) -> T:
    """Wait for a result: through the greenlet where there is one, so that its loop goes on meanwhile."""
    try:
        if in_greenlet():
            return await_only(asyncio.wrap_future(future))
        return future.result()
    except BaseException:
        future.cancel()
        raise
