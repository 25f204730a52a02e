"""A base that is bound in one line: what the kit gives, what it notices, and what it leaves."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, create_engine, delete, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    BackendUnavailableError,
    ConfigurationError,
    ContentTooLargeError,
    StoragePolicy,
    StoredObjectRef,
    StoredObjectRefType,
    attachment,
)
from granite_storage.orm import AttachmentList, attachments
from granite_storage.orm._interfaces import active_bindings
from granite_storage.testing import bound_storage
from tests.orm.derivations import Upper


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "kit_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("notes", variants={"upper": Upper(when="flush")})
    copy: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, in which nothing is to be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


async def test_asynchronous_sessions(folder: Path) -> None:
    async with bound_storage(Base) as kit:
        async with kit.sessions.begin() as session:
            session.add_all([Note(id=1, file=Attachment(b"one")), Note(id=2, file=Attachment(b"two"))])
        await kit.assert_no_orphans()
        assert sorted(info.size for info in await kit.objects()) == [3, 3, 5, 5]  # with the variants
        async with kit.sessions.begin() as session:
            await session.execute(delete(Note).where(Note.id == 1))
        await kit.assert_no_orphans()
        assert len(await kit.objects()) == 2
        assert kit.storage.policies["notes"].max_size is None
    assert not list(folder.iterdir())
    assert kit.binding not in active_bindings()


def test_synchronous_sessions(folder: Path) -> None:
    with bound_storage(Base) as kit:
        with kit.sessions.begin() as session:
            session.add(Note(id=1, file=Attachment(b"one")))
        kit.assert_no_orphans()
        with kit.sessions() as session:
            note = session.get_one(Note, 1)
            assert note.file is not None
            assert note.file.sync.read() == b"one"
        assert len(kit.objects()) == 2
    assert not list(folder.iterdir())
    assert kit.binding not in active_bindings()


async def test_concurrent_transactions() -> None:
    async with bound_storage(Base) as kit:

        async def add(number: int) -> None:
            async with kit.sessions.begin() as session:
                session.add(Note(id=number, file=Attachment(b"x")))
                await session.flush()
                if number % 2:
                    await session.rollback()

        await asyncio.gather(*map(add, range(8)))
        await kit.assert_no_orphans()
        assert len(await kit.objects()) == 8


async def test_faults() -> None:
    async with bound_storage(Base) as kit:
        kit.faults.fail("put_bytes", nth=2)
        with pytest.raises(BackendUnavailableError):
            async with kit.sessions.begin() as session:
                session.add_all([Note(id=1, file=Attachment(b"one")), Note(id=2, file=Attachment(b"two"))])
        assert kit.faults.pending == 0
        assert await kit.objects() == []
        await kit.assert_no_orphans()


async def test_orphans_and_missing_objects_are_named() -> None:
    async with bound_storage(Base) as kit:
        place = {"storage_key": "notes", "model_name": "m", "entity_id": "1", "field_name": "f"}
        orphan = await kit.storage.put_bytes(content=b"orphan", **place)
        with pytest.raises(AssertionError, match=f"no row refers to the object '{orphan.location}'"):
            await kit.assert_no_orphans()
        async with kit.sessions.begin() as session:
            session.add(Note(id=1, copy=orphan))
        await kit.assert_no_orphans()  # a column of plain refs refers to it
        await kit.storage.delete(orphan)
        with pytest.raises(AssertionError, match=f"a row refers to '{orphan.location}', where no object is"):
            await kit.assert_no_orphans()


def test_orphans_of_synchronous_sessions() -> None:
    with bound_storage(Base) as kit:
        with kit.sessions.begin() as session:
            session.add(Note(id=1, file=Attachment(b"one")))
        with kit.engine.begin() as connection:
            connection.execute(text("DELETE FROM kit_note"))
        with pytest.raises(AssertionError, match=r"no row refers to .*; no row refers to "):
            kit.assert_no_orphans()


async def test_policies_of_the_application() -> None:
    policies = {"notes": StoragePolicy("notes", "s3", max_size=3)}
    async with bound_storage(Base, policies=policies) as kit:
        with pytest.raises(ContentTooLargeError):
            async with kit.sessions.begin() as session:
                session.add(Note(id=1, file=Attachment(b"four")))
        async with kit.sessions.begin() as session:
            session.add(Note(id=1, file=Attachment(b"one")))
        assert len(await kit.objects()) == 2


@pytest.mark.parametrize("policies", [[StoragePolicy("notes", "s3")], "notes", StoragePolicy("notes", "s3")])
def test_policies_without_storage_keys(policies: Any) -> None:
    with pytest.raises(ConfigurationError, match="bound_storage takes the policies by their storage keys, as "):
        bound_storage(Base, policies=policies)


class Sales(DeclarativeBase):
    metadata = MetaData(schema="sales 'q1'")


class Bill(Sales):
    __tablename__ = "kit_bill"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("bills")
    pages: Mapped[AttachmentList] = attachments("bills")


async def test_schemas(folder: Path) -> None:
    async with bound_storage(Sales) as kit:
        for number in (1, 2):  # on two connections
            async with kit.sessions.begin() as session, kit.sessions() as other:
                assert await other.get(Bill, number) is None
                session.add(Bill(id=number, file=Attachment(b"one"), pages=[b"page"]))
        assert len(await kit.objects()) == 4
        async with kit.sessions.begin() as session:
            await session.delete(await session.get_one(Bill, 1))
        assert len(await kit.objects()) == 2
        await kit.assert_no_orphans()
    assert list(folder.iterdir()) == []


def test_schemas_of_synchronous_sessions() -> None:
    with bound_storage(Sales) as kit:
        with kit.sessions.begin() as session:
            session.add(Bill(id=1, file=Attachment(b"one")))
        kit.assert_no_orphans()


async def test_an_engine_of_the_caller_keeps_its_tables(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with bound_storage(Base, engine=engine) as kit:
        assert kit.engine is engine
        async with kit.sessions.begin() as session:
            session.add(Note(id=1, file=Attachment(b"one")))
        await kit.assert_no_orphans()
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM kit_note")) == 1
    await engine.dispose()


async def test_an_engine_of_the_other_kind_is_refused() -> None:
    synchronous, asynchronous = create_engine("sqlite://"), create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(ConfigurationError, match="needs an AsyncEngine"):
        async with bound_storage(Base, engine=synchronous):
            pass

    def enter() -> None:
        with bound_storage(Base, engine=asynchronous):
            pass

    with pytest.raises(ConfigurationError, match="needs a synchronous engine"):
        await asyncio.to_thread(enter)


async def test_the_synchronous_block_is_refused_on_an_event_loop_before_its_body_runs(folder: Path) -> None:
    entered = False
    with pytest.raises(ConfigurationError, match=r"use 'async with bound_storage\(...\)' instead"), bound_storage(Base):
        entered = True
    assert not entered
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_base_that_cannot_be_bound_leaves_nothing(kind: str, folder: Path) -> None:
    policies: dict[str, Any] = {"others": StoragePolicy("others", "memory")}

    def enter() -> None:
        with bound_storage(Base, policies=policies):
            pass

    with pytest.raises(ConfigurationError, match="notes"):
        if kind == "sync":
            await asyncio.to_thread(enter)
        else:
            async with bound_storage(Base, policies=policies):
                pass
    assert not list(folder.iterdir())
