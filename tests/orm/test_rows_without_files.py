"""Plain sessions beside those of the application, and rows without files where each statement commits by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, event, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from granite_storage.exceptions import ConfigurationError
from tests.orm.environment import Child, Doc, Node, Note, OrmEnvironment, Parent, Report, file

pytestmark = [
    pytest.mark.case("RB-02"),
    pytest.mark.parametrize("database", ["sqlite", "psycopg"], indirect=True),
]

Work = Callable[[Session], Any]


async def synchronously(env: OrmEnvironment, work: Work, **options: Any) -> None:
    """Run work in a plain session of a plain driver, and commit it."""

    def run() -> None:
        url = env.database.url
        engine = create_engine(url.set(drivername=url.drivername.replace("+aiosqlite", "")), **options)
        if engine.dialect.name == "sqlite":  # without which nothing cascades
            event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON"))
        try:
            with Session(engine) as session:
                work(session)
                session.commit()
        finally:
            engine.dispose()

    await asyncio.to_thread(run)


async def rows(env: OrmEnvironment) -> None:
    await env.add(
        Doc(id=1, title="none"),
        Doc(id=2, title="one", file=file("a")),
        Parent(id=1, children=[Child(id=1)]),
        Parent(id=2, children=[Child(id=2, file=file("c"))]),
        Node(id=1),
        Report(id=1),
        Note(id=1),
    )


async def check(env: OrmEnvironment, left: str = "ac") -> None:
    """Check which files are there, one letter each: the two of the rows, where nothing else is said."""
    assert sorted((await env.contents()).values()) == [letter.encode() for letter in left]
    await env.check()


def replaced_without_a_file(session: Session) -> None:
    session.delete(session.get_one(Doc, 1))
    session.flush()
    session.add(Doc(id=1, title="new"))


ALLOWED: dict[str, Work] = {
    "delete": lambda session: session.delete(session.get_one(Doc, 1)),
    "delete of a subclass": lambda session: session.delete(session.get_one(Report, 1)),
    "delete with children": lambda session: session.delete(session.get_one(Parent, 1)),
    "delete of a tree": lambda session: session.delete(session.get_one(Node, 1)),
    "delete and insert": replaced_without_a_file,
    "insert": lambda session: session.add_all([Doc(id=3), Doc(id=4, file=None)]),
    "update": lambda session: setattr(session.get_one(Doc, 2), "title", "new"),
    "empty again": lambda session: setattr(session.get_one(Doc, 1), "file", None),
    "empty what is not loaded": lambda session: setattr(session.get_one(Note, 1), "scan", None),
    "bulk delete": lambda session: session.execute(delete(Doc).where(Doc.id == 1)),
    "bulk delete that hits nothing": lambda session: session.execute(delete(Doc).where(Doc.id == 77)),
    "bulk delete of a table": lambda session: session.execute(Doc.__table__.delete().where(Doc.id == 1)),
    "bulk delete that cascades": lambda session: session.execute(delete(Parent).where(Parent.id == 1)),
    "query delete": lambda session: session.query(Doc).filter(Doc.id == 1).delete(),
    "bulk update": lambda session: session.execute(update(Doc).values(title="new")),
    "bulk update to none": lambda session: session.execute(update(Doc).where(Doc.id == 1).values(file=None)),
    "bulk update by keys": lambda session: session.execute(update(Doc), [{"id": 1, "file": None}]),
    "bulk insert": lambda session: session.execute(insert(Doc), [{"id": 5, "file": None}]),
}


@pytest.mark.parametrize("name", ALLOWED)
async def test_synchronous_session(env: OrmEnvironment, name: str) -> None:
    await rows(env)
    await synchronously(env, ALLOWED[name])
    await check(env)


WITH_FILES: dict[str, tuple[Work, str]] = {
    "insert": (lambda session: session.add(Doc(id=3, file=file("b"))), "abc"),
    "replace": (lambda session: setattr(session.get_one(Doc, 2), "file", file("b")), "bc"),
    "empty": (lambda session: setattr(session.get_one(Doc, 2), "file", None), "c"),
    "delete": (lambda session: session.delete(session.get_one(Doc, 2)), "c"),
    "delete that cascades": (lambda session: session.delete(session.get_one(Parent, 2)), "a"),
    "bulk delete": (lambda session: session.execute(delete(Doc)), "c"),
    "bulk delete that cascades": (lambda session: session.execute(delete(Parent)), "a"),
    "bulk update": (lambda session: session.execute(update(Doc).values(file=None)), "c"),
    "bulk update by keys": (lambda session: session.execute(update(Doc), [{"id": 2, "file": None}]), "c"),
}


@pytest.mark.parametrize("name", WITH_FILES)
async def test_synchronous_session_and_files(env: OrmEnvironment, name: str) -> None:
    work, left = WITH_FILES[name]
    await rows(env)
    await synchronously(env, work)
    await check(env, left)


async def test_file_that_a_flush_moves_below_what_it_deletes(env: OrmEnvironment) -> None:
    """The database deletes the file's row along with another row that had no file below it before the flush."""
    await rows(env)

    def work(session: Session) -> None:
        parent, child = session.get_one(Parent, 1), session.get_one(Child, 2)
        with session.no_autoflush:  # both are of one flush, which sees only the parent's own child before it begins
            child.parent_id = 1
            session.delete(parent)

    await synchronously(env, work)
    await check(env, "a")


@pytest.mark.parametrize("name", ALLOWED)
async def test_autocommit(env: OrmEnvironment, name: str) -> None:
    await rows(env)
    await synchronously(env, ALLOWED[name], isolation_level="AUTOCOMMIT")
    await check(env)


@pytest.mark.parametrize("name", WITH_FILES)
async def test_autocommit_and_files(env: OrmEnvironment, name: str) -> None:
    await rows(env)
    engine = env.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with AsyncSession(engine) as session:
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await session.run_sync(WITH_FILES[name][0])
            await session.commit()
        await session.rollback()
    await check(env)


async def test_session_that_only_reads(env: OrmEnvironment) -> None:
    await rows(env)

    def work(session: Session) -> None:
        docs = session.scalars(select(Doc).order_by(Doc.id)).all()
        assert [doc.file and doc.file.size for doc in docs] == [None, 1]

    await synchronously(env, work)
