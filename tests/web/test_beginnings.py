"""How files of common media types may begin: unusual ones that are what they claim, and programs that are not."""

from __future__ import annotations

import pytest

from granite_storage.web._direct_state import HEAD_SIZE, contradicts

PROGRAM = b"MZ\x90\x00\x03\x00\x00\x00\x04\x00\x00\x00\xff\xff\x00\x00".ljust(HEAD_SIZE, b"\x00")
PAGE = b"<!doctype html><script>alert(1)</script>"


@pytest.mark.parametrize(
    ("content_type", "head"),
    [
        ("image/tiff", b"II\x2b\x00\x08\x00\x00\x00"),  # BigTIFF
        ("image/tiff", b"MM\x00\x2b\x00\x08\x00\x00"),
        ("image/tiff", b"II*\x00"),
        ("audio/wav", b"RF64\xff\xff\xff\xffWAVEds64"),
        ("audio/x-wav", b"BW64\xff\xff\xff\xffWAVEds64"),
        ("application/pdf", b"\xef\xbb\xbf%PDF-1.7"),
        ("application/pdf", b" \r\n\t%PDF-1.4"),
        ("application/pdf", b"\x00" * 500 + b"%PDF-1.4"),
        ("video/mp4", b"\x00\x00\x00\x08wide\x00\x00\x10\x00mdat"),
        ("video/mp4", b"\x00\x00\x10\x00moov"),
        ("video/quicktime", b"\x00\x00\x10\x00mdat"),
        ("video/quicktime", b"\x00\x00\x00\x14ftypqt  "),
        ("audio/x-m4a", b"\x00\x00\x00\x1cftypM4A "),
        ("audio/mpeg", b"ID3\x04\x00"),
        ("audio/mpeg", b"\xff\xfb\x90\x44"),
        ("audio/mpeg", b"\xff\xf3\x40\xc0"),
        ("audio/mpeg", b"\x00" * 200 + b"\xff\xfb\x90"),
        ("image/heic", b"\x00\x00\x00\x18ftypheic"),
        ("image/jpg", b"\xff\xd8\xff\xe0"),
        ("application/x-zip-compressed; a=b", b"PK\x03\x04"),
    ],
)
def test_what_is_what_it_claims(content_type: str, head: bytes) -> None:
    assert not contradicts(head[:HEAD_SIZE], content_type)


@pytest.mark.parametrize(
    "head", [PROGRAM, PAGE, b"", b"\x7fELF\x02\x01\x01", b"#!/bin/sh\n"], ids=["exe", "page", "empty", "elf", "script"]
)
@pytest.mark.parametrize(
    "content_type",
    [
        "application/pdf",
        "audio/mpeg",
        "audio/mp4",
        "audio/wav",
        "audio/x-m4a",
        "audio/webm",
        "image/heic",
        "image/jpg",
        "image/tiff",
        "video/mp4",
        "video/quicktime",
    ],
)
def test_what_is_something_else(content_type: str, head: bytes) -> None:
    assert contradicts(head, content_type)


def test_a_page_with_a_pdf_in_it() -> None:
    assert contradicts(PAGE + b"%PDF-1.7", "application/pdf")
