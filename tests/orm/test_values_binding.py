"""Binding bases to managers: several of each, late models, rebinding, and nothing left after `unbind`."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Integer, MetaData, select
from sqlalchemy.event import registry
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Session, declarative_base, mapped_column

import granite_storage
from granite_storage import ConfigurationError, orm
from granite_storage.exceptions import InvalidReferenceError, UnboundAttachmentError, UnknownPolicyError
from granite_storage.orm import Attachment, StorageBinding, attachment, bind_storage
from tests.orm.values import Base, Document, Sessions, add, locations, make_manager, sqlite


def make_model(table: str = "thing", storage_key: str = "documents", base: Any = None) -> tuple[Any, Any]:
    """A new model with one attachment, on a base of its own unless one is given."""
    base = base or declarative_base()
    columns = {"id": mapped_column(Integer, primary_key=True), "file": attachment(storage_key)}
    return base, type(table.title(), (base,), {"__tablename__": table, **columns})


def listeners() -> list[str]:
    """The library's functions that SQLAlchemy would call, anywhere in the process, for what is not garbage."""
    gc.collect()
    found = [reference() for targets in registry._key_to_collection.values() for reference in targets.values()]
    return [repr(function) for function in found if str(getattr(function, "__module__", "")).startswith("granite_storage")]


def listeners_of(target: Any) -> list[str]:
    """The library's functions that would be called for an attribute or an engine."""
    names = [name for name in dir(target.dispatch) if not name.startswith("_") and name != "dispatch"]
    collections = {name: getattr(target.dispatch, name) for name in names}
    called = [(name, call) for name, calls in collections.items() if isinstance(calls, Iterable) for call in calls]
    return [name for name, call in called if str(getattr(call, "__module__", "")).startswith("granite_storage")]


class TestBinding:
    def test_the_guides_name_of_the_session_factory(self) -> None:
        sessions: async_sessionmaker[AsyncSession] = async_sessionmaker()
        binding = bind_storage(Base, make_manager(), sessions=sessions)
        assert binding.session_factory is sessions
        binding.unbind()
        with pytest.raises(ConfigurationError, match="not both"):
            bind_storage(Base, make_manager(), sessions=sessions, session_factory=sessions)

    def test_it_says_what_it_binds(self) -> None:
        manager = make_manager()
        sessions: async_sessionmaker[AsyncSession] = async_sessionmaker()
        binding = bind_storage(Base, manager, session_factory=sessions)
        assert isinstance(binding, StorageBinding)
        assert (binding.base, binding.metadata, binding.manager, binding.session_factory) == (
            Base,
            Base.metadata,
            manager,
            sessions,
        )
        assert "tests.orm.values.Base" in repr(binding)
        columns = {f"{column.table.name}.{column.name}" for column in binding.ref_columns()}
        assert {"document.file", "document.thumbnail", "receipt.ref", "film.poster"} <= columns
        binding.unbind()
        binding.unbind()

    @pytest.mark.parametrize("base", [None, object, "Base", 3, MetaData()], ids=lambda base: type(base).__name__)
    def test_it_needs_a_base(self, base: Any) -> None:
        with pytest.raises(ConfigurationError, match="declarative base"):
            bind_storage(base, make_manager())

    def test_it_needs_a_manager(self) -> None:
        manager: Any = {"documents": "local"}
        with pytest.raises(ConfigurationError, match="StorageManager"):
            bind_storage(Base, manager)

    def test_it_takes_a_base_of_any_kind(self) -> None:
        bind_storage(declarative_base(), make_manager()).unbind()

    def test_a_column_of_an_unknown_policy_is_refused_and_nothing_is_bound(self) -> None:
        base, thing = make_model(storage_key="elsewhere")
        with pytest.raises(UnknownPolicyError, match=r"thing\.file names the policy 'elsewhere'.*documents, thumbnails"):
            bind_storage(base, make_manager())
        with pytest.raises(UnboundAttachmentError):
            thing.file.type.binding()

    async def test_a_later_column_of_an_unknown_policy_is_refused_at_use(self, tmp_path: Path) -> None:
        base, _ = make_model()
        manager = make_manager()
        binding = bind_storage(base, manager)
        _, late = make_model("late", "elsewhere", base)
        async with sqlite(tmp_path, base) as sessions:
            with pytest.raises(UnknownPolicyError, match=r"late\.file names the policy 'elsewhere'"):
                await add(sessions, late(file=Attachment(b"abc")))
            with pytest.raises(UnknownPolicyError, match=r"late\.file"):
                await Attachment(b"abc").store(late.file)
        assert await locations(manager) == set()
        binding.unbind()

    async def test_models_may_be_declared_afterwards(self, tmp_path: Path) -> None:
        class Bases(DeclarativeBase):
            pass

        binding = bind_storage(Bases, make_manager())
        _, thing = make_model(base=Bases)
        async with sqlite(tmp_path, Bases) as sessions:
            made = await add(sessions, thing(file=Attachment(b"abc")))
            assert await made.file.read() == b"abc"
        with pytest.raises(InvalidReferenceError):
            thing(file="no attachment")
        binding.unbind()


class TestSeveral:
    async def test_each_base_has_its_manager(self, tmp_path: Path) -> None:
        """The tables even have the same name."""
        pairs = [(*make_model(), make_manager()) for _ in range(2)]
        bindings = [bind_storage(base, manager) for base, _, manager in pairs]
        for number, (base, thing, manager) in enumerate(pairs):
            async with sqlite(tmp_path, base, f"{number}.db") as sessions:
                await add(sessions, thing(file=Attachment(b"%d" % number)))
                async with sessions() as session:
                    file = await session.scalar(select(thing.file))
                    assert file.manager is manager
                    assert await file.read() == b"%d" % number
        for binding in bindings:
            binding.unbind()

    async def test_a_file_goes_from_one_manager_to_the_other_as_a_copy(self, tmp_path: Path) -> None:
        (left, one, source), (right, two, target) = [(*make_model(), make_manager()) for _ in range(2)]
        bindings = [bind_storage(left, source), bind_storage(right, target)]
        async with sqlite(tmp_path, left, "left.db") as from_here, sqlite(tmp_path, right, "right.db") as to_there:
            made = await add(from_here, one(file=Attachment(b"abc", filename="a.txt", extra={"k": 1})))
            copied = await add(to_there, two(file=made.file))
            assert copied.file.manager is target
            assert (copied.file.original_filename, copied.file.ref.extra) == ("a.txt", {"k": 1})
            assert await copied.file.read() == await made.file.read() == b"abc"
            assert await locations(target) == {copied.file.location}
        for binding in bindings:
            binding.unbind()

    async def test_unbinding_one_leaves_the_other(self, tmp_path: Path) -> None:
        (left, one, _), (right, two, manager) = [(*make_model(), make_manager()) for _ in range(2)]
        first, second = bind_storage(left, make_manager()), bind_storage(right, manager)
        first.unbind()
        assert one(file="unbound, so nobody looks").file
        with pytest.raises(InvalidReferenceError):
            two(file="bound")
        async with sqlite(tmp_path, right) as sessions:
            await add(sessions, two(file=Attachment(b"abc")))
            assert len(await locations(manager)) == 1
        second.unbind()


class TestRebinding:
    async def test_the_newest_counts_until_it_is_unbound(self, sessions: Sessions) -> None:
        production, testing = make_manager(), make_manager()
        outer = bind_storage(Base, production)
        inner = bind_storage(Base, testing)
        document = await add(sessions, Document(file=Attachment(b"test")))
        assert document.file.manager is testing
        assert await locations(production) == set()
        inner.unbind()
        assert document.file.manager is production
        await add(sessions, Document(file=Attachment(b"real")))
        assert len(await locations(production)) == 1
        outer.unbind()
        with pytest.raises(UnboundAttachmentError, match="call bind_storage"):
            _ = document.file.manager

    async def test_in_any_order(self, sessions: Sessions) -> None:
        older, newer = make_manager(), make_manager()
        first, second = bind_storage(Base, older), bind_storage(Base, newer)
        first.unbind()
        document = await add(sessions, Document(file=Attachment(b"1")))
        assert document.file.manager is newer
        second.unbind()

    async def test_an_object_is_stored_once_though_two_bindings_are_there(self, sessions: Sessions) -> None:
        managers = [make_manager(), make_manager()]
        bindings = [bind_storage(Base, manager) for manager in managers]
        await add(sessions, Document(file=Attachment(b"1")))
        assert [len(await locations(manager)) for manager in managers] == [0, 1]
        for binding in bindings:
            binding.unbind()


def listeners_of_mappers() -> list[object]:
    mapper = Document.__mapper__.dispatch
    return [*mapper.before_insert, *mapper.before_update, *mapper.before_delete, *mapper.mapper_configured]


class TestUnbound:
    async def test_nothing_listens_any_more(self, tmp_path: Path) -> None:
        before = listeners()  # of engines that other tests have not let go of yet
        of_mappers = listeners_of_mappers()  # of `sqlalchemy.ext.mutable`
        base, thing = make_model()
        bindings = [bind_storage(Base, make_manager()), bind_storage(base, make_manager())]
        async with sqlite(tmp_path) as sessions, sqlite(tmp_path, base, "other.db") as others:
            await add(sessions, Document(file=Attachment(b"1")))
            await add(others, thing(file=Attachment(b"1")))
            targets = [maker.kw["bind"].sync_engine for maker in (sessions, others)] + [Document.file, thing.file]
            targets.append(Session())
            assert [bool(listeners_of(target)) for target in targets] == [True] * len(targets)
            for binding in bindings:
                binding.unbind()
            assert [listeners_of(target) for target in targets] == [[]] * len(targets)
            assert listeners_of_mappers() == of_mappers
        assert len(listeners()) <= len(before)

    async def test_sessions_work_as_without_the_library(self, sessions: Sessions) -> None:
        binding = bind_storage(Base, make_manager())
        await add(sessions, Document(title="bound"))
        binding.unbind()
        await add(sessions, Document(title="unbound"))
        async with sessions() as session:
            assert list(await session.scalars(select(Document.title).order_by(Document.id))) == ["bound", "unbound"]

    async def test_reading_says_what_is_missing(self, sessions: Sessions) -> None:
        binding = bind_storage(Base, make_manager())
        await add(sessions, Document(file=Attachment(b"abc")))
        binding.unbind()
        async with sessions() as session:
            file = await session.scalar(select(Document.file))
            assert file is not None
            assert file.size == 3
            with pytest.raises(UnboundAttachmentError, match=r"document\.file has no storage manager: call bind_storage"):
                await file.read()


@pytest.mark.parametrize("name", sorted(set(orm.__all__) & set(granite_storage.__all__)))
def test_the_top_level_offers_it(name: str) -> None:
    assert getattr(granite_storage, name) is getattr(orm, name)
