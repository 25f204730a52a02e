"""Calls of the public API, for mypy and pyright only: nothing here is run."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from typing import Any, BinaryIO, assert_type

import aiofiles
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import StreamingResponse

import granite_storage
from granite_storage import (
    ChecksumMismatchError,
    ContentTooLargeError,
    ObjectInfo,
    ObjectNotFoundError,
    SizeLimitedStream,
    StorageBackend,
    StorageManager,
    StoragePolicy,
    StoredObjectReader,
    StoredObjectRef,
)
from granite_storage.backends.base import (
    SupportsBatchDelete,
    SupportsCleanup,
    SupportsCopy,
    SupportsPresign,
    SupportsPresignedUpload,
    UploadRequest,
)
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.streams import ByteSource

assert_type(granite_storage.__version__, str)

local: StorageBackend = LocalStorageBackend(root_dir="uploads", fsync=False, file_mode=0o600, dir_mode=0o700)
memory: StorageBackend = MemoryStorageBackend(max_total_size=1024)
prefixed: StorageBackend = PrefixedBackend(memory, "tenant")
copier: SupportsCopy = LocalStorageBackend("uploads")
cleaner: SupportsCleanup = LocalStorageBackend("uploads")

manager = StorageManager(
    backends={"local": local, "memory": memory},
    policies={
        "avatars": StoragePolicy(storage_key="avatars", backend_key="local", max_size=2, key_prefix="avatars"),
        "notes": StoragePolicy("notes", "memory"),
    },
    drain_timeout=5,
)


async def chunks() -> AsyncIterator[bytes]:
    yield b""


def views() -> Iterator[memoryview]:
    yield memoryview(b"")


async def put(binary: BinaryIO, upload: UploadFile, request: Request) -> None:
    ref = await manager.put_bytes(
        storage_key="avatars",
        model_name="user",
        entity_id="42",
        field_name="avatar",
        content=b"",
        content_type="image/png",
        original_filename="avatar.png",
        extra={"width": 640, "tags": ["a"]},
    )
    assert_type(ref, StoredObjectRef)
    for content in (b"", bytearray(), memoryview(b"")):
        await manager.put_bytes(storage_key="notes", model_name="note", entity_id="1", field_name="text", content=content)
    async with aiofiles.open("video.mp4", "rb") as file:
        await put_stream(file)
    with open("video.mp4", "rb") as blocking:
        await put_stream(blocking)
    await put_stream(binary)
    await put_stream(io.BytesIO())
    await put_stream(upload)
    await put_stream(request.stream())
    await put_stream(chunks())
    await put_stream(views())
    await put_stream([b"a", bytearray(b"b")])
    await put_stream(SizeLimitedStream(chunks(), max_size=3))


async def put_stream(stream: ByteSource) -> None:
    ref = await manager.put_stream(
        storage_key="notes",
        model_name="note",
        entity_id="1",
        field_name="text",
        stream=stream,
        content_type=None,
        original_filename=None,
        size=3,
        checksum="sha256:...",
    )
    assert_type(ref, StoredObjectRef)


async def read(ref: StoredObjectRef) -> StreamingResponse:
    assert_type(await manager.get(ref), bytes)
    assert_type(await manager.exists(ref), bool)
    assert_type(await manager.stat(ref), ObjectInfo)
    assert_type(await manager.copy(ref, model_name="user", entity_id="43", field_name="avatar"), StoredObjectRef)
    async with manager.open(ref, offset=1, length=2) as reader:
        assert_type(reader, StoredObjectReader)
        assert_type(await reader.read(10), bytes)
        assert_type(await reader.seek(-1, 2), int)
        assert_type(reader.tell(), int)
        assert_type(reader.info, ObjectInfo)
        async for chunk in reader:
            assert_type(chunk, bytes)
    body = await manager.open(ref, verify=True)
    assert_type(body, StoredObjectReader)
    await body.aclose()
    await manager.delete(ref)
    return StreamingResponse(body)


async def life() -> None:
    async with manager as entered:
        assert_type(entered, StorageManager)
    await manager.aclose()


def keep(ref: StoredObjectRef) -> StoredObjectRef:
    data = ref.to_dict()
    assert_type(data, dict[str, Any])
    assert_type(ref.size, int)
    assert_type(ref.extra, dict[str, Any] | None)
    row: Mapping[str, Any] = data
    return StoredObjectRef.from_dict(row)


async def abilities(backend: StorageBackend) -> None:
    if isinstance(backend, SupportsBatchDelete):
        await backend.delete_many(["a", "b"])
    if isinstance(backend, SupportsPresign):
        assert_type(await backend.presign_get("a", expires_in=timedelta(minutes=5)), str)
    if isinstance(backend, SupportsPresignedUpload):
        request = await backend.presign_upload(
            "a", expires_in=timedelta(minutes=5), content_type="text/plain", min_size=1, max_size=2
        )
        assert_type(request, UploadRequest)
    async for info in backend.iter_objects("avatars/", start_after="avatars/a"):
        assert_type(info, ObjectInfo)


async def errors(ref: StoredObjectRef) -> None:
    try:
        await manager.get(ref)
    except ContentTooLargeError as error:
        assert_type(error.max_size, int | None)
    except ChecksumMismatchError as error:
        assert_type(error.expected, str | None)
    except ObjectNotFoundError as error:
        assert_type(error.location, str | None)
