"""Deleting what a transaction left to nobody: never an error to the caller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from sqlalchemy.util import await_only

from granite_storage._concurrency import finish
from granite_storage.orm.greenlets import in_greenlet
from granite_storage.orm.unit import StoredObject

__all__ = ["remove_all", "remove_now"]

logger: logging.Logger = logging.getLogger("granite_storage")

_AT_A_TIME = 8


def remove_now(stored: Iterable[StoredObject]) -> None:
    """Delete objects from inside a session's or an engine's event, and log what could not be deleted.

    Outside SQLAlchemy's greenlet nothing can be awaited; then the objects stay, for the garbage collector.
    """
    objects = list({item.key: item for item in stored}.values())
    if not objects:
        return
    if not in_greenlet():
        for item in objects:
            logger.warning(
                "the object %r is left to the garbage collector: its session was not closed by an await", item.ref.location
            )
        return
    await_only(finish(remove_all(objects), f"deleting {len(objects)} objects of an ended transaction"))


async def remove_all(stored: Iterable[StoredObject]) -> None:
    """Delete objects side by side; a failure is logged with the location and stops nothing."""
    places = asyncio.Semaphore(_AT_A_TIME)

    async def remove(item: StoredObject) -> None:
        async with places:
            try:
                await item.manager.delete(item.ref)
            except Exception:
                logger.warning(
                    "could not delete the object %r; it is left to the garbage collector", item.ref.location, exc_info=True
                )

    await asyncio.gather(*(remove(item) for item in stored))
