"""The tables and columns of a database that no model need name, according to its catalogue, and the refs in them.

A model that was not imported is in no metadata, and the table that a model names depends on the schema translation of a
connection and on the search path of the database. All functions block: call them with `AsyncConnection.run_sync`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Select,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from granite_storage.locations import GENERATED_ID_LENGTH
from granite_storage.orm._util import UNTRANSLATED, attached_databases, batches
from granite_storage.orm.columns import json_in, unnest_variants, value_in

_POSTGRESQL_COLUMNS = text("""
    WITH RECURSIVE documents(oid) AS (
        SELECT 'jsonb'::regtype::oid
        UNION SELECT t.oid FROM pg_type AS t JOIN documents AS d ON d.oid = t.typbasetype WHERE t.typtype = 'd'
    ), bytes(oid) AS (
        SELECT 'bytea'::regtype::oid
        UNION SELECT t.oid FROM pg_type AS t JOIN bytes AS b ON b.oid = t.typbasetype WHERE t.typtype = 'd'
    ), parts(whole, part) AS (
        SELECT oid, typbasetype FROM pg_type WHERE typtype = 'd'
        UNION ALL SELECT oid, typelem FROM pg_type WHERE typcategory = 'A' AND typelem <> 0
        UNION ALL SELECT rngtypid, rngsubtype FROM pg_range
        UNION ALL SELECT (to_jsonb(r) ->> 'rngmultitypid')::oid, rngsubtype FROM pg_range AS r
        UNION ALL SELECT c.reltype, a.atttypid FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
        WHERE c.reltype <> 0 AND a.attnum > 0 AND NOT a.attisdropped
    ), nested(oid) AS (
        SELECT 'bytea'::regtype::oid
        UNION SELECT p.whole FROM parts AS p JOIN nested AS x ON x.oid = p.part
    ), texts(oid) AS (
        SELECT t.oid FROM pg_type AS t
        WHERE t.typtype = 'b' AND (t.typlen < 0 OR t.typlen >= :shortest) AND t.oid <> 'bytea'::regtype
            AND NOT (t.typcategory = 'A' AND t.typelem <> 0) AND NOT (
                t.typnamespace = 'pg_catalog'::regnamespace AND t.typname IN (
                    'bit', 'box', 'cidr', 'inet', 'lseg', 'numeric', 'path', 'pg_snapshot', 'polygon', 'txid_snapshot', 'varbit'
                )
            )
        UNION SELECT enumtypid FROM pg_enum WHERE length(enumlabel) >= :shortest
        UNION SELECT p.whole FROM parts AS p JOIN texts AS x ON x.oid = p.part
    )
    SELECT n.nspname, c.relname, a.attname,
        has_schema_privilege(n.oid, 'USAGE') AND has_column_privilege(c.oid, a.attnum, 'SELECT'), c.relkind = 'f',
        a.atttypid IN (SELECT oid FROM documents), row_security_active(c.oid), a.atttypid IN (SELECT oid FROM bytes), false,
        a.atttypid IN (SELECT oid FROM nested) AND a.atttypid NOT IN (SELECT oid FROM bytes)
    FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE a.attnum > 0 AND NOT a.attisdropped AND a.atttypid IN (SELECT oid FROM texts UNION ALL SELECT oid FROM nested)
        AND NOT (a.atttypid IN ('varchar'::regtype, 'bpchar'::regtype) AND a.atttypmod BETWEEN 4 AND 3 + :shortest)
        AND c.relkind IN ('r', 'p', 'f', 'm') AND NOT c.relispartition AND c.relispopulated
        AND n.nspname <> 'information_schema' AND left(n.nspname, 3) <> 'pg_'
    ORDER BY 1, 2, 3
""")
_MARIADB_COLUMNS = text("""
    SELECT c.table_schema, c.table_name, c.column_name, c.privileges LIKE '%select%', 0, c.data_type IN ('json', 'longtext'), 0,
        c.data_type LIKE '%blob' OR c.data_type LIKE '%binary',
        c.data_type NOT IN ('json', 'longtext', 'mediumtext', 'text', 'tinytext', 'blob', 'mediumblob', 'longblob', 'tinyblob',
            'varchar', 'char', 'varbinary', 'binary', 'enum', 'set'), 0
    FROM information_schema.columns AS c
    JOIN information_schema.tables AS t ON t.table_schema = c.table_schema AND t.table_name = c.table_name
    WHERE (c.data_type IN ('json', 'longtext', 'mediumtext', 'text', 'tinytext')
            OR c.data_type IN ('blob', 'mediumblob', 'longblob', 'tinyblob')
            OR c.data_type IN ('varchar', 'char', 'varbinary', 'binary', 'enum', 'set')
                AND c.character_maximum_length >= :shortest
            OR c.data_type NOT IN ('varchar', 'char', 'varbinary', 'binary', 'enum', 'set', 'tinyint', 'smallint', 'mediumint',
                'int', 'bigint', 'decimal', 'float', 'double', 'bit', 'date', 'datetime', 'timestamp', 'time', 'year', 'uuid',
                'inet4', 'inet6', 'vector', 'geometry', 'point', 'linestring', 'polygon', 'multipoint', 'multilinestring',
                'multipolygon', 'geometrycollection', 'geomcollection'))
        AND t.table_type IN ('BASE TABLE', 'SYSTEM VERSIONED')
        AND c.table_schema NOT IN ('information_schema', 'mysql', 'performance_schema', 'sys')
    ORDER BY 1, 2, 3
""")


@dataclass(frozen=True, slots=True)
class FoundColumn:
    """A column that the database has, of a type that can hold text or bytes.

    Attributes:
        schema: The schema, as the database calls it.
        table: The table.
        name: The column.
        is_readable: Whether this role may read it.
        is_foreign: Whether its rows are on another server.
        is_json: Whether it is of JSON that SQL can query, whatever a value is. PostgreSQL's `json` is not: it holds texts
            that fail as `jsonb`.
        is_partial: Whether row-level security may hide rows from this role.
        is_binary: Whether it is of bytes; on SQLite, where any column can hold some, it is false.
        is_unknown: Whether its type is unknown, so that its text cannot be searched.
        nests_bytes: Whether its values may contain bytes, as in an array of PostgreSQL, though it is not of bytes itself.
    """

    schema: str
    table: str
    name: str
    is_readable: bool = True
    is_foreign: bool = False
    is_json: bool = True
    is_partial: bool = False
    is_binary: bool = False
    is_unknown: bool = False
    nests_bytes: bool = False

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.schema}.{self.table}.{self.name}"


def find_json_columns(connection: Connection) -> list[FoundColumn]:
    """Return every column of JSON in the tables of every schema that is visible to this role, except system schemas."""
    return [column for column in find_text_columns(connection) if column.is_json]


def find_text_columns(connection: Connection) -> list[FoundColumn]:
    """Return every column that can hold a generated id as text, JSON and bytes included, in the tables of every schema.

    Those are, on PostgreSQL, columns of all types but those of numbers, times, addresses, bits and shapes, and of arrays, ranges,
    domains and composite types of the others; on MariaDB those of text, JSON and bytes, and those of unknown types; on SQLite,
    where any column can hold any of it, all but generated ones. Columns that are too short are left out, as are enumerated types
    whose labels are, and virtual tables of SQLite, which keep what they have in others.
    """
    shortest = {"shortest": GENERATED_ID_LENGTH}
    match connection.dialect.name:
        case "postgresql":
            rows: Iterable[Any] = connection.execute(_POSTGRESQL_COLUMNS, shortest, execution_options=UNTRANSLATED)
        case "sqlite":
            rows = [row for schema in attached_databases(connection) for row in _sqlite_columns(connection, schema)]
        case _:
            rows = connection.execute(_MARIADB_COLUMNS, shortest, execution_options=UNTRANSLATED)
    return [FoundColumn(schema, table, name, *map(bool, facts)) for schema, table, name, *facts in rows]


def _sqlite_columns(connection: Connection, schema: str) -> list[tuple[Any, ...]]:
    quoted = connection.dialect.identifier_preparer.quote(schema)
    statement = f"""
        SELECT m.name, c.name, upper(c.type) LIKE '%JSON%'
        FROM {quoted}.sqlite_master AS m, pragma_table_info(m.name, :schema) AS c
        WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite~_%' ESCAPE '~' AND m.sql NOT LIKE 'CREATE VIRTUAL TABLE%'
        ORDER BY 1, 2
    """  # noqa: S608  # quoted
    rows = connection.execute(text(statement), {"schema": schema})
    return [(schema, table, name, True, False, is_json, False, False) for table, name, is_json in rows]


# Recognizing refs in SQL, in columns that no model describes.


_COLUMN_BATCH_SIZE = 50
_LOOKED_AT = 100


def find_with_refs(
    connection: Connection,
    columns: Sequence[Column[Any]],
    identities: Sequence[str] | None,
    *,
    is_certain: bool = False,
    is_sample: bool,
) -> list[Column[Any]]:
    """Return those of the columns that contain a reference which may lead to a store; blocking.

    Args:
        connection: A connection.
        columns: Columns of tables that are named as the database names them.
        identities: Those that the store answers to. None: every ref may lead there.
        is_certain: Whether a ref without an identity does not count: it may be of any store.
        is_sample: Whether to look at the first hundred values of each only.
    """
    dialect, found = connection.dialect.name, list[Column[Any]]()
    for batch in batches(columns, _COLUMN_BATCH_SIZE):
        asked: list[Select[Any]] = [
            select(literal_column(str(number))).where(exists(_refs_in(column, dialect, identities, is_certain, is_sample)))
            for number, column in enumerate(batch)
        ]
        statement = union_all(*asked).execution_options(schema_translate_map={})
        found += [batch[number] for (number,) in connection.execute(statement)]
    return found


def has_value(column: Column[Any], dialect: str) -> ColumnElement[bool]:
    """Return the criterion that a value is neither NULL nor the JSON value null."""
    if dialect == "postgresql":
        return func.jsonb_typeof(cast(column, JSONB)) != "null"
    if dialect == "sqlite":
        return and_(column.is_not(None), case((func.json_valid(column) == 1, func.json_type(column) != "null"), else_=true()))
    return and_(column.is_not(None), func.coalesce(func.json_type(column), "") != "NULL")


def is_legible(column: ColumnElement[Any], dialect: str) -> ColumnElement[bool]:
    """Return the criterion that a value has the form of a reference, whatever its variants are; never NULL."""
    kinds = _KINDS[dialect]
    texts = [_kind_of(column, key, dialect) == kinds["text"] for key in ("storage_key", "backend", "location")]
    is_sized = _kind_of(column, "size", dialect) == kinds["number"]
    sound = and_(*texts, is_sized, value_in(column, "location", dialect) != "")
    if dialect == "sqlite":  # a JSON function fails there on a value that is not JSON
        return case((func.json_valid(column) == 1, func.coalesce(sound, false())), else_=false())
    return func.coalesce(sound, false())


def may_nest(value: ColumnElement[Any], dialect: str, *, is_variant: bool = False) -> ColumnElement[bool]:
    """Return the criterion that what a legible reference has for variants can be some, whose values are to be asked; never NULL.

    Args:
        value: The reference.
        dialect: The name of the database.
        is_variant: Whether it is a variant itself, which has none.
    """
    kinds = _KINDS[dialect]
    allowed = [kinds["null"]] if is_variant else [kinds["null"], kinds["mapping"]]
    return func.coalesce(_kind_of(value, "variants", dialect), kinds["null"]).in_(allowed)


def _kind_of(value: ColumnElement[Any], key: str, dialect: str) -> ColumnElement[Any]:
    """Return what a database calls the type of what a JSON object has under a key, in SQL; NULL where it has nothing."""
    if dialect == "sqlite":
        return func.json_type(value, literal_column(f"'$.{key}'"))
    found = json_in(value, key, dialect)
    return func.jsonb_typeof(found) if dialect == "postgresql" else func.json_type(found)


_ON_MARIADB = {"text": "STRING", "number": "INTEGER", "mapping": "OBJECT", "null": "NULL"}
_KINDS = {
    "postgresql": {"text": "string", "number": "number", "mapping": "object", "null": "null"},
    "sqlite": {"text": "text", "number": "integer", "mapping": "object", "null": "null"},
    "mysql": _ON_MARIADB,
    "mariadb": _ON_MARIADB,
}
"""What databases call the types of JSON."""


def _refs_in(
    column: Column[Any], dialect: str, identities: Sequence[str] | None, is_certain: bool, is_sample: bool
) -> Select[Any]:
    if is_sample:
        rows = select(column).where(column.is_not(None)).limit(_LOOKED_AT).subquery("looked_at")
        value: Column[Any] = rows.c[column.name]  # type: ignore[assignment]  # it is one of a subquery
    else:
        value = column

    def leads_here(ref: ColumnElement[Any]) -> ColumnElement[bool]:
        here: ColumnElement[bool] = true()
        if identities is not None:
            identity = value_in(ref, "identity", dialect)
            here = identity.in_(identities) if is_certain else or_(identity.is_(None), identity.in_(identities))
        return case((is_legible(ref, dialect), here), else_=false())

    variants, variant, has_some = unnest_variants(value, dialect)
    nests_one = and_(has_some, exists(select(literal_column("1")).select_from(variants).where(leads_here(variant))))
    return select(literal_column("1")).where(has_value(value, dialect), or_(leads_here(value), nests_one))
