"""Files of many types, made here, and their hostile twins, each with what should become of it.

`samples()` are honest files: the name a client would give, the bytes, and the type found in them. `hostile()` are files that
pretend, each with a policy and its outcome. Nothing is copied from elsewhere: the standard library and Pillow make what they can,
and the rest is written by hand after the formats' specifications, small but well-formed.
"""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import random
import sqlite3
import struct
import tarfile
import wave
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any

from PIL import Image, ImageDraw

HEAD_SIZE = 64 * 1024
"""How much of a file the tests look at, as the library does."""

DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
ODT = "application/vnd.oasis.opendocument.text"
ODS = "application/vnd.oasis.opendocument.spreadsheet"
OLE = "application/x-ole-storage"


@dataclass(frozen=True, slots=True)
class Sample:
    """An honest file.

    Attributes:
        name: The file name, unique in the corpus.
        content: Its bytes.
        found: The media type found in the content; None for text without markup and for unknown binary.
        is_text: Whether it is text.
        declared: What honest clients declare for it, the right type first.
        kept: The type that it is kept under where that is declared; None stands for `found`.
    """

    name: str
    content: bytes
    found: str | None
    is_text: bool = False
    declared: tuple[str, ...] = ()
    kept: str | None = None

    @property
    def kept_type(self) -> str:
        """The media type that it is kept under, declared honestly and accepted by name."""
        kept = self.kept or self.found
        assert kept is not None, self.name
        return kept

    @property
    def is_whole(self) -> bool:
        """Whether its head is all of it."""
        return len(self.content) <= HEAD_SIZE


@dataclass(frozen=True, slots=True)
class Hostile:
    """A file that pretends to be another.

    Attributes:
        name: The case, unique in the corpus.
        content: Its bytes.
        filename: The name that the client gives.
        declared: The type that the client declares, or None.
        accept: What the policy accepts.
        kept: The type it is kept under with `on_mismatch="refuse"`; None where it is refused.
        corrected: The same with `on_mismatch="correct"`.
    """

    name: str
    content: bytes
    filename: str
    declared: str | None
    accept: tuple[str, ...]
    kept: str | None = None
    corrected: str | None = None


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Return the honest files."""
    made = (*_images(), *_archives(), *_documents(), *_sound_and_film(), *_fonts(), *_programs(), *_texts(), *_markup())
    assert len({one.name for one in made}) == len(made)
    return made


@functools.cache
def hostile() -> tuple[Hostile, ...]:
    """Return the files that pretend."""
    made = (*_markup_in_disguise(), *_polyglots(), *_programs_in_disguise(), *_texts_like_magic(), *_false_declarations())
    assert len({one.name for one in made}) == len(made)
    return made


@functools.cache
def content_of(name: str) -> bytes:
    """Return the bytes of the honest file of that name."""
    return next(one.content for one in samples() if one.name == name)


def picture(image_format: str = "PNG", size: tuple[int, int] = (48, 32), mode: str = "RGB", **options: Any) -> bytes:
    """Return a picture made by Pillow."""
    image = Image.new(mode, size, 0)
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, size[0] - 4, size[1] - 4), fill=1 if mode == "P" else 200 if mode == "L" else (200, 40, 90))
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def zip_of(entries: Iterable[tuple[str, bytes]], *, stored: frozenset[str] = frozenset({"mimetype"})) -> bytes:
    """Return a zip archive with those entries in that order."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return out.getvalue()


class _Pipe(io.RawIOBase):
    """A file that cannot seek: zipfile writes the sizes of an entry behind it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.parts.append(bytes(data))
        return len(data)


def streamed_zip(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a zip archive as a program writes it into a pipe, the sizes behind the entries."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, content in entries:
            archive.writestr(name, content)
    return b"".join(pipe.parts)


def noise(size: int, seed: int = 7) -> bytes:
    """Return bytes that do not compress, the same each time."""
    return random.Random(seed).randbytes(size)


def _xml(root: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\r\n<{root} xmlns="urn:example"/>'.encode()


def _parts(names: str) -> list[tuple[str, bytes]]:
    return [(name, _xml("part")) for name in names.split()]


def _images() -> Iterable[Sample]:
    yield Sample("picture.png", picture(), "image/png", declared=("image/png", "image/x-png"))
    yield Sample("grey.png", picture(mode="L"), "image/png", declared=("image/png",))
    yield Sample("picture.jpg", picture("JPEG"), "image/jpeg", declared=("image/jpeg", "image/jpg", "image/pjpeg"))
    yield Sample(
        "progressive.jpeg", picture("JPEG", progressive=True, comment=b"a comment"), "image/jpeg", declared=("image/jpeg",)
    )
    exif = Image.Exif()
    exif[0x0110] = "A Camera"
    yield Sample("camera.jpg", picture("JPEG", exif=exif), "image/jpeg", declared=("image/jpeg",))
    yield Sample("picture.gif", picture("GIF", mode="P"), "image/gif", declared=("image/gif",))
    frames = [Image.new("P", (20, 20), colour) for colour in (1, 2, 3)]
    yield Sample(
        "film.gif", _save(frames[0], "GIF", save_all=True, append_images=frames[1:]), "image/gif", declared=("image/gif",)
    )
    drawn = [Image.new("RGB", (20, 20), (colour, 0, 0)) for colour in (10, 100, 200)]
    yield Sample(
        "film.png",
        _save(drawn[0], "PNG", save_all=True, append_images=drawn[1:]),
        "image/png",
        declared=("image/png", "image/apng"),
    )
    yield Sample("picture.webp", picture("WEBP"), "image/webp", declared=("image/webp",))
    yield Sample("lossless.webp", picture("WEBP", lossless=True), "image/webp", declared=("image/webp",))
    yield Sample("picture.bmp", picture("BMP"), "image/bmp", declared=("image/bmp", "image/x-ms-bmp", "image/x-bmp"))
    yield Sample("picture.tiff", picture("TIFF"), "image/tiff", declared=("image/tiff",))
    yield Sample("big-endian.tif", _big_endian_tiff(), "image/tiff", declared=("image/tiff", "image/tif"))
    yield Sample(
        "favicon.ico",
        picture("ICO"),
        "image/vnd.microsoft.icon",
        declared=("image/vnd.microsoft.icon", "image/x-icon", "image/ico"),
    )
    yield Sample("picture.jp2", picture("JPEG2000"), "image/jp2", declared=("image/jp2", "image/jpx"))
    yield Sample("picture.avif", picture("AVIF"), "image/avif", declared=("image/avif",))
    yield Sample("photo.heic", _iso_media(b"heic", b"mif1heic", b"meta"), "image/heic", declared=("image/heic",))
    yield Sample("photo.heif", _iso_media(b"mif1", b"mif1heic", b"meta"), "image/heic", declared=("image/heic", "image/heif"))
    yield Sample(
        "layers.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(64), "image/vnd.adobe.photoshop"
    )


def _save(image: Image.Image, image_format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def _big_endian_tiff() -> bytes:
    tags = [
        (256, 3, 1, 1 << 16),
        (257, 3, 1, 1 << 16),
        (258, 3, 1, 8 << 16),
        (262, 3, 1, 1 << 16),
        (273, 4, 1, 74),
        (279, 4, 1, 1),
    ]
    return b"MM\0*" + struct.pack(">IH", 8, len(tags)) + b"".join(struct.pack(">HHII", *tag) for tag in tags) + bytes(8)


def _archives() -> Iterable[Sample]:
    text = b"a line of text\n" * 40
    yield Sample(
        "files.zip",
        zip_of([("readme.txt", text), ("data/one.csv", b"a,b\n1,2\n")]),
        "application/zip",
        declared=("application/zip", "application/x-zip-compressed", "application/x-zip"),
    )
    yield Sample("empty.zip", zip_of([]), "application/zip", declared=("application/zip",))
    yield Sample(
        "streamed.zip", streamed_zip([("readme.txt", text), ("more.txt", text)]), "application/zip", declared=("application/zip",)
    )
    inner = zip_of(_parts("[Content_Types].xml _rels/.rels word/document.xml"))
    nested = zip_of([("report.docx", inner), ("readme.txt", text)], stored=frozenset({"report.docx"}))
    yield Sample("nested.zip", nested, "application/zip", declared=("application/zip",))
    tar = _tar("readme.txt", text)
    yield Sample("files.tar", tar, "application/x-tar", declared=("application/x-tar",))
    yield Sample("files.tar.gz", gzip.compress(tar), "application/gzip", declared=("application/gzip", "application/x-gzip"))
    yield Sample(
        "notes.txt.bz2", bz2.compress(text), "application/x-bzip2", declared=("application/x-bzip2", "application/bzip2")
    )
    yield Sample("notes.txt.xz", lzma.compress(text), "application/x-xz", declared=("application/x-xz",))
    yield Sample("notes.zst", b"\x28\xb5\x2f\xfd\x20\x05\x29\0\0hello", "application/zstd", declared=("application/zstd",))
    seven = b"7z\xbc\xaf\x27\x1c\0\4" + bytes(24)
    yield Sample("files.7z", seven, "application/x-7z-compressed", declared=("application/x-7z-compressed",))
    rar4 = b"Rar!\x1a\7\0\xcf\x90\x73\0\0\x0d\0\0\0\0\0\0\0"
    declared = ("application/vnd.rar", "application/x-rar-compressed", "application/x-rar")
    yield Sample("files.rar", rar4, "application/vnd.rar", declared=declared)
    yield Sample(
        "new.rar", b"Rar!\x1a\7\1\0\x33\x92\xb5\xe5\x0a\1\5\6\0\5\1\1\x80\x80\0", "application/vnd.rar", declared=declared
    )
    yield Sample(
        "rows.sqlite", _database(), "application/vnd.sqlite3", declared=("application/vnd.sqlite3", "application/x-sqlite3")
    )


def _tar(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("INSERT INTO rows VALUES (1, 'one')")
    content = connection.serialize()
    connection.close()
    return content


WORD = (
    "[Content_Types].xml _rels/.rels word/document.xml word/_rels/document.xml.rels word/theme/theme1.xml word/settings.xml "
    "word/styles.xml word/webSettings.xml word/fontTable.xml docProps/core.xml docProps/app.xml"
)
LIBRE_OFFICE = (
    "_rels/.rels docProps/core.xml docProps/app.xml word/_rels/document.xml.rels word/document.xml word/styles.xml "
    "word/fontTable.xml word/settings.xml word/theme/theme1.xml [Content_Types].xml"
)
GOOGLE = (
    "word/numbering.xml word/settings.xml word/fontTable.xml word/styles.xml word/document.xml word/theme/theme1.xml "
    "word/_rels/fontTable.xml.rels word/_rels/document.xml.rels _rels/.rels [Content_Types].xml"
)
OPENPYXL = (
    "docProps/app.xml docProps/core.xml xl/theme/theme1.xml xl/worksheets/sheet1.xml xl/styles.xml _rels/.rels xl/workbook.xml "
    "xl/_rels/workbook.xml.rels [Content_Types].xml"
)
EXCEL = (
    "[Content_Types].xml _rels/.rels xl/workbook.xml xl/_rels/workbook.xml.rels xl/worksheets/sheet1.xml xl/theme/theme1.xml "
    "xl/styles.xml docProps/core.xml docProps/app.xml"
)
POWERPOINT = (
    "[Content_Types].xml _rels/.rels ppt/presentation.xml ppt/slides/_rels/slide1.xml.rels ppt/_rels/presentation.xml.rels "
    "ppt/slides/slide1.xml docProps/thumbnail.jpeg docProps/app.xml docProps/core.xml"
)


def pdf(text: str = "Hello", *, binary: bool = True) -> bytes:
    """Return a PDF of one page, with the comment of high bytes behind its header that most writers add, or all in ASCII."""
    stream = f"BT /F1 24 Tf 72 720 Td ({text}) Tj ET"
    objects = (
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    )
    content = b"%PDF-1.7\n" + (b"%\xe2\xe3\xcf\xd3\n" if binary else b"")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF\n"
    return content + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()


def ole(*names: str, sector: bytes = b"") -> bytes:
    """Return a compound file (OLE2) whose directory has those entries; `sector` is what its first sector begins with."""
    header = bytearray(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504))
    struct.pack_into("<HHHHH", header, 24, 0x3E, 3, 0xFFFE, 9, 6)
    struct.pack_into("<IIIIIIII", header, 44, 1, 2, 0, 4096, 0xFFFFFFFE, 0, 0xFFFFFFFE, 0)
    struct.pack_into("<109I", header, 76, 1, *[0xFFFFFFFF] * 108)
    table = struct.pack("<4I", 0xFFFFFFFE, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF).ljust(512, b"\xff")
    entries = b""
    for index, name in enumerate(("Root Entry", *names)):
        encoded = name.encode("utf-16-le")
        entry = bytearray(encoded.ljust(64, b"\0") + bytes(64))
        struct.pack_into("<HBB", entry, 64, len(encoded) + 2, 5 if index == 0 else 2, 1)
        entries += entry
    return bytes(header) + sector.ljust(512, b"\0") + table + entries.ljust(512, b"\0")


def _documents() -> Iterable[Sample]:
    yield Sample("page.pdf", pdf(), "application/pdf", declared=("application/pdf", "application/x-pdf"))
    yield Sample("ascii.pdf", pdf(binary=False), "application/pdf", declared=("application/pdf",))
    yield Sample("pillow.pdf", picture("PDF"), "application/pdf", declared=("application/pdf",))
    yield Sample("word.docx", zip_of(_parts(WORD)), DOCX, declared=(DOCX, "application/zip"))
    yield Sample("libreoffice.docx", streamed_zip(_parts(LIBRE_OFFICE)), DOCX, declared=(DOCX,))
    yield Sample("google.docx", streamed_zip(_parts(GOOGLE)), DOCX, declared=(DOCX,))
    large = [("customXml/item1.xml", noise(100_000)), *_parts(WORD)]
    yield Sample("late.docx", zip_of(large), "application/zip", declared=(DOCX,), kept=DOCX)
    yield Sample("excel.xlsx", zip_of(_parts(EXCEL)), XLSX, declared=(XLSX,))
    yield Sample("openpyxl.xlsx", zip_of(_parts(OPENPYXL)), XLSX, declared=(XLSX,))
    yield Sample("slides.pptx", zip_of(_parts(POWERPOINT)), PPTX, declared=(PPTX,))
    macros = "application/vnd.ms-word.document.macroenabled.12"
    yield Sample("macros.docm", zip_of(_parts(f"{WORD} word/vbaProject.bin")), macros, declared=(macros,))
    for name, kind in (("text.odt", ODT), ("table.ods", ODS), ("slides.odp", "application/vnd.oasis.opendocument.presentation")):
        parts = [("mimetype", kind.encode()), *_parts("content.xml styles.xml meta.xml META-INF/manifest.xml")]
        yield Sample(name, zip_of(parts), kind, declared=(kind,))
    book = [("mimetype", b"application/epub+zip"), *_parts("META-INF/container.xml OEBPS/content.opf OEBPS/one.xhtml")]
    yield Sample("book.epub", zip_of(book), "application/epub+zip", declared=("application/epub+zip",))
    yield Sample(
        "old.doc", ole("WordDocument", "1Table", sector=b"\xec\xa5\xc1\0"), "application/msword", declared=("application/msword",)
    )
    yield Sample("old.xls", ole("Workbook"), "application/vnd.ms-excel", declared=("application/vnd.ms-excel",))
    slides = "application/vnd.ms-powerpoint"
    yield Sample("old.ppt", ole("PowerPoint Document", "Current User"), slides, declared=(slides,))
    message = "application/vnd.ms-outlook"
    yield Sample("mail.msg", ole("__properties_version1.0", "__nameid_version1.0"), message, declared=(message,))
    yield Sample("other.ole", ole("Contents"), OLE)
    rtf = rb"{\rtf1\ansi\deff0 {\fonttbl {\f0 Times;}}\f0\fs60 Hello, World!}"
    yield Sample("letter.rtf", rtf, "application/rtf", declared=("application/rtf", "text/rtf"))


def _box(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def _iso_media(major: bytes, compatible: bytes, *boxes: bytes) -> bytes:
    start = _box(b"ftyp", major + struct.pack(">I", 512) + compatible)
    return start + b"".join(_box(kind, bytes(40)) for kind in boxes) + _box(b"mdat", noise(200))


def _ebml(doctype: bytes) -> bytes:
    fields = b"\x42\x86\x81\1\x42\xf7\x81\1\x42\xf2\x81\4\x42\xf3\x81\x08"
    fields += b"\x42\x82" + bytes([0x80 | len(doctype)]) + doctype + b"\x42\x87\x81\4\x42\x85\x81\2"
    return b"\x1a\x45\xdf\xa3" + bytes([0x80 | len(fields)]) + fields + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + noise(100)


def _ogg(packet: bytes) -> bytes:
    return b"OggS\0\2" + bytes(8) + b"\1\2\3\4" + bytes(8) + bytes([1, len(packet)]) + packet + noise(100)


def _wav() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    return out.getvalue()


def _mp3_frames() -> bytes:
    return (b"\xff\xfb\x90\x64" + bytes(413)) * 6


def _sound_and_film() -> Iterable[Sample]:
    declared = ("audio/mpeg", "audio/mp3", "audio/x-mp3")
    yield Sample(
        "song.mp3",
        b"ID3\4\0\0\0\0\0\x1f" + b"TIT2\0\0\0\5\0\0\0Song".ljust(31, b"\0") + _mp3_frames(),
        "audio/mpeg",
        declared=declared,
    )
    yield Sample("bare.mp3", _mp3_frames(), "audio/mpeg", declared=declared)
    yield Sample("crc.mp3", (b"\xff\xfa\x90\x64" + bytes(413)) * 6, "audio/mpeg", declared=declared)
    declared = ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave")
    yield Sample("beep.wav", _wav(), "audio/wav", declared=declared)
    yield Sample(
        "song.flac",
        b"fLaC\x80\0\0\x22" + bytes(34) + b"\xff\xf8" + noise(60),
        "audio/flac",
        declared=("audio/flac", "audio/x-flac"),
    )
    yield Sample("song.ogg", _ogg(b"\1vorbis" + bytes(23)), "audio/ogg", declared=("audio/ogg", "application/ogg"))
    yield Sample("song.opus", _ogg(b"OpusHead\1\2" + bytes(9)), "audio/ogg", declared=("audio/ogg", "audio/opus"))
    yield Sample("film.ogv", _ogg(b"\x80theora\3\2\1" + bytes(32)), "video/ogg", declared=("video/ogg", "application/ogg"))
    yield Sample(
        "song.m4a", _iso_media(b"M4A ", b"M4A mp42isom", b"moov"), "audio/mp4", declared=("audio/mp4", "audio/x-m4a", "audio/m4a")
    )
    yield Sample("film.mp4", _iso_media(b"isom", b"isomiso2avc1mp41", b"moov"), "video/mp4", declared=("video/mp4",))
    yield Sample("phone.mp4", _iso_media(b"mp42", b"isommp42", b"moov"), "video/mp4", declared=("video/mp4",))
    yield Sample("sound.mp4", _iso_media(b"isom", b"isomiso2", b"moov"), "video/mp4", declared=("audio/mp4",), kept="audio/mp4")
    yield Sample("segment.mp4", _iso_media(b"iso5", b"iso5dash", b"moov"), "video/mp4", declared=("video/mp4",))
    yield Sample("film.m4v", _iso_media(b"M4V ", b"M4V mp42isom", b"moov"), "video/mp4", declared=("video/mp4", "video/x-m4v"))
    yield Sample("film.mov", _iso_media(b"qt  ", b"qt  ", b"wide", b"moov"), "video/quicktime", declared=("video/quicktime",))
    yield Sample("phone.3gp", _iso_media(b"3gp4", b"isom3gp4", b"moov"), "video/3gpp", declared=("video/3gpp", "video/3gpp2"))
    yield Sample("film.webm", _ebml(b"webm"), "video/webm", declared=("video/webm",))
    yield Sample("sound.webm", _ebml(b"webm"), "video/webm", declared=("audio/webm",), kept="audio/webm")
    yield Sample("film.mkv", _ebml(b"matroska"), "video/x-matroska", declared=("video/x-matroska", "video/matroska"))
    avi = (
        b"RIFF" + struct.pack("<I", 200) + b"AVI LIST" + struct.pack("<I", 68) + b"hdrlavih" + struct.pack("<I", 56) + bytes(124)
    )
    yield Sample("film.avi", avi, "video/x-msvideo", declared=("video/x-msvideo", "video/avi", "video/vnd.avi"))
    yield Sample(
        "tune.mid", b"MThd\0\0\0\6\0\0\0\1\0\x60MTrk\0\0\0\4\0\xff\x2f\0", "audio/midi", declared=("audio/midi", "audio/mid")
    )


def _sfnt(kind: bytes) -> bytes:
    tables = [b"cmap", b"glyf", b"head", b"maxp"]
    directory = b"".join(tag + struct.pack(">III", 0, 76 + 4 * index, 4) for index, tag in enumerate(tables))
    return kind + struct.pack(">HHHH", len(tables), 64, 2, 0) + directory + bytes(16)


def _fonts() -> Iterable[Sample]:
    yield Sample("letters.ttf", _sfnt(b"\0\1\0\0"), "font/ttf", declared=("font/ttf", "application/x-font-ttf", "font/sfnt"))
    yield Sample("letters.otf", _sfnt(b"OTTO"), "font/otf", declared=("font/otf", "application/x-font-otf"))
    woff = b"\0\1\0\0" + struct.pack(">IHHIHH", 64, 1, 0, 128, 1, 0) + bytes(44)
    yield Sample(
        "letters.woff", b"wOFF" + woff, "font/woff", declared=("font/woff", "application/font-woff", "application/x-font-woff")
    )
    yield Sample("letters.woff2", b"wOF2" + woff, "font/woff2", declared=("font/woff2", "application/font-woff2"))


def program() -> bytes:
    """Return the beginning of a program for Windows: the DOS header, and a PE header behind it."""
    stub = b"MZ" + struct.pack("<29H", *range(0x90, 0x90 + 29)) + struct.pack("<I", 0x40)
    return stub + b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0x22) + bytes(400)


def _programs() -> Iterable[Sample]:
    yield Sample("setup.exe", program(), "application/vnd.microsoft.portable-executable", declared=("application/x-msdownload",))
    elf = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQ", 2, 62, 1, 0x400000, 64, 0) + bytes(64)
    yield Sample("program", elf, "application/x-executable", declared=("application/x-executable", "application/x-elf"))
    mach = b"\xcf\xfa\xed\xfe" + struct.pack("<IIIII", 0x01000007, 3, 2, 0, 0) + bytes(64)
    yield Sample("program.macho", mach, "application/x-mach-binary", declared=("application/x-mach-binary",))
    yield Sample("module.wasm", b"\0asm\1\0\0\0\1\4\1\x60\0\0", "application/wasm", declared=("application/wasm",))
    jar = zip_of(_parts("META-INF/MANIFEST.MF org/example/Main.class"))
    declared = ("application/java-archive", "application/x-java-archive")
    yield Sample("library.jar", jar, "application/java-archive", declared=declared)
    apk = zip_of(_parts("AndroidManifest.xml classes.dex resources.arsc META-INF/MANIFEST.MF"))
    android = "application/vnd.android.package-archive"
    yield Sample("app.apk", apk, android, declared=(android,))
    yield Sample("setup.msi", ole("\u4840\u3b3f\u43f2\u4438\u45b1", "\x05SummaryInformation"), OLE)
    yield Sample(
        "noise.bin", b"\x01\x02" + noise(4000), None, declared=("application/octet-stream",), kept="application/octet-stream"
    )


def _texts() -> Iterable[Sample]:
    table = io.StringIO()
    csv.writer(table).writerows([["name", "town"], ["Zoë", "Köln"], ["Ana", "Ávila"]])
    rows = table.getvalue()
    yield _text("notes.txt", b"Some notes.\nOf two lines.\n", "text/plain")
    yield _text("rows.csv", rows.encode(), "text/csv", "text/csv; charset=utf-8", "application/csv", "text/x-csv")
    yield _text("excel.csv", b"\xef\xbb\xbf" + rows.encode(), "text/csv", "application/vnd.ms-excel")
    yield _text("latin.csv", rows.encode("latin-1"), "text/csv", "text/csv; charset=iso-8859-1")
    yield _text("windows.txt", "“Quoted” – €5…\r\n".encode("cp1252"), "text/plain")
    yield _text("utf16.txt", "Grüße an alle\r\n".encode("utf-16"), "text/plain")
    yield _text("utf16be.txt", b"\xfe\xff" + "Grüße an alle\r\n".encode("utf-16-be"), "text/plain")
    yield _text("utf32.txt", "Grüße an alle\r\n".encode("utf-32"), "text/plain")
    yield _text("japanese.txt", "日本語のテキストです。\n".encode() * 30, "text/plain")
    yield _text("shift-jis.txt", ("日本語のテキスト\n" * 5).encode("shift_jis"), "text/plain")
    yield _text("data.json", json.dumps({"name": "Zoë", "of": [1, 2, None]}).encode(), "application/json", "text/json")
    yield _text("api.json", b'{"openapi": "3.1.0"}', "application/vnd.oai.openapi+json", kept="application/vnd.oai.openapi+json")
    yield _text("lines.ndjson", b'{"a": 1}\n{"a": 2}\n', "application/x-ndjson")
    yield _text("settings.yaml", b"a: 1\nb: [2, 3]\n", "application/yaml", "text/yaml", "application/x-yaml", "text/x-yaml")
    yield _text("settings.toml", b'[project]\nname = "x"\n', "application/toml")
    yield _text("schema.sql", b"CREATE TABLE rows (id INTEGER);\n", "application/sql", "application/x-sql")
    yield _text("readme.md", b"# Title\n\nSome *text*.\n", "text/markdown", "text/x-markdown")
    yield _text("run.sh", b"#!/bin/sh\nset -e\necho hello\n", "application/x-sh", "text/x-shellscript")
    yield _text("page.php", b"<?php\necho 'hello';\n?>\n", "application/x-php", "application/x-httpd-php", "text/x-php")
    yield _text("module.py", b'"""A module."""\n\nimport sys\n', "text/x-python")
    yield _text("code.js", b"export const one = 1;\n", "text/javascript", "application/javascript", "application/x-javascript")
    yield _text("look.css", b"body { margin: 0 }\n", "text/css")
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@example.org", "b@example.org", "Hello"
    message.set_content("Hello!\n")
    yield _text("mail.eml", bytes(message), "message/rfc822")
    yield _text("meeting.ics", b"BEGIN:VCALENDAR\r\nVERSION:2.0\r\nEND:VCALENDAR\r\n", "text/calendar")
    yield _text("film.vtt", b"WEBVTT\n\n00:00.000 --> 00:02.000\nHello\n", "text/vtt")
    yield _text("log.txt", b"\x1b[31mred\x1b[0m\n\x0cnext page\n", "text/plain")
    yield _text("picture.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "application/postscript")
    yield _text("long.txt", ("ä" * 40_000).encode(), "text/plain")
    yield _text("empty.txt", b"", "text/plain")


def _text(name: str, content: bytes, *declared: str, kept: str | None = None) -> Sample:
    return Sample(name, content, None, is_text=True, declared=declared, kept=kept or declared[0])


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4"/></svg>'
HTML = b"<html><head><title>A page</title></head><body><script>alert(1)</script></body></html>"


def _markup() -> Iterable[Sample]:
    prolog = b'<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n'
    doctype = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">\n'
    entities = b'<!DOCTYPE svg [\n <!ENTITY ns_svg "http://www.w3.org/2000/svg">\n <!ENTITY close "]&gt;">\n]>\n'
    comment = b"<!-- Generator: a drawing program -->\n"
    drawings = {
        "plain.svg": SVG,
        "prolog.svg": prolog + SVG,
        "bom.svg": b"\xef\xbb\xbf" + prolog + SVG,
        "spaces.svg": b"\r\n\t " + SVG,
        "comments.svg": prolog + comment + comment + b"<!-- > -->" + SVG,
        "doctype.svg": prolog + comment + doctype + SVG,
        "entities.svg": prolog + entities + SVG,
        "prefixed.svg": b'<svg:svg xmlns:svg="http://www.w3.org/2000/svg"/>',
        "short.svg": b"<svg/>",
        "stylesheet.svg": prolog + b'<?xml-stylesheet href="look.css"?>' + SVG,
        "utf16.svg": ('<?xml version="1.0" encoding="UTF-16"?>' + SVG.decode()).encode("utf-16"),
    }
    for name, content in drawings.items():
        yield Sample(name, content, "image/svg+xml", is_text=True, declared=("image/svg+xml", "image/svg"))
    pages = {
        "plain.html": HTML,
        "doctype.html": b"<!DOCTYPE html>\n" + HTML,
        "lower.html": b"<!doctype html>\n<p>Hello",
        "legacy.html": b'<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01//EN">\n' + HTML.upper(),
        "bom.html": b"\xef\xbb\xbf\n" + HTML,
        "comment.html": b"<!-- saved from a page -->\n" + HTML,
        "body.html": b"<body onload=alert(1)>",
        "script.html": b"  <script src=//example.org></script>",
        "frame.html": b"<iframe src=javascript:alert(1)>",
        "image.html": b"<img src=x onerror=alert(1)>",
        "utf16.html": HTML.decode().encode("utf-16"),
        "page.xhtml": prolog + b'<html xmlns="http://www.w3.org/1999/xhtml"><head/><body/></html>',
    }
    for name, content in pages.items():
        yield Sample(name, content, "text/html", is_text=True, declared=("text/html",))
    yield _text("feed.xml", prolog + b"<rss version='2.0'><channel/></rss>", "application/xml", "text/xml")
    yield _text("feed.rss", prolog + b"<rss version='2.0'><channel/></rss>", "application/rss+xml", kept="application/rss+xml")
    yield _text("less.txt", b"<3 this <b is less than c\n", "text/plain")
    yield _text("angle.txt", b"<someone@example.org> wrote:\n> hello\n", "text/plain")


IMAGES = ("image/*",)
PLAIN = ("text/*", "image/*", "audio/*", "application/*")


def _markup_in_disguise() -> Iterable[Hostile]:
    yield Hostile("svg named png", SVG, "picture.png", "image/png", IMAGES)
    yield Hostile(
        "svg as png where svg is accepted", SVG, "picture.png", "image/png", ("image/png", "image/svg+xml"), None, "image/svg+xml"
    )
    yield Hostile("svg declared as such under a wildcard", SVG, "picture.svg", "image/svg+xml", IMAGES)
    yield Hostile("svg not declared", SVG, "picture", None, ("*/*",))
    yield Hostile("html named png", HTML, "picture.png", "image/png", IMAGES)
    yield Hostile("html with the head of a gif", b"GIF89a/*" + HTML + b"*/", "picture.gif", "image/gif", IMAGES)
    yield Hostile("script with the head of a gif", b"GIF89a=1;alert(1)//", "picture.gif", "image/gif", IMAGES)
    yield Hostile("html not declared", HTML, "notes.txt", None, ("text/*",))
    yield Hostile("html declared under a wildcard", HTML, "page.html", "text/html", ("text/*", "*/*"))
    yield Hostile("html as text stays text", HTML, "page.html", "text/plain", ("text/*",), "text/plain", "text/plain")
    yield Hostile("html as csv stays csv", HTML, "rows.csv", "text/csv", ("text/csv",), "text/csv", "text/csv")
    yield Hostile("html as svg", HTML, "picture.svg", "image/svg+xml", ("image/svg+xml", "image/*"))
    yield Hostile("text as svg", b"hello", "picture.svg", "image/svg+xml", ("image/svg+xml", "image/*"))
    yield Hostile("script under a wildcard", b"alert(1)", "code.js", "text/javascript", ("text/*", "application/*"))
    yield Hostile("script not declared", b"alert(1)", "code.js", None, ("text/*",), "text/plain", "text/plain")
    yield Hostile("xml under a wildcard", b"<?xml version='1.0'?><a/>", "a.xml", "application/xml", ("application/*", "text/*"))
    yield Hostile("html as pdf", HTML, "page.pdf", "application/pdf", ("application/pdf",))
    yield Hostile("html with %PDF later", HTML + b"\n%PDF-1.4\n", "page.pdf", "application/pdf", ("application/pdf",))
    yield Hostile(
        "mail under a wildcard", b"MIME-Version: 1.0\r\nContent-Type: text/html\r\n\r\nx", "m.eml", "message/rfc822", ("*/*",)
    )


def _polyglots() -> Iterable[Hostile]:
    archive = zip_of([("Main.class", b"\xca\xfe\xba\xbe")])
    gif, jpeg, png = picture("GIF", mode="P"), picture("JPEG"), picture()
    yield Hostile("gif and archive", gif + archive, "picture.gif", "image/gif", IMAGES, "image/gif", "image/gif")
    yield Hostile("gif and archive as archive", gif + archive, "a.zip", "application/zip", ("application/zip",))
    yield Hostile(
        "gif and archive as jar",
        gif + archive,
        "a.jar",
        "application/java-archive",
        ("application/*", "image/*"),
        None,
        "image/gif",
    )
    yield Hostile("pdf with the head of a jpeg", jpeg[:200] + pdf(), "page.pdf", "application/pdf", ("application/pdf",))
    yield Hostile(
        "pdf and archive", pdf() + archive, "page.pdf", "application/pdf", ("application/pdf",), *["application/pdf"] * 2
    )
    yield Hostile("archive with a pdf inside", zip_of([("a.pdf", pdf())]), "page.pdf", "application/pdf", ("application/pdf",))
    commented = picture("JPEG", comment=b"<script>alert(1)</script>")
    yield Hostile("jpeg with a script", commented, "picture.jpg", "image/jpeg", IMAGES, "image/jpeg", "image/jpeg")
    yield Hostile("jpeg with a script as html", commented, "page.html", "text/html", ("text/html", "image/*"), None, "image/jpeg")
    yield Hostile("png with html behind", png + HTML, "page.html", "text/html", (*IMAGES, "text/html"), None, "image/png")
    only_magic = b"\x89PNG\r\n\x1a\n" + noise(300)
    yield Hostile("png of only magic, as pdf", only_magic, "page.pdf", "application/pdf", ("application/pdf",))
    phar = b"<?php __HALT_COMPILER(); ?>\r\n" + struct.pack("<II", 40, 1) + noise(80)
    yield Hostile("phar", phar, "picture.jpg", "image/jpeg", IMAGES)
    yield Hostile("phar with the head of a jpeg", jpeg + phar, "archive.phar", "application/x-phar", ("application/*",))
    tar = bytearray(_tar("picture.gif", gif))
    yield Hostile("tar named gif", bytes(tar), "picture.gif", "image/gif", IMAGES)
    yield Hostile(
        "docx that is only an archive", archive, "report.docx", DOCX, (DOCX, "application/zip"), None, "application/zip"
    )
    jar_in_docx = zip_of(_parts(f"{WORD} META-INF/MANIFEST.MF Main.class"))
    yield Hostile("jar inside a docx", jar_in_docx, "report.docx", DOCX, (DOCX,))
    macros = zip_of(_parts(f"{WORD} word/vbaProject.bin"))
    yield Hostile("macros in a docx", macros, "report.docx", DOCX, (DOCX,))
    yield Hostile("jar as archive", content_of("library.jar"), "a.zip", "application/zip", ("application/zip",))
    mime = zip_of([("mimetype", b"text/html"), *_parts("content.xml")])
    yield Hostile("archive that says it is html", mime, "a.odt", "text/html", ("text/html", ODT))
    odt = zip_of([("mimetype", ODT.encode() + b"<script>"), *_parts("content.xml")])
    yield Hostile("archive with a false mimetype", odt, "a.odt", ODT, (ODT,))


def _programs_in_disguise() -> Iterable[Hostile]:
    yield Hostile("exe named jpg", program(), "picture.jpg", "image/jpeg", IMAGES)
    yield Hostile("exe as octet-stream", program(), "picture.jpg", "application/octet-stream", IMAGES)
    yield Hostile("exe as text", program(), "notes.txt", "text/plain", ("text/*", "image/*"))
    dicom = bytearray(program())
    dicom[128:132] = b"DICM"
    yield Hostile("exe with the mark of dicom", bytes(dicom), "scan.dcm", "application/dicom", ("application/dicom", "image/*"))
    tar = bytearray(program())
    tar[257:263] = b"ustar\0"
    yield Hostile("exe with the mark of tar", bytes(tar), "files.tar", "application/x-tar", ("application/x-tar",))
    module = bytearray(b"\0asm\1\0\0\0" + bytes(400))
    module[128:132], module[257:262] = b"DICM", b"ustar"
    yield Hostile(
        "wasm with two marks", bytes(module), "scan.dcm", "application/dicom", ("application/dicom", "application/x-tar")
    )
    elf = content_of("program")
    yield Hostile("elf named png", elf, "picture.png", "image/png", IMAGES)
    yield Hostile("installer as word", content_of("setup.msi"), "report.doc", "application/msword", ("application/msword",))
    false_excel = ole("\u4840\u3b3f\u43f2\u4438\u45b1", sector=b"\xfd\xff\xff\xff\0\0\0\0\0\0\0\0")
    excel = "application/vnd.ms-excel"
    yield Hostile("installer with the mark of excel", false_excel, "table.xls", excel, (excel, "application/vnd.ms-powerpoint"))
    yield Hostile("apk as archive", content_of("app.apk"), "a.zip", "application/zip", ("application/zip",))
    script = b"#!/bin/sh\nrm -rf ~\n"
    yield Hostile("script named jpg", script, "picture.jpg", "image/jpeg", IMAGES)
    yield Hostile("script corrected to text", script, "run.sh", "image/jpeg", ("image/*", "text/plain"), None, "text/plain")
    yield Hostile("php named jpg", b"<?php system($_GET['c']); ?>", "shell.php", "image/jpeg", IMAGES)
    gif_php = b"GIF89a\x01\0\x01\0\0\0\0<?php system($_GET['c']); ?>"
    yield Hostile("php with the head of a gif", gif_php, "shell.php", "image/gif", IMAGES, "image/gif", "image/gif")


TEXTS_LIKE_MAGIC = {
    "BM": b"BM is short for benchmark.\n",
    "MZ": b"MZ is the mark of Mark Zbikowski.\n",
    "PK": b"PK\n\nThe primary key.\n",
    "II*": b"II* is what a TIFF begins with\n",
    "MM": b"MM.YYYY of each month\n",
    "ID3": b"ID3 tags are explained here.\n",
    "GIF": b"GIF89a is a format of 1989.\n",
    "RIFF": b"RIFF is a WAVE of ships: WEBPVP8 and AVI \n",
    "8BPS": b"8BPS begins a PSD\n",
    "FWS": b"FWS and CWS are films\n",
    "OTTO": b"OTTO is a name\n",
    "Rar!": b"Rar! said the tiger\n",
    "FORM": b"FORM of an AIFF\n",
    "BZh": b"BZh91AY&SY is not packed\n",
    "wOFF": b"wOFF the dog said\n",
    "SIMPLE": b"SIMPLE  =                    T\n",
    "%!PS": b"%!PS is how PostScript begins\n",
    "#!AMR": b"#!AMR\nis sound\n",
    "!<arch>": b"!<arch>\nis an archive\n",
    "AC10": b"AC1015 is a drawing\n",
    "fLaC": b"fLaC is free\n",
    "OggS": b"OggS is a page\n",
    "gimp": b"gimp xcf v011 is a picture\n",
    "LZIP": b"LZIP packs\n",
    "NES": b"NES\x1b is a console\n",
    "dicom": b"x" * 128 + b"DICM\n",
    "ustar": b"x" * 257 + b"ustar  is tape\n",
    "SQLite": b"SQLite format 3 is stable\n",
    "latin": "BM à la carte, déjà vu\n".encode("latin-1"),
    "ftyp": b"abcdftypisom    mp42 is a film\n",
    "ÿû": "ÿûÿó est étrange\n".encode("latin-1"),
}


def _texts_like_magic() -> Iterable[Hostile]:
    for name, content in TEXTS_LIKE_MAGIC.items():
        yield Hostile(f"text that begins like {name}", content, "notes.txt", None, PLAIN, "text/plain", "text/plain")
    yield Hostile("text that begins like BM, as bmp", TEXTS_LIKE_MAGIC["BM"], "picture.bmp", "image/bmp", IMAGES)
    yield Hostile(
        "text that begins like MZ, as text", TEXTS_LIKE_MAGIC["MZ"], "a.csv", "text/csv", ("text/csv",), *["text/csv"] * 2
    )


def _false_declarations() -> Iterable[Hostile]:
    png = picture()
    yield Hostile("png as jpeg", png, "picture.jpg", "image/jpeg", IMAGES, None, "image/png")
    yield Hostile("png as jpeg where only jpeg is accepted", png, "picture.jpg", "image/jpeg", ("image/jpeg",))
    yield Hostile("png as pdf", png, "page.pdf", "application/pdf", ("application/pdf",))
    yield Hostile("png as text", png, "notes.txt", "text/plain", ("text/*",))
    yield Hostile("png as octet-stream", png, "picture.bin", "application/octet-stream", IMAGES, "image/png", "image/png")
    yield Hostile("png with a broken declaration", png, "picture.bin", "image", IMAGES, "image/png", "image/png")
    yield Hostile("noise as jpeg", noise(3000), "picture.jpg", "image/jpeg", IMAGES)
    yield Hostile(
        "noise as jpeg, anything accepted", noise(3000), "picture.jpg", "image/jpeg", ("*/*",), None, "application/octet-stream"
    )
    yield Hostile("noise as text", noise(3000), "notes.txt", "text/plain", ("text/*",))
    yield Hostile("noise as something unknown", noise(3000), "a.blend", "application/x-blender", ("application/*",))
    yield Hostile(
        "noise accepted by name",
        noise(3000),
        "a.blend",
        "application/x-blender",
        ("application/x-blender",),
        *["application/x-blender"] * 2,
    )
    yield Hostile("noise not declared", noise(3000), "a", None, ("image/*", "application/pdf"))
    yield Hostile(
        "noise not declared, accepted", noise(3000), "a", None, ("application/octet-stream",), *["application/octet-stream"] * 2
    )
    yield Hostile("noise as svg", noise(3000), "a.svg", "image/svg+xml", ("image/svg+xml",))
    yield Hostile("empty jpeg", b"", "picture.jpg", "image/jpeg", IMAGES)
    yield Hostile("empty svg", b"", "picture.svg", "image/svg+xml", ("image/svg+xml",))
    yield Hostile("empty, not declared, images", b"", "picture.jpg", None, IMAGES)
    skippable = b"\x50\x2a\x4d\x18\0\0\0\0" * 1024
    yield Hostile("a thousand empty frames", skippable, "picture.png", "image/png", IMAGES)
    chunks = b"\x89PNG\r\n\x1a\n" + (b"\0\0\0\0teXt\0\0\0\0" * 5000)
    yield Hostile("a png of empty chunks", chunks, "picture.png", "image/png", IMAGES, "image/png", "image/png")
    bombed = struct.pack(">I", 60_000) + b"ftyp" + b"zzzz" * 15_000
    yield Hostile("a film of brands", bombed, "film.mp4", "video/mp4", ("video/*",))
    deep = b"<!--" * 16_000
    yield Hostile("comments without end", deep, "picture.svg", "image/svg+xml", ("image/svg+xml",))
    bitmap = b"BM" + zlib.compress(noise(100))
    yield Hostile("a bitmap as tiff", bitmap, "picture.tif", "image/tiff", ("image/tiff",))
