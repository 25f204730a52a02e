"""The server of signed URLs limits their life, too: another program may share its key."""

from __future__ import annotations

from datetime import timedelta

from granite_storage import StoredObjectRef
from granite_storage.signing import UrlSigner

KEYS = {"k1": b"k" * 32}
REF = StoredObjectRef("docs", "memory", "doc/1/file/a.txt", 3, "")


def test_a_url_that_lasts_longer_than_allowed_here_grants_nothing() -> None:
    generous = UrlSigner("https://files.example", keys=KEYS)
    strict = UrlSigner("https://files.example", keys=KEYS, max_expires_in=timedelta(hours=1))
    long, short = (
        generous.sign(REF, expires_in=timedelta(minutes=minutes)).removeprefix("https://files.example/") for minutes in (61, 59)
    )
    assert generous.verify(long) is not None
    assert strict.verify(long) is None
    assert strict.verify(short) is not None
