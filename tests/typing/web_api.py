"""Receiving over HTTP, for mypy and pyright only: nothing here is run."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, assert_type

from fastapi import Depends, FastAPI, Request
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, StorageBinding, StorageError, StorageManager, StoredObjectRef, attachment
from granite_storage.web import (
    DirectUpload,
    DirectUploads,
    FilePart,
    PolicyTarget,
    UploadForm,
    UploadLimits,
    install_error_handlers,
    problem_response,
    stream_body,
    stream_upload,
    upload_body,
    upload_form,
)


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")
    cover: Mapped[Attachment] = attachment("covers", nullable=False)


async def size_of(part: FilePart) -> int:
    return sum([len(chunk) async for chunk in part])


async def receive(request: Request, manager: StorageManager, app: FastAPI, error: StorageError) -> None:
    target = PolicyTarget(manager=manager, storage_key="documents", model_name="doc", entity_id="1", field_name="file")
    limits = UploadLimits(max_size=1000)
    form = await stream_upload(request, {"file": Document.file, "ref": target, "size": size_of}, limits=limits)
    assert_type(form.fields["title"], str)
    assert_type(await stream_body(request, Document.file, filename="a"), Attachment)
    assert_type(await stream_body(request, Document.cover, limits=limits), Attachment)
    assert_type(await stream_body(request, target), StoredObjectRef)
    assert_type(await stream_body(request, size_of), int)
    async with await stream_upload(request, {"file": Document.file}, required=("file",)) as form:
        document = Document(file=form.files["file"])
        assert_type(document.file, Attachment | None)
    install_error_handlers(app, retry_after=3)
    problem_response(error)


async def directly(binding: StorageBinding, app: FastAPI) -> None:
    uploads = DirectUploads(binding, secret="s" * 32, base_url="https://example.com/uploads")
    uploads = DirectUploads(binding, secret={"new": b"n" * 32, "old": "o" * 32}, max_expires_in=timedelta(hours=1))
    app.mount("/uploads", uploads)
    upload = await uploads.begin(Document.file, filename="a.pdf", content_type="application/pdf", size=1, owner="anna")
    assert_type(upload, DirectUpload)
    assert_type(await uploads.finish(upload.token, Document.file, owner="anna"), Attachment)


Form = Annotated[UploadForm, Depends(upload_form({"file": Document.file}, fields=["title"], required=["file"]))]
Body = Annotated[Attachment, Depends(upload_body(Document.file, filename=lambda request: request.url.path))]
