"""Other programs that write into SQLite at random and are killed, sessions and workers beside them: no object is lost or left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm.exc import StaleDataError

from granite_storage import StoredObjectRef
from granite_storage.exceptions import BackendUnavailableError, StaleAttachmentError
from granite_storage.orm import Attachment
from tests.orm.conftest import new_database
from tests.orm.environment import OrmEnvironment, file, orm_environment
from tests.orm.journal.guarded import locations
from tests.orm.journal.sqlite_writer import COLUMNS, EXPECTED, ROWS, Writer
from tests.orm.journal.test_random_writers import slow_down
from tests.orm.journal.test_recovery import expire, journal_of
from tests.orm.journal.test_sqlite_triggers import Base, Doc, Parent, Word

SECONDS = float(os.environ.get("GRANITE_STRESS_SECONDS", "2"))
SEED = os.environ.get("GRANITE_STRESS_SEED", "7")
WRITER = Path(__file__).with_name("sqlite_writer.py")


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    async with new_database(request, "sqlite-journal") as found:
        yield found


class Traffic:
    """Writers, workers and the one that looks."""

    def __init__(self, env: OrmEnvironment) -> None:
        self.env = env
        self.path = str(env.database.url.database)
        self.random = Random(SEED)
        self.seen: list[StoredObjectRef] = []
        self.done = Counter[str]()
        self.is_over = False

    def pick(self) -> int:
        return self.random.randint(1, ROWS)

    async def run_program(self) -> None:
        """Start a program that writes, and kill it at any moment, again and again."""
        while not self.is_over:
            seed = str(self.random.random())
            process = await asyncio.create_subprocess_exec(sys.executable, "-S", str(WRITER), self.path, seed)
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), self.random.uniform(0.5, 2))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                assert await process.wait() == -signal.SIGKILL
            self.done["kills"] += 1

    async def write_in_thread(self) -> None:
        """Write as such a program does, but for the kills and the time that it takes to start one."""
        writer = Writer(self.path, str(self.random.random()))
        while not self.is_over:
            await asyncio.to_thread(writer.write)
            self.done["transactions"] += 1
            await asyncio.sleep(0.002)
        writer.close()

    async def write_sessions(self) -> None:
        """Store, replace, move, delete and restore files as an application does."""
        while not self.is_over:
            what = self.random.choice(["put", "put", "replace", "replace", "swap", "delete", "restore"])
            with self.refusals():
                async with self.env.sessions() as session:
                    doc, other = await session.get(Doc, self.pick()), await session.get(Doc, self.pick())
                    match what:
                        case "put":
                            kind, key = self.random.choice([(Parent, self.pick()), (Word, chr(64 + self.pick()))])
                            row = await session.get(kind, key) or kind(id=key)
                            row.file = file("a")
                            session.add(row)
                        case "replace" if doc is not None:
                            doc.file = file("b")
                        case "swap" if doc is not None and other is not None:
                            doc.file, other.other = other.other, doc.file
                        case "delete" if doc is not None:
                            await session.delete(doc)
                        case "restore" if self.seen:
                            session.add(Doc(id=self.pick(), file=Attachment.restore(self.random.choice(self.seen))))
                        case _ if doc is None:
                            session.add(Doc(id=self.pick(), file=file("c")))
                        case _:
                            doc.other = file("c")
                    await session.flush()
                    await (session.commit() if self.random.random() < 0.9 else session.rollback())
                self.done[what] += 1
            await asyncio.sleep(self.random.choice([0, 0.01, 0.03]))

    @contextlib.contextmanager
    def refusals(self) -> Any:
        """Count what the database or the library refuses, which anyone would try again; raise all else."""
        try:
            yield
        except (StaleAttachmentError, StaleDataError, BackendUnavailableError) as error:
            self.done[type(error).__name__] += 1
        except (IntegrityError, OperationalError) as error:
            [found] = [text for text in EXPECTED if text in str(error)]
            self.done[found] += 1

    async def recover(self) -> None:
        while not self.is_over:
            with self.refusals():
                report = await journal_of(self.env).recover()
                self.done["deleted"] += report.deleted
                self.done["kept"] += report.kept
            await asyncio.sleep(0.02)

    async def look(self) -> None:
        """See again and again, while nobody can write, that every object is there; note the refs for undos."""
        until = asyncio.get_running_loop().time() + SECONDS
        while not self.is_over and (
            asyncio.get_running_loop().time() < until or self.done["deleted"] < 5 or self.done["kept"] < 5
        ):
            connection = await asyncio.to_thread(self.lock)
            try:
                refs = await asyncio.to_thread(self.refs, connection)
                objects = await self.env.objects()
            finally:
                await asyncio.to_thread(connection.close)
            assert locations(*refs) <= objects, (self.done, locations(*refs) - objects)
            self.seen = (self.seen + refs)[-20:]
            self.done["looks"] += 1
            await asyncio.sleep(0.05)

    def lock(self) -> sqlite3.Connection:
        """Return a connection that keeps all others from writing."""
        connection = sqlite3.connect(self.path, timeout=20, isolation_level=None, check_same_thread=False)
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def refs(self, connection: sqlite3.Connection) -> list[StoredObjectRef]:
        """Return what the rows refer to; no `Attachment` is made of it."""
        found: list[StoredObjectRef] = []
        for table, column in COLUMNS:
            rows = connection.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")  # noqa: S608
            found += [StoredObjectRef.from_dict(json.loads(value)) for (value,) in rows]
        return found


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # of rows that another program has deleted first
async def test_any_writer(database: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with orm_environment(database, journaled=True, base=Base) as env:
        traffic = Traffic(env)
        # After that time nothing but the rows, and what triggers have nominated, knows of an object; of the first ones at once.
        journal_of(env)._lease = timedelta(seconds=1)
        for number in range(1, ROWS + 1):
            await env.add(Parent(id=number, file=file("a")), Word(id=chr(64 + number), file=file("a")))
        await expire(env)
        await env.recover()
        slow_down(monkeypatch, traffic)
        others = [traffic.run_program(), traffic.write_sessions(), traffic.write_in_thread(), traffic.write_in_thread()]
        tasks = [asyncio.ensure_future(work) for work in (*others, traffic.recover(), traffic.recover(), traffic.look())]
        try:
            done, _ = await asyncio.wait(tasks, timeout=SECONDS + 60, return_when=asyncio.FIRST_COMPLETED)
        finally:
            traffic.is_over = True  # what has a lock in a thread cannot be cancelled
            await asyncio.gather(*tasks)
        assert done == {tasks[-1]}, traffic.done
        await env.recover()
        connection = await asyncio.to_thread(traffic.lock)
        refs = await asyncio.to_thread(traffic.refs, connection)
        await asyncio.to_thread(connection.close)
        assert locations(*refs) == await env.objects(), traffic.done
        assert traffic.done["kills"] >= 1, traffic.done
