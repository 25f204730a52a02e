"""Direct uploads that a journal knows of: whatever dies and whatever arrives late, nothing is lost and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from granite_storage import BackendUnavailableError, StaleAttachmentError, StorageError
from granite_storage.exceptions import BackendError
from granite_storage.gc import StorageGarbageCollector
from granite_storage.locations import uuid7_hex
from granite_storage.orm import Attachment, bind_storage
from granite_storage.orm.attachment import Owner
from granite_storage.orm.journal.direct_uploads import Staging
from granite_storage.orm.journal.tables import STAGING, clock
from granite_storage.testing import Operation
from granite_storage.web import DirectUpload, DirectUploads, UploadMismatchError
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, OrmEnvironment, file, orm_environment
from tests.servers import S3Server
from tests.web.direct_uploads import Client, client_of, uploads_of

CONTENT = b"sent by itself"


@pytest.fixture
def uploads(env: OrmEnvironment) -> DirectUploads:
    return uploads_of(env.binding)


@pytest.fixture
async def client(uploads: DirectUploads) -> AsyncIterator[Client]:
    async with client_of(uploads) as client:
        yield client


async def begun(uploads: DirectUploads, **options: Any) -> DirectUpload:
    return await uploads.begin(Doc.file, filename="a.txt", content_type="text/plain", **options)


async def intents(env: OrmEnvironment) -> list[str]:
    """What the journal has noted, as the kinds of intents."""
    return sorted(row.kind for row in await env.journal_rows("intent"))


async def expire(env: OrmEnvironment, kind: str) -> None:
    """Let the time of intents of a kind be over."""
    for place in env.places():
        async with place as (connection, tables):
            intent = tables.intent
            await connection.execute(update(intent).where(intent.c.kind == kind).values(due=clock(-1.0)))


async def test_a_row_takes_it(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await begun(uploads)
    assert await intents(env) == [STAGING]
    await client.sent(upload, CONTENT)
    file = await uploads.finish(upload.token, Doc.file)
    assert await intents(env) == [STAGING, "upload"]
    await env.add(Doc(id=1, file=file))
    assert await intents(env) == [STAGING]
    assert len(await env.objects()) == 2
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_one_that_was_never_sent(env: OrmEnvironment, uploads: DirectUploads) -> None:
    await begun(uploads)
    await env.recover()
    assert await intents(env) == []


async def test_one_that_was_never_finished(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    await client.sent(await begun(uploads), CONTENT)
    assert env.journal is not None
    await env.journal.recover()
    assert len(await env.objects()) == 1
    await env.recover()
    assert await env.objects() == set()


async def test_one_that_was_finished_for_nothing(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await uploads.finish(upload.token, Doc.file)
    assert len(await env.objects()) == 2
    await env.recover()
    assert await env.objects() == set()


async def test_what_arrives_late_goes(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    assert env.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    file = await uploads.finish(upload.token, Doc.file)
    await env.add(Doc(id=1, file=file))
    await expire(env, STAGING)
    await env.journal.recover()
    assert await env.objects() == {file.location}
    await client.sent(upload, b"sent once more")
    assert len(await env.objects()) == 2
    await env.recover()
    await env.check(file_1=CONTENT)


@pytest.mark.case("SIG-09")
async def test_finished_twice(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    other = uploads_of(env.binding)  # as another process has it
    first, second = await asyncio.gather(uploads.finish(upload.token, Doc.file), other.finish(upload.token, Doc.file))
    assert first.ref == second.ref
    assert await intents(env) == [STAGING, "upload"]
    third = await other.finish(upload.token, Doc.file)
    assert third.ref == first.ref
    await env.add(Doc(id=1, file=first if first._state.owner is Owner.NONE else second), Doc(id=2, file=third))
    assert (await uploads.finish(upload.token, Doc.file)).ref == first.ref
    await env.recover()
    await env.check(file_1=CONTENT, file_2=CONTENT)


async def test_second_finish_takes_a_copy(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await uploads.finish(upload.token, Doc.file)
    again = await uploads_of(env.binding).finish(upload.token, Doc.file)
    await env.add(Doc(id=1, file=again), Doc(id=2, file=again))
    await env.recover()
    await env.check(file_1=CONTENT, file_2=CONTENT)


async def test_finishing_again_renews_the_lease(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    assert env.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token, Doc.file)
    await expire(env, "upload")
    assert (await uploads.finish(upload.token, Doc.file)).ref == first.ref
    await env.journal.recover()
    await env.add(Doc(id=1, file=first))
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_finished_again_while_a_transaction_takes_it(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token, Doc.file)
    async with env.sessions.begin() as session:
        session.add(Doc(id=1, file=first))
        await session.flush()
        async with asyncio.timeout(10):
            assert (await uploads.finish(upload.token, Doc.file)).ref == first.ref
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_finished_again_after_a_rollback(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token, Doc.file)
    location = first.location
    with pytest.raises(RuntimeError):
        async with env.sessions.begin() as session:
            session.add(Doc(id=1, file=first))
            await session.flush()
            raise RuntimeError
    second = await uploads.finish(upload.token, Doc.file)
    assert second.location != location
    await env.add(Doc(id=1, file=second))
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_finished_again_after_its_row_was_deleted(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await env.add(Doc(id=1, file=await uploads.finish(upload.token, Doc.file)))
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Doc, 1))
    assert env.journal is not None
    await env.journal.recover()
    await env.add(Doc(id=2, file=await uploads.finish(upload.token, Doc.file)))
    await env.recover()
    await env.check(file_2=CONTENT)


async def test_a_worker_was_faster(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    assert env.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token, Doc.file)
    await expire(env, "upload")
    await env.journal.recover()
    with pytest.raises(StaleAttachmentError):
        await env.add(Doc(id=1, file=first))
    await env.add(Doc(id=1, file=await uploads.finish(upload.token, Doc.file)))
    await expire(env, STAGING)
    await env.journal.recover()
    with pytest.raises(StaleAttachmentError):
        await uploads.finish(upload.token, Doc.file)
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_what_is_refused_leaves_nothing(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads, checksum="sha256:" + "0" * 64), CONTENT)
    with pytest.raises(UploadMismatchError):
        await uploads.finish(upload.token, Doc.file)
    assert await intents(env) == [STAGING]
    assert len(await env.objects()) == 1
    await env.recover()


@pytest.mark.case("CAN-01")
async def test_cancelled_anywhere(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    assert env.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    file: Attachment | None = None
    turns = 0
    while file is None:
        task = asyncio.create_task(uploads.finish(upload.token, Doc.file))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            file = await task
        except asyncio.CancelledError:
            turns += 1 + turns // 8
    assert turns > 2
    await env.add(Doc(id=1, file=file))
    await env.recover()
    await env.check(file_1=CONTENT)


@pytest.mark.parametrize("step", ["stat", "copy", "open", "read"])
@pytest.mark.parametrize("lost_answer", [False, True])
async def test_storage_fails_at_any_step(
    env: OrmEnvironment, uploads: DirectUploads, client: Client, step: Operation, lost_answer: bool
) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    # A read goes on where the store was unavailable for a moment; another error ends it.
    env.backend.fail(step, lost_answer=lost_answer, error=BackendError("broken") if step == "read" else None)
    with pytest.raises(BackendError if step == "read" else BackendUnavailableError):
        await uploads.finish(upload.token, Doc.file)
    assert await intents(env) == [STAGING]
    await env.add(Doc(id=1, file=await uploads.finish(upload.token, Doc.file)))
    await env.recover()
    await env.check(file_1=CONTENT)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_unknown_publication(
    env: OrmEnvironment, uploads: DirectUploads, client: Client, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    publish = Staging.publish

    async def cut_off(*arguments: Any) -> bool:
        if when == "after":
            await publish(*arguments)
        raise ConnectionError("the database went away")

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", cut_off)
        with pytest.raises(ConnectionError):
            await uploads.finish(upload.token, Doc.file)
    assert await intents(env) == [STAGING]
    await env.add(Doc(id=1, file=await uploads.finish(upload.token, Doc.file)))
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_killed_after_it_was_published(
    env: OrmEnvironment, uploads: DirectUploads, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process that dies leaves is taken up by the next one, or by a worker."""
    upload = await client.sent(await begun(uploads), CONTENT)
    publish = Staging.publish

    async def killed(*arguments: Any) -> bool:
        await publish(*arguments)
        finishing.cancel()
        await asyncio.sleep(10)
        return True

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "publish", killed)
        finishing = asyncio.create_task(uploads.finish(upload.token, Doc.file))
        with pytest.raises(asyncio.CancelledError):
            await finishing
    assert await intents(env) == [STAGING, "upload"]
    published = await env.objects()
    file = await uploads.finish(upload.token, Doc.file)
    assert await env.objects() == published
    await env.add(Doc(id=1, file=file))
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_nothing_is_given_out_that_the_journal_does_not_know(
    env: OrmEnvironment, uploads: DirectUploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any) -> Any:
        raise ConnectionError("the database went away")

    monkeypatch.setattr(Staging, "begin", failing)
    with pytest.raises(ConnectionError):
        await begun(uploads)


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 1])
@pytest.mark.parametrize("after", ["stat", "copy"])
async def test_replaced_while_it_is_finished(
    env: OrmEnvironment, uploads: DirectUploads, client: Client, monkeypatch: pytest.MonkeyPatch, size: int, after: str
) -> None:
    """The row gets what was verified, or nothing: never what another request has brought meanwhile."""
    upload = await client.sent(await begun(uploads), CONTENT)
    staged, other = (await env.objects()).pop(), bytes(size)
    original = getattr(type(env.backend), after)
    replaced = False

    async def replacing(backend: Any, *arguments: Any) -> Any:
        nonlocal replaced
        result = await original(backend, *arguments)
        if not replaced:
            replaced = True
            await env.backend.inner.delete(staged)
            await env.backend.inner.put_bytes(staged, other, content_type="text/plain")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(type(env.backend), after, replacing)
        try:
            file: Attachment | None = await uploads.finish(upload.token, Doc.file)
        except StaleAttachmentError:
            file = None
    if file is not None:
        content = await file.read()
        assert content == (CONTENT if after == "copy" else other)
        await env.add(Doc(id=1, file=file))
        await env.recover()
        await env.check(file_1=content)
    else:
        assert (after, size) == ("stat", len(CONTENT) + 1)
        assert await intents(env) == [STAGING]
        await env.recover()


async def test_reclaimed_while_it_is_finished(
    env: OrmEnvironment, uploads: DirectUploads, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    publish = Staging.publish

    async def late(*arguments: Any) -> bool:
        assert env.journal is not None
        await expire(env, STAGING)
        await env.journal.recover()
        return await publish(*arguments)

    monkeypatch.setattr(Staging, "publish", late)
    with pytest.raises(StaleAttachmentError, match="reclaimed"):
        await uploads.finish(upload.token, Doc.file)
    assert (await intents(env), await env.objects()) == ([], set())
    await env.recover()


async def test_the_lease_lasts_while_a_copy_is_read(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    assert env.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    env.journal._lease = timedelta(seconds=1)
    env.backend.delay("read", seconds=2)
    finishing = asyncio.create_task(uploads.finish(upload.token, Doc.file))
    while not finishing.done():
        await env.journal.recover()
        await asyncio.sleep(0.1)
    await env.add(Doc(id=1, file=await finishing))
    await env.recover()
    await env.check(file_1=CONTENT)


async def test_on_s3(database: Database, seaweedfs_server: S3Server) -> None:
    bucket = await asyncio.to_thread(lambda: seaweedfs_server.shared_bucket)
    backend = seaweedfs_server.backend(bucket, prefix=uuid7_hex())
    async with orm_environment(database, backend=backend, journaled=True) as env:
        uploads = uploads_of(env.binding, base_url=None)
        async with client_of(uploads) as client:
            upload = await client.sent(await begun(uploads), CONTENT)
            file = await uploads.finish(upload.token, Doc.file)
            await env.add(Doc(id=1, file=file))
            await client.sent(upload, b"sent once more")
            assert (await uploads.finish(upload.token, Doc.file)).ref == file.ref
            await expire(env, STAGING)
            assert env.journal is not None
            await env.journal.recover()
            await client.sent(upload, b"and again, after it was reclaimed")
            assert len(await env.objects()) == 2
            await env.recover()
            await env.check(file_1=CONTENT)
        await env.manager.aclose()


async def test_a_transaction_that_reads_an_older_snapshot(env: OrmEnvironment, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    async with env.sessions() as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        await session.execute(select(Doc))
        session.add(Doc(id=1, file=await uploads.finish(upload.token, Doc.file)))
        await session.commit()
    again = await uploads.finish(upload.token, Doc.file)
    await env.add(Doc(id=2, file=again))
    await env.recover()
    await env.check(file_1=CONTENT, file_2=CONTENT)


async def test_a_base_that_got_its_journal_later(env: OrmEnvironment, client: Client) -> None:
    assert env.journal is not None
    env.binding.unbind()
    without = bind_storage(Base, env.manager, session_factory=env.sessions)
    upload = await client.sent(await begun(uploads_of(without)), CONTENT)
    without.unbind()
    env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=env.journal)
    with pytest.raises(StaleAttachmentError):
        await uploads_of(env.binding).finish(upload.token, Doc.file)
    for location in await env.objects():
        await env.backend.delete(location)


async def test_the_collector_leaves_alone_what_may_still_be_finished(
    env: OrmEnvironment, uploads: DirectUploads, client: Client
) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await env.add(Doc(id=2, file=file("kept")))
    collector = StorageGarbageCollector(
        env.manager, binding=env.binding, grace_period=timedelta(microseconds=1), max_deleted_share=1.0
    )
    report = await collector.collect(storage_key="docs", dry_run=False, allow_restored_database=True)
    assert (report.scanned, report.deleted) == (2, 0)
    await env.add(Doc(id=1, file=await uploads.finish(upload.token, Doc.file)))
    await env.recover()
    await env.check(file_1=CONTENT, file_2="kept")


@pytest.mark.parametrize("seed", range(3))
async def test_everything_at_random(env: OrmEnvironment, client: Client, seed: int) -> None:
    """Processes that finish, take, roll back, delete and reclaim at the same time, while clients send again."""
    choose = random.Random(seed)
    processes = [uploads_of(env.binding) for _ in range(3)]
    begun_ones = [await begun(processes[0]) for _ in range(4)]
    keys = itertools.count(1)

    async def send() -> None:
        await client.send(choose.choice(begun_ones), choose.randbytes(choose.randrange(1, 2000)))

    async def take(*, fails: bool = False) -> None:
        process, upload = choose.choice(processes), choose.choice(begun_ones)
        with contextlib.suppress(StorageError, ZeroDivisionError):
            file = await process.finish(upload.token, Doc.file)
            if choose.random() < 0.3:
                file = await choose.choice(processes).finish(upload.token, Doc.file)
            async with env.sessions.begin() as session:
                session.add(Doc(id=next(keys), file=file))
                await session.flush()
                1 / (not fails)

    async def cancel() -> None:
        task = asyncio.create_task(take())
        await asyncio.sleep(choose.random() / 50)
        task.cancel()
        await asyncio.wait([task])

    async def remove() -> None:
        with contextlib.suppress(StorageError):
            async with env.sessions.begin() as session:
                rows = (await session.execute(select(Doc).with_for_update(skip_locked=True))).scalars().all()
                if rows:
                    await session.delete(choose.choice(rows))

    async def reclaim() -> None:
        assert env.journal is not None
        await expire(env, "upload")
        await env.journal.recover()

    steps = [send, take, take, lambda: take(fails=True), cancel, remove, reclaim]
    for _ in range(40):
        await asyncio.gather(*(step() for step in choose.choices(steps, k=3)))
    await env.recover()
    await env.check()
