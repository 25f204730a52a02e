"""`<input type="file" multiple>` straight into a collection of attachments."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi import UploadFile as FastAPIUpload
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, selectinload

from granite_storage import StorageManager, StoragePolicy, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import AttachmentList, append_files, attachments
from granite_storage.web import UploadForm, UploadLimits, install_error_handlers, upload_form


class Base(DeclarativeBase):
    pass


class Album(Base):
    __tablename__ = "album"
    id: Mapped[int] = mapped_column(primary_key=True)
    photos: Mapped[AttachmentList] = attachments("photos", max_files=3)
    scans: Mapped[AttachmentList] = attachments("photos")


class AlbumOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    photos: AttachmentList


DEPENDENCY = upload_form({"photos": Album.photos, "scans": Album.scans}, limits=UploadLimits(max_files=5))
Form = Annotated[UploadForm, Depends(DEPENDENCY)]
Client = tuple[httpx.AsyncClient, MemoryStorageBackend, FastAPI]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    backend = MemoryStorageBackend()
    manager = StorageManager(backends={"store": backend}, policies={"photos": StoragePolicy("photos", "store", max_size=100)})
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    binding = bind_storage(Base, manager, session_factory=sessions)
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/albums", response_model=AlbumOut, openapi_extra=DEPENDENCY.openapi_extra)
    async def create(form: Form) -> Any:
        async with sessions.begin() as session:
            album = Album(photos=form.files["photos"], scans=form.files["scans"])
            session.add(album)
        return album

    @app.post("/albums/{album_id}/photos", status_code=204)
    async def add(album_id: int, photos: list[FastAPIUpload]) -> None:
        async with sessions.begin() as session:
            append_files(await session.get_one(Album, album_id), Album.photos, photos)

    @app.get("/albums/{album_id}", response_model=AlbumOut)
    async def show(album_id: int) -> Any:
        async with sessions() as session:
            return await session.get_one(Album, album_id, options=[selectinload(Album.photos)])

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client, backend, app
    binding.unbind()
    await engine.dispose()
    await manager.aclose()


async def count(backend: MemoryStorageBackend) -> int:
    return len([info async for info in backend.iter_objects()])


def files(field: str, *names: str) -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (name, name.encode())) for name in names]


def names_in(answer: httpx.Response) -> list[str]:
    return [photo["file"]["original_filename"] for photo in answer.json()["photos"]]


async def test_streamed_form(client: Client) -> None:
    http, backend, _ = client
    answer = await http.post("/albums", files=[*files("photos", "b", "a"), *files("scans", "1", "2")])
    assert (answer.status_code, names_in(answer)) == (200, ["b", "a"])
    assert names_in(await http.get("/albums/1")) == ["b", "a"]
    assert await count(backend) == 4
    answer = await http.post("/albums", files=files("scans", "3"))
    assert names_in(answer) == []


async def test_form_with_empty_inputs(client: Client) -> None:
    http, backend, _ = client
    answer = await http.post("/albums", files=[("photos", ("", b"")), ("scans", ("", b""))])
    assert (answer.status_code, answer.json()["photos"], await count(backend)) == (200, [], 0)


async def test_too_many_in_one_form(client: Client) -> None:
    http, backend, _ = client
    answer = await http.post("/albums", files=files("photos", "1", "2", "3", "4"))
    assert (answer.status_code, answer.json()["limit"], answer.json()["maximum"]) == (413, "max_files", 3)
    answer = await http.post("/albums", files=files("scans", *"123456"))
    assert answer.status_code == 413
    assert await count(backend) == 0


async def test_uploads_of_fastapi(client: Client) -> None:
    http, backend, _ = client
    await http.post("/albums", files=files("photos", "a"))
    assert (await http.post("/albums/1/photos", files=files("photos", "c", "b"))).status_code == 204
    assert names_in(await http.get("/albums/1")) == ["a", "c", "b"]
    answer = await http.post("/albums/1/photos", files=files("photos", "d"))
    assert (answer.status_code, answer.json()["max_files"]) == (413, 3)
    assert answer.json()["detail"] == "There can be at most 3 files."
    assert await count(backend) == 3


async def test_documentation(client: Client) -> None:
    http, _, _ = client
    described = (await http.get("/openapi.json")).json()
    body = described["paths"]["/albums"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    file = {"type": "string", "format": "binary"}
    assert body["photos"] == {"type": "array", "items": file, "maxItems": 3}
    assert body["scans"]["maxItems"] == 5
    shown = described["components"]["schemas"]["AlbumOut"]["properties"]["photos"]
    assert (shown["type"], set(shown["items"]["properties"])) == ("array", {"id", "caption", "file"})
