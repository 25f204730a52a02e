"""Two workers that stand still between any two steps of recovery, while a third does everything and a session takes an object."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Any

import pytest
from sqlalchemy import text

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment
from granite_storage.orm.journal.recovery import Recovery
from tests.faults.crash.audit import Audit
from tests.faults.crash.models import PLAIN, content_of
from tests.faults.crash.options import KILLS, MANY, SECOND_DRIVER, SEED
from tests.tiers import is_exhaustive

STEPS = [(Recovery, name) for name in ("_fence", "_resume", "_check", "_remove", "_conclude", "_let_go")]
MOMENTS = [f"{moment} {name}" for _, name in STEPS for moment in ("before", "after")]
PAIRS = list(product(MOMENTS, MOMENTS))
SOME = 12 if is_exhaustive() else 8
Book = PLAIN.Book


@dataclass(eq=False)
class Stop:
    """Where one worker stands still."""

    moment: str
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)


_stop: ContextVar[Stop | None] = ContextVar("stop", default=None)


async def _pass(moment: str) -> None:
    stop = _stop.get()
    if stop is not None and stop.moment == moment and not stop.reached.is_set():
        stop.reached.set()
        await stop.go.wait()


def _watched(owner: Any, name: str) -> Any:
    original = getattr(owner, name)

    async def step(*args: Any, **kwargs: Any) -> Any:
        await _pass(f"before {name}")
        result = await original(*args, **kwargs)
        await _pass(f"after {name}")
        return result

    return step


async def _recover_until(audit: Audit, moment: str) -> tuple[Stop, asyncio.Task[Any]]:
    """Start a worker and wait until it stands still, or has nothing to do there and is done."""
    stop = Stop(moment)

    async def work() -> None:
        _stop.set(stop)
        await audit.place.journal.recover()

    worker = asyncio.create_task(work())
    waiting = asyncio.create_task(stop.reached.wait())
    await asyncio.wait([worker, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return stop, worker


@pytest.mark.case("CON-10", "CON-04")
@pytest.mark.parametrize(
    "servers", ["asyncpg-local", pytest.param("psycopg-local", marks=SECOND_DRIVER), "mariadb-local", "wal-local"], indirect=True
)
async def test_two_workers_stand_still(audit: Audit, seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in STEPS:
        monkeypatch.setattr(owner, name, _watched(owner, name))
    random = Random(SEED)
    for number, pair in enumerate(PAIRS if KILLS >= MANY else random.sample(PAIRS, SOME)):
        try:
            await stand_still(audit, pair, number, random)
        except BaseException as error:
            error.add_note(f"GRANITE_SEED={seed}: {pair}")
            raise


async def stand_still(audit: Audit, pair: tuple[str, str], number: int, random: Random) -> None:
    stored = await leave_something(audit, number)
    await audit.expire()
    workers = []
    for moment in pair:
        workers.append(await _recover_until(audit, moment))
        if random.random() < 0.5:
            await audit.expire()
    with contextlib.suppress(StaleAttachmentError):
        await take(audit, stored, number)
    if random.random() < 0.5:
        await audit.expire()
        await audit.place.journal.recover()
    await audit.check_rows()
    for stop, worker in random.sample(workers, 2):
        stop.go.set()
        await worker
        await audit.check_rows()
    await audit.recover()
    await audit.check_everything()


async def leave_something(audit: Audit, number: int) -> list[tuple[Attachment, str]]:
    """Leave what there is for a worker: uploads that no row took, and objects that rows have released; return the uploads."""
    says = [f"{SEED}-{number}.{index}-{100 + index}" for index in range(6)]
    first, second, *stored = [(Attachment(content_of(words)), words) for words in says]
    sessions = audit.place.sessions
    async with sessions.begin() as session:
        for index, (attachment, words) in ((10 * number, first), (10 * number + 1, second)):
            session.add(Book(id=index, file=attachment, file_says=words))
    for attachment, _ in stored:
        await attachment.store(Book.file)
    async with sessions.begin() as session:
        book = await session.get_one(Book, 10 * number)
        book.file = book.file_says = None
        await session.delete(await session.get_one(Book, 10 * number + 1))
    return stored


async def take(audit: Audit, stored: list[tuple[Attachment, str]], number: int) -> None:
    """Let rows take what was stored, unless a worker was faster."""
    async with audit.place.sessions.begin() as session:
        for index, (attachment, words) in enumerate(stored[:2]):
            session.add(Book(id=10 * number + 5 + index, kept=attachment, kept_says=words))


@pytest.mark.case("CAN-07")
@pytest.mark.parametrize("servers", ["asyncpg-local", pytest.param("psycopg-local", marks=SECOND_DRIVER)], indirect=True)
async def test_cancelled_while_waiting_for_a_worker(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session waits for the row that a worker has locked, and is cancelled: no transaction of its own stays open."""
    stored = await Attachment(b"a").store(Book.file)
    await audit.expire()
    original = Recovery._drop

    stop = Stop("before _drop")

    async def drop(*args: Any) -> None:
        stop.reached.set()
        await stop.go.wait()
        await original(*args)

    monkeypatch.setattr(Recovery, "_drop", drop)
    worker = asyncio.create_task(audit.place.journal.recover())
    await stop.reached.wait()
    try:
        taking = asyncio.create_task(take_one(audit, stored))
        await until(audit, "wait_event_type = 'Lock'", 1)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        await until(audit, "wait_event_type = 'Lock'", 0)
        await until(audit, "state LIKE 'idle in transaction%'", 1)  # the worker's own
    finally:
        stop.go.set()
        await worker
    await until(audit, "state LIKE 'idle in transaction%'", 0)
    await audit.recover()
    await audit.check_everything()


async def take_one(audit: Audit, stored: Attachment) -> None:
    async with audit.place.sessions() as session:  # the end of a `begin()` is shielded by SQLAlchemy, and could not be cancelled
        session.add(Book(id=1, file=stored, file_says="x-1"))
        await session.commit()


async def until(audit: Audit, condition: str, count: int) -> None:
    """Wait until so many of the database's clients are in a state."""
    statement = f"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND {condition}"  # noqa: S608
    found = -1
    for _ in range(3000):
        async with audit.place.engine.connect() as connection:
            found = await connection.scalar(text(statement))
        if found == count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{found} clients, not {count}, with {condition}")
