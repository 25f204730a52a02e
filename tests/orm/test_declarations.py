"""What a declaration may say of an attachment: defaults that make files, and the words for what it may not say."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Computed, ForeignKey, MetaData, create_engine, insert, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, configure_mappers, mapped_column, sessionmaker
from starlette.datastructures import Headers, UploadFile

from granite_storage import ConfigurationError, StorageManager
from granite_storage.exceptions import InvalidReferenceError, UnboundAttachmentError
from granite_storage.orm import Attachment, AttachmentType, attachment, bind_storage
from tests.orm.values import Sessions, add, locations, sqlite


class Base(DeclarativeBase):
    pass


def make_logo() -> Attachment:
    return Attachment(b"logo", filename="logo.png", content_type="image/png")


class Shop(Base):
    __tablename__ = "shop"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="")
    logo: Mapped[Attachment | None] = attachment("documents", default=make_logo)
    stream: Mapped[Attachment | None] = attachment("documents", default=lambda: Attachment(io.BytesIO(b"stream")))
    none: Mapped[Attachment | None] = attachment("documents", default=lambda: None)
    core: Mapped[Attachment | None] = mapped_column(AttachmentType("documents"), default=make_logo)


class Branch(Shop):
    __tablename__ = "branch"
    id: Mapped[int] = mapped_column(ForeignKey("shop.id"), primary_key=True)
    sign: Mapped[Attachment | None] = attachment("documents", default=make_logo)


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Stall(DataclassBase):
    __tablename__ = "stall"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    logo: Mapped[Attachment | None] = attachment("documents", insert_default=make_logo, init=False)
    sign: Mapped[Attachment | None] = attachment("documents", default_factory=make_logo)


@pytest.fixture
async def sessions(tmp_path: Path, manager: StorageManager) -> AsyncIterator[Sessions]:
    bindings = [bind_storage(base, manager) for base in (Base, DataclassBase)]
    async with sqlite(tmp_path, Base) as sessions:
        async with sessions.kw["bind"].begin() as connection:
            await connection.run_sync(DataclassBase.metadata.create_all)
        yield sessions
    for binding in bindings:
        binding.unbind()


@pytest.mark.case("RB-16")
class TestDefaults:
    async def test_each_row_has_a_file_of_its_own(self, sessions: Sessions, manager: StorageManager) -> None:
        async with sessions.begin() as session:
            session.add_all([Shop(name="a"), Shop(name="b"), Branch(name="c")])
        async with sessions() as session:
            shops = (await session.scalars(select(Shop).order_by(Shop.id))).all()
            found = [file for shop in shops for file in (shop.logo, shop.stream, shop.core) if file is not None]
            assert [await file.read() for file in found] == [b"logo", b"stream", b"logo"] * 3
            assert found[0].content_type == "image/png"
            branch = await session.get_one(Branch, 3)
            assert branch.sign is not None
        assert await locations(manager) == {file.location for file in [*found, branch.sign]}
        assert len(await locations(manager)) == 10

    async def test_given_file_counts(self, sessions: Sessions) -> None:
        shop = await add(sessions, Shop(logo=Attachment(b"own"), stream=None))
        assert await shop.logo.read() == b"own"
        assert await shop.stream.read() == b"stream"
        async with sessions.begin() as session:
            (await session.get_one(Shop, shop.id)).logo = None
        async with sessions() as session:
            assert (await session.get_one(Shop, shop.id)).logo is None

    async def test_rollback(self, sessions: Sessions, manager: StorageManager) -> None:
        async with sessions() as session:
            session.add(Shop())
            await session.flush()
            assert len(await locations(manager)) == 3
            await session.rollback()
        assert await locations(manager) == set()

    async def test_dataclasses(self, sessions: Sessions) -> None:
        stall = await add(sessions, Stall())
        assert stall.logo is not None
        assert (await stall.logo.read(), await stall.sign.read()) == (b"logo", b"logo")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("default", Attachment(b"shared")),
            ("default", "text"),
            ("default", lambda context: make_logo()),
            ("default", text("'{}'")),
            ("insert_default", Attachment(b"shared")),
            ("server_default", "{}"),
            ("server_default", text("'{}'")),
            ("onupdate", make_logo),
        ],
    )
    def test_refused_where_it_is_declared(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigurationError, match="default=lambda: Attachment"):
            attachment("documents", **{name: value})

    def test_allowed_where_it_is_declared(self) -> None:
        for options in ({"default": None}, {"default": make_logo}, {"server_default": text("NULL")}, {"onupdate": None}):
            attachment("documents", **options)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: Column("file", AttachmentType("documents"), default=Attachment(b"shared")),
            lambda: Column("file", AttachmentType("documents"), server_default="{}"),
            lambda: Column("file", AttachmentType("documents"), onupdate=make_logo),
            lambda: Column("file", AttachmentType("documents"), Computed("other")),
        ],
    )
    @pytest.mark.parametrize("bound", ["before", "after"])
    def test_refused_where_it_is_bound(self, manager: StorageManager, make: Callable[[], Any], bound: str) -> None:
        class Own(DeclarativeBase):
            pass

        def declare() -> None:
            attributes = {"__tablename__": "row", "id": Column(type_=Shop.id.type, primary_key=True), "file": make()}
            declared.append(type("Row", (Own,), attributes))

        declared: list[type] = []  # or the class could be gone before its mapper is configured

        if bound == "after":
            declare()
            with pytest.raises(ConfigurationError, match=r"row\.file"):
                bind_storage(Own, manager)
        else:
            binding = bind_storage(Own, manager)
            try:
                with pytest.raises((ConfigurationError, InvalidRequestError), match=r"row\.file"):
                    declare()
                    configure_mappers()
            finally:
                binding.unbind()
                Own.registry.dispose()

    async def test_default_that_asks_for_the_statement(self, tmp_path: Path, manager: StorageManager) -> None:
        class Own(DeclarativeBase):
            pass

        def named(context: Any) -> Attachment:
            return Attachment(context.get_current_parameters()["name"].encode())

        class Row(Own):
            __tablename__ = "row"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = mapped_column(AttachmentType("documents"), default=named)

        binding = bind_storage(Own, manager)
        async with sqlite(tmp_path, Own, "own.db") as sessions:
            with pytest.raises(ConfigurationError, match=r"default of row\.file uses the context of the INSERT"):
                await add(sessions, Row())
        binding.unbind()


@pytest.mark.case("RB-20")
class TestMessages:
    async def test_forgotten_binding(self, tmp_path: Path) -> None:
        class Forgotten(DeclarativeBase):
            pass

        class Row(Forgotten):
            __tablename__ = "row"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("documents")

        async with sqlite(tmp_path, Forgotten) as sessions:
            with pytest.raises(UnboundAttachmentError, match=r"row\.file has no storage manager: call bind_storage\("):
                await add(sessions, Row(file=Attachment(b"abc")))

    async def test_second_base(self, sessions: Sessions) -> None:
        """A base below another one may have a metadata of its own, which is not bound along with the first."""

        class Second(Base):
            __abstract__ = True
            metadata = MetaData()

        class Row(Second):
            __tablename__ = "row"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("documents")

        async with sessions.kw["bind"].begin() as connection:
            await connection.run_sync(Second.metadata.create_all)
        with pytest.raises(UnboundAttachmentError, match=r"MetaData is none of those.*Base.*bind_storage once more"):
            await add(sessions, Row(file=Attachment(b"abc")))

    async def test_core_statement(self, sessions: Sessions) -> None:
        async with sessions() as session:
            connection = await session.connection()
            with pytest.raises(InvalidReferenceError, match=r"shop\.logo: add or change an instance"):
                await connection.execute(insert(Shop.__table__).values(logo=Attachment(b"abc")))

    def test_upload_keeps_its_name_and_type(self) -> None:
        headers = Headers({"content-type": "image/png"})
        upload = UploadFile(io.BytesIO(b"abc"), filename="me.png", headers=headers)
        made = Attachment(upload)
        assert (made.original_filename, made.content_type) == ("me.png", "image/png")
        made = Attachment(upload, filename="other.png", content_type="image/webp")
        assert (made.original_filename, made.content_type) == ("other.png", "image/webp")
        assert Attachment(io.BytesIO(b"abc")).original_filename is None

    @pytest.mark.parametrize(
        "annotation",
        [
            Mapped[list[Attachment]],
            Mapped[Sequence[Attachment] | None],
            "Mapped[list[Attachment]]",
            "Mapped[dict[str, Attachment]]",
            "list[Attachment]",
        ],
        ids=str,
    )
    def test_several_in_one_column(self, manager: StorageManager, annotation: Any) -> None:
        class Own(DeclarativeBase):
            __allow_unmapped__ = True

        def declare() -> None:
            attributes = {
                "__tablename__": "row",
                "__module__": __name__,
                "__annotations__": {"file": annotation},
                "id": mapped_column(Shop.id.type, primary_key=True),
                "file": attachment("documents"),
            }
            declared.append(type("Row", (Own,), attributes))
            configure_mappers()

        declared: list[type] = []  # or the class could be gone before its mapper is configured
        binding = bind_storage(Own, manager)
        with pytest.raises((ConfigurationError, InvalidRequestError), match=r"Row\.file is annotated as several"):
            declare()
        binding.unbind()
        Own.registry.dispose()

    @staticmethod
    def declare_several(base: Any, name: str = "Row") -> Any:
        attributes = {
            "__tablename__": name.lower(),
            "__module__": __name__,
            "__annotations__": {"file": Mapped[list[Attachment]]},
            "id": mapped_column(Shop.id.type, primary_key=True),
            "file": attachment("documents", nullable=True),
        }
        return type(name, (base,), attributes)

    @pytest.mark.parametrize("is_configured", [False, True])
    async def test_several_in_one_column_before_the_binding(
        self, manager: StorageManager, tmp_path: Path, is_configured: bool
    ) -> None:
        class Own(DeclarativeBase):
            pass

        row = self.declare_several(Own)
        if is_configured:
            configure_mappers()
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=r"Row\.file is annotated as several"):
                bind_storage(Own, manager)
        async with sqlite(tmp_path, Own) as sessions:
            with pytest.raises(UnboundAttachmentError):
                await add(sessions, row(file=Attachment(b"abc")))
        assert await locations(manager) == set()
        Own.registry.dispose()

    async def test_several_in_one_column_after_the_binding(self, manager: StorageManager, tmp_path: Path) -> None:
        """The model is refused each time that it is used."""

        class Own(DeclarativeBase):
            pass

        binding = bind_storage(Own, manager)
        row = self.declare_several(Own)
        below = type("Below", (row,), {"__module__": __name__, "__mapper_args__": {"polymorphic_identity": "below"}})
        with pytest.raises(ConfigurationError, match=r"Row\.file is annotated as several"):
            row()
        for _ in range(2):
            for kind in (row, below):
                with pytest.raises((ConfigurationError, InvalidRequestError), match="is annotated as several"):
                    kind(file=Attachment(b"abc"))
        async with sqlite(tmp_path, Own) as sessions:
            past_the_listeners = row()
            vars(past_the_listeners)["file"] = Attachment(b"abc")
            with pytest.raises(ConfigurationError, match="is annotated as several"):
                await add(sessions, past_the_listeners)
        assert await locations(manager) == set()
        binding.unbind()
        assert not [function for function in row.file.dispatch.set if function.__module__.startswith("granite_storage")]
        Own.registry.dispose()

    async def test_default_that_no_session_can_store_after_the_binding(self, manager: StorageManager) -> None:
        class Own(DeclarativeBase):
            pass

        binding = bind_storage(Own, manager)

        class Row(Own):
            __tablename__ = "row"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = mapped_column(AttachmentType("documents"), server_default=text("'x'"))

        for _ in range(3):
            with pytest.raises(ConfigurationError, match="server_default"):
                Row(file=Attachment(b"abc"))
        binding.unbind()
        Own.registry.dispose()

    def test_sessions(self, manager: StorageManager, sessions: Sessions) -> None:
        engine = sessions.kw["bind"]
        for wrong in (AsyncSession(engine), "sessions", engine):
            with pytest.raises(ConfigurationError, match="async_sessionmaker"):
                bind_storage(Base, manager, session_factory=wrong)  # type: ignore[arg-type]
        for right in (async_sessionmaker(engine), lambda: AsyncSession(engine), sessionmaker(create_engine("sqlite://"))):
            bind_storage(Base, manager, session_factory=right).unbind()  # type: ignore[arg-type]
