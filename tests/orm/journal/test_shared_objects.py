"""Objects that several rows share, which SQL can bring about: one delete intent for each, whichever row nominates it."""

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
from sqlalchemy import Table, event, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from granite_storage import StoredObjectRef
from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.orm import Attachment, StorageJournal, bind_storage
from granite_storage.orm.journal.deletes import delete_id
from granite_storage.orm.journal.intents import new_id
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.tables import DELETE, UPLOAD, clock
from tests.faults.crash.workload import EXPECTED
from tests.orm.clones import COPIES, bound_beside, cloned, cloned_as, copy_id
from tests.orm.environment import Base, Doc, OrmEnvironment, file
from tests.orm.journal.sharing import copy_by_sql, delete, shared, steps_are_watched, worker
from tests.orm.journal.test_recovery import expire, journal_of, retention, rows
from tests.orm.journal.variants import expire as expire_unlocked

SECONDS = float(os.environ.get("GRANITE_STRESS_SECONDS", "2"))
ENOUGH = {"restore": 3, "delete": 10, "look": 3, "deleted": 3, "kept": 3, "overtaken": 2}
SEED = os.environ.get("GRANITE_STRESS_SEED", "13")


@pytest.fixture(scope="session", params=["asyncpg", "mariadb"])
def database(request: pytest.FixtureRequest) -> Any:
    """PostgreSQL and MariaDB: drivers make no difference here."""
    return request.getfixturevalue(f"{request.param}_database")


async def write_old_intent(env: OrmEnvironment, ref: StoredObjectRef, *, fenced: bool = False, due: float = -1.0) -> None:
    """Write a delete intent down as earlier versions did, with an id of its own."""
    tables = journal_of(env).tables
    row: dict[str, Any] = {"id": new_id(), "kind": DELETE, "backend": ref.backend, "location": ref.location, "due": clock(due)}
    table: Table = tables.intent
    if fenced:
        table, row = tables.reclaim, {**row, "attempts": 0, "takeovers": 1, "emptied": False, "dead": False}
    async with env.engine.begin() as connection:
        await connection.execute(insert(table).values([row]))


@pytest.mark.case("RA-13")
class TestOneIntent:
    async def test_rows_that_share_an_object_nominate_it_once(self, env: OrmEnvironment) -> None:
        ref = await shared(env, 2, 3)
        for number, days in ((1, 1), (2, 7), (3, 0)):
            with retention(timedelta(days=days)):
                await delete(env, number)
        [intent] = await rows(env, "intent")
        assert intent.id == delete_id(ref.backend, ref.location)
        async with env.engine.connect() as connection:
            left = (await connection.execute(select(clock(6 * 86400).label("then")))).scalar_one()
        assert intent.due.replace(tzinfo=None) > left.replace(tzinfo=None), "the longest retention counts"
        assert await env.manager.exists(ref)
        await env.recover()

    async def test_one_statement_that_deletes_them_all(self, env: OrmEnvironment) -> None:
        await shared(env, 2, 3)
        async with env.sessions.begin() as session:
            await session.execute(Doc.__table__.delete())
        assert len(await rows(env, "intent")) == 1
        assert (await journal_of(env).recover()).deleted == 1
        assert await env.objects() == set()

    async def test_it_waits_while_an_earlier_one_is_fenced(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        ref = await shared(env, 2, 3)
        await delete(env, 1)
        with steps_are_watched(monkeypatch):
            async with worker(env, "_let_go"):
                await delete(env, 2)
                report = await journal_of(env).recover()
                assert (report.claimed, report.waiting) == (0, 1)
        report = await journal_of(env).recover()
        assert (report.claimed, report.kept) == (1, 1)
        assert await env.manager.exists(ref)
        await delete(env, 3)

    async def test_an_undo_is_refused_while_the_object_is_deleted(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = await shared(env, 2)
        await delete(env, 1)
        with steps_are_watched(monkeypatch):
            async with worker(env, "_check"):
                await delete(env, 2)
                with pytest.raises(StaleAttachmentError, match="is being deleted"):
                    await env.add(Doc(id=3, file=Attachment.restore(ref)))
        assert await rows(env, "intent") == []
        assert await env.objects() == set()

    async def test_a_locked_newer_intent_holds_up_nothing_else(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The fenced row stays until the other transaction has ended, and no worker waits for that."""
        await shared(env, 2)
        await env.add(Doc(id=4, file=file("b")))
        intent = journal_of(env).tables.intent
        for number in (1, 4):
            await delete(env, number)
        with steps_are_watched(monkeypatch):
            async with contextlib.AsyncExitStack() as stack:
                working = await stack.enter_async_context(worker(env, "_check"))
                await delete(env, 2)
                async with env.engine.begin() as connection:
                    await connection.execute(select(intent).with_for_update())
                    async with asyncio.timeout(20):
                        await working.finish()
                    assert await env.objects() == set()
                    [fenced] = await rows(env, "reclaim")
                    assert (fenced.attempts, fenced.takeovers, fenced.dead) == (0, 0, False)
        await expire(env)
        await journal_of(env).recover()
        assert [await rows(env, name) for name in ("intent", "reclaim")] == [[], []]

    async def test_an_upload_that_sql_gave_to_a_row(self, env: OrmEnvironment) -> None:
        """No session has consumed its intent, which must not outlive the object: it would say that the bytes are there."""
        stored = await Attachment(b"a").store(Doc.file)
        value = json.dumps(stored.ref.to_dict()).replace(":", r"\:")
        await env.sql(f"INSERT INTO doc (id, title, file) VALUES (1, '', '{value}')")  # noqa: S608
        await delete(env, 1)
        assert sorted(row.kind for row in await rows(env, "intent")) == [DELETE, UPLOAD]
        assert (await journal_of(env).recover()).deleted == 1
        assert await rows(env, "intent") == []


def become_worker_role(connection: Any, _: Any) -> None:
    connection.cursor().execute("SET ROLE worker_role")
    connection.commit()


@contextlib.asynccontextmanager
async def worked_by_another_role(env: OrmEnvironment) -> AsyncIterator[StorageJournal]:
    """Bind a journal whose engine has a role that may use the tables of the models, and no others."""
    for statement in ("CREATE ROLE worker_role", "GRANT ALL ON ALL TABLES IN SCHEMA public TO worker_role"):
        await env.sql(statement)
    engine = env.database.engine()
    event.listen(engine.sync_engine, "connect", become_worker_role)
    env.binding.unbind()
    binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=StorageJournal(engine))
    assert binding.journal is not None
    try:
        yield binding.journal
    finally:
        binding.unbind()
        await engine.dispose()
        env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=env.journal)
        for statement in ("DROP OWNED BY worker_role", "DROP ROLE worker_role"):
            await env.sql(statement)


async def require_refusal(journal: StorageJournal, message: str) -> None:
    """Let a journal recover, and refuse to."""
    with pytest.raises(ConfigurationError) as caught:
        await journal.recover()
    assert message in str(caught.value)


@pytest.mark.case("RE-03")
class TestElsewhere:
    """The worker asks tables that no session of the journal's has used: those of other schemas, and of other bases."""

    async def test_clone_in_a_schema_that_is_not_known(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with cloned(env) as schema:
            await delete(env, 1)
            report = await journal_of(env).recover()
            assert (report.deleted, report.kept) == (0, 1)
            (left,) = await env.objects()
            await env.sql(f"DELETE FROM {schema}.doc")  # noqa: S608
        await env.backend.delete(left)

    async def test_clone_that_is_dropped_again(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with cloned(env):
            pass
        await delete(env, 1)
        assert (await journal_of(env).recover()).deleted == 1

    async def test_clone_that_may_not_be_read(self, env: OrmEnvironment) -> None:
        """Nothing is deleted, and nothing forgotten, before that is put right."""
        if not env.database.is_postgres:
            return  # MariaDB shows a role nothing that it may not read
        await shared(env)
        async with worked_by_another_role(env) as journal:
            async with cloned(env) as schema:
                await delete(env, 1)
                await require_refusal(journal, f"{schema}.doc")
                assert len(await env.objects()) == 1
            await expire(env)
            assert (await journal.recover()).deleted == 1

    @pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
    @pytest.mark.parametrize("table", ["doc", "clone"])
    async def test_table_whose_rows_may_be_hidden(self, env: OrmEnvironment, table: str) -> None:
        await shared(env, 2)
        async with worked_by_another_role(env) as journal, cloned(env) as schema:
            await env.sql(f"DELETE FROM {schema}.doc")  # noqa: S608
            await env.sql(f"GRANT USAGE ON SCHEMA {schema} TO worker_role")
            await env.sql(f"GRANT SELECT ON {schema}.doc TO worker_role")
            hidden = "public.doc" if table == "doc" else f"{schema}.doc"
            await env.sql(f"ALTER TABLE {hidden} ENABLE ROW LEVEL SECURITY")
            try:
                await delete(env, 1)
                await require_refusal(journal, f"row-level security may hide rows of {hidden} from the journal's role")
                assert len(await env.objects()) == 1
            finally:
                await env.sql(f"ALTER TABLE {hidden} DISABLE ROW LEVEL SECURITY")
            await expire(env)
            assert (await journal.recover()).kept == 1
            await delete(env, 2)
            assert (await journal.recover()).deleted == 1

    @pytest.mark.parametrize(("database", "kind", "value"), COPIES, indirect=["database"], ids=map(copy_id, COPIES))
    async def test_clone_with_a_column_of_another_type(self, env: OrmEnvironment, kind: str, value: str) -> None:
        await shared(env)
        await env.add(Doc(id=2, file=file("b")))
        async with cloned_as(env, kind, value) as schema:
            await env.sql(f"DELETE FROM {schema}.doc WHERE id = 2")  # noqa: S608
            for number in (1, 2):
                await delete(env, number)
            report = await journal_of(env).recover()
            assert (report.deleted, report.kept) == (1, 1)
            (left,) = await env.objects()
        await env.backend.delete(left)

    @pytest.mark.parametrize("manager", ["same", "another"])
    @pytest.mark.parametrize("journal", ["none", "own"])
    async def test_row_of_another_base(self, env: OrmEnvironment, journal: str, manager: str) -> None:
        await shared(env)
        async with bound_beside(env, is_same_manager=manager == "same", is_journaled=journal == "own"):
            await env.sql("INSERT INTO paper (id, file) SELECT id, file FROM doc")
            await delete(env, 1)
            report = await journal_of(env).recover()
            assert (report.deleted, report.kept) == (0, 1)
            (left,) = await env.objects()
        await env.backend.delete(left)


@pytest.mark.case("RA-13")
class TestIntentsOfEarlierVersions:
    async def test_they_are_worked_off(self, env: OrmEnvironment) -> None:
        refs = []
        for number in (1, 2, 3):
            doc = Doc(id=number, file=file("a"))
            await env.add(doc)
            assert doc.file is not None
            refs.append(doc.file.ref)
        await env.sql("UPDATE doc SET file = NULL WHERE id < 3")
        await write_old_intent(env, refs[0])
        await write_old_intent(env, refs[1], fenced=True)
        await write_old_intent(env, refs[2])
        report = await journal_of(env).recover()
        assert (report.claimed, report.deleted, report.kept) == (3, 2, 1)
        assert await env.objects() == {refs[2].location}
        assert [await rows(env, name) for name in ("intent", "reclaim")] == [[], []]

    async def test_many(self, env: OrmEnvironment) -> None:
        """More than a worker takes over at a time."""
        ref = StoredObjectRef.from_dict({**(await shared(env)).to_dict()})
        intent = journal_of(env).tables.intent
        old = [
            {"id": new_id(), "kind": DELETE, "backend": "store", "location": f"{ref.location}-{number}", "due": clock(-1.0)}
            for number in range(230)
        ]
        async with env.engine.begin() as connection:
            await connection.execute(insert(intent).values(old))
        assert (await journal_of(env).recover()).deleted == 230

    async def test_an_undo_consumes_all_of_them(self, env: OrmEnvironment) -> None:
        ref = await shared(env)
        await env.sql("UPDATE doc SET file = NULL")
        for _ in range(2):
            await write_old_intent(env, ref, due=3600)
        async with env.sessions.begin() as session:
            session.add(Doc(id=2, file=Attachment.restore(ref)))
            await session.flush()
            await expire_unlocked(env)
            assert (await journal_of(env).recover()).claimed == 0
        assert await rows(env, "intent") == []
        await env.check(file_2="a")

    async def test_one_that_is_written_during_an_undo_waits_for_it(self, env: OrmEnvironment) -> None:
        """A process of the earlier version deletes the second row while the undo of the first one's delete is open."""
        ref = await shared(env, 2)
        with retention(timedelta(hours=1)):
            await delete(env, 1)
        async with env.sessions.begin() as session:
            session.add(Doc(id=3, file=Attachment.restore(ref)))
            await session.flush()
            await env.sql("DELETE FROM doc WHERE id = 2")
            await write_old_intent(env, ref)
            assert (await journal_of(env).recover()).claimed == 0
        assert (await journal_of(env).recover()).kept == 1
        await env.check(file_3="a")


class Traffic:
    """Files that rows come to share, are deleted, moved and restored at the same time, while workers overtake each other."""

    def __init__(self, env: OrmEnvironment, seed: str) -> None:
        self.env = env
        self.random = Random(seed)
        self.done = Counter[str]()
        self._numbers = iter(range(1, 1_000_000))

    async def share(self) -> None:
        """Let rows share a file again and again; each of them gives it up some time, and some other rows want it back."""
        while True:
            first = Doc(id=next(self._numbers), file=file("a"))
            await self.env.add(first)
            assert first.file is not None
            ref, numbers = first.file.ref, [first.id, next(self._numbers)]
            await copy_by_sql(self.env, *numbers)
            await asyncio.gather(*(self.delete(number) for number in numbers), *(self.restore(ref) for _ in range(3)))

    async def delete(self, number: int) -> None:
        await asyncio.sleep(self.random.uniform(0, 0.1))
        async with self.session("delete") as session:
            doc = await session.get_one(Doc, number)
            if self.random.random() < 0.2:
                doc.other, doc.file = doc.file, None
                await session.flush()
            await session.delete(doc)

    async def restore(self, ref: StoredObjectRef) -> None:
        """Let a row take the file back; then it has its bytes as long as it holds it. Then it gives it up as well."""
        await asyncio.sleep(self.random.uniform(0, 0.25))
        number = next(self._numbers)
        async with self.session("restore") as session:
            session.add(Doc(id=number, file=Attachment.restore(ref)))
        async with self.session("look") as session:
            if await session.get(Doc, number, with_for_update=True) is None:
                return
            assert await self.env.manager.exists(ref), f"row {number} is without its bytes"
        await self.delete(number)

    async def recover(self) -> None:
        while True:
            report = await journal_of(self.env).recover()
            self.done["deleted"] += report.deleted
            self.done["kept"] += report.kept
            await asyncio.sleep(0)

    async def wait_for_enough(self) -> None:
        """Return when a time is over, and all that matters has happened often enough."""
        await asyncio.sleep(SECONDS)
        while any(self.done[what] < count for what, count in ENOUGH.items()):  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def session(self, what: str) -> AsyncIterator[AsyncSession]:
        """Give a session, and commit or roll back some time later; what the databases refuse is done again by none."""
        with contextlib.suppress(*EXPECTED):
            async with self.env.sessions() as session:
                yield session
                await session.flush()
                await asyncio.sleep(self.random.choice([0, 0.02, 0.1]))
                await (session.commit() if self.random.random() < 0.9 else session.rollback())
                self.done[what] += 1


@pytest.mark.case("RA-13")
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # of rows that another session has deleted first
async def test_random_traffic_on_shared_objects(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """No committed row is ever without its bytes, and nothing is left behind."""
    traffic = Traffic(env, SEED)
    slow_down(monkeypatch, traffic)
    work = [*[traffic.share] * 4, *[traffic.recover] * 3, traffic.wait_for_enough]
    tasks = [asyncio.create_task(function()) for function in work]
    done, _ = await asyncio.wait(tasks, timeout=SECONDS + 120, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done, traffic.done
    for task in done:
        task.result()
    await env.recover()
    referenced = {ref.location for ref in (await env.references()).values()}
    assert referenced == await env.objects()
    await env.sql("UPDATE doc SET other = NULL, file = NULL")
    for location in referenced:
        await env.backend.delete(location)


def slow_down(patch: pytest.MonkeyPatch, traffic: Traffic) -> None:
    """Let workers be overtaken at once, and take their time between any two steps; count those that were."""
    patch.setattr(StorageJournal, "retention_of", lambda *_: timedelta(milliseconds=traffic.random.choice([0, 0, 100])))
    original = Recovery.__init__

    def init(self: Recovery, *args: Any, **options: Any) -> None:
        original(self, *args, **{**options, "max_attempts": 1_000_000})
        self._hold = 0.03

    patch.setattr(Recovery, "__init__", init)
    for name in ("_check", "_remove", "_let_go", "_conclude"):
        patch.setattr(Recovery, name, slowed(getattr(Recovery, name), name, traffic))


def slowed(step: Any, name: str, traffic: Traffic) -> Any:
    async def slow(self: Recovery, items: Any, *args: Any) -> Any:
        if items:
            await asyncio.sleep(traffic.random.choice([0, 0, 0, 0.06]))
        result = await step(self, items, *args)
        if name == "_check":
            traffic.done["overtaken"] += len(items) - len(result[0])
        return result

    return slow
