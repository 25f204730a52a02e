"""What a pass of recovery records: its span, and by how much the oldest garbage is overdue."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from granite_storage.orm.journal.tables import clock
from tests.orm.derivations import journal_of
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.telemetry import recording

PENDING = {"granite_storage.backend": "store", "granite_storage.garbage.kind": "pending"}


async def test_overdue_deletes(env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    journal = journal_of(env)
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = None
    intent = journal.tables.intent
    async with env.engine.begin() as connection:
        await connection.execute(update(intent).values(due=clock(-timedelta(hours=1).total_seconds())))
    env.backend.fail("delete_many")
    with recording() as recorded:
        await journal.recover()
    assert [(recorded.attributes(span)) for span in recorded.spans("granite_storage.recover")] == [
        {"granite_storage.backend": "store", "granite_storage.outcome": "ok"}
    ]
    (record,) = [record for record in caplog.records if record.msg.startswith("could not delete")]
    assert record.__dict__["backend"] == "store"
    assert record.__dict__["location"] in record.getMessage()
    # It is retried in a few seconds, so it is not overdue.
    assert recorded.sums("granite_storage.garbage.age") == [(PENDING, 0.0)]
    async with env.engine.begin() as connection:
        await connection.execute(update(journal.tables.reclaim).values(due=clock(-3600.0), dead=True))
    with recording() as recorded:
        await journal.recover()
    ((_, age),) = recorded.sums("granite_storage.garbage.age")
    assert age == pytest.approx(3600, abs=60)  # a dead letter stays, and grows older
    await journal.retry_dead_letters()
    with recording() as recorded:
        await journal.recover()
        await journal.recover()
    assert recorded.sums("granite_storage.garbage.age") == [(PENDING, 0.0)]
