"""What a backend tells of its store: keys of its own, an identity, the place; each where it is declared."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from granite_storage.backends.base import (
    Place,
    StorageBackend,
    SupportsClock,
    SupportsCopy,
    SupportsExtraKeys,
    SupportsIdentity,
    SupportsMountCheck,
    SupportsPlaces,
    overlap,
)
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.manager import StorageManager
from granite_storage.policies import StoragePolicy
from granite_storage.testing._cases.base import Cases, chunked, listed

__all__ = ["StoreCases"]

_TELL = """
import asyncio, json
from granite_storage.backends.base import SupportsIdentity, SupportsPlaces
{make_backend}
async def tell():
    try:
        places = await backend.places() if isinstance(backend, SupportsPlaces) else ()
        identities = await backend.identities(create=True) if isinstance(backend, SupportsIdentity) else ()
    finally:
        await backend.aclose()
    print(json.dumps({{"places": [[place.store, place.path] for place in places], "identities": list(identities)}}))
asyncio.run(tell())
"""


class StoreCases(Cases):
    """Keys, identity, place, clock."""

    async def test_extra_keys(self, backend: StorageBackend) -> None:
        """Whatever a write or a copy returns for a ref's `extra` is among the keys that the backend has declared."""
        declared = backend.extra_keys if isinstance(backend, SupportsExtraKeys) else frozenset()
        answers: list[Mapping[str, Any] | None] = [
            await backend.put_bytes("extra/small", self.content("small")),
            await backend.put_stream("extra/parts", chunked(self.content("parts"))),
        ]
        if isinstance(backend, SupportsCopy):
            answers.append(await backend.copy("extra/parts", "extra/copy"))
        for answer in answers:
            undeclared = set(answer or {}) - declared
            assert not undeclared, f"extra_keys does not name {undeclared}, so they would follow a copy to another backend"

    async def test_extra_keys_stay_behind(self, backend: StorageBackend) -> None:
        """A copy on another backend has the caller's keys and none of this backend's."""
        policies = {"here": StoragePolicy("here", "it"), "there": StoragePolicy("there", "other")}
        where: Any = {"model_name": "model", "entity_id": "1", "field_name": "field"}
        async with StorageManager(backends={"it": backend, "other": MemoryStorageBackend()}, policies=policies) as manager:
            ref = await manager.put_bytes(storage_key="here", **where, content=b"...", extra={"mine": 1})
            copy = await manager.copy(ref, storage_key="there", **where)
            assert copy.extra == {"mine": 1}, f"a copy on another backend has the keys {copy.extra}"
            back = await manager.copy(copy, storage_key="here", **where)
            assert (back.extra or {}).keys() == (ref.extra or {}).keys(), f"a copy that came back has the keys {back.extra}"

    async def test_identity(self, backend: StorageBackend) -> None:
        """A store is given an identity once, however many ask at once, and keeps it; it is not an object."""
        if not isinstance(backend, SupportsIdentity):
            return
        before = await backend.identities()
        answers = await asyncio.gather(*(backend.identities(create=True) for _ in range(5)))
        identity = answers[0][0]
        assert identity, "a store has an empty identity"
        assert {answer[0] for answer in answers} == {identity}, f"a store has several identities for new objects: {answers}"
        assert not before or before[0] == identity, f"the identity was {before[0]} and is {identity}"
        assert await listed(backend) == [], "an identity is listed as an object"
        await backend.put_bytes("an object", b"...")
        await backend.delete("an object")
        assert (await backend.identities())[0] == identity, "the identity has changed"
        assert (await backend.identities(create=True))[0] == identity, "the identity for new objects has changed"

    async def test_places(self, backend: StorageBackend) -> None:
        """A backend tells where its objects are, always the same, before and after there are any."""
        if not isinstance(backend, SupportsPlaces):
            return
        before = await backend.places()
        assert before, "a backend that tells its places has at least one"
        assert all(isinstance(place, Place) for place in before), f"places() gives {before}, which are not all of type Place"
        await backend.put_bytes("an object", b"...")
        assert overlap(before, await backend.places()), "after a write the places do not overlap with those before it"

    async def test_another_process_knows_the_store(self, backend: StorageBackend) -> None:
        """Another process has the same identity for the same store, and tells a place that overlaps."""
        self.needs("is_shared")
        await backend.put_bytes("an object", b"...")
        told = await self._told_elsewhere(backend)
        if isinstance(backend, SupportsIdentity):
            identities: Sequence[str] = await backend.identities(create=True)
            assert told["identities"][:1] == [identities[0]], f"another process says {told['identities']}, this one {identities}"
        if isinstance(backend, SupportsPlaces):
            places = {Place(store, tuple(path)) for store, path in told["places"]}
            assert overlap(places, await backend.places()), f"another process says {places}, this one {await backend.places()}"

    async def test_mount_check(self, backend: StorageBackend) -> None:
        """A store that was written to is mounted, also when its last object is gone."""
        if not isinstance(backend, SupportsMountCheck):
            return
        await backend.put_bytes("an object", b"...")
        assert await backend.is_mounted(), "is_mounted() must be True once something was written"
        await backend.delete("an object")
        assert await backend.is_mounted(), "is_mounted() must stay True when the last object is gone"

    async def test_clock(self, backend: StorageBackend) -> None:
        """The clock is the one by which objects are dated: it may lag behind, and does not lead."""
        if not isinstance(backend, SupportsClock):
            return
        before = await backend.now()
        assert before.tzinfo is not None, "now() must have a time zone"
        await backend.put_bytes("an object", b"...")
        modified = (await backend.stat("an object")).modified
        assert (before - modified).total_seconds() <= 1, f"now() was {before}, and an object that was stored later has {modified}"

    async def _told_elsewhere(self, backend: StorageBackend) -> dict[str, Any]:
        done = await self.run_elsewhere(_TELL.format(make_backend=self.elsewhere(backend)))
        assert done.returncode == 0, f"the other process failed: {done.stderr.decode()[-2000:]}"
        told: dict[str, Any] = json.loads(done.stdout)
        return told
