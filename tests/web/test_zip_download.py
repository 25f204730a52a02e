"""The example that sends many files as one zip: flat memory, a free event loop, and nothing left open."""

from __future__ import annotations

import asyncio
import io
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.zip_download import ZipResponse
from granite_storage import Attachment, ObjectNotFoundError, StorageManager, StoragePolicy, bind_storage
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import AttachmentList, attachments
from tests.core.support import eventually

MIB = 1 << 20


class Base(DeclarativeBase):
    pass


class Album(Base):
    __tablename__ = "album"
    id: Mapped[int] = mapped_column(primary_key=True)
    photos: Mapped[AttachmentList] = attachments("photos")


Add = Callable[..., Any]


@pytest.fixture
async def add(tmp_path: Path) -> AsyncIterator[Add]:
    """Commit an album with some files, and return them."""
    backend = LocalStorageBackend(tmp_path, fsync=False)
    manager = StorageManager(backends={"disk": backend}, policies={"photos": StoragePolicy("photos", "disk")})
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    binding = bind_storage(Base, manager)

    async def add(*contents: bytes) -> list[Attachment]:
        async with async_sessionmaker(engine, expire_on_commit=False).begin() as session:
            album = Album(photos=[Attachment(content, filename="grün.jpg") for content in contents])
            session.add(album)
        return [photo.file for photo in album.photos]

    yield add
    binding.unbind()
    await engine.dispose()
    await manager.aclose()


async def _receive() -> Any:
    await asyncio.Event().wait()


async def test_archive(add: Add) -> None:
    files = await add(b"first", b"", b"third" * 100_000)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await ZipResponse(files, "album.zip")({"type": "http", "method": "GET"}, _receive, send)
    headers = dict(sent[0]["headers"])
    body = b"".join(message.get("body", b"") for message in sent)
    assert headers[b"content-length"] == str(len(body)).encode()
    assert headers[b"content-type"] == b"application/zip"
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.namelist() == ["001 grün.jpg", "002 grün.jpg", "003 grün.jpg"]
        assert [archive.read(name) for name in archive.namelist()] == [b"first", b"", b"third" * 100_000]


async def test_memory(add: Add) -> None:
    """It does not grow with the files, and the loop goes on meanwhile."""
    files = (await add(b"x" * (8 * MIB))) * 16
    size, turns = 0, 0

    async def send(message: Any) -> None:
        nonlocal size
        size += len(message.get("body", b""))

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.create_task(turn())
    tracemalloc.start()
    try:
        await ZipResponse(files, "album.zip")({"type": "http", "method": "GET"}, _receive, send)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        turning.cancel()
    assert size > 128 * MIB
    assert peak < 8 * MIB
    assert turns > 100


@pytest.mark.parametrize("way", ["disconnect", "error of the connection"])
async def test_aborted(add: Add, way: str) -> None:
    """The fixtures of all tests find a thread, a task or an open file that is left."""
    files = await add(*[b"x" * MIB] * 4)
    left = asyncio.Event()
    count = 0

    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal count
        count += 1
        if count == 4 and way == "disconnect":
            left.set()
            await asyncio.Event().wait()
        elif count == 4:
            raise OSError("the client is gone")

    response = ZipResponse(files, "album.zip")
    try:
        await response({"type": "http", "method": "GET", "asgi": {"spec_version": "2.3"}}, receive, send)
    except OSError:
        assert way != "disconnect"
    await eventually(lambda: response._chunks.ag_frame is None)  # type: ignore[attr-defined]


async def test_missing_file(add: Add) -> None:
    """The response breaks off: a client that knows its length sees that it is not whole."""
    files = await add(b"a" * MIB, b"b")
    await files[1].manager.delete(files[1].ref)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(ObjectNotFoundError):
        await ZipResponse(files, "album.zip")({"type": "http", "method": "GET"}, _receive, send)
    assert not any(message.get("more_body") is False for message in sent)
