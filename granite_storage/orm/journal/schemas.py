"""The schemas that an application's tables are in, where a `schema_translate_map` says so.

The journal's own tables are in one place, whatever the map of a session: its statements go there by their own options. The tables
that have attachments are wherever the connection of a session has them, another schema for each tenant perhaps; and the worker
asks all of them before it deletes. So a transaction that writes into the journal first makes known, in the table
`granite_storage_meta`, to which schemas its connection leads, once for each process. From then on every worker knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import select
from sqlalchemy.util import await_only

from granite_storage.orm.journal.database import TRANSLATE_MAP, JournalPool
from granite_storage.orm.journal.heartbeat import insert_if_absent
from granite_storage.orm.journal.tables import JournalTables, clock

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["KnownSchemas", "Translation", "effective", "read_translations"]

Translation: TypeAlias = tuple[tuple[str | None, str | None], ...]
"""The schemas that the models name, each with the one that it stands for."""

_PREFIX = "schemas:"
_DIGITS = 32


class KnownSchemas:
    """What this process knows to be known to all.

    Args:
        pool: The journal's own connections.
    """

    def __init__(self, pool: JournalPool) -> None:
        self._pool = pool
        self._known: set[Translation] = set()

    def make_known(self, connection: Connection, tables: JournalTables, columns: Sequence[Column[Any]]) -> None:
        """Make known to workers where the tables are that a session's connection leads to; durably, before it commits."""
        mapping = connection.get_execution_options().get(TRANSLATE_MAP) or {}
        if mapping == self._pool.translate_map:
            return
        named = {column.table.schema for column in columns}
        translation = _translation(named, mapping)
        if translation == _translation(named, self._pool.translate_map) or translation in self._known:
            return
        await_only(self._write(tables, translation))
        self._known.add(translation)

    async def _write(self, tables: JournalTables, translation: Translation) -> None:
        value = json.dumps(translation)
        name = f"{_PREFIX}{sha256(value.encode()).hexdigest()[:_DIGITS]}"
        async with self._pool.durable() as connection:
            await insert_if_absent(connection, tables, {"name": name, "value": value, "changed": clock()})


async def read_translations(connection: AsyncConnection, tables: JournalTables) -> list[Mapping[str | None, str | None]]:
    """Return every translation that a transaction has made known."""
    meta = tables.meta
    found = await connection.execute(select(meta.c.value).where(meta.c.name.startswith(_PREFIX)).order_by(meta.c.name))
    return [dict(json.loads(value)) for value in found.scalars()]


def effective(schema: str | None, mapping: Mapping[str | None, str | None]) -> str | None:
    """Return the schema that one named in a model stands for."""
    return mapping.get(schema, schema)


def _translation(named: Iterable[str | None], mapping: Mapping[str | None, str | None]) -> Translation:
    return tuple((schema, effective(schema, mapping)) for schema in sorted(named, key=str))
