"""Flask's responses and errors: what users have uploaded, served by threads."""

from __future__ import annotations

import asyncio
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask, Response, request
from flask.testing import FlaskClient
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from granite_storage import Attachment, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.contrib.flask import install_error_handlers, send_attachment
from granite_storage.readers import SyncObjectReader

CONTENT = b"0123456789" * 100


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment] = attachment("documents", nullable=False)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[SyncObjectReader]:
    """The readers that were closed."""
    found: list[SyncObjectReader] = []
    close = SyncObjectReader.close

    def note(reader: SyncObjectReader) -> None:
        found.append(reader)
        close(reader)

    monkeypatch.setattr(SyncObjectReader, "close", note)
    return found


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FlaskClient]:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    sessions = sessionmaker(engine)
    storage = StorageManager(
        backends={"local": LocalStorageBackend(tmp_path / "files", fsync=False)},
        policies={"documents": StoragePolicy("documents", "local", max_size=2000)},
    )
    binding = bind_storage(Base, storage, session_factory=sessions)
    Base.metadata.create_all(engine)
    app = Flask(__name__, instance_path=str(tmp_path))
    app.testing = True
    install_error_handlers(app)

    @app.post("/documents")
    def upload() -> dict[str, int]:
        with sessions.begin() as session:
            document = Document(file=Attachment.from_upload(request.files["file"]))
            session.add(document)
            session.flush()
            return {"id": document.id}

    @app.get("/documents/<int:number>")
    def download(number: int) -> Response:
        with sessions() as session:
            file = session.get_one(Document, number).file
        return send_attachment(file, disposition=request.args.get("as", "attachment"))  # type: ignore[arg-type]

    yield app.test_client()
    binding.unbind()
    storage.sync.close()
    engine.dispose()


def upload(client: FlaskClient, content: bytes = CONTENT, name: str = "a.txt", kind: str = "text/plain") -> str:
    answer = client.post("/documents", data={"file": (io.BytesIO(content), name, kind)})
    assert answer.status_code == 200, answer.text
    return f"/documents/{answer.json['id']}"  # type: ignore[index]


def test_whole(client: FlaskClient, closed: list[SyncObjectReader]) -> None:
    with client.get(upload(client, name="ä.txt")) as answer:
        assert (answer.status_code, answer.data) == (200, CONTENT)
        assert answer.headers["Content-Length"] == "1000"
        assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answer.headers["Content-Disposition"] == "attachment; filename=\"_.txt\"; filename*=UTF-8''%C3%A4.txt"
        assert answer.headers["Cache-Control"] == "private, no-cache"
        assert answer.headers["Accept-Ranges"] == "bytes"
    assert len(closed) == 1


@pytest.mark.parametrize(
    "kind", ["text/html", "image/svg+xml", "application/xhtml+xml", "text/javascript", "text/css", "nonsense"]
)
@pytest.mark.parametrize("disposition", ["attachment", "inline"])
def test_a_browser_runs_nothing(client: FlaskClient, kind: str, disposition: str) -> None:
    place = upload(client, b"<script>alert(1)</script>", "x.html", kind)
    with client.get(place, query_string={"as": disposition}) as answer:
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Content-Disposition"].startswith("attachment")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == "sandbox; default-src 'none'"


def test_inline(client: FlaskClient) -> None:
    with client.get(upload(client, kind="image/png"), query_string={"as": "inline"}) as answer:
        assert answer.headers["Content-Disposition"].startswith("inline")
    with pytest.raises(ValueError, match="disposition"):
        client.get(upload(client), query_string={"as": "shown"})


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        ({"Range": "bytes=2-4"}, 206, b"234"),
        ({"Range": "bytes=-3"}, 206, b"789"),
        ({"Range": "bytes=0-1,5-6"}, 200, CONTENT),
        ({"Range": "bytes=1000-"}, 416, None),
        ({"Range": "bytes=2-4", "If-Range": '"other"'}, 200, CONTENT),
        ({"Range": "lines=2-4"}, 200, CONTENT),
        ({"Range": "bytes=four"}, 200, CONTENT),
    ],
)
def test_ranges(
    client: FlaskClient, closed: list[SyncObjectReader], asked: dict[str, str], status: int, content: bytes | None
) -> None:
    with client.get(upload(client), headers=asked) as answer:
        assert answer.status_code == status
        if content is not None:
            assert answer.data == content
    assert len(closed) == 1


def test_conditions(client: FlaskClient, closed: list[SyncObjectReader]) -> None:
    place = upload(client)
    with client.head(place) as answer:
        etag = answer.headers["ETag"]
        assert (answer.status_code, answer.data, answer.headers["Content-Length"]) == (200, b"", "1000")
    with client.get(place, headers={"If-None-Match": etag}) as answer:
        assert (answer.status_code, answer.data) == (304, b"")
    with client.get(place, headers={"If-None-Match": '"other"'}) as answer:
        assert answer.status_code == 200
    with client.get(place, headers={"Range": "bytes=2-4", "If-Range": etag}) as answer:
        assert answer.status_code == 206
    assert len(closed) == 4
    with client.get(place, headers={"If-Match": '"other"'}) as answer:
        assert (answer.status_code, answer.data) == (412, b"")
    with client.get(place, headers={"If-Match": etag}) as answer:
        assert (answer.status_code, answer.data) == (200, CONTENT)
    assert len(closed) == 6


@pytest.mark.parametrize(("content", "status"), [(b"x" * 2001, 413), (b"", 422)])
def test_refused_uploads(client: FlaskClient, content: bytes, status: int) -> None:
    name = "a.txt" if content else ""
    answer = client.post("/documents", data={"file": (io.BytesIO(content), name, "text/plain")})
    assert (answer.status_code, answer.content_type) == (status, "application/problem+json")
    assert answer.json is not None
    assert answer.json["status"] == status


def test_a_missing_object(client: FlaskClient, tmp_path: Path) -> None:
    place = upload(client)
    shutil.rmtree(tmp_path / "files/document")
    answer = client.get(place)
    assert (answer.status_code, answer.content_type) == (404, "application/problem+json")


async def test_an_event_loop_is_not_blocked(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    place = await asyncio.to_thread(upload, client)
    assert client.get(place).status_code == 500
    assert "would block" in caplog.text
