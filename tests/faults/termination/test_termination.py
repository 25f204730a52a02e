"""A run of the tests that is ended leaves no server, no process and no folder behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.core.support import PROJECT
from tests.services import unavailable
from tests.watchdog import processes_of

ENDLESS = "tests/faults/termination/endless.py"
PATIENCE = 120.0


@dataclass(frozen=True)
class Run:
    """A run, and how it ends.

    Attributes:
        tests: Which of `endless.py`; the first one waits.
        servers: What it starts.
        number: The signal.
        code: The exit code.
        to_group: Whether the signal goes to all processes of the group, as a terminal sends it.
        workers: How many processes of pytest-xdist share the run; 0 for none.
        through_nox: Whether nox starts the run, and gets the signal.
    """

    tests: str
    servers: str
    number: signal.Signals
    code: int = int(pytest.ExitCode.INTERRUPTED)
    to_group: bool = False
    workers: int = 0
    through_nox: bool = False


_REPEATED = pytest.mark.exhaustive("the same signal as with workers or through nox, or as to the whole group")


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(Run("test_in_a_coroutine", "postgres seaweedfs moto", signal.SIGINT, to_group=True), id="Ctrl-C"),
        pytest.param(Run("test_in_a_call", "postgres seaweedfs", signal.SIGTERM), id="SIGTERM", marks=_REPEATED),
        pytest.param(
            Run("test_in_a_coroutine", "postgres", signal.SIGTERM, 128 + signal.SIGINT, workers=2, through_nox=True),
            id="SIGTERM-nox-workers",
        ),
        pytest.param(Run("test_that_swallows_its_cancellation test_after_it", "", signal.SIGTERM), id="SIGTERM-swallowed"),
        pytest.param(
            Run("test_in_a_call", "postgres seaweedfs", signal.SIGKILL, -signal.SIGKILL),
            id="SIGKILL",
            marks=pytest.mark.exhaustive("nobody ends a run so without being told to; the watchdog is the same as after SIGTERM"),
        ),
        pytest.param(Run("test_in_a_coroutine", "postgres", signal.SIGTERM, workers=2), id="SIGTERM-workers", marks=_REPEATED),
        pytest.param(
            Run("test_in_a_coroutine", "postgres seaweedfs", signal.SIGINT, to_group=True, workers=2),
            id="Ctrl-C-workers",
            marks=_REPEATED,
        ),
        pytest.param(
            Run("test_in_a_coroutine", "postgres seaweedfs", signal.SIGKILL, -signal.SIGKILL, workers=2),
            id="SIGKILL-workers",
            marks=_REPEATED,
        ),
    ],
)
def test_nothing_is_left(run: Run, tmp_path: Path) -> None:
    if run.through_nox and find_spec("nox") is None:
        unavailable("nox is missing")
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        process = _start(run, temporary, tmp_path)
        try:
            known = _wait_until_started(process, tmp_path, max(run.workers, 1))
            assert all(map(_is_running, known["pids"]))
            assert all(map(os.path.exists, known["folders"]))
            (os.killpg if run.to_group else os.kill)(process.pid, run.number)
            said, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == run.code, said
        _eventually(lambda: not processes_of(temporary), lambda: f"left: {processes_of(temporary)}\n{said}")
        assert not list(filter(_is_running, known["pids"]))
        assert not list(filter(os.path.exists, known["folders"]))
        assert not list(temporary.iterdir())


def _start(run: Run, temporary: Path, folder: Path) -> subprocess.Popen[str]:
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'base'}", f"-n{run.workers}"]
    program = ["nox", "--no-venv", "--no-install", "-s", "tests", "--"] if run.through_nox else ["pytest"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join([os.path.dirname(sys.executable), *filter(None, [os.environ.get("PATH")])])
    own = {"PATH": path, "TMPDIR": str(temporary), "GRANITE_STARTED": str(folder), "GRANITE_SERVERS": run.servers}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here would be ignored there as well
    try:
        return subprocess.Popen(
            [sys.executable, "-m", *program, *options, *(f"{ENDLESS}::{test}" for test in run.tests.split())],
            cwd=PROJECT,
            env={**kept, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def _is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _wait_until_started(process: subprocess.Popen[str], folder: Path, count: int) -> dict[str, list[Any]]:
    """Return the processes and the folders of all of a run's workers."""

    def said() -> str:
        process.kill()
        return process.communicate()[0]

    _eventually(lambda: process.poll() is not None or len(list(folder.glob("*.json"))) == count, said)
    assert process.poll() is None, said()
    told = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {name: [value for one in told for value in one[name]] for name in ("pids", "folders")}


def _eventually(condition: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)
