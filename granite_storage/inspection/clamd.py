"""Scanning for viruses with ClamAV's daemon, clamd, over TCP or a unix socket."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import socket
import struct
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager, closing
from typing import Any, get_args
from weakref import WeakValueDictionary

from granite_storage.exceptions import ConfigurationError, ScannerUnavailableError
from granite_storage.inspection.base import OnUnavailable, ScanResult, require_positive

_PIECE_SIZE = 256 * 1024
_MAX_ANSWER = 4096
_MAX_UNIX_PATH = 107 if sys.platform == "linux" else 103
_VERSION_TIMEOUT = 5.0
_VERSION_LIFE = 600.0
_VERSION_RETRY = 60.0
_FULL_QUEUE_DELAY = 0.02

_LENGTH = struct.Struct(">I")
_END_OF_STREAM = _LENGTH.pack(0)
_CLEAN = b"stream: OK\0"
_FOUND = re.compile(rb"stream: ([^\0]+) FOUND\0")
_VERSION = re.compile(r"ClamAV (\d[\w.+-]{0,40}(?:/\d{1,12})?)(?:/[ -~]*)?\0")
_IPV4 = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}", re.ASCII)
_TCP_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:/\[\]@]+)):(\d{1,5})", re.ASCII)


class ClamdScanner:
    """Scans uploads with clamd, each over a separate connection, as a stream.

    An upload is clean only if clamd has received all of it and says so. Every wait for clamd is bounded, and at most a few KiB
    of an answer are read. An error or a cancellation leaves no connection open. One scanner serves several event loops, and
    processes that are forked; nothing is opened when it is made.

    Its settings in clamd.conf matter. It refuses content over `StreamMaxLength`, and content that pauses for `ReadTimeout`. It
    reports content over `MaxFileSize`, `MaxScanSize` or `MaxRecursion` as clean without scanning all of it, unless
    `AlertExceedsMax yes` makes that a finding. The connection is neither encrypted nor authenticated.

    Args:
        address: Where clamd listens: `host:port`, `[::1]:3310`, or a unix socket, as an absolute path or as `unix:/path`.
        on_unavailable: What becomes of an upload that clamd cannot judge: see `Scanner`.
        timeout: The longest wait in seconds for clamd to read the next 256 KiB, for its answer once it has the whole, and for one
            of the other scans to end where `max_concurrent` are in progress. It should be above `MaxScanTime`.
        connect_timeout: The longest wait in seconds for the addresses of a host name, and for a connection to each of them.
        content_timeout: The longest wait in seconds for the next piece of the content; after it the scan makes room for others:
            an upload comes in pieces of 64 KiB to 1 MiB, however small those are that its client sends. It should not be above
            clamd's `ReadTimeout`.
        max_concurrent: How many scans are in progress at a time on each event loop. All processes together should need no more
            than clamd's `MaxThreads`; it keeps others waiting.

    Raises:
        ConfigurationError: An argument cannot work.

    Source: the manual page clamd(8), and https://docs.clamav.net/manual/Usage/ClamdProtocol.html.
    """

    def __init__(
        self,
        address: str,
        *,
        on_unavailable: OnUnavailable = "refuse",
        timeout: float = 150.0,
        connect_timeout: float = 5.0,
        content_timeout: float = 120.0,
        max_concurrent: int = 10,
    ) -> None:
        self._family, self._address = _parse_address(address)
        if on_unavailable not in get_args(OnUnavailable):
            raise ConfigurationError(f"a ClamdScanner's on_unavailable must be refuse, hold or accept, not {on_unavailable!r}")
        require_positive("a ClamdScanner's timeout in seconds", timeout, (int, float))
        require_positive("a ClamdScanner's connect_timeout in seconds", connect_timeout, (int, float))
        require_positive("a ClamdScanner's content_timeout in seconds", content_timeout, (int, float))
        require_positive("a ClamdScanner's max_concurrent", max_concurrent)
        self.on_unavailable: OnUnavailable = on_unavailable
        self._name = address
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._content_timeout = content_timeout
        self._max_concurrent = max_concurrent
        # A semaphore lives as long as a scan has it, and so does not keep its loop.
        self._rooms: WeakValueDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakValueDictionary()
        self._version: tuple[str, float] | None = None  # and until when it is believed

    def __repr__(self) -> str:
        return f"ClamdScanner({self._name!r}, on_unavailable={self.on_unavailable!r})"

    async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
        """Scan content; an error of the content itself is raised unchanged.

        Args:
            content: The content, which is not read on once clamd has answered; its maker closes it.

        Raises:
            ScannerUnavailableError: clamd could not be reached, took too long, refused the content, or gave no verdict.
        """
        async with self._room():
            with closing(await self._connect(self._timeout)) as connection:
                async with aclosing(self._pace(content)) as pieces:
                    is_whole = await connection.send_content(pieces)
                    answer = await connection.read_answer()
            signature = self._judge(answer, is_whole, connection.error)
            return ScanResult(is_clean=signature is None, by=await self._describe(), signature=signature)

    async def ping(self) -> str:
        """Check that clamd answers, and return its version, such as `clamd 1.4.2/27500`.

        Raises:
            ScannerUnavailableError: clamd does not answer, or another program does.
        """
        answer, error = await self._ask(b"zPING\0", self._timeout)
        if answer != b"PONG\0":
            raise self._unavailable(self._explain(answer, error)) from error
        return await self._describe()

    async def _pace(self, content: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield the content, and end the scan if the content pauses for too long, because other uploads wait for clamd."""
        while True:
            limit = asyncio.timeout(self._content_timeout)
            try:
                async with limit:
                    piece = await anext(content)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                if not limit.expired():  # it is the content's own
                    raise
                reason = (
                    f"was sent nothing for {self._content_timeout:g} s, since the upload paused: where uploads may, set a longer"
                    " content_timeout, and ReadTimeout in clamd.conf"
                )
                raise self._unavailable(reason) from error
            yield piece

    def _judge(self, answer: bytes, is_whole: bool, error: OSError | None) -> str | None:
        """Return the signature that was found, or None if the content is clean."""
        if found := _FOUND.match(answer):  # whatever follows, and however early it came
            return _printable(found[1])
        if answer == _CLEAN and is_whole:
            return None
        if answer == _CLEAN:
            reason = "called the content clean before it had received all of it: check what listens there"
        elif b"size limit exceeded" in answer:
            reason = "takes no content of this size: set StreamMaxLength in clamd.conf above the largest upload"
        elif b"READ TIMED OUT" in answer:
            reason = (
                "timed out before the rest of the content came: set ReadTimeout in clamd.conf above the longest pause of uploads"
            )
        else:
            reason = self._explain(answer, error)
        raise self._unavailable(reason) from error

    def _explain(self, answer: bytes, error: OSError | None) -> str:
        if answer:
            return f"answered {_printable(answer)!r}, which is not a verdict: see clamd's log"
        if isinstance(error, TimeoutError):
            return f"neither read nor answered for {self._timeout:g} s: check whether it is overloaded, or set a longer timeout"
        return "closed the connection without an answer: see clamd's log, and whether the content is over its StreamMaxLength"

    def _unavailable(self, reason: str) -> ScannerUnavailableError:
        return ScannerUnavailableError(f"the virus scanner clamd at {self._name} {reason}")

    @asynccontextmanager
    async def _room(self) -> AsyncIterator[None]:
        """Limit the scans in progress on this loop to `max_concurrent`."""
        room = self._rooms.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._max_concurrent))
        try:
            async with asyncio.timeout(self._timeout):
                await room.acquire()
        except TimeoutError as error:
            reason = f"was busy with {self._max_concurrent} other scans for {self._timeout:g} s: raise max_concurrent or timeout"
            raise self._unavailable(reason) from error
        try:
            yield
        finally:
            room.release()

    async def _describe(self) -> str:
        """Return the scanner's name and version, or `clamd` if it does not say."""
        if self._version is None or time.monotonic() >= self._version[1]:
            try:
                answer, _ = await self._ask(b"zVERSION\0", min(self._timeout, _VERSION_TIMEOUT))
            except ScannerUnavailableError:
                answer = b""
            told = _VERSION.fullmatch(answer.decode("ascii", "replace"))
            life = _VERSION_LIFE if told else _VERSION_RETRY
            self._version = f"clamd {told[1]}" if told else "clamd", time.monotonic() + life
        return self._version[0]

    async def _ask(self, command: bytes, timeout: float) -> tuple[bytes, OSError | None]:
        with closing(await self._connect(timeout)) as connection:
            await connection.send(command)
            return await connection.read_answer(), connection.error

    async def _connect(self, timeout: float) -> _Connection:
        """Open a connection for one command."""
        failure: Exception | None = None
        for family, address in await self._resolve():
            opened = await _open_socket(family, address, self._connect_timeout)
            if isinstance(opened, socket.socket):
                return _Connection(opened, timeout)
            failure = opened
        raise self._unreachable(failure) from failure

    async def _resolve(self) -> list[tuple[int, Any]]:
        """Return the addresses to try, each with its family."""
        if self._family is not None:
            return [(self._family, self._address)]
        try:
            async with asyncio.timeout(self._connect_timeout):
                found = await asyncio.get_running_loop().getaddrinfo(*self._address, type=socket.SOCK_STREAM)
        except OSError as error:
            raise self._unreachable(error) from error
        return [(family, address) for family, _, _, _, address in found]

    def _unreachable(self, error: Exception | None) -> ScannerUnavailableError:
        what = f"no answer within {self._connect_timeout:g} s" if isinstance(error, TimeoutError) else str(error)
        return self._unavailable(f"cannot be reached ({what}): check that it runs, and that clamd.conf has it listen there")


class _Connection:
    """A connection for one command, and its outcome.

    It works on the socket, not with asyncio's streams: these forget an answer that has arrived when a write fails, and clamd
    answers and closes while it is still being sent what it does not want.

    Attributes:
        error: What ended the connection early.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.error: OSError | None = None
        self._sock = sock
        self._timeout = timeout
        self._answer = bytearray()
        self._is_ended = False

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    async def send_content(self, content: AsyncIterator[bytes]) -> bool:
        """Send content to be scanned; return whether all of it was sent before anything was answered."""
        if not await self.send(b"zINSTREAM\0"):
            return False
        async for chunk in content:
            for start in range(0, len(chunk), _PIECE_SIZE):  # an empty piece would end the stream
                piece = chunk[start : start + _PIECE_SIZE]
                if not await self.send(_LENGTH.pack(len(piece)) + piece):
                    return False
        return await self.send(_END_OF_STREAM)

    async def send(self, data: bytes) -> bool:
        """Send data, unless something has been answered already; return whether it was sent."""
        if self._has_answered():
            return False
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
        except OSError as error:
            self._note(error)
            return False
        return True

    async def read_answer(self) -> bytes:
        """Return the answer, up to its NUL, the end of the connection or the limit."""
        # Who has not read in time is not waited for once more.
        timeout = 0.0 if isinstance(self.error, TimeoutError) else self._timeout
        try:
            async with asyncio.timeout(timeout):
                while not self._is_ended and b"\0" not in self._answer and len(self._answer) < _MAX_ANSWER:
                    self._take(await asyncio.get_running_loop().sock_recv(self._sock, _MAX_ANSWER))
        except OSError as error:
            self._note(error)
        return bytes(self._answer)

    def _has_answered(self) -> bool:
        try:
            self._take(self._sock.recv(_MAX_ANSWER))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._note(error)
        return True

    def _take(self, data: bytes) -> None:
        self._answer += data
        self._is_ended = not data

    def _note(self, error: OSError) -> None:
        self.error = self.error or type(error)(*error.args)  # the frames of the error itself would hold the connection


async def _open_socket(family: int, address: Any, timeout: float) -> socket.socket | Exception:
    """Return a connected socket or the error, which is not raised because it would hold the caller's frame."""
    with ExitStack() as stack:
        try:
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            async with asyncio.timeout(timeout):
                await _connect_socket(sock, address)
        except OSError as error:
            return error
        stack.pop_all()  # it stays open
        return sock


async def _connect_socket(sock: socket.socket, address: Any) -> None:
    if sock.family != getattr(socket, "AF_UNIX", None):
        await asyncio.get_running_loop().sock_connect(sock, address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the end of the stream waits for an acknowledgement
        return
    while True:
        try:
            sock.connect(address)  # a unix socket connects at once, or not at all
            return
        except BlockingIOError:  # too many others wait to be accepted; asyncio would take this for a connection in progress
            await asyncio.sleep(_FULL_QUEUE_DELAY)


def _parse_address(address: object) -> tuple[int | None, Any]:
    """Return the family of an address, or None if it must be looked up, and the address itself."""
    what = f"the address of a ClamdScanner must be host:port, [::1]:3310, or the absolute path of a unix socket, not {address!r}"
    if not isinstance(address, str):
        raise ConfigurationError(what)
    path = address.removeprefix("unix:")
    if path.startswith("/"):
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigurationError(f"Python has no unix sockets on this system: give a host and a port instead of {address!r}")
        if "\0" in path or len(os.fsencode(path)) > _MAX_UNIX_PATH:
            raise ConfigurationError(
                f"{address!r} cannot be the path of a unix socket: it has a NUL, or more than {_MAX_UNIX_PATH} bytes"
            )
        return socket.AF_UNIX, path
    match = _TCP_ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match[3]) <= 65535:
        raise ConfigurationError(what)
    host, port = match[1] or match[2], int(match[3])
    try:
        if match[1]:
            # One with a zone, such as fe80::1%eth0, must be looked up: a socket wants the number of the interface.
            return socket.AF_INET6 if ipaddress.IPv6Address(host).scope_id is None else None, (host, port)
        if _IPV4.fullmatch(host):
            return socket.AF_INET, (str(ipaddress.IPv4Address(host)), port)
        host.encode("idna")
    except ValueError as error:
        raise ConfigurationError(f"{what}: {error}") from error
    return None, (host, port)


def _printable(text: bytes) -> str:
    """Return an answer of a server in a form that is safe in a log and in a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200].rstrip(b"\0").decode("ascii", "replace"))
