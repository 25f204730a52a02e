from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from granite_storage.web import StoredObjectResponse, UploadForm, upload_form

from .database import Id, SessionDep
from .models import User
from .users import CurrentUser

router = APIRouter()
receive = upload_form({"file": User.avatar})
Form = Annotated[UploadForm, Depends(receive)]


@router.put("/me/avatar", status_code=204, openapi_extra=receive.openapi_extra)
async def replace_avatar(user: CurrentUser, form: Form, session: SessionDep) -> None:
    row = await session.get_one(User, user.id)
    row.avatar = form.files["file"]


@router.delete("/me/avatar", status_code=204)
async def delete_avatar(user: CurrentUser, session: SessionDep) -> None:
    row = await session.get_one(User, user.id)
    row.avatar = None


@router.get("/users/{user_id}/avatar")
async def show_avatar(
    user_id: Id, user: CurrentUser, session: SessionDep, request: Request
) -> StoredObjectResponse:
    row = await session.get(User, user_id)
    if row is None or row.avatar is None:
        raise HTTPException(404)
    return StoredObjectResponse(row.avatar, request, disposition="inline")


@router.get("/users/{user_id}/icon")
async def show_icon(
    user_id: Id, user: CurrentUser, session: SessionDep, request: Request
) -> StoredObjectResponse:
    row = await session.get(User, user_id)
    icon = None if row is None or row.avatar is None else row.avatar.variants["icon"]
    if icon is None:
        raise HTTPException(404)
    return StoredObjectResponse(icon, request, disposition="inline")
