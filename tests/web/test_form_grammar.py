"""The grammar of multipart/form-data: the same answer for every cut of every body, and no part lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import httpx
import pytest
import python_multipart
from werkzeug.sansio import multipart as werkzeug

from granite_storage.web import MalformedRequestError, RequestError, RequestTooLargeError, UploadLimits
from granite_storage.web._requests import MultipartParser, PartHead, _End, content_type_to_keep, parse_parameters
from tests.processor_time import fastest
from tests.web.receiving import App, sliced, stored_in

HEADERS = {"Content-Type": "multipart/form-data; boundary=b"}
LIMITS = UploadLimits(max_padding=40, max_header_size=120, max_headers=4, max_fields=4, max_files=3)

Part = tuple[str, str | None, str | None, bytes]


def disposition(rest: str) -> bytes:
    return f"Content-Disposition: form-data; {rest}\r\n".encode()


A = disposition('name="a"')
FILE = disposition('name="f"; filename="x.txt"') + b"Content-Type: text/plain\r\n"

# Bodies with the boundary "b", and the parts in them.
FORMS: dict[str, tuple[bytes, list[Part]]] = {
    "a field and a file": (
        b"--b\r\n" + A + b"\r\n1\r\n--b\r\n" + FILE + b"\r\ncontent\r\n--b--\r\n",
        [("a", None, None, b"1"), ("f", "x.txt", "text/plain", b"content")],
    ),
    "nothing": (b"--b--\r\n", []),
    "nothing, without the end of the line": (b"--b--", []),
    "a preamble": (b"a preamble\r\n--b\r\n" + A + b"\r\n1\r\n--b--", [("a", None, None, b"1")]),
    "a preamble with what looks like a boundary": (
        b"x--b\r\n--bb\r\n --b\r\n--\r\n--b\r\n" + A + b"\r\n1\r\n--b--\r\n",
        [("a", None, None, b"1")],
    ),
    "blanks and line ends, and nothing": (b" \t\r\n\n\r\n--b--\r\n", []),
    "line ends before the first boundary": (b"\r\n\r\n\n\n--b\r\n" + A + b"\r\n1\r\n--b--\r\n", [("a", None, None, b"1")]),
    "dashes before the first boundary": (b"-\r\n--\r\n--b\r\n" + A + b"\r\n1\r\n--b--\r\n", [("a", None, None, b"1")]),
    "an epilogue": (b"--b\r\n" + A + b"\r\n1\r\n--b--\r\nmore\r\n--b\r\n", [("a", None, None, b"1")]),
    "padding after the boundaries": (
        b"--b \t\r\n" + A + b"\r\n1\r\n--b  \r\n" + A + b"\r\n2\r\n--b-- \t \r\n",
        [("a", None, None, b"1"), ("a", None, None, b"2")],
    ),
    "a last line that ends with a line feed alone": (b"--b\r\n" + A + b"\r\n1\r\n--b--\n", [("a", None, None, b"1")]),
    "parts without data": (
        b"--b\r\n" + A + b"\r\n\r\n--b\r\n" + FILE + b"\r\n\r\n--b--\r\n",
        [("a", None, None, b""), ("f", "x.txt", "text/plain", b"")],
    ),
    "parts whose headers are followed at once by a delimiter": (
        b"--b\r\n" + A + b"\r\n--b\r\n" + FILE + b"\r\n--b\r\n" + A + b"\r\n3\r\n--b\r\n" + A + b"\r\n--b--\r\n",
        [("a", None, None, b""), ("f", "x.txt", "text/plain", b""), ("a", None, None, b"3"), ("a", None, None, b"")],
    ),
    "parts that end with their headers": (
        b"--b\r\n" + A + b"--b\r\n" + FILE + b"--b\r\n" + A + b"\r\n3\r\n--b\r\n" + A + b"--b--\r\n",
        [("a", None, None, b""), ("f", "x.txt", "text/plain", b""), ("a", None, None, b"3"), ("a", None, None, b"")],
    ),
    "data that looks like boundaries": (
        b"--b\r\n" + FILE + b"\r\n--bx\r\n--b-x\r\n--b--x\r\n--bb\r\r\n--\r\n-\r\n--b\r\r\n--b--\r\n",
        [("f", "x.txt", "text/plain", b"--bx\r\n--b-x\r\n--b--x\r\n--bb\r\r\n--\r\n-\r\n--b\r")],
    ),
    "data that begins with a blank or a line end": (
        b"--b\r\n" + A + b"\r\n \r\n--b\r\n" + A + b"\r\n\r\n\r\n--b\r\n" + A + b"\r\n\t--b\r\n--b--\r\n",
        [("a", None, None, b" "), ("a", None, None, b"\r\n"), ("a", None, None, b"\t--b")],
    ),
    "folded headers": (
        b'--b\r\nContent-Disposition: form-data;\r\n name="f";\r\n\tfilename="x.txt"\r\nContent-Type:\r\n  text/plain\r\n'
        b"\r\n1\r\n--b--\r\n",
        [("f", "x.txt", "text/plain", b"1")],
    ),
    "headers in every case, and ones that say nothing": (
        b"--b\r\ncontent-disposition:FORM-DATA; NAME=a\r\nContent-Transfer-Encoding: base64\r\nX:\r\n\r\nMQ==\r\n--b--\r\n",
        [("a", None, None, b"MQ==")],
    ),
    "an empty media type": (
        b"--b\r\n" + A[:-2] + b'; filename="x"\r\nContent-Type: \r\n\r\n1\r\n--b--\r\n',
        [("a", "x", None, b"1")],
    ),
}

ERRORS: dict[str, tuple[bytes, type[RequestError], str]] = {
    "empty": (b"", MalformedRequestError, "cut off"),
    "no boundary": (b"a preamble and no more", MalformedRequestError, "cut off"),
    "another boundary": (b"--c\r\nX: y\r\n\r\n1\r\n--c--\r\n", MalformedRequestError, "cut off"),
    "cut off in the first boundary": (b"--", MalformedRequestError, "cut off"),
    "cut off after the first boundary": (b"--b", MalformedRequestError, "cut off"),
    "cut off in a header": (b"--b\r\nContent-Disp", MalformedRequestError, "cut off"),
    "cut off after a header": (b"--b\r\n" + A, MalformedRequestError, "cut off"),
    "cut off in the data": (b"--b\r\n" + A + b"\r\n1", MalformedRequestError, "cut off"),
    "cut off in the last boundary": (b"--b\r\n" + A + b"\r\n1\r\n--b-", MalformedRequestError, "cut off"),
    "cut off at a boundary": (b"--b\r\n" + A + b"\r\n1\r\n--b\r\n", MalformedRequestError, "cut off"),
    "a part without headers": (b"--b\r\n\r\n1\r\n--b--\r\n", MalformedRequestError, "Content-Disposition"),
    "a part with nothing": (b"--b\r\n--b--\r\n", MalformedRequestError, "Content-Disposition"),
    "a header without a colon": (b"--b\r\nContent-Disposition\r\n\r\n--b--", MalformedRequestError, "cannot be read"),
    "a blank before the colon": (b"--b\r\nX : y\r\n\r\n--b--\r\n", MalformedRequestError, "cannot be read"),
    "a line feed alone in a header": (b"--b\r\n" + A[:-2] + b"\nX: y\r\n\r\n--b--\r\n", MalformedRequestError, "cannot be read"),
    "a NUL in a header": (b"--b\r\nX: \0\r\n\r\n--b--\r\n", MalformedRequestError, "cannot be read"),
    "a header twice": (b"--b\r\n" + A + A + b"\r\n1\r\n--b--\r\n", MalformedRequestError, "twice"),
    "a parameter twice": (b"--b\r\n" + disposition("name=a; name=b") + b"\r\n\r\n--b--", MalformedRequestError, "twice"),
    "line feeds alone": (b"--b\n" + A[:-2] + b"\n\n1\n--b--\n", MalformedRequestError, "line feed alone"),
    "a first boundary that ends with a line feed alone": (
        b"--b\n" + A + b"\r\n1\r\n--b--\r\n",
        MalformedRequestError,
        "line feed alone",
    ),
    "a boundary that ends with a line feed alone, before one that does not": (
        b"--b\n" + A + b"\r\n1\r\n--b\r\n" + A + b"\r\n2\r\n--b--\r\n",
        MalformedRequestError,
        "line feed alone",
    ),
    "a boundary after a preamble that ends with a line feed alone": (
        b"x\r\n--b\n" + A + b"\r\n1\r\n--b--\r\n",
        MalformedRequestError,
        "line feed alone",
    ),
    "a second boundary that ends with a line feed alone": (
        b"--b\r\n" + A + b"\r\n1\r\n--b\n" + A + b"\r\n2\r\n--b--\r\n",
        MalformedRequestError,
        "line feed alone",
    ),
    "blanks and a line feed alone after a boundary": (b"--b \n" + A + b"\r\n1\r\n--b--\r\n", MalformedRequestError, "blanks"),
    "a first boundary that ends with a carriage return alone": (
        b"--b\r" + A[:15] + b"\r\n1\r\n--b--\r\n",
        MalformedRequestError,
        "no part",
    ),
    "a preamble and no part": (b"a preamble\r\n--b--\r\n", MalformedRequestError, "no part"),
    "another boundary before the last one": (b"--c\r\nX: y\r\n--b--", MalformedRequestError, "no part"),
    "too much before the first boundary": (b"x" * 39 + b"\r\n--b--\r\n", RequestTooLargeError, "max_padding"),
    "much too much before the first boundary": (b"x" * 100, RequestTooLargeError, "max_padding"),
    "too much after the last boundary": (b"--b--\r\n" + b"x" * 41, RequestTooLargeError, "max_padding"),
    "too long a header": (b"--b\r\nX: " + b"y" * 118 + b"\r\n\r\n--b--\r\n", RequestTooLargeError, "max_header_size"),
    "too long a folded header": (b"--b\r\nX: " + b"y" * 30 + b"\r\n " * 15 + b"y" * 50, RequestTooLargeError, "max_header_size"),
    "a header with too many folds": (b"--b\r\nX: " + b"y\r\n " * 20 + b"\r\n\r\n", MalformedRequestError, "too many lines"),
    "too long a header with too many folds": (b"--b\r\nX: " + b"yyyyyyy\r\n " * 20, RequestTooLargeError, "max_header_size"),
    "a boundary with blanks and more": (b"--b\r\n" + A + b"\r\n1\r\n--b \tx\r\n--b--", MalformedRequestError, "blanks"),
    "a boundary with more blanks than any": (b"--b\r\n" + A + b"\r\n--b" + b" " * 65, MalformedRequestError, "blanks"),
    "too long an endless header": (b"--b\r\n" + b"y" * 200, RequestTooLargeError, "max_header_size"),
    "too many headers": (b"--b\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\nE: 5\r\n\r\n", RequestTooLargeError, "max_headers"),
    "too many fields": ((b"--b\r\n" + A + b"\r\n\r\n") * 5 + b"--b--", RequestTooLargeError, "max_fields"),
    "too many files": ((b"--b\r\n" + FILE + b"\r\n\r\n") * 4 + b"--b--", RequestTooLargeError, "max_files"),
}


def read(pieces: Iterable[bytes], limits: UploadLimits = LIMITS, *, keeps: bool = True) -> list[Part]:
    """Read a form that arrives in pieces; its data is kept unless it is said otherwise."""
    parser = MultipartParser(b"b", limits)
    parts: list[Part] = []
    ended = False
    for piece in (*pieces, None):
        if not (ended and piece is None):
            parser.feed(piece)
        while (event := parser.next_event()) is not None:
            if isinstance(event, PartHead):
                parts.append((event.name, event.filename, event.content_type, b""))
            elif event is _End.FORM:
                ended = True
            elif keeps and not isinstance(event, _End):
                parts[-1] = (*parts[-1][:3], parts[-1][3] + bytes(event))
    if not ended:
        parser.feed(None)
    return parts


def answer(pieces: Iterable[bytes]) -> Any:
    try:
        return read(pieces)
    except RequestTooLargeError as error:
        return type(error), error.limit
    except RequestError as error:
        return type(error), str(error)


def cuts(body: bytes) -> Iterable[Sequence[bytes]]:
    """Every cut in two, all bytes one by one, and some cuts in many."""
    yield from ((body[:at], body[at:]) for at in range(len(body) + 1))
    yield [bytes([byte]) for byte in body]
    dice = random.Random(len(body))
    for _ in range(50):
        places = sorted(dice.choices(range(len(body) + 1), k=dice.randrange(2, 8)))
        yield [body[start:end] for start, end in itertools.pairwise([0, *places, len(body)])]


@pytest.mark.case("RD-03", "RD-06", "RD-07")
@pytest.mark.parametrize("name", FORMS)
def test_every_cut_of_every_form_gives_the_same_parts(name: str) -> None:
    body, parts = FORMS[name]
    assert read([body]) == parts
    for pieces in cuts(body):
        assert read(pieces) == parts, pieces


@pytest.mark.case("RD-03")
@pytest.mark.parametrize("name", ERRORS)
def test_every_cut_of_what_is_no_form_gives_the_same_error(name: str) -> None:
    body, kind, what = ERRORS[name]
    found = answer([body])
    assert found[0] is kind
    assert what in found[1]
    for pieces in cuts(body):
        assert answer(pieces) == found, pieces


@pytest.mark.case("RD-03")
def test_every_cut_in_three() -> None:
    body = (
        b"p\r\n--b\r\n"
        + disposition("name=a")
        + b"\r\n--b\r\n"
        + disposition("name=f; filename=x")
        + b"\r\n\r\n--bb\r\n--b--\r\n"
    )
    parts = read([body])
    assert parts == [("a", None, None, b""), ("f", "x", None, b"\r\n--bb")]
    for first, second in itertools.combinations(range(len(body)), 2):
        assert read([body[:first], body[first:second], body[second:]]) == parts


@pytest.mark.case("RD-03")
def test_bodies_that_were_broken_at_random() -> None:
    """Whatever they are, no cut changes the answer."""
    dice = random.Random(15)
    whole = FORMS["a field and a file"][0]
    pieces = [b"\r", b"\n", b"\r\n", b"--", b"--b", b"-", b" ", b"b", b":", b'"', b"\r\n--b", b"\r\n\r\n", b"--b--", b"\0"]
    for _ in range(300):
        body = whole
        for _ in range(dice.randrange(1, 5)):
            at = dice.randrange(len(body) + 1)
            body = body[:at] + dice.choice(pieces) + body[at + dice.randrange(3) :]
        found = answer([body])
        for at in range(0, len(body), 3):
            assert answer([body[:at], body[at:]]) == found, body
        assert answer([bytes([byte]) for byte in body]) == found, body


@pytest.mark.parametrize("name", [name for name in FORMS if "like a boundary" not in name])
def test_werkzeug_reads_the_same_parts(name: str) -> None:
    """But for what is a delimiter to it wherever it stands, or without padding."""
    body, parts = FORMS[name]
    if name in {"parts that end with their headers", "data that looks like boundaries", "line ends before the first boundary"}:
        return
    decoder = werkzeug.MultipartDecoder(b"b")
    decoder.receive_data(body)
    decoder.receive_data(None)
    found: list[Any] = []
    while not isinstance(event := decoder.next_event(), werkzeug.Epilogue):
        if isinstance(event, werkzeug.Field | werkzeug.File):
            filename = event.filename if isinstance(event, werkzeug.File) else None
            found.append([event.name, filename, event.headers.get("content-type") or None, b""])
        elif isinstance(event, werkzeug.Data):
            found[-1][3] += event.data
    assert found == [list(part) for part in parts]


@pytest.mark.case("RE-11")
@pytest.mark.parametrize("unit", [b"\r\n--bx", b"\r\n--b-", b"\r\n--", b"\r", b"-"])
def test_data_that_looks_like_boundaries_costs_no_more_than_with_python_multipart(unit: bytes) -> None:
    body = b"--b\r\n" + FILE + b"\r\n" + unit * ((1 << 20) // len(unit)) + b"\r\n--b--\r\n"
    pieces = [body[start : start + 65536] for start in range(0, len(body), 65536)]

    def theirs() -> None:
        parser = python_multipart.MultipartParser(b"b", {})
        for piece in pieces:
            parser.write(piece)

    assert fastest(lambda: read(pieces, UploadLimits(), keeps=False)) < fastest(theirs) * 1.5 + 0.01


@pytest.mark.case("RD-07")
@pytest.mark.parametrize(
    ("header", "parameters"),
    [
        ('form-data; name="a"', {"name": "a"}),
        ('form-data; name="a%22b%0D%0Ac%0d%20d"', {"name": 'a"b\r\nc\r%20d'}),
        ('form-data; name=a%22; filename="%22.txt"', {"name": "a%22", "filename": '".txt'}),
        (r'form-data; name="a\"b\\c"; filename="C:\dir\x.doc"', {"name": 'a"b\\c', "filename": r"C:\dir\x.doc"}),
        (r'form-data; name="a"; filename="ends with\"', {"name": "a", "filename": "ends with\\"}),
        (r'form-data; filename="ends with\"; name="a"', {"name": "a", "filename": "ends with\\"}),
        ('form-data; name="a"; filename="in "quotes".txt"', {"name": "a", "filename": 'in "quotes".txt'}),
        ('form-data; name="a;b"; filename=";"', {"name": "a;b", "filename": ";"}),
        ("form-data;name=a ;  filename = x y ;", {"name": "a", "filename": "x y"}),
        ("form-data ; NAME=a;; ;", {"name": "a"}),
        ('form-data; name=""; filename=', {"name": "", "filename": ""}),
        ("form-data; name=a; filename*=UTF-8''x", {"name": "a", "filename*": "UTF-8''x"}),
        ("form-data" + "".join(f"; p{number}=x" for number in range(16)), {f"p{number}": "x" for number in range(16)}),
    ],
)
def test_parameters(header: str, parameters: dict[str, str]) -> None:
    found = parse_parameters(header.encode(), is_of_form=True)
    assert found == (b"form-data", {name.encode(): value.encode() for name, value in parameters.items()})


@pytest.mark.case("RD-07")
@pytest.mark.parametrize(
    "given",
    [
        "text/plain",
        "application/vnd.oasis.opendocument.text",
        "image/svg+xml",
        "x-a!#$%&'*+.^_`|~/0",
        "text/plain;charset=utf-8",
        'text/plain ;  charset="utf-8" ; a=b',
        r'text/plain; x="a\"b\\; c=d, e"',
        'text/plain; x=""',
        "text/plain;",
        "text/plain;; ;a=b",
    ],
)
def test_media_types_of_files(given: str) -> None:
    assert content_type_to_keep(f" {given}\t") == given
    assert read([file_of(given)], UploadLimits()) == [("f", "x", given, b"1")]


@pytest.mark.parametrize("given", ["", " ", "\t "])
def test_no_media_type_of_a_file(given: str) -> None:
    assert content_type_to_keep(given) is None


@pytest.mark.case("RD-07")
@pytest.mark.parametrize(
    "given",
    [
        ";;;;",
        "text/html, text/plain",
        "text/plain; a=b, text/html",
        r'text/plain; x="a\"b',
        'text/plain; x="a"b',
        'text/plain; x="a\\',
        'text/plain; x="\tb\x01"',
        "text",
        "text/",
        "/plain",
        "text/plain/more",
        "text /plain",
        "text/ plain",
        "text/pl ain",
        "text/plain a=b",
        "text/plain; a",
        "text/plain; a=",
        "text/plain; a =b",
        "text/plain; a= b",
        "text/plain; =b",
        "text/plain; a=b c",
        "<text/plain>",
        "text/plåin",
        'text/plain; x="å"',
        "text/" + "x" * 251,
    ],
)
def test_media_types_of_files_that_are_refused(given: str) -> None:
    with pytest.raises(MalformedRequestError, match="not a media type"):
        content_type_to_keep(given)
    with pytest.raises(MalformedRequestError, match="not a media type"):
        read([file_of(given)], UploadLimits())


def file_of(content_type: str) -> bytes:
    headers = b"Content-Disposition: form-data; name=f; filename=x\r\nContent-Type:" + content_type.encode("latin-1")
    return b"--b\r\n" + headers + b"\r\n\r\n1\r\n--b--"


@pytest.mark.case("RE-11")
@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("form-data" + ";" * 17, "too many"),
        ("form-data" + "; a=b" * 17, "twice"),
        ("form-data" + "".join(f"; p{number}=x" for number in range(17)), "too many"),
        ('form-data; a="' + ';"' * 2000, "cannot be read"),
        ('form-data; a="' + "\\" * 200, "cannot be read"),
        ('form-data; a="' + '\\"' * 257 + '"', "too many backslashes"),
        ('form-data; a="x" y', "cannot be read"),
        ("form-data; a b=x", "cannot be read"),
        ("form-data; =x", "cannot be read"),
        ('form-data; a="b', "cannot be read"),
    ],
)
def test_parameters_that_are_refused(header: str, message: str) -> None:
    with pytest.raises(MalformedRequestError, match=message):
        parse_parameters(header.encode())
    with pytest.raises(MalformedRequestError, match="too many percent signs"):
        parse_parameters(b'form-data; name="' + b"%22" * 257 + b'"', is_of_form=True)


@pytest.mark.case("RD-07")
async def test_a_part_with_an_extended_name_alone_is_a_file(client: httpx.AsyncClient) -> None:
    for extended, name in (("UTF-8''a%20%E2%82%AC.txt", "a €.txt"), ("utf-8'en'x.txt", "x.txt"), ("x.txt", "x.txt")):
        form = f'--b\r\nContent-Disposition: form-data; name="file"; filename*={extended}\r\n\r\nx\r\n--b--'
        found = (await client.post("/form", content=form.encode(), headers=HEADERS)).json()
        assert found["fields"] == []
        assert [(field, file["name"], file["size"]) for field, file in found["files"]] == [("file", name, 1)]


@pytest.mark.case("RD-03", "RD-06")
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
async def test_a_form_over_http_in_pieces(client: httpx.AsyncClient, receiving: App, size: int) -> None:
    form = b"preamble\r\n--b\r\n" + disposition('name="file"; filename="a"') + b"\r\n--b\r\n" + A + b"\r\n1\r\n--b--\r\n"
    response = await client.post("/form", content=sliced(form, size), headers=HEADERS)
    assert response.json()["fields"] == [["a", "1"]]
    assert [(name, file["size"]) for name, file in response.json()["files"]] == [("file", 0)]
    assert len(await stored_in(receiving.manager)) == 1


@pytest.mark.parametrize("boundary", ['"a\x01b"', '""', "a" * 257])
async def test_boundaries_that_are_refused(client: httpx.AsyncClient, boundary: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    response = await client.post("/form", content=b"--b--", headers=headers)
    assert response.status_code == 400
