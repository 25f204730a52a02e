"""Buffers whose items are longer than a byte: what counts is bytes."""

from __future__ import annotations

import pytest

from granite_storage import ContentTooLargeError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend

SIXTEEN_BYTES = memoryview(bytes(range(16))).cast("Q")


async def put(max_size: int) -> tuple[int, bytes]:
    policies = {"docs": StoragePolicy("docs", "memory", max_size=max_size)}
    manager = StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies)
    names = {"storage_key": "docs", "model_name": "doc", "entity_id": "1", "field_name": "file"}
    ref = await manager.put_bytes(**names, content=SIXTEEN_BYTES)
    return ref.size, await manager.get(ref)


async def test_a_limit_counts_bytes() -> None:
    with pytest.raises(ContentTooLargeError):
        await put(max_size=15)


async def test_a_ref_says_the_number_of_bytes() -> None:
    assert await put(max_size=16) == (16, bytes(range(16)))
