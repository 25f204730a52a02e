"""A gallery whose files commit and roll back with their rows: upload, show, replace, delete, and watch a rollback.

    python -m examples.gallery

It stores its rows in SQLite and its files on the local disk. Environment variables change that:

    GALLERY_FOLDER  the folder for both; with `python -m examples.gallery` a temporary one by default
    DATABASE_URL    for example postgresql+asyncpg://user:password@host/database
    S3_BUCKET       a bucket for the files; AWS_ENDPOINT_URL_S3 and the other AWS variables locate it
    GALLERY_URL     its URL for browsers (http://127.0.0.1:8000), for direct uploads
    S3_ORIGIN       such as https://bucket.s3.eu-central-1.amazonaws.com: lets the page send files directly to the bucket, whose
                    CORS rules must allow it
    MAX_SIZE        the maximum size of a file in bytes (100 MB)

It requires the extra `gallery`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.trustedhost import TrustedHostMiddleware

from examples.gallery import direct, rollback
from examples.gallery.guard import Guard
from examples.gallery.models import (
    FOLDER,
    MAX_SIZE,
    TAKEN,
    Base,
    Item,
    ItemOut,
    binding,
    engine,
    require_taken,
    sessions,
    storage,
)
from granite_storage import StorageGarbageCollector
from granite_storage.orm import Attachment
from granite_storage.web import (
    INLINE_TYPES,
    FilePart,
    StoredObjectResponse,
    UploadLimits,
    install_error_handlers,
    upload_body,
)

STATIC = Path(__file__).parent / "static"

# A direct upload stays beside its copy in the gallery until it is collected, so more than half of the objects may be orphans in
# one run.
collector = StorageGarbageCollector(storage, binding=binding, max_deleted_share=0.75)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with storage, collector.run_every(timedelta(hours=6)):
        await rollback.begin_with_two_notes()
        yield
    await engine.dispose()


# FastAPI's documentation pages load scripts from another site, which the Content-Security-Policy forbids.
app = FastAPI(title="Gallery", lifespan=lifespan, docs_url=None, redoc_url=None)
app.add_middleware(Guard)
app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
app.mount("/static", StaticFiles(directory=STATIC))
app.mount("/uploads", direct.uploads)
app.include_router(direct.router)
app.include_router(rollback.router)
install_error_handlers(app)


async def taken(part: FilePart) -> Attachment:
    """Store the file as it arrives; an unsuitable one is refused before a byte is read."""
    require_taken(part.content_type)
    return await Attachment(part, filename=part.filename, content_type=part.content_type).store(Item.file)


File = Annotated[
    Attachment,
    Depends(
        upload_body(
            taken,
            filename=lambda request: request.query_params.get("name"),
            limits=UploadLimits(max_size=None, max_file_size=MAX_SIZE),
        )
    ),
]
Id = Annotated[int, PathParameter(ge=1, le=2**31 - 1)]


@app.post("/items", status_code=201, response_model=ItemOut)
async def upload(file: File) -> Item:
    """Add the body as a file, under the `name` in the query."""
    async with sessions.begin() as session:
        item = Item(file=file)
        session.add(item)
    return item


@app.get("/items", response_model=list[ItemOut])
async def everything(before: int = 2**31 - 1, limit: Annotated[int, Query(ge=1, le=100)] = 24) -> list[Item]:
    """List items, newest first."""
    async with sessions() as session:
        return list(await session.scalars(select(Item).where(Item.id < before).order_by(Item.id.desc()).limit(limit)))


@app.put("/items/{item_id}/file", response_model=ItemOut)
async def replace(item_id: Id, file: File) -> Item:
    """Replace an item's file; the old one is deleted when this is committed."""
    async with sessions.begin() as session:
        item = await found(session, item_id)
        item.file = file
    return item


@app.api_route("/items/{item_id}/file", methods=["GET", "HEAD"], response_class=Response)
async def show(item_id: Id, request: Request, download: bool = False) -> StoredObjectResponse:
    """Stream an item's file, whole or in ranges: inline if that is safe, otherwise as a download."""
    async with sessions() as session:
        item = await found(session, item_id)
    return StoredObjectResponse(item.file, request, disposition="attachment" if download else "inline")


@app.api_route("/items/{item_id}/{name}", methods=["GET", "HEAD"], response_class=Response)
async def show_variant(item_id: Id, name: Literal["thumb", "preview"], request: Request, v: str = "") -> StoredObjectResponse:
    """Stream an item's thumbnail or preview; a browser keeps it for good where `v` is the beginning of its checksum."""
    async with sessions() as session:
        variant = (await found(session, item_id)).file.variants[name]
    if variant is None:
        raise HTTPException(404, f"There is no {name} of this item, or not yet.")
    is_exact = v == variant.checksum.removeprefix("sha256:")[:12]
    return StoredObjectResponse(variant, request, disposition="inline", immutable=is_exact)


@app.post("/items/{item_id}/preview", response_model=ItemOut)
async def make_preview(item_id: Id) -> Item:
    """Make the preview of a picture, unless it is there already; all who ask meanwhile wait for the same one."""
    async with sessions() as session:
        item = await found(session, item_id)
    await item.file.variant("preview")
    return item


@app.delete("/items/{item_id}", status_code=204)
async def delete(item_id: Id) -> None:
    """Delete an item and its file."""
    async with sessions.begin() as session:
        await session.delete(await found(session, item_id))


@app.get("/settings")
async def settings() -> dict[str, object]:
    """Return the accepted media types, those shown inline, and the size limit."""
    return {"max_size": MAX_SIZE, "taken": TAKEN, "shown": sorted(INLINE_TYPES)}


@app.get("/", response_class=FileResponse)
async def gallery_page() -> FileResponse:
    return FileResponse(STATIC / "gallery.html")


@app.get("/rollback", response_class=FileResponse)
async def rollback_page() -> FileResponse:
    return FileResponse(STATIC / "rollback.html")


async def found(session: AsyncSession, item_id: int) -> Item:
    item = await session.get(Item, item_id)
    if item is None:
        raise HTTPException(404, "There is no such item; it may have been deleted meanwhile.")
    return item
