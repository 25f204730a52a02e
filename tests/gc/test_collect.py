"""What a collection deletes on every database, and what it must never touch."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import update

from granite_storage import CollectionRefusedError, Fate
from granite_storage.locations import make_location
from tests.gc.yard import Crate, Drum, Keg, Yard, file


async def test_orphans_go_and_the_rest_stays(yard: Yard) -> None:
    await yard.add(Crate(id=1, file=file("a")), Keg(id=2, file=file(), label=file("b")), Drum(id=3, seal=file("c")))
    orphans = [await yard.orphan() for _ in range(3)]
    yard.age()
    before = await yard.locations()
    report = await yard.collect()
    assert await yard.locations() == before - {ref.location for ref in orphans}
    assert (report.scanned, report.referenced, report.orphaned, report.deleted, report.kept) == (7, 4, 3, 3, 0)
    assert (report.orphaned_bytes, report.deleted_bytes, report.scanned_bytes) == (18, 18, 28)
    assert (report.failed, report.failures, report.dangling, report.complete) == (0, [], [], True)
    again = await yard.collect()
    assert (again.scanned, again.referenced, again.orphaned) == (4, 4, 0)


async def test_dry_by_default(yard: Yard) -> None:
    await yard.add(Crate(id=1, file=file("a")))
    orphan = await yard.orphan()
    yard.age()
    run = yard.collector(max_deleted_share=0.25).collection(storage_key="docs")
    seen = [(item.fate, item.location, item.size) async for item in run]
    assert seen == [(Fate.ORPHANED, orphan.location, 6)]
    assert (run.report.dry_run, run.report.orphaned, run.report.deleted) == (True, 1, 0)
    assert run.report.refusal is not None
    assert len(await yard.locations()) == 2


@pytest.mark.case("GCX-13")
async def test_rows_that_the_application_hides_count(yard: Yard) -> None:
    await yard.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    async with yard.sessions.begin() as session:
        await session.execute(update(Crate).values(deleted=True))
    yard.age()
    report = await yard.collect()
    assert (report.referenced, report.orphaned) == (2, 0)


async def test_a_plain_column_counts_whatever_its_storage_key(yard: Yard) -> None:
    """A reference counts by backend and location."""
    ref = await yard.orphan()
    await yard.add(Crate(id=1, file=file("a")), Crate(id=2, scan=ref))
    whole = {**ref.to_dict(), "storage_key": "gone"}
    await yard.sql("UPDATE yard_crate SET scan = :raw WHERE id = 2".replace(":raw", _json(yard)), raw=json.dumps(whole))
    yard.age()
    assert (await yard.collect()).orphaned == 0


async def test_a_reference_to_the_same_location_elsewhere_does_not_count(yard: Yard) -> None:
    ref = await yard.orphan()
    await yard.add(Crate(id=1, file=file("a")))
    whole = {**ref.to_dict(), "backend": "elsewhere"}
    await yard.sql("UPDATE yard_crate SET scan = :raw WHERE id = 1".replace(":raw", _json(yard)), raw=json.dumps(whole))
    yard.age()
    assert (await yard.collect()).deleted == 1


async def test_derived_objects_are_named_in_extra(yard: Yard) -> None:
    thumbnail, plain, orphan = [await yard.orphan() for _ in range(3)]
    await yard.add(Crate(id=1, file=file("a")))
    ref = await yard.manager.put_bytes(
        storage_key="docs",
        model_name="m",
        entity_id="1",
        field_name="f",
        content=b"x",
        extra={"sizes": [{"ref": thumbnail.to_dict()}], "preview": plain.location},
    )
    await yard.add(Crate(id=2, scan=ref))
    yard.age()
    report = await yard.collect()
    assert (report.deleted, report.referenced) == (1, 4)
    assert orphan.location not in await yard.locations()


@pytest.mark.case("GCX-06")
async def test_foreign_names_are_counted_and_never_touched(yard: Yard) -> None:
    await yard.add(Crate(id=1, file=file("a")))
    deeper = make_location(
        key_prefix="docs/other/program", model_name="m", entity_id="1", field_name="f", original_filename="a.txt"
    )
    foreign = ["docs/readme.txt", "docs/m/1/f/backup.tar", "docs/m/1/f/0123-a.txt", "docs/zzz", deeper]
    for location in foreign:
        await yard.aged.put_bytes(location, b"theirs")
    yard.age()
    report = await yard.collect()
    assert (report.foreign, report.foreign_bytes, report.orphaned) == (5, 30, 0)
    assert set(foreign) <= await yard.locations()


async def test_segments_and_the_places_of_other_policies(yard: Yard) -> None:
    """`docs` sees neither `docs2` nor what is nested in it, and a policy without prefix sees nothing of those that have one."""
    await yard.add(Crate(id=1, file=file("a")))
    orphans = {key: (await yard.orphan(key)).location for key in ("docs", "docs2", "nested", "bare")}
    yard.age()
    for key in orphans:
        report = await yard.collect(key, accept_empty=key != "docs")
        assert (report.orphaned, report.deleted, report.foreign) == (1, 1, 0), key
        left = {other for other, location in orphans.items() if location in await yard.locations()}
        assert key not in left
        assert left == set(list(orphans)[list(orphans).index(key) + 1 :]), key


@pytest.mark.parametrize(
    "raw", ["[]", '{"storage_key": "docs"}', "17", '"text"', "true", '{"backend": "store", "location": 1}', "{}"]
)
async def test_what_is_no_reference_stops_the_run(yard: Yard, raw: str) -> None:
    await yard.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    await yard.orphan()
    await yard.sql("UPDATE yard_crate SET file = :raw WHERE id = 2".replace(":raw", _json(yard)), raw=raw)
    yard.age()
    for dry_run in (True, False):
        with pytest.raises(CollectionRefusedError, match=r"yard_crate\.file of the row 2"):
            await yard.collect(dry_run=dry_run)
    assert len(await yard.locations()) == 3


async def test_what_is_no_json_stops_the_run(plain_yard: Yard) -> None:
    await plain_yard.add(Crate(id=1, file=file("a")))
    await plain_yard.orphan()
    await plain_yard.sql("UPDATE yard_crate SET file = '{broken'")
    plain_yard.age()
    with pytest.raises(CollectionRefusedError, match=r"yard_crate\.file of the row 1"):
        await plain_yard.collect()
    assert len(await plain_yard.locations()) == 2


async def test_json_null_is_no_reference_and_no_reason_to_stop(yard: Yard) -> None:
    await yard.add(Crate(id=1, file=file("a")), Crate(id=2))
    await yard.sql("UPDATE yard_crate SET scan = :raw WHERE id = 2".replace(":raw", _json(yard)), raw="null")
    yard.age()
    assert (await yard.collect()).referenced == 1


@pytest.mark.case("LOC-19")
@pytest.mark.parametrize("location", ["../../etc/shadow", "/etc/shadow", "file:///x", "\\\\host\\share"])
async def test_a_reference_that_leads_out_is_passed_over_and_reported(yard: Yard, location: str) -> None:
    await yard.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    orphan = await yard.orphan()
    ref = json.dumps({**orphan.to_dict(), "location": location})
    await yard.sql("UPDATE yard_crate SET scan = :raw WHERE id = 2".replace(":raw", _json(yard)), raw=ref)
    yard.age()
    report = await yard.collect()
    assert report.deleted == 1
    assert [found.location for found in report.dangling] == [location]


async def test_dangling_references_are_found(yard: Yard) -> None:
    await yard.add(Crate(id=1, file=file("a")), Crate(id=2, file=file("b")))
    gone = await yard.location_of(1)
    await yard.aged.delete(gone)
    yard.age()
    report = await yard.collect()
    assert [(found.backend, found.location, found.message) for found in report.dangling] == [
        ("store", gone, "no object is there")
    ]


async def test_names_in_the_order_of_their_bytes(yard: Yard) -> None:
    """What a locale sorts otherwise, or a database takes for equal, is told apart."""
    names = ["a", "B", "b", "A", "ä", "Z", "_", "-", "é", "\U0001f600", "\uffff", "ß", "SS", "a-b", "a_b", "aB", "ab"]
    refs = [
        await yard.manager.put_bytes(
            storage_key="docs", model_name=name, entity_id="1", field_name="f", content=b"x", original_filename="x"
        )
        for name in names
    ]
    await yard.add(*(Crate(id=number, scan=ref) for number, ref in enumerate(refs[::2], 1)))
    yard.age()
    report = await yard.collect()
    assert await yard.locations() == {ref.location for ref in refs[::2]}
    assert (report.referenced, report.deleted) == (9, 8)


@pytest.mark.case("GCX-08")
async def test_age_is_by_the_clock_of_the_backend(plain_yard: Yard) -> None:
    await plain_yard.add(Crate(id=1, file=file("a")))
    await plain_yard.orphan()
    plain_yard.age(23)
    report = await plain_yard.collect()
    assert (report.young, report.young_bytes, report.orphaned) == (1, 6, 0)
    plain_yard.age(2)
    assert (await plain_yard.collect()).deleted == 1


@pytest.mark.case("GCX-08")
async def test_an_object_from_the_future_is_young(plain_yard: Yard) -> None:
    await plain_yard.add(Crate(id=1, file=file("a")))
    await plain_yard.orphan()
    plain_yard.age(-48)
    collector = plain_yard.collector(grace_period=timedelta(0))
    report = await collector.collect(storage_key="docs", dry_run=False)
    assert (report.young, report.deleted) == (1, 0)


def _json(yard: Yard) -> str:
    return "CAST(:raw AS JSONB)" if yard.database.is_postgres else ":raw"
