"""What the collector refuses to believe, and to rely on."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ARRAY, JSON, Column, Connection, Integer, Table, event
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from granite_storage import (
    Attachment,
    ConfigurationError,
    StorageGarbageCollector,
    StorageManager,
    StoredObjectRef,
    StoredObjectRefType,
    attachment,
    bind_storage,
)
from granite_storage._engine import may_overlap
from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import CollectionRefusedError, UnknownPolicyError
from tests.gc.environment import POLICIES, Base, Crate, GcEnvironment, file, gc_environment
from tests.orm.databases import Database, sqlite


async def test_the_fuse(plain_env: GcEnvironment) -> None:
    env = plain_env
    await env.add(*(Crate(id=number, file=file("a")) for number in range(1, 4)))
    orphans = [await env.orphan() for _ in range(2)]
    env.age()
    collector = env.collector(max_deleted_share=0.25)
    with pytest.raises(CollectionRefusedError, match="2 of the 5 objects of 'docs' \\(40%\\)") as caught:
        await collector.collect(storage_key="docs", dry_run=False)
    assert caught.value.report.orphaned == 2  # type: ignore[attr-defined]
    assert len(await env.locations()) == 5
    dry = await collector.collect(storage_key="docs")
    assert dry.refusal == str(caught.value)
    assert dry.share == 0.4
    await env.aged.delete(orphans[0].location)
    assert (await collector.collect(storage_key="docs", dry_run=False)).deleted == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301  # our own


async def test_an_empty_database(env: GcEnvironment) -> None:
    for _ in range(2):
        await env.orphan()
    env.age()
    assert (await env.collect(dry_run=True)).refusal is not None
    with pytest.raises(CollectionRefusedError, match="empty or the wrong one"):
        await env.collect()
    assert len(await env.locations()) == 2
    assert (await env.collect(allow_no_references=True)).deleted == 2


async def test_the_wrong_database(env: GcEnvironment) -> None:
    """Its rows refer to objects, and to none of these."""
    await env.add(Crate(id=1, file=file("a")))
    await env.aged.delete(await env.location_of(1))
    await env.orphan()
    env.age()
    with pytest.raises(CollectionRefusedError, match="the wrong one"):
        await env.collect()
    assert len(await env.locations()) == 1


@pytest.fixture
async def disk(plain_database: Database, tmp_path: Path) -> AsyncIterator[GcEnvironment]:
    async with gc_environment(plain_database, backend=LocalStorageBackend(tmp_path / "store", fsync=False)) as env:
        yield env


@pytest.mark.case("DSK-13")
@pytest.mark.parametrize("has_identity", [True, False], ids=["of now", "of a version without identities"])
async def test_a_disk_that_is_not_mounted(disk: GcEnvironment, tmp_path: Path, has_identity: bool) -> None:
    ref = await disk.orphan()
    await disk.add(Crate(id=1, scan=ref if has_identity else ref.with_identity(None)))
    (tmp_path / "store").rename(tmp_path / "unmounted")
    (tmp_path / "store").mkdir()
    disk.aged._tree._known_root = None  # type: ignore[attr-defined]  # as in a process that has not seen the disk
    for dry_run in (True, False):
        with pytest.raises(CollectionRefusedError, match="marker"):
            await disk.collect(dry_run=dry_run)
    await disk.manager.aclose()


async def test_a_disk_of_something_else(disk: GcEnvironment, tmp_path: Path) -> None:
    """Objects without a marker may be anybody's."""
    await disk.orphan()
    (tmp_path / "store" / ".granite-storage").unlink()
    with pytest.raises(CollectionRefusedError, match="marker"):
        await disk.collector(grace_period=timedelta(0)).collect(storage_key="docs", dry_run=False, allow_no_references=True)
    assert len(list((tmp_path / "store").rglob("*-o.txt"))) == 1


async def test_a_disk_that_was_never_used(disk: GcEnvironment) -> None:
    report = await disk.collect()
    assert (report.scanned, report.complete) == (0, True)


async def test_local_disk_and_its_clock(disk: GcEnvironment, tmp_path: Path) -> None:
    await disk.add(Crate(id=1, file=file("a")))
    await disk.orphan()
    collector = disk.collector(grace_period=timedelta(hours=1))
    assert (await collector.collect(storage_key="docs", dry_run=False)).within_grace_period == 1
    assert (await disk.collector(grace_period=timedelta(0)).collect(storage_key="docs", dry_run=False)).orphaned <= 1
    shutil.rmtree(tmp_path / "store")


def test_arguments(plain_database: Database) -> None:
    manager = StorageManager(backends={"store": MemoryStorageBackend()}, policies=POLICIES)
    binding = bind_storage(Base, manager)
    try:
        for arguments in (
            {},
            {"binding": binding, "iter_references": list},
            {"binding": binding},
            {"iter_references": []},
            {"iter_references": list, "grace_period": timedelta(-1)},
            {"iter_references": list, "grace_period": 24},
            {"iter_references": list, "max_deleted_share": 1.5},
            {"iter_references": list, "max_deleted_share": True},
        ):
            with pytest.raises(ConfigurationError):
                StorageGarbageCollector(manager, **arguments)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="another manager"):
            StorageGarbageCollector(StorageManager(backends={}, policies={}), binding=binding)
    finally:
        binding.unbind()


async def test_an_unknown_policy(plain_env: GcEnvironment) -> None:
    with pytest.raises(UnknownPolicyError):
        await plain_env.collect("nothing")


@pytest.mark.parametrize("other", ["the same", "a folder of it", "around it"])
async def test_two_names_for_one_place(plain_env: GcEnvironment, other: str) -> None:
    """A row may refer to an object by the other name."""
    inner = MemoryStorageBackend()
    backends: dict[str, Any] = {"store": inner, "other": inner if other == "the same" else PrefixedBackend(inner, "docs")}
    if other == "around it":
        backends = {"store": backends["other"], "other": inner}
    manager = StorageManager(backends=backends, policies=POLICIES)
    collector = StorageGarbageCollector(manager, list)
    with pytest.raises(CollectionRefusedError, match="lead to the same objects"):
        await collector.collect(storage_key="docs")


async def test_places(tmp_path: Path) -> None:
    memory = MemoryStorageBackend()
    tenants = PrefixedBackend(memory, "tenants/7"), PrefixedBackend(memory, "tenants/8"), PrefixedBackend(memory, "tenants")
    assert not await may_overlap(tenants[0], tenants[1])
    assert await may_overlap(tenants[0], tenants[2])
    assert not await may_overlap(memory, MemoryStorageBackend())
    assert await may_overlap(LocalStorageBackend(tmp_path), LocalStorageBackend(tmp_path / "inside"))
    assert not await may_overlap(LocalStorageBackend(tmp_path / "a"), LocalStorageBackend(tmp_path / "ab"))
    assert await may_overlap(memory, OneByOne(MemoryStorageBackend())) is None


class OneByOne:
    """A backend without any ability but those that each has."""

    def __init__(self, inner: StorageBackend) -> None:
        for name in ("put_bytes", "put_stream", "open", "stat", "exists", "delete", "iter_objects", "aclose"):
            setattr(self, name, getattr(inner, name))


@contextlib.contextmanager
def odd_base(*columns: Column[Any]) -> Iterator[Any]:
    class Odd(DeclarativeBase):
        pass

    Table("odd", Odd.metadata, Column("id", Integer, primary_key=True), *columns)
    yield Odd


class _Wrapped(TypeDecorator[Any]):
    impl = StoredObjectRefType
    cache_ok = True


@pytest.mark.parametrize(
    "kind", [_Wrapped(), ARRAY(StoredObjectRefType()), JSON().with_variant(StoredObjectRefType(), "sqlite")], ids=str
)
async def test_refs_that_cannot_be_searched(plain_env: GcEnvironment, kind: Any) -> None:
    with odd_base(Column("ref", kind)) as base:
        binding = bind_storage(base, plain_env.manager, session_factory=plain_env.sessions)
        try:
            with pytest.raises(CollectionRefusedError, match=r"odd\.ref contains refs inside"):
                await StorageGarbageCollector(plain_env.manager, binding=binding).collect(storage_key="docs")
        finally:
            binding.unbind()


async def test_no_column_of_refs_at_all(plain_env: GcEnvironment) -> None:
    with odd_base() as base:
        binding = bind_storage(base, plain_env.manager, session_factory=plain_env.sessions)
        try:
            plain_env.binding.unbind()
            with pytest.raises(CollectionRefusedError, match="imported"):
                await StorageGarbageCollector(plain_env.manager, binding=binding).collect(storage_key="docs")
        finally:
            binding.unbind()


class Elsewhere(DeclarativeBase):
    pass


class Vat(Elsewhere):
    """A model of another base on the same storage, which was not listed."""

    __tablename__ = "yard_vat"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


async def test_unlisted_model(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    other = bind_storage(Elsewhere, env.manager, session_factory=env.sessions)
    try:
        async with env.engine.begin() as connection:
            await connection.run_sync(Elsewhere.metadata.create_all)
        await env.add(Vat(id=1, file=file("b")))
        env.age()
        report = await env.collect()
        assert (report.referenced, report.orphaned) == (2, 0)
    finally:
        other.unbind()
        async with env.engine.begin() as connection:
            await connection.run_sync(Elsewhere.metadata.drop_all)


@pytest.mark.case("GCX-13")
async def test_base_in_another_or_an_unknown_database(plain_env: GcEnvironment) -> None:
    with sqlite("elsewhere") as database:
        async with database.opened(Elsewhere.metadata) as engine:
            for sessions in (None, async_sessionmaker(engine)):
                other = bind_storage(Elsewhere, plain_env.manager, session_factory=sessions)
                try:
                    with pytest.raises(CollectionRefusedError, match=r"sessions to read|another database"):
                        await plain_env.collect()
                finally:
                    other.unbind()


@pytest.mark.case("GCX-13")
async def test_tables_in_several_databases(plain_env: GcEnvironment) -> None:
    with sqlite("elsewhere") as database:
        engine = database.engine()
        plain_env.sessions.configure(binds={Base.metadata.tables["gc_drum"]: engine})
        with pytest.raises(CollectionRefusedError, match="several databases"):
            await plain_env.collect()
        await engine.dispose()


async def test_row_level_security(postgres_only: Database) -> None:
    def take_role(connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL ROLE yard_reader")

    async with gc_environment(postgres_only) as env:
        await env.add(Crate(id=1, file=file("a")))
        await env.sql("ALTER TABLE gc_crate ENABLE ROW LEVEL SECURITY")
        await env.sql("CREATE ROLE yard_reader")
        await env.sql("GRANT SELECT ON ALL TABLES IN SCHEMA public TO yard_reader")
        try:
            event.listen(env.engine.sync_engine, "begin", take_role)
            with pytest.raises(CollectionRefusedError, match=r"row-level security may hide rows of public\.gc_crate"):
                await env.collect()
        finally:
            event.remove(env.engine.sync_engine, "begin", take_role)
            await env.sql("ALTER TABLE gc_crate DISABLE ROW LEVEL SECURITY")
            await env.sql("DROP OWNED BY yard_reader")
            await env.sql("DROP ROLE yard_reader")


async def test_other_schemas(postgres_only: Database) -> None:
    """A table of another schema of the base is found like any other."""

    class Far(DeclarativeBase):
        pass

    class Shed(Far):
        __tablename__ = "shed"
        __table_args__ = {"schema": "far"}
        id: Mapped[int] = mapped_column(primary_key=True)
        ref: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)

    async with gc_environment(postgres_only) as env:
        await env.sql("CREATE SCHEMA far")
        binding = bind_storage(Far, env.manager, session_factory=env.sessions)
        try:
            async with env.engine.begin() as connection:
                await connection.run_sync(Far.metadata.create_all)
            kept, orphan = await env.orphan(), await env.orphan()
            await env.add(Shed(id=1, ref=kept))
            env.age()
            collector = StorageGarbageCollector(env.manager, binding=binding, max_deleted_share=1.0)
            assert (await collector.collect(storage_key="docs", dry_run=False)).deleted == 1
            assert await env.locations() == {kept.location} != {orphan.location}
        finally:
            binding.unbind()
            await env.sql("DROP SCHEMA far CASCADE")
