"""The databases of the applications: an SQLite file, and PostgreSQL and MariaDB with a journal."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, make_url

from granite_storage._portal import portal
from tests.orm.databases import mariadb, postgres_database
from tests.services import service

collect_ignore = ["template", "avatar"]
"""The tests in these folders are those of an application, which `test_template.py` runs."""


@pytest.fixture(scope="session", params=["sqlite", "postgres", "mariadb"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which database; its server runs before a test is watched."""
    if request.param == "postgres":
        request.getfixturevalue("postgres_server")
    return str(request.param)


@pytest.fixture
def database_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database for a synchronous driver."""
    with contextlib.ExitStack() as stack:
        url = make_url(f"sqlite:///{tmp_path}/app.db")
        if kind == "postgres":
            url = stack.enter_context(postgres_database(request.getfixturevalue("postgres_server"), "psycopg")).url
        elif kind == "mariadb":
            url = stack.enter_context(service("MariaDB", mariadb())).url.set(drivername="mysql+pymysql")
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def postgres_url(postgres_server: URL) -> Iterator[str]:
    """The URL of an empty database on PostgreSQL, for psycopg."""
    with postgres_database(postgres_server, "psycopg") as found:
        yield found.url.render_as_string(hide_password=False)


@pytest.fixture(autouse=True)
def _loop_ends(_nothing_left: None) -> Iterator[None]:
    """End the loop of synchronous callers with the test, as the end of a program does."""
    yield
    portal.close()


@pytest.fixture(autouse=True)
def _logs_stay(_nothing_left: None) -> Iterator[None]:
    """Undo what an application does to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
