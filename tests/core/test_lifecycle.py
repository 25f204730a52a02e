"""Opening and closing a manager: on one event loop, on several, and with calls in progress."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from granite_storage import ConfigurationError, StorageManager
from granite_storage.backends.memory import MemoryStorageBackend
from tests.core.support import PLACE, SLOT, endless, left_below, local_manager, manager_on


class CountingBackend(MemoryStorageBackend):
    """Counts how often it was closed, and on which loops."""

    def __init__(self) -> None:
        super().__init__()
        self.closed_on: list[asyncio.AbstractEventLoop] = []

    async def aclose(self) -> None:
        self.closed_on.append(asyncio.get_running_loop())
        await super().aclose()


@pytest.mark.case("POL-06")
async def test_every_call_on_a_closed_manager_is_a_clear_error() -> None:
    manager = manager_on(MemoryStorageBackend())
    ref = await manager.put_bytes(**SLOT, content=b"1")
    await manager.aclose()
    calls: list[Any] = [
        lambda: manager.put_bytes(**SLOT, content=b"1"),
        lambda: manager.put_stream(**SLOT, stream=[b"1"]),
        lambda: manager.get(ref),
        lambda: manager.open(ref),
        lambda: manager.exists(ref),
        lambda: manager.stat(ref),
        lambda: manager.delete(ref),
        lambda: manager.copy(ref, **PLACE),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match="closed"):
            await call()


@pytest.mark.case("POL-06")
async def test_a_closed_manager_may_be_entered_again() -> None:
    backend = CountingBackend()
    manager = manager_on(backend)
    async with manager:
        ref = await manager.put_bytes(**SLOT, content=b"1")
    async with manager:
        assert await manager.get(ref) == b"1"
    assert len(backend.closed_on) == 2


async def test_closing_twice_closes_once() -> None:
    backend = CountingBackend()
    manager = manager_on(backend)
    await manager.aclose()
    await manager.aclose()
    await asyncio.gather(manager.aclose(), manager.aclose())
    assert len(backend.closed_on) == 1


@pytest.mark.case("POL-06")
def test_one_manager_serves_loops_one_after_the_other_and_side_by_side(tmp_path: Path) -> None:
    """Made before any loop runs; closing it on one loop does not close it on another."""
    manager = local_manager(tmp_path)
    barrier = threading.Barrier(2, timeout=60)
    failures: list[BaseException] = []

    async def serve(number: int, *, together: bool) -> None:
        async with manager:
            if together:
                await asyncio.to_thread(barrier.wait)
            refs = await asyncio.gather(*(manager.put_bytes(**SLOT, content=bytes([number, n])) for n in range(20)))
            if together and number == 1:
                await asyncio.to_thread(barrier.wait)
            assert [await manager.get(ref) for ref in refs] == [bytes([number, n]) for n in range(20)]
        if together and number == 0:
            await asyncio.to_thread(barrier.wait)

    def run(number: int) -> None:
        try:
            asyncio.run(serve(number, together=True))
        except BaseException as error:  # noqa: BLE001  # it is raised in the test's own thread
            failures.append(error)

    for number in range(2):
        asyncio.run(serve(number, together=False))
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.case("POL-07")
async def test_closing_waits_for_uploads_that_end_in_time(tmp_path: Path) -> None:
    manager = local_manager(tmp_path)
    release = asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield b"1" * 100
        await release.wait()
        yield b"2" * 100

    uploads = [asyncio.create_task(manager.put_stream(**SLOT, stream=held())) for _ in range(20)]
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(manager.aclose())
    await asyncio.sleep(0.05)
    assert not closing.done()
    with pytest.raises(ConfigurationError, match="closed"):
        await manager.put_bytes(**SLOT, content=b"too late")
    release.set()
    await closing
    assert all(upload.done() for upload in uploads)
    assert {(await upload).size for upload in uploads} == {200}


@pytest.mark.case("POL-07")
async def test_closing_cancels_uploads_that_do_not_end_and_they_leave_nothing(tmp_path: Path) -> None:
    manager = local_manager(tmp_path, drain_timeout=0.2)
    uploads = [asyncio.create_task(manager.put_stream(**SLOT, stream=endless(b"1" * 100_000))) for _ in range(20)]
    await asyncio.sleep(0.1)
    await manager.aclose()
    results = await asyncio.gather(*uploads, return_exceptions=True)
    assert {type(result) for result in results} == {asyncio.CancelledError}
    assert left_below(tmp_path) == []


async def test_closing_from_within_a_call_does_not_wait_for_itself() -> None:
    manager = manager_on(MemoryStorageBackend(), drain_timeout=120.0)

    async def closing() -> AsyncIterator[bytes]:
        yield b"1"
        async with asyncio.timeout(60):
            await manager.aclose()
        yield b"2"

    ref = await manager.put_stream(**SLOT, stream=closing())
    async with manager:
        assert await manager.get(ref) == b"12"


async def test_closing_closes_the_readers_that_are_open() -> None:
    manager = manager_on(MemoryStorageBackend())
    ref = await manager.put_bytes(**SLOT, content=b"1" * 1000)
    reader = await manager.open(ref)
    await reader.read(10)
    await manager.aclose()
    assert reader.closed
    with pytest.raises(ValueError, match="closed"):
        await reader.read(1)


async def test_a_backend_that_fails_to_close_does_not_keep_the_others_open(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryStorageBackend):
        async def aclose(self) -> None:
            raise RuntimeError("of the backend")

    other = CountingBackend()
    manager = StorageManager(backends={"failing": Failing(), "other": other}, policies={})
    await manager.aclose()
    assert len(other.closed_on) == 1
    assert "failing" in caplog.text
