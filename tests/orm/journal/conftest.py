"""The databases that can have a journal, and an environment with one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from granite_storage.orm.journal import sqlite
from tests.orm.conftest import new_database
from tests.orm.databases import WITH_JOURNAL, Database
from tests.orm.environment import OrmEnvironment, orm_environment


@pytest.fixture(scope="session", params=WITH_JOURNAL)
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """Every database that can have a journal, with every driver."""
    async with new_database(request, request.param) as found:
        yield found


@pytest.fixture(scope="session")
async def asyncpg_database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """PostgreSQL alone, for what no other database answers otherwise."""
    async with new_database(request, "asyncpg") as found:
        yield found


@pytest.fixture(scope="session")
async def psycopg_database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """PostgreSQL, with synchronous sessions."""
    async with new_database(request, "psycopg") as found:
        found.is_synchronous = True
        yield found


@pytest.fixture(scope="session")
async def mariadb_database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """MariaDB alone."""
    async with new_database(request, "mariadb") as found:
        yield found


NOT_ON_SQLITE = {
    "a worker or another session writes while a transaction has the only lock of writers": (
        "test_adoption.py::test_an_upload_whose_transaction_is_rolled_back",
        "test_derived_jobs.py::TestRows::test_a_session_that_has_not_heard_of_it",
        "test_derived_jobs.py::TestRows::test_a_transaction_that_takes_long",
        "test_derived_jobs.py::TestRows::test_another_part_of_the_value",
        "test_derived_jobs.py::TestRows::test_replaced_while_it_is_set",
        "test_derived_rounds.py::test_a_writer_at_every_await",
        "test_direct_uploads.py::test_everything_at_random",
        "test_effects.py::test_random_histories",
        "test_scans.py::TestRowsThatChange::test_a_transaction_that_takes_long",
        "test_scans.py::TestWorkers::test_intents_are_settled_while_a_scan_takes_minutes",
        "test_simpler_protocols.py::test_the_protocol_holds[sqlite-journal-slow_transaction",
        "test_simpler_protocols.py::test_the_protocol_holds[sqlite-journal-undone_",
        "test_simpler_protocols.py::test_a_simpler_variant_breaks",
        "test_simpler_sessions.py::test_the_protocol_holds[sqlite-journal-rolled_back_though_referenced",
        "test_simpler_sessions.py::test_the_protocol_holds[sqlite-journal-copied_while_given_up",
        "test_simpler_sessions.py::test_a_simpler_variant_breaks",
        "test_variants_in_rows.py::test_a_worker_waits_for_an_undo_that_is_not_committed",
    ),
    "it has no such statement, setting or isolation level": (
        "test_database_faults.py",
        "test_derived_jobs.py::TestRows::test_rows_that_share_it",
        "test_direct_uploads.py::test_a_transaction_that_reads_an_older_snapshot",
        "test_refusals.py::test_an_engine_without_transactions",
        "test_refusals.py::test_isolation_that_shows_too_little",
        "test_refusals.py::test_the_journals_own_connections_read_what_is_committed",
        "test_scans.py::TestRowsThatChange::test_rows_that_share_it",
        "test_scans.py::TestSchemas",
        "test_simpler_protocols.py::test_the_protocol_holds[sqlite-journal-older_snapshot",
        "test_tenants.py",
    ),
    "each look ends with a COMMIT as well": (
        "test_recovery.py::TestCosts::test_sessions_that_flush_at_the_same_time_share_commits",
        "test_recovery.py::TestCosts::test_one_commit_for_many_attachments",
    ),
    "the intent of an upload outlives the COMMIT of its row, so the collector waits for its lease": (
        "test_scans.py::TestElsewhere::test_a_job_is_no_reference",
    ),
}
"""By reason, the beginnings of the tests that are left out on SQLite."""


@pytest.fixture(autouse=True)
def _on_sqlite(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what cannot be on SQLite, and let the journal wait less there, where each writer waits for all others."""
    if "sqlite-journal" in request.node.name:
        for why, names in NOT_ON_SQLITE.items():
            if request.node.nodeid.removeprefix("tests/orm/journal/").startswith(names):
                pytest.skip(why)
        monkeypatch.setattr(sqlite, "_PATIENCE", 3.0)


@pytest.fixture
async def env(database: Database) -> AsyncIterator[OrmEnvironment]:
    """Empty tables, an empty storage and a journal; checked afterwards, before recovery and after it."""
    async with orm_environment(database, journaled=True) as env:
        yield env
        await env.check_recovery()


@pytest.fixture
async def unchecked_env(database: Database) -> AsyncIterator[OrmEnvironment]:
    """An environment with a journal, which nobody checks afterwards: a variant leaves it broken."""
    async with orm_environment(database, journaled=True) as env:
        yield env
