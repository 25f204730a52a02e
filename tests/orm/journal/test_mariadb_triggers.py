"""The triggers of MariaDB: objects and references agree, whichever client writes the rows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import (
    BINARY,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    Numeric,
    String,
    Table,
    Uuid,
    create_engine,
    event,
    select,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from granite_storage import StoredObjectRef
from granite_storage.cli.doctor import CheckResult, _check_journal
from granite_storage.exceptions import ConfigurationError, StaleAttachmentError
from granite_storage.orm import Attachment, AttachmentType, journal_tables, storage_triggers
from granite_storage.orm._interfaces import CLAIMING_KEY
from granite_storage.orm.journal.triggers import create_triggers, drop_triggers, sources_of
from granite_storage.orm.transactions import listen_to
from tests.orm.databases import mariadb_admin
from tests.orm.environment import OrmEnvironment, file
from tests.orm.journal.guarded import (
    Base,
    Child,
    Doc,
    Grandchild,
    Parent,
    environment,
    locations,
    put,
    refused,
    run,
    stored,
)
from tests.orm.journal.sharing import steps_are_watched, worker
from tests.orm.journal.test_recovery import expire, journal_of
from tests.orm.journal.test_storage_triggers import fill, nominated, referenced

LEVELS = ["READ COMMITTED", "REPEATABLE READ"]


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> Any:
    """MariaDB, with a database of these tests' own: its tables have triggers."""
    from tests.orm.conftest import new_database

    async with new_database(request, "mariadb") as found:
        yield found


@pytest.fixture
async def env(database: Any) -> AsyncIterator[OrmEnvironment]:
    """Empty tables with triggers, an empty storage and a journal; afterwards recovery leaves what rows refer to, and no more."""
    async with environment(database) as env:
        yield env
        await env.recover()
        assert await env.objects() == await referenced(env)


@contextlib.asynccontextmanager
async def transaction(env: OrmEnvironment, level: str) -> AsyncIterator[AsyncConnection]:
    """Give a transaction whose snapshot is made at once."""
    async with env.engine.connect() as connection:
        await connection.execution_options(isolation_level=level)
        await connection.execute(text("SELECT COUNT(*) FROM doc, granite_storage_intent"))
        yield connection


TAKEN_OUT = {
    "DELETE FROM doc": {"doc", "second"},
    "DELETE FROM doc WHERE id = 1": {"doc"},
    "UPDATE doc SET file = NULL WHERE id = 2": {"second"},
    "UPDATE doc SET file = (SELECT p.file FROM parent p) WHERE id = 1": {"doc"},
    "DELETE d, p FROM doc d JOIN parent p ON p.id = d.id": {"doc", "parent", "child", "grandchild"},
    "UPDATE doc d JOIN parent p ON p.id = d.id SET d.file = NULL, p.file = NULL": {"doc", "parent"},
    "INSERT INTO doc (id) VALUES (1) ON DUPLICATE KEY UPDATE file = VALUES(file)": {"doc"},
    "REPLACE INTO doc (id) VALUES (1)": {"doc"},
    "REPLACE INTO parent (id) VALUES (1)": {"parent", "child", "grandchild"},
    "DELETE FROM parent": {"parent", "child", "grandchild"},
    "DELETE FROM child": {"child", "grandchild"},
    "DELETE FROM part": {"part"},
    "UPDATE part SET kind = 2, file = NULL": {"part"},
    "UPDATE part SET kind = 2": set(),
    "UPDATE doc SET title = 'other'": set(),
    "UPDATE doc SET file = JSON_SET(file, '$.content_type', 'text/plain') WHERE id = 1": set(),
}


@pytest.mark.parametrize("statement", TAKEN_OUT)
async def test_what_a_statement_takes_out_of_rows(env: OrmEnvironment, statement: str) -> None:
    refs = await fill(env)
    await run(env, statement)
    assert await nominated(env) == {refs[name].location for name in TAKEN_OUT[statement]}
    assert (await journal_of(env).recover()).deleted == len(TAKEN_OUT[statement])


@pytest.mark.parametrize("level", LEVELS)
async def test_a_cascade_reaches_rows_that_the_snapshot_does_not_show(env: OrmEnvironment, level: str) -> None:
    await stored(env, Parent(id=1))
    async with transaction(env, level) as connection:
        await stored(env, Child(id=1, parent_id=1, file=file("c")), Grandchild(id=1, child_id=1, file=file("g")))
        await run(connection, "DELETE FROM parent")
        await connection.commit()
    assert len(await nominated(env)) == 2


KEYS: dict[str, tuple[list[Any], list[Any]]] = {
    "text": ([String(20, collation="latin1_swedish_ci")], [lambda number: f"'key {number}'"]),
    "moment": ([mysql.DATETIME(fsp=6)], [lambda number: f"'2026-01-01 00\\:00\\:00.00000{number}'"]),
    "bytes": ([BINARY(4)], [lambda number: f"X'FFFE00{number:02x}'"]),
    "numbers": ([Numeric(30, 10), mysql.FLOAT()], [lambda number: f"{number}.0000000001", lambda number: f"0.{number}"]),
    "others": ([mysql.ENUM("a", "b"), Uuid()], [lambda number: "'b'", lambda number: f"'00000000-0000-4000-8000-{number:012}'"]),
}
"""Primary keys by what they are of, each with its types and how their values are made."""


class TestGuard:
    @pytest.mark.parametrize("level", LEVELS)
    async def test_an_object_that_is_unknown(self, env: OrmEnvironment, level: str) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        await stored(env, Doc(id=1, file=file("b")), Parent(id=1))
        for statement in (
            "INSERT INTO doc (id, file) VALUES (2, {ref})",
            "INSERT IGNORE INTO doc (id, file) VALUES (2, {ref})",
            "UPDATE doc SET file = {ref}",
            "UPDATE IGNORE doc SET file = {ref}",
            "REPLACE INTO doc (id, file) VALUES (1, {ref})",
            # Rows of one statement do not vouch for each other.
            "INSERT INTO doc (id, file) VALUES (2, {ref}), (3, {ref})",
            "INSERT INTO doc (id, file, other) VALUES (2, {ref}, {ref})",
            "INSERT INTO doc (id, file) VALUES (2, {ref}), (1, {ref}) ON DUPLICATE KEY UPDATE file = VALUES(file)",
            "UPDATE doc d JOIN parent p ON p.id = d.id SET d.file = {ref}, p.file = {ref}",
        ):
            async with transaction(env, level) as connection:
                assert await refused(connection, statement, ref=ref), statement
                await connection.commit()
        assert len(await env.references()) == 1

    async def test_rows_that_a_trigger_of_the_application_writes_do_not_vouch(self, env: OrmEnvironment) -> None:
        """It was there before, and would copy a ref that was not guarded yet if it ran first."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        async with env.engine.begin() as connection:
            for kind in ("insert", "update"):
                await connection.execute(text(f"DROP TRIGGER granite_storage_{kind}_doc"))
            for kind in ("INSERT", "UPDATE"):
                copy = "INSERT INTO parent VALUES (NEW.id, NEW.file)"
                await connection.execute(text(f"CREATE TRIGGER copy_{kind} AFTER {kind} ON doc FOR EACH ROW {copy}"))
            await connection.run_sync(Base.metadata.create_all)
        try:
            assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            await run(env, "INSERT INTO doc (id) VALUES (1)", "DELETE FROM parent")
            assert await refused(env, "UPDATE doc SET file = {ref}", ref=ref)
        finally:
            await env.sql("DROP TRIGGER copy_INSERT")
            await env.sql("DROP TRIGGER copy_UPDATE")

    async def test_what_a_trigger_of_the_application_changes(self, env: OrmEnvironment) -> None:
        """It is made later, and runs before the row is written."""
        unknown = await put(env)
        await env.backend.delete(unknown.location)
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "CREATE TRIGGER late BEFORE UPDATE ON doc FOR EACH ROW SET NEW.file = NULL")
        await run(env, "CREATE TRIGGER late_too BEFORE INSERT ON doc FOR EACH ROW SET NEW.file = {ref}", ref=unknown)
        try:
            await run(env, "UPDATE doc SET title = 'x'")
            assert await refused(env, "INSERT INTO doc (id) VALUES (2)")
        finally:
            await env.sql("DROP TRIGGER late")
            await env.sql("DROP TRIGGER late_too")
        assert await nominated(env) == {ref.location}

    @pytest.mark.parametrize("level", LEVELS)
    async def test_a_copy_of_what_a_row_holds(self, env: OrmEnvironment, level: str) -> None:
        await stored(env, Doc(id=1, file=file("a")), Parent(id=1, file=file("b")))
        async with transaction(env, level) as connection:
            await run(connection, "INSERT INTO doc (id, file, other) SELECT 2, file, file FROM doc")
            await run(
                connection, "UPDATE doc SET other = (SELECT p.file FROM parent p)", "UPDATE doc SET title = 'x', other = file"
            )
            await run(connection, "INSERT INTO parent SELECT id + 5, file FROM doc", "DELETE FROM doc")
            await connection.commit()
        assert (await journal_of(env).recover()).kept == 2
        await run(env, "DELETE FROM parent")
        assert (await journal_of(env).recover()).deleted == 2

    @pytest.mark.parametrize(
        "swap",
        [
            "UPDATE doc SET file = (SELECT d.file FROM doc d WHERE d.id = 3 - doc.id)",
            "UPDATE doc a JOIN doc b ON a.id = 3 - b.id SET a.file = b.file",
        ],
    )
    async def test_swaps(self, env: OrmEnvironment, swap: str) -> None:
        one, two = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await run(env, swap)
        await run(env, "UPDATE doc SET other = file, file = NULL")
        held = {key: ref.location for (_, key, _), ref in (await env.references()).items()}
        assert held == {1: two.location, 2: one.location}
        assert (await journal_of(env).recover()).kept == 2

    @pytest.mark.parametrize("level", LEVELS)
    async def test_an_undo(self, env: OrmEnvironment, level: str) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc")
        async with transaction(env, level) as connection:
            await run(connection, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            assert (await journal_of(env).recover()).claimed == 0, "the guard has locked the intent"
            await connection.commit()
        assert (await journal_of(env).recover()).kept == 1

    @pytest.mark.parametrize("level", LEVELS)
    async def test_a_newer_intent_of_what_is_being_deleted(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, level: str
    ) -> None:
        """Two rows share the object; the second one is deleted after the fence, and its intent is no evidence."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "INSERT INTO doc (id, file) SELECT 2, file FROM doc", "DELETE FROM doc WHERE id = 1")
        async with transaction(env, level) as connection:
            with steps_are_watched(monkeypatch):
                async with worker(env, "_check"):
                    await run(connection, "DELETE FROM doc")
                    assert await refused(connection, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
                    await connection.commit()
                    assert await nominated(env) == {ref.location}
                    assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_every_intent_of_the_object_is_locked(self, env: OrmEnvironment) -> None:
        """That of its upload is pending as well, and its worker would not see the row yet."""
        stored_alone = await Attachment(b"a").store(Doc.file)
        ref = stored_alone.ref
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref), "an upload alone is no evidence"
        await journal_of(env).adopt([ref])
        await expire(env)
        async with transaction(env, "READ COMMITTED") as connection:
            await run(connection, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            async with env.engine.begin() as other:
                free = "SELECT kind FROM granite_storage_intent FOR UPDATE SKIP LOCKED"
                assert list(await other.execute(text(free))) == []
            assert (await journal_of(env).recover()).claimed == 0
            await connection.commit()
        assert (await journal_of(env).recover()).kept == 2

    @pytest.mark.parametrize("level", LEVELS)
    async def test_the_source_of_a_copy_waits(self, env: OrmEnvironment, level: str) -> None:
        """A copy locks the row that vouches for the object until the copy is committed."""
        await stored(env, Doc(id=1, file=file("a")))
        async with transaction(env, level) as connection:
            await run(connection, "INSERT INTO parent SELECT id, file FROM doc")
            with pytest.raises(DBAPIError, match="Lock wait timeout"):
                await run(env, "SET STATEMENT innodb_lock_wait_timeout = 1 FOR DELETE FROM doc")
            await connection.commit()
        await run(env, "DELETE FROM doc")
        assert (await journal_of(env).recover()).kept == 1

    @pytest.mark.parametrize("level", LEVELS)
    async def test_a_source_that_was_deleted_since_the_snapshot(self, env: OrmEnvironment, level: str) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        async with transaction(env, level) as connection:
            await run(env, "DELETE FROM doc")
            await journal_of(env).recover()
            assert await refused(connection, "INSERT INTO parent VALUES (1, {ref})", ref=ref)

    async def test_what_holds_up_nobody(self, env: OrmEnvironment) -> None:
        """At REPEATABLE READ a lock beside a row that is not there would keep the intents and fences of all waiting."""
        await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await stored(env, Parent(id=1, file=file("p")), Parent(id=2, file=file("q")))
        await run(env, "DELETE FROM parent WHERE id = 2")
        async with transaction(env, "REPEATABLE READ") as connection:
            await run(
                connection, "INSERT INTO doc (id, file) SELECT 3, file FROM doc WHERE id = 1", "DELETE FROM doc WHERE id = 2"
            )
            await run(connection, "UPDATE doc SET file = NULL WHERE id = 1", "DELETE FROM parent")
            await asyncio.wait_for(env.add(Doc(id=-1, file=file("c"))), 10)  # its location comes before that of the first
            assert (await asyncio.wait_for(journal_of(env).recover(), 10)).deleted == 1

    @pytest.mark.parametrize("keys", KEYS)
    async def test_the_row_that_vouches_is_locked_alone(self, env: OrmEnvironment, keys: str) -> None:
        """It is found by its primary key, of whatever type: at this level a look through the table would lock all rows."""
        metadata = MetaData()
        types, values = KEYS[keys]
        names = [f"k{number}" for number in range(len(types))]
        columns = [Column(name, kind, primary_key=True, autoincrement=False) for name, kind in zip(names, types, strict=True)]
        Table("keyed", metadata, *columns, Column("file", AttachmentType("docs")))
        journal_tables(metadata)
        storage_triggers(metadata)
        async with env.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        copy = "INSERT INTO keyed SELECT {}, file FROM doc WHERE id = {}"
        free = "SELECT COUNT(*) FROM keyed WHERE JSON_VALUE(file, '$.location') = :location FOR UPDATE SKIP LOCKED"
        try:
            refs = await stored(env, *(Doc(id=number, file=file(str(number))) for number in range(1, 6)))
            claimed = {"claimed": "".join(f"\n{ref.location}\n" for ref in refs)}
            async with env.engine.begin() as connection:
                await connection.execute(text("SET @granite_storage_claimed = :claimed"), claimed)
                for number in range(1, 6):
                    await run(connection, copy.format(", ".join(value(number) for value in values), number))
                await run(connection, "SET @granite_storage_claimed = NULL")
            async with transaction(env, "REPEATABLE READ") as connection:
                await run(connection, copy.format(", ".join(value(9) for value in values), 3))
                async with env.engine.connect() as other:
                    await other.execution_options(isolation_level="READ COMMITTED")
                    found = [await other.scalar(text(free), {"location": ref.location}) for ref in refs]
                assert found == [1, 1, 0, 1, 1]
        finally:
            async with env.engine.begin() as connection:
                await connection.run_sync(metadata.tables["keyed"].drop)

    async def test_an_undo_holds_up_workers_and_they_go_on_later(self, env: OrmEnvironment) -> None:
        first, _ = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await run(env, "DELETE FROM doc WHERE id = 1")
        async with transaction(env, "REPEATABLE READ") as connection:
            await run(connection, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=first)
            await run(env, "DELETE FROM doc WHERE id = 2")
            assert (await asyncio.wait_for(journal_of(env).recover(), 10)).claimed == 0
            await env.add(Doc(id=9, file=file("c")))
            await connection.commit()
        report = await journal_of(env).recover()
        assert (report.kept, report.deleted) == (1, 1)


class TestVariants:
    @pytest.fixture
    async def ref(self, env: OrmEnvironment) -> StoredObjectRef:
        """Let a row have a file with a variant."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        variant = await put(env, "v")
        whole = ref.with_variants({"thumb": variant})
        async with env.engine.begin() as connection:
            named = {"claimed": f"\n{variant.location}\n"}
            await connection.execute(text("SET @granite_storage_claimed = :claimed"), named)
            await run(connection, "UPDATE doc SET file = {ref}", ref=whole)
            await run(connection, "SET @granite_storage_claimed = NULL")
        return whole

    async def test_below_an_ancestor(self, env: OrmEnvironment, ref: StoredObjectRef) -> None:
        await stored(env, Parent(id=1), Parent(id=2))
        await run(env, "INSERT INTO child SELECT 1, 1, file FROM doc", "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await run(env, "DELETE FROM parent")
        assert await nominated(env) == locations(ref)


class TestSessions:
    @pytest.mark.parametrize("level", LEVELS)
    async def test_an_undo_of_what_was_deleted_since_the_snapshot(self, env: OrmEnvironment, level: str) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            await session.connection(execution_options={"isolation_level": level})
            assert len(list(await session.scalars(select(Doc)))) == 1
            session.expunge_all()
            await run(env, "DELETE FROM doc")
            session.add(Doc(id=2, file=Attachment.restore(ref)))
        assert await nominated(env) == set()

    @pytest.mark.parametrize("level", LEVELS)
    async def test_two_uploads_of_one_transaction(self, env: OrmEnvironment, level: str) -> None:
        """The intents are newer than its snapshot, and that of the second one must not wait for what the first has locked."""
        async with env.sessions.begin() as session:
            await session.connection(execution_options={"isolation_level": level})
            assert list(await session.scalars(select(Doc))) == []
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            session.add(Doc(id=2, file=file("b"), other=file("c")))
            await asyncio.wait_for(session.flush(), 10)
        assert len(await env.references()) == 3

    async def test_synchronous_sessions(self, env: OrmEnvironment) -> None:
        engine = create_engine(env.engine.url.set(drivername="mysql+pymysql"))

        def work(level: str, first: int) -> None:
            with Session(engine.execution_options(isolation_level=level)) as session:
                assert len(list(session.scalars(select(Doc)))) == first - 1
                for number in (first, first + 1):
                    session.add(Doc(id=number, file=file(str(number))))
                    session.flush()
                    assert session.scalar(text("SELECT @granite_storage_claimed")) is None
                session.commit()

        for level, first in (("READ COMMITTED", 1), ("REPEATABLE READ", 3)):
            await asyncio.to_thread(work, level, first)
        engine.dispose()

    async def claimed(self, connection: Any) -> Any:
        return await connection.scalar(text("SELECT @granite_storage_claimed"))

    @pytest.mark.parametrize("ends", ["commit", "rollback", "fails", "fails in a savepoint", "close"])
    async def test_what_it_has_claimed_ends_with_its_statements(self, env: OrmEnvironment, ends: str) -> None:
        seen: list[str] = []

        def look(_: Any, __: Any, statement: str, *___: Any) -> None:
            seen.append(statement)

        async with env.engine.connect() as connection, env.sessions(bind=connection) as session:
            event.listen(env.engine.sync_engine, "before_cursor_execute", look)
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            assert await self.claimed(session) is None
            assert any("@granite_storage_claimed = " in statement for statement in seen)
            [ref] = (await env._references(session)).values()
            match ends:
                case "commit":
                    await session.commit()
                case "rollback":
                    await session.rollback()
                case "fails":
                    session.add(Doc(id=2, file=file("b"), title="x" * 200))
                    with pytest.raises(DBAPIError, match="too long"):
                        await session.flush()
                    await session.rollback()
                case "fails in a savepoint":
                    with contextlib.suppress(DBAPIError):
                        async with session.begin_nested():
                            session.add(Doc(id=2, file=file("b"), title="x" * 200))
                            await session.flush()
                    await session.commit()
                case _:
                    pass
            event.remove(env.engine.sync_engine, "before_cursor_execute", look)
            await session.close()
            assert await self.claimed(connection) is None
            if ends in ("rollback", "fails", "close"):
                with pytest.raises(StaleAttachmentError, match="gone or going"):
                    await run(connection, "INSERT INTO doc (id, file) VALUES (7, {ref})", ref=ref)

    async def test_what_a_broken_flush_has_claimed_does_not_reach_the_next_user(self, env: OrmEnvironment) -> None:
        """The connection goes back without a rollback that the session would tell of."""
        listen_to(env.engine.sync_engine)

        def leave(connection: Any) -> None:
            connection.cursor().execute("SET @granite_storage_claimed = 'x'")
            connection.info[CLAIMING_KEY] = True

        for _ in range(2):
            raw = await env.engine.raw_connection()
            await greenlet_spawn(leave, raw)
            await greenlet_spawn(raw.close)
        seen = set()
        for _ in range(3):
            async with env.engine.connect() as connection:
                seen.add(await self.claimed(connection))
        assert seen == {None}

    async def test_a_role_without_rights_on_the_journal(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        admin = create_async_engine(mariadb_admin(), isolation_level="AUTOCOMMIT")
        name, role = env.engine.url.database, "writer_of_rows"
        own = create_async_engine(mariadb_admin().set(username=role, password="x", database=name))
        async with admin.connect() as connection:
            await connection.execute(text(f"CREATE USER {role} IDENTIFIED BY 'x'"))
            try:
                await connection.execute(text(f"GRANT SELECT, INSERT, DELETE ON {name}.doc TO {role}"))
                async with own.begin() as writing:
                    await run(writing, "DELETE FROM doc", "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
                    await run(writing, "DELETE FROM doc")
                    with pytest.raises(DBAPIError, match="denied"):
                        await run(writing, "SELECT 1 FROM granite_storage_intent")
            finally:
                await own.dispose()
                await connection.execute(text(f"DROP USER {role}"))
        await admin.dispose()
        assert await nominated(env) == {ref.location}

    async def test_a_role_that_may_change_tables_and_not_use_them(self, env: OrmEnvironment) -> None:
        """The catalogue shows it the tables, and none of their columns."""
        admin = create_async_engine(mariadb_admin(), isolation_level="AUTOCOMMIT")
        name, role = env.engine.url.database, "changer_of_tables"
        own = create_async_engine(mariadb_admin().set(username=role, password="x", database=name))
        count = text(
            "SELECT COUNT(*) FROM information_schema.triggers WHERE trigger_schema = :name AND event_object_table = 'doc'"
        )
        async with admin.connect() as connection:
            await connection.execute(text(f"CREATE USER {role} IDENTIFIED BY 'x'"))
            try:
                await connection.execute(text(f"GRANT CREATE, ALTER, DROP, INDEX, TRIGGER ON {name}.* TO {role}"))
                assert await connection.scalar(count, {"name": name})
                async with own.connect() as changing:
                    await changing.run_sync(drop_triggers, [Base.metadata.tables["doc"]])
                assert not await connection.scalar(count, {"name": name})
            finally:
                await own.dispose()
                await connection.execute(text(f"DROP USER {role}"))
                async with env.engine.begin() as creating:
                    await creating.run_sync(lambda one: create_triggers(one, sources_of(one, Base.metadata)))
        await admin.dispose()


class TestRetention:
    async def test_of_its_policy_or_the_longest(self, env: OrmEnvironment) -> None:
        refs = await stored(env, *(Doc(id=number, file=file(str(number))) for number in (1, 2, 3)))
        await stored(env, Parent(id=1))
        await stored(env, Child(id=1, parent_id=1, file=file("c")))
        await journal_of(env).check()
        await env.sql("UPDATE granite_storage_meta SET value = '604800' WHERE name = 'retention\\:docs'")
        try:
            await run(env, "DELETE FROM doc WHERE id = 3", "UPDATE doc SET file = NULL WHERE id = 1", "DELETE FROM parent")
            await run(env, "UPDATE doc SET file = JSON_SET(file, '$.storage_key', 'unknown')", "DELETE FROM doc")
            report = await journal_of(env).recover()
            assert (report.claimed, report.waiting) == (0, 4)
            assert await nominated(env) >= locations(*refs)
        finally:
            await journal_of(env).check()
        async with env.engine.connect() as connection:
            found = await connection.execute(text("SELECT value FROM granite_storage_meta WHERE name = 'retention\\:docs'"))
        assert [float(value) for value in found.scalars()] == [0.0]

    async def test_of_its_own_journal(self, env: OrmEnvironment) -> None:
        """One statement may delete rows of two databases, each with a journal and with policies of the same names."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await journal_of(env).check()
        name = env.engine.url.database
        other = f"{name}_other"
        await self.run_as_admin("CREATE DATABASE " + other)
        engine = create_async_engine(mariadb_admin().set(database=other))
        try:
            async with engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
                await run(
                    connection,
                    "INSERT INTO granite_storage_meta (name, value, changed) VALUES ('retention\\:docs', '604800', NOW())",
                    "SET @granite_storage_claimed = '\nx\n'",
                    f"INSERT INTO doc (id, file) VALUES (1, {value('x')})",  # noqa: S608
                    f"DELETE a, b FROM {name}.doc a JOIN doc b ON a.id = b.id",
                )
                waits = "SELECT location, due > UTC_TIMESTAMP + INTERVAL 6 DAY FROM {}.granite_storage_intent"
                found = [(await connection.execute(text(waits.format(one)))).one() for one in (name, other)]
                assert [tuple(one) for one in found] == [(ref.location, 0), ("x", 1)]
        finally:
            await engine.dispose()
            await self.run_as_admin("DROP DATABASE " + other)

    async def run_as_admin(self, statement: str) -> None:
        engine = create_async_engine(mariadb_admin(), isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await connection.execute(text(statement))
        await engine.dispose()


class Models:
    """Cascades of every kind: through a table without files, in a table that refers to itself, and to another schema's."""

    def __init__(self) -> None:
        self.metadata = metadata = MetaData()

        def table(name: str, *items: Any) -> Table:
            return Table(name, metadata, Column("id", Integer, primary_key=True), *items)

        def below(name: str) -> Column[Any]:
            return Column(f"{name}_id", ForeignKey(f"{name}.id", ondelete="CASCADE"))

        def held() -> Column[Any]:
            return Column("file", AttachmentType("docs"))

        table("top")
        table("middle", below("top"))
        table("bottom", below("middle"), held())
        table("node", Column("code", String(20), unique=True), Column("up", ForeignKey("node.code", ondelete="CASCADE")), held())
        table("leaf", Column("node", ForeignKey("node.code", ondelete="CASCADE")), held())
        journal_tables(metadata)
        storage_triggers(metadata)


def value(name: str) -> str:
    return f"""'{{"backend"\\: "store", "storage_key"\\: "docs", "location"\\: "{name}"}}'"""


class TestCascades:
    @pytest.fixture
    async def connection(self, env: OrmEnvironment) -> AsyncIterator[AsyncConnection]:
        """Give a connection to tables of which each row has a file."""
        metadata = Models().metadata
        named = ["b1", "b2", "n1", "n2", "n3", "n4", "l1", "l2", "l3"]
        async with env.engine.connect() as connection:
            await connection.run_sync(metadata.create_all)
            claimed = {"claimed": "".join(f"\n{name}\n" for name in named)}
            await connection.execute(text("SET @granite_storage_claimed = :claimed"), claimed)
            for statement in (
                "INSERT INTO top VALUES (1), (2)",
                "INSERT INTO middle VALUES (1, 1), (2, 2)",
                "INSERT INTO bottom VALUES (1, 1, {b1}), (2, 2, {b2})",
                "INSERT INTO node VALUES (1, 'one', NULL, {n1}), (2, 'two', 'one', {n2}), (3, 'three', 'two', {n3})",
                "INSERT INTO node VALUES (4, 'four', NULL, {n4})",
                "INSERT INTO leaf VALUES (1, 'one', {l1}), (2, 'three', {l2}), (3, 'four', {l3})",
                "SET @granite_storage_claimed = NULL",
            ):
                await connection.execute(text(statement.format(**{name: value(name) for name in named})))
            await connection.commit()
            try:
                yield connection
            finally:
                await connection.rollback()
                await connection.run_sync(metadata.drop_all, [*reversed(metadata.sorted_tables)][:5])
                left = "SELECT COUNT(*) FROM information_schema.triggers WHERE trigger_schema = DATABASE() AND NOT"
                left += " event_object_table IN ('doc', 'parent', 'child', 'grandchild', 'part', 'picture')"
                assert await connection.scalar(text(left)) == 0
                await connection.run_sync(Base.metadata.create_all)

    @pytest.mark.parametrize(
        ("statement", "left"),
        [
            ("DELETE FROM top WHERE id = 1", {"b1"}),
            ("DELETE FROM middle", {"b1", "b2"}),
            ("DELETE FROM node LIMIT 1", {"n1", "n2", "n3", "l1", "l2"}),
            ("DELETE FROM node WHERE code = 'two'", {"n2", "n3", "l2"}),
            ("DELETE FROM node", {"n1", "n2", "n3", "n4", "l1", "l2", "l3"}),
            ("REPLACE INTO node (id, code) VALUES (2, 'new')", {"n2", "n3", "l2"}),
            ("DELETE node, leaf FROM node JOIN leaf ON leaf.node = node.code WHERE node.id = 4", {"n4", "l3"}),
        ],
    )
    async def test_at_any_depth(self, connection: AsyncConnection, statement: str, left: set[str]) -> None:
        await connection.execute(text(statement))
        assert set((await connection.execute(text("SELECT location FROM granite_storage_intent"))).scalars()) == left


class TestChecks:
    async def problems(self, env: OrmEnvironment) -> list[str]:
        return await journal_of(env).find_trigger_problems()

    async def told_by_doctor(self, env: OrmEnvironment) -> list[CheckResult]:
        return [check.result async for check in _check_journal(env.binding) if check.what == "triggers"]

    async def create(self, env: OrmEnvironment) -> None:
        async with env.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def test_what_is_wrong(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        assert await self.problems(env) == []
        await env.sql("DROP TRIGGER granite_storage_delete_doc")
        await env.sql("DROP TRIGGER granite_storage_cascade_parent_grandchild")
        await env.sql("DROP INDEX ix_granite_storage_location_link_ref ON link")
        await env.sql("CREATE TRIGGER mine AFTER INSERT ON child FOR EACH ROW PRECEDES granite_storage_insert_child SET @x = 1")
        async with env.engine.connect() as connection:
            body = "SELECT action_statement FROM information_schema.triggers WHERE trigger_name = 'granite_storage_insert_parent'"
            old = (await connection.scalar(text(body))).replace("'2:", "'1:")
            await connection.exec_driver_sql(
                f"CREATE OR REPLACE TRIGGER granite_storage_insert_parent AFTER INSERT ON parent FOR EACH ROW {old}".replace(
                    "%", "%%"
                )
            )
        found = await self.problems(env)
        for said in (
            "lacks the trigger granite_storage_delete_doc, or this role lacks the privilege TRIGGER",
            "lacks the trigger granite_storage_cascade_parent_grandchild",
            "link has no index over the locations in ref",
            "the trigger granite_storage_insert_child of",
            "the trigger granite_storage_insert_parent of",
        ):
            assert sum(said in problem for problem in found) == 1, (said, found)
        assert len(found) == 5
        await journal_of(env).check()
        assert "SQL that bypasses the sessions is not covered" in caplog.text
        assert await self.told_by_doctor(env) == [CheckResult.BAD] * 5
        await self.create(env)
        assert await self.problems(env) == []
        assert await self.told_by_doctor(env) == [CheckResult.GOOD]
        await env.sql("DROP TRIGGER mine")

    async def test_those_of_an_earlier_version(self, env: OrmEnvironment) -> None:
        """They are known by a variable that they declare; a digest that is not this version's is told of, and replaced."""
        async with env.engine.connect() as connection:
            [url] = (await connection.execute(text("SELECT DATABASE()"))).scalars()
            body = f"BEGIN DECLARE g_made_of TEXT DEFAULT '1:0123 {url}.doc'; END"
            await connection.execute(text("DROP TRIGGER granite_storage_delete_doc"))
            earlier = body.replace("\\", "").replace(":", "\\:")
            for name in ("granite_storage_delete_doc", "granite_storage_earlier_doc"):
                await connection.execute(text(f"CREATE TRIGGER {name} AFTER DELETE ON doc FOR EACH ROW {earlier}"))
        [problem] = await self.problems(env)
        assert "granite_storage_delete_doc of" in problem
        assert "is of another version" in problem
        await self.create(env)
        assert await self.problems(env) == []
        left = "SELECT COUNT(*) FROM information_schema.triggers WHERE trigger_schema = DATABASE() AND trigger_name"
        left += " = 'granite_storage_earlier_doc'"
        async with env.engine.connect() as connection:
            assert await connection.scalar(text(left)) == 0

    async def test_creating_them_warns_of_nothing(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """The driver logs what the server warns of, such as a column that is to be dropped and is not there."""
        metadata = MetaData()
        Table("fresh", metadata, Column("id", Integer, primary_key=True), Column("file", AttachmentType("docs")))
        journal_tables(metadata)
        storage_triggers(metadata)
        async with env.engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await env.sql("DROP TABLE fresh")
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []

    async def test_a_renamed_column(self, env: OrmEnvironment) -> None:
        """The bodies of triggers follow no rename."""
        for table, old in (("doc", "file"), ("parent", "id")):
            await env.sql(f"ALTER TABLE {table} RENAME COLUMN {old} TO renamed")
            try:
                problems = await self.problems(env)
                assert any(f".{table}, which is gone" in one and f"the column {old} of" in one for one in problems), problems
            finally:
                await env.sql(f"ALTER TABLE {table} RENAME COLUMN renamed TO {old}")
            assert await self.problems(env) == []

    async def test_an_index_over_a_virtual_column(self, env: OrmEnvironment) -> None:
        """Earlier versions made it, and MariaDB can crash with one where deletes cascade."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        column = "granite_storage_location_file"
        made = f"{column} VARCHAR(1024) GENERATED ALWAYS AS (JSON_VALUE(file, '$.location')) VIRTUAL INVISIBLE"
        await env.sql(f"ALTER TABLE doc DROP COLUMN {column}, ADD COLUMN {made}")
        [problem] = await self.problems(env)
        assert "one over a virtual column" in problem
        await self.create(env)
        assert await self.problems(env) == []
        await run(env, "INSERT INTO parent VALUES (1, {ref})", ref=ref)

    async def test_the_mode_of_the_connection_that_creates_them(self, env: OrmEnvironment) -> None:
        async with env.engine.connect() as connection:
            await connection.execute(text("SET SESSION sql_mode = 'ANSI'"))
            await connection.execute(text("DROP TRIGGER granite_storage_insert_doc"))
            await connection.run_sync(Base.metadata.create_all)
            mode = "SELECT sql_mode FROM information_schema.triggers WHERE trigger_name = 'granite_storage_insert_doc'"
            assert "ANSI" not in await connection.scalar(text(mode))
            assert "ANSI" in await connection.scalar(text("SELECT @@sql_mode"))
            await connection.invalidate()
        assert await self.problems(env) == []

    async def test_what_cannot_be(self, env: OrmEnvironment) -> None:
        metadata = MetaData()
        Table(
            "one",
            metadata,
            Column("id", Integer, primary_key=True),
            Column("file", AttachmentType("docs")),
            Column("two", ForeignKey("two.id", ondelete="CASCADE", use_alter=True, name="one_two")),
        )
        Table("two", metadata, Column("id", Integer, primary_key=True), Column("one", ForeignKey("one.id", ondelete="CASCADE")))
        Table("bare", metadata, Column("ref", Base.metadata.tables["link"].c.ref.type))
        journal_tables(metadata)
        storage_triggers(metadata)
        async with env.engine.connect() as connection:
            try:
                with pytest.raises(ConfigurationError, match="delete each other's rows in a circle"):
                    await connection.run_sync(metadata.create_all)
                await connection.execute(text("ALTER TABLE one DROP FOREIGN KEY one_two"))
                with pytest.raises(ConfigurationError, match="the table bare has no primary key"):
                    await connection.run_sync(metadata.create_all)
            finally:
                await connection.execute(text("DROP TABLE two, one, bare"))

    async def test_mysql(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        async with env.engine.connect() as connection:
            with monkeypatch.context() as patch, pytest.raises(ConfigurationError, match="this is MySQL"):
                patch.setattr(connection.dialect, "is_mariadb", False)
                await connection.run_sync(lambda it: sources_of(it, Base.metadata))
