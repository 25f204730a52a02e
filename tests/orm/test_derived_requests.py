"""Variants as the application sees them: those that a row has, and those that are made when they are asked for."""

from __future__ import annotations

import asyncio
import copy
import pickle
from datetime import timedelta
from typing import Any

import pytest
from fastapi.encoders import jsonable_encoder
from pydantic import TypeAdapter
from sqlalchemy import delete, text

from granite_storage import Attachment, ConfigurationError, StaleAttachmentError
from granite_storage.exceptions import (
    BackendUnavailableError,
    DerivationFailedError,
    DerivationRefusedError,
    UnboundAttachmentError,
    UnknownVariantError,
)
from granite_storage.orm import AttachmentVariant
from granite_storage.orm import binding as binding_module
from granite_storage.orm import variants as variants_module
from granite_storage.orm.journal import variant_jobs
from granite_storage.rederivation import rederive
from granite_storage.web import problem_response
from tests.orm.databases import Database
from tests.orm.derivations import Gate, Upper, declared, expected, ref_of, shown
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.test_cancellation import Steps


async def stored(env: OrmEnvironment, number: int = 1) -> Attachment:
    """Return the file of a row."""
    async with env.sessions() as session:
        found = (await session.get_one(Doc, number)).file
    assert found is not None
    return found


class TestAsked:
    async def test_made_and_kept(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            assert attachment.variants["card"] is None
            card = await attachment.variant("card")
            assert (await card.read(), card.size, card.content_type) == (recipe.result(b"x"), 3, "text/x-upper")
            assert await card.exists()
            assert not card.is_original
            assert attachment.variants["card"] == card
            assert await shown(env) == {"card": recipe.result(b"x")}
            again = await (await stored(env)).variant("card")
            assert again == card
            assert recipe.made == {b"x": 1}
        await env.check(file_1="x")

    async def test_beside_others(self, env: OrmEnvironment) -> None:
        recipes = {"now": Upper("n", when="flush"), "one": Upper("a", when="request"), "two": Upper("b", when="request")}
        with declared(recipes):
            await env.add(Doc(id=1, title="t", file=file("x")))
            attachment = await stored(env)
            await attachment.variant("one")
            await (await stored(env)).variant("two")
            assert await shown(env) == expected(recipes, "x")

    async def test_several_at_once_share_the_work(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            files = [await stored(env) for _ in range(5)]
            cards = await asyncio.gather(*(attachment.variant("card") for attachment in files))
            assert len({card.location for card in cards}) == 1
            assert recipe.made == {b"x": 1}

    async def test_one_of_several_is_cancelled(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        gate = recipe.gate = Gate()
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            first, second = (asyncio.create_task(attachment.variant("card")) for _ in range(2))
            await gate.reached.wait()
            first.cancel()
            await asyncio.wait([first])
            gate.opened.set()
            assert await (await second).read() == recipe.result(b"x")
            assert first.cancelled()
            recipe.gate = gate = Gate()

    async def test_all_of_them_are_cancelled(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        gate = recipe.gate = Gate()
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            both = [asyncio.create_task(attachment.variant("card")) for _ in range(2)]
            await gate.reached.wait()
            for task in both:
                task.cancel()
            await asyncio.wait(both)
            assert not recipe.made
            await env.recover()
            await env.check(file_1="x")

    async def test_another_process_is_faster(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = Upper(when="request")
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            files = [await stored(env), await stored(env)]
            monkeypatch.setattr(binding_module, "share", lambda _, work: work())
            cards = await asyncio.gather(*(attachment.variant("card") for attachment in files))
            assert cards[0] == cards[1]
            await env.recover()
            await env.check(file_1="x")

    async def test_not_committed(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        with declared({"card": recipe}):
            async with env.sessions() as session:
                doc = Doc(id=1, file=file("x"))
                session.add(doc)
                assert doc.file is not None
                with pytest.raises(UnboundAttachmentError):
                    await doc.file.variant("card")
                await session.flush()
                with pytest.raises(StaleAttachmentError, match="no committed row refers to the object"):
                    await doc.file.variant("card")
                await session.commit()
                assert await (await doc.file.variant("card")).read() == recipe.result(b"x")

    async def test_replaced(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        gate = Gate()
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            recipe.gate = gate
            making = asyncio.create_task(attachment.variant("card"))
            await gate.reached.wait()
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("y")
            gate.opened.set()
            with pytest.raises(StaleAttachmentError):
                await making
            with pytest.raises(StaleAttachmentError):
                await attachment.variant("card")
            await env.recover()
            await env.check(file_1="y")

    async def test_a_name_that_is_not_declared(self, env: OrmEnvironment) -> None:
        with declared({"card": Upper(when="request")}):
            await env.add(Doc(id=1, file=file("x"), other=file("y")))
            attachment = await stored(env)
            with pytest.raises(UnknownVariantError, match=r"^doc.file declares no variant 'thumb' \(there are: card\)") as found:
                await attachment.variant("thumb")
            assert problem_response(found.value).status_code == 404
            with pytest.raises(KeyError):
                attachment.variants["thumb"]
            assert "thumb" not in attachment.variants

    async def test_replaced_before_it_is_read(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = Upper(when="request")
        original = variants_module.make_variant

        async def make(*args: Any) -> Any:
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("y")
            await env.recover()
            return await original(*args)

        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            monkeypatch.setattr(variants_module, "make_variant", make)
            monkeypatch.setattr(variant_jobs, "make_variant", make)
            with pytest.raises(StaleAttachmentError):
                await attachment.variant("card")

    @pytest.mark.parametrize("error", [DerivationRefusedError, DerivationFailedError, BackendUnavailableError])
    async def test_it_cannot_be_made(self, env: OrmEnvironment, error: type[Exception]) -> None:
        recipe = Upper(when="request")
        recipe.refused, recipe.failing = {b"r"}, {b"f"}
        content = {DerivationRefusedError: "r", DerivationFailedError: "f"}.get(error, "x")
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file(content)))
            attachment = await stored(env)
            if error is BackendUnavailableError:
                env.backend.fail("put_bytes")
            with pytest.raises(error):
                await attachment.variant("card")
            await env.recover()
            await env.check(file_1=content)

    async def test_cancelled_at_every_await(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="request")
        at, reached = 0, True
        with declared({"card": recipe}):
            while reached:
                await env.add(Doc(id=1, file=file("x")))
                attachment = await stored(env)
                steps = Steps(ask(attachment), {at}, 0)
                await steps.run()
                reached = steps.reached
                if env.journal is not None:
                    await env.recover()
                ref = await ref_of(env)
                assert await env.objects() == {ref.location, *(one.location for one in (ref.variants or {}).values())}
                await attachment.variant("card")
                assert await shown(env) == {"card": recipe.result(b"x")}
                async with env.sessions.begin() as session:
                    await session.execute(delete(Doc))
                at += 1
        await env.recover()


async def ask(attachment: Attachment) -> None:
    await attachment.variant("card")


class TestShown:
    async def test_missing(self, env: OrmEnvironment) -> None:
        with declared({"a": Upper(when="request"), "b": Upper(when="request", missing="original")}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            assert attachment.variants.get("a") is None
            shown = attachment.variants["b"]
            assert shown is not None
            assert (shown.is_original, await shown.read(), shown.location) == (True, b"x", attachment.location)
            assert (list(attachment.variants), len(attachment.variants)) == (["a", "b"], 2)
            assert "c" not in attachment.variants

    async def test_verbs(self, env: OrmEnvironment) -> None:
        recipe = Upper("w", when="flush")
        with declared({"a": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            variant = attachment.variants["a"]
            assert variant is not None
            async with variant.open(offset=1) as reader:
                assert await reader.read() == recipe.result(b"x")[1:]
            assert (variant.original_filename, variant.media) == ("w.txt", {"letters": 4})
            assert variant.checksum.startswith("sha256:")
            with pytest.raises(ConfigurationError, match="cannot sign URLs"):
                await variant.url(expires_in=timedelta(minutes=1))
            assert await asyncio.to_thread(variant.sync.read) == recipe.result(b"x")
            assert await asyncio.to_thread(variant.sync.exists)
            copied = pickle.loads(pickle.dumps(attachment))  # noqa: S301  # our own
            assert copied.variants["a"] == variant
            assert hash(copied.variants["a"]) == hash(variant)
            for other in (pickle.loads(pickle.dumps(variant)), copy.deepcopy(variant)):  # noqa: S301  # our own
                assert await other.read() == await variant.read()
            assert len(pickle.dumps(attachment.variants)) < 2000

    async def test_what_is_shown_of_one(self, env: OrmEnvironment) -> None:
        """The same four fields as of an attachment, and never where it is."""
        with declared({"a": Upper(when="flush")}):
            await env.add(Doc(id=1, file=file("x")))
            variant = (await stored(env)).variants["a"]
            assert variant is not None
            shown = {"size": 3, "content_type": "text/x-upper", "original_filename": "upper.txt", "checksum": variant.checksum}
            assert shown == variant.describe() == dict(variant) == vars(variant)
            assert TypeAdapter(dict[str, AttachmentVariant]).dump_python({"a": variant}, mode="json") == {"a": shown}
            assert jsonable_encoder({"a": variant}) == {"a": shown}

    async def test_what_is_not_declared_any_more(self, env: OrmEnvironment) -> None:
        with declared({"a": Upper(when="flush")}):
            await env.add(Doc(id=1, file=file("x")))
        attachment = await stored(env)
        assert list(attachment.variants) == ["a"]
        assert attachment.variants["a"] is not None

    async def test_a_list_of_rows_is_one_query(self, env: OrmEnvironment) -> None:
        recipe = Upper(when="flush")
        with declared({"a": recipe, "b": recipe}):
            await env.add(*(Doc(id=number, file=file("x")) for number in range(1, 6)))
            async with env.sessions() as session:
                found = [await session.get_one(Doc, number) for number in range(1, 6)]
            assert all(doc.file is not None and doc.file.variants["b"] for doc in found)

    async def test_of_a_row_that_has_another_file_now(self, env: OrmEnvironment) -> None:
        with declared({"a": Upper(when="flush")}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            async with env.sessions.begin() as session:
                (await session.get_one(Doc, 1)).file = file("y")
            await env.recover()
            variant = attachment.variants["a"]
            assert variant is not None
            with pytest.raises(StaleAttachmentError):
                await variant.read()
            with pytest.raises(StaleAttachmentError):
                await variant.open()


async def test_moved_to_a_column_with_other_variants(env: OrmEnvironment) -> None:
    """With a journal its worker makes them; without one they are made when they are asked for, or by a run over the rows."""
    text, thumb = Upper("c", when="flush"), Upper("b", when="flush")
    old = Upper("a", when="flush")
    with declared({"thumb": old}, ("other", {"thumb": thumb, "text": text})):
        await env.add(Doc(id=1, file=file("x")), Doc(id=2))
        async with env.sessions.begin() as session:
            first, second = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
            second.other, first.file = first.file, None
        if env.journal is None:
            assert await shown_of(env) == {"thumb": old.result(b"x")}
            async with env.sessions() as session:
                moved = (await session.get_one(Doc, 2)).other
            assert moved is not None
            assert await (await moved.variant("text")).read() == text.result(b"x")
            assert await (await moved.variant("thumb")).read() == old.result(b"x")
            await rederive(env.binding, which="stale")
        await env.recover()
        assert await shown_of(env) == {"thumb": thumb.result(b"x"), "text": text.result(b"x")}
        await env.check(other_2="x")


async def shown_of(env: OrmEnvironment) -> dict[str, bytes]:
    """Return the contents of the variants in the second column of row 2."""
    ref = (await env.references())["doc", 2, "other"]
    return {name: await env.manager.get(variant) for name, variant in (ref.variants or {}).items()}


async def test_without_sessions(database: Database) -> None:
    recipe = Upper(when="request")
    async with orm_environment(database) as env:
        env.binding.session_factory = None
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            with pytest.raises(ConfigurationError, match="needs sessions"):
                await (await stored(env)).variant("card")


async def test_a_commit_of_which_nothing_is_known(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object stays: a row may have it."""
    recipe = Upper(when="request")
    async with orm_environment(database) as env:
        with declared({"card": recipe}):
            await env.add(Doc(id=1, file=file("x")))
            attachment = await stored(env)
            run = variants_module._Setting.run

            async def lose(self: variants_module._Setting, variant: object) -> None:
                await run(self, variant)  # type: ignore[arg-type]
                self.outcome = variants_module._Outcome.IN_DOUBT
                raise BackendUnavailableError("the connection is lost")

            monkeypatch.setattr(variants_module._Setting, "run", lose)
            with pytest.raises(BackendUnavailableError):
                await attachment.variant("card")
            assert await shown(env) == {"card": recipe.result(b"x")}


async def test_a_row_that_is_locked(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    if database.is_sqlite:
        pytest.skip("SQLite bounds the wait itself")
    monkeypatch.setattr(variants_module, "LONGEST_WAIT", 0.3)
    async with orm_environment(database) as env:
        with declared({"card": Upper(when="request")}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.engine.begin() as connection:
                await connection.execute(text("SELECT id FROM doc WHERE id = 1 FOR UPDATE"))
                with pytest.raises(StaleAttachmentError, match=r"has locked the rows .* the caller.s own"):
                    await (await stored(env)).variant("card")
            await env.check(file_1="x")
