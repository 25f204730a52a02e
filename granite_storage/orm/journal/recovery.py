"""How a worker processes intents that no transaction has consumed: fence, check, delete the object, then delete the entry.

Why it is safe. The fence moves an intent from `intent` to `reclaim` and is committed durably before the storage is changed. From
then on no transaction can consume the intent, so a check for references in a newer snapshot remains valid. Open transactions hold
locks on the rows of their intents; such rows are skipped. An object that a row refers to nevertheless, under any backend key, is
kept. A worker that dies between two steps leaves a row in `reclaim` that any other worker resumes, and each step is idempotent.

Where triggers guard what SQL writes, any pending intent of an object lets it into a row. So a worker that fences one of them
locks all, and fences the uploads among them with it.

SQL can make rows share an object, which is then nominated more than once. A newer intent waits while an older one is fenced. A
slow worker whose row was taken over by another one stops, because the fence that it relies on may have been lifted. So the check
for references also checks, in its own snapshot, that the fenced row still belongs to the worker, and only the last worker of a
row lifts its fence. Deleting an object also deletes its other intents, which would no longer prove that the object exists.

A failed delete counts as an attempt, and after a number of attempts the row becomes a dead letter. A worker that dies or is
overdue has made no attempt; but an object that crashes its workers must not do so forever. So each row counts the workers that
have taken it over without reporting a result. After two of them a row is taken over alone, so that rows next to it stop counting
with it; a row that still exceeds the limit becomes a dead letter as well.

After the delete of an upload, or of an object that a client was to store directly, the row is kept for another lease: an
interrupted request may still reach the server, and the object that it stores is deleted then. Afterwards none can arrive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Insert, Integer, Row, Table, bindparam, delete, func, insert, select, union, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage._tasks import contained, run_bounded
from granite_storage._telemetry import fields_of
from granite_storage.backends.base import SupportsBatchDelete
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm._util import again_after_deadlock, batches, group, try_briefly
from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.deletes import has_own_id, renumber
from granite_storage.orm.journal.jobs import (
    DEADLY,
    FIRST_RETRY,
    LEFT_IN_COMPANY,
    LONGEST_RETRY,
    MOST_REPORTED,
    UNTRIED,
    retry_dead,
    take_over,
)
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import (
    ABORT,
    COMMIT,
    DELETE,
    STAGING,
    UPLOAD,
    FailedReclaim,
    RecoveryReport,
    clock,
    describe_error,
    in_utc,
    moment_in,
)
from granite_storage.orm.journal.triggers import triggers_work

if TYPE_CHECKING:
    from granite_storage.manager import StorageManager


logger: logging.Logger = logging.getLogger("granite_storage")

_BATCH = 100
_LARGE_BATCH = 1000  # as many as one request to S3 deletes
_DELETE_CONCURRENCY = 8
_LONGEST_DELETE = 30.0
"""Seconds."""


class _Reclaim(NamedTuple):
    """A row of `reclaim` that this worker has taken over; up to its due time it has the columns of an intent."""

    id: UUID
    kind: str
    backend: str
    location: str
    upload_id: str | None
    source: str | None
    due: datetime
    attempts: int
    takeovers: int
    emptied: bool


class Recovery:
    """Takes over intents and deletes their objects.

    Args:
        pool: The journal's own connections to the database that has the intents.
        tables: The journal's tables there.
        manager: Whose backends have the objects.
        references: What tells which objects rows refer to.
        lease: How long the row of a deleted upload waits for what may still arrive.
        max_attempts: After how many failures, or deaths of workers that were processing only it, an object is a dead letter.
    """

    def __init__(
        self,
        pool: JournalPool,
        tables: JournalTables,
        manager: StorageManager,
        references: References,
        *,
        lease: timedelta,
        max_attempts: int,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._manager = manager
        self._references = references
        self._lease = lease.total_seconds()
        self._max_attempts = max_attempts
        # How long a row is this worker's own; then another one may resume it.
        self._hold = min(self._lease, 4 * _LONGEST_DELETE)

    async def run(self, backend: str) -> RecoveryReport:
        """Process everything that is due on one backend, given by its key."""
        report, intent = RecoveryReport(), self._tables.intent
        is_due = (intent.c.backend == backend) & (intent.c.due <= clock())
        limit = self._pool.batch_size or (_LARGE_BATCH if self._deletes_in_batches(backend) else _BATCH)
        while True:
            claimed, renumbered = await self._fence(is_due, limit)
            if claimed:
                report.add(await self._process(claimed))
            if len(claimed) < limit and not renumbered:
                break
        while claimed := await self._resume(backend, limit):
            report.add(await self._process(claimed))
        return report

    async def find_overdue(self, backend: str) -> float:
        """Return by how many seconds the oldest object that is to be deleted is overdue; 0 where none is."""
        tables = self._tables.intent, self._tables.reclaim
        dues = [select(func.min(table.c.due)).where(table.c.backend == backend).scalar_subquery() for table in tables]
        async with self._pool.reading() as connection:
            now, *found = (await connection.execute(select(clock(), *dues))).one()
        return max([0.0, *((in_utc(now) - in_utc(due)).total_seconds() for due in found if due is not None)])

    async def settle(self, ids: Sequence[UUID]) -> set[UUID]:
        """Process the intents of an ended transaction at once, by their ids; return those uploads that are locked still.

        Deletes whose retention is not over stay, and so does what a transaction that has not really ended still locks.
        """
        intent = self._tables.intent
        locked: set[UUID] = set()
        for some in batches(ids, self._pool.batch_size or _BATCH):
            among = intent.c.id.in_(some)
            claimed, _ = await self._fence(among & ((intent.c.kind == UPLOAD) | (intent.c.due <= clock())))
            if claimed:
                await self._process(claimed)
            if len(claimed) < len(some):
                async with self._pool.reading() as connection:
                    pending = select(intent.c.id).where(among, intent.c.kind == UPLOAD)
                    locked.update((await connection.execute(pending)).scalars())
        return locked

    async def count_waiting(self, report: RecoveryReport) -> None:
        """Add the counts of what is not due yet to a report."""
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
            troubled = select(reclaim).where(reclaim.c.error.is_not(None)).order_by(reclaim.c.due).limit(MOST_REPORTED)
            report.failed += [_failure(row) for row in await connection.execute(troubled)]
        report.unknown_backends |= await self.unknown_backends()

    async def unknown_backends(self) -> set[str]:
        """Return the backends that the journal names and the manager does not have."""
        named = [select(table.c.backend) for table in (self._tables.intent, self._tables.reclaim, self._tables.job)]
        async with self._pool.reading() as connection:
            return set((await connection.execute(union(*named))).scalars()) - set(self._manager.backends)

    async def retry_dead_letters(self) -> int:
        """Make dead letters due again; return how many there were."""
        return await retry_dead(self._pool, self._tables.reclaim)

    @again_after_deadlock
    async def _fence(self, condition: ColumnElement[bool], limit: int = _BATCH) -> tuple[list[_Reclaim], bool]:
        """Fence intents durably, before their objects are deleted.

        Returns:
            What was taken over, and whether intents of an earlier version were renumbered, which can be taken over now.
        """
        intent, reclaim = self._tables.intent, self._tables.reclaim
        is_fenced = select(reclaim.c.id).where(reclaim.c.id == intent.c.id).exists()
        found = select(intent).where(condition, ~is_fenced).order_by(intent.c.due).limit(limit)
        if not await self._pool.may_find(found):
            return [], False
        async with self._pool.fencing() as connection:
            rows = list(await connection.execute(found.with_for_update(skip_locked=True)))
            outdated = [row for row in rows if has_own_id(row)]
            renumbered = bool(outdated) and await renumber(connection, intent, outdated)
            rows = await self._unfenced(connection, [row for row in rows if row not in outdated])
            if rows and self._have_guards:
                rows = await self._with_evidence(connection, rows)
            if rows and self._pool.is_postgresql:
                rows = await self._undecided(connection, rows)
            if not rows:
                return [], renumbered
            until = await moment_in(connection, self._hold)
            claimed = [_Reclaim._make((*row[:6], until, 0, 1, False)) for row in rows]
            new = [{**item._asdict(), "dead": False} for item in claimed]
            if not await self._put_fences(connection, insert(reclaim), new):
                return [], renumbered
            await self._drop(connection, intent, [item.id for item in claimed])
        return claimed, renumbered

    async def _put_fences(self, connection: AsyncConnection, statement: Insert, rows: Sequence[dict[str, Any]]) -> bool:
        """Insert the fences; return False, with nothing done, if that would wait long for a transaction.

        On MariaDB a trigger that lets a ref in at REPEATABLE READ holds up all fences until its transaction ends. The intents,
        which are locked here, are needed by others: the next pass fences them.
        """
        if self._pool.is_mariadb and triggers_work(self._pool.dialect, self._tables.intent.metadata):
            return await try_briefly(connection, statement, rows) is not None
        await connection.execute(statement, rows)
        return True

    async def _unfenced(self, connection: AsyncConnection, rows: list[Row[Any]]) -> list[Row[Any]]:
        """Return the rows whose ids are not fenced; checked under their locks, so that no other worker can fence them."""
        if not rows:
            return rows
        reclaim = self._tables.reclaim
        fenced = set((await connection.execute(select(reclaim.c.id).where(reclaim.c.id.in_([row.id for row in rows])))).scalars())
        return [row for row in rows if row.id not in fenced]

    @property
    def _have_guards(self) -> bool:
        """Whether triggers let a row in whose object has a pending intent; on SQLite they ask no intents of uploads."""
        return self._pool.uploads is self._pool and triggers_work(self._pool.dialect, self._tables.intent.metadata)

    async def _with_evidence(self, connection: AsyncConnection, rows: list[Row[Any]]) -> list[Row[Any]]:
        """Return the rows of which no transaction has locked another intent, with the uploads that are pending beside them.

        An upload stays pending beside the row that holds it where a session was above READ COMMITTED, or SQL has written it. A
        guard that has locked it has let its object in, though the intent to delete it is of another transaction. It is fenced as
        well, so that a transaction with an older snapshot cannot lock it any more.
        """
        intent = self._tables.intent
        ids = {row.id for row in rows}
        beside = select(intent.c.id, intent.c.location).where(intent.c.location.in_({row.location for row in rows}))
        others = {
            row.id: row.location for row in await connection.execute(beside.where(intent.c.kind != STAGING)) if row.id not in ids
        }
        for row in await self._lock_free(connection, others):
            if row.kind == UPLOAD and row.backend not in self._manager.backends:
                continue
            del others[row.id]
            if row.kind == UPLOAD:
                rows = [*rows, row]
        busy = set(others.values())
        return [row for row in rows if row.location not in busy]

    async def _undecided(self, connection: AsyncConnection, rows: list[Row[Any]]) -> list[Row[Any]]:
        """Decide against uploads that no transaction has decided for; return those that may be fenced.

        An intent whose transaction has decided and committed is finished. One whose transaction is in progress is skipped, and
        so is all else about its object, which the transaction may bring into a row.
        """
        decision = self._tables.decision
        uploads = [row.id for row in rows if row.kind == UPLOAD]
        if not uploads:
            return rows
        earlier = await connection.execute(select(decision.c.id).where(decision.c.id.in_(uploads), decision.c.outcome == COMMIT))
        taken = set(earlier.scalars())
        await self._forget(connection, self._tables.intent, taken)
        ours = await self._decide_against(connection, [item for item in uploads if item not in taken])
        in_progress = {row.location for row in rows if row.kind == UPLOAD and row.id not in ours | taken}
        return [row for row in rows if row.id not in taken and row.location not in in_progress]

    async def _decide_against(self, connection: AsyncConnection, ids: list[UUID]) -> set[UUID]:
        """Insert the decisions that can be inserted without waiting: together, or one by one if one is locked."""
        if not ids:
            return set()
        decided = await self._try_to_decide(connection, ids)
        if decided is not None:
            return decided
        return {item for item in ids if await self._try_to_decide(connection, [item])}

    async def _try_to_decide(self, connection: AsyncConnection, ids: list[UUID]) -> set[UUID] | None:
        decision = self._tables.decision
        new = postgresql_insert(decision).values([{"id": item, "outcome": ABORT} for item in ids])
        result = await try_briefly(connection, new.on_conflict_do_nothing().returning(decision.c.id))
        return None if result is None else set(result.scalars())

    async def _resume(self, backend: str, limit: int) -> list[_Reclaim]:
        """Take over fenced rows that are due: retries, late re-checks, and rows of workers that died."""
        rows = await take_over(self._pool, self._tables.reclaim, backend, limit, self._hold)
        return [_Reclaim._make((*row[:6], until, row.attempts, row.takeovers + 1, row.emptied)) for row, until in rows]

    async def _process(self, claimed: Sequence[_Reclaim]) -> RecoveryReport:
        deadly = [item for item in claimed if item.takeovers > LEFT_IN_COMPANY + self._max_attempts]
        claimed = [item for item in claimed if item not in deadly]
        report = RecoveryReport(claimed=len(claimed), failed=[await self._move_to_dead_letters(item) for item in deadly])
        try:
            own, referenced = await self._check(claimed)
        except Exception:
            # The objects did not cause it, and no worker has died.
            await self._release(claimed)
            raise
        mine = [item for item in claimed if item.id in own]
        held = [item for item in mine if item.location in referenced]
        await self._let_go(held)
        report.kept = len(held)
        gone = [item for item in mine if item.location not in referenced]
        outcomes = await run_bounded(self._in_requests(gone), self._remove, _DELETE_CONCURRENCY)
        errors = {item.id: error for outcome in outcomes for item, error in outcome}
        removed = [item for item in gone if errors[item.id] is None]
        await self._conclude(removed)
        failed = [await self._fail(item, error) for item in gone if (error := errors[item.id]) is not None]
        report.failed += failed
        report.confirmed = sum(item.emptied for item in removed)
        report.deleted = len(removed) - report.confirmed
        return report

    async def _check(self, claimed: Sequence[_Reclaim]) -> tuple[set[UUID], set[str]]:
        """Return which fenced rows still belong to this worker, and which locations rows refer to.

        Both are seen in one snapshot, which is newer than the fence: where a row is still the worker's, its fence has stood from
        then until now, and what no row refers to no row can take any more.
        """
        if not claimed:
            return set(), set()
        taken = {item.id: _token(item) for item in claimed}
        fenced, referenced = await self._references.check(taken, {item.location: item.source for item in claimed})
        return {row.id for row in fenced if taken[row.id] == _token(row)}, referenced

    def _in_requests(self, items: Iterable[_Reclaim]) -> list[list[_Reclaim]]:
        """Group the rows that one request deletes; unfinished uploads are removed one by one."""

        def request(item: _Reclaim) -> str | UUID:
            return item.backend if item.kind == DELETE and self._deletes_in_batches(item.backend) else item.id

        return list(group(items, request).values())

    def _deletes_in_batches(self, backend: str) -> bool:
        return isinstance(self._manager.backends.get(backend), SupportsBatchDelete)

    async def _remove(self, items: Sequence[_Reclaim]) -> list[tuple[_Reclaim, Exception | None]]:
        """Delete objects or unfinished uploads of one backend; return the error of each that failed."""
        engine, backend = self._manager._engine, items[0].backend
        limit = asyncio.timeout(_LONGEST_DELETE)
        try:
            async with limit:
                with contained("the backend"):
                    if items[0].kind == DELETE:
                        failures = await engine.delete_many(backend, [item.location for item in items])
                        return [(item, failures.get(item.location)) for item in items]
                    for item in items:
                        await engine.delete_upload(backend, item.location, item.upload_id if item.kind == UPLOAD else None)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is kept with the row and tried again
            late = TimeoutError(f"the backend {backend!r} took longer than {_LONGEST_DELETE:g} s")
            return [(item, late if limit.expired() else error) for item in items]
        return [(item, None) for item in items]

    @again_after_deadlock
    async def _conclude(self, removed: Sequence[_Reclaim]) -> None:
        """Delete the rows of deleted objects; those of uploads are kept for a re-check, since a request may still arrive.

        Other intents of the same objects go first. One that a transaction has locked, in an undo that will find the fenced
        row, keeps that row until it is free.
        """
        if not removed:
            return
        await self._pool.forget_uploads([item.location for item in removed])
        reclaim = self._tables.reclaim
        async with self._pool.writing() as connection:
            locked = await self._drop_newer(connection, [item.location for item in removed])
            finished = [item for item in removed if item.location not in locked]
            waiting = [item.id for item in finished if item.kind != DELETE and not item.emptied]
            await self._forget(connection, reclaim, [item.id for item in finished if item.id not in waiting])
            if waiting:
                later = {**UNTRIED, "emptied": True, "error": None, "due": clock(self._lease)}
                await connection.execute(update(reclaim).where(reclaim.c.id.in_(waiting)).values(later))
            again = {"due": clock(FIRST_RETRY), "takeovers": reclaim.c.takeovers - 1}
            await self._update_own(connection, [item for item in removed if item.location in locked], **again)

    async def _drop_newer(self, connection: AsyncConnection, locations: Sequence[str]) -> set[str]:
        """Delete pending intents of objects that are gone; return the locations of those that are locked.

        That of an upload may be pending still, where SQL has written the ref into a row and no session has consumed it.
        """
        intent = self._tables.intent
        newer = select(intent.c.id, intent.c.location).where(intent.c.location.in_(locations))
        pending: dict[UUID, str] = {row.id: row.location for row in await connection.execute(newer)}
        free = {row.id for row in await self._lock_free(connection, pending)}
        await self._forget(connection, intent, free)
        return {location for item, location in pending.items() if item not in free}

    async def _lock_free(self, connection: AsyncConnection, ids: Iterable[UUID]) -> list[Row[Any]]:
        """Lock those of some intents that no other transaction has locked, and return them."""
        intent = self._tables.intent
        free: list[Row[Any]] = []
        for item in sorted(ids):  # one by one: a list may lock other rows on MariaDB
            free += await connection.execute(select(intent).where(intent.c.id == item).with_for_update(skip_locked=True))
        return free

    async def _forget(self, connection: AsyncConnection, table: Table, ids: Collection[UUID]) -> None:
        """Delete intents or their reclaims, and what was decided on them."""
        await self._drop(connection, table, ids)
        if self._pool.is_postgresql:
            await self._drop(connection, self._tables.decision, ids)

    @again_after_deadlock
    async def _let_go(self, items: Sequence[_Reclaim]) -> None:
        """Lift the fences of objects that rows refer to, unless another worker has taken the rows over."""
        if not items:
            return
        reclaim, decision = self._tables.reclaim, self._tables.decision
        async with self._pool.writing() as connection:
            await connection.execute(delete(reclaim).where(_is_own(reclaim)), [_own(item) for item in items])
            if self._pool.is_postgresql:
                dropped = decision.c.id.in_([item.id for item in items]) & decision.c.id.not_in(select(reclaim.c.id))
                await connection.execute(delete(decision).where(dropped))

    async def _release(self, items: Sequence[_Reclaim]) -> None:
        """Report that the worker of these rows is alive and releases them.

        The count of takeovers goes back by one. An earlier worker with the same count has taken it over until another moment.
        """
        async with self._pool.writing() as connection:
            await self._update_own(connection, items, takeovers=self._tables.reclaim.c.takeovers - 1)

    async def _update_own(self, connection: AsyncConnection, items: Sequence[_Reclaim], **values: Any) -> None:
        """Update those of the rows that no other worker has taken over."""
        reclaim = self._tables.reclaim
        if items:
            await connection.execute(update(reclaim).where(_is_own(reclaim)).values(values), [_own(item) for item in items])

    async def _move_to_dead_letters(self, item: _Reclaim) -> FailedReclaim:
        """Make dead letters of rows whose workers have died repeatedly."""
        return await self._note(item, DEADLY.format(item.takeovers - 1), attempts=item.attempts, dead=True)

    async def _fail(self, item: _Reclaim, error: Exception) -> FailedReclaim:
        attempts = item.attempts + 1
        problem = describe_error(error)
        return await self._note(item, problem, attempts=attempts, dead=attempts >= self._max_attempts)

    async def _note(self, item: _Reclaim, problem: str, *, attempts: int, dead: bool) -> FailedReclaim:
        """Save the error of a row, and when it is retried."""
        delay = min(FIRST_RETRY * 2 ** max(attempts - 1, 0), LONGEST_RETRY)
        async with self._pool.writing() as connection:
            noted = {"error": problem, "dead": dead, "due": clock(delay), "attempts": attempts, "takeovers": 0}
            await self._update_own(connection, [item], **noted)
        told = logger.error if dead else logger.warning
        last = ", the last" * dead
        told("could not delete the object %r (attempt %d%s): %s", item.location, attempts, last, problem, extra=fields_of(item))
        next_attempt = None if dead else datetime.now(UTC) + timedelta(seconds=delay)
        return FailedReclaim(item.backend, item.location, problem, attempts, next_attempt)

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


def _token(item: _Reclaim | Row[Any]) -> tuple[int, int, datetime]:
    return item.attempts, item.takeovers, item.due


def _own(item: _Reclaim) -> dict[str, Any]:
    return {"own_id": item.id, "own_attempts": item.attempts, "own_takeovers": item.takeovers, "own_due": item.due}


def _is_own(reclaim: Table) -> ColumnElement[bool]:
    """Return the criterion that a worker is the last one to take a row over; see `_own` for the parameters.

    Takeovers are counted from the last attempt on, and for each fence of an object again. So a worker that was overtaken may
    meet its own numbers, but not with the moment until which it has taken the row over: the next takeover is after that, and
    whatever ends the work on a row changes its due time.
    """
    return (
        (reclaim.c.id == bindparam("own_id", type_=reclaim.c.id.type))
        & (reclaim.c.attempts == bindparam("own_attempts", type_=Integer()))
        & (reclaim.c.takeovers == bindparam("own_takeovers", type_=Integer()))
        & (reclaim.c.due == bindparam("own_due", type_=reclaim.c.due.type))
    )


def _failure(row: Row[Any]) -> FailedReclaim:
    return FailedReclaim(row.backend, row.location, row.error, row.attempts, None if row.dead else in_utc(row.due))
