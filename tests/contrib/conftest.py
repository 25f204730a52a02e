"""The panels, and what they do on the event loop by themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster

from tests.contrib.panels import BOTH, PANELS, Panel, opened


@pytest.fixture(params=BOTH, ids="-".join)
async def panel(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Panel]:
    """Each panel with each kind of sessions."""
    name, kind = request.param
    async with opened(PANELS[name], kind, tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def _blocking_of_the_panel(_nothing_blocks: BlockBuster) -> None:
    """starlette-admin uses synchronous sessions on the event loop, where it finds rows and deletes them."""
    for name in ("execute", "fetchall", "fetchmany", "fetchone"):
        allowed = {"delete", "find_by_pk"}
        _nothing_blocks.functions[f"sqlite3.Cursor.{name}"].can_block_in("starlette_admin/contrib/sqla/view.py", allowed)
