"""A COMMIT whose answer never comes: a proxy that cuts the connection on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

__all__ = ["CommitProxy", "Cut", "behind_proxy"]

Cut = Literal["before the server", "before the answer"]


class CommitProxy:
    """Stands between a client and a server, and cuts the connection at a COMMIT: before it is passed on, or before its answer.

    Args:
        target: The server: the path of its socket, or its host and port.
    """

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self.cut: Cut | None = None
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._serve, path)
        try:
            yield
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._target, Path):
            return await asyncio.open_unix_connection(self._target)
        return await asyncio.open_connection(*self._target)

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await self._open()
        lost = asyncio.Event()
        pumps = [
            asyncio.ensure_future(self._pump(client, to_server, lost, watched=True)),
            asyncio.ensure_future(self._pump(server, to_client, lost, watched=False)),
        ]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        for writer in (to_client, to_server):
            writer.close()

    async def _pump(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, lost: asyncio.Event, *, watched: bool) -> None:
        while data := await source.read(65536):
            if watched and self.cut is not None and b"COMMIT" in data:
                cut, self.cut = self.cut, None  # later connections go through
                lost.set()
                if cut == "before the server":
                    return
            elif not watched and lost.is_set():
                return
            to.write(data)
            await to.drain()


@contextlib.asynccontextmanager
async def behind_proxy(url: URL) -> AsyncIterator[tuple[CommitProxy, AsyncEngine]]:
    """Give a proxy before the server of a URL, and an engine that goes through it."""
    with TemporaryDirectory(prefix="proxy-") as name:  # the path of a socket must be short
        folder = Path(name)
        if url.get_backend_name() == "postgresql":
            proxy = CommitProxy(next(Path(str(url.query["host"])).glob(".s.PGSQL.*[0-9]")))
            path, through = folder / ".s.PGSQL.5432", url.set(query={"host": name})
        else:
            proxy = CommitProxy((url.host or "127.0.0.1", url.port or 3306))
            path = folder / "mariadb.sock"
            through = url.set(query={"unix_socket": str(path)})
        async with proxy.listening(path):
            engine = create_async_engine(through)
            try:
                yield proxy, engine
            finally:
                await engine.dispose()
