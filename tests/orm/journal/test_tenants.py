"""Tenants with schemas of their own, by `schema_translate_map`: one journal serves them all, or says why it cannot."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import delete, insert, make_url, select, text, type_coerce
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StoredObjectRef
from granite_storage.orm import Attachment, StorageJournal, StoredObjectRefType, attachment, bind_storage, journal_tables
from granite_storage.orm.journal import references
from tests.orm.databases import Database
from tests.orm.environment import Base, Doc, OrmEnvironment, file
from tests.orm.journal.test_recovery import expire, journal_of, rows

pytestmark = pytest.mark.case("RA-07")

Sessions = Callable[[OrmEnvironment, str], AbstractAsyncContextManager[AsyncSession]]


class TenantBase(DeclarativeBase):
    pass


class Deed(TenantBase):
    """Is in a schema that does not exist: each session has another one in its place."""

    __tablename__ = "deed"
    __table_args__ = {"schema": "tenant"}
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


journal_tables(TenantBase.metadata)


@pytest.fixture(scope="session", params=["asyncpg", "mariadb"])
def database(request: pytest.FixtureRequest) -> Any:
    """PostgreSQL and MariaDB, whose schemas are databases; drivers make no difference here."""
    return request.getfixturevalue(f"{request.param}_database")


@pytest.fixture
async def env(env: OrmEnvironment) -> AsyncIterator[OrmEnvironment]:
    """An environment with two tenants, who have all tables, those of a journal too; no journal ever writes to these."""
    names = [schema_of(env, tenant) for tenant in "ab"]
    for name in names:
        await env.sql(f"CREATE SCHEMA {name}")
        async with env.engine.begin() as connection:
            await connection.execution_options(schema_translate_map={None: name})
            await connection.run_sync(Base.metadata.create_all)
    yield env
    for name in names:
        await env.sql(f"DROP SCHEMA {name}" + (" CASCADE" if env.database.is_postgres else ""))


def schema_of(env: OrmEnvironment, tenant: str) -> str:
    return f"tenant_{tenant}" if env.database.is_postgres else f"{env.database.url.database}_{tenant}"


@asynccontextmanager
async def mapped_engine(env: OrmEnvironment, tenant: str) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(
        env.engine.execution_options(schema_translate_map={None: schema_of(env, tenant)}), expire_on_commit=False
    ) as session:
        yield session


@asynccontextmanager
async def mapped_connection(env: OrmEnvironment, tenant: str) -> AsyncIterator[AsyncSession]:
    async with env.engine.connect() as connection:
        await connection.execution_options(schema_translate_map={None: schema_of(env, tenant)})
        async with AsyncSession(connection, expire_on_commit=False) as session:
            yield session


@asynccontextmanager
async def mapped_session(env: OrmEnvironment, tenant: str) -> AsyncIterator[AsyncSession]:
    async with env.sessions() as session:
        await session.connection(execution_options={"schema_translate_map": {None: schema_of(env, tenant)}})
        yield session


async def locations(env: OrmEnvironment, *tenants: str) -> set[str]:
    """Return what rows of tenants refer to."""
    found: set[str] = set()
    for tenant in tenants:
        async with mapped_connection(env, tenant) as session:
            refs = await session.scalars(select(type_coerce(Doc.file, StoredObjectRefType())).where(Doc.file.is_not(None)))
            found |= {ref.location for ref in refs if ref is not None}
    return found


async def put(env: OrmEnvironment, tenant: str, number: int, content: str = "a") -> StoredObjectRef:
    async with mapped_engine(env, tenant) as session:
        doc = Doc(id=number, file=file(content))
        session.add(doc)
        await session.commit()
        assert doc.file is not None
        return doc.file.ref


async def empty(env: OrmEnvironment, tenant: str) -> None:
    async with mapped_engine(env, tenant) as session:
        await session.execute(delete(Doc))
        await session.commit()


@pytest.mark.parametrize("sessions", [mapped_engine, mapped_connection, mapped_session], ids=lambda way: way.__name__)
async def test_wherever_the_map_is(env: OrmEnvironment, sessions: Sessions) -> None:
    for tenant in "ab":
        async with sessions(env, tenant) as session:
            session.add_all([Doc(id=1, file=file("first")), Doc(id=2, file=file("kept"))])
            await session.commit()
        async with sessions(env, tenant) as session:
            (await session.get_one(Doc, 1)).file = await file("second").store(Doc.file)
            await session.commit()
        async with sessions(env, tenant) as session:
            session.add(Doc(id=3, file=file("rolled back")))
            await session.flush()
            await session.rollback()
    assert (await journal_of(env).recover()).deleted == 2
    assert await env.objects() == await locations(env, "a", "b")
    assert len(await env.objects()) == 4
    for tenant in "ab":
        async with sessions(env, tenant) as session:
            assert (await session.get_one(Doc, 1)).file is not None
            await session.delete(await session.get_one(Doc, 1))
            await session.delete(await session.get_one(Doc, 2))
            await session.commit()
    assert (await journal_of(env).recover()).deleted == 4


async def test_two_tenants_at_once(env: OrmEnvironment) -> None:
    """The same primary keys, at the same time, with a worker beside them."""
    async with asyncio.TaskGroup() as group:
        for number in range(1, 9):
            for tenant in "ab":
                group.create_task(put(env, tenant, number))
        for _ in range(3):
            group.create_task(journal_of(env).recover())
    assert await env.objects() == await locations(env, "a", "b")
    assert len(await env.objects()) == 16
    await empty(env, "a")
    await journal_of(env).recover()
    assert await env.objects() == await locations(env, "b")
    await empty(env, "b")


@pytest.mark.parametrize("most", [references._MOST_PARAMETERS, 3], ids=["one statement", "several"])
async def test_a_row_of_any_tenant_keeps_its_object(env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A worker of another process knows of all tenants: rows of theirs share objects, by SQL."""
    monkeypatch.setattr(references, "_MOST_PARAMETERS", most)
    kept = await put(env, "a", 1)
    await put(env, "b", 1)
    for tenant in "ab":
        name = schema_of(env, tenant)
        await env.sql(f"INSERT INTO {name}.doc (id, title, other) SELECT 2, title, file FROM {name}.doc WHERE id = 1")  # noqa: S608
    for tenant in "ab":
        async with mapped_session(env, tenant) as session:
            await session.delete(await session.get_one(Doc, 1))
            await session.commit()
    engine = env.database.engine()
    env.binding.unbind()
    binding = bind_storage(Base, env.manager, journal=StorageJournal(engine))
    try:
        assert binding.journal is not None
        report = await binding.journal.recover()
    finally:
        binding.unbind()
        await engine.dispose()
        env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=env.journal)
    assert (report.kept, report.deleted) == (2, 0)
    assert await env.manager.exists(kept)
    for tenant in "ab":
        await empty(env, tenant)


async def test_a_tenant_that_is_gone_holds_up_nothing(env: OrmEnvironment) -> None:
    await put(env, "a", 1)
    await put(env, "b", 1)
    await empty(env, "b")
    name = schema_of(env, "b")
    await env.sql(f"DROP SCHEMA {name}" + (" CASCADE" if env.database.is_postgres else ""))
    try:
        assert (await journal_of(env).recover()).deleted == 1
    finally:
        await env.sql(f"CREATE SCHEMA {name}")
    await empty(env, "a")


async def test_a_map_on_one_statement(env: OrmEnvironment) -> None:
    """A bulk statement displaces what its own schemas hold, and the session goes on in its own."""
    for tenant in "ab":
        await put(env, tenant, 1)
    async with mapped_engine(env, "b") as session:
        session.add(Doc(id=2, file=file("b")))
        mapping = {"schema_translate_map": {None: schema_of(env, "a")}}
        await session.execute(delete(Doc), execution_options=mapping)
        session.add(Doc(id=3, file=file("c")))
        await session.commit()
    assert (await journal_of(env).recover()).deleted == 1
    assert await locations(env, "a") == set()
    assert await env.objects() == await locations(env, "b")
    assert len(await env.objects()) == 3
    await empty(env, "b")


async def test_models_with_a_schema_that_is_only_translated(env: OrmEnvironment) -> None:
    async with env.engine.begin() as connection:
        await connection.run_sync(TenantBase.metadata.tables["granite_storage_intent"].create, checkfirst=True)
        for tenant in "ab":
            await connection.execution_options(schema_translate_map={"tenant": schema_of(env, tenant)})
            await connection.run_sync(Deed.__table__.create)
    journal = StorageJournal(env.engine)
    binding = bind_storage(TenantBase, env.manager, journal=journal)
    try:
        for tenant in "ab":
            engine = env.engine.execution_options(schema_translate_map={"tenant": schema_of(env, tenant)})
            async with AsyncSession(engine) as session:
                session.add_all([Deed(id=1, file=file("a")), Deed(id=2, file=file("b"))])
                await session.commit()
            name = schema_of(env, tenant)
            await env.sql(f"INSERT INTO {name}.deed (id, file) SELECT 3, file FROM {name}.deed WHERE id = 1")  # noqa: S608
            async with AsyncSession(engine) as session:
                for number in (1, 2):
                    await session.delete(await session.get_one(Deed, number))
                await session.commit()
        report = await journal.recover()
        assert (report.deleted, report.kept) == (2, 2)
        await file("c").store(Deed.file)
        await expire(env)
        assert (await journal.recover()).deleted == 1
        for tenant in "ab":
            engine = env.engine.execution_options(schema_translate_map={"tenant": schema_of(env, tenant)})
            async with AsyncSession(engine) as session:
                await session.execute(delete(Deed))
                await session.commit()
        assert (await journal.recover()).deleted == 2
    finally:
        binding.unbind()


async def test_the_journal_is_where_its_engine_has_it(env: OrmEnvironment) -> None:
    """One tenant's tables may be those of the journal, and sessions of another one use it all the same."""
    env.binding.unbind()
    journal = StorageJournal(env.engine.execution_options(schema_translate_map={None: schema_of(env, "a")}))
    binding = bind_storage(Base, env.manager, journal=journal)
    try:
        for tenant in "ab":
            await put(env, tenant, 1)
            await file("nobody takes it").store(Doc.file)
        assert await rows(env, "intent") == [], "the default schema has a journal, too, which nothing was written to"
        assert (await journal.recover()).leased == 2
        for tenant in "ab":
            await empty(env, tenant)
        assert (await journal.recover()).deleted == 2
        async with mapped_engine(env, "a") as session:
            await session.execute(journal.tables.intent.update().values(due=text("due - INTERVAL '1' DAY")))
            await session.commit()
        assert (await journal.recover()).deleted == 2
    finally:
        binding.unbind()
        await journal.aclose()
        env.binding = bind_storage(Base, env.manager, session_factory=env.sessions, journal=env.journal)


async def test_tables_that_are_only_in_the_tenants_schemas(env: OrmEnvironment) -> None:
    """The first upload says where they are looked for, and nothing is stored."""

    class Elsewhere(DeclarativeBase):
        pass

    class _Paper(Elsewhere):
        __tablename__ = "paper"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    journal_tables(Elsewhere.metadata, schema="tenants")
    binding = bind_storage(Elsewhere, env.manager, journal=StorageJournal(env.engine))
    try:
        mapping = {"tenants": schema_of(env, "a")}
        async with AsyncSession(env.engine.execution_options(schema_translate_map=mapping)) as session:
            session.add(_Paper(id=1, file=file("a")))
            with pytest.raises(ConfigurationError, match=r"tenants\.granite_storage_\w+ is missing") as caught:
                await session.commit()
        assert "schema_translate_map" in str(caught.value)
        assert "StorageJournal" in str(caught.value)
    finally:
        binding.unbind()
    assert await env.objects() == set()


async def test_engines_with_options_cost_no_listeners(env: OrmEnvironment) -> None:
    """An application may make one for each request."""
    await put(env, "a", 1)
    before = [len(getattr(env.engine.sync_engine.pool.dispatch, name)) for name in ("checkin", "invalidate")]
    for number in range(2, 5):
        await put(env, "a", number)
    assert [len(getattr(env.engine.sync_engine.pool.dispatch, name)) for name in ("checkin", "invalidate")] == before
    await empty(env, "a")


class TestSessionsElsewhere:
    """A session whose transaction does not reach the journal's tables is told so, and not to try again."""

    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    async def test_another_database(self, env: OrmEnvironment, level: str) -> None:
        url = make_url(env.database.url)
        name = f"{url.database}_other"
        admin = env.database.engine(isolation_level="AUTOCOMMIT")
        async with admin.connect() as connection:
            await connection.execute(text(f"CREATE DATABASE {name}"))
        other = Database(env.database.name, url.set(database=name))
        try:
            async with other.opened(Base.metadata, isolation_level=level) as engine, AsyncSession(engine) as session:
                await session.execute(select(Doc.id))
                session.add(Doc(id=1, file=file("a")))
                with pytest.raises(ConfigurationError, match="another database"):
                    await session.commit()
        finally:
            async with admin.connect() as connection:
                await connection.execute(text(f"DROP DATABASE {name}"))
            await admin.dispose()

    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
    async def test_a_search_path(self, env: OrmEnvironment, level: str) -> None:
        if not env.database.is_postgres:
            return  # a schema is a database there, and none is looked for on a path
        async with env.engine.connect() as connection:
            await connection.execution_options(isolation_level=level)
            async with AsyncSession(connection) as session:
                await session.execute(text("SET LOCAL search_path TO tenant_a"))
                session.add(Doc(id=1, file=file("a")))
                with pytest.raises(ConfigurationError, match="search_path"):
                    await session.commit()

    async def test_tables_of_the_journal_in_a_schema_of_their_own(self, env: OrmEnvironment) -> None:
        """With these a search path is no trouble."""
        if not env.database.is_postgres:
            return

        class Own(DeclarativeBase):
            pass

        class _Paper(Own):
            __tablename__ = "doc"
            id: Mapped[int] = mapped_column(primary_key=True)
            file: Mapped[Attachment | None] = attachment("docs")

        journal_tables(Own.metadata, schema="tenant_b")
        journal = StorageJournal(env.engine)
        binding = bind_storage(Own, env.manager, journal=journal)
        try:
            async with AsyncSession(env.engine) as session:
                await session.execute(text("SET LOCAL search_path TO tenant_a"))
                await session.execute(insert(Doc).values(id=2, title=""))
                paper = await session.get_one(_Paper, 2)
                paper.file = file("a")
                await session.commit()
            assert len(await locations(env, "a")) == 1
        finally:
            binding.unbind()
        await empty(env, "a")
