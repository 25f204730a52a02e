"""Rows that share an object, which only SQL can bring about, and workers that are stopped between any two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy import text, update

from granite_storage import StoredObjectRef
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.tables import clock
from tests.orm.environment import Doc, OrmEnvironment, file

__all__ = ["Worker", "copy_by_sql", "delete", "make_due", "restore", "shared", "steps_are_watched", "worker"]

STEPS = ("_check", "_remove", "_let_go", "_conclude")

_gates: ContextVar[dict[str, Gate] | None] = ContextVar("gates", default=None)


class Gate:
    """A step that a worker waits before."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()


class Worker:
    """One pass of recovery, stopped before some of its steps."""

    def __init__(self, env: OrmEnvironment, steps: tuple[str, ...]) -> None:
        assert env.journal is not None
        self._gates = {step: Gate() for step in steps}
        self._last: Gate | None = None
        token = _gates.set(self._gates)
        self._task = asyncio.create_task(env.journal.recover())
        _gates.reset(token)

    async def run_to(self, step: str) -> None:
        """Let it go on until just before a step, or to its end where it does not come to that step."""
        self._open()
        self._last = self._gates[step]
        waiting = asyncio.create_task(self._last.reached.wait())
        await asyncio.wait([self._task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def finish(self) -> None:
        """Let it go on to its end."""
        for gate in self._gates.values():
            gate.opened.set()
        await self._task

    def _open(self) -> None:
        if self._last is not None:
            self._last.opened.set()


@contextlib.contextmanager
def steps_are_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers of the block be stopped."""

    def watched(name: str) -> Any:
        original = getattr(Recovery, name)

        async def step(*args: Any) -> Any:
            gate = (_gates.get() or {}).get(name)
            if gate is not None:
                gate.reached.set()
                await gate.opened.wait()
            return await original(*args)

        return step

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(Recovery, name, watched(name))
        yield


@contextlib.asynccontextmanager
async def worker(env: OrmEnvironment, *steps: str) -> AsyncIterator[Worker]:
    """Start a worker that stops before the first of some steps; it has come to its end when the block ends."""
    started = Worker(env, steps)
    await started.run_to(steps[0])
    try:
        yield started
    finally:
        await started.finish()


async def shared(env: OrmEnvironment, *others: int) -> StoredObjectRef:
    """Let row 1 have a file, and others the same by SQL; return its ref."""
    doc = Doc(id=1, file=file("a"))
    await env.add(doc)
    assert doc.file is not None
    for other in others:
        await copy_by_sql(env, 1, other)
    return doc.file.ref


async def copy_by_sql(env: OrmEnvironment, source: int, target: int) -> bool:
    """Insert a row with the file of another one, whose row is locked meanwhile; return whether there was one."""
    share = "LOCK IN SHARE MODE" if env.database.name == "mariadb" else "FOR SHARE"
    row = f"SELECT {target}, title, file FROM doc WHERE id = {source} AND file IS NOT NULL {share}"  # noqa: S608
    async with env.engine.begin() as connection:
        return (await connection.execute(text(f"INSERT INTO doc (id, title, file) {row}"))).rowcount == 1


async def delete(env: OrmEnvironment, number: int) -> None:
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Doc, number))


async def restore(env: OrmEnvironment, ref: StoredObjectRef, number: int = 9) -> bool:
    """Let a new row restore a file that others have released; return whether that was possible."""
    try:
        await env.add(Doc(id=number, file=Attachment.restore(ref)))
    except StaleAttachmentError:
        return False
    return True


async def make_due(env: OrmEnvironment) -> None:
    """Let other workers take over what is fenced."""
    assert env.journal is not None
    async with env.engine.begin() as connection:
        await connection.execute(update(env.journal.tables.reclaim).values(due=clock(-1.0)))
