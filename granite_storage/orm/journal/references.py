"""The objects that rows refer to, for the worker before it deletes: in every base of the process and every schema."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import Column, Row, Select, column, literal_column, null, select, table, text, union_all
from sqlalchemy.exc import DBAPIError

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._util import TRANSLATE_MAP, batches
from granite_storage.orm.columns import location_of, variant_locations, variants_in
from granite_storage.orm.journal.database import JournalPool, effective, read_translations
from granite_storage.orm.locking import Catalogue, Place, describe_obstacles, mentions_at, read_catalogue

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.orm._interfaces import JournalTables


_MOST_PARAMETERS = 20_000
OF_FENCES = ("id", "attempts", "takeovers", "due")
"""What `check` returns of the rows of `reclaim`."""
_TRIES = 3
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")

_LOCKABLE = text("""
    SELECT n.nspname AS schema, c.relname AS name, format('%I.%I', n.nspname, c.relname) AS quoted
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p')
""")
"""The tables that LOCK TABLE takes: no foreign ones and no materialized views, which no TRUNCATE of this server empties."""

_Begin: TypeAlias = "Callable[[], AbstractAsyncContextManager[AsyncConnection]]"


class References:
    """Finds references.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        columns: Every column of the journal's own bases that may refer to an object.
        others: Those of all other bases, which may be in the same database or not.
    """

    def __init__(
        self, pool: JournalPool, tables: JournalTables, columns: Sequence[Column[Any]], others: Sequence[Column[Any]] = ()
    ) -> None:
        self._pool = pool
        self._tables = tables
        self._columns = columns
        self._others = others

    async def find(self, locations: Iterable[str]) -> set[str]:
        """Return those of the locations that rows refer to, whatever backend they name."""
        return {row.location for row in await self._rows([], dict.fromkeys(locations), self._pool.reading)}

    async def check(self, fenced: Iterable[Any], objects: Mapping[str, str | None]) -> tuple[list[Row[Any]], set[str]]:
        """Return rows of `reclaim`, and which objects rows refer to; all of it in one snapshot.

        Args:
            fenced: The ids of the rows of `reclaim`.
            objects: The locations of the objects; a variant's with the location of its original, in whose row alone it may be.

        Raises:
            InvalidReferenceError: A row that holds an original has variants that this version cannot read.
            ConfigurationError: A table or a column of the models is not there, or rows may be hidden from this role.
        """
        reclaim = self._tables.reclaim
        seen = [reclaim.c[name] for name in (*OF_FENCES, "location")]
        # Given by name, its statements are compiled once; no map translates its schema again.
        schema = effective(reclaim.schema, self._pool.translate_map)
        own = table(reclaim.name, *(column(item.name, item.type) for item in seen), schema=schema)
        is_fenced = own.c.id.in_(list(fenced))
        rows = await self._rows([select(*own.c, null().label("variants")).where(is_fenced)], objects, self._pool.deciding)
        return [row for row in rows if row.id is not None], self._locations_in(rows)

    def _locations_in(self, rows: Iterable[Row[Any]]) -> set[str]:
        """Return the locations that rows of the application hold, among those that were found."""
        held = [row for row in rows if row.id is None]
        return {row.location for row in held if row.location is not None}.union(
            *(variant_locations(row.variants) for row in held)
        )

    async def _rows(
        self, first: list[Select[*tuple[Any, ...]]], objects: Mapping[str, str | None], begin: _Begin
    ) -> list[Row[Any]]:
        wanted = sorted(objects), sorted({source for source in objects.values() if source is not None})
        for _ in range(_TRIES - 1):
            # A table may have been dropped after the catalogue had named it.
            with suppress(DBAPIError):
                return await self._ask(first, begin, *wanted)
        try:
            return await self._ask(first, begin, *wanted)
        except DBAPIError as error:
            async with self._pool.reading() as connection:
                catalogue, own = await self._wanted(connection)
            if missing := _describe_missing(catalogue, own):
                raise ConfigurationError(missing, see=Page.RENAMED) from error
            raise

    async def _ask(
        self, first: list[Select[*tuple[Any, ...]]], begin: _Begin, locations: Sequence[str], sources: Sequence[str]
    ) -> list[Row[Any]]:
        places = await self._find_places() if locations else []
        selects = [*first, *self._selects(places, locations, sources)]
        statements = list(batches(selects, max(1, _MOST_PARAMETERS // max(len(locations), 1))))
        rows: list[Row[Any]] = []
        takes_several = len(statements) > 1 and self._pool.dialect != "sqlite"
        locked = await self._lockable(places) if takes_several and self._pool.is_postgresql else []
        async with begin() as connection:
            if takes_several:
                await connection.execute(_ONE_SNAPSHOT)
            if locked:
                await connection.exec_driver_sql(f"LOCK TABLE {', '.join(locked)} IN ACCESS SHARE MODE")
            for parts in statements:
                found = await connection.execute(union_all(*parts), execution_options={TRANSLATE_MAP: None})
                rows += found
            if rows and begin != self._pool.reading:
                await self._pool.make_durable(connection)
        return rows

    async def _lockable(self, places: Iterable[Place]) -> list[str]:
        """Return the tables that are locked before several statements make their snapshot, in SQL.

        TRUNCATE follows no snapshot on PostgreSQL: a table that another transaction has truncated since the first statement is
        empty for the next one, which does not see either where that transaction has put the refs. So the tables are locked
        against it before the snapshot is made. A single statement locks its tables first by itself.
        """
        names = {(place.schema, place.table) for place in places}
        async with self._pool.reading() as connection:
            known = {(row.schema, row.name): row.quoted for row in await connection.execute(_LOCKABLE)}
        return sorted(known[name] for name in names & known.keys())

    async def _find_places(self) -> list[Place]:
        async with self._pool.reading() as connection:
            return await self._places(connection)

    def _selects(
        self, places: Iterable[Place], locations: Sequence[str], sources: Sequence[str]
    ) -> list[Select[*tuple[Any, ...]]]:
        selects: list[Select[*tuple[Any, ...]]] = []
        for place in places:
            column = place.column
            _, location = location_of(column, self._pool.dialect, is_generated=place.is_generated)
            nothing, no_variants = [null().label(name) for name in OF_FENCES], null().label("variants")
            if place.is_text:
                mentions = mentions_at(place, self._pool.dialect, locations)
                selects += [
                    select(*nothing, named.label("location"), no_variants).where(is_there) for named, is_there in mentions
                ]
                continue
            found = select(*nothing, location.label("location"), no_variants).select_from(column.table)
            selects.append(found.where(location.in_(locations)))
            if sources:
                held = variants_in(column, self._pool.dialect)
                found = select(*nothing, null().label("location"), held.label("variants")).select_from(column.table)
                selects.append(found.where(location.in_(sources), held.is_not(None)))
        return selects

    async def _places(self, connection: AsyncConnection) -> list[Place]:
        """Return where the columns are: once in each schema that any transaction has made known, and in all others.

        A schema that was made known and has none of the tables was dropped, or is no schema at all, as the one of models that
        are only translated. Of other bases and other schemas only what is there is asked.

        Raises:
            ConfigurationError: Rows of one of them are, or may be, hidden from this role.
        """
        catalogue, wanted = await self._wanted(connection)
        own = self._pool.translate_map
        # One that is not there is asked all the same: its error keeps everything until the table is there.
        places = [catalogue.place(schema, item) or Place(schema, item.table.name, item.name) for schema, item in wanted]
        found = (catalogue.place(effective(item.table.schema, own), item) for item in self._others)
        places += [place for place in found if place is not None]
        places += catalogue.namesakes()
        _require_visible(places)
        return sorted(set(places), key=lambda place: place.names)

    async def find_holders(self, connection: AsyncConnection, location: str) -> list[tuple[Place, Column[Any]]]:
        """Return which columns of the journal's own bases refer to an object now, in every schema that was made known.

        Raises:
            ConfigurationError: One of them is not there, or its rows are, or may be, hidden from this role.
        """
        catalogue, wanted = await self._wanted(connection)
        if missing := _describe_missing(catalogue, wanted):
            raise ConfigurationError(missing, see=Page.RENAMED)
        found = {place: item for schema, item in wanted if (place := catalogue.place(schema, item)) is not None}
        _require_visible(found)
        own = sorted(found.items(), key=lambda item: item[0].names)
        holders: set[int] = set()
        for some in batches(enumerate(own), _MOST_PARAMETERS):
            parts: list[Select[*tuple[Any, ...]]] = []
            for number, (place, _) in some:
                found_in = place.column
                is_here = location_of(found_in, self._pool.dialect, is_generated=place.is_generated)[1] == location
                parts.append(select(literal_column(str(number))).select_from(found_in.table).where(is_here))
            holders |= set(await connection.scalars(union_all(*parts), execution_options={TRANSLATE_MAP: None}))
        return [own[number] for number in sorted(holders)]

    async def _wanted(self, connection: AsyncConnection) -> tuple[Catalogue, list[tuple[str | None, Column[Any]]]]:
        """Return the catalogue of the database, and the journal's own columns, each with every schema that it may be in."""
        own, learned = self._pool.translate_map, await read_translations(connection, self._tables)
        catalogue = await connection.run_sync(read_catalogue, list(dict.fromkeys((*self._columns, *self._others))))
        used = [own]
        if learned:
            tables = {(column.table.schema, column.table.name) for column in self._columns}
            maps = (own, *learned)
            used = [one for one in maps if any(catalogue.table(effective(schema, one), name) for schema, name in tables)]
        wanted = dict.fromkeys((effective(item.table.schema, one), item) for one in used or [own] for item in self._columns)
        return catalogue, list(wanted)


def _describe_missing(catalogue: Catalogue, wanted: Iterable[tuple[str | None, Column[Any]]]) -> str | None:
    """Return in words which tables or columns of the models are not in the database, with the remedy; None where all are."""
    names: set[str] = set()
    for schema, item in wanted:
        table = f"{schema}.{item.table.name}" if schema else item.table.name
        if catalogue.table(schema, item.table.name) is None:
            names.add(f"the table {table}")
        elif catalogue.place(schema, item) is None:
            names.add(f"the column {item.name} of the table {table}")
    if not names:
        return None
    return (
        f"{', '.join(sorted(names))} of the models cannot be found in the database. Its rows may refer to objects, so nothing is"
        " deleted: if it was renamed or dropped, deploy models that say so, or else create it"
    )


def _require_visible(places: Iterable[Place]) -> None:
    problems = [problem for problem, _ in describe_obstacles(places, "the journal's role")]
    if problems:
        raise ConfigurationError(
            f"{'; '.join(problems)}, where rows may refer to the same objects as those of the models do, so nothing is"
            " deleted: let this role see all of their rows, or give StorageJournal an engine of a role that does"
        )
