from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Path
from granite_storage import StorageJournal, bind_storage
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from . import settings
from .models import Base
from .storage import storage

engine = create_async_engine(settings.DATABASE_URL)
sessions = async_sessionmaker(engine, expire_on_commit=False)
journal = StorageJournal(engine)
binding = bind_storage(Base, storage, session_factory=sessions, journal=journal)


async def get_session() -> AsyncIterator[AsyncSession]:
    async with sessions.begin() as session:
        yield session


SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
Id = Annotated[int, Path(ge=1, le=2**31 - 1)]
