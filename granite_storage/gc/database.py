"""References in the application's own database: every column of every base in it, and those that only the database knows of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Connection, MetaData, Table, union_all
from sqlalchemy.exc import DBAPIError, ProgrammingError

from granite_storage._engine import describe_mismatch, identities_of
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import checks, durability
from granite_storage.gc.columns import BoundBase, bound_bases, find_columns, require_one_database
from granite_storage.gc.mentions import Mention, find_mentions
from granite_storage.gc.merge import Reference, in_byte_order, merged
from granite_storage.gc.spool import PAGE, SortedSpool, temporary_file
from granite_storage.gc.statements import (
    HERE,
    UNKNOWN_BACKEND,
    UNKNOWN_IDENTITY,
    RefColumn,
    all_locations,
    counted_by_store,
    first_illegible,
    first_of,
)
from granite_storage.orm._batches import batches
from granite_storage.orm.discovery import find_tables, resolve
from granite_storage.orm.held import as_text, find_held, held_among, most_at_once, named_in, selected_extra
from granite_storage.orm.journal.tables import JournalTables, journal_tables, tables_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

    from granite_storage.orm.binding import StorageBinding

__all__ = ["DatabaseReferences"]

_COLUMNS_IN_A_STATEMENT = 100


class DatabaseReferences:
    """What the rows of a database refer to, and what the journals in it know of.

    The statements are Core ones, on connections of the application's own sessions: no loader criteria and no filter for
    soft-deleted rows hides anything, and no translation of schemas leads them astray. Each is a transaction of its own.

    Args:
        binding: What `bind_storage(..., sessions=...)` returned.
        sessions: Its sessions.
        backend: The key of the backend whose objects are in question.
    """

    def __init__(self, binding: StorageBinding, sessions: async_sessionmaker[AsyncSession], backend: str) -> None:
        self._binding = binding
        self._sessions = sessions
        self._backend = backend
        self._clause: Table | None = None
        self._dialect = ""
        self._identities: tuple[str, ...] | None = None
        self._ref_columns: list[RefColumn] = []
        self._journals: list[JournalTables] = []

    @property
    def at_a_time(self) -> int:
        """How many locations `find_held` takes."""
        return most_at_once(self._columns[:_COLUMNS_IN_A_STATEMENT], self._journals)

    async def require_fit(self, *, accept_restore: bool) -> None:
        """Refuse a database that could hide references or forget what it has committed, and one that may have been restored."""
        bases = await bound_bases(self._binding, self._backend)
        declared = [column for base in bases for column in base.columns]
        if not declared:
            raise CollectionRefusedError("no model has a column of refs: were all of them imported before bind_storage?")
        self._clause = declared[0].table
        journals = [tables for tables in (tables_of(base.binding.metadata) for base in bases) if tables is not None]
        of_journals = [table for tables in journals for table in (tables.intent, tables.reclaim)]
        require_one_database(self._sessions, [*(column.table for column in declared), *of_journals])
        self._identities = await identities_of(self._binding.manager.backend(self._backend))
        await self._look_at_the_database(bases)
        if accept_restore and self._binding.journal is not None:
            await self._binding.journal.accept_restore()
        for base in bases:
            if base.binding.journal is not None:
                async with self._connection(translated=True) as connection:
                    await checks.require_heartbeat(connection, base.binding.journal.tables)

    @asynccontextmanager
    async def in_order(self, backend: str) -> AsyncIterator[AsyncIterator[list[Reference]]]:
        """Give the locations of all references: streamed in order, and those of `extra` sorted on disk."""
        async with temporary_file() as file, AsyncExitStack() as stack:
            named = SortedSpool(file)
            async with aclosing(self._named()) as locations:
                async for location, is_here in locations:
                    await named.add(location, is_here)
            chunks = list(batches(self._ref_columns, _COLUMNS_IN_A_STATEMENT))
            if len(chunks) > 1:  # more streams at a time would each hold a connection
                for chunk in chunks:
                    async with aclosing(self._referred(chunk)) as pages:
                        async for page in pages:
                            for location, is_here in page:
                                await named.add(location, is_here)
                yield named.pages()
                return
            referred = await stack.enter_async_context(aclosing(self._referred(chunks[0])))
            yield merged(in_byte_order(referred, "the database's references"), named.pages())

    async def find_held(self, backend: str, locations: Sequence[str]) -> set[str]:
        """Return which of the locations are held, or have the generated id of what is, in a snapshot of this moment."""
        chunks = list(batches(self._columns, _COLUMNS_IN_A_STATEMENT))
        if len(chunks) == 1:
            async with self._connection() as connection:
                held = await find_held(connection, self._columns, locations, journals=self._journals, extra=True)
            return held_among(locations, (location for _, location in held))
        held = set()
        async with self._snapshot() as connection:
            for number, chunk in enumerate(chunks):
                journals = self._journals if number == 0 else []
                held |= await find_held(connection, chunk, locations, journals=journals, extra=True)
        return held_among(locations, (location for _, location in held))

    async def find_mentions(self, locations: Sequence[str]) -> AsyncGenerator[Mention, None]:
        """Yield what mentions one of the locations outside of the references of models, in one snapshot of the database.

        It reads every table that this role may read once. A table that the journal has, and columns of references of models, are
        left to `find_held`.
        """
        references = [item.column for item in self._ref_columns if item.is_declared]
        journals = [table for tables in self._journals for table in (tables.intent, tables.reclaim)]
        try:
            async with self._snapshot(compiled_cache=None) as connection:  # no statement comes twice
                found = find_mentions(connection, locations, self._identities, references=references, journals=journals)
                async with aclosing(found):
                    async for mention in found:
                        yield mention
        except DBAPIError as error:
            raise _unreadable(error) from error

    async def count_by_store(self) -> Counter[tuple[str, str | None]]:
        """Return how many references of the binding's base name which backend and which identity of a store, None for none."""
        counted: Counter[tuple[str, str | None]] = Counter()
        for item in self._ref_columns:
            if item.is_declared and self._backend in item.here:
                async with self._connection() as connection:
                    for backend, identity, number in await connection.execute(counted_by_store(item, connection.dialect.name)):
                        counted[as_text(backend), as_text(identity) or None] += number
        return counted

    def require_complete(self, storage_keys: Sequence[str]) -> None:
        """Accept: every column was read, whatever its policy."""

    async def settle(self) -> None:
        """Commit durably: what was committed before, and seen, is durable then as well."""
        async with self._connection() as connection:
            await durability.barrier(connection)

    @property
    def _columns(self) -> list[Column[Any]]:
        return [item.column for item in self._ref_columns]

    async def _look_at_the_database(self, bases: Sequence[BoundBase]) -> None:
        """Find out which tables there are, and refuse a database that cannot be relied on."""
        try:
            async with self._connection(translated=True) as connection:
                self._dialect = connection.dialect.name
                await checks.require_fit(connection, [])
                self._ref_columns = await connection.run_sync(find_columns, bases, self._identities)
                self._journals = await connection.run_sync(_journals_in, bases, self._columns)
            async with self._connection() as connection:
                await checks.require_fit(connection, [item.column for item in self._ref_columns if item.is_declared])
        except ProgrammingError as error:
            raise _unreadable(error) from error

    async def _referred(self, columns: Sequence[RefColumn]) -> AsyncGenerator[list[Reference], None]:
        wrong: int | None = None
        try:
            async with self._connection() as connection:
                statement = all_locations(columns, connection.dialect.name, self._identities)
                result = await connection.stream(statement.execution_options(yield_per=PAGE))
                try:
                    async for page in result.partitions():
                        wrong = next((kind for location, kind in page if location is None or kind >= UNKNOWN_BACKEND), None)
                        if wrong is not None:
                            break
                        yield [(as_text(location), kind == HERE) for location, kind in page]
                finally:
                    await result.close()
        except ProgrammingError as error:
            raise _unreadable(error) from error
        if wrong is not None:
            await self._refuse(wrong)

    async def _named(self) -> AsyncGenerator[Reference, None]:
        """Yield what the `extra` of refs name, whatever backend those refs name."""
        for chunk in batches(self._ref_columns, _COLUMNS_IN_A_STATEMENT):
            async with self._connection() as connection:
                parts = [selected_extra(item.column, connection.dialect.name) for item in chunk]
                result = await connection.stream(union_all(*parts).execution_options(yield_per=PAGE))
                try:
                    async for of_backend, _, extra in result:
                        for location in named_in(json.loads(extra)):
                            yield location, as_text(of_backend) == self._backend
                finally:
                    await result.close()

    async def _refuse(self, kind: int) -> None:
        """Say which row it is that has no reference, or one that cannot be understood."""
        async with self._connection() as connection:
            dialect = connection.dialect.name
            for item in self._ref_columns:
                if not item.is_declared:
                    continue
                if kind < UNKNOWN_BACKEND:
                    found = (await connection.execute(first_illegible(item.column, dialect))).first()
                    if found is not None:
                        raise CollectionRefusedError(_illegible(f"{item.label} of the row {_key(found[:-1])}"))
                    continue
                found = (await connection.execute(first_of(item, dialect, kind, self._identities))).first()
                if found is not None:
                    *key, backend, identity = found
                    where = f"{item.label} of the row {_key(key)}"
                    raise CollectionRefusedError(self._misunderstood(kind, where, as_text(backend), as_text(identity or "")))
        raise CollectionRefusedError(_illegible("a row that has changed meanwhile"))

    def _misunderstood(self, kind: int, where: str, backend: str, identity: str) -> str:
        if kind == UNKNOWN_IDENTITY:
            current = next(iter(self._identities or ()), None)
            return f"{where} refers to an object of another store: {describe_mismatch(backend, identity, current)}"
        known = ", ".join(sorted(self._binding.manager.backends))
        return (
            f"{where} names the backend {backend!r}, which the manager does not have (there are: {known}), so it is unknown which"
            " objects it means: give the manager that backend, or let the rows name the one that its key has become"
        )

    @asynccontextmanager
    async def _snapshot(self, **options: Any) -> AsyncIterator[AsyncConnection]:
        """Give a connection on which several statements see the same moment."""
        if self._dialect != "sqlite":
            async with self._connection(isolation_level="REPEATABLE READ", **options) as connection:
                yield connection
            return
        async with self._connection(**options) as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            if not driver.in_transaction:  # Python's driver begins none to read
                await connection.exec_driver_sql("BEGIN")
            yield connection

    @asynccontextmanager
    async def _connection(self, *, translated: bool = False, **options: Any) -> AsyncIterator[AsyncConnection]:
        """Give a connection of the sessions; the tables of its statements are named in full, unless it is to be `translated`."""
        session: AsyncSession
        if not translated:
            options["schema_translate_map"] = {}
        async with self._sessions() as session:
            yield await session.connection(bind_arguments={"clause": self._clause}, execution_options=options)


def _journals_in(connection: Connection, bases: Sequence[BoundBase], columns: Sequence[Column[Any]]) -> list[JournalTables]:
    """Return the tables of every journal beside the columns, whoever uses it: each tenant may have its own."""
    declared = [tables for tables in (tables_of(base.binding.metadata) for base in bases) if tables is not None]
    schemas = {str(column.table.schema) for column in columns}
    schemas |= {real[0] for tables in declared if (real := resolve(connection, tables.intent)) is not None}
    template = _journal_in(None)
    needed = {template.intent.name, template.reclaim.name}
    found: dict[str, set[str]] = {}
    for schema, name in find_tables(connection, sorted(needed)):
        found.setdefault(schema, set()).add(name)
    return [_journal_in(schema) for schema, has in sorted(found.items()) if schema in schemas and needed <= has]


@lru_cache(maxsize=1024)  # statements of the same tables are compiled once
def _journal_in(schema: str | None) -> JournalTables:
    return journal_tables(MetaData(), schema=schema)


def _key(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def _illegible(where: str) -> str:
    return (
        f"{where} holds something that is not a reference, so it is unknown which object it means: nothing is deleted before that"
        " is put right; granite_storage.verify finds all of them"
    )


def _unreadable(error: DBAPIError) -> CollectionRefusedError:
    return CollectionRefusedError(f"the references could not be read, so nothing is deleted: {error.orig}")
