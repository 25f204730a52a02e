"""Storing attachments, intents first where there is a journal, and deleting what a transaction has left to no row."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy.util import greenlet_spawn

from granite_storage._tasks import shielded_cleanup
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm._interfaces import Intent, StoredObject
from granite_storage.orm._util import can_wait, in_greenlet, wait

if TYPE_CHECKING:
    from uuid import UUID

    from granite_storage._engine import PreparedUpload
    from granite_storage.orm._interfaces import Binding, ColumnType, Journal, UploadLease
    from granite_storage.orm.attachment import Attachment
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

    Where an asynchronous session or connection ends without an `await`, nothing can be awaited; then the objects stay, for the
    garbage collector. What a journal knows of is its own to delete: what rows have given up is its worker's, which looks after
    many at once; what was never taken by a row goes at once, unless the task is being cancelled.

    Args:
        stored: The objects.
        is_async: Whether the session or connection is an asynchronous one.
        keep: Returns the locations of those that stay, among the ones that no journal knows of; it may use SQLAlchemy.
    """
    objects = list({item.key: item for item in stored}.values())
    plain = [item for item in objects if item.intent is None]
    intents = [item.intent for item in objects if item.intent is not None]
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
    """Delete objects side by side, and let journals delete theirs; a failure is logged and stops nothing."""
    places = asyncio.Semaphore(_AT_A_TIME)
    by_journal: dict[Journal, list[UUID]] = {}
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


async def _settle(journal: Journal, ids: list[UUID]) -> None:
    try:
        await journal.settle(ids)
    except Exception:
        logger.warning("%d objects of an ended transaction are left to the journal's worker", len(ids), exc_info=True)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


_AT_A_TIME = 8


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A pending attachment that is to be stored.

    Attributes:
        attachment: The attachment.
        home: The column it is stored for.
        entity_id: The segment of its location that says which row.
        verify: Reads what was stored, and returns its ref as it then is; the upload ends with it, well or not.
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
    """Return the object of a stored attachment, with the intent that stands for it until a row has taken it."""
    return StoredObject(attachment.manager, attachment.ref, attachment._intent)


async def store(uploads: Sequence[Upload]) -> None:
    """Store attachments side by side; if one fails, undo the others, which no row has seen, and raise its error.

    What a journal is to know is committed before the first byte is sent, by one commit for all of them. A cancelled caller
    leaves to the journal what it has begun; without one it waits until nothing of it is left.
    """
    if not uploads:
        return
    prepared = [
        upload.attachment._prepare(upload.binding.manager_for(upload.column_type), upload.column_type, upload.entity_id)
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
    """Leave nothing of attachments that were stored before any transaction and that no row has taken; pass over all others.

    From then on they are pending, and their streams are consumed: a flush that comes later refuses them. A cancelled caller
    leaves to the journal what it knows of. What could not be removed is logged, and left to the journal or the collector.
    """
    unowned = [attachment for attachment in attachments if attachment._unowned]
    for attachment in unowned:
        attachment._discarded = True
    await _undo(unowned, cancelled)


async def _begin(uploads: Sequence[Upload], prepared: Sequence[PreparedUpload]) -> dict[Journal | None, UploadLease]:
    """Write down what is about to be stored, in each journal that is concerned; one, as a rule."""
    leases: dict[Journal | None, UploadLease] = {}
    for journal in {journal for upload in uploads if (journal := upload.binding.journal) is not None}:
        concerned = [(upload, item) for upload, item in zip(uploads, prepared, strict=True) if upload.binding.journal is journal]
        leases[journal] = lease = await journal.begin_uploads([item for _, item in concerned])
        for (upload, _), intent_id in zip(concerned, lease.ids, strict=True):
            upload.attachment._intent = Intent(journal, intent_id)
    return leases


async def _put(upload: Upload, prepared: PreparedUpload, lease: UploadLease | None) -> None:
    intent = upload.attachment._intent
    if lease is None or intent is None:
        await _put_verified(upload, prepared)
        return
    lease.begin(intent.id)
    await _put_verified(upload, prepared)
    try:
        lease.require()
    except StaleAttachmentError:
        # The program stood still, and workers may have looked for the object for the last time before it was there.
        await shielded_cleanup(intent.journal.discard(upload.attachment.ref), "discarding an upload that came too late")
        raise


async def _put_verified(upload: Upload, prepared: PreparedUpload) -> None:
    await upload.attachment._put(upload.binding.manager, upload.column_type, prepared)
    if upload.verify is not None:
        upload.attachment._ref = await upload.verify(upload.attachment.ref)


async def _side_by_side(work: Sequence[Callable[[], Awaitable[None]]], leases: Sequence[UploadLease]) -> None:
    if len(work) == 1 and not leases:
        await work[0]()
        return
    places = asyncio.Semaphore(_AT_A_TIME)

    async def one(put: Callable[[], Awaitable[None]]) -> None:
        async with places:
            await put()

    try:
        async with asyncio.TaskGroup() as group:
            holding = [group.create_task(lease.hold()) for lease in leases]
            await asyncio.wait([group.create_task(one(put)) for put in work])
            for task in holding:
                task.cancel()
    except BaseExceptionGroup as errors:
        # The group has waited for all of them; the first error is the caller's.
        raise errors.exceptions[0] from None


async def _undo(attachments: Sequence[Attachment], cancelled: bool) -> None:
    """Leave nothing of uploads that no row has seen; what was cut off is as little to be trusted as what has failed."""
    stored = [stored_object(attachment) for attachment in attachments if attachment._ref is not None]
    intents = [attachment._intent for attachment in attachments if attachment._intent is not None]
    for attachment in attachments:
        attachment._undo()
    plain = [item for item in stored if item.intent is None]
    await shielded_cleanup(remove(plain, [] if cancelled else intents), "removing uploads that no row has taken")
