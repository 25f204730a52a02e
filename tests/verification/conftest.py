"""The databases and the two backends of the tests of migration, without a journal."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.migration.town import Town, town_on
from tests.orm.conftest import database
from tests.orm.databases import Database

__all__ = ["database"]


@pytest.fixture
async def town(database: Database) -> AsyncIterator[Town]:
    """Empty tables and two empty backends."""
    async with town_on(database) as town:
        yield town
