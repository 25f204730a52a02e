"""Environments whose every attachment column has a variant that is made in the flush."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granite_storage.backends.local import LocalStorageBackend
from tests.orm.conftest import new_database
from tests.orm.databases import WITH_JOURNAL, Database
from tests.orm.derivations import Upper, declared_everywhere
from tests.orm.environment import OrmEnvironment, orm_environment


@pytest.fixture(scope="session", params=["sqlite-begin", *WITH_JOURNAL])
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """Every database with a journal, and SQLite without one."""
    async with new_database(request, request.param) as found:
        yield found


@pytest.fixture
async def env(database: Database, tmp_path: Path) -> AsyncIterator[OrmEnvironment]:
    """Empty tables and an empty storage; checked afterwards, with the variants."""
    backend = LocalStorageBackend(tmp_path / "store", fsync=False) if database.is_sqlite else None
    recipe = Upper(when="flush")
    with declared_everywhere({"upper": recipe}):
        async with orm_environment(database, backend=backend, journaled=database.name in WITH_JOURNAL) as env:
            env.variants = {"upper": recipe.result}
            yield env
            if env.journal is None:
                await env.check()
            else:
                await env.check_recovery()
