"""A row comes to name an object in the `extra` of its ref while the collector is about to delete that object."""

from __future__ import annotations

import pytest

from granite_storage.gc.database import DatabaseReferences
from tests.gc.environment import Crate, GcEnvironment, file
from tests.gc.test_races import before


async def test_an_object_that_is_named_after_the_nomination_stays(
    plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = plain_env
    await env.add(Crate(id=1, file=file("a")))
    thumbnail = await env.orphan()
    env.age()

    async def name_it() -> None:
        names = {"storage_key": "docs", "model_name": "m", "entity_id": "1", "field_name": "f"}
        ref = await env.manager.put_bytes(**names, content=b"x", extra={"thumbnail": thumbnail.location})
        await env.add(Crate(id=2, scan=ref))

    with before(monkeypatch, DatabaseReferences, "find_references", name_it):
        report = await env.collect()
    assert (report.referenced_on_recheck, report.deleted) == (1, 0)
    assert thumbnail.location in await env.locations()
