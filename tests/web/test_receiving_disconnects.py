"""A client that leaves while it sends a form, below middlewares: nothing is raised to the server, and nothing logged."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request
from starlette.types import Message

from granite_storage.web import UploadForm, install_error_handlers, stream_upload, upload_body, upload_form
from tests.web.receiving import FORM, App, Document, part, stored_in

pytestmark = pytest.mark.case("RB-12")


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("path", ["/form", "/body", "/direct"])
async def test_it_is_quiet(receiving: App, caplog: pytest.LogCaptureFixture, layers: int, path: str) -> None:
    app = FastAPI()
    install_error_handlers(app)
    for _ in range(layers):

        @app.middleware("http")
        async def passing(request: Request, call_next: Any) -> Any:
            return await call_next(request)

    @app.put("/form")
    async def form(form: Annotated[UploadForm, Depends(upload_form({"file": Document.file}))]) -> None:
        raise AssertionError("the form is not whole")

    @app.put("/body")
    async def body(body: Annotated[Any, Depends(upload_body(Document.file))]) -> None:
        raise AssertionError("the body is not whole")

    @app.put("/direct")
    async def direct(request: Request) -> None:
        async with await stream_upload(request, {"file": Document.file}):
            raise AssertionError("the form is not whole")

    messages: list[Message] = [
        {"type": "http.request", "body": part("file", b"x" * 100_000, filename="a")[:-2], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in FORM.items()]
    scope = {"type": "http", "method": "PUT", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    assert not sent or sent[0]["status"] == 400
    assert caplog.records == []
    assert await stored_in(receiving.manager) == []
