"""The queue of jobs: what is still to be done for the files of committed rows, and how a worker takes it over.

The flush that brings a file into a row records the jobs in its own transaction, so none is lost: a file that is held is to be
scanned (`granite_storage.orm.journal.scans`), variants are to be made (`granite_storage.orm.journal.variant_jobs`), and effects
to be called (`granite_storage.orm.journal.effects`).

A job belongs to a worker for a lease, which it renews. That only keeps two of them from doing the same work: the second one finds
nothing to write. A failure is an attempt, and the next one comes later, ever more rarely. A job is dead where more attempts
change nothing: its object is missing or damaged though a row refers to it, or it has killed its workers repeatedly, as with
`reclaim`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, Insert, Row, Select, Table, bindparam, func, select, update

from granite_storage._tasks import contained, shielded
from granite_storage._telemetry import fields_of
from granite_storage.backends.base import SupportsMountCheck
from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.orm._interfaces import DeclaredVariant, Journal
from granite_storage.orm._util import TRANSLATE_MAP, again_after_deadlock, batches, upsert_rows
from granite_storage.orm.columns import AttachmentType, location_of
from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.deletes import derived_id
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import REFUSED, FailedReclaim, RecoveryReport, clock, describe_error, moment_in
from granite_storage.refs import StoredObjectRef, is_held

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.derived.base import Effect
    from granite_storage.manager import StorageManager
    from granite_storage.orm.locking import Place
    from granite_storage.orm.variants import Holding


logger: logging.Logger = logging.getLogger("granite_storage")

SCAN: Final = "scan"
"""The key of the job to scan an object that is held."""
VARIANT: Final = "variant:"
"""The beginning of the keys of the jobs to make variants."""
EFFECT: Final = "effect:"
"""The beginning of the keys of the jobs to call effects."""

Address: TypeAlias = tuple[str, str]
"""The full name of a table, and the name of a column."""

BATCH_SIZE: Final = 500
CONCURRENCY: Final = 2
TRIES: Final = 3
FIRST_RETRY: Final = 5.0
LONGEST_RETRY: Final = 3600.0
PAUSE_FOR_OTHERS: Final = 300.0
"""Seconds until a job is due again that waits for something else: another process that can do it, or a scan."""
RENEWALS: Final = 3
"""How often a lease is renewed before it would be over."""
LEFT_IN_COMPANY: Final = 2
"""How many workers may leave a row before it is taken over alone."""
DEADLY: Final = "{} workers have taken it over, and none has finished it"
"""The error of a row that has killed too many workers."""
_SAFE_SHARE = 0.8
_LOOKS_PAST_LOCKS = 10
_PAUSE_BETWEEN_LOOKS = 0.05
"""The part of a lease after which its holder counts it as expired."""
_JITTER = 0.25
_MOST_DOUBLINGS = 20
MOST_REPORTED: Final = 1000
UNTRIED: Final = {"attempts": 0, "takeovers": 0}


# What a transaction records.


def variant_key(name: str) -> str:
    """Return the key of the job to make a variant."""
    return f"{VARIANT}{name}"


def variants_of(column: Column[Any]) -> Mapping[str, DeclaredVariant]:
    """Return the variants that a column declares, by their names."""
    return column.type.variants if isinstance(column.type, AttachmentType) else {}


def effect_key(name: str) -> str:
    """Return the key of the jobs of an effect."""
    return f"{EFFECT}{name}"


def effects_in(column: Column[Any]) -> Mapping[str, Effect]:
    """Return the effects that a column declares, by their names."""
    return column.type.effects if isinstance(column.type, AttachmentType) else {}


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
        recipe: The digest of the recipe of a variant, or what is known of the event of an effect.
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


def enqueue_jobs(
    connection: Connection,
    job: Table,
    jobs: Iterable[NewJob],
    options: Mapping[str, Any],
    *,
    renew: Callable[[Table, Any], dict[str, Any]] | None = None,
) -> None:
    """Record jobs in the transaction of a connection; one that is there is due again, and starts over.

    The rows are written in the order of their ids, so that transactions that record the same jobs do not deadlock.

    Args:
        connection: The connection.
        job: The journal's table of jobs.
        jobs: The jobs.
        options: Execution options that say where the table is.
        renew: Returns what one that is there becomes, from the table and the columns of the new one; None for all that the new
            one has.
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
    for batch in batches([{"id": item, **rows[item]} for item in sorted(rows)], BATCH_SIZE):
        connection.execute(_upsert(connection.dialect.name, job, renew or _renew_all), batch, execution_options=options)


@lru_cache(maxsize=64)  # transactions share the statements, and so their compiled forms
def _upsert(dialect: str, job: Table, renew: Callable[[Table, Any], dict[str, Any]]) -> Insert:
    common = {"due": clock(), "dead": False, **UNTRIED}
    return upsert_rows(dialect, job, common, lambda new: renew(job, new))


def _renew_all(_: Table, new: Any) -> dict[str, Any]:
    """Return what a job becomes that is recorded once more."""
    names = ("table_name", "column_name", "recipe", "due", "attempts", "takeovers", "dead")
    return {name: new[name] for name in names}


# Leases: what belongs to an uploader or a worker for a while, and is renewed in time.


class Lease:
    """A lease in the database, and its end as its holder judges it.

    Its end is judged twice: by the database's clock, for other workers, and before that by this machine's monotonic one, for the
    holder, who then does nothing more. Neither makes anything safe; they only keep work from being done in vain.

    Args:
        renew: Renews it in the database; returns whether it was still the holder's.
        seconds: How long it is, from each renewal.
        begun: When it was asked for, by the monotonic clock: before the database began to count.
        what: What it is for, in messages.
        job: The job that it is for, if it is.
    """

    def __init__(
        self, renew: Callable[[], Awaitable[bool]], seconds: float, begun: float, what: str, job: LeasedJob | None = None
    ) -> None:
        self._renew_there = renew
        self._seconds = seconds
        self._begun = begun
        self._what = what
        self._job = job

    @property
    def interval(self) -> float:
        """The seconds until it is to be renewed."""
        return min(self._seconds / RENEWALS, max(self._remaining() / 2, 0))

    def require(self) -> None:
        """Raise `StaleAttachmentError` if it has expired for its holder."""
        if self._remaining() <= 0:
            raise self._expired()

    async def hold(self) -> None:
        """Renew it until cancelled; raise `StaleAttachmentError` if that fails for too long."""
        while True:
            await asyncio.sleep(self.interval)
            self.require()
            await self._renew()

    async def _renew(self) -> None:
        asked = time.monotonic()
        try:
            with contained("the database"):
                async with asyncio.timeout(self._remaining()):
                    there = await self._renew_there()
        except Exception as error:  # noqa: BLE001  # whatever keeps it from being renewed, there is time to try again
            message, fields = "the lease of %s could not be renewed, which will be retried: %r", fields_of(self._job)
            logger.warning(message, self._what, error, extra=fields)
            return
        if not there:
            raise self._expired()
        self._begun = asked

    def _remaining(self) -> float:
        return self._begun + self._seconds * _SAFE_SHARE - time.monotonic()

    def _expired(self) -> StaleAttachmentError:
        return StaleAttachmentError(f"the lease of {self._what} has expired while it was in progress; it may be tried again")


# What a worker does.


@dataclass(frozen=True, slots=True)
class LeasedJob:
    """A job that a worker has taken over."""

    id: UUID
    address: Address
    backend: str
    location: str
    attempts: int
    takeovers: int
    key: str
    recipe: str

    @classmethod
    def from_row(cls, row: Row[Any], takeovers: int) -> Self:
        """Return the job of a row, which was taken over so often."""
        address = row.table_name, row.column_name
        return cls(row.id, address, row.backend, row.location, row.attempts, takeovers, row.key, row.recipe)

    @property
    def place(self) -> tuple[str, str]:
        """The backend and the location of its object."""
        return self.backend, self.location

    @property
    def variant(self) -> str:
        """The name of the variant that is to be made."""
        return self.key.removeprefix(VARIANT)

    @property
    def what(self) -> str:
        """What is to be done, in messages."""
        if self.key == SCAN:
            return f"scanning the object {self.location!r}, which is held,"
        return f"{_describe(self.key)} of the object {self.location!r}"


@again_after_deadlock
async def take_over(
    pool: JournalPool, table: Table, backend: str, limit: int, seconds: float, *conditions: ColumnElement[bool]
) -> list[tuple[Row[Any], datetime]]:
    """Take over jobs or reclaims that are due; those that another worker takes over at this moment are skipped.

    One that workers have left repeatedly is taken over alone, after all others.

    Args:
        pool: The journal's own connections.
        table: Their table.
        backend: The backend's key.
        limit: The most rows.
        seconds: How long they are this worker's own.
        *conditions: Which of them are meant.

    Returns:
        The rows as they were before, and until when each is this worker's own.
    """
    was_left = table.c.takeovers >= LEFT_IN_COMPANY
    due = (table.c.backend == backend) & (table.c.due <= clock()) & table.c.dead.is_(False)
    for is_meant, most in ((~was_left, limit), (was_left, 1)):
        found = select(table).where(due, is_meant, *conditions).order_by(table.c.due).limit(most)
        for _ in range(_LOOKS_PAST_LOCKS):
            if taken := await _take_unlocked(pool, table, found, seconds):
                return taken
            if not await _is_only_locked(pool, found):
                break
            await asyncio.sleep(_PAUSE_BETWEEN_LOOKS)
    return []


async def _take_unlocked(pool: JournalPool, table: Table, found: Select[Any], seconds: float) -> list[tuple[Row[Any], datetime]]:
    found = found.with_for_update(skip_locked=True)
    if not await pool.may_find(found):
        return []
    async with pool.writing() as connection:
        rows = list(await connection.execute(found))
        if not rows:
            return []
        until = await moment_in(connection, seconds)
        taken = {"due": until, "takeovers": table.c.takeovers + 1}
        statement = update(table).where(table.c.id == bindparam("mine", type_=table.c.id.type)).values(taken)
        # One by one: on MariaDB a list may lock other rows on the way.
        await connection.execute(statement, [{"mine": row.id} for row in rows])
    return [(row, until) for row in rows]


async def _is_only_locked(pool: JournalPool, found: Select[Any]) -> bool:
    """Return whether rows were passed over because another statement has locked them, perhaps only to look at them.

    MariaDB locks each row that a statement examines, so the workers of several kinds of jobs, which are woken at once, may hide
    rows from each other that none of them takes over. Elsewhere a lock is that of a transaction that writes the row.
    """
    if not pool.is_mariadb:
        return False
    async with pool.reading() as connection:
        return (await connection.execute(found.limit(1))).first() is not None


async def retry_dead(pool: JournalPool, table: Table) -> int:
    """Make dead jobs or reclaims due again; return how many there were."""
    async with pool.durable() as connection:
        result = await connection.execute(update(table).where(table.c.dead).values(**UNTRIED, dead=False, due=clock()))
    return result.rowcount


class StillNeededError(Exception):
    """A row has appeared for which the job is still to be done, so it stays."""


class JobQueue:
    """Takes over jobs, and notes what has become of them; a subclass does those of one kind.

    Args:
        pool: The journal's own connections.
        manager: Whose backends have the objects, and whose policies have the scanners.
        references: What tells which rows hold an object.
        columns: The columns whose jobs this process does.
        journal: The journal, which has the tables, and records uploads.
        lease: How long a job is this worker's own without renewal.
        max_attempts: After how many deaths of workers that were processing only this job it is dead.
    """

    _column_type: type[Any] = object
    """The type of the columns whose rows a job is for."""

    def __init__(
        self,
        pool: JournalPool,
        manager: StorageManager,
        references: References,
        columns: Iterable[Column[Any]],
        journal: Journal,
        *,
        lease: timedelta,
        max_attempts: int,
    ) -> None:
        self._pool = pool
        self._tables = tables = journal.tables
        self._job = tables.job
        self._intent = tables.intent
        self._manager = manager
        self._references = references
        self._columns = list(columns)
        self._journal = journal
        self._lease = lease.total_seconds()
        self._max_attempts = max_attempts
        self._refused: list[FailedReclaim] = []

    async def run(self, backend: str) -> RecoveryReport:
        """Do the jobs that are due for objects on one backend, given by its key."""
        raise NotImplementedError

    async def _claim(self, backend: str, limit: int, own: ColumnElement[bool]) -> list[LeasedJob]:
        """Take over jobs that are due, and make those dead that have killed too many workers.

        Args:
            backend: The backend's key.
            limit: The most jobs.
            own: Which jobs are meant.
        """
        while rows := await take_over(self._pool, self._job, backend, limit, self._lease, own):
            jobs = [LeasedJob.from_row(row, row.takeovers + 1) for row, _ in rows]
            if jobs[0].takeovers <= LEFT_IN_COMPANY + self._max_attempts:
                return jobs
            await self._note(jobs[0], DEADLY.format(jobs[0].takeovers - 1), is_dead=True)
        return []

    async def _holdings(self, connection: AsyncConnection, job: LeasedJob, find: Callable[..., list[Holding]]) -> list[Holding]:
        """Return the rows that hold the object of a job, in every schema, as `read_holdings` or `lock_holdings` finds them."""
        holdings: list[Holding] = []
        for place, column in await self._references.find_holders(connection, job.location):
            if isinstance(column.type, self._column_type):
                is_here, options = job_rows(place, column, job, connection), job_options(place, column)
                holdings += await connection.run_sync(find, column, is_here, job.place, options)
        return holdings

    async def _is_unmounted(self, job: LeasedJob) -> bool:
        backend = self._manager.backend(job.backend)
        return isinstance(backend, SupportsMountCheck) and not await backend.is_mounted()

    async def _postpone(self, jobs: Sequence[LeasedJob], seconds: float, error: Exception | None = None) -> None:
        """Let jobs be due later; nothing was attempted."""
        for job in jobs:
            said = {} if error is None else {"error": describe_error(error)}
            await self._update_own(job, due=clock(seconds), takeovers=0, **said)

    async def _leave_to_others(self, job: LeasedJob, error: ConfigurationError) -> None:
        """Let a job be due later that perhaps another process can do, so the pauses do not grow."""
        await self._postpone([job], PAUSE_FOR_OTHERS, error)
        logger.warning("%s cannot be done by this process: %s", job.what, error, extra=fields_of(job))

    async def _renew(self, job: LeasedJob) -> None:
        """Renew the lease of a job until cancelled."""
        while True:
            await asyncio.sleep(self._lease / RENEWALS)
            await shielded(self._update_own(job, due=clock(self._lease)))

    async def _note(self, job: LeasedJob, problem: str, *, is_dead: bool = False, is_outcome: bool = False) -> None:
        """Save why a job has failed, and when it is tried again; a refusal of a recipe is an outcome, not a fault."""
        attempts = job.attempts + 1
        delay = min(FIRST_RETRY * 2 ** min(job.attempts, _MOST_DOUBLINGS), LONGEST_RETRY)
        due = clock(delay * random.uniform(1 - _JITTER, 1))  # noqa: S311  # not a secret
        await self._update_own(job, error=problem, dead=is_dead, due=due, attempts=attempts, takeovers=0)
        told = logger.info if is_outcome else logger.error if is_dead else logger.warning
        onward = "cannot succeed" if is_outcome else "a dead letter" if is_dead else "is tried again"
        told("%s failed (attempt %d, %s): %s", job.what, attempts, onward, problem, extra=fields_of(job))

    async def _update_own(self, job: LeasedJob, **values: Any) -> None:
        """Update a job, unless another worker has taken it over."""
        table = self._job
        is_own = (table.c.id == job.id) & (table.c.attempts == job.attempts) & (table.c.takeovers == job.takeovers)
        async with self._pool.writing() as connection:
            await connection.execute(update(table).where(is_own).values(values))


async def report_jobs(pool: JournalPool, job: Table, report: RecoveryReport) -> None:
    """Add to a report how many objects are held, how many variants are to be made, and what cannot be scanned or made."""
    async with pool.reading() as connection:
        counts = select(job.c.key, func.count()).where(job.c.dead.is_(False)).group_by(job.c.key)
        found: dict[str, int] = {key: count for key, count in await connection.execute(counts)}  # noqa: C416  # rows, not pairs
        report.held = found.pop(SCAN, 0)
        report.pending_effects = sum(count for key, count in found.items() if key.startswith(EFFECT))
        report.underived = sum(found.values()) - report.pending_effects
        # What a recipe refuses is known; it is not a fault that could be repaired.
        is_refused = job.c.key.startswith(VARIANT) & func.coalesce(job.c.error, "").startswith(REFUSED)
        refused = select(func.count()).where(job.c.dead, is_refused)
        report.underivable = (await connection.execute(refused)).scalar_one()
        dead = select(job).where(job.c.dead, ~is_refused).order_by(job.c.due).limit(MOST_REPORTED)
        report.failed += [
            failure_of(LeasedJob.from_row(row, row.takeovers), row.error, row.attempts) for row in await connection.execute(dead)
        ]


def failure_of(job: LeasedJob, problem: str, attempts: int) -> FailedReclaim:
    """Return what a report says of a job that is not tried again."""
    return FailedReclaim(job.backend, job.location, f"{_describe(job.key)}: {problem}", attempts, None)


def _describe(key: str) -> str:
    if key.startswith(EFFECT):
        return f"the effect {key.removeprefix(EFFECT)!r}"
    return "scanning" if key == SCAN else f"making the variant {key.removeprefix(VARIANT)!r}"


def job_rows(place: Place, column: Column[Any], job: LeasedJob, connection: AsyncConnection) -> ColumnElement[bool]:
    """Return the condition that a row of a column in one schema holds the object of a job."""
    return location_of(column, connection.dialect.name, is_generated=place.is_generated)[1] == job.location


def job_options(place: Place, column: Column[Any]) -> dict[str, Any]:
    """Return the options that lead a statement on a model's table to one schema; not cached, for other maps have other keys."""
    return {TRANSLATE_MAP: {column.table.schema: place.schema}, "compiled_cache": None}
