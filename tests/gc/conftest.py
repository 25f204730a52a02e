"""The databases and the storage of the tests of garbage collection."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gc.environment import GcEnvironment, gc_environment
from tests.orm.conftest import database, new_database
from tests.orm.databases import Database

__all__ = ["database"]


@pytest.fixture
async def env(database: Database) -> AsyncIterator[GcEnvironment]:
    """Empty tables and an empty backend on every database, with a journal where there can be one, but on one."""
    async with gc_environment(database, journaled=database.name in ("asyncpg", "mariadb")) as env:
        yield env


@pytest.fixture(scope="session")
async def plain_database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """One database, for what does not depend on it."""
    async with new_database(request, "sqlite") as found:
        yield found


@pytest.fixture
async def plain_env(plain_database: Database) -> AsyncIterator[GcEnvironment]:
    """Empty tables and an empty backend on SQLite."""
    async with gc_environment(plain_database) as env:
        yield env


@pytest.fixture(scope="session")
async def postgres_only(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """PostgreSQL with asyncpg, for what is about a server."""
    async with new_database(request, "asyncpg") as found:
        yield found


@pytest.fixture(scope="session")
async def mariadb_only(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """MariaDB, for what is about its catalogue."""
    async with new_database(request, "mariadb") as found:
        yield found


@pytest.fixture
async def journaled_env(postgres_only: Database) -> AsyncIterator[GcEnvironment]:
    """Empty tables, an empty backend and a journal on PostgreSQL."""
    async with gc_environment(postgres_only, journaled=True) as env:
        yield env
