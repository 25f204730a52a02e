"""The models with attachments, the policies and the binding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import String
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StorageBackend, StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.derived import ImageVariant
from granite_storage.inspection import ImageLimits
from granite_storage.orm import Attachment, AttachmentVariant, attachment, bind_storage
from granite_storage.web import UnsupportedRequestError

FOLDER = Path(os.environ.get("GALLERY_FOLDER", "data"))
DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite+aiosqlite:///{FOLDER / 'gallery.db'}")
TAKEN = ("image/*", "audio/*", "video/*", "text/plain", "application/pdf", "application/zip")
MAX_SIZE = int(os.environ.get("MAX_SIZE", "100_000_000"))


class Base(DeclarativeBase):
    pass


class Item(Base):
    """A file in the gallery; a picture has a thumbnail from the start, and a preview once somebody has looked at it."""

    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment] = attachment(
        "gallery",
        nullable=False,
        variants={
            "thumb": ImageVariant(fit=(480, 480)),
            "preview": ImageVariant(fit=(1600, 1600), when="request"),
        },
    )

    @property
    def thumb(self) -> AttachmentVariant | None:
        return self.file.variants["thumb"]

    @property
    def preview(self) -> AttachmentVariant | None:
        return self.file.variants["preview"]


class PictureOut(BaseModel):
    """A thumbnail or a preview; `media` has its width and height."""

    model_config = ConfigDict(from_attributes=True)

    size: int
    checksum: str
    media: dict[str, Any]


class ItemOut(BaseModel):
    """The response for an item; the file shows its size, media type, name and checksum, never its location."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    file: Attachment
    thumb: PictureOut | None
    preview: PictureOut | None


class Note(Base):
    """A note for the transactions of the rollback page."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50), unique=True)
    version: Mapped[int] = mapped_column(default=1)
    file: Mapped[Attachment] = attachment("notes", nullable=False)


def require_taken(content_type: str | None) -> None:
    """Refuse by what is declared, before a byte is read; the policy refuses by the content."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type not in TAKEN and f"{media_type.partition('/')[0]}/*" not in TAKEN:
        raise UnsupportedRequestError("the gallery takes pictures, films, sound, plain text, PDF and ZIP")


def make_backends() -> dict[str, StorageBackend]:
    """Give each store its own key: rows name the key, and lose their files if it leads to another store later."""
    backends: dict[str, StorageBackend] = {"disk": LocalStorageBackend(root_dir=FOLDER / "files")}
    if bucket := os.environ.get("S3_BUCKET"):
        from granite_storage.backends.s3 import S3StorageBackend

        backends["bucket"] = S3StorageBackend(bucket)
    return backends


backends = make_backends()
WRITTEN_TO = "bucket" if "bucket" in backends else "disk"
storage = StorageManager(
    backends=backends,
    policies={
        "gallery": StoragePolicy(
            "gallery",
            WRITTEN_TO,
            max_size=MAX_SIZE,
            key_prefix="gallery",
            accept=TAKEN,
            on_mismatch="correct",  # people rename files
            inspect=[ImageLimits()],
        ),
        "notes": StoragePolicy("notes", WRITTEN_TO, max_size=1024, key_prefix="notes"),
    },
)
engine = create_async_engine(DATABASE_URL)
sessions = async_sessionmaker(engine, expire_on_commit=False)
binding = bind_storage(Base, storage, session_factory=sessions)
