"""What collecting garbage takes: a million objects and references on PostgreSQL, the join alone, and a local listing."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, StorageGarbageCollector, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.base import ObjectInfo
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.gc.merge import PAGE, join_pages
from tests.benchmarks.harness import MIB, Comparison, Contender, Meter, main
from tests.orm.databases import postgres

MILLION = int(os.environ.get("GRANITE_BENCH_OBJECTS", "1000000"))
FILES = 40_000
ONE_ORPHAN_IN = 100
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


class Base(DeclarativeBase):
    pass


class Managed(Base):
    __tablename__ = "managed"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")


def location_of(number: int) -> str:
    return f"files/m/{number:09}/f/{number:012x}7{number & 4095:03x}8{number:015x}-f.bin"


LOCATION = (
    "'files/m/' || lpad(n::text, 9, '0') || '/f/' || lpad(to_hex(n), 12, '0') || '7' || lpad(to_hex(n & 4095), 3, '0')"
    " || '8' || lpad(to_hex(n), 15, '0') || '-f.bin'"
)
FILL = f"""
    INSERT INTO managed SELECT n, jsonb_build_object('storage_key', 'files', 'backend', 'b', 'location', {LOCATION}, 'size', 1,
    'checksum', '', 'content_type', NULL, 'original_filename', 'f.bin', 'created_at', NULL, 'extra', NULL)
    FROM generate_series(1, :count) AS n WHERE n % {ONE_ORPHAN_IN} <> 0 ORDER BY md5(n::text)
"""  # noqa: S608  # constants


class SyntheticBackend(MemoryStorageBackend):
    """Lists objects that are nowhere."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        for number in range(1, self.count + 1):
            yield ObjectInfo(location_of(number), 1, LONG_AGO)


@asynccontextmanager
async def collector_of(count: int) -> AsyncIterator[StorageGarbageCollector]:
    with tempfile.TemporaryDirectory(prefix="granite-") as folder, postgres(Path(folder)) as url:
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text(FILL), {"count": count})
        policies = {"files": StoragePolicy("files", "b", key_prefix="files")}
        async with StorageManager(backends={"b": SyntheticBackend(count)}, policies=policies) as manager:
            binding = bind_storage(Base, manager, session_factory=async_sessionmaker(engine))
            yield StorageGarbageCollector(manager, binding=binding)
            binding.unbind()
        await engine.dispose()


async def collect(meter: Meter, *, objects: int) -> None:
    """List, join, re-check and delete; one object in a hundred is an orphan."""
    async with collector_of(objects) as collector:
        async with meter.measure(operations=objects):
            report = await collector.collect(storage_key="files", dry_run=False)
        assert (report.scanned, report.deleted) == (objects, objects // ONE_ORPHAN_IN)


async def join_alone(meter: Meter, *, objects: int) -> None:
    """Join pages that are in memory."""
    listed = [(location_of(number), 1, True) for number in range(1, objects + 1)]
    references = [(location_of(number), True) for number in range(1, objects + 1) if number % ONE_ORPHAN_IN]
    orphans = 0
    async with meter.measure(operations=objects, ticking=False):
        async for _, unreferenced, _ in join_pages(pages(listed), pages(references)):
            orphans += len(unreferenced)
    assert orphans == objects // ONE_ORPHAN_IN


async def pages(items: Sequence[object]) -> AsyncIterator[list[object]]:
    for start in range(0, len(items), PAGE):
        yield list(items[start : start + PAGE])


async def set_in_memory(meter: Meter, *, objects: int) -> None:
    """Ask a set of all references, as a program that has the memory would."""
    listed = [(location_of(number), 1, True) for number in range(1, objects + 1)]
    references = [location_of(number) for number in range(1, objects + 1) if number % ONE_ORPHAN_IN]
    async with meter.measure(operations=objects, ticking=False):
        found = set(references)
        orphans = [item for item in listed if item[0] not in found]
    assert len(orphans) == objects // ONE_ORPHAN_IN


@asynccontextmanager
async def tree() -> AsyncIterator[Path]:
    """Make files as a local backend has them, in folders of their rows."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  # the disk is not what is measured
    with tempfile.TemporaryDirectory(prefix="granite-", dir=place) as folder:
        root = Path(folder)
        (root / ".granite-storage").touch()
        for number in random.Random(0).sample(range(1, FILES + 1), FILES):
            path = root / location_of(number // 4 * 4).replace("-f.bin", f"-{number}.bin")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        yield root


async def list_local(meter: Meter) -> None:
    async with tree() as root:
        backend, count = LocalStorageBackend(root), 0
        async with meter.measure(operations=FILES):
            async for _ in backend.iter_objects("files/"):
                count += 1
        assert count == FILES
        await backend.aclose()


async def walk(meter: Meter) -> None:
    async with tree() as root:
        count = 0
        async with meter.measure(operations=FILES, ticking=False):
            for folder, _, names in os.walk(root / "files"):
                for name in names:
                    os.stat(os.path.join(folder, name))
                    count += 1
        assert count == FILES


COMPARISONS = [
    Comparison(
        "garbage collected, objects and references on PostgreSQL",
        {f"{count:,}": Contender(collect, objects=count) for count in (MILLION, MILLION // 10)},
        baseline=f"{MILLION // 10:,}",
        max_memory=100 * MIB,
        rounds=1,
    ),
    Comparison(
        f"the join of {MILLION:,} objects alone",
        {"granite": Contender(join_alone, objects=MILLION), "a set in memory": Contender(set_in_memory, objects=MILLION)},
        baseline="a set in memory",
    ),
    Comparison(
        f"{FILES:,} files listed in order",
        {"granite": Contender(list_local), "os.walk and stat": Contender(walk)},
        baseline="os.walk and stat",
        reach=0.67,
    ),
]

if __name__ == "__main__":
    main(COMPARISONS)
