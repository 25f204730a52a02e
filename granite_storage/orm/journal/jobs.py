"""Jobs: what is still to be done for the object of a row, the scan of one that is held or a variant, and the worker that does it.

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

A variant is made in the same way, by the steps of `granite_storage.orm.variants`. It is an object of its own, with an upload
intent that is committed first, and that the transaction consumes which lets the rows have it. So whatever happens in between, the
intent settles the object, and the job is due again. A job belongs to a recipe, by its digest: a process does only those of its
own recipes. A variant that takes the place of another one, of an older recipe, displaces it in the same transaction.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Insert, Row, Table, bindparam, delete, func, select, tuple_, update
from sqlalchemy.dialects.mysql import insert as mysql_insert
from sqlalchemy.dialects.postgresql import insert as postgresql_insert

from granite_storage._logs import fields_of
from granite_storage._tasks import background, run_bounded, shielded, shielded_cleanup
from granite_storage.backends.base import SupportsMountCheck
from granite_storage.derived.processes import in_background
from granite_storage.exceptions import (
    BackendUnavailableError,
    ConfigurationError,
    ContentError,
    DerivationFailedError,
    DerivationRefusedError,
    InfectedObjectError,
    ObjectNotFoundError,
    ScannerUnavailableError,
    ScanPendingError,
    StaleAttachmentError,
)
from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm._util import TRANSLATE_MAP, again_after_deadlock, batches
from granite_storage.orm.columns import AttachmentType, location_of, portable_storage_ref_type
from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.deletes import PendingDelete, derived_id, nominate
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import FailedReclaim, RecoveryReport, clock, describe_error
from granite_storage.orm.locking import among
from granite_storage.orm.references import as_stored, keeping_other_columns
from granite_storage.orm.uploads import make_variant, prepare_variant
from granite_storage.orm.variants import (
    LONGEST_WAIT,
    Holding,
    MadeVariant,
    Which,
    choose_rows,
    entity_of,
    is_kept,
    lock_holdings,
    not_committed,
    read_holdings,
    undeclared_in,
    value_of,
    write_variants,
)
from granite_storage.refs import StoredObjectRef, is_held, require_scanned

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.manager import StorageManager
    from granite_storage.orm._interfaces import ColumnType, DeclaredVariant, Journal
    from granite_storage.orm.discovery import Place

__all__ = [
    "EFFECT",
    "SCAN",
    "Jobs",
    "LeasedJob",
    "NewJob",
    "enqueue_jobs",
    "has_variants",
    "job_id",
    "job_options",
    "job_rows",
    "jobs_of",
    "variant_key",
    "variants_of",
]

logger: logging.Logger = logging.getLogger("granite_storage")

SCAN: Final = "scan"
"""The key of the job to scan an object that is held."""
EFFECT: Final = "effect:"
"""The beginning of the keys of effects' jobs; `granite_storage.orm.journal.effects` has the rest."""
_VARIANT: Final = "variant:"

Address: TypeAlias = tuple[str, str]
"""The full name of a table, and the name of a column."""
Holder: TypeAlias = "tuple[Place, Column[Any]]"

_AT_A_TIME = 500
_CONCURRENCY = 2
_MOST_DERIVATIONS = 5
"""How often a recipe may fail: a file that takes too long or too much memory does so each time, and keeps a process busy."""
_JOBS_AT_A_TIME = 8
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
_MOST_REPORTED = 1000


# What a transaction records.


def variant_key(name: str) -> str:
    """Return the key of the job to make a variant."""
    return f"{_VARIANT}{name}"


def variants_of(column: Column[Any]) -> Mapping[str, DeclaredVariant]:
    """Return the variants that a column declares, by their names."""
    return column.type.variants if isinstance(column.type, AttachmentType) else {}


def has_variants(columns: Iterable[Column[Any]]) -> bool:
    """Return whether a column declares variants."""
    return any(map(variants_of, columns))


def job_place(ref: StoredObjectRef) -> tuple[str, str]:
    """Return the backend and the location of an object."""
    return ref.backend, ref.location


def job_id(backend: str, location: str, key: str) -> UUID:
    """Return the id of a job, a function of its object and of what is to be done: an object has one job of each kind."""
    return derived_id(backend, location, key)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to record.

    Attributes:
        column: The column that the ref of its object is written to.
        ref: The ref.
        key: What is to be done.
        recipe: The digest of the recipe of a variant.
    """

    column: Column[Any]
    ref: StoredObjectRef
    key: str
    recipe: str = ""

    @property
    def id(self) -> UUID:
        """Its id."""
        return job_id(self.ref.backend, self.ref.location, self.key)


def jobs_of(column: Column[Any], ref: StoredObjectRef) -> Iterator[NewJob]:
    """Yield what is to be done for the object of a ref that a transaction writes.

    It is to be scanned if it is held, and the variants are to be made that its column wants of its media type without being
    asked, and that the ref lacks or has by another recipe.
    """
    if is_held(ref):
        yield NewJob(column, ref, SCAN)
    for declared in variants_of(column).values():
        if declared.is_due(ref):
            yield NewJob(column, ref, variant_key(declared.name), declared.digest)


def enqueue_jobs(connection: Connection, job: Table, jobs: Iterable[NewJob], options: dict[str, Any]) -> None:
    """Record jobs in the transaction of a connection; one that is there is due again, and starts over.

    The rows are written in the order of their ids, so that transactions that record the same jobs do not deadlock.

    Args:
        connection: The connection.
        job: The journal's table of jobs.
        jobs: The jobs.
        options: Execution options that say where the table is.
    """
    rows = {
        item.id: {
            "table_name": item.column.table.fullname,
            "column_name": item.column.name,
            "backend": item.ref.backend,
            "location": item.ref.location,
            "key": item.key,
            "recipe": item.recipe,
        }
        for item in jobs
    }
    common = {"due": clock(), "dead": False, **_UNTRIED}
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
    key: str
    recipe: str

    @property
    def place(self) -> tuple[str, str]:
        """The backend and the location of its object."""
        return self.backend, self.location

    @property
    def variant(self) -> str:
        """The name of the variant that is to be made."""
        return self.key.removeprefix(_VARIANT)

    @property
    def what(self) -> str:
        """What is to be done, in messages."""
        if self.key == SCAN:
            return f"scanning the object {self.location!r}, which is held,"
        return f"{_described_key(self.key)} of the object {self.location!r}"


LeasedJob: TypeAlias = _Job


class _StillHeldError(Exception):
    """A row has appeared for which the job is still to be done, so it stays."""


class Jobs:
    """Takes over jobs and does them.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        manager: Whose backends have the objects, and whose policies have the scanners.
        references: What tells which rows hold an object.
        columns: The columns whose jobs this process does.
        journal: The journal, which records uploads.
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
        journal: Journal,
        *,
        lease: timedelta,
        max_attempts: int,
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._job = tables.job
        self._intent = tables.intent
        self._manager = manager
        self._references = references
        self._journal = journal
        columns = list(columns)
        self._addresses = {(column.table.fullname, column.name) for column in columns}
        self._declared = {
            (variant_key(declared.name), declared.digest) for column in columns for declared in variants_of(column).values()
        }
        self._keys_after_scan = {key for key, _ in self._declared}
        self._lease = lease.total_seconds()
        self._max_attempts = max_attempts

    async def run(self, backend: str) -> RecoveryReport:
        """Scan what is due on one backend, given by its key; of a column whose scanner is unavailable only the first few."""
        report = RecoveryReport()
        unavailable: set[Address] = set()
        table = self._job

        async def work(job: _Job) -> None:
            try:
                judged = await self._scan(job)
            except ScannerUnavailableError:
                unavailable.add(job.address)
            else:
                report.scanned += judged

        for suspected, limit in ((False, _CONCURRENCY), (True, 1)):
            while addresses := sorted(self._addresses - unavailable):
                due = (table.c.key == SCAN) & tuple_(table.c.table_name, table.c.column_name).in_(addresses)
                if not (jobs := await self._claim(backend, limit, due, suspected=suspected)):
                    break
                await run_bounded(jobs, work, limit)
        return report

    async def derive(self, backend: str) -> RecoveryReport:
        """Make the variants that are due of objects on one backend, given by its key.

        Only those whose recipes are this process's own: another version of the application may have others.
        """
        report = RecoveryReport()
        if not self._declared:
            return report

        async def work(jobs: Sequence[_Job]) -> None:
            made = await self._derive(jobs)
            report.derived += made

        own = tuple_(self._job.c.key, self._job.c.recipe).in_(sorted(self._declared))
        for suspected, limit in ((False, _JOBS_AT_A_TIME), (True, 1)):
            while jobs := await self._claim(backend, limit, own, suspected=suspected):
                by_object: dict[tuple[str, str], list[_Job]] = {}
                for job in jobs:
                    by_object.setdefault(job.place, []).append(job)
                async with background(*map(self._renew, jobs)):
                    await run_bounded(by_object.values(), work, _CONCURRENCY)
        await self._forget_dead(backend, own)
        return report

    async def make(
        self, column_type: ColumnType, source: StoredObjectRef, declared: DeclaredVariant, *, which: Which = "missing"
    ) -> StoredObjectRef:
        """Make a variant of an object now, and return what the row holds then.

        Raises:
            StaleAttachmentError: No committed row holds the object, or others have locked it for long.
            StorageError: The variant could not be made, or not be stored.
        """
        key = variant_key(declared.name)
        job = _Job(job_id(source.backend, source.location, key), ("", ""), *job_place(source), 0, 0, key, declared.digest)
        holdings, held = await self._look(column_type, job)
        if held is None:
            raise not_committed(source)
        if is_kept(held, declared, which):
            return held
        await self._make_all([job], held, column_type, holdings, raises=True, replaces_same=which == "all")
        _, held = await self._look(column_type, job)
        if held is None or declared.name not in (held.variants or {}):
            raise not_committed(source)
        return held

    async def count(self, report: RecoveryReport) -> None:
        """Add to a report how many objects are held, how many variants are to be made, and what cannot be scanned or made."""
        job = self._job
        async with self._pool.reading() as connection:
            counts = select(job.c.key, func.count()).where(job.c.dead.is_(False)).group_by(job.c.key)
            found: dict[str, int] = {key: count for key, count in await connection.execute(counts)}  # noqa: C416  # rows, not pairs
            report.held = found.pop(SCAN, 0)
            report.pending_effects = sum(count for key, count in found.items() if key.startswith(EFFECT))
            report.underived = sum(found.values()) - report.pending_effects
            dead = select(job).where(job.c.dead).order_by(job.c.due).limit(_MOST_REPORTED)
            report.failed += [
                FailedReclaim(row.backend, row.location, f"{_described_key(row.key)}: {row.error}", row.attempts, None)
                for row in await connection.execute(dead)
            ]

    async def retry_dead(self) -> int:
        """Make dead jobs due again; return how many there were."""
        job = self._job
        async with self._pool.reading() as connection:
            result = await connection.execute(update(job).where(job.c.dead).values(**_UNTRIED, dead=False, due=clock()))
        return result.rowcount

    @again_after_deadlock
    async def _claim(self, backend: str, limit: int, own: ColumnElement[bool], *, suspected: bool) -> list[_Job]:
        """Take over jobs that are due.

        Args:
            backend: The backend's key.
            limit: The most jobs.
            own: Which jobs are meant.
            suspected: Whether to take those over that workers have left repeatedly, or all others.
        """
        job = self._job
        was_left = job.c.takeovers >= _LEFT_IN_COMPANY
        due = (
            (job.c.backend == backend)
            & (job.c.due <= clock())
            & job.c.dead.is_(False)
            & own
            & (was_left if suspected else ~was_left)
        )
        async with self._pool.reading() as connection:
            found = select(job).where(due).order_by(job.c.due).limit(limit).with_for_update(skip_locked=True)
            rows = list(await connection.execute(found))
            if rows:
                taken = {"due": clock(self._lease), "takeovers": job.c.takeovers + 1}
                statement = update(job).where(job.c.id == bindparam("mine", type_=job.c.id.type)).values(taken)
                await connection.execute(statement, [{"mine": row.id} for row in rows])
        return [_job(row, row.takeovers + 1) for row in rows]

    async def _scan(self, job: _Job) -> int:
        """Have an object scanned, and write the verdict; return how many objects were judged, 0 or 1.

        Raises:
            ScannerUnavailableError: The scanner cannot judge it now; that is noted.
        """
        if await self._is_deadly(job):
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
                await self._note(job, describe_error(error), is_dead=True)
            return 0
        except ConfigurationError as error:
            # Perhaps another process can do it, so the pauses do not grow.
            await self._update_own(job, error=describe_error(error), due=clock(_PAUSE_FOR_OTHERS), takeovers=0)
            logger.warning(
                "the object %r, which is held, cannot be scanned by this process: %s", job.location, error, extra=fields_of(job)
            )
            return 0
        except Exception as error:
            await self._note(job, describe_error(error))
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
                extra=fields_of(job),
            )
        elif verdict is not None:
            await self._expedite(job)
        return int(verdict is not None)

    async def _is_deadly(self, job: _Job) -> bool:
        """Make a job dead that has killed too many workers, and return whether it was."""
        if job.takeovers <= _LEFT_IN_COMPANY + self._max_attempts:
            return False
        await self._note(job, f"{job.takeovers - 1} workers have taken it over, and none has come to an end", is_dead=True)
        return True

    async def _expedite(self, scan: _Job) -> None:
        """Let the jobs of an object be due that waited for its scan."""
        job = self._job
        ids = sorted(job_id(scan.backend, scan.location, key) for key in self._keys_after_scan)
        if ids:
            statement = update(job).where(job.c.id == bindparam("mine", type_=job.c.id.type), job.c.dead.is_(False))
            async with self._pool.reading() as connection:
                await connection.execute(statement.values(due=clock()), [{"mine": item} for item in ids])

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

    # The variants.

    async def _derive(self, jobs: Sequence[_Job]) -> int:
        """Make the variants that are due of one object; return how many its rows have got."""
        jobs = [job for job in jobs if not await self._is_deadly(job)]
        if not jobs:
            return 0
        try:
            async with self._pool.reading() as connection:
                holdings = await self._holdings(connection, jobs[0], read_holdings)
            wanted: dict[AttachmentType, tuple[StoredObjectRef, list[_Job]]] = {}
            idle: list[_Job] = []
            for job in jobs:
                if lacking := _lacking(job, holdings):
                    wanted.setdefault(lacking[0].column_type, (lacking[0].ref, []))[1].append(job)
                else:
                    idle.append(job)
            if await self._publish_patiently(idle) is None:
                await self._postpone(idle, _FIRST_RETRY)
            counts = [await self._make_all(some, ref, item, holdings, raises=False) for item, (ref, some) in wanted.items()]
            return sum(counts)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is kept with the jobs
            for job in jobs:
                await self._fail(job, error)
            return 0

    async def drop(self, source: StoredObjectRef, name: str) -> bool:
        """Take a variant out of the rows of its original whose columns do not declare it; return whether one had it.

        Raises:
            StaleAttachmentError: Other transactions have locked the rows for long.
        """
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                return await self._drop(source, name)
        except TimeoutError:
            raise _locked_for_long(source.location) from None

    @again_after_deadlock
    async def _drop(self, source: StoredObjectRef, name: str) -> bool:
        key = variant_key(name)
        job = _Job(job_id(source.backend, source.location, key), ("", ""), *job_place(source), 0, 0, key, "")
        async with self._pool.reading() as connection:
            chosen = undeclared_in(await self._holdings(connection, job, lock_holdings), [name])
            displaced = await connection.run_sync(write_variants, chosen, {})
            await connection.run_sync(nominate, self._intent, self._pending(job, displaced), {})
        return bool(chosen)

    async def _make_all(
        self,
        jobs: Sequence[_Job],
        source: StoredObjectRef,
        column_type: ColumnType,
        holdings: Sequence[Holding],
        *,
        raises: bool,
        replaces_same: bool = False,
    ) -> int:
        """Make variants of one object and let its rows have them; return how many they have got.

        Args:
            jobs: The jobs, or what stands for them.
            source: The original.
            column_type: The column of a row that holds it, and declares the variants.
            holdings: The rows that hold it, as they are before the variants are made.
            raises: Whether to raise what prevents it, rather than to note it with the jobs.
            replaces_same: Whether they take the places of others by the same recipes, too.
        """
        try:
            require_scanned(source)
        except (ScanPendingError, InfectedObjectError) as error:
            if raises:
                raise
            await self._postpone(jobs, _PAUSE_FOR_OTHERS, error)
            return 0
        seen = {job.variant: frozenset(holding.location_of(job.variant) for holding in holdings) for job in jobs}
        entity_id = entity_of(source)
        prepared = {
            job.variant: prepare_variant(
                self._manager, column_type, entity_id, source.location, source.storage_key, column_type.variants[job.variant]
            )
            for job in jobs
        }
        lease = await self._journal.begin_uploads(list(prepared.values()))
        ids = dict(zip(prepared, lease.ids, strict=True))
        made: dict[str, MadeVariant] = {}
        errors: dict[str, Exception] = {}

        async def make(job: _Job) -> None:
            name = job.variant

            def keep(ref: StoredObjectRef) -> None:
                made[name] = MadeVariant(ref, seen[name], replaces_same)

            in_background.set(not raises)
            try:
                lease.begin(ids[name])
                await make_variant(self._manager, source, prepared[name], column_type.variants[name].recipe, keep)
                lease.require()
            except Exception as error:
                late = made.pop(name, None)
                if late is not None and isinstance(error, StaleAttachmentError):
                    # The process was suspended, and a worker may have checked for the object for the last time before it existed.
                    await shielded_cleanup(self._journal.discard(late.ref), "discarding a variant that came after its lease")
                if raises:
                    raise
                errors[name] = error

        try:
            async with background(lease.hold()):
                await run_bounded(jobs, make, _CONCURRENCY)
                published = await self._publish_patiently([job for job in jobs if job.variant in made], made, ids)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                await self._settle_uploads(list(ids.values()))
            raise
        await self._settle_uploads([item for name, item in ids.items() if name not in (published or ())])
        for job in jobs:
            if job.variant in errors:
                await self._fail(job, errors[job.variant])
            elif published is None or job.variant not in published:
                await self._postpone([job], _FIRST_RETRY)  # unless it is gone
        return len(published or ())

    async def _settle_uploads(self, ids: Sequence[UUID]) -> None:
        """Let the journal delete what no row has taken; its worker does it later where that fails."""
        if ids:
            await shielded_cleanup(self._journal.settle(ids), "deleting variants that no row has taken")

    async def _publish_patiently(
        self, jobs: Sequence[_Job], made: Mapping[str, MadeVariant] | None = None, ids: Mapping[str, UUID] | None = None
    ) -> set[str] | None:
        """Do as `_publish`, again where a row has moved meanwhile; None where jobs are still to be done, and nothing has changed.

        Raises:
            StaleAttachmentError: Other transactions have locked the rows for long.
        """
        if not jobs:
            return set()
        for _ in range(_TRIES):
            try:
                async with asyncio.timeout(LONGEST_WAIT):
                    return await self._publish(jobs, made or {}, ids or {})
            except _StillHeldError:
                if not made:
                    return None
            except TimeoutError:
                raise _locked_for_long(jobs[0].location) from None
        return None

    @again_after_deadlock
    async def _publish(self, jobs: Sequence[_Job], made: Mapping[str, MadeVariant], ids: Mapping[str, UUID]) -> set[str]:
        """Set variants in the rows that hold their original, and delete the jobs that are done or have no row any more.

        Args:
            jobs: The jobs of one object.
            made: The variants that are stored.
            ids: The intents of their uploads.

        Returns:
            The names of those that rows have now.
        """
        async with self._pool.reading() as connection:
            holdings = await self._holdings(connection, jobs[0], lock_holdings) if made else []
            chosen = choose_rows(holdings, made)
            for item in sorted(ids[name] for name in chosen):
                consumed = await connection.execute(delete(self._intent).where(self._intent.c.id == item))
                if consumed.rowcount != 1:
                    raise StaleAttachmentError("a variant was reclaimed before its row could take it")
            displaced = await connection.run_sync(write_variants, chosen, made)
            await connection.run_sync(nominate, self._intent, self._pending(jobs[0], displaced), {})
            # What the rows held under its name has changed meanwhile: the job stays.
            overtaken = {job.variant for job in jobs if job.variant in made and _lacking(job, holdings)}.difference(chosen)
            done = sorted((job for job in jobs if job.variant not in overtaken), key=attrgetter("id"))
            for job in done:
                own = (self._job.c.id == job.id) & (self._job.c.recipe == job.recipe)
                await connection.execute(delete(self._job).where(own))
            # Only now, when no flush can record the jobs: a row that another transaction moved was not found above.
            holdings = await self._holdings(connection, jobs[0], read_holdings)
            if any(_lacking(job, holdings) for job in done):
                raise _StillHeldError
        return set(chosen)

    def _pending(self, job: _Job, displaced: Iterable[StoredObjectRef]) -> list[PendingDelete]:
        return [
            PendingDelete(ref.backend, ref.location, self._journal.retention_of(ref).total_seconds(), job.location)
            for ref in displaced
        ]

    async def _holdings(self, connection: AsyncConnection, job: _Job, find: Callable[..., list[Holding]]) -> list[Holding]:
        """Return the rows of attachment columns that hold the object of a job, in every schema."""
        holdings: list[Holding] = []
        for place, column in await self._references.find_holders(connection, job.location):
            if isinstance(column.type, AttachmentType):
                is_here, options = _is_here(place, column, job, connection), _options(place, column)
                holdings += await connection.run_sync(find, column, is_here, job.place, options)
        return holdings

    async def _look(self, column_type: ColumnType, job: _Job) -> tuple[list[Holding], StoredObjectRef | None]:
        """Return the rows that hold the object of a job, and the ref in a row of a column."""
        async with self._pool.reading() as connection:
            holdings = await self._holdings(connection, job, read_holdings)
        return holdings, next((holding.ref for holding in holdings if holding.column is column_type.column), None)

    async def _fail(self, job: _Job, error: Exception) -> None:
        """Note why a variant was not made; it is tried again where that may help, and where a row still lacks it."""
        problem = describe_error(error)
        match error:
            case StaleAttachmentError():
                await self._postpone([job], _FIRST_RETRY, error)
            case ConfigurationError():
                # Perhaps another process can do it, so the pauses do not grow.
                await self._postpone([job], _PAUSE_FOR_OTHERS, error)
                logger.warning("%s cannot be done by this process: %s", job.what, error, extra=fields_of(job))
            case ContentError() | ObjectNotFoundError():
                if await self._publish_patiently([job]) is None:
                    is_refused = isinstance(error, DerivationRefusedError)
                    await self._note(job, problem, is_dead=not await self._is_unmounted(job), is_outcome=is_refused)
            case DerivationFailedError():
                most = min(self._max_attempts, _MOST_DERIVATIONS)
                await self._note(job, problem, is_dead=job.attempts + 1 >= most)
            case _:
                await self._note(job, problem, is_dead=job.attempts + 1 >= self._max_attempts)

    async def _is_unmounted(self, job: _Job) -> bool:
        backend = self._manager.backend(job.backend)
        return isinstance(backend, SupportsMountCheck) and not await backend.is_mounted()

    async def _postpone(self, jobs: Sequence[_Job], seconds: float, error: Exception | None = None) -> None:
        """Let jobs be due later; nothing was attempted."""
        for job in jobs:
            said = {} if error is None else {"error": describe_error(error)}
            await self._update_own(job, due=clock(seconds), takeovers=0, **said)

    async def _forget_dead(self, backend: str, own: ColumnElement[bool]) -> None:
        """Delete dead jobs to make variants of objects that no row holds any more; look again in an hour at the others."""
        job = self._job
        dead = select(job).where(job.c.backend == backend, job.c.dead, job.c.due <= clock(), own).limit(_AT_A_TIME)
        async with self._pool.reading() as connection:
            found = [_job(row, row.takeovers) for row in await connection.execute(dead)]
        for item in found:
            if await self._publish_patiently([item]) is None:
                await self._update_own(item, due=clock(_LONGEST_RETRY))

    async def _renew(self, job: _Job) -> None:
        """Renew the lease of a job until cancelled."""
        while True:
            await asyncio.sleep(self._lease / _RENEWALS)
            await shielded(self._update_own(job, due=clock(self._lease)))

    async def _note(self, job: _Job, problem: str, *, is_dead: bool = False, is_outcome: bool = False) -> None:
        """Save why a job has failed, and when it is tried again; a refusal of a recipe is an outcome, not a fault."""
        attempts = job.attempts + 1
        delay = min(_FIRST_RETRY * 2 ** min(job.attempts, _MOST_DOUBLINGS), _LONGEST_RETRY)
        due = clock(delay * random.uniform(1 - _JITTER, 1))  # noqa: S311  # not a secret
        await self._update_own(job, error=problem, dead=is_dead, due=due, attempts=attempts, takeovers=0)
        told = logger.info if is_outcome else logger.error if is_dead else logger.warning
        onward = "a dead letter" if is_dead else "is tried again"
        told("%s failed (attempt %d, %s): %s", job.what, attempts, onward, problem, extra=fields_of(job))

    async def _update_own(self, job: _Job, **values: Any) -> None:
        """Update a job, unless another worker has taken it over."""
        table = self._job
        is_own = (table.c.id == job.id) & (table.c.attempts == job.attempts) & (table.c.takeovers == job.takeovers)
        async with self._pool.reading() as connection:
            await connection.execute(update(table).where(is_own).values(values))


_UNTRIED = {"attempts": 0, "takeovers": 0}


def _job(row: Row[Any], takeovers: int) -> _Job:
    address = row.table_name, row.column_name
    return _Job(row.id, address, row.backend, row.location, row.attempts, takeovers, row.key, row.recipe)


def _described_key(key: str) -> str:
    if key.startswith(EFFECT):
        return f"the effect {key.removeprefix(EFFECT)!r}"
    return "scanning" if key == SCAN else f"making the variant {key.removeprefix(_VARIANT)!r}"


def _is_here(place: Place, column: Column[Any], job: _Job, connection: AsyncConnection) -> ColumnElement[bool]:
    return location_of(column, connection.dialect.name, is_generated=place.is_generated)[1] == job.location


def _lacking(job: _Job, holdings: Iterable[Holding]) -> list[Holding]:
    """Return the rows that are still to get the variant of a job."""
    return [holding for holding in holdings if holding.wants(job.variant, job.recipe)]


def _options(place: Place, column: Column[Any]) -> dict[str, Any]:
    """Return the options that lead a statement on a model's table to one schema; not cached, for other maps have other keys."""
    return {TRANSLATE_MAP: {column.table.schema: place.schema}, "compiled_cache": None}


def _unjudged(raw: Any, job: _Job) -> dict[str, Any] | None:
    """Return a value of a column as it is, if it holds the object of a job and says that it is to be judged."""
    if (value := value_of(raw, job.place)) is None:
        return None
    scan = value.get("scan")
    return value if isinstance(scan, dict) and scan.get("status") == "pending" else None


def _locked_for_long(location: str) -> StaleAttachmentError:
    return StaleAttachmentError(f"other transactions have locked the rows of the object at {location!r} for {LONGEST_WAIT:g} s")


job_rows = _is_here
job_options = _options
