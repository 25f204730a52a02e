"""A Flask application for gunicorn with `--preload`: its manager was built and used before the workers fork."""

from __future__ import annotations

import os
from pathlib import Path

from flask import Flask, Response, abort, request
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker
from werkzeug.wsgi import wrap_file

from granite_storage import Attachment, StorageJournal, StorageManager, StoragePolicy, attachment, bind_storage, journal_tables
from granite_storage.backends.local import LocalStorageBackend


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # MariaDB would number a 0
    file: Mapped[Attachment | None] = attachment("documents")


storage = StorageManager(
    backends={"local": LocalStorageBackend(Path(os.environ["APP_FOLDER"]) / "files")},
    policies={"documents": StoragePolicy("documents", "local", max_size=10_000_000, key_prefix="documents")},
)
engine = create_engine(os.environ["DATABASE_URL"])
journal = None
if engine.dialect.name != "sqlite":
    journal_tables(Base.metadata)
    journal = StorageJournal(engine)
sessions = sessionmaker(engine)
bind_storage(Base, storage, session_factory=sessions, journal=journal)

# What a module of an application may do at its import, before the fork.
Base.metadata.create_all(engine)
with sessions.begin() as session:
    session.add(Document(id=0, file=Attachment(b"before the fork")))
with sessions() as session:
    assert session.get_one(Document, 0).file.sync.read() == b"before the fork"
engine.dispose()

app = Flask(__name__)


@app.post("/documents/<int:number>")
def upload(number: int) -> dict[str, int]:
    with sessions.begin() as session:
        session.add(Document(id=number, file=Attachment.from_upload(request.files["file"])))
        session.flush()
        if request.args.get("fails"):
            raise ValueError("after the flush")
    return {"process": os.getpid()}


@app.get("/documents/<int:number>")
def download(number: int) -> Response:
    with sessions() as session:
        document = session.get(Document, number)
    if document is None or document.file is None:
        abort(404)
    response = Response(wrap_file(request.environ, document.file.sync.open(), 64 * 1024), direct_passthrough=True)
    response.content_type = document.file.content_type
    response.content_length = document.file.size
    return response


@app.delete("/documents/<int:number>")
def delete(number: int) -> dict[str, int]:
    with sessions.begin() as session:
        session.delete(session.get_one(Document, number))
    if journal is not None:  # which deletes what rows have released; an application has a worker for it
        journal.sync.recover()
    return {"process": os.getpid()}
