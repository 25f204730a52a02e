"""Hostile files, uploaded to every program of the README, the docs and the examples, get harmless responses."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import delete, select
from starlette.applications import Starlette
from starlette.routing import Route
from sybil import Sybil
from sybil.parsers.myst import CodeBlockParser

from granite_storage import StorageError, StorageManager, StoredObjectRef
from tests.core.support import files_below
from tests.docs.hostile import HOSTILE, MIB, File, client_of, form_of, post_too_large, require_harmless
from tests.docs.test_documents import DOCUMENTS, ROOT, bucket_server, database, evaluate, surroundings

__all__ = ["bucket_server", "database", "surroundings"]


async def readme(names: Mapping[str, Any]) -> None:
    app = names["app"]
    names["USERS"]["secret"] = "anna"
    headers = {"Authorization": "Bearer secret"}
    before = files_below(Path("uploads"))
    async with app.router.lifespan_context(app), client_of(app, headers=headers) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", **form_of(file)))
            if answer.is_success:
                url = f"/documents/{answer.json()['id']}/file"
                whole = require_harmless(await client.get(url))
                assert whole.content == file.content
                part = require_harmless(await client.get(url, headers={"Range": "bytes=0-0"}))
                assert (part.status_code, part.content) == (206, file.content[:1])
                require_harmless(await client.get(url, params={"thumb": True}))
                assert (await client.delete(f"/documents/{answer.json()['id']}")).status_code == 204
        await post_too_large(client, "/documents", 50 * MIB, media_type="application/pdf", begin=b"%PDF-1.7\n")
        assert (await client.delete("/documents/999999")).status_code == 404
        for number in (-1, 0, 2**31, 2**63, 10**30):
            assert (await client.get(f"/documents/{number}/file")).status_code == 422
            assert (await client.delete(f"/documents/{number}")).status_code == 422
        await names["journal"].recover()
        assert files_below(Path("uploads")) == before


async def landing(names: Mapping[str, Any]) -> None:
    async with client_of(names["app"]) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", **form_of(file)))
            if answer.is_success:
                kept = require_harmless(await client.get(f"/documents/{answer.json()['id']}/file"))
                assert kept.content == file.content
        await post_too_large(client, "/documents", MIB, media_type="application/pdf", begin=b"%PDF-1.7\n")


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


async def session_dependencies(names: Mapping[str, Any]) -> None:
    before = names["files"]()
    async with client_of(names["app"]) as client:
        for number, file in enumerate(HOSTILE):
            answer = require_harmless(await client.post("/documents", params={"title": str(number)}, **form_of(file)))
            assert "location" not in answer.text
        await post_too_large(client, "/documents?title=large", 20_000_000)
    async with names["sessions"].begin() as session:
        await session.execute(delete(names["Document"]).where(names["Document"].title != "A"))
    assert names["files"]() == before


async def synchronous(names: Mapping[str, Any]) -> None:
    async with client_of(names["api"]) as client:
        for file in HOSTILE:
            answer = require_harmless(await client.post("/documents", params={"title": file.name[:50]}, **form_of(file)))
            if answer.is_success:
                whole = require_harmless(await client.get(f"/documents/{answer.json()['id']}"))
                assert whole.content == file.content
        await post_too_large(client, "/documents", 50 * MIB, params={"title": "large"})
    await asyncio.to_thread(flask, names["app"])


def flask(app: Any) -> None:
    with httpx.Client(transport=httpx.WSGITransport(app), base_url="http://test") as client:
        for file in HOSTILE:
            answer = require_harmless(client.post("/documents", data={"title": file.name[:50]}, **form_of(file)))
            if answer.is_success:
                whole = require_harmless(client.get(f"/documents/{answer.json()['id']}"))
                assert whole.content == file.content


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


async def collections(names: Mapping[str, Any]) -> None:
    album, sessions = names["Album"], names["sessions"]
    async with client_of(names["app"]) as client:
        for number, file in enumerate(HOSTILE, 1000):
            async with sessions.begin() as session:
                session.add(album(id=number, title="hostile"))
            answer = await client.post(f"/albums/{number}/photos", files=[("photos", (file.name, file.content, file.kind))] * 2)
            assert "location" not in require_harmless(answer).text
            async with sessions.begin() as session:
                await session.delete(await session.get_one(album, number))


async def frameworks(names: Mapping[str, Any]) -> None:
    profile, sessions = names["Profile"], names["sessions"]
    async with sessions() as session:
        before = set(await session.scalars(select(profile.id)))
    for app in (names["app"], names["litestar_app"]):
        async with client_of(app) as client:
            for file in HOSTILE:
                avatar = {"files": {"avatar": (file.name, file.content, file.kind)}, "data": {"name": "Eve"}}
                answer = require_harmless(await client.post("/profiles", **avatar))
                if answer.is_success and app is names["litestar_app"]:
                    shown = require_harmless(await client.get(f"/profiles/{answer.json()['id']}/avatar"))
                    assert shown.content == file.content
    async with sessions.begin() as session:
        await session.execute(delete(profile).where(profile.id.not_in(before)))


async def panels(names: Mapping[str, Any]) -> None:
    user, sessions = names["User"], names["sessions"]
    async with names["engine"].begin() as connection:
        await connection.run_sync(names["Base"].metadata.create_all)
    async with sessions() as session:
        before = set(await session.scalars(select(user.id)))
    first = names.get("admin", names.get("app"))
    async with client_of(getattr(first, "app", first)) as client:
        for file in HOSTILE:
            form = {"name": "<script>alert(1)</script>", "save": "Save"}
            upload = (file.name, file.content, file.kind)
            await require_inert(client, await client.post("/admin/user/create", data=form, files={"avatar": upload}))
            await require_inert(client, await client.get("/admin/user/list"))
    if "panel" in names:
        async with client_of(names["app"]) as client:
            await client.get("/admin/user/list")
            headers = {"X-CSRFToken": client.cookies["starlette_admin_csrftoken"]}
            for file in HOSTILE:
                form = {"name": "<script>alert(1)</script>"}
                upload = (file.name, file.content, file.kind)
                answer = await client.post("/admin/user/create", data=form, files={"avatar": upload}, headers=headers)
                await require_inert(client, answer)
                await require_inert(client, await client.get("/admin/user/list"))
    async with sessions.begin() as session:
        await session.execute(delete(user).where(user.id.not_in(before)))


async def require_inert(client: httpx.AsyncClient, page: httpx.Response) -> None:
    """Check that a page of a panel runs nothing of what was uploaded, and that neither do the files that it shows."""
    assert page.status_code < 500, page.text
    assert "<script>alert(" not in page.text
    assert "<img src=x" not in page.text
    for url in re.findall(r'(?:src|href)="([^"]*/(?:file/)?avatar[^"]*)"', page.text):
        require_harmless(await client.get(unescape(url)))


PROGRAMS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Coroutine[Any, Any, None]]]] = {
    "README.md": ("report.file.sync.read", readme),
    "docs/admin.md": ("panel = Admin(", panels),
    "docs/collections.md": ("app = FastAPI(", collections),
    "docs/comparison.md": ("async def contract_url", panels),
    "docs/derived.md": ("app = FastAPI(", derived),
    "docs/direct-uploads.md": ("stolen = ", direct),
    "docs/index.md": ('@app.get("/documents', landing),
    "docs/frameworks.md": ("litestar_app = Litestar(", frameworks),
    "docs/guide.md": ("async def download", guide),
    "docs/receiving.md": ("Content Too Large", receiving),
    "docs/serving.md": ("async def plain", serving),
    "docs/session-dependencies.md": ("# a COMMIT that fails", session_dependencies),
    "docs/sqlalchemy.md": ("app = FastAPI(", attachments),
    "docs/streams.md": ("app = Starlette(", streams),
    "docs/synchronous.md": ("api = FastAPI(", synchronous),
}
"""The text with which the program of a document is complete, and the function that uploads hostile files to it."""

HARMLESS = {"docs/cors.md", "docs/urls.md", "docs/without-sqlalchemy.md"}
"""Programs that accept no files; what is public is tried in `tests/web/test_public_files.py`."""

PROGRAM = re.compile(
    r"Flask\(|FastAPI\(|Starlette\(|Litestar\(|StoredObjectResponse\(|(Public|Signed)Files\(|DirectUploads\(|(stream|upload)_(upload|form|body)\("
)
UNSAFE = re.compile(r"StreamingResponse|: UploadFile|FileResponse\(|send_file\(")


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
    examples = {name for name in found if name.startswith("examples/")}
    assert found - examples == set(PROGRAMS) | HARMLESS
    assert {name.split("/")[1] for name in examples} == {"gallery", "team_files"}  # their own tests post to them


@pytest.mark.case("RE-08")
@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_safe_way_is_shown(path: Path) -> None:
    """No snippet sends a file without its headers, or lets a framework keep a whole upload before its size is looked at."""
    unsafe = [line for line in python_of(path).splitlines() if UNSAFE.search(line) and "STATIC" not in line and "->" not in line]
    allowed = [
        "from fastapi.responses import FileResponse",
        '@app.get("/", response_class=FileResponse)',
        "from starlette.responses import StreamingResponse",
        "class ZipResponse(StreamingResponse):",  # which sets its headers
    ]
    assert [line for line in unsafe if line not in allowed] == []
