"""Users and permissions: who asks, and what they may see or change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import joinedload

from examples.gallery.models import Album, AlbumFile, User, sessions
from granite_storage.orm import AttachedFile

COOKIE = "gallery_token"

router = APIRouter(prefix="/session")
Id = Annotated[int, Path(ge=1, le=2**31 - 1)]


def hash_token(token: str) -> str:
    """Return what is stored of a token: long and random, it needs no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


async def find_user(token: str) -> User | None:
    async with sessions() as session:
        user: User | None = await session.scalar(
            select(User).where(User.token_hash == hash_token(token))
        )
    return user


async def get_user(request: Request) -> User | None:
    """Return who asks, None if they have not signed in; put your own login here."""
    token = request.cookies.get(COOKIE)
    return None if token is None else await find_user(token)


async def require_user(user: Annotated[User | None, Depends(get_user)]) -> User:
    if user is None:
        raise HTTPException(
            401, "Sign in first, with a link that the gallery printed when it started."
        )
    return user


AnyUser = Annotated[User | None, Depends(get_user)]
SignedIn = Annotated[User, Depends(require_user)]


def may_see(user: User | None, album: Album) -> bool:
    return album.is_public or is_owner(user, album)


def is_owner(user: User | None, album: Album) -> bool:
    return user is not None and user.id == album.owner_id


async def get_album(album_id: Id, user: AnyUser) -> Album:
    async with sessions() as session:
        album = await session.get(Album, album_id)
    if album is None or not may_see(user, album):
        raise HTTPException(404, "There is no such album.")
    return album


async def get_own_album(
    album: Annotated[Album, Depends(get_album)], user: SignedIn
) -> Album:
    if not is_owner(user, album):
        raise HTTPException(403, "Only its owner changes an album.")
    return album


async def get_file(file_id: Id, user: AnyUser) -> AttachedFile:
    with_album = [joinedload(AlbumFile.parent)]
    async with sessions() as session:
        file = await session.get(AlbumFile, file_id, options=with_album)
    if file is None or not may_see(user, file.parent):
        raise HTTPException(404, "There is no such file.")
    return file


async def get_own_file(
    file: Annotated[AttachedFile, Depends(get_file)], user: SignedIn
) -> AttachedFile:
    if not is_owner(user, file.parent):
        raise HTTPException(403, "Only its owner changes an album.")
    return file


class Token(BaseModel):
    token: str = Field(pattern=r"^[!-~]{1,200}$")


@router.get("")
async def show_user(user: AnyUser) -> dict[str, str | None]:
    """Return the name of who asks."""
    return {"name": None if user is None else user.name}


@router.post("", status_code=204)
async def sign_in(sent: Token, request: Request) -> Response:
    if await find_user(sent.token) is None:
        raise HTTPException(
            403, "The link is an old one: the gallery prints new links when it starts."
        )
    response = Response(status_code=204)
    is_https = request.url.scheme == "https"
    response.set_cookie(
        COOKIE, sent.token, httponly=True, samesite="strict", secure=is_https
    )
    return response


@router.delete("", status_code=204)
async def sign_out() -> Response:
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


async def add_users(tokens: Mapping[str, str]) -> None:
    """Give users their tokens, by name; a new user begins with an empty album."""
    async with sessions.begin() as session:
        for name, token in tokens.items():
            user = await session.scalar(select(User).where(User.name == name))
            if user is None:
                user = User(name=name)
                session.add(Album(owner=user, title=f"{name}’s pictures"))
            user.token_hash = hash_token(token)
