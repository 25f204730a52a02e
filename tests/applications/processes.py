"""Server programs of their own: started in a process group, awaited, and ended with every process of the group."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from tests.core.support import PROJECT

__all__ = ["Program", "running", "until"]

START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0


class Program:
    """A program that runs.

    Attributes:
        log: The file that takes its output.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def processes(self) -> list[psutil.Process]:
        """Return every process of its group."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def said(self) -> str:
        """Return its output so far."""
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def running(module: str, *arguments: str, log: Path, environment: Mapping[str, str]) -> Iterator[Program]:
    """Run `python -m module` until the block ends; fail if it has to be killed, or leaves a process behind.

    Args:
        module: The module.
        arguments: Its arguments.
        log: The file that takes its output.
        environment: Environment variables in addition to those of this process.
    """
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1", **environment}
    command = [sys.executable, "-m", module, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=log.parent, start_new_session=True
        )
    program = Program(process, log)
    try:
        yield program
        assert process.poll() is None, f"{module} has ended:\n{program.said()}"
        process.terminate()
        process.wait(STOP_TIMEOUT)
        until(lambda: not program.processes(), f"{module} has left processes:\n{program.said()}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], object], otherwise: str, timeout: float = START_TIMEOUT) -> None:
    """Wait until something is so, in a test that has no event loop."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
