"""Variants, which the ref of a row nests: what the collector keeps, what it deletes, and what stops it."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from granite_storage import StorageGarbageCollector, StorageManager, StoragePolicy, StoredObjectRef, bind_storage
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.database import DatabaseReferences
from granite_storage.gc.mentions import _is_elsewhere
from granite_storage.locations import generated_id
from granite_storage.orm import iter_model_storage_refs
from granite_storage.refs import iter_refs
from tests.gc.environment import AgedBackend, Base, Crate, GcEnvironment, file
from tests.gc.test_races import before


async def nest(env: GcEnvironment, number: int, column: str = "file", **variants: StoredObjectRef) -> StoredObjectRef:
    """Give the ref of a row variants, as a worker does: past every session."""
    async with env.sessions() as session:
        value = getattr(await session.get_one(Crate, number), column)
    ref = (value if isinstance(value, StoredObjectRef) else value.ref).with_variants(variants)
    await set_raw(env, number, ref.to_dict(), column)
    return ref


async def set_raw(env: GcEnvironment, number: int, value: Any, column: str = "file") -> None:
    json_of = "CAST(:raw AS JSONB)" if env.database.is_postgres else ":raw"
    await env.sql(f"UPDATE gc_crate SET {column} = {json_of} WHERE id = {number}", raw=json.dumps(value))  # noqa: S608


@pytest.mark.parametrize("column", ["file", "scan"])
async def test_a_variant_lives_and_dies_with_its_row(env: GcEnvironment, column: str) -> None:
    await env.add(*[Crate(id=number, file=file("a"), scan=await env.orphan()) for number in (1, 2)])
    kept, gone = [[await env.orphan() for _ in range(3)] for _ in range(2)]
    for number, made in ((1, kept), (2, gone)):
        await nest(env, number, column, **{f"v{place}": variant for place, variant in enumerate(made)})
    env.age()
    report = await env.collect()
    assert (report.referenced, report.orphaned, report.dangling) == (10, 0, [])
    await env.sql("DELETE FROM gc_crate WHERE id = 2")
    report = await env.collect()
    assert (report.referenced, report.deleted) == (5, 5)
    locations = await env.locations()
    assert {ref.location for ref in kept} <= locations
    assert locations.isdisjoint(ref.location for ref in gone)


async def test_rows_that_share_an_original_leave_in_one_transaction(env: GcEnvironment) -> None:
    """The transaction knows the variants of one of them only, and the collector deletes those of the other."""
    await env.add(Crate(id=1, file=file("a")))
    await nest(env, 1, thumb=await env.orphan())
    columns = ", ".join(column.name for column in Crate.__table__.columns if column.name not in ("id", "file"))
    await env.sql(f"INSERT INTO gc_crate (id, file, {columns}) SELECT 2, file, {columns} FROM gc_crate")  # noqa: S608
    await nest(env, 2, thumb=await env.orphan())
    assert len(await env.locations()) == 3
    async with env.sessions.begin() as session:
        for number in (1, 2):
            await session.delete(await session.get_one(Crate, number))
    if env.journal is not None:
        await env.journal.recover()
    assert len(await env.locations()) == 1
    env.age()
    await env.collect(allow_no_references=True)
    assert await env.locations() == set()


@pytest.mark.parametrize("column", ["file", "scan"])
async def test_a_variant_that_comes_after_the_nomination(
    env: GcEnvironment, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    """As that of a row which another transaction restores: the re-check looks into values as well."""
    await env.add(Crate(id=1, file=file("a"), scan=await env.orphan()))
    variant = await env.orphan()
    env.age()

    async def come() -> None:
        await nest(env, 1, column, thumb=variant)

    with before(monkeypatch, DatabaseReferences, "find_references", come):
        report = await env.collect()
    assert (report.referenced_on_recheck, report.orphaned) == (1, 0)
    assert variant.location in await env.locations()


async def test_another_name_of_a_variant(env: GcEnvironment) -> None:
    """A place that was renamed: the generated id tells that it is the same object, and the backend's key does not count."""
    await env.add(Crate(id=1, file=file("a")))
    variant = await env.orphan()
    renamed = {**variant.to_dict(), "location": f"once/{variant.location}"}
    ref = await nest(env, 1)
    await set_raw(env, 1, {**ref.to_dict(), "variants": {"thumb": renamed}})
    env.age()
    report = await env.collect()
    assert (report.referenced_on_recheck, report.orphaned) == (1, 0)
    assert generated_id(renamed["location"]) == generated_id(variant.location)


@pytest.mark.parametrize(
    "change", [{"backend": "elsewhere"}, {"identity": "another-store"}], ids=["a key that nobody has", "another store"]
)
async def test_a_variant_of_an_unknown_place_stops_the_run(
    env: GcEnvironment, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    async def identities(**_: Any) -> tuple[str, ...]:
        return ("this-store",)

    monkeypatch.setattr(env.aged, "identities", identities)
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    variant = await env.orphan()
    ref = await nest(env, 2)
    await set_raw(env, 2, {**ref.to_dict(), "variants": {"thumb": {**variant.to_dict(), **change}}})
    env.age()
    for dry_run in (True, False):
        with pytest.raises(CollectionRefusedError, match=r"gc_crate\.file of the row 2.*(elsewhere|another-store)"):
            await env.collect(dry_run=dry_run)
    assert variant.location in await env.locations()


WHOLE = {"storage_key": "docs", "backend": "store", "location": "a/b/c/d", "size": 3, "checksum": ""}


@pytest.mark.parametrize("column", ["file", "scan"])
@pytest.mark.parametrize(
    "variants",
    [
        [],
        7,
        "text",
        {"a": 7},
        {"a": None},
        {"a": {}},
        {"a": {**WHOLE, "size": "3"}},
        {"a": {**WHOLE, "location": ""}},
        {"a": {**WHOLE, "variants": {}}},
        {"good": WHOLE, "bad": [WHOLE]},
        {"a": json.dumps(WHOLE)},
        json.dumps({"a": WHOLE}),
    ],
    ids=str,
)
async def test_variants_that_cannot_be_read_stop_the_run(env: GcEnvironment, column: str, variants: Any) -> None:
    """Those of a newer version may lead to any object."""
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b"), scan=await env.orphan()))
    orphan = await env.orphan()
    ref = await nest(env, 2, column)
    await set_raw(env, 2, {**ref.to_dict(), "variants": variants}, column)
    env.age()
    for dry_run in (True, False):
        with pytest.raises(CollectionRefusedError, match=rf"gc_crate\.{column} of the row 2 contains a value that is not"):
            await env.collect(dry_run=dry_run)
    assert orphan.location in await env.locations()


@pytest.mark.parametrize("variants", [None, {}, {"a": {**WHOLE, "variants": None}}], ids=str)
async def test_no_variants_are_no_reason_to_stop(env: GcEnvironment, variants: Any) -> None:
    await env.add(Crate(id=1, file=file("a")))
    orphan, ref = await env.orphan(), await nest(env, 1)
    await set_raw(env, 1, {**ref.to_dict(), "variants": variants})
    env.age()
    report = await env.collect()
    assert (report.referenced, report.deleted) == (1, 1)
    assert orphan.location not in await env.locations()


async def test_a_missing_variant_is_dangling(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    variant = await env.orphan()
    await nest(env, 1, thumb=variant)
    await env.aged.delete(variant.location)
    env.age()
    assert [found.location for found in (await env.collect()).dangling] == [variant.location]


async def test_what_the_extra_of_a_variant_names(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    sheet, mask = await env.orphan(), await env.orphan()
    variant = await env.manager.put_bytes(
        storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"x", extra={"of": [sheet.location]}
    )
    late = await env.manager.put_bytes(
        storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"x", extra={"of": {"mask": mask.to_dict()}}
    )
    await nest(env, 1, thumb=variant, late=late)
    env.age()
    report = await env.collect()
    assert (report.referenced, report.orphaned) == (5, 0)
    await nest(env, 1, thumb=variant)
    report = await env.collect()
    assert (report.referenced, report.deleted) == (3, 2)


@pytest.mark.parametrize("table", ["copied", "of_another_name"])
async def test_tables_that_no_model_has(env: GcEnvironment, table: str) -> None:
    """A copy of a table keeps the variants of its rows, whichever JSON it has."""
    name = f"gc_{table}_{env.database.name.replace('-', '_')}"
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    variant = await env.orphan()
    await nest(env, 2, thumb=variant)
    await env.sql(f"CREATE TABLE {name} AS SELECT id, file FROM gc_crate")  # noqa: S608
    try:
        await env.sql("DELETE FROM gc_crate WHERE id = 2")
        env.age()
        report = await env.collect()
        assert report.orphaned == 0
        assert variant.location in await env.locations()
    finally:
        await env.sql(f"DROP TABLE {name}")


async def test_references_that_the_caller_gives(plain_env: GcEnvironment) -> None:
    env = plain_env
    await env.add(Crate(id=1, file=file("a")))
    variants = [await env.orphan() for _ in range(2)]
    ref = await nest(env, 1, one=variants[0], two=variants[1])
    orphan = await env.orphan()
    env.age()
    async with env.sessions() as session:
        found = [one async for one in iter_model_storage_refs(session, Crate, "file")]
    assert found == list(iter_refs(ref)) == [ref, *variants]
    assert found[0].variants == {"one": variants[0], "two": variants[1]}

    async def given() -> list[StoredObjectRef]:
        return [ref]

    collector = env.collector(iter_references=given)
    report = await collector.collect(storage_key="docs", dry_run=False)
    assert (report.referenced, report.deleted) == (3, 1)
    assert orphan.location not in await env.locations()


async def test_a_given_variant_of_an_unknown_backend(plain_env: GcEnvironment) -> None:
    env = plain_env
    variant = StoredObjectRef("docs", "elsewhere", "a/b/c/d", 1, "")
    ref = (await env.orphan()).with_variants({"thumb": variant})
    env.age()
    with pytest.raises(CollectionRefusedError, match="elsewhere"):
        await env.collector(iter_references=lambda: [ref]).collect(storage_key="docs")


async def test_counted_by_store(env: GcEnvironment) -> None:
    """What `doctor` says is counted with the variants, each by its own backend."""
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    moved = StoredObjectRef("docs", "elsewhere", "a/b/c/d", 1, "")
    await nest(env, 1, thumb=await env.orphan(), card=moved)
    source = DatabaseReferences(env.binding, env.sessions, "store")
    await source.require_fit(allow_restored_database=False)
    counted = await source.count_by_store()
    assert {backend: number for (backend, _), number in counted.items()} == {"store": 3, "elsewhere": 1}


def test_a_mention_in_a_value_of_two_stores() -> None:
    """The original may be of another store, and a variant of this one."""
    ours, theirs, unknown = ({**WHOLE, "identity": name} for name in ("ours", "theirs", None))
    for variants, is_elsewhere in (({}, True), (None, True), ({"a": theirs}, True), ({"a": theirs, "b": ours}, False)):
        assert _is_elsewhere(json.dumps({**theirs, "variants": variants}), {"ours"}) is is_elsewhere
    doubtful: list[Any] = [{"a": unknown}, {"a": 7}, [ours], "text"]
    for other in doubtful:
        assert not _is_elsewhere(json.dumps({**theirs, "variants": other}), {"ours"})


async def test_a_value_on_two_backends(plain_env: GcEnvironment) -> None:
    """As in the middle of a migration: what is collected on one of them is what is there."""
    env = plain_env
    await env.add(Crate(id=1, file=file("a")))
    env.binding.unbind()
    aged = AgedBackend()
    policies = {"docs": StoragePolicy("docs", "other", key_prefix="docs")}
    async with StorageManager(backends={"store": env.store, "other": aged}, policies=policies) as manager:
        binding = bind_storage(Base, manager, session_factory=env.sessions)
        try:
            kept, orphan = [
                await manager.put_bytes(storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"x")
                for _ in range(2)
            ]
            assert (await nest(env, 1, thumb=kept)).backend != kept.backend
            aged.passed = timedelta(days=3)
            collector = StorageGarbageCollector(manager, binding=binding, max_deleted_share=1.0)
            report = await collector.collect(storage_key="docs", dry_run=False)
        finally:
            binding.unbind()
    assert (report.referenced, report.deleted) == (1, 1)
    assert [info.location async for info in aged.iter_objects()] == [kept.location]
    assert orphan.location != kept.location
