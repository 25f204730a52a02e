"""Models of every shape that SQLAlchemy knows: an attachment belongs to its table, however its class is mapped."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, String, Table, delete, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.ext.declarative import AbstractConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    configure_mappers,
    declared_attr,
    mapped_column,
    registry,
    relationship,
    synonym,
)
from sqlalchemy.orm.exc import StaleDataError

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, AttachmentType, attachment, bind_storage
from tests.orm.environment import file


@dataclass
class App:
    """Sessions on a base of its own, and the objects in its storage."""

    sessions: async_sessionmaker[AsyncSession]
    backend: MemoryStorageBackend

    async def count(self) -> int:
        return len([info async for info in self.backend.iter_objects()])

    async def add(self, *rows: Any) -> None:
        async with self.sessions.begin() as session:
            session.add_all(rows)


@contextlib.asynccontextmanager
async def app_of(base: Any) -> AsyncIterator[App]:
    backend = MemoryStorageBackend()
    manager = StorageManager(backends={"store": backend}, policies={"docs": StoragePolicy("docs", "store")})
    engine = create_async_engine("sqlite+aiosqlite://")
    try:
        async with engine.begin() as connection:
            await connection.run_sync(base.metadata.create_all)
        binding = bind_storage(base, manager)
        try:
            yield App(async_sessionmaker(engine, expire_on_commit=False), backend)
        finally:
            binding.unbind()
    finally:
        await engine.dispose()
        await manager.aclose()


async def test_imperative_mapping() -> None:
    mappers = registry()
    columns = Column("id", Integer, primary_key=True), Column("file", AttachmentType("docs"))
    table = Table("imperative", mappers.metadata, *columns)

    class Plain:
        id: Any
        file: Any

    mappers.map_imperatively(Plain, table)
    async with app_of(mappers) as app:
        plain = Plain()
        plain.id, plain.file = 1, file("a")
        await app.add(plain)
        async with app.sessions.begin() as session:
            (await session.get_one(Plain, 1)).file = file("b")
        assert await app.count() == 1
        async with app.sessions.begin() as session:
            await session.delete(await session.get_one(Plain, 1))
        assert await app.count() == 0
    mappers.dispose()


async def test_concrete_inheritance() -> None:
    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    class Child(Parent):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")
        more: Mapped[Attachment | None] = attachment("docs")
        __mapper_args__ = {"concrete": True}

    async with app_of(Base) as app:
        await app.add(Parent(id=1, file=file("a")), Child(id=1, file=file("b"), more=file("c")))
        assert await app.count() == 3
        async with app.sessions.begin() as session:
            (await session.get_one(Child, 1)).file = None
        assert await app.count() == 2
        async with app.sessions.begin() as session:
            await session.execute(delete(Child))
        assert await app.count() == 1


async def test_abstract_concrete_base_that_is_bound_before_it_is_mapped() -> None:
    class Base(DeclarativeBase):
        pass

    class Anything(AbstractConcreteBase, Base):
        strict_attrs = True

    class Memo(Anything):
        __tablename__ = "memo"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")
        __mapper_args__ = {"polymorphic_identity": "memo", "concrete": True}

    async with app_of(Base) as app:
        configure_mappers()
        await app.add(Memo(id=1, file=file("a")))
        async with app.sessions.begin() as session:
            memo = (await session.scalars(select(Anything))).one()
            assert await memo.file.read() == b"a"
            memo.file = None
        assert await app.count() == 0


async def test_mixin_and_synonym() -> None:
    class Base(DeclarativeBase):
        pass

    class HasFile:
        @declared_attr
        def file(cls) -> Mapped[Attachment | None]:  # noqa: N805  # it is SQLAlchemy's way
            return attachment("docs")

    class Letter(HasFile, Base):
        __tablename__ = "letter"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Photo(HasFile, Base):
        __tablename__ = "photo"
        id: Mapped[int] = mapped_column(primary_key=True)
        image = synonym("file")

    async with app_of(Base) as app:
        await app.add(Letter(id=1, file=file("a")), Photo(id=1, image=file("b")))
        async with app.sessions.begin() as session:
            photo = await session.get_one(Photo, 1)
            assert await photo.image.read() == b"b"
            photo.image = file("c")
        assert await app.count() == 2
        async with app.sessions.begin() as session:
            await session.execute(update(Photo).values(image=None))
        assert await app.count() == 1


async def test_version_counter() -> None:
    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "row"
        id: Mapped[int] = mapped_column(primary_key=True)
        version: Mapped[int] = mapped_column()
        file: Mapped[Attachment | None] = attachment("docs")
        __mapper_args__ = {"version_id_col": version}

    async with app_of(Base) as app:
        await app.add(Row(id=1, file=file("a")))
        async with app.sessions() as session:
            row = await session.get_one(Row, 1)
            await session.execute(text("UPDATE row SET version = 7"))
            row.file = file("b")
            with pytest.raises(StaleDataError):
                await session.flush()
            await session.rollback()
        assert await app.count() == 1


async def test_second_class_that_knows_less_of_the_table() -> None:
    """Its rows have files all the same, which go with them."""

    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "row"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    class Slim(Base):
        __table__ = Row.__table__
        __mapper_args__ = {"exclude_properties": ["file"]}

    async with app_of(Base) as app:
        await app.add(Row(id=1, file=file("a")), Row(id=2, file=file("b")))
        async with app.sessions.begin() as session:
            await session.delete(await session.get_one(Slim, 1))
        assert await app.count() == 1
        async with app.sessions.begin() as session:
            await session.execute(delete(Slim))
        assert await app.count() == 0


async def test_row_of_a_subclass_deleted_as_its_parent() -> None:
    """The session loads the parent class where the discriminator says so; the columns of the subclass are in the row."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(10))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}

    class Photo(Item):
        raw: Mapped[Attachment | None] = attachment("docs")
        __mapper_args__ = {"polymorphic_identity": "photo"}

    async with app_of(Base) as app:
        await app.add(Photo(id=1, raw=file("a")))
        async with app.sessions.begin() as session:
            await session.execute(text("UPDATE item SET kind = 'item'"))
            await session.delete(await session.get_one(Item, 1))
        assert await app.count() == 0


async def test_secondary_table() -> None:
    class Base(DeclarativeBase):
        pass

    links = Table(
        "links",
        Base.metadata,
        Column("album_id", ForeignKey("album.id", ondelete="CASCADE"), primary_key=True),
        Column("photo_id", ForeignKey("photo.id", ondelete="CASCADE"), primary_key=True),
    )

    class Photo(Base):
        __tablename__ = "photo"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    class Album(Base):
        __tablename__ = "album"
        id: Mapped[int] = mapped_column(primary_key=True)
        cover: Mapped[Attachment | None] = attachment("docs")
        photos: Mapped[list[Photo]] = relationship(Photo, secondary=links)

    async with app_of(Base) as app:
        await app.add(Album(id=1, cover=file("a"), photos=[Photo(id=1, file=file("b"))]))
        async with app.sessions.begin() as session:
            await session.delete(await session.get_one(Album, 1))
        assert await app.count() == 1


async def test_group_of_deferred_columns() -> None:
    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "row"
        id: Mapped[int] = mapped_column(primary_key=True)
        first: Mapped[Attachment | None] = attachment("docs", deferred=True, deferred_group="files")
        second: Mapped[Attachment | None] = attachment("docs", deferred=True, deferred_group="files")

    async with app_of(Base) as app:
        await app.add(Row(id=1, first=file("a"), second=file("b")))
        async with app.sessions.begin() as session:
            (await session.get_one(Row, 1)).first = file("c")
        assert await app.count() == 2
        async with app.sessions.begin() as session:
            await session.delete(await session.get_one(Row, 1))
        assert await app.count() == 0
