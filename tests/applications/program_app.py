"""Programs with plain sessions: one that forks, one that Ctrl-C interrupts, one that blocks its event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from granite_storage import (
    Attachment,
    StorageGarbageCollector,
    StorageJournal,
    StorageManager,
    StoragePolicy,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import ConfigurationError


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # MariaDB would number a 0
    file: Mapped[Attachment | None] = attachment("documents")


storage = StorageManager(
    backends={"local": LocalStorageBackend(Path(os.environ["APP_FOLDER"]) / "files")},
    policies={"documents": StoragePolicy("documents", "local")},
)
engine = create_engine(os.environ["DATABASE_URL"])
journal = None
if engine.dialect.name != "sqlite":
    journal_tables(Base.metadata)
    journal = StorageJournal(engine)
sessions = sessionmaker(engine)
binding = bind_storage(Base, storage, session_factory=sessions, journal=journal)
Base.metadata.create_all(engine)


def store(number: int, *, deletes: int | None = None) -> None:
    with sessions.begin() as session:
        session.add(Document(id=number, file=Attachment(f"{number}".encode())))
        if deletes is not None:
            session.delete(session.get_one(Document, deletes))


def fork() -> None:
    """Store before a fork, in the child and in its child, and afterwards in the parent."""
    store(1)
    child = os.fork()
    if child == 0:
        engine.dispose(close=False)
        store(2, deletes=1)
        grandchild = os.fork()
        if grandchild == 0:
            engine.dispose(close=False)
            store(3)
            sys.exit()
        assert os.waitpid(grandchild, 0)[1] == 0
        store(4)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    store(5)
    if journal is not None:
        journal.sync.recover()
    with sessions() as session:
        documents = session.scalars(select(Document).order_by(Document.id)).all()
        print([document.file.sync.read() for document in documents if document.file])


def upload_for_ever() -> None:
    """Upload without end, until Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def chunks() -> Iterator[bytes]:
        print("uploading", flush=True)
        while True:
            yield bytes(64 * 1024)
            time.sleep(0.01)

    try:
        with sessions.begin() as session:
            session.add(Document(id=1, file=Attachment(chunks())))
    except KeyboardInterrupt:
        store(2)
        print("interrupted", flush=True)


def block() -> None:
    """Use a plain session in a thread whose event loop runs: the loop stands still, and nothing else."""

    async def main() -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.01)
        before = ticks
        store(1)
        assert ticks == before
        ticking.cancel()
        with sessions() as session:
            file = session.get_one(Document, 1).file
        assert file is not None
        print([await file.read()])
        await storage.aclose()

    asyncio.run(main())


def work() -> None:
    """Run the journal's worker beside what the program does."""
    assert journal is not None
    with journal.sync.worker(interval=timedelta(milliseconds=50)):
        store(1)
        store(2, deletes=1)
        deadline = time.monotonic() + 30
        while len(list(storage.sync.list(storage_key="documents"))) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    print([info.location.split("/")[1] for info in storage.sync.list(storage_key="documents")])


left_open: list[object] = []


def leave_open() -> None:
    """End with a reader, a listing and a collector still open."""
    store(1)
    with sessions() as session:
        file = session.get_one(Document, 1).file
    assert file is not None
    reader, listing = file.sync.open(), storage.sync.list(storage_key="documents")
    running = StorageGarbageCollector(storage, binding=binding).sync.run_every(timedelta(hours=1))
    running.__enter__()
    left_open.extend([reader, listing, running])
    print([reader.read(1), next(listing).size], flush=True)


def outlive_the_main_thread() -> None:
    """Store, replace and delete in a thread that Python waits for when the main thread has ended."""

    def go_on() -> None:
        main = threading.main_thread()
        main.join()
        for number in range(2, 8):
            store(number, deletes=number - 1)
        print([info.location.split("/")[1] for info in storage.sync.list(storage_key="documents")])

    store(1)
    threading.Thread(target=go_on).start()


def read_in_a_child() -> None:
    """Read in a forked child with a reader of its parent's, and with one of its own."""
    store(1)
    with sessions() as session:
        file = session.get_one(Document, 1).file
    assert file is not None
    reader = file.sync.open()
    if os.fork() == 0:
        try:
            reader.read()
        except ConfigurationError as error:
            print(error, flush=True)
        with file.sync.open() as own:
            print(own.read(), flush=True)
        os._exit(0)
    os.wait()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
