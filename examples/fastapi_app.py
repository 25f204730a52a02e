"""A FastAPI application whose files live and die with their rows: upload, list, download, delete.

    python -m uvicorn examples.fastapi_app:app

and http://127.0.0.1:8000/docs lets you try it. It keeps its rows in SQLite and its files on the local disk, below `./data`. The
environment chooses otherwise:

    DATABASE_URL    such as postgresql+asyncpg://user:password@host/database
    S3_BUCKET       a bucket for the files; AWS_ENDPOINT_URL_S3 and the other variables of AWS say where it is
    STORAGE_ROOT    the folder for the files, where there is no bucket
    MAX_SIZE        the most bytes that an upload may have (100 MiB)

It needs `fastapi`, `python-multipart`, `uvicorn`, and `aiosqlite` or `asyncpg`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import Depends, FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ContentTooLargeError, ObjectNotFoundError, StorageBackend, StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///data/documents.db")
STORAGE_ROOT = os.environ.get("STORAGE_ROOT", "data/files")
MAX_SIZE = int(os.environ.get("MAX_SIZE", 100 * 1024 * 1024))


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[Attachment] = attachment("documents", nullable=False)


class DocumentOut(BaseModel):
    """What a client sees; of the file its size, media type, name and checksum, never where it lies."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    title: str
    file: Attachment


def make_backend() -> StorageBackend:
    bucket = os.environ.get("S3_BUCKET")
    if bucket:
        from granite_storage.backends.s3 import S3StorageBackend

        return S3StorageBackend(bucket)
    return LocalStorageBackend(root_dir=STORAGE_ROOT)


storage = StorageManager(
    backends={"files": make_backend()},
    policies={"documents": StoragePolicy("documents", "files", max_size=MAX_SIZE, key_prefix="documents")},
)
engine = create_async_engine(DATABASE_URL)
sessions = async_sessionmaker(engine, expire_on_commit=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if engine.dialect.name == "sqlite" and engine.url.database:
        Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
    binding = bind_storage(Base, storage, sessions=sessions)
    async with storage:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield
    binding.unbind()
    await engine.dispose()


app = FastAPI(title="Documents", lifespan=lifespan)


async def transaction() -> AsyncIterator[AsyncSession]:
    """One transaction per request; it commits when the endpoint returns, and takes the files back when it raises."""
    async with sessions.begin() as session:
        yield session


# Committed before the answer is sent: a client that reads "201" finds the row and its file.
Transaction = Annotated[AsyncSession, Depends(transaction, scope="function")]


@app.exception_handler(ContentTooLargeError)
async def too_large(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=413)


@app.post("/documents", status_code=201, response_model=DocumentOut)
async def upload(session: Transaction, file: UploadFile, title: Annotated[str | None, Form()] = None) -> Document:
    """Store an uploaded file with its row."""
    document = Document(title=title or file.filename or "untitled", file=Attachment.from_upload(file))
    session.add(document)
    await session.flush()
    return document


@app.put("/documents/raw/{title}", status_code=201, response_model=DocumentOut)
async def upload_raw(session: Transaction, title: str, request: Request) -> Document:
    """Store the body of a request as it arrives, without a form and without a temporary file: for very large ones."""
    content = Attachment(request.stream(), filename=title, content_type=request.headers.get("content-type"))
    document = Document(title=title, file=content)
    session.add(document)
    await session.flush()
    return document


@app.get("/documents", response_model=list[DocumentOut])
async def everything(session: Transaction, after: int = 0, limit: int = 100) -> list[Document]:
    """List documents in the order of their ids."""
    statement = select(Document).where(Document.id > after).order_by(Document.id).limit(min(limit, 1000))
    return list(await session.scalars(statement))


@app.get("/documents/{document_id}", response_model=DocumentOut)
async def one(session: Transaction, document_id: int) -> Document:
    """Show one document."""
    return await found(session, document_id)


@app.put("/documents/{document_id}/file", response_model=DocumentOut)
async def replace(session: Transaction, document_id: int, file: UploadFile) -> Document:
    """Put another file in the place of a document's; the old one goes when this one is committed."""
    document = await found(session, document_id)
    document.file = Attachment.from_upload(file)
    await session.flush()
    return document


@app.get("/documents/{document_id}/file", response_class=StreamingResponse)
async def download(session: Transaction, document_id: int) -> StreamingResponse:
    """Stream a document's file."""
    file = (await found(session, document_id)).file
    try:
        body = await file.open(verify=True)
    except ObjectNotFoundError as error:
        raise HTTPException(404, "the document's file is missing") from error
    # What a visitor uploaded is never shown as a page of this site: it is saved, as what it says it is.
    headers = {
        "Content-Length": str(file.size),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.original_filename or 'file', safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(body, media_type="application/octet-stream", headers=headers)


@app.delete("/documents/{document_id}", status_code=204)
async def delete(session: Transaction, document_id: int) -> None:
    """Delete a document and its file."""
    await session.delete(await found(session, document_id))


async def found(session: AsyncSession, document_id: int) -> Document:
    document = await session.get(Document, document_id)
    if document is None:
        raise HTTPException(404, f"there is no document {document_id}")
    return document
