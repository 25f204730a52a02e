import hashlib
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from .database import Id, SessionDep, sessions
from .models import User

router = APIRouter()
Token = Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


async def get_current_user(token: Token) -> User:
    query = select(User).where(User.token_hash == hash_token(token.credentials))
    async with sessions() as session:
        user = await session.scalar(query)
    if user is None:
        raise HTTPException(401, "The token is not valid")
    return user


CurrentUser = Annotated[User, Depends(get_current_user)]


async def get_admin(user: CurrentUser) -> User:
    if not user.is_admin:
        raise HTTPException(403, "Only administrators may do this")
    return user


class UserOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    email: str


@router.get("/me", response_model=UserOut)
async def show_me(user: CurrentUser) -> User:
    return user


@router.get("/users", response_model=list[UserOut], dependencies=[Depends(get_admin)])
async def list_users(session: SessionDep) -> Sequence[User]:
    return (await session.scalars(select(User).order_by(User.id))).all()


@router.delete("/users/{user_id}", status_code=204, dependencies=[Depends(get_admin)])
async def delete_user(user_id: Id, session: SessionDep) -> None:
    user = await session.get(User, user_id)
    if user is None:
        raise HTTPException(404)
    await session.delete(user)
