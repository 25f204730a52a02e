"""An application whose sessions are Flask-SQLAlchemy's, which need an application context."""

from __future__ import annotations

import os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
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


class Base(DeclarativeBase):
    pass


app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{os.getcwd()}/shop.db"
db = SQLAlchemy(app, model_class=Base)


class Document(db.Model):  # type: ignore[name-defined,misc]
    __tablename__ = "shop_document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")


journal_tables(db.metadata)
storage = StorageManager(
    backends={name: LocalStorageBackend(name, fsync=False) for name in ("old", "new")},
    policies={"documents": StoragePolicy("documents", os.environ.get("WRITE_TO", "old"))},
)
with app.app_context():
    binding = bind_storage(db.Model, storage, session_factory=db.session, journal=StorageJournal(db.engine))


def in_context() -> StorageBinding:
    app.app_context().push()
    return binding


async def in_context_later() -> StorageBinding:
    return in_context()


def fill(count: int) -> None:
    with app.app_context():
        db.create_all()
        for number in range(1, count + 1):
            db.session.add(Document(id=number, file=Attachment(b"x" * 1000, filename="a.txt")))
        db.session.commit()
        db.session.remove()
        binding.journal.sync.close()  # type: ignore[union-attr]
        db.engine.dispose()
    storage.sync.close()
