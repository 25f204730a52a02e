"""The databases and storages of the crash tests, and the child processes that are killed in them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

from tests.faults.crash.audit import Audit, audited
from tests.faults.crash.children import ChildProcesses, child_processes
from tests.faults.crash.models import Setting
from tests.faults.crash.options import SEED, TRIGGERS
from tests.orm.databases import mariadb, postgres, postgres_database
from tests.services import service


@pytest.fixture(scope="session")
def seed() -> str:
    """What all random choices of this run follow from."""
    return SEED


@pytest.fixture(scope="session")
def children(_temporary_folder: Path) -> Iterator[ChildProcesses]:
    """Where children come from."""
    with child_processes() as found:
        yield found


@pytest.fixture(scope="session")
def crash_postgres(_temporary_folder: Path) -> Iterator[URL]:
    """A PostgreSQL of these tests."""
    folder = _temporary_folder / "crash"
    folder.mkdir(mode=0o700)
    with postgres(folder) as url:
        yield url


@pytest.fixture(scope="session")
def asyncpg_url(crash_postgres: URL) -> Iterator[str]:
    with postgres_database(crash_postgres, "asyncpg") as database:
        yield database.url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def psycopg_url(crash_postgres: URL) -> Iterator[str]:
    with postgres_database(crash_postgres, "psycopg") as database:
        yield database.url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def threads_url(psycopg_url: str) -> str:
    """The database of programs with synchronous sessions."""
    return psycopg_url


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    with service("MariaDB", mariadb()) as database:
        yield database.url.render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def wal_url(_temporary_folder: Path) -> str:
    """An SQLite file."""
    return f"sqlite:///{_temporary_folder}/crash.db"


@pytest.fixture(scope="session")
def rollback_url(_temporary_folder: Path) -> str:
    """An SQLite file in rollback mode."""
    return f"sqlite:///{_temporary_folder}/crash-rollback.db"


@pytest.fixture(scope="session")
def threadswal_url(wal_url: str) -> str:
    """The SQLite file of programs with synchronous sessions."""
    return wal_url


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """The address of a database and the server of a storage, by their names: `asyncpg-local`, `psycopg+triggers-moto`."""
    database, _, storage = request.param.partition("-")
    server = None if storage == "local" else request.getfixturevalue(f"{storage}_server")
    return request.getfixturevalue(f"{database.removesuffix(TRIGGERS)}_url"), server


@pytest.fixture
def setting(request: pytest.FixtureRequest, servers: tuple[str, Any], tmp_path: Path) -> Iterator[Setting]:
    """A database and an empty storage."""
    url, server = servers
    if server is None:
        name = request.node.callspec.params["servers"]
        yield Setting(
            url,
            {"root": str(tmp_path / "store")},
            is_synchronous=name.startswith("threads"),
            journal_mode="DELETE" if name.startswith("rollback") else "WAL",
            has_triggers=TRIGGERS in name,
        )
        return
    bucket = server.new_bucket()
    yield Setting(url, {"bucket": bucket, "endpoint_url": server.endpoint_url, "session": server.session_kwargs})
    server.remove_bucket(bucket)


@pytest.fixture
async def audit(setting: Setting) -> AsyncIterator[Audit]:
    """An audit of the setting, with empty tables."""
    async with audited(setting) as found:
        yield found
