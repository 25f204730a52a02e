"""Every snippet of the user guide, with its calls awaited and its `with` made `async with`, as it stands there."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from granite_storage import ContentTooLargeError, StorageManager, StoragePolicy, StoredObjectReader, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from tests.servers import S3Server

user = SimpleNamespace(id=42)
lesson = SimpleNamespace(id="b7")
image_bytes = b"\x89PNG\r\n" + bytes(range(256))


@pytest.fixture(params=["moto", "seaweedfs"])
async def backends(
    request: pytest.FixtureRequest, tmp_path: Path, moto_server: S3Server, seaweedfs_server: S3Server
) -> AsyncIterator[dict[str, Any]]:
    server = moto_server if request.param == "moto" else seaweedfs_server
    async with server.bucket() as bucket:
        yield {"local": LocalStorageBackend(root_dir=tmp_path / "uploads"), "s3": server.backend(bucket=bucket)}


@pytest.fixture(params=["as in the guide", "the other way round"])
async def manager(request: pytest.FixtureRequest, backends: dict[str, Any]) -> AsyncIterator[StorageManager]:
    small, large = ("local", "s3") if request.param == "as in the guide" else ("s3", "local")
    manager = StorageManager(
        backends=backends,
        policies={
            "avatars": StoragePolicy(
                storage_key="avatars",
                backend_key=small,
                max_size=2 * 1024 * 1024,
                key_prefix="avatars",
            ),
            "attachments": StoragePolicy(
                storage_key="attachments",
                backend_key=large,
                max_size=20 * 1024 * 1024,
                key_prefix="attach",
            ),
        },
    )
    async with manager:
        yield manager


async def stored_avatar(manager: StorageManager) -> StoredObjectRef:
    return await manager.put_bytes(
        storage_key="avatars",
        model_name="user",
        entity_id=str(user.id),
        field_name="avatar",
        content=image_bytes,
        content_type="image/png",
        original_filename="avatar.png",
    )


async def test_from_bytes(manager: StorageManager) -> None:
    ref = await stored_avatar(manager)
    folder, _, name = ref.location.rpartition("/")
    assert folder == "avatars/user/42/avatar"
    assert name.endswith("-avatar.png")


async def test_from_a_stream(manager: StorageManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = bytes(range(256)) * 4096 * 9
    (tmp_path / "video.mp4").write_bytes(video)
    monkeypatch.chdir(tmp_path)
    with open("video.mp4", "rb") as f:
        ref = await manager.put_stream(
            storage_key="attachments",
            model_name="lesson",
            entity_id=str(lesson.id),
            field_name="video",
            stream=f,
            content_type="video/mp4",
            original_filename="video.mp4",
        )
        assert not f.closed
    assert ref.location.startswith("attach/lesson/b7/video/")
    assert (ref.size, ref.checksum) == (len(video), f"sha256:{hashlib.sha256(video).hexdigest()}")
    async with manager.open(ref) as fh:
        digest = hashlib.sha256()
        async for chunk in fh:
            digest.update(chunk)
    assert digest.hexdigest() == ref.checksum.removeprefix("sha256:")


async def test_the_limit_is_enforced_as_soon_as_it_is_exceeded(manager: StorageManager, backends: dict[str, Any]) -> None:
    stream = io.BytesIO(bytes(64 * 1024 * 1024))
    with pytest.raises(ContentTooLargeError) as caught:
        await manager.put_stream(storage_key="attachments", model_name="lesson", entity_id="1", field_name="video", stream=stream)
    assert caught.value.max_size == 20 * 1024 * 1024
    assert stream.tell() < 24 * 1024 * 1024
    for backend in backends.values():
        assert [info async for info in backend.iter_objects()] == []


async def test_retrieving_content(manager: StorageManager) -> None:
    ref = await stored_avatar(manager)
    sent = []

    async def send_to_client(fh: StoredObjectReader) -> None:
        sent.append(await fh.read())

    # Full bytes (only for small objects)
    data: bytes = await manager.get(ref)

    # File-like object (preferred for large files)
    async with manager.open(ref) as fh:
        await send_to_client(fh)

    assert data == sent[0] == image_bytes


async def test_checking_existence_and_deleting(manager: StorageManager) -> None:
    ref = await stored_avatar(manager)
    if await manager.exists(ref):
        await manager.delete(ref)
    assert not await manager.exists(ref)


async def test_the_ref(manager: StorageManager) -> None:
    ref = await stored_avatar(manager)
    names = [field.name for field in dataclasses.fields(ref)]
    assert [name for name in ref.to_dict() if name != "identity"] == names[
        :9
    ]  # what is beside them stands there only where known
    assert names[:9] == [
        "storage_key",
        "backend",
        "location",
        "size",
        "checksum",
        "content_type",
        "original_filename",
        "created_at",
        "extra",
    ]
    assert ref.storage_key == "avatars"
    assert ref.backend in ("local", "s3")
    assert ref.size == len(image_bytes)
    assert ref.checksum == f"sha256:{hashlib.sha256(image_bytes).hexdigest()}"
    assert (ref.content_type, ref.original_filename) == ("image/png", "avatar.png")
    assert ref.created_at is not None
    assert str(datetime.fromisoformat(ref.created_at).utcoffset()) == "0:00:00"
    assert ref.extra is None or isinstance(ref.extra, dict)
    assert StoredObjectRef.from_dict(json.loads(json.dumps(ref.to_dict()))) == ref


async def test_without_a_prefix_the_location_starts_with_the_model(tmp_path: Path) -> None:
    policy = StoragePolicy(storage_key="avatars", backend_key="local")
    async with StorageManager(
        backends={"local": LocalStorageBackend(root_dir=tmp_path)}, policies={"avatars": policy}
    ) as manager:
        ref = await stored_avatar(manager)
    assert ref.location.startswith("user/42/avatar/")
