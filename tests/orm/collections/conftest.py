"""Environments with the models of `tests.orm.collections.models`: with and without a journal, for both kinds of sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from granite_storage.backends.local import LocalStorageBackend
from tests.orm.collections.models import Base
from tests.orm.conftest import new_database
from tests.orm.databases import Database
from tests.orm.environment import OrmEnvironment, orm_environment


class Kind(NamedTuple):
    """What the sessions are of."""

    database: str
    journaled: bool = False
    threads: bool = False

    def __str__(self) -> str:
        return "-".join([self.database, *(["journal"] if self.journaled else []), *(["threads"] if self.threads else [])])


_REPEATS = pytest.mark.exhaustive("the hooks are the same: SQLite, PostgreSQL with a journal and threads show each once")
KINDS = [
    Kind("sqlite-begin"),
    Kind("asyncpg", journaled=True),
    Kind("sqlite", threads=True),
    pytest.param(Kind("asyncpg"), marks=_REPEATS),
    pytest.param(Kind("sqlite-journal", journaled=True), marks=_REPEATS),
    pytest.param(Kind("psycopg", journaled=True, threads=True), marks=_REPEATS),
    pytest.param(Kind("mariadb"), marks=_REPEATS),
    pytest.param(Kind("mariadb", journaled=True, threads=True), marks=_REPEATS),
]


@pytest.fixture(scope="session", params=KINDS, ids=str)
async def kind(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Kind, Database]]:
    kind: Kind = request.param
    async with new_database(request, kind.database) as found:
        found.is_synchronous = kind.threads
        yield kind, found


@pytest.fixture
async def env(kind: tuple[Kind, Database], tmp_path: Path) -> AsyncIterator[OrmEnvironment]:
    """Empty tables and an empty storage; checked afterwards, before recovery and after it where there is a journal."""
    (_, journaled, _), database = kind
    backend = LocalStorageBackend(tmp_path / "store", fsync=False) if database.name == "sqlite-begin" else None
    async with orm_environment(database, backend=backend, journaled=journaled, base=Base) as env:
        yield env
        if journaled:
            await env.check_recovery()
        else:
            await env.check()
