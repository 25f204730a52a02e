"""Mutants of the journal on SQLite: what is looked at with which lock, what is durable when, and which sidecar counts."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.triggers import EACH

__all__ = ["MUTANTS"]

_SQLITE = "granite_storage/orm/journal/sqlite.py"
_TESTS = "tests/orm/journal/test_sqlite.py"
_TRIGGERS = "granite_storage/orm/journal/_sqlite_triggers.py"
_OF_TRIGGERS = "tests/orm/journal/test_sqlite_triggers.py"
_TAKEN_OUT = f"{_OF_TRIGGERS}::test_what_a_statement_takes_out_of_rows"

MUTANTS = [
    Mutant(
        name="sqlite-absent-intent-passes",
        rule="A row takes an object only while the intent of its upload is there and pending.",
        path=_SQLITE,
        old="return name == named and ids <= pending",
        new="return name == named",
        tests=(f"{_TESTS}::TestUploads::test_one_that_a_worker_has_reclaimed",),
    ),
    Mutant(
        name="sqlite-any-sidecar-counts",
        rule="An intent counts only in the sidecar that the rows' database names.",
        path=_SQLITE,
        old="return name == named and ids <= pending",
        new="return ids <= pending",
        tests=(f"{_TESTS}::TestSidecar::test_one_that_the_database_does_not_name",),
    ),
    Mutant(
        name="sqlite-worker-without-the-lock",
        rule="A worker looks for rows with the lock of writers, so that no session is between its look and its COMMIT.",
        path=_SQLITE,
        old='connection = await self._begin(stack, "BEGIN IMMEDIATE")',
        new='connection = await self._begin(stack, "BEGIN")',
        tests=(f"{_TESTS}::TestUploads::test_no_worker_comes_between_the_look_and_the_commit",),
    ),
    Mutant(
        name="sqlite-upload-ignores-delete-intents",
        rule="An object that has a delete intent is not deleted as an upload: an undo may bring it back.",
        path=_SQLITE,
        old="            for table in (self._tables.intent, self._tables.reclaim)\n        ]\n        referenced",
        new="            for table in ()\n        ]\n        referenced",
        tests=(f"{_TESTS}::TestUploads::test_what_a_delete_intent_keeps_is_not_deleted_as_an_upload",),
    ),
    Mutant(
        name="sqlite-no-barrier",
        rule="What a worker has seen is durable before it forgets an upload.",
        path=_SQLITE,
        old='        await connection.execute(_put(_BARRIER, ""))\n',
        new="",
        tests=(f"{_TESTS}::TestUploads::test_what_a_worker_has_seen_is_durable_before_it_forgets",),
    ),
    Mutant(
        name="sqlite-fence-at-normal",
        rule="The journal's commits beside the rows are synced whatever the application's own are.",
        path=_SQLITE,
        old='cursor.execute("PRAGMA synchronous = EXTRA")',
        new="pass",
        tests=(f"{_TESTS}::TestUploads::test_what_a_worker_has_seen_is_durable_before_it_forgets",),
    ),
    Mutant(
        name="sqlite-sidecar-at-normal",
        rule="A committed intent survives a power loss.",
        path=_SQLITE,
        old='connection.execute("PRAGMA synchronous = FULL")',
        new='connection.execute("PRAGMA synchronous = NORMAL")',
        tests=(f"{_TESTS}::TestUploads::test_what_a_worker_has_seen_is_durable_before_it_forgets",),
    ),
    Mutant(
        name="sqlite-lost-sidecar-is-read-on",
        rule="A connection to a file that is no longer at its path is not used.",
        path=_SQLITE,
        old="    if not connection.opened.is_there():\n        raise DisconnectionError",
        new="    if False:\n        raise DisconnectionError",
        tests=(f"{_TESTS}::TestSidecar::test_lost_under_a_running_process",),
    ),
    Mutant(
        name="sqlite-lost-database-is-recovered",
        rule="Recovery does not begin in a database in which no worker ever ran, if one ran with the sidecar.",
        path=_SQLITE,
        old="if is_known and not await has_beat(main, tables):",
        new="if False:",
        tests=(f"{_TESTS}::TestSidecar::test_a_database_that_was_lost",),
    ),
    Mutant(
        name="sqlite-collector-looks-beside-the-sidecar",
        rule="The collector keeps what the sidecar knows of.",
        path="granite_storage/gc/database.py",
        old="                held |= await find_references(connection, [], locations, journals=[sidecar.tables], extra=True)\n",
        new="",
        tests=(f"{_TESTS}::TestCollector::test_an_upload_that_no_row_has_yet",),
    ),
    Mutant(
        name="sqlite-collector-believes-any-sidecar",
        rule="The collector stops where the database names another sidecar than the one that it has looked into.",
        path="granite_storage/gc/database.py",
        old="        if named != names:\n",
        new="        if False:\n",
        tests=(f"{_TESTS}::TestCollector::test_another_sidecar_than_the_database_names",),
    ),
    Mutant(
        name="sqlite-trigger-ignores-fences",
        rule="A location that is fenced is refused, whatever else says that its object is there.",
        path=_TRIGGERS,
        old='return f"""EXISTS (SELECT 1 FROM {self._reclaim} r WHERE r.location = w.location)',
        new='return f"""0 = 1',
        tests=(f"{_OF_TRIGGERS}::TestGuard::test_a_newer_intent_of_what_is_being_deleted",),
    ),
    Mutant(
        name="sqlite-trigger-lets-the-unknown-in",
        rule="A location that nothing vouches for is refused.",
        path=_TRIGGERS,
        old='OR NOT ({" OR ".join(evidence)})"""',
        new='OR 0 = 1"""',
        tests=(f"{_OF_TRIGGERS}::TestGuard::test_an_object_that_is_unknown",),
    ),
    Mutant(
        name="sqlite-trigger-rows-vouch-for-themselves",
        rule="A guard runs before its row is written.",
        path=_TRIGGERS,
        old='"guardinsert": ("BEFORE INSERT"',
        new='"guardinsert": ("AFTER INSERT"',
        tests=(f"{_OF_TRIGGERS}::TestGuard::test_an_object_that_is_unknown",),
    ),
    Mutant(
        name="sqlite-trigger-updated-rows-vouch-for-themselves",
        rule="A guard runs before its row is written.",
        path=_TRIGGERS,
        old='"guardupdate": (f"BEFORE UPDATE {of_column}"',
        new='"guardupdate": (f"AFTER UPDATE {of_column}"',
        tests=(f"{_OF_TRIGGERS}::TestGuard::test_an_object_that_is_unknown",),
    ),
    Mutant(
        name="sqlite-trigger-variant-of-another-original",
        rule="A variant is in the rows of one original, where a worker looks for it.",
        path=_TRIGGERS,
        old="OR EXISTS ({intents} AND i.source IS NOT {source})",
        new="OR 0 = 1",
        tests=(f"{EACH}::TestVariants::test_that_are_not_those_of_the_original[sqlite-journal]",),
    ),
    Mutant(
        name="sqlite-trigger-nominates-twice",
        rule="An object has one intent to delete it.",
        path=_TRIGGERS,
        old='return f"coalesce((SELECT i.id FROM {self._intent} i WHERE {is_same}), {new})"',
        new="return new",
        tests=(f"{_OF_TRIGGERS}::test_what_is_nominated_twice[ABORT]",),
    ),
    Mutant(
        name="sqlite-trigger-keeps-the-first-due-time",
        rule="The latest due time of an object counts.",
        path=_TRIGGERS,
        old="ON CONFLICT (id) DO UPDATE SET due = max(due, excluded.due)",
        new="ON CONFLICT (id) DO NOTHING",
        tests=(f"{_OF_TRIGGERS}::test_what_is_nominated_twice[ABORT]",),
    ),
    Mutant(
        name="sqlite-trigger-forgets-retentions",
        rule="What a statement takes out of rows waits for the retention of its policy.",
        path=_TRIGGERS,
        old='"CASE WHEN CAST(m.value AS REAL) > 0 THEN strftime(',
        new='"CASE WHEN false THEN strftime(',
        tests=(f"{_OF_TRIGGERS}::TestRetention::test_of_its_policy_or_the_longest",),
    ),
    Mutant(
        name="sqlite-trigger-overlooks-variants",
        rule="The variants of what is deleted go with it.",
        path=_TRIGGERS,
        old="GLOB '*variants*' OR",
        new="GLOB '*none*' OR",
        tests=(f"{_OF_TRIGGERS}::TestVariants::test_they_have_their_original_as_their_source[DELETE FROM doc]",),  # noqa: S608
    ),
    Mutant(
        name="sqlite-trigger-misses-unique-indexes",
        rule="What REPLACE pushes out by any unique index is nominated.",
        path=_TRIGGERS,
        old="        if parts and all(row[2] is not None for row in parts):",
        new="        if False:",
        tests=(f"{_OF_TRIGGERS}::test_what_a_statement_takes_out_of_rows[REPLACE INTO doc (code) VALUES ('b')-False]",),  # noqa: S608
    ),
    Mutant(
        name="sqlite-trigger-misses-collations",
        rule="A unique index compares as its collation does.",
        path=_TRIGGERS,
        old='{value(name, default)} COLLATE {collation}"',
        new='{value(name, default)} COLLATE BINARY"',
        tests=(f"{_OF_TRIGGERS}::test_what_a_statement_takes_out_of_rows[REPLACE INTO word VALUES ('WORD', NULL)-False]",),  # noqa: S608
    ),
    Mutant(
        name="sqlite-library-keeps-the-ids-of-triggers",
        rule="What the library nominates after a trigger has one intent, whose id it derives.",
        path="granite_storage/orm/journal/deletes.py",
        old='    if connection.dialect.name == "sqlite" and are_triggers_declared(intent.metadata):\n',
        new="    if False:\n",
        tests=(f"{EACH}::TestSessions::test_one_intent_for_one_object[sqlite-journal]",),
    ),
    Mutant(
        name="sqlite-uploads-not-claimed",
        rule="A flush notes its uploads for the guard, which cannot look into the sidecar.",
        path="granite_storage/orm/journal/intents.py",
        old="        elif self._has_sidecar:\n            self._pool.require_here(connection)\n",
        new="        elif False:\n            self._pool.require_here(connection)\n",
        tests=(f"{_OF_TRIGGERS}::TestSessions::test_its_uploads",),
    ),
    Mutant(
        name="sqlite-claims-are-committed",
        rule="What a flush notes for the guard is deleted in the same transaction.",
        path="granite_storage/orm/journal/intents.py",
        old="if locations and self._has_triggers and self._has_sidecar:",
        new="if False:",
        tests=(f"{_OF_TRIGGERS}::TestSessions::test_its_uploads",),
    ),
    Mutant(
        name="sqlite-claims-outlive-their-objects",
        rule="What a failed flush has noted vouches for nothing once a worker has fenced the object.",
        path=_SQLITE,
        old="                await main.execute(_TABLES.decision.delete())\n",
        new="                pass\n",
        tests=(f"{_OF_TRIGGERS}::TestSessions::test_what_it_notes_and_does_not_delete",),
    ),
    Mutant(
        name="sqlite-migrations-meet-triggers",
        rule="Before batch mode changes a table, all triggers that name it are dropped.",
        path="granite_storage/alembic/triggers.py",
        old="        *find_triggers_in_the_way(connection, changed),\n",
        new="",
        tests=("tests/alembic/test_triggers.py::test_on_sqlite",),
    ),
    Mutant(
        name="sqlite-trigger-takes-escaped-keys",
        rule="A ref in which a key is not found is refused.",
        path=_TRIGGERS,
        old="  WHERE k.key IN ({keys}) AND instr",
        new="  WHERE k.key IN ({keys}) AND 0 AND instr",
        tests=(f"{EACH}::TestGuard::test_a_key_that_is_spelled_with_escapes[sqlite-journal]",),
    ),
    Mutant(
        name="sqlite-trigger-of-written-columns-only",
        rule="A generated key changes with other columns than its own.",
        path=_TRIGGERS,
        old='of_columns = "" if any(key.is_generated for key in self._keys) else ',
        new="of_columns = ",
        tests=(f"{_TAKEN_OUT}[UPDATE OR REPLACE slot SET number = 1 WHERE id = 2-False]",),  # noqa: S608
    ),
    Mutant(
        name="sqlite-trigger-without-defaults",
        rule="Where REPLACE finds NULL it takes the default, which may push a row out.",
        path=_TRIGGERS,
        old="coalesce({new}.{name}, {default})",
        new="{new}.{name}",
        tests=(f"{_TAKEN_OUT}[REPLACE INTO slot (code) VALUES (NULL)-False]",),  # noqa: S608
    ),
]
