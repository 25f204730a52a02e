"""Workers of several versions of the library: each beat says of which it is, and triggers are not created beside older ones."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, update
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.orm.journal.database import find_older_worker
from granite_storage.orm.journal.tables import WORKER_VERSION, clock
from tests.orm.environment import OrmEnvironment
from tests.orm.journal.test_recovery import journal_of, rows

OWN = f"worker:{WORKER_VERSION}"
HOUR = timedelta(hours=1).total_seconds()
DAY = 24 * HOUR


async def forget(env: OrmEnvironment) -> None:
    """Let no worker ever have run."""
    async with env.engine.begin() as connection:
        meta = journal_of(env).tables.meta
        await connection.execute(meta.delete().where((meta.c.name == "heartbeat") | meta.c.name.startswith("worker")))


async def beat_without_version(connection: AsyncConnection, env: OrmEnvironment, *, ago: float = 0, within: float = 30) -> None:
    """Write what a worker of an older version writes."""
    meta = journal_of(env).tables.meta
    values = {"name": "heartbeat", "value": f"{within:.0f}", "changed": clock(-ago)}
    await connection.execute(meta.delete().where(meta.c.name == "heartbeat"))
    await connection.execute(meta.insert().values(values))


async def beats(env: OrmEnvironment) -> dict[str, Any]:
    found = {row.name: row.changed for row in await rows(env, "meta")}
    return {name: changed for name, changed in found.items() if name == "heartbeat" or name.startswith("worker:")}


async def told(env: OrmEnvironment) -> str | None:
    def find(connection: Connection) -> str | None:
        return find_older_worker(connection, journal_of(env).tables)

    async with env.engine.connect() as connection:
        return await connection.run_sync(find)


class TestBeats:
    async def test_each_says_of_which_version_it_is(self, env: OrmEnvironment) -> None:
        await forget(env)
        assert await told(env) is None, "none has ever run"
        for _ in range(2):
            await journal_of(env).recover()
            found = await beats(env)
            assert found.keys() == {"heartbeat", OWN}
            assert found["heartbeat"] == found[OWN]
            assert await told(env) is None

    @pytest.mark.parametrize("first", ["older", "newer"])
    async def test_an_older_one_is_noted_before_its_beat_is_overwritten(self, env: OrmEnvironment, first: str) -> None:
        await forget(env)
        if first == "newer":
            await journal_of(env).recover()
        async with env.engine.begin() as connection:
            await beat_without_version(connection, env, ago=60)
        begun = (await beats(env))["heartbeat"]
        said = await told(env)
        assert said is not None
        assert f"at work at {begun:%Y-%m-%d %H:%M} UTC" in said
        assert said.endswith("delete the row worker:1 of granite_storage_meta")
        await journal_of(env).recover()
        found = await beats(env)
        assert found["worker:1"] == begun < found["heartbeat"] == found[OWN]
        assert await told(env) == said
        await env.sql("DELETE FROM granite_storage_meta WHERE name = 'worker\\:1'")
        await journal_of(env).recover()
        assert await told(env) is None

    @pytest.mark.parametrize(
        ("ago", "within", "runs"), [(HOUR / 2, 30, True), (2 * HOUR, 30, False), (2 * DAY, DAY, True), (5 * DAY, DAY, False)]
    )
    async def test_how_long_it_counts_as_running(self, env: OrmEnvironment, ago: float, within: float, runs: bool) -> None:
        await forget(env)
        async with env.engine.begin() as connection:
            await beat_without_version(connection, env, ago=ago, within=within)
        assert (await told(env) is not None) == runs
        await journal_of(env).recover()
        assert (await told(env) is not None) == runs
        await env.sql("DELETE FROM granite_storage_meta WHERE name = 'heartbeat gap'")

    async def test_a_newer_one_is_none(self, env: OrmEnvironment) -> None:
        await forget(env)
        await journal_of(env).recover()
        async with env.engine.begin() as connection:
            meta = journal_of(env).tables.meta
            await connection.execute(update(meta).where(meta.c.name == OWN).values(name=f"worker:{WORKER_VERSION + 1}"))
        assert await told(env) is None
