"""Effects: what is kept elsewhere agrees with the rows in the end, whatever happens to files, rows and processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, update

from granite_storage import Attachment, ConfigurationError, bind_storage
from granite_storage._jobs import Budget
from granite_storage.derived import Effect, EffectEvent
from granite_storage.migration import relocate
from granite_storage.orm import AttachmentType
from granite_storage.orm.journal import effects as effects_module
from granite_storage.orm.journal.effects import EffectJobs
from granite_storage.orm.journal.tables import clock
from granite_storage.orm.references import Scan
from granite_storage.rederivation import RederivationStatus, rederive
from tests import tiers
from tests.orm.databases import Database
from tests.orm.derivations import Gate, jobs, journal_of, make_due, ref_of
from tests.orm.effects import SearchIndex, catch_up, require_agreement, with_effects
from tests.orm.environment import Base, Child, Doc, Note, OrmEnvironment, Parent, file
from tests.orm.journal.scans import scan_env
from tests.orm.journal.test_recovery import retention
from tests.orm.journal.variants import expire

FILES = (Doc, "file"), (Doc, "other")


async def verbs(env: OrmEnvironment, index: SearchIndex) -> list[str]:
    """Let a worker catch up, and return what it has called."""
    before = len(index.calls)
    await catch_up(env)
    return [verb for verb, _ in index.calls[before:]]


class TestRows:
    async def test_comes_and_leaves(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x"), other=file("y")))
            ref = await ref_of(env)
            assert [(job.key, job.location) for job in await jobs(env)] == [("effect:search", ref.location)]
            report = await catch_up(env)
            assert (report.effects, report.pending_effects, report.underived, report.failed) == (1, 0, 0, [])
            assert index.documents == {ref.location: b"x"}
            assert index.rows == {ref.location: ("doc.file", (1,))}
            assert await jobs(env) == []
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Doc, 1))
            assert await verbs(env, index) == ["remove"]
            assert (index.documents, await jobs(env)) == ({}, [])

    @pytest.mark.parametrize("way", ["replaced", "cleared", "updated", "deleted by a statement"])
    async def test_leaves(self, env: OrmEnvironment, way: str) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            await catch_up(env)
            async with env.sessions.begin() as session:
                if way == "updated":
                    await session.execute(update(Doc).values(file=None))
                elif way == "deleted by a statement":
                    await session.execute(delete(Doc))
                else:
                    (await session.get_one(Doc, 1)).file = file("z") if way == "replaced" else None
            assert sorted(await verbs(env, index)) == (["put", "remove"] if way == "replaced" else ["remove"])
            await require_agreement(env, index)

    @pytest.mark.parametrize("by", ["the session", "the database", "a statement"])
    async def test_cascade(self, env: OrmEnvironment, by: str) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}, (Child, "file")):
            await env.add(Parent(id=1, children=[Child(id=1, file=file("x"))]))
            assert await verbs(env, index) == ["put"]
            async with env.sessions.begin() as session:
                if by == "a statement":
                    await session.execute(delete(Parent))
                else:
                    parent = await session.get_one(Parent, 1)
                    if by == "the session":
                        await session.refresh(parent, ["children"])
                    await session.delete(parent)
            assert await verbs(env, index) == ["remove"]

    async def test_gone_before_a_worker_came(self, env: OrmEnvironment) -> None:
        """It is not known whether `put` was ever called; that would take a look at the worker that may have died of it."""
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            assert await verbs(env, index) == ["remove"]

    async def test_its_bytes_may_be_gone(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            await catch_up(env)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            await env.journal.recover()  # type: ignore[union-attr]
            await require_agreement(env, index)
            assert await env.objects() == set()


class TestTransactions:
    async def test_rolled_back(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            await catch_up(env)
            with pytest.raises(ZeroDivisionError):
                async with env.sessions.begin() as session:
                    (await session.get_one(Doc, 1)).file = file("z")
                    session.add(Doc(id=2, file=file("y")))
                    await session.flush()
                    raise ZeroDivisionError
            assert (await jobs(env), await verbs(env, index)) == ([], [])
            await require_agreement(env, index)

    async def test_savepoints(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            async with env.sessions.begin() as session:
                session.add(Doc(id=1, file=file("x")))
                await session.flush()
                with contextlib.suppress(ZeroDivisionError):
                    async with session.begin_nested():
                        session.add(Doc(id=2, file=file("y")))
                        await session.execute(update(Doc).where(Doc.id == 1).values(file=None))
                        await session.flush()
                        raise ZeroDivisionError
                async with session.begin_nested():
                    session.add(Doc(id=3, file=file("z")))
            assert await verbs(env, index) == ["put", "put"]
            await require_agreement(env, index)

    async def test_replaced_twice_in_one(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            async with env.sessions.begin() as session:
                session.add(doc := Doc(id=1, file=file("x")))
                await session.flush()
                doc.file = file("y")
                await session.flush()
                doc.file = file("z")
            await catch_up(env)
            await require_agreement(env, index)

    async def test_workers_are_woken(self, env: OrmEnvironment) -> None:
        index, woken = SearchIndex(env), []
        with with_effects({"search": index.effect}):
            journal_of(env).on_work(lambda: woken.append(1))
            async with env.sessions.begin() as session:
                session.add(Doc(id=1, file=file("x")))
                await session.flush()
                assert woken == []
            assert woken
            woken.clear()
            with pytest.raises(ZeroDivisionError):
                async with env.sessions.begin() as session:
                    session.add(Doc(id=2, file=file("x")))
                    await session.flush()
                    raise ZeroDivisionError
            await env.add(Doc(id=3))

    async def test_a_worker(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            # On MariaDB a claim skips what another loop is just looking at, so the next pass has to come.
            interval = timedelta(seconds=0.5 if env.database.name == "mariadb" else 300)
            async with journal_of(env).worker(interval=interval), asyncio.timeout(30):
                await asyncio.sleep(0.2)
                await env.add(Doc(id=1, file=file("x")))
                while not index.documents:  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0.02)


class TestMoves:
    async def test_to_another_row(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            await catch_up(env)
            await _move(env)
            assert await verbs(env, index) == ["put"]
            assert list(index.rows.values()) == [("doc.file", (2,))]
            await require_agreement(env, index)

    async def test_to_a_column_with_the_same_effect(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}, *FILES):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            await catch_up(env)
            await _move(env, "other")
            assert await verbs(env, index) == ["put"]
            assert list(index.rows.values()) == [("doc.other", (2,))]

    async def test_to_a_column_without(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            await catch_up(env)
            await _move(env, "other")
            assert await verbs(env, index) == ["remove"]

    async def test_while_it_is_put(self, env: OrmEnvironment) -> None:
        """The job waits for the end of the call, and is done again."""
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            gate = index.gate = Gate()
            working = asyncio.create_task(journal_of(env).recover())
            await asyncio.wait_for(gate.reached.wait(), 30)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            second = await journal_of(env).recover()
            assert second.effects == 0
            index.gate = None
            gate.opened.set()
            await working
            assert [verb for verb, _ in index.calls] == ["put", "remove"]
            assert await jobs(env) == []
            await require_agreement(env, index)

    async def test_undone(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            with retention(timedelta(hours=1)):
                await env.add(Doc(id=1, file=file("x")))
                ref = await ref_of(env)
                async with env.sessions.begin() as session:
                    (await session.get_one(Doc, 1)).file = None
                await catch_up(env)
                assert index.documents == {}
                async with env.sessions.begin() as session:
                    (await session.get_one(Doc, 1)).file = Attachment.restore(ref)
                assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    async def test_to_another_backend(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            await catch_up(env)
            held = [row async for row in _values(env)]
            await _relocate(env, held[0])
            assert sorted(await verbs(env, index)) == ["put", "remove"]
            await require_agreement(env, index)


async def _move(env: OrmEnvironment, column: str = "file") -> None:
    async with env.sessions.begin() as session:
        first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        moved, first.file = first.file, None
        setattr(second, column, moved)


async def _values(env: OrmEnvironment) -> Any:

    async for row in Scan(env.binding).rows():
        for value in row.values:
            yield value


async def _relocate(env: OrmEnvironment, held: Any) -> None:
    assert await relocate(env.binding, held, Budget(None))


class TestFailures:
    async def test_tried_again(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            index.failures = 1
            report = await catch_up(env)
            assert (report.effects, report.pending_effects, report.failed) == (0, 1, [])
            [job] = await jobs(env)
            assert (job.attempts, job.takeovers, job.dead) == (1, 0, False)
            assert job.error == "ConnectionError: the search server is down"
            assert (await journal_of(env).recover()).effects == 0  # not yet
            assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    @pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), BaseException("x")])
    async def test_an_end_that_was_not_asked_for(self, env: OrmEnvironment, error: BaseException) -> None:
        """A handler awaits a task that others cancel: an attempt, and no cancellation of the worker."""
        index = SearchIndex(env)
        index.error = error
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            index.failures = 1
            report = await catch_up(env)
            assert (report.effects, report.pending_effects) == (0, 1)
            [job] = await jobs(env)
            assert (job.attempts, job.takeovers) == (1, 0)
            assert job.error == f"UnexpectedExitError: the handler raised {type(error).__name__}, but nothing had cancelled it"
            assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    async def test_dead_letters(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        journal_of(env)._max_attempts = 2
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            index.failures = 2
            await catch_up(env)
            report = await catch_up(env)
            [failed] = report.failed
            assert failed.error == "the effect 'search': ConnectionError: the search server is down"
            assert await verbs(env, index) == []
            assert await journal_of(env).retry_dead_letters() == 1
            assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    async def test_a_change_revives_a_dead_letter(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        journal_of(env)._max_attempts = 1
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            index.failures = 1
            await catch_up(env)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            assert await verbs(env, index) == ["remove"]
            assert await jobs(env) == []

    async def test_a_change_while_it_fails_is_due_at_once(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        journal_of(env)._max_attempts = 1
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            gate, index.failures = Gate(), 1
            index.gate = gate
            working = asyncio.create_task(journal_of(env).recover())
            await asyncio.wait_for(gate.reached.wait(), 30)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            index.gate = None
            gate.opened.set()
            await working
            assert [verb for verb, _ in index.calls] == ["put", "remove"]
            assert await jobs(env) == []

    async def test_hangs(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env, timeout=0.1)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            index.gate = Gate()
            async with asyncio.timeout(10):
                await catch_up(env)
            [job] = await jobs(env)
            assert job.error == "DerivationFailedError: the handler took longer than 0.1 s, or raised a TimeoutError"
            index.gate = None
            assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    @pytest.mark.parametrize("moment", ["in the handler", "before the commit"])
    async def test_killed(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
        """Nothing is cleaned up by who is killed: another worker calls the handler again when the lease is over."""
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            with monkeypatch.context() as patch:
                gate = Gate()
                if moment == "in the handler":
                    index.gate = gate
                else:

                    async def stay(*_: Any) -> None:
                        gate.reached.set()
                        raise asyncio.CancelledError

                    patch.setattr(EffectJobs, "_finish", stay)
                working = asyncio.create_task(journal_of(env).recover())
                await asyncio.wait_for(gate.reached.wait(), 30)
                working.cancel()
                await asyncio.wait([working])
            index.gate = None
            [job] = await jobs(env)
            assert (job.takeovers, job.attempts) == (1, 0)
            assert (await journal_of(env).recover()).effects == 0  # leased
            assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    async def test_a_change_leaves_the_lease(self, env: OrmEnvironment) -> None:
        """What has killed a worker may still be about: nobody else calls the handler before the lease is over."""
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            own = effects_module.effect_key("search")
            table = journal_of(env).tables.job
            await journal_of(env)._jobs(EffectJobs)._claim("store", 1, table.c.key == own)
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
            assert (await journal_of(env).recover()).effects == 0
            assert await verbs(env, index) == ["remove"]

    async def test_a_lost_lease_cancels_the_handler(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage.orm.journal.jobs.RENEWALS", 2000)
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            gate = index.gate = Gate()
            working = asyncio.create_task(journal_of(env).recover())
            await asyncio.wait_for(gate.reached.wait(), 30)
            table = journal_of(env).tables.job
            async with env.engine.begin() as connection:
                await connection.execute(update(table).values(takeovers=7, due=clock(60.0)))
            await asyncio.wait_for(working, 30)
            assert index._in_hand == set()
            [job] = await jobs(env)
            assert job.takeovers == 7  # it is the other worker's

    async def test_killers_are_dead_letters(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.engine.begin() as connection:
                await connection.execute(update(journal_of(env).tables.job).values(takeovers=40))
            assert await verbs(env, index) == []
            [job] = await jobs(env)
            assert job.dead


class TestScanners:
    async def test_held_and_clean(self, database: Database) -> None:
        async with scan_env(database) as (own, scanner):
            index = SearchIndex(own)
            with with_effects({"search": index.effect}):
                await own.add(Doc(id=1, file=file("a")))
                assert await verbs(own, index) == []
                scanner.verdicts[b"a"] = "clean"
                await make_due(own)
                await journal_of(own).recover()
                await journal_of(own).recover()
                await require_agreement(own, index)
                assert [verb for verb, _ in index.calls] == ["put"]

    async def test_infected(self, database: Database) -> None:
        async with scan_env(database) as (own, scanner):
            index = SearchIndex(own)
            with with_effects({"search": index.effect}):
                await own.add(Doc(id=1, file=file("a")))
                scanner.verdicts[b"a"] = "infected"
                await catch_up(own)
                await catch_up(own)
                assert (index.documents, await jobs(own)) == ({}, [])
                assert {verb for verb, _ in index.calls} == {"remove"}


class TestRederived:
    async def test_a_new_effect_and_another_version(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("x")), Doc(id=2, file=file("y")), Doc(id=3))
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            assert await rederive(env.binding).waiting() == {("doc.file", "search", "effect"): 2}
            report = await rederive(env.binding)
            assert report.counts == {RederivationStatus.CALLED: 2}
            await require_agreement(env, index)
            assert await jobs(env) == []
            for which in ("missing", "stale"):
                assert (await rederive(env.binding, which=which)).counts == {}  # type: ignore[arg-type]
            assert (await rederive(env.binding, which="all", names=["search"])).counts == {RederivationStatus.CALLED: 2}
        newer = SearchIndex(env, version=2)
        with with_effects({"search": newer.effect}):
            assert (await rederive(env.binding)).counts == {}
            assert (await rederive(env.binding, which="stale")).counts == {RederivationStatus.CALLED: 2}
            assert (await rederive(env.binding, which="stale")).counts == {}
            await require_agreement(env, newer)

    async def test_a_part_is_no_whole(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("x")), Doc(id=2, file=file("y")))
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            run = rederive(env.binding)
            async for _ in run:
                run.stop()
            assert run.report.key is not None
            await rederive(env.binding, after=run.report.key)
            assert {verb for verb, _ in index.calls} == {"put"}
            assert await rederive(env.binding).waiting() == {("doc.file", "search", "effect"): 2}

    async def test_fails(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("x")))
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            index.failures = 1
            report = await rederive(env.binding)
            assert report.failed == 1
            assert await verbs(env, index) == ["put"]
            await require_agreement(env, index)

    async def test_workers_have_died_of_it(self, env: OrmEnvironment) -> None:
        """A worker calls it, alone; a run calls others beside it, and is a process of the application."""
        index = SearchIndex(env)
        with with_effects({"search": index.effect}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.engine.begin() as connection:
                await connection.execute(update(journal_of(env).tables.job).values(takeovers=2))
            assert (await rederive(env.binding)).counts == {RederivationStatus.RECORDED: 1}
            assert index.calls == []
            assert await verbs(env, index) == ["put"]


def _synchronous(event: EffectEvent) -> None:
    raise AssertionError(event)


class Called:
    """A handler that is an object."""

    async def __call__(self, event: EffectEvent, /) -> None:
        raise AssertionError(event)


class TestRefusals:
    async def test_without_a_journal(self, env: OrmEnvironment) -> None:
        index = SearchIndex(env)
        with with_effects({"search": index.effect}), pytest.raises(ConfigurationError, match=r"doc.file has effects \(search\)"):
            bind_storage(Base, env.manager)

    async def test_different_effects_of_one_name(self, env: OrmEnvironment) -> None:
        first, second = SearchIndex(env), SearchIndex(env)
        with (
            with_effects({"search": first.effect}),
            with_effects({"search": second.effect}, (Note, "scan_ref")),
            pytest.raises(ConfigurationError, match=r"doc\.file and note\.scan_ref declare different effects under the name"),
        ):
            await journal_of(env).check()

    @pytest.mark.parametrize(
        ("effects", "message"),
        [
            ({"a b": 1}, "is called 'a b'"),
            ({"search": print}, "is a builtin_function_or_method: write Effect"),
            ([1], "must map names to effects, not be a list"),
        ],
    )
    def test_declarations(self, effects: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            AttachmentType("docs", effects=effects)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"put": 1}, "put of an effect must be an async function that takes an EffectEvent, not 1"),
            ({"put": _synchronous}, "put of an effect .*, which is a synchronous function: declare it with 'async def'"),
            ({"remove": functools.partial(_synchronous)}, "remove of an effect .* synchronous"),
            ({"remove": Called}, "remove of an effect"),
            ({"remove": None}, "remove of an effect"),
            ({"version": 1.5}, "the version of an effect must be a number or a string, not 1.5"),
            ({"timeout": 0}, "the timeout of an effect must be a positive number, not 0"),
        ],
    )
    def test_effects(self, options: Any, message: str) -> None:
        async def nothing(_: EffectEvent) -> None:
            pass

        with pytest.raises(ConfigurationError, match=message):
            Effect(**{"put": nothing, "remove": nothing, **options})

    def test_async_callables_of_other_kinds(self) -> None:
        called = Called()
        for handler in (called, called.__call__, functools.partial(called), functools.partial(Called.__call__, called)):
            assert Effect(put=handler, remove=handler).put is handler


@pytest.mark.parametrize("number", range(tiers.repetitions("GRANITE_EFFECT_HISTORIES", default=3, exhaustive=60)))
async def test_random_histories(env: OrmEnvironment, number: int) -> None:
    """Sessions change rows while workers run, fail and are cancelled: in the end the index has what the rows hold."""
    chance = random.Random(tiers.seed() + number)  # fixed, so that it can be repeated
    index = SearchIndex(env)
    with with_effects({"search": index.effect}, *FILES):
        await env.add(*(Doc(id=one, file=file(f"{one}")) for one in range(1, 5)))
        for step in range(tiers.repetitions("GRANITE_EFFECT_STEPS", default=12, exhaustive=40)):
            index.failures = chance.choice([0, 0, 1])
            working = asyncio.create_task(catch_up(env)) if chance.random() < 0.6 else None
            for turn in range(chance.randrange(3)):
                with contextlib.suppress(ZeroDivisionError):
                    await _change(env, chance, 10 * step + turn)
            if working is not None:
                if chance.random() < 0.3:
                    working.cancel()
                await asyncio.wait([working])
        index.failures = 0
        for _ in range(3):
            await expire(env)  # of the workers that were cancelled
            await catch_up(env)
        assert await jobs(env) == []
        await require_agreement(env, index, ("doc", "file"), ("doc", "other"))


async def _change(env: OrmEnvironment, chance: random.Random, step: int) -> None:
    async with env.sessions.begin() as session:
        docs = list((await session.scalars(select(Doc).order_by(Doc.id))).all())
        kind = chance.choice(["add", "replace", "clear", "delete", "move", "swap", "bulk", "rollback"])
        if kind == "add" or len(docs) < 2:
            session.add(Doc(id=100 + step, file=file(f"new {step}")))
            return
        first, second = chance.sample(docs, 2)
        column = chance.choice(["file", "other"])
        if kind in ("replace", "rollback"):
            setattr(first, column, file(f"again {step}"))
        elif kind == "clear":
            setattr(first, column, None)
        elif kind == "delete":
            await session.delete(first)
        elif kind == "move":
            moved, first.file = first.file, None
            setattr(second, column, moved)
        elif kind == "swap":
            first.file, second.file = second.file, first.file
        else:
            await session.execute(update(Doc).where(Doc.id == first.id).values(file=None))
        if kind == "rollback":
            await session.flush()
            raise ZeroDivisionError
