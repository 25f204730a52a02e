"""A program beside a run of the tests: once the run is over, however it ended, it stops and removes what the run has left.

It reads the path of the run's temporary folder from its standard input, which ends with the run. What belongs to a run is known
by that folder: its files are in it, and the processes that it started have it as their `TMPDIR`, or work in it. So nothing has to
be registered, and a server that has made itself a daemon is found too.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from pathlib import Path

import psutil

__all__ = ["processes_of"]

_GRACE = 5.0
"""How long a process may take to end, in seconds."""


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a folder or below, or have their temporary files there."""
    return [process for process in psutil.process_iter() if _belongs_to(process, folder)]


def _belongs_to(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
        places = process.cwd(), process.environ().get("TMPDIR")
        return any(place and Path(place).is_relative_to(folder) for place in places)
    return False


def _clean(folder: Path) -> None:
    # PostgreSQL leaves shared memory behind where it is killed at once.
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        left = processes_of(folder)
        if not left:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(left, _GRACE)
    shutil.rmtree(folder, ignore_errors=True)


def _main() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    folder = sys.stdin.readline().strip()
    sys.stdin.read()
    if folder:
        _clean(Path(folder))


if __name__ == "__main__":
    _main()
