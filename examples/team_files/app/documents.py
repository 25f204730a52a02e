from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from granite_storage import Attachment
from granite_storage.web import (
    FileList,
    StoredObjectResponse,
    UploadForm,
    UploadLimits,
    upload_form,
)
from pydantic import BaseModel, ConfigDict
from sqlalchemy import or_, select

from .database import Id, SessionDep
from .models import Document
from .users import CurrentUser

router = APIRouter(prefix="/documents")
receive = upload_form(
    {"files": FileList(Document.file, max_files=10)},
    limits=UploadLimits(max_size=200 * 1024 * 1024),
)
Form = Annotated[UploadForm, Depends(receive)]


async def get_readable(
    document_id: Id, user: CurrentUser, session: SessionDep
) -> Document:
    document = await session.get(Document, document_id)
    if document is None:
        raise HTTPException(404)
    if not (document.is_shared or document.owner_id == user.id or user.is_admin):
        raise HTTPException(404)
    return document


Readable = Annotated[Document, Depends(get_readable)]


async def get_own(document: Readable, user: CurrentUser) -> Document:
    if document.owner_id != user.id and not user.is_admin:
        raise HTTPException(403)
    return document


Own = Annotated[Document, Depends(get_own)]


class DocumentOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    owner_id: int
    is_shared: bool
    file: Attachment


@router.post(
    "",
    status_code=201,
    response_model=list[DocumentOut],
    openapi_extra=receive.openapi_extra,
)
async def add_documents(
    user: CurrentUser, form: Form, session: SessionDep
) -> list[Document]:
    documents = [Document(owner_id=user.id, file=file) for file in form.files["files"]]
    session.add_all(documents)
    await session.flush()
    return documents


@router.get("", response_model=list[DocumentOut])
async def list_documents(user: CurrentUser, session: SessionDep) -> Sequence[Document]:
    readable = or_(Document.owner_id == user.id, Document.is_shared)
    query = select(Document).where(readable).order_by(Document.id)
    return (await session.scalars(query)).all()


@router.get("/{document_id}/file")
async def download(document: Readable, request: Request) -> StoredObjectResponse:
    return StoredObjectResponse(document.file, request)


@router.put("/{document_id}/sharing", status_code=204)
async def share(document: Own, is_shared: bool) -> None:
    document.is_shared = is_shared


@router.delete("/{document_id}", status_code=204)
async def delete_document(document: Own, session: SessionDep) -> None:
    await session.delete(document)


@router.get("/{document_id}/thumb")
async def show_thumb(document: Readable, request: Request) -> StoredObjectResponse:
    thumb = document.file.variants["thumb"]
    if thumb is None:
        raise HTTPException(404)
    return StoredObjectResponse(thumb, request, disposition="inline")
