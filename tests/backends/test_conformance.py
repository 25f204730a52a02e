"""Memory and disk through the public suite, each as it is, below a prefix, and behind a fault-injecting wrapper with no fault.

`test_s3_conformance.py` has S3.
"""

from __future__ import annotations

import os
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from granite_storage.backends import local, memory
from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.testing import BackendConformance, FaultInjectingBackend

PREFIX = "tenants/7"
NEIGHBOURS = ["tenants/6/other", "tenants/70/other", "tenants/7.txt", "tenant", "tenants-/7/other"]


class Rigged(BackendConformance):
    """A suite that may run on a wrapper around the backend: the rigging is done inside."""

    def around(self, backend: Any) -> Any:
        return backend

    def inside(self, backend: Any) -> Any:
        return backend


class Prefixed(Rigged):
    """Runs it below a prefix, beside neighbours that must be neither seen nor touched."""

    longest_location = 1024 - len(f"{PREFIX}/")

    def around(self, backend: Any) -> Any:
        return PrefixedBackend(backend, PREFIX)

    def inside(self, backend: Any) -> Any:
        return backend.inner

    @pytest.fixture(autouse=True)
    async def _neighbours(self, backend: PrefixedBackend) -> AsyncIterator[None]:
        for location in NEIGHBOURS:
            await backend.inner.put_bytes(location, location.encode())
        yield
        others = [info async for info in backend.inner.iter_objects() if not info.location.startswith(f"{PREFIX}/")]
        assert {info.location: info.size for info in others} == {location: len(location) for location in NEIGHBOURS}


class BehindFaults(Rigged):
    """Runs it behind a `FaultInjectingBackend` that has nothing to inject."""

    def around(self, backend: Any) -> Any:
        return FaultInjectingBackend(backend)

    def inside(self, backend: Any) -> Any:
        return backend.inner


class TestMemory(Rigged):
    supports_copy = supports_batch_delete = supports_clock = supports_identity = supports_places = True
    supports_extra_keys = supports_mount_check = False
    can_refuse = can_be_unreachable = can_lose_answers = is_shared = False  # nothing stands between it and its caller
    large_size = 8 << 20
    memory_growth = 9 << 20

    @pytest.fixture
    async def backend(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StorageBackend]:
        self.monkeypatch = monkeypatch
        backend = self.around(MemoryStorageBackend())
        yield backend
        await backend.aclose()

    def with_page_size(self, backend: Any, size: int) -> StorageBackend:
        self.monkeypatch.setattr(memory, "_PAGE", size)
        return backend

    @asynccontextmanager
    async def with_room_for(self, backend: Any, size: int) -> AsyncIterator[StorageBackend]:
        yield self.around(MemoryStorageBackend(max_total_size=size))

    async def count_unfinished(self, backend: Any) -> int:
        store = self.inside(backend)
        return store._total_size - sum([info.size async for info in store.iter_objects()])


class TestMemoryPrefixed(Prefixed, TestMemory):
    pass


class TestMemoryBehindFaults(BehindFaults, TestMemory):
    pass


class TestLocal(Rigged):
    supports_copy = supports_cleanup = supports_abort = True
    supports_clock = supports_mount_check = supports_identity = supports_places = True
    supports_extra_keys = False
    tells_upload_ids = False
    keeps_content_type = False  # the ref keeps it
    nests_objects = False  # a file is no folder
    can_lose_answers = False  # there is no network
    large_size = 32 << 20

    @pytest.fixture
    async def backend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StorageBackend]:
        self.root, self.monkeypatch = tmp_path / "store", monkeypatch
        self.root.mkdir()
        backend = self.around(LocalStorageBackend(self.root, fsync=False))
        yield backend
        await backend.aclose()

    def with_page_size(self, backend: Any, size: int) -> StorageBackend:
        self.monkeypatch.setattr(local, "_LISTING_BATCH", size)
        return self.around(LocalStorageBackend(self.root))

    @asynccontextmanager
    async def with_room_for(self, backend: Any, size: int) -> AsyncIterator[StorageBackend]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        small = self.around(LocalStorageBackend(self.root.with_name("small")))
        try:
            yield small
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            await small.aclose()

    @asynccontextmanager
    async def refusing(self, backend: Any) -> AsyncIterator[StorageBackend]:
        self.root.chmod(0)
        root = os.geteuid() == 0
        if root:  # to whom nothing is refused
            os.seteuid(65534)
        try:
            yield backend
        finally:
            if root:
                os.seteuid(0)
            self.root.chmod(0o750)

    @asynccontextmanager
    async def unreachable(self, backend: Any) -> AsyncIterator[StorageBackend]:
        yield self.around(LocalStorageBackend(self.root.with_name("unmounted"), create_root=False))

    def elsewhere(self, backend: Any) -> str:
        lines = [
            "from granite_storage.backends.local import LocalStorageBackend",
            "from granite_storage.backends.wrappers import PrefixedBackend",
            f"backend = LocalStorageBackend({str(self.root)!r})",
        ]
        if isinstance(backend, PrefixedBackend):
            lines.append(f"backend = PrefixedBackend(backend, {PREFIX!r})")
        return "\n".join(lines)

    async def count_unfinished(self, backend: Any) -> int:
        return len(list(self.root.rglob("*.tmp")))


class TestLocalPrefixed(Prefixed, TestLocal):
    pass


class TestLocalBehindFaults(BehindFaults, TestLocal):
    pass
