"""Bodies that the application has read before the library receives their files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Form, UploadFile
from starlette.requests import Request

from granite_storage.exceptions import ConsumedSourceError
from granite_storage.web import install_error_handlers, stream_body, stream_upload, upload_form
from tests.web.receiving import END, FORM, App, Document, part, sliced, stored_in

Received = Annotated[Any, Depends(upload_form({"file": Document.file}))]

pytestmark = pytest.mark.case("RB-20")

BODY = part("title", b"t") + part("file", b"content" * 1000, filename="a") + END


async def by_form(request: Request) -> None:
    async with request.form():
        pass


async def by_stream(request: Request) -> None:
    async for _ in request.stream():
        pass


async def receive_form(request: Request) -> None:
    async with await stream_upload(request, {"file": Document.file}):
        pass


async def receive_body(request: Request) -> None:
    await stream_body(request, Document.file)


async def answer(app: FastAPI, content: Any = BODY, headers: dict[str, str] = FORM) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/", content=content, headers=headers)


def app_with(read: Callable[[Request], Awaitable[Any]], receive: Callable[[Request], Awaitable[None]]) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/")
    async def endpoint(request: Request) -> None:
        await read(request)
        await receive(request)

    return app


@pytest.mark.parametrize("receive", [receive_form, receive_body])
@pytest.mark.parametrize("read", [by_form, by_stream])
async def test_an_error_says_what_to_remove(
    receiving: App,
    read: Callable[[Request], Awaitable[None]],
    receive: Callable[[Request], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    response = await answer(app_with(read, receive))
    assert (response.status_code, response.headers["Content-Type"]) == (500, "application/problem+json")
    (record,) = caplog.records
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert isinstance(error, ConsumedSourceError)
    assert "UploadFile" in str(error)
    assert "request.form()" in str(error)
    assert await stored_in(receiving.manager) == []


async def test_a_parameter_beside_the_dependency(receiving: App, caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    install_error_handlers(app)

    @app.post("/with-form")
    async def with_form(title: Annotated[str, Form()], form: Received) -> None: ...

    @app.post("/with-file")
    async def with_file(file: UploadFile, form: Received) -> None: ...

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for path in ("/with-form", "/with-file"):
            assert (await client.post(path, content=BODY, headers=FORM)).status_code == 500
    assert all(record.exc_info and isinstance(record.exc_info[1], ConsumedSourceError) for record in caplog.records)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("receive", [receive_form, receive_body])
async def test_a_body_that_the_request_remembers_is_received(
    receiving: App, receive: Callable[[Request], Awaitable[None]]
) -> None:
    assert (await answer(app_with(Request.body, receive))).status_code == 200


@pytest.mark.case("RA-06")
@pytest.mark.parametrize("receive", [receive_form, receive_body])
async def test_a_body_whose_beginning_was_read_is_not_stored(
    receiving: App, receive: Callable[[Request], Awaitable[None]]
) -> None:
    async def first_piece(request: Request) -> None:
        async for _ in request.stream():
            break

    headers = {**FORM, "Content-Length": str(len(BODY))}
    response = await answer(app_with(first_piece, receive), sliced(BODY, 100), headers)
    assert response.status_code == 400
    assert await stored_in(receiving.manager) == []


async def test_an_error_of_the_server_stays_what_it_is(receiving: App) -> None:
    caught: list[BaseException] = []

    async def receive(request: Request) -> None:
        async def broken() -> Any:
            raise RuntimeError("of the server")

        try:
            await receive_form(Request(request.scope, broken))
        except RuntimeError as error:
            caught.append(error)

    await answer(app_with(Request.body, receive))
    assert [str(error) for error in caught] == ["of the server"]
