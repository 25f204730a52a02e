"""The end of a run, however it comes: SIGTERM ends it as Ctrl-C does, and a watchdog cleans up where the run itself could not."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests import watchdog

__all__ = ["configure", "temporary_folder"]


def configure(config: pytest.Config) -> None:
    """Let SIGTERM end the run as Ctrl-C does: fixtures are finalized and the report is written."""
    if threading.current_thread() is threading.main_thread():
        config.pluginmanager.register(_Terminable(), "granite-termination")


class _Terminable:
    _is_ending = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        self._before = signal.signal(signal.SIGTERM, self._terminate)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self._is_ending = True

    def pytest_unconfigure(self) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._is_ending:  # fixtures are finalized now, and are not to be interrupted
            return
        self._session.shouldstop = "ended by SIGTERM"  # where a test swallows the interruption
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # a shell's background jobs are started without
            interrupt = signal.default_int_handler
        interrupt(number, frame)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give `tempfile` and child processes a folder of this run; it goes with all that is in it, and so does what works in it."""
    command = [sys.executable, "-I", watchdog.__file__]
    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True
        ) as process,
        tempfile.TemporaryDirectory(prefix="granite-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert process.stdin is not None
        process.stdin.write(f"{folder}\n".encode())
        process.stdin.flush()
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)
