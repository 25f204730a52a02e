"""Models with several files, and what tests ask of them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, selectinload

from granite_storage.orm import Attachment, AttachmentList, attachment, attachments, journal_tables
from tests.orm.derivations import Upper
from tests.orm.environment import OrmEnvironment

__all__ = ["UPPER", "Album", "Base", "Series", "Shelf", "album", "load", "named", "shown"]

UPPER = Upper(when="flush")


class Base(DeclarativeBase):
    pass


class Album(Base):
    __tablename__ = "album"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50), default="")
    cover: Mapped[Attachment | None] = attachment("docs")
    photos: Mapped[AttachmentList] = attachments("docs", variants={"upper": UPPER})
    scans: Mapped[AttachmentList] = attachments("docs", lazy="selectin")


class Shelf(Base):
    """Has room for three files of twenty bytes in all."""

    __tablename__ = "shelf"
    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[AttachmentList] = attachments("docs", max_files=3, max_total_size=20)


class Series(Base):
    """A composite primary key."""

    __tablename__ = "series"
    owner: Mapped[str] = mapped_column(String(20), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    pages: Mapped[AttachmentList] = attachments("docs", max_files=3)


journal_tables(Base.metadata)


def named(text: str) -> Attachment:
    """Return a pending attachment."""
    return Attachment(text.encode(), filename=f"{text}.txt")


def album(number: int = 1, texts: str = "") -> Album:
    """Return a new album with a photo for each letter."""
    return Album(id=number, photos=AttachmentList(map(named, texts)))


async def load(session: Any, model: Any = Album, key: Any = 1, name: str = "photos") -> Any:
    """Return a row with its files loaded."""
    return await session.get_one(model, key, options=[selectinload(getattr(model, name))])


async def shown(env: OrmEnvironment, model: Any = Album, key: Any = 1, name: str = "photos") -> str:
    """Return the contents of the files of a row in their order, as another session sees them."""
    async with env.sessions() as session:
        files = getattr(await load(session, model, key, name), name)
        return "".join([(await file.file.read()).decode() for file in files])
