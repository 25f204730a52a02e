"""Rows and judged files: columns with validators of their own, and files that come from another policy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ContentRejectedError, UnsupportedContentError
from granite_storage.inspection import UploadPreview
from granite_storage.orm import Attachment, attachment, bind_storage
from tests.inspection.support import png
from tests.orm.values import Sessions, add, locations, sqlite

PICTURE, TEXT = png(), b"just text"
shown: list[UploadPreview] = []


async def validate(upload: UploadPreview) -> None:
    shown.append(upload)
    if upload.filename == "unwanted.txt":
        raise ContentRejectedError("not this one")


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    plain: Mapped[Attachment | None] = attachment("plain")
    typed: Mapped[Attachment | None] = attachment("typed")
    avatar: Mapped[Attachment | None] = attachment("avatars")
    noted: Mapped[Attachment | None] = attachment("plain", validate=validate)


@pytest.fixture
def manager() -> StorageManager:
    policies = {
        "plain": StoragePolicy("plain", "memory"),
        "typed": StoragePolicy("typed", "memory", accept=("image/*", "text/plain")),
        "avatars": StoragePolicy("avatars", "memory", accept=("image/*",)),
    }
    return StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies)


@pytest.fixture
async def sessions(tmp_path: Path, manager: StorageManager) -> AsyncIterator[Sessions]:
    shown.clear()
    binding = bind_storage(Base, manager)
    async with sqlite(tmp_path, Base) as sessions:
        yield sessions
    binding.unbind()


@pytest.mark.parametrize(
    ("column", "content", "error"),
    [("plain", PICTURE, UnsupportedContentError), ("typed", TEXT, UnsupportedContentError), ("typed", PICTURE, None)],
    ids=["not judged", "another type", "of an accepted type"],
)
async def test_a_file_of_another_policy(
    sessions: Sessions, manager: StorageManager, column: str, content: bytes, error: Any
) -> None:
    await add(sessions, User(id=1, **{column: Attachment(content)}))
    before = await locations(manager)

    async def take() -> None:
        async with sessions.begin() as session:
            user = await session.get_one(User, 1)
            user.avatar, file = None, getattr(user, column)
            setattr(user, column, None)
            user.avatar = file

    if error is None:
        await take()
        assert await locations(manager) == before
        return
    with pytest.raises(error, match="store its content again"):
        await take()
    assert await locations(manager) == before
    async with sessions.begin() as session:
        user = await session.get_one(User, 1)
        assert await getattr(user, column).read() == content


async def test_a_copy_to_a_stricter_policy_is_judged(sessions: Sessions, manager: StorageManager) -> None:
    await add(sessions, User(id=1, plain=Attachment(PICTURE), typed=Attachment(TEXT)))
    async with sessions.begin() as session:
        user = await session.get_one(User, 1)
        user.avatar = user.plain
    async with sessions() as session:
        user = await session.get_one(User, 1)
        assert user.avatar is not None
        assert user.avatar.ref.media == {"type": "image/png"}
        assert user.plain is not None
        assert user.avatar.ref.location != user.plain.ref.location
        user.avatar = user.typed
        with pytest.raises(UnsupportedContentError):
            await session.flush()


async def test_a_column_has_a_validator_of_its_own(sessions: Sessions, manager: StorageManager) -> None:
    await add(sessions, User(id=1, plain=Attachment(TEXT, filename="unwanted.txt")))
    assert shown == []
    with pytest.raises(ContentRejectedError, match="not this one"):
        await add(sessions, User(id=2, noted=Attachment(TEXT, filename="unwanted.txt")))
    await add(sessions, User(id=3, noted=Attachment(TEXT, filename="a.txt")))
    assert [upload.filename for upload in shown] == ["unwanted.txt", "a.txt"]
    assert len(await locations(manager)) == 2


def test_a_validator_that_cannot_be_called() -> None:
    with pytest.raises(ConfigurationError, match="validate"):
        attachment("plain", validate="no function")  # type: ignore[arg-type]
