"""`adopt` beside workers: what one of them is deleting is refused, and what it was to delete soon stays for a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import timedelta

import pytest

from granite_storage import StoredObjectRef
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import StorageJournal
from granite_storage.orm.journal import intents
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.orm.journal.sharing import delete, shared, steps_are_watched, worker
from tests.orm.journal.test_recovery import expire, journal_of, rows


@pytest.mark.parametrize("step", ["_check", "_remove", "_conclude"])
async def test_what_a_worker_is_deleting(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """It is refused though the object is there still, and nothing is left that a row could rely on."""
    monkeypatch.setattr(intents, "_ADOPTION_PATIENCE", 0.2)
    ref = await shared(env)
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with worker(env, step):
            with pytest.raises(StaleAttachmentError, match="a worker is deleting the object"):
                if step == "_conclude":
                    await env.backend.put_bytes(ref.location, b"a late one", content_type="text/plain")
                await journal_of(env).adopt([ref])
            assert [row for row in await rows(env, "intent") if row.kind == "delete"] == []
            if step == "_conclude":
                await env.backend.delete(ref.location)


async def test_what_a_worker_keeps(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at what one row has released and another one holds; afterwards the object is adopted."""
    ref = await shared(env)
    await env.sql("INSERT INTO doc (id, title, file) SELECT 2, title, file FROM doc")
    await delete(env, 1)
    with steps_are_watched(monkeypatch):
        async with worker(env, "_check") as looking:
            adopting = asyncio.create_task(journal_of(env).adopt([ref]))
            done, _ = await asyncio.wait([adopting], timeout=0.5)
            assert not done
            await looking.finish()
            await adopting
    await delete(env, 2)
    await env.recover()
    assert await env.objects() == set()


async def test_an_upload_whose_lease_ends_soon(env: OrmEnvironment) -> None:
    """Its own intent is renewed as well: else a worker would delete the object before the row is loaded."""
    stored = await file("a").store(Doc.file)
    await expire(env)
    await journal_of(env).adopt([stored.ref])
    assert (await journal_of(env).recover()).claimed == 0
    assert await stored.exists()
    await env.recover()
    assert not await stored.exists()


async def test_an_upload_whose_transaction_is_rolled_back(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its lease, the rollback does not delete the object while it is looked for."""
    stored = await file("a").store(Doc.file)
    [upload] = [row.id for row in await rows(env, "intent")]
    await journal_of(env).intents.renew([upload], timedelta(days=30))
    require, calls = StorageJournal._require_objects, []

    async def rolled_back(journal: StorageJournal, refs: Iterable[StoredObjectRef]) -> None:
        await require(journal, refs)
        calls.append(1)
        if len(calls) == 2:
            await journal.settle([upload])

    monkeypatch.setattr(StorageJournal, "_require_objects", rolled_back)
    await journal_of(env).adopt([stored.ref])
    assert len(calls) == 2
    assert await stored.exists()
    await env.recover()


async def test_what_is_to_be_deleted_soon(env: OrmEnvironment) -> None:
    ref = await shared(env)
    await delete(env, 1)
    await journal_of(env).adopt([ref])
    assert (await journal_of(env).recover()).claimed == 0
    await env.recover()
    assert await env.objects() == set()
