"""Under Litestar, whose requests and responses are none of Starlette's: all that is served and received there is plain ASGI."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from litestar import Litestar, Request, Response, asgi, get, post
from litestar.types import ASGIApp
from starlette.requests import HTTPConnection
from starlette.requests import Request as Received

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import StorageError
from granite_storage.signing import UrlSigner
from granite_storage.web import PolicyTarget, SignedFiles, StoredObjectResponse, problem_response, stream_upload
from tests.core.support import PLACE
from tests.web.serving import HUNDRED, stored

URL = "http://litestar.example"
SIGNER = UrlSigner(f"{URL}/signed", keys={"one": "x" * 32})


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[StorageManager]:
    backends = {"store": LocalStorageBackend(tmp_path / "store", fsync=False)}
    policies = {"files": StoragePolicy("files", "store", max_size=len(HUNDRED))}
    async with StorageManager(backends=backends, policies=policies, url_signer=SIGNER) as manager:
        yield manager


@pytest.fixture
async def ref(manager: StorageManager) -> StoredObjectRef:
    return await stored(manager, HUNDRED, "text/plain", "hundred.txt")


@pytest.fixture
async def client(manager: StorageManager, ref: StoredObjectRef) -> AsyncIterator[httpx.AsyncClient]:
    target = PolicyTarget(manager=manager, storage_key="files", **PLACE)

    @get("/file")
    async def file(request: Request[Any, Any, Any]) -> ASGIApp:
        served = dataclasses.replace(ref, location=f"{ref.location}-not") if "missing" in request.query_params else ref
        return StoredObjectResponse(served, HTTPConnection(request.scope), manager=manager)

    @post("/upload", status_code=200)
    async def upload(request: Request[Any, Any, Any]) -> dict[str, Any]:
        form = await stream_upload(Received(request.scope, request.receive), {"file": target})
        return dict(form.files["file"].to_dict())

    def explained(_: Request[Any, Any, Any], error: StorageError) -> Response[bytes]:
        problem = problem_response(error)
        return Response(bytes(problem.body), status_code=problem.status_code, media_type=problem.media_type)

    mounted = asgi("/signed", is_mount=True, copy_scope=True)(SignedFiles(manager))
    app = Litestar([file, upload, mounted], exception_handlers={StorageError: explained}, logging_config=None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=URL) as client:
        yield client


async def test_served(client: httpx.AsyncClient) -> None:
    response = await client.get("/file")
    assert (response.status_code, response.content) == (200, HUNDRED)
    assert response.headers["content-disposition"] == 'attachment; filename="hundred.txt"'
    assert response.headers["x-content-type-options"] == "nosniff"


async def test_ranges_and_preconditions(client: httpx.AsyncClient) -> None:
    part = await client.get("/file", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, HUNDRED[10:20])
    assert part.headers["content-range"] == "bytes 10-19/100"
    unchanged = await client.get("/file", headers={"If-None-Match": part.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert (await client.get("/file", headers={"Range": "bytes=100-"})).status_code == 416


async def test_missing(client: httpx.AsyncClient) -> None:
    assert (await client.get("/file", params={"missing": True})).status_code == 404


async def test_signed(client: httpx.AsyncClient, manager: StorageManager, ref: StoredObjectRef) -> None:
    url = await manager.url(ref, expires_in=timedelta(minutes=1))
    assert (await client.get(url)).content == HUNDRED
    assert (await client.get(url[:-1] + ("A" if url[-1] != "A" else "B"))).status_code == 403
    assert (await client.get(f"{url}/")).status_code == 403


async def test_received(client: httpx.AsyncClient, manager: StorageManager) -> None:
    response = await client.post("/upload", files={"file": ("new.txt", b"new", "text/plain")})
    assert response.status_code == 200
    received = StoredObjectRef.from_dict(response.json())
    assert (received.original_filename, await manager.get(received)) == ("new.txt", b"new")


async def test_too_large(client: httpx.AsyncClient, manager: StorageManager) -> None:
    response = await client.post("/upload", files={"file": ("new.txt", HUNDRED + b"x", "text/plain")})
    assert response.status_code == 413
    assert response.headers["content-type"] == "application/problem+json"
    assert len([info async for info in manager.backend("store").iter_objects()]) == 1
