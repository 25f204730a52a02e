"""Metadata is taken out on the way in, and the receipt is that of what is stored."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest
from PIL import Image

from granite_storage import ChecksumMismatchError, StorageManager
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ContentRejectedError, SizeMismatchError, UnsupportedContentError
from granite_storage.inspection import ImageLimits
from tests.core.support import SLOT, chunks_of, manager_on
from tests.inspection.corpus import samples

PLACE = 0x8825


def photograph(name: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    exif.get_ifd(PLACE).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 36.0)})
    out = io.BytesIO()
    Image.effect_noise((80, 60), 60).convert("RGB").save(out, name, exif=exif)
    return out.getvalue()


def tags(content: bytes) -> tuple[int, dict[int, Any]]:
    image = Image.open(io.BytesIO(content))
    return image.getexif().get(0x0112, 1), dict(image.getexif().get_ifd(PLACE))


async def put(manager: StorageManager, content: bytes, how: str, **declared: Any) -> Any:
    if how == "bytes":
        return await manager.put_bytes(**SLOT, content=content)
    pieces = [content[start : start + 1000] for start in range(0, len(content), 1000)]
    return await manager.put_stream(**SLOT, stream=chunks_of(*pieces), **declared)


@pytest.mark.parametrize("how", ["bytes", "stream"])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
async def test_the_place_goes(name: str, how: str) -> None:
    content = photograph(name)
    assert tags(content)[1]
    manager = manager_on(MemoryStorageBackend(), strip="location", inspect=[ImageLimits()])
    ref = await put(manager, content, how)
    stored = await manager.get(ref)
    assert tags(stored) == (6, {})
    assert (ref.size, ref.checksum) == (len(stored), f"sha256:{hashlib.sha256(stored).hexdigest()}")
    assert Image.open(io.BytesIO(stored)).tobytes() == Image.open(io.BytesIO(content)).tobytes()
    assert ref.media is not None
    assert (ref.media["width"], ref.media["height"]) == (80, 60)


async def test_what_is_declared_is_of_what_comes_in() -> None:
    content, other = photograph(), photograph("PNG")
    manager = manager_on(MemoryStorageBackend(), strip="all")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    ref = await put(manager, content, "stream", size=len(content), checksum=digest)
    assert ref.checksum != digest
    with pytest.raises(ChecksumMismatchError):
        await put(manager, other, "stream", checksum=digest)
    with pytest.raises(SizeMismatchError):
        await put(manager, content, "stream", size=len(content) + 1)
    assert len([info async for info in manager.list(storage_key="files")]) == 1


@pytest.mark.parametrize("how", ["bytes", "stream"])
async def test_a_damaged_picture_is_refused(how: str) -> None:
    manager = manager_on(MemoryStorageBackend(), strip="location")
    with pytest.raises(ContentRejectedError, match="damaged"):
        await put(manager, photograph()[:-500], how)
    assert [info async for info in manager.list(storage_key="files")] == []


@pytest.mark.parametrize("how", ["bytes", "stream"])
async def test_what_cannot_be_stripped(how: str) -> None:
    strict = manager_on(MemoryStorageBackend(), strip="location")
    lenient = manager_on(MemoryStorageBackend(), strip="location", on_unstrippable="keep")
    for sample in samples():
        kind = (sample.found or "").partition("/")[0]
        if sample.found in ("image/jpeg", "image/png", "image/webp"):
            continue
        assert (await lenient.get(await put(lenient, sample.content, how))) == sample.content
        if kind in ("image", "video", "audio"):
            with pytest.raises(UnsupportedContentError, match="metadata cannot be removed"):
                await put(strict, sample.content, how)
        else:
            assert (await strict.get(await put(strict, sample.content, how))) == sample.content
