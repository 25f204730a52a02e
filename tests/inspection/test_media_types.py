"""The type of an upload: found in its content, held against what was declared, and accepted or refused."""

from __future__ import annotations

import io
import random
import re
import zipfile
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_storage._headers import is_active
from granite_storage.exceptions import ConfigurationError, UnsupportedContentError
from granite_storage.inspection._media_names import DECLARABLE, ZIP, fit_filename
from granite_storage.inspection.media_types import (
    TAIL_SIZE,
    Detected,
    Judged,
    check_accept,
    confirm_type,
    detect,
    judge_type,
    matches,
    zip_names,
)
from tests.core.support import in_new_process
from tests.inspection.corpus import (
    DOCX,
    HEAD_SIZE,
    HTML,
    ODT,
    OLE,
    OPENPYXL,
    PPTX,
    SVG,
    TEXTS_LIKE_MAGIC,
    WORD,
    XLSX,
    Hostile,
    content_of,
    hostile,
    noise,
    ole,
    pdf,
    picture,
    samples,
    zip_of,
)
from tests.processor_time import fastest

OnMismatch = Literal["refuse", "correct"]

ON_MISMATCH: tuple[OnMismatch, ...] = ("refuse", "correct")
EVERYTHING = ("*/*",)


def judge(
    content: bytes,
    *,
    declared: str | None = None,
    filename: str | None = None,
    accept: tuple[str, ...] = EVERYTHING,
    on_mismatch: OnMismatch = "refuse",
) -> Judged:
    """Judge a whole file, its end too."""
    head = content[:HEAD_SIZE]
    judged = judge_type(head, declared=declared, filename=filename, accept=accept, on_mismatch=on_mismatch)
    if judged.needs_tail:
        confirm_type(judged, head, content[-TAIL_SIZE:], accept=accept)
    return judged


def outcome(case: Hostile, on_mismatch: OnMismatch) -> str | None:
    try:
        judged = judge(case.content, declared=case.declared, filename=case.filename, accept=case.accept, on_mismatch=on_mismatch)
    except UnsupportedContentError:
        return None
    return judged.content_type


def parts(names: str) -> list[tuple[str, bytes]]:
    return [(name, b"<part/>") for name in names.split()]


def test_what_is_found_in_honest_files() -> None:
    found = {one.name: detect(one.content[:HEAD_SIZE]) for one in samples()}
    assert found == {one.name: Detected(one.found, is_text=one.is_text) for one in samples()}


def test_honest_files_are_kept() -> None:
    kept = {}
    for sample in samples():
        for declared in sample.declared:
            judged = judge(sample.content, declared=declared, filename=sample.name, accept=(sample.kept_type,))
            kept[sample.name, declared] = judged.content_type.partition("; charset=")[0]
    assert kept == {(one.name, declared): one.kept_type for one in samples() for declared in one.declared}


def test_honest_files_are_kept_without_a_declaration() -> None:
    for sample in samples():
        judged = judge(sample.content, filename=sample.name, accept=(sample.found or "text/plain", sample.kept_type))
        assert judged.content_type in (sample.found or "text/plain", sample.kept_type), sample.name
        assert sample.found is None or judged.found == sample.found, sample.name
        # The name of a document tells what an archive is whose first entries do not, and its end has to agree.
        assert sample.found in (None, judged.content_type, ZIP), sample.name


def test_honest_files_are_refused_where_other_types_are_accepted() -> None:
    for sample in samples():
        for declared in (None, *sample.declared, "image/x-other"):
            for on_mismatch in ON_MISMATCH:
                with pytest.raises(UnsupportedContentError) as caught:
                    judge(sample.content, declared=declared, accept=("image/x-other-one", "font/x"), on_mismatch=on_mismatch)
                assert caught.value.found == sample.found
                assert str(caught.value).isprintable()


def test_content_is_never_kept_as_another_binary_type() -> None:
    """Each file, declared as each type that has a signature and is not its own."""
    types = sorted({one.found for one in samples() if one.found and not one.is_text})
    for sample in samples():
        alike = {sample.found, sample.kept, *DECLARABLE.get(sample.found or "", ())}
        for declared in types:
            if declared not in alike:
                with pytest.raises(UnsupportedContentError):
                    kept = judge(sample.content, declared=declared, accept=(declared,)).content_type
                    pytest.fail(f"{sample.name} is kept as {kept}")


@pytest.mark.parametrize("on_mismatch", ON_MISMATCH)
def test_hostile_files(on_mismatch: OnMismatch) -> None:
    outcomes = {one.name: outcome(one, on_mismatch) for one in hostile()}
    assert outcomes == {one.name: one.kept if on_mismatch == "refuse" else one.corrected for one in hostile()}


def test_text_that_begins_like_a_signature_is_text() -> None:
    found = {name: detect(content) for name, content in TEXTS_LIKE_MAGIC.items()}
    assert found == dict.fromkeys(TEXTS_LIKE_MAGIC, Detected(None, is_text=True))


@pytest.mark.parametrize(
    ("declared", "kept"),
    [
        ("text/csv", "text/csv"),
        ("Text/CSV", "text/csv"),
        ("text/csv; charset=ISO-8859-1", "text/csv; charset=iso-8859-1"),
        ('text/csv; header=present; charset="utf-8"', "text/csv; charset=utf-8"),
        ("text/csv; header=present", "text/csv"),
        ("text/csv; charset=<script>", "text/csv"),
        ("text/csv\r\nX: y", "text/plain"),
        ("csv", "text/plain"),
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/octet-stream", "text/plain"),
        ("application/Octet-Stream; charset=binary", "text/plain"),
        (None, "text/plain"),
    ],
)
def test_declared_types_of_text(declared: str | None, kept: str) -> None:
    assert judge(b"a,b\n", declared=declared).content_type == kept


def test_parameters_of_binary_types_are_dropped() -> None:
    assert judge(picture(), declared="image/png; charset=utf-8; a=b").content_type == "image/png"


@pytest.mark.parametrize(
    ("filename", "accept", "kept"),
    [
        ("rows.csv", EVERYTHING, "text/csv"),
        ("ROWS.CSV", EVERYTHING, "text/csv"),
        ("rows.csv", ("text/plain",), "text/plain"),
        ("rows.html", EVERYTHING, "text/plain"),
        ("rows.html", ("text/html",), "text/html"),
        ("rows.svg", ("image/svg+xml", "text/plain"), "text/plain"),
        ("rows.png", EVERYTHING, "text/plain"),
        ("rows.docx", EVERYTHING, "text/plain"),
        ("rows.unknown", EVERYTHING, "text/plain"),
        ("rows", EVERYTHING, "text/plain"),
        (None, EVERYTHING, "text/plain"),
        ("data.yaml", EVERYTHING, "application/yaml"),
        ("data.json", ("application/*",), "application/json"),
    ],
)
def test_the_extension_tells_texts_apart(filename: str | None, accept: tuple[str, ...], kept: str) -> None:
    assert judge(b"a,b\n", filename=filename, accept=accept).content_type == kept
    if matches("image/png", accept):
        with pytest.raises(UnsupportedContentError, match="declared as image/png, but"):
            judge(b"a,b\n", declared="image/png", filename=filename, accept=accept)
        assert judge(b"a,b\n", declared="image/png", filename=filename, accept=accept, on_mismatch="correct").content_type == kept


@pytest.mark.parametrize(
    ("declared", "filename", "accept", "kept"),
    [
        (None, None, EVERYTHING, "text/plain"),
        (None, "rows.csv", EVERYTHING, "text/csv"),
        (None, None, ("application/octet-stream",), "application/octet-stream"),
        (None, None, ("image/*",), None),
        ("text/csv", None, EVERYTHING, "text/csv"),
        ("application/json", None, EVERYTHING, "application/json"),
        ("image/png", None, EVERYTHING, None),
        ("application/x-blender", None, ("application/x-blender",), None),
        ("image/svg+xml", None, ("image/svg+xml",), None),
        ("text/html", None, ("text/html",), "text/html"),
    ],
)
def test_empty_files(declared: str | None, filename: str | None, accept: tuple[str, ...], kept: str | None) -> None:
    if kept is None:
        with pytest.raises(UnsupportedContentError):
            judge(b"", declared=declared, filename=filename, accept=accept, on_mismatch="correct")
    else:
        assert judge(b"", declared=declared, filename=filename, accept=accept).content_type == kept


@pytest.mark.parametrize(
    ("content", "declared", "accept", "message"),
    [
        (picture(), None, ("application/pdf",), "the file is an image (image/png); only application/pdf is accepted"),
        (
            pdf(),
            None,
            ("image/*", "text/plain"),
            "the file is a PDF document (application/pdf); only image/* or text/plain is accepted",
        ),
        (picture(), "application/pdf", EVERYTHING, "the file was declared as application/pdf, but it is an image (image/png)"),
        (b"hello", "image/png", EVERYTHING, "the file was declared as image/png, but its content is of another type"),
        (noise(400), "image/png", EVERYTHING, "the file was declared as image/png, but its content is of another type"),
        (noise(400), None, ("image/*",), "the file is of an unknown type (application/octet-stream); only image/* is accepted"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
            None,
            ("image/*",),
            "the file is an image (image/svg+xml); only image/* is accepted, except types that run scripts",
        ),
        (
            b"<!doctype html><p>",
            "text/html",
            ("image/*", "text/plain"),
            "the file is text (text/html); only image/* or text/plain is accepted",
        ),
        (b"", "image/png", EVERYTHING, "the file is empty, so it is not image/png"),
    ],
)
def test_messages(content: bytes, declared: str | None, accept: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnsupportedContentError, match=f"^{re.escape(message)}$") as caught:
        judge(content, declared=declared, accept=accept)
    assert caught.value.declared == declared
    assert caught.value.found == detect(content).content_type
    assert caught.value.accept == accept


ACTIVE = """
    image/svg+xml text/html application/xhtml+xml text/xml application/xml application/rss+xml text/javascript text/css
    application/javascript multipart/mixed message/rfc822 application/wasm application/x-shockwave-flash
"""


class TestAccept:
    @pytest.mark.parametrize(
        "wrong",
        ["image/*", b"image/*", None, 7, (), [], (".png",), ("png",), ("image/*;q=1",), ("",), (None,), ("*/png",), ("*",)],
    )
    def test_what_is_no_media_range_is_refused(self, wrong: object) -> None:
        with pytest.raises(ConfigurationError, match="accept"):
            check_accept(wrong)

    def test_media_ranges(self) -> None:
        assert check_accept(["image/*", "Application/PDF", "*/*", "image/svg+xml"]) == (
            "image/*",
            "application/pdf",
            "*/*",
            "image/svg+xml",
        )

    @pytest.mark.parametrize(
        ("content_type", "accept"),
        [
            ("image/png", ("image/*",)),
            ("IMAGE/PNG; a=b", ("image/png",)),
            ("image/png", ("*/*",)),
            ("image/jpg", ("image/jpeg",)),
            ("image/jpeg", ("image/pjpeg",)),
            ("image/svg+xml", ("image/svg+xml",)),
            ("text/html; charset=utf-8", ("text/html",)),
            ("text/xml", ("application/xml",)),
            ("application/pdf", ("image/*", "application/pdf")),
        ],
    )
    def test_what_matches(self, content_type: str, accept: tuple[str, ...]) -> None:
        assert matches(content_type, accept)

    @pytest.mark.parametrize(
        "content_type", ["image/png", "images/x", "application/pdfx", "", "image", "text/html", "image/svg+xml"]
    )
    def test_what_does_not_match(self, content_type: str) -> None:
        assert not matches(content_type, ("application/pdf", "text/plain", "image/svg"[:9] + "-other"))

    @pytest.mark.parametrize("active", ACTIVE.split())
    def test_a_wildcard_never_matches_what_a_browser_runs(self, active: str) -> None:
        family = active.partition("/")[0]
        assert not matches(active, ("*/*", f"{family}/*", "image/*", "text/*"))
        assert matches(active, ("image/*", active))


class TestArchives:
    def test_the_names_of_a_directory(self) -> None:
        content = zip_of(parts(WORD))
        assert zip_names(content) == tuple(WORD.split())
        assert zip_names(content[:40], content[-2000:]) == tuple(WORD.split())
        assert zip_names(content[:-100]) == tuple(WORD.split())

    def test_a_directory_that_is_not_all_there(self) -> None:
        """The first entries tell what a presentation is whose directory is longer than what is seen of its end."""
        names = "[Content_Types].xml _rels/.rels ppt/presentation.xml"
        many = [(f"ppt/slides/slide{number}.xml", noise(50, number)) for number in range(1500)]
        content = zip_of([*parts(names), *many])
        assert len(content) > 2 * HEAD_SIZE
        assert judge(content, declared=PPTX, accept=(PPTX,)).content_type == PPTX

    def test_a_document_that_only_its_end_confirms(self) -> None:
        early = [("customXml/item1.xml", noise(100_000))]
        accept = (XLSX,)
        content = zip_of([*early, *parts(OPENPYXL)])
        judged = judge_type(content[:HEAD_SIZE], declared=XLSX, filename=None, accept=accept)
        assert judged == Judged(XLSX, "application/zip", needs_tail=True)
        confirm_type(judged, content[:HEAD_SIZE], content[-TAIL_SIZE:], accept=accept)
        for names in (WORD, "readme.txt", "META-INF/MANIFEST.MF Main.class", f"{OPENPYXL} META-INF/MANIFEST.MF"):
            other = zip_of([*early, *parts(names)])
            with pytest.raises(UnsupportedContentError, match=f"not {re.escape(XLSX)}"):
                judge(other, declared=XLSX, accept=accept)

    def test_macros_at_the_end(self) -> None:
        content = zip_of([*parts(WORD), ("word/media/image1.png", noise(100_000)), ("word/vbaProject.bin", b"macros")])
        with pytest.raises(UnsupportedContentError, match=r"macroenabled\.12, not"):
            judge(content, declared=DOCX, accept=(DOCX,))

    def test_macros_that_are_declared(self) -> None:
        macros = "application/vnd.ms-word.document.macroEnabled.12"
        slow = [*parts(WORD), ("word/media/image1.png", noise(100_000))]
        for content in (zip_of(parts(f"{WORD} word/vbaProject.bin")), zip_of([*slow, ("word/vbaProject.bin", b"macros")])):
            assert judge(content, declared=macros, accept=(macros,)).content_type == macros.lower()
        for content in (zip_of(parts(WORD)), zip_of(slow)):
            with pytest.raises(UnsupportedContentError):
                judge(content, declared=macros, accept=(macros,))

    def test_a_document_without_its_end(self) -> None:
        content = zip_of([*parts(WORD), ("word/media/image1.png", noise(100_000))])
        with pytest.raises(UnsupportedContentError, match="an archive"):
            judge(content[:-2000], declared=DOCX, accept=(DOCX, "application/zip"))
        assert judge(content, declared=DOCX, accept=(DOCX,)).content_type == DOCX

    def test_a_program_at_the_end_of_an_archive(self) -> None:
        content = zip_of([("readme.txt", noise(100_000)), ("META-INF/MANIFEST.MF", b"Main-Class: Main")])
        with pytest.raises(UnsupportedContentError, match="java-archive"):
            judge(content, declared="application/zip", accept=("application/zip",))
        assert judge(content, declared="application/zip", accept=("application/*",)).content_type == "application/zip"

    def test_templates(self) -> None:
        template = "application/vnd.openxmlformats-officedocument.wordprocessingml.template"
        assert judge(zip_of(parts(WORD)), declared=template, accept=(template,)).content_type == template
        with pytest.raises(UnsupportedContentError):
            judge(zip_of(parts(OPENPYXL)), declared=template, accept=(template, XLSX))
        late = zip_of([("customXml/item1.xml", noise(100_000)), *parts(WORD)])
        assert judge(late, declared=template, accept=(template,)).content_type == template
        with pytest.raises(UnsupportedContentError):
            judge(noise(400), declared=template, accept=(template,))
        slides = "application/vnd.ms-powerpoint.slideshow.macroenabled.12"
        content = zip_of(parts("[Content_Types].xml ppt/presentation.xml ppt/vbaProject.bin"))
        assert judge(content, declared=slides, accept=(slides,)).content_type == slides

    def test_general_names(self) -> None:
        for declared, content, kept in (
            ("application/zip", zip_of(parts(WORD)), DOCX),
            (OLE, ole("WordDocument"), "application/msword"),
            ("application/ogg", content_of("film.ogv"), "video/ogg"),
            ("application/ogg", content_of("song.ogg"), "audio/ogg"),
        ):
            assert judge(content, declared=declared, accept=(kept,)).content_type == kept
            with pytest.raises(UnsupportedContentError):
                judge(content, declared=declared, accept=(declared,))

    def test_a_format_inside_a_container_is_believed_where_both_are_accepted(self) -> None:
        kmz = "application/vnd.google-earth.kmz"
        content = zip_of(parts("doc.kml"))
        assert judge(content, declared=kmz, accept=(kmz, "application/zip")).content_type == kmz
        with pytest.raises(UnsupportedContentError):
            judge(content, declared=kmz, accept=(kmz,))
        with pytest.raises(UnsupportedContentError):
            judge(picture(), declared=kmz, accept=(kmz, "image/*"))

    def test_a_compound_file_whose_directory_is_at_its_end(self) -> None:
        late = bytearray(ole("WordDocument"))
        late[512:512] = noise(100_352)
        accept = ("application/msword",)
        assert judge(bytes(late), declared="application/msword", accept=accept).content_type == "application/msword"
        late[-2048:] = bytes(2048)
        with pytest.raises(UnsupportedContentError):
            judge(bytes(late), declared="application/msword", accept=accept)

    def test_a_table_with_a_letter_inside(self) -> None:
        content = ole("Workbook", "WordDocument")
        assert detect(content).content_type == OLE
        assert judge(content, declared="application/vnd.ms-excel").content_type == "application/vnd.ms-excel"

    def test_the_type_that_an_archive_gives_itself(self) -> None:
        assert detect(zip_of([("mimetype", ODT.encode()), ("content.xml", b"")])).content_type == ODT
        for false in (b"text/html", b"application/vnd.oasis.opendocument.<b>", ODT.encode() + b"\n"):
            assert detect(zip_of([("mimetype", false), ("content.xml", b"")])).content_type == "application/zip"


class TestFilenames:
    @pytest.mark.parametrize(
        ("filename", "content_type", "kept"),
        [
            (None, "image/png", None),
            ("picture.png", "image/png", "picture.png"),
            ("picture.PNG", "image/png", "picture.PNG"),
            ("picture.jpeg", "image/jpeg", "picture.jpeg"),
            ("evil.html", "image/png", "evil.html.png"),
            ("evil.html. ", "image/png", "evil.html..png"),
            ("evil.HTML.", "image/png", "evil.HTML..png"),
            (".html", "image/png", ".html.png"),
            ("evil.ht\u202eml", "image/png", "evil.html.png"),
            ("evil.png.html", "image/png", "evil.png.html.png"),
            ("evil.html.png", "image/png", "evil.html.png"),
            ("picture.jpg", "image/png", "picture.jpg.png"),
            ("picture", "image/png", "picture"),
            ("picture.of me", "image/png", "picture.of me"),
            ("v1.2", "application/pdf", "v1.2"),
            ("shell.php", "image/gif", "shell.php.gif"),
            ("run.lnk", "text/plain", "run.lnk.txt"),
            ("run.bat", "text/plain", "run.bat.txt"),
            ("setup.exe", "application/octet-stream", "setup.exe.bin"),
            ("setup.exe", "application/x-msdownload", "setup.exe"),
            ("page.html", "text/html; charset=utf-8", "page.html"),
            ("page.html", "text/plain; charset=utf-8", "page.html.txt"),
            ("drawing.svg", "image/svg+xml", "drawing.svg"),
            ("drawing.svg", "text/plain", "drawing.svg.txt"),
            ("code.js", "application/json", "code.js.json"),
            ("rows.csv", "text/plain", "rows.csv"),
            ("notes.txt", "text/csv", "notes.txt"),
            ("report.docx", "application/zip", "report.docx.zip"),
            ("song.m4a", "video/mp4", "song.m4a"),
            ("song.mp4", "audio/mp4", "song.mp4"),
            ("photo.jpg", "application/octet-stream", "photo.jpg.bin"),
            ("scene.html", "application/x-blender", "scene.html.bin"),
            ("app.hta", "application/vnd.oasis.opendocument.text", "app.hta.odt"),
            (f"{'a' * 250}.html", "image/png", f"{'a' * 250}..png"),
        ],
    )
    def test_names(self, filename: str | None, content_type: str, kept: str | None) -> None:
        assert fit_filename(filename, content_type) == kept
        assert fit_filename(kept, content_type) == kept

    def test_honest_names_are_left(self) -> None:
        fitted = {one.name: fit_filename(one.name, one.kept_type) for one in samples()}
        assert {name: kept for name, kept in fitted.items() if name != kept} == {
            "page.xhtml": "page.xhtml.html",
            "setup.msi": "setup.msi.bin",
        }

    @settings(max_examples=40, deadline=None)
    @given(name=st.text(max_size=20), suffix=st.sampled_from(["html", "svg", "Js", "php", "exe", "BAT", "lnk", "hta"]))
    def test_what_runs_is_never_last(self, name: str, suffix: str) -> None:
        kept = fit_filename(f"{name}.{suffix}", "image/png")
        assert kept is None or kept.endswith(".png")


DECLARED = st.one_of(
    st.none(),
    st.sampled_from(sorted({one for sample in samples() for one in sample.declared})),
    st.text(max_size=30),
    st.from_regex(r"[a-z]{1,12}/[a-z.+-]{1,20}(; charset=[a-z0-9-]{1,9})?", fullmatch=True),
)
FILENAMES = st.one_of(st.none(), st.text(max_size=20), st.sampled_from([sample.name for sample in samples()]))
RANGES = st.lists(
    st.sampled_from(["*/*", "image/*", "text/*", "application/*", "audio/*", "image/png", "application/pdf", "text/csv", DOCX]),
    min_size=1,
).map(tuple)
CONTENTS = st.sampled_from(
    [sample.content[:HEAD_SIZE] for sample in samples()] + [case.content[:HEAD_SIZE] for case in hostile()]
)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Bytes, of files cut and spoilt or of nothing."""
    content = draw(CONTENTS)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=600))
    if kind == 1:
        return content[: draw(st.integers(0, 400))] + draw(st.binary(max_size=100))
    if kind == 2:
        place = draw(st.integers(0, 300))
        return content[:place] + draw(st.binary(max_size=8)) + content[place:]
    return content + draw(CONTENTS)[:1000]


@settings(max_examples=120, deadline=None)
@given(
    content=contents(), declared=DECLARED, filename=FILENAMES, accept=RANGES, on_mismatch=st.sampled_from(("refuse", "correct"))
)
def test_nothing_active_is_kept_under_wildcards_and_nothing_else_is_raised(
    content: bytes, declared: str | None, filename: str | None, accept: tuple[str, ...], on_mismatch: OnMismatch
) -> None:
    head = content[:HEAD_SIZE]
    try:
        judged = judge_type(head, declared=declared, filename=filename, accept=accept, on_mismatch=on_mismatch)
        confirm_type(judged, head, content[-TAIL_SIZE:], accept=accept)
    except UnsupportedContentError:
        return
    assert not is_active(judged.content_type)
    assert matches(judged.content_type, accept)
    if not judged.content_type.startswith(("text/", "application/")):
        assert detect(head).content_type == judged.found
        assert matches(judged.found, accept) or judged.content_type != judged.found
    name = fit_filename(filename, judged.content_type)
    assert name is None or fit_filename(name, judged.content_type) == name


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], include_characters="\t\r\n"), min_size=1)


@settings(max_examples=80, deadline=None)
@given(
    text=TEXTS,
    begin=st.sampled_from(["", *(one.decode("latin-1") for one in TEXTS_LIKE_MAGIC.values())]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    cut=st.integers(0, 3),
    declared=DECLARED,
)
def test_text_never_becomes_binary(text: str, begin: str, encoding: str, cut: int, declared: str | None) -> None:
    content = (begin + text).encode(encoding)
    content = content[: len(content) - cut] or content
    if begin == "" and text.startswith(("%PDF-", "{\\rtf")):
        return
    detected = detect(content)
    assert detected.is_text
    assert detected.content_type in (None, "text/html", "image/svg+xml")
    try:
        kept = judge(content, declared=declared, accept=("*/*", "text/html", "image/svg+xml"), on_mismatch="correct").content_type
    except UnsupportedContentError:
        return
    assert not kept.startswith(("image/p", "image/j", "audio/", "video/", "font/", "application/zip", "application/octet"))


@pytest.mark.parametrize(
    "content",
    [
        b"<!-- -->" * 8192,
        b"<!--" * 16_384,
        b"<?a?>" * 13_000,
        b"<!DOCTYPE a [" + b"]" * 65_000,
        b"<!DOCTYPE a [" + b"] " * 32_000,
        b" " * 65_536,
        b"<" * 65_536,
        b"<" + b"a:" * 32_000,
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0teXt\0\0\0\0" * 5400,
        b"\0\0\xff\xf0ftyp" + b"zzzz" * 16_000,
        b"PK\3\4" * 16_384,
        b"PK\3\4\0\0\x08" + bytes(23) + b"PK\3\4\0\0\x08\0" * 8000,
        b"PK\3\4" + b"PK\1\2" + bytes(65_000) + b"PK\5\6" + bytes(18),
        b"\x50\x2a\x4d\x18\0\0\0\0" * 8192,
        b"\xff\xfe" + b"<\0" * 32_000,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"W\0o\0r\0d\0" * 8000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_time_is_bounded(content: bytes) -> None:
    seconds = fastest(lambda: detect(content[:HEAD_SIZE], content[-TAIL_SIZE:]))
    assert seconds < 0.05  # a hundredth of a second on any machine of today


def test_the_detector_is_an_extra() -> None:
    in_new_process("""
import sys
sys.modules["filetype"] = None
from granite_storage.exceptions import MissingDependencyError
from granite_storage.inspection import media_types
try:
    media_types.require_detector()
except MissingDependencyError as error:
    assert "granite-storage[inspect]" in str(error), error
else:
    raise AssertionError("nothing is missed")
""")


def test_the_corpus_is_large_enough() -> None:
    honest: Any = samples()
    assert len(honest) >= 60
    assert len(hostile()) >= 60
    assert HTML in [one.content for one in honest]
    assert SVG in [one.content for one in honest]


@pytest.mark.parametrize(
    ("filename", "declared", "accept", "kept"),
    [
        ("report.docx", None, (DOCX,), DOCX),
        ("report.docx", "application/octet-stream", (DOCX,), DOCX),
        ("report.docx", "binary/octet-stream", (DOCX,), DOCX),
        ("report.zip", None, (DOCX,), None),
    ],
)
def test_an_archive_whose_name_says_what_it_is(
    filename: str, declared: str | None, accept: tuple[str, ...], kept: str | None
) -> None:
    """Its directory, at the end, has to agree; here the head shows a picture only."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("word/media/image1.png", random.Random(1).randbytes(100_000))
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", "<document/>")
    content = out.getvalue()
    head = content[:HEAD_SIZE]
    if kept is None:
        with pytest.raises(UnsupportedContentError):
            judge_type(head, declared=declared, filename=filename, accept=accept)
        return
    judged = judge_type(head, declared=declared, filename=filename, accept=accept)
    confirm_type(judged, head, content[-TAIL_SIZE:], accept=accept)
    assert judged.content_type == kept


def test_plain_text_whose_name_says_which() -> None:
    judged = judge_type(b"a,b\n1,2\n", declared="text/plain", filename="a.csv", accept=("text/csv",))
    assert judged.content_type == "text/csv"
