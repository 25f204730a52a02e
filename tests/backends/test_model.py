"""Backends against a model, which is a dict: whatever happens in whatever order, they agree."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from granite_storage.backends.base import StorageBackend, SupportsCopy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import ObjectExistsError, ObjectNotFoundError, StorageFullError

T = TypeVar("T")

LOCATIONS = ["a/1", "a/2", "a-/1", "ab/1", "b/c/d/1", "b/c/2", "\u00e9/1", "e\u0301/1"]
ROOM = 120

locations = st.sampled_from(LOCATIONS)
contents = st.binary(max_size=40)


async def stream(content: bytes, pieces: int, error: Exception | None = None) -> AsyncIterator[bytes]:
    step = max(1, -(-len(content) // pieces))
    for start in range(0, len(content), step):
        await asyncio.sleep(0)
        yield content[start : start + step]
    if error is not None:
        raise error


async def read(backend: StorageBackend, location: str) -> bytes:
    reader = await backend.open(location)
    try:
        return await reader.read(-1)
    finally:
        await reader.aclose()


class Model(RuleBasedStateMachine):
    """Calls in any order, by one task."""

    bounded = False

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.backend: Any = self.make()
        self.stored: dict[str, bytes] = {}

    def make(self) -> StorageBackend:
        raise NotImplementedError

    def run(self, call: Callable[[], Awaitable[T]]) -> T:
        async def awaited() -> T:
            return await call()

        return self.runner.run(awaited())

    def expect(self, call: Callable[[], Awaitable[object]], target: str, size: int) -> bool:
        """Make a write, and tell whether the model has it succeed; it must fail where the model has it fail."""
        if target in self.stored:
            with pytest.raises(ObjectExistsError):
                self.run(call)
        elif self.bounded and sum(map(len, self.stored.values())) + size > ROOM:
            with pytest.raises(StorageFullError):
                self.run(call)
        else:
            self.run(call)
            return True
        return False

    @rule(location=locations, content=contents)
    def put_bytes(self, location: str, content: bytes) -> None:
        if self.expect(lambda: self.backend.put_bytes(location, content), location, len(content)):
            self.stored[location] = content

    @rule(location=locations, content=contents, pieces=st.integers(1, 5))
    def put_stream(self, location: str, content: bytes, pieces: int) -> None:
        if self.expect(lambda: self.backend.put_stream(location, stream(content, pieces)), location, len(content)):
            self.stored[location] = content

    @rule(location=locations, content=contents)
    def put_broken_stream(self, location: str, content: bytes) -> None:
        with pytest.raises((LookupError, ObjectExistsError, StorageFullError)):
            self.run(lambda: self.backend.put_stream(location, stream(content, 3, LookupError())))

    @rule(location=locations)
    def delete(self, location: str) -> None:
        self.run(lambda: self.backend.delete(location))
        self.stored.pop(location, None)

    @rule(source=locations, copied_to=locations)
    @precondition(lambda self: isinstance(self.backend, SupportsCopy))
    def copy(self, source: str, copied_to: str) -> None:
        if source not in self.stored:
            with pytest.raises(ObjectNotFoundError):
                self.run(lambda: self.backend.copy(source, copied_to))
        elif self.expect(lambda: self.backend.copy(source, copied_to), copied_to, len(self.stored[source])):
            self.stored[copied_to] = self.stored[source]

    @rule(prefix=st.sampled_from(["", "a", "a/", "b/", "b/c/", "\u00e9"]), start_after=st.none() | locations)
    def list_objects(self, prefix: str, start_after: str | None) -> None:
        async def listed() -> list[str]:
            return [info.location async for info in self.backend.iter_objects(prefix, start_after=start_after)]

        expected = [name for name in self.stored if name.startswith(prefix) and name.encode() > (start_after or "").encode()]
        assert self.run(listed) == sorted(expected, key=str.encode)

    @rule()
    def close(self) -> None:
        self.run(self.backend.aclose)

    @invariant()
    def agrees(self) -> None:
        async def found() -> dict[str, bytes]:
            return {info.location: await read(self.backend, info.location) async for info in self.backend.iter_objects()}

        assert self.run(found) == self.stored

    def teardown(self) -> None:
        self.run(self.backend.aclose)
        self.runner.close()


class MemoryModel(Model):
    bounded = True

    def make(self) -> StorageBackend:
        return MemoryStorageBackend(max_total_size=ROOM)


class LocalModel(Model):
    def make(self) -> StorageBackend:
        self.folder = tempfile.mkdtemp()
        return PrefixedBackend(LocalStorageBackend(self.folder, fsync=False), "some/prefix")

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestMemoryModel = MemoryModel.TestCase
TestMemoryModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLocalModel = LocalModel.TestCase
TestLocalModel.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@pytest.mark.parametrize("seed", [1, 2])
async def test_tasks_at_a_time_agree_with_a_model(backend: Any, seed: int) -> None:
    """Tasks that each own a folder, all at work at once, on every backend."""

    async def work(own: int) -> dict[str, bytes]:
        chance = random.Random(f"{seed}/{own}")
        stored: dict[str, bytes] = {}
        for _ in range(12):
            location = f"tasks/{own}/{chance.randrange(4)}"
            content = chance.randbytes(chance.randrange(3000))
            if location in stored and chance.random() < 0.4:
                await backend.delete(location)
                del stored[location]
            elif location in stored:
                with pytest.raises(ObjectExistsError):
                    await backend.put_bytes(location, content)
                assert await read(backend, location) == stored[location]
            else:
                await backend.put_stream(location, stream(content, chance.randrange(1, 4)))
                stored[location] = content
        return stored

    expected: dict[str, bytes] = {}
    for stored in await asyncio.gather(*(work(own) for own in range(6))):
        expected |= stored
    found = {info.location: await read(backend, info.location) async for info in backend.iter_objects()}
    assert found == expected
