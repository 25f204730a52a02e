"""What a pass of recovery does and says, the worker that repeats it, and what waits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event, func, select, text, update
from sqlalchemy.engine.interfaces import CacheStats

from granite_storage import ConfigurationError, ObjectNotFoundError
from granite_storage.backends.base import upload_begun
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import BackendError, BackendUnavailableError, InvalidReferenceError, StaleAttachmentError
from granite_storage.orm import Attachment, StorageJournal, bind_storage
from granite_storage.orm.journal import recovery
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.tables import clock
from tests.core.support import eventually
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, OrmEnvironment, file, orm_environment


def journal_of(env: OrmEnvironment) -> StorageJournal:
    assert env.journal is not None
    return env.journal


async def expire(env: OrmEnvironment) -> None:
    for place in env.places():
        async with place as (connection, tables):
            for table in (tables.intent, tables.reclaim):
                await connection.execute(update(table).values(due=clock(-1.0)))


async def rows(env: OrmEnvironment, name: str) -> list[Any]:
    return await env.journal_rows(name)


@contextlib.contextmanager
def retention(duration: timedelta) -> Iterator[None]:
    """Set how long released objects are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StorageJournal, "retention_of", lambda *_: duration)
        yield


async def eventually_true(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until something holds that has to be asked for; on a machine that has other things to do, too."""
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110  # no event: the database has to be asked
            await asyncio.sleep(0.02)


async def die(*_: Any) -> None:
    raise SystemError("dead")


async def rename(env: OrmEnvironment, backend: str) -> None:
    """Let all rows of the journal name another backend, and be due."""
    for place in env.places():
        async with place as (connection, tables):
            for table in (tables.intent, tables.reclaim):
                await connection.execute(update(table).values(backend=backend, due=clock(-1.0)))


class Batched(MemoryStorageBackend):
    """Deletes many objects in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    async def delete_many(self, locations: Sequence[str]) -> dict[str, BackendError]:
        self.calls.append(len(locations))
        for location in locations:
            await self.delete(location)
        return {}


async def test_what_rows_have_given_up_goes_in_few_requests(database: Database) -> None:
    backend = Batched()
    async with orm_environment(database, backend=backend, journaled=True) as env:
        async with env.sessions.begin() as session:
            session.add_all([Doc(file=file(str(number))) for number in range(150)])
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc))
        report = await journal_of(env).recover()
        assert report.deleted == 150
        assert backend.calls == ([20] * 7 + [10] if database.is_sqlite else [150])
        assert await env.objects() == set()


class TestReports:
    async def test_nothing_to_do(self, env: OrmEnvironment) -> None:
        report = await journal_of(env).recover()
        assert (report.claimed, report.deleted, report.kept, report.leased, report.waiting, report.failed) == (0, 0, 0, 0, 0, [])

    async def test_an_upload_is_leased_then_deleted_then_looked_for_again(self, env: OrmEnvironment) -> None:
        stored = await file("a").store(Doc.file)
        assert (await journal_of(env).recover()).leased == 1
        assert await stored.exists()
        await expire(env)
        report = await journal_of(env).recover()
        assert (report.claimed, report.deleted, report.confirmed, report.leased) == (1, 1, 0, 0)
        assert not await stored.exists()
        assert len(await rows(env, "reclaim")) == 1
        assert (await journal_of(env).recover()).claimed == 0
        await expire(env)
        report = await journal_of(env).recover()
        assert (report.claimed, report.deleted, report.confirmed) == (1, 0, 1)
        assert await rows(env, "reclaim") == []

    async def test_many(self, env: OrmEnvironment) -> None:
        """More than one batch, by two workers at once: each object is deleted by one of them."""
        for _ in range(3):
            await asyncio.gather(*(file(str(number)).store(Doc.file) for number in range(90)))
        assert len(await env.objects()) == 270
        await expire(env)
        first, second = await asyncio.gather(journal_of(env).recover(), journal_of(env).recover())
        assert first.deleted + second.deleted == 270
        assert await env.objects() == set()

    async def test_a_failure_is_reported_and_tried_again(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        stored = await file("a").store(Doc.file)
        await expire(env)
        env.backend.fail("delete", error=BackendUnavailableError("down"))
        before = datetime.now(UTC)
        [failed] = (await journal_of(env).recover()).failed
        assert (failed.backend, failed.location, failed.attempts) == ("store", stored.location, 1)
        assert "down" in failed.error
        assert failed.next_attempt is not None
        assert before < failed.next_attempt < before + timedelta(minutes=5)
        assert stored.location in caplog.text
        assert (await journal_of(env).recover()).claimed == 0
        await expire(env)
        assert (await journal_of(env).recover()).deleted == 1

    async def test_a_backend_that_does_not_answer_is_named(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recovery, "_LONGEST_DELETE", 0.1)
        stored = await file("a").store(Doc.file)
        await expire(env)
        env.backend.delay("delete", seconds=60)
        [failed] = (await journal_of(env).recover()).failed
        assert (failed.location, failed.error) == (stored.location, "TimeoutError: the backend 'store' took longer than 0.1 s")
        monkeypatch.undo()
        await expire(env)
        assert (await journal_of(env).recover()).deleted == 1

    async def test_a_dead_letter_is_left_alone_until_it_is_retried(
        self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = journal_of(env)
        monkeypatch.setattr(journal, "_max_attempts", 2)
        stored = await file("a").store(Doc.file)
        env.backend.fail("delete", error=BackendUnavailableError("down"), times=2)
        for _ in range(2):
            await expire(env)
            await journal.recover()
        await expire(env)
        [failed] = (await journal.recover()).failed
        assert (failed.attempts, failed.next_attempt) == (2, None)
        assert [record.levelno for record in caplog.records if "could not delete" in record.message][-1] == logging.ERROR
        assert await stored.exists()
        assert await journal.retry_dead_letters() == 1
        assert (await journal.recover()).deleted == 1

    @pytest.mark.parametrize("fenced", [False, True], ids=["intent", "fenced"])
    async def test_a_backend_that_is_not_there_is_reported(
        self, env: OrmEnvironment, fenced: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was renamed, perhaps after a worker had died between fence and delete: its rows stay, and somebody says so."""
        journal = journal_of(env)
        stored = await file("a").store(Doc.file)
        await expire(env)
        if fenced:
            with monkeypatch.context() as patch:
                patch.setattr(Recovery, "_check", die)
                with pytest.raises(SystemError, match="dead"):
                    await journal.recover()
        await rename(env, "elsewhere")
        report = await journal.recover()
        assert report.unknown_backends == {"elsewhere"}
        assert report.claimed == 0
        assert await stored.exists()
        await journal.check()
        assert "'elsewhere'" in caplog.text
        await rename(env, "store")
        await env.recover()

    async def test_a_worker_leaves_a_sign_of_life(self, env: OrmEnvironment) -> None:
        await journal_of(env).check()
        await journal_of(env).recover()
        first = {row.name: row.changed for row in await rows(env, "meta")}
        await journal_of(env).recover()
        second = {row.name: row.changed for row in await rows(env, "meta")}
        assert second["heartbeat"] > first["heartbeat"]
        assert second["schema_version"] == first["schema_version"]


class TestCosts:
    async def test_sessions_that_flush_at_the_same_time_share_commits(self, env: OrmEnvironment) -> None:
        journal, commits = journal_of(env), []
        await journal.check()
        event.listen(journal._pool.uploads._engine.sync_engine, "commit", lambda connection: commits.append(connection))
        await asyncio.gather(*(env.add(Doc(id=number, file=file("a"))) for number in range(1, 9)))
        assert 1 <= len(commits) < 8
        await env.check(**{f"file_{number}": "a" for number in range(1, 9)})

    async def test_a_failure_is_everybodys_who_waited_for_it(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        async def insert(*_: Any) -> None:
            await asyncio.sleep(0.05)
            raise ConnectionResetError("no answer")

        monkeypatch.setattr("granite_storage.orm.journal.intents.Intents._insert", insert)
        done = await asyncio.gather(*(file("a").store(Doc.file) for _ in range(5)), return_exceptions=True)
        assert [type(error) for error in done] == [ConnectionResetError] * 5
        assert await env.objects() == set()

    async def test_where_a_cancelled_writer_hears_nothing_nobody_uploads(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("granite_storage.orm.journal.intents.CLEANUP_TIMEOUT", 0.05)
        original, calls, go = type(journal_of(env).intents)._insert, [asyncio.Event(), asyncio.Event()], asyncio.Event()
        await journal_of(env).check()

        async def insert(*args: Any) -> None:
            if calls[0].is_set():
                calls[1].set()
                await asyncio.sleep(3600)
            calls[0].set()
            await go.wait()
            await original(*args)

        monkeypatch.setattr("granite_storage.orm.journal.intents.Intents._insert", insert)
        first, second, *others = [asyncio.create_task(file("a").store(Doc.file)) for _ in range(4)]
        await calls[0].wait()
        go.set()
        await calls[1].wait()  # the second one writes for all that waited
        second.cancel()
        done = await asyncio.wait_for(asyncio.gather(first, second, *others, return_exceptions=True), 60)
        assert [type(item) for item in done] == [Attachment, asyncio.CancelledError, StaleAttachmentError, StaleAttachmentError]
        assert len(await env.objects()) == 1
        await env.recover()

    async def test_very_many_attachments(self, env: OrmEnvironment) -> None:
        """More than one statement can take."""
        await env.add(*(Doc(id=number, file=file(str(number))) for number in range(1, 1201)))
        assert len(await env.objects()) == 1200
        async with env.sessions.begin() as session:
            await session.execute(Doc.__table__.delete())

    async def test_one_commit_for_many_attachments(self, env: OrmEnvironment) -> None:
        commits: list[Any] = []

        def on_commit(connection: Any) -> None:
            commits.append(connection)

        await journal_of(env).check()
        inner = journal_of(env)._pool.uploads._engine.sync_engine
        event.listen(inner, "commit", on_commit)
        await env.add(*(Doc(id=number, file=file("a"), other=file("b")) for number in range(1, 21)))
        assert len(commits) == 1

    async def test_no_statement_is_compiled_for_each_flush(self, env: OrmEnvironment) -> None:
        """SQLAlchemy keeps no compiled form of an INSERT with its rows in `values()`, and compiling costs more than executing."""
        seen: list[tuple[str, CacheStats]] = []

        def note(_: Any, __: Any, statement: str, ___: Any, context: Any, ____: Any) -> None:
            seen.append((statement, context.cache_hit))

        event.listen(Engine, "before_cursor_execute", note)
        try:
            await env.add(Doc(id=1, file=file("a"), other=file("a")))
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                doc.file, doc.other = file("b"), file("b")
        finally:
            event.remove(Engine, "before_cursor_execute", note)
        of_journal = [(statement, hit) for statement, hit in seen if "granite_storage_intent" in statement]
        assert any(statement.startswith("INSERT") for statement, _ in of_journal)
        assert [statement for statement, hit in of_journal if hit is CacheStats.NO_CACHE_KEY] == []
        await env.check(file_1="b", other_1="b")

    async def test_an_upload_leaves_nothing_to_the_next_one(self, env: OrmEnvironment) -> None:
        """What saves the id of a multipart upload belongs to one upload, though that runs in the caller's task."""
        async with env.sessions.begin() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            assert upload_begun.get() is None

    @pytest.mark.case("DBF-18")
    async def test_a_pool_of_one_connection(self, env: OrmEnvironment) -> None:
        engine = env.database.engine(pool_size=1, max_overflow=0, pool_timeout=5)
        binding = bind_storage(Base, env.manager, journal=StorageJournal(engine))
        try:
            async with env.sessions(bind=engine) as session:
                await session.execute(select(func.count()).select_from(Doc))
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                session.add(Doc(id=2, file=file("b")))
                await session.commit()
        finally:
            binding.unbind()
            await engine.dispose()
        await env.check(file_1="a", file_2="b")


class TestLeases:
    async def test_an_upload_is_renewed_while_it_goes_on(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal_of(env), "_lease", timedelta(seconds=3))
        go = asyncio.Event()

        async def slow() -> Any:
            yield b"a"
            await go.wait()
            yield b"b"

        saving = asyncio.create_task(env.add(Doc(id=1, file=Attachment(slow()))))
        await eventually_true(lambda: rows(env, "intent"))
        [first] = await rows(env, "intent")

        async def is_renewed() -> bool:
            return (await rows(env, "intent"))[0].due > first.due

        await eventually_true(is_renewed)
        go.set()
        await saving
        await env.check(file_1="ab")

    @pytest.mark.parametrize("reclaimed", [True, False], ids=["reclaimed", "out of reach"])
    async def test_an_upload_that_cannot_be_renewed_stops(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, reclaimed: bool
    ) -> None:
        journal = journal_of(env)
        monkeypatch.setattr(journal, "_lease", timedelta(seconds=1.5))

        async def renew(*_: Any) -> bool:
            if not reclaimed:
                raise OSError("the database is away")
            return False

        monkeypatch.setattr("granite_storage.orm.journal.intents.Intents.renew", renew)
        stopped = asyncio.Event()

        async def endless() -> Any:
            try:
                while True:
                    yield b"a"
                    await asyncio.sleep(0.01)
            finally:
                stopped.set()

        source = endless()
        with pytest.raises(StaleAttachmentError, match=r"lease of an upload .* the transaction may be tried again"):
            await env.add(Doc(id=1, file=Attachment(source)))
        await source.aclose()
        assert stopped.is_set()

    async def test_what_a_program_publishes_that_stood_still_is_discarded(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Workers have reclaimed the upload, and have looked for it a second time, before its last step was done after all."""
        monkeypatch.setattr(journal_of(env), "_lease", timedelta(seconds=0.5))
        original = type(env.backend).put_bytes

        async def hold(*_: Any) -> None:
            await asyncio.sleep(3600)

        async def put_bytes(*args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(0.6)
            for _ in range(2):
                await expire(env)
                await journal_of(env).recover()
            assert [await rows(env, name) for name in ("intent", "reclaim")] == [[], []]
            return await original(*args, **kwargs)

        monkeypatch.setattr("granite_storage.orm.journal.jobs.Lease.hold", hold)
        monkeypatch.setattr(type(env.backend), "put_bytes", put_bytes)
        with pytest.raises(StaleAttachmentError, match="lease"):
            await env.add(Doc(id=1, file=file("a")))
        assert await env.objects() == set()

    async def test_nothing_is_sent_when_the_lease_is_over_already(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("granite_storage.orm.journal.jobs._SAFE_SHARE", 0.0)
        with pytest.raises(StaleAttachmentError, match="lease"):
            await env.add(Doc(id=1, file=file("a")))
        assert not [call for call in env.backend.calls if call.operation.startswith("put")]

    async def test_nothing_is_uploaded_that_was_not_written_down(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def record(*_: Any) -> None:
            raise ConnectionResetError("the answer to the COMMIT did not come")

        monkeypatch.setattr("granite_storage.orm.journal.intents.Intents.record", record)
        with pytest.raises(ConnectionResetError):
            await env.add(Doc(id=1, file=file("a")))
        assert not [call for call in env.backend.calls if call.operation.startswith("put")]

    async def test_an_object_that_was_reclaimed_is_stored_anew_by_the_next_try(self, env: OrmEnvironment) -> None:
        attachment = await file("a").store(Doc.file)
        await expire(env)
        await journal_of(env).recover()
        with pytest.raises(StaleAttachmentError):
            await env.add(Doc(id=1, file=attachment))
        await env.add(Doc(id=1, file=attachment))
        await env.check(file_1="a")


class TestRetention:
    async def test_a_replaced_object_waits(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with retention(timedelta(days=7)):
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                assert doc.file is not None
                old, doc.file = doc.file, file("b")
            assert (await journal_of(env).recover()).waiting == 1
            assert await env.manager.get(old.ref) == b"a"
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                doc.file = Attachment.restore(old.ref)
            assert [row.location for row in await rows(env, "intent")] == [(await only_replaced(env, old.ref))]
        await env.recover()
        await env.check(file_1="a")

    async def test_bulk_deletes_wait_too(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with retention(timedelta(days=7)):
            async with env.sessions.begin() as session:
                await session.execute(Doc.__table__.delete())
            assert len(await env.objects()) == 1
            assert (await journal_of(env).recover()).waiting == 1
        await env.recover()

    @pytest.mark.case("CON-04")
    async def test_what_is_on_its_way_out_cannot_be_restored(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            assert doc.file is not None
            ref, doc.file = doc.file.ref, None
        assert (await journal_of(env).recover()).deleted == 1
        with pytest.raises(StaleAttachmentError, match="has no pending delete"):
            await env.add(Doc(id=2, file=Attachment.restore(ref)))
        with pytest.raises(ObjectNotFoundError):
            await env.manager.get(ref)

    async def test_what_a_row_holds_cannot_be_restored(self, env: OrmEnvironment) -> None:
        doc = Doc(id=1, file=file("a"))
        await env.add(doc)
        assert doc.file is not None
        with pytest.raises(StaleAttachmentError, match="has no pending delete"):
            await env.add(Doc(id=2, file=Attachment.restore(doc.file.ref)))
        await env.check(file_1="a")

    async def test_what_a_row_gives_up_in_the_same_flush_moves(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            assert doc.file is not None
            ref, doc.file = doc.file.ref, None
            session.add(Doc(id=2, file=Attachment.restore(ref)))
        await env.recover()
        await env.check(file_2="a")

    async def test_two_rows_that_restore_one_object(self, env: OrmEnvironment) -> None:
        """One takes it back, and the other gets a copy."""
        await env.add(Doc(id=1, file=file("a")))
        with retention(timedelta(days=7)):
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                assert doc.file is not None
                ref, doc.file = doc.file.ref, None
            async with env.sessions.begin() as session:
                session.add_all([Doc(id=number, file=Attachment.restore(ref)) for number in (2, 3)])
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Doc, 2))
        await env.recover()
        await env.check(file_3="a")

    async def test_an_undo_that_is_rolled_back_waits_on(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with retention(timedelta(days=7)):
            async with env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                assert doc.file is not None
                ref, doc.file = doc.file.ref, None
            with pytest.raises(ZeroDivisionError):
                async with env.sessions.begin() as session:
                    (await session.get_one(Doc, 1)).file = Attachment.restore(ref)
                    await session.flush()
                    raise ZeroDivisionError
            assert await env.manager.get(ref) == b"a"
            assert (await journal_of(env).recover()).waiting == 1
        await env.recover()

    def test_only_a_ref_can_be_restored(self) -> None:
        with pytest.raises(InvalidReferenceError):
            Attachment.restore({"location": "x"})  # type: ignore[arg-type]


async def has_no_objects(env: OrmEnvironment) -> bool:
    return not await env.objects()


async def only_replaced(env: OrmEnvironment, restored: Any) -> str:
    [location] = await env.objects() - {restored.location}
    return location


class TestWorker:
    async def test_it_recovers_and_stops(self, env: OrmEnvironment) -> None:
        await file("a").store(Doc.file)
        await expire(env)
        async with journal_of(env).worker(interval=timedelta(milliseconds=50)):
            await eventually_true(lambda: has_no_objects(env))

    async def test_it_looks_soon_after_a_transaction(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with journal_of(env).worker(interval=timedelta(hours=1)):
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Doc, 1))
            await eventually_true(lambda: has_no_objects(env))

    async def test_it_survives_errors(
        self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await file("a").store(Doc.file)
        await expire(env)
        journal = journal_of(env)
        recoveries, failures = journal._recoveries, iter([OSError("the database is away")])

        def failing() -> Any:
            for error in failures:
                raise error
            return recoveries()

        monkeypatch.setattr(journal, "_recoveries", failing)
        async with journal.worker(interval=timedelta(milliseconds=50)):
            await eventually_true(lambda: has_no_objects(env))
        assert "will be retried" in caplog.text

    async def test_a_retention_outlives_a_settlement_that_failed(self, env: OrmEnvironment) -> None:
        """Only leases of uploads are ended: an object that waits for its retention may be restored for as long."""
        with retention(timedelta(days=1)):
            await env.add(Doc(id=1, file=file("a")))
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = None
        [waiting] = await rows(env, "intent")
        await journal_of(env).intents.renew([waiting.id], timedelta(0))
        assert [row.due for row in await rows(env, "intent")] == [waiting.due]
        await expire(env)
        await env.recover()

    async def test_a_slow_delete_does_not_hold_up_its_end(self, env: OrmEnvironment) -> None:
        await file("a").store(Doc.file)
        await expire(env)
        env.backend.delay("delete", seconds=3600)
        async with asyncio.timeout(60), journal_of(env).worker(interval=timedelta(milliseconds=50)):
            await eventually(lambda: any(call.operation == "delete" for call in env.backend.calls))
        await env.recover()

    async def test_an_interval_of_nothing_is_refused(self, env: OrmEnvironment) -> None:
        with pytest.raises(ConfigurationError, match="interval"):
            async with journal_of(env).worker(interval=timedelta(0)):
                pass


class TestCancelled:
    async def test_a_cancelled_save_is_cleaned_up_by_a_fence(self, env: OrmEnvironment) -> None:
        """Its last request may still arrive, so that a worker looks once more."""
        env.backend.delay("put_bytes", seconds=3600)

        async def save() -> None:
            async with env.sessions() as session:
                session.add(Doc(id=1, file=file("a")))
                await session.flush()  # SQLAlchemy shields a commit, and the flush that it begins with

        saving = asyncio.create_task(save())
        await eventually(lambda: any(call.operation == "put_bytes" for call in env.backend.calls))
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        assert await rows(env, "intent") == []
        assert [row.emptied for row in await rows(env, "reclaim")] == [True]
        await env.recover()

    async def test_a_transaction_that_is_cancelled_after_its_flush(self, env: OrmEnvironment) -> None:
        flushed = asyncio.Event()

        async def save() -> None:
            session = env.sessions()
            try:
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                flushed.set()
                await asyncio.sleep(3600)
            finally:
                await session.close()  # `async with` would do it in a task of its own, which nobody cancels

        saving = asyncio.create_task(save())
        await flushed.wait()
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        await eventually_true(env.is_settled_but_for_late_arrivals)
        assert await env.objects() == set()
        await env.recover()

    async def test_a_failed_save_is_cleaned_up_at_once(self, env: OrmEnvironment) -> None:
        env.backend.fail("put_bytes", error=BackendUnavailableError("down"), nth=2)
        with pytest.raises(BackendUnavailableError):
            await env.add(Doc(id=1, file=file("a"), other=file("b")))
        assert await env.objects() == set()
        assert await rows(env, "intent") == []


async def test_sql_that_is_run_past_the_sessions_loses_nothing(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    async with env.engine.begin() as connection:
        await connection.execute(text("UPDATE doc SET title = 'x'"))
    assert (await journal_of(env).recover()).claimed == 0
