"""Pending deletes: the intents to delete objects, at most one for each object.

The id of such an intent is a function of the object's backend and location. SQL can make rows share an object, and each of them
nominates it when it is deleted. With random ids there would be two intents: a restore would consume one of them, and a worker
would execute the other. With a derived id all transactions that nominate an object insert, or lock, the same row. An existing row
is updated, because a worker may be about to remove it after finding another row that refers to the object.

Earlier versions used random ids. The triggers of SQLite, which has no digest in SQL, use ids that are partly random. Such an
intent gets its derived id before a worker or a session nominates its object or acts on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from operator import attrgetter
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Insert, Row, Table, Update, bindparam, delete, func, update
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.orm._interfaces import are_triggers_declared
from granite_storage.orm._util import batches, try_briefly, upsert_rows
from granite_storage.orm.journal.tables import DELETE, clock

_BATCH_SIZE = 500
_ID_BYTES = 16
_DELAY = "delay"
"""The parameter of the seconds until a delete is due."""


def delete_id(backend: str, location: str) -> UUID:
    """Return the id of the intent to delete an object, a function of its backend's key and its location."""
    return derived_id(backend, location)


def derived_id(*names: str) -> UUID:
    """Return the id that follows from names, such as a backend's key and a location.

    It is the first 16 bytes of the SHA-256 of the names, with line feeds between, which no location has, in the form of a UUID of
    version 5, which is name-based: MariaDB takes no arbitrary bytes for a UUID.
    """
    digest = sha256("\n".join(names).encode("utf-8", "surrogatepass")).digest()
    return UUID(bytes=digest[:_ID_BYTES], version=5)


@dataclass(frozen=True, slots=True)
class PendingDelete:
    """An object to delete.

    Attributes:
        backend: Its backend's key.
        location: Its address there.
        due: When: a moment of the database, or so many seconds from now.
        source: The location of its original, if it is a variant.
    """

    backend: str
    location: str
    due: datetime | float
    source: str | None = None

    @property
    def id(self) -> UUID:
        """The id of the intent."""
        return delete_id(self.backend, self.location)


def nominate(connection: Connection, intent: Table, pending: Iterable[PendingDelete], options: dict[str, Any]) -> None:
    """Record in the transaction of a connection the objects to delete; the latest of several due times counts.

    The rows are written in the order of their ids, so that transactions that nominate the same objects do not deadlock.

    Args:
        connection: The connection.
        intent: The journal's table of intents.
        pending: The objects, their due times in seconds from now.
        options: Execution options that say where the table is.
    """
    pending = _latest(pending)
    if connection.dialect.name == "sqlite" and are_triggers_declared(intent.metadata):
        take_over_ids(connection, intent, [(item.backend, item.location) for item in pending], options)
    for batch in batches(pending, _BATCH_SIZE):
        connection.execute(_upsert(connection.dialect.name, intent), _rows(batch), execution_options=options)


def take_over_ids(connection: Connection, intent: Table, objects: Iterable[tuple[str, str]], options: dict[str, Any]) -> None:
    """Give the intents that triggers on SQLite have recorded the derived ids of their objects.

    Args:
        connection: The connection of a transaction that writes.
        intent: The journal's table of intents.
        objects: The backends' keys and the locations of the objects.
        options: Execution options that say where the table is.
    """
    rows = [{"own_id": delete_id(*one), "own_backend": one[0], "own_location": one[1]} for one in objects]
    if rows:
        connection.execute(_renaming(intent), rows, execution_options=options)


def has_own_id(row: Row[Any]) -> bool:
    """Return whether a delete intent has a random id, as in earlier versions."""
    return bool(row.kind == DELETE and row.id != delete_id(row.backend, row.location))


async def renumber(connection: AsyncConnection, intent: Table, rows: Sequence[Row[Any]]) -> bool:
    """Give delete intents of earlier versions, which the transaction has locked, their derived ids.

    One whose new id is being consumed by another transaction, in an undo, is left for later.

    Returns:
        Whether there was any that could be renumbered.
    """
    dialect = connection.dialect.name

    async def renumbered(rows: Sequence[Row[Any]]) -> bool:
        pending = _latest(PendingDelete(row.backend, row.location, row.due, row.source) for row in rows)
        if await try_briefly(connection, _upsert(dialect, intent, has_moments=True), _rows(pending)) is None:
            return False
        await connection.execute(delete(intent).where(intent.c.id.in_([row.id for row in rows])))
        return True

    if not rows:
        return False
    return await renumbered(rows) or any([await renumbered([row]) for row in rows])


@lru_cache(maxsize=64)  # transactions share the statements, and so their compiled forms
def _upsert(dialect: str, intent: Table, *, has_moments: bool = False) -> Insert:
    """Return the statement; its rows have moments of the database as their due times, or seconds from now."""
    due = {} if has_moments else {"due": clock(_DELAY)}
    greatest = func.max if dialect == "sqlite" else func.greatest
    return upsert_rows(dialect, intent, {"kind": DELETE, **due}, lambda new: {"due": greatest(intent.c.due, new.due)})


@lru_cache(maxsize=64)
def _renaming(intent: Table) -> Update:
    own = bindparam("own_id", type_=intent.c.id.type)
    # Not by the index over backends and due times, which is all that the planner may take.
    is_of_object = (intent.c.location == bindparam("own_location")) & (intent.c.backend + "" == bindparam("own_backend"))
    return (
        update(intent)
        .prefix_with("OR IGNORE")  # where an earlier version has recorded another one
        .where(is_of_object, intent.c.kind == DELETE, intent.c.id != own)
        .values(id=own)
    )


def _rows(pending: Iterable[PendingDelete]) -> list[dict[str, Any]]:
    return [
        {
            "id": item.id,
            "backend": item.backend,
            "location": item.location,
            "source": item.source,
            "due" if isinstance(item.due, datetime) else _DELAY: item.due,
        }
        for item in pending
    ]


def _latest(pending: Iterable[PendingDelete]) -> list[PendingDelete]:
    """Return the latest of each object, in the order of their ids."""
    by_id = {item.id: item for item in sorted(pending, key=attrgetter("due"))}
    return [by_id[item] for item in sorted(by_id)]
