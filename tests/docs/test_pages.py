"""The form of the documents: narrow code, headings that a sidebar can show, every page in the sidebar."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_documents import DOCUMENTS, ROOT

WIDTH = 88
"""Columns that a page of 1,280 pixels shows without a scroll bar."""

WIDTH_OF_REFERENCE = 84

BLOCK = re.compile(r"^ *```(?:\{(?:eval-rst|toctree)\}.*?|[^\n]*\n(.*?))^ *```$", re.MULTILINE | re.DOTALL)
TREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


NARROW = [path for path in DOCUMENTS if path.name != "comparison.md"]  # whose lines are counted, in several languages


@pytest.mark.parametrize("path", NARROW, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_narrow(path: Path) -> None:
    lines = [line for block in BLOCK.findall(path.read_text()) for line in block.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []


def code_of_docstrings(path: Path) -> Iterator[str]:
    """Yield the lines of code in the docstrings of a module, without their indentation."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            yield from (line for line in text.splitlines() if line.lstrip().startswith(">>>"))
            yield from (line for block in BLOCK.findall(text) for line in block.splitlines())


def test_code_in_docstrings_is_narrow() -> None:
    """The reference indents it below its class and its method."""
    modules = sorted((ROOT / "granite_storage").rglob("*.py"))
    assert [line for path in modules for line in code_of_docstrings(path) if len(line.strip()) > WIDTH_OF_REFERENCE] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_headings_are_nouns_that_can_be_found(path: Path) -> None:
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    assert [heading for heading in headings if heading.startswith("What ")] == []


def test_the_sidebar_has_five_groups_and_every_page() -> None:
    trees = TREE.findall((ROOT / "docs/index.md").read_text())
    captions = [re.findall(r":caption: (.*)", tree)[0] for tree in trees]
    assert captions == ["Start", "How-to", "Operate", "Explain", "Reference"]
    listed = {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert listed == pages | {"api/index", "decisions/index", "tutorial/index"}
