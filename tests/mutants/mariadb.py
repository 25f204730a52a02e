"""Mutants of the triggers of MariaDB, and of what sessions and workers do beside them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant
from tests.mutants.triggers import EACH

_SQL = "granite_storage/orm/journal/_mariadb_triggers.py"
_INTENTS = "granite_storage/orm/journal/intents.py"
_TRANSACTIONS = "granite_storage/orm/transactions.py"
_TESTS = "tests/orm/journal/test_mariadb_triggers.py"

MUTANTS = [
    Mutant(
        name="mariadb-locked-jobs-wait-for-the-next-look",
        rule="A due job that another statement has locked only to look at it is taken over all the same.",
        path="granite_storage/orm/journal/jobs.py",
        old="if not pool.is_mariadb:",
        new="if pool.dialect:",
        tests=("tests/orm/journal/test_derived_jobs.py::TestMade::test_locked_by_who_only_looks",),
    ),
    Mutant(
        name="mariadb-trigger-other-ids",
        rule="The id of a delete intent is a function of its backend and location, also where a trigger records it.",
        path=_SQL,
        old=", 32), 13, 1, '5')",
        new=", 32), 13, 1, '4')",
        tests=(f"{EACH}::TestSessions::test_one_intent_for_one_object[mariadb]",),
    ),
    Mutant(
        name="mariadb-trigger-locks-no-intent",
        rule="A write that brings a location in locks its pending intents.",
        path=_SQL,
        old="WHERE i.id = g_row.id FOR UPDATE;",
        new="WHERE i.id = g_row.id;",
        tests=(f"{_TESTS}::TestGuard::test_an_undo[READ COMMITTED]",),
    ),
    Mutant(
        name="mariadb-trigger-locks-one-intent",
        rule="The intent of an upload is locked as well as that of the delete.",
        path=_SQL,
        old="{is_of_it} AND i.kind <> {literal(STAGING)}",
        new="{is_of_it} AND i.kind = {literal(DELETE)}",
        tests=(f"{_TESTS}::TestGuard::test_every_intent_of_the_object_is_locked",),
    ),
    Mutant(
        name="mariadb-trigger-an-upload-vouches",
        rule="The intent of an upload alone is no evidence, because a later intent to delete would not be locked.",
        path=_SQL,
        old="-1, i.kind = {literal(DELETE)})",
        new="-1, 1)",
        tests=(f"{_TESTS}::TestGuard::test_every_intent_of_the_object_is_locked",),
    ),
    Mutant(
        name="mariadb-trigger-ignores-blanks",
        rule="A location with a blank more at its end is that of another object.",
        path=_SQL,
        old="USING utf8mb4) COLLATE utf8mb4_nopad_bin",
        new="USING utf8mb4) COLLATE utf8mb4_bin",
        tests=(f"{EACH}::TestGuard::test_a_location_that_has_a_blank_more[mariadb]",),
    ),
    Mutant(
        name="mariadb-trigger-misses-escaped-keys",
        rule="Variants are guarded however their key is spelled.",
        path=_SQL,
        old="JSON_EXTRACT(JSON_QUERY({ref}, '$.variants'), '$.*')",
        new="JSON_EXTRACT({ref}, '$.variants.*')",
        tests=(f"{EACH}::TestGuard::test_a_key_that_is_spelled_with_escapes[mariadb]",),
    ),
    Mutant(
        name="mariadb-trigger-due-of-another-journal",
        rule="When objects of a policy are due is known for one journal only.",
        path=_SQL,
        old="{literal(self._meta)}, UTC_TIMESTAMP(6)",
        new="UTC_TIMESTAMP(6)",
        tests=(f"{_TESTS}::TestRetention::test_of_its_own_journal",),
    ),
    Mutant(
        name="mariadb-trigger-locks-no-holder",
        rule="A write that copies a location locks the row that holds it.",
        path=_SQL,
        old="{is_found} AND {holds} LOCK IN SHARE MODE;",
        new="{is_found} AND {holds};",
        tests=(f"{_TESTS}::TestGuard::test_the_source_of_a_copy_waits[READ COMMITTED]",),
    ),
    Mutant(
        name="mariadb-trigger-does-not-ask-what-is-fenced",
        rule="After the intents are locked, a location that is fenced is refused.",
        path=_SQL,
        old="r.location = {_LOCATION} LOCK IN SHARE MODE;",
        new="0 = 1;",
        tests=(f"{_TESTS}::TestGuard::test_a_newer_intent_of_what_is_being_deleted[READ COMMITTED]",),
    ),
    Mutant(
        name="mariadb-trigger-sees-the-snapshot",
        rule="Whether a location is fenced is seen in the newest state, whatever the snapshot of the transaction shows.",
        path=_SQL,
        old="r.location = {_LOCATION} LOCK IN SHARE MODE;",
        new="r.location = {_LOCATION};",
        tests=(f"{_TESTS}::TestGuard::test_a_newer_intent_of_what_is_being_deleted[REPEATABLE READ]",),
    ),
    Mutant(
        name="mariadb-trigger-locks-gaps",
        rule="A copy of what a row holds locks no gap, beside which no other row could be inserted.",
        path=_SQL,
        old="WHERE {indexed} AND {holds}{another} LIMIT 1;",
        new="WHERE {indexed} AND {holds}{another} LIMIT 1 LOCK IN SHARE MODE;",
        tests=(f"{_TESTS}::TestGuard::test_what_holds_up_nobody",),
    ),
    Mutant(
        name="mariadb-trigger-rows-vouch-for-themselves",
        rule="A row is no evidence for what it has brought in itself.",
        path=_SQL,
        old="""another = f" AND NOT ({is_own})" if place == self._place else \"\"""",
        new="""another = \"\"""",
        tests=(f"{_TESTS}::TestGuard::test_an_object_that_is_unknown[READ COMMITTED]",),
    ),
    Mutant(
        name="mariadb-trigger-after-others",
        rule="Triggers of the application run after the guard, and cannot copy what was not guarded.",
        path=_SQL,
        old="""first = f"PRECEDES {_quoted(others[0])} " if others else \"\"""",
        new="""first = \"\"""",
        tests=(f"{_TESTS}::TestGuard::test_rows_that_a_trigger_of_the_application_writes_do_not_vouch",),
    ),
    Mutant(
        name="mariadb-trigger-variant-of-another-original",
        rule="A variant is in the rows of one original, where a worker looks for it.",
        path=_SQL,
        old='IF(NOT {_exactly("i.source")} <=> {_ORIGINAL}, -1, i',
        new="IF(NOT 1 <=> 1, -1, i",
        tests=(f"{EACH}::TestVariants::test_that_are_not_those_of_the_original[mariadb]",),
    ),
    Mutant(
        name="mariadb-trigger-cascades-by-the-snapshot",
        rule="A cascade deletes rows that the snapshot does not show, so the trigger reads the newest.",
        path=_SQL,
        old="WHERE {criteria} LOCK IN SHARE MODE",
        new="WHERE {criteria}",
        tests=(f"{_TESTS}::test_a_cascade_reaches_rows_that_the_snapshot_does_not_show[REPEATABLE READ]",),
    ),
    Mutant(
        name="mariadb-trigger-cascades-at-the-first-level",
        rule="Rows that a table deletes of its own are followed down to any depth.",
        path=_SQL,
        old="{' UNION '.join([first, *further])}",
        new="{' UNION '.join([first])}",
        tests=(f"{_TESTS}::TestCascades::test_at_any_depth[DELETE FROM node LIMIT 1-left2]",),  # noqa: S608  # an id
    ),
    Mutant(
        name="mariadb-flush-claims-nothing",
        rule="A session names the uploads that it writes, whose intents its snapshot does not show.",
        path=_INTENTS,
        old="""listed = "".join(f"\\n{item}\\n" for item in locations)""",
        new="""listed = \"\"""",
        tests=(f"{_TESTS}::TestSessions::test_two_uploads_of_one_transaction[REPEATABLE READ]",),
    ),
    Mutant(
        name="mariadb-claims-outlive-a-rollback",
        rule="What a flush has claimed is forgotten when it fails, though a variable survives ROLLBACK.",
        path=_TRANSACTIONS,
        old="""def _on_rollback(connection: Connection, *_: Any) -> None:
    _forget_claims(connection)
""",
        new="""def _on_rollback(connection: Connection, *_: Any) -> None:
""",
        tests=(f"{_TESTS}::TestSessions::test_what_it_has_claimed_ends_with_its_statements[fails]",),
    ),
    Mutant(
        name="mariadb-claims-outlive-a-savepoint",
        rule="What a flush in a savepoint has claimed is forgotten with it.",
        path=_TRANSACTIONS,
        old="""    _forget_claims(connection)
    found = _watches.get(connection)
    if found is None or not found.joined:
""",
        new="""    found = _watches.get(connection)
    if found is None or not found.joined:
""",
        tests=(f"{_TESTS}::TestSessions::test_what_it_has_claimed_ends_with_its_statements[fails in a savepoint]",),
    ),
    Mutant(
        name="mariadb-claims-reach-the-next-user",
        rule="A connection goes back to its pool without claims.",
        path=_TRANSACTIONS,
        old="    _forget_claims_at_last(driver_connection, record)\n    found",
        new="    found",
        tests=(f"{_TESTS}::TestSessions::test_what_a_broken_flush_has_claimed_does_not_reach_the_next_user",),
    ),
    Mutant(
        name="mariadb-moves-leave-intents",
        rule="A session drops what its own triggers have recorded of the objects that it has moved.",
        path=_INTENTS,
        old="            # One by one, and only those that are there: a list, or what is not there, may lock other rows.\n",
        new="            return\n",
        tests=(f"{EACH}::TestSessions::test_what_it_moves_leaves_nothing_behind[mariadb]",),
    ),
    Mutant(
        name="mariadb-worker-waits-for-undos",
        rule="A worker leaves to its next pass what it cannot fence soon, because others need the intents that it has locked.",
        path="granite_storage/orm/journal/recovery.py",
        old="if self._pool.is_mariadb and triggers_work(self._pool.dialect, self._tables.intent.metadata):",
        new="if self._pool.is_postgresql and not rows:",
        tests=(f"{_TESTS}::TestGuard::test_an_undo_holds_up_workers_and_they_go_on_later",),
    ),
]
