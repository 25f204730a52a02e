"""Random SQL that bypasses the sessions, sessions beside it, and workers: the objects are those that rows refer to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.orm.exc import StaleDataError

from granite_storage import StoredObjectRef
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment, StorageJournal
from granite_storage.orm.journal.recovery import Recovery
from tests.orm.conftest import new_database
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import Doc, Parent, Part, code_of, environment, locations
from tests.orm.journal.test_recovery import journal_of

SECONDS = float(os.environ.get("GRANITE_STRESS_SECONDS", "2"))
SEED = os.environ.get("GRANITE_STRESS_SEED", "7")
ROWS = 5
_REMEMBERED = 60
"""How many refs undos choose from, most of which are gone."""
EXPECTED = {"23503", "23505", "25P02", "40001", "40P01"}
TABLES = ("doc", "parent", "child", "grandchild", "part")
COLUMNS = [*((table, "file") for table in TABLES), ("doc", "other")]

ONE_STATEMENT = {
    "delete": "DELETE FROM doc WHERE id IN ({a}, {b})",
    "wipe": "UPDATE doc SET file = NULL WHERE id = {a}",
    "copy": "INSERT INTO doc (id, file) SELECT {a}, file FROM doc WHERE id = {b}"
    " ON CONFLICT (id) DO UPDATE SET file = excluded.file",
    "swap": "UPDATE doc SET file = (SELECT d.file FROM doc d WHERE d.id = {a} + {b} - doc.id) WHERE id IN ({a}, {b})",
    "columns": "UPDATE doc SET file = other, other = file WHERE id = {a}",
    "merge": "MERGE INTO doc USING (SELECT id, file FROM parent) p ON doc.id = p.id WHEN MATCHED AND doc.id = {a} THEN DELETE"
    " WHEN MATCHED THEN UPDATE SET other = p.file WHEN NOT MATCHED THEN INSERT (id, file) VALUES (p.id, p.file)",
    "moved": "WITH d AS (DELETE FROM doc WHERE id = {a} RETURNING id, file) INSERT INTO parent SELECT id, file FROM d",
    "children": "INSERT INTO child SELECT {a}, {b}, file FROM doc WHERE id = {b} ON CONFLICT DO NOTHING",
    "grandchildren": "INSERT INTO grandchild SELECT {a}, {b}, file FROM child WHERE id = {b} ON CONFLICT DO NOTHING",
    "cascade": "DELETE FROM parent WHERE id IN ({a}, {b})",
    "parts": "INSERT INTO part SELECT id, 1 + id % 2, file FROM doc WHERE id = {a}",
    "partition": "UPDATE part SET kind = 3 - kind WHERE id = {a}",
    "changed": "UPDATE part SET kind = 3 - kind, file = (SELECT file FROM doc WHERE id = {b}) WHERE id = {a}",
    "direct": "DELETE FROM part_1 WHERE id = {a}",
}


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """PostgreSQL: sessions and some of the SQL through asyncpg, the rest through psycopg."""
    async with new_database(request, "asyncpg") as found:
        yield found


class Traffic:
    """Writers, workers and the one that looks."""

    columns = COLUMNS

    def __init__(self, env: OrmEnvironment, other: AsyncEngine) -> None:
        self.env, self.other = env, other
        self.random = Random(SEED)
        self.seen: list[StoredObjectRef] = []
        self.done = Counter[str]()

    def pick(self) -> int:
        return self.random.randint(1, ROWS)

    async def write_sql(self, engine: AsyncEngine) -> None:
        """Run SQL past every session, at any isolation level, in transactions of several statements."""
        while True:
            level = self.random.choice(["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
            what = self.random.choice([*ONE_STATEMENT, "undo", "undo", "move", "COPY", "truncate"])
            with self.refusals():
                async with engine.connect() as connection:
                    await connection.execution_options(isolation_level=level)
                    await self.perhaps_in_savepoints(connection, what, level)
                    if self.random.random() < 0.3:
                        await self.perhaps_in_savepoints(connection, self.random.choice([*ONE_STATEMENT]), level)
                    await asyncio.sleep(self.random.choice([0, 0, 0.01, 0.05]))
                    await (connection.commit() if self.random.random() < 0.9 else connection.rollback())
                self.done[what] += 1

    async def perhaps_in_savepoints(self, connection: AsyncConnection, what: str, level: str) -> None:
        """Run statements, in savepoints now and then, which may be rolled back and whose locks go with them."""
        for _ in range(self.random.choice([0, 0, 0, 1, 2])):
            await connection.begin_nested()
        await self.statements(connection, what, level)
        nested = connection.get_nested_transaction()
        if nested is not None:
            await (nested.rollback() if self.random.random() < 0.3 else nested.commit())

    async def statements(self, connection: AsyncConnection, what: str, level: str) -> None:
        a, b = self.pick(), self.pick()
        match what:
            case "undo" if self.seen:
                value = json.dumps(self.random.choice(self.seen).to_dict())
                insert = "INSERT INTO doc (id, file) VALUES (:a, CAST(:value AS jsonb)) ON CONFLICT (id) DO UPDATE"
                place = self.random.randint(1, 2 * ROWS)  # where there may be no row
                await connection.execute(text(f"{insert} SET file = excluded.file"), {"a": place, "value": value})
            case "move":
                row = (await connection.execute(text("SELECT CAST(file AS text) FROM doc WHERE id = :a"), {"a": a})).first()
                if row is not None and row[0] is not None:
                    await connection.execute(text("UPDATE doc SET file = NULL WHERE id = :a"), {"a": a})
                    moved = text("UPDATE doc SET other = CAST(:value AS jsonb) WHERE id = :b")
                    await connection.execute(moved, {"value": row[0], "b": b})
            case "COPY" if self.seen:
                driver: Any = (await connection.get_raw_connection()).driver_connection
                row = (a, json.dumps(self.random.choice(self.seen).to_dict()))
                if connection.dialect.driver == "asyncpg":
                    with contextlib.suppress(Exception):  # the driver's own errors, of a refusal and of a row that is there
                        await driver.copy_records_to_table("parent", records=[row], columns=["id", "file"])
            case "truncate" if level == "READ COMMITTED" and self.random.random() < 0.2:
                await connection.execute(text(self.random.choice(["TRUNCATE doc", "TRUNCATE part", "TRUNCATE parent CASCADE"])))
            case _ if what in ONE_STATEMENT:
                await connection.execute(text(ONE_STATEMENT[what].format(a=a, b=b)))
            case _:
                pass

    async def write_sessions(self) -> None:
        """Store, replace, move, delete and restore files as an application does."""
        while True:
            what = self.random.choice(["put", "put", "replace", "swap by session", "delete by session", "restore"])
            level = self.random.choice(["READ COMMITTED", "READ COMMITTED", "REPEATABLE READ"])
            with self.refusals():
                async with self.env.sessions() as session:
                    await session.connection(execution_options={"isolation_level": level})
                    doc, other = await session.get(Doc, self.pick()), await session.get(Doc, self.pick())
                    match what:
                        case "put":
                            kind = self.random.choice([Parent, Part])
                            row = kind(id=self.pick(), file=file("a"))
                            if isinstance(row, Part):
                                row.kind = 1
                            session.add(row)
                        case "replace" if doc is not None:
                            doc.file = file("b")
                        case "swap by session" if doc is not None and other is not None:
                            doc.file, other.other = other.other, doc.file
                        case "delete by session" if doc is not None:
                            await session.delete(doc)
                        case "restore" if self.seen:
                            session.add(Doc(id=self.pick(), file=Attachment.restore(self.random.choice(self.seen))))
                        case _:
                            session.add(Doc(id=self.pick(), file=file("c")))
                    await session.flush()
                    await asyncio.sleep(self.random.choice([0, 0.01, 0.05]))
                    await (session.commit() if self.random.random() < 0.9 else session.rollback())
                self.done[what] += 1

    @contextlib.contextmanager
    def refusals(self) -> Any:
        """Count what the database or the library refuses, which anyone would try again; raise all else."""
        try:
            yield
        except (StaleAttachmentError, StaleDataError):
            self.done["stale"] += 1
        except DBAPIError as error:
            if code_of(error) not in EXPECTED:
                raise
            self.done[str(code_of(error))] += 1

    async def recover(self) -> None:
        while True:
            report = await journal_of(self.env).recover()
            self.done["deleted"] += report.deleted
            self.done["kept"] += report.kept
            await asyncio.sleep(0)

    async def look(self) -> None:
        """See again and again, while nobody can write, that every object is there; note the refs for undos."""
        until = asyncio.get_running_loop().time() + SECONDS
        while asyncio.get_running_loop().time() < until or self.done["deleted"] < 10 or self.done["23503"] < 3:
            with self.refusals():
                async with self.env.engine.begin() as connection:
                    await connection.execute(text(f"LOCK TABLE {', '.join(TABLES)} IN SHARE MODE"))
                    refs = await self.refs(connection)
                    objects = await self.env.objects()
                    assert locations(*refs) <= objects, (self.done, locations(*refs) - objects)
                self.seen = (self.seen + refs)[-_REMEMBERED:]
                self.done["looks"] += 1
            await asyncio.sleep(0.05)

    async def refs(self, connection: AsyncConnection) -> list[StoredObjectRef]:
        """Return what the rows refer to; no `Attachment` is made of it."""
        found: list[StoredObjectRef] = []
        kind = "text" if connection.dialect.name == "postgresql" else "char"
        for table, column in self.columns:
            rows = await connection.execute(text(f"SELECT CAST({column} AS {kind}) FROM {table}"))  # noqa: S608
            found += [StoredObjectRef.from_dict(json.loads(value)) for value in rows.scalars() if value is not None]
        return found


@pytest.mark.case("RA-13")
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # of rows that another session has deleted first
async def test_any_writer(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with environment(database) as env:
        other = create_async_engine(database.url.set(drivername="postgresql+psycopg"))
        traffic = Traffic(env, other)
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


def slow_down(patch: pytest.MonkeyPatch, traffic: Traffic) -> None:
    """Let workers be overtaken at once, and take their time between any two steps."""
    patch.setattr(StorageJournal, "retention_of", lambda *_: timedelta(milliseconds=traffic.random.choice([0, 0, 100])))
    original = Recovery.__init__

    def init(self: Recovery, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "max_attempts": 1_000_000})
        self._hold = 0.03

    patch.setattr(Recovery, "__init__", init)
    for name in ("_check", "_remove", "_let_go", "_conclude"):
        patch.setattr(Recovery, name, slowed(getattr(Recovery, name), traffic))


def slowed(step: Any, traffic: Traffic) -> Any:
    async def slow(self: Recovery, items: Any, *args: Any) -> Any:
        if items:
            await asyncio.sleep(traffic.random.choice([0, 0, 0, 0.06]))
        return await step(self, items, *args)

    return slow
