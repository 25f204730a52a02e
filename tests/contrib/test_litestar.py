"""The plugin for Litestar: what it replaces of what applications write themselves, through DTOs and without."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from advanced_alchemy.extensions.litestar import SQLAlchemyDTO, SQLAlchemySerializationPlugin
from advanced_alchemy.extensions.litestar import SQLAlchemyDTOConfig as DTOConfig
from litestar import Litestar, Request, Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.dto import DTOData, dto_field
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody
from litestar.types import ASGIApp
from openapi_spec_validator import validate
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column, selectinload

from granite_storage import (
    Attachment,
    BackendUnavailableError,
    ConfigurationError,
    StorageError,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    attachment,
)
from granite_storage.contrib.litestar import StoragePlugin, provide_upload_form
from granite_storage.orm import AttachmentList, attachments
from granite_storage.orm.columns import StoredObjectRefType
from granite_storage.testing import BoundStorage, bound_storage
from granite_storage.web import FileList, StoredObjectResponse, UploadForm, UploadLimits, upload_form
from tests.orm.derivations import Upper

pytestmark = [
    # Its next version wants a type of its own there, which today's versions do not have.
    pytest.mark.filterwarnings("ignore:.*Reserved kwarg 'data':DeprecationWarning"),
]


class Base(DeclarativeBase):
    pass


class Paper(Base):
    __tablename__ = "litestar_paper"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[Attachment | None] = attachment("papers", variants={"upper": Upper(when="flush")})


class Folder(Base):
    __tablename__ = "litestar_folder"
    id: Mapped[int] = mapped_column(primary_key=True)
    papers: Mapped[AttachmentList] = attachments("papers", lazy="selectin")


class FolderDTO(SQLAlchemyDTO[Folder]):
    config = DTOConfig()


class PaperDTO(SQLAlchemyDTO[Paper]):
    config = DTOConfig()


SHOWN = {
    "size": 3,
    "content_type": "text/plain",
    "original_filename": "a.txt",
    "checksum": "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
}
Serve = Callable[..., httpx.AsyncClient]


def schema_of(document: Any, body: Any) -> Any:
    """Return the schema of the JSON of a body or of a response, or that of its elements."""
    (schema,) = [one["schema"] for one in body["content"].values()]
    schema = schema.get("items", schema)
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


@pytest.fixture
async def kit() -> AsyncIterator[BoundStorage]:
    policies = {"papers": StoragePolicy("papers", "memory", max_size=10)}
    async with bound_storage(Base, policies=policies) as kit:
        yield kit


@pytest.fixture
async def serve(kit: BoundStorage) -> AsyncIterator[Serve]:
    clients: list[httpx.AsyncClient] = []

    def serve(*handlers: Any, plugins: Any = (), **options: Any) -> httpx.AsyncClient:
        app = Litestar([*handlers], plugins=[StoragePlugin(kit.storage), *plugins], logging_config=None, **options)
        clients.append(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test"))
        return clients[-1]

    yield serve
    for client in clients:
        await client.aclose()


async def add(kit: BoundStorage, **values: Any) -> Paper:
    async with kit.sessions.begin() as session:
        paper = Paper(**values)
        session.add(paper)
    return paper


def file() -> Attachment:
    return Attachment(b"abc", filename="a.txt", content_type="text/plain")


class TestResponses:
    @pytest.mark.parametrize("way", ["dto", "plugin"])
    async def test_rows(self, kit: BoundStorage, serve: Serve, way: str) -> None:
        stored, empty = await add(kit, id=1, title="one", file=file()), await add(kit, id=2, title="none")
        dto: dict[str, Any] = {"dto": PaperDTO, "return_dto": PaperDTO} if way == "dto" else {}

        @get("/", **dto)
        async def every() -> list[Paper]:
            return [stored, empty]

        @post("/", **dto)
        async def create(data: Paper) -> Paper:
            return data

        client = serve(every, create, plugins=[SQLAlchemySerializationPlugin()] if way == "plugin" else [])
        assert (await client.get("/")).json() == [
            {"id": 1, "title": "one", "file": SHOWN},
            {"id": 2, "title": "none", "file": None},
        ]
        for sent in (SHOWN, "text", {"location": "papers/x", "backend": "memory"}):  # a client cannot send an attachment
            response = await client.post("/", json={"id": 3, "title": "t", "file": sent})
            assert (response.status_code, response.json()) == (201, {"id": 3, "title": "t", "file": None})
        document = (await client.get("/schema/openapi.json")).json()
        validate(document)
        operation = document["paths"]["/"]["post"]
        assert set(schema_of(document, operation["requestBody"])["properties"]) == {"id", "title"}
        row = schema_of(document, operation["responses"]["201"])
        shown = next(one for one in row["properties"]["file"]["oneOf"] if one["type"] == "object")
        assert shown["required"] == list(SHOWN)
        assert shown["properties"]["size"] == {"type": "integer", "minimum": 0}

    @pytest.mark.parametrize("way", ["dto", "plugin"])
    async def test_collections(self, kit: BoundStorage, serve: Serve, way: str) -> None:
        async with kit.sessions.begin() as session:
            session.add(stored := Folder(id=1, papers=[file()]))
        dto: dict[str, Any] = {"dto": FolderDTO, "return_dto": FolderDTO} if way == "dto" else {}

        @get("/", **dto)
        async def show() -> Folder:
            return stored

        @post("/", **dto)
        async def create(data: Folder) -> dict[str, Any]:
            assert "papers" not in vars(data)
            return {}

        @get("/dict")
        async def parts() -> dict[str, Any]:
            return {"list": stored.papers, "element": stored.papers[0]}

        client = serve(show, create, parts, plugins=[SQLAlchemySerializationPlugin()] if way == "plugin" else [])
        shown = {"id": stored.papers[0].id, "caption": None, "file": SHOWN}
        assert (await client.get("/")).json() == {"id": 1, "papers": [shown]}
        assert (await client.get("/dict")).json() == {"list": [shown], "element": shown}
        for sent in ([], [shown], None, [1]):
            assert (await client.post("/", json={"id": 2, "papers": sent})).status_code == 201
        document = (await client.get("/schema/openapi.json")).json()
        validate(document)
        assert set(schema_of(document, document["paths"]["/"]["post"]["requestBody"])["properties"]) == {"id"}
        row = schema_of(document, document["paths"]["/"]["get"]["responses"]["200"])
        listed = row["properties"]["papers"]
        assert listed["type"] == "array"
        assert listed["items"]["required"] == ["id", "caption", "file"]
        assert listed["items"]["properties"]["file"]["required"] == list(SHOWN)

    async def test_variants_and_refs_in_a_dict(self, kit: BoundStorage, serve: Serve) -> None:
        stored = (await add(kit, id=1, title="one", file=file())).file
        assert stored is not None

        @get("/")
        async def show() -> dict[str, Any]:
            variants = stored.variants
            return {"file": stored, "variants": variants, "upper": variants["upper"], "ref": stored.ref}

        shown = (await serve(show).get("/")).json()
        assert shown["file"] == SHOWN
        assert shown["variants"]["upper"] == shown["upper"]
        assert shown["upper"]["size"] == 5
        assert StoredObjectRef.from_dict(shown["ref"]) == stored.ref

    async def test_a_file_is_served(self, kit: BoundStorage, serve: Serve) -> None:
        stored = (await add(kit, id=1, title="one", file=file())).file
        assert stored is not None

        @get("/")
        async def show(request: Request[Any, Any, Any]) -> ASGIApp:
            return StoredObjectResponse(stored, request)

        response = await serve(show).get("/", headers={"Range": "bytes=1-"})
        assert (response.status_code, response.content) == (206, b"bc")

    async def test_own_encoders_have_precedence(self, kit: BoundStorage, serve: Serve) -> None:
        stored = (await add(kit, id=1, title="one", file=file())).file

        @get("/")
        async def show() -> dict[str, Any]:
            return {"file": stored}

        client = serve(show, type_encoders={Attachment: lambda value: value.size})
        assert (await client.get("/")).json() == {"file": 3}


class Ledger(Base):
    """A row whose attributes have names of their own for DTOs and for the database."""

    __tablename__ = "litestar_ledger"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    note: Mapped[str | None]
    scan: Mapped[Attachment | None] = attachment("papers", name="scan_column", info={"kept": True})
    ref: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)
    pages: Mapped[AttachmentList] = attachments("papers", info={"kept": True})
    sent: Mapped[Attachment | None] = attachment("papers", info=dto_field("private"))


class LedgerDTO(SQLAlchemyDTO[Ledger]):
    config = DTOConfig(exclude={"id"})


class PartialLedgerDTO(SQLAlchemyDTO[Ledger]):
    config = DTOConfig(exclude={"id"}, partial=True)


class TestBodiesOfRows:
    """A body changes no file, whether it leaves the file out, sends back what it was shown, or sends null."""

    @pytest.mark.parametrize("way", ["update", "merge", "partial"])
    @pytest.mark.parametrize("sent", [{}, {"scan": None, "ref": None, "pages": []}, {"scan": SHOWN, "pages": [SHOWN]}])
    async def test_files_stay(self, kit: BoundStorage, serve: Serve, way: str, sent: dict[str, Any]) -> None:
        ref = await kit.storage.put_bytes(
            storage_key="papers", model_name="m", entity_id="1", field_name="f", content=b"", original_filename="a"
        )
        async with kit.sessions.begin() as session:
            session.add(Ledger(id=1, title="old", note="n", scan=file(), ref=ref, pages=[file()], sent=file()))

        @put("/update", dto=LedgerDTO, return_dto=None)
        async def update(data: DTOData[Ledger]) -> None:
            async with kit.sessions.begin() as session:
                data.update_instance(await session.get_one(Ledger, 1))

        @put("/merge", dto=LedgerDTO, return_dto=None)
        async def merge(data: Ledger) -> None:
            async with kit.sessions.begin() as session:
                data.id = 1
                await session.merge(data)

        @put("/partial", dto=PartialLedgerDTO, return_dto=None)
        async def partial(data: DTOData[Ledger]) -> None:
            async with kit.sessions.begin() as session:
                data.update_instance(await session.get_one(Ledger, 1))

        response = await serve(update, merge, partial).put(f"/{way}", json={"title": "new", **sent})
        assert response.status_code == 200
        async with kit.sessions() as session:
            ledger = await session.get_one(Ledger, 1, options=[selectinload(Ledger.pages)])
        assert (ledger.title, ledger.note) == ("new", "n" if way == "partial" else None)
        assert ledger.ref == ref
        for kept in (ledger.scan, ledger.pages[0].file, ledger.sent):
            assert kept is not None
            assert await kept.read() == b"abc"

    async def test_descriptions(self, serve: Serve) -> None:
        @put("/", dto=LedgerDTO)
        async def update(data: DTOData[Ledger]) -> Ledger:
            raise AssertionError

        document = (await serve(update).get("/schema/openapi.json")).json()
        validate(document)
        operation = document["paths"]["/"]["put"]
        assert set(schema_of(document, operation["requestBody"])["properties"]) == {"title", "note"}
        shown = schema_of(document, operation["responses"]["200"])["properties"]
        assert set(shown) == {"title", "note", "scan", "ref", "pages"}  # the application's own mark has precedence
        assert (Ledger.scan.info["kept"], Ledger.pages.info["kept"]) == (True, True)


class Owner(Base):
    """A row that has no file."""

    __tablename__ = "litestar_owner"
    id: Mapped[int] = mapped_column(primary_key=True)


class Envelope(MappedAsDataclass, Base):
    """A row that is a dataclass, which Litestar encodes by itself."""

    __tablename__ = "litestar_envelope"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("papers")


class TestRowsThatNothingEncodes:
    @pytest.mark.parametrize("returned", [Paper, Folder, list[Paper], Paper | None, dict[str, Paper]])
    def test_refused_at_start_up(self, kit: BoundStorage, serve: Serve, returned: Any) -> None:
        async def show() -> Any:
            raise AssertionError

        show.__annotations__["return"] = returned
        with pytest.raises(ConfigurationError, match=r"the rows that .*show.* returns, .*return_dto=SQLAlchemyDTO"):
            serve(get("/")(show))

    async def test_what_can_be_encoded(self, kit: BoundStorage, serve: Serve) -> None:
        stored = await add(kit, id=1, title="one", file=file())
        async with kit.sessions.begin() as session:
            session.add(envelope := Envelope(id=1, file=file()))

        encoders: dict[Any, Callable[[Any], Any]] = {Base: lambda row: {"id": row.id}}

        @get("/own", type_encoders=encoders)
        async def own() -> Paper:
            return stored

        @get("/dataclass")
        async def dataclass() -> Envelope:
            return envelope

        @get("/owner")
        async def owner() -> Owner:  # is no concern of the plugin
            raise AssertionError

        @get("/response")
        async def response() -> Response[Paper]:
            return Response(stored, type_encoders=encoders)

        class Encoding(Response[Any]):
            type_encoders = encoders

        @get("/class", response_class=Encoding)
        async def response_class() -> Paper:
            return stored

        client = serve(own, dataclass, owner, response, response_class)
        for path in ("/own", "/response", "/class"):
            assert (await client.get(path)).json() == {"id": 1}
        assert (await client.get("/dataclass")).json() == {"id": 1, "file": SHOWN}


class TestErrors:
    async def test_statuses_of_the_library(self, kit: BoundStorage, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
        @get("/")
        async def show(storage: NamedDependency[StorageManager]) -> bytes:
            ref = await storage.put_bytes(
                storage_key="papers", model_name="m", entity_id="1", field_name="f", content=b"", original_filename="a"
            )
            await storage.delete(ref)
            return await storage.get(ref)

        @delete("/")
        async def fail() -> None:
            raise BackendUnavailableError("the address is secret.example")

        client = serve(show, fail)
        missing = await client.get("/")
        assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
        assert missing.json()["detail"] == "The file does not exist."
        with caplog.at_level(logging.ERROR, "granite_storage"):
            down = await client.delete("/")
        assert (down.status_code, down.headers["retry-after"], down.headers["cache-control"]) == (503, "5", "no-store")
        assert "secret" not in down.text
        assert "secret.example" in caplog.text

    async def test_own_handlers_have_precedence(self, serve: Serve) -> None:
        @get("/")
        async def fail() -> None:
            raise BackendUnavailableError("down")

        def answer(_: Request[Any, Any, Any], __: StorageError) -> Response[str]:
            return Response("own", status_code=418)

        assert (await serve(fail, exception_handlers={StorageError: answer}).get("/")).status_code == 418


class TestForms:
    @staticmethod
    def handler(kit: BoundStorage, seen: list[UploadForm]) -> Any:
        targets = {"file": Paper.file, "more": FileList(Paper.file, 2)}
        form = provide_upload_form(targets, required=["title", "file"], limits=UploadLimits(max_file_size=6))

        @post("/", dependencies={"form": form}, return_dto=PaperDTO)
        async def create(form: NamedDependency[UploadForm]) -> Paper:
            seen.append(form)
            async with kit.sessions.begin() as session:
                paper = Paper(id=1, title=form.fields["title"], file=form.files["file"])
                session.add(paper)
            return paper

        return create

    async def test_a_form_is_stored_as_it_arrives(self, kit: BoundStorage, serve: Serve) -> None:
        client = serve(self.handler(kit, []))
        files = [("file", ("a.txt", b"abc", "text/plain")), ("more", ("b.txt", b"b")), ("more", ("c.txt", b"c"))]
        response = await client.post("/", data={"title": "one"}, files=files)
        assert (response.status_code, response.json()) == (201, {"id": 1, "title": "one", "file": SHOWN})
        assert kit.faults.count("put_stream") == 3
        await kit.assert_no_orphans()  # the others were removed

    async def test_a_handler_with_two_forms(self, serve: Serve) -> None:
        forms = {name: provide_upload_form({name: Paper.file}) for name in ("one", "two")}

        @post("/", dependencies=forms)
        async def create(one: NamedDependency[UploadForm], two: NamedDependency[UploadForm]) -> None: ...

        with pytest.raises(ConfigurationError, match=r"2 dependencies of the endpoint .*create.* receive its body"):
            serve(create)

    async def test_what_is_missing_or_too_large(self, kit: BoundStorage, serve: Serve) -> None:
        seen: list[UploadForm] = []
        client = serve(self.handler(kit, seen))
        missing = await client.post("/", files={"file": ("a.txt", b"abc")})
        assert (missing.status_code, missing.json()["detail"]) == (422, "The form lacks 'title'.")
        large = await client.post("/", data={"title": "t"}, files={"file": ("a.txt", b"7 bytes")})
        assert (large.status_code, large.json()["max_size"]) == (413, 6)
        assert seen == []
        assert await kit.objects() == []

    async def test_the_document_describes_it(self, kit: BoundStorage, serve: Serve) -> None:
        async def title(form: NamedDependency[UploadForm]) -> str:
            return form.fields["title"]

        @dataclass
        class Described(Operation):
            def __post_init__(self) -> None:
                self.request_body = RequestBody(content={"text/plain": OpenAPIMediaType()})

        provided = provide_upload_form({"file": Paper.file}, fields=["note"])

        @post("/nested", dependencies={"title": title})
        async def nested(title: NamedDependency[str]) -> None: ...

        @post("/unused")
        async def unused() -> None: ...

        @post("/own", operation_class=Described)
        async def own(form: NamedDependency[UploadForm]) -> None: ...

        client = serve(self.handler(kit, []), nested, unused, own, dependencies={"form": provided})
        document = (await client.get("/schema/openapi.json")).json()
        validate(document)
        bodies = {path: one["post"].get("requestBody") for path, one in document["paths"].items()}
        described = upload_form({"file": Paper.file, "more": FileList(Paper.file, 2)}, required=["title", "file"])
        assert bodies["/"] == described.openapi_extra["requestBody"]
        properties = bodies["/nested"]["content"]["multipart/form-data"]["schema"]["properties"]
        assert properties == {"note": {"type": "string"}, "file": {"type": "string", "format": "binary"}}
        assert bodies["/unused"] is None
        assert list(bodies["/own"]["content"]) == ["text/plain"]

    async def test_an_error_of_the_handler_removes_the_files(self, kit: BoundStorage, serve: Serve) -> None:
        @post("/", dependencies={"form": provide_upload_form({"file": Paper.file})})
        async def fail(form: NamedDependency[UploadForm]) -> None:
            Paper(id=1, title="never added", file=form.files["file"])
            raise BackendUnavailableError("down")

        assert (await serve(fail).post("/", files={"file": ("a.txt", b"abc")})).status_code == 503
        assert await kit.objects() == []

    async def test_a_client_that_leaves(self, kit: BoundStorage) -> None:
        app = Litestar([self.handler(kit, [])], plugins=[StoragePlugin(kit.storage)], logging_config=None)
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nab'
        messages = [{"type": "http.request", "body": head, "more_body": True}, {"type": "http.disconnect"}]
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"multipart/form-data; boundary=x")]
        scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/", "query_string": b"", "headers": headers}
        await app({**scope, "http_version": "1.1", "scheme": "http", "server": ("test", 80), "client": None}, receive, send)  # type: ignore[arg-type]
        assert sent[0]["status"] == 400
        assert await kit.objects() == []


class TestLifespan:
    async def test_the_manager_is_closed_after_the_worker(self, kit: BoundStorage) -> None:
        steps: list[str] = []

        class Journal:
            @asynccontextmanager
            async def worker(self) -> AsyncIterator[None]:
                steps.append("begun")
                yield
                await kit.storage.exists(ref)  # the manager is still open
                steps.append("ended")

        place = {"storage_key": "papers", "model_name": "m", "entity_id": "1", "field_name": "f"}
        ref = await kit.storage.put_bytes(content=b"x", **place)
        journal: Any = Journal()
        app = Litestar([], plugins=[StoragePlugin(kit.storage, journal=journal)], logging_config=None)
        async with app.lifespan():
            assert steps == ["begun"]
        assert steps == ["begun", "ended"]
        with pytest.raises(ConfigurationError, match="closed"):
            await kit.storage.exists(ref)

    async def test_the_dependency_has_another_name(self, kit: BoundStorage) -> None:
        @get("/")
        async def show(files: NamedDependency[StorageManager]) -> dict[str, Any]:
            return {"same": files is kit.storage}

        app = Litestar([show], plugins=[StoragePlugin(kit.storage, dependency="files")], logging_config=None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.get("/")).json() == {"same": True}

    def test_what_is_no_manager_is_refused(self) -> None:
        wrong: Any = object()
        with pytest.raises(ConfigurationError, match="needs a StorageManager, not object"):
            StoragePlugin(wrong)
