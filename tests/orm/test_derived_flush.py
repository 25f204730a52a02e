"""Variants that are made in the flush: they come to the row with their original, or nothing is left of either."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import delete

from granite_storage import Attachment
from granite_storage.derived import Derivation, DerivationSource
from granite_storage.exceptions import (
    BackendUnavailableError,
    ContentTooLargeError,
    DerivationFailedError,
    DerivationRefusedError,
)
from tests.orm.databases import Database
from tests.orm.derivations import Gate, Upper, declared, expected, ref_of, shown
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.test_cancellation import Steps


async def save(env: OrmEnvironment, *rows: Doc) -> None:
    async with env.sessions() as session, session.begin():
        session.add_all(rows)
        await session.flush()


class TestMade:
    async def test_with_the_original(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper("a", when="flush"), "text": Upper("b", when="flush")}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x"), other=file("y")), Doc(id=2, file=file("z")))
            assert await shown(env) == expected(recipes, "x")
            assert await shown(env, 2) == expected(recipes, "z")
            assert await shown(env, 1, "other") == {}
            ref = await ref_of(env)
            thumb = (ref.variants or {})["thumb"]
            assert (thumb.content_type, thumb.original_filename, thumb.media) == ("text/x-upper", "a.txt", {"letters": 4})
            assert (thumb.recipe, thumb.storage_key, thumb.backend) == ("upper:a:1:thumb", "docs", ref.backend)
            assert thumb.location != ref.location
            assert thumb.variants is None
        await env.check(file_1="x", other_1="y", file_2="z")

    async def test_only_those_of_the_flush(self, env: OrmEnvironment) -> None:
        flush, asked = Upper("a", when="flush"), Upper("b", when="request")
        with declared({"one": flush, "two": asked}):
            await env.add(Doc(id=1, file=file("x")))
            assert await shown(env) == expected({"one": flush}, "x")
            assert not asked.made

    async def test_before_a_transaction(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(when="flush")}
        with declared(recipes):
            taken, left = file("x"), file("y")
            async with env.sessions.begin() as session:
                await taken.store(Doc.file)
                await left.store(Doc.file)
                assert set(taken.ref.variants or ()) == {"thumb"}
                session.add(Doc(id=1, file=taken))
            assert await shown(env) == expected(recipes, "x")
            variants = (left.ref.variants or {}).values()
            for ref in (left.ref, *variants):
                await env.manager.delete(ref)
            await env.recover()

    async def test_of_a_file_on_disk(self, env: OrmEnvironment, tmp_path: Path) -> None:
        """What a recipe has put into a temporary file is there when it is stored, and the file is gone afterwards."""
        recipes = {"thumb": Upper(when="flush", folder=tmp_path)}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x" * 1000)))
        assert await shown(env) == expected(recipes, "x" * 1000)
        assert [path for path in tmp_path.iterdir() if path.is_file()] == []

    async def test_what_clients_may_send_does_not_bind_it(self, database: Database) -> None:
        recipes = {"thumb": Upper("longer", when="flush")}
        async with orm_environment(database, max_size=5) as env:
            with declared(recipes):
                with pytest.raises(ContentTooLargeError):
                    await env.add(Doc(id=1, file=file("x" * 6)))
                await env.add(Doc(id=1, file=file("x" * 5)))
            assert await shown(env) == expected(recipes, "x" * 5)
            await env.check(file_1="x" * 5)

    async def test_of_a_stream(self, env: OrmEnvironment) -> None:
        """It is derived from what was stored: the stream is there once only."""
        recipes = {"thumb": Upper(when="flush"), "text": Upper("b", when="flush")}
        with declared(recipes):
            await env.add(Doc(id=1, file=Attachment(env.stream(b"x", b"y"))))
        assert await shown(env) == expected(recipes, "xy")


class TestOtherRows:
    async def test_a_copy_has_its_own(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(when="flush")}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")))
            async with env.sessions.begin() as session:
                first = await session.get_one(Doc, 1)
                session.add(Doc(id=2, file=first.file))
            assert await shown(env, 2) == expected(recipes, "x")
            first_ref, second_ref = await ref_of(env), await ref_of(env, 2)
            assert (first_ref.variants or {})["thumb"].location != (second_ref.variants or {})["thumb"].location
            assert recipes["thumb"].made == {b"x": 2}

    async def test_replaced_and_cleared(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(when="flush")}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2, file=file("y")))
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("z")
                (await session.get_one(Doc, 2)).file = None
            assert await shown(env) == expected(recipes, "z")
            await env.check(file_1="z")

    async def test_moved(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(when="flush")}
        with declared(recipes):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            async with env.sessions.begin() as session:
                first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
                second.other, first.file = first.file, None
            assert await shown(env, 2, "other") == expected(recipes, "x")
            assert recipes["thumb"].made == {b"x": 1}
            await env.check(other_2="x")


class TestFailures:
    async def test_rolled_back(self, env: OrmEnvironment) -> None:
        with declared({"thumb": Upper(when="flush")}):
            attachment = file("x")
            async with env.sessions() as session:
                session.add(Doc(id=1, file=attachment))
                await session.flush()
                assert attachment.variants["thumb"] is not None
                await session.rollback()
            assert attachment.is_pending
            await env.check()
            await env.add(Doc(id=2, file=attachment))
            assert attachment.variants["thumb"] is not None

    async def test_a_savepoint_rolled_back(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(when="flush")}
        with declared(recipes):
            async with env.sessions.begin() as session:
                session.add(Doc(id=1, file=file("x")))
                savepoint = await session.begin_nested()
                session.add(Doc(id=2, file=file("y")))
                await session.flush()
                await savepoint.rollback()
            assert await shown(env) == expected(recipes, "x")
            await env.check(file_1="x")

    async def test_refused(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="flush")
        recipe.refused = {b"x"}
        with declared({"thumb": recipe, "text": Upper("b", when="flush")}):
            with pytest.raises(DerivationRefusedError):
                await env.add(Doc(id=1, file=file("y")), Doc(id=2, file=file("x")))
            await env.check()

    async def test_refused_after_another_was_stored(self, env: OrmEnvironment) -> None:
        recipe, gate = Upper(when="flush"), Gate()
        recipe.refused, recipe.gate = {b"x"}, gate
        with declared({"thumb": recipe, "text": Upper("b", when="flush")}):
            saving = asyncio.create_task(save(env, Doc(id=1, file=file("x"))))
            async with asyncio.timeout(30):
                while len(await env.objects()) < 2:  # noqa: ASYNC110  # there is no event to wait for
                    await asyncio.sleep(0.01)
            gate.opened.set()
            with pytest.raises(DerivationRefusedError):
                await saving
            await env.check()

    async def test_any_other_error(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="flush")
        recipe.error = ZeroDivisionError("a mistake")
        with declared({"thumb": recipe, "text": Upper("b", when="flush")}):
            with pytest.raises(ZeroDivisionError):
                await env.add(Doc(id=1, file=file("y")))
            await env.check()

    @pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), BaseException("x")])
    async def test_an_end_that_was_not_asked_for(self, env: OrmEnvironment, error: BaseException) -> None:
        """It is a failure of the recipe, and no cancellation of the flush."""
        recipe = Upper(when="flush")
        recipe.error = error
        with declared({"thumb": recipe, "text": Upper("b", when="flush")}):
            if env.journal is None:
                with pytest.raises(DerivationFailedError, match="the recipe of the variant 'thumb' raised"):
                    await env.add(Doc(id=1, file=file("y")))
                await env.check()
                return
            await env.add(Doc(id=1, file=file("y")))
            assert set(await shown(env)) == {"text"}

    async def test_a_source_that_awaits_what_others_cancel(self, env: OrmEnvironment) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"x"
            raise asyncio.CancelledError

        with pytest.raises(RuntimeError, match="storing attachments raised CancelledError, but nothing had cancelled it"):
            await env.add(Doc(id=1, file=Attachment(chunks())))
        await env.check()

    @pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
    @pytest.mark.parametrize("place", ["key", "value"])
    async def test_media_that_no_database_takes(self, env: OrmEnvironment, text: str, place: str) -> None:
        recipe = Upper(when="flush")
        recipe.media = {"title": [text]} if place == "value" else {text: 1}
        problem = "the variant 'thumb' cannot be stored: media contains a NUL character or a lone surrogate"
        with declared({"thumb": recipe, "text": Upper("b", when="flush")}):
            if env.journal is None:
                with pytest.raises(DerivationFailedError, match=problem):
                    await env.add(Doc(id=1, file=file("y")))
                await env.check()
                return
            await env.add(Doc(id=1, file=file("y")))
            assert set(await shown(env)) == {"text"}
            with pytest.raises(DerivationFailedError, match=problem):
                async with env.sessions() as session:
                    await (await session.get_one(Doc, 1)).file.variant("thumb")

    async def test_a_file_that_is_not_there(self, env: OrmEnvironment) -> None:
        class Lost(Upper):
            @contextlib.asynccontextmanager
            async def make(self, source: DerivationSource, /) -> AsyncIterator[Derivation]:
                yield Derivation(Path("/none"), "text/plain")

        with declared({"thumb": Lost(when="flush")}):
            if env.journal is None:
                with pytest.raises(DerivationFailedError, match="the file of the variant 'thumb' cannot be read"):
                    await env.add(Doc(id=1, file=file("y")))
                await env.check()
                return
            await env.add(Doc(id=1, file=file("y")))
            assert await shown(env) == {}

    async def test_failed(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="flush")
        recipe.failing = {b"x"}
        recipes = {"thumb": recipe, "text": Upper("b", when="flush")}
        with declared(recipes):
            if env.journal is None:
                with pytest.raises(DerivationFailedError):
                    await env.add(Doc(id=1, file=file("x")))
                await env.check()
                return
            await env.add(Doc(id=1, file=file("x")))
            assert set(await shown(env)) == {"text"}
            recipe.failing = set()
            assert (await env.journal.recover()).derived == 1
            assert await shown(env) == expected(recipes, "x")

    @pytest.mark.parametrize("number", [1, 2, 3])
    async def test_an_upload_that_fails(self, env: OrmEnvironment, number: int) -> None:
        with declared({"thumb": Upper(when="flush"), "text": Upper("b", when="flush")}):
            env.backend.fail("put_bytes", nth=number)
            with pytest.raises(BackendUnavailableError):
                await env.add(Doc(id=1, file=file("x")))
            await env.check()

    async def test_cancelled_at_every_await(self, env: OrmEnvironment) -> None:
        recipes = {"thumb": Upper(when="flush"), "text": Upper("b", when="flush")}

        at, reached = 0, True
        with declared(recipes, ("other", recipes)):
            while reached:
                steps = Steps(save(env, Doc(id=1, file=file("x"), other=file("y"))), {at}, 0)
                await steps.run()
                reached = steps.reached
                references = await env.references()
                assert not references or await shown(env) == expected(recipes, "x")
                async with env.sessions.begin() as session:
                    await session.execute(delete(Doc))
                await env.recover()
                at += 1
        assert at > 5
        if env.journal is not None:
            assert await env.objects() == set()

    async def test_cancelled_while_one_is_made(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="flush")
        recipe.gate = Gate()
        with declared({"text": Upper("b", when="flush"), "thumb": recipe}):
            saving = asyncio.create_task(save(env, Doc(id=1, file=file("x"))))
            async with asyncio.timeout(30):
                await recipe.gate.reached.wait()
            saving.cancel()
            await asyncio.wait([saving])
            assert saving.cancelled()
            await env.recover()
            await env.check()
