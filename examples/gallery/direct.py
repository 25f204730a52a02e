"""Direct uploads: the page asks where to send a file, sends it there, and reports it.

With a bucket, the bytes do not pass through the application at all.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from examples.gallery.albums import FileOut, OwnAlbum, require_accepted
from examples.gallery.models import Album, AlbumFile, binding, sessions
from granite_storage.orm import append_files
from granite_storage.web import DirectUploads

URL = os.environ.get("GALLERY_URL", "http://127.0.0.1:8000")

router = APIRouter(prefix="/albums/{album_id}/direct")
uploads = DirectUploads(
    binding, secret=secrets.token_bytes(32), base_url=f"{URL}/uploads"
)


class Announcement(BaseModel):
    name: str
    type: str = Field(pattern=r"^[\x20-\x7e]{1,255}$")
    size: int = Field(ge=0)


class Arrival(BaseModel):
    token: str


@router.post("/begin")
async def begin(album: OwnAlbum, file: Announcement) -> dict[str, Any]:
    """Return the request with which the page may send this one file."""
    require_accepted(file.type)
    upload = await uploads.begin(
        AlbumFile.file,
        filename=file.name,
        content_type=file.type,
        size=file.size,
        owner=f"album {album.id}",
    )
    url = upload.url.removeprefix(
        URL
    )  # a path if it is this server, which localhost reaches too
    return upload.to_dict() | {"url": url}


@router.post("/finish", status_code=201)
async def finish(album: OwnAlbum, arrival: Arrival) -> FileOut:
    """Add the uploaded file, if it is what was announced for this album."""
    file = await uploads.finish(
        arrival.token, AlbumFile.file, owner=f"album {album.id}"
    )
    async with sessions.begin() as session:
        session.add(album)
        [row] = append_files(album, Album.files, [file])
    return FileOut.of(row)
