"""A COMMIT that is interrupted before it is sent, by a signal or a listener, and a session that is closed without a rollback.

SQLAlchemy then returns the connection to its pool with the transaction, and its next user commits what was never committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, text

from granite_storage.orm import transactions
from granite_storage.orm._util import root_engine
from tests.orm.environment import Doc, OrmEnvironment, file


class Interrupt(BaseException):
    """An interrupt, which no handler of exceptions catches."""


@pytest.fixture(params=["before the question", "after the question", "in the question"])
def interrupts(
    request: pytest.FixtureRequest, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[type[BaseException]], None]]:
    """Let the next COMMIT be interrupted, before or after the library has asked the database, or while it does."""
    armed: list[type[BaseException]] = []

    def interrupt(*_: Any) -> None:
        if armed:
            raise armed.pop()("interrupted")

    # Listeners of an engine with options are called before those of the engine that it comes from, as the library's are.
    engine = env.engine.sync_engine
    engine = engine if request.param == "before the question" else root_engine(engine)
    if request.param == "in the question":
        keep_shared = transactions.ConnectionWatch.keep_shared

        def interrupted(watch: transactions.ConnectionWatch) -> None:
            keep_shared(watch)
            interrupt()

        monkeypatch.setattr(transactions.ConnectionWatch, "keep_shared", interrupted)
    else:
        transactions.listen_to(engine)
        env.database.spoil()
        event.listen(engine, "commit", interrupt)
    yield armed.append
    if request.param != "in the question":
        event.remove(engine, "commit", interrupt)


@pytest.mark.parametrize("error", [Interrupt, RuntimeError])
async def test_closed_and_not_rolled_back(
    request: pytest.FixtureRequest,
    env: OrmEnvironment,
    interrupts: Callable[[type[BaseException]], None],
    error: type[BaseException],
) -> None:
    await env.add(Doc(id=1, file=file("old"), other=file("gone")), Doc(id=2))
    session = env.sessions()
    try:
        doc = await session.get_one(Doc, 1)
        doc.file, doc.other = file("new"), None
        session.add(Doc(id=3, file=file("third")))
        await session.flush()
        interrupts(error)
        with pytest.raises(error, match="interrupted"):
            await session.commit()
    finally:
        await session.close()
    # Whatever the next users of the pool's connections commit, it is not this transaction.
    async with env.engine.begin() as first, env.engine.begin() as second:
        for connection in (first, second):
            assert await connection.scalar(text("SELECT count(*) FROM doc")) == 2
    expected = {("doc", 1, "file"): b"old", ("doc", 1, "other"): b"gone"}
    assert await env.contents() == expected
    if env.journal is not None:
        await env.recover()
        return
    # Where the library had seen the COMMIT go, it cannot know that it was not sent: the new objects are the collector's.
    left = await env.objects() - {ref.location for ref in (await env.references()).values()}
    assert len(left) == (2 if request.node.callspec.params["interrupts"] == "after the question" else 0)
    for location in left:
        await env.backend.delete(location)
