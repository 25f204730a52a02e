"""Relative links of the documents lead to files and headings that exist; Sphinx checks those below `docs` only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
