"""Metadata goes out of pictures, the pictures stay as they are, and no input does harm."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import re
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from granite_storage.exceptions import ContentRejectedError
from granite_storage.inspection import stripping
from granite_storage.inspection.stripping import StripMode, Stripper, can_strip
from tests import tiers
from tests.inspection import pictures
from tests.inspection.pictures import ICC, PLACE, Picture, chunk, corpus, segment, tiff, webp_chunk
from tests.services import unavailable

MODES: tuple[StripMode, ...] = ("location", "all")
CORPUS = corpus()
EXAMPLES = tiers.repetitions("GRANITE_STRIPPED", default=150, exhaustive=5000)
MIB = 1 << 20


def strip(content_type: str, data: bytes, mode: StripMode, *, size: int = MIB) -> bytes:
    stripper = Stripper(content_type, mode)
    return b"".join([stripper.feed(data[at : at + size]) for at in range(0, len(data), size)] + [stripper.finish()])


def readable(data: bytes) -> bytes:
    """Return a file and what is packed into it: compressed text, text in hex, text in UTF-16."""
    unpacked = [data]
    for found in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        with contextlib.suppress(zlib.error):
            unpacked.append(zlib.decompressobj().decompress(data[found.start() :], MIB))
    for text in list(unpacked):
        digits = re.findall(rb"[0-9a-f]{20,}", re.sub(rb"\s", b"", text))
        unpacked += [
            bytes.fromhex(each[start : (len(each) - start) // 2 * 2 + start].decode()) for each in digits for start in (0, 1)
        ]
    return b"\n".join(unpacked + [text.replace(b"\0", b"") for text in unpacked])


def strip_all(mode: StripMode, *, endings: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Picture, bytes]]:
    for name, picture in CORPUS.items():
        if name.endswith(endings):
            yield name, picture, strip(picture.content_type, picture.data, mode)


class TestPictures:
    """Each rule on each picture; a failure names the pictures that break it."""

    @pytest.mark.parametrize("mode", MODES)
    def test_pixels_stay(self, mode: StripMode) -> None:
        changed = [name for name, before, after in strip_all(mode) if pictures.decode(after) != pictures.decode(before.data)]
        assert changed == []

    @pytest.mark.parametrize("mode", MODES)
    def test_presentation_stays(self, mode: StripMode) -> None:
        for name, before, after in strip_all(mode):
            assert (name, pictures.properties(after)) == (name, pictures.properties(before.data))
            expected = before.orientation, ICC if before.has_profile else None
            assert (name, pictures.properties(after)[:2]) == (name, expected)

    @pytest.mark.parametrize("mode", MODES)
    def test_nothing_tells_the_place(self, mode: StripMode) -> None:
        found = [(name, secret) for name, _, after in strip_all(mode) for secret in pictures.SECRETS if secret in readable(after)]
        assert found == []

    def test_location_keeps_the_rest(self) -> None:
        lost = [
            (name, kept) for name, before, after in strip_all("location") for kept in before.kept if kept not in readable(after)
        ]
        assert lost == []

    def test_all_keeps_no_exif_of_an_upright_picture(self) -> None:
        """But in WebP, where a flag has said that there is some."""
        upright = [(name, after) for name, before, after in strip_all("all") if before.orientation == 1 and name[:4] != "webp"]
        assert [name for name, after in upright if b"MM\0*" in readable(after) or b"II*\0" in readable(after)] == []

    def test_all_keeps_no_words(self) -> None:
        words = (pictures.CAMERA, pictures.RIGHTS, pictures.REMARK, b"xmpmeta", b"R98", b"VENDOR", b"MPF")
        assert [(name, word) for name, _, after in strip_all("all") for word in words if word in readable(after)] == []

    @pytest.mark.parametrize("mode", MODES)
    def test_stripping_twice_equals_once(self, mode: StripMode) -> None:
        assert [name for name, each, once in strip_all(mode) if strip(each.content_type, once, mode) != once] == []

    @pytest.mark.parametrize("mode", MODES)
    def test_single_bytes(self, mode: StripMode) -> None:
        assert [name for name, each, whole in strip_all(mode) if strip(each.content_type, each.data, mode, size=1) != whole] == []

    def test_the_secrets_are_found_where_they_are(self) -> None:
        """The search itself works: all pictures but a few have something to find."""
        telling = [name for name, each in CORPUS.items() if any(secret in readable(each.data) for secret in pictures.SECRETS)]
        innocent = ("plain", "grey", "CMYK", "lossless", "kept", "alpha")
        assert [name for name in CORPUS if name not in telling and not name.endswith(innocent)] == []

    @pytest.mark.parametrize("mode", MODES)
    def test_what_has_no_metadata_is_passed_on_as_it_is(self, mode: StripMode) -> None:
        unchanged = {name: before.data == after for name, before, after in strip_all(mode, endings=("plain", "grey", "lossless"))}
        assert (set(unchanged.values()), len(unchanged)) == ({True}, 6)

    def test_metadata_without_a_place_stays_byte_for_byte(self) -> None:
        unchanged = {name: before.data == after for name, before, after in strip_all("location", endings=("kept",))}
        assert (set(unchanged.values()), len(unchanged)) == ({True}, 3)

    @pytest.mark.exhaustive("asks exiftool, a program of the system")
    @pytest.mark.parametrize("mode", MODES)
    def test_exiftool_finds_nothing(self, mode: StripMode, tmp_path: Path) -> None:
        exiftool = shutil.which("exiftool") or unavailable("exiftool is not installed")
        place = re.compile(r"GPS|Latitude|Longitude|Location|City|Country|State|MakerNote|Geo")

        def find_tags(folder: Path) -> set[str]:
            command = [exiftool, "-json", "-G1", "-a", "-u", "-ee", str(folder)]
            found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
            assert len(found) == len(CORPUS)
            return {name for tags in found for name in tags}

        for number, picture in enumerate(CORPUS.values()):
            for state, data in ("before", picture.data), ("after", strip(picture.content_type, picture.data, mode)):
                (tmp_path / state).mkdir(exist_ok=True)
                (tmp_path / state / f"{number}.{picture.content_type[6:]}").write_bytes(data)
        before, after = find_tags(tmp_path / "before"), find_tags(tmp_path / "after")
        assert len([name for name in before if place.search(name)]) > 25
        assert [name for name in after if place.search(name) or "Trailer" in name or name.startswith("MP")] == []
        if mode == "all":
            groups = ("IFD0:", "ExifIFD:", "IFD1:", "InteropIFD:", "IPTC", "Photoshop", "XMP")
            assert {name for name in after if name.startswith(groups)} == {"IFD0:Orientation"}


class TestExif:
    """EXIF is rewritten: what its tags refer to stays, and nothing else."""

    @staticmethod
    def cleaned(exif: bytes, mode: StripMode = "location") -> bytes:
        """Return the EXIF of a PNG, which may have any length, after stripping; empty where there is none."""
        data = CORPUS["png grey"].data
        stripped = strip("image/png", data[:33] + chunk(b"eXIf", exif) + data[33:], mode)
        with Image.open(io.BytesIO(stripped)) as image:
            image.load()
            return image.info.get("exif", b"").removeprefix(b"Exif\0\0")

    @pytest.mark.parametrize("order", "<>")
    def test_tags_keep_their_values(self, order: str) -> None:
        before, after = Image.Exif(), Image.Exif()
        before.load(pictures.exif(order))
        after.load(self.cleaned(pictures.exif(order)))
        assert after.endian == order
        assert dict(after) | {0x8825: 0, 0x8769: 0} == dict(before) | {0x8825: 0, 0x8769: 0}
        expected = dict(before.get_ifd(0x8769))
        assert expected.pop(0x927C) == pictures.NOTE
        assert dict(after.get_ifd(0x8769)) | {0xA005: 0} == expected | {0xA005: 0}
        assert dict(after.get_ifd(0xA005)) == {1: "R98"}
        assert (0x8825 in after, dict(after.get_ifd(0x8825))) == (False, {})

    @pytest.mark.parametrize("order", "<>")
    def test_thumbnail(self, order: str) -> None:
        thumbnail = pictures.saved(Image.effect_noise((16, 8), 50), "JPEG")
        cleaned = self.cleaned(pictures.exif(order, thumbnail=pictures.with_segments(thumbnail, segment(0xFE, PLACE))))
        assert cleaned.endswith(thumbnail)
        assert struct.pack(order + "HHII", 0x0201, 4, 1, len(cleaned) - len(thumbnail)) in cleaned
        assert struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail)) in cleaned

    def test_pointers_of_the_type_ifd(self) -> None:
        exif = pictures.exif().replace(struct.pack("<HH", 0x8769, 4), struct.pack("<HH", 0x8769, 13))
        assert self.cleaned(exif) == self.cleaned(pictures.exif())

    def test_pointers_to_what_is_not_known_go(self) -> None:
        kept = [(0x010F, 2, b"KeptCamera\0")]
        exif = tiff("<", [*kept, (0x9998, 4, b"\x08\0\0\0")]).replace(b"\x98\x99\4\0", b"\x98\x99\x0d\0")
        assert self.cleaned(exif) == tiff("<", kept)

    def test_a_damaged_thumbnail_goes(self) -> None:
        assert b"THUMB" not in self.cleaned(pictures.exif(thumbnail=b"\xff\xd8THUMB"))

    def test_gaps_are_left_out(self) -> None:
        assert PLACE not in self.cleaned(pictures.exif() + PLACE)

    @pytest.mark.parametrize("tag", [0x8825, 0x927C, 0xC634, 0x83BB, 0x8649, 0x014A, 0x0111, 0x0117, 0x0144, 0x0145])
    def test_tags_that_go(self, tag: int) -> None:
        entries = [(0x010F, 2, b"KeptCamera\0"), (tag, 7, PLACE)]
        for exif in tiff("<", entries), tiff(">", [(0x8769, 4, entries), (0x9999, 7, b"12345")]):
            assert PLACE in exif
            assert PLACE not in self.cleaned(exif)
            assert b"KeptCamera" in self.cleaned(exif)

    @pytest.mark.parametrize("value", [b"GPS 52.52", b"\0".join([b"G", b"P", b"S", b" ", b"5", b"2"]), b"Latitude=52.52"])
    def test_text_that_mentions_a_position(self, value: bytes) -> None:
        assert value not in self.cleaned(tiff(">", [(0x010E, 7, value), (0x0131, 2, b"Software\0")]))

    HOSTILE: ClassVar = {
        "no tags": tiff("<", []),
        "only GPS": tiff("<", [(0x8825, 4, [(1, 2, b"N\0")])]),
        "header only": b"II*\0\x08\0\0\0",
        "cut header": b"MM\0*\0",
        "IFD in the header": b"MM\0*\0\0\0\0" + bytes(20),
        "IFD far away": b"MM\0*\xff\xff\xff\xff",
        "IFD refers to itself": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8),
        "too many tags": b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 0x010F, 2, 5, 0) * 3,
        "count of 2**32 - 1": tiff("<", [(0x0112, 3, b"\6\0")])[:10] + struct.pack("<HHIII", 0x010F, 12, 0xFFFFFFFF, 8, 0),
        "values over each other": b"II*\0\x08\0\0\0\x10\x27"
        + b"".join(struct.pack("<HHII", tag, 7, 120_000, 8) for tag in range(10_000)),
        "unknown types": tiff("<", [(0x010F, 2, b"KeptCamera\0")]).replace(b"\x0f\x01\2\0", b"\x0f\x01\x55\0"),
        "orientation 0": tiff(">", [(0x0112, 3, b"\0\0")]),
        "orientation 300": tiff(">", [(0x0112, 3, b"\1\x2c")]),
        "orientation of 2**32 - 1": tiff(">", [(0x0112, 4, b"\xff" * 4)]),
        "no TIFF": b"abcdefghijklmnop",
        "empty": b"",
    }

    @pytest.mark.parametrize("mode", MODES)
    def test_hostile(self, mode: StripMode) -> None:
        for name, exif in self.HOSTILE.items():
            cleaned = self.cleaned(exif, mode)
            assert len(cleaned) <= max(26, 2 * len(exif)), name
            assert cleaned[:4] in (b"", b"II*\0", b"MM\0*"), name
            assert self.cleaned(cleaned, mode) == cleaned, name

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("exif", [tiff("<", [(0x8825, 4, [(1, 2, b"N\0")])]), b"II*\0", b"no TIFF"])
    def test_of_which_nothing_stays(self, exif: bytes, mode: StripMode) -> None:
        jpeg = CORPUS["jpeg plain"].data
        assert strip("image/jpeg", pictures.with_segments(jpeg, segment(0xE1, b"Exif\0\0" + exif)), mode) == jpeg

    @pytest.mark.parametrize("size", [40, 1 << 31])
    def test_values_that_end_outside_go(self, size: int) -> None:
        exif = tiff("<", [(0x010E, 2, b"0123456789"), (0x010F, 2, b"KeptCamera\0")])
        assert self.cleaned(exif.replace(struct.pack("<HHI", 0x010E, 2, 10), struct.pack("<HHI", 0x010E, 2, size))) == tiff(
            "<", [(0x010F, 2, b"KeptCamera\0")]
        )

    @pytest.mark.parametrize("orientation", [0, 1, 9, 300])
    def test_orientations_that_change_nothing(self, orientation: int) -> None:
        assert self.cleaned(tiff(">", [(0x0112, 3, struct.pack(">H", orientation))]), "all") == b""

    def test_longer_than_a_segment(self) -> None:
        """Values that share their bytes do not after cleaning: then no more than the orientation stays."""
        details = [(0x9301, 7, b"123456789")]
        exif = bytearray(tiff("<", [(0x0112, 3, b"\6\0"), (0x8769, 4, details), (0x9300, 7, bytes(40_000))]))
        struct.pack_into("<II", exif, exif.index(struct.pack("<HHI", 0x9301, 7, 9)) + 4, 39_000, 100)
        jpeg = CORPUS["jpeg plain"].data
        stripped = strip("image/jpeg", pictures.with_segments(jpeg, segment(0xE1, b"Exif\0\0" + bytes(exif))), "location")
        assert pictures.properties(stripped)[0] == 6
        assert len(stripped) == len(jpeg) + 36


class TestWebP:
    @pytest.mark.parametrize("mode", MODES)
    def test_lengths_and_flags(self, mode: StripMode) -> None:
        for picture, after in [each[1:] for each in strip_all(mode) if each[0].startswith("webp")]:
            chunks = pictures.webp_chunks(after)
            before = pictures.webp_chunks(picture.data.removesuffix(PLACE))
            assert [len(data) for _, data in chunks] == [len(data) for _, data in before]
            assert {data.strip(b"\0") for name, data in chunks if name == b"JUNK"} <= {b""}
            if chunks[0][0] == b"VP8X":
                names = [name for name, _ in chunks]
                assert names.count(b"EXIF") == bool(chunks[0][1][0] & 0x08)
                assert names.count(b"XMP ") == bool(chunks[0][1][0] & 0x04)

    def test_exif_stays_a_structure(self) -> None:
        """Even where EXIF is no EXIF: the flag says that there is one."""
        image = pictures.photo()
        for content in (b"no EXIF, but long enough", bytes(40), pictures.exif("<", 1)):
            data = pictures.saved(image, "WEBP", exif=content.ljust(40))
            for mode in MODES:
                found = dict(pictures.webp_chunks(strip("image/webp", data, mode)))
                assert found[b"EXIF"][:4] in (b"MM\0*", b"II*\0")

    def test_too_short_for_exif(self) -> None:
        data = pictures.saved(pictures.photo(), "WEBP", exif=b"place")
        assert dict(pictures.webp_chunks(strip("image/webp", data, "all")))[b"JUNK"] == bytes(5)

    @pytest.mark.parametrize("mode", MODES)
    def test_frames_that_are_none(self, mode: StripMode) -> None:
        """Too short a frame is no frame, and neither is one inside another, however deep."""
        picture = CORPUS["webp plain"].data[12:]
        nested = b""
        for _ in range(2000):
            nested = webp_chunk(b"ANMF", bytes(16) + nested)
        flat = bytes(16) + webp_chunk(b"JUNK", bytes(len(nested) - 32))
        for frame, expected in (webp_chunk(b"ANMF", PLACE), (b"JUNK", bytes(10))), (nested, (b"ANMF", flat)):
            stripped = strip("image/webp", pictures.riff(frame, picture), mode)
            assert pictures.webp_chunks(stripped)[0] == expected
            assert stripped.endswith(picture)

    def test_frames(self) -> None:
        """Unknown chunks inside a frame go, too."""
        chunks = pictures.webp_chunks(CORPUS["webp animated"].data)
        frames = [(name, data + webp_chunk(b"abcd", PLACE) if name == b"ANMF" else data) for name, data in chunks]
        data = pictures.riff(*[webp_chunk(*each) for each in frames])
        stripped = strip("image/webp", data, "location")
        assert PLACE not in stripped
        assert pictures.decode(stripped) == pictures.decode(CORPUS["webp animated"].data)

    def test_padding_left_out_at_the_end(self) -> None:
        data = pictures.saved(pictures.photo(), "WEBP")
        odd = data + b"abcd\3\0\0\0" + PLACE[:3]
        odd = odd[:4] + struct.pack("<I", len(odd) - 8) + odd[8:]
        assert strip("image/webp", odd, "all") == odd[: len(data)] + b"JUNK\3\0\0\0\0\0\0"


class TestJpeg:
    HEAD = b"\xff\xd8" + segment(0xDB, b"Q") + segment(0xDA, b"S")

    @pytest.mark.parametrize(
        "scan",
        [
            b"",
            b"\xff\0" * 50,
            b"".join(bytes([0xFF, code]) + b"a" for code in range(0xD0, 0xD8)),
            b"abc\xff\xff\xff\0d\xff\xff\xd3",
            b"abc\xff\xff\xff",
            b"\0" * 100 + b"\xff",
            segment(0xC4, b"H") + segment(0xDA, b"S") + b"xyz" + segment(0xDC, b"N") + segment(0xCC, b"A") + segment(0xDA, b"S"),
        ],
    )
    def test_scans_are_copied(self, scan: bytes) -> None:
        data = self.HEAD + scan + b"\xff\xd9"
        for mode, size in itertools.product(MODES, (1, 2, 3, MIB)):
            assert strip("image/jpeg", data + PLACE, mode, size=size) == data

    @pytest.mark.parametrize("mode", MODES)
    def test_fill_bytes_are_copied(self, mode: StripMode) -> None:
        data = b"\xff\xd8\xff\xff\xff" + self.HEAD[2:] + b"a" + segment(0xC4, b"H") + b"\xff\xff\xff\xd9"
        assert strip("image/jpeg", data, mode) == strip("image/jpeg", data, mode, size=1) == data

    def test_a_position_in_a_marker_of_a_scan(self) -> None:
        data = self.HEAD + b"abc" + segment(0xFE, b"GPS " + PLACE) + segment(0xDA, b"S") + b"def\xff\xd9"
        assert strip("image/jpeg", data, "location") == self.HEAD + b"abc" + segment(0xDA, b"S") + b"def\xff\xd9"

    def test_resources_that_are_cut_off(self) -> None:
        """They go on in another segment, where nothing tells what they are: none of them stays."""
        plain = CORPUS["jpeg plain"].data
        cut = [pictures.IPTC_KEPT[:end] for end in range(1, len(pictures.IPTC_KEPT) - 1)]
        for last in *cut, pictures.IPTC_KEPT.replace(b"8BIM", b"MeSa"):
            resources = segment(0xED, pictures.PHOTOSHOP + pictures.RIGHTS_RESOURCE + last)
            assert strip("image/jpeg", pictures.with_segments(plain, resources), "location") == plain

    def test_all_keeps_no_thumbnail_of_jfif(self) -> None:
        thumbnail = b"JFIF\0\1\2\1\0\x48\0\x48\1\1abc"
        data = b"\xff\xd8" + segment(0xE0, thumbnail) + self.HEAD[2:] + b"a\xff\xd9"
        assert strip("image/jpeg", data, "all").startswith(b"\xff\xd8" + segment(0xE0, thumbnail[:12] + b"\0\0"))
        assert strip("image/jpeg", data, "location") == data

    def test_all_keeps_only_the_colours_of_adobe(self) -> None:
        data = b"\xff\xd8" + segment(0xEE, b"Adobe\0\x64\0\0\0\0\2" + PLACE) + self.HEAD[2:] + b"a\xff\xd9"
        assert segment(0xEE, b"Adobe\0\x64\0\0\0\0\2") + segment(0xDB, b"Q") in strip("image/jpeg", data, "all")


class TestDamage:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", ["jpeg progressive", "png EXIF 3", "png animated", "webp animated", "webp alpha"])
    def test_cut_off(self, name: str, mode: StripMode) -> None:
        picture = CORPUS[name]
        for size in [*range(0, len(picture.data), 37), len(picture.data) - 1]:
            with pytest.raises(ContentRejectedError, match=r"^the image is damaged: it is cut off$"):
                strip(picture.content_type, picture.data[:size], mode)

    PNG = CORPUS["png palette"].data

    @pytest.mark.parametrize(
        ("content_type", "data", "message"),
        [
            ("image/jpeg", PNG, "does not begin like a JPEG"),
            ("image/png", CORPUS["jpeg plain"].data, "does not begin like a PNG"),
            ("image/webp", b"RIFF\x20\0\0\0AVI " + bytes(40), "does not begin like a WebP"),
            ("image/jpeg", b"\xff\xd8\xff\xd9", "has no picture"),
            ("image/jpeg", b"\xff\xd8\xff\xd8", "unknown marker 0xd8"),
            ("image/jpeg", b"\xff\xd8\xff\xf7\0\2", "unknown marker 0xf7"),
            ("image/jpeg", b"\xff\xd8\xff\xfe\0\1", "a segment has a wrong length"),
            ("image/jpeg", b"\xff\xd8\xff\xfe\0\3abc", "a segment has a wrong length"),
            ("image/png", PNG[:33] + PNG[-12:], "has no picture"),
            ("image/png", PNG[:8] + PNG[-12:], "a wrong name, place or length"),
            ("image/png", PNG[:33] + PNG[8:], "a wrong name, place or length"),
            ("image/png", PNG[:33] + b"\x80\0\0\0IDAT", "a wrong name, place or length"),
            ("image/png", PNG[:33] + chunk(b"a bc", b""), "a wrong name, place or length"),
            ("image/png", PNG[:33] + chunk(b"pHYs", PLACE), "a wrong name, place or length"),
            ("image/png", PNG[:33] + chunk(b"ABcd", b""), "unknown critical chunk"),
            ("image/webp", pictures.riff(webp_chunk(b"VP8X", bytes(10))), "has no picture"),
            ("image/webp", b"RIFF\x0c\0\0\0WEBPVP8 \x40\0\0\0", "a chunk has a wrong length"),
            ("image/webp", b"RIFF\x07\0\0\0WEBPVP8", "a chunk has a wrong length"),
            ("image/webp", pictures.riff(webp_chunk(b"ANMF", bytes(20))), "a chunk has a wrong length"),
        ],
    )
    def test_wrong_structure(self, content_type: str, data: bytes, message: str) -> None:
        for mode in MODES:
            with pytest.raises(ContentRejectedError, match=f"^the image is damaged: .*{message}"):
                strip(content_type, data, mode)

    def test_after_damage_nothing_is_passed_on(self) -> None:
        stripper = Stripper("image/jpeg", "all")
        with pytest.raises(ContentRejectedError):
            stripper.feed(CORPUS["jpeg plain"].data[:-2] + segment(0xC4, b"") + b"abc")
        for _ in range(2):
            with pytest.raises(ContentRejectedError, match="a segment has a wrong length"):
                stripper.feed(CORPUS["jpeg plain"].data)
            with pytest.raises(ContentRejectedError, match="a segment has a wrong length"):
                stripper.finish()

    @pytest.mark.parametrize("content_type", ["image/gif", "image/jpg", "IMAGE/PNG", "text/html", ""])
    def test_other_types(self, content_type: str) -> None:
        assert not can_strip(content_type)
        with pytest.raises(ValueError, match="only from image/jpeg, image/png, image/webp"):
            Stripper(content_type, "all")

    def test_other_modes(self) -> None:
        assert can_strip("image/png")
        with pytest.raises(ValueError, match="'location' or 'all', not 'none'"):
            Stripper("image/png", "none")  # type: ignore[arg-type]


class TestMemory:
    BOUND = 20 * MIB

    @staticmethod
    def peak(content_type: str, mode: StripMode, pieces: Iterator[bytes]) -> int:
        stripper = Stripper(content_type, mode)
        tracemalloc.start()
        try:
            for piece in pieces:
                stripper.feed(piece)
            stripper.finish()
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return peak

    PNG = CORPUS["png palette"].data
    CHUNK = struct.pack(">I", 12 * MIB)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("content_type", "before", "piece", "after"),
        [
            ("image/jpeg", TestJpeg.HEAD, bytes(MIB), b"\xff\xd9"),
            ("image/jpeg", TestJpeg.HEAD, b"\xff" * MIB, b"\xd9"),
            ("image/jpeg", TestJpeg.HEAD + b"\xff\xd9", bytes(MIB), b""),
            ("image/png", PNG[:33] + CHUNK + b"IDAT", bytes(MIB), bytes(4) + PNG[-12:]),
            ("image/png", PNG[:33] + CHUNK + b"abCd", bytes(MIB), bytes(4) + PNG[33:]),
            (
                "image/webp",
                b"RIFF" + struct.pack("<I", 12 * MIB + 12) + b"WEBPVP8 " + struct.pack("<I", 12 * MIB),
                bytes(MIB),
                b"",
            ),
            (
                "image/webp",
                b"RIFF" + struct.pack("<I", 12 * MIB + 22) + b"WEBPVP8 \2\0\0\0abJUNK" + struct.pack("<I", 12 * MIB),
                bytes(MIB),
                b"",
            ),
        ],
    )
    def test_long(self, content_type: str, before: bytes, piece: bytes, after: bytes, mode: StripMode) -> None:
        pieces = (part for part in (before, *[piece] * 12, after))
        assert self.peak(content_type, mode, pieces) < 6 * MIB

    LONGEST = 4 * MIB

    @pytest.mark.parametrize("mode", MODES)
    def test_longest_metadata(self, mode: StripMode) -> None:
        value = bytes(self.LONGEST - 1000)
        metadata = [
            chunk(b"eXIf", tiff("<", [(0x010F, 2, b"KeptCamera\0"), (0x9C9B, 7, value)])),
            chunk(b"zTXt", b"Comment\0\0" + zlib.compress(value)),
            chunk(
                b"tEXt",
                b"Raw profile type exif\0" + pictures.raw_profile(b"exif", pictures.exif() + value[: int(self.LONGEST / 2.1)]),
            ),
        ]
        for each in metadata:
            assert self.peak("image/png", mode, iter([self.PNG[:33], each, self.PNG[33:]])) < self.BOUND

    @pytest.mark.parametrize(
        ("content_type", "before", "data"),
        [
            ("image/png", PNG[:33], chunk(b"eXIf", bytes(LONGEST + 1))),
            ("image/png", PNG[:33], chunk(b"iTXt", bytes(LONGEST + 1))),
            ("image/png", PNG[:33], chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(20 * MIB)))),
            ("image/png", PNG[:33], chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(MIB))) * 5),
            ("image/webp", b"", pictures.riff(webp_chunk(b"EXIF", bytes(LONGEST + 1)))),
            ("image/webp", b"", pictures.riff(webp_chunk(b"XMP ", bytes(LONGEST + 1)))),
        ],
    )
    def test_too_long_to_be_searched(self, content_type: str, before: bytes, data: bytes) -> None:
        with pytest.raises(ContentRejectedError, match="that can be searched"):
            self.peak(content_type, "location", iter([before + data]))

    def test_texts_that_unpack_to_too_much(self) -> None:
        """Nor is the last of them unpacked further than needed to see it."""
        full = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(self.LONGEST)))
        bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(40 * MIB)))
        stripper = Stripper("image/png", "location")
        stripper.feed(self.PNG[:33] + full)
        tracemalloc.start()
        with pytest.raises(ContentRejectedError, match="that can be searched"):
            stripper.feed(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MIB

    def test_all_needs_not_search_texts(self) -> None:
        data = self.PNG[:33] + chunk(b"iTXt", bytes(self.LONGEST + 1)) + self.PNG[33:]
        assert strip("image/png", data, "all") == strip("image/png", self.PNG, "all")


class TestLongTexts:
    """A text is searched in pieces, so that the event loop never waits for all of it."""

    EDGES = (stripping._WINDOW, stripping._WINDOW + stripping._LONGEST_MENTION, 3 * stripping._WINDOW)

    @pytest.mark.parametrize("mention", [b"x:GPSLatitude", b" geo:-5", b"<Iptc:CountryName>", "x:location".encode("utf-16")])
    def test_a_position_anywhere(self, mention: bytes) -> None:
        for edge, before in itertools.product(self.EDGES, range(len(mention) + 5)):
            text = b"-" * (edge - before) + mention + b"-" * 2000
            assert stripping._tells_location(text), (edge, before)
            assert not stripping._tells_location(text.replace(mention, b"-")), (edge, before)

    @pytest.mark.parametrize("word", [b"<cityscape", b"agps", b"+GPS", b"ageo:7", "ageo:7".encode("utf-16-le"), b":lateral"])
    def test_words_that_only_begin_or_end_like_one(self, word: bytes) -> None:
        for edge, before in itertools.product(self.EDGES, range(len(word) + 5)):
            assert not stripping._tells_location(b"-" * (edge - before) + word + b"-" * 2000), (edge, before)

    def test_no_search_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Regular expressions hold the interpreter: 4 MiB would do so for a second."""
        searched: list[int] = []

        class Noting:
            def search(self, text: bytes, start: int) -> None:
                searched.append(len(text))

        monkeypatch.setattr(stripping, "_LOCATION", Noting())
        text = chunk(b"tEXt", b"Comment\0" + b"x" * (4 * MIB - 100))
        strip("image/png", TestMemory.PNG[:33] + text + TestMemory.PNG[33:], "location")
        assert sum(searched) > 4 * MIB
        assert max(searched) < 64 * 1024

    def test_a_record_of_too_many_resources(self) -> None:
        """Each takes microseconds, and no picture has as many."""
        plain = CORPUS["jpeg plain"].data
        for count, is_kept in (4000, True), (4200, False):
            resources = segment(0xED, pictures.PHOTOSHOP + b"8BIM\4\5\0\0\0\0\0\0" * count)
            data = pictures.with_segments(plain, resources)
            assert strip("image/jpeg", data, "location") == (data if is_kept else plain)


NAMES = st.sampled_from(sorted(CORPUS))


@given(NAMES, st.sampled_from(MODES), st.lists(st.integers(0, 7000), max_size=12))
@settings(max_examples=EXAMPLES)
def test_any_pieces(name: str, mode: StripMode, cuts: list[int]) -> None:
    picture = CORPUS[name]
    stripper = Stripper(picture.content_type, mode)
    ends = [*sorted(cuts), len(picture.data)]
    pieces = [picture.data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert b"".join([stripper.feed(piece) for piece in pieces] + [stripper.finish()]) == strip(
        picture.content_type, picture.data, mode
    )


@given(NAMES, st.sampled_from(MODES), st.randoms(use_true_random=False))
@settings(max_examples=EXAMPLES * 2)
def test_damaged_bytes(name: str, mode: StripMode, choices: random.Random) -> None:
    """Bits flipped, parts left out, doubled or overwritten: it is refused, or gives a picture that is stripped already."""
    picture = CORPUS[name]
    data = bytearray(picture.data)
    for _ in range(choices.randint(1, 8)):
        at = choices.randrange(min(len(data), 3000) if choices.random() < 0.8 else len(data))
        match choices.randrange(5):
            case 0:
                data[at] ^= 1 << choices.randrange(8)
            case 1:
                data[at : at + 4] = choices.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x08", b"\x7f\xff\xff\xff"])
            case 2:
                del data[at : at + choices.randrange(1, 20)]
            case 3:
                data[at:at] = data[at : at + choices.randrange(1, 200)]
            case _:
                data[at] = choices.randrange(256)
    try:
        stripped = strip(picture.content_type, bytes(data), mode, size=choices.choice([1000, MIB]))
    except ContentRejectedError:
        return
    assert strip(picture.content_type, stripped, mode) == stripped


@given(st.binary(max_size=400), st.sampled_from(MODES), st.sampled_from("<>"))
@settings(max_examples=EXAMPLES * 2)
def test_damaged_exif(noise: bytes, mode: StripMode, order: str) -> None:
    """Any bytes for EXIF give a structure that is the same when it is cleaned again."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    cleaned = TestExif.cleaned(head + noise, mode)
    assert TestExif.cleaned(cleaned, mode) == cleaned
