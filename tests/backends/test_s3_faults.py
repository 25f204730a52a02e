"""The S3 backend before a server that fails: whatever happens, an object is there whole or not at all, and nothing else stays."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiobotocore.credentials import AioRefreshableCredentials

from granite_storage.backends import _remote, _s3_client
from granite_storage.backends._resuming import open_resuming
from granite_storage.backends._s3_client import backoff
from granite_storage.backends.s3 import S3ConfigurationError, S3StorageBackend
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)
from tests.faults.s3_proxy import (
    FaultProxy,
    Gate,
    Request,
    answer,
    answer_after,
    cut_body,
    fault_proxy,
    lose_answer,
    lose_request,
    wait_for,
)
from tests.servers import S3Server, new_client, new_session

MIB = 1 << 20
FOREVER = 1 << 30
CONTENT = os.urandom(MIB) * 6  # two parts, the first of 5 MiB
LONG = os.urandom(MIB) * 12
SMALL = b"a few bytes"


async def stream(content: bytes, size: int = MIB) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        await asyncio.sleep(0)
        yield content[start : start + size]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_s3_client, "_FIRST_BACKOFF", 0.005)


class Rig:
    """A backend behind a proxy, and one beside it that sees what is really there."""

    def __init__(self, server: S3Server, proxy: FaultProxy) -> None:
        self.server = server
        self.proxy = proxy
        self.bucket = server.shared_bucket
        self.prefix = uuid.uuid4().hex
        self.real = server.backend(self.bucket, prefix=self.prefix)
        self.backend = self.make()
        self._made: list[S3StorageBackend] = [self.real, self.backend]

    def make(self, **options: Any) -> S3StorageBackend:
        known = {"prefix": self.prefix, "endpoint_url": self.proxy.url, "conditional_writes": True}
        return self.server.backend(self.bucket, **{**known, "part_size": 5 * MIB, "read_timeout": 60, **options})

    def remake(self, **options: Any) -> None:
        self.backend = self.make(**options)
        self._made.append(self.backend)

    async def content(self, location: str) -> bytes:
        reader = await self.real.open(location)
        try:
            return await reader.read()
        finally:
            await reader.aclose()

    async def uploads(self) -> list[str]:
        async with self.real.client() as client:
            answer = await client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return [upload["Key"] for upload in answer.get("Uploads", ())]

    async def require_whole(self, location: str, content: bytes) -> None:
        assert hashlib.sha256(await self.content(location)).digest() == hashlib.sha256(content).digest()
        assert [info.location async for info in self.real.iter_objects()] == [location]
        assert await self.uploads() == []

    async def require_nothing(self) -> None:
        assert [info.location async for info in self.real.iter_objects()] == []
        assert await self.uploads() == []

    async def aclose(self) -> None:
        await self.real.delete_many([info.location async for info in self.real.iter_objects()])
        for backend in self._made:
            await backend.aclose()


@asynccontextmanager
async def rigged(server: S3Server) -> AsyncIterator[Rig]:
    with fault_proxy(server.endpoint_url) as proxy:
        rig = Rig(server, proxy)
        yield rig
        await rig.aclose()


@pytest.fixture
def _buckets(moto_server: S3Server, seaweedfs_server: S3Server) -> None:
    """Have the buckets made where it may block."""
    assert moto_server.shared_bucket
    assert seaweedfs_server.shared_bucket


@pytest.fixture
async def rig(_buckets: None, seaweedfs_server: S3Server) -> AsyncIterator[Rig]:
    async with rigged(seaweedfs_server) as rig:
        yield rig


@pytest.fixture
async def moto_rig(_buckets: None, moto_server: S3Server) -> AsyncIterator[Rig]:
    async with rigged(moto_server) as rig:
        yield rig


Write = Callable[[Rig], Awaitable[Any]]
WRITES: dict[str, tuple[Write, bytes, str]] = {
    "small bytes": (lambda rig: rig.backend.put_bytes("a", SMALL), SMALL, "PutObject"),
    "small stream": (lambda rig: rig.backend.put_stream("a", stream(SMALL)), SMALL, "PutObject"),
    "one part": (lambda rig: rig.backend.put_stream("a", stream(CONTENT[: 4 * MIB])), CONTENT[: 4 * MIB], "PutObject"),
    "large bytes": (lambda rig: rig.backend.put_bytes("a", CONTENT), CONTENT, "CompleteMultipartUpload"),
    "large stream": (lambda rig: rig.backend.put_stream("a", stream(CONTENT)), CONTENT, "CompleteMultipartUpload"),
}
every_write = pytest.mark.parametrize("write", WRITES)


class TestRetries:
    @pytest.mark.case("S3F-01")
    async def test_slow_down_on_the_second_part(self, rig: Rig) -> None:
        rig.proxy.on("UploadPart", answer(503, "SlowDown"), times=2, fits=lambda request: request.query["partNumber"] == ["2"])
        await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_whole("a", CONTENT)
        assert rig.proxy.count()["UploadPart"] == 4

    @pytest.mark.case("S3F-01")
    @every_write
    async def test_slow_down_on_everything_once(self, rig: Rig, write: str) -> None:
        call, content, _ = WRITES[write]
        for operation in ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"):
            rig.proxy.on(operation, answer(503, "SlowDown"))
        await call(rig)
        await rig.require_whole("a", content)

    @pytest.mark.case("S3F-01")
    @pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
    async def test_slow_down_for_ever(self, rig: Rig, operation: str) -> None:
        rig.remake(max_attempts=3, part_concurrency=1)
        rig.proxy.on(operation, answer(503, "SlowDown"), times=FOREVER)
        with pytest.raises(BackendUnavailableError) as caught:
            await rig.backend.put_stream("a", stream(CONTENT))
        assert (caught.value.location, type(caught.value.__cause__).__name__) == ("a", "ClientError")
        assert rig.proxy.count()[operation] == 3
        await rig.require_nothing()

    @pytest.mark.case("S3F-01")
    def test_backoff_grows_is_bounded_and_has_jitter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_s3_client, "_FIRST_BACKOFF", 0.2)
        for attempt, longest in ((1, 0.2), (2, 0.4), (3, 0.8), (20, 10.0)):
            waits = {backoff(attempt) for _ in range(50)}
            assert all(longest / 2 <= wait <= longest for wait in waits)
            assert len(waits) > 10

    @pytest.mark.parametrize(("status", "code"), [(400, "BadDigest"), (500, "InternalError"), (400, "RequestTimeout")])
    async def test_what_passes(self, rig: Rig, status: int, code: str) -> None:
        rig.proxy.on("PutObject", answer(status, code))
        await rig.backend.put_bytes("a", SMALL)
        await rig.require_whole("a", SMALL)

    async def test_bytes_that_change_on_their_way(self, rig: Rig) -> None:
        """The server verifies the checksum, so what arrives wrong is refused and sent again."""

        async def flip(request: Request) -> bytes:
            body = bytearray(await request.read_body())
            body[len(body) // 2] ^= 1

            async def flipped() -> bytes:
                return bytes(body)

            request.read_body = flipped
            return await request.forward()

        for operation in ("PutObject", "UploadPart"):
            rig.proxy.on(operation, flip)
        await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_whole("a", CONTENT)
        assert rig.proxy.count()["UploadPart"] == 3
        await rig.real.delete("a")
        await rig.backend.put_bytes("a", SMALL)
        await rig.require_whole("a", SMALL)

    async def test_a_server_that_does_not_go_on_reading(self, rig: Rig) -> None:
        rig.remake(read_timeout=1, max_attempts=2)

        async def stall(request: Request) -> None:
            await asyncio.sleep(300)

        rig.proxy.on("PutObject", stall, times=FOREVER)
        with pytest.raises(BackendUnavailableError):
            await asyncio.wait_for(rig.backend.put_stream("a", stream(CONTENT[: 4 * MIB])), 60)
        assert rig.proxy.count()["PutObject"] == 2

    async def test_a_full_store(self, rig: Rig) -> None:
        rig.proxy.on("UploadPart", answer(507, "InsufficientStorage"), after=1)
        with pytest.raises(StorageFullError):
            await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_nothing()

    @pytest.mark.case("STR-03")
    async def test_the_streams_own_error(self, rig: Rig) -> None:
        error = TimeoutError("the stream's own")

        async def failing() -> AsyncIterator[bytes]:
            for _ in range(8):
                yield bytes(MIB)
            await asyncio.sleep(0.05)
            raise error

        with pytest.raises(TimeoutError) as caught:
            await rig.backend.put_stream("a", failing())
        assert caught.value is error
        assert caught.value.__cause__ is None
        await rig.require_nothing()

    async def test_a_failing_part_stops_the_stream(self, rig: Rig) -> None:
        """A failure is not noticed only when a slow stream comes to its next part."""
        rig.proxy.on("UploadPart", answer(403, "AccessDenied"))

        async def slow() -> AsyncIterator[bytes]:
            for _ in range(6):
                yield bytes(MIB)
            await asyncio.Event().wait()
            yield b"..."

        with pytest.raises(AccessDeniedError):
            await asyncio.wait_for(rig.backend.put_stream("a", slow()), 60)
        await rig.require_nothing()


class TestLostAnswers:
    @every_write
    async def test_the_answer_to_the_publishing_request(self, rig: Rig, write: str) -> None:
        """Also S3F-18: the HEAD that settles it does not look at ETags, which are no MD5 of an object in parts."""
        call, content, publishing = WRITES[write]
        rig.proxy.on(publishing, lose_answer)
        assert await call(rig) == {"bucket": rig.bucket}
        await rig.require_whole("a", content)

    @pytest.mark.case("S3F-18")
    @every_write
    async def test_etags_are_never_compared(self, rig: Rig, write: str) -> None:
        call, content, publishing = WRITES[write]

        async def with_another_etag(request: Request) -> bytes:
            head, _, body = (await request.forward()).partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"etag:")]
            return b"\r\n".join([*lines, b'ETag: "0123456789abcdef0123456789abcdef-9"']) + b"\r\n\r\n" + body

        rig.proxy.on("HeadObject", with_another_etag, times=FOREVER)
        rig.proxy.on("PutObject", with_another_etag, times=FOREVER)
        rig.proxy.on(publishing, lose_answer)
        await call(rig)
        await rig.require_whole("a", content)

    @every_write
    async def test_every_answer_to_the_publishing_request(self, rig: Rig, write: str) -> None:
        call, content, publishing = WRITES[write]
        rig.remake(max_attempts=2)
        rig.proxy.on(publishing, lose_answer, times=FOREVER)
        await call(rig)
        await rig.require_whole("a", content)

    @every_write
    async def test_the_request_itself(self, rig: Rig, write: str) -> None:
        call, content, publishing = WRITES[write]
        rig.proxy.on(publishing, lose_request)
        await call(rig)
        await rig.require_whole("a", content)

    @every_write
    async def test_somebody_elses_object_is_left_as_it_is(self, rig: Rig, write: str) -> None:
        call, _, publishing = WRITES[write]

        async def taken(request: Request) -> None:
            await rig_put(request, b"theirs")

        rig.proxy.on(publishing, taken)
        with pytest.raises(ObjectExistsError) as caught:
            await call(rig)
        assert caught.value.location == "a"
        await rig.require_whole("a", b"theirs")

    @pytest.mark.parametrize("fault", [lose_answer, answer_after(500, "InternalError"), answer_after(503, "SlowDown")])
    async def test_the_answer_to_the_creation_of_an_upload(self, rig: Rig, fault: Any) -> None:
        rig.proxy.on("CreateMultipartUpload", fault, times=2)
        await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_whole("a", CONTENT)

    async def test_every_answer_to_the_creation_of_an_upload(self, rig: Rig) -> None:
        rig.remake(max_attempts=2)
        rig.proxy.on("CreateMultipartUpload", lose_answer, times=FOREVER)
        with pytest.raises(BackendUnavailableError):
            await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_nothing()

    async def test_the_answers_to_parts(self, rig: Rig) -> None:
        rig.proxy.on("UploadPart", lose_answer, times=2)
        await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_whole("a", CONTENT)

    async def test_the_answer_to_a_delete(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", SMALL)
        rig.proxy.on("DeleteObject", lose_answer)
        await rig.backend.delete("a")
        await rig.require_nothing()

    async def test_the_answer_to_a_copy(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", SMALL)
        rig.proxy.on("CompleteMultipartUpload", lose_answer)
        await rig.backend.copy("a", "b")
        await rig.real.delete("a")
        await rig.require_whole("b", SMALL)

    @pytest.mark.case("S3F-03")
    @pytest.mark.parametrize("done", [True, False])
    @pytest.mark.parametrize("times", [1, 2])
    async def test_200_with_an_error_inside(self, rig: Rig, done: bool, times: int) -> None:
        fault = answer_after(200, "InternalError") if done else answer(200, "InternalError")
        rig.proxy.on("CompleteMultipartUpload", fault, times=times)
        await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_whole("a", CONTENT)

    @pytest.mark.case("S3F-03")
    async def test_200_with_an_error_inside_for_ever(self, rig: Rig) -> None:
        rig.remake(max_attempts=3)
        rig.proxy.on("CompleteMultipartUpload", answer(200, "InternalError"), times=FOREVER)
        with pytest.raises(BackendUnavailableError):
            await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_nothing()

    async def test_an_upload_that_somebody_else_aborted(self, rig: Rig) -> None:
        async def abort_first(request: Request) -> bytes:
            target, method, body = request.target, request.method, request.read_body
            async with rig_client(rig) as client:
                await client.abort_multipart_upload(
                    Bucket=rig.bucket, Key=f"{rig.prefix}/a", UploadId=request.query["uploadId"][0]
                )
            request.target, request.method, request.read_body = target, method, body
            return await request.forward()

        rig.proxy.on("CompleteMultipartUpload", abort_first)
        with pytest.raises(BackendError):
            await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_nothing()


@asynccontextmanager
async def rig_client(rig: Rig) -> AsyncIterator[Any]:
    """Give a client of the real server on the proxy's event loop."""
    async with new_client(new_session(**rig.server.session_kwargs), endpoint_url=rig.server.endpoint_url) as client:
        yield client


async def rig_put(request: Request, content: bytes) -> None:
    """Store another object where a request wants to store its own."""
    from tests.servers import ACCESS_KEY, REGION, SECRET_KEY

    session = new_session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name=REGION)
    bucket = request.target.removeprefix("/").partition("/")[0]
    async with new_client(session, endpoint_url=request.upstream) as client:
        await client.put_object(Bucket=bucket, Key=request.key, Body=content)


class TestConflicts:
    @pytest.mark.case("S3F-06")
    @every_write
    async def test_once(self, rig: Rig, write: str) -> None:
        call, content, publishing = WRITES[write]
        rig.proxy.on(publishing, answer(409, "ConditionalRequestConflict"))
        await call(rig)
        await rig.require_whole("a", content)

    @pytest.mark.case("S3F-06")
    async def test_an_upload_of_bytes_is_made_anew(self, rig: Rig) -> None:
        rig.remake(max_attempts=2)
        rig.proxy.on("CompleteMultipartUpload", answer(409, "ConditionalRequestConflict"), times=2)
        await rig.backend.put_bytes("a", CONTENT)
        await rig.require_whole("a", CONTENT)
        assert rig.proxy.count()["CreateMultipartUpload"] == 2

    @pytest.mark.case("S3F-06")
    @every_write
    async def test_for_ever(self, rig: Rig, write: str) -> None:
        call, _, publishing = WRITES[write]
        rig.remake(max_attempts=2)
        rig.proxy.on(publishing, answer(409, "ConditionalRequestConflict"), times=FOREVER)
        with pytest.raises(BackendUnavailableError):
            await call(rig)
        await rig.require_nothing()


class TestInabilities:
    @pytest.mark.case("S3F-07")
    @pytest.mark.parametrize(
        ("status", "code", "message"),
        [
            (501, "NotImplemented", "A header you provided implies functionality that is not implemented"),
            (400, "NotImplemented", "..."),
            (400, "InvalidArgument", "unsupported header If-None-Match"),
            (400, "InvalidRequest", "x-amz-checksum-sha256 is not supported"),
        ],
    )
    @pytest.mark.parametrize("operation", ["PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
    async def test_a_server_that_knows_less(self, rig: Rig, operation: str, status: int, code: str, message: str) -> None:
        rig.proxy.on(operation, answer(status, code, message), times=FOREVER)
        content = SMALL if operation == "PutObject" else CONTENT
        with pytest.raises(S3ConfigurationError, match=r"conditional_writes=False.*checksums=False"):
            await rig.backend.put_stream("a", stream(content))
        await rig.require_nothing()

    @pytest.mark.case("S3F-07")
    async def test_the_switch_helps(self, rig: Rig) -> None:
        def conditional(request: Request) -> bool:
            return "if-none-match" in request.headers

        rig.proxy.on("PutObject", answer(501, "NotImplemented"), times=FOREVER, fits=conditional)
        rig.remake(conditional_writes=False)
        await rig.backend.put_bytes("a", SMALL)
        with pytest.raises(ObjectExistsError):
            await rig.backend.put_bytes("a", SMALL)
        await rig.require_whole("a", SMALL)

    async def test_an_ordinary_bad_request(self, rig: Rig) -> None:
        rig.proxy.on("PutObject", answer(400, "InvalidArgument", "the storage class is unknown"))
        with pytest.raises(BackendError) as caught:
            await rig.backend.put_bytes("a", SMALL)
        assert type(caught.value) is BackendError


def refreshable(fetched: list[str], *, fails: bool = False) -> AioRefreshableCredentials:
    """Credentials that seem to be good for an hour, and count how often they were fetched again."""

    async def fetch() -> dict[str, str]:
        fetched.append("again")
        if fails:
            raise OSError("the metadata service is away")
        return {
            "access_key": "AKIDFRESH",
            "secret_key": "fresh-secret",
            "token": "fresh-token",
            "expiry_time": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        }

    expiry = datetime.now(UTC) + timedelta(hours=1)
    return AioRefreshableCredentials("AKIDSTALE", "stale-secret", "stale-token", expiry, fetch, "tests")


class TestCredentials:
    def _use(self, rig: Rig, credentials: AioRefreshableCredentials) -> None:
        session = new_session(region_name="us-east-1")
        getattr(session, "_session", session)._credentials = credentials
        rig.remake(session=session)

    @pytest.mark.case("S3F-08")
    async def test_expired_under_way_and_refreshed(self, moto_rig: Rig) -> None:
        rig, fetched = moto_rig, list[str]()
        self._use(rig, refreshable(fetched))

        def stale(request: Request) -> bool:
            return request.headers.get("x-amz-security-token") == "stale-token"

        rig.proxy.on("UploadPart", answer(400, "ExpiredToken"), times=FOREVER, fits=stale)
        await rig.backend.put_stream("a", stream(CONTENT))
        await rig.require_whole("a", CONTENT)
        assert fetched == ["again"]

    @pytest.mark.case("S3F-08")
    @pytest.mark.parametrize("fails", [True, False])
    async def test_expired_and_not_to_be_had(self, moto_rig: Rig, fails: bool) -> None:
        rig, fetched = moto_rig, list[str]()
        self._use(rig, refreshable(fetched, fails=fails))
        rig.proxy.on("UploadPart", answer(400, "ExpiredToken", "<Token-0>stale-token</Token-0>"), times=FOREVER)
        with pytest.raises(AccessDeniedError) as caught:
            await rig.backend.put_stream("a", stream(CONTENT))
        assert 1 <= len(fetched) <= 2
        assert not any(secret in str(caught.value) for secret in ("AKID", "token-", "-token", "secret"))
        await rig.require_nothing()

    @pytest.mark.case("S3F-08")
    async def test_expired_and_given_by_hand(self, rig: Rig) -> None:
        rig.proxy.on("PutObject", answer(400, "ExpiredToken"), times=FOREVER)
        with pytest.raises(AccessDeniedError):
            await rig.backend.put_bytes("a", SMALL)
        assert rig.proxy.count()["PutObject"] == 1


async def cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class TestCancellation:
    @pytest.mark.case("S3F-05")
    async def test_two_of_five_parts_in_flight(self, rig: Rig) -> None:
        gate = Gate()
        rig.remake(part_concurrency=2)
        rig.proxy.on("UploadPart", wait_for(gate), times=FOREVER, after=1)
        before = asyncio.all_tasks()
        task = asyncio.ensure_future(rig.backend.put_stream("a", stream(CONTENT * 4)))
        await gate.reached()
        await asyncio.sleep(0.05)
        await cancelled(task)
        assert asyncio.all_tasks() - before == set()
        gate.open()
        await asyncio.sleep(0.05)
        await rig.require_nothing()

    @pytest.mark.case("S3F-05")
    async def test_a_part_that_arrives_after_the_abort(self, rig: Rig) -> None:
        """The server still shows a part after the first abort, so it is aborted again until none is left."""
        parts = b"<ListPartsResult><Part><PartNumber>1</PartNumber><ETag>e</ETag><Size>1</Size></Part></ListPartsResult>"

        async def one_left(request: Request) -> bytes:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(parts)}\r\nConnection: close\r\n\r\n"
            return head.encode() + parts

        rig.proxy.on("ListParts", one_left, times=2)
        rig.proxy.on("UploadPart", answer(403, "AccessDenied"))
        with pytest.raises(AccessDeniedError):
            await rig.backend.put_stream("a", stream(CONTENT))
        assert rig.proxy.count()["AbortMultipartUpload"] == 3
        await rig.require_nothing()

    @pytest.mark.case("S3F-05")
    async def test_the_creation_of_an_upload(self, rig: Rig) -> None:
        gate = Gate()
        rig.proxy.on("CreateMultipartUpload", wait_for(gate))
        task = asyncio.ensure_future(rig.backend.put_stream("a", stream(CONTENT)))
        await gate.reached()
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        gate.open()
        await cancelled(task)
        await rig.require_nothing()

    @pytest.mark.case("S3F-05")
    async def test_the_creation_of_an_upload_whose_answer_is_lost(self, rig: Rig) -> None:
        gate = Gate()
        held = wait_for(gate)

        async def lost(request: Request) -> None:
            await held(request)

        rig.proxy.on("CreateMultipartUpload", lost)
        rig.proxy.on("CreateMultipartUpload", lose_request, times=FOREVER)
        task = asyncio.ensure_future(rig.backend.put_stream("a", stream(CONTENT)))
        await gate.reached()
        task.cancel()
        await asyncio.sleep(0)
        gate.open()
        await cancelled(task)
        await rig.require_nothing()

    @every_write
    async def test_the_publishing_request(self, rig: Rig, write: str) -> None:
        """It may land whatever the client does, so its end is waited for, and undone."""
        call, _, publishing = WRITES[write]
        gate = Gate()
        rig.proxy.on(publishing, wait_for(gate))
        task = asyncio.ensure_future(call(rig))
        await gate.reached()
        task.cancel()
        await asyncio.sleep(0.02)
        task.cancel()
        gate.open()
        await cancelled(task)
        await rig.require_nothing()

    @pytest.mark.parametrize("write", ["small bytes", "large stream"])
    async def test_the_publishing_request_whose_answer_never_comes(
        self, rig: Rig, write: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call, _, publishing = WRITES[write]
        monkeypatch.setattr(_remote, "ANSWER_TIMEOUT", 0.2)
        landed = Gate()

        async def silent(request: Request) -> None:
            await request.forward()
            await landed.pass_through()

        rig.proxy.on(publishing, silent)
        task = asyncio.ensure_future(call(rig))
        await landed.reached()
        await cancelled(task)
        landed.open()
        await rig.require_nothing()

    async def test_a_body_that_is_not_all_sent_is_not_waited_for(self, rig: Rig) -> None:
        stuck = Gate()

        async def unread(request: Request) -> None:
            await stuck.pass_through()

        rig.proxy.on("PutObject", unread)
        task = asyncio.ensure_future(rig.backend.put_stream("a", stream(CONTENT[: 4 * MIB])))
        await stuck.reached()
        async with asyncio.timeout(2):
            await cancelled(task)
        stuck.open()
        assert rig.proxy.count() == {"PutObject": 1}
        await rig.require_nothing()

    @every_write
    async def test_somebody_elses_object_survives(self, rig: Rig, write: str) -> None:
        call, _, publishing = WRITES[write]
        await rig.real.put_bytes("a", b"theirs")
        gate = Gate()
        rig.proxy.on(publishing, wait_for(gate))
        task = asyncio.ensure_future(call(rig))
        await gate.reached()
        task.cancel()
        await asyncio.sleep(0)
        gate.open()
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), ObjectExistsError)
        await rig.require_whole("a", b"theirs")

    @pytest.mark.parametrize("write", WRITES)
    @pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03])
    async def test_at_any_time(self, rig: Rig, write: str, delay: float) -> None:
        call, content, _ = WRITES[write]
        await rig.backend.exists("a")
        task = asyncio.ensure_future(call(rig))
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            await rig.require_nothing()
        else:
            await rig.require_whole("a", content)


class TestReaders:
    @pytest.mark.parametrize("size", [-1, 100_000, MIB, 64 * MIB])
    async def test_a_cut_body_is_resumed(self, rig: Rig, size: int) -> None:
        await rig.real.put_bytes("a", LONG)
        rig.proxy.on("GetObject", cut_body(3 * MIB + 17), times=3)
        rig.proxy.on("GetObject", cut_body(0), times=2)
        reader = await open_resuming(rig.backend, "a", offset=5, length=11 * MIB)
        got = []
        while chunk := await reader.read(size):
            got.append(chunk)
        assert hashlib.sha256(b"".join(got)).digest() == hashlib.sha256(LONG[5 : 5 + 11 * MIB]).digest()
        assert reader.info.size == len(LONG)
        ranges = [request.headers["range"] for request in rig.proxy.requests]
        assert ranges[0] == f"bytes=5-{11 * MIB + 4}"
        assert ranges[1] == f"bytes={5 + 3 * MIB + 17}-{11 * MIB + 4}"
        assert all("if-match" in request.headers for request in rig.proxy.requests[1:])

    async def test_a_body_that_is_cut_again_and_again(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", SMALL * 100_000)
        rig.remake(max_attempts=3)
        rig.proxy.on("GetObject", cut_body(1000))
        rig.proxy.on("GetObject", cut_body(0), times=FOREVER)
        reader = await open_resuming(rig.backend, "a")
        with pytest.raises(BackendUnavailableError, match="byte 1000"):
            await reader.read()
        assert rig.proxy.count()["GetObject"] == 3
        await reader.aclose()

    @pytest.mark.case("S3F-10")
    async def test_replaced_while_it_is_read(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", b"x" * MIB)

        async def cut_and_replaced(request: Request) -> bytes:
            response = await cut_body(1000)(request)
            await rig_put(request, b"y" * MIB)
            return response

        rig.proxy.on("GetObject", cut_and_replaced)
        reader = await open_resuming(rig.backend, "a")
        assert await reader.read(1000) == b"x" * 1000
        with pytest.raises(BackendError, match="replaced"):
            await reader.read()
        await reader.aclose()

    async def test_deleted_while_it_is_read(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", b"x" * MIB)
        rig.proxy.on("GetObject", cut_body(1000))
        reader = await open_resuming(rig.backend, "a")
        await rig.real.delete("a")
        with pytest.raises((ObjectNotFoundError, BackendError)):
            await reader.read()
        await reader.aclose()

    @pytest.mark.case("S3F-10")
    async def test_another_range_than_was_asked_for(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", LONG[:1000])

        async def whole(request: Request) -> bytes:
            request.headers.pop("range")
            request.headers.pop("authorization")
            return (
                b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nLast-Modified: Wed, 21 Oct 2026 07:28:00 GMT\r\n\r\n" + LONG[:1000]
            )

        rig.proxy.on("GetObject", whole, times=FOREVER)
        with pytest.raises(BackendError, match="another range"):
            await rig.backend.open("a", offset=10, length=10)

    @pytest.mark.case("S3F-19")
    async def test_a_hundred_downloads_by_ten_connections(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", LONG[: 2 * MIB])
        rig.remake(max_pool_connections=10, endpoint_url=rig.server.endpoint_url)

        async def download() -> int:
            reader = await rig.backend.open("a")
            try:
                size = 0
                while chunk := await reader.read(MIB):
                    size += len(chunk)
                return size
            finally:
                await reader.aclose()

        async with asyncio.timeout(120):
            assert await asyncio.gather(*(download() for _ in range(100))) == [2 * MIB] * 100

    @pytest.mark.case("S3F-19", "STR-13")
    @pytest.mark.parametrize("close", [True, False])
    async def test_abandoned_readers_free_their_connections(self, rig: Rig, close: bool) -> None:
        await rig.real.put_bytes("a", LONG)
        rig.remake(max_pool_connections=2, endpoint_url=rig.server.endpoint_url, pool_timeout=30)
        for _ in range(6):
            reader = await rig.backend.open("a")
            await reader.read(10)
            if close:
                await reader.aclose()
                await reader.aclose()
            del reader
        assert await rig.backend.exists("a")

    @pytest.mark.case("S3F-19")
    async def test_the_wait_for_a_connection_is_bounded(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", LONG)
        rig.remake(max_pool_connections=2, pool_timeout=0.05)
        readers = [await rig.backend.open("a") for _ in range(2)]
        with pytest.raises(BackendUnavailableError, match="max_pool_connections"):
            await rig.backend.stat("a")
        for reader in readers:
            await reader.aclose()
        assert await rig.backend.exists("a")

    async def test_a_read_to_the_end_gives_the_connection_back(self, rig: Rig) -> None:
        await rig.real.put_bytes("a", SMALL)
        rig.remake(max_pool_connections=1, pool_timeout=30)
        reader = await rig.backend.open("a")
        assert await reader.read() == SMALL
        assert await rig.backend.exists("a")
        await reader.aclose()

    async def test_a_forbidden_object_is_not_a_missing_one(self, rig: Rig) -> None:
        rig.proxy.on("*", answer(403, "AccessDenied"), times=FOREVER)
        calls = (rig.backend.exists("a"), rig.backend.stat("a"), rig.backend.open("a"), rig.backend.open("a", offset=3))
        for call in calls:
            with pytest.raises(AccessDeniedError):
                await call
