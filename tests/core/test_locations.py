"""How locations are made and checked: hostile names of files, hostile parts, hostile locations from a database."""

from __future__ import annotations

import os
import re
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_storage import ObjectNotFoundError, StorageManager, StoredObjectRef, locations
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import InvalidLocationError
from granite_storage.locations import (
    MAX_LOCATION_BYTES,
    check_location,
    check_segment,
    clean_filename,
    make_location,
    matches_generated_name,
    safe_name,
    uuid7_hex,
)
from tests.core.support import PLACE, SLOT, files_below, in_new_process, left_below, local_manager, texts

GENERATED = re.compile(r"doc/1/file/[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}-[^/]+")
ANYTHING = st.text(st.characters(exclude_categories=()))
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def located(filename: str | None, **changes: Any) -> str:
    return make_location(**{"key_prefix": None, **PLACE, "original_filename": filename, **changes})


async def uploaded(manager: StorageManager, filename: str | None) -> StoredObjectRef:
    return await manager.put_bytes(**SLOT, content=b"content", original_filename=filename)


class TestHostileFilenames:
    @pytest.mark.parametrize(
        ("filename", "kept"),
        [
            pytest.param("../../etc/passwd", "passwd", marks=pytest.mark.case("LOC-01")),
            pytest.param("/etc/cron.d/x", "x", marks=pytest.mark.case("LOC-02")),
            pytest.param("..\\..\\win.ini", "win.ini", marks=pytest.mark.case("LOC-03")),
            pytest.param("C:\\x.png", "x.png", marks=pytest.mark.case("LOC-03")),
            pytest.param("C:x.png", "C:x.png", marks=pytest.mark.case("LOC-03")),
            pytest.param("\\\\host\\share\\x.png", "x.png", marks=pytest.mark.case("LOC-03")),
            pytest.param("a.png\x00.html", "a.png.html", marks=pytest.mark.case("LOC-04")),
            pytest.param("a\r\nSet-Cookie: s=1\r\n.txt", "aSet-Cookie: s=1.txt", marks=pytest.mark.case("LOC-05")),
            pytest.param(None, None, marks=pytest.mark.case("LOC-07")),
            pytest.param("", None, marks=pytest.mark.case("LOC-07")),
            pytest.param(".", None, marks=pytest.mark.case("LOC-07")),
            pytest.param("..", None, marks=pytest.mark.case("LOC-07")),
            pytest.param("   ", None, marks=pytest.mark.case("LOC-07")),
            pytest.param(".png", ".png", marks=pytest.mark.case("LOC-07")),
            pytest.param("...", None, marks=pytest.mark.case("LOC-07")),
            pytest.param(". . .", None, marks=pytest.mark.case("LOC-07")),
            pytest.param("../", None, marks=pytest.mark.case("LOC-07")),
            pytest.param("/", None, marks=pytest.mark.case("LOC-07")),
            pytest.param("invoice\u202egpj.exe", "invoicegpj.exe", marks=pytest.mark.case("LOC-08")),
            pytest.param("a\u2028b\u2029c\x85d\x1be\x7f.txt", "abcde.txt", marks=pytest.mark.case("LOC-08")),
            pytest.param(f"a{BIDI}b.txt", "ab.txt", marks=pytest.mark.case("LOC-08")),
            pytest.param("lone\ud800.txt", "lone\ufffd.txt", marks=pytest.mark.case("LOC-08")),
            pytest.param("~root", "~root"),
            pytest.param("$(reboot).sh", "$(reboot).sh"),
            pytest.param("-rf", "-rf"),
            pytest.param("résumé.pdf", "résumé.pdf"),
            pytest.param("報告書 2024.pdf", "報告書 2024.pdf"),
            pytest.param("http://evil/x?y=1.png", "x?y=1.png"),
        ],
    )
    async def test_upload_goes_on_and_stays_inside(self, tmp_path: Path, filename: str | None, kept: str | None) -> None:
        root = tmp_path / "deep" / "root"
        async with local_manager(root) as manager:
            ref = await uploaded(manager, filename)
            assert await manager.get(ref) == b"content"
        assert GENERATED.fullmatch(ref.location)
        assert ".." not in ref.location
        assert ref.original_filename == kept
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] in (
            ["deep/root/.granite-storage", f"deep/root/{ref.location}"],
            [f"deep/root/{ref.location}", "deep/root/.granite-storage"],
        )

    @pytest.mark.case("LOC-06")
    @pytest.mark.parametrize("letter", ["é", "x", "日", "🪨", "e\u0301"])
    async def test_long_names_are_cut_on_a_code_point_and_keep_their_extension(self, tmp_path: Path, letter: str) -> None:
        async with local_manager(tmp_path) as manager:
            ref = await uploaded(manager, letter * 400 + ".png")
            assert await manager.exists(ref)
        assert ref.original_filename is not None
        assert 250 <= len(ref.original_filename.encode()) <= 255
        assert ref.original_filename.endswith(".png")
        segment = ref.location.rpartition("/")[2]
        assert len(segment.encode()) <= 255
        assert segment.endswith(".png")

    @pytest.mark.case("LOC-22")
    @pytest.mark.parametrize(
        ("filename", "expected"),
        [
            ("shell.php.jpg", "shell_php.jpg"),
            ("x.jpg.php", "x_jpg.php"),
            ("x.PHP", "x.php"),
            ("x.jpg%00.php", "x_jpg_00.php"),
            ("x.jpg;.asp", "x_jpg.asp"),
            ("x.jpg.", "x.jpg"),
            ("x.jpg. . .", "x.jpg"),
            (".htaccess", "file.htaccess"),
            ("..x", "file.x"),
            ("a b+c&d.tar.gz", "a_b_c_d_tar.gz"),
            ("x.p h p", "x.p_h_p"),
            ("...", "file"),
            (None, "file"),
            ("e\u0301.TXT", "é.txt"),
        ],
    )
    def test_the_name_in_the_location_has_one_extension(self, filename: str | None, expected: str) -> None:
        assert safe_name(filename) == expected

    def test_an_enormous_name_costs_next_to_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked_at = 0
        original = locations._clean_character

        def counting(character: str) -> str:
            nonlocal looked_at
            looked_at += 1
            return original(character)

        monkeypatch.setattr(locations, "_clean_character", counting)
        for letter in ("a", "ä"):
            kept = clean_filename(letter * 20_000_000 + ".png")
            assert kept is not None
            assert kept.endswith(f"{letter}.png")
        assert 0 < looked_at < 100_000

    def test_a_name_must_be_text(self) -> None:
        with pytest.raises(TypeError, match="original_filename"):
            clean_filename(b"x.png")  # type: ignore[arg-type]

    @given(ANYTHING)
    def test_cleaning_keeps_its_promises(self, filename: str) -> None:
        kept = clean_filename(filename)
        if kept is None:
            return
        assert kept.strip(". ")
        assert len(kept.encode()) <= 255
        assert not set(kept) & set("/\\" + BIDI)
        assert not {unicodedata.category(character) for character in kept} & {"Cc", "Cs", "Zl", "Zp"}
        assert clean_filename(kept) == kept

    @given(ANYTHING, st.integers(1, 222))
    def test_the_safe_name_keeps_its_promises(self, filename: str, room: int) -> None:
        name = safe_name(filename, max_bytes=room)
        assert 1 <= len(name.encode()) <= room
        assert name.count(".") <= 1
        assert name[0] not in ". "
        assert name[-1] not in ". "
        assert unicodedata.is_normalized("NFC", name)
        assert all(character in "._-" or unicodedata.category(character)[0] in "LNM" for character in name)
        check_segment(name)

    @given(st.none() | ANYTHING)
    def test_every_filename_gives_a_location_that_can_be_used(self, filename: str | None) -> None:
        location = located(filename)
        check_location(location)
        assert GENERATED.fullmatch(location)
        assert matches_generated_name(location)


class TestParts:
    @pytest.mark.case("LOC-12")
    @pytest.mark.parametrize("part", ["model_name", "entity_id", "field_name"])
    @pytest.mark.parametrize(
        "value",
        [
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a/",
            "../x",
            "a\\b",
            "a\x00",
            "a\nb",
            "\x7f",
            "a ",
            "a.",
            " ",
            "\ud800",
            "\u2028",
            ".granite-x",
            ".GRANITE-x",
            "x" * 256,
            "é" * 128,
            42,
            None,
            b"a",
        ],
    )
    def test_what_the_application_names_is_refused(self, part: str, value: Any) -> None:
        with pytest.raises(InvalidLocationError, match=part):
            located(None, **{part: value})

    @pytest.mark.case("LOC-11")
    @pytest.mark.parametrize("part", ["model_name", "entity_id", "field_name"])
    def test_the_text_of_an_absent_key_is_refused(self, part: str) -> None:
        with pytest.raises(InvalidLocationError, match="flush the session first"):
            located(None, **{part: str(None)})

    @pytest.mark.parametrize(
        "value", ["a b", "é", "日本", "a..b", "~", "%2F", "+", "&", "#", "?", "'", '"', "x" * 255, "-", "NUL"]
    )
    def test_what_is_odd_but_harmless_is_kept_verbatim(self, value: str) -> None:
        assert f"/{value}/" in located(None, entity_id=value)

    @pytest.mark.case("LOC-12")
    async def test_nothing_is_touched(self, tmp_path: Path) -> None:
        class Unread:
            def read(self, _: int) -> bytes:
                raise AssertionError("the stream was read")

        async with local_manager(tmp_path) as manager:
            with pytest.raises(InvalidLocationError):
                await manager.put_stream(**{**SLOT, "entity_id": "../x"}, stream=Unread())
            with pytest.raises(InvalidLocationError):
                await manager.put_bytes(**{**SLOT, "entity_id": "../x"}, content=b"x")
        assert left_below(tmp_path) == []

    @pytest.mark.case("LOC-13")
    @pytest.mark.parametrize(
        "segment",
        ["NUL", "nul", "CON.txt", "AUX .png", "com1", "COM¹", "lpt9.log", "prn", "CONIN$", "a:b", "a|b", "a?", "a*", '"'],
    )
    def test_names_of_devices_are_refused_on_windows(self, segment: str) -> None:
        with pytest.raises(InvalidLocationError):
            check_segment(segment, windows=True)
        with pytest.raises(InvalidLocationError):
            check_location(f"sub/{segment}/x", windows=True)
        check_location(f"sub/{segment}/x", windows=False)

    @pytest.mark.case("LOC-13")
    @pytest.mark.parametrize("filename", ["NUL", "CON.txt", "AUX .png", "com1"])
    def test_generated_names_are_never_those_of_devices(self, filename: str) -> None:
        check_location(located(filename), windows=True)

    @pytest.mark.case("LOC-21")
    def test_a_location_fits_1024_bytes_or_is_refused(self) -> None:
        fitting = {"model_name": "m" * 255, "entity_id": "é" * 127, "field_name": "f" * 255}
        location = located("report.pdf", key_prefix="p" * 200, **fitting)
        assert len(location.encode()) <= MAX_LOCATION_BYTES
        assert location.endswith("-report.pdf")
        tight = located("日本.pdf", key_prefix=f"{'p' * 200}/{'q' * 19}", **fitting)
        assert len(tight.encode()) <= MAX_LOCATION_BYTES
        assert matches_generated_name(tight)
        with pytest.raises(InvalidLocationError, match="1024"):
            located("report.pdf", key_prefix=f"{'p' * 200}/{'q' * 250}", **fitting)

    @given(st.integers(0, 240), texts())
    def test_whatever_room_is_left_the_location_can_be_used(self, length: int, filename: str) -> None:
        fitting = {"model_name": "m" * 255, "entity_id": "e" * 255, "field_name": "f" * 200}
        try:
            location = located(filename, key_prefix="p" * 36 + f"/{'q' * length}" if length else None, **fitting)
        except InvalidLocationError:
            assert length > 200
        else:
            check_location(location)
            assert matches_generated_name(location)


HOSTILE = [
    "../../etc/shadow",
    "/etc/shadow",
    "file:///x",
    "\\\\host\\share",
    "a//b",
    "./a",
    "a/./b",
    "a/../b",
    "a/",
    "/",
    "",
    ".",
    "..",
    "a\\b",
    "a/\x00",
    "a/b\n",
    "a/\ud800",
    "a/\u2028",
    ".granite-storage",
    "a/.granite-0123456789abcdef.tmp",
    "a/.GRANITE-storage",
    "x" * 256,
    "/".join(["x" * 200] * 6),
    "é" * 513,
    "a/" * 600 + "b",
]


class TestLocationsFromOutside:
    @pytest.mark.case("LOC-15", "LOC-19", "LOC-20", "LOC-21")
    @pytest.mark.parametrize("location", HOSTILE, ids=lambda location: ascii(location)[:30])
    async def test_hostile_ones_are_refused_before_anything_is_touched(self, tmp_path: Path, location: str) -> None:
        root = tmp_path / "root"
        backend = LocalStorageBackend(root)
        ref = StoredObjectRef("files", "store", location, 1, "")
        async with local_manager(root) as manager:
            for call in (
                manager.get(ref),
                manager.stat(ref),
                manager.exists(ref),
                manager.delete(ref),
                manager.copy(ref, **PLACE),
            ):
                with pytest.raises(InvalidLocationError):
                    await call
            with pytest.raises(InvalidLocationError):
                await manager.open(ref)
        for call in (
            backend.put_bytes(location, b""),
            backend.open(location),
            backend.stat(location),
            backend.exists(location),
            backend.delete(location),
            backend.copy(location, "a"),
            backend.copy("a", location),
        ):
            with pytest.raises(InvalidLocationError):
                await call
        assert not root.exists()

    @pytest.mark.parametrize("location", [None, 1, b"a", ["a"]])
    def test_only_text_is_a_location(self, location: Any) -> None:
        with pytest.raises(InvalidLocationError):
            check_location(location)

    @pytest.mark.case("LOC-20")
    @pytest.mark.parametrize(
        "location", ["a", "a/b", "a b/c", "é", "e\u0301", "a.", "a /b", "..a", "a..b", "%2e%2e/x", "-", "NUL"]
    )
    def test_odd_ones_that_lead_nowhere_are_taken_as_they_are(self, location: str) -> None:
        check_location(location, windows=False)

    @pytest.mark.case("LOC-15")
    async def test_a_sibling_of_the_root_is_out_of_reach(self, tmp_path: Path) -> None:
        (tmp_path / "media-private").mkdir()
        (tmp_path / "media-private" / "x").write_bytes(b"secret")
        backend = LocalStorageBackend(tmp_path / "media")
        await backend.put_bytes("y", b"")
        for location in ("../media-private/x", "/media-private/x", f"{tmp_path}/media-private/x"):
            with pytest.raises(InvalidLocationError):
                await backend.open(location)
        with pytest.raises(ObjectNotFoundError):
            await backend.open("-private/x")
        assert files_below(tmp_path / "media") == ["y"]

    @given(ANYTHING, ANYTHING)
    def test_a_location_names_only_what_is_below(self, first: str, second: str) -> None:
        location = f"{first}/{second}"
        try:
            check_location(location)
        except InvalidLocationError:
            return
        assert os.path.normpath(location) == location
        assert not os.path.isabs(location)
        assert ".." not in location.split("/")
        location.encode()

    def test_messages_are_short_and_printable(self) -> None:
        with pytest.raises(InvalidLocationError) as caught:
            check_location("\x1b[31m" * 1_000_000)
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


class TestGeneratedNames:
    def test_they_are_versioned_uuids_in_order_of_time(self) -> None:
        began = time.time()
        first = uuid7_hex()
        time.sleep(0.002)
        second = uuid7_hex()
        assert first < second
        assert began - 1 < int(second[:12], 16) / 1000 < time.time() + 1
        assert first[12] == "7"
        assert first[16] in "89ab"

    def test_no_two_are_the_same_whatever_thread_made_them(self) -> None:
        made: list[str] = []
        threads = [threading.Thread(target=lambda: made.extend(uuid7_hex() for _ in range(5000))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(made)) == 20_000

    def test_a_forked_child_makes_others_than_its_parent(self) -> None:
        program = """
import os
from granite_storage.locations import uuid7_hex
uuid7_hex()
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, uuid7_hex()[17:].encode())
    os._exit(0)
os.wait()
assert os.read(reader, 15).decode() != uuid7_hex()[17:]
"""
        in_new_process(program)

    @pytest.mark.parametrize(
        ("location", "ours"),
        [
            ("a/0190b6f3c1d27a3b8c4d5e6f7a8b9c0d-me.png", True),
            ("0190b6f3c1d27a3b8c4d5e6f7a8b9c0d-x", True),
            ("a/0190b6f3c1d27a3b8c4d5e6f7a8b9c0d-", False),
            ("a/0190b6f3c1d24a3b8c4d5e6f7a8b9c0d-me.png", False),
            ("a/0190b6f3c1d27a3b8c4d5e6f7a8b9c0d-me.png/more", False),
            ("a/photo.png", False),
        ],
    )
    def test_what_others_put_there_is_told_apart(self, location: str, ours: bool) -> None:
        assert matches_generated_name(location) is ours
