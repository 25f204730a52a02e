"""The lines of code of the page that compares libraries are counted, and there are at most 30 of Granite Storage."""

from __future__ import annotations

import re

from tests.core.support import PROJECT

PAGE = (PROJECT / "docs/comparison.md").read_text()
BLOCK = re.compile(r"^## (.+?)\n+```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| \[(.+?)\]\(.*?\) \| (\d+) \|", re.MULTILINE)


def count(code: str) -> int:
    lines = [line.strip() for line in code.splitlines()]
    return sum(bool(line) and not line.startswith(("#", "import ", "from ")) for line in lines)


def test_the_table_says_how_many_there_are() -> None:
    counted = {name: count(code) for name, code in BLOCK.findall(PAGE)}
    assert {name: int(lines) for name, lines in ROW.findall(PAGE)} == counted
    assert len(counted) == 5
    assert counted["Granite Storage"] <= 30
