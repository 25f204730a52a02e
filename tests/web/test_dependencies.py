"""Receiving with FastAPI's dependencies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import event, select
from sqlalchemy.ext.asyncio import AsyncSession

from granite_storage import StaleAttachmentError, StoredObjectRef
from granite_storage.orm import Attachment
from granite_storage.web import UploadForm, UploadLimits, install_error_handlers, upload_body, upload_form
from tests.web.receiving import App, Document, stored_in

Form = Annotated[UploadForm, Depends(upload_form({"file": Document.file}, limits=UploadLimits(max_file_size=1000)))]
Body = Annotated[Attachment, Depends(upload_body(Document.file, filename=lambda request: request.path_params["name"]))]


@pytest.fixture
async def api(receiving: App) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    install_error_handlers(app)

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with receiving.sessions.begin() as session:
            yield session

    session_in = Annotated[AsyncSession, Depends(transaction, scope="function")]
    ref_in = Annotated[StoredObjectRef, Depends(upload_body(receiving.ref_target))]

    async def form(form: Form, session: session_in) -> None:  # type: ignore[valid-type]
        if "refuse" in form.fields:
            raise HTTPException(422)
        session.add(Document(title=form.fields["title"], file=form.files["file"]))  # type: ignore[attr-defined]
        if "late" in form.fields:
            await session.flush()  # type: ignore[attr-defined]
            raise HTTPException(422)

    async def body(name: str, body: Body, session: session_in) -> None:  # type: ignore[valid-type]
        if name == "refused":
            raise HTTPException(422)
        session.add(Document(title=name, file=body))  # type: ignore[attr-defined]

    async def ref(ref: ref_in) -> int:  # type: ignore[valid-type]
        size: int = ref.size  # type: ignore[attr-defined]
        return size

    for path, endpoint in {"/form": form, "/body/{name}": body, "/ref": ref}.items():
        endpoint.__annotations__ |= {
            key: value for key, value in {"session": session_in, "ref": ref_in}.items() if key in endpoint.__annotations__
        }
        app.add_api_route(path, endpoint, methods=["PUT"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        yield client


async def test_a_form(api: httpx.AsyncClient, receiving: App) -> None:
    response = await api.put("/form", data={"title": "x"}, files={"file": ("a.txt", b"abc", "text/plain")})
    assert response.status_code == 200
    async with receiving.sessions() as session:
        document = (await session.scalars(select(Document))).one()
    assert document.file is not None
    assert await document.file.read() == b"abc"


@pytest.mark.parametrize("field", ["refuse", "late"])
async def test_a_form_that_the_endpoint_refuses(api: httpx.AsyncClient, receiving: App, field: str) -> None:
    response = await api.put("/form", data={"title": "x", field: ""}, files={"file": ("a.txt", b"abc")})
    assert response.status_code == 422
    assert await stored_in(receiving.manager) == []


async def test_a_form_over_the_limit(api: httpx.AsyncClient, receiving: App) -> None:
    response = await api.put("/form", data={"title": "x"}, files={"file": ("a.txt", bytes(1001))})
    assert (response.status_code, response.json()["max_size"]) == (413, 1000)
    assert await stored_in(receiving.manager) == []


async def test_a_body(api: httpx.AsyncClient, receiving: App) -> None:
    assert (await api.put("/body/a.txt", content=b"abc")).status_code == 200
    assert (await api.put("/body/refused", content=b"abcd")).status_code == 422
    async with receiving.sessions() as session:
        document = (await session.scalars(select(Document))).one()
    assert document.file is not None
    assert document.file.original_filename == "a.txt"
    assert await stored_in(receiving.manager) == [document.file.location]


async def test_a_ref(api: httpx.AsyncClient) -> None:
    assert (await api.put("/ref", content=b"abc")).json() == 3


@pytest.mark.case("RB-22")
@pytest.mark.parametrize(("scope", "expected"), [("request", 200), ("function", 409)])
async def test_a_session_dependency_whose_commit_fails(
    receiving: App, scope: Literal["request", "function"], expected: int
) -> None:
    """Documented in docs/sqlalchemy.md: only a dependency of the scope "function" commits before the response is sent."""
    app = FastAPI()
    install_error_handlers(app)

    async def transaction() -> AsyncIterator[AsyncSession]:
        async with receiving.sessions.begin() as session:
            event.listen(session.sync_session, "before_commit", _refuse)
            yield session

    async def add(session: AsyncSession) -> None:
        session.add(Document(title="x", file=Attachment(b"abc")))
        await session.flush()

    add.__annotations__["session"] = Annotated[AsyncSession, Depends(transaction, scope=scope)]
    app.add_api_route("/documents", add, methods=["POST"])
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/documents")
    assert response.status_code == expected
    assert await stored_in(receiving.manager) == []


def _refuse(_: object) -> None:
    raise StaleAttachmentError("the database has refused the COMMIT")
