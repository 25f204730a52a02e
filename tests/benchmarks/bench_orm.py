"""What attachments cost: against the same rows with a JSON column and a direct put, and for sessions that have none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StorageBackend, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage
from tests.benchmarks.harness import Comparison, Contender, Meter, main

ROWS = 1000
WARM_UP = 100
PLAIN_ROWS = 5000
CONTENT = os.urandom(4096)


class Base(DeclarativeBase):
    pass


class Managed(Base):
    __tablename__ = "managed"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[Attachment | None] = attachment("files")


class Manual(Base):
    """The same row, by hand."""

    __tablename__ = "manual"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class Plain(Base):
    """A row that has nothing to do with files."""

    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


@asynccontextmanager
async def env(backend: str) -> AsyncIterator[tuple[async_sessionmaker[Any], StorageManager]]:
    with tempfile.TemporaryDirectory(prefix="granite-") as folder:
        engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/bench.db")
        store: StorageBackend = MemoryStorageBackend()
        if backend == "disk":
            store = LocalStorageBackend(Path(folder, "files"), fsync=False)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with StorageManager(backends={"b": store}, policies={"files": StoragePolicy("files", "b")}) as manager:
            yield async_sessionmaker(engine, expire_on_commit=False), manager
        await engine.dispose()


async def managed(meter: Meter, *, backend: str) -> None:
    """Insert rows with attachments, select them, and read their files."""
    async with env(backend) as (sessions, manager):
        binding = bind_storage(Base, manager)
        await use_attachments(sessions, range(WARM_UP))
        async with meter.measure(operations=ROWS, ticking=False):
            await use_attachments(sessions, range(WARM_UP, WARM_UP + ROWS))
        binding.unbind()


async def use_attachments(sessions: async_sessionmaker[Any], numbers: range) -> None:
    async with sessions.begin() as session:
        session.add_all([Managed(id=n, title=f"{n}", file=Attachment(CONTENT, filename=f"{n}.bin")) for n in numbers])
    async with sessions() as session:
        for row in await session.scalars(select(Managed).where(Managed.id >= numbers.start)):
            assert row.file is not None
            await row.file.read()


async def manual(meter: Meter, *, backend: str) -> None:
    """Put, insert refs as JSON, select them, and read the files: one after the other, and nothing is undone."""
    async with env(backend) as (sessions, manager):
        await put_by_hand(sessions, manager, range(WARM_UP))
        async with meter.measure(operations=ROWS, ticking=False):
            await put_by_hand(sessions, manager, range(WARM_UP, WARM_UP + ROWS))


async def put_by_hand(sessions: async_sessionmaker[Any], manager: StorageManager, numbers: range) -> None:
    async with sessions.begin() as session:
        for n in numbers:
            ref = await manager.put_bytes(
                storage_key="files",
                model_name="manual",
                entity_id=f"{n}",
                field_name="file",
                content=CONTENT,
                original_filename=f"{n}.bin",
            )
            session.add(Manual(id=n, title=f"{n}", file=ref.to_dict()))
    async with sessions() as session:
        for row in await session.scalars(select(Manual).where(Manual.id >= numbers.start)):
            assert row.file is not None
            await manager.get(StoredObjectRef.from_dict(row.file))


async def plain(meter: Meter, *, hooks: bool) -> None:
    """Insert, read, change and delete rows without files, a hundred in each transaction."""
    async with env("memory") as (sessions, manager):
        binding = bind_storage(Base, manager) if hooks else None
        await use_plain_rows(sessions, range(200))
        async with meter.measure(operations=PLAIN_ROWS, ticking=False):
            await use_plain_rows(sessions, range(200, 200 + PLAIN_ROWS))
        if binding is not None:
            binding.unbind()


async def use_plain_rows(sessions: async_sessionmaker[Any], numbers: range) -> None:
    for start in numbers[::100]:
        async with sessions.begin() as session:
            session.add_all([Plain(id=n + 1, title=f"{n}") for n in range(start, start + 100)])
        async with sessions.begin() as session:
            for row in await session.scalars(select(Plain).where(Plain.id > start)):
                row.title += "!"
        async with sessions.begin() as session:
            for row in await session.scalars(select(Plain).where(Plain.id > start, Plain.id <= start + 50)):
                await session.delete(row)


def rows(backend: str) -> Comparison:
    return Comparison(
        f"orm: {ROWS:,} rows with a file of 4 KiB, inserted and read, {backend}",
        {"attachments": Contender(managed, backend=backend), "JSON column and put_bytes": Contender(manual, backend=backend)},
        baseline="JSON column and put_bytes",
        reach=1 / 1.25,
    )


COMPARISONS = [
    rows("memory"),
    rows("disk"),
    Comparison(
        f"orm: {PLAIN_ROWS:,} rows without files",
        {"hooks on": Contender(plain, hooks=True), "hooks off": Contender(plain, hooks=False)},
        baseline="hooks off",
        reach=1 / 1.05,
        rounds=5,
    ),
]

if __name__ == "__main__":
    main(COMPARISONS)
