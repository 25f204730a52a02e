"""What a panel does on the event loop by itself."""

from __future__ import annotations

import pytest
from blockbuster import BlockBuster


@pytest.fixture(autouse=True)
def _blocking_of_the_panel(_nothing_blocks: BlockBuster) -> None:
    """starlette-admin fetches the rows of synchronous sessions on the event loop, also when the file of one is asked for."""
    for name in ("sqlite3.Cursor.fetchall", "sqlite3.Cursor.fetchmany", "sqlite3.Cursor.fetchone"):
        _nothing_blocks.functions[name].can_block_in("starlette_admin/contrib/sqla/view.py", {"find_by_pk"})
