"""The databases with drivers for threads, and environments on them whose sessions are synchronous."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granite_storage.backends.local import LocalStorageBackend
from tests.orm.conftest import new_database
from tests.orm.databases import WITH_JOURNAL, Database
from tests.orm.environment import OrmEnvironment, orm_environment


@pytest.fixture(scope="session", params=["sqlite", "sqlite-begin", "psycopg", "mariadb", "sqlite-journal"])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """Every database, with sqlite3, psycopg or PyMySQL."""
    async with new_database(request, request.param) as found:
        found.is_synchronous = True
        yield found


@pytest.fixture(params=["plain", "journaled"])
async def env(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> AsyncIterator[OrmEnvironment]:
    """Empty tables, an empty storage, with a journal where the database can have one; checked afterwards."""
    if (request.param == "journaled") is not (database.name in WITH_JOURNAL) and database.is_sqlite:
        pytest.skip("SQLite is tried with a journal and without in databases of their own")
    if request.param == "plain":
        backend = LocalStorageBackend(tmp_path / "store", fsync=False) if database.name == "sqlite-begin" else None
        async with orm_environment(database, backend=backend) as env:
            yield env
            await env.check()
    else:
        async with orm_environment(database, journaled=True) as env:
            yield env
            await env.check_recovery()
