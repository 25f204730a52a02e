"""The garbage collector: one collection of one policy's objects.

The objects are listed first, and the references read afterwards, so that an object whose row was inserted meanwhile is seen with
its reference. The join of both only nominates. Then the rest of the database is searched, once: an object that anything mentions
is no longer nominated. Before anything is deleted, each batch of nominees is re-checked, in one statement over the journal and
every column; otherwise an object could be deleted under a row to which a transaction has moved or restored its reference between
two statements. A durable commit follows: a crash of the database must not bring back a reference that the re-check did not find.
Only then storage is touched. Where so many are nominated that the run could be refused, all are re-checked and counted before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from granite_storage._documentation import Page
from granite_storage._engine import may_overlap
from granite_storage._jobs import MOST_KEPT, Run, require_mounted
from granite_storage._portal import enter_blocking, run_blocking
from granite_storage._tasks import background, contained, run_bounded
from granite_storage._telemetry import begun, fields_of, is_active, note_garbage
from granite_storage._words import count_of
from granite_storage.backends.base import SupportsCleanup, SupportsClock, closing_listing
from granite_storage.exceptions import (
    BackendError,
    BackendUnavailableError,
    CollectionRefusedError,
    ConfigurationError,
    InvalidLocationError,
    StorageError,
)
from granite_storage.gc.database import DatabaseReferences
from granite_storage.gc.merge import PAGE, Spool, join_pages
from granite_storage.gc.periodic import repeat_as_leader
from granite_storage.gc.references import GivenReferences, IterReferences, ReferenceSource
from granite_storage.locations import check_location, generated_time, matches_generated_name
from granite_storage.manager import StorageManager
from granite_storage.orm._util import batches
from granite_storage.orm.references import is_text

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

# The report of a collection.


class OrphanStatus(StrEnum):
    """The outcome for an orphan."""

    ORPHANED = "orphan"
    DELETED = "deleted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CollectedObject:
    """An orphan that a collection has found.

    Attributes:
        status: What became of it.
        backend: Its backend's key.
        location: Its address there.
        size: Its size in bytes.
        error: Why it could not be deleted.
    """

    status: OrphanStatus
    backend: str
    location: str
    size: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class DanglingReference:
    """A reference to an object that is missing.

    Attributes:
        backend: The backend's key.
        location: Where the object should be.
        message: What was found there.
    """

    backend: str
    location: str
    message: str


@dataclass(slots=True)
class GarbageCollectionReport:
    """The results of a collection, in objects and in bytes.

    Every object scanned is referenced, unmanaged, within the grace period, mentioned, referenced on the re-check, or an orphan.

    Attributes:
        storage_key: The policy whose objects were collected.
        backend: The backend that they are on.
        dry_run: Whether the run deletes nothing.
        scanned: How many objects were listed.
        scanned_bytes: Their bytes.
        referenced: How many of them are referenced.
        referenced_bytes: Their bytes.
        unmanaged: How many are unreferenced and have a name that this library does not generate; they are never touched.
        unmanaged_bytes: Their bytes.
        within_grace_period: How many are unreferenced and not older than the grace period.
        within_grace_period_bytes: Their bytes.
        mentioned: How many are unreferenced, but have their generated id in a column that is not one of refs: in JSON at any
            depth, in text, or in bytes. They are never deleted.
        mentioned_bytes: Their bytes.
        mentions: How many of them each column mentions, by its schema, table and name; the first thousand columns.
        unseen: The first thousand columns that may mention objects and could not be searched, or not in every row: those that
            this role may not read, those of other servers, those whose rows row-level security may hide, and those of a type
            that the collector does not know. They keep nothing.
        referenced_on_recheck: How many nothing referred to at first, but the re-check right before deleting found a row or an
            entry of the journal that does.
        referenced_on_recheck_bytes: Their bytes.
        orphaned: How many are orphans.
        orphaned_bytes: Their bytes.
        deleted: How many of them were deleted.
        deleted_bytes: Their bytes.
        failed: How many could not be deleted; each is logged, and a later run tries it again.
        failures: The first thousand of those.
        unfinished: How many stale temporary files and multipart uploads were removed, on the whole backend.
        unfinished_error: Why those could not be removed.
        dangling: The first thousand references found whose objects are missing; `verify` finds all.
        refusal: Why a run that is not dry would delete nothing; None where it would go ahead.
        complete: Whether the run has ended.
    """

    storage_key: str
    backend: str
    dry_run: bool
    scanned: int = 0
    scanned_bytes: int = 0
    referenced: int = 0
    referenced_bytes: int = 0
    unmanaged: int = 0
    unmanaged_bytes: int = 0
    within_grace_period: int = 0
    within_grace_period_bytes: int = 0
    mentioned: int = 0
    mentioned_bytes: int = 0
    mentions: dict[str, int] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    referenced_on_recheck: int = 0
    referenced_on_recheck_bytes: int = 0
    orphaned: int = 0
    orphaned_bytes: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    failed: int = 0
    failures: list[CollectedObject] = field(default_factory=list)
    unfinished: int = 0
    unfinished_error: str | None = None
    dangling: list[DanglingReference] = field(default_factory=list)
    refusal: str | None = None
    complete: bool = False

    @property
    def share(self) -> float:
        """The share of the scanned objects that are orphans, from 0 to 1."""
        return self.orphaned / self.scanned if self.scanned else 0.0


# Which objects a collection may touch: those below the policy's prefix, by whole segments, and not below another policy's.
#
# Two backends of a manager on one place are refused, by every name of it that is known, though a reference protects its object
# whatever backend it names.


_SLASHES_OF_OURS = 3


@dataclass(frozen=True, slots=True)
class CollectionScope:
    """What a collection may touch: the part of a backend that a policy's objects are in.

    Attributes:
        storage_key: The policy.
        backend: The key of the backend that it writes to.
        prefix: What its locations begin with: empty, or whole segments and a slash.
        others: The prefixes of other policies inside of it; wherever those write now, their old objects may still be here.
        sharing: The policies that write to the same place.
    """

    storage_key: str
    backend: str
    prefix: str
    others: tuple[str, ...]
    sharing: tuple[str, ...]

    @classmethod
    def of(cls, manager: StorageManager, storage_key: str) -> CollectionScope:
        """Return the scope of a policy; raise `UnknownPolicyError` for an unknown one."""
        policy = manager._engine.policy(storage_key)
        prefix = _as_prefix(policy.key_prefix)
        begins = {key: _as_prefix(other.key_prefix) for key, other in manager._engine.policies.items() if key != storage_key}
        others = sorted({begin for begin in begins.values() if begin != prefix and begin.startswith(prefix)})
        sharing = sorted(
            key
            for key, begin in begins.items()
            if begin == prefix and manager._engine.policies[key].backend_key == policy.backend_key
        )
        return cls(storage_key, policy.backend_key, prefix, tuple(others), tuple(sharing))

    def has(self, location: str) -> bool:
        """Return whether a location is in it."""
        return location.startswith(self.prefix) and not location.startswith(self.others)

    def manages(self, location: str) -> bool:
        """Return whether a location in it has the form that this library generates: model, entity, field and a generated name.

        A deeper location may belong to another program that shares the store and has a prefix of its own.
        """
        return (
            location.count("/", len(self.prefix)) == _SLASHES_OF_OURS and matches_generated_name(location) and is_valid(location)
        )


def is_valid(location: str) -> bool:
    """Return whether a location may be used at all."""
    try:
        check_location(location)
    except InvalidLocationError:
        return False
    return True


async def require_one_key(manager: StorageManager, backend_key: str) -> None:
    """Refuse a backend that shares its objects with another backend of the manager.

    Raises:
        CollectionRefusedError: Another backend leads to the same objects.
    """
    backend = manager._engine.backend(backend_key)
    for key, other in manager._engine.backends.items():
        if key != backend_key and await may_overlap(backend, other):
            raise CollectionRefusedError(
                f"the backends {backend_key!r} and {key!r} lead to the same objects, so it is unknown which of them a row "
                "refers to: give the manager one backend for each store and each policy its own prefix, and write that "
                "backend's key to all rows"
            )


def _as_prefix(prefix: str | None) -> str:
    return f"{prefix}/" if prefix else ""


# A run.


logger: logging.Logger = logging.getLogger("granite_storage")

Listed: TypeAlias = "tuple[str, int, bool]"
"""Location, size, and whether it is older than the grace period."""

_CONCURRENCY = 16
_BATCH = 500
_MOST_MISSING = 10 * MOST_KEPT
_MOST_SAID = 10
_LOOKED_FOR_AT_ONCE = 50_000
"""How many nominees one search of the rest of the database is for; they are in memory."""


class CollectionRun(Run[CollectedObject, GarbageCollectionReport]):
    """The result of `StorageGarbageCollector.collection`: iterate over it for the orphans, or await it for the report.

    A dry one yields each orphan as such, another one each as deleted or failed.
    """

    def __init__(
        self,
        collector: StorageGarbageCollector,
        storage_key: str,
        *,
        dry_run: bool,
        allow_restored_database: bool,
        allow_no_references: bool,
    ) -> None:
        self._scope = CollectionScope.of(collector._manager, storage_key)
        super().__init__(GarbageCollectionReport(storage_key, self._scope.backend, dry_run))
        self._collector = collector
        self._manager = collector._manager
        self._backend = self._manager._engine.backend(self._scope.backend)
        self._source = collector._source(self._scope.backend)
        self._allow_restored_database = allow_restored_database
        self._allow_no_references = allow_no_references
        self._missing: list[str] = []
        self._unmentioned = 0
        self._misses_objects = False

    def _items(self) -> AsyncGenerator[CollectedObject, None]:
        return self._observe() if is_active() else self._collect()

    async def _observe(self) -> AsyncGenerator[CollectedObject, None]:
        """Collect, and record it as an operation, with the age of the oldest orphan that it leaves."""
        now = oldest = time.time()
        with begun("collect", self._scope, is_current=False):
            async with aclosing(self._collect()) as items:
                async for item in items:
                    if item.status is not OrphanStatus.DELETED:
                        oldest = min(oldest, generated_time(item.location))
                    yield item
        note_garbage(now - oldest, "orphan", self._scope)

    async def _collect(self) -> AsyncGenerator[CollectedObject, None]:
        await require_one_key(self._manager, self._scope.backend)
        await self._source.require_fit(allow_restored_database=self._allow_restored_database)
        async with Spool() as listed, Spool() as nominees, Spool() as unmentioned:
            await self._list(listed)
            if self._stopped:
                return
            await self._nominate(listed, nominees)
            await self._require_mounted()
            await self._keep_mentioned(nominees, unmentioned)
            orphans = self._find_orphans(unmentioned) if self.report.dry_run else self._delete(unmentioned)
            async with aclosing(orphans):
                async for item in orphans:
                    yield item
        await self._find_dangling_references()
        if not self.report.dry_run and not self._stopped:
            await self._clean_up()
        self.report.complete = not self._stopped

    async def _list(self, listed: Spool) -> None:
        """Write the objects in the scope to a spool, until the run is stopped; refuse them out of order."""
        oldest, has, last = await self._now() - self._collector._grace_period, self._scope.has, ""
        page: list[Listed] = []
        async with closing_listing(self._backend.iter_objects(self._scope.prefix)) as objects:
            async for info in objects:
                location = info.location
                if location <= last and last:
                    raise CollectionRefusedError(
                        f"the backend {self.report.backend!r} lists {location[:120]!r} after {last[:120]!r}, which is not"
                        " the byte order of UTF-8: correct its iter_objects()"
                    )
                last = location
                if has(location):
                    page.append((location, info.size, info.modified < oldest))
                    if len(page) == PAGE:
                        await self._note_listed(listed, page)
                        page = []
                        if self._stopped:
                            return
        await self._note_listed(listed, page)

    async def _note_listed(self, listed: Spool, page: list[Listed]) -> None:
        await listed.write(page)
        self.report.scanned += len(page)
        self.report.scanned_bytes += sum(size for _, size, _ in page)
        self._on_progress()

    async def _nominate(self, listed: Spool, nominees: Spool) -> None:
        report = self.report
        page: list[tuple[str, int]] = []
        async with self._source.in_order() as references:
            async for referenced, unreferenced, missing in join_pages(listed.pages(), references):
                report.referenced += len(referenced)
                report.referenced_bytes += sum(size for _, size, _ in referenced)
                self._note_missing(missing)
                page += self._select_nominees(unreferenced)
                if len(page) >= PAGE:
                    await nominees.write(page)
                    page = []
        await nominees.write(page)
        if self._scope.sharing:
            self._source.require_complete(self._scope.sharing)

    async def _keep_mentioned(self, nominees: Spool, unmentioned: Spool) -> None:
        """Remove from the nominees what a column mentions that is not known to contain references."""
        waiting: list[tuple[str, int]] = []
        async for page in nominees.pages():
            waiting += page
            if len(waiting) >= _LOOKED_FOR_AT_ONCE:
                await self._search(waiting, unmentioned)
                waiting = []
            if self._stopped:
                return
        if waiting:
            await self._search(waiting, unmentioned)
        self._log_mentions()

    async def _search(self, nominees: Sequence[tuple[str, int]], unmentioned: Spool) -> None:
        by_column: dict[str, set[str]] = {}
        unseen: list[str] = []
        async with aclosing(self._source.find_mentions([location for location, _ in nominees])) as mentions:
            async for mention in mentions:
                if not mention.is_seen:
                    unseen.append(mention.column)
                if mention.locations:
                    by_column.setdefault(mention.column, set()).update(mention.locations)
                if self._stopped:
                    return
        mentioned = set[str]().union(*by_column.values())
        kept = [size for location, size in nominees if location in mentioned]
        self.report.mentioned += len(kept)
        self.report.mentioned_bytes += sum(kept)
        counts = self.report.mentions
        for column, locations in by_column.items():
            if column in counts or len(counts) < MOST_KEPT:
                counts[column] = counts.get(column, 0) + len(locations)
        self.report.unseen = sorted(unseen)[:MOST_KEPT]
        rest = [(location, size) for location, size in nominees if location not in mentioned]
        self._unmentioned += len(rest)
        for start in range(0, len(rest), PAGE):
            await unmentioned.write(rest[start : start + PAGE])

    def _log_mentions(self) -> None:
        report = self.report
        for column, number in report.mentions.items():
            logger.warning(
                "%s mentions %d objects of %r that no reference leads to; they are kept",
                column,
                number,
                report.storage_key,
                extra=fields_of(report),
            )
        if report.unseen:
            logger.warning(
                "columns that may mention objects of %r could not be searched, or not in every row: %s%s",
                report.storage_key,
                ", ".join(report.unseen[:_MOST_SAID]),
                ", ..." if len(report.unseen) > _MOST_SAID else "",
                extra=fields_of(report),
            )

    def _select_nominees(self, unreferenced: Sequence[Listed]) -> list[tuple[str, int]]:
        """Return what may be an orphan; count objects with names of others, and those within the grace period."""
        report, nominees = self.report, []
        for location, size, old in unreferenced:
            if not self._scope.manages(location):
                report.unmanaged += 1
                report.unmanaged_bytes += size
            elif not old:
                report.within_grace_period += 1
                report.within_grace_period_bytes += size
            else:
                nominees.append((location, size))
        return nominees

    def _note_missing(self, locations: set[str]) -> None:
        self._misses_objects = self._misses_objects or bool(locations)
        room = _MOST_MISSING - len(self._missing)
        if room > 0 and locations:
            concerned = [item for item in sorted(locations) if self._scope.has(item) or not is_valid(item)]
            self._missing += concerned[:room]

    async def _require_mounted(self) -> None:
        """Refuse a local folder without its marker, unless nothing was ever stored in it."""
        if not self.report.scanned and not self._misses_objects:  # without objects, any reference misses one
            return
        try:
            await require_mounted(self.report.backend, self._backend)
        except BackendUnavailableError as error:
            raise CollectionRefusedError(str(error), report=self.report) from error

    async def _find_orphans(self, nominees: Spool) -> AsyncGenerator[CollectedObject, None]:
        """Yield the orphans among the nominees, and set why a run that deletes would be refused."""
        async for orphans in self._recheck(nominees):
            self._note_orphans(orphans)
            for location, size in orphans:
                yield CollectedObject(OrphanStatus.ORPHANED, self.report.backend, location, size)
        self.report.refusal = self._refusal(self.report.orphaned)

    async def _delete(self, nominees: Spool) -> AsyncGenerator[CollectedObject, None]:
        """Delete the orphans, and yield each; they are counted before only where that could end in a refusal.

        Each re-check reads every reference. It takes nominees away and adds none.
        """
        if self._refusal(self._unmentioned) is not None:
            await self._require_few(nominees)
        async for orphans in self._recheck(nominees):
            self._note_orphans(orphans)
            if not orphans:
                continue
            await self._source.make_durable()
            for item in await self._remove(orphans):
                yield item
            self._on_progress()
        report = self.report
        logger.info(
            "deleted %d of %d orphans of %r", report.deleted, report.orphaned, report.storage_key, extra=fields_of(report)
        )

    async def _require_few(self, nominees: Spool) -> None:
        """Count the orphans; refuse to delete so many, or any where nothing is referenced."""
        async for orphans in self._recheck(nominees):
            self._note_orphans(orphans)
        self.report.refusal = self._refusal(self.report.orphaned)
        if self.report.refusal is not None:
            raise CollectionRefusedError(self.report.refusal, report=self.report)
        self.report.referenced_on_recheck = self.report.referenced_on_recheck_bytes = 0
        self.report.orphaned = self.report.orphaned_bytes = 0

    async def _recheck(self, nominees: Spool) -> AsyncIterator[list[tuple[str, int]]]:
        """Yield the nominees that nothing refers to at the moment of yielding, batch by batch."""
        async for page in nominees.pages():
            for start in range(0, len(page), self._source.batch_size):
                if self._stopped:
                    return
                batch = page[start : start + self._source.batch_size]
                held = await self._source.find_references([location for location, _ in batch])
                referenced = [size for location, size in batch if location in held]
                self.report.referenced_on_recheck += len(referenced)
                self.report.referenced_on_recheck_bytes += sum(referenced)
                yield [(location, size) for location, size in batch if location not in held]

    def _note_orphans(self, orphans: Sequence[tuple[str, int]]) -> None:
        self.report.orphaned += len(orphans)
        self.report.orphaned_bytes += sum(size for _, size in orphans)
        self._on_progress()

    def _refusal(self, orphaned: int) -> str | None:
        """Return why nothing should be deleted, where what was found can hardly be true with so many orphans."""
        report = self.report
        if not orphaned:
            return None
        if not report.referenced and not self._allow_no_references:
            among = "the only object" if report.scanned == 1 else f"any of the {report.scanned:,} objects"
            return (
                f"no reference leads to {among} of {report.storage_key!r}: the database is empty or the wrong one. If it is the"
                " right one, pass allow_no_references=True"
            )
        most = self._collector._max_deleted_share
        if (share := orphaned / report.scanned) > most:
            return (
                f"{orphaned:,} of the {count_of(report.scanned, 'object')} of {report.storage_key!r} ({share:.0%})"
                f" {'is an orphan' if orphaned == 1 else 'are orphans'}, more than the {most:.0%} that"
                " one run may delete. Check the orphans of a dry run; if they may go, raise max_deleted_share"
            )
        return None

    async def _find_dangling_references(self) -> None:
        """Report references without an object, at most a thousand, unless the disk was unmounted meanwhile.

        That a location was not listed proves nothing: the object and its row may have been stored since, or the row has released
        its object. So each object is looked for now, and the references to the missing ones are checked again.
        """
        found: list[DanglingReference] = []
        for batch in batches(self._missing, min(_BATCH, self._source.batch_size)):
            missing = await self._find_missing(batch)
            odd = {location for location in missing if not is_text(location)}  # no database can be asked for it
            asked = [location for location in missing if location not in odd]
            held = odd | (await self._source.find_references(asked) if asked else set())
            here = self.report.backend
            found += [DanglingReference(here, location, problem) for location, problem in missing.items() if location in held]
            if len(found) >= MOST_KEPT:
                break
        if found:
            await self._require_mounted()
        self.report.dangling = found[:MOST_KEPT]

    async def _find_missing(self, locations: Sequence[str]) -> dict[str, str]:
        """Return what is wrong at the locations without an object; one that cannot be read is not reported."""
        missing: dict[str, str] = {}

        async def look(location: str) -> None:
            try:
                if not await self._backend.exists(location):
                    missing[location] = "no object is there"
            except InvalidLocationError as error:
                missing[location] = str(error)
            except BackendError:
                return

        await run_bounded(locations, look, _CONCURRENCY)
        return missing

    async def _remove(self, orphans: Sequence[tuple[str, int]]) -> list[CollectedObject]:
        """Delete orphans; one that cannot be deleted stops no other.

        Raises:
            BackendUnavailableError: None could be deleted, because the backend is unavailable.
        """
        failures = await self._manager._engine.delete_many(self.report.backend, [location for location, _ in orphans])
        collected = [self._note_removed(location, size, failures.get(location)) for location, size in orphans]
        if len(failures) == len(orphans):
            first = next(iter(failures.values()))
            if isinstance(first, BackendUnavailableError):
                raise first
        return collected

    def _note_removed(self, location: str, size: int, error: StorageError | None) -> CollectedObject:
        report = self.report
        if error is None:
            report.deleted += 1
            report.deleted_bytes += size
            return CollectedObject(OrphanStatus.DELETED, report.backend, location, size)
        item = CollectedObject(OrphanStatus.FAILED, report.backend, location, size, f"{type(error).__name__}: {error}")
        report.failed += 1
        if len(report.failures) < MOST_KEPT:
            report.failures.append(item)
        logger.warning(
            "could not delete the orphan %r of the backend %r: %s",
            location,
            report.backend,
            item.error,
            extra=fields_of(report, location=location),
        )
        return item

    async def _clean_up(self) -> None:
        """Remove what unfinished writes left on the whole backend before the grace period."""
        if not isinstance(self._backend, SupportsCleanup):
            return
        try:
            self.report.unfinished = await self._backend.cleanup_incomplete(older_than=self._collector._grace_period)
        except BackendError as error:
            self.report.unfinished_error = f"{type(error).__name__}: {error}"
            logger.warning(
                "the remains of unfinished writes on the backend %r could not be removed: %s",
                self.report.backend,
                error,
                extra=fields_of(backend=self.report.backend),
            )

    async def _now(self) -> datetime:
        """Return the time by the clock that dates the objects."""
        return await self._backend.now() if isinstance(self._backend, SupportsClock) else datetime.now(UTC)


# The collector, as applications use it.


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

    Memory does not grow with the number of objects; long lists are kept on disk, where `tempfile` keeps its files.

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
        grace_period: timedelta = timedelta(hours=24),
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
        return CollectionRun(
            self,
            storage_key,
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

        async def collect_all() -> None:
            for key in keys:
                await self._collect_and_log(key, dry_run=dry_run)

        async with background(repeat_as_leader(collect_all, interval.total_seconds(), self._binding)):
            yield

    async def _collect_and_log(self, storage_key: str, *, dry_run: bool) -> None:
        try:
            with contained("a collection"):
                report = await self.collect(storage_key=storage_key, dry_run=dry_run)
        except Exception:
            fields = fields_of(storage_key=storage_key)
            logger.exception("collecting the garbage of %r failed and will be retried", storage_key, extra=fields)
            return
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

    def collect(
        self, *, storage_key: str, dry_run: bool = True, allow_restored_database: bool = False, allow_no_references: bool = False
    ) -> GarbageCollectionReport:
        """Collect once; see `StorageGarbageCollector.collect`."""
        work = self._collector.collect(
            storage_key=storage_key,
            dry_run=dry_run,
            allow_restored_database=allow_restored_database,
            allow_no_references=allow_no_references,
        )
        return run_blocking(work, "collector.sync.collect", "'await collector.collect(...)'")

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
        if not callable(iter_references):
            raise ConfigurationError(
                "iter_references must be a callable that returns the refs again on each call, not a"
                f" {type(iter_references).__name__}: refs that were read once are out of date when an object is deleted"
            )
        return partial(GivenReferences, manager, iter_references)
    if binding is None or iter_references is not None:
        given = "neither" if binding is None else "both"
        raise ConfigurationError(f"the garbage collector needs either binding or iter_references, but {given} was given")
    if (sessions := binding.own_sessions) is None:
        raise ConfigurationError(
            "the binding has no sessions to read its references with: pass session_factory=async_sessionmaker(...) to "
            "bind_storage()",
            see=Page.BINDING,
        )
    return partial(DatabaseReferences, binding, sessions)


def _require_limits(grace_period: object, max_deleted_share: object) -> None:
    if not isinstance(grace_period, timedelta) or grace_period < timedelta(0):
        raise ConfigurationError(f"grace_period must be a timedelta of at least 0, not {grace_period!r}")
    if isinstance(max_deleted_share, bool) or not isinstance(max_deleted_share, int | float) or not 0 <= max_deleted_share <= 1:
        raise ConfigurationError(f"max_deleted_share must be a number from 0 to 1, not {max_deleted_share!r}")
