"""Objects that clients store directly, and their copies.

Why it is safe. A client may store its object at any time, and more than once, so a row never refers to that object but to a copy
of it. The intent of this staging object is committed before the client may begin, and lasts until no request of the client can
succeed any more; then a worker deletes the object, like an upload that no row refers to. A copy has its own location and intent,
new for each attempt, like any other upload. Of several concurrent copies one is published in the staging object's intent, by a
single UPDATE that compares the previous value; the others are discarded.

A copy takes as long and costs as much as its object, so one is made at a time: a request claims the staging object in its intent,
in the same way, and renews the claim while it copies. Safety does not depend on claims. A claim that is not renewed, because its
process has ended, expires after a minute.

Only the request that has published a copy assigns it to a row. Others receive its location only: a transaction consumes one
intent of an object, and transactions that are about to do so cannot be seen from outside.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self
from uuid import UUID

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage._tasks import shielded, shielded_cleanup
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.intents import new_id
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import STAGING, clock, in_utc
from granite_storage.refs import StoredObjectRef

logger: logging.Logger = logging.getLogger("granite_storage")

_CLAIM_SECONDS = 60.0
_RENEWAL_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The state of a staging object.

    Attributes:
        ref: The published copy, where there is one that a row holds or may still take.
        note: What the intent says, by which to tell whether it has changed since.
        is_claimed: Whether a process is making a copy now.
        verdict: What its last copy or its first bytes were found to be, where that was refused.
    """

    ref: StoredObjectRef | None
    note: str | None
    is_claimed: bool = False
    verdict: Mapping[str, Any] | None = None


class Staging:
    """Keeps the intents of staging objects.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        references: What tells which copies rows refer to.
        lease: How long a copy has until a row must have taken it.
    """

    def __init__(self, pool: JournalPool, tables: JournalTables, references: References, lease: timedelta) -> None:
        self._rows = pool
        self._tables = tables
        self._pool = pool.uploads
        self._intent = pool.upload_tables(tables).intent
        self._references = references
        self._lease = lease.total_seconds()

    async def begin(self, backend: str, location: str, lifetime: timedelta) -> UUID:
        """Commit durably that a client may store an object directly; return the id of its intent.

        The object is deleted when its lifetime is over, and once more after another lease, for what has arrived late.
        """
        item = new_id()
        row = {"id": item, "kind": STAGING, "backend": backend, "location": location, "due": clock(lifetime.total_seconds())}
        async with self._pool.durable() as connection:
            await connection.execute(insert(self._intent).values(row))
        return item

    async def find(self, staging_id: UUID) -> Finished:
        """Return the state of a staging object; the lease of a copy that is not yet assigned is renewed.

        Raises:
            StaleAttachmentError: Its lifetime is over, and a worker has fenced it.
        """
        found = select(self._intent.c.upload_id, clock().label("now")).where(self._is(staging_id))
        async with self._pool.writing() as connection:
            row = (await connection.execute(found)).one_or_none()
            if row is None:
                raise StaleAttachmentError("the direct upload was not finished in time, and was reclaimed")
            if row.upload_id is None:
                return Finished(None, None)
            said = json.loads(row.upload_id)
            if "claim" in said:
                return Finished(None, row.upload_id, is_claimed=in_utc(row.now).timestamp() < said["until"])
            if "verdict" in said:
                return Finished(None, row.upload_id, verdict=said["verdict"])
            ref = StoredObjectRef.from_dict(said["ref"])
            waits = await self._waits(connection, UUID(said["intent"]))
        waits = waits and not await self._rows.has_displaced(self._tables, ref.location)
        # A row refers to a copy from when its intent is gone, so it is asked for after the intent.
        there = waits or ref.location in await self._references.find([ref.location])
        return Finished(ref if there else None, row.upload_id)

    async def claim(self, staging_id: UUID, seen: Finished) -> Claim | None:
        """Claim a staging object, to make a copy of it; None if another request has claimed it.

        A cancelled caller waits until it has given the claim back.
        """
        return await shielded(Claim(self, staging_id, seen.note).begin(), undo=_release)

    async def publish(self, staging_id: UUID, seen: str, intent_id: UUID, ref: StoredObjectRef) -> bool:
        """Commit durably which copy of a staging object counts; return False if that was decided by another caller."""
        return await self.write(staging_id, seen, json.dumps({"intent": intent_id.hex, "ref": ref.to_dict()}))

    async def write(self, staging_id: UUID, seen: str | None, note: str | None) -> bool:
        """Commit durably what is noted of a staging object, if it is what the caller has seen; return whether it is."""
        as_seen = self._intent.c.upload_id.is_not_distinct_from(seen)
        async with self._pool.durable() as connection:
            written = await connection.execute(update(self._intent).where(self._is(staging_id), as_seen).values(upload_id=note))
        return written.rowcount == 1

    async def now(self) -> float:
        """Return the database's time, in seconds since 1970."""
        async with self._pool.reading() as connection:
            return in_utc((await connection.execute(select(clock()))).scalar_one()).timestamp()

    def _is(self, staging_id: UUID) -> Any:
        return (self._intent.c.id == staging_id) & (self._intent.c.kind == STAGING)

    async def _waits(self, connection: AsyncConnection, intent_id: UUID) -> bool:
        """Return whether a copy's intent exists, and renew its lease unless a transaction is consuming it."""
        same = self._intent.c.id == intent_id
        free = await connection.execute(select(self._intent.c.id).where(same).with_for_update(skip_locked=True))
        if free.one_or_none() is not None:
            await connection.execute(update(self._intent).where(same).values(due=clock(self._lease)))
            return True
        return (await connection.execute(select(self._intent.c.id).where(same))).one_or_none() is not None


class Claim:
    """The claim of a staging object while it is copied; to be entered once it has been made.

    Args:
        staging: Where it is kept.
        staging_id: The staging object.
        before: What was said of it before.
    """

    def __init__(self, staging: Staging, staging_id: UUID, before: str | None) -> None:
        self._staging = staging
        self._staging_id = staging_id
        self._before = before
        self._note: str | None = None
        self._id = new_id().hex
        self._renewing: asyncio.Task[None] | None = None

    async def begin(self) -> Claim | None:
        """Claim it; None if another request has claimed it."""
        note = await self._new_note()
        if not await self._staging.write(self._staging_id, self._before, note):
            return None
        self._note = note
        return self

    async def publish(self, intent_id: UUID, ref: StoredObjectRef) -> bool:
        """Commit durably that this copy counts; return False if that was decided by another caller."""
        await self._stop_renewing()
        if self._note is None:
            return False
        published = await self._staging.publish(self._staging_id, self._note, intent_id, ref)
        self._note = None
        return published

    async def refuse(self, verdict: Mapping[str, Any]) -> None:
        """Commit why the staging object is refused, so that it is not read again."""
        await self._stop_renewing()
        if self._note is not None:
            await self._staging.write(self._staging_id, self._note, json.dumps({"verdict": dict(verdict)}))
            self._note = None

    async def release(self) -> None:
        """Release it, so that another request may claim the object."""
        await self._stop_renewing()
        note, self._note = self._note, None
        if note is not None:
            await self._staging.write(self._staging_id, note, self._before)

    async def __aenter__(self) -> Self:
        self._renewing = asyncio.ensure_future(self._renew())
        return self

    async def __aexit__(self, *_: object) -> None:
        await shielded_cleanup(self.release(), "releasing the claim of a direct upload")

    async def _stop_renewing(self) -> None:
        """Wait until a renewal in progress has ended, because its result must be known."""
        task, self._renewing = self._renewing, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _renew(self) -> None:
        while self._note is not None:
            await asyncio.sleep(_RENEWAL_SECONDS)
            await shielded(self._renew_once())

    async def _renew_once(self) -> None:
        try:
            note = await self._new_note()
            renewed = await self._staging.write(self._staging_id, self._note, note)
        except Exception as error:  # noqa: BLE001  # a claim that is lost costs a second copy and no more
            logger.warning("the claim of a direct upload could not be renewed: %s", error)
            return
        self._note = note if renewed else None

    async def _new_note(self) -> str:
        return json.dumps({"claim": self._id, "until": await self._staging.now() + _CLAIM_SECONDS})


async def _release(claim: Claim | None) -> None:
    if claim is not None:
        await claim.release()
