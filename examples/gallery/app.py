"""Albums of files that commit and roll back with their rows.

    python -m examples.gallery

It stores its rows in SQLite and its files on the local disk. Environment variables
change that:

    GALLERY_FOLDER  the folder for both; with `python -m examples.gallery` a temporary
                    one by default
    GALLERY_TOKENS  the users and their tokens, such as {"Anna": "a long random token"};
                    made and printed by default
    DATABASE_URL    for example postgresql+asyncpg://user:password@host/database
    S3_BUCKET       a bucket for the files; AWS_ENDPOINT_URL_S3 and the other AWS
                    variables locate it
    GALLERY_URL     its URL for browsers (http://127.0.0.1:8000), for direct uploads
    S3_ORIGIN       such as https://bucket.s3.eu-central-1.amazonaws.com: lets the page
                    send files directly to the bucket, whose CORS rules must allow it
    MAX_SIZE        the maximum size of a file in bytes (100 MB)

It requires the extra `gallery`.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from examples.gallery import albums, direct, rollback, users
from examples.gallery.guard import Guard
from examples.gallery.models import (
    ACCEPTED,
    FOLDER,
    MAX_SIZE,
    Album,
    Base,
    engine,
    journal,
    storage,
)
from granite_storage.web import INLINE_TYPES, install_error_handlers

STATIC = Path(__file__).parent / "static"


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with storage, journal.worker():
        await users.add_users(json.loads(os.environ.get("GALLERY_TOKENS", "{}")))
        await rollback.add_two_notes()
        yield
    await engine.dispose()


# FastAPI's documentation pages load scripts from another site, which the
# Content-Security-Policy forbids.
app = FastAPI(title="Gallery", lifespan=lifespan, docs_url=None, redoc_url=None)
app.add_middleware(Guard)
app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
app.mount("/static", StaticFiles(directory=STATIC))
app.mount("/uploads", direct.uploads)
for module in (albums, direct, rollback, users):
    app.include_router(module.router)
install_error_handlers(app)


@app.exception_handler(RequestValidationError)
async def refuse_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong without the value, which FastAPI's own answer repeats."""
    return JSONResponse(
        {
            "detail": " ".join(
                f"{problem['loc'][-1]}: {problem['msg']}." for problem in error.errors()
            )
        },
        422,
    )


@app.exception_handler(IntegrityError)
@app.exception_handler(StaleDataError)
async def refuse_stale(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(
        {"detail": "It has been changed or deleted meanwhile. Reload the page."}, 409
    )


@app.get("/settings")
async def settings() -> dict[str, object]:
    """Return the accepted media types, those shown inline, and the size limit."""
    return {"max_size": MAX_SIZE, "accepted": ACCEPTED, "shown": sorted(INLINE_TYPES)}


SHOWN_CODE: dict[str, list[Callable[..., object]]] = {
    "rollback": [rollback.change_notes],
    "model": [Album],
    "upload": [albums.store, albums.upload],
    "variants": [albums.show_variant],
    "permissions": [users.get_file, users.get_own_file],
    "direct": [direct.begin, direct.finish],
}


@app.get("/code")
async def code() -> dict[str, str]:
    """Return the code that the page shows beside its effect."""
    return {
        name: "\n\n".join(map(inspect.getsource, shown))
        for name, shown in SHOWN_CODE.items()
    }


@app.get("/", response_class=FileResponse)
async def gallery_page() -> FileResponse:
    return FileResponse(STATIC / "gallery.html")
