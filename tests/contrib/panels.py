"""What the tests of admin panels share: a model with files, both kinds of engines, and what must hold after each request."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from sqlalchemy import ForeignKey, create_engine, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, selectinload
from sqlalchemy.pool import NullPool

from granite_storage import Attachment, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.derived import ImageVariant
from granite_storage.exceptions import ContentRejectedError
from granite_storage.inspection.base import UploadPreview
from granite_storage.orm.collections import AttachmentList, attachments
from tests.orm.values import locations

ENGINES = ("async", "sync")
MAX_SIZE = 20_000


class Base(DeclarativeBase):
    pass


def refuse_bad_names(upload: UploadPreview) -> None:
    if upload.filename == "bad.txt":
        raise ContentRejectedError("this name is not allowed")


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    avatar: Mapped[Attachment | None] = attachment("images", variants={"thumb": ImageVariant(fit=(32, 32))})
    cv: Mapped[Attachment | None] = attachment("documents", validate=refuse_bad_names)
    photos: Mapped[AttachmentList] = attachments("images", max_files=3, variants={"thumb": ImageVariant(fit=(32, 32))})


class Contract(Base):
    __tablename__ = "contract"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("user.id", ondelete="SET NULL"))
    scan: Mapped[Attachment] = attachment("documents")


def picture(colour: str = "teal") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(written, "PNG")
    return written.getvalue()


def png(name: str = "me.png", colour: str = "teal") -> tuple[str, bytes, str]:
    return name, picture(colour), "image/png"


class _Empty(str):
    """An empty file name, which httpx would leave out, and a browser sends."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


NOTHING = (_Empty(), b"", "application/octet-stream")
"""What a browser sends for a file input that was left empty."""


@dataclass
class Panel:
    """A panel, a client that uses it, and the database and the storage behind it."""

    client: httpx.AsyncClient
    engine: Engine | AsyncEngine
    manager: StorageManager

    async def rows(self, model: type[Any] = User) -> list[Any]:
        """Return the rows in order."""
        options = [selectinload(User.photos)] if model is User else []
        statement = select(model).order_by(model.id).options(*options)
        if isinstance(self.engine, AsyncEngine):
            async with AsyncSession(self.engine) as session:
                return list(await session.scalars(statement))
        with Session(self.engine) as session:
            return list(session.scalars(statement))

    async def spoil(self) -> None:
        """Write something that is no ref into the avatar of each user."""
        statement = text("UPDATE user SET avatar = '{}'")
        if isinstance(self.engine, AsyncEngine):
            async with self.engine.begin() as connection:
                await connection.execute(statement)
        else:
            with self.engine.begin() as connection:
                connection.execute(statement)

    async def check(self) -> list[Any]:
        """Return the users, after comparing the objects in the storage with what all rows refer to."""
        users = await self.rows()
        files = [file for user in users for file in (user.avatar, user.cv, *(one.file for one in user.photos))]
        files += [one.scan for one in await self.rows(Contract)]
        refs = [file.ref for file in files if file is not None]
        refs += [variant for ref in refs for variant in (ref.variants or {}).values()]
        assert await locations(self.manager) == {ref.location for ref in refs}
        return users


@asynccontextmanager
async def database(kind: str, folder: Path) -> AsyncIterator[tuple[Engine | AsyncEngine, StorageManager]]:
    """An empty database, and the manager that the models are bound to."""
    policies = {
        "images": StoragePolicy("images", "memory", max_size=MAX_SIZE, accept=("image/*",)),
        "documents": StoragePolicy("documents", "memory", max_size=MAX_SIZE),
    }
    manager = StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies)
    binding = bind_storage(Base, manager)
    sync_engine = create_engine(f"sqlite:///{folder / 'panel.db'}", poolclass=NullPool)
    Base.metadata.create_all(sync_engine)
    engine: Engine | AsyncEngine = sync_engine
    if kind == "async":
        engine = create_async_engine(f"sqlite+aiosqlite:///{folder / 'panel.db'}", poolclass=NullPool)
    try:
        yield engine, manager
    finally:
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
        sync_engine.dispose()
        binding.unbind()
        await manager.aclose()


def names_of(user: Any) -> list[str]:
    return [str(one.file) for one in user.photos]


def text_of(html: str) -> str:
    """Return what a page says, without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())
