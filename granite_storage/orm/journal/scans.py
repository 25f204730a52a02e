"""Scans of the files that are held until a virus scanner has judged them.

Why it is safe. The worker finds the rows by the object's location, because a move takes the job along, and scans the object while
it holds no lock. Then it locks those rows, and under their locks each must still hold the object, and be unjudged: a verdict
never reaches another file. It writes the value as it has just read it, with the verdict in place of what it says of the scan,
and no other column. The same transaction deletes the job.

A row that the worker has not found may have moved while it looked. So it deletes the job first, which holds up every flush that
is recording the same job, and then looks once more: where a row holds the object and is unjudged, the transaction is rolled back.
An object stays held until it is judged, however often that fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, tuple_, update

from granite_storage._tasks import background, contained, run_bounded
from granite_storage._telemetry import fields_of
from granite_storage.exceptions import (
    BackendUnavailableError,
    ConfigurationError,
    ContentError,
    ObjectNotFoundError,
    ScannerUnavailableError,
)
from granite_storage.orm._util import again_after_deadlock
from granite_storage.orm.journal.jobs import (
    CONCURRENCY,
    FIRST_RETRY,
    SCAN,
    TRIES,
    Address,
    JobQueue,
    LeasedJob,
    StillNeededError,
    effect_key,
    effects_in,
    job_id,
    variant_key,
    variants_of,
)
from granite_storage.orm.journal.tables import RecoveryReport, clock, describe_error
from granite_storage.orm.variants import LONGEST_WAIT, Holding, lock_holdings, read_holdings, write_value
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


logger: logging.Logger = logging.getLogger("granite_storage")


class ScanJobs(JobQueue):
    """Has held objects scanned, and writes the verdicts into their rows; its arguments are those of `JobQueue`."""

    async def run(self, backend: str) -> RecoveryReport:
        """Scan what is due on one backend, given by its key; of a column whose scanner is unavailable only the first few."""
        report = RecoveryReport()
        unavailable: set[Address] = set()
        table, all_addresses = self._job, {(column.table.fullname, column.name) for column in self._columns}

        async def work(job: LeasedJob) -> None:
            try:
                judged = await self._scan(job)
            except ScannerUnavailableError:
                unavailable.add(job.address)
            else:
                report.scanned += judged

        while addresses := sorted(all_addresses - unavailable):
            due = (table.c.key == SCAN) & tuple_(table.c.table_name, table.c.column_name).in_(addresses)
            if not (jobs := await self._claim(backend, CONCURRENCY, due)):
                break
            await run_bounded(jobs, work, CONCURRENCY)
        return report

    async def _scan(self, job: LeasedJob) -> int:
        """Have an object scanned, and write the verdict; return how many objects were judged, 0 or 1.

        Raises:
            ScannerUnavailableError: The scanner cannot judge it now; that is noted.
        """
        try:
            with contained("a scan"):
                async with background(self._renew(job)):
                    verdict = await self._judge(job)
                    async with asyncio.timeout(LONGEST_WAIT):
                        is_settled = await self._is_settled(job, verdict)
        except TimeoutError:
            await self._note(job, f"other transactions have locked its rows for {LONGEST_WAIT:g} s")
            return 0
        except (ObjectNotFoundError, ContentError) as error:
            if not await self._is_settled(job, None):
                await self._note(job, describe_error(error), is_dead=True)
            return 0
        except ConfigurationError as error:
            await self._leave_to_others(job, error)
            return 0
        except Exception as error:
            await self._note(job, describe_error(error))
            if isinstance(error, ScannerUnavailableError):
                raise
            return 0
        if not is_settled:
            await self._postpone([job], FIRST_RETRY)
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

    async def _expedite(self, scan: LeasedJob) -> None:
        """Let the jobs of an object be due that waited for its scan."""
        job = self._job
        keys = {variant_key(name) for column in self._columns for name in variants_of(column)}
        keys |= {effect_key(name) for column in self._columns for name in effects_in(column)}
        ids = sorted(job_id(scan.backend, scan.location, key) for key in keys)
        if ids:
            statement = update(job).where(job.c.id == bindparam("mine", type_=job.c.id.type), job.c.dead.is_(False))
            async with self._pool.writing() as connection:
                await connection.execute(statement.values(due=clock()), [{"mine": item} for item in ids])

    async def _judge(self, job: LeasedJob) -> Mapping[str, Any] | None:
        """Return the verdict of the scanner; None where no row holds the object unjudged."""
        async with self._pool.reading() as connection:
            ref = await self._find_reference(connection, job)
        if ref is None:
            return None
        try:
            return (await self._manager.scan(ref)).scan
        except ObjectNotFoundError as error:
            if await self._is_unmounted(job):
                raise BackendUnavailableError(f"the folder of the backend {job.backend!r} is not mounted") from error
            raise

    async def _is_settled(self, job: LeasedJob, verdict: Mapping[str, Any] | None) -> bool:
        """Write a verdict, where there is one, and delete the job; return False where it stays, because a row is unjudged."""
        for _ in range(TRIES):
            try:
                await self._settle(job, verdict)
            except StillNeededError:
                if verdict is None:
                    return False
            else:
                return True
        return False

    @again_after_deadlock
    async def _settle(self, job: LeasedJob, verdict: Mapping[str, Any] | None) -> None:
        async with self._pool.writing() as connection:
            if verdict is not None:
                for holding in await self._holdings(connection, job, lock_holdings):
                    if _is_unjudged(holding):
                        await connection.run_sync(write_value, holding, {**holding.value, "scan": dict(verdict)})
            await connection.execute(delete(self._job).where(self._job.c.id == job.id))
            # Only now, when no flush can record the job: a row that another transaction moved was not found above.
            if await self._find_reference(connection, job) is not None:
                raise StillNeededError

    async def _find_reference(self, connection: AsyncConnection, job: LeasedJob) -> StoredObjectRef | None:
        """Return the ref of an object, from a row that holds it unjudged."""
        holdings = await self._holdings(connection, job, read_holdings)
        return next((holding.ref for holding in holdings if _is_unjudged(holding)), None)


def _is_unjudged(holding: Holding) -> bool:
    scan = holding.value.get("scan")
    return isinstance(scan, dict) and scan.get("status") == "pending"
