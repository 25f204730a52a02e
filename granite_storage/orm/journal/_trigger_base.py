"""What triggers are made of on every database: the tables as they stand in it, and what a database's own module provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, TypeAlias

from sqlalchemy import Connection, CursorResult, TextClause, text
from sqlalchemy.schema import CreateIndex

from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm._util import UNTRANSLATED, group
from granite_storage.orm.columns import location_index

__all__ = [
    "CREATE_AGAIN",
    "RENAME_BACK",
    "GuardedTable",
    "Holder",
    "Place",
    "TableTriggers",
    "ask",
    "describe_gone",
    "describe_triggers",
    "find_gone_columns",
    "literal",
    "quoted",
    "run",
]

RENAME_BACK = (
    "Rename it back; or deploy models with the new name, and create the triggers again with create_all, or by a migration with"
    " create_storage_triggers(op, ...)"
)
"""What to do about tables and columns that are gone."""

CREATE_AGAIN = "create them with create_all, or by a migration with create_storage_triggers(op, ...)"
"""What to do about triggers that are missing or old."""

Place: TypeAlias = tuple[str, str]
"""A schema and a table."""


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A column whose rows may refer to objects; its table as it stands in the database."""

    schema: str
    table: str
    column: str

    @property
    def place(self) -> Place:
        """Its table."""
        return self.schema, self.table


@dataclass(frozen=True, slots=True)
class GuardedTable:
    """A table with attachment columns, as it stands in the database.

    Attributes:
        schema: Its schema.
        name: Its name.
        keys: The columns of its primary key.
        columns: Its attachment columns.
        holders: Every column, of any table, whose rows are evidence for a location.
    """

    schema: str
    name: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    holders: Sequence[Holder]

    @property
    def place(self) -> Place:
        """Schema and name."""
        return self.schema, self.name


class TableTriggers(ABC):
    """The triggers of one table, as they are to be; each database has a class of its own.

    Args:
        connection: A connection to the database, whose catalogue says what else the triggers depend on.
        table: The table.
        journal: The journal's tables.
        schema: The schema that they are in.
    """

    _wrong_index = ""
    """What else may be wrong with an index, in words."""

    def __init__(self, connection: Connection, table: GuardedTable, journal: JournalTables, schema: str) -> None:
        self.table = table
        self.journal = journal

    def create(self, connection: Connection) -> None:
        """Create what is missing of them, or is of another version or for other columns; and the indexes that they need."""
        for holder in self._find_unindexed(connection):
            self._create_index(connection, holder)
        self._create_triggers(connection)

    @abstractmethod
    def is_current(self, connection: Connection) -> bool:
        """Return whether the table has these very triggers."""

    def find_problems(self, connection: Connection) -> list[str]:
        """Return what is wrong with those that are there, and with the indexes, in words; none twice for several tables."""
        return self._find_trigger_problems(connection) + [
            f"{self._label(holder)} has no index over the locations in {holder.column}, which each guarded row looks in"
            f"{self._wrong_index}: create_location_index(op, ...) in a migration makes one"
            for holder in self._find_unindexed(connection)
        ]

    def _label(self, holder: Holder) -> str:
        return ".".join(holder.place)

    def _find_unindexed(self, connection: Connection) -> list[Holder]:
        return [holder for holder in self.table.holders if not self._has_index(connection, holder)]

    @abstractmethod
    def _has_index(self, connection: Connection, holder: Holder) -> bool: ...

    def _create_index(self, connection: Connection, holder: Holder) -> None:
        index = location_index(connection.dialect.name, holder.table, holder.column, holder.schema)
        connection.execute(CreateIndex(index, if_not_exists=True), execution_options=UNTRANSLATED)

    @abstractmethod
    def _create_triggers(self, connection: Connection) -> None: ...

    @abstractmethod
    def _find_trigger_problems(self, connection: Connection) -> list[str]: ...

    # Of tables that may have triggers for other columns than those of the models.

    @staticmethod
    @abstractmethod
    def drop(connection: Connection, schema: str, table: str) -> None:
        """Drop the triggers of a table, and what belongs to them alone; nothing happens where they are gone already."""

    @staticmethod
    @abstractmethod
    def has_some(connection: Connection, schema: str, table: str) -> bool:
        """Return whether a table has any of these triggers."""

    @staticmethod
    @abstractmethod
    def find_gone(connection: Connection, schemas: Collection[str], declared: Sequence[Holder]) -> list[str]:
        """Return in words what is gone that triggers name, or were made for, and the tables that have them.

        Args:
            connection: A connection to the database.
            schemas: The schemas of the tables of the models.
            declared: The columns of refs and the primary keys that the models have, whether they are there or not.
        """

    @staticmethod
    def find_in_the_way(connection: Connection, tables: Collection[str]) -> list[str]:
        """Return the tables whose triggers name others that a migration changes, and keep it from that.

        Those of most databases name tables that need not be there.

        Args:
            connection: A connection to the database.
            tables: The names of the tables that it changes in any way, as models name them.
        """
        return []


def find_gone_columns(
    named: Iterable[tuple[str, Place, str]], columns: Callable[[Place], Collection[str]]
) -> Iterator[tuple[str, str]]:
    """Yield in words which of the columns that triggers name are gone, each with the table that has the trigger.

    Args:
        named: The table that has the trigger, and the table and the name of a column that it names.
        columns: Returns the names of the columns that a table has now.
    """
    columns = cache(columns)
    for table, place, column in named:
        there = columns(place)
        if column not in there:
            yield f"the column {column} of {'.'.join(place)}" if there else f"the table {'.'.join(place)}", table


def describe_gone(gone: Iterable[tuple[str, str]], consequence: str) -> list[str]:
    """Return in words that triggers name something that is gone, and what to do.

    Args:
        gone: What is gone, each with a table that has the triggers.
        consequence: What follows from it.
    """
    return [
        f"the triggers of {', '.join(dict.fromkeys(table for _, table in tables))} name {what}, which is gone, so"
        f" {consequence}. {RENAME_BACK}"
        for what, tables in sorted(group(gone, itemgetter(0)).items())
    ]


def describe_triggers(where: str, missing: Collection[str], outdated: Collection[str]) -> list[str]:
    """Return in words which triggers of a table are missing or old, and what to do."""
    problems: list[str] = []
    if missing:
        problems.append(f"{where} lacks the triggers {', '.join(sorted(missing))}: {CREATE_AGAIN}")
    if outdated:
        names = ", ".join(sorted(outdated))
        problems.append(
            f"the triggers {names} of {where} are of another version, or for other columns or unique indexes: {CREATE_AGAIN}"
        )
    return problems


def quoted(name: str) -> str:
    """Quote an identifier of PostgreSQL or SQLite."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: str) -> str:
    """Quote a text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def run(connection: Connection, statement: str) -> None:
    """Execute a statement that is complete, whatever colons there are in it."""
    ask(connection, text(statement.replace(":", r"\:")))


def ask(connection: Connection, statement: TextClause, **values: Any) -> CursorResult[*tuple[Any, ...]]:
    """Execute a statement with the values of its parameters."""
    return connection.execute(statement, values, execution_options=UNTRANSLATED)
