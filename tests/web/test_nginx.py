"""A real nginx in front, with the configurations of docs/urls.md: its cache, the files that it sends, and a purge."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from granite_storage import Attachment, StorageJournal, StorageManager, StoragePolicy, attachment, bind_storage, journal_tables
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.derived import Effect, EffectEvent
from granite_storage.locations import STAGED_NAME, uuid7_hex
from granite_storage.policies import PublicURL
from granite_storage.signing import UrlSigner
from granite_storage.web import Offload, PublicFiles, SignedFiles, StoredObjectResponse
from tests.core.support import PROJECT
from tests.orm.databases import postgres_database
from tests.servers import S3Server, free_ports
from tests.services import unavailable
from tests.web.serving import HUNDRED, server

pytestmark = pytest.mark.exhaustive("nginx, which a machine with nothing but Python has not, behaves the same from run to run")

CACHING, CACHING_S3, OFFLOADING, STATIC = re.findall(
    r"^```nginx\n(.*?)^```", (PROJECT / "docs/urls.md").read_text(), re.DOTALL | re.MULTILINE
)
(CACHED_FILE,) = re.findall(
    r"^```python\n(import hashlib\n.*?)^```", (PROJECT / "docs/urls.md").read_text(), re.DOTALL | re.MULTILINE
)
PLACE = {"model_name": "photo", "entity_id": "1", "field_name": "file"}
HOUR = timedelta(hours=1)


@contextlib.asynccontextmanager
async def nginx(folder: Path, configuration: str, *, application: int, port: int) -> AsyncIterator[httpx.AsyncClient]:
    """Run nginx with a configuration of the docs, in a folder of the test, and give a client of it."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        unavailable("nginx is unavailable: it is not installed")
    own = folder / "nginx"
    for name in ("cache", "temporary"):
        (own / name).mkdir(parents=True, exist_ok=True)
    configuration = (
        configuration.replace("listen 80;", f"listen 127.0.0.1:{port};")
        .replace("http://127.0.0.1:8000", f"http://127.0.0.1:{application}")
        .replace("http://127.0.0.1:9000", f"http://127.0.0.1:{application}")
        .replace("/var/cache/nginx/files", str(own / "cache"))
        .replace("/srv/uploads", str(folder / "uploads"))
    )
    temporary = "".join(
        f"{name}_temp_path {own}/temporary/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (own / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''} worker_processes 1; pid {own}/pid; error_log {own}/error.log;"
        f"events {{}} http {{ access_log off; {temporary}\n{configuration}\n}}"
    )
    process = await asyncio.create_subprocess_exec(program, "-p", own, "-c", own / "nginx.conf", "-g", "daemon off;")
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            async def answers() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return (await client.get("/nothing")).status_code > 0
                return False

            for _ in range(200):
                assert process.returncode is None, "nginx has ended, for the reason that it has written above"
                if await answers():
                    break
                await asyncio.sleep(0.05)
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):  # where it has refused its configuration
            process.terminate()
        await process.wait()


class Site:
    """An application with public and signed files, and a count of the requests that it gets for them."""

    def __init__(self, folder: Path, port: int) -> None:
        base = f"http://127.0.0.1:{port}"
        self.manager = StorageManager(
            backends={"local": LocalStorageBackend(folder / "uploads", fsync=False)},
            policies={
                "photos": StoragePolicy("photos", "local", key_prefix="photos", public=PublicURL(f"{base}/media")),
                "contracts": StoragePolicy("contracts", "local", key_prefix="contracts"),
            },
            url_signer=UrlSigner(f"{base}/files", keys={"k": "s" * 32}),
        )
        self.requests: Counter[str] = Counter()
        self.private: Any = None
        self._app = Starlette(
            routes=[
                Mount("/media", PublicFiles(self.manager)),
                Mount("/files", SignedFiles(self.manager, caching="shared")),
                Route("/private", self._send),
            ]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests[scope["path"]] += 1
        await self._app(scope, receive, send)

    async def _send(self, request: Request) -> Response:
        offload = Offload("X-Accel-Redirect", {"local": "/stored"})
        return StoredObjectResponse(self.private, request, manager=self.manager, offload=offload, disposition="inline")

    async def put(self, key: str, name: str = "a.png", kind: str = "image/png", content: bytes = HUNDRED) -> Any:
        return await self.manager.put_bytes(storage_key=key, **PLACE, content=content, original_filename=name, content_type=kind)


@pytest.fixture
async def port() -> int:
    (port,) = await asyncio.to_thread(free_ports, 1)
    return port


@pytest.fixture
async def site(tmp_path: Path, port: int) -> AsyncIterator[Site]:
    site = Site(tmp_path, port)
    yield site
    await site.manager.aclose()


async def test_hit_rate_ranges_and_conditions(tmp_path: Path, site: Site, port: int) -> None:
    """400 requests for two public and two signed files reach the application four times: 99 % are hits."""
    public = [await site.put("photos", f"caf\u00e9 100% + {number}.png") for number in range(2)]
    signed = [await site.put("contracts", f"{number}.png") for number in range(2)]
    async with server(site) as application, nginx(tmp_path, CACHING, application=application, port=port) as client:
        found: Counter[str] = Counter()
        for _ in range(100):
            urls = await site.manager.urls(signed, expires_in=HOUR, stable_for=timedelta(days=6))
            for url in (*urls, *map(site.manager.public_url, public)):
                response = await client.get(url)
                assert (response.status_code, response.content) == (200, HUNDRED)
                found[response.headers["x-cache"]] += 1
        assert found == {"HIT": 396, "MISS": 4}
        assert sorted(count for path, count in site.requests.items() if path != "/nothing") == [1, 1, 1, 1]
        for url in (urls[0], site.manager.public_url(public[0])):
            whole = await client.get(url)
            part = await client.get(url, headers={"Range": "bytes=10-19"})
            assert (part.status_code, part.content, part.headers["content-range"]) == (206, HUNDRED[10:20], "bytes 10-19/100")
            assert part.headers["x-cache"] == "HIT"
            several = await client.get(url, headers={"Range": "bytes=0-0,99-99"})
            assert several.headers["content-type"].startswith("multipart/byteranges")
            assert (await client.get(url, headers={"Range": "bytes=200-"})).status_code == 416
            resumed = {"Range": "bytes=1-2", "If-Range": whole.headers["etag"]}
            assert (await client.get(url, headers=resumed)).status_code == 206
            assert (await client.get(url, headers={**resumed, "If-Range": '"other"'})).status_code == 200
            assert (await client.get(url, headers={"If-None-Match": whole.headers["etag"]})).status_code == 304
            head = await client.head(url)
            assert (head.headers["content-length"], head.headers["x-cache"]) == ("100", "HIT")
            for name in ("content-security-policy", "x-content-type-options", "content-disposition"):
                assert name in whole.headers
        assert sum(count for path, count in site.requests.items() if path != "/nothing") == 4


async def test_signed_urls_of_s3(tmp_path: Path, port: int, seaweedfs_server: S3Server) -> None:
    """200 requests for two files reach the service twice: 99 % are hits, and so are ranges, conditions and HEAD."""
    async with contextlib.AsyncExitStack() as stack:
        bucket = await stack.enter_async_context(seaweedfs_server.bucket())
        backend = seaweedfs_server.backend(bucket, presign_endpoint_url=f"http://127.0.0.1:{port}")
        manager = StorageManager(backends={"s3": backend}, policies={"files": StoragePolicy("files", "s3")})
        await stack.enter_async_context(manager)
        service_port = urlsplit(seaweedfs_server.endpoint_url).port
        assert service_port is not None
        client = await stack.enter_async_context(nginx(tmp_path, CACHING_S3, application=service_port, port=port))
        names = ["caf\u00e9 100% + ?#.png", "b.png"]
        refs = [
            await manager.put_bytes(
                storage_key="files", **PLACE, content=HUNDRED, original_filename=name, content_type="image/png"
            )
            for name in names
        ]
        found: Counter[str] = Counter()
        for _ in range(100):
            urls = await manager.urls(refs, expires_in=HOUR, stable_for=timedelta(days=6), disposition="inline")
            for url in urls:
                response = await client.get(url)
                assert (response.status_code, response.content) == (200, HUNDRED), response.text
                assert response.headers["content-type"] == "image/png"
                assert response.headers["content-disposition"].startswith("inline")
                found[response.headers["x-cache"]] += 1
        assert found == {"HIT": 198, "MISS": 2}
        for url in urls:
            part = await client.get(url, headers={"Range": "bytes=10-19"})
            assert (part.status_code, part.content, part.headers["content-range"]) == (206, HUNDRED[10:20], "bytes 10-19/100")
            assert (await client.get(url, headers={"Range": "bytes=200-"})).status_code == 416
            resumed = {"Range": "bytes=1-2", "If-Range": part.headers["etag"]}
            assert (await client.get(url, headers=resumed)).status_code == 206
            assert (await client.get(url, headers={**resumed, "If-Range": '"other"'})).status_code == 200
            assert (await client.get(url, headers={"If-None-Match": part.headers["etag"]})).status_code == 304
            head = await client.head(url)
            for response in (part, head):
                assert response.headers["x-cache"] == "HIT"
            assert head.headers["content-length"] == "100"
        changed = await client.get(urls[0].replace("X-Amz-Signature=", "X-Amz-Signature=0"))
        assert changed.status_code == 403
        fresh = await manager.url(refs[0], expires_in=HOUR, stable_for=timedelta(days=5))
        part = await client.get(fresh, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content, part.headers["x-cache"]) == (206, HUNDRED[10:20], "MISS")
        assert (await client.get(fresh)).headers["x-cache"] == "HIT"


async def test_a_range_that_comes_first(tmp_path: Path, site: Site, port: int) -> None:
    """The whole file is fetched for it, and kept."""
    url = site.manager.public_url(await site.put("photos"))
    async with server(site) as application, nginx(tmp_path, CACHING, application=application, port=port) as client:
        part = await client.get(url, headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, HUNDRED[10:20])
        whole = await client.get(url)
        assert (whole.content, whole.headers["x-cache"]) == (HUNDRED, "HIT")


async def answer_to(port: int, target: str) -> bytes:
    """Return the answer to a request for a target as it stands: clients leave parts of some out."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_no_second_address(tmp_path: Path, site: Site, port: int) -> None:
    """What a purge does not find must not be cached: the application cannot tell some of these addresses from the file's."""
    public, signed = await site.put("photos"), await site.put("contracts")
    urls = [site.manager.public_url(public), await site.manager.url(signed, expires_in=HOUR, stable_for=HOUR)]
    async with server(site) as application, nginx(tmp_path, CACHING, application=application, port=port) as client:
        for url in urls:
            assert (await client.get(url)).status_code == 200
            path, _, query = url.partition(f":{port}")[2].partition("?")
            query = query and f"?{query}"
            others = [f"{path}{query}?", f"{path}{query}#", f"{path}{query}#a", f"/.{path}{query}", f"/{path}{query}"]
            others += [path.replace("photo", "%70hoto") + query, f"{path}/{query}", f"{path}?a=b&{query[1:]}"]
            for target in others:
                answer = await answer_to(port, target)
                if b"x-cache: hit" not in answer.lower():
                    assert answer.split(b" ")[1] in (b"400", b"403", b"404"), target
        assert len(list((tmp_path / "nginx" / "cache").rglob("*"))) == 6  # two files, each two folders deep


class Base(DeclarativeBase):
    pass


class Cached:
    """The effect that purges nginx; its handlers are set by the test."""

    folder: Path
    manager: StorageManager


async def put(event: EffectEvent) -> None:
    """Nothing is cached yet."""


async def purge(event: EffectEvent) -> None:
    names: dict[str, Any] = {}
    exec(CACHED_FILE, names)  # noqa: S102  # the recipe of the docs
    path: Path = names["cached_file"](Cached.folder, Cached.manager.public_url(event.ref))
    await asyncio.to_thread(path.unlink, missing_ok=True)


class Photo(Base):
    __tablename__ = "photo"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("photos", effects={"nginx": Effect(put=put, remove=purge)})


async def test_the_purge_after_a_commit(tmp_path: Path, site: Site, port: int, postgres_server: URL) -> None:
    journal_tables(Base.metadata)
    Cached.folder, Cached.manager = tmp_path / "nginx" / "cache", site.manager
    with contextlib.ExitStack() as stack:
        database = await asyncio.to_thread(stack.enter_context, postgres_database(postgres_server, "asyncpg"))
        engine = database.engine()
        journal = StorageJournal(engine)
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        binding = bind_storage(Base, site.manager, session_factory=sessions, journal=journal)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with server(site) as application, nginx(tmp_path, CACHING, application=application, port=port) as client:
            async with sessions.begin() as session:
                photo = Photo(file=Attachment(HUNDRED, filename="a b.png", content_type="image/png"))
                session.add(photo)
            assert photo.file is not None
            url = photo.file.public_url
            assert [(await client.get(url)).headers["x-cache"] for _ in range(2)] == ["MISS", "HIT"]
            await journal.recover()
            assert (await client.get(url)).headers["x-cache"] == "HIT"
            async with sessions.begin() as session:
                await session.delete(await session.merge(photo))
            assert (await client.get(url)).status_code == 200  # the cache knows nothing of it yet
            for _ in range(100):
                await journal.recover()
                if (await client.get(url)).status_code == 404:
                    break
                await asyncio.sleep(0.1)
            assert (await client.get(url)).status_code == 404
        binding.unbind()
        await journal.aclose()
        await engine.dispose()
        await asyncio.to_thread(stack.close)


@pytest.mark.parametrize(
    ("name", "kind", "sent", "shown"),
    [
        ("caf\u00e9 100% + ?#.png", "image/png", "image/png", "inline"),
        ("page.html", "text/html", "application/octet-stream", "attachment"),
    ],
)
async def test_private_files_are_sent_by_nginx(
    tmp_path: Path, site: Site, port: int, name: str, kind: str, sent: str, shown: str
) -> None:
    site.private = ref = await site.put("contracts", name, kind)
    async with server(site) as application, nginx(tmp_path, OFFLOADING, application=application, port=port) as client:
        response = await client.get("/private")
        assert (response.status_code, response.content, response.headers["content-type"]) == (200, HUNDRED, sent)
        assert response.headers["content-disposition"].startswith(f"{shown}; filename=")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert response.headers["cache-control"] == "private, no-cache"
        assert "x-accel-redirect" not in response.headers
        part = await client.get("/private", headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, HUNDRED[10:20])
        assert (await client.get("/private", headers={"If-None-Match": response.headers["etag"]})).status_code == 304
        head = await client.head("/private")
        assert (head.headers["content-length"], head.content) == ("100", b"")
        for path in (f"/stored/{ref.location}", f"/stored/{quote(ref.location)}", "/stored/.granite-storage", "/stored/"):
            assert (await client.get(path)).status_code == 404


async def test_public_files_past_the_application(tmp_path: Path, site: Site, port: int) -> None:
    public = await site.put("photos", "caf\u00e9 100%.png")
    page, secret = await site.put("photos", "page.html", "text/html"), await site.put("contracts")
    staged = f"photos/photo/{uuid7_hex()}/file/{uuid7_hex()}-{STAGED_NAME}"
    backend = site.manager.backend("local")
    await backend.put_bytes(staged, b"staged")
    folder = (tmp_path / "uploads" / public.location).parent
    (folder / "link.png").symlink_to(tmp_path / "uploads" / secret.location)
    (folder / ".granite-temporary").write_bytes(b"secret")
    async with nginx(tmp_path, STATIC, application=1, port=port) as client:
        response = await client.get(site.manager.public_url(public))
        assert (response.status_code, response.content, response.headers["content-type"]) == (200, HUNDRED, "image/png")
        assert response.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "content-disposition" not in response.headers
        part = await client.get(site.manager.public_url(public), headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, HUNDRED[10:20])
        response = await client.get(site.manager.public_url(page))
        assert (response.headers["content-type"], response.headers["content-disposition"]) == (
            "application/octet-stream",
            "attachment",
        )
        below = public.location.rpartition("/")[0]
        for path in (
            secret.location,
            f"photos/../{secret.location}",
            f"photos/%2e%2e/{secret.location}",
            f"photos/..%2f{secret.location}",
            f"photos../{secret.location}",
            staged,
            f"{below}/link.png",
            f"{below}/.granite-temporary",
            "photos/",
            f"{below}/",
        ):
            found = await client.get(f"/media/{path}")
            assert found.status_code >= 400, path
            assert HUNDRED not in found.content
    assert not site.requests
