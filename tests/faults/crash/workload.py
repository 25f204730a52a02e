"""Random transactions: everything that an application may do to attachments, in any order, with any end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from random import Random
from typing import Any

from sqlalchemy import delete, select, type_coerce, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from granite_storage import StoredObjectRef
from granite_storage.exceptions import BackendUnavailableError, ObjectNotFoundError, StaleAttachmentError
from granite_storage.orm import Attachment, StoredObjectRefType
from tests.faults.crash.models import MIB, Place, content_of
from tests.faults.crash.points import MIDDLE, Trap

__all__ = ["EXPECTED", "Workload"]

_BOOKS = 10
_SHELVES = 2
_CHUNK = 32 * 1024
_FILES = ["file", "kept"]

EXPECTED = (
    StaleAttachmentError,  # another transaction or a worker was faster
    ObjectNotFoundError,  # the original of a copy was deleted meanwhile
    BackendUnavailableError,  # an intent waited too long for a gap that MariaDB has locked
    DBAPIError,  # a deadlock, a conflict of snapshots, two rows with one key
    StaleDataError,  # the row was deleted meanwhile
    ObjectDeletedError,
    InvalidRequestError,  # a savepoint that went down with its transaction
)
"""What a transaction may fail with among others that work on the same rows."""


class _ChangeOfMindError(Exception):
    """The application's own error, in the middle of a transaction."""


class Workload:
    """Works on the rows of a place.

    Args:
        place: The place.
        seed: What all that it does follows from, but for the timing.
        trap: Told of the points that are the workload's own.
    """

    def __init__(self, place: Place, seed: str, trap: Trap) -> None:
        self.seed = seed
        self._place = place
        self._models = place.models
        self._random = Random(seed)
        self._trap = trap
        self._numbers = itertools.count()
        self._says: dict[int, tuple[Attachment, str]] = {}
        self._given_up: list[tuple[StoredObjectRef, str]] = []

    async def run(self, more: int | None) -> None:
        """Work until the trap has sprung and so many more transactions are done; for ever, where that is None."""
        while more is None or more > 0:
            if more is not None and self._trap.sprung:
                more -= 1
            try:
                async with asyncio.timeout(self._random.uniform(0, 0.1) if self._random.random() < 0.05 else 60):
                    await self._transaction()
            except (*EXPECTED, _ChangeOfMindError, TimeoutError):
                await asyncio.sleep(0)

    async def _transaction(self) -> None:
        async with self._place.sessions() as session:
            await self._operations(session)
            match self._random.choices(["commit", "rollback", "close", "raise"], [15, 3, 1, 1])[0]:
                case "commit":
                    await session.commit()
                case "rollback":
                    await session.rollback()
                case "raise":
                    raise _ChangeOfMindError

    async def _operations(self, session: AsyncSession, depth: int = 0) -> None:
        for _ in range(self._random.randint(1, 4)):
            if depth < 2 and self._random.random() < 0.2:
                await self._in_savepoint(session, depth)
            else:
                await self._operation(session)
            if self._random.random() < 0.3:
                await session.flush()

    async def _in_savepoint(self, session: AsyncSession, depth: int) -> None:
        async with session.begin_nested() as savepoint:
            await self._operations(session, depth + 1)
            if self._random.random() < 0.4:
                await savepoint.rollback()

    async def _operation(self, session: AsyncSession) -> None:
        operations = {
            self._put: 8,
            self._put_on_shelf: 2,
            self._empty: 2,
            self._delete: 2,
            self._delete_in_bulk: 1,
            self._empty_in_bulk: 1,
            self._swap: 2,
            self._move: 2,
            self._copy: 2,
            self._store_first: 3,
            self._restore: 3,
            self._nominate: 1,
        }
        await self._random.choices(list(operations), list(operations.values()))[0](session)

    async def _put(self, session: AsyncSession) -> None:
        book = await self._book(session)
        self._give(book, self._name(), self._pending())

    async def _put_on_shelf(self, session: AsyncSession) -> None:
        number = self._random.randrange(_SHELVES)
        shelf = await session.get(self._models.Shelf, number)
        if shelf is None:
            shelf = self._models.Shelf(id=number)
            session.add(shelf)
        elif self._random.random() < 0.2:
            await session.delete(shelf)
            return
        else:
            (await self._book(session)).shelf_id = number
        self._give(shelf, "file", self._pending())

    async def _empty(self, session: AsyncSession) -> None:
        self._give(await self._book(session), self._name(), None)

    async def _delete(self, session: AsyncSession) -> None:
        book = await session.get(self._models.Book, self._random.randrange(_BOOKS))
        if book is not None:
            self._note(book)
            await session.delete(book)

    async def _delete_in_bulk(self, session: AsyncSession) -> None:
        await session.execute(delete(self._models.Book).where(self._models.Book.id == self._random.randrange(_BOOKS)))

    async def _empty_in_bulk(self, session: AsyncSession) -> None:
        name = self._name()
        values = {name: None, f"{name}_says": None}
        await session.execute(
            update(self._models.Book).where(self._models.Book.id == self._random.randrange(_BOOKS)).values(values)
        )

    async def _swap(self, session: AsyncSession) -> None:
        book = await self._book(session)
        held = [(book.file, book.file_says), (book.kept, book.kept_says)]
        (book.kept, book.kept_says), (book.file, book.file_says) = held

    async def _move(self, session: AsyncSession) -> None:
        source, target, name = await self._book(session), await self._book(session), self._name()
        if source is not target:
            given = getattr(source, name), getattr(source, f"{name}_says")
            self._give(source, name, None)
            self._give(target, name, given[0], given[1])

    async def _copy(self, session: AsyncSession) -> None:
        source, target, name = await self._book(session), await self._book(session), self._name()
        if source is not target:
            self._give(target, self._name(), getattr(source, name), getattr(source, f"{name}_says"))

    async def _store_first(self, session: AsyncSession) -> None:
        name, pending = self._name(), self._pending()
        says = self._said_of(pending)
        if self._place.setting.is_synchronous:
            stored = await asyncio.to_thread(pending.sync.store, getattr(self._models.Book, name))
        else:
            stored = await pending.store(getattr(self._models.Book, name))
        if self._random.random() < 0.8:
            self._give(await self._book(session), name, stored, says)

    async def _restore(self, session: AsyncSession) -> None:
        if self._given_up:
            ref, says = self._given_up.pop(self._random.randrange(len(self._given_up)))
            if await self._is_held(session, ref):  # a rollback gave it back, and one that is nominated could be restored
                return
            self._give(await self._book(session), "kept", Attachment.restore(ref), says)

    async def _nominate(self, session: AsyncSession) -> None:
        """Nominate an object that a row holds, as a trigger does for a move in two statements: the worker asks first.

        It is nominated under the row's lock, as triggers and the library do it. A transaction that has only read the row may
        nominate what others have deleted since then, and a guard takes a pending intent for evidence.
        """
        book = self._models.Book
        held = select(type_coerce(book.kept, StoredObjectRefType())).where(book.id == self._random.randrange(_BOOKS))
        ref = (await session.execute(held.with_for_update())).scalar_one_or_none()
        if ref is not None:
            connection = await session.connection()
            await connection.run_sync(lambda it: self._place.journal.intents.displace(it, [(ref, timedelta(0))]))

    async def _is_held(self, session: AsyncSession, ref: StoredObjectRef) -> bool:
        held = await session.execute(
            select(*(type_coerce(getattr(self._models.Book, name), StoredObjectRefType()) for name in _FILES))
        )
        return ref.location in {found.location for row in held for found in row if found is not None}

    async def _book(self, session: AsyncSession) -> Any:
        number = self._random.randrange(_BOOKS)
        book = await session.get(self._models.Book, number)
        if book is None or book in session.deleted:
            book = (await session.scalars(select(self._models.Book).where(self._models.Book.id == number))).one_or_none()
        if book is None:
            book = self._models.Book(id=number)
            session.add(book)
        return book

    def _give(self, row: Any, name: str, value: Any, says: str | None = None) -> None:
        if isinstance(row, self._models.Book):
            self._note(row)
        setattr(row, name, value)
        setattr(row, f"{name}_says", self._said_of(value) if says is None else says)

    def _note(self, book: Any) -> None:
        """Remember what is kept for a while when a book gives it up, to restore it later."""
        if book.kept is not None and not book.kept.is_pending and book.kept_says is not None:
            self._given_up = [*self._given_up[-5:], (book.kept.ref, book.kept_says)]

    def _name(self) -> str:
        return self._random.choice(_FILES)

    def _pending(self) -> Any:
        says = f"{self.seed}-{next(self._numbers)}-{self._size()}"
        content = content_of(says)
        streamed = len(content) > _CHUNK or self._random.random() < 0.3
        chunks = self._chunks_in_thread if self._place.setting.is_synchronous else self._chunks
        attachment = Attachment(chunks(content) if streamed else content, filename="file.bin")
        self._says[id(attachment)] = attachment, says
        return attachment

    def _said_of(self, attachment: Attachment | None) -> str | None:
        """Return what the content of an attachment was made of, as far as this workload has made it."""
        return self._says.get(id(attachment), (attachment, None))[1]

    def _size(self) -> int:
        kind = self._random.random()
        if kind < 0.7:
            return self._random.randrange(3000)
        if kind < 0.9 or self._place.setting.is_local:
            return self._random.randrange(300_000)
        return self._random.randrange(5 * MIB, 11 * MIB)

    async def _chunks(self, content: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(content), _CHUNK):
            if start:
                self._trap.reach(MIDDLE)
                await asyncio.sleep(self._place.setting.lease / 2 if self._random.random() < 0.03 else 0)
            yield content[start : start + _CHUNK]

    def _chunks_in_thread(self, content: bytes) -> Iterator[bytes]:
        for start in range(0, len(content), _CHUNK):
            if start:
                self._trap.reach(MIDDLE)
                time.sleep(self._place.setting.lease / 2 if self._random.random() < 0.03 else 0)
            yield content[start : start + _CHUNK]
