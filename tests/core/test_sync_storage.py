"""The verbs for synchronous code: in threads, in forked children, under interrupts, and beside a running event loop."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import io
import itertools
import multiprocessing
import os
import shutil
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.datastructures import Headers, UploadFile

from granite_storage import (
    ChecksumMismatchError,
    ConfigurationError,
    ContentTooLargeError,
    ObjectNotFoundError,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    _portal,
)
from granite_storage._portal import portal
from granite_storage.backends.base import ObjectInfo
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from tests.applications.processes import until
from tests.core.interrupts import OF_DESTRUCTORS, interrupt, signalled
from tests.core.support import PLACE, SLOT, files_below, local_manager, manager_on
from tests.tiers import repetitions

CONTENT = bytes(range(256)) * 4096
"""1 MiB."""


@pytest.fixture
def manager() -> Iterator[StorageManager]:
    manager = manager_on(MemoryStorageBackend())
    yield manager
    manager.sync.close()


def locations(manager: StorageManager) -> list[str]:
    return [info.location for info in manager.sync.list(storage_key=SLOT["storage_key"])]


def test_every_verb(manager: StorageManager) -> None:
    storage = manager.sync
    ref = storage.put_bytes(**SLOT, content=b"abc")
    streamed = storage.put_stream(**SLOT, stream=io.BytesIO(CONTENT))
    assert (storage.get(ref), storage.get(streamed)) == (b"abc", CONTENT)
    assert storage.exists(ref)
    assert storage.stat(ref).size == 3
    copied = storage.copy(ref, **PLACE)
    assert sorted(locations(manager)) == sorted(one.location for one in (ref, streamed, copied))
    storage.delete(ref)
    assert not storage.exists(ref)
    with pytest.raises(ObjectNotFoundError):
        storage.get(ref)
    assert storage.delete_many([streamed, copied]) == {}
    assert locations(manager) == []


@pytest.mark.parametrize("verb", ["put_bytes", "put_stream", "get", "url", "delete", "copy"])
def test_frameworks_do_not_await_it(manager: StorageManager, verb: str) -> None:
    """FastAPI unwraps a dependency to learn whether it is to be awaited."""
    method = getattr(manager.sync, verb)
    assert not inspect.iscoroutinefunction(inspect.unwrap(method))
    assert inspect.signature(method) == inspect.signature(getattr(manager, verb))
    assert inspect.get_annotations(method, eval_str=True).keys() == getattr(manager, verb).__annotations__.keys()


def test_url(tmp_path: Path) -> None:
    manager = local_manager(tmp_path)
    ref = manager.sync.put_bytes(**SLOT, content=b"abc")
    with pytest.raises(ConfigurationError, match="cannot sign URLs"):
        manager.sync.url(ref, expires_in=timedelta(minutes=1))
    manager.sync.close()


class TestReader:
    @pytest.fixture
    def ref(self, manager: StorageManager) -> StoredObjectRef:
        return manager.sync.put_bytes(**SLOT, content=CONTENT)

    def test_copied(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        target = io.BytesIO()
        with manager.sync.open(ref) as reader:
            assert (reader.size, reader.ref, reader.info.size) == (len(CONTENT), ref, len(CONTENT))
            shutil.copyfileobj(reader, target)
        assert target.getvalue() == CONTENT
        assert reader.closed
        with pytest.raises(ValueError, match="closed"):
            reader.read()

    def test_sought(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        with manager.sync.open(ref, offset=10, length=1000) as reader:
            assert reader.seek(-10, os.SEEK_END) == 990
            assert reader.read() == CONTENT[1000:1010]
            assert reader.seek(5) == 5
            assert reader.read(3) == CONTENT[15:18]
            assert reader.tell() == 8
            assert reader.peek(1)[:1] == CONTENT[18:19]
            assert reader.readline(4) == CONTENT[18:22]

    def test_archive(self, manager: StorageManager) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("a.txt", CONTENT)
            archive.writestr("b.txt", b"b")
        ref = manager.sync.put_bytes(**SLOT, content=packed.getvalue())
        with manager.sync.open(ref) as reader, zipfile.ZipFile(reader) as archive:
            assert archive.read("a.txt") == CONTENT
            assert archive.namelist() == ["a.txt", "b.txt"]

    def test_verified(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        with manager.sync.open(ref, verify=True) as reader:
            assert not reader.seekable()
            assert hashlib.file_digest(reader, "sha256").hexdigest() == hashlib.sha256(CONTENT).hexdigest()

    def test_wrong_bytes(self, tmp_path: Path) -> None:
        manager = local_manager(tmp_path)
        ref = manager.sync.put_bytes(**SLOT, content=CONTENT)
        path = next(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(CONTENT))
        path.chmod(0o600)
        path.write_bytes(CONTENT[:-1] + b"x")
        with pytest.raises(ChecksumMismatchError), manager.sync.open(ref, verify=True) as reader:
            reader.read()
        manager.sync.close()

    def test_missing(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        manager.sync.delete(ref)
        with pytest.raises(ObjectNotFoundError):
            manager.sync.open(ref)

    def test_abandoned(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        reader = manager.sync.open(ref)
        assert reader.read(1) == CONTENT[:1]
        del reader
        assert manager.sync.get(ref) == CONTENT

    def test_closed_by_the_manager(self, manager: StorageManager, ref: StoredObjectRef) -> None:
        reader = manager.sync.open(ref)
        manager.sync.close()
        with pytest.raises(ValueError, match="closed"):
            reader.read()
        reader.close()


class TestSources:
    def test_iterable(self, manager: StorageManager) -> None:
        ref = manager.sync.put_stream(**SLOT, stream=(bytes([number]) * 1000 for number in range(100)))
        assert manager.sync.get(ref) == b"".join(bytes([number]) * 1000 for number in range(100))

    def test_upload(self, manager: StorageManager) -> None:
        """Its `read` is awaited, but its file is read by a thread."""

        class Guarded(UploadFile):
            async def read(self, size: int = -1) -> bytes:
                raise AssertionError("read on another event loop")

            seek = read  # type: ignore[assignment]

        upload = Guarded(io.BytesIO(b"abc"), filename="a.txt", headers=Headers({"content-type": "text/plain"}))
        upload.file.read(2)
        ref = manager.sync.put_stream(**SLOT, stream=upload)
        assert manager.sync.get(ref) == b"abc"
        assert (ref.original_filename, ref.content_type) == ("a.txt", "text/plain")

    def test_asynchronous_streams(self, manager: StorageManager) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"abc"

        class File:
            async def read(self, size: int) -> bytes:
                return b""

        for stream in (chunks(), File()):
            with pytest.raises(TypeError, match="asynchronous stream"):
                manager.sync.put_stream(**SLOT, stream=stream)
        assert locations(manager) == []

    def test_error_of_the_source(self, manager: StorageManager) -> None:
        def chunks() -> Iterator[bytes]:
            yield b"abc"
            raise LookupError("the source")

        with pytest.raises(LookupError, match="the source"):
            manager.sync.put_stream(**SLOT, stream=chunks())
        assert locations(manager) == []

    def test_limit(self) -> None:
        manager = StorageManager(
            backends={"memory": MemoryStorageBackend()}, policies={"small": StoragePolicy("small", "memory", max_size=10)}
        )
        place = {**SLOT, "storage_key": "small"}
        with pytest.raises(ContentTooLargeError):
            manager.sync.put_stream(**place, stream=iter([b"12345", b"67890", b"1"]))
        assert list(manager.sync.list(storage_key="small")) == []
        manager.sync.close()

    def test_context_of_the_caller(self, manager: StorageManager) -> None:
        """A stream finds the context variables of the thread that stores it, as a request's context in Flask."""
        from contextvars import ContextVar

        request: ContextVar[str] = ContextVar("request")
        request.set("42")
        ref = manager.sync.put_stream(**SLOT, stream=(request.get().encode() for _ in range(2)))
        assert manager.sync.get(ref) == b"4242"


class TestListing:
    def test_several_pages(self, manager: StorageManager) -> None:
        for _ in range(1001):
            manager.sync.put_bytes(**SLOT, content=b"")
        found = locations(manager)
        assert len(set(found)) == 1001
        assert found == sorted(found)

    def test_ended_early(self, manager: StorageManager) -> None:
        for _ in range(3):
            manager.sync.put_bytes(**SLOT, content=b"")
        listing = manager.sync.list(storage_key=SLOT["storage_key"])
        assert next(listing).size == 0
        listing.close()
        assert len(locations(manager)) == 3

    def test_error_midway(self) -> None:
        class Failing(MemoryStorageBackend):
            async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
                async for info in super().iter_objects(prefix, start_after=start_after):
                    yield info
                    raise LookupError("midway")

        manager = manager_on(Failing())
        manager.sync.put_bytes(**SLOT, content=b"")
        listing = manager.sync.list(storage_key=SLOT["storage_key"])
        assert next(listing).size == 0
        with pytest.raises(LookupError, match="midway"):
            next(listing)
        manager.sync.close()


async def test_where_an_event_loop_runs(tmp_path: Path) -> None:
    """It would stand still meanwhile: each verb names what is awaited instead."""
    manager = manager_on(MemoryStorageBackend())
    ref = await manager.put_bytes(**SLOT, content=b"abc")
    storage = manager.sync
    calls: dict[str, Any] = {
        "put_bytes": lambda: storage.put_bytes(**SLOT, content=b"1"),
        "put_stream": lambda: storage.put_stream(**SLOT, stream=[b"1"]),
        "get": lambda: storage.get(ref),
        "open": lambda: storage.open(ref),
        "exists": lambda: storage.exists(ref),
        "stat": lambda: storage.stat(ref),
        "url": lambda: storage.url(ref, expires_in=timedelta(minutes=1)),
        "copy": lambda: storage.copy(ref, **PLACE),
        "delete": lambda: storage.delete(ref),
        "delete_many": lambda: storage.delete_many([ref]),
        "list": lambda: next(storage.list(storage_key=SLOT["storage_key"])),
    }
    for name, call in calls.items():
        with pytest.raises(ConfigurationError, match=rf"storage\.{name}\("):
            call()
    with pytest.raises(ConfigurationError, match=r"storage\.aclose\("):
        storage.close()
    with pytest.raises(ConfigurationError, match="async with storage"), storage:
        pass
    reader = await asyncio.to_thread(storage.open, ref)
    with pytest.raises(ConfigurationError, match=r"storage\.open\("):
        reader.read()
    assert await asyncio.to_thread(reader.read) == b"abc"
    await asyncio.to_thread(reader.close)
    assert await manager.exists(ref)
    await manager.aclose()


async def test_threads_beside_an_event_loop() -> None:
    """One manager serves both; closing it closes what was opened for either."""
    closed_on: list[int] = []

    class Counting(MemoryStorageBackend):
        async def aclose(self) -> None:
            closed_on.append(threading.get_ident())
            await super().aclose()

    async with manager_on(Counting()) as manager:
        ref = await manager.put_bytes(**SLOT, content=b"abc")
        assert await asyncio.to_thread(manager.sync.get, ref) == b"abc"
        refs = await asyncio.gather(*(asyncio.to_thread(manager.sync.put_bytes, **SLOT, content=b"1") for _ in range(40)))
        assert len({ref.location for ref in refs}) == 40
    assert len(set(closed_on)) == 2


def test_closed_and_used_again(manager: StorageManager) -> None:
    with manager.sync as storage:
        ref = storage.put_bytes(**SLOT, content=b"abc")
    assert manager.sync.get(ref) == b"abc"


def test_loop_ends_with_its_last_manager() -> None:
    first, second = manager_on(MemoryStorageBackend()), manager_on(MemoryStorageBackend())
    ref = first.sync.put_bytes(**SLOT, content=b"abc")
    second.sync.put_bytes(**SLOT, content=b"abc")
    second.sync.close()
    assert first.sync.get(ref) == b"abc"
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "granite-storage-portal"]
    first.sync.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_interrupted_upload(manager: StorageManager, error: type[BaseException]) -> None:
    """As Ctrl-C does, or the time limit of a task queue: nothing is left, and the error is raised."""
    begun = threading.Event()
    reads = 0

    class Slow(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            nonlocal reads
            reads += 1
            begun.set()
            time.sleep(0.02)
            buffer[:1] = b"x"
            return 1

    with signalled(begun, error), pytest.raises(error, match="interrupted"):
        manager.sync.put_stream(**SLOT, stream=Slow())
    until_now = reads
    time.sleep(0.1)
    assert reads == until_now
    assert locations(manager) == []
    ref = manager.sync.put_bytes(**SLOT, content=b"abc")
    assert manager.sync.get(ref) == b"abc"


def test_interrupted_after_a_put(manager: StorageManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes when the object is stored, before the caller has its ref: the object is deleted."""
    wait = _portal._Call.result
    ends: list[bool] = []

    def interrupted(call: Any) -> Any:
        result = wait(call)
        if not ends:
            ends.append(call.has_succeeded)
            raise KeyboardInterrupt
        return result

    source = manager.sync.put_bytes(**SLOT, content=b"kept")
    monkeypatch.setattr(_portal._Call, "result", interrupted)
    puts: list[Callable[[], object]] = [
        lambda: manager.sync.put_bytes(**SLOT, content=b"abc"),
        lambda: manager.sync.put_stream(**SLOT, stream=[b"abc"]),
        lambda: manager.sync.copy(source, **{name: SLOT[name] for name in ("model_name", "entity_id", "field_name")}),
    ]
    for put in puts:
        ends.clear()
        with pytest.raises(KeyboardInterrupt):
            put()
        assert ends == [True]
        assert locations(manager) == [source.location]


@OF_DESTRUCTORS
def test_interrupted_at_each_moment(tmp_path: Path) -> None:
    """Ctrl-C between any two instructions of a caller: the next call works, nothing is left, and the loop is not kept."""
    manager = local_manager(tmp_path)
    kept = manager.sync.put_bytes(**SLOT, content=b"kept")
    place = {name: SLOT[name] for name in ("model_name", "entity_id", "field_name")}

    def read() -> None:
        with manager.sync.open(kept) as file:
            assert file.read() == b"kept"

    calls: list[Callable[[], object]] = [
        lambda: manager.sync.put_bytes(**SLOT, content=b"abc"),
        lambda: manager.sync.put_stream(**SLOT, stream=[b"abc"] * 3),
        lambda: manager.sync.copy(kept, **place),
        lambda: list(manager.sync.list(storage_key=SLOT["storage_key"])),
        read,
    ]
    for call in calls:
        for moment in itertools.count(1):
            if not interrupt(call, moment):
                break
            assert manager.sync.get(kept) == b"kept", moment
            until(lambda: locations(manager) == [kept.location], f"left at {moment}")
        for location in set(locations(manager)) - {kept.location}:  # the last call was not interrupted
            portal.run(manager.backend("store").delete(location))
    assert files_below(tmp_path) == [kept.location]
    manager.sync.close()
    until(lambda: not any(thread.name == "granite-storage-portal" for thread in threading.enumerate()), "the loop goes on")


@OF_DESTRUCTORS
def test_interrupted_while_the_loop_starts() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 1

    for moment in itertools.count(1):
        starting, first = _portal.Portal(), work()
        # Of an interrupt in `Thread.start` or in the making of a loop, Python itself leaves a thread or a socket behind.
        is_interrupted = interrupt(functools.partial(starting.run, first), moment, below=())
        first.close()  # it has not begun where the interrupt came before all else
        assert starting.run(work()) == 1
        starting.close()
        if not is_interrupted:
            break


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_source_that_ends_the_program(manager: StorageManager, error: type[BaseException]) -> None:
    """These two end a loop of asyncio: that of synchronous callers goes on, and the error is that of its caller."""

    def chunks() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise error("from the source")

    ref = manager.sync.put_bytes(**SLOT, content=b"another")
    for _ in range(2):
        with pytest.raises(error, match="from the source"):
            manager.sync.put_stream(**SLOT, stream=chunks())
    assert locations(manager) == [ref.location]
    assert manager.sync.get(ref) == b"another"


def test_closed_during_a_call() -> None:
    """The call is cancelled once it has had its time, and its thread learns why."""
    from concurrent.futures import CancelledError

    manager = StorageManager(
        backends={"memory": MemoryStorageBackend()},
        policies={SLOT["storage_key"]: StoragePolicy(SLOT["storage_key"], "memory")},
        drain_timeout=0.05,
    )
    begun, enough = threading.Event(), threading.Event()

    def chunks() -> Iterator[bytes]:
        while not enough.is_set():
            begun.set()
            time.sleep(0.01)
            yield b"x"

    with ThreadPoolExecutor(1) as threads:
        storing = threads.submit(manager.sync.put_stream, **SLOT, stream=chunks())
        begun.wait(10)
        manager.sync.close()
        with pytest.raises(CancelledError, match="closing"):
            storing.result(10)
        enough.set()
    assert locations(manager) == []
    manager.sync.close()


def _in_child(manager: StorageManager, ref: StoredObjectRef, answers: Any) -> None:
    answers.put((manager.sync.get(ref), manager.sync.put_bytes(**SLOT, content=b"child"), portal.is_here))


def test_forked_child(tmp_path: Path) -> None:
    """As in gunicorn with `--preload`, or in a worker of Celery: the parent's event loop is not there."""
    manager = StorageManager(
        backends={"disk": LocalStorageBackend(tmp_path, fsync=False)},
        policies={SLOT["storage_key"]: StoragePolicy(SLOT["storage_key"], "disk")},
    )
    ref = manager.sync.put_bytes(**SLOT, content=b"parent")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=_in_child, args=(manager, ref, answers)) for _ in range(3)]
    for child in children:
        child.start()
    try:
        found = [answers.get(timeout=20) for _ in children]
        for child in children:
            child.join(20)
    finally:
        for child in children:
            child.kill()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert {content for content, _, _ in found} == {b"parent"}
    assert {manager.sync.get(made) for _, made, _ in found} == {b"child"}
    manager.sync.close()
    answers.close()
    answers.join_thread()


def test_many_calls(tmp_path: Path) -> None:
    """Threads, descriptors and memory stay flat."""
    manager = local_manager(tmp_path)
    process = psutil.Process()
    measured: list[tuple[int, int]] = []
    memory: list[int] = []
    for _ in range(5):
        for _ in range(repetitions("GRANITE_SYNC_CALLS", default=100, exhaustive=2000)):
            ref = manager.sync.put_bytes(**SLOT, content=b"x" * 100)
            manager.sync.get(ref)
            manager.sync.delete(ref)
        measured.append((process.num_threads(), process.num_fds()))
        memory.append(process.memory_info().rss)
    assert max(descriptors for _, descriptors in measured) == measured[0][1], measured
    assert max(threads for threads, _ in measured) <= measured[0][0] + 8, measured
    assert memory[-1] - memory[1] < 4 << 20, memory
    manager.sync.close()
