"""Effects: what is derived from a file and kept elsewhere, such as a document in a search index.

Each transaction that gives a file to a row, or takes it away, records a job for each effect of the column. The job says that
something has changed, and nothing else. The worker looks at the rows: where one of a column with this effect holds the file it
calls `put`, otherwise `remove`. So the last call fits the rows, in whatever order the jobs come.

Why the last call is not missed. There is one job for an effect and a file. Each transaction that records it gives it a new
token, in the transaction of the rows. The worker deletes the job only with the token that it had before it looked at the rows;
where it is another one meanwhile, the job stays, and is due. A transaction that has not committed yet holds up that DELETE, or is
held up by it and inserts the job again.

Why calls for a file do not overlap. The job is leased to one worker; a transaction that records it meanwhile lets the lease be.
The worker renews the lease while the handler runs, and cancels the handler where it cannot. What is killed between the call and
the DELETE is called again. So handlers are called at least once, and must be idempotent.

The job has the ref, because a row that has lost the file cannot tell it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import Column, Connection, Delete, Table, Update, case, delete, select, update

from granite_storage._tasks import contained, run_bounded, shielded, task_group
from granite_storage.derived.base import Effect, EffectEvent
from granite_storage.exceptions import (
    ConfigurationError,
    DerivationFailedError,
    InfectedObjectError,
    ScanPendingError,
)
from granite_storage.orm._util import again_after_deadlock
from granite_storage.orm.journal.database import put_values
from granite_storage.orm.journal.jobs import (
    EFFECT,
    LEFT_IN_COMPANY,
    PAUSE_FOR_OTHERS,
    JobQueue,
    Lease,
    LeasedJob,
    NewJob,
    effect_key,
    effects_in,
    enqueue_jobs,
    job_id,
    job_options,
    job_rows,
)
from granite_storage.orm.journal.tables import RecoveryReport, clock, describe_error
from granite_storage.orm.references import as_stored
from granite_storage.orm.variants import Which, value_of
from granite_storage.refs import StoredObjectRef, require_scanned

if TYPE_CHECKING:
    from granite_storage.orm._interfaces import ColumnType


logger: logging.Logger = logging.getLogger("granite_storage")

_CONCURRENCY = 4


def effects_of(columns: Iterable[Column[Any]]) -> dict[str, Effect]:
    """Return the effects that columns declare, by their names.

    Raises:
        ConfigurationError: Two columns declare different ones under one name. A file that moves from one to the other would leave
            the one effect and come to the other by one job.
    """
    found: dict[str, tuple[Effect, Column[Any]]] = {}
    for column in columns:
        for name, effect in effects_in(column).items():
            other, first = found.setdefault(name, (effect, column))
            if other != effect:
                raise ConfigurationError(
                    f"the columns {first.table.fullname}.{first.name} and {column.table.fullname}.{column.name} declare different"
                    f" effects under the name {name!r}: give both the same Effect, or the effects different names"
                )
    return {name: effect for name, (effect, _) in found.items()}


def enqueue_effects(
    connection: Connection,
    job: Table,
    changed: Iterable[tuple[Column[Any], StoredObjectRef]],
    options: Mapping[str, Any],
    *,
    names: Collection[str] | None = None,
) -> bool:
    """Record in the transaction of a connection that files have come to rows or left them; return whether there was an effect.

    Args:
        connection: The connection.
        job: The journal's table of jobs.
        changed: The columns, and the refs that they hold now or have held.
        options: Execution options that say where the table is.
        names: Which effects; None for all.
    """
    jobs = [
        NewJob(column, ref, effect_key(name), json.dumps({"token": uuid4().hex, "ref": ref.with_variants(None).to_dict()}))
        for column, ref in changed
        for name in effects_in(column)
        if names is None or name in names
    ]
    enqueue_jobs(connection, job, jobs, options, renew=_renew)
    return bool(jobs)


def _renew(job: Table, new: Any) -> dict[str, Any]:
    # A worker is processing it: two of them would call it at a time if it were due now.
    is_leased = job.c.takeovers > 0
    leased = {"due": case((is_leased, job.c.due), else_=new.due), "attempts": case((is_leased, job.c.attempts), else_=0)}
    return {**leased, **{name: new[name] for name in ("table_name", "column_name", "recipe", "dead")}}


class EffectJobs(JobQueue):
    """Calls effects for the files that have come to rows or left them; its arguments are those of `JobQueue`."""

    async def run(self, backend: str) -> RecoveryReport:
        """Call the effects that are due of files on one backend, given by its key."""
        report = RecoveryReport()
        if not (effects := effects_of(self._columns)):
            return report
        own = self._job.c.key.in_(sorted(map(effect_key, effects)))
        while jobs := await self._claim(backend, _CONCURRENCY, own):
            report.effects += sum(await run_bounded(jobs, self._call, _CONCURRENCY))
        return report

    async def call_now(self, column_type: ColumnType, source: StoredObjectRef, name: str) -> bool | None:
        """Call an effect for a file now, as if it had just come to its row.

        Returns:
            Whether that has succeeded; None where another worker is processing the job, or several have died of it: it is left
            to a worker then.
        """
        column, key = column_type.column, effect_key(name)
        async with self._pool.durable() as connection:
            await connection.run_sync(enqueue_effects, self._job, [(column, source)], {}, names=[name])
        own = self._job.c.id == job_id(source.backend, source.location, key)
        # One that workers have left repeatedly is called alone, and here it would be beside others.
        jobs = await self._claim(source.backend, 1, own & (self._job.c.takeovers < LEFT_IN_COMPANY))
        return await self._call(jobs[0]) if jobs else None

    async def find_pending(self, which: Which) -> dict[str, list[str]]:
        """Return for which effects a pass over all rows is to be made: by column, their names.

        No row says which effects were called for it, so the journal notes for which versions a pass was made.

        Args:
            which: Those without a pass, those without one of their version, or all.
        """
        meta = self._tables.meta
        async with self._pool.reading() as connection:
            found = await connection.execute(select(meta.c.name, meta.c.value))
            notes: dict[str, str] = {name: value for name, value in found}  # noqa: C416  # rows, not pairs
        pending: dict[str, list[str]] = {}
        for column in self._columns:
            for name, effect in effects_in(column).items():
                noted = notes.get(_note_of(column, name))
                if which == "all" or noted is None or (which == "stale" and noted != str(effect.version)):
                    pending.setdefault(f"{column.table.fullname}.{column.name}", []).append(name)
        return pending

    async def note_passes(self, passed: Mapping[str, Iterable[str]]) -> None:
        """Note that a pass over all rows was made for effects, given as `find_pending` returns them."""
        versions = {
            _note_of(column, name): str(effects_in(column)[name].version)
            for column in self._columns
            for name in passed.get(f"{column.table.fullname}.{column.name}", ())
        }
        if versions:
            async with self._pool.durable() as connection:
                await put_values(connection, self._tables, versions, clock())

    async def _call(self, job: LeasedJob) -> bool:
        """Call the handler that fits the rows, and delete the job; return whether that has succeeded."""
        effect = effects_of(self._columns)[job.key.removeprefix(EFFECT)]
        try:
            with contained("an effect"):
                await self._handle(job, effect)
        except ScanPendingError as error:
            await self._postpone([job], PAUSE_FOR_OTHERS, error)
            return False
        except Exception as error:  # noqa: BLE001  # whatever it is, it is kept with the job
            problem = describe_error(error)
            await self._note(job, problem, is_dead=job.attempts + 1 >= self._max_attempts)
            return False
        # Cancelled in between it would be called once more, for nothing.
        await shielded(self._finish(job))
        return True

    async def _handle(self, job: LeasedJob, effect: Effect) -> None:
        """Call the handler that fits the rows, while the job stays leased."""
        events = await self._events(job)
        handler = effect.put if events else effect.remove
        lease = Lease(partial(self._renew_own, job), self._lease, time.monotonic(), job.what, job)
        try:
            async with asyncio.timeout(effect.timeout), task_group() as group:
                holding = group.create_task(lease.hold())
                for event in events or [self._removal(job)]:
                    with contained("the handler"):
                        await handler(event)
                holding.cancel()
        except TimeoutError as error:
            raise DerivationFailedError(f"the handler took longer than {effect.timeout:g} s, or raised a TimeoutError") from error

    async def _events(self, job: LeasedJob) -> list[EffectEvent]:
        """Return the rows that hold the file of a job, without those whose files may not be read.

        Raises:
            ScanPendingError: A virus scanner has not judged it yet.
        """
        name = job.key.removeprefix(EFFECT)
        events: list[EffectEvent] = []
        async with self._pool.reading() as connection:
            for place, column in await self._references.find_holders(connection, job.location):
                if name not in effects_in(column):
                    continue
                keys = list(column.table.primary_key)
                found = select(*keys, as_stored(column, connection.dialect)).where(job_rows(place, column, job, connection))
                for *key, raw in await connection.execute(found, execution_options=job_options(place, column)):
                    if (value := value_of(raw, job.place)) is None:
                        continue
                    ref = StoredObjectRef.from_dict(value)
                    try:
                        require_scanned(ref)
                    except InfectedObjectError:
                        continue
                    events.append(EffectEvent(ref, f"{column.table.fullname}.{column.name}", tuple(key)))
        return events

    def _removal(self, job: LeasedJob) -> EffectEvent:
        return EffectEvent(StoredObjectRef.from_dict(json.loads(job.recipe)["ref"]), ".".join(job.address))

    async def _renew_own(self, job: LeasedJob) -> bool:
        """Renew the lease of a job; return whether it is still this worker's."""
        async with self._pool.writing() as connection:
            renewal = update(self._job).where(self._is_own(job)).values(due=clock(self._lease))
            return (await connection.execute(renewal)).rowcount == 1

    def _is_own(self, job: LeasedJob) -> Any:
        return (self._job.c.id == job.id) & (self._job.c.takeovers == job.takeovers)

    @again_after_deadlock
    async def _finish(self, job: LeasedJob) -> None:
        await self._write_own(job, delete(self._job))

    async def _update_own(self, job: LeasedJob, **values: Any) -> None:
        await self._write_own(job, update(self._job).values(values))

    async def _write_own(self, job: LeasedJob, written: Delete | Update) -> None:
        """Execute a statement on a job, or let it be due where a transaction has recorded it again: it is another one now."""
        async with self._pool.writing() as connection:
            result = await connection.execute(written.where(self._is_own(job), self._job.c.recipe == job.recipe))
            if result.rowcount == 0:
                released = update(self._job).where(self._is_own(job)).values(due=clock(), attempts=0, takeovers=0)
                await connection.execute(released)


def _note_of(column: Column[Any], name: str) -> str:
    digest = sha256("\n".join((column.table.fullname, column.name, name)).encode()).hexdigest()
    return f"{EFFECT}{digest[:32]}"
