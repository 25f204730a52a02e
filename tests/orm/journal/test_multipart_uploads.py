"""Uploads in parts: the journal keeps their ids, and recovery leaves no part behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import insert, update

from granite_storage import ObjectNotFoundError
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.orm import Attachment
from granite_storage.orm.journal.intents import new_id
from granite_storage.orm.journal.tables import UPLOAD, clock
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, orm_environment
from tests.servers import S3Server

MIB = 1 << 20
PART = 5 * MIB


@pytest.fixture(params=["plain", "prefixed"])
async def env(request: pytest.FixtureRequest, database: Database, seaweedfs_server: S3Server) -> AsyncIterator[OrmEnvironment]:
    """An environment whose objects are at S3, with and without a prefix."""
    async with seaweedfs_server.bucket() as bucket:
        prefix = "some/prefix" if request.param == "prefixed" else ""
        backend = seaweedfs_server.backend(bucket, prefix=prefix, part_size=PART)
        async with orm_environment(database, backend=backend, journaled=True, max_size=64 * MIB) as env:
            yield env
            await env.check_recovery()


async def uploads(env: OrmEnvironment) -> list[str]:
    """Return the ids of the uploads that the server knows of."""
    backend: Any = env.backend.inner
    assert isinstance(backend, S3StorageBackend)
    async with backend.client() as client:
        answer = await client.list_multipart_uploads(Bucket=backend.bucket)
    return [upload["UploadId"] for upload in answer.get("Uploads", ())]


async def intents(env: OrmEnvironment) -> list[Any]:
    return await env.journal_rows("intent")


async def test_the_id_is_kept_before_the_parts(env: OrmEnvironment) -> None:
    go = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        for _ in range(12):
            yield bytes(MIB)
        await go.wait()
        yield b"end"

    saving = asyncio.create_task(env.add(Doc(id=1, file=Attachment(slow()))))
    async with asyncio.timeout(60):
        while not (kept := [row.upload_id for row in await intents(env) if row.upload_id]):  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.05)
    assert kept == await uploads(env)
    go.set()
    await saving
    assert await uploads(env) == []
    assert await intents(env) == []


@pytest.mark.parametrize("known", [True, False], ids=["id kept", "died before"])
async def test_what_a_crash_leaves_is_aborted(env: OrmEnvironment, known: bool) -> None:
    """The program died between two parts, with the id of the upload in the journal or just before that."""
    assert env.journal is not None
    backend: Any = env.backend.inner
    location, key = "doc/1/file/left", "/".join(filter(None, [backend.prefix, "doc/1/file/left"]))
    async with backend.client() as client:
        answer = await client.create_multipart_upload(Bucket=backend.bucket, Key=key)
        part = {"Bucket": backend.bucket, "Key": key, "UploadId": answer["UploadId"]}
        await client.upload_part(**part, PartNumber=1, Body=bytes(PART))
    intent = {"id": new_id(), "kind": UPLOAD, "backend": "store", "location": location, "due": clock(-1.0)}
    async with env.uploads() as (connection, tables):
        kept = answer["UploadId"] if known else None
        await connection.execute(insert(tables.intent).values(**intent, upload_id=kept))
    assert await uploads(env) == [answer["UploadId"]]
    assert (await env.journal.recover()).deleted == 1
    assert await uploads(env) == []


async def test_an_upload_whose_intent_is_gone_stops(env: OrmEnvironment) -> None:
    """A worker has reclaimed it before its first part: it is aborted, and nothing of it stays."""
    assert env.journal is not None
    journal = env.journal

    async def reclaimed() -> AsyncIterator[bytes]:
        async with env.uploads() as (connection, tables):
            await connection.execute(update(tables.intent).values(due=clock(-1.0)))
        await journal.recover()
        for _ in range(12):
            yield bytes(MIB)

    with pytest.raises(Exception, match="reclaimed"):
        await env.add(Doc(id=1, file=Attachment(reclaimed())))
    assert await uploads(env) == []


async def test_aborting_what_is_not_there(env: OrmEnvironment) -> None:
    backend: Any = env.backend.inner
    await backend.abort_upload("doc/1/file/nothing", None)
    with pytest.raises(ObjectNotFoundError):
        await backend.stat("doc/1/file/nothing")
