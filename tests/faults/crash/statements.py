"""SQL past every session, as another program writes it: it deletes, empties, copies, moves and undoes what it has once read."""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any, TypeAlias

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.faults.crash.models import Place
from tests.faults.crash.points import Trap

__all__ = ["Statements"]

_BOOKS = 10
_SHELVES = 2
_NAMES = ["file", "kept"]
_REMEMBERED = 8

Held: TypeAlias = tuple[str, str]
"""A ref as SQL reads it, and what its row says of the file."""


class Statements:
    """Writes to the rows of a place.

    Args:
        place: The place.
        seed: What all that it does follows from, but for the timing.
        trap: For the points; those of a COMMIT are in the dialect of the place.
    """

    def __init__(self, place: Place, seed: str, trap: Trap) -> None:
        self._place = place
        self._random = Random(seed)
        self._trap = trap
        self._seen: list[Held] = []
        dialect = place.engine.dialect.name
        self._is_postgres = dialect == "postgresql"
        self._value = "CAST(:value AS jsonb)" if self._is_postgres else ":value"
        self._text = {"postgresql": "CAST({} AS text)", "sqlite": "{}"}.get(dialect, "CAST({} AS CHAR)")

    async def run(self, more: int | None) -> None:
        """Work until the trap has sprung and so many more transactions are done; for ever, where that is None."""
        while more is None or more > 0:
            if more is not None and self._trap.sprung:
                more -= 1
            try:
                await self._transaction()
            except DBAPIError:  # a refusal, a deadlock, a conflict of snapshots, two rows with one key
                await asyncio.sleep(0)

    async def _transaction(self) -> None:
        async with self._place.engine.connect() as connection:
            for _ in range(self._random.randint(1, 3)):
                if self._random.random() < 0.2:
                    async with connection.begin_nested() as savepoint:
                        await self._operation(connection)
                        if self._random.random() < 0.4:
                            await savepoint.rollback()
                else:
                    await self._operation(connection)
            await asyncio.sleep(self._random.choice([0, 0, 0.02]))
            await (connection.commit() if self._random.random() < 0.85 else connection.rollback())

    async def _operation(self, connection: AsyncConnection) -> None:
        operations = {
            self._read: 2,
            self._delete: 2,
            self._empty: 2,
            self._cascade: 1,
            self._truncate: 0.1 if self._is_postgres else 0,
            self._copy: 3,
            self._move: 2,
            self._swap: 2,
            self._undo: 4,
        }
        await self._random.choices(list(operations), list(operations.values()))[0](connection)

    async def _delete(self, connection: AsyncConnection) -> None:
        await self._read(connection)
        await self._run(connection, "DELETE FROM book WHERE id IN (:a, :b)", a=self._pick(), b=self._pick())

    async def _empty(self, connection: AsyncConnection) -> None:
        await self._run(connection, _EMPTY.format(name=self._name()), a=self._pick())

    async def _cascade(self, connection: AsyncConnection) -> None:
        await self._run(connection, "DELETE FROM shelf WHERE id = :a", a=self._random.randrange(_SHELVES))

    async def _truncate(self, connection: AsyncConnection) -> None:
        # Above, what others have committed since the snapshot is the collector's.
        if await connection.scalar(text("SHOW transaction_isolation")) == "read committed":
            await self._run(connection, "TRUNCATE book")

    async def _copy(self, connection: AsyncConnection) -> None:
        held = await self._read(connection)
        if held is not None:
            await self._put(connection, self._pick(), self._name(), held)

    async def _move(self, connection: AsyncConnection) -> None:
        source, name = self._pick(), self._name()
        held = await self._read(connection, source, name)
        if held is not None:
            await self._run(connection, _EMPTY.format(name=name), a=source)
            await self._put(connection, self._pick(), self._name(), held)

    async def _swap(self, connection: AsyncConnection) -> None:
        places = [(self._pick(), self._name()) for _ in range(2)]
        held = [await self._read(connection, *place) for place in places]
        for place, value in zip(places, reversed(held), strict=True):
            if None not in held and value is not None:
                await self._put(connection, *place, value)

    async def _undo(self, connection: AsyncConnection) -> None:
        if self._seen:
            await self._put(connection, self._pick(), self._name(), self._random.choice(self._seen))

    async def _read(self, connection: AsyncConnection, number: int | None = None, name: str | None = None) -> Held | None:
        """Read a file of a book, and remember it; only what is complete: no job follows it to where SQL writes it."""
        number, name = self._pick() if number is None else number, name or self._name()
        found = await self._run(connection, _READ.format(name, self._text.format(name)), a=number)
        row = found.first()
        if row is None or row[0] is None:
            return None
        ref = json.loads(row[0])
        if (ref.get("scan") or {}).get("status") != "clean" or "sum" not in (ref.get("variants") or {}):
            return None
        held = (str(row[0]), str(row[1]))
        self._seen = [*self._seen[1 - _REMEMBERED :], held]
        return held

    async def _put(self, connection: AsyncConnection, number: int, name: str, held: Held) -> None:
        values = {"a": number, "value": held[0], "says": held[1]}
        update = f"UPDATE book SET {name} = {self._value}, {name}_says = :says WHERE id = :a"  # noqa: S608
        if (await self._run(connection, update, **values)).rowcount == 0:
            insert = f"INSERT INTO book (id, {name}, {name}_says) VALUES (:a, {self._value}, :says)"  # noqa: S608
            await self._run(connection, insert, **values)

    async def _run(self, connection: AsyncConnection, statement: str, **values: Any) -> Any:
        return await connection.execute(text(statement), values)

    def _pick(self) -> int:
        return self._random.randrange(_BOOKS)

    def _name(self) -> str:
        return self._random.choice(_NAMES)


_EMPTY = "UPDATE book SET {name} = NULL, {name}_says = NULL WHERE id = :a"
_READ = "SELECT {1}, {0}_says FROM book WHERE id = :a"
