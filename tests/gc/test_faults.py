"""Listings that break off, deletes that fail, runs that are cancelled or stopped, and what unfinished writes leave."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from granite_storage import BackendUnavailableError, ConfigurationError
from granite_storage.backends.base import StorageBackend, SupportsBatchDelete, SupportsClock
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import AccessDeniedError, CollectionRefusedError
from granite_storage.gc import OrphanStatus, database
from tests.gc.environment import Crate, GcEnvironment, file, gc_environment
from tests.orm.databases import Database
from tests.tiers import is_exhaustive

_STRIDE = 1 if is_exhaustive() else 3
"""How far the moments lie apart at which a run is cancelled, in steps of three milliseconds."""


async def fill(env: GcEnvironment, orphans: int) -> set[str]:
    """Store one file of a row and some orphans; return where those are."""
    await env.add(Crate(id=1, file=file("a")))
    found = {(await env.orphan()).location for _ in range(orphans)}
    env.age()
    return found


def in_batches(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(database, "most_at_once", lambda *_: size)


@pytest.mark.case("GCX-09")
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_listing_that_breaks_off(plain_env: GcEnvironment, after: int) -> None:
    await fill(plain_env, 9)
    plain_env.store.cut("iter_objects", after=after)
    with pytest.raises(BackendUnavailableError):
        await plain_env.collect()
    assert len(await plain_env.locations()) == 10
    assert (await plain_env.collect()).deleted == 9


@pytest.mark.case("GCX-09")
async def test_listing_that_ends_early_without_an_error(plain_env: GcEnvironment) -> None:
    """What was not listed is not deleted, and its references are not taken for dangling."""
    await fill(plain_env, 9)
    plain_env.store.cut("iter_objects", after=2, silently=True)
    report = await plain_env.collector().collect(storage_key="docs", dry_run=False, allow_no_references=True)
    assert report.dangling == []
    assert report.deleted == 2 - report.referenced


async def test_a_listing_out_of_order(plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    await fill(plain_env, 9)
    listing = plain_env.store.iter_objects

    async def disordered(*args: Any, **kwargs: Any) -> Any:
        for info in reversed([info async for info in listing(*args, **kwargs)]):
            yield info

    monkeypatch.setattr(plain_env.store, "iter_objects", disordered)
    with pytest.raises(CollectionRefusedError, match="byte order"):
        await plain_env.collect()
    assert len(await plain_env.locations()) == 10


async def test_some_cannot_be_deleted(
    plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    orphans = await fill(plain_env, 9)
    stubborn = set(sorted(orphans)[:3])
    delete_many = plain_env.aged.delete_many

    async def some(locations: Any) -> Any:
        await delete_many([location for location in locations if location not in stubborn])
        return {location: AccessDeniedError("held", location=location) for location in stubborn & set(locations)}

    monkeypatch.setattr(plain_env.aged, "delete_many", some)
    report = await plain_env.collect()
    assert (report.orphaned, report.deleted, report.failed) == (9, 6, 3)
    assert {(item.status, item.location, item.error) for item in report.failures} == {
        (OrphanStatus.FAILED, location, "AccessDeniedError: held") for location in stubborn
    }
    assert sum("could not delete the orphan" in record.message for record in caplog.records) == 3
    monkeypatch.undo()
    assert (await plain_env.collect()).deleted == 3


async def test_looks_come_in_full_batches(plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look may read whole tables, so there are few, however thinly orphans are sown."""
    monkeypatch.setattr("granite_storage.gc.collection.PAGE", 10)
    monkeypatch.setattr("granite_storage.gc.database.PAGE", 10)
    looks: list[int] = []
    original = database.DatabaseReferences.find_references

    async def look(self: Any, locations: Any) -> set[str]:
        looks.append(len(locations))
        return await original(self, locations)

    monkeypatch.setattr(database.DatabaseReferences, "find_references", look)
    for number in range(1, 51):
        await plain_env.add(Crate(id=number, file=file("a")))
        if number % 5 == 0:
            await plain_env.orphan()
    plain_env.age()
    assert (await plain_env.collect(dry_run=True)).orphaned == 10
    assert looks == [10]


class OneByOne:
    """A backend without any ability but those that each has."""

    def __init__(self, inner: StorageBackend) -> None:
        for name in ("put_bytes", "put_stream", "open", "stat", "exists", "delete", "iter_objects", "aclose"):
            setattr(self, name, getattr(inner, name))


async def test_a_backend_without_abilities(plain_database: Database, tmp_path: Path) -> None:
    backend = OneByOne(LocalStorageBackend(tmp_path, fsync=False))
    assert not isinstance(backend, SupportsBatchDelete | SupportsClock)
    async with gc_environment(plain_database, backend=backend) as env:
        await env.add(Crate(id=1, file=file("a")))
        locations = [(await env.orphan()).location for _ in range(3)]
        _backdate(tmp_path, *locations)
        env.store.fail("delete", error=AccessDeniedError("no"))
        report = await env.collect()
        assert (report.deleted, report.failed) == (2, 1)


async def test_a_backend_that_goes_out_of_reach(plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends; there is no sense in failing at every other orphan."""
    in_batches(monkeypatch, 2)
    await fill(plain_env, 9)
    plain_env.store.fail("delete_many", nth=2, times=100)
    run = plain_env.collector().collection(storage_key="docs", dry_run=False)
    with pytest.raises(BackendUnavailableError):
        await run
    assert (run.report.deleted, run.report.failed, run.report.complete) == (2, 2, False)


@pytest.mark.case("GCX-09")
async def test_cancelled_anywhere(plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was doing, rows keep their objects, and the next run goes on."""
    in_batches(monkeypatch, 3)
    plain_env.store.delay("delete_many", seconds=0.005, times=10**6)
    await plain_env.add(*(Crate(id=number, file=file("a")) for number in range(1, 4)))
    deleted_partly = 0
    # On a busy machine the deletes begin later.
    for step in range(0, 200, _STRIDE):
        if step >= 25 and deleted_partly:
            break
        for _ in range(9):
            await plain_env.orphan()
        plain_env.age()
        task = asyncio.create_task(plain_env.collect())
        await asyncio.sleep(0.003 * step)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left = len(await plain_env.locations()) - 3
        deleted_partly += 0 < left < 9
        assert (await plain_env.collect()).deleted == left
        assert len(await plain_env.locations()) == 3
    assert deleted_partly, "no cancellation came in the middle of the deletes"
    assert plain_env.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_stopped(plain_env: GcEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    in_batches(monkeypatch, 3)
    await fill(plain_env, 9)
    run = plain_env.collector().collection(storage_key="docs", dry_run=False)
    async for _ in run:
        run.stop()
    assert (run.report.deleted, run.report.complete) == (3, False)
    assert (await plain_env.collect()).deleted == 6


@pytest.mark.case("GCX-10")
async def test_temporary_files_that_unfinished_writes_left(plain_database: Database, tmp_path: Path) -> None:
    async with gc_environment(plain_database, backend=LocalStorageBackend(tmp_path, fsync=False)) as env:
        await env.add(Crate(id=1, file=file("a")))
        old, new = tmp_path / ".granite-old.tmp", tmp_path / "docs" / ".granite-new.tmp"
        for path in (old, new):
            path.write_bytes(b"half")
        _backdate(tmp_path, old.name)
        assert (await env.collect(dry_run=True)).unfinished == 0
        report = await env.collect()
        assert (report.unfinished, report.unfinished_error) == (1, None)
        assert new.exists()
        assert not old.exists()
        new.unlink()


async def test_what_cannot_be_cleared_up_does_not_spoil_the_report(plain_database: Database, tmp_path: Path) -> None:
    async with gc_environment(plain_database, backend=LocalStorageBackend(tmp_path, fsync=False)) as env:
        await env.add(Crate(id=1, file=file("a")))
        env.store.fail("cleanup_incomplete", error=AccessDeniedError("no"))
        report = await env.collect()
        assert report.unfinished_error == "AccessDeniedError: no"
        assert report.complete


class TestRunEvery:
    @pytest.mark.time_bound
    async def test_again_and_again(self, plain_env: GcEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """It survives a failure, deletes by itself, and ends promptly."""
        caplog.set_level(logging.INFO, "granite_storage")
        await fill(plain_env, 3)
        plain_env.store.fail("iter_objects")
        async with plain_env.collector().run_every(timedelta(seconds=0.02), storage_keys=["docs"]):
            await _until(plain_env, 1)
            await plain_env.orphan()
            plain_env.age()
            await _until(plain_env, 1)
            begun = time.monotonic()
        assert time.monotonic() - begun < 1
        assert "collecting the garbage of 'docs' failed" in caplog.text
        assert "4 orphans" in caplog.text or "3 orphans" in caplog.text

    async def test_arguments(self, plain_env: GcEnvironment) -> None:
        with pytest.raises(LookupError):
            async with plain_env.collector().run_every(timedelta(1), storage_keys=["nothing"]):
                pass
        with pytest.raises(ConfigurationError, match="above 0"):
            async with plain_env.collector().run_every(timedelta(0)):
                pass

    @pytest.mark.case("GCX-12")
    async def test_one_leader_among_many(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        if database.is_sqlite:
            pytest.skip("SQLite has no advisory locks")
        async with gc_environment(database) as env:
            leaders: dict[str, int] = {}
            collectors = {name: env.collector() for name in ("one", "two", "three")}

            def counting(name: str) -> Any:
                async def collect(**_: Any) -> Any:
                    leaders[name] = leaders.get(name, 0) + 1
                    raise RuntimeError("enough for a test")

                return collect

            for name, collector in collectors.items():
                monkeypatch.setattr(collector, "collect", counting(name))
            runs = {name: collector.run_every(timedelta(seconds=0.03)) for name, collector in collectors.items()}
            for run in runs.values():
                await run.__aenter__()
            await asyncio.sleep(0.5)
            [leader] = leaders
            assert leaders[leader] > 2
            assert env.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
            await runs.pop(leader).__aexit__(None, None, None)
            await asyncio.sleep(0.5)
            assert len(leaders) == 2, "another one takes over"
            for run in runs.values():
                await run.__aexit__(None, None, None)


async def _until(env: GcEnvironment, count: int) -> None:
    async with asyncio.timeout(10):
        while len(await env.locations()) != count:  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.01)


def _backdate(folder: Path, *names: str) -> None:
    then = time.time() - 3 * 24 * 3600
    for name in names:
        os.utime(folder / name, (then, then))
