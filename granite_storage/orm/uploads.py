"""Storing attachments, and deleting the objects that no row refers to after a transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy.util import greenlet_spawn

from granite_storage._tasks import run_bounded, shielded_cleanup, task_group
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm._interfaces import Intent, StoredObject
from granite_storage.orm._util import can_wait, in_greenlet, wait
from granite_storage.orm.attachment import Attachment, Owner
from granite_storage.refs import iter_refs

if TYPE_CHECKING:
    from uuid import UUID

    from granite_storage._engine import PreparedUpload
    from granite_storage.manager import StorageManager
    from granite_storage.orm._interfaces import Binding, ColumnType, Journal, UploadLease
    from granite_storage.refs import StoredObjectRef

__all__ = ["Upload", "discard", "remove", "remove_now", "store", "stored_object"]


# Deletion after a transaction: a failure is logged and never raised.


logger: logging.Logger = logging.getLogger("granite_storage")

_ANSWER_TIMEOUT = 30.0
"""Seconds that the end of a transaction waits for a new one: a server that is out of reach may take minutes to say so."""


def remove_now(
    stored: Iterable[StoredObject],
    *,
    is_async: bool,
    keep: Callable[[Sequence[StoredObject]], Collection[str]] | None = None,
) -> None:
    """Delete objects from inside a session's or an engine's event, and log what could not be deleted.

    An asynchronous session or connection that ends without an `await` cannot await the storage; the objects are then left to the
    garbage collector. Objects with an intent are deleted by their journal: displaced ones by its worker, in batches; uploads
    that no row refers to at once, unless the task is being cancelled.

    Args:
        stored: The objects.
        is_async: Whether the session or connection is an asynchronous one.
        keep: Given the objects without an intent, returns the locations of those to keep; it may use SQLAlchemy.
    """
    objects = list({item.key: item for item in stored}.values())
    plain = [item for item in objects if item.intent is None]
    intents = [intent for item in objects for intent in item.intents]
    for journal in {intent.journal for intent in intents}:
        journal.wake_workers()
    intents = [intent for intent in intents if not intent.deletes]
    if not can_wait(is_async=is_async):
        for item in plain:
            logger.warning(
                "the object %r is left to the garbage collector: its session was not closed by an await", item.ref.location
            )
        return
    if intents and in_greenlet() and _is_being_cancelled():
        intents = []
    if keep is not None and plain and not in_greenlet():
        kept, keep = keep(plain), None
        plain = [item for item in plain if item.ref.location not in kept]
    if plain or intents:
        work = remove(plain, intents) if keep is None or not plain else _remove_others(plain, intents, keep)
        what = f"deleting {len(plain) + len(intents)} objects of an ended transaction"
        wait(shielded_cleanup(work, what))


async def _remove_others(
    stored: Sequence[StoredObject], intents: Iterable[Intent], keep: Callable[[Sequence[StoredObject]], Collection[str]]
) -> None:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT):
            kept = await greenlet_spawn(keep, stored)
    except TimeoutError:
        kept = {item.ref.location for item in stored}
        logger.warning(
            "the database has not answered in %g seconds whether rows refer to %d objects of an ended transaction; they stay, for"
            " the garbage collector: %s",
            _ANSWER_TIMEOUT,
            len(stored),
            ", ".join(map(repr, kept)),
        )
    await remove([item for item in stored if item.ref.location not in kept], intents)


async def remove(stored: Iterable[StoredObject], intents: Iterable[Intent]) -> None:
    """Delete objects and their variants concurrently, and those of intents by their journals; failures are logged only."""
    by_journal: dict[Journal, list[UUID]] = {}
    for intent in intents:
        by_journal.setdefault(intent.journal, []).append(intent.id)
    objects = [(item.manager, ref) for item in stored for ref in iter_refs(item.ref)]
    await asyncio.gather(
        run_bounded(objects, _delete, _CONCURRENCY), *(_settle(journal, ids) for journal, ids in by_journal.items())
    )


async def _delete(stored: tuple[StorageManager, StoredObjectRef]) -> None:
    manager, ref = stored
    try:
        await manager._engine.delete(ref, while_closing=True)
    except asyncio.CancelledError:
        logger.warning("deleting the object %r was cancelled; it is left to the garbage collector", ref.location)
    except Exception:
        logger.warning("could not delete the object %r; it is left to the garbage collector", ref.location, exc_info=True)


async def _settle(journal: Journal, ids: list[UUID]) -> None:
    try:
        await journal.settle(ids)
    except Exception:
        logger.warning("%d objects of an ended transaction are left to the journal's worker", len(ids), exc_info=True)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A pending attachment to store.

    Attributes:
        attachment: The attachment.
        column_type: The column that it is stored for.
        entity_id: The segment of its location that names the row.
        verify: Checks the stored object and returns its final ref; its error fails the upload.
        binding: The binding of the column.
    """

    attachment: Attachment
    column_type: ColumnType
    entity_id: str
    verify: Callable[[StoredObjectRef], Awaitable[StoredObjectRef]] | None = None
    binding: Binding = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "binding", self.column_type.binding())


def stored_object(attachment: Attachment) -> StoredObject:
    """Return the object of a stored attachment, with its intent if there is one."""
    return StoredObject(attachment.manager, attachment.ref, attachment._state.intent)


async def store(uploads: Sequence[Upload]) -> None:
    """Store attachments concurrently; if one fails, delete the others and raise its error.

    Their intents are committed to the journal before the first byte is sent, in one transaction. A cancelled caller leaves what
    it began to the journal; without a journal it waits until everything is deleted.
    """
    if not uploads:
        return
    prepared = [
        upload.attachment._state.prepare(upload.column_type.manager_in(upload.binding), upload.column_type, upload.entity_id)
        for upload in uploads
    ]
    leases = await _begin(uploads, prepared)
    work = [
        partial(_put, upload, item, leases.get(upload.binding.journal)) for upload, item in zip(uploads, prepared, strict=True)
    ]
    try:
        await _side_by_side(work, list(leases.values()))
    except BaseException as error:
        await _undo([upload.attachment for upload in uploads], isinstance(error, asyncio.CancelledError))
        raise


async def discard(attachments: Iterable[Attachment], *, cancelled: bool = False) -> None:
    """Delete the objects of attachments that were stored before their transaction and that no row refers to; ignore others.

    The attachments become pending, and their streams stay consumed, so that a later flush raises. A cancelled caller leaves
    objects with an intent to the journal. Objects that cannot be deleted are logged, and left to the journal or the collector.
    """
    unowned = [attachment for attachment in attachments if attachment._state.owner is Owner.NONE]
    for attachment in unowned:
        attachment._state.discard()
    await _undo(unowned, cancelled)


async def _begin(uploads: Sequence[Upload], prepared: Sequence[PreparedUpload]) -> dict[Journal | None, UploadLease]:
    """Commit the intents of uploads to their journals, of which there is usually one."""
    leases: dict[Journal | None, UploadLease] = {}
    for journal in {journal for upload in uploads if (journal := upload.binding.journal) is not None}:
        concerned = [(upload, item) for upload, item in zip(uploads, prepared, strict=True) if upload.binding.journal is journal]
        leases[journal] = lease = await journal.begin_uploads([item for _, item in concerned])
        for (upload, _), intent_id in zip(concerned, lease.ids, strict=True):
            upload.attachment._state.record(Intent(journal, intent_id))
    return leases


async def _put(upload: Upload, prepared: PreparedUpload, lease: UploadLease | None) -> None:
    intent = upload.attachment._state.intent
    if lease is None or intent is None:
        await _put_verified(upload, prepared)
        return
    lease.begin(intent.id)
    await _put_verified(upload, prepared)
    try:
        lease.require()
    except StaleAttachmentError:
        # The process was suspended, and a worker may have checked for the object for the last time before it existed.
        await shielded_cleanup(intent.journal.discard(upload.attachment.ref), "discarding an upload that ended after its lease")
        raise


async def _put_verified(upload: Upload, prepared: PreparedUpload) -> None:
    state = upload.attachment._state
    ref = await state.put(upload.binding.manager, upload.column_type, prepared)
    if upload.verify is not None:
        state.correct(await upload.verify(ref))


async def _side_by_side(work: Sequence[Callable[[], Awaitable[None]]], leases: Sequence[UploadLease]) -> None:
    if len(work) == 1 and not leases:
        await work[0]()
        return
    async with task_group() as group:
        holding = [group.create_task(lease.hold()) for lease in leases]
        await run_bounded(work, lambda put: put(), _CONCURRENCY)
        for task in holding:
            task.cancel()


async def _undo(attachments: Sequence[Attachment], cancelled: bool) -> None:
    """Delete the objects of uploads that no row refers to; an interrupted upload may have stored its object too."""
    stored = [stored_object(attachment) for attachment in attachments if attachment._state.ref is not None]
    intents = [intent for attachment in attachments if (intent := attachment._state.intent) is not None]
    for attachment in attachments:
        attachment._state.undo()
    plain = [item for item in stored if item.intent is None]
    await shielded_cleanup(remove(plain, [] if cancelled else intents), "removing uploads that no row refers to")
