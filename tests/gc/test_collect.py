"""What a collection deletes on every database, and what it must never touch."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import update

from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc import OrphanStatus
from granite_storage.locations import make_location
from tests.gc.environment import Crate, Drum, GcEnvironment, Keg, file


async def test_orphans_go_and_the_rest_stays(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")), Keg(id=2, file=file(), label=file("b")), Drum(id=3, seal=file("c")))
    orphans = [await env.orphan() for _ in range(3)]
    env.age()
    before = await env.locations()
    report = await env.collect()
    assert await env.locations() == before - {ref.location for ref in orphans}
    assert (report.scanned, report.referenced, report.orphaned, report.deleted, report.referenced_on_recheck) == (7, 4, 3, 3, 0)
    assert (report.orphaned_bytes, report.deleted_bytes, report.scanned_bytes) == (18, 18, 28)
    assert (report.failed, report.failures, report.dangling, report.complete) == (0, [], [], True)
    again = await env.collect()
    assert (again.scanned, again.referenced, again.orphaned) == (4, 4, 0)


async def test_dry_by_default(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    orphan = await env.orphan()
    env.age()
    run = env.collector(max_deleted_share=0.25).collection(storage_key="docs")
    seen = [(item.status, item.location, item.size) async for item in run]
    assert seen == [(OrphanStatus.ORPHANED, orphan.location, 6)]
    assert (run.report.dry_run, run.report.orphaned, run.report.deleted) == (True, 1, 0)
    assert run.report.refusal is not None
    assert len(await env.locations()) == 2


@pytest.mark.case("GCX-13")
async def test_rows_that_the_application_hides_count(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    async with env.sessions.begin() as session:
        await session.execute(update(Crate).values(deleted=True))
    env.age()
    report = await env.collect()
    assert (report.referenced, report.orphaned) == (2, 0)


async def test_a_plain_column_counts_whatever_its_storage_key(env: GcEnvironment) -> None:
    """A reference counts by backend and location."""
    ref = await env.orphan()
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, scan=ref))
    whole = {**ref.to_dict(), "storage_key": "gone"}
    await env.sql("UPDATE gc_crate SET scan = :raw WHERE id = 2".replace(":raw", _json(env)), raw=json.dumps(whole))
    env.age()
    assert (await env.collect()).orphaned == 0


@pytest.mark.case("RA-02")
async def test_a_reference_that_names_an_unknown_backend_stops_the_run(env: GcEnvironment) -> None:
    """Its key may have been renamed, and then its object is one of these."""
    ref = await env.orphan()
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    whole = {**ref.to_dict(), "backend": "elsewhere"}
    await env.sql("UPDATE gc_crate SET scan = :raw WHERE id = 1".replace(":raw", _json(env)), raw=json.dumps(whole))
    env.age()
    for dry_run in (True, False):
        with pytest.raises(CollectionRefusedError, match=r"gc_crate\.scan of the row 1 names the backend 'elsewhere'"):
            await env.collect(dry_run=dry_run)
    assert ref.location in await env.locations()


async def test_derived_objects_are_named_in_extra(env: GcEnvironment) -> None:
    thumbnail, plain, orphan = [await env.orphan() for _ in range(3)]
    await env.add(Crate(id=1, file=file("a")))
    ref = await env.manager.put_bytes(
        storage_key="docs",
        model_name="m",
        entity_id="1",
        field_name="f",
        content=b"x",
        extra={"sizes": [{"ref": thumbnail.to_dict()}], "preview": plain.location},
    )
    await env.add(Crate(id=2, scan=ref))
    env.age()
    report = await env.collect()
    assert (report.deleted, report.referenced) == (1, 4)
    assert orphan.location not in await env.locations()


@pytest.mark.case("GCX-06")
async def test_unmanaged_names_are_counted_and_never_touched(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")))
    deeper = make_location(
        key_prefix="docs/other/program", model_name="m", entity_id="1", field_name="f", original_filename="a.txt"
    )
    foreign = ["docs/readme.txt", "docs/m/1/f/backup.tar", "docs/m/1/f/0123-a.txt", "docs/zzz", deeper]
    for location in foreign:
        await env.aged.put_bytes(location, b"theirs")
    env.age()
    report = await env.collect()
    assert (report.unmanaged, report.unmanaged_bytes, report.orphaned) == (5, 30, 0)
    assert set(foreign) <= await env.locations()


async def test_segments_and_the_places_of_other_policies(env: GcEnvironment) -> None:
    """`docs` sees neither `docs2` nor what is nested in it, and a policy without prefix sees nothing of those that have one."""
    await env.add(Crate(id=1, file=file("a")))
    orphans = {key: (await env.orphan(key)).location for key in ("docs", "docs2", "nested", "bare")}
    env.age()
    for key in orphans:
        report = await env.collect(key, allow_no_references=key != "docs")
        assert (report.orphaned, report.deleted, report.unmanaged) == (1, 1, 0), key
        left = {other for other, location in orphans.items() if location in await env.locations()}
        assert key not in left
        assert left == set(list(orphans)[list(orphans).index(key) + 1 :]), key


@pytest.mark.parametrize(
    "raw", ["[]", '{"storage_key": "docs"}', "17", '"text"', "true", '{"backend": "store", "location": 1}', "{}"]
)
async def test_what_is_no_reference_stops_the_run(env: GcEnvironment, raw: str) -> None:
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    await env.orphan()
    await env.sql("UPDATE gc_crate SET file = :raw WHERE id = 2".replace(":raw", _json(env)), raw=raw)
    env.age()
    for dry_run in (True, False):
        with pytest.raises(CollectionRefusedError, match=r"gc_crate\.file of the row 2"):
            await env.collect(dry_run=dry_run)
    assert len(await env.locations()) == 3


async def test_what_is_no_json_stops_the_run(plain_env: GcEnvironment) -> None:
    await plain_env.add(Crate(id=1, file=file("a")))
    await plain_env.orphan()
    await plain_env.sql("UPDATE gc_crate SET file = '{broken'")
    plain_env.age()
    with pytest.raises(CollectionRefusedError, match=r"gc_crate\.file of the row 1"):
        await plain_env.collect()
    assert len(await plain_env.locations()) == 2


async def test_json_null_is_no_reference_and_no_reason_to_stop(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")), Crate(id=2))
    await env.sql("UPDATE gc_crate SET scan = :raw WHERE id = 2".replace(":raw", _json(env)), raw="null")
    env.age()
    assert (await env.collect()).referenced == 1


@pytest.mark.case("LOC-19")
@pytest.mark.parametrize("location", ["../../etc/shadow", "/etc/shadow", "file:///x", "\\\\host\\share"])
async def test_a_reference_that_leads_out_is_passed_over_and_reported(env: GcEnvironment, location: str) -> None:
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    orphan = await env.orphan()
    ref = json.dumps({**orphan.to_dict(), "location": location})
    await env.sql("UPDATE gc_crate SET scan = :raw WHERE id = 2".replace(":raw", _json(env)), raw=ref)
    env.age()
    report = await env.collect()
    assert report.deleted == 1
    assert [found.location for found in report.dangling] == [location]


async def test_dangling_references_are_found(env: GcEnvironment) -> None:
    await env.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    gone = await env.location_of(1)
    await env.aged.delete(gone)
    env.age()
    report = await env.collect()
    assert [(found.backend, found.location, found.message) for found in report.dangling] == [
        ("store", gone, "no object is there")
    ]


async def test_names_in_the_order_of_their_bytes(env: GcEnvironment) -> None:
    """Names that a locale sorts otherwise, or a database takes for equal, stay different."""
    names = ["a", "B", "b", "A", "ä", "Z", "_", "-", "é", "\U0001f600", "\uffff", "ß", "SS", "a-b", "a_b", "aB", "ab"]
    refs = [
        await env.manager.put_bytes(
            storage_key="docs", model_name=name, entity_id="1", field_name="f", content=b"x", original_filename="x"
        )
        for name in names
    ]
    await env.add(*(Crate(id=number, scan=ref) for number, ref in enumerate(refs[::2], 1)))
    env.age()
    report = await env.collect()
    assert await env.locations() == {ref.location for ref in refs[::2]}
    assert (report.referenced, report.deleted) == (9, 8)


@pytest.mark.case("GCX-08")
async def test_age_is_by_the_clock_of_the_backend(plain_env: GcEnvironment) -> None:
    await plain_env.add(Crate(id=1, file=file("a")))
    await plain_env.orphan()
    plain_env.age(23)
    report = await plain_env.collect()
    assert (report.within_grace_period, report.within_grace_period_bytes, report.orphaned) == (1, 6, 0)
    plain_env.age(2)
    assert (await plain_env.collect()).deleted == 1


@pytest.mark.case("GCX-08")
async def test_an_object_from_the_future_is_within_the_grace_period(plain_env: GcEnvironment) -> None:
    await plain_env.add(Crate(id=1, file=file("a")))
    await plain_env.orphan()
    plain_env.age(-48)
    collector = plain_env.collector(grace_period=timedelta(0))
    report = await collector.collect(storage_key="docs", dry_run=False)
    assert (report.within_grace_period, report.deleted) == (1, 0)


def _json(env: GcEnvironment) -> str:
    return "CAST(:raw AS JSONB)" if env.database.is_postgres else ":raw"
