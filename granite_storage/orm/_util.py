"""Whether an event of a session may await."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from greenlet import getcurrent

from granite_storage.exceptions import ConfigurationError

__all__ = ["deferred_cancellation", "in_greenlet", "require_async"]


def in_greenlet() -> bool:
    """Tell whether the code runs below an `await` of SQLAlchemy's asyncio layer."""
    return bool(getattr(getcurrent(), "__sqlalchemy_greenlet_provider__", False))


def require_async(what: str) -> None:
    """Refuse a synchronous session, before anything has happened."""
    if not in_greenlet():
        raise ConfigurationError(
            f"{what} needs an AsyncSession: a synchronous Session cannot await the storage, and may write only rows that hold no"
            " files"
        )


@contextmanager
def deferred_cancellation() -> Iterator[None]:
    """Let a cancellation through at the task's next await instead of here, where it would break off what must be done."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None:
            raise
        task.uncancel()
        task.cancel()
