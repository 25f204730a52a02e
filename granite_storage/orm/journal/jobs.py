"""Jobs: what is still to be done for the object of a row, such as the scan of one that is held, and the worker that does it.

Why it is safe. The flush that brings an object into a row records the job in its own transaction, so none is lost. The worker
finds the rows by the object's location, because a move takes the job along, and scans the object while it holds no lock. Then it
locks those rows, and under their locks each must still hold the object, and be unjudged: a verdict never reaches another file. It
writes the value as it has just read it, with the verdict in place of what it says of the scan, and no other column. The same
transaction deletes the job.

A row that the worker has not found may have moved while it looked. So it deletes the job first, which holds up every flush that
is recording the same job, and then looks once more: where a row holds the object and is unjudged, the transaction is rolled back.

A job belongs to a worker for a lease, which it renews. That only keeps two of them from doing the same work: the second one finds
nothing to write. A failure is an attempt, and the next one comes later, ever more rarely; but an object stays held until it is
judged. A job is dead where more attempts change nothing: its object is missing or damaged though a row refers to it, or it has
killed its workers repeatedly, as with `reclaim`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Insert, Table, bindparam, delete, func, select, tuple_, update
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.postgresql import insert as postgresql_insert

from granite_storage._tasks import background, run_bounded, shielded
from granite_storage.backends.base import SupportsMountCheck
from granite_storage.exceptions import (
    BackendUnavailableError,
    ConfigurationError,
    ContentError,
    ObjectNotFoundError,
    ScannerUnavailableError,
)
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm._util import TRANSLATE_MAP, again_after_deadlock, batches
from granite_storage.orm.columns import location_of, portable_storage_ref_type
from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.deletes import derived_id
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import FailedReclaim, RecoveryReport, clock
from granite_storage.orm.locking import among
from granite_storage.orm.references import as_stored, keeping_other_columns
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.manager import StorageManager
    from granite_storage.orm.discovery import Place

__all__ = ["SCAN", "Jobs", "enqueue_scans", "job_id"]

logger: logging.Logger = logging.getLogger("granite_storage")

SCAN: Final = "scan"
"""The key of the job to scan an object that is held."""

Address: TypeAlias = tuple[str, str]
"""The full name of a table, and the name of a column."""
Holder: TypeAlias = "tuple[Place, Column[Any]]"

_AT_A_TIME = 500
_CONCURRENCY = 2
_LEFT_IN_COMPANY = 2
_RENEWALS = 3
_TRIES = 3
_LONGEST_WAIT = 30.0
"""Seconds that a verdict waits for transactions that have locked the rows of its object; it is tried again later."""
_FIRST_RETRY = 5.0
_PAUSE_FOR_OTHERS = 300.0
_LONGEST_RETRY = 3600.0
_JITTER = 0.25
_MOST_DOUBLINGS = 20
_LONGEST_ERROR = 500
_MOST_REPORTED = 1000


# What a transaction records.


def job_id(backend: str, location: str, key: str) -> UUID:
    """Return the id of a job, a function of its object and of what is to be done: an object has one job of each kind."""
    return derived_id(backend, location, key)


def enqueue_scans(
    connection: Connection, job: Table, held: Iterable[tuple[Column[Any], StoredObjectRef]], options: dict[str, Any]
) -> None:
    """Record in the transaction of a connection the objects to scan; a job that is there is due again, and begins anew.

    The rows are written in the order of their ids, so that transactions that record the same jobs do not deadlock.

    Args:
        connection: The connection.
        job: The journal's table of jobs.
        held: The refs of the objects, each with the column that it is written to.
        options: Execution options that say where the table is.
    """
    rows = {
        job_id(ref.backend, ref.location, SCAN): {
            "table_name": column.table.fullname,
            "column_name": column.name,
            "backend": ref.backend,
            "location": ref.location,
        }
        for column, ref in held
    }
    common = {"key": SCAN, "recipe": "", "due": clock(), "dead": False, **_UNTRIED}
    new = [{"id": item, **rows[item], **common} for item in sorted(rows)]
    for batch in batches(new, _AT_A_TIME):
        connection.execute(_upsert(connection.dialect.name, job, batch), execution_options=options)


def _upsert(dialect: str, job: Table, rows: Sequence[dict[str, Any]]) -> Insert:
    renewed = ("table_name", "column_name", "recipe", "due", "attempts", "takeovers", "dead")
    if dialect == "postgresql":
        new = postgresql_insert(job).values(rows)
        return new.on_conflict_do_update(index_elements=[job.c.id], set_={name: new.excluded[name] for name in renewed})
    inserted = mysql_insert(job).values(rows)
    return inserted.on_duplicate_key_update({name: inserted.inserted[name] for name in renewed})


# What a worker does.


@dataclass(frozen=True, slots=True)
class _Job:
    """A job that this worker has taken over."""

    id: UUID
    address: Address
    backend: str
    location: str
    attempts: int
    takeovers: int


class _StillHeldError(Exception):
    """A row that holds the object unjudged has appeared, so its job stays."""


class Jobs:
    """Takes over jobs and does them.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        manager: Whose backends have the objects, and whose policies have the scanners.
        references: What tells which rows hold an object.
        columns: The columns whose jobs this process does.
        lease: How long a job is this worker's own without renewal.
        max_attempts: After how many deaths of workers that had nothing else in hand a job is dead.
    """

    def __init__(
        self,
        pool: JournalPool,
        tables: JournalTables,
        manager: StorageManager,
        references: References,
        columns: Iterable[Column[Any]],
        *,
        lease: timedelta,
        max_attempts: int,
    ) -> None:
        self._pool = pool
        self._job = tables.job
        self._manager = manager
        self._references = references
        self._addresses = {(column.table.fullname, column.name) for column in columns}
        self._lease = lease.total_seconds()
        self._max_attempts = max_attempts

    async def run(self, backend: str) -> RecoveryReport:
        """Scan what is due on one backend, given by its key; of a column whose scanner is unavailable only the first few."""
        report = RecoveryReport()
        unavailable: set[Address] = set()

        async def work(job: _Job) -> None:
            try:
                judged = await self._scan(job)
            except ScannerUnavailableError:
                unavailable.add(job.address)
            else:
                report.scanned += judged

        for suspected, limit in ((False, _CONCURRENCY), (True, 1)):
            while jobs := await self._claim(backend, limit, unavailable, suspected=suspected):
                await run_bounded(jobs, work, limit)
        return report

    async def count(self, report: RecoveryReport) -> None:
        """Add to a report how many objects are held, and what cannot be scanned."""
        job = self._job
        async with self._pool.reading() as connection:
            counts = select(func.count()).select_from(job).where(job.c.dead.is_(False), job.c.key == SCAN)
            report.held = (await connection.execute(counts)).scalar_one()
            dead = select(job).where(job.c.dead).order_by(job.c.due).limit(_MOST_REPORTED)
            report.failed += [
                FailedReclaim(row.backend, row.location, f"scanning: {row.error}", row.attempts, None)
                for row in await connection.execute(dead)
            ]

    async def retry_dead(self) -> int:
        """Make dead jobs due again; return how many there were."""
        job = self._job
        async with self._pool.reading() as connection:
            result = await connection.execute(update(job).where(job.c.dead).values(**_UNTRIED, dead=False, due=clock()))
        return result.rowcount

    @again_after_deadlock
    async def _claim(self, backend: str, limit: int, without: Collection[Address], *, suspected: bool) -> list[_Job]:
        """Take over jobs that are due.

        Args:
            backend: The backend's key.
            limit: The most jobs.
            without: The columns whose jobs are left alone.
            suspected: Whether to take those over that workers have left repeatedly, or all others.
        """
        job, addresses = self._job, sorted(self._addresses.difference(without))
        if not addresses:
            return []
        was_left = job.c.takeovers >= _LEFT_IN_COMPANY
        due = (
            (job.c.backend == backend)
            & (job.c.due <= clock())
            & job.c.dead.is_(False)
            & (job.c.key == SCAN)
            & tuple_(job.c.table_name, job.c.column_name).in_(addresses)
            & (was_left if suspected else ~was_left)
        )
        async with self._pool.reading() as connection:
            found = select(job).where(due).order_by(job.c.due).limit(limit).with_for_update(skip_locked=True)
            rows = list(await connection.execute(found))
            if rows:
                taken = {"due": clock(self._lease), "takeovers": job.c.takeovers + 1}
                statement = update(job).where(job.c.id == bindparam("mine", type_=job.c.id.type)).values(taken)
                await connection.execute(statement, [{"mine": row.id} for row in rows])
        return [
            _Job(row.id, (row.table_name, row.column_name), row.backend, row.location, row.attempts, row.takeovers + 1)
            for row in rows
        ]

    async def _scan(self, job: _Job) -> int:
        """Have an object scanned, and write the verdict; return how many objects were judged, 0 or 1.

        Raises:
            ScannerUnavailableError: The scanner cannot judge it now; that is noted.
        """
        if job.takeovers > _LEFT_IN_COMPANY + self._max_attempts:
            await self._note(job, f"{job.takeovers - 1} workers have taken it over, and none has come to an end", is_dead=True)
            return 0
        try:
            async with background(self._renew(job)):
                verdict = await self._judge(job)
                async with asyncio.timeout(_LONGEST_WAIT):
                    is_settled = await self._is_settled(job, verdict)
        except TimeoutError:
            await self._note(job, f"other transactions have locked its rows for {_LONGEST_WAIT:g} s")
            return 0
        except (ObjectNotFoundError, ContentError) as error:
            if not await self._is_settled(job, None):
                await self._note(job, _described(error), is_dead=True)
            return 0
        except ConfigurationError as error:
            # Perhaps another process can do it, so the pauses do not grow.
            await self._update_own(job, error=_described(error), due=clock(_PAUSE_FOR_OTHERS), takeovers=0)
            logger.warning("the object %r, which is held, cannot be scanned by this process: %s", job.location, error)
            return 0
        except Exception as error:
            await self._note(job, _described(error))
            if isinstance(error, ScannerUnavailableError):
                raise
            return 0
        if not is_settled:
            await self._update_own(job, due=clock(_FIRST_RETRY), takeovers=0)
            return 0
        if verdict is not None and verdict["status"] == "infected":
            logger.warning(
                "a virus scanner has found %r in the object %r, which is kept and not served",
                verdict.get("signature"),
                job.location,
            )
        return int(verdict is not None)

    async def _judge(self, job: _Job) -> Mapping[str, Any] | None:
        """Return the verdict of the scanner; None where no row holds the object unjudged."""
        async with self._pool.reading() as connection:
            ref = await self._find_held(connection, job)
        if ref is None:
            return None
        backend = self._manager.backend(job.backend)
        try:
            return (await self._manager.scan(ref)).scan
        except ObjectNotFoundError as error:
            if isinstance(backend, SupportsMountCheck) and not await backend.is_mounted():
                raise BackendUnavailableError(f"the folder of the backend {job.backend!r} is not mounted") from error
            raise

    async def _is_settled(self, job: _Job, verdict: Mapping[str, Any] | None) -> bool:
        """Write a verdict, where there is one, and delete the job; return False where it stays, because a row is unjudged."""
        for _ in range(_TRIES):
            try:
                await self._settle(job, verdict)
            except _StillHeldError:
                if verdict is None:
                    return False
            else:
                return True
        return False

    @again_after_deadlock
    async def _settle(self, job: _Job, verdict: Mapping[str, Any] | None) -> None:
        async with self._pool.reading() as connection:
            if verdict is not None:
                for holder in await self._references.find_holders(connection, job.location):
                    await self._write(connection, holder, job, verdict)
            await connection.execute(delete(self._job).where(self._job.c.id == job.id))
            # Only now, when no flush can record the job: a row that another transaction moved was not found above.
            if await self._find_held(connection, job) is not None:
                raise _StillHeldError

    async def _find_held(self, connection: AsyncConnection, job: _Job) -> StoredObjectRef | None:
        """Return the ref of an object, from a row that holds it unjudged."""
        for place, column in await self._references.find_holders(connection, job.location):
            found = select(as_stored(column, connection.dialect)).where(_is_here(place, column, job, connection))
            for (raw,) in await connection.execute(found, execution_options=_options(place, column)):
                if (value := _unjudged(raw, job)) is not None:
                    return StoredObjectRef.from_dict(value)
        return None

    async def _write(self, connection: AsyncConnection, holder: Holder, job: _Job, verdict: Mapping[str, Any]) -> None:
        """Write a verdict into the rows of one column that hold the object unjudged."""
        (place, column), options = holder, _options(*holder)
        table, is_here = column.table, _is_here(place, column, job, connection)
        keys = list(table.primary_key)
        found = await connection.execute(select(*keys).where(is_here).order_by(*keys), execution_options=options)
        # Row by row: on MariaDB a list may lock other rows on the way.
        for primary_key in [tuple(row) for row in found]:
            is_row = among(table, [primary_key]) & is_here
            locked = select(as_stored(column, connection.dialect)).where(is_row).with_for_update(key_share=True)
            for (raw,) in await connection.execute(locked, execution_options=options):
                if (value := _unjudged(raw, job)) is None:
                    continue
                new = bindparam(None, {**value, "scan": dict(verdict)}, type_=portable_storage_ref_type())
                written = update(table).where(is_row).values({column: new, **keeping_other_columns(column)})
                await connection.execute(written, execution_options=options)

    async def _renew(self, job: _Job) -> None:
        """Renew the lease of a job until cancelled."""
        while True:
            await asyncio.sleep(self._lease / _RENEWALS)
            await shielded(self._update_own(job, due=clock(self._lease)))

    async def _note(self, job: _Job, problem: str, *, is_dead: bool = False) -> None:
        """Save why a job has failed, and when it is tried again."""
        attempts = job.attempts + 1
        delay = min(_FIRST_RETRY * 2 ** min(job.attempts, _MOST_DOUBLINGS), _LONGEST_RETRY)
        due = clock(delay * random.uniform(1 - _JITTER, 1))  # noqa: S311  # not a secret
        await self._update_own(job, error=problem, dead=is_dead, due=due, attempts=attempts, takeovers=0)
        told, onward = (logger.error, "a dead letter") if is_dead else (logger.warning, "is tried again")
        told("the object %r, which is held, was not scanned (attempt %d, %s): %s", job.location, attempts, onward, problem)

    async def _update_own(self, job: _Job, **values: Any) -> None:
        """Update a job, unless another worker has taken it over."""
        table = self._job
        is_own = (table.c.id == job.id) & (table.c.attempts == job.attempts) & (table.c.takeovers == job.takeovers)
        async with self._pool.reading() as connection:
            await connection.execute(update(table).where(is_own).values(values))


_UNTRIED = {"attempts": 0, "takeovers": 0}


def _is_here(place: Place, column: Column[Any], job: _Job, connection: AsyncConnection) -> ColumnElement[bool]:
    return location_of(column, connection.dialect.name, is_generated=place.is_generated)[1] == job.location


def _options(place: Place, column: Column[Any]) -> dict[str, Any]:
    """Return the options that lead a statement on a model's table to one schema; not cached, for other maps have other keys."""
    return {TRANSLATE_MAP: {column.table.schema: place.schema}, "compiled_cache": None}


def _unjudged(raw: Any, job: _Job) -> dict[str, Any] | None:
    """Return a value of a column as it is, if it holds the object of a job and says that it is to be judged."""
    try:
        value = json.loads(raw)
    except (TypeError, ValueError):
        return None
    if not isinstance(value, dict) or (value.get("backend"), value.get("location")) != (job.backend, job.location):
        return None
    scan = value.get("scan")
    return value if isinstance(scan, dict) and scan.get("status") == "pending" else None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
