"""A base, a storage with policies that stand in each other's way, and the means to make orphans in it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ForeignKey, String, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    StorageBinding,
    StorageGarbageCollector,
    StorageJournal,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    StoredObjectRefType,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.gc import GarbageCollectionReport
from granite_storage.testing import FaultInjectingBackend
from tests.orm.databases import Database

__all__ = ["POLICIES", "AgedBackend", "Base", "Crate", "Drum", "GcEnvironment", "Keg", "file", "gc_environment"]


class Base(DeclarativeBase):
    pass


class Crate(Base):
    """A managed column, a plain one, and a mark of deletion; the root of two kinds of inheritance."""

    __tablename__ = "gc_crate"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    deleted: Mapped[bool] = mapped_column(default=False)
    file: Mapped[Attachment | None] = attachment("docs")
    scan: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "crate"}


class Keg(Crate):
    """Shares the table of its parent."""

    label: Mapped[Attachment | None] = attachment("docs", nullable=True)
    __mapper_args__ = {"polymorphic_identity": "keg"}


class Drum(Crate):
    """Has a table of its own beside its parent's."""

    __tablename__ = "gc_drum"
    id: Mapped[int] = mapped_column(ForeignKey("gc_crate.id", ondelete="CASCADE"), primary_key=True)
    seal: Mapped[Attachment | None] = attachment("docs")
    __mapper_args__ = {"polymorphic_identity": "drum"}


journal_tables(Base.metadata)

POLICIES = {
    "docs": StoragePolicy("docs", "store", key_prefix="docs"),
    "docs2": StoragePolicy("docs2", "store", key_prefix="docs2"),
    "nested": StoragePolicy("nested", "store", key_prefix="docs/private"),
    "bare": StoragePolicy("bare", "store"),
}


def file(content: str = "content") -> Attachment:
    """Return a pending attachment."""
    return Attachment(content.encode(), filename="a.txt")


class AgedBackend(MemoryStorageBackend):
    """Objects in memory, in the clock of whose store time passes only when a test says so.

    Attributes:
        passed: How far that clock is ahead of this machine's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed = timedelta(0)

    async def now(self) -> datetime:
        return datetime.now(UTC) + self.passed


@dataclass
class GcEnvironment:
    """What a test has to do with."""

    database: Database
    engine: AsyncEngine
    aged: AgedBackend
    store: FaultInjectingBackend
    manager: StorageManager
    sessions: async_sessionmaker[AsyncSession]
    journal: StorageJournal | None
    binding: StorageBinding

    def collector(self, *, max_deleted_share: float = 1.0, **options: Any) -> StorageGarbageCollector:
        if "iter_references" not in options:
            options.setdefault("binding", self.binding)
        return StorageGarbageCollector(self.manager, max_deleted_share=max_deleted_share, **options)

    async def collect(self, storage_key: str = "docs", *, dry_run: bool = False, **options: Any) -> GarbageCollectionReport:
        return await self.collector().collect(storage_key=storage_key, dry_run=dry_run, **options)

    def age(self, hours: float = 48) -> None:
        """Let time pass for all objects."""
        self.aged.passed += timedelta(hours=hours)

    async def orphan(self, storage_key: str = "docs", content: bytes = b"orphan") -> StoredObjectRef:
        """Store an object that no row refers to."""
        return await self.manager.put_bytes(
            storage_key=storage_key, model_name="m", entity_id="1", field_name="f", content=content, original_filename="o.txt"
        )

    async def add(self, *rows: Any) -> None:
        async with self.sessions.begin() as session:
            session.add_all(rows)

    async def sql(self, statement: str, **values: Any) -> None:
        """Run SQL past every session."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)

    async def locations(self) -> set[str]:
        """Return where the storage has objects."""
        return {info.location async for info in self.aged.iter_objects()}

    async def location_of(self, number: int, name: str = "file") -> str:
        """Return where the object of a crate is."""
        async with self.sessions() as session:
            value = getattr(await session.get_one(Crate, number), name)
            return (value if isinstance(value, StoredObjectRef) else value.ref).location


@contextlib.asynccontextmanager
async def gc_environment(
    database: Database, *, journaled: bool = False, backend: Any = None, policies: Any = None, **options: Any
) -> AsyncIterator[GcEnvironment]:
    """Give an environment; keyword arguments go to the engine."""
    async with database.opened(Base.metadata, **options) as engine:
        aged = AgedBackend() if backend is None else backend
        store = FaultInjectingBackend(aged)
        manager = StorageManager(backends={"store": store}, policies=POLICIES if policies is None else policies)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        journal = StorageJournal(engine) if journaled else None
        binding = bind_storage(Base, manager, session_factory=sessions, journal=journal)
        try:
            yield GcEnvironment(database, engine, aged, store, manager, sessions, journal, binding)
        finally:
            binding.unbind()
            await manager.aclose()
            if journal is not None:
                await journal.aclose()
