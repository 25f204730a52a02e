"""Forms and bodies, well-formed and hostile, straight to the application."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from granite_storage import ConfigurationError, StorageBackend, StoredObjectRef
from granite_storage.orm import Attachment
from granite_storage.web import MissingFieldError, UploadForm, UploadLimits
from tests.web.receiving import BOUNDARY, CRLF, END, FORM, MIB, App, Document, part, sliced, stored_in, streamed

EVERY_KIND = pytest.mark.parametrize("backend", ["memory", "local", "s3-seaweedfs"], indirect=True)


async def post(client: httpx.AsyncClient, *pieces: bytes, path: str = "/form", **headers: str) -> httpx.Response:
    return await client.post(path, content=b"".join(pieces), headers=FORM | headers)


def file_content(size: int) -> bytes:
    """Bytes that are full of what begins a boundary."""
    random = os.urandom(size // 2)
    return (random + f"\r\n--{BOUNDARY[:-1]}\r\n-\r".encode() * (size // 30))[:size]


@EVERY_KIND
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 16, 1 << 22])
async def test_a_form_whatever_the_sizes_of_its_pieces(
    backend: StorageBackend, client: httpx.AsyncClient, receiving: App, size: int
) -> None:
    content = file_content(2 * MIB if size > 100 else 5000)
    form = b"".join(
        [
            CRLF,
            part("title", "Grüße".encode()),
            part("file", content, filename="a.bin", headers={"Content-Type": "text/x-a"}),
            part("tag", b"1"),
            part("ref", b"", filename="empty.txt"),
            part("tag", b"2"),
            END,
        ]
    )
    response = await client.post("/form", content=sliced(form, size), headers=FORM)
    assert response.status_code == 200
    found = response.json()
    assert found["fields"] == [["title", "Grüße"], ["tag", "1"], ["tag", "2"]]
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert found["files"][0] == ["file", {"size": len(content), "checksum": checksum, "name": "a.bin", "type": "text/x-a"}]
    assert found["files"][1][1]["size"] == 0
    assert len(await stored_in(receiving.manager)) == 2
    assert await receiving.forms[0].files["file"].read() == content


@EVERY_KIND
async def test_files_that_commit_with_their_rows(backend: StorageBackend, client: httpx.AsyncClient, receiving: App) -> None:
    files = [part("file", name.encode() * 1000, filename=name) for name in "ab"]
    assert (await post(client, part("title", b"x"), *files, END, path="/rows")).status_code == 201
    async with receiving.sessions() as session:
        documents = list(await session.scalars(select(Document).order_by(Document.id)))
    assert [await document.file.read() for document in documents if document.file] == [b"a" * 1000, b"b" * 1000]
    assert len(await stored_in(receiving.manager)) == 2


async def test_a_failure_after_the_commit_leaves_what_was_committed(client: httpx.AsyncClient, receiving: App) -> None:
    form = [part("title", b"x"), part("fail"), part("file", b"kept", filename="a"), END]
    assert (await post(client, *form, path="/rows")).status_code == 500
    async with receiving.sessions() as session:
        assert await (await session.scalars(select(Document))).one().file.read() == b"kept"  # type: ignore[union-attr]


async def test_a_failure_before_the_commit_leaves_nothing(client: httpx.AsyncClient, receiving: App) -> None:
    assert (await post(client, part("file", b"x", filename="a"), END, path="/rows")).status_code == 422  # no title
    assert isinstance(receiving.errors[0], MissingFieldError)
    assert await stored_in(receiving.manager) == []


@EVERY_KIND
async def test_what_a_failed_form_has_stored_is_removed(
    backend: StorageBackend, client: httpx.AsyncClient, receiving: App
) -> None:
    stored = [part("file", b"a" * 100_000, filename="a"), part("ref", b"b" * 6 * MIB, filename="b")]
    receiving.limits = UploadLimits(max_file_size=7 * MIB)
    for last in ([], [part("file", b"c" * 8 * MIB, filename="c"), END], [part("other", b"d", filename="d"), END]):
        assert (await post(client, *stored, *last)).status_code in {400, 413}
        assert await stored_in(receiving.manager) == []
    assert len(receiving.errors) == 3


async def test_a_discarded_form(client: httpx.AsyncClient, receiving: App) -> None:
    await post(client, part("file", b"a", filename="a"), part("ref", b"b", filename="b"), END)
    form: UploadForm = receiving.forms[0]
    file: Attachment = form.files["file"]
    ref: StoredObjectRef = form.files["ref"]
    await form.discard()
    assert file.is_pending
    assert await stored_in(receiving.manager) == [ref.location]
    await form.discard()
    assert await receiving.manager.exists(ref)


async def test_functions_as_targets(client: httpx.AsyncClient, receiving: App) -> None:
    form = [
        part("a", b"1"),
        part("size", b"x" * 70_000, filename="f"),
        part("b", b"2"),
        part("ignored", b"y" * MIB, filename="g"),
    ]
    found = (await post(client, *form, part("c", b"3"), END)).json()
    assert found["files"] == [["size", {"size": 70_000, "before": [["a", "1"]]}], ["ignored", None]]
    assert found["fields"] == [["a", "1"], ["b", "2"], ["c", "3"]]
    assert await stored_in(receiving.manager) == []


async def test_a_file_input_that_was_left_empty(client: httpx.AsyncClient) -> None:
    found = (await post(client, part("file", b"", filename=""), part("other", b"", filename=""), END)).json()
    assert found["files"] == []
    found = (await post(client, part("file", b"x", filename=""), END)).json()
    assert found["files"][0][1]["size"] == 1


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('filename="Grüße.txt"', "Grüße.txt"),
        ("filename=plain.txt", "plain.txt"),
        ("filename=\"a.txt\"; filename*=UTF-8''evil.html", "a.txt"),
        ('filename="../../etc/passwd"', "passwd"),
        ('filename="C:\\\\dir\\\\x.doc"', "x.doc"),
        ('filename="a\\"b.txt"', 'a"b.txt'),
        ('filename="a;b.txt"', "a;b.txt"),
        ('filename="a\x01\u202egnp.exe"', "agnp.exe"),
    ],
)
async def test_names(client: httpx.AsyncClient, disposition: str, name: str) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; {disposition}\r\n\r\nx\r\n'
    assert (await post(client, head.encode(), END)).json()["files"][0][1]["name"] == name


async def test_a_name_that_is_not_utf8(client: httpx.AsyncClient) -> None:
    found = await post(client, part("file", b"x", filename="a\udcff.txt"), END)
    assert found.json()["files"][0][1]["name"] == "a\ufffd.txt"
    assert (await post(client, part("a\udcff", b"x"), END)).status_code == 400
    assert (await post(client, part("a", b"\xff"), END)).status_code == 400


@pytest.mark.time_bound
@pytest.mark.case("MPP-07")
async def test_transfer_encodings_are_not_decoded(client: httpx.AsyncClient, receiving: App) -> None:
    content = b"aGVs bG8=" + b" " * MIB
    headers = {"Content-Transfer-Encoding": "base64"}
    await post(
        client, part("file", content, filename="a", headers=headers), part("ref", b"=41", filename="b", headers=headers), END
    )
    assert await receiving.forms[0].files["file"].read() == content


async def timed(client: httpx.AsyncClient, content: Any, headers: dict[str, str] = FORM, path: str = "/form") -> httpx.Response:
    """Post, and fail where it takes more than a second of work, or holds the loop up for long."""
    start = time.process_time()
    response = await client.post(path, content=content, headers=headers)
    assert time.process_time() - start < 1.0
    return response


HOSTILE = {
    "1,001 files": [part("file", b"", filename="a") * 1001, END],
    "100,000 fields": [part("a", b"1") * 100_000, END],
    "10,000 headers": [f"--{BOUNDARY}\r\n".encode() + b"".join(b"X-%d: y\r\n" % number for number in range(10_000))],
    "a header line of 1 MiB": [part("a", headers={"X": "y" * MIB}), END],
    "a header name of 1 MiB": [f"--{BOUNDARY}\r\n".encode() + b"X" * MIB],
    "a boundary that never comes": [b"--" + b"z" * 8 * MIB],
}


@pytest.mark.case("MPP-01")
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("size", [1000, 1 << 16, 1 << 24])
async def test_too_much_of_something(client: httpx.AsyncClient, receiving: App, name: str, size: int) -> None:
    response = await timed(client, sliced(b"".join(HOSTILE[name]), size))
    assert response.status_code in {400, 413}
    assert await stored_in(receiving.manager) == []


@pytest.mark.case("MPP-02")
@pytest.mark.parametrize("padding", [b"\r\n", b"\r", b"\n", b"\r\n-", b"-"])
@pytest.mark.parametrize("where", ["before", "after"])
async def test_padding(
    client: httpx.AsyncClient, receiving: App, caplog: pytest.LogCaptureFixture, padding: bytes, where: str
) -> None:
    form = part("file", b"x", filename="a") + END
    flood = padding * (8 * MIB // len(padding))
    response = await timed(client, sliced(flood + form if where == "before" else form + flood, 1 << 16))
    assert response.status_code in {400, 413}
    assert await stored_in(receiving.manager) == []
    assert len(caplog.records) < 10


async def test_a_little_padding_is_harmless(client: httpx.AsyncClient) -> None:
    assert (await post(client, CRLF * 100, part("a", b"1"), END, b"and more" * 100)).json()["fields"] == [["a", "1"]]


@pytest.mark.case("MPP-03")
@pytest.mark.parametrize("value", ["boundary=" + "\\" * 100_000, 'boundary="' + '\\"' * 50_000, ";" * 100_000, "; a=" * 30_000])
@pytest.mark.parametrize("where", ["request", "part"])
async def test_slow_options(client: httpx.AsyncClient, value: str, where: str) -> None:
    if where == "request":
        response = await timed(client, END, {"Content-Type": f"multipart/form-data; {value}"})
        assert response.status_code == 400
    else:
        response = await timed(client, part("a", headers={"Content-Type": f"text/plain; {value}"}) + END)
        assert response.json()["limit"] == "max_header_size"


@pytest.mark.case("MPP-03")
async def test_slow_options_within_the_limit(client: httpx.AsyncClient) -> None:
    hostile = 'a="' + ';"' * 4000
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=a; {hostile}\r\n\r\n\r\n"
    await timed(client, head.encode() * 50 + END)


async def endless(start: bytes, size: int, sent: list[int]) -> AsyncIterator[bytes]:
    """Yield a beginning, and then zeros, and tell how much was asked for."""
    yield start
    for _ in range(size // MIB):
        sent.append(MIB)
        yield bytes(MIB)


@pytest.mark.case("MPP-04", "LIM-01")
@pytest.mark.parametrize("name", ["field", "file", "body"])
async def test_more_than_the_limit_is_not_even_read(client: httpx.AsyncClient, receiving: App, name: str) -> None:
    receiving.limits = UploadLimits(max_size=None if name == "field" else 3 * MIB)
    sent: list[int] = []
    start = part("a" if name == "field" else "file", filename=None if name == "field" else "a").removesuffix(CRLF)
    content = endless(b"" if name == "body" else start, 2048 * MIB, sent)
    response = await client.request(*(("PUT", "/body/a") if name == "body" else ("POST", "/form")), content=content, headers=FORM)
    assert response.status_code == 413
    assert sum(sent) <= 5 * MIB
    assert await stored_in(receiving.manager) == []


async def test_fields_are_limited_together(client: httpx.AsyncClient, receiving: App) -> None:
    receiving.limits = UploadLimits(max_fields_size=1000, max_field_size=600)
    assert (await post(client, part("a", b"x" * 500) * 2, END)).status_code == 200
    assert (await post(client, part("a", b"x" * 600) * 2, END)).json()["limit"] == "max_fields_size"
    assert (await post(client, part("a", b"x" * 601), END)).json()["limit"] == "max_field_size"


@pytest.mark.case("MPP-05")
async def test_url_encoded_bodies(client: httpx.AsyncClient, receiving: App) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = await client.post("/form", content=b"a=1&b=%C3%BC+x&c=", headers=headers)
    assert response.json() == {"fields": [["a", "1"], ["b", "ü x"], ["c", ""]], "files": []}
    assert (await timed(client, b"a=1&" * 1_000_000, headers)).status_code == 413
    assert (await timed(client, streamed([b"a=1&" * 1_000] * 1_000), headers)).status_code == 413
    assert (await timed(client, b"a" * 5 * MIB, headers)).status_code == 413
    assert (await timed(client, b"a=" + b"b" * 2 * MIB, headers)).status_code == 413
    for wrong in (b"a=%ff", b"\xff=1"):
        assert (await timed(client, wrong, headers)).status_code == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "multipart/mixed; boundary=a"}, 415),
        (FORM | {"Content-Encoding": "gzip"}, 415),
        ({"Content-Type": f"{FORM['Content-Type']}; other={'x' * 1000}"}, 400),
        (FORM | {"Content-Range": "bytes 0-1/5"}, 400),
        ({"Content-Type": "multipart/form-data"}, 400),
        ({"Content-Type": 'multipart/form-data; boundary=""'}, 400),
        ({"Content-Type": f"multipart/form-data; boundary={'a' * 300}"}, 400),
    ],
)
async def test_refused_before_it_is_read(client: httpx.AsyncClient, headers: dict[str, str], status: int) -> None:
    sent: list[int] = []
    response = await client.post("/form", content=endless(b"", 10 * MIB, sent), headers=headers)
    assert response.status_code == status
    assert sent == []


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"--other\r\n",
        part("a", b"1"),
        part("a", b"1") + END[:-4],
        END.replace(b"--", b"-"),
        f"--{BOUNDARY}\r\nX: y\r\n\r\nz\r\n".encode() + END,
        f'--{BOUNDARY}\r\nContent-Disposition: attachment; name="a"\r\n\r\nz\r\n'.encode() + END,
        f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nz\r\n".encode() + END,
        part("a", headers={"Content-Disposition": 'form-data; name="b"'}) + END,
        part("file", b"x", filename="a", headers={"Content-Type": "a" * 300}) + END,
        part("file", b"x", filename="a", headers={"Content-Type": "ä/b"}) + END,
    ],
)
async def test_what_is_no_form(client: httpx.AsyncClient, receiving: App, form: bytes) -> None:
    response = await post(client, form)
    assert (response.status_code, response.headers["content-type"]) == (400, "application/problem+json")
    assert await stored_in(receiving.manager) == []


@EVERY_KIND
@pytest.mark.parametrize("query", ["", "?ref"])
async def test_a_body(backend: StorageBackend, client: httpx.AsyncClient, receiving: App, query: str) -> None:
    content = os.urandom(3 * MIB)
    response = await client.put(f"/body/a.txt{query}", content=sliced(content, 99_999), headers={"Content-Type": "text/plain"})
    checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert response.json() == {"size": len(content), "checksum": checksum, "name": "a.txt", "type": "text/plain"}
    assert len(await stored_in(receiving.manager)) == 1


@pytest.mark.parametrize(
    ("limits", "declared"),
    [(UploadLimits(max_file_size=10), 11), (UploadLimits(max_size=10), 11), (UploadLimits(), 500 * MIB)],
)
@pytest.mark.parametrize("query", ["", "?ref"])
async def test_a_body_that_is_declared_too_large(
    client: httpx.AsyncClient, receiving: App, limits: UploadLimits, declared: int, query: str
) -> None:
    receiving.limits = limits
    sent: list[int] = []
    headers = {"Content-Length": str(declared)}
    response = await client.put(f"/body/a{query}", content=endless(b"", 10 * MIB, sent), headers=headers)
    assert response.status_code == 413
    assert sent == []
    assert (await client.put("/body/a", content=b"x" * 10)).status_code == 200


@pytest.mark.time_bound
@pytest.mark.case("MPP-10")
@pytest.mark.parametrize("backend", ["local"], indirect=True)
async def test_a_large_file(backend: StorageBackend, client: httpx.AsyncClient, receiving: App) -> None:
    """The loop goes on meanwhile, and there is no temporary file but the store's own."""
    lags, spooled = [], []
    done = asyncio.Event()

    async def watch() -> None:
        before = set(os.listdir(tempfile.gettempdir()))
        while not done.is_set():
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - start - 0.005)
            spooled.extend(set(os.listdir(tempfile.gettempdir())) - before)

    def form() -> Iterator[bytes]:
        yield part("file", filename="a").removesuffix(CRLF)
        chunk = os.urandom(MIB)
        for _ in range(300):
            yield chunk
        yield CRLF + END

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    response = await client.post("/form", content=streamed(form()), headers=FORM)
    done.set()
    await watching
    assert response.json()["files"][0][1]["size"] == 300 * MIB
    assert max(lags) < 0.1
    assert spooled == []


@pytest.mark.time_bound
@pytest.mark.case("MPP-10")
async def test_a_file_full_of_what_looks_like_boundaries(client: httpx.AsyncClient, receiving: App) -> None:
    """The grammar takes its time for these; the loop goes round meanwhile, also where the server hands over much at once."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            start = time.thread_time()  # of this thread alone: a busy machine does not count
            await asyncio.sleep(0.001)
            lags.append(time.thread_time() - start)

    content = f"\r\n--{BOUNDARY}x".encode() * (6 * MIB // 16)
    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    response = await post(client, part("file", content, filename="a"), END)
    await asyncio.sleep(0.01)
    watching.cancel()
    assert response.json()["files"][0][1]["size"] == len(content)
    assert max(lags) < 0.1


@pytest.mark.parametrize("limits", [{"max_files": -1}, {"max_fields": None}, {"max_size": "1"}, {"max_size": True}])
def test_limits_that_cannot_be(limits: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(limits))):
        UploadLimits(**limits)
