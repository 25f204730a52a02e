"""References whose objects are not there, as a collection comes across them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from granite_storage.exceptions import BackendError, InvalidLocationError
from granite_storage.gc.references import ReferenceSource
from granite_storage.gc.report import MOST_KEPT, DanglingReference
from granite_storage.manager import StorageManager
from granite_storage.orm._batches import batches
from granite_storage.orm.scanning import is_text

__all__ = ["find_dangling"]

_AT_A_TIME = 16
_BATCH = 500


async def find_dangling(
    manager: StorageManager, source: ReferenceSource, backend: str, locations: Sequence[str]
) -> list[DanglingReference]:
    """Return which of the locations something refers to and no object is at, a thousand at the most.

    They were not listed, which proves nothing: an object may have been stored since, and its row too; or a row that was there
    has given its object up. So each is looked for now, and of what is missing is asked whether it is still referred to.
    """
    found: list[DanglingReference] = []
    for batch in batches(locations, min(_BATCH, source.at_a_time)):
        missing = await _missing(manager, backend, batch)
        odd = {location for location in missing if not is_text(location)}  # no database can be asked for it
        asked = [location for location in missing if location not in odd]
        held = odd | (await source.find_held(backend, asked) if asked else set())
        found += [DanglingReference(backend, location, said) for location, said in missing.items() if location in held]
        if len(found) >= MOST_KEPT:
            break
    return found[:MOST_KEPT]


async def _missing(manager: StorageManager, backend_key: str, locations: Sequence[str]) -> dict[str, str]:
    """Return what is wrong at the locations at which there is no object; what cannot be looked at is not wrong."""
    backend, places, missing = manager.backend(backend_key), asyncio.Semaphore(_AT_A_TIME), dict[str, str]()

    async def look(location: str) -> None:
        async with places:
            try:
                if not await backend.exists(location):
                    missing[location] = "no object is there"
            except InvalidLocationError as error:
                missing[location] = str(error)
            except BackendError:
                return

    async with asyncio.TaskGroup() as group:
        for location in locations:
            group.create_task(look(location))
    return missing
