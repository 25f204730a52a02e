"""Direct uploads: the page requests an upload, sends the file directly, and reports it to the application, which finishes it.

With a bucket, the bytes do not pass through the application at all.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from examples.gallery.models import Item, ItemOut, binding, require_taken, sessions
from granite_storage.web import DirectUploads

URL = os.environ.get("GALLERY_URL", "http://127.0.0.1:8000")

router = APIRouter(prefix="/direct")
uploads = DirectUploads(binding, secret=secrets.token_bytes(32), base_url=f"{URL}/uploads")


class Announcement(BaseModel):
    name: str
    type: str = Field(pattern=r"^[\x20-\x7e]{1,255}$")
    size: int = Field(ge=0)


class Arrival(BaseModel):
    token: str


@router.post("/begin")
async def begin(file: Announcement) -> dict[str, Any]:
    """Return the request with which the page may send this one file."""
    require_taken(file.type)
    upload = await uploads.begin(Item.file, filename=file.name, content_type=file.type, size=file.size)
    return upload.to_dict() | {"url": upload.url.removeprefix(URL)}  # a path if it is this server, which localhost reaches too


@router.post("/finish", status_code=201, response_model=ItemOut)
async def finish(arrival: Arrival) -> Item:
    """Add the uploaded file, if it is what was announced."""
    file = await uploads.finish(arrival.token, Item.file)
    async with sessions.begin() as session:
        item = Item(file=file)
        session.add(item)
    return item
