"""A call is cancelled at every one of its awaits, in turn; whatever becomes of it, nothing is left behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await
from tests.core.support import MIB, PROJECT, SLOT, endless, eventually, files_below, left_below, open_files

CONTENT = bytes(range(256)) * 8 * 1024 + b"the end"
MOMENTS: list[Moment] = ["at once", "a little later", "twice"]
COPY = {"model_name": "copy", "entity_id": "2", "field_name": "file"}


@pytest.fixture(params=[True, False], ids=["fsync", "no-fsync"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStorageBackend:
    return LocalStorageBackend(tmp_path / "root", fsync=request.param)


@pytest.fixture
def manager(backend: LocalStorageBackend) -> StorageManager:
    policies = {"files": StoragePolicy("files", "store"), "others": StoragePolicy("others", "memory")}
    return StorageManager(backends={"store": backend, "memory": MemoryStorageBackend()}, policies=policies)


async def slowly(content: bytes, size: int = 300_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        await asyncio.sleep(0)
        yield content[start : start + size]


def generated(content: bytes, size: int = 700_000) -> Iterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def idle(backend: LocalStorageBackend) -> None:
    """Wait until no thread of the backend is at work; there must be no job that any could still take up."""
    assert backend._threads._pending == 0
    await eventually(lambda: backend._threads._workers == 0)
    assert open_files(backend.root_dir) == []


WRITES: dict[str, Callable[[StorageManager], Awaitable[StoredObjectRef]]] = {
    "put_bytes": lambda manager: manager.put_bytes(**SLOT, content=CONTENT),
    "put_bytes, small": lambda manager: manager.put_bytes(**SLOT, content=b"small"),
    "put_stream": lambda manager: manager.put_stream(**SLOT, stream=slowly(CONTENT)),
    "put_stream, one piece": lambda manager: manager.put_stream(**SLOT, stream=slowly(CONTENT[:1000])),
    "put_stream, from a thread": lambda manager: manager.put_stream(**SLOT, stream=generated(CONTENT)),
}


@pytest.mark.case("CAN-01", "CAN-04")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("write", WRITES)
async def test_a_write(manager: StorageManager, backend: LocalStorageBackend, write: str, moment: Moment) -> None:
    async def call(_: int) -> StoredObjectRef:
        return await WRITES[write](manager)

    async for step, task, struck in cancel_at_every_await(call, moment):
        if task.cancelled():
            assert files_below(backend.root_dir) == [], f"cancelled at await {step}"
            assert left_below(backend.root_dir) == []
        else:
            assert not struck, f"the cancellation at await {step} was swallowed"
            ref: Any = task.result()
            assert files_below(backend.root_dir) == [ref.location]
            await manager.delete(ref)
        await idle(backend)


@pytest.mark.case("CAN-01")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("storage_key", ["files", "others"])
async def test_a_copy(manager: StorageManager, backend: LocalStorageBackend, storage_key: str, moment: Moment) -> None:
    ref = await manager.put_bytes(**SLOT, content=CONTENT)

    async def call(_: int) -> StoredObjectRef:
        return await manager.copy(ref, **COPY, storage_key=storage_key)

    async for step, task, struck in cancel_at_every_await(call, moment):
        if not task.cancelled():
            assert not struck, f"the cancellation at await {step} was swallowed"
            copy: Any = task.result()
            assert await manager.get(copy) == CONTENT
            await manager.delete(copy)
        assert files_below(backend.root_dir) == [ref.location]
        assert [info async for info in manager.backend("memory").iter_objects()] == []
        await idle(backend)


@pytest.mark.case("CAN-01")
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_delete(manager: StorageManager, backend: LocalStorageBackend, moment: Moment) -> None:
    refs: dict[int, StoredObjectRef] = {}

    async def call(step: int) -> None:
        refs[step] = await manager.put_bytes(**{**SLOT, "entity_id": str(step)}, content=b"x")
        await manager.delete(refs[step])

    async for _, task, struck in cancel_at_every_await(call, moment):
        assert task.cancelled() or not struck
        for ref in refs.values():
            await manager.delete(ref)
        assert left_below(backend.root_dir) == []
        await idle(backend)


async def opened_and_closed(manager: StorageManager, ref: StoredObjectRef) -> None:
    async with manager.open(ref):
        pass


async def read_in_steps(manager: StorageManager, ref: StoredObjectRef) -> None:
    async with manager.open(ref, offset=3) as reader:
        assert await reader.read(1000) == CONTENT[3:1003]
        await reader.seek(500_000)
        assert await reader.read(1000) == CONTENT[500_003:501_003]


async def iterated(manager: StorageManager, ref: StoredObjectRef) -> None:
    async with manager.open(ref, verify=True) as reader:
        assert b"".join([chunk async for chunk in reader]) == CONTENT


async def listed_all(manager: StorageManager, _: StoredObjectRef) -> None:
    assert len([info async for info in manager.backend("store").iter_objects()]) == 1


@pytest.mark.case("CAN-01", "CAN-04")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "read",
    [StorageManager.get, opened_and_closed, read_in_steps, iterated, listed_all, StorageManager.stat, StorageManager.exists],
)
async def test_a_read(manager: StorageManager, backend: LocalStorageBackend, read: Any, moment: Moment) -> None:
    ref = await manager.put_bytes(**SLOT, content=CONTENT)

    async def call(_: int) -> object:
        return await read(manager, ref)

    async for step, task, struck in cancel_at_every_await(call, moment):
        assert task.cancelled() or not struck, f"the cancellation at await {step} was swallowed"
        await idle(backend)
        assert await manager.get(ref) == CONTENT
    assert files_below(backend.root_dir) == [ref.location]


@pytest.mark.case("CAN-01")
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_read_that_was_cancelled_leaves_no_gap(
    manager: StorageManager, backend: LocalStorageBackend, moment: Moment
) -> None:
    ref = await manager.put_bytes(**SLOT, content=CONTENT)
    async with manager.open(ref) as reader:
        position = 0

        async def call(_: int) -> bytes:
            return await reader.read(1000)

        async for _, task, _ in cancel_at_every_await(call, moment):
            if not task.cancelled():
                assert task.result() == CONTENT[position : position + 1000]
                position += 1000
            assert reader.tell() == position
        assert await reader.read() == CONTENT[position:]
    await idle(backend)


@pytest.mark.case("CAN-01", "POL-07")
@pytest.mark.parametrize("moment", MOMENTS)
async def test_closing(manager: StorageManager, backend: LocalStorageBackend, moment: Moment) -> None:
    readers = []

    async def call(_: int) -> None:
        async with manager:
            ref = await manager.put_bytes(**SLOT, content=b"x")
            readers.append(await manager.open(ref))
            await manager.delete(ref)

    async for _, task, struck in cancel_at_every_await(call, moment):
        assert task.cancelled() or not struck
        assert all(reader.closed for reader in readers)
        async with manager:
            for location in files_below(backend.root_dir):
                await backend.delete(location)
        await idle(backend)


@pytest.mark.case("CAN-03")
@pytest.mark.parametrize("after", [0, 0.001, 0.004, 0.02])
async def test_a_timeout(manager: StorageManager, backend: LocalStorageBackend, after: float) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(after):
            await manager.put_stream(**SLOT, stream=endless(b"x" * MIB, 0.001))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    assert not backend.root_dir.exists() or left_below(backend.root_dir) == []
    assert (await manager.put_bytes(**SLOT, content=b"after")).size == 5


@pytest.mark.case("CAN-05")
async def test_a_sibling_that_fails(manager: StorageManager, backend: LocalStorageBackend) -> None:
    async def failing() -> None:
        await eventually(lambda: backend.root_dir.exists())
        raise ValueError("of the sibling")

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(manager.put_stream(**SLOT, stream=endless(b"x" * MIB, 0.001)))
            group.create_task(failing())

    with pytest.raises(ExceptionGroup) as caught:
        await together()
    assert [str(error) for error in caught.value.exceptions] == ["of the sibling"]
    assert left_below(backend.root_dir) == []
    await idle(backend)


@pytest.mark.case("CAN-05")
@pytest.mark.parametrize("after", [0, 0.001, 0.02])
async def test_a_cancel_scope_of_anyio(manager: StorageManager, backend: LocalStorageBackend, after: float) -> None:
    """It cancels again and again, in every turn of the loop, until the block has ended."""
    with anyio.move_on_after(after) as scope:
        await manager.put_stream(**SLOT, stream=endless(b"x" * MIB, 0.001))
    assert scope.cancelled_caught
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert not backend.root_dir.exists() or left_below(backend.root_dir) == []
    await idle(backend)


@pytest.mark.case("CAN-04")
async def test_a_source_that_swallows_the_cancellation_does_not_hang(manager: StorageManager, tmp_path: Path) -> None:
    is_read = asyncio.Event()

    async def stubborn() -> AsyncIterator[bytes]:
        is_read.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            yield b"all the same"

    task = asyncio.ensure_future(manager.put_stream(**SLOT, stream=stubborn()))
    await is_read.wait()
    task.cancel()
    ref = await asyncio.wait_for(task, 50)
    assert await manager.get(ref) == b"all the same"


INTERRUPTED = """
import asyncio, signal, sys
from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend

async def source():
    while True:
        await asyncio.sleep(0.001)
        yield b"x" * 1048576
        print("going", flush=True)

async def main():
    manager = StorageManager(
        backends={"store": LocalStorageBackend(sys.argv[1])}, policies={"files": StoragePolicy("files", "store")}
    )
    async with manager:
        await manager.put_stream(storage_key="files", model_name="m", entity_id="1", field_name="f", stream=source())

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.case("CAN-04")
@pytest.mark.parametrize("times", [1, 3])
def test_a_keyboard_interrupt(tmp_path: Path, times: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", INTERRUPTED, str(tmp_path / "root")],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    if times == 1:
        assert output.endswith("interrupted\n"), errors
        assert "was destroyed" not in errors
        assert "never awaited" not in errors
    assert [name for name in files_below(tmp_path / "root") if not name.endswith(".tmp")] == []
    if times > 1:  # who insists is let out of the clean-up, too; what that leaves is cleared away as after a crash
        asyncio.run(LocalStorageBackend(tmp_path / "root").cleanup_incomplete(older_than=timedelta(0)))
    assert files_below(tmp_path / "root") == []
    if times == 1:
        assert left_below(tmp_path / "root") == []
