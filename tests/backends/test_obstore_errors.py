"""What an error of obstore's is taken for: its type and what the service answered, whatever the object is called."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from typing import Any

import pytest

from granite_storage import BackendUnavailableError, ObjectNotFoundError
from granite_storage._telemetry import redact
from granite_storage.backends.obstore import ObjectStoreBackend, ObjectStoreConfigurationError
from granite_storage.exceptions import AccessDeniedError, BackendError, ObjectExistsError, StorageFullError
from tests.azurite import AzureServer
from tests.core.support import PROJECT
from tests.faults.s3_proxy import FaultProxy, answer, fault_proxy, lose_answer
from tests.servers import S3Server

MIB = 1 << 20
QUICK: dict[str, Any] = {
    "max_retries": 1,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=2), "base": 2},
}
ALWAYS = 1000
NAMES = [
    "a",
    "e",
    "t",
    "1",
    "r/o",
    "status code: 404 Not Found",
    " - Server returned non-2xx status code: 404 Not Found: ",
    "x not found: Error performing GET http:/h/b in 1ms - Server returned non-2xx status code: 403 Forbidden",
    "Status { status: 404, body: None }",
    "HttpError",
    "HTTP error: timed out",
    "(os error 28)",
    "Debug source:",
    'a "quoted" name',
    "NotFound",
    "InvalidRange",
]


def backend_on(proxy: FaultProxy, server: S3Server, bucket: str, **options: Any) -> ObjectStoreBackend:
    return ObjectStoreBackend(f"s3://{bucket}", **server.obstore_options(proxy.url), retry_config=QUICK, **options)


@pytest.mark.case("RD-04")
async def test_an_error_is_the_same_whatever_the_object_is_called(moto_server: S3Server) -> None:
    wanted = {
        (400, "InvalidRequest"): BackendError,
        (403, "AccessDenied"): AccessDeniedError,
        (404, "NoSuchKey"): ObjectNotFoundError,
        (503, "SlowDown"): BackendUnavailableError,
        (507, "QuotaExceeded"): StorageFullError,
    }
    async with moto_server.bucket() as bucket:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            backend = backend_on(proxy, moto_server, bucket)
            assert not await backend.exists("the-bucket-is-there")
            for (status, code), kind in wanted.items():
                for name in NAMES:
                    proxy.on("GetObject", answer(status, code, f"{name}\n\nDebug source:\n{name}"), times=ALWAYS)
                    with pytest.raises(BackendError) as raised:
                        await backend.open(name)
                    assert type(raised.value) is kind, (name, status)
                    proxy._rules.clear()
            await backend.aclose()


@pytest.mark.case("RD-04")
@pytest.mark.parametrize("name", [NAMES[0], NAMES[1], *NAMES[6:8], *NAMES[10:12]])
async def test_what_the_writer_of_parts_says_is_read_past_the_name(name: str, moto_server: S3Server) -> None:
    """Only a text comes from its end."""
    content = bytes(6 * MIB)
    async with moto_server.bucket() as bucket:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            backend = backend_on(proxy, moto_server, bucket, part_size=5 * MIB)
            for status, code, kind in (
                (403, "AccessDenied", AccessDeniedError),
                (503, "SlowDown", BackendUnavailableError),
                (507, "QuotaExceeded", StorageFullError),
                (400, "EntityTooSmall", BackendError),
            ):
                proxy.on("CompleteMultipartUpload", answer(status, code, name), times=ALWAYS)
                with pytest.raises(BackendError) as raised:
                    await backend.put_bytes(name, content)
                assert type(raised.value) is kind
                proxy._rules.clear()
            proxy.on("CompleteMultipartUpload", lose_answer, times=1)
            await backend.put_bytes(name, content)
            assert (await backend.stat(name)).size == len(content)
            await backend.aclose()


@pytest.mark.case("RD-04")
async def test_an_object_called_like_an_error_is_read_and_deleted(moto_server: S3Server) -> None:
    async with moto_server.bucket() as bucket:
        backend = ObjectStoreBackend(f"s3://{bucket}", **moto_server.obstore_options())
        for name in NAMES:
            await backend.put_bytes(name, b"")
            reader = await backend.open(name)
            assert await reader.read() == b""
            await reader.aclose()
            with pytest.raises(ObjectExistsError):
                await backend.put_bytes(name, b"other")
        assert await backend.delete_many(NAMES) == {}
        await backend.aclose()


async def require_every_verb_refuses(open_backend: Any) -> None:
    """Ask a fresh backend for each: what one has learnt is not to help the next."""

    async def first(backend: ObjectStoreBackend) -> None:
        async for _ in backend.iter_objects():
            break

    verbs = {
        "exists": lambda backend: backend.exists("a"),
        "stat": lambda backend: backend.stat("a"),
        "open": lambda backend: backend.open("a"),
        "open a range": lambda backend: backend.open("a", offset=0, length=0),
        "put_bytes": lambda backend: backend.put_bytes("a", b"content"),
        "put large": lambda backend: backend.put_bytes("a", bytes(6 * MIB)),
        "copy": lambda backend: backend.copy("a", "b"),
        "delete": lambda backend: backend.delete("a"),
        "list": first,
    }
    for verb, call in verbs.items():
        backend = open_backend()
        with pytest.raises(ObjectStoreConfigurationError, match="bucket"):
            await call(backend)
            pytest.fail(f"{verb} does not say that there is no bucket")
        await backend.aclose()
    backend = open_backend()
    failures = await backend.delete_many(["a", "b"])
    assert {location: type(error) for location, error in failures.items()} == dict.fromkeys("ab", ObjectStoreConfigurationError)
    await backend.aclose()


@pytest.mark.case("RD-05")
async def test_a_missing_bucket_is_a_configuration_error_in_every_verb(moto_server: S3Server) -> None:
    await require_every_verb_refuses(
        lambda: ObjectStoreBackend("s3://no-such-bucket-here", **moto_server.obstore_options(), part_size=5 * MIB)
    )


@pytest.mark.case("RD-05")
async def test_a_missing_container_is_a_configuration_error_in_every_verb(azurite_server: AzureServer) -> None:
    await require_every_verb_refuses(lambda: azurite_server.backend("no-such-container", part_size=5 * MIB))


@pytest.mark.case("RD-05")
async def test_the_bucket_is_asked_for_once(moto_server: S3Server) -> None:
    async with moto_server.bucket() as bucket:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            backend = backend_on(proxy, moto_server, bucket)
            for number in range(4):
                assert not await backend.exists(f"nothing/{number}")
            assert proxy.count() == {"HeadObject": 4, "ListObjectsV2": 1}
            proxy.requests.clear()
            fresh = backend_on(proxy, moto_server, bucket)
            await fresh.put_bytes("a", b"...")
            assert not await fresh.exists("b")
            assert proxy.count()["ListObjectsV2"] == 0
            await fresh.aclose()
            await backend.aclose()


@pytest.mark.case("RD-05")
async def test_a_bucket_that_may_not_be_listed_is_taken_to_be_there(moto_server: S3Server) -> None:
    async with moto_server.bucket() as bucket:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            proxy.on("ListObjectsV2", answer(403, "AccessDenied"), times=ALWAYS)
            backend = backend_on(proxy, moto_server, bucket)
            assert not await backend.exists("nothing")
            await backend.delete("nothing")
            await backend.aclose()


FORKED = """
import asyncio, os, sys
from granite_storage import ConfigurationError
from granite_storage.backends.obstore import ObjectStoreBackend

backend = ObjectStoreBackend("memory:///")
if sys.argv[1] == "used":
    asyncio.run(backend.put_bytes("parent", b"..."))

async def child():
    try:
        await backend.put_bytes("child", b"...")
        print("stored", flush=True)
    except ConfigurationError as error:
        print(error, flush=True)

if os.fork() == 0:
    asyncio.run(asyncio.wait_for(child(), 20))
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(("state", "said"), [("used", "spawn"), ("unused", "stored")])
def test_a_forked_child_raises_at_once_instead_of_waiting_for_threads_it_does_not_have(state: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, state],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said in done.stdout


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.case("RE-13")
async def test_a_password_and_a_signature_in_an_address_reach_no_log_line(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """The chain of an error goes into log lines, and obstore's error quotes the address that it asked."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b"no: https://reader:hunter2@host/a?sig=c2VjcmV0"
        writer.write(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    backend = ObjectStoreBackend(
        f"http://reader:hunter2@127.0.0.1:{port}/folder?sig=c2VjcmV0", client_options={"allow_http": True}, retry_config=QUICK
    )
    with pytest.raises(BackendError) as raised:
        await backend.open("object")
    server.close()
    await server.wait_closed()
    await backend.aclose()
    cause = raised.value.__cause__
    assert cause is not None
    raised.value.add_note("it was asked with ?token=hunter2")
    said = "".join(traceback.format_exception(cause))
    assert "hunter2" in said  # or the test would prove nothing
    with caplog.at_level(logging.INFO, "granite_storage"):
        logging.getLogger("granite_storage").error("it failed: %s", said, exc_info=raised.value)
        try:
            raise RuntimeError("afterwards") from ExceptionGroup("several", [raised.value, cause])  # type: ignore[list-item]
        except RuntimeError:
            logging.getLogger("granite_storage").exception("it failed again")
    assert "hunter2" not in caplog.text
    assert "c2VjcmV0" not in caplog.text
    assert "127.0.0.1" in caplog.text  # where it was, is no secret
    for record in caplog.records:
        assert record.exc_info is not None
        assert "hunter2" not in "".join(traceback.format_exception(record.exc_info[1]))
    assert raised.value.__cause__ is cause
    assert raised.value.__notes__ == ["it was asked with ?token=hunter2"]
    assert "hunter2" in str(cause)


@pytest.mark.case("RE-13")
@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("GET https://u:p@host/a/b?x=1&y=2 failed", "GET https://host/a/b?... failed"),
        ("https://u:p@ss@host:1/a", "https://host:1/a"),
        ("X-Amz-Signature=abc&X-Amz-Security-Token=FwoG/+=", "X-Amz-Signature=...&X-Amz-Security-Token=..."),
        ("{'secret_access_key': 'abc', 'region': 'eu'}", "{'secret_access_key': ..., 'region': 'eu'}"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AK/1, Signature=abc", "Authorization: ..."),
        ("sig=abc%3D&se=2026", "sig=...&se=2026"),
        ("s3://bucket/a/b is not there", "s3://bucket/a/b is not there"),
        ("the design of the signature: 3 tokens", "the design of the signature: ... tokens"),
    ],
)
def test_secrets_are_taken_out_of_a_text(text: str, redacted: str) -> None:
    assert redact(text) == redacted


@pytest.mark.case("RE-13")
def test_an_error_without_a_secret_is_logged_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    error = BackendError("it failed")
    error.__cause__ = OSError(5, "Input/output error")
    logging.getLogger("granite_storage").error("so it is", exc_info=error)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
