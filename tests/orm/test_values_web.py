"""Attachments in response models, in dataclasses and in SQLModel."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, UploadFile
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError
from sqlalchemy import Column, select
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column
from sqlmodel import Field, SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

from granite_storage import StorageManager
from granite_storage.exceptions import InvalidReferenceError
from granite_storage.orm import (
    AttachedFile,
    Attachment,
    AttachmentList,
    AttachmentType,
    AttachmentVariant,
    attachment,
    bind_storage,
)
from tests.orm.values import Document, Sessions, add, locations, sqlite, write_raw

SHOWN = {"size", "content_type", "original_filename", "checksum"}


class DocumentOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    file: Attachment | None


class StrictOut(BaseModel):
    """Says that there is always a file."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    file: Attachment


pytestmark = pytest.mark.usefixtures("binding")


@pytest.fixture
async def client(sessions: Sessions) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()

    @app.post("/documents", response_model=DocumentOut)
    async def upload(file: UploadFile) -> Any:
        return await add(sessions, Document(file=Attachment.from_upload(file)))

    @app.get("/documents", response_model=list[DocumentOut])
    async def everything() -> Any:
        async with sessions() as session:
            return (await session.scalars(select(Document).order_by(Document.id))).all()

    @app.get("/models")
    async def models() -> list[DocumentOut]:
        async with sessions() as session:
            return [DocumentOut.model_validate(found) for found in await session.scalars(select(Document))]

    @app.get("/strict", response_model=list[StrictOut])
    async def strict() -> Any:
        async with sessions() as session:
            return (await session.scalars(select(Document).order_by(Document.id))).all()

    @app.put("/documents")
    async def put(document: DocumentOut) -> None:
        raise AssertionError("nobody can send an attachment")

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.case("REF-13")
class TestFastAPI:
    async def test_a_response_shows_the_file_and_not_where_it_is(self, client: httpx.AsyncClient, sessions: Sessions) -> None:
        answer = await client.post("/documents", files={"file": ("a.txt", b"abc", "text/plain")})
        assert answer.status_code == 200
        shown = answer.json()["file"]
        assert set(shown) == SHOWN
        assert (shown["size"], shown["content_type"], shown["original_filename"]) == (3, "text/plain", "a.txt")
        assert shown["checksum"].startswith("sha256:")

    @pytest.mark.parametrize("path", ["/documents", "/models"])
    async def test_a_list_with_and_without_files(self, client: httpx.AsyncClient, sessions: Sessions, path: str) -> None:
        document = await add(sessions, Document(file=Attachment(b"abc")))
        await add(sessions, Document())
        answer = await client.get(path)
        assert answer.status_code == 200
        first, second = answer.json()
        assert first["file"]["size"] == 3
        assert second["file"] is None
        for secret in (document.file.location, "docs/", "memory", "backend", "storage_key", "location"):
            assert secret not in answer.text

    @pytest.mark.parametrize("path", ["/documents", "/models", "/strict"])
    async def test_a_broken_row_spoils_no_list(
        self, client: httpx.AsyncClient, sessions: Sessions, caplog: pytest.LogCaptureFixture, path: str
    ) -> None:
        await add(sessions, Document(file=Attachment(b"abc")))
        await add(sessions, Document(file=Attachment(b"abcd")))
        await write_raw(sessions, '{"location": "only"}')
        answer = await client.get(path)
        assert answer.status_code == 200
        first, second = answer.json()
        assert first["file"] is None
        assert second["file"]["size"] == 4
        assert "contains no readable ref" in caplog.text

    async def test_openapi_says_what_is_shown(self, client: httpx.AsyncClient) -> None:
        schema = (await client.get("/openapi.json")).json()["components"]["schemas"]
        names = [name for name in schema if name.startswith("DocumentOut")]
        assert names
        for name in names:
            file = next(kind for kind in schema[name]["properties"]["file"]["anyOf"] if kind.get("type") != "null")
            assert set(file["properties"]) == SHOWN
            assert file["properties"]["size"]["type"] == "integer"
            assert "location" not in json.dumps(schema[name])

    async def test_nobody_can_send_one(self, client: httpx.AsyncClient) -> None:
        sent = {"id": 1, "file": {"size": 3, "content_type": None, "original_filename": None, "checksum": ""}}
        assert (await client.put("/documents", json=sent)).status_code == 422


class TestPydantic:
    async def test_a_model_keeps_the_attachment(self, sessions: Sessions) -> None:
        document = await add(sessions, Document(file=Attachment(b"abc")))
        model = DocumentOut.model_validate(document)
        assert model.file is document.file
        assert model.model_dump()["file"] is document.file
        assert set(model.model_dump(mode="json")["file"]) == SHOWN
        assert set(json.loads(model.model_dump_json())["file"]) == SHOWN
        assert model.model_copy(deep=True).file is document.file

    def test_json_makes_no_attachment(self) -> None:
        with pytest.raises(ValidationError) as caught:
            DocumentOut.model_validate_json('{"id": 1, "file": {"size": 3, "checksum": ""}}')
        [problem] = caught.value.errors(include_url=False)
        assert (problem["type"], problem["loc"]) == ("file_in_json", ("file",))
        assert problem["msg"] == "A file cannot be given as JSON: upload it, and leave this field out"

    @pytest.mark.parametrize("kind", [Attachment, AttachmentVariant, AttachedFile, AttachmentList])
    def test_json_makes_none_of_them(self, kind: Any) -> None:
        with pytest.raises(ValidationError, match="A file cannot be given as JSON"):
            TypeAdapter(kind).validate_json("{}")
        with pytest.raises(ValidationError, match=f"Input should be an instance of {kind.__name__}"):
            TypeAdapter(kind).validate_python({})

    @pytest.mark.parametrize("mode", ["validation", "serialization"])
    def test_both_schemas_are_the_same(self, mode: Any) -> None:
        schema = TypeAdapter(Attachment).json_schema(mode=mode)
        assert schema["title"] == "Attachment"
        assert set(schema["required"]) == SHOWN

    def test_a_pending_one_cannot_be_shown(self) -> None:
        model = DocumentOut(id=1, file=Attachment(b"abc"))
        with pytest.raises(PydanticSerializationError, match="not stored yet"):
            model.model_dump(mode="json")


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Letter(DataclassBase):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    subject: Mapped[str]
    scan: Mapped[Attachment | None] = attachment("documents", default=None)
    seal: Mapped[Attachment | None] = mapped_column(AttachmentType("thumbnails"), default=None, kw_only=True)


async def test_dataclasses(tmp_path: Path, manager: StorageManager) -> None:
    binding = bind_storage(DataclassBase, manager)
    assert [field.name for field in fields(Letter)] == ["id", "subject", "scan", "seal"]
    async with sqlite(tmp_path, DataclassBase) as sessions:
        letter = await add(sessions, Letter("hello", Attachment(b"scan"), seal=Attachment(b"seal")))
        await add(sessions, Letter("nothing"))
        assert await letter.scan.read() == b"scan"
        async with sessions.begin() as session:
            loaded = await session.get_one(Letter, letter.id)
            assert "size=4" in repr(loaded)
            loaded.scan = None
        assert await locations(manager) == {letter.seal.location}
        with pytest.raises(InvalidReferenceError):
            Letter("refused", {"location": "x"})  # type: ignore[arg-type]
    binding.unbind()


class Bill(SQLModel, table=True):
    id: int | None = Field(default=None, primary_key=True)
    customer: str
    pdf: Attachment | None = Field(default=None, sa_column=Column(AttachmentType("documents")))


class BillOut(SQLModel):
    customer: str
    pdf: Attachment | None


async def test_sqlmodel(tmp_path: Path, manager: StorageManager) -> None:
    binding = bind_storage(SQLModel, manager)
    async with sqlite(tmp_path, SQLModel) as sessions:
        engine = sessions.kw["bind"]
        async with SQLModelSession(engine, expire_on_commit=False) as session:
            bill = Bill(customer="ACME", pdf=Attachment(b"%PDF", filename="invoice.pdf"))
            session.add_all([bill, Bill(customer="none")])
            await session.commit()
        async with SQLModelSession(engine) as session:
            found = (await session.exec(select(Bill).where(Bill.customer == "ACME"))).scalar_one()
            assert found.pdf is not None
            assert await found.pdf.read() == b"%PDF"
            shown = BillOut.model_validate(found).model_dump(mode="json")
            assert set(shown["pdf"]) == SHOWN
            assert "location" not in found.model_dump_json()
            found.pdf = Attachment(b"second")
            await session.rollback()
        with pytest.raises(InvalidReferenceError):
            bill.pdf = "text"  # type: ignore[assignment]
        assert bill.pdf is not None
        assert await locations(manager) == {bill.pdf.location}
        async with SQLModelSession(engine) as session:
            await session.delete(await session.get_one(Bill, bill.id))
            await session.commit()
        assert await locations(manager) == set()
    binding.unbind()
