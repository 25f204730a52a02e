"""A horizontally sharded session: each row's file is stored, replaced and removed with the row, on the shard that has it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, event, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.ext.horizontal_shard import ShardedSession, set_shard_id
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage

pytestmark = pytest.mark.case("RB-14")


class Base(DeclarativeBase):
    pass


class Letter(Base):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    country: Mapped[str]
    file: Mapped[Attachment | None] = attachment("letters")


def choose_shard(mapper: Any, instance: Any, clause: Any = None) -> str:
    """Choose as an application does: by the row, which must be known."""
    return str(instance.country)


@dataclass
class Shards:
    engines: dict[str, AsyncEngine]
    backend: MemoryStorageBackend

    def session(self) -> AsyncSession:
        return AsyncSession(
            sync_session_class=ShardedSession,
            expire_on_commit=False,
            shards={name: engine.sync_engine for name, engine in self.engines.items()},
            shard_chooser=choose_shard,
            identity_chooser=lambda *_, **__: list(self.engines),
            execute_chooser=lambda _: list(self.engines),
        )

    async def add(self, *letters: Letter) -> None:
        async with self.session() as session:
            session.add_all(letters)
            await session.commit()

    async def check(self, **expected: int) -> None:
        """Check which files the shards' rows have, by their sizes, and that there are no other objects."""
        sizes: dict[str, int] = {}
        locations = set()
        for name, engine in self.engines.items():
            async with AsyncSession(engine) as session:
                for letter in await session.scalars(select(Letter).where(Letter.file.is_not(None))):
                    assert letter.file is not None
                    assert len(await letter.file.read()) == letter.file.size
                    sizes[f"{name}_{letter.id}"] = letter.file.size
                    locations.add(letter.file.location)
        assert sizes == expected
        assert {info.location async for info in self.backend.iter_objects()} == locations


@pytest.fixture
async def shards(tmp_path: Path) -> AsyncIterator[Shards]:
    engines = {name: create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/{name}.db") for name in ("at", "ch")}
    for engine in engines.values():
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
    backend = MemoryStorageBackend()
    manager = StorageManager(backends={"memory": backend}, policies={"letters": StoragePolicy("letters", "memory")})
    binding = bind_storage(Base, manager)
    yield Shards(engines, backend)
    binding.unbind()
    await manager.aclose()
    for engine in engines.values():
        await engine.dispose()


async def three(shards: Shards) -> None:
    await shards.add(
        Letter(id=1, country="at", file=Attachment(b"1")),
        Letter(id=2, country="ch", file=Attachment(b"22")),
        Letter(id=3, country="at", file=Attachment(b"333")),
    )


async def get(session: AsyncSession, number: int) -> Letter:
    return await session.get_one(Letter, number)


async def test_insert(shards: Shards) -> None:
    await three(shards)
    await shards.check(at_1=1, ch_2=2, at_3=3)


async def test_rows_of_one_key_on_two_shards(shards: Shards) -> None:
    await shards.add(Letter(id=1, country="at", file=Attachment(b"1")))
    await shards.add(Letter(id=1, country="ch", file=Attachment(b"22")))
    async with shards.session() as session:
        austrian = (await session.scalars(select(Letter).options(set_shard_id("at")))).one()
        await session.delete(austrian)
        await session.commit()
    await shards.check(ch_1=2)


async def test_replace_and_delete(shards: Shards) -> None:
    await three(shards)
    async with shards.session() as session:
        (await get(session, 1)).file = Attachment(b"4444")
        (await get(session, 2)).file = Attachment(b"55555")
        await session.delete(await get(session, 3))
        await session.commit()
    await shards.check(at_1=4, ch_2=5)


async def test_rollback(shards: Shards) -> None:
    await three(shards)
    async with shards.session() as session:
        (await get(session, 1)).file = Attachment(b"4444")
        await session.delete(await get(session, 2))
        session.add(Letter(id=4, country="ch", file=Attachment(b"55555")))
        await session.flush()
        await session.rollback()
    await shards.check(at_1=1, ch_2=2, at_3=3)


async def test_move_to_another_shard(shards: Shards) -> None:
    await three(shards)
    before = {info.location async for info in shards.backend.iter_objects()}
    async with shards.session() as session:
        one, two = await get(session, 1), await get(session, 2)
        one.file, two.file = two.file, one.file
        await session.commit()
    await shards.check(at_1=2, ch_2=1, at_3=3)
    assert {info.location async for info in shards.backend.iter_objects()} == before


async def test_delete_taken_back(shards: Shards) -> None:
    await three(shards)
    async with shards.session() as session:

        def keep(inner: Session, *_: Any) -> None:
            inner.add_all(list(inner.deleted))

        event.listen(session.sync_session, "before_flush", keep)
        await session.delete(await get(session, 1))
        await session.delete(await get(session, 2))
        await session.commit()
    await shards.check(at_1=1, ch_2=2, at_3=3)


async def test_bulk_delete_on_all_shards(shards: Shards) -> None:
    await three(shards)
    async with shards.session() as session:
        await session.execute(delete(Letter).where(Letter.id > 1), execution_options={"synchronize_session": False})
        await session.commit()
    await shards.check(at_1=1)


@pytest.mark.parametrize("how", ["option", "bind_arguments", "execution_options"])
async def test_bulk_delete_on_one_shard(shards: Shards, how: str) -> None:
    await three(shards)
    statement = delete(Letter)
    options: dict[str, Any] = {"synchronize_session": False}
    arguments: dict[str, Any] = {}
    if how == "option":
        statement = statement.options(set_shard_id("at"))
    elif how == "bind_arguments":
        arguments["shard_id"] = "at"
    else:
        options["_sa_shard_id"] = "at"
    asked: list[str] = []
    event.listen(shards.engines["ch"].sync_engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    async with shards.session() as session:
        await session.execute(statement, execution_options=options, bind_arguments=arguments)
        await session.commit()
    assert asked == [], "the other shard's rows are none of its business"
    await shards.check(ch_2=2)


async def test_bulk_update_on_all_shards(shards: Shards) -> None:
    await three(shards)
    async with shards.session() as session:
        await session.execute(
            update(Letter).where(Letter.id < 3).values(file=None), execution_options={"synchronize_session": False}
        )
        await session.commit()
    await shards.check(at_3=3)
