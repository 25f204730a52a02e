"""Mutants of the journal on SQLite: what is looked at with which lock, what is durable when, and which sidecar counts."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_SQLITE = "granite_storage/orm/journal/sqlite.py"
_TESTS = "tests/orm/journal/test_sqlite.py"

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
]
