"""A stand-in for clamd on a socket: the documented protocol, a search for one signature, and faults where it is told to.

    async with ClamdServer(faults={"middle": hang}).listening() as server:
        scanner = ClamdScanner(server.address)

A fault is met at one of the steps of a conversation: when the connection is there (`accepted`), when the command was read
(`command`), when the first piece was (`middle`), before the verdict is given (`end`), and when the version is asked for
(`version`).
"""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "EICAR",
    "ClamdServer",
    "Conversation",
    "close",
    "close_one_side",
    "flood",
    "hang",
    "reset",
    "say",
    "say_last",
    "stop_listening",
    "stop_reading",
    "trickle",
]

# In parts, so that no scanner takes this file for an infected one.
EICAR = (r"X5O!P%@AP[4\PZX54(P^)7CC)7}$" + "EICAR-STANDARD-" + "ANTIVIRUS-TEST-FILE!$H+H*").encode()

VERSION = "ClamAV 1.4.2/27500/Sat Nov 28 08:11:52 2026"


class Conversation:
    """One connection of a client."""

    def __init__(self, server: ClamdServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer

    async def say(self, text: bytes) -> None:
        self.writer.write(text)
        await self.writer.drain()

    async def read_stream(self) -> bytes | None:
        """Return the content, None where it is too large."""
        content = bytearray()
        while size := int.from_bytes(await self.reader.readexactly(4)):
            content += await self.reader.readexactly(min(size, self.server.max_length + 1))
            if len(content) > self.server.max_length:
                return None
            if len(content) == size:
                await self.meet("middle")
        return bytes(content)

    async def meet(self, step: str) -> None:
        if fault := self.server.faults.get(step):
            self.server.met.set()
            await fault(self)


Fault = Callable[[Conversation], Awaitable[None]]


class EndedError(Exception):
    """A fault has ended the conversation."""


class ClamdServer:
    """The stand-in.

    Args:
        faults: What goes wrong, by step.
        max_length: Its `StreamMaxLength`, in bytes.
        opens_zips: Whether it looks into the members of archives.
        delay: How long it takes to scan, in seconds.
        version: What it says to VERSION.

    Attributes:
        address: Where it listens.
        connected: How many connections there are.
        most: The most that there have been at a time.
        commands: The commands it was given.
        streams: The sizes of the streams it had the whole of.
        said: The bytes that `flood` could send.
        met: Set when a fault is met.
        goes_on: Ends what `stop_reading` does; set by `until_left`.
    """

    def __init__(
        self,
        *,
        faults: Mapping[str, Fault] | None = None,
        max_length: int = 1 << 30,
        opens_zips: bool = False,
        delay: float = 0.0,
        version: str = VERSION,
    ) -> None:
        self.faults: Mapping[str, Fault] = faults or {}
        self.max_length = max_length
        self.opens_zips = opens_zips
        self.delay = delay
        self.version = version
        self.address = ""
        self.connected = 0
        self.most = 0
        self.commands: list[bytes] = []
        self.streams: list[int] = []
        self.said = 0
        self.met = asyncio.Event()
        self.goes_on = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._conversations: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self, at: str | Path = "127.0.0.1") -> AsyncIterator[ClamdServer]:
        """Listen on a port of an address, or on a unix socket where a path is given; afterwards no connection is left."""
        if isinstance(at, Path):
            self._server = await asyncio.start_unix_server(self._accept, at)
            self.address = str(at)
        else:
            self._server = await asyncio.start_server(self._accept, at, 0)
            port = self._server.sockets[0].getsockname()[1]
            self.address = f"[{at}]:{port}" if ":" in at else f"{at}:{port}"
        try:
            yield self
        finally:
            self.stop_listening()
            for task in self._conversations:
                task.cancel()
            await asyncio.gather(*self._conversations, return_exceptions=True)

    def stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()

    async def until_left(self) -> None:
        """Wait until every client has gone, as one that has closed its end has within moments."""
        self.goes_on.set()
        async with asyncio.timeout(5):
            while self._conversations:
                await asyncio.wait(self._conversations)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._converse(Conversation(self, reader, writer)))
        self._conversations.add(task)
        task.add_done_callback(self._conversations.discard)

    async def _converse(self, conversation: Conversation) -> None:
        self.connected += 1
        self.most = max(self.most, self.connected)
        try:
            with suppress(EndedError, OSError, EOFError):
                await conversation.meet("accepted")
                await self._obey(conversation)
        finally:
            self.connected -= 1
            conversation.writer.close()

    async def _obey(self, conversation: Conversation) -> None:
        command = await conversation.reader.readuntil(b"\0")
        self.commands.append(command)
        await conversation.meet("version" if command == b"zVERSION\0" else "command")
        if command == b"zPING\0":
            await conversation.say(b"PONG\0")
        elif command == b"zVERSION\0":
            await conversation.say(self.version.encode() + b"\0")
        elif command == b"zINSTREAM\0":
            content = await conversation.read_stream()
            if content is None:
                await conversation.say(b"INSTREAM size limit exceeded. ERROR\0")
                return
            self.streams.append(len(content))
            await conversation.meet("end")
            await asyncio.sleep(self.delay)
            await conversation.say(b"stream: Eicar-Test FOUND\0" if self._is_infected(content) else b"stream: OK\0")
        else:
            await conversation.say(b"UNKNOWN COMMAND\0")

    def _is_infected(self, content: bytes) -> bool:
        if self.opens_zips and zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return any(EICAR in archive.read(name) for name in archive.namelist())
        return EICAR in content


# What can go wrong.


async def hang(conversation: Conversation) -> None:
    """Do nothing more, until the client has gone; what it sends is read."""
    while await conversation.reader.read(1 << 16):
        pass
    raise EndedError


async def stop_reading(conversation: Conversation) -> None:
    """Read nothing more, so that the client's writes come to a halt."""
    transport: Any = conversation.writer.transport
    transport.pause_reading()
    await conversation.server.goes_on.wait()
    transport.resume_reading()
    await hang(conversation)


async def stop_listening(conversation: Conversation) -> None:
    """Accept no other connection, and go on with this one."""
    conversation.server.stop_listening()


async def close(conversation: Conversation) -> None:
    raise EndedError


async def close_one_side(conversation: Conversation) -> None:
    """Say that nothing more will come, and read on."""
    conversation.writer.write_eof()


async def reset(conversation: Conversation) -> None:
    sock = conversation.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conversation.writer.transport.abort()
    raise EndedError


async def flood(conversation: Conversation) -> None:
    """Answer without an end."""
    while True:
        conversation.writer.write(b"A" * 65536)
        await conversation.writer.drain()
        conversation.server.said += 65536


async def trickle(conversation: Conversation) -> None:
    """Answer a byte at a time, without an end."""
    while not conversation.reader.at_eof():
        await conversation.say(b"A")
        await asyncio.sleep(0.01)
    raise EndedError


def say(text: bytes) -> Fault:
    """Say something out of turn, and go on as if nothing had been said."""
    return lambda conversation: conversation.say(text)


def say_last(text: bytes) -> Fault:
    """Say something, and close the connection."""

    async def say_it(conversation: Conversation) -> None:
        await conversation.say(text)
        await close(conversation)

    return say_it
