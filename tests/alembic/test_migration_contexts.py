"""Where migrations run: inside of a coroutine, below `run_sync`, in a transaction of the caller."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.ext.asyncio import create_async_engine

from granite_storage import StorageManager, StoragePolicy
from granite_storage.alembic import add_storage_column, drop_converted_column, text_to_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError
from granite_storage.testing import FaultInjectingBackend
from tests.core.support import in_new_process


def manager_on(backend: Any) -> StorageManager:
    return StorageManager(backends={"b": backend}, policies={"notes": StoragePolicy("notes", "b")})


def convert(connection: sa.Connection, manager: StorageManager, **options: Any) -> None:
    op = Operations(MigrationContext.configure(connection))
    add_storage_column(op, "note", "file")
    text_to_storage(op, manager, "note", "body", "file", storage_key="notes", **options)
    drop_converted_column(op, manager, "note", "body", "file")


def create(connection: sa.Connection) -> None:
    connection.exec_driver_sql("CREATE TABLE note (id INTEGER PRIMARY KEY, body TEXT)")
    connection.exec_driver_sql("INSERT INTO note VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    connection.commit()


def refuse_the_third(connection: sa.Connection) -> None:
    connection.exec_driver_sql(
        "CREATE TRIGGER no BEFORE UPDATE ON note WHEN new.id = 3 BEGIN SELECT RAISE(ABORT, 'not this one'); END"
    )
    connection.commit()


async def contents(manager: StorageManager) -> set[bytes]:
    backend = manager.backend("b")
    found = set()
    async for info in backend.iter_objects():
        reader = await backend.open(info.location)
        found.add(await reader.read())
        await reader.aclose()
    return found


async def test_a_manager_that_the_application_has_open_goes_on_to_work(tmp_path: Path) -> None:
    """Below `run_sync`, on the application's own loop, which is not held up: it may itself be what the storage waits for."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.ensure_future(tick())
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/app.db")
    async with manager_on(MemoryStorageBackend()) as manager:
        async with engine.connect() as connection:
            await connection.run_sync(create)
            before = ticks
            await connection.run_sync(convert, manager)
            assert ticks > before + 10
        assert await contents(manager) == {b"one", b"two", b"three"}
    ticking.cancel()
    await engine.dispose()


def test_a_synchronous_migration_inside_of_a_coroutine_does_not_wait_for_itself(tmp_path: Path) -> None:
    """In a process of its own: waiting in a coroutine, which is what it is about, is watched for in this one."""
    in_new_process(f"""
import asyncio
import sqlite3
import sqlalchemy as sa
from tests.alembic.test_migration_contexts import MemoryStorageBackend, contents, convert, create, manager_on

async def run():
    manager = manager_on(MemoryStorageBackend())
    engine = sa.create_engine("sqlite:///{tmp_path}/app.db")
    with engine.connect() as connection:
        create(connection)
        convert(connection, manager)
    engine.dispose()
    return await contents(manager)

assert asyncio.run(run()) == {{b"one", b"two", b"three"}}
""")


def test_somebody_elses_transaction_is_not_committed(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    manager = manager_on(MemoryStorageBackend())
    with engine.connect() as connection:
        create(connection)
        connection.exec_driver_sql("BEGIN")
        transaction = connection.get_transaction()
        convert(connection, manager)
        assert connection.get_transaction() is transaction
        assert [column["name"] for column in sa.inspect(connection).get_columns("note")] == ["id", "file"]
        connection.rollback()
    with engine.connect() as connection:
        assert {column["name"] for column in sa.inspect(connection).get_columns("note")} == {"id", "body"}
    engine.dispose()


@pytest.mark.parametrize("operation", ["put_bytes", "open"])
def test_a_step_that_fails_leaves_nothing(tmp_path: Path, operation: Any) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    backend = FaultInjectingBackend(MemoryStorageBackend())
    backend.fail(operation, nth=3)
    manager = manager_on(backend)
    with engine.connect() as connection:
        create(connection)
        with pytest.raises(BackendUnavailableError) as caught:
            convert(connection, manager)
        assert any("note" in note for note in caught.value.__notes__)
        assert asyncio.run(contents(manager)) == set()
        convert(connection, manager)
        assert asyncio.run(contents(manager)) == {b"one", b"two", b"three"}
    engine.dispose()


def test_a_row_that_cannot_be_written_leaves_no_object(tmp_path: Path) -> None:
    """The objects are removed after the ROLLBACK: until then rows may be locked, for as long as the store takes."""

    def write_from_elsewhere() -> None:
        with closing(sqlite3.connect(tmp_path / "app.db", timeout=0)) as other:
            other.execute("BEGIN IMMEDIATE")

    class Backend(MemoryStorageBackend):
        async def delete(self, location: str) -> None:
            await asyncio.to_thread(write_from_elsewhere)
            await super().delete(location)

    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    manager = manager_on(Backend())
    with engine.connect() as connection:
        create(connection)
        refuse_the_third(connection)
        with pytest.raises(sa.exc.IntegrityError, match="not this one"):
            convert(connection, manager)
    assert asyncio.run(contents(manager)) == set()
    engine.dispose()


@pytest.mark.parametrize("begun", [True, False])
def test_a_step_that_fails_in_somebody_elses_transaction_leaves_no_row(tmp_path: Path, begun: bool) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    manager = manager_on(MemoryStorageBackend())
    with engine.connect() as connection:
        create(connection)
        refuse_the_third(connection)
        connection.exec_driver_sql("BEGIN" if begun else "SELECT 1")
        with pytest.raises(sa.exc.IntegrityError, match="not this one"):
            convert(connection, manager)
        connection.commit()
        assert connection.exec_driver_sql("SELECT count(*), count(file) FROM note").one() == (3, 0)
    assert asyncio.run(contents(manager)) == set()
    engine.dispose()


def test_steps_go_with_somebody_elses_transaction(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    manager = manager_on(MemoryStorageBackend())
    with engine.connect() as connection:
        create(connection)
        add_storage_column(Operations(MigrationContext.configure(connection)), "note", "file")
        connection.commit()
        with connection.begin():
            op = Operations(MigrationContext.configure(connection))
            text_to_storage(op, manager, "note", "body", "file", storage_key="notes", concurrency=1)
            connection.get_transaction().rollback()
        assert connection.exec_driver_sql("SELECT count(*), count(file) FROM note").one() == (3, 0)
    engine.dispose()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE TABLE note (id INTEGER, body TEXT, file JSON)", "no primary key"),
        ("CREATE TABLE note (id INTEGER PRIMARY KEY, body TEXT)", "no column file"),
        ("CREATE TABLE note (id INTEGER PRIMARY KEY, body TEXT, file JSON)", "no column name"),
        ("CREATE TABLE note (id INTEGER, body TEXT, file TEXT PRIMARY KEY)", "part of the primary key"),
    ],
)
def test_a_table_that_cannot_be_converted_is_refused(tmp_path: Path, statement: str, words: str) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
        connection.commit()
        op = Operations(MigrationContext.configure(connection))
        also_read = ["name"] if "name" in words else []
        with pytest.raises(ConfigurationError, match=words):
            text_to_storage(
                op,
                manager_on(MemoryStorageBackend()),
                "note",
                "body",
                "file",
                storage_key="notes",
                also_read=also_read,
            )
    engine.dispose()


def test_nothing_is_written_as_sql() -> None:
    context = MigrationContext.configure(dialect_name="postgresql", opts={"as_sql": True})
    with pytest.raises(ConfigurationError, match="without --sql"):
        text_to_storage(Operations(context), manager_on(MemoryStorageBackend()), "note", "body", "file", storage_key="notes")
