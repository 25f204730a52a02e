"""Scanning with clamd: verdicts, what can go wrong on the way to one, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import io
import socket
import subprocess
import sys
import time
import weakref
import zipfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from granite_storage.exceptions import ConfigurationError, ScannerUnavailableError, StorageError
from granite_storage.inspection import Scanner, ScanResult
from granite_storage.inspection.clamd import ClamdScanner
from granite_storage.testing._cases.cancelling import Moment, cancel_at_every_await
from tests.inspection.clamd_daemon import STREAM_MAX_LENGTH, ClamdDaemon, clamd
from tests.inspection.clamd_server import (
    EICAR,
    ClamdServer,
    Fault,
    close,
    close_one_side,
    flood,
    hang,
    reset,
    say,
    say_last,
    stop_listening,
    stop_reading,
    trickle,
)
from tests.services import service

MIB = 1 << 20
SHORT = 0.05
"""The timeouts of scanners that are to run into them, in seconds."""

BOUND = 15.0
"""How long a scan that cannot succeed may take, in seconds: a tenth of the default timeout, ample on a busy machine."""

VERSION = "clamd 1.4.2/27500"
MOMENTS: list[Moment] = ["at once", "a little later", "twice"]


@pytest.fixture
def socket_path(_temporary_folder: Path) -> Iterator[Path]:
    path = _temporary_folder / "clamd.sock"  # its path is short, as that of a socket must be
    yield path
    path.unlink(missing_ok=True)


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def slowly(chunks: Iterable[bytes], seconds: float = 0.0) -> AsyncIterator[bytes]:
    for chunk in chunks:
        await asyncio.sleep(seconds)
        yield chunk


def large(size: int = 24 * MIB) -> AsyncIterator[bytes]:
    """More than the buffers of both ends of a connection hold."""
    return stream(*[bytes(MIB)] * (size // MIB))


def archive(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("readme.txt", b"nothing")
        members.writestr("folder/program.com", content)
    return file.getvalue()


async def refused(server: ClamdServer, content: AsyncIterator[bytes], **options: Any) -> ScannerUnavailableError:
    """Have content scanned in vain; return the error, once the time it took and what it left were found to be in order."""
    scanner = ClamdScanner(server.address, **{"timeout": SHORT, **options})
    begun = time.monotonic()
    with pytest.raises(ScannerUnavailableError) as caught:
        await scanner.scan(content)
    assert time.monotonic() - begun < BOUND
    assert server.address in str(caught.value)
    await server.until_left()
    return caught.value


TIMEOUTS = ("timeout", "connect_timeout", "content_timeout")


class TestVerdicts:
    @pytest.mark.parametrize(
        "chunks",
        [
            (),
            (b"",),
            (b"harmless",),
            (EICAR[:40], b"not", EICAR[40:]),
            (bytes(MIB),) * 5 + (b"and a bit",),
            (bytes(3 * MIB + 1),),
        ],
        ids=["nothing", "one empty chunk", "small", "signature with a gap", "large", "one large chunk"],
    )
    async def test_clean(self, chunks: tuple[bytes, ...]) -> None:
        async with ClamdServer().listening() as server:
            assert await ClamdScanner(server.address).scan(stream(*chunks)) == ScanResult(True, VERSION)
            await server.until_left()
        assert server.streams == [sum(map(len, chunks))]

    @pytest.mark.parametrize(
        "chunks",
        [
            (EICAR,),
            (EICAR[:20], EICAR[20:]),
            tuple(EICAR[start : start + 1] for start in range(len(EICAR))),
            (b"before", b"", EICAR, b"", b"after"),
            (bytes(MIB - 30) + EICAR + bytes(MIB),),
            (bytes(256 * 1024 - 30) + EICAR,),
        ],
        ids=["alone", "in two chunks", "byte by byte", "between empty chunks", "inside", "across pieces"],
    )
    async def test_infected(self, chunks: tuple[bytes, ...]) -> None:
        async with ClamdServer().listening() as server:
            assert await ClamdScanner(server.address).scan(stream(*chunks)) == ScanResult(False, VERSION, "Eicar-Test")

    @pytest.mark.parametrize("opens_zips", [True, False])
    async def test_a_member_of_an_archive(self, opens_zips: bool) -> None:
        async with ClamdServer(opens_zips=opens_zips).listening() as server:
            scanner = ClamdScanner(server.address)
            assert (await scanner.scan(stream(archive(EICAR)))).is_clean is not opens_zips
            assert (await scanner.scan(stream(archive(b"harmless")))).is_clean

    async def test_a_verdict_before_the_end(self) -> None:
        """What is found early counts, and the rest is not sent."""
        sent = 0

        async def content() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(100):
                sent += 1
                yield bytes(1000)
                await asyncio.sleep(0.005)

        async with ClamdServer(faults={"middle": say_last(b"stream: Some.Virus-1 FOUND\0")}).listening() as server:
            result = await ClamdScanner(server.address).scan(content())
            await server.until_left()
        assert result.signature == "Some.Virus-1"
        assert sent < 50
        assert server.streams == []

    async def test_more_after_a_finding(self) -> None:
        async with ClamdServer(faults={"end": say(b"stream: Some.Virus-1 FOUND\0")}).listening() as server:
            assert (await ClamdScanner(server.address).scan(stream(b"x"))).signature == "Some.Virus-1"

    async def test_odd_signature(self) -> None:
        """What could forge a line of a log is not passed on, and the rest is cut."""
        answer = b"stream: Odd\n\x1b[31m\xff" + b"x" * 1000 + b" FOUND\0"
        async with ClamdServer(faults={"end": say_last(answer)}).listening() as server:
            result = await ClamdScanner(server.address).scan(stream(b"harmless"))
        assert not result.is_clean
        assert result.signature is not None
        assert result.signature.isprintable()
        assert result.signature.startswith("Odd??[31m")
        assert len(result.signature) == 200

    async def test_is_a_scanner(self) -> None:
        scanner: Scanner = ClamdScanner("127.0.0.1:3310", on_unavailable="hold")
        assert isinstance(scanner, Scanner)
        assert scanner.on_unavailable == "hold"
        assert ClamdScanner("127.0.0.1:3310").on_unavailable == "refuse"
        assert repr(scanner) == "ClamdScanner('127.0.0.1:3310', on_unavailable='hold')"


class TestPlaces:
    """Where clamd may listen."""

    @pytest.mark.parametrize("prefix", ["", "unix:", "unix://"])
    async def test_unix_socket(self, prefix: str, socket_path: Path) -> None:
        async with ClamdServer().listening(socket_path) as server:
            scanner = ClamdScanner(f"{prefix}{socket_path}")
            assert not (await scanner.scan(stream(bytes(2 * MIB), EICAR))).is_clean
            assert (await scanner.scan(large())).is_clean
            await server.until_left()

    async def test_ipv6(self) -> None:
        async with ClamdServer().listening("::1") as server:
            assert server.address.startswith("[::1]:")
            assert (await ClamdScanner(server.address).scan(stream(b"x"))).is_clean

    @pytest.mark.parametrize("at", ["127.0.0.1", "::1"])
    async def test_name(self, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each address of a name is tried."""
        looked_up = socket.getaddrinfo

        def both(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
            if host != "scanner.test":
                return looked_up(host, port, *args, **kwargs)
            first, second = (socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))
            return [(family, socket.SOCK_STREAM, 6, "", address) for family, address in (first, second)]

        monkeypatch.setattr(socket, "getaddrinfo", both)
        async with ClamdServer().listening(at) as server:
            port = server.address.rpartition(":")[2]
            assert (await ClamdScanner(f"scanner.test:{port}").scan(stream(b"x"))).is_clean
            assert (await ClamdScanner(f"scanner.test:{port}").ping()) == VERSION

    async def test_name_server_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(4 * SHORT))
        begun = time.monotonic()
        with pytest.raises(ScannerUnavailableError, match=r"cannot be reached \(no answer within 0\.05 s\)"):
            await ClamdScanner("scanner.test:3310", connect_timeout=SHORT).scan(stream(b"x"))
        assert time.monotonic() - begun < BOUND

    async def test_unknown_name(self) -> None:
        with pytest.raises(ScannerUnavailableError, match=r"nowhere\.invalid:3310 cannot be reached") as caught:
            await ClamdScanner("nowhere.invalid:3310").scan(stream(b"x"))
        assert isinstance(caught.value.__cause__, OSError)

    @pytest.mark.parametrize(
        "address",
        [
            "",
            "localhost",
            "3310",
            ":3310",
            "localhost:",
            "localhost:0",
            "localhost:65536",
            "localhost:-1",
            "localhost:３３１０",
            "local host:3310",
            "user@localhost:3310",
            "::1:3310",
            "[::1]",
            "[::g]:3310",
            "[127.0.0.1]:3310",
            "127.0.0.300:3310",
            "a..b:3310",
            f"{'a' * 64}.test:3310",
            "tcp://localhost:3310",
            "localhost:3310\n",
            "unix:clamd.sock",
            "run/clamd.sock",
            "/run/\0/clamd.sock",
            f"/{'long' * 30}.sock",
            None,
            b"localhost:3310",
            ("localhost", 3310),
        ],
    )
    def test_what_is_no_address(self, address: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            ClamdScanner(address)
        assert repr(address) in str(caught.value)

    @pytest.mark.parametrize(
        "options",
        [
            {"on_unavailable": "ignore"},
            {"on_unavailable": None},
            *(
                {name: value}
                for name in ("timeout", "connect_timeout", "content_timeout")
                for value in (0, -1, True, None, "1", float("nan"))
            ),
            {"timeout": float("inf")},
            {"max_concurrent": 0},
            {"max_concurrent": 1.5},
            {"max_concurrent": True},
            {"max_concurrent": None},
        ],
        ids=str,
    )
    def test_what_is_no_option(self, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            ClamdScanner("localhost:3310", **options)
        (name, value), *_ = options.items()
        assert name in str(caught.value)
        assert repr(value) in str(caught.value)


SMALL = (b"a harmless file",)
LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"\0", "is not a verdict"),
    "a web server": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answered 'HTTP/1.1 400 Bad Request"),
    "no NUL": (b"stream: OK", "answered 'stream: OK', which"),
    "half of it": (b"stream: O", "is not a verdict"),
    "a line": (b"stream: OK\n", "is not a verdict"),
    "two verdicts": (b"stream: OK\0stream: Eicar FOUND\0", "is not a verdict"),
    "more after OK": (b"stream: OK\0?", "is not a verdict"),
    "more before OK": (b"stream: stream: OK\0", "is not a verdict"),
    "OK of a file": (b"/tmp/file: OK\0", "is not a verdict"),
    "small letters": (b"stream: ok\0", "is not a verdict"),
    "nothing found": (b"stream:  FOUND\0", "is not a verdict"),
    "bytes": (b"\xff\xfe\x01\0", "is not a verdict"),
    "error": (b"stream: Can't open file or directory ERROR\0", "Can't open file or directory ERROR"),
    "unknown command": (b"UNKNOWN COMMAND\0", "UNKNOWN COMMAND"),
    "timed out": (b"COMMAND READ TIMED OUT\n", "ReadTimeout in clamd.conf"),
    "size limit": (b"INSTREAM size limit exceeded. ERROR\0", "StreamMaxLength in clamd.conf"),
}


async def after_the_fault(server: ClamdServer, *chunks: bytes) -> AsyncIterator[bytes]:
    """Give one chunk, and the others once what is said out of turn has arrived."""
    yield b"one"
    await server.met.wait()
    await asyncio.sleep(SHORT)
    for chunk in chunks:
        yield chunk


class TestFaults:
    @pytest.mark.parametrize("lie", LIES)
    async def test_what_is_no_verdict(self, lie: str) -> None:
        answer, message = LIES[lie]
        async with ClamdServer(faults={"end": say_last(answer)}).listening() as server:
            assert message in str(await refused(server, stream(*SMALL), timeout=BOUND))

    @pytest.mark.parametrize("step", ["accepted", "command", "middle"])
    @pytest.mark.parametrize("answer", [b"stream: OK\0", b"stream: ", b"s"])
    async def test_clean_before_the_end(self, step: str, answer: bytes) -> None:
        """Not even the beginning of an answer may come before all was sent."""
        async with ClamdServer(faults={step: say(answer)}).listening() as server:
            error = await refused(server, after_the_fault(server, b"two", EICAR))
        if answer.endswith(b"\0"):
            assert "before it had received all" in str(error)
        assert server.streams == []

    async def test_clean_as_the_content_ends(self) -> None:
        """The answer is there when the last chunk was sent, and the end of the stream was not."""
        async with ClamdServer(faults={"middle": say(b"stream: OK\0")}).listening() as server:
            assert "before it had received all" in str(await refused(server, after_the_fault(server)))

    @pytest.mark.parametrize("step", ["accepted", "command", "middle", "end"])
    @pytest.mark.parametrize("fault", [hang, stop_reading, trickle])
    @pytest.mark.parametrize("size", ["small", "large"])
    async def test_hangs(self, step: str, fault: Fault, size: str) -> None:
        async with ClamdServer(faults={step: fault}).listening() as server:
            error = await refused(server, large() if size == "large" else stream(*SMALL))
        if fault is not trickle:
            assert "neither read nor answered for 0.05 s" in str(error)
            assert isinstance(error.__cause__, TimeoutError)

    @pytest.mark.time_bound
    async def test_is_waited_for_once(self) -> None:
        """What has not read in time gets no time to answer."""
        async with ClamdServer(faults={"middle": stop_reading}).listening() as server:
            begun = time.monotonic()
            await refused(server, large(), timeout=0.5)
        assert 0.5 <= time.monotonic() - begun < 0.95

    @pytest.mark.parametrize(
        ("step", "fault"),
        [
            *((step, fault) for step in ("accepted", "command", "middle", "end") for fault in (close, reset)),
            *((step, close_one_side) for step in ("accepted", "command", "middle")),
        ],
    )
    @pytest.mark.parametrize("size", ["small", "large", "slow"])
    async def test_closes(self, step: str, fault: Fault, size: str) -> None:
        chunks = [b"one", b"two", b"three"]
        contents = {"small": lambda: stream(*chunks), "large": large, "slow": lambda: slowly(chunks, 0.01)}
        async with ClamdServer(faults={step: fault}).listening() as server:
            error = await refused(server, contents[size](), timeout=BOUND)
        assert "closed the connection without an answer" in str(error)
        assert "StreamMaxLength" in str(error)
        if fault is reset:
            assert isinstance(error.__cause__, ConnectionError)

    @pytest.mark.parametrize("step", ["accepted", "command", "middle", "end"])
    async def test_answers_without_an_end(self, step: str) -> None:
        async with ClamdServer(faults={step: flood}).listening() as server:
            error = await refused(server, stream(*SMALL), timeout=BOUND)
        assert "answered 'AAAA" in str(error)
        assert len(str(error)) < 500
        assert server.said < 64 * MIB  # what the buffers of a connection hold, which nobody has taken out

    @pytest.mark.parametrize("size", [3 * MIB, 24 * MIB])
    @pytest.mark.parametrize("pause", [None, 0.0])
    async def test_size_limit(self, size: int, pause: float | None) -> None:
        """It answers, and closes what it is still being sent to: the answer is read all the same."""
        chunks = [bytes(MIB)] * (size // MIB)
        async with ClamdServer(max_length=MIB).listening() as server:
            for _ in range(5):
                content = stream(*chunks) if pause is None else slowly(chunks, pause)
                assert "set StreamMaxLength" in str(await refused(server, content, timeout=BOUND))
            assert (await ClamdScanner(server.address).scan(stream(bytes(MIB)))).is_clean

    async def test_nothing_listens(self) -> None:
        async with ClamdServer().listening() as server:
            pass
        error = await refused(server, stream(*SMALL))
        assert "cannot be reached" in str(error)
        assert isinstance(error.__cause__, ConnectionRefusedError)

    async def test_no_unix_socket(self, tmp_path: Path) -> None:
        with pytest.raises(ScannerUnavailableError, match=r"none\.sock cannot be reached .*No such file") as caught:
            await ClamdScanner(str(tmp_path / "none.sock")).scan(stream(*SMALL))
        assert isinstance(caught.value.__cause__, FileNotFoundError)

    @pytest.mark.parametrize("kind", ["tcp", "unix"])
    async def test_accepts_no_connection(self, kind: str, socket_path: Path) -> None:
        async with full_queue(kind, socket_path) as (address, _):
            begun = time.monotonic()
            with pytest.raises(ScannerUnavailableError, match=r"cannot be reached \(no answer within 0\.05 s\)") as caught:
                await ClamdScanner(address, connect_timeout=SHORT).scan(stream(*SMALL))
            assert time.monotonic() - begun < BOUND
            assert isinstance(caught.value.__cause__, TimeoutError)

    async def test_accepts_a_connection_late(self, socket_path: Path) -> None:
        """A unix socket whose queue is full is tried again; asyncio takes it for connected."""
        async with full_queue("unix", socket_path) as (address, listener):
            scan = asyncio.ensure_future(ClamdScanner(address, timeout=SHORT).scan(stream(*SMALL)))
            await asyncio.sleep(SHORT)
            assert not scan.done()
            while True:
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    break
            with pytest.raises(ScannerUnavailableError, match="neither read nor answered"):
                await scan

    async def test_no_more_sockets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(socket, "socket", type("NoSocket", (socket.socket,), {"__init__": refuse, "__del__": lambda _: None}))
        with pytest.raises(ScannerUnavailableError, match="Too many open files"):
            await ClamdScanner("127.0.0.1:3310").scan(stream(*SMALL))


@asynccontextmanager
async def full_queue(kind: str, path: Path) -> AsyncIterator[tuple[str, socket.socket]]:
    """Listen, with as many connections waiting to be accepted as the system keeps."""
    family, address = (socket.AF_UNIX, str(path)) if kind == "unix" else (socket.AF_INET, ("127.0.0.1", 0))
    waiting: list[socket.socket] = []
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(0)
        listener.setblocking(False)
        try:
            for _ in range(4):
                waiting.append(one := socket.socket(family, socket.SOCK_STREAM))
                one.setblocking(False)
                one.connect_ex(listener.getsockname())
            await asyncio.sleep(0.02)
            yield (str(path) if kind == "unix" else f"127.0.0.1:{listener.getsockname()[1]}"), listener
        finally:
            for one in waiting:
                one.close()


class TestContent:
    @pytest.mark.parametrize(
        "error",
        [ValueError("broken"), ConnectionResetError("of the client"), TimeoutError("of the client"), StorageError("too large")],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("after", [0, 1, 3])
    async def test_errors_pass(self, error: Exception, after: int) -> None:
        async def content() -> AsyncIterator[bytes]:
            for _ in range(after):
                yield b"chunk"
            raise error

        async with ClamdServer().listening() as server:
            with pytest.raises(type(error)) as caught:
                await ClamdScanner(server.address).scan(content())
            await server.until_left()
        assert caught.value is error
        assert server.streams == []

    async def test_is_not_hurried(self) -> None:
        """The timeouts are clamd's; the pace of uploads is not the scanner's business."""
        async with ClamdServer().listening() as server:
            result = await ClamdScanner(server.address, timeout=0.4).scan(slowly([b"one", EICAR], 0.6))
        assert not result.is_clean

    async def test_a_pause_makes_room_for_others(self) -> None:
        """Slow clients hold all places, and give them up; clamd is told by the connection that closes."""
        ended = 0

        async def paused() -> AsyncIterator[bytes]:
            nonlocal ended
            yield b"one"
            try:
                await asyncio.Event().wait()
            finally:
                ended += 1

        async with ClamdServer().listening() as server:
            scanner = ClamdScanner(server.address, content_timeout=0.2, max_concurrent=2)
            slow = [asyncio.create_task(scanner.scan(paused())) for _ in range(2)]
            await asyncio.sleep(0.05)
            assert (await scanner.scan(stream(b"quick"))).is_clean
            for result in await asyncio.gather(*slow, return_exceptions=True):
                assert isinstance(result, ScannerUnavailableError)
                assert "was sent nothing for 0.2 s, since the upload paused" in str(result)
            await server.until_left()
        assert ended == 2

    async def test_is_read_in_bounded_memory(self) -> None:
        """No more is taken from the content than clamd has room for."""
        taken = 0

        async def content() -> AsyncIterator[bytes]:
            nonlocal taken
            for _ in range(200):
                taken += MIB
                yield bytes(MIB)

        async with ClamdServer(faults={"middle": stop_reading}).listening() as server:
            await refused(server, content())
        assert taken < 50 * MIB


class TestVersion:
    async def test_is_asked_for_once(self) -> None:
        async with ClamdServer().listening() as server:
            scanner = ClamdScanner(server.address)
            for _ in range(3):
                assert (await scanner.scan(stream(b"x"))).by == VERSION
        assert server.commands.count(b"zVERSION\0") == 1
        assert server.commands.count(b"zINSTREAM\0") == 3

    async def test_is_asked_for_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage.inspection.clamd._VERSION_LIFE", SHORT)
        async with ClamdServer().listening() as server:
            scanner = ClamdScanner(server.address)
            await scanner.scan(stream(b"x"))
            server.version = "ClamAV 1.5.0/27501/Sun Nov 29 08:11:52 2026"
            await asyncio.sleep(SHORT)
            assert (await scanner.scan(stream(b"x"))).by == "clamd 1.5.0/27501"

    @pytest.mark.parametrize(
        ("version", "by"),
        [
            ("ClamAV 1.4.2", "clamd 1.4.2"),
            ("ClamAV 0.103.12-rc1/27500/Sat Nov 28", "clamd 0.103.12-rc1/27500"),
            ("ClamAV devel-20261128", "clamd"),
            ("ClamAV 1.4.2\nforged", "clamd"),
            ("ClamAV " + "1" * 1000, "clamd"),
            ("UNKNOWN COMMAND", "clamd"),
            ("", "clamd"),
            ("ü" * 3000, "clamd"),
        ],
    )
    async def test_words(self, version: str, by: str) -> None:
        async with ClamdServer(version=version).listening() as server:
            assert await ClamdScanner(server.address).scan(stream(EICAR)) == ScanResult(False, by, "Eicar-Test")

    @pytest.mark.parametrize("fault", [hang, stop_reading, close, close_one_side, reset, flood, trickle])
    async def test_does_not_fail_a_scan(self, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage.inspection.clamd._VERSION_TIMEOUT", SHORT)
        async with ClamdServer(faults={"version": fault}).listening() as server:
            scanner = ClamdScanner(server.address)
            begun = time.monotonic()
            assert await scanner.scan(stream(b"x")) == ScanResult(True, "clamd")
            assert await scanner.scan(stream(EICAR)) == ScanResult(False, "clamd", "Eicar-Test")
            assert time.monotonic() - begun < BOUND
            await server.until_left()
        assert server.commands.count(b"zVERSION\0") == 1

    async def test_of_one_that_has_gone(self) -> None:
        async with ClamdServer().listening() as server:
            scanner = ClamdScanner(server.address)
            server.faults = {"end": stop_listening}
            assert await scanner.scan(stream(b"x")) == ScanResult(True, "clamd")
        assert server.commands == [b"zINSTREAM\0"]


class TestPing:
    async def test_answers(self) -> None:
        async with ClamdServer().listening() as server:
            assert await ClamdScanner(server.address).ping() == VERSION

    @pytest.mark.parametrize("fault", [hang, close, reset, flood, say_last(b"PING?\0")])
    async def test_does_not(self, fault: Fault) -> None:
        async with ClamdServer(faults={"command": fault}).listening() as server:
            with pytest.raises(ScannerUnavailableError):
                await ClamdScanner(server.address, timeout=SHORT).ping()
            await server.until_left()


class TestConcurrency:
    async def test_no_more_than_allowed(self) -> None:
        async with ClamdServer(delay=0.005).listening() as server:
            scanner = ClamdScanner(server.address, max_concurrent=5)
            contents = [stream(b"x", EICAR) if number % 2 else stream(b"x") for number in range(50)]
            results = await asyncio.gather(*map(scanner.scan, contents))
            await server.until_left()
        assert [result.is_clean for result in results] == [number % 2 == 0 for number in range(50)]
        assert server.most == 5

    async def test_failures_leave_room(self) -> None:
        """Whatever becomes of a scan, the next one gets its place."""
        async with ClamdServer(faults={"end": hang}).listening() as server:
            scanner = ClamdScanner(server.address, max_concurrent=2, timeout=BOUND)
            for _ in range(3):
                tasks = [asyncio.ensure_future(scanner.scan(stream(b"x"))) for _ in range(6)]
                await server.met.wait()
                await asyncio.sleep(0.02)
                assert server.connected <= 2
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                await server.until_left()
            server.faults = {"end": reset}
            for _ in range(3):
                with pytest.raises(ScannerUnavailableError):
                    await scanner.scan(stream(b"x"))
            server.faults = {}
            assert (await scanner.scan(stream(b"x"))).is_clean

    async def test_no_place_in_time(self) -> None:
        async with ClamdServer(faults={"end": hang}).listening() as server:
            scanner = ClamdScanner(server.address, max_concurrent=1, timeout=SHORT)
            first, second = await asyncio.gather(
                scanner.scan(slowly([b"x"], 3 * SHORT)), scanner.scan(stream(b"x")), return_exceptions=True
            )
            await server.until_left()
        assert isinstance(first, ScannerUnavailableError)
        assert "neither read nor answered" in str(first)
        assert isinstance(second, ScannerUnavailableError)
        assert "busy with 1 other scans" in str(second)
        assert server.commands == [b"zINSTREAM\0"]

    async def test_several_loops(self) -> None:
        """Each loop has places of its own, and a loop that is closed is not kept alive."""
        loops: list[weakref.ref[Any]] = []
        results: list[list[ScanResult]] = []

        async def scan() -> list[ScanResult]:
            loops.append(weakref.ref(asyncio.get_running_loop()))
            return await asyncio.gather(*(scanner.scan(stream(b"x", EICAR)) for _ in range(6)))

        async with ClamdServer(delay=0.005).listening() as server:
            scanner = ClamdScanner(server.address, max_concurrent=2)
            for _ in range(2):
                results += await asyncio.gather(*(asyncio.to_thread(asyncio.run, scan()) for _ in range(3)))
            await scanner.scan(stream(b"x"))
        assert server.most <= 2 * 3
        assert [result.is_clean for several in results for result in several] == [False] * 36
        gc.collect()
        assert [loop() for loop in loops] == [None] * 6

    async def test_forked_process(self) -> None:
        program = """
            import asyncio, os, sys
            from granite_storage.inspection.clamd import ClamdScanner

            async def content():
                yield b"x"

            async def scan():
                assert all(result.is_clean for result in await asyncio.gather(*(scanner.scan(content()) for _ in range(5))))

            scanner = ClamdScanner(sys.argv[1], max_concurrent=2)
            asyncio.run(scan())
            child = os.fork()
            asyncio.run(scan())
            if child:
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
        source = "\n".join(line[12:] for line in program.splitlines())
        async with ClamdServer().listening() as server:
            command = [sys.executable, "-W", "error", "-c", source, server.address]
            await asyncio.to_thread(subprocess.run, command, check=True, timeout=60)
        assert len(server.streams) == 15


class TestCancellation:
    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize("kind", ["tcp", "name", "unix"])
    @pytest.mark.parametrize("size", ["small", "large"])
    async def test_at_every_await(self, kind: str, size: str, moment: Moment, socket_path: Path) -> None:
        chunks = [b"one", EICAR] if size == "small" else [bytes(MIB)] * 6
        cancelled = 0
        async with ClamdServer(delay=0.002).listening(socket_path if kind == "unix" else "127.0.0.1") as server:
            address = server.address.replace("127.0.0.1", "localhost") if kind == "name" else server.address

            async def call(_: int) -> ScanResult:
                return await ClamdScanner(address, max_concurrent=1).scan(slowly(chunks))

            async for step, task, struck in cancel_at_every_await(call, moment):
                if task.cancelled():
                    cancelled += 1
                else:
                    assert not struck, f"the cancellation at await {step} was swallowed"
                    assert task.result() == ScanResult(size == "large", VERSION, None if size == "large" else "Eicar-Test")
                await server.until_left()
        assert cancelled > 2

    @pytest.mark.parametrize("fault", [hang, stop_reading])
    @pytest.mark.parametrize("step", ["accepted", "middle", "end", "version"])
    async def test_while_clamd_hangs(self, step: str, fault: Fault) -> None:
        async with ClamdServer(faults={step: fault}).listening() as server:
            scan = asyncio.ensure_future(ClamdScanner(server.address).scan(large()))
            await server.met.wait()
            await asyncio.sleep(SHORT)
            assert server.connected == 1
            scan.cancel()
            begun = time.monotonic()
            with pytest.raises(asyncio.CancelledError):
                await scan
            assert time.monotonic() - begun < BOUND
            await server.until_left()

    @pytest.mark.parametrize("kind", ["tcp", "unix"])
    async def test_while_it_connects(self, kind: str, socket_path: Path) -> None:
        async with full_queue(kind, socket_path) as (address, _):
            scan = asyncio.ensure_future(ClamdScanner(address).scan(stream(b"x")))
            await asyncio.sleep(SHORT)
            scan.cancel()
            with pytest.raises(asyncio.CancelledError):
                await scan

    async def test_by_a_timeout_of_the_caller(self) -> None:
        """The caller's timeout is not taken for the scanner's own."""
        async with ClamdServer(faults={"end": hang}).listening() as server:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SHORT):
                    await ClamdScanner(server.address).scan(stream(b"x"))
            await server.until_left()


@pytest.fixture(scope="session")
def daemon(_temporary_folder: Path) -> Iterator[ClamdDaemon]:
    with service("clamd", clamd()) as started:
        yield started


@pytest.mark.exhaustive("clamd is not installed everywhere, and the stand-in speaks its protocol")
class TestRealDaemon:
    """The same with Debian's clamav-daemon, whose answers the stand-in's are copied from."""

    @pytest.fixture(params=["tcp", "unix"])
    def scanner(self, request: pytest.FixtureRequest, daemon: ClamdDaemon) -> ClamdScanner:
        return ClamdScanner(getattr(daemon, request.param), timeout=30)

    async def test_verdicts(self, scanner: ClamdScanner) -> None:
        for chunks in ((), (b"harmless",), (EICAR[1:],), (bytes(2 * MIB),), (bytes(MIB), b"", bytes(MIB))):
            assert (await scanner.scan(stream(*chunks))).is_clean
        for chunks in ((EICAR,), (EICAR[:9], b"", EICAR[9:]), (archive(EICAR),), (bytes(MIB), EICAR, bytes(1000))):
            result = await scanner.scan(stream(*chunks))
            assert (result.is_clean, result.signature) == (False, "Eicar-Test.UNOFFICIAL")

    async def test_version(self, scanner: ClamdScanner, daemon: ClamdDaemon) -> None:
        assert await scanner.ping() == daemon.version.replace("ClamAV", "clamd")
        assert (await scanner.scan(stream(b"x"))).by == await scanner.ping()

    async def test_size_limit(self, scanner: ClamdScanner) -> None:
        assert (await scanner.scan(stream(bytes(STREAM_MAX_LENGTH)))).is_clean
        for size in (STREAM_MAX_LENGTH + 1, 64 * MIB):
            for _ in range(5):
                with pytest.raises(ScannerUnavailableError, match="set StreamMaxLength"):
                    await scanner.scan(stream(*[bytes(MIB)] * (size // MIB), bytes(size % MIB)))

    async def test_over_the_limit_of_a_file(self, scanner: ClamdScanner) -> None:
        """It is not looked at to its end unless clamd.conf says otherwise, which the documentation tells."""
        assert (await scanner.scan(stream(bytes(3 * MIB), EICAR))).is_clean

    async def test_slow_content(self, scanner: ClamdScanner) -> None:
        assert not (await scanner.scan(slowly([EICAR[:30], EICAR[30:]], 0.5))).is_clean
        with pytest.raises(ScannerUnavailableError, match="set ReadTimeout"):
            await scanner.scan(slowly([b"one", b"two"], 3))

    async def test_many(self, scanner: ClamdScanner) -> None:
        contents = [stream(bytes(100_000), EICAR) if number % 2 else stream(bytes(100_000)) for number in range(100)]
        results = await asyncio.gather(*map(scanner.scan, contents))
        assert [result.is_clean for result in results] == [number % 2 == 0 for number in range(100)]

    @pytest.mark.parametrize("moment", MOMENTS)
    async def test_cancelled_at_every_await(self, scanner: ClamdScanner, moment: Moment) -> None:
        async def call(_: int) -> ScanResult:
            return await scanner.scan(slowly([bytes(MIB), EICAR]))

        async for step, task, struck in cancel_at_every_await(call, moment):
            assert task.cancelled() or not struck, f"the cancellation at await {step} was swallowed"
        assert (await scanner.scan(stream(b"x"))).is_clean
