"""A table or a column of the models that was renamed: nothing is deleted, and the error says what to do."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from granite_storage.exceptions import ConfigurationError
from tests.orm.derivations import Upper, declared, expected, jobs, make_due, shown
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.orm.journal.sharing import delete
from tests.orm.journal.test_recovery import eventually_true, expire, journal_of, rows

RENAMED = {
    "the table doc": ("ALTER TABLE doc RENAME TO docs", "ALTER TABLE docs RENAME TO doc"),
    "the column file of the table doc": (
        "ALTER TABLE doc RENAME COLUMN file TO document",
        "ALTER TABLE doc RENAME COLUMN document TO file",
    ),
}


@pytest.mark.parametrize("named", RENAMED)
async def test_nothing_is_deleted(env: OrmEnvironment, named: str) -> None:
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
    await env.sql("INSERT INTO doc (id, title, file) SELECT 3, title, file FROM doc WHERE id = 1")
    await delete(env, 1)
    await delete(env, 2)
    there, back = RENAMED[named]
    await env.sql(there)
    try:
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=f"^{named} of the models cannot be found in the database") as caught:
                await journal_of(env).recover()
            assert "nothing is deleted" in str(caught.value)
            assert str(caught.value.docs).endswith("crash-safety.html#renamed-tables")
            await expire(env)
        assert len(await env.objects()) == 2
    finally:
        await env.sql(back)
    await env.recover()
    assert len(await env.objects()) == 1
    await delete(env, 3)


@pytest.mark.parametrize("named", RENAMED)
async def test_no_job_is_lost(env: OrmEnvironment, named: str, caplog: pytest.LogCaptureFixture) -> None:
    """That a worker finds no row with the original of a variant does not mean that there is none."""
    recipes = {"thumb": Upper()}
    with declared(recipes):
        await env.add(Doc(id=1, file=file("x")))
        there, back = RENAMED[named]
        await env.sql(there)
        try:
            for _ in range(2):
                assert (await journal_of(env).recover()).underived == 1
                assert f"{named} of the models cannot be found" in caplog.text
                await make_due(env)
        finally:
            await env.sql(back)
        [job] = await jobs(env)
        assert (job.attempts, job.dead) == (0, False)
        assert (await journal_of(env).recover()).derived == 1
        assert await shown(env) == expected(recipes, "x")


async def test_a_worker_says_so_and_goes_on(env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    await env.add(Doc(id=1, file=file("a")))
    await delete(env, 1)
    there, back = RENAMED["the table doc"]
    await env.sql(there)
    with caplog.at_level(logging.ERROR, "granite_storage"):
        async with journal_of(env).worker(interval=timedelta(milliseconds=50)):

            async def is_said() -> bool:
                return "the table doc of the models cannot be found" in caplog.text

            async def is_done() -> bool:
                await expire(env)
                return not await env.objects() and not await rows(env, "reclaim")

            try:
                await eventually_true(is_said)
            finally:
                await env.sql(back)
            await eventually_true(is_done)
