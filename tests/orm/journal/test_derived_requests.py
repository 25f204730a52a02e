"""Variants as the application sees them once more, with a journal."""

from __future__ import annotations

import asyncio

from tests.orm import test_derived_requests
from tests.orm.databases import Database
from tests.orm.derivations import Upper, declared, jobs, shown
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment

globals().update({name: value for name, value in vars(test_derived_requests).items() if name.startswith("Test")})
test_moved_to_a_column_with_other_variants = test_derived_requests.test_moved_to_a_column_with_other_variants


async def test_one_that_a_worker_would_make(env: OrmEnvironment) -> None:
    """Its job is done with it."""
    recipe = Upper()
    with declared({"card": recipe}):
        await env.add(Doc(id=1, file=file("x")))
        assert len(await jobs(env)) == 1
        card = await (await test_derived_requests.stored(env)).variant("card")
        assert await card.read() == recipe.result(b"x")
        assert (await jobs(env), await shown(env)) == ([], {"card": recipe.result(b"x")})


async def test_synchronous_code(psycopg_database: Database) -> None:
    recipe = Upper(when="request")
    async with orm_environment(psycopg_database, journaled=True) as env:
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await test_derived_requests.stored(env)
            card = await asyncio.to_thread(attachment.sync.variant, "card")
            assert await asyncio.to_thread(card.sync.read) == recipe.result(b"x")
        await env.check_recovery()
