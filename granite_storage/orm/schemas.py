"""The schemas that the tables of models are in: the one that sessions lead to, and all others of the same database.

An application may keep the rows of each tenant in a schema of their own. No model names these schemas, and the sessions of a
command lead to one of them at most. So they are looked for in the catalogue of the database, as before a delete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, Connection, Table, Text, cast, exists, literal_column, select, text
from sqlalchemy.exc import DBAPIError

from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._util import TRANSLATE_MAP, UNTRANSLATED, group, schema_on
from granite_storage.orm.columns import as_found
from granite_storage.orm.discovery import find_with_refs
from granite_storage.orm.locking import Catalogue, Place, describe_obstacles, read_catalogue

_MARIADB_TABLE = text("""
    SELECT table_schema, table_name FROM information_schema.tables
    WHERE table_name = :name AND table_schema = COALESCE(:schema, DATABASE())
""")
_TO_CHOOSE = "if it belongs to this application, name its schema (schemas=...)"


@dataclass(frozen=True, slots=True)
class OtherSchema:
    """A schema other than the one that the sessions lead to, with a table of a model in it.

    Attributes:
        name: Its name, as the database calls it.
        doubt: Why its rows must not be changed; empty where they may be.
    """

    name: str
    doubt: str = ""


@dataclass(frozen=True, slots=True)
class FoundTable:
    """A table of a model, in one schema.

    Attributes:
        table: The table of the model.
        columns: Its columns of refs that this table has.
        other_schema: Its schema; None for the table that the sessions lead to.
    """

    table: Table
    columns: tuple[Column[Any], ...]
    other_schema: OtherSchema | None = None

    @property
    def order(self) -> tuple[bool, str, str]:
        """The key to sort by: what the sessions lead to comes first, so that a key of it leaves all other schemas to do."""
        return self.other_schema is not None, "" if self.other_schema is None else self.other_schema.name, self.table.fullname

    @property
    def options(self) -> Mapping[str, Any]:
        """The execution options that lead a statement on the model's table to this one."""
        return options_of(self.table, self.other_schema)


@dataclass(frozen=True, slots=True)
class Identities:
    """The stores that the backends of a manager lead to.

    Attributes:
        known: Their identities.
        is_complete: Whether each of them has told its own.
    """

    known: tuple[str, ...]
    is_complete: bool


def options_of(table: Table, other_schema: OtherSchema | None) -> Mapping[str, Any]:
    """Return the execution options that lead a statement on a model's table to a schema; not cached, as other maps differ."""
    return {} if other_schema is None else {TRANSLATE_MAP: {table.schema: other_schema.name}, "compiled_cache": None}


def name_of(table: Table, other_schema: OtherSchema | None) -> str:
    """Return the name of a table in messages, with its schema."""
    return table.fullname if other_schema is None else f"{other_schema.name}.{table.name}"


def resolve(connection: Connection, table: Table) -> tuple[str, str] | None:
    """Return schema and name of the table that a model's table resolves to on a connection, after translation; or None.

    It blocks: call it with `AsyncConnection.run_sync`.
    """
    schema = schema_on(connection, table)
    found = read_catalogue(connection, [], [table]).table(schema, table.name)
    if found is None and connection.dialect.name in ("mysql", "mariadb"):
        # The catalogue has no columns of a table for a role that may change it and not use it.
        names = {"name": table.name, "schema": schema}
        row = connection.execute(_MARIADB_TABLE, names, execution_options=UNTRANSLATED).first()
        found = None if row is None else (str(row[0]), str(row[1]))
    return found


@dataclass(frozen=True, slots=True)
class Namesake:
    """A table with the name of a model's table in a schema other than the one that the sessions lead to.

    Attributes:
        table: The table of the model.
        schema: The schema.
        places: The columns that have the names of the model's columns of refs.
        lacking: The columns that the model has, and this table does not.
    """

    table: Table
    schema: str
    places: Mapping[Column[Any], Place]
    lacking: frozenset[str]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.schema}.{self.table.name}"


def find_in_schemas(
    connection: Connection, columns: Collection[Column[Any]], schemas: Collection[str]
) -> tuple[list[FoundTable], list[Namesake], list[str]]:
    """Return the tables with columns of refs in every schema of a database, according to its catalogue; blocking.

    Args:
        connection: A connection of the application's sessions.
        columns: The models' columns of refs.
        schemas: Those that are looked into; none for all.

    Returns:
        The tables that the sessions lead to, those of the same names in other schemas, and in words what hides rows of the first.

    Raises:
        ConfigurationError: One of the schemas has none of the tables.
    """
    tables = group(columns, lambda item: item.table)
    catalogue = read_catalogue(connection, [column for table in tables for column in table.columns])
    found: list[FoundTable] = []
    hidden: list[str] = []
    own: set[tuple[str | None, str]] = set()
    missing: list[Table] = []
    for table, of_refs in tables.items():
        schema = schema_on(connection, table)
        places = [place for item in table.columns if (place := catalogue.place(schema, item)) is not None]
        own.update((place.schema, place.table) for place in places)
        if catalogue.table(schema, table.name) is None:
            missing.append(table)
        elif not schemas or any(place.schema in schemas for place in places):
            found.append(FoundTable(table, tuple(of_refs)))
            # The statement on it fails where the role may not read it.
            hidden += _describe_hidden(place for place in places if place.obstacle != "privileges")
    others: dict[tuple[str, Table], dict[Column[Any], Place]] = {}
    for place, item in catalogue.namesakes().items():
        if item in columns and place.schema is not None and (place.schema, place.table) not in own:
            others.setdefault((place.schema, item.table), {})[item] = place
    if unknown := sorted(set(schemas) - {schema for schema, _ in own} - {schema for schema, _ in others}):
        raise ConfigurationError(f"the schema {unknown[0]!r} has none of the tables with files: check its name")
    if not schemas:
        elsewhere = {table for _, table in others}
        # Nothing has it: the statement on it says so.
        found += [FoundTable(table, tuple(tables[table])) for table in missing if table not in elsewhere]
    namesakes = [
        Namesake(table, schema, places, _lacking(catalogue, schema, table))
        for (schema, table), places in others.items()
        if not schemas or schema in schemas
    ]
    return found, namesakes, hidden


def judge_namesakes(
    connection: Connection, namesakes: Iterable[Namesake], identities: Identities, *, are_chosen: bool
) -> tuple[list[FoundTable], list[str]]:
    """Return those tables of other schemas that may belong to the application, and in words what cannot be read; blocking.

    One belongs to it if a ref in it says that it is of a store of the manager, or if its schema was chosen. It may belong to it
    if its refs do not say of which store they are, or if it has all columns of the model. What has neither refs nor the columns
    of the model is left out.
    """
    found: list[FoundTable] = []
    unseen: list[str] = []
    for namesake in namesakes:
        unseen += _describe_hidden(namesake.places.values())
        if any(place.obstacle == "privileges" for place in namesake.places.values()):
            continue
        try:
            other_schema, problems = _judge(connection, namesake, identities, is_chosen=are_chosen)
        except DBAPIError as error:
            other_schema, problems = None, [f"{namesake.name} could not be read: {error.orig or error}"]
        unseen += problems
        if other_schema is not None:
            legible = tuple(item for item, place in namesake.places.items() if not place.is_text)
            found.append(FoundTable(namesake.table, legible, other_schema))
    return found, unseen


def _judge(
    connection: Connection, namesake: Namesake, identities: Identities, *, is_chosen: bool
) -> tuple[OtherSchema | None, list[str]]:
    """Return what a table in another schema is to the application, None where it is not read, and what cannot be seen of it."""
    name, places = namesake.name, namesake.places.values()
    problems = [
        f"{name}.{place.name} holds text that may be references, and no JSON"
        for place in places
        if place.is_text and _looks_like_refs(connection, place)
    ]
    found = [as_found(namesake.schema, place.table, place.name) for place in places if not place.is_text]
    if not found:
        return None, problems
    is_certain = _has_refs(connection, found, identities.known, is_certain=True)
    is_possible = is_certain or _has_refs(connection, found, identities.known if identities.is_complete else None)
    has_some = is_possible or _has_refs(connection, found, None)
    is_ours = is_certain or is_chosen
    if not is_ours and has_some and not is_possible:
        said = f"every reference in {name} says that it is of a store to which no backend leads"
        return None, [*problems, f"{said}: {_TO_CHOOSE}, and give the manager the backend"]
    if not is_ours and namesake.lacking and not has_some:
        return None, problems  # another application's, without a reference
    table, lacking = namesake.table, ", ".join(sorted(namesake.lacking))
    if any(item.name in namesake.lacking for item in table.primary_key) or any(place.table != table.name for place in places):
        return None, [*problems, f"{name} is not the table of the model: it has another name or another primary key"]
    if not is_ours:
        said = f"no reference in {name} says that it is of a store of this application: {_TO_CHOOSE}"
        return OtherSchema(namesake.schema, said), problems
    if lacking:
        said = f"{name} has no column {lacking}, though the model has: run the migrations for this schema"
        return OtherSchema(namesake.schema, said), problems
    return OtherSchema(namesake.schema), problems


def _lacking(catalogue: Catalogue, schema: str, table: Table) -> frozenset[str]:
    return frozenset(item.name for item in table.columns if item.computed is None and catalogue.place(schema, item) is None)


def _describe_hidden(places: Iterable[Place]) -> list[str]:
    return [f"{problem}: give the binding sessions to which nothing hides a row" for problem, _ in describe_obstacles(places)]


def _has_refs(
    connection: Connection, columns: Sequence[Column[Any]], identities: Sequence[str] | None, *, is_certain: bool = False
) -> bool:
    with connection.begin_nested():  # on PostgreSQL an error would end the transaction
        return bool(find_with_refs(connection, columns, identities, is_certain=is_certain, is_sample=False))


def _looks_like_refs(connection: Connection, place: Place) -> bool:
    column = place.column
    is_one = cast(column, Text()).like('%"storage\\_key"%', escape="\\")
    statement = select(exists(select(literal_column("1")).select_from(column.table).where(is_one)))
    return bool(connection.scalar(statement, execution_options=UNTRANSLATED))
