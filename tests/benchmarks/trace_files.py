"""The way of the data: the files of the library that one operation enters, and how many of its functions.

`python -m tests.benchmarks.trace_files` prints a table; `--names` lists the files.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import ClassVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import granite_storage
from granite_storage import Attachment, StorageBinding, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.gc import StorageGarbageCollector

ROOT = str(Path(granite_storage.__file__).parent)
NAMES = {"storage_key": "files", "model_name": "m", "field_name": "f"}
Work = Callable[[], Awaitable[object]]


class Trace:
    """The functions of the library that were called in one operation."""

    newest: ClassVar[Trace | None] = None

    def __init__(self) -> None:
        self.functions: set[tuple[str, str]] = set()

    @property
    def files(self) -> list[str]:
        """The files, in order."""
        return sorted({file for file, _ in self.functions})


def note_call(frame: FrameType, event: str, _: object) -> None:
    """Add a call to the newest trace; in every thread and greenlet, also in threads that an earlier operation has started."""
    code, found = frame.f_code, Trace.newest
    if found is not None and event == "call" and code.co_filename.startswith(ROOT):
        found.functions.add((code.co_filename[len(ROOT) + 1 :], code.co_qualname))


async def trace(prepare: Callable[[], Awaitable[Work]]) -> Trace:
    """Trace an operation that was run once before, when all is imported and compiled; what prepares it does not count."""
    found = Trace()
    threading.setprofile(note_call)
    sys.setprofile(note_call)
    try:
        for is_counted in (False, True):
            work = await prepare()
            Trace.newest = found if is_counted else None
            await work()
            Trace.newest = None
    finally:
        Trace.newest = None
        sys.setprofile(None)
        threading.setprofile(None)
    return found


class Base(DeclarativeBase):
    """The base of the model."""


class Document(Base):
    """A row with a file."""

    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")


async def stream() -> AsyncIterator[bytes]:
    """Yield the content of a file."""
    yield b"a"
    yield b"b"


def of_manager(manager: StorageManager) -> dict[str, Callable[[], Awaitable[Work]]]:
    """Return what is done with a manager alone."""

    async def put_bytes() -> Work:
        return lambda: manager.put_bytes(content=b"content", entity_id="1", **NAMES)

    async def put_stream() -> Work:
        return lambda: manager.put_stream(stream=stream(), entity_id="1", **NAMES)

    async def open_and_read() -> Work:
        ref = await manager.put_bytes(content=b"content", entity_id="1", **NAMES)

        async def work() -> None:
            async with manager.open(ref) as reader:
                async for _ in reader:
                    pass

        return work

    return {"put_bytes": put_bytes, "put_stream": put_stream, "open and read": open_and_read}


@asynccontextmanager
async def sessions(manager: StorageManager) -> AsyncIterator[tuple[async_sessionmaker[AsyncSession], StorageBinding]]:
    """Give sessions of a database in memory whose base is bound to the manager."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    binding = bind_storage(Base, manager, session_factory=maker)
    try:
        yield maker, binding
    finally:
        binding.unbind()
        await engine.dispose()


def of_sessions(maker: async_sessionmaker[AsyncSession], binding: StorageBinding) -> dict[str, Callable[[], Awaitable[Work]]]:
    """Return what is done with rows, and a collection of six objects that have no row."""

    async def add() -> Document:
        document = Document(file=Attachment(b"content"))
        async with maker.begin() as session:
            session.add(document)
        return document

    async def insert() -> Work:
        return add

    async def replace() -> Work:
        key = (await add()).id

        async def work() -> None:
            async with maker.begin() as session:
                document = await session.get_one(Document, key)
                document.file = Attachment(b"other")

        return work

    async def delete() -> Work:
        key = (await add()).id

        async def work() -> None:
            async with maker.begin() as session:
                await session.delete(await session.get_one(Document, key))

        return work

    async def collect() -> Work:
        for number in range(6):
            await binding.manager.put_bytes(content=b"content", entity_id=str(number), **NAMES)
        await asyncio.sleep(0.01)  # past the grace period
        return lambda: collector.collect(storage_key="files")

    collector = StorageGarbageCollector(
        binding.manager, binding=binding, grace_period=timedelta(milliseconds=1), max_deleted_share=1.0
    )
    return {"insert": insert, "replace": replace, "delete": delete, "collect six objects": collect}


async def trace_all() -> dict[str, Trace]:
    """Trace every operation, with both backends where that makes a difference."""
    traces: dict[str, Trace] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, backend in {"memory": MemoryStorageBackend(), "disk": LocalStorageBackend(folder)}.items():
            async with StorageManager(
                backends={"store": backend}, policies={"files": StoragePolicy("files", "store")}
            ) as manager:
                for operation, prepare in of_manager(manager).items():
                    traces[f"{operation}, {name}"] = await trace(prepare)
                if name == "memory":
                    async with sessions(manager) as (maker, binding):
                        for operation, prepare in of_sessions(maker, binding).items():
                            traces[f"{operation}, {name}"] = await trace(prepare)
    return traces


def main() -> None:
    """Print how many files and functions each operation enters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="list the files")
    options = parser.parse_args()
    logging.getLogger("granite_storage").setLevel(logging.ERROR)
    print("| Operation | Files | Functions |", "|---|---|---|", sep="\n")
    for name, found in asyncio.run(trace_all()).items():
        print(f"| {name} | {len(found.files)} | {len(found.functions)} |")
        if options.names:
            print(*(f"    {file}" for file in found.files), sep="\n")


if __name__ == "__main__":
    main()
