"""What a worker does with intents that nobody took back: fence, look, delete, and only then forget.

Why it is safe. The fence moves an intent from `intent` to `reclaim` and is committed, durably, before storage is touched: from
then on no transaction can take the object any more, so what the worker sees afterwards, in a snapshot that is newer than the
fence, stays true. Transactions that are under way hold locks on their intents' rows, and those are skipped, not waited for. An
object that a row refers to all the same is kept. Whoever dies between two steps leaves a row in `reclaim` that any other worker
resumes, and each step may be done twice.

A delete that fails is an attempt, and so many attempts make a dead letter. A worker that dies, or that is slower than others have
patience, has tried nothing; but an object that kills whoever touches it must not do so for ever. So each row counts the workers
that have taken it over and have not said how it went. Whatever has been left twice is taken over alone from then on, so that the
counts of its neighbours end with theirs; and what is still left time after time is a dead letter as well.

After the delete of an upload, or of what a client was to store by itself, its row stays for another lease, empty: a request that
was cut off may still arrive at the server, and what it stores is deleted then. Afterwards nothing can arrive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, bindparam, delete, func, insert, select, text, union, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.orm.held import find_held
from granite_storage.orm.journal.deadlocks import again_after_deadlock, code_of
from granite_storage.orm.journal.pool import JournalPool
from granite_storage.orm.journal.report import FailedReclaim, RecoveryReport
from granite_storage.orm.journal.tables import ABORT, COMMIT, DELETE, UPLOAD, JournalTables, clock

if TYPE_CHECKING:
    from sqlalchemy import Column, Table

    from granite_storage.manager import StorageManager

__all__ = ["Recovery"]

logger: logging.Logger = logging.getLogger("granite_storage")

_BATCH = 100
_DELETES_AT_A_TIME = 8
_LOCK_NOT_AVAILABLE = "55P03"
_LOCK_TIMEOUT = "SET LOCAL lock_timeout = '250ms'"
_LEFT_IN_COMPANY = 2
_FIRST_RETRY = 5.0
_LONGEST_RETRY = 3600.0
_LONGEST_ERROR = 500
_MOST_REPORTED = 1000


@dataclass(frozen=True, slots=True)
class _Reclaim:
    """A row of `reclaim` that this worker has taken over."""

    id: UUID
    kind: str
    backend: str
    location: str
    upload_id: str | None
    attempts: int
    takeovers: int
    emptied: bool


class Recovery:
    """Takes over intents and deletes their objects.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        manager: Whose backends have the objects.
        lease: How long the row of a deleted upload waits for what may still arrive.
        max_attempts: After how many failures, or deaths of workers that had nothing else in hand, an object is a dead letter.
        timeout: The longest that one delete may take, in seconds.
    """

    def __init__(
        self,
        pool: JournalPool,
        tables: JournalTables,
        manager: StorageManager,
        *,
        lease: timedelta,
        max_attempts: int,
        timeout: float,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._manager = manager
        self._lease = lease.total_seconds()
        self._max_attempts = max_attempts
        self._timeout = timeout
        # How long a row is this worker's own; then another one may resume it.
        self._hold = min(self._lease, 4 * timeout)

    async def run(self, backend: str, columns: Sequence[Column[Any]]) -> RecoveryReport:
        """Do all that is due on one backend.

        Args:
            backend: The backend's key.
            columns: Every column that may refer to an object.
        """
        report = RecoveryReport()
        while True:
            claimed = await self._fence(self._is_due(backend))
            if len(claimed) < _BATCH:
                claimed += await self._resume(backend, _BATCH - len(claimed))
            if claimed:
                report.add(await self._process(claimed, columns))
            if len(claimed) < _BATCH:
                break
        while suspects := await self._resume(backend, 1, suspected=True):
            report.add(await self._process(suspects, columns))
        return report

    async def settle(self, ids: Sequence[UUID], columns: Sequence[Column[Any]]) -> RecoveryReport:
        """Do at once what the end of a transaction has made due: its own intents, by their ids, and no others.

        Deletes whose retention is not over stay, and so does what a transaction that has not really ended still locks.
        """
        intent = self._tables.intent
        report = RecoveryReport()
        for start in range(0, len(ids), _BATCH):
            among = intent.c.id.in_(ids[start : start + _BATCH])
            claimed = await self._fence(among & ((intent.c.kind == UPLOAD) | (intent.c.due <= clock())))
            if claimed:
                report.add(await self._process(claimed, columns))
        return report

    async def count_waiting(self, report: RecoveryReport) -> None:
        """Complete a report with what is not due yet."""
        intent, reclaim = self._tables.intent, self._tables.reclaim
        async with self._pool.reading() as connection:
            counts = select(intent.c.kind, intent.c.backend, func.count()).group_by(intent.c.kind, intent.c.backend)
            for kind, backend, count in await connection.execute(counts):
                if backend not in self._manager.backends:
                    continue
                if kind != DELETE:
                    report.leased += count
                else:
                    report.waiting += count
            troubled = select(reclaim).where(reclaim.c.error.is_not(None)).order_by(reclaim.c.due).limit(_MOST_REPORTED)
            report.failed = [_failure(row) for row in await connection.execute(troubled)]
        report.unknown_backends = await self.unknown_backends()

    async def unknown_backends(self) -> set[str]:
        """Return the backends that rows of the journal name, fenced or not, and the manager does not have."""
        named = [select(table.c.backend) for table in (self._tables.intent, self._tables.reclaim)]
        async with self._pool.reading() as connection:
            return set((await connection.execute(union(*named))).scalars()) - set(self._manager.backends)

    async def revive(self) -> int:
        """Let dead letters be tried again; return how many there were."""
        reclaim = self._tables.reclaim
        async with self._pool.durable() as connection:
            result = await connection.execute(update(reclaim).where(reclaim.c.dead).values(**_UNTRIED, dead=False, due=clock()))
        return result.rowcount

    def _is_due(self, backend: str) -> ColumnElement[bool]:
        intent = self._tables.intent
        return (intent.c.backend == backend) & (intent.c.due <= clock())

    @again_after_deadlock
    async def _fence(self, condition: ColumnElement[bool]) -> list[_Reclaim]:
        """Take intents over, durably, before anything is done about their objects."""
        intent, reclaim = self._tables.intent, self._tables.reclaim
        async with self._pool.durable() as connection:
            found = select(intent).where(condition).order_by(intent.c.due).limit(_BATCH).with_for_update(skip_locked=True)
            rows = list(await connection.execute(found))
            if rows and self._pool.is_postgresql:
                rows = await self._undecided(connection, rows)
            if not rows:
                return []
            claimed = [_Reclaim(row.id, row.kind, row.backend, row.location, row.upload_id, 0, 1, False) for row in rows]
            new = [
                {
                    "id": item.id,
                    "kind": item.kind,
                    "backend": item.backend,
                    "location": item.location,
                    "upload_id": item.upload_id,
                    "due": clock(self._hold),
                    "attempts": 0,
                    "takeovers": 1,
                    "emptied": False,
                    "dead": False,
                }
                for item in claimed
            ]
            await connection.execute(insert(reclaim).values(new))
            await self._drop(connection, intent, [item.id for item in claimed])
        return claimed

    async def _undecided(self, connection: AsyncConnection, rows: list[Row[Any]]) -> list[Row[Any]]:
        """Decide against uploads, where no transaction was first to decide for them; return what may be fenced.

        An intent whose transaction has decided and committed is done with. One whose transaction is under way is left alone.
        """
        decision = self._tables.decision
        uploads = [row.id for row in rows if row.kind == UPLOAD]
        if not uploads:
            return rows
        earlier = await connection.execute(select(decision.c.id).where(decision.c.id.in_(uploads), decision.c.outcome == COMMIT))
        taken = set(earlier.scalars())
        await self._drop(connection, self._tables.intent, taken)
        await self._drop(connection, decision, taken)
        ours = await self._decide_against(connection, [item for item in uploads if item not in taken])
        return [row for row in rows if row.kind != UPLOAD or row.id in ours]

    async def _decide_against(self, connection: AsyncConnection, ids: list[UUID]) -> set[UUID]:
        """Insert the decisions that can be inserted at once: first together, and one by one where one is locked."""
        if not ids:
            return set()
        await connection.execute(text(_LOCK_TIMEOUT))
        decided = await self._try_to_decide(connection, ids)
        if decided is not None:
            return decided
        return {item for item in ids if await self._try_to_decide(connection, [item])}

    async def _try_to_decide(self, connection: AsyncConnection, ids: list[UUID]) -> set[UUID] | None:
        decision = self._tables.decision
        new = postgresql_insert(decision).values([{"id": item, "outcome": ABORT} for item in ids])
        try:
            async with connection.begin_nested():
                result = await connection.execute(new.on_conflict_do_nothing().returning(decision.c.id))
                return set(result.scalars())
        except DBAPIError as error:
            if code_of(error) == _LOCK_NOT_AVAILABLE:
                return None
            raise

    @again_after_deadlock
    async def _resume(self, backend: str, limit: int, *, suspected: bool = False) -> list[_Reclaim]:
        """Take over what is fenced and due: retries, late looks, and what a worker that died has left.

        Args:
            backend: The backend's key.
            limit: The most rows.
            suspected: Whether to take those over that have been left repeatedly, or all others.
        """
        reclaim = self._tables.reclaim
        left = reclaim.c.takeovers >= _LEFT_IN_COMPANY
        due = (
            (reclaim.c.backend == backend)
            & (reclaim.c.due <= clock())
            & reclaim.c.dead.is_(False)
            & (left if suspected else ~left)
        )
        async with self._pool.reading() as connection:
            found = select(reclaim).where(due).order_by(reclaim.c.due).limit(limit).with_for_update(skip_locked=True)
            rows = list(await connection.execute(found))
            if rows:
                mine = reclaim.c.id.in_([row.id for row in rows])
                taken = {"due": clock(self._hold), "takeovers": reclaim.c.takeovers + 1}
                await connection.execute(update(reclaim).where(mine).values(taken))
        return [
            _Reclaim(row.id, row.kind, row.backend, row.location, row.upload_id, row.attempts, row.takeovers + 1, row.emptied)
            for row in rows
        ]

    async def _process(self, claimed: Sequence[_Reclaim], columns: Sequence[Column[Any]]) -> RecoveryReport:
        deadly = [item for item in claimed if item.takeovers > _LEFT_IN_COMPANY + self._max_attempts]
        claimed = [item for item in claimed if item not in deadly]
        report = RecoveryReport(claimed=len(claimed), failed=[await self._bury(item) for item in deadly])
        try:
            referenced = await self._referenced(claimed, columns)
        except Exception:
            # It is not the objects' fault, and nobody has died.
            await self._release(claimed)
            raise
        held = [item for item in claimed if (item.backend, item.location) in referenced]
        await self._forget(held)
        report.kept = len(held)
        places = asyncio.Semaphore(_DELETES_AT_A_TIME)
        gone = [item for item in claimed if (item.backend, item.location) not in referenced]
        errors = await asyncio.gather(*(self._remove(item, places) for item in gone))
        removed = [item for item, error in zip(gone, errors, strict=True) if error is None]
        await self._conclude(removed)
        report.failed += [await self._fail(item, error) for item, error in zip(gone, errors, strict=True) if error is not None]
        report.confirmed = sum(item.emptied for item in removed)
        report.deleted = len(removed) - report.confirmed
        return report

    async def _referenced(self, claimed: Sequence[_Reclaim], columns: Sequence[Column[Any]]) -> set[tuple[str, str]]:
        """Return which objects a row refers to, in a snapshot that is newer than the fence."""
        if not columns or not claimed:
            return set()
        wanted = sorted({item.location for item in claimed})
        async with self._pool.reading() as connection:
            return await find_held(connection, columns, wanted)

    async def _remove(self, item: _Reclaim, places: asyncio.Semaphore) -> Exception | None:
        """Delete an object and what an unfinished upload has left; return what went wrong."""
        async with places:
            try:
                async with asyncio.timeout(self._timeout):
                    upload_id = item.upload_id if item.kind == UPLOAD else None
                    await self._manager.reclaim(item.backend, item.location, upload_id=upload_id, unfinished=item.kind != DELETE)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is kept with the row and tried again
                return error
        return None

    @again_after_deadlock
    async def _conclude(self, removed: Sequence[_Reclaim]) -> None:
        """Forget what is gone for good; of an upload something may still arrive, so look there once more when none can."""
        waiting = [item.id for item in removed if item.kind != DELETE and not item.emptied]
        await self._forget([item for item in removed if item.id not in waiting])
        if waiting:
            reclaim = self._tables.reclaim
            later = {**_UNTRIED, "emptied": True, "error": None, "due": clock(self._lease)}
            async with self._pool.reading() as connection:
                await connection.execute(update(reclaim).where(reclaim.c.id.in_(waiting)).values(later))

    @again_after_deadlock
    async def _forget(self, items: Sequence[_Reclaim]) -> None:
        if not items:
            return
        async with self._pool.reading() as connection:
            ids = [item.id for item in items]
            await self._drop(connection, self._tables.reclaim, ids)
            if self._pool.is_postgresql:
                await self._drop(connection, self._tables.decision, ids)

    async def _release(self, items: Sequence[_Reclaim]) -> None:
        """Say of rows that whoever has taken them over is alive."""
        reclaim = self._tables.reclaim
        async with self._pool.reading() as connection:
            await connection.execute(update(reclaim).where(reclaim.c.id.in_([item.id for item in items])).values(takeovers=0))

    async def _bury(self, item: _Reclaim) -> FailedReclaim:
        """Make a dead letter of what every worker has died of."""
        return await self._note(item, f"{item.takeovers - 1} workers have taken it over, and none has come to an end", dead=True)

    async def _fail(self, item: _Reclaim, error: Exception) -> FailedReclaim:
        tried = replace(item, attempts=item.attempts + 1)
        return await self._note(tried, f"{type(error).__name__}: {error}", dead=tried.attempts >= self._max_attempts)

    async def _note(self, item: _Reclaim, problem: str, *, dead: bool) -> FailedReclaim:
        """Keep with a row what went wrong, and when it is tried again."""
        reclaim = self._tables.reclaim
        delay = min(_FIRST_RETRY * 2 ** max(item.attempts - 1, 0), _LONGEST_RETRY)
        said = problem[:_LONGEST_ERROR]
        noted = {"error": said, "dead": dead, "due": clock(delay), "attempts": item.attempts, "takeovers": 0}
        async with self._pool.reading() as connection:
            await connection.execute(update(reclaim).where(reclaim.c.id == item.id).values(noted))
        told = logger.error if dead else logger.warning
        told("could not delete the object %r (attempt %d%s): %s", item.location, item.attempts, ", the last" * dead, said)
        next_attempt = None if dead else datetime.now(UTC) + timedelta(seconds=delay)
        return FailedReclaim(item.backend, item.location, said, item.attempts, next_attempt)

    async def _drop(self, connection: AsyncConnection, table: Table, ids: Iterable[UUID]) -> None:
        wanted = list(ids)
        if not wanted:
            return
        if self._pool.is_postgresql:
            await connection.execute(delete(table).where(table.c.id.in_(wanted)))
        else:  # a list may be looked for in the whole table there, whose other rows are locked on the way
            await connection.execute(
                delete(table).where(table.c.id == bindparam("wanted")), [{"wanted": item} for item in wanted]
            )


_UNTRIED = {"attempts": 0, "takeovers": 0}


def _failure(row: Row[Any]) -> FailedReclaim:
    due = row.due if row.due.tzinfo is not None else row.due.replace(tzinfo=UTC)
    return FailedReclaim(row.backend, row.location, row.error, row.attempts, None if row.dead else due)
