"""The worked example of `docs/backends.md` is a backend: it passes the suite."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from examples.sqlite_backend import SQLiteStorageBackend, select
from granite_storage.testing import BackendConformance


class TestSQLiteStorageBackend(BackendConformance):
    """Every case, but those for faults that SQLite does not have."""

    supports_copy = True
    supports_cleanup = True
    can_refuse = False
    can_lose_answers = False

    @pytest.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[SQLiteStorageBackend]:
        backend = SQLiteStorageBackend(tmp_path / "objects.db")
        yield backend
        await backend.aclose()

    def with_page_size(self, backend: SQLiteStorageBackend, size: int) -> SQLiteStorageBackend:
        return SQLiteStorageBackend(backend.path, page_size=size)

    @asynccontextmanager
    async def with_room_for(self, backend: SQLiteStorageBackend, size: int) -> AsyncIterator[SQLiteStorageBackend]:
        small = SQLiteStorageBackend(f"{backend.path}-small")
        pages = 12 + size // 4000
        await small._run("", partial(select, query=f"PRAGMA max_page_count = {pages}", values=()))
        yield small
        await small.aclose()

    @asynccontextmanager
    async def unreachable(self, backend: SQLiteStorageBackend) -> AsyncIterator[SQLiteStorageBackend]:
        elsewhere = SQLiteStorageBackend(Path(backend.path).parent / "missing" / "objects.db")
        yield elsewhere
        await elsewhere.aclose()

    def elsewhere(self, backend: SQLiteStorageBackend) -> str:
        root = Path(__file__).parents[2]
        return (
            f"import sys; sys.path.insert(0, {str(root)!r})\n"
            "from examples.sqlite_backend import SQLiteStorageBackend\n"
            f"backend = SQLiteStorageBackend({backend.path!r})"
        )

    async def count_unfinished(self, backend: SQLiteStorageBackend) -> int:
        query = "SELECT count(*) FROM chunk WHERE upload NOT IN (SELECT upload FROM object)"
        rows = await backend._run("", partial(select, query=query, values=()))
        count: int = rows[0][0]
        return count
