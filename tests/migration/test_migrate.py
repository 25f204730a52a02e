"""What a migration moves, what it leaves, and what is left when it fails half-way."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from datetime import timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from granite_storage import BackendUnavailableError, ConfigurationError, StoredObjectRef, migration
from granite_storage.exceptions import AccessDeniedError, StorageFullError, UnknownPolicyError
from granite_storage.migration import MigrationStatus, migrate
from granite_storage.orm.references import Scan
from tests.migration.environment import MigrationEnvironment, Parcel, Shelf, file


async def put_plain(env: MigrationEnvironment) -> StoredObjectRef:
    return await env.manager.put_bytes(
        storage_key="docs", model_name="m", entity_id="1", field_name="f", content=b"plain", original_filename="p.txt"
    )


class TestMoving:
    async def test_all_objects_of_a_storage_key(self, env: MigrationEnvironment) -> None:
        await env.add(
            *(Shelf(id=number, file=file(f"f{number}"), other=file(f"o{number}")) for number in range(1, 30)),
            *(Parcel(number=str(number), file=file(f"p{number}")) for number in range(5)),
        )
        binding = env.write_to("new")
        report = await migrate(binding, storage_key="docs", to_backend="new")
        assert (report.moved, report.failed, report.complete) == (58, 0, True)
        assert report.bytes_moved == sum(len(f"f{number}") + len(f"o{number}") for number in range(1, 30))
        await env.check(old=5)
        report = await migrate(binding, storage_key="parcels", to_backend="new")
        assert report.moved == 5
        await env.check()

    async def test_a_second_run_finds_nothing_to_do(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")))
        binding = env.write_to("new")
        await migrate(binding, storage_key="docs", to_backend="new")
        before = await env.refs()
        report = await migrate(binding, storage_key="docs", to_backend="new")
        assert (report.moved, report.passes, report.complete) == (0, 1, True)
        assert await env.refs() == before

    async def test_there_and_back(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")), Shelf(id=2, file=file("b")))
        await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        await env.check()
        await migrate(env.write_to("old"), storage_key="docs", to_backend="old")
        await env.check(old=2)

    async def test_what_the_ref_says_of_the_file_stays(self, env: MigrationEnvironment) -> None:
        given = file("a")
        given._state.extra = {"own": 1}
        await env.add(Shelf(id=1, file=given))
        raw = json.dumps({**(await env.refs())[0].to_dict(), "from_the_future": [1]})
        await env.set_raw(1, raw)
        before = (await env.refs())[0]
        await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        after = (await env.refs())[0]
        assert after == dataclasses.replace(before, backend="new", location=after.location)
        assert after.to_dict()["from_the_future"] == [1]
        assert after.location.rpartition("/")[0] == before.location.rpartition("/")[0]

    async def test_row_version_stays(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")))
        await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        async with env.sessions() as session:
            assert (await session.get_one(Shelf, 1)).version == 1

    async def test_larger_than_the_policy_allows_by_now(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("abcdef")))
        report = await migrate(env.write_to("new", max_size=3), storage_key="docs", to_backend="new")
        assert report.moved == 1
        await env.check()

    @pytest.mark.case("REF-01")
    async def test_a_ref_without_a_checksum(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")))
        whole = (await env.refs())[0].to_dict()
        raw = json.dumps({key: whole[key] for key in ("storage_key", "backend", "location", "size")})
        await env.set_raw(1, raw)
        await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (await env.refs())[0].checksum == whole["checksum"]
        await env.check()

    async def test_retention_keeps_the_old_object_for_readers(self, env: MigrationEnvironment) -> None:
        if env.journal is None:
            pytest.skip("retention needs a journal")
        await env.add(Shelf(id=1, file=file("a")))
        before = (await env.refs())[0]
        await migrate(env.write_to("new", retention=timedelta(days=1)), storage_key="docs", to_backend="new")
        await env.journal.recover()
        assert await env.manager.get(before) == b"a"
        await env.check()

    async def test_two_columns_that_share_an_object(self, env: MigrationEnvironment) -> None:
        """Only SQL past the library can do that; the object must outlive the first of them."""
        await env.add(Shelf(id=1, file=file("a")), Shelf(id=2), Shelf(id=3))
        await env.sql("UPDATE migration_shelf SET other = file WHERE id = 1")
        for number in (2, 3):
            await env.set_raw(number, json.dumps((await env.refs())[0].to_dict()))
        shared = (await env.refs())[0]
        assert len(await env.refs()) == 4
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (report.moved, report.failed) == (4, 0)
        assert len({ref.location for ref in await env.refs()}) == 4
        assert not await env.manager.exists(shared) or env.journal is not None
        await env.check()

    async def test_a_plain_column_is_left_alone_and_keeps_its_object(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, scan=await put_plain(env)))
        await env.add(Shelf(id=2, file=file("a")))
        await env.sql("UPDATE migration_shelf SET scan = file WHERE id = 2")
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (report.moved, report.manual, report.failed) == (1, 2, 0)
        await env.check(old=2)


class TestRefusals:
    async def test_a_policy_that_writes_elsewhere(self, env: MigrationEnvironment) -> None:
        with pytest.raises(ConfigurationError, match="writes to the backend 'old'"):
            migrate(env.binding, storage_key="docs", to_backend="new")

    async def test_an_unknown_policy(self, env: MigrationEnvironment) -> None:
        with pytest.raises(UnknownPolicyError):
            migrate(env.binding, storage_key="nothing", to_backend="new")

    async def test_a_binding_that_is_not_in_force(self, env: MigrationEnvironment) -> None:
        earlier = env.write_to("new")
        env.write_to("new")
        with pytest.raises(ConfigurationError, match="not active"):
            migrate(earlier, storage_key="docs", to_backend="new")

    async def test_no_sessions(self, env: MigrationEnvironment) -> None:
        binding = env.write_to("new")
        binding.session_factory = None
        with pytest.raises(ConfigurationError, match="sessions"):
            migrate(binding, storage_key="docs", to_backend="new")

    @pytest.mark.parametrize("arguments", [{"concurrency": 0}, {"bytes_per_second": 0}, {"concurrency": True}])
    async def test_impossible_numbers(self, env: MigrationEnvironment, arguments: dict[str, int]) -> None:
        with pytest.raises(ConfigurationError):
            migrate(env.write_to("new"), storage_key="docs", to_backend="new", **arguments)

    @pytest.mark.parametrize("key", ["", "[]", '["migration_shelf"]', '["nothing", 1]', "1", '["migration_parcel", "x", "1"]'])
    async def test_a_key_of_another_base(self, env: MigrationEnvironment, key: str) -> None:
        with pytest.raises(ConfigurationError, match="not the key"):
            await migrate(env.write_to("new"), storage_key="docs", to_backend="new", after=key)

    async def test_a_run_runs_once(self, env: MigrationEnvironment) -> None:
        run = migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        await run
        with pytest.raises(ConfigurationError, match="once"):
            await run


class TestFailures:
    async def test_wrong_bytes_are_not_moved(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")), Shelf(id=2, file=file("b")))
        first = next(ref for ref in await env.refs() if "/1/" in ref.location)
        await env.old.delete(first.location)
        await env.old.put_bytes(first.location, b"x")
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (report.moved, report.failed) == (1, 1)
        assert "checksum" in report.failures[0].message
        await env.recover()
        assert await env.objects("old") == {first.location}
        assert len(await env.objects("new")) == 1

    async def test_a_missing_object_is_told(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")))
        ref = (await env.refs())[0]
        await env.old.delete(ref.location)
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert [(item.status, item.table, item.primary_key) for item in report.failures] == [
            (MigrationStatus.FAILED, "migration_shelf", (1,))
        ]
        assert await env.refs() == [ref]

    async def test_what_cannot_be_decoded_is_told(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1), Shelf(id=2, file=file("a")))
        await env.sql("""UPDATE migration_shelf SET file = '{"no": "ref"}' WHERE id = 1""")
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (report.moved, report.failed) == (1, 1)

    async def test_permission_denied_is_told(self, env: MigrationEnvironment) -> None:
        await env.add(Shelf(id=1, file=file("a")))
        env.old.fail("open", error=AccessDeniedError("denied"))
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (report.moved, report.failed) == (0, 1)
        await env.check(old=1)

    async def test_a_full_backend_ends_the_run(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 20)))
        env.new.fail("put_stream", nth=5, times=100, error=StorageFullError("full"))
        with pytest.raises(StorageFullError):
            await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        await env.recover()
        left = sum(ref.backend == "old" for ref in await env.refs())
        assert left >= 10
        await env.check(old=left)

    async def test_a_backend_out_of_reach_is_tried_again_and_then_ends_the_run(
        self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("granite_storage._jobs._PAUSES", (0.01, 0.01))
        await env.add(Shelf(id=1, file=file("a")))
        env.new.fail("put_stream", times=2, error=BackendUnavailableError("down"))
        assert (await migrate(env.write_to("new"), storage_key="docs", to_backend="new")).moved == 1
        env.old.fail("put_stream", times=3, error=BackendUnavailableError("down"))
        with pytest.raises(BackendUnavailableError):
            await migrate(env.write_to("old"), storage_key="docs", to_backend="old")
        await env.check()

    async def test_a_writer_that_is_faster_wins(self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        await env.add(Shelf(id=1, file=file("a")), Shelf(id=2, file=file("b")), Shelf(id=3, file=file("c"), title="c"))
        binding = env.write_to("new")
        stored = migration.store
        done: set[str] = set()

        async def store_and_wait(uploads: list[migration.Upload]) -> None:
            await stored(uploads)
            entity = uploads[0].attachment.location.split("/")[1]
            if entity in done:
                return
            done.add(entity)
            async with env.sessions.begin() as session:
                shelf = await session.get_one(Shelf, int(entity))
                if entity == "1":
                    shelf.file = file("faster")
                elif entity == "2":
                    await session.delete(shelf)
                else:
                    shelf.file, shelf.other = None, shelf.file  # a move of the very object that was copied

        monkeypatch.setattr(migration, "store", store_and_wait)
        report = await migrate(binding, storage_key="docs", to_backend="new", concurrency=1)
        assert (report.failed, report.changed, report.moved) == (0, 3, 1)
        await env.check()
        async with env.sessions() as session:
            shelves = (await session.scalars(select(Shelf).order_by(Shelf.id))).all()
            assert [await (shelf.file or shelf.other).read() for shelf in shelves] == [b"faster", b"c"]

    async def test_a_swap_that_the_database_refuses_is_tried_again(
        self, env: MigrationEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await env.add(Shelf(id=1, file=file("a")))
        real, calls = migration._compare_and_set, []

        def refusing(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) < 3:
                raise OperationalError("UPDATE", {}, Exception("deadlock detected"))
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(migration, "_compare_and_set", refusing)
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new")
        assert (report.moved, report.failed) == (1, 0)
        await env.check()

    async def test_stopping_and_going_on(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 60)))
        binding = env.write_to("new")
        run = migrate(binding, storage_key="docs", to_backend="new", concurrency=2)
        async for _ in run:
            if run.report.moved == 9:
                run.stop()
        assert 0 < run.report.moved < 40
        assert not run.report.complete
        left = sum(ref.backend == "old" for ref in await env.refs())
        await env.check(old=left)
        report = await migrate(binding, storage_key="docs", to_backend="new", after=run.report.key)
        assert report.moved == left
        await env.check()

    async def test_what_lies_before_the_key_is_rechecked(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 4)))
        last = [row.key async for row in Scan(env.binding).rows()][-1]
        report = await migrate(env.write_to("new"), storage_key="docs", to_backend="new", after=last)
        assert report.complete
        assert {ref.backend for ref in await env.refs()} == {"new"}
        await env.check()

    @pytest.mark.parametrize("seconds", [0.001, 0.01, 0.02, 0.04, 0.08])
    async def test_cancelled_and_run_again(self, env: MigrationEnvironment, seconds: float) -> None:
        await env.add(*(Shelf(id=number, file=file(str(number))) for number in range(1, 80)))
        binding = env.write_to("new")
        task = asyncio.ensure_future(migrate(binding, storage_key="docs", to_backend="new")._run_to_end())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for ref in await env.refs():
            await env.manager.get(ref)
        report = await migrate(binding, storage_key="docs", to_backend="new")
        assert report.failed == 0
        refs = await env.refs()
        assert {ref.backend for ref in refs} == {"new"}
        await env.check()

    async def test_a_budget_slows_it_down(self, env: MigrationEnvironment) -> None:
        await env.add(*(Shelf(id=number, file=file("x" * 1000)) for number in range(1, 6)))
        begun = asyncio.get_running_loop().time()
        await migrate(env.write_to("new"), storage_key="docs", to_backend="new", bytes_per_second=10_000)
        assert asyncio.get_running_loop().time() - begun >= 0.4
