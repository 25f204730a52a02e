"""The tiers: what `nox -s tests` runs, what runs after it because it has time bounds, and what only `nox -s exhaustive` runs.

The default tier runs each rule of the library once, on the database, the backend and the seed that most likely show a fault. The
exhaustive tier runs everything: every matrix, random seeds, long histories. A case leaves the default tier in one of two ways,
each with its reason: a rule of `REPETITIONS` below, or the marker `exhaustive("reason")` on the test or on one of its parameters.
`pytest --exhaustive` runs both tiers.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["choose", "configure", "is_exhaustive", "may_be_passed_over", "narrow", "repetitions", "report_header", "seed"]

_TIER = "GRANITE_EXHAUSTIVE"
_SEED = "GRANITE_SEED"
_FIXED_SEED = 20_261_128

ON_EVERY_DATABASE: dict[str, tuple[str, ...]] = {
    "tests/gc/test_random_receipts.py": ("",),
    "tests/gc/test_schemas_of_tenants.py": ("test_a_copy_in_a_schema_without_a_table_of_a_model",),
    "tests/verification/test_schemas_of_tenants.py": (
        "TestVerification::test_a_lost_file_of_a_tenant",
        "TestMigration::test_every_tenant_is_moved",
        "TestDerivation::test_every_tenant_gets_its_variants",
    ),
    "tests/orm/test_scenarios.py": (
        "TestFailedUploads",
        "TestRelations",
        "TestRollback",
        "TestSavepoints",
        "TestTwoPhases",
        "TestWhatTheSessionDoesNotKnow",
        "TestJoinedToAnExternalTransaction::test_several_transactions_of_one_connection",
        "TestOneRow::test_primary_key_and_file_changed_together",
        "TestOneRow::test_two_rows_of_the_same_key_after_a_delete",
    ),
    "tests/orm/test_bulk.py": ("TestDelete", "TestRefusals::test_upsert[", "TestUpdate"),
    "tests/orm/test_concurrency.py": ("",),
    "tests/orm/test_concurrent_commits.py": ("",),
    "tests/orm/test_concurrent_writers.py": ("",),
    "tests/orm/test_disconnects_and_signals.py": ("",),
    "tests/orm/test_interrupted_commits.py": ("",),
    "tests/orm/test_other_loops.py": ("",),
    "tests/orm/test_random_cascades.py": ("",),
    "tests/orm/test_random_derivers.py": ("",),
    "tests/orm/test_shared_objects.py": ("TestDatabases::test_object_that", "TestSchemas", "TestSnapshots"),
    "tests/orm/test_shared_variants.py": ("test_a_variant_stays", "test_rows_with", "test_shared_after"),
    "tests/orm/test_triggers.py": ("",),
    "tests/orm/test_unknown_commit.py": ("",),
    "tests/orm/journal/test_cancelled_flushes.py": ("",),
    "tests/orm/journal/test_database_faults.py": ("",),
    "tests/orm/journal/test_table_faults.py": ("",),
    "tests/orm/journal/test_table_faults_of_triggers.py": ("",),
    "tests/orm/journal/test_triggers_of_each_database.py": ("",),
    "tests/orm/journal/test_effects.py": (
        "TestMoves::test_while_it_is_put",
        "TestFailures::test_a_change",
        "TestRows::test_comes",
    ),
    "tests/orm/journal/test_derived_jobs.py": ("TestRows",),
    "tests/orm/journal/test_recovery.py": ("TestReports", "TestWorker"),
    "tests/orm/journal/test_refusals.py": ("",),
    "tests/orm/journal/test_shared_objects.py": ("TestElsewhere",),
    "tests/orm/journal/test_simpler_protocols.py": ("",),
}
"""Tests that reach what differs between databases: locks, savepoints, cascades, bulk statements, two phases, conflicts.

By file, the beginnings of the tests' names in it; an empty one stands for all of them.
"""


@dataclass(frozen=True)
class Repetition:
    """Cases that repeat others.

    Attributes:
        path: The beginning of the paths of their files.
        reason: Why they find nothing that the default tier does not find, as a rule.
        repeats: Tells whether a case is one of them, by its item and its parameters.
    """

    path: str
    reason: str
    repeats: Callable[[pytest.Item, dict[str, Any]], bool]


def _in_class(
    *names: str, apart_from: Collection[str] = (), only: Collection[str] | None = None
) -> Callable[[pytest.Item, dict[str, Any]], bool]:
    def repeats(item: pytest.Item, _: dict[str, Any]) -> bool:
        owner, name = getattr(item, "cls", None), getattr(item, "originalname", item.name)
        if owner is None or owner.__name__ not in names:
            return False
        return name not in apart_from and (only is None or name in only)

    return repeats


def _with(name: str, *values: str) -> Callable[[pytest.Item, dict[str, Any]], bool]:
    return lambda _, params: params.get(name) in values


def _of(
    function: str, *, unless: Callable[[dict[str, Any]], bool] = lambda _: False
) -> Callable[[pytest.Item, dict[str, Any]], bool]:
    """Choose the cases of one test, but for those whose parameters stay."""
    return lambda item, params: getattr(item, "originalname", item.name) == function and not unless(params)


_SURROUNDINGS = frozenset({"backend", "database", "env", "servers"})


def _all_but_every(
    number: int, *functions: str, only: Callable[[dict[str, Any]], bool] = lambda _: True
) -> Callable[[pytest.Item, dict[str, Any]], bool]:
    """Choose most cases of matrices: one of so many stays, along the diagonals, so that each has some of every value.

    Args:
        number: One of how many stays.
        *functions: The tests, `TestClass::test_name` or `test_name`; a beginning stands for all that begin so.
        only: Which of their cases are meant, by their parameters.
    """
    return lambda item, params: (
        _name_of(item).startswith(functions or "") and only(params) and bool(_place_in_matrix(item) % number)
    )


def _place_in_matrix(item: pytest.Item) -> int:
    """Return the number of a case in the matrix of its test, whatever it runs on and whichever others are chosen."""
    params, place = _params(item), 0
    for mark in item.iter_markers("parametrize"):
        names, sets = (*mark.args, *mark.kwargs.values())[:2]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        if not _SURROUNDINGS.isdisjoint(names):
            continue
        for number, given in enumerate(sets):
            values = getattr(given, "values", (given,) if len(names) == 1 else given)
            values = (given,) if callable(values) else values
            if all(params.get(name) is value for name, value in zip(names, values, strict=True)):
                place += number
                break
    return place


_ENDS = (
    "TestFailedUploads",
    "TestJoinedToAnExternalTransaction::test_several_transactions_of_one_connection",
    "TestOneRow::test_primary_key_and_file_changed_together",
    "TestOneRow::test_two_rows_of_the_same_key_after_a_delete",
    "TestRollback",
    "TestTwoPhases",
)


def _repeats_sessions(item: pytest.Item, params: dict[str, Any]) -> bool:
    """Tell whether a case with synchronous sessions repeats others."""
    if "env" not in params:
        return False
    if item.function.__module__ != "tests.orm.test_scenarios":  # type: ignore[attr-defined]
        return True
    match params["database"], params["env"]:
        case "sqlite-begin", "plain":
            return _place_in_matrix(item) > 0
        case "psycopg", "journaled":
            return _place_in_matrix(item) > 0 or not _name_of(item).startswith(_ENDS)
        case "sqlite-journal", "journaled":
            return _place_in_matrix(item) > 0 or not _name_of(item).startswith(("TestFailedUploads", "TestRollback"))
    return True


_DECIDED_BY_THE_DIALECT = ("TestRefusals::test_upsert[", "TestSnapshots::test_commit_that_sqlalchemy_does_not_see")
"""What each dialect has a statement of its own for, or a driver of its own way."""


def _runs_on_sqlite(item: pytest.Item) -> bool:
    """Tell whether a test runs on every database, or at least on SQLite with BEGIN."""
    fixtures = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    params = getattr(next(iter(reversed(fixtures.get("database", ()))), None), "params", None)
    marked = [mark for mark in item.iter_markers("parametrize") if "database" in mark.args[0]]
    return not marked and "sqlite-begin" in (params or ())


def _name_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[2]


PREFIXED_AT_SERVICE = (
    "test_aborted_upload",
    "test_batch",
    "test_copy",
    "test_more_than_one_page",
    "test_odd_location",
    "test_prefix",
    "test_round_trip",
    "test_signed_get",
    "test_signed_upload",
    "test_start_after",
)
"""What of the suite runs on S3 with a prefix of the backend's own, too."""

INDEPENDENT_OF_SERVICE = (
    "test_chunks_as_large_as_they_come",
    "test_chunks_of_odd_sizes",
    "test_closed_reader",
    "test_declared_ability",
    "test_errors_are_of_the_family",
    "test_event_loops_in_threads",
    "test_hostile_location",
    "test_impossible_range",
    "test_late_write_after_a_delete",
    "test_over_the_limit",
    "test_page_sizes",
    "test_read_sizes",
    "test_result_joins_the_ref",
    "test_source_raises",
    "test_through_a_manager",
    "test_undeclared_option",
    "test_wrong_declaration",
)
"""What of the suite asks nothing of the service that obstore talks to."""

OF_THE_BACKENDS_CODE = (
    "test_abandoned_listing",
    "test_abandoned_readers",
    "test_another_process_knows_the_store",
    "test_bounded_memory",
    "test_cancelled_copy",
    "test_cancelled_delete",
    "test_cancelled_listing",
    "test_cancelled_second_write",
    "test_concurrent_deletes",
    "test_concurrent_ranges",
    "test_delete_while_listing",
    "test_deleted_while_open",
    "test_event_loops_one_after_the_other",
    "test_folders_come_and_go",
    "test_independent_readers",
    "test_interleaved_writers",
    "test_killed_after_a_write",
    "test_killed_writer",
    "test_listings_at_a_time",
    "test_many_readers",
    "test_many_writers",
    "test_race_for_one_location",
    "test_unfinished_write_is_invisible",
    "test_use_after_close",
)
"""What of the suite tries how the backend on obstore shares and abandons its work, over whichever store."""

REPETITIONS = [
    Repetition(
        "tests/derived/test_images.py",
        "libvips is asked for the same as Pillow, and every third case tells whether it understands",
        _all_but_every(3, only=lambda params: params.get("engine") == "vips"),
    ),
    Repetition(
        "tests/derived/test_images.py",
        "each orientation is turned by one line, in whichever format it is found",
        _all_but_every(3, "TestTurns::", only=lambda params: params.get("engine") == "pillow"),
    ),
    Repetition(
        "tests/orm/synchronous/test_scenarios.py",
        "the same hooks as for asynchronous sessions decide: the scenarios run on SQLite, and what differs between databases on"
        " PostgreSQL with a journal",
        _repeats_sessions,
    ),
    Repetition(
        "tests/backends/test_conformance.py",
        "a wrapper is one code path over any backend: the suite runs on it once, over memory",
        _in_class("TestLocalPrefixed", "TestLocalBehindFaults"),
    ),
    Repetition(
        "tests/backends/test_s3_conformance.py",
        "moto is more lenient than SeaweedFS, on which the same suite runs",
        _in_class("TestMoto", "TestMotoPrefixed"),
    ),
    Repetition(
        "tests/backends/test_s3_conformance.py",
        "only names, listings, copies and URLs know the prefix",
        _in_class("TestSeaweedFSPrefixed", apart_from=PREFIXED_AT_SERVICE),
    ),
    Repetition(
        "tests/backends/test_s3_conformance.py",
        "the odd names are tried without a prefix, which is put before each of them as before any other",
        _all_but_every(8, "TestSeaweedFSPrefixed::test_odd_location["),
    ),
    Repetition(
        "tests/backends/test_s3_conformance.py",
        "the first of the cases without a prefix, and another part of them, are enough to show that it is put before each name",
        _all_but_every(3, "TestSeaweedFSPrefixed::"),
    ),
    Repetition(
        "tests/backends/test_s3_conformance.py",
        "moments, sizes and verbs come together in every third case as well; the odd names stay",
        lambda item, params: _all_but_every(3, "TestSeaweedFS::")(item, params) and "test_odd_location[" not in item.nodeid,
    ),
    Repetition(
        "tests/backends/test_obstore_conformance.py",
        "obstore tells S3, a disk and memory apart below our code: each runs every case of some, and some cases of each",
        _all_but_every(3, "TestSeaweedFS::", "TestLocal::"),
    ),
    Repetition(
        "tests/backends/test_obstore_conformance.py",
        "our code decides it, over memory as over S3",
        _in_class("TestSeaweedFS", "TestLocal", only=OF_THE_BACKENDS_CODE),
    ),
    Repetition(
        "tests/backends/test_obstore_conformance.py",
        "the backend's own code decides it, and the suite runs on it over memory",
        _in_class("TestSeaweedFS", "TestLocal", only=INDEPENDENT_OF_SERVICE),
    ),
    Repetition(
        "tests/backends/",
        "Azurite takes minutes to install and to answer; the backend's own code is that of S3 and memory",
        lambda item, params: _in_class("TestAzurite")(item, params) or "azurite_server" in getattr(item, "fixturenames", ()),
    ),
    Repetition(
        "tests/backends/test_s3.py",
        "pages of 1 and of 2 names end at every place that pages of 3 end at; moto has no tree, so one size is enough there",
        _of(
            "test_folders_and_their_neighbours",
            unless=lambda params: params["page_size"] in ((1, 2, None) if params["fixture"] == "weed" else (None,)),
        ),
    ),
    Repetition(
        "tests/backends/test_conformance.py",
        "the wrappers know no sizes, verbs or moments",
        _all_but_every(3, "TestMemoryPrefixed::", "TestMemoryBehindFaults::"),
    ),
    Repetition(
        "tests/backends/test_obstore_conformance.py",
        "in memory nothing of obstore is slow or far away: every second value",
        _all_but_every(2, "TestMemory::"),
    ),
    Repetition(
        "tests/backends/test_s3",
        "each fault is tried with some of the requests that it may meet, and each request with some of the faults",
        lambda item, params: (
            "conformance" not in item.nodeid and "test_wrong_secret" not in item.nodeid and _all_but_every(2)(item, params)
        ),
    ),
    Repetition(
        "tests/backends/test_s3.py",
        "every request is signed in one place",
        _all_but_every(3, "TestErrors::test_wrong_secret["),
    ),
    Repetition(
        "tests/backends/test_model.py",
        "another order of the same calls",
        _all_but_every(2),
    ),
    Repetition(
        "tests/backends/",
        "one of three values comes to the same line",
        _all_but_every(
            3,
            "TestErrors::test_wrong_bucket",
            "TestWhatObstoreHolds::test_a_file_is_closed_when_its_call_is_over",
            "test_extra_parameters_go_with_every_write",
            "test_what_the_writer_of_parts_says_is_read_past_the_name",
        ),
    ),
    Repetition(
        "tests/faults/test_cancellation.py",
        "moments, verbs and backends come together in every third case as well",
        _all_but_every(3, "test_a_copy", "test_a_read[", "test_a_write"),
    ),
    Repetition(
        "tests/docs/test_conformance_example.py",
        "`tests/backends` runs every case with the same backend",
        _all_but_every(3),
    ),
    Repetition(
        "tests/docs/test_sqlite_backend.py",
        "the example is simple: what it does in one case of a matrix it does in the others",
        _all_but_every(3),
    ),
    Repetition(
        "tests/web/",
        "one of three combinations shows what the parameters decide by themselves",
        _all_but_every(
            3,
            "test_a_body_that_goes_wrong",
            "test_a_content_encoding_is_refused",
            "test_a_download",
            "test_a_form_whatever_the_sizes_of_its_pieces",
        ),
    ),
    Repetition(
        "tests/web/",
        "the first and every other hostile input take the longest way",
        _all_but_every(2, "test_a_hostile_form_does_not_hold_the_loop", "test_data_that_looks_like_boundaries_costs"),
    ),
    Repetition(
        "tests/web/test_connections.py",
        "a backend sees the same stream break off, whichever way the client leaves; memory is tried with each",
        _of("test_a_client_that_goes_away", unless=lambda params: params["backend"] == "memory" or params["leaving"] == "abort"),
    ),
    Repetition(
        "tests/web/test_connections.py",
        "how it leaves, how the size is told and what is in between come together in every second case as well",
        _all_but_every(2, "test_a_client_that_goes_away["),
    ),
    Repetition(
        "tests/orm/",
        "every value of a matrix is tried on SQLite with BEGIN: elsewhere each test keeps a third of its combinations",
        lambda item, params: (
            params.get("database") not in (None, "sqlite-begin")
            and (
                _runs_on_sqlite(item)
                or params["database"] == "mariadb"
                or item.nodeid.startswith("tests/orm/journal/test_scenarios.py")
            )
            and not _name_of(item).startswith(_DECIDED_BY_THE_DIALECT)
            and bool(_place_in_matrix(item) % 3)
        ),
    ),
    Repetition(
        "tests/orm/",
        "places and values come together in every third combination as well",
        _all_but_every(
            3,
            "TestBulkStatements::test_statement_replaced",
            "TestOtherTypes::test_clone_keeps_the_object",
            "TestSchemas",
            "TestSnapshots::test_row",
            "test_a_file_is_stored_again_after_a_rollback",
            "test_a_file_read_before_is_stored_whole",
            "test_autocommit",
            "test_put_stream_stores_an_upload_whole",
            "test_synchronous_session",
        ),
    ),
    Repetition(
        "tests/orm/test_shared_objects.py",
        "both ways end in one question to the copies; which types it can be put to, one way shows",
        lambda item, params: (
            _name_of(item).startswith("TestOtherTypes::test_clone_keeps_the_object")
            and params["way"].__name__ != "delete_one"
            and params["kind"] != "text"
        ),
    ),
    Repetition(
        "tests/orm/test_sources_given_twice.py",
        "what can be read once only is known by its type: every second one shows it",
        _all_but_every(2),
    ),
    Repetition(
        "tests/orm/test_disconnects_and_signals.py",
        "each stage with one number of interrupts",
        _all_but_every(2, "test_a_keyboard_interrupt"),
    ),
    Repetition(
        "tests/orm/test_random_sessions.py",
        "the same machine; how synchronous sessions end, their scenarios show",
        _with("machine", "synchronous"),
    ),
    Repetition(
        "tests/orm/synchronous/test_scenarios.py",
        "what is a value, a relation or unknown to the session is read by hooks that are the same for both kinds of sessions",
        _in_class("TestRelations", "TestValues", "TestWhatTheSessionDoesNotKnow"),
    ),
    Repetition(
        "tests/orm/variants/test_scenarios.py",
        "a variant goes where its original goes, which the scenarios without one show: those with savepoints, bulk statements and"
        " listeners that change what a flush does are tried with both",
        lambda item, _: (
            not _name_of(item).startswith(("TestOneRow", "TestSavepoints", "TestUpdate", "TestDelete", "test_random"))
        ),
    ),
    Repetition(
        "tests/orm/journal/test_simpler",
        "it shows that a scenario can fail, which a change of the scenarios alone would alter; the scenarios themselves are run",
        lambda item, _: _name_of(item).startswith("test_a_simpler_variant_breaks"),
    ),
    Repetition(
        "tests/orm/synchronous/",
        "the listeners meet hooks that are the same for both kinds of sessions",
        _of("test_random_listeners"),
    ),
    Repetition(
        "tests/orm/journal/test_direct_uploads.py",
        "the same machine in another order",
        _of("test_everything_at_random", unless=lambda params: params["seed"] == 0),
    ),
    Repetition(
        "tests/orm/journal/test_direct_uploads.py",
        "each step fails, before or after it was done",
        _all_but_every(2, "test_storage_fails_at_any_step"),
    ),
    Repetition(
        "tests/orm/test_values_postgres.py",
        "both drivers fetch from a cursor of the server, a thousand rows at a time",
        lambda item, _: _name_of(item) == "test_refs_are_streamed_from_the_server[psycopg]",
    ),
    Repetition(
        "tests/gc/test_utf16.py",
        "shapes and encodings come together in every third case as well",
        _all_but_every(3),
    ),
    Repetition(
        "tests/gc/test_races.py",
        "without the barrier it is another race with the same end",
        _of("test_a_delete_that_a_crash_of_the_database_takes_back", unless=lambda params: params["with_barrier"]),
    ),
    Repetition(
        "tests/faults/test_disk.py",
        "the calls are the same, but for those that bring to the disk",
        _all_but_every(2, "test_a_kill_before_any_system_call_leaves_all_or_nothing"),
    ),
    Repetition(
        "tests/testing/",
        "the fixtures and the messages are the same",
        _all_but_every(2, "test_a_missing_server_is_said", "test_fixtures"),
    ),
    Repetition(
        "tests/migration/test_migrate.py",
        "what is moved does not depend on the database; what the journal adds is seen where a run fails",
        lambda item, params: params.get("database") == "asyncpg" and not _name_of(item).startswith("TestFailures"),
    ),
    Repetition(
        "tests/alembic/test_paths.py",
        "an object that is gone is noticed where one that has changed is",
        _of("test_nothing_is_dropped_where_an_object_is_wrong", unless=lambda params: params["damage"] != "gone"),
    ),
    Repetition(
        "tests/gc/test_mentions.py",
        "the shapes of values are tried on PostgreSQL; how another database looks into a column, one of three shows",
        _all_but_every(3, only=lambda params: params.get("database") in ("sqlite-begin", "mariadb")),
    ),
    Repetition(
        "tests/gc/test_mentions.py",
        "a mention is found by its text: every second shape",
        _all_but_every(2, "test_json_of_which", "test_text"),
    ),
    Repetition(
        "tests/gc/",
        "which values are refused is decided before any database is asked",
        _all_but_every(
            3,
            "test_what_is_no_reference_stops_the_run",
            "test_a_reference_that_leads_out",
            only=lambda params: params.get("database") == "asyncpg",
        ),
    ),
    Repetition(
        "tests/verification/",
        "what is found does not depend on the database: on PostgreSQL the scan of the tables is tried",
        lambda item, params: (
            params.get("database") == "asyncpg"
            and not item.nodeid.startswith("tests/verification/test_schemas_of_tenants.py")
            and not _name_of(item).startswith(("TestScan", "TestFindings::test_a"))
        ),
    ),
    Repetition(
        "tests/migration/test_migrate.py",
        "the shortest time and one of the longer ones end a run before and in its writes",
        _of("test_cancelled_and_run_again", unless=lambda params: params["seconds"] in (0.001, 0.04)),
    ),
    Repetition(
        "tests/migration/test_live_traffic.py",
        "the same traffic as on PostgreSQL, where more of it goes on at a time",
        _with("database", "sqlite-begin"),
    ),
    Repetition(
        "tests/alembic/",
        "the same SQL as through the other driver of the database",
        _with("kind", "aiosqlite", "psycopg"),
    ),
    Repetition(
        "tests/alembic/test_conversions.py",
        "the batches and the crash are ours, on whichever database; what differs the conversion of blobs shows on each",
        _of("test_text_becomes_files_through_a_crash_and_comes_back", unless=lambda params: params["kind"] == "sqlite"),
    ),
    Repetition(
        "tests/applications/",
        "on MariaDB the program is the same",
        _with("kind", "mariadb"),
    ),
    Repetition(
        "tests/applications/test_gunicorn.py",
        "gunicorn's processes fork as those of test_programs.py do",
        lambda item, _: True,
    ),
    Repetition(
        "tests/applications/",
        "the program is the same: PostgreSQL is what such programs run on",
        lambda item, params: (
            params.get("kind") == "sqlite"
            and _name_of(item).startswith(("test_forks", "test_interrupt", "test_tasks", "test_uploads"))
        ),
    ),
    Repetition(
        "tests/gallery/test_command.py",
        "a gallery that moves to a bucket finds what is in its folder as well",
        _of("test_what_is_in_a_folder_is_there_again"),
    ),
    Repetition(
        "tests/mutants/test_runner.py",
        "an interrupt of the runner endangers no data, and its end is that of any of our runs",
        _of("test_an_interrupt_leaves_nothing_running"),
    ),
    Repetition(
        "tests/alembic/test_autogenerate.py",
        "in processes of its own the generic template runs as the asynchronous one does",
        _of("test_each_template_in_processes_of_their_own", unless=lambda params: params["template"] == "async"),
    ),
    Repetition(
        "tests/inspection/test_clamd.py",
        "sizes, addresses and moments come together in every third case as well",
        _all_but_every(3, "TestCancellation::test_at_every_await["),
    ),
    Repetition(
        "tests/gallery/test_command.py",
        "the other end, and the other services, are reached by the same way",
        lambda item, params: params.get("services") == "as it is" or params.get("end") == 2,
    ),
    Repetition(
        "tests/cli/test_commands.py",
        "PostgreSQL is tried with a journal, SQLite without one",
        _with("shop_url", "postgres"),
    ),
    Repetition(
        "tests/cli/test_commands.py",
        "the command hands a signal on in one place: once by each, and killed once",
        lambda item, params: (
            (_name_of(item).startswith("TestMigrate::test_killed") and params["shop_url"] == "sqlite")
            or (_name_of(item).startswith("TestMigrate::test_stopped") and params["shop_url"] == "sqlite")
            or (_name_of(item).startswith("TestVerify::test_stopped") and params["shop_url"] != "sqlite")
            or (_name_of(item).startswith("TestGc::test_stopped") and params["number"] == 9)
        ),
    ),
    Repetition(
        "tests/faults/crash/test_workers.py",
        "the workers take the same steps as on PostgreSQL, where the rows of a journal were first locked so",
        lambda item, params: (
            _name_of(item).startswith("test_two_workers") and params.get("servers") in ("mariadb-local", "wal-local")
        ),
    ),
    Repetition(
        "tests/orm/journal/test_scenarios.py",
        "which of the listeners are called before ours is SQLAlchemy's, with a journal and without; SQLite has every place",
        _with("where", "Session, before ours", "a subclass", "one session"),
    ),
    Repetition(
        "tests/orm/journal/test_scenarios.py",
        "`conditional_savepoint` joins like `create_savepoint` inside a savepoint, and like `rollback_only` elsewhere",
        _with("mode", "conditional_savepoint"),
    ),
    Repetition(
        "tests/orm/test_cancellation.py",
        "an await that ends in a later turn of the loop is reached as one that ends at once",
        _of("test_at_every_await", unless=lambda params: params["turns"] == 0),
    ),
    Repetition(
        "tests/",
        "the same code as without a prefix, and as on SeaweedFS",
        _with("backend", "local-prefixed", "s3-moto", "s3-moto-prefixed", "s3-seaweedfs-prefixed"),
    ),
]

_DATABASES = {
    "tests/gc/test_mentions.py": ("sqlite-begin", "asyncpg", "mariadb"),
    "tests/orm/journal/": ("asyncpg",),
    "tests/orm/synchronous/": ("sqlite-begin", "psycopg", "asyncpg"),
    "tests/orm/variants/": ("asyncpg",),
    "tests/orm/": ("sqlite-begin", "asyncpg"),
    "tests/gc/": ("sqlite-begin", "asyncpg"),
    "tests/verification/": ("sqlite-begin", "asyncpg"),
    "tests/migration/": ("sqlite-begin", "asyncpg"),
}
"""By folder, the databases of the default tier. Below `tests/orm` the first one that a test knows, elsewhere each of them."""

_DECIDED_BY_THE_DRIVER = (
    "tests/orm/journal/test_database_faults.py::",
    "tests/orm/journal/test_table_faults.py::TestRights::test_session[",
    "tests/orm/test_concurrency.py::",
    "tests/orm/test_disconnects_and_signals.py::",
    "tests/orm/test_scenarios.py::TestFailedUploads",
    "tests/orm/test_scenarios.py::TestRollback",
    "tests/orm/test_scenarios.py::TestTwoPhases",
    "tests/orm/test_unknown_commit.py::",
)
"""What a second driver of PostgreSQL may do otherwise: connections that break, errors, two phases."""

_DECIDED_BY_BEGIN = (
    "tests/orm/test_concurrent",
    "tests/orm/test_scenarios.py::TestFailedUploads",
    "tests/orm/test_scenarios.py::TestRollback",
    "tests/orm/test_scenarios.py::TestSavepoints",
    "tests/orm/test_scenarios.py::TestTwoPhases",
    "tests/orm/test_shared_objects.py::",
    "tests/orm/test_unknown_commit.py::",
)
"""What Python's driver of SQLite does otherwise, which begins transactions late and leaves savepoints to themselves."""

_DECIDED_BY_THE_SIDECAR = (
    "tests/orm/journal/test_recovery.py::TestReports",
    "tests/orm/journal/test_scenarios.py::TestFailedUploads",
    "tests/orm/journal/test_scenarios.py::TestRollback",
    "tests/orm/journal/test_scenarios.py::TestSavepoints",
    "tests/orm/journal/test_table_faults",
    "tests/orm/journal/test_triggers_of_each_database.py",
    "tests/orm/synchronous/",
)
"""What the journal does otherwise on SQLite, where uploads have their intents in another file; beside `test_sqlite.py`."""

_WITHOUT_SIDECAR = "the transactions are those of PostgreSQL with a journal; `_DECIDED_BY_THE_SIDECAR` is tried with the sidecar"
_WITHOUT_BEGIN = "the same statements as with BEGIN; `_DECIDED_BY_BEGIN` is tried without it"
_SECOND_DRIVER = "the same statements on the same server as through asyncpg; `_DECIDED_BY_THE_DRIVER` is tried with both"
_WITH_A_JOURNAL = "every scenario runs on PostgreSQL with a journal, which adds statements to those without one"
_ONE_DATABASE = "the rule is the same on every database, and the tests of `ON_EVERY_DATABASE` reach what differs"
_ONE_MIGRATION = "the journal is tried on PostgreSQL, its absence on SQLite; every other combination repeats one of them"


def is_exhaustive() -> bool:
    """Tell whether this run is of the exhaustive tier."""
    return bool(os.environ.get(_TIER))


def repetitions(name: str, *, default: int, exhaustive: int) -> int:
    """Return how often a random test tries: what the environment variable of this name says, else by tier."""
    return int(os.environ.get(name) or (exhaustive if is_exhaustive() else default))


def seed() -> int:
    """Return what all random choices of a run follow from: fixed in the default tier, so that a failure is the change's fault."""
    return int(os.environ.get(_SEED) or _FIXED_SEED)


def configure(config: pytest.Config) -> None:
    """Take the options of the command line; the environment carries them to the processes that share a run."""
    config.addinivalue_line("markers", 'exhaustive(reason): runs in the exhaustive tier only ("nox -s exhaustive")')
    config.addinivalue_line("markers", "time_bound: fails on a busy machine, so it runs alone, after the others")
    if config.getoption("--exhaustive"):
        os.environ[_TIER] = "1"
        os.environ.setdefault(_SEED, str(random.SystemRandom().getrandbits(32)))


def report_header() -> str:
    """Return the line that says which tier runs, and how to repeat its random choices."""
    return f"tier: {'exhaustive' if is_exhaustive() else 'default'}; {_SEED}={seed()} repeats its random choices"


class _Case:
    """A case of a test whose item has not been made: what the rules read of an item."""

    def __init__(self, definition: Any, call: Any) -> None:
        self._definition = definition
        self.callspec = call
        self.nodeid = f"{definition.nodeid}[{call.id}]"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._definition, name)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        """Return the marker of the case's parameters, else of its test."""
        found: pytest.Mark | None = next((mark for mark in self.callspec.marks if mark.name == name), None)
        return found or self._definition.get_closest_marker(name)


def narrow(metafunc: pytest.Metafunc) -> None:
    """Let pytest make no items of what `choose` would leave out: to make them takes as long as all else in collecting.

    A test of which nothing stays keeps one case, marked so that `choose` leaves it out: without any it would run unparametrized.
    """
    calls: list[Any] = metafunc._calls
    if is_exhaustive() or not calls:
        return
    databases = {str(call.params.get("database")) for call in calls}
    reasons = [_reason(_Case(metafunc.definition, call), databases) for call in calls]  # type: ignore[arg-type]
    kept = [call for call, reason in zip(calls, reasons, strict=True) if reason is None]
    if not kept:
        kept = [dataclasses.replace(calls[0], marks=[pytest.mark.exhaustive(reasons[0]).mark])]
    calls[:] = kept


def may_be_passed_over(path: Path, config: pytest.Config) -> bool:
    """Tell whether a file has no test that a run chooses: most have none with time bounds."""
    return (
        config.option.markexpr == "time_bound"
        and path.name.startswith("test_")
        and path.suffix == ".py"
        and "time_bound" not in path.read_text()
    )


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of the default tier what belongs to the exhaustive one."""
    if is_exhaustive():
        return
    left_out = _repeated(items)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _repeated(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    found: set[pytest.Item] = set()
    databases: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        databases[_function(item)].add(str(_params(item).get("database")))
    for item in items:
        if _reason(item, databases[_function(item)]) is not None:
            found.add(item)
    return found


def _reason(item: pytest.Item, databases: set[str]) -> str | None:
    """Return why a case is left out of the default tier, None for one that is not."""
    if (mark := item.get_closest_marker("exhaustive")) is not None:
        reason = (*mark.args, mark.kwargs.get("reason"))[0]
        if not reason:
            raise pytest.UsageError(f"{item.nodeid} is exhaustive without a reason")
        return str(reason)
    params = _params(item)
    for rule in REPETITIONS:
        if item.nodeid.startswith(rule.path) and rule.repeats(item, params):
            return rule.reason
    if "database" not in params:
        return None
    if params["database"] == "sqlite" and "sqlite-begin" in databases and not item.nodeid.startswith(_DECIDED_BY_BEGIN):
        return _WITHOUT_BEGIN
    if params["database"] == "asyncpg" and item.nodeid.startswith("tests/orm/test_scenarios.py"):
        return _WITH_A_JOURNAL
    if params["database"] == "psycopg" and "asyncpg" in databases and not item.nodeid.startswith(_DECIDED_BY_THE_DRIVER):
        return _SECOND_DRIVER
    if params["database"] == "sqlite-journal":
        return None if item.nodeid.startswith(_DECIDED_BY_THE_SIDECAR) else _WITHOUT_SIDECAR
    if _reaches_dialects(item):
        return None
    folder = next((folder for folder in _DATABASES if item.nodeid.startswith(folder)), None)
    if folder is None:
        return None
    wanted = [name for name in _DATABASES[folder] if name in databases] or sorted(databases)
    if folder == "tests/orm/":
        wanted = wanted[:1]
    if params["database"] not in wanted:
        return _ONE_DATABASE
    if folder == "tests/migration/" and (params["database"] == "asyncpg") is (params.get("env") == "plain"):
        return _ONE_MIGRATION
    return None


def _reaches_dialects(item: pytest.Item) -> bool:
    path = item.nodeid.partition("::")[0]
    return _name_of(item).startswith(ON_EVERY_DATABASE.get(path, ()))


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _params(item: pytest.Item) -> dict[str, Any]:
    return dict(getattr(getattr(item, "callspec", None), "params", {}))
