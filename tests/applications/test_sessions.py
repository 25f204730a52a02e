"""Sessions that others make: `scoped_session`, SQLModel's, one inside `AsyncSession.run_sync`, and pytest's rollback fixture."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlmodel
from sqlalchemy import Column, Engine, create_engine, delete, event, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker
from sqlmodel import Field, SQLModel
from sqlmodel.main import default_registry

from granite_storage import Attachment, AttachmentType, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.local import LocalStorageBackend
from tests.core.support import files_below


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")


def manager(folder: Path) -> StorageManager:
    return StorageManager(
        backends={"local": LocalStorageBackend(folder / "files", fsync=False)},
        policies={"documents": StoragePolicy("documents", "local")},
    )


def stored(folder: Path) -> list[bytes]:
    return sorted((folder / "files" / name).read_bytes() for name in files_below(folder / "files"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def storage(tmp_path: Path, engine: Engine) -> Iterator[StorageManager]:
    storage = manager(tmp_path)
    binding = bind_storage(Base, storage, session_factory=sessionmaker(engine))
    yield storage
    binding.unbind()
    storage.sync.close()


@pytest.mark.usefixtures("storage")
class TestPytestRollbackFixture:
    """SQLAlchemy's recipe "Joining a Session into an External Transaction", as test suites have it."""

    @pytest.fixture
    def session(self, engine: Engine, tmp_path: Path, storage: StorageManager) -> Iterator[Session]:
        if engine.dialect.name == "sqlite":  # the recipe of SQLAlchemy's documentation

            @event.listens_for(engine, "connect")
            def _(connection, record) -> None:  # type: ignore[no-untyped-def]
                connection.isolation_level = None

            @event.listens_for(engine, "begin")
            def _(connection) -> None:  # type: ignore[no-untyped-def]
                connection.exec_driver_sql("BEGIN")

            engine.dispose()
        with Session(engine) as before:
            before.add(Document(id=1, file=Attachment(b"before")))
            before.commit()
        with engine.connect() as connection:
            transaction = connection.begin()
            with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
                yield session
            transaction.rollback()
        assert stored(tmp_path) == [b"before"]
        with Session(engine) as after:
            assert after.get_one(Document, 1).file.sync.read() == b"before"
            assert after.scalars(select(Document.id)).all() == [1]

    def test_commits(self, session: Session, tmp_path: Path) -> None:
        session.add(Document(id=2, file=Attachment(b"new")))
        session.commit()
        session.get_one(Document, 2).file = Attachment(b"newer")
        session.commit()
        assert session.get_one(Document, 2).file.sync.read() == b"newer"
        assert b"newer" in stored(tmp_path)

    def test_deletes_and_replaces(self, session: Session) -> None:
        session.get_one(Document, 1).file = Attachment(b"another")
        session.commit()
        session.execute(delete(Document))
        session.commit()

    def test_rolls_back(self, session: Session) -> None:
        session.add(Document(id=2, file=Attachment(b"in vain")))
        session.flush()
        session.rollback()
        session.add(Document(id=2, file=Attachment(b"again")))
        session.commit()

    def test_fails(self, session: Session) -> None:
        session.add(Document(id=2, file=Attachment(b"flushed")))
        session.flush()


class TestScopedSession:
    def test_each_thread_has_its_own(self, engine: Engine, tmp_path: Path) -> None:
        storage = manager(tmp_path)
        sessions = scoped_session(sessionmaker(engine, expire_on_commit=False))
        binding = bind_storage(Base, storage, session_factory=sessions)
        barrier = threading.Barrier(4)

        def work(number: int) -> bytes:
            document = Document(id=number, file=Attachment(f"{number}".encode()))
            sessions.add(document)
            sessions.flush()
            barrier.wait(30) if engine.dialect.name == "postgresql" else None
            (sessions.commit if number % 2 else sessions.rollback)()
            sessions.remove()
            return document.file.sync.read() if number % 2 and document.file else b""

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(8))) == [b"", b"1", b"", b"3", b"", b"5", b"", b"7"]
        assert stored(tmp_path) == [b"1", b"3", b"5", b"7"]

        sessions.delete(sessions.get_one(Document, 1))
        sessions.commit()
        sessions.remove()
        assert stored(tmp_path) == [b"3", b"5", b"7"]
        binding.unbind()
        storage.sync.close()


class TestSQLModel:
    @pytest.fixture
    def model(self) -> Iterator[type[SQLModel]]:
        class Invoice(SQLModel, table=True):
            __tablename__ = "invoice"

            id: int | None = Field(default=None, primary_key=True)
            pdf: Attachment | None = Field(default=None, sa_column=Column(AttachmentType("documents")))

        yield Invoice
        SQLModel.metadata.remove(SQLModel.metadata.tables["invoice"])
        default_registry._dispose_cls(Invoice)

    def test_its_session(self, engine: Engine, tmp_path: Path, model: type[SQLModel]) -> None:
        storage = manager(tmp_path)
        SQLModel.metadata.create_all(engine)
        sessions = sessionmaker(engine, class_=sqlmodel.Session)
        binding = bind_storage(SQLModel, storage, session_factory=sessions)
        with sqlmodel.Session(engine) as session:
            invoice = model(pdf=Attachment(b"first"))
            session.add(invoice)
            session.commit()
            invoice.sqlmodel_update({"pdf": Attachment(b"second")})
            session.add(invoice)
            session.commit()
            assert session.exec(sqlmodel.select(model)).one().pdf.sync.read() == b"second"  # type: ignore[attr-defined]
            assert stored(tmp_path) == [b"second"]
            session.delete(invoice)
            session.flush()
            session.rollback()
            assert stored(tmp_path) == [b"second"]
            session.delete(invoice)
            session.commit()
        assert stored(tmp_path) == []
        binding.unbind()
        storage.sync.close()


class TestInsideRunSync:
    @pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
    async def test_it_awaits(self, tmp_path: Path, database_url: str) -> None:
        """Synchronous code that is called in an `AsyncSession` works with its synchronous session."""
        storage = manager(tmp_path)
        engine = create_async_engine(database_url.replace("sqlite://", "sqlite+aiosqlite://"))
        binding = bind_storage(Base, storage)

        def work(session: Session) -> int:
            session.add(Document(id=1, file=Attachment(b"kept")))
            session.flush()
            with session.begin_nested() as nested:
                session.add(Document(id=2, file=Attachment(b"in vain")))
                session.flush()
                nested.rollback()
            return threading.get_ident()

        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            assert await session.run_sync(work) == threading.get_ident()
            await session.commit()
        assert stored(tmp_path) == [b"kept"]
        binding.unbind()
        await storage.aclose()
        await engine.dispose()
