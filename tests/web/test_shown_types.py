"""Which media types are shown in the browser's window, and what the answer says of them."""

from __future__ import annotations

import pytest

from granite_storage._headers import INLINE_TYPES, content_disposition, content_security_policy, served_type
from tests.web.serving import ask, memory_manager, parts_of, serving, stored


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ("text/plain", "text/plain; charset=utf-8"),
        ("text/plain;", "text/plain; charset=utf-8"),
        ("Text/Plain; format=flowed", "Text/Plain; format=flowed; charset=utf-8"),
        ("text/csv", "text/csv; charset=utf-8"),
        ("text/plain; charset=windows-1252", "text/plain; charset=windows-1252"),
        ("text/plain;CHARSET=utf-16", "text/plain;CHARSET=utf-16"),
        ("text/html", "application/octet-stream"),
        ("image/png", "image/png"),
        ("application/json", "application/json"),
    ],
)
def test_text_is_said_to_be_utf8(given: str, served: str) -> None:
    """Browsers take text without a charset for windows-1252."""
    assert served_type(given) == served


async def test_in_every_part() -> None:
    async with memory_manager() as manager:
        ref = await stored(manager, "caf\u00e9".encode() * 1000, "text/plain")
        app = serving(manager, ref, disposition="inline")
        shown = (await ask(app)).headers
        assert (shown["content-type"], shown["content-disposition"]) == ("text/plain; charset=utf-8", "inline")
        several = await ask(app, range="bytes=0-4,2000-2004")
        assert len(parts_of(several)) == 2
        assert several.content.count(b"Content-Type: text/plain; charset=utf-8\r\n") == 2


@pytest.mark.parametrize("content_type", ["video/quicktime", "audio/x-m4a", "image/heic", "image/heif", "audio/x-wav"])
def test_what_phones_record(content_type: str) -> None:
    assert content_disposition("inline", None, content_type) == "inline"


@pytest.mark.case("RB-11")
@pytest.mark.parametrize("content_type", sorted(INLINE_TYPES))
def test_a_player_may_load_its_source_and_nothing_else_may(content_type: str) -> None:
    plays = content_type.startswith(("audio/", "video/"))
    assert content_security_policy(content_type.upper()) == (
        "default-src 'none'; media-src 'self'" if plays else "sandbox; default-src 'none'"
    )
