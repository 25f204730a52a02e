"""The size of images is read from their headers, whatever the format, and however little of it has come."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from granite_storage.exceptions import ConfigurationError, ContentRejectedError
from granite_storage.inspection import ImageLimits, UploadPreview
from granite_storage.inspection.media_types import detect
from granite_storage.inspection.stripping import Stripper
from tests.inspection.support import png
from tests.processor_time import fastest

SIZE = (37, 21)
PNG_GARBAGE = b"\x89PNG\r\n\x1a\n" + b"garbage" * 9
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "ICO": {"sizes": [(32, 16)]},
    "AVIF": {},
    "JPEG2000": {},
}


def drawn(name: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image = Image.effect_noise(SIZE, 50).convert("RGB")
    image.save(out, name.split()[0], **FORMATS[name], **more)
    return out.getvalue()


def look(content: bytes, *, limits: ImageLimits | None = None, piece: int = 1 << 20, content_type: str | None = None) -> Any:
    """Return what is found of an image that comes in pieces; None where the inspector is not concerned."""
    found = content_type or detect(content[:65536]).content_type
    inspection = (limits or ImageLimits()).begin(UploadPreview("files", content[:65536], content_type=found))
    if inspection is None:
        return None
    for start in range(0, len(content), piece):
        if not inspection.feed(content[start : start + piece]):
            break
    return inspection.finish()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("piece", [1 << 20, 100, 1])
def test_each_format(name: str, piece: int) -> None:
    width, height = Image.open(io.BytesIO(drawn(name))).size
    found = look(drawn(name), piece=piece)
    assert (found["width"], found["height"]) == (width, height)


@pytest.mark.parametrize("name", FORMATS)
def test_the_limits(name: str) -> None:
    content = drawn(name)
    for limits in (ImageLimits(max_side=25), ImageLimits(max_pixels=400), ImageLimits(min_side=100)):
        with pytest.raises(ContentRejectedError, match=r"the image has \d+ x \d+ pixels"):
            look(content, limits=limits)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("JPEG", "PNG"):
        assert look(drawn(name, exif=exif)).get("orientation", 1) == orientation


def test_frames_of_a_moving_png() -> None:
    out = io.BytesIO()
    Image.new("L", SIZE).save(out, "PNG", save_all=True, append_images=[Image.new("L", SIZE, 255)] * 4)
    assert look(out.getvalue())["frames"] == 5


def test_a_bomb_is_refused_in_little_memory() -> None:
    bomb = png(65_500, 65_500)
    look(png())
    tracemalloc.start()
    with pytest.raises(ContentRejectedError, match="65500 x 65500"):
        look(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_a_header_behind_much_else() -> None:
    """A photograph may have some 100 KiB of metadata before its size."""
    content = drawn("JPEG")
    segments = b"".join(struct.pack(">HH", 0xFFE1, 65_000 + 2) + bytes(65_000) for _ in range(6))
    assert look(content[:2] + segments + content[2:])["width"] == SIZE[0]
    with pytest.raises(ContentRejectedError, match="cannot be read"):
        look(content[:2] + segments * 4 + content[2:])


@pytest.mark.parametrize(
    "content",
    [PNG_GARBAGE, b"GIF89a\1\0", b"\xff\xd8\xff\xe0\0\x10JFIF\0\1", b"RIFF\0\0\0\0WEBPVP8 "],
    ids=["png", "gif", "jpeg", "webp"],
)
def test_what_is_only_a_beginning(content: bytes) -> None:
    with pytest.raises(ContentRejectedError, match="cannot be read"):
        look(content)


@pytest.mark.parametrize("content", [b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_what_is_no_picture_of_pixels(content: bytes) -> None:
    assert look(content) is None


@given(st.sampled_from([*FORMATS]), st.randoms(use_true_random=False), st.integers(1, 30))
def test_fuzzed_headers(name: str, chance: random.Random, changes: int) -> None:
    """Whatever a header says, it is read or refused: nothing else is raised, and nothing is decoded."""
    content = bytearray(DRAWN[name])
    for _ in range(changes):
        content[chance.randrange(min(len(content), 400))] = chance.randrange(256)
    kind = detect(DRAWN[name]).content_type
    try:
        found = look(bytes(content[: chance.randrange(len(content))]), content_type=kind)
    except ContentRejectedError:
        return
    assert found["width"] * found["height"] <= 50_000_000


DRAWN = {name: drawn(name) for name in FORMATS}


def test_hostile_metadata_of_a_png() -> None:
    """A compressed text of a gigabyte is not unpacked."""
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(1 << 24))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    content = png()
    found = look(content[:33] + chunk * 10 + content[33:])
    assert found["width"] == 3


@pytest.mark.parametrize(
    "limits",
    [{"max_pixels": 0}, {"max_side": "x"}, {"min_side": 0}, {"min_side": 9, "max_side": 8}, {"max_pixels": True}],
    ids=str,
)
def test_limits_that_are_none(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ImageLimits(**limits)


def segments(count: int) -> bytes:
    """A JPEG of empty comments."""
    content = drawn("JPEG")
    return content[:2] + b"\xff\xfe\x00\x02" * count + content[2:]


def chunks(count: int) -> bytes:
    """A PNG of empty texts."""
    content = png()
    chunk = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    return content[:33] + chunk * count + content[33:]


@pytest.mark.parametrize("content", [segments(1_250_000), chunks(400_000)], ids=["jpeg", "png"])
def test_a_million_parts_take_no_time(content: bytes) -> None:
    """Each would take microseconds, in Pillow and where metadata is taken out."""
    kind = detect(content[:65536]).content_type
    assert kind is not None

    def read() -> None:
        try:
            assert look(content)["width"] == 3
        except ContentRejectedError:
            assert kind == "image/jpeg"
        with pytest.raises(ContentRejectedError, match="too many parts"):
            Stripper(kind, "location").feed(content)

    assert fastest(read) < 1


def test_as_many_parts_as_pictures_have() -> None:
    for kind, content in (("image/jpeg", segments(900)), ("image/png", chunks(900))):
        assert look(content)["width"] in (3, SIZE[0])
        stripper = Stripper(kind, "location")
        assert stripper.feed(content) + stripper.finish()
