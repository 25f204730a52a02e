"""`StoredContentMixin` method by method."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.datastructures import Headers, UploadFile

from granite_storage import ConfigurationError, ContentTooLargeError, ObjectNotFoundError, StorageManager
from granite_storage.orm import Attachment, StoredContentMixin, attachment, bind_storage
from tests.orm.values import Base, Report, Sessions, add, locations, sqlite


@pytest.fixture
async def sessions(tmp_path: Path, manager: StorageManager) -> AsyncIterator[Sessions]:
    binding = bind_storage(Base, manager)
    async with sqlite(tmp_path) as sessions:
        yield sessions
    binding.unbind()


async def test_set_content(sessions: Sessions) -> None:
    report = Report()
    pending = report.set_content(b"abc", filename="a.txt", content_type="text/plain", extra={"k": 1})
    assert report.pdf is pending
    assert pending.is_pending
    await add(sessions, report)
    ref = pending.ref
    assert (ref.size, ref.original_filename, ref.content_type, ref.extra) == (3, "a.txt", "text/plain", {"k": 1})


async def test_set_content_from_stream(sessions: Sessions) -> None:
    report = Report()
    report.set_content_from_stream(io.BytesIO(b"abc"), filename="a.txt", content_type="text/plain", extra={"k": 1})
    await add(sessions, report)
    assert await report.get_content() == b"abc"
    assert report.pdf is not None
    assert (report.pdf.original_filename, report.pdf.ref.extra) == ("a.txt", {"k": 1})


async def test_set_content_from_uploadfile(sessions: Sessions) -> None:
    report = Report()
    upload = UploadFile(io.BytesIO(b"abc"), filename="a.txt", headers=Headers({"content-type": "text/plain"}))
    report.set_content_from_uploadfile(upload, extra={"k": 1})
    await add(sessions, report)
    assert report.pdf is not None
    ref = report.pdf.ref
    assert (ref.original_filename, ref.content_type, ref.extra) == ("a.txt", "text/plain", {"k": 1})


async def test_get_content_text(sessions: Sessions) -> None:
    report = Report()
    report.set_content("Größe".encode())
    await add(sessions, report)
    assert await report.get_content_text() == "Größe"
    assert await report.get_content_text("latin-1") == "GrÃ¶Ã\x9fe"
    with pytest.raises(UnicodeDecodeError):
        await report.get_content_text("ascii")


async def test_open_content(sessions: Sessions) -> None:
    report = Report()
    report.set_content(b"0123456789")
    await add(sessions, report)
    async with report.open_content(offset=2, length=3) as reader:
        assert await reader.read() == b"234"
    reader = await report.open_content(verify=True)
    assert b"".join([chunk async for chunk in reader]) == b"0123456789"


async def test_without_content(sessions: Sessions) -> None:
    report = await add(sessions, Report())
    for read in (report.get_content, report.get_content_text, report.open_content().__aenter__):
        with pytest.raises(ObjectNotFoundError, match="this Report has no content"):
            await read()
    assert not await report.delete_content()
    report.clear_content_reference()


async def test_replace_content(sessions: Sessions, manager: StorageManager) -> None:
    report = await add(sessions, Report())
    async with sessions.begin() as session:
        report = await session.get_one(Report, 1)
        previous, first = await report.replace_content(b"first", filename="1.txt")
        assert previous is None
    async with sessions.begin() as session:
        report = await session.get_one(Report, 1)
        previous, second = await report.replace_content(b"second", content_type="text/plain", extra={"k": 2})
        assert previous == first
        assert report.pdf is not None
        assert second == report.pdf.ref
        assert await locations(manager) == {first.location, second.location}
    assert await locations(manager) == {second.location}


async def test_a_replacement_is_rolled_back(sessions: Sessions, manager: StorageManager) -> None:
    report = Report()
    report.set_content(b"first")
    await add(sessions, report)
    before = await locations(manager)
    async with sessions() as session:
        loaded = await session.get_one(Report, 1)
        await loaded.replace_content(b"second")
        await session.rollback()
    assert await locations(manager) == before
    async with sessions() as session:
        with pytest.raises(ContentTooLargeError):
            await (await session.get_one(Report, 1)).replace_content(bytes(1_000_001))
        await session.rollback()
    assert await locations(manager) == before
    async with sessions() as session:
        assert await (await session.get_one(Report, 1)).get_content() == b"first"


async def test_a_replacement_outside_of_a_session_is_taken_by_the_row(sessions: Sessions, manager: StorageManager) -> None:
    report = Report()
    previous, new = await report.replace_content(io.BytesIO(b"abc"))
    assert previous is None
    assert await locations(manager) == {new.location}
    await add(sessions, report)
    assert await locations(manager) == {new.location}
    assert await report.get_content() == b"abc"


async def test_delete_content(sessions: Sessions, manager: StorageManager) -> None:
    report = Report()
    report.set_content(b"abc")
    await add(sessions, report)
    async with sessions.begin() as session:
        report = await session.get_one(Report, 1)
        assert await report.delete_content()
        assert report.pdf is None
        assert len(await locations(manager)) == 1
    assert await locations(manager) == set()


async def test_clear_content_reference(sessions: Sessions, manager: StorageManager) -> None:
    report = Report()
    report.set_content(b"abc")
    await add(sessions, report)
    async with sessions.begin() as session:
        (await session.get_one(Report, 1)).clear_content_reference()
    assert await locations(manager) == set()


async def test_what_is_cleared_here_may_be_moved_there(sessions: Sessions, manager: StorageManager) -> None:
    report = Report()
    report.set_content(b"abc")
    await add(sessions, report)
    before = await locations(manager)
    async with sessions.begin() as session:
        first = await session.get_one(Report, 1)
        session.add(Report(id=2, pdf=first.pdf))
        first.clear_content_reference()
    assert await locations(manager) == before


async def test_expired_content_is_loaded(sessions: Sessions, manager: StorageManager) -> None:
    """After a commit the attribute is expired; the methods that are awaited load it."""
    async with sessions() as session:
        report = Report()
        report.set_content(b"abc")
        session.add(report)
        await session.commit()
        session.expire(report)
        assert await report.get_content() == b"abc"
        session.expire(report)
        async with report.open_content() as reader:
            assert await reader.read() == b"abc"
        session.expire(report)
        previous, new = await report.replace_content(b"def")
        assert previous is not None
        await session.commit()
        assert await locations(manager) == {new.location}
        session.expire(report)
        assert await report.delete_content()
        await session.commit()
    assert await locations(manager) == set()


async def test_a_model_that_names_no_field_says_so() -> None:
    class Bases(DeclarativeBase):
        pass

    class Nameless(StoredContentMixin, Bases):
        __tablename__ = "nameless"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("documents")

    with pytest.raises(ConfigurationError, match="Nameless does not set __stored_content_field_name__"):
        Nameless().set_content(b"")
