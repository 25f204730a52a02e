"""Objects that clients store by themselves, and what becomes of their bytes.

Why it is safe. A client stores when it likes, and perhaps twice; so what it stores is never what a row refers to, only what that
is copied from. The intent of this staging object is committed before the client may begin, and lasts until no request of it can
land any more; then a worker deletes it, as an upload that nobody took. A copy has a location and an intent of its own, made anew
for each attempt, like any other upload. Of several that were copied at the same time one is published, in the staging object's
intent and by a single UPDATE that finds there what its writer had seen; the others are discarded.

Only whoever has published a copy lets a row take it. Whoever finds it published is told where it is and no more: a transaction
takes back one intent of an object, and which transactions are about to do so nobody can see from outside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm.journal.intents import new_id
from granite_storage.orm.journal.pool import JournalPool
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import STAGING, JournalTables, clock
from granite_storage.refs import StoredObjectRef

__all__ = ["Finished", "Staging"]


@dataclass(frozen=True, slots=True)
class Finished:
    """What has become of a staging object.

    Attributes:
        ref: The published copy, where there is one that a row holds or may still take.
        note: What the intent says, by which to tell whether it has changed since.
    """

    ref: StoredObjectRef | None
    note: str | None


class Staging:
    """Keeps the intents of staging objects.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        references: What tells which copies rows refer to.
        lease: How long a copy has until a row must have taken it.
    """

    def __init__(self, pool: JournalPool, tables: JournalTables, references: References, lease: timedelta) -> None:
        self._pool = pool
        self._intent = tables.intent
        self._references = references
        self._lease = lease.total_seconds()

    async def begin(self, backend: str, location: str, lifetime: timedelta) -> UUID:
        """Commit, durably, that there may be an object for as long as this."""
        item = new_id()
        row = {"id": item, "kind": STAGING, "backend": backend, "location": location, "due": clock(lifetime.total_seconds())}
        async with self._pool.durable() as connection:
            await connection.execute(insert(self._intent).values([row]))
        return item

    async def find(self, staging_id: UUID) -> Finished:
        """Return what has become of a staging object; a copy that is waiting to be taken has its whole lease again.

        Raises:
            StaleAttachmentError: Its lifetime is over, and a worker has fenced it.
        """
        found = select(self._intent.c.upload_id).where(self._is(staging_id))
        async with self._pool.reading() as connection:
            row = (await connection.execute(found)).one_or_none()
            if row is None:
                raise StaleAttachmentError("the direct upload was not finished in time, and was reclaimed")
            if row.upload_id is None:
                return Finished(None, None)
            published = json.loads(row.upload_id)
            ref = StoredObjectRef.from_dict(published["ref"])
            waits = await self._waits(connection, UUID(published["intent"]))
        # A row refers to a copy from when its intent is gone, so it is asked for after the intent.
        there = waits or ref.location in await self._references.find([ref.location])
        return Finished(ref if there else None, row.upload_id)

    async def publish(self, staging_id: UUID, seen: Finished, intent_id: UUID, ref: StoredObjectRef) -> bool:
        """Commit, durably, which copy of a staging object counts; return whether that still was for the caller to say."""
        note = json.dumps({"intent": intent_id.hex, "ref": ref.to_dict()})
        as_seen = self._intent.c.upload_id.is_not_distinct_from(seen.note)
        async with self._pool.durable() as connection:
            published = await connection.execute(update(self._intent).where(self._is(staging_id), as_seen).values(upload_id=note))
        return published.rowcount == 1

    def _is(self, staging_id: UUID) -> Any:
        return (self._intent.c.id == staging_id) & (self._intent.c.kind == STAGING)

    async def _waits(self, connection: AsyncConnection, intent_id: UUID) -> bool:
        """Tell whether a copy's intent is there, and renew its lease unless a transaction is just taking it back."""
        same = self._intent.c.id == intent_id
        free = await connection.execute(select(self._intent.c.id).where(same).with_for_update(skip_locked=True))
        if free.one_or_none() is not None:
            await connection.execute(update(self._intent).where(same).values(due=clock(self._lease)))
            return True
        return (await connection.execute(select(self._intent.c.id).where(same))).one_or_none() is not None
