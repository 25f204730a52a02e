"""What triggers are made of on every database: the tables as they stand in it, and what a database's own module provides."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Connection, text

from granite_storage.orm._interfaces import JournalTables
from granite_storage.orm._util import UNTRANSLATED

__all__ = ["CREATE_AGAIN", "GuardedTable", "Holder", "TriggerDialect", "TriggerSource", "literal", "quoted", "run"]

CREATE_AGAIN = "create them with create_all, or by a migration with create_storage_triggers(op, ...)"
"""What to do about triggers that are missing or old."""


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A column whose rows may refer to objects; its table as it stands in the database."""

    schema: str
    table: str
    column: str


@dataclass(frozen=True, slots=True)
class GuardedTable:
    """A table with attachment columns, as it stands in the database.

    Attributes:
        schema: Its schema.
        name: Its name.
        keys: The columns of its primary key.
        columns: Its attachment columns.
    """

    schema: str
    name: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]


class TriggerSource(Protocol):
    """The triggers of one table, as they are to be."""

    def create(self, connection: Connection) -> None:
        """Create what is missing of them, or is of another version or for other columns; and the indexes that they need."""
        ...

    def is_current(self, connection: Connection) -> bool:
        """Return whether the table has these very triggers."""
        ...

    def find_problems(self, connection: Connection) -> list[str]:
        """Return what is wrong with those that are there, and with the indexes, in words; none twice for several tables."""
        ...


class TriggerDialect(Protocol):
    """What the module of a database provides."""

    def source(
        self,
        connection: Connection,
        table: GuardedTable,
        holders: Sequence[Holder],
        journal: JournalTables,
        schema: str,
    ) -> TriggerSource:
        """Return the triggers of a table.

        Args:
            connection: A connection to the database.
            table: The table.
            holders: Every column whose rows are evidence for a location.
            journal: The journal's tables.
            schema: The schema that they are in.
        """
        ...

    def drop(self, connection: Connection, schema: str, table: str) -> None:
        """Drop the triggers of a table, and what belongs to them alone; nothing happens where they are gone already."""
        ...

    def has_some(self, connection: Connection, schema: str, table: str) -> bool:
        """Return whether a table has any of these triggers."""
        ...

    def find_gone(self, connection: Connection, schemas: Collection[str], declared: Sequence[Holder]) -> list[str]:
        """Return in words what is gone that triggers name, or were made for, and the tables that have them.

        Args:
            connection: A connection to the database.
            schemas: The schemas of the tables of the models.
            declared: The columns of refs and the primary keys that the models have, whether they are there or not.
        """
        ...

    def find_in_the_way(self, connection: Connection, tables: Collection[str]) -> list[str]:
        """Return the tables whose triggers name others that a migration changes, and keep it from that.

        Args:
            connection: A connection to the database.
            tables: The names of the tables that it changes in any way, as models name them.
        """
        ...


def quoted(name: str) -> str:
    """Quote an identifier of PostgreSQL or SQLite."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: str) -> str:
    """Quote a text in SQL."""
    return "'" + value.replace("'", "''") + "'"


def run(connection: Connection, statement: str) -> None:
    """Execute a statement that is complete, whatever colons there are in it."""
    connection.execute(text(statement.replace(":", r"\:")), execution_options=UNTRANSLATED)
