"""The triggers of the journal: objects and references agree, whichever client writes the rows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_mock_engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from granite_storage import StorageGarbageCollector, StoredObjectRef
from granite_storage.cli.doctor import CheckResult, _check_journal
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError, ObjectNotFoundError, StaleAttachmentError
from granite_storage.orm import Attachment, AttachmentType, StorageJournal, bind_storage, journal_tables, storage_triggers
from granite_storage.orm.journal import references
from granite_storage.orm.journal.deletes import delete_id
from granite_storage.orm.journal.triggers import find_trigger_problems
from granite_storage.orm.journal.variant_jobs import VariantJobs
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import (
    Base,
    Child,
    Doc,
    Grandchild,
    Parent,
    Part,
    Picture,
    code_of,
    environment,
    locations,
    put,
    refused,
    run,
    stored,
)
from tests.orm.journal.sharing import steps_are_watched, worker
from tests.orm.journal.test_recovery import expire, journal_of, rows
from tests.orm.journal.test_rollout import beat_without_version, forget


@pytest.fixture(scope="session", params=["asyncpg", "psycopg"])
async def database(request: pytest.FixtureRequest) -> Any:
    """PostgreSQL, with a database of these tests' own: its tables have triggers."""
    from tests.orm.conftest import new_database

    async with new_database(request, request.param) as found:
        yield found


@pytest.fixture
async def env(database: Any) -> AsyncIterator[OrmEnvironment]:
    """Empty tables with triggers, an empty storage and a journal; afterwards recovery leaves what rows refer to, and no more."""
    async with environment(database) as env:
        yield env
        await env.recover()
        assert await env.objects() == await referenced(env)


async def referenced(env: OrmEnvironment) -> set[str]:
    return locations(*(await env.references()).values())


async def nominated(env: OrmEnvironment) -> set[str]:
    found = await rows(env, "intent")
    assert all(row.id == delete_id(row.backend, row.location) and row.kind == "delete" for row in found)
    return {row.location for row in found}


async def fill(env: OrmEnvironment) -> dict[str, StoredObjectRef]:
    """Commit a row of each table."""
    names = {"doc": Doc(id=1, file=file("a")), "second": Doc(id=2, file=file("b")), "parent": Parent(id=1, file=file("p"))}
    await stored(env, *names.values())
    later = {"child": Child(id=1, parent_id=1, file=file("c")), "part": Part(id=1, kind=1, file=file("t"))}
    last = {"grandchild": Grandchild(id=1, child_id=1, file=file("g"))}
    for group in (later, last):
        await stored(env, *group.values())
        names |= group
    return {name: instance.file.ref for name, instance in names.items()}


COPIED = """UPDATE {} SET file = '{{"location"\\: "a"}}'"""
TAKEN_OUT = {
    "DELETE FROM doc": {"doc", "second"},
    "DELETE FROM doc WHERE id = 1": {"doc"},
    "UPDATE doc SET file = NULL WHERE id = 2": {"second"},
    "UPDATE doc SET file = (SELECT p.file FROM parent p) WHERE id = 1": {"doc"},
    "WITH d AS (DELETE FROM doc WHERE id = 1 RETURNING id) UPDATE doc SET file = NULL WHERE id IN (SELECT id + 1 FROM d)": {
        "doc",
        "second",
    },
    "MERGE INTO doc USING (VALUES (1), (2)) s(i) ON id = s.i WHEN MATCHED AND id = 1 THEN DELETE"
    " WHEN MATCHED THEN UPDATE SET file = NULL": {"doc", "second"},
    "INSERT INTO doc (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET file = excluded.file": {"doc"},
    "DELETE FROM parent": {"parent", "child", "grandchild"},
    "TRUNCATE doc": {"doc", "second"},
    "TRUNCATE parent CASCADE": {"parent", "child", "grandchild"},
    "DELETE FROM part": {"part"},
    "DELETE FROM part_1": {"part"},
    "TRUNCATE part": {"part"},
    "TRUNCATE part_1": {"part"},
    "UPDATE part SET kind = 2, file = NULL": {"part"},
    "UPDATE part_1 SET file = NULL": {"part"},
    "UPDATE part SET kind = 2": set(),
    "UPDATE doc SET title = 'other'": set(),
    'UPDATE doc SET file = file || \'{"content_type"\\: "text/plain"}\' WHERE id = 1': set(),
}


@pytest.mark.parametrize("statement", TAKEN_OUT)
async def test_what_a_statement_takes_out_of_rows(env: OrmEnvironment, statement: str) -> None:
    refs = await fill(env)
    await run(env, statement)
    assert await nominated(env) == {refs[name].location for name in TAKEN_OUT[statement]}
    assert (await journal_of(env).recover()).deleted == len(TAKEN_OUT[statement])


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_what_a_truncate_sees_may_be_gone(env: OrmEnvironment, level: str, is_nested: bool) -> None:
    """TRUNCATE follows no snapshot: rows that others have deleted since are in it, and no evidence of an object."""
    [gone] = await stored(env, Doc(id=1, file=file("a")))
    async with env.engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        assert await connection.scalar(text("SELECT count(*) FROM doc")) == 1
        await run(env, "DELETE FROM doc WHERE id = 1")
        assert (await journal_of(env).recover()).deleted == 1
        if is_nested:
            await connection.begin_nested()
        await run(connection, "TRUNCATE doc")
        assert await refused(connection, "INSERT INTO doc (id, file) VALUES (2, {gone})", gone=gone)
        await connection.rollback()
    await env.recover()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_truncate_above_read_committed_does_not_see_what_others_commit(env: OrmEnvironment, level: str) -> None:
    """What its snapshot does not show is left to the collector."""
    async with env.engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        await connection.execute(text("SELECT 1 FROM doc"))
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(connection, "TRUNCATE doc")
        await connection.commit()
    assert await nominated(env) == set()
    assert (await journal_of(env).recover()).deleted == 0
    assert await env.objects() == {ref.location}
    collector = StorageGarbageCollector(env.manager, binding=env.binding, grace_period=timedelta(0), max_deleted_share=1.0)
    await collector.collect(storage_key="docs", dry_run=False, allow_no_references=True)
    assert await env.objects() == set()


async def test_a_truncate_between_two_statements_of_a_look(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one would find its table empty, and the first one did not see where the refs have gone."""
    monkeypatch.setattr(references, "_MOST_PARAMETERS", 1)
    await fill(env)
    [ref] = await stored(env, Part(id=2, kind=1, file=file("moved")))
    async with env.engine.connect() as connection:
        await run(connection, "INSERT INTO child (id, parent_id, file) SELECT 2, 1, file FROM part WHERE id = 2", "TRUNCATE part")
        journal = journal_of(env)
        looking = asyncio.create_task(journal._references_by(journal._pool).find([ref.location]))
        done, _ = await asyncio.wait([looking], timeout=0.5)
        assert not done  # it waits for the end of the transaction
        await connection.commit()
    assert await looking == {ref.location}


async def test_a_look_in_several_statements_holds_one_connection(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that each held one of a small pool and waited for another would wait for each other."""
    monkeypatch.setattr(references, "_MOST_PARAMETERS", 1)
    [ref] = await stored(env, Doc(id=1, file=file("a")))
    async with StorageJournal(env.engine, pool_size=1) as other, asyncio.timeout(10):
        assert await journal_of(env)._references_by(other._pool).find([ref.location]) == {ref.location}


async def test_an_application_trigger_changes_a_file(env: OrmEnvironment) -> None:
    """The trigger for each row runs after it, and sees what it has changed though the UPDATE does not name the column."""
    [ref] = await stored(env, Doc(id=1, file=file("a")))
    await env.sql("CREATE FUNCTION empty() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.file := NULL; RETURN NEW; END'")
    await env.sql("CREATE TRIGGER yes BEFORE UPDATE ON doc FOR EACH ROW EXECUTE FUNCTION empty()")
    try:
        await run(env, "UPDATE doc SET title = 'x'")
    finally:
        await env.sql("DROP FUNCTION empty() CASCADE")
    assert await nominated(env) == {ref.location}


async def _refused_in_a_savepoint(connection: AsyncConnection, statement: str, **refs: StoredObjectRef) -> bool:
    await connection.begin_nested()
    return await refused(connection, statement, **refs)


async def _refused_in_the_second_savepoint(connection: AsyncConnection, statement: str, **refs: StoredObjectRef) -> bool:
    async with connection.begin_nested():
        await run(connection, "UPDATE parent SET file = NULL")
    await connection.begin_nested()
    await connection.begin_nested()
    return await refused(connection, statement, **refs)


async def _refused_in_a_block(connection: AsyncConnection, statement: str, **refs: StoredObjectRef) -> bool:
    block = f"DO $do$ BEGIN BEGIN {statement}; EXCEPTION WHEN division_by_zero THEN NULL; END; END $do$"
    return await refused(connection, block, **refs)


MOVES = {
    "row": "DELETE FROM doc WHERE id = NEW.id; INSERT INTO parent VALUES (NEW.id, NEW.file);",
    "ref": "UPDATE doc SET file = NULL WHERE id = NEW.id; INSERT INTO parent VALUES (NEW.id, NEW.file);",
    "column": "UPDATE doc SET file = NULL, other = file WHERE id = NEW.id;",
    "other-row": "DELETE FROM doc WHERE id = 3;",
    "same-row": "UPDATE doc SET file = NULL WHERE id = NEW.id; UPDATE doc SET file = NEW.file WHERE id = NEW.id;",
}
"""What a trigger of the application does with what was just inserted."""


@contextlib.asynccontextmanager
async def _on_insert(env: OrmEnvironment, does: str) -> AsyncIterator[None]:
    """Give a trigger of the application, which runs after the INSERT of each row."""
    await env.sql(f"CREATE FUNCTION on_insert() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {does} RETURN NEW; END $$")
    try:
        await env.sql("CREATE TRIGGER on_insert AFTER INSERT ON doc FOR EACH ROW EXECUTE FUNCTION on_insert()")
        yield
    finally:
        await env.sql("DROP FUNCTION on_insert() CASCADE")


class TestGuard:
    @pytest.mark.parametrize(
        "is_refused",
        [refused, _refused_in_a_savepoint, _refused_in_the_second_savepoint, _refused_in_a_block],
        ids=["plain", "savepoint", "second-savepoint", "exception-block"],
    )
    async def test_an_object_that_is_unknown(self, env: OrmEnvironment, is_refused: Any) -> None:
        """No row of the statement vouches for another one or itself, whichever savepoint has written it."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        await stored(env, Doc(id=1, file=file("b")), Parent(id=1))
        doc = "INSERT INTO doc (id, file) VALUES (2, {ref})"
        child = "INSERT INTO child (id, parent_id, file) VALUES (1, 1, {ref})"
        for statement in (
            doc,
            "UPDATE doc SET file = {ref}",
            "INSERT INTO part VALUES (1, 1, {ref})",
            "INSERT INTO part_2 VALUES (1, 2, {ref})",
            # Rows of one statement do not vouch for each other.
            "INSERT INTO doc (id, file) VALUES (2, {ref}), (3, {ref})",
            "INSERT INTO doc (id, file, other) VALUES (2, {ref}, {ref})",
            "INSERT INTO doc (id, file) VALUES (2, {ref}), (1, {ref}) ON CONFLICT (id) DO UPDATE SET file = excluded.file",
            f"WITH a AS ({doc}) {child}",
            "MERGE INTO doc USING (VALUES (1), (2)) s(i) ON id = s.i WHEN MATCHED THEN UPDATE SET file = {ref}"
            " WHEN NOT MATCHED THEN INSERT (id, file) VALUES (s.i, {ref})",
        ):
            async with env.engine.connect() as connection:
                assert await is_refused(connection, statement, ref=ref), statement
        assert len(await env.references()) == 1

    async def test_rows_that_a_trigger_of_the_application_writes_do_not_vouch(self, env: OrmEnvironment) -> None:
        """The copy is guarded while the statement that it is of is not over, whose own rows no guard has seen yet."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        await env.sql(
            "CREATE FUNCTION copy_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO parent VALUES (NEW.id, NEW.file); UPDATE doc SET title = 'x' WHERE id = NEW.id; RETURN NEW; END $$"
        )
        await env.sql("CREATE TRIGGER copy_up AFTER INSERT ON doc FOR EACH ROW EXECUTE FUNCTION copy_up()")
        try:
            assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            # And what is known comes in by the same way.
            [known] = await stored(env, Part(id=1, kind=1, file=file("b")))
            assert not await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=known)
        finally:
            await env.sql("DROP FUNCTION copy_up() CASCADE")

    async def test_rows_that_are_changed_again_before_their_guard_has_seen_them(self, env: OrmEnvironment) -> None:
        """They look as if a later statement had written them, and the row that was updated beside them as if it were older."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        await stored(env, Doc(id=1))
        await env.sql(
            "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " UPDATE doc SET title = 'x' WHERE id = NEW.id; RETURN NEW; END $$"
        )
        await env.sql("CREATE TRIGGER touch AFTER INSERT ON doc FOR EACH ROW EXECUTE FUNCTION touch()")
        upsert = "INSERT INTO doc (id, file) VALUES (2, {ref}), (1, {ref}) ON CONFLICT (id) DO UPDATE SET file = excluded.file"
        try:
            assert await refused(env, upsert, ref=ref)
        finally:
            await env.sql("DROP FUNCTION touch() CASCADE")

    @pytest.mark.parametrize("does", MOVES)
    async def test_rows_that_lose_their_ref_before_their_guard_has_seen_them(self, env: OrmEnvironment, does: str) -> None:
        """What they held is nominated then, and this intent is no evidence that the object was there."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        [known] = await stored(env, Doc(id=1, file=file("b")))
        await run(env, "UPDATE doc SET file = NULL")
        plain = "INSERT INTO doc (id, file) VALUES (3, {ref}), (2, {ref})"
        variant = (
            "INSERT INTO doc (id, file) SELECT 2, jsonb_set(CAST({known} AS jsonb), '{variants}',"
            " jsonb_build_object('thumb', CAST({ref} AS jsonb)))"
        )
        async with _on_insert(env, MOVES[does]):
            assert await refused(env, plain, ref=ref)
            assert await refused(env, variant, ref=ref, known=known)
            assert not await refused(env, plain, ref=known)

    @pytest.mark.parametrize(
        "does",
        ["DELETE FROM doc WHERE id < NEW.id;", "UPDATE doc SET file = NULL WHERE id < NEW.id;"],
        ids=["delete", "update"],
    )
    async def test_rows_that_a_trigger_of_the_application_replaces(self, env: OrmEnvironment, does: str) -> None:
        """What older rows have lost may come in by the same statement, as the file of the new row or of a copy of the old one."""
        one, two = await stored(env, Doc(id=1, file=file("a")), Parent(id=9, file=file("b")))
        copy = "INSERT INTO parent SELECT id, file FROM doc WHERE id = 1; UPDATE doc SET title = 'x';"
        async with _on_insert(env, copy + does):
            await run(env, "INSERT INTO doc (id, file) SELECT 2, file FROM doc")
        keep = "WITH old AS (DELETE FROM doc WHERE id < NEW.id RETURNING *) INSERT INTO parent SELECT id, file FROM old;"
        async with _on_insert(env, keep):
            await run(env, "DELETE FROM parent WHERE id < 9", "INSERT INTO doc (id, file) SELECT 3, file FROM parent")
        await run(
            env,
            "INSERT INTO doc (id, file) SELECT 3, file FROM parent WHERE id = 2 UNION ALL SELECT 4, file FROM doc WHERE id = 3"
            " ON CONFLICT (id) DO UPDATE SET file = excluded.file",
        )
        assert locations(*(await env.references()).values()) == locations(one, two)

    async def test_rows_whose_key_is_changed_before_their_guard_has_seen_them(self, env: OrmEnvironment) -> None:
        """The guard does not find them, so it cannot say which rows the statement has written."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        changes = "IF NEW.id = 3 THEN UPDATE doc SET id = 100 WHERE id = 3; ELSE UPDATE doc SET title = 'x' WHERE id = 2; END IF;"
        async with _on_insert(env, changes):
            assert await refused(env, "INSERT INTO doc (id, file) VALUES (3, {ref}), (2, {ref})", ref=ref)

    async def test_columns_that_are_named_like_variables(self, env: OrmEnvironment) -> None:
        metadata = MetaData(schema="apart")
        names = ["wanted", "original", "before", "own", "known", "digest", "policy", "missing", "gone", "t", "n"]
        columns = [Column(name, Integer, server_default="1", primary_key=True) for name in names]
        Table("thing", metadata, *columns, *(Column(name, AttachmentType("docs")) for name in ("location", "source")))
        journal_tables(metadata)
        storage_triggers(metadata)
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await env.sql("CREATE SCHEMA apart")
        try:
            async with env.engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
            insert = "INSERT INTO apart.thing (own, location) VALUES (1, {ref})"
            assert await refused(env, insert, ref=ref)
            await run(
                env,
                "INSERT INTO apart.granite_storage_intent (id, kind, backend, location, due)"
                " SELECT gen_random_uuid(), 'upload', r->>'backend', r->>'location', now() FROM CAST({ref} AS json) r",
                insert,
                "DELETE FROM apart.granite_storage_intent",
                ref=ref,
            )
            await run(env, "INSERT INTO apart.thing (own, location) SELECT 2, location FROM apart.thing")
            await run(env, "UPDATE apart.thing SET source = location, location = NULL", "DELETE FROM apart.thing WHERE own = 2")
            async with env.engine.connect() as connection:
                found = await connection.scalars(text("SELECT location FROM apart.granite_storage_intent"))
                assert list(found) == [ref.location]
        finally:
            await env.sql("DROP SCHEMA apart CASCADE")

    async def test_a_copy_of_what_a_row_holds(self, env: OrmEnvironment) -> None:
        await stored(env, Doc(id=1, file=file("a")), Part(id=1, kind=1, file=file("b")))
        await run(env, "INSERT INTO doc (id, file, other) SELECT 2, file, file FROM doc")
        await run(env, "UPDATE doc SET other = (SELECT p.file FROM part p)", "INSERT INTO parent SELECT id, other FROM doc")
        await run(env, "DELETE FROM doc", "DELETE FROM part")
        assert (await journal_of(env).recover()).deleted == 1
        assert len(await env.objects()) == 1

    async def test_swaps(self, env: OrmEnvironment) -> None:
        one, two = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await run(env, "UPDATE doc SET file = (SELECT d.file FROM doc d WHERE d.id = 3 - doc.id)")
        await run(env, "UPDATE doc SET file = NULL, other = file")
        held = {key: ref.location for (_, key, _), ref in (await env.references()).items()}
        assert held == {1: two.location, 2: one.location}
        assert (await journal_of(env).recover()).kept == 2

    async def test_an_undo(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc")
        async with env.engine.begin() as connection:
            await run(connection, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            assert (await journal_of(env).recover()).claimed == 0, "the guard has locked the intent"
        assert (await journal_of(env).recover()).kept == 1

    async def test_a_newer_intent_of_what_is_being_deleted(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two rows share the object; the second one is deleted after the fence, and its intent is no evidence."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "INSERT INTO doc (id, file) SELECT 2, file FROM doc", "DELETE FROM doc WHERE id = 1")
        with steps_are_watched(monkeypatch):
            async with worker(env, "_check"):
                await run(env, "DELETE FROM doc")
                assert await nominated(env) == {ref.location}
                assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_the_source_of_a_copy_waits(self, env: OrmEnvironment) -> None:
        """A copy locks the row that vouches for the object until the copy is committed."""
        await stored(env, Doc(id=1, file=file("a")))
        async with env.engine.begin() as connection:
            await run(connection, "INSERT INTO parent SELECT id, file FROM doc")
            with pytest.raises(DBAPIError) as caught:
                await run(env, "SET LOCAL lock_timeout = '200ms'", "DELETE FROM doc")
            assert code_of(caught.value) == "55P03"
        await run(env, "DELETE FROM doc")
        assert (await journal_of(env).recover()).kept == 1

    async def test_what_the_transaction_has_stored_itself(self, env: OrmEnvironment) -> None:
        """The session has consumed its intent, and its row alone vouches for the object."""
        async with env.sessions.begin() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            await session.execute(text("INSERT INTO parent SELECT id, file FROM doc"))
            await session.execute(text("UPDATE doc SET other = file"))
            await session.execute(text("DELETE FROM doc"))
        assert (await journal_of(env).recover()).kept == 1

    async def test_copy(self, env: OrmEnvironment) -> None:
        """COPY is guarded as an INSERT is, and rows of an open transaction vouch for nothing of another one."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        unknown = StoredObjectRef.from_dict({**ref.to_dict(), "location": f"{ref.location}-unknown"})
        await copy_in(env, 1, ref)
        with pytest.raises(Exception, match="gone or going"):
            await copy_in(env, 2, unknown)
        assert len(await env.references()) == 2

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_an_older_snapshot(self, env: OrmEnvironment, level: str) -> None:
        one, two = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        for deletes, ref in ((True, one), (False, two)):
            async with env.engine.connect() as connection:
                await connection.execute(text(f"SET TRANSACTION ISOLATION LEVEL {level}"))
                await connection.execute(text("SELECT 1 FROM doc"))
                if deletes:
                    await run(env, "DELETE FROM doc WHERE id = 1")
                    await journal_of(env).recover()
                    with pytest.raises(DBAPIError) as caught:
                        await run(connection, "INSERT INTO parent SELECT id, file FROM doc WHERE id = 1")
                    assert code_of(caught.value) == "40001"
                else:
                    await run(connection, "INSERT INTO parent VALUES (2, {ref})", ref=ref)
                    await connection.commit()


class TestUploadsThatStayPending:
    """Above READ COMMITTED a session decides on its upload, whose intent stays until its lease is over, beside the row."""

    @pytest.fixture
    async def ref(self, env: OrmEnvironment) -> StoredObjectRef:
        async with env.sessions() as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            await session.scalars(select(Doc))
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.commit()
        assert [row.kind for row in await rows(env, "intent")] == ["upload"]
        assert doc.file is not None
        return doc.file.ref

    @pytest.mark.parametrize("statement", ["INSERT INTO parent VALUES (1, {ref})", "UPDATE parent SET file = {ref}"])
    async def test_locked_row_keeps_the_object(self, env: OrmEnvironment, ref: StoredObjectRef, statement: str) -> None:
        if statement.startswith("UPDATE"):
            await env.add(Parent(id=1))
        async with env.engine.begin() as connection:
            await run(connection, statement, ref=ref)
            await run(env, "DELETE FROM doc")
            assert (await journal_of(env).recover()).claimed == 0
        assert (await journal_of(env).recover()).deleted == 0
        assert await env.objects() == {ref.location}

    async def test_an_older_snapshot_of_it(
        self, env: OrmEnvironment, ref: StoredObjectRef, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was fenced since is not seen; but the intent has changed since."""
        async with env.engine.connect() as connection:
            await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            await connection.execute(text("SELECT 1 FROM doc"))
            await run(env, "DELETE FROM doc")
            with steps_are_watched(monkeypatch):
                async with worker(env, "_remove"):
                    with pytest.raises(DBAPIError) as caught:
                        await run(connection, "INSERT INTO parent VALUES (1, {ref})", ref=ref)
                    assert code_of(caught.value) == "40001"

    async def test_while_another_one_decides(self, env: OrmEnvironment) -> None:
        """Its snapshot is older than the intent, so it holds no lock on that, but on its decision."""
        async with env.sessions() as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            await session.scalars(select(Doc))
            stored = await Attachment(b"a").store(Doc.file)
            await run(env, "INSERT INTO parent VALUES (1, {ref})", ref=stored.ref)
            session.add(Doc(id=1, file=stored))
            await session.flush()
            await run(env, "DELETE FROM parent")
            assert (await journal_of(env).recover()).claimed == 0
            await session.commit()
        assert (await journal_of(env).recover()).deleted == 0
        assert await env.objects() == {stored.ref.location}


async def copy_in(env: OrmEnvironment, number: int, ref: StoredObjectRef) -> None:
    """Load a row into `parent` by COPY, as the driver does it."""
    row = (number, json.dumps(ref.to_dict()))
    async with env.engine.begin() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if env.database.name == "asyncpg":
            await driver.copy_records_to_table("parent", records=[row], columns=["id", "file"])
        else:
            async with driver.cursor().copy("COPY parent (id, file) FROM STDIN") as copying:
                await copying.write_row(row)


class TestSessions:
    async def test_an_undo(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc")
        await env.add(Doc(id=2, file=Attachment.restore(ref)))
        assert await nominated(env) == set()

    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
    async def test_an_older_snapshot(self, env: OrmEnvironment, level: str) -> None:
        """The intents of its uploads are newer than what it sees; it decides before it writes, again after a savepoint."""
        async with env.sessions.begin() as session:
            await session.connection(execution_options={"isolation_level": level})
            assert list(await session.scalars(select(Doc))) == []
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            with contextlib.suppress(ZeroDivisionError):
                async with session.begin_nested():
                    session.add(Doc(id=2, file=file("b"), other=file("c")))
                    await session.flush()
                    raise ZeroDivisionError
            await session.flush()
            session.add(Doc(id=3, file=file("d")))
            await session.flush()
            assert (await session.scalar(text("SELECT count(*) FROM granite_storage_decision"))) == 2
        assert {key for _, key, _ in await env.references()} == {1, 3}

    async def test_what_was_decided_on_goes_with_its_intent(self, env: OrmEnvironment) -> None:
        """The intent of an upload is pending until its lease is over; its object goes before that, and all that is about it."""
        async with env.sessions.begin() as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            await session.scalars(select(Doc))
            session.add(Doc(id=1, file=file("a")))
        assert [len(await rows(env, name)) for name in ("intent", "decision")] == [1, 1]
        await run(env, "DELETE FROM doc")
        assert (await journal_of(env).recover()).deleted == 1
        assert [len(await rows(env, name)) for name in ("intent", "decision")] == [0, 0]

    async def test_a_variant_that_is_reclaimed_before_a_worker_sets_it(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The guard refuses it, which is no failure of the recipe."""
        publish = VariantJobs._publish

        async def late(self: VariantJobs, jobs: Any, made: Any, ids: Any) -> Any:
            await expire(env)
            await journal_of(env)._recover("store")
            return await publish(self, jobs, made, ids)

        await env.add(Picture(id=1, file=file("a")))
        with monkeypatch.context() as patch:
            patch.setattr(VariantJobs, "_publish", late)
            assert (await journal_of(env).recover()).derived == 0
        [job] = await rows(env, "job")
        assert (job.attempts, job.dead) == (0, False)
        await run(env, "UPDATE granite_storage_job SET due = now()")
        assert (await journal_of(env).recover()).derived == 1

    async def test_an_older_snapshot_of_what_is_reclaimed(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            await session.scalars(select(Doc))
            stored = await Attachment(b"a").store(Doc.file)
            await expire(env)
            await journal_of(env).recover()
            session.add(Doc(id=1, file=stored))
            with pytest.raises(StaleAttachmentError):
                await session.flush()

    async def test_a_role_without_rights_on_the_journal(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await env.sql("CREATE ROLE writer_of_rows")
        await env.sql("GRANT SELECT, DELETE, INSERT ON doc TO writer_of_rows")
        try:
            await run(
                env, "SET LOCAL ROLE writer_of_rows", "DELETE FROM doc", "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref
            )
            await run(
                env,
                "SET LOCAL ROLE writer_of_rows",
                "CREATE TEMPORARY TABLE granite_storage_intent (id int)",
                "SET LOCAL search_path = pg_temp, public",
                "DELETE FROM doc",
            )
        finally:
            await env.sql("DROP OWNED BY writer_of_rows")
            await env.sql("DROP ROLE writer_of_rows")
        assert await nominated(env) == {ref.location}


class TestTwoPhases:
    """A prepared transaction holds its locks, past the end of its connection, until another one ends it."""

    async def prepare(
        self, env: OrmEnvironment, *statements: str, level: str = "READ COMMITTED", **refs: StoredObjectRef
    ) -> None:
        async with env.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await run(connection, f"BEGIN ISOLATION LEVEL {level}", *statements, "PREPARE TRANSACTION 'granite'", **refs)

    async def end(self, env: OrmEnvironment, how: str) -> None:
        async with env.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text(f"{how} PREPARED 'granite'"))

    @pytest.mark.parametrize("level", ["READ COMMITTED", "SERIALIZABLE"])
    @pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
    async def test_by_sql(self, env: OrmEnvironment, how: str, level: str) -> None:
        """One object is taken out, one is copied while its row goes, and one is undone; workers wait for all of them."""
        gone, copied, undone = await stored(env, *(Doc(id=number, file=file(str(number))) for number in (1, 2, 3)))
        await run(env, "DELETE FROM doc WHERE id = 3")
        await self.prepare(
            env,
            "DELETE FROM doc WHERE id = 1",
            "INSERT INTO parent SELECT id, file FROM doc WHERE id = 2",
            "INSERT INTO part VALUES (3, 1, {undone})",
            level=level,
            undone=undone,
        )
        try:
            for statement in ("DELETE FROM doc WHERE id = 2", "INSERT INTO parent VALUES (3, {undone})"):
                with pytest.raises(DBAPIError) as caught:
                    await run(env, "SET LOCAL lock_timeout = '200ms'", statement, undone=undone)
                assert code_of(caught.value) == "55P03"
            await env.expire()
            assert (await journal_of(env).recover()).claimed == 0
        finally:
            await self.end(env, how)
        await run(env, "DELETE FROM doc WHERE id = 2")
        await env.recover()
        assert await env.objects() == (locations(copied, undone) if how == "COMMIT" else locations(gone))

    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
    @pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
    async def test_by_a_session(self, env: OrmEnvironment, how: str, level: str) -> None:
        if env.database.name != "psycopg":
            pytest.skip("this driver has no two-phase transactions in SQLAlchemy")
        await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with AsyncSession(env.engine, twophase=True) as session:
            connection = await session.connection(execution_options={"isolation_level": level})
            (await session.get_one(Doc, 1)).file = file("c")
            await session.delete(await session.get_one(Doc, 2))
            session.add(Doc(id=3, file=file("d")))
            await session.flush()
            await session.execute(text("INSERT INTO parent SELECT id, file FROM doc WHERE id = 3"))
            await session.run_sync(Session.prepare)
            await connection.invalidate()
            with pytest.raises(Exception):  # noqa: B017, PT011  # whatever a program that dies would have come to
                await session.commit()
        async with env.engine.connect() as other:
            [prepared] = (await other.execute(text("SELECT gid FROM pg_prepared_xacts"))).scalars()
        try:
            await env.expire()
            assert (await journal_of(env).recover()).claimed == 0
        finally:
            async with env.engine.connect() as other:
                await other.execution_options(isolation_level="AUTOCOMMIT")
                await other.execute(text(f"{how} PREPARED '{prepared}'"))
        await env.recover()
        held = {key for _, key, _ in await env.references()}
        assert held == ({1, 3} if how == "COMMIT" else {1, 2})


class TestRetention:
    async def test_of_its_policy_or_the_longest(self, env: OrmEnvironment) -> None:
        refs = await stored(env, *(Doc(id=number, file=file(str(number))) for number in range(3)))
        await journal_of(env).check()
        await env.sql("UPDATE granite_storage_meta SET value = '604800' WHERE name = 'retention\\:docs'")
        try:
            await run(env, "DELETE FROM doc WHERE id = 0", "UPDATE doc SET file = NULL WHERE id = 1")
            await run(env, "UPDATE doc SET file = jsonb_set(file, '{storage_key}', '\"unknown\"')", "TRUNCATE doc")
            report = await journal_of(env).recover()
            assert (report.claimed, report.waiting) == (0, 3)
            assert await nominated(env) == locations(*refs)
        finally:
            await journal_of(env).check()
        async with env.engine.connect() as connection:
            found = await connection.execute(text("SELECT value FROM granite_storage_meta WHERE name = 'retention\\:docs'"))
        assert [float(value) for value in found.scalars()] == [0.0]


class TestAdoption:
    async def test_what_is_not_there(self, env: OrmEnvironment) -> None:
        ref = await put(env)
        await env.manager.delete(ref)
        with pytest.raises(ObjectNotFoundError, match="does not exist, so its row cannot be loaded"):
            await journal_of(env).adopt([ref])
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_what_a_worker_deletes_meanwhile(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """The intent that was to keep it is withdrawn, so that no row can refer to it."""
        ref = await put(env)
        run_sync = AsyncConnection.run_sync

        async def run_late(self: AsyncConnection, *args: Any, **kwargs: Any) -> Any:
            await env.backend.delete(ref.location)
            return await run_sync(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(ObjectNotFoundError):
            patch.setattr(AsyncConnection, "run_sync", run_late)
            await journal_of(env).adopt([ref])
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_variants_that_are_listed_by_themselves(self, env: OrmEnvironment) -> None:
        """As `iter_model_storage_refs` yields them, after their originals."""
        original, variant = await put(env, "a"), await put(env, "b")
        whole = original.with_variants({"thumb": variant})
        await journal_of(env).adopt([whole, variant])
        await run(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=whole)

    @pytest.mark.parametrize("given", ["x", {"backend": "store"}])
    async def test_no_refs(self, env: OrmEnvironment, given: Any) -> None:
        with pytest.raises(InvalidReferenceError, match="adopt takes StoredObjectRefs"):
            await journal_of(env).adopt([given])


class TestChecks:
    async def problems(self, env: OrmEnvironment) -> list[str]:
        return await journal_of(env).find_trigger_problems()

    async def told_by_doctor(self, env: OrmEnvironment) -> list[CheckResult]:
        return [check.result async for check in _check_journal(env.binding) if check.what == "triggers"]

    async def test_what_is_wrong(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        assert await self.problems(env) == []
        await env.sql("CREATE TABLE part_3 PARTITION OF part FOR VALUES IN (3)")
        await env.sql("ALTER TABLE doc DISABLE TRIGGER granite_storage_delete")
        await env.sql("DROP TRIGGER zz_granite_storage_update ON parent")
        await env.sql("DROP INDEX ix_granite_storage_location_link_ref")
        await env.sql(
            "CREATE OR REPLACE TRIGGER granite_storage_truncate BEFORE TRUNCATE ON child"
            " EXECUTE FUNCTION granite_storage_truncate_child('0')"
        )
        try:
            order = ("doc", "parent", "child", "part_3", "link")
            found = {name: problem for problem in await self.problems(env) for name in order if name in problem.partition(":")[0]}
            doc, parent, child, part, link = (found.pop(name) for name in order)
            assert found == {}
            assert doc.startswith('the triggers granite_storage_delete of "public"."doc" do not fire')
            assert parent.startswith('"public"."parent" lacks the triggers zz_granite_storage_update')
            assert child.startswith('the triggers granite_storage_truncate of "public"."child" are of another version')
            missing = "granite_storage_delete, granite_storage_insert, granite_storage_inserting, granite_storage_truncate"
            assert part.startswith(f'"public"."part_3" lacks the triggers {missing}:')
            assert link.startswith("public.link has no index over the locations in ref")
            with caplog.at_level(logging.WARNING, "granite_storage"):
                await journal_of(env).check()
            assert len([record for record in caplog.records if "not covered" in record.message]) == 5
            assert await self.told_by_doctor(env) == [CheckResult.BAD] * 5
            await env.sql("ALTER TABLE doc ENABLE TRIGGER granite_storage_delete")
            async with env.engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            assert await self.problems(env) == []
            assert await self.told_by_doctor(env) == [CheckResult.GOOD]
        finally:
            await env.sql("DROP TABLE part_3")

    async def test_they_wait_for_older_workers(self, env: OrmEnvironment) -> None:
        async def create() -> None:
            async with env.engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)

        await forget(env)
        async with env.engine.begin() as connection:
            await beat_without_version(connection, env)
        await create()  # there is nothing to create
        [problem] = await self.problems(env)
        assert problem.startswith("a worker of an older version")
        await env.sql("DROP TRIGGER granite_storage_delete ON doc")
        with pytest.raises(ConfigurationError, match="a worker of an older version") as caught:
            await create()
        assert str(caught.value.docs).endswith("guarantees.html#rollout")
        async with env.engine.connect() as connection:
            made = "SELECT count(*) FROM pg_trigger WHERE tgname = 'granite_storage_delete' AND tgrelid = to_regclass('doc')"
            assert await connection.scalar(text(made)) == 0
        await forget(env)
        await create()
        assert await self.problems(env) == []

    @pytest.mark.parametrize(
        ("renamed", "back", "write", "relations", "gone"),
        [
            (
                "doc RENAME file TO document",
                "doc RENAME document TO file",
                "DELETE FROM doc",
                "doc",
                "the column file of public.doc",
            ),
            (
                "link RENAME TO links",
                "links RENAME TO link",
                COPIED.format("parent"),
                "child, public.doc",
                "the table public.link",
            ),
            (
                "parent RENAME TO parents",
                "parents RENAME TO parent",
                COPIED.format("parents"),
                "parents",
                "the table public.parent",
            ),
        ],
    )
    async def test_what_is_renamed(
        self, env: OrmEnvironment, renamed: str, back: str, write: str, relations: str, gone: str
    ) -> None:
        """The functions still name it, so every write of the rows fails, and the error says why."""
        await stored(env, Doc(id=1, file=file("a")), Parent(id=1, file=file("b")))
        await env.sql(f"ALTER TABLE {renamed}")
        try:
            [said] = [problem for problem in await self.problems(env) if gone in problem]
            assert f"public.{relations}" in said.partition(" name ")[0]
            assert "which is gone" in said
            assert "create the triggers again" in said
            assert CheckResult.BAD in await self.told_by_doctor(env)
            with pytest.raises(DBAPIError) as caught:
                await run(env, write)
            assert code_of(caught.value) in ("42703", "42P01")
        finally:
            await env.sql(f"ALTER TABLE {back}")
        assert await self.problems(env) == []

    async def test_they_are_dropped_with_their_tables(self, env: OrmEnvironment) -> None:
        metadata = MetaData(schema="apart")
        Table("thing", metadata, Column("id", Integer, primary_key=True), Column("file", AttachmentType("docs")))
        journal_tables(metadata)
        storage_triggers(metadata)
        await env.sql("CREATE SCHEMA apart")
        try:
            async with env.engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
                assert await connection.run_sync(lambda it: find_trigger_problems(it, metadata)) == []
                await connection.run_sync(metadata.drop_all)
                left = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'apart'::regnamespace"
                assert await connection.scalar(text(left.replace("::", r"\:\:"))) == 0
        finally:
            await env.sql("DROP SCHEMA apart CASCADE")

    def test_what_cannot_be(self) -> None:
        metadata = MetaData()
        with pytest.raises(ConfigurationError, match="call journal_tables"):
            storage_triggers(metadata)
        journal_tables(metadata)
        storage_triggers(metadata)
        storage_triggers(metadata)
        engine = create_mock_engine("mssql+pyodbc://", lambda *_: None)
        with pytest.raises(ConfigurationError, match="and this database is mssql"):
            metadata.create_all(engine)

    async def test_a_base_without_a_journal(self, env: OrmEnvironment) -> None:
        with pytest.raises(ConfigurationError, match="storage_triggers are declared for this base"):
            bind_storage(Base, env.manager)

    async def test_a_table_without_a_primary_key(self, env: OrmEnvironment) -> None:
        metadata = MetaData()
        Table("thing", metadata, Column("file", AttachmentType("docs")))
        journal_tables(metadata)
        storage_triggers(metadata)
        with pytest.raises(ConfigurationError, match="the table thing has no primary key"):
            async with env.engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
