"""What verification finds, what it must not report, and how it is stopped and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    BackendUnavailableError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    StoredObjectRefType,
    attachment,
    bind_storage,
)
from granite_storage.backends.base import ObjectInfo
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import AccessDeniedError, BackendError, UnknownPolicyError
from granite_storage.orm import references
from granite_storage.orm.references import Scan
from granite_storage.verification import Problem, verify
from tests.migration.environment import Base, MigrationEnvironment, Parcel, Shelf, file, hide_deleted
from tests.orm.databases import Database, sqlite


async def one_ref(env: MigrationEnvironment) -> StoredObjectRef:
    await env.add(Shelf(id=1, file=file("abc")))
    return (await env.refs())[0]


async def rewrite(env: MigrationEnvironment, **changes: Any) -> None:
    """Change what the row of the one ref says, past the library; None removes a key."""
    whole = {**(await env.refs())[0].to_dict(), **changes}
    await env.set_raw(1, json.dumps({key: value for key, value in whole.items() if value is not None}))


async def found(env: MigrationEnvironment, **options: Any) -> list[Problem]:
    return [finding.problem async for finding in verify(env.binding, **options)]


class TestFindings:
    async def test_nothing_wrong(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a"), other=file("b")), Shelf(id=2), Parcel(number="1", file=file("c")))
        report = await verify(env.binding, deep=True)
        assert (report.rows, report.checked, report.problems, report.bytes_read, report.complete) == (2, 3, 0, 3, True)

    async def test_missing(self, env: MigrationEnvironment) -> None:
        ref = await one_ref(env)
        await env.old.delete(ref.location)
        findings = [finding async for finding in verify(env.binding)]
        assert [(f.problem, f.table, f.primary_key, f.column, f.ref) for f in findings] == [
            (Problem.MISSING, "migration_shelf", (1,), "file", ref)
        ]
        assert await found(env, deep=True) == [Problem.MISSING]

    async def test_wrong_size(self, env: MigrationEnvironment) -> None:
        ref = await one_ref(env)
        await env.old.delete(ref.location)
        await env.old.put_bytes(ref.location, b"ab")
        assert await found(env) == await found(env, deep=True) == [Problem.WRONG_SIZE]

    async def test_wrong_bytes_are_found_by_a_deep_run_only(self, env: MigrationEnvironment) -> None:
        ref = await one_ref(env)
        await env.old.delete(ref.location)
        await env.old.put_bytes(ref.location, b"abd")
        assert await found(env) == []
        assert await found(env, deep=True) == [Problem.WRONG_CHECKSUM]

    @pytest.mark.case("REF-01")
    @pytest.mark.parametrize("deep", [False, True])
    async def test_an_unknown_checksum_is_told_and_harmless(self, env: MigrationEnvironment, deep: bool) -> None:
        await one_ref(env)
        await rewrite(env, checksum=None, extra=None, created_at=None)
        report = await verify(env.binding, deep=deep)
        assert dict(report.counts) == {Problem.UNKNOWN_CHECKSUM: 1}
        assert report.problems == 0
        assert report.bytes_read == (3 if deep else 0)

    @pytest.mark.case("REF-03")
    @pytest.mark.parametrize("checksum", ["md5:900150983cd24fb0d6963f7d28e17f72", "sha256:", f"sha256:{'0' * 65}", "abc"])
    async def test_a_checksum_that_is_none(self, env: MigrationEnvironment, checksum: str) -> None:
        await one_ref(env)
        await rewrite(env, checksum=checksum)
        assert await found(env) == [Problem.UNDECODABLE]

    @pytest.mark.parametrize("raw", ["[]", '{"storage_key": "docs"}', "17", '"text"', "true"])
    async def test_what_is_no_ref(self, env: MigrationEnvironment, raw: str) -> None:
        await one_ref(env)
        await env.set_raw(1, raw)
        findings = [finding async for finding in verify(env.binding, storage_key="docs")]
        assert [finding.problem for finding in findings] == [Problem.UNDECODABLE]
        assert findings[0].message

    async def test_json_null_is_nothing(self, env: MigrationEnvironment) -> None:
        await one_ref(env)
        await env.set_raw(1, "null")
        assert await found(env) == []

    @pytest.mark.case("REF-06")
    async def test_what_is_no_json_at_all(self, env: MigrationEnvironment) -> None:
        if not env.database.is_sqlite:
            pytest.skip("the others keep nothing that is not JSON")
        await one_ref(env)
        for raw in ("not json", "[" * 10_000):
            await env.set_raw(1, raw)
            assert await found(env) == [Problem.UNDECODABLE]

    @pytest.mark.parametrize("location", ["../etc/passwd", "/etc/passwd", "a//b", "x" * 1025])
    async def test_a_location_that_leads_elsewhere(self, env: MigrationEnvironment, location: str) -> None:
        await one_ref(env)
        await rewrite(env, location=location)
        assert await found(env) == [Problem.UNDECODABLE]

    async def test_a_backend_that_is_gone(self, env: MigrationEnvironment) -> None:
        await one_ref(env)
        await rewrite(env, backend="gone")
        assert await found(env) == [Problem.UNKNOWN_BACKEND]

    @pytest.mark.parametrize("deep", [False, True])
    async def test_permission_denied_is_not_missing(self, env: MigrationEnvironment, deep: bool) -> None:
        await one_ref(env)
        env.old.fail("open" if deep else "stat", times=2, error=AccessDeniedError("denied"))
        assert await found(env, deep=deep) == [Problem.DENIED]

    async def test_a_disk_that_fails_at_one_object(self, env: MigrationEnvironment) -> None:
        await one_ref(env)
        env.old.fail("stat", times=2, error=BackendError("input/output error"))
        assert await found(env) == [Problem.UNREADABLE]

    async def test_a_plain_column_is_read_too(self, env: MigrationEnvironment) -> None:
        ref = await one_ref(env)
        await env.sql("UPDATE migration_shelf SET scan = file, file = NULL")
        await env.old.delete(ref.location)
        assert await found(env) == [Problem.MISSING]

    async def test_soft_deleted_rows_are_read_too(self, env: MigrationEnvironment) -> None:
        ref = await one_ref(env)
        await env.sql("UPDATE migration_shelf SET deleted = true")
        await env.old.delete(ref.location)
        with hide_deleted():
            async with env.sessions() as session:
                assert await session.get(Shelf, 1) is None
            assert await found(env) == [Problem.MISSING]

    async def test_one_storage_key_of_two(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")), Parcel(number="1", file=file("b")))
        for ref in await env.refs():
            await env.old.delete(ref.location)
        report = await verify(env.binding, storage_key="parcels")
        assert [finding.table for finding in report.findings] == ["migration_parcel"]
        assert report.checked == 1

    async def test_refs_of_a_policy_that_is_gone_belong_to_all(self, env: MigrationEnvironment) -> None:
        await one_ref(env)
        await rewrite(env, storage_key="gone", checksum=None)
        assert await found(env, storage_key="docs") == []
        assert await found(env) == [Problem.UNKNOWN_CHECKSUM]


class TestNothingIsMissingThatCouldNotBeLookedFor:
    async def test_a_backend_out_of_reach_ends_the_run(self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage._jobs._PAUSES", (0.01, 0.01))
        await env.add(*(Shelf(id=number, file=file("a")) for number in range(1, 30)))
        env.old.fail("stat", nth=20, times=1000, error=BackendUnavailableError("down"))
        run = verify(env.binding, concurrency=2)
        with pytest.raises(BackendUnavailableError):
            await run
        assert (run.report.problems, run.report.complete) == (0, False)
        assert run.report.rows == 19

    async def test_a_short_outage_is_waited_for(self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage._jobs._PAUSES", (0.01, 0.01))
        await one_ref(env)
        env.old.fail("stat", times=2, error=BackendUnavailableError("down"))
        assert (await verify(env.binding)).problems == 0

    @pytest.mark.case("DSK-13")
    @pytest.mark.parametrize("prefixed", [False, True])
    async def test_a_local_folder_without_its_marker(self, database: Database, tmp_path: Path, prefixed: bool) -> None:
        local = LocalStorageBackend(tmp_path / "store", fsync=False)
        backend = PrefixedBackend(local, "some/prefix") if prefixed else local
        manager = StorageManager(
            backends={"disk": backend},
            policies={"docs": StoragePolicy("docs", "disk"), "parcels": StoragePolicy("parcels", "disk")},
        )
        async with database.opened(Base.metadata) as engine, manager:
            sessions = async_sessionmaker(engine)
            binding = bind_storage(Base, manager, session_factory=sessions)
            async with sessions.begin() as session:
                session.add(Shelf(id=1, file=file("a")))
            assert (await verify(binding)).problems == 0
            for name in ("gone", "store"):
                await asyncio.to_thread((tmp_path / "store").rename, tmp_path / "gone") if name == "gone" else None
                with pytest.raises(BackendUnavailableError, match="marker"):
                    await verify(binding)
                await asyncio.to_thread((tmp_path / "store").mkdir, exist_ok=True)
            binding.unbind()

    @pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
    async def test_a_disk_that_goes_while_it_runs(self, database: Database, tmp_path: Path, leaves: str) -> None:
        backend = LocalStorageBackend(tmp_path / "store", fsync=False)
        manager = StorageManager(
            backends={"disk": backend},
            policies={"docs": StoragePolicy("docs", "disk"), "parcels": StoragePolicy("parcels", "disk")},
        )
        async with database.opened(Base.metadata) as engine, manager:
            sessions = async_sessionmaker(engine)
            binding = bind_storage(Base, manager, session_factory=sessions)
            async with sessions.begin() as session:
                session.add_all(Shelf(id=number, file=file("a")) for number in range(1, 40))
                session.add(Shelf(id=40, file=file("b")))
            async with sessions() as session:
                first = await session.get_one(Shelf, 1)
            await manager.delete(first.file.ref)
            run = verify(binding, concurrency=1)
            with pytest.raises(BackendUnavailableError, match="mounted"):
                async for finding in run:
                    assert finding.primary_key == (1,)
                    await asyncio.to_thread((tmp_path / "store").rename, tmp_path / "gone")
                    if leaves == "an empty folder":
                        await asyncio.to_thread((tmp_path / "store").mkdir)
            assert run.report.problems == 1
            binding.unbind()

    async def test_what_is_replaced_meanwhile_is_rechecked(self, env: MigrationEnvironment) -> None:
        await one_ref(env)
        real = env.old.stat

        async def stat(location: str) -> Any:
            env.old.stat = real  # type: ignore[method-assign]
            async with env.sessions.begin() as session:
                (await session.get_one(Shelf, 1)).file = file("other")
            return await real(location)

        env.old.stat = stat  # type: ignore[method-assign]
        report = await verify(env.binding)
        assert (report.problems, report.checked) == (0, 1)

    async def test_what_is_deleted_meanwhile_is_not_missing(self, env: MigrationEnvironment) -> None:
        await one_ref(env)

        async def stat(location: str) -> Any:
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Shelf, 1))
            raise ObjectNotFoundError("gone", location=location)

        env.old.stat = stat  # type: ignore[method-assign]
        assert await found(env) == []

    async def test_what_is_of_another_storage_key_meanwhile_is_left_alone(self, env: MigrationEnvironment) -> None:
        ref = await one_ref(env)
        other = json.dumps({**ref.to_dict(), "storage_key": "other", "location": "nobody/1/file/has-this"})

        async def stat(location: str) -> Any:
            await env.set_raw(1, other)
            raise ObjectNotFoundError("gone", location=location)

        env.old.stat = stat  # type: ignore[method-assign]
        report = await verify(env.binding, storage_key="docs")
        assert (report.problems, report.checked) == (0, 1)
        await env.set_raw(1, json.dumps(ref.to_dict()))

    async def test_verification_writes_nothing(self, env: MigrationEnvironment) -> None:
        await one_ref(env)
        env.old.calls.clear()
        await verify(env.binding, deep=True)
        assert {call.operation for call in env.old.calls} <= {"open", "read", "stat"}


class TestRuns:
    async def test_stopping_and_going_on(self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(references, "_BATCH_SIZE", 7)
        await env.add(*(Shelf(id=number, file=file("a")) for number in range(1, 31)))
        await env.add(*(Parcel(number=str(number), file=file("a")) for number in range(30)))
        for ref in await env.refs():
            await env.old.delete(ref.location)
        seen: list[Any] = []
        after = None
        for _ in range(100):
            run = verify(env.binding, after=after, concurrency=3)
            async for finding in run:
                seen.append((finding.table, finding.primary_key))
                if run.report.rows >= 10:
                    run.stop()
            after = run.report.key
            if run.report.complete:
                break
        assert len(seen) == len(set(seen)) == 60

    async def test_breaking_off_leaves_nothing_open(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file("a")) for number in range(1, 31)))
        for ref in await env.refs():
            await env.old.delete(ref.location)
        run = aiter(verify(env.binding))
        await anext(run)
        await run.aclose()
        assert env.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    async def test_several_at_a_time_and_no_more(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file("a")) for number in range(1, 31)))
        real, running, most = env.old.stat, 0, 0

        async def stat(location: str) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.005)
            running -= 1
            return await real(location)

        env.old.stat = stat  # type: ignore[method-assign]
        await verify(env.binding, concurrency=5)
        assert most == 5

    async def test_a_budget_slows_it_down(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file("x" * 1000)) for number in range(1, 6)))
        begun = asyncio.get_running_loop().time()
        await verify(env.binding, deep=True, bytes_per_second=10_000)
        assert asyncio.get_running_loop().time() - begun >= 0.4

    async def test_count(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a"), other=file("b")), Shelf(id=2), Parcel(number="1", file=file("c")))
        assert await verify(env.binding).count() == 2

    async def test_an_unknown_policy(self, env: MigrationEnvironment) -> None:
        with pytest.raises(UnknownPolicyError):
            verify(env.binding, storage_key="dosc")

    async def test_findings_that_are_kept_are_bounded(self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage.verification.MOST_KEPT", 3)
        await env.add(*(Shelf(id=number, file=file("a")) for number in range(1, 10)))
        for ref in await env.refs():
            await env.old.delete(ref.location)
        report = await verify(env.binding)
        assert (len(report.findings), report.problems) == (3, 9)


class TestScan:
    async def test_every_kind_of_key_in_pages_of_any_size(
        self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await env.add(*(Shelf(id=number, file=file("a")) for number in range(1, 8)))
        await env.add(*(Parcel(number=f"n{number % 3}-é{number}", file=file("a")) for number in range(9)))
        for size in (1, 2, 3, 16, 17):
            monkeypatch.setattr(references, "_BATCH_SIZE", size)
            scan = Scan(env.binding)
            rows = [row async for row in scan.rows()]
            assert len({row.key for row in rows}) == len(rows) == 16
            for index, row in enumerate(rows):
                assert [later.key async for later in scan.rows(after=row.key)] == [later.key for later in rows[index + 1 :]]

    async def test_a_table_without_a_primary_key(self) -> None:
        class Other(DeclarativeBase):
            metadata = MetaData()

        Table("loose", Other.metadata, Column("number", Integer), Column("ref", StoredObjectRefType))
        manager = StorageManager(backends={"m": MemoryStorageBackend()}, policies={})
        binding = bind_storage(Other, manager, session_factory=async_sessionmaker())
        with pytest.raises(ConfigurationError, match="loose has no primary key"):
            verify(binding)
        binding.unbind()


async def test_memory_is_flat(tmp_path: Path) -> None:
    """Five times as many rows take no more memory."""

    class Many(DeclarativeBase):
        pass

    class Row(Many):
        __tablename__ = "many"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    class Everything(MemoryStorageBackend):
        async def stat(self, location: str) -> Any:
            return ObjectInfo(location, 1, datetime.now(UTC))

    manager = StorageManager(backends={"m": Everything()}, policies={"docs": StoragePolicy("docs", "m")})
    with sqlite("sqlite") as database:
        async with database.opened(Many.metadata) as engine:
            binding = bind_storage(Many, manager, session_factory=async_sessionmaker(engine))
            peaks = []
            async for _ in _filled(engine, Row.__table__):
                if not peaks:
                    await verify(binding)  # once without being measured: what is made once stays
                with _as_in_a_new_program():
                    report = await verify(binding)
                    peaks.append(tracemalloc.get_traced_memory()[1])
            assert report.counts[Problem.UNKNOWN_CHECKSUM] == 10_000
            binding.unbind()
    assert peaks[1] < 1.3 * peaks[0], peaks


@contextlib.contextmanager
def _as_in_a_new_program() -> Iterator[None]:
    """Measure memory; cycles are collected as often as if all that other tests have left were not there, then and later."""
    gc.collect()
    gc.freeze()
    gc.collect()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


async def _filled(engine: Any, table: Table) -> AsyncIterator[None]:
    """Fill a table with 2,000 rows, and then with 10,000."""
    ref = StoredObjectRef("docs", "m", "a/b/c/d", 1, "").to_dict()
    for first, last in ((0, 2_000), (2_000, 10_000)):
        async with engine.begin() as connection:
            statement = "INSERT INTO many (id, file) VALUES (?, ?)"
            await connection.exec_driver_sql(statement, [(number, json.dumps(ref)) for number in range(first, last)])
        yield
