"""Models and two backends for the tests of verification, migration and the command line."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import String, event, select, text, type_coerce
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, with_loader_criteria

from granite_storage import (
    Attachment,
    StorageBinding,
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
from granite_storage.orm.journal.tables import clock
from granite_storage.refs import iter_refs
from granite_storage.testing import FaultInjectingBackend
from tests.orm.databases import Database

__all__ = ["Base", "MigrationEnvironment", "Parcel", "Shelf", "file", "give_variants", "hide_deleted", "migration_environment"]


class Base(DeclarativeBase):
    pass


class Shelf(Base):
    """Two managed columns, a plain one, a mark of deletion, and a column that each UPDATE changes."""

    __tablename__ = "migration_shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100), default="")
    deleted: Mapped[bool] = mapped_column(default=False)
    version: Mapped[int] = mapped_column(default=1, onupdate=2)
    file: Mapped[Attachment | None] = attachment("docs")
    other: Mapped[Attachment | None] = attachment("docs")
    scan: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)


class Parcel(Base):
    """A composite primary key, one part of it a UUID, and a policy of its own."""

    __tablename__ = "migration_parcel"
    owner: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    number: Mapped[str] = mapped_column(String(20), primary_key=True)
    file: Mapped[Attachment | None] = attachment("parcels")


journal_tables(Base.metadata)


def file(content: str | bytes = b"content", filename: str | None = "report.txt") -> Attachment:
    """Return a pending attachment."""
    return Attachment(content.encode() if isinstance(content, str) else content, filename=filename)


@contextlib.contextmanager
def hide_deleted() -> Any:
    """Hide soft-deleted rows from every ORM query, as applications do."""

    def hide(state: Any) -> None:
        if state.is_select:
            state.statement = state.statement.options(with_loader_criteria(Shelf, Shelf.deleted.is_(False)))

    event.listen(Session, "do_orm_execute", hide)
    try:
        yield
    finally:
        event.remove(Session, "do_orm_execute", hide)


async def give_variants(env: MigrationEnvironment, number: int, **contents: bytes) -> StoredObjectRef:
    """Give the file of a shelf variants, as a worker does: past every session. Return its ref."""
    async with env.sessions() as session:
        held = (await session.get_one(Shelf, number)).file
    assert held is not None
    variants = dict(held.ref.variants or {})
    for name, content in contents.items():
        stored = await env.manager.put_bytes(
            storage_key="docs", model_name="migration_shelf", entity_id=str(number), field_name="file", content=content
        )
        variants[name] = StoredObjectRef.from_dict({**stored.to_dict(), "recipe": f"digest of {name}", "made_at": "today"})
    ref = held.ref.with_variants(variants)
    await env.set_raw(number, json.dumps(ref.to_dict()))
    return ref


@dataclass
class MigrationEnvironment:
    """What a test has to do with."""

    database: Database
    engine: AsyncEngine
    old: FaultInjectingBackend
    new: FaultInjectingBackend
    sessions: async_sessionmaker[AsyncSession]
    journal: StorageJournal | None
    binding: StorageBinding = field(init=False)
    managers: list[StorageManager] = field(default_factory=list)

    @property
    def manager(self) -> StorageManager:
        return self.managers[-1]

    def write_to(self, backend: str, **policy: Any) -> StorageBinding:
        """Bind the base again, with policies that write to a backend, as a deployment does."""
        if self.managers:
            self.binding.unbind()
        policies = {key: StoragePolicy(key, backend, **policy) for key in ("docs", "parcels")}
        self.managers.append(StorageManager(backends={"old": self.old, "new": self.new}, policies=policies))
        self.binding = bind_storage(Base, self.manager, session_factory=self.sessions, journal=self.journal)
        return self.binding

    async def add(self, *rows: Any) -> None:
        async with self.sessions.begin() as session:
            session.add_all(rows)

    async def sql(self, statement: str, **values: Any) -> None:
        """Run SQL past every session."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)

    async def set_raw(self, number: int, raw: str) -> None:
        """Let the file of a shelf be whatever the database takes, past every session."""
        value = "CAST(:raw AS JSONB)" if self.database.is_postgres else ":raw"
        await self.sql(f"UPDATE migration_shelf SET file = {value} WHERE id = {number}", raw=raw)  # noqa: S608

    async def refs(self) -> list[StoredObjectRef]:
        """Return what all rows hold."""
        found: list[StoredObjectRef] = []
        async with self.engine.connect() as connection:
            for column in self.binding.ref_columns():
                statement = select(type_coerce(column, StoredObjectRefType())).where(column.is_not(None))
                found += (await connection.execute(statement)).scalars()
        return found

    async def objects(self, name: str) -> set[str]:
        """Return where a backend has objects."""
        return {info.location async for info in self.manager.backends[name].iter_objects()}

    async def recover(self) -> None:
        """Let the journal, where there is one, end all that it knows of, as if every lease and retention had run out."""
        if self.journal is None:
            return
        tables = self.journal.tables
        for _ in range(2):
            async with self.engine.begin() as connection:
                for table in (tables.intent, tables.reclaim):
                    await connection.execute(table.update().values(due=clock(-1.0)))
            await self.journal.recover()
        async with self.engine.begin() as connection:
            for table in (tables.intent, tables.reclaim, tables.decision):
                assert not list(await connection.execute(select(table))), f"{table} is not empty after recovery"

    async def check(self, *, old: int = 0) -> None:
        """Check that each backend has just the objects that rows refer to, that all have their bytes, and how many are old."""
        await self.recover()
        refs = [one for ref in await self.refs() for one in iter_refs(ref)]
        for name in ("old", "new"):
            locations = {ref.location for ref in refs if ref.backend == name}
            objects = await self.objects(name)
            assert locations == objects, f"{name}: dangling {locations - objects}; orphans {objects - locations}"
        for ref in refs:
            await self.manager.get(ref)
        assert sum(ref.backend == "old" for ref in refs) == old
        assert self.engine.pool.checkedout() == 0, "a connection was not returned"  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def migration_environment(
    database: Database, *, journaled: bool = False, **options: Any
) -> AsyncIterator[MigrationEnvironment]:
    """Give an environment whose policies write to `old`."""
    async with database.opened(Base.metadata, **options) as engine:
        journal = StorageJournal(engine) if journaled else None
        old, new = (FaultInjectingBackend(MemoryStorageBackend()) for _ in range(2))
        env = MigrationEnvironment(database, engine, old, new, async_sessionmaker(engine, expire_on_commit=False), journal)
        env.write_to("old")
        try:
            yield env
        finally:
            env.binding.unbind()
            await env.manager.aclose()
            if journal is not None:
                await journal.aclose()
