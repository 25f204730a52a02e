"""The databases that migrations run on, each with the template of Alembic that its driver needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from blockbuster import BlockBuster
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.orm.databases import mariadb, postgres_database
from tests.services import service

T = TypeVar("T")

TARGETS = ["sqlite", "aiosqlite", "psycopg", "asyncpg", "mariadb"]


@dataclass(frozen=True)
class Target:
    """An empty database, and the template whose `env.py` connects to it."""

    url: URL
    template: str

    def ask(self, statement: str) -> list[Any]:
        """Execute a statement and return its rows, whatever the driver."""
        return self.run(lambda connection: list(map(tuple, connection.execute(text(statement)))))

    def ask_nothing(self, statement: str) -> None:
        """Execute a statement that returns no rows."""
        self.run(lambda connection: connection.execute(text(statement)) and None)

    def tables(self) -> set[str]:
        return self.run(lambda connection: set(inspect(connection).get_table_names()))

    def columns(self, table: str) -> set[str]:
        return self.run(lambda connection: {column["name"] for column in inspect(connection).get_columns(table)})

    def run(self, work: Callable[[Connection], T]) -> T:
        """Do something with a connection, in a transaction."""
        if self.template == "async":
            return asyncio.run(self._run(work))
        engine = create_engine(self.url)
        try:
            with engine.begin() as connection:
                return work(connection)
        finally:
            engine.dispose()

    async def _run(self, work: Callable[[Connection], T]) -> T:
        engine = create_async_engine(self.url)
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(work)
        finally:
            await engine.dispose()


@pytest.fixture(autouse=True)
def _paths_are_resolved(_nothing_blocks: BlockBuster) -> None:
    """Let the mapping of paths follow links: a migration calls it, which is synchronous code below `run_sync`."""
    for function in _nothing_blocks.functions.values():
        function.can_block_in("granite_storage/alembic/sources.py", {"_inside"})


@pytest.fixture(scope="session", params=TARGETS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which database, through which driver; its server runs before a test is watched."""
    if request.param in ("psycopg", "asyncpg"):
        request.getfixturevalue("postgres_server")
    return str(request.param)


@pytest.fixture
def target(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    """Every database, empty, through a synchronous driver where there is one, and an asynchronous one."""
    match kind:
        case "sqlite":
            yield Target(make_url(f"sqlite:///{tmp_path}/app.db"), "generic")
        case "aiosqlite":
            yield Target(make_url(f"sqlite+aiosqlite:///{tmp_path}/app.db"), "async")
        case "mariadb":
            with service("MariaDB", mariadb()) as found:
                yield Target(found.url, "async")
        case driver:
            with postgres_database(request.getfixturevalue("postgres_server"), driver) as found:
                yield Target(found.url, "generic" if driver == "psycopg" else "async")
