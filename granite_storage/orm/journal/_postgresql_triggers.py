"""The functions and triggers of PostgreSQL that keep the journal's promise for every writer, as SQL.

They nominate what a statement takes out of rows, as intents to delete, and guard what it brings in. Who brings in a location
holds a lock on the evidence that its object is there: a pending intent of it, or another row that holds it. A worker skips what
is locked, and looks for rows that refer to an object after it has fenced it; so the guard looks for a fence after it has locked.

Why an INSERT is guarded when its rows are there already. Transition tables cost a third of what a trigger for each row costs. But
rows that no guard has seen yet must not be evidence, neither for themselves nor for others that the same statement writes. So the
statements that insert are counted while they run. Meanwhile what this transaction has written itself is not evidence. The last
guard of the statement accepts rows that were written by earlier statements of the transaction: those with a lower command id.

Triggers and functions of the application may change or delete such a row before its guard has seen it. Then what it held is
nominated, and the intent would be evidence for it. So the locations that rows lose while a statement inserts are doubted where no
intent vouched for them before, and the guard asks for other evidence unless the row is there as it was inserted.

An UPDATE has a trigger for each row, because one with transition tables would cost every UPDATE of the table. It runs before the
row is written, after all others of its kind, nominates first and guards then: so rows may swap their files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from hashlib import sha256

from sqlalchemy import Connection, bindparam, text

from granite_storage.orm._interfaces import REFUSAL, JournalTables
from granite_storage.orm.columns import fitting_name
from granite_storage.orm.journal._trigger_base import (
    GuardedTable,
    Holder,
    Place,
    TableTriggers,
    ask,
    describe_gone,
    describe_triggers,
    find_gone_columns,
    literal,
    quoted,
    run,
)
from granite_storage.orm.journal.tables import DELETE, LONGEST_META_NAME, RETENTION_PREFIX, STAGING

__all__ = ["CLAIMED", "TRIGGERS", "PostgreSQLTriggers"]

VERSION = 2
"""The version of the SQL; the arguments of the triggers begin with it."""

CLAIMED = "granite_storage.claimed"
"""The setting of a transaction with the locations that the library has claimed for it already, each between line feeds."""

_TRUNCATED = "granite_storage.truncated"
"""The setting of a transaction above READ COMMITTED that has truncated a table: what it has nominated itself is not evidence."""

_INSERTING = "granite_storage.inserting"
_RETENTION = "granite_storage.retention"
"""The settings of a transaction with the number of statements that insert, and with the last retention that was looked up."""

_DOUBTED = "granite_storage.doubted"
"""The setting of a transaction with the locations, each between line feeds, that rows have lost while a statement inserts, and
that had no intent before."""

_NAMES = "#variable_conflict use_variable"
"""Columns of the application may be named like variables of the functions, which name all columns by their tables."""

_MOST_SAVEPOINTS = (1 << 24) - 1
"""The most savepoints of one transaction whose rows count as its own."""

TRIGGERS = {
    "granite_storage_delete": "delete",
    "granite_storage_insert": "insert",
    "granite_storage_inserting": "insert",
    "granite_storage_truncate": "truncate",
    "zz_granite_storage_update": "update",  # triggers of one kind fire in the order of their names
}
"""The triggers of each table by name, and the functions that they call."""


class PostgreSQLTriggers(TableTriggers):
    """The triggers of PostgreSQL."""

    def __init__(self, connection: Connection, table: GuardedTable, journal: JournalTables, schema: str) -> None:
        super().__init__(connection, table, journal, schema)
        self._qualified = _qualified(table.place)
        names = (journal.intent.name, journal.reclaim.name, journal.meta.name)
        self._intent, self._reclaim, self._meta = (_qualified((schema, name)) for name in names)

    def is_current(self, connection: Connection) -> bool:
        """Return whether the table and its partitions have these very triggers."""
        return not self._outdated(connection)

    def _create_triggers(self, connection: Connection) -> None:
        outdated = self._outdated(connection)
        statements = self.functions if outdated else []
        for relation, is_parent in outdated:
            statements += self._triggers(relation, self.digest, is_parent=is_parent)
        for statement in statements:
            run(connection, statement)

    def _find_trigger_problems(self, connection: Connection) -> list[str]:
        problems: list[str] = []
        for relation, found in _read(connection, self._qualified).items():
            outdated = [name for name, (_, made) in found.items() if made != self.digest]
            disabled = sorted(name for name, (state, _) in found.items() if state != "O")
            problems += describe_triggers(relation, TRIGGERS.keys() - found.keys(), outdated)
            if disabled:
                problems.append(f"the triggers {', '.join(disabled)} of {relation} do not fire: ALTER TABLE ... ENABLE TRIGGER")
        return problems

    def _has_index(self, connection: Connection, holder: Holder) -> bool:
        return bool(ask(connection, _INDEXED, name=_qualified(holder.place), column=holder.column).scalar_one())

    @staticmethod
    def drop(connection: Connection, schema: str, table: str) -> None:
        """Drop the functions of a table, and with them the triggers."""
        functions = [f"{_function((schema, table), what)}()" for what in sorted(set(TRIGGERS.values()))]
        for function in [*functions, f"{_function((schema, table), 'guard')}(text, text, bigint)"]:
            run(connection, f"DROP FUNCTION IF EXISTS {function} CASCADE")

    @staticmethod
    def has_some(connection: Connection, schema: str, table: str) -> bool:
        """Return whether a table has any of these triggers."""
        return any(_read(connection, _qualified((schema, table))).values())

    @staticmethod
    def find_gone(connection: Connection, schemas: Collection[str], declared: Sequence[Holder]) -> list[str]:
        """Return in words which tables or columns functions name that are gone."""
        named = _read_named(connection, schemas)
        gone = find_gone_columns(named, lambda place: set(ask(connection, _COLUMNS, schema=place[0], table=place[1]).scalars()))
        return describe_gone(gone, "statements which write files to their rows fail")

    def _outdated(self, connection: Connection) -> list[tuple[str, bool]]:
        """Return the relations whose triggers are not these, in SQL, the table first, and whether each is the table.

        The trigger for each row is made on the table alone, so where that is outdated all of them are made.
        """
        found = _read(connection, self._qualified)
        wrong = [
            relation
            for relation, triggers in found.items()
            if triggers.keys() != TRIGGERS.keys() or any(made != self.digest for _, made in triggers.values())
        ]
        if self._qualified in wrong:
            wrong = list(found)
        return [(relation, relation == self._qualified) for relation in wrong]

    def _function(self, what: str) -> str:
        return _function(self.table.place, what)

    @cached_property
    def digest(self) -> str:
        """The version and a digest of all of it; the argument of each trigger, by which what is there is known."""
        text = "\n".join((*self.functions, *self._triggers(self._qualified, "", is_parent=True)))
        return f"{VERSION}:{sha256(text.encode()).hexdigest()[:32]}"

    @property
    def functions(self) -> list[str]:
        """The statements that create the functions, or replace them."""
        bodies = {
            "delete": self._on_delete(),
            "insert": self._on_insert(),
            "truncate": self._on_truncate(),
            "update": self._on_update(),
        }
        guard = f"""
CREATE OR REPLACE FUNCTION {self._function("guard")}(wanted text, original text, before bigint) RETURNS void
LANGUAGE plpgsql AS $granite$
{_NAMES}
{self._guard()}
$granite$"""
        # Trigger functions run with the rights of their owner, and find nothing that another role has made. No other role may
        # attach them to a table of its own; to fire them needs no right.
        return (
            [guard]
            + [
                f"""
CREATE OR REPLACE FUNCTION {self._function(what)}() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp{"" if what == "update" else " SET jit = off"} AS $granite$
{_NAMES}
{body}
$granite$"""
                for what, body in bodies.items()
            ]
            + [f"REVOKE EXECUTE ON FUNCTION {self._function(what)}() FROM PUBLIC" for what in bodies]
            + [f"COMMENT ON FUNCTION {self._function('delete')}() IS {literal(self._comment)}"]
        )

    @property
    def _comment(self) -> str:
        """The comment of a function: the columns that the functions name, by schema, table and name."""
        own = [(*self.table.place, name) for name in (*self.table.keys, *self.table.columns)]
        holders = [(*holder.place, holder.column) for holder in self.table.holders]
        return _BEGINNING + json.dumps([list(column) for column in sorted({*own, *holders})])

    def _triggers(self, relation: str, digest: str, *, is_parent: bool) -> list[str]:
        """Return the statements that create the triggers of a relation, or replace them.

        Args:
            relation: The table, or a partition of it, in SQL.
            digest: What they are known by.
            is_parent: Whether it is the table; a partition has its trigger for UPDATE from there.
        """

        def trigger(name: str, moment: str, how: str = "FOR EACH STATEMENT") -> list[str]:
            function = f"{self._function(TRIGGERS[name])}({literal(digest)})"
            made = f"CREATE TRIGGER {name} {moment} ON {relation} {how} EXECUTE FUNCTION {function}"
            return [f"DROP TRIGGER IF EXISTS {name} ON {relation}", made]

        changed = " OR ".join(
            f"CAST(OLD.{quoted(name)} AS jsonb) IS DISTINCT FROM CAST(NEW.{quoted(name)} AS jsonb)" for name in self.table.columns
        )
        statements = [
            *trigger("granite_storage_inserting", "BEFORE INSERT"),
            *trigger("granite_storage_insert", "AFTER INSERT", "REFERENCING NEW TABLE AS changed FOR EACH STATEMENT"),
            *trigger("granite_storage_delete", "AFTER DELETE", "REFERENCING OLD TABLE AS changed FOR EACH STATEMENT"),
            *trigger("granite_storage_truncate", "BEFORE TRUNCATE"),
        ]
        if is_parent:
            statements += trigger("zz_granite_storage_update", "BEFORE UPDATE", f"FOR EACH ROW WHEN ({changed})")
        return statements

    # Nominating.

    def _nominated(self, source: str) -> str:
        """Return the INSERT of the intents to delete what the rows of a relation hold."""
        selects: list[str] = []
        for name in map(quoted, self.table.columns):
            selects.append(
                f"SELECT o.{name} ->> 'backend' AS backend, o.{name} ->> 'location' AS location, CAST(NULL AS text) AS source,"
                f" o.{name} ->> 'storage_key' AS policy FROM {source} o WHERE o.{name} IS NOT NULL"
            )
            selects.append(
                f"SELECT v.value ->> 'backend', v.value ->> 'location', o.{name} ->> 'location', o.{name} ->> 'storage_key'"
                f" FROM {source} o, jsonb_path_query(CAST(o.{name} AS jsonb), '$.variants.*') AS v(value)"
                f" WHERE CAST(o.{name} AS jsonb) ? 'variants'"
            )
        return self._intents_of("\n    UNION ALL ".join(selects))

    def _intents_of(self, held: str) -> str:
        """Return the INSERT of the intents to delete objects, those of one transaction in the order of their ids."""
        return f"""INSERT INTO {self._intent} AS i (id, kind, backend, location, source, due)
  SELECT DISTINCT ON (1) {_id_of("h.digest")} AS id, {literal(DELETE)}, h.backend, h.location, h.source,
    clock_timestamp() + make_interval(secs => {self._retention("m.value")}) AS due
  FROM (
    SELECT n.*, sha256(convert_to(n.backend || E'\\n' || n.location, 'UTF8')) AS digest
    FROM (
    {held}
    ) n OFFSET 0
  ) h LEFT JOIN {self._meta} m ON m.name = {_meta_name("h.policy")}
  WHERE h.digest IS NOT NULL
  ORDER BY 1, due DESC
  ON CONFLICT (id) DO UPDATE SET due = greatest(i.due, excluded.due)"""

    def _retention(self, own: str) -> str:
        """Return the seconds that an object waits: those of its policy, or the most of any where that is unknown."""
        longest = f"SELECT max(CAST(a.value AS float8)) FROM {self._meta} a WHERE a.name LIKE {literal(RETENTION_PREFIX + '%')}"
        return f"coalesce(CAST({own} AS float8), ({longest}), 0)"

    def _on_delete(self) -> str:
        return f"""DECLARE
  own xid;
  known text[];
BEGIN
  IF {_counted("0")} > 0 THEN
    own := CAST(pg_current_xact_id() AS xid);
    {self._doubt(self._brought("changed"))};
  END IF;
  {self._nominated("changed")};
  RETURN NULL;
END"""

    def _doubt(self, lost: str) -> str:
        """Return the statements that lock the intents of locations, and note those that have none."""
        found = "string_agg(DISTINCT E'\\n' || d.location || E'\\n', '')"
        return f"""SELECT array_agg(s.location) INTO known FROM (
    {self._lock_intents(lost)}
    ) s;
    PERFORM set_config('{_DOUBTED}', concat(current_setting('{_DOUBTED}', true), {found}), true) FROM (
    {lost}
    ) d WHERE (d.location = ANY (known)) IS NOT TRUE HAVING count(d.location) > 0"""

    def _on_truncate(self) -> str:
        # The partition that the statement is about, which is not always the whole table.
        statement = self._nominated("@relation@").replace("$granite$", "")
        # Rows that others have deleted since the snapshot are in what it reads, because TRUNCATE waits for no row.
        return f"""BEGIN
  IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
    PERFORM set_config('{_TRUNCATED}', 'on', true);
  END IF;
  EXECUTE replace({literal(statement)}, '@relation@', CAST(CAST(TG_RELID AS regclass) AS text));
  RETURN NULL;
END"""

    def _on_update(self) -> str:
        own_retention = self._retention(f"(SELECT m.value FROM {self._meta} m WHERE m.name = {_meta_name('policy')})")
        nominate: list[str] = []
        guard: list[str] = []
        lost: list[str] = []
        for name in map(quoted, self.table.columns):
            old, new = f"CAST(OLD.{name} AS jsonb)", f"CAST(NEW.{name} AS jsonb)"
            lost.append(
                f"SELECT {old} ->> 'location' AS location UNION ALL"
                f" SELECT v.value ->> 'location' FROM jsonb_path_query({old}, '$.variants.*') AS v(value)"
            )
            single = f"""policy := coalesce({old} ->> 'storage_key', '');
      seconds := CAST(CAST(nullif(current_setting('{_RETENTION}', true), '') AS jsonb) ->> policy AS float8);
      IF seconds IS NULL THEN
        seconds := {own_retention};
        PERFORM set_config('{_RETENTION}', CAST(jsonb_build_object(policy, seconds) AS text), true);
      END IF;
      INSERT INTO {self._intent} AS i (id, kind, backend, location, source, due)
      VALUES ({_id_of("digest")}, {literal(DELETE)}, {old} ->> 'backend', {old} ->> 'location', NULL,
        clock_timestamp() + make_interval(secs => seconds))
      ON CONFLICT (id) DO UPDATE SET due = greatest(i.due, excluded.due)"""
            nominate.append(f"""
  IF {old} IS DISTINCT FROM {new} THEN
    IF {old} ->> 'location' IS DISTINCT FROM {new} ->> 'location' THEN
      digest := sha256(convert_to(({old} ->> 'backend') || E'\\n' || ({old} ->> 'location'), 'UTF8'));
      IF digest IS NOT NULL THEN
      {single};
      END IF;
    END IF;
    IF {old} -> 'variants' IS NOT NULL THEN
      {self._intents_of(_left_variants(old, new))};
    END IF;
  END IF;""")
            guard.append(f"""
  IF {old} IS DISTINCT FROM {new} THEN
    IF {old} ->> 'location' IS DISTINCT FROM {new} ->> 'location' AND {new} ->> 'location' IS NOT NULL THEN
      PERFORM {self._function("guard")}({new} ->> 'location', NULL, before);
    END IF;
    IF {new} -> 'variants' IS NOT NULL THEN
      PERFORM {self._function("guard")}(n.location, {new} ->> 'location', before) FROM (
        {_gained_variants(old, new)}
      ) n;
    END IF;
  END IF;""")
        return f"""DECLARE
  digest bytea;
  policy text;
  seconds float8;
  own xid;
  known text[];
  before bigint := CASE WHEN {_counted("0")} > 0 THEN 0 END;
BEGIN
  IF before IS NOT NULL THEN
    own := CAST(pg_current_xact_id() AS xid);
    IF ({_is_own("OLD")}) THEN
    {self._doubt(" UNION ALL ".join(lost))};
    END IF;
  END IF;{"".join(nominate)}{"".join(guard)}
  RETURN NEW;
END"""

    # Guarding.

    def _brought(self, relation: str, more: str = "") -> str:
        """Return the SELECT of the locations in the rows of a relation, each with that of its original, and more of its row."""
        selects: list[str] = []
        for name in map(quoted, self.table.columns):
            selects.append(
                f"SELECT n.{name} ->> 'location' AS location, CAST(NULL AS text) AS source{more} FROM {relation} n"
                f" WHERE n.{name} IS NOT NULL"
            )
            selects.append(
                f"SELECT v.value ->> 'location', n.{name} ->> 'location'{more} FROM {relation} n,"
                f" jsonb_path_query(CAST(n.{name} AS jsonb), '$.variants.*') AS v(value)"
                f" WHERE CAST(n.{name} AS jsonb) ? 'variants'"
            )
        return "\n    UNION ALL ".join(selects)

    def _on_insert(self) -> str:
        brought = self._brought("changed")
        same_row = " AND ".join(f"t.{quoted(key)} = n.{quoted(key)}" for key in self.table.keys)
        same_refs = " AND ".join(
            f"CAST(t.{name} AS jsonb) IS NOT DISTINCT FROM CAST(n.{name} AS jsonb)" for name in map(quoted, self.table.columns)
        )
        # The command that has written the row, if that still holds what was inserted.
        written = f"SELECT {_COMMAND} FROM {self._qualified} t WHERE {same_row} AND {same_refs}"
        nominated = f"SELECT min({_command_of('i')}) FROM {self._intent} i WHERE i.location = w.location AND {_is_own('i')}"
        return f"""DECLARE
  own xid := CAST(pg_current_xact_id() AS xid);
  locations text[];
  sources text[];
  before bigint := 0;
  missing record;
  gone text;
BEGIN
  IF TG_WHEN = 'BEFORE' THEN
    PERFORM set_config('{_INSERTING}', CAST({_counted("0")} + 1 AS text), true);
    RETURN NULL;
  END IF;
  PERFORM set_config('{_INSERTING}', CAST({_counted("1")} - 1 AS text), true);
  SELECT array_agg(s.location), array_agg(coalesce(s.source, '')) INTO locations, sources FROM (
    {self._lock_intents(brought)}
  ) s;
  IF {_counted("0")} = 0 THEN
    before := (
      SELECT CASE WHEN count(*) = (SELECT count(*) FROM changed) THEN coalesce(min({_COMMAND}), 0) ELSE 0 END
      FROM {self._qualified} t JOIN changed n ON {same_row}
    );
  END IF;
  FOR missing IN SELECT DISTINCT w.location, w.source FROM (
    {brought}
    ) w LEFT JOIN (
      SELECT l.location, min(l.source) AS first, max(l.source) AS last FROM unnest(locations, sources) AS l(location, source)
      GROUP BY l.location
    ) l ON l.location = w.location
    WHERE w.location IS NOT NULL AND (coalesce(w.source, '') = l.first AND l.first = l.last) IS NOT TRUE
  LOOP
    PERFORM {self._function("guard")}(missing.location, missing.source, before);
  END LOOP;
  IF current_setting('{_DOUBTED}', true) <> '' THEN
    PERFORM {self._function("guard")}(w.location, w.source, -1) FROM (
    {self._brought("changed", f", ({written}) AS written")}
    ) w WHERE strpos(current_setting('{_DOUBTED}', true), E'\\n' || w.location || E'\\n') > 0
      AND (w.written < ({nominated})) IS NOT TRUE;
    IF {_counted("0")} = 0 THEN
      PERFORM set_config('{_DOUBTED}', '', true);
    END IF;
  END IF;
  SELECT w.location INTO gone FROM (
    {brought}
    ) w JOIN {self._reclaim} r ON r.location = w.location LIMIT 1;
  IF FOUND THEN
    {self._refusal("gone")}
  END IF;
  RETURN NULL;
END"""

    def _lock_intents(self, locations: str) -> str:
        """Return the SELECT of the intents of locations, which locks them."""
        return f"""SELECT i.location, i.source FROM {self._intent} i WHERE {_is_evidence("i")} AND i.location IN (
      SELECT w.location FROM (
    {locations}
      ) w
    ) ORDER BY i.id FOR UPDATE"""

    def _guard(self) -> str:
        """Return the body of the function that locks the evidence for one location, or refuses it.

        Its arguments are the location, that of its original if it is a variant, and the command id from which on the rows that
        this transaction has written are not evidence; NULL where all of them are. Below zero its intents are none either. An
        intent of the location as a variant of another original, or as no variant, is not evidence: its worker would not look for
        the object where it is now.
        """
        by_location = [self._lock_holder(item, _at(item, "wanted")) for item in self.table.holders]
        by_original = [
            self._lock_holder(
                item,
                f"{_at(item, 'original')} AND jsonb_path_exists(CAST(t.{quoted(item.column)} AS jsonb),"
                " '$.variants.*.location ? (@ == $wanted)', jsonb_build_object('wanted', wanted))",
            )
            for item in self.table.holders
        ]
        return f"""DECLARE
  own xid := CAST(pg_current_xact_id() AS xid);
  is_known boolean;
  is_same boolean;
BEGIN
  IF strpos(current_setting('{CLAIMED}', true), E'\\n' || wanted || E'\\n') > 0 THEN
    RETURN;
  END IF;
  SELECT count(*) > 0, coalesce(bool_and(s.source IS NOT DISTINCT FROM original), true) INTO is_known, is_same FROM (
    SELECT i.source FROM {self._intent} i WHERE i.location = wanted AND {_is_evidence("i")}
      AND (before < 0 AND {_is_own("i")}) IS NOT TRUE ORDER BY i.id FOR UPDATE
  ) s;
  IF original IS NULL THEN{"".join(by_location)}
  ELSE{"".join(by_original)}
  END IF;
  IF NOT is_known OR NOT is_same OR EXISTS (SELECT FROM {self._reclaim} r WHERE r.location = wanted) THEN
    {self._refusal("wanted")}
  END IF;
END"""

    def _lock_holder(self, holder: Holder, is_holder: str) -> str:
        return f"""
    IF NOT is_known THEN
      PERFORM FROM {_qualified(holder.place)} t WHERE {is_holder}
        AND (before IS NULL OR NOT ({_COMMAND} >= before AND {_is_own("t")})) LIMIT 1 FOR SHARE;
      is_known := FOUND;
    END IF;"""

    def _refusal(self, location: str) -> str:
        return f"""RAISE EXCEPTION USING ERRCODE = 'foreign_key_violation',
      MESSAGE = format({literal("%L".join(REFUSAL))}, {location}),
      HINT = 'Only what waits to be deleted, or what another row of the same metadata holds in the same schema, can be written;'
        ' journal.adopt() lets other refs in.';"""


def _id_of(digest: str) -> str:
    """Return the id of a delete intent in SQL, given the digest of its backend and location; see `derived_id`."""
    version, variant = f"get_byte({digest}, 6) & 15 | 80", f"get_byte({digest}, 8) & 63 | 128"
    return f"CAST(encode(set_byte(set_byte(substr({digest}, 1, 16), 6, {version}), 8, {variant}), 'hex') AS uuid)"


def _meta_name(policy: str) -> str:
    return f"left({literal(RETENTION_PREFIX)} || ({policy}), {LONGEST_META_NAME})"


def _counted(without: str) -> str:
    """Return in SQL how many statements that insert are running, or another number where none has set it."""
    return f"coalesce(CAST(nullif(current_setting('{_INSERTING}', true), '') AS int), {without})"


def _at(holder: Holder, location: str) -> str:
    """Return the criterion that a row holds a location, spelled as the index over locations is."""
    return f"(t.{quoted(holder.column)} ->> 'location') = {location}"


def _command_of(alias: str) -> str:
    """Return in SQL the command that has written a row."""
    return f"CAST(CAST({alias}.cmin AS text) AS bigint)"


_COMMAND = _command_of("t")


def _is_own(alias: str) -> str:
    """Return the criterion that a row was written by this transaction, in whichever of its savepoints.

    What is visible and in progress is its own. The ids of its savepoints follow the transaction's. The status is asked of no id
    that is far beyond: rows that are older than two billion transactions look as if they were, and it raises an error for them.
    """
    distance = f"(CAST(age(own) AS bigint) - age({alias}.xmin))"
    full = f"CAST(CAST(CAST(CAST(pg_current_xact_id() AS text) AS bigint) + {distance} AS text) AS xid8)"
    return f"CASE WHEN {distance} BETWEEN 0 AND {_MOST_SAVEPOINTS} THEN pg_xact_status({full}) = 'in progress' ELSE false END"


def _is_evidence(alias: str) -> str:
    """Return the criterion that a pending intent may say that its object is there."""
    is_current = f"(current_setting('{_TRUNCATED}', true) = 'on' AND {_is_own(alias)}) IS NOT TRUE"
    return f"{alias}.kind <> {literal(STAGING)} AND {is_current}"


def _left_variants(old: str, new: str) -> str:
    """Return the SELECT of the variants that a row does not keep; all of them go with their original."""
    return f"""SELECT v.value ->> 'backend' AS backend, v.value ->> 'location' AS location, {old} ->> 'location' AS source,
      {old} ->> 'storage_key' AS policy FROM jsonb_path_query({old}, '$.variants.*') AS v(value)
    WHERE {_is_not_in(old, new)}"""


def _gained_variants(old: str, new: str) -> str:
    """Return the SELECT of the locations of the variants that a row did not have for the same original."""
    return f"""SELECT v.value ->> 'location' AS location FROM jsonb_path_query({new}, '$.variants.*') AS v(value)
        WHERE v.value ->> 'location' IS NOT NULL AND {_is_not_in(new, old)}"""


def _is_not_in(one: str, other: str) -> str:
    return f"""({one} ->> 'location' IS DISTINCT FROM {other} ->> 'location' OR NOT EXISTS (
      SELECT FROM jsonb_path_query({other}, '$.variants.*') AS k(value) WHERE k.value ->> 'location' = v.value ->> 'location'))"""


def _qualified(place: Place) -> str:
    return ".".join(map(quoted, place))


def _function(place: Place, what: str) -> str:
    """Return the name of one of the functions of a table in SQL, without arguments."""
    return _qualified((place[0], fitting_name(f"granite_storage_{what}_", place[1])))


# What is there, by the catalogue.


_TRIGGERS = text("""
    SELECT n.nspname, c.relname, t.tgname, t.tgenabled, encode(t.tgargs, 'escape')
    FROM (
        SELECT to_regclass(:name) AS relid, 0 AS level
        UNION SELECT relid, level FROM pg_partition_tree(to_regclass(:name)) WHERE level > 0
    ) r
    JOIN pg_class c ON c.oid = r.relid AND c.relkind <> 'f'
    JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_trigger t ON t.tgrelid = c.oid AND t.tgname IN :triggers
    ORDER BY r.level, n.nspname, c.relname
""").bindparams(bindparam("triggers", value=list(TRIGGERS), expanding=True))

_INDEXED = text("""
    SELECT EXISTS (
        SELECT FROM pg_index
        WHERE indrelid = to_regclass(:name) AND indisvalid AND indpred IS NULL
            AND trim(pg_get_indexdef(indexrelid, 1, false), '()') = quote_ident(:column) || ' ->> ''location''::text'
    )
""")
_BEGINNING = "granite_storage: "
"""What the comments of functions begin with."""

_COMMENTS = text("""
    SELECT concat(n.nspname, '.', c.relname), obj_description(t.tgfoid, 'pg_proc')
    FROM pg_trigger t
    JOIN pg_class c ON c.oid = t.tgrelid AND NOT c.relispartition
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE t.tgname = 'granite_storage_delete' AND n.nspname IN :schemas ORDER BY 1
""").bindparams(bindparam("schemas", expanding=True))
_COLUMNS = text("""
    SELECT a.attname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE n.nspname = :schema AND c.relname = :table AND a.attnum > 0 AND NOT a.attisdropped
""")


def _read(connection: Connection, qualified: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Return the triggers of a table and of its partitions, by their names in SQL: whether they fire, and their argument."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for schema, name, trigger, state, argument in ask(connection, _TRIGGERS, name=qualified):
        triggers = found.setdefault(_qualified((schema, name)), {})
        if trigger is not None:
            fires = state.decode() if isinstance(state, bytes) else state  # drivers differ in the type "char"
            triggers[trigger] = (fires, argument.removesuffix("\\000"))
    return found


def _read_named(connection: Connection, schemas: Collection[str]) -> Iterator[tuple[str, Place, str]]:
    """Yield the tables with triggers, each with the columns that its functions name."""
    for relation, comment in ask(connection, _COMMENTS, schemas=sorted(schemas)):
        if comment is not None and comment.startswith(_BEGINNING):
            for schema, table, column in json.loads(comment.removeprefix(_BEGINNING)):
                yield relation, (schema, table), column
