"""A worker that is killed between any two steps of making variants: the next one makes them, and nothing is left behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from granite_storage.backends.local import LocalStorageBackend
from tests.core.support import PROJECT
from tests.orm.databases import Database
from tests.orm.derivations import declared, expected, jobs, journal_of, make_due, shown
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.journal.killed_deriver import RECIPES, STEPS

_DEFAULT = ("after an upload", "after the displaced")
_POINTS = [
    point if point in _DEFAULT else pytest.param(point, marks=pytest.mark.exhaustive("one step stands for the others"))
    for name in STEPS
    for point in (f"before {name}", f"after {name}")
]


@pytest.mark.parametrize("point", _POINTS)
async def test_the_next_worker_makes_them(asyncpg_database: Database, tmp_path: Path, point: str) -> None:
    root = tmp_path / "store"
    async with orm_environment(asyncpg_database, backend=LocalStorageBackend(root, fsync=False), journaled=True) as env:
        with declared(RECIPES):
            await env.add(Doc(id=1, file=file("x")))
            await kill_at(env, root, point)
            assert await shown(env) in ({}, expected(RECIPES, "x"))
            await make_due(env)
            await journal_of(env).recover()
            assert (await shown(env), await jobs(env)) == (expected(RECIPES, "x"), [])
        await env.recover()  # as if the leases of the killed one had run out
        await env.check_recovery()
        assert len(await env.objects()) == 3


async def kill_at(env: OrmEnvironment, root: Path, point: str) -> None:
    url = env.database.url.render_as_string(hide_password=False)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.orm.journal.killed_deriver", url, str(root), point), cwd=PROJECT
    )
    async with asyncio.timeout(60):
        assert await child.wait() == -signal.SIGKILL
