"""Reading every ref of a base, row by row, as the database has it: in the order of primary keys, a page at a time.

The statements are Core ones, on connections of the application's own sessions: no loader criteria and no filter for soft-deleted
rows hides anything. Each page is a transaction of its own, so a scan of any length holds no snapshot and no cursor, and memory is
that of one page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import (
    Column,
    ColumnElement,
    Dialect,
    LargeBinary,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    func,
    or_,
    select,
    type_coerce,
)
from sqlalchemy.exc import OperationalError

from granite_storage.exceptions import ConfigurationError, InvalidReferenceError
from granite_storage.orm.indexed import location_of
from granite_storage.orm.locking import among
from granite_storage.orm.types import AttachmentType, StoredObjectRefType
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from granite_storage.orm.binding import StorageBinding

__all__ = ["HeldValue", "RefRow", "Scan", "as_stored", "following", "is_text", "where_json"]

_AT_A_TIME = 500


@dataclass(frozen=True, slots=True)
class HeldValue:
    """What one column of one row holds.

    Attributes:
        table: The table.
        primary_key: The row's primary key, in the order of the table's columns.
        column: The column.
        raw: The value as the database has it; text, where nobody has put anything else there.
        ref: The ref, where it is one.
        error: Why it is none.
    """

    table: Table
    primary_key: tuple[Any, ...]
    column: Column[Any]
    raw: Any
    ref: StoredObjectRef | None = None
    error: InvalidReferenceError | None = None

    @property
    def is_managed(self) -> bool:
        """Whether it is in an attachment column, whose objects the library looks after."""
        return isinstance(self.column.type, AttachmentType)

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.table.fullname}.{self.column.name}"


@dataclass(frozen=True, slots=True)
class RefRow:
    """A row, what its columns of refs hold, and the text by which a later scan goes on after it."""

    key: str
    values: tuple[HeldValue, ...]


class Scan:
    """Every row with refs of a binding's base.

    Args:
        binding: What `bind_storage(..., sessions=...)` returned.

    Raises:
        ConfigurationError: The binding has no sessions, or a table has no primary key to read it by.
    """

    def __init__(self, binding: StorageBinding) -> None:
        if binding.sessions is None:
            raise ConfigurationError(
                "reading the rows needs sessions: bind_storage(Base, manager, sessions=async_sessionmaker(...))"
            )
        self._sessions = binding.sessions
        self._columns: dict[Table, list[Column[Any]]] = {}
        for column in sorted(binding.ref_columns(), key=lambda column: column.table.fullname):
            self._columns.setdefault(column.table, []).append(column)
        for table in self._columns:
            if not len(table.primary_key):
                raise ConfigurationError(f"the table {table.fullname} has no primary key, so its rows cannot be told apart")

    async def rows(self, *, after: str | None = None) -> AsyncGenerator[RefRow, None]:
        """Yield the rows that hold something in a column of refs, table by table.

        Args:
            after: The key of the last row that was dealt with; None for all rows.

        Raises:
            ConfigurationError: The key is none of this base's.
        """
        table, primary_key = (None, None) if after is None else self._place(after)
        for found in self._columns:
            if table is None or found.fullname > table.fullname:
                pages = self._pages(found, None)
            elif found is table:
                pages = self._pages(found, primary_key)
            else:
                continue
            async for page in pages:
                for row in page:
                    yield row

    async def count(self) -> int:
        """Return how many rows there are."""
        total = 0
        for table, columns in self._columns.items():
            async with self._connection(table) as connection:
                total += (await connection.execute(select(func.count()).select_from(table).where(_any(columns)))).scalar_one()
        return total

    async def read_again(self, held: HeldValue) -> HeldValue | None:
        """Return what a column holds now; None where it holds nothing, or the row is gone."""
        async with self._connection(held.table) as connection:
            statement = select(_selected(held.column, connection.dialect)).where(among(held.table, [held.primary_key]))
            found = (await connection.execute(statement)).first()
            return (
                None
                if found is None
                else _value(held.table, held.primary_key, held.column, found[0], _reader(connection.dialect))
            )

    async def shared(self, refs: Sequence[StoredObjectRef]) -> set[str]:
        """Return the locations that more than one value refers to, under whatever backend's key."""
        counted: Counter[str] = Counter()
        wanted = sorted({ref.location for ref in refs if is_text(ref.location)})
        for table, columns in self._columns.items():
            for column in columns:
                counted.update(await self._found(table, column, wanted))
        return {location for location, number in counted.items() if number > 1}

    async def _found(self, table: Table, column: Column[Any], wanted: Sequence[str]) -> list[str]:
        """Return which of the locations a column refers to, as often as it does."""
        async with self._connection(table) as connection:
            location = location_of(column, connection.dialect.name)[1]
            try:
                return list((await connection.execute(select(location).where(location.in_(wanted)))).scalars())
            except OperationalError:  # on SQLite one value that is no JSON spoils every look into the column
                if connection.dialect.name != "sqlite":
                    raise
                location = where_json(column, location)
                return list((await connection.execute(select(location).where(location.in_(wanted)))).scalars())

    async def _pages(self, table: Table, after: tuple[Any, ...] | None) -> AsyncIterator[list[RefRow]]:
        while True:
            page, last = await self._page(table, after)
            yield page
            if last is None:
                return
            after = last

    async def _page(self, table: Table, after: tuple[Any, ...] | None) -> tuple[list[RefRow], tuple[Any, ...] | None]:
        """Return a page, and the primary key that the next one begins after; None where there is no next one."""
        columns, keys = self._columns[table], list(table.primary_key)
        async with self._connection(table) as connection:
            read = _reader(connection.dialect)
            statement = select(*keys, *(_selected(column, connection.dialect) for column in columns)).where(_any(columns))
            rows = list(await connection.execute(following(statement, keys, after).order_by(*keys).limit(_AT_A_TIME)))
        page: list[RefRow] = []
        for row in rows:
            primary_key = tuple(row[: len(keys)])
            held = (_value(table, primary_key, column, raw, read) for column, raw in zip(columns, row[len(keys) :], strict=True))
            page.append(RefRow(_text_of(table, primary_key), tuple(value for value in held if value is not None)))
        return page, tuple(rows[-1][: len(keys)]) if len(rows) == _AT_A_TIME else None

    @asynccontextmanager
    async def _connection(self, table: Table) -> AsyncIterator[AsyncConnection]:
        session: AsyncSession
        async with self._sessions() as session:
            yield await session.connection(bind_arguments={"clause": table})

    def _place(self, key: str) -> tuple[Table, tuple[Any, ...]]:
        try:
            name, *values = json.loads(key)
            table = next(table for table in self._columns if table.fullname == name)
            return table, tuple(_revived(column, value) for column, value in zip(table.primary_key, values, strict=True))
        except (ValueError, TypeError, StopIteration, ArithmeticError) as error:
            raise ConfigurationError(f"{key[:120]!r} is not the key of a row of this base") from error


def as_stored(column: Column[Any], dialect: Dialect) -> ColumnElement[Any]:
    """Return a column as text, undecoded: what cannot be decoded is to be seen too."""
    return cast(column, Text) if dialect.name == "postgresql" else type_coerce(column, Text())


def _selected(column: Column[Any], dialect: Dialect) -> ColumnElement[Any]:
    """Return a column as it can be selected whatever it holds: a text that is none in UTF-8 would spoil every row of SQLite."""
    return cast(column, LargeBinary) if dialect.name == "sqlite" else as_stored(column, dialect)


def where_json(column: Column[Any], value: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return what SQLite finds in a column's JSON, and NULL where that is none, instead of an error."""
    return case((func.json_valid(column) == 1, value))


def is_text(value: str) -> bool:
    """Tell whether a database can be asked for a string: one with a lone surrogate has no bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _any(columns: Sequence[Column[Any]]) -> ColumnElement[bool]:
    return or_(*(column.is_not(None) for column in columns))


def following(statement: Select[Any], keys: Sequence[Column[Any]], after: tuple[Any, ...] | None) -> Select[Any]:
    """Let a statement begin after a primary key; the first condition, implied by the second, is the one that an index serves."""
    if after is None:
        return statement
    ways = [
        and_(*(column == value for column, value in zip(keys[:count], after[:count], strict=True)), keys[count] > after[count])
        for count in range(len(keys))
    ]
    return statement.where(keys[0] >= after[0], or_(*ways))


def _reader(dialect: Dialect) -> Callable[[Any], Any]:
    read: Callable[[Any], Any] = StoredObjectRefType().dialect_impl(dialect).result_processor(dialect, None)  # type: ignore[assignment]  # it has one
    return read


def _value(
    table: Table, primary_key: tuple[Any, ...], column: Column[Any], raw: Any, read: Callable[[Any], Any]
) -> HeldValue | None:
    if raw is None:
        return None
    try:
        raw = raw.decode() if isinstance(raw, bytes) else raw
        ref = read(raw)
    except UnicodeDecodeError as error:
        problem = InvalidReferenceError(f"the column does not hold text in UTF-8: {error.reason}")
        return HeldValue(table, primary_key, column, raw, error=problem)
    except InvalidReferenceError as error:
        return HeldValue(table, primary_key, column, raw, error=error)
    return None if ref is None else HeldValue(table, primary_key, column, raw, ref)


def _text_of(table: Table, primary_key: tuple[Any, ...]) -> str:
    return json.dumps([table.fullname, *map(_plain, primary_key)], ensure_ascii=False)


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return value.hex()
        case datetime() | date() | time():
            return value.isoformat()
        case _:
            return str(value)


def _revived(column: Column[Any], value: Any) -> Any:
    """Return a part of a primary key from its text."""
    try:
        kind = column.type.python_type
    except NotImplementedError:
        return value
    if not isinstance(value, str) or kind is str:
        return value
    if kind in (datetime, date, time):
        return kind.fromisoformat(value)
    if kind is bytes:
        return bytes.fromhex(value)
    return kind(value) if kind in (UUID, Decimal, int) else value
