"""Rows that SQL without the session has made share an object: it stays until the last of them lets it go."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import MetaData, delete, event, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from granite_storage import StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import Attachment, StoredObjectRefType, attachment, bind_storage, locking, uploads
from granite_storage.orm.columns import attachment_tables, generated_location, location_column_name
from granite_storage.orm.locking import read_catalogue
from granite_storage.orm.references import find_location_columns
from tests.orm.clones import COPIES, bound_beside, cloned, cloned_as, copy_id
from tests.orm.environment import Doc, Node, OrmEnvironment, file
from tests.orm.values import Sessions, add, locations, sqlite

pytestmark = pytest.mark.case("RE-03")

COPY = "INSERT INTO doc (id, title, file) SELECT id + 10, title, file FROM doc"
TO_ANOTHER_TABLE = "INSERT INTO node (id, file) SELECT id, file FROM doc WHERE file IS NOT NULL"
TO_ANOTHER_COLUMN = "UPDATE doc SET other = file"


async def shared(env: OrmEnvironment, statement: str = COPY) -> set[str]:
    await env.add(Doc(id=1, file=file("a")))
    await env.sql(statement)
    return await env.objects()


async def contents(env: OrmEnvironment) -> list[bytes]:
    """Return what the rows refer to, each readable."""
    return sorted((await env.contents()).values())


async def move_and_commit(env: OrmEnvironment, *, delete_source: bool = False) -> None:
    """Move the file of row 1 to row 2."""
    async with env.sessions.begin() as session:
        source, target = await session.get_one(Doc, 1), await session.get_one(Doc, 2)
        target.file, source.file = source.file, None
        if delete_source:
            await session.flush()
            await session.delete(source)


class TestFlush:
    async def test_delete_one_after_the_other(self, env: OrmEnvironment) -> None:
        before = await shared(env)
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 1))
        assert await contents(env) == [b"a"]
        assert await env.objects() == before
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 11))
        assert await env.objects() == set()

    async def test_delete_both(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 1))
            await session.delete(await session.get_one(Doc, 11))
        assert await env.objects() == set()

    @pytest.mark.parametrize("statement", [COPY, TO_ANOTHER_TABLE, TO_ANOTHER_COLUMN])
    async def test_replace(self, env: OrmEnvironment, statement: str) -> None:
        await shared(env, statement)
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("b")
        assert await contents(env) == [b"a", b"b"]
        assert len(await env.objects()) == 2
        await env.check()

    async def test_column_of_the_same_row(self, env: OrmEnvironment) -> None:
        await shared(env, TO_ANOTHER_COLUMN)
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = None
        await env.check(other_1="a")

    async def test_copied_in_the_same_transaction(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.flush()
            await session.execute(text(COPY))
            await session.delete(doc)
        await env.check(file_11="a")

    @pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_flush_postexec", "before_commit"])
    async def test_copied_by_a_listener(self, env: OrmEnvironment, name: str) -> None:
        """History is written by SQL, from a row as it was, in whatever event."""
        await shared(env)
        await env.sql("UPDATE doc SET code = 'history' WHERE id = 11")
        copy = text("INSERT INTO doc (id, title, file) SELECT 20, title, file FROM doc WHERE code = 'history'")
        async with env.sessions.begin() as session:

            def remember(inner: Session, *_: Any) -> None:
                inner.connection().execute(copy)
                inner.connection().execute(text("DELETE FROM doc WHERE code = 'history'"))

            event.listen(session.sync_session, name, remember, once=True)
            (await session.get_one(Doc, 1)).file = file("b")
        await env.check(file_1="b", file_20="a")

    async def test_rolled_back(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with env.sessions() as session:
            (await session.get_one(Doc, 1)).file = file("b")
            await session.flush()
            await session.rollback()
        assert await contents(env) == [b"a", b"a"]
        await env.sql("DELETE FROM doc WHERE id = 11")

    async def test_inside_a_savepoint(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with env.sessions.begin() as session, session.begin_nested():
            await session.delete(await session.get_one(Doc, 1))
        await env.check(file_11="a")

    async def test_joined_to_a_connections_transaction(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with (
            env.engine.begin() as connection,
            AsyncSession(connection, join_transaction_mode="create_savepoint") as session,
        ):
            await session.delete(await session.get_one(Doc, 1))
            await session.commit()
        await env.check(file_11="a")


class TestStatements:
    async def test_delete(self, env: OrmEnvironment) -> None:
        await shared(env)
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc).where(Doc.id == 1))
        await env.check(file_11="a")

    async def test_update(self, env: OrmEnvironment) -> None:
        await shared(env, TO_ANOTHER_TABLE)
        async with env.sessions.begin() as session:
            await session.execute(update(Doc).values(file=None))
        assert await contents(env) == [b"a"]
        async with env.sessions.begin() as session:
            await session.execute(delete(Node))
        assert await env.objects() == set()

    async def test_many(self, env: OrmEnvironment) -> None:
        await env.add(*(Doc(id=number, file=file(str(number))) for number in range(1, 300)))
        await env.sql("INSERT INTO node (id, file) SELECT id, file FROM doc WHERE id > 297")
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc))
        assert await contents(env) == [b"298", b"299"]
        await env.check()


class TestDatabases:
    """What the database cannot say counts as referred to."""

    async def test_table_that_is_not_there(self, env: OrmEnvironment) -> None:
        """A base has tables that this database has not: in another one, or only after the next migration."""
        await shared(env)
        await env.sql("ALTER TABLE note RENAME TO elsewhere")
        try:
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Doc, 1))
            assert len(await env.objects()) == 1
            async with env.sessions.begin() as session:
                await session.delete(await session.get_one(Doc, 11))
            assert await env.objects() == set()
        finally:
            await env.sql("ALTER TABLE elsewhere RENAME TO note")

    async def test_question_that_fails(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """The rows are committed all the same, and the object is the garbage collector's."""
        await env.add(Doc(id=1, file=file("a")))
        (left,) = await env.objects()
        await env.sql("ALTER TABLE note RENAME COLUMN scan_ref TO unknown")
        try:
            with caplog.at_level(logging.WARNING, "granite_storage"):
                async with env.sessions.begin() as session:
                    session.add(Doc(id=2))
                    (await session.get_one(Doc, 1)).file = file("b")
        finally:
            await env.engine.dispose()  # SQLite renames by the schema that a connection remembers
            await env.sql("ALTER TABLE note RENAME COLUMN unknown TO scan_ref")
        assert "unknown whether other rows refer to 1 displaced objects" in caplog.text
        assert left in await env.objects()
        await env.backend.delete(left)
        await env.check(file_1="b")

    @pytest.mark.parametrize("database", ["asyncpg", "psycopg", "mariadb"], indirect=True)
    @pytest.mark.parametrize("source", ["kept", "deleted"])
    async def test_object_that_another_transaction_has_moved(self, env: OrmEnvironment, source: str) -> None:
        """The snapshot of MariaDB still shows it in the row that it was moved out of."""
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        async with env.sessions() as session:
            row = await session.get_one(Doc, 2)
            await move_and_commit(env, delete_source=source == "deleted")
            await session.refresh(row, with_for_update=True)
            row.file = file("b")
            await session.commit()
        await env.check(file_2="b")

    @pytest.mark.parametrize("database", ["mariadb"], indirect=True)
    async def test_deadlock_of_the_question(self, env: OrmEnvironment) -> None:
        """A deadlock rolls the rows of either transaction back: nothing is deleted for one that has not been committed."""
        await env.add(Doc(id=1, file=file("a")), Doc(id=2), *(Doc(id=number) for number in range(3, 9)))
        async with env.sessions() as session, env.sessions() as other:
            row = await session.get_one(Doc, 2)
            await move_and_commit(env)
            await session.refresh(row, with_for_update=True)
            row.file = file("b")
            await session.flush()
            for number in (1, *range(3, 9)):  # the transaction that has changed more survives
                await other.execute(update(Doc).where(Doc.id == number).values(title="changed"))
            waiting = asyncio.create_task(other.execute(update(Doc).where(Doc.id == 2).values(title="changed")))
            await asyncio.sleep(0.3)
            with pytest.raises(OperationalError, match="Deadlock"):
                await session.commit()
            await waiting
            await other.commit()
            await session.rollback()
        await env.check(file_2="a")

    @pytest.mark.parametrize("database", ["sqlite"], indirect=True)
    async def test_damaged_row(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        await env.sql("UPDATE doc SET file = '{' WHERE id = 2")
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = file("b")
        assert len(await env.objects()) == 1
        await env.sql("UPDATE doc SET file = NULL WHERE id = 2")


async def delete_one(session: AsyncSession) -> None:
    await session.delete(await session.get_one(Doc, 1))


async def replace_one(session: AsyncSession) -> None:
    (await session.get_one(Doc, 1)).file = None


async def delete_by_statement(session: AsyncSession) -> None:
    await session.execute(delete(Doc).where(Doc.id == 1))


async def update_by_statement(session: AsyncSession) -> None:
    await session.execute(update(Doc).where(Doc.id == 1).values(file=None))


Way = Callable[[AsyncSession], Awaitable[None]]
WAYS: list[Way] = [delete_one, replace_one, delete_by_statement, update_by_statement]


class TestSnapshots:
    """What the transaction's own view of the rows does not tell: nothing is deleted before a new one was asked."""

    @pytest.mark.case("RA-13")
    @pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE", "READ UNCOMMITTED"])
    @pytest.mark.parametrize("way", ["replace", "delete", "bulk"])
    async def test_row_that_is_newer_than_the_snapshot(self, env: OrmEnvironment, level: str, way: str) -> None:
        if env.database.is_sqlite:
            pytest.skip("a transaction of SQLite that writes has no older snapshot")
        if env.database.is_postgres and level == "READ UNCOMMITTED":
            pytest.skip("PostgreSQL has no READ UNCOMMITTED")
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            await session.connection(execution_options={"isolation_level": level})
            doc = await session.get_one(Doc, 1)
            if level != "SERIALIZABLE" or env.database.is_postgres:  # there the read has locked the row
                await env.sql(COPY)
            if way == "replace":
                doc.file = None
            elif way == "delete":
                await session.delete(doc)
            else:
                await session.execute(delete(Doc).where(Doc.id == 1))
            await session.commit()
        assert await contents(env) == ([] if level == "SERIALIZABLE" and not env.database.is_postgres else [b"a"])
        assert {ref.location for ref in (await env.references()).values()} == await env.objects()

    @pytest.mark.case("RA-13")
    async def test_delete_that_is_rolled_back_later(self, env: OrmEnvironment) -> None:
        """At READ UNCOMMITTED a row seems to be gone that another transaction may bring back."""
        if env.database.name != "mariadb":
            pytest.skip("only MariaDB reads what is not committed")
        await shared(env)
        async with env.engine.connect() as other, env.sessions() as session:
            await other.exec_driver_sql("DELETE FROM doc WHERE id = 11")
            await session.connection(execution_options={"isolation_level": "READ UNCOMMITTED"})
            await session.delete(await session.get_one(Doc, 1))
            await session.commit()
            await other.rollback()
        assert await contents(env) == [b"a"]

    @pytest.mark.case("RA-13")
    @pytest.mark.parametrize("statement", ["CREATE TABLE implied (id INT)", "TRUNCATE TABLE implied"])
    async def test_commit_that_a_statement_implies(self, env: OrmEnvironment, statement: str) -> None:
        """MariaDB commits before DDL: what is rolled back afterwards has its rows, and so keeps its objects."""
        if env.database.name != "mariadb":
            pytest.skip("elsewhere DDL is part of the transaction")
        await env.sql("DROP TABLE IF EXISTS implied")
        if statement.startswith("TRUNCATE"):
            await env.sql("CREATE TABLE implied (id INT)")
        try:
            async with env.sessions() as session:
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                await session.execute(text(statement))
                session.add(Doc(id=2, file=file("b")))
                await session.flush()
                await session.rollback()
        finally:
            await env.sql("DROP TABLE IF EXISTS implied")
        await env.check(file_1="a")

    @pytest.mark.case("RA-13")
    @pytest.mark.parametrize("way", ["statement", "driver"])
    async def test_commit_that_sqlalchemy_does_not_see(self, env: OrmEnvironment, way: str) -> None:
        """Such as one before a statement that runs in no transaction, or that of SQLite's `executescript`."""
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            driver = (await (await session.connection()).get_raw_connection()).driver_connection
            assert driver is not None
            if way == "statement" or env.database.name == "asyncpg":
                await session.execute(text("COMMIT"))
            elif env.database.is_sqlite:
                await driver.executescript("SELECT 1")
            else:
                await driver.commit()
            await session.rollback()
        await env.check(file_1="a")

    @pytest.mark.case("RA-13")
    @pytest.mark.parametrize("database", ["sqlite", "psycopg", "mariadb"], indirect=True)
    async def test_driver_that_commits_each_statement(self, env: OrmEnvironment) -> None:
        """The mode is the driver's own, of which SQLAlchemy knows nothing."""
        mode: dict[str, Any] = {"isolation_level": None} if env.database.is_sqlite else {"autocommit": True}
        engine = env.database.engine(connect_args=mode)
        try:
            async with AsyncSession(engine) as session:
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                await session.rollback()
        finally:
            await engine.dispose()
        await env.check(file_1="a")

    @pytest.mark.case("RA-13")
    @pytest.mark.parametrize("is_joined", [False, True])
    async def test_ref_of_a_savepoint_that_was_rolled_back(self, env: OrmEnvironment, is_joined: bool) -> None:
        """SQL gives it to a row, in the transaction around the savepoint."""
        value = "CAST(:ref AS jsonb)" if env.database.is_postgres else ":ref"
        insert = text(f"INSERT INTO doc (id, title, file) VALUES (2, '', {value})")  # noqa: S608
        async with env.engine.connect() as connection, connection.begin():
            bind = connection if is_joined else env.engine
            async with AsyncSession(bind, join_transaction_mode="create_savepoint") as session:
                await session.execute(text("UPDATE doc SET title = ''"))
                savepoint = session if is_joined else await session.begin_nested()
                session.add(doc := Doc(id=1, file=file("a")))
                await session.flush()
                assert doc.file is not None
                ref = {"ref": json.dumps(doc.file.ref.to_dict())}
                await savepoint.rollback()
                await session.execute(insert, ref)
                await session.commit()
        await env.check(file_2="a")

    @pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
    async def test_database_that_does_not_answer(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A rollback waits for a new connection no longer than for anything else: the object stays."""
        monkeypatch.setattr(uploads, "_ANSWER_TIMEOUT", 0.3)
        arguments = env.database.engine().dialect.create_connect_args(env.database.url)[1]
        is_silent = False

        async def connect() -> Any:
            if is_silent:
                await asyncio.sleep(60)
            return await asyncpg.connect(**arguments)

        engine = create_async_engine("postgresql+asyncpg://", async_creator=connect)
        try:
            async with asyncio.timeout(20), AsyncSession(engine) as session:
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                is_silent = True
                await session.rollback()
        finally:
            await engine.dispose()
        assert "has not answered" in caplog.text
        (left,) = await env.objects()
        await env.backend.delete(left)

    @pytest.mark.parametrize("database", ["sqlite"], indirect=True)
    async def test_rollback_in_memory(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """A second connection would see an empty database."""
        engine = create_async_engine("sqlite+aiosqlite://")
        try:
            async with engine.begin() as connection:
                await connection.run_sync(Doc.metadata.create_all)
            async with AsyncSession(engine) as session:
                session.add(Doc(id=1, file=file("a")))
                await session.flush()
                await session.rollback()
        finally:
            await engine.dispose()
        assert await env.objects() == set()
        assert not caplog.records

    @pytest.mark.case("RE-03")
    async def test_table_that_another_one_has_locked(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A migration of one tenant holds up the commits of no other: the objects stay."""
        if env.database.is_sqlite:
            pytest.skip("SQLite has one writer")
        monkeypatch.setattr(locking, "_LOCK_TIMEOUT", 1)
        before = await shared(env, "SELECT 1")
        async with cloned(env) as schema, env.engine.connect() as migration:
            lock = "LOCK TABLE {}.doc IN ACCESS EXCLUSIVE MODE" if env.database.is_postgres else "LOCK TABLES {}.doc WRITE"
            await migration.exec_driver_sql(lock.format(schema))
            try:
                async with asyncio.timeout(20), env.sessions.begin() as session:
                    await session.delete(await session.get_one(Doc, 1))
            finally:
                if not env.database.is_postgres:
                    await migration.exec_driver_sql("UNLOCK TABLES")
        assert "unknown whether other rows refer" in caplog.text
        assert await env.objects() == before
        await env.sql("DELETE FROM doc")
        for location in before:
            await env.backend.delete(location)


class TestSchemas:
    """A table that was cloned into another schema has rows that refer to the objects of the first, and no model knows."""

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
    async def test_clone_keeps_the_object(self, env: OrmEnvironment, way: Way) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        before = await env.objects()
        async with cloned(env) as schema:
            async with env.sessions.begin() as session:
                await way(session)
            assert await env.objects() == before
            await env.sql(f"DELETE FROM {schema}.doc WHERE id = 2")  # noqa: S608
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc).where(Doc.id == 2))
            (left,) = await env.objects()
        await env.backend.delete(left)

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
    async def test_clone_lets_the_original_have_it(self, env: OrmEnvironment, way: Way) -> None:
        """The session is translated to the clone."""
        await env.add(Doc(id=1, file=file("a")))
        async with cloned(env) as schema:
            engine = env.engine.execution_options(schema_translate_map={None: schema})
            async with AsyncSession(engine) as session:
                await way(session)
                await session.commit()
            await env.check(file_1="a")

    @pytest.mark.parametrize("database", ["mariadb"], indirect=True)
    @pytest.mark.parametrize("holder", ["_cloned", "_CLONED"])
    async def test_clones_whose_names_differ_in_case(self, env: OrmEnvironment, holder: str) -> None:
        """On Linux they are two databases, each with the rows and the generated columns of its own."""
        await env.add(Doc(id=1, file=file("a")))
        (kept,) = await env.objects()
        name = env.database.url.database
        column = f"{location_column_name('file')} {generated_location('file')}"
        async with cloned(env), env.engine.connect() as connection:
            if not await connection.scalar(text("SELECT @@lower_case_table_names = 0")):
                pytest.skip("this server has one database for both names")
            await env.sql(f"CREATE SCHEMA {name}_CLONED")
            try:
                await env.sql(f"CREATE TABLE {name}_CLONED.doc LIKE doc")
                await env.sql(f"INSERT INTO {name}_CLONED.doc SELECT * FROM doc")  # noqa: S608
                await env.sql(f"DELETE FROM {name}{holder.swapcase()}.doc")  # noqa: S608
                await env.sql(f"ALTER TABLE {name}{holder}.doc ADD COLUMN {column}")
                tables = [Doc.__table__.to_metadata(MetaData(), schema=f"{name}{case}") for case in ("_cloned", "_CLONED")]  # type: ignore[attr-defined]
                found = await connection.run_sync(find_location_columns, [table.c.file for table in tables])
                assert [column.table.schema for column in found] == [f"{name}{holder}"]
                async with env.sessions.begin() as session:
                    await delete_one(session)
                assert await env.objects() == {kept}
            finally:
                await env.sql(f"DROP SCHEMA {name}_CLONED")
        await env.backend.delete(kept)

    async def test_clone_of_the_same_transaction(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with cloned(env) as schema:
            await env.sql(f"DELETE FROM {schema}.doc")  # noqa: S608
            async with env.sessions.begin() as session:
                await session.execute(text(f"INSERT INTO {schema}.doc SELECT * FROM doc"))  # noqa: S608
                await delete_one(session)
            (left,) = await env.objects()
        await env.backend.delete(left)

    async def test_clone_that_is_dropped_again(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with cloned(env), env.sessions.begin() as session:
            await session.execute(update(Doc).where(Doc.id == 1).values(title="changed"))
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc))
        assert await env.objects() == set()

    @pytest.mark.parametrize("database", ["mariadb"], indirect=True)
    async def test_clone_that_is_newer_than_the_snapshot(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """The snapshot does not show what is in it: the object stays."""
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            await session.get_one(Doc, 1)
            async with cloned(env):
                await delete_one(session)
                with caplog.at_level(logging.WARNING, "granite_storage"):
                    await session.commit()
                (left,) = await env.objects()
        assert left in caplog.text
        await env.backend.delete(left)

    async def test_clone_that_is_dropped_meanwhile(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """The catalogue names it, and when it is asked it is not there any more."""
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with cloned(env), env.sessions() as session:
            columns = attachment_tables(env.binding.metadata).refs()
            old = await session.run_sync(lambda inner: read_catalogue(inner.connection(), columns))
        answers = [old, old]

        def read(connection: Any, columns: Any) -> Any:
            return answers.pop() if answers else read_catalogue(connection, columns)

        monkeypatch.setattr(locking, "read_catalogue", read)
        async with env.sessions.begin() as session:
            await delete_one(session)
        assert len(await env.objects()) == 1
        assert not answers

    @pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
    async def test_clone_that_may_not_be_read(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """What it refers to is unknown: the object stays, and the log says which table it is about."""
        await env.add(Doc(id=1, file=file("a")))
        await env.sql("CREATE ROLE tenant_role")
        await env.sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant_role")
        try:
            async with cloned(env) as schema:
                with caplog.at_level(logging.WARNING, "granite_storage"):
                    async with env.sessions.begin() as session:
                        await session.execute(text("SET LOCAL ROLE tenant_role"))
                        await delete_one(session)
                assert f"{schema}.doc" in caplog.text
                (left,) = await env.objects()
        finally:
            await env.sql("DROP OWNED BY tenant_role")
            await env.sql("DROP ROLE tenant_role")
        assert left in caplog.text
        await env.backend.delete(left)

    @pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
    async def test_table_of_the_same_name_that_has_no_refs(self, env: OrmEnvironment) -> None:
        """It belongs to another application, and holds up nothing."""
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await env.sql("CREATE SCHEMA another")
        try:
            await env.sql("CREATE TABLE another.doc (id int, file text)")
            await env.sql("CREATE TABLE another.node (id int)")
            await env.sql("CREATE VIEW another.note AS SELECT 1 / 0 AS scan_ref")
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc))
        finally:
            await env.sql("DROP SCHEMA another CASCADE")
        assert await env.objects() == set()

    @pytest.mark.parametrize("database", ["sqlite", "mariadb"], indirect=True)
    async def test_names_are_the_same_in_whatever_case(self, env: OrmEnvironment) -> None:
        await shared(env, TO_ANOTHER_COLUMN)
        await env.sql("ALTER TABLE doc RENAME COLUMN other TO OTHER")
        try:
            async with env.sessions.begin() as session:
                await session.execute(update(Doc).values(file=None))
            await env.check(other_1="a")
        finally:
            await env.sql("ALTER TABLE doc RENAME COLUMN OTHER TO other")


@pytest.mark.parametrize(("database", "kind", "value"), COPIES, indirect=["database"], ids=map(copy_id, COPIES))
class TestOtherTypes:
    """A clone has the refs in a column of another type: what its text mentions is referred to."""

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
    async def test_clone_keeps_the_object(self, env: OrmEnvironment, kind: str, value: str, way: Way) -> None:
        await env.add(Doc(id=1, file=file("a", "\u00e4 b.txt")), Doc(id=2, file=file("b")))
        before = await env.objects()
        async with cloned_as(env, kind, value) as schema:
            async with env.sessions.begin() as session:
                await way(session)
            assert await env.objects() == before
            await env.sql(f"DELETE FROM {schema}.doc WHERE id = 2")  # noqa: S608
            async with env.sessions.begin() as session:
                await session.execute(delete(Doc).where(Doc.id == 2))
            (left,) = await env.objects()
        await env.backend.delete(left)


@asynccontextmanager
async def tenant_role(env: OrmEnvironment) -> AsyncIterator[None]:
    """Have a role that may use the tables of the models."""
    await env.sql("CREATE ROLE tenant_role")
    await env.sql("GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant_role")
    try:
        yield
    finally:
        await env.sql("DROP OWNED BY tenant_role")
        await env.sql("DROP ROLE tenant_role")


@asynccontextmanager
async def row_security(env: OrmEnvironment) -> AsyncIterator[None]:
    """Let `tenant_role` see the rows of `doc` with the title of its tenant."""
    async with tenant_role(env):
        await env.sql("ALTER TABLE doc ENABLE ROW LEVEL SECURITY")
        await env.sql("CREATE POLICY tenants ON doc USING (title = current_setting('app.tenant', true))")
        try:
            yield
        finally:
            await env.sql("DROP POLICY tenants ON doc")
            await env.sql("ALTER TABLE doc DISABLE ROW LEVEL SECURITY")


@pytest.mark.parametrize("database", ["asyncpg"], indirect=True)
class TestRowSecurity:
    """The role may read a table, and not all of its rows: who refers to an object is unknown."""

    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
    async def test_hidden_row(self, env: OrmEnvironment, way: Way, caplog: pytest.LogCaptureFixture) -> None:
        await env.add(Doc(id=1, title="a", file=file("a")))
        await env.sql("INSERT INTO doc (id, title, file) SELECT 2, 'b', file FROM doc")
        async with row_security(env):
            with caplog.at_level(logging.WARNING, "granite_storage"):
                async with env.sessions.begin() as session:
                    await session.execute(text("SET LOCAL ROLE tenant_role"))
                    await session.execute(text("SET LOCAL app.tenant = 'a'"))
                    await way(session)
            assert "row-level security may hide rows of public.doc" in caplog.text
            assert "StorageJournal" in caplog.text
        await env.check(file_2="a")

    async def test_row_that_is_hidden_by_its_delete(self, env: OrmEnvironment) -> None:
        """A trigger turns the delete into an update that a policy hides."""
        await env.add(Doc(id=1, title="a", file=file("a")))
        await env.sql(
            "CREATE FUNCTION soft_delete() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
            " $$ BEGIN UPDATE doc SET title = 'deleted' WHERE id = old.id; RETURN NULL; END $$"
        )
        await env.sql("CREATE TRIGGER soft_delete BEFORE DELETE ON doc FOR EACH ROW EXECUTE FUNCTION soft_delete()")
        try:
            async with row_security(env), env.sessions.begin() as session:
                await session.execute(text("SET LOCAL ROLE tenant_role"))
                await session.execute(text("SET LOCAL app.tenant = 'a'"))
                await delete_by_statement(session)
        finally:
            await env.sql("DROP FUNCTION soft_delete CASCADE")
        await env.check(file_1="a")

    async def test_clone(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with tenant_role(env), cloned(env) as schema:
            await env.sql(f"GRANT USAGE ON SCHEMA {schema} TO tenant_role")
            await env.sql(f"GRANT SELECT ON {schema}.doc TO tenant_role")
            await env.sql(f"ALTER TABLE {schema}.doc ENABLE ROW LEVEL SECURITY")
            with caplog.at_level(logging.WARNING, "granite_storage"):
                async with env.sessions.begin() as session:
                    await session.execute(text("SET LOCAL ROLE tenant_role"))
                    await delete_one(session)
            assert f"row-level security may hide rows of {schema}.doc" in caplog.text
            (left,) = await env.objects()
        await env.backend.delete(left)

    async def test_role_that_sees_all_rows(self, env: OrmEnvironment) -> None:
        """The policies are for others, and hold up nothing."""
        await env.add(Doc(id=1, title="a", file=file("a")))
        async with row_security(env), env.sessions.begin() as session:
            await delete_one(session)
        assert await env.objects() == set()


@pytest.mark.parametrize("database", ["mariadb"], indirect=True)
@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.__name__)
@pytest.mark.parametrize("is_in_a_procedure", [False, True])
async def test_temporary_table(env: OrmEnvironment, way: Way, is_in_a_procedure: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It hides the table of its name, also where its schema is named, and the catalogue shows the other one."""
    await env.add(Doc(id=1, file=file("a")))
    shadow = "CREATE TEMPORARY TABLE doc AS SELECT * FROM copied"
    await env.sql("CREATE TABLE copied AS SELECT * FROM doc")
    await env.sql(f"CREATE PROCEDURE shadow() {shadow}")
    before = await env.objects()
    try:
        async with env.engine.connect() as connection:
            await connection.execute(text("CALL shadow()" if is_in_a_procedure else shadow))
            await connection.commit()
            try:
                with caplog.at_level(logging.WARNING, "granite_storage"):
                    async with AsyncSession(connection) as session:
                        await way(session)
                        await session.commit()
            finally:
                await connection.invalidate()  # the temporary table goes with it
        assert "a temporary table of the same name hides the rows of" in caplog.text
        assert await env.objects() == before
    finally:
        await env.sql("DROP PROCEDURE shadow")
        await env.sql("DROP TABLE copied")
    await env.check(file_1="a")


class TestBases:
    """All bases of a process are asked, whatever manager they are bound to."""

    @pytest.mark.parametrize("manager", ["same", "another"])
    @pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
    async def test_row_of_another_base(self, env: OrmEnvironment, way: Way, manager: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with bound_beside(env, is_same_manager=manager == "same"):
            await env.sql("INSERT INTO paper (id, file) SELECT id, file FROM doc")
            async with env.sessions.begin() as session:
                await way(session)
            (left,) = await env.objects()
        await env.backend.delete(left)

    async def test_base_that_is_in_another_database(self, env: OrmEnvironment) -> None:
        """Its tables are not here, or others of the same name are."""
        await env.add(Doc(id=1, file=file("a")))
        async with bound_beside(env, is_same_manager=False):
            await env.sql("ALTER TABLE paper RENAME COLUMN file TO content")
            async with env.sessions.begin() as session:
                await delete_one(session)
        assert await env.objects() == set()


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(default="")
    file: Mapped[Attachment | None] = attachment("pages")


class PageVersion(Base):
    """Remembers what a page was, and the object as long as it remembers it."""

    __tablename__ = "page_version"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    file: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    manager = StorageManager(backends={"memory": MemoryStorageBackend()}, policies={"pages": StoragePolicy("pages", "memory")})
    binding = bind_storage(Base, manager)
    async with sqlite(tmp_path, Base) as sessions:
        yield sessions
    binding.unbind()


def write_versions(session: Session, *_: Any) -> None:
    """Do what recipes for history tables do."""
    for page in list(session.dirty):
        if isinstance(page, Page):
            old = session.connection().execute(text("SELECT title FROM page WHERE id = :id"), {"id": page.id}).scalar_one()
            file = page.__dict__.get("file")
            session.add(PageVersion(title=old, file=None if file is None or file.is_pending else file.ref))


@pytest.mark.case("RB-17")
async def test_history_in_a_column_of_plain_refs(sessions: Sessions) -> None:
    """No version copies the object, and it stays as long as a version refers to it."""
    file = Attachment(b"a")
    await add(sessions, Page(id=1, title="1", file=file))
    manager = file.manager
    original = await locations(manager)
    event.listen(Session, "before_flush", write_versions)
    try:
        for title in ("2", "3"):
            async with sessions.begin() as session:
                (await session.get_one(Page, 1)).title = title
        assert await locations(manager) == original
        async with sessions.begin() as session:
            await session.delete(await session.get_one(Page, 1))
        assert await locations(manager) == original
        async with sessions() as session:
            version = await session.get_one(PageVersion, 1)
            assert version.file is not None
            assert await manager.get(version.file) == b"a"
    finally:
        event.remove(Session, "before_flush", write_versions)
