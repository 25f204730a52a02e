"""What counts as an attempt to delete an object, and what kills every worker that touches it."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from granite_storage.exceptions import BackendUnavailableError
from granite_storage.orm.journal.recovery import Recovery
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.orm.journal.test_recovery import die, expire, journal_of, rows

MAX_ATTEMPTS = 2


@pytest.fixture(autouse=True)
def _two_attempts(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_of(env), "_max_attempts", MAX_ATTEMPTS)


async def recover_and_die(env: OrmEnvironment) -> None:
    """Do a pass that may end like the death of its process: what it has begun it does not tell of."""
    await expire(env)
    with contextlib.suppress(SystemError, BackendUnavailableError):
        await journal_of(env).recover()


async def test_the_death_of_a_worker_is_no_attempt(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    await file("a").store(Doc.file)
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "_remove", die)
        for _ in range(MAX_ATTEMPTS + 1):
            await recover_and_die(env)
    assert [(row.attempts, row.dead) for row in await rows(env, "reclaim")] == [(0, False)]
    env.backend.fail("delete", error=BackendUnavailableError("down"))
    await expire(env)
    [failed] = (await journal_of(env).recover()).failed
    assert failed.attempts == 1
    assert failed.next_attempt is not None
    assert [row.takeovers for row in await rows(env, "reclaim")] == [0]
    await env.recover()


async def test_a_check_that_fails_is_nobodys_fault(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column was renamed, perhaps: until it is repaired nothing is deleted, and nothing becomes a dead letter."""
    await file("a").store(Doc.file)
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "_check", die)
        for _ in range(2 * MAX_ATTEMPTS + 4):
            await recover_and_die(env)
    assert [(row.attempts, row.takeovers, row.dead) for row in await rows(env, "reclaim")] == [(0, 0, False)]
    assert len(await env.objects()) == 1
    await env.recover()


async def test_an_object_that_kills_its_workers_is_a_dead_letter(
    env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes alone, and takes none of those along that were taken over with it."""
    poison, *others = [await file(str(number)).store(Doc.file) for number in range(6)]
    original = Recovery._remove

    async def remove(self: Recovery, items: Any) -> Any:
        if poison.location in [item.location for item in items]:
            await die()
        return await original(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "_remove", remove)
        for _ in range(MAX_ATTEMPTS + 3):
            await recover_and_die(env)
        await expire(env)
        report = await journal_of(env).recover()
    assert await env.objects() == {poison.location}
    [failed] = report.failed
    assert (failed.location, failed.attempts, failed.next_attempt) == (poison.location, 0, None)
    assert "none has finished it" in failed.error
    assert poison.location in caplog.text
    assert [await other.exists() for other in others] == [False] * len(others)
    assert await journal_of(env).retry_dead_letters() == 1
    assert (await journal_of(env).recover()).deleted == 1
    await env.recover()


async def test_a_single_attempt_is_not_used_up_by_the_death_of_a_neighbour(
    env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_of(env), "_max_attempts", 1)
    for number in range(3):
        await file(str(number)).store(Doc.file)
    with monkeypatch.context() as patch:
        patch.setattr(Recovery, "_remove", die)
        await recover_and_die(env)
    await expire(env)
    report = await journal_of(env).recover()
    assert (report.deleted, report.failed) == (3, [])
