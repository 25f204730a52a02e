"""`attachments` on models of every shape, and what a client is shown of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel, ConfigDict, TypeAdapter
from sqlalchemy import ForeignKey, Integer, MetaData, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    declarative_base,
    declared_attr,
    mapped_column,
    registry,
    selectinload,
)
from sqlmodel import Field, Relationship, SQLModel

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import AttachedFile, Attachment, AttachmentList, append_files, attachments, count_files, file_class
from tests.orm.collections.models import album
from tests.orm.test_models import app_of


async def contents(session: AsyncSession, model: Any, name: str = "files") -> list[bytes]:
    [found] = (await session.scalars(select(model).options(selectinload(getattr(model, name))))).all()
    return [await file.file.read() for file in getattr(found, name)]


async def require_kept(base: Any, model: Any, row: Any, name: str = "files") -> None:
    """Store a row with two files, read them in another session, add one, change the order, and delete the row."""
    attribute = getattr(model, name)
    async with app_of(base) as app:
        await app.add(row)
        async with app.sessions.begin() as session:
            assert await contents(session, model, name) == [b"a", b"b"]
            [found] = (await session.scalars(select(model))).all()
            append_files(found, attribute, [b"c"])
            await session.flush()
            assert list(await session.scalars(select(count_files(attribute)).select_from(model))) == [3]
        async with app.sessions.begin() as session:
            [found] = (await session.scalars(select(model).options(selectinload(attribute)))).all()
            getattr(found, name).reverse()
        async with app.sessions.begin() as session:
            assert await contents(session, model, name) == [b"c", b"b", b"a"]
            await session.delete((await session.scalars(select(model))).one())
        assert await app.count() == 0


async def test_dataclass() -> None:
    class Base(MappedAsDataclass, DeclarativeBase):
        pass

    class Letter(Base):
        __tablename__ = "letter"
        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        subject: Mapped[str]
        files: Mapped[AttachmentList] = attachments("docs", default_factory=AttachmentList, repr=False)
        others: Mapped[AttachmentList] = attachments("docs", init=False)

    letter = Letter("hello", AttachmentList([Attachment(b"a")]))
    letter.files.append(b"b")
    assert Letter("hello").files == []
    await require_kept(Base, Letter, letter)


async def test_sqlmodel() -> None:
    class Base(SQLModel, registry=registry()):
        metadata = MetaData()

    class Invoice(Base, table=True):
        id: int | None = Field(default=None, primary_key=True)
        files: AttachmentList = Relationship(sa_relationship=attachments("docs"))

    await require_kept(Base, Invoice, Invoice(files=[Attachment(b"a"), Attachment(b"b")]))


async def test_mixin() -> None:
    class Base(DeclarativeBase):
        pass

    class HasFiles:
        @declared_attr
        def files(cls) -> Mapped[AttachmentList]:  # noqa: N805
            return attachments("docs")

    class One(HasFiles, Base):
        __tablename__ = "one"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Two(HasFiles, Base):
        __tablename__ = "two"
        number: Mapped[int] = mapped_column(primary_key=True)

    assert set(Base.metadata.tables) == {"one", "one_files", "two", "two_files"}
    assert file_class(One.files) is not file_class(Two.files)
    await require_kept(Base, Two, Two(number=3, files=[b"a", b"b"]))


class TestInheritance:
    async def test_of_joined_tables(self) -> None:
        class Base(DeclarativeBase):
            pass

        class Item(Base):
            __tablename__ = "item"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            files: Mapped[AttachmentList] = attachments("docs")
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}

        class Report(Item):
            __tablename__ = "report"
            id: Mapped[int] = mapped_column(ForeignKey("item.id"), primary_key=True)
            pages: Mapped[AttachmentList] = attachments("docs", max_files=4)
            __mapper_args__ = {"polymorphic_identity": "report"}

        assert set(Base.metadata.tables) == {"item", "item_files", "report", "report_pages"}
        assert file_class(Report.files) is file_class(Item.files)
        await require_kept(Base, Report, Report(files=[b"a", b"b"]))
        await require_kept(Base, Report, Report(pages=[b"a", b"b"]), "pages")

    async def test_of_a_single_table(self) -> None:
        class Base(DeclarativeBase):
            pass

        class Item(Base):
            __tablename__ = "item"
            id: Mapped[int] = mapped_column(primary_key=True)
            kind: Mapped[str]
            __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}

        class Photo(Item):
            files: Mapped[AttachmentList] = attachments("docs")
            __mapper_args__ = {"polymorphic_identity": "photo"}

        assert set(Base.metadata.tables) == {"item", "item_files"}
        await require_kept(Base, Photo, Photo(files=[b"a", b"b"]))

    async def test_below_an_abstract_class(self) -> None:
        class Base(DeclarativeBase):
            pass

        class WithFiles(Base):
            __abstract__ = True
            id: Mapped[int] = mapped_column(primary_key=True)

            @declared_attr
            def files(cls) -> Mapped[AttachmentList]:  # noqa: N805
                return attachments("docs")

        class Doc(WithFiles):
            __tablename__ = "doc"

        await require_kept(Base, Doc, Doc(files=[b"a", b"b"]))


async def test_names() -> None:
    """The table is in the schema of its parent, and constraints are named by the convention of the metadata."""

    class Base(DeclarativeBase):
        metadata = MetaData(
            schema="main",
            naming_convention={
                "fk": "fk_%(table_name)s_%(column_0_name)s",
                "pk": "pk_%(table_name)s",
                "uq": "uq_%(table_name)s_%(column_0_name)s",
            },
        )

    class Doc(Base):
        __tablename__ = "doc"
        number: Mapped[int] = mapped_column("no", primary_key=True)
        extra_files: Mapped[AttachmentList] = attachments("docs", table_name="papers")

    assert set(Base.metadata.tables) == {"main.doc", "main.papers"}
    papers = Base.metadata.tables["main.papers"]
    assert {constraint.name for constraint in papers.constraints} == {"fk_papers_parent_no", "pk_papers", "uq_papers_parent_no"}
    assert file_class(Doc.extra_files).__name__ == "DocExtraFilesFile"
    await require_kept(Base, Doc, Doc(extra_files=[b"a", b"b"]), "extra_files")


def test_no_table() -> None:
    class Base(DeclarativeBase):
        pass

    class Doc(Base):
        __tablename__ = "doc"
        id: Mapped[int] = mapped_column(primary_key=True)

    with pytest.raises(ConfigurationError, match=r"Joined\.files needs a model that is mapped to a table"):

        class Joined(Base):
            __table__ = select(Doc.id).subquery()
            __mapper_args__ = {"primary_key": [__table__.c.id]}
            files: Mapped[AttachmentList] = attachments("docs")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"lazy": "dynamic"}, "append_files"),
        ({"lazy": "write_only"}, "append_files"),
        ({"lazy": "noload"}, "append_files"),
        ({"uselist": False}, r"Mapped\[Attachment\] = attachment"),
        ({"viewonly": True}, "declare the model"),
        ({"cascade": "save-update"}, "always deleted"),
        ({"order_by": "id"}, "reorder"),
        ({"back_populates": "album"}, "'parent'"),
        ({"backref": "album"}, "'parent'"),
        ({"collection_class": set}, "AttachmentList"),
        ({"secondary": "links"}, "foreign key"),
        ({"comparator_factory": object}, "comparator"),
        ({"argument": "File"}, "generated"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], advice: str) -> None:
    """Those that the collection needs for itself, or that change what the attribute holds, are refused where they are given."""
    with pytest.raises(ConfigurationError, match=advice):
        attachments("docs", **arguments)
    attachments("docs", lazy="raise", uselist=True, viewonly=False)


def test_class_of_the_same_name() -> None:
    base: Any = declarative_base()
    other = type("BoxFilesFile", (base,), {"__tablename__": "other", "id": mapped_column(Integer, primary_key=True)})
    names = {"__tablename__": "box", "id": mapped_column(Integer, primary_key=True), "files": attachments("docs")}
    with pytest.raises(ConfigurationError, match=r"Box\.files is named BoxFilesFile, which is the name of another class"):
        type("Box", (base,), {**names, "__annotations__": {"files": Mapped[AttachmentList]}})
    assert other.__name__ in base.registry._class_registry


def test_attribute_of_another_class() -> None:
    class Base(DeclarativeBase):
        pass

    class Owner(Base):
        __tablename__ = "owner"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Firm(Owner):
        __tablename__ = "firm"
        id: Mapped[int] = mapped_column(ForeignKey("owner.id"), primary_key=True)
        papers: Mapped[AttachmentList] = attachments("docs")

    with pytest.raises(TypeError, match=r"Firm\.papers takes files of a Firm"):
        append_files(Owner(id=1), Firm.papers, [b"a"])


class PhotoOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    file: Attachment


class AlbumOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    id: int
    photos: AttachmentList


class OwnAlbumOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)
    photos: list[PhotoOut]


class TestShown:
    @pytest.fixture
    async def stored(self) -> AsyncIterator[Any]:
        from tests.orm.collections.models import Album, Base

        manager = StorageManager(backends={"store": MemoryStorageBackend()}, policies={"docs": StoragePolicy("docs", "store")})
        engine = create_async_engine("sqlite+aiosqlite://")
        binding = bind_storage(Base, manager)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with async_sessionmaker(engine, expire_on_commit=False).begin() as session:
            found = album(7, "ba")
            found.photos[0].caption = "first"
            session.add(found)
            await session.flush()
            assert isinstance(found, Album)
            yield found
        binding.unbind()
        await engine.dispose()
        await manager.aclose()

    async def test_in_a_response_model(self, stored: Any) -> None:
        shown = AlbumOut.model_validate(stored)
        assert shown.photos is stored.photos
        assert all(one is other for one, other in zip(shown.model_dump()["photos"], stored.photos, strict=True))
        expected = [
            {
                "id": photo.id,
                "caption": photo.caption,
                "file": {
                    "size": 1,
                    "content_type": None,
                    "original_filename": photo.file.original_filename,
                    "checksum": photo.file.checksum,
                },
            }
            for photo in stored.photos
        ]
        assert [photo["file"]["original_filename"] for photo in expected] == ["b.txt", "a.txt"]
        assert json.loads(shown.model_dump_json()) == shown.model_dump(mode="json") == {"id": 7, "photos": expected}
        assert OwnAlbumOut.model_validate(stored).model_dump(mode="json")["photos"] == [
            {"id": photo["id"], "file": photo["file"]} for photo in expected
        ]
        assert jsonable_encoder(stored.photos) == expected
        assert json.loads(TypeAdapter(Any).dump_json({"photos": stored.photos})) == {"photos": expected}
        assert [photo.describe() for photo in stored.photos] == expected
        with pytest.raises(ValueError, match="instance of AttachmentList"):
            AlbumOut.model_validate({"id": 1, "photos": [{"id": 1}]})

    def test_schema(self) -> None:
        for mode in ("validation", "serialization"):
            schema = TypeAdapter(AttachmentList).json_schema(mode=mode)
            assert schema["type"] == "array"
            item = schema["items"]
            assert (item["title"], set(item["properties"])) == ("AttachedFile", {"id", "caption", "file"})
            assert set(item["properties"]["file"]["properties"]) == {"size", "content_type", "original_filename", "checksum"}
            assert TypeAdapter(AttachedFile).json_schema(mode=mode) == item
