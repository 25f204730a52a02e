"""The move of one object, cancelled at each of its awaits: the row has a whole file, and nothing is left beside it."""

from __future__ import annotations

import pytest

from granite_storage._jobs import Budget
from granite_storage.migration import relocate
from granite_storage.orm.references import Scan
from tests.migration.environment import MigrationEnvironment, Shelf, file, give_variants
from tests.orm.test_cancellation import Steps
from tests.tiers import is_exhaustive

_LATER = pytest.mark.exhaustive("a cancellation in a later turn of the loop comes at an await that another one is tried at")


@pytest.mark.case("CAN-01")
@pytest.mark.parametrize("turns", [0, *(pytest.param(turns, marks=_LATER) for turns in (1, 2, 3))])
@pytest.mark.parametrize("names", [(), ("thumb",)], ids=["alone", "with a variant"])
async def test_at_every_await(env: MigrationEnvironment, names: tuple[str, ...], turns: int) -> None:
    # Without a journal each await is tried; with one, which has five times as many, every third.
    stride = 3 if env.journal is not None and not is_exhaustive() else 1
    step = moved = 0
    while True:
        env.write_to("old")
        await env.add(Shelf(id=1, file=file("a")))
        await give_variants(env, 1, **{name: name.encode() for name in names})
        binding = env.write_to("new")
        (row,) = [row async for row in Scan(binding).rows()]
        held = next(value for value in row.values if value.ref is not None)
        work = relocate(binding, held, Budget(None))
        steps = Steps(work, {step}, turns)
        await steps.run()
        is_moved = (await env.refs())[0].backend == "new"
        try:
            await env.check(old=0 if is_moved else 1 + len(names))
        except AssertionError as error:
            error.add_note(f"cancelled at await {step}")
            raise
        moved += is_moved
        if not steps.reached:
            break
        await env.sql("DELETE FROM migration_shelf")
        for backend in (env.old, env.new):
            for location in {info.location async for info in backend.iter_objects()}:
                await backend.delete(location)
        step += stride
    assert 0 < moved <= step
