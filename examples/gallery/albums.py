"""Albums and their files: list, upload, show, replace, put first and delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import or_, select
from sqlalchemy.orm import joinedload, selectinload

from examples.gallery.models import ACCEPTED, MAX_SIZE, Album, AlbumFile, User, sessions
from examples.gallery.users import (
    AnyUser,
    SignedIn,
    get_file,
    get_own_album,
    get_own_file,
    is_owner,
)
from granite_storage.orm import (
    AttachedFile,
    Attachment,
    AttachmentVariant,
    append_files,
)
from granite_storage.web import (
    FilePart,
    StoredObjectResponse,
    UnsupportedRequestError,
    UploadLimits,
    upload_body,
)

router = APIRouter()
OwnAlbum = Annotated[Album, Depends(get_own_album)]
ReadableFile = Annotated[AttachedFile, Depends(get_file)]
OwnFile = Annotated[AttachedFile, Depends(get_own_file)]


class PictureOut(BaseModel):
    """A thumbnail or a large copy; `media` has its width and height."""

    model_config = ConfigDict(from_attributes=True)

    size: int
    checksum: str
    media: dict[str, Any]


def show_picture(variant: AttachmentVariant | None) -> PictureOut | None:
    return None if variant is None else PictureOut.model_validate(variant)


class FileOut(BaseModel):
    """A file of an album: size, media type, name and checksum, and no location."""

    id: int
    file: Attachment
    thumb: PictureOut | None
    large: PictureOut | None
    is_pending: bool = Field(description="The large copy is still to be made.")

    @classmethod
    def of(cls, row: AttachedFile) -> FileOut:
        large = show_picture(row.file.variants["large"])
        return cls(
            id=row.id,
            file=row.file,
            thumb=show_picture(row.file.variants["thumb"]),
            large=large,
            is_pending=large is None
            and (row.file.content_type or "").startswith("image/"),
        )


class AlbumOut(BaseModel):
    id: int
    title: str
    owner: str
    is_public: bool
    is_own: bool
    files: list[FileOut]

    @classmethod
    def of(cls, album: Album, user: User | None) -> AlbumOut:
        return cls(
            id=album.id,
            title=album.title,
            owner=album.owner.name,
            is_public=album.is_public,
            is_own=is_owner(user, album),
            files=[FileOut.of(row) for row in album.files],
        )


async def store(part: FilePart) -> Attachment:
    """Store a file as it arrives, unless its declared type is refused."""
    require_accepted(part.content_type)
    file = Attachment(part, filename=part.filename, content_type=part.content_type)
    return await file.store(AlbumFile.file)


def require_accepted(content_type: str | None) -> None:
    """Refuse by the declared type before a byte is read, as the policy does later."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if (
        media_type not in ACCEPTED
        and f"{media_type.partition('/')[0]}/*" not in ACCEPTED
    ):
        raise UnsupportedRequestError(
            "the gallery takes pictures, films, sound, plain text, PDF and ZIP"
        )


receive = upload_body(
    store,
    filename=lambda request: request.query_params.get("name"),
    limits=UploadLimits(max_size=None, max_file_size=MAX_SIZE),
)
File = Annotated[Attachment, Depends(receive)]


@router.get("/albums")
async def list_albums(
    user: AnyUser,
    before: Annotated[int, Query(ge=1, le=2**31 - 1)] = 2**31 - 1,
    limit: Annotated[int, Query(ge=1, le=50)] = 10,
) -> list[AlbumOut]:
    """List the albums that the user may see, the newest first, with their files."""
    readable = or_(Album.is_public, Album.owner_id == (user.id if user else None))
    query = (
        select(Album)
        .where(readable, Album.id < before)
        .order_by(Album.id.desc())
        .limit(limit)
    )
    query = query.options(joinedload(Album.owner), selectinload(Album.files))
    async with sessions() as session:
        albums = (await session.scalars(query)).all()
    return [AlbumOut.of(album, user) for album in albums]


class NewAlbum(BaseModel):
    title: str = Field(pattern=r"^[^\x00-\x1f]{1,100}$")


@router.post("/albums", status_code=201)
async def add_album(new: NewAlbum, user: SignedIn) -> AlbumOut:
    """Add an empty album that only its owner sees."""
    async with sessions.begin() as session:
        session.add(user)
        album = Album(owner=user, title=new.title, files=[])
        session.add(album)
    return AlbumOut.of(album, user)


@router.put("/albums/{album_id}/public", status_code=204)
async def publish(album: OwnAlbum, is_public: bool) -> None:
    """Let everybody see an album, or its owner only."""
    async with sessions.begin() as session:
        session.add(album)
        album.is_public = is_public


@router.delete("/albums/{album_id}", status_code=204)
async def delete_album(album: OwnAlbum) -> None:
    """Delete an album with all of its files."""
    async with sessions.begin() as session:
        session.add(album)
        await session.delete(album)


@router.post("/albums/{album_id}/files", status_code=201)
async def upload(album: OwnAlbum, file: File) -> FileOut:
    """Add the body as a file, under the `name` in the query."""
    async with sessions.begin() as session:
        session.add(album)
        [row] = append_files(album, Album.files, [file])
    return FileOut.of(row)


@router.get("/files/{file_id}/state")
async def show_state(row: ReadableFile) -> FileOut:
    """Describe a file, for a page that waits for its large copy."""
    return FileOut.of(row)


@router.put("/files/{file_id}")
async def replace(row: OwnFile, file: File) -> FileOut:
    """Replace a file; the old one is deleted when this is committed."""
    async with sessions.begin() as session:
        session.add(row)
        row.file = file
    return FileOut.of(row)


@router.put("/files/{file_id}/first", status_code=204)
async def put_first(row: OwnFile) -> None:
    """Move a file to the beginning of its album; no byte is copied."""
    async with sessions.begin() as session:
        with_files = [selectinload(Album.files)]
        album = await session.get_one(Album, row.parent.id, options=with_files)
        album.files.reorder([row.id])


@router.delete("/files/{file_id}", status_code=204)
async def delete_file(row: OwnFile) -> None:
    """Delete a file with its row."""
    async with sessions.begin() as session:
        session.add(row)
        await session.delete(row)


@router.get("/files/{file_id}", response_class=Response)
@router.head("/files/{file_id}", include_in_schema=False)
async def show(
    row: ReadableFile, request: Request, download: bool = False
) -> StoredObjectResponse:
    """Stream a file, whole or in ranges: inline if safe, otherwise as a download."""
    return StoredObjectResponse(
        row.file, request, disposition="attachment" if download else "inline"
    )


@router.get("/files/{file_id}/{name}", response_class=Response)
@router.head("/files/{file_id}/{name}", include_in_schema=False)
async def show_variant(
    row: ReadableFile,
    name: Literal["thumb", "large"],
    request: Request,
    v: str = "",
) -> StoredObjectResponse:
    """Stream a variant; a browser may keep it where `v` is its checksum."""
    variant = row.file.variants[name]
    if variant is None:
        raise HTTPException(404, f"There is no {name} of this file, or not yet.")
    is_exact = v == variant.checksum.removeprefix("sha256:")[:12]
    return StoredObjectResponse(
        variant, request, disposition="inline", immutable=is_exact
    )
