"""A collection without options."""

from __future__ import annotations

from tests.gc.environment import Crate, GcEnvironment, file


async def test_nothing_is_deleted(plain_env: GcEnvironment) -> None:
    env = plain_env
    await env.add(Crate(id=1, file=file("a")))
    orphan = await env.orphan()
    env.age()
    collector = env.collector()
    assert (await collector.collect(storage_key="docs")).orphaned == 1
    assert (await collector.collection(storage_key="docs")).orphaned == 1
    assert orphan.location in await env.locations()
