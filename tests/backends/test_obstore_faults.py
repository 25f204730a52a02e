"""The backend on obstore before a server that fails: an object is there whole or not at all, and no upload stays."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from aiohttp import web

from granite_storage.backends import _obstore_client, _remote
from granite_storage.backends._resuming import open_resuming
from granite_storage.backends.obstore import ObjectStoreBackend, ObjectStoreConfigurationError
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ObjectExistsError,
    StorageError,
)
from tests.faults.s3_proxy import (
    Fault,
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
from tests.servers import S3Server

MIB = 1 << 20
ALWAYS = 1 << 30
SMALL = b"a few bytes"
LONG = os.urandom(MIB) * 16  # four parts of 5 MiB at the most
QUICK = {"max_retries": 1, "backoff": {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=20)}}


@dataclass
class Place:
    """A bucket, a backend on it that meets the faults of a proxy, and one that does not."""

    server: S3Server
    bucket: str
    proxy: FaultProxy
    backend: ObjectStoreBackend
    direct: ObjectStoreBackend

    async def require_nothing(self, location: str = "object") -> None:
        assert not await self.direct.exists(location)
        assert await asyncio.to_thread(self.uploads) == []

    def uploads(self) -> list[str]:
        with self.server._client() as client:
            return [upload["Key"] for upload in client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]


@pytest.fixture
async def place(seaweedfs_server: S3Server) -> AsyncIterator[Place]:
    async with seaweedfs_server.bucket() as bucket:
        with fault_proxy(seaweedfs_server.endpoint_url) as proxy:
            backends = [
                ObjectStoreBackend(
                    f"s3://{bucket}", **seaweedfs_server.obstore_options(url), retry_config=QUICK, part_size=5 * MIB
                )
                for url in (proxy.url, None)
            ]
            yield Place(seaweedfs_server, bucket, proxy, *backends)
            for backend in backends:
                await backend.aclose()


async def stream(content: bytes, size: int = MIB) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        await asyncio.sleep(0)
        yield content[start : start + size]


async def read(backend: ObjectStoreBackend, location: str = "object") -> bytes:
    reader = await open_resuming(backend, location)
    try:
        return await reader.read()
    finally:
        await reader.aclose()


def read_first(fault: Fault) -> Fault:
    """Let the body come before the fault: obstore's client takes an earlier answer for a broken connection."""

    async def late(request: Request) -> bytes | None:
        await request.read_body()
        return await fault(request)

    return late


def part(number: int) -> Callable[[Request], bool]:
    return lambda request: request.query.get("partNumber") == [str(number)]


@asynccontextmanager
async def cancelled_while(place: Place, operation: str, call: Awaitable[object]) -> AsyncIterator[Gate]:
    """Cancel a call while the server has one of its requests and has not acted on it yet; the block opens the gate."""
    gate = Gate()
    place.proxy.on(operation, wait_for(gate))
    task = asyncio.ensure_future(call)
    await gate.reached()
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done(), "a cancelled write did not wait to learn what became of it"
    yield gate
    with pytest.raises(asyncio.CancelledError):
        await task


class TestParts:
    @pytest.mark.case("S3F-05")
    @pytest.mark.parametrize("number", [1, 2, 4])
    @pytest.mark.parametrize("code", [403, 503])
    async def test_a_part_that_fails_leaves_no_upload(self, place: Place, number: int, code: int) -> None:
        place.proxy.on("UploadPart", read_first(answer(code, "AccessDenied")), fits=part(number), times=ALWAYS)
        with pytest.raises(AccessDeniedError if code == 403 else BackendUnavailableError) as caught:
            await place.backend.put_stream("object", stream(LONG))
        assert caught.value.__cause__ is not None
        assert caught.value.location == "object"
        await place.require_nothing()

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [(answer(403, "AccessDenied"), AccessDeniedError), (answer(500, "InternalError"), BackendUnavailableError)],
    )
    async def test_an_end_that_fails_leaves_no_upload(self, place: Place, fault: Fault, kind: type[BackendError]) -> None:
        place.proxy.on("CompleteMultipartUpload", read_first(fault), times=ALWAYS)
        with pytest.raises(kind):
            await place.backend.put_stream("object", stream(LONG))
        await place.require_nothing()

    @pytest.mark.parametrize("fault", [lose_answer, answer_after(500, "InternalError")])
    async def test_an_end_whose_answer_is_lost_is_found(self, place: Place, fault: Fault) -> None:
        place.proxy.on("CompleteMultipartUpload", fault, times=ALWAYS)
        await place.backend.put_stream("object", stream(LONG), content_type="image/png")
        assert await read(place.direct) == LONG
        assert await asyncio.to_thread(place.uploads) == []

    async def test_an_object_that_is_there_is_seen_before_the_first_part(self, place: Place) -> None:
        await place.direct.put_bytes("object", SMALL)
        with pytest.raises(ObjectExistsError):
            await place.backend.put_stream("object", stream(LONG))
        assert place.proxy.count()["CreateMultipartUpload"] == 0
        assert await read(place.direct) == SMALL

    async def test_an_object_that_came_meanwhile_is_seen_before_the_end(self, place: Place) -> None:
        async def overtaken() -> AsyncIterator[bytes]:
            async for chunk in stream(LONG):
                yield chunk
            await place.direct.put_bytes("object", SMALL)

        with pytest.raises(ObjectExistsError):
            await place.backend.put_stream("object", overtaken())
        assert place.proxy.count()["CompleteMultipartUpload"] == 0
        assert await read(place.direct) == SMALL
        assert await asyncio.to_thread(place.uploads) == []

    @pytest.mark.case("CAN-01")
    @pytest.mark.parametrize("operation", ["CreateMultipartUpload", "CompleteMultipartUpload"])
    async def test_cancelled_while_the_server_has_a_request(self, place: Place, operation: str) -> None:
        async with cancelled_while(place, operation, place.backend.put_stream("object", stream(LONG))) as gate:
            gate.open()
        await place.require_nothing()

    @pytest.mark.case("CAN-01")
    async def test_a_part_that_arrives_after_a_cancelled_write_leaves_nothing(self, place: Place) -> None:
        async def endless() -> AsyncIterator[bytes]:
            async for chunk in stream(LONG):
                yield chunk
            await asyncio.Event().wait()

        gate = Gate()
        place.proxy.on("UploadPart", wait_for(gate))
        task = asyncio.ensure_future(place.backend.put_stream("object", endless()))
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert place.proxy.count()["AbortMultipartUpload"] == 1
        gate.open()
        await asyncio.sleep(0.2)
        await place.require_nothing()

    async def test_a_server_that_never_answers_does_not_hold_a_cancelled_writer_for_ever(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Only obstore knows the upload's id, so that may stay at the server, and the log says so."""
        monkeypatch.setattr(_remote, "ANSWER_TIMEOUT", 0.3)
        gate = Gate()
        place.proxy.on("CompleteMultipartUpload", wait_for(gate))
        task = asyncio.ensure_future(place.backend.put_stream("object", stream(LONG)))
        await gate.reached()
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=10)
        assert done
        assert task.cancelled()
        assert "a write of 'object' was abandoned" in caplog.text
        assert not await place.direct.exists("object")


class TestOneRequest:
    @pytest.mark.parametrize("fault", [lose_answer, answer_after(500, "InternalError")])
    async def test_a_lost_answer_is_settled(self, place: Place, fault: Fault) -> None:
        place.proxy.on("PutObject", fault)
        await place.backend.put_bytes("object", SMALL)
        assert await read(place.direct) == SMALL

    async def test_a_lost_request_is_made_again(self, place: Place) -> None:
        place.proxy.on("PutObject", lose_request)
        await place.backend.put_bytes("object", SMALL)
        assert await read(place.direct) == SMALL

    async def test_a_server_that_stays_away_is_unavailable(self, place: Place) -> None:
        place.proxy.on("*", lose_request, times=ALWAYS)
        with pytest.raises(BackendUnavailableError):
            await place.backend.put_bytes("object", SMALL)
        await place.require_nothing()

    async def test_a_lost_answer_is_never_taken_for_anothers_object(self, place: Place) -> None:
        """As large, and there; but of another write."""

        async def overtake(request: Request) -> None:
            await request.read_body()
            await place.direct.put_bytes("object", SMALL[::-1])

        place.proxy.on("PutObject", overtake)
        with pytest.raises(ObjectExistsError) as caught:
            await place.backend.put_bytes("object", SMALL)
        assert caught.value.__cause__ is not None
        assert await read(place.direct) == SMALL[::-1]

    @pytest.mark.case("CAN-01")
    async def test_cancelled_while_the_server_has_it(self, place: Place) -> None:
        async with cancelled_while(place, "PutObject", place.backend.put_bytes("object", SMALL)) as gate:
            gate.open()
        await place.require_nothing()

    async def test_cancelled_while_another_object_is_there(self, place: Place) -> None:
        await place.direct.put_bytes("object", SMALL[::-1])
        async with cancelled_while(place, "PutObject", place.backend.put_bytes("object", SMALL)) as gate:
            gate.open()
        assert await read(place.direct) == SMALL[::-1]

    async def test_cancelled_and_its_answer_lost(self, place: Place) -> None:
        gate = Gate()

        async def lose_later(request: Request) -> None:
            await wait_for(gate)(request)

        place.proxy.on("PutObject", lose_later)
        task = asyncio.ensure_future(place.backend.put_bytes("object", SMALL))
        await gate.reached()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        await place.require_nothing()

    async def test_cancelled_and_its_request_lost(self, place: Place) -> None:
        """It is not made again: a request that arrives after the clean-up would leave an object."""
        requests = 0
        gate = Gate()

        async def lose_later(request: Request) -> None:
            nonlocal requests
            requests += 1
            await request.read_body()
            await gate.pass_through()

        place.proxy.on("PutObject", lose_later, times=ALWAYS)
        task = asyncio.ensure_future(place.backend.put_bytes("object", SMALL))
        await gate.reached()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert requests == 2, "obstore itself makes it again once"
        await place.require_nothing()

    async def test_a_clean_up_that_fails_is_logged(self, place: Place, caplog: pytest.LogCaptureFixture) -> None:
        place.proxy.on("DeleteObjects", read_first(answer(403, "AccessDenied")), times=ALWAYS)
        with caplog.at_level(logging.ERROR, "granite_storage"):
            async with cancelled_while(place, "PutObject", place.backend.put_bytes("object", SMALL)) as gate:
                gate.open()
        assert "the clean-up of a write of 'object' failed" in caplog.text
        assert await place.direct.exists("object")


class TestCopies:
    async def test_a_lost_answer_is_settled(self, place: Place) -> None:
        await place.direct.put_bytes("source", SMALL, content_type="image/png")
        place.proxy.on("CopyObject", lose_answer, times=ALWAYS)
        await place.backend.copy("source", "object")
        assert await read(place.direct) == SMALL
        assert (await place.direct.stat("object")).content_type == "image/png"

    async def test_cancelled_while_the_server_has_it(self, place: Place) -> None:
        await place.direct.put_bytes("source", SMALL)
        async with cancelled_while(place, "CopyObject", place.backend.copy("source", "object")) as gate:
            gate.open()
        await place.require_nothing()
        assert await read(place.direct, "source") == SMALL

    async def test_cancelled_while_another_copy_is_there(self, place: Place) -> None:
        """Both carry the id of their source, so the clean-up cannot tell whose it is, and leaves it."""
        await place.direct.put_bytes("source", SMALL)
        gate = Gate()

        async def lose_later(request: Request) -> None:
            await gate.pass_through()

        place.proxy.on("CopyObject", lose_later, times=ALWAYS)
        task = asyncio.ensure_future(place.backend.copy("source", "object"))
        await gate.reached()
        await place.direct.copy("source", "object")
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await read(place.direct) == SMALL


@pytest.mark.parametrize("signed", [True, False])
async def test_the_signature_covers_what_is_sent_unless_told_otherwise(place: Place, signed: bool) -> None:
    """The documentation says so: a server then refuses what was changed on the way."""
    hashes: list[str] = []

    async def noted(request: Request) -> bytes:
        hashes.append(request.headers["x-amz-content-sha256"])
        return await request.forward()

    options = place.server.obstore_options(place.proxy.url)
    if not signed:
        options["config"]["unsigned_payload"] = True
    backend = ObjectStoreBackend(f"s3://{place.bucket}", **options)
    place.proxy.on("PutObject", noted)
    await backend.put_bytes("object", SMALL)
    assert hashes == [hashlib.sha256(SMALL).hexdigest() if signed else "UNSIGNED-PAYLOAD"]
    assert await read(place.direct) == SMALL
    await backend.aclose()


class TestReading:
    @pytest.mark.parametrize("count", [0, 1, MIB, 5 * MIB + 17])
    async def test_a_cut_body_goes_on(self, place: Place, count: int) -> None:
        await place.direct.put_bytes("object", LONG)
        place.proxy.on("GetObject", cut_body(count), times=2)
        assert await read(place.backend) == LONG

    async def test_a_body_that_is_always_cut_raises(self, place: Place) -> None:
        await place.direct.put_bytes("object", LONG)
        place.proxy.on("GetObject", cut_body(0), times=ALWAYS)
        with pytest.raises(BackendError):
            await read(place.backend)

    @pytest.mark.case("S3F-10")
    async def test_two_versions_are_never_mixed(self, place: Place) -> None:
        await place.direct.put_bytes("object", LONG)
        place.proxy.on("GetObject", cut_body(5 * MIB))
        reader = await open_resuming(place.backend, "object")
        await reader.read(MIB)
        await place.direct.delete("object")
        await place.direct.put_bytes("object", LONG[::-1])
        with pytest.raises(BackendError):
            await reader.read()
        await reader.aclose()

    async def test_a_cancelled_read_loses_nothing(self, place: Place) -> None:
        await place.direct.put_bytes("object", LONG)
        reader = await place.backend.open("object")
        first = await reader.read(1000)
        for pause in (0.0, 0.0005, 0.002):
            task = asyncio.ensure_future(reader.read(4 * MIB))
            await asyncio.sleep(pause)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                first += task.result()
        assert first + await reader.read() == LONG
        await reader.aclose()


class PoorService:
    """A web server that stalls in the middle of an object, or cuts it off, and knows no conditions."""

    def __init__(self) -> None:
        self.requests = 0
        self.first = len(LONG) // 2
        self.same = True
        self.may_go_on = asyncio.Event()
        self.was_left = asyncio.Event()

    async def cut(self, request: web.Request) -> web.StreamResponse:
        """Cut the first answer off, and send the rest of another version, as a service does that knows no condition."""
        self.requests += 1
        first = self.requests == 1
        modified = "Thu, 26 Nov 2026 00:00:00 GMT" if first or self.same else "Thu, 26 Nov 2026 00:00:01 GMT"
        response = web.StreamResponse(status=200 if first else 206, headers={"Last-Modified": modified})
        start = 0 if first else int(request.headers["Range"].removeprefix("bytes=").partition("-")[0])
        if not first:
            response.headers["Content-Range"] = f"bytes {start}-{len(LONG) - 1}/{len(LONG)}"
        response.content_length = len(LONG) - start
        await response.prepare(request)
        await response.write(LONG[start : self.first if first else len(LONG)])
        if first:
            assert request.transport is not None
            request.transport.abort()
        return response

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        response = web.StreamResponse(headers={"ETag": '"1"', "Last-Modified": "Thu, 26 Nov 2026 00:00:00 GMT"})
        response.content_length = len(LONG)
        await response.prepare(request)
        await response.write(LONG[: self.first])
        try:
            await self.may_go_on.wait()
        except asyncio.CancelledError:  # the client has closed its connection
            self.was_left.set()
            raise
        await response.write(LONG[self.first :])
        return response


@pytest.fixture
async def poor() -> AsyncIterator[tuple[PoorService, ObjectStoreBackend]]:
    service = PoorService()
    app = web.Application()
    app.router.add_get("/object", service.answer)
    app.router.add_get("/cut", service.cut)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        backend = ObjectStoreBackend(url, client_options={"allow_http": True}, retry_config={"max_retries": 0})
        yield service, backend
        await backend.aclose()
    finally:
        await runner.cleanup()


class TestReadingFromAPoorService:
    @pytest.mark.time_bound
    async def test_nothing_more_is_asked_for_before_it_is_wanted(self, poor: tuple[PoorService, ObjectStoreBackend]) -> None:
        service, backend = poor
        service.first = 600 * 1024
        reader = await backend.open("object")
        assert await reader.read(4096) == LONG[:4096]
        started = asyncio.get_running_loop().time()
        await reader.aclose()
        assert asyncio.get_running_loop().time() - started < _obstore_client.CANCEL_TIMEOUT / 2

    @pytest.mark.parametrize("first", [0, 4 * MIB])
    async def test_a_read_that_is_cancelled_goes_on_in_the_same_answer(
        self, poor: tuple[PoorService, ObjectStoreBackend], first: int
    ) -> None:
        service, backend = poor
        service.first = first
        reader = await backend.open("object")
        content = b""
        with pytest.raises(TimeoutError):
            while True:
                async with asyncio.timeout(0.3):
                    content += await reader.read(MIB)
        service.may_go_on.set()
        assert content + await reader.read() == LONG
        assert service.requests == 1
        await reader.aclose()

    @pytest.mark.case("S3F-10")
    @pytest.mark.parametrize("same", [True, False])
    async def test_two_versions_are_not_mixed_where_there_are_no_conditions(
        self, poor: tuple[PoorService, ObjectStoreBackend], same: bool
    ) -> None:
        service, backend = poor
        service.same = same
        if same:
            assert await read(backend, "cut") == LONG
        else:
            with pytest.raises(BackendError, match="changed"):
                await read(backend, "cut")
        assert service.requests == 2

    @pytest.mark.time_bound
    @pytest.mark.case("CAN-03")
    @pytest.mark.parametrize("cancelled", [False, True])
    async def test_a_reader_that_is_closed_lets_go_soon(
        self, poor: tuple[PoorService, ObjectStoreBackend], cancelled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_obstore_client, "CANCEL_TIMEOUT", 0.2)
        service, backend = poor
        reader = await backend.open("object")
        with pytest.raises(TimeoutError):
            while True:
                async with asyncio.timeout(0.1):
                    await reader.read(MIB)
        async with asyncio.timeout(1):
            closing = asyncio.ensure_future(reader.aclose())
            await asyncio.sleep(0.05)
            if cancelled:
                closing.cancel()
            await asyncio.wait([closing])
        assert closing.cancelled() is cancelled
        del reader
        async with asyncio.timeout(5):
            await service.was_left.wait()


async def test_every_error_is_of_the_family(place: Place) -> None:
    """Whatever a server says to whatever is asked: nothing of obstore's comes out."""
    await place.direct.put_bytes("there", SMALL)
    for status in (400, 401, 403, 404, 405, 409, 411, 412, 416, 429, 500, 501, 503, 507):
        place.proxy.on("*", read_first(answer(status, "AFault")), times=ALWAYS)
        for call in (
            lambda: place.backend.put_bytes("object", SMALL),
            lambda: place.backend.open("there"),
            lambda: place.backend.stat("there"),
            lambda: place.backend.copy("there", "object"),
        ):
            with pytest.raises(StorageError) as caught:
                await call()
            assert not isinstance(caught.value, OSError)
        place.proxy._rules.clear()
    assert not issubclass(ObjectStoreConfigurationError, OSError)
    await place.require_nothing()


class TestWhatObstoreHolds:
    """obstore keeps what its futures resolved to until its next call, so none is made here before it is looked."""

    @pytest.mark.case("CAN-01")
    @pytest.mark.parametrize("cancelled", [False, True])
    @pytest.mark.parametrize("verb", ["stat", "open", "copy", "put_bytes"])
    async def test_a_file_is_closed_when_its_call_is_over(self, tmp_path: Path, verb: str, cancelled: bool) -> None:
        backend = ObjectStoreBackend(tmp_path.as_uri())
        await backend.put_bytes("object", SMALL)

        async def call(target: str) -> None:
            if verb == "open":
                await (await backend.open("object")).aclose()
            elif verb == "stat":
                await backend.stat("object")
            elif verb == "copy":
                await backend.copy("object", target)
            else:
                await backend.put_bytes(target, SMALL)

        class Answering:
            """Cancels the caller when it has an answer that it has not seen yet."""

            def __getattr__(self, name: str) -> Any:
                async def answering(*args: Any, **kwargs: Any) -> Any:
                    answer = getattr(obstore, name)(store, *args, **kwargs)
                    if cancelled:
                        answer.add_done_callback(lambda _: task.cancel())
                    return await answer

                return answering

        store: Any = await backend.store()
        backend._client._store = Answering()
        for number in range(100):
            task = asyncio.ensure_future(call(f"target/{number}"))
            await asyncio.wait([task])
            assert task.cancelled() is cancelled
            task = asyncio.ensure_future(asyncio.sleep(0))
            await require_closed(tmp_path)
            assert (tmp_path / f"target/{number}").exists() is (verb in ("copy", "put_bytes") and not cancelled)
        assert not [path for path in tmp_path.rglob("*") if "#" in path.name]

    @pytest.mark.time_bound
    async def test_a_connection_is_closed_with_its_store_after_an_error(self, place: Place) -> None:
        for number in range(60):
            backend = ObjectStoreBackend(f"s3://{place.bucket}", **place.server.obstore_options())
            before = sockets()
            assert not await backend.exists(f"nothing/{number}")
            await backend.aclose()
            deadline = asyncio.get_running_loop().time() + 1
            while sockets() - before:
                assert asyncio.get_running_loop().time() < deadline, "a connection of a closed backend stays open"
                await asyncio.sleep(0.005)

    @pytest.mark.case("CAN-03")
    async def test_a_reader_that_is_cancelled_does_not_wait_long(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_obstore_client, "CANCEL_TIMEOUT", 0.1)
        gate = Gate()
        place.proxy.on("HeadObject", wait_for(gate))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await place.backend.exists("object")
        gate.open()


def test_a_program_that_ends_with_an_answer_is_not_aborted() -> None:
    """A thread of obstore's that still wakes the event loop when Python ends would be unwound through Rust."""
    program = """
        import asyncio, threading, time
        from granite_storage.backends.obstore import ObjectStoreBackend

        class SlowEnd:
            def __del__(self, sleep=time.sleep):
                sleep(0.5)

        class Loop(asyncio.SelectorEventLoop):
            def _write_to_self(self):
                super()._write_to_self()
                soon = time.monotonic() + 0.2
                while threading.get_native_id() != main and time.monotonic() < soon:
                    pass

        slow_end = SlowEnd()
        main = threading.get_native_id()
        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(ObjectStoreBackend("memory:///").put_bytes("object", b"..."))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


async def require_closed(folder: Path) -> None:
    deadline = asyncio.get_running_loop().time() + 1
    while left := [target for target in open_files() if target.startswith(str(folder))]:
        assert asyncio.get_running_loop().time() < deadline, f"a call that is over has left open: {left}"
        await asyncio.sleep(0.002)


def sockets() -> set[str]:
    return {target for target in open_files() if target.startswith("socket:")}


def open_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found
