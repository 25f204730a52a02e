"""What encoders that know nothing of attachments make of one, and of a row that has one: the four public fields, promptly."""

from __future__ import annotations

import copy
import dataclasses
import json
import pprint
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import msgspec
import orjson
import pytest
from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic_core import to_jsonable_python
from sqlalchemy import Column
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlmodel import Field, SQLModel

from granite_storage import StoredObjectRef
from granite_storage.orm import Attachment, AttachmentType, attachment, bind_storage
from tests.orm.values import Base, Document, Receipt, Sessions, add, make_manager, sqlite, write_raw

SHOWN = ["size", "content_type", "original_filename", "checksum"]
SECRETS = ["location", "backend", "storage_key", "memory", "docs/", "_source", "_home", "secret bytes", "document/"]

pytestmark = [pytest.mark.timeout(30)]


def plain_attributes(value: Any) -> Any:
    """Walk through an object as home-made encoders do."""
    if isinstance(value, list | tuple):
        return [plain_attributes(item) for item in value]
    if isinstance(value, dict):
        return {key: plain_attributes(item) for key, item in value.items() if not key.startswith("_sa")}
    return plain_attributes(vars(value)) if hasattr(value, "__dict__") else value


class FileOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    size: int
    content_type: str | None
    original_filename: str | None
    checksum: str


ENCODERS: dict[str, Callable[[Any], Any]] = {
    "vars": vars,
    "dict": dict,
    "describe": Attachment.describe,
    "jsonable_encoder": jsonable_encoder,
    "json default vars": lambda value: json.loads(json.dumps(value, default=vars)),
    "json default dict": lambda value: json.loads(json.dumps(value, default=dict)),
    "json default __dict__": lambda value: json.loads(json.dumps(value, default=lambda one: one.__dict__)),
    "json default describe": lambda value: json.loads(json.dumps(value, default=Attachment.describe)),
    "orjson default vars": lambda value: json.loads(orjson.dumps(value, default=vars)),
    "orjson default describe": lambda value: json.loads(orjson.dumps(value, default=Attachment.describe)),
    "msgspec hook": lambda value: json.loads(msgspec.json.encode(value, enc_hook=dict)),
    "msgspec builtins": lambda value: msgspec.to_builtins(value, enc_hook=Attachment.describe),
    "named attributes": lambda value: {name: getattr(value, name) for name in SHOWN},
    "pydantic from_attributes": lambda value: FileOut.model_validate(value).model_dump(),
    "pydantic Any": lambda value: TypeAdapter(Any).dump_python(value, mode="json"),
    "pydantic to_jsonable_python": to_jsonable_python,
    "pydantic TypeAdapter": lambda value: TypeAdapter(Attachment).dump_python(value, mode="json"),
    "walk": plain_attributes,
}


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    binding = bind_storage(Base, make_manager())
    async with sqlite(tmp_path) as sessions:
        yield sessions
    binding.unbind()


@pytest.fixture
async def document(sessions: Sessions) -> Document:
    file = Attachment(b"secret bytes", filename="a.txt", content_type="text/plain", extra={"own": "docs/secret"})
    added: Document = await add(sessions, Document(title="t", file=file))
    return added


def require_public(shown: Any, size: int | None = 12) -> None:
    assert sorted(shown) == sorted(SHOWN)
    assert (shown["size"], shown["content_type"], shown["original_filename"]) == (size, "text/plain", "a.txt")
    assert not [secret for secret in SECRETS if secret in repr(shown)]


@pytest.mark.case("RB-01")
class TestAttachment:
    @pytest.mark.parametrize("name", ENCODERS)
    def test_stored(self, document: Document, name: str) -> None:
        require_public(ENCODERS[name](document.file))

    @pytest.mark.parametrize("name", ["vars", "dict", "describe", "jsonable_encoder", "json default vars", "walk"])
    def test_pending(self, name: str) -> None:
        pending = Attachment(
            b"secret bytes", filename="/home/docs/a.txt", content_type="text/plain", extra={"own": "docs/secret"}
        )
        require_public(ENCODERS[name](pending), size=None)

    @pytest.mark.parametrize("name", ["vars", "dict", "describe", "jsonable_encoder", "walk"])
    async def test_broken(self, sessions: Sessions, document: Document, name: str) -> None:
        await write_raw(sessions, '{"location": "docs/only"}')
        async with sessions() as session:
            broken = (await session.get_one(Document, 1)).file
        assert ENCODERS[name](broken) == dict.fromkeys(SHOWN)

    def test_of_a_class_of_the_applications_own(self, document: Document) -> None:
        class Image(Attachment):
            pass

        image = Image(b"secret bytes", filename="a.txt", content_type="text/plain")
        assert vars(image) == {}
        require_public(dict(image), size=None)

    def test_shown_to_people(self, document: Document) -> None:
        for shown in (repr(document.file), pprint.pformat(document.file), pprint.pformat({"file": document.file})):
            assert not [secret for secret in SECRETS if secret in shown]

    def test_copies_are_the_same(self, document: Document) -> None:
        assert copy.copy(document.file) is document.file
        assert copy.deepcopy({"file": document.file})["file"] is document.file


@pytest.mark.case("RB-01")
class TestRow:
    @pytest.mark.parametrize("name", ["jsonable_encoder", "walk", "json default vars"])
    def test_row(self, document: Document, name: str) -> None:
        if name == "json default vars":
            values = {key: value for key, value in vars(document).items() if key != "_sa_instance_state"}
            shown = json.loads(json.dumps(values, default=vars))
        else:
            shown = ENCODERS[name](document)
        assert shown["title"] == "t"
        require_public(shown["file"])

    async def test_endpoints_without_a_response_model(self, document: Document) -> None:
        app = FastAPI()

        @app.get("/row")
        async def row():  # type: ignore[no-untyped-def]  # FastAPI makes a response model of an annotation
            return document

        @app.get("/rows")
        async def rows():  # type: ignore[no-untyped-def]
            return [document]

        @app.get("/file")
        async def file():  # type: ignore[no-untyped-def]
            return {"file": document.file}

        @app.get("/any")
        async def anything() -> Any:
            return {"file": document.file}

        @app.get("/dict")
        async def mapping() -> dict[str, Any]:
            return {"file": document.file}

        @app.get("/model", response_model=None)
        async def unmodelled() -> Document:
            return document

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            require_public((await client.get("/rows")).json()[0]["file"])
            for path in ("row", "file", "any", "dict", "model"):
                require_public((await client.get(f"/{path}")).json()["file"])


@pytest.mark.case("RB-01")
class TestOpening:
    """What `Attachment.open` returns, where `await` is forgotten: no private state, and words that say it."""

    SAYING = ("vars", "jsonable_encoder", "json default vars", "json default __dict__", "walk")

    @pytest.mark.parametrize("name", ENCODERS)
    async def test_it_is_refused(self, document: Document, name: str) -> None:
        with pytest.raises(Exception, match="await it" if name in self.SAYING else None) as caught:
            ENCODERS[name](document.file.open())  # type: ignore[union-attr]
        assert not [secret for secret in ("_start", "_reader", *SECRETS) if secret in str(caught.value)]

    async def test_endpoints(self, document: Document) -> None:
        app = FastAPI()

        @app.get("/opening")
        async def opening():  # type: ignore[no-untyped-def]
            return document.file.open()  # type: ignore[union-attr]

        @app.get("/any")
        async def anything() -> Any:
            return {"file": document.file.open()}  # type: ignore[union-attr]

        @app.get("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(document.file.open())  # type: ignore[union-attr]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for path in ("opening", "any"):
                with pytest.raises(Exception, match=r"await it|Unable to serialize"):
                    await client.get(f"/{path}")
            response = await client.get("/stream")
            assert (response.status_code, response.content) == (200, b"secret bytes")


class _Columns(DeclarativeBase):
    pass


class Leaf(_Columns):
    __tablename__ = "leaf"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")


@pytest.mark.case("RB-01")
@pytest.mark.parametrize(
    "attribute",
    [Leaf.file, Leaf.__table__.c.file, Receipt.ref, Leaf.__table__.c.file.comparator],
    ids=lambda value: type(value).__name__,
)
def test_no_column_is_endless(attribute: Any) -> None:
    with pytest.raises(TypeError):
        list(islice(attribute, 3))
    with pytest.raises(TypeError):
        attribute[0]
    assert "size" in str(attribute["size"]) or attribute["size"] is not None


class DocumentIn(BaseModel):
    """What an application checks before it makes a row."""

    title: str
    file: Attachment | None = None


class Statement(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    customer: str = ""
    pdf: Attachment | None = Field(default=None, sa_column=Column(AttachmentType("documents")))


class StatementUpdate(SQLModel):
    customer: str | None = None
    pdf: Attachment | None = None


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Letter(DataclassBase):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    subject: Mapped[str]
    scan: Mapped[Attachment | None] = attachment("documents", default=None)


@pytest.mark.case("RB-03")
class TestPythonDumps:
    """A dump that stays in Python keeps the attachment; one that leaves it shows the public fields."""

    async def test_row_of_a_dump(self, sessions: Sessions) -> None:
        schema = DocumentIn(title="t", file=Attachment(b"abc"))
        document = await add(sessions, Document(**schema.model_dump()))
        assert document.file is schema.file
        assert await document.file.read() == b"abc"

    def test_row_of_a_partial_dump(self) -> None:
        schema = DocumentIn(title="t", file=Attachment(b"abc"))
        for key, value in schema.model_dump(exclude_unset=True).items():
            setattr(Document(), key, value)
        assert schema.model_dump(exclude_none=True)["file"] is schema.file
        assert TypeAdapter(list[DocumentIn]).dump_python([schema])[0]["file"] is schema.file

    def test_sqlmodel_update(self) -> None:
        update = StatementUpdate(pdf=Attachment(b"abc"))
        bill = Statement(customer="ACME")
        bill.sqlmodel_update(update.model_dump(exclude_unset=True))
        assert bill.pdf is update.pdf
        assert Statement(**update.model_dump()).pdf is update.pdf
        assert Statement.model_validate(update, update={"customer": "x"}).pdf is update.pdf

    def test_dataclasses(self) -> None:
        letter = Letter("hello", Attachment(b"abc"))
        assert dataclasses.asdict(letter)["scan"] is letter.scan

    def test_json(self, document: Document) -> None:
        model = DocumentIn(title="t", file=document.file)
        require_public(model.model_dump(mode="json")["file"])
        require_public(json.loads(model.model_dump_json())["file"])
        require_public(jsonable_encoder(model)["file"])
        require_public(jsonable_encoder({"model": model, "dump": model.model_dump()})["dump"]["file"])


class RefIn(BaseModel):
    ref: StoredObjectRef


@pytest.mark.case("RE-15")
class TestRefs:
    """Refs are minted by the manager: none comes from a client."""

    def test_from_json(self, document: Document) -> None:
        assert document.file is not None
        given = document.file.ref.to_dict()
        with pytest.raises(ValueError, match="StoredObjectRef"):
            RefIn.model_validate({"ref": given})
        with pytest.raises(ValueError, match="StoredObjectRef"):
            RefIn.model_validate_json(json.dumps({"ref": given}))
        for adapter in (TypeAdapter(StoredObjectRef), TypeAdapter(StoredObjectRef | None), TypeAdapter(list[StoredObjectRef])):
            with pytest.raises(ValueError, match="StoredObjectRef"):
                adapter.validate_python(given if "list" not in str(adapter) else [given])

    async def test_request_body(self, document: Document) -> None:
        assert document.file is not None
        app = FastAPI()

        @app.post("/refs")
        async def take(body: RefIn) -> None:
            raise AssertionError("a client cannot send a ref")

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.post("/refs", json={"ref": document.file.ref.to_dict()})
            assert answer.status_code == 422
            assert (await client.get("/openapi.json")).status_code == 200

    def test_in_python_and_out(self, document: Document) -> None:
        assert document.file is not None
        model = RefIn(ref=document.file.ref)
        assert model.ref is document.file.ref
        assert model.model_dump(mode="json")["ref"] == document.file.ref.to_dict()
        assert "location" in RefIn.model_json_schema(mode="serialization")["properties"]["ref"]["properties"]
