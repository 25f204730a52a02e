"""Range requests, by the tables of RFC 9110, section 14."""

from __future__ import annotations

import asyncio
import tracemalloc

import httpx
import pytest

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.web._conditional import requested_ranges
from tests.core.support import MIB, manager_on, many
from tests.processor_time import fastest
from tests.web.serving import HUNDRED, ask, parts_of, server, serving, stored

SATISFIABLE = [
    ("bytes=0-0", 0, 1),
    ("bytes=-1", 99, 100),
    ("bytes=0-99", 0, 100),
    ("bytes=10-19", 10, 20),
    ("bytes=99-", 99, 100),
    ("bytes=-500", 0, 100),
    ("bytes=0-999999", 0, 100),
    ("bytes=5-" + "9" * 5000, 5, 100),
    ("bytes=-" + "9" * 5000, 0, 100),
    ("bytes=000000000000000000000000000001-2", 1, 3),
    ("BYTES=1-2", 1, 3),
    ("bytes= 1-2 ", 1, 3),
    ("bytes=,1-2,,", 1, 3),
    ("bytes=200-,1-2", 1, 3),
]
IGNORED = [
    "",
    "bytes",
    "bytes=",
    "bytes=,",
    "bytes=-",
    "bytes=--1",
    "bytes=1",
    "bytes=2-1",
    "bytes=1-2,x",
    "bytes=1_0-2_0",
    "bytes=+1-2",
    "bytes=0x1-2",
    "bytes=1.0-2",
    "bytes=1 -2",
    "bytes=1- 2",
    "bytes =1-2",
    "bytes=\u0661-\u0662",
    "items=0-1",
    "bytes=0-1,5-2",
    "bytes=0-1;2-3",
]
UNSATISFIABLE = ["bytes=-0", "bytes=100-", "bytes=100-200", "bytes=" + "9" * 5000 + "-", "bytes=100-,-0,200-300"]


@pytest.fixture
async def ref(manager: StorageManager) -> StoredObjectRef:
    return await stored(manager, HUNDRED, "image/png")


@pytest.mark.case("HTP-01", "HTP-03")
@pytest.mark.parametrize(("header", "start", "stop"), SATISFIABLE, ids=[one[0][:30] for one in SATISFIABLE])
async def test_one_range(manager: StorageManager, ref: StoredObjectRef, header: str, start: int, stop: int) -> None:
    response = await ask(serving(manager, ref), range=header)
    assert response.status_code == 206
    assert response.content == HUNDRED[start:stop]
    assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/100"
    assert response.headers["content-length"] == str(stop - start)
    assert response.headers["content-type"] == "image/png"


@pytest.mark.case("HTP-02")
@pytest.mark.parametrize("header", UNSATISFIABLE, ids=lambda header: header[:30])
async def test_nothing_to_satisfy(manager: StorageManager, ref: StoredObjectRef, header: str) -> None:
    response = await ask(serving(manager, ref, immutable=True), range=header)
    assert (response.status_code, response.content) == (416, b"")
    assert response.headers["content-range"] == "bytes */100"
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.case("HTP-02")
@pytest.mark.parametrize(("header", "status"), [("bytes=0-", 416), ("bytes=-0", 416), ("bytes=-5", 200), ("bytes=0-0", 416)])
async def test_an_empty_object(manager: StorageManager, header: str, status: int) -> None:
    response = await ask(serving(manager, await stored(manager, b"")), range=header)
    assert (response.status_code, response.content) == (status, b"")
    assert response.headers["content-length"] == "0"
    assert response.headers.get("content-range") == ("bytes */0" if status == 416 else None)


@pytest.mark.parametrize("header", IGNORED)
def test_a_malformed_header(header: str) -> None:
    assert requested_ranges(header, 100) is None


async def test_a_malformed_header_is_ignored(manager: StorageManager, ref: StoredObjectRef) -> None:
    response = await ask(serving(manager, ref), range="bytes=1_0-2_0")
    assert (response.status_code, response.content) == (200, HUNDRED)
    assert "content-range" not in response.headers


@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_ranges_are_for_get(manager: StorageManager, ref: StoredObjectRef, method: str) -> None:
    response = await ask(serving(manager, ref), method, range="bytes=0-0")
    assert response.status_code == 200
    assert response.headers["content-length"] == "100"
    assert response.content == (b"" if method == "HEAD" else HUNDRED)


@pytest.mark.time_bound
@pytest.mark.case("HTP-07")
@pytest.mark.parametrize("count", [99, 10_000, 100_000])
@pytest.mark.parametrize("spec", ["0-", "{0}-{1}", "-{1}", "{0}-", "x"])
def test_many_ranges_take_no_time(spec: str, count: int) -> None:
    header = "bytes=" + ",".join(spec.format(1000 * number, 1000 * number + 1) for number in range(count))
    ranges = requested_ranges(header, 10**12)
    assert fastest(lambda: requested_ranges(header, 10**12)) < 0.05
    assert ranges is None or len(ranges) <= 100
    assert ranges is None or sum(one.stop - one.start for one in ranges) <= 10**12


@pytest.mark.case("HTP-07")
@pytest.mark.parametrize("header", ["bytes=" + "0-," * 90 + "0-", "bytes=" + ",".join(f"{2 * n}-{2 * n + 1}" for n in range(50))])
async def test_what_overlaps_is_sent_once(manager: StorageManager, ref: StoredObjectRef, header: str) -> None:
    response = await ask(serving(manager, ref), range=header)
    assert (response.status_code, response.content) == (206, HUNDRED)


@pytest.mark.case("HTP-07")
async def test_too_many_ranges_give_the_whole(manager: StorageManager, ref: StoredObjectRef) -> None:
    for header in ("bytes=" + "0-," * 10_000, "bytes=" + ",".join(f"{2 * n}-{2 * n + 1}" for n in range(5000))):
        response = await ask(serving(manager, ref), range=header)
        assert (response.status_code, response.content) == (200, HUNDRED)


@pytest.mark.case("HTP-07")
@pytest.mark.parametrize(("number", "status"), [(10, 206), (11, 200)])
async def test_too_many_ranges_that_lie_apart_give_the_whole(manager: StorageManager, number: int, status: int) -> None:
    content = bytes(4000)
    ref = await stored(manager, content, "text/plain")
    response = await ask(serving(manager, ref), range="bytes=" + ",".join(f"{300 * n}-{300 * n}" for n in range(number)))
    assert response.status_code == status
    if status == 200:
        assert response.content == content
    else:
        assert len(parts_of(response)) == number


@pytest.mark.case("HTP-14")
async def test_several_ranges(manager: StorageManager) -> None:
    content = (b"\r\n--boundary--\r\nContent-Range: bytes 0-1/2\r\n\r\n" * 100)[:4000]
    ref = await stored(manager, content, "text/plain")
    boundaries = set()
    for _ in range(3):
        response = await ask(serving(manager, ref), range="bytes=3000-3099,0-9,-20,9999-")
        assert response.status_code == 206
        assert int(response.headers["content-length"]) == len(response.content)
        assert "content-range" not in response.headers
        assert parts_of(response) == [
            ("bytes 3000-3099/4000", content[3000:3100]),
            ("bytes 0-9/4000", content[:10]),
            ("bytes 3980-3999/4000", content[-20:]),
        ]
        boundaries.add(response.headers["content-type"])
    assert len(boundaries) == 3


async def test_ranges_that_lie_close_together_are_joined(manager: StorageManager) -> None:
    content = bytes(4000)
    ref = await stored(manager, content)
    response = await ask(serving(manager, ref), range="bytes=2000-2009,0-9,2050-2059,2005-2007")
    assert [span for span, _ in parts_of(response)] == ["bytes 2000-2059/4000", "bytes 0-9/4000"]


@pytest.mark.parametrize("size", [0, 1, 131_071, 131_072, 131_073, 3 * MIB])
async def test_sizes_on_a_connection(manager: StorageManager, size: int) -> None:
    ref = await stored(manager, bytes(size))
    async with server(serving(manager, ref)) as port, httpx.AsyncClient() as client:
        response = await client.get(f"http://127.0.0.1:{port}/")
        assert (response.status_code, len(response.content)) == (200, size)
        if size:
            response = await client.get(f"http://127.0.0.1:{port}/", headers={"Range": f"bytes={size - 1}-"})
            assert (response.status_code, len(response.content)) == (206, 1)


@pytest.mark.case("HTP-08")
async def test_memory_is_bounded() -> None:
    backend = MemoryStorageBackend()
    await backend.put_stream("large", many(bytes(MIB), 10 * 1024))
    ref = StoredObjectRef("files", "store", "large", 10 << 30, "")
    async with manager_on(backend) as manager:
        sent = 0

        async def count(message: dict[str, object]) -> None:
            nonlocal sent
            sent += len(message.get("body", b""))  # type: ignore[arg-type]
            if sent > 256 * MIB:
                raise OSError("enough")

        async def forever() -> dict[str, object]:
            await asyncio.Event().wait()
            raise AssertionError

        scope = {"type": "http", "method": "GET", "headers": [(b"range", b"bytes=0-")]}
        tracemalloc.start()
        await serving(manager, ref)(scope, forever, count)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sent > 256 * MIB
    assert peak < 8 * MIB
