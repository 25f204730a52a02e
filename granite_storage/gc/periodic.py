"""The garbage collector as applications use it: one collection at a time, or again and again in one process of many."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from granite_storage._documentation import Page
from granite_storage._portal import blocking, enter_blocking
from granite_storage._tasks import background, repeat, shielded_cleanup
from granite_storage._telemetry import fields_of
from granite_storage.exceptions import ConfigurationError
from granite_storage.gc.collection import CollectionRun, CollectionScope, GarbageCollectionReport
from granite_storage.gc.database import DatabaseReferences
from granite_storage.gc.references import GivenReferences, IterReferences, ReferenceSource, require_callable
from granite_storage.manager import StorageManager
from granite_storage.orm._threaded import as_async_engine
from granite_storage.orm._util import without_pool

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

__all__ = ["Leadership", "StorageGarbageCollector", "SyncGarbageCollector"]


logger: logging.Logger = logging.getLogger("granite_storage")

_GRACE_PERIOD = timedelta(hours=24)
_JITTER = 0.1
_LONGEST_FIRST_PAUSE = 60.0
_LOCKS: dict[str, TextClause] = {
    "postgresql": text("SELECT pg_try_advisory_lock(hashtext('granite_storage'), hashtext('gc'))"),
    "mysql": text("SELECT GET_LOCK(CONCAT('granite_storage.gc.', MD5(DATABASE())), 0)"),
    "mariadb": text("SELECT GET_LOCK(CONCAT('granite_storage.gc.', MD5(DATABASE())), 0)"),
}
_PING = text("SELECT 1")


class StorageGarbageCollector:
    """Finds the objects of a policy that nothing refers to, and deletes them on request.

    It is the only part of the library that may delete objects that it has not stored, so it keeps every object in doubt:

    - an object counts as referenced if any reference has its location, or another location with its generated id, whatever
      backend and storage key it names, and if the `extra` of a ref names it;
    - references are those of every bound base in the database, of tables of the same name in other schemas, and of columns that
      only the database knows of;
    - an object also stays if its generated id is anywhere in a column of JSON, text or bytes that the role can read; the report
      names the column;
    - only what lies below the policy's prefix, by whole segments, and not below another policy's, can be an orphan, and only if
      its name is of the form that the library gives;
    - only an object older than the grace period, by the backend's clock, can be an orphan;
    - each batch is checked once more right before it is deleted, in one statement over every column and the journal;
    - a run that would delete more than `max_deleted_share` of what it has scanned deletes nothing, and so does one that finds no
      reference to anything there, a value that is not a reference, one to an unknown backend or to another store than its
      backend leads to, another backend of the manager on the same place, or a local folder without its marker.

    Memory does not grow with the number of objects; lists are kept on disk, where `tempfile` keeps its files.

    Args:
        manager: The manager, whose backends have the objects.
        iter_references: A callable that returns an iterable or an async iterable of all references, read again on each call;
            None among them is skipped. For applications without attachment columns.
        binding: The result of `bind_storage(..., session_factory=...)`, whose columns of refs are found automatically. Pass
            either `binding` or `iter_references`.
        grace_period: The age that an object must have. Without a journal it must be longer than any upload with its transaction.
        max_deleted_share: The largest part of the scanned objects that one run may delete, from 0 to 1.

    Raises:
        ConfigurationError: The arguments are invalid.

    Example:
        ```python
        collector = StorageGarbageCollector(storage, binding=binding)
        report = await collector.collect(storage_key="documents")
        ```
    """

    def __init__(
        self,
        manager: StorageManager,
        iter_references: IterReferences | None = None,
        *,
        binding: StorageBinding | None = None,
        grace_period: timedelta = _GRACE_PERIOD,
        max_deleted_share: float = 0.25,
    ) -> None:
        if not isinstance(manager, StorageManager):
            raise ConfigurationError(f"manager must be a StorageManager, not {type(manager).__name__}")
        if binding is not None and binding.manager is not manager:
            raise ConfigurationError("the binding has another manager than the garbage collector: pass binding.manager")
        _require_limits(grace_period, max_deleted_share)
        self._manager = manager
        self._binding = binding
        self._source = _source(manager, iter_references, binding)
        self._grace_period = grace_period
        self._max_deleted_share = float(max_deleted_share)

    async def collect(
        self, *, storage_key: str, dry_run: bool = True, allow_restored_database: bool = False, allow_no_references: bool = False
    ) -> GarbageCollectionReport:
        """Collect once.

        Any number of processes may do so at the same time, while the application keeps running. If a run is cancelled, killed
        or fails, deleted objects stay deleted, and nothing else is changed; the next run completes the work.

        Args:
            storage_key: The policy whose objects are collected.
            dry_run: Whether orphans are only counted; `report.refusal` then says why a run that deletes would be refused.
            allow_restored_database: Go on despite a gap in the heartbeat of the journal's workers, once you know that the
                database is the right one.
            allow_no_references: Go on where nothing refers to any of the objects.

        Returns:
            The results.

        Raises:
            UnknownPolicyError: There is no such policy.
            CollectionRefusedError: Nothing was deleted, because the findings are implausible or unreliable.
            BackendError: The backend could not be listed, or is unavailable; objects that were deleted until then stay deleted.
        """
        return await self.collection(
            storage_key=storage_key,
            dry_run=dry_run,
            allow_restored_database=allow_restored_database,
            allow_no_references=allow_no_references,
        )

    def collection(
        self, *, storage_key: str, dry_run: bool = True, allow_restored_database: bool = False, allow_no_references: bool = False
    ) -> CollectionRun:
        """Return a job that works like `collect`; iterate over it for the orphans, read its report, or stop it.

        Arguments and errors are those of `collect`.
        """
        scope = CollectionScope.of(self._manager, storage_key)
        return CollectionRun(
            self._manager,
            scope,
            self._source(scope.backend),
            grace_period=self._grace_period,
            max_deleted_share=self._max_deleted_share,
            dry_run=dry_run,
            allow_restored_database=allow_restored_database,
            allow_no_references=allow_no_references,
        )

    @asynccontextmanager
    async def run_every(
        self, interval: timedelta, *, storage_keys: Sequence[str] | None = None, dry_run: bool = False
    ) -> AsyncIterator[None]:
        """Collect at an interval while the block runs, as a task of the application's lifespan.

        Of many processes on one PostgreSQL or MariaDB, one is the leader, by an advisory lock on a connection of its own, and
        another takes over when it ends; elsewhere each process collects, which is harmless. Errors are logged, and the next run
        follows. The task ends promptly with the block.

        Args:
            interval: The time from one collection to the next, within a tenth; the first one starts within a minute.
            storage_keys: The policies whose objects are collected; None for every policy.
            dry_run: Whether orphans are only counted and logged.

        Raises:
            UnknownPolicyError: There is no such policy.
            ConfigurationError: The interval is not above 0.

        Example:
            ```python
            async with storage, collector.run_every(timedelta(hours=6)):
                yield
            ```
        """
        if not isinstance(interval, timedelta) or interval <= timedelta(0):
            raise ConfigurationError(f"interval must be a timedelta above 0, not {interval!r}")
        keys = [
            self._manager._engine.policy(key).storage_key
            for key in (self._manager._engine.policies if storage_keys is None else storage_keys)
        ]

        async def collect(storage_key: str) -> GarbageCollectionReport:
            return await self.collect(storage_key=storage_key, dry_run=dry_run)

        async with background(_collect_forever(keys, collect, interval.total_seconds(), Leadership(self._binding))):
            yield

    @property
    def sync(self) -> SyncGarbageCollector:
        """The same methods for synchronous code, in threads without a running event loop."""
        return SyncGarbageCollector(self)

    def __repr__(self) -> str:
        return f"<StorageGarbageCollector grace_period={self._grace_period} max_deleted_share={self._max_deleted_share}>"


class SyncGarbageCollector:
    """The methods of a `StorageGarbageCollector` for synchronous code: `collector.sync.collect(...)`."""

    def __init__(self, collector: StorageGarbageCollector) -> None:
        self._collector = collector

    collect = blocking("collector", "_collector", StorageGarbageCollector.collect)

    def run_every(
        self, interval: timedelta, *, storage_keys: Sequence[str] | None = None, dry_run: bool = False
    ) -> AbstractContextManager[None]:
        """Collect at an interval while the block runs; see `StorageGarbageCollector.run_every`."""
        running = self._collector.run_every(interval, storage_keys=storage_keys, dry_run=dry_run)
        return enter_blocking(running, "collector.sync.run_every", "'async with collector.run_every(...)'")


def _source(
    manager: StorageManager, iter_references: IterReferences | None, binding: StorageBinding | None
) -> Callable[[str], ReferenceSource]:
    """Return a factory of reference sources: each collection has its own."""
    if binding is None and iter_references is not None:
        require_callable(iter_references)
        return lambda _: GivenReferences(manager, iter_references)
    if binding is None or iter_references is not None:
        given = "neither" if binding is None else "both"
        raise ConfigurationError(f"the garbage collector needs either binding or iter_references, but {given} was given")
    if binding.session_factory is None:
        raise ConfigurationError(
            "the binding has no sessions to read its references with: pass session_factory=async_sessionmaker(...) to "
            "bind_storage()",
            see=Page.BINDING,
        )
    return partial(DatabaseReferences, binding, binding.session_factory)


def _require_limits(grace_period: object, max_deleted_share: object) -> None:
    if not isinstance(grace_period, timedelta) or grace_period < timedelta(0):
        raise ConfigurationError(f"grace_period must be a timedelta of at least 0, not {grace_period!r}")
    if isinstance(max_deleted_share, bool) or not isinstance(max_deleted_share, int | float) or not 0 <= max_deleted_share <= 1:
        raise ConfigurationError(f"max_deleted_share must be a number from 0 to 1, not {max_deleted_share!r}")


# Collecting again and again, for as long as an application runs.


async def _collect_forever(
    storage_keys: Sequence[str],
    collect: Callable[[str], Awaitable[GarbageCollectionReport]],
    seconds: float,
    leadership: Leadership,
) -> None:
    async def collect_as_leader() -> None:
        if await leadership.acquire():
            await _collect_all(storage_keys, collect)

    # Processes that began together would all begin to collect together.
    await asyncio.sleep(random.uniform(0, min(seconds, _LONGEST_FIRST_PAUSE)))  # noqa: S311  # not a secret
    try:
        await repeat(collect_as_leader, seconds, "finding out whether this process is to collect garbage", jitter=_JITTER)
    finally:
        await leadership.release()


async def _collect_all(storage_keys: Sequence[str], collect: Callable[[str], Awaitable[GarbageCollectionReport]]) -> None:
    for storage_key in storage_keys:
        try:
            report = await collect(storage_key)
        except Exception:
            said = fields_of(storage_key=storage_key)
            logger.exception("collecting the garbage of %r failed and will be retried", storage_key, extra=said)
            continue
        logger.info(
            "garbage of %r: %d objects scanned, %d orphans, %d deleted, %d failed, %d dangling references",
            storage_key,
            report.scanned,
            report.orphaned,
            report.deleted,
            report.failed,
            len(report.dangling),
            extra=fields_of(report),
        )


# One collector among many processes: who has the database's advisory lock.
#
# It saves work and makes nothing safe: two collectors at once are harmless, so a lock that is lost with its connection, or
# that a connection pooler gives to two, does no harm.


class Leadership:
    """The lock of one process, once it has it, on a connection of its own.

    Args:
        binding: The binding whose database has the lock; None where every process is a leader.
    """

    def __init__(self, binding: StorageBinding | None) -> None:
        self._binding = binding
        self._connection: AsyncConnection | None = None

    async def acquire(self) -> bool:
        """Return whether this process is the leader; become it where no other process is."""
        engine = None if self._binding is None else _engine_of(self._binding)
        lock = None if engine is None else _LOCKS.get(engine.dialect.name)
        if engine is None or lock is None:
            return True
        if self._connection is not None and await _is_alive(self._connection):
            return True
        await self.release()
        return await self._try(engine, lock)

    async def release(self) -> None:
        """Let another process become the leader; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await shielded_cleanup(connection.close(), "closing the connection of the garbage collector's lock")

    async def _try(self, engine: AsyncEngine, lock: TextClause) -> bool:
        connection = await engine.connect()
        try:
            is_leader = bool((await connection.execute(lock)).scalar_one())
            await connection.commit()
            if is_leader:
                self._connection = connection
        finally:
            if self._connection is not connection:
                await shielded_cleanup(connection.close(), "closing a connection that has no lock")
        return is_leader


def _engine_of(binding: StorageBinding) -> AsyncEngine | None:
    table = next(iter(binding.metadata.tables.values()), None)
    if binding.session_factory is None or table is None:
        return None
    return as_async_engine(without_pool(binding.session_factory().get_bind(clause=table).engine))


async def _is_alive(connection: AsyncConnection) -> bool:
    try:
        await connection.execute(_PING)
        await connection.commit()
    except SQLAlchemyError:
        return False
    return True
