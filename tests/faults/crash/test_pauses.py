"""Programs that stand still: for longer than their lease, at every point of the protocol, and then go on as if nothing were."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from granite_storage.exceptions import BackendUnavailableError
from granite_storage.orm.journal import sqlite
from tests.faults.crash.audit import Audit
from tests.faults.crash.child import Job
from tests.faults.crash.children import Child, ChildProcesses
from tests.faults.crash.models import Setting
from tests.faults.crash.options import KILLS, MANY, SEED
from tests.faults.crash.points import POINTS, Point
from tests.tiers import is_exhaustive

SOME = 3 if is_exhaustive() else 1
LEASE = 0.6
_QUIET = [point for point in POINTS if "during" not in point.name]


def in_turn(points: list[Point]) -> list[Point]:
    """Return points to stop at: all in the long run, some of them at random else."""
    return points if KILLS >= MANY else Random(SEED).sample(points, SOME)


LOCAL = in_turn([point for point in _QUIET if "s3" not in point.needs])
S3 = in_turn([point for point in _QUIET if "s3" in point.needs])
SQLITE = in_turn([point for point in _QUIET if point.needs.isdisjoint({"s3", "postgres"})])


@contextlib.asynccontextmanager
async def stopped(children: ChildProcesses, setting: Setting, folder: Path, point: Point, seed: str) -> AsyncIterator[Child]:
    """Give a child that has stopped at a point; afterwards it goes on for a few transactions more, and must end well."""
    child = children.start(
        Job(
            setting=setting.as_dict(),
            seed=f"{seed}-{point.name}",
            log=str(folder / "log"),
            point=point.name,
            signal="SIGSTOP",
            tasks=1,
            more=3,
            worker="worker" in point.needs,
            isolation_level="REPEATABLE READ" if "snapshots" in point.needs else None,
        )
    )
    try:
        assert await child.wait_for("stopped", "ended") == "stopped", f"it never came to its point:\n{child.log}"
        yield child
        child.send(signal.SIGCONT)
        assert await child.wait_for("ended"), "it does not come to its end"
        assert child.code == 0, child.log
    except BaseException as error:
        child.send(signal.SIGKILL)
        error.add_note(f"GRANITE_SEED={seed}: {child.job}\n{child.log}")
        raise


@pytest.mark.case("CON-10")
@pytest.mark.parametrize(
    ("servers", "point"),
    [
        *(("asyncpg-local", point) for point in LOCAL),
        *(("asyncpg-seaweedfs", point) for point in S3),
        *(("wal-local", point) for point in SQLITE),
    ],
    indirect=["servers"],
    ids=lambda value: getattr(value, "name", value),
)
async def test_stopped_past_its_lease(
    setting: Setting,
    audit: Audit,
    children: ChildProcesses,
    seed: str,
    tmp_path: Path,
    point: Point,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stopped(children, replace(setting, lease=LEASE), tmp_path, point, seed):
        with monkeypatch.context() as patch:
            patch.setattr(sqlite, "_PATIENCE", LEASE / 4)  # where it stands still with the lock of writers
            await recover_what_is_free(audit)
    await audit.check_after_crash()


async def recover_what_is_free(audit: Audit) -> None:
    """Recover in the time that it takes, until nothing is left but what the transaction that stands still has locked."""
    for _ in range(10):
        with contextlib.suppress(*((BackendUnavailableError,) if audit.place.setting.is_sqlite else ())):
            await audit.place.journal.recover()
        await asyncio.sleep(3 * LEASE / 10)
    await audit.check_rows()
