"""What the column types and the stream of refs owe on PostgreSQL, whose drivers decode JSON themselves."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
import pytest
from sqlalchemy import JSON, NullPool, select, text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from granite_storage import StorageManager
from granite_storage.exceptions import InvalidReferenceError
from granite_storage.orm import Attachment, StorageBinding, bind_storage, iter_model_storage_refs
from granite_storage.orm.columns import variants_in
from tests.orm.values import Base, Document, Receipt, Sessions, add, as_json

DEEP = "[" * 5_000 + "]" * 5_000
MANY = 20_000


@pytest.fixture(autouse=True)
def binding(manager: StorageManager) -> Iterator[StorageBinding]:
    binding = bind_storage(Base, manager)
    yield binding
    binding.unbind()


@pytest.fixture(params=["asyncpg", "psycopg"])
async def sessions(request: pytest.FixtureRequest, postgres_server: URL) -> AsyncIterator[Sessions]:
    engine = create_async_engine(postgres_server.set(drivername=f"postgresql+{request.param}"), poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        yield async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
    finally:
        await engine.dispose()


async def write_raw(sessions: Sessions, value: str, column: str = "document.file") -> None:
    table, _, name = column.partition(".")
    async with sessions.begin() as session:
        await session.execute(text(f"UPDATE {table} SET {name} = CAST(:value AS jsonb)"), {"value": value})  # noqa: S608


async def test_the_column_is_jsonb_and_none_is_null(sessions: Sessions) -> None:
    await add(sessions, Document(file=Attachment(b"abc")))
    await add(sessions, Document())
    async with sessions() as session:
        kinds = list(await session.scalars(text("SELECT pg_typeof(file)::text FROM document")))
        assert kinds == ["jsonb", "jsonb"]
        assert await session.scalar(select(Document.id).where(Document.file.is_(None))) == 2
        assert await session.scalar(text("SELECT count(*) FROM document WHERE file IS NULL")) == 1


async def test_where(sessions: Sessions) -> None:
    one = await add(sessions, Document(file=Attachment(b"1", filename="one.txt", extra={"tags": ["a"]})))
    await add(sessions, Document(file=Attachment(b"22", filename="two.txt")))
    async with sessions() as session:

        async def found(criterion: Any) -> list[int]:
            return list(await session.scalars(select(Document.id).where(criterion).order_by(Document.id)))

        assert await found(Document.file == one.file.ref) == [1]
        assert await found(Document.file != one.file) == [2]
        assert await found(Document.file.in_([one.file])) == [1]
        assert await found(Document.file["size"].as_integer() > 1) == [2]
        assert await found(Document.file["original_filename"].as_string() == "one.txt") == [1]
        assert await session.scalar(select(Document.file["extra", "tags"]).where(Document.id == 1)) == ["a"]


@pytest.mark.case("REF-06")
@pytest.mark.parametrize("raw", ["[]", '"text"', "{}", DEEP], ids=["list", "text", "empty", "deep"])
async def test_a_broken_value_spoils_no_list(sessions: Sessions, raw: str) -> None:
    await add(sessions, Document(title="broken"))
    await add(sessions, Receipt())
    await write_raw(sessions, raw)
    await write_raw(sessions, raw, "receipt.ref")
    await add(sessions, Document(file=Attachment(b"good")))
    async with sessions() as session:
        broken, good = [document.file for document in await session.scalars(select(Document).order_by(Document.id))]
        assert good is not None
        assert await good.read() == b"good"
        assert broken is not None
        with pytest.raises(InvalidReferenceError):
            _ = broken.ref
        with pytest.raises(InvalidReferenceError):
            await session.scalars(select(Receipt))


@pytest.mark.case("REF-12")
async def test_keys_in_another_order_are_no_change(sessions: Sessions) -> None:
    document = await add(sessions, Document(file=Attachment(b"abc")))
    await write_raw(sessions, as_json(document.file.ref, unknown={"b": 1, "a": 2}))
    async with sessions.begin() as session:
        loaded = await session.get_one(Document, 1)
        loaded.title = "changed"
    async with sessions() as session:
        file = await session.scalar(select(Document.file))
        assert file is not None
        assert file.ref.to_dict()["unknown"] == {"a": 2, "b": 1}


async def test_variants_of_plain_json(sessions: Sessions) -> None:
    """A clone of a table may have its refs as `json`, whose other keys may have what is no `jsonb`."""
    value = text("""SELECT '{"extra": {"number": 1e999999}, "variants": {}}'::json AS file""").columns(file=JSON).subquery()
    async with sessions() as session:
        assert await session.scalar(select(variants_in(value.c.file, "postgresql"))) == "{}"


async def test_refs_are_streamed_from_the_server(sessions: Sessions) -> None:
    ref = {"storage_key": "d", "backend": "m", "location": "x", "size": 7, "extra": {"padding": "x" * 200}}
    async with sessions.begin() as session:
        insert = text(f"INSERT INTO receipt (id, ref) SELECT n, CAST(:ref AS jsonb) FROM generate_series(1, {MANY}) n")  # noqa: S608
        await session.execute(insert, {"ref": json.dumps(ref)})
    process, seen, sizes = psutil.Process(), 0, []
    async with sessions() as session:
        await session.connection()
        async for found in iter_model_storage_refs(session, Receipt, "ref"):
            assert found.size == 7
            seen += 1
            if seen % 1000 == 0:
                sizes.append(process.memory_info().rss)
    assert seen == MANY
    assert max(sizes) - sizes[1] < 8 * 1024 * 1024


async def test_distinct_attachments_in_the_order_of_a_label(sessions: Sessions) -> None:
    """The column is read as text, so that PostgreSQL takes `ORDER BY Document.file` for something that is not selected."""
    await add(sessions, Document(file=Attachment(b"1")))
    await add(sessions, Document(file=Attachment(b"22")))
    await add(sessions, Document())
    async with sessions() as session:
        found = await session.scalars(select(Document.file.label("f")).distinct().order_by("f"))
        assert sorted(file.size for file in found if file is not None) == [1, 2]
        by_id = await session.scalars(select(Document).distinct().order_by(Document.id))
        assert [document.id for document in by_id] == [1, 2, 3]
