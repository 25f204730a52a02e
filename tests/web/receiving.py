"""What the tests of receiving share: a model, an application, and forms of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import StaticPool
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from granite_storage import StorageBackend, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.orm import Attachment, attachment
from granite_storage.web import (
    FileList,
    FilePart,
    PolicyTarget,
    UploadForm,
    UploadLimits,
    install_error_handlers,
    stream_body,
    stream_upload,
)
from tests.core.support import eventually

MIB = 1 << 20
BOUNDARY = "a-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
CRLF = b"\r\n"


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[Attachment | None] = attachment("files")


@functools.cache
def _empty_tables() -> bytes:
    """The file of a database in which the tables are, since to create them for each test takes longer than most."""
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        engine = create_engine("sqlite://", poolclass=StaticPool, creator=lambda: connection)
        Base.metadata.create_all(engine)
        return connection.serialize()


def engine_of(folder: Path) -> AsyncEngine:
    """Return an engine on a new database in a new folder, with the tables in it."""
    folder.mkdir()
    (folder / "rows.db").write_bytes(_empty_tables())
    engine = create_async_engine(f"sqlite+aiosqlite:///{folder / 'rows.db'}")
    event.listen(engine.sync_engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF").close())
    return engine


def manager_of(backend: StorageBackend, max_size: int | None = 400 * MIB) -> StorageManager:
    return StorageManager(backends={"store": backend}, policies={"files": StoragePolicy("files", "store", max_size=max_size)})


@dataclass
class App:
    """Takes forms and bodies; `limits` and what becomes of a form may be changed by a test."""

    manager: StorageManager
    sessions: async_sessionmaker[AsyncSession]
    limits: UploadLimits = field(default_factory=UploadLimits)
    errors: list[BaseException] = field(default_factory=list)
    forms: list[UploadForm] = field(default_factory=list)
    started: int = 0

    @property
    def ref_target(self) -> PolicyTarget:
        return PolicyTarget(manager=self.manager, storage_key="files", model_name="doc", entity_id="1", field_name="file")

    def asgi(self, *middleware: Middleware) -> Starlette:
        routes = [
            Route("/form", self._watched(self._form), methods=["POST"]),
            Route("/rows", self._watched(self._rows), methods=["POST"]),
            Route("/body/{name}", self._watched(self._body), methods=["PUT"]),
        ]
        app = Starlette(routes=routes, middleware=middleware)
        install_error_handlers(app)
        return app

    def _watched(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def watched(request: Request) -> Response:
            self.started += 1
            try:
                response: Response = await endpoint(request)
            except BaseException as error:
                self.errors.append(error)
                raise
            return response

        return watched

    async def _form(self, request: Request) -> Response:
        """Store files in attachments, of `ref` under a policy, and of `size` not at all."""
        targets = {"file": Document.file, "ref": self.ref_target, "size": size_of, "ignored": ignored}
        form = await stream_upload(request, targets, limits=self.limits)
        self.forms.append(form)
        return JSONResponse(
            {"fields": form.fields.multi_items(), "files": [[name, shown(file)] for name, file in form.files.multi_items()]}
        )

    async def _rows(self, request: Request) -> Response:
        """Put each file on a row of its own."""
        async with await stream_upload(request, {"file": FileList(Document.file, 10)}, limits=self.limits) as form:
            async with self.sessions.begin() as session:
                session.add_all(Document(title=form.fields["title"], file=file) for file in form.files["file"])
            if "fail" in form.fields:
                raise RuntimeError("after the commit")
        return Response(status_code=201)

    async def _body(self, request: Request) -> Response:
        target = self.ref_target if "ref" in request.query_params else Document.file
        stored = await stream_body(request, target, filename=request.path_params["name"], limits=self.limits)
        return JSONResponse(shown(stored))


def shown(stored: Any) -> Any:
    ref = stored.ref if isinstance(stored, Attachment) else stored
    if not isinstance(ref, StoredObjectRef):
        return ref
    return {"size": ref.size, "checksum": ref.checksum, "name": ref.original_filename, "type": ref.content_type}


async def size_of(part: FilePart) -> dict[str, Any]:
    return {"size": sum([len(chunk) async for chunk in part]), "before": part.fields.multi_items()}


async def ignored(part: FilePart) -> None:
    """Read nothing."""


def part(name: str, content: bytes = b"", *, filename: str | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
    lines = [f"--{BOUNDARY}", disposition, *(f"{key}: {value}" for key, value in (headers or {}).items()), "", ""]
    return CRLF.join(line.encode("utf-8", "surrogateescape") for line in lines) + content + CRLF


END = f"--{BOUNDARY}--\r\n".encode()


async def sliced(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def streamed(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def stored_in(manager: StorageManager) -> list[str]:
    """Where objects are."""
    return [info.location async for info in manager.backend("store").iter_objects()]


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """Serve an application with uvicorn, and give the port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.ensure_future(server._serve([listening]))
    await eventually(lambda: server.started)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await serving
        listening.close()
