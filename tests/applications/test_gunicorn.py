"""gunicorn with two workers, synchronous or with threads, whose application was loaded before the fork."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.applications.processes import Program, running, until
from tests.core.support import files_below


@pytest.fixture(params=["sync", "gthread"])
def server(request: pytest.FixtureRequest, tmp_path: Path, database_url: str) -> Iterator[Program]:
    threads = ["--threads", "4"] if request.param == "gthread" else []
    options = [
        "--workers",
        "2",
        "--worker-class",
        request.param,
        *threads,
        "--preload",
        "--bind",
        "127.0.0.1:0",
        "--no-control-socket",
    ]
    variables = {"APP_FOLDER": str(tmp_path), "DATABASE_URL": database_url}
    log = tmp_path / "gunicorn.log"
    with running("gunicorn", *options, "tests.applications.gunicorn_app:app", log=log, environment=variables) as program:
        until(
            lambda: program.said().count("Booting worker") == 2 or program.process.poll() is not None,
            "gunicorn does not start",
        )
        yield program


@pytest.fixture
def client(server: Program) -> Iterator[httpx.Client]:
    found = re.search(r"Listening at: (http://\S+)", server.said())
    assert found is not None, server.said()
    with httpx.Client(base_url=found[1], timeout=60) as client:
        yield client


def test_uploads_downloads_and_deletes(client: httpx.Client, server: Program, tmp_path: Path) -> None:
    def upload(number: int) -> int:
        files = {"file": (f"{number}.txt", bytes(min(number, 20) * 50_000), "text/plain")}
        answer = client.post(f"/documents/{number}", files=files)
        assert answer.status_code == 200, server.said()
        return int(answer.json()["process"])

    numbers = itertools.count(1)
    with ThreadPoolExecutor(4) as pool:
        processes = set(pool.map(upload, itertools.islice(numbers, 20)))
    until(lambda: len(processes) == 2 or processes.add(upload(next(numbers))), "one worker answers all")
    assert not processes & {server.process.pid, os.getpid()}
    count = next(numbers)  # with that of before the fork

    answer = client.get("/documents/20")
    assert answer.content == bytes(1_000_000)
    assert answer.headers["content-type"].startswith("text/plain")
    assert client.get("/documents/0").content == b"before the fork"

    assert client.delete("/documents/20").status_code == 200
    assert client.get("/documents/20").status_code == 404
    assert client.post("/documents/1000?fails=1", files={"file": ("a.txt", b"in vain")}).status_code == 500
    assert len(files_below(tmp_path / "files")) == count - 1
