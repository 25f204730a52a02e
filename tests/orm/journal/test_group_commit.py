"""Flushes that share the commit of their intents, and a writer that is cancelled when it has committed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from granite_storage.orm.journal.intents import Intents
from tests.orm.environment import Doc, OrmEnvironment, file


@pytest.mark.case("CAN-01", "CON-10")
async def test_writer_is_cancelled_after_its_commit(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object keeps one intent: a second one would let a worker delete it while its transaction is in progress."""
    assert env.journal is not None
    await env.journal.check()
    committed, go, original = asyncio.Event(), asyncio.Event(), Intents._insert
    inserted: list[int] = []

    async def insert(*args: Any) -> None:
        inserted.append(len(args[-1]))
        await original(*args)
        if len(inserted) == 2:
            committed.set()
            await go.wait()

    monkeypatch.setattr(Intents, "_insert", insert)
    pending = [file("x"), file("a"), file("b"), file("c")]
    storing = [asyncio.create_task(item.store(Doc.file)) for item in pending]
    await committed.wait()
    storing[1].cancel()
    await asyncio.sleep(0.05)
    go.set()
    _, *stored = await asyncio.gather(storing[0], *storing[2:])
    assert storing[1].cancelled()
    assert inserted == [1, 3]
    places = [row.location for row in await env.journal_rows("intent")]
    assert len(set(places)) == len(places) == 4
    await env.add(Doc(id=1, file=stored[0], other=stored[1]))
    await env.recover()  # what was cancelled, and what nobody has taken
    await env.check(file_1="b", other_1="c")
