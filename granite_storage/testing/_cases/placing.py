"""Odd locations: what can be stored comes back verbatim, and what cannot is refused before a byte is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from granite_storage.backends.base import (
    StorageBackend,
    SupportsBatchDelete,
    SupportsCopy,
    SupportsPresign,
    SupportsPresignedUpload,
)
from granite_storage.exceptions import InvalidLocationError, ObjectExistsError
from granite_storage.locations import RESERVED_PREFIX
from granite_storage.testing._cases.base import Cases, infos, listed, must_raise, same_bytes

__all__ = ["LocationCases"]

ODD = [
    "with space/and  two",
    " leading/trailing ",
    "dots/.hidden/..both../end.",
    'quotes/it\'s/"so"/`called`',
    "percent/100%/%41/%2F/%00",
    "plus/a+b/a%2Bb",
    "ampersand/a&b/&amp;",
    "hash/a#b",
    "question/a?b=c",
    "equals/a=b;c,d:e@f",
    "brackets/<a>/[b]/{c}/(d)",
    "signs/~!$^*|",
    "case/README",
    "nfc/\u00e9\u00fc\u00df",
    "nfd/e\u0301u\u0308",
    "cjk/\u4e2d\u6587/\u65e5\u672c\u8a9e",
    "rtl/\u05e9\u05dc\u05d5\u05dd/\u0645\u0631\u062d\u0628\u0627",
    "emoji/\U0001f600\U0001f468\u200d\U0001f469",
    "number/1e3/-0/NaN",
    "like a null/None/null",
    "longest segment/" + "s" * 255,
    "longest segment in UTF-8/" + "\u00e9" * 127,
    "tmp/file.tmp/~lock",
]

HOSTILE: dict[str, list[Any]] = {
    "path": ["", "/", "/absolute", "folder/", "a//b", ".", "..", "../outside", "a/../b", "a/./b", "a/..", "back\\slash"],
    "character": ["nul\x00byte", "new\nline", "escape\x1b[0m", "delete\x7f", "lone\ud800surrogate"],
    "length": ["s" * 256, "\u00e9" * 128, "s/" * 512 + "s"],
    "reserved": [f"{RESERVED_PREFIX}marker", f"folder/{RESERVED_PREFIX}0123.tmp", f"{RESERVED_PREFIX}folder/object"],
    "type": [None, 17, b"bytes"],
}


class LocationCases(Cases):
    """Odd and hostile locations."""

    @pytest.mark.parametrize("location", ODD)
    async def test_odd_location(self, backend: StorageBackend, location: str) -> None:
        """An odd location is stored, found, listed verbatim and deleted, or, where declared so, refused before any byte."""
        if location in self.unstorable:
            with must_raise(InvalidLocationError, f"{location!r} is declared unstorable, so it must be refused"):
                await backend.put_stream(location, _Untouchable())
            return
        content = location.encode()
        await backend.put_bytes(location, content)
        await self.require_whole(backend, location, content, f"stored at {location!r}")
        (info,) = await infos(backend, location)
        assert info.location == location, f"{location!r} is listed as {info.location!r}"
        assert (await backend.stat(location)).location == location, f"stat({location!r}) gives another location"
        with must_raise(ObjectExistsError, f"a second object at {location!r} must be refused"):
            await backend.put_bytes(location, b"second")
        await backend.delete(location)
        assert await listed(backend) == [], f"{location!r} was deleted, but something is listed"

    async def test_odd_locations_stay_apart(self, backend: StorageBackend) -> None:
        """Locations that some systems take for one are several: cases, forms of Unicode, encodings, dots and spaces."""
        alike = ["x/a", "x/A", "x/\u00e9", "x/e\u0301", "x/%61", "x/a ", "x/ a", "x/a.", "x/a+", "x/a%20", "x/a%2B", "x/\u0430"]
        storable = [location for location in alike if location not in self.unstorable]
        for location in storable:
            await backend.put_bytes(location, location.encode())
        assert sorted(await listed(backend, "x/")) == sorted(storable), "locations that look alike became one"
        for location in storable:
            await self.require_whole(backend, location, location.encode(), f"{location!r}, beside others that look like it")

    async def test_longest_location(self, backend: StorageBackend) -> None:
        """The longest location is stored, and one byte more is refused."""
        segments = "/".join(["s" * 200] * 6)
        longest = segments[: self.longest_location - 1] + "e"
        await backend.put_bytes(longest, b"...")
        await self.require_whole(backend, longest, b"...", f"at a location of {self.longest_location} bytes")
        with must_raise(InvalidLocationError, f"a location of {self.longest_location + 1} bytes must be refused"):
            await backend.put_stream(longest + "e", _Untouchable())

    @pytest.mark.parametrize("kind", HOSTILE)
    async def test_hostile_location(self, backend: StorageBackend, kind: str) -> None:
        """A location that is not safe is refused by every call before anything is touched, whatever let it through."""
        await backend.put_bytes("safe", b"...")
        for location in HOSTILE[kind]:
            for verb, call in _calls(backend, location).items():
                with must_raise(InvalidLocationError, f"{verb} {location!r:.60} must be refused"):
                    await call()
            assert await listed(backend) == ["safe"], f"a refused call with {location!r:.60} changed the store"

    async def test_own_files_are_no_objects(self, backend: StorageBackend) -> None:
        """What a backend keeps for itself, such as markers and temporary files, is never listed."""
        await backend.put_bytes("visible", b"...")
        assert await listed(backend, RESERVED_PREFIX) == [], "a backend's own file is listed as an object"
        assert await listed(backend) == ["visible"], "something is listed beside the one object"

    async def test_content_is_not_looked_at(self, backend: StorageBackend) -> None:
        """Content that looks like a protocol's own is content."""
        for number, content in enumerate(
            (b"0\r\n\r\n", b"\x00" * 100, b"<Error><Code>AccessDenied</Code></Error>", b"\x1f\x8b\x08")
        ):
            await backend.put_bytes(f"protocol/{number}", content, content_type="application/octet-stream")
            reader = await backend.open(f"protocol/{number}")
            try:
                same_bytes(await reader.read(-1), content, f"the content {content!r:.40}")
            finally:
                await reader.aclose()


def _calls(backend: StorageBackend, location: Any) -> dict[str, Callable[[], Awaitable[object]]]:
    """Every call that takes a location, by name."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "put_bytes": lambda: backend.put_bytes(location, b"..."),
        "put_stream": lambda: backend.put_stream(location, _Untouchable()),
        "open": lambda: backend.open(location),
        "stat": lambda: backend.stat(location),
        "exists": lambda: backend.exists(location),
        "delete": lambda: backend.delete(location),
    }
    if isinstance(backend, SupportsCopy):
        copier = backend
        calls |= {"copy from": lambda: copier.copy(location, "target"), "copy to": lambda: copier.copy("safe", location)}
    if isinstance(backend, SupportsBatchDelete):
        deleter = backend
        calls["delete_many"] = lambda: deleter.delete_many(["safe", location])
    if isinstance(backend, SupportsPresign):
        signer = backend
        calls["presign_get"] = lambda: signer.presign_get(location, expires_in=timedelta(minutes=1))
    if isinstance(backend, SupportsPresignedUpload):
        uploader = backend
        calls["presign_upload"] = lambda: uploader.presign_upload(
            location, expires_in=timedelta(minutes=1), content_type="text/plain", min_size=1, max_size=2
        )
    return calls


class _Untouchable:
    """A stream that must not be read."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        raise AssertionError("the stream was read before the location was refused")
