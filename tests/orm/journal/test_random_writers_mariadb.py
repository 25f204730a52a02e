"""Random SQL that bypasses the sessions on MariaDB, sessions beside it, and workers that overtake each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm.exc import StaleDataError

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment
from tests.orm.conftest import new_database
from tests.orm.environment import file
from tests.orm.journal.guarded import Child, Doc, Grandchild, Parent, Picture, code_of, environment, locations
from tests.orm.journal.test_random_writers import COLUMNS, SECONDS, TABLES, Traffic, slow_down

EXPECTED = {"1020", "1205", "1213", "1452", "1062"}

ONE_STATEMENT = {
    "delete": "DELETE FROM doc WHERE id IN ({a}, {b})",
    "wipe": "UPDATE doc SET file = NULL WHERE id = {a}",
    "copy": "INSERT INTO doc (id, file) SELECT {a}, file FROM doc d WHERE id = {b} ON DUPLICATE KEY UPDATE file = d.file",
    "replace": "REPLACE INTO doc (id, file) SELECT {a}, file FROM doc WHERE id = {b}",
    "swap": "UPDATE doc x JOIN doc y ON x.id = {a} + {b} - y.id SET x.file = y.file WHERE x.id IN ({a}, {b})",
    "columns": "UPDATE doc SET file = other, other = NULL WHERE id = {a}",
    "copied within": "UPDATE doc SET other = file WHERE id = {a}",
    "both": "UPDATE doc d JOIN parent p ON p.id = d.id SET d.other = p.file, p.file = d.file WHERE d.id IN ({a}, {b})",
    "parents": "INSERT IGNORE INTO parent SELECT {a}, file FROM doc WHERE id = {b}",
    "children": "INSERT IGNORE INTO child SELECT {a}, {b}, file FROM doc WHERE id = {b}",
    "grandchildren": "INSERT IGNORE INTO grandchild SELECT {a}, {b}, file FROM child WHERE id = {b}",
    "cascade": "DELETE FROM parent WHERE id IN ({a}, {b})",
    "cascade of a replacement": "REPLACE INTO parent SELECT {a}, file FROM doc WHERE id = {b}",
    "two tables": "DELETE d, p FROM doc d JOIN parent p ON p.id = d.id WHERE d.id = {a}",
    "parts": "INSERT INTO part SELECT id, 1 + id % 2, file FROM doc WHERE id = {a}",
    "part": "DELETE FROM part WHERE id = {a}",
    "picture": "INSERT INTO doc (id, file) SELECT {a}, file FROM picture p WHERE id = {b} ON DUPLICATE KEY UPDATE file = p.file",
    "pictures": "INSERT IGNORE INTO picture SELECT {a}, file FROM doc WHERE id = {b}",
    "no picture": "DELETE FROM picture WHERE id IN ({a}, {b})",
    "no variants": "UPDATE doc SET file = JSON_REMOVE(file, '$.variants') WHERE id = {a}",
}


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """MariaDB."""
    async with new_database(request, "mariadb") as found:
        yield found


class TrafficOnMariaDB(Traffic):
    """The same with the SQL of MariaDB."""

    columns = [*COLUMNS, ("picture", "file")]

    async def write_sql(self, engine: AsyncEngine) -> None:
        while True:
            level = self.random.choice(["READ COMMITTED", "REPEATABLE READ", "REPEATABLE READ"])
            what = self.random.choice([*ONE_STATEMENT, "undo", "undo", "move"])
            with self.refusals():
                async with engine.connect() as connection:
                    await connection.execution_options(isolation_level=level)
                    await connection.execute(text("SET innodb_lock_wait_timeout = 1"))
                    await self.statements(connection, what, level)
                    if self.random.random() < 0.3:
                        await self.statements(connection, self.random.choice([*ONE_STATEMENT]), level)
                    await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.05]))
                    await (connection.commit() if self.random.random() < 0.9 else connection.rollback())
                self.done[what] += 1

    async def statements(self, connection: AsyncConnection, what: str, level: str) -> None:
        a, b = self.pick(), self.pick()
        match what:
            case "undo" if self.seen:
                value = json.dumps(self.random.choice(self.seen).to_dict())
                insert = "INSERT INTO doc (id, file) VALUES (:a, :value) ON DUPLICATE KEY UPDATE file = VALUES(file)"
                await connection.execute(text(insert), {"a": a, "value": value})
            case "move":
                row = (await connection.execute(text("SELECT file FROM doc WHERE id = :a"), {"a": a})).first()
                if row is not None and row[0] is not None:
                    await connection.execute(text("UPDATE doc SET file = NULL WHERE id = :a"), {"a": a})
                    moved = text("UPDATE doc SET other = :value WHERE id = :b")
                    await connection.execute(moved, {"value": row[0], "b": b})
            case _ if what in ONE_STATEMENT:
                await connection.execute(text(ONE_STATEMENT[what].format(a=a, b=b)))
            case _:
                pass

    async def write_sessions(self) -> None:
        while True:
            what = self.random.choice(["put", "put", "replace", "swap by session", "delete by session", "restore", "tree"])
            level = self.random.choice(["READ COMMITTED", "REPEATABLE READ", "REPEATABLE READ"])
            with self.refusals():
                async with self.env.sessions() as session:
                    connection = await session.connection(execution_options={"isolation_level": level})
                    await connection.execute(text("SET innodb_lock_wait_timeout = 2"))
                    doc, other = await session.get(Doc, self.pick()), await session.get(Doc, self.pick())
                    parent, child = await session.get(Parent, self.pick()), await session.get(Child, self.pick())
                    match what:
                        case "put":
                            session.add(self.random.choice([Parent, Picture])(id=self.pick(), file=file("a")))
                        case "replace" if doc is not None:
                            doc.file = file("b")
                        case "swap by session" if doc is not None and other is not None:
                            doc.file, other.other = other.other, doc.file
                        case "delete by session" if doc is not None:
                            await session.delete(doc)
                        case "tree" if child is not None:
                            session.add(Grandchild(id=self.pick(), child_id=child.id, file=file("g")))
                        case "tree" if parent is not None:
                            session.add(Child(id=self.pick(), parent_id=parent.id, file=file("c")))
                        case "restore" if self.seen:
                            session.add(Doc(id=self.pick(), file=Attachment.restore(self.random.choice(self.seen))))
                        case _:
                            session.add(Doc(id=self.pick(), file=file("c"), other=file("o")))
                    await session.flush()
                    await asyncio.sleep(self.random.choice([0, 0.01, 0.05]))
                    await (session.commit() if self.random.random() < 0.9 else session.rollback())
                self.done[what] += 1

    @contextlib.contextmanager
    def refusals(self) -> Any:
        try:
            yield
        except (StaleAttachmentError, StaleDataError):
            self.done["stale"] += 1
        except DBAPIError as error:
            if code_of(error) not in EXPECTED:
                raise
            self.done[str(code_of(error))] += 1

    async def look(self) -> None:
        """See again and again that every object is there, in one snapshot after which no object is deleted that it refers to."""
        until = asyncio.get_running_loop().time() + SECONDS
        while asyncio.get_running_loop().time() < until or self.done["deleted"] < 10 or self.done["1452"] < 3:
            with self.refusals():
                async with self.env.engine.connect() as connection:
                    await connection.exec_driver_sql("SET innodb_lock_wait_timeout = 2, lock_wait_timeout = 5")
                    try:
                        await connection.exec_driver_sql("FLUSH TABLES picture, " + ", ".join(TABLES) + " WITH READ LOCK")
                        refs = await self.refs(connection)
                        objects = await self.env.objects()
                    finally:
                        await connection.exec_driver_sql("UNLOCK TABLES")
                    assert locations(*refs) <= objects, (self.done, locations(*refs) - objects)
                self.seen = (self.seen + refs)[-20:]
                self.done["looks"] += 1
            await asyncio.sleep(0.05)


@pytest.mark.case("RA-13")
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # of rows that another session has deleted first
async def test_any_writer(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with environment(database) as env:
        other = create_async_engine(database.url)
        traffic = TrafficOnMariaDB(env, other)
        slow_down(monkeypatch, traffic)
        writers = [traffic.write_sql(env.engine), traffic.write_sql(other), traffic.write_sql(other), traffic.write_sessions()]
        workers = [traffic.recover() for _ in range(3)]
        tasks = [asyncio.ensure_future(work) for work in (*writers, *workers, traffic.look())]
        try:
            done, _ = await asyncio.wait(tasks, timeout=SECONDS + 120, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await other.dispose()
        for task in done:
            task.result()
        assert done == {tasks[-1]}, traffic.done
        await env.recover()
        async with env.engine.connect() as connection:
            assert locations(*await traffic.refs(connection)) == await env.objects(), traffic.done
