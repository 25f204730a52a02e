"""Rows that another transaction commits between the reading of a statement's rows and the statement itself."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, text, update
from sqlalchemy.exc import SAWarning
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util import await_only

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import bulk, flush
from tests.orm.environment import Doc, OrmEnvironment, file


async def somebody_waits(env: OrmEnvironment) -> None:
    """Wait until a session waits for a row's lock."""
    for _ in range(3000):
        async with env.engine.connect() as connection:
            if await connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")):
                return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody waits")


@pytest.mark.case("CON-01")
@pytest.mark.parametrize("database", ["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("bulk", [False, True])
async def test_row_is_deleted_and_inserted_anew_meanwhile(env: OrmEnvironment, bulk: bool) -> None:
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions() as one, env.sessions() as two:
        doc = await two.get_one(Doc, 1)
        await two.commit()
        await one.delete(await one.get_one(Doc, 1))
        await one.flush()
        one.add(Doc(id=1, file=file("b")))
        await one.flush()

        async def replace() -> None:
            if bulk:
                await two.execute(update(Doc).where(Doc.id == 1).values(file=None))
            else:
                doc.file = file("c")
            await two.commit()

        replacing = asyncio.create_task(replace())
        await somebody_waits(env)
        await one.commit()
        await replacing
    await env.check(file_1=None if bulk else "c")


@pytest.mark.case("DBF-09")
@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
@pytest.mark.parametrize("statement", [update(Doc).values(file=None), delete(Doc)], ids=["update", "delete"])
async def test_row_is_inserted_after_a_bulk_statement_has_looked(
    env: OrmEnvironment, statement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., Any] = bulk.lock_statement

    def look(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        await_only(env.add(Doc(id=1, file=file("a"))))
        return found

    async with env.sessions() as session:
        await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        with monkeypatch.context() as patch, pytest.raises(StaleAttachmentError):
            patch.setattr(bulk, "lock_statement", look)
            await session.execute(statement)
    await env.check(file_1="a")


@pytest.mark.case("CON-01")
@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
@pytest.mark.parametrize("deleting", [False, True], ids=["replacing", "deleting"])
async def test_row_is_inserted_anew_after_a_flush_has_looked(
    env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, deleting: bool
) -> None:
    """The row that is found then is another one, and its file must not be lost sight of."""
    await env.add(Doc(id=1, file=file("a")))
    original: Callable[..., Any] = flush.lock_rows

    def look(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        await_only(env.add(Doc(id=1, file=file("b"))))
        return found

    async with env.sessions() as session:
        await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        doc = await session.get_one(Doc, 1)
        async with env.sessions.begin() as other:
            await other.delete(await other.get_one(Doc, 1))
        if deleting:
            await session.delete(doc)
        else:
            doc.file = file("c")
        with monkeypatch.context() as patch, pytest.raises(StaleAttachmentError):
            patch.setattr(flush, "lock_rows", look)
            await session.commit()
    await env.check(file_1="b")


async def test_row_that_is_gone_is_deleted_again(env: OrmEnvironment) -> None:
    """SQLAlchemy warns, and nobody's transaction fails for it; nothing listens on afterwards."""
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    async with env.sessions() as session:
        doc, other = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        await session.commit()
        async with env.sessions.begin() as faster:
            await faster.delete(await faster.get_one(Doc, 1))
        await session.delete(doc)
        await session.delete(other)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)
            await session.flush()
        connection = await session.connection()
        assert not list(connection.sync_connection.dispatch.after_cursor_execute)
        await session.commit()
    await env.check()


async def test_row_that_is_gone_takes_nothing(env: OrmEnvironment) -> None:
    """Some drivers do not say how many rows several UPDATEs have hit: the file would have left one row and come to no other."""
    await env.add(Doc(id=1, file=file("a")), Doc(id=2))
    async with env.sessions() as session:
        one, two = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        await session.commit()
        async with env.sessions.begin() as faster:
            await faster.delete(await faster.get_one(Doc, 2))
        one.file, two.file = None, one.file
        with pytest.raises((StaleAttachmentError, StaleDataError)):
            await session.commit()
    await env.check(file_1="a")


@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
async def test_row_is_inserted_after_an_update_by_keys_has_looked(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = bulk.lock_rows

    def look(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        await_only(env.add(Doc(id=1, file=file("a"))))
        return found

    async with env.sessions() as session:
        await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        with monkeypatch.context() as patch, pytest.raises(StaleAttachmentError):
            patch.setattr(bulk, "lock_rows", look)
            await session.execute(update(Doc), [{"id": 1, "file": None}])
    await env.check(file_1="a")
