"""A row that cannot be read, or that no database can be asked for, is reported; all others move."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from granite_storage import StorageGarbageCollector
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.migration import MigrationStatus, migrate
from granite_storage.verification import Problem, verify
from tests.migration.environment import MigrationEnvironment, Shelf, file

SURROGATE = {"location": "docs/\ud800/1/file"}, {"backend": "\ud800"}, {"original_filename": "\ud800"}, {"storage_key": "\ud800"}
TEXTS = ["{broken", '{"location": NaN}', "{'location': 1}", "", "17", '"text"', "[]"]


@pytest.mark.case("RE-14")
@pytest.mark.parametrize("changes", SURROGATE, ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("env", ["plain"], indirect=True)
async def test_a_lone_surrogate(env: MigrationEnvironment, changes: dict[str, str]) -> None:
    """PostgreSQL and MariaDB refuse it as it is written."""
    await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 4)))
    async with env.sessions() as session:
        second = (await session.get_one(Shelf, 2)).file
    assert second is not None
    whole = second.ref
    await env.set_raw(2, json.dumps({**whole.to_dict(), **changes}))
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert report.complete
    if "original_filename" in changes:
        assert (report.moved, report.failed) == (3, 0)
    elif "storage_key" in changes:
        assert (report.moved, report.failed) == (2, 0)  # it is another policy's
    else:
        assert (report.moved, report.failed) == (2, 1)
        assert [(item.status, item.primary_key) for item in report.failures] == [(MigrationStatus.FAILED, (2,))]
    found = await verify(env.binding)
    assert found.rows == 3
    assert {finding.primary_key for finding in found.findings} <= {(2,)}


@pytest.mark.case("RE-14")
@pytest.mark.parametrize("raw", TEXTS)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("env", ["plain"], indirect=True)
async def test_what_the_database_refuses_to_look_into(env: MigrationEnvironment, raw: str) -> None:
    """SQLite takes any text, and then fails for every row where it looks into JSON that is none."""
    await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 5)))
    await env.sql("UPDATE migration_shelf SET other = file WHERE id = 1")  # so that others are looked for
    await env.set_raw(2, raw)
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert (report.moved, report.failed, report.complete) == (4, 1, True)
    assert [item.primary_key for item in report.failures] == [(2,)]
    found = await verify(env.binding)
    assert [(finding.problem, finding.primary_key) for finding in found.findings] == [(Problem.UNDECODABLE, (2,))]


@pytest.mark.case("RE-14")
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("env", ["plain"], indirect=True)
async def test_a_text_that_is_none(env: MigrationEnvironment) -> None:
    await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 4)))
    await env.sql("UPDATE migration_shelf SET file = CAST(x'7b80' AS TEXT) WHERE id = 2")
    report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
    assert (report.moved, report.failed) == (2, 1)
    assert "UTF-8" in report.failures[0].message


@pytest.mark.case("RE-14")
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("env", ["plain"], indirect=True)
async def test_the_collector_and_a_lone_surrogate(env: MigrationEnvironment) -> None:
    """It leads to no object that could be deleted, and is reported as what it is."""
    await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 4)))
    whole = (await env.refs())[0]
    odd = "docs/\ud800/1/file"
    await env.sql("UPDATE migration_shelf SET scan = :raw WHERE id = 2", raw=json.dumps({**whole.to_dict(), "location": odd}))
    orphan = await env.manager.put_bytes(storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"...")
    collector = StorageGarbageCollector(env.manager, binding=env.binding, grace_period=timedelta(0), max_deleted_share=1.0)
    report = await collector.collect(storage_key="docs", dry_run=False)
    assert (report.referenced, report.deleted) == (3, 1)
    assert not await env.manager.exists(orphan)
    assert [found.location for found in report.dangling] == [odd]
    await env.sql("UPDATE migration_shelf SET scan = :raw WHERE id = 2", raw=json.dumps({**whole.to_dict(), "backend": "\ud800"}))
    with pytest.raises(CollectionRefusedError, match=r"migration_shelf\.scan of the row 2 names the backend '\\ud800'"):
        await collector.collect(storage_key="docs", dry_run=False)
    await env.sql("UPDATE migration_shelf SET scan = CAST(x'7b80' AS TEXT) WHERE id = 2")
    with pytest.raises(CollectionRefusedError, match=r"migration_shelf\.scan of the row 2"):
        await collector.collect(storage_key="docs", dry_run=False)
