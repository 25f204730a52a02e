"""Image variants: each line of the table in `ImageVariant`, hostile files, and what a result never contains."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageCms

from granite_storage.derived import Derivation, ImageVariant
from granite_storage.derived._rendering import plan
from granite_storage.derived.images import _CODE
from granite_storage.exceptions import (
    ConfigurationError,
    DerivationFailedError,
    DerivationRefusedError,
    MissingDependencyError,
)
from tests.derived.support import derive, source_of
from tests.inspection import corpus, pictures
from tests.inspection.pictures import chunk, saved
from tests.services import unavailable

MIB = 1 << 20
HAS_VIPS = importlib.util.find_spec("pyvips") is not None
engines = pytest.mark.parametrize("engine", ["pillow", "vips"])


@pytest.fixture(autouse=True)
def _engine_is_installed(request: pytest.FixtureRequest) -> None:
    case = getattr(request.node, "callspec", None)
    needs_vips = request.cls is TestVips or (case is not None and case.params.get("engine") == "vips")
    if needs_vips and not HAS_VIPS:
        unavailable('pyvips is missing: pip install "granite-storage[vips]"')


def opened(made: Derivation) -> Image.Image:
    assert isinstance(made.content, bytes)
    image = Image.open(io.BytesIO(made.content))
    image.load()
    assert made.media is not None
    assert (made.media["width"], made.media["height"]) == image.size
    assert made.media["type"] == made.content_type == Image.MIME[image.format or ""]
    return image


async def variant(content: bytes, **options: Any) -> Image.Image:
    box = {} if "fill" in options else {"fit": (20, 20)}
    return opened(await derive(ImageVariant(**{"format": "png"} | box | options), content))


def corners() -> Image.Image:
    """Red, green, blue and white in the corners, so that each turn looks different."""
    image = Image.new("RGB", (40, 24))
    for place, colour in {(0, 0): "red", (20, 0): "lime", (0, 12): "blue", (20, 12): "white"}.items():
        image.paste(colour, (*place, place[0] + 20, place[1] + 12))
    return image


def is_close(image: Image.Image, colours: list[tuple[int, ...]], within: int = 24) -> bool:
    """Tell whether the corners have these colours, from left to right and from top to bottom."""
    right, bottom = image.width - 2, image.height - 2
    found = [image.convert("RGB").getpixel(place) for place in ((1, 1), (right, 1), (1, bottom), (right, bottom))]
    return all(
        abs(a - b) <= within
        for one, other in zip(found, colours, strict=True)
        for a, b in zip(one, other, strict=True)  # type: ignore[arg-type]
    )


RED, LIME, BLUE, WHITE = (254, 0, 0), (0, 255, 0), (0, 0, 254), (255, 255, 255)
UPRIGHT = [RED, LIME, BLUE, WHITE]


class TestSizes:
    @given(
        st.tuples(st.integers(1, 30_000), st.integers(1, 30_000)),
        st.tuples(st.integers(1, 16383), st.integers(1, 16383)),
        st.booleans(),
    )
    def test_a_plan(self, size: tuple[int, int], box: tuple[int, int], crop: bool) -> None:
        """Within the box and the original, of the same proportions or those of the box, and as large as that allows."""
        new, region = plan(size, box, crop)
        for side in (0, 1):
            assert 1 <= new[side] <= min(size[side], box[side])
            assert 0 <= region[side] < region[side + 2] <= size[side] + 1e-6
        shown = (region[2] - region[0], region[3] - region[1])
        if not crop:
            assert region == (0, 0, *size)
            assert new == size or any(new[side] == box[side] for side in (0, 1))
        else:
            assert shown[0] == pytest.approx(size[0]) or shown[1] == pytest.approx(size[1])
            assert shown[0] / shown[1] == pytest.approx(box[0] / box[1])
        scale = min(1.0, *(box[side] / shown[side] for side in (0, 1)))
        assert all(abs(new[side] - max(1, shown[side] * scale)) <= 0.51 for side in (0, 1))

    @engines
    @pytest.mark.parametrize(
        ("size", "options", "expected"),
        [
            ((400, 200), {"fit": (100, 100)}, (100, 50)),
            ((200, 400), {"fit": (100, 100)}, (50, 100)),
            ((400, 200), {"fill": (100, 100)}, (100, 100)),
            ((200, 401), {"fill": (80, 30)}, (80, 30)),
            ((60, 40), {"fit": (100, 100)}, (60, 40)),
            ((60, 40), {"fill": (100, 100)}, (40, 40)),
            ((60, 200), {"fill": (100, 50)}, (60, 30)),
            ((3000, 1), {"fit": (100, 100)}, (100, 1)),
            ((1, 3000), {"fit": (100, 100)}, (1, 100)),
            ((3000, 1), {"fill": (100, 100)}, (1, 1)),
            ((1, 1), {"fit": (1, 1)}, (1, 1)),
        ],
    )
    async def test_each(self, engine: str, size: tuple[int, int], options: Any, expected: tuple[int, int]) -> None:
        for kind in ("JPEG", "PNG"):
            image = await variant(saved(Image.new("RGB", size, "teal"), kind, quality=95), engine=engine, **options)
            assert image.size == expected

    @engines
    async def test_the_middle_is_shown(self, engine: str) -> None:
        image = Image.new("RGB", (300, 100), "black")
        image.paste("white", (100, 0, 200, 100))
        for kind in ("JPEG", "PNG"):
            made = await variant(saved(image, kind, quality=95), engine=engine, fill=(40, 40))
            assert is_close(made, [WHITE] * 4, 8)

    async def test_a_large_jpeg_is_as_sharp_as_any(self) -> None:
        """It is decoded at a part of its size."""
        image = Image.effect_noise((1600, 1200), 80).convert("RGB").resize((3200, 2400))
        made = await variant(saved(image, "JPEG", quality=95), fit=(200, 200))
        whole = image.resize((200, 150), Image.Resampling.LANCZOS)
        difference = ImageChops.difference(made.convert("RGB"), whole).convert("L").histogram()
        assert sum(level * count for level, count in enumerate(difference)) / (200 * 150) < 6


class TestTurns:
    @engines
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
    async def test_each_format(self, engine: str, kind: str, orientation: int) -> None:
        """What is stored turned is shown upright: the stored image is turned the other way first."""
        back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
        image = corners()
        image = image.transpose(Image.Transpose(back[orientation])) if orientation > 1 else image
        tags = Image.Exif()
        tags[0x0112] = orientation
        content = saved(image, kind, quality=95, exif=tags.tobytes(), **({} if kind != "TIFF" else {"tiffinfo": tags}))
        made = await variant(content, fit=(20, 20), engine=engine)
        assert made.size == (20, 12)
        assert is_close(made, UPRIGHT, 40)


class TestColours:
    @engines
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
    async def test_a_profile_is_converted(self, engine: str, kind: str) -> None:
        """Of a profile whose primaries are exchanged, red is green."""
        made = await variant(saved(Image.new("RGB", (40, 40), "red"), kind, quality=100, icc_profile=swapped()), engine=engine)
        red, green, _ = made.convert("RGB").getpixel((10, 10))  # type: ignore[misc]
        assert green > 200 > 100 > red
        assert "icc_profile" not in made.info

    @engines
    @pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
    async def test_a_wrong_profile_is_ignored(self, engine: str, profile: bytes) -> None:
        made = await variant(saved(corners(), "JPEG", quality=95, icc_profile=profile), engine=engine)
        assert is_close(made, UPRIGHT, 40 if engine == "pillow" else 100)

    @engines
    async def test_cmyk(self, engine: str) -> None:
        made = await variant(saved(corners().convert("CMYK"), "JPEG", quality=95), engine=engine)
        assert made.mode == "RGB"
        assert is_close(made, UPRIGHT, 140)  # libvips has a profile of real inks

    async def test_cmyk_by_the_simple_formula(self) -> None:
        assert is_close(await variant(saved(corners().convert("CMYK"), "JPEG", quality=95)), UPRIGHT, 40)

    @engines
    async def test_16_bits(self, engine: str) -> None:
        grey = Image.frombytes("I;16", (40, 40), struct.pack("<H", 0x8000) * 1600)
        for kind in ("PNG", "TIFF"):
            made = await variant(saved(grey, kind), engine=engine)
            assert is_close(made, [(128, 128, 128)] * 4, 1)
        made = await variant(deep_png(), engine=engine)
        assert is_close(made, [(0x80, 0x40, 0xC0)] * 4, 1)

    @engines
    @pytest.mark.parametrize("mode", ["I", "F"])
    async def test_32_bits_are_refused(self, engine: str, mode: str) -> None:
        with pytest.raises(DerivationRefusedError, match="32-bit numbers, not colours"):
            await variant(saved(Image.new(mode, (40, 40), 7), "TIFF"), engine=engine)

    @engines
    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA"])
    async def test_few_colours(self, engine: str, mode: str) -> None:
        image = Image.new("L", (40, 40), 255)
        image.paste(0, (0, 0, 40, 20))
        made = await variant(saved(image.convert(mode), "PNG"), engine=engine)
        assert is_close(made, [(0, 0, 0), (0, 0, 0), WHITE, WHITE], 8)


class TestTransparency:
    def drawn(self, mode: str = "RGBA") -> Image.Image:
        image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
        image.paste((0, 0, 255, 255), (20, 0, 40, 40))
        return image.convert(mode)

    @engines
    @pytest.mark.parametrize("output", ["webp", "png", "avif"])
    async def test_it_stays(self, engine: str, output: str) -> None:
        for content in (saved(self.drawn(), "PNG"), saved(self.drawn("P"), "PNG"), saved(self.drawn(), "WEBP", lossless=True)):
            made = await variant(content, format=output, engine=engine)
            assert made.mode == "RGBA"
            assert [made.getpixel(place)[3] for place in ((2, 2), (17, 17))] == [0, 255]  # type: ignore[index]

    @engines
    @pytest.mark.parametrize(
        ("options", "ground"),
        [
            ({"format": "jpeg"}, WHITE),
            ({"format": "jpeg", "background": "#00ff00"}, LIME),
            ({"format": "webp", "background": "#00FF00"}, LIME),
            ({"format": "png", "background": "#00ff00"}, LIME),
        ],
    )
    async def test_it_is_put_on_a_background(self, engine: str, options: Any, ground: tuple[int, ...]) -> None:
        made = await variant(saved(self.drawn(), "PNG"), engine=engine, **options)
        assert made.mode == "RGB"
        assert is_close(made, [ground, BLUE, ground, BLUE], 40)

    async def test_one_colour_is_transparent(self) -> None:
        made = await variant(saved(Image.new("RGB", (40, 40), (9, 9, 9)), "PNG", transparency=(9, 9, 9)))
        assert made.getpixel((5, 5))[3] == 0  # type: ignore[index]


class TestAnimations:
    def film(self, kind: str, frames: int = 3) -> bytes:
        images = [Image.new("RGB", (40, 24), colour) for colour in ("red", "lime", "blue", "white")[:frames]]
        return saved(images[0], kind, save_all=True, append_images=images[1:], duration=[70, 80, 90, 100][:frames], loop=0)

    @engines
    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
    async def test_the_first_frame(self, engine: str, kind: str) -> None:
        if (engine, kind) == ("vips", "AVIF"):
            with pytest.raises(DerivationRefusedError):
                await variant(self.film(kind), engine=engine)
            return
        made = await variant(self.film(kind), format="webp", engine=engine)
        assert getattr(made, "n_frames", 1) == 1
        assert is_close(made, [RED] * 4, 40)

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
    async def test_all_frames(self, kind: str) -> None:
        made = await derive(ImageVariant(fill=(10, 10), animated=True, placeholder=True), self.film(kind))
        image = opened(made)
        assert image.n_frames == made.media["frames"] == 3  # type: ignore[attr-defined, index]
        for number, colour, duration in ((0, RED, 70), (1, LIME, 80), (2, BLUE, 90)):
            image.seek(number)
            image.load()
            assert is_close(image, [colour] * 4, 40)
            assert abs(image.info["duration"] - duration) <= 10
        assert image.info["loop"] == 0

    async def test_too_many_pixels_for_all_of_them(self) -> None:
        made = await derive(ImageVariant(fit=(10, 10), animated=True, max_pixels=40 * 24 * 2), self.film("GIF"))
        assert "frames" not in (made.media or {})

    async def test_a_still_image(self) -> None:
        made = await derive(ImageVariant(fit=(10, 10), animated=True), saved(corners(), "PNG"))
        assert "frames" not in (made.media or {})


class TestMetadata:
    @engines
    @pytest.mark.parametrize("output", ["webp", "jpeg", "png", "avif"])
    async def test_none_is_left(self, engine: str, output: str) -> None:
        """Neither of the whole corpus of pictures with places, cameras, comments and profiles."""
        chosen = list(pictures.corpus().items())[:: 1 if output == "webp" else 7]
        recipe = ImageVariant(fit=(20, 20), format=output, engine=engine)  # type: ignore[arg-type]
        made = await asyncio.gather(*(derive(recipe, picture.data) for _, picture in chosen))
        for (name, picture), one in zip(chosen, made, strict=True):
            image = opened(one)
            if engine == "pillow" or not name.startswith(("png EXIF late", "png raw EXIF")):
                assert image.size == ((20, 12) if picture.orientation < 5 else (12, 20)), name
            assert isinstance(one.content, bytes)
            words = [*pictures.SECRETS, pictures.CAMERA, pictures.RIGHTS, pictures.REMARK, b"Exif", b"ICC_PROFILE", b"xmp"]
            assert [word for word in words if word in one.content] == [], name
            assert not {"exif", "icc_profile", "xmp", "comment"} & set(image.info), name


class TestPlaceholders:
    @engines
    @pytest.mark.parametrize("size", [(400, 300), (1, 900), (3, 3), (900, 500)])
    async def test_it_is_tiny(self, engine: str, size: tuple[int, int]) -> None:
        noise = Image.effect_noise(size, 120).convert("RGB")
        noise.putalpha(Image.effect_noise(size, 120))
        for content in (saved(noise, "PNG"), saved(noise.convert("RGB"), "JPEG")):
            made = await derive(ImageVariant(fit=(300, 300), placeholder=True, engine=engine), content)  # type: ignore[arg-type]
            url = (made.media or {})["placeholder"]
            assert len(url) <= 400
            tiny = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,"))))
            assert max(tiny.size) <= 32

    async def test_none_unless_it_is_asked_for(self) -> None:
        assert "placeholder" not in ((await derive(ImageVariant(fit=(9, 9)), saved(corners(), "PNG"))).media or {})


def swapped() -> bytes:
    """Return the sRGB profile with red and green exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def deep_png() -> bytes:
    row = b"\0" + struct.pack(">HHH", 0x8000, 0x4000, 0xC000) * 40
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    return png_of(header, zlib.compress(row * 40))


def png_of(header: bytes, pixels: bytes, *before: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(before) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def bomb_png(side: int = 30_000) -> bytes:
    """Many pixels in few bytes: all of them black."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    return png_of(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), rows)


def huge(kind: str) -> bytes:
    """A small image whose header says that it is huge."""
    content = bytearray(saved(Image.new("RGB", (16, 16), "teal"), kind))
    match kind:
        case "PNG":
            return png_of(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), zlib.compress(bytes(1000)))
        case "JPEG":
            struct.pack_into(">HH", content, content.index(b"\xff\xc0") + 5, 65_000, 65_000)
        case "GIF":
            struct.pack_into("<HH", content, 6, 65_000, 65_000)
        case "BMP":
            struct.pack_into("<ii", content, 18, 60_000, 60_000)
        case "WEBP":
            struct.pack_into("<HH", content, content.index(b"\x9d\x01\x2a") + 3, 16_383, 16_383)
        case "TIFF":
            for tag in (256, 257):
                at = content.index(
                    struct.pack("<HH", tag, 4) if struct.pack("<HH", tag, 4) in content else struct.pack("<HH", tag, 3)
                )
                struct.pack_into("<HII", content, at + 2, 4, 1, 60_000)
        case "AVIF":
            struct.pack_into(">II", content, content.index(b"ispe") + 8, 60_000, 60_000)
    return bytes(content)


def long_film() -> bytes:
    frame = Image.new("L", (2000, 2000))
    return saved(frame, "GIF", save_all=True, append_images=[Image.new("L", (2000, 2000), value) for value in range(1, 9)])


HOSTILE: dict[str, Callable[[], bytes]] = {
    "PNG of 900 million pixels": bomb_png,
    **{
        f"{kind} that says it is huge": lambda kind=kind: huge(kind)
        for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
    },  # type: ignore[misc]
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "EPS": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n",
    "EPS behind the first bytes of a JPEG": lambda: b"\xff\xd8\xff\xe0%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "EPS of DOS": lambda: b"\xc5\xd0\xd3\xc6" + bytes(60),
    "PDF": lambda: corpus.pdf(),
    "PPM": lambda: b"P6 2 2 255\n" + bytes(12),
    "ICO": lambda: saved(Image.new("RGB", (16, 16)), "ICO"),
    "PSD": lambda: b"8BPS\0\1" + bytes(100),
    "vips' own": lambda: b"\xb6\xa6\xf2\x08" + bytes(100),
    "nothing": lambda: b"",
    "first bytes alone": lambda: b"\x89PNG\r\n\x1a\n",
    "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "AVIF without content": lambda: b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100),
    "random bytes of a PNG": lambda: b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(5000),
    "random bytes of a TIFF": lambda: b"II*\0" + random.Random(2).randbytes(5000),
}


class TestHostileFiles:
    @engines
    @pytest.mark.parametrize("name", HOSTILE)
    async def test_it_is_refused(self, engine: str, name: str) -> None:
        if engine == "vips" and name.startswith("GIF"):  # it goes by the size of the frame
            assert (await variant(HOSTILE[name](), engine=engine)).size == (16, 16)
            return
        with pytest.raises(DerivationRefusedError):
            await variant(HOSTILE[name](), engine=engine)

    @engines
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF"])
    async def test_one_pixel_too_many(self, engine: str, kind: str) -> None:
        content = saved(Image.new("RGB", (100, 80), "teal"), kind)
        assert (await variant(content, engine=engine, max_pixels=8000)).size == (20, 16)
        with pytest.raises(DerivationRefusedError, match="more than 7999 pixels"):
            await variant(content, engine=engine, max_pixels=7999)

    async def test_texts_and_profiles_that_are_bombs(self) -> None:
        header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
        zeros = zlib.compress(bytes(200 * MIB), 9)
        for before in ([chunk(b"iCCP", b"icc\0\0" + zeros)], [chunk(b"zTXt", b"Comment\0\0" + zeros)] * 50):
            content = png_of(header, zlib.compress(bytes(20)), *before)
            try:
                assert (await variant(content, max_memory=512 * MIB)).size == (4, 4)
            except DerivationRefusedError as error:
                assert "damaged" in str(error)  # noqa: PT017  # either is fine

    @engines
    async def test_memory(self, engine: str) -> None:
        """What needs more than it may have fails, since more may be allowed; the processes serve the next ones."""
        content = saved(Image.new("L", (6000, 4000), 99), "PNG", compress_level=1)
        with pytest.raises(DerivationFailedError, match="ran out of memory" if engine == "pillow" else "memory|SIG"):
            await variant(content, engine=engine, max_memory=24 * MIB, fit=(6000, 4000))
        assert (await variant(saved(corners(), "PNG"), engine=engine)).size == (20, 12)

    @engines
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF"])
    async def test_cut_off(self, engine: str, kind: str) -> None:
        content = saved(Image.effect_noise((60, 40), 90).convert("RGB"), kind)
        recipe = ImageVariant(fit=(20, 20), engine=engine)  # type: ignore[arg-type]
        places = [len(content) * tenth // 10 for tenth in range(1, 10)]
        results = await asyncio.gather(*(derive(recipe, content[:place]) for place in places), return_exceptions=True)
        assert [type(result) for result in results] == [DerivationRefusedError] * 9

    @engines
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"])
    async def test_damaged_anywhere(self, engine: str, kind: str) -> None:
        """It is shown or refused, and no process dies."""
        if (engine, kind) == ("vips", "BMP"):
            return
        chance = random.Random(kind)
        content = saved(Image.effect_noise((60, 40), 90).convert("RGB"), kind)

        def damage() -> bytes:
            damaged = bytearray(content)
            for _ in range(chance.choice([1, 2, 8])):
                damaged[chance.randrange(8, len(damaged))] = chance.randrange(256)
            return bytes(damaged)

        recipe = ImageVariant(fit=(20, 20), engine=engine, max_pixels=1_000_000)  # type: ignore[arg-type]
        results = await asyncio.gather(*(derive(recipe, damage()) for _ in range(25)), return_exceptions=True)
        assert {type(result) for result in results} <= {Derivation, DerivationRefusedError}

    @engines
    async def test_polyglots_are_what_they_begin_as(self, engine: str) -> None:
        recipe = ImageVariant(fit=(20, 20), engine=engine)  # type: ignore[arg-type]
        for one in corpus.hostile():
            try:
                made = await derive(recipe, one.content)
            except DerivationRefusedError:
                continue
            assert isinstance(made.content, bytes)
            assert not any(word in made.content for word in (b"<script", b"<?php", b"PK\3\4", b"%PDF"))

    async def test_a_decoder_that_was_taken_over_says_nothing_of_the_receipt(self) -> None:
        recipe = ImageVariant(fit=(9, 9), placeholder=True)
        recipe._function = "tests.derived.functions:take_over"
        assert await derive(recipe, b"") == Derivation(b"<script>", "image/webp", {"type": "image/webp"})


class TestVips:
    async def test_a_bitmap_is_refused(self) -> None:
        with pytest.raises(DerivationRefusedError, match="AVIF or TIFF"):
            await variant(saved(corners(), "BMP"), engine="vips")

    async def test_no_loader_is_open_but_one(self) -> None:
        recipe = ImageVariant(fit=(9, 9), engine="vips")
        recipe._function = "tests.derived.functions:list_loaders"
        assert await derive(recipe, saved(corners(), "PNG")) == Derivation(
            b"VipsForeignLoadPngFile", "image/webp", {"type": "image/webp"}
        )


class TestDeclaration:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "either fit"),
            ({"fit": (9, 9), "fill": (9, 9)}, "either fit"),
            ({"fit": (0, 9)}, "1 to 16383"),
            ({"fit": (9, 20_000)}, "1 to 16383"),
            ({"fit": 9}, "1 to 16383"),
            ({"fit": (9.5, 9)}, "1 to 16383"),
            ({"fit": (9, 9), "format": "gif"}, "format must be one of 'webp', 'jpeg', 'png', 'avif', not 'gif'"),
            ({"fit": (9, 9), "quality": 0}, "quality"),
            ({"fit": (9, 9), "quality": 80, "format": "png"}, "None for PNG"),
            ({"fit": (9, 9), "background": "red"}, "#ffffff"),
            ({"fit": (9, 9), "animated": True, "format": "png"}, "animated needs"),
            ({"fit": (9, 9), "animated": True, "engine": "vips"}, "animated needs"),
            ({"fit": (9, 9), "when": "never"}, "when must be"),
            ({"fit": (9, 9), "missing": "error"}, "missing must be"),
            ({"fit": (9, 9), "engine": "magick"}, "engine must be"),
            ({"fit": (9, 9), "max_pixels": 0}, "max_pixels"),
            ({"fit": (9, 9), "timeout": 0}, "timeout"),
            ({"fit": (9, 9), "max_memory": "1 GiB"}, "max_memory"),
        ],
    )
    def test_what_cannot_work_is_refused(self, options: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            ImageVariant(**options)

    def test_a_missing_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"granite-storage\[images\]"):
            ImageVariant(fit=(9, 9))
        with pytest.raises(MissingDependencyError, match=r"granite-storage\[vips\]"):
            ImageVariant(fit=(9, 9), engine="vips")

    def test_the_digest_is_the_same_everywhere(self) -> None:
        assert _CODE == 1
        assert ImageVariant(fit=(200, 200)).digest("thumb") == "sha256:b7fed333f2cfbed1ffc44c27d28272cc"

    def test_the_digest_knows_all_that_decides_the_content(self) -> None:
        same = [{}, {"when": "later"}, {"missing": "original"}, {"timeout": 5}, {"max_memory": 9 * MIB}, {"max_pixels": 9}]
        different = [
            {},
            {"fit": (9, 10)},
            {"fit": None, "fill": (9, 9)},
            {"format": "jpeg"},
            {"quality": 80},
            {"background": "#ffffff"},
            {"animated": True},
            {"placeholder": True},
            *([{"engine": "vips"}] if HAS_VIPS else []),
        ]
        assert len({ImageVariant(**{"fit": (9, 9)} | options).digest("a") for options in same}) == 1  # type: ignore[arg-type]
        digests = {ImageVariant(**{"fit": (9, 9)} | options).digest(name) for options in different for name in ("a", "b")}  # type: ignore[arg-type]
        assert len(digests) == 2 * len(different)
        assert all(len(digest) <= 40 for digest in digests)

    @pytest.mark.parametrize(("name", "expected"), [("my photo.HEIC.jpg", "my photo.HEIC.webp"), (None, None), ("x", "x.webp")])
    async def test_the_name_follows_the_original(self, name: str | None, expected: str | None) -> None:
        made = await derive(ImageVariant(fit=(9, 9)), source_of(saved(corners(), "PNG"), filename=name))
        assert made.filename == expected
