"""The databases that can have a journal, and a world with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.orm.conftest import _database
from tests.orm.databases import Database
from tests.orm.world import World, world_on


@pytest.fixture(scope="session", params=["asyncpg", "psycopg", "mariadb"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """Every database that can have a journal, with every driver."""
    yield from _database(request, request.param)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    """Empty tables, an empty storage and a journal; checked afterwards, before recovery and after it."""
    async with world_on(database, journaled=True) as world:
        yield world
        await world.check()
        await world.recover()
        await world.check()


@pytest.fixture
async def plain_world(database: Database) -> AsyncIterator[World]:
    """A world with a journal, which nobody checks afterwards: a variant leaves it broken."""
    async with world_on(database, journaled=True) as world:
        yield world
