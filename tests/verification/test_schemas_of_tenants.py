"""Tables of the same name in the schemas of tenants: verification, migration and derivation look at the rows of all of them."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import (
    Attachment,
    StorageBinding,
    StorageJournal,
    StorageManager,
    StoragePolicy,
    StoredObjectRef,
    attachment,
    bind_storage,
    journal_tables,
)
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ConfigurationError
from granite_storage.migration import MigrationStatus, migrate
from granite_storage.rederivation import RederivationStatus, rederive
from granite_storage.verification import Problem, verify
from tests.orm.databases import Database
from tests.orm.derivations import Upper


class Base(DeclarativeBase):
    pass


class Letter(Base):
    """A table in the schema of a tenant, whichever that is, with a column that each UPDATE of a session changes."""

    __tablename__ = "tenant_paper"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(default=1, onupdate=2)
    file: Mapped[Attachment | None] = attachment("docs", variants={"loud": Upper("a", when="request")})


journal_tables(Base.metadata, schema=None)


class Tenants:
    """Schemas of tenants, beside the one that the sessions of the binding lead to, and two backends for all."""

    def __init__(self, engine: AsyncEngine, names: list[str], *, journaled: bool = False) -> None:
        self.engine = engine
        self.names = names
        self.backends = {"old": MemoryStorageBackend(), "new": MemoryStorageBackend()}
        self.journaled = journaled

    def manager(self, writes_to: str = "old") -> StorageManager:
        return StorageManager(backends=self.backends, policies={"docs": StoragePolicy("docs", writes_to)})

    def sessions(self, name: str | None) -> Any:
        engine = self.engine if name is None else self.engine.execution_options(schema_translate_map={None: name})
        return async_sessionmaker(engine, expire_on_commit=False)

    @contextlib.contextmanager
    def bound(self, name: str | None = None, writes_to: str = "old") -> Iterator[StorageBinding]:
        journal = StorageJournal(self.engine) if self.journaled else None
        binding = bind_storage(Base, self.manager(writes_to), session_factory=self.sessions(name), journal=journal)
        try:
            yield binding
        finally:
            binding.unbind()

    async def add(self, name: str | None, number: int) -> str:
        with self.bound():
            row = Letter(id=number, file=Attachment(f"{name} {number}".encode(), filename="a.txt"))
            async with self.sessions(name).begin() as session:
                session.add(row)
        assert row.file is not None
        return row.file.ref.location

    async def ref(self, schema: str, number: int) -> StoredObjectRef:
        async with self.engine.connect() as connection:
            found = await connection.execute(text(f"SELECT file FROM {schema}.tenant_paper WHERE id = {number}"))  # noqa: S608
            raw = found.scalar_one()
        return StoredObjectRef.from_dict(json.loads(raw) if isinstance(raw, str) else raw)

    async def rewrite(self, schema: str, number: int, ref: StoredObjectRef) -> None:
        """Let a row hold another ref, past every session."""
        value = "CAST(:raw AS JSONB)" if self.engine.dialect.name == "postgresql" else ":raw"
        statement = f"UPDATE {schema}.tenant_paper SET file = {value} WHERE id = {number}"  # noqa: S608
        await self.sql(statement, raw=json.dumps(ref.to_dict()))

    async def objects(self, backend: str) -> set[str]:
        return {info.location async for info in self.backends[backend].iter_objects()}

    async def sql(self, statement: str, **values: Any) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(statement), values)


@pytest.fixture(params=["plain", "journaled"])
async def tenants(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> AsyncIterator[Tenants]:
    """Two schemas beside the default one; on SQLite two databases that each connection attaches."""
    journaled = request.param == "journaled"
    if journaled and database.is_sqlite:
        pytest.skip("a journal on SQLite serves the schema of its own engine")
    # On MariaDB the role of the tests is shown only databases whose names begin like its own.
    prefix = f"{database.url.database}_" if database.name == "mariadb" else ""
    names = [f"{prefix}tenant_{letter}_{uuid.uuid4().hex[:8]}" for letter in "ab"]
    engine = database.engine()
    if database.is_sqlite:

        @event.listens_for(engine.sync_engine, "connect")
        def _(connection: Any, _: Any) -> None:
            for name in names:
                connection.execute(f"ATTACH DATABASE '{tmp_path}/{name}.db' AS {name}")

    tables = [Letter.__table__]
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        for name in names:
            async with engine.begin() as connection:
                if not database.is_sqlite:
                    await connection.execute(text(f"CREATE SCHEMA {name}"))
                translated = await connection.execution_options(schema_translate_map={None: name})
                await translated.run_sync(lambda sync: Base.metadata.create_all(sync, tables=tables))
        yield Tenants(engine, names, journaled=journaled)
    finally:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            if not database.is_sqlite:
                for name in names:
                    await connection.execute(text(f"DROP SCHEMA {name} {'CASCADE' if database.is_postgres else ''}"))
        await engine.dispose()


async def fill(tenants: Tenants) -> dict[str | None, str]:
    """Give the default schema and each tenant a file; return where they are."""
    return {name: await tenants.add(name, 1) for name in (None, *tenants.names)}


class TestVerification:
    async def test_a_lost_file_of_a_tenant(self, tenants: Tenants) -> None:
        locations = await fill(tenants)
        one, other = tenants.names
        with tenants.bound() as binding:
            sound = await verify(binding, deep=True)
            assert (sound.checked, sound.problems, sound.complete, sound.unseen) == (3, 0, True, [])
            await tenants.backends["old"].delete(locations[other])
            report = await verify(binding, deep=True)
            assert (report.checked, report.problems, report.complete) == (3, 1, True)
            (finding,) = report.findings
            assert (finding.problem, finding.table, finding.primary_key) == (Problem.MISSING, f"{other}.tenant_paper", (1,))
            assert await verify(binding).count() == 3
        with tenants.bound(one) as binding:
            report = await verify(binding)
            assert (report.checked, [finding.table for finding in report.findings]) == (3, [f"{other}.tenant_paper"])

    async def test_chosen_schemas(self, tenants: Tenants) -> None:
        locations = await fill(tenants)
        one, other = tenants.names
        await tenants.backends["old"].delete(locations[other])
        with tenants.bound() as binding:
            report = await verify(binding, schemas=[one])
            assert (report.checked, report.problems, report.complete) == (1, 0, True)
            assert (await verify(binding, schemas=[one, other])).problems == 1
            with pytest.raises(ConfigurationError, match="the schema 'nowhere' has none of the tables"):
                await verify(binding, schemas=["nowhere"])
            with pytest.raises(ConfigurationError, match="must be a collection of names"):
                verify(binding, schemas=one)

    async def test_continuing_in_the_schema_of_a_tenant(self, tenants: Tenants) -> None:
        one, other = tenants.names
        for name in (None, one, other):
            await tenants.add(name, 1)
            await tenants.add(name, 2)
        with tenants.bound() as binding:
            keys: list[str | None] = []
            run = verify(binding, concurrency=1)
            await run.on_progress(lambda: keys.append(run.report.key))
            assert len(dict.fromkeys(keys)) == 6
            assert [(await verify(binding, after=key)).checked for key in keys] == [5, 4, 3, 2, 1, 0]
            with pytest.raises(ConfigurationError, match="is not the key of a row"):
                await verify(binding, after='[["a", "b", "c"], 1]')

    async def test_a_table_that_is_in_schemas_of_tenants_alone(self, tenants: Tenants) -> None:
        locations = await fill(tenants)
        one, other = tenants.names
        await tenants.backends["old"].delete(locations[one])
        await tenants.sql("DROP TABLE tenant_paper")
        with tenants.bound() as binding:
            report = await verify(binding)
            # On SQLite a name leads to the first database that has it.
            name = "tenant_paper" if tenants.engine.dialect.name == "sqlite" else f"{one}.tenant_paper"
            assert (report.checked, [finding.table for finding in report.findings]) == (2, [name])
            await tenants.sql(f"DROP TABLE {one}.tenant_paper")
            await tenants.sql(f"DROP TABLE {other}.tenant_paper")
            with pytest.raises(Exception, match="tenant_paper"):
                await verify(binding)

    async def test_references_to_other_stores(self, tenants: Tenants) -> None:
        """They may be another installation's, or this one's with a backend that was removed: nothing is said to be sound."""
        await fill(tenants)
        one = tenants.names[0]
        ref = await tenants.ref(one, 1)
        await tenants.rewrite(one, 1, ref.with_identity("another store"))
        with tenants.bound() as binding:
            report = await verify(binding)
            assert (report.checked, report.problems, report.complete) == (2, 0, False)
            assert "says that it is of a store to which no backend leads" in report.unseen[0]
            assert f"{one}.tenant_paper" in report.unseen[0]
            assert (await verify(binding, schemas=[one])).checked == 1

    async def test_references_of_an_earlier_version(self, tenants: Tenants) -> None:
        """They do not say of which store they are, and are compared like any other."""
        locations = await fill(tenants)
        one = tenants.names[0]
        await tenants.rewrite(one, 1, (await tenants.ref(one, 1)).with_identity(None))
        await tenants.backends["old"].delete(locations[one])
        with tenants.bound() as binding:
            report = await verify(binding)
            assert (report.checked, report.counts[Problem.MISSING], report.complete) == (3, 1, True)

    async def test_tables_of_other_applications(self, tenants: Tenants) -> None:
        """One has no reference; one has some in rows that cannot be told apart; one has text."""
        await fill(tenants)
        one, other = tenants.names
        ref = json.dumps((await tenants.ref(other, 1)).to_dict())
        kind = "JSONB" if tenants.engine.dialect.name == "postgresql" else "JSON"
        value = "CAST(:raw AS JSONB)" if kind == "JSONB" else ":raw"
        for name in (one, other):
            await tenants.sql(f"DROP TABLE {name}.tenant_paper")
            await tenants.sql(f"CREATE TABLE {name}.tenant_paper (file {kind})")
        await tenants.sql(f"INSERT INTO {one}.tenant_paper VALUES ({value})", raw="[1]")  # noqa: S608
        with tenants.bound() as binding:
            report = await verify(binding)
            assert (report.checked, report.complete, report.unseen) == (1, True, [])
            await tenants.sql(f"INSERT INTO {other}.tenant_paper VALUES ({value})", raw=ref)  # noqa: S608
            report = await verify(binding)
            assert (report.checked, report.complete) == (1, False)
            assert report.unseen == [
                f"{other}.tenant_paper is not the table of the model: it has another name or another primary key"
            ]
            if kind == "JSON":
                return  # MariaDB and SQLite take JSON for text
            await tenants.sql(f"DROP TABLE {other}.tenant_paper")
            await tenants.sql(f"CREATE TABLE {other}.tenant_paper (id INT, file TEXT)")
            await tenants.sql(f"INSERT INTO {other}.tenant_paper VALUES (1, :raw)", raw=ref)  # noqa: S608
            report = await verify(binding)
            assert (report.complete, report.unseen) == (
                False,
                [f"{other}.tenant_paper.file holds text that may be references, and no JSON"],
            )

    async def test_a_value_of_a_tenant_that_is_no_reference(self, tenants: Tenants) -> None:
        one = tenants.names[0]
        value = "'[]'::jsonb" if tenants.engine.dialect.name == "postgresql" else "'[]'"
        await tenants.sql(f"INSERT INTO {one}.tenant_paper (id, version, file) VALUES (1, 1, {value})")  # noqa: S608
        with tenants.bound() as binding:
            report = await verify(binding)
            assert [finding.problem for finding in report.findings] == [Problem.UNDECODABLE]


async def test_a_role_that_may_not_read_every_schema(postgres_only: Database) -> None:
    """What it cannot see is named, and nothing says that all is well."""
    role = f"reader_{uuid.uuid4().hex[:8]}"
    engine = postgres_only.engine()
    tenants = Tenants(engine, [f"tenant_{letter}_{uuid.uuid4().hex[:8]}" for letter in "ab"])
    one, other = tenants.names
    try:
        for name in tenants.names:
            await tenants.sql(f"CREATE SCHEMA {name}")
            async with engine.begin() as connection:
                translated = await connection.execution_options(schema_translate_map={None: name})
                await translated.run_sync(Base.metadata.create_all)
            await tenants.add(name, 1)
        await tenants.sql(f"CREATE ROLE {role}")
        await tenants.sql(f"GRANT USAGE ON SCHEMA {one} TO {role}")
        await tenants.sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA {one} TO {role}")
        reader = postgres_only.engine(connect_args={"server_settings": {"role": role}})
        try:
            tenants.engine = reader
            with tenants.bound(one) as binding:
                report = await verify(binding)
                assert (report.checked, report.problems, report.complete) == (1, 0, False)
                assert f"may not read {other}.tenant_paper" in report.unseen[0]
            with tenants.bound(one, "new") as binding:
                moved = await migrate(binding, storage_key="docs", to_backend="new")
                # Of the row that it sees it may change nothing: that is said at once.
                assert (moved.moved, moved.failed, moved.passes, moved.complete) == (0, 1, 1, False)
                assert f"may not read {other}.tenant_paper" in moved.unseen[0]
            async with engine.begin() as connection:
                await connection.execute(text(f"ALTER TABLE {one}.tenant_paper ENABLE ROW LEVEL SECURITY"))
            with tenants.bound(one) as binding:
                report = await verify(binding, schemas=[one])
                assert (report.checked, report.complete) == (0, False)
                assert f"row-level security may hide rows of {one}.tenant_paper" in report.unseen[0]
        finally:
            tenants.engine = engine
            await reader.dispose()
    finally:
        for name in tenants.names:
            await tenants.sql(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        await tenants.sql(f"DROP ROLE IF EXISTS {role}")
        await engine.dispose()


class TestMigration:
    async def test_every_tenant_is_moved(self, tenants: Tenants) -> None:
        await fill(tenants)
        with tenants.bound(writes_to="new") as binding:
            waiting = await migrate(binding, storage_key="docs", to_backend="new").waiting()
            assert waiting["old"][0] == 3
            report = await migrate(binding, storage_key="docs", to_backend="new")
            assert (report.moved, report.failed, report.complete) == (3, 0, True)
            for name in tenants.names:
                assert (await tenants.ref(name, 1)).backend == "new"
                async with tenants.sessions(name)() as session:
                    row = await session.get_one(Letter, 1)
                    assert row.file is not None
                    assert await row.file.read() == f"{name} 1".encode()
                    assert row.version == 1
            if tenants.journaled:
                assert binding.journal is not None
                await binding.journal.recover()
            assert await tenants.objects("old") == set()
            assert len(await tenants.objects("new")) == 3
            assert (await verify(binding, deep=True)).problems == 0

    async def test_a_chosen_schema(self, tenants: Tenants) -> None:
        await fill(tenants)
        one, other = tenants.names
        with tenants.bound(writes_to="new") as binding:
            report = await migrate(binding, storage_key="docs", to_backend="new", schemas=[other])
            assert (report.moved, report.complete) == (1, True)
        assert (await tenants.ref(one, 1)).backend == "old"
        assert (await tenants.ref(other, 1)).backend == "new"

    async def test_rows_that_may_be_of_another_application(self, tenants: Tenants) -> None:
        """They are counted, named and left as they are, until their schema is named."""
        await fill(tenants)
        one = tenants.names[0]
        await tenants.rewrite(one, 1, (await tenants.ref(one, 1)).with_identity(None))
        with tenants.bound(writes_to="new") as binding:
            report = await migrate(binding, storage_key="docs", to_backend="new")
            assert (report.moved, report.failed) == (2, 1)
            (failure,) = report.failures
            assert (failure.status, failure.table) == (MigrationStatus.FAILED, f"{one}.tenant_paper")
            assert "name its schema" in failure.message
            assert (await tenants.ref(one, 1)).backend == "old"
            report = await migrate(binding, storage_key="docs", to_backend="new", schemas=[one])
            assert (report.moved, report.failed, report.complete) == (1, 0, True)

    async def test_rows_of_another_store(self, tenants: Tenants) -> None:
        await fill(tenants)
        one = tenants.names[0]
        await tenants.rewrite(one, 1, (await tenants.ref(one, 1)).with_identity("another store"))
        with tenants.bound(writes_to="new") as binding:
            run = migrate(binding, storage_key="docs", to_backend="new")
            report = await run
            assert (report.moved, report.failed, report.complete, run.has_ended) == (2, 0, False, True)
            assert len(report.unseen) == 1
            assert (await tenants.ref(one, 1)).backend == "old"

    async def test_a_schema_that_is_behind(self, tenants: Tenants) -> None:
        """The migration of the database has not come to this tenant yet: its rows are named, and no statement on them fails."""
        await fill(tenants)
        one = tenants.names[0]
        await tenants.sql(f"ALTER TABLE {one}.tenant_paper DROP COLUMN version")
        with tenants.bound(writes_to="new") as binding:
            report = await migrate(binding, storage_key="docs", to_backend="new")
            assert (report.moved, report.failed) == (2, 1)
            assert f"{one}.tenant_paper has no column version" in report.failures[0].message
            assert (await tenants.ref(one, 1)).backend == "old"
            assert (await verify(binding)).problems == 0

    async def test_a_tenant_that_was_copied(self, tenants: Tenants) -> None:
        """The rows of two schemas hold one object: each gets a copy, and the object is deleted with the last one."""
        await tenants.add(tenants.names[0], 1)
        one, other = tenants.names
        await tenants.sql(f"INSERT INTO {other}.tenant_paper SELECT * FROM {one}.tenant_paper")  # noqa: S608
        with tenants.bound(writes_to="new") as binding:
            report = await migrate(binding, storage_key="docs", to_backend="new")
            assert (report.moved, report.failed, report.complete) == (2, 0, True)
            if binding.journal is not None:
                await binding.journal.recover()
            assert await tenants.objects("old") == set()
            assert len(await tenants.objects("new")) == 2
            assert (await verify(binding, deep=True)).problems == 0


class TestDerivation:
    async def test_every_tenant_gets_its_variants(self, tenants: Tenants) -> None:
        await fill(tenants)
        with tenants.bound() as binding:
            waiting = await rederive(binding, names=["loud"]).waiting()
            assert sorted(label for label, _, _ in waiting) == sorted(
                ["tenant_paper.file", *(f"{name}.tenant_paper.file" for name in tenants.names)]
            )
            report = await rederive(binding, names=["loud"])
            assert (report.counts, report.complete) == ({RederivationStatus.MADE: 3}, True)
            for name in tenants.names:
                assert set((await tenants.ref(name, 1)).variants or {}) == {"loud"}
            # Transactions on two attached files of SQLite may wait for each other; the displaced variants are then kept.
            one_by_one = {"concurrency": 1} if tenants.engine.dialect.name == "sqlite" else {}
            again = await rederive(binding, which="all", names=["loud"], schemas=tenants.names, **one_by_one)
            assert again.counts == {RederivationStatus.MADE: 2}
            if binding.journal is not None:
                await binding.journal.recover()
            assert len(await tenants.objects("old")) == 6
            assert (await verify(binding, deep=True)).checked == 6

    async def test_undeclared_variants_of_tenants_are_dropped(self, tenants: Tenants) -> None:
        await fill(tenants)
        one = tenants.names[0]
        with tenants.bound() as binding:
            await rederive(binding, names=["loud"], schemas=[one])
            ref = await tenants.ref(one, 1)
            await tenants.rewrite(one, 1, ref.with_variants({"quiet": (ref.variants or {})["loud"]}))
            report = await rederive(binding, drop_undeclared=True)
            assert report.counts == {RederivationStatus.DROPPED: 1}
            assert (await tenants.ref(one, 1)).variants is None
            if binding.journal is not None:
                await binding.journal.recover()
            assert len(await tenants.objects("old")) == 3

    async def test_rows_that_may_be_of_another_application(self, tenants: Tenants) -> None:
        await fill(tenants)
        one = tenants.names[0]
        await tenants.rewrite(one, 1, (await tenants.ref(one, 1)).with_identity(None))
        with tenants.bound() as binding:
            report = await rederive(binding, names=["loud"])
            assert report.counts == {RederivationStatus.MADE: 2, RederivationStatus.FAILED: 1}
            assert report.failures[0].table == f"{one}.tenant_paper"
            assert (await tenants.ref(one, 1)).variants is None


async def test_sharded_sessions_are_refused(database: Database) -> None:
    """They choose a shard for an instance: which rows a statement on a table would read is unknown."""
    engine = database.engine()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    shards = {
        "sync_session_class": ShardedSession,
        "shards": {"one": engine.sync_engine},
        "shard_chooser": lambda *_, **__: "one",
        "identity_chooser": lambda *_, **__: ["one"],
        "execute_chooser": lambda _: ["one"],
    }
    manager = Tenants(engine, []).manager()
    binding = bind_storage(Base, manager, session_factory=async_sessionmaker(**shards))
    try:
        with pytest.raises(ConfigurationError, match="the sessions are sharded"):
            await verify(binding)
    finally:
        binding.unbind()
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
        await engine.dispose()
