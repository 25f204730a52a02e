"""What triggers do on every database alike; the file of each database has what only its SQL can do."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, inspect, text
from sqlalchemy.exc import IntegrityError

from granite_storage import StoredObjectRef
from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.orm import Attachment, AttachmentType, journal_tables, storage_triggers
from granite_storage.orm.journal.deletes import delete_id
from granite_storage.orm.journal.triggers import find_trigger_problems, sources_of
from tests.orm.conftest import new_database
from tests.orm.databases import WITH_JOURNAL, Database
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import (
    Base,
    Doc,
    Parent,
    Picture,
    environment,
    locations,
    put,
    refused,
    run,
    stored,
    stored_with_variant,
)
from tests.orm.journal.sharing import steps_are_watched, worker
from tests.orm.journal.test_recovery import expire, journal_of, rows


@pytest.fixture(scope="session", params=WITH_JOURNAL)
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """A database of these tests' own: its tables have triggers."""
    async with new_database(request, request.param) as found:
        yield found


@pytest.fixture
async def env(database: Database) -> AsyncIterator[OrmEnvironment]:
    """Empty tables with triggers, an empty storage and a journal; afterwards recovery leaves what rows refer to, and no more."""
    async with environment(database) as env:
        yield env
        await env.recover()
        assert await env.objects() == locations(*(await env.references()).values())


async def nominated(env: OrmEnvironment) -> set[str]:
    """Return what waits to be deleted; each object has one intent, with its own id where the triggers can make one."""
    found = [row for row in await rows(env, "intent") if not env.database.is_sqlite or row.kind == "delete"]
    assert len({row.location for row in found}) == len(found)
    if not env.database.is_sqlite:
        assert all(row.kind == "delete" and row.id == delete_id(row.backend, row.location) for row in found)
    return {row.location for row in found}


def drop_variants(env: OrmEnvironment, table: str) -> str:
    """Return the SQL that lets the files of a table have no variants."""
    on_postgresql, elsewhere = "UPDATE %s SET file = file - 'variants'", "UPDATE %s SET file = JSON_REMOVE(file, '$.variants')"
    return (on_postgresql if env.database.is_postgres else elsewhere) % table


class TestGuard:
    async def test_what_a_plain_column_holds(self, env: OrmEnvironment) -> None:
        ref = await put(env)
        assert not await refused(env, "INSERT INTO link VALUES (1, {ref})", ref=ref)
        assert not await refused(env, "INSERT INTO doc (id, file) SELECT id, ref FROM link")
        await run(env, "DELETE FROM link")
        assert await nominated(env) == set()

    @pytest.mark.parametrize("step", ["_check", "_remove", "_conclude"])
    async def test_an_undo_while_the_object_is_deleted(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc")
        with steps_are_watched(monkeypatch):
            async with worker(env, step):
                assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_what_a_row_of_another_metadata_holds(self, env: OrmEnvironment) -> None:
        """The guard does not look there, and says so; an adopted ref may be copied."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        other, copy = with_table("note"), "INSERT INTO note (id, file) SELECT id, file FROM doc"
        async with env.engine.begin() as connection:
            await connection.run_sync(other.create_all)
        try:
            with pytest.raises(IntegrityError, match="or only rows of other models or schemas hold it"):
                await run(env, copy)
            await journal_of(env).adopt([ref])
            await run(env, copy)
        finally:
            await env.sql("DROP TABLE note")
        assert await nominated(env) == locations(ref)

    async def test_the_tables_of_the_journal_are_elsewhere(self, env: OrmEnvironment) -> None:
        async with env.engine.connect() as connection:
            await connection.execution_options(schema_translate_map={None: "nowhere"})
            with pytest.raises(ConfigurationError, match=r"is not there.*schema of their own: journal_tables"):
                await connection.run_sync(sources_of, Base.metadata)

    async def test_a_location_that_has_a_blank_more(self, env: OrmEnvironment) -> None:
        """Collations of MariaDB ignore blanks at the end; another object is meant all the same."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        other = StoredObjectRef.from_dict({**ref.to_dict(), "location": f"{ref.location} "})
        statements = ("INSERT INTO doc (id, file) VALUES (2, {other})", "UPDATE doc SET other = {other}")
        for statement in statements:
            assert await refused(env, statement, other=other), statement
        await stored(env, Doc(id=3))
        await run(env, "DELETE FROM doc WHERE id = 1")
        for statement in statements:
            assert await refused(env, statement, other=other), f"{statement}, with an intent"
        assert (await journal_of(env).recover()).deleted == 1

    async def test_a_key_that_is_spelled_with_escapes(self, env: OrmEnvironment) -> None:
        """A reader of the ref does not see how it was spelled; SQL may."""
        ref = await put(env)
        await journal_of(env).adopt([ref])
        await run(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
        gone = {**ref.to_dict(), "location": f"{ref.location}-gone"}
        for key, changed in (("location", gone), ("variants", {**ref.to_dict(), "variants": {"thumb": gone}})):
            value = json.dumps(changed)
            spelled = value.replace(f'"{key}"', f'"\\u{ord(key[0]):04x}{key[1:]}"')
            assert json.loads(spelled) == changed
            assert spelled != value
            for statement in ("INSERT INTO doc (id, file) VALUES (2, :value)", "UPDATE doc SET other = :value"):
                if env.database.is_postgres:
                    statement = statement.replace(":value", "CAST(:value AS jsonb)")
                with pytest.raises(IntegrityError, match=r"gone or going|is spelled with escapes"):
                    async with env.engine.begin() as connection:
                        await connection.execute(text(statement), {"value": spelled})


class TestVariants:
    @pytest.fixture
    async def ref(self, env: OrmEnvironment) -> StoredObjectRef:
        return await stored_with_variant(env)

    async def test_they_go_with_their_original(self, env: OrmEnvironment, ref: StoredObjectRef) -> None:
        await run(env, "INSERT INTO parent SELECT id, file FROM doc")
        await run(env, "UPDATE doc SET file = NULL")
        assert await nominated(env) == locations(ref)
        assert (await journal_of(env).recover()).kept == 2
        await run(env, drop_variants(env, "parent"))
        assert (await journal_of(env).recover()).deleted == 1
        await run(env, "DELETE FROM parent")
        assert (await journal_of(env).recover()).deleted == 1

    async def test_undone(self, env: OrmEnvironment, ref: StoredObjectRef) -> None:
        await run(env, drop_variants(env, "doc"))
        await run(env, "UPDATE doc SET file = {ref}", ref=ref)
        await run(env, "DELETE FROM doc")
        await run(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
        assert (await journal_of(env).recover()).kept == 2

    async def test_that_are_not_those_of_the_original(self, env: OrmEnvironment, ref: StoredObjectRef) -> None:
        """A worker looks for a variant in the rows that hold its original; so it must be in none else."""
        [other] = await stored(env, Parent(id=1, file=file("b")))
        variant = (ref.variants or {})["thumb"]
        moved = other.with_variants({"thumb": variant})
        for is_pending in (False, True):
            if is_pending:
                await run(env, "INSERT INTO child (id, parent_id, file) SELECT 1, 1, file FROM doc", "DELETE FROM child")
                assert await nominated(env) == locations(ref)
            for statement in ("INSERT INTO doc (id, file) VALUES (2, {moved})", "UPDATE parent SET file = {moved}"):
                assert await refused(env, statement, moved=moved), (statement, is_pending)
            assert await refused(env, "UPDATE doc SET file = {moved}", moved=moved)
            assert await refused(env, "INSERT INTO doc (id, file) VALUES (2, {variant})", variant=variant)
            assert await refused(env, "UPDATE doc SET other = {variant}", variant=variant)


class TestSessions:
    async def test_one_intent_for_one_object(self, env: OrmEnvironment) -> None:
        refs = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")), Doc(id=3, file=file("c")))
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 1))
            (await session.get_one(Doc, 2)).file = file("d")
            (await session.get_one(Doc, 3)).file = None
        assert await nominated(env) == locations(*refs)
        found = [row for row in await rows(env, "intent") if row.kind == "delete"]
        assert all(row.id == delete_id(row.backend, row.location) for row in found), "the library's ids, of which undos know"
        assert (await journal_of(env).recover()).deleted == 3

    async def test_what_it_moves_leaves_nothing_behind(self, env: OrmEnvironment) -> None:
        await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with env.sessions.begin() as session:
            one, two = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
            one.file, two.file = two.file, one.file
        async with env.sessions.begin() as session:
            one = await session.get_one(Doc, 1)
            one.file, one.other = None, one.file
            await session.flush()
            one.file, one.other = one.other, None
        assert await nominated(env) == set()

    async def test_a_refusal(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        unknown = StoredObjectRef.from_dict({**ref.to_dict(), "location": f"{ref.location}-unknown"})
        said = r"of doc\.file is gone or going" if env.database.is_sqlite else "gone or going"
        async with env.sessions() as session:
            with pytest.raises(StaleAttachmentError, match=said) as caught:
                await run(await session.connection(), "UPDATE doc SET file = {ref}", ref=unknown)
        assert "gone or going" in str(caught.value.__cause__), "the driver's error"
        with pytest.raises(IntegrityError, match="gone or going"):
            await run(env, "UPDATE doc SET file = {ref}", ref=unknown)

    @pytest.mark.parametrize("statement", ["DELETE FROM doc", "UPDATE doc SET file = NULL"])
    @pytest.mark.parametrize("in_savepoint", [False, True])
    async def test_a_restore_after_sql_in_the_same_transaction(
        self, env: OrmEnvironment, statement: str, in_savepoint: bool
    ) -> None:
        ref = await stored_with_variant(env)
        async with env.sessions.begin() as session:
            if in_savepoint:
                async with session.begin_nested():
                    await session.execute(text(statement))
            else:
                await session.execute(text(statement))
            session.add(Doc(id=2, file=Attachment.restore(ref)))
        assert await nominated(env) == set()
        [restored] = (await env.references()).values()
        assert locations(restored) == locations(ref)

    async def test_a_restore_after_sql_that_was_rolled_back(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            savepoint = await session.begin_nested()
            await session.execute(text("DELETE FROM doc"))
            await savepoint.rollback()
            session.add(Doc(id=2, file=Attachment.restore(ref)))
            with pytest.raises(StaleAttachmentError, match="has no pending delete"):
                await session.flush()

    async def test_variants_that_a_worker_makes(self, env: OrmEnvironment) -> None:
        await env.add(Picture(id=1, file=file("a")))
        assert (await journal_of(env).recover()).derived == 1
        [ref] = (await env.references()).values()
        assert locations(ref) == await env.objects()
        assert not env.database.is_sqlite or await rows(env, "decision") == []
        async with env.sessions.begin() as session:
            (await session.get_one(Picture, 1)).file = file("b")
        assert await nominated(env) == locations(ref)


class TestRenamed:
    """What the models name is renamed by hand: the checks say what is gone, and whose triggers are about it."""

    @pytest.mark.parametrize(
        ("there", "back", "gone"),
        [
            ("doc RENAME TO docs", "docs RENAME TO doc", "the table {}doc"),
            ("link RENAME TO links", "links RENAME TO link", "the table {}link"),
            ("doc RENAME COLUMN file TO document", "doc RENAME COLUMN document TO file", "the column file of {}doc"),
            ("link RENAME COLUMN ref TO held", "link RENAME COLUMN held TO ref", "the column ref of {}link"),
        ],
    )
    async def test_it_is_named(self, env: OrmEnvironment, there: str, back: str, gone: str) -> None:
        assert await journal_of(env).find_trigger_problems() == []
        async with env.engine.connect() as connection:
            schema = await connection.run_sync(lambda sync: inspect(sync).default_schema_name)
        prefix = "" if env.database.is_sqlite else f"{schema}."
        await env.sql(f"ALTER TABLE {there}")
        try:
            problems = await journal_of(env).find_trigger_problems()
            [said] = [one for one in problems if gone.format(prefix) in one and "which is gone" in one]
            tables, _, _ = said.removeprefix("the triggers of ").partition(gone.format(prefix))
            now = "docs" if there.startswith("doc RENAME TO") else "doc"
            for table in ("parent", "child", now):
                assert f"{prefix}{table}" in re.split(r"[ ,]+", tables), said
        finally:
            await env.sql(f"ALTER TABLE {back}")
        assert await journal_of(env).find_trigger_problems() == []

    async def test_all_tables_with_files(self, env: OrmEnvironment) -> None:
        """None is left for which triggers could be compared."""
        models = with_table("note")
        async with env.engine.begin() as connection:
            await connection.run_sync(models.create_all)
            await connection.execute(text("ALTER TABLE note RENAME TO notes"))
            try:
                problems = await connection.run_sync(find_trigger_problems, models)
                assert [one for one in problems if re.search(r"triggers of .*notes\b.*the table \S*note\b", one)] == problems
                assert len(problems) == 1
            finally:
                await connection.execute(text("DROP TABLE notes"))

    async def test_models_with_the_new_name(self, env: OrmEnvironment) -> None:
        ref = await put(env)
        before, after = with_table("note"), with_table("notes")
        async with env.engine.begin() as connection:
            await connection.run_sync(before.create_all)
            await connection.execute(text("ALTER TABLE note RENAME TO notes"))
            await connection.run_sync(after.create_all)
        try:
            async with env.engine.connect() as connection:
                assert await connection.run_sync(find_trigger_problems, after) == []
            assert await refused(env, "INSERT INTO notes (id, file) VALUES (1, {ref})", ref=ref)
            await journal_of(env).adopt([ref])
            await run(env, "INSERT INTO notes (id, file) VALUES (1, {ref})", "DELETE FROM granite_storage_intent", ref=ref)
            await run(env, "DELETE FROM notes")
            assert await nominated(env) == locations(ref)
            async with env.engine.begin() as connection:  # under the earlier name, of which triggers are left
                await connection.execute(text("ALTER TABLE notes RENAME TO note"))
                await connection.run_sync(before.create_all)
                assert await connection.run_sync(find_trigger_problems, before) == []
                await connection.execute(text("UPDATE note SET id = 2"))
                await connection.execute(text("ALTER TABLE note RENAME TO notes"))
        finally:
            await env.sql("DROP TABLE notes")


def with_table(name: str) -> MetaData:
    """Return models of which one table has files."""
    metadata = MetaData()
    Table(name, metadata, Column("id", Integer, primary_key=True), Column("file", AttachmentType("docs")))
    journal_tables(metadata)
    storage_triggers(metadata)
    return metadata


class TestAdoption:
    async def test_rows_from_elsewhere(self, env: OrmEnvironment) -> None:
        """What is loaded stays, and what is not loaded goes when the lease is over."""
        loaded, left = await put(env, "a"), await put(env, "b")
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=loaded)
        await journal_of(env).adopt([loaded.with_variants({"thumb": left})])
        assert (await journal_of(env).recover()).claimed == 0
        await run(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=loaded)
        await expire(env)
        report = await journal_of(env).recover()
        assert (report.kept, report.deleted) == (1, 1)
        assert await env.objects() == {loaded.location}
