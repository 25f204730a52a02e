"""Nothing that a policy has let in is served as more than what was accepted."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from granite_storage import StorageManager, StoredObjectRef
from granite_storage._headers import is_active
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import UnsupportedContentError
from granite_storage.inspection._media_names import DOCX, canonical
from granite_storage.inspection.media_types import matches
from granite_storage.web import StoredObjectResponse
from tests.core.support import SLOT, manager_on
from tests.inspection.corpus import hostile, samples

ACCEPTS = [("image/*",), ("image/*", "application/pdf"), ("text/*",), ("*/*",), ("application/*", "video/*", "audio/*")]
FILES: list[tuple[str, bytes, str | None]] = [
    *((sample.name, sample.content, sample.declared[0] if sample.declared else None) for sample in samples()),
    *((case.filename or "x", case.content, case.declared) for case in hostile()),
]
ACTIVE = (".html", ".svg", ".js", ".htm", ".xhtml")
LIES = ["text/html", "image/svg+xml", "image/png", "text/plain", None]


async def served(manager: StorageManager, ref: StoredObjectRef) -> httpx.Response:
    async def endpoint(request: Request) -> Any:
        return StoredObjectResponse(ref, request, manager=manager, disposition="inline")

    transport = httpx.ASGITransport(Starlette(routes=[Route("/", endpoint)]))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get("/")


@pytest.mark.parametrize("accept", ACCEPTS, ids=str)
@pytest.mark.parametrize("on_mismatch", ["refuse", "correct"])
async def test_no_accepted_content_is_active(accept: tuple[str, ...], on_mismatch: str) -> None:
    manager = manager_on(MemoryStorageBackend(), accept=accept, on_mismatch=on_mismatch)
    kept = 0
    for number, (name, content, declared) in enumerate(FILES):
        for lie in (declared, LIES[number % len(LIES)]):
            try:
                ref = await manager.put_bytes(**SLOT, content=content, content_type=lie, original_filename=name)
            except UnsupportedContentError:
                continue
            kept += 1
            assert ref.content_type is not None
            assert matches(ref.content_type, accept)
            assert not is_active(canonical(ref.content_type))
            assert not (ref.original_filename or "").lower().endswith(ACTIVE)
            assert not ref.location.lower().endswith(ACTIVE)
            response = await served(manager, ref)
            assert response.content == content
            assert response.headers["x-content-type-options"] == "nosniff"
            assert canonical(response.headers["content-type"]) in (canonical(ref.content_type), "application/octet-stream")
    assert kept > 5


@pytest.mark.parametrize("is_stream", [False, True])
async def test_an_archive_is_confirmed_by_its_end(*, is_stream: bool) -> None:
    """What begins like a Word document and ends with the directory of another archive is no document."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", "<document/>")
        archive.writestr("filler", bytes(200_000))
    document = out.getvalue()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", "Main-Class: Evil")
    twin = document[:150_000] + out.getvalue()
    manager = manager_on(MemoryStorageBackend(), accept=(DOCX,))

    async def put(content: bytes) -> StoredObjectRef:
        if is_stream:
            return await manager.put_stream(**SLOT, stream=[content[:90_000], content[90_000:]], content_type=DOCX)
        return await manager.put_bytes(**SLOT, content=content, content_type=DOCX)

    assert (await put(document)).content_type == DOCX
    with pytest.raises(UnsupportedContentError):
        await put(twin)
