"""The pytest plugin of the runs: it checks which package is tested, and writes down which tests failed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import granite_storage

__all__ = ["REPORT"]

REPORT = "GRANITE_MUTANT_REPORT"
"""The environment variable that names the file to report to: a line of JSON for each failure, and one for the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test another package than the one of this copy, such as the installed one."""
    package = Path(str(granite_storage.__file__)).resolve()
    if not package.is_relative_to(config.rootpath.resolve()):
        raise pytest.UsageError(f"the tests of {config.rootpath} would test {package}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down a failure of a test, or of what is before or after it."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _write({"failed": report.nodeid, "message": str(getattr(crash, "message", report.longrepr))})
    elif report.passed and report.when == "call":
        _write({"passed": report.nodeid})


def _write(record: dict[str, str]) -> None:
    with Path(os.environ[REPORT]).open("a") as file:
        file.write(json.dumps(record) + "\n")
