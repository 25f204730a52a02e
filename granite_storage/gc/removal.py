"""Deleting orphans, many at a time, and telling of each that stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta

from granite_storage.backends.base import SupportsBatchDelete, SupportsCleanup
from granite_storage.exceptions import BackendError, BackendUnavailableError, StorageError
from granite_storage.gc.report import MOST_KEPT, CollectedObject, Fate, GarbageCollectionReport
from granite_storage.manager import StorageManager

__all__ = ["Removal"]

logger: logging.Logger = logging.getLogger("granite_storage")

_AT_A_TIME = 16


class Removal:
    """Deletes objects of one backend, and notes in a report what became of each.

    Args:
        manager: The manager.
        report: The report, which names the backend.
    """

    def __init__(self, manager: StorageManager, report: GarbageCollectionReport) -> None:
        self._backend = manager.backend(report.backend)
        self._report = report

    async def remove(self, orphans: Sequence[tuple[str, int]]) -> list[CollectedObject]:
        """Delete orphans, each a location and a size; one that cannot be deleted stops no other.

        Raises:
            BackendUnavailableError: Not one could be deleted because the backend is out of reach.
        """
        failures = await self._delete([location for location, _ in orphans])
        collected = [self._collected(location, size, failures.get(location)) for location, size in orphans]
        for item in collected:
            self._note(item)
        if len(failures) == len(orphans):
            first = next(iter(failures.values()))
            if isinstance(first, BackendUnavailableError):
                raise first
        return collected

    async def remove_unfinished(self, older_than: timedelta) -> None:
        """Remove what unfinished writes have left on the whole backend, longer ago than `older_than`."""
        if not isinstance(self._backend, SupportsCleanup):
            return
        try:
            self._report.unfinished = await self._backend.abort_unfinished(older_than=older_than)
        except BackendError as error:
            self._report.unfinished_error = f"{type(error).__name__}: {error}"
            logger.warning("what unfinished writes left on the backend %r stays: %s", self._report.backend, error)

    async def _delete(self, locations: Sequence[str]) -> Mapping[str, StorageError]:
        if not isinstance(self._backend, SupportsBatchDelete):
            return await self._delete_each(locations)
        try:
            return await self._backend.delete_many(locations)
        except StorageError as error:
            return dict.fromkeys(locations, error)

    async def _delete_each(self, locations: Sequence[str]) -> dict[str, StorageError]:
        places, failures = asyncio.Semaphore(_AT_A_TIME), dict[str, StorageError]()

        async def delete(location: str) -> None:
            async with places:
                try:
                    await self._backend.delete(location)
                except StorageError as error:
                    failures[location] = error

        async with asyncio.TaskGroup() as group:
            for location in locations:
                group.create_task(delete(location))
        return failures

    def _collected(self, location: str, size: int, error: StorageError | None) -> CollectedObject:
        fate = Fate.DELETED if error is None else Fate.FAILED
        said = "" if error is None else f"{type(error).__name__}: {error}"
        return CollectedObject(fate, self._report.backend, location, size, said)

    def _note(self, item: CollectedObject) -> None:
        report = self._report
        if item.fate is Fate.DELETED:
            report.deleted += 1
            report.deleted_bytes += item.size
            return
        report.failed += 1
        if len(report.failures) < MOST_KEPT:
            report.failures.append(item)
        logger.warning("could not delete the orphan %r of the backend %r: %s", item.location, item.backend, item.error)
