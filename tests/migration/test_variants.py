"""An object and its variants move together or stay, whatever fails and whichever transaction intervenes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from granite_storage import BackendUnavailableError, StorageJournal, StoredObjectRef, migration
from granite_storage.exceptions import StorageFullError
from granite_storage.migration import MigrationStatus, migrate
from granite_storage.refs import iter_refs
from tests.migration.environment import MigrationEnvironment, Shelf, file, give_variants


async def add(env: MigrationEnvironment, number: int = 1) -> StoredObjectRef:
    """Add a row whose file has two variants."""
    await env.add(Shelf(id=number, file=file(f"file {number}")))
    return await give_variants(env, number, thumb=b"thumb of %d" % number, card=b"card of %d" % number)


async def contents(env: MigrationEnvironment) -> list[dict[str, bytes]]:
    """Return what each row shows."""
    refs = sorted(await env.refs(), key=lambda ref: ref.checksum)
    named = [{"": ref, **(ref.variants or {})} for ref in refs]
    return [{name: await env.manager.get(ref) for name, ref in one.items()} for one in named]


async def test_all_objects_of_a_value(env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {ref.location: ref for ref in [await add(env, 1), await add(env, 2)]}
    shown = await contents(env)
    await env.add(Shelf(id=3, file=file("no variants")))
    uploads: list[Any] = []
    begin = StorageJournal.begin_uploads

    async def noted(self: StorageJournal, prepared: Any) -> Any:
        uploads.append(list(prepared))
        return await begin(self, prepared)

    monkeypatch.setattr(StorageJournal, "begin_uploads", noted)
    run = migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    sizes = [ref.size for value in await env.refs() for ref in iter_refs(value)]
    assert await run.waiting() == {"old": (7, sum(sizes))}
    report = await run
    assert (report.moved, report.bytes_moved, report.failed, report.complete) == (7, sum(sizes), 0, True)
    await env.check()
    assert [one for one in await contents(env) if len(one) > 1] == shown
    moved = [ref for ref in await env.refs() if ref.variants is not None]
    assert len(moved) == 2
    for ref in moved:
        old = next(one for one in before.values() if one.checksum == ref.checksum)
        assert ref.variants is not None
        assert old.variants is not None
        assert set(ref.variants) == set(old.variants) == {"thumb", "card"}
        for name, variant in ref.variants.items():
            said, was = variant.to_dict(), old.variants[name].to_dict()
            assert said.pop("location") != was.pop("location")
            assert (said.pop("backend"), was.pop("backend")) == ("new", "old")
            assert said.pop("identity") != was.pop("identity")
            assert said == was, "its recipe, its age and what other versions say stay"
            assert said["recipe"] == f"digest of {name}"
    if env.journal is not None:
        for one in uploads:
            assert [item.source for item in one] == [None, *[one[0].location] * (len(one) - 1)]
        assert sorted(map(len, uploads)) == [1, 3, 3], "the intents of a value are committed at once"


async def test_there_and_back(env: MigrationEnvironment) -> None:
    await add(env)
    shown = await contents(env)
    await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    await migrate(env.write_to("old"), storage_key="docs", to_backend="old")
    assert await contents(env) == shown
    await env.check(old=3)
    report = await migrate(env.write_to("old"), storage_key="docs", to_backend="old")
    assert (report.moved, report.passes) == (0, 1)


@pytest.mark.parametrize("broken", ["thumb", "card"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
async def test_a_variant_that_cannot_be_copied(env: MigrationEnvironment, broken: str, damage: str) -> None:
    ref = await add(env, 1)
    await add(env, 2)
    assert ref.variants is not None
    variant = ref.variants[broken]
    await env.old.delete(variant.location)
    if damage == "changed":
        await env.old.put_bytes(variant.location, b"x" * variant.size)
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert (report.moved, report.failed) == (3, 1)
    (failure,) = report.failures
    assert (failure.status, failure.primary_key) == (MigrationStatus.FAILED, (1,))
    if damage == "missing":
        assert f"the variant {broken!r} cannot be copied, so its original stays as well" in failure.message
        assert "make the variant again" in failure.message
    await env.recover()
    assert ref.to_dict() in [one.to_dict() for one in await env.refs()], "the value is as it was"
    expected = {one.location for one in iter_refs(ref)} - ({variant.location} if damage == "missing" else set())
    assert await env.objects("old") == expected
    assert len(await env.objects("new")) == 3
    await give_variants(env, 1, **{broken: b"made again"})
    if damage == "changed":
        await env.new.delete(variant.location)
        await env.old.delete(variant.location)
    assert (await migrate(env.binding, storage_key="docs", to_backend="new")).moved == 3
    await env.check()


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_full_backend_leaves_nothing_behind(env: MigrationEnvironment, nth: int) -> None:
    ref = await add(env)
    binding = env.write_to("new")
    env.new.fail("put_stream", nth=nth, times=100, error=StorageFullError("full"))
    with pytest.raises(StorageFullError):
        await migrate(binding, storage_key="docs", to_backend="new")
    assert [one.to_dict() for one in await env.refs()] == [ref.to_dict()]
    await env.check(old=3)


async def test_a_backend_out_of_reach_for_a_moment(env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("granite_storage._jobs._PAUSES", (0.01, 0.01))
    await add(env)
    env.new.fail("put_stream", nth=2, error=BackendUnavailableError("down"))
    assert (await migrate(env.write_to("new"), storage_key="docs", to_backend="new")).moved == 3
    await env.check()


@pytest.mark.parametrize("staying", ["original", "variant"])
async def test_a_value_of_which_a_part_is_there_already(env: MigrationEnvironment, staying: str) -> None:
    """As after a worker that wrote to another backend than the flush. All are copied: a variant goes with its original."""
    ref = await add(env)
    assert ref.variants is not None
    shown = await contents(env)
    whole = ref.to_dict()
    part, one = (whole, ref) if staying == "original" else (whole["variants"]["thumb"], ref.variants["thumb"])
    part["backend"] = "new"
    await env.new.put_bytes(one.location, await env.manager.get(one))
    await env.old.delete(one.location)
    await env.set_raw(1, json.dumps(whole))
    run = migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert {key: number for key, (number, _) in (await run.waiting()).items()} == {"old": 3 - 1, "new": 1}
    assert (await run).moved == 3
    assert await contents(env) == shown
    await env.check()


async def test_a_deriver_that_is_faster(env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text has changed, so the copies are of an old value: the next attempt copies what is there then."""
    await add(env)
    binding = env.write_to("old")
    stored, rounds = migration.store, []

    async def store_and_derive(uploads: list[migration.Upload]) -> None:
        await stored(uploads)
        rounds.append(len(uploads))
        if len(rounds) == 1:
            await give_variants(env, 1, late=b"late")

    binding = env.write_to("new")
    monkeypatch.setattr(migration, "store", store_and_derive)
    report = await migrate(binding, storage_key="docs", to_backend="new")
    assert (report.moved, report.failed, rounds) == (4, 0, [3, 4])
    assert [set(one) for one in await contents(env)] == [{"", "thumb", "card", "late"}]
    await env.check()


async def test_a_writer_that_is_faster(env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    await add(env, 1)
    await add(env, 2)
    stored = migration.store

    async def store_and_write(uploads: list[migration.Upload]) -> None:
        await stored(uploads)
        entity = int(uploads[0].attachment.location.split("/")[1])
        async with env.sessions.begin() as session:
            shelf = await session.get(Shelf, entity)
            if shelf is not None and entity == 1:
                shelf.file = file("faster")
            elif shelf is not None:
                await session.delete(shelf)

    binding = env.write_to("new")
    monkeypatch.setattr(migration, "store", store_and_write)
    report = await migrate(binding, storage_key="docs", to_backend="new", concurrency=1)
    assert (report.changed, report.moved) == (2, 0)
    await env.check()
    assert await contents(env) == [{"": b"faster"}]


async def test_a_swap_that_the_database_refuses(env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    await add(env)
    real, calls = migration._compare_and_set, []

    def refusing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) < 3:
            raise OperationalError("UPDATE", {}, Exception("deadlock detected"))
        return real(*arguments)

    monkeypatch.setattr(migration, "_compare_and_set", refusing)
    assert (await migrate(env.write_to("new"), storage_key="docs", to_backend="new")).moved == 3
    await env.check()


async def test_a_value_that_sql_has_copied(env: MigrationEnvironment) -> None:
    """Each of the rows gets copies of its own, and the last one takes the old objects along."""
    await add(env)
    columns = "title, deleted, version, file, other, scan"
    for number in (2, 3):
        await env.sql(f"INSERT INTO migration_shelf (id, {columns}) SELECT {number}, {columns} FROM migration_shelf WHERE id = 1")  # noqa: S608
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert (report.moved, report.failed) == (9, 0)
    assert await contents(env) == [{"": b"file 1", "thumb": b"thumb of 1", "card": b"card of 1"}] * 3
    await env.check()


async def test_plain_columns_are_left_to_the_application(env: MigrationEnvironment) -> None:
    ref = await add(env)
    await env.add(Shelf(id=2, scan=ref))
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert (report.moved, report.manual) == (3, 1)
    await env.recover()
    assert {one.location for one in iter_refs(ref)} <= await env.objects("old")
    for one in iter_refs(ref):
        await env.manager.get(one)


async def test_a_plain_ref_to_a_variant_alone(env: MigrationEnvironment) -> None:
    ref = await add(env)
    thumb = (ref.variants or {})["thumb"]
    await env.add(Shelf(id=2, scan=thumb))
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert (report.moved, report.manual) == (3, 1)
    await env.recover()
    assert await env.manager.get(thumb) == b"thumb of 1"
    assert await env.objects("old") == {thumb.location}


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.04])
async def test_cancelled_and_run_again(env: MigrationEnvironment, seconds: float) -> None:
    for number in range(1, 12):
        await add(env, number)
    shown = await contents(env)
    binding = env.write_to("new")
    task = asyncio.ensure_future(migrate(binding, storage_key="docs", to_backend="new")._run_to_end())
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await contents(env) == shown
    for ref in await env.refs():
        assert len({one.backend for one in iter_refs(ref)}) == 1, "together or not at all"
    assert (await migrate(binding, storage_key="docs", to_backend="new")).failed == 0
    assert await contents(env) == shown
    await env.check()
