"""What a backend declares to the suite, the hooks that rig it, and what the cases share."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, contextmanager
from typing import Any, ClassVar, NoReturn

import pytest

from granite_storage.backends.base import (
    ObjectInfo,
    StorageBackend,
    SupportsAbort,
    SupportsBatchDelete,
    SupportsBatchPresign,
    SupportsCleanup,
    SupportsClock,
    SupportsCopy,
    SupportsExtraKeys,
    SupportsIdentity,
    SupportsMountCheck,
    SupportsPlaces,
    SupportsPresign,
    SupportsPresignedUpload,
)
from granite_storage.exceptions import ObjectNotFoundError

__all__ = [
    "ABILITIES",
    "CHUNK",
    "Cases",
    "Caught",
    "chunked",
    "digest",
    "held",
    "infos",
    "listed",
    "must_raise",
    "pattern",
    "read_all",
    "same_bytes",
]

CHUNK = 1 << 20
"""The longest chunk that a backend is ever handed, in bytes."""

ABILITIES: dict[type, tuple[str, str]] = {
    SupportsCopy: ("supports_copy", "copy"),
    SupportsBatchDelete: ("supports_batch_delete", "delete_many"),
    SupportsCleanup: ("supports_cleanup", "cleanup_incomplete"),
    SupportsAbort: ("supports_abort", "abort_upload"),
    SupportsPresign: ("supports_presign", "presign_get"),
    SupportsBatchPresign: ("supports_batch_presign", "presign_many"),
    SupportsPresignedUpload: ("supports_presigned_upload", "presign_upload"),
    SupportsClock: ("supports_clock", "now"),
    SupportsExtraKeys: ("supports_extra_keys", "extra_keys"),
    SupportsMountCheck: ("supports_mount_check", "is_mounted"),
    SupportsIdentity: ("supports_identity", "identities"),
    SupportsPlaces: ("supports_places", "places"),
}
"""The declaration of each protocol, and its method."""


class Cases:
    """Declarations, hooks and helpers; see `BackendConformance`."""

    supports_copy: ClassVar[bool] = False
    supports_batch_delete: ClassVar[bool] = False
    supports_cleanup: ClassVar[bool] = False
    supports_abort: ClassVar[bool] = False
    supports_presign: ClassVar[bool] = False
    supports_presigned_upload: ClassVar[bool] = False

    supports_batch_presign: ClassVar[bool | None] = None
    supports_clock: ClassVar[bool | None] = None
    supports_extra_keys: ClassVar[bool | None] = None
    supports_mount_check: ClassVar[bool | None] = None
    supports_identity: ClassVar[bool | None] = None
    supports_places: ClassVar[bool | None] = None

    keeps_content_type: ClassVar[bool] = True
    tells_upload_ids: ClassVar[bool] = True
    keeps_etag: ClassVar[bool] = True
    nests_objects: ClassVar[bool] = True
    settles_races_in_parts: ClassVar[bool] = True
    settles_races_of_copies: ClassVar[bool] = True
    checks_signatures: ClassVar[bool] = True

    has_pages: ClassVar[bool] = True
    can_be_full: ClassVar[bool] = True
    can_refuse: ClassVar[bool] = True
    can_be_unreachable: ClassVar[bool] = True
    can_lose_answers: ClassVar[bool] = True
    is_shared: ClassVar[bool] = True
    counts_unfinished: ClassVar[bool] = True

    parts_size: ClassVar[int] = 256 * 1024
    large_size: ClassVar[int] = 64 * CHUNK
    memory_growth: ClassVar[int] = 24 * CHUNK
    batch_size: ClassVar[int] = 1000
    longest_location: ClassVar[int] = 1024
    unstorable: ClassVar[frozenset[str]] = frozenset()
    clock_skew: ClassVar[float] = 5.0
    patience: ClassVar[float] = 60.0

    def _missing_backend(self) -> NoReturn:
        """Fail every test of a subclass that gives no backend."""
        pytest.fail(f"{type(self).__name__} must override the fixture `backend` with one that yields a fresh, empty backend")

    backend: Any = pytest.fixture(name="backend")(_missing_backend)

    def with_page_size(self, backend: StorageBackend, size: int) -> StorageBackend:
        """Return a backend for the same store that lists `size` objects at a time; the suite closes it."""
        self._missing_hook("with_page_size", "has_pages")

    def with_room_for(self, backend: StorageBackend, size: int) -> AbstractAsyncContextManager[StorageBackend]:
        """Enter to a backend like this one that is empty and has room for `size` bytes, and for less than twice as many."""
        self._missing_hook("with_room_for", "can_be_full")

    def refusing(self, backend: StorageBackend) -> AbstractAsyncContextManager[StorageBackend]:
        """Enter to a backend for the same store to which every permission is refused."""
        self._missing_hook("refusing", "can_refuse")

    def unreachable(self, backend: StorageBackend) -> AbstractAsyncContextManager[StorageBackend]:
        """Enter to a backend like this one whose store is out of reach."""
        self._missing_hook("unreachable", "can_be_unreachable")

    def losing_answers(self, backend: StorageBackend, operation: str) -> AbstractAsyncContextManager[StorageBackend]:
        """Enter to a backend for the same store where the first answer of one operation is lost, after the work was done.

        Args:
            backend: The backend of the test.
            operation: `put_bytes`, `put_stream` (the last answer of a multipart upload) or `delete`.
        """
        self._missing_hook("losing_answers", "can_lose_answers")

    def elsewhere(self, backend: StorageBackend) -> str:
        """Return Python source that makes a `backend` for the same store in another process."""
        self._missing_hook("elsewhere", "is_shared")

    async def count_unfinished(self, backend: StorageBackend) -> int:
        """Return how many temporary files, parts, uploads or the like unfinished writes have left in the store."""
        self._missing_hook("count_unfinished", "counts_unfinished")

    def _missing_hook(self, hook: str, ability: str) -> NoReturn:
        pytest.fail(f"{type(self).__name__} must override `{hook}`, or declare `{ability} = False`")

    def needs(self, ability: str, *, off: bool = False) -> None:
        """Skip a case that is about an ability which is declared off, or, with `off`, on."""
        if bool(getattr(self, ability)) is off:
            pytest.skip(f"{type(self).__name__} declares {ability} = {off}")

    def require_ability(self, backend: StorageBackend, protocol: type, *needs: str) -> Any:
        """Return a backend that must have an ability; skip the case where that, or what else it needs, is declared off."""
        ability, method = ABILITIES[protocol]
        for need in (ability, *needs):
            self.needs(need)
        assert isinstance(backend, protocol), f"{ability} is declared, but there is no {method}()"
        return backend

    def content(self, kind: str) -> bytes:
        """Return content that is `empty`, a `byte`, `small`, or of as many bytes as are written in `parts`."""
        return pattern({"empty": 0, "byte": 1, "small": 1000, "parts": self.parts_size}[kind])

    async def require_absent(self, backend: StorageBackend, location: str, why: str) -> None:
        """Fail unless no call sees an object at the location."""
        assert not await backend.exists(location), f"{why}: exists() says that {location!r} is there"
        with must_raise(ObjectNotFoundError, f"{why}: stat({location!r}) must find nothing"):
            await backend.stat(location)
        with must_raise(ObjectNotFoundError, f"{why}: open({location!r}) must find nothing"):
            await (await backend.open(location)).aclose()
        assert location not in await listed(backend), f"{why}: {location!r} is listed"

    async def require_whole(self, backend: StorageBackend, location: str, content: bytes, why: str) -> None:
        """Fail unless the object is there, listed once, and has exactly this content."""
        info = await backend.stat(location)
        assert info.size == len(content), f"{why}: stat({location!r}) says {info.size} bytes instead of {len(content)}"
        same_bytes(await read_all(backend, location), content, why)
        assert (await listed(backend)).count(location) == 1, f"{why}: {location!r} must be listed once"

    async def require_nothing_unfinished(self, backend: StorageBackend, why: str) -> None:
        """Fail where parts of a write were left in the store, if the subclass can tell."""
        if self.counts_unfinished:
            left = await self.count_unfinished(backend)
            assert left == 0, f"{why}: {left} unfinished thing(s) stayed in the store"

    async def run_elsewhere(self, source: str) -> subprocess.CompletedProcess[bytes]:
        """Run Python source in another process, and return how it ended."""
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            timeout=self.patience,
            check=False,
        )

    def was_cancelled(self, task: asyncio.Task[object], struck: bool, why: str) -> bool:
        """Return whether a task was cancelled, and fail where it should have been or failed otherwise."""
        if task.cancelled():
            return True
        error = task.exception()
        assert error is None, f"{why}: it raised {error!r} instead of the cancellation"
        assert not struck, f"{why}: the cancellation was swallowed"
        return False

    async def reach(self, event: asyncio.Event, writer: asyncio.Future[Any]) -> None:
        """Wait until a write has come to where its stream sets the event, or raise what ended it before."""
        waiter = asyncio.ensure_future(event.wait())
        try:
            await asyncio.wait([waiter, writer], timeout=self.patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if not event.is_set():
            writer.cancel()
            await writer
            raise AssertionError("the write ended before its stream did")

    @contextmanager
    def no_task_left(self) -> Iterator[None]:
        """Fail where the block leaves a task behind."""
        before = asyncio.all_tasks()
        yield
        left = [task for task in asyncio.all_tasks() - before if not task.done()]
        assert not left, f"tasks were left running: {left}"


class Caught:
    """The error that a block raised."""

    error: Any = None


@contextmanager
def must_raise(
    kind: type[BaseException] | tuple[type[BaseException], ...], promise: str, *, location: str | None = None
) -> Iterator[Caught]:
    """Fail, in words, unless the block raises an error of this kind, and of this location where one is given."""
    caught = Caught()
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(each.__name__ for each in kinds)
    try:
        yield caught
    except kinds as error:
        caught.error = error
        named = getattr(error, "location", None)
        assert location in (None, named), f"{promise}: the error says location={named!r}, not {location!r}"
        return
    except Exception as error:
        raise AssertionError(f"{promise}: it raised {error!r}, not {expected}") from error
    raise AssertionError(f"{promise}: it raised no {expected}")


def same_bytes(actual: bytes, expected: bytes, why: str) -> None:
    """Fail where two contents differ, and say where, without printing them."""
    if actual == expected:
        return
    common = min(len(actual), len(expected))
    first = next((index for index in range(common) if actual[index] != expected[index]), common)
    raise AssertionError(f"{why}: got {len(actual)} bytes, expected {len(expected)}, the first difference is at byte {first}")


def pattern(size: int, seed: int = 0) -> bytes:
    """Return bytes that look like noise and are the same each time."""
    return random.Random(f"{size}/{seed}").randbytes(size)  # noqa: S311  # nothing is kept secret


def digest(content: bytes) -> str:
    """Return the SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


async def chunked(content: bytes, sizes: Iterable[int] = (), *, error: BaseException | None = None) -> AsyncIterator[bytes]:
    """Stream content in chunks of these sizes and then in some more, letting other tasks run; raise the error at the end."""
    position = 0
    for size in sizes:
        if content[position : position + size]:
            yield content[position : position + size]
        position += size
    step = min(CHUNK, max(1 << 16, len(content) // 8))
    for start in range(position, len(content), step):
        await asyncio.sleep(0)
        yield content[start : start + step]
    await asyncio.sleep(0)
    if error is not None:
        raise error


async def held(content: bytes, reached: asyncio.Event, go_on: asyncio.Event) -> AsyncIterator[bytes]:
    """Stream content, tell that all of it was sent, and wait before the end."""
    async for chunk in chunked(content):
        yield chunk
    reached.set()
    await go_on.wait()


async def read_all(backend: StorageBackend, location: str, offset: int = 0, length: int | None = None, step: int = -1) -> bytes:
    """Read a range to its end, some bytes at a time, and close the reader."""
    chunks: list[bytes] = []
    async with aclosing(await backend.open(location, offset=offset, length=length)) as reader:
        while chunk := await reader.read(step):
            chunks.append(chunk)
    return b"".join(chunks)


async def infos(backend: StorageBackend, prefix: str = "", start_after: str | None = None) -> list[ObjectInfo]:
    """Return a whole listing."""
    return [info async for info in backend.iter_objects(prefix, start_after=start_after)]


async def listed(backend: StorageBackend, prefix: str = "", start_after: str | None = None) -> list[str]:
    """Return the locations of a whole listing, in its order."""
    return [info.location for info in await infos(backend, prefix, start_after)]
