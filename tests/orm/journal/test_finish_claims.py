"""Processes that finish one direct upload at the same time: one makes a copy, and the others wait for what it finds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from granite_storage.orm.journal import direct_uploads
from granite_storage.orm.journal.direct_uploads import Staging
from granite_storage.web import DirectUpload, DirectUploads, UploadMismatchError
from tests.core.support import eventually
from tests.orm.environment import Doc, OrmEnvironment
from tests.web.direct_uploads import Client, client_of, uploads_of

CONTENT = b"sent by itself"
WRONG = "sha256:" + "0" * 64


@pytest.fixture
def processes(env: OrmEnvironment) -> list[DirectUploads]:
    """Each knows nothing of the others but what the journal says."""
    return [uploads_of(env.binding) for _ in range(3)]


@pytest.fixture
async def client(processes: list[DirectUploads]) -> AsyncIterator[Client]:
    async with client_of(processes[0]) as client:
        yield client


async def sent(processes: list[DirectUploads], client: Client, **options: Any) -> DirectUpload:
    upload = await processes[0].begin(Doc.file, filename="a.txt", content_type="text/plain", **options)
    return await client.sent(upload, CONTENT)


@pytest.mark.case("RE-06")
async def test_one_copy(env: OrmEnvironment, processes: list[DirectUploads], client: Client) -> None:
    upload = await sent(processes, client)
    env.backend.delay("copy", seconds=0.3)
    files = await asyncio.gather(*(process.finish(upload.token, Doc.file) for process in processes * 5))
    assert len({file.ref for file in files}) == 1
    assert (env.backend.count("copy"), env.backend.count("open")) == (1, 1)
    await env.add(Doc(id=1, file=files[0]))
    await env.recover()
    await env.check(file_1=CONTENT)


@pytest.mark.case("RE-06")
async def test_a_verdict_is_remembered_by_all(env: OrmEnvironment, processes: list[DirectUploads], client: Client) -> None:
    upload = await sent(processes, client, checksum=WRONG)
    for process in processes:
        with pytest.raises(UploadMismatchError, match="checksum"):
            await process.finish(upload.token, Doc.file)
    assert (env.backend.count("copy"), env.backend.count("open")) == (1, 1)
    [staged] = await env.objects()
    await env.backend.inner.delete(staged)
    await env.backend.inner.put_bytes(staged, b"sent again", content_type="text/plain")
    with pytest.raises(UploadMismatchError, match="checksum"):
        await processes[0].finish(upload.token, Doc.file)
    assert env.backend.count("copy") == 2
    await env.recover()


@pytest.mark.case("RE-06")
async def test_a_claim_is_renewed(
    env: OrmEnvironment, processes: list[DirectUploads], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_uploads, "_CLAIM_SECONDS", 1.5)
    monkeypatch.setattr(direct_uploads, "_RENEWAL_SECONDS", 0.2)
    upload = await sent(processes, client)
    env.backend.delay("copy", seconds=3)
    files = await asyncio.gather(*(process.finish(upload.token, Doc.file) for process in processes))
    assert len({file.ref for file in files}) == 1
    assert env.backend.count("copy") == 1
    await env.recover()


@pytest.mark.case("RE-06")
async def test_the_claim_of_a_dead_process_lapses(
    env: OrmEnvironment, processes: list[DirectUploads], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stands still for so long finds in the end that another has been faster, and leaves nothing."""
    monkeypatch.setattr(direct_uploads, "_CLAIM_SECONDS", 0.5)
    upload = await sent(processes, client)
    env.backend.delay("copy", seconds=2)
    late = asyncio.create_task(processes[0].finish(upload.token, Doc.file))
    await eventually(lambda: env.backend.count("copy") == 1)
    file = await processes[1].finish(upload.token, Doc.file)
    assert not late.done()
    assert (await late).ref == file.ref
    assert (env.backend.count("copy"), len(await env.objects())) == (2, 2)
    await env.add(Doc(id=1, file=file))
    await env.recover()
    await env.check(file_1=CONTENT)


@pytest.mark.case("RE-06")
async def test_a_cancelled_one_leaves_no_claim(env: OrmEnvironment, processes: list[DirectUploads], client: Client) -> None:
    upload = await sent(processes, client)
    env.backend.delay("copy", seconds=60)
    first = asyncio.create_task(processes[0].finish(upload.token, Doc.file))
    await eventually(lambda: env.backend.count("copy") == 1)
    second = asyncio.create_task(processes[1].finish(upload.token, Doc.file))
    await asyncio.sleep(0.2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    async with asyncio.timeout(20):
        assert (await second).size == len(CONTENT)
    await env.recover()


@pytest.mark.case("RE-06")
@pytest.mark.parametrize("writes", [False, True])
async def test_a_database_that_fails_while_a_claim_is_kept(
    env: OrmEnvironment,
    processes: list[DirectUploads],
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    writes: bool,
) -> None:
    """What cannot be renewed is lost, and another process may make a copy of its own: nothing worse."""
    monkeypatch.setattr(direct_uploads, "_RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(direct_uploads, "_CLAIM_SECONDS", 1.0)
    upload = await sent(processes, client)
    write, failing = Staging.write, False

    async def broken(*arguments: Any) -> bool:
        result = await write(*arguments) if writes or not failing else False
        if failing:
            raise ConnectionError("the database went away")
        return result

    env.backend.delay("copy", seconds=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "write", broken)
        task = asyncio.create_task(processes[0].finish(upload.token, Doc.file))
        await eventually(lambda: env.backend.count("copy") == 1)
        failing = True
        await eventually(lambda: "could not be renewed" in caplog.text)
        failing = False
        with contextlib.suppress(ConnectionError):
            await task
    file = await processes[1].finish(upload.token, Doc.file)
    await env.add(Doc(id=1, file=file))
    await env.recover()
    await env.check(file_1=CONTENT)
