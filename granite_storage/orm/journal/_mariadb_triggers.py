"""The triggers of MariaDB that keep the journal's promise for every writer, as SQL.

They nominate what leaves rows, as intents to delete, and guard what comes in. MariaDB has triggers for each row only. They run
after the row is written, before any other trigger of their kind: so they see what triggers of the application have made of it,
and those cannot copy a ref that was not guarded yet. Each row is guarded at once, so the earlier rows of a statement are evidence
for the later ones, and rows may swap their files.

Evidence for a location is another row that holds it, or a pending delete of it. Two kinds of reads are needed for it. A locking
read sees the newest state, but at REPEATABLE READ it also locks the gap beside a row that is not there, which keeps the new
intents of everybody waiting. A plain read locks nothing, but sees the snapshot. So what is sought is found by a plain read, and
then locked and looked at once more by its primary key.

Why it is safe. A worker looks for rows in one snapshot after it has fenced an object, and deletes it if there are none.

- A row that is locked and holds the location now has held it since before the fence, if there is one: to take it later it would
  have needed evidence itself. And it holds the location until this transaction ends. So the worker sees it.
- A pending delete that is locked cannot be fenced until this transaction ends, nor can the other intents of the location, which
  are locked as well. That none is fenced already is seen afterwards, by a locking read. The intent of an upload alone is no
  evidence: with another row that holds the object, and is deleted meanwhile, an intent would be left that no transaction locks.

What a trigger costs is the number of its statements and of its local variables, which MariaDB makes for each row whether they
are used or not. So there are none, and most rows are one condition and one INSERT.

Deletes that cascade fire no triggers. So each table from which a cascade leads to files has a trigger that reads the rows below,
before the row is deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from operator import attrgetter
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, bindparam, text

from granite_storage._documentation import Page
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._interfaces import REFUSAL, JournalTables
from granite_storage.orm._util import group
from granite_storage.orm.columns import (
    LONGEST_LOCATION,
    fitting_name,
    generated_location,
    location_column_name,
)
from granite_storage.orm.journal._trigger_base import (
    CREATE_AGAIN,
    GuardedTable,
    Holder,
    Place,
    TableTriggers,
    ask,
    describe_gone,
    find_gone_columns,
    literal,
    run,
)
from granite_storage.orm.journal.tables import DELETE, LONGEST_META_NAME, RETENTION_PREFIX, STAGING

__all__ = ["MariaDBTriggers"]

VERSION = 2
"""The version of the SQL; each trigger has it, with a digest of the rest."""

_PREFIX = "granite_storage_"
_SHOWN = 100
"""How much of a location an error shows."""


@dataclass(frozen=True, slots=True)
class _Cascade:
    """A foreign key by which deleting rows of `parent` deletes rows of `child`."""

    child: Place
    parent: Place
    links: tuple[tuple[str, str], ...]
    """The columns of the child, each with that of the parent which it refers to."""


Path: TypeAlias = tuple[_Cascade, ...]
"""A way by which deletes cascade, from the topmost table down."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A trigger that should be there.

    Attributes:
        name: Its name, in the schema of its table.
        place: The table that it is on.
        moment: When it fires.
        body: Its body.
        names: The columns that the body names.
        is_first: Whether it must fire before all others of its kind.
    """

    name: str
    place: Place
    moment: tuple[str, str]
    body: str
    names: Sequence[tuple[Place, str]]
    is_first: bool = True

    @property
    def key(self) -> tuple[str, str]:
        """The schema and the name, by which the database knows it."""
        return self.place[0], self.name


@dataclass(frozen=True, slots=True)
class _Found:
    """A trigger of the library's that is there.

    Attributes:
        key: Its schema and its name.
        place: The table that it is on.
        label: The table whose files it is for.
        made: What it was made from.
        order: Its number among those of its kind on the table.
        names: The columns that it names.
    """

    key: tuple[str, str]
    place: Place
    label: str
    made: str
    order: int
    names: Sequence[tuple[Place, str]]


class MariaDBTriggers(TableTriggers):
    """The triggers of MariaDB, on the table and on its ancestors.

    Raises:
        ConfigurationError: It is MySQL, a table that holds refs has no primary key, or cascades lead in a circle.
    """

    _wrong_index = ", or one over a virtual column, with which MariaDB can crash"

    def __init__(self, connection: Connection, table: GuardedTable, journal: JournalTables, schema: str) -> None:
        super().__init__(connection, table, journal, schema)
        _require_mariadb(connection)
        self._place = table.place
        # The ways by which deletes cascade to the table, and the foreign keys by which tables on them delete their own rows.
        self._paths, self._own = _find_cascades(connection, self._place)
        places = {self._place, *(holder.place for holder in table.holders)}
        self._keys = {place: _primary_key(connection, place) for place in places}
        names = (journal.intent.name, journal.reclaim.name, journal.meta.name)
        self._intent, self._reclaim, self._meta = (_qualified((schema, name)) for name in names)
        self._name = _columns(connection, (schema, journal.meta.name))[journal.meta.c.name.name]

    def is_current(self, connection: Connection) -> bool:
        """Return whether the table and its ancestors have these very triggers."""
        found, wanted = self._find_own(connection), self._wanted
        return found.keys() == {item.key for item in wanted} and all(self._is_right(found[item.key], item) for item in wanted)

    def _find_own(self, connection: Connection) -> dict[tuple[str, str], _Found]:
        return {item.key: item for item in _read(connection, self._place, self._ancestors)}

    def _create_triggers(self, connection: Connection) -> None:
        """Create what is missing or old, and drop what is left of other tables.

        What guards comes first: meanwhile a delete that is not recorded leaves an orphan, and what is not guarded might dangle.
        """
        found = self._find_own(connection)
        left = [item.key for item in _read_left(connection, [self._place, *self._ancestors])]
        with _sql_mode(connection):
            for item in self._wanted:
                known = found.pop(item.key, None)
                if known is None or not self._is_right(known, item):
                    if known is not None and known.place != item.place:
                        _drop(connection, [known.key])
                    self._create(connection, item)
            _drop(connection, [*found, *left])  # of cascades that are there no more, and of tables that were renamed

    def _find_trigger_problems(self, connection: Connection) -> list[str]:
        found = self._find_own(connection)
        problems: list[str] = []
        for item in self._wanted:
            known, where = found.get(item.key), _label(item.place)
            if known is None:
                problems.append(
                    f"{where} lacks the trigger {item.name}, or this role lacks the privilege TRIGGER, without which MariaDB"
                    f" shows none: {CREATE_AGAIN}"
                )
            elif known.made != self.digest or known.place != item.place:
                problems.append(f"the trigger {item.name} of {where} is of another version or for other columns: {CREATE_AGAIN}")
            elif not self._is_right(known, item):
                problems.append(
                    f"the trigger {item.name} of {where} does not fire before all others of its kind, whose work it would not"
                    f" guard: {CREATE_AGAIN}"
                )
        return problems

    def _has_index(self, connection: Connection, holder: Holder) -> bool:
        values = {"schema": holder.schema, "table": holder.table, "column": location_column_name(holder.column)}
        return bool(ask(connection, _INDEXES, **values).scalar_one())

    def _create_index(self, connection: Connection, holder: Holder) -> None:
        column = location_column_name(holder.column)
        name = _quoted(column)
        # Without its index it may be a virtual one, of an earlier version; see `generated_location`. With IF EXISTS, drivers
        # print a warning where it is not there.
        first = f"DROP COLUMN {name}, " if column in _columns(connection, holder.place) else ""
        generated = f"{generated_location(_quoted(holder.column))} COMMENT {literal(_MADE_HERE)}"
        run(connection, f"ALTER TABLE {_qualified(holder.place)} {first}ADD COLUMN {name} {generated}")
        super()._create_index(connection, holder)

    @staticmethod
    def drop(connection: Connection, schema: str, table: str) -> None:
        """Drop the triggers of a table, and those of its ancestors that read it, and the indexes that no trigger uses now."""
        _drop(connection, [found.key for found in _read_with_left(connection, (schema, table))])
        _drop_unused_indexes(connection, schema)

    @staticmethod
    def has_some(connection: Connection, schema: str, table: str) -> bool:
        """Return whether a table has any of these triggers, on it or on its ancestors."""
        return bool(_read_with_left(connection, (schema, table)))

    @staticmethod
    def find_gone(connection: Connection, schemas: Collection[str], declared: Sequence[Holder]) -> list[str]:
        """Return in words which tables or columns triggers name that are gone."""
        found = sorted(_read_all(connection, schemas), key=attrgetter("place"))
        named = ((_label(item.place), place, column) for item in found for place, column in item.names)
        gone = find_gone_columns(named, partial(_columns, connection))
        return describe_gone(gone, "statements which write their rows fail")

    def _is_right(self, found: _Found, wanted: _Wanted) -> bool:
        return found.made == self.digest and found.place == wanted.place and (found.order == 1 or not wanted.is_first)

    def _create(self, connection: Connection, wanted: _Wanted) -> None:
        (schema, table), (timing, event) = wanted.place, wanted.moment
        values = {"schema": schema, "table": table, "timing": timing, "event": event}
        others = (
            [name for name in ask(connection, _OF_KIND, **values).scalars() if name != wanted.name] if wanted.is_first else []
        )
        first = f"PRECEDES {_quoted(others[0])} " if others else ""
        run(
            connection,
            f"CREATE OR REPLACE TRIGGER {_qualified(wanted.key)} {timing} {event}"
            f" ON {_qualified(wanted.place)} FOR EACH ROW {first}{self._with_digest(wanted)}",
        )

    @cached_property
    def digest(self) -> str:
        """The version and a digest of all of it, by which what is there is known."""
        parts = "\n".join(f"{item.name} {item.place} {item.moment} {item.body} {item.names}" for item in self._wanted)
        return f"{VERSION}:{sha256(parts.encode()).hexdigest()[:32]}"

    def _with_digest(self, wanted: _Wanted) -> str:
        """Return a body with what it is known by, and what it names; comments would not do, which clients leave out of dumps.

        Both stand behind the end of the body, where they are never reached and cost nothing.
        """
        known_by = f"SET @{_PREFIX}made_of = {literal(f'{self.digest} {_label(self._place)}')}"
        names = f"SET @{_PREFIX}names = {literal(json.dumps([[*place, column] for place, column in wanted.names]))}"
        return f"g_body: BEGIN\n{wanted.body}\n  LEAVE g_body;\n  {known_by};\n  {names};\nEND"

    @property
    def _ancestors(self) -> list[Place]:
        return [path[0].parent for path in self._paths]

    @cached_property
    def _wanted(self) -> list[_Wanted]:
        """Every trigger, the guards first."""
        name = self.table.name
        own = [(self._place, column) for column in self.table.columns]
        bodies = {"insert": self._guard(is_update=False), "update": self._on_update(), "delete": self._on_delete()}
        wanted = [
            _Wanted(fitting_name(f"{_PREFIX}{what}_", name), self._place, ("AFTER", what.upper()), body, self._names)
            for what, body in bodies.items()
        ]
        for ancestor, paths in group(self._paths, lambda path: path[0].parent).items():
            named = fitting_name(f"{_PREFIX}cascade_", f"{ancestor[1]}_{name}")
            body = "\n".join(self._nominate_below(path) for path in paths)
            names = tuple(dict.fromkeys([*own, *(link for path in paths for link in self._links(path))]))
            wanted.append(_Wanted(named, ancestor, ("BEFORE", "DELETE"), body, names, is_first=False))
        return wanted

    @property
    def _names(self) -> Sequence[tuple[Place, str]]:
        """The columns that the triggers of the table name."""
        keys = sorted((place, key) for place, columns in self._keys.items() for key in columns)
        own = [(self._place, name) for name in (*self.table.keys, *self.table.columns)]
        return tuple(dict.fromkeys([*own, *((holder.place, holder.column) for holder in self.table.holders), *keys]))

    def _links(self, path: Path) -> Iterator[tuple[Place, str]]:
        """Yield the columns that the SELECT of the rows below a delete names."""
        own = [loop for step in path for place in (step.parent, step.child) for loop in self._own.get(place, ())]
        for cascade in (*path, *own):
            for child, parent in cascade.links:
                yield cascade.child, child
                yield cascade.parent, parent

    # Nominating.

    def _on_delete(self) -> str:
        return "\n".join(self._nominate(f"OLD.{name}") for name in self._columns)

    def _on_update(self) -> str:
        unchanged = " AND ".join(f"OLD.{name} <=> NEW.{name}" for name in self._columns)
        nominated = [self._nominate(f"OLD.{name}", f"NEW.{name}") for name in self._columns]
        return "\n".join([f"  IF NOT ({unchanged}) THEN", *nominated, self._guard(is_update=True), "  END IF;"])

    @property
    def _columns(self) -> list[str]:
        return [_quoted(name) for name in self.table.columns]

    def _nominate(self, old: str, new: str | None = None) -> str:
        """Return the SQL that records that the objects of a ref are to be deleted, except those that another ref has as well.

        The first condition is that of nearly all rows: that there are no variants, and that an earlier row has found out when
        objects of the policy are due. Each further statement would cost them more than any expression does.
        """
        backend, location = _value_of(old, "backend"), _value_of(old, "location")
        is_changed, is_gone = "", ""
        if new is not None:
            is_changed, is_gone = f"NOT {old} <=> {new} AND ", f" AND NOT {location} <=> {_value_of(new, 'location')}"
        asked = f"CONCAT_WS(' ', {literal(self._meta)}, UTC_TIMESTAMP(6), {_value_of(old, 'storage_key')})"
        is_known = f"BINARY {_ASKED} <=> {asked}"
        record = self._insert(f"VALUES ({self._recorded(_BACKEND, _LOCATION, 'NULL')})")
        return f"""  IF {is_changed}({_BACKEND} := {backend}) IS NOT NULL AND ({_LOCATION} := {location}) IS NOT NULL{is_gone}
      AND {is_known} AND NOT JSON_EXISTS({old}, '$.variants') THEN
    {record}
  ELSEIF {is_changed}{old} IS NOT NULL THEN
    IF NOT {is_known} THEN
      {self._find_due(old)}
      SET {_ASKED} = {asked};
    END IF;
    SET {_BACKEND} = {backend}, {_LOCATION} = {location};
    IF {_BACKEND} IS NOT NULL AND {_LOCATION} IS NOT NULL{is_gone} THEN
      {record}
    END IF;
    IF JSON_EXISTS({old}, '$.variants') THEN
      {self._nominate_variants(old, new)}
    END IF;
  END IF;"""

    def _nominate_variants(self, old: str, new: str | None) -> str:
        is_gone = "" if new is None else f" AND NOT {_has_variant(new, _value_of(old, 'location'), 'v.g_location')}"
        return self._insert(
            f"SELECT {self._recorded('v.g_backend', 'v.g_location', _value_of(old, 'location'))} FROM {_variants_of(old)} v"
            f" WHERE v.g_backend IS NOT NULL AND v.g_location IS NOT NULL{is_gone}"
        )

    def _find_due(self, value: str) -> str:
        """Return the SQL that finds when the objects of a ref are due, without a lock.

        It is looked up once for many rows: variables of the connection have the answer for the policy of one journal, and for
        the moment when the statement began.
        """
        longest = f"SELECT MAX(CAST(a.value AS DOUBLE)) FROM {self._meta} a WHERE a.name LIKE {literal(RETENTION_PREFIX + '%')}"
        name = f"LEFT(CONCAT({literal(RETENTION_PREFIX)}, {_value_of(value, 'storage_key')}), {LONGEST_META_NAME})"
        # In the character set and the collation of the column, whose index is used then.
        like_it = f"CONVERT({name} USING {self._name.character_set_name}) COLLATE {self._name.collation_name}"
        own = f"SELECT CAST(m.value AS DOUBLE) FROM {self._meta} m WHERE m.name = {like_it}"
        seconds = f"COALESCE(({own}), ({longest}), 0)"
        return f"SELECT TIMESTAMPADD(MICROSECOND, 1000000 * {seconds}, UTC_TIMESTAMP(6)) INTO {_DUE};"

    def _recorded(self, backend: str, location: str, source: str) -> str:
        digest = f"SHA2(CONCAT({backend}, {literal(chr(10))}, {location}), 256)"
        variant = f"SUBSTR('89ab', (CONV(SUBSTR({digest}, 17, 1), 16, 10) & 3) + 1, 1)"  # see `derived_id`
        derived = f"INSERT(INSERT(LEFT({digest}, 32), 13, 1, '5'), 17, 1, {variant})"
        return f"{derived}, {literal(DELETE)}, {backend}, {location}, {source}, {_DUE}"

    def _insert(self, rows: str) -> str:
        return f"""INSERT INTO {self._intent} (id, kind, backend, location, source, due)
        {rows}
        ON DUPLICATE KEY UPDATE due = GREATEST(due, VALUES(due));"""

    def _nominate_below(self, path: Path) -> str:
        """Return the SQL that records the files of the rows that a delete reaches by one way of cascades."""
        columns = [f"t.{name} AS g_value_{number}" for number, name in enumerate(self._columns)]
        nominated = "\n".join(self._nominate(f"g_row.g_value_{number}") for number in range(len(columns)))
        return f"""  FOR g_row IN ({_Below(path, self._own, self._keys[self._place]).select(columns)}) DO
{nominated}
  END FOR;"""

    # Guarding.

    def _guard(self, *, is_update: bool) -> str:
        """Return what locks the evidence for each location that has come into the row, those of variants last, or refuses it.

        A row is not evidence for what it has brought in itself; an update may give a column what any had before.
        """
        new, old = self._chosen("NEW"), self._chosen("OLD")
        original = _value_of(new, "location")

        def is_new(value: str, before: str) -> str:
            return f"{value} IS NOT NULL" + (f" AND NOT {value} <=> {before}" if is_update else "")

        any_is_new = " OR ".join(is_new(f"NEW.{name}", f"OLD.{name}") for name in self._columns)
        return f"""  IF {any_is_new} THEN
  SET {_COLUMN} = 0;
  WHILE {_COLUMN} < {len(self._columns)} DO
    IF {is_new(new, old)} THEN
      SET {_ORIGINAL} = NULL, {_LOCATION} = {original}, {_NUMBER} = 0;
      SET {_COUNT} = COALESCE(JSON_LENGTH({new}, '$.variants'), 0);
      WHILE {_NUMBER} <= {_COUNT} DO
        IF {_NUMBER} = 0 THEN
{self._look(is_update=is_update, is_variant=False)}
        ELSE
{self._look(is_update=is_update, is_variant=True)}
        END IF;
        IF NOT {_KNOWN} THEN
{self._lock_intents()}
        END IF;
        IF NOT {_KNOWN} THEN
          SET {_LOCATION} = CONCAT({literal(REFUSAL[0])}, QUOTE(LEFT({_LOCATION}, {_SHOWN})), {literal(REFUSAL[1])});
          SIGNAL SQLSTATE '23000' SET MYSQL_ERRNO = 1452, MESSAGE_TEXT = {_LOCATION};
        END IF;
        IF {_NUMBER} < {_COUNT} THEN
          SET {_ORIGINAL} = {original};
          SET {_LOCATION} = JSON_VALUE({_all_variants_of(new)}, CONCAT('$[', {_NUMBER}, '].location'));
        END IF;
        SET {_NUMBER} = {_NUMBER} + 1;
      END WHILE;
    END IF;
    SET {_COLUMN} = {_COLUMN} + 1;
  END WHILE;
  END IF;"""

    def _chosen(self, row: str) -> str:
        """Return the value of the column whose turn it is."""
        cases = " ".join(f"WHEN {number} THEN {row}.{name}" for number, name in enumerate(self._columns))
        return f"CASE {_COLUMN} {cases} END" if len(self._columns) > 1 else f"{row}.{self._columns[0]}"

    def _look(self, *, is_update: bool, is_variant: bool) -> str:
        """Return the SQL that checks whether the location needs no evidence, or locks another row that holds it."""
        known = [
            f"{_LOCATION} IS NULL",
            f"COALESCE(LOCATE(CONCAT(CHAR(10), {_LOCATION}, CHAR(10)), CONVERT(@granite_storage_claimed USING utf8mb4)"
            " COLLATE utf8mb4_bin), 0) > 0",
        ]
        if is_update:
            own = [_quoted(holder.column) for holder in self.table.holders if holder.place == self._place]
            known += [_holds(f"OLD.{name}", is_variant) for name in dict.fromkeys([*self._columns, *own])]
        looks = "".join(self._look_at(number, holder, is_variant) for number, holder in enumerate(self.table.holders))
        return f"""          SET {_KNOWN} = {" OR ".join(known)};
          BEGIN
            DECLARE CONTINUE HANDLER FOR NOT FOUND BEGIN END;{looks}
          END;"""

    def _look_at(self, number: int, holder: Holder, is_variant: bool) -> str:
        """Return the SQL that finds and locks a row of a column with the location, or with it as a variant of the original."""
        place, names = holder.place, self._keys[holder.place]
        variables = [f"@{_PREFIX}key_{number}_{position}" for position in range(len(names))]
        keys = ", ".join(f"t.{_quoted(name)}" for name in names)
        is_found = " AND ".join(f"t.{_quoted(name)} = {variable}" for name, variable in zip(names, variables, strict=True))
        is_own = " AND ".join(f"t.{_quoted(name)} = NEW.{_quoted(name)}" for name in names)
        another = f" AND NOT ({is_own})" if place == self._place else ""
        holds = _holds(f"t.{_quoted(holder.column)}", is_variant)
        indexed = f"t.{_quoted(location_column_name(holder.column))} = {_ORIGINAL if is_variant else _LOCATION}"
        return f"""
            IF NOT {_KNOWN} THEN
              SET {_PENDING} = 0;
              SELECT 1, {keys} INTO {_PENDING}, {", ".join(variables)} FROM {_qualified(place)} t
                WHERE {indexed} AND {holds}{another} LIMIT 1;
              IF {_PENDING} THEN
                SELECT COUNT(*) INTO {_KNOWN} FROM {_qualified(place)} t WHERE {is_found} AND {holds} LOCK IN SHARE MODE;
              END IF;
            END IF;"""

    def _lock_intents(self) -> str:
        """Return the SQL that locks every pending intent of the location, and then checks that it is not fenced.

        An intent of it as a variant of another original, or as no variant, is not evidence: its worker would not look for the
        object where it is now.
        """
        is_of_it = f"i.location = {_LOCATION} AND {_exactly('i.location')} = {_LOCATION}"
        pending = f"SELECT i.id FROM {self._intent} i WHERE {is_of_it} AND i.kind <> {literal(STAGING)}"
        return f"""          FOR g_row IN ({pending} ORDER BY i.id) DO
            SELECT COALESCE(SUM(IF(NOT {_exactly("i.source")} <=> {_ORIGINAL}, -1, i.kind = {literal(DELETE)})), 0)
              INTO {_PENDING} FROM {self._intent} i WHERE i.id = g_row.id FOR UPDATE;
            SET {_KNOWN} = IF({_PENDING} < 0 OR {_KNOWN} < 0, -1, {_KNOWN} + {_PENDING});
          END FOR;
          SET {_KNOWN} = {_KNOWN} > 0;
          IF {_KNOWN} THEN
            SELECT COUNT(*) = 0 INTO {_KNOWN} FROM {self._reclaim} r WHERE r.location = {_LOCATION} LOCK IN SHARE MODE;
          END IF;"""


_TEXT = "CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
# A trigger makes all local variables of its body for each row, however soon it ends, which costs more than a comparison of refs.
# So there are none: these are variables of the connection, which nothing else changes while the trigger works on a row.
_BACKEND, _LOCATION, _ORIGINAL = f"@{_PREFIX}backend", f"@{_PREFIX}location", f"@{_PREFIX}original"
_DUE, _ASKED = f"@{_PREFIX}due", f"@{_PREFIX}due_for"
_KNOWN, _PENDING = f"@{_PREFIX}known", f"@{_PREFIX}pending"
_COLUMN, _NUMBER, _COUNT = f"@{_PREFIX}column", f"@{_PREFIX}number", f"@{_PREFIX}count"


def _value_of(ref: str, key: str) -> str:
    return f"JSON_VALUE({ref}, '$.{key}')"


def _exactly(text: str) -> str:
    """Return a text as one that differs from another with more blanks at the end, which the columns' collation ignores."""
    return f"CONVERT({text} USING utf8mb4) COLLATE utf8mb4_nopad_bin"


def _all_variants_of(ref: str) -> str:
    """Return the variants of a ref as an array. JSON_EXTRACT finds no key that is spelled with escapes, JSON_QUERY does."""
    return f"JSON_EXTRACT(JSON_QUERY({ref}, '$.variants'), '$.*')"


def _variants_of(ref: str) -> str:
    """Return the variants of a ref as a table; MariaDB makes one for each row, so it is for refs that have some.

    A text that is too long is cut off to one that is still too long for an intent, which is then refused.
    """
    columns = ", ".join(f"g_{key} VARCHAR({LONGEST_LOCATION + 1}) {_TEXT} PATH '$.{key}'" for key in ("backend", "location"))
    return f"JSON_TABLE(JSON_QUERY({ref}, '$.variants'), '$.*' COLUMNS ({columns}))"


def _has_variant(ref: str, original: str, location: str) -> str:
    """Return whether a ref in SQL has a location as a variant of an original; never NULL."""
    variant = f"SELECT 1 FROM {_variants_of(ref)} w WHERE {_exactly('w.g_location')} = {location}"
    return f"({_exactly(_value_of(ref, 'location'))} <=> {original} AND EXISTS ({variant}))"


def _holds(ref: str, is_variant: bool) -> str:
    """Return whether a ref in SQL leads to the location, or has it as a variant of the original; never NULL."""
    return _has_variant(ref, _ORIGINAL, _LOCATION) if is_variant else f"{_exactly(_value_of(ref, 'location'))} <=> {_LOCATION}"


class _Below:
    """The rows of a table that a delete reaches by one way of cascades, as the tables and criteria of a SELECT.

    A table that deletes its own rows is followed down by a common table expression.

    Args:
        path: The way.
        own: The foreign keys by which tables on it delete their own rows.
        keys: The primary key of the table.
    """

    def __init__(self, path: Path, own: Mapping[Place, Sequence[_Cascade]], keys: Sequence[str]) -> None:
        self._expressions: list[str] = []
        self._tables: list[str] = []
        self._criteria: list[str] = []
        self._source = "OLD"
        if loops := own.get(path[0].parent, ()):
            referred = list(dict.fromkeys([*_referred(loops), *(column for _, column in path[0].links)]))
            self._follow("a", path[0].parent, loops, referred, f"SELECT {', '.join(f'OLD.{_quoted(c)}' for c in referred)}")
        for number, cascade in enumerate(path):
            is_last = number == len(path) - 1
            alias = "t" if is_last else f"p{number}"
            self._join(alias, cascade)
            loops = own.get(cascade.child, ())
            if loops and not (len(path) == 1 and cascade.child == cascade.parent):
                below = keys if is_last else [column for _, column in path[number + 1].links]
                referred = list(dict.fromkeys([*_referred(loops), *below]))
                columns = ", ".join(f"{alias}.{_quoted(name)}" for name in referred)
                first = f"SELECT {columns} FROM {' JOIN '.join(self._tables)} WHERE {' AND '.join(self._criteria)}"
                self._follow(f"{alias}c", cascade.child, loops, referred, first)
                if is_last:
                    same = [f"t.{_quoted(name)} = {self._source}.{_quoted(name)}" for name in keys]
                    self._tables.append(f"{_qualified(cascade.child)} t")
                    self._criteria += same

    def _join(self, alias: str, cascade: _Cascade) -> None:
        self._tables.append(f"{_qualified(cascade.child)} {alias}")
        self._criteria += [f"{alias}.{_quoted(child)} = {self._source}.{_quoted(parent)}" for child, parent in cascade.links]
        self._source = alias

    def _follow(self, name: str, place: Place, loops: Sequence[_Cascade], columns: Sequence[str], first: str) -> None:
        listed = ", ".join(_quoted(column) for column in columns)
        selected = ", ".join(f"x.{_quoted(column)}" for column in columns)
        further = [
            f"SELECT {selected} FROM {_qualified(place)} x JOIN {name} b ON "
            + " AND ".join(f"x.{_quoted(child)} = b.{_quoted(parent)}" for child, parent in loop.links)
            for loop in loops
        ]
        self._expressions.append(f"{name} ({listed}) AS ({' UNION '.join([first, *further])})")
        self._tables, self._criteria, self._source = [name], [], name

    def select(self, columns: Sequence[str]) -> str:
        """Return the SELECT of columns of the rows, which are `t`, in the newest state."""
        common = f"WITH RECURSIVE {', '.join(self._expressions)} " if self._expressions else ""
        tables, criteria = " JOIN ".join(self._tables), " AND ".join(self._criteria)
        return f"{common}SELECT {', '.join(columns)} FROM {tables} WHERE {criteria} LOCK IN SHARE MODE"


def _referred(cascades: Iterable[_Cascade]) -> list[str]:
    return [column for cascade in cascades for _, column in cascade.links]


# The catalogue.


_COLUMNS = text("""
    SELECT column_name, character_set_name, collation_name, column_key FROM information_schema.columns
    WHERE table_schema = :schema AND table_name = :table ORDER BY ordinal_position
""")
_CASCADES = text("""
    SELECT k.constraint_name, k.column_name, k.referenced_table_schema, k.referenced_table_name, k.referenced_column_name
    FROM information_schema.key_column_usage AS k
    JOIN information_schema.referential_constraints AS r ON r.constraint_schema = k.constraint_schema
        AND r.table_name = k.table_name AND r.constraint_name = k.constraint_name
    WHERE k.table_schema = :schema AND k.table_name = :table AND r.constraint_schema = :schema AND r.table_name = :table
        AND r.delete_rule = 'CASCADE' AND k.referenced_table_name IS NOT NULL
    ORDER BY k.constraint_name, k.ordinal_position
""")
_TRIGGERS = text("""
    SELECT trigger_schema, trigger_name, action_statement, action_order, event_object_table FROM information_schema.triggers
    WHERE event_object_schema IN :schemas AND LOCATE(:prefix, trigger_name) = 1
""").bindparams(bindparam("schemas", expanding=True), bindparam("prefix", _PREFIX))
_THERE = text("""
    SELECT CONCAT(table_schema, '.', table_name) FROM information_schema.tables
    WHERE CONCAT(table_schema, '.', table_name) IN :labels
""").bindparams(bindparam("labels", expanding=True))
_OF_KIND = text("""
    SELECT trigger_name FROM information_schema.triggers
    WHERE event_object_schema = :schema AND event_object_table = :table AND action_timing = :timing
        AND event_manipulation = :event
    ORDER BY action_order
""")
_INDEXES = text("""
    SELECT COUNT(*) FROM information_schema.statistics AS s JOIN information_schema.columns AS c
        ON c.table_schema = s.table_schema AND c.table_name = s.table_name AND c.column_name = s.column_name
    WHERE s.table_schema = :schema AND s.table_name = :table AND s.column_name = :column AND s.seq_in_index = 1
        AND c.extra LIKE '%STORED%'
""")
_MADE = text("""
    SELECT table_name, column_name FROM information_schema.columns
    WHERE table_schema = :schema AND column_comment = :comment ORDER BY 1, 2
""")
_MADE_HERE = "for granite_storage triggers"
"""The comment of the generated columns that triggers have brought along."""

_MADE_OF = re.compile(r"(?:DECLARE g_made_of TEXT DEFAULT|SET @granite_storage_made_of =) '(\d+:[0-9a-f]+) ((?:[^']|'')*)'")
"""What triggers are known by; in the first form, those of earlier versions."""

_NAMES = re.compile(r"SET @granite_storage_names = '((?:[^']|'')*)'")
"""The columns that a trigger names; those of earlier versions do not say."""


def _require_mariadb(connection: Connection) -> None:
    if not getattr(connection.dialect, "is_mariadb", False):
        raise ConfigurationError(
            "storage_triggers are for MariaDB, and this is MySQL, which no journal supports either: leave the call out there, and"
            " let the garbage collector find what SQL that bypasses the sessions leaves",
            see=Page.JOURNAL,
        )


def _columns(connection: Connection, place: Place) -> dict[str, Row[*tuple[Any, ...]]]:
    """Return the columns of a table by name."""
    return {row.column_name: row for row in ask(connection, _COLUMNS, schema=place[0], table=place[1])}


def _primary_key(connection: Connection, place: Place) -> list[str]:
    keys = [name for name, column in _columns(connection, place).items() if column.column_key == "PRI"]
    if not keys:
        raise ConfigurationError(
            f"the table {place[1]} has no primary key, by which triggers lock the rows that hold files: give it one"
        )
    return keys


def _find_cascades(connection: Connection, place: Place) -> tuple[list[Path], dict[Place, list[_Cascade]]]:
    """Return the ways by which deletes cascade to a table, and the foreign keys of tables on them that refer to themselves.

    Raises:
        ConfigurationError: Cascades of several tables lead in a circle.
    """
    paths: list[Path] = []
    own: dict[Place, list[_Cascade]] = {}

    def climb(to: Place, below: Path) -> None:
        cascades = _cascades_of(connection, to)
        own[to] = [cascade for cascade in cascades if cascade.parent == to]
        if not below:
            paths.extend((cascade,) for cascade in own[to])
        for cascade in cascades:
            if cascade.parent == to:
                continue
            if cascade.parent in {place, *(passed.parent for passed in below)}:
                raise ConfigurationError(
                    f"the foreign keys of {cascade.child[1]} and {cascade.parent[1]} delete each other's rows in a circle, which"
                    f" the triggers for the files of {place[1]} cannot follow on MariaDB: leave ON DELETE CASCADE out in one of"
                    " them"
                )
            paths.append((cascade, *below))
            climb(cascade.parent, paths[-1])

    climb(place, ())
    return paths, own


def _cascades_of(connection: Connection, child: Place) -> list[_Cascade]:
    found: dict[tuple[str, Place], list[tuple[str, str]]] = {}
    for name, column, schema, table, referred in ask(connection, _CASCADES, schema=child[0], table=child[1]):
        found.setdefault((name, (schema, table)), []).append((column, referred))
    return [_Cascade(child, parent, tuple(links)) for (_, parent), links in found.items()]


def _read(connection: Connection, place: Place, ancestors: Iterable[Place] = ()) -> list[_Found]:
    """Return the triggers of a table that are there, on it and on others of its schema or of those of its ancestors."""
    schemas = {place[0], *(schema for schema, _ in ancestors)}
    return [found for found in _read_all(connection, schemas) if found.label == _label(place)]


def _read_with_left(connection: Connection, place: Place) -> list[_Found]:
    """Return the triggers for a table, and those on it for tables that are gone."""
    return [*_read(connection, place), *_read_left(connection, [place])]


def _read_left(connection: Connection, places: Collection[Place]) -> list[_Found]:
    """Return the triggers on tables that are for the files of tables which are gone, as after a rename."""
    found = [item for item in _read_all(connection, {schema for schema, _ in places}) if item.place in places]
    labels = {item.label for item in found} - {_label(place) for place in places}
    if not labels:
        return []
    there = set(ask(connection, _THERE, labels=sorted(labels)).scalars())
    return [item for item in found if item.label in labels - there]


def _read_all(connection: Connection, schemas: Collection[str]) -> list[_Found]:
    """Return all of the library's triggers on the tables of schemas."""
    found: list[_Found] = []
    for schema, name, body, order, table in ask(connection, _TRIGGERS, schemas=sorted(schemas)):
        made, named = _MADE_OF.search(body), _NAMES.search(body)
        if made is not None:
            listed = [] if named is None else json.loads(named[1].replace("''", "'"))
            names = [((place[0], place[1]), place[2]) for place in listed]
            found.append(_Found((schema, name), (schema, table), made[2].replace("''", "'"), made[1], order, names))
    return found


def _drop(connection: Connection, keys: Iterable[tuple[str, str]]) -> None:
    for key in keys:
        run(connection, f"DROP TRIGGER IF EXISTS {_qualified(key)}")


def _drop_unused_indexes(connection: Connection, schema: str) -> None:
    """Drop the generated columns that were made for triggers, and their indexes: MariaDB drops no column that one depends on."""
    bodies = [row.action_statement for row in ask(connection, _TRIGGERS, schemas=[schema])]
    for table, column in ask(connection, _MADE, schema=schema, comment=_MADE_HERE).all():
        place, name = _qualified((schema, table)), _quoted(column)
        if not any(place in body and name in body for body in bodies):
            run(connection, f"ALTER TABLE {place} DROP COLUMN {name}")


@contextmanager
def _sql_mode(connection: Connection) -> Iterator[None]:
    """Set the SQL mode for triggers that are created, because MariaDB keeps the connection's mode with them."""
    usual = ask(connection, text("SELECT @@sql_mode")).scalar_one()
    run(connection, "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_BACKSLASH_ESCAPES'")
    try:
        yield
    finally:
        ask(connection, text("SET SESSION sql_mode = :mode"), mode=usual)


def _label(place: Place) -> str:
    return ".".join(place)


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _qualified(place: Place) -> str:
    return ".".join(map(_quoted, place))
