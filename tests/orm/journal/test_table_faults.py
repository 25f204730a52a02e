"""A table of the journal that is dropped or renamed while processes run, and a role that lacks rights on one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import sqlite3
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy import delete, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from granite_storage import ConfigurationError
from granite_storage.orm import StorageJournal, bind_storage
from tests.orm.databases import mariadb_admin
from tests.orm.environment import Base, Doc, OrmEnvironment, file
from tests.orm.journal.test_recovery import eventually_true, journal_of

WRITES = ("INSERT", "INSERT, UPDATE", "DELETE")
"""What sessions do first with the table of intents; MariaDB names all that a statement needs."""

TABLES = ("intent", "reclaim", "decision", "meta", "job")


@contextlib.asynccontextmanager
async def renamed(env: OrmEnvironment, table: str) -> AsyncIterator[None]:
    """Rename a table of the journal, which was found to be fit, while the block runs."""
    await journal_of(env).check()
    await env.sql(f"ALTER TABLE granite_storage_{table} RENAME TO moved_away")
    try:
        yield
    finally:
        await env.sql(f"ALTER TABLE moved_away RENAME TO granite_storage_{table}")


@contextlib.contextmanager
def explained(*said: str) -> Iterator[pytest.ExceptionInfo[ConfigurationError]]:
    """Expect an error that says all of this, with the driver's own as its cause."""
    with pytest.raises(ConfigurationError) as raised:
        yield raised
    for part in said:
        assert part in str(raised.value)
    assert raised.value.__cause__ is not None
    assert not isinstance(raised.value.__cause__, SQLAlchemyError)


def missing(table: str) -> contextlib.AbstractContextManager[object]:
    return explained(f"granite_storage_{table} is missing from the database", "rename it back", "create_all")


async def store_and_delete(env: OrmEnvironment) -> None:
    """Leave an object that waits for a worker."""
    await env.add(Doc(id=1, file=file("a")))
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Doc, 1))


class TestMissingTables:
    @pytest.mark.parametrize("table", ["intent", "reclaim", "meta", "job"])
    async def test_recovery(self, env: OrmEnvironment, table: str) -> None:
        await store_and_delete(env)
        async with renamed(env, table):
            with missing(table):
                await journal_of(env).recover()
        await env.recover()
        assert await env.objects() == set()

    async def test_recovery_without_the_table_of_decisions(self, env: OrmEnvironment) -> None:
        """PostgreSQL asks it about uploads; on SQLite it is emptied before they are fenced; MariaDB needs it for nothing."""
        if env.database.name == "mariadb":
            pytest.skip("nothing is written there")
        await file("a").store(Doc.file)
        await env.expire()
        async with renamed(env, "decision"):
            with missing("decision"):
                await journal_of(env).recover()
        await env.recover()
        assert await env.objects() == set()

    async def test_worker(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        """Its log says so, and it goes on."""
        await store_and_delete(env)
        async with renamed(env, "reclaim"), journal_of(env).worker():
            await eventually_true(lambda: logged(caplog, "granite_storage_reclaim is missing from the database"))
        await env.check()

    async def test_flush_that_stores(self, env: OrmEnvironment) -> None:
        """On SQLite the intents of uploads are elsewhere, and nothing else is written."""
        await env.add(Doc(id=1, file=file("a")))
        async with renamed(env, "intent"):
            with missing("intent"):
                async with env.sessions.begin() as session:
                    (await session.get_one(Doc, 1)).file = file("b")
        await env.recover()
        await env.check(file_1="a")

    @pytest.mark.parametrize("how", ["delete", "bulk delete", "clear"])
    async def test_flush_that_displaces(self, env: OrmEnvironment, how: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with renamed(env, "intent"):
            with missing("intent"):
                await displace(env, how)
        await env.check(file_1="a")

    async def test_flush_that_restores(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            ref = (await session.get_one(Doc, 1)).file.ref
        journal = journal_of(env)
        async with renamed(env, "reclaim"):
            with missing("reclaim"):
                await journal.adopt([ref])
        await env.check(file_1="a")

    async def test_sidecar(self, env: OrmEnvironment) -> None:
        if not env.database.is_sqlite:
            pytest.skip("only SQLite has one")
        journal = journal_of(env)
        await journal.check()
        path = f"{env.database.url.database}-granite_storage"
        await asyncio.to_thread(execute, path, "ALTER TABLE granite_storage_intent RENAME TO moved_away")
        try:
            with explained("granite_storage_intent is missing from the sidecar", path, "garbage collector"):
                await env.add(Doc(id=1, file=file("a")))
            with explained("granite_storage_intent is missing from the sidecar", path):
                await journal.recover()
        finally:
            await asyncio.to_thread(execute, path, "ALTER TABLE moved_away RENAME TO granite_storage_intent")
        await env.check()

    async def test_other_tables(self, env: OrmEnvironment) -> None:
        """An error about a table of the application stays the database's own."""
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            with pytest.raises(DBAPIError, match="no_such_thing"):
                await session.execute(text("SELECT 1 FROM no_such_thing"))
            await session.rollback()
        await env.check()


class TestRights:
    """A role that may write the rows, but not the journal's tables, or only read them."""

    @pytest.mark.parametrize("how", ["delete", "bulk delete", "clear", "replace", "bulk update"])
    async def test_session(self, env: OrmEnvironment, how: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with limited(env, "doc") as engine:
            with denied(engine, *WRITES):
                await displace(env, how, env.database.sessionmaker(engine, expire_on_commit=False))
        await env.recover()
        await env.check(file_1="a")

    async def test_session_that_stores(self, env: OrmEnvironment) -> None:
        async with limited(env, "doc") as engine:
            with denied(engine, *WRITES):
                await displace(env, "insert", env.database.sessionmaker(engine, expire_on_commit=False))
        await env.recover()
        await env.check()

    async def test_error_of_another_table(self, env: OrmEnvironment) -> None:
        """It stays the database's own."""
        await env.add(Doc(id=1, file=file("a")))
        rights = [f"granite_storage_{table}" for table in TABLES]
        async with limited(env, *rights) as engine:
            with pytest.raises(DBAPIError, match="denied"):
                await displace(env, "delete", env.database.sessionmaker(engine, expire_on_commit=False))
        await env.check(file_1="a")

    async def test_worker(self, env: OrmEnvironment) -> None:
        """Those of its role are seen at the start, and when they are revoked later."""
        await store_and_delete(env)
        tables = [f"granite_storage_{table}" for table in TABLES if table != "reclaim"]
        async with limited(env, "doc", *tables) as engine:
            journal = StorageJournal(engine.sync_engine if env.database.is_synchronous else engine)
            binding = bind_storage(Base, env.manager, journal=journal)
            try:
                with denied(engine, "SELECT", table="reclaim"):
                    await journal.recover()
                journal._checked = True
                with denied(engine, "SELECT", table="reclaim"):
                    await journal.recover()
            finally:
                binding.unbind()
                await journal.aclose()
        await env.recover()
        assert await env.objects() == set()

    async def test_schema(self, env: OrmEnvironment) -> None:
        """PostgreSQL names the schema alone where that is what the role may not use."""
        if not env.database.is_postgres:
            pytest.skip("a schema has no rights of its own there")
        await env.sql("CREATE SCHEMA apart")
        await env.sql("CREATE TABLE apart.granite_storage_intent (id INTEGER)")
        try:
            async with limited(env, "doc") as engine, env.database.sessionmaker(engine)() as session:
                await session.execute(update(Doc).values(file=None))
                with explained("granite_storage_intent", f"GRANT USAGE ON SCHEMA apart TO {engine.url.username}"):
                    await session.execute(text("SELECT 1 FROM apart.granite_storage_intent"))
        finally:
            await env.sql("DROP SCHEMA apart CASCADE")


@contextlib.asynccontextmanager
async def limited(env: OrmEnvironment, *tables: str) -> AsyncIterator[Any]:
    """Give an engine of a role that may use some tables, and no others."""
    if env.database.is_sqlite:
        pytest.skip("SQLite has no rights")
    role, rights = f"limited_{uuid.uuid4().hex[:12]}", "SELECT, INSERT, UPDATE, DELETE"
    if env.database.is_postgres:
        own, admin = env.database.url.set(username=role), env.engine
        made, dropped = f"CREATE ROLE {role} LOGIN", [f"DROP OWNED BY {role}", f"DROP ROLE {role}"]
    else:
        own, admin = env.database.url.set(username=role, password="x"), create_async_engine(mariadb_admin())
        made, dropped = f"CREATE USER {role} IDENTIFIED BY 'x'", [f"DROP USER {role}"]
    schema = "public" if env.database.is_postgres else env.database.url.database
    engine = dataclasses.replace(env.database, url=own, loop=None).engine()
    async with admin.begin() as connection:
        await connection.execute(text(made))
        for table in tables:
            await connection.execute(text(f"GRANT {rights} ON {schema}.{table} TO {role}"))
    try:
        yield engine
    finally:
        await engine.dispose()
        async with admin.begin() as connection:
            for statement in dropped:
                await connection.execute(text(statement))
        if admin is not env.engine:
            await admin.dispose()


@contextlib.contextmanager
def denied(engine: Any, *verbs: str, table: str = "intent") -> Iterator[None]:
    """Expect an error that names one of the verbs, the table, and the role."""
    with explained(f"granite_storage_{table}", "GRANT SELECT, INSERT, UPDATE, DELETE ON ", engine.url.username) as raised:
        yield
    said = re.search(r"refuses ([A-Z, ]+) on the journal's table (\S+) .* execute GRANT .* ON (\S+) TO", str(raised.value))
    assert said is not None
    assert said[1] in verbs
    assert said[2] == said[3]
    assert said[2].endswith(f"granite_storage_{table}")


def execute(path: str, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


async def logged(caplog: pytest.LogCaptureFixture, said: str) -> bool:
    return said in caplog.text


async def displace(env: OrmEnvironment, how: str, sessions: Any = None, model: Any = Doc) -> None:
    async with (env.sessions if sessions is None else sessions).begin() as session:
        if how == "bulk delete":
            await session.execute(delete(model))
        elif how == "bulk update":
            await session.execute(update(model).values(file=None))
        elif how == "delete":
            await session.delete(await session.get_one(model, 1))
        elif how == "insert":
            session.add(model(id=2, file=file("c")))
        else:
            (await session.get_one(model, 1)).file = None if how == "clear" else file("b")
