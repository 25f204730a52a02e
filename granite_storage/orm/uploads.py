"""Storing attachments, and deleting the objects that no row refers to after a transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from sqlalchemy.util import greenlet_spawn

from granite_storage._tasks import (
    UnexpectedExitError,
    contained,
    run_bounded,
    shielded,
    shielded_cleanup,
    task_group,
)
from granite_storage._telemetry import fields_of, traced
from granite_storage.derived import DerivationSource
from granite_storage.exceptions import DerivationFailedError, InvalidReferenceError, StaleAttachmentError
from granite_storage.orm._interfaces import Binding, ColumnType, DeclaredVariant, Intent, Journal, StoredObject, UploadLease
from granite_storage.orm._util import can_wait, group, in_greenlet, wait
from granite_storage.orm.attachment import Attachment, Owner
from granite_storage.refs import StoredObjectRef, is_held, iter_refs

if TYPE_CHECKING:
    from uuid import UUID

    from granite_storage._engine import PreparedUpload
    from granite_storage.manager import StorageManager
    from granite_storage.readers import OpeningReader


# Deletion after a transaction: a failure is logged and never raised.


logger: logging.Logger = logging.getLogger("granite_storage")

_ANSWER_TIMEOUT = 30.0
"""Seconds that the end of a transaction waits for a new one: a server that is out of reach may take minutes to say so."""


def remove_now(
    stored: Iterable[StoredObject],
    *,
    is_async: bool,
    keep: Callable[[Sequence[StoredObject]], Collection[str]] | None = None,
    are_locked: bool = False,
) -> None:
    """Delete objects from inside a session's or an engine's event, and log what could not be deleted.

    An asynchronous session or connection that ends without an `await` cannot await the storage; the objects are then left to the
    garbage collector. Objects with an intent are deleted by their journal: displaced ones by its worker, in batches; uploads
    that no row refers to at once.

    Args:
        stored: The objects.
        is_async: Whether the session or connection is an asynchronous one.
        keep: Given the objects without an intent, returns the locations of those to keep; it may use SQLAlchemy.
        are_locked: Whether the transaction may still have its locks, as it does until its connection is closed.
    """
    given = list(stored)
    objects = {item.key: item for item in given}
    # Rows that have shared an original may have had variants of their own.
    parts = [part for item in given if objects[item.key].intent is None for part in item.parts]
    plain = list({part.key: part for part in parts}.values())
    intents = [intent for item in objects.values() for intent in item.intents]
    for journal in {intent.journal for intent in intents}:
        journal.wake_workers()
    intents = [intent for intent in intents if not intent.deletes]
    if not can_wait(is_async=is_async):
        for item in plain:
            logger.warning(
                "the object %r is left to the garbage collector: its session was not closed with an await",
                item.ref.location,
                extra=fields_of(item.ref),
            )
        return
    if are_locked:  # on SQLite the whole file is, and each look at it would wait
        busy = [intent for intent in intents if intent.journal.sidecar is not None]
        for journal, ids in ids_by_journal(busy).items():
            journal.settle_soon(ids)
        intents = [intent for intent in intents if intent not in busy]
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
    objects = [(item.manager, ref) for item in stored for ref in iter_refs(item.ref)]
    await asyncio.gather(
        run_bounded(objects, _delete, _CONCURRENCY),
        *(_settle(journal, ids) for journal, ids in ids_by_journal(intents).items()),
    )


def ids_by_journal(intents: Iterable[Intent]) -> dict[Journal, list[UUID]]:
    """Return the ids of intents by their journals."""
    return {journal: [intent.id for intent in own] for journal, own in group(intents, attrgetter("journal")).items()}


async def _delete(stored: tuple[StorageManager, StoredObjectRef]) -> None:
    manager, ref = stored
    try:
        with contained("the backend"):
            await manager._engine.delete(ref, while_closing=True)
    except asyncio.CancelledError:
        logger.warning(
            "deleting the object %r was cancelled; it is left to the garbage collector", ref.location, extra=fields_of(ref)
        )
    except Exception:
        logger.warning(
            "could not delete the object %r; it is left to the garbage collector",
            ref.location,
            exc_info=True,
            extra=fields_of(ref),
        )


async def _settle(journal: Journal, ids: list[UUID]) -> None:
    try:
        with contained("the journal"):
            await journal.settle(ids)
    except Exception:
        logger.warning("%d objects of an ended transaction are left to the journal's worker", len(ids), exc_info=True)


_CONCURRENCY = 8
_DERIVATIONS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A pending attachment to store.

    Attributes:
        attachment: The attachment.
        column_type: The column that it is stored for.
        entity_id: The segment of its location that names the row.
        verify: Checks the stored object and returns its final ref; its error fails the upload.
        has_variants: Whether the variants that its column makes in the flush are made.
        binding: The binding of the column.
    """

    attachment: Attachment
    column_type: ColumnType
    entity_id: str
    verify: Callable[[StoredObjectRef], Awaitable[StoredObjectRef]] | None = None
    has_variants: bool = True
    binding: Binding = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "binding", self.column_type.binding())


def stored_object(attachment: Attachment) -> StoredObject:
    """Return the object of a stored attachment, with its intent and those of its variants if there are any."""
    state = attachment._state
    return StoredObject(attachment.manager, attachment.ref, state.intent, state.variant_intents)


@dataclass(slots=True, eq=False)
class _Item:
    """An upload that is being stored, and the variants that are made with it.

    Attributes:
        upload: The upload.
        prepared: Where its object will be.
        variants: Where its variants will be, by their names.
        intents: What a journal has recorded about those.
        made: The variants that are stored.
    """

    upload: Upload
    prepared: PreparedUpload
    variants: Mapping[str, PreparedUpload]
    intents: dict[str, Intent] = field(default_factory=dict)
    made: dict[str, StoredObjectRef] = field(default_factory=dict)

    @classmethod
    def of(cls, upload: Upload) -> Self:
        """Decide where the objects of an upload will be."""
        column_type, entity_id = upload.column_type, upload.entity_id
        manager = column_type.manager_in(upload.binding)
        prepared = upload.attachment._state.prepare(manager, column_type, entity_id)
        declared = column_type.variants.values() if upload.has_variants else ()
        variants = {
            item.name: prepare_variant(manager, column_type, entity_id, prepared.location, prepared.policy.storage_key, item)
            for item in declared
            if item.recipe.when == "flush"
        }
        return cls(upload, prepared, variants)

    def is_for(self, name: str) -> bool:
        """Return whether what is stored has a variant: its media type is known only now."""
        return self.upload.column_type.variants[name].is_for(self.upload.attachment.ref)

    def complete(self) -> None:
        """Give the attachment the variants that are stored; those that are not are missing until a worker has made them.

        The intents of those that it cannot have go to the transaction of its row, too, though nothing was stored for them.
        """
        intents = [intent for name, intent in self.intents.items() if name in self.made or not self.is_for(name)]
        if self.made or intents:
            self.upload.attachment._state.add_variants(self.made, intents)

    @property
    def stored_variants(self) -> list[StoredObject]:
        """The objects of its variants, until the attachment has them."""
        manager = self.upload.binding.manager
        return [StoredObject(manager, ref, self.intents.get(name)) for name, ref in self.made.items()]


async def store(uploads: Sequence[Upload]) -> None:
    """Store attachments concurrently, and then the variants that are made in the flush; if one fails, delete all the others.

    Their intents are committed to the journal before the first byte is sent, in one transaction. A cancelled caller waits until
    everything is deleted: with a journal as its worker deletes, so that a request which still arrives leaves nothing either.

    A variant whose recipe fails is left to the journal's worker, as are all of an original that is held for a scanner. Without a
    journal the failure is raised. One that a recipe refuses is an error, as any other refused upload.
    """
    if not uploads:
        return
    items = [_Item.of(upload) for upload in uploads]
    leases = await _begin(items)
    try:
        await _put_all(items, leases)
    except BaseException:
        await _undo([upload.attachment for upload in uploads], items)
        with contained("storing attachments"):
            raise
    for item in items:
        item.complete()


async def discard(attachments: Iterable[Attachment]) -> None:
    """Delete the objects of attachments that were stored before their transaction and that no row refers to; ignore others.

    The attachments become pending, and their streams stay consumed, so that a later flush raises. A cancelled caller waits for
    the deletes. Objects that cannot be deleted are logged, and left to the journal or the collector.
    """
    unowned = [attachment for attachment in attachments if attachment._state.owner is Owner.NONE]
    for attachment in unowned:
        attachment._state.discard()
    await _undo(unowned)


async def _begin(items: Sequence[_Item]) -> dict[Journal | None, UploadLease]:
    """Commit the intents of uploads and their variants to their journals, of which there is usually one."""
    leases: dict[Journal | None, UploadLease] = {}
    for journal, concerned in group(items, lambda item: item.upload.binding.journal).items():
        if journal is None:
            continue
        prepared = [one for item in concerned for one in (item.prepared, *item.variants.values())]
        leases[journal] = lease = await journal.begin_uploads(prepared)
        ids = iter(lease.ids)
        for item in concerned:
            item.upload.attachment._state.record(Intent(journal, next(ids)))
            item.intents = {name: Intent(journal, next(ids)) for name in item.variants}
    return leases


async def _put_all(items: Sequence[_Item], leases: Mapping[Journal | None, UploadLease]) -> None:
    leased = [(item, leases.get(item.upload.binding.journal)) for item in items]
    puts = [partial(_put, item, lease) for item, lease in leased]
    variants = [partial(_put_variant, item, name, lease) for item, lease in leased for name in item.variants]
    async with _held(list(leases.values())):
        if len(puts) == 1 and not variants:
            await puts[0]()
            return
        await run_bounded(puts, lambda put: put(), _CONCURRENCY)
        await run_bounded(variants, lambda make: make(), _DERIVATIONS)


@asynccontextmanager
async def _held(leases: Sequence[UploadLease]) -> AsyncIterator[None]:
    """Renew leases while the block runs; if one cannot be renewed, cancel the block and raise its error.

    The tasks begin after a while only, since most uploads are short.
    """
    if not leases:
        yield
        return
    async with task_group() as group:
        holding: list[asyncio.Task[None]] = []
        delay = min(lease.interval for lease in leases) / 4
        later = asyncio.get_running_loop().call_later(
            delay, lambda: holding.extend(group.create_task(lease.hold()) for lease in leases)
        )
        try:
            yield
        finally:
            later.cancel()
            for task in holding:
                task.cancel()


def _begun(lease: UploadLease | None, intent: Intent | None) -> AbstractContextManager[None]:
    return nullcontext() if lease is None or intent is None else lease.begin(intent.id)


async def _put(item: _Item, lease: UploadLease | None) -> None:
    upload, state = item.upload, item.upload.attachment._state
    with _begun(lease, state.intent):
        await state.put(upload.binding.manager, upload.column_type, item.prepared)
        if upload.verify is not None:
            state.correct(await upload.verify(state.require_ref()))
    await require_lease(lease, state.intent, state.require_ref())


async def _put_variant(item: _Item, name: str, lease: UploadLease | None) -> None:
    upload, intent = item.upload, item.intents.get(name)
    source = upload.attachment.ref
    if is_held(source) or not item.is_for(name):
        return

    def keep(ref: StoredObjectRef) -> None:
        item.made[name] = ref

    declared = upload.column_type.variants[name]
    try:
        with _begun(lease, intent):
            await make_variant(upload.binding.manager, source, item.variants[name], declared, keep)
    except DerivationFailedError as error:
        if intent is None:
            raise
        logger.warning(
            "the variant %r of the object %r could not be made in the flush and is left to the journal's worker: %s",
            name,
            source.location,
            error,
            extra=fields_of(source),
        )
    if name in item.made:
        await require_lease(lease, intent, item.made[name])


async def require_lease(lease: UploadLease | None, intent: Intent | None, ref: StoredObjectRef) -> None:
    """Delete an object that was stored after its lease: a worker may have looked for it for the last time before it existed.

    Raises:
        StaleAttachmentError: It was.
    """
    if lease is None or intent is None:
        return
    try:
        lease.require()
    except StaleAttachmentError:
        await shielded_cleanup(intent.journal.discard(ref), "discarding an upload that ended after its lease")
        raise


async def _undo(attachments: Sequence[Attachment], items: Sequence[_Item] = ()) -> None:
    """Delete the objects of uploads that no row refers to; an interrupted upload may have stored its object too.

    Args:
        attachments: The attachments.
        items: The uploads that were in progress, whose variants the attachments do not have yet.
    """
    stored = [stored_object(attachment) for attachment in attachments if attachment._state.ref is not None]
    stored += [variant for item in items for variant in item.stored_variants]
    intents = [intent for attachment in attachments for intent in attachment._state.intents]
    intents += [intent for item in items for intent in item.intents.values()]
    for attachment in attachments:
        attachment._state.undo()
    plain = [item for item in stored if item.intent is None]
    await shielded_cleanup(remove(plain, intents), "removing uploads that no row refers to")


# Variants: each has a location and an intent of its own, and is derived from what was stored.


on_original_opened: ContextVar[Callable[[int], None] | None] = ContextVar("granite_storage_original_opened", default=None)
"""Called with the size of an original in bytes whenever a recipe opens it, for a limit of bytes per second."""


def prepare_variant(
    manager: StorageManager, column_type: ColumnType, entity_id: str, source: str, storage_key: str, declared: DeclaredVariant
) -> PreparedUpload:
    """Decide where a variant will be.

    Args:
        manager: The manager.
        column_type: The column whose recipe it is.
        entity_id: The segment of its location that names the row.
        source: The location of its original.
        storage_key: The policy of its original.
        declared: What the column says of it.
    """
    return manager._engine.prepare_variant(
        source,
        declared.filename,
        declared.digest,
        storage_key=storage_key,
        model_name=column_type.model_name,
        entity_id=entity_id,
        field_name=column_type.field_name,
    )


@traced("derive", subject=2)
async def make_variant(
    manager: StorageManager,
    source: StoredObjectRef,
    prepared: PreparedUpload,
    declared: DeclaredVariant,
    keep: Callable[[StoredObjectRef], None],
) -> None:
    """Make a variant of a stored object, and store it.

    Args:
        manager: The manager.
        source: The original.
        prepared: Where the variant will be.
        declared: What the column says of it, with the recipe that makes it.
        keep: Called with its ref as soon as it is stored: a cancellation that comes then has to find it.

    Raises:
        DerivationRefusedError: The recipe refuses the original.
        DerivationFailedError: The recipe failed, or has returned what cannot be stored.
        StorageError: The original could not be read, or the variant not be stored.
    """
    engine, note = manager._engine, on_original_opened.get()

    def open_original() -> OpeningReader:
        if note is not None:
            note(source.size)
        return engine.open(source, verify=True)

    async with AsyncExitStack() as stack:
        with _recipe_errors(declared):
            derived = await stack.enter_async_context(declared.recipe.make(DerivationSource(source, open_original)))
            try:
                prepared = prepared.derived_as(derived.content_type, derived.filename, derived.media)
            except (InvalidReferenceError, TypeError) as error:
                raise DerivationFailedError(f"the variant {declared.name!r} cannot be stored: {error}") from error
            content: bytes | IO[bytes]
            if isinstance(derived.content, Path):
                content = await _open_file(derived.content, declared)
                closing = asyncio.to_thread(content.close)
                stack.push_async_callback(shielded_cleanup, closing, "closing the file of a variant")
            else:
                content = derived.content
        keep(await engine.put(prepared, content))


@contextmanager
def _recipe_errors(declared: DeclaredVariant) -> Iterator[None]:
    try:
        with contained(f"the recipe of the variant {declared.name!r}"):
            yield
    except UnexpectedExitError as error:
        raise DerivationFailedError(f"the derivation failed: {error}") from error


async def _open_file(path: Path, declared: DeclaredVariant) -> IO[bytes]:
    try:
        return await shielded(asyncio.to_thread(path.open, "rb"), undo=lambda file: asyncio.to_thread(file.close))
    except OSError as error:
        message = f"the derivation failed: the file of the variant {declared.name!r} cannot be read: {error.strerror}"
        raise DerivationFailedError(message) from error
