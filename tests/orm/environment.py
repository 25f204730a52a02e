"""Models, a storage and sessions for the tests of transactions, and the question that all of them end with: does all agree?"""

from __future__ import annotations

import contextlib
import gc
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    Column,
    CompoundSelect,
    ForeignKey,
    ForeignKeyConstraint,
    Select,
    String,
    cast,
    event,
    false,
    literal,
    select,
    text,
    type_coerce,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.inspection import Scanner
from granite_storage.orm import (
    Attachment,
    AttachmentType,
    StorageBinding,
    StorageJournal,
    StoredObjectRefType,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.orm.journal.tables import JournalTables, clock
from granite_storage.refs import iter_refs
from granite_storage.testing import FaultInjectingBackend
from tests.orm.awaited import AwaitedConnection, AwaitedSession, AwaitedSessions
from tests.orm.databases import Database

__all__ = [
    "Base",
    "Booking",
    "Child",
    "Contract",
    "Doc",
    "Item",
    "Node",
    "Note",
    "OrmEnvironment",
    "Page",
    "Parent",
    "Passport",
    "Person",
    "Photo",
    "Report",
    "Tag",
    "file",
    "orm_environment",
    "other_base",
]


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "doc"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100), default="")
    code: Mapped[str | None] = mapped_column(String(50), unique=True)
    file: Mapped[Attachment | None] = attachment("docs")
    other: Mapped[Attachment | None] = attachment("docs")


class Note(Base):
    """Has its attribute under another name than its column's, and loads it late."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100), default="")
    scan: Mapped[Attachment | None] = attachment("docs", name="scan_ref", deferred=True)


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")
    children: Mapped[list[Child]] = relationship(
        back_populates="parent", passive_deletes=True, cascade="all, delete-orphan", order_by="Child.id"
    )


class Child(Base):
    """Goes with its parent: by the database where it is not loaded, by the session where it is."""

    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("parent.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")
    parent: Mapped[Parent | None] = relationship(back_populates="children")
    tags: Mapped[list[Tag]] = relationship(passive_deletes="all", order_by="Tag.id")


class Tag(Base):
    __tablename__ = "tag"
    id: Mapped[int] = mapped_column(primary_key=True)
    child_id: Mapped[int] = mapped_column(ForeignKey("child.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Node(Base):
    """A tree that the database deletes downwards."""

    __tablename__ = "node"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Item(Base):
    """The root of two kinds of inheritance."""

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    file: Mapped[Attachment | None] = attachment("docs")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}


class Photo(Item):
    """Shares the table of its parent."""

    raw: Mapped[Attachment | None] = attachment("docs", use_existing_column=True)
    __mapper_args__ = {"polymorphic_identity": "photo"}


class Report(Item):
    """Has a table of its own beside its parent's."""

    __tablename__ = "report"
    id: Mapped[int] = mapped_column(ForeignKey("item.id", ondelete="CASCADE"), primary_key=True)
    pdf: Mapped[Attachment | None] = attachment("docs")
    __mapper_args__ = {"polymorphic_identity": "report"}


class Contract(Base):
    """A composite primary key, one part of it a UUID."""

    __tablename__ = "contract"
    party: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    number: Mapped[str] = mapped_column(String(20), primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")
    pages: Mapped[list[Page]] = relationship(cascade="all, delete-orphan", back_populates="contract", order_by="Page.id")


class Page(Base):
    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    party: Mapped[uuid.UUID]
    number: Mapped[str] = mapped_column(String(20))
    file: Mapped[Attachment | None] = attachment("docs")
    contract: Mapped[Contract] = relationship(back_populates="pages")
    __table_args__ = (ForeignKeyConstraint(["party", "number"], ["contract.party", "contract.number"], ondelete="CASCADE"),)


class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), default="")
    passport: Mapped[Passport | None] = relationship(cascade="all, delete-orphan", back_populates="person")


class Passport(Base):
    """Its primary key is a foreign key."""

    __tablename__ = "passport"
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id", ondelete="CASCADE"), primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")
    person: Mapped[Person] = relationship(back_populates="passport")


class Booking(Base):
    """A booking for nobody is refused by PostgreSQL and SQLite, at the COMMIT only."""

    __tablename__ = "booking"
    id: Mapped[int] = mapped_column(primary_key=True)
    person_id: Mapped[int | None]
    file: Mapped[Attachment | None] = attachment("docs")
    __table_args__ = (
        ForeignKeyConstraint(["person_id"], ["person.id"], deferrable=True, initially="DEFERRED").ddl_if(
            callable_=lambda ddl, target, bind, dialect=None, **_: dialect.name in ("postgresql", "sqlite")
        ),
    )


journal_tables(Base.metadata)


def file(content: str | bytes = b"content", filename: str | None = "report.txt") -> Attachment:
    """Return a pending attachment."""
    return Attachment(content.encode() if isinstance(content, str) else content, filename=filename)


@dataclass
class OrmEnvironment:
    """What a test of transactions has to do with; `variants` says what every file has: by their names, how they are derived."""

    database: Database
    engine: AsyncEngine
    backend: FaultInjectingBackend
    manager: StorageManager
    binding: StorageBinding
    sessions: async_sessionmaker[AsyncSession]
    journal: StorageJournal | None = None
    variants: Mapping[str, Callable[[bytes], bytes]] = field(default_factory=dict)

    def sessionmaker(self, session_class: type[Session] | sessionmaker[Session], **options: Any) -> Any:
        """Return what makes sessions of a class of the test's own."""
        if self.database.is_synchronous and isinstance(session_class, sessionmaker):
            session_class.configure(bind=self.engine.sync_engine)
            return AwaitedSessions(session_class)
        if self.database.is_synchronous:
            return AwaitedSessions(sessionmaker(self.engine.sync_engine, class_=session_class, **options))
        return async_sessionmaker(self.engine, sync_session_class=session_class, **options)

    def session(self, bind: Any, **options: Any) -> Any:
        """Return a session on an engine or a connection."""
        if not self.database.is_synchronous:
            return AsyncSession(bind, **options)
        if isinstance(bind, AwaitedConnection):
            return AwaitedSession(Session(bind.sync_connection, **options), bind._thread)
        return AwaitedSession(Session(bind.sync_engine, **options))

    def stream(self, *chunks: bytes | Exception) -> Any:
        """Return a stream that no code could read twice, of the kind that the sessions take; an error ends it."""

        def iterate() -> Iterator[bytes]:
            for chunk in chunks:
                if isinstance(chunk, Exception):
                    raise chunk
                yield chunk

        async def iterate_async() -> AsyncIterator[bytes]:
            for chunk in iterate():
                yield chunk

        return iterate() if self.database.is_synchronous else iterate_async()

    async def objects(self) -> set[str]:
        """Return where the storage has objects."""
        return {info.location async for info in self.backend.iter_objects()}

    async def references(self) -> dict[tuple[str, Any, str], StoredObjectRef]:
        """Return what the rows refer to: by table, primary key and column."""
        async with self.sessions() as session:
            return await self._references(session)

    async def _references(self, session: AsyncSession) -> dict[tuple[str, Any, str], StoredObjectRef]:
        rows = await session.execute(_all_references(tuple(self.binding.ref_columns())))
        return {(table, int(key) if key.isdigit() else key, column): ref for table, key, column, ref in rows}

    async def contents(self) -> dict[tuple[str, Any, str], bytes]:
        """Return what the rows refer to, read from the storage."""
        return await self._read(await self.references())

    async def check(self, **expected: str | bytes | None) -> None:
        """Check that the objects are those that rows refer to, one each, and that nothing was left open.

        Args:
            **expected: What columns of `doc` hold, such as `file_1="content"`, where the row is there; all others hold nothing.
        """
        if self.journal is not None:
            await self.journal.recover()
        references = await self.references()
        await self._require_agreement(references)
        found = await self._read(references)
        if expected:
            wanted = {
                ("doc", int(name.rpartition("_")[2]), name.rpartition("_")[0]): value.encode()
                if isinstance(value, str)
                else value
                for name, value in expected.items()
                if value is not None
            }
            assert found == wanted
        self.check_connections()

    async def check_recovery(self) -> None:
        """Check the same before and after the journal has ended all that it knows of, and that nothing is left in it then."""
        async with self.sessions() as session:
            references, journal = await self._references(session), await self._journal_rows(session)
        await self._require_agreement(references, {row.location for row in journal if row.is_due})
        self.check_connections()
        await self._recover(is_empty=not journal)
        async with self.sessions() as session:
            references, journal = await self._references(session), await self._journal_rows(session)
        _require_empty(journal)
        await self._require_agreement(references)
        await self._read(references)
        self.check_connections()

    async def recover(self) -> None:
        """Let the journal, where there is one, end all that it knows of, as if every lease had run out."""
        if self.journal is not None:
            _require_empty(await self._recover())

    async def _recover(self, *, is_empty: bool = False) -> list[Any]:
        """Recover once, and once more where a deleted upload waits for what may still arrive; return what is left."""
        assert self.journal is not None
        left: list[Any] = []
        for _ in range(2):
            if not is_empty:
                for place in self.places():
                    async with place as (connection, tables):
                        for table in (tables.intent, tables.reclaim):
                            await connection.execute(table.update().values(due=clock(-1.0)))
            await self.journal.recover()
            if is_empty:
                break
            async with self.sessions() as session:
                left = await self._journal_rows(session)
            if not left:
                break
        return left

    @contextlib.asynccontextmanager
    async def uploads(self) -> AsyncIterator[tuple[AsyncConnection, JournalTables]]:
        """Give a connection, in a transaction, to where the intents of uploads are, and the tables there."""
        assert self.journal is not None
        if not self.database.is_sqlite:
            async with self.engine.begin() as connection:
                yield connection, self.journal.tables
            return
        async with self.journal._pool.uploads.writing() as connection:
            yield connection, self.journal._pool.upload_tables(self.journal.tables)

    @contextlib.asynccontextmanager
    async def _beside_rows(self) -> AsyncIterator[tuple[AsyncConnection, JournalTables]]:
        assert self.journal is not None
        async with self.engine.begin() as connection:
            yield connection, self.journal.tables

    def places(self) -> list[contextlib.AbstractAsyncContextManager[tuple[AsyncConnection, JournalTables]]]:
        """Return how to reach each of the databases that have intents: one, but on SQLite."""
        return [self._beside_rows(), *([self.uploads()] if self.database.is_sqlite else [])]

    async def journal_rows(self, name: str) -> list[Any]:
        """Return the rows of a table of the journal, but for the intents of uploads that rows have taken, on SQLite."""
        assert self.journal is not None
        async with self.engine.connect() as connection:
            found = list(await connection.execute(select(getattr(self.journal.tables, name))))
        if self.database.is_sqlite and name in ("intent", "reclaim"):
            referenced = {one.location for ref in (await self.references()).values() for one in iter_refs(ref)}
            known = {*referenced, *(row.location for row in found)}
            async with self.uploads() as (connection, tables):
                beside = list(await connection.execute(select(getattr(tables, name))))
            found += [row for row in beside if row.location not in known]
        return found

    async def expire(self) -> None:
        """Let every lease and every wait be over, but those whose rows a transaction has locked."""
        for place in self.places():
            async with place as (connection, tables):
                for table in (tables.intent, tables.reclaim):
                    free = (await connection.execute(select(table.c.id).with_for_update(skip_locked=True))).scalars().all()
                    await connection.execute(table.update().where(table.c.id.in_(free)).values(due=clock(-1.0)))

    async def is_settled(self) -> bool:
        """Tell whether the journal knows of nothing that is left to do."""
        async with self.sessions() as session:
            return not await self._journal_rows(session)

    async def is_settled_but_for_late_arrivals(self) -> bool:
        """Tell whether the journal does nothing now; it may look once more for what a request still stores."""
        return not (await self.journal_rows("intent") or [row for row in await self.journal_rows("reclaim") if not row.emptied])

    async def _journal_rows(self, session: AsyncSession) -> list[Any]:
        """Return what the journal still knows of: the table, the location, and whether it is due."""
        assert self.journal is not None
        found = list(await session.execute(_all_journal_rows(self.journal.tables)))
        if self.database.is_sqlite:
            async with self.uploads() as (connection, tables):
                found += await connection.execute(_all_journal_rows(tables))
        return found

    async def _require_agreement(
        self, references: dict[tuple[str, Any, str], StoredObjectRef], going: Collection[str] = ()
    ) -> None:
        """Check that the objects are those that rows refer to, one each; others may be there that recovery deletes at once."""
        locations = [one.location for ref in references.values() for one in iter_refs(ref)]
        objects = await self.objects()
        assert len(set(locations)) == len(locations), "two rows share an object"
        referenced = set(locations)
        dangling, orphans = referenced - objects, objects - referenced - set(going)
        assert not dangling, f"dangling: {dangling}; orphans: {orphans}"
        assert not orphans, f"orphans: {orphans}"

    async def _read(self, references: dict[tuple[str, Any, str], StoredObjectRef]) -> dict[tuple[str, Any, str], bytes]:
        found = {place: await self.manager.get(ref) for place, ref in references.items()}
        for place, ref in references.items():
            variants = {name: await self.manager.get(variant) for name, variant in (ref.variants or {}).items()}
            if self.variants:
                wanted = {name: derive(found[place]) for name, derive in self.variants.items()}
                assert variants == wanted, f"the row {place} shows a variant of another file, or none"
        return found

    def check_connections(self) -> None:
        """Check that no connection is in use."""
        if self.engine.pool.checkedout():  # type: ignore[attr-defined]
            gc.collect()
        assert self.engine.pool.checkedout() == 0, "a connection was not returned"  # type: ignore[attr-defined]

    async def add(self, *rows: Any) -> None:
        """Commit rows."""
        async with self.sessions.begin() as session:
            session.add_all(rows)

    async def lose(self, instance: Any, name: str) -> None:
        """Remove an object past everybody, as a broken storage would."""
        async with self.sessions() as session:
            found = await session.get_one(type(instance), instance.id)
            for ref in iter_refs(getattr(found, name).ref):
                await self.manager.delete(ref)

    async def no_foreign_keys(self) -> None:
        """Let SQLite check and cascade nothing, as it does by itself."""
        if self.database.is_sqlite:
            self.database.spoil()
            await self.engine.dispose()
            event.listen(self.engine.sync_engine, "connect", _foreign_keys_off)

    async def sql(self, statement: str) -> None:
        """Run SQL past every session."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement))


def _require_empty(rows: list[Any]) -> None:
    assert not rows, f"the journal is not empty after recovery: {rows}"


@lru_cache(maxsize=16)  # building such statements takes longer than running them
def _all_references(columns: tuple[Column[Any], ...]) -> CompoundSelect[Any]:
    return union_all(*map(_selected, columns))


@lru_cache(maxsize=16)
def _all_journal_rows(tables: JournalTables) -> CompoundSelect[Any]:
    named = [(table, table.c.location, table.c.due <= clock()) for table in (tables.intent, tables.reclaim)]
    named.append((tables.decision, tables.decision.c.outcome, false()))
    return union_all(
        *(select(literal(table.name).label("table"), location, due.label("is_due")) for table, location, due in named)
    )


def _selected(column: Column[Any]) -> Select[Any]:
    first, *rest = (cast(part, String(40)) for part in column.table.primary_key)
    key = sum(rest, start=first)
    value = type_coerce(column, StoredObjectRefType())
    names = literal(column.table.name, String(20)), key.label("key"), literal(column.name, String(20))
    return select(*names, value).where(column.is_not(None))


def _foreign_keys_off(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = OFF")
    cursor.close()


@contextlib.asynccontextmanager
async def orm_environment(
    database: Database,
    *,
    backend: Any = None,
    journaled: bool = False,
    max_size: int = 1 << 20,
    scanner: Scanner | None = None,
    base: type[DeclarativeBase] = Base,
    **options: Any,
) -> AsyncIterator[OrmEnvironment]:
    """Give an environment with empty tables of a base and an empty storage; keyword arguments go to the engine."""
    store = FaultInjectingBackend(MemoryStorageBackend() if backend is None else backend)
    policy = StoragePolicy("docs", "store", max_size=max_size, scanner=scanner)
    manager = StorageManager(backends={"store": store}, policies={"docs": policy})
    async with database.opened(base.metadata, **options) as engine:
        sessions = database.sessionmaker(engine, expire_on_commit=False)
        journal = StorageJournal(engine.sync_engine if database.is_synchronous else engine) if journaled else None
        factory = sessions.sync_maker if database.is_synchronous else sessions
        binding = bind_storage(base, manager, session_factory=factory, journal=journal)
        if database.is_sqlite and journal is not None:
            await journal.check()
        elif journal is not None and not options:
            # The tables are the same for all tests, and the check costs thirty round trips.
            journal._checked, database.is_checked = database.is_checked, True
        env = OrmEnvironment(database, engine, store, manager, binding, sessions, journal)
        try:
            yield env
        finally:
            env.binding.unbind()
            await manager.aclose()
            if journal is not None:
                await journal.aclose()


@contextlib.contextmanager
def other_base(manager: StorageManager) -> Iterator[AttachmentType]:
    """Bind another base, with a table of the same name, and give the type of its attachment column."""

    class Other(DeclarativeBase):
        pass

    class _Doc(Other):
        __tablename__ = "doc"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    binding = bind_storage(Other, manager)
    try:
        column_type = _Doc.__table__.c.file.type
        assert isinstance(column_type, AttachmentType)
        yield column_type
    finally:
        binding.unbind()
