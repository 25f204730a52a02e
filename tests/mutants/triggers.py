"""Mutants of the triggers: what they record of the rows that lose a ref, and what they lock before they let one in."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_SQL = "granite_storage/orm/journal/_postgresql_triggers.py"
_TESTS = "tests/orm/journal/test_storage_triggers.py"
_LOST = "test_rows_that_lose_their_ref_before_their_guard_has_seen_them"
EACH = "tests/orm/journal/test_triggers_of_each_database.py"
"""The tests that are the same on every database."""

MUTANTS = [
    Mutant(
        name="trigger-truncate-is-evidence",
        rule="What a TRUNCATE sees in an old snapshot says nothing of an object.",
        path=_SQL,
        old="    PERFORM set_config('{_TRUNCATED}', 'on', true);\n",
        new="    NULL;\n",
        tests=(f"{_TESTS}::test_what_a_truncate_sees_may_be_gone[asyncpg-SERIALIZABLE-False]",),
    ),
    Mutant(
        name="trigger-looks-past-a-truncate",
        rule="Tables that several statements look into are locked against TRUNCATE before their snapshot is made.",
        path="granite_storage/orm/journal/references.py",
        old="        return sorted(known[name] for name in names & known.keys())",
        new="        return sorted(known[name] for name in names - names)",
        tests=(f"{_TESTS}::test_a_truncate_between_two_statements_of_a_look[asyncpg]",),
    ),
    Mutant(
        name="trigger-savepoints-are-others",
        rule="A row that a savepoint of the transaction has just written does not vouch for itself.",
        path=_SQL,
        old="_MOST_SAVEPOINTS = (1 << 24) - 1",
        new="_MOST_SAVEPOINTS = 0",
        tests=(f"{_TESTS}::TestGuard::test_an_object_that_is_unknown[asyncpg-savepoint]",),
    ),
    Mutant(
        name="trigger-takes-columns-for-variables",
        rule="Columns of the application may be named like variables of the functions.",
        path=_SQL,
        old='_NAMES = "#variable_conflict use_variable"',
        new='_NAMES = "#variable_conflict error"',
        tests=(f"{_TESTS}::TestGuard::test_columns_that_are_named_like_variables[asyncpg]",),
    ),
    Mutant(
        name="trigger-doubts-nothing",
        rule="What a row loses before its guard has seen it is no evidence for it.",
        path=_SQL,
        old="""  IF current_setting('{_DOUBTED}', true) <> '' THEN""",
        new="  IF false THEN",
        tests=(f"{_TESTS}::TestGuard::{_LOST}[asyncpg-row]",),
    ),
    Mutant(
        name="trigger-doubts-no-update",
        rule="What an UPDATE takes out of a row before its guard has seen it is no evidence for it.",
        path=_SQL,
        old="""    IF ({_is_own("OLD")}) THEN""",
        new="    IF false THEN",
        tests=(f"{_TESTS}::TestGuard::{_LOST}[asyncpg-column]",),
    ),
    Mutant(
        name="trigger-trusts-rows-written-again",
        rule="A row that holds its ref again was written again, and is not as it was inserted.",
        path=_SQL,
        old="AND (w.written < ({nominated})) IS NOT TRUE;",
        new="AND w.written IS NULL;",
        tests=(f"{_TESTS}::TestGuard::{_LOST}[asyncpg-same-row]",),
    ),
    Mutant(
        name="trigger-doubts-rows-that-are-there",
        rule="What other rows have lost is evidence for a row that is there as it was inserted.",
        path=_SQL,
        old="AND (w.written < ({nominated})) IS NOT TRUE;",
        new="AND true;",
        tests=(f"{_TESTS}::TestGuard::test_rows_that_a_trigger_of_the_application_replaces[asyncpg-delete]",),
    ),
    Mutant(
        name="trigger-misses-rows-with-other-keys",
        rule="A guard that does not find all rows of its statement takes none that the transaction has written for evidence.",
        path=_SQL,
        old="CASE WHEN count(*) = (SELECT count(*) FROM changed) THEN",
        new="CASE WHEN true THEN",
        tests=(f"{_TESTS}::TestGuard::test_rows_whose_key_is_changed_before_their_guard_has_seen_them[asyncpg]",),
    ),
    Mutant(
        name="trigger-ids-at-random",
        rule="The id of a delete intent is a function of its backend and location, also where a trigger records it.",
        path=_SQL,
        old="""SELECT DISTINCT ON (1) {_id_of("h.digest")} AS id""",
        new="SELECT DISTINCT ON (1) gen_random_uuid() AS id",
        tests=(f"{EACH}::TestVariants::test_they_go_with_their_original[asyncpg]",),
    ),
    Mutant(
        name="trigger-locks-no-intent",
        rule="A write that brings a location in locks its pending intents.",
        path=_SQL,
        old=""") ORDER BY i.id FOR UPDATE""",
        new=""") ORDER BY i.id""",
        tests=(f"{_TESTS}::TestGuard::test_an_undo[asyncpg]",),
    ),
    Mutant(
        name="trigger-locks-no-holder",
        rule="A write that copies a location locks the row that holds it.",
        path=_SQL,
        old="LIMIT 1 FOR SHARE;",
        new="LIMIT 1;",
        tests=(f"{_TESTS}::TestGuard::test_the_source_of_a_copy_waits[asyncpg]",),
    ),
    Mutant(
        name="trigger-does-not-ask-what-is-fenced",
        rule="After the lock is held, a location that is fenced is refused.",
        path=_SQL,
        old="""  IF FOUND THEN
    {self._refusal("gone")}""",
        new="""  IF false THEN
    {self._refusal("gone")}""",
        tests=(f"{_TESTS}::TestGuard::test_a_newer_intent_of_what_is_being_deleted[asyncpg]",),
    ),
    Mutant(
        name="trigger-fence-beside-evidence",
        rule="A worker fences no intent of an object while a transaction has locked another one.",
        path="granite_storage/orm/journal/recovery.py",
        old="            if rows and self._have_guards:",
        new="            if False:",
        tests=(f"{_TESTS}::TestUploadsThatStayPending::test_an_older_snapshot_of_it[asyncpg]",),
    ),
    Mutant(
        name="trigger-undecided-uploads-beside",
        rule="A worker fences nothing about an object whose upload a transaction in progress has decided for.",
        path="granite_storage/orm/journal/recovery.py",
        old="return [row for row in rows if row.id not in taken and row.location not in in_progress]",
        new="return [row for row in rows if row.id not in taken and (row.kind != UPLOAD or row.location not in in_progress)]",
        tests=(f"{_TESTS}::TestUploadsThatStayPending::test_while_another_one_decides[asyncpg]",),
    ),
    Mutant(
        name="adopted-though-gone",
        rule="An intent of `adopt` is committed once it is known that the object exists, and no worker can delete it.",
        path="granite_storage/orm/journal/intents.py",
        old="            await still_there()\n",
        new="",
        tests=("tests/orm/journal/test_overtaken_workers.py::test_an_adoption_of_what_is_gone",),
    ),
    Mutant(
        name="adopted-beside-a-rollback",
        rule="`adopt` locks the uploads of its objects, whatever their leases.",
        path="granite_storage/orm/journal/intents.py",
        old="            await connection.execute(uploads.values(due=greatest(intent.c.due, end)))\n",
        new="            await connection.execute(uploads.where(intent.c.due < end).values(due=greatest(intent.c.due, end)))\n",
        tests=("tests/orm/journal/test_adoption.py::test_an_upload_whose_transaction_is_rolled_back[asyncpg]",),
    ),
    Mutant(
        name="fence-of-another-takeover",
        rule="A worker knows its own fences by the moment until which it has taken them over, not by their counts alone.",
        path="granite_storage/orm/journal/recovery.py",
        old='& (reclaim.c.due == bindparam("own_due", type_=reclaim.c.due.type))',
        new='& (reclaim.c.due.is_not(None) | (reclaim.c.due == bindparam("own_due", type_=reclaim.c.due.type)))',
        tests=(
            "tests/orm/journal/test_overtaken_workers.py::test_a_fence_that_waits_for_a_guard",
            "tests/orm/journal/test_overtaken_workers.py::test_a_later_fence_of_the_same_object",
        ),
    ),
    Mutant(
        name="adopted-beside-a-worker",
        rule="An object that a worker is deleting cannot be adopted.",
        path="granite_storage/orm/journal/intents.py",
        old="if (location := fenced.first()) is not None:",
        new="if (location := fenced.first()) is not None and not location:",
        tests=("tests/orm/journal/test_adoption.py::test_what_a_worker_is_deleting[asyncpg-_check]",),
    ),
    Mutant(
        name="older-worker-is-forgotten",
        rule="A worker notes the beat of an older version before it overwrites it, so that triggers are not created beside that.",
        path="granite_storage/orm/journal/database.py",
        old="""await put_values(connection, tables, {f"{_WORKER}{_WITHOUT_VERSION}": last.value}, last.changed)""",
        new="pass",
        tests=(
            "tests/orm/journal/test_rollout.py::TestBeats::test_an_older_one_is_noted_before_its_beat_is_overwritten[asyncpg-newer]",
        ),
    ),
    Mutant(
        name="renamed-table-loses-jobs",
        rule="While a table of the models cannot be found, no job is taken for one whose row is gone.",
        path="granite_storage/orm/journal/references.py",
        old="        if missing := _describe_missing(catalogue, wanted):",
        new="        if missing := None:",
        tests=("tests/orm/journal/test_renamed.py::test_no_job_is_lost[asyncpg-the table doc]",),
    ),
    Mutant(
        name="trigger-rows-vouch-for-themselves",
        rule="A row that no guard has seen yet is no evidence, neither for itself nor for others of its statement.",
        path=_SQL,
        old="    before := (\n",
        new="    before := NULL; PERFORM (\n",
        tests=(f"{_TESTS}::TestGuard::test_an_object_that_is_unknown[asyncpg-plain]",),
    ),
    Mutant(
        name="trigger-rows-of-a-running-insert-vouch",
        rule="While a statement inserts, what the transaction has written itself is no evidence for what it updates.",
        path=_SQL,
        old="""before bigint := CASE WHEN {_counted("0")} > 0 THEN 0 END;""",
        new="before bigint := NULL;",
        tests=(f"{_TESTS}::TestGuard::test_rows_that_are_changed_again_before_their_guard_has_seen_them[asyncpg]",),
    ),
    Mutant(
        name="trigger-variant-of-another-original",
        rule="A variant is in the rows of one original, where a worker looks for it.",
        path=_SQL,
        old="bool_and(s.source IS NOT DISTINCT FROM original)",
        new="bool_and(true)",
        tests=(f"{EACH}::TestVariants::test_that_are_not_those_of_the_original[asyncpg]",),
    ),
    Mutant(
        name="trigger-with-the-rights-of-the-writer",
        rule="A role without rights on the journal writes rows, and the triggers record it.",
        path=_SQL,
        old="LANGUAGE plpgsql SECURITY DEFINER SET",
        new="LANGUAGE plpgsql SET",
        tests=(f"{_TESTS}::TestSessions::test_a_role_without_rights_on_the_journal[asyncpg]",),
    ),
    Mutant(
        name="trigger-uploads-not-claimed",
        rule="A session whose snapshot does not see its uploads decides on them before it writes their rows.",
        path="granite_storage/orm/journal/intents.py",
        old="""if self._pool.is_postgresql:
            self._claim_unseen(connection, ids)""",
        new="""if self._pool.is_postgresql:
            return""",
        tests=(f"{_TESTS}::TestSessions::test_an_older_snapshot[asyncpg-REPEATABLE READ]",),
    ),
    Mutant(
        name="deriver-consumes-before-it-writes",
        rule="The intents of variants are consumed after their rows are written, whose triggers look for them.",
        path="granite_storage/orm/journal/variant_jobs.py",
        old="""                if chosen:
                    await connection.run_sync(intents.claim, stored, locations)
                displaced""",
        new="""                if chosen:
                    await connection.run_sync(intents.consume, stored)
                displaced""",
        tests=(f"{EACH}::TestSessions::test_variants_that_a_worker_makes[asyncpg]",),
    ),
]
