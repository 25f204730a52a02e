"""The triggers of SQLite that keep the journal's promise for every writer, as SQL.

They nominate what a statement takes out of rows, as intents to delete, and guard what it brings in. SQLite has one writer at a
time, and a worker fences an object with the same lock. So the guard only looks: what it finds stays until the transaction ends.

A guard runs before its row is written. So whatever is in a table has been guarded, or was there before the triggers, and a row
is never evidence for itself; what it holds until an UPDATE of it is. SQLite fires the triggers of a row before it goes on to the
next one, so what the statement has taken out of a row is nominated when it brings that into a later one.

No trigger changes the new values of a row. So a trigger for UPDATE can name its columns, and others cost nothing.

REPLACE, and `UPDATE OR REPLACE`, delete rows without firing triggers unless `PRAGMA recursive_triggers` is on. So those that have
the primary key of the new row, or its values in another unique index, are nominated before it is written. Where they stay, as in
an upsert, a worker sees them.

SQL has no SHA-256 here. So a trigger gives an intent a new id unless the object has one, and the library gives it the derived
id as soon as it nominates the object, or a worker takes it over.

A trigger cannot reach the sidecar, where the intents of uploads are. A flush writes the locations of its uploads to the table of
decisions before its rows, where the guard looks, and deletes them afterwards in the same transaction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import OperationalError

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._interfaces import REFUSAL, JournalTables
from granite_storage.orm.columns import location_index_name
from granite_storage.orm.journal._trigger_base import (
    RENAME_BACK,
    GuardedTable,
    Holder,
    TableTriggers,
    ask,
    describe_gone,
    describe_triggers,
    literal,
    quoted,
    run,
)
from granite_storage.orm.journal.tables import DELETE, LONGEST_META_NAME, RETENTION_PREFIX

__all__ = ["SQLiteTriggers"]

_PREFIX = "granite_storage_"
_CREATE = "CREATE TRIGGER "
_Part: TypeAlias = tuple[str, str, str]
"""When a trigger fires, the condition for that, and its statement."""

_ROWIDS = ("rowid", "_rowid_", "oid")
"""What a row's number is called, where no column has that name."""

_GENERATED = (2, 3)
"""What `PRAGMA table_xinfo` says of generated columns, virtual and stored ones."""


@dataclass(frozen=True, slots=True)
class _Key:
    """A primary key or a unique index.

    Attributes:
        columns: Its columns, quoted, each with its collation, and what REPLACE puts in the place of NULL; None for those that
            may be NULL or have no default.
        is_generated: Whether an UPDATE of other columns changes it.
    """

    columns: tuple[tuple[str, str, str | None], ...]
    is_generated: bool = False

    def matches(self, row: str, new: str) -> str:
        """Return the criterion that a row has the values of a new one."""

        def value(name: str, default: str | None) -> str:
            return f"{new}.{name}" if default is None else f"coalesce({new}.{name}, {default})"

        return " AND ".join(
            f"{row}.{name} = {value(name, default)} COLLATE {collation}" for name, collation, default in self.columns
        )

    @property
    def has_changed(self) -> str:
        """The criterion that an UPDATE changes it."""
        return "(" + " OR ".join(f"OLD.{name} IS NOT NEW.{name}" for name, *_ in self.columns) + ")"


class SQLiteTriggers(TableTriggers):
    """The triggers of SQLite.

    Raises:
        ConfigurationError: The journal, or a table whose rows are evidence, is in another file.
    """

    def __init__(self, connection: Connection, table: GuardedTable, journal: JournalTables, schema: str) -> None:
        super().__init__(connection, table, journal, schema)
        others = {schema, *(holder.schema for holder in table.holders)} - {table.schema}
        if others:
            raise ConfigurationError(
                f"the triggers of {table.name} reach only the database {table.schema}, and not {', '.join(sorted(others))}:"
                " keep the rows with files, and the journal, in one file",
                see=Page.JOURNAL_ON_SQLITE,
            )
        # What rows may be pushed out by, and what the number of a row is called.
        self._keys, rowid = _read_keys(connection, table)
        # The ids of rows that follow each other are beside each other, which costs less to insert.
        self._new_id = _RANDOM_ID if rowid is None else f"printf('%016x%016x', OLD.{rowid}, random())"
        names = (journal.intent.name, journal.reclaim.name, journal.decision.name, journal.meta.name)
        self._intent, self._reclaim, self._decision, self._meta = map(quoted, names)

    def is_current(self, connection: Connection) -> bool:
        """Return whether the table has these very triggers."""
        return _read(connection, *self.table.place) == self.triggers

    def _create_triggers(self, connection: Connection) -> None:
        if not self.is_current(connection):
            self.drop(connection, *self.table.place)
            for sql in self.triggers.values():
                run(connection, sql.replace(_CREATE, f"{_CREATE}{quoted(self.table.schema)}.", 1))

    def _find_trigger_problems(self, connection: Connection) -> list[str]:
        found, wanted = _read(connection, *self.table.place), self.triggers
        outdated = [name for name, sql in found.items() if wanted.get(name) != sql]
        return describe_triggers(self.table.name, wanted.keys() - found.keys(), outdated)

    def _label(self, holder: Holder) -> str:
        return holder.table

    def _has_index(self, connection: Connection, holder: Holder) -> bool:
        found = text(f"SELECT 1 FROM {quoted(holder.schema)}.sqlite_master WHERE type = 'index' AND name = :name")
        return ask(connection, found, name=location_index_name(holder.table, holder.column)).first() is not None

    @staticmethod
    def drop(connection: Connection, schema: str, table: str) -> None:
        """Drop the triggers of a table."""
        for name in _read(connection, schema, table):
            run(connection, f"DROP TRIGGER {quoted(schema)}.{quoted(name)}")

    @staticmethod
    def has_some(connection: Connection, schema: str, table: str) -> bool:
        """Return whether a table has any of these triggers."""
        return bool(_read(connection, schema, table))

    @staticmethod
    def find_gone(connection: Connection, schemas: Collection[str], declared: Sequence[Holder]) -> list[str]:
        """Return in words what is gone that triggers name, or were made for: a rename changes their text as well."""
        guarded: set[str] = set()
        naming: list[tuple[str, str]] = []
        for schema in sorted(schemas):
            tables = text(f"SELECT lower(name) FROM {quoted(schema)}.sqlite_master WHERE type IN ('table', 'view')")
            there = set(ask(connection, tables).scalars())
            for row in _read_all(connection, schema):
                guarded.add(row.tbl_name)
                named = [name.replace('""', '"') for name in _NAMED.findall(row.sql)]
                naming += [(f"the table {name}", row.tbl_name) for name in named if name.lower() not in there]
        of_models = dict.fromkeys(_gone_of_models(connection, declared)) if guarded else {}
        gone = {what for what, _ in naming}
        return describe_gone(naming, "statements which write files to their rows fail") + [
            f"the triggers of {', '.join(sorted(guarded))} were made for {what} of the models, which is gone. {RENAME_BACK}"
            for what in of_models
            if what not in gone
        ]

    @staticmethod
    def find_in_the_way(connection: Connection, tables: Collection[str]) -> list[str]:
        """Return the tables whose triggers name one of others.

        Batch mode puts a new table in the place of the old one, which fails where a trigger names that. With the old table its
        own triggers are gone.
        """
        named = [quoted(name) for name in tables]
        return sorted({row.tbl_name for row in _read_all(connection, "main") if any(name in row.sql for name in named)})

    @cached_property
    def triggers(self) -> dict[str, str]:
        """The triggers by name: their SQL as the database keeps it.

        What is rarely there has triggers of its own, because a condition costs less than a statement that finds nothing.
        """
        parts = {f"{what}{n}": part for n, name in enumerate(self.table.columns, 1) for what, part in self._parts(name).items()}
        olds = [f"OLD.{quoted(name)}" for name in self.table.columns]
        have_variants, variants = " OR ".join(map(_has_variants, olds)), "\n    UNION ALL ".join(map(_variants, olds))
        parts["deletevariants"] = ("AFTER DELETE", have_variants, self._nominate_all(variants))
        if self._keys:
            parts["replace"] = self._on_replace(
                "BEFORE INSERT", " OR ".join(f"({key.matches('t', 'NEW')})" for key in self._keys)
            )
            changed = dict.fromkeys(
                (*_ROWIDS, *map(quoted, self.table.keys), *(name for key in self._keys for name, *_ in key.columns))
            )
            of_columns = "" if any(key.is_generated for key in self._keys) else f" OF {', '.join(changed)}"
            moved_onto = " OR ".join(f"({key.has_changed} AND {key.matches('t', 'NEW')})" for key in self._keys)
            parts["rekey"] = self._on_replace(f"BEFORE UPDATE{of_columns}", moved_onto)
        return {
            f"{_PREFIX}{what}_{self.table.name}": (
                f"{_CREATE}{quoted(f'{_PREFIX}{what}_{self.table.name}')} {moment} ON {quoted(self.table.name)} FOR EACH ROW"
                f" WHEN {condition}\nBEGIN\n{statement};\nEND"
            )
            for what, (moment, condition, statement) in parts.items()
        }

    def _parts(self, column: str) -> dict[str, _Part]:
        """Return the parts of the triggers of a column."""
        name = quoted(column)
        old, new, of_column = f"OLD.{name}", f"NEW.{name}", f"OF {name}"
        is_changed = f"{old} IS NOT {new}"
        names_object = f"{_field(old, 'location')} IS NOT NULL AND {_field(old, 'backend')} IS NOT NULL"
        is_other = f"{_field(old, 'location')} IS NOT {_field(new, 'location')}"
        is_left = f"({is_other} OR NOT {_has_variant(new, 'v.location')})"
        is_gained = f"({is_other} OR NOT {_has_variant(old, 'w.location')})"
        message = literal(f"{REFUSAL[0]}of {self.table.name}.{column}{REFUSAL[1]}")
        guard, guard_variants = self._guard(new, message), self._guard_variants(new, message, "true")
        escaped, has_escapes = self._refuse_escaped_keys(column, new), f"{new} GLOB '*\\u00[5-7]*'"
        return {
            "delete": ("AFTER DELETE", names_object, self._nominate(old)),
            "update": (f"AFTER UPDATE {of_column}", f"{is_changed} AND {is_other} AND {names_object}", self._nominate(old)),
            "updatevariants": (
                f"AFTER UPDATE {of_column}",
                f"{is_changed} AND {_has_variants(old)}",
                self._nominate_all(f"SELECT * FROM ({_variants(old)}) v WHERE {is_left}"),
            ),
            "guardinsert": ("BEFORE INSERT", f"{new} IS NOT NULL", guard),
            "guardinsertvariants": ("BEFORE INSERT", _has_variants(new), guard_variants),
            "guardinsertkeys": ("BEFORE INSERT", has_escapes, escaped),
            "guardupdatekeys": (f"BEFORE UPDATE {of_column}", f"{has_escapes} AND {is_changed}", escaped),
            "guardupdate": (f"BEFORE UPDATE {of_column}", f"{new} IS NOT NULL AND {is_changed} AND {is_other}", guard),
            "guardupdatevariants": (
                f"BEFORE UPDATE {of_column}",
                f"{_has_variants(new)} AND {is_changed}",
                self._guard_variants(new, message, is_gained),
            ),
        }

    def _on_replace(self, moment: str, is_pushed_out: str) -> _Part:
        """Return the parts of a trigger that nominates what the rows hold which a new one may push out."""
        table, columns = quoted(self.table.name), [quoted(name) for name in self.table.columns]
        holds = " OR ".join(f"t.{name} IS NOT NULL" for name in columns)
        refs = [
            found
            for name in columns
            for found in (
                f"{_ref(f't.{name}')} FROM {table} t WHERE {is_pushed_out}",
                f"{_variants(f't.{name}', f'{table} t, ')} WHERE {is_pushed_out}",
            )
        ]
        condition = f"EXISTS (SELECT 1 FROM {table} t WHERE ({is_pushed_out}) AND ({holds}))"
        return moment, condition, self._nominate_all("\n    UNION ALL ".join(refs))

    def _nominate(self, old: str) -> str:
        """Return the INSERT of the intent to delete the object of a ref, or the UPDATE of the one that is there.

        It is a row of VALUES: SQLite puts the rows of a SELECT that reads the same table into a temporary one first.
        """
        backend, location, due = _field(old, "backend"), _field(old, "location"), self._due(_field(old, "storage_key"))
        return f"""{self._insert()}
  VALUES ({self._id(backend, location, self._new_id)}, {literal(DELETE)}, {backend}, {location}, NULL, {due})
  {_UPSERT}"""

    def _nominate_all(self, refs: str) -> str:
        """Return the same for the objects that a SELECT returns, in which one may be twice."""
        return f"""{self._insert()}
  SELECT {self._id("h.backend", "h.location", _RANDOM_ID)},
    {literal(DELETE)}, h.backend, h.location, h.source, max({self._due("h.policy")})
  FROM (
    {refs}
  ) h WHERE h.backend IS NOT NULL AND h.location IS NOT NULL
  GROUP BY h.backend, h.location
  {_UPSERT}"""

    def _insert(self) -> str:
        return f"  INSERT INTO {self._intent} (id, kind, backend, location, source, due)"

    def _id(self, backend: str, location: str, new: str) -> str:
        """Return the id of the intent to delete an object, or a new one.

        The unary plus keeps the planner from the index over backends and due times.
        """
        is_same = f"i.location = {location} AND +i.backend = {backend} AND i.kind = {literal(DELETE)}"
        return f"coalesce((SELECT i.id FROM {self._intent} i WHERE {is_same}), {new})"

    def _due(self, policy: str) -> str:
        """Return when an object is due: after the retention of its policy, or the longest of any where that is unknown."""
        prefix = literal(RETENTION_PREFIX)
        behind = literal(f"{RETENTION_PREFIX[:-1]}{chr(ord(RETENTION_PREFIX[-1]) + 1)}")
        name = f"substr({prefix} || {policy}, 1, {LONGEST_META_NAME})"
        own = f"SELECT {_AFTER} FROM {self._meta} m WHERE m.name = {name}"
        most = f"SELECT max(CAST(a.value AS REAL)) AS value FROM {self._meta} a WHERE a.name >= {prefix} AND a.name < {behind}"
        longest = f"SELECT {_AFTER} FROM ({most}) m"
        return f"coalesce(({own}), ({longest}))"

    def _guard(self, new: str, message: str) -> str:
        """Return the SELECT that fails if an object that a column gets may be gone, or is about to go.

        An intent of the object as a variant of another one is not evidence: its worker looks for it in the rows of that one only.
        """
        holders = [
            f"EXISTS (SELECT 1 FROM {quoted(item.table)} t WHERE {_at(item, 'w.location')})" for item in self.table.holders
        ]
        location = _field(new, "location")
        return f"""  SELECT RAISE(ABORT, {message}) FROM (SELECT {location} AS location) w
  WHERE w.location IS NOT NULL AND ({self._is_refused("NULL", holders)})"""

    def _guard_variants(self, new: str, message: str, is_gained: str) -> str:
        """Return the SELECT that fails if a variant that a column gets may be gone, or is about to go.

        A variant is known by the rows that have it with its original, and by an intent as a variant of that.
        """
        source = _field(new, "location")
        holders = [
            f"EXISTS (SELECT 1 FROM {quoted(item.table)} t WHERE {_at(item, source)}"
            f" AND {_has_variant(f't.{quoted(item.column)}', 'w.location')})"
            for item in self.table.holders
        ]
        return f"""  SELECT RAISE(ABORT, {message}) FROM ({_variants(new)}) w
  WHERE w.location IS NOT NULL AND {is_gained} AND ({self._is_refused(source, holders)})"""

    def _refuse_escaped_keys(self, column: str, new: str) -> str:
        """Return the SELECT that fails if a ref spells a key with escapes, where SQLite before 3.45 does not find it."""
        message = literal(
            f"granite_storage: a key of a ref in {self.table.name}.{column} is spelled with escapes, write it plainly"
        )
        keys = ", ".join(map(literal, ("backend", "location", "storage_key", "variants")))
        return f"""  SELECT RAISE(ABORT, {message}) FROM json_tree({new}) k
  WHERE k.key IN ({keys}) AND instr(substr(k.fullkey, length(k.path) + 1), '\\')"""

    def _is_refused(self, source: str, holders: Sequence[str]) -> str:
        intents = f"SELECT 1 FROM {self._intent} i WHERE i.location = w.location AND i.kind = {literal(DELETE)}"
        evidence = [
            f"EXISTS ({intents})",
            f"EXISTS (SELECT 1 FROM {self._decision} d WHERE d.id = w.location)",
            *holders,
        ]
        return f"""EXISTS (SELECT 1 FROM {self._reclaim} r WHERE r.location = w.location)
    OR EXISTS ({intents} AND i.source IS NOT {source})
    OR NOT ({" OR ".join(evidence)})"""


_RANDOM_ID = "lower(hex(randomblob(16)))"
_UPSERT = "ON CONFLICT (id) DO UPDATE SET due = max(due, excluded.due)"
"""The latest due time of an object counts."""


_AFTER = (
    "CASE WHEN CAST(m.value AS REAL) > 0 THEN strftime('%Y-%m-%d %H:%M:%f000', 'now', m.value || ' seconds')"
    " ELSE datetime('now') || '.000000' END"
)
"""The moment so many seconds from now. What does not wait is due since this second began, which costs less to write."""


# Refs in SQL.


def _field(ref: str, key: str) -> str:
    """Return a text of a ref, spelled as the index over locations is."""
    return f"json_extract({ref}, '$.{key}')"


def _at(holder: Holder, location: str) -> str:
    return f"{_field(f't.{quoted(holder.column)}', 'location')} = {location}"


def _ref(ref: str) -> str:
    """Return the SELECT of the object of a ref, as `_nominate` takes it."""
    return (
        f"SELECT {_field(ref, 'backend')} AS backend, {_field(ref, 'location')} AS location, NULL AS source,"
        f" {_field(ref, 'storage_key')} AS policy"
    )


def _variants(ref: str, beside: str = "") -> str:
    """Return the SELECT of the variants of a ref, as `_nominate` takes it; what is not a ref has no location.

    Args:
        ref: The ref.
        beside: The table that it is in, and a comma; empty for the row of the trigger.
    """
    return (
        f"SELECT {_variant_field('v', 'backend')} AS backend, {_variant_field('v', 'location')} AS location,"
        f" {_field(ref, 'location')} AS source, {_field(ref, 'storage_key')} AS policy"
        f" FROM {beside}json_each({ref}, '$.variants') v"
    )


def _variant_field(variant: str, key: str) -> str:
    """Return a text of a row of `json_each`; a JSON function would fail on a value that is not an object."""
    return f"CASE {variant}.type WHEN 'object' THEN {_field(f'{variant}.value', key)} END"


def _has_variants(ref: str) -> str:
    """Return the criterion that a ref has variants; its text is searched for the key first, which costs less than to parse it.

    A backslash may be part of the key, and what is binary may have the key behind a zero, where GLOB does not look.
    """
    may_have = f"{ref} GLOB '*variants*' OR {ref} GLOB '*\\*' OR typeof({ref}) = 'blob'"
    return f"{ref} IS NOT NULL AND ({may_have}) AND json_type({ref}, '$.variants') IS NOT NULL"


def _has_variant(ref: str, location: str) -> str:
    """Return the criterion that a ref has a variant at a location."""
    return f"EXISTS (SELECT 1 FROM json_each({ref}, '$.variants') k WHERE {_variant_field('k', 'location')} = {location})"


# What is there, by the catalogue.


_NAMED = re.compile(r'\b(?:FROM|INTO|ON) "((?:[^"]|"")+)"')
"""A table in the SQL of a trigger."""


def _read(connection: Connection, schema: str, table: str) -> dict[str, str]:
    """Return the library's triggers of a table: their SQL by name."""
    return {row.name: row.sql for row in _read_all(connection, schema, "AND tbl_name = :table COLLATE NOCASE", table=table)}


def _read_all(connection: Connection, schema: str, which: str = "", **values: str) -> Sequence[Row[*tuple[Any, ...]]]:
    """Return the library's triggers in a database, by the names of their tables."""
    found = text(
        f"SELECT tbl_name, name, sql FROM {quoted(schema)}.sqlite_master WHERE type = 'trigger'"
        f" AND substr(name, 1, {len(_PREFIX)}) = {literal(_PREFIX)} {which} ORDER BY tbl_name, name"
    )
    return ask(connection, found, **values).all()


def _pragma(connection: Connection, schema: str, name: str, argument: str) -> list[tuple[object, ...]]:
    statement = f"PRAGMA {quoted(schema)}.{name}({quoted(argument)})"
    return [tuple(row) for row in connection.exec_driver_sql(statement)]


def _gone_of_models(connection: Connection, declared: Iterable[Holder]) -> Iterator[str]:
    for item in sorted(declared):
        there = {str(row[1]).lower() for row in _pragma(connection, item.schema, "table_xinfo", item.table)}
        if not there:
            yield f"the table {item.table}"
        elif item.column.lower() not in there:
            yield f"the column {item.column} of {item.table}"


def _read_keys(connection: Connection, table: GuardedTable) -> tuple[list[_Key], str | None]:
    """Return what rows of a table may be pushed out by, without indexes over expressions; and what their number is called.

    The name is quoted if it is that of a column, and None without a number.
    """
    pragma = partial(_pragma, connection, table.schema)
    keys: list[_Key] = []
    info = pragma("table_xinfo", table.name)
    columns, key = {str(row[1]).lower() for row in info}, [str(row[1]) for row in info if row[5]]
    defaults = {str(row[1]): str(row[4]) for row in info if row[3] and row[4] is not None}
    generated = {str(row[1]) for row in info if row[6] in _GENERATED}
    indexes = sorted(pragma("index_list", table.name), key=lambda row: str(row[1]))
    rowid = next((name for name in _ROWIDS if name not in columns), None)
    if rowid is not None:
        try:
            connection.exec_driver_sql(f"SELECT {rowid} FROM {quoted(table.schema)}.{quoted(table.name)} LIMIT 0")
        except OperationalError:  # a table WITHOUT ROWID
            rowid = None
    # A key that is the rowid has no index. It is called by its own name, which RENAME COLUMN writes for both.
    if len(key) == 1 and not any(row[3] == "pk" for row in indexes):
        rowid = quoted(key[0])
    if rowid is not None:
        keys.append(_Key(((rowid, "BINARY", None),)))
    for _, name, is_unique, *_ in indexes:
        parts = [row for row in pragma("index_xinfo", str(name)) if row[5]] if is_unique else []
        if parts and all(row[2] is not None for row in parts):
            of_index = tuple((quoted(str(row[2])), quoted(str(row[4])), defaults.get(str(row[2]))) for row in parts)
            keys.append(_Key(of_index, any(str(row[2]) in generated for row in parts)))
    return list(dict.fromkeys(keys)), rowid
