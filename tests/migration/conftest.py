"""The databases, and a storage of two backends that a migration moves objects between."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.migration.environment import MigrationEnvironment, migration_environment
from tests.orm.conftest import database
from tests.orm.databases import Database

__all__ = ["database"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out a journal on SQLite, which has none."""
    out = {item for item in items if _is_impossible(item)}
    items[:] = [item for item in items if item not in out]
    config.hook.pytest_deselected(items=list(out))


def _is_impossible(item: pytest.Item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("env") == "journaled" and str(params.get("database")).startswith("sqlite")


@pytest.fixture(params=["plain", "journaled"])
async def env(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[MigrationEnvironment]:
    """Two backends without and, where the database can have one, with a journal; policies write to `old`."""
    async with migration_environment(database, journaled=request.param == "journaled") as env:
        yield env
