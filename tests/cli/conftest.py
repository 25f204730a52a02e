"""The command as people start it: a program of its own, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

from tests.orm.databases import postgres_database

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
        own = {"DATABASE_URL": self.url, "PYTHONPATH": str(ROOT), "GRANITE_STORAGE_APP": "shop:binding"}
        kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        return {**kept, **own, **({"JOURNAL": "1"} if self.journaled else {}), **given}

    def fill(self, count: int = 3, filename: str = "Jährlicher Bericht.pdf") -> None:
        command = [sys.executable, "shop.py", str(count), filename]
        subprocess.run(command, cwd=self.folder, env=self.environment(), check=True, capture_output=True, timeout=60)

    def run(self, *arguments: str, stdin: str = "", **environment: str) -> Answer:
        done = subprocess.run(
            [sys.executable, "-m", "granite_storage.cli", *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            input=stdin.encode(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        return Answer(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
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
