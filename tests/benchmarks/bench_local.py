"""Local disk: one long stream, and many small objects."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiofiles

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main

GIB = 1024 * MIB
SMALL = 4096
AT_A_TIME = 64


def chunks_of(size: int, total: int = GIB) -> Iterator[bytes]:
    """Make a few random chunks at once, and yield them again and again: making them is not what is measured."""
    different = [os.urandom(size) for _ in range(4)]
    return itertools.islice(itertools.cycle(different), total // size)


async def streamed(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@contextmanager
def folder() -> Iterator[Path]:
    """Give a folder on the disk that `TMPDIR` names."""
    with tempfile.TemporaryDirectory(prefix="granite-bench-") as name:
        yield Path(name)


@asynccontextmanager
async def storage(*, fsync: bool) -> AsyncIterator[StorageManager]:
    """Give a manager that has stored something already."""
    with folder() as root:
        manager = StorageManager(
            backends={"local": LocalStorageBackend(root, fsync=fsync)}, policies={"files": StoragePolicy("files", "local")}
        )
        async with manager:
            await put_small(manager, "0", b"warm")
            yield manager


async def put_small(manager: StorageManager, entity_id: str, content: bytes) -> None:
    await manager.put_bytes(storage_key="files", model_name="file", entity_id=entity_id, field_name="content", content=content)


async def stream_granite(meter: Meter, *, chunk_size: int, fsync: bool = False) -> None:
    """Store one long stream."""
    chunks = streamed(chunks_of(chunk_size))
    async with storage(fsync=fsync) as manager, meter.measure(size=GIB):
        await manager.put_stream(storage_key="files", model_name="file", entity_id="1", field_name="content", stream=chunks)


async def hash_alone(meter: Meter, *, chunk_size: int) -> None:
    """Hash the same chunks, and do nothing else."""
    digest, chunks = hashlib.sha256(), chunks_of(chunk_size)
    async with meter.measure(size=GIB, ticking=False):
        for chunk in chunks:
            digest.update(chunk)


async def write_alone(meter: Meter, *, chunk_size: int) -> None:
    """Write the same chunks from one thread, and do nothing else: what the disk and its cache take at this moment."""
    chunks = chunks_of(chunk_size)

    def write(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk)

    with folder() as root:
        async with meter.measure(size=GIB):
            await asyncio.to_thread(write, root / "file")


async def stream_by_turns(meter: Meter, *, chunk_size: int) -> None:
    """Hash on the loop and write with aiofiles, a chunk at a time: the loop that everybody writes first."""
    digest, chunks = hashlib.sha256(), streamed(chunks_of(chunk_size))
    with folder() as root:
        async with meter.measure(size=GIB), aiofiles.open(root / "file", "wb") as file:
            async for chunk in chunks:
                digest.update(chunk)
                await file.write(chunk)


async def many(count: int, put: Callable[[int], Awaitable[object]]) -> None:
    """Put numbered objects, so many at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await put(number)

    await asyncio.gather(*(worker() for _ in range(AT_A_TIME)))


async def small_granite(meter: Meter, *, count: int, fsync: bool, owners: int) -> None:
    """Store small objects that belong to so many owners, each of whom has a folder."""
    content = os.urandom(SMALL)
    async with storage(fsync=fsync) as manager, meter.measure(operations=count):
        await many(count, lambda number: put_small(manager, str(number % owners), content))


def write_bare(root: Path, number: int, content: bytes, fsync: bool) -> str:
    temporary, target = root / f"{number}.tmp", root / f"{number}"
    checksum = hashlib.sha256(content).hexdigest()
    with open(temporary, "wb") as file:
        file.write(content)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
    os.rename(temporary, target)
    if fsync:
        directory = os.open(root, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    return checksum


async def small_bare(meter: Meter, *, count: int, fsync: bool) -> None:
    """Hash, write and rename in threads, and promise nothing."""
    content = os.urandom(SMALL)
    with folder() as root:
        await asyncio.to_thread(write_bare, root, count, content, fsync)
        async with meter.measure(operations=count):
            await many(count, lambda number: asyncio.to_thread(write_bare, root, number, content, fsync))


def streams(label: str, chunk_size: int) -> Comparison:
    return Comparison(
        f"disk: 1 GiB stream, {label} chunks, no fsync",
        {
            "granite": Contender(stream_granite, chunk_size=chunk_size),
            "SHA-256 alone": Contender(hash_alone, chunk_size=chunk_size),
            "writing alone": Contender(write_alone, chunk_size=chunk_size),
            "aiofiles by turns": Contender(stream_by_turns, chunk_size=chunk_size),
        },
        baseline="SHA-256 alone",
        reach=0.85,
        max_memory=24 * MIB,
        max_stall=0.010,
    )


def objects(label: str, count: int, *, fsync: bool) -> Comparison:
    return Comparison(
        f"disk: 4 KiB objects, 64 at a time, {label}",
        {
            "granite": Contender(small_granite, count=count, fsync=fsync, owners=1),
            "bare threads": Contender(small_bare, count=count, fsync=fsync),
            "granite, a folder for each": Contender(small_granite, count=count, fsync=fsync, owners=count),
        },
        baseline="bare threads",
        reach=0.8,
    )


COMPARISONS = [
    streams("64 KiB", 64 * 1024),
    streams("256 KiB", 256 * 1024),
    streams("1 MiB", MIB),
    objects("no fsync", 8192, fsync=False),
    objects("fsync", 2048, fsync=True),
]

if __name__ == "__main__":
    main(COMPARISONS)
