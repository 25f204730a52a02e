"""The loops of a worker, without a database: who waits for whom, and for how long."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta

import pytest

from granite_storage.orm.journal import worker
from granite_storage.orm.journal.worker import Alarm, at_work
from tests.core.support import eventually

SHORT = timedelta(milliseconds=5)


@pytest.mark.parametrize("trouble", ["slow", "dead"])
async def test_a_backend_in_trouble_holds_up_no_other(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    passes = Counter[str]()

    async def recover(backend: str) -> None:
        passes[backend] += 1
        if backend == "in trouble":
            if trouble == "slow":
                await asyncio.sleep(3600)
            raise ConnectionRefusedError("nobody is there")

    async with at_work(["in trouble", "healthy"], recover, SHORT, Alarm()):
        await eventually(lambda: passes["healthy"] >= 5)
        if trouble == "dead":
            await eventually(lambda: passes["in trouble"] >= 5)  # it is tried again and again, too
            assert "'in trouble' failed" in caplog.text
    assert passes["in trouble"] == 1 or trouble == "dead"


async def test_it_stops_at_once_whatever_is_under_way() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def recover(_: str) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async with asyncio.timeout(5), at_work(["store"], recover, timedelta(hours=1), Alarm()):
        await begun.wait()
    assert ended.is_set()


async def test_an_alarm_wakes_those_who_sleep() -> None:
    passes = Counter[str]()

    async def recover(backend: str) -> None:
        passes[backend] += 1

    alarm = Alarm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_PAUSE", 0.001)
        async with at_work(["a", "b"], recover, timedelta(hours=1), alarm):
            await eventually(lambda: passes == {"a": 1, "b": 1})
            await asyncio.sleep(0.05)
            assert passes == {"a": 1, "b": 1}, "nobody has called"
            await asyncio.to_thread(alarm.ring)
            await eventually(lambda: passes == {"a": 2, "b": 2})


async def test_workers_that_begin_together_do_not_go_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    original = asyncio.timeout

    def timeout(seconds: float) -> asyncio.Timeout:
        waits.append(seconds)
        return original(seconds)

    monkeypatch.setattr(asyncio, "timeout", timeout)

    async def recover(_: str) -> None:
        pass

    async with at_work(["a", "b", "c", "d"], recover, SHORT, Alarm()):
        while len(waits) < 40:  # noqa: ASYNC110  # nothing says when the next one sleeps
            await asyncio.sleep(0.005)
    assert len(set(waits)) > 10
    assert 0.7 * SHORT.total_seconds() < min(waits) < max(waits) < 1.3 * SHORT.total_seconds()
