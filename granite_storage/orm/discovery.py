"""The tables and columns of a database, according to its catalogue: those that models name, and others with JSON or text.

A model names a table and perhaps a schema. Which table that is depends on the schema translation of a connection and on the
search path of the database; the schemas of other tenants have tables of the same name; and a model that was not imported is in
no metadata. All functions block: call them with `AsyncConnection.run_sync`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    JSON,
    Column,
    ColumnElement,
    Connection,
    MetaData,
    Select,
    Table,
    Text,
    TextClause,
    and_,
    bindparam,
    case,
    cast,
    column,
    exists,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
    table,
    text,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError

from granite_storage.locations import GENERATED_ID_LENGTH, generated_id
from granite_storage.orm._util import UNTRANSLATED, batches, codes_of
from granite_storage.orm.columns import StoredObjectRefType, location_column_name, unnest_variants, value_in

__all__ = [
    "Catalogue",
    "Form",
    "FoundColumn",
    "NamedColumn",
    "Obstacle",
    "Place",
    "as_found",
    "describe_obstacles",
    "find_json_columns",
    "find_named_columns",
    "find_tables",
    "find_text_columns",
    "find_with_refs",
    "has_value",
    "is_legible",
    "may_nest",
    "mentions_at",
    "read_catalogue",
    "resolve",
]

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
_POSTGRESQL_TABLES = text("""
    SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relname IN :names AND c.relkind IN ('r', 'p', 'f') AND left(n.nspname, 3) <> 'pg_'
        AND has_schema_privilege(n.oid, 'USAGE')
    ORDER BY 1, 2
""").bindparams(bindparam("names", expanding=True))
_POSTGRESQL_RESOLVED = text("""
    SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = to_regclass(:name)
""")
_POSTGRESQL_NAMED = text("""
    SELECT n.nspname, c.relname, a.attname, pg_table_is_visible(c.oid),
        CASE
            WHEN NOT COALESCE(has_schema_privilege(n.oid, 'USAGE') AND has_column_privilege(c.oid, a.attnum, 'SELECT'), true)
                THEN 'privileges'
            WHEN row_security_active(c.oid) THEN 'row security'
        END,
        CASE
            WHEN c.relkind NOT IN ('r', 'p', 'f', 'm') OR c.relispartition OR NOT c.relispopulated THEN NULL
            WHEN b.oid IN ('jsonb'::regtype, 'json'::regtype) THEN 'json'
            WHEN t.typlen = -1 AND t.typcategory NOT IN ('N', 'V', 'I') OR t.typlen >= :shortest THEN CASE
                WHEN b.oid IN ('varchar'::regtype, 'bpchar'::regtype) AND a.atttypmod BETWEEN 4 AND 3 + :shortest THEN NULL
                ELSE 'text'
            END
        END
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    LEFT JOIN pg_attribute AS a
        ON a.attrelid = c.oid AND a.attname = ANY (:columns) AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_type AS t ON t.oid = a.atttypid
    LEFT JOIN LATERAL (
        SELECT CASE WHEN t.typtype <> 'd' THEN t.oid ELSE (
            WITH RECURSIVE types(oid, base) AS (
                SELECT t.oid, t.typbasetype
                UNION ALL SELECT u.oid, u.typbasetype FROM pg_type AS u JOIN types ON u.oid = types.base
            )
            SELECT types.oid FROM types WHERE types.base = 0
        ) END AS oid
    ) AS b ON true
    WHERE c.relname = ANY (:tables) AND c.relkind IN ('r', 'p', 'f', 'm', 'v')
        AND n.nspname <> 'information_schema' AND (left(n.nspname, 3) <> 'pg_' OR n.oid = pg_my_temp_schema())
    ORDER BY 1, 2, 3
""").bindparams(bindparam("tables", type_=ARRAY(Text())), bindparam("columns", type_=ARRAY(Text())))
_MARIADB_NAMED = text("""
    SELECT table_schema, table_name, column_name, table_schema = DATABASE(),
        CASE WHEN privileges NOT LIKE '%select%' THEN 'privileges' END,
        CASE
            WHEN data_type = 'json' OR data_type = 'longtext' AND collation_name = 'utf8mb4_bin' THEN 'json'
            WHEN character_maximum_length >= :shortest THEN 'text'
        END
    FROM information_schema.columns
    WHERE table_name IN :tables AND (column_name IN :columns OR ordinal_position = 1)
        AND table_schema NOT IN ('information_schema', 'mysql', 'performance_schema', 'sys')
    ORDER BY 1, 2, 3
""").bindparams(bindparam("tables", expanding=True), bindparam("columns", expanding=True))
_MARIADB_TEMPORARY = "SHOW SESSION STATUS LIKE 'Com_create_temporary_table'"
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
_MARIADB_TABLES = text("""
    SELECT table_schema, table_name FROM information_schema.tables
    WHERE table_name IN :names AND table_type IN ('BASE TABLE', 'SYSTEM VERSIONED')
    ORDER BY 1, 2
""").bindparams(bindparam("names", expanding=True))
_MARIADB_RESOLVED = text("""
    SELECT table_schema, table_name FROM information_schema.tables
    WHERE table_name = :name AND table_schema = COALESCE(:schema, DATABASE())
""")
_CANNOT_SHOW = (1142, 1146, 1356)
"""No privilege, no such table, a broken view: https://mariadb.com/kb/en/mariadb-error-codes/"""

Form = Literal["json", "text"]
Obstacle = Literal["privileges", "row security", "temporary table"]


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


@dataclass(frozen=True, slots=True)
class NamedColumn:
    """A column with the name of a model's column, or a table with the name of a model's table.

    Attributes:
        schema: The schema, as the database calls it.
        table: The table or view.
        name: The column; None, or any other, if the table has none of the requested ones.
        is_default: Whether the name of the table without a schema resolves to this table.
        obstacle: What may hide rows from a SELECT of this connection, or None.
        form: How it may contain refs, in a table with rows of its own: as JSON that SQL queries by key, or anywhere in its text;
            None if it cannot contain any.
    """

    schema: str
    table: str
    name: str | None
    is_default: bool
    obstacle: Obstacle | None
    form: Form | None


def find_named_columns(connection: Connection, tables: Sequence[str], columns: Sequence[str]) -> list[NamedColumn]:
    """Return the columns of given names in tables of given names, in every schema that is visible to this role.

    It is one question, of the catalogue alone, on all databases but SQLite, and one more on MariaDB, whose catalogue does not
    show temporary tables: transactions ask it before they commit.
    """
    names = {"tables": list(tables), "columns": list(columns)}
    match connection.dialect.name:
        case "postgresql":
            rows: Iterable[Any] = connection.execute(
                _POSTGRESQL_NAMED, {**names, "shortest": GENERATED_ID_LENGTH}, execution_options=UNTRANSLATED
            )
        case "sqlite":
            rows = _sqlite_named(connection, tables, columns)
        case _:
            rows = _mariadb_named(connection, names)
    return [
        NamedColumn(schema, table, name, bool(is_default), obstacle, form)
        for schema, table, name, is_default, obstacle, form in rows
    ]


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
            rows = [row for schema in _attached(connection) for row in _sqlite_columns(connection, schema)]
        case _:
            rows = connection.execute(_MARIADB_COLUMNS, shortest, execution_options=UNTRANSLATED)
    return [FoundColumn(schema, table, name, *map(bool, facts)) for schema, table, name, *facts in rows]


def find_tables(connection: Connection, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return schema and name of the tables of given names, in every schema that is visible to this role."""
    match connection.dialect.name:
        case "postgresql":
            rows: Iterable[Any] = connection.execute(_POSTGRESQL_TABLES, {"names": list(names)}, execution_options=UNTRANSLATED)
        case "sqlite":
            rows = [
                (schema, name)
                for schema in _attached(connection)
                for name in names
                if _has_sqlite_table(connection, schema, name)
            ]
        case _:
            rows = connection.execute(_MARIADB_TABLES, {"names": list(names)}, execution_options=UNTRANSLATED)
    return [(schema, name) for schema, name in rows]


def resolve(connection: Connection, table: Table) -> tuple[str, str] | None:
    """Return schema and name of the table that a model's table resolves to on a connection, after translation; or None."""
    translated: dict[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
    schema = translated.get(table.schema, table.schema)
    match connection.dialect.name:
        case "postgresql":
            quote = connection.dialect.identifier_preparer.quote
            name = ".".join(quote(part) for part in (schema, table.name) if part)
            row: Any = connection.execute(_POSTGRESQL_RESOLVED, {"name": name}, execution_options=UNTRANSLATED).first()
        case "sqlite":
            schemas = [found for found in _attached(connection) if schema in (None, found)]
            row = next(((found, table.name) for found in schemas if _has_sqlite_table(connection, found, table.name)), None)
        case _:
            row = connection.execute(
                _MARIADB_RESOLVED, {"name": table.name, "schema": schema}, execution_options=UNTRANSLATED
            ).first()
    return None if row is None else (str(row[0]), str(row[1]))


def as_found(schema: str, table: str, name: str, *, keys: Iterable[Column[Any]] = ()) -> Column[Any]:
    """Return a column of refs in a table with its actual name, for statements without schema translation.

    Args:
        schema: The schema.
        table: The table.
        name: The column.
        keys: The columns of the table's primary key.
    """
    return _as_found(schema, table, name, tuple(keys))


@lru_cache(maxsize=1024)  # statements of the same table are compiled once
def _as_found(schema: str, table: str, name: str, keys: tuple[Column[Any], ...]) -> Column[Any]:
    column: Column[Any] = Column(name, StoredObjectRefType())
    primary_key = [Column(key.name, key.type, primary_key=True) for key in keys if key.name != name]
    Table(table, MetaData(), *primary_key, column, schema=schema)
    return column


def _attached(connection: Connection) -> list[str]:
    """Return the databases of an SQLite connection in the order in which it resolves tables."""
    names = [row[1] for row in connection.exec_driver_sql("PRAGMA database_list")]
    return sorted(names, key=lambda name: name != "temp")


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


def _sqlite_named(connection: Connection, tables: Sequence[str], columns: Sequence[str]) -> list[tuple[Any, ...]]:
    schemas = _attached(connection)
    quote = connection.dialect.identifier_preparer.quote
    statement = _sqlite_question(tuple(map(quote, schemas)))
    values = {f"schema_{number}": schema for number, schema in enumerate(schemas)}
    default: dict[str, int] = {}
    return [
        (schemas[number], table, name, default.setdefault(table.lower(), number) == number, None, "json" if is_table else None)
        for number, table, name, is_table in connection.execute(statement, {"tables": tables, "columns": columns, **values})
    ]


def _mariadb_named(connection: Connection, names: dict[str, list[str]]) -> list[tuple[Any, ...]]:
    rows = [
        tuple(row)
        for row in connection.execute(_MARIADB_NAMED, {**names, "shortest": GENERATED_ID_LENGTH}, execution_options=UNTRANSLATED)
    ]
    if not _has_some(connection):
        return rows
    shadowed = {place for place in {row[:2] for row in rows} if _is_temporary(connection, *place)}
    return [(*row[:4], "temporary table" if row[:2] in shadowed else row[4], row[5]) for row in rows]


def _has_some(connection: Connection) -> bool:
    """Return whether a session of MariaDB may have temporary tables, by its counter of those that it created."""
    row = connection.exec_driver_sql(_MARIADB_TEMPORARY).first()
    return row is None or str(row[1]) != "0"


def _is_temporary(connection: Connection, schema: str, table: str) -> bool:
    """Return whether a name resolves to a temporary table, which shadows the one in the catalogue even with its schema."""
    quote = connection.dialect.identifier_preparer.quote
    try:
        row: Any = connection.exec_driver_sql(f"SHOW CREATE TABLE {quote(schema)}.{quote(table)}").first()
    except DBAPIError as error:
        if codes_of(error).isdisjoint(_CANNOT_SHOW):
            raise
        return False
    return row is not None and str(row[1]).startswith("CREATE TEMPORARY TABLE")


@lru_cache(maxsize=64)
def _sqlite_question(schemas: tuple[str, ...]) -> TextClause:
    parts = [
        f"SELECT {number}, m.name, c.name, m.type = 'table' FROM {schema}.sqlite_master AS m"  # noqa: S608  # quoted
        f" LEFT JOIN pragma_table_info(m.name, :schema_{number}) AS c ON c.name COLLATE NOCASE IN :columns"
        " WHERE m.type IN ('table', 'view') AND m.name COLLATE NOCASE IN :tables"
        for number, schema in enumerate(schemas)
    ]
    statement = text(f"{' UNION ALL '.join(parts)} ORDER BY 1, 2, 3")
    return statement.bindparams(bindparam("tables", expanding=True), bindparam("columns", expanding=True))


def _has_sqlite_table(connection: Connection, schema: str, name: str) -> bool:
    quoted = connection.dialect.identifier_preparer.quote(schema)
    statement = f"SELECT 1 FROM {quoted}.sqlite_master WHERE type IN ('table', 'view') AND name = :name"  # noqa: S608  # quoted
    return connection.execute(text(statement), {"name": name}).first() is not None


# Recognizing refs in SQL, in columns that no model describes.


_ASKED_AT_A_TIME = 50
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
    for batch in batches(columns, _ASKED_AT_A_TIME):
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
    kinds, kind_of = _KINDS[dialect]
    texts = [kind_of(column, key) == kinds.text for key in ("storage_key", "backend", "location")]
    sound = and_(*texts, kind_of(column, "size") == kinds.number, value_in(column, "location", dialect) != "")
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
    kinds, kind_of = _KINDS[dialect]
    allowed = [kinds.null] if is_variant else [kinds.null, kinds.mapping]
    return func.coalesce(kind_of(value, "variants"), kinds.null).in_(allowed)


def _kind_on_postgresql(column: ColumnElement[Any], key: str) -> ColumnElement[Any]:
    return func.jsonb_typeof(cast(column, JSONB).op("->", return_type=JSONB())(literal_column(f"'{key}'")))


def _kind_on_sqlite(column: ColumnElement[Any], key: str) -> ColumnElement[Any]:
    return func.json_type(column, literal_column(f"'$.{key}'"))


def _kind_on_mariadb(column: ColumnElement[Any], key: str) -> ColumnElement[Any]:
    return func.json_type(func.json_extract(column, literal_column(f"'$.{key}'")))


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

    variants, variant = unnest_variants(value, dialect)
    nests_one = exists(select(literal_column("1")).select_from(variants).where(leads_here(variant)))
    return select(literal_column("1")).where(has_value(value, dialect), or_(leads_here(value), nests_one))


@dataclass(frozen=True, slots=True)
class _Kinds:
    """What a database calls the types of JSON."""

    text: str
    number: str
    mapping: str
    null: str


_ON_MARIADB = _Kinds("STRING", "INTEGER", "OBJECT", "NULL")
_KINDS: dict[str, tuple[_Kinds, Callable[[ColumnElement[Any], str], ColumnElement[Any]]]] = {
    "postgresql": (_Kinds("string", "number", "object", "null"), _kind_on_postgresql),
    "sqlite": (_Kinds("text", "integer", "object", "null"), _kind_on_sqlite),
    "mysql": (_ON_MARIADB, _kind_on_mariadb),
    "mariadb": (_ON_MARIADB, _kind_on_mariadb),
}


# Where the columns of refs are in a database: those of the models, and those of the same names in every other schema.
#
# A table may have been cloned into another schema, with rows that refer to the same objects: of a tenant, of an archive, of a
# copy for tests. No model declares such a table and no session need have used it, so each check asks the catalogue of the
# database.


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
    """A column in the database.

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
        """The key to sort by."""
        return self.schema or "", self.table, self.name

    @property
    def label(self) -> str:
        """The name of the table in messages."""
        return f"{self.schema}.{self.table}" if self.schema else self.table

    @property
    def column(self) -> Column[Any]:
        """The column for statements without schema translation; they are compiled once, because its table is given by name."""
        found = table(self.table, column(self.name, JSON()), schema=self.schema)
        named: Column[Any] = found.c[self.name]  # type: ignore[assignment]  # the columns of a `TableClause` are of this class
        return named

    def keyed(self, keys: Iterable[Column[Any]]) -> Column[Any]:
        """Return the column of a table with a primary key, for the same statements."""
        return as_found(str(self.schema), self.table, self.name, keys=keys)


class Catalogue:
    """The columns of given names in a database at one moment.

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
        """Return whether there is a table with the name and schema of a model, or with a translated schema."""
        return self._find(schema, name) is not None

    def place(self, schema: str | None, wanted: Column[Any]) -> Place | None:
        """Return the place of a model's column, in its schema or in a translated one; None if there is none."""
        named = self._find(schema, wanted.table.name)
        return None if named is None else self._place(named, wanted)

    def namesakes(self) -> dict[Place, Column[Any]]:
        """Return all columns with the names of a model's column and table that may contain refs, in all schemas."""
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
        """Return a name of the database in a form that can be compared."""
        return name if self._is_postgresql else name.lower()

    def _folded(self, name: str) -> str:
        """Return a name of a model as the database has it: PostgreSQL folds one that is not quoted."""
        if self._is_postgresql and self._preparer.quote(name) != name:
            return str(name)
        return name.lower()


def describe_obstacles(places: Iterable[Place], role: str = "this role") -> list[tuple[str, str]]:
    """Return what hides, or may hide, rows of some places from a role, each with its remedy."""
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
            value = cast(stored, Text())
            is_mentioned = or_(func.strpos(value, sought) > 0, func.strpos(value, sought.encode().hex()) > 0)
        else:
            is_mentioned = func.locate(sought, stored) > 0
        yield literal(location, Text()), exists(select(literal_column("1")).select_from(stored.table).where(is_mentioned))


def read_catalogue(connection: Connection, columns: Sequence[Column[Any]]) -> Catalogue:
    """Read from the catalogue all columns with the names of some, and the tables that lack them; blocking."""
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
