"""Deriving variants again, with a journal."""

from __future__ import annotations

from datetime import timedelta

from granite_storage.rederivation import rederive
from tests.orm import test_rederivation
from tests.orm.derivations import Upper, declared, jobs, journal_of, shown
from tests.orm.environment import OrmEnvironment
from tests.orm.journal.test_recovery import retention

globals().update({name: value for name, value in vars(test_rederivation).items() if name.startswith("Test")})


async def test_what_it_displaces_waits_for_its_retention(env: OrmEnvironment) -> None:
    with declared({"thumb": Upper("a", when="flush"), "old": Upper("o", when="flush")}):
        await test_rederivation.fill(env, 1)
    before = await env.objects()
    with declared({"thumb": Upper("a", when="flush", version=2)}), retention(timedelta(hours=1)):
        await rederive(env.binding, which="stale", drop_undeclared=True)
        await journal_of(env).recover()
        assert before < await env.objects()
        assert set(await shown(env)) == {"thumb"}
    await env.recover()
    assert len(await env.objects()) == 2


async def test_jobs_of_what_is_not_declared_end(env: OrmEnvironment) -> None:
    """Dead ones as well; those of other variants stay."""
    recipe = Upper("a")
    recipe.refused = {b"1"}
    with declared({"thumb": recipe, "text": Upper("b")}):
        await test_rederivation.fill(env, 1)
        await journal_of(env).recover()
        await test_rederivation.fill_more(env)
    with declared({"text": Upper("b")}):
        assert [job.key for job in await jobs(env)] == ["variant:text", "variant:thumb", "variant:thumb"]
        await rederive(env.binding, drop_undeclared=True, names=["other"])
        assert len(await jobs(env)) == 3
        await rederive(env.binding, drop_undeclared=True, columns=["doc.other"])
        assert len(await jobs(env)) == 3
        await rederive(env.binding, which="missing", drop_undeclared=True)
        assert await jobs(env) == []


async def test_its_job_is_done_with_it(env: OrmEnvironment) -> None:
    recipe = Upper("a")
    with declared({"thumb": recipe}):
        await test_rederivation.fill(env, 1)
        assert len(await jobs(env)) == 1
        await rederive(env.binding)
        assert await jobs(env) == []
        assert recipe.made == {b"1": 1}
