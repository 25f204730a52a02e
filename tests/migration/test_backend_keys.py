"""What a backend writes into a ref of itself stays behind when the object moves to another backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker

from granite_storage import StorageManager, StoragePolicy, bind_storage
from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.obstore import ObjectStoreBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.migration import migrate
from tests.migration.environment import Base, Shelf, file
from tests.orm.databases import Database, sqlite
from tests.servers import S3Server

KINDS: dict[str, tuple[set[str], set[str]]] = {
    "s3": ({"bucket"}, {"bucket"}),
    "s3 with versions": ({"bucket", "version_id"}, {"bucket", "version_id"}),
    "below a prefix": ({"bucket"}, {"bucket"}),
    "obstore with versions": ({"version_id"}, {"version_id"}),
    "obstore later": ({"bucket"}, set()),
}
"""Ways to a bucket, with the keys that they write of themselves before an object has been elsewhere and after it came back."""


@pytest.mark.case("RA-12", "RA-03")
@pytest.mark.parametrize("kind", KINDS)
async def test_from_s3_to_a_disk_and_back(kind: str, moto_server: S3Server, tmp_path: Path) -> None:
    with sqlite("sqlite") as database:
        await go_there_and_back(database, moto_server, tmp_path, kind)


async def go_there_and_back(database: Database, moto_server: S3Server, tmp_path: Path, kind: str) -> None:
    versions = kind.endswith("with versions")
    async with moto_server.bucket() as bucket, database.opened(Base.metadata) as engine:
        sessions = async_sessionmaker(engine, expire_on_commit=False)
        if versions:
            await keep_versions(moto_server, bucket)
        first: StorageBackend = moto_server.backend(bucket)
        obstore = ObjectStoreBackend(f"s3://{bucket}", **moto_server.obstore_options())
        if kind == "obstore with versions":
            first = obstore
        elif kind == "below a prefix":
            first = PrefixedBackend(first, "inside")
        backends: dict[str, StorageBackend] = {"s3": first, "disk": LocalStorageBackend(tmp_path, fsync=False)}
        found = []
        for number, key in enumerate(("s3", "disk", "s3")):
            policies = {name: StoragePolicy(name, key) for name in ("docs", "parcels")}
            async with StorageManager(backends=backends, policies=policies) as manager:
                binding = bind_storage(Base, manager, session_factory=sessions)
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
            if kind == "obstore later":
                backends["s3"] = obstore
        before, after = KINDS[kind]
        assert [set(ref.extra or {}) for ref in found] == [before, set(), after]
        assert found[0].extra != found[2].extra or not versions
        assert found[0].identity == found[2].identity != found[1].identity
        if versions:
            await remove_versions(moto_server, bucket)


async def keep_versions(server: S3Server, bucket: str) -> None:
    backend = server.backend(bucket)
    async with backend.client() as client:
        await client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    await backend.aclose()


async def remove_versions(server: S3Server, bucket: str) -> None:
    """Remove what was deleted, too, so that the bucket can go."""
    backend = server.backend(bucket)
    async with backend.client() as client:
        found = await client.list_object_versions(Bucket=bucket)
        for item in (*found.get("Versions", ()), *found.get("DeleteMarkers", ())):
            await client.delete_object(Bucket=bucket, Key=item["Key"], VersionId=item["VersionId"])
    await backend.aclose()
