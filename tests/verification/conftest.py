"""The databases and the two backends of the tests of migration, without a journal."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.migration.environment import MigrationEnvironment, migration_environment
from tests.orm.conftest import database, new_database
from tests.orm.databases import Database

__all__ = ["database"]


@pytest.fixture
async def env(database: Database) -> AsyncIterator[MigrationEnvironment]:
    """Empty tables and two empty backends."""
    async with migration_environment(database) as env:
        yield env


@pytest.fixture
async def postgres_only(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """PostgreSQL with asyncpg, for roles and their privileges."""
    async with new_database(request, "asyncpg") as found:
        yield found
