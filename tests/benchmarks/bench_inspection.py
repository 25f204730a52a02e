"""What judging costs: uploads to disk with a type to find, images to measure and metadata to take out, against none of it."""

from __future__ import annotations

import io
import statistics
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from PIL import Image

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.inspection import ImageLimits
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main

SIZE = 1 << 30
CHUNK = bytes(256 * 1024)
PUTS = 2000
SLOT = {"storage_key": "files", "model_name": "doc", "entity_id": "1", "field_name": "file"}
CHECKS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "type": {"accept": ("image/*", "video/mp4")},
    "type and image": {"accept": ("image/*", "video/mp4"), "inspect": [ImageLimits()]},
}


def picture(size: int) -> bytes:
    """A JPEG of about so many bytes."""
    out = io.BytesIO()
    Image.effect_noise((64, 48), 80).save(out, "JPEG", quality=90, exif=Image.Exif())
    content = out.getvalue()
    comment = max(0, min(size - len(content) - 4, 65_000))
    return content[:2] + struct.pack(">HH", 0xFFFE, comment + 2) + b"x" * comment + content[2:]


SMALL = picture(4096)
HEAD = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"isom", 512, b"isom", b"mp42")


def manager_in(folder: str, judged: str) -> StorageManager:
    return manager_on(LocalStorageBackend(Path(folder), fsync=False), judged)


def manager_on(backend: StorageBackend, judged: str) -> StorageManager:
    return StorageManager(backends={"disk": backend}, policies={"files": StoragePolicy("files", "disk", **CHECKS[judged])})


async def put(meter: Meter, *, judged: str) -> None:
    """Store small pictures one after the other."""
    with tempfile.TemporaryDirectory(prefix="granite-") as folder:
        async with manager_in(folder, judged) as manager:
            for _ in range(100):
                await manager.put_bytes(**SLOT, content=SMALL)
            async with meter.measure(operations=PUTS):
                for _ in range(PUTS):
                    await manager.put_bytes(**SLOT, content=SMALL)


async def put_in_memory(meter: Meter, *, judged: str) -> None:
    """Store small pictures in memory, and note the processor time of each: a busy machine disturbs that the least."""
    async with manager_on(MemoryStorageBackend(), judged) as manager:
        took: list[float] = []
        async with meter.measure(operations=PUTS, ticking=False):
            for _ in range(PUTS):
                begun = time.process_time()
                await manager.put_bytes(**SLOT, content=SMALL)
                took.append(time.process_time() - begun)
        meter.note("processor µs, lower quartile", statistics.quantiles(took)[0] * 1e6)


async def stream(meter: Meter, *, judged: str) -> None:
    """Store one long film."""

    async def film() -> AsyncIterator[bytes]:
        yield HEAD + CHUNK[len(HEAD) :]
        for _ in range(SIZE // len(CHUNK) - 1):
            yield CHUNK

    with tempfile.TemporaryDirectory(prefix="granite-") as folder:
        async with manager_in(folder, judged) as manager, meter.measure(size=SIZE):
            await manager.put_stream(**SLOT, stream=film())


def comparison(title: str, function: Callable[..., Awaitable[None]], *, reach: float | None = 0.9, **bounds: Any) -> Comparison:
    contenders = {judged: Contender(function, judged=judged) for judged in reversed(CHECKS)}
    return Comparison(f"inspection: {title}", contenders, baseline="nothing", reach=reach, **bounds)


COMPARISONS = [
    comparison("a picture of 4 KiB to disk, one at a time", put),
    comparison("a picture of 4 KiB to memory, where nothing else takes time", put_in_memory, reach=None),
    comparison("1 GiB stream to disk", stream, max_memory=2 * MIB, max_stall=0.01),
]

if __name__ == "__main__":
    main(COMPARISONS)
