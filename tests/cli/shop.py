"""An application for the command line to look after; each test copies it to a folder of its own, and commands import it there."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    StorageBinding,
    StorageJournal,
    StorageManager,
    StoragePolicy,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.derived import Derivation, DerivationSource, Effect, EffectEvent
from granite_storage.exceptions import DerivationRefusedError
from granite_storage.testing import FaultInjectingBackend

print("an application may print what it likes")  # noqa: T201


class Shout:
    """Makes a file again, in capitals and slowly."""

    when, missing = os.environ.get("WHEN", "flush"), "nothing"

    def digest(self, name: str, /) -> str:
        return f"{name}:{os.environ['RECIPE']}"

    @contextlib.asynccontextmanager
    async def make(self, source: DerivationSource, /) -> AsyncIterator[Derivation]:
        async with source.open() as chunks:
            content = b"".join([chunk async for chunk in chunks])
        if os.environ.get("REFUSE"):
            raise DerivationRefusedError("it is no text")
        await asyncio.sleep(float(os.environ.get("DERIVING", "0")))
        yield Derivation(content.upper() + os.environ["RECIPE"].encode(), "text/plain")


async def index(event: EffectEvent) -> None:
    """Update nothing."""


variants: dict[str, Any] = {name: Shout() for name in os.environ.get("VARIANTS", "").split()}
effects = {name: Effect(put=index, remove=index) for name in os.environ.get("EFFECTS", "").split()}


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "shop_document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents", variants=variants, effects=effects)


journal_tables(Base.metadata)

engine = create_async_engine(os.environ["DATABASE_URL"], echo=bool(os.environ.get("ECHO")))
sessions = async_sessionmaker(engine, expire_on_commit=False)
storage = StorageManager(
    backends={name: FaultInjectingBackend(LocalStorageBackend(name, fsync=False)) for name in ("old", "new")},
    policies={"documents": StoragePolicy("documents", os.environ.get("WRITE_TO", "old"))},
)
if seconds := float(os.environ.get("SLOW", "0")):
    for backend in storage.backends.values():
        assert isinstance(backend, FaultInjectingBackend)
        for operation in ("stat", "open"):
            backend.delay(operation, seconds=seconds, times=1_000_000)  # type: ignore[arg-type]
if os.environ.get("FOREIGN_KEYS"):

    @event.listens_for(engine.sync_engine, "connect")
    def _(connection: object, _: object) -> None:
        connection.execute("PRAGMA foreign_keys = ON")  # type: ignore[attr-defined]


tenants = os.environ.get("TENANTS", "").split()
if tenants and engine.dialect.name == "sqlite":

    @event.listens_for(engine.sync_engine, "connect")
    def _(connection: object, _: object) -> None:
        for tenant in tenants:
            connection.execute(f"ATTACH DATABASE '{tenant}.db' AS {tenant}")  # type: ignore[attr-defined]


number = 42


def binding() -> StorageBinding:
    journal = StorageJournal(engine) if os.environ.get("JOURNAL") else None
    return bind_storage(Base, storage, session_factory=sessions, journal=journal)


async def later() -> StorageBinding:
    return binding()


def broken() -> StorageBinding:
    raise KeyError("S3_BUCKET")


class settings:  # noqa: N801
    nested = binding


async def fill(count: int, filename: str) -> None:
    bound = binding()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    async with sessions.begin() as session:
        session.add_all(Document(id=n, file=Attachment(b"x" * 1000, filename=filename)) for n in range(1, count + 1))
    for tenant in tenants:
        await fill_schema(tenant, count, filename)
    if bound.journal is not None:
        await bound.journal.aclose()
    await storage.aclose()
    await engine.dispose()


async def fill_schema(tenant: str, count: int, filename: str) -> None:
    """Create the table in the schema of a tenant again, with as many rows."""
    translated = engine.execution_options(schema_translate_map={None: tenant})
    async with translated.begin() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execute(text(f"DROP SCHEMA IF EXISTS {tenant} CASCADE"))
            await connection.execute(text(f"CREATE SCHEMA {tenant}"))
        await connection.run_sync(lambda sync: Base.metadata.create_all(sync, tables=[Base.metadata.tables["shop_document"]]))
    async with async_sessionmaker(translated).begin() as session:
        session.add_all(Document(id=n, file=Attachment(b"x" * 1000, filename=filename)) for n in range(1, count + 1))


async def drop() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        for tenant in tenants if engine.dialect.name == "postgresql" else ():
            await connection.execute(text(f"DROP SCHEMA {tenant} CASCADE"))
    await engine.dispose()
