"""A prefix around a backend: a folder of it, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from granite_storage.backends.base import SupportsCleanup, SupportsCopy, SupportsPresign
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend, WrappedBackend
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    ConfigurationError,
    InvalidLocationError,
    ObjectNotFoundError,
)
from granite_storage.testing import FaultInjectingBackend


class Poor:
    """A backend of an application's own, as far as it is used here."""

    async def exists(self, location: str) -> bool:
        return False


@pytest.mark.case("POL-03")
@pytest.mark.parametrize("prefix", ["", "/", "/a", "a/", "a//b", "../a", "a/..", "a\\b", "a.", ".granite-x", None, 7, "s" * 256])
def test_unsafe_prefixes_are_refused(prefix: Any) -> None:
    with pytest.raises(ConfigurationError, match="prefix"):
        PrefixedBackend(MemoryStorageBackend(), prefix)


async def test_whole_segments() -> None:
    memory = MemoryStorageBackend()
    for location in ("a/1", "ab/1", "a-/1", "b/a/1", "a.txt"):
        await memory.put_bytes(location, b"")
    folder = PrefixedBackend(memory, "a")
    assert [info.location async for info in folder.iter_objects()] == ["1"]
    assert [info.location async for info in folder.iter_objects("b")] == []
    assert [info.location async for info in folder.iter_objects(start_after="1")] == []
    assert [info.location async for info in folder.iter_objects(start_after="0")] == ["1"]


@pytest.mark.case("LOC-19")
async def test_nothing_leads_out() -> None:
    memory = MemoryStorageBackend()
    await memory.put_bytes("secret", b"")
    folder: Any = PrefixedBackend(memory, "a/b")
    for location in ("../secret", "../../secret", "/secret", "", "x/../../../secret", None):
        with pytest.raises(InvalidLocationError):
            await folder.stat(location)
        with pytest.raises(InvalidLocationError):
            await folder.copy(location, "mine")
    assert [info async for info in folder.iter_objects("../")] == []


async def test_errors_say_our_name() -> None:
    folder: Any = PrefixedBackend(PrefixedBackend(MemoryStorageBackend(), "a"), "b/c")
    for call in (folder.stat("x"), folder.open("x"), folder.copy("x", "y")):
        with pytest.raises(ObjectNotFoundError) as caught:
            await call
        assert caught.value.location == "x"


@pytest.mark.parametrize("inner", [MemoryStorageBackend(), Poor()], ids=["abilities", "none"])
async def test_a_wrapper_that_changes_nothing(inner: Any) -> None:
    wrapped = WrappedBackend(inner)
    assert await wrapped.exists("nothing") is False
    assert isinstance(wrapped, SupportsCopy) is isinstance(inner, SupportsCopy)


async def test_others_errors_are_left_alone() -> None:
    source = ObjectNotFoundError("elsewhere", location="a/source")

    async def stream() -> AsyncIterator[bytes]:
        raise source
        yield b""

    with pytest.raises(ObjectNotFoundError) as caught:
        await PrefixedBackend(MemoryStorageBackend(), "a").put_stream("target", stream())
    assert caught.value is source
    assert source.location == "a/source"


async def test_batch_failures_say_our_name() -> None:
    class Stubborn(MemoryStorageBackend):
        async def delete_many(self, locations: Any) -> dict[str, BackendError]:
            return {location: AccessDeniedError("no", location=location) for location in locations if location.endswith("2")}

    folder: Any = PrefixedBackend(Stubborn(), "a")
    failures = await folder.delete_many(["1", "2", "2"])
    assert {location: error.location for location, error in failures.items()} == {"2": "2"}


async def test_closes_what_is_inside(tmp_path: Any) -> None:
    faults = FaultInjectingBackend(LocalStorageBackend(tmp_path, fsync=False))
    folder: Any = PrefixedBackend(faults, "a")
    assert isinstance(folder, SupportsCopy)
    assert isinstance(folder, SupportsCleanup)
    assert not isinstance(folder, SupportsPresign)
    await folder.put_bytes("x", b"...")
    assert (tmp_path / "a" / "x").read_bytes() == b"..."
    assert await folder.cleanup_incomplete(older_than=timedelta(0)) == 0
    await folder.aclose()
    assert faults.count("aclose") == 1
    assert repr(folder) == f"PrefixedBackend({faults!r}, 'a')"


async def test_abandoned_listing_is_closed() -> None:
    closed = []

    class Watching(MemoryStorageBackend):
        async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> Any:
            try:
                async for info in super().iter_objects(prefix, start_after=start_after):
                    yield info
            finally:
                closed.append(prefix)

    folder = PrefixedBackend(Watching(), "a")
    for name in "xyz":
        await folder.put_bytes(name, b"")
    listing: Any = folder.iter_objects()
    await anext(listing)
    await listing.aclose()
    assert closed == ["a/"]
