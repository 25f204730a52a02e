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


@pytest.fixture(autouse=True)
def _soon_out_of_patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the journal wait less on SQLite, where each writer waits for all others."""
    if request.node.name.find("sqlite-journal") >= 0:
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
