"""A program that works on attachments until it dies: it is forked, told what to do, and heard of no more but in its log."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import traceback
import warnings
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy.exc import SAWarning

from tests.faults.crash.models import Place, Setting
from tests.faults.crash.points import Trap
from tests.faults.crash.statements import Statements
from tests.faults.crash.workload import Workload

__all__ = ["Job", "run"]

_WORKER_INTERVAL = timedelta(milliseconds=100)


@dataclass(frozen=True)
class Job:
    """What a child does.

    Attributes:
        setting: Where it works.
        seed: What its work follows from.
        log: The file that it writes to what came of it.
        point: At which point something happens to it; None for none.
        count: At which time of coming there.
        signal: What happens to it: the name of a signal.
        tasks: How many transactions it has in progress at a time.
        sql: How many of these write SQL past every session.
        more: How many each of them does after that has happened, where the child survives it; None for as many as it can.
        worker: Whether it recovers what others have left, too.
        isolation_level: That of its transactions; None for the database's own.
    """

    setting: dict[str, Any] = field(repr=False)
    seed: str
    log: str
    point: str | None = None
    count: int = 1
    signal: str = "SIGKILL"
    tasks: int = 3
    sql: int = 0
    more: int | None = None
    worker: bool = False
    isolation_level: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(job: Job) -> int:
    """Do a job in this process; return 0 where it came to its end."""
    descriptor = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(line: str) -> None:
        os.write(descriptor, f"{line}\n".encode())

    logging.getLogger("granite_storage").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", SAWarning)  # of rows that another transaction has deleted first
    try:
        asyncio.run(_work(job, Trap(job.point or "", job.count, signal.Signals[job.signal], say)))
    except BaseException:  # noqa: BLE001  # whatever it is, the parent reads it in the log
        say(traceback.format_exc())
        return 1
    return 0


async def _work(job: Job, trap: Trap) -> None:
    setting = Setting.of(job.setting)
    async with AsyncExitStack() as stack:
        place = await stack.enter_async_context(
            setting.opened("crash-child", job.isolation_level, pool_size=job.tasks, pool_timeout=60)
        )
        await place.journal.check()
        if job.point is not None:
            sidecar = place.journal.sidecar
            trap.set(place.engine, *([] if sidecar is None else [sidecar._engine.dialect]))
        if job.worker:
            await stack.enter_async_context(place.journal.worker(interval=_WORKER_INTERVAL))
        await _transactions(job, place, trap)


async def _transactions(job: Job, place: Place, trap: Trap) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(job.tasks):
            kind = Statements if number < job.sql else Workload
            group.create_task(kind(place, f"{job.seed}.{number}", trap).run(job.more))
