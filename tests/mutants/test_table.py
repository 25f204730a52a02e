"""The table fits the code: each edit can be applied, and each test that it names is there."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from granite_storage.testing import BackendConformance
from tests.mutants.mutant import problems_of
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]
LEAST = 44


def test_there_are_enough_and_no_two_have_one_name() -> None:
    assert len(MUTANTS) >= LEAST
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_each_edit_fits_the_code() -> None:
    assert problems_of(MUTANTS, ROOT) == []
    assert [mutant.name for mutant in MUTANTS if mutant.new == mutant.old] == []


def test_each_names_a_rule_and_tests_that_are_there() -> None:
    assert [mutant.name for mutant in MUTANTS if not (mutant.rule.endswith(".") and mutant.tests)] == []
    assert [test for mutant in MUTANTS for test in mutant.tests if not is_there(test)] == []


@pytest.mark.exhaustive("it collects all tests of the default tier in a process of its own")
def test_each_is_noticed_in_the_default_tier() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GRANITE_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=240).stdout
    default = listed.splitlines()
    missing = [test for mutant in MUTANTS for test in mutant.tests if not any(is_of(case, test) for case in default)]
    assert missing == []


def is_of(case: str, test: str) -> bool:
    """Tell whether a case is one of those that pytest runs for an argument."""
    return case == test or case.startswith((f"{test}::", f"{test}["))


def is_there(test: str) -> bool:
    """Tell whether there is a test of this name; which parameters it has, only a run can tell."""
    path, *names = test.partition("[")[0].split("::")
    return "::".join(names) in names_in(path)


@functools.cache
def names_in(path: str) -> frozenset[str]:
    """Return what can be named of a file: itself, its tests, and its classes with their tests, those of the public suite too."""
    found = {""}
    for node in ast.parse((ROOT / path).read_text()).body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.add(node.name)
            case ast.ClassDef():
                own = [item.name for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
                inherited = dir(BackendConformance) if node.bases else []
                found |= {node.name, *(f"{node.name}::{name}" for name in [*own, *inherited])}
    return frozenset(found)
