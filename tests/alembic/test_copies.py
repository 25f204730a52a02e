"""A copy of content from elsewhere is read back before its row may refer to it."""

from __future__ import annotations

import pytest

from granite_storage import ChecksumMismatchError, StorageManager, StoragePolicy
from granite_storage.alembic import CopyOf
from granite_storage.alembic.sources import Place, copy_content
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.testing import FaultInjectingBackend

PLACE = Place("docs", "photo", (1,), "file")


async def test_one_that_does_not_come_back_is_removed() -> None:
    backend = FaultInjectingBackend(MemoryStorageBackend())
    manager = StorageManager(backends={"memory": backend}, policies={"docs": StoragePolicy("docs", "memory")})
    backend.corrupt("put_bytes", at=3)
    with pytest.raises(ChecksumMismatchError):
        await copy_content(manager, PLACE, CopyOf(b"content"))
    assert [info async for info in backend.iter_objects()] == []
    stored = await copy_content(manager, PLACE, CopyOf(b"content"))
    assert await manager.get(stored.ref) == b"content"
