"""Recipes that need neither images nor processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from granite_storage.derived import Derivation, DerivationSource, Missing, When


@dataclass(frozen=True)
class Upper:
    """The text in capitals."""

    when: When = "flush"
    missing: Missing = "nothing"
    version: int = 1

    def digest(self, name: str) -> str:
        return f"{name}-{self.version}"

    @asynccontextmanager
    async def make(self, source: DerivationSource) -> AsyncIterator[Derivation]:
        async with source.open() as chunks:
            content = b"".join([chunk async for chunk in chunks])
        yield Derivation(content.upper(), "text/plain")
