"""`max_files` and `max_total_size`: refused before an object is left behind, also where several transactions add at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError
from granite_storage.exceptions import CollectionFullError
from granite_storage.orm import AttachmentList, append_files, attachments, count_files, file_class, sum_sizes
from tests.orm.collections.models import Album, Series, Shelf, load, named, shown
from tests.orm.environment import OrmEnvironment

Book: Any = file_class(Shelf.books)


async def load_shelf(session: Any, key: int = 1) -> Any:
    return await load(session, Shelf, key, "books")


async def books(env: OrmEnvironment, key: int = 1) -> str:
    return await shown(env, Shelf, key, "books")


class TestNumber:
    async def test_new_parent(self, env: OrmEnvironment) -> None:
        with pytest.raises(CollectionFullError, match="at most 3 files, and there would be 4") as refused:
            await env.add(Shelf(id=1, books=[b"a", b"b", b"c", b"d"]))
        assert (refused.value.max_files, refused.value.max_total_size) == (3, None)
        assert env.backend.count("put_bytes") == 0  # the session knew it before the upload

    async def test_loaded(self, env: OrmEnvironment) -> None:
        await env.add(Shelf(id=1, books=[b"a", b"b", b"c"]))
        with pytest.raises(CollectionFullError):
            async with env.sessions.begin() as session:
                (found := await load_shelf(session)).books.append(b"d")
        async with env.sessions.begin() as session:
            found = await load_shelf(session)
            found.books.append(b"d")
            found.books.pop(0)
        assert await books(env) == "bcd"
        async with env.sessions.begin() as session:
            found = await load_shelf(session)
            await session.delete(found.books[0])
            found.books.append(b"e")
        assert await books(env) == "cde"

    async def test_not_loaded(self, env: OrmEnvironment) -> None:
        await env.add(Shelf(id=1, books=[b"a", b"b"]))
        with pytest.raises(CollectionFullError):
            async with env.sessions.begin() as session:
                append_files(await session.get_one(Shelf, 1), Shelf.books, [b"c", b"d"])
        with pytest.raises(CollectionFullError):
            await env.add(Book(b"c", parent_id=1), Book(b"d", parent_id=1))
        async with env.sessions.begin() as session:
            shelf = await session.get_one(Shelf, 1)
            append_files(shelf, Shelf.books, [b"c"])
            await session.flush()
            with pytest.raises(CollectionFullError):
                async with session.begin_nested():
                    append_files(shelf, Shelf.books, [b"d"])
        assert await books(env) == "abc"

    async def test_moved_in(self, env: OrmEnvironment) -> None:
        await env.add(Shelf(id=1, books=[b"a"]), Shelf(id=2, books=[b"x", b"y", b"z"]))
        with pytest.raises(CollectionFullError):
            async with env.sessions.begin() as session:
                book = (await load_shelf(session)).books[0]
                book.parent = await session.get_one(Shelf, 2)
        with pytest.raises(CollectionFullError):
            async with env.sessions.begin() as session:
                (await load_shelf(session)).books[0].parent_id = 2
        assert (await books(env), await books(env, 2)) == ("a", "xyz")

    async def test_composite_primary_key(self, env: OrmEnvironment) -> None:
        await env.add(Series(owner="anna", number=1, pages=[b"a", b"b", b"c"]))
        with pytest.raises(CollectionFullError, match=r"Series\.pages"):
            async with env.sessions.begin() as session:
                append_files(await session.get_one(Series, ("anna", 1)), Series.pages, [b"d"])

    async def test_other_changes_count_nothing(self, env: OrmEnvironment) -> None:
        """A limit that was lowered does not keep anybody from changing what is there."""
        await env.add(Shelf(id=1, books=[b"a", b"b", b"c"]))
        declared = Book._declared
        declared.max_files = 1
        try:
            async with env.sessions.begin() as session:
                found = await load_shelf(session)
                found.books.reverse()
                found.books[0].caption = "text"
                found.books.pop(1)
        finally:
            declared.max_files = 3
        assert await books(env) == "ca"


class TestSize:
    async def test_sum(self, env: OrmEnvironment) -> None:
        await env.add(Shelf(id=1, books=[b"a" * 10, b"b" * 10]))
        with pytest.raises(CollectionFullError, match="at most 20 bytes in all, and there would be 21") as refused:
            async with env.sessions.begin() as session:
                append_files(await session.get_one(Shelf, 1), Shelf.books, [b"c"])
        assert (refused.value.max_files, refused.value.max_total_size) == (None, 20)

    async def test_stream(self, env: OrmEnvironment) -> None:
        """Its size is known once it is stored."""
        with pytest.raises(CollectionFullError):
            await env.add(Shelf(id=1, books=[b"a" * 10, env.stream(b"b" * 6, b"c" * 6)]))

    async def test_replaced_by_a_larger_one(self, env: OrmEnvironment) -> None:
        await env.add(Shelf(id=1, books=[b"a" * 5, b"b" * 10]))
        with pytest.raises(CollectionFullError):
            async with env.sessions.begin() as session:
                book = await session.scalar(select(Book).order_by(Book.id))
                book.file = named("a" * 11)
        async with env.sessions.begin() as session:
            (await session.scalar(select(Book).order_by(Book.id))).file = named("a" * 10)
        assert await books(env) == "a" * 10 + "b" * 10


@pytest.mark.parametrize("way", ["loaded", "not loaded"])
async def test_concurrent_transactions(env: OrmEnvironment, way: str) -> None:
    """Each of many adds a file: as many as there is room for are kept."""
    await env.add(Shelf(id=1))

    async def add(number: int) -> bool:
        try:
            async with env.sessions.begin() as session:
                if way == "loaded":
                    found = await load_shelf(session)
                    await asyncio.sleep(0.01)
                    found.books.append(named(str(number)))
                else:
                    found = await session.get_one(Shelf, 1)
                    append_files(found, Shelf.books, [named(str(number))])
        except CollectionFullError:
            return False
        except OperationalError as error:
            if "locked" not in str(error):  # SQLite refuses to write after a read that is out of date
                raise
            return await add(number)
        return True

    added = await asyncio.gather(*map(add, range(8)))
    async with env.sessions() as session:
        counts = select(count_files(Shelf.books), sum_sizes(Shelf.books)).where(Shelf.id == 1)
        count, total = (await session.execute(counts)).one()
    assert (count, total) == (sum(added), sum(added))
    assert count == 3


@pytest.mark.parametrize("limits", [{"max_files": 0}, {"max_files": True}, {"max_total_size": -1}, {"max_total_size": "1 MB"}])
def test_no_limit(limits: Any) -> None:
    with pytest.raises(ConfigurationError, match="must be a number of at least 1"):

        class Base(DeclarativeBase):
            pass

        class _Box(Base):
            __tablename__ = "box"
            id: Mapped[int] = mapped_column(primary_key=True)
            files: Mapped[AttachmentList] = attachments("docs", **limits)


def test_no_storage_key() -> None:
    with pytest.raises(ConfigurationError, match="needs the storage key of a policy"):
        attachments("")
    assert Album.photos.type.storage_key == "docs"
