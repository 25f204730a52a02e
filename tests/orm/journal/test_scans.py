"""What is held until a scanner has judged it: the worker's verdict reaches the rows that hold the object, and no others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, event, text, true, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import InfectedObjectError, ScanPendingError
from granite_storage.gc import StorageGarbageCollector
from granite_storage.migration import migrate
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, variants
from granite_storage.orm.journal import jobs as job_queue
from granite_storage.orm.journal import scans
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.scans import ScanJobs
from granite_storage.orm.journal.tables import RecoveryReport
from granite_storage.refs import require_scanned
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, Note, OrmEnvironment, file
from tests.orm.journal.scans import (
    ScriptedScanner,
    hold,
    jobs,
    journal_of,
    make_due,
    raw,
    scan_env,
    scan_part,
    status,
    stopped_while_scanning,
)
from tests.orm.journal.sharing import copy_by_sql
from tests.orm.journal.test_recovery import retention
from tests.orm.test_cancellation import Steps


@pytest.fixture
async def held(database: Database) -> AsyncIterator[tuple[OrmEnvironment, ScriptedScanner]]:
    """An environment whose scanner is down; checked afterwards, as every environment with a journal."""
    async with scan_env(database) as (env, scanner):
        yield env, scanner
        await env.check_recovery()


@pytest.fixture
def env(held: tuple[OrmEnvironment, ScriptedScanner]) -> OrmEnvironment:
    return held[0]


@pytest.fixture
def scanner(held: tuple[OrmEnvironment, ScriptedScanner]) -> ScriptedScanner:
    return held[1]


class TestVerdicts:
    async def test_clean(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        ref = (await env.references())["doc", 1, "file"]
        with pytest.raises(ScanPendingError):
            require_scanned(ref)
        [job] = await jobs(env)
        assert (job.table_name, job.column_name, job.location, job.key, job.recipe) == ("doc", "file", ref.location, "scan", "")
        before = json.loads(await raw(env))
        scanner.default = "clean"
        report = await journal_of(env).recover()
        assert (report.scanned, report.held, report.failed) == (1, 0, [])
        after = json.loads(await raw(env))
        assert (after["scan"]["status"], after["scan"]["by"]) == ("clean", "scripted 1.0")
        assert {**after, "scan": None} == {**before, "scan": None}
        require_scanned((await env.references())["doc", 1, "file"])
        assert await jobs(env) == []
        assert (await journal_of(env).recover()).scanned == 0

    async def test_infected(self, env: OrmEnvironment, scanner: ScriptedScanner, caplog: pytest.LogCaptureFixture) -> None:
        await hold(env)
        scanner.default = "infected"
        assert (await journal_of(env).recover()).scanned == 1
        part = await scan_part(env)
        assert part is not None
        assert (part["status"], part["signature"]) == ("infected", "Test.Virus")
        ref = (await env.references())["doc", 1, "file"]
        with pytest.raises(InfectedObjectError):
            require_scanned(ref)
        assert await env.manager.exists(ref), "whether it is deleted is the application's choice"
        assert "'Test.Virus'" in caplog.text
        assert await jobs(env) == []

    async def test_a_scanner_that_is_down_for_long(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """No job is abandoned: the pauses grow, and the verdict comes when the scanner does."""
        await hold(env)
        await hold(env, "b", 2)
        await hold(env, "c", 3)
        for attempts in (1, 2, 3):
            await make_due(env)
            report = await journal_of(env).recover()
            assert (report.scanned, report.held, report.failed) == (0, 3, [])
            assert max(job.attempts for job in await jobs(env)) >= attempts / 2
        assert any("nobody answers" in job.error for job in await jobs(env) if job.error)
        assert not any(job.dead for job in await jobs(env))
        assert sum(scanner.asked.values()) == 3 + 3 * 2, "a scanner that is down is not asked for each object that waits"
        scanner.default = "clean"
        assert (await journal_of(env).recover()).scanned <= 1, "a job waits for its next attempt"
        await make_due(env)
        await journal_of(env).recover()
        assert [await status(env, number) for number in (1, 2, 3)] == ["clean"] * 3

    async def test_an_old_job_has_its_next_attempt_within_the_hour(self, env: OrmEnvironment) -> None:
        await hold(env)
        async with env.engine.begin() as connection:
            await connection.execute(update(journal_of(env).tables.job).values(attempts=5000))
        await journal_of(env).recover()
        [job] = await jobs(env)
        assert job.attempts == 5001
        async with env.engine.begin() as connection:
            late = job.due + timedelta(0)
            now = (await connection.execute(text("SELECT CURRENT_TIMESTAMP"))).scalar_one()
        if env.database.is_postgres:
            assert timedelta(minutes=40) < late - now <= timedelta(hours=1)

    async def test_what_an_unused_policy_would_scan_stays_held(self, env: OrmEnvironment) -> None:
        """The application took the scanner away; the object is not served unscanned."""
        await hold(env)
        without = StorageManager(backends=env.manager.backends, policies={"docs": StoragePolicy("docs", "store")})
        journal = StorageJournal(env.engine.sync_engine if env.database.is_synchronous else env.engine)
        binding = bind_storage(Base, without, journal=journal)
        try:
            report = await journal.recover()
        finally:
            binding.unbind()
            await journal.aclose()
        assert (report.scanned, report.held) == (0, 1)
        [job] = await jobs(env)
        assert ("has no scanner" in job.error, job.attempts, job.takeovers) == (True, 0, 0), "another process may have one"
        assert await status(env) == "pending"


class TestRowsThatChange:
    """While the scan runs, no lock is held, and anything may happen to the row."""

    async def test_replaced(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await replaced_while_it_is_scanned(env, scanner)
        assert await status(env) == "pending", "the verdict is about another file"
        assert [job.location for job in await jobs(env)] == [(await env.references())["doc", 1, "file"].location]

    async def test_without_the_compare_and_set(
        self, env: OrmEnvironment, scanner: ScriptedScanner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To remember the row, and to write to whatever it holds when the verdict comes, is wrong."""
        seen: list[Any] = []
        find = References.find_holders

        async def remember(self: References, *args: Any) -> Any:
            seen[:] = seen or await find(self, *args)
            return seen

        monkeypatch.setattr(References, "find_holders", remember)
        monkeypatch.setattr(job_queue, "job_rows", lambda *_: true())
        monkeypatch.setattr(variants, "value_of", lambda raw, _: json.loads(raw))
        await replaced_while_it_is_scanned(env, scanner)
        assert await status(env) == "infected"

    async def test_deleted(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        async with stopped_while_scanning(env, scanner, b"a", "clean"), env.sessions.begin() as session:
            await session.execute(delete(Doc))
        assert await jobs(env) == []

    async def test_moved(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """The verdict follows the object."""
        await hold(env)
        await env.add(Doc(id=2))
        async with stopped_while_scanning(env, scanner, b"a", "infected"), env.sessions.begin() as session:
            first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
            second.other, first.file = first.file, None
        await journal_of(env).recover()
        assert (await env.references())["doc", 2, "other"].scan["status"] == "infected"  # type: ignore[index]
        assert await jobs(env) == []

    async def test_moved_while_the_verdict_is_written(
        self, env: OrmEnvironment, scanner: ScriptedScanner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row that is not found may be another one by now: its job stays, and the verdict is written with the next look."""
        await hold(env)
        scanner.default = "clean"
        looks, find = 0, References.find_holders

        async def miss_once(self: References, *args: Any) -> Any:
            nonlocal looks
            looks += 1
            return [] if looks == 2 else await find(self, *args)

        monkeypatch.setattr(References, "find_holders", miss_once)
        await journal_of(env).recover()
        assert (await status(env), await jobs(env)) == ("clean", [])

    async def test_another_backend(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """The same location elsewhere is another object."""
        await hold(env)
        there = (await raw(env)).replace('"store"', '"elsewhere"')
        here = await raw(env)
        async with stopped_while_scanning(env, scanner, b"a", "infected"):
            await set_raw(env, there)
        try:
            assert await status(env) == "pending"
        finally:
            await set_raw(env, here)

    async def test_another_part_of_the_value(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """The value is read under the lock, so what another job has just written stays."""
        await hold(env)
        scanner.default = "clean"
        changed = json.dumps({**json.loads(await raw(env)), "digests": {"sha1": 1}})
        async with env.engine.begin() as connection:
            await set_raw(env, changed, connection)
            working = asyncio.create_task(journal_of(env).recover())
            await asyncio.sleep(0.5)
            assert not working.done()
        await working
        value = json.loads(await raw(env))
        assert (value["scan"]["status"], value["digests"]) == ("clean", {"sha1": 1})

    async def test_a_transaction_that_takes_long(
        self, env: OrmEnvironment, scanner: ScriptedScanner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It does not keep the worker for ever."""
        monkeypatch.setattr(scans, "LONGEST_WAIT", 0.3)
        await hold(env)
        scanner.default = "clean"
        async with env.engine.begin() as connection:
            await connection.execute(text("SELECT id FROM doc WHERE id = 1 FOR UPDATE"))
            report = await journal_of(env).recover()
        assert (report.scanned, report.held) == (0, 1)
        assert "have locked its rows" in (await jobs(env))[0].error
        monkeypatch.undo()
        await make_due(env)
        assert (await journal_of(env).recover()).scanned == 1

    async def test_judged_meanwhile(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """A late verdict does not replace an earlier one."""
        await hold(env)
        async with stopped_while_scanning(env, scanner, b"a", "clean"):
            part = {"status": "infected", "by": "another", "at": "2026-01-01T00:00:00.000000+00:00"}
            await set_raw(env, json.dumps({**json.loads(await raw(env)), "scan": part}))
        assert (await scan_part(env)) == part

    async def test_rows_that_share_it(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        for number in (2, 3):
            await copy_by_sql(env, 1, number)
        scanner.default = "clean"
        await journal_of(env).recover()
        assert [await status(env, number) for number in (1, 2, 3)] == ["clean"] * 3
        async with env.sessions.begin() as session:
            for number in (2, 3):
                await session.delete(await session.get_one(Doc, number))


async def replaced_while_it_is_scanned(env: OrmEnvironment, scanner: ScriptedScanner) -> None:
    await hold(env)
    async with stopped_while_scanning(env, scanner, b"a", "infected"), env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = file("b")


async def set_raw(env: OrmEnvironment, value: str, connection: Any = None) -> None:
    """Write JSON past everybody."""
    kind = "jsonb" if env.database.is_postgres else "char"
    statement = text(f"UPDATE doc SET file = CAST(:value AS {kind}) WHERE id = 1")  # noqa: S608
    if connection is not None:
        await connection.execute(statement, {"value": value})
        return
    async with env.engine.begin() as own:
        await own.execute(statement, {"value": value})


class TestFlushes:
    async def test_only_what_is_held_costs_a_statement(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        sent: list[str] = []
        listened = env.engine.sync_engine

        def listen(*args: Any) -> None:
            sent.append(args[2])

        counts: list[int] = []
        for number, verdict in enumerate(("clean", "clean", "down"), start=1):
            scanner.default = verdict  # type: ignore[assignment]
            event.listen(listened, "before_cursor_execute", listen)
            try:
                await env.add(Doc(id=number, file=file(str(number))))
            finally:
                event.remove(listened, "before_cursor_execute", listen)
            counts.append(len(sent))
            assert any("granite_storage_job" in statement for statement in sent) is (verdict == "down")
            sent.clear()
        assert counts[2] == counts[1] + 1

    async def test_a_rollback_takes_the_job_along(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            async with session.begin_nested() as savepoint:
                session.add(Doc(id=2, file=file("b")))
                await session.flush()
                await savepoint.rollback()
            await session.commit()
        references = await env.references()
        assert [job.location for job in await jobs(env)] == [references["doc", 1, "file"].location]

    async def test_a_move_and_a_copy(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            note = Note(id=1, scan=doc.file)
            session.add(note)
            await session.flush()
            doc.other, doc.file = doc.file, None
        references = await env.references()
        moved, copied = references["doc", 1, "other"], references["note", 1, "scan_ref"]
        assert moved.location != copied.location
        found = {job.location: (job.table_name, job.column_name) for job in await jobs(env)}
        assert found == {moved.location: ("doc", "other"), copied.location: ("note", "scan_ref")}
        scanner.default = "clean"
        assert (await journal_of(env).recover()).scanned == 2
        assert {ref.scan["status"] for ref in (await env.references()).values()} == {"clean"}  # type: ignore[index]

    async def test_a_session_that_has_not_heard_of_the_verdict(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """What moves is the value of the row, not that of the instance."""
        await hold(env)
        async with env.sessions() as session:
            doc = await session.get_one(Doc, 1)
            await session.commit()
            scanner.default = "clean"
            await journal_of(env).recover()
            doc.other, doc.file = doc.file, None
            await session.commit()
        assert (await env.references())["doc", 1, "other"].scan["status"] == "clean"  # type: ignore[index]
        assert await jobs(env) == []

    async def test_a_session_that_changes_something_else(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        async with env.sessions() as session:
            doc = await session.get_one(Doc, 1)
            await session.commit()
            scanner.default = "clean"
            await journal_of(env).recover()
            doc.title = "changed"
            doc.file = doc.file
            await session.commit()
        assert await status(env) == "clean"

    async def test_an_undo(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """An object that no row holds is not scanned; a restored one is, because its row says what the kept ref did."""
        await hold(env)
        ref = (await env.references())["doc", 1, "file"]
        with retention(timedelta(hours=1)):
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = None
            scanner.default = "clean"
            assert (await journal_of(env).recover()).scanned == 0
            assert await jobs(env) == []
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = Attachment.restore(ref)
        assert len(await jobs(env)) == 1
        assert (await journal_of(env).recover()).scanned == 1
        assert await status(env) == "clean"

    async def test_a_migration(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """The copy is held as its original was, under its own location."""
        await hold(env)
        policies = {"docs": StoragePolicy("docs", "new", scanner=scanner)}
        manager = StorageManager(backends={**env.manager.backends, "new": MemoryStorageBackend()}, policies=policies)
        journal = StorageJournal(env.engine.sync_engine if env.database.is_synchronous else env.engine)
        factory = env.sessions.sync_maker if env.database.is_synchronous else env.sessions  # type: ignore[attr-defined]
        binding = bind_storage(Base, manager, session_factory=factory, journal=journal)
        try:
            assert (await migrate(binding, storage_key="docs", to_backend="new")).moved == 1
            ref = (await env.references())["doc", 1, "file"]
            assert (ref.backend, await status(env)) == ("new", "pending")
            assert {job.backend for job in await jobs(env)} == {"store", "new"}
            scanner.default = "clean"
            await journal.recover()
            await journal.recover()  # on MariaDB one backend's pass may skip what another one's has just looked at
            assert (await status(env), await jobs(env)) == ("clean", [])
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            await journal.recover()
        finally:
            binding.unbind()
            await journal.aclose()


class TestWorkers:
    async def test_two_at_once(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        for number in range(1, 9):
            await hold(env, str(number), number)
        scanner.default = "clean"
        reports = await asyncio.gather(*(journal_of(env).recover() for _ in range(2)))
        assert sum(report.scanned for report in reports) == 8
        assert set(scanner.judged.values()) == {1}
        assert await jobs(env) == []

    async def test_one_that_dies(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        await die_while_scanning(env, scanner)
        assert (await status(env), [job.takeovers for job in await jobs(env)]) == ("pending", [1])
        assert (await journal_of(env).recover()).scanned == 0, "its lease is not over"
        await make_due(env)
        assert (await journal_of(env).recover()).scanned == 1
        assert (await status(env), await jobs(env)) == ("clean", [])

    async def test_a_lease_is_renewed(
        self, env: OrmEnvironment, scanner: ScriptedScanner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("granite_storage.orm.journal.journal._JOB_LEASE", timedelta(seconds=0.6))
        await hold(env)
        async with stopped_while_scanning(env, scanner, b"a", "clean"):
            await asyncio.sleep(1.0)
            assert (await journal_of(env).recover()).scanned == 0
        assert (scanner.judged[b"a"], await status(env)) == (1, "clean")

    async def test_an_object_that_kills_its_workers(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """It is taken over alone after two deaths, and is dead after many; it stays held, and may be tried again."""
        await hold(env)
        async with env.engine.begin() as connection:
            await connection.execute(update(journal_of(env).tables.job).values(takeovers=14))
        scanner.default = "clean"
        report = await journal_of(env).recover()
        assert (report.scanned, report.held, len(report.failed)) == (0, 0, 1)
        assert "workers have taken it over" in report.failed[0].error
        assert await status(env) == "pending"
        await make_due(env)
        assert (await journal_of(env).recover()).scanned == 0
        assert await journal_of(env).retry_dead_letters() == 1
        assert (await journal_of(env).recover()).scanned == 1

    async def test_a_missing_object(
        self, env: OrmEnvironment, scanner: ScriptedScanner, caplog: pytest.LogCaptureFixture
    ) -> None:
        await hold(env)
        ref = (await env.references())["doc", 1, "file"]
        content = await env.manager.get(ref)
        await env.manager.delete(ref)
        scanner.default = "clean"
        report = await journal_of(env).recover()
        assert (report.scanned, report.held) == (0, 0)
        [failed] = report.failed
        assert failed.next_attempt is None
        assert "ObjectNotFoundError" in failed.error
        assert "a dead letter" in caplog.text
        await env.backend.put_bytes(ref.location, content, content_type=None)
        assert await journal_of(env).retry_dead_letters() == 1
        assert (await journal_of(env).recover()).scanned == 1

    async def test_a_missing_object_that_no_row_holds_any_more(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc))
        await env.recover()
        scanner.default = "clean"
        report = await journal_of(env).recover()
        assert (report.failed, await jobs(env)) == ([], [])

    async def test_a_backend_that_is_down(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        scanner.default = "clean"
        env.backend.fail("open", times=1)
        report = await journal_of(env).recover()
        assert (report.scanned, report.held, report.failed) == (0, 1, [])
        await make_due(env)
        assert (await journal_of(env).recover()).scanned == 1

    async def test_intents_are_settled_while_a_scan_takes_minutes(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        scanner.verdicts[b"a"] = "clean"
        gate = scanner.gates[b"a"] = type(scanner).new_gate()
        async with journal_of(env).worker(interval=timedelta(milliseconds=50)):
            await gate.reached.wait()
            scanner.default = "clean"
            await env.add(Doc(id=2, file=file("b")))
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 2)).file = None
            async with asyncio.timeout(30):
                while len(await env.objects()) > 1:  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0.02)
            assert await status(env) == "pending"
            gate.opened.set()
            async with asyncio.timeout(30):
                while await status(env) != "clean":  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0.02)

    async def test_cancelled_at_every_await(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """Whatever a worker is cancelled at, the job is done by the next one, and the row never says anything wrong."""
        scanner.default = "clean"

        async def work() -> None:
            await journal_of(env)._jobs(ScanJobs).run("store")

        at, reached = 0, True
        while reached:
            scanner.verdicts[b"a"] = "down"
            await env.add(Doc(id=1, file=file("a")))
            scanner.verdicts[b"a"] = "clean"
            steps = Steps(work(), {at}, 0)
            await steps.run()
            reached = steps.reached
            assert await status(env) in ("pending", "clean")
            assert (await status(env) == "clean") is not bool(await jobs(env))
            await make_due(env)
            await journal_of(env).recover()
            assert (await status(env), await jobs(env)) == ("clean", [])
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            at += 1
        assert at > 10

    async def test_a_column_that_this_process_does_not_know(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        await hold(env)
        async with env.engine.begin() as connection:
            await connection.execute(update(journal_of(env).tables.job).values(table_name="of_another_process"))
        scanner.default = "clean"
        report = await journal_of(env).recover()
        assert (report.scanned, report.held, [job.takeovers for job in await jobs(env)]) == (0, 1, [0])
        async with env.engine.begin() as connection:
            await connection.execute(update(journal_of(env).tables.job).values(table_name="doc"))
        assert (await journal_of(env).recover()).scanned == 1


async def die_while_scanning(env: OrmEnvironment, scanner: ScriptedScanner) -> None:
    scanner.verdicts[b"a"] = "clean"
    gate = scanner.gates[b"a"] = scanner.new_gate()
    working = asyncio.create_task(journal_of(env).recover())
    await gate.reached.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    gate.opened.set()


class TestSchemas:
    @pytest.mark.parametrize("is_known", [True, False])
    async def test_a_row_of_a_tenant(self, env: OrmEnvironment, scanner: ScriptedScanner, is_known: bool) -> None:
        """The worker finds it in the schema that the flush has made known, and leaves a clone by SQL alone."""
        name = "tenant_a" if env.database.is_postgres else f"{env.database.url.database}_a"
        await env.sql(f"CREATE SCHEMA {name}")
        mapped = {None: name}
        try:
            async with env.engine.begin() as connection:
                await connection.execution_options(schema_translate_map=mapped)
                await connection.run_sync(Base.metadata.create_all)
            if not is_known:
                await hold(env)
                await env.sql(f"INSERT INTO {name}.doc SELECT * FROM doc")  # noqa: S608
            else:
                async with env.sessions() as session:
                    await session.connection(execution_options={"schema_translate_map": mapped})
                    session.add(Doc(id=1, title="", file=file("a")))
                    await session.commit()
            scanner.default = "clean"
            assert (await journal_of(env).recover()).scanned == 1
            async with env.engine.connect() as connection:
                found = await connection.execute(text(f"SELECT CAST(file AS CHAR(2000)) FROM {name}.doc"))  # noqa: S608
                value = json.loads(found.scalar_one())
            assert value["scan"]["status"] == ("clean" if is_known else "pending")
            async with env.engine.begin() as connection:
                await connection.execution_options(schema_translate_map=mapped)
                await connection.execute(delete(Doc.__table__))  # type: ignore[arg-type]
            await env.sql("DELETE FROM doc")
        finally:
            await env.sql(f"DROP SCHEMA {name}" + (" CASCADE" if env.database.is_postgres else ""))
        for location in await env.objects():
            await env.backend.delete(location)


class TestElsewhere:
    async def test_a_job_is_no_reference(self, env: OrmEnvironment, scanner: ScriptedScanner) -> None:
        """What only a job mentions is an orphan."""
        await hold(env)
        await env.sql("DELETE FROM doc")
        await hold(env, "b", 2)
        collector = StorageGarbageCollector(env.manager, binding=env.binding, grace_period=timedelta(0), max_deleted_share=1.0)
        report = await collector.collect(storage_key="docs", dry_run=False)
        assert (report.deleted, report.mentioned) == (1, 0)
        assert len(await env.objects()) == 1
        scanner.default = "clean"
        assert (await journal_of(env).recover()).scanned == 1
        assert await jobs(env) == []

    async def test_synchronous_sessions_and_verbs(self, psycopg_database: Database) -> None:
        async with scan_env(psycopg_database) as (env, scanner):
            await hold(env)
            scanner.default = "clean"
            report = await asyncio.to_thread(journal_of(env).sync.recover)
            assert (report.scanned, await status(env)) == (1, "clean")
            await env.check_recovery()


def test_without_a_journal() -> None:
    """What would be held for ever is refused."""

    class Other(DeclarativeBase):
        pass

    class Letter(Other):
        __tablename__ = "letter"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    scanner = ScriptedScanner()
    policies = {"docs": StoragePolicy("docs", "store", scanner=scanner)}
    manager = StorageManager(backends={"store": MemoryStorageBackend()}, policies=policies)
    with pytest.raises(ConfigurationError, match="holds files back while it is unavailable, which needs a journal"):
        bind_storage(Other, manager)
    scanner.on_unavailable = "refuse"
    bind_storage(Other, manager).unbind()


def test_reports_are_added() -> None:
    report = RecoveryReport(scanned=1)
    report.add(RecoveryReport(scanned=2))
    assert report.scanned == 3
