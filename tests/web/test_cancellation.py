"""A form is cancelled at every one of its awaits, in turn; whatever becomes of it, nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request

from granite_storage import StorageBackend
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await
from granite_storage.web import FileList, UploadForm, stream_upload
from tests.web.receiving import END, FORM, App, Document, part, stored_in

FORM_BODY = [
    part("title", b"x") + part("file", b"a" * 3000, filename="a")[:-100],
    b"a" * 98 + b"\r\n" + part("ref", b"b" * 100_000, filename="b"),
    part("file", b"c" * 100_000, filename="c"),
    END,
]


@pytest.mark.case("CAN-01", "CAN-04", "CAN-05")
@pytest.mark.parametrize("backend", ["memory", "local"], indirect=True)
@pytest.mark.parametrize("moment", ["at once", "a little later", "twice"])
async def test_a_form(backend: StorageBackend, receiving: App, moment: Moment) -> None:
    async def call(_: int) -> UploadForm:
        pieces = list(FORM_BODY)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        headers = [(b"content-type", FORM["Content-Type"].encode())]
        request = Request({"type": "http", "method": "POST", "headers": headers}, receive)  # type: ignore[arg-type]
        return await stream_upload(request, {"file": FileList(Document.file, 2), "ref": receiving.ref_target})

    async for step, task, struck in cancel_at_every_await(call, moment):
        if not task.cancelled():
            assert not struck, f"the cancellation at await {step} was swallowed"
            form: Any = task.result()
            assert len(await stored_in(receiving.manager)) == 3
            await form.discard()
            await receiving.manager.delete(form.files["ref"])
        assert await stored_in(receiving.manager) == [], f"cancelled at await {step}"
