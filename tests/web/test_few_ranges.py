"""One request for many ranges makes few requests to the storage."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.testing import FaultInjectingBackend
from tests.core.support import MIB, manager_on
from tests.faults.s3_proxy import FaultProxy, fault_proxy
from tests.servers import S3Server
from tests.web.serving import ask, parts_of, serving, stored

CONTENT = bytes(range(251)) * (4 * MIB // 251)
KIB = 1024


def header(*starts: int, length: int = 10) -> str:
    return "bytes=" + ",".join(f"{start}-{start + length - 1}" for start in starts)


@dataclass
class Place:
    manager: StorageManager
    backend: FaultInjectingBackend
    ref: StoredObjectRef


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    backend = FaultInjectingBackend(MemoryStorageBackend())
    async with manager_on(backend) as manager:
        yield Place(manager, backend, await stored(manager, CONTENT))


@pytest.mark.case("RE-10")
@pytest.mark.parametrize(
    ("starts", "requests"),
    [
        ([number * 200 * KIB for number in range(10)], 10),
        ([number * 100 * KIB for number in range(10)], 1),
        ([0, 50 * KIB, MIB, MIB + 128 * KIB, 3 * MIB], 3),
        ([MIB, 0, 50 * KIB], 2),
        ([3 * MIB, 2 * MIB, MIB], 3),
        ([0, 128 * KIB + 10, 256 * KIB + 21], 2),
    ],
)
async def test_near_ranges_are_read_together(place: Place, starts: list[int], requests: int) -> None:
    response = await ask(serving(place.manager, place.ref), range=header(*starts))
    assert response.status_code == 206
    assert parts_of(response) == [(f"bytes {start}-{start + 9}/{len(CONTENT)}", CONTENT[start : start + 10]) for start in starts]
    assert place.backend.count("open") == requests


@pytest.mark.case("RE-10")
@pytest.mark.parametrize("count", [11, 50, 100, 101, 5000])
async def test_more_than_ten_are_ignored(place: Place, count: int) -> None:
    response = await ask(serving(place.manager, place.ref), range=header(*(number * 200 for number in range(count))))
    assert (response.status_code, len(response.content)) == (200, len(CONTENT))
    assert place.backend.count("open") == 1


@pytest.mark.case("RE-10")
async def test_what_is_joined_counts_as_one(place: Place) -> None:
    response = await ask(serving(place.manager, place.ref), range=header(*(number * 20 for number in range(100))))
    assert (response.status_code, response.content) == (206, CONTENT[:1990])
    assert place.backend.count("open") == 1


@pytest.mark.case("RE-10")
async def test_on_s3(moto_server: S3Server) -> None:
    """A hundred ranges of one byte made a hundred GETs."""
    bucket = await asyncio.to_thread(lambda: moto_server.shared_bucket)
    with fault_proxy(moto_server.endpoint_url) as proxy:
        backend = moto_server.backend(bucket, prefix=uuid.uuid4().hex, endpoint_url=proxy.url)
        async with manager_on(backend) as manager:
            ref = await stored(manager, CONTENT)
            app, before = serving(manager, ref), gets(proxy)
            assert (await ask(app, range=header(*range(0, 4 * MIB, 42 * KIB), length=1))).status_code == 200
            assert gets(proxy) == before + 1
            near = await ask(app, range=header(*range(0, MIB, 110 * KIB)))
            assert (near.status_code, len(parts_of(near)), gets(proxy)) == (206, 10, before + 2)
            await manager.delete(ref)


def gets(proxy: FaultProxy) -> int:
    return sum(request.operation == "GetObject" for request in proxy.requests)
