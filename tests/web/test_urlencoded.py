"""URL-encoded forms: what they bring, whatever their cut, and what a hostile one costs."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import AsyncIterator
from urllib.parse import parse_qsl, urlencode

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_storage.web import MalformedRequestError, RequestTooLargeError, UploadLimits
from granite_storage.web._requests import read_fields
from tests.web.receiving import MIB, App, streamed

HEADERS = {"Content-Type": "application/x-www-form-urlencoded"}


async def read(*pieces: bytes, limits: UploadLimits | None = None) -> list[tuple[str, str]]:
    return await read_fields(streamed(pieces), limits or UploadLimits())


@settings(max_examples=200, deadline=None)
@given(
    body=st.lists(
        st.sampled_from(
            [b"a", b"%", b"%C3", b"%BC", b"%e2%82%ac", b"4", b"=", b"&", b"+", b" ", b";", b"\r\n", b"_", b"%3D", b"\xc3\xbc"]
        )
    )
)
def test_it_is_what_the_standard_library_reads_for_every_cut(body: list[bytes]) -> None:
    joined = b"".join(body)

    async def check() -> None:
        try:
            expected = parse_qsl(joined.decode(), keep_blank_values=True, errors="strict")
        except UnicodeDecodeError:
            with pytest.raises(MalformedRequestError):
                await read(joined)
            return
        for at in range(len(joined) + 1):
            assert await read(joined[:at], joined[at:]) == expected

    asyncio.run(check())


@pytest.mark.case("RE-01")
async def test_a_long_value_is_decoded_in_slices_without_a_seam() -> None:
    value = "".join(map(chr, range(1, 0x3000))) * 4 + "%" * 40_000 + "a%" * 40_000
    limits = UploadLimits(max_field_size=4 * MIB)
    assert await read(urlencode({"ä": value}).encode(), limits=limits) == [("ä", value)]


@pytest.mark.case("RE-01")
@pytest.mark.parametrize("unit", [b"%", b"%41", b"%C3%BC", b"a", b"a%", b"%4"])
async def test_a_field_is_limited_as_it_is_sent(client: httpx.AsyncClient, unit: bytes) -> None:
    """A MiB of it is taken; the next byte ends the request, however few characters it comes to, and no more of it is read."""
    sent: list[int] = []

    async def endless() -> AsyncIterator[bytes]:
        yield b"a="
        for _ in range(64):
            sent.append(MIB)
            yield (unit * (MIB // len(unit) + 1))[:MIB]

    response = await client.post("/form", content=endless(), headers=HEADERS)
    assert (response.status_code, response.json()["limit"], response.json()["maximum"]) == (413, "max_field_size", MIB)
    assert sum(sent) <= 2 * MIB
    with pytest.raises(RequestTooLargeError):
        await read(b"a" * MIB + b"=")
    assert len(await read(b"a" * (MIB - 1) + b"=")) == 1


@pytest.mark.case("RE-01")
@pytest.mark.parametrize("unit", [b"%", b"%41", b"%C3%BC", b"a%41", b"%zz", b"+", b"a"])
@pytest.mark.parametrize("is_one_field", [True, False])
async def test_a_hostile_form_does_not_hold_the_loop(unit: bytes, is_one_field: bool) -> None:
    limits = UploadLimits(max_field_size=4 * MIB)
    size = 4 * MIB if is_one_field else 4000
    field = unit * (size // len(unit))
    body = [field] if is_one_field else [field + b"&"] * 999
    holds: list[float] = []

    async def watch() -> None:
        while True:
            before = time.thread_time()  # of this thread alone: a busy machine does not count
            await asyncio.sleep(0)
            holds.append(time.thread_time() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    pieces = [piece[at : at + 65536] for piece in body for at in range(0, len(piece), 65536)]
    start = time.thread_time()
    fields = await read(*pieces, limits=limits)
    assert time.thread_time() - start < 1.0
    watching.cancel()
    assert len(fields) == len(body)
    assert max(holds, default=0.0) < 0.1


@pytest.mark.case("RE-01")
@pytest.mark.parametrize("unit", [b"%", b"%C3%BC"])
async def test_a_hostile_form_takes_no_more_memory_than_it_has_bytes_and_characters(unit: bytes) -> None:
    pieces = [unit * (65536 // len(unit))] * 16
    tracemalloc.start()
    try:
        await read(*pieces)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


async def test_fields_are_counted_by_their_separators(receiving: App, client: httpx.AsyncClient) -> None:
    receiving.limits = UploadLimits(max_fields=3)
    assert (await client.post("/form", content=b"a&b&c", headers=HEADERS)).json()["fields"] == [["a", ""], ["b", ""], ["c", ""]]
    for body in (b"a&b&c&d", b"&&&", b"&" * MIB):
        assert (await client.post("/form", content=body, headers=HEADERS)).json()["limit"] == "max_fields"
