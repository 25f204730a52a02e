"""What a synchronous session stores from, where it runs, and what it leaves when it is interrupted."""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster
from sqlalchemy import create_engine, event
from sqlalchemy.exc import InvalidRequestError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from starlette.datastructures import UploadFile

from granite_storage import StorageBinding, StorageGarbageCollector, StorageManager, _portal, bind_storage
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm import Attachment, _util
from tests import tiers
from tests.core.interrupts import OF_DESTRUCTORS, interrupt, signalled
from tests.orm.values import Base, Document, make_manager

Make = Callable[[], Session]


@pytest.fixture
def manager() -> Iterator[StorageManager]:
    manager = make_manager()
    yield manager
    manager.sync.close()


@pytest.fixture
def sessions(tmp_path: Path, manager: StorageManager) -> Iterator[sessionmaker[Session]]:
    engine = create_engine(f"sqlite:///{tmp_path}/test.db")
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine, expire_on_commit=False)
    binding = bind_storage(Base, manager, session_factory=sessions)
    yield sessions
    binding.unbind()
    engine.dispose()


def objects(manager: StorageManager) -> list[str]:
    return sorted({info.location for key in manager.policies for info in manager.sync.list(storage_key=key)})


def test_sources(sessions: Make, manager: StorageManager, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"a file")
    with sessions() as session, path.open("rb") as file:
        upload = UploadFile(io.BytesIO(b"an upload"), filename="a.txt")
        upload.file.read(3)
        sources: list[Any] = [b"bytes", file, (chunk for chunk in (b"a ", b"stream")), upload]
        documents = [Document(file=Attachment(source)) for source in sources]
        documents.append(Document(file=Attachment.from_upload(UploadFile(io.BytesIO(b"another"), filename="b.txt"))))
        session.add_all(documents)
        session.commit()
    contents = [document.file.sync.read() for document in documents if document.file is not None]
    assert contents == [b"bytes", b"a file", b"a stream", b"an upload", b"another"]
    assert len(objects(manager)) == 5


def test_asynchronous_stream(sessions: Make, manager: StorageManager) -> None:
    """It belongs to an event loop, which waits meanwhile or runs elsewhere: refused before anything is stored."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"abc"

    with sessions() as session:
        session.add_all([Document(file=Attachment(b"abc")), Document(file=Attachment(chunks()))])
        with pytest.raises(TypeError, match="asynchronous stream"):
            session.commit()
    assert objects(manager) == []


def test_stored_before_the_transaction(sessions: Make, manager: StorageManager) -> None:
    attachment = Attachment(b"abc").sync.store(Document.file)
    assert len(objects(manager)) == 1
    with sessions() as session:
        session.add(Document(file=attachment))
        session.commit()
    with attachment.sync.open() as reader:
        assert reader.read() == b"abc"
    assert attachment.sync.exists()
    assert objects(manager) == [attachment.location]


def test_in_a_thread_with_an_event_loop(
    sessions: Make,
    manager: StorageManager,
    caplog: pytest.LogCaptureFixture,
    _nothing_blocks: BlockBuster,  # noqa: PT019  # it is asked to allow what the application does
) -> None:
    """As in an `async def` endpoint: the session works, and says once that the loop stands still."""
    _util._warn_of_blocked_loop.cache_clear()
    _nothing_blocks.deactivate()

    async def endpoint() -> None:
        for _ in range(2):
            with sessions() as session:
                session.add(Document(file=Attachment(b"abc")))
                session.commit()

    def run() -> None:
        asyncio.run(endpoint())

    with caplog.at_level(logging.WARNING, "granite_storage"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(objects(manager)) == 2
    assert [record.message for record in caplog.records if "blocks the event loop" in record.message]
    assert len(caplog.records) == 1


def test_scoped_session(sessions: Any, manager: StorageManager) -> None:
    session = scoped_session(sessions)
    session.add(Document(file=Attachment(b"abc")))
    session.flush()
    assert len(objects(manager)) == 1
    session.remove()
    assert objects(manager) == []


def test_session_that_is_dropped(sessions: Make, manager: StorageManager) -> None:
    """Nobody closes it: what it stored is removed when its connection goes back."""
    session = sessions()
    session.add(Document(file=Attachment(b"abc")))
    session.flush()
    del session
    with sessions() as other:
        assert other.query(Document).count() == 0


def test_error_of_a_listener_after_the_commit(sessions: Make, manager: StorageManager) -> None:
    with sessions() as session:
        document = Document(file=Attachment(b"a"))
        session.add(document)
        session.commit()

        def fail(_: Session) -> None:
            raise LookupError("a listener")

        event.listen(session, "after_commit", fail)
        document.file = Attachment(b"b")
        with pytest.raises(LookupError, match="a listener"):
            session.commit()
        event.remove(session, "after_commit", fail)
    with sessions() as session:
        (held,) = [document.file.location for document in session.query(Document) if document.file is not None]
    assert objects(manager) == [held]


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_interrupted_flush(sessions: Make, manager: StorageManager, error: type[BaseException]) -> None:
    """As Ctrl-C does, or the soft time limit of a task in Celery: nothing is left of the upload."""
    begun = threading.Event()

    def chunks() -> Iterator[bytes]:
        for _ in range(2000):
            begun.set()
            yield b"x"
            time.sleep(0.01)

    with signalled(begun, error), pytest.raises(error, match="interrupted"), sessions() as session:
        session.add_all([Document(file=Attachment(b"first")), Document(file=Attachment(chunks()))])
        session.commit()
    assert objects(manager) == []
    with sessions() as session:
        assert session.query(Document).count() == 0


@OF_DESTRUCTORS
@pytest.mark.parametrize("change", ["insert", "replace", "delete"])
def test_interrupted_at_each_moment(tmp_path: Path, manager: StorageManager, change: str) -> None:
    """Ctrl-C at any moment of a transaction: rows and objects agree afterwards, or the collector makes them agree."""
    engine = create_engine(f"sqlite:///{tmp_path}/interrupted.db")
    Base.metadata.create_all(engine)
    sessions = sessionmaker(engine)
    binding = bind_storage(Base, manager, session_factory=sessions)
    collector = StorageGarbageCollector(manager, binding=binding, grace_period=timedelta(0), max_deleted_share=1.0)

    def transact() -> None:
        # What SQLAlchemy makes of an interrupt in one of its own cleanups is an InvalidRequestError.
        with suppress(InvalidRequestError), sessions() as session:
            if change == "insert":
                session.add(Document(id=1, file=Attachment(b"new")))
            elif change == "replace":
                session.get_one(Document, 1).file = Attachment(b"new")
            else:
                session.delete(session.get_one(Document, 1))
            session.commit()

    def prepare() -> None:
        with sessions.begin() as session:
            session.query(Document).delete()
            if change != "insert":
                session.add(Document(id=1, file=Attachment(b"old")))

    step = 1 if tiers.is_exhaustive() else 101
    for moment in itertools.count(tiers.seed() % step + 1, step):
        prepare()
        if not interrupt(transact, moment):
            break
        engine.dispose()  # an interrupt while a connection goes back to the pool keeps it there
        with sessions() as session:
            held = [(document.file.location, document.file.sync.read()) for document in session.query(Document) if document.file]
        assert [content for _, content in held] in ([], [b"old"], [b"new"]), moment
        collector.sync.collect(storage_key="documents", dry_run=False, allow_no_references=True)
        assert objects(manager) == [location for location, _ in held], moment
    binding.unbind()
    engine.dispose()


def test_rollback_while_the_manager_is_closed(sessions: Make, manager: StorageManager) -> None:
    """Closing waits for another thread's upload: what the rollback leaves is deleted all the same."""
    begun, enough = threading.Event(), threading.Event()

    def chunks() -> Iterator[bytes]:
        while not enough.is_set():
            begun.set()
            time.sleep(0.01)
            yield b"x"

    with sessions() as session:
        session.add(Document(file=Attachment(b"abc")))
        session.flush()
        storing = threading.Thread(target=lambda: Attachment(chunks()).sync.store(Document.file))
        storing.start()
        begun.wait(10)
        closing = threading.Thread(target=manager.sync.close)
        closing.start()
        time.sleep(0.1)
        with pytest.raises(ConfigurationError, match="being closed"):
            Attachment(b"late").sync.store(Document.file)
        session.rollback()
        enough.set()
        storing.join()
        closing.join()
    assert len(objects(manager)) == 1  # that of the other thread


def test_collector(sessions: Any, manager: StorageManager) -> None:
    """It reads the rows through the application's synchronous sessions, in threads."""
    with sessions() as session:
        session.add(Document(file=Attachment(b"abc")))
        session.commit()
    Attachment(b"orphan").sync.store(Document.file)
    assert len(objects(manager)) == 2
    binding = next(binding for binding in _bindings() if binding.manager is manager)
    collector = StorageGarbageCollector(manager, binding=binding, grace_period=timedelta(0), max_deleted_share=1.0)
    (key,) = {
        column.type.storage_key for column in binding.ref_columns() if column.table is Document.__table__ and column.key == "file"
    }
    time.sleep(0.01)
    report = collector.sync.collect(storage_key=key, dry_run=False)
    assert (report.referenced, report.deleted) == (1, 1)
    assert len(objects(manager)) == 1
    with collector.sync.run_every(timedelta(hours=1)):
        pass


def test_collector_and_a_database_of_one_thread(manager: StorageManager) -> None:
    """SQLite in memory is another, empty database in the thread that reads the rows: nothing is deleted by what that shows."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    binding = bind_storage(Base, manager, session_factory=sessionmaker(engine))
    try:
        with Session(engine) as session:
            session.add(Document(file=Attachment(b"abc")))
            session.commit()
        collector = StorageGarbageCollector(manager, binding=binding, grace_period=timedelta(0), max_deleted_share=1.0)
        with pytest.raises(ConfigurationError, match="in memory"):
            collector.sync.collect(storage_key=next(iter(manager.policies)), dry_run=False)
        assert len(objects(manager)) == 1
    finally:
        binding.unbind()
        engine.dispose()


def test_locked_database(sessions: Any, manager: StorageManager, tmp_path: Path) -> None:
    """The statement fails after the upload: nothing is left of it."""
    engine = create_engine(f"sqlite:///{tmp_path}/test.db", connect_args={"timeout": 0.1})
    with sessions() as holding, Session(engine) as session:
        holding.add(Document())
        holding.flush()
        session.add(Document(file=Attachment(b"abc")))
        with pytest.raises(OperationalError, match="locked"):
            session.commit()
    engine.dispose()
    assert objects(manager) == []


def _bindings() -> list[StorageBinding]:
    from granite_storage.orm._interfaces import active_bindings

    return list(active_bindings())  # type: ignore[arg-type]


def test_interrupted_after_the_uploads(sessions: Make, manager: StorageManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes when the files are stored, before the flush knows of it: the rollback deletes them."""
    wait = _portal._Call.result

    def interrupted(call: Any) -> Any:
        result = wait(call)
        if call._work.__name__ == "store":
            raise KeyboardInterrupt
        return result

    attachments = [Attachment(b"first"), Attachment(b"second")]
    with monkeypatch.context() as patched, sessions() as session:
        patched.setattr(_portal._Call, "result", interrupted)
        session.add_all(Document(file=attachment) for attachment in attachments)
        with pytest.raises(KeyboardInterrupt):
            session.flush()
        assert len(objects(manager)) == 2
    assert objects(manager) == []
    with sessions() as session:
        session.add_all(Document(file=attachment) for attachment in attachments)
        session.commit()
    assert len(objects(manager)) == 2
    assert [attachment.sync.read() for attachment in attachments] == [b"first", b"second"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_source_that_ends_the_program(sessions: Make, manager: StorageManager, error: type[BaseException]) -> None:
    """One of several files at once; the next flush of the process works."""

    def chunks() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise error("from the source")

    with sessions() as session:
        session.add_all(Document(file=Attachment(source)) for source in (b"before", chunks(), b"after"))
        with pytest.raises(error, match="from the source"):
            session.commit()
    assert objects(manager) == []
    with sessions() as session:
        session.add(Document(file=Attachment(b"another")))
        session.commit()
    assert len(objects(manager)) == 1
