"""What a backend writes into a ref of itself stays behind when the object moves to another backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker

from granite_storage import StorageManager, StoragePolicy, bind_storage, migrate
from granite_storage.backends.local import LocalStorageBackend
from tests.migration.environment import Base, Shelf, file
from tests.orm.databases import Database, sqlite
from tests.servers import S3Server


@pytest.mark.case("RA-12", "RA-03")
async def test_from_s3_to_a_disk_and_back(moto_server: S3Server, tmp_path: Path) -> None:
    with sqlite("sqlite") as database:
        await go_there_and_back(database, moto_server, tmp_path)


async def go_there_and_back(database: Database, moto_server: S3Server, tmp_path: Path) -> None:
    async with moto_server.bucket() as bucket, database.opened(Base.metadata) as engine:
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        backends = {"s3": moto_server.backend(bucket), "disk": LocalStorageBackend(tmp_path, fsync=False)}
        found = []
        for number, key in enumerate(("s3", "disk", "s3")):
            policies = {name: StoragePolicy(name, key) for name in ("docs", "parcels")}
            async with StorageManager(backends=backends, policies=policies) as manager:
                binding = bind_storage(Base, manager, sessions=sessions)
                try:
                    if number == 0:
                        async with sessions.begin() as session:
                            session.add(Shelf(id=1, file=file("a")))
                    else:
                        report = await migrate(binding, storage_key="docs", to_backend=key)
                        assert (report.moved, report.failed) == (1, 0)
                    async with sessions() as session:
                        shelf = await session.get_one(Shelf, 1)
                        assert shelf.file is not None
                        assert await shelf.file.read() == b"a"
                        found.append(shelf.file.ref)
                    assert found[-1].identity == await manager.identity(key)
                finally:
                    binding.unbind()
        assert [ref.extra for ref in found] == [{"bucket": bucket}, None, {"bucket": bucket}]
        assert found[0].identity == found[2].identity != found[1].identity
