"""Files that the web server in front sends: what the header says, and that it can say nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import InvalidLocationError, SizeMismatchError
from granite_storage.locations import check_location
from granite_storage.web import Offload, StoredObjectResponse
from tests.core.support import SLOT, texts
from tests.web.serving import HUNDRED, ask, serving

NGINX = Offload("X-Accel-Redirect", {"local": "/stored"})
LIMIT = settings(max_examples=50)


@pytest.fixture
async def manager(tmp_path: Path) -> Any:
    backends = {"local": LocalStorageBackend(tmp_path, fsync=False), "memory": MemoryStorageBackend()}
    policies = {"files": StoragePolicy("files", "local"), "elsewhere": StoragePolicy("elsewhere", "memory")}
    async with StorageManager(backends=backends, policies=policies) as manager:
        yield manager


async def put(manager: StorageManager, **options: Any) -> StoredObjectRef:
    return await manager.put_bytes(**{**SLOT, **options}, content=HUNDRED, content_type="image/png", original_filename="a b.png")


async def test_nginx(manager: StorageManager) -> None:
    ref = await put(manager)
    response = await ask(serving(manager, ref, offload=NGINX, disposition="inline"), range="bytes=1-2", if_none_match="*")
    assert (response.status_code, response.content, response.headers["content-length"]) == (200, b"", "0")
    assert response.headers["x-accel-redirect"] == f"/stored/{ref.location}"
    usual = await ask(serving(manager, ref, disposition="inline"))
    for name in ("content-type", "content-disposition", "content-security-policy", "x-content-type-options", "cache-control"):
        assert response.headers[name] == usual.headers[name]
    assert not {"etag", "last-modified", "content-encoding"} & set(response.headers)


async def test_other_servers(manager: StorageManager) -> None:
    ref = await put(manager)
    apache = Offload("X-Sendfile", {"local": "/srv/caf\u00e9 files/"})
    response = await ask(serving(manager, ref, offload=apache))
    assert response.headers["x-sendfile"] == f"/srv/caf%C3%A9%20files/{ref.location}"


async def test_a_root_of_a_backend_that_the_manager_does_not_have(manager: StorageManager) -> None:
    scope = {"type": "http", "method": "GET", "headers": []}
    misspelled = Offload("X-Accel-Redirect", {"locl": "/stored"})
    with pytest.raises(ConfigurationError, match=r"'locl', but the manager has no such backend \(there are: local, memory\)"):
        StoredObjectResponse(await put(manager), Request(scope), manager=manager, offload=misspelled)


async def test_what_the_application_sends_all_the_same(manager: StorageManager) -> None:
    elsewhere, ref = await put(manager, storage_key="elsewhere"), await put(manager)
    for app in (serving(manager, elsewhere, offload=NGINX), serving(manager, ref, offload=NGINX, verify=True)):
        response = await ask(app)
        assert (response.content, "x-accel-redirect" in response.headers) == (HUNDRED, False)


async def test_what_is_refused_all_the_same(manager: StorageManager, caplog: pytest.LogCaptureFixture) -> None:
    ref = await put(manager)
    held = StoredObjectRef.from_dict({**ref.to_dict(), "scan": {"status": "pending"}})
    assert (await ask(serving(manager, held, offload=NGINX))).status_code == 409
    with pytest.raises(SizeMismatchError):
        await ask(serving(manager, StoredObjectRef.from_dict({**ref.to_dict(), "size": 7}), offload=NGINX))
    await manager.delete(ref)
    response = await ask(serving(manager, ref, offload=NGINX))
    assert (response.status_code, "x-accel-redirect" in response.headers) == (404, False)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("location", ["a/../../etc/passwd", "a\r\nX-Evil: 1", "/etc/passwd", "a\\b", "a\x00"])
async def test_a_location_that_is_not_safe(manager: StorageManager, location: str) -> None:
    ref = StoredObjectRef(storage_key="files", backend="local", location=location, size=1, checksum="")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StoredObjectResponse(ref, Request(scope), manager=manager, offload=NGINX)(scope, receive, send)

    with pytest.raises(InvalidLocationError):
        await ask(app)


@LIMIT
@given(texts(min_size=1))
def test_the_value_is_one_path(location: str) -> None:
    try:
        check_location(location)
    except InvalidLocationError:
        return
    target = NGINX.target_of(StoredObjectRef(storage_key="f", backend="local", location=location, size=1, checksum=""))
    assert target is not None
    assert target.isascii()
    assert target.isprintable()
    assert unquote(target) == f"/stored/{location}"
    assert "?" not in target


def test_what_it_may_be() -> None:
    with pytest.raises(ConfigurationError, match="X-Accel-Redirect"):
        Offload("X-Redirect", {})  # type: ignore[arg-type]
    for roots in ({"": "/stored"}, {1: "/stored"}, ["local"]):
        with pytest.raises(ConfigurationError, match="root"):
            Offload("X-Sendfile", roots)  # type: ignore[arg-type]
    for root in ("stored", "", None, b"/stored", "/a\r\nb", "/a\x00"):
        with pytest.raises(ConfigurationError, match="root of 'local'"):
            Offload("X-Sendfile", {"local": root})  # type: ignore[dict-item]
