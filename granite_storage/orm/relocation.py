"""Moving the object that a row holds to another backend, while the application goes on: copy, swap, and only then let go.

The copy is an upload like any other, with an intent where there is a journal. The swap is one transaction: an UPDATE that hits
only where the column still holds, to the letter, what was copied; the copy's intent taken back; and the old object displaced, as
by a replacement. How the transaction ends decides what goes, by the same hooks: committed, the old object; rolled back, or the
row no longer what it was, the copy; unknown, neither.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    LargeBinary,
    Text,
    Update,
    bindparam,
    cast,
    update,
)
from sqlalchemy.orm import Session

from granite_storage._tasks import finish
from granite_storage.locations import matches_generated_name, uuid7_hex
from granite_storage.orm import flush, transactions
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.journal.entries import write_displaced
from granite_storage.orm.locking import HeldRef, among
from granite_storage.orm.removal import remove
from granite_storage.orm.scanning import HeldValue, as_stored
from granite_storage.orm.sharing import refers
from granite_storage.orm.types import AttachmentType, StoredObjectRefType
from granite_storage.orm.unit_of_work import StoredObject
from granite_storage.orm.uploads import Upload, store, stored_object
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from granite_storage.manager import ObjectDraft
    from granite_storage.orm.binding import StorageBinding
    from granite_storage.readers import StoredObjectReader

__all__ = ["Paced", "relocate"]

Paced = Callable[["StoredObjectReader"], AsyncGenerator[bytes, None]]


async def relocate(binding: StorageBinding, held: HeldValue, *, paced: Paced, is_shared: bool) -> bool:
    """Copy the object of an attachment column to where its policy writes now, and let the row refer to the copy.

    Args:
        binding: The binding in force for the base.
        held: What the column holds.
        paced: What the bytes pass through on their way.
        is_shared: Whether another value refers to the same object, as only SQL past the library can bring about; then the object
            goes with the last one.

    Returns:
        Whether the row refers to the copy now; False where a writer was faster, and then nothing is left of the copy.

    Raises:
        StorageError: The object could not be copied, or is not what its ref says; nothing is left of the copy.
        SQLAlchemyError: The database refused the swap; nothing is left of the copy, except where nobody knows whether it has
            committed: then both objects stay, for the journal or the garbage collector.
    """
    home = held.column.type
    if binding.sessions is None or not isinstance(home, AttachmentType) or held.ref is None:
        raise TypeError("only what an attachment column holds can be relocated, through a binding with sessions")
    copy = _Relocated(held.ref, held, paced)
    await store([Upload(copy, home, "")])
    swap = _Swap(held, held.ref, copy, is_shared=is_shared)
    try:
        async with binding.sessions() as session:
            return await _committed(session, swap)
    finally:
        if not swap.is_told:
            await finish(_abandoned(copy), "deleting a copy that its row could not be told of")


async def _committed(session: AsyncSession, swap: _Swap) -> bool:
    if await session.run_sync(swap):
        await session.commit()
        return True
    await session.rollback()
    return False


async def _abandoned(copy: _Relocated) -> None:
    stored = stored_object(copy)
    await remove([stored] if stored.intent is None else [], [] if stored.intent is None else [stored.intent])


class _Relocated(Attachment):
    """A pending attachment that becomes a copy of what a row holds, on the backend that its policy names now."""

    def __init__(self, original: StoredObjectRef, held: HeldValue, paced: Paced) -> None:
        self._original = original
        self._held = held
        self._paced = paced

    def _draft(self, home: AttachmentType, entity_id: str) -> ObjectDraft:
        """Decide where the copy will be: below the same names, and whatever its size, for it was let in once."""
        draft = home.binding().manager.draft_copy(self._original, **_names_of(self._held, self._original))
        return replace(draft, policy=replace(draft.policy, max_size=None))

    async def _put(self, home: AttachmentType, draft: ObjectDraft) -> None:
        manager = home.binding().manager
        async with manager.open(self._original, verify=True) as reader, aclosing(self._paced(reader)) as chunks:
            copy = await manager.put_draft(draft, chunks)
        self._ref, self._home = _with_history_of(self._original, copy), home


def _with_history_of(original: StoredObjectRef, copy: StoredObjectRef) -> StoredObjectRef:
    """Return the copy's ref with what the original's says of the file: its name, its age, and what newer versions wrote."""
    moved = {"backend": copy.backend, "location": copy.location, "size": copy.size, "checksum": copy.checksum}
    ref = StoredObjectRef.from_dict({**original.to_dict(), **moved, "extra": copy.to_dict()["extra"]})
    return ref.with_identity(copy.identity)


def _names_of(held: HeldValue, ref: StoredObjectRef) -> dict[str, Any]:
    """Return the segments of the copy's location: those of the original, where they are of our own making."""
    segments = ref.location.split("/")
    if matches_generated_name(ref.location) and len(segments) > 3:
        return dict(zip(("model_name", "entity_id", "field_name"), segments[-4:-1], strict=True))
    return {"model_name": str(held.table.name), "entity_id": uuid7_hex(), "field_name": str(held.column.name)}


class _Swap:
    """The statements of the transaction that lets a row refer to the copy; run inside a session."""

    def __init__(self, held: HeldValue, original: StoredObjectRef, copy: _Relocated, *, is_shared: bool) -> None:
        self._held = held
        self._original = original
        self._copy = copy
        self._is_shared = is_shared
        self.is_told = False

    def __call__(self, session: Session) -> bool:
        held = self._held
        connection = session.connection(bind_arguments={"clause": held.table})
        transactions.require_transactions(connection)
        transactions.watch(session, connection)
        frame = transactions.unit_of(session).frame(flush.boundary(session))
        stored = stored_object(self._copy)
        frame.puts.append((stored, self._copy))
        self.is_told = True
        if connection.execute(_compare_and_set(held, self._copy.ref, connection)).rowcount != 1:
            return False
        frame.log.append((stored, True))
        self._take_intent(connection, stored)
        if not (self._is_shared and self._is_referred_to(connection)):
            original = HeldRef(held.table, held.primary_key, held.column, self._original)
            write_displaced(connection, flush.displace(frame, [original]))
        return True

    def _take_intent(self, connection: Connection, stored: StoredObject) -> None:
        if stored.intent is not None:
            stored.intent.journal.intents.consume(connection, [stored.intent.id])

    def _is_referred_to(self, connection: Connection) -> bool:
        """Tell whether another value still refers to the original, under whatever backend's key."""
        home: AttachmentType = self._held.column.type  # type: ignore[assignment]  # nothing else is relocated
        return any(refers(connection, column, self._original) for column in home.binding().ref_columns())


def _compare_and_set(held: HeldValue, ref: StoredObjectRef, connection: Connection) -> Update:
    """Return an UPDATE that hits only what still holds the very same value; nobody's "changed at" is told of it."""
    table = held.table
    kept = {column: column for column in table.columns if _changes_by_itself(column) and column is not held.column}
    statement = update(table).where(among(table, [held.primary_key]), _still_holds(held, connection))
    return statement.values({held.column: bindparam(None, ref, type_=StoredObjectRefType()), **kept})


def _changes_by_itself(column: Column[Any]) -> bool:
    return column.computed is None and (column.onupdate is not None or column.server_onupdate is not None)


def _still_holds(held: HeldValue, connection: Connection) -> ColumnElement[bool]:
    """Compare with what was read: PostgreSQL prints the same JSON the same way; the others keep the text, whose bytes count."""
    stored, read = as_stored(held.column, connection.dialect), bindparam(None, held.raw, type_=Text())
    if connection.dialect.name in ("postgresql", "sqlite"):
        return stored == read
    return cast(stored, LargeBinary) == cast(read, LargeBinary)
