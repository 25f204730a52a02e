"""Applies mutants to copies of the project, and runs the tests that must notice."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.mutants.mutant import Mutant, edit
from tests.mutants.plugin import REPORT

__all__ = ["Result", "Runner", "Verdict"]

_PLUGINS = ("no:cacheprovider", "pytest_asyncio.plugin", "pytest_timeout", "tests.mutants.plugin")
_PYTEST = ("-q", "-o", "addopts=--import-mode=importlib", *(part for plugin in _PLUGINS for part in ("-p", plugin)))
_TEST_TIMEOUT = 60
_RUN_TIMEOUT = 300.0
_UNEDITED = 5
"""How many times as long the tests may take without an edit: all of them run at once, and should pass."""
_CLEANUP_TIMEOUT = 30.0


class Verdict(Enum):
    """What became of a mutant."""

    KILLED = "killed"
    KILLED_BY_TIMEOUT = "timed out"
    SURVIVED = "survived"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Result:
    """What a run of tests came to.

    Attributes:
        verdict: What became of the mutant; of a run without one, `SURVIVED` where all tests passed.
        seconds: How long it took.
        failed: The tests that failed.
        message: What the first of them said, or why there was no answer.
    """

    verdict: Verdict
    seconds: float
    failed: tuple[str, ...] = ()
    message: str = ""


class Runner:
    """Runs tests in copies of a project.

    Args:
        root: The project.
        folder: An empty folder for the copies; the caller removes it.
        test_timeout: The longest that a test may take, in seconds: a hang counts as noticed.
        run_timeout: The longest that all tests of a mutant may take, in seconds. Without an edit both are five times as long.
    """

    def __init__(
        self, root: Path, folder: Path, *, test_timeout: float = _TEST_TIMEOUT, run_timeout: float = _RUN_TIMEOUT
    ) -> None:
        self._root = root
        self._folder = folder
        self._test_timeout = test_timeout
        self._run_timeout = run_timeout
        self._original = folder / "original"
        self._numbers = itertools.count()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def copy(self) -> None:
        """Copy the project: what Git tracks, and new files that it does not ignore."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=self._root, capture_output=True, check=True).stdout.decode()
        for name in filter(None, listed.split("\0")):
            source, target = self._root / name, self._original / name
            if source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    def check_tests(self, mutants: Sequence[Mutant], jobs: int) -> list[Result]:
        """Run all tests of some mutants on the copy without any edit; return what went wrong.

        A mutant is killed by a test that fails because of it, and by no test that fails anyway.
        """
        files: dict[str, dict[str, None]] = {}
        for test in (test for mutant in mutants for test in mutant.tests):
            files.setdefault(test.partition("::")[0], {})[test] = None
        shares: list[list[str]] = [[] for _ in range(jobs)]
        for tests in sorted(files.values(), key=len, reverse=True):
            min(shares, key=len).extend(tests)
        shares = [share for share in shares if share]
        with self._workers(jobs) as pool:
            runs = [pool.submit(self._run, self._original, share, (), _UNEDITED) for share in shares]
            return [result for run in runs if (result := run.result()).verdict is not Verdict.SURVIVED]

    def run(self, mutants: Sequence[Mutant], jobs: int) -> Generator[tuple[Mutant, Result], None, None]:
        """Yield what becomes of each mutant, in their order."""
        with self._workers(jobs) as pool:
            yield from zip(mutants, pool.map(self._run_mutant, mutants), strict=True)

    def _run_mutant(self, mutant: Mutant) -> Result:
        copy = self._new_folder()
        try:
            shutil.copytree(self._original, copy)
            edited = copy / mutant.path
            edited.write_text(edit(mutant, copy))
            for compiled in edited.parent.glob(f"__pycache__/{edited.stem}.*"):
                compiled.unlink()  # it would pass for the edited file's, if that was as long and as old
            return self._run(copy, mutant.tests, ["-x"], 1)
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _new_folder(self) -> Path:
        """Return a path that is short: tests put sockets below it."""
        return self._folder / f"{next(self._numbers)}"

    def _run(self, copy: Path, tests: Sequence[str], options: Sequence[str], times: int) -> Result:
        own = self._new_folder()
        own.mkdir()
        try:
            return self._run_pytest(copy, own, tests, options, times)
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _run_pytest(self, copy: Path, own: Path, tests: Sequence[str], options: Sequence[str], times: int) -> Result:
        report, output = own / "report", own / "output"
        # Where CI is set, a service that is missing fails its tests: one that is skipped notices nothing.
        environment = os.environ | {"PYTHONPATH": str(copy), "TMPDIR": str(own), "CI": "1", REPORT: str(report)}
        # The plugins that happen to be installed take longer to import than most runs take.
        environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        command = [sys.executable, "-m", "pytest", *_PYTEST, f"--timeout={times * self._test_timeout}"]
        command += [f"--basetemp={own / 'tests'}", *options, *tests]
        start = time.monotonic()
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        self._running.add(process)
        try:
            code: int | None = process.wait(times * self._run_timeout if not self._stopped else 0)
        except subprocess.TimeoutExpired:
            code = None
            end(process)
        finally:
            self._running.discard(process)
        seconds = time.monotonic() - start
        if self._stopped:
            raise KeyboardInterrupt
        records = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        failures = [record for record in records if "failed" in record]
        passed = [record["passed"] for record in records if "passed" in record]
        skipped = [test for test in tests if not any(_is_of(item, test) for item in passed)]
        verdict = _verdict(code, failures, skipped)
        if verdict is Verdict.INVALID:
            last = "\n".join(output.read_text(errors="replace").splitlines()[-20:])
            message = f"pytest ended with {code}, and these were not run: {', '.join(skipped) or 'none'}\n{last}"
        else:
            message = failures[0]["message"] if failures else "pytest did not end" if code is None else ""
        return Result(verdict, seconds, tuple(dict.fromkeys(record["failed"] for record in failures)), message)

    @contextlib.contextmanager
    def _workers(self, jobs: int) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                yield pool
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    end(process)
                raise


def end(process: subprocess.Popen[bytes]) -> None:
    """End pytest with what it has started: its fixtures first get the time to stop their servers."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_CLEANUP_TIMEOUT)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_of(nodeid: str, test: str) -> bool:
    """Tell whether a test is one of those that pytest runs for an argument."""
    return nodeid == test or nodeid.startswith((f"{test}::", f"{test}["))


def _verdict(code: int | None, failures: Sequence[dict[str, str]], skipped: Sequence[str]) -> Verdict:
    """Judge a run: a test that cannot be found or collected, or is skipped, has not noticed anything."""
    if code is None or (code == 1 and failures and "Timeout" in failures[0]["message"].partition("\n")[0]):
        return Verdict.KILLED_BY_TIMEOUT
    if code == 1 and failures:
        return Verdict.KILLED
    return Verdict.SURVIVED if code == 0 and not skipped else Verdict.INVALID
