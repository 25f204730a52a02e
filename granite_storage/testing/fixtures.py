"""Pytest fixtures for applications: real managers, on memory or on a temporary folder, without a service.

Put this into the `conftest.py` of your tests:

```python
pytest_plugins = ["granite_storage.testing.fixtures"]
```

The fixtures are plain functions, so they serve tests under pytest-asyncio, anyio or none of them. They name their policies
after what `granite_storage_policies` says; override it to have your own:

```python
@pytest.fixture
def granite_storage_policies():
    return {"avatars": StoragePolicy("avatars", "main", max_size=2_000_000)}


async def test_upload(granite_memory_storage):
    ref = await granite_memory_storage.put_bytes(
        storage_key="avatars",
        model_name="user",
        entity_id="1",
        field_name="avatar",
        content=b"...",
    )
    assert await granite_memory_storage.get(ref) == b"..."
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.manager import StorageManager
from granite_storage.policies import StoragePolicy

__all__ = [
    "MakeStorage",
    "granite_local_storage",
    "granite_make_storage",
    "granite_memory_storage",
    "granite_storage_policies",
]


class MakeStorage(Protocol):
    """The function that `granite_make_storage` returns."""

    def __call__(
        self,
        backend: StorageBackend | None = None,
        *,
        policies: Mapping[str, StoragePolicy] | None = None,
        backends: Mapping[str, StorageBackend] | None = None,
    ) -> StorageManager:
        """Return a manager that is closed at the end of the test.

        Args:
            backend: Where every policy stores, whatever backend it names; None for a fresh one in memory.
            policies: The policies; None for those of `granite_storage_policies`.
            backends: The backends by their keys, in place of `backend`.
        """
        ...


@pytest.fixture
def granite_storage_policies() -> Mapping[str, StoragePolicy]:
    """The policies of the managers below: one, `files`, without limits. Override it with those of your application."""
    return {"files": StoragePolicy("files", "main")}


@pytest.fixture
def granite_make_storage(granite_storage_policies: Mapping[str, StoragePolicy]) -> Iterator[MakeStorage]:
    """Create managers for one test, such as one on a `FaultInjectingBackend`, or with other policies."""
    made: list[StorageManager] = []

    def make(
        backend: StorageBackend | None = None,
        *,
        policies: Mapping[str, StoragePolicy] | None = None,
        backends: Mapping[str, StorageBackend] | None = None,
    ) -> StorageManager:
        policies = granite_storage_policies if policies is None else policies
        if backends is None:
            store = MemoryStorageBackend() if backend is None else backend
            backends = dict.fromkeys((policy.backend_key for policy in policies.values()), store)
        made.append(StorageManager(backends=backends, policies=policies))
        return made[-1]

    yield make
    for manager in made:
        _close(manager)


@pytest.fixture
def granite_memory_storage(granite_make_storage: MakeStorage) -> StorageManager:
    """A manager whose objects are in memory, new for each test."""
    return granite_make_storage(MemoryStorageBackend())


@pytest.fixture
def granite_local_storage(granite_make_storage: MakeStorage, tmp_path: Path) -> StorageManager:
    """A manager whose objects are files below `tmp_path / "granite-storage"`, new for each test, without fsync."""
    return granite_make_storage(LocalStorageBackend(tmp_path / "granite-storage", fsync=False))


def _close(manager: StorageManager) -> None:
    """Close a manager on a loop of its own: that of the test may be closed, and pytest's must not be replaced."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        runner.run(manager.aclose())
