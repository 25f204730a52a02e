"""Variants that a worker makes: the rows that hold the original get them, and no others; none is lost on the way."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, text, update

from granite_storage.exceptions import DerivationRefusedError, DerivationUnavailableError
from granite_storage.orm import Attachment
from granite_storage.orm.journal import variant_jobs
from granite_storage.orm.journal.references import References
from granite_storage.orm.journal.tables import RecoveryReport, clock
from granite_storage.orm.journal.variant_jobs import VariantJobs
from tests.core.support import eventually
from tests.orm.databases import Database
from tests.orm.derivations import (
    Upper,
    column_type,
    declared,
    expected,
    jobs,
    journal_of,
    make_due,
    ref_of,
    shown,
    stopped_in,
)
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.journal.sharing import copy_by_sql
from tests.orm.journal.test_recovery import retention
from tests.orm.journal.test_scans import set_raw
from tests.orm.journal.variants import expire
from tests.orm.test_cancellation import Steps


async def derive(env: OrmEnvironment) -> int:
    """Let a worker make what is due, as if every pause were over, and return how many variants it has made."""
    await make_due(env)
    report = await journal_of(env).recover()
    return report.derived


class TestMade:
    async def test_after_the_commit(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper("a"), "text": Upper("b")}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x"), other=file("y")))
            assert await shown(env) == {}
            ref = await ref_of(env)
            assert [(job.key, job.recipe, job.location) for job in await jobs(env)] == [
                ("variant:text", "upper:b:1:text", ref.location),
                ("variant:thumb", "upper:a:1:thumb", ref.location),
            ]
            report = await journal_of(env).recover()
            assert (report.derived, report.underived, report.failed) == (2, 0, [])
            assert await shown(env) == expected(recipes, "x")
            assert await jobs(env) == []
            assert (await ref_of(env)).variants is not None
            variant = ((await ref_of(env)).variants or {})["thumb"]
            assert (variant.recipe, variant.content_type) == ("upper:a:1:thumb", "text/x-upper")
            assert (await journal_of(env).recover()).derived == 0

    async def test_nothing_else_of_the_row_changes(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper()}):
            await env.add(Doc(id=1, title="t", code="c", file=file("x")))
            before = (await ref_of(env)).to_dict()
            await derive(env)
            after = (await ref_of(env)).to_dict()
            assert set(after.pop("variants")) == {"thumb"}
            assert after == before

    async def test_keys_that_are_not_known_stay(self, env: OrmEnvironment) -> None:
        """A newer version of the library may have written them."""
        with declared({"thumb": Upper()}):
            await env.add(Doc(id=1, file=file("x")))
            value = {**(await ref_of(env)).to_dict(), "novelty": [1, {"a": None}], "digests": {"etag": "e"}}
            await set_raw(env, json.dumps(value))
            assert await derive(env) == 1
            after = (await ref_of(env)).to_dict()
            assert (after["novelty"], after["digests"]) == ([1, {"a": None}], {"etag": "e"})

    async def test_several_of_one_object_are_one_update(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        written, write = [], variant_jobs.write_variants

        def count(connection: Any, chosen: Any, made: Any) -> Any:
            written.append(sorted(chosen))
            return write(connection, chosen, made)

        monkeypatch.setattr(variant_jobs, "write_variants", count)
        with declared({name: Upper(name) for name in "abc"}):
            await env.add(Doc(id=1, file=file("x")))
            await derive(env)
        assert written == [["a", "b", "c"]]

    async def test_those_that_are_asked_for_wait(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper(when="request")}):
            await env.add(Doc(id=1, file=file("x")))
            assert await jobs(env) == []

    async def test_a_worker(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper()}
        with declared(recipes):
            async with journal_of(env).worker(interval=timedelta(hours=1)), asyncio.timeout(30):
                await asyncio.sleep(0.2)
                await env.add(Doc(id=1, file=file("x")))  # which wakes it
                while await shown(env) != expected(recipes, "x"):  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0.02)

    async def test_locked_by_who_only_looks(self, mariadb_database: Database) -> None:
        """MariaDB locks what a statement examines, as that of a worker that looks for jobs of another kind."""
        recipe = Upper()
        async with orm_environment(mariadb_database, journaled=True) as env:
            with declared({"thumb": recipe}):
                await env.add(Doc(id=1, file=file("x")))
                await make_due(env)
                async with env.engine.connect() as other:
                    await other.execute(select(journal_of(env).tables.job.c.id).with_for_update())
                    working = asyncio.create_task(journal_of(env).recover())
                    await asyncio.sleep(0.1)
                assert (await working).derived == 1
                assert await shown(env) == {"thumb": recipe.result(b"x")}
            await env.check_recovery()

    async def test_of_a_file_on_disk(self, env: OrmEnvironment, tmp_path: Any) -> None:
        recipes = {"thumb": Upper(folder=tmp_path)}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")))
            await derive(env)
            assert await shown(env) == expected(recipes, "x")

    async def test_rolled_back(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper()}):
            async with env.sessions() as session:
                session.add(Doc(id=1, file=file("x")))
                await session.flush()
                await session.rollback()
            assert await jobs(env) == []

    async def test_a_migrated_or_copied_file_has_jobs_of_its_own(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper()}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")))
            await derive(env)
            async with env.sessions.begin() as session:
                session.add(Doc(id=2, file=(await session.get_one(Doc, 1)).file))
            assert await shown(env, 2) == {}
            assert [job.location for job in await jobs(env)] == [(await ref_of(env, 2)).location]
            await derive(env)
            assert await shown(env) == await shown(env, 2) == expected(recipes, "x")

    async def test_undone(self, env: OrmEnvironment) -> None:
        """The original comes back, with those variants that are still there; the others are made again."""
        recipes = {"thumb": Upper("a"), "text": Upper("b")}
        with retention(timedelta(hours=1)):
            with declared({"thumb": recipes["thumb"]}):
                await env.add(Doc(id=1, file=file("x")))
                await derive(env)
            ref = await ref_of(env)
            with declared(recipes):
                async with env.sessions.begin() as session:
                    await session.delete(await session.get_one(Doc, 1))
                await env.add(Doc(id=2, file=Attachment.restore(ref)))
                assert set(await shown(env, 2)) == {"thumb"}
                assert [job.key for job in await jobs(env)] == ["variant:text"]
                await derive(env)
                assert await shown(env, 2) == expected(recipes, "x")

    async def test_synchronous_sessions_and_verbs(self, psycopg_database: Database) -> None:
        recipes = {"thumb": Upper(), "now": Upper("n", when="flush")}
        async with orm_environment(psycopg_database, journaled=True) as env:
            with declared(recipes):
                await env.add(Doc(id=1, file=file("x")))
                report = await asyncio.to_thread(journal_of(env).sync.recover)
                assert report.derived == 1
                assert await shown(env) == expected(recipes, "x")
            await env.check_recovery()


class TestRecipes:
    async def test_a_changed_recipe(self, env: OrmEnvironment) -> None:
        """The older variant is shown until it is rendered again, and is displaced once."""
        old, new = Upper("a"), Upper("a", version=2)
        with declared({"thumb": old}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            await derive(env)
        with declared({"thumb": new}, ("other", {"thumb": new})):
            async with env.sessions.begin() as session:
                first = await session.get_one(Doc, 1)
                first.file, first.other = None, first.file
            assert await shown(env, 1, "other") == {"thumb": old.result(b"x")}
            assert await derive(env) == 1
            assert await shown(env, 1, "other") == {"thumb": new.result(b"x")}
            await env.recover()
            assert len(await env.objects()) == 2

    async def test_what_it_displaces_waits_as_long_as_the_original_would(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper()}):
            await env.add(Doc(id=1, file=file("x")))
            await derive(env)
        with retention(timedelta(hours=1)), declared({"thumb": Upper(version=2)}):
            await enqueue(env)
            assert await derive(env) == 1
            intent = journal_of(env).tables.intent
            async with env.engine.connect() as connection:
                [row] = (await connection.execute(select(intent))).all()
            assert (row.kind, row.source) == ("delete", (await ref_of(env)).location)
            assert len(await env.objects()) == 3
        await env.recover()

    async def test_jobs_of_another_version_of_the_application(self, env: OrmEnvironment) -> None:
        """A process that does not have the recipe leaves its jobs alone."""
        with declared({"thumb": Upper(version=2)}):
            await env.add(Doc(id=1, file=file("x")))
        with declared({"thumb": Upper(version=1)}):
            assert await derive(env) == 0
            [job] = await jobs(env)
            assert (job.attempts, job.takeovers, job.recipe) == (0, 0, "upper::2:thumb")
        with declared({"thumb": Upper(version=2)}):
            assert await derive(env) == 1

    async def test_an_older_one_does_not_replace_a_newer_one(self, env: OrmEnvironment) -> None:
        """The compare-and-set on the key: what was seen there before has changed."""
        old, new = Upper("old", version=1), Upper("new", version=2)
        with declared({"thumb": old}):
            await env.add(Doc(id=1, file=file("x")))
            async with stopped_in(env, old):
                with declared({"thumb": new}):
                    await enqueue(env)
                    assert await journal_of(env)._jobs(VariantJobs).run("store")
                assert await shown(env) == {"thumb": new.result(b"x")}
            assert await shown(env) == {"thumb": new.result(b"x")}
        with declared({"thumb": new}):
            await derive(env)
            await env.recover()
            assert len(await env.objects()) == 2

    async def test_a_name_that_is_not_declared_any_more(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(), "text": Upper("b")}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            async with env.sessions.begin() as session:
                first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
                second.other, first.file = first.file, None
            assert len(await jobs(env)) == 2
            assert await derive(env) == 0, "the other column declares none"
            assert await jobs(env) == []


async def enqueue(env: OrmEnvironment, number: int = 1) -> None:
    """Record what a row's file lacks, as a flush would."""
    ref = await ref_of(env, number)
    async with env.engine.begin() as connection:
        written = [(column_type().column, ref)]
        await connection.run_sync(lambda sync: journal_of(env).intents.enqueue(sync, written))


class TestRows:
    """While a variant is made no lock is held, and anything may happen to the row."""

    async def test_replaced(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            async with stopped_in(env, recipe), env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("y")
            await derive(env)
            assert await shown(env) == {"thumb": recipe.result(b"y")}, "the first one is another file's"
            await env.recover()
            assert len(await env.objects()) == 2
            assert await jobs(env) == []

    async def test_deleted(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            async with stopped_in(env, recipe), env.sessions.begin() as session:
                await session.execute(delete(Doc))
            assert await jobs(env) == []
            await env.recover()
            assert await env.objects() == set()

    async def test_moved(self, env: OrmEnvironment) -> None:
        """The job goes along."""
        recipe = Upper()
        with declared({"thumb": recipe}, ("other", {"thumb": recipe})):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            async with stopped_in(env, recipe), env.sessions.begin() as session:
                first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
                second.other, first.file = first.file, None
            await derive(env)
            assert await shown(env, 2, "other") == {"thumb": recipe.result(b"x")}
            assert await jobs(env) == []

    async def test_swapped(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}, ("other", {"thumb": recipe})):
            await env.add(Doc(id=1, file=file("x"), other=file("y")))
            async with stopped_in(env, recipe), env.sessions.begin() as session:
                doc = await session.get_one(Doc, 1)
                doc.file, doc.other = doc.other, doc.file
            await derive(env)
            assert await shown(env) == {"thumb": recipe.result(b"y")}
            assert await shown(env, 1, "other") == {"thumb": recipe.result(b"x")}

    async def test_moved_while_it_is_set(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row that is not found may be another one by now: the transaction is rolled back, and looks again."""
        recipe = Upper()
        looks, find = 0, References.find_holders

        async def miss_once(self: References, *args: Any) -> Any:
            nonlocal looks
            looks += 1
            return [] if looks == 2 else await find(self, *args)

        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            with monkeypatch.context() as patch:
                patch.setattr(References, "find_holders", miss_once)
                assert await derive(env) == 1
            assert looks > 2
            assert (await shown(env), await jobs(env)) == ({"thumb": recipe.result(b"x")}, [])

    async def test_another_variant_comes_meanwhile(self, env: OrmEnvironment) -> None:
        """The value is read under the lock, so what another deriver has written stays."""
        first, second = Upper("a"), Upper("b")
        with declared({"one": first, "two": second}):
            await env.add(Doc(id=1, file=file("x")))
            await hide(env, "variant:two")
            async with stopped_in(env, first):
                await make_due(env)
                await hide(env, "variant:one")
                assert await journal_of(env)._jobs(VariantJobs).run("store")
            assert await shown(env) == {"one": first.result(b"x"), "two": second.result(b"x")}

    async def test_another_part_of_the_value(self, env: OrmEnvironment) -> None:
        """A transaction that writes it while the deriver waits for the row does not lose it."""
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            changed = json.dumps({**(await ref_of(env)).to_dict(), "novelty": 1})
            async with env.engine.begin() as connection:
                await set_raw(env, changed, connection)
                working = asyncio.create_task(journal_of(env).recover())
                await eventually(lambda: recipe.made)
                await asyncio.sleep(0.5)
                assert not working.done()
            await working
            assert await shown(env) == {"thumb": recipe.result(b"x")}
            assert (await ref_of(env)).to_dict()["novelty"] == 1

    async def test_replaced_while_it_is_set(self, env: OrmEnvironment) -> None:
        """The row that the deriver waits for holds another file once it is locked."""
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.sessions() as session, session.begin():
                (await session.get_one(Doc, 1)).file = file("y")
                await session.flush()
                working = asyncio.create_task(journal_of(env).recover())
                await eventually(lambda: recipe.made)
                await asyncio.sleep(0.5)
            await working
            await derive(env)
            assert await shown(env) == {"thumb": recipe.result(b"y")}

    async def test_moved_by_sql(self, env: OrmEnvironment) -> None:
        """The job knows nothing of it, and the row is found by the location of the original."""
        recipe = Upper()
        with declared({"thumb": recipe}, ("other", {"thumb": recipe})):
            await env.add(Doc(id=1, file=file("x")))
            await env.sql("UPDATE doc SET other = file WHERE id = 1")
            await env.sql("UPDATE doc SET file = NULL WHERE id = 1")
            assert await derive(env) == 1
            assert await shown(env, 1, "other") == {"thumb": recipe.result(b"x")}

    async def test_another_backend(self, env: OrmEnvironment) -> None:
        """The same location elsewhere is another object."""
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            here = (await ref_of(env)).to_dict()
            async with stopped_in(env, recipe):
                await set_raw(env, json.dumps({**here, "backend": "elsewhere"}))
            assert (await ref_of(env)).variants is None
            await set_raw(env, json.dumps(here))

    async def test_rows_that_share_it(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            await copy_by_sql(env, 1, 2)
            assert await derive(env) == 1
            assert await shown(env) == await shown(env, 2) == {"thumb": recipe.result(b"x")}
        await env.sql("DELETE FROM doc WHERE id = 2")

    async def test_a_transaction_that_takes_long(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """It does not keep the worker for ever."""
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            monkeypatch.setattr(variant_jobs, "LONGEST_WAIT", 0.3)
            async with env.engine.begin() as connection:
                await connection.execute(text("SELECT id FROM doc WHERE id = 1 FOR UPDATE"))
                assert await derive(env) == 0
            [job] = await jobs(env)
            assert ("has locked the rows" in job.error, job.attempts, job.dead) == (True, 0, False)
            monkeypatch.undo()
            assert await derive(env) == 1

    async def test_a_session_that_has_not_heard_of_it(self, env: OrmEnvironment) -> None:
        """What it does to the file, it does to the variant as well."""
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2, file=file("y")), Doc(id=3))
            async with env.sessions.begin() as session:
                docs = [await session.get_one(Doc, number) for number in (1, 2, 3)]
                assert await derive(env) == 2
                docs[2].file, docs[0].file = docs[0].file, None
                await session.delete(docs[1])
            assert await shown(env, 3) == {"thumb": recipe.result(b"x")}
            await env.recover()
            assert len(await env.objects()) == 2


async def eventually_attempted(env: OrmEnvironment, attempts: int) -> None:
    """Wait until each job that is left has been attempted so often."""
    async with asyncio.timeout(30):
        while {job.attempts for job in await jobs(env)} != {attempts}:  # noqa: ASYNC110  # it is in the database
            await asyncio.sleep(0.05)


async def hide(env: OrmEnvironment, key: str) -> None:
    """Let a job wait for an hour."""
    job = journal_of(env).tables.job
    async with env.engine.begin() as connection:
        await connection.execute(update(job).where(job.c.key == key).values(due=clock(3600.0)))


class TestUndeclared:
    """Jobs by recipes that this process does not declare: another version of the application may have them."""

    @pytest.mark.parametrize("is_dead", [False, True])
    @pytest.mark.parametrize("version", [None, 2])
    async def test_they_end_after_a_day(self, env: OrmEnvironment, version: int | None, is_dead: bool) -> None:
        recipe = Upper("a")
        recipe.refused = {b"x"}
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            if is_dead:
                await journal_of(env).recover()
        later = {} if version is None else {"thumb": Upper("a", version=version)}
        with declared(later):
            await set_due(env, -86_000)
            report = await journal_of(env).recover()
            assert (report.underived, report.underivable) == ((0, 1) if is_dead else (1, 0))
            await set_due(env, -86_500)
            report = await journal_of(env).recover()
            assert (report.underived, report.underivable, await jobs(env)) == (0, 0, [])

    async def test_a_process_that_declares_them_keeps_them(self, env: OrmEnvironment) -> None:
        recipe = Upper("a")
        recipe.refused = {b"x"}
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            await journal_of(env).recover()
            await set_due(env, -100_000)
            assert (await journal_of(env).recover()).underivable == 1
            await set_due(env, -100_000)
            await journal_of(env)._jobs(VariantJobs).end_idle("store")
            assert len(await jobs(env)) == 1

    async def test_those_without_rows_end_at_once(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper("a")}):
            await env.add(Doc(id=1, file=file("x")))
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc))
        report = await journal_of(env).recover()
        assert (report.underived, await jobs(env)) == (0, [])

    async def test_those_of_an_unknown_column_stay(self, env: OrmEnvironment) -> None:
        """This process cannot find their rows."""
        with declared({"thumb": Upper("a")}):
            await env.add(Doc(id=1, file=file("x")))
        async with env.engine.begin() as connection:
            await connection.execute(update(journal_of(env).tables.job).values(table_name="newer", due=clock(-100_000.0)))
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc))
        assert (await journal_of(env).recover()).underived == 1


async def set_due(env: OrmEnvironment, seconds: float) -> None:
    """Let jobs be due in so many seconds."""
    async with env.engine.begin() as connection:
        await connection.execute(update(journal_of(env).tables.job).values(due=clock(float(seconds))))


class TestFailures:
    async def test_refused(self, env: OrmEnvironment) -> None:
        """It is dead at once, and goes when no row holds its original."""
        bad, good = Upper("a"), Upper("b")
        bad.refused = {b"x"}
        with declared({"bad": bad, "good": good}):
            await env.add(Doc(id=1, file=file("x")))
            report = await journal_of(env).recover()
            assert (report.derived, report.underived, report.underivable, report.failed) == (1, 0, 1, [])
            [refused] = report.refused
            assert refused.error == "making the variant 'bad': DerivationRefusedError: no text"
            assert (refused.attempts, refused.next_attempt) == (1, None)
            later = await journal_of(env).recover()
            assert (later.underivable, later.refused, later.failed) == (1, [], []), "it is said once"
            assert await shown(env) == {"good": good.result(b"x")}
            assert await derive(env) == 0
            [job] = await jobs(env)
            assert (job.dead, job.attempts) == (True, 1)
            bad.refused = set()
            assert await journal_of(env).retry_dead_letters() == 1
            assert await derive(env) == 1

    @pytest.mark.parametrize("word", ["a\0b", "a\ud800b"])
    async def test_an_error_that_quotes_hostile_bytes(self, env: OrmEnvironment, word: str) -> None:
        """PostgreSQL keeps neither; the refusal is noted all the same, and other variants of the file are made."""
        good, bad = Upper("g"), Upper("b")
        bad.error = DerivationRefusedError(word)
        with declared({"good": good, "bad": bad}):
            await env.add(Doc(id=1, file=file("x")))
            assert await derive(env) == 1
            [job] = await jobs(env)
            assert (job.dead, job.error) == (True, "DerivationRefusedError: a b")

    async def test_a_dead_job_of_a_row_that_is_gone(self, env: OrmEnvironment) -> None:
        bad = Upper()
        bad.refused = {b"x"}
        with declared({"bad": bad}):
            await env.add(Doc(id=1, file=file("x")))
            await derive(env)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            report = await journal_of(env).recover()
            assert (report.underivable, await jobs(env)) == (0, [])

    async def test_dead_jobs_that_rows_still_lack_stay(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of several pages those without rows go, in one pass."""
        monkeypatch.setattr(variant_jobs, "BATCH_SIZE", 2)
        bad = Upper()
        bad.refused = {b"x"}
        with declared({"bad": bad}):
            await env.add(*(Doc(id=number, file=file("x")) for number in range(1, 8)))
            await derive(env)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc).where(Doc.id != 4))
            await journal_of(env).recover()
            assert [job.location for job in await jobs(env)] == [(await ref_of(env, 4)).location]

    async def test_a_row_that_comes_while_its_job_ends(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """It was not found first, because it has moved meanwhile: the job stays."""
        bad = Upper()
        bad.refused = {b"x"}
        with declared({"bad": bad}):
            await env.add(Doc(id=1, file=file("x")))
            await derive(env)

            async def find(*_: Any) -> set[str]:
                return set()

            with monkeypatch.context() as patch:
                patch.setattr(References, "find", find)
                await journal_of(env)._jobs(VariantJobs).end_idle("store")
            assert len(await jobs(env)) == 1

    async def test_an_end_that_was_not_asked_for(self, env: OrmEnvironment) -> None:
        """A recipe awaits a task that others cancel: an attempt, and no cancellation of the worker."""
        bad, good = Upper("a"), Upper("b")
        bad.error = asyncio.CancelledError()
        with declared({"bad": bad, "good": good}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2, file=file("y")))
            report = await journal_of(env).recover()
            assert (report.derived, report.underived) == (2, 2)
            assert {(job.key, job.attempts, job.takeovers) for job in await jobs(env)} == {("variant:bad", 1, 0)}
            async with journal_of(env).worker(interval=timedelta(seconds=0.05)):
                await make_due(env)
                await eventually_attempted(env, 2)
                await env.add(Doc(id=3, file=file("z")))
                async with asyncio.timeout(30):
                    while "good" not in await shown(env, 3):  # noqa: ASYNC110  # it is in the database
                        await asyncio.sleep(0.05)

    async def test_failed(self, env: OrmEnvironment) -> None:
        """An attempt, then a pause that grows; dead after many."""
        recipe = Upper()
        recipe.failing = {b"x"}
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            for attempts in range(1, 6):
                assert await derive(env) == 0
                [job] = await jobs(env)
                assert (job.attempts, job.dead) == (attempts, attempts == 5)
                assert (await journal_of(env).recover()).derived == 0, "it is not due"
            recipe.failing = set()
            assert await derive(env) == 0
            await journal_of(env).retry_dead_letters()
            assert await derive(env) == 1
            assert (await shown(env), await jobs(env)) == ({"thumb": recipe.result(b"x")}, [])

    async def test_a_refusal_of_another_class(self, env: OrmEnvironment) -> None:
        class NotAnImageError(DerivationRefusedError):
            """One of an application."""

        bad = Upper()
        bad.error = NotAnImageError("no image")
        with declared({"bad": bad}):
            await env.add(Doc(id=1, file=file("x")))
            report = await journal_of(env).recover()
            assert (report.underivable, report.failed) == (1, [])

    async def test_waiting_for_a_process_is_no_attempt(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        recipe = Upper()
        recipe.error = DerivationUnavailableError("no worker process was free for 3 s")
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            for _ in range(6):
                assert await derive(env) == 0
                [job] = await jobs(env)
                assert (job.attempts, job.takeovers, job.dead) == (0, 0, False)
            assert (await journal_of(env).recover()).derived == 0, "it is not due"
            assert "waits: no worker process was free for 3 s" in caplog.text
            recipe.error = None
            assert await derive(env) == 1

    async def test_any_other_error(self, env: OrmEnvironment) -> None:
        """It may pass, so there are more attempts; dead all the same in the end."""
        recipe = Upper()
        recipe.error = RuntimeError("the disk is full")
        most = journal_of(env)._max_attempts
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            for attempts in range(1, most + 1):
                assert await derive(env) == 0
                [job] = await jobs(env)
                assert (job.attempts, job.dead) == (attempts, attempts == most)

    async def test_another_row_is_not_held_up(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        recipe.failing = {b"x"}
        with declared({"thumb": recipe}):
            await env.add(*(Doc(id=number, file=file("x" if number % 2 else "y")) for number in range(1, 11)))
            assert await derive(env) == 5
            assert len(await jobs(env)) == 5

    async def test_the_transaction_fails(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """The intent is consumed in the transaction of the rows: what they have not got, it settles."""
        recipe = Upper()

        def fail(*_: Any) -> Any:
            raise ZeroDivisionError("a mistake")

        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            with monkeypatch.context() as patch:
                patch.setattr(variant_jobs, "nominate", fail)
                assert await derive(env) == 0
            assert await shown(env) == {}
            await env.recover()
            assert len(await env.objects()) == 1
            assert await derive(env) == 1

    async def test_reclaimed_before_it_is_set(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker has taken the deriver for dead, and has deleted what it has stored: no row shows that."""
        recipe = Upper()
        publish = VariantJobs._publish

        async def late(self: VariantJobs, jobs: Any, made: Any, ids: Any) -> Any:
            await expire(env)
            await journal_of(env)._recover("store")
            return await publish(self, jobs, made, ids)

        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            with monkeypatch.context() as patch:
                patch.setattr(VariantJobs, "_publish", late)
                assert await derive(env) == 0
            assert await shown(env) == {}
            [job] = await jobs(env)
            assert (job.attempts, job.dead) == (0, False)
            assert await derive(env) == 1

    async def test_any_error(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        recipe.error = ZeroDivisionError("a mistake")
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            assert await derive(env) == 0
            [job] = await jobs(env)
            assert (job.error, job.attempts, job.dead) == ("ZeroDivisionError: a mistake", 1, False)

    async def test_the_storage_is_down(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            env.backend.fail("put_bytes")
            assert await derive(env) == 0
            assert (await jobs(env))[0].attempts == 1
            assert await derive(env) == 1

    async def test_the_original_is_missing(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            ref = await ref_of(env)
            content = await env.manager.get(ref)
            await env.manager.delete(ref)
            report = await journal_of(env).recover()
            assert [failed.next_attempt for failed in report.failed] == [None]
            await env.backend.put_bytes(ref.location, content, content_type=None)
            await journal_of(env).retry_dead_letters()
            assert await derive(env) == 1

    async def test_an_original_that_kills_its_workers(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper()}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.engine.begin() as connection:
                await connection.execute(update(journal_of(env).tables.job).values(takeovers=14))
            report = await journal_of(env).recover()
            assert (report.derived, len(report.failed)) == (0, 1)
            await journal_of(env).retry_dead_letters()
            assert await derive(env) == 1

    async def test_a_worker_that_dies(self, env: OrmEnvironment) -> None:
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            await journal_of(env)._jobs(VariantJobs)._claim("store", 8, journal_of(env).tables.job.c.key != "")
            assert (await journal_of(env).recover()).derived == 0, "its lease is not over"
            assert await derive(env) == 1

    async def test_a_lease_is_renewed(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage.orm.journal.journal._JOB_LEASE", timedelta(seconds=0.6))
        recipe = Upper()
        with declared({"thumb": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            async with stopped_in(env, recipe):
                await asyncio.sleep(1.0)
                assert (await journal_of(env).recover()).derived == 0
            assert recipe.made == {b"x": 1}
            assert await shown(env) == {"thumb": recipe.result(b"x")}

    async def test_cancelled_at_every_await(self, env: OrmEnvironment) -> None:
        """Whatever a worker is cancelled at, the next one does the job, and nothing is left behind."""
        recipe = Upper()
        at, reached = 0, True
        with declared({"thumb": recipe}):
            while reached:
                await env.add(Doc(id=1, file=file("x")))
                steps = Steps(journal_of(env)._jobs(VariantJobs).run("store"), {at}, 0)  # type: ignore[arg-type]
                await steps.run()
                reached = steps.reached
                assert bool(await shown(env)) is not bool(await jobs(env))
                await derive(env)
                assert (await shown(env), await jobs(env)) == ({"thumb": recipe.result(b"x")}, [])
                async with env.sessions.begin() as session:
                    await session.execute(delete(Doc))
                await env.recover()
                assert await env.objects() == set()
                at += 1
        assert at > 10


def test_reports_are_added() -> None:
    report = RecoveryReport(derived=1)
    report.add(RecoveryReport(derived=2))
    assert report.derived == 3
