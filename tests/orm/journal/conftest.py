"""The databases that can have a journal, and an environment with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.orm.conftest import _database
from tests.orm.databases import Database
from tests.orm.environment import OrmEnvironment, orm_environment


@pytest.fixture(scope="session", params=["asyncpg", "psycopg", "mariadb"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """Every database that can have a journal, with every driver."""
    yield from _database(request, request.param)


@pytest.fixture(scope="session")
def asyncpg_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """PostgreSQL alone, for what no other database answers otherwise."""
    yield from _database(request, "asyncpg")


@pytest.fixture(scope="session")
def mariadb_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """MariaDB alone."""
    yield from _database(request, "mariadb")


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
