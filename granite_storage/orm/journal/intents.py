"""The intents of uploads and deletes: committed before the storage is changed, and consumed by the transaction of the rows.

Why it is safe. An upload's intent is committed before its first byte is sent, so the journal names the object whatever crashes.
The transaction that writes the ref into a row deletes the intent, and that DELETE must match a row: otherwise a worker has fenced
the object and will delete it. Until the transaction ends, its lock on the intent's row excludes every worker, however long it
takes; this includes prepared transactions. If it, or a savepoint of it, is rolled back, the intent is there again. Clocks decide
only when garbage is deleted.

A snapshot that is older than the intent does not see it (REPEATABLE READ and SERIALIZABLE on PostgreSQL), so its DELETE matches
nothing. Then the transaction and the worker both insert the same key into `decision`, and the first one wins. A decision that
was purged could be inserted again, so the intent is re-checked afterwards, in a snapshot of its own: a decision of a worker
outlives its intent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeAlias
from uuid import UUID
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ARRAY,
    Column,
    Connection,
    Row,
    Select,
    String,
    Table,
    any_,
    bindparam,
    delete,
    func,
    select,
    text,
    type_coerce,
    update,
)
from sqlalchemy import Insert as InsertStatement
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.dml import ReturningDelete

from granite_storage._documentation import Page
from granite_storage._tasks import CLEANUP_TIMEOUT, wait_or_cancel
from granite_storage.backends.base import upload_begun
from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.locations import uuid7_hex
from granite_storage.orm._interfaces import CLAIMING_KEY, FORGET_CLAIMS, Intent, JournalTables
from granite_storage.orm._util import UNTRANSLATED, again_after_deadlock, batches, codes_of, insert_rows, quoted_name, wait
from granite_storage.orm.journal.database import JournalPool, effective
from granite_storage.orm.journal.deletes import PendingDelete, delete_id, has_own_id, nominate, renumber, take_over_ids
from granite_storage.orm.journal.effects import enqueue_effects
from granite_storage.orm.journal.jobs import Lease, enqueue_jobs, jobs_of
from granite_storage.orm.journal.tables import COMMIT, DELETE, UPLOAD, clock
from granite_storage.orm.journal.triggers import triggers_work
from granite_storage.refs import StoredObjectRef, iter_refs

UploadPlace: TypeAlias = tuple[str, str, str | None]
"""The backend and the location of an upload, and the location of its original if it is a variant."""
NewIntent: TypeAlias = tuple[UUID, UploadPlace]
Insert: TypeAlias = Callable[[Sequence[NewIntent]], Awaitable[None]]

_ADOPTION_PATIENCE, _ADOPTION_PAUSE = 5.0, 0.1
"""For how many seconds workers are waited for before an object is refused that is to be adopted, and how often one looks."""
_MOST_AT_ONCE = 64
_BATCH_SIZE = 500
_LEASE, _IDS = "lease", "ids"
"""Parameters of statements."""


def new_id() -> UUID:
    """Return a new id of an intent; ids increase with time, so that the index of the table grows at its end."""
    return UUID(uuid7_hex())


class GroupCommit:
    """Commits the intents of concurrent flushes together: the first flush writes for all that wait.

    The next writer is one of those that arrived in the meantime. A cancelled writer waits until it is known whether it has
    committed, because intents must not be written twice: a transaction consumes only one intent of an object. If that remains
    unknown, none of the flushes uploads.
    """

    def __init__(self) -> None:
        self._queues: WeakKeyDictionary[asyncio.AbstractEventLoop, _Queue] = WeakKeyDictionary()

    async def write(self, intents: Sequence[NewIntent], insert: Insert) -> None:
        """Return once the intents are committed."""
        queue = self._queues.setdefault(asyncio.get_running_loop(), _Queue())
        entry = _Entry(intents)
        queue.entries.append(entry)
        try:
            while not entry.written and entry.error is None:
                if queue.ended is None:
                    await _write_for_all(queue, insert)
                else:
                    await queue.ended.wait()
        finally:
            if entry in queue.entries:
                queue.entries.remove(entry)
        if entry.error is not None:
            raise entry.error


@dataclass(slots=True, eq=False)
class _Entry:
    intents: Sequence[NewIntent]
    written: bool = False
    error: BaseException | None = None


@dataclass(slots=True, eq=False)
class _Queue:
    entries: list[_Entry] = field(default_factory=list)
    # Set when the write in progress has ended, which wakes all that wait at once, and the first of the others writes; None
    # where none is in progress.
    ended: asyncio.Event | None = None


async def _write_for_all(queue: _Queue, insert: Insert) -> None:
    batch = queue.entries[:_MOST_AT_ONCE]
    queue.ended = ended = asyncio.Event()
    writing = asyncio.ensure_future(insert([intent for entry in batch for intent in entry.intents]))
    try:
        await asyncio.wait([writing])
    except asyncio.CancelledError:
        await wait_or_cancel(writing, CLEANUP_TIMEOUT)
        raise
    finally:
        error: BaseException | None = StaleAttachmentError(
            "it is unknown whether the journal has committed: try the transaction again"
        )
        if not writing.cancelled():
            error = writing.exception()
        for entry in batch:
            entry.written, entry.error = error is None, error
        queue.entries = [entry for entry in queue.entries if entry not in batch]
        queue.ended = None
        ended.set()


class Intents:
    """The operations of transactions on the journal.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        commits: What gathers the intents of sessions that flush at the same time.
        note_schemas: Is called with the connection of each transaction that writes into the journal.
    """

    def __init__(
        self, pool: JournalPool, tables: JournalTables, commits: GroupCommit, note_schemas: Callable[[Connection], None]
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._uploads = pool.uploads
        self._upload_intent = pool.upload_tables(tables).intent
        self._commits = commits
        self._note_schemas = note_schemas

    async def record(self, places: Sequence[UploadPlace], lease: timedelta) -> list[UUID]:
        """Commit the intents of uploads, durably, before anything is uploaded; all of them at once.

        Args:
            places: Where the objects will be.
            lease: How long the uploads have.

        Returns:
            Their ids, in the same order.
        """
        new = [(new_id(), place) for place in places]
        await self._commits.write(new, partial(self._insert, lease))
        return [item for item, _ in new]

    async def _insert(self, lease: timedelta, intents: Sequence[NewIntent]) -> None:
        rows = [
            {"id": item, "backend": backend, "location": location, "source": source, _LEASE: lease.total_seconds()}
            for item, (backend, location, source) in intents
        ]
        statement = _insertion(self._uploads.dialect, self._upload_intent)
        async with self._uploads.durable() as connection:
            for batch in batches(rows, _BATCH_SIZE):
                await connection.execute(statement, batch)

    async def renew(self, ids: Sequence[UUID], lease: timedelta) -> bool:
        """Renew the leases of uploads; return whether all of the intents are those of uploads, and still exist.

        With a lease of 0 they end, so that a worker's next pass takes them; a delete still waits for its retention.
        """
        intent = self._upload_intent
        uploads = update(intent).where(intent.c.id.in_(ids), intent.c.kind == UPLOAD)
        async with self._uploads.writing() as connection:
            result = await connection.execute(uploads.values(due=clock(lease.total_seconds())))
        return result.rowcount == len(ids)

    async def note_upload_id(self, intent_id: UUID, upload_id: str) -> None:
        """Save the id of a multipart upload, before its first part is sent."""
        intent = self._upload_intent
        async with self._uploads.durable() as connection:
            result = await connection.execute(update(intent).where(intent.c.id == intent_id).values(upload_id=upload_id))
        if result.rowcount != 1:
            raise StaleAttachmentError("the upload took longer than its lease and was reclaimed; it may be tried again")

    def claim(self, connection: Connection, ids: Sequence[UUID], locations: Sequence[str]) -> None:
        """Claim uploads whose intents the triggers do not see, before rows are written; only where there are triggers.

        On PostgreSQL a trigger sees no more than the transaction's snapshot does. So the transaction decides first, and records
        that in a setting. ROLLBACK TO SAVEPOINT reverts the setting together with the decision. On SQLite the intents are in
        another file. So the transaction records the locations until its rows are written; `consume` looks for the intents. On
        MariaDB a variable of the connection names them for as long, because triggers that looked for the intents would lock what
        the next upload needs. ROLLBACK does not revert it; those that listen to the connection do.

        Raises:
            StaleAttachmentError: A worker has decided against one of them, and its object goes.
        """
        if not self._has_triggers:
            return
        if self._pool.is_postgresql:
            self._claim_unseen(connection, ids)
        elif self._pool.is_mariadb:
            connection.info[CLAIMING_KEY] = True
            listed = "".join(f"\n{item}\n" for item in locations)
            connection.execute(_CLAIM_ON_MARIADB, {"locations": listed}, execution_options=UNTRANSLATED)
        elif self._has_sidecar:
            self._pool.require_here(connection)
            new = _claims(self._tables.decision)
            connection.execute(new, [{"location": item} for item in locations], execution_options=self._pool.options)

    def end_claim(self, connection: Connection, locations: Sequence[str]) -> None:
        """Delete what `claim` has recorded on MariaDB and SQLite, after the rows are written: it must not outlive them."""
        if locations and self._has_triggers and self._has_sidecar:
            decision = self._tables.decision
            for batch in batches(locations, _BATCH_SIZE):
                ended = delete(decision).where(type_coerce(decision.c.id, String()).in_(batch))
                connection.execute(ended, execution_options=self._pool.options)
        elif locations and self._has_triggers and self._pool.is_mariadb:
            connection.exec_driver_sql(FORGET_CLAIMS)
            connection.info.pop(CLAIMING_KEY, None)

    @property
    def _has_sidecar(self) -> bool:
        return self._uploads is not self._pool

    def _claim_unseen(self, connection: Connection, ids: Sequence[UUID]) -> None:
        if not ids or connection.execute(_LEVEL).scalar_one() == "read committed":
            return
        intent, options = self._tables.intent, self._pool.options
        seen = connection.execute(select(intent.c.id).where(intent.c.id.in_(ids)), execution_options=options).scalars()
        missing = set(ids).difference(seen) - self._claimed(connection)
        if not missing or self._leads_elsewhere(connection, missing):
            return
        found: dict[UUID, str] = {}
        if self._decide(connection, missing):
            found = wait(self._locations(missing))
        if found.keys() != missing:
            raise _reclaimed()
        texts = {"locations": "".join(f"\n{item}\n" for item in found.values()), "ids": "".join(f"{item} " for item in found)}
        connection.execute(_CLAIM, texts)

    def cancel(self, connection: Connection, moved: Sequence[StoredObjectRef]) -> None:
        """Delete the intents that triggers have recorded about objects that a row of the transaction still refers to."""
        if moved and self._has_triggers:
            intent, options = self._tables.intent, self._pool.options
            objects = {(one.backend, one.location) for ref in moved for one in iter_refs(ref)}
            if self._has_sidecar:
                take_over_ids(connection, intent, objects, options)
            own = sorted(delete_id(*one) for one in objects)
            are_own = intent.c.id.in_(own)
            if not self._pool.is_mariadb:
                connection.execute(delete(intent).where(are_own), execution_options=options)
                return
            # One by one, and only those that are there: a list, or what is not there, may lock other rows.
            for item in connection.execute(select(intent.c.id).where(are_own), execution_options=options).scalars().all():
                connection.execute(delete(intent).where(intent.c.id == item), execution_options=options)

    @property
    def _has_triggers(self) -> bool:
        return triggers_work(self._pool.dialect, self._tables.intent.metadata)

    def _claimed(self, connection: Connection) -> set[UUID]:
        """Return the uploads that `claim` has claimed in this transaction."""
        if not self._has_triggers or not self._pool.is_postgresql:
            return set()
        return {UUID(item) for item in (connection.execute(_CLAIMED).scalar_one() or "").split()}

    def consume(self, connection: Connection, ids: Sequence[UUID]) -> None:
        """Consume intents in the transaction that writes their refs into rows.

        It goes by the primary key alone: on MariaDB anything else would lock the intents of others.

        Raises:
            StaleAttachmentError: A worker has fenced one of them, and its object goes.
            ConfigurationError: The transaction does not reach the tables that the journal has written them to.
        """
        self._pool.require_here(connection)
        self._note_schemas(connection)
        intent, options = self._tables.intent, self._pool.options
        missing, consumed = set(ids), _consumption(self._pool.dialect, intent)
        # One by one on MariaDB, where a list may be looked for in the whole table.
        for batch in batches(ids, 1 if self._pool.is_mariadb else _BATCH_SIZE):
            found = connection.execute(consumed, {_IDS: batch}, execution_options=options)
            missing.difference_update(found.scalars())
        if missing and not self._pool.sees_uploads(connection, missing) and not self._claim(connection, missing):
            raise _reclaimed()

    def displace(self, connection: Connection, displaced: Iterable[tuple[StoredObjectRef, timedelta]]) -> None:
        """Record in the transaction that displaces objects that each is to be deleted after its retention, with its variants."""
        pending = [
            PendingDelete(one.backend, one.location, retention.total_seconds(), None if one is ref else ref.location)
            for ref, retention in displaced
            for one in iter_refs(ref)
        ]
        if pending:
            self._note_schemas(connection)
            nominate(connection, self._tables.intent, pending, self._pool.options)

    def enqueue(
        self,
        connection: Connection,
        written: Iterable[tuple[Column[Any], StoredObjectRef]],
        left: Iterable[tuple[Column[Any], StoredObjectRef]] = (),
    ) -> bool:
        """Record in the transaction that writes refs what a worker is to do for their objects; see `jobs_of`.

        Args:
            connection: The connection of the transaction.
            written: The columns and the refs that it writes to them.
            left: The columns and the refs that they may have lost, for the effects.

        Returns:
            Whether there is anything to do.
        """
        written, left = list(written), list(left)
        if not (written or left):
            return False
        jobs = [job for column, ref in written for job in jobs_of(column, ref)]
        enqueue_jobs(connection, self._tables.job, jobs, self._pool.options)
        has_effects = enqueue_effects(connection, self._tables.job, [*left, *written], self._pool.options)
        if jobs or has_effects:
            self._note_schemas(connection)
        return bool(jobs) or has_effects

    async def note_delete(self, ref: StoredObjectRef) -> UUID:
        """Commit, durably, the intent to delete an object at once that no row can refer to; return its id."""
        if self._has_sidecar:  # the rows' database may be locked by the session that has stored it
            return (await self.record([(ref.backend, ref.location, None)], timedelta(0)))[0]
        async with self._pool.durable() as connection:
            await connection.run_sync(self.displace, [(ref, timedelta(0))])
        return delete_id(ref.backend, ref.location)

    async def adopt(self, pending: Sequence[PendingDelete], lease: timedelta, still_there: Callable[[], Awaitable[None]]) -> None:
        """Commit, durably, that objects are to be deleted, unless rows that are loaded during a lease refer to them.

        A worker may have taken one of them over, only to find a row that refers to it; so that is waited for, for some seconds.

        Args:
            pending: The objects.
            lease: How long the intents of their uploads, where those are pending still, last from now on.
            still_there: Raises if one of them does not exist. It is called before the commit, when no worker can delete them any
                more: an intent that is committed is evidence for the rows of others, too.

        Raises:
            StaleAttachmentError: A worker is deleting one of them.
        """
        until = time.monotonic() + _ADOPTION_PATIENCE
        while True:
            try:
                return await self._adopt(pending, lease, still_there)
            except StaleAttachmentError:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(_ADOPTION_PAUSE)

    @again_after_deadlock
    async def _adopt(
        self, pending: Sequence[PendingDelete], lease: timedelta, still_there: Callable[[], Awaitable[None]]
    ) -> None:
        locations = sorted({item.location for item in pending})
        if self._uploads is not self._pool:
            async with self._uploads.durable() as connection:
                await self._keep(connection, self._pool.upload_tables(self._tables), locations, lease)
        async with self._pool.durable() as connection:
            await connection.run_sync(nominate, self._tables.intent, pending, self._pool.options)
            await self._keep(connection, self._tables, locations, lease)
            await still_there()

    async def _keep(self, connection: AsyncConnection, tables: JournalTables, locations: Sequence[str], lease: timedelta) -> None:
        """Renew the uploads of objects, then see that none of them is fenced: from then on none will be, during the lease."""
        intent, reclaim = tables.intent, tables.reclaim
        for batch in batches(locations, _BATCH_SIZE):
            end = clock(lease.total_seconds())
            # Those that last longer are locked as well: the rollback of their session could have them deleted before the commit.
            greatest = func.max if self._pool.dialect == "sqlite" else func.greatest
            uploads = update(intent).where(intent.c.location.in_(batch), intent.c.kind == UPLOAD)
            await connection.execute(uploads.values(due=greatest(intent.c.due, end)))
            fenced = await connection.scalars(select(reclaim.c.location).where(reclaim.c.location.in_(batch)).limit(1))
            if (location := fenced.first()) is not None:
                raise StaleAttachmentError(
                    f"a worker is deleting the object at {location!r}, so its row cannot be loaded; where its delete has failed,"
                    " granite-storage recover says why"
                )

    def find_deletes(
        self, connection: Connection, refs: Sequence[StoredObjectRef], *, without_fenced: bool = False
    ) -> dict[str, UUID]:
        """Return the intents of the pending deletes of objects, for a restore to consume.

        They are those that are committed, and those that triggers have recorded in the transaction of the connection. Those of
        earlier versions, of which there may be several for an object, become one.

        Args:
            connection: The connection of the transaction.
            refs: The objects.
            without_fenced: Whether to leave out those that a worker has taken over as well.

        Returns:
            The ids by the locations; an object without a pending delete is missing.
        """
        found = wait(self._find_committed(refs))
        # On SQLite the transaction may have given them other ids.
        unseen = refs if self._has_sidecar else [ref for ref in refs if ref.location not in found]
        if unseen and self._has_triggers:
            self._pool.require_here(connection)
            seen = connection.execute(self._deletes_of(unseen), execution_options=self._pool.options)
            found |= {row.location: row.id for row in _of_these(unseen, seen)}
        fenced: set[str] = wait(self._fenced(list(found))) if without_fenced and found else set()
        return {location: item for location, item in found.items() if location not in fenced}

    async def _find_committed(self, refs: Sequence[StoredObjectRef]) -> dict[str, UUID]:
        intent = self._tables.intent
        async with self._pool.reading() as connection:
            rows = _of_these(refs, await connection.execute(self._deletes_of(refs)))
        if self._has_sidecar:  # no other process can consume them there, and a session may hold the lock that renumbering needs
            return {row.location: row.id for row in rows}
        if others := [row.id for row in rows if has_own_id(row)]:
            async with self._pool.durable() as connection:
                outdated = select(intent).where(intent.c.id.in_(others)).with_for_update(skip_locked=True)
                await renumber(connection, intent, list(await connection.execute(outdated)))
        return {row.location: delete_id(row.backend, row.location) for row in rows}

    def _deletes_of(self, refs: Sequence[StoredObjectRef]) -> Select[Any]:
        intent = self._tables.intent
        return select(intent).where(intent.c.kind == DELETE, intent.c.location.in_([ref.location for ref in refs]))

    def require_unfenced(self, intents: Iterable[Intent]) -> None:
        """Raise if a worker is about to delete objects whose pending deletes the transaction has just consumed.

        It is seen after the intents were locked by consuming them. An intent of an object that is being deleted says nothing of
        its bytes: rows that shared it can have nominated it one after the other.

        Raises:
            StaleAttachmentError: A worker has taken one of the objects over.
        """
        locations: list[str | None] = [intent.location for intent in intents]
        fenced: set[str] = wait(self._fenced(locations)) if locations else set()
        if fenced:
            raise StaleAttachmentError(
                "an object that should be restored is being deleted, because another row has released it; the transaction may "
                "be tried again"
            )

    async def _fenced(self, locations: Sequence[str | None]) -> set[str]:
        reclaim = self._tables.reclaim
        async with self._pool.reading() as connection:
            found = await connection.execute(select(reclaim.c.location).where(reclaim.c.location.in_(locations)))
            return set(found.scalars())

    def _claim(self, connection: Connection, ids: set[UUID]) -> bool:
        """Decide for uploads that the transaction's snapshot does not see; return whether it was the first to decide on all."""
        if self._pool.uploads is not self._pool:
            return False
        if self._leads_elsewhere(connection, ids):
            raise ConfigurationError(
                f"the journal's table {self._tables.intent.fullname} is not where the session's transaction looks for it: either"
                " the session is on another database than the journal's engine, or a search_path leads it to another table of"
                " that name. One set of the journal's tables serves all schemas of a database: give it a schema of its own,"
                " journal_tables(Base.metadata, schema=...), and each database a journal",
                see=Page.SCHEMAS,
            )
        if not self._pool.is_postgresql or connection.execute(_LEVEL).scalar_one() == "read committed":
            return False
        ids = ids - self._claimed(connection)
        return not ids or (self._decide(connection, ids) and wait(self._are_there(ids)))

    def _decide(self, connection: Connection, ids: set[UUID]) -> bool:
        """Decide on uploads that the transaction's snapshot does not see; return whether it was the first to do so for all.

        Raises:
            StaleAttachmentError: A worker was, since the snapshot was made; the database then refuses to go on.
        """
        decision = self._tables.decision
        rows = [{"id": item, "outcome": COMMIT} for item in sorted(ids)]
        new = postgresql_insert(decision).values(rows).on_conflict_do_nothing().returning(decision.c.id)
        try:
            return len(connection.execute(new, execution_options=self._pool.options).all()) == len(ids)
        except DBAPIError as error:
            if _CONFLICT not in codes_of(error):
                raise
            raise _reclaimed() from error

    async def _are_there(self, ids: set[UUID]) -> bool:
        return (await self._locations(ids)).keys() == ids

    async def _locations(self, ids: set[UUID]) -> dict[UUID, str]:
        """Return the locations of those uploads that are pending now."""
        intent = self._tables.intent
        wanted = select(intent.c.id, intent.c.location).where(intent.c.id.in_(ids), intent.c.kind == UPLOAD)
        async with self._pool.reading() as connection:
            return {row.id: row.location for row in await connection.execute(wanted)}

    def _leads_elsewhere(self, connection: Connection, ids: set[UUID]) -> bool:
        """Return whether a transaction whose DELETE matched nothing resolves the table of intents to another table."""
        if self._pool.is_postgresql:
            return self._place(connection) != wait(self._own_place())
        return wait(self._are_there(ids))  # a DELETE sees what is newer than its snapshot there

    def _place(self, connection: Connection) -> tuple[Any, ...]:
        """Return the table and database of the intents on a connection to PostgreSQL, whatever its snapshot."""
        intent = self._tables.intent
        name = quoted_name(connection, effective(intent.schema, self._pool.translate_map), intent.name)
        return tuple(connection.execute(_PLACE, {"name": name}).one())

    async def _own_place(self) -> tuple[Any, ...]:
        async with self._pool.reading() as connection:
            return await connection.run_sync(self._place)


def _of_these(refs: Sequence[StoredObjectRef], found: Iterable[Row[Any]]) -> list[Row[Any]]:
    """Return the intents of objects among those of their locations, which other backends may have as well."""
    places = {(ref.backend, ref.location) for ref in refs}
    return [row for row in found if (row.backend, row.location) in places]


def _reclaimed() -> StaleAttachmentError:
    return StaleAttachmentError(
        "an object was reclaimed before its row could take it: it was stored longer ago than its lease, or was already"
        " being deleted; the transaction may be tried again"
    )


_CONFLICT = "40001"
_LEVEL = text("SELECT current_setting('transaction_isolation')")
_CLAIMED = text("SELECT current_setting('granite_storage.claimed_ids', true)")
_CLAIM = text("""
    SELECT
        set_config('granite_storage.claimed',
            concat(current_setting('granite_storage.claimed', true), CAST(:locations AS text)), true),
        set_config('granite_storage.claimed_ids',
            concat(current_setting('granite_storage.claimed_ids', true), CAST(:ids AS text)), true)
""")
_CLAIM_ON_MARIADB = text("SET @granite_storage_claimed = :locations")
_PLACE = text(
    "SELECT pg_postmaster_start_time(), (SELECT oid FROM pg_database WHERE datname = current_database()), to_regclass(:name)::oid"
)


@lru_cache(maxsize=64)  # transactions share the statements, and so their compiled forms
def _insertion(dialect: str, intent: Table) -> InsertStatement:
    return insert_rows(dialect, intent, {"kind": UPLOAD, "due": clock(_LEASE)})


@lru_cache(maxsize=64)
def _claims(decision: Table) -> InsertStatement:
    """Return the INSERT of locations in place of ids, where the triggers on SQLite look for them."""
    location = bindparam("location", type_=String())
    return decision.insert().prefix_with("OR IGNORE").values(id=location, outcome=COMMIT)


@lru_cache(maxsize=64)
def _consumption(dialect: str, intent: Table) -> ReturningDelete[tuple[UUID]]:
    own = intent.c.id
    if dialect == "postgresql":  # one parameter for all of them, where the other form is written out for each execution
        are_wanted = own == any_(bindparam(_IDS, type_=ARRAY(own.type)))
    else:
        are_wanted = own.in_(bindparam(_IDS, expanding=True))
    return delete(intent).where(are_wanted).returning(own)


class UploadLease(Lease):
    """The lease of the uploads of one flush.

    Args:
        intents: What renews it.
        ids: The intents of the uploads.
        duration: How long it is, from each renewal.
        begun: When it was asked for, by the monotonic clock: before the database began to count.
    """

    def __init__(self, intents: Intents, ids: Sequence[UUID], duration: timedelta, begun: float) -> None:
        super().__init__(partial(intents.renew, ids, duration), duration.total_seconds(), begun, "an upload")
        self._intents = intents
        self.ids = ids

    @contextmanager
    def begin(self, intent_id: UUID) -> Iterator[None]:
        """Upload one of the objects in a block; the id of a multipart upload is saved with its intent.

        Raises:
            StaleAttachmentError: The lease is over for the uploader: a worker may have deleted the object.
        """
        self.require()
        before = upload_begun.set(partial(self._intents.note_upload_id, intent_id))
        try:
            yield
        finally:
            upload_begun.reset(before)

    def _expired(self) -> StaleAttachmentError:
        return StaleAttachmentError(
            "the lease of an upload has expired before the upload ended; the transaction may be tried again"
        )
