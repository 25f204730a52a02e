"""What the journal costs: attachments with it against without, on PostgreSQL, 64 sessions at a time."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables
from tests.benchmarks.harness import Comparison, Contender, Meter, main
from tests.orm.databases import postgres

SESSIONS = 64
ROWS = 1024
WARM_UP = 128
CONTENT = os.urandom(4096)


class Base(DeclarativeBase):
    pass


class Managed(Base):
    __tablename__ = "managed"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")


journal_tables(Base.metadata)


@asynccontextmanager
async def env(journaled: bool) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    with tempfile.TemporaryDirectory(prefix="granite-") as folder, postgres(Path(folder)) as url:
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"), pool_size=16, max_overflow=0)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        store = LocalStorageBackend(Path(folder, "files"), fsync=False)
        async with StorageManager(backends={"b": store}, policies={"files": StoragePolicy("files", "b")}) as manager:
            binding = bind_storage(Base, manager, journal=StorageJournal(engine) if journaled else None)
            yield async_sessionmaker(engine, expire_on_commit=False)
            binding.unbind()
        await engine.dispose()


async def insert(meter: Meter, *, journaled: bool) -> None:
    """Insert rows with a file, each in a transaction of its own."""
    async with env(journaled) as sessions:
        await each(sessions, range(WARM_UP), add)
        async with meter.measure(operations=ROWS):
            await each(sessions, range(WARM_UP, WARM_UP + ROWS), add)


async def replace(meter: Meter, *, journaled: bool) -> None:
    """Replace the files of rows, each in a transaction of its own; the old ones are deleted."""
    async with env(journaled) as sessions:
        await each(sessions, range(ROWS), add)
        await each(sessions, range(WARM_UP), change)
        async with meter.measure(operations=ROWS):
            await each(sessions, range(ROWS), change)


async def add(sessions: async_sessionmaker[AsyncSession], number: int) -> None:
    async with sessions.begin() as session:
        session.add(Managed(id=number, file=Attachment(CONTENT, filename="file.bin")))


async def change(sessions: async_sessionmaker[AsyncSession], number: int) -> None:
    async with sessions.begin() as session:
        (await session.get_one(Managed, number)).file = Attachment(CONTENT, filename="file.bin")


async def each(sessions: async_sessionmaker[AsyncSession], numbers: range, work: object) -> None:
    places = asyncio.Semaphore(SESSIONS)

    async def one(number: int) -> None:
        async with places:
            await work(sessions, number)  # type: ignore[operator]

    await asyncio.gather(*map(one, numbers))


def compared(title: str, work: object) -> Comparison:
    contenders = {
        "with a journal": Contender(work, journaled=True),  # type: ignore[arg-type]
        "without": Contender(work, journaled=False),  # type: ignore[arg-type]
    }
    return Comparison(title, contenders, baseline="without", reach=None)


COMPARISONS = [
    compared("inserts with a file, 64 sessions at a time, PostgreSQL", insert),
    compared("replaced files, 64 sessions at a time, PostgreSQL", replace),
]

if __name__ == "__main__":
    main(COMPARISONS)
