"""Deriving variants again for existing rows: missing ones, those of another recipe, all, or those no longer declared."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from granite_storage import Attachment, ConfigurationError
from granite_storage.derived import Derived
from granite_storage.exceptions import BackendUnavailableError
from granite_storage.rederivation import RederivationStatus, rederive
from tests.orm.derivations import Gate, Upper, declared, expected, ref_of, shown
from tests.orm.environment import Doc, OrmEnvironment, file

MADE, DROPPED, FAILED = RederivationStatus.MADE, RederivationStatus.DROPPED, RederivationStatus.FAILED
REFUSED = RederivationStatus.REFUSED
CHANGED = RederivationStatus.CHANGED


async def fill(env: OrmEnvironment, count: int = 3) -> None:
    """Add rows whose files have no variants."""
    await env.add(*(Doc(id=number, file=file(f"{number}")) for number in range(1, count + 1)))


async def fill_more(env: OrmEnvironment) -> None:
    """Add one more row."""
    await env.add(Doc(id=100, file=file("100")))


class TestWhich:
    async def test_missing(self, env: OrmEnvironment) -> None:
        await fill(env)
        recipes = {"thumb": Upper("a", when="flush"), "text": Upper("b", when="flush")}
        with declared(recipes):
            assert await rederive(env.binding).waiting() == {
                ("doc.file", "thumb", "missing"): 3,
                ("doc.file", "text", "missing"): 3,
            }
            report = await rederive(env.binding)
            assert (report.rows, report.counts, report.bytes_read, report.complete) == (3, {MADE: 6}, 6, True)
            for number in (1, 2, 3):
                assert await shown(env, number) == expected(recipes, f"{number}")
            assert (await rederive(env.binding)).counts == {}
            assert recipes["thumb"].made == {b"1": 1, b"2": 1, b"3": 1}

    async def test_stale(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper("a", when="flush")}):
            await fill(env, 2)
            before = await env.objects()
        newer = {"thumb": Upper("a", when="flush", version=2)}
        with declared(newer):
            assert (await rederive(env.binding)).counts == {}
            assert await rederive(env.binding, which="stale").waiting() == {("doc.file", "thumb", "other recipe"): 2}
            assert (await rederive(env.binding, which="stale")).counts == {MADE: 2}
            assert await shown(env) == expected(newer, "1")
            assert (await rederive(env.binding, which="stale")).counts == {}
            await env.check()
            assert len(before & await env.objects()) == 2  # the originals

    async def test_all(self, env: OrmEnvironment) -> None:
        recipe = Upper("a", when="flush")
        with declared({"thumb": recipe}):
            await fill(env, 1)
            before = (await ref_of(env)).variants
            assert await rederive(env.binding, which="all").waiting() == {("doc.file", "thumb", "again"): 1}
            assert (await rederive(env.binding, which="all")).counts == {MADE: 1}
            after = (await ref_of(env)).variants
            assert before is not None
            assert after is not None
            assert before["thumb"].location != after["thumb"].location
            assert await shown(env) == expected({"thumb": recipe}, "1")

    async def test_another_type(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=Attachment(b"1", content_type="text/plain")))
        with declared({"thumb": Upper("a", when="flush", accept=("image/*",))}):
            assert (await rederive(env.binding)).counts == {}

    async def test_those_that_are_asked_for(self, env: OrmEnvironment) -> None:
        await fill(env, 1)
        recipe = Upper("a", when="request")
        with declared({"thumb": recipe}):
            assert (await rederive(env.binding)).counts == {}
            assert (await rederive(env.binding, names=["thumb"])).counts == {MADE: 1}
            assert await shown(env) == expected({"thumb": recipe}, "1")

    async def test_columns_and_names(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("x"), other=file("y")))
        recipes = {"a": Upper("a", when="flush"), "b": Upper("b", when="flush")}
        with declared(recipes, ("other", recipes)):
            assert (await rederive(env.binding, columns=["doc.other"], names=["b"])).counts == {MADE: 1}
            assert (await shown(env), set(await shown(env, column="other"))) == ({}, {"b"})

    async def test_undeclared(self, env: OrmEnvironment) -> None:
        recipes = {"a": Upper("a", when="flush"), "b": Upper("b", when="flush")}
        with declared(recipes):
            await fill(env, 2)
        with declared({"a": recipes["a"]}):
            assert (await rederive(env.binding, which="stale")).counts == {}
            run = rederive(env.binding, drop_undeclared=True)
            assert await run.waiting() == {("doc.file", "b", "undeclared"): 2}
            assert (await run).counts == {DROPPED: 2}
            assert await shown(env) == expected({"a": recipes["a"]}, "1")
            await env.check()
        assert (await rederive(env.binding, drop_undeclared=True, names=["a"])).counts == {DROPPED: 2}
        assert (await ref_of(env)).variants is None
        await env.check(file_1="1", file_2="2")


class TestRuns:
    async def test_resumed(self, env: OrmEnvironment) -> None:
        await fill(env, 6)
        recipe = Upper("a", when="flush")
        with declared({"thumb": recipe}):
            first = rederive(env.binding, concurrency=1)
            async for _ in first:
                first.stop()
            assert not first.report.complete
            assert 1 <= first.report.rows < 6
            second = await rederive(env.binding, after=first.report.key)
            assert (second.complete, second.rows) == (True, 6 - first.report.rows)
            assert recipe.made.total() == 6

    async def test_cancelled(self, env: OrmEnvironment) -> None:
        await fill(env, 3)
        recipe = Upper("a", when="flush")
        with declared({"thumb": recipe}):
            gate = recipe.gate = Gate()
            task = asyncio.ensure_future(rederive(env.binding)._run_to_end())
            await asyncio.wait_for(gate.reached.wait(), 30)
            task.cancel()
            await asyncio.wait([task])
            recipe.gate = None
            await env.check()
            assert (await rederive(env.binding)).counts == {MADE: 3}

    async def test_rate(self, env: OrmEnvironment) -> None:
        await env.add(*(Doc(id=number, file=file(b"x" * 100)) for number in (1, 2, 3)))
        with declared({"thumb": Upper("a", when="flush")}):
            begun = time.monotonic()
            await rederive(env.binding, bytes_per_second=1000, concurrency=3)
            assert time.monotonic() - begun > 0.25

    @pytest.mark.parametrize("outcome", ["refused", "failed"])
    async def test_the_rate_is_that_of_what_is_read(self, env: OrmEnvironment, outcome: str) -> None:
        """Also of originals of which no variant can be made."""
        await env.add(*(Doc(id=number, file=file(b"x" * 100)) for number in (1, 2, 3)))
        recipe = Upper("a", when="flush")
        (recipe.refused if outcome == "refused" else recipe.failing).add(b"x" * 100)
        with declared({"thumb": recipe}):
            begun = time.monotonic()
            report = await rederive(env.binding, bytes_per_second=1000, concurrency=3)
            assert time.monotonic() - begun > 0.25
        assert (report.counts, report.bytes_read) == ({RederivationStatus(outcome): 3}, 300)

    async def test_what_is_refused_unread_costs_nothing(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file(b"x" * 100)))
        with declared({"thumb": Derived(str, content_type="text/plain", max_source=10)}):
            report = await rederive(env.binding, bytes_per_second=1)
        assert (report.counts, report.bytes_read) == ({REFUSED: 1}, 0)

    async def test_failures(self, env: OrmEnvironment) -> None:
        await fill(env)
        recipe = Upper("a", when="flush")
        recipe.refused, recipe.failing = {b"1"}, {b"2"}
        with declared({"thumb": recipe}):
            run = rederive(env.binding)
            report = await run
            assert (report.counts, report.failed) == ({MADE: 1, REFUSED: 1, FAILED: 1}, 1)
            assert [(item.primary_key, item.name, item.message) for item in report.failures] == [
                ((2,), "thumb", "the process has died"),
            ]

    async def test_an_original_is_missing(self, env: OrmEnvironment) -> None:
        await fill(env, 2)
        await env.manager.delete(await ref_of(env, 1))
        with declared({"thumb": Upper("a", when="flush")}):
            assert (await rederive(env.binding)).counts == {MADE: 1, FAILED: 1}
        await env.sql("DELETE FROM doc WHERE id = 1")

    async def test_a_backend_is_away(self, env: OrmEnvironment) -> None:
        await fill(env, 1)
        env.backend.fail("open", error=BackendUnavailableError("away"), times=3)
        with declared({"thumb": Upper("a", when="flush")}), pytest.raises(BackendUnavailableError):
            await rederive(env.binding)

    @pytest.mark.parametrize("what", ["replaced", "cleared"])
    async def test_a_writer_is_first(self, env: OrmEnvironment, what: str) -> None:
        recipe = Upper("a", when="flush")
        await fill(env, 1)
        with declared({"thumb": recipe}):
            gate = recipe.gate = Gate()
            run = asyncio.ensure_future(rederive(env.binding)._run_to_end())
            await asyncio.wait_for(gate.reached.wait(), 30)
            recipe.gate = None
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = Attachment(b"new") if what == "replaced" else None
            gate.opened.set()
            assert (await run).counts == {CHANGED: 1}
            await env.check()
            assert await shown(env) == ({"thumb": recipe.result(b"new")} if what == "replaced" else {})

    async def test_another_recipe_is_first(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was seen before is compared: an older process does not replace what a newer one has made meanwhile."""
        with declared({"thumb": Upper("a", when="flush")}):
            await fill(env, 1)
        older, newer = Upper("a", when="flush", version=2), Upper("a", when="flush", version=3)
        with declared({"thumb": older}):
            gate = older.gate = Gate()
            run = asyncio.ensure_future(rederive(env.binding, which="stale")._run_to_end())
            await asyncio.wait_for(gate.reached.wait(), 30)
        with declared({"thumb": newer}):
            await rederive(env.binding, which="stale")
        with declared({"thumb": older}):
            gate.opened.set()
            assert MADE not in (await run).counts
        assert await shown(env) == {"thumb": newer.result(b"1")}

    async def test_a_row_that_sql_has_copied(self, env: OrmEnvironment) -> None:
        recipe = Upper("a", when="flush", version=2)
        with declared({"thumb": Upper("a", when="flush")}):
            await fill(env, 1)
        await env.sql("INSERT INTO doc (id, title, file) SELECT 2, title, file FROM doc")
        with declared({"thumb": recipe}):
            assert (await rederive(env.binding, which="stale", concurrency=1)).counts == {MADE: 2}
            assert recipe.made == {b"1": 1}
            assert await shown(env, 1) == await shown(env, 2) == {"thumb": recipe.result(b"1")}
        await env.sql("DELETE FROM doc WHERE id = 2")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"which": "some"}, "which must be one of 'missing', 'stale', 'all', not 'some'"),
            ({"columns": ["doc.files"]}, r"'doc.files' is not an attachment column \(there are: .*doc.file, doc.other"),
            ({"names": ["thumbs"]}, r"no column declares a variant or an effect 'thumbs' \(there are: thumb\)"),
            ({"concurrency": 0}, "concurrency must be"),
            ({"bytes_per_second": 0}, "bytes_per_second must be"),
        ],
    )
    async def test_refused(self, env: OrmEnvironment, options: Any, message: str) -> None:
        with declared({"thumb": Upper()}), pytest.raises(ConfigurationError, match=message):
            rederive(env.binding, **options)


async def test_a_binding_that_is_not_in_force(env: OrmEnvironment) -> None:
    env.binding.unbind()
    with pytest.raises(ConfigurationError, match="the binding is not active"):
        rederive(env.binding)


async def test_nothing_is_deleted_where_the_commit_is_in_doubt(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    with declared({"thumb": Upper("a", when="flush")}):
        await fill(env, 1)
    before = await env.objects()
    session_class = type(env.sessions())

    async def fail(self: Any) -> None:
        raise ConnectionError("cut off")

    with declared({"thumb": Upper("a", when="flush", version=2)}), monkeypatch.context() as patch:
        patch.setattr(session_class, "commit", fail)
        with pytest.raises(ConnectionError):
            await rederive(env.binding, which="stale")
    assert before < await env.objects()
    new = await env.objects() - before
    for location in new:
        await env.backend.delete(location)
