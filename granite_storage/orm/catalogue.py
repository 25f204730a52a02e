"""Where the columns of refs are in a database: those that models mean, and those of the same names in every other schema.

A table may have been cloned into another schema, with rows that refer to the same objects: of a tenant, of an archive, of a copy
for tests. No model declares such a table and no session need have used it, so each check asks the catalogue of the database.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Text,
    column,
    exists,
    func,
    literal,
    literal_column,
    or_,
    select,
    table,
)
from sqlalchemy import cast as to_type

from granite_storage.locations import generated_id
from granite_storage.orm.discovery import NamedColumn, Obstacle, as_found, find_named_columns
from granite_storage.orm.references import location_column_name

__all__ = ["Catalogue", "Place", "describe_obstacles", "mentions_at", "read_catalogue"]

_OBSTACLES: dict[Obstacle, tuple[str, str]] = {
    "privileges": ("{role} may not read {tables}", "grant it SELECT"),
    "row security": (
        "row-level security may hide rows of {tables} from {role}",
        "bind a StorageJournal whose engine has a role that sees all rows, or leave the objects to a garbage collector that does",
    ),
    "temporary table": (
        "a temporary table of the same name hides the rows of {tables}",
        "drop it before the transaction deletes or replaces files",
    ),
}
_UNESCAPED = re.compile("[0-9A-Za-z._-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """A column as it stands in the database.

    Attributes:
        schema: The schema; None for a table that is looked for where its name leads.
        table: The table.
        name: The column.
        is_generated: Whether a generated column beside it has the locations; see `granite_storage.orm.references`.
        obstacle: What may hide its rows from this connection; None where nothing does.
        is_text: Whether refs may be anywhere in its text, rather than JSON into which SQL looks by key.
    """

    schema: str | None
    table: str
    name: str
    is_generated: bool = False
    obstacle: Obstacle | None = None
    is_text: bool = False

    @property
    def names(self) -> tuple[str, str, str]:
        """Its names, to sort by."""
        return self.schema or "", self.table, self.name

    @property
    def label(self) -> str:
        """The table, as messages name it."""
        return f"{self.schema}.{self.table}" if self.schema else self.table

    @property
    def column(self) -> Column[Any]:
        """The column for statements that translate no schema; they are compiled once, since its table goes by its name."""
        found = table(self.table, column(self.name, JSON()), schema=self.schema)
        return cast(Column[Any], found.c[self.name])

    def keyed(self, keys: Iterable[Column[Any]]) -> Column[Any]:
        """Return the column of a table with a primary key, for the same statements."""
        return as_found(str(self.schema), self.table, self.name, keys=keys)


class Catalogue:
    """What a database has at a moment under the names of some columns.

    Args:
        connection: A connection, whose dialect tells which names are the same.
        columns: The columns.
        found: What it has.
    """

    def __init__(self, connection: Connection, columns: Iterable[Column[Any]], found: Iterable[NamedColumn]) -> None:
        self._preparer = connection.dialect.identifier_preparer
        self._is_postgresql = connection.dialect.name == "postgresql"
        self._columns = list(columns)
        self._tables: dict[tuple[str, str], dict[str, NamedColumn]] = {}
        self._default: dict[str, str] = {}
        for item in found:
            schema, name = self._known(item.schema), self._known(item.table)
            named = self._tables.setdefault((schema, name), {})
            if item.name is not None:
                named[self._known(item.name)] = item
            if item.is_default:
                self._default[name] = schema

    def has_table(self, schema: str | None, name: str) -> bool:
        """Tell whether there is a table, named as a model or a translation of its schema names it."""
        return self._find(schema, name) is not None

    def place(self, schema: str | None, wanted: Column[Any]) -> Place | None:
        """Return where a model's column is, in a schema that the model names or one that stands for it; None where nowhere."""
        named = self._find(schema, wanted.table.name)
        return None if named is None else self._place(named, wanted)

    def namesakes(self) -> dict[Place, Column[Any]]:
        """Return all columns that have the names of a model's column and table and may hold refs, in all schemas."""
        places: dict[Place, Column[Any]] = {}
        by_table: dict[str, list[Column[Any]]] = {}
        for item in self._columns:
            by_table.setdefault(self._folded(item.table.name), []).append(item)
        for (_, name), named in self._tables.items():
            for wanted in by_table.get(name, ()):
                found = named.get(self._folded(wanted.name))
                if found is not None and found.form is not None and (place := self._place(named, wanted)) is not None:
                    places.setdefault(place, wanted)
        return places

    def _find(self, schema: str | None, name: str) -> dict[str, NamedColumn] | None:
        table_name = self._folded(name)
        schema_name = self._default.get(table_name) if schema is None else self._folded(schema)
        return None if schema_name is None else self._tables.get((schema_name, table_name))

    def _place(self, named: Mapping[str, NamedColumn], wanted: Column[Any]) -> Place | None:
        found = named.get(self._folded(wanted.name))
        if found is None or found.name is None:
            return None
        is_generated = self._known(location_column_name(wanted.name)) in named
        return Place(found.schema, found.table, found.name, is_generated, found.obstacle, found.form == "text")

    def _known(self, name: str) -> str:
        """Return a name of the database, so that it can be compared."""
        return name if self._is_postgresql else name.lower()

    def _folded(self, name: str) -> str:
        """Return a name of a model as the database has it: PostgreSQL folds one that is not quoted."""
        if self._is_postgresql and self._preparer.quote(name) != name:
            return str(name)
        return name.lower()


def describe_obstacles(places: Iterable[Place], role: str = "this role") -> list[tuple[str, str]]:
    """Return what hides, or may hide, rows of some places from a role, each with what to do about it."""
    labels: dict[Obstacle, set[str]] = {}
    for place in places:
        if place.obstacle is not None:
            labels.setdefault(place.obstacle, set()).add(place.label)
    return [
        (problem.format(role=role, tables=", ".join(sorted(labels[kind]))), remedy)
        for kind, (problem, remedy) in _OBSTACLES.items()
        if kind in labels
    ]


def mentions_at(place: Place, dialect: str, locations: Iterable[str]) -> Iterator[tuple[ColumnElement[str], ColumnElement[bool]]]:
    """Yield each of the locations with whether a value at a place mentions it.

    What counts is the generated id, which no encoder of text escapes, or else as much of the location as none escapes. Bytes
    within an array or a row of PostgreSQL are hex digits in its text.
    """
    stored = place.column
    for location in locations:
        sought = generated_id(location) or max(_UNESCAPED.findall(location), key=len, default="")
        if dialect == "postgresql":
            value = to_type(stored, Text())
            is_mentioned = or_(func.strpos(value, sought) > 0, func.strpos(value, sought.encode().hex()) > 0)
        else:
            is_mentioned = func.locate(sought, stored) > 0
        yield literal(location, Text()), exists(select(literal_column("1")).select_from(stored.table).where(is_mentioned))


def read_catalogue(connection: Connection, columns: Sequence[Column[Any]]) -> Catalogue:
    """Ask a database for all columns that have the names of some, and for the tables that lack them; blocking."""
    tables = sorted({_spelled(connection, item.table.name) for item in columns})
    names = {_spelled(connection, item.name) for item in columns}
    if connection.dialect.name in ("mysql", "mariadb"):
        names |= {location_column_name(item.name) for item in columns}
    return Catalogue(connection, columns, find_named_columns(connection, tables, sorted(names)) if tables else [])


def _spelled(connection: Connection, name: str) -> str:
    """Return a name as the catalogue of the database spells it, which only PostgreSQL folds."""
    if connection.dialect.name == "postgresql" and connection.dialect.identifier_preparer.quote(name) == name:
        return name.lower()
    return str(name)
