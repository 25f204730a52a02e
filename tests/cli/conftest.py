"""The command on an application of its own, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from blockbuster import BlockBuster
from click.testing import CliRunner
from sqlalchemy.engine import URL

from granite_storage.cli.commands import command_line
from tests.orm.databases import postgres_database
from tests.programs import program

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Answer:
    """What a command has said."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = self.records[-1]["report"]
        return found


@dataclass
class Shop:
    """An application in a folder, its database, and the command on both."""

    folder: Path
    url: str
    journaled: bool

    def environment(self, **given: str) -> dict[str, str]:
        """Return the environment variables of a command; what was given comes on top."""
        own = {"DATABASE_URL": self.url, "PYTHONPATH": str(ROOT), "GRANITE_STORAGE_APP": "shop:binding", "COLUMNS": "80"}
        kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
        return {**kept, **own, **({"JOURNAL": "1"} if self.journaled else {}), **given}

    @contextlib.contextmanager
    def application(self, **environment: str) -> Iterator[ModuleType]:
        """Import the application's module again."""
        with program(self.folder, self.environment(**environment)), contextlib.redirect_stdout(io.StringIO()):
            sys.path.insert(0, str(self.folder))
            yield importlib.import_module("shop")

    def fill(self, count: int = 3, filename: str = "Jährlicher Bericht.pdf", **environment: str) -> None:
        """Create the tables again, with so many rows that have a file."""
        with self.application(**environment) as module:
            asyncio.run(module.fill(count, filename))

    def drop(self, **environment: str) -> None:
        """Drop the tables."""
        with self.application(**environment) as module:
            asyncio.run(module.drop())

    def run(self, *arguments: str, **environment: str) -> Answer:
        """Run a command in this process."""
        with program(self.folder, self.environment(**environment)):
            done = CliRunner(catch_exceptions=False).invoke(command_line, arguments, prog_name="granite-storage")
        if done.exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt  # the command has had what was meant for the run of the tests
        return Answer(done.exit_code, done.stdout, done.stderr)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "granite_storage.cli", *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def files(self, backend: str) -> list[Path]:
        """Return the objects of a backend."""
        return sorted(
            path for path in (self.folder / backend).rglob("*") if path.is_file() and not path.name.startswith(".granite-")
        )

    def location(self, backend: str = "old") -> str:
        """Return where one of its objects is."""
        return str(self.files(backend)[0].relative_to(self.folder / backend))


def interrupted(process: subprocess.Popen[str], number: signal.Signals, *, after: int) -> Answer:
    """Send a signal once the command has said so many lines, and return what it says from then on."""
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        for _ in range(after):
            assert process.stdout.readline()
        process.send_signal(number)
        # `communicate` would pass over what has been read ahead with those lines.
        out, err = process.stdout.read(), process.stderr.read()
    return Answer(process.returncode, out, err)


def shop_in(folder: Path, url: str, *, journaled: bool = False) -> Shop:
    shutil.copy(Path(__file__).with_name("shop.py"), folder / "shop.py")
    return Shop(folder, url, journaled)


@pytest.fixture(autouse=True)
def _application_loads(_nothing_blocks: BlockBuster) -> None:
    """Let the command import the application: nothing else is on its event loop yet."""
    for function in _nothing_blocks.functions.values():
        function.can_block_in("granite_storage/cli/runtime.py", {"_import_module", "_call_factory"})


@pytest.fixture(scope="session")
def postgres_url(postgres_server: URL) -> Iterator[str]:
    with postgres_database(postgres_server, "asyncpg") as database:
        yield database.url.render_as_string(hide_password=False)


@pytest.fixture(scope="session", params=["sqlite", "postgres", "postgres-journal"])
def shop_url(request: pytest.FixtureRequest) -> tuple[str, bool]:
    """Each database; the last one with a journal."""
    if request.param == "sqlite":
        return "sqlite+aiosqlite:///shop.db", False
    return request.getfixturevalue("postgres_url"), request.param == "postgres-journal"


@pytest.fixture
def shop(shop_url: tuple[str, bool], tmp_path: Path) -> Shop:
    """The application on each database."""
    url, journaled = shop_url
    return shop_in(tmp_path, url, journaled=journaled)


@pytest.fixture
def plain_shop(tmp_path: Path) -> Shop:
    """The application on SQLite, for what does not depend on the database."""
    return shop_in(tmp_path, "sqlite+aiosqlite:///shop.db")
