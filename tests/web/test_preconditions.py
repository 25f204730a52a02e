"""Conditional requests, by the tables of RFC 9110, section 13."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from granite_storage import StorageManager, StoredObjectRef
from granite_storage.web._conditional import http_date
from tests.web.serving import HUNDRED, ask, serving, stored

STORED = "Sun, 06 Nov 1994 08:49:37 GMT"
BEFORE = "Sun, 06 Nov 1994 08:49:36 GMT"
AFTER = "Sun, 06 Nov 1994 08:49:38 GMT"
ETAG = '"{etag}"'
OTHER = '"other"'

CASES = [
    ({"if_match": ETAG}, 200),
    ({"if_match": "*"}, 200),
    ({"if_match": f"{OTHER}, {ETAG}"}, 200),
    ({"if_match": OTHER}, 412),
    ({"if_match": f"W/{ETAG}"}, 412),
    ({"if_match": "{etag}"}, 412),
    ({"if_match": ""}, 412),
    ({"if_match": ETAG, "if_unmodified_since": BEFORE}, 200),
    ({"if_match": OTHER, "if_unmodified_since": AFTER}, 412),
    ({"if_match": OTHER, "if_none_match": ETAG}, 412),
    ({"if_match": OTHER, "range": "bytes=0-0"}, 412),
    ({"if_match": ETAG, "range": "bytes=0-0"}, 206),
    ({"if_unmodified_since": STORED}, 200),
    ({"if_unmodified_since": BEFORE}, 412),
    ({"if_unmodified_since": BEFORE, "range": "bytes=0-0"}, 412),
    ({"if_unmodified_since": "yesterday"}, 200),
    ({"if_none_match": ETAG}, 304),
    ({"if_none_match": f"W/{ETAG}"}, 304),
    ({"if_none_match": "*"}, 304),
    ({"if_none_match": f'{OTHER} ,, "a,b" , {ETAG}'}, 304),
    ({"if_none_match": OTHER}, 200),
    ({"if_none_match": f"x{ETAG}"}, 200),
    ({"if_none_match": f"{ETAG}x"}, 200),
    ({"if_none_match": OTHER, "if_modified_since": AFTER}, 200),
    ({"if_none_match": ETAG, "if_modified_since": BEFORE}, 304),
    ({"if_none_match": ETAG, "range": "bytes=200-"}, 304),
    ({"if_none_match": OTHER, "range": "bytes=200-"}, 416),
    ({"if_modified_since": STORED}, 304),
    ({"if_modified_since": AFTER}, 304),
    ({"if_modified_since": BEFORE}, 200),
    ({"if_modified_since": "Sunday, 06-Nov-94 08:49:37 GMT"}, 304),
    ({"if_modified_since": "Sun Nov  6 08:49:37 1994"}, 304),
    ({"if_modified_since": "Fri, 31 Dec 9999 23:59:59 GMT"}, 304),
    ({"if_modified_since": "garbage"}, 200),
    ({"if_modified_since": "Sun, 31 Feb 1994 08:49:37 GMT"}, 200),
    ({"if_modified_since": "0"}, 200),
    ({"if_modified_since": "Sun, 06 Nov 1994 08:49:37 +0000"}, 200),
    ({"if_range": ETAG, "range": "bytes=0-0"}, 206),
    ({"if_range": f"W/{ETAG}", "range": "bytes=0-0"}, 200),
    ({"if_range": OTHER, "range": "bytes=0-0"}, 200),
    ({"if_range": OTHER, "range": "bytes=200-"}, 200),
    ({"if_range": STORED, "range": "bytes=0-0"}, 206),
    ({"if_range": BEFORE, "range": "bytes=0-0"}, 200),
    ({"if_range": AFTER, "range": "bytes=0-0"}, 200),
    ({"if_range": "garbage", "range": "bytes=0-0"}, 200),
    ({"if_range": ETAG}, 200),
]


@pytest.fixture
async def ref(manager: StorageManager) -> StoredObjectRef:
    return replace(await stored(manager, HUNDRED, "image/png"), created_at="1994-11-06T08:49:37.654321+00:00")


@pytest.mark.case("HTP-11", "HTP-12", "HTP-13")
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("headers", "status"), CASES, ids=[" ".join(f"{k}={v}" for k, v in case[0].items()) for case in CASES])
async def test_condition(
    manager: StorageManager, ref: StoredObjectRef, method: str, headers: dict[str, str], status: int
) -> None:
    etag = ref.checksum.removeprefix("sha256:")
    if method == "HEAD" and status in (206, 416):
        status = 200
    response = await ask(
        serving(manager, ref), method, **{name: value.replace("{etag}", etag) for name, value in headers.items()}
    )
    assert response.status_code == status
    whole = {200: HUNDRED, 206: HUNDRED[:1]}.get(status, b"") if method == "GET" else b""
    assert response.content == whole
    assert response.headers["etag"] == f'"{etag}"'
    assert response.headers["last-modified"] == STORED
    if status == 304:
        assert response.headers["cache-control"] == "private, no-cache"
        assert not {"content-type", "content-length"} & set(response.headers)


async def test_a_condition_is_not_for_other_methods(manager: StorageManager, ref: StoredObjectRef) -> None:
    response = await ask(serving(manager, ref), "POST", if_none_match="*", if_modified_since=AFTER)
    assert (response.status_code, response.content) == (200, HUNDRED)


async def test_a_date_of_this_second_validates_no_range(manager: StorageManager, ref: StoredObjectRef) -> None:
    future = replace(ref, created_at=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    date = (await ask(serving(manager, future), "HEAD")).headers["last-modified"]
    assert http_date(date) <= datetime.now(UTC)  # type: ignore[operator]
    fresh = replace(ref, created_at=datetime.now(UTC).isoformat())
    date = (await ask(serving(manager, fresh), "HEAD")).headers["last-modified"]
    now = http_date(date) == datetime.now(UTC).replace(microsecond=0)
    response = await ask(serving(manager, fresh), if_range=date, range="bytes=0-0")
    assert response.status_code == 200 or not now


@pytest.mark.case("HTP-22")
async def test_the_etag_is_of_the_content(manager: StorageManager, ref: StoredObjectRef) -> None:
    other = replace(await stored(manager, HUNDRED[::-1]), created_at=ref.created_at)
    same = replace(await stored(manager, HUNDRED), created_at=ref.created_at)
    tags = [(await ask(serving(manager, one))).headers["etag"] for one in (ref, other, same)]
    assert tags[0] == tags[2] != tags[1]
    assert not tags[0].startswith("W/")


async def test_an_object_without_checksum_has_a_weak_etag(manager: StorageManager, ref: StoredObjectRef) -> None:
    legacy = replace(ref, checksum="", created_at=None)
    response = await ask(serving(manager, legacy))
    tag = response.headers["etag"]
    assert (response.status_code, tag[:3]) == (200, 'W/"')
    modified = http_date(response.headers["last-modified"])
    assert modified is not None
    assert abs(modified - datetime.now(UTC)) < timedelta(minutes=1)
    assert (await ask(serving(manager, legacy), if_none_match=tag)).status_code == 304
    assert (await ask(serving(manager, legacy), if_match=tag)).status_code == 412
    assert (await ask(serving(manager, legacy), if_range=tag, range="bytes=0-0")).status_code == 200


@pytest.mark.case("HTP-13")
def test_dates() -> None:
    assert http_date("Sunday, 06-Nov-94 08:49:37 GMT") == datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)
    soon = datetime.now(UTC).year + 10
    assert http_date(f"Sunday, 06-Nov-{soon % 100:02} 08:49:37 GMT") == datetime(soon, 11, 6, 8, 49, 37, tzinfo=UTC)
    assert http_date("Mon, 01 Jan 0001 00:00:00 GMT") == datetime(1, 1, 1, tzinfo=UTC)  # what a client sends that has no date
    assert http_date("Thu Jan  1 00:00:00 0099") == datetime(99, 1, 1, tzinfo=UTC)
    assert http_date("Sat, 01 Jan 0000 00:00:00 GMT") is None
    assert http_date("Sun, 06 Nov 1994 08:49:61 GMT") is None
    assert http_date("Sun, \u0660\u0666 Nov 1994 08:49:37 GMT") is None
