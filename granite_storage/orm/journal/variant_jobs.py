"""The variants that the journal's worker makes of the files of committed rows.

A variant is made by the steps of `granite_storage.orm.variants`. It is an object of its own, with an upload intent that is
committed first, and that the transaction consumes which lets the rows have it. So whatever happens in between, the intent settles
the object, and the job is due again. A job belongs to a recipe, by its digest: a process does only those of its own recipes. A
variant that takes the place of another one, of an older recipe, displaces it in the same transaction.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import ColumnElement, delete, false, select, tuple_
from sqlalchemy.exc import DBAPIError

from granite_storage._tasks import background, contained, is_cancellation, run_bounded, shielded_cleanup
from granite_storage._telemetry import fields_of
from granite_storage.derived.processes import in_background
from granite_storage.exceptions import (
    BackendUnavailableError,
    ConfigurationError,
    ContentError,
    DerivationFailedError,
    DerivationRefusedError,
    DerivationUnavailableError,
    InfectedObjectError,
    ObjectNotFoundError,
    ScanPendingError,
    StaleAttachmentError,
)
from granite_storage.orm._interfaces import Intent
from granite_storage.orm._util import again_after_deadlock, group
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.journal.deletes import PendingDelete, nominate
from granite_storage.orm.journal.jobs import (
    BATCH_SIZE,
    CONCURRENCY,
    FIRST_RETRY,
    LONGEST_RETRY,
    PAUSE_FOR_OTHERS,
    SCAN,
    TRIES,
    VARIANT,
    JobQueue,
    LeasedJob,
    StillNeededError,
    failure_of,
    job_id,
    variant_key,
    variants_of,
)
from granite_storage.orm.journal.tables import RecoveryReport, clock, describe_error, describe_refusal
from granite_storage.orm.transactions import refused_ref
from granite_storage.orm.uploads import make_variant, prepare_variant, require_lease
from granite_storage.orm.variants import (
    LONGEST_WAIT,
    Holding,
    MadeVariant,
    Which,
    choose_rows,
    entity_of,
    is_kept,
    lock_holdings,
    locked_for_long,
    not_committed,
    read_holdings,
    undeclared_in,
    write_variants,
)
from granite_storage.refs import StoredObjectRef, require_scanned

if TYPE_CHECKING:
    from granite_storage.orm._interfaces import ColumnType, DeclaredVariant


logger: logging.Logger = logging.getLogger("granite_storage")

_MOST_DERIVATIONS = 5
"""How often a recipe may fail: a file that takes too long or too much memory does so each time, and keeps a process busy."""
_JOB_BATCH_SIZE = 8
_ABANDONED = 86400.0
"""Seconds after which a job that is due is known to be of no running process, while some version is being deployed."""


class VariantJobs(JobQueue):
    """Makes variants, and lets the rows of their originals have them; its arguments are those of `JobQueue`."""

    _column_type = AttachmentType

    async def run(self, backend: str) -> RecoveryReport:
        """Make the variants that are due of objects on one backend, given by its key.

        Only those whose recipes are this process's own: another version of the application may have others.
        """
        report, recipes = RecoveryReport(), self._own_recipes()
        if not recipes:
            return report
        own = tuple_(self._job.c.key, self._job.c.recipe).in_(sorted(recipes))
        while jobs := await self._claim(backend, _JOB_BATCH_SIZE, own):
            by_object = group(jobs, attrgetter("place")).values()
            async with background(*map(self._renew, jobs)):
                report.derived += sum(await run_bounded(by_object, self._derive, CONCURRENCY))
        await self._forget_dead(backend, own)
        report.refused = self._refused
        return report

    def _own_recipes(self) -> set[tuple[str, str]]:
        """Return the keys and the digests of the recipes that this process declares."""
        declared = [variant for column in self._columns for variant in variants_of(column).values()]
        return {(variant_key(variant.name), variant.digest) for variant in declared}

    async def end_idle(self, backend: str, *, undeclared: bool = False) -> None:
        """End the jobs to make variants that nothing can come of, for objects on one backend; and dead ones to scan an object.

        A job that is dead, or whose recipe this process does not declare, ends where no row holds its object any more. One by a
        recipe that this process does not declare ends as well when it has been due for a day: a worker that declares it would
        have taken it over, or looked at it each hour where it is dead. Until then another version of the application may have it.
        Jobs of columns that this process does not have are left to others, which can find their rows.

        Memory is that of a page of jobs.

        Args:
            backend: The backend's key.
            undeclared: Whether those of variants that their columns do not declare end at once.
        """
        job, columns = self._job, {(column.table.fullname, column.name): column for column in self._columns}
        if not columns:
            return
        recipes = self._own_recipes()
        own = tuple_(job.c.key, job.c.recipe).in_(sorted(recipes)) if recipes else false()
        is_idle = (job.c.key == SCAN) & job.c.dead | job.c.key.startswith(VARIANT) & (job.c.dead | ~own)
        is_here = (job.c.backend == backend) & tuple_(job.c.table_name, job.c.column_name).in_(sorted(columns))
        is_abandoned = (job.c.due <= clock(-_ABANDONED)).label("is_abandoned")
        page = select(job, is_abandoned).where(is_here, is_idle).order_by(job.c.id).limit(BATCH_SIZE)
        after: UUID | None = None
        while True:
            async with self._pool.reading() as connection:
                rows = list(await connection.execute(page if after is None else page.where(job.c.id > after)))
            held = await self._references.find({row.location for row in rows}) if rows else set()
            for row in rows:
                item = LeasedJob.from_row(row, row.takeovers)
                is_others = item.key != SCAN and (item.key, item.recipe) not in recipes
                is_undeclared = is_others and item.variant not in variants_of(columns[item.address])
                if item.location not in held:
                    await self._end(item, has_no_rows=True)
                elif undeclared and is_undeclared:
                    await self._end(item)
                elif is_others and row.is_abandoned:
                    await self._end(item, job.c.due <= clock(-_ABANDONED))
            if len(rows) < BATCH_SIZE:
                return
            after = rows[-1].id

    @again_after_deadlock
    async def _end(self, job: LeasedJob, *conditions: ColumnElement[bool], has_no_rows: bool = False) -> None:
        """Delete a job, unless it is another one meanwhile, or has a row though it had none."""
        own = (self._job.c.id == job.id) & (self._job.c.recipe == job.recipe)
        with suppress(StillNeededError):
            async with self._pool.writing() as connection:
                await connection.execute(delete(self._job).where(own, *conditions))
                # Only now, when no flush can record the job: a row that another transaction moved was not found before.
                if has_no_rows and await self._references.find_holders(connection, job.location):
                    raise StillNeededError

    async def make(
        self, column_type: ColumnType, source: StoredObjectRef, declared: DeclaredVariant, *, which: Which = "missing"
    ) -> StoredObjectRef:
        """Make a variant of an object now, and return what the row holds then.

        Raises:
            StaleAttachmentError: No committed row holds the object, or others have locked it for long.
            StorageError: The variant could not be made, or not be stored.
        """
        job = _asked_for(source, declared.name, declared.digest)
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

    async def drop(self, source: StoredObjectRef, name: str) -> bool:
        """Take a variant out of the rows of its original whose columns do not declare it; return whether one had it.

        Raises:
            StaleAttachmentError: Other transactions have locked the rows for long.
        """
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                return await self._drop(source, name)
        except TimeoutError:
            raise locked_for_long(source.location, LONGEST_WAIT) from None

    @again_after_deadlock
    async def _drop(self, source: StoredObjectRef, name: str) -> bool:
        job = _asked_for(source, name)
        async with self._pool.writing() as connection:
            chosen = undeclared_in(await self._holdings(connection, job, lock_holdings), [name])
            displaced = await connection.run_sync(write_variants, chosen, {})
            await connection.run_sync(nominate, self._intent, self._pending(job, displaced), {})
        return bool(chosen)

    async def _derive(self, jobs: Sequence[LeasedJob]) -> int:
        """Make the variants that are due of one object; return how many its rows have got."""
        try:
            with contained("making variants"):
                return await self._derive_all(jobs)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is kept with the jobs
            for job in jobs:
                await self._fail(job, error)
            return 0

    async def _derive_all(self, jobs: Sequence[LeasedJob]) -> int:
        async with self._pool.reading() as connection:
            holdings = await self._holdings(connection, jobs[0], read_holdings)
        wanted: dict[AttachmentType, tuple[StoredObjectRef, list[LeasedJob]]] = {}
        idle: list[LeasedJob] = []
        for job in jobs:
            if lacking := _lacking(job, holdings):
                wanted.setdefault(lacking[0].column_type, (lacking[0].ref, []))[1].append(job)
            else:
                idle.append(job)
        if await self._publish_with_retries(idle) is None:
            await self._postpone(idle, FIRST_RETRY)
        counts = [await self._make_all(some, ref, item, holdings, raises=False) for item, (ref, some) in wanted.items()]
        return sum(counts)

    async def _make_all(
        self,
        jobs: Sequence[LeasedJob],
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
            await self._postpone(jobs, PAUSE_FOR_OTHERS, error)
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

        async def make(job: LeasedJob) -> None:
            name = job.variant

            def keep(ref: StoredObjectRef) -> None:
                made[name] = MadeVariant(ref, seen[name], replaces_same)

            in_background.set(not raises)
            try:
                with contained("making a variant"):
                    with lease.begin(ids[name]):
                        await make_variant(self._manager, source, prepared[name], column_type.variants[name], keep)
                    await require_lease(lease, Intent(self._journal, ids[name]), made[name].ref)
            except Exception as error:
                made.pop(name, None)
                if raises:
                    raise
                errors[name] = error

        try:
            async with background(lease.hold()):
                await run_bounded(jobs, make, CONCURRENCY)
                published = await self._publish_with_retries([job for job in jobs if job.variant in made], made, ids)
        except BaseException as error:
            if not is_cancellation(error):
                await self._settle_uploads(list(ids.values()))
            raise
        await self._settle_uploads([item for name, item in ids.items() if name not in (published or ())])
        for job in jobs:
            if job.variant in errors:
                await self._fail(job, errors[job.variant])
            elif published is None or job.variant not in published:
                await self._postpone([job], FIRST_RETRY)  # unless it is gone
        return len(published or ())

    async def _settle_uploads(self, ids: Sequence[UUID]) -> None:
        """Let the journal delete what no row has taken; its worker does it later where that fails."""
        if ids:
            await shielded_cleanup(self._settle(ids), "deleting variants that no row has taken")

    async def _settle(self, ids: Sequence[UUID]) -> None:
        try:
            await self._journal.settle(ids)
        except BackendUnavailableError as error:
            # The transaction that has kept the rows locked on SQLite keeps the journal's tables locked, too.
            logger.warning("%d variants that no row has taken are left to the journal's worker: %s", len(ids), error)

    async def _publish_with_retries(
        self, jobs: Sequence[LeasedJob], made: Mapping[str, MadeVariant] | None = None, ids: Mapping[str, UUID] | None = None
    ) -> set[str] | None:
        """Do as `_publish`, again where a row has moved meanwhile; None where jobs are still to be done, and nothing has changed.

        Raises:
            StaleAttachmentError: Other transactions have locked the rows for long.
        """
        if not jobs:
            return set()
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(LONGEST_WAIT):
                    return await self._publish(jobs, made or {}, ids or {})
            except StillNeededError:
                if not made:
                    return None
            except TimeoutError:
                raise locked_for_long(jobs[0].location, LONGEST_WAIT) from None
        return None

    @again_after_deadlock
    async def _publish(self, jobs: Sequence[LeasedJob], made: Mapping[str, MadeVariant], ids: Mapping[str, UUID]) -> set[str]:
        """Set variants in the rows that hold their original, and delete the jobs that are done or have no row any more.

        Args:
            jobs: The jobs of one object.
            made: The variants that are stored.
            ids: The intents of their uploads.

        Returns:
            The names of those that rows have now.
        """
        async with self._pool.writing() as connection:
            holdings = await self._holdings(connection, jobs[0], lock_holdings) if made else []
            chosen = choose_rows(holdings, made)
            intents = self._journal.intents
            stored, locations = sorted(ids[name] for name in chosen), [made[name].ref.location for name in chosen]
            try:
                if chosen:
                    await connection.run_sync(intents.claim, stored, locations)
                displaced = await connection.run_sync(write_variants, chosen, made)
            except DBAPIError as error:
                if (refused := refused_ref(error)) is None:
                    raise
                raise refused from error
            # After the rows are written, whose triggers look for the intents.
            if chosen:
                await connection.run_sync(intents.consume, stored)
                await connection.run_sync(intents.end_claim, locations)
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
                raise StillNeededError
        return set(chosen)

    def _pending(self, job: LeasedJob, displaced: Iterable[StoredObjectRef]) -> list[PendingDelete]:
        return [
            PendingDelete(ref.backend, ref.location, self._journal.retention_of(ref).total_seconds(), job.location)
            for ref in displaced
        ]

    async def _look(self, column_type: ColumnType, job: LeasedJob) -> tuple[list[Holding], StoredObjectRef | None]:
        """Return the rows that hold the object of a job, and the ref in a row of a column."""
        async with self._pool.reading() as connection:
            holdings = await self._holdings(connection, job, read_holdings)
        return holdings, next((holding.ref for holding in holdings if holding.column is column_type.column), None)

    async def _fail(self, job: LeasedJob, error: Exception) -> None:
        """Note why a variant was not made; it is tried again where that may help, and where a row still lacks it."""
        problem = describe_error(error)
        match error:
            case StaleAttachmentError():
                await self._postpone([job], FIRST_RETRY, error)
            case DerivationUnavailableError():
                await self._postpone([job], FIRST_RETRY, error)
                logger.warning("%s waits: %s", job.what, error, extra=fields_of(job))
            case ConfigurationError():
                await self._leave_to_others(job, error)
            case ContentError() | ObjectNotFoundError():
                if await self._publish_with_retries([job]) is None:
                    is_refused = isinstance(error, DerivationRefusedError)
                    if is_refused:
                        problem = describe_refusal(error)
                        self._refused.append(failure_of(job, problem, job.attempts + 1))
                    await self._note(job, problem, is_dead=is_refused or not await self._is_unmounted(job), is_outcome=is_refused)
            case DerivationFailedError():
                most = min(self._max_attempts, _MOST_DERIVATIONS)
                await self._note(job, problem, is_dead=job.attempts + 1 >= most)
            case _:
                await self._note(job, problem, is_dead=job.attempts + 1 >= self._max_attempts)

    async def _forget_dead(self, backend: str, own: ColumnElement[bool]) -> None:
        """Delete dead jobs for variants that no row lacks any more; re-check the others in an hour."""
        job = self._job
        dead = select(job).where(job.c.backend == backend, job.c.dead, job.c.due <= clock(), own).limit(BATCH_SIZE)
        async with self._pool.reading() as connection:
            found = [LeasedJob.from_row(row, row.takeovers) for row in await connection.execute(dead)]
        for item in found:
            if await self._publish_with_retries([item]) is None:
                await self._update_own(item, due=clock(LONGEST_RETRY))


def _asked_for(source: StoredObjectRef, name: str, recipe: str = "") -> LeasedJob:
    """Return what stands for the job to make a variant, where none is recorded."""
    key, (backend, location) = variant_key(name), (source.backend, source.location)
    return LeasedJob(job_id(backend, location, key), ("", ""), backend, location, 0, 0, key, recipe)


def _lacking(job: LeasedJob, holdings: Iterable[Holding]) -> list[Holding]:
    """Return the rows that are still to get the variant of a job."""
    return [holding for holding in holdings if holding.wants(job.variant, job.recipe)]
