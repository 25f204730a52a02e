from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from granite_storage.web import install_error_handlers

from . import avatars, documents, users
from .database import engine, journal
from .storage import storage


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with storage, journal.worker():
        yield
    await engine.dispose()


app = FastAPI(title="Team files", lifespan=lifespan)
install_error_handlers(app)
app.include_router(users.router)
app.include_router(avatars.router)
app.include_router(documents.router)
