"""What direct uploads were finished as, so that finishing one again gives the same."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.types import AttachmentType
from granite_storage.orm.uploads import stored_object
from granite_storage.web._tickets import Ticket

__all__ = ["Finishes", "Found", "JournaledFinishes", "RememberedFinishes"]


@dataclass(frozen=True, slots=True)
class Found:
    """What an upload was finished as.

    Attributes:
        attachment: The attachment, where its object is there, or None.
        seen: What is known of it, by which `publish` tells whether that has changed.
    """

    attachment: Attachment | None
    seen: Any


class Finishes(Protocol):
    """Where it is written down."""

    async def find(self, ticket: Ticket, home: AttachmentType) -> Found:
        """Return what an upload was finished as."""
        ...

    async def publish(self, ticket: Ticket, found: Found, attachment: Attachment) -> bool:
        """Write down what it is finished as, unless somebody else has done so since it was looked for; return whether."""
        ...


class JournaledFinishes:
    """Keeps it in the journal, for every process.

    Args:
        journal: The journal.
    """

    def __init__(self, journal: StorageJournal) -> None:
        self._journal = journal

    async def find(self, ticket: Ticket, home: AttachmentType) -> Found:
        """Return what an upload was finished as: no row may take it but by a copy, for another row may be taking it now."""
        finished = await self._journal.find_finished(_staging_id(ticket))
        return Found(None if finished.ref is None else Attachment._of(finished.ref, home), finished)

    async def publish(self, ticket: Ticket, found: Found, attachment: Attachment) -> bool:
        """Write it down."""
        stored = stored_object(attachment)
        if stored.intent is None:
            raise StaleAttachmentError("the base was bound anew, without a journal, while a direct upload was finished")
        return await self._journal.publish_finished(_staging_id(ticket), found.seen, stored.intent.id, stored.ref)


class RememberedFinishes:
    """Keeps it in this process, as long as the upload can be finished."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Attachment, int]] = {}

    async def find(self, ticket: Ticket, home: AttachmentType) -> Found:
        """Return what an upload was finished as: the same attachment, which a row takes once and others copy."""
        now = time.time()
        self._known = {location: known for location, known in self._known.items() if known[1] > now}
        attachment, _ = self._known.get(ticket.location, (None, 0))
        there = attachment is not None and not attachment.is_pending and await attachment.exists()
        return Found(attachment if there else None, attachment)

    async def publish(self, ticket: Ticket, found: Found, attachment: Attachment) -> bool:
        """Write it down."""
        known, _ = self._known.get(ticket.location, (None, 0))
        if known is not found.seen:
            return False
        self._known[ticket.location] = attachment, ticket.ends
        return True


def _staging_id(ticket: Ticket) -> UUID:
    if ticket.staging_id is None:
        raise StaleAttachmentError("the direct upload was begun before there was a journal; it may be begun again")
    return ticket.staging_id
