import uuid
from collections.abc import Generator
from typing import Any

from fastapi import APIRouter, HTTPException, UploadFile
from fastapi.responses import StreamingResponse

from app.api.deps import CurrentUser, SessionDep
from app.models import Message, User, UserPublic
from granite_storage import Attachment

router = APIRouter(prefix="/users", tags=["avatars"])


@router.put("/me/avatar", response_model=UserPublic)
def upload_avatar(session: SessionDep, current_user: CurrentUser, file: UploadFile) -> Any:
    current_user.avatar = Attachment.from_upload(file)
    session.add(current_user)
    session.commit()
    session.refresh(current_user)
    return current_user


@router.get("/{user_id}/avatar")
def download_avatar(session: SessionDep, current_user: CurrentUser, user_id: uuid.UUID) -> StreamingResponse:
    user = session.get(User, user_id)
    if user is None or user.avatar is None:
        raise HTTPException(404, "The user has no avatar")
    return StreamingResponse(chunks(user.avatar), media_type=user.avatar.content_type)


def chunks(file: Attachment) -> Generator[bytes, None, None]:
    with file.sync.open(verify=True) as reader:
        while chunk := reader.read(64 * 1024):
            yield chunk


@router.delete("/me/avatar")
def delete_avatar(session: SessionDep, current_user: CurrentUser) -> Message:
    current_user.avatar = None
    session.add(current_user)
    session.commit()
    return Message(message="Avatar deleted successfully")
