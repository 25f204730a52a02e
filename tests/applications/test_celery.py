"""A real Celery worker with the prefork pool."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from kombu.transport import filesystem
from sqlalchemy import create_engine, text

from tests.applications.processes import Program, running, until

TASKS = "tests.applications.celery_app"
TIMEOUT = 60


@pytest.fixture
def worker(tmp_path: Path, database_url: str) -> Iterator[Program]:
    for name in ("queue", "results", "control"):
        (tmp_path / name).mkdir()
    options = ["--pool", "prefork", "--concurrency", "2", "--max-tasks-per-child", "8", "--loglevel", "INFO"]
    variables = {"APP_FOLDER": str(tmp_path), "DATABASE_URL": database_url}
    arguments = ["-A", TASKS, "worker", *options, "--without-gossip", "--without-mingle", "--without-heartbeat"]
    with running("celery", *arguments, log=tmp_path / "celery.log", environment=variables) as program:
        until(lambda: " ready." in program.said() or program.process.poll() is not None, "the worker does not start")
        yield program


@pytest.fixture
def client(tmp_path: Path, worker: Program, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    monkeypatch.setattr(filesystem.Channel, "_put", put_whole)
    queue = str(tmp_path / "queue")
    options = {"data_folder_in": queue, "data_folder_out": queue, "control_folder": str(tmp_path / "control")}
    backend = f"file://{tmp_path}/results"
    with Celery(broker="filesystem://", backend=backend, broker_transport_options=options, set_as_current=False) as client:
        yield client


def put_whole(channel: filesystem.Channel, queue: str, payload: object, **_: object) -> None:
    """Put a message that is there at once: celery's worker would take one that is only half written, and end."""
    message = Path(channel.data_folder_out) / f"{time.monotonic_ns()}.{queue}.msg"
    unfinished = message.with_suffix(".part")
    unfinished.write_text(json.dumps(payload))
    unfinished.rename(message)


def files(folder: Path) -> list[Path]:
    """Every file of the store, unfinished ones included."""
    return [path for path in (folder / "files").rglob("*") if path.is_file() and path.name != ".granite-storage"]


def test_tasks_keep_files_as_rows_do(client: Celery, worker: Program, tmp_path: Path, database_url: str) -> None:
    def call(name: str, *arguments: int) -> object:
        return client.send_task(f"{TASKS}.{name}", arguments).get(timeout=TIMEOUT, interval=0.05)

    sent = [client.send_task(f"{TASKS}.store", (number, number * 10_000)) for number in range(1, 21)]
    processes = {result.get(timeout=TIMEOUT, interval=0.05) for result in sent}
    assert len(processes) >= 2
    assert worker.process.pid not in processes
    assert call("read", 0) == len(b"before the fork")
    assert call("read", 20) == 200_000
    call("delete", 20)
    call("recover")
    with pytest.raises(ValueError, match="after the flush"):
        call("fail", 21)
    assert len(files(tmp_path)) == 20

    assert call("upload_too_slowly", 22) == "ended by the soft time limit"
    assert len(files(tmp_path)) == 20
    call("store", 23, 5)
    assert len(files(tmp_path)) == 21

    engine = create_engine(database_url)
    with engine.connect() as connection:
        numbers = connection.scalars(text("SELECT id FROM document ORDER BY id")).all()
        left = (
            connection.scalar(text("SELECT count(*) FROM granite_storage_intent WHERE kind = 'delete'"))
            if "postgres" in database_url
            else 0
        )
    engine.dispose()
    assert numbers == [*range(20), 23]
    assert left == 0
