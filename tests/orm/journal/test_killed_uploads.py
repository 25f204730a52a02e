"""A process that is killed in the middle of uploads to a local disk: recovery leaves nothing of them there."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from tests.core.support import PROJECT
from tests.orm.databases import Database
from tests.orm.environment import OrmEnvironment, orm_environment
from tests.orm.journal.test_recovery import expire, journal_of, rows


@pytest.fixture(params=[True, False], ids=["fsync", "no fsync"])
def fsync(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
async def env(asyncpg_database: Database, tmp_path: Path, fsync: bool) -> AsyncIterator[OrmEnvironment]:
    backend = PrefixedBackend(LocalStorageBackend(tmp_path / "store", fsync=fsync), "some/prefix")
    async with orm_environment(asyncpg_database, backend=backend, journaled=True) as env:
        yield env
        await env.check_recovery()


@pytest.mark.case("RA-11")
async def test_nothing_is_left_after_recovery(env: OrmEnvironment, tmp_path: Path, fsync: bool) -> None:
    root = tmp_path / "store"
    url = env.database.url.render_as_string(hide_password=False)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.orm.journal.killed_upload", url, str(root), str(fsync)),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdout is not None
    async with asyncio.timeout(60):
        assert {await child.stdout.readline() for _ in range(2)} == {b"file has begun\n", b"other has begun\n"}
    child.send_signal(signal.SIGKILL)
    await child.wait()
    assert len([path for path in root.rglob("*") if path.is_file()]) == 3, "two temporary files, and a marker"
    assert len(await rows(env, "intent")) == 2
    await expire(env)
    assert (await journal_of(env).recover()).deleted == 2
    assert [path.name for path in root.rglob("*")] == [".granite-storage"]


@pytest.mark.case("RA-11")
@pytest.mark.parametrize("known", [None, "an id"], ids=["by its location", "by an id of others"])
async def test_only_writes_of_the_location_are_aborted(tmp_path: Path, known: str | None) -> None:
    backend = LocalStorageBackend(tmp_path)
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(1 << 20)
        reached.set()
        await go_on.wait()

    writer = asyncio.create_task(backend.put_stream("doc/1/file/one", held()))
    await reached.wait()
    for other in ("doc/1/file/two", "doc/1/file/one/two", "doc/1/file", "doc/1", "doc/2/file/one"):
        await backend.abort_upload(other, known)
    go_on.set()
    await writer
    await backend.abort_upload("doc/1/file/one", known)
    assert (await backend.stat("doc/1/file/one")).size == 3 << 20
    await backend.aclose()
