"""A file that was stored for one column comes into another only within the limit of that one's policy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ContentTooLargeError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, attachment, bind_storage
from tests.orm.values import Sessions, add, locations, sqlite

pytestmark = pytest.mark.case("RE-05", "RE-15")

LIMIT = 10
LARGE, SMALL = b"x" * (LIMIT + 1), b"x" * LIMIT


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    film: Mapped[Attachment | None] = attachment("films")
    trailer: Mapped[Attachment | None] = attachment("films")
    avatar: Mapped[Attachment | None] = attachment("avatars")


class Photo(Base):
    __tablename__ = "photo"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("avatars")


@pytest.fixture
def manager() -> StorageManager:
    policies = {"films": StoragePolicy("films", "memory"), "avatars": StoragePolicy("avatars", "memory", max_size=LIMIT)}
    return StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies)


@pytest.fixture
async def sessions(tmp_path: Path, manager: StorageManager) -> AsyncIterator[Sessions]:
    binding = bind_storage(Base, manager)
    async with sqlite(tmp_path, Base) as sessions:
        yield sessions
    binding.unbind()


async def stored(sessions: Sessions, content: bytes) -> None:
    await add(sessions, User(id=1, film=Attachment(content)))


async def check(sessions: Sessions, manager: StorageManager, *, film: bytes | None, avatar: bytes | None = None) -> None:
    """Check what the user has, and that there are no other objects."""
    async with sessions() as session:
        user = await session.get_one(User, 1)
        found = [one for one in (user.film, user.trailer, user.avatar) if one is not None]
        assert [await one.read() for one in found] == [content for content in (film, avatar) if content is not None]
        photos = [photo.file for photo in await session.scalars(select(Photo)) if photo.file is not None]
    assert await locations(manager) == {one.location for one in [*found, *photos]}


async def test_move_to_another_column(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, LARGE)
    async with sessions() as session:
        user = await session.get_one(User, 1)
        user.avatar, user.film = user.film, None
        with pytest.raises(ContentTooLargeError, match=r"user\.avatar accepts at most 10") as caught:
            await session.commit()
    assert caught.value.max_size == LIMIT
    await check(sessions, manager, film=LARGE)


async def test_move_to_another_table(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, LARGE)
    async with sessions() as session:
        user = await session.get_one(User, 1)
        session.add(Photo(file=user.film))
        await session.delete(user)
        with pytest.raises(ContentTooLargeError):
            await session.commit()
    await check(sessions, manager, film=LARGE)


async def test_move_after_a_flush(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, LARGE)
    async with sessions() as session:
        user = await session.get_one(User, 1)
        film, user.film = user.film, None
        await session.flush()
        user.avatar = film
        with pytest.raises(ContentTooLargeError):
            await session.commit()
    await check(sessions, manager, film=LARGE)


async def test_copy(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, LARGE)
    async with sessions() as session:
        user = await session.get_one(User, 1)
        user.avatar = user.film
        with pytest.raises(ContentTooLargeError):
            await session.commit()
    await check(sessions, manager, film=LARGE)


async def test_stored_for_another_column(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, SMALL)
    film = await Attachment(LARGE).store(User.film)
    async with sessions() as session:
        session.add(Photo(file=film))
        with pytest.raises(ContentTooLargeError, match=r"photo\.file"):
            await session.commit()
    async with sessions.begin() as session:
        (await session.get_one(User, 1)).film = film
    await check(sessions, manager, film=LARGE)


async def test_store_of_what_is_stored(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, LARGE)
    async with sessions() as session:
        film = (await session.get_one(User, 1)).film
    assert film is not None
    with pytest.raises(ContentTooLargeError):
        await film.store(User.avatar)
    assert await film.store(User.trailer) is film
    await check(sessions, manager, film=LARGE)


async def test_what_fits_moves(sessions: Sessions, manager: StorageManager) -> None:
    await stored(sessions, SMALL)
    before = await locations(manager)
    async with sessions.begin() as session:
        user = await session.get_one(User, 1)
        user.avatar, user.film = user.film, None
    await check(sessions, manager, film=None, avatar=SMALL)
    assert await locations(manager) == before


async def test_what_its_own_policy_has_let_in_moves_also_when_the_limit_is_lower_now(
    sessions: Sessions, tmp_path: Path, manager: StorageManager
) -> None:
    await stored(sessions, LARGE)
    lower = StorageManager(
        backends=dict(manager.backends),
        policies={**manager.policies, "films": StoragePolicy("films", "memory", max_size=1)},
    )
    binding = bind_storage(Base, lower)
    async with sessions.begin() as session:
        user = await session.get_one(User, 1)
        user.trailer, user.film = user.film, None
    binding.unbind()
    await check(sessions, manager, film=LARGE)
