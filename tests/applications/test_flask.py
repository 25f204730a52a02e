"""Flask with Flask-SQLAlchemy, whose `db.session` is a `scoped_session` of each application context."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from flask import Flask, request, send_file
from flask.testing import FlaskClient
from flask.typing import ResponseReturnValue
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    ContentTooLargeError,
    StorageGarbageCollector,
    StorageJournal,
    StorageManager,
    StoragePolicy,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.backends.local import LocalStorageBackend
from tests.core.support import files_below


def make_app(url: str, folder: Path) -> tuple[Flask, SQLAlchemy]:
    """Return an application; `app.extensions` has its storage, its binding and its journal."""

    class Base(DeclarativeBase):
        pass

    db = SQLAlchemy(model_class=Base)

    class Document(db.Model):  # type: ignore[name-defined,misc]
        __tablename__ = "document"

        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("documents")

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)
    storage = StorageManager(
        backends={"local": LocalStorageBackend(folder, fsync=False)},
        policies={"documents": StoragePolicy("documents", "local", max_size=100_000)},
    )
    with app.app_context():
        journal = None
        if db.engine.dialect.name != "sqlite":
            journal_tables(db.metadata)
            journal = StorageJournal(db.engine)
        binding = bind_storage(db.Model, storage, session_factory=db.session, journal=journal)
        db.create_all()
    app.extensions.update(storage=storage, binding=binding, journal=journal)

    @app.errorhandler(ContentTooLargeError)
    def too_large(error: ContentTooLargeError) -> ResponseReturnValue:
        return str(error), 413

    @app.post("/documents")
    def upload() -> ResponseReturnValue:
        document = Document(file=Attachment.from_upload(request.files["file"]))
        db.session.add(document)
        db.session.commit()
        return {"id": document.id, "name": document.file.original_filename}

    @app.put("/documents/<int:number>")
    def replace(number: int) -> ResponseReturnValue:
        document = db.get_or_404(Document, number)
        document.file = Attachment.from_upload(request.files["file"])
        db.session.flush()
        if "fails" in request.args:
            raise ValueError("after the flush")
        db.session.commit()
        return {}

    @app.get("/documents/<int:number>")
    def download(number: int) -> ResponseReturnValue:
        file = db.get_or_404(Document, number).file
        response = send_file(
            file.sync.open(), mimetype=file.content_type, download_name=file.original_filename, etag=file.checksum
        )
        response.content_length = file.size
        return response.make_conditional(request, accept_ranges=True, complete_length=file.size)

    @app.delete("/documents/<int:number>")
    def delete(number: int) -> ResponseReturnValue:
        db.session.delete(db.get_or_404(Document, number))
        db.session.commit()
        return {}

    return app, db


@pytest.fixture
def app(database_url: str, tmp_path: Path) -> Iterator[Flask]:
    app, db = make_app(database_url, tmp_path / "files")
    yield app
    with app.app_context():
        app.extensions["binding"].unbind()
        if app.extensions["journal"] is not None:
            app.extensions["journal"].sync.close()
        app.extensions["storage"].sync.close()
        db.engine.dispose()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def file(content: bytes, name: str = "a.txt") -> dict[str, object]:
    return {"file": (io.BytesIO(content), name, "text/plain")}


def settle(app: Flask) -> None:
    """Let the journal delete what rows have released."""
    if app.extensions["journal"] is not None:
        app.extensions["journal"].sync.recover()


def test_a_file_of_a_row(app: Flask, client: FlaskClient, tmp_path: Path) -> None:
    assert client.post("/documents", data=file(b"first")).json == {"id": 1, "name": "a.txt"}
    answer = client.get("/documents/1")
    assert (answer.data, answer.mimetype) == (b"first", "text/plain")
    answer.close()
    assert client.put("/documents/1", data=file(b"second")).status_code == 200
    assert client.put("/documents/1?fails=1", data=file(b"third")).status_code == 500
    settle(app)
    assert client.get("/documents/1", buffered=True).data == b"second"
    assert len(files_below(tmp_path / "files")) == 1
    assert client.delete("/documents/1").status_code == 200
    settle(app)
    assert files_below(tmp_path / "files") == []


def test_a_range(client: FlaskClient) -> None:
    client.post("/documents", data=file(b"0123456789"))
    answer = client.get("/documents/1", headers={"Range": "bytes=2-4"}, buffered=True)
    assert (answer.status_code, answer.data) == (206, b"234")


def test_a_file_over_the_limit(client: FlaskClient, tmp_path: Path) -> None:
    assert client.post("/documents", data=file(bytes(100_001))).status_code == 413
    assert files_below(tmp_path / "files") == []


def test_the_collector(app: Flask, client: FlaskClient, tmp_path: Path) -> None:
    client.post("/documents", data=file(b"kept"))
    with app.app_context():
        orphan = app.extensions["storage"].sync.put_bytes(
            storage_key="documents", model_name="document", entity_id="9", field_name="file", content=b"an orphan"
        )
        collector = StorageGarbageCollector(
            app.extensions["storage"], binding=app.extensions["binding"], grace_period=timedelta(0), max_deleted_share=1
        )
        report = collector.sync.collect(storage_key="documents", dry_run=False)
    assert report.deleted == 1
    assert not app.extensions["storage"].sync.exists(orphan)
    assert client.get("/documents/1", buffered=True).data == b"kept"
