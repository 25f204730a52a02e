"""Which files a form may have, what the application sees of them, and what becomes of those that no row takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from granite_storage import ConfigurationError
from granite_storage.contrib.litestar import provide_upload_form
from granite_storage.exceptions import ConsumedSourceError
from granite_storage.orm import Attachment
from granite_storage.web import (
    FileList,
    FilePart,
    MalformedRequestError,
    MissingFieldError,
    UploadForm,
    UploadLimits,
    install_error_handlers,
    stream_upload,
    upload_body,
    upload_form,
)
from tests.web.receiving import BOUNDARY, END, FORM, App, Document, part, stored_in

Serve = Callable[..., httpx.AsyncClient]


def iter_nothing(_: FilePart) -> Iterator[None]:
    yield


async def read_if_whole(file: FilePart) -> bytes | None:
    try:
        return b"".join([bytes(chunk) async for chunk in file])
    except MalformedRequestError:
        return None


@pytest.fixture
async def serve(receiving: App) -> AsyncIterator[Serve]:
    """Serve an endpoint of FastAPI."""
    clients: list[httpx.AsyncClient] = []

    def serve(endpoint: Any, *, handlers: bool = True, **options: Any) -> httpx.AsyncClient:
        app = FastAPI()
        if handlers:
            install_error_handlers(app)
        app.add_api_route("/", endpoint, methods=["POST"], **options)
        clients.append(httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test"))
        return clients[-1]

    yield serve
    for client in clients:
        await client.aclose()


async def post(client: httpx.AsyncClient, *parts: bytes) -> httpx.Response:
    return await client.post("/", content=b"".join([*parts, END]), headers=FORM)


def endpoint_with(dependency: Any, work: Callable[[Any], Any]) -> Any:
    async def endpoint(received) -> Any:  # type: ignore[no-untyped-def]
        return await work(received)

    endpoint.__annotations__["received"] = Annotated[Any, Depends(dependency)]
    return endpoint


async def names(form: UploadForm) -> Any:
    return [file.original_filename for file in form.files.getlist("file")]


class TestSeveralFilesOfOneField:
    TWO = (part("file", b"1", filename="a"), part("file", b"2", filename="b"))

    @pytest.mark.case("RA-08", "RE-02")
    async def test_a_field_takes_one(self, receiving: App, serve: Serve) -> None:
        client = serve(endpoint_with(upload_form({"file": Document.file}), names))
        response = await post(client, *self.TWO)
        assert (response.status_code, response.json()["limit"], response.json()["maximum"]) == (413, "max_files", 1)
        assert await stored_in(receiving.manager) == []

    @pytest.mark.case("RE-02")
    async def test_the_surplus_is_refused_before_it_is_stored(self, receiving: App, serve: Serve) -> None:
        taken: list[str | None] = []

        async def take(file: FilePart) -> None:
            taken.append(file.filename)

        client = serve(endpoint_with(upload_form({"file": take}), names))
        files = [part("file", b"x", filename=f"{number}") for number in range(100)]
        assert (await post(client, *files)).status_code == 413
        assert taken == ["0"]

    @pytest.mark.case("MPP-01")
    @pytest.mark.parametrize("content", [b"x", b""], ids=["with content", "empty"])
    async def test_all_fields_together_have_no_more_than_the_form(self, receiving: App, serve: Serve, content: bytes) -> None:
        targets = {"file": FileList(Document.file, 10), "other": FileList(Document.file, 10)}
        client = serve(endpoint_with(upload_form(targets, limits=UploadLimits(max_files=3)), names))
        files = [part(name, content, filename=name) for name in ("file", "other")] * 2
        response = await post(client, *files)
        assert (response.status_code, response.json()["limit"], response.json()["maximum"]) == (413, "max_files", 3)
        assert await stored_in(receiving.manager) == []

    async def test_an_input_left_empty_does_not_count(self, receiving: App, serve: Serve) -> None:
        async def count(form: UploadForm) -> int:
            return len(form.files.multi_items())

        client = serve(endpoint_with(upload_form({"file": Document.file}), count))
        empty = part("file", b"", filename="")
        assert (await post(client, empty, self.TWO[0], empty)).json() == 1

    @pytest.mark.case("RA-08")
    async def test_a_list_hands_all_of_them_over(self, receiving: App, serve: Serve) -> None:
        async def add(form: UploadForm) -> list[bytes]:
            assert form.files["file"] == form.files.getlist("file") == dict(form.files)["file"]
            async with receiving.sessions.begin() as session:
                documents = [Document(title="x", file=file) for file in form.files["file"]]
                session.add_all(documents)
            return [await document.file.read() for document in documents if document.file]

        client = serve(endpoint_with(upload_form({"file": FileList(Document.file, 2)}), add))
        assert (await post(client, *self.TWO)).json() == ["1", "2"]
        assert (await post(client, self.TWO[0])).json() == ["1"]
        assert (await post(client)).json() == []
        assert len(await stored_in(receiving.manager)) == 3
        response = await post(client, *self.TWO, self.TWO[0])
        assert (response.status_code, response.json()["maximum"]) == (413, 2)
        assert len(await stored_in(receiving.manager)) == 3

    @pytest.mark.parametrize("most", [0, -1, True, None, "2"])
    def test_a_list_has_an_end(self, most: Any) -> None:
        with pytest.raises(ConfigurationError, match="max_files"):
            FileList(Document.file, most)

    async def test_a_list_of_nothing(self) -> None:
        with pytest.raises(TypeError, match="stored in"):
            FileList(Document, 2)  # type: ignore[arg-type]

    @pytest.mark.parametrize("target", [Document.title, Document, "documents", None, lambda: None, iter_nothing])
    def test_what_no_file_can_be_stored_in(self, target: Any) -> None:
        """It is refused where it is declared, not by the first upload."""
        for declare in (upload_form, provide_upload_form):
            with pytest.raises(TypeError, match="the file of the field 'scan' can be stored in an attachment attribute"):
                declare({"scan": target})
        with pytest.raises(TypeError, match="a file can be stored in an attachment attribute"):
            upload_body(target)
        with pytest.raises(TypeError, match=r"not in Document\.title"):
            upload_form({"scan": Document.title})

    async def test_a_function_that_stores_nothing(self, receiving: App) -> None:
        async def receive(request: Request) -> Response:
            with pytest.raises(TypeError, match="must be a coroutine function: it has returned 3"):
                await stream_upload(request, {"file": lambda _: 3})  # type: ignore[dict-item, return-value]
            return Response()

        app = Starlette(routes=[Route("/", receive, methods=["POST"])])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert (await client.post("/", files={"file": b"abc"})).status_code == 200

    @pytest.mark.case("RE-02")
    def test_a_body_is_limited_unless_said_otherwise(self) -> None:
        assert UploadLimits().max_size == 1 << 30
        assert UploadLimits(max_size=None).max_size is None

    @pytest.mark.case("RE-11")
    def test_headers_are_limited_as_by_python_multipart(self) -> None:
        from python_multipart import multipart

        assert UploadLimits().max_headers <= multipart.DEFAULT_MAX_HEADER_COUNT
        assert UploadLimits().max_header_size <= multipart.DEFAULT_MAX_HEADER_SIZE


@pytest.mark.case("RE-02")
class TestWhatNoRowTakes:
    FILE = part("file", b"x", filename="a")

    async def test_it_goes_when_the_request_ends_well(self, receiving: App, serve: Serve) -> None:
        client = serve(endpoint_with(upload_form({"file": FileList(Document.file, 3)}), names))
        assert (await post(client, self.FILE, self.FILE)).json() == ["a", "a"]
        assert await stored_in(receiving.manager) == []

    async def test_a_body(self, receiving: App, serve: Serve) -> None:
        async def size(file: Attachment) -> int:
            return file.size

        client = serve(endpoint_with(upload_body(Document.file), size))
        assert (await client.post("/", content=b"abc")).json() == 3
        assert await stored_in(receiving.manager) == []

    async def test_what_a_function_has_stored(self, receiving: App, serve: Serve) -> None:
        async def take(file: FilePart) -> Attachment:
            return await Attachment.from_upload(file).store(Document.file)

        client = serve(endpoint_with(upload_form({"file": take}), names))
        assert (await post(client, self.FILE)).json() == ["a"]
        assert await stored_in(receiving.manager) == []

    async def test_only_some_of_it(self, receiving: App, serve: Serve) -> None:
        async def add_first(form: UploadForm) -> None:
            async with receiving.sessions.begin() as session:
                session.add(Document(title="x", file=form.files["file"][0]))

        client = serve(endpoint_with(upload_form({"file": FileList(Document.file, 3)}), add_first))
        assert (await post(client, self.FILE, self.FILE, self.FILE)).status_code == 200
        async with receiving.sessions() as session:
            document = (await session.scalars(select(Document))).one()
        assert document.file is not None
        assert await stored_in(receiving.manager) == [document.file.location]

    async def test_ids_of_instances_that_were_dropped(self, receiving: App, serve: Serve) -> None:
        async def make(form: UploadForm) -> str:
            return Document(title="never added", file=form.files["file"]).title

        client = serve(endpoint_with(upload_form({"file": Document.file}), make))
        assert (await post(client, self.FILE)).json() == "never added"
        assert await stored_in(receiving.manager) == []

    @pytest.mark.parametrize("first", ["session", "form"])
    @pytest.mark.parametrize("scope", ["function", "request"])
    async def test_a_session_that_commits_when_the_request_ends(
        self, receiving: App, serve: Serve, first: str, scope: Any
    ) -> None:
        """Whichever of the dependencies ends first: what an instance holds stays until its row is flushed."""

        async def transaction() -> AsyncIterator[AsyncSession]:
            async with receiving.sessions.begin() as session:
                yield session

        async def with_session(session, form) -> None:  # type: ignore[no-untyped-def]
            session.add(Document(title="x", file=form.files["file"]))

        async def with_form(form, session) -> None:  # type: ignore[no-untyped-def]
            session.add(Document(title="x", file=form.files["file"]))

        endpoint = with_session if first == "session" else with_form
        endpoint.__annotations__["session"] = Annotated[AsyncSession, Depends(transaction, scope=scope)]
        endpoint.__annotations__["form"] = Annotated[UploadForm, Depends(upload_form({"file": Document.file}))]
        assert (await post(serve(endpoint), self.FILE)).status_code == 200
        async with receiving.sessions() as session:
            document = (await session.scalars(select(Document))).one()
        assert document.file is not None
        assert await document.file.read() == b"x"

    async def test_a_block_that_ends_before_its_session(self, receiving: App, serve: Serve) -> None:
        async def endpoint(request: Request) -> None:
            async with await stream_upload(request, {"file": Document.file}) as form:
                document = Document(title="x", file=form.files["file"])
            async with receiving.sessions.begin() as session:
                session.add(document)

        assert (await post(serve(endpoint), self.FILE)).status_code == 200
        assert len(await stored_in(receiving.manager)) == 1

    async def test_a_file_that_is_assigned_after_the_block_is_missed_loudly(self, receiving: App, serve: Serve) -> None:
        errors: list[ConsumedSourceError] = []

        async def endpoint(request: Request) -> None:
            async with await stream_upload(request, {"file": Document.file}) as form:
                file = form.files["file"]
            with pytest.raises(ConsumedSourceError, match="assign it to an instance before") as caught:
                async with receiving.sessions.begin() as session:
                    session.add(Document(title="x", file=file))
            errors.append(caught.value)

        await post(serve(endpoint), self.FILE)
        assert len(errors) == 1
        assert await stored_in(receiving.manager) == []


@pytest.mark.case("C")
class TestMissing:
    @pytest.mark.parametrize("handlers", [True, False])
    @pytest.mark.parametrize("kind", ["files", "fields"])
    async def test_it_is_a_422(self, receiving: App, serve: Serve, handlers: bool, kind: str) -> None:
        async def look(form: UploadForm) -> None:
            getattr(form, kind)["missing"]

        client = serve(endpoint_with(upload_form({"file": Document.file}), look), handlers=handlers)
        for response in (
            await post(client, part("file", b"x", filename="a")),
            await client.post("/", data={"title": "x"}),
            await post(client, part("missing" if kind == "files" else "file", b"", filename="")),
        ):
            assert response.status_code == 422
            assert "'missing'" in response.json()["detail"]
        assert await stored_in(receiving.manager) == []

    @pytest.mark.parametrize("handlers", [True, False])
    async def test_other_faults_of_a_request_have_their_status(self, serve: Serve, handlers: bool) -> None:
        client = serve(endpoint_with(upload_form({"file": Document.file}), names), handlers=handlers)
        assert (await client.post("/", content=b"x", headers=FORM)).status_code == 400
        assert (await client.post("/", json={})).status_code == 415
        assert (await client.post("/", data={"a": "x" * (2 << 20)})).status_code == 413

    async def test_a_malformed_form_is_refused_though_a_function_has_caught_it(self, serve: Serve) -> None:
        async def receive(request: Request) -> None:
            await stream_upload(request, {"file": read_if_whole})

        file = part("file", b"content", filename="a.txt") + f"\r\n--{BOUNDARY} x\r\n".encode()
        response = await post(serve(receive), file)
        assert (response.status_code, response.json()["detail"][:10]) == (400, "A boundary")

    async def test_it_is_a_key_error_to_the_application(self, serve: Serve) -> None:
        async def look(form: UploadForm) -> list[Any]:
            with pytest.raises(KeyError, match="no field 'missing'") as caught:
                form.fields["missing"]
            assert isinstance(caught.value, MissingFieldError)
            return [form.fields.get("missing"), form.files.get("missing"), form.files.get("file", "none"), "file" in form.files]

        client = serve(endpoint_with(upload_form({"file": Document.file}), look))
        assert (await post(client)).json() == [None, None, "none", False]


@pytest.mark.case("C")
async def test_the_documentation_of_an_api_describes_the_body(serve: Serve) -> None:
    form = upload_form({"file": Document.file, "more": FileList(Document.file, 5)})
    client = serve(endpoint_with(form, names), openapi_extra=form.openapi_extra)
    described = (await client.get("/openapi.json")).json()["paths"]["/"]["post"]["requestBody"]
    schema = described["content"]["multipart/form-data"]["schema"]
    assert described["required"]
    assert schema["properties"]["file"] == {"type": "string", "format": "binary"}
    assert schema["properties"]["more"] == {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 5}
    body = upload_body(Document.file)
    client = serve(endpoint_with(body, names), openapi_extra=body.openapi_extra)
    described = (await client.get("/openapi.json")).json()["paths"]["/"]["post"]["requestBody"]
    assert described["content"]["application/octet-stream"]["schema"] == {"type": "string", "format": "binary"}


@pytest.mark.case("RE-15")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Content-Encoding", "identity"), ("Content-Encoding", "gzip")], 415),
        ([("Content-Encoding", "identity, gzip")], 415),
        ([("Content-Encoding", ""), ("Content-Encoding", "br")], 415),
        ([("Content-Encoding", "identity"), ("Content-Encoding", "Identity")], 200),
        ([("Content-Type", "text/plain")], 400),
        ([("Content-Range", "bytes 0-1/2")], 400),
    ],
)
@pytest.mark.parametrize("path", ["/form", "/body/a"])
async def test_headers_that_come_twice(
    client: httpx.AsyncClient, receiving: App, headers: list[tuple[str, str]], status: int, path: str
) -> None:
    content = part("file", b"x", filename="a") + END
    method = "POST" if path == "/form" else "PUT"
    response = await client.request(method, path, content=content, headers=[*FORM.items(), *headers])
    assert response.status_code == status
    assert len(await stored_in(receiving.manager)) == (status == 200)


@pytest.mark.case("RE-15")
@pytest.mark.parametrize("given", ["", " ", "\t"])
async def test_a_part_with_an_empty_media_type(client: httpx.AsyncClient, given: str) -> None:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\nContent-Type:{given}\r\n\r\nx\r\n'
    response = await client.post("/form", content=head.encode() + END, headers=FORM)
    assert response.json()["files"][0][1]["type"] is None
