"""What the tests of derived files share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from granite_storage import StoredObjectRef
from granite_storage.derived import Derivation, DerivationSource, Recipe


def source_of(content: bytes, *, filename: str | None = None, chunk: int = 64 * 1024) -> DerivationSource:
    """Return a source that is in memory."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(content), chunk):
                yield content[start : start + chunk]

        yield chunks()

    return DerivationSource(StoredObjectRef("files", "memory", "x", len(content), "", original_filename=filename), opened)


async def derive(recipe: Recipe, content: bytes | DerivationSource) -> Derivation:
    """Return what a recipe makes, with its bytes."""
    source = content if isinstance(content, DerivationSource) else source_of(content)
    async with recipe.make(source) as made:
        data = made.content.read_bytes() if isinstance(made.content, Path) else made.content
        return Derivation(data, made.content_type, made.media, made.filename)
