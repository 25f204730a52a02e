"""S3: SeaweedFS on loopback, against what aioboto3 and aiobotocore do by themselves."""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aioboto3
import aioboto3.s3.inject

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.s3 import S3StorageBackend
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main
from tests.servers import S3Server, seaweedfs

ENDPOINT = "GRANITE_BENCH_S3_ENDPOINT"
BUCKET = "GRANITE_BENCH_S3_BUCKET"
LARGE = 256 * MIB
SMALL = 4096
AT_A_TIME = 32
PART_SIZE = 8 * MIB
PART_CONCURRENCY = 4


def server() -> S3Server:
    return S3Server("seaweedfs", os.environ[ENDPOINT])


def backend() -> S3StorageBackend:
    return server().backend(os.environ[BUCKET], part_size=PART_SIZE, part_concurrency=PART_CONCURRENCY)


@asynccontextmanager
async def storage(*, warm: bool = True) -> AsyncIterator[StorageManager]:
    """Give a manager, whose client exists already if it is to be warm."""
    manager = StorageManager(backends={"s3": backend()}, policies={"files": StoragePolicy("files", "s3")})
    async with manager:
        if warm:
            await put_small(manager, b"warm")
        yield manager


@asynccontextmanager
async def plain_client() -> AsyncIterator[Any]:
    """Give a client as aioboto3 makes it."""
    async with server().session.client("s3", endpoint_url=os.environ[ENDPOINT]) as client:
        await client.put_object(Bucket=os.environ[BUCKET], Key=f"warm/{uuid.uuid4()}", Body=b"warm")
        yield client


async def put_small(manager: StorageManager, content: bytes) -> None:
    await manager.put_bytes(storage_key="files", model_name="file", entity_id="1", field_name="content", content=content)


def pieces(size: int) -> AsyncIterator[bytes]:
    """Make a few random chunks at once, and stream them again and again: making them is not what is measured."""
    different = [os.urandom(size) for _ in range(4)]

    async def stream() -> AsyncIterator[bytes]:
        for chunk in itertools.islice(itertools.cycle(different), LARGE // size):
            yield chunk

    return stream()


class RandomFile:
    """As much in a file with an async `read`."""

    def __init__(self) -> None:
        self._left = LARGE
        self._block = os.urandom(PART_SIZE)

    async def read(self, size: int = -1) -> bytes:
        count = min(size, self._left, len(self._block))
        self._left -= count
        return self._block[:count]


async def up_granite(meter: Meter) -> None:
    """Store one large stream."""
    chunks = pieces(MIB)
    async with storage() as manager, meter.measure(size=LARGE):
        await manager.put_stream(storage_key="files", model_name="file", entity_id="1", field_name="content", stream=chunks)


async def up_backend(meter: Meter) -> None:
    """Store it without a manager, who hashes it besides."""
    bare, chunks = backend(), pieces(MIB)
    await bare.put_bytes(f"warm/{uuid.uuid4()}", b"warm")
    async with meter.measure(size=LARGE):
        await bare.put_stream(f"large/{uuid.uuid4()}", chunks)
    await bare.aclose()


async def up_fileobj(meter: Meter) -> None:
    """Store it with what aioboto3 has for it."""
    file = RandomFile()
    async with plain_client() as client, meter.measure(size=LARGE):
        await client.upload_fileobj(file, os.environ[BUCKET], f"large/{uuid.uuid4()}")


async def down_granite(meter: Meter) -> None:
    """Read one large object."""
    async with storage() as manager:
        ref = await manager.put_stream(
            storage_key="files", model_name="file", entity_id="1", field_name="content", stream=pieces(MIB)
        )
        async with meter.measure(size=LARGE), manager.open(ref) as reader:
            size = 0
            async for chunk in reader:
                size += len(chunk)
        assert size == LARGE


async def down_backend(meter: Meter) -> None:
    """Read it without a manager."""
    bare = backend()
    location = f"large/{uuid.uuid4()}"
    await bare.put_stream(location, pieces(MIB))
    async with meter.measure(size=LARGE):
        reader = await bare.open(location)
        size = 0
        while chunk := await reader.read(MIB):
            size += len(chunk)
        await reader.aclose()
    assert size == LARGE
    await bare.aclose()


async def down_raw(meter: Meter) -> None:
    """Read the body of aiobotocore's answer."""
    bare = backend()
    location = f"large/{uuid.uuid4()}"
    await bare.put_stream(location, pieces(MIB))
    await bare.aclose()
    async with plain_client() as client, meter.measure(size=LARGE):
        answer = await client.get_object(Bucket=os.environ[BUCKET], Key=location)
        size = 0
        async for chunk in answer["Body"].iter_chunks(MIB):
            size += len(chunk)
    assert size == LARGE


async def many(count: int, put: Callable[[], Awaitable[object]]) -> None:
    """Put objects, so many at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for _ in numbers:
            await put()

    await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))


async def small_granite(meter: Meter, *, count: int) -> None:
    """Store small objects."""
    content = os.urandom(SMALL)
    async with storage() as manager:
        await many(AT_A_TIME, lambda: put_small(manager, content))
        async with meter.measure(operations=count):
            await many(count, lambda: put_small(manager, content))


async def small_backend(meter: Meter, *, count: int) -> None:
    """Store them without a manager."""
    content = os.urandom(SMALL)
    bare = backend()
    await many(AT_A_TIME, lambda: bare.put_bytes(f"small/{uuid.uuid4()}", content))
    async with meter.measure(operations=count):
        await many(count, lambda: bare.put_bytes(f"small/{uuid.uuid4()}", content))
    await bare.aclose()


async def small_raw(meter: Meter, *, count: int) -> None:
    """Store them with aiobotocore's bare call."""
    content, bucket = os.urandom(SMALL), os.environ[BUCKET]
    async with plain_client() as client:
        await many(AT_A_TIME, lambda: client.put_object(Bucket=bucket, Key=f"small/{uuid.uuid4()}", Body=content))
        async with meter.measure(operations=count):
            await many(count, lambda: client.put_object(Bucket=bucket, Key=f"small/{uuid.uuid4()}", Body=content))


async def first_granite(meter: Meter) -> None:
    """Store a small object with a client that is still to be made; the imports are done."""
    async with storage(warm=False) as manager, meter.measure():
        await put_small(manager, b"first")


async def first_aioboto3(meter: Meter) -> None:
    """Do the same with a client that aioboto3 makes."""
    session = aioboto3.Session(**server().session_kwargs)
    async with meter.measure(), session.client("s3", endpoint_url=os.environ[ENDPOINT]) as client:
        await client.put_object(Bucket=os.environ[BUCKET], Key=f"small/{uuid.uuid4()}", Body=b"first")


COMPARISONS = [
    Comparison(
        "S3: 256 MiB up",
        {
            "granite": Contender(up_granite),
            "granite, backend alone": Contender(up_backend),
            "aioboto3 upload_fileobj": Contender(up_fileobj),
        },
        baseline="aioboto3 upload_fileobj",
        reach=1.1,
        max_memory=PART_SIZE * PART_CONCURRENCY + 48 * MIB,
        max_stall=0.03,
    ),
    Comparison(
        "S3: 256 MiB down",
        {
            "granite": Contender(down_granite),
            "granite, backend alone": Contender(down_backend),
            "aiobotocore's raw body": Contender(down_raw),
        },
        baseline="aiobotocore's raw body",
        reach=1 / 1.1,
    ),
    Comparison(
        "S3: 4 KiB up, 32 at a time",
        {
            "granite": Contender(small_granite, count=2000),
            "granite, backend alone": Contender(small_backend, count=2000),
            "aiobotocore put_object": Contender(small_raw, count=2000),
        },
        baseline="aiobotocore put_object",
        reach=1 / 1.1,
    ),
    Comparison(
        "S3: first call",
        {"granite": Contender(first_granite), "aioboto3": Contender(first_aioboto3)},
        baseline="aioboto3",
        max_stall=0.08,
    ),
]


if __name__ == "__main__":
    with seaweedfs() as started:
        os.environ[ENDPOINT], os.environ[BUCKET] = started.endpoint_url, started.new_bucket()
        main(COMPARISONS)
