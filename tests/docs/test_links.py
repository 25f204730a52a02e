"""Relative links of the documents lead to files and headings that exist; Sphinx checks those below `docs` only."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from granite_storage._documentation import DOCUMENTATION, Page
from tests.docs.test_documents import DOCUMENTS, ROOT

BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and MyST form them."""
    headings = HEADING.findall(BLOCK.sub("", path.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    links = LINK.findall(BLOCK.sub("", path.read_text()))
    targets = [((path.parent / name).resolve() if name else path, anchor) for name, anchor in links]
    assert [str(target) for target, _ in targets if not target.is_file()] == []
    assert [anchor for target, anchor in targets if anchor and anchor not in anchors_of(target)] == []


@pytest.mark.parametrize("page", Page, ids=lambda page: page.name)
def test_errors_lead_to_pages_and_headings(page: Page) -> None:
    name, _, anchor = page.value.partition("#")
    path = ROOT / "docs" / Path(name).with_suffix(".md")
    assert path.is_file()
    assert not anchor or anchor in anchors_of(path)
    assert page.url == f"{DOCUMENTATION}{page.value}"


def test_every_page_of_the_errors_is_used() -> None:
    source = "\n".join(path.read_text() for path in sorted((ROOT / "granite_storage").rglob("*.py")))
    assert [page.name for page in Page if f"Page.{page.name}" not in source] == []


def test_the_documentation_has_one_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["urls"]["Documentation"] == DOCUMENTATION
    addresses = re.findall(r"https://[\w.-]*readthedocs[\w./]*", (ROOT / "pyproject.toml").read_text())
    assert [address for address in addresses if not address.startswith(DOCUMENTATION)] == []
