"""What direct uploads were finished as: finishing one again gives the same, and one that was refused is not read again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self
from uuid import UUID

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.journal import direct_uploads
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.uploads import stored_object
from granite_storage.web._upload_tokens import Ticket

__all__ = ["Claim", "Finishes", "Found", "JournaledFinishes", "RememberedFinishes"]


@dataclass(frozen=True, slots=True)
class Found:
    """What an upload was finished as.

    Attributes:
        attachment: The attachment, where its object is there, or None.
        seen: What is known of it, by which `Finishes.claim` tells whether that has changed.
        is_claimed: Whether another process finishes it just now.
        verdict: Why it was refused, where it was.
    """

    attachment: Attachment | None
    seen: Any
    is_claimed: bool = False
    verdict: Mapping[str, Any] | None = None


class Claim(Protocol):
    """The right to finish an upload, for as long as it is entered."""

    async def publish(self, attachment: Attachment) -> bool:
        """Write down what it is finished as, unless somebody else has done so meanwhile; return whether."""
        ...

    async def refuse(self, verdict: Mapping[str, Any]) -> None:
        """Write down why it is refused."""
        ...


class Finishes(Protocol):
    """Where it is written down."""

    async def find(self, ticket: Ticket, home: AttachmentType) -> Found:
        """Return what an upload was finished as."""
        ...

    async def claim(self, ticket: Ticket, found: Found) -> AbstractAsyncContextManager[Claim] | None:
        """Return the right to finish it; None where somebody else has got it since it was looked for."""
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
        attachment = None if finished.ref is None else Attachment._of(finished.ref, home)
        return Found(attachment, finished, finished.is_claimed, finished.verdict)

    async def claim(self, ticket: Ticket, found: Found) -> AbstractAsyncContextManager[Claim] | None:
        """Return the right to finish it, of all processes."""
        claim = await self._journal.claim_staging(_staging_id(ticket), found.seen)
        return None if claim is None else _JournaledClaim(claim)


class _JournaledClaim:
    def __init__(self, claim: direct_uploads.Claim) -> None:
        self._claim = claim

    async def publish(self, attachment: Attachment) -> bool:
        """Write down what it is finished as."""
        stored = stored_object(attachment)
        if stored.intent is None:
            raise StaleAttachmentError("the base was bound anew, without a journal, while a direct upload was finished")
        return await self._claim.publish(stored.intent.id, stored.ref)

    async def refuse(self, verdict: Mapping[str, Any]) -> None:
        """Write down why it is refused."""
        await self._claim.refuse(verdict)

    async def __aenter__(self) -> Self:
        await self._claim.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._claim.__aexit__(*error)


class RememberedFinishes:
    """Keeps it in this process, as long as the upload can be finished."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Attachment | Mapping[str, Any], int]] = {}

    async def find(self, ticket: Ticket, home: AttachmentType) -> Found:
        """Return what an upload was finished as: the same attachment, which a row takes once and others copy."""
        now = time.time()
        for location in [location for location, (_, ends) in self._known.items() if ends <= now]:
            del self._known[location]
        known, _ = self._known.get(ticket.location, (None, 0))
        if not isinstance(known, Attachment):
            return Found(None, known, verdict=known)
        there = not known.is_pending and await known.exists()
        return Found(known if there else None, known)

    async def claim(self, ticket: Ticket, found: Found) -> AbstractAsyncContextManager[Claim] | None:
        """Return the right to finish it, which whoever finishes it alone in this process has."""
        return _RememberedClaim(self._known, ticket, found.seen)


class _RememberedClaim:
    def __init__(self, known: dict[str, tuple[Attachment | Mapping[str, Any], int]], ticket: Ticket, seen: Any) -> None:
        self._known = known
        self._ticket = ticket
        self._seen = seen

    async def publish(self, attachment: Attachment) -> bool:
        """Remember what it is finished as."""
        known, _ = self._known.get(self._ticket.location, (None, 0))
        if known is not self._seen:  # another event loop of this process was faster
            return False
        self._known[self._ticket.location] = attachment, self._ticket.ends
        return True

    async def refuse(self, verdict: Mapping[str, Any]) -> None:
        """Remember why it is refused."""
        self._known[self._ticket.location] = verdict, self._ticket.ends

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...


def _staging_id(ticket: Ticket) -> UUID:
    if ticket.staging_id is None:
        raise StaleAttachmentError("the direct upload was begun before there was a journal; it may be begun again")
    return ticket.staging_id
