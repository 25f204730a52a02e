"""Attachments of rows that have moved on: the error says that, where a lost object is another one."""

from __future__ import annotations

import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from granite_storage.exceptions import ObjectNotFoundError, StaleAttachmentError
from granite_storage.orm import Attachment, bind_storage
from granite_storage.web import problem_response
from tests.orm.environment import Doc, Note, OrmEnvironment, file

pytestmark = [pytest.mark.case("RB-19"), pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True)]


async def through_open(attachment: Attachment) -> bytes:
    async with attachment.open() as reader:
        return await reader.read()


async def through_an_awaited_reader(attachment: Attachment) -> bytes:
    reader = await attachment.open(offset=0)
    async with reader:
        return await reader.read()


READS: list[Callable[[Attachment], Awaitable[bytes]]] = [Attachment.read, through_open, through_an_awaited_reader]


async def stale(env: OrmEnvironment, how: str = "replaced") -> Doc:
    """Return a detached row whose file has gone meanwhile."""
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions() as session:
        doc = await session.get_one(Doc, 1)
    async with env.sessions.begin() as session:
        current = await session.get_one(Doc, 1)
        if how == "deleted":
            await session.delete(current)
        else:
            current.file = file("b") if how == "replaced" else None
    return doc


@pytest.mark.parametrize("read", READS)
async def test_merged_without_loading(env: OrmEnvironment, read: Callable[[Attachment], Awaitable[bytes]]) -> None:
    doc = await stale(env)
    async with env.sessions() as session:
        merged = await session.merge(doc, load=False)
        assert merged.file is not None
        with pytest.raises(StaleAttachmentError, match="load the row again") as caught:
            await read(merged.file)
        assert isinstance(caught.value.__cause__, ObjectNotFoundError)
        assert problem_response(caught.value).status_code == 409


@pytest.mark.parametrize("how", ["replaced", "emptied", "deleted"])
async def test_detached(env: OrmEnvironment, how: str) -> None:
    doc = await stale(env, how)
    assert doc.file is not None
    with pytest.raises(StaleAttachmentError):
        await doc.file.read()
    with pytest.raises(StaleAttachmentError):
        await pickle.loads(pickle.dumps(doc.file)).read()  # noqa: S301


@pytest.mark.parametrize("column", ["file", "other"])
async def test_assigned(env: OrmEnvironment, column: str) -> None:
    """The copy that the flush would make cannot be made."""
    doc = await stale(env)
    async with env.sessions() as session:
        current = await session.get_one(Doc, 1)
        setattr(current, column, doc.file)
        with pytest.raises(StaleAttachmentError, match="load the row again"):
            await session.commit()
        await session.rollback()
        session.add(Note(id=1, scan=doc.file))
        with pytest.raises(StaleAttachmentError):
            await session.commit()
    await env.check(file_1="b")


async def test_merged_and_flushed(env: OrmEnvironment) -> None:
    doc = await stale(env)
    async with env.sessions() as session:
        await session.merge(doc)
        with pytest.raises(StaleAttachmentError):
            await session.commit()
    await env.check(file_1="b")


async def test_lost_object_is_another_error(env: OrmEnvironment) -> None:
    doc = Doc(id=1, file=file("a"))
    await env.add(doc)
    await env.lose(doc, "file")
    async with env.sessions() as session:
        lost: Any = (await session.get_one(Doc, 1)).file
        for read in READS:
            with pytest.raises(ObjectNotFoundError):
                await read(lost)
        session.add(Note(id=1, scan=lost))
        with pytest.raises(ObjectNotFoundError):
            await session.commit()
    await env.sql("DELETE FROM doc")


async def test_without_sessions_it_is_not_known(env: OrmEnvironment) -> None:
    doc = await stale(env)
    assert doc.file is not None
    binding = bind_storage(env.binding.base, env.manager)
    try:
        with pytest.raises(ObjectNotFoundError):
            await doc.file.read()
    finally:
        binding.unbind()
