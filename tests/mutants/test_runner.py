"""The runner tells a mutant that a test notices from one that none does, and trusts only tests that pass without an edit."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.mutants import plugin
from tests.mutants.mutant import Mutant, MutantError, edit, problems_of
from tests.mutants.runner import Runner, Verdict

RULE = """\
def is_too_large(size):
    while size < 0:
        size += 1
    return size > 3
"""
TESTS = """\
from granite_storage.rule import is_too_large

def test_limit():
    assert is_too_large(4)
    assert not is_too_large(-3)

def test_other_limit():
    assert is_too_large(5)

def test_that_always_fails():
    raise AssertionError("it fails anyway")
"""


def mutant(name: str, old: str, new: str, test: str = "test_limit") -> Mutant:
    return Mutant(name, "A rule.", "granite_storage/rule.py", old, new, (f"tests/test_rule.py::{test}",))


NOTICED = mutant("noticed", "> 3", "> 4")
UNNOTICED = mutant("unnoticed", "> 3", "> 4", "test_other_limit")
ENDLESS = mutant("endless", "size += 1", "pass")
UNTESTED = mutant("untested", "> 3", "> 4", "test_that_is_not_there")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one rule."""
    root = tmp_path / "project"
    files = {
        "granite_storage/__init__.py": "",
        "granite_storage/rule.py": RULE,
        "tests/test_rule.py": TESTS,
        "tests/mutants/plugin.py": Path(plugin.__file__).read_text(),
        "pyproject.toml": '[tool.pytest.ini_options]\nasyncio_default_fixture_loop_scope = "function"\npythonpath = ["."]\n',
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git = shutil.which("git")
    assert git is not None
    subprocess.run([git, "init", "--quiet", str(root)], check=True)
    return root


@pytest.fixture
def runner(project: Path, tmp_path: Path) -> Runner:
    """A runner of that project, with a short timeout."""
    (tmp_path / "m").mkdir()
    runner = Runner(project, tmp_path / "m", test_timeout=1)
    runner.copy()
    return runner


def test_what_becomes_of_mutants(runner: Runner, project: Path) -> None:
    mutants = [NOTICED, UNNOTICED, ENDLESS, UNTESTED]
    results = {mutant.name: result for mutant, result in runner.run(mutants, 2)}
    assert {name: result.verdict for name, result in results.items()} == {
        "noticed": Verdict.KILLED,
        "unnoticed": Verdict.SURVIVED,
        "endless": Verdict.KILLED_BY_TIMEOUT,
        "untested": Verdict.INVALID,
    }
    assert results["noticed"].failed == ("tests/test_rule.py::test_limit",)
    assert (project / "granite_storage/rule.py").read_text() == RULE


def test_an_interrupt_leaves_nothing_running(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    folder.mkdir()
    runner = Runner(project, folder)
    runner.copy()
    interrupt = threading.Timer(2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), closing(runner.run([ENDLESS, ENDLESS], 2)) as results:
            interrupt.start()
            list(results)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])] == []
    assert [path.name for path in folder.iterdir()] == ["original"]


def test_tests_that_fail_anyway_are_told(runner: Runner) -> None:
    (broken,) = runner.check_tests([NOTICED, mutant("any", "> 3", "> 4", "test_that_always_fails")], 1)
    assert broken.failed == ("tests/test_rule.py::test_that_always_fails",)
    assert "it fails anyway" in broken.message


@pytest.mark.parametrize("old", ["size", "length"], ids=["twice", "gone"])
def test_an_edit_that_does_not_fit_is_told(project: Path, old: str) -> None:
    unfit = mutant("unfit", old, "number")
    with pytest.raises(MutantError, match=r"unfit: granite_storage/rule.py holds its old text \d times"):
        edit(unfit, project)
    assert len(problems_of([unfit, NOTICED, mutant("no Python", "return", "return return")], project)) == 2


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(MutantError, match=r"noticed: granite_storage/rule\.py cannot be read"):
        edit(NOTICED, tmp_path)
