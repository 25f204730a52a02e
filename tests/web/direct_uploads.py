"""What the tests of direct uploads share: uploads of a base, and clients that send what they are told, or something else."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.routing import Mount

from granite_storage.web import DirectUpload, DirectUploads

BASE = "http://test/uploads"
SECRET = "a-secret-" + "s" * 32
PDF = b"%PDF-1.7 a report"


def uploads_of(binding: Any, **options: Any) -> DirectUploads:
    return DirectUploads(binding, **{"secret": SECRET, "base_url": BASE, **options})


@dataclass
class Client:
    """Sends files: to the application in this process, and to servers by the network."""

    http: httpx.AsyncClient
    answers: list[httpx.Response] = field(default_factory=list)

    async def send(
        self,
        upload: DirectUpload,
        content: Any = PDF,
        *,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        url: str | None = None,
    ) -> httpx.Response:
        """Send a file as a browser would; what is given goes in place of what was signed."""
        url = url or upload.url
        if upload.method == "POST":
            form = {**upload.fields, **(fields or {})}
            return await self.http.post(url, data=form, files={"file": ("name.bin", content)}, headers=headers)
        return await self.http.put(url, content=content, headers={**upload.headers, **(headers or {})})

    async def sent(self, upload: DirectUpload, content: bytes = PDF) -> DirectUpload:
        """Send a file, which must go well."""
        answer = await self.send(upload, content)
        assert answer.is_success, answer.text
        return upload


@asynccontextmanager
async def client_of(uploads: DirectUploads) -> AsyncIterator[Client]:
    app = Starlette(routes=[Mount("/uploads", uploads)])
    mounts = {"all://test": httpx.ASGITransport(app)}
    async with httpx.AsyncClient(mounts=mounts, timeout=30, trust_env=False) as http:
        yield Client(http)


def claims_of(token: str) -> dict[str, Any]:
    payload = token.rpartition("/")[2].split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims
