"""What a synchronous session costs: rows with a file through `Session`, against `AsyncSession`, with psycopg on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables
from tests.benchmarks.harness import Comparison, Contender, Meter, main
from tests.orm.databases import postgres

ROWS = 1000
WARM_UP = 100
CONTENT = os.urandom(4096)


class Base(DeclarativeBase):
    pass


class Managed(Base):
    __tablename__ = "managed"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")


journal_tables(Base.metadata)


@asynccontextmanager
async def database() -> AsyncIterator[tuple[AsyncEngine, StorageManager]]:
    """Give an engine on empty tables, and a manager in memory: what is left is what the hooks and the bridge cost."""
    with tempfile.TemporaryDirectory(prefix="granite-") as folder, postgres(Path(folder)) as url:
        engine = create_async_engine(url.set(drivername="postgresql+psycopg"))
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        store = MemoryStorageBackend()
        async with StorageManager(backends={"b": store}, policies={"files": StoragePolicy("files", "b")}) as manager:
            yield engine, manager
        await engine.dispose()


async def asynchronous(meter: Meter, *, journaled: bool, together: int) -> None:
    async with database() as (engine, manager):
        journal = StorageJournal(engine) if journaled else None
        binding = bind_storage(Base, manager, journal=journal)
        sessions = async_sessionmaker(engine)

        async def insert(rows: int) -> None:
            for _ in range(0, rows, together):
                async with sessions.begin() as session:
                    session.add_all([Managed(file=Attachment(CONTENT)) for _ in range(together)])

        await insert(WARM_UP)
        async with meter.measure(operations=ROWS, ticking=False):
            await insert(ROWS)
        binding.unbind()
        if journal is not None:
            await journal.aclose()


async def synchronous(meter: Meter, *, journaled: bool, together: int) -> None:
    async with database() as (async_engine, manager):
        engine = create_engine(async_engine.url)
        journal = StorageJournal(engine) if journaled else None
        binding = bind_storage(Base, manager, journal=journal)
        sessions: sessionmaker[Session] = sessionmaker(engine)

        def insert(rows: int) -> None:
            for _ in range(0, rows, together):
                with sessions.begin() as session:
                    session.add_all([Managed(file=Attachment(CONTENT)) for _ in range(together)])

        await asyncio.to_thread(insert, WARM_UP)
        async with meter.measure(operations=ROWS, ticking=False):
            await asyncio.to_thread(insert, ROWS)
        binding.unbind()
        if journal is not None:
            await journal.aclose()
        engine.dispose()


def comparison(what: str, *, journaled: bool, together: int) -> Comparison:
    return Comparison(
        f"sync: {ROWS:,} rows with a file of 4 KiB, {what}",
        {
            "Session": Contender(synchronous, journaled=journaled, together=together),
            "AsyncSession": Contender(asynchronous, journaled=journaled, together=together),
        },
        baseline="AsyncSession",
        reach=0.8,
    )


COMPARISONS = [
    comparison("one in each transaction", journaled=False, together=1),
    comparison("a hundred in each transaction", journaled=False, together=100),
    comparison("one in each transaction, with a journal", journaled=True, together=1),
    comparison("a hundred in each transaction, with a journal", journaled=True, together=100),
]

if __name__ == "__main__":
    main(COMPARISONS)
