"""A COMMIT whose answer never comes, over a connection that is cut on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.orm.databases import Database
from tests.orm.world import Doc, World, file, world_on


class Proxy:
    """Stands between a client and a server, and cuts the connection at a COMMIT: before it is passed on, or before its answer."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.cut: str | None = None
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

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_unix_connection(self.target)
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
                lost.set()
                if self.cut == "before the server":
                    return
            elif not watched and lost.is_set():
                return
            to.write(data)
            await to.drain()


@pytest.mark.case("DBF-01")
@pytest.mark.parametrize("database", ["asyncpg", "psycopg"], indirect=True)
@pytest.mark.parametrize("cut", ["before the server", "before the answer"])
async def test_connection_is_cut_at_the_commit(database: Database, postgres_server: URL, tmp_path: Path, cut: str) -> None:
    folder = Path(str(postgres_server.query["host"]))
    proxy = Proxy(str(next(folder.glob(".s.PGSQL.*[0-9]"))))
    sockets = Path(tmp_path.anchor) / "tmp" / f"granite-proxy-{id(proxy):x}"
    sockets.mkdir()
    try:
        async with world_on(database) as world, proxy.listening(sockets / ".s.PGSQL.5432"):
            await world.add(Doc(id=1, file=file("a")))
            engine = create_async_engine(database.url.set(query={"host": str(sockets)}))
            async with AsyncSession(engine) as session:
                (await session.get_one(Doc, 1)).file = file("b")
                session.add(Doc(id=2, file=file("c")))
                await session.flush()
                proxy.cut = cut
                with pytest.raises((DBAPIError, OSError)):
                    await session.commit()
            await engine.dispose()
            await check_undecided(world, committed=cut == "before the answer")
    finally:
        for left in sockets.iterdir():
            left.unlink()
        sockets.rmdir()


async def check_undecided(world: World, *, committed: bool) -> None:
    """Check that nothing was deleted: what the rows hold is there, and what they would have held otherwise."""
    for _ in range(200):
        if (await world.contents()).get(("doc", 2, "file")) == (b"c" if committed else None):
            break
        await asyncio.sleep(0.01)
    expected = {1: b"b", 2: b"c"} if committed else {1: b"a"}
    assert await world.contents() == {("doc", number, "file"): content for number, content in expected.items()}
    assert len(await world.objects()) == 3
    assert world.backend.count("delete") == 0
