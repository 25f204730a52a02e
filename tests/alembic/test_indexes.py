"""Indexes over locations, and the journal's tables, on real databases."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, StorageJournal, StorageManager, StoragePolicy, attachment, bind_storage, journal_tables
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm.columns import StoredObjectRefType, location_column_name, location_index_name, location_of
from tests.alembic.conftest import Target
from tests.alembic.project import Project
from tests.alembic.test_autogenerate import MODELS, NOTHING

INDEX = """
from alembic import op
from granite_storage.alembic import create_location_index, drop_location_index

def upgrade():
    create_location_index(op, "document", "file", concurrently=True)

def downgrade():
    drop_location_index(op, "document", "file")
"""
JOURNAL = """
from alembic import op
from granite_storage.alembic import create_journal_tables, drop_journal_tables, upgrade_journal_tables

def upgrade():
    create_journal_tables(op)
    upgrade_journal_tables(op)

def downgrade():
    drop_journal_tables(op)
"""


def with_documents(target: Target, folder: Path, *, count: int = 2000) -> Project:
    project = Project.made(folder, target.url, MODELS, template=target.template)
    project.autogenerate("files")
    project.alembic("upgrade", "head")
    head = next(iter(project.versions())).name.partition("_")[0]
    project.revision("located", INDEX, down=head)
    document = Table("document", MetaData(), Column("id", Integer), Column("file", StoredObjectRefType().impl))
    values = [
        {"id": n, "file": {"storage_key": "a", "backend": "b", "location": f"x/{n}/file-of-a-document", "size": 1}}
        for n in range(1, count)
    ]
    target.run(lambda connection: connection.execute(document.insert(), values) and None)
    return project


def plan(target: Target, *, is_generated: bool) -> str:
    """How the database would look for the row that refers to an object, asked as the journal's worker does."""

    def explained(connection: object) -> str:
        dialect = connection.dialect  # type: ignore[attr-defined]
        document = Table("document", MetaData(), Column("id", Integer), Column("file", StoredObjectRefType()))
        backend, location = location_of(document.c.file, dialect.name, is_generated=is_generated)
        statement = select(backend, location).where(location.in_(["x/77/file-of-a-document", "x/none"]))
        sql = statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
        if dialect.name == "postgresql":
            connection.exec_driver_sql("ANALYZE document")  # type: ignore[attr-defined]
        how = "EXPLAIN QUERY PLAN" if dialect.name == "sqlite" else "EXPLAIN"
        assert len(connection.execute(statement).all()) == 1  # type: ignore[attr-defined]
        return str(connection.exec_driver_sql(f"{how} {sql}".replace("%", "%%")).all())  # type: ignore[attr-defined]

    return target.run(explained)


def test_reference_checks_use_the_index(target: Target, tmp_path: Path) -> None:
    project = with_documents(target, tmp_path)
    name = location_index_name("document", "file")
    assert name not in plan(target, is_generated=False)
    project.alembic("upgrade", "head")
    assert name in plan(target, is_generated=target.url.get_backend_name() == "mysql")
    assert NOTHING in project.alembic("check", filters="ignore")
    project.alembic("downgrade", "-1")
    assert name not in plan(target, is_generated=False)
    project.alembic("upgrade", "head")


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")
    plain: Mapped[str | None] = mapped_column(StoredObjectRefType())


journal_tables(Base.metadata)


@pytest.mark.parametrize("kind", ["asyncpg", "mariadb"], indirect=True)  # which can have a journal, and have such a driver
async def test_the_worker_asks_through_the_index(target: Target, tmp_path: Path) -> None:
    """Its own statement, seen as it is sent, and what the database makes of it."""
    import asyncio

    project = await asyncio.to_thread(with_documents, target, tmp_path)
    await asyncio.to_thread(project.alembic, "upgrade", "head")
    engine = create_async_engine(target.url)
    sent: list[str] = []
    manager = StorageManager(backends={"b": MemoryStorageBackend()}, policies={"documents": StoragePolicy("documents", "b")})
    journal = StorageJournal(engine)
    binding = bind_storage(Base, manager, journal=journal)
    try:
        async with engine.begin() as connection:
            await connection.exec_driver_sql("DELETE FROM document WHERE id > 1900")
        sent = await _asked(journal, engine)
    finally:
        binding.unbind()
        await manager.aclose()
        await engine.dispose()
    generated = location_column_name("file")
    assert any(
        "document" in sql and (generated if target.url.get_backend_name() == "mysql" else "->> 'location'") in sql for sql in sent
    )


async def _asked(journal: StorageJournal, engine: object) -> list[str]:
    """Give the worker something that a row may refer to, and return the statements that it sends."""
    import uuid
    from datetime import UTC, datetime, timedelta

    from sqlalchemy import insert

    tables = journal_tables(Base.metadata)
    sent: list[str] = []
    past = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=2)
    async with engine.begin() as connection:  # type: ignore[attr-defined]
        if connection.dialect.name == "postgresql":
            past = past.replace(tzinfo=UTC)
        values = {"id": uuid.uuid4(), "kind": "delete", "backend": "b", "location": "x/77/file-of-a-document", "due": past}
        await connection.execute(insert(tables.intent).values(values))

    def listen(_: object, __: object, statement: str, *___: object) -> None:
        sent.append(statement)

    from sqlalchemy import Engine

    event.listen(Engine, "before_cursor_execute", listen)
    try:
        report = await journal.recover()
    finally:
        event.remove(Engine, "before_cursor_execute", listen)
    assert report.kept == 1  # the row was found
    return sent


def test_the_journal_comes_and_goes(target: Target, tmp_path: Path) -> None:
    """Created by hand they are what the models say; and they do not go while they know of something."""
    project = Project.made(tmp_path, target.url, MODELS, template=target.template)
    project.revision("journal", JOURNAL)
    project.alembic("upgrade", "head")
    assert target.ask("SELECT value FROM granite_storage_meta WHERE name = 'schema_version'") == [("2",)]
    written = project.autogenerate("rest")
    assert "granite_storage_" not in written.replace("granite_storage import", "")
    if target.url.get_backend_name() == "sqlite":
        target.ask_nothing(
            "INSERT INTO granite_storage_intent (id, kind, backend, location, due) VALUES ('1', 'delete', 'b', 'x', '2020-01-01')"
        )
        assert "discard_pending" in project.alembic("downgrade", "base", fails=True)
        target.ask_nothing("DELETE FROM granite_storage_intent")
    target.ask_nothing("UPDATE granite_storage_meta SET value = '99' WHERE name = 'schema_version'")
    again = JOURNAL.replace("    create_journal_tables(op)\n", "").replace("drop_journal_tables(op)", "pass")
    for path in project.versions():
        if path.name != "journal.py":
            path.unlink()
    project.revision("again", again, down="journal")
    assert "version 99" in project.alembic("upgrade", "again", fails=True)
    project.alembic("downgrade", "base")
    assert not {name for name in target.tables() if name.startswith("granite_storage")}


@pytest.mark.parametrize("way", ["the helper", "autogenerate, then the helper"])
def test_the_journal_of_the_version_before(target: Target, tmp_path: Path, way: str) -> None:
    """Autogenerate finds the table and the columns that it lacks, and the helper adds what is not there yet."""
    project = Project.made(tmp_path, target.url, MODELS, template=target.template)
    project.revision("journal", JOURNAL)
    project.alembic("upgrade", "head")
    target.ask_nothing("DROP TABLE granite_storage_job")
    for name in ("intent", "reclaim"):
        target.ask_nothing(f"ALTER TABLE granite_storage_{name} DROP COLUMN source")
    target.ask_nothing("UPDATE granite_storage_meta SET value = '1' WHERE name = 'schema_version'")
    target.ask_nothing(
        "INSERT INTO granite_storage_intent (id, kind, backend, location, due)"
        " VALUES ('0192f0c0-0000-7000-8000-000000000000', 'delete', 'b', 'x', '2020-01-01')"
    )
    written = project.autogenerate("jobs")
    assert "create_table('granite_storage_job'" in written
    assert written.count("sa.Column('source'") == 2
    (generated,) = [path for path in project.versions() if path.name != "journal.py"]
    head = generated.name.partition("_")[0]
    if way == "the helper":
        generated.unlink()
        head = "journal"
    else:
        project.alembic("upgrade", "head")
        assert NOTHING in project.alembic("check")
    upgrade = JOURNAL.replace("    create_journal_tables(op)\n", "").replace("drop_journal_tables(op)", "pass")
    project.revision("upgraded", upgrade, down=head)
    project.alembic("upgrade", "head")
    assert "granite_storage_job" in target.tables()
    assert "granite_storage_" not in project.autogenerate("nothing of the journal").replace("granite_storage import", "")
    assert target.ask("SELECT value FROM granite_storage_meta WHERE name = 'schema_version'") == [("2",)]
    assert target.ask("SELECT location, source FROM granite_storage_intent") == [("x", None)]
    assert target.ask("SELECT count(source) FROM granite_storage_reclaim") == [(0,)]


def test_the_upgrade_is_needed_once(target: Target, tmp_path: Path) -> None:
    """A migration that was cut off between the two tables goes on, and one that runs again changes nothing."""
    project = Project.made(tmp_path, target.url, MODELS, template=target.template)
    project.revision("journal", JOURNAL)
    project.alembic("upgrade", "head")
    target.ask_nothing("ALTER TABLE granite_storage_reclaim DROP COLUMN source")
    target.ask_nothing("UPDATE granite_storage_meta SET value = '1' WHERE name = 'schema_version'")
    upgrade = JOURNAL.replace("    create_journal_tables(op)\n", "").replace("drop_journal_tables(op)", "pass")
    for down, name in (("journal", "upgraded"), ("upgraded", "again")):
        project.revision(name, upgrade, down=down)
        project.alembic("upgrade", "head")
        assert {"source"} <= target.columns("granite_storage_reclaim") & target.columns("granite_storage_intent")
    project.alembic("downgrade", "base")
    assert not {name for name in target.tables() if name.startswith("granite_storage")}
