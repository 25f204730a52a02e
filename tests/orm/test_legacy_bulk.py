"""The bulk operations of the legacy session API: none displaces or stores a file past the library without a word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from granite_storage.exceptions import InvalidReferenceError
from tests.orm.environment import Doc, Item, OrmEnvironment, Report, file

pytestmark = [
    pytest.mark.case("RA-10"),
    pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True),
]

Work = Callable[[Session], Any]


def changed(session: Session) -> list[Any]:
    doc = session.get_one(Doc, 1)
    doc.title, doc.file = "new", None
    return [doc]


REFUSED: dict[str, Work] = {
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(Doc, [{"id": 1, "file": None}]),  # type: ignore[arg-type]
    "bulk_update_mappings of several": lambda session: session.bulk_update_mappings(
        Doc,  # type: ignore[arg-type]
        [{"id": 2, "title": "x"}, {"id": 1, "title": "x", "other": None}],
    ),
    "bulk_update_mappings of a subclass": lambda session: session.bulk_update_mappings(
        Report,  # type: ignore[arg-type]
        [{"id": 1, "file": None, "pdf": None}],
    ),
    "bulk_update_mappings with a file": lambda session: session.bulk_update_mappings(
        Doc,  # type: ignore[arg-type]
        [{"id": 1, "file": file("b")}],
    ),
    "bulk_save_objects": lambda session: session.bulk_save_objects(changed(session)),
    "bulk_save_objects of all columns": lambda session: session.bulk_save_objects(
        [session.get_one(Doc, 1)], update_changed_only=False
    ),
    "bulk_save_objects with a new file": lambda session: session.bulk_save_objects([Doc(id=3, file=file("b"))]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Doc, [{"id": 3, "file": file("b")}]),  # type: ignore[arg-type]
}

ALLOWED: dict[str, Work] = {
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(Doc, [{"id": 1, "title": "new"}]),  # type: ignore[arg-type]
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(
        Doc,  # type: ignore[arg-type]
        [{"id": 3, "title": "new"}, {"id": 4, "file": None}],
    ),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Doc(id=3, title="new"), Item(id=3, kind="item")]),
}


async def rows(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a"), other=file("b")), Doc(id=2), Report(id=1, pdf=file("r")))


async def check(env: OrmEnvironment) -> None:
    assert sorted((await env.contents()).values()) == [b"a", b"b", b"r"]
    await env.check()


@pytest.mark.parametrize("begun", [False, True], ids=["first", "after a statement"])
@pytest.mark.parametrize("name", REFUSED)
async def test_refused(env: OrmEnvironment, name: str, begun: bool) -> None:
    await rows(env)
    async with env.sessions() as session:
        if begun:
            await session.get_one(Doc, 2)
        with pytest.raises(InvalidReferenceError):
            await session.run_sync(REFUSED[name])
        await session.rollback()
    await check(env)


@pytest.mark.parametrize("name", ALLOWED)
async def test_allowed(env: OrmEnvironment, name: str) -> None:
    await rows(env)
    async with env.sessions() as session:
        await session.run_sync(ALLOWED[name])
        await session.commit()
    await check(env)


@pytest.mark.parametrize("where", ["before_flush", "after_flush", "after_flush_postexec"])
async def test_inside_of_a_flush(env: OrmEnvironment, where: str) -> None:
    await rows(env)

    def update(session: Session, *_: Any) -> None:
        session.bulk_update_mappings(Doc, [{"id": 1, "file": None}])  # type: ignore[arg-type]

    async with AsyncSession(env.engine) as session:
        event.listen(session.sync_session, where, update)
        session.add(Doc(id=5, file=file("c")))
        with pytest.raises(InvalidReferenceError, match="legacy bulk operation"):
            await session.commit()
    await check(env)


async def test_the_flush_after_it_is_a_flush(env: OrmEnvironment) -> None:
    await rows(env)
    async with env.sessions.begin() as session:
        await session.run_sync(ALLOWED["bulk_update_mappings"])
        (await session.get_one(Doc, 1)).file = None
        await session.flush()
        (await session.get_one(Doc, 1)).other = None
    assert list((await env.contents()).values()) == [b"r"]


async def test_synchronous_session(env: OrmEnvironment) -> None:
    await rows(env)

    def work() -> None:
        drivers = {"sqlite+aiosqlite": "sqlite", "postgresql+asyncpg": "postgresql+psycopg"}
        engine = create_engine(env.database.url.set(drivername=drivers[env.database.url.drivername]))
        with Session(engine) as session, pytest.raises(InvalidReferenceError, match="legacy bulk operation"):
            REFUSED["bulk_update_mappings"](session)
        engine.dispose()

    await asyncio.to_thread(work)
    await check(env)
