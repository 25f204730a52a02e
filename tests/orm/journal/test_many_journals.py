"""Many journals on one engine, as tests of an application make them: disposing of it disposes of each journal's pool once."""

from __future__ import annotations

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from granite_storage.orm import StorageJournal

JOURNALS = 12


@pytest.mark.case("RB-08")
async def test_disposing_of_their_engine() -> None:
    engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    disposed: list[object] = []
    event.listen(engine.sync_engine, "engine_disposed", disposed.append)
    journals = [StorageJournal(engine) for _ in range(JOURNALS)]
    await engine.dispose()
    # The application's own listeners come along to the engine of each journal.
    assert len(disposed) == JOURNALS + 1
    assert len(set(map(id, disposed))) == JOURNALS + 1
    del journals
