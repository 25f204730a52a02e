"""What the children of the crash tests work on: rows that say what their files contain, so that anybody can tell a wrong byte."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Self, cast

from sqlalchemy import ForeignKey, String, create_engine, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.derived import Derivation, DerivationSource, Missing, When
from granite_storage.exceptions import ScannerUnavailableError
from granite_storage.inspection import ScanResult
from granite_storage.inspection.base import OnUnavailable
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables, storage_triggers
from tests.orm.awaited import AwaitedEngine, AwaitedSessions

__all__ = ["MIB", "PLAIN", "Models", "Place", "Setting", "content_of"]

MIB = 1 << 20


@dataclass(frozen=True)
class Sum:
    """The SHA-256 of a file, as text: by it the audit sees whose variant it is."""

    when: When
    missing: Missing = "nothing"

    def digest(self, name: str) -> str:
        return f"{name}-1"

    @contextlib.asynccontextmanager
    async def make(self, source: DerivationSource) -> AsyncIterator[Derivation]:
        found = hashlib.sha256()
        async with source.open() as chunks:
            async for chunk in chunks:
                found.update(chunk)
        yield Derivation(found.hexdigest().encode(), "text/plain")


@dataclass(frozen=True)
class Models:
    """The models of one base.

    Attributes:
        Base: The base.
        Shelf: Takes its books along when it is deleted.
        Book: Has two files: one that goes at once where it is replaced, and one that is kept for a while; both have a variant.
    """

    Base: Any
    Shelf: Any
    Book: Any


def declare(*, has_triggers: bool) -> Models:
    """Declare the models, and the journal's tables beside them; triggers as well, for writers that bypass the sessions."""

    class Base(DeclarativeBase):
        pass

    class Shelf(Base):
        __tablename__ = "shelf"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        file: Mapped[Attachment | None] = attachment("plain")
        file_says: Mapped[str | None] = mapped_column(String(60))

    class Book(Base):
        __tablename__ = "book"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        shelf_id: Mapped[int | None] = mapped_column(ForeignKey("shelf.id", ondelete="CASCADE"))
        file: Mapped[Attachment | None] = attachment("plain", variants={"sum": Sum("flush")})
        file_says: Mapped[str | None] = mapped_column(String(60))
        kept: Mapped[Attachment | None] = attachment("kept", variants={"sum": Sum("later")})
        kept_says: Mapped[str | None] = mapped_column(String(60))

    journal_tables(Base.metadata)
    if has_triggers:
        storage_triggers(Base.metadata)
    return Models(Base, Shelf, Book)


PLAIN, GUARDED = (declare(has_triggers=has_triggers) for has_triggers in (False, True))


def content_of(says: str) -> bytes:
    """Return what a file contains of which a row says this; the size stands at its end, after a dash."""
    size = int(says.rpartition("-")[2])
    block = hashlib.sha256(says.encode()).digest() * 2048
    return (block * (size // len(block) + 1))[:size]


class OftenAway:
    """A scanner that finds nothing, and is not there each third time: what it cannot judge is held."""

    on_unavailable: OnUnavailable = "hold"

    async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
        if random.random() < 0.3:
            raise ScannerUnavailableError("it is away")
        async for _ in content:
            pass
        return ScanResult(True, "often away")


@dataclass(frozen=True)
class Setting:
    """Where rows and objects are, in a form that fits through a pipe.

    Attributes:
        url: The database's.
        storage: `{"root": ...}` for local disk, or what an S3 backend is made with.
        lease: The journal's lease in seconds.
        retention: How long a book's second file is kept, in seconds.
        is_synchronous: Whether its programs work with synchronous sessions.
        journal_mode: That of a database on SQLite.
        has_triggers: Whether the database has triggers, and its programs write SQL past their sessions as well.
    """

    url: str
    storage: dict[str, Any] = field(hash=False)
    lease: float = 1.5
    retention: float = 1.0
    is_synchronous: bool = False
    journal_mode: str = "WAL"
    has_triggers: bool = False

    @property
    def models(self) -> Models:
        return GUARDED if self.has_triggers else PLAIN

    @property
    def is_sqlite(self) -> bool:
        return self.url.startswith("sqlite")

    @property
    def is_postgres(self) -> bool:
        return self.url.startswith("postgresql")

    @property
    def is_local(self) -> bool:
        return "root" in self.storage

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def backend(self) -> Any:
        if self.is_local:
            return LocalStorageBackend(self.storage["root"], fsync=False)
        import aioboto3

        from granite_storage.backends.s3 import S3StorageBackend

        options = dict(self.storage)
        session = aioboto3.Session(**options.pop("session"))
        return S3StorageBackend(session=session, part_size=5 * MIB, **options)

    @contextlib.asynccontextmanager
    async def opened(self, name: str, isolation_level: str | None = None, **options: Any) -> AsyncIterator[Place]:
        """Open both, under a name by which the database's own list of clients shows this one."""
        engine = self._engine(name, isolation_level, **options)
        backend = self.backend()
        policies = {
            "plain": StoragePolicy("plain", "store", scanner=OftenAway()),
            "kept": StoragePolicy("kept", "store", scanner=OftenAway(), retention=timedelta(seconds=self.retention)),
        }
        manager = StorageManager(backends={"store": backend}, policies=policies)
        journal = StorageJournal(engine.sync_engine if self.is_synchronous else engine, lease=timedelta(seconds=self.lease))
        binding = bind_storage(self.models.Base, manager, journal=journal)
        sessions: Any = async_sessionmaker(engine, expire_on_commit=False)
        if self.is_synchronous:
            sessions = AwaitedSessions(sessionmaker(engine.sync_engine, expire_on_commit=False))
        try:
            yield Place(self, engine, backend, manager, journal, sessions)
        finally:
            binding.unbind()
            await manager.aclose()
            await engine.dispose()

    def _engine(self, name: str, isolation_level: str | None, **options: Any) -> AsyncEngine:
        url = make_url(self.url)
        match url.get_driver_name():
            case "asyncpg":
                options.setdefault("connect_args", {"server_settings": {"application_name": name}})
            case "psycopg":
                options.setdefault("connect_args", {"application_name": name})
        if isolation_level is not None:
            options["isolation_level"] = isolation_level
        engine: Any = None
        if self.is_synchronous:
            engine = AwaitedEngine(create_engine(url, **options))
        elif self.is_sqlite:
            engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"), **options)
        else:
            engine = create_async_engine(url, **options)
        if self.is_sqlite:
            event.listen(engine.sync_engine, "connect", self._on_connect)
            begin = "BEGIN IMMEDIATE" if name == "crash-child" else "BEGIN"  # the parent reads beside a child that stands still
            event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return cast("AsyncEngine", engine)

    def _on_connect(self, connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("foreign_keys = ON", f"journal_mode = {self.journal_mode}", "synchronous = NORMAL"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        return cls(**given)


@dataclass
class Place:
    """A setting that is open."""

    setting: Setting
    engine: AsyncEngine
    backend: Any
    manager: StorageManager
    journal: StorageJournal
    sessions: async_sessionmaker[AsyncSession]

    @property
    def models(self) -> Models:
        return self.setting.models
