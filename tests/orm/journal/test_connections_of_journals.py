"""The connections of journals beside those of an engine, on which tests of an application make many."""

from __future__ import annotations

import gc
import weakref

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from granite_storage.orm import StorageJournal
from tests.orm.databases import Database

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


async def test_a_closed_journal_is_not_kept() -> None:
    engine = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    journal = StorageJournal(engine)
    pool = weakref.ref(journal._pool)
    await journal.aclose()
    del journal
    gc.collect()
    assert pool() is None
    await engine.dispose()


@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
async def test_a_journal_that_was_dropped_is_closed_with_its_engine(database: Database) -> None:
    """A program may forget to close its journal, and SQLAlchemy says that disposing of an engine closes its connections."""
    engine = database.engine()
    journal = StorageJournal(engine)
    async with journal._pool.reading() as connection:
        opened = (await connection.get_raw_connection()).driver_connection
    del connection, journal
    gc.collect()
    await engine.dispose()
    assert opened.is_closed()


@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
async def test_what_an_application_does_as_a_transaction_begins(database: Database) -> None:
    """It may set a role or a tenant then, without which the journal's tables are not to be seen."""
    engine = database.engine()
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("SET LOCAL work_mem = '12345kB'"))
    journal = StorageJournal(engine)
    async with journal._pool.durable() as connection:
        assert await connection.scalar(text("SHOW work_mem")) == "12345kB"
    await journal.aclose()
    await engine.dispose()
