"""A search index in memory, and columns that keep it by an effect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from granite_storage.derived import Effect, EffectEvent
from granite_storage.exceptions import ObjectNotFoundError
from granite_storage.orm import AttachmentType
from tests.orm.derivations import Gate, column_type, journal_of, make_due
from tests.orm.environment import Doc, OrmEnvironment

__all__ = ["SearchIndex", "catch_up", "require_agreement", "with_effects"]


class SearchIndex:
    """Knows a document of each file. It counts its calls, and notices when two of them for a file overlap."""

    def __init__(self, env: OrmEnvironment, *, version: int = 1, timeout: float = 20.0) -> None:
        self.manager = env.manager
        self.documents: dict[str, bytes] = {}
        self.rows: dict[str, tuple[str, tuple[Any, ...] | None]] = {}
        self.calls: list[tuple[str, str]] = []
        self.failures = 0
        self.error: BaseException = ConnectionError("the search server is down")
        self.gate: Gate | None = None
        self.overlaps = 0
        self._in_hand: set[str] = set()
        self.effect = Effect(put=self.put, remove=self.remove, version=version, timeout=timeout)

    async def put(self, event: EffectEvent) -> None:
        with self._call("put", event):
            content = await self.manager.get(event.ref)
            await self._struggle()
            self.documents[event.ref.location] = content
            self.rows[event.ref.location] = event.column, event.key

    async def remove(self, event: EffectEvent) -> None:
        with self._call("remove", event):
            assert event.key is None
            await self._struggle()
            self.documents.pop(event.ref.location, None)
            self.rows.pop(event.ref.location, None)

    async def _struggle(self) -> None:
        if self.gate is not None:
            self.gate.reached.set()
            await self.gate.opened.wait()
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise self.error

    @contextlib.contextmanager
    def _call(self, verb: str, event: EffectEvent) -> Iterator[None]:
        self.calls.append((verb, event.ref.location))
        self.overlaps += event.ref.location in self._in_hand
        self._in_hand.add(event.ref.location)
        try:
            yield
        finally:
            self._in_hand.discard(event.ref.location)


@contextlib.contextmanager
def with_effects(effects: Mapping[str, Effect], *columns: tuple[Any, str]) -> Iterator[None]:
    """Let columns, `file` of `doc` by default, declare effects while the block runs."""
    with contextlib.ExitStack() as stack:
        for model, name in columns or ((Doc, "file"),):
            found, made = column_type(name, model), AttachmentType("docs", effects=effects)
            stack.callback(found._effects.clear)
            found._effects.update(made._effects)
        yield


async def catch_up(env: OrmEnvironment) -> Any:
    """Let a worker do all that is recorded, as if every pause were over."""
    await make_due(env)
    return await journal_of(env).recover()


async def require_agreement(env: OrmEnvironment, index: SearchIndex, *columns: tuple[str, str]) -> None:
    """Check that the index has a document of each file in columns, and of no other."""
    held: dict[str, bytes] = {}
    for (table, _, column), ref in (await env.references()).items():
        if (table, column) in (columns or (("doc", "file"),)):
            with contextlib.suppress(ObjectNotFoundError):
                held[ref.location] = await env.manager.get(ref)
    assert index.documents == held
    assert index.overlaps == 0
