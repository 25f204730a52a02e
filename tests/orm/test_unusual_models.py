"""What applications do to SQLAlchemy around a model: odd keys, joins, late columns, and listeners that raise before ours."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from sqlalchemy import ForeignKey, String, delete, event, join, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, column_property, mapped_column

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, attachment
from granite_storage.orm._interfaces import StoredObject
from granite_storage.orm.uploads import remove
from tests.orm.environment import file
from tests.orm.test_models import app_of


def keyed() -> Any:
    """A base, and a class with a key that may be any text."""

    class Base(DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "row"
        key: Mapped[str] = mapped_column(String(500), primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    return Base, Row


@pytest.mark.parametrize(
    "key", ["None", "\u6587" * 100, "\U00020000" * 120, "a" * 99 + ".b", "a" * 98 + "\u6587", "e\u0301", "..", "", " . "]
)
async def test_any_text_is_a_key(key: str) -> None:
    base, row = keyed()
    async with app_of(base) as app:
        await app.add(row(key=key, file=file("a")))
        async with app.sessions() as session:
            attached = (await session.get_one(row, key)).file
            assert attached is not None
            assert await attached.read() == b"a"
            entity = attached.location.split("/")[1]
    assert entity != "None"
    assert len(entity.encode()) <= 100


async def test_class_of_a_join() -> None:
    class Base(DeclarativeBase):
        pass

    class Left(Base):
        __tablename__ = "left"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    class Right(Base):
        __tablename__ = "right"
        id: Mapped[int] = mapped_column(primary_key=True)
        left_id: Mapped[int] = mapped_column(ForeignKey("left.id"))
        other: Mapped[Attachment | None] = attachment("docs")

    class Both(Base):
        __table__ = join(Left.__table__, Right.__table__)
        id = column_property(Left.__table__.c.id, Right.__table__.c.left_id)
        right_id = Right.__table__.c.id

    async with app_of(Base) as app:
        await app.add(Both(id=1, right_id=5, file=file("a"), other=file("b")))
        async with app.sessions.begin() as session:
            (await session.scalars(select(Both))).one().file = file("c")
        assert await app.count() == 2
        async with app.sessions.begin() as session:
            await session.delete((await session.scalars(select(Both))).one())
        assert await app.count() == 0


@pytest.mark.parametrize("how", ["delete", "bulk delete", "bulk update"])
async def test_column_added_to_a_class_in_use(how: str) -> None:
    base, row = keyed()
    async with app_of(base) as app:
        await app.add(row(key="1", file=file("a")))
        async with app.sessions.begin() as session:
            await session.execute(delete(row))
        row.late = attachment("docs")
        async with app.sessions.begin() as session:
            await (await session.connection()).exec_driver_sql('ALTER TABLE "row" ADD COLUMN late JSON')
        await app.add(row(key="1", file=file("a"), late=file("b")))
        assert await app.count() == 2
        async with app.sessions.begin() as session:
            if how == "delete":
                await session.delete(await session.get_one(row, "1"))
            else:
                await session.execute(delete(row) if how == "bulk delete" else update(row).values(file=None, late=None))
        assert await app.count() == 0


@pytest.mark.parametrize("name", ["after_commit", "after_transaction_end"])
async def test_listener_that_raises_before_ours(name: str) -> None:
    """It was there before the base was bound; the transaction has committed all the same."""
    armed: list[str] = []

    def fails(*_: Any) -> None:
        if armed:
            armed.clear()
            raise ZeroDivisionError

    event.listen(Session, name, fails)
    try:
        base, row = keyed()
        async with app_of(base) as app:
            await app.add(row(key="1", file=file("a")))
            async with app.sessions() as session:
                (await session.get_one(row, "1")).file = file("b")
                await session.flush()
                armed.append(name)
                with pytest.raises(ZeroDivisionError):
                    await session.commit()
            assert await app.count() == 1
            async with app.sessions() as session:
                assert await (await session.get_one(row, "1")).file.read() == b"b"
    finally:
        event.remove(Session, name, fails)


class _Reluctant(MemoryStorageBackend):
    """Breaks off the first delete, as a client does that is closed meanwhile."""

    deletes = 0

    async def delete(self, location: str) -> None:
        self.deletes += 1
        if self.deletes == 1:
            raise asyncio.CancelledError
        await asyncio.sleep(0)
        await super().delete(location)


async def test_clean_up_that_is_broken_off(caplog: pytest.LogCaptureFixture) -> None:
    """It says which object stays, and the others are deleted before it returns."""
    backend = _Reluctant()
    manager = StorageManager(backends={"store": backend}, policies={"docs": StoragePolicy("docs", "store")})
    refs: list[StoredObjectRef] = [
        await manager.put_bytes(storage_key="docs", model_name="doc", entity_id=str(number), field_name="file", content=b"a")
        for number in range(3)
    ]
    with caplog.at_level(logging.WARNING, "granite_storage"):
        await remove([StoredObject(manager, ref) for ref in refs], [])
    assert [info.location async for info in backend.iter_objects()] == [refs[0].location]
    assert [refs[0].location in record.getMessage() for record in caplog.records] == [True]
    await manager.aclose()
