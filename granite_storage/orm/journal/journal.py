"""The journal, which keeps objects and rows consistent through crashes of the process, the machine or the network."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import UUID

from sqlalchemy import Column, Connection, Engine
from sqlalchemy.exc import DBAPIError

from granite_storage._documentation import Page
from granite_storage._portal import enter_blocking, run_blocking
from granite_storage._tasks import contained, is_async_callable, run_bounded
from granite_storage._telemetry import fields_of, is_active, note_garbage, traced
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError, InvalidReferenceError, ObjectNotFoundError
from granite_storage.orm._interfaces import (
    Binding,
    Intent,
    JournalTables,
    active_bindings,
    are_triggers_declared,
    tables_of,
)
from granite_storage.orm._util import batches
from granite_storage.orm.journal.database import (
    JournalPool,
    KnownSchemas,
    accept_gap,
    beat,
    check_database,
    find_older_worker,
    note_retentions,
)
from granite_storage.orm.journal.deletes import PendingDelete, delete_id
from granite_storage.orm.journal.direct_uploads import Staging
from granite_storage.orm.journal.effects import EffectJobs, effects_of
from granite_storage.orm.journal.intents import GroupCommit, Intents, UploadLease
from granite_storage.orm.journal.jobs import JobQueue, report_jobs, retry_dead, variants_of
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.scans import ScanJobs
from granite_storage.orm.journal.sqlite import SidecarPool, SidecarReferences, SQLitePool
from granite_storage.orm.journal.tables import RecoveryReport
from granite_storage.orm.journal.triggers import find_trigger_problems, triggers_work
from granite_storage.orm.journal.variant_jobs import VariantJobs
from granite_storage.orm.journal.worker import Alarm, at_work
from granite_storage.refs import StoredObjectRef, iter_refs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from granite_storage._engine import PreparedUpload
    from granite_storage.manager import StorageManager


T = TypeVar("T")
Queue = TypeVar("Queue", bound=JobQueue)

logger: logging.Logger = logging.getLogger("granite_storage")

_HURRY = 1.0
_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between the looks at whether a server has rolled back what it was not asked to."""
_FAULTS = (BackendUnavailableError, ConfigurationError, DBAPIError)
_KINDS: Mapping[str, type[JobQueue]] = {
    "scanning the held objects": ScanJobs,
    "making the variants of the objects": VariantJobs,
    "calling the effects of the objects": EffectJobs,
}
"""What does the jobs of each kind, by the words for it."""
_JOB_LEASE = timedelta(minutes=2)
_RARELY = timedelta(days=1)
_IDLE_INTERVAL = timedelta(minutes=5)
_CHECK_CONCURRENCY = 8
_ADOPTED_AT_ONCE = 50
"""For how many objects a transaction of `adopt` waits for the storage; on SQLite no other one can write meanwhile."""


class StorageJournal:
    """Records in the application's database which objects are about to change, so that no crash loses or leaks one.

    Create one from the application's engine, and pass it to `bind_storage`. Its tables are declared by
    `journal_tables(Base.metadata)`. From then on

    - a committed ref always leads to an object with its bytes,
    - every other object is deleted eventually, whatever crashes and whenever: by `recover`, or by a `worker`,
    - and no object is deleted that a row refers to, or that a transaction in progress may refer to.

    It costs one commit on a separate connection for each flush that stores something, and a row for each deleted object.

    Args:
        engine: The application's engine, on PostgreSQL, MariaDB or SQLite, or one made for the journal that leads to the same
            database, such as one past a connection pooler. The journal makes a small pool of its own from it, with the same
            creator, arguments, events and `schema_translate_map`; disposing of the engine closes that as well.
        lease: How long an upload may go without renewal before a worker treats it as abandoned. It is renewed during the
            upload, so it may be shorter than an upload; an object stored by `Attachment.store` must be assigned to a row and
            flushed within it.
        pool_size: The most connections that it opens; in each event loop, where the engine has a `NullPool`.
        timeout: How long a session waits for the journal before it uploads, at most. It may hold a connection of its own
            meanwhile, so that many of them, and a pool or a server with no connection left, would wait for each other.
        sidecar: On SQLite, the path of the file with the intents of uploads, the same in every process; None for the path of the
            database with `-granite_storage` behind.
        one_machine: On SQLite, say that one machine alone uses a database on a network file system, and that its locks hold
            there.
        max_attempts: How often a delete fails before its object becomes a dead letter, which is logged and not retried. A
            worker's death is not a failure, unless as many workers in a row die of the same object.

    Raises:
        ConfigurationError: The database or the engine's pool cannot have a journal; the message says what to do instead.

    A flush with files raises `BackendUnavailableError` if the journal's database does not answer in time; nothing was uploaded
    then, and the transaction may be tried again.

    Example:
        ```python
        journal_tables(Base.metadata)
        journal = StorageJournal(engine, lease=timedelta(minutes=15))
        binding = bind_storage(Base, storage, journal=journal)
        ```
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine,
        *,
        lease: timedelta = timedelta(minutes=15),
        pool_size: int = 5,
        timeout: timedelta = timedelta(seconds=30),
        max_attempts: int = 12,
        sidecar: str | os.PathLike[str] | None = None,
        one_machine: bool = False,
    ) -> None:
        for argument, duration in (("lease", lease), ("timeout", timeout)):
            if not isinstance(duration, timedelta) or duration <= timedelta(0):
                raise ConfigurationError(f"a journal's {argument} must be a timedelta above 0, not {duration!r}")
        for argument, number in (("pool_size", pool_size), ("max_attempts", max_attempts)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"a journal's {argument} must be a number of at least 1, not {number!r}")
        self._pool = _open_pool(engine, pool_size, sidecar=sidecar, one_machine=one_machine)
        # For sessions, whose own transactions hold connections.
        self._bounded = self._pool.within(timeout.total_seconds())
        # For the end of a transaction: what it cannot lock soon is left to a worker.
        self._hurried = self._pool if self._pool.uploads is self._pool else self._pool.within(_HURRY)
        self._lease = lease
        self._max_attempts = max_attempts
        self._bindings: list[Binding] = []
        self._tables: JournalTables | None = None
        self._checked = False
        self._alarm = Alarm()
        self._callbacks: list[Callable[[], object]] = []
        self._commits = GroupCommit()
        self._schemas = KnownSchemas(self._bounded)

    @property
    def lease(self) -> timedelta:
        """How long the lease of an upload lasts without renewal."""
        return self._lease

    @property
    def tables(self) -> JournalTables:
        """Its tables.

        Raises:
            ConfigurationError: It was not passed to `bind_storage`.
        """
        if self._tables is None:
            raise ConfigurationError(
                "the journal belongs to no base yet: pass it to bind_storage(Base, manager, journal=...)", see=Page.JOURNAL
            )
        return self._tables

    @property
    def execution_options(self) -> dict[str, Any]:
        """The execution options with which a statement reaches its tables on any connection to their database.

        The `schema_translate_map` of its own engine says where they are, and never that of a session.
        """
        return self._pool.options

    @property
    def manager(self) -> StorageManager:
        """The manager of the objects; raises `ConfigurationError` if the journal is not bound yet."""
        if not self._bindings:
            raise ConfigurationError(
                "the journal belongs to no base: pass it to bind_storage(Base, manager, journal=...)", see=Page.JOURNAL
            )
        return self._bindings[-1].manager

    async def check(self) -> None:
        """Check that the database meets the requirements: tables, versions, privileges, storage engines, settings.

        `recover`, `worker` and the first upload call it themselves; call it at start-up to find problems early. Rows of a
        backend that the manager does not have, because it was renamed or removed, are kept, and logged as a warning. On SQLite a
        database in which no worker ever ran, beside a sidecar with which one did, is refused here, by `recover` and by `worker`;
        uploads into it go on.

        Raises:
            ConfigurationError: A requirement is not met; the message says what to do.
            BackendUnavailableError: The database does not answer in time, or on SQLite the disk of the sidecar is full.
        """
        await self._check()
        await self._require_known_database()

    async def _check(self) -> None:
        others = sorted({column.table for column in self._columns()}, key=str)
        may_hold = any(policy.may_hold for policy in self.manager.policies.values())
        has_jobs = may_hold or any(map(variants_of, self._columns())) or bool(effects_of(self._columns()))
        await check_database(self._bounded, self.tables, others, has_jobs=has_jobs)
        unknown = [await recovery.unknown_backends() for recovery in self._recoveries()]
        for backend in sorted(set[str]().union(*unknown)):
            logger.warning(
                "the journal keeps rows of the backend %r, which the manager does not have: its objects stay",
                backend,
                extra=fields_of(backend=backend),
            )
        if self._pool.is_postgresql or any(triggers_work(self._pool.dialect, item.metadata) for item in self._bindings):
            await note_retentions(self._bounded, self.tables, self.manager.policies.values())
            for problem in await self.find_trigger_problems():
                logger.warning("SQL that bypasses the sessions is not covered: %s", problem)
        self._checked = True

    async def find_trigger_problems(self) -> list[str]:
        """Return what is wrong with the triggers that `storage_triggers` declares, in words, table by table; `check` logs it.

        A trigger may be missing, from a partition that was made since, disabled, or of another version of the library. A worker
        of an older version beside them is a problem as well.
        """
        declared = [item.metadata for item in self._bindings if are_triggers_declared(item.metadata)]
        if not declared:
            return []

        def find(connection: Connection) -> list[str]:
            older = find_older_worker(connection, self.tables)
            found = [problem for item in dict.fromkeys(declared) for problem in find_trigger_problems(connection, item)]
            return list(dict.fromkeys(([] if older is None else [older]) + found))

        async with self._bounded.reading() as connection:
            return await connection.run_sync(find)

    async def adopt(self, refs: Iterable[StoredObjectRef]) -> None:
        """Let rows with refs from elsewhere be loaded, as by a COPY of a dump: without it triggers refuse them.

        It commits for each object, and for its variants, that it is to be deleted when the lease of an upload is over, unless a
        row refers to it by then. So load the rows within that time, and adopt only what belongs to this database: an object of
        another one would be deleted.

        Args:
            refs: The refs of the rows, with their variants; those that `iter_model_storage_refs` yields will do.

        Raises:
            InvalidReferenceError: One of them is not a `StoredObjectRef`.
            ObjectNotFoundError: An object does not exist; load none of the rows.
            StaleAttachmentError: A worker is deleting an object; load none of the rows.
            ConfigurationError: As `check`.
        """
        await self._ensure_checked()
        objects: dict[tuple[str, str], tuple[StoredObjectRef, str | None]] = {}
        for ref in refs:
            if not isinstance(ref, StoredObjectRef):
                raise InvalidReferenceError(f"adopt takes StoredObjectRefs, not {ref!r:.120}")
            for one in iter_refs(ref):
                place = (one.backend, one.location)
                if one is not ref or place not in objects:  # a variant may be listed by itself as well
                    objects[place] = (one, None if one is ref else ref.location)
        await self._require_objects([one for one, _ in objects.values()])
        seconds = self._lease.total_seconds()
        for batch in batches(objects.items(), _ADOPTED_AT_ONCE):
            pending = [PendingDelete(*place, seconds, source) for place, (_, source) in batch]
            # A worker may have deleted one in the meantime.
            still_there = partial(self._require_objects, [one for _, (one, _) in batch])
            await self.intents.adopt(pending, self._lease, still_there)

    async def _require_objects(self, refs: Sequence[StoredObjectRef]) -> None:
        found = await run_bounded(refs, self.manager.exists, _CHECK_CONCURRENCY)
        missing = [ref for ref, is_there in zip(refs, found, strict=True) if not is_there]
        if not missing:
            return
        raise ObjectNotFoundError(
            f"the object at {missing[0].location!r} does not exist, so its row cannot be loaded ({len(missing)} of the objects to"
            " adopt are missing)",
            backend=missing[0].backend,
            location=missing[0].location,
        )

    async def recover(self) -> RecoveryReport:
        """Run recovery once: delete uploads that no transaction has consumed, and displaced objects that are due.

        Held objects that are due are scanned, and the verdicts are written into their rows. Variants that are due are made and
        recorded in their rows. Effects that are due are called. Any number of processes may do so at the same time. Failures
        are retried by later passes, at growing intervals.

        Raises:
            ConfigurationError: As `check`, or a table of the models cannot be found; nothing of a backend was deleted then.
        """
        await self._ensure_fit_for_workers()
        report = RecoveryReport()

        async def do_jobs(backend: str) -> RecoveryReport:
            # One after the other: on MariaDB a claim skips what another one is just looking at.
            done = RecoveryReport()
            for kind in _KINDS.values():
                done.add(await self._jobs(kind).run(backend))
            await self._jobs(VariantJobs).end_idle(backend)
            return done

        works = [partial(work, backend) for work in (self._recover, do_jobs) for backend in self.manager.backends]
        for done in await run_bounded(works, lambda work: work(), max(len(works), 1)):
            report.add(done)
        report.failed.clear()  # they are counted with what failed before
        for recovery in self._recoveries():
            await recovery.count_waiting(report)
        await report_jobs(self._pool, self.tables.job, report)
        await self._beat(_RARELY)
        return report

    @traced("recover")
    async def _recover(self, backend: str) -> RecoveryReport:
        report, recoveries = RecoveryReport(), self._recoveries()
        for recovery in recoveries:
            report.add(await recovery.run(backend))
        if is_active():
            note_garbage(max([await recovery.find_overdue(backend) for recovery in recoveries]), "pending", backend)
        return report

    async def _beat(self, within: timedelta) -> None:
        """Note that a worker is at work; in the rows' database first, which is lost if the sidecar alone says so."""
        await beat(self._pool, self.tables, within=within)
        if self._pool.uploads is not self._pool:
            await beat(self._pool.uploads, self._pool.upload_tables(self.tables), within=within)

    @asynccontextmanager
    async def worker(self, *, interval: timedelta = timedelta(seconds=30)) -> AsyncIterator[None]:
        """Run recovery periodically while the block runs, as a task of an application's lifespan.

        A pass runs soon after a transaction of this process has left work, and every interval for other processes. Every
        backend has its own loop, so that a slow or dead one does not delay the others, and further loops for the scans of held
        objects, which may take minutes, for variants, and for effects. Failures are logged, and the loops continue. They end
        promptly with the block; any other worker resumes their unfinished work. If the base is bound again meanwhile, the
        worker continues with the new manager, for the backends that it began with.

        Args:
            interval: The pause between two passes, give or take a quarter.

        Raises:
            ConfigurationError: As `check`, before the block begins.

        Example:
            ```python
            @asynccontextmanager
            async def lifespan(app):
                async with storage, journal.worker():
                    yield
            ```
        """
        if not isinstance(interval, timedelta) or interval <= timedelta(0):
            raise ConfigurationError(f"a worker's interval must be a timedelta above 0, not {interval!r}")
        await self._ensure_fit_for_workers()

        async def do(work: Callable[[str], Awaitable[object]], backend: str) -> None:
            if backend in self.manager.backends:  # the base may have been bound to another manager meanwhile
                await work(backend)

        async def recover(backend: str) -> None:
            await do(self._recover, backend)
            await self._beat(interval)  # in any case: the collector stops after a silence

        async def do_jobs(kind: type[JobQueue], backend: str) -> None:
            await self._jobs(kind).run(backend)

        async def end_idle_jobs(backend: str) -> None:
            await self._jobs(VariantJobs).end_idle(backend)

        works: dict[str, Callable[[str], Awaitable[None]]] = {"recovering the objects": recover}
        works |= {what: partial(do, partial(do_jobs, kind)) for what, kind in _KINDS.items()}
        loops = [(what, work, interval, self._alarm) for what, work in works.items()]
        # No transaction waits for it, and it looks at all of them.
        loops.append(("ending the idle jobs", partial(do, end_idle_jobs), max(interval, _IDLE_INTERVAL), Alarm()))
        async with AsyncExitStack() as stack:
            for what, work, pause, alarm in loops:
                await stack.enter_async_context(at_work(self.manager.backends, work, pause, alarm, what=what))
            yield

    async def retry_dead_letters(self) -> int:
        """Make dead letters due again for the next pass, deletes, scans, variants and effects; return how many there are."""
        await self._ensure_checked()
        retried = [await recovery.retry_dead_letters() for recovery in self._recoveries()]
        return sum(retried) + await retry_dead(self._pool, self.tables.job)

    async def count_jobs(self) -> RecoveryReport:
        """Count the jobs that are still to be done, and those that have failed for good, without doing any."""
        report = RecoveryReport()
        await report_jobs(self._pool, self.tables.job, report)
        return report

    async def allow_restored_database(self) -> None:
        """Confirm that this is the right database, though no worker ran in it for long, as after a restore from a backup.

        Until then the garbage collector deletes nothing.
        """
        await self._ensure_checked()
        await accept_gap(self._pool, self.tables, within=_RARELY)

    @property
    def sync(self) -> SyncJournal:
        """The same methods for synchronous code, in threads without a running event loop."""
        return SyncJournal(self)

    async def aclose(self) -> None:
        """Close the journal's connections; idempotent. Disposing of the engine does so as well."""
        await self._pool.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<StorageJournal lease={self._lease}>"

    @property
    def sidecar(self) -> SidecarPool | None:
        """The file with the intents of uploads, on SQLite."""
        return self._pool.uploads if isinstance(self._pool, SQLitePool) else None

    @property
    def intents(self) -> Intents:
        """The operations of transactions on it; for the session hooks."""
        return Intents(self._bounded, self.tables, self._commits, self._note_schemas)

    def _note_schemas(self, connection: Connection) -> None:
        self._schemas.make_known(connection, self.tables, self._columns)

    def retention_of(self, ref: StoredObjectRef) -> timedelta:
        """Return the retention of an object: that of its policy, or the longest of all if the policy no longer exists."""
        policies = self.manager.policies
        own = policies.get(ref.storage_key)
        return own.retention if own is not None else max((policy.retention for policy in policies.values()), default=timedelta(0))

    async def begin_uploads(self, uploads: Sequence[PreparedUpload]) -> UploadLease:
        """Commit the intents of uploads durably; nothing may be stored before this has returned."""
        await self._ensure_checked()
        begun = time.monotonic()
        places = [(upload.policy.backend_key, upload.location, upload.source) for upload in uploads]
        ids = await self.intents.record(places, self._lease)
        return UploadLease(self.intents, ids, self._lease, begun)

    async def staging(self) -> Staging:
        """Return what keeps the intents of the objects that clients store directly."""
        await self._ensure_checked()
        return Staging(self._bounded, self.tables, self._references_by(self._bounded), self._lease)

    def delete_intent(self, backend: str, location: str) -> Intent:
        """Return the intent of the pending delete of a displaced object; two rows that share the object have one intent."""
        return Intent(self, delete_id(backend, location), deletes=True)

    def wake_workers(self) -> None:
        """Wake the workers of this process, because a transaction has left work for them."""
        self._alarm.ring()
        for callback in self._callbacks:
            try:
                with contained("a callback of on_work"):
                    callback()
            except Exception:
                logger.exception("a callback of on_work failed; the next pass of a worker processes the pending work")

    def on_work(self, callback: Callable[[], object]) -> Callable[[], object]:
        """Call a function after each commit of this process that leaves work for a worker: the place to wake a task queue.

        It is called in the thread of the session and, if that is asynchronous, on its event loop, so it must not block. It is
        only a hint: if the process dies before the call, the next `recover` does the work. The function is returned, so
        `on_work` may be used as a decorator.

        Example:
            ```python
            @journal.on_work
            def wake():
                recover_files.delay()  # a task that calls journal.recover()
            ```
        """
        if not callable(callback) or is_async_callable(callback):
            is_async = ", which is async: nothing would await it" if callable(callback) else ""
            raise ConfigurationError(f"on_work takes a function without arguments, not {callback!r}{is_async}")
        self._callbacks.append(callback)
        return callback

    async def variant_jobs(self) -> VariantJobs:
        """Return what makes variants of the objects of committed rows."""
        await self._ensure_checked()
        return self._jobs(VariantJobs)

    async def effect_jobs(self) -> EffectJobs:
        """Return what calls effects for the files of committed rows."""
        await self._ensure_checked()
        return self._jobs(EffectJobs)

    async def settle(self, ids: Sequence[UUID]) -> None:
        """Delete at once the objects that a rolled-back transaction has stored; locked intents are left to a worker.

        A worker's next pass deletes them where the database is locked by others now; without that they stay for a lease.
        """
        try:
            locked = await self._settle(ids)
        except _FAULTS:
            with suppress(*_FAULTS):  # the lease ends by itself then
                await self.intents.renew(ids, timedelta(0))
                self._alarm.ring()
            if self.sidecar is not None:  # which waits for the session's own lock on the rows
                self.settle_soon(ids)
            raise
        if locked:
            self.settle_soon(locked)

    async def _settle(self, ids: Sequence[UUID]) -> list[UUID]:
        """Delete objects as `settle` does; return the intents that are locked still."""
        locked = [await recovery.settle(ids) for recovery in self._recoveries(self._hurried)]
        return sorted(set[UUID]().union(*locked))

    def settle_soon(self, ids: Sequence[UUID]) -> None:
        """Delete such objects once their intents are free, without waiting for it.

        The server takes a while to roll back the transaction of a connection that was dropped. What stays locked for some seconds
        stays for a lease, and so does what the end of the event loop leaves.
        """
        self._pool.run_aside(self._settle_with_retries(ids))

    async def _settle_with_retries(self, ids: Sequence[UUID]) -> None:
        for pause in _PAUSES:
            await asyncio.sleep(pause)
            with suppress(*_FAULTS):
                ids = await self._settle(ids)
            if not ids:
                return
        logger.warning("%d objects of an ended transaction are left to the journal's worker", len(ids))

    async def discard(self, ref: StoredObjectRef) -> None:
        """Delete an object that no row can refer to, under a new intent, since its own may be gone."""
        await self.settle([await self.intents.note_delete(ref)])

    def bind(self, binding: Binding) -> None:
        """Serve a binding; several bases may share a journal, if they share the manager and the tables.

        Raises:
            ConfigurationError: They do not, or the tables are not declared.
        """
        tables = tables_of(binding.metadata)
        if tables is None:
            raise ConfigurationError(
                "the journal's tables are not declared: call journal_tables(Base.metadata) beside the models, and create them"
                " with the models' own tables"
            )
        if self._bindings and (self.manager is not binding.manager or self.tables is not tables):
            raise ConfigurationError("a journal serves one manager and one set of tables: create another one for another base")
        effects_of([*self._columns(), *binding.ref_columns()])
        self._bindings.append(binding)
        self._tables = tables
        self._checked = False

    def release(self, binding: Binding) -> None:
        """Stop serving a binding."""
        if binding in self._bindings:
            self._bindings.remove(binding)

    async def _ensure_checked(self) -> None:
        if not self._checked:
            await self._check()

    async def _ensure_fit_for_workers(self) -> None:
        await self._ensure_checked()
        await self._require_known_database()

    async def _require_known_database(self) -> None:
        if self.sidecar is not None:
            async with self._pool.reading() as connection:
                await self.sidecar.require_beat(connection, self.tables)

    def _columns(self) -> list[Column[Any]]:
        columns = [column for binding in self._bindings for column in binding.ref_columns()]
        return list(dict.fromkeys(columns))

    def _references_by(self, pool: JournalPool, kind: Callable[..., References] = References) -> References:
        own = set(self._bindings)
        others = [column for binding in active_bindings() if binding not in own for column in binding.ref_columns()]
        return kind(pool, self.tables, self._columns(), list(dict.fromkeys(others)))

    def _jobs(self, kind: type[Queue]) -> Queue:
        return kind(
            self._pool,
            self.manager,
            self._references_by(self._pool),
            self._columns(),
            self,
            lease=min(self._lease, _JOB_LEASE),
            max_attempts=self._max_attempts,
        )

    def _recoveries(self, pool: JournalPool | None = None) -> list[Recovery]:
        """Return what takes over intents; on SQLite those of uploads are in another file than those of deletes."""
        pool = self._pool if pool is None else pool
        make = partial(Recovery, manager=self.manager, lease=self._lease, max_attempts=self._max_attempts)
        of_rows = make(pool, self.tables, references=self._references_by(pool))
        if pool.uploads is pool:
            return [of_rows]
        references = self._references_by(pool, SidecarReferences)
        return [make(pool.uploads, pool.upload_tables(self.tables), references=references), of_rows]


def _open_pool(
    engine: AsyncEngine | Engine, size: int, *, sidecar: str | os.PathLike[str] | None, one_machine: bool
) -> JournalPool:
    if getattr(getattr(engine, "dialect", None), "name", None) == "sqlite":
        return SQLitePool(engine, size, sidecar=sidecar, one_machine=one_machine)
    if sidecar is not None or one_machine:
        raise ConfigurationError("a journal's sidecar and one_machine are for SQLite only: omit them")
    return JournalPool(engine, size)


class SyncJournal:
    """The methods of a `StorageJournal` for synchronous code: `journal.sync.recover()`.

    Each does what the verb of the same name does; see `granite_storage.manager.SyncStorage`.
    """

    def __init__(self, journal: StorageJournal) -> None:
        self._journal = journal

    def check(self) -> None:
        """Check that the database meets the journal's requirements; see `StorageJournal.check`."""
        self._run(self._journal.check(), "check")

    def recover(self) -> RecoveryReport:
        """Do once all that is due; see `StorageJournal.recover`."""
        return self._run(self._journal.recover(), "recover")

    def worker(self, *, interval: timedelta = timedelta(seconds=30)) -> AbstractContextManager[None]:
        """Recover again and again while the block runs, on the library's own event loop; see `StorageJournal.worker`."""
        awaited = "'async with journal.worker(...)'"
        return enter_blocking(self._journal.worker(interval=interval), "journal.sync.worker", awaited)

    def adopt(self, refs: Iterable[StoredObjectRef]) -> None:
        """Let rows with refs from elsewhere be loaded; see `StorageJournal.adopt`."""
        self._run(self._journal.adopt(refs), "adopt")

    def retry_dead_letters(self) -> int:
        """Retry the dead letters; see `StorageJournal.retry_dead_letters`."""
        return self._run(self._journal.retry_dead_letters(), "retry_dead_letters")

    def allow_restored_database(self) -> None:
        """Confirm that this is the right database; see `StorageJournal.allow_restored_database`."""
        self._run(self._journal.allow_restored_database(), "allow_restored_database")

    def close(self) -> None:
        """Close the journal's connections; see `StorageJournal.aclose`."""
        run_blocking(self._journal.aclose(), "journal.sync.close", "'await journal.aclose()'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T], name: str) -> T:
        return run_blocking(work, f"journal.sync.{name}", f"'await journal.{name}(...)'")
