"""The variants that are made in the flush once more, with a journal."""

from __future__ import annotations

import pytest

from granite_storage import Attachment, StoredObjectRef
from granite_storage.orm.journal.tables import clock
from tests.orm import test_derived_flush
from tests.orm.databases import Database
from tests.orm.derivations import Upper, column_type, declared, expected, jobs, journal_of, shown
from tests.orm.environment import Doc, OrmEnvironment, file
from tests.orm.journal.scans import scan_env

globals().update({name: value for name, value in vars(test_derived_flush).items() if name.lower().startswith("test")})


async def test_intents_come_first(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are committed together, before the first byte; a variant's names its original."""
    begun, begin = [], journal_of(env).begin_uploads

    async def record(uploads):  # type: ignore[no-untyped-def]
        assert await env.objects() == set()
        begun.append([(upload.source, upload.recipe) for upload in uploads])
        return await begin(uploads)

    monkeypatch.setattr(journal_of(env), "begin_uploads", record)
    with declared({"thumb": Upper(when="flush")}):
        await env.add(Doc(id=1, file=file("x"), other=file("y")))
    [[first, variant, other]] = begun
    assert (first, other) == ((None, None), (None, None))
    assert variant[0] == (await env.references())["doc", 1, "file"].location
    assert variant[1] == "upper::1:thumb"


async def test_another_type_leaves_nothing_to_do(env: OrmEnvironment) -> None:
    """Neither a job nor an intent remains of the variants that its file does not have, whether it is committed or rolled back."""
    now, later = Upper("a", when="flush", accept=("image/*",)), Upper("b", accept=("image/*",))
    with declared({"thumb": now, "card": later}):
        async with env.sessions() as session:
            session.add(Doc(id=2, file=Attachment(b"y", content_type="text/plain")))
            await session.flush()
            await session.rollback()
        await env.add(Doc(id=1, file=Attachment(b"x", content_type="text/plain")))
        assert await jobs(env) == []
        if env.database.is_sqlite:  # where the intents of uploads outlive the COMMIT, until their leases are over
            await env.recover()
        assert await env.journal_rows("intent") == []
        await journal_of(env).recover()
        assert await shown(env) == {}
    assert not now.made
    assert not later.made


async def test_a_recipe_that_is_not_for_its_type_any_more(env: OrmEnvironment) -> None:
    """Its jobs are done."""
    with declared({"card": Upper()}):
        await env.add(Doc(id=1, file=Attachment(b"x", content_type="text/plain")))
        assert len(await jobs(env)) == 1
    changed = Upper(accept=("image/*",))
    with declared({"card": changed}):
        report = await journal_of(env).recover()
        assert (report.derived, report.failed) == (0, [])
        assert await jobs(env) == []
        assert not changed.made


async def test_an_original_that_is_held(database: Database) -> None:
    """Nothing is derived from it until it is found to be clean."""
    recipes = {"thumb": Upper("a", when="flush"), "card": Upper("b")}
    async with scan_env(database) as (env, scanner):
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")))
            assert await shown(env) == {}
            report = await journal_of(env).recover()
            assert (report.derived, report.held, report.underived, report.failed) == (0, 1, 2, [])
            assert {(job.key, job.attempts) for job in await jobs(env) if job.key != "scan"} == {
                ("variant:card", 0),
                ("variant:thumb", 0),
            }
            scanner.default = "clean"
            async with env.engine.begin() as connection:
                table = journal_of(env).tables.job
                await connection.execute(table.update().where(table.c.key == "scan").values(due=clock(-1.0)))
            assert (await journal_of(env).recover()).scanned == 1
            await journal_of(env).recover()
            assert await shown(env) == expected(recipes, "x")
            assert await jobs(env) == []
            await env.check_recovery()


async def test_what_a_client_has_stored_directly(env: OrmEnvironment) -> None:
    """The copy that a row takes has variants of its own, which the transaction of the row takes with it."""
    recipes = {"thumb": Upper(when="flush")}
    with declared(recipes):
        staged = await env.manager.put_bytes(storage_key="docs", model_name="doc", entity_id="1", field_name="file", content=b"x")
        adopted = await Attachment._adopt(staged, column_type(), unchanged)
        assert set(adopted.variants) == {"thumb"}
        await env.add(Doc(id=1, file=adopted))
        await env.manager.delete(staged)
        assert await shown(env) == expected(recipes, "x")


async def unchanged(ref: StoredObjectRef) -> StoredObjectRef:
    return ref
