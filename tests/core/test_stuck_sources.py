"""Synchronous sources that never answer: each holds a thread, and none of them holds up others."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator

import pytest

from granite_storage import _threads
from granite_storage._threads import ThreadPool
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import StreamTimeoutError
from tests.core.support import SLOT, eventually, manager_on

pytestmark = pytest.mark.case("RE-15")


@pytest.fixture(autouse=True)
def soon_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "_STUCK_SECONDS", 0.1)


class Stuck(io.RawIOBase):
    """A file on a line where nobody speaks."""

    def __init__(self, go: threading.Event) -> None:
        self.go = go
        self.begun = threading.Event()

    def read(self, size: int = -1, /) -> bytes:
        self.begun.set()
        self.go.wait(60)
        return b""


def stuck_generator(file: Stuck) -> Iterator[bytes]:
    yield file.read()


@pytest.mark.parametrize("kind", ["file", "generator"])
async def test_forty_stuck_sources_do_not_block_others(kind: str) -> None:
    manager = manager_on(MemoryStorageBackend())
    go = threading.Event()
    files = [Stuck(go) for _ in range(40)]
    uploads = [
        asyncio.ensure_future(manager.put_stream(**SLOT, stream=file if kind == "file" else stuck_generator(file)))
        for file in files
    ]
    try:
        assert (await asyncio.wait_for(manager.put_stream(**SLOT, stream=io.BytesIO(b"abc")), 30)).size == 3
        await eventually(lambda: all(file.begun.is_set() for file in files))
        assert (await asyncio.wait_for(manager.put_stream(**SLOT, stream=io.BytesIO(b"abc")), 30)).size == 3
    finally:
        go.set()
    assert [ref.size for ref in await asyncio.gather(*uploads)] == [0] * 40


async def test_the_number_of_stuck_threads_is_bounded() -> None:
    pool = ThreadPool("granite-test", 2, max_stuck=3)
    go, stuck = threading.Event(), []
    for number in range(5):
        stuck.append(asyncio.ensure_future(pool.run(go.wait, 60)))
        await eventually(lambda number=number: pool._workers == number + 1)
    try:
        with pytest.raises(StreamTimeoutError, match="5 are waiting"):
            await asyncio.wait_for(pool.run(int, "7"), 30)
    finally:
        go.set()
    assert await asyncio.gather(*stuck) == [True] * 5
    assert await pool.run(int, "7") == 7


async def test_threads_that_were_added_for_stuck_ones_end_when_those_go_on() -> None:
    pool = ThreadPool("granite-test", 2, max_stuck=10)
    go = threading.Event()
    stuck = [asyncio.ensure_future(pool.run(go.wait, 60)) for _ in range(6)]
    await eventually(lambda: pool._workers == 6)
    go.set()
    names: list[str] = []

    def work() -> None:
        names.append(threading.current_thread().name)

    await asyncio.gather(*stuck, *(pool.run(work) for _ in range(200)))
    await eventually(lambda: pool._workers <= 2)
    assert len(names) == 200


async def test_a_pool_without_such_a_limit_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPool("granite-test", 2)
    go = threading.Event()
    running = [asyncio.ensure_future(pool.run(go.wait, 60)) for _ in range(4)]
    await asyncio.sleep(0.3)
    assert pool._workers == 2
    go.set()
    assert await asyncio.gather(*running) == [True] * 4
