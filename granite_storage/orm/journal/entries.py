"""What a flush writes into the journal, with the statements that its rows are written by: all of it in their transaction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.util import await_only

from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.orm.unit_of_work import Intent, StoredObject, UnitOfWork

if TYPE_CHECKING:
    from granite_storage.orm.journal.journal import StorageJournal
    from granite_storage.orm.types import AttachmentType

__all__ = ["restore_deleted", "write_displaced", "write_entries"]


def write_entries(unit: UnitOfWork) -> None:
    """Take back the intents of what rows have taken, and note what they have given up; at the end of a flush.

    The rows are written already, which changes nothing: either all of the transaction comes to be or nothing of it. An error here
    rolls the flush back, and with it what it took back: the next flush that lets a row take the object does it again.
    """
    flush = unit.flush
    taken: dict[StorageJournal, list[UUID]] = {}
    displaced: list[StoredObject] = []
    put = {stored.key for stored, _ in flush.puts}
    for stored, held in flush.net:
        if held:
            earlier = unit.displacement(stored)
            intent = stored.intent if earlier is None else earlier.intent
            if intent is not None:
                taken.setdefault(intent.journal, []).append(intent.id)
        elif stored.key not in put:
            displaced.append(stored)
    for intent in flush.restored:
        taken.setdefault(intent.journal, []).append(intent.id)
    for journal, ids in taken.items():
        journal.intents.consume(flush.connections[journal], ids)
        journal.intents.require_unfenced(intent for intent in flush.restored if intent.journal is journal)
    for journal, connection in flush.connections.items():
        write_displaced(connection, [stored for stored in displaced if stored.intent and stored.intent.journal is journal])


def write_displaced(connection: Connection, displaced: Iterable[StoredObject]) -> None:
    """Note, in the transaction of a connection, that objects shall go."""
    by_journal: dict[StorageJournal, list[StoredObject]] = {}
    for stored in displaced:
        if stored.intent is not None:
            by_journal.setdefault(stored.intent.journal, []).append(stored)
    for journal, items in by_journal.items():
        journal.intents.displace(connection, [(item.ref, journal.retention_of(item.ref)) for item in items])


def restore_deleted(unit: UnitOfWork, home: AttachmentType, stored: StoredObject) -> None:
    """Let a row take an object that waits to be deleted, by taking that delete back."""
    journal = home.binding().journal
    if journal is None:
        raise ConfigurationError(
            "an attachment is restored from a journal, and this base is bound without: bind_storage(..., journal=...)"
        )
    found = await_only(journal.intents.find_delete(stored.ref))
    if found is None:
        raise StaleAttachmentError(f"the object at {stored.ref.location!r} does not wait to be deleted, so it cannot be restored")
    unit.flush.restored.append(Intent(journal, found, deletes=True, location=stored.ref.location))
    unit.flush.log.append((stored, True))
