"""What 1,000 URLs cost: signed for S3 beside the SDKs and obstore, signed by the library's signer, and public."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import aioboto3
import boto3
import obstore
from obstore.store import S3Store

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.policies import PublicURL
from granite_storage.signing import UrlSigner
from tests.benchmarks.harness import Comparison, Contender, Meter, main

COUNT = 1000
ROUNDS = 5
HOUR = timedelta(hours=1)
KEYS = {"aws_access_key_id": "AKIDEXAMPLE", "aws_secret_access_key": "s" * 40, "region_name": "eu-central-1"}
BUCKET = "my-bucket"
ANSWER = {"ResponseContentType": "image/jpeg", "ResponseContentDisposition": 'inline; filename="holiday.jpg"'}


def locations() -> list[str]:
    return [f"files/photo/{number}/file/0190b6f3c1d27b3e8f0a5d4c3b2a{number:04d}-holiday.jpg" for number in range(COUNT)]


def refs(key: str) -> list[StoredObjectRef]:
    checksum = "sha256:" + "a" * 64
    return [
        StoredObjectRef(key, key, location, 100_000, checksum, "image/jpeg", "holiday.jpg", "2026-11-29T00:00:00.000000Z")
        for location in locations()
    ]


@asynccontextmanager
async def storage() -> AsyncIterator[StorageManager]:
    manager = StorageManager(
        backends={"s3": S3StorageBackend(BUCKET, session=aioboto3.Session(**KEYS)), "memory": MemoryStorageBackend()},
        policies={
            "s3": StoragePolicy("s3", "s3", public=PublicURL("https://cdn.example.com")),
            "memory": StoragePolicy("memory", "memory"),
        },
        url_signer=UrlSigner("https://example.com/files", keys={"2026": "s" * 32}),
    )
    async with manager:
        await manager.urls(refs("s3")[:1], expires_in=HOUR)
        yield manager


class Processor:
    """Notes the least processor time of the rounds, in milliseconds."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._least = float("inf")

    def __enter__(self) -> None:
        self._began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self._least = min(self._least, (time.process_time() - self._began) * 1000)
        self._meter.note("cpu_ms", round(self._least, 2))


async def granite(meter: Meter, *, key: str, stable: bool) -> None:
    wanted, processor = refs(key), Processor(meter)
    async with storage() as manager, meter.measure(operations=COUNT * ROUNDS, ticking=False):
        for _ in range(ROUNDS):
            with processor:
                urls = await manager.urls(wanted, expires_in=HOUR, disposition="inline", stable_for=HOUR if stable else None)
    assert len(set(urls)) == COUNT


async def granite_public(meter: Meter) -> None:
    wanted, processor = refs("s3"), Processor(meter)
    async with storage() as manager, meter.measure(operations=COUNT * ROUNDS, ticking=False):
        for _ in range(ROUNDS):
            with processor:
                urls = [manager.public_url(ref) for ref in wanted]
    assert len(set(urls)) == COUNT


async def by_boto3(meter: Meter) -> None:
    client, wanted, processor = boto3.client("s3", **KEYS), locations(), Processor(meter)
    async with meter.measure(operations=COUNT * ROUNDS, ticking=False):
        for _ in range(ROUNDS):
            with processor:
                for key in wanted:
                    client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key, **ANSWER}, ExpiresIn=3600)


async def by_aioboto3(meter: Meter) -> None:
    wanted, processor = locations(), Processor(meter)
    async with aioboto3.Session(**KEYS).client("s3") as client, meter.measure(operations=COUNT * ROUNDS, ticking=False):
        for _ in range(ROUNDS):
            with processor:
                for key in wanted:
                    await client.generate_presigned_url(
                        "get_object", Params={"Bucket": BUCKET, "Key": key, **ANSWER}, ExpiresIn=3600
                    )


async def by_obstore(meter: Meter) -> None:
    """Signs no headers of the answer, and so less."""
    store, wanted, processor = S3Store(BUCKET, **_obstore_keys()), locations(), Processor(meter)
    async with meter.measure(operations=COUNT * ROUNDS, ticking=False):
        for _ in range(ROUNDS):
            with processor:
                await obstore.sign_async(store, "GET", wanted, HOUR)


def _obstore_keys() -> dict[str, str]:
    names = {"aws_access_key_id": "access_key_id", "aws_secret_access_key": "secret_access_key", "region_name": "region"}
    return {names[name]: value for name, value in KEYS.items()}


COMPARISONS = [
    Comparison(
        "1,000 URLs of S3",
        {
            "granite": Contender(granite, key="s3", stable=False),
            "granite, stable": Contender(granite, key="s3", stable=True),
            "boto3": Contender(by_boto3),
            "aioboto3": Contender(by_aioboto3),
            "obstore, no headers": Contender(by_obstore),
        },
        baseline="aioboto3",
        reach=20,
    ),
    Comparison(
        "1,000 URLs",
        {
            "granite, UrlSigner": Contender(granite, key="memory", stable=True),
            "granite, public": Contender(granite_public),
        },
        baseline="granite, UrlSigner",
    ),
]

if __name__ == "__main__":
    main(COMPARISONS)
