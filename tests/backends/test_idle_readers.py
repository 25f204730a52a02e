"""Readers that are open and not read, as those of clients that stopped reading: no other call of the backend waits for them."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator

import pytest

from granite_storage.backends._resuming import open_resuming
from granite_storage.backends.base import ObjectReader
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.exceptions import BackendError, BackendUnavailableError
from tests.servers import S3Server

MIB = 1 << 20
CONTENT = os.urandom(MIB) * 16  # more than the buffers of a connection hold
PLACES = 3


@pytest.fixture
async def backend(seaweedfs_server: S3Server) -> AsyncIterator[S3StorageBackend]:
    bucket = await asyncio.to_thread(lambda: seaweedfs_server.shared_bucket)
    backend = seaweedfs_server.backend(
        bucket, prefix=uuid.uuid4().hex, max_pool_connections=PLACES, pool_timeout=10, max_attempts=1
    )
    await backend.put_bytes("large", CONTENT)
    yield backend
    await backend.delete("large")
    await backend.aclose()


async def rest_of(reader: ObjectReader, pause: float = 0, size: int = MIB // 4) -> bytes:
    pieces = []
    while piece := await reader.read(size):
        pieces.append(piece)
        await asyncio.sleep(pause)
    await reader.aclose()
    return b"".join(pieces)


@pytest.mark.case("RE-04")
@pytest.mark.parametrize("begun", [0, 1000], ids=["not read at all", "read at first"])
async def test_other_calls_go_on(backend: S3StorageBackend, begun: int) -> None:
    """They take the connections of those that are not being read, which ask for the rest when they are read on."""
    readers = [await open_resuming(backend, "large", offset=number) for number in range(PLACES)]
    heads = [await reader.read(begun) for reader in readers]
    async with asyncio.timeout(5):
        assert (await backend.stat("large")).size == len(CONTENT)
        await asyncio.gather(*(backend.exists(f"none-{number}") for number in range(2 * PLACES)))
        await backend.put_bytes("other", bytes(6 * MIB))
        await backend.delete("other")
    rests = await asyncio.gather(*map(rest_of, readers))
    for number in range(PLACES):
        assert heads[number] + rests[number] == CONTENT[number:]


@pytest.mark.case("RE-04")
async def test_more_readers_than_connections(backend: S3StorageBackend) -> None:
    readers = [await open_resuming(backend, "large") for _ in range(3 * PLACES)]
    contents = await asyncio.gather(*(rest_of(reader, pause=0.01) for reader in readers))
    assert all(content == CONTENT for content in contents)


@pytest.mark.case("RE-04")
async def test_a_call_beside_readers_that_never_rest(backend: S3StorageBackend) -> None:
    """Their connections are taken between two reads, once the call has waited for a second."""
    readers = [await open_resuming(backend, "large") for _ in range(PLACES)]
    tasks = [asyncio.create_task(rest_of(reader, pause=0.002, size=2048)) for reader in readers]  # 16 s and more
    try:
        async with asyncio.timeout(6):
            for _ in range(2):
                assert await backend.exists("large")
        assert not [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for reader in readers:
            await reader.aclose()


async def test_replaced_while_its_reader_rested(backend: S3StorageBackend) -> None:
    readers = [await open_resuming(backend, "large") for _ in range(PLACES)]
    for reader in readers:
        await reader.read(1000)
    await asyncio.gather(*(backend.exists("none") for _ in range(PLACES)))
    await backend.delete("large")
    await backend.put_bytes("large", bytes(len(CONTENT)))
    for reader in readers:
        with pytest.raises(BackendError, match=r"replaced|cut off"):
            await rest_of(reader)
        await reader.aclose()


async def test_the_wait_ends(seaweedfs_server: S3Server) -> None:
    """Calls that are busy keep their connections, and one that waits for too long says so; cancelled ones leave no gap."""
    bucket = await asyncio.to_thread(lambda: seaweedfs_server.shared_bucket)
    backend = seaweedfs_server.backend(bucket, prefix=uuid.uuid4().hex, max_pool_connections=1, pool_timeout=0.3)
    client = await backend._clients.get()
    busy = await client._connections.lease()
    with pytest.raises(BackendUnavailableError, match=r"became free within 0\.3 s"):
        await backend.exists("a")
    waiting = [asyncio.create_task(backend.exists("a")) for _ in range(5)]
    await asyncio.sleep(0)
    for number, task in enumerate(waiting):
        if number % 2 == 0:
            task.cancel()
    busy.release()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [result for result in results if not isinstance(result, asyncio.CancelledError)] == [False, False]
    assert await backend.exists("a") is False
    await backend.aclose()
