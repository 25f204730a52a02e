"""The databases and the storage of the tests of garbage collection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.gc.yard import Yard, yard_on
from tests.orm.conftest import _database, database
from tests.orm.databases import Database, sqlite

__all__ = ["database"]


@pytest.fixture
async def yard(database: Database) -> AsyncIterator[Yard]:
    """Empty tables and an empty backend on every database, with a journal where there can be one, but on one."""
    async with yard_on(database, journaled=database.name in ("asyncpg", "mariadb")) as yard:
        yield yard


@pytest.fixture(scope="session")
def plain_database() -> Iterator[Database]:
    """One database, for what does not depend on it."""
    with sqlite("sqlite") as found:
        yield found


@pytest.fixture
async def plain_yard(plain_database: Database) -> AsyncIterator[Yard]:
    """Empty tables and an empty backend on SQLite."""
    async with yard_on(plain_database) as yard:
        yield yard


@pytest.fixture(scope="session")
def postgres_only(request: pytest.FixtureRequest) -> Iterator[Database]:
    """PostgreSQL with asyncpg, for what is about a server."""
    yield from _database(request, "asyncpg")


@pytest.fixture
async def journaled_yard(postgres_only: Database) -> AsyncIterator[Yard]:
    """Empty tables, an empty backend and a journal on PostgreSQL."""
    async with yard_on(postgres_only, journaled=True) as yard:
        yield yard
