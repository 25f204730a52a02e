"""References in the application's own database: every column of every base that shares the storage, found by itself."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy import inspect, union_all

from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import checks, durability
from granite_storage.gc.columns import ref_columns, require_one_database, sharing_bindings
from granite_storage.gc.join import in_byte_order, merged
from granite_storage.gc.spool import PAGE, SortedSpool, temporary_file
from granite_storage.gc.statements import all_locations, first_illegible
from granite_storage.orm.held import find_held, most_at_once, named_in, selected_extra
from granite_storage.orm.journal.tables import JournalTables, tables_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

    from granite_storage.orm.binding import StorageBinding

__all__ = ["DatabaseReferences"]


class DatabaseReferences:
    """What a binding's rows refer to, and what its journal knows of.

    The statements are Core ones, on connections of the application's own sessions: no loader criteria and no filter for
    soft-deleted rows hides anything. Each is a transaction of its own.

    Args:
        binding: What `bind_storage(..., sessions=...)` returned.
        sessions: Its sessions.
        backend: The key of the backend whose objects are in question.

    Raises:
        CollectionRefusedError: Some references could not be looked for.
    """

    def __init__(self, binding: StorageBinding, sessions: async_sessionmaker[AsyncSession], backend: str) -> None:
        self._binding = binding
        self._sessions = sessions
        bindings = sharing_bindings(binding, backend)
        self._columns = ref_columns(bindings)
        self._bound = [bound.journal.tables for bound in bindings if bound.journal is not None]
        declared = [tables_of(bound.metadata) for bound in bindings]
        self._journals = [tables for tables in declared if tables is not None]

    @property
    def at_a_time(self) -> int:
        """How many locations `find_held` takes."""
        return most_at_once(self._columns, self._journals)

    async def require_fit(self, *, accept_restore: bool) -> None:
        """Refuse a database that could hide references or forget what it has committed, and one that may have been restored."""
        if not self._columns:
            raise CollectionRefusedError("no model has a column of refs: were all of them imported before bind_storage?")
        require_one_database(self._sessions, self._columns, self._journals)
        async with self._connection() as connection:
            await checks.require_fit(connection, self._columns)
            self._journals = [tables for tables in self._journals if await self._exists(connection, tables)]
        if accept_restore and self._binding.journal is not None:
            await self._binding.journal.accept_restore()
        async with self._connection() as connection:
            for tables in self._bound:
                await checks.require_heartbeat(connection, tables)

    @asynccontextmanager
    async def in_order(self, backend: str) -> AsyncIterator[AsyncIterator[list[str]]]:
        """Give the locations of all references to a backend: streamed in order, and those of `extra` sorted on disk."""
        async with temporary_file() as file:
            named = SortedSpool(file)
            async with aclosing(self._named(backend)) as locations:
                async for location in locations:
                    await named.add(location)
            async with aclosing(self._referred(backend)) as referred:
                yield merged(in_byte_order(referred, "the database's references"), named.pages())

    async def find_held(self, backend: str, locations: Sequence[str]) -> set[str]:
        """Return which of the locations are held, by one statement in a snapshot of this moment."""
        async with self._connection() as connection:
            found = await find_held(connection, self._columns, locations, journals=self._journals, extra=True)
        return {location for of_backend, location in found if of_backend == backend}

    def require_complete(self, storage_keys: Sequence[str]) -> None:
        """Accept: every column was read, whatever its policy."""

    async def settle(self) -> None:
        """Commit durably: what was committed before, and seen, is durable then as well."""
        async with self._connection() as connection:
            await durability.barrier(connection)

    async def _referred(self, backend: str) -> AsyncGenerator[list[str], None]:
        async with self._connection() as connection:
            statement = all_locations(self._columns, connection.dialect.name, backend)
            result = await connection.stream(statement.execution_options(yield_per=PAGE))
            try:
                async for page in result.scalars().partitions():
                    if None in page:
                        break
                    yield list(page)
                else:
                    return
            finally:
                await result.close()
        await self._blame()

    async def _named(self, backend: str) -> AsyncGenerator[str, None]:
        async with self._connection() as connection:
            parts = [selected_extra(column, connection.dialect.name) for column in self._columns]
            result = await connection.stream(union_all(*parts).execution_options(yield_per=PAGE))
            try:
                async for of_backend, _, extra in result:
                    if of_backend == backend:
                        for location in named_in(json.loads(extra)):
                            yield location
            finally:
                await result.close()

    async def _blame(self) -> None:
        """Say where the value is that is no reference."""
        where = "a row that has changed meanwhile"
        async with self._connection() as connection:
            for column in self._columns:
                found = (await connection.execute(first_illegible(column, connection.dialect.name))).first()
                if found is not None:
                    key = ", ".join(map(str, found[:-1]))
                    where = f"{column.table.fullname}.{column.name} of the row {key}"
                    break
        raise CollectionRefusedError(
            f"{where} holds something that is not a reference, so nobody knows which object it means: nothing is deleted before"
            " that is put right; granite_storage.verify finds all of them"
        )

    async def _exists(self, connection: AsyncConnection, journal: JournalTables) -> bool:
        """Tell whether a journal is in use, or has its tables all the same: another program may use it."""
        if journal in self._bound:
            return True
        has = await connection.run_sync(
            lambda sync: [inspect(sync).has_table(table.name, schema=table.schema) for table in (journal.intent, journal.reclaim)]
        )
        return all(has)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        session: AsyncSession
        async with self._sessions() as session:
            yield await session.connection(bind_arguments={"clause": self._columns[0].table})
