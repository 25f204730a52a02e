"""The databases and the environment that tests of attachments run in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from granite_storage import StorageBinding, StorageManager, bind_storage
from granite_storage.backends.local import LocalStorageBackend
from tests.orm import values
from tests.orm.databases import DATABASES, Database, mariadb, postgres_database, sqlite
from tests.orm.environment import OrmEnvironment, orm_environment
from tests.orm.values import Sessions
from tests.services import service


@pytest.fixture(scope="session", params=DATABASES)
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """Every database, with every driver."""
    async with new_database(request, request.param) as found:
        yield found


@contextlib.asynccontextmanager
async def new_database(request: pytest.FixtureRequest, name: str) -> AsyncIterator[Database]:
    """Make a database for the fixture of a session of tests, and close what is pooled before it goes."""
    with contextlib.ExitStack() as stack:
        if name.startswith("sqlite"):
            context = sqlite(name)
        elif name == "mariadb":
            context = service("MariaDB", mariadb())
        else:
            context = postgres_database(request.getfixturevalue("postgres_server"), name)
        # A thread of its own, because these run an event loop.
        found = await asyncio.to_thread(stack.enter_context, context)
        found.loop = asyncio.get_running_loop()
        try:
            yield found
        finally:
            await found.discard()
            await asyncio.to_thread(stack.close)


@pytest.fixture
async def env(database: Database, tmp_path: Path) -> AsyncIterator[OrmEnvironment]:
    """Empty tables, an empty storage, and both bound; checked afterwards. One of the databases has its objects on disk."""
    backend = LocalStorageBackend(tmp_path / "store", fsync=False) if database.name == "sqlite-begin" else None
    async with orm_environment(database, backend=backend) as env:
        yield env
        await env.check()


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    """Sessions on the models of `tests.orm.values`, in an SQLite file of the test's own."""
    async with values.sqlite(tmp_path) as sessions:
        yield sessions


@pytest.fixture
def manager() -> StorageManager:
    """A manager in memory with the policies of those models."""
    return values.make_manager()


@pytest.fixture
def binding(manager: StorageManager) -> Iterator[StorageBinding]:
    """Those models, bound to that manager."""
    binding = bind_storage(values.Base, manager)
    yield binding
    binding.unbind()
