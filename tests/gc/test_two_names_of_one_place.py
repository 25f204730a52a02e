"""Two backends on one place, a key that was renamed, one key for two places: no live object is deleted, and the run says why."""

from __future__ import annotations

import contextlib
import subprocess
import unicodedata
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    StorageBackend,
    StorageBinding,
    StorageGarbageCollector,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    StoredObjectRefType,
    attachment,
    bind_storage,
)
from granite_storage.backends.base import ObjectInfo, overlap
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.obstore import ObjectStoreBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import GarbageCollectionReport
from tests.faults.s3_proxy import fault_proxy
from tests.orm.databases import Database, sqlite
from tests.servers import S3Server


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "places_page"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")
    plain: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)


@pytest.fixture
async def sessions(plain_database: Database) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    async with plain_database.opened(Base.metadata) as engine:
        yield async_sessionmaker(engine, expire_on_commit=False)


@contextlib.asynccontextmanager
async def bound(
    sessions: async_sessionmaker[AsyncSession], backends: dict[str, StorageBackend], *, to: str, prefix: str | None = None
) -> AsyncIterator[StorageBinding]:
    """Bind the base to a manager of these backends, whose policy writes to one of them, as a deployment does."""
    policies = {"docs": StoragePolicy("docs", to, key_prefix=prefix)}
    async with StorageManager(backends=backends, policies=policies) as manager:
        binding = bind_storage(Base, manager, session_factory=sessions)
        try:
            yield binding
        finally:
            binding.unbind()


async def add(binding: StorageBinding, number: int) -> str:
    """Add a row with a file, and return where that is."""
    assert binding.session_factory is not None
    page = Page(id=number, file=Attachment(f"file {number}".encode(), filename="Résumé.pdf"))
    async with binding.session_factory.begin() as session:
        session.add(page)
    assert page.file is not None
    return page.file.ref.location


async def collect(binding: StorageBinding, **options: Any) -> GarbageCollectionReport:
    collector = StorageGarbageCollector(binding.manager, binding=binding, grace_period=timedelta(0), max_deleted_share=1.0)
    return await collector.collect(storage_key="docs", dry_run=False, allow_no_references=True, **options)


async def locations(backend: StorageBackend) -> list[str]:
    return [info.location async for info in backend.iter_objects()]


def _link(folder: Path) -> StorageBackend:
    (folder / "link").symlink_to(folder / "real")
    return LocalStorageBackend(folder / "link")


def _link_above(folder: Path) -> StorageBackend:
    (folder / "above").symlink_to(folder)
    return LocalStorageBackend(folder / "above" / "real")


OTHER_NAMES: dict[str, Callable[[Path], StorageBackend]] = {
    "the same path": lambda folder: LocalStorageBackend(folder / "real"),
    "a slash": lambda folder: LocalStorageBackend(f"{folder}/real/"),
    "a link": _link,
    "a link above": _link_above,
    "obstore": lambda folder: ObjectStoreBackend((folder / "real").as_uri()),
    "a prefix of the folder above": lambda folder: PrefixedBackend(LocalStorageBackend(folder), "real"),
}


@pytest.mark.case("RA-01")
@pytest.mark.parametrize("name", OTHER_NAMES)
async def test_two_keys_for_one_folder(sessions: async_sessionmaker[AsyncSession], tmp_path: Path, name: str) -> None:
    """The rows of yesterday name the first, those of today the second."""
    real = LocalStorageBackend(tmp_path / "real")
    async with bound(sessions, {"first": real}, to="first") as binding:
        live = [await add(binding, 1)]
    backends: dict[str, StorageBackend] = {"first": real, "second": OTHER_NAMES[name](tmp_path)}
    async with bound(sessions, backends, to="second") as binding:
        live.append(await add(binding, 2))
        with pytest.raises(CollectionRefusedError, match="'second' and 'first' lead to the same objects"):
            await collect(binding)
    assert await locations(real) == sorted(live)
    await real.aclose()


@pytest.mark.case("RA-01")
async def test_the_other_end_of_a_bind_mount(sessions: async_sessionmaker[AsyncSession], tmp_path: Path) -> None:
    """Its path has no link in it: only the inode tells."""
    real = LocalStorageBackend(tmp_path / "real")
    async with bound(sessions, {"first": real}, to="first") as binding:
        live = [await add(binding, 1)]
        (tmp_path / "mounted").mkdir()
        mount = subprocess.run(["mount", "--bind", tmp_path / "real", tmp_path / "mounted"], check=False, capture_output=True)  # noqa: S607
    if mount.returncode:  # without the right to mount, at least the same folder moves away from its old path
        (tmp_path / "mounted").rmdir()
        (tmp_path / "real").rename(tmp_path / "mounted")
        (tmp_path / "real").symlink_to(tmp_path / "mounted")
    try:
        backends: dict[str, StorageBackend] = {"first": real, "second": LocalStorageBackend(tmp_path / "mounted")}
        async with bound(sessions, backends, to="second") as binding:
            live.append(await add(binding, 2))
            with pytest.raises(CollectionRefusedError, match="lead to the same objects"):
                await collect(binding)
        assert await locations(real) == sorted(live)
    finally:
        await real.aclose()
        if not mount.returncode:
            subprocess.run(["umount", tmp_path / "mounted"], check=True)  # noqa: S607


@pytest.mark.case("RA-01")
@pytest.mark.parametrize("name", ["obstore", "another spelling", "another prefix"])
async def test_two_keys_for_one_bucket(sessions: async_sessionmaker[AsyncSession], moto_server: S3Server, name: str) -> None:
    async with moto_server.bucket() as bucket:
        first = moto_server.backend(bucket)
        second: StorageBackend
        if name == "obstore":
            second = ObjectStoreBackend(f"s3://{bucket}", **moto_server.obstore_options())
        elif name == "another spelling":
            second = moto_server.backend(bucket, endpoint_url=moto_server.endpoint_url.replace("127.0.0.1", "localhost"))
        else:
            second = moto_server.backend(bucket, prefix="docs")
        async with bound(sessions, {"first": first}, to="first") as binding:
            live = [await add(binding, 1)]
        async with bound(sessions, {"first": first, "second": second}, to="second") as binding:
            await add(binding, 2)
            before = await locations(first)
            with pytest.raises(CollectionRefusedError, match="lead to the same objects"):
                await collect(binding)
            assert await locations(first) == before
            assert set(before) >= set(live)


@pytest.mark.case("RA-01")
async def test_two_servers_that_have_one_bucket(sessions: async_sessionmaker[AsyncSession], moto_server: S3Server) -> None:
    """The names of a server and of a proxy before it cannot be compared: the store's own identity decides."""
    async with moto_server.bucket() as bucket:
        with fault_proxy(moto_server.endpoint_url) as proxy:
            first = moto_server.backend(bucket)
            second = moto_server.backend(bucket, endpoint_url=proxy.url)
            assert not overlap(await first.places(), await second.places())
            async with bound(sessions, {"first": first}, to="first") as binding:
                live = [await add(binding, 1)]
            async with bound(sessions, {"first": first, "second": second}, to="second") as binding:
                live.append(await add(binding, 2))
                with pytest.raises(CollectionRefusedError, match="lead to the same objects"):
                    await collect(binding)
                assert await locations(first) == sorted(live)


class Untold:
    """A backend of an application's own, which tells nothing of its place."""

    def __init__(self, inner: StorageBackend) -> None:
        for name in ("put_bytes", "put_stream", "open", "stat", "exists", "delete", "iter_objects", "aclose"):
            setattr(self, name, getattr(inner, name))


@pytest.mark.case("RA-01")
async def test_two_keys_of_unknown_stores(sessions: async_sessionmaker[AsyncSession]) -> None:
    """A reference protects its object whatever backend it names; so it does where the prefixes differ, by the generated id."""
    memory = MemoryStorageBackend()
    backends: dict[str, StorageBackend] = {
        "first": Untold(memory),  # type: ignore[dict-item]  # its methods are there
        "second": Untold(memory),  # type: ignore[dict-item]
        "below": Untold(PrefixedBackend(memory, "docs")),  # type: ignore[dict-item]
    }
    async with bound(sessions, backends, to="first", prefix="docs") as binding:
        live = [await add(binding, 1)]
    async with bound(sessions, backends, to="below") as binding:
        live.append(f"docs/{await add(binding, 2)}")
    async with bound(sessions, backends, to="second", prefix="docs") as binding:
        live.append(await add(binding, 3))
        orphan = await binding.manager.put_bytes(
            storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"orphan"
        )
        report = await collect(binding)
        assert (report.referenced, report.referenced_on_recheck, report.deleted) == (2, 1, 1)
    assert sorted(live) == await locations(memory)
    assert orphan.location not in live
    async with bound(sessions, backends, to="below") as binding:
        assert (await collect(binding)).orphaned == 0
    assert sorted(live) == await locations(memory)


@pytest.mark.case("RA-02")
@pytest.mark.parametrize("column", ["file", "plain"])
async def test_a_backend_whose_key_was_renamed(sessions: async_sessionmaker[AsyncSession], tmp_path: Path, column: str) -> None:
    backend = LocalStorageBackend(tmp_path)
    async with bound(sessions, {"local": backend}, to="local") as binding:
        live = await add(binding, 1)
        if column == "plain":
            async with sessions.begin() as session:
                page = await session.get_one(Page, 1)
                ref = await binding.manager.put_bytes(
                    storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"plain"
                )
                page.plain = ref
    async with bound(sessions, {"disk": LocalStorageBackend(tmp_path)}, to="disk") as binding:
        before = await locations(backend)
        with pytest.raises(CollectionRefusedError, match=r"of the row 1 names the backend 'local', .* \(there are: disk\)"):
            await collect(binding)
    assert live in before
    assert await locations(backend) == before
    await backend.aclose()


@pytest.mark.case("RA-02")
async def test_supplied_references_to_a_backend_whose_key_was_renamed() -> None:
    memory, policies = MemoryStorageBackend(), {"docs": StoragePolicy("docs", "disk")}
    async with StorageManager(backends={"disk": memory}, policies=policies) as manager:
        ref = await manager.put_bytes(storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"...")
        for given, words in (
            (replace(ref, backend="local"), "on the backend 'local', which the manager does not have"),
            (ref.with_identity("another store"), "in another store"),
        ):
            collector = StorageGarbageCollector(manager, lambda given=given: [given], grace_period=timedelta(0))
            with pytest.raises(CollectionRefusedError, match=words):
                await collector.collect(storage_key="docs", dry_run=False)
        # the same object by the name that a prefix gives it
        other = replace(ref, location=f"tenants/7/{ref.location}")
        collector = StorageGarbageCollector(manager, lambda: [other], grace_period=timedelta(0), max_deleted_share=1.0)
        assert (await collector.collect(storage_key="docs", dry_run=False, allow_no_references=True)).referenced_on_recheck == 1
        assert await manager.exists(ref)


@pytest.mark.case("RA-03")
@pytest.mark.parametrize("used", [False, True])
async def test_one_key_for_two_places(sessions: async_sessionmaker[AsyncSession], tmp_path: Path, used: bool) -> None:
    """As with `backends={"files": make_backend()}`; what the second place has would be collected by the rows of the first."""
    async with bound(sessions, {"files": LocalStorageBackend(tmp_path / "one")}, to="files") as binding:
        await add(binding, 1)
        old = await collect(binding)
        assert (old.referenced, old.orphaned) == (1, 0)
    two = LocalStorageBackend(tmp_path / "two")
    async with bound(sessions, {"files": two}, to="files") as binding:
        live = await add(binding, 2) if used else ""
        with pytest.raises(CollectionRefusedError, match="of the row 1 refers to an object of another store"):
            await collect(binding)
        assert await locations(two) == ([live] if used else [])


@pytest.mark.case("RA-03")
async def test_refs_of_an_older_version_have_no_identity(sessions: async_sessionmaker[AsyncSession], tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path)
    async with bound(sessions, {"files": backend}, to="files") as binding:
        ref = await binding.manager.put_bytes(storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"...")
        async with sessions.begin() as session:
            session.add(Page(id=1, plain=ref.with_identity(None)))
        assert (await collect(binding)).referenced == 1
        assert await locations(backend) == [ref.location]


class Decomposing(MemoryStorageBackend):
    """Lists names decomposed, as HFS+ does, and finds them under both spellings."""

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        infos = [info async for info in super().iter_objects()]
        listed = sorted((replace(info, location=unicodedata.normalize("NFD", info.location)) for info in infos), key=_name)
        for info in listed:
            if info.location.startswith(prefix) and info.location > (start_after or ""):
                yield info

    async def delete_many(self, locations: Any) -> Any:
        return await super().delete_many([unicodedata.normalize("NFC", location) for location in locations])


def _name(info: ObjectInfo) -> str:
    return info.location


@pytest.mark.case("RA-04")
async def test_names_that_a_file_system_spells_otherwise(sessions: async_sessionmaker[AsyncSession]) -> None:
    backend = Decomposing()
    async with bound(sessions, {"files": backend}, to="files") as binding:
        live = await add(binding, 1)
        assert live != unicodedata.normalize("NFD", live)
        report = await collect(binding)
    assert (report.referenced_on_recheck, report.deleted, report.dangling) == (1, 0, [])
    assert await backend.exists(live)


async def test_another_base_of_the_same_database_may_use_another_key(sessions: async_sessionmaker[AsyncSession]) -> None:
    """Its references protect, whatever its manager calls the backend; those in another database could not be read."""

    class Other(DeclarativeBase):
        pass

    class Leaf(Other):
        __tablename__ = "places_leaf"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("leaves")

    memory = MemoryStorageBackend()
    leaves = StorageManager(backends={"leaves": memory}, policies={"leaves": StoragePolicy("leaves", "leaves")})
    async with bound(sessions, {"files": memory}, to="files") as binding:
        await add(binding, 1)
        for database in (None, sqlite("elsewhere")):
            with contextlib.ExitStack() as stack:
                bind = sessions.kw["bind"]
                if database is not None:
                    bind = stack.enter_context(database).engine()
                async with bind.begin() as connection:
                    await connection.run_sync(Other.metadata.create_all)
                other_sessions = async_sessionmaker(bind, expire_on_commit=False)
                other = bind_storage(Other, leaves, session_factory=other_sessions)
                try:
                    async with other_sessions.begin() as session:
                        session.add(Leaf(id=1, file=Attachment(b"leaf", filename="leaf.txt")))
                    if database is None:
                        report = await collect(binding)
                        assert (report.referenced, report.orphaned) == (2, 0)
                    else:
                        with pytest.raises(CollectionRefusedError, match="under the key 'leaves', in another database"):
                            await collect(binding)
                finally:
                    other.unbind()
                    async with bind.begin() as connection:
                        await connection.run_sync(Other.metadata.drop_all)
                    if database is not None:
                        await bind.dispose()
    assert len(await locations(memory)) == 3


@pytest.mark.case("RA-01")
async def test_a_base_that_cannot_be_asked_and_a_backend_that_does_not_tell_its_place(
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    """It may have the same objects, and its rows cannot be read."""

    class Other(DeclarativeBase):
        pass

    class _Leaf(Other):
        __tablename__ = "places_leaf"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("leaves")

    memory = MemoryStorageBackend()
    policies = {"leaves": StoragePolicy("leaves", "leaves")}
    async with bound(sessions, {"files": memory}, to="files") as binding:
        live = await add(binding, 1)
        await binding.manager.put_bytes(storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"a leaf")
        untold: dict[str, StorageBackend] = {"leaves": Untold(memory)}  # type: ignore[dict-item]  # its methods are there
        other = bind_storage(Other, StorageManager(backends=untold, policies=policies))
        try:
            with pytest.raises(CollectionRefusedError, match=r"may have the objects .* does not tell its places"):
                await collect(binding)
        finally:
            other.unbind()
        assert len(await locations(memory)) == 2
        assert live in await locations(memory)
