"""The models with attachments, the policies, the journal and the binding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import ForeignKey, String, event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from granite_storage import (
    StorageBackend,
    StorageJournal,
    StorageManager,
    StoragePolicy,
    journal_tables,
)
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.derived import ImageVariant
from granite_storage.inspection import ImageLimits
from granite_storage.orm import (
    Attachment,
    AttachmentList,
    attachment,
    attachments,
    bind_storage,
    file_class,
)

FOLDER = Path(os.environ.get("GALLERY_FOLDER", "data"))
DATABASE_URL = os.environ.get(
    "DATABASE_URL", f"sqlite+aiosqlite:///{FOLDER / 'gallery.db'}"
)
ACCEPTED = (
    "image/*",
    "audio/*",
    "video/*",
    "text/plain",
    "application/pdf",
    "application/zip",
)
MAX_SIZE = int(os.environ.get("MAX_SIZE", "100_000_000"))


class Base(DeclarativeBase):
    pass


class User(Base):
    """Somebody who signs in with a token, of which only the hash is stored."""

    __tablename__ = "user_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    token_hash: Mapped[str | None] = mapped_column(String(64), unique=True)


class Album(Base):
    """Files of a user, in an order."""

    __tablename__ = "album"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("user_account.id"))
    owner: Mapped[User] = relationship()
    title: Mapped[str] = mapped_column(String(100))
    is_public: Mapped[bool] = mapped_column(default=False)
    files: Mapped[AttachmentList] = attachments(
        "gallery",
        max_files=40,
        variants={
            # made with the upload
            "thumb": ImageVariant(fit=(480, 480)),
            # made after the commit, by the journal's worker
            "large": ImageVariant(
                fit=(1600, 1600),
                when="later",
            ),
        },
    )


AlbumFile = file_class(Album.files)


class Note(Base):
    """A note for the transactions of the rollback demonstration."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50), unique=True)
    version: Mapped[int] = mapped_column(default=1)
    file: Mapped[Attachment] = attachment("notes", nullable=False)


journal_tables(Base.metadata)


def make_backends() -> dict[str, StorageBackend]:
    """Give each store its own key: the rows that name it must find their files."""
    backends: dict[str, StorageBackend] = {
        "disk": LocalStorageBackend(root_dir=FOLDER / "files")
    }
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
            accept=ACCEPTED,
            on_mismatch="correct",  # people rename files
            inspect=[ImageLimits()],
            strip="location",  # photographs do not say where they were taken
            on_unstrippable="keep",  # films are kept as they are
        ),
        "notes": StoragePolicy("notes", WRITTEN_TO, max_size=1024, key_prefix="notes"),
    },
)
engine = create_async_engine(DATABASE_URL)

if engine.dialect.name == "sqlite":

    @event.listens_for(engine.sync_engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.execute("PRAGMA busy_timeout = 30000")  # milliseconds
        connection.execute(
            "PRAGMA journal_mode = WAL"
        )  # requests that read do not wait for those that write
        connection.execute("PRAGMA foreign_keys = ON")


sessions = async_sessionmaker(engine, expire_on_commit=False)
journal = StorageJournal(engine)
binding = bind_storage(Base, storage, session_factory=sessions, journal=journal)
