"""The databases that migrations run on, each with the template of Alembic that its driver needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, make_url

from tests.orm.databases import mariadb, postgres_database

TARGETS = ["sqlite", "aiosqlite", "psycopg", "asyncpg", "mariadb"]


@dataclass(frozen=True)
class Target:
    """An empty database, and the template whose `env.py` connects to it."""

    url: URL
    template: str


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
            context = mariadb()
            try:
                found = context.__enter__()
            except LookupError as error:
                pytest.skip(str(error))
            yield Target(found.url, "async")
            context.__exit__(None, None, None)
        case driver:
            with postgres_database(request.getfixturevalue("postgres_server"), driver) as found:
                yield Target(found.url, "generic" if driver == "psycopg" else "async")
