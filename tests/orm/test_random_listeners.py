"""Random listeners against random flushes: whatever they do to what a flush was to do, objects and references agree afterwards.

Listeners stand on `Session` before and after the library's own, on a subclass, on one session and on mapped classes; they take
deletes back, expunge, expire, put old values back, assign other files, move files to other rows, delete, and raise.
`GRANITE_LISTENERS` says how many transactions each database has, and `GRANITE_LISTENERS_SEED` what they do; a failure says its
seed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from random import Random
from typing import Any, ClassVar

import pytest
from sqlalchemy import delete, event, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SAWarning
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import get_history
from sqlalchemy.orm.exc import ObjectDeletedError, StaleDataError

from granite_storage.exceptions import StaleAttachmentError
from tests.orm.databases import Database
from tests.orm.environment import Child, Doc, Note, OrmEnvironment, Parent, file, orm_environment
from tests.tiers import is_exhaustive

TRANSACTIONS = int(os.environ.get("GRANITE_LISTENERS", "0"))
SEED = int(os.environ.get("GRANITE_LISTENERS_SEED", "15"))
DEFAULTS = {"sqlite-begin": 250, "asyncpg": 60} if is_exhaustive() else {"sqlite-begin": 60, "asyncpg": 30}
MOST = 4
COLUMNS = {Doc: ["file", "other"], Note: ["scan"], Parent: ["file"], Child: ["file"]}
KINDS: list[type[Any]] = list(COLUMNS)


class BoomError(Exception):
    """A listener's own error."""


class OwnSession(Session):
    """A session class of the application's."""


# What may come of listeners that know nothing of each other, beside their own errors: a row that is not there any more, two rows
# of one key, and a file that two rows would hold.
EXPECTED = (BoomError, DBAPIError, StaleDataError, ObjectDeletedError, InvalidRequestError, StaleAttachmentError)


def new_file(random: Random) -> Any:
    return None if random.random() < 0.2 else file(random.choice("abcd"))


class Meddler:
    """Does at random to the rows of a flush what listeners do."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def before_flush(self, session: Session, *_: Any) -> None:
        ways: list[Callable[[Session], None]] = [
            self._take_deletes_back,
            self._take_deletes_back,
            self._put_old_values_back,
            self._put_old_values_back,
            self._archive,
            self._archive,
            self._expunge,
            self._expire,
            self._assign,
            self._delete,
            self._swap,
        ]
        for way in self._random.sample(ways, self._random.randint(1, 3)):
            way(session)
        if self._random.random() < 0.05:
            raise BoomError

    def before_write(self, _: Any, __: Any, target: Any) -> None:
        """Change a row as listeners of its class do."""
        name = self._random.choice(COLUMNS[type(target)])
        match self._random.randint(0, 3):
            case 0 if old := get_history(target, name).deleted:
                setattr(target, name, old[0])
            case 1:
                setattr(target, name, new_file(self._random))
            case 2 if self._random.random() < 0.1:
                raise BoomError

    def after_flush(self, *_: Any) -> None:
        if self._random.random() < 0.03:
            raise BoomError

    def _some(self, instances: Any) -> list[Any]:
        known = sorted(
            (one for one in instances if type(one) in COLUMNS), key=lambda one: (type(one).__name__, one.__dict__["id"])
        )
        return [one for one in known if self._random.random() < 0.6]

    def _take_deletes_back(self, session: Session) -> None:
        session.add_all(self._some(session.deleted))

    def _put_old_values_back(self, session: Session) -> None:
        for instance in self._some(session.dirty):
            for name in COLUMNS[type(instance)]:
                if old := get_history(instance, name).deleted:
                    setattr(instance, name, old[0])

    def _archive(self, session: Session) -> None:
        for instance in self._some([*session.deleted, *session.dirty]):
            name = self._random.choice(COLUMNS[type(instance)])
            value = instance.__dict__.get(name)
            if value is not None:
                session.add(Doc(id=self._random.randint(100, 100_000), file=value))
                if self._random.random() < 0.5 and instance not in session.deleted:
                    setattr(instance, name, None)

    def _expunge(self, session: Session) -> None:
        for instance in self._some([*session.new, *session.dirty]):
            session.expunge(instance)

    def _expire(self, session: Session) -> None:
        for instance in self._some(session.dirty):
            session.expire(instance, self._random.choice([None, COLUMNS[type(instance)]]))

    def _assign(self, session: Session) -> None:
        for instance in self._some([*session.new, *session.dirty]):
            setattr(instance, self._random.choice(COLUMNS[type(instance)]), new_file(self._random))

    def _delete(self, session: Session) -> None:
        for instance in self._some(session.dirty):
            session.delete(instance)

    def _swap(self, session: Session) -> None:
        for instance in self._some(session.dirty):
            if isinstance(instance, Doc) and {"file", "other"} <= set(instance.__dict__):
                instance.file, instance.other = instance.other, instance.file


class Application:
    """Changes rows in one transaction at random."""

    def __init__(self, session: AsyncSession, random: Random) -> None:
        self._session = session
        self._random = random

    async def work(self, depth: int = 0) -> None:
        """Do some of all that may be done, flushing now and then."""
        steps = [self.insert, self.insert, self.replace, self.replace, self.move, self.move, self.delete, self.delete]
        for _ in range(self._random.randint(1, 6)):
            what = self._random.random()
            if what < 0.08 and depth < 2:
                await self._work_in_savepoint(depth + 1)
            elif what < 0.14:
                await self._work_in_bulk()
            else:
                await self._random.choice(steps)()
            if self._random.random() < 0.2:
                await self._session.flush()

    async def _work_in_savepoint(self, depth: int) -> None:
        async with self._session.begin_nested() as savepoint:
            await self.work(depth)
            if self._random.random() < 0.4:
                await savepoint.rollback()

    async def _work_in_bulk(self) -> None:
        kind, number = self._random.choice(KINDS), self._number()
        if self._random.random() < 0.5:
            await self._session.execute(delete(kind).where(kind.id == number))
        else:
            values = {self._random.choice(COLUMNS[kind]): None}
            await self._session.execute(update(kind).where(kind.id == number).values(values))

    async def insert(self) -> None:
        kind, number = self._random.choice(KINDS), self._number()
        if await self._any(kind, number) is None:
            row = kind(id=number, **{name: new_file(self._random) for name in COLUMNS[kind]})
            if kind is Child:
                row.parent = await self._any(Parent)
            self._session.add(row)

    async def replace(self) -> None:
        kind = self._random.choice(KINDS)
        row = await self._any(kind)
        if row is not None:
            setattr(row, self._random.choice(COLUMNS[kind]), new_file(self._random))

    async def move(self) -> None:
        kind, other_kind = self._random.choice(KINDS), self._random.choice(KINDS)
        row, other = await self._any(kind), await self._any(other_kind)
        if row is not None and other is not None:
            name, other_name = self._random.choice(COLUMNS[kind]), self._random.choice(COLUMNS[other_kind])
            with self._session.no_autoflush:
                value = await self._session.run_sync(lambda _: getattr(row, name))
            setattr(other, other_name, value)
            if self._random.random() < 0.7 and (row, name) != (other, other_name):
                setattr(row, name, None)

    async def delete(self) -> None:
        row = await self._any(self._random.choice(KINDS))
        if row is not None and row not in self._session.new:
            await self._session.delete(row)

    async def _any(self, kind: type[Any], number: int | None = None) -> Any:
        with self._session.no_autoflush:
            row = await self._session.get(kind, number or self._number())
        return None if row in self._session.deleted else row

    def _number(self) -> int:
        return self._random.randint(1, MOST)


class Listening:
    """Places the listeners of one transaction."""

    PLACES: ClassVar[list[str]] = ["first", "last", "subclass", "session"]

    def __init__(self, random: Random) -> None:
        self._random = random

    @contextlib.contextmanager
    def on(self, session: Session) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for _ in range(self._random.randint(0, 3)):
                self._listen(stack, session, Meddler(Random(self._random.random())))
            yield

    def _listen(self, stack: contextlib.ExitStack, session: Session, meddler: Meddler) -> None:
        if self._random.random() < 0.3:
            name = self._random.choice(["before_insert", "before_update"])
            self._add(stack, self._random.choice(KINDS), name, meddler.before_write)
            return
        place = self._random.choice(self.PLACES)
        target = {"subclass": OwnSession, "session": session}.get(place, Session)
        self._add(stack, target, "before_flush", meddler.before_flush, insert=place == "first")
        self._add(stack, target, "after_flush", meddler.after_flush, insert=place == "first")

    def _add(self, stack: contextlib.ExitStack, target: Any, name: str, listener: Any, **options: Any) -> None:
        event.listen(target, name, listener, **options)
        stack.callback(event.remove, target, name, listener)


@pytest.fixture(params=[False, True], ids=["plain", "journal"])
async def meddled(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[OrmEnvironment]:
    async with orm_environment(database, journaled=request.param) as env:
        yield env


async def transact(env: OrmEnvironment, random: Random) -> bool:
    """Play one transaction; return whether it was committed."""
    sessions = env.sessionmaker(OwnSession, expire_on_commit=random.random() < 0.5)
    with contextlib.suppress(*EXPECTED), warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)
        async with sessions() as session:
            with Listening(random).on(session.sync_session):
                await Application(session, random).work()
                if random.random() < 0.15:
                    await session.rollback()
                else:
                    await session.commit()
                return True
    return False


@pytest.mark.case("RA-05")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("database", "meddled"), [("sqlite-begin", False), ("asyncpg", False), ("asyncpg", True)], indirect=True)
async def test_random_listeners(database: Database, meddled: OrmEnvironment) -> None:
    transactions = TRANSACTIONS or DEFAULTS[database.name]
    ended = 0
    for number in range(transactions):
        ended += await transact(meddled, Random(f"{SEED}-{database.name}-{number}"))
        try:
            await meddled.check()
        except BaseException as error:
            error.add_note(f"GRANITE_LISTENERS_SEED={SEED} GRANITE_LISTENERS={transactions} replays it: transaction {number}")
            raise
    assert ended > transactions / 3
