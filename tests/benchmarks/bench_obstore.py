"""S3 through obstore: SeaweedFS on loopback, against bare obstore, the other S3 backend, and what its SDKs do by themselves."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.obstore import ObjectStoreBackend
from tests.benchmarks.bench_s3 import (
    AT_A_TIME,
    BUCKET,
    ENDPOINT,
    LARGE,
    PART_CONCURRENCY,
    PART_SIZE,
    SMALL,
    down_granite,
    down_raw,
    many,
    pieces,
    put_small,
    server,
    small_granite,
    small_raw,
    up_fileobj,
    up_granite,
)
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main
from tests.servers import ACCESS_KEY, SECRET_KEY, seaweedfs


def store() -> Any:
    from obstore.store import from_url

    return from_url(f"s3://{os.environ[BUCKET]}", **options())


def options() -> dict[str, Any]:
    return server().obstore_options()


@asynccontextmanager
async def storage(*, signed: bool = True) -> AsyncIterator[StorageManager]:
    """Give a manager whose store is connected; what it sends is hashed once more for the signature, unless it is not `signed`."""
    given = options()
    config = {**given.pop("config", {}), "unsigned_payload": not signed}
    url = f"s3://{os.environ[BUCKET]}"
    backend = ObjectStoreBackend(url, **given, config=config, part_size=PART_SIZE, part_concurrency=PART_CONCURRENCY)
    async with StorageManager(backends={"s3": backend}, policies={"files": StoragePolicy("files", "s3")}) as manager:
        await put_small(manager, b"warm")
        yield manager


async def hashed(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Hash what passes in a thread, as a manager has to."""
    digest = hashlib.sha256()
    async for chunk in chunks:
        await asyncio.to_thread(digest.update, chunk)
        yield chunk


async def up_ours(meter: Meter, *, signed: bool) -> None:
    """Store one large stream."""
    chunks = pieces(MIB)
    async with storage(signed=signed) as manager, meter.measure(size=LARGE):
        await manager.put_stream(storage_key="files", model_name="file", entity_id="1", field_name="content", stream=chunks)


async def up_bare(meter: Meter, *, checksum: bool) -> None:
    """Store it with obstore's put, from a source that hashes or does not."""
    bare, chunks = store(), pieces(MIB)
    await bare.put_async(f"warm/{uuid.uuid4()}", b"warm")
    source = hashed(chunks) if checksum else chunks
    async with meter.measure(size=LARGE):
        await bare.put_async(f"large/{uuid.uuid4()}", source, chunk_size=PART_SIZE, max_concurrency=PART_CONCURRENCY)


async def up_boto3(meter: Meter) -> None:
    """Store it with boto3 in a thread."""
    client = boto3_client()
    client.put_object(Bucket=os.environ[BUCKET], Key=f"warm/{uuid.uuid4()}", Body=b"warm")
    async with meter.measure(size=LARGE):
        await asyncio.to_thread(client.upload_fileobj, BlockingFile(), os.environ[BUCKET], f"large/{uuid.uuid4()}")


async def down_ours(meter: Meter) -> None:
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


async def down_bare(meter: Meter) -> None:
    """Read the stream of obstore's answer."""
    bare, key = store(), f"large/{uuid.uuid4()}"
    await bare.put_async(key, pieces(MIB))
    async with meter.measure(size=LARGE):
        size = 0
        async for chunk in (await bare.get_async(key)).stream(min_chunk_size=MIB):
            size += len(chunk)
    assert size == LARGE


async def small_ours(meter: Meter, *, count: int) -> None:
    """Store small objects."""
    content = os.urandom(SMALL)
    async with storage() as manager:
        await many(AT_A_TIME, lambda: put_small(manager, content))
        async with meter.measure(operations=count):
            await many(count, lambda: put_small(manager, content))


async def small_bare(meter: Meter, *, count: int) -> None:
    """Store them with obstore's put, exclusively and hashed, as ours are."""
    bare, content = store(), os.urandom(SMALL)

    async def put() -> None:
        hashlib.sha256(content).hexdigest()
        await bare.put_async(f"small/{uuid.uuid4()}", content, mode="create")

    await many(AT_A_TIME, put)
    async with meter.measure(operations=count):
        await many(count, put)


async def small_boto3(meter: Meter, *, count: int) -> None:
    """Store them with boto3, each in a thread."""
    client, content, bucket = boto3_client(), os.urandom(SMALL), os.environ[BUCKET]

    async def put() -> None:
        await asyncio.to_thread(partial(client.put_object, Bucket=bucket, Key=f"small/{uuid.uuid4()}", Body=content))

    await many(AT_A_TIME, put)
    async with meter.measure(operations=count):
        await many(count, put)


async def up_alchemy(meter: Meter) -> None:
    """Store the large stream with advanced-alchemy's store on obstore, which computes no checksum."""
    backend = alchemy()
    await backend.save_object_async(alchemy_file(backend), b"warm")
    chunks = pieces(MIB)
    async with meter.measure(size=LARGE):
        await backend.save_object_async(alchemy_file(backend), chunks, chunk_size=PART_SIZE, max_concurrency=PART_CONCURRENCY)


async def small_alchemy(meter: Meter, *, count: int) -> None:
    """Store small objects with it."""
    backend, content = alchemy(), os.urandom(SMALL)
    await many(AT_A_TIME, lambda: backend.save_object_async(alchemy_file(backend), content))
    async with meter.measure(operations=count):
        await many(count, lambda: backend.save_object_async(alchemy_file(backend), content))


def alchemy() -> Any:
    from advanced_alchemy.types.file_object.backends.obstore import ObstoreBackend

    return ObstoreBackend("bench", store())


def alchemy_file(backend: Any) -> Any:
    from advanced_alchemy.types import FileObject

    return FileObject(backend=backend, filename=str(uuid.uuid4()))


async def up_fastapi_storages(meter: Meter) -> None:
    """Store the large file with fastapi-storages on boto3, which blocks: in a thread; it computes no checksum."""
    storage, file = fastapi_storage(), BlockingFile()
    storage.write(io.BytesIO(b"warm"), f"warm-{uuid.uuid4()}")
    async with meter.measure(size=LARGE):
        await asyncio.to_thread(storage.write, file, f"large-{uuid.uuid4()}")


async def small_fastapi_storages(meter: Meter, *, count: int) -> None:
    """Store small files with it, each in a thread."""
    storage, content = fastapi_storage(), os.urandom(SMALL)

    async def put() -> None:
        await asyncio.to_thread(storage.write, io.BytesIO(content), str(uuid.uuid4()))

    await many(AT_A_TIME, put)
    async with meter.measure(operations=count):
        await many(count, put)


def fastapi_storage() -> Any:
    from fastapi_storages import S3Storage

    class Storage(S3Storage):
        AWS_ACCESS_KEY_ID = ACCESS_KEY
        AWS_SECRET_ACCESS_KEY = SECRET_KEY
        AWS_S3_BUCKET_NAME = os.environ[BUCKET]
        AWS_S3_ENDPOINT_URL = urlsplit(os.environ[ENDPOINT]).netloc
        AWS_S3_USE_SSL = False

    return Storage()


async def up_sqlalchemy_file(meter: Meter) -> None:
    """Store the large file with sqlalchemy-file on libcloud, which blocks: in a thread; it computes no checksum."""
    save, file = sqlalchemy_file(), BlockingFile()
    save(f"warm-{uuid.uuid4()}", iter([b"warm"]))
    async with meter.measure(size=LARGE):
        await asyncio.to_thread(save, f"large-{uuid.uuid4()}", iter(partial(file.read, MIB), b""))


async def small_sqlalchemy_file(meter: Meter, *, count: int) -> None:
    """Store small files with it, one at a time: threads that share its connection spoil each other's signatures."""
    save, content, turn = sqlalchemy_file(), os.urandom(SMALL), asyncio.Lock()

    async def put() -> None:
        async with turn:
            await asyncio.to_thread(save, str(uuid.uuid4()), iter([content]))

    await many(AT_A_TIME, put)
    async with meter.measure(operations=count):
        await many(count, put)


def sqlalchemy_file() -> Any:
    from libcloud.storage.providers import get_driver
    from libcloud.storage.types import Provider
    from sqlalchemy_file.storage import StorageManager as Files

    address = urlsplit(os.environ[ENDPOINT])
    driver = get_driver(Provider.MINIO)(ACCESS_KEY, SECRET_KEY, secure=False, host=address.hostname, port=address.port)
    Files.add_storage("bench", driver.get_container(os.environ[BUCKET]))
    return partial(Files.save_file, upload_storage="bench")


def where_installed(package: str, name: str, contender: Contender) -> dict[str, Contender]:
    """Return a contender of a package that this project does not need, where it is there."""
    if importlib.util.find_spec(package) is not None:
        return {name: contender}
    if __name__ == "__main__":  # not in each contender's process
        print(f"{name} is left out: {package} is not installed", file=sys.stderr)
    return {}


class BlockingFile:
    """As much random content as the others store, in a blocking file."""

    def __init__(self) -> None:
        self._left = LARGE
        self._block = os.urandom(PART_SIZE)

    def read(self, size: int = -1) -> bytes:
        count = min(size, self._left, len(self._block))
        self._left -= count
        return self._block[:count]

    def seek(self, *_: int) -> None:
        """Stay at the start, to which fastapi-storages goes back first."""


def boto3_client() -> Any:
    session = boto3.Session(**server().session_kwargs)
    config = Config(max_pool_connections=AT_A_TIME, s3={"addressing_style": "path"})
    return session.client("s3", endpoint_url=os.environ[ENDPOINT], config=config)


COMPARISONS = [
    Comparison(
        "obstore: 256 MiB up",
        {
            "granite on obstore": Contender(up_ours, signed=True),
            "granite on obstore, unsigned_payload": Contender(up_ours, signed=False),
            "bare obstore, SHA-256 in its source": Contender(up_bare, checksum=True),
            "bare obstore": Contender(up_bare, checksum=False),
            "granite on aioboto3": Contender(up_granite),
            **where_installed("advanced_alchemy", "advanced-alchemy on obstore", Contender(up_alchemy)),
            **where_installed("fastapi_storages", "fastapi-storages in a thread", Contender(up_fastapi_storages)),
            **where_installed("sqlalchemy_file", "sqlalchemy-file in a thread", Contender(up_sqlalchemy_file)),
            "aioboto3 upload_fileobj": Contender(up_fileobj),
            "boto3 in a thread": Contender(up_boto3),
        },
        baseline="bare obstore, SHA-256 in its source",
        reach=1 / 1.15,
        max_memory=PART_SIZE * (PART_CONCURRENCY + 2) + 48 * MIB,
        max_stall=0.03,
    ),
    Comparison(
        "obstore: 256 MiB down",
        {
            "granite on obstore": Contender(down_ours),
            "bare obstore": Contender(down_bare),
            "granite on aioboto3": Contender(down_granite),
            "aiobotocore's raw body": Contender(down_raw),
        },
        baseline="bare obstore",
        reach=1 / 1.15,
    ),
    Comparison(
        "obstore: 4 KiB up, 32 at a time",
        {
            "granite on obstore": Contender(small_ours, count=2000),
            "bare obstore, exclusive, SHA-256": Contender(small_bare, count=2000),
            "granite on aioboto3": Contender(small_granite, count=2000),
            **where_installed("advanced_alchemy", "advanced-alchemy on obstore", Contender(small_alchemy, count=2000)),
            **where_installed("fastapi_storages", "fastapi-storages in threads", Contender(small_fastapi_storages, count=500)),
            **where_installed("sqlalchemy_file", "sqlalchemy-file, one at a time", Contender(small_sqlalchemy_file, count=500)),
            "aiobotocore put_object": Contender(small_raw, count=2000),
            "boto3 in threads": Contender(small_boto3, count=2000),
        },
        baseline="bare obstore, exclusive, SHA-256",
        reach=1 / 1.15,
    ),
]


if __name__ == "__main__":
    with seaweedfs() as started:
        os.environ[ENDPOINT], os.environ[BUCKET] = started.endpoint_url, started.new_bucket()
        main(COMPARISONS)
