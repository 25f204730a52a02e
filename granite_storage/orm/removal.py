"""Deleting what a transaction left to nobody: never an error to the caller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sqlalchemy.util import await_only

from granite_storage._tasks import finish
from granite_storage.orm._util import in_greenlet
from granite_storage.orm.unit_of_work import Intent, StoredObject

if TYPE_CHECKING:
    from uuid import UUID

    from granite_storage.orm.journal.journal import StorageJournal

__all__ = ["remove", "remove_now"]

logger: logging.Logger = logging.getLogger("granite_storage")

_AT_A_TIME = 8


def remove_now(stored: Iterable[StoredObject]) -> None:
    """Delete objects from inside a session's or an engine's event, and log what could not be deleted.

    Outside SQLAlchemy's greenlet nothing can be awaited; then the objects stay, for the garbage collector. What a journal knows
    of is its own to delete: what rows have given up is its worker's, which looks after many at once; what was never taken by a
    row goes at once, unless the task is being cancelled.
    """
    objects = list({item.key: item for item in stored}.values())
    plain = [item for item in objects if item.intent is None]
    intents = [item.intent for item in objects if item.intent is not None]
    for journal in {intent.journal for intent in intents}:
        journal.wake_workers()
    intents = [intent for intent in intents if not intent.deletes]
    if not in_greenlet():
        for item in plain:
            logger.warning(
                "the object %r is left to the garbage collector: its session was not closed by an await", item.ref.location
            )
        return
    if intents and _is_being_cancelled():
        intents = []
    if plain or intents:
        await_only(finish(remove(plain, intents), f"deleting {len(plain) + len(intents)} objects of an ended transaction"))


async def remove(stored: Iterable[StoredObject], intents: Iterable[Intent]) -> None:
    """Delete objects side by side, and let journals delete theirs; a failure is logged and stops nothing."""
    places = asyncio.Semaphore(_AT_A_TIME)
    by_journal: dict[StorageJournal, list[UUID]] = {}
    for intent in intents:
        by_journal.setdefault(intent.journal, []).append(intent.id)
    await asyncio.gather(
        *(_delete(item, places) for item in stored), *(_settle(journal, ids) for journal, ids in by_journal.items())
    )


async def _delete(item: StoredObject, places: asyncio.Semaphore) -> None:
    async with places:
        try:
            await item.manager.delete(item.ref)
        except asyncio.CancelledError:
            logger.warning("deleting the object %r was broken off; it is left to the garbage collector", item.ref.location)
        except Exception:
            logger.warning(
                "could not delete the object %r; it is left to the garbage collector", item.ref.location, exc_info=True
            )


async def _settle(journal: StorageJournal, ids: list[UUID]) -> None:
    try:
        await journal.settle(ids)
    except Exception:
        logger.warning("%d objects of an ended transaction are left to the journal's worker", len(ids), exc_info=True)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
