"""Variants to which more than one row refers: each stays until nothing does, and no longer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.rederivation import rederive
from tests.orm.databases import Database
from tests.orm.derivations import Upper, column_type, declared, ref_of, shown
from tests.orm.environment import Child, Doc, OrmEnvironment, Parent, file, orm_environment
from tests.orm.sharing import SHARED, TAKEN, emptied, named_by_a_plain_ref

pytestmark = pytest.mark.case("RE-03")


ON_EACH_DATABASE = [*(("made again", how) for how in SHARED), ("deleted", "a plain ref"), ("deleted in bulk", "a plain ref")]


@pytest.mark.parametrize(("what", "how"), ON_EACH_DATABASE)
async def test_a_variant_stays_while_anything_refers_to_it(env: OrmEnvironment, what: str, how: str) -> None:
    await require_kept(env, what, how)


@pytest.mark.parametrize(
    ("what", "how"), [(what, how) for what in TAKEN for how in SHARED if (what, how) not in ON_EACH_DATABASE]
)
async def test_whatever_takes_it(env: OrmEnvironment, what: str, how: str) -> None:
    await require_kept(env, what, how)


async def require_kept(env: OrmEnvironment, what: str, how: str) -> None:
    """Take a variant from its row, and check that it stays where something else refers to it."""
    recipe = Upper(when="flush")
    with declared({"thumb": recipe}, ("other", {"thumb": recipe})):
        await env.add(Doc(id=1, file=file("x")))
        original = await ref_of(env)
        [variant] = (original.variants or {}).values()
        async with SHARED[how](env, original):
            await TAKEN[what](env)
            await env.recover()
            assert await env.manager.get(variant) == recipe.result(b"x")
            is_left = how != "a plain ref" or what in ("made again", "not declared")
            assert (original.location in await env.objects()) is is_left
            await emptied(env)


async def test_a_cascade(env: OrmEnvironment) -> None:
    recipe = Upper(when="flush")
    with declared({"thumb": recipe}, model=Child):
        await env.add(Parent(id=1, children=[Child(id=1, file=file("x"))]))
        original = (await env.references())["child", 1, "file"]
        [variant] = (original.variants or {}).values()
        async with named_by_a_plain_ref(env, variant):
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Parent, 1))
            await env.recover()
            assert await env.objects() == {variant.location}
            await emptied(env)


@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
async def test_a_flush_that_is_rolled_back(env: OrmEnvironment) -> None:
    """A row that was committed beside the transaction refers to a variant that the transaction has stored."""
    recipe = Upper(when="flush")
    with declared({"thumb": recipe}):
        async with env.sessions() as session:
            doc = Doc(id=1, file=file("x"))
            session.add(doc)
            await session.flush()
            assert doc.file is not None
            [variant] = (doc.file.ref.variants or {}).values()
            async with named_by_a_plain_ref(env, variant):
                await session.rollback()
                assert await env.objects() == {variant.location}
                await emptied(env)


async def test_rows_with_variants_of_their_own_share_an_original(env: OrmEnvironment) -> None:
    """Each row's leave with it, and nothing is left to the garbage collector."""
    recipes = {"thumb": Upper(when="flush")}
    with declared(recipes, ("other", recipes)):
        await env.add(Doc(id=1, file=file("x")))
        await env.sql("INSERT INTO doc (id, title, other) SELECT 2, '', file FROM doc")
        before = await env.objects()
        await rederive(env.binding, which="all", columns=["doc.file"])
        await env.recover()
        assert before < await env.objects()
        await rederive(env.binding, which="all", columns=["doc.other"])
        await env.recover()
        first, second = await ref_of(env), (await env.references())["doc", 2, "other"]
        kept = {second.location, *(one.location for one in (second.variants or {}).values())}
        assert await env.objects() == {*kept, *(one.location for one in (first.variants or {}).values())}
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = None
        await env.recover()
        assert await env.objects() == kept
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 2))
        await env.recover()
        assert await env.objects() == set()


@pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
async def test_shared_after_the_snapshot(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """At REPEATABLE READ, as MariaDB has it, a transaction does not see a row that was committed since it began."""
    recipe = Upper(when="flush")
    commit = type(env.sessions()).commit
    with declared({"thumb": recipe}):
        await env.add(Doc(id=1, file=file("x")))
        [variant] = ((await ref_of(env)).variants or {}).values()
        await env.sql("CREATE TABLE held AS SELECT file FROM doc")

        async def share_and_commit(self: Any) -> None:
            monkeypatch.undo()
            await env.sql("INSERT INTO node (id, file) SELECT 1, file FROM held")
            await commit(self)

        monkeypatch.setattr(type(env.sessions()), "commit", share_and_commit)
        await rederive(env.binding, which="all", columns=["doc.file"])
        assert (await ref_of(env)).variants != {"thumb": variant}
        assert await env.manager.get(variant) == recipe.result(b"x")
    await env.sql("DELETE FROM node")
    await env.sql("DROP TABLE held")
    await emptied(env)


async def test_variants_that_cannot_be_read(env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
    """A row that holds the original may name any object: everything stays."""
    with declared({"thumb": Upper(when="flush")}):
        await env.add(Doc(id=1, file=file("x")))
        before = await env.objects()
        text_of = 'CAST(REPLACE(CAST(file AS TEXT), \'"thumb"\', \'"a": 1, "b"\') AS JSONB)'
        if not env.database.is_postgres:
            text_of = 'REPLACE(file, \'"thumb"\', \'"a": 1, "b"\')'
        await env.sql(f"INSERT INTO node (id, file) SELECT 1, {text_of} FROM doc")  # noqa: S608
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 1))
        assert await env.objects() == before
        assert "it is unknown whether other rows refer to 2 displaced objects" in caplog.text
    await env.sql("DELETE FROM node")
    await emptied(env)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_damaged_row_beside(env: OrmEnvironment) -> None:
    """SQLite's JSON functions fail on a value that is not JSON: rows are then searched one table after the other."""
    recipe = Upper(when="flush")
    with declared({"thumb": recipe}):
        await env.add(Doc(id=1, file=file("x")))
        original = await ref_of(env)
        [variant] = (original.variants or {}).values()
        await env.sql("INSERT INTO node (id, file) VALUES (1, '{')")
        async with named_by_a_plain_ref(env, original):
            await TAKEN["made again"](env)
            assert await env.manager.get(variant) == recipe.result(b"x")
            await emptied(env)
        await env.sql("DELETE FROM node")


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_write_that_a_rollback_leaves(database: Database) -> None:
    """A driver in autocommit mode has committed the first row's UPDATE when that of the second one fails."""
    recipe = Upper(when="flush", version=2)
    async with orm_environment(database, connect_args={"isolation_level": None}) as env:
        with declared({"thumb": Upper(when="flush")}):
            await env.add(Doc(id=1, file=file("x")))
            await env.sql("INSERT INTO doc (id, title, file) SELECT 2, title, file FROM doc")
        await env.sql(
            "CREATE TRIGGER refuse BEFORE UPDATE OF file ON doc WHEN OLD.id = 2 BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
        try:
            with declared({"thumb": recipe}), pytest.raises(IntegrityError):
                await env.binding.make_variant(column_type(), await ref_of(env), "thumb", which="stale")
        finally:
            await env.sql("DROP TRIGGER refuse")
        assert await shown(env, 1) == {"thumb": recipe.result(b"x")}
        await emptied(env)


async def test_autocommit(database: Database) -> None:
    async with orm_environment(database, isolation_level="AUTOCOMMIT") as env:
        with declared({"thumb": Upper(when="request")}):
            source = await _stored(env)
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await env.binding.make_variant(column_type(), source, "thumb")
        await emptied(env)


async def _stored(env: OrmEnvironment) -> Any:
    """Store a file, and let a row refer to it, though the sessions could not."""
    attachment = file("x")
    await attachment.store(Doc.file)
    as_json = "CAST(:file AS JSONB)" if env.database.is_postgres else ":file"
    async with env.engine.begin() as connection:
        insert = text(f"INSERT INTO doc (id, title, file) VALUES (1, '', {as_json})")  # noqa: S608
        await connection.execute(insert, {"file": json.dumps(attachment.ref.to_dict())})
    return attachment.ref


@pytest.mark.parametrize("database", ["sqlite", "sqlite-begin"], indirect=True)
async def test_the_callers_own_transaction(database: Database) -> None:
    """On SQLite any transaction that has written keeps the variant waiting, and the driver bounds the wait."""
    async with orm_environment(database, connect_args={"timeout": 0.2}) as env:
        with declared({"card": Upper(when="request")}):
            await env.add(Doc(id=1, file=file("x")), Doc(id=2))
            async with env.sessions() as session:
                doc = await session.get_one(Doc, 1)
                (await session.get_one(Doc, 2)).title = "changed"
                await session.flush()
                assert doc.file is not None
                with pytest.raises(StaleAttachmentError, match=r"has locked the rows .* for 0 s.*the caller's own"):
                    await doc.file.variant("card")
                await session.commit()
                await doc.file.variant("card")
