"""The databases and the environment that tests of attachments run in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from granite_storage.backends.local import LocalStorageBackend
from tests.orm.databases import DATABASES, Database, mariadb, postgres_database, sqlite
from tests.orm.environment import OrmEnvironment, orm_environment
from tests.services import service


@pytest.fixture(scope="session", params=DATABASES)
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """Every database, with every driver."""
    yield from _database(request, request.param)


def _database(request: pytest.FixtureRequest, name: str) -> Iterator[Database]:
    if name.startswith("sqlite"):
        with sqlite(name) as found:
            yield found
    elif name == "mariadb":
        with service("MariaDB", mariadb()) as found:
            yield found
    else:
        with postgres_database(request.getfixturevalue("postgres_server"), name) as found:
            yield found


@pytest.fixture
async def env(database: Database, tmp_path: Path) -> AsyncIterator[OrmEnvironment]:
    """Empty tables, an empty storage, and both bound; checked afterwards. One of the databases has its objects on disk."""
    backend = LocalStorageBackend(tmp_path / "store", fsync=False) if database.name == "sqlite-begin" else None
    async with orm_environment(database, backend=backend) as env:
        yield env
        await env.check()
