"""Backends that each break one promise, through the suite: a file for an inner run of pytest, not collected by ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from granite_storage.backends.base import ObjectInfo, ObjectReader, StorageBackend, upload_begun
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import AccessDeniedError, BackendError, ObjectNotFoundError
from granite_storage.testing import BackendConformance, FaultInjectingBackend


class Suite(BackendConformance):
    supports_copy = supports_batch_delete = True
    has_pages = can_be_full = can_be_unreachable = can_lose_answers = is_shared = counts_unfinished = False
    large_size = 2 << 20
    refusal: Callable[[], Exception] = AccessDeniedError

    @pytest.fixture
    async def backend(self) -> StorageBackend:
        return self.make()

    def make(self) -> StorageBackend:
        return MemoryStorageBackend()

    @asynccontextmanager
    async def refusing(self, backend: StorageBackend) -> AsyncIterator[StorageBackend]:
        faults: Any = FaultInjectingBackend(backend)
        for operation in ("put_bytes", "put_stream", "open", "stat", "exists", "delete", "iter_objects", "delete_many"):
            faults.fail(operation, times=1000, error=self.refusal())
        yield faults


class TestSound(Suite):
    pass


class Overwriting(MemoryStorageBackend):
    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> None:
        await self.delete(location)
        await super().put_bytes(location, content, content_type=content_type)


class TestOverwrites(Suite):
    def make(self) -> StorageBackend:
        return Overwriting()


class ReopeningReader:
    max_attempts = 5

    def __init__(self, backend: StorageBackend, inner: ObjectReader) -> None:
        self.info = inner.info
        self._backend = backend
        self._inner = inner

    async def read(self, size: int = -1, /) -> bytes:
        return await self._inner.read(size)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def reopen(self, offset: int, length: int, /) -> ObjectReader:
        again = ReopeningReader(self._backend, await self._backend.open(self.info.location, offset=offset, length=length))
        again.info = self.info
        return again


class ReopeningAnything(MemoryStorageBackend):
    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        reader = await super().open(location, offset=offset, length=length)
        return reader if length is not None else ReopeningReader(self, reader)


class TestReopensAnything(Suite):
    def make(self) -> StorageBackend:
        return ReopeningAnything()


class ShortReader:
    def __init__(self, inner: ObjectReader) -> None:
        self.info = inner.info
        self._inner = inner
        self._left = 500

    async def read(self, size: int = -1, /) -> bytes:
        content = (await self._inner.read(size))[: self._left]
        self._left -= len(content)
        return content

    async def aclose(self) -> None:
        await self._inner.aclose()


class EndingShort(MemoryStorageBackend):
    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> Any:
        return ShortReader(await super().open(location, offset=offset, length=length))


class TestEndsShort(Suite):
    def make(self) -> StorageBackend:
        return EndingShort()


class PublishingEarly(MemoryStorageBackend):
    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        chunks = b""
        await super().put_bytes(location, b"", content_type=content_type)
        async for chunk in stream:
            chunks += chunk
            await self.delete(location)
            await super().put_bytes(location, chunks, content_type=content_type)


class TestPublishesEarly(Suite):
    def make(self) -> StorageBackend:
        return PublishingEarly()


class BlindToFolders(MemoryStorageBackend):
    def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        return super().iter_objects(prefix.rstrip("/"), start_after=start_after)


class TestBlindToFolders(Suite):
    def make(self) -> StorageBackend:
        return BlindToFolders()


class SwallowingCancellation(MemoryStorageBackend):
    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        with suppress(asyncio.CancelledError):
            await super().put_stream(location, stream, content_type=content_type)


class TestSwallowsCancellation(Suite):
    def make(self) -> StorageBackend:
        return SwallowingCancellation()


class TestHidesRefusal(Suite):
    refusal = ObjectNotFoundError


class IgnoringOptions(MemoryStorageBackend):
    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None, **_: Any) -> None:
        await super().put_bytes(location, content, content_type=content_type)


class TestIgnoresOptions(Suite):
    def make(self) -> StorageBackend:
        return IgnoringOptions()


class TestKeepsAnAbilityQuiet(Suite):
    supports_copy = False


class TestPretendsAnAbility(Suite):
    supports_presign = True


class WrappingErrors(MemoryStorageBackend):
    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        try:
            await super().put_stream(location, stream, content_type=content_type)
        except OSError as error:
            raise BackendError("the upload failed", location=location) from error


class TestWrapsSourceErrors(Suite):
    def make(self) -> StorageBackend:
        return WrappingErrors()


class WithoutZone(MemoryStorageBackend):
    async def stat(self, location: str) -> ObjectInfo:
        info = await super().stat(location)
        return replace(info, modified=info.modified.replace(tzinfo=None))


class TestForgetsTheZone(Suite):
    def make(self) -> StorageBackend:
        return WithoutZone()


class LeavingTasks(MemoryStorageBackend):
    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        write = asyncio.ensure_future(super().put_stream(location, stream, content_type=content_type))
        await asyncio.shield(write)


class TestLeavesTasks(Suite):
    def make(self) -> StorageBackend:
        return LeavingTasks()


class BoundToOneLoop(MemoryStorageBackend):
    def __init__(self) -> None:
        super().__init__()
        self.loop: asyncio.AbstractEventLoop | None = None

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> None:
        self.loop = self.loop or asyncio.get_running_loop()
        if asyncio.get_running_loop() is not self.loop:
            raise RuntimeError("attached to a different loop")
        await super().put_bytes(location, content, content_type=content_type)


class TestBoundToOneLoop(Suite):
    def make(self) -> StorageBackend:
        return BoundToOneLoop()


class KeepingIdsQuiet(MemoryStorageBackend):
    async def abort_upload(self, location: str, upload_id: str | None) -> None:
        pass


class TestKeepsIdsQuiet(Suite):
    supports_abort = True

    def make(self) -> StorageBackend:
        return KeepingIdsQuiet()


class AbortingNothing(KeepingIdsQuiet):
    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        if (tell := upload_begun.get()) is not None:
            await tell("an id")
        await super().put_stream(location, stream, content_type=content_type)


class TestAbortsNothing(Suite):
    supports_abort = True

    def make(self) -> StorageBackend:
        return AbortingNothing()


class Trusting(MemoryStorageBackend):
    async def delete_many(self, locations: Any) -> Mapping[str, BackendError]:
        for location in locations:
            with suppress(Exception):
                await self.delete(location)
        return {}


class TestTrustsLocations(Suite):
    def make(self) -> StorageBackend:
        return Trusting()


class TestWithoutHooks(BackendConformance):
    supports_copy = supports_batch_delete = True
    large_size = 2 << 20

    @pytest.fixture
    async def backend(self) -> StorageBackend:
        return MemoryStorageBackend()


class TestWithoutBackend(BackendConformance):
    pass
