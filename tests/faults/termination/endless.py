"""A run that does not end by itself: `test_termination.py` starts it, waits until its servers are up, and ends it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.orm.databases import sqlite
from tests.programs import program


@pytest.fixture(scope="session")
def started(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Start the servers that are asked for, and give a file that says where all that is."""
    started = {name: request.getfixturevalue(f"{name}_server") for name in os.environ["GRANITE_SERVERS"].split()}
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    if "postgres" in started:  # a daemon is no child
        pids.append(int((Path(started["postgres"].query["host"]) / "postmaster.pid").read_text().split()[0]))
    with sqlite("sqlite") as database:
        folders = [tempfile.gettempdir(), os.path.dirname(str(database.url.database))]
        file = Path(os.environ["GRANITE_STARTED"], f"{os.getpid()}.json")
        file.with_suffix(".tmp").write_text(json.dumps({"pids": pids, "folders": folders}))
        yield file


def announce(file: Path) -> None:
    file.with_suffix(".tmp").rename(file)


@pytest.mark.parametrize("_", [1, 2])  # one for each worker
async def test_in_a_coroutine(started: Path, _: int) -> None:
    announce(started)
    await asyncio.Event().wait()


def test_in_a_call(started: Path, tmp_path: Path) -> None:
    """After a program in this process that has handled the signal itself."""

    async def handle() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)

    with program(tmp_path, os.environ):
        asyncio.run(handle())
    announce(started)
    while True:
        time.sleep(60)


async def test_that_swallows_its_cancellation(started: Path) -> None:
    announce(started)
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            break


async def test_after_it(started: Path) -> None:
    await asyncio.Event().wait()
