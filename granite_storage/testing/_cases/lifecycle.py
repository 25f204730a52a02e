"""Lifecycle: event loops, closing, and abilities that are what they say."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import aclosing
from typing import Any

import pytest

from granite_storage.backends.base import StorageBackend
from granite_storage.exceptions import StorageError
from granite_storage.manager import StorageManager
from granite_storage.policies import StoragePolicy
from granite_storage.testing._cases.base import ABILITIES, Cases, listed, must_raise, read_all, same_bytes

__all__ = ["LifecycleCases"]


class LifecycleCases(Cases):
    """Event loops, closing, declarations."""

    @pytest.mark.parametrize(
        ("ability", "protocol", "method"), [(ability, protocol, method) for protocol, (ability, method) in ABILITIES.items()]
    )
    async def test_declared_ability(self, backend: StorageBackend, ability: str, protocol: type, method: str) -> None:
        """An ability that is declared is there, and one that is not declared is not there at all."""
        declared = getattr(self, ability)
        if declared:
            assert isinstance(backend, protocol), f"{ability} is declared, but the backend has no {method}()"
        elif declared is not None:
            assert not isinstance(backend, protocol), f"the backend has {method}(), but {ability} is not declared"
            assert not hasattr(backend, method), f"the backend has {method}(), but {ability} is not declared"

    async def test_is_a_backend(self, backend: StorageBackend) -> None:
        """The backend satisfies the protocol: every call is there, and those that do I/O are coroutines."""
        assert isinstance(backend, StorageBackend), "the backend lacks a call of StorageBackend"
        for verb in ("put_bytes", "put_stream", "open", "stat", "exists", "delete", "aclose"):
            assert inspect.iscoroutinefunction(getattr(backend, verb)), f"{verb} must be `async def`"
        assert hasattr(backend.iter_objects(), "__anext__"), "iter_objects must return an async iterator"

    async def test_event_loops_one_after_the_other(self, backend: StorageBackend) -> None:
        """One backend serves a loop, then another, then the first again."""
        await backend.put_bytes("loop/0", b"0")
        for number in (1, 2):
            await asyncio.to_thread(asyncio.run, _use(backend, f"loop/{number}"))
        await backend.put_bytes("loop/3", b"loop/3")
        assert await listed(backend) == [f"loop/{number}" for number in range(4)], "what other loops stored is not all there"

    async def test_event_loops_in_threads(self, backend: StorageBackend) -> None:
        """One backend serves several loops at a time, each in a thread, and closing it on one does not disturb the others."""

        async def use_often(number: int) -> None:
            for turn in range(5):
                await _use(backend, f"thread/{number}/{turn}")

        await asyncio.gather(*(asyncio.to_thread(asyncio.run, use_often(number)) for number in range(3)), use_often(3))
        assert len(await listed(backend, "thread/")) == 20, "what four loops stored at a time is not all there"

    async def test_close(self, backend: StorageBackend) -> None:
        """Closing is idempotent, also before anything was opened; a later call opens again what it needs."""
        await backend.aclose()
        await backend.put_bytes("closed", b"...")
        await backend.aclose()
        await backend.aclose()
        await self.require_whole(backend, "closed", b"...", "after the backend was closed")
        await backend.aclose()

    async def test_use_after_close(self, backend: StorageBackend) -> None:
        """Every call of a closed manager is a clear error, closing it again is none, and entering it opens it again."""
        manager = StorageManager(backends={"it": backend}, policies={"files": StoragePolicy("files", "it")})
        where: Any = {"storage_key": "files", "model_name": "model", "entity_id": "1", "field_name": "field"}
        async with manager:
            ref = await manager.put_bytes(**where, content=b"kept")
        await manager.aclose()
        await manager.aclose()
        calls: list[Any] = [
            lambda: manager.put_bytes(**where, content=b"..."),
            lambda: manager.put_stream(**where, stream=[b"..."]),
            lambda: manager.get(ref),
            lambda: manager.open(ref),
            lambda: manager.exists(ref),
            lambda: manager.stat(ref),
            lambda: manager.delete(ref),
        ]
        for call in calls:
            with must_raise(StorageError, "a call of a closed manager must raise") as caught:
                await call()
            assert "closed" in str(caught.error), f"the error does not say that the manager is closed: {caught.error}"
        async with manager:
            same_bytes(await manager.get(ref), b"kept", "after the manager was entered again")

    async def test_through_a_manager(self, backend: StorageBackend) -> None:
        """The whole way through a manager: put, stat, get, a range, copy, delete."""
        policy = StoragePolicy("files", "it", key_prefix="some/prefix")
        async with StorageManager(backends={"it": backend}, policies={"files": policy}) as manager:
            where: Any = {"model_name": "model", "entity_id": "1", "field_name": "field"}
            content = self.content("parts")
            ref = await manager.put_stream(
                storage_key="files", **where, stream=[content[:1000], content[1000:]], original_filename="R\u00e9sum\u00e9.pdf"
            )
            copy = await manager.copy(ref, **where)
            assert await listed(backend, "some/prefix/") == sorted([ref.location, copy.location]), "the listing is not the two"
            for stored in (ref, copy):
                same_bytes(await manager.get(stored), content, "through a manager")
                assert (await manager.stat(stored)).size == len(content), "stat() through a manager gives another size"
                async with manager.open(stored, offset=10, length=20) as reader:
                    same_bytes(await reader.read(), content[10:30], "a range through a manager")
                await manager.delete(stored)
                assert not await manager.exists(stored), "deleted through a manager, but it exists"


async def _use(backend: StorageBackend, location: str) -> None:
    """Use a backend on this loop, and close what this loop opened."""
    async with aclosing(backend):
        await backend.put_bytes(location, location.encode())
        same_bytes(await read_all(backend, location), location.encode(), "on another event loop")
        assert location in await listed(backend), "what another event loop stored is not listed"
