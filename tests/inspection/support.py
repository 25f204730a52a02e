"""What the tests of judging share: a shop with every way in, and scanners that do as they are told."""

from __future__ import annotations

import asyncio
import io
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import create_engine, event, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ScannerUnavailableError
from granite_storage.inspection import ScanResult
from granite_storage.inspection.base import OnUnavailable
from granite_storage.orm import Attachment, attachment
from granite_storage.web import DirectUploads, install_error_handlers, stream_body, stream_upload
from tests.orm.values import Sessions

INFECTED = b"X5O!P%@AP[4" + rb"\PZX54(P^)7CC)7}$EICAR" + b"-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"


def png(width: int = 3, height: int = 2, *, text: bytes = b"") -> bytes:
    """A picture that says so many pixels of itself; it has them only where they are few."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + bytes(3 * min(width, 64))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    comment = chunk(b"tEXt", b"Comment\0" + text) if text else b""
    data = chunk(b"IDAT", zlib.compress(row * min(height, 64)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + comment + data + chunk(b"IEND", b"")


@dataclass
class ScriptedScanner:
    """Finds what has EICAR's test text in it, unless it is told to fail."""

    on_unavailable: OnUnavailable = "refuse"
    fails: BaseException | None = None
    hangs: bool = False
    reads: bool = True
    seen: list[bytes] = field(default_factory=list)

    async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
        if self.fails is not None:
            raise self.fails
        if self.hangs:
            await asyncio.Event().wait()
        whole = b"".join([piece async for piece in content]) if self.reads else b""
        self.seen.append(whole)
        return ScanResult(INFECTED not in whole, "scripted 1", "Eicar-Test" if INFECTED in whole else None)


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")
    other: Mapped[Attachment | None] = attachment("plain")


@dataclass(frozen=True)
class File:
    """What a client sends."""

    content: bytes
    filename: str = "a.png"
    content_type: str | None = "image/png"

    def upload(self) -> UploadFile:
        headers = Headers({} if self.content_type is None else {"content-type": self.content_type})
        return UploadFile(io.BytesIO(self.content), size=len(self.content), filename=self.filename, headers=headers)

    async def pieces(self, size: int = 1000) -> AsyncIterator[bytes]:
        for start in range(0, len(self.content), size):
            yield self.content[start : start + size]


class Refused(Exception):  # noqa: N818  # it is the answer of a server, not an error
    """The application answered with a problem."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(response.text)
        self.status = response.status_code
        self.problem: dict[str, Any] = response.json()


@dataclass
class Shop:
    """A manager whose policy `files` judges, and an application on it with each way in."""

    manager: StorageManager
    sessions: Sessions
    folder: Path
    uploads: DirectUploads
    engine: Any

    async def objects(self) -> set[str]:
        return {info.location for backend in self.manager.backends.values() async for info in backend.iter_objects()}

    @property
    def client(self) -> httpx.AsyncClient:
        app = Starlette(
            routes=[
                Route("/form", self._form, methods=["POST"]),
                Route("/body/{name}", self._body, methods=["PUT"]),
                Route("/finish", self._finish, methods=["POST"]),
                Mount("/uploads", self.uploads),
            ]
        )
        install_error_handlers(app)
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def _form(self, request: Request) -> Response:
        async with await stream_upload(request, {"file": Document.file}) as form:
            return await self._keep(form.files["file"])

    async def _body(self, request: Request) -> Response:
        return await self._keep(await stream_body(request, Document.file, filename=request.path_params["name"]))

    async def _finish(self, request: Request) -> Response:
        return await self._keep(await self.uploads.finish((await request.json())["token"], Document.file))

    async def _keep(self, file: Any) -> Response:
        async with self.sessions.begin() as session:
            session.add(Document(file=file))
        return JSONResponse({})


@dataclass
class Counted:
    """A validator that notes what it was shown, and refuses one name."""

    shown: list[Any] = field(default_factory=list)

    def __call__(self, upload: Any) -> None:
        self.shown.append(upload)
        if upload.filename is not None and upload.filename.startswith("unwanted"):
            raise ValueError("we do not want files of that name")


SLOT = {"model_name": "document", "entity_id": "1", "field_name": "file"}
NAMED = {**SLOT, "storage_key": "files"}
Way = Callable[[Shop, File], Awaitable[StoredObjectRef]]


async def put_bytes(shop: Shop, file: File) -> StoredObjectRef:
    return await shop.manager.put_bytes(
        **NAMED, content=file.content, content_type=file.content_type, original_filename=file.filename
    )


async def put_stream(shop: Shop, file: File) -> StoredObjectRef:
    return await shop.manager.put_stream(
        **NAMED, stream=file.pieces(), content_type=file.content_type, original_filename=file.filename, size=len(file.content)
    )


async def put_upload(shop: Shop, file: File) -> StoredObjectRef:
    return await shop.manager.put_stream(**NAMED, stream=file.upload())


async def put_bytes_synchronously(shop: Shop, file: File) -> StoredObjectRef:
    def put() -> StoredObjectRef:
        return shop.manager.sync.put_bytes(
            **NAMED, content=file.content, content_type=file.content_type, original_filename=file.filename
        )

    return await asyncio.to_thread(put)


async def flush(shop: Shop, file: File) -> StoredObjectRef:
    new = Attachment(file.content, filename=file.filename, content_type=file.content_type)
    async with shop.sessions.begin() as session:
        session.add(Document(file=new))
    return new.ref


async def flush_upload(shop: Shop, file: File) -> StoredObjectRef:
    new = Attachment.from_upload(file.upload())
    async with shop.sessions.begin() as session:
        session.add(Document(file=new))
    return new.ref


async def store_before(shop: Shop, file: File) -> StoredObjectRef:
    new = Attachment(file.pieces(), filename=file.filename, content_type=file.content_type)
    await new.store(Document.file)
    return new.ref


async def flush_synchronously(shop: Shop, file: File) -> StoredObjectRef:
    def run() -> StoredObjectRef:
        with Session(shop.engine, expire_on_commit=False) as session, session.begin():
            new = Attachment(io.BytesIO(file.content), filename=file.filename, content_type=file.content_type)
            session.add(Document(file=new))
            session.flush()
            return new.ref

    return await asyncio.to_thread(run)


async def _ref_of_row(shop: Shop) -> StoredObjectRef:
    async with shop.sessions() as session:
        row = (await session.scalars(select(Document))).one()
        assert row.file is not None
        return row.file.ref


def _require_success(response: httpx.Response) -> None:
    if not response.is_success:
        raise Refused(response)


async def post_form(shop: Shop, file: File) -> StoredObjectRef:
    async with shop.client as client:
        _require_success(await client.post("/form", files={"file": (file.filename, file.content, file.content_type)}))
    return await _ref_of_row(shop)


async def put_body(shop: Shop, file: File) -> StoredObjectRef:
    headers = {} if file.content_type is None else {"Content-Type": file.content_type}
    async with shop.client as client:
        _require_success(await client.put(f"/body/{file.filename}", content=file.content, headers=headers))
    return await _ref_of_row(shop)


async def upload_directly(shop: Shop, file: File) -> StoredObjectRef:
    begun = await shop.uploads.begin(Document.file, filename=file.filename, content_type=file.content_type, min_size=0)
    async with shop.client as client:
        _require_success(await client.put(begun.url, content=file.content, headers=begun.headers))
        _require_success(await client.post("/finish", json={"token": begun.token}))
    return await _ref_of_row(shop)


async def copy_from_another_policy(shop: Shop, file: File) -> StoredObjectRef:
    plain = await shop.manager.put_bytes(
        **SLOT, storage_key="plain", content=file.content, content_type=file.content_type, original_filename=file.filename
    )
    try:
        return await shop.manager.copy(plain, **NAMED)
    finally:
        await shop.manager.delete(plain)


WAYS: Mapping[str, Way] = {
    way.__name__: way
    for way in (
        put_bytes,
        put_stream,
        put_upload,
        put_bytes_synchronously,
        flush,
        flush_upload,
        store_before,
        flush_synchronously,
        post_form,
        put_body,
        upload_directly,
        copy_from_another_policy,
    )
}


@asynccontextmanager
async def make_shop(folder: Path, **checks: Any) -> AsyncIterator[Shop]:
    """A shop on SQLite and in memory."""
    url = f"sqlite:///{folder / 'shop.db'}"
    engine = create_engine(url)
    async_engine = create_async_engine(url.replace("sqlite", "sqlite+aiosqlite"))
    for each in (engine, async_engine.sync_engine):
        event.listen(each, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF").close())
    await asyncio.to_thread(Base.metadata.create_all, engine)
    policies = {
        "files": StoragePolicy("files", "memory", max_size=10_000_000, **checks),
        "plain": StoragePolicy("plain", "memory"),
    }
    manager = StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies)
    binding = bind_storage(Base, manager)
    uploads = DirectUploads(binding, secret="s" * 40, base_url="http://test/uploads")
    try:
        yield Shop(manager, Sessions(async_engine, expire_on_commit=False), folder, uploads, engine)
    finally:
        binding.unbind()
        await asyncio.to_thread(manager.sync.close)
        await async_engine.dispose()
        await asyncio.to_thread(engine.dispose)


UNAVAILABLE = ScannerUnavailableError("nobody answers")
