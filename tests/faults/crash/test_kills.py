"""Programs that are killed: at every point of the protocol in turn, and at any moment."""

from __future__ import annotations

import asyncio
import signal
from itertools import count
from pathlib import Path
from random import Random

import pytest

from tests.faults.crash.audit import Audit
from tests.faults.crash.child import Job
from tests.faults.crash.children import Child, ChildProcesses
from tests.faults.crash.models import Setting
from tests.faults.crash.options import KILLS, SECOND_DRIVER, TRIGGERS
from tests.faults.crash.points import POINTS, Point
from tests.tiers import is_exhaustive

LOCAL = [point for point in POINTS if "s3" not in point.needs]
S3 = [point for point in POINTS if "s3" in point.needs]
SQLITE = [point for point in LOCAL if "postgres" not in point.needs]
SETTINGS: dict[str, list[Point]] = {
    "asyncpg-local": LOCAL if is_exhaustive() else LOCAL[::9],
    "psycopg-local": [],
    "threads-local": LOCAL if is_exhaustive() else LOCAL[3::18],
    "asyncpg-seaweedfs": S3 if is_exhaustive() else S3[1::5],
    "psycopg-moto": S3[::3],
    "mariadb-local": [],
    "wal-local": SQLITE if is_exhaustive() else SQLITE[6::30],
    "rollback-local": SQLITE if is_exhaustive() else [],
    "threadswal-local": [],
    f"psycopg{TRIGGERS}-local": LOCAL if is_exhaustive() else LOCAL[5::18],
    f"mariadb{TRIGGERS}-local": [],
    f"wal{TRIGGERS}-local": SQLITE if is_exhaustive() else [],
}
"""The databases and storages, each with the points that it comes to in turn before anything else: all of them, or some.

One whose name ends in `+triggers` has triggers, and some of its programs write SQL past their sessions.
"""

AT_ONCE = 2
_LONGEST_LIFE = 0.8


def kills_of(name: str) -> int:
    return max(KILLS // len(SETTINGS), len(SETTINGS[name]))


class KillSchedule:
    """Decides who dies where: at each of a setting's own points, then at any point or any moment.

    Args:
        name: The setting's name.
        setting: The setting.
        seed: What all follows from.
        folder: For the logs.
    """

    def __init__(self, name: str, setting: Setting, seed: str, folder: Path) -> None:
        self._setting = setting
        self._seed = f"{seed}-{name}"
        self._random = Random(self._seed)
        self._folder = folder
        self._numbers = count(1)
        self._own = self._random.sample(SETTINGS[name], len(SETTINGS[name]))
        abilities = {"local" if setting.is_local else "s3", "worker", *(["postgres", "snapshots"] if setting.is_postgres else [])}
        self._own_seeds: set[str] = set()
        self._any = [point for point in POINTS if point.needs <= abilities]

    def next(self) -> Job:
        is_own = bool(self._own)
        point = self._own.pop() if is_own else self._random.choice([None, self._random.choice(self._any)])
        needs = frozenset[str]() if point is None else point.needs
        number = next(self._numbers)
        tasks = self._random.randint(1, 4)
        if is_own:
            self._own_seeds.add(f"{self._seed}-{number}")
        return Job(
            setting=self._setting.as_dict(),
            seed=f"{self._seed}-{number}",
            log=str(self._folder / f"{number}.log"),
            point=None if point is None else point.name,
            count=self._count(point),
            tasks=tasks,
            sql=self._random.randint(0, tasks if point is None else tasks - 1) if self._setting.has_triggers else 0,
            worker="worker" in needs or self._random.random() < 0.3,
            isolation_level="REPEATABLE READ" if "snapshots" in needs else self._isolation_level(),
        )

    def _count(self, point: Point | None) -> int:
        """Return at which time of coming to a point it happens; where it is slow to come to, the first one.

        Threads are slow, and so are the few sessions beside SQL.
        """
        count = 1 if point is None else self._random.randint(1, point.most)
        return 1 if self._setting.is_synchronous or self._setting.has_triggers else count

    def is_own(self, job: Job) -> bool:
        """Tell whether a job is to come to one of the setting's own points."""
        return job.seed in self._own_seeds

    def life(self) -> float:
        """Return how long somebody lives that is killed at any moment, in seconds."""
        return self._random.uniform(0, _LONGEST_LIFE)

    def _isolation_level(self) -> str | None:
        if self._setting.is_sqlite:
            return None
        levels = [None, None, None, "REPEATABLE READ", "SERIALIZABLE"]
        if self._setting.has_triggers and not self._setting.is_postgres:
            levels.pop()  # a transaction of MariaDB may block its own uploads there, which fail then
        return self._random.choice(levels)


@pytest.mark.case("CON-10", "DBF-07", "DBF-09")
@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.parametrize(
    ("name", "servers"),
    [pytest.param(name, name, id=name, marks=SECOND_DRIVER if name.startswith("psycopg-") else ()) for name in SETTINGS],
    indirect=["servers"],
)
async def test_killed_programs(
    name: str, setting: Setting, audit: Audit, children: ChildProcesses, seed: str, tmp_path: Path
) -> None:
    schedule = KillSchedule(name, setting, seed, tmp_path)
    done = 0
    while done < kills_of(name):
        victims = [children.start(schedule.next()) for _ in range(AT_ONCE)]
        try:
            await asyncio.gather(*(wait_for_kill(victim, schedule) for victim in victims))
            await audit.check_after_crash()
        except BaseException as error:
            for victim in victims:
                victim.send(signal.SIGKILL)
                error.add_note(f"GRANITE_SEED={seed}: {victim.job}\n{victim.log}")
            raise
        done += len(victims)


async def wait_for_kill(victim: Child, schedule: KillSchedule) -> None:
    """Wait until somebody has come to the point of death, or kill it after a while.

    A slow machine may not bring a program to a rare point that was drawn at random; then it dies where it is.
    """
    if victim.job.point is None:
        await asyncio.sleep(schedule.life())
        await victim.kill()
    elif await victim.wait_for("ended"):
        assert victim.has_reached_its_point
    else:
        assert not schedule.is_own(victim.job), "it never came to its point"
        await victim.kill()
    assert victim.code == -signal.SIGKILL, f"it ended by itself, with {victim.code}"
