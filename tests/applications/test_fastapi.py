"""FastAPI with `def` endpoints, which run in its thread pool of 40, served by uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import httpx
import pytest
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, UploadFile
from fastapi.responses import StreamingResponse
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from granite_storage import Attachment, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.web import StoredObjectResponse, install_error_handlers
from tests.applications.processes import until
from tests.core.support import files_below

AT_ONCE = 40
"""The threads of FastAPI's pool."""


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")


def get_session(request: Request) -> Iterator[Session]:
    with request.app.state.sessions() as session:
        yield session


OpenSession = Annotated[Session, Depends(get_session)]


def get_file(number: int, session: OpenSession) -> Attachment:
    document = session.get(Document, number)
    if document is None or document.file is None:
        raise HTTPException(404)
    return document.file


StoredFile = Annotated[Attachment, Depends(get_file)]


def make_app(sessions: sessionmaker[Session], barrier: threading.Barrier) -> FastAPI:
    """Return an application; its uploads wait for each other, so that they happen at once."""
    app = FastAPI()
    install_error_handlers(app)

    app.state.sessions = sessions

    @app.post("/documents/{number}")
    def upload(number: int, file: UploadFile, session: OpenSession, waits: bool = True) -> str | None:
        document = Document(id=number, file=Attachment.from_upload(file))
        session.add(document)
        if waits:
            barrier.wait(30)
        session.commit()
        return document.file.original_filename if document.file else None

    @app.post("/failures/{number}")
    def fail(number: int, file: UploadFile, session: OpenSession) -> None:
        session.add(Document(id=number, file=Attachment(file.file, filename=file.filename)))
        session.flush()
        raise HTTPException(409)

    @app.get("/documents/{number}")
    def download(file: StoredFile) -> StreamingResponse:
        return StreamingResponse(chunks(file), media_type=file.content_type)

    @app.get("/documents/{number}/file")
    def download_with_ranges(file: StoredFile, request: Request) -> StoredObjectResponse:
        return StoredObjectResponse(file, request)

    @app.delete("/documents/{number}")
    def delete(number: int, session: OpenSession) -> None:
        session.delete(session.get_one(Document, number))
        session.commit()

    return app


def chunks(file: Attachment) -> Generator[bytes, None, None]:
    with file.sync.open(verify=True) as reader:
        while chunk := reader.read(64 * 1024):
            yield chunk


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application from a thread, and give its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    with socket.create_server(("127.0.0.1", 0), backlog=AT_ONCE) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), name="server")
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive(), "uvicorn does not start")
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture
def client(postgres_url: str, tmp_path: Path) -> Iterator[httpx.Client]:
    storage = StorageManager(
        backends={"local": LocalStorageBackend(tmp_path / "files", fsync=False)},
        policies={"documents": StoragePolicy("documents", "local", max_size=1_000_000)},
    )
    engine = create_engine(postgres_url)
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    binding = bind_storage(Base, storage, session_factory=sessions)
    try:
        with served(make_app(sessions, threading.Barrier(AT_ONCE))) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        binding.unbind()
        storage.sync.close()
        engine.dispose()


def test_forty_uploads_at_once(client: httpx.Client, tmp_path: Path) -> None:
    def upload(number: int) -> str:
        answer = client.post(f"/documents/{number}", files={"file": (f"{number}.bin", bytes([number]) * 100_000)})
        answer.raise_for_status()
        return str(answer.json())

    def download(number: int) -> bytes:
        return client.get(f"/documents/{number}").raise_for_status().content

    def delete(number: int) -> None:
        client.delete(f"/documents/{number}").raise_for_status()

    numbers = range(AT_ONCE)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        assert list(pool.map(upload, numbers)) == [f"{number}.bin" for number in numbers]
        assert len(files_below(tmp_path / "files")) == AT_ONCE
        assert list(pool.map(download, numbers)) == [bytes([number]) * 100_000 for number in numbers]
        list(pool.map(delete, numbers))
    assert files_below(tmp_path / "files") == []


def test_ranges_errors_and_limits(client: httpx.Client, tmp_path: Path) -> None:
    client.post("/documents/1?waits=0", files={"file": ("a.txt", b"0123456789", "text/plain")}).raise_for_status()
    answer = client.get("/documents/1/file", headers={"Range": "bytes=2-4"})
    assert (answer.status_code, answer.content) == (206, b"234")
    assert client.post("/failures/2", files={"file": ("b.txt", b"in vain")}).status_code == 409
    assert client.post("/documents/3?waits=0", files={"file": ("c.bin", bytes(1_000_001))}).status_code == 413
    assert client.get("/documents/2").status_code == client.get("/documents/3").status_code == 404
    assert len(files_below(tmp_path / "files")) == 1
