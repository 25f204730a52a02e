"""A Celery application whose tasks keep attachments through plain sessions; its manager was used before the pool forks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.signals import worker_process_init
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from granite_storage import Attachment, StorageJournal, StorageManager, StoragePolicy, attachment, bind_storage, journal_tables
from granite_storage.backends.local import LocalStorageBackend

FOLDER = Path(os.environ["APP_FOLDER"])

app = Celery(
    "documents",
    broker="filesystem://",
    backend=f"file://{FOLDER}/results",
    broker_transport_options={
        "data_folder_in": f"{FOLDER}/queue",
        "data_folder_out": f"{FOLDER}/queue",
        "control_folder": f"{FOLDER}/control",
        "polling_interval": 0.05,
    },
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # MariaDB would number a 0
    file: Mapped[Attachment | None] = attachment("documents")


storage = StorageManager(
    backends={"local": LocalStorageBackend(FOLDER / "files")},
    policies={"documents": StoragePolicy("documents", "local", key_prefix="documents")},
)
engine = create_engine(os.environ["DATABASE_URL"])
journal = None
if engine.dialect.name != "sqlite":
    journal_tables(Base.metadata)
    journal = StorageJournal(engine)
sessions = sessionmaker(engine)
bind_storage(Base, storage, session_factory=sessions, journal=journal)

# The parent of the pool uses everything: the loop runs, connections are open.
Base.metadata.create_all(engine)
with sessions.begin() as session:
    session.add(Document(id=0, file=Attachment(b"before the fork")))
with sessions() as session:
    assert session.get_one(Document, 0).file.sync.read() == b"before the fork"


@worker_process_init.connect
def leave_connections_to_parent(**_: object) -> None:
    """Do what SQLAlchemy's documentation asks of every process that forks."""
    engine.dispose(close=False)


@app.task
def store(number: int, size: int) -> int:
    with sessions.begin() as session:
        session.add(Document(id=number, file=Attachment(bytes(size), filename=f"{number}.bin")))
    return os.getpid()


@app.task
def read(number: int) -> int:
    with sessions() as session:
        return len(session.get_one(Document, number).file.sync.read())


@app.task
def delete(number: int) -> None:
    with sessions.begin() as session:
        session.delete(session.get_one(Document, number))


@app.task
def fail(number: int) -> None:
    with sessions.begin() as session:
        session.add(Document(id=number, file=Attachment(b"in vain")))
        session.flush()
        raise ValueError("after the flush")


@app.task
def recover() -> None:
    if journal is not None:  # which deletes what rows have released
        journal.sync.recover()


@app.task(soft_time_limit=1, time_limit=30)
def upload_too_slowly(number: int) -> str:
    try:
        with sessions.begin() as session:
            session.add(Document(id=number, file=Attachment(endless())))
    except SoftTimeLimitExceeded:
        return "ended by the soft time limit"
    raise AssertionError("nothing ends it")


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(64 * 1024)
        time.sleep(0.01)
