"""Apply each mutant of the table to a copy of the project, run the tests that must notice, and print which mutants died.

    python -m tests.mutants [NAME ...] [--jobs 2] [--timeout 60] [--list]

A name may be a pattern, such as `journal-*`. The exit code is 1 where a mutant survives: then a test is missing. It is 2 where
the table does not fit the code, or a test fails without any edit.

To add a mutant, add an entry to the module of its room: a name, the rule in one sentence, the file, a short and distinctive text
that stands in it exactly once, the text to put in its place, and the narrowest tests that must notice, quick ones first. The edit
should be what a careless change would be: a condition left out, a line moved or removed, a wrong operator. Run it by its name.

After a refactoring, `tests/mutants/test_table.py` names the mutants whose text is gone; each is then rewritten for the new
code, so that it breaks the same rule. A mutant is removed only with its rule.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import NoReturn

from tests.mutants.mutant import Mutant, problems_of
from tests.mutants.runner import Result, Runner, Verdict
from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parents[2]
_LONGEST_MESSAGE = 160


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    given = _parser().parse_args(arguments)
    mutants = _chosen(given.names)
    if given.list:
        for mutant in mutants:
            print(f"{mutant.name:40} {mutant.rule}")
        return 0
    problems = problems_of(MUTANTS, ROOT)
    if problems:
        print(*problems, sep="\n")
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="m-", ignore_cleanup_errors=True) as folder:
            return _run(Runner(ROOT, Path(folder), test_timeout=given.timeout), mutants, given.jobs)
    except KeyboardInterrupt:
        print("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which mutants, such as 'journal-*'; all by default")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="how many run side by side")
    parser.add_argument(
        "--timeout", type=float, default=60, help="how long a test may take, in seconds; a hang counts as noticed"
    )
    parser.add_argument("--list", action="store_true", help="print the names and rules, and run nothing")
    return parser


def _chosen(names: list[str]) -> list[Mutant]:
    found = [mutant for mutant in MUTANTS if not names or any(fnmatch.fnmatchcase(mutant.name, name) for name in names)]
    if not found:
        sys.exit(f"no mutant is named {' or '.join(names)}; --list prints all")
    return found


def _run(runner: Runner, mutants: list[Mutant], jobs: int) -> int:
    start = time.monotonic()
    runner.copy()
    broken = runner.check_tests(mutants, jobs)
    for result in broken:
        print("without any edit:", *result.failed, result.message, sep="\n  ")
    if broken:
        print("these tests must pass before a mutant can be judged by them")
        return 2
    print(f"all tests pass without an edit ({time.monotonic() - start:.0f} s)", flush=True)
    verdicts: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    with closing(runner.run(mutants, jobs)) as results:
        for mutant, result in results:
            verdicts[result.verdict].append(mutant.name)
            print(_line(mutant, result), flush=True)
    died = verdicts[Verdict.KILLED] + verdicts[Verdict.KILLED_BY_TIMEOUT]
    print(f"{len(died)} of {len(mutants)} mutants died in {time.monotonic() - start:.0f} s", end="")
    for verdict in (Verdict.KILLED_BY_TIMEOUT, Verdict.SURVIVED, Verdict.INVALID):
        print(f"; {verdict.value}: {', '.join(verdicts[verdict])}" if verdicts[verdict] else "", end="")
    print()
    if verdicts[Verdict.INVALID]:
        return 2
    return 1 if verdicts[Verdict.SURVIVED] else 0


def _line(mutant: Mutant, result: Result) -> str:
    line = f"{result.verdict.value:9}  {mutant.name:40} {result.seconds:4.0f} s  "
    match result.verdict:
        case Verdict.SURVIVED:
            return f"{line}no test noticed: {mutant.rule}"
        case Verdict.INVALID:
            return f"{line}{result.message}"
        case _:
            message = result.message.partition("\n")[0]
            return f"{line}{result.failed[0] if result.failed else 'the run'}: {message[:_LONGEST_MESSAGE]}"


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
