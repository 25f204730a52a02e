"""Headers that are read without Pillow: they are never believed where Pillow would refuse them, and Pillow warns of none."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ContentRejectedError
from granite_storage.inspection import ImageLimits, Inspection, UploadPreview
from granite_storage.inspection import gate as gate_module
from granite_storage.inspection._image_headers import QUICK
from granite_storage.inspection.media_types import detect
from tests.core.support import SLOT, manager_on
from tests.inspection.corpus import samples
from tests.inspection.support import png

LIMITS = ImageLimits(max_pixels=None, max_side=None)


def drawn(name: str, size: tuple[int, int] = (37, 21), mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(out, name, **options)
    return out.getvalue()


def turned(name: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0110] = "A camera of a long name"
    exif[0x011A] = 72.0
    return drawn(name, exif=exif)


def moving(name: str) -> bytes:
    return drawn(name, save_all=True, append_images=[Image.new("RGB", (37, 21), colour) for colour in ("red", "blue")])


PICTURES = {
    **{sample.name: sample.content for sample in samples() if (sample.found or "") in QUICK},
    "grey.jpg": drawn("JPEG", mode="L"),
    "print.jpg": drawn("JPEG", mode="CMYK"),
    "tables.jpg": drawn("JPEG", quality=100, progressive=True, dpi=(72, 72), icc_profile=bytes(300), comment=b"words"),
    "turned.jpg": turned("JPEG", 6),
    "turned.png": turned("PNG", 8),
    "palette.png": drawn("PNG", mode="P", transparency=3, dpi=(72, 72)),
    "moving.png": moving("PNG"),
    "moving.gif": moving("GIF"),
    "comment.gif": drawn("GIF", mode="P", comment=b"c" * 600),
}


def inspect(content: bytes, content_type: str | None = None) -> Any:
    """Return what the whole way of an upload finds; None where it is refused."""
    found = content_type or detect(content[:65536]).content_type
    inspection = LIMITS.begin(UploadPreview("files", content[:65536], content_type=found))
    assert inspection is not None
    try:
        inspection.feed(content)
        return inspection.finish()
    except ContentRejectedError:
        return None


def ask_pillow(content: bytes) -> Any:
    """Return what Pillow finds, as the library did before it read any header itself; None where it refuses it."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # a size is not refused for being one
        try:
            image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "GIF", "WEBP"])
            found = {"width": image.size[0], "height": image.size[1]}
            if image.format == "PNG" and image.n_frames > 1:  # type: ignore[attr-defined]
                found["frames"] = image.n_frames  # type: ignore[attr-defined]
            exif = image.info.get("exif")
            tags = Image.Exif()
            if image.format != "WEBP" and isinstance(exif, bytes):
                with contextlib.suppress(SyntaxError, struct.error):  # it is no EXIF
                    tags.load(exif)
            if isinstance(turn := tags.get(0x0112), int) and 1 < turn <= 8:
                found["orientation"] = turn
        except Exception:  # noqa: BLE001  # any of them is a refusal
            return None
        return found


@pytest.mark.parametrize("name", PICTURES)
def test_what_pillow_finds(name: str) -> None:
    content = PICTURES[name]
    read = QUICK[detect(content).content_type or ""]
    expected = ask_pillow(content)
    assert expected is not None
    assert read(content) == expected
    assert inspect(content) == expected


@given(st.sampled_from([*PICTURES]), st.randoms(use_true_random=False), st.integers(1, 4), st.booleans())
def test_what_pillow_refuses_is_not_believed(name: str, chance: random.Random, changes: int, cut: bool) -> None:
    content = bytearray(PICTURES[name])
    for _ in range(changes):
        content[chance.randrange(8, min(len(content), 700))] = chance.choice([0, 1, 4, 255, chance.randrange(256)])
    kind = detect(PICTURES[name]).content_type or ""
    if kind == "image/png":
        repair(content)
    damaged = bytes(content[: chance.randrange(len(content))] if cut else content)
    found, expected = QUICK[kind](damaged), ask_pillow(damaged)
    if found is None or min(found["width"], found["height"]) == 0:
        return
    if expected is None and kind in ("image/png", "image/webp"):
        return  # their sizes are read where Pillow fails later: at a text, or as it begins to decode
    assert expected is not None, damaged
    assert (found["width"], found["height"]) == (expected["width"], expected["height"])


def repair(content: bytearray) -> None:
    """Make the first checksum of a PNG right: without it nothing else would be looked at."""
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))


@pytest.mark.parametrize("place", [16, 20, 24, 25, 28, 29])
def test_a_png_of_a_damaged_first_chunk(place: int) -> None:
    content = bytearray(png())
    content[place] ^= 0x55
    assert inspect(bytes(content), "image/png") is None


def segment(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", 0xFF00 | kind, len(body) + 2) + body


@pytest.mark.parametrize(
    "more",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0"),
        segment(0xEE, b"Adobe"),
        segment(0xDB, bytes(64)),
        segment(0xC8, b""),
        b"\xff\xff" + segment(0xFE, b""),
        b"x",
        segment(0xC0, b"\x08" + struct.pack(">HHB", 1, 1, 1) + b"\1\x11\0"),
        segment(0xC3, bytes(9)),
        b"\xff\xfe\0\1",
    ],
)
def test_an_unusual_jpeg_is_left_to_pillow(more: bytes) -> None:
    content = PICTURES["grey.jpg"]
    content = content[:2] + more + content[2:]
    assert QUICK["image/jpeg"](content) is None
    assert inspect(content, "image/jpeg") == ask_pillow(content)


async def test_no_thread_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_on(MemoryStorageBackend(), accept=("image/*", "video/mp4"), inspect=[ImageLimits()])

    async def run(function: Callable[..., object], *_: object) -> object:
        raise AssertionError(f"{function} runs in a thread")

    monkeypatch.setattr(gate_module._threads, "run", run)
    for content in PICTURES.values():
        ref = await manager.put_bytes(content=content, **SLOT)
        assert ref.media is not None
        assert (ref.media["type"], ref.media["width"]) == (ref.content_type, inspect(content)["width"])
    with pytest.raises(ContentRejectedError, match="65500 x 65500"):
        await manager.put_bytes(content=png(65_500, 65_500), **SLOT)


async def test_a_subclass_that_looks_at_more() -> None:
    class Square(ImageLimits):
        def begin(self, upload: UploadPreview, /) -> Inspection | None:
            raise ContentRejectedError("it is not square")

    manager = manager_on(MemoryStorageBackend(), inspect=[Square()])
    with pytest.raises(ContentRejectedError, match="not square"):
        await manager.put_bytes(content=png(), **SLOT)


# What Pillow would warn of


def tiff(width: tuple[int, int, int] = (3, 1, 7), *more: tuple[int, int, int, int]) -> bytes:
    tags = [(256, *width), (257, 3, 1, 5), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 35), *more]
    packed = b"".join(
        struct.pack("<HHI", tag, kind, count) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for tag, kind, count, value in tags
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + packed + bytes(4) + bytes(40)


def odd_exif() -> bytes:
    """A directory that says of a value that it lies outside."""
    tags = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 5, 1, 60_000)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)


def with_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    made = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return png()[:33] + made + png()[33:]


def large_frame(side: int) -> bytes:
    content = bytearray(PICTURES["picture.gif"])
    at = content.index(b",\0\0\0\0") + 5
    content[at : at + 4] = struct.pack("<HH", side, side)
    return bytes(content)


def icon(content: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


JPEG = PICTURES["grey.jpg"]
ODD = {
    "exif.jpg": (JPEG[:2] + segment(0xE1, odd_exif()) + JPEG[2:], {"width": 37, "height": 21, "orientation": 6}),
    "unusual.jpg": (JPEG[:2] + segment(0xE1, odd_exif()) + b"x" + JPEG[2:], {"width": 37, "height": 21, "orientation": 6}),
    "several.jpg": (JPEG[:2] + segment(0xE2, b"MPF\0nonsense") + b"x" + JPEG[2:], {"width": 37, "height": 21}),
    "exif.png": (with_chunks((b"eXIf", odd_exif()[6:])), {"width": 3, "height": 2, "orientation": 6}),
    "twice.png": (with_chunks((b"acTL", bytes(8)), (b"acTL", bytes(8))), {"width": 3, "height": 2}),
    "frame.gif": (large_frame(12_000), {"width": 12_000, "height": 12_000}),
    "cut.tif": (tiff()[:60], None),
    "outside.tif": (tiff((3, 1, 7), (270, 2, 100, 60_000)), None),
    "two.tif": (tiff((3, 1, 7), (274, 3, 2, 6)), None),
    "widths.tif": (tiff((3, 2, 7)), None),
    "samples.tif": (tiff((3, 1, 7), (277, 3, 1, 9)), None),
    "turned.tif": (tiff((3, 1, 7), (274, 3, 1, 6)), {"width": 7, "height": 5, "orientation": 6}),
    "large.ico": (icon(png(12_000, 12_000)), {"width": 12_000, "height": 12_000}),
    "cut.ico": (icon(png())[:40], None),
}


@pytest.mark.parametrize("name", ODD)
def test_pillow_warns_of_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    content, expected = ODD[name]
    kinds = {"jpg": "image/jpeg", "tif": "image/tiff", "ico": "image/vnd.microsoft.icon"}
    kind = name.partition(".")[2]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert inspect(content, kinds.get(kind, f"image/{kind}")) == expected
    assert [str(one.message) for one in caught] == []
    assert [one.message for one in caplog.records if one.levelno > logging.INFO] == []


@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "ICO", "BMP", "JPEG2000"]), st.randoms(use_true_random=False))
def test_pillow_warns_of_no_fuzz(name: str, chance: random.Random) -> None:
    content = bytearray(FUZZED[name])
    kind = detect(content).content_type
    for _ in range(chance.randrange(1, 12)):
        content[chance.randrange(min(len(content), 300))] = chance.randrange(256)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inspect(bytes(content[: chance.randrange(1, len(content))]), kind)
    assert [str(one.message) for one in caught] == []


FUZZED = {
    **{name: drawn(name) for name in ("GIF", "BMP", "TIFF", "JPEG2000")},
    "ICO": drawn("ICO", (64, 64), sizes=[(16, 16), (32, 32)]),
    "JPEG": turned("JPEG", 6),
    "PNG": turned("PNG", 6),
}


def test_an_icon_is_not_decoded() -> None:
    """Pillow decodes an icon where others only read its header: this one would take 100 MB."""
    out = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(out, "PNG")
    inspect(icon(png()), "image/vnd.microsoft.icon")
    tracemalloc.start()
    found = inspect(icon(out.getvalue()), "image/vnd.microsoft.icon")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert found == {"width": 10_000, "height": 10_000}
    with pytest.raises(ContentRejectedError, match="10000 x 10000"):
        ImageLimits().require(**found)


def test_the_largest_picture_of_an_icon_has_any_place() -> None:
    """Pillow opens the last of these, which its directory says is the largest."""
    large = png(60_000, 60_000)

    def many(count: int) -> bytes:
        pictures = [struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, 0, 6 + 16 * count)] * (count - 1)
        last = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, len(large), 6 + 16 * count + len(png()))
        return struct.pack("<HHH", 0, 1, count) + b"".join([*pictures, last]) + png() + large

    assert inspect(many(1000), "image/vnd.microsoft.icon") == {"width": 60_000, "height": 60_000}
    assert inspect(many(1001), "image/vnd.microsoft.icon") is None


def box(name: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), name) + b"".join(parts)


def avif(*sizes: int, others: int = 0, more: bytes = b"") -> bytes:
    """An AVIF without pixels: what says how large its pictures are, and boxes of nothing before the last of these."""
    extents = [box(b"ispe", bytes(4), struct.pack(">II", size, size)) for size in sizes]
    properties = box(b"ipco", *extents[:-1], box(b"free") * others, extents[-1])
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", bytes(4), box(b"iprp", properties)) + more


def test_the_largest_picture_of_an_avif_has_any_place() -> None:
    large = {"width": 60_000, "height": 60_000}
    assert inspect(avif(3, 60_000, others=4000), "image/avif") == large
    assert inspect(avif(3, 60_000, others=4100), "image/avif") is None
    content = avif(3, 60_000)
    place = content.index(b"meta") - 4
    content = content[:place] + bytes(4) + content[place + 4 :]  # it goes on to the end of the file
    assert inspect(content[: content.rindex(b"ispe") - 4], "image/avif") is None


@pytest.mark.parametrize("version", [0, 1])
def test_the_track_of_a_moving_avif(version: int) -> None:
    """Decoders go by it, and scale what is smaller."""
    content = moving("AVIF")
    assert inspect(content) == {"width": 37, "height": 21}
    header = bytes([version]) + bytes(87 if version else 75) + struct.pack(">II", 60_000 << 16, 50_000 << 16)
    track = box(b"moov", box(b"trak", box(b"tkhd", header)))
    assert inspect(avif(3, more=track), "image/avif") == {"width": 60_000, "height": 50_000}
    start = content.index(b"moov") - 4
    assert inspect(content[:start], "image/avif") is None
    assert inspect(content[: start + 200], "image/avif") is None
    side = content.index(b"tkhd") + len(b"tkhd") + 88
    assert content[side : side + 8] == struct.pack(">II", 37 << 16, 21 << 16)
    content = content[:side] + struct.pack(">II", 16_000 << 16, 15_000 << 16) + content[side + 8 :]
    assert inspect(content) == {"width": 16_000, "height": 15_000}
    with contextlib.suppress(Image.DecompressionBombError), warnings.catch_warnings(action="ignore"):
        assert Image.open(io.BytesIO(content)).size == (16_000, 15_000)


def boxes(content: bytes, start: int = 0) -> Iterator[tuple[bytes, int]]:
    while start + 8 <= len(content):
        size, name = struct.unpack_from(">I4s", content, start)
        yield name, start
        start += size or len(content)


def test_the_box_of_a_jpeg_2000_that_lies() -> None:
    """Decoders go by the codestream."""
    content = bytearray(drawn("JPEG2000"))
    kind = "image/jp2"
    assert inspect(bytes(content)) == {"width": 37, "height": 21}
    stream = content.index(b"\xff\x4f\xff\x51")
    content[stream + 8 : stream + 16] = struct.pack(">II", 60_000, 60_000)
    assert inspect(bytes(content), kind) is None
    start = dict(boxes(bytes(content)))[b"jp2c"]
    assert inspect(bytes(content[:start]), kind) is None
    assert inspect(bytes(content[:start]) + b"\0\0\0\0jp2cnonsense" * 9, kind) is None
