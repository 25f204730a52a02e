"""Direct uploads that a journal knows of: whatever dies and whatever arrives late, nothing is lost and nothing stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import select, update

from granite_storage import StaleAttachmentError
from granite_storage.orm import Attachment
from granite_storage.orm.journal.tables import STAGING, clock
from granite_storage.web import DirectUpload, DirectUploads, UploadMismatchError
from tests.orm.world import Doc, World
from tests.web.directly import Client, client_of, uploads_of

CONTENT = b"sent by itself"


@pytest.fixture
def uploads(world: World) -> DirectUploads:
    return uploads_of(world.binding)


@pytest.fixture
async def client(uploads: DirectUploads) -> AsyncIterator[Client]:
    async with client_of(uploads) as client:
        yield client


async def begun(uploads: DirectUploads, **options: Any) -> DirectUpload:
    return await uploads.begin(Doc.file, filename="a.txt", content_type="text/plain", **options)


async def intents(world: World) -> list[str]:
    """What the journal has noted, as the kinds of intents."""
    assert world.journal is not None
    async with world.engine.connect() as connection:
        return sorted((await connection.execute(select(world.journal.tables.intent.c.kind))).scalars())


async def expire(world: World, kind: str) -> None:
    """Let the time of intents of a kind be over."""
    assert world.journal is not None
    intent = world.journal.tables.intent
    async with world.engine.begin() as connection:
        await connection.execute(update(intent).where(intent.c.kind == kind).values(due=clock(-1.0)))


async def test_a_row_takes_it(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await begun(uploads)
    assert await intents(world) == [STAGING]
    await client.sent(upload, CONTENT)
    file = await uploads.finish(upload.token)
    assert await intents(world) == [STAGING, "upload"]
    await world.add(Doc(id=1, file=file))
    assert await intents(world) == [STAGING]
    assert len(await world.objects()) == 2
    await world.recover()
    await world.check(file_1=CONTENT)


async def test_one_that_was_never_sent(world: World, uploads: DirectUploads) -> None:
    await begun(uploads)
    await world.recover()
    assert await intents(world) == []


async def test_one_that_was_never_finished(world: World, uploads: DirectUploads, client: Client) -> None:
    await client.sent(await begun(uploads), CONTENT)
    assert world.journal is not None
    await world.journal.recover()
    assert len(await world.objects()) == 1
    await world.recover()
    assert await world.objects() == set()


async def test_one_that_was_finished_for_nothing(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await uploads.finish(upload.token)
    assert len(await world.objects()) == 2
    await world.recover()
    assert await world.objects() == set()


async def test_what_arrives_late_goes(world: World, uploads: DirectUploads, client: Client) -> None:
    assert world.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    file = await uploads.finish(upload.token)
    await world.add(Doc(id=1, file=file))
    await expire(world, STAGING)
    await world.journal.recover()
    assert await world.objects() == {file.location}
    await client.sent(upload, b"sent once more")
    assert len(await world.objects()) == 2
    await world.recover()
    await world.check(file_1=CONTENT)


@pytest.mark.case("SIG-09")
async def test_finished_twice(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    other = uploads_of(world.binding)  # as another process has it
    first, second = await asyncio.gather(uploads.finish(upload.token), other.finish(upload.token))
    assert first.ref == second.ref
    assert await intents(world) == [STAGING, "upload"]
    third = await other.finish(upload.token)
    assert third.ref == first.ref
    await world.add(Doc(id=1, file=first if first._unowned else second), Doc(id=2, file=third))
    assert (await uploads.finish(upload.token)).ref == first.ref
    await world.recover()
    await world.check(file_1=CONTENT, file_2=CONTENT)


async def test_whoever_was_not_first_takes_a_copy(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await uploads.finish(upload.token)
    again = await uploads_of(world.binding).finish(upload.token)
    await world.add(Doc(id=1, file=again), Doc(id=2, file=again))
    await world.recover()
    await world.check(file_1=CONTENT, file_2=CONTENT)


async def test_finishing_again_renews_the_lease(world: World, uploads: DirectUploads, client: Client) -> None:
    assert world.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token)
    await expire(world, "upload")
    assert (await uploads.finish(upload.token)).ref == first.ref
    await world.journal.recover()
    await world.add(Doc(id=1, file=first))
    await world.recover()
    await world.check(file_1=CONTENT)


async def test_finished_again_while_a_transaction_takes_it(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token)
    async with world.sessions.begin() as session:
        session.add(Doc(id=1, file=first))
        await session.flush()
        async with asyncio.timeout(10):
            assert (await uploads.finish(upload.token)).ref == first.ref
    await world.recover()
    await world.check(file_1=CONTENT)


async def test_finished_again_after_a_rollback(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token)
    location = first.location
    with pytest.raises(RuntimeError):
        async with world.sessions.begin() as session:
            session.add(Doc(id=1, file=first))
            await session.flush()
            raise RuntimeError
    second = await uploads.finish(upload.token)
    assert second.location != location
    await world.add(Doc(id=1, file=second))
    await world.recover()
    await world.check(file_1=CONTENT)


async def test_finished_again_after_its_row_was_deleted(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads), CONTENT)
    await world.add(Doc(id=1, file=await uploads.finish(upload.token)))
    async with world.sessions.begin() as session:
        await session.delete(await session.get_one(Doc, 1))
    assert world.journal is not None
    await world.journal.recover()
    await world.add(Doc(id=2, file=await uploads.finish(upload.token)))
    await world.recover()
    await world.check(file_2=CONTENT)


async def test_a_worker_was_faster(world: World, uploads: DirectUploads, client: Client) -> None:
    assert world.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    first = await uploads.finish(upload.token)
    await expire(world, "upload")
    await world.journal.recover()
    with pytest.raises(StaleAttachmentError):
        await world.add(Doc(id=1, file=first))
    await world.add(Doc(id=1, file=await uploads.finish(upload.token)))
    await expire(world, STAGING)
    await world.journal.recover()
    with pytest.raises(StaleAttachmentError):
        await uploads.finish(upload.token)
    await world.recover()
    await world.check(file_1=CONTENT)


async def test_what_is_refused_leaves_nothing(world: World, uploads: DirectUploads, client: Client) -> None:
    upload = await client.sent(await begun(uploads, checksum="sha256:" + "0" * 64), CONTENT)
    with pytest.raises(UploadMismatchError):
        await uploads.finish(upload.token)
    assert await intents(world) == [STAGING]
    assert len(await world.objects()) == 1
    await world.recover()


@pytest.mark.case("CAN-01")
async def test_cancelled_anywhere(world: World, uploads: DirectUploads, client: Client) -> None:
    assert world.journal is not None
    upload = await client.sent(await begun(uploads), CONTENT)
    file: Attachment | None = None
    turns = 0
    while file is None:
        task = asyncio.create_task(uploads.finish(upload.token))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            file = await task
        except asyncio.CancelledError:
            turns += 1 + turns // 8
    assert turns > 2
    await world.add(Doc(id=1, file=file))
    await world.recover()
    await world.check(file_1=CONTENT)
