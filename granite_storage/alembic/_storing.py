"""Storing the objects of some rows side by side, each read back before its row may refer to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from granite_storage._tasks import finish
from granite_storage.exceptions import ChecksumMismatchError, InvalidLocationError
from granite_storage.locations import check_segment, uuid7_hex
from granite_storage.manager import StorageManager
from granite_storage.refs import StoredObjectRef

__all__ = ["Place", "Stored", "Work", "all_or_none", "kept_if_readable", "read_whole", "removed", "stored_bytes"]

Work: TypeAlias = "Callable[[], Coroutine[Any, Any, Stored | None]]"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's object goes.

    Attributes:
        storage_key: The policy.
        table: The table.
        primary_key: The row's primary key.
        column: The column of refs.
    """

    storage_key: str
    table: str
    primary_key: tuple[Any, ...]
    column: str

    def arguments(self) -> dict[str, Any]:
        """Return what the manager's calls take."""
        entity = "-".join(map(str, self.primary_key))
        try:
            check_segment(entity)
        except InvalidLocationError:
            entity = uuid7_hex()
        return {
            "storage_key": self.storage_key,
            "model_name": self.table,
            "entity_id": entity,
            "field_name": self.column,
        }


@dataclass(frozen=True, slots=True)
class Stored:
    """An object for a row; `is_own` where it was stored for the row, and not there before."""

    ref: StoredObjectRef
    is_own: bool = True


async def stored_bytes(
    manager: StorageManager, place: Place, content: bytes, content_type: str | None, filename: str | None
) -> Stored:
    """Store content, and see that it comes back; nothing is left where it does not."""
    ref = await manager.put_bytes(**place.arguments(), content=content, content_type=content_type, original_filename=filename)
    return await _kept_if(manager, ref, _comes_back(manager, ref, content))


async def read_whole(manager: StorageManager, ref: StoredObjectRef) -> None:
    """Read an object to its end, and raise unless its size and its checksum are those of its ref."""
    async with manager.open(ref, verify=True) as reader:
        async for _ in reader:
            pass


async def kept_if_readable(manager: StorageManager, ref: StoredObjectRef) -> Stored:
    """Read a new object to its end; it is removed where that fails."""
    return await _kept_if(manager, ref, read_whole(manager, ref))


async def removed(manager: StorageManager, ref: StoredObjectRef) -> None:
    """Remove an object that no row refers to; a failure is logged."""
    await finish(manager.delete(ref), f"deleting the object {ref.location!r}, which no row refers to")


async def all_or_none(manager: StorageManager, works: Sequence[tuple[str, Work]], at_a_time: int) -> list[Stored | None]:
    """Do all of it side by side; where one fails, remove what the others have stored, and raise its error with its row's name."""
    places = asyncio.Semaphore(at_a_time)

    async def one(label: str, work: Work) -> Stored | None:
        try:
            async with places:
                return await work()
        except Exception as error:
            error.add_note(f"while converting {label}")
            raise

    tasks = [asyncio.ensure_future(one(label, work)) for label, work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await finish(_withdrawn(manager, tasks), "removing the objects of a step that failed")
        raise


async def _withdrawn(manager: StorageManager, tasks: Sequence[asyncio.Future[Stored | None]]) -> None:
    for task in tasks:
        task.cancel()
    for done in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(done, Stored) and done.is_own:
            await removed(manager, done.ref)


async def _kept_if(manager: StorageManager, ref: StoredObjectRef, check: Coroutine[Any, Any, None]) -> Stored:
    try:
        await check
    except BaseException:
        await removed(manager, ref)
        raise
    return Stored(ref)


async def _comes_back(manager: StorageManager, ref: StoredObjectRef, content: bytes) -> None:
    if await manager.get(ref) != content:
        raise ChecksumMismatchError(f"the object at {ref.location!r} is not what was stored", expected=ref.checksum)
