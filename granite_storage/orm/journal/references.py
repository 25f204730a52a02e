"""Which objects rows refer to, as the worker asks before it deletes: in every schema that the application is known to use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import JSON, Column, Select, Table, TableClause, bindparam, column, null, select, table, text, union_all

from granite_storage.orm._batches import batches
from granite_storage.orm.indexed import with_location_column
from granite_storage.orm.journal.pool import TRANSLATE_MAP, JournalPool
from granite_storage.orm.journal.schemas import effective, read_translations
from granite_storage.orm.types import location_of

if TYPE_CHECKING:
    from sqlalchemy import Row
    from sqlalchemy.ext.asyncio import AsyncConnection

    from granite_storage.orm.journal.tables import JournalTables

__all__ = ["References"]

_MOST_PARAMETERS = 20_000
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
_ON_PATH = {"postgresql": "table_schema = ANY (current_schemas(false))"}


class References:
    """Looks for references.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        columns: Every column that may refer to an object.
    """

    def __init__(self, pool: JournalPool, tables: JournalTables, columns: Sequence[Column[Any]]) -> None:
        self._pool = pool
        self._tables = tables
        self._columns = columns

    async def find(self, locations: Iterable[str]) -> set[str]:
        """Return those of the locations that rows refer to, whatever backend they name."""
        return {row.location for row in await self._rows([], locations)}

    async def check(self, fenced: Iterable[Any], locations: Iterable[str]) -> tuple[list[Row[Any]], set[str]]:
        """Return rows of `reclaim` by their ids, and those of the locations that rows refer to; all of it in one snapshot."""
        reclaim = self._tables.reclaim
        seen = (reclaim.c.id, reclaim.c.attempts, reclaim.c.takeovers, reclaim.c.location)
        own = _table(reclaim, *seen, schema=effective(reclaim.schema, self._pool.translate_map))
        rows = await self._rows([select(*own.c).where(own.c.id.in_(list(fenced)))], locations)
        return [row for row in rows if row.id is not None], {row.location for row in rows if row.id is None}

    async def _rows(self, first: list[Select[*tuple[Any, ...]]], locations: Iterable[str]) -> list[Row[Any]]:
        wanted = sorted(set(locations))
        selects = [*first, *(await self._selects(wanted) if wanted else [])]
        statements = list(batches(selects, max(1, _MOST_PARAMETERS // max(len(wanted), 1))))
        rows: list[Row[Any]] = []
        async with self._pool.reading() as connection:
            if len(statements) > 1:
                await connection.execute(_ONE_SNAPSHOT)
            for parts in statements:
                found = await connection.execute(union_all(*parts), execution_options={TRANSLATE_MAP: None})
                rows += found
        return rows

    async def _selects(self, locations: Sequence[str]) -> list[Select[*tuple[Any, ...]]]:
        async with self._pool.reading() as connection:
            columns = await self._places(connection)
            generated = await with_location_column(connection, columns)
        selects: list[Select[*tuple[Any, ...]]] = []
        for place in columns:
            _, location = location_of(place, self._pool.dialect, is_generated=place in generated)
            nothing = null().label("id"), null().label("attempts"), null().label("takeovers")
            found = select(*nothing, location.label("location")).select_from(place.table).where(location.in_(locations))
            selects.append(found)
        return selects

    async def _places(self, connection: AsyncConnection) -> list[Column[Any]]:
        """Return the columns as they stand in the database, once in each schema that any transaction has made known.

        A schema that has none of the tables was dropped, or is no schema at all, as the one of models that are only translated.
        """
        own, learned = self._pool.translate_map, await read_translations(connection, self._tables)
        if not learned:
            return self._translated([own])
        existing = await self._existing(connection)
        used = [mapping for mapping in (own, *learned) if any(name in existing for name in self._names(mapping))]
        return self._translated(used or [own])

    def _translated(self, mappings: Iterable[Mapping[str | None, str | None]]) -> list[Column[Any]]:
        places = dict.fromkeys((effective(item.table.schema, mapping), item) for mapping in mappings for item in self._columns)
        tables = ((_table(item.table, Column(item.name, JSON()), schema=schema), item.name) for schema, item in places)
        return [cast(Column[Any], found.c[name]) for found, name in tables]

    def _names(self, mapping: Mapping[str | None, str | None]) -> set[tuple[str | None, str]]:
        return {(effective(item.table.schema, mapping), item.table.name) for item in self._columns}

    async def _existing(self, connection: AsyncConnection) -> set[tuple[str | None, str]]:
        """Return which tables of these names there are, by schema; None stands for where an unqualified name leads."""
        statement = text(
            f"SELECT table_schema, table_name, {_ON_PATH.get(self._pool.dialect, 'table_schema = DATABASE()')}"  # noqa: S608
            " FROM information_schema.tables WHERE table_name IN :names"
        ).bindparams(bindparam("names", expanding=True))
        rows = await connection.execute(statement, {"names": sorted({item.table.name for item in self._columns})})
        return {place for schema, name, is_default in rows for place in ((schema, name), *([(None, name)] if is_default else []))}


def _table(original: Table, *columns: Column[Any], schema: str | None) -> TableClause:
    """Return a table as it stands in the database, with some of its columns; no map translates its schema again.

    Its statements are compiled once, since it goes by its name: a `Table` would be a new one each time.
    """
    return table(original.name, *(column(item.name, item.type) for item in columns), schema=schema)
