"""Code in the documents is at most 88 columns wide, so that a page of 1,280 pixels shows it without a scroll bar."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.test_documents import DOCUMENTS, ROOT

WIDTH = 88
BLOCK = re.compile(r"^ *```(?!\{eval-rst\}|\{toctree\})[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_narrow(path: Path) -> None:
    lines = [line for block in BLOCK.findall(path.read_text()) for line in block.splitlines()]
    assert [line for line in lines if len(line) > WIDTH] == []
