"""Hostile files, uploaded to every program of the README, the docs and the examples, get harmless responses."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import delete
from starlette.applications import Starlette
from starlette.routing import Route
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser

from granite_storage import StorageError, StorageManager, StoredObjectRef
from tests.docs.hostile import HOSTILE, MIB, File, client_of, form_of, post_too_large, require_harmless
from tests.docs.test_documents import DOCUMENTS, ROOT, bucket_server, database, evaluate, surroundings

__all__ = ["bucket_server", "database", "surroundings"]


async def readme(names: Mapping[str, Any]) -> None:
    app = names["app"]
    async with app.router.lifespan_context(app), client_of(app) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", params={"title": file.name[:50]}, **form_of(file)))
            if answer.is_success:
                url = f"/documents/{answer.json()['id']}/file"
                whole = require_harmless(await client.get(url))
                assert whole.content == file.content
                part = require_harmless(await client.get(url, headers={"Range": "bytes=0-0"}))
                assert (part.status_code, part.content) == (206, file.content[:1])
                assert (await client.delete(f"/documents/{answer.json()['id']}")).status_code == 204
        await post_too_large(client, "/documents", 50 * MIB, params={"title": "large"})
        assert (await client.delete("/documents/999999")).status_code == 404
        assert [path for path in Path("uploads/document").rglob("*") if path.is_file()] == []


async def stored(manager: StorageManager, file: File) -> StoredObjectRef:
    """Store a file, with a row that says of its type just what its sender said."""
    key = next(iter(manager.policies))
    ref = await manager.put_bytes(
        storage_key=key,
        model_name="document",
        entity_id="1",
        field_name="file",
        content=file.content,
        original_filename=file.name,
    )
    return replace(ref, content_type=file.kind or None)


async def serving(names: Mapping[str, Any]) -> None:
    namespace, kept = names, names["ref"]
    assert isinstance(namespace, dict)
    signing = names["signing"]
    async with client_of(names["app"]) as client, client_of(names["plain"]) as plain:
        for file in HOSTILE:
            namespace["ref"] = ref = await stored(names["manager"], file)
            for answer in (await client.get("/report"), await plain.get("/")):
                assert require_harmless(answer).content == file.content
            for disposition in ("inline", "attachment"):
                url = await signing.url(ref, expires_in=timedelta(minutes=1), disposition=disposition)
                assert require_harmless(await client.get(url)).content == file.content
    namespace["ref"] = kept


async def guide(names: Mapping[str, Any]) -> None:
    namespace, kept = names, names["ref"]
    assert isinstance(namespace, dict)
    async with client_of(Starlette(routes=[Route("/", names["download"])])) as client:
        for file in HOSTILE:
            namespace["ref"] = await stored(names["manager"], file)
            assert require_harmless(await client.get("/")).content == file.content
    namespace["ref"] = kept


async def receiving(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            for url, data in (("/documents", {"title": "a"}), ("/reports", {"kind": "report"}), ("/avatars", {})):
                require_harmless(await client.post(url, data=data, **form_of(file)))
            headers = {"Content-Type": file.kind}
            require_harmless(await client.put("/documents/a.html", content=file.content, headers=headers))
        await post_too_large(client, "/documents", 100 * MIB)
        await post_too_large(client, "/avatars", 3 * MIB)
        await post_too_large(client, "/documents/a.png", 100 * MIB, form=False, method="PUT")


async def direct(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"], headers={"X-User": "anna"}) as client:
        for file in HOSTILE:
            query = {"name": file.name, "type": file.kind, "size": len(file.content)}
            begun = require_harmless(await client.post("/documents/begin", params=query))
            if begun.is_success:
                upload = begun.json()
                assert (await client.put(upload["url"], content=file.content + b"x", headers=upload["headers"])).is_client_error
                assert (await client.put(upload["url"], content=file.content, headers=upload["headers"])).is_success
                require_harmless(await client.post("/documents", json={"token": upload["token"]}))
        query = {"name": "a", "type": "image/png", "size": 5 * 1024**3 + 1}
        assert require_harmless(await client.post("/documents/begin", params=query)).status_code == 413


async def streams(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            answer = await client.post("/", content=file.content, headers={"Content-Type": file.kind})
            assert set(require_harmless(answer).json()) == {"size", "checksum"}
        await post_too_large(client, "/", 1000, form=False)


async def attachments(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", **form_of(file)))
            assert "location" not in answer.text
        limit = names["storage"].policy("documents").max_size
        await post_too_large(client, "/documents", limit)


async def synchronous(names: Mapping[str, Any]) -> None:
    async with client_of(names["api"]) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", params={"title": file.name[:50]}, **form_of(file)))
            if answer.is_success:
                whole = require_harmless(await client.get(f"/documents/{answer.json()['id']}"))
                assert whole.content == file.content
        await post_too_large(client, "/documents", 50 * MIB, params={"title": "large"})


async def derived(names: Mapping[str, Any]) -> None:
    photo, attachment, sessions = names["Photo"], names["Attachment"], names["sessions"]
    async with names["engine"].begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            row = photo(owner="a", file=attachment(file.content, filename=file.name, content_type=file.kind))
            try:
                async with sessions.begin() as session:
                    session.add(row)
            except StorageError:
                continue
            for name in ("thumb", "large", file.name.replace("/", "")):
                require_harmless(await client.get(f"/photos/{row.id}/{quote(name)}"))
        async with sessions.begin() as session:
            await session.execute(delete(photo))


PROGRAMS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Coroutine[Any, Any, None]]]] = {
    "README.md": ("app = FastAPI(", readme),
    "docs/derived.md": ("app = FastAPI(", derived),
    "docs/direct-uploads.md": ("stolen = ", direct),
    "docs/guide.md": ("async def download", guide),
    "docs/receiving.md": ("Content Too Large", receiving),
    "docs/serving.md": ("async def plain", serving),
    "docs/sqlalchemy.md": ("app = FastAPI(", attachments),
    "docs/streams.md": ("app = Starlette(", streams),
    "docs/synchronous.md": ("api = FastAPI(", synchronous),
}
"""The text with which the program of a document is complete, and the function that uploads hostile files to it."""

HARMLESS = {"docs/quickstart.md", "docs/urls.md"}
"""Programs that accept no files; what is public is tried in `tests/web/test_public_files.py`."""

PROGRAM = re.compile(
    r"FastAPI\(|Starlette\(|Litestar\(|StoredObjectResponse\(|(Public|Signed)Files\(|DirectUploads\(|(stream|upload)_(upload|form|body)\("
)
UNSAFE = re.compile(r"StreamingResponse|: UploadFile|FileResponse\(")


@pytest.mark.case("RE-08", "RB-21")
@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_documented_program(name: str, tmp_path: Path) -> None:
    marker, probe = PROGRAMS[name]
    document = Sybil(parsers=[CodeBlockParser("python", evaluate)]).parse(ROOT / name)
    document.namespace |= {"EXAMPLES": ROOT / "examples", "__name__": "__main__"}
    probed = False
    with asyncio.Runner() as runner:
        for example in document:
            example.evaluate()
            result = example.namespace.pop("__result__")
            if inspect.iscoroutine(result):
                runner.run(result)
            if not probed and marker in example.parsed:
                probed = True
                before = set(tmp_path.parent.iterdir())
                runner.run(probe(document.namespace))
                assert set(tmp_path.parent.iterdir()) == before
    assert probed
    assert not [path for path in tmp_path.rglob("*") if path.name in ("passwd", "evil", "boot.ini", "evil.html")]


def python_of(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))


def sources() -> Iterable[Path]:
    return [*DOCUMENTS, *sorted((ROOT / "examples").rglob("*.py"))]


def test_no_program_is_overlooked() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if PROGRAM.search(python_of(path))}
    gallery = {name for name in found if name.startswith("examples/gallery/")}
    assert found - gallery == set(PROGRAMS) | HARMLESS
    assert gallery  # it is posted to below


@pytest.mark.case("RE-08")
@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_safe_way_is_shown(path: Path) -> None:
    """No snippet sends a file without its headers, or lets a framework keep a whole upload before its size is looked at."""
    unsafe = [line for line in python_of(path).splitlines() if UNSAFE.search(line) and "STATIC" not in line and "->" not in line]
    allowed = ["from fastapi.responses import FileResponse", '@app.get("/", response_class=FileResponse)']
    assert [line for line in unsafe if line not in allowed] == []
