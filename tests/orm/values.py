"""What the tests of attachments as values share: a few models on SQLite, and a manager in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import ForeignKey, MetaData, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, StoredContentMixin, StoredObjectRefType, attachment

Sessions = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    pass


class Folder(Base):
    __tablename__ = "folder"
    id: Mapped[int] = mapped_column(primary_key=True)
    documents: Mapped[list[Document]] = relationship(back_populates="folder", order_by="Document.id")


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(default="")
    folder_id: Mapped[int | None] = mapped_column(ForeignKey("folder.id"))
    folder: Mapped[Folder | None] = relationship(back_populates="documents")
    file: Mapped[Attachment | None] = attachment("documents")
    thumbnail: Mapped[Attachment | None] = attachment("thumbnails")


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    file: Mapped[Attachment | None] = attachment("documents")
    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "item"}


class Photo(Item):
    """Shares its parent's table."""

    __mapper_args__: ClassVar = {"polymorphic_identity": "photo"}


class Film(Item):
    """Has a table of its own beside its parent's."""

    __tablename__ = "film"
    id: Mapped[int] = mapped_column(ForeignKey("item.id"), primary_key=True)
    poster: Mapped[Attachment | None] = attachment("thumbnails")
    __mapper_args__: ClassVar = {"polymorphic_identity": "film"}


class Report(StoredContentMixin, Base):
    __tablename__ = "report"
    __stored_content_field_name__ = "pdf"
    id: Mapped[int] = mapped_column(primary_key=True)
    pdf: Mapped[Attachment | None] = attachment("documents")


class Receipt(Base):
    """The manual level."""

    __tablename__ = "receipt"
    id: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)


def make_manager() -> StorageManager:
    return StorageManager(
        backends={"memory": MemoryStorageBackend()},
        policies={
            "documents": StoragePolicy("documents", "memory", max_size=1_000_000, key_prefix="docs"),
            "thumbnails": StoragePolicy("thumbnails", "memory", max_size=1000),
        },
    )


@asynccontextmanager
async def sqlite(folder: Path, base: Any = Base, name: str = "values.db") -> AsyncIterator[Sessions]:
    """Sessions on a new SQLite file with the tables of a base; the first of such files is copied from then on."""
    path, metadata = folder / name, base.metadata
    names, content = _empty.get(metadata, (None, b""))
    is_known = names == set(metadata.tables)
    if is_known:
        path.write_bytes(content)
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    event.listen(engine.sync_engine, "connect", _without_waiting_for_the_disk)
    try:
        if not is_known:
            async with engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
            _empty[metadata] = set(metadata.tables), path.read_bytes()
        yield async_sessionmaker(engine, expire_on_commit=False)
    finally:
        await engine.dispose()


_empty: weakref.WeakKeyDictionary[MetaData, tuple[set[str], bytes]] = weakref.WeakKeyDictionary()
"""The names of a base's tables, and a file in which there is nothing but them."""


def _without_waiting_for_the_disk(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF").close()


async def locations(manager: StorageManager) -> set[str]:
    """Where the objects are that the manager's backends hold."""
    return {info.location for backend in manager.backends.values() async for info in backend.iter_objects()}


async def add(sessions: Sessions, instance: Any) -> Any:
    async with sessions.begin() as session:
        session.add(instance)
    return instance


async def write_raw(sessions: Sessions, value: str | None, column: str = "document.file") -> None:
    """Put text into a column of row 1, past the library."""
    table, _, name = column.partition(".")
    async with sessions.begin() as session:
        await session.execute(text(f"UPDATE {table} SET {name} = :value WHERE id = 1"), {"value": value})  # noqa: S608


async def read_raw(sessions: Sessions, column: str = "document.file") -> Any:
    """Return the text of a column of row 1, as it stands."""
    table, _, name = column.partition(".")
    async with sessions() as session:
        return await session.scalar(text(f"SELECT {name} FROM {table} WHERE id = 1"))  # noqa: S608


def as_json(ref: StoredObjectRef, **changes: Any) -> str:
    return json.dumps({**ref.to_dict(), **changes})
