"""What the journal costs: attachments with it against without, on PostgreSQL, 64 sessions at a time.

The third contender shows what no implementation can save: sessions without a journal that commit a bare row before each upload,
as many together as the journal does, delete it in the transaction of the row, and insert another one where a file is replaced.

After its measurement each contender counts the round trips to the database and the commits of an operation.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sqlalchemy import Engine, Uuid, bindparam, delete, event, insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables
from granite_storage.orm.journal.intents import GroupCommit, NewIntent, new_id
from tests.benchmarks.harness import Comparison, Contender, Meter, main
from tests.orm.databases import postgres

SESSIONS = 64
ROWS = 1024
WARM_UP = 128
CONTENT = os.urandom(4096)

Kind: TypeAlias = Literal["journal", "plain", "bare"]


class Base(DeclarativeBase):
    pass


class Managed(Base):
    __tablename__ = "managed"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("files")


class Bare(Base):
    __tablename__ = "bare"
    id: Mapped[Any] = mapped_column(Uuid(), primary_key=True)
    text: Mapped[str]


journal_tables(Base.metadata)

INSERT = insert(Bare.__table__)  # type: ignore[arg-type]
DELETE = delete(Bare.__table__).where(Bare.__table__.c.id == bindparam("own"))  # type: ignore[arg-type]


class BareRows:
    """Commits a row for each session, as many together as wait at that moment, on a connection of its own."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._commits = GroupCommit()

    async def write(self) -> Any:
        """Commit a row; return its key."""
        own = new_id()
        await self._commits.write([(own, ("b", "x" * 80, None))], self._insert)
        return own

    async def _insert(self, rows: Sequence[NewIntent]) -> None:
        async with self._engine.begin() as connection:
            await connection.execute(INSERT, [{"id": own, "text": place[1]} for own, place in rows])


class BenchmarkEnvironment:
    """The sessions of one contender.

    Args:
        engine: Their engine.
        bare: What commits bare rows in place of intents, if anything does.
    """

    def __init__(self, engine: AsyncEngine, bare: BareRows | None) -> None:
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)
        self._bare = bare

    async def add(self, number: int) -> None:
        """Insert a row with a file in a transaction of its own."""
        own = None if self._bare is None else await self._bare.write()
        async with self._sessions.begin() as session:
            session.add(Managed(id=number, file=Attachment(CONTENT, filename="file.bin")))
            await self._consume(session, own)

    async def change(self, number: int) -> None:
        """Replace the file of a row in a transaction of its own; the old one is deleted."""
        async with self._sessions.begin() as session:
            row = await session.get_one(Managed, number)
            own = None if self._bare is None else await self._bare.write()
            row.file = Attachment(CONTENT, filename="file.bin")
            await self._consume(session, own, replaces=True)

    async def _consume(self, session: AsyncSession, own: Any, *, replaces: bool = False) -> None:
        if self._bare is None:
            return
        await session.flush()
        connection = await session.connection()
        await connection.execute(DELETE, {"own": own})
        if replaces:
            await connection.execute(INSERT, {"id": new_id(), "text": "x" * 80})


@asynccontextmanager
async def environment(kind: Kind) -> AsyncIterator[BenchmarkEnvironment]:
    """Give the sessions of a contender, on a database and a disk of its own."""
    with tempfile.TemporaryDirectory(prefix="granite-") as folder, postgres(Path(folder)) as url:
        url = url.set(drivername="postgresql+asyncpg")
        engine, other = create_async_engine(url, pool_size=16, max_overflow=0), create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        store = LocalStorageBackend(Path(folder, "files"), fsync=False)
        async with StorageManager(backends={"b": store}, policies={"files": StoragePolicy("files", "b")}) as manager:
            binding = bind_storage(Base, manager, journal=StorageJournal(engine) if kind == "journal" else None)
            yield BenchmarkEnvironment(engine, BareRows(other) if kind == "bare" else None)
            binding.unbind()
        await other.dispose()
        await engine.dispose()


async def insert_rows(meter: Meter, *, kind: Kind) -> None:
    """Insert rows with a file, each in a transaction of its own."""
    async with environment(kind) as sessions:
        await each(range(WARM_UP), sessions.add)
        async with meter.measure(operations=ROWS):
            await each(range(WARM_UP, WARM_UP + ROWS), sessions.add)
        with counted(meter, WARM_UP):
            await each(range(WARM_UP + ROWS, 2 * WARM_UP + ROWS), sessions.add)


async def replace_files(meter: Meter, *, kind: Kind) -> None:
    """Replace the files of rows, each in a transaction of its own."""
    async with environment(kind) as sessions:
        await each(range(ROWS), sessions.add)
        await each(range(WARM_UP), sessions.change)
        async with meter.measure(operations=ROWS):
            await each(range(ROWS), sessions.change)
        with counted(meter, WARM_UP):
            await each(range(WARM_UP), sessions.change)


@contextmanager
def counted(meter: Meter, operations: int) -> Iterator[None]:
    """Count the round trips of a block and its commits; BEGIN and COMMIT are round trips, too."""
    seen: Counter[str] = Counter()
    names = ("before_cursor_execute", "begin", "commit", "rollback")
    listeners = [(name, lambda *_, name=name: seen.update([name])) for name in names]
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    yield
    for name, listener in listeners:
        event.remove(Engine, name, listener)
    meter.note("round trips", seen.total() / operations)
    meter.note("commits", seen["commit"] / operations)


async def each(numbers: range, work: Callable[[int], Awaitable[None]]) -> None:
    """Do work for each number, as many at a time as there are sessions."""
    places = asyncio.Semaphore(SESSIONS)

    async def one(number: int) -> None:
        async with places:
            await work(number)

    await asyncio.gather(*map(one, numbers))


def compared(title: str, work: Callable[..., Awaitable[None]], reach: float) -> Comparison:
    """Compare the contenders on a task."""
    contenders = {
        "with a journal": Contender(work, kind="journal"),
        "without": Contender(work, kind="plain"),
        "without, but bare rows": Contender(work, kind="bare"),
    }
    return Comparison(title, contenders, baseline="without", reach=reach)


COMPARISONS = [
    compared("inserts with a file, 64 sessions at a time, PostgreSQL", insert_rows, 0.9),
    compared("replaced files, 64 sessions at a time, PostgreSQL", replace_files, 0.85),
]

if __name__ == "__main__":
    main(COMPARISONS)
